"""LAMP reads most tokens of a sequence out of updates that hold no span; DLG does not, and nothing does under noise."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.attacks.dager import frequent_tokens, noised, recover
from fedlm.attacks.lamp import (
    DLG,
    LAMP,
    Rule,
    log_perplexity,
    moved,
    nearest,
    reconstruct,
    reconstruction_loss,
    reordered,
)
from fedlm.errors import ModelError
from fedlm.evaluation.written import written_scores
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, trainable
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.schema import AdapterSpec, ModelSpec
from tests.attacks.news import texts
from tests.attacks.silo import gradients

SMALL_MODEL = Path(__file__).parents[2] / "benchmarks" / "parts" / "small_model.py"
Batch = list[list[int]]


def rouge(found: Sequence[Sequence[int]], batch: Batch) -> tuple[float, float]:
    """Mean ROUGE-1 and ROUGE-2, F-measure, of tokens: the words of these vocabularies are pieces of words."""
    scores = [
        written_scores(" ".join(map(str, f)), [" ".join(map(str, ids))], ["rouge1", "rouge2"])
        for f, ids in zip(found, batch, strict=True)
    ]
    return sum(s["rouge1"] for s in scores) / len(batch), sum(s["rouge2"] for s in scores) / len(batch)


def attacked(model: Any, updates: list[Tensors], batch: Batch, rule: Rule = LAMP) -> tuple[float, float]:
    return rouge([guess.tokens for guess in reconstruct(model, updates, len(batch[0]), rule)], batch)


def with_lora(model: Any, rank: int, targets: Any = "all-linear") -> Any:
    """LoRA after a first round: B is no longer 0."""
    adapted = attach(model, AdapterSpec(rank=rank, alpha=2.0 * rank, targets=targets), 0)
    with torch.no_grad():
        for name, parameter in trainable(adapted).items():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.fixture
def batch(tokenizer: Any, pages: list[str]) -> Batch:
    """Four beginnings of 8 tokens."""
    return [tokenizer.encode(page)[:8] for page in pages[:4]]


# what is computed


def layers_of(model: Any) -> dict[str, torch.nn.Linear]:
    named = dict(model.named_modules())
    return {n: named[n.removesuffix(".weight")] for n in trainable(model) if "_proj" in n}


@pytest.mark.parametrize("distance", ["cos", "l2"])
def test_the_loss_is_the_distance_of_gradients(base: Any, batch: Batch, distance: Any) -> None:
    """Of embeddings that are tokens' own, against the gradients of these tokens written out; 0 for the same ones."""
    base.requires_grad_(True)
    layers, table = layers_of(base), base.get_input_embeddings().weight.detach()
    assert len(layers) == 14
    mine, others = gradients(base, batch[:1]), gradients(base, batch[1:2])
    x = table[torch.tensor(batch[:1])]
    same = {n: mine[n][None] for n in layers}
    assert float(reconstruction_loss(base, layers, same, x, distance)) == pytest.approx(0, abs=1e-4)
    pairs = [(mine[n].flatten(), others[n].flatten()) for n in layers]
    if distance == "cos":
        expected = sum(float(1 - torch.cosine_similarity(a, b, 0)) for a, b in pairs) / len(pairs)
    else:
        expected = sum(float((a - b).square().sum()) for a, b in pairs)
    found = reconstruction_loss(base, layers, {n: others[n][None] for n in layers}, x, distance)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_its_derivative_is_that_of_differences(base: Any, batch: Batch) -> None:
    """Along one direction. Norms compute in fp32 whatever the model is in, so the step is not small."""
    base.requires_grad_(True)
    base.double()
    layers = layers_of(base)
    seen = {n: g[None] for n, g in gradients(base, batch[:1]).items() if n in layers}
    random = torch.Generator().manual_seed(0)
    x, along = (0.1 * torch.randn(1, 8, 64, generator=random, dtype=torch.float64) for _ in range(2))
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(reconstruction_loss(base, layers, seen, x, "cos", differentiable=True).sum(), [x])
    ahead, behind = (float(reconstruction_loss(base, layers, seen, x + s * along, "cos")) for s in (1e-3, -1e-3))
    assert float((slope * along).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=5e-3)


