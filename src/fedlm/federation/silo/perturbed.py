"""A silo's rows as its model may show them where the recipe asks for noise on text: `in_context.token_epsilon`.

Every token of a row's question and answer is drawn anew (`fedlm.privacy.text`); an answer that is one of the literal
choices of all rows is drawn among these instead. What the silo does from then on, which rows it finds most like a
question included, it does with the drawn rows alone, so that nothing which leaves tells more than they do.

The draws follow from the silo's secret, its rows, and the mechanism: the same rows are drawn alike in every round and
run, and asking again tells nothing new. Other rows, another model or another epsilon are drawn independently, and what
they cost adds up in the silo's ledger (`fedlm.federation.silo.token_ledger`).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlm.federation.silo.reference import reference_hash
from fedlm.federation.silo.token_ledger import Draw
from fedlm.privacy.stream import SecretStream
from fedlm.privacy.text import Vocabulary, perturbed, responded, uniform, vocabulary
from fedlm.recipe.data_checks import all_sources
from fedlm.recipe.expressions import is_template
from fedlm.recipe.schema import Recipe
from fedlm.training.attention import causal_model

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench


def perturbed_rows(bench: Workbench, silo: str, secret: bytes, epsilon: float) -> tuple[list[tuple[str, str]], Draw]:
    """Question and answer of each training row of choices, drawn anew; always the same for the same rows.

    Nothing that is made of them may leave before their draw is charged.
    """
    rows, literal = bench.silo_data(silo).train, literal_choices(bench.recipe)
    model = reference_hash(bench)
    whole = hashlib.sha256("".join(rows["hash"]).encode()).hexdigest()
    texts, draws, answers = list[list[int]](), list[np.ndarray](), list[str]()
    for index, row in enumerate(rows):
        right, choices = int(row["answer"]), [str(choice) for choice in row["choices"]]
        private = [str(row["question"])] if literal is not None else [str(row["question"]), choices[right]]
        texts += [bench.tokenizer.encode(text, add_special_tokens=False) for text in private]
        # by its place, not by its content: equal rows are drawn apart
        stream = SecretStream(secret, "text", whole, index, model, repr(epsilon))
        answer = responded(right, len(choices), float(uniform(stream, 1)[0]), epsilon)
        draws += [uniform(stream, len(ids)) for ids in texts[-len(private) :]]
        answers.append(choices[answer] if literal is not None else "")
    tokens = np.concatenate([np.asarray(ids, np.int64) for ids in texts])
    drawn = perturbed(tokens, np.concatenate(draws), space_of(bench), epsilon)
    parts = [ids.tolist() for ids in np.split(drawn, np.cumsum([len(ids) for ids in texts])[:-1])]
    told = [bench.tokenizer.decode(ids) for ids in parts]
    shown = zip(told, answers, strict=True) if literal is not None else zip(told[0::2], told[1::2], strict=True)
    word = SecretStream(secret, "text", "key").words(2).tolist()  # by which the secret is known again
    return list(shown), Draw(_digest(word, whole, model, epsilon, literal), _digest(parts, answers), epsilon)


def _digest(*parts: object) -> str:
    """Hex SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def space_of(bench: Workbench) -> Vocabulary:
    """The model's tokens; all but special ones may be drawn."""
    weight = causal_model(bench.model).get_input_embeddings().weight
    embeddings = weight.detach().to(torch.float32).cpu().numpy()
    special = set(bench.tokenizer.all_special_ids) | set(bench.tokenizer.get_added_vocab().values())
    count = min(len(bench.tokenizer), len(embeddings))  # embeddings may be padded
    return vocabulary(embeddings, np.asarray([i for i in range(count) if i not in special], np.int64))


def literal_choices(recipe: Recipe) -> list[str] | None:
    """The choices where sources list them literally: the same for all rows, they tell of none. Else None."""
    found: list[str] | None = None
    for _, source in all_sources(recipe.data):
        choices = source.columns.choices
        if not isinstance(choices, list) or any(map(is_template, choices)) or found not in (None, choices):
            return None
        found = choices
    return found
