"""Bench: what a prompt gains over none, and what it costs to send one, on real news and a real model.

    python benchmarks/prompts.py --out runs/prompts [--kinds prompt prefix ...] [--seeds 0] [--set A.B=C ...]

The recipe is the template `prompt` (SmolLM2-135M, BBC topics in four silos by Dirichlet 0.3); the other kinds change
the adapter and what belongs to it, and `fedbpt` is the template of that name. Reported for each: accuracy and loss on
held-out articles without a prompt (zero-shot) and with the run's best one, bytes that a silo receives and sends per
round, and seconds. Accuracies have Wilson intervals of 95 %. Finished runs in --out are read and not repeated, an
interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedlm.evaluation.intervals import wilson
from fedlm.federation.api import run_recipe
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template

TEXT = "Read the news article and name its topic: business, entertainment, politics, sports or tech."
KINDS: dict[str, tuple[str, list[str]]] = {
    "prompt": ("prompt", []),
    "p-tuning": ("prompt", ["adapter={kind: p-tuning}", "training.lr=2e-3"]),
    "prefix": ("prompt", [f'adapter={{kind: prefix, prompt_text: "{TEXT}"}}', "training.lr=1e-2"]),
    "lora": ("prompt", ["adapter={kind: lora}", "training.lr=5e-4"]),
    "fedbpt": ("fedbpt", []),
}
"""Template and changes. 'lora' is the reference that trains weights."""


def recipe_of(kind: str, seed: int, more: list[str], folder: Path) -> Recipe:
    template, changes = KINDS[kind]
    file = folder / f"{template}.yaml"
    file.write_text(read_template(template))
    return load_recipe(file, [*changes, f"seed={seed}", *more])


def finished(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Run, go on, or read; evaluation and the mean round."""
    meta = run_dir / "run.json"
    if not (meta.is_file() and json.loads(meta.read_text())["status"] == "finished"):
        begun = (run_dir / "rounds.jsonl").is_file()
        run_recipe(None if begun else recipe, run_dir=run_dir, resume=begun, force=not begun)
    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    return {"evaluation": json.loads((run_dir / "evaluation.json").read_text()), "rounds": lines}


def row(found: dict[str, Any]) -> dict[str, float]:
    """The figures of one run."""
    trained = [line for line in found["rounds"] if line["round"] >= 0]
    silos = [silo for line in trained for silo in line["silos"].values()]
    base, final = (found["evaluation"][which] for which in ("base", "final"))
    return {
        "zero-shot": base["accuracy"],
        "accuracy": final["accuracy"],
        "examples": final["accuracy_total"],
        "zero-shot loss": base["loss"],
        "loss": final["loss"],
        "down": sum(silo["bytes_down"] for silo in silos) / len(silos),
        "up": sum(silo["bytes_up"] for silo in silos) / len(silos),
        "seconds": sum(line["seconds"] for line in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["prompt", "p-tuning", "prefix", "fedbpt"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=C")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'kind':10} seed  zero-shot  accuracy [95 %]         loss           bytes down    up  seconds")
    for kind in args.kinds:
        for seed in args.seeds:
            recipe = recipe_of(kind, seed, args.changes, args.out)
            r = row(finished(recipe, args.out / f"{kind}-{seed}"))
            low, high = wilson(round(r["accuracy"] * r["examples"]), int(r["examples"]))
            print(
                f"{kind:10} {seed:4}  {r['zero-shot']:9.3f}  {r['accuracy']:.3f} [{low:.3f}, {high:.3f}]  "
                f"{r['zero-shot loss']:.3f} -> {r['loss']:.3f}  {r['down']:12,.0f} {r['up']:9,.0f} {r['seconds']:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
