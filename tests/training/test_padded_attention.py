"""Short padded rows by plain products are transformers' own attention: losses and gradients, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from fedlm.training import padded_attention
from fedlm.training.forward import padded_nll
from fedlm.training.padded_attention import NAME, short_rows
from fedlm.training.sequences import Encoded
from tests.training.helpers import learnt, sequence


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two computed, one entry a layer."""
    made: list[str] = []
    for name in ("short_attention", "sdpa_attention_forward"):
        real = getattr(padded_attention, name)

        def counted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(padded_attention, name, counted)
    return made


def gradients(model: Any, sequences: list[Encoded]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parameters = learnt(model)
    nll = padded_nll(model, sequences)
    found = torch.autograd.grad(nll.sum(), list(parameters.values()))
    return nll.detach(), dict(zip(parameters, found, strict=True))


def test_losses_and_gradients_are_those_of_sdpa(adapted: Any, sequences: list[Encoded], calls: list[str]) -> None:
    nll, truth = gradients(adapted, sequences)
    with short_rows(adapted):
        short_nll, found = gradients(adapted, sequences)
    assert set(calls) == {"short_attention"}
    torch.testing.assert_close(short_nll, nll, rtol=1e-5, atol=1e-6)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert adapted.get_base_model().config._attn_implementation == "sdpa"


def test_sliding_windows_are_kept(calls: list[str]) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7, attn_implementation="sdpa",
    )  # fmt: skip
    model, items = MistralForCausalLM(config).eval(), [sequence((1, 20), (2, 9)), sequence((1, 20), (3, 5))]
    with torch.no_grad():
        plain = padded_nll(model, items)
        with short_rows(model):
            window = padded_nll(model, items)
    assert "short_attention" in calls
    torch.testing.assert_close(window, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["padded at the beginning", "in chunks", "cache"])
def test_what_it_does_not_know_goes_to_sdpa(base: Any, calls: list[str], kind: str) -> None:
    """A mask that is causal and something else; a cache, with which keys are more than queries."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def logits() -> torch.Tensor:
        if kind == "in chunks":  # of three tokens, as some models attend in some layers
            place = torch.arange(5)
            chunks = (place[:, None] >= place) & (place[:, None] // 3 == place // 3)
            return base(input_ids=ids, attention_mask=chunks[None, None].expand(2, 1, 5, 5), use_cache=False).logits  # type: ignore[no-any-return]
        if kind != "cache":
            return base(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 2:]  # type: ignore[no-any-return]
        first = base(input_ids=ids[1:, :3], use_cache=True)
        return base(input_ids=ids[1:, 3:], past_key_values=first.past_key_values).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        truth = logits()
        with short_rows(base):
            found = logits()
    assert calls.count("sdpa_attention_forward") >= 2  # the tiny model's layers
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


def test_another_attention_is_left_alone(base: Any) -> None:
    base.set_attn_implementation("eager")
    with short_rows(base):
        assert base.config._attn_implementation == "eager"
    base.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="boom"), short_rows(base):
        assert base.config._attn_implementation == NAME
        raise RuntimeError("boom")
    assert base.config._attn_implementation == "sdpa"
