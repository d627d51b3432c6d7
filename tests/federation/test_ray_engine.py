"""The Ray engine: the local engine's bits in whole runs, deaths, faults of the cluster, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ray = pytest.importorskip("ray")

from fedlm.data.federated import load_data  # noqa: E402
from fedlm.errors import FedlmError, MissingExtra, ModelError, RunError  # noqa: E402
from fedlm.federation.api import run_recipe  # noqa: E402
from fedlm.federation.engines.choose import Choice  # noqa: E402
from fedlm.federation.engines.local import LocalEngine  # noqa: E402
from fedlm.federation.engines.ray import cluster, engine, pump  # noqa: E402
from fedlm.federation.engines.ray.actor import pack, unpack  # noqa: E402
from fedlm.federation.engines.ray.cluster import Share, share_out  # noqa: E402
from fedlm.federation.engines.ray.engine import RayEngine  # noqa: E402
from fedlm.federation.engines.ray.pump import Batch, Job, Pump, Seat  # noqa: E402
from fedlm.messages import Event, Failure, FailureKind, Reply, Request  # noqa: E402
from fedlm.recipe.schema import FederationSpec  # noqa: E402
from tests.federation.conftest import Tiny  # noqa: E402
from tests.federation.exchanges import assert_same, by_silo, requests, running_ray  # noqa: E402


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for the tests of this file that need none of their own; gives the file with what befell its workers."""
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    with running_ray(log):
        yield log


Make = Callable[..., tuple[RayEngine, list[Event]]]


