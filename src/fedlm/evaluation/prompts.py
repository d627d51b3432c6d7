"""From a question to the tokens before the answer, split from the answer's tokens the way lm-eval splits them."""

from __future__ import annotations

from typing import Any

from fedlm.errors import DataError, ModelError
from fedlm.models.chat import render


def render_prompt(question: str, tokenizer: Any, task_name: str) -> tuple[str, str, bool]:
    """Text before the answer, the delimiter between both, and whether the tokenizer adds its own special tokens.

    An instruct task shows the question as the user's turn in the model's chat template, followed by the opening of the
    assistant's turn; the answer follows at once. A pre-training task shows the plain question and a space.
    """
    if task_name == "pretrain":
        return question, " ", True
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            "the tokenizer has no chat template, so an instruct task cannot be evaluated",
            where="model",
            fix="set model.chat_template to 'chatml' or a Jinja file",
        )
    turns = [{"role": "user", "content": question}]
    return render(tokenizer, turns, True), "", False


def encode_pair(context: str, continuation: str, tokenizer: Any, *, special: bool) -> tuple[list[int], list[int]]:
    """Token ids of a context and of the text scored after it, as lm-eval's `_encode_pair` gives them.

    Whitespace at the end of the context moves to the continuation, the whole text is encoded at once, and what lies
    behind the context's own tokens is the continuation: words are cut into tokens as they are in running text.
    An empty context is replaced by the token that opens a text.

    Raises:
        DataError: when the continuation has no token of its own.
    """
    if context.strip() == "":
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = list(tokenizer.encode(context + continuation, add_special_tokens=False))
        before, after = ([opening], ids) if ids[:1] != [opening] else (ids[:1], ids[1:])
    else:
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        before = list(tokenizer.encode(context, add_special_tokens=special))
        after = list(tokenizer.encode(context + continuation, add_special_tokens=special))[len(before) :]
    if not after:
        raise DataError("a choice has no token of its own after the question", fix="check the `choices` mapping")
    return before, after
