"""Error feedback: what is lost comes back, so that plain descent reaches the optimum that it misses without."""

from __future__ import annotations

import math

import pytest
import torch

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Tensors
from tests.guards.test_guards import LOSSY, chain, shapes_of, update, whole

ALL = [specs for specs in LOSSY if specs[0]["name"] != "lowrank" or len(specs) == 1]


@pytest.mark.parametrize("specs", ALL, ids=str)
def test_nothing_is_lost_for_good(specs: list[dict[str, object]]) -> None:
    """sum of what was sent + the last error = sum of the updates (fp32 rounding apart), over 12 rounds."""
    made, errors, total, received = chain(*specs, feedback=True), {}, torch.zeros(0), torch.zeros(0)
    for round_ in range(12):
        u = update(round_)
        payload, errors = made.encode_with_feedback(u, errors, (0, "silo", round_))
        back = made.decode(payload, shapes_of(u), (0, "silo", round_))
        total = whole(u).double() if round_ == 0 else total + whole(u)
        received = whole(back).double() if round_ == 0 else received + whole(back)
    assert float((received + whole(errors) - total).norm() / total.norm()) < 1e-6
    assert float((received - total).norm()) > 1e-6 * float(total.norm()), "something is still owed"


@pytest.mark.parametrize("name", ["topk", "randk", "int4"])
def test_the_error_stays_bounded(name: str) -> None:
    """For |u| <= G: E |e|^2 <= 4 (1 - delta) G^2 / delta^2, delta = k/d (Karimireddy et al., 2019, lemma 3)."""
    made = chain({"name": name, **({} if name == "int4" else {"density": 0.1})}, feedback=True)
    draw, errors, norms = torch.Generator().manual_seed(0), {}, []
    for round_ in range(300):
        u = torch.randn(500, generator=draw) + 0.5
        u = u / u.norm()
        _, errors = made.encode_with_feedback({"x": u}, errors, (0, round_))
        norms.append(float(errors["x"].norm()))
    delta = 0.1
    assert max(norms) <= math.sqrt(4 * (1 - delta)) / delta
    assert max(norms[200:]) < 1.2 * max(norms[:200]), "it does not grow"


def descend(*, feedback: bool) -> float:
    """How far, relatively, the coordinates that matter are from the optimum after gradient descent of two silos.

    f_1 and f_2 have large opposite slopes along half of the coordinates: the largest values of either silo are always
    these, and their mean is zero.
    """
    made = chain({"name": "topk", "density": 0.2}, feedback=feedback)
    target = torch.ones(20)
    pull = torch.zeros(20)
    pull[:10] = 50.0
    w, errors = torch.zeros(20), [{}, {}]
    for step in range(3000):
        updates = []
        for i, sign in enumerate((1.0, -1.0)):
            u: Tensors = {"w": -0.002 * (w - target + sign * pull)}
            if feedback:
                payload, errors[i] = made.encode_with_feedback(u, errors[i], (0, i, step))
            else:
                payload = made.encode(u, (0, i, step))
            updates.append(made.decode(payload, {"w": w.shape}, (0, i, step))["w"])
        w = w + torch.stack(updates).mean(0)
    return float((w - target)[10:].norm() / target[10:].norm())


@pytest.mark.slow
def test_it_converges_where_plain_topk_stands_still() -> None:
    assert descend(feedback=False) > 0.99
    assert descend(feedback=True) < 0.05


def test_errors_wait_for_their_tensors() -> None:
    """A method that sends A in one round and B in the next: the errors of A wait for the next A."""
    made = chain({"name": "topk", "density": 0.1}, feedback=True)
    a, b = {"x.lora_A": torch.randn(8, 16)}, {"x.lora_B": torch.randn(16, 8)}
    _, errors = made.encode_with_feedback(a, {}, (0, 0))
    first = errors["x.lora_A"].clone()
    _, errors = made.encode_with_feedback(b, errors, (0, 1))
    assert errors.keys() == {"x.lora_A", "x.lora_B"} and torch.equal(errors["x.lora_A"], first)
    payload, errors = made.encode_with_feedback(a, errors, (0, 2))
    back = made.decode(payload, shapes_of(a), (0, 2))["x.lora_A"]
    torch.testing.assert_close(back + errors["x.lora_A"], a["x.lora_A"] + first)


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("x", torch.zeros(2, 4), r"'x' has shape \[2, 4\], and the update's \[4, 4\]"),
        ("x", torch.zeros(4, 4, dtype=torch.float64), "'x' is torch.float64, not torch.float32"),
        ("x", torch.zeros(4, 4, dtype=torch.int32), "'x' is torch.int32, not torch.float32"),
        ("x", torch.full((4, 4), math.nan), "'x' holds values that are not finite"),
        ("waits", torch.full((3,), -math.inf), "'waits' holds values that are not finite"),
        ("waits", torch.zeros(3, dtype=torch.float16), "'waits' is torch.float16, not torch.float32"),
    ],
)
def test_an_error_that_was_never_kept_is_refused(name: str, error: torch.Tensor, told: str) -> None:
    made = chain({"name": "int4"}, feedback=True)
    with pytest.raises(RunError, match=rf"^the error feedback kept of {told}.*\. Fix: restore the silo's state"):
        made.encode_with_feedback({"x": torch.ones(4, 4)}, {name: error}, (0,))


def test_an_error_that_leaves_no_room_is_refused() -> None:
    made = chain({"name": "int4"}, feedback=True)
    with pytest.raises(UpdateRefused, match=r"^the update with what guards lost before holds values up to 3e\+38"):
        made.encode_with_feedback({"x": torch.ones(4, 4)}, {"x": torch.full((4, 4), 3e38)}, (0,))


def test_kept_errors_repeat_a_round_exactly() -> None:
    made = chain({"name": "int4"}, feedback=True)
    _, errors = made.encode_with_feedback(update(0), {}, (0, 0))
    kept = {name: error.clone() for name, error in errors.items()}
    one, after = made.encode_with_feedback(update(1), errors, (0, 1))
    assert all(torch.equal(errors[name], kept[name]) for name in kept), "the kept errors are not touched"
    two, again = made.encode_with_feedback(update(1), kept, (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(after[name], again[name]) for name in after)
