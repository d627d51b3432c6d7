"""Instruction tuning: the loss is on what the assistant says and on the token that ends its turn, nothing else."""

from __future__ import annotations

from typing import Any

from fedlm.errors import DataError
from fedlm.models.chat import FIX, MessagesRefused, render
from fedlm.training.sequences import Encoded, encoded
from fedlm.training.tasks.base import Task


class Instruct(Task):
    """Loss on assistant turns, rendered by the model's own chat template.

    The mask comes from incremental rendering: for each assistant turn the conversation is rendered up to the generation
    prompt and with the turn; what the second adds to the first is what the model must learn to say. The pieces are
    tokenized apart, as they are when a model answers, so training and generation see the same prompt tokens.
    """

    name = "instruct"

    def pieces(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Encoded]:
        where = row.get("row")
        messages = self._messages(row)
        whole = rendered(tokenizer, messages, False, where)
        special = set(tokenizer.all_special_ids)
        ids: list[int] = []
        loss: list[bool] = []
        done = 0  # characters of `whole` already tokenized
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = rendered(tokenizer, messages[:turn], True, where)
            answered = rendered(tokenizer, messages[: turn + 1], False, where)
            if not (answered.startswith(prompt) and whole.startswith(answered) and len(prompt) >= done):
                raise DataError(
                    f"the chat template renders a conversation up to assistant turn {turn} differently from the "
                    "same turns inside the whole conversation, so the assistant's tokens cannot be told apart",
                    where=where,
                    fix=f"{FIX}, or use single-turn rows",
                )
            context = tokens_of(tokenizer, whole[done : len(prompt)])
            answer = tokens_of(tokenizer, answered[len(prompt) :])
            last = max((i for i, token in enumerate(answer) if token in special), default=len(answer) - 1)
            ids += context + answer
            loss += [False] * len(context) + [i <= last for i in range(len(answer))]
            done = len(answered)
            if len(ids) >= max_length:
                break
        found = encoded(ids, loss, max_length)
        return [found] if found else []

    @staticmethod
    def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
        if row.get("messages"):
            return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if row.get("choices"):
            return choice_messages(row["question"], row["choices"][row["answer"]])
        raise DataError(
            "the task 'instruct' needs rows with messages, prompt and response, or question, choices and answer",
            where=row.get("row"),
            fix="map them in `columns`, or use `task: pretrain` for plain text",
        )


def choice_messages(question: str, answer: str) -> list[dict[str, str]]:
    """A multiple-choice row as a conversation: the user asks, the assistant gives the answer's text."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rendered(tokenizer: Any, messages: list[dict[str, str]], generation_prompt: bool, where: str | None) -> str:
    """Messages in the chat template; a DataError, which names the row, where the template refuses them."""
    try:
        return render(tokenizer, messages, generation_prompt)
    except MessagesRefused as error:
        roles = ", ".join(m["role"] for m in messages) or "none"
        raise DataError(
            f"{error.what} (roles: {roles})",
            where=where,
            fix="begin with a user or system turn and let user and assistant alternate, set data.malformed: skip, or "
            + FIX,
        ) from None  # the template's own error may quote the text


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered text, which has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
