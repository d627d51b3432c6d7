"""A head on a causal model: one bias-free linear layer, `score` [outputs, d], on the last token's hidden state.

The model stays the causal model that it is, with its packing, fused layers and adapters; the head is trained and
exchanged beside the adapter as `score.weight`, in fp32. Name and place are those of transformers' sequence
classification models, and so is the token: the last one that is not padding.

The head starts at zero. Then the first loss is exactly that of knowing nothing (log n for n classes, log 2 for a pair
of answers) whatever the model, and no draw is needed. A linear layer under a softmax has no symmetry that zeros would
keep: its own gradient is not zero, and from the second step on the layers below it learn too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedlm.errors import ModelError

HEAD = "score.weight"
"""The name by which a head is exchanged and saved."""


def is_head(name: str) -> bool:
    """Whether the tensor of this name is a head.

    >>> is_head("score.weight"), is_head("model.layers.0.mlp.up_proj.lora_A.weight")
    (True, False)
    """
    return name == HEAD


def add_head(model: nn.Module, outputs: int) -> None:
    """Give a model, or the one in its PEFT wrapper, a trainable head of zeros.

    Raises:
        ModelError: transformers has no sequence classification model for this architecture.
    """
    inner = inside(model)
    classifier(inner.config.model_type)
    weight = inner.get_output_embeddings().weight
    score = nn.Linear(weight.shape[1], outputs, bias=False, device="meta")
    score.weight = nn.Parameter(torch.zeros(outputs, weight.shape[1], dtype=torch.float32, device=weight.device))
    inner.score = score


def head_of(model: nn.Module) -> nn.Linear:
    """The head of a model.

    Raises:
        ModelError: it has none.
    """
    score = getattr(inside(model), "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError("this model has no head: it was trained for another task")
    return score


def vocabulary(model: Any) -> list[str]:
    """Names of the parameters that make next-token logits and nothing else: with a head they are never read, trained
    or saved. Empty where they are the embeddings."""
    output = model.get_output_embeddings()
    if output.weight is model.get_input_embeddings().weight:
        return []
    (name,) = (name for name, module in model.named_modules() if module is output)
    return [f"{name}.{part}" for part, _ in output.named_parameters()]


def classifier(model_type: str) -> str:
    """The name of transformers' sequence classification class for an architecture such as 'llama'.

    Raises:
        ModelError: there is none, so nothing but fedlm could read the trained head.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    if model_type not in NAMES:
        raise ModelError(
            f"transformers has no sequence classification for the architecture '{model_type}', which a head needs",
            where="model.source",
            fix="use task 'instruct' with the metric 'choice', which needs no head",
        )
    return str(NAMES[model_type])


def head_config(outputs: int, labels: list[str], model_type: str, pad: int | None) -> dict[str, Any]:
    """What config.json of a whole model with a head says beside its base's."""
    names = labels or [f"LABEL_{i}" for i in range(outputs)]
    return {
        "architectures": [classifier(model_type)],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "pad_token_id": pad,
    }


def inside(model: nn.Module) -> Any:
    """The transformers model in a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model
