"""Text that is told under local differential privacy: every token is drawn anew, sooner near its own than far from it.

The exponential mechanism (McSherry and Talwar, FOCS 2007) with a distance of token embeddings, as SanText has it (Yue
et al., "Differential Privacy for Text Analytics via Natural Text Sanitization", Findings of ACL 2021): in the place of
x stands y with probability proportional to exp(-epsilon/2 d(x, y)). Here d is half the distance of the embeddings, less
their mean and at unit length: a metric between 0 and 1.

What is guaranteed. For any two tokens x, x' and every y,

    P(y | x) <= exp(epsilon d(x, x')) P(y | x') <= exp(epsilon) P(y | x').

The first is metric privacy (Chatzikokolakis et al., PETS 2013; for words Feyisetan et al., WSDM 2020): tokens that mean
alike are hard to tell apart, others less so. The second holds of whatever two tokens, since d is at most 1. Tokens are
drawn independently, so epsilons add up: two texts of n tokens are told apart by at most exp(epsilon times the sum of
their tokens' distances), and with n epsilon at worst. How many tokens a text has is not hidden, and a text drawn twice
has cost twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.stream import SecretStream

_BLOCK = 64
"""Different tokens whose distances to the vocabulary are in memory at once."""

_CHUNK = 8192
"""Of the vocabulary, embeddings in fp64 at once."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that there are, and those that may stand in their places.

    Args:
        embeddings: [tokens, width], less their mean; see `vocabulary`.
        outputs: int64 [outputs], tokens that may be drawn.
    """

    embeddings: NDArray[np.float32]
    outputs: NDArray[np.int64]

    def distances(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Half the distance of each token to each output [tokens, outputs], between 0 and 1; 0 to itself."""
        ours = _at_unit_length(self.embeddings[tokens])
        sizes = (ours * ours).sum(axis=1, keepdims=True)  # 1, or 0 of a token that is the mean
        found = np.empty((len(tokens), len(self.outputs)))
        for start in range(0, len(self.outputs), _CHUNK):
            part = slice(start, start + _CHUNK)
            theirs = _at_unit_length(self.embeddings[self.outputs[part]])
            squared = sizes + (theirs * theirs).sum(axis=1) - 2.0 * (ours @ theirs.T)
            found[:, part] = np.sqrt(np.maximum(0.0, squared)) / 2.0
        found[tokens[:, None] == self.outputs[None, :]] = 0.0  # of which rounding would leave 1e-8
        return np.minimum(found, 1.0)


def vocabulary(embeddings: NDArray[np.float32], outputs: NDArray[np.int64]) -> Vocabulary:
    """The vocabulary of a model that is public: embeddings [tokens, width].

    Raises:
        PrivacyError: an embedding is not finite, or there is nothing to draw.
    """
    if not np.isfinite(embeddings).all():
        raise PrivacyError("an embedding of a token is not finite, so there are no distances of tokens")
    if len(outputs) < 2:
        raise PrivacyError(f"{len(outputs)} token(s) may be drawn, and one alone hides nothing but is no text")
    return Vocabulary(embeddings - embeddings.mean(axis=0, dtype=np.float64).astype(np.float32), outputs)


def probabilities(distances: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """P(y | x) for distances [..., outputs]: exp(-epsilon/2 d), divided by its sum.

    Raises:
        PrivacyError: epsilon is not positive and finite.
    """
    _check(epsilon)
    weights = np.exp(-epsilon / 2 * (distances - distances.min(axis=-1, keepdims=True)))
    found: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return found


def perturbed(
    tokens: NDArray[np.int64], draws: NDArray[np.float64], space: Vocabulary, epsilon: float
) -> NDArray[np.int64]:
    """Each token drawn anew.

    The probabilities are added up from the smallest to the largest, so that each has its own digits: the float sums
    and draws change none by more than (number of outputs) x 1e-15 of it, far below any epsilon.

    Args:
        tokens: [n] of the private text.
        draws: [n] uniform, see `uniform`.

    Raises:
        PrivacyError: epsilon is not positive and finite.
    """
    _check(epsilon)
    found = np.empty_like(tokens)
    different, places = np.unique(tokens, return_inverse=True)
    for start in range(0, len(different), _BLOCK):
        chances = probabilities(space.distances(different[start : start + _BLOCK]), epsilon)
        for row, here in enumerate(chances):
            where = np.flatnonzero(places == start + row)
            order = np.argsort(here, kind="stable")
            below = np.cumsum(here[order])
            index = np.searchsorted(below, draws[where] * below[-1], side="right")
            found[where] = space.outputs[order[np.minimum(index, len(order) - 1)]]
    return found


def uniform(stream: SecretStream, count: int) -> NDArray[np.float64]:
    """[count] uniform numbers from 128 bits each: also the smallest have all their digits."""
    high, low = stream.words(2 * count).astype(np.float64).reshape(count, 2).T
    found: NDArray[np.float64] = np.minimum((high + low * 2.0**-64) * 2.0**-64, 1.0 - 2.0**-53)
    return found


def responded(truth: int, choices: int, draw: float, epsilon: float) -> int:
    """One of several public choices by randomised response (Warner, 1965; Kairouz et al., JMLR 2016): the true one with
    probability e^epsilon / (e^epsilon + choices - 1), each other with 1 / (...). No two truths are told apart by more
    than exp(epsilon).

    Args:
        draw: uniform in [0, 1).

    Raises:
        PrivacyError: epsilon is not positive and finite.
    """
    _check(epsilon)
    other = 1.0 / (np.exp(epsilon) + choices - 1)
    index = int(draw / other)  # the others come first, the truth has the rest
    return truth if index >= choices - 1 else index + (index >= truth)


def _at_unit_length(points: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = points.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    found: NDArray[np.float64] = wide / np.where(lengths > 0, lengths, 1.0)
    return found


def _check(epsilon: float) -> None:
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"an epsilon of {epsilon:g} per token is none: it must be above 0 and finite")
