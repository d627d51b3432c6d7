"""What noise on text costs: each draw once, on disk before anything leaves, and no more than the owner allows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedlm.federation.silo.own
from fedlm.cli.main import app
from fedlm.data.federated import load_data
from fedlm.errors import PrivacyError
from fedlm.federation.in_context import answer_questions
from fedlm.federation.silo import Silo, Workbench, answered, auditlog
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.refusals import RefusedError
from fedlm.federation.silo.secret import FILE as KEY
from fedlm.federation.silo.token_ledger import FILE, Draw, TokenBudget, TokensSpent, charge, tokens_spent
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.privacy import chain
from fedlm.privacy.text import probabilities, responded
from fedlm.report.audit import audit_of, html_page
from tests.federation.own_silos import data_file, greeting
from tests.federation.test_in_context import COLUMNS, folder, recipe_of, request  # noqa: F401  (a fixture)

DAY = date(2030, 1, 31)
OPEN = TokenBudget(None, "run", DAY)


def draw(number: int, epsilon: float, content: int = 0) -> Draw:
    key, drawn = (hashlib.sha256(word.encode()).hexdigest() for word in (f"key {number}", f"content {content}"))
    return Draw(key, drawn, epsilon)


# ---------------------------------------------------------------- the ledger


def test_epsilons_of_different_draws_add_up_and_a_repeat_is_free(tmp_path: Path) -> None:
    assert tokens_spent(tmp_path / "silo") is None
    for number, epsilon, total in ((1, 8.0, 8), (2, 0.5, 8.5), (1, 8.0, 8.5), (3, 8.0, 16.5), (2, 0.5, 16.5)):
        charge(tmp_path / "silo", draw(number, epsilon), f"run{number}", OPEN)
        assert tokens_spent(tmp_path / "silo") == TokensSpent(total, math.ceil(total / 8)), "by hand"
    charge(tmp_path / "silo", draw(1, 8.0), "another run", TokenBudget(1.0, "year", date(2031, 1, 1)))
    assert tokens_spent(tmp_path / "silo") == TokensSpent(16.5, 3), "whoever repeats it, and whatever is allowed"
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "silo").iterdir())


def test_what_two_independent_draws_tell_is_their_sum() -> None:
    """Two randomised responses reach it exactly, whatever two draws of tokens stay below it, and so says an accountant
    of Laplace noise, the other mechanism of pure epsilon."""
    first, second, steps = math.log(3), math.log(2), 6000
    shares = np.zeros((2, 2, 2))
    for which, epsilon in enumerate((first, second)):
        for truth in (0, 1):
            found = [responded(truth, 2, (i + 0.5) / steps, epsilon) for i in range(steps)]
            shares[which, truth] = np.bincount(found, minlength=2) / steps
    both = np.einsum("ta,tb->tab", shares[0], shares[1])
    assert (both[0] / both[1]).max() == pytest.approx(math.exp(first + second), rel=1e-6)

    points = np.random.default_rng(0).normal(size=(2, 12, 3))
    distances = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    chances = [probabilities(d / d.max(), e) for d, e in zip(distances, (3.0, 5.0), strict=True)]
    logs = np.log(np.einsum("ta,tb->tab", *chances))
    worst = (logs[:, None] - logs[None]).max()
    assert 0.3 * 8 < worst <= 8

    accountant = dp_accounting.pld.PLDAccountant()
    for epsilon in (0.7, 0.5):
        accountant.compose(dp_accounting.LaplaceDpEvent(1 / epsilon))
    assert accountant.get_epsilon(1e-9) == pytest.approx(1.2, abs=1e-3)


@pytest.mark.parametrize(
    ("per", "second", "day", "allowed"),
    [
        ("run", "run", DAY, False),
        ("run", "other", DAY, True),
        ("month", "other", DAY, False),
        ("month", "other", date(2030, 2, 1), True),
        ("year", "other", date(2030, 2, 1), False),
        ("year", "other", date(2031, 1, 1), True),
    ],
)
def test_an_owner_limits_a_run_a_month_or_a_year(
    tmp_path: Path, per: Any, second: str, day: date, allowed: bool
) -> None:
    charge(tmp_path, draw(1, 12.0), "run", TokenBudget(20.0, per, DAY))
    charge(tmp_path, draw(2, 8.0), "run", TokenBudget(20.0, per, DAY))
    asked = draw(3, 0.5)
    if allowed:
        charge(tmp_path, asked, second, TokenBudget(20.0, per, day))
    else:
        told = rf"epsilon of 20 a token per {per} \(privacy.max_token_epsilon\).*have cost 20 of it.*another 0.5"
        with pytest.raises(RefusedError, match=told) as refusal:
            charge(tmp_path, asked, second, TokenBudget(20.0, per, day))
        assert refusal.value.line == "privacy.max_token_epsilon"
    assert tokens_spent(tmp_path) == TokensSpent(20.5 if allowed else 20.0, 3 if allowed else 2)
    charge(tmp_path, draw(1, 12.0), second, TokenBudget(20.0, per, day))  # as before


def test_the_same_randomness_for_other_rows_is_refused(tmp_path: Path) -> None:
    """What both tell together no sum bounds."""
    charge(tmp_path, draw(1, 8.0), "run", OPEN)
    with pytest.raises(PrivacyError, match="came out as others") as caught:
        charge(tmp_path, draw(1, 8.0, content=1), "run", OPEN)
    assert KEY in str(caught.value) and tokens_spent(tmp_path) == TokensSpent(8.0, 1)


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "opened", "schema": 2, "unit": "token"},
        {"kind": "drawn", "draw": "a", "content": "b", "epsilon": -8.0, "run": "run", "day": "2030-01-31"},
        {"kind": "drawn", "draw": "a", "content": "b", "run": "run", "day": "2030-01-31"},
        {"kind": "charged"},
    ],
)
def test_a_ledger_of_another_kind_lets_nothing_leave(tmp_path: Path, line: dict[str, Any]) -> None:
    with chain.Chain(tmp_path / FILE) as file:
        if line["kind"] != "opened":
            file.append({"kind": "opened", "schema": 1, "unit": "token"})
        file.append(line)
    for ask in (lambda: charge(tmp_path, draw(1, 8.0), "run", OPEN), lambda: tokens_spent(tmp_path)):
        with pytest.raises(PrivacyError, match=r"no.* ledger of noise on text"):
            ask()


@pytest.mark.parametrize("writes", range(1, 6))
def test_killed_while_it_is_written_it_counts_once(tmp_path: Path, writes: int) -> None:
    """By SIGKILL in the middle of each write: of the first line and its copy, of the draw's and its copy, and after
    all of them."""
    child = os.fork()
    if not child:
        whole, done = chain._write, 0

        def torn(descriptor: int, data: bytes) -> None:
            nonlocal done
            done += 1
            if done == writes:
                whole(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            whole(descriptor, data)

        chain._write = torn
        charge(tmp_path, draw(1, 8.0), "run", OPEN)
        os.kill(os.getpid(), signal.SIGKILL)  # before anything is sent
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    for _ in range(2):
        charge(tmp_path, draw(1, 8.0), "run", OPEN)
        assert tokens_spent(tmp_path) == TokensSpent(8.0, 1)


# ---------------------------------------------------------------- at the door


def simulated(folder: Path, states: Path, *changes: str) -> Silo:  # noqa: F811
    recipe = recipe_of(folder, *changes)
    return Silo("s0", Workbench(recipe, load_data(recipe, folder)), states)


def test_each_draw_is_charged_before_it_is_shown(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eight, asked = "in_context.token_epsilon=8", request(recipe_of(folder), folder, [])

    def spent() -> tuple[float, int]:
        found = tokens_spent(tmp_path / "s0")
        return (0.0, 0) if found is None else (found.epsilon, found.draws)

    def dying(*_: Any) -> Any:
        assert spent() == (8.0, 1), "before rows are even compared with questions"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answered, "_states", dying)
        with pytest.raises(KeyboardInterrupt):
            simulated(folder, tmp_path, eight).handle(asked)
    silo = simulated(folder, tmp_path, eight)
    assert isinstance(silo.handle(replace(asked, fields={"alone": True})), Reply) and spent() == (8.0, 1)
    first = silo.handle(asked)
    assert isinstance(first, Reply) and spent() == (8.0, 1), "the rows that were paid for leave now"
    for again in (replace(asked, round=1), replace(asked, run="other", attempt=3)):
        reply = simulated(folder, tmp_path, eight, "in_context.examples=2").handle(again)
        assert isinstance(reply, Reply) and torch.equal(reply.tensors["logps"], first.tensors["logps"])
    assert spent() == (8.0, 1)

    fewer = ("data.sources.0.where={site: s0}", "data.sources.0.max_rows=9")
    for changes, total in (
        (("in_context.token_epsilon=12",), 20.0),
        ((eight, *fewer), 28.0),
        ((eight, "seed=5"), 36.0),  # a simulated silo's secret is another then
        ((eight, "in_context.examples=3"), 36.0),
    ):
        assert isinstance(simulated(folder, tmp_path, *changes).handle(asked), Reply)
        assert spent()[0] == total, changes
    assert isinstance(simulated(folder, tmp_path / "plain").handle(asked), Reply)
    assert tokens_spent(tmp_path / "plain" / "s0") is None, "rows as they are cost no epsilon and have none"


def test_what_cannot_be_charged_does_not_leave(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    silo, asked = (simulated(folder, tmp_path, "in_context.token_epsilon=8"), request(recipe_of(folder), folder, []))
    (tmp_path / "s0").mkdir()
    (tmp_path / "s0" / FILE).write_text("no ledger\n")
    (tmp_path / "s0" / FILE).chmod(0o600)
    for _ in range(2):
        answer = silo.handle(asked)
        assert isinstance(answer, Failure) and "is not what was written" in answer.reason


@pytest.fixture
def owner(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    tiny_model_dir: Path,
) -> Callable[[str], OwnSilo]:
    def make(rules: str) -> OwnSilo:
        source = f"{{path: rows.jsonl, columns: {COLUMNS}, where: {{site: s0}}}}"
        text = data_file(tmp_path / "owner", f"sources: [{source}]\n")
        (tmp_path / "owner/rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
        policy = tmp_path / "owner/policy.yaml"
        policy.write_text(f"models: {{{tiny_model_dir.name}: {tiny_model_dir}}}\n{rules}")
        return OwnSilo("s0", tmp_path / "states", text, policy)

    return make


def test_an_owner_limits_what_draws_of_a_month_cost(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    owner: Callable[[str], OwnSilo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = "allow: [hello, answer]\nprivacy: {max_token_epsilon: 20, per: month}\n"
    there = ("data.sources=[]", "data.partition=null", "data.at_silos=true")
    monkeypatch.setattr(fedlm.federation.silo.own, "now", lambda: datetime(2030, 1, 31, 12, tzinfo=UTC))

    def asked(run: str, epsilon: float) -> Reply | Failure:
        silo, recipe = owner(rules), recipe_of(folder, *there, f"in_context.token_epsilon={epsilon}")
        hello = silo.handle(Request("s0", "hello", run, -1, fields=greeting(recipe)))
        assert isinstance(hello, Reply), hello
        queries = request(recipe, folder, [])
        return owner(rules).handle(replace(queries, run=run))  # by another process, after a restart

    states = tmp_path / "states/s0"
    first = asked("first", 12.0)
    again = asked("second", 12.0)
    assert isinstance(first, Reply) and isinstance(again, Reply)
    assert torch.equal(first.tensors["logps"], again.tensors["logps"])
    assert tokens_spent(states) == TokensSpent(12.0, 1)
    refused = asked("third", 9.0)
    assert isinstance(refused, Failure) and refused.kind is FailureKind.REFUSED
    assert "20 a token per month (privacy.max_token_epsilon)" in refused.reason
    assert "have cost 12 of it, and this one would cost another 9" in refused.reason
    line = auditlog.read(states / "_audit.jsonl").lines[-1]
    assert (line["verb"], line["outcome"], line["line"]) == ("answer", "refused", "privacy.max_token_epsilon")
    assert tokens_spent(states) == TokensSpent(12.0, 1)
    (states / KEY).unlink()  # with another secret the same rows are drawn anew, and that is another draw
    assert isinstance(asked("fourth", 12.0), Failure) and isinstance(asked("fifth", 8.0), Reply)
    assert tokens_spent(states) == TokensSpent(20.0, 2)
    monkeypatch.setattr(fedlm.federation.silo.own, "now", lambda: datetime(2030, 2, 1, 12, tzinfo=UTC))
    assert isinstance(asked("sixth", 9.0), Reply)

    shown = CliRunner().invoke(app, ["audit", "log", str(states / "_audit.jsonl")])
    assert shown.exit_code == 0 and "epsilon of 29 at most (draws: 3)" in " ".join(shown.stdout.split())
    shown = CliRunner().invoke(app, ["audit", "log", str(states / "_audit.jsonl"), "--json"])
    assert json.loads(shown.stdout)["noise_on_text"] == {"epsilon": 29.0, "draws": 3}


def test_an_audit_of_a_run_shows_what_its_ledgers_say(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = recipe_of(folder, "in_context.token_epsilon=12", "in_context.peers=1")
    answer_questions(recipe, base=folder, run_dir=tmp_path / "run")
    found = audit_of(tmp_path / "run")
    assert found.tokens == {f"s{n}": 12.0 for n in range(3)}, "once, though there were two rounds"
    assert found.as_json()["token_epsilon_spent"] == found.tokens and found.guarantee is None
    page = html_page(found)
    assert "Noise on text" in page and "epsilon a token" in page
    shown = CliRunner().invoke(app, ["audit", str(tmp_path / "run")])
    assert shown.exit_code == 0 and "epsilon a token, by the silo's ledger" in " ".join(shown.stdout.split())
    answer_questions(recipe_of(folder, "in_context.peers=1"), base=folder, run_dir=tmp_path / "plain")
    assert audit_of(tmp_path / "plain").tokens == {} and "Noise on text" not in html_page(audit_of(tmp_path / "plain"))
