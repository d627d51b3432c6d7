"""What a silo's owner allows: read from policy.yaml, asked before anything of a run is loaded or computed.

A recipe comes from outside. It may name what to train and how, but never a place on this silo's disk: models and chat
templates from here are supplied by the owner, who maps the recipe's names to folders and files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from fedlm.data.packages import is_package
from fedlm.errors import RecipeError, nearest
from fedlm.federation.silo.hours import checked_hours, checked_zone, next_opening
from fedlm.federation.silo.masked import serves
from fedlm.federation.silo.privacy_rules import PrivacyRules, check_privacy, check_text
from fedlm.federation.silo.refusals import Forbidden
from fedlm.messages import Request
from fedlm.models.catalogue import CATALOGUE
from fedlm.recipe.capacity import Capacity
from fedlm.recipe.load import load_yaml
from fedlm.recipe.methods import ALGORITHMS, BESIDE, FACTORS
from fedlm.recipe.presets import is_preset
from fedlm.recipe.schema import ModelSpec, Recipe
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS
from fedlm.training.batches import steps_per_round

EXAMPLE = "policy.example.yaml"

PINNED = "pinned"
"""In `models`: fetch it from where the recipe says, which is pinned to its bytes."""


AdapterKind = Literal[
    "lora", "lora-sb", "ia3", "full", "prompt", "p-tuning", "prefix", "prompt-projection", "predictor"
]


class Policy(Strict):
    """What a coordinator may ask of this silo. These defaults hold for what the owner's file leaves out."""

    allow: list[Literal["hello", "train", "evaluate", "profile", "pairs", "score", "answer"]] = Field(
        default_factory=lambda: ["hello", "train", "evaluate"],  # type: ignore[arg-type]
        description="Verbs that are answered. 'pairs', exact counts of neighbouring letters and syllables in the words "
        "of this silo's text, trains a tokenizer, and must be listed; so must 'score', sums of how well prompts fit "
        "rows, and 'answer', answers to the coordinator's questions from rows shown in context.",
    )
    tasks: list[str] | None = Field(None, description="What may be learnt; default: all.")
    algorithms: list[str] | None = Field(None, description="How updates may be made; default: all.")
    adapters: list[AdapterKind] = Field(
        default_factory=lambda: ["lora", "lora-sb", "ia3", *BESIDE],  # type: ignore[arg-type]
        description="What may be trained and sent. 'full' sends as many numbers as the model has, and must be listed.",
    )
    any_pinned_model: bool = Field(
        True, description="Allow any model that is pinned to its bytes, besides those of `models`."
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Name in the recipe -> folder or .gguf file here, or 'pinned' to fetch what the recipe pins; also "
        "of a preset's tokenizer.",
    )
    chat_templates: dict[str, str] = Field(
        default_factory=dict, description="Name in the recipe -> Jinja file here. 'chatml' is always allowed."
    )
    max_rounds: PositiveInt | None = Field(None, description="Rounds that one run may have.")
    max_rank: PositiveInt | None = Field(None, description="Largest LoRA rank.")
    max_steps_per_round: PositiveInt | None = Field(None, description="Most optimiser steps of one round.")
    capacity: Capacity = Field(
        Capacity(),
        description="What this machine can do, in the words of a recipe's `federation.capacity`. Where a run asks for "
        "more, and its algorithm can use less, the silo does less instead of refusing.",
    )
    max_bytes_per_round: PositiveInt | None = Field(
        None,
        description="Most bytes that may leave in one round of a run, all answers together: judged from shapes where "
        "they are known beforehand, and counted in what is about to leave.",
    )
    max_rounds_per_day: PositiveInt | None = Field(
        None, description="Trainings of all runs together in one day of `timezone`; a repeated request counts once."
    )
    quiet_hours: list[Annotated[str, AfterValidator(checked_hours)]] = Field(
        default_factory=list,
        description="When nothing is answered, such as '07:00-19:00 Mon-Fri' (without days: every day; an end before "
        "the start is on the next day).",
    )
    timezone: Annotated[str, AfterValidator(checked_zone)] = Field(
        "UTC", description="Whose clock and days `quiet_hours`, `max_rounds_per_day` and `privacy.per` mean."
    )
    min_cohort: PositiveInt = Field(
        1, description="Let an update be read only in a sum with those of so many silos; needs masks if above 1."
    )
    min_cohort_difference: PositiveInt = Field(
        2,
        description="Silos by which the cohorts of two masked sums from one model must differ, in whatever runs, "
        "unless they are the same; 1 allows any.",
    )
    privacy: PrivacyRules = Field(PrivacyRules(), description="What a recipe must do to protect single rows.")
    min_rows: PositiveInt = Field(1, description="Take part only with at least this many training rows.")
    share_labels: bool = Field(False, description="Let the data card count rows by label, not by role alone.")
    per_item_scores: bool = Field(False, description="Let measurements be sent for each held-out row, not in sum.")

    @model_validator(mode="after")
    def _opens(self) -> Policy:
        if self.quiet_hours and next_opening(self.quiet_hours, self.timezone, datetime.now(UTC)) is None:
            raise ValueError("quiet_hours: these leave no minute of the week in which anything is answered")
        return self

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, names: list[str] | None) -> list[str] | None:
        for name in names or []:
            if name not in TASKS:
                raise ValueError(f"unknown task '{name}', {nearest(name, TASKS)}")
        return names

    @field_validator("algorithms")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        for name in names or []:
            if name not in ALGORITHMS:
                raise ValueError(f"unknown algorithm '{name}', {nearest(name, ALGORITHMS)}")
        return names


