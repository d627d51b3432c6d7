"""Real text (this project's own pages), a tiny model in fp32, and one step of SGD on a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGES = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def pages() -> list[str]:
    """The paragraphs of prose in docs/, in the order of the files."""
    paragraphs = [p for file in sorted(PAGES.glob("*.md")) for p in file.read_text().split("\n\n")]
    return [" ".join(p.split()) for p in paragraphs if len(p) > 150 and p[0].isalpha()]


@pytest.fixture
def base(tiny_model_dir: Path) -> Any:
    """The tiny model, with weights large enough that its tokens matter to one another."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()
