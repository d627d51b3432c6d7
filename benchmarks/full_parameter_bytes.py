"""Full-parameter tuning for a few kilobytes: bytes that travel, and memory, next to LoRA and full fine-tuning.

    python benchmarks/full_parameter_bytes.py [--parts small smollm2] [--seeds 4096] [--steps 200]

Every method runs two rounds of the same federation through the local engine, two silos in a worker process each. `up`
and `down` are the safetensors that a silo sent and received for the second round's training (`measuring` is what it
received to be measured, which is not part of a round's training); `peak` is the worker process's largest resident set,
everything included (interpreter and libraries are some 400 MiB of it). `inference` is a worker that only measures the
model in fp32, with as many tokens per forward pass.

Part `small`: a random Llama of about a million weights, fedkseed with K = 4096 candidate seeds and 200 steps a round;
goal: up + down <= 4 K + 8 steps + 512 bytes. Part `smollm2`: SmolLM2-135M-Instruct in fp32 with K = 64, two steps a
round; goal: peak of the zeroth-order methods <= 1.2 x inference, but for fedmezo on full weights: exchanging them takes
two more copies, what came and what is sent. Takes about a minute and three on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2-135m-instruct"
FULL = "{kind: full}"
LORA = "{kind: lora, rank: 8, alpha: 16}"
INFERENCE_MEMORY = ("fedkseed", "feedsign", "fedmezo, LoRA")
METHODS: dict[str, tuple[str, str, str]] = {
    "fedavg, LoRA r=8": ("fedavg", LORA, "1e-3"),
    "fedavg, full": ("fedavg", FULL, "1e-5"),
    "ferret": ("ferret", FULL, "1e-7"),
    "fedmezo, LoRA": ("fedmezo", LORA, "1e-4"),
    "fedmezo, full": ("fedmezo", FULL, "1e-7"),
    "fedkseed": ("fedkseed", FULL, "1e-7"),
    "feedsign": ("feedsign", FULL, "5e-4"),  # reads no learning rate
}

RECIPE = """
name: full-parameter-bytes
task: pretrain
model: {{source: {model}, dtype: float32}}
adapter: {adapter}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: silo}}
  split: {{validation: 0.2, test: 0.0}}
training: {{lr: {lr}, steps: {steps}, batch_size: 8, max_length: 64}}
federation: {{rounds: 2, workers: 2, algorithm: {{name: {name}{options}}}}}
evaluation: {{batch_tokens: 512}}
"""


def small_model(folder: Path) -> None:
    """A random Llama of about a million weights with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"small model: {model.num_parameters():,} weights")
    model.save_pretrained(folder)


def write_rows(path: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    with path.open("w") as file:
        for row in range(80):
            text = " ".join(words[(row * 7 + i * (row % 11 + 1)) % len(words)] for i in range(30))
            file.write(json.dumps({"text": f"{text} {row}", "silo": f"s{row % 2}"}) + "\n")


def measure(folder: Path, method: str) -> None:
    """In a process of its own: run one method in a folder and print its figures as JSON."""
    from fedlm.recipe.load import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    if method == "inference":
        print(json.dumps(inference(recipe, folder)))
        return
    from fedlm.federation.api import run_recipe

    run_recipe(recipe, base=folder, run_dir=folder / "run")
    record = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()][-1]
    silos = list(record["silos"].values())
    down = sum(silo["bytes_down"] for silo in silos)
    figures = {
        "up": max(silo["bytes_up"] for silo in silos),
        "down": max(silo["bytes_down"] for silo in silos),
        "measuring": (record["bytes_down"] - down) // len(silos),
        "peak": max(silo["peak_rss"] for silo in silos),
        "seconds": max(silo["seconds"] for silo in silos) / silos[0]["steps"],
    }
    print(json.dumps(figures))


