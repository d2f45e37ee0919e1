"""Points spread over the ranks of a process group.

All that ranks say to each other goes through one collective, `Shards.gather`. What a rank decides follows from what
was gathered, so all of them decide alike and none has to be told.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..._backend import overload
from ..._ops.selection import COSINE, EUCLIDEAN, PRECOMPUTED
from ...backends.reference.space import Space, root
from ..inputs import metric_number, number_to_choose, points_and_mask, tensor

HEADER = 4096  # bytes that a rank says about itself
MESSAGE = 1 << 26  # bytes of records gathered at once, of all ranks together
ERRORS = {"ValueError": ValueError, "TypeError": TypeError, "IndexError": IndexError}


class Records(NamedTuple):
    """Points of all ranks in ascending order of their global indices."""

    indices: Tensor
    """(m,) global"""
    columns: Tensor
    """(m, c) what was said of each, float64"""
    x: Tensor
    """(m, d) coordinates, in the points' dtype"""
    rank: Tensor
    """(m,) whose they are"""

    def take(self, at: Tensor | slice) -> Records:
        return Records(*(part[at] for part in self))


class Rows:
    """Values between some points and one other at a time."""

    def __init__(self, points: Tensor, mask: Tensor | None, metric: int, backend: str | None) -> None:
        self.points, self.mask, self.metric = points, mask, metric
        self.count, self.device = points.shape[0], points.device
        self.relax = overload("relax", points.device.type, backend)

    def to(self, one: Tensor, at: Tensor | None = None) -> Tensor:
        """Values (n,) to coordinates (d,); infinity for points that the mask leaves out."""
        points, mask = (self.points, self.mask) if at is None else (self.points[at], None)
        if not len(points):
            return torch.empty(0, dtype=torch.float64, device=self.device)
        return self.relax(points, one[None], mask, None, self.metric)[0]


