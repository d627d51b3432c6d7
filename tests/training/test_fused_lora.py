"""Fused LoRA layers give PEFT's numbers, and leave alone what they do not understand."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fedlm.training.attention import packed
from fedlm.training.forward import padded_nll, precision, target_nll
from fedlm.training.fused_lora import fused_lora
from fedlm.training.fused_norm import _RMSNorm, fused_norms
from fedlm.training.packing import pack
from fedlm.training.sequences import Encoded
from tests.training.helpers import learnt


def gradients(model: Any, sequences: list[Encoded], fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with packed(model), precision(model):
        if fused:
            with fused_lora(model) as count:
                assert count == 14
                nll = target_nll(model, pack(sequences))
                nll.sum().backward()
        else:
            nll = target_nll(model, pack(sequences))
            nll.sum().backward()
    return nll.detach(), {n: p.grad.clone() for n, p in learnt(model).items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_equals_peft_in_fp32(adapted: Any, sequences: list[Encoded]) -> None:
    ours, gradient = gradients(adapted, sequences, True)
    theirs, expected = gradients(adapted, sequences, False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    for name in expected:
        assert distance(gradient[name], expected[name]) < 1e-5, name


def test_bf16_is_as_near_to_fp32_as_peft_under_autocast(adapted: Any, sequences: list[Encoded]) -> None:
    padded_nll(adapted, sequences).sum().backward()
    truth = {n: p.grad.clone() for n, p in learnt(adapted).items()}
    half = copy.deepcopy(adapted)
    for name, parameter in half.named_parameters():
        if name not in learnt(half):
            parameter.data = parameter.data.bfloat16()
    half.get_base_model().config.dtype = torch.bfloat16
    _, ours = gradients(half, sequences, True)
    _, theirs = gradients(half, sequences, False)
    assert all(g.dtype == torch.float32 for g in ours.values())
    error = sum(distance(ours[n], truth[n]) for n in truth) / len(truth)
    peft_error = sum(distance(theirs[n], truth[n]) for n in truth) / len(truth)
    assert peft_error > 1e-4  # the comparison means something
    assert error < 1.2 * peft_error


def test_biases_and_a_partial_choice_of_layers(sequences: list[Encoded]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)  # biases are not zero
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for parameter in learnt(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    expected = padded_nll(model, sequences)
    expected.sum().backward()
    truth = {n: p.grad.clone() for n, p in learnt(model).items()}
    model.zero_grad()
    with packed(model), fused_lora(model) as count:
        assert count == 6
        nll = target_nll(model, pack(sequences))
        nll.sum().backward()
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)
    assert max(distance(p.grad, truth[n]) for n, p in learnt(model).items()) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "variant"), ({"lora_bias": True}, "variant")],
)
def test_what_does_not_fit_stays_with_peft_and_is_said(
    base: Any, change: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **change))
    with caplog.at_level(logging.WARNING, "fedlm.training.fused_lora"), fused_lora(model) as count:
        assert count == 0
    assert "14 LoRA layers run unfused" in caplog.text and reason in caplog.text


def test_peft_is_restored(adapted: Any) -> None:
    layer = adapted.get_base_model().model.layers[0].mlp.gate_proj
    with fused_lora(adapted):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


def test_a_disabled_adapter_is_disabled(adapted: Any, sequences: list[Encoded]) -> None:
    """What a run began with, asked for in the middle of a step: the base's numbers, and then the adapter's again."""
    with torch.no_grad():
        with adapted.disable_adapter():
            base = padded_nll(adapted, sequences)
        before = padded_nll(adapted, sequences)
        with fused_lora(adapted):
            first = padded_nll(adapted, sequences)
            with adapted.disable_adapter():
                assert torch.equal(padded_nll(adapted, sequences), base)
            assert torch.equal(padded_nll(adapted, sequences), first)
    assert float((before - base).abs().max()) > 1e-3 and torch.allclose(first, before, atol=1e-5)


def test_siblings_called_with_other_inputs_are_computed_apart(adapted: Any) -> None:
    mlp = adapted.get_base_model().model.layers[0].mlp
    x, y = torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    with torch.no_grad():
        expected = mlp.gate_proj(x), mlp.up_proj(y), mlp.up_proj(x), mlp.gate_proj(x)
        with fused_lora(adapted):
            found = mlp.gate_proj(x), mlp.up_proj(y), mlp.up_proj(x), mlp.gate_proj(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# norms


def test_fused_norms_give_the_same_bits_forward_and_the_same_gradient(adapted: Any, sequences: list[Encoded]) -> None:
    with packed(adapted):
        expected = target_nll(adapted, pack(sequences))
        expected.sum().backward()
        truth = {n: p.grad.clone() for n, p in learnt(adapted).items()}
        adapted.zero_grad()
        with fused_norms(adapted) as count:
            assert count == 5
            nll = target_nll(adapted, pack(sequences))
            nll.sum().backward()
    assert torch.equal(nll, expected)
    assert max(distance(p.grad, truth[n]) for n, p in learnt(adapted).items()) < 1e-5


def test_norm_gradient_is_autograds() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)

    wide = x.clone().requires_grad_()
    plain = weight * wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    (expected,) = torch.autograd.grad(plain.pow(3).sum(), wide)
    x.requires_grad_()
    (found,) = torch.autograd.grad(_RMSNorm.apply(x, weight, 1e-6).pow(3).sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_norm_that_scales_differently_keeps_its_own() -> None:
    class ShiftedRMSNorm(torch.nn.Module):
        """As Gemma's: multiplies by 1 + w."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    with fused_norms(torch.nn.Sequential(ShiftedRMSNorm())) as count:
        assert count == 0


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "mlp", "layers.0."])
def test_untrained_factors_get_no_gradient_and_cost_no_memory(
    adapted: Any, sequences: list[Encoded], frozen: str
) -> None:
    """The trained ones' gradients stay the same bits; what only the others would need is not kept."""

    def kept_bytes() -> tuple[int, dict[str, Tensor]]:
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        adapted.zero_grad()
        with packed(adapted), fused_lora(adapted):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                nll = target_nll(adapted, pack(sequences))
            nll.sum().backward()
        return sum(seen.values()), {n: p.grad.clone() for n, p in learnt(adapted).items()}

    everything, truth = kept_bytes()
    for name, parameter in learnt(adapted).items():
        parameter.requires_grad_(frozen not in name)
    less, found = kept_bytes()
    assert 0 < len(found) < len(truth)
    assert all(torch.equal(found[name], truth[name]) for name in found)
    assert less < everything
