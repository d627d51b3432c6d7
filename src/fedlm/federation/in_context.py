"""Federated learning in context: `fedlm prompt icl`, after Fed-ICL (Wang et al., ICML 2025, arXiv 2506.07440).

The coordinator holds questions with choices. Each round every silo answers all of them from rows of its own, shown
before each question (the verb 'answer'), and the coordinator fuses the answers. From the second round on silos also
see, before their own rows, other questions with the answers that were agreed on, and answer again. No parameters travel
and no row does: questions go down, log-probabilities of their choices come up.

The paper's principle is this iteration of answers between server and clients. Which examples stand before a question
(the nearest by the model's own states) and how agreed answers are used (as examples for other questions) are choices
made here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import DataError, RunError, UpdateRefused
from fedlm.evaluation.intervals import wilson
from fedlm.federation.asking import Asking
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.choose import Choice
from fedlm.federation.frozen import frozen_run, write_rounds
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.text import pack_text
from fedlm.files import read_json, write_json
from fedlm.messages import Engine, Fields, Observe, Reply
from fedlm.randomness import numpy_generator
from fedlm.recipe.prompting import MOST_CHOICES, MOST_QUERIES, QUERY_CHARACTERS, InContextSpec
from fedlm.recipe.schema import Recipe

STATE = "answers.json"
"""The rounds' answers, in the run directory: what a run goes on from, and what it is for."""

Logps = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """What came out. `accuracy`: of 'zero_shot', 'alone' (the silos' mean), 'silos' and 'fused' (the last round's)."""

    run_dir: Path
    questions: int
    rounds: int
    accuracy: Fields


def answer_questions(
    recipe: Recipe,
    *,
    base: Path = Path(),
    run_dir: Path | None = None,
    resume: bool = False,
    force: bool = False,
    silos: Sequence[str] | None = None,
    where: Choice | None = None,
    observe: Observe | None = None,
) -> Answered:
    """Answer the recipe's questions, or go on; the run directory has answers.json, rounds.jsonl and evaluation.json.

    Args: see `fedlm.federation.prompt_search.search_prompt`.

    Raises:
        RunError: the recipe has no `in_context`, fewer silos than the quorum answer, or the run's files are damaged.
        FedlmError: the model, the data or the network cannot be used.
    """
    _spec(recipe)
    queries = load_queries(recipe, base)
    with frozen_run(recipe, base, run_dir, resume, force, where or Choice(), silos, observe) as (directory, engine):
        return answer(recipe, queries, engine, directory, silos=silos, observe=observe)


def answer(
    recipe: Recipe,
    queries: list[dict[str, Any]],
    engine: Engine,
    directory: RunDir,
    *,
    silos: Sequence[str] | None = None,
    observe: Observe | None = None,
) -> Answered:
    """The same in a run directory that is open, over this engine."""
    spec, asking = _spec(recipe), Asking(engine, recipe, directory.run, silos)
    asking.greet()
    return _Answering(recipe, spec, queries, asking, directory, observe).run()


def _spec(recipe: Recipe) -> InContextSpec:
    if recipe.in_context is None:
        raise RunError(
            "this recipe asks no questions", fix="give it a section `in_context` (see `fedlm init in-context`)"
        )
    return recipe.in_context


def load_queries(recipe: Recipe, base: Path) -> list[dict[str, Any]]:
    """The coordinator's questions: {"question", "choices", "answer"}.

    Raises:
        DataError: they cannot be read, or are too many or too long.
    """
    from fedlm.data.cache import table_of
    from fedlm.data.sources import locate

    spec = _spec(recipe)
    rows = table_of(locate(spec.queries, base), recipe.data.malformed, None).dataset
    if spec.queries.max_rows is not None and spec.queries.max_rows < len(rows):
        chosen = numpy_generator(recipe.seed, "queries").permutation(len(rows))[: spec.queries.max_rows]
        rows = rows.select(np.sort(chosen))
    found = [{"question": r["question"], "choices": list(r["choices"]), "answer": int(r["answer"])} for r in rows]
    if len(found) > MOST_QUERIES:
        raise DataError(
            f"there are {len(found)} questions, and silos answer at most {MOST_QUERIES}",
            where="in_context.queries",
            fix="set max_rows",
        )
    for query in found:
        long = max(map(len, [query["question"], *query["choices"]])) > QUERY_CHARACTERS
        if long or len(query["choices"]) > MOST_CHOICES:
            raise DataError(
                f"a question has more than {MOST_CHOICES} choices, or a text above {QUERY_CHARACTERS} characters",
                where="in_context.queries",
            )
    return found


def fuse(by_silo: Mapping[str, Sequence[Logps]], how: str) -> tuple[list[int], list[Logps]]:
    """One answer to each question from the silos' log-probabilities [choices].

    Args:
        how: 'mean': the largest mean log-probability. 'vote': the choice that is the first one of most silos; of equal
            ones that with the larger mean. The first of equals.

    Returns:
        The answers, and the means, normalised again.
    """
    answers, fused = [], []
    names = sorted(by_silo)
    for question in range(len(by_silo[names[0]])):
        table = np.stack([by_silo[name][question] for name in names])
        mean: Logps = table.mean(axis=0)
        mean = mean - mean.max() - np.log(np.exp(mean - mean.max()).sum())
        if how == "vote":
            votes = np.bincount(table.argmax(axis=1), minlength=table.shape[1])
            answers.append(int(np.lexsort((-np.arange(len(votes)), mean, votes))[-1]))
        else:
            answers.append(int(mean.argmax()))
        fused.append(mean)
    return answers, fused


