"""What has left a silo, and how often it has trained: what its owner limits by the round and by the day.

One file, `_spent.json` in the silo's private folder, that outlives restarts. A request is known by the digest of all
that it says, so that a repeat counts once and the same round with other content counts again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo.policy import Policy
from fedlm.federation.silo.refusals import Forbidden
from fedlm.federation.silo.state import request_digest, request_key
from fedlm.files import write_json
from fedlm.guards import get_chain
from fedlm.messages import Fields, Reply, Request
from fedlm.recipe.methods import FACTORS
from fedlm.recipe.schema import Recipe

FILE = "_spent.json"
"""No run's name begins with '_'."""

ROUNDS_HELD = 1000
"""Rounds whose bytes are remembered, over all runs; the oldest are forgotten first."""

COARSE = 1024
"""Bytes of fields are counted in such steps: their exact number would tell how many digits a count has."""


class Spent:
    """What one silo has spent of what its policy limits.

    Args:
        folder: the silo's private folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def train(self, policy: Policy, request: Request, today: date) -> None:
        """Count a training, before it begins: a request that is killed on the way has been asked for all the same.

        Raises:
            Forbidden: the day's trainings are used up.
            RunError: the file is damaged or cannot be written.
        """
        if policy.max_rounds_per_day is None or request.verb != "train":
            return
        found, key = self._load(), _known_by(request)
        trained = found["trained"] if found["day"] == today.isoformat() else []
        if key in trained:
            return
        if len(trained) >= policy.max_rounds_per_day:
            raise Forbidden(
                f"this silo has trained {policy.max_rounds_per_day} times today, which is all that its policy allows "
                f"(max_rounds_per_day); the next day of {policy.timezone} begins at midnight there",
                "max_rounds_per_day",
            )
        self._save({**found, "day": today.isoformat(), "trained": [*trained, key]})

    def agree(self, policy: Policy, run: str, epsilon: float | None, today: date) -> None:
        """Count the whole budget of a run that the silo agrees to. Epsilons of runs on the same rows add up (Dwork and
        Roth, 2014, theorem 3.16), and so do their deltas.

        Raises:
            Forbidden: with it, more would be spent in this month or year than the policy allows.
            RunError: the file is damaged or cannot be written.
        """
        if epsilon is None:
            return
        found = self._load()
        limit, period = policy.privacy.max_epsilon, policy.privacy.per
        begins = {"run": "9999", "month": f"{today:%Y-%m}", "year": f"{today:%Y}"}[period]
        others = [told for name, told in found["agreed"].items() if name != run and told["day"].startswith(begins)]
        before = sum(told["epsilon"] for told in others)
        if limit is not None and before + epsilon > limit:
            raise Forbidden(
                f"this silo's policy allows an epsilon of {limit:g} per {period} (privacy.max_epsilon); runs that it "
                f"agreed to in this {period} may spend {before:g} of it, and this one another {epsilon:g}",
                "privacy.max_epsilon",
            )
        if run not in found["agreed"]:
            agreed = {**found["agreed"], run: {"epsilon": epsilon, "day": today.isoformat()}}
            self._save({**found, "agreed": agreed})

    def leave(self, policy: Policy, request: Request, reply: Reply) -> None:
        """Count what is about to leave.

        Raises:
            Forbidden: with it, more would have left in this round than the policy allows.
            RunError: the file is damaged or cannot be written.
        """
        most = policy.max_bytes_per_round
        if most is None:
            return
        found, key = self._load(), _known_by(request)
        rounds = {name: left for name, left in found["left"].items() if name != _round(request)}
        left = {**found["left"].get(_round(request), {}), key: bytes_of(reply.tensors, reply.fields)}
        if sum(left.values()) > most:
            raise Forbidden(
                f"with this answer more bytes would leave in this round than this silo's policy allows "
                f"(max_bytes_per_round: {most})",
                "max_bytes_per_round",
            )
        kept = dict(list(rounds.items())[-ROUNDS_HELD + 1 :])
        self._save({**found, "left": {**kept, _round(request): left}})

    def _load(self) -> dict[str, Any]:
        """Raises RunError: the file is damaged, so nobody knows what was spent."""
        try:
            found = json.loads(self._file.read_bytes())
            found.setdefault("agreed", {})  # of before there were budgets
            words, numbers = found["trained"], [n for left in found["left"].values() for n in left.values()]
            if found.keys() != {"day", "trained", "left", "agreed"} or not isinstance(words, list):
                raise ValueError
            days = [told["day"] for told in found["agreed"].values()]
            if not all(isinstance(word, str) for word in [found["day"], *words, *days]):
                raise ValueError
            if not all(0 <= told["epsilon"] < math.inf for told in found["agreed"].values()):
                raise ValueError
            if not all(type(number) is int and number >= 0 for number in numbers):  # NaN is above no limit
                raise ValueError
        except FileNotFoundError:
            return {"day": "", "trained": [], "left": {}, "agreed": {}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RunError(
                "the count of what this silo has spent is damaged or cannot be read",
                where=str(self._file),
                fix="remove the file once it is clear why; counting then begins anew",
            ) from None
        return dict(found)

    def _save(self, found: Fields) -> None:
        with disk_errors(self._file, "silo's state"):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self._file, found)
            self._file.chmod(0o600)


def bytes_of(tensors: Mapping[str, Tensor], fields: Fields) -> int:
    """Bytes of a message's tensors, and of its fields in steps of `COARSE`."""
    words = len(json.dumps(fields).encode())
    return sum(t.numel() * t.element_size() for t in tensors.values()) + -(-words // COARSE) * COARSE


def check_bytes(policy: Policy, recipe: Recipe) -> None:
    """Forbidden where an update of this recipe is known to be larger than what may leave in a round.

    Raises:
        Forbidden: see there.
        ModelError: the model's shapes cannot be found.
    """
    most = policy.max_bytes_per_round
    size = None if most is None else update_bytes(recipe)
    if most is not None and size is not None and size > most:
        raise Forbidden(
            f"an update of this recipe has {size} bytes, and this silo's policy lets {most} leave in a round "
            "(max_bytes_per_round)",
            "max_bytes_per_round",
        )


def update_bytes(recipe: Recipe) -> int | None:
    """Bytes of an update's numbers in the first round, from shapes alone; None for adapters other than LoRA's and IA3,
    and for methods that send something else than parameters.

    Raises:
        ModelError: the model's shapes cannot be found.
    """
    from fedlm.algorithms import get_algorithm
    from fedlm.algorithms.base import Algorithm, Place
    from fedlm.models.adapters import skeleton, trainable

    algorithm = get_algorithm(recipe.federation.algorithm, recipe.adapter)
    plain = type(algorithm).expected_update is Algorithm.expected_update
    if recipe.adapter.kind not in ("ia3", *FACTORS) or not plain:
        return None
    values = {n: p.detach() for n, p in trainable(skeleton(recipe)).items() if algorithm.trainable(n)}
    place = Place("", 0, recipe.federation.rounds, recipe.seed, recipe.adapter.rank)
    shapes = algorithm.expected_update(values, place)
    chain = get_chain(recipe.guards)
    if chain is None:
        return sum(4 * shape.numel() for shape in shapes.values())
    return sum(dtype.itemsize * length for dtype, length in chain.parts(shapes).values())


def _round(request: Request) -> str:
    return f"{request.run}/{request.round}"


def _known_by(request: Request) -> str:
    return hashlib.sha256(f"{request_key(request)}\x1f{request_digest(request)}".encode()).hexdigest()[:32]
