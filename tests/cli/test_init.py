from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.recipe.starters import pipelines, templates

run = CliRunner().invoke


@pytest.mark.parametrize("name", templates())
def test_init_then_check(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "recipe.yaml"
    assert run(app, ["init", name, "--out", str(path)]).exit_code == 0
    result = run(app, ["recipe", "check", str(path)])
    assert result.exit_code == 0, result.output


def test_init_writes_own_data_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(app, ["init"]).exit_code == 0
    assert "name: own-data" in Path("recipe.yaml").read_text()


def test_init_does_not_overwrite_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    result = run(app, ["init", "--out", str(path)])
    assert result.exit_code == 2
    assert "exists already" in result.stderr and path.read_text() == "mine"
    assert run(app, ["init", "--out", str(path), "--force"]).exit_code == 0
    assert path.read_text() != "mine"


def test_unknown_template_names_the_nearest() -> None:
    result = run(app, ["init", "educatoin", "--out", "-"])
    assert result.exit_code == 2
    assert "did you mean 'education'?" in result.stderr


def test_list() -> None:
    assert set(json.loads(run(app, ["init", "--list", "--json"]).stdout)) == {*templates(), *pipelines()}
    assert all(name in run(app, ["init", "--list"]).stdout for name in templates())


@pytest.mark.parametrize("slow", [True, False])
def test_json_tells_what_was_changed_for_this_machine(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlm.models.processor.without_bf16", lambda: slow)
    monkeypatch.setattr("fedlm.models.processor.GPUS", ())
    out = tmp_path / "r.yaml"
    told = json.loads(run(app, ["init", "news", "--out", str(out), "--json"]).stdout)
    assert told == {"template": "news", "path": str(out), "changed": {"model.dtype": "float32"} if slow else {}}
    assert ("dtype: float32" in out.read_text()) is slow


def test_dash_prints() -> None:
    assert run(app, ["init", "news", "--out", "-"]).stdout.startswith("# Which desk")


def test_out_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mine")
    for out, words in ((tmp_path, "this is a folder"), (tmp_path / "r.yaml" / "x.yaml", "this is no folder")):
        for options in ([], ["--force"]):
            result = run(app, ["init", "--out", str(out), *options])
            assert result.exit_code == 2
            assert words in result.stderr and "exists already" not in result.stderr
    result = run(app, ["init", "--out", "/dev/null", "--force"])
    assert "a device" in result.stderr and Path("/dev/null").is_char_device()


def test_force_keeps_the_old_recipe_when_the_new_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")

    def full(self: Path, text: str, **_: str) -> None:
        self.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert run(app, ["init", "--out", str(path), "--force"]).exit_code == 2
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
