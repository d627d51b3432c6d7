"""Reinforcement on policy: the model writes several answers to a prompt and learns to write more like the better ones.

A step's answers are drawn from the policy of that very step, at temperature 1 and from its whole distribution, so the
ratio of new to old probabilities is 1 and nothing is clipped; its gradient is that of the log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlm.errors import DataError
from fedlm.randomness import numpy_generator
from fedlm.recipe.reinforce import ReinforceSpec
from fedlm.recipe.schema import Recipe
from fedlm.training.answers import last_number
from fedlm.training.attention import unpacked
from fedlm.training.divergence import token_kl
from fedlm.training.forward import batch_nll, by_tokens, precision
from fedlm.training.generation import Draw, continuations
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.rewards import Asked, Reward, advantages, reward_of
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task
from fedlm.training.tasks.instruct import rendered, tokens_of

WRITTEN_TOKENS = 8192
"""Tokens of all answers that are written side by side, prompts included."""

READ_TOKENS = 2048
"""Tokens per forward pass of the reference, of which nothing is kept."""

KL_ROWS = 64
"""Held-out rows of a silo on which the KL is measured: it needs the whole distributions of two forward passes."""


class Reinforce(Task):
    """GRPO or RLOO, as `recipe.reinforce` says.

    A row is a prompt: a question, or the turns before a conversation's last answer. An example is the prompt's tokens,
    none of them a target, and the fact `asked`: the number under which the task remembers the rest of the row.
    """

    name = "reinforce"

    @property
    def spec(self) -> ReinforceSpec:
        assert self.recipe is not None, "reinforcement has settings"
        return self.recipe.reinforce

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        self._rows: list[Asked] = []
        """Every prompt met so far."""
        self._numbers: dict[Asked, int] = {}

    @cached_property
    def reward(self) -> Reward:
        return reward_of(self.spec.reward)

    def known(self, examples: Sequence[Example]) -> list[Asked]:
        """What the task remembers of these examples' rows."""
        return [self._rows[int(example.facts["asked"])] for example in examples]

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        where, asked = row.get("row"), self._asked(row)
        turns = [{"role": role, "content": content} for role, content in asked.turns]
        ids = tokens_of(tokenizer, rendered(tokenizer, turns, True, where))
        if len(ids) + self.spec.max_new_tokens > max_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens, which with an answer of {self.spec.max_new_tokens} is above "
                f"`training.max_length` ({max_length})",
                where=where,
                fix="raise `training.max_length`, or leave such rows out with data.malformed: skip",
            )
        prompt = Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_))
        if asked not in self._numbers:
            self._numbers[asked] = len(self._rows)
            self._rows.append(asked)
        return [Example((prompt,), {"asked": float(self._numbers[asked])})]

    def _asked(self, row: dict[str, Any]) -> Asked:
        if row.get("choices"):
            choices = tuple(row["choices"])
            return Asked((("user", row["question"]),), (choices[row["answer"]],), choices)
        turns = [(m["role"], m["content"]) for m in row.get("messages") or []]
        last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
        if last == 0:
            raise DataError(
                "reinforcement needs rows with question, choices and answer, or with a prompt and an answer to it",
                where=row.get("row"),
                fix="map them in `columns`",
            )
        references = (turns[last][1], *(row.get("answers") or []))
        if self.spec.reward.kind == "number" and last_number(references[0]) is None:
            raise DataError(
                "the row's answer holds no number",
                where=row.get("row"),
                fix="use another reinforce.reward.kind, or leave such rows out with the source's `where`",
            )
        return Asked(tuple(turns[:last]), references)

    def objective(self, tools: Tools) -> Objective:
        return PolicyGradient(tools, self)

    def measure(self, held: Held) -> Measured:
        examples = self.held_examples(held)
        if not examples:
            return Measured({"loss": (0.0, 0.0), "reward": (0.0, 0.0)})
        with precision(held.model):
            written = continuations(
                held.model,
                held.tokenizer,
                [e.sequences[0].ids.tolist() for e in examples],
                batch_tokens=WRITTEN_TOKENS,
                max_new_tokens=self.spec.max_new_tokens,
            )
        rewards = self.reward(self.known(examples), texts_of(held.tokenizer, written))
        total, rows = float(rewards.sum()), float(len(rewards))
        found = Measured(
            {
                "loss": (-total, rows),
                "reward": (total, rows),
                "answer_tokens": (float(sum(map(len, written))), rows),
                "unfinished": (float(sum(map(self.unfinished, written))), rows),
            },
            {"earned": rewards.tolist(), "nll": (-rewards).tolist(), "tokens": [1] * len(rewards)},
        )
        if held.reference is not None:
            some = [answered(e, ids) for e, ids in zip(examples[:KL_ROWS], written, strict=False)]
            found.figures["kl"] = token_kl(held.model, some, held.reference, held.batch_tokens, packing=held.packing)
        return found

    def unfinished(self, ids: Sequence[int]) -> bool:
        """Whether an answer is as long as one may be."""
        return len(ids) == self.spec.max_new_tokens


