"""Shamir's secret sharing: published vectors, exact counts in a small field, and refusals."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.shamir import PRIME, WIDTH, evaluate, interpolate, recover, recover_checked, share

ED25519 = 2**252 + 27742317777372353535851937790883648493
ED448 = 2**446 - 13818066809895115352007386748515426880336692474882178609894547503885
P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SECP256K1 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

RFC9591 = {
    "Ed25519": (
        ED25519,
        "little",
        "7b1c33d3f5291d85de664833beb1ad469f7fb6025a0ec78b3a790c6e13a98304",
        "178199860edd8c62f5212ee91eff1295d0d670ab4ed4506866bae57e7030b204",
        "929dcc590407aae7d388761cddb0c0db6f5627aea8e217f4a033f2ec83d93509",
        "a91e66e012e4364ac9aaa405fcafd370402d9859f7b6685c07eed76bf409e80d",
        "d3cb090a075eb154e82fdb4b3cb507f110040905468bb9c46da8bdea643a9a02",
    ),
    "Ed448": (
        ED448,
        "little",
        "6298e1eef3c379392caaed061ed8a31033c9e9e3420726f23b404158a401cd9df24632adfe6b418dc942d8a091817dd8bd70e1c72ba5"
        "2f3c00",
        "dbd7a514f7a731976620f0436bd135fe8dddc3fadd6e0d13dbd58a1981e587d377d48e0b7ce4e0092967c5e85884d0275a7a740b6abd"
        "cd0500",
        "4a2b2f5858a932ad3d3b18bd16e76ced3070d72fd79ae4402df201f525e754716a1bc1b87a502297f2a99d89ea054e0018eb55d39562"
        "fd0100",
        "2503d56c4f516444a45b080182b8a2ebbe4d9b2ab509f25308c88c0ea7ccdc44e2ef4fc4f63403a11b116372438a1e287265cadeff1f"
        "cb0700",
        "00db7a8146f995db0a7cf844ed89d8e94c2b5f259378ff66e39d172828b264185ac4decf7219e4aa4478285b9c0eef4fccdf3eea69dd"
        "980d00",
    ),
    "ristretto255": (
        ED25519,
        "little",
        "1b25a55e463cfd15cf14a5d3acc3d15053f08da49c8afcf3ab265f2ebc4f970b",
        "410f8b744b19325891d73736923525a4f596c805d060dfb9c98009d34e3fec02",
        "5c3430d391552f6e60ecdc093ff9f6f4488756aa6cebdbad75a768010b8f830e",
        "b06fc5eac20b4f6e1b271d9df2343d843e1e1fb03c4cbb673f2872d459ce6f01",
        "f17e505f0e2581c6acfe54d3846a622834b5e7b50cad9a2109a97ba7a80d5c04",
    ),
    "P-256": (
        P256,
        "big",
        "8ba9bba2e0fd8c4767154d35a0b7562244a4aaf6f36c8fb8735fa48b301bd8de",
        "80f25e6c0709353e46bfbe882a11bdbb1f8097e46340eb8673b7e14556e6c3a4",
        "0c9c1a0fe806c184add50bbdcac913dda73e482daf95dcb9f35dbb0d8a9f7731",
        "8d8e787bef0ff6c2f494ca45f4dad198c6bee01212d6c84067159c52e1863ad5",
        "0e80d6e8f6192c003b5488ce1eec8f5429587d48cf001541e713b2d53c09d928",
    ),
    "secp256k1": (
        SECP256K1,
        "big",
        "0d004150d27c3bf2a42f312683d35fac7394b1e9e318249c1bfe7f0795a83114",
        "fbf85eadae3058ea14f19148bb72b45e4399c0b16028acaf0395c9b03c823579",
        "08f89ffe80ac94dcb920c26f3f46140bfc7f95b493f8310f5fc1ea2b01f4254c",
        "04f0feac2edcedc6ce1253b7fab8c86b856a797f44d83d82a385554e6e401984",
        "00e95d59dd0d46b0e303e500b62b7ccb0e555d49f5b849f5e748c071da8c0dbc",
    ),
}
"""By group: its order, byte order, secret, coefficient and three shares, threshold 2 (RFC 9591, appendix E)."""


@pytest.mark.parametrize("group", RFC9591)
def test_rfc_9591_vectors(group: str) -> None:
    prime, order, *numbers = RFC9591[group]
    secret, coefficient, *shares = (int.from_bytes(bytes.fromhex(n), order) for n in numbers)
    assert [evaluate([secret, coefficient], x, prime) for x in (1, 2, 3)] == shares
    for pair in itertools.permutations(zip((1, 2, 3), shares, strict=True), 2):
        assert recover(pair, 2, prime) == secret


def test_wikipedia_example() -> None:
    """1234 + 166 x + 94 x^2 modulo 1613: the worked example with its six shares."""
    assert [evaluate([1234, 166, 94], x, 1613) for x in range(1, 7)] == [1494, 329, 965, 176, 1188, 775]
    assert recover([(2, 329), (4, 176), (5, 1188)], 3, 1613) == 1234


def test_the_field() -> None:
    """No number between 2^256 and it is prime by Fermat's test to base 3, and it passes to 40 bases."""
    assert PRIME == 2**256 + 297
    assert all(pow(3, n - 1, n) != 1 for n in range(2**256 + 1, PRIME, 2))
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in range(2, 42))
    sympy = pytest.importorskip("sympy")
    assert sympy.nextprime(2**256) == PRIME
    assert PRIME < 256**WIDTH


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 3)])
def test_fewer_than_the_threshold_fit_every_secret_equally_often(prime: int, threshold: int) -> None:
    """All polynomials over a tiny field: what any t - 1 shares can be is the same, as often, for each secret."""
    for places in itertools.combinations(range(1, prime), threshold - 1):
        seen = [
            sorted(
                tuple(evaluate([secret, *rest], x, prime) for x in places)
                for rest in itertools.product(range(prime), repeat=threshold - 1)
            )
            for secret in range(prime)
        ]
        assert all(each == seen[0] for each in seen)
        assert len(set(seen[0])) == prime ** (threshold - 1)


