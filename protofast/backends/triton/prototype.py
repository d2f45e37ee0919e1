"""Prototype distances in Triton: screen all patches by the fast form, then measure the winners by the direct one.

The screen maximises x·p − |x|²/2 (x·p/|x| for cosine, x·p for dot) with patches as rows and prototypes as columns of a
tile. What it cannot decide (a score that is not finite or, to verify, a rival within the bound of rounding) the second
kernel decides in a rarely taken branch, which goes through every patch in float64.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast._ops import prototype as _op
from protofast.backends.reference import prototype as _reference

from . import _INTERPRETED
from .philox import cast

_SQEUCLIDEAN = tl.constexpr(_op.SQEUCLIDEAN)
_EUCLIDEAN = tl.constexpr(_op.EUCLIDEAN)
_COSINE = tl.constexpr(_op.COSINE)
_DOT = tl.constexpr(_op.DOT)
_NONE = tl.constexpr(_op.NONE)
_LOG = tl.constexpr(_op.LOG)
_LINEAR = tl.constexpr(_op.LINEAR)
_EXP = tl.constexpr(_op.EXP)
_RECIPROCAL = tl.constexpr(_op.RECIPROCAL)

# How products are made: of what the inputs are, of their rounding, or of three parts of it.
HALF, IEEE, TF32X3, TF32, BF16, DOUBLE = range(6)
_HALF, _IEEE, _TF32X3 = tl.constexpr(HALF), tl.constexpr(IEEE), tl.constexpr(TF32X3)
_TF32, _BF16, _DOUBLE = tl.constexpr(TF32), tl.constexpr(BF16), tl.constexpr(DOUBLE)
_ROUNDOFF = {HALF: 0.0, IEEE: 0.0, TF32X3: 2.0**-21, TF32: 2.0**-11, BF16: 2.0**-8, DOUBLE: 0.0}

_AXES = 3
_MOST = 32  # of topk
_EMULATED = tl.constexpr(_INTERPRETED)
_INF = tl.constexpr(math.inf)
_FAR = tl.constexpr(2**31 - 1)  # an index after all others
_LAST = tl.constexpr(2**63 - 1)
RUN = 32  # channels summed up before they are added to the rest


# --- where things lie ------------------------------------------------------------------------------------------


@triton.jit
def _place(n, size1, size2, stride0, stride1, stride2, AXES: tl.constexpr):
    """Offset of patch n (int32) in its channel."""
    if AXES == 1:
        return n.to(tl.int64) * stride2
    elif AXES == 2:
        return (n // size2).to(tl.int64) * stride1 + (n % size2).to(tl.int64) * stride2
    else:
        high = n // size2
        there = (high // size1).to(tl.int64) * stride0 + (high % size1).to(tl.int64) * stride1
        return there + (n % size2).to(tl.int64) * stride2


@triton.jit
def _shift(k, stride0, stride1, stride2, KERNEL1: tl.constexpr, KERNEL2: tl.constexpr):
    """Offset of pixel k of a window."""
    k = tl.full([], 0, tl.int64) + k
    return k // (KERNEL1 * KERNEL2) * stride0 + k // KERNEL2 % KERNEL1 * stride1 + k % KERNEL2 * stride2


@triton.jit
def _take(tensor, place, inside, ACC: tl.constexpr):
    return cast(tl.load(tensor + place, mask=inside, other=0.0), ACC).to(
        ACC
    )  # a cast in the interpreter stops at float32


# --- the screen ------------------------------------------------------------------------------------------------


@triton.jit
def _rounded(value, KIND: tl.constexpr):
    if KIND == _BF16:
        return cast(value, tl.bfloat16)
    elif KIND == _TF32:
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    else:
        return value


@triton.jit
def _multiply(x, p, total, KIND: tl.constexpr):
    if _EMULATED:
        return tl.dot(cast(x, tl.float32), cast(p, tl.float32), total)
    elif KIND == _TF32:
        return tl.dot(x, p, total, input_precision="tf32")
    elif KIND == _TF32X3:
        return tl.dot(x, p, total, input_precision="tf32x3")
    else:
        return tl.dot(x, p, total, input_precision="ieee")


@triton.jit
def screen_kernel(
    x,
    p,
    mask,
    value,
    index,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    window0: tl.int64,
    window1: tl.int64,
    window2: tl.int64,
    patches,
    channels,
    prototypes,
    blocks,
    splits,
    span,
    weight: tl.float64,
    METRIC: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    RANKS: tl.constexpr,
    RANKS2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The best RANKS scores of a split of a sample's patches, for BN prototypes, best first.

    +inf stands for a score that is not finite, −inf for no patch. The lower index wins a tie.
    """
    ACC: tl.constexpr = tl.float64 if KIND == _DOUBLE else tl.float32
    TINY: tl.constexpr = 2.0**-900 if KIND == _DOUBLE else 2.0**-90
    pid = tl.program_id(0)
    q = pid % blocks * BN + tl.arange(0, BN)
    split = pid // blocks % splits
    b = (pid // blocks // splits).to(tl.int64)
    x += b * sample_stride
    real = q < prototypes
    row = q.to(tl.int64) * channels * KERNEL
    rows = tl.arange(0, BM)
    tiles = (patches + BM - 1) // BM
    best = tl.full([BM, BN], -_INF, ACC)
    at = tl.zeros([BM, BN], tl.int32)
    if RANKS > 1:
        rank = tl.arange(0, RANKS2)[None, :]
        best = tl.full([BN, RANKS2], -_INF, ACC)
        at = tl.full([BN, RANKS2], -1, tl.int32)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        n = tile * BM + rows
        inside = n < patches
        place = _place(n, size1, size2, stride0, stride1, stride2, AXES)
        score = tl.zeros([BM, BN], ACC)
        norm = tl.zeros([BM], ACC)
        largest = tl.zeros([BM], ACC)
        for k in range(KERNEL):
            shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
            if KIND == _DOUBLE:
                for j in range(channels):
                    d = tl.full([], 0, tl.int64) + j
                    xs = tl.load(x + (place + (shift + d * channel_stride)), mask=inside, other=0.0)
                    ps = tl.load(p + (row + (d * KERNEL + k)), mask=real, other=0.0)
                    score += xs[:, None] * ps[None, :]
                    norm += xs * xs
                    largest = tl.maximum(largest, tl.abs(xs))
            else:
                for start in range(0, channels, BK):
                    d = start + tl.arange(0, BK)
                    there = d < channels
                    d = d.to(tl.int64)
                    xs = tl.load(
                        x + (place[:, None] + (shift + d * channel_stride)[None, :]),
                        mask=inside[:, None] & there[None, :],
                        other=0.0,
                    )
                    ps = tl.load(
                        p + (row[None, :] + (d * KERNEL + k)[:, None]), mask=there[:, None] & real[None, :], other=0.0
                    )
                    xs, ps = _rounded(xs, KIND), _rounded(ps, KIND)
                    score = _multiply(xs, ps, score, KIND)
                    if NORM:
                        xs = cast(xs, ACC)
                        norm += tl.sum(xs * xs, 1)
                        if METRIC == _COSINE:
                            largest = tl.maximum(largest, tl.max(tl.abs(xs), 1))
        if METRIC == _COSINE:
            score = score * tl.where(norm > 0, 1 / tl.sqrt(norm), 0.0)[:, None]
            unsure = ((norm < TINY) & (largest > 0)) | ((norm < _INF) == 0)
            score = tl.where(unsure[:, None], _INF, score)
        elif NORM:
            score -= (norm * tl.full([], weight, ACC))[:, None]
        score = tl.where(tl.abs(score) < _INF, score, _INF)
        allowed = inside
        if mask is not None:
            allowed = tl.load(mask + (b * patches + n), mask=inside, other=0) != 0
        score = tl.where(allowed[:, None], score, -_INF)
        if RANKS == 1:
            better = score > best
            best = tl.where(better, score, best)
            at = tl.where(better, tile, at)
        else:
            old, old_at = best, at
            for r in range(RANKS):
                new = tl.max(score, 0)
                new_at = tl.min(tl.where(score == new[None, :], n[:, None], _FAR), 0)
                top = tl.max(old, 1)
                top_at = tl.min(tl.where(old == top[:, None], old_at, _FAR), 1)
                stays = top >= new  # what came before has the lower index
                v = tl.where(stays, top, new)
                i = tl.where(v == -_INF, -1, tl.where(stays, top_at, new_at))
                best = tl.where(rank == r, v[:, None], best)
                at = tl.where(rank == r, i[:, None], at)
                old = tl.where(stays[:, None] & (old_at == i[:, None]), -_INF, old)
                score = tl.where((stays == 0)[None, :] & (n[:, None] == i[None, :]), -_INF, score)
    # (sample, prototype, split, rank)
    out = ((b * prototypes + q) * splits + split) * RANKS
    if RANKS == 1:
        top = tl.max(best, 0)
        first = tl.min(tl.where(best == top[None, :], at * BM + rows[:, None], _FAR), 0)
        tl.store(value + out, top, mask=real)
        tl.store(index + out, tl.where(top == -_INF, -1, first), mask=real)
    else:
        here = real[:, None] & (rank < RANKS)
        tl.store(value + (out[:, None] + rank), best, mask=here)
        tl.store(index + (out[:, None] + rank), at, mask=here)


# --- the direct form -------------------------------------------------------------------------------------------


@triton.jit
def _finished(distance, METRIC: tl.constexpr):
    if METRIC == _EUCLIDEAN:
        return tl.sqrt(distance)
    else:
        return distance


@triton.jit
def _activated(d, eps, ACTIVATION: tl.constexpr):
    """In float64."""
    if ACTIVATION == _LOG:
        z = (1 - eps) / (d + eps)
        w = 1 + z
        # log1p: what 1 + z lost, the quotient has lost as well
        small = tl.where(w == 1, 1.0, w - 1)
        return tl.where((w == 1) | (z == _INF), z, tl.log(w) * (z / small))
    elif ACTIVATION == _LINEAR:
        return -d
    elif ACTIVATION == _EXP:
        return tl.exp(-d)
    else:
        return 1 / (d + 1)


@triton.jit
def _key(d):
    """Integers in the order of distances: NaN, −inf, …, +inf, below _LAST. −0 is 0."""
    bits = tl.where(d == 0, 0.0, d).to(tl.int64, bitcast=True)
    return tl.where(d == d, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF), -0x8000000000000000)


