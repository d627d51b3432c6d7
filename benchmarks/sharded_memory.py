"""Peak memory of each process that trains full weights: alone, with replicas, with shards.

    OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py [--hidden 480] [--layers 20] [--processes 2] [--fresh]

Every row trains a random Llama (58 million numbers by default) in a process of its own: two rounds of three steps of
AdamW, whose moments are kept between the rounds (not with `--fresh`), as a silo does it: the values as received lie in
memory beside the model. Measured is the highest resident size (VmHWM) of rank 0 and of the helpers, and of the same
program before it has loaded a model. Seconds are those of the steps of the second round. About two minutes on an idle
core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = ("alone", "replicas", "shards")


def peak(pid: int | str) -> int:
    """Highest resident size of a process so far, in bytes."""
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def build(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 14 // 5,
        num_hidden_layers=layers,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def row(kind: str, folder: Path, processes: int, fresh: bool) -> dict[str, Any]:
    """Train as `kind` says."""
    import numpy as np
    import torch

    from fedlm.models.adapters import attach, trainable
    from fedlm.models.load import load_base
    from fedlm.recipe.schema import AdapterSpec, ModelSpec, TrainingSpec
    from fedlm.training.encode import TokenSet
    from fedlm.training.loop import Window, train
    from fedlm.training.parallel import Team
    from fedlm.training.sequences import Encoded, Example
    from fedlm.training.sharded import ShardedTeam, train_sharded

    torch.set_num_threads(1)
    program = peak("self")
    source, full = ModelSpec(source=str(folder), dtype="float32", device="cpu"), AdapterSpec(kind="full")
    generator = np.random.default_rng(0)
    rows = [Encoded(generator.integers(0, 2048, 64).astype(np.int32), np.arange(64) > 0) for _ in range(24)]
    data = TokenSet.of(Example((encoded,)) for encoded in rows)
    spec = TrainingSpec(steps=3, batch_size=4, max_length=64, lr=3e-4, keep_optimizer=not fresh)
    model = attach(load_base(source), full, 0)
    received = {name: p.detach().clone() for name, p in trainable(model).items()}
    teams = {
        "alone": lambda: None,
        "replicas": lambda: Team(source, full, 0, processes, 1),
        "shards": lambda: ShardedTeam(source, full, 0, processes, 1, model),
    }
    team: Any = teams[kind]()
    kept: dict[str, torch.Tensor] = {}
    for number in range(2):
        named: dict[str, Any] = {"generator_key": (0, "silo"), "optimizer_state": kept, "team": team}
        learn = train_sharded if kind == "shards" else train
        if kind != "shards":
            named["rule"] = None
        result = learn(model, trainable(model), data, spec, Window(number, 2), **named)
        kept = result.optimizer_state
    found = {
        "program": program,
        "rank 0": peak("self"),
        "helpers": [peak(pid) for pid in team.helpers] if team else [],
        "seconds": result.seconds,
        "loss": result.losses[-1],
        "numbers": sum(value.numel() for value in received.values()),
    }
    if team:
        team.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=480)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="moments begin anew each round")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.row, given.folder, given.processes, given.fresh)))
        return
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), given.hidden, given.layers)
        for kind in ROWS:
            command = [sys.executable, __file__, "--row", kind, "--folder", name, "--processes", str(given.processes)]
            command += ["--fresh"] * given.fresh
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            found = json.loads(out.splitlines()[-1])
            sizes = [found["program"], found["rank 0"], *found["helpers"]]
            program, *ranks = (f"{size / 2**20:,.0f}" for size in sizes)
            print(
                f"{kind:9} {found['numbers'] / 1e6:.0f}M  program {program} MiB, ranks {', '.join(ranks)} MiB, "
                f"{found['seconds']:.1f} s, last loss {found['loss']:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
