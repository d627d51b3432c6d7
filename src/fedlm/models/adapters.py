"""What is trained and exchanged: adapters of every kind or the full weights, named and first valued alike everywhere.

LoRA (Hu et al., ICLR 2022) adds (alpha / rank) B A to a weight, LoRA-SB (alpha / rank) B R A (`fedlm.models.square`);
IA3 (Liu et al., NeurIPS 2022) scales keys, values and the feed-forward's inner activations. They come from PEFT, so
that anything that reads PEFT reads the result. Soft prompts: `fedlm.models.soft_prompts`; a predictor of preferences:
`fedlm.models.predictor`; heads beside all but these: `fedlm.models.heads`. Adapter parameters are fp32 whatever the
base's dtype.

A tensor's name is PEFT's name in a saved adapter without the leading 'base_model.model.', for instance
`model.layers.0.self_attn.q_proj.lora_A.weight`; with kind 'full' it is the model's own parameter name. Each first value
is drawn from a generator keyed by (seed, 'adapter', name), so it depends on no loading order, process or device.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.directions import add_terms, is_description
from fedlm.models.folders import quiet
from fedlm.models.heads import add_head, is_head, vocabulary
from fedlm.models.load import load_base, resolve, unloadable
from fedlm.models.predictor import PREDICTOR, PredictorModel
from fedlm.models.soft_prompts import OFF, SoftPromptModel, attach_prompt
from fedlm.models.square import insert_squares
from fedlm.models.targets import peft_config
from fedlm.randomness import key, torch_generator
from fedlm.recipe.heads import outputs_of
from fedlm.recipe.methods import FACTORS, PROMPTS
from fedlm.recipe.schema import AdapterSpec, Recipe

# PEFT reads a property that transformers renamed. For the whole process: `catch_warnings` does not hold across threads.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
PROMPT = "prompt_encoder."
"""What the names of a soft prompt's parameters begin with."""
_ADAPTER_PART = re.compile(r"\.(lora_A|lora_B|ia3_l)\.default(?=\.|$)")
_SQUARE_PART = re.compile(r"\.lora_B\.([BR])$")


def attach(model: PreTrainedModel, spec: AdapterSpec, seed: int, outputs: int = 0) -> nn.Module:
    """The model with trainable parameters as `spec` says, at their common first values.

    For 'lora', 'lora-sb' and 'ia3' the model is wrapped by PEFT and its outputs are still the base's (B = 0, scales =
    1). Soft prompts wrap it too, and change its outputs from the start; a predictor never does. For 'full' the model
    itself is returned with fp32 weights. Those that are mapped from a file in fp32 stay mapped: pages become the
    process's own when they are written to, and the file never changes.

    Args:
        outputs: of the head (`fedlm.models.heads`); 0 for none.

    Raises:
        ModelError: a target matches no linear module (those that exist are listed), is tied to the embeddings, IA3 has
            no default for the architecture, or the LoRA rank is above a layer's smaller side; see `attach_prompt`.
    """
    if spec.kind in PROMPTS:
        return attach_prompt(model, spec, seed)
    if spec.kind == "predictor":
        return _at_first(PredictorModel(model, spec), seed)
    if spec.kind == "full":
        unfrozen: nn.Module = _unfreeze(model)
        if outputs:
            add_head(unfrozen, outputs)
            for name in vocabulary(unfrozen):
                unfrozen.get_parameter(name).requires_grad_(False)
        return unfrozen
    from peft import get_peft_model

    config = peft_config(model, spec)
    # PEFT's own draws are overwritten below; the fork keeps them from moving anyone else's generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(key(seed, "adapter"))
        wrapped: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)
    if spec.kind in FACTORS:
        _check_rank(lora_layers(wrapped), spec.rank)
    if spec.kind == "lora-sb":
        insert_squares(lora_layers(wrapped))
    if outputs:
        add_head(wrapped, outputs)
    return _at_first(wrapped, seed)


