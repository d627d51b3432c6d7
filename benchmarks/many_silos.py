"""Bench c: does the coordinator's memory, or the time per sampled silo, grow with the number of simulated silos?

    python benchmarks/many_silos.py [--silos 10 100 1000 10000] [--rounds 6]

For each number of silos a process of its own runs the same federation: a random Llama (vocabulary 512, hidden 64, two
layers), LoRA, 50 silos sampled per round (10 of 10 at first) and validation on a fixed panel of as many, one worker, so
that the measured process holds the coordinator, the silos' bench and the model. Reported against the smallest number:
peak memory of the process (resident set; goal <= 1.10), reading the data included, and seconds per sampled silo and
round (goal: flat).
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

ROWS = 6
"""Rows per silo; how many of them are training rows is up to their hashes."""

RECIPE = """
name: many-silos
task: pretrain
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 4}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: silo}}
  split: {{validation: 0.1, test: 0.0}}
training: {{steps: 2, batch_size: 4, max_length: 64}}
federation: {{rounds: {rounds}, sample: 50, workers: 1, algorithm: {{name: scaffold}}}}
evaluation: {{silos: 50}}
"""


def tiny_model(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer, as any model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, silos: int) -> None:
    """Every silo's rows; the words differ per row so that no two rows are equal."""
    words = [f"word{i}" for i in range(17)]
    with path.open("w") as file:
        for silo in range(silos):
            for row in range(ROWS):
                text = " ".join(words[(silo * 7 + row * 3 + i * (row + 1)) % len(words)] for i in range(24))
                file.write(json.dumps({"text": f"{text} {silo} {row}", "silo": f"s{silo:05d}"}) + "\n")


def measure(folder: Path) -> None:
    """In a process of its own: run the recipe of a folder and print figures as JSON."""
    from fedlm.federation.api import run_recipe
    from fedlm.federation.memory import peak_rss
    from fedlm.recipe.load import load_recipe

    started = time.monotonic()
    first: list[float] = []

    def observe(event: dict[str, object]) -> None:
        if event["kind"] == "round_started" and not first:
            first.append(time.monotonic() - started)

    run_recipe(load_recipe(folder / "recipe.yaml"), base=folder, run_dir=folder / "run", observe=observe)
    records = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    # The first round and the base's measurement warm up.
    steady = [r for r in records if r["round"] >= 1]
    per_silo = sorted(r["seconds"] / len(r["sampled"]) for r in steady)
    figures = {
        "start_seconds": first[0],
        "per_silo_seconds": per_silo[len(per_silo) // 2],
        "peak_rss": peak_rss(),
        "sampled": len(steady[0]["sampled"]),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        tiny_model(model)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDLM_CACHE": str(Path(scratch) / "cache")}
        for silos in options.silos:
            folder = Path(scratch) / f"silos-{silos}"
            folder.mkdir()
            write_rows(folder / "rows.jsonl", silos)
            (folder / "recipe.yaml").write_text(RECIPE.format(model=model, rounds=options.rounds))
            output = subprocess.run(
                [sys.executable, __file__, "--measure", str(folder)],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            figures = json.loads(output.splitlines()[-1])
            rows.append((silos, figures))
            print(
                f"{silos:>6} silos, {figures['sampled']:>2} sampled: peak {figures['peak_rss'] / 2**20:7.1f} MiB, "
                f"{figures['per_silo_seconds'] * 1000:6.1f} ms per sampled silo, "
                f"{figures['start_seconds']:5.1f} s until the first round",
                flush=True,
            )
    (few, least), (many, most) = rows[0], rows[-1]
    print(f"memory, {few} -> {many} silos: {most['peak_rss'] / least['peak_rss']:.3f} x (goal <= 1.10)")
    print(
        f"time per sampled silo, {few} -> {many} silos: "
        f"{most['per_silo_seconds'] / least['per_silo_seconds']:.3f} x (goal: flat)"
    )


if __name__ == "__main__":
    main()
