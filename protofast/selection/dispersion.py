"""k-dispersion (Ravi, Rosenkrantz and Tayi 1994, "Heuristic and special case algorithms for dispersion problems")."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import AUTO, COSINE, MAX_MIN, OBJECTIVES, SQEUCLIDEAN
from .inputs import metric_number, number_to_choose, points_and_mask
from .result import Selection

SWEEPS = 10
"""Of swaps over all points chosen by max-sum, at most."""


class FarthestPair(NamedTuple):
    """Two points, ``i < j``, and their distance."""

    i: int
    j: int
    distance: float


def farthest_pair(
    points: Tensor | np.ndarray, *, metric: str = "euclidean", backend: str | None = None
) -> FarthestPair:
    """The two points farthest apart, exactly; of equal pairs the lexicographically first.

    Bounds discard most pairs, so the time is near-linear for most points in few dimensions. Where they cannot (many
    dimensions without structure) it is that of one blocked n × n product. Memory stays linear in n.

    Parameters
    ----------
    points : Tensor or array of shape (n, d), or (n, n) distances with ``metric="precomputed"``
        n ≥ 2; as in `k_center`.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
    backend : str, optional

    Returns
    -------
    FarthestPair
        ``(i, j, distance)``, Python numbers.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; with fewer than two points, or one that is not finite.

    Notes
    -----
    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> i, j, distance = pf.farthest_pair(torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 4.0]]))
    >>> i, j, distance
    (0, 2, 5.0)
    """
    number = metric_number(metric)
    points, _ = points_and_mask(points, number)
    if points.shape[0] < 2:
        raise ValueError(f"points has shape {tuple(points.shape)}; a pair needs at least two points")
    pair, distance = overload("farthest_pair", points.device.type, backend)(points, None, number)
    i, j = pair.tolist()
    return FarthestPair(i, j, distance.item())


def k_dispersion(
    points: Tensor | np.ndarray,
    k: int,
    *,
    objective: str = "max-min",
    metric: str = "euclidean",
    refine: bool = True,
    mask: Tensor | np.ndarray | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> Selection:
    """Chooses k points far from each other: greedy from the exact farthest pair, then swaps.

    Parameters
    ----------
    points : Tensor or array of shape (n, d), or (n, n) distances with ``metric="precomputed"``
        As in `k_center`.
    k : int
        From 1 to the number of allowed points.
    objective : {"max-min", "max-sum"}
        Make the smallest pairwise distance large (the order of `k_center` with ``start="farthest-pair"``), or the
        sum of them.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
    refine : bool, default True
        Swap chosen points for better ones afterwards, as long as the objective grows, up to a fixed number of
        swaps. Takes a few times as long as the greedy part; a swapped-in point stands at the position of the one
        that it replaced.
    mask : bool Tensor or array of shape (n,), optional
        Points that are False are as if absent.
    process_group : torch.distributed.ProcessGroup, optional
        As in `k_center`: each process calls with its own shard. max-min makes many choices to one exchange, max-sum
        and the swaps of `refine` take one for each.
    backend : str, optional

    Returns
    -------
    Selection
        ``objective`` is the smallest or the total pairwise distance; with k = 1, where there is no pair, infinity or
        0. ``bound`` is an upper bound on what any k points can have. For max-min: twice the covering radius of the
        first k − 1 greedy choices (four times for the squared metrics sqeuclidean and cosine), or the diameter if
        that is less. For max-sum: the smaller of the diameter times the number of pairs and a bound by detours over
        the middle of the chosen points. Precomputed distances must obey the triangle inequality for it.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    RuntimeError
        With `process_group`, when a rank ended or did not answer within the group's time-out.

    Notes
    -----
    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.0], [10.0]])
    >>> pf.k_dispersion(points, 3).indices
    tensor([0, 4, 2])
    """
    if process_group is not None:
        from . import distributed

        return distributed.k_dispersion(
            points,
            k,
            objective=objective,
            metric=metric,
            refine=refine,
            mask=mask,
            process_group=process_group,
            backend=backend,
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(map(repr, OBJECTIVES))}")
    number = metric_number(metric)
    points, mask = points_and_mask(points, number, mask)
    k = number_to_choose(k, points, mask)
    indices, value, bound = disperse(points, mask, k, OBJECTIVES.index(objective), number, refine, backend)
    radii, labels, distances = overload("cover", points.device.type, backend)(points, indices, mask, number)
    return Selection(indices, radii, labels, distances, value, bound)


def disperse(
    points: Tensor, mask: Tensor | None, k: int, objective: int, metric: int, refine: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`k_dispersion` of checked arguments: indices, objective and bound."""

    def run(op: str, *arguments: Any) -> Any:
        return overload(op, points.device.type, backend)(points, *arguments)

    if k == 1:  # no pair: any point is an optimum
        first = torch.zeros(1, dtype=torch.int64, device=points.device)
        value = points.new_full((), math.inf if objective == MAX_MIN else 0.0, dtype=torch.float64)
        return first if mask is None else mask.byte().argmax().reshape(1), value, value.clone()
    pair, diameter = run("farthest_pair", mask, metric)
    if objective == MAX_MIN:
        indices, radii, labels, distances = run("k_center", pair, mask, k, metric, AUTO)
        indices, value = run("max_min_swaps", indices, labels, distances, mask, metric, k if refine else 0)
        # Of k points two lie nearest to the same of k−1 centers with covering radius r, so at most 2r apart: squared
        # distances (2r)². The diameter bounds too.
        scale = 4 if metric in (SQEUCLIDEAN, COSINE) else 2
        return indices, value, torch.minimum(scale * radii[k - 2], diameter)
    indices, value, bound = run("max_sum", pair, mask, k, metric, SWEEPS if refine else 0)
    return indices, value, torch.minimum(diameter * (k * (k - 1) / 2), bound)
