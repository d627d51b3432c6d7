"""A federation's result in the formats of others: a PEFT adapter folder, or merged safetensors for any server.

Merging is done in fp32: a small dW added to bf16 weights is mostly rounded away (77 % of it at |dW|/|W| = 1e-3), so the
merged folder is fp32 unless another dtype is asked for, and then the loss is measured and reported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedlm.errors import ModelError
from fedlm.files import read_tensors, write_atomic, write_tensors
from fedlm.messages import Tensors
from fedlm.models.adapters import PREFIX, attach, check_tensors, lora_layers, set_tensors, skeleton, trainable
from fedlm.models.deltas import deltas_of, is_delta, joined, parted
from fedlm.models.folders import DTYPES, HELPERS, local_path, new_folder, open_weights, weight_files
from fedlm.models.heads import HEAD, head_config, vocabulary
from fedlm.models.load import load_base, load_tokenizer, resolve
from fedlm.models.soft_prompts import LAYER, SoftPromptModel, peft_prompt_config
from fedlm.models.square import folded, unfolded
from fedlm.recipe.heads import labels_of, outputs_of
from fedlm.recipe.methods import BESIDE, PROMPTS
from fedlm.recipe.schema import AdapterSpec, ModelSpec, Recipe

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENCODER_WEIGHTS = "prompt_encoder.safetensors"
"""Beside PEFT's file, which has the rows of a prompt alone: the parameters that make them."""
PREDICTOR_CONFIG = "predictor_config.json"
"""Beside a predictor's weights, which PEFT does not know: its sizes, and the model whose states it reads."""


