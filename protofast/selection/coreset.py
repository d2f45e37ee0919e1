"""A coreset of a stream by doubling. The rules and the proof stand in `stream_k_center`.

All is decided by lengths, which obey the triangle inequality under every metric: the distance, or for the squared
metrics its root (cosine: the length between unit vectors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import AUTO, COSINE, EUCLIDEAN, MANHATTAN

KEPT = 0.5
"""Share of a full coreset that is meant to stay when it makes room."""


@dataclass(frozen=True, eq=False)
class State:
    """What is known of the rows seen. The first `count` entries of the four tables are the coreset.

    Its points are more than `apart` from each other. Every row lies within `reach` of the point that it went to, and
    max(reach) ≤ 2 apart, and within `farthest` of row 0. Some k + 1 rows are at least `spread` apart.
    """

    points: Tensor
    rows: Tensor
    reach: Tensor
    sizes: Tensor
    first: Tensor  # the first k rows
    count: int = 0
    seen: int = 0
    apart: float = 0.0
    spread: float = 0.0
    farthest: float = 0.0


TABLES = ("points", "rows", "reach", "sizes", "first")
LENGTHS = ("apart", "spread", "farthest")


@dataclass(frozen=True)
class Doubling:
    """The rules: `k` to choose in the end, from a coreset of at most `size` points."""

    k: int
    size: int
    metric: int
    backend: str | None

    def empty(self, points: Tensor, first: Tensor) -> State:
        """For points like these, with room for one more than the coreset holds."""
        size, device = self.size + 1, points.device
        whole = torch.zeros(size, dtype=torch.int64, device=device)
        return State(points.new_empty(size, points.shape[1]), whole, whole.double(), whole.clone(), first)

    def take(self, state: State, x: Tensor) -> tuple[State, bool]:
        """The state after the rows of `x`, taken one by one, and whether any entered the coreset.

        May write into tables of `state` past its count, where it holds nothing.
        """
        first = state.first
        if len(first) < self.k:
            first = torch.cat([first, x[: self.k - len(first)]])
        farthest = self._length(self._relax(x, first[:1])[0]).max()
        state = replace(
            state,
            first=first,
            reach=state.reach.clone(),
            sizes=state.sizes.clone(),
            farthest=max(state.farthest, float(farthest)),
        )
        values, labels = self._nearest(x, state)
        done, entered = 0, False
        while True:
            lengths = self._length(values[done:])
            far = (lengths > state.apart).nonzero()
            near = int(far[0]) if len(far) else len(lengths)
            to = labels[done : done + near]
            state.reach.scatter_reduce_(0, to, lengths[:near], "amax")
            state.sizes.scatter_add_(0, to, torch.ones_like(to))
            done += near
            if done == len(x):
                return replace(state, seen=state.seen + done), entered
            n = state.count
            state.points[n], state.rows[n], state.reach[n], state.sizes[n] = x[done], state.seen + done, 0, 1
            new, done, entered = x[done : done + 1], done + 1, True
            state = replace(state, count=n + 1)
            if n == self.size:
                state = self._with_room(state)
                values[done:], labels[done:] = self._nearest(x[done:], state)
            elif done < len(x):
                values[done:], closer = self._relax(x[done:], new, values[done:])
                labels[done:].masked_fill_(closer == 0, n)

    def _with_room(self, state: State) -> State:
        """A coreset that is one point too large, made smaller: points within some distance of another go into it."""
        order, radii, _, _ = self._greedy(state.points, state.count)
        gaps = radii[:-1]  # from each point after the first to those before it, falling; the last is the least of all
        least, reach = float(gaps[-1]), float(state.reach.max())
        wanted = float(gaps[max(int(KEPT * self.size), self.k) - 1])
        # What the proof in stream_k_center needs; the range is never empty, as reach ≤ 2 apart < 2 least.
        apart = min(max(wanted, least, reach), 4 * least - reach)
        kept = order[: 1 + int((gaps > apart).sum())]
        n, smaller = len(kept), self.empty(state.points, state.first)
        smaller.points[:n], smaller.rows[:n] = state.points[kept], state.rows[kept]
        values, labels = self._relax(state.points, smaller.points[:n])
        smaller.reach.scatter_reduce_(0, labels, self._length(values) + state.reach, "amax")
        smaller.sizes.scatter_add_(0, labels, state.sizes)
        spread = max(state.spread, float(gaps[self.k - 1]))
        return replace(state, **{name: getattr(smaller, name) for name in TABLES}, count=n, apart=apart, spread=spread)

    def choose(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> k points, their rows, how many rows each stands for, the bounds from above and below on the radius."""
        n = state.count
        chosen, _, labels, lengths = self._greedy(state.points[:n], min(self.k, n))
        above = (lengths + state.reach[:n]).max().clamp(max=state.farthest)  # row 0 is always the first choice
        # The point farthest from k greedy choices makes k + 1 that far apart; of fewer points all are chosen.
        below = lengths.max().clamp(min=state.spread) / 2
        points, rows = state.points[chosen], state.rows[chosen]
        sizes = torch.zeros_like(rows).index_add_(0, labels, state.sizes[:n])
        if n < self.k:
            points, rows, sizes = self._filled(state, points, rows, sizes)
        return points, rows, sizes, self._distance(above), self._distance(below)

    def _filled(self, state: State, points: Tensor, rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Made k by points out of the first k rows, farthest first."""
        given = len(rows)
        taken = set(rows.tolist())
        spare = [row for row in range(self.k) if row not in taken]
        points = torch.cat([points, state.first[spare]])
        rows = torch.cat([rows, rows.new_tensor(spare)])
        order = self._greedy(points, self.k, given)[0]
        return points[order], rows[order], torch.cat([sizes, sizes.new_zeros(self.k - given)])

    def _greedy(self, points: Tensor, k: int, given: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The op k_center, with lengths for distances."""
        initial = torch.arange(given, device=points.device)
        run = overload("k_center", points.device.type, self.backend)
        chosen, radii, labels, distances = run(points, initial, None, k, self.metric, AUTO)
        if self.metric in (EUCLIDEAN, MANHATTAN):
            return chosen, radii, labels, distances
        scale = 2 if self.metric == COSINE else 1
        return chosen, (scale * radii).sqrt(), labels, (scale * distances).sqrt()

    def _relax(self, x: Tensor, centers: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return overload("relax", x.device.type, self.backend)(x, centers, None, values, self.metric)

    def _nearest(self, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        if state.count and len(x):
            return self._relax(x, state.points[: state.count])
        return state.reach.new_full(x.shape[:1], math.inf), state.rows.new_zeros(x.shape[:1])

    def _length(self, value: Tensor) -> Tensor:
        return value if self.metric == MANHATTAN else value.sqrt()

    def _distance(self, length: Tensor) -> Tensor:
        if self.metric in (EUCLIDEAN, MANHATTAN):
            return length
        return length.square() / 2 if self.metric == COSINE else length.square()