class Shards:
    """This rank's points, and what all ranks know of each other's.

    Attributes
    ----------
    points : Tensor of shape (n, d)
        Of this rank; n may be 0.
    allowed : bool Tensor of shape (n,)
    offset : int
        Global index of this rank's first point.
    total : int
        Number of allowed points on all ranks.
    free : list of int
        How many allowed points of each rank have not been chosen yet: kept by those who choose.
    """

    def __init__(
        self, points: Any, mask: Any, metric: str, group: dist.ProcessGroup, backend: str | None, asked: dict[str, Any]
    ) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is {group!r}; give a group that this process belongs to, such as "
                "torch.distributed.group.WORLD after torch.distributed.init_process_group(...)"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        transport = dist.get_backend(group)
        cuda = transport == "nccl"
        self._wire = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        says: dict[str, Any] = {}
        own = None
        try:
            self.metric = metric_number(metric)
            if self.metric == PRECOMPUTED:
                raise ValueError("metric='precomputed' needs the whole matrix in one process; leave process_group out")
            self.points, self.mask, allowed = _shard(points, mask, self.metric)
            self.local = Rows(self.points, self.mask, self.metric, backend)
            says = {
                "rows": len(self.points),
                "allowed": allowed,
                "width": self.points.shape[1],
                "dtype": str(self.points.dtype),
                "device": self.points.device.type,
                "asked": {name: _plain(value) for name, value in {"metric": metric, **asked}.items()},
            }
        except Exception as error:
            own, says = error, {"error": [type(error).__name__, str(error)[:600]]}
        heads = self._introduce(says)
        _must_agree(heads, own)
        self.backend = backend
        self.rows = [head["rows"] for head in heads]
        self.free = [head["allowed"] for head in heads]
        self.total, self.offset = sum(self.free), sum(self.rows[: self.rank])
        self.device, self.width = self.points.device, self.points.shape[1]
        self.allowed = torch.ones(len(self.points), dtype=torch.bool, device=self.device)
        if self.mask is not None:
            self.allowed = self.mask.clone()
        if not self.total:
            raise ValueError("no rank has an allowed point; at least one must")
        if self.points.is_cuda and ("nccl" in transport) and {head["device"] for head in heads} == {"cuda"}:
            self._wire = self.points.device  # also of a group that has gloo for the CPU

    def __len__(self) -> int:
        return len(self.points)

    @property
    def all_rows(self) -> Tensor:
        """Stands for the points of all ranks where only their number matters."""
        return torch.empty(1, 1, device=self.device).expand(sum(self.rows), 1)

    def number_to_choose(self, k: int) -> int:
        number_to_choose(k, self.all_rows[: self.total], None)
        return int(k)

    def distance(self, value: Tensor) -> Tensor:
        if self.metric == EUCLIDEAN:
            return root(value)
        return value / 2 if self.metric == COSINE else value

    def space(self, points: Tensor | None = None) -> Space | None:
        """Coordinates in float64 of this rank's points, or of others; None where there is no point."""
        if points is not None:
            return Space(points, None, self.metric)
        return Space(self.points, self.mask, self.metric) if self.free[self.rank] else None

    # --- what ranks say to each other -------------------------------------------------------------------------------

    def gather(self, step: str, local: Tensor) -> Tensor:
        """What all ranks give, (size, *shape): the shape and dtype must be the same everywhere."""
        flat = local.contiguous().reshape(-1).view(torch.uint8).to(self._wire)  # bytes: every transport takes them
        found = flat.new_empty(self.size, len(flat))
        try:
            work = dist.all_gather(list(found.unbind(0)), flat, group=self.group, async_op=True)
            work.wait()
            found = found.to(local.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} lost the other ranks while {step}. One of them ended or did not answer within the "
                "group's time-out: look for the first error among the ranks and start all of them again, with a larger "
                f"timeout in init_process_group if they only were slow ({' '.join(str(error).split())[:300]})"
            ) from error
        return found.view(local.dtype).reshape(self.size, *local.shape)

    def _introduce(self, says: dict[str, Any]) -> list[dict[str, Any]]:
        head = json.dumps(says, ensure_ascii=False).encode().ljust(HEADER)
        sent = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        return [json.loads(bytes(one.tolist())) for one in self.gather("comparing their arguments", sent)]

    def most_records(self, columns: int) -> int:
        """How many records a rank may send at once."""
        record = 8 + 8 * columns + self.width * self.points.element_size()
        return max(1, MESSAGE // (self.size * record))

    def exchange(self, step: str, rows: Tensor, columns: Tensor, length: int) -> Records:
        """Gathers this rank's points `rows` (m,), ascending, with columns (m, c); at most `length` of each rank."""
        parts = [rows + self.offset, columns.double(), self.points[rows]]
        sent = torch.cat([_as_bytes(part) for part in parts], 1)
        padding = sent.new_full((length - len(sent), sent.shape[1]), 255)  # as an index, −1
        found = self.gather(step, torch.cat([sent, padding])).flatten(0, 1)
        width = 8 * columns.shape[1]
        index = _of_bytes(found[:, :8], torch.int64).squeeze(1)
        real = (index >= 0).nonzero().squeeze(1)
        found = found[real]
        return Records(
            index[real],
            _of_bytes(found[:, 8 : 8 + width], torch.float64),
            _of_bytes(found[:, 8 + width :], self.points.dtype),
            real // length,
        )

    def fetch(self, step: str, index: Tensor, column: Tensor | None = None) -> Records:
        """Points of given global indices, in the order given, with whether they are allowed, or one's own column."""
        ends = torch.tensor(self.rows).cumsum(0)
        owner = torch.searchsorted(ends, index.cpu(), right=True)
        order = index.cpu().argsort()
        rows = index.cpu()[order][owner[order] == self.rank].to(self.device) - self.offset
        said = self.allowed if column is None else column
        found = self.exchange(step, rows, said[rows, None], int(owner.bincount().max()))
        return found.take(order.argsort().to(self.device))

    def best(self, step: str, values: Tensor, more: tuple[Tensor, ...] = ()) -> Records | None:
        """The point of the largest value (n,) above −infinity, the lowest index of equals, with it and `more` of it."""
        top = values.new_empty(0, dtype=torch.int64)
        if len(values):
            top = values.argmax().reshape(1)
            top = top[values[top] > -torch.inf]
        found = self.exchange(step, top, torch.stack([values, *more], 1)[top], 1)
        return found.take(found.columns[:, 0].argmax().reshape(1)) if len(found.indices) else None


def _as_bytes(part: Tensor) -> Tensor:
    """(m, …) as (m, bytes)."""
    part = part[:, None] if part.ndim == 1 else part
    flat = part.contiguous().reshape(-1).view(torch.uint8)
    return flat.reshape(len(part), part.shape[1] * part.element_size())


def _of_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.reshape(-1).contiguous().view(dtype).reshape(len(part), part.shape[1] // dtype.itemsize)


def _shard(points: Any, mask: Any, metric: int) -> tuple[Tensor, Tensor | None, int]:
    """Checked points and mask, and how many are allowed; unlike in one process, that may be none."""
    points = tensor("points", points)
    if mask is not None:
        mask = tensor("mask", mask)
    if points.ndim == 2 and not len(points):
        one, mask = points_and_mask(points.new_zeros(1, points.shape[1]), metric)[0], None
        return one[:0], mask, 0
    if points.ndim == 2 and mask is not None and mask.dtype == torch.bool and not mask.any():
        some = torch.ones_like(mask)
        checked = points_and_mask(torch.zeros_like(points), metric, some)[0]
        return points.to(checked.dtype), mask, 0
    points, mask = points_and_mask(points, metric, mask)
    return points, mask, len(points) if mask is None else int(mask.sum())


def _plain(value: Any) -> str:
    """An argument in a few characters that are the same on every rank that was given the same."""
    if isinstance(value, torch.Generator):
        return "a torch.Generator"
    if value is None or isinstance(value, (str, int, float, np.integer, np.floating)):
        return str(value)[:100]
    numbers = str(torch.as_tensor(value).tolist())
    return numbers if len(numbers) < 60 else f"a list {hashlib.sha256(numbers.encode()).hexdigest()[:8]}"


def _must_agree(heads: list[dict[str, Any]], own: Exception | None) -> None:
    for rank, head in enumerate(heads):
        if "error" in head:
            name, text = head["error"]
            raise ERRORS.get(name, RuntimeError)(f"on rank {rank}: {text}") from own
    first = heads[0]
    for rank, head in enumerate(heads):
        for name, asked in head["asked"].items():
            if asked != first["asked"].get(name):
                raise ValueError(
                    f"{name} is {asked} on rank {rank} and {first['asked'].get(name)} on rank 0; "
                    "give every rank the same"
                )
        if head["width"] != first["width"]:
            raise ValueError(
                f"points has {head['width']} columns on rank {rank} and {first['width']} on rank 0; "
                "shards need the same (an empty one too)"
            )
        if head["dtype"] != first["dtype"]:
            raise ValueError(
                f"points is {head['dtype']} on rank {rank} and {first['dtype']} on rank 0; convert them to one dtype"
            )
