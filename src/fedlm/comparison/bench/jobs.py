"""Trainings side by side, each in a process of its own: one that dies takes nothing with it, and its memory is its own.

A server process has imported what every training needs and forks for each: a training begins in a fraction of a second.
In its process the coordinator and all silos work in turn, so that as many trainings run at once as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedlm.comparison.bench.course import Course
from fedlm.comparison.bench.plan import Job
from fedlm.errors import FedlmError
from fedlm.messages import Event, Fields, Observe

PRELOADED = [
    "fedlm.comparison.bench.jobs",
    "fedlm.comparison.measuring",
    "fedlm.data.federated",
    "fedlm.evaluation",
    "fedlm.federation.api",
    "fedlm.federation.coordinator",
    "fedlm.federation.engines.local",
    "fedlm.models.adapters",
    "fedlm.models.export",
    "fedlm.models.load",
    "fedlm.training.loop",
    "peft",
    "datasets",
]


@dataclass(frozen=True)
class Ended:
    """How a training ended: with figures, or with the reason why not."""

    figures: Fields | None
    reason: str = ""


Done = Callable[[Job, Ended], Iterable[Job]]
"""Takes in a job's end; gives jobs that can be done now, before those that wait."""


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    folder: Path


def run_all(
    jobs: Iterable[Job], done: Done, *, base: Path, folder: Path, size: int, observe: Observe | None = None
) -> None:
    """Run jobs until none is left, `size` at a time.

    Args:
        base: folder that relative paths of the recipes start from.
        folder: of run directories and logs, emptied first; a job's are gone when it has succeeded.
        observe: receives every event with "arm", the job's label, added.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = deque(jobs), dict[Connection, _Running]()
    shutil.rmtree(folder, ignore_errors=True)  # what is not finished is not believed
    folder.mkdir(parents=True)
    try:
        while waiting or running:
            while waiting and len(running) < size:
                job = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                place = folder / f"{job.name}.{os.getpid()}"  # children of a killed bench may still write to theirs
                process = context.Process(target=_work, args=(job, base, place, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = _Running(job, process, place)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                at_work = running[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    at_work.process.join()
                    message = Ended(None, _death(at_work.process.exitcode))
                if not isinstance(message, Ended):
                    if observe is not None:
                        observe({**message, "arm": at_work.job.label})
                    continue
                del running[connection]
                connection.close()
                at_work.process.join()
                if message.figures is not None:
                    shutil.rmtree(at_work.folder, ignore_errors=True)
                waiting.extendleft(reversed(list(done(at_work.job, message))))
    finally:
        for at_work in running.values():
            at_work.process.kill()
        for at_work in running.values():
            at_work.process.join()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"its process ended with code {code}"


def _work(job: Job, base: Path, folder: Path, connection: Connection) -> None:
    """The child's whole life."""
    from fedlm.federation.silo.door import classify

    folder.mkdir()
    log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        ended = Ended(train(job, base, folder / "run", connection.send))
    except FedlmError as error:
        ended = Ended(None, error.sentence())
    except KeyboardInterrupt:
        return
    except Exception as error:
        ended = Ended(None, classify(error)[1])
    connection.send(ended)


def train(job: Job, base: Path, folder: Path, observe: Observe) -> Fields:
    """One training from its start to its end, in this process.

    Returns:
        See `Course.figures`; beside them "others" for personal methods: the summary of every silo's model on other
        silos' test rows.

    Raises:
        FedlmError: whatever keeps it from finishing.
        KeyboardInterrupt: a signal did.
    """
    from fedlm.data.federated import load_data
    from fedlm.federation import coordinator
    from fedlm.federation.api import about, new_run
    from fedlm.federation.engines.local import LocalEngine

    recipe = job.recipe
    course = Course(job.row.facts.setup_rounds, recipe.federation.downlink.send == "changed")

    def see(event: Event) -> None:
        course.fold(event)
        observe(event)

    data = load_data(recipe, base)
    with closing(new_run(recipe, folder, base=base, **about(data))) as directory:
        engine = LocalEngine(recipe, data, folder, observe=observe, base=base)
        with closing(engine):
            ended = coordinator.run(recipe, engine, directory, observe=see, final_test=False, role=job.role)
            if ended.status != "finished":
                raise KeyboardInterrupt
            figures = course.figures()
            if job.row.facts.personal and job.role == "test":
                figures["others"] = _on_others(job, engine, directory, data)
    return figures


def _on_others(job: Job, engine: Any, directory: Any, data: Any) -> Fields:
    from fedlm.algorithms import get_algorithm
    from fedlm.comparison.measuring import measure_on_silos
    from fedlm.evaluation import summarise

    recipe = job.recipe
    checkpoint = directory.load_checkpoint()
    tensors = get_algorithm(recipe.federation.algorithm, recipe.adapter).evaluated(
        checkpoint.parameters, checkpoint.server_state
    )
    measured = measure_on_silos(
        engine,
        [name for name in data.names if data.card(name)["rows"]["test"]],
        tensors,
        role="test",
        run=directory.run,
        items=False,
        accepted=checkpoint.progress.accepted,
        rows="others",
    )
    return summarise(measured)
