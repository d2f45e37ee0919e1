"""Points under a metric, read in tiles: distances in the direct form in float64, never an n × n matrix.

A *position* counts the allowed points only, so kernels need not know of masks. A *value* is what choices compare, and
how it is rounded is laid down in protofast/_ops/selection.py. Cosine is euclidean geometry on unit vectors,
1 − cos = ½|û−v̂|²; a zero vector gets a direction of its own.
"""

import numpy as np
import torch
from torch import Tensor

from protofast._ops.selection import COSINE, EUCLIDEAN, MANHATTAN, PRECOMPUTED

TILE = {"cpu": 1 << 18}  # float64 numbers in a temporary: 2 MiB stays in a core's cache
TILE_ELSEWHERE = 1 << 24
LANES = 8


class Space:
    def __init__(self, points: Tensor, mask: Tensor | None, metric: int) -> None:
        self.points, self.metric, self.device = points, metric, points.device
        self.rows = None if mask is None else mask.nonzero().squeeze(1)
        self.count = points.shape[0] if self.rows is None else self.rows.shape[0]
        self.tile = TILE.get(points.device.type, TILE_ELSEWHERE)
        self.dim = points.shape[1]
        self.norms: Tensor | None = None
        if metric == COSINE:
            norms = [root(lanes(self._raw(slice(lo, hi)).square())) for lo, hi in self.spans(self.count, self.dim)]
            self.norms = torch.cat(norms)
            self.dim += 1  # the direction of zero vectors

    def spans(self, count: int, width: int) -> list[tuple[int, int]]:
        """Ranges that cut `count` rows of `width` numbers into tiles."""
        step = max(1, self.tile // max(width, 1))
        return [(lo, min(lo + step, count)) for lo in range(0, count, step)]

    def index(self, positions: Tensor) -> Tensor:
        return positions if self.rows is None else self.rows[positions]

    def position(self, indices: Tensor) -> Tensor:
        return indices if self.rows is None else torch.searchsorted(self.rows, indices)

    def spread(self, values: Tensor, absent: float) -> Tensor:
        """Values of the allowed points as values of all points."""
        if self.rows is None:
            return values
        return values.new_full((self.points.shape[0],), absent).index_copy_(0, self.rows, values)

    def distance(self, value: Tensor) -> Tensor:
        if self.metric == EUCLIDEAN:
            return root(value)
        return value / 2 if self.metric == COSINE else value

    def length(self, value: Tensor) -> Tensor:
        """What obeys the triangle inequality: the norm that belongs to a value of coordinates."""
        return value if self.metric in (MANHATTAN, PRECOMPUTED) else value.sqrt()

    def _raw(self, at: slice | Tensor) -> Tensor:
        return (self.points[at] if self.rows is None else self.points[self.rows[at]]).double()

    def coordinates(self, at: slice | Tensor) -> Tensor:
        """Coordinates (t, dim) in which values are taken; not for a precomputed matrix."""
        x = self._raw(at)
        if self.norms is not None:
            norm = self.norms[at][:, None]
            x = x / torch.where(norm > 0, norm, 1)
            x = torch.cat([x, (norm == 0).double()], 1)
        return x

    def size(self, gap: Tensor) -> Tensor:
        """Value of differences (..., dim); overwrites them."""
        return lanes(gap.abs_() if self.metric == MANHATTAN else gap.square_())

    def to_vector(self, vector: Tensor, at: Tensor | None = None) -> Tensor:
        """Values between coordinates (1, dim) and all positions, or those in `at`."""
        count = self.count if at is None else at.shape[0]
        out = vector.new_empty(count)
        for lo, hi in self.spans(count, self.dim):
            out[lo:hi] = self.size(self.coordinates(slice(lo, hi) if at is None else at[lo:hi]) - vector)
        return out

    def to(self, position: Tensor, at: Tensor | None = None) -> Tensor:
        """Values between one position and all, or those in `at`."""
        if self.metric != PRECOMPUTED:
            return self.to_vector(self.coordinates(position.reshape(1)), at)
        row = self.points.index_select(0, self.index(position).reshape(1)).squeeze(0)
        if at is not None:
            row = row[self.index(at)]
        elif self.rows is not None:
            row = row[self.rows]
        return row.double()

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """Values of the pairs (a[i], b[i])."""
        out = torch.empty(a.shape[0], dtype=torch.float64, device=self.device)
        for lo, hi in self.spans(a.shape[0], self.dim):
            out[lo:hi] = self.size(self.coordinates(a[lo:hi]) - self.coordinates(b[lo:hi]))
        return out

    def mean(self) -> Tensor:
        """Mean of the coordinates (1, dim)."""
        total = torch.zeros(1, self.dim, dtype=torch.float64, device=self.device)
        for lo, hi in self.spans(self.count, self.dim):
            total += self.coordinates(slice(lo, hi)).sum(0)
        return total / self.count


def root(value: Tensor) -> Tensor:
    """Square roots, rounded right: of a long tensor on the CPU torch's may be off in the last bit (MKL's are)."""
    return torch.as_tensor(np.sqrt(value.numpy())) if value.device.type == "cpu" else value.sqrt()


def lanes(terms: Tensor, count: int = LANES) -> Tensor:
    """Sums (...) of terms (..., dim) in the order that every backend keeps, in so many lanes; overwrites them."""
    total = terms[..., :count]
    for start in range(count, terms.shape[-1], count):
        more = terms[..., start : start + count]
        total[..., : more.shape[-1]] += more
    while count > 1:
        count //= 2
        upper = total[..., count:]
        total[..., : upper.shape[-1]] += upper
        total = total[..., :count]
    return total.sum(-1)  # of one number, or none


def direct_cdist(x: Tensor, y: Tensor, metric: int) -> Tensor:
    """Manhattan or euclidean distances by differences."""
    p = 1.0 if metric == MANHATTAN else 2.0
    return torch.cdist(x, y, p, compute_mode="donot_use_mm_for_euclid_dist")
