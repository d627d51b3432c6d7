"""Updates that must never reach the sum: each is refused with the silo's and the tensor's name."""

from __future__ import annotations

import math

import pytest
import torch

from fedlm.errors import UpdateRefused
from fedlm.federation.updates import check_update, largest_weight
from fedlm.messages import Tensors
from fedlm.recipe.schema import Recipe

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def good(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_A": (4, 33), "q.lora_B": (33, 4), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def flat(tensors: Tensors) -> Tensors:
    """The same tensors as views of one buffer, as a safetensors file loads."""
    buffer = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    pieces = buffer.split([tensors[name].numel() for name in sorted(tensors)])
    return {name: p.view(tensors[name].shape) for name, p in zip(sorted(tensors), pieces, strict=True)}


EXPECTED = {name: tensor.shape for name, tensor in good().items()}


def check(tensors: Tensors, weight: float = 8.0, max_weight: float = 100.0) -> None:
    check_update("clinic-b", tensors, EXPECTED, weight, max_weight=max_weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [dict, flat])
def test_a_good_update_passes(dtype: torch.dtype, layout) -> None:
    check(layout(good(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [dict, flat])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, layout, value: float) -> None:
    """Flower passes NaN through to everybody's model."""
    for position in range(132):
        tensors = layout(good(dtype))
        tensors["q.lora_B"].view(-1)[position] = value
        with pytest.raises(UpdateRefused, match=r"clinic-b: 'q.lora_B' .* not finite"):
            check(tensors)


def test_large_finite_values_are_finite() -> None:
    tensors = good()
    tensors["q.lora_A"].fill_(1e30)
    check(tensors)


@pytest.mark.parametrize("dtype, value", [(torch.float32, 3e38), (torch.float64, 1e200), (torch.bfloat16, -3e38)])
def test_values_that_would_overflow_the_sum_are_refused(dtype: torch.dtype, value: float) -> None:
    tensors = good(dtype)
    tensors["q.lora_A"][1, 2] = value
    with pytest.raises(UpdateRefused, match=r"'q.lora_A' .* overflow"):
        check(tensors)


def change(**changes) -> Tensors:
    tensors = {name.replace("_at_", "."): value for name, value in changes.items()}
    return {name: value for name, value in (good() | tensors).items() if value is not None}


@pytest.mark.parametrize(
    "tensors, said",
    [
        (change(q_at_lora_A=None), r"lacks 'q.lora_A'"),
        ({}, r"lacks 'q.lora_A', 'q.lora_B', 'scale'"),
        (change(extra=torch.ones(1)), r"has 'extra', which nobody asked for"),
        (change(q_at_lora_A=torch.ones(33, 4)), r"'q.lora_A' has shape \[33, 4\] instead of \[4, 33\]"),
        (change(scale=torch.ones(1)), r"'scale' has shape \[1\] instead of \[\]"),
        (change(scale=torch.tensor(3)), r"'scale' is torch.int64"),
        (change(scale=torch.tensor(True)), r"'scale' is torch.bool"),
        (change(scale=torch.tensor(1j)), r"'scale' is torch.complex64"),
        (change(q_at_lora_A=torch.ones(4, 33).to_sparse()), r"'q.lora_A' is"),
    ],
)
def test_incomplete_or_misshapen_updates_are_refused(tensors: Tensors, said: str) -> None:
    with pytest.raises(UpdateRefused, match="clinic-b: .*" + said):
        check(tensors)


def test_names_that_a_silo_invents_are_cut_in_the_message() -> None:
    with pytest.raises(UpdateRefused) as refusal:
        check(good() | {f"{i}" + "x" * 10_000: torch.ones(1) for i in range(50)})
    assert len(str(refusal.value)) < 500 and "47 more" in str(refusal.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(UpdateRefused, match=r"clinic-b: .*not a positive number"):
        check(good(), weight)


def test_a_weight_above_what_the_silo_can_claim_is_refused() -> None:
    check(good(), 100.0)
    with pytest.raises(UpdateRefused, match=r"clinic-b: .*weight 101 is above 100"):
        check(good(), 101.0)


def recipe(*, task: str = "instruct", weights: str | None = None, name: str = "fedavg", **training) -> Recipe:
    columns = {"text": "text"} if task == "pretrain" else {"prompt": "q", "response": "a"}
    return Recipe.model_validate(
        {
            "name": "r",
            "task": task,
            "model": {"source": "folder"},
            "data": {"sources": [{"path": "x.jsonl", "columns": columns}], "partition": {"silos": 2}},
            "training": {"batch_size": 8, "max_length": 100, **training},
            "federation": {"algorithm": {"name": name, "weights": weights}},
        }
    )


@pytest.mark.parametrize(
    "made, rows, most",
    [
        (recipe(steps=5), 3, 3),
        (recipe(steps=5, weights="tokens"), 3, 300),
        (recipe(steps=5, weights="equal"), 3, 1),
        (recipe(steps=5, name="scaffold"), 3, 1),
        (recipe(epochs=2.0), 30, 30),
        (recipe(epochs=0.01), 30, 30),
        (recipe(epochs=2.0, weights="tokens"), 30, 3000),
    ],
)
def test_the_largest_weight_follows_from_recipe_and_data_card(made: Recipe, rows: int, most: float) -> None:
    assert largest_weight(made, rows) == most


def test_a_pretraining_row_may_be_many_sequences() -> None:
    assert largest_weight(recipe(task="pretrain", epochs=1.0), 1) > 100_000
    assert math.isfinite(largest_weight(recipe(task="pretrain", epochs=1.0, weights="tokens"), 1_000_000))
