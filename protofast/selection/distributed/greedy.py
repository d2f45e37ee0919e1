"""Farthest-first traversal over shards: the choices of one process, many of them to one exchange.

A point's value, to the nearest chosen point, only falls. So the farthest few of every rank are gathered once into a
pool, and the choices made inside it, by every rank alike, are right until a point outside could come first. Then the
new centers are taken into account by all points in one pass, and the next pool is gathered.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._ops.selection import COSINE
from ..inputs import given, index_list
from .pair import farthest_pair
from .shards import Records, Shards

POOL = 2048  # points of each rank in the first exchange
FEW = 32  # choices that an exchange should be good for; with fewer the next pool is twice as large


class Greedy(NamedTuple):
    indices: Tensor
    """(k,) global"""
    x: Tensor
    """(k, d) their coordinates"""
    picked: Tensor
    """(k,) value of each when it was chosen; infinity for those given"""
    radii: Tensor
    """(k,) value of the covering radius after each choice"""
    labels: Tensor
    """(n,) of this rank's points"""
    values: Tensor
    """(n,) to the nearest choice"""


def first_points(shards: Shards, start: object, initial: object, k: int) -> Records:
    """What to begin with: `initial`, or one or two points by `start`."""
    step = "fetching the first points"
    if given(initial):
        index = index_list("initial", initial, k, shards.all_rows, None)  # type: ignore[arg-type]
        found = shards.fetch(step, index)
        if not found.columns.all():
            wrong = found.indices[found.columns[:, 0] == 0][0]
            raise ValueError(f"initial holds index {int(wrong)}, which mask leaves out")
        return found
    if isinstance(start, str):
        if start == "center":
            return _nearest_to_mean(shards)
        if start == "farthest-pair":
            return farthest_pair(shards)[0].take(slice(k))
        raise ValueError(f"start is {start!r}; give an index, 'farthest-pair', 'center' or a torch.Generator")
    if isinstance(start, torch.Generator):
        return _random(shards, start)
    try:
        number = operator.index(start)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"start is {start!r}; give an index, 'farthest-pair', 'center' or a torch.Generator") from None
    count = sum(shards.rows)
    if not 0 <= number < count:
        raise IndexError(f"start is {number}; points has 0 to {count - 1} on all ranks together")
    found = shards.fetch(step, torch.tensor([number], device=shards.device))
    if not found.columns.all():
        raise ValueError(f"start is {number}, which mask leaves out; give an allowed index, or start='center'")
    return found


def _random(shards: Shards, generator: torch.Generator) -> Records:
    """A random allowed point: the first rank's draw, as of one process with that generator."""
    step = "drawing the first point"
    draw = torch.randint(shards.total, (1,), generator=generator, device=generator.device).cpu()
    number = int(shards.gather(step, draw)[0]) - sum(shards.free[: shards.rank])
    own = shards.allowed.nonzero().squeeze(1)
    rows = own[number : number + 1] if 0 <= number < len(own) else own[:0]
    return shards.exchange(step, rows, shards.allowed[rows, None], 1)


def _nearest_to_mean(shards: Shards) -> Records:
    step = "finding the point nearest to the mean"
    space, values = shards.space(), torch.full((len(shards),), -torch.inf, dtype=torch.float64, device=shards.device)
    width = shards.width + (shards.metric == COSINE)
    total = torch.zeros(width, dtype=torch.float64, device=shards.device)
    if space is not None:
        for lo, hi in space.spans(space.count, width):
            total += space.coordinates(slice(lo, hi)).sum(0)
    mean = shards.gather(step, total).sum(0, keepdim=True) / shards.total
    if space is not None:
        values = space.spread(-space.to_vector(mean), -torch.inf)
    found = shards.best(step, values)
    assert found is not None
    return found