def save_adapter(folder: Path, tensors: Tensors, recipe: Recipe) -> None:
    """Write a trained adapter as PEFT does, or for kind 'full' the whole model as a folder with its tokenizer; a
    predictor, which PEFT does not know, as its tensors by name.

    `PeftModel.from_pretrained(base, folder)` gives fedlm's own logits; where a head was trained, `base` must come from
    `AutoModelForSequenceClassification.from_pretrained(name, num_labels=...)`, with the tokenizer's padding token. The
    base is named by the recipe's source and never by a path of this machine. The folder is there as a whole or not at
    all; it must not exist yet, or be empty.

    Args:
        tensors: the adapter's parameters, and deltas, which become a part of it: its rank is larger then. LoRA-SB's
            become plain LoRA, a prompt that an encoder or a projection makes the rows that it comes to.

    Raises:
        ModelError: the tensors do not fit the recipe's adapter, or the folder holds something or cannot be written.
    """
    check_empty(folder)
    model = skeleton(recipe)
    values = {name: tensor for name, tensor in tensors.items() if not is_delta(name)}
    check_tensors({name: p.shape for name, p in trainable(model).items()}, values)
    if recipe.adapter.kind in PROMPTS:
        _save_prompt(folder, values, recipe)
        return
    if recipe.adapter.kind == "predictor":
        _save_predictor(folder, values, recipe)
        return
    tensors, adapter = joined(folded(tensors) if recipe.adapter.kind == "lora-sb" else tensors, recipe.adapter)
    with _written(folder) as temporary:
        if recipe.adapter.kind == "full":
            _carry(recipe, temporary, torch.float32)
            write_tensors(temporary / "model.safetensors", tensors, {"format": "pt"})
            return
        saved = {PREFIX + name: tensor.to(torch.float32) for name, tensor in tensors.items()}
        write_tensors(temporary / ADAPTER_WEIGHTS, saved, {"format": "pt"})
        config = _config_of(model.peft_config["default"], recipe)  # type: ignore[index]
        if adapter is not recipe.adapter:
            config |= {"r": adapter.rank, "lora_alpha": adapter.alpha}
        write_atomic(temporary / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _save_prompt(folder: Path, tensors: Tensors, recipe: Recipe) -> None:
    model = attach(load_base(recipe.model, device="cpu"), recipe.adapter, recipe.seed)
    assert isinstance(model, SoftPromptModel)
    set_tensors(model, tensors, recipe.adapter)
    rows = model.rows().detach().to(torch.float32).contiguous()
    with _written(folder) as temporary:
        write_tensors(temporary / ADAPTER_WEIGHTS, {"prompt_embeddings": rows}, {"format": "pt"})
        if recipe.adapter.kind in ("p-tuning", "prompt-projection"):
            write_tensors(temporary / ENCODER_WEIGHTS, tensors, {"format": "pt"})
        config = _config_of(peft_prompt_config(model), recipe)
        write_atomic(temporary / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _save_predictor(folder: Path, tensors: Tensors, recipe: Recipe) -> None:
    name, revision = base_name(recipe.model)
    config = recipe.adapter.model_dump(include={"kind", "width", "layers", "heads"})
    config |= {"base_model_name_or_path": name, "revision": revision, "task": recipe.task}
    with _written(folder) as temporary:
        write_tensors(temporary / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
        write_atomic(temporary / PREDICTOR_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def check_empty(folder: Path) -> None:
    """Raise ModelError when an export to this folder would overwrite something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError("the folder to export to is not empty", where=str(folder), fix="choose a new one")


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """`new_folder` with its parents; what fails in writing is a ModelError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the model cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            fix="choose a folder that can be written, on a disk with space",
        ) from error


def _config_of(peft: Any, recipe: Recipe) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it for inference, with sorted lists so that equal adapters are equal bytes."""
    config: dict[str, Any] = peft.to_dict()
    name, revision = base_name(recipe.model)
    config |= {"base_model_name_or_path": name, "revision": revision, "inference_mode": True}
    if outputs_of(recipe):
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD.removesuffix(".weight")]}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def base_name(spec: ModelSpec) -> tuple[str, str | None]:
    """What an adapter calls its base, and the commit: 'owner/name' for the hub, a bare name for an absolute path."""
    if spec.source.startswith("hub:"):
        return spec.source.removeprefix("hub:"), spec.revision
    path = local_path(spec.source)
    return (path.name if path.is_absolute() else spec.source), None


def load_adapter(folder: Path, spec: AdapterSpec) -> Tensors:
    """The tensors of a folder that `save_adapter` wrote, by fedlm's names.

    Args:
        spec: the recipe's adapter. What the folder's adapter has beyond its rank comes back as deltas.

    Raises:
        ModelError: there is no adapter, or it is corrupt.
    """
    for name in (ENCODER_WEIGHTS, ADAPTER_WEIGHTS, "model.safetensors"):
        if (folder / name).is_file():
            with open_weights(folder / name):
                tensors = {k.removeprefix(PREFIX): v for k, v in read_tensors(folder / name).items()}
            if spec.kind == "prefix":
                layers = json.loads((folder / "adapter_config.json").read_text())["num_layers"]
                columns = tensors["prompt_embeddings"].chunk(layers, 1)
                return {LAYER.format(layer): value.contiguous() for layer, value in enumerate(columns)}
            if "prompt_embeddings" in tensors:
                return {"prompt_encoder.embedding.weight": tensors["prompt_embeddings"]}
            if spec.kind == "lora-sb":
                return unfolded(tensors)
            return parted(tensors, spec.rank, spec.scale(spec.rank)) if spec.kind == "lora" else tensors
    raise ModelError(f"there is neither {ADAPTER_WEIGHTS} nor model.safetensors", where=str(folder))


def save_merged(folder: Path, tensors: Tensors, recipe: Recipe, dtype: str = "float32") -> float:
    """Write base + adapter as one plain model folder with tokenizer, chat template and generation config.

    Args:
        folder: must not exist yet, or be empty.
        tensors: the trained tensors, by fedlm's names.
        recipe: names the base and the adapter's shape.
        dtype: of the saved weights.

    Returns:
        The share of the trained change that rounding to `dtype` destroyed: |round(W + dW) - (W + dW)| / |dW| over all
        changed weights, 0.0 for fp32 (or when nothing changed).

    Raises:
        ModelError: the folder holds something, cannot be written, or the tensors do not fit; or what was trained is a
            prompt.
    """
    if recipe.adapter.kind in BESIDE:
        what = "a predictor" if recipe.adapter.kind == "predictor" else "a soft prompt"
        raise ModelError(f"{what} is no change of the weights, so it cannot be merged", fix="export the adapter")
    check_empty(folder)
    base = resolve(recipe.model)
    base_model = load_base(recipe.model, device="cpu").to(torch.float32)
    model = attach(base_model, recipe.adapter, recipe.seed, outputs_of(recipe))
    set_tensors(model, tensors, recipe.adapter)
    _merge_deltas(model, tensors)
    merged: nn.Module = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
    state = {name: p.detach() for name, p in merged.named_parameters()}  # tied weights once
    state |= {name: b for name, b in merged.named_buffers() if name in merged.state_dict()}
    if outputs_of(recipe):
        state = {name: tensor for name, tensor in state.items() if name not in vocabulary(base_model)}
    loss = rounding_loss(base, state, DTYPES[dtype])
    with _written(folder) as temporary:
        _carry(recipe, temporary, DTYPES[dtype])
        cast_state = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in state.items()}
        write_tensors(temporary / "model.safetensors", cast_state, {"format": "pt"})
    return loss


@torch.no_grad()
def _merge_deltas(model: nn.Module, tensors: Tensors) -> None:
    deltas = deltas_of(tensors)
    for name, layer in lora_layers(model).items():
        if name in deltas:
            weight, dense = layer.get_base_layer().weight, deltas[name].dense()
            weight.copy_(weight + (dense.t() if layer.fan_in_fan_out else dense))


def rounding_loss(base: Path, merged: Tensors, dtype: torch.dtype) -> float:
    """|round(W') - W'| / |W' - W| over the weights that changed, with W from the base's folder; see `save_merged`."""
    if dtype == torch.float32:
        return 0.0
    lost = changed = 0.0
    for file in weight_files(base):
        with open_weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118
                if name not in merged:
                    continue
                after = merged[name].to(torch.float32)
                change = float((after - weights.get_tensor(name).to(torch.float32)).double().square().sum())
                if change > 0:
                    changed += change
                    lost += float((after.to(dtype).to(torch.float32) - after).double().square().sum())
    return float((lost / changed) ** 0.5) if changed else 0.0


def _carry(recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    """Copy everything of the base but weights and their index; tokenizer and template are those that training used.

    With a head the model is one for sequence classification.
    """
    base = resolve(recipe.model)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in HELPERS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    tokenizer = load_tokenizer(recipe.model)
    if outputs_of(recipe):
        config |= head_config(outputs_of(recipe), labels_of(recipe), config["model_type"], tokenizer.pad_token_id)
    write_atomic(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    tokenizer.save_pretrained(folder)
