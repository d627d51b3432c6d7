"""The GPU's own path: fused attention kernels over the same layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlm.training.attention import packed
from fedlm.training.forward import padded_nll, sequence_nll, target_nll
from fedlm.training.fused_lora import fused_lora
from fedlm.training.packing import pack
from fedlm.training.sequences import Encoded
from tests.training.helpers import learnt


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the GPU path of packed attention is NOT tested"
)
def test_packed_rows_on_a_gpu(adapted: Any, sequences: list[Encoded]) -> None:
    model = adapted.to("cuda")
    expected = padded_nll(model, sequences)
    expected.sum().backward()
    truth = {n: p.grad.clone() for n, p in learnt(model).items()}
    model.zero_grad()
    with packed(model), fused_lora(model):
        nll = target_nll(model, pack(sequences).to(torch.device("cuda")))
        nll.sum().backward()
    torch.testing.assert_close(nll, expected, atol=1e-4, rtol=1e-4)
    for name, parameter in learnt(model).items():
        torch.testing.assert_close(parameter.grad, truth[name], atol=1e-3, rtol=1e-3)


def test_the_fused_kernels_path_on_this_machine(
    adapted: Any, sequences: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code that a GPU runs, on the CPU: long rows take it here too."""
    short, _ = sequence_nll(adapted, sequences, 10_000)
    monkeypatch.setattr("fedlm.training.attention.SHORT", 0)
    fused, _ = sequence_nll(adapted, sequences, 10_000)
    np.testing.assert_allclose(fused, short, rtol=1e-5)
