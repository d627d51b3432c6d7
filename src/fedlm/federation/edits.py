"""New prompts from old ones, without any private text: edits of phrases, and a rewriting by a model at the coordinator.

After GrIPS (Prasad et al., EACL 2023): delete a phrase, swap two, put a deleted one back, paraphrase. GrIPS finds
phrases with a constituency parser; here a phrase ends at a punctuation mark and has at most four words, which needs no
parser and no particular language. GrIPS paraphrases a phrase with a model made for it; here the recipe's own model
rewrites the whole prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from fedlm.models.chat import render
from fedlm.randomness import key
from fedlm.recipe.prompting import PROMPT_CHARACTERS
from fedlm.recipe.schema import Recipe

Paraphrase = Callable[[str, int], str]
"""Another wording of a prompt; the number, when asked again, draws another one."""

LONGEST = 4
"""Words of a phrase."""

TRIES = 20
"""For each new candidate wanted: short prompts have few edits."""

TEMPERATURE = 0.8

REQUEST = "Rewrite this instruction in other words, with the same meaning, in one line.\n\nInstruction: "

_CLAUSE = re.compile(r"[^\s,.;:!?]+(?:[^\S\n]+[^\s,.;:!?]+)*[,.;:!?]*|\S+")


def phrases(prompt: str) -> list[str]:
    """A prompt's phrases.

    >>> phrases("Read the news article with care, then name its topic.")
    ['Read the news article', 'with care,', 'then name its topic.']
    """
    found = []
    for clause in _CLAUSE.findall(prompt):
        words = clause.split()
        found += [" ".join(words[i : i + LONGEST]) for i in range(0, len(words), LONGEST)]
    return found


def edited(
    parents: Sequence[str],
    count: int,
    operations: Sequence[str],
    draw: np.random.Generator,
    *,
    deleted: list[str],
    known: set[str],
    paraphrase: Paraphrase | None = None,
) -> list[str]:
    """At most `count` prompts that are not known yet, each one edit away from one of the parents.

    Args:
        draw: decides everything.
        deleted: phrases that were taken out so far; those that are now are added.
        known: prompts that there were already.
        paraphrase: what rewrites a prompt; needed for that operation alone.
    """
    found: list[str] = []
    for attempt in range(count * TRIES):
        if len(found) == count:
            break
        parent = parents[int(draw.integers(len(parents)))]
        operation = operations[int(draw.integers(len(operations)))]
        text = _edit(parent, operation, draw, deleted, attempt, paraphrase)
        if text and len(text) <= PROMPT_CHARACTERS and text not in known and text not in found:
            found.append(text)
    return found


def _edit(
    parent: str,
    operation: str,
    draw: np.random.Generator,
    deleted: list[str],
    attempt: int,
    paraphrase: Paraphrase | None,
) -> str:
    """The prompt after one edit; empty where this edit is not possible."""
    parts = phrases(parent)
    if operation == "paraphrase":
        return paraphrase(parent, attempt) if paraphrase is not None and parent else ""
    if operation == "add":
        if not deleted:
            return ""
        parts.insert(int(draw.integers(len(parts) + 1)), deleted[int(draw.integers(len(deleted)))])
        return " ".join(parts)
    if len(parts) < 2:
        return ""
    if operation == "delete":
        gone = parts.pop(int(draw.integers(len(parts))))
        if gone not in deleted:
            deleted.append(gone)
        return " ".join(parts)
    first, second = draw.permutation(len(parts))[:2].tolist()
    parts[first], parts[second] = parts[second], parts[first]
    return " ".join(parts)


def model_paraphrase(recipe: Recipe) -> Paraphrase:
    """Rewriting by the recipe's model. It is loaded here, beside the one of simulated silos in this process.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from fedlm.federation.silo.instructions import keyed
    from fedlm.federation.silo.workbench import set_threads
    from fedlm.models.load import load_base, load_tokenizer
    from fedlm.training.forward import precision
    from fedlm.training.generation import generate

    set_threads(recipe.federation.threads)
    tokenizer, model = load_tokenizer(recipe.model, needs_template=True), load_base(recipe.model)
    model.eval()

    def paraphrase(prompt: str, number: int) -> str:
        text = render(tokenizer, [{"role": "user", "content": REQUEST + prompt}], True)
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        draw = keyed(TEMPERATURE, key(recipe.seed, "paraphrase", number) % 2**31, [prompt])
        limit = recipe.evaluation.batch_tokens
        with precision(model):
            [written] = generate(model, tokenizer, [ids], batch_tokens=limit, max_new_tokens=64, draw=draw)
        lines = [line.strip().strip('"') for line in written.splitlines() if line.strip()]
        return lines[0].removeprefix("Instruction:").strip() if lines else ""

    return paraphrase
