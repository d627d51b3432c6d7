"""Public rows beside the silos' own, in whole runs: the same bits with any number of workers and over a network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.algorithms.base import Place
from fedlm.data.federated import load_data
from fedlm.errors import DataError, RecipeError, RunError, UpdateRefused
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.coverage import checked
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.augmented import centres
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.selected import round_tokens
from fedlm.files import read_tensors
from fedlm.messages import Reply
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.schema import Recipe
from fedlm.training.sequences import Example
from tests.federation.conftest import WORDS, Tiny
from tests.federation.own_silos import Network, data_file

SHORT = ("federation.rounds=2", "federation.algorithm={name: fedavg}")  # an update's weight is its silo's rows
COLUMNS = "columns: {prompt: question, response: answer}"
SITES = [f"site{n}" for n in range(4)]


@pytest.fixture(scope="module")
def public(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with public rows: 60 of their own, two of them equal, and all rows of the silos, held-out ones too."""
    folder = tmp_path_factory.mktemp("public")
    draw = random.Random(5)
    own = [json.loads(line) for line in (tiny.base / "rows.jsonl").read_text().splitlines()]
    rows = [{"question": row["prompt"], "answer": row["response"]} for row in own]
    rows += [{"question": " ".join(draw.choices(WORDS, k=6)), "answer": " ".join(draw.choices(WORDS, k=4))}] * 2
    rows += [
        {"question": " ".join(draw.choices(WORDS, k=6)), "answer": " ".join(draw.choices(WORDS, k=4))}
        for _ in range(58)
    ]
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def augment(path: str, rows: int = 8) -> str:
    return (
        f"data.augment={{sources: [{{path: '{path}', {COLUMNS}}}], rows: {rows}, centres: 2, clusters: 3, "
        "min_group: 3, dimensions: 6}"
    )


def recipe_of(tiny: Tiny, public: Path, *changes: str) -> Recipe:
    return tiny.recipe(*SHORT, augment(str(public / "open.jsonl")), *changes)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def words(example: Example) -> bytes:
    return example.sequences[0].ids.tobytes()


