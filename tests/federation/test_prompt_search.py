"""The search for a prompt: edits, sums, the verb 'score', and whole searches, killed, resumed and on other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.algorithms.base import Place
from fedlm.data.federated import load_data
from fedlm.errors import DataError, RunError, UpdateRefused
from fedlm.evaluation.choice import score_choices
from fedlm.federation import prompt_search
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.asking import Asking
from fedlm.federation.edits import edited, model_paraphrase, phrases
from fedlm.federation.prompt_search import Score, checked, search, search_prompt
from fedlm.federation.silo import Silo, Workbench, scored
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.scored import FLOOR, judged, score, with_prompt
from fedlm.federation.silo.text import pack_text, unpack_text
from fedlm.messages import Failure, Reply, Request
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.load import InvalidRecipeError, load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file

WORDS = ["patient", "dose", "medicine", "bank", "money", "school", "science", "books"]

RECIPE = """
name: prompts
task: instruct
model: {{source: {model}, dtype: float32}}
data:
  sources: [{{path: rows.jsonl, columns: {{question: question, choices: choices, answer: answer}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.2}}
search:
  candidates: ["Give the answer, the patient was given medicine.", "bank money"]
  rows: 8
  keep: 2
  edits: 3
training: {{steps: 1, max_length: 64}}
federation: {{rounds: 3, workers: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    base = tmp_path_factory.mktemp("prompts")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(90):
        choices = draw.permutation(WORDS)[:3].tolist()
        question = " ".join(draw.choice(WORDS, 5).tolist())
        rows.append(
            {"question": question, "choices": choices, "answer": int(draw.integers(3)), "site": f"s{number % 3}"}
        )
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    return base


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", changes)


def request(prompts: list[str], role: str = "train", round_: int = 0, silo: str = "s0") -> Request:
    return Request(silo, "score", "run", round_, 0, pack_text(prompts), {"role": role})


def facts(run: Path) -> tuple[str, str, list[Any]]:
    """All that a search leaves behind, without times and bytes."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds"), line.pop("bytes_up"), line.pop("bytes_down")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation.pop("bytes_up"), evaluation.pop("bytes_down")
    return (run / "prompt.txt").read_text(), json.dumps(evaluation), lines


# ---------------------------------------------------------------- edits


def test_phrases_and_what_edits_make_of_them() -> None:
    prompt = "Read the news article with care, then name its topic."
    parts = phrases(prompt)
    assert parts == ["Read the news article", "with care,", "then name its topic."]
    deleted: list[str] = []
    draw = np.random.default_rng(0)
    found = edited([prompt], 9, ["delete", "swap"], draw, deleted=deleted, known={prompt})
    shorter = {" ".join(parts[:i] + parts[i + 1 :]) for i in range(3)}
    swapped = {" ".join(parts[i] for i in order) for order in ([1, 0, 2], [2, 1, 0], [0, 2, 1])}
    assert set(found) == shorter | swapped and set(deleted) == set(parts), "all that there are, and no more"
    added = edited(["one word"], 5, ["add"], draw, deleted=["extra"], known=set())
    assert set(added) == {"extra one word", "one word extra"}
    assert edited(["one word"], 5, ["delete", "swap"], draw, deleted=[], known=set()) == []
    again = edited([prompt], 4, ["delete", "swap", "add"], np.random.default_rng(3), deleted=[], known=set())
    assert again == edited([prompt], 4, ["delete", "swap", "add"], np.random.default_rng(3), deleted=[], known=set())
    said = edited(["a b"], 2, ["paraphrase"], draw, deleted=[], known={"a b"}, paraphrase=lambda p, n: f"{p} {n // 2}")
    assert said == ["a b 0", "a b 1"]


def test_the_models_own_paraphrase_is_repeatable(folder: Path) -> None:
    recipe = recipe_of(folder)
    one = model_paraphrase(recipe)
    texts = [one("Name the topic.", n) for n in range(3)]
    assert texts == [model_paraphrase(recipe)("Name the topic.", n) for n in range(3)] and len(set(texts)) > 1
    assert all("\n" not in text for text in texts)


# ---------------------------------------------------------------- what a silo says


def test_a_prompt_stands_where_it_should() -> None:
    user = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "s"}, *user]
    assert with_prompt(user, "p", "system") == [{"role": "system", "content": "p"}, *user]
    assert with_prompt(own, "p", "system")[0]["content"] == "p\n\ns"
    assert [t["content"] for t in with_prompt(own, "p", "user")] == ["s", "p\n\nq", "a"]
    assert with_prompt(own, "", "user") == own


def test_sums_are_those_of_scoring_each_row(folder: Path) -> None:
    """A prompt as the first words of the user's turn is the same as questions that begin so: lm-eval's scores of these.
    In fp32, to 1e-4 nats a row."""
    recipe = recipe_of(folder, "search.place=user")
    data = load_data(recipe, folder)
    bench = Workbench(recipe, data)
    bench.load()
    place = Place("s0", -1, 3, 0, None)
    tensors, fields = score(bench, place, request(["", "bank money"], "test", -1))
    rows = [dict(row) for row in data.silo("s0").test]
    for index, prefix in enumerate(("", "bank money\n\n")):
        asked = [{**row, "question": prefix + row["question"]} for row in rows]
        expected = score_choices(bench.model, bench.tokenizer, asked, "instruct", batch_tokens=2048)
        logs = [torch.tensor(p).log_softmax(0)[row["answer"]] for p, row in zip(expected.logprobs, rows, strict=True)]
        assert float(tensors["sums"][index, 0]) == pytest.approx(float(sum(logs)), abs=1e-4 * len(rows))
        assert int(tensors["sums"][index, 1]) == int(expected.correct.sum())
    assert tensors["counts"].tolist() == [len(rows)] * 2 and fields["kind"] == "choice"


def test_rows_are_drawn_by_round_and_the_same_for_all_prompts(folder: Path) -> None:
    bench = Workbench(recipe_of(folder), load_data(recipe_of(folder), folder))
    bench.load()

    def told(round_: int, *prompts: str) -> torch.Tensor:
        return score(bench, Place("s0", round_, 3, 0, None), request(list(prompts), round_=round_))[0]["sums"]

    assert torch.equal(told(0, "bank", "bank"), told(0, "bank", "bank"))
    both = told(0, "bank", "bank")
    assert torch.allclose(both[0], both[1], atol=1e-5, rtol=0)
    assert not torch.allclose(told(0, "bank"), told(1, "bank"), atol=1e-5, rtol=0)


def test_what_a_row_adds_is_bounded() -> None:
    row = {"choices": ["a", "b"], "answer": 0}
    assert judged(row, np.array([-1.0, -1.0]), 2) == (pytest.approx(np.log(0.5)), 1.0), "the first of equals"
    assert judged(row, np.array([-900.0, -1.0]), 2) == (FLOOR, 0.0)
    assert judged({}, np.array([-6.0, -2.0]), 4) == (-2.0, 0.0), "per token"
    assert judged({}, np.array([-1e6]), 2) == (FLOOR, 0.0)
    with pytest.raises(DataError, match="no number"):
        judged(row, np.array([np.nan, -1.0]), 2)


def test_all_that_leaves_passes_the_hook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(folder)
    bench = Workbench(recipe, load_data(recipe, folder))
    monkeypatch.setattr(scored, "release", lambda sums, counts, place: (sums * 0 - 1.0, counts * 0 + len(place.silo)))
    tensors, _ = (bench.load(), score(bench, Place("s0", 0, 3, 0, None), request(["bank"])))[1]
    assert tensors["sums"].tolist() == [[-1.0, -1.0]] and tensors["counts"].tolist() == [2]


@pytest.mark.parametrize(
    ("tensors", "fields", "why"),
    [
        ({}, {"role": "train"}, "holds no text"),
        (pack_text([]), {"role": "train"}, "no list of prompts"),
        (pack_text({"a": "b"}), {"role": "train"}, "no list of prompts"),
        (pack_text(["a", 3]), {"role": "train"}, "no list of prompts"),
        (pack_text(["a"] * 65), {"role": "train"}, "more than 64 prompts"),
        (pack_text(["a" * 2001]), {"role": "train"}, "above 2000 characters"),
        (pack_text("a" * 2_000_000), {"role": "train"}, "bytes, above"),
        ({"text": torch.zeros(3, dtype=torch.uint8)}, {"role": "train"}, "is no JSON"),
        (pack_text(["a"]), {"role": "secret words"}, "none of the roles"),
    ],
)
def test_a_request_is_checked_before_any_work(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any], why: str
) -> None:
    recipe = recipe_of(folder)
    silo = Silo("s0", Workbench(recipe, load_data(recipe, folder)), tmp_path)
    answer = silo.handle(Request("s0", "score", "run", 0, 0, tensors, fields))
    assert isinstance(answer, Failure) and why in answer.reason and "secret" not in answer.reason


def test_text_arrives_as_it_was_sent() -> None:
    value = {"a": ["Größe 東京 \U0001f600", "\n\x00"]}
    assert unpack_text(pack_text(value), 1000) == value


# ---------------------------------------------------------------- the coordinator


def reply(sums: Any, counts: Any, kind: str = "choice") -> Reply:
    tensors = {"sums": torch.tensor(sums, dtype=torch.float64), "counts": torch.tensor(counts)}
    return Reply("a", "score", "run", 0, tensors=tensors, fields={"kind": kind})


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Reply("a", "score", "run", 0), "no sums and counts"),
        (reply([[-1.0, 1.0]], [4]), "no sums of 2 prompts"),
        (reply([[-1.0, 1.0]] * 2, [4, 3]), "same rows"),
        (reply([[-1.0, 1.0]] * 2, [0, 0]), "not 1 to 4"),
        (reply([[-1.0, 1.0]] * 2, [5, 5]), "not 1 to 4"),
        (reply([[1.0, 1.0]] * 2, [4, 4]), "impossible"),
        (reply([[-81.0, 1.0]] * 2, [4, 4]), "impossible"),
        (reply([[float("nan"), 1.0]] * 2, [4, 4]), "impossible"),
        (reply([[-1.0, 5.0]] * 2, [4, 4]), "more right"),
        (reply([[-1.0, 1.0]] * 2, [4, 4], "text"), "which kind"),
    ],
)
def test_impossible_sums_are_refused(found: Reply, why: str) -> None:
    with pytest.raises(UpdateRefused, match=why):
        checked(found, 2, 4)
    checked(reply([[-80.0, 4.0]] * 2, [4, 4]), 2, 4)


def test_ranks() -> None:
    a, b = Score(-10.0, 3.0, 10, "choice"), Score(-12.0, 5.0, 10, "choice")
    assert a.rank("likelihood") > b.rank("likelihood") and b.rank("right") > a.rank("right")
    assert b.fields()["accuracy"] == 0.5 and "accuracy" not in Score(-1.0, 0.0, 1, "messages").fields()


def test_a_search_is_the_same_killed_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(folder)
    found = search_prompt(recipe, base=folder, run_dir=tmp_path / "one")
    prompt, evaluation, lines = facts(tmp_path / "one")
    assert prompt == found.prompt and found.rounds == 3 and set(found.test) == {"none", "first", "best"}
    assert [len(line["candidates"]) for line in lines] == [2, 5, 5]
    for line in lines:
        likelihoods = [c["likelihood"] for c in line["candidates"]]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert [c["kept"] for c in line["candidates"]] == [True] * 2 + [False] * (len(likelihoods) - 2)
        assert line["candidates"][0]["rows"] == 24, "8 of each of three silos"
    known = lines[-1]["validation"]
    assert "" in known and known[prompt]["likelihood"] == max(score["likelihood"] for score in known.values())

    # the process ends while round 1 is under way, and while the test rows are scored
    for number, call in enumerate((4, 7)):
        calls, ask = [0], Asking.ask

        def dying(self: Asking, *args: Any, _calls: list[int] = calls, _ask: Any = ask, _last: int = call) -> Any:
            _calls[0] += 1
            if _calls[0] == _last:
                raise KeyboardInterrupt
            return _ask(self, *args)

        run = tmp_path / f"killed{number}"
        with monkeypatch.context() as patch:
            patch.setattr(Asking, "ask", dying)
            with pytest.raises(KeyboardInterrupt):
                search_prompt(recipe, base=folder, run_dir=run)
        assert not (run / "prompt.txt").exists()
        search_prompt(recipe, base=folder, run_dir=run, resume=True)
        assert facts(run) == (prompt, evaluation, lines)

    with pytest.raises(RunError, match="not the one this run started with"):
        search_prompt(recipe_of(folder, "seed=1"), base=folder, run_dir=tmp_path / "one", resume=True)


@pytest.mark.slow
def test_a_search_is_the_same_over_workers(folder: Path, tmp_path: Path) -> None:
    """Their processes take long to start."""
    search_prompt(recipe_of(folder, "federation.workers=2"), base=folder, run_dir=tmp_path / "workers")
    search_prompt(recipe_of(folder), base=folder, run_dir=tmp_path / "one")
    assert facts(tmp_path / "workers") == facts(tmp_path / "one")


def test_conversations_are_scored_per_token(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        "federation.algorithm.name=fedavg", "training={steps: 1, max_length: 64}", "adapter={}", "federation.rounds=1",
        "search={candidates: [the bank], rows: 8}",
    )  # fmt: skip
    found = search_prompt(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert "accuracy" not in found.test["best"] and -10 < found.test["best"]["likelihood"] < 0


def test_organisations_search_alike_and_must_allow_it(folder: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = recipe_of(folder, "federation.rounds=2")
    search_prompt(recipe, base=folder, run_dir=tmp_path / "local")
    at_silos = ("data.sources=[]", "data.partition=null", "data.at_silos=true")
    there = recipe_of(folder, "federation.rounds=2", *at_silos)
    asked = there.model_copy(update={"model": there.model.model_copy(update={"source": "/elsewhere/tiny"})})

    def owner(name: str, verbs: str) -> OwnSilo:
        place = tmp_path / f"{name}-{len(verbs)}"
        columns = "{question: question, choices: choices, answer: answer}"
        text = data_file(place, f"sources: [{{path: rows.jsonl, columns: {columns}, where: {{site: {name}}}}}]\n")
        (place / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
        rules = place / "policy.yaml"
        rules.write_text(f"models: {{tiny: {tiny_model_dir}}}\nallow: {verbs}\n")
        return OwnSilo(name, place / "states", text, rules)

    def searched(run: str, verbs: str) -> None:
        network = Network(asked, {n: owner(n, verbs) for n in ("s0", "s1", "s2")}, fingerprint(there.model))
        with using(new_run(there, tmp_path / run)) as directory:
            search(there, network, directory)

    searched("network", "[hello, train, evaluate, score]")
    assert facts(tmp_path / "network") == facts(tmp_path / "local")
    with pytest.raises(RunError, match="'score' is not allowed"):
        searched("refused", "[hello, train, evaluate]")
    assert not (tmp_path / "refused").exists(), "nothing was found, so nothing stays"


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("training={steps: 1, max_length: 64, lr: 0.1}", "the model is frozen"),
        ("adapter={rank: 4}", "the model is frozen"),
        ("federation.algorithm.name=fedadam", "nothing is averaged"),
        ("federation.sample=2", "all silos are asked"),
        ("guards=[{kind: topk, share: 0.1}]", "guards"),
        ("search.edits=64", "more than 64"),
        ("search.candidates=[]", "at least 1"),
        ("search.rows=2", "greater than or equal to 8"),
        ("search.place=nowhere", "valid names: system, user"),
    ],
)
def test_settings_without_effect_are_refused(folder: Path, change: str, why: str) -> None:
    with pytest.raises(InvalidRecipeError, match=why):
        recipe_of(folder, change)


def test_right_needs_choices(tiny: Tiny) -> None:
    with pytest.raises(InvalidRecipeError, match="counts right choices"):
        tiny.recipe("federation.algorithm.name=fedavg", "search={candidates: [x], by: right}")


def test_such_a_recipe_is_no_training(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="trains nothing"):
        run_recipe(recipe_of(folder), base=folder, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="searches no prompt"):
        search_prompt(recipe_of(folder, "search=null", "training={steps: 1}"), base=folder)


def test_a_damaged_state_is_told(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, "federation.rounds=1")
    search_prompt(recipe, base=folder, run_dir=tmp_path / "run")
    (tmp_path / "run" / prompt_search.STATE).write_text("[]")
    with pytest.raises(RunError, match="damaged"):
        search_prompt(recipe, base=folder, run_dir=tmp_path / "run", resume=True)
