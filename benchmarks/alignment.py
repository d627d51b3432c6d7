"""Bench: preference alignment of SmolLM2 on right and wrong answers to school questions, split over exam boards.

For each loss, over the same rows and steps: the base, every board alone, the federation, and all rows in one place,
each measured after its last step on the test pairs of all boards (`fedlm compare` on the template `preference`). Asked:
is the federation at least as good as the mean of boards alone, and does it reach 90 % of what one place gains?

A comparison that was stopped goes on where it was. `--quick` shows that the script works, and no more.

    python benchmarks/alignment.py [--losses dpo,kto] [--out runs/alignment] [--seeds 0] [--workers 2] [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedlm.comparison.triple import compare
from fedlm.files import write_json
from fedlm.messages import Event
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template

SETTINGS = ("federation.rounds=6", "training.steps=10", "training.lr=5e-4", "evaluation.max_examples=150")
QUICK = ("federation.rounds=2", "training.steps=2", "data.partition.max_silos=2", "evaluation.max_examples=20")
FIGURES = ("reward_accuracy", "ranking_accuracy", "reward_margin", "kl", "loss")
ARMS = {
    "base": "base model",
    "alone": "each board alone (mean)",
    "federated": "federated",
    "centralised": "one place",
}
SHARE = 0.9
"""Of the gain in one place that the federation shall reach."""


def recipe_of(loss: str, folder: Path, changes: tuple[str, ...]) -> Recipe:
    """The template with this loss; validated once at the end, which no arm's result depends on."""
    file = folder / "preference.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(read_template("preference"), encoding="utf-8")
    return load_recipe(file, (*changes, f"preference.loss={loss}", "evaluation.every=1000"))


def measure(loss: str, folder: Path, changes: tuple[str, ...], seeds: list[int], workers: int) -> dict[str, Any]:
    """One loss: figures by kind of arm, and how the federation stands to the others."""
    run_dir = folder / loss

    def tell(event: Event) -> None:
        if event["kind"] in ("run_done", "phase"):
            print(f"{loss}: {event.get('arm', '')} {event.get('text', 'trained')}", flush=True)

    outcome = compare(
        recipe_of(loss, folder, changes),
        run_dir=run_dir,
        seeds=seeds,
        budgets=("steps",),
        workers=workers,
        resume=(run_dir / "run.json").exists(),
        observe=tell,
    )
    arms: dict[str, dict[str, Any]] = {}
    for row in outcome["table"]:
        if row["of"] is None:
            of_kind = [a["metrics"] for a in outcome["arms"] if a["arm"].split(":")[0] == row["kind"]]
            means = {f: sum(m[f] for m in of_kind) / len(of_kind) for f in FIGURES if all(f in m for m in of_kind)}
            interval = row.get("reward_accuracy_interval")
            arms[row["kind"]] = {**means, "interval": interval, "seconds": row["seconds"], "steps": row["steps"]}
    metric = "reward_accuracy"
    found = {"loss": loss, "arms": arms, "verdict": outcome["verdict"]}
    base, alone, federated, one = (arms[kind][metric] for kind in ARMS)
    gain = (federated - base) / (one - base) if one > base else None
    return {
        **found,
        "share_of_gain": gain,
        "beats_alone": federated >= alone,
        "reaches_share": gain is not None and gain >= SHARE,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """A table of arms, and a line for each loss."""
    lines = ["| loss | arm | reward accuracy, 95 % | ranking accuracy | margin | KL | steps | s |", "|" + "---|" * 8]
    for result in results:
        for kind, name in ARMS.items():
            arm = result["arms"][kind]
            cells = [result["loss"], name, f"{_share(arm['reward_accuracy'])} %"]
            if arm["interval"]:
                cells[-1] += f" [{_share(arm['interval'][0])}, {_share(arm['interval'][1])}]"
            cells += [f"{_share(arm['ranking_accuracy'])} %", f"{arm['reward_margin']:.3f}", f"{arm['kl']:.4f}"]
            cells += [f"{arm['steps'] or 0:.0f}", f"{arm['seconds'] or 0:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for result in results:
        alone = "at least the mean of boards alone" if result["beats_alone"] else "below the mean of boards alone"
        gain = result["share_of_gain"]
        share = "one place gains nothing" if gain is None else f"{_share(gain)} % of the gain in one place"
        lines.append(f"- {result['loss']}: federated is {alone}, with {share}. {result['verdict']['sentence']}")
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", default="dpo,kto")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", default="0", help="several, with commas: intervals are over seeds then")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="another setting of the recipe")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    changes = (*(QUICK if options.quick else SETTINGS), *options.changes)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results = []
    for loss in options.losses.split(","):
        results.append(measure(loss, options.out, changes, seeds, options.workers))
        write_json(options.out / "alignment.json", {"settings": list(changes), "seeds": seeds, "results": results})
    print(markdown(results))


if __name__ == "__main__":
    main()
