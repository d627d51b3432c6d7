"""What all silos of one process share: one base model, one tokenizer, one adapter to fill in, encoded rows.

Simulating n silos holds one base model; what differs per silo (adapter values, optimiser, variates) is put on the
bench for one request and taken off again.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from fedlm.messages import Tensors
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.algorithms.base import Algorithm
    from fedlm.data.federated import FederatedData, SiloData
    from fedlm.training.encode import TokenSet

POOLED = "_pooled"
"""The silo that holds everything in one place; exists in simulation only. No real silo's name begins with '_'."""

TOKENS_HELD = 32_000_000
"""Encoded tokens that stay in memory (5 bytes each); the silos used longest ago are encoded again when needed."""


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

    def load(self) -> None:
        """Load the base model and the tokenizer and attach the adapter, once.

        Raises:
            ModelError: the model cannot be loaded, or the adapter's targets match nothing.
            TrainingError: `training.max_length` is beyond the model's positions.
        """
        with self.lock:
            if self._ready:
                return
            from fedlm.models.adapters import attach, trainable
            from fedlm.models.load import load_base, load_tokenizer
            from fedlm.training.loop import check_length

            # oneDNN keeps a compiled product for each of the last 1,024 shapes, and packed rows come in every length:
            # a gigabyte after some hundred steps. With 48 it is as fast. Read at the first product, so set before it.
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
            set_threads(self.recipe.federation.threads)
            self.tokenizer: Any = load_tokenizer(self.recipe.model, needs_template=self.recipe.task == "instruct")
            self.model: Any = attach(load_base(self.recipe.model), self.recipe.adapter, self.recipe.seed)
            check_length(self.model, self.recipe.training.max_length)
            self._adapter: dict[str, torch.nn.Parameter] = trainable(self.model)
            self._choose()
            self._ready = True

    def _choose(self) -> None:
        """Of the adapter's parameters, train those that the algorithm trains."""
        from fedlm.algorithms import get_algorithm

        self.algorithm: Algorithm = get_algorithm(self.recipe.federation.algorithm)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self._adapter.items():
            chosen = self.algorithm.trainable(name)
            parameter.requires_grad_(chosen)
            if chosen:
                self.parameters[name] = parameter

    def take_over(self, other: Workbench) -> bool:
        """Take the model that stands on another run's bench, if it is what `load` would put here; bits are the same.

        Returns:
            Whether it was taken; then the other bench has none. Full weights are taken only for the same seed and
            algorithm: what one run has trained away cannot be put back.

        Raises:
            ModelError, TrainingError: as `load`, where this run asks more of the model.
        """
        from fedlm.models.adapters import first_value
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
            if self._ready or not other._ready or not same or not (again or ours.adapter.kind != "full"):
                return False
            if ours.task == "instruct":
                require_template(other.tokenizer, where="model.chat_template")
            check_length(other.model, ours.training.max_length)
            self.tokenizer, self.model, self._adapter = other.tokenizer, other.model, other._adapter
            other._forget()
            if ours.adapter.kind != "full":
                with torch.no_grad():
                    for name, parameter in self._adapter.items():
                        parameter.copy_(first_value(name, parameter.shape, ours.seed))
            self._choose()
            self._ready = True
            return True

    def unload(self) -> None:
        """Give up the model and its memory; `load` puts it back."""
        with self.lock:
            self._forget()
        gc.collect()  # modules refer to one another in circles

    def _forget(self) -> None:
        for name in ("model", "tokenizer", "parameters", "_adapter"):
            self.__dict__.pop(name, None)
        self._ready = False

    def put(self, tensors: Tensors) -> None:
        """Fill the adapter with these values; parameters that the algorithm does not train keep their shared start."""
        from fedlm.models.adapters import set_tensors

        set_tensors(self.model, tensors)

    def take(self) -> Tensors:
        """The adapter's trained values, fp32 copies on the CPU."""
        from fedlm.models.adapters import get_tensors

        return get_tensors(self.model)

    def silo_data(self, name: str) -> SiloData:
        return self.data.pooled() if name == POOLED else self.data.silo(name)

    def training_tokens(self, name: str) -> TokenSet:
        """A silo's encoded training rows.

        Raises:
            DataError: the silo has no rows, or none keeps a target token.
        """
        if name in self._tokens:
            self._tokens.move_to_end(name)
            return self._tokens[name]
        from fedlm.training.encode import encode_all
        from fedlm.training.tasks import get_task

        task = get_task(self.recipe.task)
        tokens = encode_all(
            self.silo_data(name).train,
            task,
            self.tokenizer,
            self.recipe.training.max_length,
            skip=self.recipe.data.malformed == "skip",
        )
        self._tokens[name] = tokens
        while len(self._tokens) > 1 and sum(len(t.ids) for t in self._tokens.values()) > TOKENS_HELD:
            self._tokens.popitem(last=False)
        return tokens
