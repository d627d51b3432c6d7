"""One row for each group of like rows, over all silos (after FedHDS: Qin et al., arXiv 2410.10926).

In the silo: a row is described by the hidden states of its last token after every layer; HDBSCAN finds groups of like
rows; their centroids go to the coordinator. There: HDBSCAN finds groups of like centroids and chooses in each the one
nearest its middle. In the silo again: of each group whose centroid was chosen, the row nearest the centroid is trained
on. The paper keeps less than 1.5 % of the rows so.

What differs: the paper takes t-SNE to two dimensions, which each silo does for itself, so that centroids of two silos
have no common map. Here all silos share one keyed Gaussian projection of the layers' states, each of unit length, which
keeps distances approximately (Johnson and Lindenstrauss, 1984). Rows that HDBSCAN leaves in no group are not used; a
silo where it finds no group is one group; a centroid without neighbours at the coordinator stands for itself.

What it costs: a centroid tells where the mean of at least `min_group` rows lies in the model's states. That is less
than a row, and more than nothing; see `docs/lifecycle.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import MissingExtra
from fedlm.randomness import torch_generator
from fedlm.training.encode import TokenSet
from fedlm.training.forward import by_tokens, model_device, precision

Points = NDArray[np.float64]


@torch.no_grad()
def features(model: Any, tokens: TokenSet, dimensions: int, *, seed: int, batch_tokens: int) -> Points:
    """A description of every example [n, dimensions]: its last token's states after each layer, projected.

    Args:
        seed: the run's, which all silos share: it draws the projection.
    """
    device, training = model_device(model), model.training
    lasts = [example.sequences[-1] for example in tokens]
    found = torch.zeros(len(lasts), dimensions, dtype=torch.float64)
    model.eval()
    try:
        with precision(model):
            for run in by_tokens([len(s) for s in lasts], batch_tokens):
                longest = max(len(lasts[i]) for i in run)
                ids = torch.zeros(len(run), longest, dtype=torch.long)
                for row, i in enumerate(run):
                    ids[row, : len(lasts[i])] = torch.from_numpy(np.asarray(lasts[i].ids, np.int64))
                mask = torch.tensor([[k < len(lasts[i]) for k in range(longest)] for i in run], device=device)
                # what follows a row's last token is never looked at: attention is causal
                states = model(
                    input_ids=ids.to(device), attention_mask=mask.long(), use_cache=False, output_hidden_states=True,
                    logits_to_keep=1,
                ).hidden_states  # fmt: skip
                at = torch.tensor([len(lasts[i]) - 1 for i in run], device=device)
                rows = torch.arange(len(run), device=device)
                for layer, state in enumerate(states):
                    unit = torch.nn.functional.normalize(state[rows, at].float(), dim=1).double().cpu()
                    generator = torch_generator(seed, "fedhds", layer)
                    plane = torch.randn(unit.shape[1], dimensions, generator=generator, dtype=torch.float64)
                    found[run] += unit @ plane / (dimensions * len(states)) ** 0.5
    finally:
        model.train(training)
    return found.numpy()


def groups_of(points: Points, min_group: int) -> list[NDArray[np.int64]]:
    """Groups of like rows, as indices; rows that lie apart are in none; without groups all rows are one."""
    found: list[NDArray[np.int64]] = []
    if len(points) >= 2 * min_group:
        labels = _hdbscan(points, min_group)
        found = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return found or [np.arange(len(points))]


def centroids_of(points: Points, groups: list[NDArray[np.int64]]) -> Points:
    """The mean of each group [groups, dimensions]."""
    return np.stack([points[group].mean(axis=0) for group in groups])


def nearest_rows(points: Points, groups: list[NDArray[np.int64]], chosen: list[int]) -> NDArray[np.int64]:
    """Of each chosen group the row nearest its centroid, as sorted indices."""
    middles = centroids_of(points, groups)
    rows = [groups[g][np.argmin(((points[groups[g]] - middles[g]) ** 2).sum(axis=1))] for g in chosen]
    return np.sort(np.array(rows, dtype=np.int64))


def choose(centroids: Mapping[str, Points]) -> dict[str, list[int]]:
    """By silo, the groups that stand for all: of each group of like centroids the one nearest its middle (the first of
    equals in the order of names); a centroid that is like no other stands for itself."""
    owners = [(silo, number) for silo in sorted(centroids) for number in range(len(centroids[silo]))]
    points = np.concatenate([centroids[silo] for silo in sorted(centroids)])
    labels = _hdbscan(points, 2) if len(points) >= 4 else np.full(len(points), -1)
    kept = np.flatnonzero(labels < 0).tolist()
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        middle = points[members].mean(axis=0)
        kept.append(int(members[np.argmin(((points[members] - middle) ** 2).sum(axis=1))]))
    chosen: dict[str, list[int]] = {silo: [] for silo in sorted(centroids)}
    for silo, number in (owners[i] for i in sorted(kept)):
        chosen[silo].append(number)
    return chosen


def require_clustering() -> None:
    """Raise MissingExtra where scikit-learn is not installed."""
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError:
        raise MissingExtra("selection by groups of rows (fedhds)", "selection") from None


def _hdbscan(points: Points, least: int) -> NDArray[np.int64]:
    """The number of each point's cluster, -1 for none (Campello et al., PAKDD 2013)."""
    require_clustering()
    from sklearn.cluster import HDBSCAN

    labels: NDArray[np.int64] = HDBSCAN(min_cluster_size=least, copy=True).fit_predict(points)
    return labels
