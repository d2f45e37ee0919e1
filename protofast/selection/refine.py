"""Swaps that make the covering radius of a greedy choice smaller: a center goes, and another covers the farthest point.

Few points: a search for k centers that cover everything within less than the radius so far (Zhang, Lü and others 2020,
"Vertex weighting-based tabu search for p-center problem"), on the matrix of all values. Many: only swaps that leave no
point farther than the radius so far, found by exact 1-center searches over rows of values. Both compare the float64
values of protofast/_ops/selection.py, so that backends agree, and stop after counted work, never by a clock.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import MANHATTAN, PRECOMPUTED
from .result import Selection

MATRIX = 3000
"""Up to this many allowed points the matrix of all values is made (72 MB)."""
SWAPS = 1000
"""Swaps without success after which the search among few points ends; fewer where there are few to make."""
LEAST_SWAPS = 16
LOOKS = 1 << 27
"""Values looked at without success after which it ends."""
PASSES = 4
"""Times n·(k + PARTNERS) distances that the search among many points takes at most."""
PARTNERS = 16
"""Centers tried for a swap with one farthest point, the nearest to it first."""
GATHER = 4
"""How much longer a distance takes to a point that must be gathered first."""
ROWS = 1 << 14
ROUNDING = 1e-9
"""Of a bound by the triangle inequality, as values are rounded."""


def refined(
    points: Tensor, found: Selection, fixed: int, mask: Tensor | None, metric: int, backend: str | None
) -> Selection:
    """A greedy choice in points (n, d) or (B, n, d) made better; its bound stays. The first `fixed` centers stay.
    What stays keeps its place; new ones fill those that are left."""
    if points.ndim == 3:
        masks = [None] * len(points) if mask is None else mask
        each = (
            refined(cloud, Selection(*of), fixed, some, metric, backend)
            for cloud, some, *of in zip(points, masks, *vars(found).values(), strict=True)
        )
        return Selection(*(torch.stack(field) for field in zip(*(vars(one).values() for one in each), strict=True)))
    allowed = points.shape[0] if mask is None else int(mask.sum())
    if not fixed < len(found.indices) < allowed:
        return found
    new = _refine(points, found.indices, fixed, mask, allowed, metric, backend)
    indices = found.indices.clone()
    indices[~torch.isin(indices, new)] = new[~torch.isin(new, found.indices)]
    radii, labels, distances = overload("cover", points.device.type, backend)(points, indices, mask, metric)
    return Selection(indices, radii, labels, distances, radii[-1], found.bound)


def _refine(
    points: Tensor, indices: Tensor, fixed: int, mask: Tensor | None, allowed: int, metric: int, backend: str | None
) -> Tensor:
    if allowed > MATRIX:
        return _swap(Rows(points, mask, metric, backend), indices, fixed)
    where = torch.arange(allowed, device=points.device) if mask is None else mask.nonzero().squeeze(1)
    square = matrix(points if mask is None else points[mask], metric, backend, mask)
    greedy = torch.searchsorted(where, indices).cpu().numpy()
    chosen = search(square, greedy, fixed, least=least_value(square, greedy, metric))
    return where[torch.from_numpy(chosen).to(where.device)]


class Rows:
    """Values between one point and all, or some; infinite for points that the mask leaves out."""

    def __init__(self, points: Tensor, mask: Tensor | None, metric: int, backend: str | None) -> None:
        self.points, self.mask, self.metric = points, mask, metric
        self.relax = overload("relax", points.device.type, backend)
        self.taken = 0

    def __call__(self, index: Tensor, at: Tensor | None = None) -> Tensor:
        n = self.points.shape[0]
        if at is not None and GATHER * len(at) > n and self.metric != PRECOMPUTED:
            return self(index)[at]
        self.taken += n if at is None else len(at)
        index = index.reshape(1)
        if self.metric == PRECOMPUTED:
            row = self.points[index].squeeze(0) if at is None else self.points[index, at]
            row = row.double()
            return row if self.mask is None or at is not None else row.where(self.mask, math.inf)
        center = self.points[index]
        if at is None:
            return self.relax(self.points, center, self.mask, None, self.metric)[0]
        parts = [self.relax(self.points[some], center, None, None, self.metric)[0] for some in at.split(ROWS)]
        return torch.cat(parts)


def matrix(points: Tensor, metric: int, backend: str | None, columns: Tensor | None = None) -> np.ndarray:
    """Values (n, n) of all pairs; `columns` is the mask that the rows of a precomputed matrix were taken by."""
    if metric == PRECOMPUTED:
        return (points if columns is None else points[:, columns]).double().cpu().numpy()
    rows = Rows(points, None, metric, backend)
    out = torch.empty(len(points), len(points), dtype=torch.float64, device=points.device)
    for number, index in enumerate(torch.arange(len(points), device=points.device)):
        out[number] = rows(index)
    return out.cpu().numpy()


def least_value(values: np.ndarray, greedy: np.ndarray, metric: int) -> float:
    """A bound on the least covering radius, as a value, that a greedy choice proves."""
    if metric == PRECOMPUTED:
        return 0.0  # half the radius would rest on the triangle inequality
    return (1 / 2 if metric == MANHATTAN else 1 / 4) * values[greedy].min(0).max()


def search(
    values: np.ndarray, chosen: np.ndarray, fixed: int = 0, *, effort: int = 1, least: float = 0.0
) -> np.ndarray:
    """Positions (k,) of centers in a matrix (n, n) with a radius as small as the search found, or down to `least`."""
    swaps = effort * min(SWAPS, max(LEAST_SWAPS, len(values) * len(chosen) // 4))
    while (radius := values[chosen].min(0).max()) > least * (1 + ROUNDING):
        better = _cover_within(values, radius, chosen.copy(), fixed, swaps)
        if better is None:
            break
        chosen = better
    return chosen


def _cover_within(values: np.ndarray, radius: float, chosen: np.ndarray, fixed: int, swaps: int) -> np.ndarray | None:
    """Swaps until all points are within less than `radius`, or none.

    A step swaps a center in that covers the heaviest point without cover, so that the weight without cover becomes the
    least, even if more than before; weights grow where it got stuck, so that it does not go in circles.
    """
    n, k = len(values), len(chosen)
    weight = np.ones(n)
    covers = values[chosen] < radius
    count = covers.sum(0)  # centers that cover a point
    owner = np.arange(k) @ covers  # the sum of their numbers: of one, its number
    free = np.ones(n, dtype=bool)
    free[chosen] = False
    removed, added, looked = -1, -1, 0
    for _ in range(swaps):
        bare = np.flatnonzero(count == 0)
        if not len(bare):
            return chosen
        if looked > LOOKS:
            break
        point = bare[weight[bare].argmax()]
        candidates = np.flatnonzero((values[point] < radius) & free)
        candidates = candidates[candidates != removed]
        if not len(candidates):
            weight[bare] += 1
            removed = -1
            continue
        held = np.flatnonzero(count == 1)
        held = held[owner[held].argsort(kind="stable")]
        gain = (values[np.ix_(candidates, bare)] < radius) @ weight[bare]
        lost = np.bincount(owner[held], weight[held], minlength=k)  # by a center's leaving, less what a candidate keeps
        owners, first = np.unique(owner[held], return_index=True)
        change = np.broadcast_to(lost, (len(candidates), k)).copy()
        if len(held):
            kept = (values[np.ix_(candidates, held)] < radius) * weight[held]
            change[:, owners] -= np.add.reduceat(kept, first, axis=1)
        change -= gain[:, None]
        change[:, :fixed] = np.inf
        if added >= 0 and k - fixed > 1:
            change[:, added] = np.inf
        looked += len(candidates) * (len(bare) + len(held))
        best, number = np.unravel_index(change.argmin(), change.shape)
        if change[best, number] >= 0:
            weight[bare] += 1
        new, old = candidates[best], chosen[number]
        for center, sign in ((old, -1), (new, 1)):
            near = values[center] < radius
            count[near] += sign
            owner[near] += sign * int(number)
        free[old], free[new] = True, False
        chosen[number] = new
        removed, added = old, int(number)
    return None


def _swap(rows: Rows, chosen: Tensor, fixed: int) -> Tensor:
    chosen = chosen.clone()
    n, k = rows.points.shape[0], len(chosen)
    nearest = torch.full((2, n), math.inf, dtype=torch.float64, device=chosen.device)  # and second nearest
    labels = torch.full((2, n), -1, dtype=torch.int64, device=chosen.device)
    for number in range(k):
        _insert(nearest, labels, rows(chosen[number]), number)
    if rows.mask is not None:
        nearest[:, ~rows.mask] = 0
    rows.taken = 0
    while rows.taken < PASSES * n * (k + PARTNERS):
        point = nearest[0].argmax()
        radius = nearest[0, point]
        if radius == 0:
            break
        row = rows(point)
        near = (row < radius).nonzero().squeeze(1)
        order = row[chosen[fixed:]].argsort(stable=True)[:PARTNERS] + fixed
        for number in order.tolist():
            held = ((labels[0] == number) & (nearest[1] >= radius)).nonzero().squeeze(1)
            new = _stand_in(rows, near, row[near], held, radius)
            if new is not None:
                break
        else:
            break
        chosen[number] = new
        stale = (labels == number).any(0).nonzero().squeeze(1)
        one = torch.full((2, len(stale)), math.inf, dtype=torch.float64, device=chosen.device)
        two = torch.full_like(one, -1, dtype=torch.int64)
        for other in range(k):
            if other != number:
                _insert(one, two, rows(chosen[other], stale), other)
        nearest[:, stale], labels[:, stale] = one, two
        _insert(nearest, labels, rows(new), number)
    return chosen


def _insert(nearest: Tensor, labels: Tensor, values: Tensor, number: int) -> None:
    first, second = values < nearest[0], values < nearest[1]
    nearest[1] = torch.where(first, nearest[0], torch.where(second, values, nearest[1]))
    labels[1] = torch.where(first, labels[0], torch.where(second, number, labels[1]))
    nearest[0] = torch.where(first, values, nearest[0])
    labels[0] = torch.where(first, number, labels[0])


def _stand_in(rows: Rows, near: Tensor, reach: Tensor, held: Tensor, radius: Tensor) -> Tensor | None:
    """One of the points `near` that is within less than `radius` of all `held`, or None where there is none.

    `reach` bounds from below how far each is from the farthest that it must cover. The least is tried; the held point
    farthest from it raises the bounds.
    """
    while len(near):
        best = reach.argmin()
        if not reach[best] < radius:
            break
        if not len(held):
            return near[best]
        values = rows(near[best], held)
        far = values.argmax()
        if values[far] < radius:
            return near[best]
        reach = torch.maximum(reach, rows(held[far], near))
        left = reach < radius
        near, reach = near[left], reach[left]
    return None
