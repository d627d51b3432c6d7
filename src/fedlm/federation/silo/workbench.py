"""What all silos of one process share: one base model, one tokenizer, one adapter to fill in, encoded rows.

Simulating n silos holds one base model; what differs per silo (adapter values, optimiser, variates) is put on the
bench for one request and taken off again.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Parameter

from fedlm.federation.silo.first_values import FirstValues
from fedlm.federation.start import looks_back, parted
from fedlm.messages import Tensors
from fedlm.models.deltas import is_delta
from fedlm.recipe.capacity import Capacity
from fedlm.recipe.heads import outputs_of
from fedlm.recipe.schema import ModelSpec, Recipe
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.algorithms.base import Algorithm
    from fedlm.data.federated import FederatedData, SiloData
    from fedlm.federation.silo.pairs import PairTables
    from fedlm.federation.silo.rebuilt import Rebuilt
    from fedlm.guards import Chain
    from fedlm.training.encode import TokenSet
    from fedlm.training.footprint import Shape
    from fedlm.training.parallel import Team
    from fedlm.training.plan import Plan
    from fedlm.training.sharded import ShardedTeam
    from fedlm.training.tasks import Task

POOLED = "_pooled"
"""The silo that holds everything in one place; exists in simulation only. No real silo's name begins with '_'."""

TOKENS_HELD = 32_000_000
"""Encoded tokens that stay in memory (5 bytes each); the silos used longest ago are encoded again when needed."""

SETS_HELD = 4096
"""Sets of tokens that stay open; each mapped one takes a few of the mappings that a process may have."""


