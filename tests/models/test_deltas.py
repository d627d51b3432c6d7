"""Deltas beside frozen weights, and LoRA factors of another rank, against dense fp32 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, base_only, lora_layers, set_tensors
from fedlm.models.deltas import deltas_of, is_delta, joined, parted
from fedlm.models.export import load_adapter, save_adapter, save_merged
from fedlm.models.load import load_base
from fedlm.recipe.schema import AdapterSpec, Recipe
from fedlm.training.fused_lora import fused_lora
from tests.models.helpers import recipe

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ADAPTER = {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ["q_proj", "down_proj"]}


def some(of: Recipe, rank: int = 3) -> Tensors:
    """Factors of this rank and deltas of every form, of a size that matters."""
    model = attach(load_base(of.model), of.adapter, of.seed)
    generator = torch.Generator().manual_seed(0)
    out: Tensors = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    for i, (name, layer) in enumerate(lora_layers(model).items()):
        d_out, d_in = layer.get_base_layer().weight.shape
        out |= {f"{name}.lora_A.weight": draw(rank, d_in), f"{name}.lora_B.weight": draw(d_out, rank)}
        if i % 2 == 0:
            for piece in ("0", "11"):
                out |= {f"{name}.delta_A.{piece}": draw(2, d_in), f"{name}.delta_B.{piece}": draw(d_out, 2)}
        if i % 3 == 0:
            out[f"{name}.delta_W.x"] = draw(d_out, d_in)
    return out


def by_hand(of: Recipe, tensors: Tensors, scale: float) -> Tensor:
    """Logits of the base with dense weights W + sum of the pieces + s B A."""
    model = load_base(of.model).float()
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            change = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            for key, value in tensors.items():
                if key.startswith(f"{name}.delta_W."):
                    change = change + value
                if key.startswith(f"{name}.delta_A."):
                    change = change + tensors[key.replace("delta_A", "delta_B")] @ value
            module.weight = torch.nn.Parameter(module.weight + change)
    return logits(model)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("rank, rslora", [(3, False), (3, True), (7, False), (1, True)])
def test_the_model_acts_as_dense_weights(tiny_model_dir: Path, rank: int, rslora: bool) -> None:
    of = recipe(tiny_model_dir, {**ADAPTER, "rslora": rslora})
    tensors = some(of, rank)
    model = attach(load_base(of.model), of.adapter, of.seed)
    plain = logits(model)
    set_tensors(model, tensors, of.adapter)
    expected = by_hand(of, tensors, 5.0 / rank**0.5 if rslora else 5.0 / rank)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1
    model.train()
    with fused_lora(model) as fused:
        assert fused == len(lora_layers(model))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with base_only(model):
        assert torch.equal(logits(model), plain)
    without = {name: tensor for name, tensor in tensors.items() if not is_delta(name)}
    set_tensors(model, without, of.adapter)
    assert (logits(model) - expected).abs().max() > 0.05, "the deltas before are gone"


def test_gradients_flow_through_deltas(tiny_model_dir: Path) -> None:
    """Fused and plain layers give the adapter the same gradients beside deltas."""
    of = recipe(tiny_model_dir, ADAPTER)
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, some(of), of.adapter)
    found = []
    for fused in (False, True):
        model.zero_grad()
        model.train()
        with fused_lora(model) if fused else torch.enable_grad():
            model(input_ids=IDS).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2 * len(lora_layers(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_joined_factors_act_alike_and_part_again(tiny_model_dir: Path, tmp_path: Path, rslora: bool) -> None:
    of = recipe(tiny_model_dir, {**ADAPTER, "rslora": rslora})
    tensors = some(of)
    whole, adapter = joined(tensors, of.adapter)
    assert not any(is_delta(name) for name in whole) and len({t.shape[0] for n, t in whole.items() if "_A." in n}) == 1
    expected = by_hand(of, tensors, of.adapter.scale(3))
    model = attach(load_base(of.model), of.adapter, of.seed)
    set_tensors(model, whole, adapter)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    set_tensors(model, parted(whole, 3, of.adapter.scale(3)), of.adapter)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    save_adapter(tmp_path / "peft", tensors, of)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir).float(), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs.eval()), expected, rtol=0, atol=1e-5)
    set_tensors(model, load_adapter(tmp_path / "peft", of.adapter), of.adapter)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    save_merged(tmp_path / "merged", tensors, of)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_what_does_not_go_together_is_refused(tiny_model_dir: Path) -> None:
    of = recipe(tiny_model_dir, ADAPTER)
    model = attach(load_base(of.model), of.adapter, of.seed)
    good = some(of)
    layer = next(iter(lora_layers(model)))
    for bad, words in (
        ({**good, "other.delta_W.0": torch.zeros(2, 2)}, "no LoRA layer"),
        ({**good, f"{layer}.delta_W.y": torch.zeros(2, 2)}, "shape"),
        ({**good, f"{layer}.delta_A.z": torch.zeros(2, 2)}, "do not go together"),
        (
            {n: t for n, t in good.items() if "_W" not in n} | {f"{layer}.delta_W.y": torch.zeros(2, 2)},
            "a delta has shape",
        ),
        ({**good, f"{layer}.lora_A.weight": good[f"{layer}.lora_A.weight"][:2]}, "lora_A has rank 2, lora_B 3"),
    ):
        with pytest.raises(ModelError, match=words):
            set_tensors(model, bad, of.adapter)
    assert AdapterSpec(rank=4, alpha=8.0).scale(2) == 4.0
    assert not deltas_of({"model.layers.0.q_proj.lora_A.weight": torch.zeros(1)})