def test_shares_are_drawn_anew() -> None:
    """A share of the same secret, drawn 5,000 times modulo 5: uniform (chi-square of 4 degrees, 1 in 10^5)."""
    counts = [0] * 5
    for _ in range(5000):
        counts[share(3, 2, [1, 2, 3], 5)[0][1]] += 1
    assert sum((c - 1000) ** 2 / 1000 for c in counts) < 28.5


@given(st.integers(0, PRIME - 1), st.integers(1, 8), st.data())
def test_any_threshold_of_shares_give_the_secret_back(secret: int, threshold: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(1, 2**32), min_size=threshold, max_size=12, unique=True))
    shares = share(secret, threshold, places)
    chosen = data.draw(st.permutations(shares))[:threshold]
    assert recover(chosen, threshold) == secret
    assert all(interpolate(chosen, threshold, x) == y for x, y in shares)


def test_one_share_too_few_gives_something_else() -> None:
    shares = share(42, 5, range(1, 8))
    assert recover(shares[:4], 4) != 42


@pytest.mark.parametrize("wrong", [[], [0], [3], [6], [0, 1], [2, 6]])
def test_wrong_shares_are_named(wrong: list[int]) -> None:
    shares = share(42, 4, range(1, 8))
    given_ = [(x, (y + 1) % PRIME) if place in wrong else (x, y) for place, (x, y) in enumerate(shares)]
    found = recover_checked(given_, 4, lambda secret: secret == 42)
    assert found == (42, [place + 1 for place in wrong])


def test_nobody_is_framed() -> None:
    """Two liars whose errors cancel at 0 beside two right shares, and too few others to tell: nobody is named."""
    shares = share(42, 4, range(1, 7))
    lies = [(1, (shares[0][1] + 1) % PRIME), (2, (shares[1][1] + 1) % PRIME), *shares[2:]]
    assert recover([lies[0], lies[1], lies[3], lies[4]], 4) == 42  # 10/3 - 10/3
    assert recover_checked(lies, 4, lambda secret: secret == 42) == (42, [])


def test_too_many_wrong_shares_cannot_be_told_apart() -> None:
    shares = share(42, 4, range(1, 7))
    lies = [(x, (y + 10**x) % PRIME) for x, y in shares[:3]]
    assert recover_checked(lies + shares[3:], 4, lambda secret: secret == 42) is None
    assert recover_checked([(1, 7), *shares[1:4]], 4, lambda secret: secret == 42) is None


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([(1, 5), (1, 5)], "two shares of one place"),
        ([(0, 5), (1, 5)], "place is 0"),
        ([(PRIME, 5), (1, 5)], "place is 0 or not in the field"),
        ([(-1, 5), (1, 5)], "place is 0 or not in the field"),
        ([(1, PRIME), (2, 5)], "not an element"),
        ([(1, -1), (2, 5)], "not an element"),
        ([(1, 5)], "do not reach the threshold"),
    ],
)
def test_refused_shares(shares: list[tuple[int, int]], says: str) -> None:
    with pytest.raises(AggregationRefused, match=says):
        recover(shares, 2)


def test_refused_sharing() -> None:
    for secret, threshold, places in (
        (PRIME, 1, [1]),
        (-1, 1, [1]),
        (1, 2, [1]),
        (1, 1, [1, 1]),
        (1, 1, [0]),
        (1, 0, [1]),
    ):
        with pytest.raises(AggregationRefused):
            share(secret, threshold, places)
