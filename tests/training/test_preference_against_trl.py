"""Each preference loss, its gradient and a few steps of training equal TRL's on the same batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedlm.recipe.preference import PreferenceSpec
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.encode import TokenSet
from fedlm.training.forward import sequence_nll
from fedlm.training.loop import Window, train
from fedlm.training.objective import Tools, sequences_of
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import REFERENCE
from fedlm.training.tasks.pairs import prompt_of
from fedlm.training.tasks.preference import PreferenceObjective
from tests.training.helpers import learnt

trl = pytest.importorskip("trl", reason="the optional extra [bench] is not installed")

WORDS = "patient dose medicine bank money school science books was given lent and to the a of for".split()  # noqa: SIM905
ROWS = 8
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "report_to": [], "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": True, "max_length": 64, "num_train_epochs": 4,
}  # fmt: skip


def rows() -> list[dict[str, str]]:
    draw = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS, n))

    return [
        {"prompt": text(3 + i % 4), "chosen": " " + text(1 + i % 5), "rejected": " " + text(1 + (3 * i) % 4)}
        for i in range(ROWS)
    ]


def sequences(batch: Any, prefix: str = "") -> list[Encoded]:
    """TRL's padded rows as sequences whose targets are the completion's tokens."""
    found = []
    for ids, real, mask in zip(
        batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], batch[f"{prefix}completion_mask"], strict=True
    ):
        keep = real.bool()
        found.append(Encoded(ids[keep].numpy().astype(np.int32), mask[keep].bool().numpy()))
    return found


def labelled(batch: Any, side: str) -> list[Encoded]:
    """The same of the experimental trainers, which mark targets by labels."""
    found = []
    for ids, real, labels in zip(
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"], strict=True
    ):
        keep = real.bool()
        found.append(Encoded(ids[keep].numpy().astype(np.int32), (labels[keep] != -100).numpy()))
    return found


def trainer_of(loss: str, model: Any, tokenizer: Any, folder: Path) -> Any:
    data, common = Dataset.from_list(rows()), {**COMMON, "output_dir": str(folder)}
    given = {"model": model, "train_dataset": data, "processing_class": tokenizer}
    if loss in ("dpo", "ipo"):
        kind = {"dpo": "sigmoid"}.get(loss, loss)
        return trl.DPOTrainer(args=trl.DPOConfig(loss_type=kind, beta=0.3, **common), **given)
    if loss == "kto":
        args = trl.KTOConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.75, **common)
        given["train_dataset"] = Dataset.from_list(
            [
                {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
                for i, r in enumerate(rows())
            ]
        )
        return trl.KTOTrainer(args=args, **given)
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(beta=0.3, **common), **given)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(loss_type="simpo", beta=1.7, simpo_gamma=0.6, cpo_alpha=0.0, **common)
    return CPOTrainer(args=config, **given)


SPECS = {
    "dpo": PreferenceSpec(loss="dpo", beta=0.3),
    "ipo": PreferenceSpec(loss="ipo", beta=0.3),
    "kto": PreferenceSpec(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.75),
    "orpo": PreferenceSpec(loss="orpo", beta=0.3),
    "simpo": PreferenceSpec(loss="simpo", beta=1.7, gamma=0.6),
}


def examples_of(loss: str, batch: Any) -> list[Example]:
    if loss == "kto":
        both = zip(sequences(batch), sequences(batch, "KL_"), batch["label"], strict=True)
        return [Example((own, other), {"wanted": float(label)}) for own, other, label in both]
    if loss in ("dpo", "ipo"):
        found = sequences(batch)
        pairs = [*zip(found[:ROWS], found[ROWS:], strict=True)]
    else:
        pairs = [*zip(labelled(batch, "chosen"), labelled(batch, "rejected"), strict=True)]
    return [Example((c, r, prompt_of(c)) if loss == "orpo" else (c, r)) for c, r in pairs]


def referenced(model: Any, examples: list[Example]) -> list[Example]:
    """The examples with what the model gives them now: the reference is the model at the start."""
    sums, _ = sequence_nll(model, sequences_of(examples), 2048)
    width = len(examples[0].sequences)
    found = (-sums).reshape(-1, width)
    return [
        Example(e.sequences, {**e.facts, **{f"{REFERENCE}{i}": float(v) for i, v in enumerate(values)}})
        for e, values in zip(examples, found, strict=True)
    ]


def moved(model: Any) -> None:
    """Another policy than the reference, so that no ratio is 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learnt(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("loss", SPECS)
def test_loss_gradient_and_training(loss: str, adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    theirs = copy.deepcopy(adapted)
    trainer = trainer_of(loss, theirs, tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    spec, settings = SPECS[loss], TrainingSpec(lr=1e-2, steps=4, batch_size=ROWS, max_length=64, schedule="constant")
    examples = referenced(adapted, examples_of(loss, batch)) if spec.facts.reference else examples_of(loss, batch)
    moved(adapted)
    moved(trainer.model)

    theirs_loss = trainer.compute_loss(trainer.model, batch)
    theirs_loss.backward()
    objective = PreferenceObjective(Tools(adapted, settings), spec)
    with packed(adapted):
        terms, divisor = objective.terms(objective.begin(examples))
        ours = terms.sum() / divisor
        ours.backward()
    assert loss != "kto" or objective.baseline > 0, "the baseline has a part in it"
    torch.testing.assert_close(ours, theirs_loss.reshape(()), rtol=1e-5, atol=0)
    other = {name.replace("module.", ""): p for name, p in learnt(trainer.model).items()}
    gradients = {name: p.grad for name, p in learnt(adapted).items()}
    assert gradients and all(g is not None and float(g.abs().max()) > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name].grad, atol=1e-5, rtol=1e-4)

    trainer.model.zero_grad()
    adapted.zero_grad()
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = TokenSet.of(examples)
    found = train(
        adapted,
        learnt(adapted),
        tokens,
        settings,
        Window(0, 1),
        generator_key=(0, "s"),
        rule=None,
        objective=PreferenceObjective(Tools(adapted, settings), spec),
    )
    assert len(expected) == found.steps == 4 and expected[0] > 1.02 * expected[-1]
    np.testing.assert_allclose(found.losses, expected, rtol=2e-5)
    for name, parameter in learnt(adapted).items():
        torch.testing.assert_close(parameter, other[name], atol=2e-4, rtol=0)
