"""A real silo: agrees by version, policy and fingerprint, goes on after a restart, gives a simulation's bits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlm
import fedlm.federation.silo.agreements
import fedlm.federation.silo.own
import fedlm.models.load
from fedlm.data.federated import load_data
from fedlm.errors import ModelError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.own import NOT_AGREED, OwnSilo
from fedlm.federation.silo.versions import compatible
from fedlm.files import read_tensors
from fedlm.messages import Failure, FailureKind, Fields, Reply, Request
from fedlm.models.adapters import initial_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file, greeting

SOURCE = "{path: rows.jsonl, columns: {prompt: prompt, response: response}, where: {site: %s}}"
SITES = [f"site{n}" for n in range(4)]


@pytest.fixture
def recipe(tiny: Tiny) -> Recipe:
    """Each silo brings its own text; the model goes by a name that the owner's policy knows."""
    made = tiny.recipe("data.sources=[]", "data.partition=null", "data.at_silos=true")
    return made.model_copy(update={"model": made.model.model_copy(update={"source": "/at/the/coordinator/tiny"})})


@pytest.fixture
def owner(tiny: Tiny, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., OwnSilo]:
    """A silo of this name, whose policy maps the model; `policy` adds lines."""

    def make(name: str = "site1", policy: str = "", data: str | None = None) -> OwnSilo:
        folder = tmp_path / f"owner-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_bytes((tiny.base / "rows.jsonl").read_bytes())
        text = data_file(folder, data or f"sources: [{SOURCE % name}]\n")
        rules = folder / "policy.yaml"
        rules.write_text(f"models: {{tiny: {tiny_model_dir}}}\n{policy}")
        return OwnSilo(name, tmp_path / "states", text, rules)

    return make


def hello(recipe: Recipe, /, run: str = "run", silo: str = "site1", **changes: Any) -> Request:
    return Request(silo, "hello", run, -1, fields=greeting(recipe, **changes))


def train(recipe: Recipe, tiny: Tiny, round_: int = 0, run: str = "run") -> Request:
    tensors = initial_tensors(recipe.model_copy(update={"model": tiny.recipe().model}))
    if recipe.federation.algorithm.name == "scaffold":
        from fedlm.algorithms import get_algorithm

        algorithm = get_algorithm(recipe.federation.algorithm)
        tensors = algorithm.broadcast(tensors, algorithm.init_state(tensors), 0)
    return Request("site1", "train", run, round_, 0, tensors, {"round": round_, "rounds": 4, "accepted": -1})


def reply_of(answer: Reply | Failure) -> Reply:
    assert isinstance(answer, Reply), answer
    return answer


def failure_of(answer: Reply | Failure, kind: FailureKind) -> str:
    assert isinstance(answer, Failure) and answer.kind is kind, answer
    return answer.reason


def test_the_bits_are_those_of_a_run_on_one_machine(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path
) -> None:
    """Stateful algorithm, AdamW, four rounds; the recipe on one machine names the same sources."""
    own = [{"name": n, "sources": [{**_source(n), "path": str(tiny.base / "rows.jsonl")}]} for n in SITES]
    simulated = Recipe.model_validate(
        {**tiny.recipe().model_dump(mode="json"), "data": {**recipe.data.model_dump(), "at_silos": False, "silos": own}}
    )
    local = run_recipe(simulated, run_dir=tmp_path / "local")

    silos = {name: owner(name) for name in SITES}
    whole = recipe.model_copy(update={"model": tiny.recipe().model})
    network = Network(recipe, silos, fingerprint(whole.model))
    with using(new_run(whole, tmp_path / "network")) as directory:
        there = coordinator.run(whole, network, directory)
    wanted = read_tensors(tmp_path / "local" / "adapter" / "adapter_model.safetensors")
    got = read_tensors(tmp_path / "network" / "adapter" / "adapter_model.safetensors")
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[n], got[n]) for n in wanted)
    assert local.evaluation == there.evaluation


def _source(site: str) -> dict[str, Any]:
    return {"columns": {"prompt": "prompt", "response": "response"}, "where": {"site": site}}


