"""A model from scratch: a preset's sizes, a tokenizer's vocabulary, and weights drawn from the run's seed.

Every weight is drawn from a generator keyed by (seed, 'preset', its name), so it depends on no order, process, number
of threads or library of kernels: each silo builds the same bits, and a fingerprint compares them before a run.

Matrices are normal with standard deviation 0.02; those that write to the residual stream (attention's and the
feed-forward's output) 0.02 / sqrt(2 layers), so that the stream's variance does not grow with depth (GPT-2: Radford et
al., 2019). Norms are 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlm.errors import ModelError, nearest
from fedlm.files import write_json
from fedlm.messages import Tensors
from fedlm.models.folders import DTYPES, HELPERS, build_once, file_hash, local_path, models_cache, write_weights
from fedlm.models.vocabulary import read_tokenizer
from fedlm.randomness import numpy_generator
from fedlm.recipe.presets import CONTEXT, PRESETS, SCHEME, Preset
from fedlm.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of how weights are drawn; part of the cached folder's name."""

DEVIATION = 0.02

RESIDUAL = (".o_proj.weight", ".down_proj.weight")

_NOT_TOKENIZER = ("config.json", "generation_config.json", "adapter_config.json")


def from_preset(spec: ModelSpec, resolve: Callable[[ModelSpec], Path]) -> Path:
    """The model folder of a preset, built once.

    Args:
        resolve: gives the folder of another model, for its tokenizer.

    Raises:
        ModelError: there is no such preset or tokenizer, or the cache cannot be written.
    """
    name, seed = spec.source.removeprefix(SCHEME), spec.seed or 0
    if name not in PRESETS:
        raise ModelError(f"unknown preset '{name}'; " + nearest(name, PRESETS), where="model.source")
    tokenizer, preset = _tokenizer_folder(spec, resolve), PRESETS[name]
    files = tokenizer_files(tokenizer)
    about = [VERSION, name, vars(preset), CONTEXT, seed, [[file.name, file_hash(file)] for file in files]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def build(folder: Path) -> None:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        config = config_of(preset, read_tokenizer(tokenizer, where="model.tokenizer"))
        dtype = DTYPES[spec.dtype]
        write_weights(folder / "model.safetensors", first_weights(config, seed, dtype), dtype)
        write_json(folder / "config.json", {**config.to_dict(), "dtype": spec.dtype})

    return build_once(models_cache() / f"{digest[:40]}-{spec.dtype}", build, what="the model")


def _tokenizer_folder(spec: ModelSpec, resolve: Callable[[ModelSpec], Path]) -> Path:
    """Where the tokenizer of a preset's spec lies.

    Raises:
        ModelError: nowhere.
    """
    source = spec.tokenizer
    if source is None:
        raise ModelError("a model from scratch has no tokenizer", where="model.tokenizer", fix="name one")
    folder = local_path(source)
    if folder.is_dir():
        return folder
    if "/" in source and not folder.is_file() and not source.startswith(("hub:", "pypi:", "npm:")):
        raise ModelError(
            f"there is no folder '{source}'",
            where="model.tokenizer",
            fix="write it with `fedlm tokenizer train`, or correct the path, which starts from the recipe's folder",
        )
    return resolve(spec.model_copy(update={"source": source, "tokenizer": None, "seed": None}))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make its tokenizer, by name; weights and other configuration may lie beside them.

    Raises:
        ModelError: there is no tokenizer.json.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"there is no tokenizer.json in '{folder}'",
            where="model.tokenizer",
            fix="name a folder that `fedlm tokenizer train` wrote, or the source of a model with a fast tokenizer",
        )
    found = [file for file in folder.iterdir() if file.is_file() and file.suffix in HELPERS]
    return sorted(f for f in found if f.name not in _NOT_TOKENIZER and not f.name.endswith(".index.json"))


def config_of(preset: Preset, tokenizer: PreTrainedTokenizerBase) -> Any:
    """transformers' configuration of a preset whose embeddings hold every token of this tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads,
        max_position_embeddings=CONTEXT,
        initializer_range=DEVIATION,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def first_weights(config: Any, seed: int, dtype: torch.dtype) -> Tensors:
    """Each parameter's first value, drawn in fp32; tied ones once.

    numpy draws them: torch's normal numbers come from kernels that differ between processors.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights: Tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            weights[name] = torch.ones(parameter.shape, dtype=dtype)
            continue
        deviation = DEVIATION / math.sqrt(2 * config.num_hidden_layers) if name.endswith(RESIDUAL) else DEVIATION
        drawn = numpy_generator(seed, "preset", name).standard_normal(tuple(parameter.shape), dtype="float32")
        weights[name] = torch.from_numpy(drawn).mul_(deviation).to(dtype)
    return weights
