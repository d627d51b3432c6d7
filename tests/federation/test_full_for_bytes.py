"""Full weights for a few bytes, through the engine: same bits everywhere, bytes, learning, resume, refusals."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedlm.algorithms.zeroth
from fedlm.algorithms.base import Place
from fedlm.data.federated import load_data
from fedlm.errors import ModelError, RecipeError
from fedlm.federation import coordinator
from fedlm.federation.api import about, new_run, run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Failure, Reply, Request, Tensors
from fedlm.models.adapters import completed, get_tensors
from fedlm.models.directions import SCALARS
from fedlm.models.load import restore
from fedlm.recipe.schema import Recipe
from tests.algorithms.observed import Observed
from tests.federation.conftest import Tiny

METHODS = ["fedkseed", "feedsign", "ferret"]
RATES = {
    "fedkseed": ("training.lr=1e-4",),
    "fedmezo": ("training.lr=1e-4",),
    "feedsign": ("federation.algorithm.server_lr=1e-3", "training.lr=5e-4"),
    "ferret": ("training.lr=1e-4", "federation.algorithm.seeds=256"),
}


def recipe(tiny: Tiny, name: str, *changes: str) -> Recipe:
    seeds = ["federation.algorithm.seeds=16"] if name == "fedkseed" else []
    common = ["federation.rounds=3", "federation.keep=all", "adapter={kind: full}", "training.steps=5"]
    return tiny.recipe(f"federation.algorithm.name={name}", *common, *seeds, *RATES[name], *changes)


@pytest.fixture(scope="module")
def unequal(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny federation's rows, site0 with three times as many as the others: weights are unequal."""
    base = tmp_path_factory.mktemp("unequal")
    rows = (tiny.base / "rows.jsonl").read_text().splitlines()
    kept = [row for i, row in enumerate(rows) if json.loads(row)["site"] == "site0" or i % 3 == 0]
    (base / "rows.jsonl").write_text("\n".join(kept))
    return base


@pytest.fixture(scope="module")
def runs(tiny: Tiny, unequal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bytes")
    for name in METHODS:
        run_recipe(recipe(tiny, name), base=unequal, run_dir=folder / name)
    return {name: folder / name for name in METHODS}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def checkpoint(run: Path, round_: int | None = None) -> Tensors:
    found = RunDir(run).load_checkpoint(round_)
    assert found is not None
    return found.parameters


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", METHODS)
def test_silos_load_the_very_weights_that_are_exported(
    name: str, runs: dict[str, Path], tiny: Tiny, unequal: Path
) -> None:
    """After each of three rounds: what a silo starts from, what it measures, what `completed` gives, the saved model;
    also when another silo has moved the weights in between, and whether rebuilt from the base or from a round before.
    """
    of = recipe(tiny, name)
    bench = Workbench(of, load_data(of, unequal))
    bench.load()
    base = get_tensors(bench.model)
    place = Place("site1", 0, 3, of.seed)
    seen = [base]
    for round_ in range(3):
        theta = checkpoint(runs[name], round_)
        exported = completed(bench.algorithm.exported(theta, {}), of)
        rule = bench.algorithm.local(bench.algorithm.broadcast(theta, {}, round_ + 1), {}, place)
        for tensors in (rule.start(), bench.algorithm.measured(bench.algorithm.evaluated(theta, {}), {}, place)):
            bench.put(tensors)
            assert equal(get_tensors(bench.model), exported)
            with torch.no_grad():
                for parameter in bench.model.parameters():
                    parameter.add_(0.01)
        seen.append(exported)
        assert not equal(exported, seen[-2])
    best = json.loads((runs[name] / "run.json").read_text())["best_round"]
    assert equal(load_file(runs[name] / "adapter" / "model.safetensors"), seen[best + 1])
    bench.put(bench.algorithm.measured(bench.algorithm.initial(dict), {}, place))
    assert equal(get_tensors(bench.model), base), "an empty description is the base"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedkseed", "feedsign"])  # all others go the same way
def test_the_number_of_workers_changes_no_bit(
    name: str, runs: dict[str, Path], tiny: Tiny, unequal: Path, tmp_path: Path
) -> None:
    run_recipe(recipe(tiny, name, "federation.workers=2"), base=unequal, run_dir=tmp_path / "run")
    assert equal(checkpoint(tmp_path / "run"), checkpoint(runs[name]))
    for one, other in zip(lines(tmp_path / "run"), lines(runs[name]), strict=True):
        assert one["validation"]["loss"] == other["validation"]["loss"] and one["loss"] == other["loss"]


def test_a_resumed_run_ends_in_the_same_bits(runs: dict[str, Path], tiny: Tiny, unequal: Path, tmp_path: Path) -> None:
    """Put back to the state after round 0, with the silos' folders lost."""
    name, run = "ferret", tmp_path / "run"
    shutil.copytree(runs[name], run)
    for gone in ("checkpoints/round-0001", "checkpoints/round-0002", "silos", "adapter"):
        shutil.rmtree(run / gone)
    meta = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(meta | {"status": "interrupted"}))
    run_recipe(recipe(tiny, name), base=unequal, run_dir=run, resume=True)
    assert equal(checkpoint(run), checkpoint(runs[name]))
    assert equal(*(load_file(r / "adapter" / "model.safetensors") for r in (run, runs[name])))


