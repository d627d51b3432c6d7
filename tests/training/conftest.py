"""A tiny model, its tokenizer, and sequences that share beginnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlm.training.sequences import Encoded
from tests.training.helpers import learnt, sequence


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def base(tiny_model_dir: Path) -> Any:
    """The tiny model in fp32 with weights large enough that its tokens matter to one another."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def adapted(base: Any) -> Module:
    """The tiny model with a LoRA adapter whose B is not zero, so that every adapter gradient is."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Module = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learnt(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def sequences() -> list[Encoded]:
    """A shared system prompt, one question with three answers, one short and one unrelated sequence, and a repeat."""
    system = (1, 20)
    return [
        sequence(system, (2, 15), (3, 6)),
        sequence((4, 31)),
        sequence(system, (2, 15), (5, 9)),
        sequence(system, (6, 3)),
        sequence(system, (2, 15), (7, 2), answer=2),
        sequence((8, 5)),
        sequence(system, (2, 15), (3, 6)),
        sequence(system, (2, 15)),
    ]
