from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app

run = CliRunner().invoke

RECIPE = """
name: tiny
model: {{source: {model}, dtype: float32, device: cpu}}
adapter: {{rank: 4}}
data: {{at_silos: true}}
training: {{steps: 3, batch_size: 16, max_length: 64}}
federation:
  algorithm: {{name: flora}}
  capacity:
    dealt: [{{}}, {{rank: 2, layers: 1, seconds: 9.0}}]
    silos: {{clinic: {{memory: 2GB}}}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_dir))
    return path


def test_it_says_what_every_kind_of_silo_does_and_needs(recipe: Path) -> None:
    result = run(app, ["recipe", "memory", str(recipe), "--budget", "1.5GB"])
    assert result.exit_code == 0, result.output
    assert "predicted within 15%" in result.stdout
    assert "dealt, number 2  rank 2, the last 1 of 2 layers, what ends within 9 seconds" in result.stdout
    assert "--budget 1.5GB" in result.stdout and "clinic" in result.stdout


def test_json_has_every_part(recipe: Path) -> None:
    answer = json.loads(run(app, ["recipe", "memory", str(recipe), "--json"]).stdout)
    first, second, clinic = answer["silos"]
    assert sum(first["parts"].values()) == first["predicted"] > second["predicted"]
    assert second["plan"] == {"rank": 2, "first_layer": 1, "seconds": 9.0}
    assert clinic["budget"] == "2GB" and clinic["plan"] == {"rank": 4}


def test_a_budget_that_is_too_small_is_exit_code_2_with_the_smallest_that_works(recipe: Path) -> None:
    result = run(app, ["recipe", "memory", str(recipe), "--budget", "100MB"])
    assert result.exit_code == 2
    assert "100MB is too small for any rank" in result.stderr and "MB is the least that works here" in result.stderr
    assert "dealt, number 1  rank 4" in result.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "much"], "'much' is no amount of memory"),
        (["--set", "adapter={kind: ia3}", "--set", "federation={}"], "memory is predicted for LoRA"),
        (["--set", "model.source=/nowhere"], "there is no folder"),
    ],
)
def test_bad_input_is_said(recipe: Path, options: list[str], told: str) -> None:
    result = run(app, ["recipe", "memory", str(recipe), *options])
    assert result.exit_code != 0
    assert told in result.stderr + str(result.exception)
