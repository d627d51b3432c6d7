"""The planner's arithmetic against the bytes that autograd really keeps, and the plans it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedlm.errors import RunError
from fedlm.models.adapters import adapter_parameters, attach
from fedlm.models.processor import without_bf16
from fedlm.recipe.capacity import Capacity, lesser
from fedlm.recipe.schema import AdapterSpec, Recipe, TrainingSpec
from fedlm.training.footprint import Linear, Shape, footprint, forward_tokens, numbers, shape_from
from fedlm.training.forward import batch_nll
from fedlm.training.loop import micro_batches, training_mode
from fedlm.training.plan import MARGIN, Plan, make_plan, predict
from fedlm.training.sequences import Encoded

BLOCKS = 6


def model(rank: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=BLOCKS,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    base = LlamaForCausalLM(config).to(dtype)
    base.requires_grad_(False)
    return attach(base, AdapterSpec(rank=rank), 0)


def kept_bytes(model: Any, spec: TrainingSpec) -> int:
    """What one forward pass of sequences as long as can be keeps for the backward pass, weights apart."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 512, spec.max_length).astype(np.int32) for _ in range(spec.batch_size)]
    examples = [Encoded(row, np.arange(len(row)) > 0) for row in rows]
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = next(iter(micro_batches(examples, spec)))
    with training_mode(model, spec), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll = batch_nll(model, part, spec)
    assert nll.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize(
    ("rank", "plan", "dtype", "changes"),
    [
        (4, Plan(), "float32", {}),
        (32, Plan(), "float32", {}),
        (8, Plan(), "bfloat16", {}),
        (8, Plan(first_layer=4), "float32", {}),
        (8, Plan(targets=("q_proj", "v_proj")), "float32", {}),
        (8, Plan(targets=("o_proj", "down_proj"), first_layer=2), "bfloat16", {}),
        (8, Plan(), "float32", {"max_length": 300, "batch_size": 4}),
        (8, Plan(micro_batch_size=3), "float32", {}),
    ],
)
def test_activations_are_counted_to_five_percent(rank: int, plan: Plan, dtype: str, changes: dict[str, int]) -> None:
    spec = plan.training(TrainingSpec(steps=1, **{"max_length": 64, "batch_size": 16, **changes}))
    there = model(rank, getattr(torch, dtype))
    for name, parameter in adapter_parameters(there).items():
        parameter.requires_grad_(plan.trains(name))
    found = kept_bytes(there, spec)
    predicted = footprint(shape_from(there), spec, dtype, rank, lambda linear: plan.trains(linear.name)).activations
    assert predicted == pytest.approx(found, rel=0.05)


def test_checkpointed_blocks_keep_their_input_alone() -> None:
    spec = TrainingSpec(steps=1, max_length=64, batch_size=16, gradient_checkpointing=True)
    there = model(8)
    tokens, hidden = forward_tokens(spec), 96 * 4
    everything = footprint(
        shape_from(there), spec.model_copy(update={"gradient_checkpointing": False}), "float32", 8, lambda _: True
    ).activations
    predicted = footprint(shape_from(there), spec, "float32", 8, lambda _: True).activations
    casts = 4 * numbers(shape_from(there), 8)
    one_block = (everything - casts + tokens * (hidden + 4)) / BLOCKS  # the lowest one's first norm keeps nothing
    assert predicted - one_block - casts == BLOCKS * tokens * hidden
    assert kept_bytes(there, spec) == pytest.approx((BLOCKS + 3) * tokens * hidden, rel=0.15)


# ------------------------------------------------------------------------------------------------ plans

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
SMOLLM2 = Shape(
    weights=134_515_008,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49_152,
    blocks=30,
    linears=tuple(Linear(f"model.layers.{i}.{kind}", *sides) for i in range(30) for kind, sides in KINDS.items()),
)


def recipe(algorithm: str = "flexlora", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "plan",
            "model": {"source": "smollm2-135m-instruct"},
            "adapter": {"rank": 16},
            "data": {"at_silos": True},
            "training": {"steps": 5, "batch_size": 16, "max_length": 128, **training},
            "federation": {"algorithm": {"name": algorithm}},
        }
    )


def test_numbers_of_an_adapter() -> None:
    """30 x 16 x (4 x 576 + ... ) as PEFT counts them for SmolLM2, rank 16, all linear layers."""
    assert numbers(SMOLLM2, 16) == 4_884_480


@pytest.mark.parametrize("algorithm", ["flexlora", "fedavg"])
def test_a_smaller_budget_never_trains_more_and_every_plan_fits(algorithm: str) -> None:
    asked, before = recipe(algorithm), 10**12
    for memory in range(5000, 1100, -50):
        try:
            plan = make_plan(asked, Capacity(memory=f"{memory}MB"), SMOLLM2)
        except RunError:
            assert memory < 1500
            break
        assert predict(asked, SMOLLM2, plan).total * (1 + MARGIN) <= memory * 10**6 + 1
        trained = numbers(SMOLLM2, plan.rank, lambda linear, plan=plan: plan.trains(linear.name))
        assert trained <= before
        before = trained
        if algorithm == "fedavg":
            assert plan.rank == 16
    else:
        raise AssertionError("even 1.1 GB was enough")


