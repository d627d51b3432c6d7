"""Text becomes instructions: the parts by hand, and whole runs with a tiny model that has learnt the form."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import DataError, RunError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.encoded import task_rows
from fedlm.federation.silo.instructions import (
    embeddings,
    instructed,
    keyed,
    message_row,
    most_alike,
    read_pair,
    shots,
    why_not,
)
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.workbench import POOLED
from fedlm.files import read_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.instructions import InstructionExample, InstructionSpec
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.training.generation import generate
from tests.federation.conftest import WORDS
from tests.federation.own_silos import Network, data_file

POOL = [
    InstructionExample(text="the bank lent money", instruction="What was lent there?", response="money"),
    InstructionExample(text="the school was given books", instruction="What was given there?", response="books"),
    InstructionExample(text="a dose of medicine", instruction="What was taken there?", response="medicine"),
]
SPEC = InstructionSpec(pool=POOL, shots=1, max_new_tokens=40)


@pytest.mark.parametrize(
    ("answer", "pair"),
    [
        ("Instruction: Who lent it?\nResponse: The bank.", ("Who lent it?", "The bank.")),
        ("\n Instruction:  Who\tlent it? \n\n Response: The\nbank. \nText: the", ("Who lent it?", "The\nbank.")),
        ("Instruction: a\nResponse: b\nInstruction: c\nResponse: d", ("a", "b")),
        ("Who lent it?\nThe bank.", None),
        ("Instruction: Who lent it?", None),
        ("Instruction: \nResponse: The bank.", None),
        ("Instruction: Who lent it?\nResponse:  ", None),
        ("", None),
    ],
)
def test_what_the_model_wrote_is_read(answer: str, pair: tuple[str, str] | None) -> None:
    assert read_pair(answer) == pair


def test_what_is_not_used() -> None:
    seen = {"what was lent there?"}
    assert why_not(("What was given today?", "money"), SPEC, seen) == ""
    assert why_not(None, SPEC, seen) == "not in the form asked for"
    assert why_not(("What lent?", "money"), SPEC, seen) == "too short"
    assert why_not(("what  was lent THERE?", "money"), SPEC, seen) == "copies"
    assert why_not(("the same again", "The same  again"), SPEC, seen) == "copies"


def test_a_row_keeps_all_but_its_text() -> None:
    row = {"text": "the bank", "label": "l", "domain": "d", "group": "g", "row": "f:1", "hash": "0"}
    made = message_row(row, ("Who?", "The bank"), show_text=False)
    assert [m["content"] for m in made["messages"]] == ["Who?", "The bank"]
    assert (made["label"], made["domain"], made["group"], made["row"]) == ("l", "d", "g", "f:1")
    shown = message_row(row, ("Who?", "The bank"), show_text=True)
    assert shown["messages"][0]["content"] == "Who?\n\nthe bank" and shown["hash"] != made["hash"]


def test_the_most_alike_examples_by_cosine_about_the_pools_mean() -> None:
    pool = np.array([[11.0, 0.0], [9.0, 0.0], [10.0, 1.0], [10.0, -1.0]])  # mean (10, 0)
    texts = np.array([[15.0, 0.1], [9.5, 2.0], [10.0, 0.0]])
    assert most_alike(texts, pool, 2) == [[0, 2], [2, 1], [0, 1]]
    asked = shots([POOL[2], POOL[0]], "the school")
    assert [t["role"] for t in asked] == ["user", "assistant", "user", "assistant", "user"]
    assert "lent money" in asked[0]["content"] and "dose" in asked[2]["content"]  # the most alike comes last
    assert asked[3]["content"] == "Instruction: What was taken there?\nResponse: medicine"


def told(model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:  # noqa: ARG001
    """In place of a model that can write: asks for the text's second and third word, and forgets the form at 'dose'."""
    texts = [tokenizer.decode(ids).rpartition("Text: ")[2].split("<")[0].split() for ids in prompts]
    return [
        words[1] if words[1] == "dose" else f"Instruction: what about {' '.join(words[1:3])}\nResponse: {words[-1]}"
        for words in texts
    ]


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fedlm.federation.silo.instructions.generate", told)
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(1)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(48):
            first = [WORDS[number // 2 % 6], WORDS[number // 2 % 4]]
            text = " ".join(["secretly", *first, *draw.choices(WORDS, k=4)])
            file.write(json.dumps({"note": text, "site": f"site{number % 2}"}) + "\n")
    spec = SPEC.model_dump_json()
    (folder / "recipe.yaml").write_text(f"""
name: texts
model: {{source: {tiny_model_dir}, dtype: float32}}
adapter: {{rank: 2}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: note}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.1}}
  malformed: skip
  instructions: {spec}
training: {{steps: 2, batch_size: 4, max_length: 64, lr: 0.01}}
federation: {{rounds: 2, workers: 1}}
evaluation: {{metrics: [loss, f1], max_new_tokens: 4}}
""")
    return folder


def recipe_of(base: Path, *changes: str) -> Recipe:
    return load_recipe(base / "recipe.yaml", changes)


@pytest.fixture(scope="module")
def bench(base: Path) -> Workbench:
    recipe = recipe_of(base)
    found = Workbench(recipe, load_data(recipe, base))
    found.load()
    return found


def test_embeddings_are_means_of_last_states_whatever_the_batch(bench: Workbench) -> None:
    texts = ["the bank", "the patient was given a dose of medicine", "books"]
    together = embeddings(bench.model, bench.tokenizer, texts, 64, 4096)
    apart = embeddings(bench.model, bench.tokenizer, texts, 64, 1)
    assert np.allclose(together, apart, atol=1e-5)
    with torch.no_grad():
        ids = torch.tensor([bench.tokenizer.encode(texts[1])])
        plain = bench.model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    assert np.allclose(apart[1], plain.double().numpy(), atol=1e-5)


def test_draws_belong_to_the_row(bench: Workbench) -> None:
    prompts = [bench.tokenizer.encode(text) for text in ("the bank lent", "the patient was given a dose", "books")]
    hashes = ["a", "b", "c"]
    kwargs: dict[str, Any] = {"max_new_tokens": 8}

    def written(order: list[int], batch_tokens: int, temperature: float = 1.0) -> dict[str, str]:
        draw = keyed(temperature, 0, [hashes[i] for i in order])
        chosen = [prompts[i] for i in order]
        texts = generate(bench.model, bench.tokenizer, chosen, batch_tokens=batch_tokens, draw=draw, **kwargs)
        return dict(zip([hashes[i] for i in order], texts, strict=True))

    together = written([0, 1, 2], 4096)
    assert together == written([2, 0, 1], 1)
    cold = generate(bench.model, bench.tokenizer, prompts, batch_tokens=4096, **kwargs)
    assert list(written([0, 1, 2], 4096, 1e-4).values()) == cold != list(together.values())


@pytest.mark.usefixtures("canned")
def test_rows_are_written_once_and_counted(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = bench.data.silo("site0").train
    with caplog.at_level("INFO", "fedlm.silo"):
        rows, lost = instructed(bench, texts)
    words = [text.split() for text in texts["text"]]
    wanted: dict[str, str] = {}
    for heard in words:
        if heard[1] != "dose":
            wanted.setdefault(f"what about {heard[1]} {heard[2]}", heard[-1])  # a second one would be a copy
    assert {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows} == wanted
    assert len(rows) == len(wanted) and lost == len(texts) - len(wanted) > 0
    assert f"{sum(heard[1] == 'dose' for heard in words)} not in the form asked for" in caplog.text
    assert "secretly" not in caplog.text
    (file,) = (tmp_path / "cache" / "instructions").iterdir()
    assert file.stat().st_mode & 0o77 == 0
    monkeypatch.setattr("fedlm.federation.silo.instructions.generate", None)  # the second time nothing is written
    again, lost_again = instructed(bench, texts)
    assert again.to_list() == rows.to_list() and lost == lost_again
    tokens = bench.training_tokens("site0")
    assert (len(tokens), tokens.dropped) == (len(rows), lost)


@pytest.mark.usefixtures("canned")
def test_all_data_in_one_place_are_the_silos_rows(bench: Workbench) -> None:
    whole, _ = task_rows(bench, POOLED, "train")
    parts = [content for name in bench.data.names for content in task_rows(bench, name, "train")[0]["hash"]]
    assert list(whole["hash"]) == parts


@pytest.mark.usefixtures("canned")
def test_the_same_bits_between_organisations_and_no_text_in_the_run(
    base: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    recipe = recipe_of(base)
    result = run_recipe(recipe, base=base, run_dir=tmp_path / "local")
    last = json.loads((tmp_path / "local" / "rounds.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["validation"]["f1"] <= 1 and last["silos"]["site0"]["dropped"] > 0
    for file in (tmp_path / "local").rglob("*"):
        assert not file.is_file() or b"secretly" not in file.read_bytes()

    there = recipe_of(base, "data.sources=[]", "data.partition=null", "data.at_silos=true")
    asked = there.model_copy(update={"model": there.model.model_copy(update={"source": "/elsewhere/tiny"})})
    silos = {}
    for name in ("site0", "site1"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes((base / "rows.jsonl").read_bytes())
        text = f"sources: [{{name: rows, path: rows.jsonl, columns: {{text: note}}, where: {{site: {name}}}}}]\n"
        (folder / "policy.yaml").write_text(f"models: {{tiny: {tiny_model_dir}}}\n")
        silos[name] = OwnSilo(name, tmp_path / "states", data_file(folder, text), folder / "policy.yaml")
    with using(new_run(there, tmp_path / "network")) as directory:
        other = coordinator.run(there, Network(asked, silos, fingerprint(there.model)), directory)
    adapters = [read_tensors(tmp_path / w / "adapter" / "adapter_model.safetensors") for w in ("local", "network")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert result.evaluation == other.evaluation


@pytest.mark.usefixtures("canned")
def test_texts_that_give_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(base, "data.malformed=fail")
    strict = Workbench(recipe, load_data(recipe, base))
    strict.load()
    with pytest.raises(DataError, match="texts gave no instruction") as refused:
        strict.training_tokens("site0")
    assert "not in the form" in str(refused.value) and "rows.jsonl" in str(refused.value)
    assert "secretly" not in str(refused.value)
    monkeypatch.setattr("fedlm.federation.silo.instructions.generate", lambda *args, **_: ["secretly"] * len(args[2]))
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "other"))
    with pytest.raises(RunError, match="became an instruction"):
        run_recipe(recipe_of(base), base=base, run_dir=tmp_path / "run")
