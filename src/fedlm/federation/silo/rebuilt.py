"""Weights that arrive as a description, built once for all silos of a process and kept in a file until the next one.

Never more than one copy of the weights is in memory: they are built where they are used, written to a file without a
name (gone with the process, however it ends), and read back in place for each silo after the one before moved them.
"""

from __future__ import annotations

import tempfile
from typing import IO, Any

import torch
from torch.nn import Parameter

from fedlm.errors import ModelError
from fedlm.federation.disk import disk_errors
from fedlm.messages import Tensors
from fedlm.models.adapters import trainable
from fedlm.models.directions import add_terms
from fedlm.models.folders import models_cache
from fedlm.models.load import resolve, restore
from fedlm.recipe.schema import Recipe


class Rebuilt:
    """Puts described weights into one model.

    Args:
        model: full fp32 weights, all of them trained; in whatever state.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._terms: torch.Tensor | None = None
        """Of the weights in the file; None while there is none."""
        self._file: IO[bytes] | None = None

    def put(self, description: Tensors) -> None:
        """Write the described weights into the model, from the base or from the weights in the file: same bits.

        Raises:
            ModelError: the base's folder does not hold the weights by their names, or the file cannot be read back.
            RunError: the cache's disk is full.
        """
        (terms,) = description.values()
        weights: dict[str, Parameter] = trainable(self._model)
        if not terms.count_nonzero():
            restore(self._model, resolve(self._recipe.model))
            return
        done = 0
        if self._terms is not None and torch.equal(terms[: len(self._terms)], self._terms):
            self._read(weights)
            done = len(self._terms)
        else:
            restore(self._model, resolve(self._recipe.model))
        if done < len(terms):
            add_terms(weights, description, self._recipe.seed, done)
            self._write(weights)
            self._terms = terms.clone()

    def _write(self, weights: dict[str, Parameter]) -> None:
        folder = models_cache()
        self._terms = None
        with disk_errors(folder, "rebuilt model"):
            folder.mkdir(parents=True, exist_ok=True)
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as this object is)
            self._file.seek(0)
            for weight in weights.values():
                self._file.write(weight.detach().cpu().numpy().data.cast("B"))
            self._file.flush()

    def _read(self, weights: dict[str, Parameter]) -> None:
        assert self._file is not None
        self._file.seek(0)
        for weight in weights.values():
            here = weight.detach().cpu()
            if self._file.readinto(here.numpy().data.cast("B")) != here.nbytes:  # type: ignore[attr-defined]
                raise ModelError("the rebuilt model cannot be read back", where=str(models_cache()))
            if weight.device.type != "cpu":
                weight.detach().copy_(here)
