"""Model FLOPs against torch's own counter and the paper's formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedlm.training import flops
from fedlm.training.flops import flops_per_token, peak, rates, seen_length


def counted(model: Any, length: int) -> float:
    """What torch counts of a forward and backward pass, per token; eager attention multiplies the whole square."""
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 500, (2, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("length", [16, 64])
def test_full_weights_equal_torch_s_count(base: Any, length: int) -> None:
    """To 1 %: norms are parameters, and no products."""
    base.requires_grad_(True)
    assert flops_per_token(base, length) == pytest.approx(counted(base, length), rel=0.01)


def test_frozen_weights_count_their_forward_and_the_gradient_through_them(adapted: Any) -> None:
    """To 5 %: the lowest layer's input needs no gradient, which the formula leaves in."""
    inner = adapted.get_base_model()
    assert flops_per_token(adapted, 32) == pytest.approx(counted(inner, 32), rel=0.05)
    frozen = sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert flops_per_token(adapted, 32) == 4 * frozen + 6 * trained + 12 * 2 * 64 * 32


def test_a_lookup_is_no_product(base: Any) -> None:
    from transformers import LlamaForCausalLM

    config = type(base.config)(**{**base.config.to_dict(), "tie_word_embeddings": False})
    untied = LlamaForCausalLM(config)
    assert flops_per_token(untied, 8) == flops_per_token(base.requires_grad_(True), 8)


def test_utilisation_only_where_the_peak_is_known(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([1, 3])
    assert seen_length(lengths) == 2.5 and seen_length(np.zeros(0, np.int64)) == 0.0
    assert rates(base, lengths, 100.0) == {"flops_per_second": 100 * flops_per_token(base, 2.5)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    gpu = torch.device("cuda")
    assert peak(gpu, torch.bfloat16) == 756e12 and peak(gpu, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert peak(gpu, torch.bfloat16) is None and peak(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(flops, "peak", lambda *_: 1e9)
    one, two = rates(base, lengths, 100.0), rates(base, lengths, 100.0, devices=2)
    assert one["mfu"] == pytest.approx(one["flops_per_second"] / 1e9) == pytest.approx(2 * two["mfu"])
