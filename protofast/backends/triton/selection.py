"""Farthest-first traversal in Triton: the farthest point of a round is found by the next round's programs.

A cloud that one program goes through fast enough is its own for all rounds, so that a batch is one launch; of others,
every round is a launch. Values and labels are exact at all times; float32 only tells which tiles a center leaves as
they are. No round waits for the host.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast._ops import selection as _op
from protofast.backends.reference.space import root

from .philox import cast

_COSINE = tl.constexpr(_op.COSINE)
_MANHATTAN = tl.constexpr(_op.MANHATTAN)
_PRECOMPUTED = tl.constexpr(_op.PRECOMPUTED)
_INF = tl.constexpr(math.inf)
_LARGEST = tl.constexpr(3e38)
_LAST = tl.constexpr(2**63 - 1)

_TILE = 2048  # coordinates
_WARPS = 8
_ALONE = 2**21  # bytes of a cloud that a program reads in about the time of a launch


# --- values ----------------------------------------------------------------------------------------------------


@triton.jit
def _double(x):
    return x if x.dtype == tl.float64 else cast(x, tl.float32).to(tl.float64)


@triton.jit
def _by_halves(lanes):
    """Sums of lanes (rows, 8); every addition is of two, so there is no other order."""
    rows: tl.constexpr = lanes.shape[0]
    lanes = tl.sum(tl.reshape(lanes, [rows, 2, 4]), 1)
    lanes = tl.sum(tl.reshape(lanes, [rows, 2, 2]), 1)
    return tl.sum(lanes, 1)


@triton.jit
def _unit(x, norm):
    return tl.where(norm > 0, x / tl.where(norm > 0, norm, 1.0), x)


@triton.jit
def _inverse(norm):
    """In float32: 0 of a zero vector, NaN where float32 would lose bits."""
    holds = (norm > 2.0**-100) & (norm < 2.0**100)
    scale = tl.where(holds, 1 / tl.where(holds, norm, 1.0), float("nan"))
    return tl.where(norm == 0, 0.0, scale).to(tl.float32)


@triton.jit
def _exact(x, column, inside, norm, y, y_column, y_norm, dim, METRIC: tl.constexpr, BM: tl.constexpr):
    """Values (BM,) as protofast/_ops/selection.py lays them down; `x` are pointers to rows."""
    lanes = tl.zeros([BM, 8], tl.float64)
    lane = tl.arange(0, 8)
    for start in range(0, dim, 8):
        c = start + lane
        there = c < dim
        c = c.to(tl.int64)
        a = _double(tl.load(x[:, None] + (c * column)[None, :], mask=inside[:, None] & there[None, :], other=0.0))
        b = _double(tl.load(y + c * y_column, mask=there, other=0.0))
        if METRIC == _COSINE:
            a, b = _unit(a, norm[:, None]), _unit(b, y_norm)
        gap = a - b[None, :]
        lanes += tl.abs(gap) if METRIC == _MANHATTAN else gap * gap
    if METRIC == _COSINE:  # the direction of zero vectors is the coordinate after the last
        differs = (norm == 0) != (y_norm == 0)
        lanes += tl.where((lane == dim % 8)[None, :] & differs[:, None], 1.0, 0.0).to(tl.float64)
    return _by_halves(lanes)


@triton.jit
def _screened(
    x, column, inside, norm, y, y_column, y_norm, dim, METRIC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """Sums (BM,) in float32, for values."""
    total = tl.zeros([BM, BD], tl.float32)
    if METRIC == _COSINE:
        scale, y_scale = _inverse(norm), _inverse(y_norm)
    for start in range(0, dim, BD):
        c = start + tl.arange(0, BD)
        there = c < dim
        c = c.to(tl.int64)
        a = tl.load(x[:, None] + (c * column)[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        b = tl.load(y + c * y_column, mask=there, other=0.0)
        a, b = cast(a, tl.float32), cast(b, tl.float32)
        if METRIC == _COSINE:
            a, b = a * scale[:, None], b * y_scale
        gap = a - b[None, :]
        total += tl.abs(gap) if METRIC == _MANHATTAN else gap * gap
    found = tl.sum(total, 1)
    if METRIC == _COSINE:
        found += tl.where((norm == 0) != (y_norm == 0), 1.0, 0.0)
    return found


@triton.jit
def _nearer(
    x,
    column,
    inside,
    norm,
    y,
    y_column,
    y_norm,
    nearest,
    dim,
    keep,
    slack,
    METRIC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """`nearest` (BM,) with a center taken into account, and where it is the nearer one."""
    value = nearest
    if x.dtype.element_ty == tl.float64:
        value = _exact(x, column, inside, norm, y, y_column, y_norm, dim, METRIC, BM)
    else:
        found = _screened(x, column, inside, norm, y, y_column, y_norm, dim, METRIC, BM, BD)
        settled = (found <= _LARGEST) & (found.to(tl.float64) * keep - slack >= nearest)
        if tl.max(((nearest > 0) & (settled == 0)).to(tl.int32), 0) > 0:
            value = _exact(x, column, inside, norm, y, y_column, y_norm, dim, METRIC, BM)
    closer = value < nearest
    return tl.where(closer, value, nearest), closer


@triton.jit(do_not_specialize=["count", "dim"])
def norms_kernel(points, norms, cloud: tl.int64, row: tl.int64, column: tl.int64, count, dim, tiles, BM: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    i = pid % tiles * BM + tl.arange(0, BM)
    inside = i < count
    x = points + (pid // tiles * cloud + i * row)
    lanes = tl.zeros([BM, 8], tl.float64)
    for start in range(0, dim, 8):
        c = start + tl.arange(0, 8)
        there = c < dim
        at = (c.to(tl.int64) * column)[None, :]
        a = _double(tl.load(x[:, None] + at, mask=inside[:, None] & there[None, :], other=0.0))
        lanes += a * a
    tl.store(norms + (pid // tiles * count + i), tl.sqrt(_by_halves(lanes)), mask=inside)


# --- traversals --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "dim", "given", "rounds", "first", "end"])
def traverse_kernel(
    points,
    initial,
    norms,
    values,
    labels,
    indices,
    radii,
    farthest,
    farthest_at,
    cloud: tl.int64,
    row: tl.int64,
    column: tl.int64,
    count: tl.int64,
    dim,
    given: tl.int64,
    rounds: tl.int64,
    first: tl.int64,
    end: tl.int64,
    clouds: tl.int64,
    parts,
    share,
    keep: tl.float64,
    slack: tl.float64,
    METRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Rounds `first` to `end` of a part of a cloud: `share` tiles. What was farthest of each part after a round stands
    in `farthest` (2, clouds, parts), by whether the round was even."""
    pid = tl.program_id(0).to(tl.int64)
    which, part = pid // parts, pid % parts
    points += which * cloud
    values += which * count
    labels += which * count
    if METRIC == _COSINE:
        norms += which * count
    best = tl.full([], 0.0, tl.float64)
    best_at = tl.full([], 0, tl.int64)
    if first > 0:
        of = tl.arange(0, PARTS)
        slot = ((first - 1) % 2 * clouds + which) * parts + of
        found = tl.load(farthest + slot, mask=of < parts, other=-_INF)
        at = tl.load(farthest_at + slot, mask=of < parts, other=_LAST)
        best = tl.max(found, 0)
        best_at = tl.min(tl.where(found == best, at, _LAST), 0)
        if part == 0:
            tl.store(radii + (which * rounds + first - 1), tl.maximum(best, 0.0))
    for number in range(first, end):
        chosen = tl.where(best < 0, -1, best_at)  # -1 when no point is left
        if number < given:
            chosen = tl.load(initial + (which * given + number))
        if part == 0:
            tl.store(indices + (which * rounds + number), chosen)
        best = tl.full([], -1.0, tl.float64)
        best_at = tl.full([], 0, tl.int64)
        if chosen >= 0:
            y = points + chosen * row
            y_norm = tl.full([], 1.0, tl.float64)
            if METRIC == _COSINE:
                y_norm = tl.load(norms + chosen)
            for tile in range(part * share, part * share + share):
                i = (tl.full([], 0, tl.int64) + tile) * BM + tl.arange(0, BM)
                inside = i < count
                before = tl.load(values + i, mask=inside, other=-_INF)
                if METRIC == _PRECOMPUTED:
                    value = _double(tl.load(y + i * column, mask=inside, other=0.0)) + 0.0  # −0 becomes 0
                    closer = value < before
                    nearest = tl.where(closer, value, before)
                else:
                    norm = before
                    if METRIC == _COSINE:
                        norm = tl.load(norms + i, mask=inside, other=1.0)
                    nearest, closer = _nearer(
                        points + i * row, column, inside, norm, y, column, y_norm, before, dim, keep, slack,
                        METRIC, BM, BD,
                    )  # fmt: skip
                tl.store(labels + i, tl.full([BM], 0, tl.int64) + number, mask=inside & closer)
                nearest = tl.where(i == chosen, -1.0, nearest)  # below every distance: never chosen again
                tl.store(values + i, nearest, mask=inside & (closer | (i == chosen)))
                most = tl.max(nearest, 0)
                if most > best:
                    best = most
                    best_at = tl.min(tl.where(nearest == most, i, _LAST), 0)
        if PARTS > 1:
            slot = (number % 2 * clouds + which) * parts + part
            tl.store(farthest + slot, best)
            tl.store(farthest_at + slot, best_at)
        else:
            tl.store(radii + (which * rounds + number), tl.maximum(best, 0.0))
            tl.debug_barrier()  # the next round reads what this one wrote


