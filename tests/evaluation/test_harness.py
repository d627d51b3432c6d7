"""lm-eval on the model in memory, with a small task of our own, against our own scoring of the same rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedlm.errors import MissingExtra, RunError
from fedlm.evaluation.choice import score_choices
from fedlm.evaluation.harness import run_harness

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_a_task_of_our_own_gives_our_own_accuracies(tiny: tuple[Any, Any], questions: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(dict(row)) for row in questions))
    task = tmp_path / "tiny_choice.yaml"
    task.write_text(TASK.format(file=rows))
    theirs = run_harness(model, tokenizer, [str(task)])["tiny_choice"]
    ours = score_choices(model, tokenizer, questions, "pretrain", batch_tokens=500)
    assert theirs["acc,none"] == pytest.approx(ours.correct.mean())
    assert theirs["acc_norm,none"] == pytest.approx(ours.correct_norm.mean())


def test_an_unknown_task_is_a_sentence(tiny: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(RunError, match="could not run no_such_task"):
        run_harness(*tiny, ["no_such_task"])


def test_without_lm_eval_the_extra_is_named(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"fedlm\[eval\]"):
        run_harness(*tiny, ["arc_easy"])