@triton.jit
def _direct_tile(
    x,
    p,
    place,
    inside,
    row,
    real,
    channel_stride,
    window0,
    window1,
    window2,
    channels,
    METRIC: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Distances (squared for euclidean) of BN prototypes to BM patches: (BN, BM). The sum of every pair has the same
    order, so that equal patches get equal bits. Sums RUN channels at a time."""
    x_scale = tl.full([BM], 1, ACC)
    p_scale = tl.full([BN], 1, ACC)
    empty = tl.full([BN, BM], 0, tl.int1)
    if METRIC == _COSINE:
        x_norm = tl.zeros([BM], ACC)
        p_norm = tl.zeros([BN], ACC)
        for k in range(KERNEL):
            shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
            for j in range(channels):
                d = tl.full([], 0, tl.int64) + j
                xs = _take(x, place + (shift + d * channel_stride), inside, ACC)
                ps = _take(p, row + (d * KERNEL + k), real, ACC)
                x_norm += xs * xs
                p_norm += ps * ps
        empty = p_norm[:, None] * x_norm[None, :] == 0
        x_scale, p_scale = tl.sqrt(x_norm), tl.sqrt(p_norm)
    total = tl.zeros([BN, BM], ACC)
    for k in range(KERNEL):
        shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
        for start in range(0, channels, RUN):
            part = tl.zeros([BN, BM], ACC)
            for j in range(start, tl.minimum(start + RUN, channels)):
                d = tl.full([], 0, tl.int64) + j
                xs = _take(x, place + (shift + d * channel_stride), inside, ACC)
                ps = _take(p, row + (d * KERNEL + k), real, ACC)
                if METRIC == _COSINE:
                    xs, ps = xs / x_scale, ps / p_scale
                if METRIC == _DOT:
                    part -= ps[:, None] * xs[None, :]
                else:
                    gap = ps[:, None] - xs[None, :]
                    part += gap * gap
            total += part
    if METRIC == _COSINE:
        total = tl.where(empty, 1.0, total * 0.5)
    return total


@triton.jit
def refine_kernel(
    x,
    p,
    mask,
    value,
    index,
    activated,
    distance,
    winner,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    window0: tl.int64,
    window1: tl.int64,
    window2: tl.int64,
    patches,
    channels,
    prototypes,
    blocks,
    candidates,
    eps: tl.float64,
    slack: tl.float64,
    underflow: tl.float64,
    METRIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    VERIFY: tl.constexpr,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK2: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
):
    """Joins the splits, measures the winners of BN prototypes in float64, in order of distance, then of index."""
    OUT: tl.constexpr = distance.dtype.element_ty
    TINY: tl.constexpr = 2.0**-900 if distance.dtype.element_ty == tl.float64 else 2.0**-90
    pid = tl.program_id(0)
    lane = tl.arange(0, BN)
    q = pid % blocks * BN + lane
    b = (pid // blocks).to(tl.int64)
    x += b * sample_stride
    real = q < prototypes
    row = q.to(tl.int64) * channels * KERNEL
    out = b * prototypes + q

    c = tl.arange(0, BC)[None, :]
    here = real[:, None] & (c < candidates)
    scores = tl.load(value + (out[:, None] * candidates + c), mask=here, other=-_INF)
    places = tl.load(index + (out[:, None] * candidates + c), mask=here, other=-1)
    doubt = tl.max(scores, 1) == _INF
    rank = tl.arange(0, TOPK2)[None, :]
    found = tl.full([BN, TOPK2], _INF, tl.float64)
    found_at = tl.full([BN, TOPK2], _FAR, tl.int32)
    p_norm = tl.zeros([BN], tl.float64)
    furthest = tl.full([BN], -_INF, tl.float64)
    for r in range(TOPK):
        top = tl.max(scores, 1)
        n = tl.min(tl.where(scores == top[:, None], places, _FAR), 1)
        scores = tl.where(places == n[:, None], -_INF, scores)
        chosen = real & (top > -_INF)
        n = tl.where(chosen, n, 0)
        place = _place(n, size1, size2, stride0, stride1, stride2, AXES)
        x_norm = tl.zeros([BN], tl.float64)
        p_norm = tl.zeros([BN], tl.float64)
        d = tl.zeros([BN], tl.float64)
        for half in range(2 if METRIC == _COSINE else 1):
            x_scale, p_scale = tl.sqrt(x_norm), tl.sqrt(p_norm)
            for k in range(KERNEL):
                shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
                for start in range(0, channels, BK):
                    e = start + tl.arange(0, BK)
                    there = (chosen[:, None]) & (e < channels)[None, :]
                    e = e.to(tl.int64)
                    xs = _take(x, place[:, None] + (shift + e * channel_stride)[None, :], there, tl.float64)
                    ps = _take(p, row[:, None] + (e * KERNEL + k)[None, :], there, tl.float64)
                    if METRIC == _COSINE:
                        if half == 0:
                            x_norm += tl.sum(xs * xs, 1)
                            p_norm += tl.sum(ps * ps, 1)
                        else:
                            gap = tl.where(there, xs / x_scale[:, None] - ps / p_scale[:, None], 0.0)
                            d += tl.sum(gap * gap, 1)
                    elif METRIC == _DOT:
                        d -= tl.sum(xs * ps, 1)
                        p_norm += tl.sum(ps * ps, 1)
                    else:
                        gap = xs - ps
                        d += tl.sum(gap * gap, 1)
                        p_norm += tl.sum(ps * ps, 1)
        if METRIC == _COSINE:
            d = tl.where(x_norm * p_norm == 0, 1.0, d * 0.5)
            doubt = doubt | (chosen & (p_norm > 0) & (p_norm < TINY))
        doubt = doubt | (chosen & ((tl.abs(d) < _INF) & (p_norm < _INF) == 0))
        furthest = tl.maximum(furthest, tl.where(chosen, d, -_INF))
        found = tl.where((rank == r) & chosen[:, None], d[:, None], found)
        found_at = tl.where((rank == r) & chosen[:, None], n[:, None], found_at)
    if VERIFY:
        # The next score, with all that rounding may have taken from it, against the furthest of those found.
        rival = tl.max(scores, 1).to(tl.float64)
        if METRIC == _COSINE:
            length = tl.sqrt(p_norm)
            clear = rival + slack * length + underflow < (1 - furthest) * length
        elif METRIC == _DOT:
            clear = rival + slack * p_norm + underflow < -furthest
        else:
            clear = rival + slack * p_norm + underflow < (p_norm - furthest) * 0.5
        doubt = doubt | ((rival > -_INF) & (clear == 0))
    doubt = doubt & real

    for r in range(TOPK):
        d = tl.min(found, 1)
        n = tl.min(tl.where(found == d[:, None], found_at, _FAR), 1)
        found = tl.where((found_at == n[:, None]) & (n != _FAR)[:, None], _INF, found)
        found_at = tl.where(found_at == n[:, None], _FAR, found_at)
        write = real & (doubt == 0)
        result = _finished(d, METRIC).to(OUT)
        tl.store(distance + (out * TOPK + r), result, mask=write)
        tl.store(winner + (out * TOPK + r), tl.where(n == _FAR, -1, n).to(tl.int64), mask=write)
        if ACTIVATION != _NONE:
            a = _activated(result.to(tl.float64), eps, ACTIVATION)
            tl.store(activated + (out * TOPK + r), a.to(OUT), mask=write)

    if tl.max(doubt.to(tl.int32), 0) > 0:
        for i in range(BN):
            if tl.max(tl.where(lane == i, doubt.to(tl.int32), 0), 0) > 0:
                one = pid % blocks * BN + i + tl.arange(0, 1)
                key = tl.full([], -0x8000000000000000, tl.int64)
                at = tl.full([], -1, tl.int32)
                one_out = b * prototypes + one
                for r in range(TOPK):
                    next_key = tl.full([], _LAST, tl.int64)
                    next_at = tl.full([], -1, tl.int32)
                    next_d = tl.full([], _INF, tl.float64)
                    for start in range(0, patches, BM):
                        n = start + tl.arange(0, BM)
                        inside = n < patches
                        place = _place(n, size1, size2, stride0, stride1, stride2, AXES)
                        d = _direct_tile(
                            x,
                            p,
                            place,
                            inside,
                            one.to(tl.int64) * channels * KERNEL,
                            one < prototypes,
                            channel_stride,
                            window0,
                            window1,
                            window2,
                            channels,
                            METRIC,
                            KERNEL,
                            KERNEL1,
                            KERNEL2,
                            BM,
                            1,
                            1 << 30,
                            tl.float64,
                        )
                        keys = _key(d)
                        allowed = inside
                        if mask is not None:
                            allowed = tl.load(mask + (b * patches + n), mask=inside, other=0) != 0
                        # after the one before
                        after = (keys > key) | ((keys == key) & (n > at)[None, :])
                        keys = tl.where(allowed[None, :] & after, keys, _LAST)
                        least = tl.min(tl.min(keys, 1), 0)
                        if least < next_key:
                            is_it = keys == least
                            next_key = least
                            next_at = tl.min(tl.min(tl.where(is_it, n[None, :], _FAR), 1), 0)
                            # of its one element: a sum keeps a NaN
                            next_d = tl.sum(tl.sum(tl.where(is_it & (n == next_at)[None, :], d, 0.0), 1), 0)
                    key, at = next_key, next_at
                    result = _finished(next_d + tl.zeros([1], tl.float64), METRIC).to(OUT)
                    tl.store(distance + (one_out * TOPK + r), result)
                    tl.store(winner + (one_out * TOPK + r), next_at.to(tl.int64) + tl.zeros([1], tl.int64))
                    if ACTIVATION != _NONE:
                        a = _activated(result.to(tl.float64), eps, ACTIVATION)
                        tl.store(activated + (one_out * TOPK + r), a.to(OUT))


@triton.jit
def map_kernel(
    x,
    p,
    out,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    window0: tl.int64,
    window1: tl.int64,
    window2: tl.int64,
    patches,
    channels,
    prototypes,
    blocks,
    tiles,
    METRIC: tl.constexpr,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
):
    OUT: tl.constexpr = out.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if METRIC == _COSINE else OUT  # whose unit vectors cancel
    TINY: tl.constexpr = 2.0**-80
    pid = tl.program_id(0)
    q = pid % blocks * BN + tl.arange(0, BN)
    n = pid // blocks % tiles * BM + tl.arange(0, BM)
    b = (pid // blocks // tiles).to(tl.int64)
    x += b * sample_stride
    real, inside = q < prototypes, n < patches
    row = q.to(tl.int64) * channels * KERNEL
    place = _place(n, size1, size2, stride0, stride1, stride2, AXES)
    here = real[:, None] & inside[None, :]
    to = out + ((b * prototypes + q)[:, None] * patches + n[None, :])
    d = _direct_tile(
        x,
        p,
        place,
        inside,
        row,
        real,
        channel_stride,
        window0,
        window1,
        window2,
        channels,
        METRIC,
        KERNEL,
        KERNEL1,
        KERNEL2,
        BM,
        BN,
        RUN,
        ACC,
    )
    tl.store(to, _finished(d, METRIC).to(OUT), mask=here)
    if METRIC != _COSINE and out.dtype.element_ty == tl.float32:
        # where float32 may have run over or under on the way
        unsure = (tl.abs(d) < _INF) == 0
        if METRIC != _DOT:
            unsure = unsure | (d < TINY)
        unsure = unsure & here
        if tl.max(tl.max(unsure.to(tl.int32), 1), 0) > 0:
            wide = _direct_tile(
                x,
                p,
                place,
                inside,
                row,
                real,
                channel_stride,
                window0,
                window1,
                window2,
                channels,
                METRIC,
                KERNEL,
                KERNEL1,
                KERNEL2,
                BM,
                BN,
                RUN,
                tl.float64,
            )
            tl.store(to, _finished(wide, METRIC).to(OUT), mask=unsure)


# --- gradients -------------------------------------------------------------------------------------------------


@triton.jit
def _gain(grad_activation, grad_distance, distance, place, chosen, eps, ACTIVATION: tl.constexpr, METRIC: tl.constexpr):
    """Gradient by the distance, with the factor that sqeuclidean and euclidean have before x − p; and the distance."""
    ACC: tl.constexpr = distance.dtype.element_ty
    d = tl.load(distance + place, mask=chosen, other=0.0)
    g = tl.zeros_like(d)
    if grad_distance is not None:
        g += tl.load(grad_distance + place, mask=chosen, other=0.0)
    if grad_activation is not None:
        e = tl.full([], eps, ACC)
        a = tl.load(grad_activation + place, mask=chosen, other=0.0)
        if ACTIVATION == _LOG:
            a = a * ((e - 1) / ((d + 1) * (d + e)))
        elif ACTIVATION == _LINEAR:
            a = -a
        elif ACTIVATION == _EXP:
            a = a * -tl.exp(-d)
        elif ACTIVATION == _RECIPROCAL:
            a = a * (-1 / ((d + 1) * (d + 1)))
        g += tl.where(chosen, a, 0.0)
    if METRIC == _SQEUCLIDEAN:
        g = g * 2
    elif METRIC == _EUCLIDEAN:
        g = g * tl.where(d == 0, 0.0, 1 / tl.where(d == 0, 1.0, d))
    return g, d


@triton.jit
def lengths_kernel(
    x,
    p,
    index,
    x_inverse,
    p_inverse,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    window0: tl.int64,
    window1: tl.int64,
    window2: tl.int64,
    channels,
    winners,
    prototypes,
    topk,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """1/|x| of every winner, and 1/|p|; 0 where the length is."""
    OUT: tl.constexpr = x_inverse.dtype.element_ty
    w = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    there = w < winners
    n = tl.load(index + w, mask=there, other=-1).to(tl.int32)
    chosen = n >= 0
    q = w // topk % prototypes
    base = w // topk // prototypes * sample_stride
    base += _place(tl.where(chosen, n, 0), size1, size2, stride0, stride1, stride2, AXES)
    x_norm, p_norm = tl.zeros([BN], tl.float64), tl.zeros([BN], tl.float64)
    for k in range(KERNEL):
        shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
        for start in range(0, channels, BK):
            d = start + tl.arange(0, BK)
            inside = (d < channels)[None, :]
            d = d.to(tl.int64)
            xs = _take(x, base[:, None] + (shift + d * channel_stride)[None, :], chosen[:, None] & inside, tl.float64)
            row = (q * channels * KERNEL)[:, None] + (d * KERNEL + k)[None, :]
            ps = _take(p, row, there[:, None] & inside, tl.float64)
            x_norm += tl.sum(xs * xs, 1)
            p_norm += tl.sum(ps * ps, 1)
    x_norm = tl.where(x_norm == 0, 0.0, 1 / tl.sqrt(tl.where(x_norm == 0, 1.0, x_norm)))
    p_norm = tl.where(p_norm == 0, 0.0, 1 / tl.sqrt(tl.where(p_norm == 0, 1.0, p_norm)))
    tl.store(x_inverse + w, x_norm.to(OUT), mask=there)
    tl.store(p_inverse + q, p_norm.to(OUT), mask=there & (w < prototypes * topk) & (w % topk == 0))


@triton.jit
def prototypes_kernel(
    grad_activation,
    grad_distance,
    x,
    p,
    distance,
    index,
    x_inverse,
    p_inverse,
    out,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    window0: tl.int64,
    window1: tl.int64,
    window2: tl.int64,
    channels,
    prototypes,
    blocks,
    winners,
    topk,
    eps: tl.float64,
    METRIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    KERNEL1: tl.constexpr,
    KERNEL2: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
):
    """One prototype, BK of its channels, one pixel of its window: the sum over its `winners`, BB at a time in order."""
    ACC: tl.constexpr = distance.dtype.element_ty
    pid = tl.program_id(0)
    k = pid % KERNEL
    d = pid // KERNEL % blocks * BK + tl.arange(0, BK)
    q = (pid // KERNEL // blocks).to(tl.int64)
    inside = d < channels
    d = d.to(tl.int64)
    shift = _shift(k, window0, window1, window2, KERNEL1, KERNEL2)
    own = q * channels * KERNEL + d * KERNEL + k
    ps = _take(p, own, inside, ACC)[None, :]
    if METRIC == _COSINE:
        p_scale = tl.load(p_inverse + q)
        p_unit = ps * p_scale
    total = tl.zeros([BK], ACC)
    for start in range(0, winners, BB):
        w = start + tl.arange(0, BB)
        b = (w // topk).to(tl.int64)
        at = (b * prototypes + q) * topk + (w % topk).to(tl.int64)
        n = tl.load(index + at, mask=w < winners, other=-1).to(tl.int32)
        chosen = n >= 0
        g, distances = _gain(grad_activation, grad_distance, distance, at, chosen, eps, ACTIVATION, METRIC)
        place = b * sample_stride + _place(tl.where(chosen, n, 0), size1, size2, stride0, stride1, stride2, AXES)
        there = chosen[:, None] & inside[None, :]
        xs = _take(x, place[:, None] + (shift + d * channel_stride)[None, :], there, ACC)
        if METRIC == _DOT:
            part = -g[:, None] * xs
        elif METRIC == _COSINE:
            x_unit = xs * tl.load(x_inverse + at, mask=chosen, other=0.0)[:, None]
            part = (g * p_scale)[:, None] * ((1 - distances)[:, None] * p_unit - x_unit)
        else:
            part = g[:, None] * (ps - xs)
        total += tl.sum(tl.where(there, part, 0.0), 0)
    tl.store(out + own, cast(total, out.dtype.element_ty), mask=inside)


@triton.jit
def features_kernel(
    grad_activation,
    grad_distance,
    x,
    p,
    distance,
    order,
    pixel,
    starts,
    x_inverse,
    p_inverse,
    out,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    channels,
    pixels,
    prototypes,
    blocks,
    tiles,
    topk,
    eps: tl.float64,
    METRIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AXES: tl.constexpr,
    KERNEL: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BQ: tl.constexpr,
):
    """BK channels of BM pixels of a sample: the sum over what won there, BQ at a time in order, or zeros."""
    ACC: tl.constexpr = distance.dtype.element_ty
    pid = tl.program_id(0)
    tile = pid % tiles
    d = pid // tiles % blocks * BK + tl.arange(0, BK)
    b = (pid // tiles // blocks).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    inside = d < channels
    d = d.to(tl.int64)
    x += b * sample_stride
    entries = b * prototypes * topk * KERNEL
    total = tl.zeros([BK, BM], ACC)
    first = tl.load(starts + (b * (tiles + 1) + tile))
    last = tl.load(starts + (b * (tiles + 1) + tile + 1))
    for start in range(first, last, BQ):
        j = start + tl.arange(0, BQ)
        chosen = j < last
        # (winner, pixel of its window), sorted by pixel of the map
        entry = tl.load(order + (entries + j), mask=chosen, other=0)
        n = tl.load(pixel + (entries + j), mask=chosen, other=-1).to(tl.int32)
        w = entry // KERNEL
        q = w // topk
        at = b * prototypes * topk + w
        g, distances = _gain(grad_activation, grad_distance, distance, at, chosen, eps, ACTIVATION, METRIC)
        place = _place(tl.where(chosen, n, 0), size1, size2, stride0, stride1, stride2, AXES)
        there = inside[:, None] & chosen[None, :]
        xs = _take(x, (d * channel_stride)[:, None] + place[None, :], there, ACC)
        own = q * channels * KERNEL + entry % KERNEL
        ps = _take(p, (d * KERNEL)[:, None] + own[None, :], there, ACC)
        if METRIC == _DOT:
            part = -g[None, :] * ps
        elif METRIC == _COSINE:
            x_scale = tl.load(x_inverse + at, mask=chosen, other=0.0)
            p_unit = ps * tl.load(p_inverse + q, mask=chosen, other=0.0)[None, :]
            part = (g * x_scale)[None, :] * ((1 - distances)[None, :] * (xs * x_scale[None, :]) - p_unit)
        else:
            part = g[None, :] * (xs - ps)
        # By choice, not by a product with 0 and 1: a NaN stays in its pixel.
        mine = (n[:, None] == rows[None, :])[None, :, :]
        total += tl.sum(tl.where(mine, part[:, :, None], 0.0), 1)
    to = out + ((b * channels + d)[:, None] * pixels + rows[None, :])
    tl.store(to, cast(total, out.dtype.element_ty), mask=inside[:, None] & (rows < pixels)[None, :])


# --- launches --------------------------------------------------------------------------------------------------


def _merged(sizes: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """Without axes of length 1, and with neighbours as one where they lie like one."""
    size: list[int] = []
    stride: list[int] = []
    for length, step in zip(sizes, strides, strict=True):
        if length == 1:
            continue
        if size and stride[-1] == step * length:
            size[-1], stride[-1] = size[-1] * length, step
        else:
            size.append(length)
            stride.append(step)
    return size or [1], stride or [1]


class _Geometry:
    """How patches and the pixels of a window lie in the features, in up to three axes each; None where in more."""

    def __init__(self, features: Tensor, kernel: list[int]) -> None:
        strides = list(features.stride()[2:])
        grid = [s - k + 1 for s, k in zip(features.shape[2:], kernel, strict=True)]
        self.count = math.prod(grid)
        size, stride = _merged(grid, strides)
        wide = [(k, s) for k, s in zip(kernel, strides, strict=True) if k > 1]
        self.fits = max(len(size), len(wide)) <= _AXES and self.count < 2**31 - 2**16
        pad = [0] * (_AXES - len(size))
        wide = [(1, 0)] * (_AXES - len(wide)) + wide
        self.patches = (
            features.stride(0),
            features.stride(1),
            *([1] * len(pad) + size)[1:_AXES],
            *(pad + stride)[:_AXES],
        )
        self.window = tuple(s for _, s in wide[:_AXES])
        widths = [k for k, _ in wide]
        self.constants = {"AXES": len(size), "KERNEL": math.prod(kernel), "KERNEL1": widths[1], "KERNEL2": widths[2]}


def _located(features: Tensor, kernel: list[int]) -> tuple[Tensor, _Geometry]:
    geometry = _Geometry(features, kernel)
    if not geometry.fits:
        features = features.contiguous()
        geometry = _Geometry(features, kernel)
    return features, geometry


def _power(number: int) -> int:
    return int(triton.next_power_of_2(max(1, number)))


def _kind(dtype: torch.dtype, precision: int) -> int:
    """Products of 16-bit inputs are exact on tensor cores, so there is no coarser or finer way."""
    if dtype == torch.float64:
        return DOUBLE
    if dtype != torch.float32:
        return HALF
    return {_op.TF32X3: TF32X3, _op.TF32: TF32, _op.BF16: BF16}.get(precision, IEEE)


def screen_error(kind: int, metric: int, terms: int) -> float:
    """What rounding may change a score by, as a multiple of |x||p| + |x|²/2 (|p| for cosine): the operands' unit
    roundoff twice, and a sum over `terms` that tensor cores may cut off instead of rounding."""
    u, step = _ROUNDOFF[kind], 2.0**-51 if kind == DOUBLE else 2.0**-22
    if metric == _op.COSINE:
        return 1.25 * (4 * u + (2 * terms + 16) * step)
    return 1.25 * (2 * u + u * u + (terms + 8) * step)


# kind -> BM, most of BN, BK, warps, stages. Without spills on sm_80, 90, 100 and 120: tests/test_triton_prototype.py
_TILES = {
    HALF: (64, 64, 32, 8, 3),
    IEEE: (64, 32, 16, 8, 2),
    TF32X3: (64, 32, 32, 8, 2),
    TF32: (64, 64, 32, 8, 3),
    BF16: (64, 64, 32, 8, 3),
    DOUBLE: (32, 32, 32, 4, 2),
}


def prototype_activation(
    features: Tensor,
    prototypes: Tensor,
    mask: Tensor | None,
    metric: int,
    activation: int,
    eps: float,
    topk: int,
    precision: int,
    verify: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _op.kernel_size(features, prototypes)
    x, geometry = _located(features, kernel)
    if not geometry.fits or topk > _MOST:
        return _reference.prototype_activation(
            features, prototypes, mask, metric, activation, eps, topk, precision, verify
        )
    batch, channels = features.shape[:2]
    count, patches = len(prototypes), geometry.count
    shape = (batch, count) + ((topk,) if topk > 1 else ())
    distance = features.new_empty(shape, dtype=_op.result_dtype(features))
    index = features.new_empty(shape, dtype=torch.int64)
    activated = distance.new_empty(0 if activation == _op.NONE else shape)
    if distance.numel() == 0:
        return activated, distance, index
    p = prototypes.contiguous()
    kind = _kind(features.dtype, precision)
    terms = channels * geometry.constants["KERNEL"]
    error = screen_error(kind, metric, terms) if verify else 0.0
    # |x||p| ≤ (|x|² + |p|²)/2: the part of |x|² goes into the score, that of |p|² is the same for all patches.
    weight, slack = {
        _op.COSINE: (0.0, error),
        _op.DOT: (-error / 2, error / 2),
    }.get(metric, (0.5 - error, error / 2))
    ranks = topk + verify
    BM, BN, BK, warps, stages = _TILES[kind]
    BN = max(16, min(BN, _power(count)))
    blocks, tiles = triton.cdiv(count, BN), triton.cdiv(patches, BM)
    splits = min(tiles, max(1, _programs(features.device) // (batch * blocks)))
    span = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, span)
    candidates = splits * ranks
    value = distance.new_empty(batch, count, candidates)
    place = index.new_empty(value.shape, dtype=torch.int32)
    BC = _power(candidates)
    rows = max(1, min(8, 2048 // BC, _power(count)))
    with torch.cuda.device_of(features):
        screen_kernel[(batch * splits * blocks,)](
            x,
            p,
            mask,
            value,
            place,
            *geometry.patches,
            *geometry.window,
            patches,
            channels,
            count,
            blocks,
            splits,
            span,
            weight,
            METRIC=metric,
            KIND=kind,
            NORM=metric == _op.COSINE or weight != 0,
            **geometry.constants,
            RANKS=ranks,
            RANKS2=_power(ranks),
            BM=BM,
            BN=BN,
            BK=max(16, min(BK, _power(channels))),
            num_warps=warps,
            num_stages=stages,
        )
        refine_kernel[(batch * triton.cdiv(count, rows),)](
            x,
            p,
            mask,
            value,
            place,
            activated,
            distance,
            index,
            *geometry.patches,
            *geometry.window,
            patches,
            channels,
            count,
            triton.cdiv(count, rows),
            candidates,
            eps,
            slack,
            terms * (2.0**-1020 if kind == DOUBLE else 2.0**-124),
            METRIC=metric,
            ACTIVATION=activation,
            VERIFY=verify,
            **geometry.constants,
            TOPK=topk,
            TOPK2=_power(topk),
            BC=BC,
            BN=rows,
            BK=min(32, _power(channels)),
            BM=min(128, _power(patches)),
        )
    return activated, distance, index


def prototype_map(features: Tensor, prototypes: Tensor, metric: int) -> Tensor:
    kernel = _op.kernel_size(features, prototypes)
    x, geometry = _located(features, kernel)
    if not geometry.fits:
        return _reference.prototype_map(features, prototypes, metric)
    batch, channels = features.shape[:2]
    count = len(prototypes)
    shape = (batch, count, *_op.patch_grid(features, prototypes))
    out = features.new_empty(shape, dtype=_op.result_dtype(features))
    if out.numel() == 0:
        return out
    BM, BN = min(64, _power(geometry.count)), min(32, _power(count))
    blocks, tiles = triton.cdiv(count, BN), triton.cdiv(geometry.count, BM)
    with torch.cuda.device_of(features):
        map_kernel[(batch * blocks * tiles,)](
            x,
            prototypes.contiguous(),
            out,
            *geometry.patches,
            *geometry.window,
            geometry.count,
            channels,
            count,
            blocks,
            tiles,
            METRIC=metric,
            **geometry.constants,
            BM=BM,
            BN=BN,
            RUN=RUN,
        )
    return out


def prototype_backward(
    grad_activation: Tensor | None,
    grad_distance: Tensor | None,
    features: Tensor,
    prototypes: Tensor,
    distance: Tensor,
    index: Tensor,
    metric: int,
    activation: int,
    eps: float,
    topk: int,
    to_features: bool,
    to_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    kernel = _op.kernel_size(features, prototypes)
    sizes = list(features.shape[2:])
    x, geometry = _located(features, kernel)
    x, whole = _located(x, [1] * len(sizes))
    if x is not features:
        geometry = _Geometry(x, kernel)
    if not (geometry.fits and whole.fits):
        return _reference.prototype_backward(
            grad_activation,
            grad_distance,
            features,
            prototypes,
            distance,
            index,
            metric,
            activation,
            eps,
            topk,
            to_features,
            to_prototypes,
        )
    batch, channels = features.shape[:2]
    count, pixels, K = len(prototypes), whole.count, geometry.constants["KERNEL"]
    grad_features = features.new_empty(features.shape if to_features else 0)
    grad_prototypes = prototypes.new_empty(prototypes.shape if to_prototypes else 0)
    if index.numel() == 0 or channels == 0:
        grad_features = grad_features.zero_()
        return _op.as_features(grad_features, features) if to_features else grad_features, grad_prototypes.zero_()
    grads = [None if grad is None else grad.contiguous() for grad in (grad_activation, grad_distance)]
    p, distance, index = prototypes.contiguous(), distance.contiguous(), index.contiguous()
    inverse: tuple[Any, Any] = (None, None)
    BK = min(64, _power(channels))
    with torch.cuda.device_of(features):
        if metric == _op.COSINE:
            inverse = torch.empty_like(distance), distance.new_empty(count)
            BN = min(16, _power(index.numel()))
            lengths_kernel[(triton.cdiv(index.numel(), BN),)](
                x,
                p,
                index,
                *inverse,
                *geometry.patches,
                *geometry.window,
                channels,
                index.numel(),
                count,
                topk,
                **geometry.constants,
                BN=BN,
                BK=BK,
            )
        if to_prototypes:
            blocks = triton.cdiv(channels, BK)
            prototypes_kernel[(count * blocks * K,)](
                *grads,
                x,
                p,
                distance,
                index,
                *inverse,
                grad_prototypes,
                *geometry.patches,
                *geometry.window,
                channels,
                count,
                blocks,
                batch * topk,
                topk,
                eps,
                METRIC=metric,
                ACTIVATION=activation,
                **geometry.constants,
                BB=min(32, _power(batch * topk)),
                BK=BK,
            )
        if to_features:
            BM, BK, BQ = min(32, _power(pixels)), min(32, _power(channels)), 8
            blocks, tiles = triton.cdiv(channels, BK), triton.cdiv(pixels, BM)
            pixel, order = _by_pixel(index.reshape(batch, -1), sizes, kernel, pixels)
            edges = (torch.arange(tiles + 1, device=index.device) * BM).clamp(max=pixels)
            starts = torch.searchsorted(pixel, edges.expand(batch, -1).contiguous())
            features_kernel[(batch * blocks * tiles,)](
                *grads,
                x,
                p,
                distance,
                order,
                pixel,
                starts,
                *inverse,
                grad_features,
                *whole.patches,
                channels,
                pixels,
                count,
                blocks,
                tiles,
                topk,
                eps,
                METRIC=metric,
                ACTIVATION=activation,
                AXES=whole.constants["AXES"],
                KERNEL=K,
                BM=BM,
                BK=BK,
                BQ=BQ,
            )
    return _op.as_features(grad_features, features) if to_features else grad_features, grad_prototypes


def _by_pixel(index: Tensor, sizes: list[int], kernel: list[int], pixels: int) -> tuple[Tensor, Tensor]:
    """Of every winner and pixel of its window the pixel of the map, sorted, and which it is; `pixels` for no patch."""
    if math.prod(kernel) == 1:
        pixel = torch.where(index < 0, pixels, index)
    else:
        pixel = torch.zeros_like(index[..., None])
        for size, coordinate in zip(sizes, _op.patch_pixels(index, sizes, kernel), strict=True):
            pixel = pixel * size + coordinate
        pixel = torch.where(index[..., None] < 0, pixels, pixel).flatten(1)
    return torch.sort(pixel, dim=1, stable=True)


@functools.cache
def _programs(device: torch.device) -> int:
    """Enough to fill the device."""
    if device.type == "cpu":  # the interpreter
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count * 4
