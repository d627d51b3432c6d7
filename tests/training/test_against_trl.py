"""A few steps on the same batches give TRL's losses and weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.recipe.schema import TrainingSpec
from fedlm.training import batches as batch_order
from fedlm.training.encode import TokenSet
from fedlm.training.loop import Window, train
from fedlm.training.objective import sequences_of
from tests.training.helpers import learnt, sequence

trl = pytest.importorskip("trl", reason="the optional extra [bench] is not installed")


def test_losses_and_weights_of_sft_trainer(
    adapted: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    data = TokenSet.of(sequence((1, 12), (i, 4 + i % 9), answer=2 + i % 3) for i in range(2, 18))
    rows = [{"input_ids": e.ids.tolist(), "completion_mask": e.loss.astype(int).tolist()} for e in sequences_of(data)]
    theirs = copy.deepcopy(adapted)
    config = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-2, report_to=[],
        lr_scheduler_type="linear", max_grad_norm=1.0, completion_only_loss=True, bf16=False, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=64,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=theirs, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    class InOrder:
        def permutation(self, n: int) -> Any:
            return np.arange(n)

    monkeypatch.setattr(batch_order, "numpy_generator", lambda *_: InOrder())
    spec = TrainingSpec(lr=1e-2, epochs=1, batch_size=4, max_length=64, schedule="linear")
    ours = train(adapted, learnt(adapted), data, spec, Window(0, 1), generator_key=(0, "s"), rule=None)
    assert len(expected) == ours.steps == 4
    np.testing.assert_allclose(ours.losses, expected, rtol=1e-5)
    other = {n.replace("module.", ""): p for n, p in learnt(trainer.model).items()}
    for name, parameter in learnt(adapted).items():
        torch.testing.assert_close(parameter, other[name], atol=2e-4, rtol=0)
