"""Bench: reinforcement of SmolLM2 over silos, from a reward that can be checked and from a federated reward model.

words   the template `reinforce`: questions on a passage, an answer earns the F1 of its words; six silos of which four
        train in a round, 32 steps of 8 prompts x 4 answers in each
judge   the template `reward` trains a reward model on right and wrong answers to school questions; then the model
        writes answers to such questions that this judge rewards, the same steps

Each is measured on held-out prompts, before, after the federation and after the same training in one place
(`fedlm compare` without silos alone); differences are paired by prompt, with bootstrap intervals. A bench that was
stopped goes on where it was. `--quick` shows that the script works, and no more.

    python benchmarks/reinforce.py [--arms words,judge] [--method grpo] [--out runs/reinforce] [--set A.B=C] [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedlm.comparison.triple import compare
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.files import write_json
from fedlm.messages import Event
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template

STEPS = ("federation.rounds=8", "training.steps=4", "training.batch_size=8", "training.lr=3e-4")
HELD_OUT = ("evaluation.max_examples=40", "evaluation.every=1000", "training.max_length=512")
QUICK = ("federation.rounds=1", "training.steps=1", "evaluation.max_examples=2")
FIGURES = ("reward", "kl", "answer_tokens", "unfinished")


def settings(quick: bool) -> tuple[str, ...]:
    return (*STEPS, *HELD_OUT, *(QUICK if quick else ()))


def template(name: str, folder: Path, changes: tuple[str, ...]) -> Recipe:
    """A recipe that comes with fedlm, with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(read_template(name), encoding="utf-8")
    return load_recipe(file, changes)


def judge(folder: Path, quick: bool, changes: list[str]) -> Path:
    """The run directory of the reward model, trained if it is not there yet."""
    run_dir = folder / "reward"
    recipe = template("reward", folder, ("evaluation.every=1000", *(QUICK if quick else ()), *of_model(changes)))
    begun = (run_dir / "run.json").exists()
    if not begun or RunDir.open(run_dir, write=False).meta["status"] != "finished":
        print("training the reward model", flush=True)
        run_recipe(recipe, run_dir=run_dir, resume=begun)
    return run_dir


def of_model(changes: list[str]) -> list[str]:
    """Those that say what the model is: the judge takes them too."""
    return [change for change in changes if change.startswith("model.")]


def measure(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """One arm of the bench: figures before, after and in one place, and the paired differences."""
    folder, method = options.out, options.method
    changes = (*settings(options.quick), f"reinforce.method={method}")
    if arm == "judge":
        source = f"reinforce.reward={{kind: model, run: {judge(folder, options.quick, options.changes)}}}"
        school = template("preference", folder, ()).data.model_dump_json(exclude_defaults=True)
        changes = (*changes, source, f"data={school}", "reinforce.max_new_tokens=24", "federation.sample=all")
    recipe, run_dir = template("reinforce", folder, (*changes, *options.changes)), folder / f"{arm}-{method}"

    def tell(event: Event) -> None:
        if event["kind"] == "round_done" and event["round"] >= 0:
            reward = (event.get("figures") or {}).get("reward")
            print(f"{arm}: {event.get('arm', '')} round {event['round']}, reward {reward}", flush=True)

    outcome = compare(
        recipe,
        run_dir=run_dir,
        budgets=(),
        workers=options.workers,
        resume=(run_dir / "run.json").exists(),
        observe=tell,
    )
    rows = {}
    for row in outcome["table"]:
        (metrics,) = (found["metrics"] for found in outcome["arms"] if found["arm"] == row["arm"])
        rows[row["kind"]] = {**{f: metrics.get(f) for f in FIGURES}, "interval": row["reward_interval"], **_cost(row)}
    return {"arm": arm, "method": method, "rows": rows, "verdict": outcome["verdict"]}


def _cost(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("steps", "seconds", "bytes_up")}


def markdown(results: list[dict[str, Any]]) -> str:
    """A table of all arms, and the paired differences."""
    lines = ["| reward | model | held-out reward, 95 % | KL | tokens of an answer | steps |", "|" + "---|" * 6]
    for result in results:
        for kind, row in result["rows"].items():
            low, high = row["interval"]
            kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
            cells = [f"{result['arm']} ({result['method']})", kind, f"{row['reward']:.3f} [{low:.3f}, {high:.3f}]", kl]
            lines.append("| " + " | ".join([*cells, f"{row['answer_tokens']:.1f}", f"{row['steps'] or 0:.0f}"]) + " |")
    lines.append("")
    for result in results:
        for c in result["verdict"]["comparisons"]:
            low, high = c["interval"]
            lines.append(
                f"- {result['arm']}: federated minus {c['against']}: {c['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
                f"{result['verdict']['items']} prompts"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default="words,judge")
    parser.add_argument("--method", default="grpo", choices=["grpo", "rloo"])
    parser.add_argument("--out", type=Path, default=Path("runs/reinforce"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="another setting of the recipe")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    results = []
    for arm in options.arms.split(","):
        results.append(measure(arm, options))
        write_json(options.out / f"reinforce-{options.method}.json", {"results": results})
    print(markdown(results))


if __name__ == "__main__":
    main()
