"""The bench's engine with bad silos: what they send takes the place of what they trained, and nothing else changes."""

from __future__ import annotations

import importlib.util
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fedlm.data.federated import load_data
from fedlm.federation import coordinator
from fedlm.federation.api import about, new_run
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.rundir import RunDir
from fedlm.messages import Tensors
from fedlm.models.adapters import initial_tensors
from tests.federation.test_heads import base, recipe  # noqa: F401  (base is a fixture)

FILE = Path(__file__).parents[2] / "benchmarks" / "parts" / "bad_silos.py"


def bad_silos() -> Any:
    spec = importlib.util.spec_from_file_location("bad_silos", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BadSilos


def test_a_bad_silo_that_cancels_the_honest_one_leaves_the_model_where_it_was(base: Path, tmp_path: Path) -> None:  # noqa: F811
    of = recipe(base, "classify", "federation.rounds=2", "federation.algorithm={name: fedavg, weights: equal}")
    seen: list[tuple[int, list[str]]] = []

    def cancel(number: int, model: Tensors, updates: dict[str, Tensors]) -> dict[str, Tensors]:
        seen.append((number, sorted(updates)))
        assert all(torch.equal(model[name], first[name]) for name in first)
        assert any(value.abs().max() > 0 for value in updates["b"].values()), "it did train"
        return {"a": {name: -value for name, value in updates["b"].items()}}

    first, data = initial_tensors(of), load_data(of, base)
    with (
        closing(new_run(of, tmp_path / "run", base=base, **about(data))) as directory,
        closing(LocalEngine(of, data, tmp_path / "run", base=base)) as engine,
    ):
        assert coordinator.run(of, bad_silos()(engine, cancel), directory).status == "finished"
    checkpoint = RunDir.open(tmp_path / "run", write=False).load_checkpoint(1)
    assert checkpoint is not None and seen == [(0, ["a", "b"]), (1, ["a", "b"])]
    assert all(torch.equal(checkpoint.parameters[name], first[name]) for name in first)
