"""Dispersion over shards: the reference's greedy sums and swaps, with one exchange for each choice or swap.

What is known of chosen points is kept by every rank alike, so that only the candidates are exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops.selection import EUCLIDEAN, MANHATTAN
from ...backends.reference.selection import _TwoNearest
from .shards import Records, Rows, Shards


def refine_min(shards: Shards, chosen: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swaps an end of the closest chosen pair for the point farthest from the others, at most k times. The chosen
    indices, their coordinates and the smallest value between two of them."""
    step, k = "swapping chosen points", len(chosen)
    chosen, x = chosen.clone(), x.clone()
    near = _TwoNearest(shards.local, x)  # type: ignore[arg-type]  # all it asks of a space is count, device and to()
    held = _TwoNearest(_rows(shards, x), x)  # type: ignore[arg-type]  # the same of the chosen points
    numbers = torch.arange(k, device=shards.device)
    for _ in range(k):
        # A chosen point is its own nearest, so its second nearest is the nearest other.
        other, partner = held.value[1], held.label[1]
        one = int(other.argmin())
        smallest = other[one]
        if smallest == 0:
            break
        ends = sorted((one, int(partner[one])))
        best, swap = smallest, None
        for end, found in zip(ends, _replacements(shards, near, chosen, ends, step), strict=True):
            rest = numbers != end
            left = other[rest & (partner != end)]
            value = torch.cat([found.columns[0, :1], left]).min()
            for lost in (rest & (partner == end)).nonzero().squeeze(1):  # their nearest other is the one that goes
                keep = rest.clone()
                keep[lost] = False
                value = torch.minimum(value, _rows(shards, x[keep]).to(x[lost]).min())
            if value > best:
                best, swap = value, (end, found)
        if swap is None:
            break
        end, found = swap
        chosen[end], x[end] = found.indices[0], found.x[0]
        # The one that goes was its own nearest, so its place in `held` is stale and made anew for the one that comes.
        for state, rows in ((near, shards.local), (held, _rows(shards, x))):
            stale = (state.label == end).any(0).nonzero().squeeze(1)
            state.insert(rows.to(x[end]), end)
            again = _TwoNearest(rows, x, stale)  # type: ignore[arg-type]
            state.value[:, stale], state.label[:, stale] = again.value, again.label
    return chosen, x, held.value[1].min()


def _rows(shards: Shards, x: Tensor) -> Rows:
    return Rows(x, None, shards.metric, shards.backend)


def _replacements(shards: Shards, near: _TwoNearest, chosen: Tensor, ends: list[int], step: str) -> list[Records]:
    """For each end, the point farthest from the other chosen ones, with its value."""
    free = shards.allowed.clone()
    rows = chosen - shards.offset
    free[rows[(rows >= 0) & (rows < len(shards))]] = False
    top, values = chosen[:0], near.value[0, :0]
    if len(shards):
        reach = torch.stack([torch.where(near.label[0] == end, near.value[1], near.value[0]) for end in ends])
        reach = torch.where(free, reach, -1.0)
        top = reach.argmax(1)  # the first of equals
        values = reach.gather(1, top[:, None]).squeeze(1)
    found = shards.exchange(step, top, values[:, None], len(ends))
    each = [found.take(slice(number, None, len(ends))) for number in range(len(ends))]
    return [of.take(of.columns[:, 0].argmax().reshape(1)) for of in each]


def max_sum(
    shards: Shards, pair: Records, diameter: float, k: int, refine: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy sums (Ravi, Rosenkrantz and Tayi 1994) and swaps: chosen indices, coordinates, objective and bound."""
    sums = torch.zeros(len(shards), dtype=torch.float64, device=shards.device)
    free = shards.allowed.clone()
    new: Records | None
    chosen: list[Records] = []
    for number in range(k):
        if number < 2:
            new = pair.take(slice(number, number + 1))
        else:
            new = shards.best("choosing the point of the largest sum", torch.where(free, sums, -torch.inf))
        assert new is not None
        rows = new.indices - shards.offset
        free[rows[(rows >= 0) & (rows < len(shards))]] = False
        sums = sums + shards.distance(shards.local.to(new.x[0]))
        chosen.append(new)
    index, x = torch.cat([one.indices for one in chosen]), torch.cat([one.x for one in chosen])
    if refine and k < shards.total:
        index, x = _refine_sum(shards, index, x, sums, free)
    parts = [shards.distance(_rows(shards, x[i + 1 :]).to(x[i])).sum() for i in range(k - 1)]
    return index, x, torch.stack(parts).sum(), _bound_sum(shards, x, diameter)


def _refine_sum(shards: Shards, chosen: Tensor, x: Tensor, sums: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Sweeps over the chosen points and swaps each for the point that raises the total most; at most ten sweeps."""
    step = "swapping chosen points"
    held = shards.fetch(step, chosen, sums).columns[:, 0]  # the sums of the chosen points
    for _ in range(10):
        before = chosen.clone()
        for number in range(len(chosen)):
            old = x[number].clone()
            rest = sums - shards.distance(shards.local.to(old))
            gain = torch.where(free, rest - held[number], -torch.inf)
            new = shards.best(step, gain, (rest,))
            if new is not None and new.columns[0, 0] > 1e-12 * held[number]:  # above the rounding of the sums
                held_rest = held - shards.distance(_rows(shards, x).to(old))
                held_rest[number] = new.columns[0, 1]
                for index, now in ((chosen[number], True), (new.indices[0], False)):
                    row = int(index) - shards.offset
                    if 0 <= row < len(shards):
                        free[row] = now
                chosen[number], x[number] = new.indices[0], new.x[0]
                sums = rest + shards.distance(shards.local.to(x[number]))
                held = held_rest + shards.distance(_rows(shards, x).to(x[number]))
        if torch.equal(before, chosen):
            break
    return chosen, x


def _bound_sum(shards: Shards, x: Tensor, diameter: float) -> Tensor:
    """As the reference: the diameter bounds each pair, and so does a detour over the middle of the chosen points."""
    k, step = len(x), "bounding the total"
    pairs = k * (k - 1) / 2
    chosen = shards.space(x)
    assert chosen is not None
    center = chosen.coordinates(slice(k)).mean(0, keepdim=True)
    values = torch.full((k,), -torch.inf, dtype=torch.float64, device=shards.device)
    if (space := shards.space()) is not None:
        own = space.to_vector(center).topk(min(k, space.count)).values
        values[: len(own)] = own
    far = shards.gather(step, values).flatten().topk(k).values.sum()
    if shards.metric == MANHATTAN:
        detour = far * (k - 1)
    elif shards.metric == EUCLIDEAN:
        detour = (pairs * k * far).sqrt()
    else:
        detour = shards.distance(k * far)
    return torch.minimum(shards.distance(far.new_tensor(diameter)) * pairs, detour)
