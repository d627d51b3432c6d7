"""The audit log: every request, chained; what was done to it afterwards shows; a kill leaves a line that says so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.errors import RunError
from fedlm.federation.silo import auditlog
from fedlm.federation.silo.auditlog import AuditLog, parsed, read, sealed, written

LINE = {"kind": "request", "verb": "train", "run": "r", "round": 0, "attempt": 0, "recipe": None}
LINE |= {"in": 1, "out": 2, "outcome": "answered", "line": None}


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    """Twelve lines, one a day from the first of March 2026 on."""
    made = AuditLog(tmp_path / "private" / "_audit.jsonl")
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    before = auditlog._now
    try:
        for number in range(12):
            auditlog._now = lambda now=moment + timedelta(days=number): now.isoformat(timespec="milliseconds")  # type: ignore[misc]
            made.append({**LINE, "round": number})
    finally:
        auditlog._now = before
    return made


def lines(log: AuditLog) -> list[bytes]:
    return log.file.read_bytes().splitlines(keepends=True)


def faults(log: AuditLog, head: str | None = None) -> list[tuple[int | None, str]]:
    return [(fault.line, fault.what) for fault in read(log.file, head).faults]


def test_a_chain_of_lines_that_only_the_owner_reads(log: AuditLog) -> None:
    found = read(log.file)
    assert not found.faults and not found.unfinished
    assert [line["seq"] for line in found.lines] == list(range(12))
    assert found.lines[0]["before"] == "0" * 64
    for before, line in zip(found.lines, found.lines[1:], strict=False):
        body = {n: v for n, v in before.items() if n != "hash"}
        again = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert line["before"] == before["hash"] == again
    assert found.head == found.lines[-1]["hash"]
    assert AuditLog(log.file).append(LINE) == read(log.file).head != found.head
    assert log.file.stat().st_mode & 0o777 == 0o600
    assert log.file.parent.stat().st_mode & 0o777 == 0o700


def test_one_line_changed_removed_inserted_or_moved_is_told_by_number(log: AuditLog) -> None:
    whole = lines(log)

    def after(changed: list[bytes]) -> list[tuple[int | None, str]]:
        log.file.write_bytes(b"".join(changed))
        return faults(log)

    for at in range(12):
        bad = whole[at].replace(b'"out":2', b'"out":3')
        told = after([*whole[:at], bad, *whole[at + 1 :]])
        assert told[0] == (at + 1, "the line was changed: its hash is another")
    # with its hash made anew the next line does not follow any more; only the last one needs a remembered head
    forged = written(sealed({**{n: v for n, v in parsed(whole[5][:-1]).items() if n != "hash"}, "out": 3}))
    assert [line for line, _ in after([*whole[:5], forged, *whole[6:]])] == [7]
    assert [line for line, _ in after([*whole[:4], *whole[5:]])] == [5]  # removed
    assert [line for line, _ in after([*whole[:4], whole[7], *whole[4:]])] == [5, 6]  # inserted
    assert [line for line, _ in after([*whole[:4], whole[5], whole[4], *whole[6:]])] == [5, 6, 7]  # moved
    assert [line for line, _ in after(whole[1:])] == [1]  # the first one removed
    assert [line for line, _ in after([*whole, b" " + whole[3]])] == [13]
    assert after(whole) == []


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_bit_shows(log: AuditLog, seed: int) -> None:
    draw, data = random.Random(seed), bytearray(log.file.read_bytes())
    place = draw.randrange(len(data) - 1)  # a torn end is not a fault
    data[place] ^= 1 << draw.randrange(8)
    log.file.write_bytes(data)
    number = bytes(log.file.read_bytes()[:place]).count(b"\n") + 1
    told = faults(log)
    assert told and told[0][0] in (number, number + 1), (number, told)


def test_a_cut_end_shows_against_a_remembered_head_alone(log: AuditLog) -> None:
    head = read(log.file).head
    AuditLog(log.file).append(LINE)
    assert faults(log, head) == []  # it has grown since
    log.file.write_bytes(b"".join(lines(log)[:10]))
    assert faults(log) == []
    assert [(line, "remembered head is not in this log" in what) for line, what in faults(log, head)] == [(None, True)]
    log.file.write_bytes(b"")
    assert faults(log) == [] and len(faults(log, head)) == 1


def test_a_torn_line_is_told_of_by_the_next(log: AuditLog) -> None:
    whole = log.file.read_bytes()
    for keep in (1, 40, len(lines(log)[-1]) - 1):
        log.file.write_bytes(whole + lines(log)[-1][:keep])
        assert read(log.file).unfinished == keep and not faults(log)
        AuditLog(log.file).append({**LINE, "round": 99})
        found = read(log.file)
        assert not found.faults and not found.unfinished
        torn, last = found.lines[-2:]
        assert torn["kind"] == "torn" and torn["bytes"] == keep and last["round"] == 99
        assert torn["sha256"] == hashlib.sha256(whole.splitlines(keepends=True)[-1][:keep]).hexdigest()
        # a kill while this was written leaves the same again
        log.file.write_bytes(log.file.read_bytes()[: len(whole) + 30])
        AuditLog(log.file).append(LINE)
        assert [line["kind"] for line in read(log.file).lines[-2:]] == ["torn", "request"] and not faults(log)
        log.file.write_bytes(whole)
    log.file.write_bytes(b"half a fi")
    AuditLog(log.file).append(LINE)
    assert [line["kind"] for line in read(log.file).lines] == ["torn", "request"] and not faults(log)


def test_nothing_is_added_to_what_is_no_log(log: AuditLog) -> None:
    log.file.write_bytes(log.file.read_bytes() + b"{}\n")
    before = log.file.read_bytes()
    with pytest.raises(RunError, match=r"none that was written here.*fedlm audit log"):
        log.append(LINE)
    assert log.file.read_bytes() == before


def test_pruning_leaves_a_checkpoint_that_a_line_confirms(log: AuditLog) -> None:
    whole, head = lines(log), read(log.file).head
    assert log.prune(datetime(2026, 1, 1, tzinfo=UTC)) == 0 and lines(log) == whole
    assert log.prune(datetime(2026, 3, 6, tzinfo=UTC)) == 5
    checkpoint, *rest = (parsed(line[:-1]) for line in lines(log))
    assert checkpoint["sha256"] == hashlib.sha256(b"".join(whole[:5])).hexdigest()
    assert [written(line) for line in rest[:-1]] == whole[5:]  # what stays is as it was
    assert (rest[-1]["kind"], rest[-1]["checkpoint"]) == ("pruned", checkpoint["hash"])
    assert faults(log, head) == []
    assert log.file.stat().st_mode & 0o777 == 0o600
    assert log.prune(datetime(2026, 3, 6, tzinfo=UTC)) == 0
    log.append(LINE)
    assert log.prune(datetime(2026, 3, 8, tzinfo=UTC)) == 3  # the old checkpoint and two days
    assert faults(log) == [] and read(log.file).lines[1]["seq"] == 7
    kept = lines(log)
    for changed in (
        kept[1:],  # the checkpoint removed
        [kept[0].replace(b'"removed":3', b'"removed":2'), *kept[1:]],
        [
            written(sealed({**{n: v for n, v in parsed(kept[0][:-1]).items() if n != "hash"}, "sha256": "0" * 64})),
            *kept[1:],
        ],
        [kept[0], *kept[2:]],  # another line removed behind it
    ):
        log.file.write_bytes(b"".join(changed))
        assert faults(log), changed[0]
        with pytest.raises(RunError, match="not intact"):
            log.prune(datetime(2027, 1, 1, tzinfo=UTC))
    log.file.write_bytes(b"".join(kept))
    log.prune(datetime.now(UTC) + timedelta(days=1))
    assert [line["kind"] for line in read(log.file).lines] == ["checkpoint", "pruned"] and faults(log) == []
    log.append(LINE)
    assert faults(log) == []


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """What was acknowledged is there, and the chain holds."""
    file, acknowledged = tmp_path / "log", 0
    for attempt in range(4):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # until it is killed
            while True:
                AuditLog(file).append({**LINE, "run": "r" * 200})
                os.write(writing, b"x")
        os.close(writing)
        acknowledged += len(os.read(reading, 1))
        time.sleep(0.01 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reading, 65536):
            acknowledged += len(more)
        os.close(reading)
        with file.open("ab") as handle:
            handle.write(b'{"torn' * (attempt % 2))
    AuditLog(file).append(LINE)
    found = read(file)
    assert not found.faults and sum(line["kind"] == "request" for line in found.lines) >= acknowledged + 1
    assert any(line["kind"] == "torn" for line in found.lines)


def test_it_is_on_disk_before_anything_else_happens(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: (done.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    log.append(LINE)
    assert done == ["write", "fsync"]


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def run() -> Iterator[Any]:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})

    yield call


def test_the_command_shows_and_judges(log: AuditLog, run: Any) -> None:
    head = read(log.file).head
    good = run("audit", "log", str(log.file))
    assert good.exit_code == 0 and f"12 lines, intact. Head: {head}" in good.stdout
    assert "answered" in good.stdout and "Note the head elsewhere" in good.stdout
    assert run("audit", "log", str(log.file), "--head", head).exit_code == 0
    as_json = json.loads(run("audit", "log", str(log.file), "--json").stdout)
    assert as_json["intact"] and as_json["head"] == head and len(as_json["lines"]) == 12
    whole = lines(log)
    log.file.write_bytes(b"".join(whole[:3] + whole[4:]))
    bad = run("audit", "log", str(log.file))
    assert bad.exit_code == 1 and "line 4: it does not follow the line before" in bad.stderr
    assert json.loads(run("audit", "log", str(log.file), "--json").stdout)["faults"][0]["line"] == 4
    log.file.write_bytes(b"".join(whole[:-1]))
    assert run("audit", "log", str(log.file)).exit_code == 0
    cut = run("audit", "log", str(log.file), "--head", head)
    assert cut.exit_code == 1 and "cut off its end" in cut.stderr


def test_commands_refuse_in_sentences(tmp_path: Path, log: AuditLog, run: Any) -> None:
    for words, told in (
        (("audit", "log", str(tmp_path / "none")), "there is no audit log"),
        (("audit", "log", str(tmp_path)), "not a kit"),
        (("audit", "log", str(log.file), "--head", "5f"), "no head of a log"),
        (("silo", "audit", "prune", str(tmp_path / "none"), "--before", "2026-03-06"), "there is no audit log"),
        (("silo", "audit", "prune", str(log.file), "--before", "soon"), "soon"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and told in result.stderr, result.output
    assert "5 lines removed" in run("silo", "audit", "prune", str(log.file), "--before", "2026-03-06").stdout
    assert faults(log) == []
