"""Learning in context: fusion in closed form, what a silo shows its model, and whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import DataError, RunError, UpdateRefused
from fedlm.evaluation.choice import score_choices
from fedlm.federation import in_context
from fedlm.federation.api import new_run, using
from fedlm.federation.asking import Asking
from fedlm.federation.in_context import answer_questions, checked, fuse, load_queries
from fedlm.federation.silo import Silo, Workbench, answered
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.perturbed import perturbed_rows
from fedlm.federation.silo.text import pack_text
from fedlm.federation.silo.token_ledger import Draw, TokenBudget
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.models.chat import render
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.load import InvalidRecipeError, load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.own_silos import Network, data_file

FREE = TokenBudget(None, "run", date(2030, 1, 1))

WORDS = ["patient", "dose", "medicine", "bank", "money", "school", "science", "books"]

COLUMNS = "{question: question, choices: choices, answer: answer}"

RECIPE = f"""
name: icl
task: instruct
model: {{{{source: {{model}}, dtype: float32}}}}
data:
  sources: [{{{{path: rows.jsonl, columns: {{{COLUMNS}}}}}}}]
  partition: {{{{kind: natural, by: site}}}}
  split: {{{{validation: 0, test: 0}}}}
in_context:
  queries: {{{{path: asked.jsonl, columns: {{{COLUMNS}}}}}}}
  examples: 2
  peers: 1
training: {{{{steps: 1, max_length: 64}}}}
federation: {{{{rounds: 2, workers: 1}}}}
"""


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    draw, rows = np.random.default_rng(seed), []
    for number in range(count):
        choices = draw.permutation(WORDS)[: 2 + number % 2].tolist()
        question = " ".join(draw.choice(WORDS, 4).tolist())
        rows.append(
            {"question": question, "choices": choices, "answer": int(draw.integers(2)), "site": f"s{number % 3}"}
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    base = tmp_path_factory.mktemp("icl")
    for name, count, seed in (("rows", 30, 0), ("asked", 9, 1)):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(count, seed)))
    (base / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    return base


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", changes)


def facts(run: Path) -> tuple[str, str, list[Any]]:
    """All that a run leaves behind, without times and bytes."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds"), line.pop("bytes_up"), line.pop("bytes_down")
    state = json.loads((run / "answers.json").read_text())
    return (run / "evaluation.json").read_text(), json.dumps([state["zero_shot"], state["rounds"]]), lines


# ---------------------------------------------------------------- fusion


def logs(*shares: float) -> np.ndarray:
    return np.log(np.array(shares))


def test_fusion_in_closed_form() -> None:
    """The normalised geometric mean; and a majority that the mean does not follow."""
    silos = {"a": [logs(0.6, 0.4), logs(0.2, 0.8)], "b": [logs(0.6, 0.4), logs(0.2, 0.8)], "c": [logs(0.01, 0.99)] * 2}
    answers, means = fuse(silos, "mean")
    assert answers == [1, 1]
    geometric = np.array([(0.6 * 0.6 * 0.01) ** (1 / 3), (0.4 * 0.4 * 0.99) ** (1 / 3)])
    assert np.allclose(np.exp(means[0]), geometric / geometric.sum(), atol=1e-12, rtol=0)
    assert fuse(silos, "vote")[0] == [0, 1]
    tied = {"a": [logs(0.6, 0.4)], "b": [logs(0.1, 0.9)]}
    assert fuse(tied, "vote")[0] == [1], "the larger mean decides"
    assert (
        fuse({"a": [logs(0.5, 0.5)], "b": [logs(0.5, 0.5)]}, "vote")[0]
        == [0]
        == fuse(tied | {"b": tied["a"]}, "mean")[0]
    )
    one = fuse({"a": silos["a"]}, "mean")
    assert one[0] == [0, 1] and np.allclose(one[1][1], silos["a"][1], atol=1e-12, rtol=0)
    assert fuse(dict(reversed(list(silos.items()))), "mean")[1][0].tolist() == means[0].tolist(), "in no other order"


# ---------------------------------------------------------------- what a silo says


