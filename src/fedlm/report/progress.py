"""What a run is doing now: a live display on a terminal, one line per round elsewhere, nothing when asked to be silent.

`Tally` folds events into facts and estimates the time left; `Progress` shows them. Events arrive from several threads.
However many silos a run has, a screen holds at most `SILO_LINES` of them, and so does a round's list of failures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedlm.messages import Event
from fedlm.report.format import duration, is_number, metric, metric_name, number, plural, size

SILO_LINES, ARM_LINES = 8, 4


@dataclass
class ActiveSilo:
    """A silo at work: which verb, and how far its local training has come."""

    verb: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    speed: float | None = None


@dataclass
class Tally:
    """The facts of one arm of a run, folded from its events.

    Work is counted in silo-steps: one optimiser step in one silo.
    """

    arm: str = ""
    rounds: int = 0
    silos: int = 0
    first_round: int | None = None
    round: int | None = None
    sampled: int = 0
    answered: int = 0
    rounds_done: int = 0
    train_loss: float | None = None
    validation: list[float] = field(default_factory=list)
    phase: str = ""
    active: dict[str, ActiveSilo] = field(default_factory=dict)
    failures: int = 0
    steps_before: float = 0.0
    steps_per_silo: float | None = None
    started: float | None = None
    finished: bool = False

    def fold(self, event: Event, now: float) -> None:
        """Take in one event that happened at `now` seconds."""
        kind, silo = event.get("kind"), str(event.get("silo", ""))
        if kind == "run_started":
            self.rounds, self.silos = int(event.get("rounds", 0)), len(event.get("silos", []))
            self.phase, self.finished = "", False
        elif kind == "phase":
            self.phase = str(event.get("text", ""))
        elif kind == "round_started":
            self._start_round(int(event["round"]), int(event.get("wanted", len(event.get("sampled", [])))), now)
        elif kind == "silo_started" and self.rounds and not self.finished:
            self.phase = ""
            self.active[silo] = ActiveSilo(str(event.get("verb", "")))
        elif kind == "step":
            self._step(silo, event)
        elif kind in ("silo_done", "silo_failed"):
            self._leave(silo, str(event.get("verb", "")), failed=kind == "silo_failed")
        elif kind == "round_done":
            self._finish_round(event)
        elif kind == "run_done":
            self.finished, self.phase = True, ""
            self.active.clear()

    def _start_round(self, index: int, sampled: int, now: float) -> None:
        self.round, self.phase, self.answered, self.failures = index, "", 0, 0
        self.sampled = sampled
        self.active.clear()
        if index >= 0 and self.first_round is None:
            self.first_round, self.started = index, now

    def _step(self, silo: str, event: Event) -> None:
        at = self.active.setdefault(silo, ActiveSilo("train"))
        at.step, at.steps = int(event["step"]) + 1, int(event["steps"])  # the event holds the finished step's index
        at.loss, at.speed = event.get("loss"), event.get("tokens_per_second")
        if at.steps:
            known = self.steps_per_silo
            self.steps_per_silo = float(at.steps) if known is None else 0.9 * known + 0.1 * at.steps

    def _leave(self, silo: str, verb: str, *, failed: bool) -> None:
        left = self.active.pop(silo, None)
        self.failures += failed
        if (verb or (left.verb if left else "train")) == "train" and self.answered < self.sampled:
            self.answered += 1

    def _finish_round(self, event: Event) -> None:
        self.active.clear()
        validation = (event.get("validation") or {}).get("loss")
        if is_number(validation):
            self.validation.append(float(validation))
        if int(event.get("round", 0)) >= 0:
            self.rounds_done = int(event["round"]) + 1
            self.train_loss = event.get("loss")
            self.steps_before += self.sampled * (self.steps_per_silo or 1.0)
            self.answered, self.sampled = 0, 0

    def share_of_round(self) -> float:
        """How much of this round's local training is done, between 0 and 1."""
        if not self.sampled:
            return 0.0
        partly = sum(s.step / s.steps for s in self.active.values() if s.verb == "train" and s.steps)
        return min(1.0, (self.answered + partly) / self.sampled)

    def share(self) -> float:
        """How much of the whole run is done, between 0 and 1."""
        if self.finished:
            return 1.0
        return min(1.0, (self.rounds_done + self.share_of_round()) / self.rounds) if self.rounds else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Remaining silo-steps at the rate of the finished ones; None before the first step."""
        if self.started is None or self.first_round is None or not self.rounds or self.finished:
            return None
        per_round = (self.sampled or 1) * (self.steps_per_silo or 1.0)
        done = self.steps_before + self.share_of_round() * per_round
        rounds_left = self.rounds - self.rounds_done - self.share_of_round()
        if done <= 0 or rounds_left <= 0:
            return None
        rounds_seen = self.rounds_done - self.first_round + self.share_of_round()
        left = done * rounds_left / rounds_seen if rounds_seen > 0 else per_round * rounds_left
        return max(0.0, (now - self.started) * left / done)


class Progress:
    """Shows a run's events. Use as a context manager and hand the object itself to `observe`.

    Args:
        console: where to print; the standard error stream if not given, so that standard output stays a script's.
        silent: print nothing at all (for `--json`).
        clock: seconds that only grow; for tests.
    """

    def __init__(
        self, console: Console | None = None, *, silent: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.silent = silent
        self.live: Live | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}
        self._current = ""
        self._arms: int | None = None
        self._notes: set[str] = set()
        self._spinner = Spinner("dots")

    def __enter__(self) -> Progress:
        if not self.silent and self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=False,
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __call__(self, event: Event) -> None:
        """Take in one event; safe from any thread. Prints outside the lock, which the refresh thread takes too."""
        if event.get("kind") == "note":
            with self._lock:
                told = event["text"] in self._notes
                self._notes.add(event["text"])
            if not told:
                self.warn(event["text"])
            return
        with self._lock:
            arm = str(event.get("arm", ""))
            if is_number(event.get("arms")):
                self._arms = int(event["arms"])
            new = arm not in self._tallies
            tally = self._tallies.setdefault(arm, Tally(arm))
            self._current = arm
            tally.fold(event, self._clock())
            lines = [] if self.silent else list(self._lines(event, tally, new_arm=new and bool(arm)))
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """One sentence that stays on the screen even when silent: something needs the user's attention."""
        self.console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)

    # lines that stay on the screen or in the log

    def _lines(self, event: Event, tally: Tally, *, new_arm: bool) -> Iterator[str]:
        kind = event.get("kind")
        if tally.arm and kind in ("run_started", "phase", "round_done"):
            yield from self._arm_lines(event, tally, new_arm=new_arm)
        elif kind == "run_started":
            where = f" → {escape(str(event['run_dir']))}" if event.get("run_dir") else ""
            yield f"{plural(tally.rounds, 'round')} over {plural(tally.silos, 'silo')}{where}"
        elif kind == "phase" and self.live is None:
            yield f"{escape(tally.phase)} …"
        elif kind == "silo_failed":
            if tally.failures <= SILO_LINES:
                what = escape(str(event.get("failure", "error")).replace("_", " "))
                name, reason = escape(str(event.get("silo", "?"))), escape(str(event.get("reason", "")))
                yield f"  [red]✗ {name}: {what}[/red] {reason}"
            elif tally.failures == SILO_LINES + 1:
                yield "  [red]✗ further failures of this round are in rounds.jsonl[/red]"
        elif kind == "round_done":
            yield self._round_line(event, tally)

    def _arm_lines(self, event: Event, tally: Tally, *, new_arm: bool) -> Iterator[str]:
        """Arms run side by side, so every line names its own; most of an arm's rounds aren't validated and get none."""
        name = f"[cyan]{escape(tally.arm):<24}[/cyan] "
        if event["kind"] == "round_done" and event.get("validation") and (tally.silos > 1 or event["round"] >= 0):
            yield name + self._round_line(event, tally)
        elif event["kind"] == "run_started" and new_arm:
            yield f"{name}{plural(tally.rounds, 'round')} over {plural(tally.silos, 'silo')}"
        elif event["kind"] == "phase" and self.live is None and tally.silos != 1:
            yield f"{name}{escape(tally.phase)} …"

    def _round_line(self, event: Event, tally: Tally) -> str:
        index, parts = int(event.get("round", 0)), []
        name = "before training" if index < 0 else f"round {index + 1}/{tally.rounds or '?'}"
        if is_number(event.get("loss")):
            parts.append(f"train loss {number(event['loss'], 4)}")
        validation = event.get("validation") or {}
        for key in ("loss", "accuracy", "generation_accuracy", "reward_accuracy", "exact_match", "f1", "rougeL"):
            if is_number(validation.get(key)):
                best = key == "loss" and len(tally.validation) > 1 and tally.validation[-1] <= min(tally.validation)
                parts.append(
                    f"validation {metric_name(key)} {metric(key, validation[key])}" + (" (best)" if best else "")
                )
        sampled, replied = event.get("sampled") or [], event.get("replied") or []
        if index >= 0 and tally.silos > 1:
            parts.append(f"{len(replied)}/{len(sampled)} silos")
        moved = [event.get("bytes_up"), event.get("bytes_down")]
        if index >= 0 and tally.silos > 1 and all(is_number(b) for b in moved):
            parts.append(f"↑{size(moved[0])} ↓{size(moved[1])}")
        if is_number(event.get("seconds")):
            parts.append(duration(event["seconds"]))
        left = self._left(tally)
        if self.live is None and left is not None and tally.rounds_done < tally.rounds:
            parts.append(f"about {duration(left)} left")
        return f"[bold]{name:<15}[/bold] " + "  ".join(parts)

    # the live part

    def _left(self, tally: Tally) -> float | None:
        return tally.seconds_left(self._clock())

    def _render(self) -> RenderableType:
        with self._lock:
            if self._current not in self._tallies:
                return Text("starting …", style="dim")
            return Group(*self._live_lines())

    def _live_lines(self) -> Iterator[RenderableType]:
        arms = [t for t in self._tallies.values() if t.arm]
        if arms:
            done = sum(t.finished for t in arms)
            parts = [f"{done} of {self._arms or len(arms)} arms trained"]
            if (left := self._left_of_arms(arms)) is not None:
                parts.append(f"about {duration(left)} left")
            yield Text("  ".join(parts), style="bold")
        current = self._tallies[self._current]
        at_work = [t for t in self._tallies.values() if t.active or t is current]
        room = SILO_LINES
        for tally in at_work[:ARM_LINES]:
            if tally.arm:
                yield Text(tally.arm, style="bold cyan")
            if tally.rounds and not tally.finished:
                yield self._round_bar(tally)
            if tally.phase:
                yield self._spin(tally.phase)
            if tally.active and room > 0:
                yield from self._silo_lines(tally, room)
                room -= len(tally.active)
        if len(at_work) > ARM_LINES:
            yield Text(f"… and {len(at_work) - ARM_LINES} more arms at work", style="dim")

    def _left_of_arms(self, arms: list[Tally]) -> float | None:
        """Arms that haven't begun count like the others; one arm, the base model, trains nothing."""
        share = sum(t.share() for t in arms)
        begun = min((t.started for t in arms if t.started is not None), default=None)
        if begun is None or share <= 0 or self._arms is None:
            return None
        return max(0.0, (self._clock() - begun) * (self._arms - 1 - share) / share)

    def _spin(self, text: str) -> RenderableType:
        self._spinner.update(text=Text(text, style="cyan"))
        return self._spinner

    def _round_bar(self, tally: Tally) -> RenderableType:
        shown = min(max(tally.round or 0, 0) + 1, tally.rounds)
        facts = []
        if tally.validation:
            facts.append(f"validation loss {number(tally.validation[-1], 4)}")
        elif is_number(tally.train_loss):
            facts.append(f"train loss {number(tally.train_loss, 4)}")
        left = self._left(tally)
        if left is not None:
            facts.append(f"about {duration(left)} left")
        grid = Table.grid(padding=(0, 1))
        label = f"round {shown} of {tally.rounds}" if tally.round is not None else "before training"
        grid.add_row(
            Text(label, style="bold"),
            ProgressBar(total=1.0, completed=tally.share(), width=30),
            Text("  ".join(facts)),
        )
        return grid

    def _silo_lines(self, tally: Tally, room: int) -> Iterator[RenderableType]:
        at_work = sorted(tally.active.items())
        grid = Table.grid(padding=(0, 2))
        for name, silo in at_work[:room]:
            if silo.verb == "train" or silo.steps:
                steps = f"step {silo.step}/{silo.steps}" if silo.steps else "starting"
            else:
                steps = {"evaluate": "evaluating", "hello": "answering"}.get(silo.verb, silo.verb)
            loss = f"loss {number(silo.loss, 4)}" if is_number(silo.loss) else ""
            speed = f"{number(silo.speed)} tok/s" if is_number(silo.speed) else ""
            grid.add_row(
                Text(f"  {name}", overflow="ellipsis", no_wrap=True), Text(steps), Text(loss), Text(speed, style="dim")
            )
        yield grid
        if len(at_work) > room:
            yield Text(f"  … and {len(at_work) - room:,} more silos at work", style="dim")