@torch.no_grad()
def _at_first(model: nn.Module, seed: int) -> nn.Module:
    """The model with all that is trained in fp32, at its first values."""
    for name, parameter in trainable(model).items():
        parameter.data = parameter.data.to(torch.float32)
        if not parameter.is_meta:
            parameter.copy_(first_value(name, parameter.shape, seed))
    return model


def _check_rank(layers: dict[str, Any], rank: int) -> None:
    """Refuse a rank that says more than a dense matrix, and for which no factor can be orthonormal."""
    for name, layer in layers.items():
        if rank > min(layer.in_features, layer.out_features):
            raise ModelError(
                f"rank {rank} is above the size of {name}, {layer.in_features} x {layer.out_features}",
                where="adapter.rank",
                fix="choose a smaller rank, or other `adapter.targets`",
            )


def first_value(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """A parameter before training: A, and a predictor's matrices, uniform in +-1/sqrt(fan in) (as PEFT and torch:
    kaiming_uniform, a = sqrt 5), B and R 0, IA3 1, a head 0; of a predictor biases 0 and norms 1."""
    if ".lora_A." in name or (name.startswith(PREDICTOR) and len(shape) == 2):
        bound = 1.0 / math.sqrt(shape[1])
        generator = torch_generator(seed, "adapter", name)
        return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    if ".lora_B." in name or ".lora_R." in name or is_head(name) or name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.float32)
    return torch.ones(shape, dtype=torch.float32)


def _unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():  # each once, so ties stay ties
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained and exchanged, by stable name, in the model's order; tied ones once."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named[_stable(name)] = parameter
    return named


def _stable(name: str) -> str:
    """The name by which a parameter of the model is exchanged."""
    return _SQUARE_PART.sub(r".lora_\1.weight", _ADAPTER_PART.sub(r".\1", name.removeprefix(PREFIX)))


