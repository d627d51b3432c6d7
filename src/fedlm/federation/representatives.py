"""The coordinator's part of a selection by groups of rows: centroids in, the numbers of chosen groups out, once a run.

`selection.json` in the run directory holds by silo which of its groups were chosen, and how many it has; a resumed run
reads it. Silos of which no group was chosen are not sampled: what they hold is like what others hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import RunError, UpdateRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.records import reasons
from fedlm.federation.sampling import quorum
from fedlm.files import read_json, write_json
from fedlm.messages import Failure, FailureKind, Reply
from fedlm.recipe.selection import SelectionSpec

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations


def choose_rows(silos: Conversations) -> None:
    """Ask all silos that train for their centroids and choose among them; nothing where the recipe selects otherwise.

    Raises:
        RunError: fewer silos answer than the quorum, or selection.json is damaged.
        MissingExtra: scikit-learn is not installed here.
    """
    spec = silos.recipe.data.selection
    if spec is None or spec.method != "fedhds":
        return
    file = silos.dir.path / "selection.json"
    if not file.exists():
        chosen = _asked(silos, spec)
        with disk_errors(file):
            write_json(file, chosen)
    try:
        held: dict[str, Any] = read_json(file)
        numbers = {silo: [int(g) for g in entry["chosen"]] for silo, entry in held.items()}
        groups = sum(int(entry["groups"]) for entry in held.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            "selection.json is damaged", where=str(file), fix="remove it: --resume then asks the silos again"
        ) from None
    silos.chosen = {silo: found for silo, found in numbers.items() if found}
    silos.enrolled.rest({silo for silo, found in numbers.items() if not found})
    rows = sum(map(len, numbers.values()))
    silos.phase(f"{rows} rows stand for {groups} groups of rows in {len(numbers)} silos")


def _asked(silos: Conversations, spec: SelectionSpec) -> dict[str, Any]:
    from fedlm.training.selection.representatives import choose, require_clustering

    require_clustering()
    centroids, failures = profiles(silos, lambda reply, rows: checked(reply, spec, rows))
    chosen = choose(centroids)
    missing: dict[str, Any] = {f.silo: {"chosen": [], "groups": 0} for f in failures}
    return {**missing, **{name: {"chosen": chosen[name], "groups": len(centroids[name])} for name in chosen}}


def profiles(
    silos: Conversations, check: Callable[[Reply, int], torch.Tensor]
) -> tuple[dict[str, NDArray[np.float64]], list[Failure]]:
    """Where groups of rows lie in each silo that trains, [groups, dimensions], and who did not say so.

    Args:
        check: gives what a silo sent, or raises UpdateRefused; also gets its number of training rows.

    Raises:
        RunError: fewer silos answer than the quorum.
    """
    silos.phase("asking the silos where groups of their rows lie")
    trainers = silos.enrolled.trainers
    centroids: dict[str, NDArray[np.float64]] = {}
    failures: list[Failure] = []
    requests = (silos.request(name, "profile", -1, {}, {}) for name in trainers)
    for answer in silos.engine.exchange(requests, silos.spec.deadline):
        if isinstance(answer, Reply):
            try:
                rows = silos.enrolled.training_rows[answer.silo]
                centroids[answer.silo] = check(answer, rows).double().numpy()
                continue
            except UpdateRefused as refusal:
                answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.what)
        failures.append(answer)
        silos.failed(-1, answer)
    needed = quorum(silos.spec, len(trainers))
    if len(centroids) < needed:
        raise RunError(
            f"only {len(centroids)} of {len(trainers)} silos said where groups of their rows lie, the quorum is "
            f"{needed}: {reasons(failures)}",
            where=str(silos.dir.path),
            fix="mend the silos (their policies must allow the verb 'profile') and continue with --resume",
        )
    return centroids, failures


def checked(reply: Reply, spec: SelectionSpec, rows: int) -> torch.Tensor:
    """A silo's centroids [groups, dimensions]: finite, fp32, no more than its rows make groups of.

    Raises:
        UpdateRefused: they are none.
    """
    return bounded(reply, 1, max(1, rows // spec.min_group), spec.dimensions)


def bounded(reply: Reply, least: int, most: int, dimensions: int) -> torch.Tensor:
    """What a silo sent [groups, dimensions]: finite, fp32, `least` to `most` groups.

    Raises:
        UpdateRefused: it is none.
    """
    found = reply.tensors.get("centroids")
    if found is None or len(reply.tensors) != 1 or found.dtype != torch.float32 or found.ndim != 2:
        raise UpdateRefused("the reply has no centroids", where=reply.silo)
    if not least <= found.shape[0] <= most or found.shape[1] != dimensions:
        raise UpdateRefused(
            f"the reply's centroids have the shape {tuple(found.shape)}, not of {least} to {most} groups and "
            f"{dimensions} dimensions",
            where=reply.silo,
        )
    if not bool(torch.isfinite(found).all()):
        raise UpdateRefused("a centroid is not finite", where=reply.silo)
    return found
