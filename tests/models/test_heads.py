"""A trained head leaves fedlm as transformers and PEFT know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, completed, initial_tensors, set_tensors
from fedlm.models.export import load_adapter, save_adapter, save_merged
from fedlm.models.heads import HEAD, add_head, head_of
from fedlm.models.load import load_base
from fedlm.recipe.heads import outputs_of
from fedlm.recipe.schema import Recipe
from fedlm.training.scores import scores_of, whole

LABELS = ["business", "politics", "tech"]
TEXTS = ["the patient was given a dose", "money", "the school lent science books and the bank <|im_end|>"]


def recipe(model: Path, adapter: dict[str, Any], task: str = "classify") -> Recipe:
    columns = {"question": "q", "choices": LABELS, "answer": "a"}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "model": {"source": str(model), "dtype": "float32", "device": "cpu"},
            "adapter": adapter,
            "data": {"silos": [{"name": "a", "sources": [{"path": "rows.jsonl", "columns": columns}]}]},
            "training": {"steps": 1},
        }
    )


def trained(of: Recipe) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in initial_tensors(of).items()}


def ours(of: Recipe, tensors: Tensors) -> torch.Tensor:
    model = attach(load_base(of.model), of.adapter, of.seed, outputs_of(of))
    set_tensors(model, tensors, of.adapter)
    tokenizer = AutoTokenizer.from_pretrained(of.model.source)
    sequences = [whole(list(tokenizer(text)["input_ids"]), tokenizer, 256) for text in TEXTS]
    return torch.from_numpy(scores_of(model, [s for s in sequences if s is not None], 512)).float()


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize("task", ["classify", "reward"])
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "ia3"}, {"rank": 2, "targets": ["q_proj"], "rslora": True}])
def test_the_adapter_is_a_sequence_classifiers(
    tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, Any], task: str
) -> None:
    of = recipe(tiny_model_dir, adapter, task)
    tensors = trained(of)
    save_adapter(tmp_path / "adapter", tensors, of)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, num_labels=3 if task == "classify" else 1, dtype=torch.float32
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"
    torch.testing.assert_close(logits(loaded, tiny_model_dir), ours(of, tensors), atol=1e-5, rtol=0)
    back = load_adapter(tmp_path / "adapter", of.adapter)
    assert back.keys() == tensors.keys() and HEAD in back
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "full"}])
def test_a_whole_model_is_a_plain_sequence_classifier(
    tiny_model_dir: Path, tmp_path: Path, adapter: dict[str, Any], tied: bool
) -> None:
    folder = tiny_model_dir
    if not tied:
        from transformers import AutoConfig

        folder = tmp_path / "untied"
        config = AutoConfig.from_pretrained(tiny_model_dir)
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    of = recipe(folder, adapter)
    tensors = trained(of)
    assert "lm_head.weight" not in tensors
    save_merged(tmp_path / "merged", tensors, of)
    folders = [tmp_path / "merged"]
    if of.adapter.kind == "full":
        save_adapter(tmp_path / "whole", tensors, of)
        folders.append(tmp_path / "whole")
        assert load_adapter(tmp_path / "whole", of.adapter).keys() == tensors.keys()
    for written in folders:
        loaded, report = AutoModelForSequenceClassification.from_pretrained(written, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded).__name__ == "LlamaForSequenceClassification"
        assert loaded.config.id2label == dict(enumerate(LABELS))
        torch.testing.assert_close(logits(loaded, written), ours(of, tensors), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapter", [{"rank": 4}, {"kind": "ia3"}, {"kind": "full"}])
def test_a_head_starts_at_zero_beside_the_same_first_values(tiny_model_dir: Path, adapter: dict[str, Any]) -> None:
    of = recipe(tiny_model_dir, adapter)
    first = initial_tensors(of)
    assert first[HEAD].shape == (3, 64) and first[HEAD].dtype == torch.float32 and not first[HEAD].any()
    plain = initial_tensors(of.model_copy(update={"task": "instruct"}))
    assert all(torch.equal(first[name], value) for name, value in plain.items())
    assert completed({HEAD: torch.ones(3, 64)} | ({} if adapter.get("kind") != "full" else first), of).keys() == set(
        first
    )


def test_what_has_no_head_or_cannot_have_one(tiny_model_dir: Path) -> None:
    of = recipe(tiny_model_dir, {})
    model = attach(load_base(of.model), of.adapter, 0)
    with pytest.raises(ModelError, match="has no head"):
        head_of(model)
    model.get_base_model().config.model_type = "speech_to_text"  # type: ignore[operator]
    with pytest.raises(ModelError, match="no sequence classification for the architecture 'speech_to_text'"):
        add_head(model, 2)