def inference(recipe: Any, folder: Path) -> dict[str, float]:
    """Two workers that measure the base, as described by no scalar, twice."""
    from fedlm.algorithms import get_algorithm
    from fedlm.comparison.measuring import measure_on_silos
    from fedlm.data.federated import load_data
    from fedlm.federation.engines.local import LocalEngine

    data = load_data(recipe, folder)
    algorithm = get_algorithm(recipe.federation.algorithm, recipe.adapter)
    engine = LocalEngine(recipe, data, folder, workers=2, base=folder)
    try:
        for number in range(2):
            found = measure_on_silos(
                engine, data.names, algorithm.initial(dict), role="validation", run=f"r{number}", items=False
            )
    finally:
        engine.close()
    return {"peak": max(fields["peak_rss"] for fields in found.values())}


def run(scratch: Path, model: str, method: str, seeds: int, steps: int) -> dict[str, Any]:
    name, adapter, lr = METHODS["fedkseed" if method == "inference" else method]
    options = f", seeds: {seeds}" if name in ("fedkseed", "ferret") else ""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    write_rows(folder / "rows.jsonl")
    text = RECIPE.format(model=model, adapter=adapter, lr=lr, steps=steps, name=name, options=options)
    (folder / "recipe.yaml").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    command = [sys.executable, __file__, "--measure", str(folder), "--method", method]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {**json.loads(output.splitlines()[-1]), "wall": time.monotonic() - began}
    print(f"{method}: {row['wall']:.0f} s", file=sys.stderr, flush=True)
    return row


def report(title: str, rows: dict[str, dict[str, Any]]) -> None:
    base = rows["inference"]["peak"]
    full = rows["fedavg, full"]["up"] + rows["fedavg, full"]["down"]
    print(f"\n{title}")
    print(
        f"{'method':<18}{'up':>13}{'down':>13}{'measuring':>13}{'full / this':>13}{'peak MiB':>10}"
        f"{'x inference':>13}{'s a step':>10}"
    )
    for method, row in rows.items():
        peak = f"{row['peak'] / 2**20:>10.0f}{row['peak'] / base:>13.2f}"
        if method == "inference":
            print(f"{method:<18}{'':>52}{peak}")
            continue
        total = row["up"] + row["down"]
        print(
            f"{method:<18}{row['up']:>13,}{row['down']:>13,}{row['measuring']:>13,}{full / total:>13,.1f}{peak}"
            f"{row['seconds']:>10.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["small", "smollm2"], default=["small", "smollm2"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=4096, help="K of fedkseed and ferret in part small")
    parser.add_argument("--steps", type=int, default=200, help="steps a round of fedkseed in part small")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.method)
        return
    methods = ["inference", *dict.fromkeys(["fedavg, full", *options.methods])]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if "small" in options.parts:
            small_model(scratch / "model")
            rows = {
                method: run(
                    scratch,
                    str(scratch / "model"),
                    method,
                    options.seeds,
                    options.steps if method == "fedkseed" else 8,
                )
                for method in methods
            }
            report(f"About a million weights; fedkseed and ferret with K = {options.seeds}", rows)
            if "fedkseed" in rows:
                total = rows["fedkseed"]["up"] + rows["fedkseed"]["down"]
                goal = 4 * options.seeds + 8 * options.steps + 512
                print(f"fedkseed, {options.steps} steps: {total:,} bytes a silo and round (goal <= {goal:,})")
        if "smollm2" in options.parts:
            rows = {method: run(scratch, SMOLLM2, method, 64, 2) for method in methods}
            report("SmolLM2-135M-Instruct, fp32; fedkseed and ferret with K = 64", rows)
            for method in INFERENCE_MEMORY:
                if method in rows:
                    ratio = rows[method]["peak"] / rows["inference"]["peak"]
                    print(f"{method}: peak {ratio:.2f} x inference (goal <= 1.20)")
        print(f"wall: {sum(row['wall'] for row in rows.values()):.0f} s for the last part")


if __name__ == "__main__":
    main()
