"""Bench: worker processes that are forked from one which has imported the libraries, beside ones started from nothing.

    python benchmarks/worker_start.py [--workers 4] [--repeats 3]

Both ways, in turn, an engine starts its workers on a random 1 M Llama and ends them. Reported: seconds until all are
ready, seconds of processor time of this machine's processes below this one, and memory of the workers together
(proportional set size: a page that n processes share counts 1/n in each). The nursery is started anew in each repeat.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from fedlm.data.federated import load_data
from fedlm.federation.engines import nursery
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.memory import process_pss
from fedlm.recipe.load import load_recipe

RECIPE = """
name: start
task: pretrain
model: {source: "preset:llama-1m", tokenizer: smollm2-135m-instruct, dtype: float32}
adapter: {kind: lora}
data: {sources: [{path: rows.jsonl, columns: {text: text}}], partition: {kind: iid, silos: 8}}
training: {steps: 1}
federation: {rounds: 1}
"""


def measure(folder: Path, workers: int, forked: bool) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, bytes."""
    nursery.forks = lambda: forked
    nursery._nursery = nursery.Nursery()
    recipe = load_recipe(folder / "recipe.yaml", [f"federation.workers={workers}"])
    with tempfile.TemporaryDirectory() as run:
        engine = LocalEngine(recipe, load_data(recipe, folder), Path(run), workers=workers, base=folder)
        began = time.perf_counter()
        try:
            engine.start()
            seconds = time.perf_counter() - began
            below = psutil.Process().children(recursive=True)
            used = sum(sum(process.cpu_times()[:2]) for process in below)
            memory = sum(process_pss(process.pid) for process in below)
        finally:
            engine.close()
            if nursery._nursery._control is not None:
                nursery._nursery._control.close()
    return seconds, used, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "rows.jsonl").write_text("".join(f'{{"text": "row {i} of a few"}}\n' for i in range(400)))
        measure(folder, 1 + (args.workers > 1), True)  # data and model are in the cache from here on
        found = {way: [measure(folder, args.workers, way) for _ in range(args.repeats)] for way in (True, False)}
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    print(f"{args.workers} workers     seconds  processor seconds  memory")
    for way, label in ((False, "started"), (True, "forked")):
        seconds, used, memory = medians[way]
        print(f"{label:<13}{seconds:>8.2f}{used:>19.2f}{memory / 1e6:>5.0f} MB")
    ratios = [a / b for a, b in zip(medians[False], medians[True], strict=True)]
    print(f"{'ratio':<13}{ratios[0]:>7.1f}x{ratios[1]:>18.1f}x{ratios[2]:>7.1f}x")


if __name__ == "__main__":
    main()
