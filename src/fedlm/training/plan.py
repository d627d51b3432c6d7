"""What a silo does in a round: as much of what the recipe asks as it can.

Where a silo's memory does not suffice for all of it, the plan gives up what costs least, in this order.

1. Nothing of the result: fewer examples per forward pass (gradients accumulate exactly) and gradient checkpointing
   (activations are computed twice). Both cost time alone; the fastest variant that fits is taken.
2. Trained numbers: a smaller LoRA rank where the algorithm can mix ranks, lower layers that stay as received, or only
   the attention's modules. Of all that fits, the plan that trains the most numbers is taken; of equal ones that with
   more layers. Frozen lower layers save most: nothing of them is kept for the backward pass, which ends above them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Fields
from fedlm.models.heads import is_head
from fedlm.recipe.capacity import Capacity, read_bytes, sharing_problems
from fedlm.recipe.methods import ALGORITHMS, FACTORS
from fedlm.recipe.schema import EvaluationSpec, ModelSpec, Recipe, TrainingSpec
from fedlm.training.batches import steps_per_round
from fedlm.training.footprint import Footprint, Shape, block_of, footprint, forward_tokens, numbers

MARGIN = 0.15
"""By how much a prediction may be wrong; a plan fits only with as much to spare."""

PASS_TOKENS = 70
"""A forward and backward pass costs about as much as these tokens, beside those in it (SmolLM2, bf16, one core)."""

RECOMPUTED = 0.38
"""Time that gradient checkpointing adds (there too)."""

MOST_TARGETS = 100


@dataclass(frozen=True)
class Plan:
    """One silo's part of every round. Defaults are the recipe's."""

    rank: int = 0
    """Of its LoRA factors; 0 without LoRA."""
    first_layer: int = 0
    """The lowest decoder layer that is trained."""
    targets: tuple[str, ...] | None = None
    """Modules that are trained; None for all of the adapter's."""
    steps: int | None = None
    """Most optimiser steps; None for the recipe's."""
    seconds: float | None = None
    """Time for the steps; None for no limit."""
    micro_batch_size: int | None = None
    gradient_checkpointing: bool | None = None
    dtype: str | None = None
    quantise: str | None = None
    processes: int | None = None
    """That share a step; None for one."""
    shards: int | None = None
    """Processes that each hold a part of full weights; None for whole weights."""

    def trains(self, name: str) -> bool:
        """Whether a tensor (or layer) of the adapter is trained; others stay as received. A head always is."""
        block = block_of(name)
        if block is not None and block < self.first_layer:
            return False
        return self.targets is None or is_head(name) or any(f".{target}." in f".{name}." for target in self.targets)

    @property
    def partial(self) -> bool:
        """Whether only a part of the adapter is trained."""
        return self.first_layer > 0 or self.targets is not None

    def training(self, spec: TrainingSpec, examples: int | None = None) -> TrainingSpec:
        """The recipe's training as this silo does it.

        Args:
            examples: sequences of the silo, which say how many steps an epoch has: the plan never adds any.
        """
        changes: dict[str, Any] = {}
        if self.steps is not None and (examples is None or self.steps < steps_per_round(spec, examples)):
            changes |= {"steps": self.steps, "epochs": None}
        if self.micro_batch_size is not None:
            changes["micro_batch_size"] = self.micro_batch_size
        if self.gradient_checkpointing is not None:
            changes["gradient_checkpointing"] = self.gradient_checkpointing
        return spec.model_copy(update=changes)

    def evaluation(self, spec: EvaluationSpec, training: TrainingSpec) -> EvaluationSpec:
        """The recipe's measuring as this silo does it: with no more tokens at once than in training."""
        if self.micro_batch_size is None:
            return spec
        tokens = min(spec.batch_tokens, forward_tokens(self.training(training)))
        return spec.model_copy(update={"batch_tokens": tokens})

    def recipe(self, recipe: Recipe, examples: int) -> Recipe:
        """The recipe with this silo's training and measuring; it has so many sequences."""
        training, evaluation = recipe.training, recipe.evaluation
        update = {"training": self.training(training, examples), "evaluation": self.evaluation(evaluation, training)}
        return recipe.model_copy(update=update)

    def model(self, spec: ModelSpec) -> ModelSpec:
        """The recipe's base model as this silo loads it."""
        changes = {"dtype": self.dtype, "quantise": self.quantise}
        return spec.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def fields(self) -> Fields:
        """As plain JSON: what is not the default."""
        plain = {"rank": self.rank, "first_layer": self.first_layer, "targets": self.targets and list(self.targets)}
        rest = ("steps", "seconds", "micro_batch_size", "gradient_checkpointing", "dtype", "quantise")
        plain |= {name: getattr(self, name) for name in (*rest, "processes", "shards")}
        return {name: value for name, value in plain.items() if value not in (0, None)}

    def words(self, shape: Shape) -> str:
        """For people, of a model of this shape."""
        said = [f"rank {self.rank}"] if self.rank else []
        if self.first_layer:
            said.append(f"the last {shape.blocks - self.first_layer} of {shape.blocks} layers")
        if self.targets is not None:
            said.append("only " + ", ".join(self.targets))
        if self.micro_batch_size is not None:
            said.append(f"{self.micro_batch_size} examples at once")
        if self.gradient_checkpointing:
            said.append("gradient checkpointing")
        if self.steps is not None:
            said.append(f"{self.steps} steps")
        if self.seconds is not None:
            said.append(f"what ends within {self.seconds:g} seconds")
        if self.processes is not None:
            said.append(f"{self.processes} processes")
        if self.shards is not None:
            said.append(f"{self.shards} shards")
        said += [kind for kind in (self.dtype, self.quantise) if kind is not None]
        return ", ".join(said)

    def within(self, other: Plan) -> bool:
        """Whether this asks for no more than `other`."""

        def limited(mine: float | None, theirs: float | None) -> bool:
            return theirs is None or (mine is not None and mine <= theirs)

        return (
            self.rank <= other.rank
            and self.first_layer >= other.first_layer
            and (other.targets is None or (self.targets is not None and {*self.targets} <= {*other.targets}))
            and limited(self.steps, other.steps)
            and limited(self.seconds, other.seconds)
        )


