"""The policy at the start of the stage, and what it gives a silo's answers: computed once, kept beside its state.

A file `<state>/reference/<what>-<reference>-<sequences>.safetensors` holds what one list of sequences has under one
reference: their log-probabilities (`logps`), or their mean states (`states`), which are the base's own. The last parts
of its name are hashes, so another base, start, template or row makes another file.
Which reference a run has is written into `<state>/<run>/reference.json` at its first use. A run that is resumed with
another is an error: its loss would silently mean something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors
from fedlm.files import read_json, read_tensors, write_json, write_tensors
from fedlm.messages import Tensors

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench
    from fedlm.training.encode import TokenSet
    from fedlm.training.sequences import Encoded


class Reference:
    """One silo's use of the reference in one run. The model must stand on the bench.

    Args:
        folder: of the silo's private states.
        run: names the run.
    """

    def __init__(self, bench: Workbench, folder: Path, run: str) -> None:
        self._bench, self._folder, self._note = bench, folder, folder / run / "reference.json"

    def inside(self) -> AbstractContextManager[None]:
        """Inside, the model is the reference; afterwards it is what it was."""
        return self._bench.as_reference()

    def logps(self, sequences: Sequence[Encoded]) -> NDArray[np.float64]:
        """Log-probability of each sequence's targets under the reference, in nats, without dropout.

        Raises:
            RunError: this run began with another reference, or what was kept is damaged.
        """
        from fedlm.training.forward import sequence_nll

        bench = self._bench
        limit, packing = bench.recipe.evaluation.batch_tokens, bench.recipe.training.packing

        def ask() -> NDArray[Any]:
            with self.inside():
                return -sequence_nll(bench.model, sequences, limit, packing=packing)[0]

        return self._remembered("logps", sequences, ask)

    def states(self, sequences: Sequence[Encoded]) -> NDArray[np.float32]:
        """The mean of the base's last hidden states over each sequence [sequences, width]; adapters must not change it.

        Raises:
            RunError: as `logps`.
        """
        from fedlm.training.scores import mean_states

        bench = self._bench

        def ask() -> NDArray[Any]:
            ids = [sequence.ids.tolist() for sequence in sequences]
            return mean_states(bench.model, ids, bench.recipe.evaluation.batch_tokens).astype(np.float32)

        return self._remembered("states", sequences, ask)

    def _remembered(self, what: str, sequences: Sequence[Encoded], ask: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What is asked of these sequences, one row each, from the file that keeps it."""
        reference = reference_hash(self._bench)
        self._hold_to(reference)
        file = self._folder / "reference" / f"{what}-{reference[:16]}-{sequences_hash(sequences)[:32]}.safetensors"
        if file.exists():
            try:
                kept: NDArray[Any] = read_tensors(file)[what].numpy()
                if len(kept) != len(sequences):
                    raise ValueError("other sequences")
            except Exception as error:
                raise RunError(
                    "what the reference gives this silo's answers is damaged",
                    where=str(file),
                    fix="remove the file: it is computed again",
                ) from error
            return kept
        found = ask()
        with disk_errors(file, "silo's state"):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_tensors(file, {what: torch.from_numpy(found)})
            file.chmod(0o600)
        return found

    def beside(self, tokens: TokenSet) -> TokenSet:
        """Examples with what their task needs of each of their sequences: log-probabilities as facts, or states.

        Raises:
            RunError: see `logps`.
        """
        from fedlm.training.objective import sequences_of
        from fedlm.training.tasks.base import REFERENCE

        sequences = sequences_of(list(tokens))
        if self._bench.task.embeds:
            return replace(tokens, states=self.states(sequences))
        found = self.logps(sequences).astype(np.float32).reshape(len(tokens), tokens.width)
        added = {f"{REFERENCE}{i}": np.ascontiguousarray(found[:, i]) for i in range(tokens.width)}
        return replace(tokens, facts={**tokens.facts, **added})

    def _hold_to(self, reference: str) -> None:
        if not self._note.exists():
            with disk_errors(self._note, "silo's state"):
                self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_json(self._note, {"reference": reference})
            return
        if read_json(self._note).get("reference") != reference:
            raise RunError(
                "the base model or the adapter that this run began with has changed, and its loss compares with them",
                where=str(self._note.parent),
                fix="put the model back as it was, or start a new run",
            )


def reference_hash(bench: Workbench) -> str:
    """Hex SHA-256 of what the reference is: the base's weights and tokenizer, their type, and the start values."""
    from fedlm.models.fingerprint import fingerprint

    spec = bench.standing
    parts = [*sorted(fingerprint(spec).items()), ("quantise", str(spec.quantise)), ("start", _digest(bench.start))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _digest(tensors: Tensors) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        state.update(f"\x1f{name}\x1f{tuple(tensor.shape)}\x1f".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def sequences_hash(sequences: Sequence[Encoded]) -> str:
    """Hex SHA-256 of token ids and masks."""
    state = hashlib.sha256()
    for sequence in sequences:
        state.update(len(sequence).to_bytes(4, "little"))
        state.update(np.ascontiguousarray(sequence.ids, np.int32).data)
        state.update(np.packbits(sequence.loss).data)
    return state.hexdigest()
