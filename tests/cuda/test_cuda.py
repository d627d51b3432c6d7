"""On a GPU: the CPU's losses, bf16 training that learns, a whole federation. Skipped, aloud, without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.forward import sequence_nll
from fedlm.training.loop import TrainResult, Window, train
from fedlm.training.sequences import Encoded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _sequences(n: int = 24) -> list[Encoded]:
    draw = np.random.default_rng(0)
    shared = draw.integers(3, 512, 20)
    found = []
    for i in range(n):
        ids = np.concatenate([shared, draw.integers(3, 512, 8 + i)]).astype(np.int32)
        found.append(Encoded(ids, np.arange(len(ids)) >= len(ids) - 4))
    return found


def _model(folder: Path, device: str, dtype: torch.dtype) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def _train(model: Any, **changes: Any) -> TrainResult:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    spec = TrainingSpec(steps=12, batch_size=8, max_length=64, lr=1e-2, schedule="constant", **changes)
    return train(model, parameters, TokenSet.of(_sequences()), spec, Window(0, 1), generator_key=(0, "s"), rule=None)


def test_packed_losses_equal_the_cpus(tiny_model_dir: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    sequences = _sequences()
    cpu, _ = sequence_nll(_model(tiny_model_dir, "cpu", torch.float32), sequences, 512)
    gpu, _ = sequence_nll(_model(tiny_model_dir, "cuda", torch.float32), sequences, 512)
    np.testing.assert_allclose(gpu, cpu, rtol=1e-4)


def test_fp32_training_follows_the_cpus(tiny_model_dir: Path) -> None:
    cpu = _train(_model(tiny_model_dir, "cpu", torch.float32), optimizer="sgd")
    gpu = _train(_model(tiny_model_dir, "cuda", torch.float32), optimizer="sgd")
    np.testing.assert_allclose(gpu.losses, cpu.losses, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"packing": False}, {"compile": True}])
def test_bf16_learns(tiny_model_dir: Path, changes: dict[str, Any]) -> None:
    result = _train(_model(tiny_model_dir, "cuda", torch.bfloat16), **changes)
    assert result.losses[-1] < result.losses[0] - 0.1


def test_a_federation_on_the_gpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    from fedlm.federation.api import run_recipe

    draw = np.random.default_rng(0)
    rows = [{"prompt": f"the {draw.integers(9)} patient", "response": "the dose of medicine"} for _ in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"name: gpu\nmodel: {{source: {tiny_model_dir}, dtype: bfloat16, device: cuda}}\n"
        "data:\n  sources: [{path: rows.jsonl, columns: {prompt: prompt, response: response}}]\n"
        "  partition: {kind: iid, silos: 3}\n  split: {validation: 0.2, test: 0.2}\n"
        "training: {steps: 4, batch_size: 4, max_length: 64, lr: 0.01}\n"
        "federation: {rounds: 3, algorithm: {name: scaffold}}\n"
    )
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), base=tmp_path, run_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    validation = [line["validation"]["loss"] for line in lines if line["validation"]]
    assert validation[-1] < validation[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_silos_with_a_base_in_four_bits_learn_beside_others(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra [gpu4bit] is not installed")
    from fedlm.federation.api import run_recipe

    draw = np.random.default_rng(0)
    rows = [{"prompt": f"the {draw.integers(9)} patient", "response": "the dose of medicine"} for _ in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"name: gpu\nmodel: {{source: {tiny_model_dir}, dtype: bfloat16, device: cuda}}\nadapter: {{rank: 4}}\n"
        "data:\n  sources: [{path: rows.jsonl, columns: {prompt: prompt, response: response}}]\n"
        "  partition: {kind: iid, silos: 3}\n  split: {validation: 0.2, test: 0.2}\n"
        "training: {steps: 4, batch_size: 4, max_length: 64, lr: 0.01}\n"
        "federation:\n  rounds: 3\n  algorithm: {name: flora}\n"
        "  capacity: {dealt: [{}, {quantise: 4bit, rank: 2}]}\n"
    )
    run_recipe(load_recipe(tmp_path / "recipe.yaml"), base=tmp_path, run_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    validation = [line["validation"]["loss"] for line in lines if line["validation"]]
    assert validation[-1] < validation[0]
    assert all(line["aggregation"]["aggregation_error"] < 1e-5 for line in lines[1:])