@pytest.fixture
def make(running: Path, tiny: Tiny, tmp_path: Path) -> Iterator[Make]:  # noqa: ARG001
    """Engines of one actor that are closed after the test, with their events."""
    made: list[RayEngine] = []

    def build(*changes: str) -> tuple[RayEngine, list[Event]]:
        recipe = tiny.recipe(*changes)
        events: list[Event] = []
        made.append(
            RayEngine(recipe, load_data(recipe, tiny.base), tmp_path / "run", observe=events.append, base=tiny.base)
        )
        return made[-1], events

    yield build
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def two(running: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayEngine, list[Event]]]:  # noqa: ARG001
    """An engine of two actors, with its events."""
    recipe, events = tiny.recipe("federation.workers=2"), list[Event]()
    folder = tmp_path_factory.mktemp("two")
    one = RayEngine(recipe, load_data(recipe, tiny.base), folder, observe=events.append, base=tiny.base)
    one.start()
    yield one, events
    one.close()


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def local_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "run"
    run_recipe(tiny.recipe("training.keep_optimizer=true"), base=tiny.base, run_dir=folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_a_whole_run_ends_in_the_local_engines_bits_even_begun_elsewhere(
    tiny: Tiny, tmp_path: Path, local_run: Path
) -> None:
    """SCAFFOLD with kept moments, 4 rounds: once on Ray alone, once begun locally and resumed on Ray."""
    recipe = tiny.recipe("training.keep_optimizer=true")
    on_ray = tmp_path / "ray"
    result = run_recipe(recipe, base=tiny.base, run_dir=on_ray, engine="ray")
    assert result.status == "finished" and result.rounds_done == 4
    assert adapter_hash(on_ray) == adapter_hash(local_run)

    def interrupt(event: Event) -> None:
        if event["kind"] == "round_done" and event["round"] == 1:
            raise KeyboardInterrupt

    mixed = tmp_path / "mixed"
    begun = run_recipe(recipe, base=tiny.base, run_dir=mixed, observe=interrupt)
    assert begun.status == "interrupted" and not (mixed / "adapter").exists()
    assert run_recipe(None, run_dir=mixed, resume=True, engine="ray").status == "finished"
    assert adapter_hash(mixed) == adapter_hash(local_run)
    for folder in (on_ray, mixed):
        lines = [
            [json.loads(line) for line in (f / "rounds.jsonl").read_text().splitlines()] for f in (folder, local_run)
        ]
        for ours, theirs in zip(*lines, strict=True):
            assert ours["loss"] == theirs["loss"] and ours["validation"] == theirs["validation"]
            assert ours["bytes_up"] == theirs["bytes_up"] and ours["bytes_down"] == theirs["bytes_down"]


def start(tiny: Tiny, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`fedlm run` with a Ray of its own, in a process group of its own."""
    script = "from fedlm.cli.main import main; main()"
    command = [sys.executable, "-c", script, "run", str(tiny.base / "recipe.yaml"), "--engine", "ray", "--run-dir"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [*command, str(folder), "--workers", "2", "--no-report", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def actors(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in processes:
        try:
            found += [one] if "SiloWorker" in " ".join(one.cmdline()) else []
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.fixture
def files_of_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the started processes put Ray's files: a folder of the test's own, as other tests run beside it.

    Its path is short, for Ray's sockets.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.slow
def test_ctrl_c_and_a_killed_worker_on_a_ray_of_its_own(
    tiny: Tiny, tmp_path: Path, local_run: Path, files_of_ray: Path
) -> None:
    """Interrupted while a worker was just killed, resumed with --json: the same bits, clean output, nothing left."""
    folder = tmp_path / "run"
    process = start(tiny, folder, "--set", "training.keep_optimizer=true")
    until(lambda: (folder / "rounds.jsonl").exists())  # the base is measured: both workers are ready
    everyone = family(process)
    os.kill(actors(everyone)[0].pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    everyone += [] if process.poll() is not None else family(process)
    assert process.returncode == 130, err
    assert f"fedlm run --resume {folder}" in out and "Traceback" not in err
    until(lambda: gone(everyone), 20)

    script = "from fedlm.cli.main import main; main()"
    command = [sys.executable, "-c", script, "run", "--resume", str(folder), "--engine", "ray", "--json", "--no-report"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert done.stderr == ""
    assert adapter_hash(folder) == adapter_hash(local_run)
    assert not list(files_of_ray.glob("fedlm-ray-*"))


@pytest.mark.slow
def test_nothing_survives_the_coordinators_death(tiny: Tiny, tmp_path: Path, files_of_ray: Path) -> None:
    process = start(tiny, tmp_path / "run", "--set", "training.steps=100000")
    until(lambda: (tmp_path / "run" / "rounds.jsonl").exists())
    everyone = family(process)
    workers = actors(everyone)
    assert len(workers) == 2
    assert all(p.environ().get("RAY_AUTH_MODE") == "token" for p in workers)
    process.kill()
    process.communicate()
    until(lambda: gone(workers), 20)
    until(lambda: gone(everyone), 120)  # Ray's own agents look for the others for a minute
    left = list(files_of_ray.glob("fedlm-ray-*"))  # a killed process cannot remove them
    assert left and all(folder.stat().st_mode & 0o077 == 0 for folder in left)


# ---------------------------------------------------------------- deaths


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_its_request_repeated(
    two: tuple[RayEngine, list[Event]], tiny: Tiny, tmp_path: Path, running: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, events = two
    before = list(one.workers)
    wanted = LocalEngine(tiny.recipe(), load_data(tiny.recipe(), tiny.base), tmp_path / "serial", base=tiny.base)
    asked = requests(tiny.recipe(), "killed", one.silos())

    def kill() -> None:
        until(lambda: any(e["kind"] == "silo_started" for e in events))
        os.kill(before[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = by_silo(one.exchange(asked))
    thread.join()
    assert_same(found, by_silo(wanted.exchange(asked)))
    # Whether it died at work or idle, later exchanges notice and have two live actors again.
    again = lambda: by_silo(one.exchange(requests(tiny.recipe(), f"after-{time.time()}", one.silos())))  # noqa: E731
    until(lambda: again() and before[0] not in one.workers and len(one.workers) == 2)
    assert capfd.readouterr().out == "", "standard output belongs to results"
    until(lambda: running.exists() and str(before[0]) in running.read_text(), 10)


@pytest.mark.slow
def test_a_silo_that_kills_every_worker_is_unreachable_and_a_frozen_one_is_ended(
    make: Make, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, events = make("training.steps=100000")
    one.start()
    stop = threading.Event()

    def kill_whoever_works() -> None:
        seen = 0
        while not stop.wait(0.01):
            if (now := sum(e["kind"] == "silo_started" for e in events)) > seen:
                seen = now
                for pid in one.workers:
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_whoever_works)
    thread.start()
    (answer,) = one.exchange(requests(tiny.recipe(), "deadly", ["site0"]))
    stop.set()
    thread.join()
    assert isinstance(answer, Failure) and answer.kind is FailureKind.UNREACHABLE
    assert "died each time" in answer.reason
    assert sum(e["kind"] == "silo_started" for e in events) == 2, "sent again once: federation.retries"

    # Frozen: it cannot react to the cancellation that follows the deadline.
    until(lambda: one.workers)
    monkeypatch.setattr(pump, "DEAF_SECONDS", 0.5)
    frozen: list[int] = []

    def freeze() -> None:
        until(lambda: any(e["kind"] == "silo_started" and e["run"] == "frozen" for e in events))
        frozen.extend(one.workers)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=freeze)
    thread.start()
    (late,) = one.exchange(requests(tiny.recipe(), "frozen", ["site0"]), deadline=5.0)
    thread.join()
    assert isinstance(late, Failure) and late.kind is FailureKind.TIMED_OUT
    (hello,) = one.exchange([Request("site1", "hello", "frozen", -1)], deadline=60.0)
    assert isinstance(hello, Reply) and not set(frozen) & set(one.workers)
    until(lambda: not any(psutil.pid_exists(pid) for pid in frozen))


class Call:
    """A finished call of an actor."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def exception(self) -> BaseException:
        return self._error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.OutOfMemoryError("killed"), FailureKind.OUT_OF_MEMORY),
        (ray.exceptions.ActorDiedError(), FailureKind.UNREACHABLE),
        (ray.exceptions.NodeDiedError("gone"), FailureKind.UNREACHABLE),
    ],
)
def test_a_request_that_outlives_no_worker(
    error: Exception, kind: FailureKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent again `retries` times, first of all that wait; then it is a failure whose kind says what befell it."""
    replaced: list[Seat] = []
    monkeypatch.setattr(Pump, "_replace", lambda _, seat: replaced.append(seat))
    seat, batch = Seat(None, pid=1), Batch()
    job, other = (Job(n, Request(f"site{n}", "train", "r", 0), batch, None, 0) for n in range(2))
    feeding = Pump([seat], 1, lambda: None, lambda _: None, lambda *_: None)
    feeding._waiting.append(other)
    for turn in range(2):
        assert batch.answers.empty()
        seat.job, seat.done = job, Call(error)
        feeding._settle(seat)
        assert len(replaced) == turn + 1 and seat.job is None
        assert feeding._waiting.popleft() is (job, other)[turn]
    _, answer = batch.answers.get_nowait()
    assert isinstance(answer, Failure) and answer.silo == "site0" and answer.kind is kind
    assert batch.answers.empty()


def test_an_unexpected_error_in_a_worker_says_its_type_only(
    two: tuple[RayEngine, list[Event]], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    nonsense = {"secret text": ("float99", [1], torch.zeros(1).numpy())}
    monkeypatch.setattr(engine, "pack", lambda _: nonsense)
    (answer,) = one.exchange(requests(tiny.recipe(), "odd", ["site0"]))
    assert answer == Failure("site0", FailureKind.ERROR, "its worker met an unexpected AttributeError")


@pytest.mark.slow
def test_closing_amid_many_exchanges_answers_them_all(make: Make) -> None:
    one, _ = make()
    one.start()
    hellos = [Request("site0", "hello", "closing", -1) for _ in range(20)]
    ended: list[list[Reply | Failure]] = []

    def ask_until_refused() -> None:
        answers: list[Reply | Failure] = []
        while not any(isinstance(a, Failure) for a in answers):
            answers = list(one.exchange(hellos))
        ended.append(answers)

    threads = [threading.Thread(target=ask_until_refused, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    one.close()
    for thread in threads:
        thread.join(timeout=30)
    assert [len(answers) for answers in ended] == [20] * 4
    refused = [a for answers in ended for a in answers if isinstance(a, Failure)]
    assert refused and {a.reason for a in refused} == {"the engine was closed"}


# ---------------------------------------------------------------- faults at the start


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_a_model_fault_is_raised_as_itself_and_leaves_no_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no_such_layer"):
        run_recipe(tiny.recipe("adapter.targets=[no_such_layer]"), base=tiny.base, run_dir=tmp_path / "r", engine="ray")
    assert not (tmp_path / "r").exists()


def test_machines_that_do_not_fit_are_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "versions", lambda: {"fedlm": "0.0.1", "torch": "x", "python": "x"})
        with pytest.raises(FedlmError, match=r"has fedlm \d+\.\d+\.\d+, this one 0\.0\.1"):
            make()[0].start()
    write = Path.write_text
    with monkeypatch.context() as patch:  # this machine's file is another than the one that the actor sees
        patch.setattr(Path, "write_text", lambda self, text: write(self, text + "!"))
        with pytest.raises(FedlmError, match=r"does not see the run directory.*--run-dir"):
            make()[0].start()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "share_out", lambda *_: Share(2, 64, 0.0))
        patch.setattr(engine, "PLACE_SECONDS", 1.0)
        with pytest.raises(FedlmError, match="room for 0 of 2 workers of 64 CPUs"):
            make()[0].start()


def test_without_ray_the_extra_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedlm\[ray\]'"):
        run_recipe(tiny.recipe(), base=tiny.base, run_dir=tmp_path / "run", engine="ray")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"engine": "rai"}, "did you mean 'ray'"),
        ({"address": "auto"}, "add --engine ray"),
        ({"engine": "ray", "network": Path("kit")}, "exclude each other"),
    ],
)
def test_impossible_choices(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        Choice(**choice)


def test_an_unreachable_cluster_is_said_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    for address, said in [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("ray://head:10001", "no address of a Ray cluster"),
        ("head", "no address of a Ray cluster"),
    ]:
        with pytest.raises(FedlmError, match=said):
            cluster.join(address, tmp_path / "log")
    assert time.monotonic() - start < cluster.CONNECT_SECONDS


# ---------------------------------------------------------------- shares and tensors


@pytest.mark.parametrize(
    ("workers", "threads", "device", "most", "machines", "share"),
    [
        ("auto", 1, "cpu", 100, [{"CPU": 4.0}], Share(4, 1, 0.0)),
        ("auto", 2, "cpu", 100, [{"CPU": 3.0}, {"CPU": 5.0}], Share(3, 2, 0.0)),
        ("auto", 1, "cpu", 2, [{"CPU": 4.0}], Share(2, 1, 0.0)),
        ("auto", 8, "cpu", 9, [{"CPU": 4.0}], Share(1, 0, 0.0)),
        (6, 1, "cpu", 100, [{"CPU": 4.0}], Share(6, 0, 0.0)),
        ("auto", 1, "auto", 100, [{"CPU": 4.0}], Share(4, 1, 0.0)),
        ("auto", 1, "auto", 100, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0}], Share(2, 1, 1.0)),
        (6, 1, "cuda", 100, [{"CPU": 16.0, "GPU": 2.0}], Share(6, 1, 0.3333)),
        (8, 4, "auto", 100, [{"CPU": 16.0, "GPU": 2.0}], Share(8, 0, 0.25)),
        ("auto", 1, "cpu", 100, [{"CPU": 4.0, "GPU": 2.0}], Share(4, 1, 0.0)),
        ("auto", 1, "cuda", 100, [{"CPU": 4.0}], Share(1, 1, 0.0)),
    ],
)
def test_shares(
    workers: int | str, threads: int, device: str, most: int, machines: list[dict[str, float]], share: Share
) -> None:
    spec = FederationSpec.model_validate({"workers": workers, "threads": threads})
    assert share_out(spec, device, most, machines) == share


@pytest.mark.usefixtures("running")
def test_tensors_travel_unchanged_and_are_read_where_they_lie() -> None:
    tensors = {
        "bf16": torch.randn(7, 5).bfloat16(),
        "big": torch.randn(400, 300),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    reference = ray.put(pack(tensors))
    first, second = unpack(ray.get(reference)), unpack(ray.get(reference))
    assert first.keys() == tensors.keys()
    for name, value in tensors.items():
        assert first[name].dtype == value.dtype and first[name].shape == value.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first[name], value)]
        assert torch.equal(*bits)
    assert first["big"].data_ptr() == second["big"].data_ptr(), "no copies"


@pytest.mark.slow
def test_same_bits_with_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_cache: str | None) -> None:
    """SmolLM2-135M on news, SCAFFOLD with AdamW's moments kept, 3 rounds: local, and Ray with a worker killed."""
    from fedlm.models.processor import for_this_machine
    from fedlm.recipe.load import load_recipe
    from fedlm.recipe.starters import read_template

    monkeypatch.delenv("FEDLM_CACHE")
    if users_cache is not None:
        monkeypatch.setenv("FEDLM_CACHE", users_cache)
    template = tmp_path / "news.yaml"
    template.write_text(for_this_machine(read_template("news")))
    recipe = load_recipe(
        template,
        [
            *("training.steps=2", "training.batch_size=2", "training.max_length=160", "training.keep_optimizer=true"),
            *("evaluation.metrics=[loss]", "evaluation.max_examples=2"),
            *("federation.rounds=3", "federation.workers=2", "federation.algorithm={name: scaffold}"),
        ],
    )
    run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "local")
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event["kind"] == "step" and event.get("round") == 1 and not killed:
            killed.append(actors(psutil.Process().children(recursive=True))[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "ray", engine="ray", observe=kill)
    assert killed
    assert adapter_hash(tmp_path / "ray") == adapter_hash(tmp_path / "local")
