"""Bench: what asynchronous federation gains where some silos are much slower than others.

    python benchmarks/asynchronous.py [--silos 20] [--at-once 10] [--trainings 200] [--sigma 1.0] [--seed 0]

The same silos (a random Llama of two layers, all of its weights trained, each silo with words of its own), the same
number of silos at work at once, and the same number of local trainings: FedAvg in rounds, FedBuff and FedAsync without.
Everything is trained for real by the local engine; time is the virtual clock's, where a silo's optimiser step takes
seconds drawn from a log-normal distribution (at sigma 1 the slowest of 20 silos takes some 40 times the fastest). A
round of FedAvg takes as long as its slowest silo. Validation takes no time on either side.

Reported: updates in the model per virtual second, and virtual seconds until the validation loss is first at or below
the one that FedAvg ends with. Goal: FedBuff better than FedAvg in both, by a factor that grows with sigma.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from fedlm.federation.api import run_recipe
from fedlm.federation.clock import VirtualClock
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from many_silos import tiny_model

RECIPE = """
name: asynchronous
seed: {seed}
task: pretrain
model: {{source: {model}, dtype: float32}}
adapter: {{kind: full}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: silo}}
  split: {{validation: 0.2, test: 0.0}}
training: {{steps: 5, batch_size: 4, max_length: 64, lr: 1e-3, schedule: constant}}
evaluation: {{silos: 10}}
"""
WORDS = [f"{a}{b}" for a in ("ba", "de", "fo", "gu", "hi", "ka") for b in ("la", "me", "no", "pu", "ri")]


def write_rows(path: Path, silos: int) -> None:
    """Sentences that walk through the words in steps; each silo begins among words of its own."""
    draw = random.Random(0)
    with path.open("w") as file:
        for silo in range(silos):
            for _ in range(24):
                place, stride = silo * 7 % len(WORDS) + draw.randrange(5), draw.choice((1, 2, 3))
                text = " ".join(WORDS[(place + i * stride) % len(WORDS)] for i in range(14))
                file.write(json.dumps({"text": text, "silo": f"s{silo:03d}"}) + "\n")


def arms(args: argparse.Namespace) -> dict[str, list[str]]:
    """Changes to the recipe; each arm makes as many local trainings."""
    buffer = max(1, args.at_once // 2)
    late = [
        f"federation.concurrency={args.at_once}",
        f"federation.speeds.sigma={args.sigma}",
        "federation.algorithm.max_staleness=200",
    ]

    def rounds(updates: int) -> list[str]:
        number = args.trainings // updates
        return [f"federation.rounds={number}", f"evaluation.every={max(1, number // 30)}"]

    return {
        "fedavg": [*rounds(args.at_once), f"federation.sample={args.at_once}"],
        "fedbuff": [
            *rounds(buffer),
            *late,
            "federation.algorithm.name=fedbuff",
            f"federation.algorithm.buffer={buffer}",
        ],
        "fedasync": [*rounds(1), *late, "federation.algorithm.name=fedasync", "federation.algorithm.mu=0.0"],
    }


def run(recipe: Recipe, folder: Path, name: str) -> list[dict[str, Any]]:
    run_recipe(recipe, base=folder, run_dir=folder / name)
    return [json.loads(line) for line in (folder / name / "rounds.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--trainings", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "model")
        write_rows(folder / "rows.jsonl", args.silos)
        text = RECIPE.format(model=folder / "model", seed=args.seed)
        (folder / "recipe.yaml").write_text(text)
        changes = arms(args)
        clock = VirtualClock(
            load_recipe(folder / "recipe.yaml", changes["fedbuff"]), {f"s{i:03d}": 24 for i in range(args.silos)}
        )
        slowest, fastest = (of(clock.seconds(silo) for silo in clock.rows) for of in (max, min))
        print(f"{args.silos} silos, {args.at_once} at once; the slowest takes {slowest / fastest:.0f} x the fastest")
        found: dict[str, list[tuple[float, int, float | None]]] = {}  # virtual seconds, updates, validation loss
        for arm, change in changes.items():
            now, updates, path = 0.0, 0, list[tuple[float, int, float | None]]()
            for record in run(load_recipe(folder / "recipe.yaml", change), folder, arm):
                if "clock" in record:
                    now = record["clock"]
                    updates += sum(not arrival["failure"] for arrival in record["arrivals"])
                elif record["sampled"]:
                    now += max(clock.seconds(silo) for silo in record["sampled"])
                    updates += len(record["replied"])
                path.append((now, updates, record["validation"] and record["validation"]["loss"]))
            found[arm] = path
            print(
                f"{arm:9} {updates} updates in {now:8.1f} virtual seconds, loss {path[0][2]:.3f} -> {path[-1][2]:.3f}",
                flush=True,
            )
    target = found["fedavg"][-1][2]
    assert target is not None
    seconds, updates, _ = found["fedavg"][-1]
    for arm in ("fedbuff", "fedasync"):
        last = found[arm][-1]
        throughput = (last[1] / last[0]) / (updates / seconds)
        reached = next((now for now, _, loss in found[arm] if loss is not None and loss <= target), None)
        when = "not reached" if reached is None else f"{seconds / reached:.2f}x sooner"
        print(f"{arm} / fedavg: {throughput:.2f}x the updates per virtual second; loss {target:.3f}: {when}")


if __name__ == "__main__":
    main()
