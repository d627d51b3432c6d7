"""LoRA-SB's layers against dense weights, their gradients, and what is exported of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, base_only, get_tensors, initial_tensors, lora_layers, set_tensors, trainable
from fedlm.models.export import load_adapter, save_adapter, save_merged
from fedlm.models.load import load_base
from fedlm.recipe.schema import Recipe
from fedlm.training.fused_lora import fused_lora
from tests.models.helpers import recipe

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ADAPTER = {"kind": "lora-sb", "rank": 3, "alpha": 5.0, "targets": ["q_proj", "k_proj", "v_proj", "down_proj"]}


def some(of: Recipe) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in initial_tensors(of).items()}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_hand(of: Recipe, tensors: Tensors) -> Tensor:
    model = load_base(of.model).float()
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            b, r, a = (tensors[f"{name}.lora_{part}.weight"] for part in "BRA")
            module.weight = torch.nn.Parameter(module.weight + of.adapter.scale(3) * b @ r @ a)
    return logits(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_layer_adds_s_b_r_a(tiny_model_dir: Path, tmp_path: Path, rslora: bool) -> None:
    """In PEFT's own forward, fused, exported as plain LoRA, read back, and merged."""
    of = recipe(tiny_model_dir, {**ADAPTER, "rslora": rslora})
    model = attach(load_base(of.model), of.adapter, of.seed)
    plain, tensors = logits(model), some(of)
    assert torch.equal(plain, logits(load_base(of.model))), "R = 0 changes nothing"
    expected = by_hand(of, tensors)
    set_tensors(model, tensors, of.adapter)
    assert all(torch.equal(tensors[n], t) for n, t in get_tensors(model).items())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1
    model.train()
    with fused_lora(model) as fused:
        assert fused == len(lora_layers(model)) == 8
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with base_only(model):
        assert torch.equal(logits(model), plain)

    save_adapter(tmp_path / "peft", tensors, of)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir).float(), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs.eval()), expected, rtol=0, atol=1e-5)
    set_tensors(model, load_adapter(tmp_path / "peft", of.adapter), of.adapter)
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=1e-5)
    save_merged(tmp_path / "merged", tensors, of)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_r_is_that_of_the_weight_between_b_and_a(tiny_model_dir: Path, dtype: str) -> None:
    """dL/dR = s B' (dL/dW) A', fused and not."""
    of = recipe(tiny_model_dir, ADAPTER, dtype=dtype)
    tensors = some(of)
    dense = load_base(of.model).float()
    weights = {}
    for name, module in dense.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            b, r, a = (tensors[f"{name}.lora_{part}.weight"] for part in "BRA")
            weights[name] = module.weight = torch.nn.Parameter(module.weight + of.adapter.scale(3) * b @ r @ a)
    dense(input_ids=IDS).logits.square().mean().backward()
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, tensors, of.adapter)
    model.train()
    for fused in (False, True):
        model.zero_grad()
        with fused_lora(model) if fused else torch.enable_grad(), torch.autocast("cpu", enabled=dtype == "bfloat16"):
            model(input_ids=IDS).logits.float().square().mean().backward()
        for name, weight in weights.items():
            got = trainable(model)[f"{name}.lora_R.weight"].grad
            b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            wanted = of.adapter.scale(3) * b.t() @ weight.grad @ a.t()
            error = (got - wanted).norm() / wanted.norm()
            assert error < (1e-5 if dtype == "float32" else 0.05), (name, fused, error)


@pytest.mark.parametrize("kind", ["lora", "lora-sb"])
def test_a_rank_above_a_layers_size_is_refused(tiny_model_dir: Path, kind: str) -> None:
    of = recipe(tiny_model_dir, {**ADAPTER, "kind": kind, "rank": 40})
    with pytest.raises(ModelError, match=r"rank 40 is above the size of .*k_proj, 64 x 32"):
        attach(load_base(of.model), of.adapter, of.seed)
