"""Combinations that a recipe may not ask for: each cannot be kept, or silently would have no effect.

Everything here is judged from the recipe alone, without network or data. Each problem names the field it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlm.recipe.capacity import capacity_problems
from fedlm.recipe.expressions import is_template, parse_template
from fedlm.recipe.guards import guard_problems
from fedlm.recipe.methods import ALGORITHMS, FACTORS
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedlm.recipe.schema import Columns, DataSpec, FederationSpec, Recipe, SourceSpec

Path = tuple[str | int, ...]
Problem = tuple[Path, str]

PACKAGE_FORMS = {
    "pypi": (re.compile(r"pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[^!\s]+!.+"), "pypi:name==version!path/in/wheel"),
    "npm": (re.compile(r"npm:(@[^/@!\s]+/)?[^/@!\s]+@[^!\s]+!.+"), "npm:@scope/name@version!package/path"),
}
_MAPPINGS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "text": ("text",),
    "prompt + response": ("prompt", "response"),
    "prompt + chosen + rejected": ("prompt", "chosen", "rejected"),
    "question + choices + answer": ("question", "choices", "answer"),
}
_KINDS = {
    "messages": "messages",
    "text": "text",
    "prompt + response": "messages",
    "prompt + chosen + rejected": "preference",
    "question + choices + answer": "choice",
}
_ONLY_HUB = "only 'hub:' sources have it"


def mapping_of(columns: Columns) -> str | None:
    """Which of the five ways the columns follow, e.g. 'prompt + response'; None unless exactly one."""
    used = {name for names in _MAPPINGS.values() for name in names if getattr(columns, name) is not None}
    for mapping, names in _MAPPINGS.items():
        if used == set(names):
            return mapping
    return None


def kind_of(columns: Columns) -> str | None:
    """The kind of example the columns give: 'text', 'messages', 'preference' or 'choice'."""
    mapping = mapping_of(columns)
    return _KINDS[mapping] if mapping else None


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every impossible combination in an otherwise well-formed recipe, as (path, reason)."""
    yield from _model(recipe)
    yield from data_problems(recipe.data)
    yield from _task(recipe)
    yield from _federation(recipe)
    yield from _method(recipe)
    yield from _asynchronous(recipe)
    yield from guard_problems(recipe)
    yield from capacity_problems(recipe)
    yield from _without_effect(recipe)


def all_sources(data: DataSpec) -> list[tuple[Path, SourceSpec]]:
    """Every source with its path in the recipe."""
    found: list[tuple[Path, SourceSpec]] = [(("data", "sources", i), s) for i, s in enumerate(data.sources)]
    for n, silo in enumerate(data.silos):
        found += [(("data", "silos", n, "sources", i), s) for i, s in enumerate(silo.sources)]
    return found


def _origin(spec: Any, field: str, path: Path) -> Iterator[Problem]:
    """The rules of where models and sources come from: known scheme, exact form, pinned."""
    text: str = getattr(spec, field)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    known = scheme[1] if scheme else ""
    if known in PACKAGE_FORMS:
        pattern, form = PACKAGE_FORMS[known]
        if not pattern.fullmatch(text):
            yield (*path, field), f"'{text}' is not of the form '{form}' with an exact version"
        elif spec.sha256 is None:
            yield (
                (*path, "sha256"),
                "a registry package must be pinned: give the SHA-256 of its archive",
            )
    elif known == "hub":
        if not re.fullmatch(r"hub:[\w.-]+/[\w.-]+", text):
            yield (*path, field), f"'{text}' is not of the form 'hub:owner/name'"
        elif spec.revision is None:
            yield (*path, "revision"), "a hub source must be pinned: give the commit as `revision`"
        elif not re.fullmatch("[0-9a-f]{40}", spec.revision):
            yield (
                (*path, "revision"),
                "must be a commit, 40 lower-case hex digits: the content of a branch or tag can change",
            )
    elif scheme:
        yield (*path, field), f"unknown kind of source '{known}:', use a local path, 'hub:', 'pypi:' or 'npm:'"
    if known != "hub" and spec.revision is not None:
        yield (*path, "revision"), "has no effect: only 'hub:' sources have revisions"


