"""The ledger: what is charged is on disk first, survives kill -9, cannot be changed unseen, and cannot be overdrawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlm.errors import BudgetExceeded, PrivacyError
from fedlm.privacy import chain
from fedlm.privacy.accounting import spent
from fedlm.privacy.chain import Chain, read_chain
from fedlm.privacy.ledger import Budget, Event, Ledger, Receipt, read_spent
from fedlm.privacy.mechanisms import DistributedNoise, FixedSize, Gaussian, Mechanism, Poisson

DELTA = 1e-3
SILOS = {"a": 400, "b": 300}
BUDGET = Budget("example", "zero-out", 4.0, DELTA, SILOS)
STEP = Gaussian("example", "zero-out", 4.0)
DRIVER = Path(__file__).parent / "ledger_driver.py"


def event(
    round_: int, silo: str | None = "a", mechanism: Mechanism = STEP, content: str = "bytes", **more: object
) -> Event:
    fields = {"run": "r1", "round": round_, "attempt": 0, "silo": silo, "mechanism": mechanism, **more}
    return Event(content=hashlib.sha256(content.encode()).hexdigest(), **fields)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_spends_what_the_accountants_say(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        assert ledger.spent().epsilon == 0
        for round_ in range(3):
            assert ledger.charge(event(round_)).charged
        assert ledger.spent() == spent([Gaussian("example", "zero-out", 4.0, count=3)], DELTA)


def test_each_silo_has_its_own_sum(path: Path) -> None:
    """Parallel composition: examples of b are in no release of a; a release of everybody costs both."""
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0, "a"))
        ledger.charge(event(1, "a"))
        ledger.charge(event(1, "b"))
        ledger.charge(event(2, None))
        assert ledger.spent("a") == ledger.spent() == spent([STEP] * 3, DELTA)
        assert ledger.spent("b") == spent([STEP] * 2, DELTA)
        with pytest.raises(PrivacyError, match="no silo 'c'"):
            ledger.spent("c")


def test_users_may_be_in_every_silo(path: Path) -> None:
    budget = dataclasses.replace(BUDGET, unit="user")
    step = dataclasses.replace(STEP, unit="user")
    with Ledger(path, budget) as ledger:
        ledger.charge(event(0, "a", step))
        ledger.charge(event(0, "b", step))
        assert ledger.spent("a") == ledger.spent("b") == spent([step] * 2, DELTA)


def test_the_charge_that_would_exceed_is_refused_and_leaves_nothing(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        charged = 0
        with pytest.raises(BudgetExceeded) as refused:
            for round_ in range(1000):
                ledger.charge(event(round_))
                charged += 1
        assert spent([STEP] * charged, DELTA).epsilon <= 4.0 < spent([STEP] * (charged + 1), DELTA).epsilon
        sentence, total = str(refused.value), spent([STEP] * charged, DELTA).epsilon
        assert f"a: epsilon {total:.4g} of 4 is spent at delta 0.001" in sentence and "noise 4, once" in sentence
        before = path.read_bytes()
        with pytest.raises(BudgetExceeded):
            ledger.charge(event(2000))
        assert path.read_bytes() == before
        assert ledger.charge(event(2000, "b")).charged


def test_one_silo_without_budget_stops_a_release_of_all(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0, "a", Gaussian("example", "zero-out", 1.2)))
        with pytest.raises(BudgetExceeded, match=r"^.*: a: epsilon"):
            ledger.charge(event(1, None, Gaussian("example", "zero-out", 1.0)))
        assert ledger.spent("b").epsilon == 0


def test_the_same_bytes_again_are_free_and_other_bytes_are_not(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        first = ledger.charge(event(0))
        again = ledger.charge(event(0))
        assert (again.index, again.digest, again.charged) == (first.index, first.digest, False)
    with Ledger(path, BUDGET) as ledger:  # after a restart too
        assert not ledger.charge(event(0)).charged
        others = [
            event(0, content="other"),
            event(1),
            event(0, "b"),
            event(0, attempt=1),
            event(0, run="r2"),
            event(0, stage="align"),
            event(0, mechanism=Gaussian("example", "zero-out", 5.0)),
        ]
        assert all(ledger.charge(other).charged for other in others)


def test_runs_stages_and_earlier_ledgers_compose(tmp_path: Path) -> None:
    """A ledger that includes two others, one of which includes the first as well, counts every event once."""
    paths = [tmp_path / name for name in ("one", "two", "three")]
    with Ledger(paths[0], BUDGET) as one:
        one.charge(event(0, stage="pretrain"))
        one.charge(event(1, None, stage="pretrain"))
    with Ledger(paths[1], BUDGET) as two:
        assert two.include(paths[0]) == 2
        assert two.include(paths[0]) == 0
        two.charge(event(0, stage="instruct"))
    with Ledger(paths[2], BUDGET) as three:
        assert three.include(paths[0]) == 2
        assert three.include(paths[1]) == 1
        assert three.spent("a") == spent([STEP] * 3, DELTA)
        assert three.spent("b") == spent([STEP], DELTA)
        assert not three.charge(event(0, stage="pretrain")).charged  # bytes of the included run, sent once more
    with Ledger(paths[0], BUDGET) as one:
        one.charge(event(2, stage="pretrain"))
    with Ledger(paths[2], BUDGET) as three:
        assert three.include(paths[0]) == 1
        assert three.spent("a") == spent([STEP] * 4, DELTA)


def test_what_was_spent_elsewhere_counts_beyond_the_budget(tmp_path: Path) -> None:
    with Ledger(tmp_path / "one", dataclasses.replace(BUDGET, epsilon=50.0)) as one:
        one.charge(event(0, mechanism=Gaussian("example", "zero-out", 0.3)))
    with Ledger(tmp_path / "two", BUDGET) as two:
        two.include(tmp_path / "one")
        assert two.spent("a").epsilon > 4.0
        with pytest.raises(BudgetExceeded):
            two.charge(event(1, mechanism=Gaussian("example", "zero-out", 1000.0)))


def test_pld_and_rdp_beside_each_other(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0, mechanism=Gaussian("example", "zero-out", 1.0, Poisson(0.02, secret=True), 50)))
        ledger.charge(event(1))
        found = ledger.spent()
        assert found.pld is not None and found.rdp is not None and 0 < found.pld < found.rdp
        ledger.charge(event(2, mechanism=DistributedNoise("example", "zero-out", "skellam", 9.0, 1e4, 10, 3)))
        assert ledger.spent().pld is None and ledger.spent().epsilon == ledger.spent().rdp


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (event(0, mechanism=Gaussian("silo", "zero-out", 4.0)), "of a silo"),
        (event(0, mechanism=Gaussian("example", "replace", 4.0)), "replace of a example"),
        (event(0, "c"), "no silo 'c'"),
        (
            event(0, mechanism=Gaussian("example", "zero-out", 4.0, FixedSize(2, 9, secret=True))),
            "no accountant covers",
        ),
        (event(0, mechanism=Gaussian("example", "zero-out", None)), "no noise multiplier"),
        (dataclasses.replace(event(0), content="abc"), "SHA-256"),
    ],
)
def test_events_that_cannot_be_counted(path: Path, asked: Event, word: str) -> None:
    with Ledger(path, BUDGET) as ledger:
        before = path.read_bytes()
        with pytest.raises(PrivacyError, match=word):
            ledger.charge(asked)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"delta": 1 / 300}, {"delta": 0.5}, {"epsilon": 0.0}, {"units": {}}, {"units": {"a": 0}}, {"unit": "row"}],
)
def test_budgets_that_are_none(change: dict[str, object]) -> None:
    with pytest.raises(PrivacyError):
        dataclasses.replace(BUDGET, **change)  # type: ignore[arg-type]


def test_silos_as_units_are_counted_as_silos() -> None:
    Budget("silo", "zero-out", 1.0, 0.3, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(PrivacyError, match="1/3"):
        Budget("silo", "zero-out", 1.0, 0.4, {"a": 1, "b": 1, "c": 1})


def test_another_budget_is_refused(path: Path) -> None:
    Ledger(path, BUDGET).close()
    with pytest.raises(PrivacyError, match=r"another budget: \(4, 0.001\).*include this one"):
        Ledger(path, dataclasses.replace(BUDGET, epsilon=5.0))
    Ledger(path, BUDGET).close()  # and the lock is free again


def test_two_writers(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        with pytest.raises(PrivacyError, match="another process"):
            Ledger(path, BUDGET)
        ledger.charge(event(0))
        assert read_spent(path) == (BUDGET, ledger.spent())
    Ledger(path, BUDGET).close()


def test_only_its_owner_may_read(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0))
    assert {oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {"0o600"}
    path.chmod(0o640)
    with pytest.raises(PrivacyError, match="chmod 600"):
        Ledger(path, BUDGET)


def test_it_is_on_disk_before_charge_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is flushed in both files, the one beside first; nothing is written after the last flush."""
    calls: list[str] = []
    write, fsync = chain._write, os.fsync
    with Ledger(path, BUDGET) as ledger:

        def written(descriptor: int, data: bytes) -> None:
            calls.append("write " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
            write(descriptor, data)

        def flushed(descriptor: int) -> None:
            calls.append("flush " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
            fsync(descriptor)

        monkeypatch.setattr(chain, "_write", written)
        monkeypatch.setattr(os, "fsync", flushed)
        ledger.charge(event(0))
    beside = ".ledger.jsonl.last.tmp"
    assert calls == [
        f"write {beside}",
        f"flush {beside}",
        f"flush {path.parent.name}",
        "write ledger.jsonl",
        "flush ledger.jsonl",
    ]


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """Whatever a killed process had released is in the ledger, and at most one charge more per kill."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), "24"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    released = json.loads(done.stdout)
    path = tmp_path / "ledger.jsonl"
    budget = Budget("silo", "zero-out", 50.0, 0.01, {"a": 1, "b": 1, "c": 1})
    with Ledger(path, budget):
        records = read_chain(path)
    charged = {record["round"]: record for record in records[1:]}
    assert len(charged) == len(records) - 1  # nothing twice
    total = 0
    for i, child in enumerate(released):
        numbers = [number for number, _, _ in child]
        assert numbers == list(range(i * 10_000, i * 10_000 + len(child)))
        assert all(records[index]["hash"] == digest == charged[number]["hash"] for number, index, digest in child)
        mine = [number for number in charged if number // 10_000 == i]
        assert len(child) <= len(mine) <= len(child) + 1
        total += len(mine) - len(child)
    assert sum(map(len, released)) > 60 and total > 0


def cut(path: Path, bytes_: int) -> None:
    path.write_bytes(path.read_bytes()[:-bytes_])


@pytest.mark.parametrize("bytes_", [1, 40, 300])
def test_a_torn_last_line_counts(path: Path, bytes_: int) -> None:
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0))
        ledger.charge(event(1))
        before, total = path.read_bytes(), ledger.spent()
    cut(path, bytes_)
    assert read_spent(path)[1] == total  # even for a reader, who mends nothing
    with Ledger(path, BUDGET) as ledger:
        assert ledger.recovered and ledger.spent() == total
        assert not ledger.charge(event(1)).charged
    assert path.read_bytes() == before
    with Ledger(path, BUDGET) as ledger:
        assert not ledger.recovered


def test_a_power_cut_that_left_zeros(path: Path) -> None:
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0))
        before = path.read_bytes()
    cut(path, 100)
    with path.open("ab") as file:
        file.write(bytes(100))
    with Ledger(path, BUDGET) as ledger:
        assert ledger.recovered and not ledger.charge(event(0)).charged
    assert path.read_bytes() == before


def test_torn_while_it_was_made(path: Path) -> None:
    Ledger(path, BUDGET).close()
    cut(path, 20)
    with Ledger(path, BUDGET) as ledger:
        assert ledger.recovered and ledger.charge(event(0)).charged


def test_a_full_disk_spends_and_stops(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A charge that could not be written to its end is never released, counts, and must be settled before the next."""
    ledger = Ledger(path, BUDGET)
    write, lines = chain._write, []

    def full(descriptor: int, data: bytes) -> None:
        lines.append(data)
        if len(lines) == 2:
            write(descriptor, data[:30])
            raise OSError(28, "No space left on device")
        write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(chain, "_write", full)
        with pytest.raises(OSError, match="No space"):
            ledger.charge(event(0))
    with pytest.raises(PrivacyError, match="open it again"):
        ledger.charge(event(1))
    ledger.close()
    with Ledger(path, BUDGET) as again:
        assert again.recovered and again.spent("a") == spent([STEP], DELTA)


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True)))) and None


