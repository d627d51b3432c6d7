"""Preference rows as tokens, their losses in closed form and in parts, and what is measured on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from fedlm.errors import DataError
from fedlm.models.adapters import base_only
from fedlm.models.chat import render
from fedlm.recipe.preference import LOSSES, PreferenceSpec
from fedlm.recipe.schema import Recipe, TrainingSpec
from fedlm.training.divergence import token_kl
from fedlm.training.encode import TokenSet, encode_all
from fedlm.training.forward import sequence_nll
from fedlm.training.loop import Window, train
from fedlm.training.objective import Tools, mean_loss, sequences_of
from fedlm.training.sequences import Example
from fedlm.training.tasks.base import REFERENCE, Held
from fedlm.training.tasks.preference import Preference, PreferenceObjective
from fedlm.training.tasks.preference_losses import kto_losses, pair_losses
from tests.training.helpers import learnt, sequence


def task(**settings: Any) -> Preference:
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "task": "preference",
            "model": {"source": "."},
            "data": {"at_silos": True},
            "training": {"steps": 1, "max_length": 64},
            "preference": settings,
        }
    )
    return Preference(recipe)


PAIR = {"prompt": "the bank lent money", "chosen": "to the school", "rejected": "for books", "hash": "a", "row": "f:1"}
CHOICE = {"question": "who lent money", "choices": ["a school", "the bank", "books"], "answer": 1, "hash": "b"}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_as_tokens(loss: str, tokenizer: Any) -> None:
    prompt = tokenizer(
        render(tokenizer, [{"role": "user", "content": PAIR["prompt"]}], True), add_special_tokens=False
    )["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = task(loss=loss).examples(PAIR, tokenizer, 64)
    answers = [e.sequences[0] for e in found] if loss == "kto" else list(found[0].sequences[:2])
    for answer, text in zip(answers, (PAIR["chosen"], PAIR["rejected"]), strict=True):
        assert answer.ids[: len(prompt)].tolist() == prompt, "the tokens that generation sees"
        assert answer.loss.tolist() == [False] * len(prompt) + [True] * (len(answer) - len(prompt))
        assert tokenizer.decode(answer.ids[len(prompt) : -1]) == text and answer.ids[-1] == end
    if loss == "kto":
        assert [e.facts["wanted"] for e in found] == [1.0, 0.0]
    if loss == "orpo":
        assert found[0].sequences[2].ids.tolist() == prompt and found[0].sequences[2].targets == len(prompt) - 1


def test_turns_before_the_answer(tokenizer: Any) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "the bank"), ("assistant", "lent money"), ("user", "to whom"))
    ]
    row = {"messages": turns, "prompt": None, "chosen": "the school", "rejected": "books", "hash": "c"}
    (example,) = task().examples(row, tokenizer, 96)
    shown = tokenizer(render(tokenizer, turns, True), add_special_tokens=False)["input_ids"]
    assert all(s.ids[: len(shown)].tolist() == shown and not s.loss[: len(shown)].any() for s in example.sequences)


def test_options_as_pairs(tokenizer: Any) -> None:
    """The right one is chosen; which wrong one is rejected depends on the row alone, and every one comes up."""
    rejected = set()
    for number in range(40):
        row = {**CHOICE, "hash": f"row {number}"}
        once, again = (task().examples(row, tokenizer, 64)[0].sequences for _ in range(2))
        assert tokenizer.decode(once[0].ids[once[0].loss][:-1]) == "the bank"
        assert once[1].ids.tolist() == again[1].ids.tolist()
        rejected.add(tokenizer.decode(once[1].ids[once[1].loss][:-1]))
    assert rejected == {"a school", "books"}
    with pytest.raises(DataError, match="every option of the row is the right one"):
        task().examples({**CHOICE, "choices": ["the bank ", "the bank"]}, tokenizer, 64)


def test_a_row_that_does_not_fit_is_refused_or_left_out(tokenizer: Any) -> None:
    rows = [PAIR, {**PAIR, "prompt": "money " * 70, "row": "f:2"}, {**PAIR, "chosen": "books " * 60, "row": "f:3"}]
    with pytest.raises(DataError, match=r"prompt and answer have \d+ tokens, above .*another answer") as caught:
        encode_all(rows, task(), tokenizer, 64)
    assert "f:2" in str(caught.value) and "money" not in str(caught.value)
    found = encode_all(rows, task(), tokenizer, 64, skip=True)
    assert (len(found), found.dropped, found.cut) == (1, 2, 0)


def answers(loss: str, count: int = 7) -> list[Example]:
    """Answers of unequal length, their reference made up."""
    draw = np.random.default_rng(5)
    found = []
    for i in range(count):
        pair = [sequence((1, 9), (i + 2, 6), (10 + 2 * i + side, 2 + (i + side) % 4), answer=3) for side in (0, 1)]
        reference = {f"{REFERENCE}{side}": float(draw.normal(-18, 3)) for side in (0, 1)}
        more = [sequence((1, 9), (i + 2, 6), answer=14)] if loss == "orpo" else []
        facts = {"wanted": float(i % 3 > 0)} if loss == "kto" else {}
        found.append(Example((*pair, *more), {**facts, **reference, "weight": 0.5 + i % 2}))
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packing": False}])
def test_parts_of_a_step_add_up(loss: str, changes: dict[str, Any], adapted: Any) -> None:
    """However a step is cut into forward passes, its loss and the weights after it are the same."""
    start = {name: p.detach().clone() for name, p in learnt(adapted).items()}
    spec, data = PreferenceSpec(loss=loss, beta=0.3), TokenSet.of(answers(loss))
    whole = {"lr": 0.1, "steps": 1, "batch_size": 7, "max_length": 64, "optimizer": "sgd", "schedule": "constant"}
    ends = []
    for settings in ({}, changes):
        with torch.no_grad():
            for name, parameter in learnt(adapted).items():
                parameter.copy_(start[name])
        training = TrainingSpec.model_validate({**whole, **settings})
        objective = PreferenceObjective(Tools(adapted, training), spec)
        result = train(
            adapted, learnt(adapted), data, training, Window(0, 1), generator_key=(0, "s"), rule=None,
            objective=objective,
        )  # fmt: skip
        ends.append((result.loss, {name: p.detach().clone() for name, p in learnt(adapted).items()}, objective.figures))
    (loss_a, a, figures_a), (loss_b, b, figures_b) = ends
    assert loss_a == pytest.approx(loss_b, rel=1e-5) and figures_a.keys() == figures_b.keys()
    assert any(float((a[name] - start[name]).abs().max()) > 1e-4 for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-6, rtol=1e-4)
    limit = mean_loss(PreferenceObjective(Tools(adapted, TrainingSpec.model_validate(whole)), spec), list(data), 64)
    again = mean_loss(PreferenceObjective(Tools(adapted, TrainingSpec.model_validate(whole)), spec), list(data), 9999)
    assert limit == pytest.approx(again, rel=1e-5)


def test_losses_in_closed_form() -> None:
    logps = torch.tensor([[-3.0, -7.0], [-6.0, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -6.0], [-5.0, -2.5]], dtype=torch.float64)
    lengths = torch.tensor([[2, 4], [3, 1]])
    spec = PreferenceSpec(loss="dpo", beta=0.2, label_smoothing=0.1)
    losses, rewards = pair_losses(spec, logps, lengths, reference)
    for i, margin in enumerate((0.2 * 2.0, 0.2 * -1.5)):  # conservative DPO: a tenth of the pairs the other way round
        wanted = -0.9 * math.log(1 / (1 + math.exp(-margin))) - 0.1 * math.log(1 / (1 + math.exp(margin)))
        assert float(losses[i]) == pytest.approx(wanted, rel=1e-12)
    assert torch.allclose(rewards, 0.2 * (logps - reference))
    spec = PreferenceSpec(loss="orpo", beta=0.5)
    small = torch.tensor([[-1e-5, -40.0]], dtype=torch.float64)  # an answer that is almost certain, one almost not
    (found,), _ = pair_losses(spec, small, torch.ones(1, 2), None)
    p, q = math.exp(-1e-5), math.exp(-40)
    odds = math.log(p / -math.expm1(-1e-5)) - math.log(q / (1 - q))
    assert float(found) == pytest.approx(-0.5 * math.log(1 / (1 + math.exp(-odds))), rel=1e-9)
    spec = PreferenceSpec(loss="kto", beta=0.5, desirable_weight=2.0)
    losses, _ = kto_losses(spec, logps[:, 0], reference[:, 0], torch.tensor([True, False]), 0.3)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5 * (1.0 - 0.3), -0.5 * (-1.0 - 0.3))]
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid[0]), 1 - sigmoid[1]], rel=1e-12)


def test_kto_pairs_another_rows_answer_and_needs_both_verdicts(tokenizer: Any) -> None:
    rows = [
        {**PAIR, "prompt": f"the {name}", "chosen": f"of {name}", "hash": name} for name in ("bank", "school", "dose")
    ]
    found = encode_all(rows, task(loss="kto"), tokenizer, 64, silo="north")
    prompts = [tuple(e.sequences[0].ids[~e.sequences[0].loss]) for e in found]
    for example, prompt in zip(found, prompts, strict=True):
        own, other = example.sequences
        assert tuple(other.ids[~other.loss]) == prompt
        spoken = [tuple(e.sequences[0].ids[e.sequences[0].loss]) for e in found]
        answer = tuple(other.ids[other.loss])
        assert answer in spoken and answer != tuple(own.ids[own.loss])
    judged = [{"prompt": r["prompt"], "response": r["chosen"], "desirable": True, "hash": r["hash"]} for r in rows]
    with pytest.raises(DataError, match="this one has wanted ones only"):
        encode_all(judged, task(loss="kto"), tokenizer, 64, silo="north")
    judged[1]["desirable"] = False
    assert encode_all(judged, task(loss="kto"), tokenizer, 64, silo="north").facts["wanted"].tolist() == [1, 0, 1]


def test_objectives_are_weighed(tokenizer: Any) -> None:
    """The mean over a silo's examples is the weighted mean of its objectives' means."""
    rows = [
        {**PAIR, "chosen": f"the {'money ' * i}", "label": "a" if i % 4 else "b", "hash": str(i)} for i in range(1, 9)
    ]
    settings = {"weights": {"a": 0.6, "b": 0.2, "c": 9.0}, "silo_weights": {"own": {"a": 1.0, "b": 3.0, "c": 1.0}}}
    for silo, (a, b) in {"north": (0.75, 0.25), "own": (0.25, 0.75)}.items():
        found = encode_all(rows, task(**settings), tokenizer, 64, silo=silo)
        losses = np.random.default_rng(0).normal(size=8)
        of = np.array([row["label"] for row in rows])
        wanted = a * losses[of == "a"].mean() + b * losses[of == "b"].mean()
        assert (found.facts["weight"] * losses).mean() == pytest.approx(wanted, rel=1e-6)
        assert "objective" not in found.facts
    alone = encode_all([r for r in rows if r["label"] == "b"], task(**settings), tokenizer, 64, silo="north")
    assert alone.facts["weight"].tolist() == [1.0, 1.0], "one objective alone: the size of steps is its own"
    with pytest.raises(DataError, match="none of the objectives"):
        encode_all([{**PAIR, "label": "d"}], task(**settings), tokenizer, 64)


@pytest.mark.parametrize("loss", LOSSES)
def test_measured_by_plain_forward_passes(loss: str, adapted: Any, tokenizer: Any) -> None:
    """Figures of held-out pairs equal those from one plain forward pass for each answer."""
    rows = []
    for i in range(1, 6):
        texts = ["to the " + "school " * i, "a " + "bank " * (5 - i)]
        rows.append({**PAIR, **dict(zip(("chosen", "rejected"), texts[:: 1 if i % 2 else -1], strict=True))})
    of = task(loss=loss, beta=0.4)
    lower = 30 * (loss == "kto")  # the baseline above zero; the two answers of a pair compare as before
    adapted.eval()

    def plain(sequence_: Any) -> tuple[float, float]:
        ids = torch.from_numpy(sequence_.ids.astype("int64"))
        scores = log_softmax(adapted(input_ids=ids[None], use_cache=False).logits[0, :-1], -1)
        kept = torch.from_numpy(sequence_.loss[1:])
        return float(scores.gather(1, ids[1:, None])[kept].sum()), float(kept.sum())

    def reference_logps(sequences: Any) -> Any:
        with base_only(adapted):
            return -sequence_nll(adapted, sequences, 64)[0] - lower

    held = Held(rows, adapted, tokenizer, 64, 64, reference=lambda: base_only(adapted), reference_logps=reference_logps)
    with torch.no_grad():
        found = of.measure(held)
        pairs = [task().examples(row, tokenizer, 64)[0].sequences for row in rows]
        policy = np.array([[plain(s)[0] for s in pair] for pair in pairs])
        with base_only(adapted):
            before = np.array([[plain(s)[0] for s in pair] for pair in pairs])
    tokens = np.array([[s.targets for s in pair] for pair in pairs])
    rewards = 0.4 * (policy / tokens if loss in ("orpo", "simpo") else policy - before)
    gaps = rewards[:, 0] - rewards[:, 1]
    figures = {name: total / count for name, (total, count) in found.figures.items()}
    assert figures["reward_margin"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert figures["reward_accuracy"] == (gaps > 0).mean() and found.items["reward"] == (gaps > 0).tolist()
    assert 0 < figures["reward_accuracy"] < 1 or loss in ("orpo", "simpo")
    assert figures["ranking_accuracy"] == (policy[:, 0] / tokens[:, 0] > policy[:, 1] / tokens[:, 1]).mean()
    assert figures["chosen_logp"] == pytest.approx(policy[:, 0].sum() / tokens[:, 0].sum(), rel=1e-5)
    assert figures["loss"] == pytest.approx(np.mean(found.items["nll"])) and figures["kl"] > 0.01
    if loss == "dpo":
        assert figures["loss"] == pytest.approx(np.log1p(np.exp(-gaps)).mean(), rel=1e-4)
    if loss == "kto":  # the loss over all answers as one step
        step = PreferenceObjective(Tools(adapted, TrainingSpec(steps=1)), of.spec)
        both = of.together([e for row in rows for e in of.examples(row, tokenizer, 64)])
        sums = reference_logps(sequences_of(both)).reshape(-1, 2)
        facts = [{**e.facts, f"{REFERENCE}0": a, f"{REFERENCE}1": b} for e, (a, b) in zip(both, sums, strict=True)]
        whole = [Example(e.sequences, f) for e, f in zip(both, facts, strict=True)]
        assert figures["loss"] == pytest.approx(mean_loss(step, whole, 64), rel=1e-5) and step.baseline > 0


@pytest.mark.parametrize("packing", [True, False])
def test_kl_over_the_vocabulary(packing: bool, adapted: Any) -> None:
    sequences = [sequence((1, 12), (i, 3 + i), answer=2 + i % 3) for i in range(2, 7)]
    adapted.eval()
    total = count = 0.0
    with torch.no_grad():
        for s in sequences:
            ids, kept = torch.from_numpy(s.ids.astype("int64"))[None], torch.from_numpy(s.loss[1:])
            ours = log_softmax(adapted(input_ids=ids, use_cache=False).logits[0, :-1][kept], -1)
            with base_only(adapted):
                theirs = log_softmax(adapted(input_ids=ids, use_cache=False).logits[0, :-1][kept], -1)
            total += float(kl_div(theirs, ours, reduction="sum", log_target=True))
            count += int(kept.sum())
    found = token_kl(adapted, sequences, lambda: base_only(adapted), 40, packing=packing)
    assert found == (pytest.approx(total, rel=1e-4), count) and total > 0.1