def get_tensors(model: nn.Module) -> Tensors:
    """fp32 copies on the CPU of all trainable parameters."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in trainable(model).items()
    }


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by the name that their parameters' names begin with."""
    from peft.tuners.lora.layer import LoraLayer

    return {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def set_tensors(model: nn.Module, tensors: Tensors, spec: AdapterSpec) -> None:
    """Write all parameters of the adapter, at the rank that the tensors have, and the deltas among them.

    LoRA layers whose factors arrive with another rank are resized, and scaled as `spec` scales that rank. Deltas that
    were there before are gone.

    Raises:
        ModelError: a name is missing or unknown, or a shape does not fit; no value is written then.
    """
    from fedlm.models.deltas import is_delta, put_deltas

    if isinstance(model, SoftPromptModel):
        model.off = OFF in tensors
        tensors = {name: tensor for name, tensor in tensors.items() if name != OFF}
    values = {name: tensor for name, tensor in tensors.items() if not is_delta(name)}
    layers = lora_layers(model) if spec.kind == "lora" else {}
    parameters = adapter_parameters(model)
    check_tensors({name: _fitting(p.shape, values.get(name), name) for name, p in parameters.items()}, values)
    ranks = {name: values[f"{name}.lora_A.weight"].shape[0] for name in layers}
    for name, rank in ranks.items():
        if rank < 1 or values[f"{name}.lora_B.weight"].shape[1] != rank:
            raise ModelError(f"lora_A has rank {rank}, lora_B {values[f'{name}.lora_B.weight'].shape[1]}", where=name)
    for name, layer in layers.items():
        _resize(layer, ranks[name], spec)
    if layers:
        weight: Any = next(iter(layers.values())).get_base_layer().weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        put_deltas(layers, {n: t for n, t in tensors.items() if is_delta(n)}, dtype)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(values[name])


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the adapter by stable name, whether it is trained now or not; without one, all that train."""
    named, adapted = {}, False
    for name, parameter in model.named_parameters():
        part = _ADAPTER_PART.search(name) is not None or name.startswith((PROMPT, PREDICTOR))
        adapted = adapted or part
        if part or is_head(_stable(name)):
            named[_stable(name)] = parameter
    return named if adapted else trainable(model)


def _fitting(shape: torch.Size, value: torch.Tensor | None, name: str) -> torch.Size:
    """The shape that a value must have: of LoRA factors the rank is the value's."""
    if value is None or value.ndim != 2:
        return shape
    if ".lora_A." in name:
        return torch.Size((value.shape[0], shape[1]))
    return torch.Size((shape[0], value.shape[1])) if ".lora_B." in name else shape


def _resize(layer: Any, rank: int, spec: AdapterSpec) -> None:
    """Give a LoRA layer factors of this rank, if it has another."""
    (adapter,) = layer.lora_A
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if len(a.weight) != rank:
        a.weight = nn.Parameter(a.weight.new_empty(rank, a.in_features), a.weight.requires_grad)
        b.weight = nn.Parameter(b.weight.new_empty(b.out_features, rank), b.weight.requires_grad)
        a.out_features = b.in_features = layer.r[adapter] = rank
        layer.scaling[adapter] = spec.scale(rank)


def check_tensors(shapes: dict[str, torch.Size], tensors: Tensors) -> None:
    """ModelError unless the tensors have exactly these names and shapes."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        parts = [f"{len(n)} {w}, e.g. {n[0]}" for n, w in ((missing, "missing"), (unknown, "unknown")) if n]
        raise ModelError("the tensors do not fit the adapter: " + "; ".join(parts))
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ModelError(f"tensor {name} has shape {list(tensors[name].shape)}, the model has {list(shape)}")


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes, bit for bit.

    Raises:
        ModelError: the full weights were trained, so the base is no longer in this model.
    """
    switch: Any = getattr(model, "disable_adapter", None)
    if switch is None:
        raise ModelError("this model has no adapter to switch off: its full weights were trained")
    with switch():
        yield


def skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's model with its adapter, without any memory for weights (on torch's meta device).

    Raises:
        ModelError: see `resolve` and `attach`; or transformers does not know the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = resolve(recipe.model)
    with torch.device("meta"):
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever transformers raises here is about this folder
            raise unloadable(error, recipe.model) from error
        model.requires_grad_(False)
        return attach(model, recipe.adapter, recipe.seed, outputs_of(recipe))


def completed(tensors: Tensors, recipe: Recipe, start: Tensors | None = None) -> Tensors:
    """All values of a model: with an adapter, these tensors and the first values of the parameters that a run neither
    trained nor exchanged; with full weights, these or those that they describe (see `fedlm.models.directions`).

    Args:
        start: what the run starts from (see `fedlm.federation.start`): first values that stand in for the drawn ones,
            and deltas that lie below.
    """
    if recipe.adapter.kind != "full":
        return {**initial_tensors(recipe), **(start or {}), **tensors}
    if not is_description(tensors):
        return tensors
    model = attach(load_base(recipe.model, device="cpu"), recipe.adapter, recipe.seed, outputs_of(recipe))
    weights = {name: parameter.detach() for name, parameter in trainable(model).items()}
    add_terms(weights, tensors, recipe.seed)
    return weights


def initial_tensors(recipe: Recipe) -> Tensors:
    """The first global model: what `get_tensors(attach(load_base(...)))` gives; adapters of layers need no weights for
    it."""
    if recipe.adapter.kind == "full" or recipe.adapter.kind in PROMPTS:
        base = load_base(recipe.model, device="cpu")
        return get_tensors(attach(base, recipe.adapter, recipe.seed, outputs_of(recipe)))
    return {
        name: first_value(name, parameter.shape, recipe.seed) for name, parameter in trainable(skeleton(recipe)).items()
    }


def base_tensors(recipe: Recipe) -> Tensors:
    """What a silo loads so that its model is the base: the first values, except for a prompt, which is left out."""
    return {OFF: torch.ones(1)} if recipe.adapter.kind in PROMPTS else initial_tensors(recipe)
