"""Scores of rows by the real model: answers that belong to other questions get the lowest."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fedlm.data.federated import load_data
from fedlm.models.load import load_base, load_tokenizer
from fedlm.models.processor import for_this_machine
from fedlm.recipe.load import load_recipe
from fedlm.recipe.starters import read_template
from fedlm.training.encode import encode_all
from fedlm.training.selection.alignment import alignment, best
from fedlm.training.tasks import get_task


@pytest.mark.figures
def test_answers_to_other_questions_are_dropped_by_smollm2(tmp_path: Path) -> None:
    """60 rows of SQuAD, 12 with another row's answer: of the 12 lowest scores at least 10 are theirs (11 expected)."""
    path = tmp_path / "qa.yaml"
    path.write_text(for_this_machine(read_template("qa")))
    recipe = load_recipe(path)
    rows = [dict(row) for row in load_data(recipe).pooled().train.select(range(60))]
    wrong = random.Random(0).sample(range(60), 12)
    answers = [rows[i]["messages"][-1]["content"] for i in wrong]
    for i, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
        assert rows[i]["messages"][-1]["content"] != answer
        rows[i]["messages"] = [rows[i]["messages"][0], {"role": "assistant", "content": answer}]
    model, tokenizer = load_base(recipe.model).eval(), load_tokenizer(recipe.model)
    tokens = encode_all(rows, get_task("instruct"), tokenizer, 1500)
    scores = alignment(model, tokenizer, tokens, batch_tokens=2048)
    dropped = set(range(60)) - set(best(scores, 0.8, None).tolist())
    assert len(dropped & set(wrong)) >= 10
    right = np.delete(scores, wrong)
    assert np.mean([[r > w for r in right] for w in scores[wrong]]) > 0.95