def test_reorderings_keep_every_place_once_and_are_of_all_kinds() -> None:
    draw = torch.Generator().manual_seed(0)
    orders = [moved(6, draw) for _ in range(300)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert [5, 1, 2, 3, 4, 0] in orders  # swapped
    assert [1, 2, 3, 0, 4, 5] in orders  # one moved
    assert [2, 3, 4, 5, 0, 1] in orders  # a beginning moved to the end
    assert {tuple(moved(2, draw)) for _ in range(50)} == {(0, 1), (1, 0)}


def test_log_perplexity_is_the_models_loss(base: Any, batch: Batch) -> None:
    ids = torch.tensor(batch)
    each = [base(input_ids=i[None], labels=i[None]).loss.item() for i in ids]
    assert log_perplexity(base, ids).tolist() == pytest.approx(each, rel=1e-4)


def test_the_discrete_phase_takes_the_best_order(base: Any, batch: Batch) -> None:
    """Two tokens in each other's place go back; what is right stays; a heavy language model takes likelier text."""
    base.requires_grad_(True)
    layers, table = layers_of(base), base.get_input_embeddings().weight.detach()
    ids = torch.tensor(batch[:1])[:, :6]
    seen = {n: g[None] for n, g in gradients(base, ids.tolist()).items() if n in layers}

    def after(x: torch.Tensor, alpha: float) -> list[int]:
        rule = replace(LAMP, n_d=60, alpha_lm=alpha)
        found = reordered(base, layers, seen, x, rule, base, torch.Generator().manual_seed(0))
        return nearest(found, table)[0].tolist()

    right = ids[0].tolist()
    wrong = [right[1], right[0], *right[2:]]
    assert right[0] != right[1]
    assert after(table[torch.tensor([wrong])], 0.0) == right == after(table[ids], 0.0)
    likely = after(table[ids], 1e3)
    assert sorted(likely) == sorted(right)
    assert float(log_perplexity(base, torch.tensor([likely]))) < float(log_perplexity(base, ids)) - 0.1


# what it recovers


def test_lora_on_mlps_is_read_and_not_under_noise(base: Any, tokenizer: Any, pages: list[str]) -> None:
    """Without attention DAGER has nothing to read; LAMP names most tokens, more than DLG and than the frequent ones."""
    batch = [tokenizer.encode(page)[:6] for page in pages[:6]]
    model = with_lora(base, 8, ["gate_proj", "up_proj", "down_proj"])
    updates = [gradients(model, [ids]) for ids in batch]
    with pytest.raises(ModelError, match="no attention projections"):
        recover(model, updates[0])
    guess = frequent_tokens([tokenizer.encode(page)[:6] for page in pages[20:120]], 6)
    baseline, _ = rouge([guess] * len(batch), batch)
    rule = replace(LAMP, steps=150, n_init=8, n_d=2)
    first, _ = attacked(model, updates, batch, rule)
    dlg, _ = attacked(model, updates, batch, replace(DLG, steps=100, n_init=8))
    private = [noised(update, 1.0, 1.0, seed)[0] for seed, update in enumerate(updates)]
    under_noise, _ = attacked(model, private, batch, replace(rule, steps=60))
    print("LAMP", first, "DLG", dlg, "noise", under_noise, "frequent", baseline)
    assert first > 0.6 > 0.4 > baseline and first > dlg + 0.2
    assert under_noise <= baseline


def test_one_seed_one_guess_and_the_model_is_left_alone(base: Any, batch: Batch) -> None:
    model = with_lora(base, 4).train()
    update = gradients(model, batch[:1])
    rule = replace(LAMP, steps=4, n_c=2, n_d=2)
    first, again, other = (reconstruct(model, [update], 8, rule, seed=s)[0] for s in (0, 0, 1))
    assert first == again and first.loss != other.loss
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert all(torch.equal(p.grad, update[n]) for n, p in trainable(model).items() if p.grad is not None)
    assert reconstruct(model, [], 8) == []


def test_refusals(base: Any, batch: Batch) -> None:
    base.requires_grad_(True)
    update = gradients(base, batch[:1])
    name = "model.layers.0.self_attn.q_proj.weight"
    for wrong, length, said in [
        ([update], 1, "nothing to predict"),
        ([{"else": update[name]}], 8, "does not train"),
        ([{name: update[name][:3]}], 8, "misshapen"),
        ([{name: update[name] * float("nan")}], 8, "not finite"),
        ([{name: update[name] * 0}], 8, "no gradients of linear layers"),
        ([{"model.embed_tokens.weight": update["model.embed_tokens.weight"]}], 8, "no gradients of linear layers"),
        ([update, {name: update[name]}], 8, "different parameters"),
    ]:
        with pytest.raises(ModelError, match=said):
            reconstruct(base, wrong, length)


# a trained model


@pytest.mark.figures
def test_twenty_sequences_of_news(tmp_path: Path) -> None:
    """12 tokens each, of articles that a model of a million parameters was not trained on."""
    stories = list(dict.fromkeys(texts("*")))  # some were printed twice
    runpy.run_path(str(SMALL_MODEL))["small_model"](tmp_path, stories[::2], 300)
    spec = ModelSpec(source=str(tmp_path), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(spec)
    cut = [ids[:12] for story in stories[1::2] if len(ids := tokenizer.encode(story)) >= 12]
    batch, public = cut[::50][:20], cut[1::2]
    assert len(batch) == 20
    baseline = rouge([frequent_tokens(public, 12)] * 20, batch)
    print(f"most frequent tokens: ROUGE-1 {baseline[0]:.2f}, ROUGE-2 {baseline[1]:.2f}", flush=True)

    found: dict[str, tuple[float, float]] = {}

    def tell(words: str, model: Any, updates: list[Tensors], rule: Rule = LAMP) -> None:
        found[words] = attacked(model, updates, batch, rule)
        print(f"{words}: ROUGE-1 {found[words][0]:.2f}, ROUGE-2 {found[words][1]:.2f}", flush=True)

    def exactly(model: Any, updates: list[Tensors]) -> int:
        """How many sequences DAGER reads."""
        return sum(ids[:-1] in recover(model, u).sequences for u, ids in zip(updates, batch, strict=True))

    model = load_base(spec).eval()
    model.requires_grad_(True)
    updates = [gradients(model, [ids]) for ids in batch]
    print("full, DAGER", exactly(model, updates), "of 20")
    tell("full", model, updates)
    tell("full, DLG", model, updates, DLG)
    for rank in (2, 8):
        model = with_lora(load_base(spec), rank)
        updates = [gradients(model, [ids]) for ids in batch]
        print("rank", rank, "DAGER", exactly(model, updates), "of 20")
        tell(f"rank {rank}", model, updates)
    tell("rank 8, no reorderings", model, updates, replace(LAMP, n_d=0))
    tell("rank 8, DLG", model, updates, DLG)
    for multiplier in (1e-3, 1e-2, 1.0):
        private = [noised(update, 1.0, multiplier, seed)[0] for seed, update in enumerate(updates)]
        tell(f"rank 8, noise {multiplier:g}", model, private)
    upper = [{n: g for n, g in u.items() if ".layers.2." in n or ".layers.3." in n} for u in updates]
    tell("rank 8, last two of four layers", model, upper)
    for kind in ("full", "rank 8"):
        assert found[kind][0] > found[f"{kind}, DLG"][0] + 0.2 and found[kind][1] > found[f"{kind}, DLG"][1] + 0.1
        assert found[kind][0] > baseline[0] + 0.3
    assert found["rank 8, noise 1"][0] <= baseline[0]
