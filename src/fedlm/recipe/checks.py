"""Combinations that a recipe may not ask for: each cannot be kept, or silently would have no effect.

Everything here is judged from the recipe alone, without network or data. Each problem names the field it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlm.recipe.augment import augment_problems
from fedlm.recipe.capacity import capacity_problems
from fedlm.recipe.data_checks import Path, Problem, all_sources, changed, data_problems, kind_of
from fedlm.recipe.guards import guard_problems
from fedlm.recipe.heads import head_problems
from fedlm.recipe.instructions import instruction_problems
from fedlm.recipe.methods import ALGORITHMS, FACTORS, PROMPTS
from fedlm.recipe.outer import outer_problems
from fedlm.recipe.preference import preference_problems
from fedlm.recipe.presets import model_problems
from fedlm.recipe.privacy import privacy_problems
from fedlm.recipe.prompting import prompting_problems
from fedlm.recipe.reinforce import reinforce_problems
from fedlm.recipe.robust import robust_problems
from fedlm.recipe.selection import selection_problems
from fedlm.recipe.start import start_problems
from fedlm.recipe.tasks import TASKS, WRITTEN

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedlm.recipe.schema import FederationSpec, Recipe


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every impossible combination in an otherwise well-formed recipe, as (path, reason)."""
    yield from _model(recipe)
    yield from start_problems(recipe)
    yield from data_problems(recipe.data)
    yield from _task(recipe)
    yield from preference_problems(recipe)
    yield from head_problems(recipe)
    yield from reinforce_problems(recipe)
    yield from _federation(recipe)
    yield from _method(recipe)
    yield from outer_problems(recipe)
    yield from robust_problems(recipe)
    yield from _asynchronous(recipe)
    yield from guard_problems(recipe)
    yield from capacity_problems(recipe)
    yield from instruction_problems(recipe)
    yield from selection_problems(recipe)
    yield from prompting_problems(recipe)
    yield from augment_problems(recipe)
    yield from privacy_problems(recipe)
    yield from _without_effect(recipe)


def _model(recipe: Recipe) -> Iterator[Problem]:
    yield from model_problems(recipe.model)
    if recipe.adapter.dora:
        yield (
            ("adapter", "dora"),
            "DoRA is not trained: it scales each column of W + s B A to a learnt magnitude, which is no function of "
            "B A, so the mean of the silos' changes cannot be rebuilt from their adapters",
        )
    if recipe.adapter.targets == []:
        yield ("adapter", "targets"), "names no module, so nothing would be trained"


def _task(recipe: Recipe) -> Iterator[Problem]:
    allowed = TASKS[recipe.task].kinds
    found = all_sources(recipe.data)
    making = recipe.data.instructions is not None and "messages" in allowed
    for path, source in found:
        kind = kind_of(source.columns)
        if making and kind is not None:
            if kind != "text":
                yield (*path, "columns"), f"instructions are made of text rows, and these are {kind} already"
        elif kind is not None and kind not in allowed:
            yield (
                (*path, "columns"),
                f"task '{recipe.task}' cannot learn from {kind} rows, it needs {' or '.join(allowed)}",
            )
    kinds = {"messages"} if making else {kind_of(source.columns) for _, source in found}
    for index, metric in enumerate(recipe.evaluation.metrics):
        here = ("evaluation", "metrics", index)
        if metric != "loss" and not TASKS[recipe.task].likelihood:
            yield here, f"'{metric}' is no figure of the task '{recipe.task}'"
            continue
        if recipe.data.at_silos or metric == "loss":
            continue
        if metric not in WRITTEN and "choice" not in kinds:
            yield here, f"metric '{metric}' needs sources mapped to question + choices + answer"
        if metric in WRITTEN and "messages" not in kinds:
            yield here, f"metric '{metric}' needs sources mapped to messages, or to prompt + response"


def _federation(recipe: Recipe) -> Iterator[Problem]:
    spec, data = recipe.federation, recipe.data
    silos = len(data.silos) or (data.partition.silos if data.partition else None)
    if silos is not None and isinstance(spec.sample, int) and spec.sample > silos:
        yield ("federation", "sample"), f"{spec.sample} silos per round cannot be drawn from {silos}"
    if spec.oversample > 0 and spec.sample == "all":
        yield ("federation", "oversample"), "has no effect with `sample: all`: there is nobody left to invite"
    held_out = data.split.validation > 0 or any(s.role == "validation" for _, s in all_sources(data))
    if spec.patience is not None and not held_out:
        yield ("federation", "patience"), "early stopping needs validation rows, and `data.split.validation` is 0"


