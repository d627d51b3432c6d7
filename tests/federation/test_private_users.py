"""Runs that protect users: what leaves and what does not, what it costs, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import DataError, RecipeError, RunError, TrainingError
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.policy import load_policy
from fedlm.federation.silo.privacy_rules import check_privacy, epsilon
from fedlm.federation.silo.private import PrivateRound, cost, units_of
from fedlm.federation.silo.refusals import Forbidden
from fedlm.messages import Failure, Reply, Request
from fedlm.privacy.ledger import read_spent
from fedlm.privacy.mechanisms import Poisson
from fedlm.report.audit import KEPT, NOISED, audit_of, html_page, leaving, meaning, sentence
from fedlm.training.encode import TokenSet
from tests.federation.conftest import RECIPE, WORDS, Tiny
from tests.federation.own_silos import data_file, greeting
from tests.federation.test_private import OneSilo, lines, run
from tests.training.private.helpers import texts

USERS = (
    "federation.algorithm={name: fedavg, weights: equal}",
    "federation.rounds=2",
    "training.clip_norm=null",
    "privacy={unit: user, user: person, epsilon: 8, delta: 1e-3, clip: 0.5, user_examples: 2}",
)
WHOLE = "data.split={validation: 0, test: 0}"
PEOPLE = 11
"""Of each silo, with two or three rows each."""


def person(site: int, number: int) -> str:
    return f"person-{site}-{number}@example.org"


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Tiny:
    base = tmp_path_factory.mktemp("people")
    draw = random.Random(0)
    with (base / "rows.jsonl").open("w") as file:
        for number in range(120):
            site, who = number % 4, number // 4 % PEOPLE
            prompt, response = (" ".join(draw.choices(WORDS, k=k)) for k in (6, 4))
            row = {"prompt": prompt, "response": response, "site": f"site{site}", "person": person(site, who)}
            file.write(json.dumps(row) + "\n")
    (base / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    return Tiny(base)


def test_the_same_bits_a_ledger_of_users_and_nobodys_name(
    people: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    one = run(people, tmp_path / "1", *USERS, WHOLE)
    two = run(people, tmp_path / "2", *USERS, WHOLE, "federation.workers=2")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for line in lines(tmp_path / "1"):
        assert line["loss"] is None and line["figures"] == {}
        assert all(silo.keys() == {"steps", "bytes_up", "bytes_down"} for silo in line["silos"].values())
    cards = json.loads((tmp_path / "1" / "data.json").read_text())["silos"]
    assert all(card["users"] == PEOPLE and card["rows"]["train"] == 1 and not card["labels"] for card in cards.values())
    ledgers = sorted((tmp_path / "1" / "silos").rglob("ledger.jsonl"))
    assert len(ledgers) == 4
    for ledger in ledgers:
        budget, spent = read_spent(ledger)
        assert budget.unit == "user" and list(budget.units.values()) == [PEOPLE]
        assert 7.9 < spent.epsilon <= budget.epsilon == 8
    names = [person(site, number).encode() for site in range(4) for number in range(PEOPLE)]
    names += [hashlib.sha256(name).hexdigest()[:12].encode() for name in names]
    told = caplog.text.encode()
    for file in (tmp_path / "1").rglob("*"):
        told += file.read_bytes() if file.is_file() else b""
    assert len(told) > 10_000 and not [name for name in names if name in told]


def test_the_noise_is_what_an_accountant_of_its_own_finds(people: Tiny) -> None:
    """4 of 11 users a step, 3 steps in each of 2 rounds: dp-accounting's epsilon of that noise is the budget."""
    found = cost(people.recipe(*USERS), "site0", PEOPLE)
    assert found.mechanism.unit == "user" and found.mechanism.noise_multiplier is not None
    assert found.mechanism.sampling == Poisson(4 / PEOPLE, secret=True) and found.mechanism.count == 3
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.GaussianDpEvent(found.mechanism.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(4 / PEOPLE, event), 6)
    assert accountant.get_epsilon(1e-3) == pytest.approx(8, abs=5e-3) and accountant.get_epsilon(1e-3) <= 8
    assert found.epsilon(2) == pytest.approx(accountant.get_epsilon(1e-3), abs=1e-3)