def whole(recipe: Recipe) -> Plan:
    """The plan of a silo that can do all that the recipe asks."""
    return Plan(rank=recipe.adapter.rank if recipe.adapter.kind == "lora" else 0)


def parse_plan(fields: Any, recipe: Recipe) -> Plan:
    """A plan as it came over the network: bounded and possible, so that nothing else need check it.

    Raises:
        UpdateRefused: it is no plan, or asks for more than the recipe or for what the algorithm cannot use.
    """
    asked = whole(recipe)
    if fields is None:
        return asked
    kinds: dict[str, type | tuple[type, ...]] = {
        "rank": int,
        "first_layer": int,
        "targets": list,
        "steps": int,
        "seconds": (int, float),
        "micro_batch_size": int,
        "gradient_checkpointing": bool,
        "dtype": str,
        "quantise": str,
        "processes": int,
        "shards": int,
    }
    if not isinstance(fields, dict) or not fields.keys() <= kinds.keys():
        raise UpdateRefused("the silo's plan is no such plan")
    for name, value in fields.items():
        fits = isinstance(value, kinds[name]) and isinstance(value, bool) == (kinds[name] is bool)
        if isinstance(value, list):
            fits = 0 < len(value) <= MOST_TARGETS and all(isinstance(t, str) and 0 < len(t) <= 200 for t in value)
        elif fits and not isinstance(value, str | bool):
            fits = 0 < value < 2**31
        elif isinstance(value, str):
            fits = value in ("float32", "bfloat16", "4bit")
        if not fits:
            raise UpdateRefused(f"the silo's plan says {name}: {str(value)[:40]}")
    targets = fields.get("targets")
    plan = Plan(**{**asked.fields(), **fields, "targets": None if targets is None else tuple(targets)})
    name, most = method_name(recipe), recipe.training.steps
    method = ALGORITHMS[name]
    if plan.rank > asked.rank or (plan.rank != asked.rank and not method.mixed_ranks):
        raise UpdateRefused(f"the silo's plan has rank {plan.rank}, the run {asked.rank}")
    if plan.partial and not method.partial:
        raise UpdateRefused(f"the silo's plan trains a part of the adapter, which '{name}' cannot use")
    if plan.steps is not None and plan.steps > (most or plan.steps):
        raise UpdateRefused(f"the silo's plan has {plan.steps} steps, the run {most}")
    if plan.steps is not None and plan.steps < method.min_steps:
        raise UpdateRefused(f"the silo's plan has {plan.steps} steps, and '{name}' needs at least {method.min_steps}")
    if method.same_steps and plan.steps not in (None, most):
        raise UpdateRefused(f"the silo's plan has {plan.steps} steps, and with '{name}' all silos take the same {most}")
    if plan.seconds is not None and (method.same_steps or method.zeroth_order):
        raise UpdateRefused(f"the silo's plan limits its time, and '{name}' takes all its steps")
    return plan


