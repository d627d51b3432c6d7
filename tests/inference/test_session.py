"""From a run directory back to a model that talks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.errors import ModelError, RunError
from fedlm.inference.generate import Sampling
from fedlm.inference.session import open_chat, run_recipe, run_tensors
from fedlm.models.adapters import get_tensors
from fedlm.recipe.schema import Recipe
from tests.models.helpers import recipe, spec, trained

from .conftest import write_run

SAMPLING = Sampling(12)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_runs_tensors_by_round(run_path: Path, tiny_recipe: Recipe) -> None:
    assert run_recipe(run_path) == tiny_recipe
    for which, scale in ((None, 0.4), ("best", 0.4), ("last", 0.2), ("0", 0.1)):
        assert same(run_tensors(run_path, which)[0], trained(tiny_recipe, scale)), which
    for which in ("7", "-1", "first"):
        with pytest.raises(RunError, match=r"rounds with checkpoints: 0, 1, 2|is not a round"):
            run_tensors(run_path, which)
    with pytest.raises(RunError, match="no run here"):
        run_recipe(run_path / "adapter")


def test_no_best_round_is_an_error(tiny_recipe: Recipe, tmp_path: Path) -> None:
    path = write_run(tmp_path / "unvalidated", tiny_recipe, [trained(tiny_recipe)], best=None)
    with pytest.raises(RunError, match=r"none is best.*--round last"):
        run_tensors(path)
    assert run_tensors(path, "last")[1] == "round 0"


def test_a_corrupt_checkpoint_is_said(run_path: Path) -> None:
    file = run_path / "checkpoints" / "round-0002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RunError, match="corrupt"):
        run_tensors(run_path, "last")


def test_a_chat_uses_the_adapter_and_can_compare_with_the_base(run_path: Path, tiny_model_dir: Path) -> None:
    chat, plain = open_chat(str(run_path)), open_chat(str(tiny_model_dir), spec(tiny_model_dir))
    assert same(get_tensors(chat.model), run_tensors(run_path, "best")[0])
    adapted = "".join(chat.reply("the bank", SAMPLING))
    assert [m["role"] for m in chat.history] == ["user", "assistant"]
    base = "".join(plain.reply("the bank", SAMPLING))
    assert adapted != base
    assert chat.toggle_base()
    assert chat.history == []
    assert "".join(chat.reply("the bank", SAMPLING)) == base
    assert not chat.toggle_base()
    assert "".join(chat.reply("the bank", SAMPLING)) == adapted
    with pytest.raises(ModelError, match="base model already"):
        plain.toggle_base()


def test_an_answer_that_is_broken_off_is_not_remembered(run_path: Path) -> None:
    chat = open_chat(str(run_path))
    answer = chat.reply("the bank", SAMPLING)
    next(answer)
    answer.close()
    assert chat.history == []
    list(chat.reply("one", SAMPLING))
    list(chat.reply("two", SAMPLING))
    assert [m["content"] for m in chat.history[::2]] == ["one", "two"]


def test_fully_trained_weights_talk_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    of = recipe(tiny_model_dir, {"kind": "full"})
    chat = open_chat(str(write_run(tmp_path / "full", of, [trained(of, 0.1)], best=0)))
    assert "".join(chat.reply("the bank", SAMPLING))
    with pytest.raises(ModelError, match="no adapter to switch off"):
        chat.toggle_base()
    assert not chat.use_base


def test_without_a_template_the_text_is_continued(run_path: Path) -> None:
    chat = open_chat(str(run_path))
    chat.tokenizer.chat_template = None
    assert not chat.has_template
    assert "".join(chat.reply("the bank", SAMPLING))
    assert chat.history == []
