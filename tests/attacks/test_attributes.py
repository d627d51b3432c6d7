"""Whether a kind of text is among a silo's rows is told from its update, less so from sums, and not under noise; the
sketch and the classifier by their equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlm.attacks.attributes import PENALTIES, Told, learn, sketched, told
from fedlm.attacks.dager import noised
from fedlm.errors import PrivacyError
from fedlm.messages import Tensors
from fedlm.models.adapters import trainable
from fedlm.randomness import numpy_generator
from tests.attacks.conftest import PAGES
from tests.attacks.silo import gradients, windows

SHADOWS = 160
"""Half of them with the property, as of the 60 targets."""


def lora(seed: int, rank: int = 3, out: int = 20, width: int = 30) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {
        "q.lora_A.weight": torch.randn(rank, width, generator=draw),
        "q.lora_B.weight": torch.randn(out, rank, generator=draw),
    }


def product(tensors: Tensors) -> torch.Tensor:
    return tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"]


def test_sketches_keep_inner_products_of_products() -> None:
    """Of 40,000 rank-one projections the mean product is <D, E> / (|D| |E|), within 4 standard errors of 1.1e-2."""
    start, one, other = lora(0), lora(1), lora(2)
    blend = {n: 0.5 * one[n] + 0.5 * other[n] for n in one}
    changes = [product({n: start[n] + u[n] for n in u}) - product(start) for u in (one, blend)]
    exact = float((changes[0] * changes[1]).sum() / (changes[0].norm() * changes[1].norm()))
    x, y = (sketched(start, u, numbers=40_000) for u in (one, blend))
    assert np.linalg.norm(x) == pytest.approx(1.0)
    assert 0.3 < exact < 0.9 and x @ y == pytest.approx(exact, abs=0.045)
    # Other factors of the same product look the same.
    turned = {"q.lora_A.weight": 2 * (start["q.lora_A.weight"] + one["q.lora_A.weight"]) - start["q.lora_A.weight"]}
    turned["q.lora_B.weight"] = (start["q.lora_B.weight"] + one["q.lora_B.weight"]) / 2 - start["q.lora_B.weight"]
    np.testing.assert_allclose(sketched(start, turned, numbers=50), sketched(start, one, numbers=50), atol=1e-6)


def test_a_dense_matrix_and_a_vector_are_projected_by_hand() -> None:
    from fedlm.attacks.attributes import _signs

    update = {"w": torch.arange(6.0).reshape(2, 3), "z": torch.tensor([1.0, -2.0, 4.0])}
    u, v = _signs(5, "w rows", 4, 2), _signs(5, "w", 4, 3)
    by_hand = [float(u[i] @ update["w"].double() @ v[i]) for i in range(4)]
    by_hand += [
        float(_signs(5, "z rows", 4, 1)[i, 0] * (_signs(5, "z", 4, 3)[i] @ update["z"].double())) for i in range(4)
    ]
    found = sketched({}, update, numbers=8, seed=5)
    np.testing.assert_allclose(found, np.array(by_hand) / np.linalg.norm(by_hand), rtol=1e-12)
    assert not np.allclose(found, sketched({}, update, numbers=8, seed=6))


def test_the_classifier_is_ridge_regression_with_its_penalty_by_leaving_one_out() -> None:
    """Against scikit-learn's RidgeClassifierCV, on features of its own scaler."""
    linear = pytest.importorskip("sklearn.linear_model")
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    random = np.random.default_rng(0)
    for n, k in ((30, 8), (25, 60)):
        marks = random.random(n) < 0.4
        x = random.normal(size=(n, k)) * random.random(k) + 0.5 * marks[:, None]
        theirs = linear.RidgeClassifierCV(alphas=PENALTIES).fit(scaler.fit_transform(x), marks)
        ours = learn(x, marks)
        assert ours.penalty == theirs.alpha_
        fresh = random.normal(size=(10, k))
        np.testing.assert_allclose(ours.scores(fresh), theirs.decision_function(scaler.transform(fresh)), atol=1e-8)


def test_what_is_told_in_hand() -> None:
    found = told(np.array([2.0, 1.0, -1.0, -2.0, -3.0]), np.array([True, False, True, False, False]))
    assert (found.accuracy, found.auc, found.majority, found.silos) == (0.6, 5 / 6, 0.6, 5)
    assert found.interval[0] < 0.6 < found.interval[1]
    # P[Binomial(5, 0.6) >= 3]
    assert found.p_value == pytest.approx(10 * 0.6**3 * 0.4**2 + 5 * 0.6**4 * 0.4 + 0.6**5)


def test_refusals() -> None:
    with pytest.raises(PrivacyError, match="nothing in the update"):
        sketched({}, {})
    with pytest.raises(PrivacyError, match="lora_A"):
        sketched({}, lora(0))
    with pytest.raises(PrivacyError, match="not finite"):
        sketched({}, {"w": torch.full((2, 2), float("nan"))})
    with pytest.raises(PrivacyError, match="two of either kind"):
        learn(np.zeros((4, 2)), np.array([True, False, False, False]))
    for x, marks in ((np.zeros(4), np.zeros(4, bool)), (np.full((4, 2), np.nan), np.arange(4) < 2)):
        with pytest.raises(PrivacyError, match="finite"):
            learn(x, marks)


# real text


@pytest.fixture
def silos(base: Any, tokenizer: Any, pages: list[str]) -> tuple[Tensors, dict[str, list[Tensors]]]:
    """The broadcast model, and updates by one step of SGD on 12 pieces of text: shadows and targets, in turn with the
    property (two thirds of the pieces are source code, else this project's pages) or not. They share no piece."""
    model = base.requires_grad_(True)
    start = {n: p.detach().clone() for n, p in trainable(model).items()}
    code = [" ".join(file.read_text().split()) for file in sorted((PAGES.parent / "src/fedlm/attacks").glob("*.py"))]
    draw = numpy_generator(0, "pieces")
    found: dict[str, list[Tensors]] = {"shadow": [], "target": []}
    for place, (who, count) in enumerate((("shadow", SHADOWS), ("target", 60))):
        pools = [windows(tokenizer, texts, 24)[place::2] for texts in (code, pages)]
        for number in range(count):
            some = 8 * (1 - number % 2)
            rows = [pools[0][i] for i in draw.permutation(len(pools[0]))[:some]]
            rows += [pools[1][i] for i in draw.permutation(len(pools[1]))[: 12 - some]]
            found[who].append({n: -g for n, g in gradients(model, rows).items()})
    return start, found


def attacked(start: Tensors, found: dict[str, list[Tensors]]) -> Told:
    x = {who: np.stack([sketched(start, update) for update in updates]) for who, updates in found.items()}
    marks = {who: np.arange(len(updates)) % 2 == 0 for who, updates in found.items()}
    return told(learn(x["shadow"], marks["shadow"]).scores(x["target"]), marks["target"])


def test_a_bare_update_tells_and_a_noised_one_does_not(silos: tuple[Tensors, dict[str, list[Tensors]]]) -> None:
    start, bare = silos
    found = attacked(start, bare)
    print(found)
    assert found.accuracy > 0.7 and found.auc > 0.85 and found.p_value < 1e-3
    with_noise = {
        who: [noised(u, 1.0, 1.0, seed=i + 1000 * (who == "target"))[0] for i, u in enumerate(updates)]
        for who, updates in bare.items()
    }
    hidden = attacked(start, with_noise)
    print(hidden)
    assert hidden.p_value > 0.01 and hidden.interval[0] < 0.55