def greedy(shards: Shards, first: Records, k: int) -> Greedy:
    nearest = torch.full((len(shards),), torch.inf, dtype=torch.float64, device=shards.device)
    labels = torch.full_like(nearest, -1, dtype=torch.int64)
    free = shards.allowed.clone()
    chosen: list[Records] = []
    radii: list[Tensor] = []
    done = 0

    def take(new: Records, centers: Tensor) -> None:
        nonlocal nearest, labels, done
        if shards.free[shards.rank] and len(centers):
            nearest, label = shards.local.relax(shards.points, centers, shards.mask, nearest, shards.metric)
            labels = torch.where(label >= 0, label + done, labels)
        done += len(new.indices)

    initial = len(first.indices)
    peaks = nearest.new_zeros(initial)
    for number in range(initial):
        one = first.take(torch.tensor([number], device=shards.device))
        take(one, one.x)
        peaks[number] = _peak(nearest, shards.allowed)
    free[_own(shards, first.indices)] = False
    left = [count - int((first.rank == rank).sum()) for rank, count in enumerate(shards.free)]
    chosen.append(first._replace(columns=first.columns.new_full((initial, 1), torch.inf)))
    radii.append(peaks)

    length = POOL
    while done < k:
        length = min(length, shards.most_records(1))
        pool, outside = _pool(shards, torch.where(free, nearest, -1.0), left, length)
        new = _play(shards, pool, outside, k - done)
        free[_own(shards, new.indices)] = False
        for rank, count in enumerate(new.rank.bincount(minlength=shards.size).tolist()):
            left[rank] -= count
        chosen.append(new)
        take(new, new.x[new.columns[:, 0] > 0])  # copies of chosen points change nothing
        if len(new.indices) < FEW:
            length *= 2

    index, columns, x, _ = (torch.cat(part) for part in zip(*chosen, strict=True))
    picked = columns[:, 0]
    # The radius after a choice is the value of the next. What is left to ask for: those between the points given, and
    # the last.
    step = "measuring the covering radius"
    peaks = shards.gather(step, torch.cat([peaks[:-1], _peak(nearest, shards.allowed)])).amax(0)
    return Greedy(index, x, picked, torch.cat([peaks[:-1], picked[initial:], peaks[-1:]]), labels, nearest)


def cover(shards: Shards, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the radii after each of the centers (k, d), and labels and values of this rank's points."""
    nearest = torch.full((len(shards),), torch.inf, dtype=torch.float64, device=shards.device)
    labels = torch.full_like(nearest, -1, dtype=torch.int64)
    peaks = nearest.new_zeros(len(x))
    for number, one in enumerate(x):
        values = shards.local.to(one)
        closer = values < nearest
        nearest, labels = torch.where(closer, values, nearest), torch.where(closer, number, labels)
        peaks[number] = _peak(nearest, shards.allowed)
    return shards.gather("measuring the covering radius", peaks).amax(0), labels, nearest


def _peak(nearest: Tensor, allowed: Tensor) -> Tensor:
    """(1,): the largest value of an allowed point."""
    return torch.cat([torch.where(allowed, nearest, 0.0), nearest.new_zeros(1)]).amax(0, keepdim=True)


def _own(shards: Shards, index: Tensor) -> Tensor:
    """This rank's rows among global indices."""
    rows = index - shards.offset
    return rows[(rows >= 0) & (rows < len(shards))]


def _pool(shards: Shards, values: Tensor, left: list[int], length: int) -> tuple[Records, tuple[float, int]]:
    """The `length` farthest points of every rank, the lowest indices of equals, and how far the others can be.

    Of that, the best value and, of points that have it, a global index that all others of it come after.
    """
    rows = (values >= 0).nonzero().squeeze(1)
    if len(rows) > length:
        least = values.topk(length).values[-1]
        above, equal = (values > least).nonzero().squeeze(1), (values == least).nonzero().squeeze(1)
        rows = torch.cat([above, equal[: length - len(above)]]).sort().values
    pool = shards.exchange("choosing the farthest points", rows, values[rows, None], length)
    bar, last = -1.0, -1
    for rank, count in enumerate(left):
        if count > length:  # it holds more, all after the last that it sent
            own = pool.columns[pool.rank == rank, 0]
            lowest = own.min().item()
            index = int(pool.indices[pool.rank == rank][own == lowest][-1])
            if lowest >= bar:
                bar, last = lowest, index if lowest > bar else min(index, last)
    return pool, (bar, last)


def _play(shards: Shards, pool: Records, outside: tuple[float, int], most: int) -> Records:
    """Chooses in the pool until a point outside could be the next."""
    bar, last = outside
    values, x, index = pool.columns[:, 0], pool.x, pool.indices
    home = torch.arange(len(index), device=index.device)  # positions in the pool
    at: list[Tensor] = []
    picked: list[float] = []
    while len(at) < most and len(values):
        best = int(values.argmax())  # the first of equals: the lowest index
        value = float(values[best])
        if value < max(bar, 0) or (value == bar and int(index[best]) > last):
            break
        if value == 0:  # only copies of chosen points are left, here and everywhere: by their index
            copies = home[(values == 0) & ((index <= last) | (bar < 0))][: most - len(at)]
            at.extend(copies.unbind())
            picked.extend([0.0] * len(copies))
            break
        at.append(home[best])
        picked.append(value)
        relaxed, _ = shards.local.relax(x, x[best : best + 1], None, values.clamp(min=0), shards.metric)
        values = torch.where(values < 0, values, relaxed)
        values[best] = -1.0
        if len(at) % 16 == 0:  # points that one outside comes before will not be chosen here
            live = values >= max(bar, 0)
            if 2 * int(live.sum()) < len(live):
                values, x, index, home = values[live], x[live], index[live], home[live]
    columns = torch.tensor(picked, dtype=torch.float64, device=pool.x.device)[:, None]
    return pool.take(torch.stack(at))._replace(columns=columns)