class PolicyGradient(Objective):
    """A step's mean policy loss over the answers written for it.

    grpo  per token, (beta k3 - A) exp(log pi - log pi_old), with k3 = exp(d) - d - 1 and d = log pi_ref - log pi;
          the ratio stands before the KL too, which makes its gradient that of the reverse KL (DeepSeek-V3.2, 2025)
    rloo  per answer, -A exp(log pi - log pi_old); the reward that A compares is r - beta (log pi_old - log pi_ref)

    log pi_old is log pi without its gradient.
    """

    def __init__(self, tools: Tools, task: Reinforce) -> None:
        super().__init__(tools)
        self.task, self.policy, self.step = task, task.spec, 0
        self.answers, self.tokens = 0, 0
        self.reference: list[Tensor] = []
        """By the fact `answer`, what the reference gives each of its tokens; empty where nothing reads it."""

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        each, tools = self.policy.completions, self.tools
        asked = [one for one in self.task.known(examples) for _ in range(each)]
        with writing(tools.model):
            written = continuations(
                tools.model,
                tools.tokenizer,
                [e.sequences[0].ids.tolist() for e in examples],
                batch_tokens=WRITTEN_TOKENS,
                max_new_tokens=self.policy.max_new_tokens,
                draw=drawn((*tools.key, self.step), len(asked), self.policy.max_new_tokens),
                each=each,
            )
        self.step += 1
        rewards = self.task.reward(asked, texts_of(tools.tokenizer, written)).reshape(len(examples), each)
        prompts = [example for example in examples for _ in range(each)]
        sequences = [answered(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]
        better = rewards
        if self.policy.strength > 0:
            self.reference = self._logps(sequences, tools.reference)
            if self.policy.method == "rloo":
                ours = self._logps(sequences)
                gaps = [float((o - r).sum()) for o, r in zip(ours, self.reference, strict=True)]
                better = rewards - self.policy.strength * np.array(gaps).reshape(rewards.shape)
                self.count("kl", sum(gaps), sum(map(len, written)))
        values = advantages(better, self.policy.method, scale=self.policy.scale_rewards).reshape(-1)
        self.answers, self.tokens = len(sequences), sum(map(len, written))
        self.count("reward", float(rewards.sum()), self.answers)
        self.count("flat_groups", float((np.ptp(rewards, axis=1) == 0).sum()), len(examples))
        self.count("answer_tokens", float(self.tokens), self.answers)
        self.count("unfinished", float(sum(map(self.task.unfinished, written))), self.answers)
        return [
            Example((sequence,), {"answer": float(i), "advantage": float(value)})
            for i, (sequence, value) in enumerate(zip(sequences, values, strict=True))
        ]

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        logps = -batch_nll(self.tools.model, sequences_of(part), self.tools.spec)
        lengths = torch.tensor([e.targets for e in part], device=logps.device)
        owners = torch.repeat_interleave(torch.arange(len(part), device=logps.device), lengths)
        gains = torch.tensor([e.facts["advantage"] for e in part], dtype=torch.float32, device=logps.device)
        if self.policy.method == "rloo":
            sums = torch.zeros(len(part), device=logps.device).index_add(0, owners, logps)
            return -gains * torch.exp(sums - sums.detach()), self.answers
        losses = -gains[owners]
        if self.policy.strength > 0:
            d = torch.cat([self.reference[int(e.facts["answer"])] for e in part]) - logps
            k3 = torch.exp(d) - d - 1
            losses = losses + self.policy.strength * k3
            self.count("kl", float(k3.detach().sum()), len(k3))
        losses = losses * torch.exp(logps - logps.detach())
        if self.policy.loss == "grpo":
            return losses / lengths[owners], self.answers
        if self.policy.loss == "dr_grpo":
            return losses, self.answers * self.policy.max_new_tokens
        return losses, self.tokens

    @torch.no_grad()
    def _logps(
        self, sequences: Sequence[Encoded], inside: Callable[[], AbstractContextManager[None]] | None = None
    ) -> list[Tensor]:
        """Log-probabilities of each sequence's targets: under the policy, or inside of a context."""
        found: list[Tensor] = []
        with eval_mode(self.tools.model), inside() if inside is not None else eval_mode(self.tools.model):
            for run in by_tokens([len(s) for s in sequences], READ_TOKENS):
                chosen = [sequences[i] for i in run]
                found += torch.split(-batch_nll(self.tools.model, chosen, self.tools.spec), [s.targets for s in chosen])
        return found


def answered(example: Example, ids: Sequence[int]) -> Encoded:
    """A prompt and an answer to it, whose tokens are the targets."""
    prompt = example.sequences[0].ids
    whole = np.concatenate([prompt, np.asarray(ids, np.int32)])
    return Encoded(whole, np.arange(len(whole)) >= len(prompt))


def texts_of(tokenizer: Any, written: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]


def drawn(key: tuple[str | int, ...], texts: int, steps: int) -> Draw:
    """Draws from the model's distribution, each text's from numbers of its own, by inversion: token k where the first k
    probabilities first exceed a uniform number."""
    uniform = numpy_generator(int(key[0]), "answers", *key[1:]).random((texts, steps))
    place: NDArray[np.int64] = np.zeros(texts, np.int64)

    def draw(logits: Tensor, rows: Sequence[int]) -> Tensor:
        u = torch.from_numpy(uniform[rows, place[rows]])[:, None]
        place[rows] += 1
        reached = torch.softmax(logits.double(), -1).cumsum(-1)
        return torch.searchsorted(reached, u * reached[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)

    return draw


@contextmanager
def writing(model: Any) -> Iterator[None]:
    """Inside a round's training the model writes: without dropout, over ordinary rows, in training's precision."""
    with eval_mode(model), unpacked(model), precision(model):
        yield


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
