"""Answers written in a step: which numbers draw them, what they earn, and that a policy follows its reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlm.errors import DataError, TrainingError
from fedlm.recipe.reinforce import ReinforceSpec, RewardSource
from fedlm.recipe.schema import TrainingSpec
from fedlm.training import rewards
from fedlm.training.answers import last_number
from fedlm.training.attention import packed
from fedlm.training.encode import TokenSet
from fedlm.training.generation import continuations
from fedlm.training.loop import Window, train
from fedlm.training.objective import Tools
from fedlm.training.rewards import Asked, advantages, reward_of
from fedlm.training.tasks.base import Held
from fedlm.training.tasks.reinforce import PolicyGradient, Reinforce, drawn, writing
from tests.training.helpers import learnt

ROWS = [
    {"question": f"the {word} was given", "choices": ["to the school", "to the bank"], "answer": i % 2, "row": f"f:{i}"}
    for i, word in enumerate(("patient", "dose", "medicine", "money"))
]


class Task(Reinforce):
    """Without a recipe."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(None)
        self.settings = ReinforceSpec(**{"max_new_tokens": 8, **settings})

    @property
    def spec(self) -> ReinforceSpec:
        return self.settings


def test_a_prompt_read_once_is_continued_as_if_read_for_each_text(adapted: Any, tokenizer: Any) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]

    def written(each: int, batch_tokens: int) -> list[list[int]]:
        draw = drawn((0, "s"), 6, 8)
        asked = prompts if each == 2 else [p for p in prompts for _ in range(2)]
        return continuations(
            adapted, tokenizer, asked, batch_tokens=batch_tokens, max_new_tokens=8, draw=draw, each=each
        )

    adapted.eval()
    first = written(2, 10_000)
    assert first == written(1, 10_000) == written(2, 30)  # one by one, and in other batches
    assert len({tuple(ids) for ids in first}) == 6
    assert all(len(ids) <= 8 and tokenizer.eos_token_id not in ids[:-1] for ids in first)


def test_draws_follow_the_models_distribution() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw, logits = drawn((3, "silo", 1), 4000, 1), torch.log(shares).expand(4000, -1)
    counts = np.bincount(draw(logits, list(range(4000))).numpy(), minlength=4) / 4000
    assert np.abs(counts - shares.numpy()).max() < 4 * np.sqrt(0.25 / 4000)


def test_writing_inside_of_training_is_writing_outside_of_it(adapted: Any, tokenizer: Any) -> None:
    def written() -> list[list[int]]:
        return continuations(
            adapted, tokenizer, [[5, 6, 7]], batch_tokens=500, max_new_tokens=8, draw=drawn((1,), 4, 8), each=4
        )

    adapted.eval()
    outside = written()
    adapted.train()
    with packed(adapted), writing(adapted):
        assert written() == outside
    assert adapted.training


@pytest.mark.parametrize(
    ("kind", "asked", "text", "earned"),
    [
        ("answer", Asked((), ("bank",), ("school", "bank")), "It is the bank.", 1.0),
        ("answer", Asked((), ("bank",), ("school", "bank")), "The school", 0.0),
        ("answer", Asked((), ("The bank!", "a lender")), "Lender.", 1.0),
        ("f1", Asked((), ("the big bank",)), "bank of money", 2 / 5),
        ("number", Asked((), ("so 1,200 in all",)), "3 + 4 makes 1200", 1.0),
        ("number", Asked((), ("7.50",)), "that is 7.5", 1.0),
        ("number", Asked((), ("7",)), "seven", 0.0),
    ],
)
def test_what_an_answer_earns(kind: Any, asked: Asked, text: str, earned: float) -> None:
    assert reward_of(RewardSource(kind=kind))([asked], [text]).tolist() == pytest.approx([earned])


def test_numbers_are_read() -> None:
    assert [last_number(t) is None for t in ("none", "a -3.5%", "")] == [True, False, True]
    assert float(last_number("costs $1,234.56, not -2") or 0) == -2


def test_advantages_by_hand() -> None:
    r = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert advantages(r, "rloo", scale=True).tolist() == [[1.0, *[pytest.approx(-1 / 3)] * 3], [0.0] * 4]
    assert advantages(r, "grpo", scale=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert advantages(r, "grpo", scale=True)[0, 0] == pytest.approx(0.75 / (0.5 + 1e-4))
    assert advantages(r, "grpo", scale=True)[1].tolist() == [0.0] * 4


def test_rows_that_leave_no_room_or_have_no_answer_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"^f:0: the prompt has \d+ tokens, which with an answer of 8 is above"):
        Task().examples(ROWS[0], tokenizer, 20)
    with pytest.raises(DataError, match=r"^f:9: reinforcement needs rows with"):
        Task().examples({"messages": [{"role": "user", "content": "why"}], "row": "f:9"}, tokenizer, 64)
    spoken = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "many"}]
    with pytest.raises(DataError, match=r"^f:9: the row's answer holds no number"):
        Task(reward=RewardSource(kind="number")).examples({"messages": spoken, "row": "f:9"}, tokenizer, 64)


def test_a_reward_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "_by_model", lambda _: lambda *_: np.array([0.5, np.nan]))
    with pytest.raises(TrainingError, match=r"the reward of an answer is nan.*train the reward model again"):
        reward_of(RewardSource(kind="model", run="runs/r"))([Asked((), ("a",))] * 2, ["a", "b"])


@pytest.mark.parametrize("settings", [{"method": "grpo", "loss": "grpo"}, {"method": "rloo", "beta": 0.0}])
def test_a_policy_follows_its_reward(adapted: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Rewarded is the share of tokens from the vocabulary's upper half, in the text as it is read again."""
    task = Task(completions=8, **settings)
    task.__dict__["reward"] = lambda _, texts: np.array(
        [np.mean([i >= 256 for i in tokenizer(t, add_special_tokens=False)["input_ids"]] or [0]) for t in texts]
    )
    data = TokenSet.of([e for row in ROWS for e in task.examples(row, tokenizer, 64)])
    spec = TrainingSpec(steps=25, batch_size=4, max_length=64, lr=0.02, schedule="constant")
    objective = PolicyGradient(Tools(adapted, spec, tokenizer, key=(0, "s", 0)), task)
    seen: list[float] = []
    begin = objective.begin

    def watched(examples: Any) -> Any:
        before = objective.figures.get("reward", (0.0, 0.0))
        chosen = begin(examples)
        seen.append((objective.figures["reward"][0] - before[0]) / 32)
        return chosen

    objective.begin = watched  # type: ignore[method-assign]
    result = train(
        adapted, learnt(adapted), data, spec, Window(0, 1), generator_key=(0, "s"), rule=None, objective=objective
    )
    assert result.examples == 25 * 4 * 8 and result.figures["answer_tokens"][1] == 800
    assert np.mean(seen[-5:]) > np.mean(seen[:3]) + 0.1


def test_held_out_rows_are_answered_greedily_and_measured(adapted: Any, tokenizer: Any) -> None:
    task = Task()
    task.__dict__["reward"] = lambda _, texts: np.array([float(len(t) % 3) for t in texts])
    adapted.eval()
    with torch.no_grad():
        found = task.measure(Held(ROWS, adapted, tokenizer, 64, 500))
        again = task.measure(Held(ROWS, adapted, tokenizer, 64, 500))
    assert found == again
    assert found.figures["loss"][0] == -found.figures["reward"][0] and found.figures["reward"][1] == len(ROWS)
    assert sum(found.items["nll"]) == found.figures["loss"][0] and len(found.items["nll"]) == len(ROWS)
