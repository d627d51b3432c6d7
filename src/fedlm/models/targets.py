"""Which modules of a model LoRA and IA3 change, as PEFT's configuration says it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from fedlm.errors import ModelError
from fedlm.recipe.schema import AdapterSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IA3_LLAMA_LIKE = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
_FEEDFORWARD_ENDS = {"down_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2", "c_proj"}
"""Last linear layers of feed-forward blocks, by the names that architectures give them; IA3 scales their input."""


def peft_config(model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """The PEFT configuration of a LoRA or IA3 spec, its targets checked against the model's modules."""
    from peft import IA3Config, LoraConfig

    linear = linear_modules(model)
    if spec.kind == "ia3":
        targets, feedforward = _ia3_targets(model, spec, linear)
        return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)
    if spec.targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for name in linear if not _is_output(model, name)})
        if not targets:
            raise ModelError("'all-linear' matches no module: the model has no linear layers", where="adapter.targets")
    else:
        targets = sorted(set(spec.targets))
        _check_targets(model, targets, linear)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha if spec.alpha % 1 else int(spec.alpha),
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=any(_is_conv1d(linear[n]) for n in linear if _matches(n, targets)),
    )


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer (GPT-2's Conv1D included) by its full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}


def _matches(name: str, targets: Iterable[str]) -> bool:
    """PEFT's rule: a target is a full name or its end after a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_output(model: PreTrainedModel, name: str) -> bool:
    output = model.get_output_embeddings()
    return output is not None and model.get_submodule(name) is output


def _check_targets(model: PreTrainedModel, targets: list[str], linear: dict[str, nn.Module]) -> None:
    kinds = sorted({n.rsplit(".", 1)[-1] for n in linear})
    for target in targets:
        matched = [name for name in linear if _matches(name, [target])]
        if not matched:
            raise ModelError(
                f"the target '{target}' matches no linear module of this model",
                where="adapter.targets",
                fix=f"linear modules here end in {', '.join(kinds)}; or write 'all-linear'",
            )
        others = [name for name, _ in model.named_modules() if name not in linear and _matches(name, [target])]
        if others:
            raise ModelError(
                f"the target '{target}' also matches '{others[0]}', no linear layer", where="adapter.targets"
            )
        for name in matched:
            if _is_output(model, name) and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
                raise ModelError(
                    f"the target '{target}' shares its weight with the embeddings; an adapter there cannot be merged",
                    where="adapter.targets",
                    fix="leave it out",
                )


def _ia3_targets(
    model: PreTrainedModel, spec: AdapterSpec, linear: dict[str, nn.Module]
) -> tuple[list[str], list[str]]:
    """Targets and, among them, the feed-forward layers whose input (not output) is scaled."""
    if spec.targets != "all-linear":
        targets = sorted(set(spec.targets))
        _check_targets(model, targets, linear)
        return targets, [t for t in targets if t.rsplit(".", 1)[-1] in _FEEDFORWARD_ENDS]
    ends = {name.rsplit(".", 1)[-1] for name in linear}
    if ends >= {*_IA3_LLAMA_LIKE[0], "up_proj"}:
        return _IA3_LLAMA_LIKE
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    if kind in TARGETS and kind in FEEDFORWARD:
        return list(TARGETS[kind]), list(FEEDFORWARD[kind])
    raise ModelError(
        f"there is no known choice of IA3 targets for the architecture '{kind}'",
        where="adapter.targets",
        fix="name them: the key and value projections and the last feed-forward layer, out of "
        + ", ".join(sorted(ends)),
    )