def method_name(recipe: Recipe) -> str:
    return recipe.federation.algorithm.name


def make_plan(recipe: Recipe, capacity: Capacity, shape: Shape | None) -> Plan:
    """What a silo of this capacity does.

    Args:
        shape: of the base model and the adapter; needed where the capacity limits memory or layers.

    Raises:
        RunError: the memory suffices for no plan (says the smallest that does), a layer or module is asked for that the
            model does not have, or a limit is set that cannot be kept here (memory on a GPU, less than all of an
            adapter other than LoRA).
    """
    _keepable(recipe, capacity)
    asked = whole(recipe)
    fixed = replace(
        asked,
        rank=min(asked.rank, capacity.rank or asked.rank),
        steps=capacity.steps and min(capacity.steps, recipe.training.steps or capacity.steps),
        seconds=capacity.seconds,
        dtype=capacity.dtype,
        quantise=capacity.quantise,
        processes=capacity.processes,
        shards=capacity.shards,
    )
    if capacity.layers is not None or capacity.targets is not None:
        assert shape is not None
        targets = None if capacity.targets is None else tuple(capacity.targets)
        fixed = _checked(replace(fixed, targets=targets), shape, capacity.layers)
    if capacity.memory is None:
        return fixed
    assert shape is not None
    return _fitting(recipe, shape, fixed, read_bytes(capacity.memory), text=capacity.memory)


def predict(recipe: Recipe, shape: Shape, plan: Plan) -> Footprint:
    """Predicted peak memory of a silo with this plan."""
    return footprint(
        shape,
        plan.training(recipe.training),
        plan.model(recipe.model).dtype,
        plan.rank,
        lambda linear: plan.trains(linear.name),
        dropout=recipe.adapter.dropout > 0,
    )


def _keepable(recipe: Recipe, capacity: Capacity) -> None:
    """RunError where a limit cannot be kept: the recipe's are judged as it is loaded, a silo owner's only here."""
    from fedlm.models.load import pick_device

    kind = recipe.adapter.kind
    limits: list[str] = [field for field in ("memory", "layers", "targets") if field in capacity.given]
    if kind in FACTORS and recipe.adapter.rank > (capacity.rank or recipe.adapter.rank):
        limits.append("rank")
    if kind != "lora" and limits:
        raise RunError(
            f"only LoRA adapters can be limited in {limits[0]}, and this run trains '{kind}'",
            where=f"capacity.{limits[0]}",
            fix="take the limit out for such runs",
        )
    for field, reason in sharing_problems(recipe, capacity):
        raise RunError(f"`{field}` {reason}", where=f"capacity.{field}", fix="take the limit out for such runs")
    if capacity.memory is not None and (device := pick_device(recipe.model.device).type) != "cpu":
        raise RunError(
            f"memory is planned for training on a CPU, and this model's device is '{device}'",
            where="capacity.memory",
            fix="give rank, layers or targets instead, or set model.device to 'cpu'",
        )