def _model(recipe: Recipe) -> Iterator[Problem]:
    yield from _origin(recipe.model, "source", ("model",))
    if recipe.adapter.dora:
        yield (
            ("adapter", "dora"),
            "DoRA is not trained: it scales each column of W + s B A to a learnt magnitude, which is no function of "
            "B A, so the mean of the silos' changes cannot be rebuilt from their adapters",
        )
    if recipe.adapter.targets == []:
        yield ("adapter", "targets"), "names no module, so nothing would be trained"


def data_problems(data: DataSpec) -> Iterator[Problem]:
    """The impossible combinations within a recipe's, or a silo's own, description of its text."""
    kinds: dict[str, Path] = {}
    for path, source in all_sources(data):
        yield from _origin(source, "path", path)
        yield from _reading(source, path)
        yield from _columns(source.columns, (*path, "columns"))
        kind = kind_of(source.columns)
        if kind is not None:
            kinds.setdefault(kind, path)
    if len(kinds) > 1:
        yield (
            ("data",),
            f"all sources must map to one kind of example, here they give {' and '.join(sorted(kinds))}",
        )
    if data.sources and all(s.role in ("test", "validation") for s in data.sources):
        yield ("data", "sources"), "no source is left to train on: every one serves validation or test alone"
    for n, silo in enumerate(data.silos):
        if all(s.role in ("test", "validation") for s in silo.sources):
            yield ("data", "silos", n, "sources"), f"silo '{silo.name}' has nothing to train on"
    if data.partition is not None:
        yield from _partition(data)


def _reading(source: SourceSpec, path: Path) -> Iterator[Problem]:
    """Settings of a source that nothing reads, and a glob that Python does not know."""
    hub = source.path.startswith("hub:")
    for field in ("format", "encoding") if hub else ("subset", "hub_split"):
        if _changed(source, field):
            yield (*path, field), f"has no effect: {'a hub dataset has its own' if hub else _ONLY_HUB}"
    ending = source.path.lower().removesuffix(".gz").endswith(".parquet")
    if _changed(source, "encoding") and (source.format == "parquet" or (source.format == "auto" and ending)):
        yield (*path, "encoding"), "has no effect on Parquet files, which say how their text is written"
    local = not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source.path)
    if local and source.sha256 is not None:
        yield (*path, "sha256"), "has no effect: only registry packages are checked against a hash"
    if local and any("**" in part and part != "**" for part in source.path.split("/")):
        yield (*path, "path"), "'**' must be a part of its own, as in data/**/*.jsonl"


def _columns(columns: Columns, path: Path) -> Iterator[Problem]:
    """Exactly one mapping, and templates that can be filled."""
    if mapping_of(columns) is None:
        given = [name for name in type(columns).model_fields if name != "label" and getattr(columns, name) is not None]
        yield (
            path,
            f"map rows in exactly one way ({', or '.join(_MAPPINGS)}), here: {', '.join(given) or 'nothing'}",
        )
    for name in type(columns).model_fields:
        value = getattr(columns, name)
        for text in value if isinstance(value, list) else [value]:
            yield from _template(text, (*path, name))


def _template(text: str | None, path: Path) -> Iterator[Problem]:
    if text is not None and is_template(text):
        try:
            parse_template(text)
        except ValueError as error:
            yield path, str(error)


def _partition(data: DataSpec) -> Iterator[Problem]:
    part, here = data.partition, ("data", "partition")
    assert part is not None
    uses = {
        "natural": {"by", "pattern", "max_silos"},
        "domain": set(),
        "iid": {"silos"},
        "dirichlet": {"silos", "by", "pattern", "alpha"},
        "shards": {"silos", "by", "pattern", "shards_per_silo"},
        "quantity": {"silos", "alpha"},
    }[part.kind]
    for field in ("silos", "by", "pattern", "alpha", "shards_per_silo", "max_silos"):
        if field not in uses and _changed(part, field):
            yield (*here, field), f"has no effect on a '{part.kind}' partition"
    yield from _template(part.by, (*here, "by"))
    if part.pattern is not None:
        try:
            groups = re.compile(part.pattern).groups
        except re.error as error:
            yield (*here, "pattern"), f"is not a regular expression: {error}"
        else:
            if groups == 0:
                yield (*here, "pattern"), "has no group: put the part that names the silo in parentheses"
    if part.kind == "domain":
        names = [s.name or s.path for s in data.sources if s.role in ("split", "train")]
        if len(set(names)) < len(names):
            yield ("data", "sources"), "a 'domain' partition needs sources with different names"