@pytest.fixture(scope="module")
def local(tiny: Tiny, public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "run"
    run_recipe(recipe_of(tiny, public), base=tiny.base, run_dir=folder)
    return folder


def test_silos_train_on_their_rows_and_the_nearest_public_ones(tiny: Tiny, public: Path, local: Path) -> None:
    recipe = recipe_of(tiny, public)
    bench = Workbench(recipe, load_data(recipe, tiny.base))
    bench.load()
    assert len(bench.data.public) == 120 + 59  # of equal rows one
    chosen = json.loads((local / "coverage.json").read_text())
    lines = [json.loads(line) for line in (local / "rounds.jsonl").read_text().splitlines()]
    assert sorted(chosen) == SITES
    for silo in SITES:
        own = bench.training_tokens(silo)
        assert chosen[silo]["centres"] == len(centres(bench, silo)) <= 3
        assert len(chosen[silo]["chosen"]) == 2
        tokens = round_tokens(bench, Place(silo, 0, 2, 0, 2), chosen[silo]["chosen"])
        assert len(tokens) == len(own) + 8 and tokens.left_out == 0
        assert [words(tokens[i]) for i in range(len(own))] == [words(example) for example in own]
        encoded, owners = bench.public
        where = {words(encoded[i]): owners[i] for i in range(len(encoded))}
        found = {where[words(tokens[i])] for i in range(len(own), len(tokens))}
        data = bench.silo_data(silo)
        held = {content for rows in (data.train, data.validation, data.test) for content in rows["hash"]}
        assert len(found) == 8 and not found & held  # no held-out row becomes a training row
        assert len(round_tokens(bench, Place(silo, 0, 2, 0, 2), None)) == len(own)  # nobody chose
    assert [line["round"] for line in lines] == [-1, 0, 1] and len(lines[2]["replied"]) == 4
    with pytest.raises(DataError, match="not this silo's"):
        round_tokens(bench, Place("site0", 0, 2, 0, 2), [3])


def test_public_rows_change_the_model(tiny: Tiny, local: Path, tmp_path: Path) -> None:
    run_recipe(tiny.recipe(*SHORT), base=tiny.base, run_dir=tmp_path / "plain")
    assert not same(local, tmp_path / "plain")


@pytest.mark.slow
def test_the_same_bits_in_two_workers_and_after_a_kill(
    tiny: Tiny, public: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FEDLM_CACHE", str(tmp_path / "other-cache"))  # described anew, in other processes
        run_recipe(recipe_of(tiny, public, "federation.workers=2"), base=tiny.base, run_dir=tmp_path / "two")
    assert same(local, tmp_path / "two")

    once = coordinator.Federation.one_round

    def one_round(self: Any, state: Any) -> Any:
        if state.progress.round == 0:
            raise RunError("stopped here")
        return once(self, state)

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(coordinator.Federation, "one_round", one_round)
        with pytest.raises(RunError, match="stopped here"):
            run_recipe(recipe_of(tiny, public), base=tiny.base, run_dir=stopped)
    run_recipe(None, run_dir=stopped, resume=True)
    assert same(local, stopped)
    (stopped / "run.json").write_text((stopped / "run.json").read_text().replace('"finished"', '"interrupted"'))
    (stopped / "coverage.json").write_text('{"site0": {}}')
    with pytest.raises(RunError, match=r"coverage\.json is damaged"):
        run_recipe(None, run_dir=stopped, resume=True)


def owner(name: str, tiny: Tiny, model: Path, folder: Path, more: str, verbs: str) -> OwnSilo:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_bytes((tiny.base / "rows.jsonl").read_bytes())
    text = data_file(
        folder,
        "sources: [{name: rows, path: rows.jsonl, columns: {prompt: prompt, response: response}, "
        f"where: {{site: {name}}}}}]\n{more}",
    )
    rules = folder / "policy.yaml"
    rules.write_text(f"models: {{tiny-model0: {model}}}\nallow: {verbs}\n")
    return OwnSilo(name, folder / "states", text, rules)


def test_between_organisations(tiny: Tiny, public: Path, local: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The same bits as in the simulation, where the owners offer a folder of public rows and allow the verb."""

    def over(folder: str, path: str, more: str, verbs: str = "[hello, train, evaluate, profile]") -> Path:
        there = tiny.recipe(
            *SHORT, augment(path), "data.sources=[]", "data.partition=null", "data.at_silos=true",
        )  # fmt: skip
        asked = there.model_copy(update={"model": there.model.model_copy(update={"source": "/there/tiny-model0"})})
        place = tmp_path / folder
        silos = {
            name: owner(name, tiny, tiny_model_dir, place / name, more.format(public=public), verbs) for name in SITES
        }
        with using(new_run(there, place / "run")) as directory:
            coordinator.run(there, Network(asked, silos, fingerprint(there.model)), directory)
        return place / "run"

    assert same(local, over("good", "open.jsonl", "public: {public}\n"))
    with pytest.raises(RunError, match=r"takes no public rows: its data file names no folder"):
        over("nothing", "open.jsonl", "")
    with pytest.raises(RunError, match=r"is not below the folder that this silo offers"):
        over("outside", "../secret.jsonl", "public: {public}\n")
    with pytest.raises(RunError, match="'profile' is not allowed"):
        over("unwilling", "open.jsonl", "public: {public}\n", "[hello, train, evaluate]")


def test_a_data_file_says_where_public_rows_lie(tiny: Tiny, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder 'elsewhere'"):
        owner("site0", tiny, tiny_model_dir, tmp_path / "a", "public: elsewhere\n", "[hello]")
    both = data_file(tmp_path / "b", "share_of_recipe: true\npublic: .\n")
    with pytest.raises(RecipeError, match="`public` belongs to `sources`"):
        OwnSilo("site0", tmp_path / "states", both, tmp_path / "a" / "policy.yaml")


def test_too_few_public_rows(tiny: Tiny, public: Path, tmp_path: Path) -> None:
    file = str(public / "open.jsonl")
    with pytest.raises(DataError, match="there are 179 different public rows, and each silo is to take 180"):
        load_data(tiny.recipe(augment(file, 180)), tiny.base)
    with pytest.raises(RunError, match="of the public rows are none that a silo holds"):
        run_recipe(tiny.recipe(augment(file, 160)), base=tiny.base, run_dir=tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="there are 1 different public rows"):
        load_data(tiny.recipe(augment(str(other), 2)), tiny.base)


def test_another_file_of_public_rows_is_another_run(tiny: Tiny, public: Path, tmp_path: Path) -> None:
    lines = (public / "open.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "less.jsonl").write_text("".join(lines[:-1]))
    one, two = (
        load_data(tiny.recipe(augment(str(f))), tiny.base) for f in (public / "open.jsonl", tmp_path / "less.jsonl")
    )
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint != load_data(tiny.recipe(), tiny.base).fingerprint


UNIT = torch.nn.functional.normalize(torch.ones(3, 6), dim=1)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "no centroids"),
        ({"centroids": UNIT.double()}, "no centroids"),
        ({"centroids": UNIT[:, :5]}, "shape"),
        ({"centroids": torch.cat([UNIT, UNIT])}, "shape"),
        ({"centroids": UNIT * float("nan")}, "not finite"),
        ({"centroids": UNIT * 2}, "not unit length"),
    ],
)
def test_centres_that_no_honest_silo_sends(tiny: Tiny, public: Path, found: dict[str, torch.Tensor], why: str) -> None:
    spec = recipe_of(tiny, public).data.augment
    assert spec is not None
    good = Reply("a", "profile", "run", -1, tensors={"centroids": UNIT})
    assert checked(good, spec, 9).shape == (3, 6)
    assert checked(Reply("a", "profile", "run", -1, tensors={"centroids": UNIT[:0]}), spec, 2).shape == (0, 6)
    with pytest.raises(UpdateRefused, match="shape"):
        checked(good, spec, 8)  # eight rows make two groups of three
    with pytest.raises(UpdateRefused, match=why):
        checked(Reply("a", "profile", "run", -1, tensors=found), spec, 9)
