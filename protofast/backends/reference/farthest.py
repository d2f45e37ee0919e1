"""The exact farthest pair without an n × n matrix.

A few far-point searches give a pair that is nearly or truly the farthest. Triangle bounds, first from a center,
then between cells of near points, discard almost every other pair; for euclidean geometry a matrix product with a
rounding bound discards most of the rest. What is left is decided by direct values.
"""

import torch
from torch import Tensor

from protofast._ops.selection import MANHATTAN, PRECOMPUTED

from .space import Space, direct_cdist

ROUNDING = 2.0**-53
CELL = 256
AXES = 32  # of the projection that is tried before the full inner product


def farthest_pair(space: Space) -> tuple[Tensor, Tensor]:
    """Positions (2,) ascending, the lexicographically first of equals, and their value. Of one point, twice that."""
    if space.count == 1:
        zero = torch.zeros(2, dtype=torch.int64, device=space.device)
        return zero, zero[0].double()
    return _scan(space) if space.metric == PRECOMPUTED else _Search(space).run()


def _scan(space: Space) -> tuple[Tensor, Tensor]:
    best, found = torch.tensor(-1.0, dtype=torch.float64, device=space.device), None
    columns = torch.arange(space.count, device=space.device)
    for lo, hi in space.spans(space.count, space.points.shape[1]):
        block = space._raw(slice(lo, hi))
        if space.rows is not None:
            block = block[:, space.rows]
        block = torch.where(columns > columns[lo:hi, None], block, -1.0)
        flat = block.argmax()  # the first of equals
        value = block.flatten()[flat]
        if found is None or value > best:
            best, found = value, torch.stack([flat // space.count + lo, flat % space.count])
    assert found is not None
    return found, best


class _Search:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.best = torch.full((), -1.0, dtype=torch.float64, device=space.device)
        self.key = torch.zeros((), dtype=torch.int64, device=space.device)  # i · n + j of the best pair so far
        self.relative = 8 * (space.dim + 8) * ROUNDING  # error of a value, and of lengths added up

    def run(self) -> tuple[Tensor, Tensor]:
        center = self._approach()
        if self.best > 0:
            values = self.space.to_vector(center)
            radius = self.space.length(values)
            near = (radius + radius.max() >= self._least_length()).nonzero().squeeze(1)
            if len(near) > CELL:
                near = self._distinct(near)
            self._search(near, center, values.max())
        else:  # all points coincide
            self.key = torch.ones_like(self.key)
        n = self.space.count
        return torch.stack([self.key // n, self.key % n]), self.best

    def _least_length(self) -> Tensor:
        return self.space.length(self.best) * (1 - self.relative)

    def _offer(self, a: Tensor, b: Tensor) -> None:
        """Decides pairs of positions by their direct values."""
        value = self.space.pairs(a, b)
        top = value.max()
        if top >= self.best:
            keys = (torch.minimum(a, b) * self.space.count + torch.maximum(a, b))[value == top]
            self.key = keys.min() if top > self.best else torch.minimum(self.key, keys.min())
            self.best = top

    def _approach(self) -> Tensor:
        """Finds a far pair, and a center (1, dim) whose farthest point is about as near as can be."""
        space = self.space
        center = space.mean()
        found, least = center, None
        for step in range(1, 7):  # the center moves toward its farthest point: Bădoiu and Clarkson 2003
            values = space.to_vector(center)
            if least is None or values.max() < least:
                found, least = center, values.max()
            a = values.argmax()
            far = space.coordinates(a.reshape(1))
            for _ in range(10):
                b = space.to(a).argmax()
                before = self.best
                self._offer(a.reshape(1), b.reshape(1))
                if not self.best > before:
                    break
                a = b
            if step == 1:
                n = space.count
                ends = space.coordinates(torch.stack([self.key // n, self.key % n]))
                center = ends.mean(0, keepdim=True)
            else:
                center = center + (far - center) / (step + 1)
        return found

    def _distinct(self, near: Tensor) -> Tensor:
        """Drops points equal to one of lower index, so that copies cost nothing."""
        space = self.space
        random = torch.Generator().manual_seed(0)
        odd = (torch.randint(1 << 62, (space.dim,), generator=random) * 2 + 1).to(space.device)
        spans = space.spans(len(near), space.dim)
        # Adding 0 makes −0 a 0.
        hashes = torch.cat(
            [((space.coordinates(near[lo:hi]) + 0.0).view(torch.int64) * odd).sum(1) for lo, hi in spans]
        )
        ordered, order = hashes.sort(stable=True)
        first = torch.searchsorted(ordered, hashes)
        lowest = near[order[first]]
        copy = torch.cat(
            [(space.coordinates(near[lo:hi]) == space.coordinates(lowest[lo:hi])).all(1) for lo, hi in spans]
        )
        return near[~copy | (lowest == near)]

    def _search(self, near: Tensor, center: Tensor, largest: Tensor) -> None:
        space = self.space
        axes, skew = _axes(space, near, center)
        spans = space.spans(len(near), space.dim)
        projected = torch.cat([(space.coordinates(near[lo:hi]) - center) @ axes for lo, hi in spans])
        norms = space.to_vector(center, near)  # for euclidean geometry, squared
        # Whatever a matrix product of centered points can be off by, with the axes' departure from orthonormal.
        slack = (64 * (space.dim + 64) * ROUNDING + 8 * skew) * largest
        # |x−y|² ≤ |Px−Py|² + (ρx+ρy)² with P the projection and ρ the length that it loses, as one product.
        lost = ((norms - projected.square().sum(1)).clamp(min=0) + slack).sqrt()
        ones = torch.ones_like(norms)
        left = torch.stack([2 * lost, norms, ones], 1)
        left = torch.cat([-2 * projected, left], 1)
        right = torch.cat([projected, torch.stack([lost, ones, norms], 1)], 1)

        cells = _cells(projected)
        middle = torch.cat([space.coordinates(near[cell]).mean(0, keepdim=True) for cell in cells])
        reach = torch.stack(
            [space.length(space.to_vector(m[None], near[c])).max() for m, c in zip(middle, cells, strict=True)]
        )
        for number, cell in enumerate(cells):
            apart = torch.cat(
                [
                    space.size(middle[number + lo : number + hi] - middle[number])
                    for lo, hi in space.spans(len(cells) - number, space.dim)
                ]
            )
            bound = space.length(apart) + reach[number] + reach[number:]
            other = (bound >= self._least_length()).nonzero().squeeze(1).tolist()
            if not other:
                continue
            columns = torch.cat([cells[number + o] for o in other])
            for some in columns.split(max(CELL, space.tile // CELL)):
                if space.metric == MANHATTAN:
                    a, b = self._by_distance(near, cell, some)
                else:
                    a, b = self._by_product(near, cell, some, left, right, center, slack)
                if len(a):
                    self._offer(near[a], near[b])

    def _by_distance(self, near: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (self.space.coordinates(near[at]) for at in (rows, columns))
        a, b = (direct_cdist(x, y, self.space.metric) >= self._least_length()).nonzero().unbind(1)
        return rows[a], columns[b]

    def _by_product(
        self, near: Tensor, rows: Tensor, columns: Tensor, left: Tensor, right: Tensor, center: Tensor, slack: Tensor
    ) -> tuple[Tensor, Tensor]:
        space, least = self.space, self.best * (1 - self.relative) - slack
        product = left[rows] @ right[columns].T
        some = product.amax(1) >= least
        if not some.any():
            return rows[:0], rows[:0]
        rows, hit = rows[some], product[some] >= least
        if left.shape[1] < space.dim:  # the projection dropped axes
            columns = columns[hit.any(0)]
            x, y = (space.coordinates(near[at]) - center for at in (rows, columns))
            hit = torch.addmm(y.square().sum(1), x, y.T, alpha=-2) >= least - x.square().sum(1, keepdim=True)
        a, b = hit.nonzero().unbind(1)
        return rows[a], columns[b]


def _axes(space: Space, near: Tensor, center: Tensor) -> tuple[Tensor, float]:
    """Orthonormal columns (dim, q) along which the points spread most, and how far from orthonormal they are."""
    if space.dim <= AXES + 3:
        return torch.eye(space.dim, dtype=torch.float64, device=space.device), 0.0
    some = near[:: max(1, len(near) // CELL)]
    axes = torch.linalg.svd(space.coordinates(some) - center, full_matrices=False).Vh[:AXES].T.contiguous()
    return axes, float((axes.T @ axes - torch.eye(axes.shape[1], dtype=axes.dtype, device=axes.device)).norm())


def _cells(x: Tensor) -> list[Tensor]:
    """Rows of `x` cut into groups of near ones: halved along the widest axis until at most CELL remain."""
    todo, done = [torch.arange(len(x), device=x.device)], []
    while todo:
        group = todo.pop()
        if len(group) <= CELL:
            done.append(group)
            continue
        low, high = x[group].aminmax(dim=0)
        half = group[x[group, (high - low).argmax()].argsort(stable=True)]
        todo += half.tensor_split(2)
    return done