def request(recipe: Recipe, folder: Path, agreed: list[int], **fields: Any) -> Request:
    asked = [[query["question"], query["choices"]] for query in load_queries(recipe, folder)]
    return Request("s0", "answer", "run", 0, 0, pack_text({"queries": asked, "answers": agreed}), fields)


def test_without_examples_it_is_the_models_own_answer(folder: Path) -> None:
    recipe = recipe_of(folder)
    bench = Workbench(recipe, load_data(recipe, folder))
    bench.load()
    found, _ = answered.answer(bench, "s0", request(recipe, folder, [], alone=True), folder, FREE, simulated=True)
    rows = load_queries(recipe, folder)
    expected = score_choices(bench.model, bench.tokenizer, rows, "instruct", batch_tokens=2048)
    whole = torch.cat([torch.tensor(p).log_softmax(0) for p in expected.logprobs])
    assert torch.allclose(found["logps"].double(), whole, atol=1e-4, rtol=0)


def test_the_nearest_own_rows_stand_before_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(folder)
    bench = Workbench(recipe, load_data(recipe, folder))
    bench.load()
    texts: list[list[dict[str, str]]] = []

    def rendered(tokenizer: Any, turns: list[dict[str, str]], add: bool) -> str:
        texts.append(list(turns))
        return render(tokenizer, turns, add)

    monkeypatch.setattr(answered, "render", rendered)
    queries = load_queries(recipe, folder)
    answered.answer(bench, "s0", request(recipe, folder, []), folder, FREE, simulated=True)
    own = {r["question"]: r["choices"][r["answer"]] for r in bench.silo_data("s0").train}
    assert len(texts) == len(queries)
    for query, turns in zip(queries, texts, strict=True):
        assert [t["role"] for t in turns] == ["user", "assistant"] * 2 + ["user"] and turns[-1]["content"] == query[
            "question"
        ]
        assert all(own[turns[i]["content"]] == turns[i + 1]["content"] for i in (0, 2))
    states = answered._states(bench, [*own])
    asked = answered._states(bench, [q["question"] for q in queries]) - states.mean(0)
    centred = states - states.mean(0)
    likeness = (asked / np.linalg.norm(asked, axis=1, keepdims=True)) @ (
        centred / np.linalg.norm(centred, axis=1, keepdims=True)
    ).T
    for row, turns in zip(likeness, texts, strict=True):
        assert [*own][int(row.argmax())] == turns[2]["content"], "the most alike is the last"

    texts.clear()  # from the second round on: before them, another question with the answer that was agreed on
    agreed = [1] * len(queries)
    answered.answer(bench, "s0", request(recipe, folder, agreed), folder, FREE, simulated=True)
    answers = {query["question"]: query["choices"][1] for query in queries}
    for query, turns in zip(queries, texts, strict=True):
        assert len(turns) == 7 and turns[0]["content"] != query["question"]
        assert answers[turns[0]["content"]] == turns[1]["content"]


def test_a_question_never_sees_its_own_row_and_too_many_examples_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(folder, "in_context.examples=10")
    bench = Workbench(recipe, load_data(recipe, folder))
    bench.load()
    row = bench.silo_data("s0").train[0]
    seen: list[int] = []
    monkeypatch.setattr(answered, "render", lambda t, turns, add: (seen.append(len(turns)), render(t, turns, add))[1])
    monkeypatch.setattr(answered, "context_length", lambda _: 150)
    tensors = pack_text({"queries": [[row["question"], row["choices"]]], "answers": []})
    answered.answer(bench, "s0", Request("s0", "answer", "run", 0, 0, tensors), folder, FREE, simulated=True)
    whole = 2 * (len(bench.silo_data("s0").train) - 1) + 1
    assert seen[0] == whole and seen[-1] < whole, "9 others, of which 150 tokens hold fewer"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "no questions"),
        ({"queries": [], "answers": []}, "no questions"),
        ({"queries": [["q", ["a"]]], "answers": []}, "no questions"),
        ({"queries": [["q", ["a"] * 27]], "answers": []}, "no questions"),
        ({"queries": [["q" * 8001, ["a", "b"]]], "answers": []}, "no questions"),
        ({"queries": [["q", ["a", 1]]], "answers": []}, "no questions"),
        ({"queries": [["q", ["a", "b"]]] * 1001, "answers": []}, "above 1000"),
        ({"queries": [["q", ["a", "b"]]], "answers": [0, 1]}, "one answer for each"),
        ({"queries": [["q", ["a", "b"]]], "answers": [2]}, "not among the choices"),
        ({"queries": [["q", ["a", "b"]]], "answers": [True]}, "not among the choices"),
    ],
)
def test_a_request_is_checked_before_any_work(folder: Path, tmp_path: Path, value: Any, why: str) -> None:
    recipe = recipe_of(folder)
    silo = Silo("s0", Workbench(recipe, load_data(recipe, folder)), tmp_path)
    answer = silo.handle(Request("s0", "answer", "run", 0, 0, pack_text(value)))
    assert isinstance(answer, Failure) and why in answer.reason


