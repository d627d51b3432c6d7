"""Extraction by prompting: given how a training text begins, does the model write the rest of it?

Carlini, Ippolito, Jagielski, Lee, Tramèr, Zhang, "Quantifying Memorization Across Neural Language Models", ICLR 2023: a
text of prefix + suffix tokens is extractable where the greedy continuation of its prefix is its suffix, token for
token. A coordinator, or whoever holds the final model, can do this; what it shows depends on the attacker knowing such
beginnings. The baseline is the same on texts of the same source that were not trained on: letters' endings and licences
are written by any model.

Reports hold counts alone, never text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlm.data.redact import Redactor
from fedlm.errors import PrivacyError
from fedlm.evaluation.intervals import Interval, wilson
from fedlm.training.generation import continuations


@dataclass(frozen=True)
class Extraction:
    """What a model wrote of a set of texts.

    Attributes:
        texts: that were long enough to be asked.
        short: the others.
        verbatim: suffixes written whole and exactly.
        matching: for each text, tokens of its suffix before the first wrong one.
        present: personal data by kind: different values per text that its suffix holds and its prefix does not.
        extracted: those of them that the continuation holds, wherever.
    """

    texts: int
    short: int
    verbatim: int
    matching: list[int]
    present: dict[str, int] = field(default_factory=dict)
    extracted: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the texts, how many are written verbatim."""
        return self.verbatim / self.texts

    @property
    def interval(self) -> Interval:
        """Wilson's of the share, 95 %."""
        return wilson(self.verbatim, self.texts)


def extract(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[Sequence[int]],
    *,
    prefix: int | Sequence[int],
    suffix: int,
    batch_tokens: int = 4096,
    personal: Redactor | None = None,
) -> Extraction:
    """Prompt the model with the first `prefix` tokens of each text, and compare what it writes with the next `suffix`.

    Args:
        model: in evaluation mode.
        sequences: token ids, as texts were trained on.
        prefix: of all texts, or of each.
        personal: finds personal data in suffixes and continuations.

    Raises:
        PrivacyError: `prefix` or `suffix` is below 1, or no text is so long.
        ModelError: see `continuations`.
    """
    prefixes = [prefix] * len(sequences) if isinstance(prefix, int) else list(prefix)
    if min([suffix, *prefixes]) < 1:
        raise PrivacyError(f"a prefix of {min(prefixes)} and a suffix of {suffix} tokens ask nothing")
    asked = [list(ids[: p + suffix]) for ids, p in zip(sequences, prefixes, strict=True) if len(ids) >= p + suffix]
    if not asked:
        raise PrivacyError(
            f"none of {len(sequences)} texts has {min(prefixes, default=0) + suffix} tokens",
            fix="choose a shorter prefix or suffix",
        )
    prompts = [ids[:-suffix] for ids in asked]
    written = continuations(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=suffix)
    matching = [matched(tokens, ids[-suffix:]) for tokens, ids in zip(written, asked, strict=True)]
    present, extracted = Counter[str](), Counter[str]()
    if personal is not None:
        for tokens, ids, shown in zip(written, asked, prompts, strict=True):
            before = set(personal.finds(tokenizer.decode(shown)))
            # A value may begin in the prefix, so it is sought in the whole.
            secret = set(personal.finds(tokenizer.decode(ids))) - before
            found = set(personal.finds(tokenizer.decode([*shown, *tokens])))
            present.update(kind for kind, _ in secret)
            extracted.update(kind for kind, _ in secret & found)
    whole = sum(count == suffix for count in matching)
    return Extraction(
        len(asked), len(sequences) - len(asked), whole, matching, dict(present), {k: extracted[k] for k in present}
    )


def matched(written: Sequence[int], truth: Sequence[int]) -> int:
    """Tokens that agree before the first that do not.

    >>> matched([5, 6, 7], [5, 6, 8, 9])
    2
    """
    pairs = zip(written, truth, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(written), len(truth)))
