"""A tokenizer as its folder has it, and whether a model knows all of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.errors import ModelError
from fedlm.models.folders import quiet, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path, *, where: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder, as it is there.

    Args:
        where: how the recipe names it.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever transformers raises here is about this folder
        raise ModelError(
            f"the tokenizer cannot be read: {reason(error)}",
            where=where,
            fix="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights again",
        ) from error
    return tokenizer


def check_vocabulary(tokenizer: Any, config: dict[str, Any], *, where: str) -> None:
    """Whether the model has an embedding for each token that text, padding or the chat template can give.

    Added tokens that none of these uses may lie beyond: Gemma 3's text models share the tokenizer of those that see
    images.

    Args:
        config: the model's config.json.

    Raises:
        ModelError: some token has none; it would be an index out of range in the middle of a run.
    """
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int) or len(tokenizer) <= size:
        return
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    used = {number for content, number in added.items() if number in special or content in template}
    learnt = set(tokenizer.get_vocab().values()) - set(added.values())
    beyond = sum(number >= size for number in used | learnt)
    if beyond:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {size}: {beyond} that are in use have no "
            "embedding",
            where=where,
            fix="put the tokenizer there that the model was trained with, or leave out what was added to it",
        )
