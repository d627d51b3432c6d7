"""The coordinator's part of public rows beside the silos' own: centres in, numbers of chosen centres out, once a run.

`coverage.json` in the run directory holds by silo which of its centres were chosen, and how many it has; a resumed run
reads it. A silo that gave no centres, since it has few rows or failed to answer, trains on its own rows alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fedlm.errors import RunError, UpdateRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.representatives import bounded, profiles
from fedlm.files import read_json, write_json
from fedlm.messages import Reply
from fedlm.recipe.augment import AugmentSpec

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations


def choose_centres(silos: Conversations) -> None:
    """Ask all silos that train for centres of their rows and choose among them; nothing without public rows.

    Raises:
        RunError: fewer silos answer than the quorum, or coverage.json is damaged.
    """
    spec = silos.recipe.data.augment
    if spec is None:
        return
    file = silos.dir.path / "coverage.json"
    if not file.exists():
        found = _asked(silos, spec)
        with disk_errors(file):
            write_json(file, found)
    try:
        held: dict[str, Any] = read_json(file)
        numbers = {silo: [int(number) for number in entry["chosen"]] for silo, entry in held.items()}
        of = sum(int(entry["centres"]) for entry in held.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            "coverage.json is damaged", where=str(file), fix="remove it: --resume then asks the silos again"
        ) from None
    silos.chosen = {silo: chosen for silo, chosen in numbers.items() if chosen}
    many = sum(map(len, silos.chosen.values()))
    silos.phase(f"{len(silos.chosen)} silos take {spec.rows} public rows each, near {many} of {of} centres")


def _asked(silos: Conversations, spec: AugmentSpec) -> dict[str, Any]:
    from fedlm.training.selection import coverage

    centres, failures = profiles(silos, lambda reply, rows: checked(reply, spec, rows))
    chosen = coverage.choose_centres(centres, spec.centres)
    missing: dict[str, Any] = {failure.silo: {"chosen": [], "centres": 0} for failure in failures}
    return {**missing, **{name: {"chosen": chosen[name], "centres": len(centres[name])} for name in chosen}}


def checked(reply: Reply, spec: AugmentSpec, rows: int) -> torch.Tensor:
    """A silo's centres [groups, dimensions]: finite, fp32, of unit length, no more than its rows make groups of.

    Raises:
        UpdateRefused: they are none.
    """
    found = bounded(reply, 0, min(spec.clusters, rows // spec.min_group), spec.dimensions)
    if not torch.allclose(found.norm(dim=1), torch.ones(len(found)), atol=1e-4):
        raise UpdateRefused("a centre has not unit length", where=reply.silo)
    return found
