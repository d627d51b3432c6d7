"""Bench a: what federating costs beside plain training, in time and in memory.

    python benchmarks/round_overhead.py [--silos 10] [--steps 3] [--threads 2]

The same optimiser steps over the same examples in the same order (ARC-Easy questions dealt to the silos, SmolLM2-135M
in bf16, LoRA r = 8 on all linear layers, AdamW), each side in a process of its own:

`plain` a torch + PEFT loop as one would write it: padded batches, labels on the answer, the model's own loss; for every
silo the adapter is put back and the optimiser is new. `bare` is fedlm's local loop without a federation around it.
`federated` is `fedlm run` with one worker: requests, folding, stored replies, checkpoints. The time is that of the
rounds after the first (loading and warming up are left out on every side). Memory is the process's peak.
Goals: federated / plain <= 1.05 in time and <= 1.10 in memory; federated / bare shows the federation's own share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training_speed import MODEL, MODEL_SHA256, questions

SIDES = ("plain", "bare", "federated")
ROUNDS = 3
RECIPE = """
name: overhead
model: {{source: "{model}", sha256: {sha}}}
data:
  sources: [{{path: rows.jsonl, columns: {{question: question, choices: choices, answer: answer}}}}]
  partition: {{kind: iid, silos: {silos}}}
  split: {{validation: 0.0, test: 0.0}}
training: {{steps: {steps}, batch_size: 8, max_length: 512, schedule: constant}}
federation: {{rounds: {rounds}, workers: 1, threads: {threads}, algorithm: {{name: fedavg}}}}
"""


def loaded(folder: Path) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """The recipe, the model with its adapter, its trainable parameters, and the silos' encoded examples."""
    import torch

    from fedlm.data.federated import load_data
    from fedlm.models.adapters import attach, trainable
    from fedlm.models.load import load_base, load_tokenizer
    from fedlm.recipe.load import load_recipe
    from fedlm.training.encode import encode_all
    from fedlm.training.tasks import get_task

    recipe = load_recipe(folder / "recipe.yaml")
    torch.set_num_threads(recipe.federation.threads)
    data, tokenizer = load_data(recipe, folder), load_tokenizer(recipe.model)
    model = attach(load_base(recipe.model), recipe.adapter, recipe.seed)
    task, length = get_task(recipe.task), recipe.training.max_length
    sets = {name: encode_all(data.silo(name).train, task, tokenizer, length) for name in data.names}
    return recipe, model, trainable(model), sets


def plain(folder: Path) -> list[float]:
    """Seconds per round of the loop that one would write without fedlm."""
    import torch

    from fedlm.training.batches import batches

    recipe, model, parameters, sets = loaded(folder)
    first = {name: p.detach().clone() for name, p in parameters.items()}
    seconds = []
    model.train()
    for round_ in range(ROUNDS):
        began = time.perf_counter()
        for silo, data in sets.items():
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(first[name])
            optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.training.lr, weight_decay=0.0)
            for chosen in batches(recipe.training, data.lengths, (recipe.seed, silo), round_):
                rows = [data[i] for i in chosen]
                width = max(len(r) for r in rows)
                ids = torch.zeros(len(rows), width, dtype=torch.long)
                labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
                for i, r in enumerate(rows):
                    tokens = torch.from_numpy(r.ids.astype("int64"))
                    ids[i, : len(r)], mask[i, : len(r)] = tokens, 1
                    labels[i, : len(r)] = tokens.where(torch.from_numpy(r.loss.copy()), torch.tensor(-100))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def bare(folder: Path) -> list[float]:
    """Seconds per round of fedlm's local loop alone."""
    import torch

    from fedlm.training.loop import Window, train

    recipe, model, parameters, sets = loaded(folder)
    first = {name: p.detach().clone() for name, p in parameters.items()}
    seconds = []
    for round_ in range(ROUNDS):
        began = time.perf_counter()
        for silo, data in sets.items():
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(first[name])
            key, window = (recipe.seed, silo), Window(round_, ROUNDS)
            train(model, parameters, data, recipe.training, window, generator_key=key, rule=None)
        seconds.append(time.perf_counter() - began)
    return seconds


def federated(folder: Path) -> list[float]:
    """Seconds per round of a whole federation."""
    from fedlm.federation.api import run_recipe
    from fedlm.recipe.load import load_recipe

    run_recipe(load_recipe(folder / "recipe.yaml"), base=folder, run_dir=folder / f"run-{os.getpid()}")
    lines = (folder / f"run-{os.getpid()}" / "rounds.jsonl").read_text().splitlines()
    return [r["seconds"] for r in map(json.loads, lines) if r["round"] >= 0]


def child(side: str, folder: Path) -> None:
    seconds = {"plain": plain, "bare": bare, "federated": federated}[side](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of 8 examples per silo and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions()))
        fields = {"model": MODEL, "sha": MODEL_SHA256, "rounds": ROUNDS}
        recipe = RECIPE.format(silos=args.silos, steps=args.steps, threads=args.threads, **fields)
        (folder / "recipe.yaml").write_text(recipe)
        found = {}
        for side in SIDES:
            command = [sys.executable, __file__, "--child", side, "--folder", name]
            env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[side] = json.loads(out.splitlines()[-1])
            found[side]["round"] = min(found[side]["seconds"][1:])
            print(
                f"{side:10} {found[side]['round']:8.2f} s a round   peak {found[side]['peak_mb']:6.0f} MB", flush=True
            )
    for other in ("plain", "bare"):
        time_ratio = found["federated"]["round"] / found[other]["round"]
        memory = found["federated"]["peak_mb"] / found[other]["peak_mb"]
        print(f"federated / {other}: time {time_ratio:.3f}x, peak memory {memory:.3f}x")


if __name__ == "__main__":
    main()
