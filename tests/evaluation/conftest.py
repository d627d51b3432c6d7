from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> tuple[Any, Any]:
    """The tiny model, with weights large enough that its answers differ, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def questions() -> Dataset:
    """24 choice rows of very different lengths, 2 to 5 choices each."""
    text = "the patient was given a dose of medicine and the bank lent money to the school"
    words = text.split()
    rows = []
    for i in range(24):
        question = " ".join(words[(i * k) % len(words)] for k in range(1, 3 + 2 * i)) + "?"
        choices = [
            " ".join(words[(i + 3 * c + k) % len(words)] for k in range(1 + (i + c) % 4)) for c in range(2 + i % 4)
        ]
        choices = [f"{text} {c}" if choices.index(text) != c else text for c, text in enumerate(choices)]
        rows.append(
            {
                "question": question,
                "choices": choices,
                "answer": i % len(choices),
                "label": str(i % 2),
                "domain": "test",
                "hash": f"{i:064x}",
            }
        )
    return Dataset.from_list(rows)