# ---------------------------------------------------------------- noise on text

NOISED = "in_context.token_epsilon"


def noised(folder: Path, epsilon: float, *changes: str, secret: bytes = bytes(32)) -> tuple[Any, list[tuple[str, str]]]:
    """A silo's rows, and what is shown of them."""
    recipe = recipe_of(folder, f"{NOISED}={epsilon}", *changes)
    bench = Workbench(recipe, load_data(recipe, folder))
    bench.load()
    return bench.silo_data("s0").train, perturbed_rows(bench, "s0", secret, epsilon)[0]


def test_rows_are_drawn_anew_alike_whenever_they_are_the_same_rows(folder: Path) -> None:
    rows, shown = noised(folder, 8.0)
    plain = [(row["question"], row["choices"][row["answer"]]) for row in rows]
    assert len(shown) == len(plain) and not set(shown) & set(plain)
    assert noised(folder, 8.0)[1] == shown
    assert noised(folder, 8.0, secret=bytes([1]) * 32)[1] != shown, "it follows from the secret"
    other = noised(folder, 8.0, "data.sources.0.where={site: s0}", "data.sources.0.max_rows=9")[1]
    assert not set(other) & set(shown), "of other rows it is drawn anew, also of those that stayed"
    assert not set(noised(folder, 8.0001)[1]) & set(shown)
    nearly = noised(folder, 100.0)[1]
    assert sum(a == b for pair, true in zip(nearly, plain, strict=True) for a, b in zip(pair, true, strict=True)) > 10


