"""Errors become sentences and exit codes; help needs no torch."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from fedlm.cli import main
from fedlm.errors import RecipeError

runner = CliRunner()


class _Faulty:
    """A stand-in for a command's module."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def register(self, app: typer.Typer) -> None:
        @app.command("doctor")
        def doctor() -> None:
            raise self.error


def invoke(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> Any:
    real = importlib.import_module

    def stand_in(name: str, package: str | None = None) -> Any:  # other modules may be imported late, through the same
        return _Faulty(error) if name.startswith("fedlm.cli.") else real(name, package)

    monkeypatch.setattr(main.importlib, "import_module", stand_in)
    return runner.invoke(main.app, [*options, "doctor"])


def test_mendable_error_is_one_sentence_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, RecipeError("it is empty", where="a.yaml:1", fix="write it"))
    assert (result.exit_code, result.stderr, result.stdout) == (2, "a.yaml:1: it is empty. Fix: write it\n", "")


def test_unexpected_error_hides_its_text_but_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, ValueError("a patient's name"))
    assert result.exit_code == 1
    assert "Unexpected ValueError" in result.stderr and "patient" not in result.stderr
    path = Path(next(word for word in result.stderr.split() if "fedlm-traceback" in word))
    assert "a patient's name" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, ValueError("inside"), "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "inside" in result.stderr


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(monkeypatch, KeyboardInterrupt()).exit_code == 130


def test_full_disk_is_mendable(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, OSError(28, "No space left on device", "/runs/a"))
    assert result.exit_code == 2
    assert result.stderr.startswith("/runs/a: No space left on device. Fix:")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_place_that_is_none_is_mendable(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    result = invoke(monkeypatch, OSError(number, os.strerror(number), "/a/b"))
    assert result.exit_code == 2
    assert result.stderr == f"/a/b: {os.strerror(number)}. Fix: correct the path, or make the folder first.\n"


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_is_mendable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    result = invoke(monkeypatch, error)
    assert result.exit_code == 2
    assert "is not enough. Fix: lower training.batch_size" in result.stderr
    assert invoke(monkeypatch, RuntimeError("size mismatch")).exit_code == 1


def test_exit_code_of_a_command_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(monkeypatch, typer.Exit(3)).exit_code == 3


def test_unknown_command_names_the_nearest() -> None:
    result = runner.invoke(main.app, ["comapre"])
    assert result.exit_code == 2
    assert "did you mean 'compare'?" in result.stderr


def test_version() -> None:
    assert runner.invoke(main.app, ["--version"]).stdout.startswith("fedlm 0.")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = runner.invoke(main.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    if name != "recipe":  # a group; its commands have theirs
        assert f"fedlm {name}" in result.stdout


def test_help_and_recipe_check_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from fedlm.cli.main import app\n"
        "run = CliRunner().invoke\n"
        "assert run(app, ['--help']).exit_code == 0\n"
        f"assert run(app, ['init', '--out', r'{tmp_path}/r.yaml']).exit_code == 0\n"
        f"assert run(app, ['recipe', 'check', r'{tmp_path}/r.yaml']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