def _without_effect(recipe: Recipe) -> Iterator[Problem]:
    """Settings that differ from their default although the chosen method never reads them."""
    training, adapter = recipe.training, recipe.adapter
    readers: list[tuple[BaseModel, Path, str, str, tuple[str, ...]]] = [
        (training, ("training",), "momentum", training.optimizer, ("sgd",)),
        (training, ("training",), "betas", training.optimizer, ("adamw",)),
        (adapter, ("adapter",), "rank", adapter.kind, FACTORS),
        (adapter, ("adapter",), "alpha", adapter.kind, FACTORS),
        (adapter, ("adapter",), "dropout", adapter.kind, FACTORS),
        (adapter, ("adapter",), "rslora", adapter.kind, FACTORS),
        (adapter, ("adapter",), "targets", adapter.kind, (*FACTORS, "ia3")),
        (adapter, ("adapter",), "virtual_tokens", adapter.kind, PROMPTS),
        (adapter, ("adapter",), "prompt_text", adapter.kind, ("prompt", "prefix", "prompt-projection")),
        (adapter, ("adapter",), "encoder", adapter.kind, ("p-tuning",)),
        (adapter, ("adapter",), "encoder_hidden", adapter.kind, ("p-tuning",)),
        (adapter, ("adapter",), "encoder_layers", adapter.encoder, ("lstm",)),
        (adapter, ("adapter",), "intrinsic_dim", adapter.kind, ("prompt-projection",)),
        (adapter, ("adapter",), "width", adapter.kind, ("predictor",)),
        (adapter, ("adapter",), "layers", adapter.kind, ("predictor",)),
        (adapter, ("adapter",), "heads", adapter.kind, ("predictor",)),
        (training, ("training",), "final_lr", training.schedule, ("linear", "cosine")),
    ]
    for spec, path, field, chosen, by in readers:
        if chosen not in by and changed(spec, field):
            yield (*path, field), f"has no effect with '{chosen}' (it belongs to {', '.join(by)})"
    yield from _options(recipe)
    writing = {"generation", *WRITTEN}
    if not writing & set(recipe.evaluation.metrics) and changed(recipe.evaluation, "max_new_tokens"):
        yield ("evaluation", "max_new_tokens"), f"has no effect without one of the metrics {', '.join(sorted(writing))}"


def _options(recipe: Recipe) -> Iterator[Problem]:
    """Options that belong to another algorithm."""
    algorithm = recipe.federation.algorithm
    for field in [f for f in type(algorithm).model_fields if f not in ("name", "weights", "server_lr")]:
        if field not in ALGORITHMS[algorithm.name].options and changed(algorithm, field):
            owners = sorted(name for name, method in ALGORITHMS.items() if field in method.options)
            yield (
                ("federation", "algorithm", field),
                f"has no effect with '{algorithm.name}' (it belongs to {', '.join(owners)})",
            )


def _method(recipe: Recipe) -> Iterator[Problem]:
    """What the algorithm's facts rule out."""
    name, method = recipe.federation.algorithm.name, ALGORITHMS[recipe.federation.algorithm.name]
    if recipe.adapter.kind not in method.adapters:
        able = sorted(n for n, m in ALGORITHMS.items() if recipe.adapter.kind in m.adapters)
        yield (
            ("adapter", "kind"),
            f"'{name}' trains {' or '.join(method.adapters)}, not '{recipe.adapter.kind}' (that can {', '.join(able)})",
        )
    if recipe.federation.rounds < method.min_rounds:
        yield ("federation", "rounds"), f"'{name}' needs at least {method.min_rounds} rounds"
    if not method.server_rate and recipe.federation.algorithm.server_lr is not None:
        yield ("federation", "algorithm", "server_lr"), f"has no effect with '{name}': its server step has no rate"
    if recipe.training.steps is not None and recipe.training.steps < method.min_steps:
        yield ("training", "steps"), f"'{name}' needs at least {method.min_steps} steps a round"
    part = recipe.federation.algorithm.personal_part
    if name == "fedrep" and recipe.adapter.kind != "lora" and isinstance(part, str):
        yield (
            ("federation", "algorithm", "personal_part"),
            f"a '{recipe.adapter.kind}' adapter has no {part}: give a number of blocks",
        )
    for field in method.without:
        if changed(recipe.training, field):
            yield ("training", field), f"has no effect with '{name}'"
    if method.zeroth_order and changed(recipe.adapter, "dropout"):
        yield ("adapter", "dropout"), f"has no effect with '{name}', which measures losses without dropout"
    if method.zeroth_order and recipe.adapter.kind == "full" and recipe.model.dtype != "float32":
        yield (
            ("model", "dtype"),
            f"'{name}' measures small differences of losses with one fp32 copy of the weights: set it to float32",
        )
    if method.same_steps and recipe.training.steps is None:
        yield ("training", "epochs"), f"with '{name}' all silos take the same number of steps: give `steps`"
    algorithm = recipe.federation.algorithm
    warm = algorithm.clusters * algorithm.warm_rounds
    if name == "fedbiscuit" and recipe.federation.rounds <= warm:
        yield (
            ("federation", "rounds"),
            f"the warm-up of {algorithm.clusters} models takes {warm} rounds, and grouped training begins after it",
        )
    if name == "ferret" and algorithm.seeds % algorithm.per_block:
        yield (
            ("federation", "algorithm", "per_block"),
            f"must divide `seeds`: {algorithm.seeds} bases do not fill blocks of {algorithm.per_block}",
        )


