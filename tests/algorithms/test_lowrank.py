"""Sums of low-rank matrices against dense fp64 arithmetic, truncated SVDs against numpy's, updates read from disk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlm.algorithms import lowrank, stored
from fedlm.algorithms.base import Accumulator, Place
from fedlm.algorithms.lowrank import LowRank, Term, add_up, plus, squared_norm, stacked, truncated
from fedlm.algorithms.stored import Stored
from fedlm.errors import RunError
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_terms(count: int, d_out: int, d_in: int, ranks: tuple[int, ...] = (4,)) -> list[Term]:
    """Silos that have learnt partly the same, with unequal weights."""
    of = [ranks[i % len(ranks)] for i in range(count)]
    common_a, common_b = draw(max(of), d_in, seed=1), draw(d_out, max(of), seed=2)
    return [
        Term(
            (i + 1) / 10,
            common_b[:, :r] + 0.5 * draw(d_out, r, seed=10 + i),
            common_a[:r] + 0.5 * draw(r, d_in, seed=90 + i),
        )
        for i, r in enumerate(of)
    ]


def truth(terms: list[Term]) -> Tensor:
    total: Tensor = sum(term.c * term.B.double() @ term.A.double() for term in terms)  # type: ignore[assignment]
    return total


def dense(matrix: LowRank | Tensor) -> Tensor:
    return (matrix.dense() if isinstance(matrix, LowRank) else matrix).double()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


# ------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("d_out, d_in", [(24, 40), (40, 24)])
@pytest.mark.parametrize("count", [1, 5, 6, 30])
def test_factors_and_dense_sums_are_equal(count: int, d_out: int, d_in: int) -> None:
    terms = some_terms(count, d_out, d_in, ranks=(4, 2, 7))
    rank = sum(len(term.A) for term in terms)
    chosen = add_up(terms, d_out, d_in)
    assert isinstance(chosen, LowRank) is (rank < 24), "factors exactly while they say less than the matrix"
    for matrix in (chosen, stacked(terms, d_out, d_in), add_up(terms, d_out, d_in, limit=0)):
        assert relative(dense(matrix), truth(terms)) < 1e-6
    exact = add_up(terms, d_out, d_in, dtype=torch.float64)
    assert relative(dense(exact), truth(terms)) < 1e-14


def test_a_dense_sum_never_holds_more_factors_than_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "STACK", 32)
    held, most = 0, 0
    terms = some_terms(200, 24, 40)

    def counted() -> Iterator[Term]:
        nonlocal held, most
        for term in terms:
            held += len(term.A)
            most = max(most, held)
            yield term

    multiply = lowrank._added

    def added(*arguments: object) -> Tensor:
        nonlocal held
        held = 0
        return multiply(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lowrank, "_added", added)
    assert relative(dense(add_up(counted(), 24, 40)), truth(terms)) < 1e-6
    assert most <= 32


def test_sums_and_differences_of_factors_and_dense_matrices() -> None:
    one, other = some_terms(2, 24, 40), some_terms(2, 24, 40, ranks=(3,))
    forms = [(stacked(t, 24, 40, torch.float64), add_up(t, 24, 40, dtype=torch.float64, limit=0)) for t in (one, other)]
    for left in forms[0]:
        for right in forms[1]:
            for sign in (1.0, -1.0):
                total = plus(left, right, sign)
                assert relative(dense(total), truth(one) + sign * truth(other)) < 1e-14
                assert isinstance(total, LowRank) is (isinstance(left, LowRank) and isinstance(right, LowRank))


@pytest.mark.parametrize("factors", [True, False])
def test_a_difference_of_1e_6_is_seen_as_1e_6(factors: bool) -> None:
    """The sum less another one that differs from it by a part in a million, all from fp32 values: a norm from fp32
    products of the factors would see nothing below 3e-4."""
    terms = some_terms(4, 60, 80)
    exact = truth(terms)
    away = 1e-6 * exact.norm()
    b, a = draw(60, 1, seed=5), draw(1, 80, seed=6)
    extra = Term(float(away / (b.double() @ a.double()).norm()), b, a)
    limit = None if factors else 0
    with_extra = add_up([*terms, extra], 60, 80, dtype=torch.float64, limit=limit)
    without = add_up(terms, 60, 80, dtype=torch.float64, limit=limit)
    error = (squared_norm(plus(with_extra, without, -1.0)) / squared_norm(without)) ** 0.5
    assert isinstance(with_extra, LowRank) is factors
    assert error == pytest.approx(1e-6, rel=0.02)


# ------------------------------------------------------------------------------------------------------------- SVDs


def spectrum(values: Tensor, d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values (fp32)."""
    u, _ = torch.linalg.qr(draw(d_out, len(values), seed=seed).double())
    v, _ = torch.linalg.qr(draw(d_in, len(values), seed=seed + 1).double())
    return ((u * values) @ v.t()).float()


