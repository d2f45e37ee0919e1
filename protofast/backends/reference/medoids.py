"""k-medoids in plain torch: Voronoi iteration, then swaps of a medoid for another point."""

import torch
from torch import Tensor

from protofast._ops import implement
from protofast._ops.selection import LEAST_GAIN, MANHATTAN, MOST_DISTANCE, PRECOMPUTED, SUM_LANES

from .selection import _TwoNearest
from .space import LANES, Space, lanes


def k_medoids(
    points: Tensor, initial: Tensor, metric: int, max_iter: int, refine: bool = False
) -> tuple[Tensor, Tensor]:
    space = Space(points, None, metric)
    medoids, settled = _voronoi(space, initial, max_iter)
    if refine and 1 < len(medoids) < space.count:
        medoids, settled = _swap(space, medoids, max_iter)
    return medoids, torch.tensor(settled, device=space.device)


def _voronoi(space: Space, initial: Tensor, max_iter: int) -> tuple[Tensor, bool]:
    medoids = initial.clone()
    numbers = torch.arange(len(medoids), device=space.device)
    for _ in range(max_iter):
        nearest = space.to(medoids[0])
        labels = torch.zeros(space.count, dtype=torch.int64, device=space.device)
        for number in range(1, len(medoids)):
            values = space.to(medoids[number])
            labels = torch.where(values < nearest, number, labels)
            nearest = torch.minimum(values, nearest)
        labels[medoids] = numbers  # of coincident medoids each keeps itself, so that none is lost
        clusters = labels.argsort(stable=True).split(labels.bincount(minlength=len(medoids)).tolist())
        new = torch.stack([members[_sums(space, members).argmin()] for members in clusters])
        if torch.equal(new, medoids):
            return medoids, True
        medoids = new
    return medoids, False


def _sums(space: Space, members: Tensor) -> Tensor:
    """Sums of the distances from each member to all members."""
    count = len(members)
    out = torch.empty(count, dtype=torch.float64, device=space.device)
    width = min(count, 8 * SUM_LANES)
    step = max(1, space.tile // width)
    for lo in range(0, count, step):
        rows = members[lo : lo + step]
        some = space._raw(rows) if space.metric == PRECOMPUTED else space.coordinates(rows)
        sums = out.new_zeros(len(rows), SUM_LANES)
        for start in range(0, count, width):
            others = members[start : start + width]
            if space.metric == PRECOMPUTED:
                distances = some[:, space.index(others)]
            else:
                distances = space.distance(_values(some, space.coordinates(others).T.contiguous(), space.metric))
            for at in range(0, len(others), SUM_LANES):
                more = distances[:, at : at + SUM_LANES]
                sums[:, : more.shape[1]] += more
        out[lo : lo + step] = lanes(sums, SUM_LANES)
    return out


def _values(x: Tensor, y: Tensor, metric: int) -> Tensor:
    """Values (s, t) between coordinates (s, dim) and (dim, t)."""
    sums: list[Tensor] = []
    for c, (left, right) in enumerate(zip(x.T, y, strict=True)):
        gap = left[:, None] - right
        gap = gap.abs_() if metric == MANHATTAN else gap.square_()
        if c < LANES:
            sums.append(gap)
        else:
            sums[c % LANES] += gap
    for half in (4, 2, 1):
        for low, high in zip(sums[:half], sums[half:], strict=False):
            low += high
        del sums[half:]
    return sums[0] if sums else x.new_zeros(len(x), y.shape[1])


def _swap(space: Space, medoids: Tensor, passes: int) -> tuple[Tensor, bool]:
    """Swaps as FasterPAM's (Schubert and Rousseeuw 2021): each point in turn for the medoid whose place it takes best,
    at once where the sum of distances falls; until no point of a whole pass does, or so many passes."""
    count, k = space.count, len(medoids)
    medoids = medoids.clone()
    taken = torch.zeros(count, dtype=torch.bool, device=space.device)
    taken[medoids] = True
    near = _TwoNearest(space, medoids)
    stood = torch.zeros(k, dtype=torch.float64, device=space.device)
    since = 0
    for step in range(passes * count):
        point = step % count
        if step == 0 or since == 0:
            first, second = _finite(space.distance(near.value))
            loss = lanes(first.clone(), SUM_LANES)
            stood = _by_label(near.label[0], second - first, k)  # what the sum grows by without each medoid
        since += 1
        if not taken[point]:
            values = space.to(torch.tensor(point, device=space.device))
            distances = _finite(space.distance(values))
            gain = lanes((first - distances).clamp_(min=0), SUM_LANES)
            spared = _by_label(near.label[0], (second - torch.maximum(distances, first)).clamp_(min=0), k)
            change = stood - spared - gain
            out = int(change.argmin())
            if change[out] < -LEAST_GAIN * (loss + stood[out]):
                taken[medoids[out]], taken[point] = False, True
                medoids[out] = point
                stale = (near.label == out).any(0).nonzero().squeeze(1)
                near.insert(values, out)
                again = _TwoNearest(space, medoids, stale)
                near.value[:, stale], near.label[:, stale] = again.value, again.label
                since = 0
        if since == count:
            return medoids, True
    return medoids, False


def _finite(distances: Tensor) -> Tensor:
    return distances.clamp(max=MOST_DISTANCE)


def _by_label(labels: Tensor, terms: Tensor, k: int) -> Tensor:
    """Sums (k,) of the terms of each label, one after another; on the CPU, since a GPU adds in any order."""
    return torch.bincount(labels.clamp(min=0).cpu(), terms.cpu(), k).to(terms.device)  # -1: far from all, terms 0


implement("k_medoids", "reference", ["default"], k_medoids)