@pytest.mark.parametrize("name", METHODS)
def test_the_final_model_is_a_plain_model_folder_of_the_loss_that_was_measured(
    name: str, runs: dict[str, Path], tiny: Tiny, unequal: Path
) -> None:
    meta = json.loads((runs[name] / "run.json").read_text())
    of = recipe(tiny, name)
    other = of.model_copy(update={"model": of.model.model_copy(update={"source": str(runs[name] / "adapter")})})
    bench = Workbench(other, load_data(other, unequal))
    bench.load()
    tensors, fields = get_tensors(bench.model), {"role": "validation", "plain": True}
    answers = []
    for silo in bench.data.names:
        answer = Silo(silo, bench, unequal).handle(Request(silo, "evaluate", "run", 0, 0, tensors, fields))
        assert isinstance(answer, Reply), answer
        answers.append(answer)
    counts = [a.fields for a in answers if a.fields["examples"]]  # a silo may have no validation rows
    total, tokens = (sum(fields[name] for fields in counts) for name in ("loss_sum", "loss_tokens"))
    record = next(r for r in lines(runs[name]) if r["round"] == meta["best_round"])
    assert total / tokens == pytest.approx(record["validation"]["loss"], rel=1e-6)


def test_a_round_of_fedkseed_is_as_small_as_promised(runs: dict[str, Path]) -> None:
    """4 K down, 4 bytes a step up, and less than 512 bytes of framing, without anything that a schedule hides."""
    seeds, steps = 16, 5
    for record in lines(runs["fedkseed"])[1:]:
        for silo in record["silos"].values():
            assert silo["steps"] == steps
            up, down = silo["bytes_up"], silo["bytes_down"]
            assert 4 * steps <= up and 4 * seeds <= down
            assert up + down <= 4 * seeds + 8 * steps + 512


