"""DAGER reads a batch out of one fp32 step of SGD; not out of one under noise, and of a sum not whose it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlm.attacks.dager import (
    Recovered,
    attention_gradients,
    attention_inputs,
    attribute_by_texts,
    attribute_by_updates,
    distances,
    frequent_tokens,
    nearest_tokens,
    noised,
    read_tokens,
    recover,
    row_space,
    score_attribution,
    score_sequences,
    score_tokens,
    score_under_noise,
    summed,
    token_distances,
)
from fedlm.errors import ModelError
from fedlm.evaluation.intervals import wilson
from fedlm.models.adapters import attach, trainable
from fedlm.recipe.schema import AdapterSpec
from tests.attacks.news import articles, smollm2
from tests.attacks.silo import gradients

Batch = list[list[int]]


def cut(tokenizer: Any, texts: list[str], length: int) -> Batch:
    return [ids[:length] for text in texts if len(ids := tokenizer.encode(text)) >= length]


def with_lora(model: Any, rank: int) -> Any:
    """LoRA on queries, keys and values after a first round: B is no longer 0."""
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank, targets=["q_proj", "k_proj", "v_proj"])
    adapted = attach(model, spec, 0)
    with torch.no_grad():
        for name, parameter in trainable(adapted).items():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.fixture
def batch(tokenizer: Any, pages: list[str]) -> Batch:
    """Three beginnings of 14 tokens: 39 places that are read, of a width of 64."""
    return cut(tokenizer, pages, 14)[:3]


# the span check


def test_the_span_is_that_of_the_inputs() -> None:
    """sum_t g_t x_t^T: combinations of the x are in it, and what is left of a vector is its part across."""
    random = torch.Generator().manual_seed(0)
    x, g = torch.randn(5, 20, generator=random), torch.randn(5, 9, generator=random)
    basis = row_space([g.T @ x])
    assert basis.shape == (5, 20)
    inside = torch.randn(4, 5, generator=random) @ x
    assert distances(inside, basis).max() < 1e-6
    across = torch.linalg.qr(x.T, mode="complete").Q[:, 5]
    mixed = inside[0] / inside[0].norm() * 0.8 + across * 0.6
    assert float(distances(mixed[None], basis)) == pytest.approx(0.6, abs=1e-6)
    assert float(distances(torch.zeros(1, 20), basis)) == 1.0


def test_noise_has_the_singular_values_that_the_floor_says() -> None:
    """A matrix of noise alone spans nothing; five inputs above it are seen."""
    random = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(60, 40, generator=random)
    assert len(row_space([noise], noise=0.1)) <= 1
    assert len(row_space([noise])) == 40
    x, g = torch.randn(5, 40, generator=random), torch.randn(5, 60, generator=random)
    assert len(row_space([g.T @ x + noise], noise=0.1)) == 5


def test_inputs_of_the_second_layer_are_the_models_own(base: Any, batch: Batch) -> None:
    """Each prefix's vector is what the whole sequence's pass gives there."""
    seen: list[torch.Tensor] = []
    handle = base.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        base(input_ids=torch.tensor(batch[:1]), use_cache=False)
    handle.remove()
    prefixes = [batch[0][: i + 1] for i in range(14)]
    torch.testing.assert_close(attention_inputs(base, prefixes, 1), seen[0][0], rtol=1e-4, atol=1e-5)


# vulnerable configurations


def everything(found: Recovered, batch: Batch) -> bool:
    return set(found.tokens) == read_tokens(batch) and score_sequences(found.sequences, batch).recall == 1.0


def test_full_gradient_of_a_tiny_model(base: Any, batch: Batch) -> None:
    """All read tokens, no others, and all sequences, none made up."""
    base.requires_grad_(True)
    found = recover(base, gradients(base, batch))
    assert everything(found, batch) and found.complete and len(found.sequences) == 3
    beginnings = {tuple(ids[: i + 1]) for ids in batch for i in range(13)}
    assert found.ranks == (len(read_tokens(batch)), len(beginnings))


def test_lora_needs_ranks_that_add_up_and_b_other_than_zero(base: Any, batch: Batch) -> None:
    """3 x 16 rows span 39 inputs; 3 x 8 do not; with B = 0 the gradient of A is 0."""
    model = with_lora(base, 16)
    update = gradients(model, batch)
    assert set(update) >= {f"model.layers.0.self_attn.{p}_proj.lora_A.weight" for p in "qkv"}
    assert everything(recover(model, update), batch)
    fewer = {name: value[:8] if "lora_A" in name else value for name, value in update.items()}
    assert not everything(recover(model, fewer), batch)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.zero_()
    assert not recover(model, gradients(model, batch)).tokens


def test_a_change_of_weights_is_as_good_as_a_gradient(base: Any, batch: Batch) -> None:
    """After one step of SGD the difference of fp32 weights carries rounding of the weights' size, known to anyone."""
    base.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in trainable(base).items()}
    update, rate = gradients(base, batch), 1.0
    with torch.no_grad():
        change = {n: (before[n] - rate * update[n]) - before[n] for n in update}
    found = recover(base, change, noise=2.0**-24 * 0.3, threshold=1e-2)
    assert everything(found, batch)