@triton.jit(do_not_specialize=["count", "dim", "centers"])
def relax_kernel(
    points,
    y,
    mask,
    given,
    norms,
    y_norms,
    values,
    labels,
    row: tl.int64,
    column: tl.int64,
    y_row: tl.int64,
    y_column: tl.int64,
    count: tl.int64,
    dim,
    centers,
    keep: tl.float64,
    slack: tl.float64,
    METRIC: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = i < count
    nearest = tl.full([BM], _INF, tl.float64)
    if given is not None:
        nearest = tl.load(given + i, mask=inside, other=_INF)
    allowed = inside
    if mask is not None:
        allowed = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    nearest = tl.where(allowed, nearest, -_INF)
    label = tl.full([BM], -1, tl.int64)
    norm = nearest
    if METRIC == _COSINE:
        norm = tl.load(norms + i, mask=inside, other=1.0)
    for number in range(centers):
        y_norm = tl.full([], 1.0, tl.float64)
        if METRIC == _COSINE:
            y_norm = tl.load(y_norms + (tl.full([], 0, tl.int64) + number))
        nearest, closer = _nearer(
            points + i * row, column, inside, norm, y, y_column, y_norm, nearest, dim, keep, slack, METRIC, BM, BD
        )
        label = tl.where(closer, number, label)
        y += y_row
    tl.store(values + i, tl.where(allowed, nearest, _INF), mask=inside)
    tl.store(labels + i, label, mask=inside)


# --- launches ----------------------------------------------------------------------------------------------------


def _power(number: int) -> int:
    return int(triton.next_power_of_2(max(1, number)))


def _sizes(count: int, dim: int) -> dict[str, int]:
    """Tiles of about _TILE coordinates."""
    BD = min(64, max(8, _power(dim)))
    return {"BM": min(_TILE // BD, max(16, _power(count))), "BD": BD}


def _margin(dim: int, metric: int) -> dict[str, float]:
    """A float32 sum times keep, less slack, is at most the value. With u = 2⁻²⁴: a difference, a product and at most
    dim + 3 sums, steps that may lose 2⁻¹²⁵ to underflow; unit vectors are off by 3.1u each, and the square of their
    difference, at most 4, by less than 32u."""
    return {"keep": 1 - (dim + 8) * 2.0**-24, "slack": dim * 2.0**-125 + 2.0**-19 * (metric == _op.COSINE)}


def _norms(points: Tensor) -> Tensor:
    """Lengths (clouds, n) of points (clouds, n, d)."""
    clouds, count, dim = points.shape
    norms = torch.empty(clouds, count, dtype=torch.float64, device=points.device)
    BM = min(_TILE // 8, max(16, _power(count)))
    tiles = triton.cdiv(count, BM)
    norms_kernel[(clouds * tiles,)](
        points, norms, *points.stride(), count, dim, tiles, BM=BM, num_warps=_WARPS, enable_fp_fusion=False
    )
    return norms


def _distance(value: Tensor, metric: int) -> Tensor:
    if metric == _op.EUCLIDEAN:
        return root(value)
    return value.div_(2) if metric == _op.COSINE else value


def k_center(
    points: Tensor, initial: Tensor, mask: Tensor | None, k: int, metric: int, engine: int, assign: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = points.shape[:-2]
    x = points if batch else points[None]
    clouds, count = x.shape[:2]
    doubles: dict[str, Any] = {"dtype": torch.float64, "device": points.device}
    if mask is None:
        values = torch.full((*batch, count), math.inf, **doubles)
        labels = torch.zeros_like(values, dtype=torch.int64)
    else:
        labels = torch.where(mask, 0, -1)
        values = torch.where(mask, torch.full((), math.inf, **doubles), -math.inf)
    indices = torch.empty(*batch, k, dtype=torch.int64, device=points.device)
    radii = torch.empty(*batch, k, **doubles)
    if clouds and count:
        with torch.cuda.device_of(points):
            _traverse(x, initial.contiguous(), values, labels, indices, radii, k, metric)
    if not assign:
        return indices, _distance(radii, metric), labels.new_empty(*batch, 0), values.new_empty(*batch, 0)
    absent = values == -math.inf
    distances = _distance(values.clamp_(min=0), metric).masked_fill_(absent, math.inf)
    return indices, _distance(radii, metric), labels, distances


def _traverse(
    x: Tensor, initial: Tensor, values: Tensor, labels: Tensor, indices: Tensor, radii: Tensor, k: int, metric: int
) -> None:
    clouds, count, dim = x.shape
    norms = _norms(x) if metric == _op.COSINE else None
    sizes = _sizes(count, 1 if metric == _op.PRECOMPUTED else dim)
    tiles = triton.cdiv(count, sizes["BM"])
    bytes_read = count * (8 + (1 if metric == _op.PRECOMPUTED else dim) * x.element_size())
    programs = 1 if bytes_read <= _ALONE else max(1, _programs(x.device) // clouds)
    share = triton.cdiv(tiles, min(tiles, programs))
    parts = triton.cdiv(tiles, share)
    farthest = torch.empty(2 * clouds * parts, dtype=torch.float64, device=x.device)
    farthest_at = torch.empty_like(farthest, dtype=torch.int64)
    rounds = [(0, k)] if parts == 1 else [(number, min(number + 1, k)) for number in range(k + 1)]
    for first, end in rounds:
        traverse_kernel[(clouds * parts,)](
            x, initial, norms, values, labels, indices, radii, farthest, farthest_at, *x.stride(), count, dim,
            initial.shape[-1], k, first, end, clouds, parts, share, **_margin(dim, metric), METRIC=metric,
            PARTS=_power(parts), **sizes, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def cover(points: Tensor, indices: Tensor, mask: Tensor | None, metric: int) -> tuple[Tensor, Tensor, Tensor]:
    return k_center(points, indices, mask, len(indices), metric, _op.AUTO)[1:]


def relax(
    points: Tensor, centers: Tensor, mask: Tensor | None, nearest: Tensor | None, metric: int
) -> tuple[Tensor, Tensor]:
    count, dim = points.shape
    values = torch.empty(count, dtype=torch.float64, device=points.device)
    labels = torch.empty_like(values, dtype=torch.int64)
    if count == 0:
        return values, labels
    with torch.cuda.device_of(points):
        cosine = metric == _op.COSINE and len(centers) > 0
        sizes = _sizes(count, dim)
        relax_kernel[(triton.cdiv(count, sizes["BM"]),)](
            points,
            centers,
            None if mask is None else mask.contiguous(),
            None if nearest is None else nearest.contiguous(),
            _norms(points[None]) if cosine else None,
            _norms(centers[None]) if cosine else None,
            values,
            labels,
            *points.stride(),
            *centers.stride(),
            count,
            dim,
            len(centers),
            **_margin(dim, metric),
            METRIC=metric if len(centers) else _op.EUCLIDEAN,
            **sizes,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return values, labels


@functools.cache
def _programs(device: torch.device) -> int:
    """Enough to fill the device."""
    if device.type == "cpu":  # the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * 4