def test_a_round_trains_by_user(people: Tiny, tmp_path: Path) -> None:
    tokens = TokenSet.of([replace(e, user=i % 3) for i, e in enumerate(texts(6))])
    request = Request("site0", "train", "run", 0, 0, {}, {})
    keywords = PrivateRound(people.recipe(*USERS), request, tmp_path, "digest", simulated=True).trainer(tokens).keywords
    mechanism = keywords["mechanism"]
    assert (mechanism.user_examples, mechanism.expected, mechanism.rate, mechanism.steps) == (2, 3, 1.0, 3)
    draws = [keywords[name].bit_generator.state["state"]["key"].tolist() for name in ("draws", "picks")]
    assert draws[0] != draws[1]
    with pytest.raises(TrainingError, match="do not say whose they are"):
        units_of(people.recipe(*USERS), TokenSet.of(texts(2)))


def test_a_repeat_is_free_and_what_exceeds_the_budget_does_not_leave(people: Tiny, tmp_path: Path) -> None:
    one = OneSilo(people, tmp_path, people.recipe(*USERS, WHOLE))
    first = one.train(0)
    assert isinstance(first, Reply) and first.fields.keys() == {"steps"} and one.events == 1
    again = one.train(0)
    assert isinstance(again, Reply) and again.fields.get("repeated") and one.events == 1
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert isinstance(one.train(0, attempt=1, shift=0.1), Reply) and one.events == 2
    refused = one.train(1)
    assert isinstance(refused, Failure) and "this release" in refused.reason and one.events == 2


def test_one_row_a_user_trains_as_rows_do(people: Tiny, tmp_path: Path) -> None:
    """With a name of its own for each row the run has the noise and the bits of `unit: example`."""
    alike = ("federation.algorithm={name: fedavg, weights: equal}", *USERS[1:3], WHOLE)
    rows = run(people, tmp_path / "rows", *alike, "privacy={unit: example, epsilon: 8, delta: 1e-3, clip: 0.5}")
    each = "privacy={unit: user, user: '{prompt} {response}', epsilon: 8, delta: 1e-3, clip: 0.5, user_examples: 1}"
    users = run(people, tmp_path / "users", *alike, each)
    assert cost(people.recipe(*alike, each), "s", 30).mechanism.noise_multiplier is not None
    # The secret draws are keyed by the request, which is the same.
    assert all(torch.equal(rows[name], users[name]) for name in rows)


def test_delta_must_be_below_one_over_the_users(people: Tiny, tmp_path: Path) -> None:
    assert 1 / 30 < 0.05 < 1 / PEOPLE  # of the rows it would be too large
    with pytest.raises(RunError, match=r"delta is 0\.1; it must be above 0 and below 1/11"):
        run(people, tmp_path / "run", *USERS, WHOLE, "privacy.delta=0.1")
    run(people, tmp_path / "fine", *USERS, WHOLE, "privacy.delta=0.05", "federation.rounds=1")


def test_a_row_of_nobodys_is_refused(people: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (people.base / "rows.jsonl").read_text().splitlines()]
    rows[2]["person"] = "  "
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="does not say whose it is") as caught:
        load_data(people.recipe(*USERS, WHOLE), tmp_path)
    assert caught.value.where == "rows.jsonl:3" and "person-" not in str(caught.value)
    skipping = load_data(people.recipe(*USERS, WHOLE, "data.malformed=skip"), tmp_path)
    assert skipping.skipped == {"malformed": 1}
    with pytest.raises(DataError, match="there is no column 'nobody'"):
        load_data(people.recipe(*USERS, "privacy.user=nobody"), people.base)


