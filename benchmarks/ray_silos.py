"""A thousand simulated silos, a hundred of them in each round: the Ray engine beside the local one.

    python benchmarks/ray_silos.py [--silos 1000] [--sample 100] [--rounds 5] [--workers 2]

Both engines run the same recipe, each in a process of its own on this machine with as many workers: a random Llama
(vocabulary 512, hidden 64, two layers), LoRA, SCAFFOLD. Printed are seconds per round (median after the first), the
memory of all processes at the end of each round (Ray's own included; goal: flat), the seconds until the first round,
and whether the adapters are equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))
from many_silos import RECIPE, tiny_model, write_rows


def measure(folder: Path, engine: str) -> None:
    """In a process of its own: run the recipe of a folder on an engine and print figures as JSON."""
    from fedlm.federation.api import run_recipe
    from fedlm.recipe.load import load_recipe

    started = time.monotonic()
    first: list[float] = []

    def observe(event: dict[str, object]) -> None:
        if event["kind"] == "round_started" and not first:
            first.append(time.monotonic() - started)

    run_dir = folder / engine
    run_recipe(load_recipe(folder / "recipe.yaml"), base=folder, run_dir=run_dir, observe=observe, engine=engine)
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    rounds = [r for r in records if r["round"] >= 0]
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    figures = {
        "start": first[0],
        "seconds": [r["seconds"] for r in rounds],
        "pss": [r["peak_pss"] for r in rounds],
        "replies": [len(r["replied"]) for r in rounds],
        "adapter": hashlib.sha256(adapter).hexdigest(),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_model(folder / "model")
        write_rows(folder / "rows.jsonl", options.silos)
        text = RECIPE.format(model=folder / "model", rounds=options.rounds)
        text = text.replace("sample: 50", f"sample: {options.sample}")
        (folder / "recipe.yaml").write_text(text.replace("workers: 1", f"workers: {options.workers}"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDLM_CACHE": str(folder / "cache")}
        for engine in ("local", "ray"):
            output = subprocess.run(
                [sys.executable, __file__, "--measure", scratch, engine],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            one = figures[engine] = json.loads(output.splitlines()[-1])
            memory = ", ".join(f"{pss / 2**20:.0f}" for pss in one["pss"])
            print(
                f"{engine:>5}: {median(one['seconds'][1:]):.2f} s per round of {one['replies'][-1]} replies, "
                f"{one['start']:.1f} s until the first; MiB by round: {memory}",
                flush=True,
            )
    ratio = median(figures["ray"]["seconds"][1:]) / median(figures["local"]["seconds"][1:])
    print(f"seconds per round, ray / local: {ratio:.2f} x")
    memory = figures["ray"]["pss"]
    print(f"memory of all processes, ray, last round / second: {memory[-1] / memory[1]:.3f} x")
    print("same bits" if figures["ray"]["adapter"] == figures["local"]["adapter"] else "OTHER BITS")


if __name__ == "__main__":
    main()
