"""Heads against transformers' sequence classification and TRL's reward trainer, on the same batch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Module
from transformers import AutoModelForSequenceClassification

from fedlm.errors import DataError
from fedlm.models.adapters import attach, trainable
from fedlm.models.heads import HEAD, head_of
from fedlm.models.load import load_base
from fedlm.recipe.schema import AdapterSpec, EvaluationSpec, ModelSpec, Recipe, TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.encode import TokenSet
from fedlm.training.fused_lora import fused_lora
from fedlm.training.fused_norm import fused_norms
from fedlm.training.loop import Window, train
from fedlm.training.objective import Tools
from fedlm.training.scores import scores_of, sequence_scores, whole
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks import get_task
from fedlm.training.tasks.base import Held
from fedlm.training.tasks.reward import conversation

LABELS = ["bank", "school", "books"]


def of(model: Path, task: str, **more: Any) -> Recipe:
    columns = {"question": "q", "choices": LABELS, "answer": "a"}
    if task == "reward":
        columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "model": {"source": str(model), "dtype": "float32", "device": "cpu"},
            "data": {"silos": [{"name": "a", "sources": [{"path": "rows.jsonl", "columns": columns}]}]},
            "training": {"steps": 1},
            **more,
        }
    )


def with_head(base: Any, outputs: int, adapter: dict[str, Any] | None = None) -> Module:
    """A model whose adapter and head are not at their first values."""
    model = attach(base, AdapterSpec.model_validate(adapter or {"rank": 4}), 0, outputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def theirs(base: Any, folder: Path, outputs: int) -> Any:
    """transformers' own sequence classification with these weights."""
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs, dtype=torch.float32)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(own[name])
    return other.eval()


def padded(sequences: list[Encoded], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.from_numpy(s.ids.astype(np.int64)), 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(tokenizer: Any, *lengths: int) -> list[Encoded]:
    generator = np.random.default_rng(0)
    made = [whole([1, 5, 9, 3, 7, 11, 4, 8, *generator.integers(3, 512, n)], tokenizer, 256) for n in lengths]
    return [s for s in made if s is not None]


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_sequence_classification(
    base: Any, tokenizer: Any, tiny_model_dir: Path, packing: bool
) -> None:
    model = with_head(base, 3, {"kind": "full"})
    other = theirs(model, tiny_model_dir, 3)
    sequences, right = texts(tokenizer, 20, 3, 33, 9, 1), [0, 2, 1, 1, 0]
    spec = TrainingSpec(steps=1, packing=packing)
    objective = get_task("classify", of(tiny_model_dir, "classify")).objective(Tools(model, spec))
    examples = [Example((s,), {"label": float(k)}) for s, k in zip(sequences, right, strict=True)]
    examples = objective.begin(examples)
    if packing:
        with packed(model):
            parts = [objective.terms(examples[:2]), objective.terms(examples[2:])]
    else:
        parts = [objective.terms(examples[:2]), objective.terms(examples[2:])]
    loss = sum(terms.sum() / divisor for terms, divisor in parts)
    loss.backward()  # type: ignore[union-attr]
    expected = other(**padded(sequences, tokenizer.pad_token_id), labels=torch.tensor(right))
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=0)
    wanted = dict(other.named_parameters())
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-6, rtol=1e-5)
    assert "score.weight" in wanted and objective.figures["accuracy"][1] == 5


