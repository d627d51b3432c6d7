"""Groups' preferences in context: a predictor on the frozen model is shown rows of a group and predicts its others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from fedlm.errors import DataError, ModelError
from fedlm.models.predictor import Predictor
from fedlm.randomness import numpy_generator
from fedlm.recipe.heads import GroupPreferenceSpec
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.scores import mean_states
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task
from fedlm.training.tasks.pairs import Messages, pair_of
from fedlm.training.tasks.reward import conversation

SHARE = "share_"
"""Facts of this name and a number: the share of the group that prefers that answer of an example."""

POINTS = 8192
"""Points of a forward pass when a silo is measured."""


class GroupPreference(Task):
    """The predictor of Group Preference Optimization (Zhao, Dang and Grover, ICLR 2024), a silo being a group; with
    federated averaging this is PluralLLM (Srewa et al., 2025). See `fedlm.models.predictor` for what differs.

    A row is a question with answers and the share of the group that prefers each: a pair's 1 and 0, a multiple-choice
    row's distribution, or 1 for its right choice. The answers to a question stay together. In each step of training
    some of its rows, at random, are the context from which the others are predicted. The loss of a row is the mean over
    its answers of the squared error of the predicted share.
    """

    name = "group-preference"
    embeds = True

    @property
    def context(self) -> int:
        """Rows in a context, at most."""
        return (self.recipe.group_preference if self.recipe is not None else GroupPreferenceSpec()).context

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        messages, answers, shares = opinion_of(row)
        where = row.get("row")
        sequences = tuple(conversation(tokenizer, messages, text, max_length, where) for text in answers)
        return [Example(sequences, {f"{SHARE}{i}": share for i, share in enumerate(shares)})]

    def together(self, examples: list[Example], silo: str = "") -> list[Example]:
        """All with as many answers as the row that has most: the others get empty ones, which nobody prefers."""
        if len(examples) <= self.context:
            raise DataError(
                f"the group has {len(examples)} training rows, and {self.context} of them are a context from which the "
                "others are predicted",
                where=f"silo '{silo}'" if silo else None,
                fix="give it more rows, or lower group_preference.context",
            )
        most, empty = max(len(e.sequences) for e in examples), Encoded(np.zeros(0, np.int32), np.zeros(0, np.bool_))
        none = {f"{SHARE}{i}": 0.0 for i in range(most)}
        return [Example((*e.sequences, *[empty] * (most - len(e.sequences))), none | dict(e.facts)) for e in examples]

    def objective(self, tools: Tools) -> Objective:
        return InContext(tools, self.context)

    @torch.no_grad()
    def measure(self, held: Held) -> Measured:
        """Each row is predicted from `context` others of these, the same in every run: the loss, whether the answer
        that most of the group prefer is the one predicted (ties count their part), and the alignment score."""
        examples = self.held_examples(held)
        if not examples:
            return Measured(dict.fromkeys(("loss", "accuracy", "alignment"), (0.0, 0.0)))
        n, known = len(examples), self.context
        if n <= known:
            raise DataError(
                f"the group has {n} held-out rows, and a row is predicted from {known} others",
                fix="hold out more rows (data.split), or lower group_preference.context",
            )
        sequences = sequences_of(examples)
        if held.states is not None:
            states = held.states(sequences)
        else:
            states = mean_states(held.model, [s.ids.tolist() for s in sequences], held.batch_tokens).astype(np.float32)
        group = gathered(with_states(examples, states))
        order = numpy_generator(0, "context of held-out rows").permutation(n)
        predictor, found = predictor_of(held.model), np.zeros(group.y.shape)
        for places in np.array_split(np.arange(n), -(-n * (known + 1) * group.y.shape[1] // POINTS)):
            asked = order[places]
            context = group.rows(order[(places[:, None] + 1 + np.arange(known)) % n])
            found[asked] = predicted(predictor, context, group.rows(asked[:, None]))[:, 0].double().cpu().numpy()
        real, true = group.real.cpu().numpy(), group.y.double().cpu().numpy()
        losses = (np.square(found - true) * real).sum(1) / real.sum(1)
        scores = {"loss": losses, "accuracy": hits(found, true, real), "alignment": alignment(found, true)}
        items = {"nll": losses, "tokens": np.ones(n, int), "choice": scores["accuracy"]}
        items["alignment"] = scores["alignment"]
        return Measured(
            {name: (float(values.sum()), float(n)) for name, values in scores.items()},
            {name: values.tolist() for name, values in items.items()},
        )


class InContext(Objective):
    """Of each step's rows some are the context, 1 to `most`, drawn with their number; the mean over the others."""

    questions = 0

    def __init__(self, tools: Tools, most: int) -> None:
        super().__init__(tools)
        self.most, self.step = most, 0
        self.context: Questions | None = None

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        seed, *parts = self.tools.key
        draw = numpy_generator(int(seed), "context", *parts, self.step)
        self.step += 1
        chosen = [examples[i] for i in draw.permutation(len(examples))]
        known = min(int(draw.integers(1, self.most + 1)), len(examples) - 1)
        self.context = gathered(chosen).rows(np.arange(known))
        self.questions = len(chosen) - known
        return chosen[known:]

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        assert self.context is not None, "a step begins with `begin`"
        asked = gathered(part)
        found = predicted(predictor_of(self.tools.model), self.context, asked)
        right = hits(*(values.detach().cpu().numpy() for values in (found, asked.y, asked.real)))
        self.count("accuracy", float(right.sum()), len(part))
        asked = asked.to(found.device)
        errors = (found - asked.y).square().masked_fill(~asked.real, 0.0)
        return errors.sum(1) / asked.real.sum(1), self.questions


