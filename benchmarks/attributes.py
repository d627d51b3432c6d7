"""Bench: is a topic among a silo's rows? Told from its update alone, from sums, and under noise.

    python benchmarks/attributes.py [--out runs/attributes] [--quick] [--arms a,b] [--report]

A silo holds 16 articles of BBC news in pieces of 200 letters, each to be gone on with after five words. With the
property half of the articles are of sport; without it none is. The model has a million parameters and was trained on a
third of all articles (`parts/small_model.py`); a round is what `RECIPE` says. The silos to be guessed about have
articles that no other has. The coordinator has what is left, deals it to shadow silos again and again, and trains these
by the same recipe (`fedlm.attacks.attributes`).

    open      each silo's update, as the coordinator sees it without protection
    sum of m  the mean of m silos' updates, one of which has the property, or none (masks)
    example   each silo's update by DP-SGD, all of the budget in this round
    silo      updates clipped, the mean of m with the coordinator's noise, all of the budget in this round: what those
              see who get the models; the coordinator itself sees `clipped`

The attacker learns from shadow updates with the same protection, and from bare ones: the better on shadows, by
five-fold cross-validation of the former, is used. Each sum of the silos to be guessed has another silo with the
property, or another without it, in its first place; the others are drawn among those without, and are in several
sums. Intervals are of 95 %.
What is in OUT is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from backdoor import articles, write_lines
from fedlm.attacks.attributes import Linear, Marks, Matrix, Told, learn, sketched, told
from fedlm.attacks.dager import noised
from fedlm.attacks.first_round import first_round
from fedlm.data.federated import load_data
from fedlm.files import write_atomic, write_json
from fedlm.messages import Tensors
from fedlm.models.adapters import initial_tensors
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.clipping import clip, l2_norm
from fedlm.privacy.mechanisms import Gaussian
from fedlm.randomness import numpy_generator
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from parts.small_model import news_model

ARTICLES, PIECES, LETTERS, ASKED = 16, 4, 200, 5
SHADOWS, TARGETS = 80, 30
"""With the property, and as many without it."""
NOISED = 30
"""Shadows that are trained by DP-SGD."""
SUMS, DELTA = (2, 4, 8), 0.01
EPSILONS = {"silo": (100.0, 8.0, 1.0), "example": (8.0,)}
RECIPE = """
name: topic
task: instruct
model: {{source: model, dtype: float32, chat_template: chatml}}
adapter: {{kind: lora, rank: 8, alpha: 16, targets: all-linear}}
data: {{silos: [{silos}]}}
training: {{lr: 2e-3, schedule: constant, steps: 2, batch_size: 8, max_length: 56}}
federation: {{rounds: 1, algorithm: {{name: fedavg, weights: equal}}, workers: 1}}
"""
Updates = dict[str, Tensors]


# -------------------------------------------------------------------------------- silos


def prepare(out: Path, shadows: int, targets: int, *, quick: bool) -> None:
    """OUT/model, and every silo's rows: shadow-*, target-*, each -with or -none."""
    if (out / "prepared").exists():
        return
    sport, other = news_model(out / "model", articles(), quick=quick)
    kinds = (("with", ARTICLES // 2), ("none", 0))
    for number, (kind, half) in itertools.product(range(targets), kinds):
        write_silo(out, f"target-{number:03}-{kind}", take(sport, half) + take(other, ARTICLES - half))
    draw = numpy_generator(0, "shadow silos")
    for number, (kind, half) in itertools.product(range(shadows), kinds):
        picked = [sport[i] for i in draw.permutation(len(sport))[:half]]
        picked += [other[i] for i in draw.permutation(len(other))[: ARTICLES - half]]
        write_silo(out, f"shadow-{number:03}-{kind}", picked)
    write_atomic(out / "prepared", b"")


def take(pool: list[str], count: int) -> list[str]:
    """So many articles, which no other silo gets."""
    if len(pool) < count:
        raise SystemExit("there are not enough articles for so many silos")
    taken, pool[:] = pool[:count], pool[count:]
    return taken


def write_silo(out: Path, name: str, texts: Sequence[str]) -> None:
    pieces = [text[i * LETTERS : (i + 1) * LETTERS].strip() for text in texts for i in range(PIECES)]
    write_lines(out / "rows" / f"{name}.jsonl", [row_of(piece) for piece in pieces if len(piece) > LETTERS // 2])


def row_of(piece: str) -> dict[str, str]:
    """How it begins, and how it goes on."""
    words = piece.split()
    return {"prompt": " ".join(words[:ASKED]), "response": " ".join(words[ASKED:])}


def recipe_of(out: Path, silos: Sequence[str], changes: Sequence[str]) -> Recipe:
    source = "{{name: {0}, sources: [{{path: rows/{0}.jsonl, role: train, "
    source += "columns: {{prompt: prompt, response: response}}}}]}}"
    file = out / "recipe.yaml"
    write_atomic(file, RECIPE.format(silos=", ".join(source.format(s) for s in silos)).encode())
    return load_recipe(file, list(changes))


# -------------------------------------------------------------------------------- updates


def updates_of(out: Path, arm: str, changes: Sequence[str], shadows: int) -> Updates:
    """The updates of the first round of all targets and of so many pairs of shadows, by the recipe with these changes;
    kept in OUT."""
    file = out / f"{arm}.safetensors"
    if not file.exists():
        silos = sorted(rows.stem for rows in (out / "rows").glob("*-*.jsonl"))
        silos = [name for name in silos if name.startswith("target") or int(name.split("-")[1]) < shadows]
        recipe = recipe_of(out, silos, changes)
        made = first_round(recipe, load_data(recipe, out), out).updates
        save_file({f"{silo} {n}": t.contiguous() for silo, u in made.items() for n, t in u.items()}, file)
    found: Updates = {}
    for name, tensor in load_file(file).items():
        silo, _, parameter = name.partition(" ")
        found.setdefault(silo, {})[parameter] = tensor
    return found


def mean(updates: Sequence[Tensors]) -> Tensors:
    return {n: sum((u[n] for u in updates[1:]), updates[0][n].clone()) / len(updates) for n in updates[0]}


def sums(updates: Updates, m: int, who: str) -> Updates:
    """The mean of m silos each, whose first has the property or not, and the others have not."""
    without = sorted(name for name in updates if name.startswith(who) and name.endswith("-none"))
    found: Updates = {}
    for first in sorted(name for name in updates if name.startswith(who)):
        others = [name for name in without if name != first]
        drawn = numpy_generator(0, "others in the sum", first, m).permutation(len(others))[: m - 1]
        found[first] = mean([updates[first], *(updates[others[i]] for i in drawn)])
    return found


def with_noise(updates: Updates, bound: float, deviation: float) -> Updates:
    """Noise of this deviation on every number; `bound` is above all norms, so nothing is clipped again."""
    return {
        name: noised(update, bound, deviation / bound, seed=int(numpy_generator(0, name).integers(2**31)))[0]
        for name, update in updates.items()
    }


# -------------------------------------------------------------------------------- attack


class Coordinator:
    """What it knows: the broadcast model and the bare updates of its shadows."""

    def __init__(self, start: Tensors) -> None:
        self.start, self.bare = start, {}

    def features(self, updates: Updates, who: str) -> tuple[Matrix, Marks]:
        names = sorted(name for name in updates if name.startswith(who))
        return (
            np.stack([sketched(self.start, updates[name]) for name in names]),
            np.array([name.endswith("-with") for name in names]),
        )

    def attack(self, seen: Updates, bare: Updates) -> tuple[Told, str]:
        """Guess about the targets in `seen`, by shadows in `seen` or by those in `bare`, whichever tells shadows in
        `seen` apart better."""
        x, marks = self.features(seen, "shadow")
        ways: dict[str, Linear] = {"protected": learn(x, marks), "bare": learn(*self.features(bare, "shadow"))}
        quality = {"protected": left_out(x, marks), "bare": told(ways["bare"].scores(x), marks).auc}
        best = max(quality, key=lambda way: quality[way]) if seen is not bare else "protected"
        targets, truth = self.features(seen, "target")
        return told(ways[best].scores(targets), truth), best


def left_out(x: Matrix, marks: Marks, folds: int = 5) -> float:
    """AUC of scores of shadows by fits to other shadows."""
    scores = np.empty(len(x))
    for fold in range(folds):
        out = np.arange(len(x)) % (2 * folds) // 2 == fold  # pairs of one with and one without
        scores[out] = learn(x[~out], marks[~out]).scores(x[out])
    return told(scores, marks).auc


def protected(open_updates: Updates, arms: Sequence[str]) -> dict[str, tuple[Updates, Updates]]:
    """By configuration, what is seen, and the same of updates without noise."""
    found: dict[str, tuple[Updates, Updates]] = {}
    bound = float(np.median([l2_norm(u) for u in open_updates.values()]))
    clipped = {name: clip(update, bound).tensors for name, update in open_updates.items()}
    if "sum" in arms:
        for m in SUMS:
            both = {**sums(open_updates, m, "shadow"), **sums(open_updates, m, "target")}
            found[f"mask: mean of {m}"] = (both, both)
    if "silo" in arms:
        found["`unit: silo`: clipped update (the coordinator's view)"] = (clipped, clipped)
        m = SUMS[-1]
        both = {**sums(clipped, m, "shadow"), **sums(clipped, m, "target")}
        for epsilon in EPSILONS["silo"]:
            asked = Gaussian("silo", "zero-out", None)
            multiplier = calibrate(asked, epsilon, DELTA, m).noise_multiplier
            assert multiplier is not None
            seen = with_noise(both, 2 * bound, multiplier * bound / m)
            found[f"`unit: silo`, epsilon {epsilon:g}: noised mean of {m}"] = (seen, both)
    return found


def line(words: str, one: dict[str, Any]) -> str:
    accuracy, low, high = (100 * v for v in (one["accuracy"], *one["interval"]))
    area = "{:.2f} [{:.2f}, {:.2f}]".format(one["auc"], *one["auc_interval"])
    cells = [words, f"{accuracy:.0f} % [{low:.0f}, {high:.0f}]", area, f"{100 * one['majority']:.0f} %"]
    verdict = "ranked above chance" if one["auc_interval"][0] > 0.5 else "not above the guess"
    verdict = "**told**" if one["p_value"] < 0.025 else verdict
    return f"| {' | '.join([*cells, str(one['silos']), one['by'], verdict])} |"


def table(results: dict[str, Any]) -> str:
    head = "| what is seen | accuracy | AUC | majority guess | silos | shadows | |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(line(words, one) for words, one in results.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attributes"))
    parser.add_argument("--quick", action="store_true", help="a check of the script: few silos, one step")
    parser.add_argument("--arms", default="open,sum,silo,example")
    parser.add_argument("--report", action="store_true", help="the table of what is finished, and nothing else")
    options = parser.parse_args()
    out, file = options.out, options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if options.report:
        print(table(results))
        return
    arms, began = options.arms.split(","), time.perf_counter()
    shadows, targets = (10, 10) if options.quick else (SHADOWS, TARGETS)
    prepare(out, shadows, targets, quick=options.quick)
    start = initial_tensors(recipe_of(out, ["target-000-none"], []))
    few = ["training.steps=1"] if options.quick else []
    print(f"prepared: {time.perf_counter() - began:.0f} s", flush=True)
    coordinator = Coordinator(start)

    def note(words: str, seen: Updates, bare: Updates) -> None:
        outcome, by = coordinator.attack(seen, bare)
        results[words] = {**vars(outcome), "by": by}
        write_json(file, results)
        print(line(words, results[words]), f"{time.perf_counter() - began:.0f} s", flush=True)

    bare = updates_of(out, "open", few, shadows)
    note("open: a silo's update", bare, bare)
    for words, (seen, without) in protected(bare, arms).items():
        note(words, seen, without)
    for epsilon in EPSILONS["example"] if "example" in arms else ():
        spec = f"privacy={{unit: example, epsilon: {epsilon:g}, delta: {DELTA}}}"
        note(
            f"`unit: example`, epsilon {epsilon:g}: a silo's update",
            updates_of(out, f"example-{epsilon:g}", [*few, spec, "training.clip_norm=null"], NOISED),
            bare,
        )
    print(table(results))


if __name__ == "__main__":
    main()