def test_feedsign_sends_one_bit_per_step(runs: dict[str, Path]) -> None:
    """Five steps are one byte; framing is the same for one step and for eight."""
    for number, record in enumerate(lines(runs["feedsign"])[1:]):
        for silo in record["silos"].values():
            assert silo["bytes_up"] <= 1 + 96
            assert silo["bytes_down"] <= -(-5 * number // 8) + 8 + 192


def test_no_silo_votes_on_more_steps_than_were_asked_for(tiny: Tiny, unequal: Path, tmp_path: Path) -> None:
    """Else it would vote alone on the further ones, and everybody would take them."""

    class Greedy(Observed):
        def exchange(self, requests: Any, deadline: float | None = None) -> Any:
            for answer in super().exchange(requests, deadline):
                if answer.verb == "train" and answer.silo == "site1":
                    votes = {"feedsign.votes": torch.full((2,), 255, dtype=torch.uint8)}
                    answer = replace(answer, tensors=votes, fields={**answer.fields, "steps": 16})
                yield answer

    of = recipe(tiny, "feedsign", "federation.rounds=1", "federation.quorum=0.5")
    engine = Greedy(of, unequal, tmp_path / "silos")
    with closing(new_run(of, tmp_path / "run", base=unequal, **about(engine.data))) as directory:
        coordinator.run(of, engine, directory)
    record = lines(tmp_path / "run")[1]
    assert record["replied"] == ["site0", "site2", "site3"]
    assert [f["reason"] for f in record["failures"]] == ["the reply says 16 steps, and 5 were asked for"]
    assert int(checkpoint(tmp_path / "run")["feedsign.steps"]) == 5


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after ten steps of ordinary training on everybody's rows."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = ("federation.rounds=2", "federation.algorithm.name=fedavg", "adapter={kind: full}")
    run_recipe(tiny.recipe(*changes, "training.steps=5", "training.lr=3e-3"), base=tiny.base, run_dir=folder)
    return folder / "adapter"


LEARNING = {
    "fedkseed": ("federation.algorithm.seeds=256", "training.lr=3e-4", "training.schedule=constant"),
    "fedmezo": ("training.lr=3e-4", "training.schedule=constant"),
    "feedsign": ("federation.algorithm.server_lr=1e-3", "training.lr=5e-4"),
    "ferret": ("federation.algorithm.seeds=4096", "training.lr=3e-4", "training.schedule=constant"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_trained_model_gets_better(name: str, tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    changes = [f"model.source={trained}", "training.steps=40" if name != "ferret" else "training.steps=8"]
    run_recipe(recipe(tiny, name, *changes, *LEARNING[name]), base=tiny.base, run_dir=tmp_path / "run")
    losses = [record["validation"]["loss"] for record in lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.01, losses


def test_fedmezo_trains_an_adapter_alone(tiny: Tiny, tmp_path: Path) -> None:
    changes = ["adapter={kind: lora, rank: 2, alpha: 16}", "training.steps=20", "training.schedule=constant"]
    of = recipe(tiny, "fedmezo", *changes, "training.lr=1e-3")
    run_recipe(of, base=tiny.base, run_dir=tmp_path / "run")
    losses = [record["validation"]["loss"] for record in lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.005, losses
    theta = checkpoint(tmp_path / "run")
    assert all(".lora_" in n for n in theta) and any(t.any() for n, t in theta.items() if ".lora_B." in n)


def test_fedmezo_sends_the_difference_of_what_it_loaded(tiny: Tiny, tmp_path: Path) -> None:
    """Unequal alpha and rank, three rounds: start + update is what the bench holds after training."""
    of = recipe(tiny, "fedmezo", "adapter={kind: lora, rank: 2, alpha: 6}", "training.lr=1e-2")
    bench = Workbench(of, load_data(of, tiny.base))
    bench.load()
    theta = bench.algorithm.initial(lambda: get_tensors(bench.model))
    for round_ in range(3):
        fields = {"round": round_, "rounds": 3, "accepted": round_ - 1}
        reply = Silo("site2", bench, tmp_path).handle(Request("site2", "train", "r", round_, 0, theta, fields))
        assert isinstance(reply, Reply), reply
        theta = {name: theta[name] + reply.tensors[name] for name in theta}
        for name, value in get_tensors(bench.model).items():
            torch.testing.assert_close(value, theta[name], rtol=0, atol=1e-7)
            assert reply.tensors[name].any(), name


@pytest.mark.parametrize("dtype, eps", [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_the_default_perturbation_is_one_that_the_dtypes_losses_resolve(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, eps: float
) -> None:
    asked: list[float] = []
    real = fedlm.algorithms.zeroth.train_zeroth

    def recorded(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["eps"])
        return real(*args, **kwargs)

    monkeypatch.setattr("fedlm.algorithms.zeroth.train_zeroth", recorded)
    for change in ("training.steps=1", "federation.algorithm.zo_eps=0.004"):
        of = recipe(tiny, "fedmezo", "adapter={kind: lora, rank: 2}", f"model.dtype={dtype}", change)
        bench = Workbench(of, load_data(of, tiny.base))
        bench.load()
        theta = bench.algorithm.initial(lambda b=bench: get_tensors(b.model))
        fields = {"round": 0, "rounds": 3, "accepted": -1}
        answer = Silo("site1", bench, tmp_path / change).handle(Request("site1", "train", "r", 0, 0, theta, fields))
        assert isinstance(answer, Reply), answer
    assert asked == [eps, 0.004]


def test_the_base_is_put_back_from_its_folder(tiny_model_dir: Path, tiny: Tiny) -> None:
    bench = Workbench(recipe(tiny, "fedkseed"), load_data(recipe(tiny, "fedkseed"), tiny.base))
    bench.load()
    before = get_tensors(bench.model)
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.mul_(2)
    assert equal(load_file(tiny_model_dir / "model.safetensors"), before), "training never reaches the file"
    restore(bench.model, tiny_model_dir)
    assert equal(get_tensors(bench.model), before)
    bench.model.stranger = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"no weight of the name 'stranger\.(bias|weight)'"):
        restore(bench.model, tiny_model_dir)


def test_a_full_cache_is_called_that(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = recipe(tiny, "fedkseed")
    bench = Workbench(of, load_data(of, tiny.base))
    bench.load()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fedlm.federation.silo.rebuilt.models_cache", lambda: tmp_path / "file" / "models")
    tensors = {SCALARS: torch.ones(16)}
    fields = {"round": 0, "rounds": 3, "accepted": -1}
    answer = Silo("site1", bench, tmp_path).handle(Request("site1", "train", "r", 0, 0, tensors, fields))
    assert isinstance(answer, Failure) and "the rebuilt model cannot be written" in answer.reason


REFUSED = [
    ("fedkseed", ("adapter={kind: lora}",), r"adapter.kind.*'fedkseed' trains full, not 'lora'"),
    ("feedsign", ("adapter={kind: ia3}",), r"'feedsign' trains full, not 'ia3'"),
    ("ferret", ("adapter={kind: lora}",), r"'ferret' trains full, not 'lora'"),
    ("fedkseed", ("model.dtype=bfloat16",), r"one fp32 copy of the weights: set it to float32"),
    ("fedmezo", ("training.optimizer=sgd",), r"training.optimizer.*has no effect with 'fedmezo'"),
    ("fedkseed", ("training.clip_norm=0.5",), r"training.clip_norm.*has no effect with 'fedkseed'"),
    ("fedkseed", ("training.gradient_checkpointing=true",), r"has no effect with 'fedkseed'"),
    ("feedsign", ("training.lr=0.1",), r"training.lr.*has no effect with 'feedsign'"),
    (
        "feedsign",
        ("training.steps=null", "training.epochs=1.0"),
        r"the same number of steps: give `steps`",
    ),
    ("feedsign", ("federation.algorithm.weights=tokens",), r"feedsign counts every silo the same"),
    ("feedsign", ("federation.algorithm.seeds=8",), r"has no effect with 'feedsign'"),
    ("ferret", ("federation.algorithm.per_block=3",), r"256 bases do not fill blocks of 3"),
    ("ferret", ("federation.algorithm.zo_eps=0.1",), r"has no effect with 'ferret'"),
    ("fedmezo", ("adapter={kind: lora, dropout: 0.1}",), r"adapter.dropout.*without dropout"),
]


@pytest.mark.parametrize("name, changes, reason", REFUSED)
def test_what_has_no_effect_or_cannot_be_is_refused(
    tiny: Tiny, name: str, changes: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe(tiny, name, *changes)


def test_more_bases_than_weights_end_in_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    of = recipe(tiny, "ferret", "federation.algorithm.seeds=1000000")
    bench = Workbench(of, load_data(of, tiny.base))
    fields = {"round": 0, "rounds": 3, "accepted": -1}
    theta = bench.algorithm.initial(dict)
    answer = Silo("site1", bench, tmp_path).handle(Request("site1", "train", "r", 0, 0, theta, fields))
    assert isinstance(answer, Failure) and "cannot be cut into 1000000 blocks" in answer.reason
