"""Chat templates: which one is used, and what a hostile or failing one can do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedlm.errors import ModelError
from fedlm.models.load import load_tokenizer, render

from .helpers import spec

MESSAGES = [{"role": "user", "content": "secret words"}]


@pytest.fixture
def bare(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model without a chat template and without a padding token."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "bare"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_recipes_template_comes_before_the_tokenizers_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    own = load_tokenizer(spec(tiny_model_dir), needs_template=True)
    assert render(own, MESSAGES, True).endswith("secret words<|im_end|>\n<|im_start|>assistant\n")
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert render(load_tokenizer(spec(tiny_model_dir, chat_template=str(file))), MESSAGES) == "[user] secret words"
    for gone in ("no-such-file.jinja", "~no-such-user/t.jinja"):
        with pytest.raises(ModelError, match=r"model\.chat_template: .* cannot be read \(FileNotFoundError\)"):
            load_tokenizer(spec(tiny_model_dir, chat_template=gone))


def test_several_templates_are_none_until_the_recipe_names_one(bare: Path) -> None:
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": n, "template": "{{ messages[0].content }}"} for n in ("default", "tool_use")]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"set model\.chat_template to 'chatml'"):
        load_tokenizer(spec(bare), needs_template=True)
    tokenizer = load_tokenizer(spec(bare, chat_template="chatml"), needs_template=True)
    assert render(tokenizer, MESSAGES) == "<|im_start|>user\nsecret words<|im_end|>\n"


def test_a_template_that_does_not_parse_is_an_error_at_load(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("hello\n{% for m in messages %}")
    with pytest.raises(ModelError, match=r"model\.chat_template: the chat template does not parse \(line 2\)"):
        load_tokenizer(spec(tiny_model_dir, chat_template=str(file)), needs_template=True)


def test_without_a_template_the_error_says_what_to_set(bare: Path) -> None:
    tokenizer = load_tokenizer(spec(bare))
    for act in (lambda: render(tokenizer, MESSAGES), lambda: load_tokenizer(spec(bare), needs_template=True)):
        with pytest.raises(ModelError, match=r"no chat template.*Fix: set model.chat_template to 'chatml'"):
            act()


def test_a_template_for_a_tokenizer_without_one(bare: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spec(bare, chat_template="chatml"), needs_template=True)
    assert render(tokenizer, MESSAGES) == "<|im_start|>user\nsecret words<|im_end|>\n"
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert render(load_tokenizer(spec(bare, chat_template=str(file))), MESSAGES) == "[user] secret words"
    with pytest.raises(ModelError, match=r"gone\.jinja' cannot be read"):
        load_tokenizer(spec(bare, chat_template=str(tmp_path / "gone.jinja")))


def test_padding_is_the_end_token_when_there_is_none(bare: Path) -> None:
    tokenizer = load_tokenizer(spec(bare))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) <= 512, "no token is added: the embeddings would have to grow"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "Python's internals"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "Python's internals"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "Python's internals"),
        ("{{ messages.append(1) }}", "refuses these messages|Python's internals"),
        ("{% for m in messages %}", "does not parse"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ raise_exception(messages[0].content) }}", "refuses these messages: TemplateError"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: TypeError"),
    ],
)
def test_a_hostile_or_failing_template_is_a_sentence_without_text(
    bare: Path, tmp_path: Path, template: str, words: str
) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(template)
    tokenizer = load_tokenizer(spec(bare, chat_template=str(file)))
    with pytest.raises(ModelError, match=words) as caught:
        render(tokenizer, MESSAGES)
    assert "secret" not in str(caught.value)
