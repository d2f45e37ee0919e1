"""Selections of points that lie on the ranks of a process group: the choices of one process that holds them all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._ops.selection import COSINE, ENGINES, MANHATTAN, OBJECTIVES, SQEUCLIDEAN
from ..result import Selection
from . import dispersion
from .greedy import cover, first_points, greedy
from .pair import farthest_pair
from .shards import Shards


def k_center(
    points: Any,
    k: int,
    *,
    metric: str,
    start: Any,
    initial: Any,
    mask: Any,
    lengths: Any,
    engine: str,
    process_group: Any,
    backend: str | None,
) -> Selection:
    """`protofast.k_center` with ``process_group``: the same indices, radii, objective and bound on every rank."""
    asked = {"k": k, "start": start, "initial": initial, "lengths": lengths, "engine": engine}
    shards = Shards(points, mask, metric, process_group, backend, asked)
    if engine not in ENGINES:  # of which this is the pool
        raise ValueError(f"engine is {engine!r}; choose one of {', '.join(map(repr, ENGINES))}")
    if lengths is not None:
        raise ValueError("lengths is for clouds (B, n, d), and process_group for one that is spread; give a mask")
    k = shards.number_to_choose(k)
    found = greedy(shards, first_points(shards, start, initial, k), k)
    radii = shards.distance(found.radii)
    objective = radii[-1]
    return Selection(
        found.indices,
        radii,
        found.labels,
        shards.distance(found.values),
        objective,
        objective / (4 if shards.metric in (SQEUCLIDEAN, COSINE) else 2),
    )


def k_dispersion(
    points: Any,
    k: int,
    *,
    objective: str,
    metric: str,
    refine: bool,
    mask: Any,
    process_group: Any,
    backend: str | None,
) -> Selection:
    """`protofast.k_dispersion` with ``process_group``: the same indices, objective and bound on every rank."""
    asked = {"k": k, "objective": objective, "refine": bool(refine)}
    shards = Shards(points, mask, metric, process_group, backend, asked)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    k = shards.number_to_choose(k)
    if k == 1:  # no pair: any point is an optimum
        values = torch.where(shards.allowed, 0.0, -torch.inf).double()
        found = shards.best("fetching the first point", values)
        assert found is not None
        value = values.new_tensor(math.inf if objective == "max-min" else 0.0)
        return _covered(shards, found.indices, found.x, value, value.clone())
    pair, diameter = farthest_pair(shards)
    if objective == "max-sum":
        return _covered(shards, *dispersion.max_sum(shards, pair, diameter, k, refine))
    start = greedy(shards, pair, k)
    # See the reference: of k points two lie nearest to the same of k−1 centers.
    scale = 2 if shards.metric == MANHATTAN else 4
    bound = shards.distance((scale * start.radii[k - 2]).clamp(max=diameter))
    index, x, smallest = start.indices, start.x, start.picked[2:].amin() if k > 2 else start.radii.new_tensor(diameter)
    if refine and 2 < k < shards.total:
        index, x, smallest = dispersion.refine_min(shards, index, x)
    return _covered(shards, index, x, shards.distance(smallest), bound)


def _covered(shards: Shards, index: Tensor, x: Tensor, objective: Tensor, bound: Tensor) -> Selection:
    radii, labels, values = cover(shards, x)
    return Selection(index, shards.distance(radii), labels, shards.distance(values), objective, bound)


__all__ = ["k_center", "k_dispersion"]
