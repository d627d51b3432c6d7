"""Canaries: made-up secrets that are put among the rows, and sought in the model afterwards.

*Exposure* (Carlini, Liu, Erlingsson, Kos, Song, "The Secret Sharer", USENIX Security 2019): a canary is a format with a
random secret in it; its rank is the place of its loss among those of all secrets that it might have had, and its
exposure log2 |R| - log2 rank. A model that learned nothing of it gives 1 bit or so (below k bits with probability
1 - 2^-k); the most is log2 |R|, where it is likelier than all others.

*Empirical epsilon from one run* (Steinke, Nasr, Jagielski, NeurIPS 2023): each of m canaries is put in with probability
1/2; scores after training are turned into guesses, and their number right into a lower bound (`fedlm.privacy.one_run`).
What is a unit there must be one here: to audit privacy of a row, each canary is one row and is in one silo.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.attacks.membership import Vector, losses
from fedlm.errors import PrivacyError
from fedlm.privacy.one_run import Audit, simultaneous
from fedlm.randomness import numpy_generator
from fedlm.training.sequences import Encoded

LARGEST = 10**6
"""Candidates whose losses are all computed; above that, exposure would have to be estimated."""
FEWEST = 100
"""Canaries of an audit: all of 100 right refute an epsilon of 3.5, all of 30 one of 2.2."""


@dataclass(frozen=True)
class Space:
    """A format and the secrets that may stand in it.

    Attributes:
        form: with one '{}' where the secret goes, for instance 'The number of my account is {}'.
        alphabet: the secret's letters.
        length: of the secret.
    """

    form: str
    alphabet: str = "0123456789"
    length: int = 4

    def __post_init__(self) -> None:
        if self.form.count("{}") != 1 or len(set(self.alphabet)) != len(self.alphabet) or len(self) < 2:
            raise PrivacyError(
                "a canary's format holds no place, or its secrets are fewer than two",
                fix="write one '{}' into the format, letters that differ into the alphabet, and a length of 1 or more",
            )

    def __len__(self) -> int:
        return int(len(self.alphabet) ** self.length)

    def text(self, secret: str) -> str:
        return self.form.replace("{}", secret)

    def secrets(self) -> Iterator[str]:
        """All of them."""
        return ("".join(letters) for letters in itertools.product(self.alphabet, repeat=self.length))

    def drawn(self, count: int, seed: int) -> list[str]:
        """`count` different secrets, each set of them equally likely.

        Raises:
            PrivacyError: there are not so many.
        """
        if count > len(self):
            raise PrivacyError(f"{count} canaries are asked for, and there are {len(self)} secrets")
        generator, found = numpy_generator(seed, "canaries", self.form), dict[str, None]()
        while len(found) < count:
            letters = generator.integers(0, len(self.alphabet), self.length)
            found["".join(self.alphabet[i] for i in letters)] = None
        return list(found)


def exposure(canary: float, candidates: Vector) -> float:
    """log2 |R| - log2 rank, in bits, of a canary with this loss among the losses of all secrets, its own too.

    Of equal losses the canary's counts as the largest, so a model that says the same of all exposes nothing.
    """
    rank = int((np.asarray(candidates) <= canary).sum())
    if rank < 1:
        raise PrivacyError("the candidates' losses do not hold the canary's own")
    return math.log2(len(candidates)) - math.log2(rank)


def exposures(
    model: Any,
    space: Space,
    secrets: Sequence[str],
    encode: Callable[[str], Encoded],
    batch_tokens: int = 8192,
    *,
    packing: bool = True,
) -> list[float]:
    """Exposure of each secret, exact: the loss of every candidate is computed, once for all secrets.

    Args:
        encode: a text as the sequence whose loss ranks it: as rows were trained.

    Raises:
        PrivacyError: the space is larger than `LARGEST`, or a secret is not of it.
    """
    if len(space) > LARGEST:
        raise PrivacyError(
            f"{len(space)} secrets are too many to rank a canary exactly (at most {LARGEST})",
            fix="choose a shorter secret, or a smaller alphabet",
        )
    places = {secret: i for i, secret in enumerate(space.secrets())}
    if strange := [secret for secret in secrets if secret not in places]:
        raise PrivacyError(f"{len(strange)} secrets are not of the canaries' space")
    sequences = [encode(space.text(secret)) for secret in places]
    # Summed, and not the mean: that of a secret of more tokens is another event's.
    values = losses(model, sequences, batch_tokens, packing=packing) * [max(1, s.targets) for s in sequences]
    return [exposure(values[places[secret]], values) for secret in secrets]


def coins(count: int, seed: int) -> NDArray[np.bool_]:
    """Which canaries are put in, each with probability 1/2 and independently of the others [count].

    Raises:
        PrivacyError: they are too few for an audit.
    """
    if count < FEWEST:
        raise PrivacyError(f"{count} canaries say too little: an audit from one run needs {FEWEST} or more")
    return numpy_generator(seed, "canaries' coins").random(count) < 0.5


@dataclass(frozen=True)
class Empirical:
    """A lower bound on epsilon that one run refutes with confidence.

    Attributes:
        epsilon: the largest bound; those of all numbers of guesses hold at once (Bonferroni).
        guesses, correct: of the audit that gave it.
        canaries: all there were.
        delta, confidence: under which it holds.
    """

    epsilon: float
    guesses: int
    correct: int
    canaries: int
    delta: float
    confidence: float


def empirical_epsilon(
    scores: Vector,
    included: NDArray[np.bool_],
    delta: float,
    *,
    shares: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    confidence: float = 0.95,
) -> Empirical:
    """The epsilon that these scores refute: the highest half of r guesses are 'in', the lowest 'out'.

    Args:
        scores: higher where a canary is likelier in [m]: for instance its loss before training minus that after.
        included: whether it was [m], from `coins`; looked at only to count.
        shares: of m that are guessed, each a number of guesses that is tried.

    Raises:
        PrivacyError: fewer than `FEWEST` canaries, shapes that differ, or a score that is not a number.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(included)
    if values.ndim != 1 or values.shape != truth.shape or truth.dtype != np.bool_ or np.isnan(values).any():
        raise PrivacyError("an audit needs one score, a number, and one mark for each canary")
    if len(values) < FEWEST:
        raise PrivacyError(f"{len(values)} canaries say too little: an audit from one run needs {FEWEST} or more")
    order = np.argsort(values, kind="stable")
    audits = []
    for share in shares:
        half = max(1, round(share * len(values) / 2))
        half = min(half, len(values) // 2)
        correct = int(truth[order[-half:]].sum() + (~truth[order[:half]]).sum())
        audits.append(Audit(len(values), 2 * half, correct))
    bounds = simultaneous(audits, delta, confidence)
    best = int(np.argmax(bounds))
    audit = audits[best]
    return Empirical(bounds[best], audit.guesses, audit.correct, len(values), delta, confidence)