SPECTRA = {
    "falls slowly": torch.arange(1, 49, dtype=torch.float64) ** -0.5,
    "falls fast": 0.7 ** torch.arange(48, dtype=torch.float64),
    "flat": torch.ones(48, dtype=torch.float64),
    "nearly of the rank": torch.cat([torch.ones(8), torch.full((40,), 1e-4)]).double(),
    "steep and nearly of the rank": torch.cat([torch.logspace(0, -3, 8), torch.full((40,), 1e-5)]).double(),
    "of a smaller rank": torch.cat([torch.ones(5), torch.zeros(43)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("d_out, d_in", [(48, 70), (70, 48)])
@pytest.mark.parametrize("randomised", [False, True])
def test_a_truncated_svd_is_the_best_approximation(name: str, d_out: int, d_in: int, randomised: bool) -> None:
    w = spectrum(SPECTRA[name], d_out, d_in)
    s = np.linalg.svd(w.double().numpy(), compute_uv=False)
    best, whole = float(np.sqrt((s[8:] ** 2).sum())), float(np.sqrt((s**2).sum()))
    found = truncated(w, 8, generator=torch_generator(0, "svd") if randomised else None)
    missed = float((w.double() - dense(found)).norm())
    assert missed <= best * (1.01 if randomised else 1.0001) + 2e-6 * whole
    assert missed >= best * 0.9999 - 1e-6 * whole, "nothing is better than the best"
    count = len(found.A)
    assert count == (5 if name == "of a smaller rank" else 8)
    torch.testing.assert_close(found.A @ found.A.t(), torch.eye(count), rtol=0, atol=2e-6)
    singular = found.B.norm(dim=0)
    torch.testing.assert_close(singular.double(), torch.from_numpy(s[:count].copy()), rtol=1e-2, atol=1e-6 * whole)
    assert all(a >= b * (1 - 1e-5) for a, b in pairwise(singular)), "the largest first"


@pytest.mark.parametrize("count", [1, 3, 8, 14])
def test_few_factors_are_decomposed_without_their_product(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = some_terms(count, 48, 70)
    matrix = stacked(terms, 48, 70)
    s = np.linalg.svd(truth(terms).numpy(), compute_uv=False)
    if count * 4 <= 48 // 3:
        monkeypatch.setattr(LowRank, "dense", lambda _: pytest.fail("the product was formed"))
    for rank in (2, 4, 9):
        found = truncated(matrix, rank)
        missed = float((truth(terms) - found.B.double() @ found.A.double()).norm())
        best = float(np.sqrt((s[rank:] ** 2).sum()))
        assert missed == pytest.approx(best, rel=1e-4, abs=1e-6 * float(s[0]))
        assert len(found.A) == min(rank, count * 4)


def test_one_silos_change_comes_back_as_it_was() -> None:
    """Rank r of a matrix of rank r: nothing is lost, though its singular values lie far apart, dense or not."""
    a, b = draw(4, 70, seed=0), draw(48, 4, seed=1) * torch.tensor([1.0, 1e-1, 1e-2, 1e-4])
    for matrix in (LowRank(b, a), b @ a, LowRank(torch.cat([b / 9] * 9, 1), torch.cat([a] * 9))):
        found = truncated(matrix, 4)
        assert relative(dense(found), b.double() @ a.double()) < 1e-6


def test_a_randomised_svd_is_repeatable_and_other_draws_agree_with_it() -> None:
    w = spectrum(SPECTRA["falls slowly"], 48, 70)
    one, again, other = (truncated(w, 8, generator=torch_generator(seed, "svd")) for seed in (0, 0, 1))
    assert torch.equal(one.A, again.A) and torch.equal(one.B, again.B)
    assert not torch.equal(one.A, other.A)
    assert relative(dense(one), dense(other)) < 0.05


def test_a_matrix_of_zeros_has_no_singular_vectors() -> None:
    for matrix in (torch.zeros(48, 70), LowRank(torch.zeros(48, 4), draw(4, 70, seed=0))):
        for generator in (None, torch_generator(0)):
            assert len(truncated(matrix, 4, generator=generator).A) == 0


# ------------------------------------------------------------------------------------------------------ updates kept

SHAPES = {"b.lora_A.weight": (3, 5), "a.lora_B.weight": (4, 2), "a.lora_A.weight": (2, 5), "b.lora_B.weight": (6, 3)}


def updates(count: int) -> list[Tensors]:
    return [
        {name: draw(*shape, seed=10 * n + i) for i, (name, shape) in enumerate(SHAPES.items())} for n in range(count)
    ]


@pytest.mark.parametrize("held_bytes", [0, 300, 2**20])
def test_updates_come_back_layer_by_layer_from_memory_and_disk(tmp_path: Path, held_bytes: int) -> None:
    given = updates(5)
    kept = Stored(tmp_path / "spool", summed=True, held_bytes=held_bytes)
    plain = Accumulator()
    for i, update in enumerate(given):
        kept.keep(update, i + 1.0, Place(f"silo-{i}"))
        plain.add(update, i + 1.0)
    for layer in ("a", "b"):
        names = (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        read = list(kept.read(names))
        assert [entry.place.silo for entry, _ in read] == [f"silo-{i}" for i in range(5)]
        for (_, tensors), update in zip(read, given, strict=True):
            assert set(tensors) == set(names)
            assert all(torch.equal(tensors[name], update[name]) for name in names)
    apart = ["a.lora_A.weight", "b.lora_B.weight"]
    assert all(torch.equal(t[n], u[n]) for (_, t), u in zip(kept.read(apart), given, strict=True) for n in apart)
    sums, others = dict(kept.mean()), dict(plain.mean())
    assert all(torch.equal(sums[name], others[name]) for name in others)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "spool").glob("*")) if (tmp_path / "spool").exists() else 0
    assert on_disk == 0, "the file has no name, so that no crash leaves it behind"


@pytest.mark.parametrize("held_bytes", [0, 300, 2**20])
@pytest.mark.parametrize("ranks", [1, 4, 100])
def test_silos_that_are_alike_are_read_together(tmp_path: Path, held_bytes: int, ranks: int) -> None:
    kept = Stored(tmp_path, summed=False, held_bytes=held_bytes)
    for i, update in enumerate(updates(7)):
        part = {n: t for n, t in update.items() if n.startswith("a.")} if i == 3 else update
        kept.keep(part, 1.0, Place(f"silo-{i}", rank=1 if i == 5 else 2))
    for names in (("a.lora_A.weight", "a.lora_B.weight"), ("a.lora_A.weight", "b.lora_B.weight"), ("c",)):
        single, groups = list(kept.read(names)), list(kept.read_together(names, ranks))
        assert [entry for silos, _ in groups for entry in silos] == [entry for entry, _ in single]
        rows = [{n: t[i] for n, t in tensors.items()} for silos, tensors in groups for i in range(len(silos))]
        for got, (_, want) in zip(rows, single, strict=True):
            assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
        assert all(len(silos) <= max(1, ranks // silos[0].place.rank) for silos, _ in groups)
    assert [len(silos) for silos, _ in kept.read_together(["a.lora_A.weight"], 100)] == [3, 1, 1, 1, 1]


def test_updates_may_lack_tensors_and_differ_in_rank_and_dtype(tmp_path: Path) -> None:
    kept = Stored(tmp_path, summed=False, held_bytes=0)
    first, second, third = updates(3)
    kept.keep({n: t.to(torch.bfloat16) for n, t in first.items()}, 1.0, Place("one", rank=2))
    kept.keep({n: t for n, t in second.items() if n.startswith("a.")}, 2.0, Place("two", rank=2))
    kept.keep({n: t[:1] if "lora_A" in n else t[:, :1] for n, t in third.items()}, 4.0, Place("three", rank=1))
    names = ("b.lora_A.weight", "b.lora_B.weight")
    assert [entry.place.silo for entry, _ in kept.read(names)] == ["one", "three"]
    assert kept.weight_of(names) == 5.0 and kept.weight_of(["a.lora_A.weight"]) == 7.0 and kept.weight_of(["c"]) == 0.0
    (_, one), (_, three) = kept.read(names)
    assert torch.equal(one[names[0]], first[names[0]].to(torch.bfloat16).float())
    assert torch.equal(three[names[1]], third[names[1]][:, :1]) and kept.count == 3 and kept.weight == 7.0


def test_memory_does_not_grow_with_the_number_of_silos(tmp_path: Path) -> None:
    size = 4 * sum(a * b for a, b in SHAPES.values())
    kept = Stored(tmp_path, summed=False, held_bytes=3 * size)
    for i, update in enumerate(updates(50)):
        kept.keep(update, 1.0, Place(f"silo-{i:02}"))
    assert sum(entry.held is not None for entry in kept.kept) == 3
    assert len({id(entry.layout) for entry in kept.kept}) == 1, "the names are held once"


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot wait on disk"):
        Stored(tmp_path / "file", summed=False, held_bytes=0).keep(updates(1)[0], 1.0, Place("one"))

    class Full:
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(RunError, match=r"it is full.*--resume"):
        Stored(tmp_path, summed=False, held_bytes=0).keep(updates(1)[0], 1.0, Place("one"))
