"""Byte-level byte-pair encoding: words of a text, symbols that merges make, and a tokenizer's folder.

BPE (Sennrich et al., ACL 2016) starts from an alphabet and merges the most frequent pair of neighbours again and again;
here the alphabet is the 256 bytes (GPT-2: Radford et al., 2019), so no text is unknown. Symbols have numbers: bytes 0
to 255 in the order of the letters that stand for them, then one for each new string that a merge makes. Words,
alphabet, numbers and the order of ties are those of Hugging Face's `tokenizers`, whose trainer gives the same merges on
pooled text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedlm.models.chat import template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = 256

END_OF_TEXT, PADDING, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"

LONGEST_CONTEXT = 1 << 30
"""A tokenizer knows no limit; transformers wants a number."""


@cache
def alphabet() -> tuple[str, ...]:
    """The letters that stand for bytes, by symbol."""
    from tokenizers.pre_tokenizers import ByteLevel

    return tuple(sorted(ByteLevel.alphabet()))


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, in the letters of `alphabet`; words are GPT-2's, with the space before them."""
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split(text))
    return counts


class Symbols:
    """The strings of the symbols, and their numbers."""

    def __init__(self, merges: Iterable[tuple[int, int]] = ()) -> None:
        self.strings = list(alphabet())
        self._numbers = {string: number for number, string in enumerate(self.strings)}
        for left, right in merges:
            self.add(left, right)

    def __len__(self) -> int:
        return len(self.strings)

    def knows(self, left: int, right: int) -> bool:
        """Whether another merge has already made the string that this one makes."""
        return self.strings[left] + self.strings[right] in self._numbers

    def add(self, left: int, right: int) -> int:
        """The symbol that a merge makes.

        It is a new one if pairs are merged wherever they occur: letters that become one symbol in one place become it
        by the same merges in any other.
        """
        string = self.strings[left] + self.strings[right]
        if string not in self._numbers:
            self._numbers[string] = len(self.strings)
            self.strings.append(string)
        return self._numbers[string]


def specials(chat: bool) -> list[str]:
    """Tokens that no text gives: the end of a text, padding; and with `chat` the marks of ChatML."""
    return [END_OF_TEXT, PADDING, *([TURN_BEGINS, TURN_ENDS] if chat else [])]


def make_tokenizer(merges: Sequence[tuple[int, int]], *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer with these merges, in their order: special tokens first, then bytes, then what the merges make.

    A document ends with `<|endoftext|>`; with a chat template, whose turns end with `<|im_end|>`, so do documents.

    Args:
        merges: pairs of symbols.
        chat_template: 'chatml' or a Jinja file.

    Raises:
        ModelError: the template's file cannot be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = specials(chat_template is not None)
    strings = Symbols(merges).strings
    vocabulary = {string: number for number, string in enumerate([*first, *strings])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[(strings[a], strings[b]) for a, b in merges]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(first)
    end = END_OF_TEXT if chat_template is None else TURN_ENDS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=PADDING, model_max_length=LONGEST_CONTEXT
    )
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    return tokenizer


def save_tokenizer(folder: Path, merges: Sequence[tuple[int, int]], *, chat_template: str | None = None) -> int:
    """Write `make_tokenizer` into an empty folder; returns its number of tokens."""
    tokenizer = make_tokenizer(merges, chat_template=chat_template)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
