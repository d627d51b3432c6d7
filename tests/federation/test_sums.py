"""Sums over nearly the same silos from one model: a silo remembers, over runs and restarts, and takes no part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from fedlm.errors import RunError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, using
from fedlm.federation.identities import simulated
from fedlm.federation.silo import auditlog
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.refusals import RefusedError
from fedlm.federation.silo.sums import FILE, Sums, model_hash
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.mixed import adapter
from tests.federation.own_silos import Network, sharing_owner

NAMES = ("site0", "site1", "site2", "site3")
WHEN = (0, 0)


def unmasked(sums: Sums, model: str, cohort: Iterable[str], run: str = "run") -> None:
    cohort = list(cohort)
    sums.begin(run, WHEN, model, cohort)
    sums.add(run, WHEN, cohort)


@pytest.mark.parametrize(
    ("before", "now", "apart", "refused"),
    [
        ("abcd", "abc", 2, "by one silo, and both sums would tell what that one sent"),
        ("abc", "abcd", 2, "by one silo"),
        ("abcd", "abcd", 2, ""),  # the same sum
        ("abcd", "abce", 2, ""),  # two differ, and hide in each other
        ("abcd", "abce", 3, "by 2 silos, and both sums would tell what so few sent"),
        ("abcd", "ab", 2, ""),
        ("abcd", "abc", 1, ""),
    ],
)
def test_cohorts_differ_by_so_many_silos_or_not_at_all(
    before: str, now: str, apart: int, refused: str, tmp_path: Path
) -> None:
    unmasked(Sums(tmp_path, apart), "model", before, "first")
    again = Sums(tmp_path, apart)  # as after a restart
    unmasked(again, "another model", now)
    if not refused:
        unmasked(again, "model", now, "second")
        return
    with pytest.raises(RefusedError, match=refused) as caught:
        again.begin("second", WHEN, "model", now)
    assert caught.value.line == "min_cohort_difference"
    again.begin("second", WHEN, "model", before)  # and then some drop out
    with pytest.raises(RefusedError, match=refused):
        again.add("second", WHEN, now)
    unmasked(again, "model", before, "third")  # what was refused is not remembered
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_a_sum_belongs_to_the_attempt_that_was_begun(tmp_path: Path) -> None:
    sums = Sums(tmp_path, 2)
    sums.begin("run", (3, 1), "model", "abcd")
    for session, when in (("run", (3, 0)), ("run", (4, 1)), ("other", (3, 1))):
        with pytest.raises(RefusedError, match="does not know any more from which model"):
            sums.add(session, when, "abcd")
    sums.begin("run", (3, 2), "second model", "abcd")  # a new attempt takes its place
    with pytest.raises(RefusedError, match="does not know any more"):
        sums.add("run", (3, 1), "abcd")


def test_a_damaged_memory_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database of anything, and far too short" * 9)
    with pytest.raises(RunError, match=r"what this silo knows of earlier sums cannot be read or written"):
        Sums(tmp_path, 2).begin("run", WHEN, "model", "abcd")


def test_a_model_is_its_base_and_all_that_lies_on_it() -> None:
    hashes = {model_hash(*parts) for parts in (("train", "a", "b"), ("test", "a", "b"), ("train", "a", "c"))}
    assert len(hashes | {model_hash("train", "ab"), model_hash("train", "x", "b")}) == 5


class Lossy(Network):
    """Loses what some silos answer to `train`."""

    lost: frozenset[str] = frozenset()

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        for answer in super().exchange(requests, deadline):
            if isinstance(answer, Reply) and answer.verb == "train" and answer.silo in self.lost:
                yield Failure(answer.silo, FailureKind.UNREACHABLE, "it is gone")
            else:
                yield answer


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path) -> Callable[..., Recipe]:
    """Runs a recipe over some of four organisations, whose disks outlive the runs; each run restarts them all."""

    def run(name: str, silos: Iterable[str] = NAMES, *changes: str, policy: str = "", lost: str = "") -> Recipe:
        one = ("federation.algorithm.name=fedavg", "federation.rounds=1", "federation.quorum=0.5")
        mask = "guards=[{name: mask, dropouts: 0.25, corrupt: 0}]"
        recipe = tiny.recipe(*one, mask, "data.split={validation: 0, test: 0}", *changes)

        def owner(silo: str) -> OwnSilo:
            states, identity = tmp_path / f"states-{silo}", simulated(recipe.seed, silo)
            return sharing_owner(silo, tiny.base, recipe.model.source, states, policy, identity)

        network = Lossy(recipe, {silo: owner(silo) for silo in silos})
        network.lost = frozenset([lost])
        with using(new_run(recipe, tmp_path / name)) as directory:
            coordinator.run(recipe, network, directory)
        return recipe

    return run


def test_a_second_run_without_one_silo_is_refused_before_it_trains(
    start: Callable[..., Recipe], tmp_path: Path
) -> None:
    start("first")
    with pytest.raises(RunError, match=r"differs from this one by one silo.*min_cohort_difference: 2"):
        start("without", NAMES[:3])
    for name in NAMES[:3]:
        found = auditlog.read(tmp_path / f"states-{name}" / name / auditlog.FILE)
        assert [line["verb"] for line in found.lines if line["outcome"] == "answered"] == [
            *("hello", "keys", "shares", "train", "unmask"),
            *("hello", "keys", "shares"),
        ]
        last = found.lines[-1]
        assert (last["verb"], last["outcome"], last["line"]) == ("train", "refused", "min_cohort_difference")
        assert not list((tmp_path / f"states-{name}" / name / last["run"]).glob("round-*"))
    # The same silos again give the same sum, and another model is another matter.
    start("again")
    assert all(
        torch.equal(a, b) for a, b in zip(*(adapter(tmp_path / n).values() for n in ("first", "again")), strict=True)
    )
    start("other", NAMES[:3], "seed=8")
    # An owner may think otherwise.
    start("allowed", NAMES[:3], policy="min_cohort_difference: 1\n")


def test_a_silo_that_drops_out_of_one_run_is_not_summed_in_the_next(
    start: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The second run asks the same silos; one vector is lost, and nobody helps to unmask what is left."""
    start("first")
    with pytest.raises(RunError, match=r"cannot go on after 'unmask'.*by one silo"):
        start("second", lost="site3")
    last = auditlog.read(tmp_path / "states-site0" / "site0" / auditlog.FILE).lines[-1]
    assert (last["verb"], last["line"]) == ("unmask", "min_cohort_difference")
    start("third")
