"""`measure`: the loss is the task's own, nothing of the model changes, batching changes nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedlm.errors import ModelError
from fedlm.evaluation import measure
from fedlm.recipe.schema import EvaluationSpec
from fedlm.training.tasks import get_task
from tests.evaluation.plain import plain_nll

ALL = EvaluationSpec(metrics=["loss", "choice", "generation"], batch_tokens=300, max_new_tokens=6)


def test_loss_is_the_tasks_own_from_the_definition(tiny: tuple[Any, Any], questions: Dataset) -> None:
    model, tokenizer = tiny
    result = measure(model, tokenizer, questions, "choice", get_task("instruct"), ALL, max_length=200, items=True)
    for row, nll, tokens in zip(questions, result["items"]["nll"], result["items"]["tokens"], strict=True):
        encoded = get_task("instruct").pieces(row, tokenizer, 200)[0]
        assert encoded is not None
        assert nll == pytest.approx(plain_nll(model, encoded.ids.tolist(), encoded.loss.tolist()), abs=1e-3)
        assert tokens == encoded.loss.sum()
    assert result["loss_sum"] == pytest.approx(sum(result["items"]["nll"]))
    assert result["loss_tokens"] == sum(result["items"]["tokens"])
    assert result["choice_total"] == result["generation_total"] == result["examples"] == len(questions)
    json.dumps(result, allow_nan=False)


def test_a_long_document_counts_every_token_once(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = Dataset.from_list([{"text": "the bank lent money to the school " * 20, "hash": "00"}])
    result = measure(model, tokenizer, rows, "text", get_task("pretrain"), EvaluationSpec(), max_length=32)
    assert result["loss_tokens"] == len(tokenizer.encode(rows[0]["text"]))  # all but the first, and the end token


def test_batch_size_and_repetition_change_nothing(tiny: tuple[Any, Any], questions: Dataset) -> None:
    model, tokenizer = tiny
    results = [
        measure(
            model,
            tokenizer,
            questions,
            "choice",
            get_task("instruct"),
            ALL.model_copy(update={"batch_tokens": batch_tokens}),
            max_length=200,
            items=True,
            packing=packing,
        )
        for batch_tokens, packing in ((1, True), (300, True), (50_000, True), (300, False), (300, True))
    ]
    assert results[1] == results[4]
    for other in results:
        np.testing.assert_allclose(other["items"]["nll"], results[0]["items"]["nll"], atol=1e-4)
        for field, value in results[0].items():
            if field not in ("items", "loss_sum"):
                assert other[field] == value, field


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(tiny: tuple[Any, Any], questions: Dataset, training: bool) -> None:
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.train(training)
    model.model.layers[0].train(not training)
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.model.norm.weight
    weight.grad = torch.full_like(weight, 7.0)
    measure(model, tokenizer, questions, "choice", get_task("instruct"), ALL, max_length=200)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(weight.grad, torch.full_like(weight, 7.0))
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert all(p.requires_grad for p in model.parameters())


def test_only_what_was_asked_for_is_measured(tiny: tuple[Any, Any], questions: Dataset) -> None:
    result = measure(
        *tiny, questions, "choice", get_task("instruct"), EvaluationSpec(metrics=["choice"]), max_length=200
    )
    assert result["loss_tokens"] == result["generation_total"] == 0
    assert result["choice_total"] == len(questions)
    assert "items" not in result


def test_the_subset_is_chosen_by_content(tiny: tuple[Any, Any], questions: Dataset) -> None:
    spec = EvaluationSpec(metrics=["choice"], max_examples=7)
    first = measure(*tiny, questions, "choice", get_task("instruct"), spec, max_length=200)
    backwards = questions.select(range(len(questions) - 1, -1, -1))
    assert first["examples"] == 7
    assert first == measure(*tiny, backwards, "choice", get_task("instruct"), spec, max_length=200)


def test_an_empty_role_gives_zeros(tiny: tuple[Any, Any], questions: Dataset) -> None:
    result = measure(*tiny, questions.select([]), "choice", get_task("instruct"), ALL, max_length=200, items=True)
    assert not any(value for field, value in result.items() if field != "items")


def test_a_broken_model_is_an_error_not_a_number(tiny: tuple[Any, Any], questions: Dataset) -> None:
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        measure(model, tiny[1], questions, "choice", get_task("instruct"), ALL, max_length=200)
