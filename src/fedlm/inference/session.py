"""A conversation with a run's model or with a base model, and the way back from a run directory to its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fedlm.algorithms import get_algorithm
from fedlm.errors import ModelError, RunError
from fedlm.federation.rundir import RunDir
from fedlm.federation.start import held_start
from fedlm.inference.generate import Sampling, stream
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, base_only, completed, set_tensors
from fedlm.models.export import load_adapter
from fedlm.models.folders import local_path
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import ModelSpec, Recipe
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "recipe.yaml").is_file()


def run_recipe(path: Path) -> Recipe:
    """The recipe a run was resolved to; RunError when the folder is no run."""
    if not (path / "recipe.yaml").is_file():
        raise RunError("there is no run here (no recipe.yaml)", where=str(path), fix="give a run directory")
    return load_recipe(path / "recipe.yaml")


def run_tensors(path: Path, which: str | None = None) -> tuple[Tensors, str]:
    """A run's trained tensors, and where they come from.

    Args:
        path: the run directory.
        which: 'best' (by validation loss), 'last', or a round's number; None takes the run's `adapter/` folder, or
            the best round where there is none yet.

    Raises:
        RunError: no such checkpoint (those there are listed), none validated, or it is corrupt.
    """
    if which is None and (path / "adapter").is_dir():
        return load_adapter(path / "adapter", run_recipe(path).adapter), "adapter"
    run = RunDir.open(path, write=False)
    rounds = run.checkpoint_rounds()
    listed = ", ".join(map(str, rounds)) or "none yet"
    if which in (None, "best"):
        number = run.meta.get("best_round")
        if number is None or number < 0:
            raise RunError(
                "no round of this run was validated, so none is best", where=str(path), fix="use --round last"
            )
    elif which == "last":
        number = rounds[-1] if rounds else -1
    elif which is not None and which.isdecimal():
        number = int(which)
    else:
        raise RunError(f"'{which}' is not a round", fix="use --round best, --round last or a number")
    if number not in rounds:
        raise RunError(
            f"the run has no checkpoint of round {which if number < 0 else number}",
            where=str(path),
            fix=f"rounds with checkpoints: {listed}",
        )
    checkpoint = run.load_checkpoint(number)
    assert checkpoint is not None
    recipe = run_recipe(path)
    algorithm = get_algorithm(recipe.federation.algorithm, recipe.adapter)
    tensors = algorithm.exported(checkpoint.parameters, checkpoint.server_state)
    return completed(tensors, recipe, held_start(run, recipe)), f"round {number}"


@dataclass
class Chat:
    """One model, one tokenizer, and the messages so far.

    Without a chat template there are no messages: the model continues the text it is given.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    title: str
    adapted: bool
    history: list[dict[str, str]] = field(default_factory=list)
    use_base: bool = False

    @property
    def has_template(self) -> bool:
        return isinstance(self.tokenizer.chat_template, str)

    def reply(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Stream the answer; question and answer join the history once the answer is complete.

        Raises:
            ModelError: the text is empty, holds bytes that are no text, or leaves no room in the model's context.
        """
        if not text.strip():
            raise ModelError("the prompt is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of such bytes
            raise ModelError("the prompt holds bytes that are no text", fix="give it as UTF-8")
        asked = [*self.history, {"role": "user", "content": text}]
        pieces = []
        with base_only(self.model) if self.use_base else nullcontext():
            for piece in stream(self.model, self.tokenizer, asked if self.has_template else text, sampling):
                pieces.append(piece)
                yield piece
        if self.has_template:
            self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def toggle_base(self) -> bool:
        """Switch between the federated model and its base, with an empty history; whether it is the base now.

        Raises:
            ModelError: there is nothing to switch, or full weights were trained.
        """
        if not self.adapted:
            raise ModelError("this is the base model already: no run was given")
        with base_only(self.model):  # raises for full weights
            self.use_base = not self.use_base
        self.history = []
        return self.use_base


def open_chat(source: str, spec: ModelSpec | None = None, which: str | None = None) -> Chat:
    """A chat with the run in folder `source`, or with the base model that `spec` describes.

    Raises:
        RunError, ModelError, RecipeError: what cannot be loaded, and why.
    """
    path = local_path(source)
    if spec is None and is_run(path):
        recipe = run_recipe(path)
        if TASKS[recipe.task].head != "none":
            raise RunError(
                f"this run trained task '{recipe.task}', whose model writes no text",
                where=str(path),
                fix="export it with `fedlm export`, or chat with a run of another task",
            )
        tensors, name = run_tensors(path, which)
        model = attach(load_base(recipe.model), recipe.adapter, recipe.seed)
        set_tensors(model, tensors, recipe.adapter)
        model.eval()
        return Chat(model, load_tokenizer(recipe.model), f"{recipe.name} ({name})", adapted=True)
    spec = spec or ModelSpec.model_validate({"source": source})
    return Chat(load_base(spec), load_tokenizer(spec), source, adapted=False)
