"""Cross entropy in pieces equals cross entropy at once, with the head frozen or trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlm.training import forward, head
from fedlm.training.attention import packed
from fedlm.training.forward import target_nll
from fedlm.training.packing import pack
from fedlm.training.sequences import Encoded


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_equal_the_whole(trained: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50, bias=bias).requires_grad_(trained)
    hidden, targets = torch.randn(2 * head.CHUNK + 7, 16), torch.randint(0, 50, (2 * head.CHUNK + 7,))
    weights = torch.rand(len(targets))
    results = []
    for whole in (True, False):
        h = hidden.clone().requires_grad_()
        layer.zero_grad()
        nll = cross_entropy(layer(h), targets, reduction="none") if whole else head.head_nll(layer, h, targets)
        (nll * weights).sum().backward()
        results.append((nll.detach(), h.grad, *(p.grad.clone() for p in layer.parameters() if trained)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_kept_logits_give_the_bits_of_those_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, targets = torch.nn.Linear(16, 50, bias=False), torch.randint(0, 50, (2 * head.CHUNK + 7,))
    hidden, calls = torch.randn(len(targets), 16), []
    real = head.checkpoint
    monkeypatch.setattr(head, "checkpoint", lambda *a, **options: calls.append(1) or real(*a, **options))
    results = []
    for most in (head.STORED, 0):
        monkeypatch.setattr(head, "STORED", most)
        h = hidden.clone().requires_grad_()
        layer.zero_grad()
        nll = head.head_nll(layer, h, targets)
        nll.mean().backward()
        assert layer.weight.grad is not None and h.grad is not None
        results.append((nll.detach(), h.grad, layer.weight.grad.clone()))
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_used_for_many_targets_only(base: Any, sequences: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    with packed(base):
        whole = target_nll(base, pack(sequences))
        monkeypatch.setattr(forward, "CHUNK", 3)
        monkeypatch.setattr(head, "CHUNK", 3)
        calls = []
        monkeypatch.setattr(forward, "head_nll", lambda *a: calls.append(1) or head.head_nll(*a))
        pieces = target_nll(base, pack(sequences))
    assert calls
    torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-5)


def test_a_family_that_scales_its_logits_is_told_apart(base: Any) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0,
    )  # fmt: skip
    assert head.plain_head(base)
    assert not head.plain_head(GraniteForCausalLM(config))