def test_an_adamw_step_has_no_span_but_leans_to_its_inputs(base: Any, batch: Batch) -> None:
    """The first step is the gradient's sign, of full rank, in which every vector lies: the exact check says nothing.
    Its directions that are stronger than signs by chance still name more than the frequent tokens do."""
    base.requires_grad_(True)
    update = {n: g / (g.abs() + 1e-8) for n, g in gradients(base, batch).items()}
    assert len(row_space(attention_gradients(update, 0))) == 64
    present = {token for ids in batch for token in ids}
    recall = score_tokens(nearest_tokens(base, update, len(present), noise=1.0), batch).recall
    by_chance = len(present) / 512
    assert 4 * by_chance < recall < 1.0


# what does not hold against protection


def test_noise_brings_it_to_the_baseline(base: Any, batch: Batch, tokenizer: Any, pages: list[str]) -> None:
    base.requires_grad_(True)
    update = gradients(base, batch)
    present = {token for ids in batch for token in ids}
    guess = frequent_tokens(cut(tokenizer, pages, 14)[20:120], len(present))
    baseline = score_tokens(guess, batch).recall
    assert 0.2 < baseline < 0.9
    assert score_tokens(nearest_tokens(base, update, len(present)), batch).recall > 0.9
    private, sigma = noised(update, 1.0, 1.0, seed=0)
    assert sigma == 1.0
    assert not recover(base, private, noise=sigma).sequences
    assert score_under_noise(base, update, batch, 1.0, 1.0, seed=0).recall <= baseline
    assert score_under_noise(base, update, batch, 1.0, 1e-7, seed=0).recall > 0.9


def test_noised_clips_and_adds_what_it_says() -> None:
    update = {"a": torch.full((300, 300), 2.0), "b": torch.zeros(10)}
    private, sigma = noised(update, 3.0, 0.5, seed=1)
    rest = private["a"] - 3.0 / 300
    assert sigma == 1.5
    assert float(rest.std()) == pytest.approx(1.5, rel=0.02) and abs(float(rest.mean())) < 0.02
    assert not torch.equal(private["a"], noised(update, 3.0, 0.5, seed=2)[0]["a"])


def test_of_a_sum_tokens_are_read_but_not_whose_they_are(base: Any, tokenizer: Any, pages: list[str]) -> None:
    """Four silos of like text: each token alone is found in their sum; its silo by one in four, and by each update
    nearly always."""
    base.requires_grad_(True)
    known = cut(tokenizer, pages, 10)
    correct = blind = total = 0
    for group in range(6):
        rows = known[group * 8 : group * 8 + 8]
        silos = [rows[i : i + 1] for i in range(4)]
        updates = [gradients(base, silo) for silo in silos]
        tokens = recover(base, summed(updates)).tokens
        assert set(tokens) == read_tokens(rows[:4])
        single = score_attribution(attribute_by_updates(base, updates, tokens), tokens, silos)
        public = [known[60 + i :: 4] for i in range(4)]
        guess = score_attribution(attribute_by_texts(public, 512, tokens), tokens, silos)
        correct, blind, total = correct + single.correct, blind + guess.correct, total + single.named
    low, high = wilson(blind, total)
    assert correct / total > 0.95 and total > 60
    assert low < 0.25 < high


