"""k-medoids: Voronoi iteration, which PXGen's code calls k-center, and swaps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .inputs import at_least, index_list, metric_number, number_to_choose, points_and_mask
from .result import Selection


def k_medoids(
    points: Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "manhattan",
    start: Tensor | np.ndarray | Sequence[int] | torch.Generator | None = None,
    max_iter: int = 100,
    refine: bool = False,
    backend: str | None = None,
) -> Selection:
    """Chooses k points so that the sum of distances to the nearest chosen one is small: Voronoi iteration.

    Assigns each point to its nearest medoid (the first of equals), makes the point with the least sum of distances
    inside each cluster its medoid (the lowest index of equals), and repeats until the medoids stay (Park and Jun
    2009). A local optimum that depends on the start. With `refine`, swaps of a medoid for another point follow, each
    made as soon as it lowers the sum, until none does (Schubert and Rousseeuw 2021): a much better local optimum.

    Parameters
    ----------
    points : Tensor or array of shape (n, d), or (n, n) distances with ``metric="precomputed"``
        As in `k_center`.
    k : int
        From 1 to n.
    metric : {"manhattan", "euclidean", "sqeuclidean", "cosine", "precomputed"}
    start : integer Tensor, array or sequence of shape (k,), torch.Generator, or None
        The first medoids: distinct indices, k random ones, or (None) the evenly spaced i·n // k.
    max_iter : int, default 100
        Iterations at most; passes over all points at most, of `refine`.
    refine : bool, default False
    backend : str, optional

    Returns
    -------
    Selection
        ``indices`` in the order of the start. ``objective`` is the sum of ``distances``; ``bound`` is NaN, as the
        method proves none.

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument.

    Warns
    -----
    RuntimeWarning
        When `max_iter` was not enough.

    Notes
    -----
    No matrix is made. An iteration takes at most n·k + Σ (cluster size)² distances; the compiled kernel bounds the sums
    of most members instead, in time linear in n but for euclidean distances in many dimensions. A pass of `refine`
    takes n² distances.

    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [15.0]])
    >>> pf.k_medoids(points, 2).indices
    tensor([1, 4])
    """
    number = metric_number(metric)
    points, _ = points_and_mask(points, number)
    k = number_to_choose(k, points, None)
    max_iter = at_least("max_iter", max_iter, 1)
    n, device = points.shape[0], points.device
    if start is None:
        first = torch.arange(k, device=device) * n // k
    elif isinstance(start, torch.Generator):
        first = torch.randperm(n, generator=start, device=start.device)[:k].to(device)
    else:
        first = index_list("start", start, k, points, None)
        if len(first) != k:
            raise ValueError(f"start holds {len(first)} indices; give k = {k}")
    indices, settled = overload("k_medoids", device.type, backend)(points, first, number, max_iter, refine)
    if not torch.compiler.is_compiling() and not settled:
        warnings.warn(
            f"k_medoids stopped after max_iter={max_iter} iterations with medoids still moving; raise max_iter",
            RuntimeWarning,
            stacklevel=2,
        )
    radii, labels, distances = overload("cover", device.type, backend)(points, indices, None, number)
    total = distances.sum()
    return Selection(indices, radii, labels, distances, total, torch.full_like(total, math.nan))
