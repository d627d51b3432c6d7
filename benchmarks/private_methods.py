"""Bench: LoRA methods under one epsilon: FedIT, FFA-LoRA, FedSVD and LoRA-XS, trained by noised gradients.

    python benchmarks/private_methods.py --out OUT [--epsilons 8,2] [--seeds 0,1,2] [--rates ...] [--quick]

`recipes/small.yaml`: five presidents' addresses and a tiny Llama that has read others' before 1900 (a really trained
one, 0.4 M parameters), LoRA of rank 8 on all linear layers. Each silo trains by DP-SGD (`privacy.unit: example`), its
noise calibrated to its own rows for all 8 rounds of 8 steps of 64 rows. What is the same for all methods: epsilon and
delta, the sampler, the clip, the rounds. What each has for itself: its learning rate, the best of --rates by validation
loss with the first seed, which is charged to nobody: real runs would have to pay for such a search, or know the rate.

Fed-SB itself cannot be trained so: its first round sends sketches of gradients, which the recipe refuses under
`privacy`; LoRA-XS is its square matrix between bases that come from the weights alone. Figures of silos are open here,
since they are what is measured. OUT keeps a line for each training, and what is there is not trained again.

Reported: mean loss on the silos' test rows, its gain over the base model's, and the part of the gain without noise that
is left; mean and 95 % interval (Student's t) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from fedlm.comparison.bench.small import prepare
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.recipe.load import load_recipe

METHODS = {"fedit": "lora", "ffa-lora": "lora", "fedsvd": "lora", "lora-xs": "lora-sb"}
RATES = (1.5e-3, 5e-3, 1.5e-2, 5e-2, 1.5e-1)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Messages as they are: with `task: pretrain` a row may become several examples, and privacy is of a row."""

RECIPE = Path(__file__).parents[1] / "recipes" / "small.yaml"


def changes(method: str, epsilon: float | None, lr: float, seed: int, quick: bool) -> list[str]:
    """What a training changes in the small recipe."""
    noise = f"{{unit: example, epsilon: {epsilon}, delta: 1.0e-4, clip: 1.0, figures: open}}"
    return [
        f"federation.algorithm={{name: {method}, weights: equal}}",
        f"adapter.kind={METHODS[method]}",
        f"training={{lr: {lr}, steps: 8, batch_size: 64, max_length: 96, clip_norm: null}}",
        f"privacy={'null' if epsilon is None else noise}",
        f"seed={seed}",
        "task=instruct",
        "model.chat_template=plain.jinja",
        "data.sources.0.columns={prompt: '{president}: ', response: text, label: president}",
        f"federation.rounds={2 if quick else 8}",
        f"evaluation={{metrics: [loss], max_examples: {8 if quick else 96}}}",
    ]


def train(out: Path, method: str, epsilon: float | None, lr: float, seed: int, quick: bool) -> dict[str, float]:
    """One training's losses: of validation rows after the last round, of test rows before and after.

    The split is by a hash of each row and does not depend on the seed.
    """
    kept = out / "trainings.jsonl"
    key = {"method": method, "epsilon": epsilon, "lr": lr, "seed": seed}
    for line in kept.read_text().splitlines() if kept.exists() else []:
        found = json.loads(line)
        if found["key"] == key:
            return dict(found["losses"])
    recipe = load_recipe(out / RECIPE.name, changes(method, epsilon, lr, seed, quick))
    folder = out / "-".join(map(str, key.values()))
    run_recipe(recipe, base=out, run_dir=folder, resume=(folder / "run.json").exists())
    outcome = json.loads((folder / "evaluation.json").read_text())
    losses = {
        "validation": RunDir.open(folder, write=False).rounds()[-1]["validation"]["loss"],
        "base": outcome["base"]["loss"],
        "test": outcome["final"]["loss"],
    }
    with kept.open("a") as file:
        file.write(json.dumps({"key": key, "losses": losses}) + "\n")
    print(f"{method} epsilon {epsilon} lr {lr:g} seed {seed}: {losses['base']:.4f} -> {losses['test']:.4f}", flush=True)
    return losses


def compare(
    out: Path, epsilons: list[float | None], seeds: list[int], rates: list[float], quick: bool
) -> list[dict[str, Any]]:
    rows = []
    for epsilon in epsilons:
        for method in METHODS:
            first = {lr: train(out, method, epsilon, lr, seeds[0], quick)["validation"] for lr in rates}
            best = min(first, key=lambda lr: first[lr] if math.isfinite(first[lr]) else math.inf)
            found = [train(out, method, epsilon, best, seed, quick) for seed in seeds]
            gains = [losses["base"] - losses["test"] for losses in found]
            mean, wide = statistics.mean(gains), math.nan
            if len(gains) > 1:
                t = float(stats.t.ppf(0.975, len(gains) - 1))
                wide = t * statistics.stdev(gains) / math.sqrt(len(gains))
            test = statistics.mean(losses["test"] for losses in found)
            rows.append({"method": method, "epsilon": epsilon, "lr": best, "test": test, "gain": mean, "half": wide})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epsilons", default="8,2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--quick", action="store_true", help="a check of the script: 2 rounds, one rate")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.out / "small")
    (args.out / "plain.jinja").write_text(TEMPLATE)
    shutil.copy(RECIPE, args.out)  # its paths are from where it lies
    epsilons = [None, *map(float, args.epsilons.split(","))]
    seeds, rates = [int(seed) for seed in args.seeds.split(",")], [float(rate) for rate in args.rates.split(",")]
    rows = compare(args.out, epsilons, seeds, rates[:1] if args.quick else rates, args.quick)
    print(
        "| method | epsilon | rate | test loss | gain over the base | of its gain without noise |\n|---|" + "---:|" * 5
    )
    plain = {row["method"]: row["gain"] for row in rows if row["epsilon"] is None}
    for row in rows:
        epsilon = "–" if row["epsilon"] is None else f"{row['epsilon']:g}"
        print(
            f"| {row['method']} | {epsilon} | {row['lr']:g} | {row['test']:.4f} "
            f"| {row['gain']:.4f} ± {row['half']:.4f} | {100 * row['gain'] / plain[row['method']]:.0f} % |"
        )
    (args.out / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
