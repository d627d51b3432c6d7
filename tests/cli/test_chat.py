"""`fedlm chat`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.inference.conftest import own_cache, run_path, tiny_recipe  # noqa: F401  (fixtures)

from .test_models import fedlm


def test_one_message_for_scripts(run_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    asked = ["--prompt", "the bank", "--max-new-tokens", "8"]
    text = fedlm("chat", str(run_path), *asked).stdout
    answer = json.loads(fedlm("chat", str(run_path), *asked, "--json").stdout)
    assert answer["text"] + "\n" == text
    assert answer["model"] == "tiny (adapter)"
    other = json.loads(fedlm("chat", str(run_path), *asked, "--json", "--round", "0").stdout)
    assert other["model"] == "tiny (round 0)"
    base = json.loads(fedlm("chat", str(run_path), *asked, "--json", "--base").stdout)
    plain = json.loads(fedlm("chat", str(tiny_model_dir), *asked, "--json", "--dtype", "float32").stdout)
    assert base["text"] == plain["text"] != answer["text"]
    assert fedlm("chat", str(run_path), "--prompt", "-", "--max-new-tokens", "8", input="the bank").stdout == text


def test_a_conversation(run_path: Path) -> None:  # noqa: F811
    lines = [
        "the bank",
        "/base",
        "the bank",
        "/base",
        "the bank",
        "again",
        "/reset",
        "the bank",
        "/what",
        "",
        "/exit",
        "no",
    ]
    result = fedlm("chat", str(run_path), "--max-new-tokens", "8", input="\n".join(lines) + "\n")
    prompts = result.stdout.split("> ")
    first, base, second, reset = (prompts[i].rsplit("\n", 1)[0] for i in (1, 3, 5, 8))
    assert first == second == reset != base
    assert prompts[2].endswith("base")
    for words in ("/reset forgets", "base model now", "federated model now", "is forgotten", "Unknown command"):
        assert words in result.stderr


def test_a_fault_in_one_turn_does_not_end_the_conversation(run_path: Path) -> None:  # noqa: F811
    result = fedlm("chat", str(run_path), "--max-new-tokens", "2", input="bank " * 300 + "\n/reset\nhello\n")
    assert "context is 256" in result.stderr
    assert "is forgotten" in result.stderr


def test_bytes_that_are_no_text_are_one_sentence(run_path: Path) -> None:  # noqa: F811
    words = "the prompt holds bytes that are no text"
    assert words in fedlm("chat", str(run_path), "--prompt", "-", input=b"bank \xff\xfe", code=2).stderr
    result = fedlm("chat", str(run_path), "--max-new-tokens", "2", input=b"bank \xff\xfe\n/reset\n")
    assert words in result.stderr and "is forgotten" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-run", "--prompt", "x"], "unknown model 'no-such-run'"),
        (["{run}", "--json"], "--json needs --prompt"),
        (["{run}", "--prompt", "x", "--round", "9"], "rounds with checkpoints: 0, 1, 2"),
        (["{run}", "--prompt", ""], "prompt is empty"),
        (["{run}", "--prompt", "x", "--dtype", "bfloat16"], "--dtype cannot be given for a run"),
        (["{run}", "--prompt", "x", "--sha256", "0" * 64, "--revision", "a"], "--sha256 and --revision cannot"),
        (
            ["smollm2-135m-instruct", "--prompt", "x", "--round", "best"],
            "--round names a round of a run, and this is none",
        ),
        (["~no-such-user/m", "--prompt", "x"], "no folder or .gguf file '~no-such-user/m'"),
    ],
)
def test_bad_input_is_one_sentence(run_path: Path, arguments: list[str], words: str) -> None:  # noqa: F811
    result = fedlm("chat", *[a.replace("{run}", str(run_path)) for a in arguments], code=2)
    assert words in result.stderr