def _checked(plan: Plan, shape: Shape, layers: int | None) -> Plan:
    """The plan with its layers as a number from below."""
    if layers is not None:
        if layers > shape.blocks:
            raise RunError(f"{layers} layers are to be trained of a model that has {shape.blocks}", where="capacity")
        plan = replace(plan, first_layer=shape.blocks - layers)
    if not any(plan.trains(linear.name) for linear in shape.linears):
        kinds = ", ".join(sorted({linear.kind for linear in shape.linears}))
        raise RunError(
            f"nothing is left to train: the targets {', '.join(plan.targets or ())} are none of the adapter's",
            where="capacity",
            fix=f"the adapter has {kinds}",
        )
    return plan


def _fitting(recipe: Recipe, shape: Shape, fixed: Plan, budget: int, *, text: str) -> Plan:
    """The best plan within `fixed` whose predicted memory, with its margin, keeps within the budget."""
    variants = sorted(_exact(recipe.training), key=lambda plan: _cost(plan.training(recipe.training)))
    smallest: tuple[int, Plan] | None = None

    def need(plan: Plan) -> int:
        return round(predict(recipe, shape, plan).total * (1 + MARGIN))

    for plan in _reduced(recipe, shape, fixed):
        tried = [
            replace(plan, micro_batch_size=v.micro_batch_size, gradient_checkpointing=v.gradient_checkpointing)
            for v in variants
        ]
        least = need(tried[-1])  # the slowest keeps least
        if least <= budget:
            return next(plan for plan in tried if need(plan) <= budget)
        if smallest is None or least < smallest[0]:
            smallest = (least, tried[-1])
    assert smallest is not None
    least, plan = smallest
    mixing = (
        ""
        if ALGORITHMS[method_name(recipe)].mixed_ranks
        else (
            f"; '{method_name(recipe)}' needs equal ranks, others can do with less: "
            + ", ".join(sorted(name for name, m in ALGORITHMS.items() if m.mixed_ranks))
        )
    )
    tokens = forward_tokens(plan.training(recipe.training))
    raise RunError(
        f"a memory of {text} is too small for any rank: {-(-least // 10**6)} MB is the least that works here (rank "
        f"{plan.rank}, layers from {plan.first_layer} on, {tokens} tokens at once)",
        where="capacity.memory",
        fix=f"give more, lower training.max_length, or leave the silo out{mixing}",
    )


def _reduced(recipe: Recipe, shape: Shape, fixed: Plan) -> Iterator[Plan]:
    """Every plan within `fixed`, those that train the most numbers first."""
    method = ALGORITHMS[method_name(recipe)]
    ranks = [fixed.rank]
    while method.mixed_ranks and ranks[-1] > 1:
        ranks.append(ranks[-1] // 2)
    firsts = range(fixed.first_layer, shape.blocks) if method.partial else [fixed.first_layer]
    targets = [fixed.targets]
    attention = tuple(sorted({linear.kind for linear in shape.linears if "attn" in linear.name}))
    kinds = {linear.kind for linear in shape.linears if fixed.trains(linear.name)}
    if method.partial and {*attention} & kinds and kinds - {*attention}:
        targets.append(tuple(kind for kind in attention if kind in kinds))
    plans = [
        replace(fixed, rank=rank, first_layer=first, targets=chosen)
        for chosen in targets
        for first in firsts
        for rank in ranks
    ]
    return iter(sorted(plans, key=lambda plan: (-_trained(shape, plan), plan.first_layer)))


def _trained(shape: Shape, plan: Plan) -> int:
    return numbers(shape, plan.rank, lambda linear: plan.trains(linear.name))


def _exact(spec: TrainingSpec) -> Iterator[Plan]:
    """The ways to the same result: sizes of a forward pass, with and without gradient checkpointing."""
    sizes = [spec.micro_batch_size]
    size = forward_tokens(spec) // spec.max_length
    while size > 1:
        size //= 2
        sizes.append(size)
    for micro in sizes:
        yield Plan(micro_batch_size=micro)
        if not spec.gradient_checkpointing:
            yield Plan(micro_batch_size=micro, gradient_checkpointing=True)


def _cost(spec: TrainingSpec) -> float:
    """Time of a token, against one in an endless forward pass."""
    return 1 + PASS_TOKENS / forward_tokens(spec) + RECOMPUTED * spec.gradient_checkpointing