def set_threads(threads: int) -> None:
    """Fix torch's threads: part of what makes the same recipe give the same bits in every process."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError:
            # Torch allows this only before its first parallel work; it changes speed, not results.
            return


class Workbench:
    """The shared model and data of one process. Use one silo at a time: hold `lock` for a whole request."""

    def __init__(self, recipe: Recipe, data: FederatedData) -> None:
        self.recipe, self.data = recipe, data
        self.lock = threading.RLock()
        self._ready = False
        self._tokens: OrderedDict[str, TokenSet] = OrderedDict()
        self._plans: dict[str, Plan] = {}
        self._team: tuple[Team | None, Any] = (None, None)
        """Processes that share training; of what kind, how many and which model they are."""
        self.start: Tensors = {}
        """What the run starts from, and the reference of tasks that have one (see `fedlm.federation.start`): adapter
        values and frozen deltas; empty: the bare base."""
        self._loaded: Tensors = {}
        """What was put on the model last."""
        self.described: dict[str, NDArray[np.float64]] = {}
        """By silo, the base's mean states of its questions [rows, width], while it learns in context."""
        self.shown: dict[str, list[tuple[str, str]]] = {}
        """By silo, questions and answers of its rows as they may be shown in context."""
        self._aside: dict[tuple[str, str | None], tuple[Any, FirstValues]] = {}
        """Models in other types of weights than the one that stands here, for simulated silos that have those."""

    def load(self, spec: ModelSpec | None = None) -> None:
        """Load the base model and the tokenizer and attach the adapter, once.

        Args:
            spec: the model in the type of weights that a silo has; the recipe's by default.

        Raises:
            ModelError: the model cannot be loaded, or the adapter's targets match nothing.
            TrainingError: `training.max_length` is beyond the model's positions.
        """
        with self.lock:
            wanted = spec or self.recipe.model
            if self._ready:
                self._stand(wanted)
                return
            from fedlm.models.load import load_tokenizer

            # oneDNN keeps a compiled product for each of the last 1,024 shapes, and packed rows come in every length:
            # a gigabyte after some hundred steps. With 48 it is as fast. Read at the first product, so set before it.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
            set_threads(self.recipe.federation.threads)
            self.tokenizer: Any = load_tokenizer(self.recipe.model, needs_template=TASKS[self.recipe.task].template)
            self._attach(wanted)
            self._ready = True

    def _attach(self, spec: ModelSpec) -> None:
        from fedlm.models.adapters import attach, trainable
        from fedlm.models.load import load_base
        from fedlm.training.loop import check_length

        self.model: Any = attach(load_base(spec), self.recipe.adapter, self.recipe.seed, outputs_of(self.recipe))
        check_length(self.model, self.recipe.training.max_length)
        self._first = FirstValues(trainable(self.model), self.recipe.seed, self.model)
        self._weights = (spec.dtype, spec.quantise)

    @property
    def standing(self) -> ModelSpec:
        """The base model in the type of weights that stands here."""
        dtype, quantise = self._weights
        return self.recipe.model.model_copy(update={"dtype": dtype, "quantise": quantise})

    def _stand(self, spec: ModelSpec) -> None:
        """Let the model stand here in this type of weights. All types stay: their weights are mapped files."""
        wanted = (spec.dtype, spec.quantise)
        if wanted == self._weights:
            return
        self._aside[self._weights] = (self.model, self._first)
        if wanted in self._aside:
            (self.model, self._first), self._weights = self._aside.pop(wanted), wanted
        else:
            self._attach(spec)

    @cached_property
    def shape(self) -> Shape:
        """The sizes of the model and its adapter."""
        from fedlm.training.footprint import shape_of

        return shape_of(self.recipe)

    def plan(self, capacity: Capacity) -> Plan:
        """What a silo of this capacity does.

        Raises:
            RunError, ModelError: see `fedlm.training.plan.make_plan` and `shape_of`.
        """
        from fedlm.training.plan import make_plan

        key = capacity.model_dump_json()
        if key not in self._plans:
            limited = capacity.memory or capacity.layers or capacity.targets
            sized = limited and self.recipe.adapter.kind == "lora"
            self._plans[key] = make_plan(self.recipe, capacity, self.shape if sized else None)
        return self._plans[key]

    @cached_property
    def task(self) -> Task:
        from fedlm.training.tasks import get_task

        return get_task(self.recipe.task, self.recipe)

    @cached_property
    def algorithm(self) -> Algorithm:
        from fedlm.algorithms import get_algorithm

        return get_algorithm(self.recipe.federation.algorithm, self.recipe.adapter)

    @cached_property
    def pairs(self) -> PairTables:
        """The silos' words, while a tokenizer is trained."""
        from fedlm.federation.silo.pairs import PairTables

        return PairTables()

    @cached_property
    def chain(self) -> Chain | None:
        """What happens to an update before it leaves; None where it leaves as it is."""
        from fedlm.guards import get_chain

        return get_chain(self.recipe.guards)

    def choose(self, parameters: dict[str, Parameter], trains: Callable[[str], bool]) -> dict[str, Parameter]:
        """Of the adapter's parameters, train those that the algorithm and the round's rule train."""
        chosen = {name: p for name, p in parameters.items() if self.algorithm.trainable(name) and trains(name)}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        return chosen

    def take_over(self, other: Workbench) -> bool:
        """Take the model that stands on another run's bench, if it is what `load` would put here; bits are the same.

        Returns:
            Whether it was taken; then the other bench has none. Full weights are taken only for the same seed and
            algorithm: what one run has trained away cannot be put back.

        Raises:
            ModelError, TrainingError: as `load`, where this run asks more of the model.
        """
        from fedlm.models.adapters import adapter_parameters
        from fedlm.models.chat import require_template
        from fedlm.training.loop import check_length

        with self.lock, other.lock:
            ours, theirs = self.recipe, other.recipe
            same = (ours.model, ours.adapter, ours.federation.threads) == (
                theirs.model,
                theirs.adapter,
                theirs.federation.threads,
            )
            again = (ours.seed, ours.federation.algorithm) == (theirs.seed, theirs.federation.algorithm)
            usual = other._ready and other._weights == (theirs.model.dtype, theirs.model.quantise)
            same = same and outputs_of(ours) == outputs_of(theirs)
            if self._ready or not usual or not same or not (again or ours.adapter.kind != "full"):
                return False
            if TASKS[ours.task].template:
                require_template(other.tokenizer, where="model.chat_template")
            check_length(other.model, ours.training.max_length)
            self.tokenizer, self.model = other.tokenizer, other.model
            other._forget()
            self._first = FirstValues(adapter_parameters(self.model), ours.seed, self.model)
            self._weights = (ours.model.dtype, ours.model.quantise)
            self._ready = True
            return True

    def unload(self) -> None:
        """Give up the model and its memory; `load` puts it back."""
        with self.lock:
            self._forget()
        gc.collect()  # modules refer to one another in circles

    def _forget(self) -> None:
        for name in ("model", "tokenizer", "_first", "_rebuilt"):
            self.__dict__.pop(name, None)
        self._aside.clear()
        self._dismiss()
        self._ready = False

    def begin_from(self, message: Tensors) -> Tensors:
        """Take the run's start out of a message (see `fedlm.federation.start`): what is put on the bench from now on
        lies on its frozen deltas, and its values stand in for the shared first ones.

        Returns:
            The message's own tensors.
        """
        own, start = parted(message)
        if looks_back(self.recipe) and not _same(start, self.start):
            self._tokens.clear()  # rows may be chosen, or written, by the model that the run begins with
        self.start = start
        return own

    def put(self, tensors: Tensors, *, whole: bool = False) -> dict[str, Parameter]:
        """Load adapter values, at the rank they have, and deltas; what is left out gets the value that the run starts
        from.

        Args:
            whole: these are all deltas, and none of the start lies below.

        Full weights may come as a description (`fedlm.models.directions`).

        Returns:
            The adapter's parameters by name.

        Raises:
            ModelError: the tensors do not fit.
        """
        from fedlm.models.adapters import adapter_parameters, set_tensors
        from fedlm.models.directions import is_description

        if self.recipe.adapter.kind == "full" and is_description(tensors):
            self._rebuilt.put(tensors)
            return adapter_parameters(self.model)
        below = {n: t for n, t in self.start.items() if not (whole and is_delta(n))}
        values = tensors if self.recipe.adapter.kind == "full" else self._first.filled(tensors, below)
        set_tensors(self.model, values, self.recipe.adapter)
        self._loaded = tensors if not below else values
        return adapter_parameters(self.model)

    def team(self, processes: int, trained: Mapping[str, Parameter]) -> Team | None:
        """The processes that share training here, with the model as it was put on the bench; None for one. They are
        started when they are first asked for, and again where one has died.

        Args:
            trained: parameters whose values the team gets with every step.

        Raises:
            TrainingError: they cannot be started.
        """
        from fedlm.models.adapters import adapter_parameters
        from fedlm.training.parallel import Team

        if processes == 1:
            return None
        kind, (team, wanted) = self.recipe.adapter, self._team
        if team is None or team.closed or wanted != ("processes", processes, self.standing):
            self._dismiss()
            team = Team(self.standing, kind, self.recipe.seed, processes, self.recipe.federation.threads)
            self._team = (team, ("processes", processes, self.standing))
        values = adapter_parameters(self.model)
        if kind.kind == "full":
            team.load(self.take({name: p for name, p in values.items() if name not in trained}))
        else:
            team.load({name: t for name, t in self._loaded.items() if is_delta(name)} | self.take(values))
        return team

    def sharded(self, shards: int) -> ShardedTeam:
        """The processes that each hold a part of the weights while they train; started as `team` starts others.

        Raises:
            TrainingError: they cannot be started.
        """
        from fedlm.training.sharded import ShardedTeam

        team: Any = self._team[0]
        if team is None or team.closed or self._team[1] != ("shards", shards, self.standing):
            self._dismiss()
            threads = self.recipe.federation.threads
            team = ShardedTeam(self.standing, self.recipe.adapter, self.recipe.seed, shards, threads, self.model)
            self._team = (team, ("shards", shards, self.standing))
        return team  # type: ignore[no-any-return]

    def _dismiss(self) -> None:
        if self._team[0] is not None:
            self._team[0].close()
        self._team = (None, None)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model is the one that the run starts from; afterwards the adapter has its values again.

        Raises:
            ModelError: the full weights are trained, so the start is nowhere left.
        """
        from fedlm.models.adapters import adapter_parameters, base_only, set_tensors

        if not self.start:
            with base_only(self.model):
                yield
            return
        now = {**self._loaded, **self.take(adapter_parameters(self.model))}
        set_tensors(self.model, self._first.filled({}, self.start), self.recipe.adapter)
        try:
            yield
        finally:
            set_tensors(self.model, now, self.recipe.adapter)

    @cached_property
    def _rebuilt(self) -> Rebuilt:
        from fedlm.federation.silo.rebuilt import Rebuilt

        return Rebuilt(self.model, self.recipe)

    def take(self, parameters: dict[str, Parameter]) -> Tensors:
        """fp32 copies on the CPU of these parameters' values."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}

    def silo_data(self, name: str) -> SiloData:
        return self.data.pooled() if name == POOLED else self.data.silo(name)

    def holders(self, name: str) -> list[str]:
        """The silos whose rows these are."""
        return self.data.names if name == POOLED else [name]

    @cached_property
    def public(self) -> tuple[TokenSet, list[str]]:
        """The encoded public rows and, for each, the hash of its content (see `fedlm.federation.silo.augmented`)."""
        from fedlm.federation.silo.augmented import encoded_public

        return encoded_public(self)

    def training_tokens(self, name: str) -> TokenSet:
        """A silo's encoded training rows that a selection by scores keeps (see `fedlm.federation.silo.selected`).

        Raises:
            DataError: the silo has no rows, none keeps a target token, or none has a score that is asked for.
        """
        if name in self._tokens:
            self._tokens.move_to_end(name)
            return self._tokens[name]
        from fedlm.federation.silo.encoded import encoded

        tokens = encoded(self, name)
        self._tokens[name] = tokens
        while len(self._tokens) > 1 and (
            len(self._tokens) > SETS_HELD or sum(t.held for t in self._tokens.values()) > TOKENS_HELD
        ):
            self._tokens.popitem(last=False)
        return tokens


def _same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
