"""Text becomes instruction and response in the silo, written by the model there (after FedIT-U2S: Ye et al., 2024,
arXiv 2409.07136).

For each text the examples of the public pool that are most like it are shown to the model, which then writes an
instruction that the text answers, and the response. What cannot be read, is too short, or copies an example or an
earlier row is not used and counted. Draws are keyed by the row's content. The rows are written once and kept in the
cache of the silo's machine, under a hash of everything they follow from; the text leaves neither.

What differs from the paper: likeness is the cosine between means of the model's own last hidden states, relative to the
pool's mean, where the paper has an encoder for it; and the model that the run begins with writes, whatever its size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.data.examples import SCHEMAS, content_hash
from fedlm.errors import DataError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo.reference import reference_hash
from fedlm.files import cache_dir, read_json, write_json
from fedlm.models.chat import render
from fedlm.randomness import torch_generator
from fedlm.recipe.instructions import InstructionExample, InstructionSpec
from fedlm.training.generation import Draw, generate
from fedlm.training.scores import mean_states

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench

log = logging.getLogger("fedlm.silo")

CODE = 1
"""Of what is written and how: part of each hash."""

TASK = (
    "Read the text. Write one instruction or question that the text answers, and the response to it.\n"
    "Write exactly two lines, 'Instruction: ...' and 'Response: ...'."
)

_FORM = re.compile(r"\s*Instruction:[ \t]*(\S.*?)\s*\n+\s*Response:[ \t]*(\S.*)", re.DOTALL)
_NEXT = re.compile(r"\n\s*(?:Instruction|Response|Text):")


def instructed(bench: Workbench, rows: Any) -> tuple[Any, int]:
    """Rows of messages made of rows of text, in their order, and how many texts gave none.

    Raises:
        DataError: a text gave none, under `malformed: fail`.
    """
    import pyarrow as pa
    from datasets import Dataset

    spec, recipe = bench.recipe.data.instructions, bench.recipe
    assert spec is not None
    settings = [CODE, spec.model_dump(mode="json"), recipe.seed, recipe.evaluation.batch_tokens, reference_hash(bench)]
    name = hashlib.sha256(json.dumps([*settings, list(rows["hash"])], sort_keys=True).encode()).hexdigest()[:40]
    folder = cache_dir() / "instructions"
    file = folder / f"{name}.json"
    if file.is_file():
        written = read_json(file)
    else:
        with bench.as_reference():
            written = _written(bench, rows, spec)
        with disk_errors(folder, "cache"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(file, written)
            file.chmod(0o600)
    made, refused = written["rows"], written["refused"]
    if refused:
        counts = Counter(reason for _, reason in refused)
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        log.info("%d of %d texts became instructions (%s)", len(made), len(rows), told)
        if recipe.data.malformed == "fail":
            raise DataError(
                f"{len(refused)} of {len(rows)} texts gave no instruction that can be used ({told})",
                where=f"{refused[0][0]} is the first",
                fix="set data.malformed: skip, or give better examples in data.instructions.pool",
            )
    return Dataset(pa.Table.from_pylist(made, schema=SCHEMAS["messages"])), len(refused)


def _written(bench: Workbench, rows: Any, spec: InstructionSpec) -> dict[str, Any]:
    """{"rows": canonical rows of messages, "refused": [[file:row, reason], ...]}."""
    model, tokenizer, recipe = bench.model, bench.tokenizer, bench.recipe
    texts, hashes, batch = list(rows["text"]), list(rows["hash"]), recipe.evaluation.batch_tokens
    shown = most_alike(
        embeddings(model, tokenizer, texts, recipe.training.max_length, batch),
        embeddings(model, tokenizer, [e.text for e in spec.pool], recipe.training.max_length, batch),
        spec.shots,
    )
    prompts = [
        list(tokenizer.encode(render(tokenizer, shots([spec.pool[k] for k in chosen], text), True),
                              add_special_tokens=False))
        for text, chosen in zip(texts, shown, strict=True)
    ]  # fmt: skip
    draw = keyed(spec.temperature, recipe.seed, hashes) if spec.temperature else None
    answers = generate(model, tokenizer, prompts, batch_tokens=batch, max_new_tokens=spec.max_new_tokens, draw=draw)
    made: list[dict[str, Any]] = []
    refused: list[list[str]] = []
    seen = {_plain(example.instruction) for example in spec.pool}
    for row, answer in zip(rows, answers, strict=True):
        pair = read_pair(answer)
        reason = why_not(pair, spec, seen)
        if pair is None or reason:
            refused.append([row["row"], reason])
            continue
        seen.add(_plain(pair[0]))
        made.append(message_row(row, pair, show_text=spec.show_text))
    return {"rows": made, "refused": refused}


def shots(examples: Sequence[InstructionExample], text: str) -> list[dict[str, str]]:
    """The conversation that asks for an instruction: examples, least alike first, then the text."""
    turns: list[dict[str, str]] = []
    for example in reversed(examples):
        turns += [
            {"role": "user", "content": f"{TASK}\n\nText: {example.text}"},
            {"role": "assistant", "content": f"Instruction: {example.instruction}\nResponse: {example.response}"},
        ]
    return [*turns, {"role": "user", "content": f"{TASK}\n\nText: {text}"}]


def read_pair(answer: str) -> tuple[str, str] | None:
    """Instruction and response of what the model wrote, up to where it begins another; None where it has not the form.

    >>> read_pair("Instruction: Who lent it?\\nResponse: The bank.\\nInstruction: What")
    ('Who lent it?', 'The bank.')
    """
    found = _FORM.match(answer)
    if not found:
        return None
    response = _NEXT.split(found[2], maxsplit=1)[0].strip()
    return (" ".join(found[1].split()), response) if response else None


def why_not(pair: tuple[str, str] | None, spec: InstructionSpec, seen: set[str]) -> str:
    """Why a pair is not used; empty where it is. `seen` holds the instructions that there are already."""
    if pair is None:
        return "not in the form asked for"
    instruction, response = pair
    if len(instruction.split()) < spec.min_words:
        return "too short"
    if _plain(instruction) in seen or _plain(instruction) == _plain(response):
        return "copies"
    return ""


def message_row(row: Mapping[str, Any], pair: tuple[str, str], *, show_text: bool) -> dict[str, Any]:
    """A canonical row of messages in place of a row of text; whatever else the row has stays."""
    asked = f"{pair[0]}\n\n{row['text']}" if show_text else pair[0]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": pair[1]}]
    kept = {name: row[name] for name in ("label", "domain", "group", "row")}
    return {"messages": messages, "answers": [], "hash": content_hash({"messages": messages}), **kept}


@torch.no_grad()
def embeddings(
    model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_tokens: int
) -> NDArray[np.float64]:
    """The mean of each text's last hidden states [texts, width]."""
    ids = [list(tokenizer.encode(text, add_special_tokens=True))[:max_length] for text in texts]
    return mean_states(model, ids, batch_tokens)


def most_alike(texts: NDArray[np.float64], pool: NDArray[np.float64], count: int) -> list[list[int]]:
    """For each text the `count` examples of the pool with the highest cosine, both relative to the pool's mean, the
    most alike first (the earlier of equals)."""
    middle = pool.mean(axis=0)

    def units(points: NDArray[np.float64]) -> NDArray[np.float64]:
        moved = points - middle
        lengths: NDArray[np.float64] = np.linalg.norm(moved, axis=1, keepdims=True)
        unit: NDArray[np.float64] = moved / np.where(lengths > 0, lengths, 1.0)
        return unit

    likeness = units(texts) @ units(pool).T
    return [np.argsort(-row, kind="stable")[:count].tolist() for row in likeness]


def keyed(temperature: float, seed: int, hashes: Sequence[str]) -> Draw:
    """Draws of each row's tokens from a generator of its own, named by the row's content."""
    generators = [torch_generator(seed, "instructions", content) for content in hashes]

    def draw(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        shares = torch.softmax(logits.double() / temperature, dim=-1)
        drawn = [torch.multinomial(s, 1, generator=generators[row]) for s, row in zip(shares, rows, strict=True)]
        return torch.cat(drawn)

    return draw


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