def _task(recipe: Recipe) -> Iterator[Problem]:
    allowed = TASKS[recipe.task].kinds
    found = all_sources(recipe.data)
    for path, source in found:
        kind = kind_of(source.columns)
        if kind is not None and kind not in allowed:
            yield (
                (*path, "columns"),
                f"task '{recipe.task}' cannot learn from {kind} rows, it needs {' or '.join(allowed)}",
            )
    for index, metric in enumerate(recipe.evaluation.metrics):
        if metric != "loss" and not (recipe.data.at_silos or any(s.columns.choices is not None for _, s in found)):
            yield (
                ("evaluation", "metrics", index),
                f"metric '{metric}' needs sources mapped to question + choices + answer",
            )


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
        (training, ("training",), "final_lr", training.schedule, ("linear", "cosine")),
    ]
    for spec, path, field, chosen, by in readers:
        if chosen not in by and _changed(spec, field):
            yield (*path, field), f"has no effect with '{chosen}' (it belongs to {', '.join(by)})"
    yield from _options(recipe)
    if "generation" not in recipe.evaluation.metrics and _changed(recipe.evaluation, "max_new_tokens"):
        yield ("evaluation", "max_new_tokens"), "has no effect without the metric 'generation'"


def _options(recipe: Recipe) -> Iterator[Problem]:
    """Options that belong to another algorithm."""
    algorithm = recipe.federation.algorithm
    for field in [f for f in type(algorithm).model_fields if f not in ("name", "weights", "server_lr")]:
        owners = sorted(name for name, method in ALGORITHMS.items() if field in method.options)
        if algorithm.name not in owners and _changed(algorithm, field):
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
        if _changed(recipe.training, field):
            yield ("training", field), f"has no effect with '{name}'"
    if method.zeroth_order and _changed(recipe.adapter, "dropout"):
        yield ("adapter", "dropout"), f"has no effect with '{name}', which measures losses without dropout"
    if method.zeroth_order and recipe.adapter.kind == "full" and recipe.model.dtype != "float32":
        yield (
            ("model", "dtype"),
            f"'{name}' measures small differences of losses with one fp32 copy of the weights: set it to float32",
        )
    if method.same_steps and recipe.training.steps is None:
        yield ("training", "epochs"), f"silos vote step by step with '{name}': give `steps`, the same for all"
    algorithm = recipe.federation.algorithm
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
            if _changed(spec, field):
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
        if _changed(spec, field):
            yield (*here, field), f"has no effect with '{algorithm.name}': say in `concurrency` how many work at once"
    if recipe.training.keep_optimizer:
        yield (
            ("training", "keep_optimizer"),
            f"not with '{algorithm.name}': a silo begins anew before it is known which of its trainings count",
        )
    if algorithm.name == "fedasync" and algorithm.server_lr is not None and algorithm.server_lr > 1:
        yield (*here, "algorithm", "server_lr"), "alpha mixes two models, so it is at most 1"
    if algorithm.staleness == "constant" and algorithm.staleness_a is not None:
        yield (*here, "algorithm", "staleness_a"), "has no effect with `staleness: constant`"
    if algorithm.staleness != "hinge" and _changed(algorithm, "staleness_b"):
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
        if speeds.kind != kind and _changed(speeds, field):
            yield (*here, "speeds", field), f"has no effect with '{speeds.kind}' (it belongs to {kind})"
    if speeds.kind == "recorded":
        if speeds.log is None:
            yield (*here, "speeds", "log"), "name the rounds.jsonl whose order of answers counts"
        for field in ("seconds", "silos"):
            if _changed(speeds, field):
                yield (*here, "speeds", field), "has no effect with 'recorded'"
    if recipe.data.at_silos and _changed(recipe.federation, "speeds"):
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


def _changed(spec: BaseModel, field: str) -> bool:
    return bool(getattr(spec, field) != type(spec).model_fields[field].get_default(call_default_factory=True))