def test_scores_in_hand() -> None:
    rows = [[1, 2, 3], [1, 4, 9]]
    assert read_tokens(rows) == {1, 2, 4}
    score = score_tokens([1, 2, 7], rows)
    assert (score.named, score.correct, score.present) == (3, 2, 5)
    assert score_sequences([[1, 2], [1, 2, 3]], rows).recall == 0.5
    assert frequent_tokens([[5, 5, 1, 1, 7]], 2) == [1, 5]
    own = [[[1, 2]], [[2, 3]]]
    found = score_attribution([0, 0, 0], [1, 2, 3], own)
    assert (found.named, found.correct) == (2, 1)
    assert attribute_by_texts([[[1, 1, 2]], [[2, 2, 3]]], 5, [1, 2, 3]) == [0, 1, 1]


def test_refusals(base: Any) -> None:
    with pytest.raises(ModelError, match="no attention projections of layer 0"):
        recover(base, {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)})


# the real model


@pytest.mark.figures
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_smollm2_by_batches_of_news(kind: str) -> None:
    """4 x 32 tokens of BBC news: >= 90 % of distinct tokens and of sequences, by full gradients and by LoRA of rank 48
    on queries, keys and values; the sum of three silos; and noise."""
    model, tokenizer = smollm2()
    topics = [articles(tokenizer, topic, 32, 84) for topic in ("business", "sports", "tech")]
    if kind == "full":
        # As in a full fine-tune, of which the attack reads two layers.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".self_attn." in name and (".0." in name or ".1." in name))
    else:
        model = with_lora(model, 48)
    silos = [rows[:4] for rows in topics]
    public = [rows[4:84] for rows in topics]
    updates = [gradients(model, silo) for silo in silos]
    found = recover(model, updates[0])
    tokens, whole = score_tokens(found.tokens, silos[0]), score_sequences(found.sequences, silos[0])
    present = {token for ids in silos[0] for token in ids}
    baseline = score_tokens(frequent_tokens([ids for p in public for ids in p], len(present)), silos[0])
    print(kind, found.ranks, "tokens", tokens, "sequences", whole, "baseline", baseline.recall)
    assert tokens.recall >= 0.9 and tokens.precision == 1.0 and whole.recall >= 0.9 and whole.precision == 1.0

    if kind == "full":
        everyone = [ids for silo in silos for ids in silo]
        together = token_distances(model, row_space(attention_gradients(summed(updates), 0)))
        read = (together < 1e-3).nonzero()[:, 0].tolist()
        alone = score_attribution(attribute_by_updates(model, updates, read), read, silos)
        informed = score_attribution(attribute_by_texts(public, len(together), read), read, silos)
        print("sum", score_tokens(read, everyone).recall, "by updates", alone.recall, "by topics", informed.recall)
        assert score_tokens(read, everyone).recall >= 0.9
        assert alone.recall > 0.95 and informed.recall < 0.9
    sign = {n: g / (g.abs() + 1e-8) for n, g in updates[0].items()}
    signed = score_tokens(nearest_tokens(model, sign, len(present), noise=1.0), silos[0])
    print("first step of AdamW", signed.recall)
    for multiplier in (1e-5, 1e-4, 1e-3, 1e-2, 1.0):
        recall = score_under_noise(model, updates[0], silos[0], 1.0, multiplier, seed=0).recall
        print("noise multiplier", multiplier, "recall", recall)
    assert recall <= baseline.recall