# ------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"protocol": 2}, ("protocol 1", "2")),
        ({"protocol": None}, ("protocol 1", "says nothing")),
        ({"fedlm": "0.2.0"}, (f"fedlm {fedlm.__version__}", "0.2.0")),
        ({"fedlm": None}, (f"fedlm {fedlm.__version__}", "says nothing")),
        ({"schema": 2}, ("schema 1", "2")),
        ({"recipe": {"schema_version": 3, "what_is": "not known yet"}}, ("schema 1", "3")),
    ],
)
def test_other_versions_are_told_before_the_recipe_is_read(
    recipe: Recipe,
    owner: Callable[..., OwnSilo],
    monkeypatch: pytest.MonkeyPatch,
    changes: Fields,
    both: tuple[str, str],
) -> None:
    monkeypatch.setattr(fedlm.federation.silo.own, "parse_recipe", lambda _: pytest.fail("the recipe was read"))
    reason = failure_of(owner().handle(hello(recipe, **changes)), FailureKind.VERSION_MISMATCH)
    assert all(text in reason for text in both)


def test_which_versions_work_together() -> None:
    assert compatible("0.1.0", "0.1.0") and compatible("1.0.0", "1.9.3") and compatible("2.1", "2.1")
    for a, b in (("0.1.0", "0.1.1"), ("1.0", "2.0"), ("0.9", "1.0"), ("", "0.1"), ("x.1", "x.2")):
        assert not compatible(a, b) and not compatible(b, a)


@pytest.mark.parametrize("sent", [None, [], "recipe", {}, {"name": "x", "training": {"steps": 0}}])
def test_no_valid_recipe_is_refused(recipe: Recipe, owner: Callable[..., OwnSilo], sent: Any) -> None:
    reason = failure_of(owner().handle(hello(recipe, recipe=sent)), FailureKind.REFUSED)
    assert "recipe" in reason


