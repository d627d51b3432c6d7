"""Predicted and measured peak memory of a silo's training process, and whether plans for a budget keep within it.

    python benchmarks/memory_plan.py [--only NAME ...] [--steps 8] [--json FILE]

Every row is a process of its own: it loads SmolLM2-135M-Instruct (or a random tiny Llama, where the program itself is
nearly all there is) and trains one round of rows that fill `max_length`, through the same door as any silo, on one
thread with AdamW. Measured is the highest resident size (VmHWM), mapped weights included. Predicted is
`fedlm.training.plan.predict`, from sizes alone. Rows named `budget-...` give the planner an amount of memory, train as
it planned, and measure validation rows as well: all of it must keep within the budget.
About 10 minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 8
MODEL = "smollm2-135m-instruct"
BATCH = {"batch_size": 8, "max_length": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"model": "tiny", "training": {"batch_size": 4, "max_length": 64}},
    "tiny-2048-tokens": {"model": "tiny", "training": {"batch_size": 16, "max_length": 128}},
    "rank-4": {"rank": 4, "training": BATCH},
    "rank-16": {"training": BATCH},
    "rank-64": {"rank": 64, "training": BATCH},
    "float32": {"dtype": "float32", "training": {**BATCH, "batch_size": 4}},
    "2048-tokens": {"training": {**BATCH, "batch_size": 16}},
    "length-512": {"training": {"batch_size": 2, "max_length": 512}},
    "length-512-2048-tokens": {"training": {"batch_size": 4, "max_length": 512}},
    "micro-batch-1": {"training": {**BATCH, "micro_batch_size": 1}},
    "micro-batch-4": {"training": {**BATCH, "micro_batch_size": 4}},
    "last-8-layers": {"capacity": {"layers": 8}, "training": {**BATCH, "batch_size": 16}},
    "last-8-layers-512": {"capacity": {"layers": 8}, "training": {"batch_size": 4, "max_length": 512}},
    "attention-q-v": {"capacity": {"targets": ["q_proj", "v_proj"]}, "training": BATCH},
    "checkpointing": {"training": {**BATCH, "batch_size": 16, "gradient_checkpointing": True}},
    "checkpointing-512": {"training": {"batch_size": 4, "max_length": 512, "gradient_checkpointing": True}},
    "budget-2GB": {"capacity": {"memory": "2GB"}, "training": {**BATCH, "batch_size": 16}},
    "budget-1.3GB": {"capacity": {"memory": "1.3GB"}, "training": {**BATCH, "batch_size": 16}},
    "budget-1.25GB": {"capacity": {"memory": "1.25GB"}, "training": {**BATCH, "batch_size": 16}},
}


def recipe_of(config: dict[str, Any], steps: int, folder: Path) -> Any:
    """The recipe of one row: one silo that trains documents longer than `max_length`."""
    from fedlm.recipe.schema import Recipe

    model = str(folder / "tiny") if config.get("model") == "tiny" else MODEL
    dtype = "float32" if config.get("model") == "tiny" else config.get("dtype", "bfloat16")
    return Recipe.model_validate(
        {
            "name": "memory",
            "task": "pretrain",
            "model": {"source": model, "dtype": dtype, "device": "cpu"},
            "adapter": {"rank": config.get("rank", 16)},
            "data": {
                "sources": [{"path": "rows.jsonl", "columns": {"text": "text"}}],
                "partition": {"kind": "iid", "silos": 1},
                "split": {"validation": 0.2, "test": 0.0},
            },
            "training": {"steps": steps, **config["training"]},
            "federation": {
                "rounds": 1,
                "algorithm": {"name": "flexlora"},
                "capacity": {"default": config.get("capacity", {})},
            },
        }
    )


def prepare(folder: Path) -> None:
    """Rows of random syllables, and a random Llama of 0.1 M parameters with a byte-level tokenizer."""
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(48):
            words = ("".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(900))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **alphabet}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "tiny")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")


def measure(config: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """Train one round in this process and say its peak."""
    from fedlm.data.federated import load_data
    from fedlm.federation.memory import peak_rss
    from fedlm.federation.silo import Silo, Workbench
    from fedlm.messages import Reply, Request
    from fedlm.models.adapters import initial_tensors
    from fedlm.training.plan import predict

    recipe = recipe_of(config, steps, folder)
    bench = Workbench(recipe, load_data(recipe, folder))
    plan = bench.plan(recipe.federation.capacity.default)
    footprint = predict(recipe, bench.shape, plan)
    (name,) = bench.data.names
    silo = Silo(name, bench, folder / "states" / str(os.getpid()))
    tensors = bench.algorithm.for_rank(initial_tensors(recipe), plan.rank)
    fields = {"round": 0, "rounds": 1, "accepted": -1, "plan": plan.fields()}
    answer = silo.handle(Request(name, "train", "run", 0, 0, tensors, fields))
    assert isinstance(answer, Reply), answer
    if recipe.federation.capacity.default.memory is not None:
        asked = {"role": "validation", "plan": plan.fields()}
        assert isinstance(silo.handle(Request(name, "evaluate", "run", 0, 0, tensors, asked)), Reply)
    return {
        "predicted": footprint.total,
        "measured": peak_rss(),
        "seconds": answer.fields["seconds"],
        "tokens": answer.fields["tokens"],
        "plan": plan.fields(),
        "budget": recipe.federation.capacity.default.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, folder = arguments.child
        print(json.dumps(measure(CONFIGS[name], arguments.steps, Path(folder))))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        print("| configuration | predicted MB | measured MB | error | tokens/s | planned |\n|---|---|---|---|---|---|")
        for config in arguments.only:
            command = [sys.executable, __file__, "--child", config, str(folder), "--steps", str(arguments.steps)]
            quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            row = rows[config] = json.loads(done.stdout.splitlines()[-1])
            error = row["predicted"] / row["measured"] - 1
            plan = ", ".join(f"{k} {v}" for k, v in row["plan"].items()) if row["budget"] else ""
            print(
                f"| {config} | {row['predicted'] / 1e6:.0f} | {row['measured'] / 1e6:.0f} | {error:+.1%} | "
                f"{row['tokens'] / row['seconds']:.0f} | {plan} |",
                flush=True,
            )
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows.values()]
    print(f"\nlargest error {max(errors):.1%} of {len(errors)} rows")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