class _Answering:
    def __init__(
        self,
        recipe: Recipe,
        spec: InContextSpec,
        queries: list[dict[str, Any]],
        asking: Asking,
        directory: RunDir,
        observe: Observe | None,
    ) -> None:
        self._recipe, self._spec, self._queries = recipe, spec, queries
        self._asking, self._dir, self._observe = asking, directory, observe
        self._file = directory.path / STATE
        self._right = np.array([query["answer"] for query in queries])

    def run(self) -> Answered:
        state = self._load()
        write_rounds(self._dir, state["records"])
        while (number := len(state["rounds"])) < self._recipe.federation.rounds:
            self._round(state, number)
            with disk_errors(self._dir.path):
                write_json(self._file, state)
            write_rounds(self._dir, state["records"])
            self._dir.update_meta(rounds_done=number + 1)
        return self._finish(state)

    def _load(self) -> dict[str, Any]:
        if not self._file.exists():
            return {"zero_shot": None, "rounds": [], "records": []}
        try:
            state: dict[str, Any] = read_json(self._file)
            assert state.keys() == {"zero_shot", "rounds", "records"}
        except (ValueError, AssertionError, AttributeError):
            raise RunError(f"{STATE} is damaged", where=str(self._file), fix="start a new run") from None
        return state

    def _round(self, state: dict[str, Any], number: int) -> None:
        began = time.monotonic()
        if state["zero_shot"] is None:
            state["zero_shot"] = self._alone()
        agreed = state["rounds"][-1] if number and self._spec.peers else []
        by_silo = self._ask(number, agreed, {}, None)
        answers, _ = fuse(by_silo, self._spec.fusion)
        each = {name: [int(logps.argmax()) for logps in found] for name, found in by_silo.items()}
        record = {
            "round": number,
            "fused": self._figures(answers),
            "silos": {name: self._figures(found)["accuracy"] for name, found in each.items()},
            "changed": sum(a != b for a, b in zip(answers, state["rounds"][-1], strict=True)) if number else None,
            "failures": dict(self._asking.failures),
            "seconds": time.monotonic() - began,
            **self._asking.spent(),
        }
        state["rounds"].append(answers)
        state["records"].append(record)
        if self._observe:
            rounds, figures = self._recipe.federation.rounds, record["fused"]
            self._observe({"kind": "answers_round", "round": number + 1, "rounds": rounds, "score": figures})

    def _alone(self) -> list[int]:
        """What the model answers without any example: one silo says it, since all have the same model."""
        found = self._ask(0, [], {"alone": True}, self._asking.names[:1])
        return [int(logps.argmax()) for logps in next(iter(found.values()))]

    def _ask(
        self, number: int, agreed: Sequence[int], fields: Fields, names: Sequence[str] | None
    ) -> dict[str, list[Logps]]:
        asked = [[query["question"], query["choices"]] for query in self._queries]
        sizes = [len(query["choices"]) for query in self._queries]
        tensors = pack_text({"queries": asked, "answers": list(agreed)})
        return self._asking.ask("answer", number, tensors, fields, lambda reply: checked(reply, sizes), names)

    def _figures(self, answers: Sequence[int]) -> Fields:
        right = int((np.array(answers) == self._right).sum())
        low, high = wilson(right, len(self._right))
        return {"accuracy": right / len(self._right), "interval": [low, high]}

    def _finish(self, state: dict[str, Any]) -> Answered:
        first, last = state["records"][0], state["records"][-1]
        alone = list(first["silos"].values())
        accuracy: Fields = {
            "zero_shot": self._figures(state["zero_shot"]),
            "silos": first["silos"],
            "alone": sum(alone) / len(alone),
            "first": first["fused"],
            "fused": last["fused"],
        }
        with disk_errors(self._dir.path):
            whole = {"questions": len(self._queries), "rounds": len(state["rounds"]), "accuracy": accuracy}
            write_json(self._dir.path / "evaluation.json", whole)
        self._dir.update_meta(status="finished")
        return Answered(self._dir.path, len(self._queries), len(state["rounds"]), accuracy)


def checked(reply: Reply, sizes: Sequence[int]) -> list[Logps]:
    """A silo's log-probabilities of each question's choices.

    Args:
        sizes: choices of each question.

    Raises:
        UpdateRefused: they are none.
    """
    found = reply.tensors.get("logps")
    if found is None or len(reply.tensors) != 1 or found.dtype != torch.float32 or tuple(found.shape) != (sum(sizes),):
        raise UpdateRefused(f"the reply has no answers to {len(sizes)} questions", where=reply.silo)
    parts = np.split(found.double().numpy(), np.cumsum(sizes)[:-1])
    for part in parts:
        if not np.isfinite(part).all() or abs(float(np.exp(part).sum()) - 1.0) > 1e-3:
            raise UpdateRefused("an answer of the reply is no distribution over the choices", where=reply.silo)
    return parts
