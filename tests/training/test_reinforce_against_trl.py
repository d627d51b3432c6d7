"""Advantages, loss and gradient of GRPO and RLOO equal TRL's on the same answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedlm.recipe.reinforce import ReinforceSpec
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.loop import micro_batches
from fedlm.training.objective import Tools
from fedlm.training.rewards import Asked
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks import reinforce
from fedlm.training.tasks.reinforce import PolicyGradient, Reinforce
from tests.training.helpers import learnt

trl = pytest.importorskip("trl", reason="the optional extra [bench] is not installed")

PROMPTS = ["the patient was", "the bank lent money to", "science books and a dose of medicine", "was given"]
EACH, NEW = 4, 9
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": len(PROMPTS) * EACH, "num_generations": EACH, "max_completion_length": NEW,
    "report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
    "disable_tqdm": True, "temperature": 1.0,
}  # fmt: skip


def earned(texts: Sequence[str]) -> list[float]:
    """Something that differs from answer to answer, and for one prompt does not."""
    return [0.25 * (sum(map(ord, text)) % 7) for text in texts[:-EACH]] + [0.5] * EACH


def put(parameters: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


class Task(Reinforce):
    """With the rewards of this test."""

    def __init__(self, spec: ReinforceSpec) -> None:
        super().__init__(None)
        self._spec = spec

    @property
    def spec(self) -> ReinforceSpec:
        return self._spec

    @property
    def reward(self) -> Any:  # type: ignore[override]
        return lambda _, texts: np.array(earned(texts))


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "grpo", "beta": 0.3},
        {"loss": "dr_grpo", "beta": 0.3, "scale_rewards": False},
        {"method": "rloo"},
        {"method": "rloo", "beta": 0.0},
    ],
)
def test_advantages_loss_and_gradient(
    adapted: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any], micro_batch_size: int | None,
) -> None:  # fmt: skip
    policy = learnt(adapted)
    began = {name: parameter.detach().clone() for name, parameter in policy.items()}

    @contextmanager
    def reference() -> Iterator[None]:
        now = {name: parameter.detach().clone() for name, parameter in policy.items()}
        put(policy, began)
        yield
        put(policy, now)

    with torch.no_grad():  # so that some answers end early
        adapted.get_base_model().lm_head.weight[tokenizer.eos_token_id] *= 3
    spec = ReinforceSpec(**settings, completions=EACH, max_new_tokens=NEW)
    if spec.method == "rloo":
        config = trl.RLOOConfig(output_dir=str(tmp_path), beta=spec.strength, **COMMON)
        trainer: Any = trl.RLOOTrainer
    else:
        config = trl.GRPOConfig(
            output_dir=str(tmp_path), beta=spec.strength, loss_type=spec.loss, scale_rewards=spec.scale_rewards,
            **COMMON,
        )  # fmt: skip
        trainer = trl.GRPOTrainer
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    theirs = trainer(
        model=adapted, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        reward_funcs=lambda completions, **_: earned(completions),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)  # from here on the policy is not the reference
    put(policy, {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in began.items()})
    torch.manual_seed(0)
    adapted.train()
    theirs.current_gradient_accumulation_steps = 1
    inputs = theirs._generate_and_score_completions([row for row in rows for _ in range(EACH)])
    theirs.model.zero_grad()
    loss = theirs._compute_loss(theirs.model, inputs)
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in policy.items()}
    adapted.zero_grad()

    written = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    assert len({len(ids) for ids in written}) > 1  # of different lengths
    monkeypatch.setattr(reinforce, "continuations", lambda *_, **__: written)
    task = Task(spec)
    task._rows = [Asked((), ())]
    prompts = [
        ids[mask.bool()].numpy().astype(np.int32)
        for ids, mask in zip(inputs["prompt_ids"][::EACH], inputs["prompt_mask"][::EACH], strict=True)
    ]
    training = TrainingSpec(steps=1, max_length=64, micro_batch_size=micro_batch_size)
    ours = PolicyGradient(Tools(adapted, training, tokenizer, reference), task)
    total = 0.0
    with packed(adapted):
        examples = ours.begin([Example((Encoded(ids, np.zeros(len(ids), bool)),), {"asked": 0.0}) for ids in prompts])
        for part in micro_batches(examples, training):
            terms, divisor = ours.terms(part)
            share = terms.sum() / divisor
            share.backward()
            total += float(share.detach())
    advantages = [example.facts["advantage"] for example in examples]
    np.testing.assert_allclose(advantages, inputs["advantages"].numpy(), atol=1e-5)
    assert advantages[-EACH:] == pytest.approx([0.0] * EACH, abs=1e-6) or spec.strength > 0
    assert total == pytest.approx(float(loss.detach()), abs=1e-5)
    for name, parameter in policy.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-3
    assert ours.figures["flat_groups"] == (1.0, 4.0) and ours.figures["reward"][1] == 16
