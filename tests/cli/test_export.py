"""`fedlm export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedlm.inference.session import run_recipe, run_tensors
from fedlm.models.export import load_adapter
from tests.inference.conftest import own_cache, run_path, tiny_recipe, write_run  # noqa: F401  (fixtures)
from tests.models.helpers import recipe, trained

from .test_models import fedlm


def test_an_adapter_of_the_round_that_is_asked_for(run_path: Path, tiny_model_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    for which, number in (("best", 1), ("last", 2), ("0", 0)):
        out = tmp_path / which
        result = fedlm("export", str(run_path), "--out", str(out), "--round", which, "--json")
        assert json.loads(result.stdout)["from"] == f"round {number}"
        expected = run_tensors(run_path, str(number))[0]
        spec = run_recipe(run_path).adapter
        assert all(torch.equal(expected[n], t) for n, t in load_adapter(out, spec).items())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "best")


def test_merged_is_exact_by_default_and_says_what_bf16_costs(tiny_model_dir: Path, tmp_path: Path) -> None:
    of = recipe(tiny_model_dir, dtype="bfloat16")
    run = write_run(tmp_path / "run", of, [trained(of, 0.001)], best=0)
    exact = fedlm("export", str(run), "--out", str(tmp_path / "exact"), "--merged")
    assert "Warning" not in exact.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exact").dtype == torch.float32
    rounded = fedlm("export", str(run), "--out", str(tmp_path / "bf16"), "--merged", "--dtype", "bfloat16")
    assert "Warning: rounding the merged weights to bfloat16 changed them by " in rounded.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def test_of_a_personal_method_it_says_that_a_part_is_missing(run_path: Path, tmp_path: Path) -> None:  # noqa: F811
    file = run_path / "recipe.yaml"
    text = file.read_text()
    assert "with 'fedavg'" not in fedlm("export", str(run_path), "--out", str(tmp_path / "shared")).stderr
    assert "name: fedavg" in text
    file.write_text(text.replace("name: fedavg", "name: ditto"))
    told = "Note: with 'ditto' each silo has a model of its own"
    assert told in fedlm("export", str(run_path), "--out", str(tmp_path / "part")).stderr
    assert told in fedlm("chat", str(run_path), "--prompt", "hello", "--max-new-tokens", "1").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--out", "{run}"], "not empty"),
        (["{tmp}", "--out", "{tmp}/new"], "no run here"),
        (["{run}", "--out", "{tmp}/new", "--round", "9"], "rounds with checkpoints: 0, 1, 2"),
        (["{run}", "--out", "{tmp}/new", "--merged", "--dtype", "float16"], "unknown dtype 'float16'"),
        (["{run}", "--out", "{tmp}/new", "--dtype", "bfloat16"], "only applies to --merged"),
    ],
)
def test_bad_input_is_one_sentence(run_path: Path, tmp_path: Path, arguments: list[str], words: str) -> None:  # noqa: F811
    given = [a.replace("{run}", str(run_path)).replace("{tmp}", str(tmp_path)) for a in arguments]
    result = fedlm("export", *given, code=2)
    assert words in result.stderr
    assert not (tmp_path / "new").exists()
