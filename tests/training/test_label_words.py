"""Label words: the model's own probabilities of a few tokens, under every adapter, packed or not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import DataError, ModelError
from fedlm.models.adapters import attach, trainable
from fedlm.recipe.schema import AdapterSpec, Recipe, TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.objective import Tools
from fedlm.training.tasks import get_task
from fedlm.training.tasks.base import Held

WORDS = ["bank", "school", "dose"]
ROWS = [
    {"question": question, "choices": WORDS, "answer": i % 3, "row": f"row {i}"}
    for i, question in enumerate(["the dose was given to the patient", "science", "lent by the bank to them", "a book"])
]


def of(model: Path, words: list[str] = WORDS) -> Recipe:
    columns = {"question": "q", "choices": words, "answer": "a"}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": "label-words",
            "model": {"source": str(model), "dtype": "float32", "device": "cpu"},
            "data": {"silos": [{"name": "a", "sources": [{"path": "rows.jsonl", "columns": columns}]}]},
            "training": {"steps": 1},
        }
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "prompt", "virtual_tokens": 3}, {"kind": "full"}])
def test_the_loss_is_the_cross_entropy_among_the_words(
    base: Any, tokenizer: Any, tiny_model_dir: Path, packing: bool, adapter: dict[str, Any]
) -> None:
    """Against the model called row by row, its logits cut to the words; a soft prompt is before every row."""
    model = attach(base, AdapterSpec.model_validate(adapter), 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    task = get_task("label-words", of(tiny_model_dir))
    examples = [example for row in ROWS for example in task.examples(row, tokenizer, 128)]
    objective = task.objective(Tools(model, TrainingSpec(steps=1, packing=packing), tokenizer))
    with packed(model) if packing else nullcontext():
        terms, divisor = objective.terms(objective.begin(examples))
        loss = terms.sum() / divisor
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
    assert gradients and all(g.abs().max() > 0 for n, g in gradients.items() if "lora_A" not in n)

    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    wanted, hits = [], 0
    model.zero_grad()
    for row in ROWS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1][tokens]
        wanted.append(-torch.log_softmax(logits.float(), 0)[row["answer"]])
        hits += int(logits.argmax()) == row["answer"]
    mean = torch.stack(wanted).mean()
    mean.backward()
    torch.testing.assert_close(loss, mean, atol=1e-5, rtol=0)
    assert objective.figures["accuracy"] == (float(hits), 4.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trainable(model)[name].grad, atol=1e-5, rtol=1e-3)
    held = Held(ROWS, model.eval(), tokenizer, 128, 512, packing)
    figures = task.measure(held).figures
    assert figures["loss"][0] == pytest.approx(4 * mean.item(), abs=1e-4) and figures["accuracy"] == (hits, 4)
    assert {"label_f1/0", "label_f1/1", "label_f1/2"} < figures.keys()


def test_what_has_no_label_word_is_refused(tokenizer: Any, tiny_model_dir: Path) -> None:
    alike = of(tiny_model_dir, ["bank", "bank holiday", "dose"])
    with pytest.raises(ModelError, match="'bank' and 'bank holiday' begin with the same token"):
        get_task("label-words", alike).examples(ROWS[0], tokenizer, 128)
    task = get_task("label-words", of(tiny_model_dir))
    with pytest.raises(DataError, match=r"row 0: the question has \d+ tokens, and `training.max_length` is 8"):
        task.examples(ROWS[0], tokenizer, 8)
    with pytest.raises(DataError, match="row 1: the row's class is none of the run's"):
        task.examples(ROWS[1] | {"choices": ["x", "y", "z"]}, tokenizer, 128)
    with pytest.raises(DataError, match="'label-words' needs rows with question, choices and answer"):
        task.examples({"messages": [], "row": "row 2"}, tokenizer, 128)
