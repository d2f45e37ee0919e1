"""Selection in plain torch: greedy and local search on direct float64 distances.

The engines of other backends must make the choices that these make: the largest (or least) value, the lowest index
among equals.
"""

import math

import torch
from torch import Tensor

from protofast._ops import implement
from protofast._ops.selection import EUCLIDEAN, MANHATTAN, PRECOMPUTED

from .farthest import farthest_pair as _farthest
from .space import Space


def _greedy(space: Space, initial: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Farthest-first traversal (Gonzalez 1985): positions, and values of the radii, labels, values."""
    nearest = torch.full((space.count,), math.inf, dtype=torch.float64, device=space.device)
    labels = torch.zeros(space.count, dtype=torch.int64, device=space.device)
    chosen, radii = [], []
    for number in range(k):
        new = initial[number] if number < len(initial) else nearest.argmax()
        values = space.to(new)
        closer = values < nearest
        nearest = torch.where(closer, values, nearest)
        labels = torch.where(closer, number, labels)
        nearest[new] = -1  # below every distance: never chosen again
        chosen.append(new)
        radii.append(nearest.max())
    return torch.stack(chosen), torch.stack(radii).clamp(min=0), labels, nearest.clamp(min=0)


def k_center(
    points: Tensor, initial: Tensor, mask: Tensor | None, k: int, metric: int, engine: int, assign: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not assign:
        indices, radii, labels, distances = k_center(points, initial, mask, k, metric, engine)
        return indices, radii, labels[..., :0].clone(), distances[..., :0].clone()
    if points.ndim == 3:
        masks = [None] * len(points) if mask is None else mask
        clouds = [_k_center(*one, k, metric) for one in zip(points, initial, masks, strict=True)]
        indices, radii, labels, distances = (torch.stack(part) for part in zip(*clouds, strict=True))
        return indices, radii, labels, distances
    return _k_center(points, initial, mask, k, metric)


def _k_center(
    points: Tensor, initial: Tensor, mask: Tensor | None, k: int, metric: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    space = Space(points, mask, metric)
    chosen, radii, labels, values = _greedy(space, space.position(initial), min(k, space.count))
    indices = space.index(chosen)
    short = k - len(indices)
    return (
        torch.cat([indices, indices.new_full((short,), -1)]),
        torch.cat([space.distance(radii), radii.new_zeros(short)]),
        space.spread(labels, -1),
        space.spread(space.distance(values), math.inf),
    )


def relax(
    points: Tensor, centers: Tensor, mask: Tensor | None, nearest: Tensor | None, metric: int
) -> tuple[Tensor, Tensor]:
    space, others = Space(points, mask, metric), Space(centers, None, metric)
    values = torch.full((space.count,), math.inf, dtype=torch.float64, device=space.device)
    if nearest is not None:
        values = nearest.clone() if space.rows is None else nearest[space.rows]
    labels = torch.full_like(values, -1, dtype=torch.int64)
    for number in range(others.count):
        new = space.to_vector(others.coordinates(slice(number, number + 1)))
        closer = new < values
        values, labels = torch.where(closer, new, values), torch.where(closer, number, labels)
    return space.spread(values, math.inf), space.spread(labels, -1)


def cover(points: Tensor, indices: Tensor, mask: Tensor | None, metric: int) -> tuple[Tensor, Tensor, Tensor]:
    return _k_center(points, indices, mask, len(indices), metric)[1:]


def farthest_pair(points: Tensor, mask: Tensor | None, metric: int) -> tuple[Tensor, Tensor]:
    space = Space(points, mask, metric)
    pair, value = _farthest(space)
    return space.index(pair), space.distance(value).clone()


def nearest_to_mean(points: Tensor, mask: Tensor | None, metric: int) -> Tensor:
    space = Space(points, mask, metric)
    if metric != PRECOMPUTED:
        values = space.to_vector(space.mean())
    else:  # Σ_j |x_i − x_j|² is least where x_i is nearest to the mean
        spans = space.spans(space.count, points.shape[1])
        blocks = (space._raw(slice(lo, hi)) for lo, hi in spans)
        values = torch.cat([(b if space.rows is None else b[:, space.rows]).square().sum(1) for b in blocks])
    return space.index(values.argmin().reshape(1))


def max_min_swaps(
    points: Tensor, indices: Tensor, labels: Tensor, distances: Tensor, mask: Tensor | None, metric: int, swaps: int
) -> tuple[Tensor, Tensor]:
    space, k = Space(points, mask, metric), len(indices)
    chosen = space.position(indices)
    if swaps > 0:
        chosen = _refine_min(space, chosen, swaps)
    smallest = [space.to(chosen[i], chosen[i + 1 :]).min() for i in range(k - 1)]
    value = torch.stack(smallest).min() if k > 1 else points.new_full((), math.inf, dtype=torch.float64)
    return space.index(chosen).clone(), space.distance(value).clone()


def max_sum(
    points: Tensor, initial: Tensor, mask: Tensor | None, k: int, metric: int, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    space = Space(points, mask, metric)
    chosen, sums = _greedy_sum(space, space.position(initial), k)
    chosen = _refine_sum(space, chosen, sums, sweeps)
    parts = [space.distance(space.to(chosen[i], chosen[i + 1 :])).sum() for i in range(k)]
    return space.index(chosen), torch.stack(parts).sum(), _detour(space, chosen)


class _TwoNearest:
    """For every point, the values and positions in the list of its two nearest chosen points."""

    def __init__(self, space: Space, chosen: Tensor, at: Tensor | None = None) -> None:
        count = space.count if at is None else len(at)
        self.value = torch.full((2, count), math.inf, dtype=torch.float64, device=space.device)
        self.label = torch.full((2, count), -1, dtype=torch.int64, device=space.device)
        for number, one in enumerate(chosen):
            self.insert(space.to(one, at), number)

    def insert(self, values: Tensor, number: int) -> None:
        # Of equals the first in the list, whatever the order in which they come.
        before = number < self.label
        first, second = (values < self.value) | ((values == self.value) & before)
        self.value[1] = torch.where(first, self.value[0], torch.where(second, values, self.value[1]))
        self.label[1] = torch.where(first, self.label[0], torch.where(second, number, self.label[1]))
        self.value[0] = torch.where(first, values, self.value[0])
        self.label[0] = torch.where(first, number, self.label[0])


def _refine_min(space: Space, chosen: Tensor, swaps: int) -> Tensor:
    """Swaps an end of the closest chosen pair for the point farthest from the others, each time raising the smallest
    distance."""
    k = len(chosen)
    chosen = chosen.clone()
    near = _TwoNearest(space, chosen)
    for _ in range(swaps if 2 < k < space.count else 0):
        # A chosen point is its own nearest, so its second nearest is the nearest other.
        other, partner = near.value[1, chosen], near.label[1, chosen]
        one = int(other.argmin())
        smallest = other[one]
        if smallest == 0:
            break
        best, swap = smallest, None
        for end in sorted((one, int(partner[one]))):
            reach = torch.where(near.label[0] == end, near.value[1], near.value[0])
            reach[chosen] = -1
            new = reach.argmax()
            rest = torch.arange(k, device=space.device) != end
            left = other[rest & (partner != end)]
            value = torch.cat([reach[new][None], left]).min()
            for lost in (rest & (partner == end)).nonzero().squeeze(1):  # their nearest other is the one that goes
                keep = rest.clone()
                keep[lost] = False
                value = torch.minimum(value, space.to(chosen[lost], chosen[keep]).min())
            if value > best:
                best, swap = value, (end, new)
        if swap is None:
            break
        end, new = swap
        chosen[end] = new
        stale = (near.label == end).any(0).nonzero().squeeze(1)
        near.insert(space.to(new), end)
        again = _TwoNearest(space, chosen, stale)
        near.value[:, stale], near.label[:, stale] = again.value, again.label
    return chosen


def _greedy_sum(space: Space, initial: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Adds the point with the largest sum of distances to those chosen (Ravi, Rosenkrantz and Tayi 1994)."""
    sums = torch.zeros(space.count, dtype=torch.float64, device=space.device)
    free = torch.ones(space.count, dtype=torch.bool, device=space.device)
    chosen: list[Tensor] = []
    for number in range(k):
        new = initial[number] if number < len(initial) else torch.where(free, sums, -1).argmax()
        free[new] = False
        sums += space.distance(space.to(new))
        chosen.append(new)
    return torch.stack(chosen), sums


def _refine_sum(space: Space, chosen: Tensor, sums: Tensor, sweeps: int) -> Tensor:
    """Sweeps over the chosen points and swaps each for the point that raises the total most, until a sweep changes
    nothing."""
    chosen = chosen.clone()
    for _ in range(sweeps if len(chosen) < space.count else 0):
        before = chosen.clone()
        for number in range(len(chosen)):
            old = chosen[number]
            values = space.distance(space.to(old))
            rest = sums - values
            gain = rest - sums[old]
            gain[chosen] = -math.inf
            new = gain.argmax()
            if gain[new] > 1e-12 * sums[old]:  # above the rounding of the sums, so that it cannot go in circles
                chosen[number] = new
                sums = rest + space.distance(space.to(new))
        if torch.equal(before, chosen):
            break
    return chosen


def _detour(space: Space, chosen: Tensor) -> Tensor:
    """No k points have a larger total than this: a detour over a center c, Σ_{i<j} d(i, j) ≤ (k−1) Σ_i d(i, c), or in
    euclidean geometry Σ_{i<j} |x_i−x_j|² = k Σ |x_i−c|² − |Σ (x_i−c)|² with Cauchy and Schwarz for the sum of the
    roots. The k points farthest from c make either largest."""
    k, metric = len(chosen), space.metric
    if metric == PRECOMPUTED:
        return torch.stack([space.to(c).topk(k).values.sum() for c in chosen]).min() * (k - 1)
    center = torch.cat([space.coordinates(c.reshape(1)) for c in chosen]).mean(0, keepdim=True)
    far = space.to_vector(center).topk(k).values.sum()
    if metric == MANHATTAN:
        return far * (k - 1)
    if metric == EUCLIDEAN:
        return (k * (k - 1) / 2 * k * far).sqrt()
    return space.distance(k * far)


implement("k_center", "reference", ["default"], k_center)
implement("relax", "reference", ["default"], relax)
implement("cover", "reference", ["default"], cover)
implement("farthest_pair", "reference", ["default"], farthest_pair)
implement("nearest_to_mean", "reference", ["default"], nearest_to_mean)
implement("max_min_swaps", "reference", ["default"], max_min_swaps)
implement("max_sum", "reference", ["default"], max_sum)
