"""The search for a prompt that fits rows which stay at the silos: `fedlm prompt search`.

A round: every silo scores every candidate on training rows drawn for this round (the verb 'score'); the coordinator
adds the sums up over silos, keeps the best, measures those on validation rows, and edits them into new candidates
(`fedlm.federation.edits`). Kept candidates are scored again in the next round, on other rows, so that all that are
compared have been scored on the same rows by the same silos. At the end the prompt that is best on validation rows (it
may be none at all) is measured on test rows, beside no prompt and the recipe's first one.

This is an edit search with the silos' summed scores as its objective, and no published federated rule: FedTextGrad
(Chen et al., ICLR 2025) lets silos send prompts that were optimised on their text and summarises them, and DP-OPT (Hong
et al., ICLR 2024) has a model write prompts from private rows. Here no text leaves a silo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedlm.errors import RunError, UpdateRefused
from fedlm.evaluation.intervals import wilson
from fedlm.federation.asking import Asking
from fedlm.federation.disk import disk_errors
from fedlm.federation.edits import edited, model_paraphrase
from fedlm.federation.engines.choose import Choice
from fedlm.federation.frozen import frozen_run, write_rounds
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.scored import FLOOR, KINDS
from fedlm.federation.silo.text import pack_text
from fedlm.files import read_json, write_atomic, write_json
from fedlm.messages import Engine, Fields, Observe, Reply
from fedlm.randomness import numpy_generator
from fedlm.recipe.prompting import SearchSpec
from fedlm.recipe.schema import Recipe

STATE = "search.json"
"""What the search goes on from, in the run directory."""


@dataclass
class Score:
    """A prompt's sums over silos."""

    likelihood: float
    right: float
    rows: int
    kind: str
    """Of the rows: 'choice' or 'messages'."""

    def rank(self, by: str) -> tuple[float, float]:
        """Means by which prompts are ordered, more is better."""
        means = self.likelihood / self.rows, self.right / self.rows
        return means if by == "likelihood" else (means[1], means[0])

    def fields(self) -> Fields:
        """As it is written down: mean log-likelihood in nats and, with choices, accuracy and its 95 % interval."""
        said: Fields = {"likelihood": self.likelihood / self.rows, "rows": self.rows}
        if self.kind == "choice":
            low, high = wilson(round(self.right), self.rows)
            said |= {"accuracy": self.right / self.rows, "interval": [low, high]}
        return said


@dataclass
class _State:
    """Where a search is."""

    pool: list[str]
    round: int = 0
    deleted: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    validated: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By prompt, its score on validation rows."""
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What came out. `test` has the figures of 'none' (no prompt), 'first' (the recipe's first) and 'best'."""

    prompt: str
    run_dir: Path
    rounds: int
    validation: Fields
    test: dict[str, Fields]


def search_prompt(
    recipe: Recipe,
    *,
    base: Path = Path(),
    run_dir: Path | None = None,
    resume: bool = False,
    force: bool = False,
    silos: Sequence[str] | None = None,
    where: Choice | None = None,
    observe: Observe | None = None,
) -> Found:
    """Search, or go on with a search; the run directory has prompt.txt, rounds.jsonl and evaluation.json.

    Args:
        base: folder that relative paths of the recipe start from.
        run_dir: by default runs/<name>-<UTC time>.
        resume: go on with the run in `run_dir`.
        force: replace the run that `run_dir` holds.
        silos: names that take part; all by default.
        where: the engine.
        observe: receives {"kind": "prompt_round", "round", "rounds", "score"}: no text.

    Raises:
        RunError: the recipe has no `search`, fewer silos than the quorum answer, or the run's files are damaged.
        FedlmError: the model, the data or the network cannot be used.
    """
    _spec(recipe)
    with frozen_run(recipe, base, run_dir, resume, force, where or Choice(), silos, observe) as (directory, engine):
        return search(recipe, engine, directory, silos=silos, observe=observe)


def search(
    recipe: Recipe,
    engine: Engine,
    directory: RunDir,
    *,
    silos: Sequence[str] | None = None,
    observe: Observe | None = None,
) -> Found:
    """The same in a run directory that is open, over this engine."""
    spec, asking = _spec(recipe), Asking(engine, recipe, directory.run, silos)
    asking.greet()
    return _Search(recipe, spec, asking, directory, observe).run()


def _spec(recipe: Recipe) -> SearchSpec:
    if recipe.search is None:
        raise RunError(
            "this recipe searches no prompt", fix="give it a section `search` (see `fedlm init prompt-search`)"
        )
    return recipe.search