def test_what_costs_nothing_of_the_result_comes_first() -> None:
    """First smaller forward passes, then recomputation, and only then fewer trained numbers."""
    plans = [make_plan(recipe(), Capacity(memory=f"{m}MB"), SMOLLM2) for m in (4500, 2400, 1650, 1260)]
    assert plans[0] == Plan(rank=16)
    assert plans[1].rank == 16 and not plans[1].partial and plans[1].micro_batch_size in (4, 8)
    assert plans[2].rank == 16 and not plans[2].partial and plans[2].gradient_checkpointing
    assert plans[3].micro_batch_size == 1 and plans[3].gradient_checkpointing
    assert plans[3].partial or plans[3].rank < 16


def test_the_smallest_budget_is_said_and_works() -> None:
    for algorithm, rank in (("flexlora", 1), ("fedavg", 16)):
        with pytest.raises(RunError, match=r"too small for any rank: (\d+) MB is the least") as caught:
            make_plan(recipe(algorithm), Capacity(memory="600MB"), SMOLLM2)
        least = int(str(caught.value).split("any rank: ")[1].split(" MB")[0])
        assert make_plan(recipe(algorithm), Capacity(memory=f"{least}MB"), SMOLLM2).rank == rank
        with pytest.raises(RunError):
            make_plan(recipe(algorithm), Capacity(memory=f"{least - 1}MB"), SMOLLM2)
    assert "others can do with less: flexlora, flora, hetlora" in str(caught.value)


def test_what_is_said_outright_is_kept_under_a_budget() -> None:
    plan = make_plan(
        recipe(), Capacity(memory="1400MB", rank=4, layers=12, targets=["q_proj", "v_proj"], steps=3), SMOLLM2
    )
    assert plan.rank <= 4 and plan.first_layer >= 18 and plan.steps == 3
    assert set(plan.targets or ()) <= {"q_proj", "v_proj"}


def test_the_lesser_of_two_capacities_keeps_within_both() -> None:
    run = Capacity(memory="2GB", rank=8, targets=["q_proj", "k_proj"], seconds=9.0, dtype="float32")
    owner = Capacity(memory="1GiB", rank=16, targets=["k_proj", "v_proj"], steps=3, dtype="bfloat16")
    assert lesser(run, owner) == Capacity(
        memory="1GiB", rank=8, targets=["k_proj"], steps=3, seconds=9.0, dtype="bfloat16"
    )
    assert lesser(Capacity(), Capacity()) == Capacity()
    gpu = Capacity(quantise="4bit")
    assert lesser(gpu, owner).given == owner.given, "the owner's weights, not some of each"
    assert lesser(run, gpu).dtype is None and lesser(gpu, Capacity(rank=2)).quantise == "4bit"


def test_an_owner_s_limit_that_cannot_be_kept_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe("fedavg")
    squares = {"adapter": AdapterSpec(kind="lora-sb", rank=16)}
    for changes, limit in (
        ({"adapter": AdapterSpec(kind="ia3")}, {"memory": "2GB"}),
        ({"adapter": AdapterSpec(kind="ia3")}, {"layers": 1}),
        (squares, {"rank": 8}),
    ):
        with pytest.raises(RunError, match=f"only LoRA adapters can be limited in {next(iter(limit))}"):
            make_plan(asked.model_copy(update=changes), Capacity(**limit), None)
    assert make_plan(asked.model_copy(update=squares), Capacity(rank=16, steps=1), None) == Plan(steps=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RunError, match="planned for training on a CPU, and this model's device is 'cuda'"):
        make_plan(asked, Capacity(memory="4GB"), SMOLLM2)


def test_a_plan_adds_no_steps_to_an_epoch() -> None:
    spec = TrainingSpec(steps=None, epochs=1.0, batch_size=4)
    assert Plan(steps=3).training(spec, 10) == spec and Plan(steps=3).training(spec, 40).steps == 3


@pytest.mark.parametrize("field", ["rank", "steps", "seconds", "first_layer", "targets"])
def test_within_is_said_of_every_part(field: str) -> None:
    more: dict[str, Callable[[], Plan]] = {
        "rank": lambda: Plan(rank=5, first_layer=2, targets=("a",), steps=2, seconds=2.0),
        "first_layer": lambda: Plan(rank=4, first_layer=1, targets=("a",), steps=2, seconds=2.0),
        "targets": lambda: Plan(rank=4, first_layer=2, targets=("a", "b"), steps=2, seconds=2.0),
        "steps": lambda: Plan(rank=4, first_layer=2, targets=("a",), steps=None, seconds=2.0),
        "seconds": lambda: Plan(rank=4, first_layer=2, targets=("a",), steps=2, seconds=2.5),
    }
    own = Plan(rank=4, first_layer=2, targets=("a",), steps=2, seconds=2.0)
    assert own.within(own) and Plan(rank=1, first_layer=3, targets=("a",), steps=1, seconds=1.0).within(own)
    assert not more[field]().within(own)


@pytest.mark.slow
def test_predictions_are_within_fifteen_percent_of_what_processes_need(tmp_path: Path) -> None:
    """SmolLM2 in some ways to train it, a model so small that the program is all, and a plan that keeps its budget.
    Where bf16 is slow, in fp32 alone."""
    script = Path(__file__).parents[2] / "benchmarks" / "memory_plan.py"
    chosen = ["tiny", "float32", *([] if without_bf16() else ["checkpointing", "micro-batch-4", "budget-1.3GB"])]
    subprocess.run(
        [sys.executable, str(script), "--steps", "2", "--json", str(tmp_path / "rows.json"), "--only", *chosen],
        check=True,
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows) == chosen
    for name, row in rows.items():
        assert row["predicted"] == pytest.approx(row["measured"], rel=MARGIN), name
    assert "budget-1.3GB" not in rows or rows["budget-1.3GB"]["measured"] < 1.3e9
