"""Guards both ways over every engine, and with silos that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.federation.api import about, new_run, run_recipe
from fedlm.federation.coordinator import run
from fedlm.federation.rundir import RunDir
from fedlm.messages import Tensors
from tests.federation.conftest import Tiny
from tests.federation.exchanges import running_ray
from tests.federation.test_engines import OPEN

BOTH = (
    "federation.algorithm.name=fedavg",
    "federation.rounds=3",
    "guards=[{name: int4, error_feedback: true}]",
    "federation.downlink={send: changed, guards: [{name: int8}]}",
)


def final(run_dir: RunDir) -> tuple[Tensors, Tensors]:
    checkpoint = run_dir.load_checkpoint()
    assert checkpoint is not None
    return checkpoint.parameters, checkpoint.server_state


def over(kind: str, tiny: Tiny, folder: Path) -> RunDir:
    recipe = tiny.recipe(*BOTH)
    data = load_data(recipe, tiny.base)
    directory = new_run(recipe, folder, base=tiny.base, **about(data))
    try:
        with OPEN[kind](recipe, data, tiny.base, folder, lambda _: None) as engine:
            run(recipe, engine, directory)
    finally:
        directory.close()
    return RunDir.open(folder, write=False)


@pytest.mark.slow
def test_engines_give_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    """Model, errors and the last payload."""
    pytest.importorskip("ray")
    runs = {kind: over(kind, tiny, tmp_path / kind) for kind in ("in-process", "workers", "flare")}
    with running_ray(tmp_path / "ray.log"):
        runs["ray"] = over("ray", tiny, tmp_path / "ray")
    wanted = final(runs.pop("in-process"))
    assert {name.split("/")[1] for name in wanted[1]} == {"error", "step"}
    for kind, directory in runs.items():
        for got, want in zip(final(directory), wanted, strict=True):
            assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want), kind
        assert not any(line["failures"] for line in directory.rounds()), kind


@pytest.mark.parametrize(
    "changes",
    [
        ("federation.algorithm.name=fedavg", "guards=[{name: topk, density: 0.2, error_feedback: true}, {name: int8}]"),
        ("federation.algorithm.name=flora", "guards=[{name: int4}]"),
        ("federation.algorithm.name=hetlora", "guards=[{name: lowrank, rank: 1}, {name: int8}]"),
    ],
    ids=["parts", "ranks", "shrinking ranks"],
)
def test_silos_that_differ(tiny: Tiny, tmp_path: Path, changes: tuple[str, ...]) -> None:
    """Ranks, or parts of the adapter, differ: every silo's update has shapes and messages of its own."""
    deal = "[{}, {layers: 1}]" if "fedavg" in changes[0] else "[{}, {rank: 1}, {rank: 3}]"
    recipe = (
        *changes,
        f"federation.capacity.dealt={deal}",
        "federation.rounds=3",
        "adapter.rank=4",
        "training.lr=0.02",
    )
    down = {"full": (), "changed": ("federation.downlink={send: changed}",)}
    runs = {
        way: run_recipe(tiny.recipe(*recipe, *more), base=tiny.base, run_dir=tmp_path / way).path
        for way, more in down.items()
    }
    full, changed = (RunDir.open(path, write=False) for path in runs.values())
    for got, want in zip(final(changed), final(full), strict=True):
        assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    lines = full.rounds()
    assert lines[-1]["validation"]["loss"] < lines[0]["validation"]["loss"] - 0.05
    assert not any(line["failures"] for line in [*lines, *changed.rounds()])
    assert sum(line["bytes_down"] for line in changed.rounds()) < 0.9 * sum(line["bytes_down"] for line in lines)
