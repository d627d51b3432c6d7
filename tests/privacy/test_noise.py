"""Noise against its distribution: chi-square, Kolmogorov-Smirnov and moments under fixed keys, tables to 1e-30."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedlm.errors import PrivacyError
from fedlm.privacy import noise
from fedlm.privacy.noise import Table, discrete_gaussian, gaussian, gaussian_table, skellam, skellam_table
from fedlm.privacy.stream import SecretStream, fresh_secret

COUNT = 400_000
SECRET = bytes(range(32))


def stream(*purpose: str | int) -> SecretStream:
    return SecretStream(SECRET, "test", *purpose)


def chi_square(values: np.ndarray, probability: Callable[[np.ndarray], np.ndarray]) -> float:
    """p-value of counts against probabilities, cells of fewer than 10 expected put together."""
    reach = int(np.abs(values).max()) + 1
    cells = np.arange(-reach, reach + 1)
    expected = probability(cells) * values.size
    counts = np.bincount(values + reach, minlength=cells.size)
    enough = expected >= 10
    observed = np.append(counts[enough], counts[~enough].sum())
    wanted = np.append(expected[enough], values.size - expected[enough].sum())
    return float(stats.chisquare(observed, wanted).pvalue)


def discrete_gaussian_pmf(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    x = np.arange(-math.ceil(40 * sigma) - 1, math.ceil(40 * sigma) + 2)
    normaliser = np.exp(-(x**2) / (2 * sigma**2)).sum()
    return lambda cells: np.exp(-(cells**2) / (2 * sigma**2)) / normaliser


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 3.7, 60.0])
def test_discrete_gaussian(sigma: float) -> None:
    values = discrete_gaussian(stream("discrete"), sigma, COUNT)
    pmf = discrete_gaussian_pmf(sigma)
    assert chi_square(values, pmf) > 0.001
    cells = np.arange(-math.ceil(30 * sigma), math.ceil(30 * sigma) + 1)
    variance = float((cells**2 * pmf(cells)).sum())
    assert abs(values.mean()) < 4 * math.sqrt(variance / COUNT)
    spread = math.sqrt(float((cells**4 * pmf(cells)).sum()) - variance**2)
    assert abs((values**2).mean() - variance) < 4 * spread / math.sqrt(COUNT)


@pytest.mark.parametrize("variance", [0.2, 1.0, 9.0, 2500.0])
def test_skellam(variance: float) -> None:
    values = skellam(stream("skellam"), variance, COUNT)
    assert chi_square(values, lambda cells: stats.skellam.pmf(cells, variance / 2, variance / 2)) > 0.001
    assert abs(values.mean()) < 4 * math.sqrt(variance / COUNT)
    assert values.var() == pytest.approx(variance, rel=0.03)
    assert stats.kurtosis(values) == pytest.approx(1 / variance, abs=0.05 + 0.1 / variance)


def test_shares_of_skellam_add_up() -> None:
    """Closed under addition: five silos' shares are the sum's own distribution."""
    total = sum(skellam(stream("share", silo), 0.8, COUNT) for silo in range(5))
    assert isinstance(total, np.ndarray)
    assert chi_square(total, lambda cells: stats.skellam.pmf(cells, 2.0, 2.0)) > 0.001


def test_gaussian() -> None:
    values = gaussian(stream("gaussian"), 2.5, COUNT)
    assert stats.kstest(values, "norm", (0, 2.5)).pvalue > 0.001
    assert abs(values.mean()) < 4 * 2.5 / math.sqrt(COUNT)
    assert values.std() == pytest.approx(2.5, rel=0.01)
    # Tails: of 400 000, as many beyond 4 standard deviations as there should be (25.3, standard deviation 5).
    assert 8 < (np.abs(values) > 10).sum() < 46
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(COUNT)


def entry(table: Table, k: int) -> Fraction:
    """P(|X| <= k)."""
    return Fraction((int(table.high[k]) << 64) + int(table.low[k]), 1 << 128)


def test_gaussian_table_to_the_last_bits() -> None:
    """With sigma^2 = 1/(2 ln 2) weights are powers of two, 2^-(x^2): exact rational arithmetic."""
    table = gaussian_table(math.sqrt(1 / (2 * math.log(2))))
    weights = [Fraction(1, 2 ** (k * k)) for k in range(30)]
    total = weights[0] + 2 * sum(weights[1:])
    for k in range(8):
        exact = (weights[0] + 2 * sum(weights[1 : k + 1])) / total
        assert abs(entry(table, k) - exact) < Fraction(1, 10**15)  # sigma is a double: no better


def test_tables_sum_against_exact_series() -> None:
    """P(X = 0) of Skellam(1): sum_k (1/2)^(2k) / (k!)^2 / e, and of the discrete Gaussian with sigma 1: by Decimal, to
    1e-36."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        e = Decimal(1).exp()
        bessel = sum(Decimal("0.25") ** k / Decimal(math.factorial(k)) ** 2 for k in range(40)) / e
        gauss = 1 / (1 + 2 * sum((Decimal(-k * k) / 2).exp() for k in range(1, 20)))
    for table, exact in ((skellam_table(1.0), bessel), (gaussian_table(1.0), gauss)):
        assert abs(entry(table, 0) - Fraction(exact)) < Fraction(1, 10**36)


