"""The exact farthest pair over shards.

Every rank finds its own farthest pair; the best of them is a lower bound. By distances to the middle of that pair, all
but few points cannot be part of a farther one. What is left goes round in blocks, and each pair of ranks is searched
by one of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import overload
from ..._ops.selection import MANHATTAN
from .shards import Records, Shards

ROUNDING = 2.0**-53
SAFE = 1e-250  # below it squares underflow, and bounds would not hold


class Best:
    """The farthest pair found so far, the lexicographically first of equals."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.search = overload("farthest_pair", shards.device.type, shards.backend)
        self.value, self.i, self.j = -1.0, 0, 0

    def offer(self, value: float, i: int, j: int) -> None:
        if (-value, i, j) < (-self.value, self.i, self.j):
            self.value, self.i, self.j = value, i, j

    def among(self, x: Tensor, index: Tensor) -> None:
        """Takes the pairs of points (m, d) into account, whose global indices ascend."""
        if len(index) > 1:
            pair, _ = self.search(x, None, self.shards.metric)
            value = self.shards.local.relax(x[pair[:1]], x[pair[1:]], None, None, self.shards.metric)[0]
            self.offer(value.item(), *index[pair].tolist())

    def length(self) -> float:
        """No pair shorter than this is the farthest, however lengths were rounded; −1 where none can be left out."""
        if self.value < SAFE:
            return -1.0
        length = self.value if self.shards.metric == MANHATTAN else self.value**0.5
        return length * (1 - 16 * (self.shards.width + 16) * ROUNDING)


def farthest_pair(shards: Shards) -> tuple[Records, float]:
    """The two points, or the one there is, and their value; the same on every rank."""
    step = "searching the farthest pair"
    best = Best(shards)
    rows = shards.allowed.nonzero().squeeze(1)
    if len(rows) > 1:
        pair, _ = best.search(shards.points, shards.mask, shards.metric)
        rows = pair
    ends = shards.exchange(step, rows, rows.double()[:, None], 2)
    if len(ends.indices) == 1:
        return ends, 0.0
    best.among(ends.x, ends.indices)
    if shards.size > 1:
        _across(shards, best, ends, step)
    return shards.fetch(step, torch.tensor([best.i, best.j], device=shards.device)), best.value


def _across(shards: Shards, best: Best, ends: Records, step: str) -> None:
    """Searches the pairs of points on different ranks."""
    pair = ends.x[(ends.indices == best.i) | (ends.indices == best.j)]
    both = shards.space(pair)
    assert both is not None
    center = both.coordinates(slice(2)).mean(0, keepdim=True)
    radius = torch.full((len(shards),), -torch.inf, dtype=torch.float64, device=shards.device)
    if (space := shards.space()) is not None:
        radius = space.spread(space.length(space.to_vector(center)), -torch.inf)

    # The farthest point of each rank: how far its points reach, and a chance of a better pair.
    top = radius.argmax().reshape(1) if shards.free[shards.rank] else radius.new_empty(0, dtype=torch.int64)
    far = shards.exchange(step, top, radius[top, None], 1)
    reach = far.columns[:, 0]
    together = torch.cat([ends.indices, far.indices]).unique()  # ascending
    place = torch.searchsorted(together, torch.cat([ends.indices, far.indices]))
    x = ends.x.new_empty(len(together), shards.width)
    x[place] = torch.cat([ends.x, far.x])
    best.among(x, together)
    if best.value == 0:  # all points coincide, and the pair is of the first two
        return

    others = reach[far.rank != shards.rank]
    if len(others) and shards.free[shards.rank]:
        near = (radius + others.max() >= best.length()) & shards.allowed
    else:
        near = torch.zeros_like(shards.allowed)
    rows = near.nonzero().squeeze(1)
    counts = shards.gather(step, torch.tensor([len(rows)])).squeeze(1).tolist()
    if sum(count > 0 for count in counts) > 1:
        _go_round(shards, best, rows[radius[rows].argsort(descending=True, stable=True)], radius, counts, step)
    said = torch.tensor([best.value, best.i, best.j], dtype=torch.float64)
    for value, i, j in shards.gather(step, said).tolist():
        best.offer(value, int(i), int(j))


def _go_round(shards: Shards, best: Best, rows: Tensor, radius: Tensor, counts: list[int], step: str) -> None:
    """Each round, every rank shows a block of its candidates (the farthest from the center first)."""
    most = max(counts)
    rounds = max(min(most, 2), -(-most // shards.most_records(1)))
    length = -(-most // rounds)
    for number in range(rounds):
        block = rows[number * length : (number + 1) * length].sort().values
        shown = shards.exchange(step, block, radius[block, None], length)
        for rank in range(shards.size):
            ahead = (rank - shards.rank) % shards.size
            mine = rows
            if 2 * ahead == shards.size:  # opposite in the circle: the lower does even blocks of the other's points
                if shards.rank > rank:  # and the higher its own odd ones against all
                    odd = (torch.arange(len(rows), device=rows.device) // length) % 2 == 1
                    mine = rows[odd]
                elif number % 2:
                    continue
            elif ahead == 0 or 2 * ahead > shards.size:
                continue
            theirs = shown.take(shown.rank == rank)
            _between(shards, best, mine, radius, theirs)


def _between(shards: Shards, best: Best, mine: Tensor, radius: Tensor, theirs: Records) -> None:
    if not len(mine) or not len(theirs.indices):
        return
    own, reach = radius[mine], theirs.columns[:, 0]
    least = best.length()
    mine, theirs = mine[own + reach.max() >= least], theirs.take(reach + own.max() >= least)
    if not len(theirs.indices):
        return
    for some in mine.sort().values.split(max(len(theirs.indices), 1024)):
        order = [(some + shards.offset, shards.points[some]), (theirs.indices, theirs.x)]
        if theirs.indices[0] < order[0][0][0]:
            order.reverse()
        index, x = (torch.cat(part) for part in zip(*order, strict=True))
        best.among(x, index)