@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "ia3"}, {"kind": "full"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_padded_fused_and_checkpointed_scores_agree(
    base: Any, tokenizer: Any, adapter: dict[str, Any], checkpointing: bool
) -> None:
    model = with_head(base, 2, adapter)
    sequences = texts(tokenizer, 20, 3, 33, 9, 0)
    found = []
    for packing in (True, False):
        model.zero_grad()
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        if packing:
            with packed(model), fused_lora(model), fused_norms(model):
                scores = sequence_scores(model, sequences)
                scores.square().sum().backward()
        else:
            scores = sequence_scores(model, sequences, packing=False)
            scores.square().sum().backward()
        found.append((scores.detach(), {n: p.grad for n, p in trainable(model).items()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-6, rtol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=2e-5, rtol=1e-4)
    measured = scores_of(model, sequences, 40)
    np.testing.assert_allclose(measured, found[0][0].numpy(), atol=2e-6)


def test_a_bf16_base_has_its_head_in_fp32(tiny_model_dir: Path, tokenizer: Any) -> None:
    spec = ModelSpec.model_validate({"source": str(tiny_model_dir), "dtype": "bfloat16", "device": "cpu"})
    model = with_head(load_base(spec), 2)
    fine = with_head(load_base(spec.model_copy(update={"dtype": "float32"})), 2)
    sequences = texts(tokenizer, 20, 3)
    with packed(model), packed(fine):
        scores, wanted = sequence_scores(model, sequences), sequence_scores(fine, sequences)
    assert scores.dtype == head_of(model).weight.dtype == torch.float32
    scores.sum().backward()
    torch.testing.assert_close(scores, wanted, atol=0.03, rtol=0)
    gradient = trainable(model)[HEAD].grad
    assert gradient is not None and gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize(("task", "start"), [("classify", math.log(3)), ("reward", math.log(2))])
def test_a_new_head_knows_nothing_and_learns(tiny_model_dir: Path, tokenizer: Any, task: str, start: float) -> None:
    recipe = of(tiny_model_dir, task)
    model = attach(load_base(recipe.model), recipe.adapter, 0, 3 if task == "classify" else 1)
    unit = get_task(task, recipe)
    if task == "classify":
        rows = [
            {"question": f"the {label} was given", "choices": LABELS, "answer": i} for i, label in enumerate(LABELS)
        ]
    else:
        rows = [{"prompt": "the bank", "chosen": "lent money", "rejected": word} for word in ("was", "and", "patient")]
    data = TokenSet.of([e for row in rows for e in unit.examples(row, tokenizer, 64)])
    spec = TrainingSpec(steps=12, lr=2e-2, max_length=64, batch_size=3)
    result = train(
        model, trainable(model), data, spec, Window(0, 1), generator_key=(0, "a"), rule=None,
        objective=unit.objective(Tools(model, spec, tokenizer)),
    )  # fmt: skip
    assert result.losses[0] == pytest.approx(start, abs=1e-6)
    assert result.losses[-1] < 0.2 * start
    assert result.loss_count == 36


def test_what_is_measured_adds_up_to_accuracy_and_macro_f1(tiny_model_dir: Path, tokenizer: Any) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="it comes with the optional extra [eval]")
    from fedlm.evaluation import measure, summarise

    recipe = of(tiny_model_dir, "classify")
    model = with_head(load_base(recipe.model), 3)
    task = get_task("classify", recipe)
    words = ["patient", "dose", "medicine", "bank", "money", "school", "science", "books"]
    draw = np.random.default_rng(1)
    rows = [
        {"question": " ".join(draw.choice(words, 5)), "choices": LABELS, "answer": int(draw.integers(3))}
        for _ in range(40)
    ]
    parts = {"a": rows[:15], "b": rows[15:]}
    counts = {
        silo: measure(model, tokenizer, part, "choice", task, EvaluationSpec(), max_length=64, items=True)
        for silo, part in parts.items()
    }
    found = summarise(counts)
    held = [task.examples(row, tokenizer, 64)[0] for row in rows]
    answers = scores_of(model, [e.sequences[0] for e in held], 512).argmax(1)
    right = [row["answer"] for row in rows]
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(right, answers))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(right, answers, average="macro"))
    assert found["accuracy_interval"][0] < found["accuracy"] < found["accuracy_interval"][1]
    assert "perplexity" not in found and not any("/" in name for name in found)
    assert sum(counts["a"]["items"]["choice"]) == counts["a"]["figures"]["accuracy"][0]


