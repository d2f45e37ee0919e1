"""Representatives of a group: which features to compare, and which algorithm chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..selection import Selection, k_center, k_dispersion, k_medoids
from .result import Representatives

ALGORITHMS = ("k-center", "k-dispersion", "k-medoids")
FEATURES = ("criteria", "pixels", "latents")
METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan")

PAPER_CODE = {"discovery": "k-medoids", "metric": "manhattan", "features": "pixels"}
"""What the public code runs under the name k-center: ``explain(model, anchors, **PAPER_CODE)``."""

MEDOIDS_FROM = 20_000
"""Members that k-medoids looks at, which takes time in their square; of a larger group, as many at random (CLARA)."""

ALIKE = 0.01
"""Representatives look alike when their smallest distance is under this share of their largest."""


def standardised(criteria: Mapping[str, np.ndarray]) -> np.ndarray:
    """Criteria as features (n, number of criteria) float64: mean 0 and deviation 1 over all anchors."""
    table = np.stack(list(criteria.values()), 1)
    mean, deviation = table.mean(0), table.std(0)
    table -= mean
    table /= np.where(deviation > 0, deviation, 1)
    return table


def choose(
    group: str,
    members: np.ndarray,
    points: np.ndarray,
    *,
    algorithm: str,
    features: str,
    metric: str,
    k: int,
    seed: int,
) -> tuple[Representatives, list[str]]:
    """Representatives of one group, and what there is to say about them.

    Parameters
    ----------
    group : str
    members : ndarray (m,) of int
        Anchor numbers, m ≥ 1.
    points : ndarray (m, d)
        Features of the members. With `k` over m, all members are chosen.
    algorithm : {"k-center", "k-dispersion", "k-medoids"}
    features : str
        Name of the features, for the record.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan"}
    k, seed : int
        k-center starts at the point nearest to the mean, k-medoids at random points of `seed`.
    """
    remarks = []
    if k > len(members):
        count = "1 anchor" if len(members) == 1 else f"{len(members)} anchors"
        remarks.append(f"{group} has {count}, fewer than k = {k}: {algorithm} shows the whole group.")
        k = len(members)
    rows = torch.from_numpy(points)
    if algorithm == "k-center":
        found = k_center(rows, k, metric=metric, start="center")
    elif algorithm == "k-dispersion":
        found = k_dispersion(rows, k, metric=metric)
    else:
        found = _medoids(rows, k, metric, seed)
        if len(rows) > MEDOIDS_FROM:
            remarks.append(
                f"{group} has {len(rows):,} anchors: k-medoids chose among {max(k, MEDOIDS_FROM):,} of them, drawn at "
                "random, and every anchor counts for the nearest."
            )
    indices = found.indices.cpu()
    # Medoids of one dense region may well be alike, and a group shown whole has no other choice.
    if algorithm != "k-medoids" and 1 < k < len(members) and _alike(rows[indices], metric):
        remarks.append(
            f"The {algorithm} representatives of {group} look alike: on {features} with the {metric} metric the "
            "nearest two are under 1 % of the farthest two apart. These features do not tell the anchors apart, or one "
            "outlier dwarfs the rest."
        )
    bound = None if found.bound is None else float(found.bound)
    chosen = members[indices.numpy()].tolist()
    labels = found.labels.cpu().numpy().astype(np.int64)
    return Representatives(group, algorithm, features, metric, chosen, float(found.objective), bound, labels), remarks


def _medoids(rows: Tensor, k: int, metric: str, seed: int) -> Selection:
    """k-medoids of all rows, or of a random part of many (Kaufman and Rousseeuw 1990), with all rows assigned."""
    generator = torch.Generator().manual_seed(seed)
    if len(rows) <= MEDOIDS_FROM:
        return k_medoids(rows, k, metric=metric, start=generator)
    drawn = torch.randperm(len(rows), generator=generator)[: max(k, MEDOIDS_FROM)].sort().values
    medoids = drawn[k_medoids(rows[drawn], k, metric=metric, start=generator).indices]
    cover = k_center(rows, k, metric=metric, initial=medoids)  # nothing is left to choose
    return replace(cover, objective=cover.distances.sum(), bound=torch.full_like(cover.bound, math.nan))


def _alike(points: Tensor, metric: str) -> bool:
    points = points.double()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points)
    pairs = torch.nn.functional.pdist(points, p=1.0 if metric == "manhattan" else 2.0)
    return bool(pairs.min() <= ALIKE * pairs.max())
