"""Greedy k-center (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance")."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import COSINE, SQEUCLIDEAN
from .inputs import index_list, metric_number, number_to_choose, points_and_mask
from .result import Selection


def k_center(
    points: Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "euclidean",
    start: int | str | torch.Generator = 0,
    initial: Tensor | np.ndarray | Sequence[int] | None = None,
    mask: Tensor | np.ndarray | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> Selection:
    """Chooses k points so that the largest distance to the nearest chosen one is small: farthest-first traversal.

    Each choice is the point farthest from those chosen so far, the lowest index among equals, decided by float64
    distances taken by differences. The covering radius is at most twice the least possible one, and `bound` proves
    it. Copies of a chosen point are chosen only when no other point is left; no index is chosen twice.

    Parameters
    ----------
    points : Tensor or array of shape (n, d), or (n, n) distances with ``metric="precomputed"``
        Any real dtype and strides; integers are taken as float64, floating-point input is read in tiles and never
        copied whole. Distances given must be symmetric with a zero diagonal (row c is read for the distances to c).
    k : int
        How many to choose, from 1 to the number of allowed points; counts `initial`.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
        cosine is 1 − cos; a zero vector is at 0 from another zero vector and at 1 from everything else.
    start : int, "farthest-pair", "center" or torch.Generator, default 0
        The first choice: an index, the two points farthest apart (the lower index alone for k = 1), the point
        nearest to the mean of the allowed points (with ``"precomputed"``, that of least sum of squared distances),
        or a random allowed point.
    initial : integer Tensor, array or sequence of shape (m,), optional
        Distinct indices chosen already, m ≤ k. They come first in the result, and `start` is not looked at.
    mask : bool Tensor or array of shape (n,), optional
        Points that are False are never chosen and need no cover, as if absent; their rows may hold anything.
    process_group : None
        Points spread over processes are not supported yet.
    backend : str, optional

    Returns
    -------
    Selection
        ``objective`` is the covering radius. ``bound`` is a lower bound on the least covering radius that k points
        (with `initial` among them, where given) can have: half the objective, for the squared metrics sqeuclidean
        and cosine a quarter. It holds for precomputed distances that obey the triangle inequality.

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument. A NaN or infinite coordinate is refused, with its row.
    NotImplementedError
        When `process_group` is given.

    Notes
    -----
    n·k·d operations; memory n + k·d beside the points and a tile. Under ``torch.compile`` values are not checked.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.0], [10.0]])
    >>> chosen = pf.k_center(points, 3)
    >>> chosen.indices
    tensor([0, 4, 2])
    >>> f"{chosen.objective:g}, the optimum is at least {chosen.bound:g}"
    '1, the optimum is at least 0.5'
    """
    if process_group is not None:
        raise NotImplementedError(
            "process_group was given, but points spread over processes come with a later release; leave it None and "
            "pass all points"
        )
    number = metric_number(metric)
    points, mask = points_and_mask(points, number, mask)
    k = number_to_choose(k, points, mask)
    if initial is not None and (isinstance(initial, int) or len(initial)):
        first = index_list("initial", initial, k, points, mask)
    else:
        first = _first(points, mask, start, k, number, backend)
    run = overload("k_center", points.device.type, backend)
    indices, radii, labels, distances = run(points, first, mask, k, number)
    objective = radii[-1]
    # With radius r, the k−m choices after the m initial ones and the point farthest from all are k−m+1 points at
    # least r apart and at least r from the initial ones. If all lay within less than r/2 of a center, no initial one
    # could serve them, so two would share one of the k−m free centers and be less than r apart: no. (m = 0 or 1: the
    # same for k+1 points.) The metric √sqeuclidean = √(2 cosine) makes r/2 a quarter of r.
    return Selection(
        indices, radii, labels, distances, objective, objective / (4 if number in (SQEUCLIDEAN, COSINE) else 2)
    )


def _first(
    points: Tensor, mask: Tensor | None, start: int | str | torch.Generator, k: int, metric: int, backend: str | None
) -> Tensor:
    device = points.device
    if isinstance(start, str):
        if start == "center":
            return overload("nearest_to_mean", device.type, backend)(points, mask, metric)
        if start == "farthest-pair":
            return overload("farthest_pair", device.type, backend)(points, mask, metric)[0][:k]
        raise ValueError(f"start is {start!r}; give an index, 'farthest-pair', 'center' or a torch.Generator")
    if isinstance(start, torch.Generator):
        allowed = points.shape[0] if mask is None else int(mask.sum())
        one = torch.randint(allowed, (1,), generator=start, device=start.device).to(device)
        return one if mask is None else mask.nonzero().squeeze(1)[one]
    try:
        start = operator.index(start)
    except TypeError:
        raise TypeError(f"start is {start!r}; give an index, 'farthest-pair', 'center' or a torch.Generator") from None
    if not 0 <= start < points.shape[0]:
        raise IndexError(f"start is {start}; points has 0 to {points.shape[0] - 1}")
    if mask is not None and not torch.compiler.is_compiling() and not bool(mask[start]):
        raise ValueError(f"start is {start}, which mask leaves out; give an allowed index, or start='center'")
    return torch.full((1,), start, dtype=torch.int64, device=device)
