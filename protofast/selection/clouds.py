"""Greedy k-center of several clouds at once; those with fewer points are padded."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import COSINE, ENGINES, PRECOMPUTED, SQEUCLIDEAN
from .inputs import check_values, given, largest, mask_of, number_to_choose, real, tensor
from .refine import refined
from .result import Selection

Starts = int | str | torch.Generator | Tensor | np.ndarray | Sequence[int]
Integers = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]


def k_center_of_clouds(
    points: Tensor,
    k: int,
    metric: int,
    *,
    start: Starts,
    initial: Integers | None,
    mask: Tensor | np.ndarray | None,
    lengths: Integers | None,
    refine: bool,
    engine: str,
    assign: bool,
    backend: str | None,
) -> Selection:
    """`k_center` of points (B, n, d), or (B, n, n) distances; every field of the result has a leading B."""
    points, mask = _points_and_mask(points, metric, mask, lengths)
    k = number_to_choose(k, points[0], None)
    first = _initial(initial, k, points, mask) if given(initial) else None
    fixed = 0 if first is None else first.shape[1]
    if first is None:
        first = _first(points, mask, start, metric, backend)
    run = overload("k_center", points.device.type, backend)
    indices, radii, labels, distances = run(points, first, mask, k, metric, ENGINES.index(engine), assign)
    objective = radii[:, -1]
    found = Selection(
        indices, radii, labels, distances, objective, objective / (4 if metric in (SQEUCLIDEAN, COSINE) else 2)
    )
    return refined(points, found, fixed, mask, metric, backend) if refine else found


def _points_and_mask(
    points: Tensor,
    metric: int,
    mask: Tensor | np.ndarray | None,
    lengths: Integers | None,
) -> tuple[Tensor, Tensor | None]:
    count, n, width = points.shape
    if not count or not n:
        raise ValueError(f"points has shape {tuple(points.shape)}; there must be at least one cloud of one point")
    points = real(points)
    if metric == PRECOMPUTED and n != width:
        raise ValueError(f"points has shape {tuple(points.shape)}; metric='precomputed' takes (B, n, n) distances")
    mask = mask_of(points, mask)
    if lengths is not None:
        lengths = _integers("lengths", lengths).to(points.device)
        if lengths.shape != (count,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; give one number a cloud, ({count},)")
        _each((lengths < 1) | (lengths > n), f"lengths is {{}} for cloud {{}}; give 1 to {n}", lengths)
        inside = torch.arange(n, device=points.device) < lengths[:, None]
        mask = inside if mask is None else mask & inside
    if not torch.compiler.is_compiling():
        if mask is not None:
            allowed = mask.sum(1)
            _each(allowed == 0, "{} points of cloud {} are allowed by mask and lengths; at least one must be", allowed)
        _check_values(points, metric, mask)
    return points, mask


def _check_values(points: Tensor, metric: int, mask: Tensor | None) -> None:
    if metric != PRECOMPUTED and points.numel():
        least, most = points.aminmax()
        if least >= -largest(points.dtype) and most <= largest(points.dtype):
            return
    for number, cloud in enumerate(points):  # what padding holds does not matter
        try:
            check_values(cloud, metric, None if mask is None else mask[number])
        except ValueError as error:
            raise ValueError(f"cloud {number}: {error}") from None


def _integers(name: str, value: Any) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name} has rows of different lengths; give as many for each cloud") from None
    found = tensor(name, value)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} is {found.dtype}; give integers")
    return found.long()


def _each(wrong: Tensor, text: str, values: Tensor, error: type[Exception] = ValueError) -> None:
    """Refuses the first cloud for which `wrong` (B,) holds, with its value."""
    if not torch.compiler.is_compiling() and wrong.any():
        number = int(wrong.nonzero()[0])
        raise error(text.format(int(values[number]), number))


def _check_allowed(name: str, index: Tensor, points: Tensor, mask: Tensor | None) -> None:
    """That every index (B, m) is a point of its cloud."""
    n = points.shape[1]
    for column in index.T:
        outside = (column < 0) | (column >= n)
        _each(outside, f"{name} is {{}} for cloud {{}}; points has 0 to {n - 1}", column, IndexError)
        if mask is not None:
            left = ~mask.gather(1, column[:, None])[:, 0]
            _each(left, f"{name} is {{}} for cloud {{}}, which mask or lengths leave out; give an allowed one", column)


def _initial(initial: Any, k: int, points: Tensor, mask: Tensor | None) -> Tensor | None:
    index = _integers("initial", initial).to(points.device)
    if index.ndim != 2 or len(index) != len(points) or index.shape[1] > k:
        raise ValueError(f"initial has shape {tuple(index.shape)}; give (B, m) = ({len(points)}, 1 to k = {k})")
    if not index.shape[1]:
        return None
    _check_allowed("initial", index, points, mask)
    ordered = index.sort(1).values
    twice = (ordered.diff(dim=1) == 0).any(1)
    _each(twice, "initial holds an index twice for cloud {1}; give each once", index[:, 0])
    return index


def _first(points: Tensor, mask: Tensor | None, start: Starts, metric: int, backend: str | None) -> Tensor:
    count, n, _ = points.shape
    device = points.device
    if isinstance(start, str):
        if start not in ("center", "farthest-pair"):
            raise ValueError(
                f"start is {start!r}; give an index, one a cloud, 'farthest-pair', 'center' or a torch.Generator"
            )
        masks = [None] * count if mask is None else mask
        if start == "center":
            run = overload("nearest_to_mean", device.type, backend)
            return torch.stack([run(*one, metric) for one in zip(points, masks, strict=True)])
        # The second of the pair is the point farthest from the first, so greedy takes it next. A cloud of one point
        # has no second.
        run = overload("farthest_pair", device.type, backend)
        return torch.stack([run(*one, metric)[0][:1] for one in zip(points, masks, strict=True)])
    if isinstance(start, torch.Generator):
        drawn = torch.randint(2**62, (count,), generator=start, device=start.device).to(device)
        if mask is None:
            return (drawn % n)[:, None]
        seen = mask.cumsum(1)
        return (seen > (drawn % seen[:, -1])[:, None]).byte().argmax(1, keepdim=True)
    if isinstance(start, Tensor | np.ndarray | Sequence):
        index = _integers("start", start).to(device)
        if index.ndim and index.shape != (count,):
            raise ValueError(f"start has shape {tuple(index.shape)}; give one index a cloud, ({count},)")
        index = index.expand(count)
    else:
        try:
            index = torch.full((count,), operator.index(start), dtype=torch.int64, device=device)
        except TypeError:
            raise TypeError(
                f"start is {start!r}; give an index, one a cloud, 'farthest-pair', 'center' or a torch.Generator"
            ) from None
    _check_allowed("start", index[:, None], points, mask)
    return index[:, None].contiguous()
