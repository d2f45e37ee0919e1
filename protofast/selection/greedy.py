"""Greedy k-center (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance")."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import COSINE, ENGINES, PRECOMPUTED, SQEUCLIDEAN
from .clouds import Starts, k_center_of_clouds
from .inputs import check_values, given, index_list, metric_number, number_to_choose, points_and_mask, tensor
from .refine import refined
from .result import Selection


def k_center(
    points: Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "euclidean",
    start: Starts = 0,
    initial: Tensor | np.ndarray | Sequence[Any] | None = None,
    mask: Tensor | np.ndarray | None = None,
    lengths: Tensor | np.ndarray | Sequence[int] | None = None,
    refine: bool = False,
    engine: str = "auto",
    assign: bool = True,
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
        Or several clouds, (B, n, d): see Notes. Any real dtype and strides; integers are taken as float64,
        floating-point input is read in tiles and never copied whole. Distances given must be symmetric with a zero
        diagonal (row c is read for the distances to c).
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
    lengths : integer Tensor, array or sequence of shape (B,), optional
        Of several clouds: how many points each has. The rows after them are padding, and may hold anything. Given with
        `mask`, both must allow a point.
    refine : bool, default False
        Swap centers afterwards so that the covering radius becomes smaller: a center goes, and another covers the
        farthest point. `initial` stays, and what else stays keeps its place. Up to
        3000 allowed points a search on all n² distances, which often finds the optimum; beyond, swaps as long as
        one of those tried helps. The work is bounded and counted, never timed: for few points n·k / 4 swaps in a row
        without success (16 to 1000), for many about 5·n·(k + 16) distances. The result depends on nothing but the
        input.
    engine : {"auto", "plain", "boxes", "pool"}, default "auto"
        How, never what: all give the same result, and "auto" takes the one that should be the fastest here. "plain"
        measures every point against every choice, "boxes" leaves out groups of near points that a choice is too far
        from (few dimensions), "pool" chooses among the farthest points alone until one of the others could be farther
        (many dimensions). A backend that lacks an engine runs its own.
    assign : bool, default True
        Find the nearest choice of every point. False leaves `labels` and `distances` empty (0,), as only the choices
        are wanted: several times faster for many points in many dimensions. (`refine` and `process_group` find them
        all the same.)
    process_group : torch.distributed.ProcessGroup, optional
        Each process of the group calls with its own shard of the points (n may differ, or be 0) and of the mask, and
        with the same other arguments. Indices, those given too, count the points of all ranks, one rank after the
        other. The choices are those of one process that holds all points: every rank returns the same `indices`,
        `radii`, `objective` and `bound`, and `labels` and `distances` of its shard. Many choices cost one exchange.
    backend : str, optional

    Returns
    -------
    Selection
        ``objective`` is the covering radius. ``bound`` is a lower bound on the least covering radius that k points
        (with `initial` among them, where given) can have: half the greedy objective, for the squared metrics
        sqeuclidean and cosine a quarter. It holds for precomputed distances that obey the triangle inequality.

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument. A NaN or infinite coordinate is refused, with its row.
    RuntimeError
        With `process_group`, when a rank ended or did not answer within the group's time-out. What is wrong with the
        arguments of one rank is raised on all, with its number.

    Notes
    -----
    n·k·d operations; memory n + k·d beside the points and a tile. Under ``torch.compile`` values are not checked.

    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    Of points (B, n, d) each cloud is treated as if alone, and every field of the result has a leading B. `start` is
    one index for all, a tensor (B,) of one each, a name, or a generator; `initial` is (B, m) and `mask` (B, n). k is
    the same for all: of a cloud with fewer points the rest of `indices` is −1 and of `radii` 0.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.0], [10.0]])
    >>> chosen = pf.k_center(points, 3)
    >>> chosen.indices
    tensor([0, 4, 2])
    >>> f"{chosen.objective:g}, the optimum is at least {chosen.bound:g}"
    '1, the optimum is at least 0.5'
    >>> pf.k_center(torch.stack([points, points]), 3, lengths=[5, 2]).indices
    tensor([[ 0,  4,  2],
            [ 0,  1, -1]])
    """
    if process_group is not None:
        if refine:
            raise ValueError("refine is True, and points spread over processes have no refinement; leave it False")
        from . import distributed

        return distributed.k_center(
            points,
            k,
            metric=metric,
            start=start,
            initial=initial,
            mask=mask,
            lengths=lengths,
            engine=engine,
            process_group=process_group,
            backend=backend,
        )
    number = metric_number(metric)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; choose one of {', '.join(map(repr, ENGINES))}")
    points = tensor("points", points)
    if points.ndim == 3:
        return k_center_of_clouds(
            points,
            k,
            number,
            start=start,
            initial=initial,
            mask=mask,
            lengths=lengths,
            refine=refine,
            engine=engine,
            assign=bool(assign),
            backend=backend,
        )
    if lengths is not None:
        raise ValueError(f"lengths is for clouds (B, n, d), and points has shape {tuple(points.shape)}; give a mask")
    # A point that is not finite is at no finite distance, so the radius tells, and no pass over the points is needed.
    later = (
        number not in (PRECOMPUTED, COSINE)
        and not isinstance(start, str)
        and mask is None
        and points.ndim == 2
        and len(points) > 1
    )
    points, mask = points_and_mask(points, number, mask, values=not later)
    k = number_to_choose(k, points, mask)
    if given(initial):
        first = index_list("initial", initial, k, points, mask)  # type: ignore[arg-type]
        fixed = len(first)
    else:
        fixed = 0
        first = _first(points, mask, start, k, number, backend)
    run = overload("k_center", points.device.type, backend)
    indices, radii, labels, distances = run(points, first, mask, k, number, ENGINES.index(engine), bool(assign))
    if later and not torch.compiler.is_compiling() and not (radii[0] < math.inf):
        check_values(points, number, mask)
    objective = radii[-1]
    # With radius r, the k−m choices after the m initial ones and the point farthest from all are k−m+1 points at
    # least r apart and at least r from the initial ones. If all lay within less than r/2 of a center, no initial one
    # could serve them, so two would share one of the k−m free centers and be less than r apart: no. (m = 0 or 1: the
    # same for k+1 points.) The metric √sqeuclidean = √(2 cosine) makes r/2 a quarter of r.
    found = Selection(
        indices, radii, labels, distances, objective, objective / (4 if number in (SQEUCLIDEAN, COSINE) else 2)
    )
    return refined(points, found, fixed, mask, number, backend) if refine else found


def _first(points: Tensor, mask: Tensor | None, start: Starts, k: int, metric: int, backend: str | None) -> Tensor:
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
        start = operator.index(start)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"start is {start!r}; give an index, 'farthest-pair', 'center' or a torch.Generator") from None
    if not 0 <= start < points.shape[0]:
        raise IndexError(f"start is {start}; points has 0 to {points.shape[0] - 1}")
    if mask is not None and not torch.compiler.is_compiling() and not bool(mask[start]):
        raise ValueError(f"start is {start}, which mask leaves out; give an allowed index, or start='center'")
    return torch.full((1,), start, dtype=torch.int64, device=device)