@dataclass(frozen=True)
class Questions:
    """Questions with their answers as points; those with fewer answers than others have empty ones."""

    x: Tensor
    """[..., questions, answers, features]: the frozen model's mean states."""
    y: Tensor
    """[..., questions, answers]: shares of the group."""
    real: Tensor
    """bool [..., questions, answers]: whether there is such an answer."""

    def rows(self, index: NDArray[np.int64]) -> Questions:
        """The questions of these numbers, in the shape of the index."""
        chosen = torch.from_numpy(index).to(self.x.device)
        return Questions(self.x[chosen], self.y[chosen], self.real[chosen])

    def to(self, device: torch.device) -> Questions:
        return Questions(self.x.to(device), self.y.to(device), self.real.to(device))


def with_states(examples: Sequence[Example], states: NDArray[np.float32]) -> list[Example]:
    """Examples with the states of their sequences, which are [sequences of all, features] in their order."""
    ends = np.cumsum([0, *(len(example.sequences) for example in examples)])
    parts = zip(examples, pairwise(ends.tolist()), strict=True)
    return [replace(example, states=states[start:end]) for example, (start, end) in parts]


def gathered(examples: Sequence[Example]) -> Questions:
    """Examples with their states as points, fp32 on the CPU."""
    most = max(len(e.sequences) for e in examples)
    states = [e.states for e in examples if e.states is not None]
    assert len(states) == len(examples), "the task's examples come with their states"
    x = np.zeros((len(examples), most, states[0].shape[1]), np.float32)
    y, real = np.zeros(x.shape[:2], np.float32), np.zeros(x.shape[:2], np.bool_)
    for row, example in enumerate(examples):
        n = len(example.sequences)
        x[row, :n] = states[row]
        y[row, :n] = [example.facts[f"{SHARE}{i}"] for i in range(n)]
        real[row, :n] = [len(s) > 0 for s in example.sequences]
    return Questions(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(real))


def predicted(predictor: Predictor, context: Questions, asked: Questions) -> Tensor:
    """The predicted share of every answer [..., questions, answers], fp32, differentiable; 0 of empty ones.

    Args:
        context: of the group whose preferences are asked for.
        asked: its shares are not read.
    """
    device = predictor.score.weight.device
    both = context, asked = context.to(device), asked.to(device)
    x = torch.cat([part.x.flatten(-3, -2) for part in both], -2)
    y = torch.cat([part.y.flatten(-2) for part in both], -1)
    known = torch.cat([context.real.flatten(-2), torch.zeros_like(asked.real.flatten(-2))], -1)
    scores = predictor(x, y, known)[..., context.y.shape[-2] * context.y.shape[-1] :]
    apart: Tensor = scores.unflatten(-1, asked.y.shape[-2:])
    return apart.masked_fill(~asked.real, -torch.inf).softmax(-1)


def predictor_of(model: Module) -> Predictor:
    """The predictor of a model.

    Raises:
        ModelError: it has none.
    """
    found = getattr(model, "predictor", None)
    if not isinstance(found, Predictor):
        raise ModelError("this model has no predictor of preferences: it was trained for another task")
    return found


def opinion_of(row: dict[str, Any]) -> tuple[Messages, list[str], list[float]]:
    """The turns before the answers, the answers, and the share of the group that prefers each.

    Raises:
        DataError: the row has no such thing, or all its options are alike.
    """
    if row.get("shares"):
        return [{"role": "user", "content": row["question"]}], list(row["choices"]), list(row["shares"])
    messages, right, wrong = pair_of(row)
    if not row.get("choices"):
        return messages, [right, wrong], [1.0, 0.0]
    others = {tuple(option.split()): option for option in row["choices"]}
    others.pop(tuple(right.split()))
    return messages, [right, *others.values()], [1.0, *[0.0] * len(others)]


def hits(found: NDArray[Any], true: NDArray[Any], real: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of the answers predicted to be preferred most [rows], the part that are: 1, 0, or between them where several are
    predicted alike."""
    first = (np.where(real, found, -1) == np.where(real, found, -1).max(1, keepdims=True)) & real
    best = (true == true.max(1, keepdims=True)) & real
    share: NDArray[np.float64] = (first & best).sum(1) / first.sum(1)
    return share


def alignment(found: NDArray[np.float64], true: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 minus the Jensen-Shannon distance of two distributions [rows]: the root of their divergence in bits, so that it
    is between 0 (nothing in common) and 1 (equal). The paper's is in nats, and at least 0.167."""
    middle = (found + true) / 2

    def divergence(p: NDArray[np.float64]) -> NDArray[np.float64]:
        some = p > 0
        ratio = np.log2(np.divide(p, middle, out=np.ones_like(p), where=some))
        total: NDArray[np.float64] = np.where(some, p * ratio, 0.0).sum(1)
        return total

    js = (divergence(found) + divergence(true)) / 2
    score: NDArray[np.float64] = 1 - np.sqrt(np.clip(js, 0.0, 1.0))
    return score