def test_faults_of_a_recipe_are_named(recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    sent = recipe.model_dump(mode="json")
    sent["training"]["steps"] = 0
    sent["surprise"] = True
    reason = failure_of(owner().handle(hello(recipe, recipe=sent)), FailureKind.REFUSED)
    assert "training.steps" in reason and "unknown field" in reason


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_another_model_is_told_with_both_hashes(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, part: str
) -> None:
    ours = fingerprint(tiny.recipe().model)
    theirs = {**ours, part: "0123456789abcdef" * 4}
    silo = owner()
    reason = failure_of(silo.handle(hello(recipe, model=theirs)), FailureKind.VERSION_MISMATCH)
    assert ours[part][:12] in reason and "0123456789ab" in reason and ours[part][:13] not in reason
    assert failure_of(silo.handle(train(recipe, tiny)), FailureKind.REFUSED) == NOT_AGREED
    assert not list(tmp_path.glob("states/**/recipe.json"))
    failure_of(silo.handle(hello(recipe, model="nonsense")), FailureKind.VERSION_MISMATCH)


# ------------------------------------------------------------------------------------------------ agreeing


def test_hello_tells_versions_counts_and_the_model(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    fields = reply_of(owner().handle(hello(recipe))).fields
    assert fields["model"] == fingerprint(tiny.recipe().model) and fields["schema"] == 1
    assert sum(fields["card"]["rows"].values()) == 30 and fields["versions"]["fedlm"] == fedlm.__version__


def test_the_recipe_says_how_rows_are_split(recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    whole = variant(recipe, data={"split": {"validation": 0.0, "test": 0.0}})
    rows = reply_of(owner().handle(hello(whole))).fields["card"]["rows"]
    assert rows == {"train": 30, "validation": 0, "test": 0}


def test_labels_only_where_the_owner_says_so(recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    text = "sources: [{path: rows.jsonl, columns: {prompt: prompt, response: response, label: site}}]\n"
    assert reply_of(owner(data=text).handle(hello(recipe))).fields["card"]["labels"] == {}
    shared = owner(data=text, policy="share_labels: true\n").handle(hello(recipe))
    assert reply_of(shared).fields["card"]["labels"] == dict.fromkeys(SITES, 30)


def test_nothing_is_answered_before_agreeing(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    silo = owner()
    assert failure_of(silo.handle(train(recipe, tiny)), FailureKind.REFUSED) == NOT_AGREED
    reply_of(silo.handle(hello(recipe)))
    assert failure_of(silo.handle(train(recipe, tiny, run="other")), FailureKind.REFUSED) == NOT_AGREED
    reply_of(silo.handle(train(recipe, tiny)))


def test_a_refused_run_is_not_agreed(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    """The rows are counted last, when the model already stands there."""
    silo = owner(policy="min_rows: 1000\n")
    reason = failure_of(silo.handle(hello(recipe)), FailureKind.REFUSED)
    assert "min_rows: 1000" in reason and "18" not in reason
    assert failure_of(silo.handle(train(recipe, tiny)), FailureKind.REFUSED) == NOT_AGREED


@pytest.mark.parametrize("run", ["../x", "a/b", "", ".hidden", "a" * 201, "a\n"])
def test_names_of_runs_cannot_leave_their_folder(
    recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, run: str
) -> None:
    failure_of(owner().handle(hello(recipe, run=run)), FailureKind.REFUSED)
    kept = [path.name for path in (tmp_path / "states").rglob("*") if path.is_file()]
    assert kept and all(name.startswith("_audit.jsonl") for name in kept)


def test_refused_or_given_up_before_anything_is_loaded(
    recipe: Recipe, owner: Callable[..., OwnSilo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "__init__", lambda *_: pytest.fail("a bench was made"))
    for silo in ("site2", "_pooled"):
        reason = failure_of(owner().handle(hello(recipe, silo=silo)), FailureKind.REFUSED)
        assert "another silo" in reason
    reason = failure_of(owner().handle(Request("site1", "chat", "run", 0)), FailureKind.REFUSED)
    assert "'chat' is not allowed here" in reason
    reason = failure_of(owner(policy="allow: [train]\n").handle(hello(recipe)), FailureKind.REFUSED)
    assert "allowed: train" in reason
    failure_of(owner().handle(hello(recipe), should_stop=lambda: True), FailureKind.TIMED_OUT)


def test_greeted_again_with_another_recipe(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    silo = owner()
    reply_of(silo.handle(hello(recipe)))
    training = recipe.training.model_copy(update={"lr": 0.5})
    reason = failure_of(silo.handle(hello(recipe.model_copy(update={"training": training}))), FailureKind.REFUSED)
    assert "training.lr: 0.01 -> 0.5" in reason
    federation = recipe.federation.model_copy(update={"workers": 2, "keep": "all"})
    reply_of(silo.handle(hello(recipe.model_copy(update={"federation": federation}))))
    reply_of(silo.handle(train(recipe, tiny)))


# ------------------------------------------------------------------------------------------------ restarts


def agreed(tmp_path: Path) -> Path:
    return tmp_path / "states" / "site1" / "run" / "recipe.json"


def test_a_restarted_worker_goes_on(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    first = owner()
    reply_of(first.handle(hello(recipe)))
    before = reply_of(first.handle(train(recipe, tiny)))
    assert agreed(tmp_path).stat().st_mode & 0o777 == 0o600
    after = reply_of(owner().handle(train(recipe, tiny)))
    assert after.fields["repeated"] and all(torch.equal(after.tensors[n], t) for n, t in before.tensors.items())
    accepted = train(recipe, tiny, round_=1)
    accepted.fields["accepted"] = 0
    reply_of(owner().handle(accepted))


@pytest.mark.parametrize("harm", ["cut", "changed", "layout"])
def test_a_damaged_agreement_is_said(
    tiny: Tiny,
    recipe: Recipe,
    owner: Callable[..., OwnSilo],
    tmp_path: Path,
    harm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reply_of(owner().handle(hello(recipe)))
    file = agreed(tmp_path)
    text = file.read_text()
    changed = {
        "cut": text[:-40],
        "changed": text.replace('"lr": 0.01', '"lr": 0.02'),
        "layout": text.replace('"layout": 1', '"layout": 2'),
    }
    assert changed[harm] != text
    file.write_text(changed[harm])
    reason = failure_of(owner().handle(train(recipe, tiny)), FailureKind.ERROR)
    assert ("layout 2" if harm == "layout" else "damaged") in reason
    assert str(tmp_path) not in reason and str(file) in caplog.text  # where it lies is the owner's business


def test_after_a_restart_the_policy_of_now_holds(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    reply_of(owner().handle(hello(recipe)))
    reason = failure_of(owner(policy="algorithms: [fedavg]\n").handle(train(recipe, tiny)), FailureKind.REFUSED)
    assert "algorithms: fedavg" in reason


def test_changed_rows_end_a_run(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    reply_of(owner().handle(hello(recipe)))
    silo = owner()
    rows = tmp_path / "owner-site1" / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"prompt": "new", "response": "row", "site": "site1"}) + "\n")
    assert "rows have changed" in failure_of(silo.handle(train(recipe, tiny)), FailureKind.REFUSED)
    assert "rows have changed" in failure_of(silo.handle(hello(recipe)), FailureKind.REFUSED)
    reply_of(silo.handle(hello(recipe, run="a-new-one")))


def test_another_fedlm_does_not_go_on_with_a_run(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fedlm, "__version__", "0.0.9")
        reply_of(owner().handle(hello(recipe, fedlm="0.0.9")))
    reason = failure_of(owner().handle(train(recipe, tiny)), FailureKind.VERSION_MISMATCH)
    assert "0.0.9" in reason and fedlm.__version__ in reason


def test_a_full_disk_is_said(
    tiny: Tiny,
    recipe: Recipe,
    owner: Callable[..., OwnSilo],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the coordinator without a path, to the owner with it, while greeting and while training."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    silo = owner()
    reply_of(silo.handle(hello(recipe)))
    monkeypatch.setattr("fedlm.federation.silo.state.write_tensors", full)
    monkeypatch.setattr(fedlm.federation.silo.agreements, "write_json", full)
    for request in (train(recipe, tiny), hello(recipe, run="another")):
        caplog.clear()
        reason = failure_of(silo.handle(request), FailureKind.ERROR)
        assert "the silo's state cannot be written (its disk is full)" in reason and str(tmp_path) not in reason
        assert str(tmp_path) in caplog.text and f"'{request.verb}' of run" in caplog.text


# ------------------------------------------------------------------------------------------------ one model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts loadings of the base model."""
    real, calls = fedlm.models.load.load_base, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(fedlm.models.load, "load_base", counted)
    return calls


def variant(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with fields of one part changed: variant(r, adapter={"rank": 3})."""
    data = recipe.model_dump(mode="json")
    for part, values in changes.items():
        data[part] = {**data[part], **values} if isinstance(values, dict) else values
    return Recipe.model_validate(data)


def test_the_model_stays_between_rounds_and_runs(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], loads: list[int]
) -> None:
    """Runs of other seeds and algorithms in turns, on one loading: the bits of silos that serve one run each."""
    other = variant(recipe, seed=5, training={"max_length": 32}, federation={"algorithm": {"name": "fedavg"}})
    wanted = {}
    for run, made in (("alone", recipe), ("other", other)):
        silo = owner()
        reply_of(silo.handle(hello(made, run=run)))
        wanted[run] = reply_of(silo.handle(train(made, tiny, run=run))).tensors
    assert len(loads) == 2
    silo = owner()
    for run, made in (("1", recipe), ("2", other), ("3", recipe)):
        reply_of(silo.handle(hello(made, run=run)))
    for run, made, same in (
        ("2", other, "other"),
        ("1", recipe, "alone"),
        ("3", recipe, "alone"),
        ("2", other, "other"),
    ):
        got = reply_of(silo.handle(train(made, tiny, run=run))).tensors
        assert got.keys() == wanted[same].keys() and all(torch.equal(got[n], wanted[same][n]) for n in got)
    assert len(loads) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"rank": 3}},
        {"adapter": {"kind": "ia3", "rank": 8, "alpha": 16.0}},
        {"federation": {"threads": 2}},
        {"model": {"dtype": "bfloat16"}},
    ],
)
def test_another_model_takes_the_place(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], loads: list[int], change: dict[str, Any]
) -> None:
    other = variant(recipe, **change)
    silo = owner()
    reply_of(silo.handle(hello(recipe, run="a")))
    reply_of(silo.handle(hello(other, run="b")))
    got = reply_of(silo.handle(train(recipe, tiny, run="a")))
    fresh = owner()
    reply_of(fresh.handle(hello(recipe, run="c")))
    wanted = reply_of(fresh.handle(train(recipe, tiny, run="c")))
    assert len(loads) == 4 and all(torch.equal(got.tensors[n], t) for n, t in wanted.tensors.items())
    standing = [bench for _, bench in silo._runs.values() if bench._ready]
    assert len(standing) == 1 and all("model" not in vars(b) for _, b in silo._runs.values() if b not in standing)


def test_a_model_taken_over_starts_where_its_own_seed_starts(tiny: Tiny, loads: list[int]) -> None:
    """Also what an algorithm does not train, and so never receives, has the values of a fresh loading."""
    recipe = tiny.recipe()
    first = Workbench(recipe, load_data(recipe, tiny.base))
    first.load()
    first.put({n: t + 1 for n, t in initial_tensors(recipe).items()})
    other = variant(recipe, seed=3)
    second = Workbench(other, first.data)
    assert second.take_over(first) and len(loads) == 1
    wanted = initial_tensors(other)
    assert all(torch.equal(t, wanted[n]) for n, t in second.take(second.put({})).items())


def test_a_run_may_ask_more_of_the_model_that_stands_there(
    tiny: Tiny, tiny_model_dir: Path, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path
) -> None:
    silo = owner()
    reply_of(silo.handle(hello(recipe, run="a")))
    longer = variant(recipe, training={"max_length": 9999})
    assert "9999" in failure_of(silo.handle(hello(longer, run="b")), FailureKind.ERROR)
    reply_of(silo.handle(train(recipe, tiny, run="a")))

    plain = Path(shutil.copytree(tiny_model_dir, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    instruct = variant(tiny.recipe(), model={"source": str(plain)})
    columns = [{"path": "rows.jsonl", "columns": {"text": "prompt"}}]
    pretrain = variant(instruct, task="pretrain", data={"sources": columns})
    first = Workbench(pretrain, load_data(pretrain, tiny.base))
    first.load()
    with pytest.raises(ModelError, match="no chat template"):
        Workbench(instruct, load_data(instruct, tiny.base)).take_over(first)


def test_full_weights_are_not_passed_on_to_another_seed(tiny: Tiny, loads: list[int]) -> None:
    recipe = tiny.recipe("adapter={kind: full}")
    data = load_data(recipe, tiny.base)
    first = Workbench(recipe, data)
    first.load()
    assert not Workbench(variant(recipe, seed=1), data).take_over(first) and len(loads) == 1
    again = Workbench(recipe, data)
    assert again.take_over(first) and not first.take_over(first)
    again.load()
    assert len(loads) == 1
    first.load()
    assert len(loads) == 2


def test_a_failed_training_leaves_nothing_behind(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    """A model that diverged ends its own run; the gradients it left on the bench reach no other."""
    alone, silo = owner(), owner()
    for run, served in (("alone", alone), ("bad", silo), ("good", silo)):
        reply_of(served.handle(hello(recipe, run=run)))
    bad = train(recipe, tiny, run="bad")
    bad.tensors.update({n: torch.full_like(t, torch.nan) for n, t in bad.tensors.items()})
    assert "became nan" in failure_of(silo.handle(bad), FailureKind.ERROR)
    got = reply_of(silo.handle(train(recipe, tiny, run="good"))).tensors
    wanted = reply_of(alone.handle(train(recipe, tiny, run="alone"))).tensors
    assert all(torch.equal(got[n], t) for n, t in wanted.items())


# ------------------------------------------------------------------------------------------------ limits


def test_limits_hold_at_each_request(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    silo = owner(policy="max_rounds: 4\n")
    reply_of(silo.handle(hello(recipe)))
    assert "there is no round 4" in failure_of(silo.handle(train(recipe, tiny, round_=4)), FailureKind.REFUSED)
    failure_of(silo.handle(train(recipe, tiny, round_=-1)), FailureKind.REFUSED)
    tensors = initial_tensors(tiny.recipe())
    asked = Request("site1", "evaluate", "run", -1, 0, tensors, {"role": "validation", "items": False})
    assert "items" not in reply_of(silo.handle(asked)).fields
    asked.fields["items"] = True
    assert "per_item_scores" in failure_of(silo.handle(asked), FailureKind.REFUSED)
    willing = owner(policy="per_item_scores: true\n")
    assert "items" in reply_of(willing.handle(asked)).fields
    mean = owner(policy="max_rounds: 2\n")
    assert "max_rounds: 2" in failure_of(mean.handle(train(recipe, tiny, round_=2)), FailureKind.REFUSED)


def test_steps_are_counted_from_the_rows(recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    by_epochs = variant(recipe, training={"steps": None, "epochs": 10.0})
    reason = failure_of(owner(policy="max_steps_per_round: 9\n").handle(hello(by_epochs)), FailureKind.REFUSED)
    assert "max_steps_per_round: 9" in reason
    reply_of(owner(policy="max_steps_per_round: 90\n").handle(hello(by_epochs, run="b")))


def test_who_is_no_longer_waited_for_is_not_served(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    silo = owner()
    reply_of(silo.handle(hello(recipe)))
    failure_of(silo.handle(train(recipe, tiny), should_stop=lambda: True), FailureKind.TIMED_OUT)
    told: list[Any] = []
    reply_of(silo.handle(train(recipe, tiny), observe=told.append))
    assert [e["kind"] for e in told] == ["silo_started", "step", "step", "step"]


# ------------------------------------------------------------------------------------------------ the text


def test_rows_of_the_wrong_kind(recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    silo = owner(data="sources: [{path: rows.jsonl, columns: {text: prompt}}]\n")
    reason = failure_of(silo.handle(hello(recipe)), FailureKind.REFUSED)
    assert "does not fit the run" in reason and "cannot learn from text rows" in reason and "rows.jsonl" not in reason


def test_malformed_rows_are_the_recipes_to_skip(recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    silo = owner()
    rows = tmp_path / "owner-site1" / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"prompt": 1, "response": None, "site": "site1"}) + "\n")
    assert "log" in failure_of(silo.handle(hello(recipe)), FailureKind.REFUSED)
    reply_of(silo.handle(hello(variant(recipe, data={"malformed": "skip"}))))


def test_multiple_choice_needs_such_rows(tiny: Tiny, owner: Callable[..., OwnSilo]) -> None:
    """The recipe itself passes, since it does not say what the silos hold."""
    asked = tiny.recipe("data={at_silos: true}", "evaluation.metrics=[loss, choice]", "model.source=/x/tiny")
    reason = failure_of(owner().handle(hello(asked)), FailureKind.REFUSED)
    assert "question + choices + answer" in reason


def test_why_the_text_cannot_be_read_stays_with_the_owner(
    recipe: Recipe, owner: Callable[..., OwnSilo], caplog: pytest.LogCaptureFixture
) -> None:
    silo = owner(data="sources: [{path: jane-doe.jsonl, columns: {prompt: prompt, response: response}}]\n")
    with caplog.at_level(logging.WARNING):
        reason = failure_of(silo.handle(hello(recipe)), FailureKind.REFUSED)
    assert "log" in reason and "jane" not in reason and "jane-doe.jsonl" in caplog.text


def test_a_share_of_the_recipe(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo]) -> None:
    """For demonstrations: the same rows as the simulation deals to this name."""
    dealt = tiny.recipe("model.source=/x/tiny")
    silo = owner(data=f"share_of_recipe: true\nbase: {tiny.base}\n")
    assert sum(reply_of(silo.handle(hello(dealt))).fields["card"]["rows"].values()) == 30
    assert "bring its own text" in failure_of(silo.handle(hello(recipe, run="b")), FailureKind.REFUSED)
    stranger = owner("site9", data=f"share_of_recipe: true\nbase: {tiny.base}\n")
    reason = failure_of(stranger.handle(hello(dealt, silo="site9")), FailureKind.REFUSED)
    assert "no share" in reason and "site0" in reason


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../rows.jsonl", "~/rows.jsonl", "a/../../rows.jsonl", "link/*.jsonl"]
)
def test_a_share_only_of_what_is_offered(tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path, path: str) -> None:
    offered = tmp_path / "offered"
    offered.mkdir()
    (offered / "link").symlink_to(tiny.base)
    dealt = tiny.recipe("model.source=/x/tiny", f"data.sources.0.path={path}")
    silo = owner(data=f"share_of_recipe: true\nbase: {offered}\n")
    assert "not below the folder" in failure_of(silo.handle(hello(dealt)), FailureKind.REFUSED)
    silo = owner(data="share_of_recipe: true\n")
    plain = tiny.recipe("model.source=/x/tiny")
    assert "not below the folder" in failure_of(silo.handle(hello(plain)), FailureKind.REFUSED)


def test_what_breaks_inside_is_a_failure_without_text(
    recipe: Recipe, owner: Callable[..., OwnSilo], monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise ValueError("the patient's name is Jane")

    monkeypatch.setattr(fedlm.federation.silo.own, "local_model", burst)
    reason = failure_of(owner().handle(hello(recipe)), FailureKind.ERROR)
    assert "Jane" not in reason and "ValueError" in reason