def load_policy(path: Path) -> Policy:
    """Read a policy; its paths are relative to its own folder.

    Raises:
        RecipeError: the file cannot be read, has unknown or impossible fields (each with its line), or names a folder
            or file that is not there.
    """
    policy = load_yaml(path, Policy, what="policy", example="`fedlm silo policy --example`")
    models = {name: text if text == PINNED else _here(path, "models", name, text) for name, text in _items(policy)}
    templates = {name: _here(path, "chat_templates", name, text) for name, text in policy.chat_templates.items()}
    return policy.model_copy(update={"models": models, "chat_templates": templates})


def example() -> str:
    """A policy file with every field explained."""
    return (resources.files("fedlm.federation.silo") / EXAMPLE).read_text(encoding="utf-8")


def check_verb(policy: Policy, verb: str) -> None:
    """Forbidden unless the owner allows this verb."""
    if verb not in policy.allow:
        allowed = ", ".join(policy.allow) or "none"
        raise Forbidden(f"the verb '{verb[:40]}' is not allowed here (allowed: {allowed})", "allow")


def check_hours(policy: Policy, now: datetime) -> None:
    """Forbidden in the owner's quiet hours; says when they end.

    Args:
        now: aware.
    """
    opens = next_opening(policy.quiet_hours, policy.timezone, now)
    if opens is None or opens > now:
        when = "" if opens is None else f"; it answers again at {opens:%Y-%m-%d %H:%M} {policy.timezone}"
        raise Forbidden(f"this silo's policy has quiet hours now (quiet_hours){when}", "quiet_hours")


def check_recipe(policy: Policy, recipe: Recipe) -> None:
    """Forbidden unless the owner allows every part of this recipe, its sizes included."""
    _among("task", recipe.task, policy.tasks, "tasks")
    _among("algorithm", recipe.federation.algorithm.name, policy.algorithms, "algorithms")
    _among("adapter", recipe.adapter.kind, policy.adapters, "adapters")
    _at_most("rounds", recipe.federation.rounds, policy.max_rounds, "max_rounds")
    if recipe.adapter.kind in FACTORS:
        _at_most("as LoRA rank", recipe.adapter.rank, policy.max_rank, "max_rank")
    if recipe.training.steps is not None:
        _at_most("steps per round", recipe.training.steps, policy.max_steps_per_round, "max_steps_per_round")
    selection = recipe.data.selection
    if recipe.data.augment is not None or (selection is not None and selection.method == "fedhds"):
        check_verb(policy, "profile")
    if recipe.reinforce.reward.run is not None:
        raise Forbidden(
            "the reward model is a run on the coordinator's disk, and rewards are given here: use a reward that can be "
            "checked (reinforce.reward.kind: answer, f1 or number)"
        )
    check_privacy(policy.privacy, policy.min_cohort, recipe)
    if recipe.search is not None:
        check_verb(policy, "score")
    if recipe.in_context is not None:
        check_verb(policy, "answer")
        check_text(policy.privacy, recipe.in_context.token_epsilon)
    local_model(policy, recipe.model)


def check_counting(policy: Policy, recipe: Recipe) -> None:
    """Forbidden unless the owner allows a tokenizer to be trained for this recipe, whose model is not used."""
    check_verb(policy, "pairs")
    _among("task", recipe.task, policy.tasks, "tasks")
    check_privacy(policy.privacy, policy.min_cohort, recipe)


def check_rows(policy: Policy, recipe: Recipe, rows: int, sequences: int | None) -> None:
    """Forbidden when the silo has too few rows to take part, or its rows would mean too many steps.

    Args:
        rows: training rows.
        sequences: what they make once encoded; None where the policy does not limit steps.
    """
    if rows < policy.min_rows:
        # not how many there are: the owner may not want that known
        raise Forbidden(
            f"this silo holds fewer training rows than its policy asks for (min_rows: {policy.min_rows})", "min_rows"
        )
    if sequences:
        steps = steps_per_round(recipe.training, sequences)
        _at_most("steps per round", steps, policy.max_steps_per_round, "max_steps_per_round")


