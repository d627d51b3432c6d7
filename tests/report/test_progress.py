"""The progress display: facts, time left, lines on a log, a bounded screen, and threads."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from fedlm.report.progress import SILO_LINES, Progress, Tally


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=200), out


def done(index: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "round_done",
        "round": index,
        "sampled": ["a", "b"],
        "replied": ["a", "b"],
        "loss": 1.5,
        "validation": {"loss": 2.0 - 0.1 * index, "accuracy": 0.5},
        "seconds": 10.0,
        "bytes_up": 2_000_000,
        "bytes_down": 2_000_000,
        **more,
    }


def test_time_left_is_the_remaining_work_at_the_finished_rate() -> None:
    tally = Tally()
    tally.fold({"kind": "run_started", "rounds": 4, "silos": ["a", "b"]}, 100.0)
    assert tally.seconds_left(100.0) is None
    tally.fold({"kind": "round_started", "round": 0, "sampled": ["a", "b"]}, 100.0)
    tally.fold({"kind": "step", "silo": "a", "step": 4, "steps": 10}, 105.0)
    assert tally.share_of_round() == pytest.approx(0.25)  # 5 of 20 silo-steps
    assert tally.seconds_left(105.0) == pytest.approx(75.0)  # 5 s for 1/16 of the run
    tally.fold({"kind": "silo_done", "silo": "a", "verb": "train"}, 110.0)
    tally.fold({"kind": "silo_done", "silo": "b", "verb": "train"}, 120.0)
    tally.fold(done(0), 120.0)
    assert tally.share() == pytest.approx(0.25)
    assert tally.seconds_left(120.0) == pytest.approx(60.0)


def test_an_asynchronous_round_is_done_when_it_has_its_updates() -> None:
    tally = Tally()
    tally.fold({"kind": "run_started", "rounds": 2, "silos": ["a", "b"]}, 0.0)
    tally.fold({"kind": "round_started", "round": 0, "wanted": 4}, 0.0)
    for answered in (1, 2, 3, 4):  # more than there are silos
        tally.fold({"kind": "silo_done", "silo": "a", "verb": "train"}, 1.0)
        assert tally.share() == pytest.approx(answered / 8)


def test_a_resumed_run_counts_only_what_it_did_itself() -> None:
    tally = Tally()
    tally.fold({"kind": "run_started", "rounds": 10, "silos": ["a"]}, 0.0)
    tally.fold({"kind": "round_started", "round": 8, "sampled": ["a"]}, 0.0)
    tally.fold({"kind": "step", "silo": "a", "step": 3, "steps": 4}, 10.0)
    tally.fold({"kind": "silo_done", "silo": "a", "verb": "train"}, 10.0)
    tally.fold(done(8), 10.0)
    assert tally.seconds_left(10.0) == pytest.approx(10.0)


def test_a_log_gets_a_line_per_round_and_names_failures() -> None:
    console, out = plain()
    with Progress(console) as observe:
        observe({"kind": "run_started", "rounds": 2, "silos": ["a", "b"], "run_dir": "runs/x"})
        observe({"kind": "phase", "text": "evaluating"})
        observe(done(-1, sampled=[], replied=[], loss=None))
        observe({"kind": "round_started", "round": 0, "sampled": ["a", "b"]})
        observe(
            {"kind": "step", "round": 0, "silo": "a", "step": 0, "steps": 2, "loss": 3.0, "tokens_per_second": 10.0}
        )
        observe(
            {"kind": "silo_failed", "round": 0, "silo": "b[red]", "failure": "timed_out", "reason": "no reply in 5 s"}
        )
        observe(done(0, replied=["a"]))
    text = out.getvalue()
    assert "2 rounds over 2 silos → runs/x" in text
    assert "evaluating …" in text
    assert "b[red]: timed out no reply in 5 s" in text
    assert "round 1/2" in text and "1/2 silos" in text and "↑2.0 MB" in text
    assert "validation accuracy 50.0 %" in text and "(best)" in text
    assert "step" not in text
    assert "\x1b" not in text


def test_silent_prints_nothing() -> None:
    console, out = plain()
    with Progress(console, silent=True) as observe:
        observe({"kind": "run_started", "rounds": 2, "silos": ["a"]})
        observe(done(0))
    assert out.getvalue() == ""


def test_ten_thousand_silos_stay_on_one_screen() -> None:
    console, out = plain()
    observe = Progress(console)
    observe({"kind": "run_started", "rounds": 1, "silos": [f"s{i}" for i in range(10_000)]})
    observe({"kind": "round_started", "round": 0, "sampled": [f"s{i}" for i in range(10_000)]})
    for i in range(10_000):
        observe({"kind": "silo_started", "round": 0, "silo": f"s{i}", "verb": "train"})
    console.print(observe._render())
    assert len(out.getvalue().splitlines()) <= SILO_LINES + 4
    assert "9,992 more silos" in out.getvalue()
    before = len(out.getvalue().splitlines())
    for i in range(10_000):
        observe({"kind": "silo_failed", "round": 0, "silo": f"s{i}", "failure": "error", "reason": "x"})
    assert len(out.getvalue().splitlines()) - before == SILO_LINES + 1


def test_the_live_display_shows_round_silos_and_arm() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Progress(console, clock=clock) as observe:
        assert observe.live is not None
        observe({"kind": "run_started", "rounds": 4, "silos": ["a", "b"], "arm": "federated", "arms": 3})
        observe({"kind": "round_started", "round": 0, "sampled": ["a", "b"], "arm": "federated"})
        observe({"kind": "silo_started", "round": 0, "silo": "a", "verb": "train", "arm": "federated"})
        clock.now += 5
        event = {
            "kind": "step",
            "round": 0,
            "silo": "a",
            "step": 4,
            "steps": 10,
            "loss": 3.0,
            "tokens_per_second": 412.0,
        }
        observe({**event, "arm": "federated"})
        observe.live.refresh()
        shown = out.getvalue()
    assert "0 of 3 arms trained" in shown and "federated" in shown
    assert "round 1 of 4" in shown and "about 1 min 15 s left" in shown
    assert "step 5/10" in shown and "loss 3.000" in shown and "412 tok/s" in shown


def test_events_from_many_threads_are_all_counted() -> None:
    console, _ = plain()
    observe = Progress(console)
    observe({"kind": "run_started", "rounds": 1, "silos": []})
    observe({"kind": "round_started", "round": 0, "sampled": [str(i) for i in range(800)]})

    def work(worker: int) -> None:
        for i in range(100):
            name = f"{worker}-{i}"
            observe({"kind": "silo_started", "silo": name, "verb": "train"})
            observe({"kind": "step", "silo": name, "step": 0, "steps": 1})
            observe({"kind": "silo_done", "silo": name, "verb": "train"})

    threads = [threading.Thread(target=work, args=(w,)) for w in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally = observe._tallies[""]
    assert tally.answered == 800 and tally.share() == 1.0 and not tally.active


def test_arms_side_by_side_are_all_shown_and_named_in_a_log() -> None:
    console, out = plain()
    observe = Progress(console)
    for arm in ("alone:a", "alone:b"):
        observe({"kind": "run_started", "rounds": 4, "silos": ["a"], "arm": arm, "arms": 4})
        observe({"kind": "round_started", "round": 0, "sampled": ["a"], "arm": arm})
        observe({"kind": "silo_started", "silo": "a", "verb": "train", "arm": arm})
    observe({**done(0, validation=None), "arm": "alone:a"})
    observe({**done(1), "arm": "alone:b"})
    log = out.getvalue()
    assert "round 1/4" not in log  # not validated
    assert any(line.startswith("alone:b") and "round 2/4" in line for line in log.splitlines())
    console.print(observe._render())
    screen = out.getvalue()[len(log) :]
    assert "0 of 4 arms trained" in screen and "alone:b" in screen