def test_equal_rows_are_drawn_apart(folder: Path, tmp_path: Path) -> None:
    row = json.dumps({"question": "the bank lent money", "choices": ["bank", "dose"], "answer": 0, "site": "s0"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    (tmp_path / "asked.jsonl").write_text(row)
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    _, shown = noised(tmp_path, 4.0)
    assert len(set(shown)) == 3


def test_an_answer_among_choices_that_all_rows_have_is_one_of_them(folder: Path, tmp_path: Path) -> None:
    """By randomised response: at an epsilon of log 3 three times in four the true one of two."""
    rows = [{"text": f"bank {n}", "label": "yes" if n % 3 else "no", "site": "s0"} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    columns = "data.sources.0.columns={question: text, choices: ['yes', 'no'], answer: label}"
    found, shown = noised(tmp_path, math.log(3), columns)
    same = [said == row["choices"][row["answer"]] for row, (_, said) in zip(found, shown, strict=True)]
    assert {said for _, said in shown} == {"yes", "no"} and 0.68 < sum(same) / 400 < 0.82


def test_what_leaves_is_made_of_the_drawn_rows_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other rows behind the same drawn ones the reply has the same bits."""
    recipe = recipe_of(folder, f"{NOISED}=8")
    drawn = [("the drawn bank", "money"), ("another dose", "books"), ("science was", "school")]
    monkeypatch.setattr(answered, "perturbed_rows", lambda *_: (drawn, Draw("0" * 64, "1" * 64, 8.0)))
    told = []
    for silo in ("s0", "s1"):
        silo_ = Silo(silo, Workbench(recipe, load_data(recipe, folder)), tmp_path / silo)
        reply = silo_.handle(replace(request(recipe, folder, []), silo=silo))
        assert isinstance(reply, Reply)
        told.append(reply.tensors["logps"])
    assert torch.equal(*told)


def test_no_other_verb_tells_of_rows_and_the_card_counts_no_labels(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, f"{NOISED}=8", "data.sources.0.columns.label=site")
    silo = Silo("s0", Workbench(recipe, load_data(recipe, folder)), tmp_path)
    for verb in ("train", "evaluate", "profile", "pairs", "score"):
        refused = silo.handle(Request("s0", verb, "run", 0, 0, {}, {"role": "train"}))
        assert isinstance(refused, Failure) and refused.kind is FailureKind.REFUSED, verb
        assert "only answers have noise in this run" in refused.reason or verb in ("profile", "pairs", "score"), verb
    card = silo.handle(Request("s0", "hello", "run", -1, 0, {}, {}))
    assert (
        isinstance(card, Reply) and card.fields["card"]["labels"] == {} and card.fields["card"]["rows"]["train"] == 10
    )


def test_a_run_with_noise_goes_through_and_ends_alike(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, f"{NOISED}=12", "federation.rounds=1", "in_context.peers=2")
    for name in ("one", "two"):
        assert answer_questions(recipe, base=folder, run_dir=tmp_path / name).questions == 9
    assert facts(tmp_path / "one") == facts(tmp_path / "two")
    plain = recipe_of(folder, "federation.rounds=1", "in_context.peers=2")
    answer_questions(plain, base=folder, run_dir=tmp_path / "plain")
    assert facts(tmp_path / "plain") != facts(tmp_path / "one")


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "no answers to 2 questions"),
        ({"logps": torch.zeros(4)}, "no answers to 2 questions"),
        ({"logps": torch.zeros(5, dtype=torch.float64)}, "no answers to 2 questions"),
        ({"logps": torch.zeros(5)}, "no distribution"),
        ({"logps": torch.full((5,), float("nan"))}, "no distribution"),
        ({"logps": torch.tensor([0.0, float("-inf"), -1.1, -1.1, -1.1])}, "no distribution"),
    ],
)
def test_impossible_answers_are_refused(found: dict[str, torch.Tensor], why: str) -> None:
    with pytest.raises(UpdateRefused, match=why):
        checked(Reply("a", "answer", "run", 0, tensors=found), [2, 3])
    good = torch.cat([torch.zeros(2).log_softmax(0), torch.zeros(3).log_softmax(0)])
    assert [len(part) for part in checked(Reply("a", "answer", "run", 0, tensors={"logps": good}), [2, 3])] == [2, 3]


@pytest.mark.slow
def test_a_run_is_the_same_resumed_and_over_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(folder)
    found = answer_questions(recipe, base=folder, run_dir=tmp_path / "one")
    evaluation, answers, lines = facts(tmp_path / "one")
    assert found.questions == 9 and found.rounds == 2 and len(lines) == 2
    assert set(found.accuracy["silos"]) == {"s0", "s1", "s2"}
    assert found.accuracy["alone"] == pytest.approx(np.mean(list(found.accuracy["silos"].values())), abs=1e-12)
    right = [query["answer"] for query in load_queries(recipe, folder)]
    rounds = json.loads(answers)[1]
    for line, said in zip(lines, rounds, strict=True):
        assert line["fused"]["accuracy"] == np.mean([a == b for a, b in zip(said, right, strict=True)])
    bytes_up = json.loads((tmp_path / "one" / "rounds.jsonl").read_text().splitlines()[1])["bytes_up"]
    assert 3 * 4 * sum(len(q["choices"]) for q in load_queries(recipe, folder)) <= bytes_up < 2000

    calls, ask = [0], Asking.ask

    def dying(self: Asking, *args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # greeting, zero-shot, round 0, and now round 1
            raise KeyboardInterrupt
        return ask(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Asking, "ask", dying)
        with pytest.raises(KeyboardInterrupt):
            answer_questions(recipe, base=folder, run_dir=tmp_path / "killed")
    answer_questions(recipe, base=folder, run_dir=tmp_path / "killed", resume=True)
    assert facts(tmp_path / "killed") == (evaluation, answers, lines)
    answer_questions(recipe_of(folder, "federation.workers=2"), base=folder, run_dir=tmp_path / "workers")
    assert facts(tmp_path / "workers") == (evaluation, answers, lines)


def test_a_silo_that_fails_is_left_out_within_the_quorum(folder: Path, tmp_path: Path) -> None:
    class Failing:
        def __init__(self, recipe: Recipe) -> None:
            from fedlm.federation.engines.local import LocalEngine

            self.inner = LocalEngine(recipe, load_data(recipe, folder), tmp_path / "engine", base=folder)

        def silos(self) -> Any:
            return self.inner.silos()

        def exchange(self, requests: Any, deadline: Any = None, stop: Any = None) -> Any:  # noqa: ARG002
            for request in requests:
                if request.silo == "s1" and request.verb == "answer" and not request.fields:
                    yield Failure("s1", FailureKind.ERROR, "broken")
                else:
                    yield from self.inner.exchange([request])

        def close(self) -> None:
            self.inner.close()

    recipe = recipe_of(folder, "federation.rounds=1", "in_context.peers=2", "federation.quorum=0.6")
    with using(new_run(recipe, tmp_path / "run")) as directory:
        found = in_context.answer(recipe, load_queries(recipe, folder), Failing(recipe), directory)
    assert set(found.accuracy["silos"]) == {"s0", "s2"}
    assert "broken" in json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["failures"]["s1"]
    strict = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"quorum": 1.0})})
    with (
        using(new_run(strict, tmp_path / "strict")) as directory,
        pytest.raises(RunError, match=r"only 2 of 3.*broken"),
    ):
        in_context.answer(strict, load_queries(recipe, folder), Failing(strict), directory)


def test_organisations_answer_alike_and_must_allow_it(folder: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = recipe_of(folder)
    answer_questions(recipe, base=folder, run_dir=tmp_path / "local")
    there = recipe_of(folder, "data.sources=[]", "data.partition=null", "data.at_silos=true")
    asked = there.model_copy(update={"model": there.model.model_copy(update={"source": "/elsewhere/tiny"})})

    def owner(name: str, verbs: str) -> OwnSilo:
        place = tmp_path / f"{name}-{len(verbs)}"
        text = data_file(place, f"sources: [{{path: rows.jsonl, columns: {COLUMNS}, where: {{site: {name}}}}}]\n")
        (place / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
        rules = place / "policy.yaml"
        rules.write_text(f"models: {{tiny: {tiny_model_dir}}}\nallow: {verbs}\n")
        return OwnSilo(name, place / "states", text, rules)

    def run(name: str, verbs: str) -> None:
        network = Network(asked, {n: owner(n, verbs) for n in ("s0", "s1", "s2")}, fingerprint(there.model))
        with using(new_run(there, tmp_path / name)) as directory:
            in_context.answer(there, load_queries(recipe, folder), network, directory)

    run("network", "[hello, train, evaluate, answer]")
    assert facts(tmp_path / "network") == facts(tmp_path / "local")
    with pytest.raises(RunError, match="'answer' is not allowed"):
        run("refused", "[hello, train, evaluate]")


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("in_context.queries.columns={text: question}", "mapped to question"),
        ("in_context.queries.role=test", "all of them are questions"),
        ("in_context.queries.path=pypi:x", "pypi:"),
        ("federation.rounds=1", "no effect in a single round"),
        ("in_context.token_epsilon=0", "greater than 0"),
        ("in_context.token_epsilon=101", "less than or equal to 100"),
        ("search={candidates: [x]}", "drop this or `search`"),
        ("task=preference", "only 'instruct'"),
    ],
)
def test_settings_without_effect_are_refused(folder: Path, change: str, why: str) -> None:
    with pytest.raises(InvalidRecipeError, match=why):
        recipe_of(folder, change)


def test_questions_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(load_queries(recipe_of(folder, "in_context.queries.max_rows=4"), folder)) == 4
    monkeypatch.setattr(in_context, "MOST_QUERIES", 5)
    with pytest.raises(DataError, match="at most 5"):
        load_queries(recipe_of(folder), folder)
    monkeypatch.setattr(in_context, "MOST_CHOICES", 2)
    with pytest.raises(DataError, match="more than 2 choices"):
        load_queries(recipe_of(folder, "in_context.queries.max_rows=4"), folder)
