"""Selection of rows through whole runs: the same bits with any number of workers and over a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.algorithms.base import Place
from fedlm.data.federated import load_data
from fedlm.errors import DataError, RunError, UpdateRefused
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.representatives import checked
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.selected import centroids, described, round_tokens
from fedlm.files import read_tensors
from fedlm.messages import Reply
from fedlm.models.fingerprint import fingerprint
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file

DQC = "data.selection={method: feddqc, keep: 0.5, stages: 2}"
HDS = "data.selection={method: fedhds, min_group: 2, dimensions: 3}"
SITES = [f"site{n}" for n in range(4)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_easy_rows_first_then_hard_ones(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    recipe = tiny.recipe("federation.rounds=2", DQC)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "one")
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "other-cache"))  # judged anew, in another process
    run_recipe(
        tiny.recipe("federation.rounds=2", "federation.workers=2", DQC), base=tiny.base, run_dir=tmp_path / "two"
    )
    assert same(tmp_path / "one", tmp_path / "two")

    bench = Workbench(recipe, load_data(recipe, tiny.base))
    bench.load()
    silos = rounds(tmp_path / "one")[1]["silos"]
    for name in SITES:
        kept = bench.training_tokens(name)
        whole = len(bench.silo_data(name).train)
        assert len(kept) == round(whole / 2) and kept.left_out == whole - len(kept)
        assert silos[name]["left_out"] == kept.left_out
        parts = [round_tokens(bench, Place(name, round_, 2, 0, 2), None) for round_ in range(2)]
        first, second = parts[0].facts["score"], parts[1].facts["score"]
        assert min(first) >= max(second) and len(first) + len(second) == len(kept)
        assert parts[0].left_out == kept.left_out  # rows of another stage are not left out


def stopping(once: Any) -> Any:
    def one_round(self: Any, state: Any) -> Any:
        if state.progress.round == 0:
            raise RunError("stopped here")
        return once(self, state)

    return one_round


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_rows(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, selection in (("dqc", DQC), ("hds", HDS)):
        recipe = tiny.recipe("federation.rounds=2", selection)
        whole, stopped = tmp_path / f"whole-{name}", tmp_path / f"stopped-{name}"
        run_recipe(recipe, base=tiny.base, run_dir=whole)
        with monkeypatch.context() as patch:
            patch.setattr(coordinator.Federation, "one_round", stopping(coordinator.Federation.one_round))
            with pytest.raises(RunError, match="stopped here"):
                run_recipe(recipe, base=tiny.base, run_dir=stopped)
        run_recipe(None, run_dir=stopped, resume=True)
        assert same(whole, stopped)


def test_a_threshold_that_no_row_reaches_ends_the_run(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe("data.selection={method: feddqc, threshold: 1000.0}")
    with pytest.raises(RunError, match="training rows has a score"):
        run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")


def test_rows_that_stand_for_all(tiny: Tiny, tmp_path: Path, tiny_model_dir: Path) -> None:
    """In a simulation with two workers and between organisations: the same groups, rows and bits."""
    pytest.importorskip("sklearn")
    recipe = tiny.recipe("federation.rounds=2", HDS, "federation.workers=2")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "local")
    chosen = json.loads((tmp_path / "local" / "selection.json").read_text())
    numbers = {silo: entry["chosen"] for silo, entry in chosen.items() if entry["chosen"]}
    lines = rounds(tmp_path / "local")[1]
    assert lines["sampled"] == sorted(numbers)
    bench = Workbench(recipe, load_data(recipe, tiny.base))
    bench.load()
    for silo, found in numbers.items():
        tokens, points, groups = described(bench, silo, recipe.data.selection)  # type: ignore[arg-type]
        assert len(groups) == chosen[silo]["groups"]
        rows = round_tokens(bench, Place(silo, 0, 2, 0, 2), found)
        assert len(rows) == len(found) and lines["silos"][silo]["left_out"] == len(tokens) - len(found)
        assert centroids(bench, silo).shape == (len(groups), 3)
        assert torch.allclose(
            centroids(bench, silo)[0].double(), torch.from_numpy(points[groups[0]].mean(0)), atol=1e-6
        )
    with pytest.raises(DataError, match="not this silo's"):
        round_tokens(bench, Place(next(iter(numbers)), 0, 2, 0, 2), [10_000])

    def owner(name: str, verbs: str) -> OwnSilo:
        folder = tmp_path / f"owner-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_bytes((tiny.base / "rows.jsonl").read_bytes())
        text = data_file(
            folder,
            "sources: [{name: rows, path: rows.jsonl, columns: {prompt: prompt, response: response}, "
            f"where: {{site: {name}}}}}]\n",
        )
        rules = folder / "policy.yaml"
        rules.write_text(f"models: {{tiny-model0: {tiny_model_dir}}}\nallow: {verbs}\n")
        return OwnSilo(name, tmp_path / f"states-{len(verbs)}", text, rules)

    there = tiny.recipe(
        "federation.rounds=2", HDS, "data.sources=[]", "data.partition=null", "data.at_silos=true",
    )  # fmt: skip
    asked = there.model_copy(update={"model": there.model.model_copy(update={"source": "/elsewhere/tiny-model0"})})
    silos = {name: owner(name, "[hello, train, evaluate, profile]") for name in SITES}
    with using(new_run(there, tmp_path / "network")) as directory:
        coordinator.run(there, Network(asked, silos, fingerprint(there.model)), directory)
    assert same(tmp_path / "local", tmp_path / "network")

    unwilling = {name: owner(name, "[hello, train, evaluate]") for name in SITES}
    with (
        using(new_run(there, tmp_path / "refused")) as directory,
        pytest.raises(RunError, match="'profile' is not allowed"),
    ):
        coordinator.run(there, Network(asked, unwilling, fingerprint(there.model)), directory)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "no centroids"),
        ({"centroids": torch.zeros(2, 3), "more": torch.zeros(1)}, "no centroids"),
        ({"centroids": torch.zeros(2, 3, dtype=torch.float64)}, "no centroids"),
        ({"centroids": torch.zeros(2, 4)}, "shape"),
        ({"centroids": torch.zeros(0, 3)}, "shape"),
        ({"centroids": torch.zeros(6, 3)}, "shape"),
        ({"centroids": torch.full((2, 3), float("nan"))}, "not finite"),
    ],
)
def test_centroids_that_no_honest_silo_sends(tiny: Tiny, found: dict[str, torch.Tensor], why: str) -> None:
    spec = tiny.recipe(HDS).data.selection
    assert spec is not None
    assert checked(Reply("a", "profile", "run", -1, tensors={"centroids": torch.zeros(5, 3)}), spec, 10).shape == (5, 3)
    with pytest.raises(UpdateRefused, match=why):
        checked(Reply("a", "profile", "run", -1, tensors=found), spec, 10)