def _asynchronous(recipe: Recipe) -> Iterator[Problem]:
    """What only an asynchronous federation has, and what it cannot have."""
    spec, here, algorithm = recipe.federation, ("federation",), recipe.federation.algorithm
    if not ALGORITHMS[algorithm.name].asynchronous:
        able = ", ".join(sorted(name for name, method in ALGORITHMS.items() if method.asynchronous))
        timed = any(capacity.seconds is not None for capacity in spec.capacity.all)
        for field in ("concurrency", *(() if timed else ("speeds",))):
            if changed(spec, field):
                yield (
                    (*here, field),
                    f"has no effect with '{algorithm.name}' (it belongs to {able})",
                )
        if timed and spec.speeds.kind == "recorded":
            yield (*here, "speeds", "kind"), f"there is no order of answers with '{algorithm.name}' (only with {able})"
        elif timed:
            yield from _speeds(recipe)
        return
    for field in ("sample", "oversample"):
        if changed(spec, field):
            yield (*here, field), f"has no effect with '{algorithm.name}': say in `concurrency` how many work at once"
    if recipe.training.keep_optimizer:
        yield (
            ("training", "keep_optimizer"),
            f"not with '{algorithm.name}': a silo begins anew before it is known which of its trainings count",
        )
    if recipe.training.spike_guard is not None:
        yield (
            ("training", "spike_guard"),
            f"not with '{algorithm.name}': a silo keeps nothing between trainings, so it does not know its usual loss",
        )
    if recipe.training.order == "stream":
        yield (
            ("training", "order"),
            f"'stream' not with '{algorithm.name}': a silo may train from one model several times, so that the round "
            "does not say where it is in its text",
        )
    if algorithm.name == "fedasync" and algorithm.server_lr is not None and algorithm.server_lr > 1:
        yield (*here, "algorithm", "server_lr"), "alpha mixes two models, so it is at most 1"
    if algorithm.staleness == "constant" and algorithm.staleness_a is not None:
        yield (*here, "algorithm", "staleness_a"), "has no effect with `staleness: constant`"
    if algorithm.staleness != "hinge" and changed(algorithm, "staleness_b"):
        yield (*here, "algorithm", "staleness_b"), "has no effect without `staleness: hinge`"
    silos = len(recipe.data.silos) or (recipe.data.partition.silos if recipe.data.partition else None)
    if isinstance(spec.concurrency, int) and silos is not None and spec.concurrency > silos:
        yield (*here, "concurrency"), f"{spec.concurrency} silos cannot work at once where there are {silos}"
    elif silos is not None and (problem := too_stale(spec, silos)):
        yield (*here, "algorithm", "max_staleness"), problem
    yield from _speeds(recipe)


def _speeds(recipe: Recipe) -> Iterator[Problem]:
    """What a simulation's clock does not read."""
    here, speeds = ("federation",), recipe.federation.speeds
    for kind, field in {"lognormal": "sigma", "pareto": "shape", "recorded": "log"}.items():
        if speeds.kind != kind and changed(speeds, field):
            yield (*here, "speeds", field), f"has no effect with '{speeds.kind}' (it belongs to {kind})"
    if speeds.kind == "recorded":
        if speeds.log is None:
            yield (*here, "speeds", "log"), "name the rounds.jsonl whose order of answers counts"
        for field in ("seconds", "silos"):
            if changed(speeds, field):
                yield (*here, "speeds", field), "has no effect with 'recorded'"
    if recipe.data.at_silos and changed(recipe.federation, "speeds"):
        yield (*here, "speeds"), "has no effect over a network, where answers come when they come"


def too_stale(spec: FederationSpec, silos: int) -> str | None:
    """Why even equally fast silos could never keep within `max_staleness`; None where they can.

    Between a silo's start and its answer every other one at work answers once.
    """
    others = (silos if spec.concurrency == "all" else min(spec.concurrency, silos)) - 1
    per_step = spec.algorithm.updates_per_step()
    if others // per_step <= spec.algorithm.max_staleness:
        return None
    every = "update" if per_step == 1 else f"{per_step} updates"
    return (
        f"with {others + 1} silos at work at once and a server step for every {every}, even equally fast "
        f"ones are {others // per_step} steps late, and {spec.algorithm.max_staleness} are allowed"
    )