def check_request(policy: Policy, recipe: Recipe, request: Request) -> None:
    """Forbidden unless this request stays within the policy and within the run that the silo has agreed to."""
    first = 0 if serves(request) == "train" else -1
    if not first <= request.round < recipe.federation.rounds:
        raise Forbidden(f"the run has {recipe.federation.rounds} rounds, there is no round {request.round}")
    _at_most("rounds", request.round + 1, policy.max_rounds, "max_rounds")
    if request.verb == "evaluate" and request.fields.get("items") and not policy.per_item_scores:
        raise Forbidden(
            "this silo's policy does not allow scores of single rows (per_item_scores: false)", "per_item_scores"
        )
    if request.verb == "evaluate" and request.fields.get("rows_of", "own") != "own":
        raise Forbidden("this silo measures models on its own rows alone")


def local_model(policy: Policy, spec: ModelSpec) -> ModelSpec:
    """The model as this silo loads it: what the recipe pins, or what the owner supplies under the recipe's name.

    Raises:
        Forbidden: the owner allows neither.
    """
    changes: dict[str, str | None] = {}
    folder = _mapped(policy.models, spec.source)
    if folder is not None and folder != PINNED:
        # the pins are those of the recipe's own source; whether the bytes are the same is compared by fingerprint
        changes = {"source": folder, "sha256": None, "revision": None}
    elif not _is_pinned(spec.source):
        raise Forbidden(
            f"the model '{_name(spec.source)}' lies on the coordinator's disk; this silo loads it only if its policy "
            "says where it lies here (models)",
            "models",
        )
    elif folder is None and not policy.any_pinned_model:
        allowed = ", ".join(policy.models) or "none"
        raise Forbidden(f"this silo's policy does not allow the model '{spec.source}' (models: {allowed})", "models")
    if spec.tokenizer is not None:
        changes |= _local_tokenizer(policy, spec.tokenizer)
    if spec.chat_template not in (None, "chatml"):
        file = _mapped(policy.chat_templates, spec.chat_template)
        if file is None:
            raise Forbidden(
                f"the chat template '{_name(spec.chat_template)}' is a file; this silo's policy does not supply it "
                "(chat_templates)",
                "chat_templates",
            )
        changes["chat_template"] = file
    return spec.model_copy(update=changes)


def _local_tokenizer(policy: Policy, tokenizer: str) -> dict[str, str | None]:
    """What changes in a preset's spec so that this silo finds its tokenizer.

    Raises:
        Forbidden: the owner allows none by this name.
    """
    folder = _mapped(policy.models, tokenizer)
    if folder is not None and folder != PINNED:
        return {"tokenizer": folder, "sha256": None, "revision": None}
    if not _is_pinned(tokenizer):
        raise Forbidden(
            f"the tokenizer '{_name(tokenizer)}' lies on the coordinator's disk; this silo uses it only if its policy "
            "says where it lies here (models)",
            "models",
        )
    if folder is None and not policy.any_pinned_model:
        raise Forbidden(f"this silo's policy does not allow the tokenizer of '{tokenizer}' (models)", "models")
    return {}


def _is_pinned(source: str) -> bool:
    """Whether a recipe that passed validation pins this model to its bytes; a preset's follow from its seed."""
    return source in CATALOGUE or is_package(source) or source.startswith("hub:") or is_preset(source)


def _mapped(table: dict[str, str], text: str | None) -> str | None:
    """What the owner supplies for a name. A path, which the coordinator made absolute, also goes by its last part."""
    if text is None or text in table:
        return None if text is None else table[text]
    return None if _is_pinned(text) else table.get(_name(text))


def _name(text: str | None) -> str:
    """A path's last part; of a run's final model, RUN/adapter, both."""
    parts = [] if text is None else re.split(r"[/\\]", text.rstrip("/\\"))
    return "/".join(parts[-2:] if parts[-1:] == ["adapter"] else parts[-1:])


def _among(what: str, value: str, allowed: Sequence[str] | None, field: str) -> None:
    if allowed is not None and value not in allowed:
        listed = ", ".join(allowed) or "none"
        raise Forbidden(f"this silo's policy does not allow the {what} '{value}' ({field}: {listed})", field)


def _at_most(what: str, value: int, most: int | None, field: str) -> None:
    if most is not None and value > most:
        raise Forbidden(f"this silo's policy does not allow {value} {what} ({field}: {most})", field)


def _items(policy: Policy) -> list[tuple[str, str]]:
    return list(policy.models.items())


def _here(policy: Path, field: str, name: str, text: str) -> str:
    """A path of the policy file, absolute.

    Raises:
        RecipeError: nothing is there.
    """
    try:
        found = (policy.parent / Path(text).expanduser()).resolve()
        there = found.is_file() if field == "chat_templates" else found.exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a NUL
        there = False
    if not there:
        raise RecipeError(
            f"there is no {'file' if field == 'chat_templates' else 'folder or file'} '{text}'",
            where=f"{policy}: {field}.{name}",
            fix="correct the path, which starts from the policy's folder",
        )
    return str(found)