def test_tables_reach_beyond_any_draw() -> None:
    """What a table leaves out has a probability below 2^-127, and entries never fall."""
    for table in (gaussian_table(0.3), gaussian_table(700.0), skellam_table(0.01), skellam_table(3e5)):
        values = [(int(high) << 64) + int(low) for high, low in zip(table.high, table.low, strict=True)]
        assert values == sorted(values)
        assert (1 << 128) - values[-1] <= 2


def test_ties_are_decided_by_the_low_word() -> None:
    """Where the high word equals an entry's, the low word decides, in proportion."""
    table = Table(np.array([5, 5, 9], np.uint64), np.array([1 << 62, 3 << 62, 0], np.uint64))
    found = noise._lookup(table, np.full(4000, 5, np.uint64), stream("ties"))
    shares = np.bincount(found, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25, 0], atol=0.03)
    np.testing.assert_array_equal(noise._lookup(table, np.array([4, 6, 10], np.uint64), stream("ties")), [0, 2, 3])


def test_keys() -> None:
    """The same secret and purpose give the same noise; any other gives unrelated noise."""

    def draw(secret: bytes, *purpose: str | int) -> np.ndarray:
        return discrete_gaussian(SecretStream(secret, *purpose), 10.0, 1000)

    first = draw(SECRET, "run", 1)
    np.testing.assert_array_equal(first, draw(SECRET, "run", 1))
    for other in (
        draw(SECRET, "run", 2),
        draw(SECRET, "run", "1"),
        draw(SECRET, "run1"),
        draw(fresh_secret(), "run", 1),
    ):
        assert (first == other).mean() < 0.1


def test_words_are_aes_in_counter_mode() -> None:
    """The stream is the keystream of the derived key, whatever portions it is taken in."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"fedlm privacy noise 1" + (5).to_bytes(4, "big") + b"str:x"
    key = HKDF(hashes.SHA256(), 32, None, info).derive(SECRET)
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # counter mode by hand: block i is AES(i)
    expected = b"".join(block.update(i.to_bytes(16, "big")) for i in range(50))
    taken = SecretStream(SECRET, "x")
    parts = [taken.words(3), taken.words(40), taken.words(57)]
    assert np.concatenate(parts).astype("<u8").tobytes() == expected


@pytest.mark.parametrize("secret", [b"", b"short", bytes(64)])
def test_secrets_of_another_length(secret: bytes) -> None:
    with pytest.raises(PrivacyError, match="32"):
        SecretStream(secret, "x")


def test_a_stream_needs_a_purpose() -> None:
    with pytest.raises(PrivacyError, match="purpose"):
        SecretStream(SECRET)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_no_noise(scale: float) -> None:
    for draw in (gaussian, discrete_gaussian, skellam):
        with pytest.raises(PrivacyError, match="cannot be drawn"):
            draw(stream(), scale, 3)
    with pytest.raises(PrivacyError, match="coarser"):
        discrete_gaussian(stream(), 1e6, 3)
