"""Chat templates: which one a tokenizer uses, and rendering it inside Jinja's sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlm.errors import ModelError
from fedlm.models.folders import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The one template that fedlm ships; a recipe names it with `chat_template: chatml`."""

FIX = "set model.chat_template to 'chatml' or to a Jinja file"


class MessagesRefused(ModelError):
    """A working chat template does not render these messages: the fault lies in them, and others may pass."""


def template_text(choice: str) -> str:
    """The template that a recipe's `chat_template` names: 'chatml' or a Jinja file.

    Raises:
        ModelError: the file is missing or not UTF-8.
    """
    if choice == "chatml":
        return CHATML
    try:
        return local_path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the chat template '{choice}' cannot be read ({type(error).__name__})",
            where="model.chat_template",
            fix="name a Jinja file, write 'chatml', or leave it out for the tokenizer's own",
        ) from error


def require_template(tokenizer: PreTrainedTokenizerBase, *, where: str | None = None) -> None:
    """Raise ModelError when no messages can be rendered: the tokenizer has no chat template, or it does not parse."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            "the tokenizer has no chat template, and one is needed to write messages as text", where=where, fix=FIX
        )
    try:
        render_jinja_template(conversations=[], chat_template=tokenizer.chat_template)  # compiles, and remembers it
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ModelError(f"the chat template does not parse (line {error.lineno})", where=where, fix=FIX) from error


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """Messages ({role, content}) as the text that the model expects.

    The template runs in transformers' `ImmutableSandboxedEnvironment`. No message text enters an error.

    Raises:
        MessagesRefused: the template fails on these messages.
        ModelError: there is no template, it does not parse, or it reaches for Python's internals.
    """
    import jinja2

    require_template(tokenizer)
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.exceptions.SecurityError as error:
        raise ModelError("the chat template reaches for Python's internals and was stopped", fix=FIX) from error
    except Exception as error:  # a template can fail in any way at all
        # The template's own words ("roles must alternate") help and hold no message text; anything else might.
        words = str(error)
        reason = words if words and words in str(tokenizer.chat_template) else type(error).__name__
        raise MessagesRefused(f"the chat template refuses these messages: {reason}") from error
    return str(text)
