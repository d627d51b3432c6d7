"""A packed row, with beginnings shared or not, is each of its sequences by itself: logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlm.errors import ModelError
from fedlm.training.attention import NAME, packed
from fedlm.training.forward import padded_nll, sequence_nll, target_nll
from fedlm.training.packing import pack
from fedlm.training.sequences import Encoded
from tests.training.helpers import learnt, sequence


def plain_logits(model: Any, item: Encoded) -> torch.Tensor:
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("share", [True, False])
def test_logits_of_a_packed_row_are_those_of_its_parts(base: Any, sequences: list[Encoded], share: bool) -> None:
    full = [Encoded(s.ids, np.arange(len(s)) > 0) for s in sequences]
    batch = pack(full, share=share)
    with torch.no_grad(), packed(base):
        together = base(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, packed=batch).logits[0]
    for i, item in enumerate(full):
        with torch.no_grad():
            alone = plain_logits(base, item)[:-1]
        torch.testing.assert_close(together[batch.predictors[batch.owners == i]], alone, atol=1e-5, rtol=1e-5)


def test_shared_beginnings_are_computed_once(sequences: list[Encoded]) -> None:
    """And the last token of each, which is predicted and never read, not at all."""
    assert pack(sequences, share=False).ids.shape[1] == sum(len(s) - 1 for s in sequences)
    # system 20, question 14 (its last token is not worth a segment), answers 6 + 9 + 2, short 2, unrelated 30 + 4;
    # repeat and bare question are free
    assert pack(sequences).ids.shape[1] == 20 + 14 + 6 + 9 + 2 + 2 + 30 + 4
    assert pack(sequences).tokens == sum(len(s) for s in sequences)


def test_a_neighbour_leaves_no_trace(base: Any) -> None:
    one, two, other = sequence((1, 20), (2, 15)), sequence((1, 20), (3, 12)), sequence((1, 20), (4, 12))
    with torch.no_grad(), packed(base):
        first = target_nll(base, pack([one, two]))[:4]
        second = target_nll(base, pack([one, other]))[:4]
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_equal_a_padded_batch(adapted: Any, sequences: list[Encoded], share: bool) -> None:
    padded_nll(adapted, sequences).sum().backward()
    expected = {n: p.grad.clone() for n, p in learnt(adapted).items()}
    reference = padded_nll(adapted, sequences).detach()
    adapted.zero_grad()
    with packed(adapted):
        nll = target_nll(adapted, pack(sequences, share=share))
        nll.sum().backward()
    torch.testing.assert_close(nll.detach(), reference, atol=1e-5, rtol=1e-5)
    for name, parameter in learnt(adapted).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)


def test_padded_loss_is_transformers_own(base: Any, sequences: list[Encoded]) -> None:
    item = sequences[0]
    ids = torch.from_numpy(item.ids.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(item.loss)[None], ids, -100)
    with torch.no_grad():
        expected = base(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(padded_nll(base, [item]).mean(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_sequence_nll_by_any_batch_size(adapted: Any, sequences: list[Encoded], packing: bool) -> None:
    whole, counts = sequence_nll(adapted, sequences, 10_000, packing=packing)
    small, _ = sequence_nll(adapted, sequences, 50, packing=False)
    np.testing.assert_allclose(whole, small, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [s.targets for s in sequences]
    assert whole[0] == pytest.approx(whole[6])


def test_sequence_without_target_counts_nothing(adapted: Any, sequences: list[Encoded]) -> None:
    mute = Encoded(sequences[0].ids, np.zeros(len(sequences[0]), np.bool_))
    sums, counts = sequence_nll(adapted, [mute, sequences[1], mute], 60)
    assert (sums[[0, 2]] == 0).all() and sums[1] > 0 and counts.tolist() == [0, 4, 0]


def test_attention_is_put_back(adapted: Any) -> None:
    with pytest.raises(RuntimeError, match="boom"), packed(adapted):
        assert adapted.get_base_model().config._attn_implementation == NAME
        raise RuntimeError("boom")
    assert adapted.get_base_model().config._attn_implementation == "sdpa"


def test_sliding_windows_are_kept() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    items = [sequence((1, 20), (2, 9)), sequence((1, 20), (3, 5))]
    window, _ = sequence_nll(model, items, 1000)
    plain, _ = sequence_nll(model, items, 1000, packing=False)
    np.testing.assert_allclose(window, plain, rtol=1e-5)


def test_a_model_that_mixes_tokens_elsewhere_is_refused(base: Any) -> None:
    """A convolution-like leak between neighbouring rows must not pass for packing."""
    layer = base.model.layers[0]
    original = layer.forward
    layer.forward = lambda hidden, **kw: original(hidden + torch.roll(hidden, 1, dims=1), **kw)
    with pytest.raises(ModelError, match="packing: false"), packed(base):
        pass
    assert base.config._attn_implementation == "sdpa"