class _Search:
    def __init__(
        self, recipe: Recipe, spec: SearchSpec, asking: Asking, directory: RunDir, observe: Observe | None
    ) -> None:
        self._recipe, self._spec, self._asking, self._dir, self._observe = recipe, spec, asking, directory, observe
        self._file = directory.path / STATE
        self._paraphrase = model_paraphrase(recipe) if "paraphrase" in spec.operations else None

    def run(self) -> Found:
        state = self._load()
        write_rounds(self._dir, state.records)
        while state.round < self._recipe.federation.rounds and state.pool:
            self._round(state)
            with disk_errors(self._dir.path):
                write_json(self._file, vars(state))
            write_rounds(self._dir, state.records)
            self._dir.update_meta(rounds_done=state.round)
        return self._finish(state)

    def _load(self) -> _State:
        if not self._file.exists():
            first = list(dict.fromkeys(self._spec.candidates))
            return _State(pool=first, known=["", *first])
        try:
            return _State(**read_json(self._file))
        except (ValueError, TypeError):
            raise RunError(f"{STATE} is damaged", where=str(self._file), fix="start a new run") from None

    def _round(self, state: _State) -> None:
        began, spec, number = time.monotonic(), self._spec, state.round
        scores = self._scores(state.pool, "train", number)
        answered = sorted(set(self._asking.names) - self._asking.failures.keys())
        failed = dict(self._asking.failures)
        order = sorted(range(len(scores)), key=lambda i: (*(-x for x in scores[i].rank(spec.by)), i))
        kept = [state.pool[i] for i in order[: spec.keep]]
        fresh = [prompt for prompt in ["", *kept] if prompt not in state.validated]
        if fresh and self._held_out("validation"):
            for prompt, found in zip(fresh, self._scores(fresh, "validation", number), strict=True):
                state.validated[prompt] = vars(found)
        elif fresh:  # without validation rows the last round's best one is taken
            state.validated = {kept[0]: vars(scores[order[0]])}
        draw = numpy_generator(self._recipe.seed, "prompt edits", number)
        new: list[str] = []
        if number + 1 < self._recipe.federation.rounds:
            new = edited(
                kept, spec.edits, spec.operations, draw,
                deleted=state.deleted, known=set(state.known), paraphrase=self._paraphrase,
            )  # fmt: skip
        state.records.append(
            {
                "round": number,
                "candidates": [
                    {"prompt": state.pool[i], **scores[i].fields(), "kept": state.pool[i] in kept} for i in order
                ],
                "validation": {p: Score(**score).fields() for p, score in state.validated.items()},
                "silos": answered,
                "failures": failed,
                "seconds": time.monotonic() - began,
                **self._asking.spent(),
            }
        )
        state.known += new
        state.pool, state.round = [*kept, *new], number + 1
        if self._observe:
            best = scores[order[0]].fields()
            rounds = self._recipe.federation.rounds
            self._observe({"kind": "prompt_round", "round": number + 1, "rounds": rounds, "score": best})

    def _held_out(self, role: str) -> list[str]:
        """Silos that have rows of this role."""
        return [name for name in self._asking.names if self._asking.rows[name][role]]

    def _scores(self, prompts: Sequence[str], role: str, number: int) -> list[Score]:
        """Each prompt's sums over silos."""
        names, spec, most = self._held_out(role), self._spec, self._recipe.evaluation.max_examples

        def take(reply: Reply) -> tuple[torch.Tensor, torch.Tensor, str]:
            rows = self._asking.rows[reply.silo][role]
            limit = min(rows, spec.rows if role == "train" else most or rows)
            return *checked(reply, len(prompts), limit), str(reply.fields["kind"])

        found = self._asking.ask("score", number, pack_text(list(prompts)), {"role": role}, take, names)
        rows = sum(int(counts[0]) for _, counts, _ in found.values())
        kinds = sorted({kind for _, _, kind in found.values()})
        if len(kinds) > 1:
            raise RunError("some silos have conversations and some questions with choices: their scores do not add up")
        return [
            Score(
                math.fsum(float(sums[i, 0]) for sums, _, _ in found.values()),
                math.fsum(float(sums[i, 1]) for sums, _, _ in found.values()),
                rows,
                kinds[0],
            )
            for i in range(len(prompts))
        ]

    def _finish(self, state: _State) -> Found:
        ranked = {p: Score(**score) for p, score in state.validated.items()}
        order = list(ranked)
        best = max(order, key=lambda prompt: (*ranked[prompt].rank(self._spec.by), -order.index(prompt)))
        test: dict[str, Fields] = {}
        if self._held_out("test"):
            prompts = ["", self._spec.candidates[0], best]
            scores = self._scores(prompts, "test", -1)
            test = {name: s.fields() for name, s in zip(("none", "first", "best"), scores, strict=True)}
        found = Found(best, self._dir.path, state.round, ranked[best].fields(), test)
        with disk_errors(self._dir.path):
            write_atomic(self._dir.path / "prompt.txt", best.encode())
            whole = {"prompt": best, "validation": found.validation, "test": test, **self._asking.spent()}
            write_json(self._dir.path / "evaluation.json", whole)
        self._dir.update_meta(status="finished")
        return found


def checked(reply: Reply, prompts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A silo's sums [prompts, 2] and counts [prompts], within what `rows` rows can give.

    Raises:
        UpdateRefused: they are none.
    """
    sums, counts = reply.tensors.get("sums"), reply.tensors.get("counts")
    if sums is None or counts is None or len(reply.tensors) != 2:
        raise UpdateRefused("the reply has no sums and counts", where=reply.silo)
    if sums.dtype != torch.float64 or tuple(sums.shape) != (prompts, 2):
        raise UpdateRefused(f"the reply has no sums of {prompts} prompts", where=reply.silo)
    if counts.dtype != torch.int64 or tuple(counts.shape) != (prompts,) or not bool((counts == counts[0]).all()):
        raise UpdateRefused("the reply's prompts were not scored on the same rows", where=reply.silo)
    if reply.fields.get("kind") not in KINDS:
        raise UpdateRefused("the reply does not say which kind of rows was scored", where=reply.silo)
    scored = int(counts[0])
    if not 1 <= scored <= rows:
        raise UpdateRefused(f"the reply counts {scored} rows, not 1 to {rows}", where=reply.silo)
    low, right = sums[:, 0], sums[:, 1]
    if not bool(torch.isfinite(sums).all()) or bool((low > 0).any()) or bool((low < FLOOR * scored).any()):
        raise UpdateRefused("a log-likelihood of the reply is impossible", where=reply.silo)
    if bool((right < 0).any()) or bool((right > scored).any()):
        raise UpdateRefused("the reply has more right answers than rows", where=reply.silo)
    return sums, counts
