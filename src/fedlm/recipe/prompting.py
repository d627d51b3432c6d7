"""A frozen model, and no parameters that travel: the search for a prompt that is text, and learning in context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from fedlm.errors import RunError
from fedlm.recipe.data_checks import all_sources, changed, kind_of, origin_problems
from fedlm.recipe.privacy import LARGEST_EPSILON
from fedlm.recipe.source import SourceSpec
from fedlm.recipe.strict import Strict

if TYPE_CHECKING:
    from fedlm.recipe.data_checks import Path, Problem
    from fedlm.recipe.schema import Recipe

MOST_CANDIDATES = 64
"""Prompts that a silo scores in one request."""

PROMPT_CHARACTERS = 2000
"""Of a prompt."""

MOST_QUERIES = 1000
"""Questions that a silo answers in one request."""

MOST_CHOICES = 26
"""Of a question."""

QUERY_CHARACTERS = 8000
"""Of a question, and of each of its choices."""


class SearchSpec(Strict):
    """The search for a prompt: silos score candidates on their rows, the coordinator keeps the best and edits them."""

    candidates: list[Annotated[str, Field(min_length=1, max_length=PROMPT_CHARACTERS)]] = Field(
        min_length=1, max_length=MOST_CANDIDATES, description="Prompts to begin with. Public: silos receive them."
    )
    place: Literal["system", "user"] = Field(
        "system", description="Where a prompt stands: as a system turn, or before the text of the first user turn."
    )
    by: Literal["likelihood", "right"] = Field(
        "likelihood",
        description="What decides: the mean log-likelihood of the right answer (among the choices, or per token), or "
        "the share of right choices, ties by likelihood.",
    )
    rows: Annotated[int, Field(ge=8)] = Field(
        32, description="Training rows of each silo that a round scores candidates on, drawn anew each round."
    )
    keep: PositiveInt = Field(2, description="Best candidates that go on to the next round, and to validation.")
    edits: PositiveInt = Field(6, description="New candidates of a round, edited from those that were kept.")
    operations: list[Literal["delete", "swap", "add", "paraphrase"]] = Field(
        default_factory=lambda: ["delete", "swap", "add"],  # type: ignore[arg-type]
        min_length=1,
        description="Edits of phrases (GrIPS: Prasad et al., EACL 2023); 'add' puts a deleted phrase back, "
        "'paraphrase' lets the recipe's model, loaded at the coordinator, rewrite the whole prompt.",
    )


class InContextSpec(Strict):
    """Questions that silos answer from their own rows, shown in context (after Fed-ICL: Wang et al., ICML 2025)."""

    queries: SourceSpec = Field(
        description="Questions with choices that the coordinator holds. Silos receive the questions and choices; the "
        "answers, which figures need, stay with the coordinator."
    )
    examples: PositiveInt = Field(4, description="Training rows shown before each question, those most like it.")
    peers: Annotated[int, Field(ge=0)] = Field(
        2,
        description="From the second round on: other questions shown with the answers that silos agreed on, those most "
        "like it.",
    )
    token_epsilon: Annotated[float, Field(gt=0.0, le=LARGEST_EPSILON)] | None = Field(
        None,
        description="Noise on text: every token of a row's question and answer is drawn anew in the silo before the "
        "model sees the row, so that no two tokens are told apart by more than a factor of e^token_epsilon, and alike "
        "ones by less; epsilons of a row's tokens add up. Default: rows are shown as they are.",
    )
    fusion: Literal["mean", "vote"] = Field(
        "mean", description="Answers become one by their mean log-probabilities, or by majority, ties by the mean."
    )


def frozen(recipe: Recipe) -> bool:
    """Whether nothing is trained."""
    return recipe.search is not None or recipe.in_context is not None


def drawn_anew(recipe: Recipe) -> bool:
    """Whether rows get noise, token by token, before anything is made of them."""
    return recipe.in_context is not None and recipe.in_context.token_epsilon is not None


def untrained(data: Any) -> Any:
    """Raw data of a recipe; where it trains nothing, `training`, which nothing reads, need not be there."""
    frozen = isinstance(data, dict) and (data.get("search") is not None or data.get("in_context") is not None)
    return {**data, "training": {"steps": 1}} if frozen and "training" not in data else data


def require_training(recipe: Recipe) -> None:
    """Raises:
    RunError: the recipe trains nothing, so `fedlm run` and `fedlm compare` have nothing to do.
    """
    for part, command in (("search", "search"), ("in_context", "icl")):
        if getattr(recipe, part) is not None:
            raise RunError(
                f"this recipe trains nothing: it has a section `{part}`", fix=f"use `fedlm prompt {command}` instead"
            )


def prompting_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a search or learning in context cannot be combined with, or would not read."""
    search, context = recipe.search, recipe.in_context
    if search is None and context is None:
        return
    if search is not None and context is not None:
        yield ("in_context",), "a recipe either searches a prompt or answers questions: drop this or `search`"
    here = "search" if search is not None else "in_context"
    yield from _frozen(recipe, here)
    kinds = {kind_of(source.columns) for _, source in all_sources(recipe.data)} - {None}
    if search is not None:
        if search.by == "right" and kinds - {"choice"}:
            yield ("search", "by"), "'right' counts right choices: sources must be question + choices + answer"
        if search.keep + search.edits > MOST_CANDIDATES:
            yield ("search", "edits"), f"`keep` and `edits` are more than {MOST_CANDIDATES} candidates together"
    if context is not None:
        path: Path = ("in_context", "queries")
        yield from origin_problems(context.queries, "path", path)
        if kind_of(context.queries.columns) != "choice":
            yield (*path, "columns"), "questions are mapped to question + choices + answer"
        if context.queries.role != "split":
            yield (*path, "role"), "has no effect: all of them are questions"
        for where, source in all_sources(recipe.data):
            if kind_of(source.columns) not in (None, "choice"):
                yield (*where, "columns"), "examples for questions with choices are question + choices + answer"
        if context.peers and recipe.federation.rounds == 1 and changed(context, "peers"):
            yield ("in_context", "peers"), "has no effect in a single round"


def _frozen(recipe: Recipe, here: str) -> Iterator[Problem]:
    """Nothing is trained and nothing averaged, so most settings would have no effect."""
    if recipe.task != "instruct":
        yield ("task",), f"`{here}` shows rows in the chat template: only 'instruct' does"
    if recipe.guards:
        yield ("guards",), f"has no effect with `{here}`: no update leaves a silo"
    for part, read in (("training", ("steps", "epochs", "packing", "max_length")), ("adapter", ())):
        spec = getattr(recipe, part)
        for field in type(spec).model_fields:
            if field not in read and changed(spec, field):
                yield (part, field), f"has no effect with `{here}`: the model is frozen"
    if recipe.start is not None:
        yield ("start",), f"not with `{here}`: the model is the recipe's own (name a merged folder as model.source)"
    for field in ("selection", "instructions"):
        if getattr(recipe.data, field) is not None:
            yield ("data", field), f"not with `{here}`, which uses the rows as they are"
    if changed(recipe.federation.algorithm, "name"):
        yield ("federation", "algorithm", "name"), f"has no effect with `{here}`: nothing is averaged"
    for field in ("sample", "oversample", "patience", "concurrency"):
        if changed(recipe.federation, field):
            yield ("federation", field), f"has no effect with `{here}`: all silos are asked in every round"