def test_rewards_and_loss_are_those_of_trl(base: Any, tokenizer: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the optional extra [bench] is not installed")
    from datasets import Dataset

    model = with_head(base, 1, {"kind": "full"})
    other = theirs(model, tiny_model_dir, 1)
    rows = [
        {"prompt": "the bank", "chosen": "lent money", "rejected": "was a school"},
        {"prompt": "the patient", "chosen": "was given a dose of medicine", "rejected": "and"},
    ]
    recipe = of(tiny_model_dir, "reward", reward={"center": 0.3})
    task = get_task("reward", recipe)
    spec = TrainingSpec(steps=1)
    objective = task.objective(Tools(model, spec))
    examples = objective.begin([e for row in rows for e in task.examples(row, tokenizer, 64)])
    with packed(model):
        terms, divisor = objective.terms(examples)
    loss = terms.sum() / divisor
    loss.backward()
    config = trl.RewardConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, center_rewards_coefficient=0.3,
        per_device_train_batch_size=2, gradient_checkpointing=False, max_length=64, disable_dropout=True,
    )  # fmt: skip
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    trainer = trl.RewardTrainer(
        model=other, args=config, train_dataset=Dataset.from_list(chats), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    expected = trainer.compute_loss(other, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    wanted = dict(other.named_parameters())
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-4)


def test_pairs_and_rows_that_are_refused(tokenizer: Any, tiny_model_dir: Path) -> None:
    task = get_task("reward", of(tiny_model_dir, "reward"))
    row = {
        "question": "which?",
        "choices": ["bank", "school", "school"],
        "answer": 0,
        "row": "rows.jsonl:4",
        "hash": "h",
    }
    (found,) = task.examples(row, tokenizer, 64)
    said = [tokenizer.decode(s.ids).split("assistant\n")[1] for s in found.sequences]
    assert said == ["bank<|im_end|>\n", "school<|im_end|>\n"]
    for bad, words in (
        ({"choices": ["school", "school "]}, "every option of the row is the right one"),
        ({"choices": None}, "pairs come from"),
    ):
        with pytest.raises(DataError, match=rf"^rows.jsonl:4: .*{words}") as caught:
            task.examples(row | bad, tokenizer, 64)
        assert "school" not in str(caught.value)
    with pytest.raises(DataError, match=r"^rows.jsonl:4: .*above `training.max_length` \(12\)"):
        task.examples(row, tokenizer, 12)
    model = with_head(load_base(of(tiny_model_dir, "reward").model), 1)
    figures = task.measure(Held([row], model, tokenizer, 12, 512, skip=True)).figures
    assert figures["loss"] == figures["reward_accuracy"] == (0.0, 0.0)


def test_the_token_that_is_read_is_the_last_that_is_not_padding(tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    assert whole([5, 6, pad, pad], tokenizer, 9).ids.tolist() == [5, 6]  # type: ignore[union-attr]
    assert whole([5, 6, pad, 7, 8], tokenizer, 3).ids.tolist() == [5, 6]  # type: ignore[union-attr]
    assert whole([pad, pad], tokenizer, 9) is None
    kept = conversation(tokenizer, [{"role": "user", "content": "why"}], "so", 64)
    assert tokenizer.decode(kept.ids).endswith("so<|im_end|>\n")


def test_a_class_that_is_none_of_the_runs(tokenizer: Any, tiny_model_dir: Path) -> None:
    task = get_task("classify", of(tiny_model_dir, "classify"))
    with pytest.raises(DataError, match=r"^f:1: the row's class is none") as caught:
        task.examples({"question": "q", "choices": ["secret", "bank"], "answer": 0, "row": "f:1"}, tokenizer, 64)
    assert "secret" not in str(caught.value)
    rows = [{"question": "q", "choices": ["secret", "bank"], "answer": a, "row": "f:1"} for a in (0, 1)]
    model = with_head(load_base(of(tiny_model_dir, "classify").model), 3)
    found = task.measure(Held(rows, model, tokenizer, 64, 512, skip=True))
    assert found.figures["loss"][1] == 1


def test_a_selectors_loss_is_the_cross_entropy_of_two_letters(base: Any, tokenizer: Any, tiny_model_dir: Path) -> None:
    task = get_task("selector", of(tiny_model_dir, "reward").model_copy(update={"task": "selector"}))
    rows = [
        {"prompt": "the bank", "chosen": "lent money", "rejected": "was a school"},
        {"prompt": "the patient", "chosen": "was given a dose of medicine", "rejected": "and"},
    ]
    examples = [e for row in rows for e in task.examples(row, tokenizer, 256)]
    said = [tokenizer.decode(e.sequences[0].ids) for e in examples]
    assert [text[-1] for text in said] == ["A", "B", "A", "B"]
    assert "Answer A: lent money\n\nAnswer B: was a school" in said[0]
    assert "Answer A: was a school\n\nAnswer B: lent money" in said[1]
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]
    losses = []
    for packing in (True, False):
        objective = task.objective(Tools(base, TrainingSpec(steps=1, packing=packing), tokenizer))
        with packed(base) if packing else nullcontext():
            terms, divisor = objective.terms(objective.begin(examples))
        losses.append(terms.detach())
        assert divisor == 4
    wanted = []
    for example, right in zip(examples, (0, 1, 0, 1), strict=True):
        row = torch.from_numpy(example.sequences[0].ids[None, :-1].astype(np.int64))
        two = base(input_ids=row).logits[0, -1, letters]
        wanted.append(float(-torch.log_softmax(two, 0)[right]))
    for found in losses:
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-6)
    measured = task.measure(Held(rows, base, tokenizer, 256, 512))
    total, count = measured.figures["loss"]
    assert count == 2 and total / count == pytest.approx(np.mean(wanted), abs=1e-6)
    odds = [wanted[i + 1] + wanted[i] for i in (0, 2)]  # of both orders: below 2 log 2 where the right one is likelier
    assert measured.items["nll"] == pytest.approx([o / 2 for o in odds], abs=1e-6)
    with pytest.raises(DataError, match=r"^f:1: .*`training.max_length` is 20"):
        task.examples(rows[0] | {"row": "f:1"}, tokenizer, 20)
