"""Models from scratch: sizes by name, of the Llama architecture (Touvron et al., 2023), with tied embeddings.

`model.source: preset:NAME` is such a model with random weights; its vocabulary is that of `model.tokenizer`. The shapes
are ordinary ones: heads of 32 or 64, a feed-forward layer of about 8/3 of the width, grouped key and value heads
(Ainslie et al., EMNLP 2023) in the largest alone. A name says about how many parameters there are with a vocabulary
that suits the size; `Preset.parameters` counts them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlm.errors import nearest
from fedlm.recipe.data_checks import Path, Problem, changed, origin_problems

if TYPE_CHECKING:
    from fedlm.recipe.model import ModelSpec
    from fedlm.recipe.schema import Recipe

SCHEME = "preset:"

CONTEXT = 2048
"""Positions of every preset."""


@dataclass(frozen=True)
class Preset:
    """A Llama's sizes, without its vocabulary."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int

    def parameters(self, vocabulary: int) -> int:
        """How many, the embeddings (which are also the output layer) counted once."""
        keys = self.hidden // self.heads * self.key_value_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * keys
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + vocabulary * self.hidden


PRESETS: dict[str, Preset] = {
    "llama-1m": Preset(128, 4, 4, 4, 344),
    "llama-3m": Preset(192, 6, 6, 6, 512),
    "llama-10m": Preset(320, 8, 5, 5, 768),
    "llama-30m": Preset(512, 9, 8, 8, 1376),
    "llama-60m": Preset(640, 11, 10, 10, 1728),
    "llama-125m": Preset(768, 16, 12, 12, 2048),
    "llama-350m": Preset(1024, 24, 16, 16, 2752),
    "llama-1b": Preset(2048, 20, 32, 8, 5632),
}


def is_preset(source: str) -> bool:
    return source.startswith(SCHEME)


def model_problems(model: ModelSpec) -> Iterator[Problem]:
    """What a recipe's `model` may not say: of where it comes from, and of what belongs to presets alone."""
    here: Path = ("model",)
    if not is_preset(model.source):
        yield from origin_problems(model, "source", here)
        for field, why in (
            ("tokenizer", "has no effect: the model brings its own (only 'preset:' models need one)"),
            ("seed", "has no effect: only the weights of 'preset:' models are drawn"),
        ):
            if changed(model, field):
                yield (*here, field), why
        return
    name = model.source.removeprefix(SCHEME)
    if name not in PRESETS:
        yield (*here, "source"), f"unknown preset '{name}', {nearest(name, PRESETS)}"
    if model.tokenizer is None:
        yield (
            (*here, "tokenizer"),
            "a model from scratch has no tokenizer: name a folder that `fedlm tokenizer train` wrote, or the source of "
            "a model whose tokenizer is to be used",
        )
        return
    if is_preset(model.tokenizer):
        yield (*here, "tokenizer"), "a preset has no tokenizer of its own"
        return
    yield from origin_problems(model, "tokenizer", here)


def with_seed(recipe: Any) -> Any:
    """Raw data of a recipe with `seed` filled in at a preset's `model.seed`, where it is left open."""
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("source"), str):
        return recipe
    if not is_preset(model["source"]) or model.get("seed") is not None:
        return recipe
    return {**recipe, "model": {**model, "seed": recipe.get("seed", 0)}}


def reseeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed; a preset's weights follow, unless they have a seed of their own."""
    model = recipe.model
    if model.seed is not None and model.seed == recipe.seed:
        model = model.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"seed": seed, "model": model})