def test_a_sources_own_column_goes_first_and_spaces_are_no_names(people: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (people.base / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"who": f"{' ' * (number % 3)}{number % 12}"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    by_source = "data.sources=[{path: rows.jsonl, columns: {prompt: prompt, response: response, user: who}}]"
    data = load_data(people.recipe(*USERS, WHOLE, by_source), tmp_path)
    assert [data.users(name) for name in data.names] == [3, 3, 3, 3]
    assert load_data(people.recipe(*USERS, WHOLE), tmp_path).users("site0") == PEOPLE
    plain = load_data(people.recipe(WHOLE, by_source), tmp_path)  # nobody asks whose they are
    assert plain.users("site0") == 0 and set(plain.silo("site0").train["user"][:]) == {""}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (("privacy.user=null",), "needs the column that says whose a row is"),
        (("privacy.user='{person'",), "privacy.user"),
        (("federation.algorithm.weights=examples",), "how many rows a silo has tells of its users"),
        (("privacy.unit=example",), "privacy.user: has no effect with `privacy.unit: example`"),
        (("privacy.user_examples=0",), "greater than 0"),
        (("training.clip_norm=1.0",), "privacy clips each user's: set it to null"),
        (("training.order=sequential",), "order"),
        (("privacy.adaptive={}",), "or a user's, stays what it is"),
        (("federation.algorithm.name=scaffold",), "'user' not with 'scaffold'"),
        (("federation.algorithm.name=fedbuff",), "nobody knows beforehand how often a silo trains"),
        (("data.selection={method: feddqc}",), "not under `privacy`"),
    ],
)
def test_what_cannot_be_is_said_at_load(people: Tiny, changes: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        people.recipe(*USERS, *changes)
    assert wanted in str(caught.value)


def test_an_owner_limits_it_as_any_noise_of_the_silos_own(people: Tiny, tmp_path: Path) -> None:
    recipe = people.recipe(*USERS)
    assert epsilon(recipe) == 8
    for limit, allowed in ((9, True), (7, False)):
        (tmp_path / "policy.yaml").write_text(f"privacy: {{max_epsilon: {limit}}}\n")
        policy = load_policy(tmp_path / "policy.yaml")
        if allowed:
            check_privacy(policy.privacy, policy.min_cohort, recipe)
        else:
            with pytest.raises(Forbidden, match="epsilon"):
                check_privacy(policy.privacy, policy.min_cohort, recipe)


def test_who_insists_on_users_names_the_column_and_it_counts(
    people: Tiny, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A recipe that calls every row another person's would make `unit: example` of it."""
    recipe = people.recipe(
        *USERS, WHOLE, "data.sources=[]", "data.partition=null", "data.at_silos=true", "privacy.user=prompt"
    )
    (tmp_path / "rows.jsonl").write_bytes((people.base / "rows.jsonl").read_bytes())
    rules = tmp_path / "policy.yaml"
    rules.write_text(f"models: {{{tiny_model_dir.name}: {tiny_model_dir}}}\nprivacy: {{unit: user}}\n")

    def owner(columns: str, policy: Path = rules) -> OwnSilo:
        source = (
            f"{{path: rows.jsonl, where: {{site: site0}}, columns: {{prompt: prompt, response: response{columns}}}}}"
        )
        return OwnSilo("site0", tmp_path / "states", data_file(tmp_path, f"sources: [{source}]\n"), policy)

    greet = Request("site0", "hello", "run", -1, fields=greeting(recipe))
    reply = owner(", user: person").handle(greet)
    assert isinstance(reply, Reply) and reply.fields["card"]["users"] == PEOPLE
    with pytest.raises(RecipeError, match="the recipe would choose it") as caught:
        owner("")
    assert caught.value.where == f"{tmp_path / 'data.yaml'}: sources.0.columns" and "user: COLUMN" in str(caught.value)
    with pytest.raises(RecipeError, match="the recipe would say whose a row is"):
        OwnSilo("site0", tmp_path / "states", data_file(tmp_path, "share_of_recipe: true\n"), rules)
    rules.write_text(f"models: {{{tiny_model_dir.name}: {tiny_model_dir}}}\n")  # who does not insist need not say
    trusting = owner("").handle(Request("site0", "hello", "other", -1, fields=greeting(recipe)))
    assert isinstance(trusting, Reply) and trusting.fields["card"]["users"] == 30


def test_the_audit_says_who_is_protected_and_how_many(people: Tiny, tmp_path: Path) -> None:
    found = {item.what: item.protection for item in leaving(people.recipe(*USERS))}
    assert found["an update of the adapter"] == NOISED
    assert found["whose a row is"] == found["how many rows it trains on"] == KEPT
    assert "in the open" in found["of how many users it has rows"]
    run(people, tmp_path / "run", *USERS, WHOLE)
    audit = audit_of(tmp_path / "run")
    assert audit.guarantee is not None and audit.guarantee.unit == "user" and audit.guarantee.by_ledger
    assert audit.guarantee.protected == {f"site{n}": PEOPLE for n in range(4)}
    assert f"of {PEOPLE} users" in audit.guarantee.mechanism
    assert "all rows of one person" in meaning(audit.guarantee) and "Each user" in sentence(audit)
    assert any("k silos" in line for line in audit.open_ends)
    assert f"{PEOPLE} users" in html_page(audit)
    assert audit.as_json()["guarantee"]["protected"]["site0"] == PEOPLE


def test_a_whole_document_is_its_writers(people: Tiny, tmp_path: Path) -> None:
    """Pre-training cuts rows into examples, all of which are one user's; `unit: example` refuses that."""
    source = "data.sources=[{path: rows.jsonl, columns: {text: prompt}}]"
    result = run(people, tmp_path / "run", *USERS, WHOLE, "task=pretrain", source, "training.max_length=8")
    assert result
    for ledger in (tmp_path / "run" / "silos").rglob("ledger.jsonl"):
        assert list(read_spent(ledger)[0].units.values()) == [PEOPLE]