def rehashed(path: Path) -> None:
    """Weaken a line and give it a hash that fits: the next one's `previous` no longer does."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    found[1]["mechanism"]["noise_multiplier"] = 40.0
    body = {name: value for name, value in found[1].items() if name != "hash"}
    found[1] = chain.linked({k: v for k, v in body.items() if k not in chain.RESERVED}, 1, body["previous"])
    path.write_bytes(b"".join(chain._line(record) for record in found))


@pytest.mark.parametrize(
    "tamper",
    [
        replaced('"noise_multiplier":4.0', '"noise_multiplier":40.0'),
        replaced('"noise_multiplier":4.0', '"noise_multiplier":4.00'),
        replaced('"silo":"a"', '"silo":"b"'),
        replaced('"epsilon":4.0', '"epsilon":9.0'),
        lines(lambda all_: all_[:1] + all_[2:]),
        lines(lambda all_: [all_[0], all_[2], all_[1], *all_[3:]]),
        lines(lambda all_: [*all_, all_[-1]]),
        lines(lambda all_: all_[:-2]),
        lines(lambda all_: all_[1:]),
        lines(lambda all_: [*all_[:2], b"\n", *all_[2:]]),
        lines(lambda all_: [*all_, b'{"kind":"charged"}\n']),
        lines(lambda all_: [*all_, b"half"]),
        lambda path: path.write_bytes(b"") and None,
        lambda path: path.unlink(),
        lambda path: path.with_name(path.name + ".last").unlink(),
        rehashed,
    ],
)
def test_tampering_is_seen(path: Path, tamper: Callable[[Path], None]) -> None:
    with Ledger(path, BUDGET) as ledger:
        for round_ in range(3):
            ledger.charge(event(round_))
    tamper(path)
    with pytest.raises(PrivacyError, match=r"not what was written|another budget"):
        Ledger(path, BUDGET)


def test_a_receipt_shows_what_was_cut_off(path: Path) -> None:
    """A shorter chain with a matching file beside it verifies; a receipt kept elsewhere does not let it pass."""
    with Ledger(path, BUDGET) as ledger:
        ledger.charge(event(0))
        kept = path.read_bytes()
        beside = path.with_name("ledger.jsonl.last").read_bytes()
        receipt = ledger.charge(event(1))
    path.write_bytes(kept)
    path.with_name("ledger.jsonl.last").write_bytes(beside)
    Ledger(path, BUDGET).close()
    with pytest.raises(PrivacyError, match="there is a receipt"):
        Ledger(path, BUDGET, expect=receipt)
    with pytest.raises(PrivacyError, match="there is a receipt"):
        Ledger(path, BUDGET, expect=Receipt(1, "0" * 64, True))


def test_other_files_are_no_ledgers(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no such ledger"):
        read_spent(tmp_path / "none")
    with Chain(tmp_path / "chain") as other:
        other.append({"kind": "opened", "schema": 99})
    with pytest.raises(PrivacyError, match="schema 1"):
        Ledger(tmp_path / "chain", BUDGET)
    with Chain(tmp_path / "lacking") as other:
        other.append({"kind": "opened", "schema": 1, "unit": "silo"})
    with pytest.raises(PrivacyError, match="lacks"):
        read_spent(tmp_path / "lacking")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "chain")
    with pytest.raises(OSError, match="symbolic"):
        Chain(link)
