"""Channel purity in Triton, all in float64: forward, the values of `_ops.channels` to the bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast._ops import channels as _op
from protofast._ops.prototype import as_features, result_dtype
from protofast.backends.reference import channels as _reference

from .philox import cast
from .prototype import _key, _located, _place, _power
from .selection import _by_halves, _double

_FLOOR = tl.constexpr(_op.FLOOR)
_FAR = tl.constexpr(2**31 - 1)  # an index after all others
_LAST = tl.constexpr(2**63 - 1)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """float64 as another type, by float32: there is no shorter way to 16 bits."""
    return value if dtype == tl.float64 else cast(value.to(tl.float32), dtype)


@triton.jit
def purity_kernel(
    x,
    rotation,
    chosen,
    purity,
    index,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    pixels,
    channels,
    pairs,
    rows,
    RECTIFY: tl.constexpr,
    AXES: tl.constexpr,
    BM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A pair: the first pixel of the largest z, then z and the length there. NaN for a row that is not there."""
    pair = tl.program_id(0).to(tl.int64)
    x += pair // pairs * sample_stride
    r = tl.load(chosen + pair)
    there = (r >= 0) & (r < rows)
    u = rotation + tl.where(there, r, 0) * row_stride
    lane = tl.arange(0, 8)
    best = tl.full([BM], _LAST, tl.int64)
    at = tl.full([BM], _FAR, tl.int32)
    for start in range(0, pixels, BM):
        p = start + tl.arange(0, BM)
        inside = p < pixels
        place = _place(p, size1, size2, stride0, stride1, stride2, AXES)
        total = tl.zeros([BM, 8], tl.float64)
        for first in range(0, channels, 8 * UNROLL):
            for i in tl.static_range(UNROLL):
                c = first + 8 * i + lane
                real = c < channels
                c = c.to(tl.int64)
                us = _double(tl.load(u + c * column_stride, mask=real, other=0.0))
                f = x + (place[:, None] + (c * channel_stride)[None, :])
                total += _double(tl.load(f, mask=inside[:, None] & real[None, :], other=0.0)) * us[None, :]
        key = tl.where(inside, _key(-_by_halves(total)), _LAST)
        better = key < best
        best = tl.where(better, key, best)
        at = tl.where(better, p, at)
    winner = tl.min(tl.where(best == tl.min(best, 0), at, _FAR), 0)
    place = _place(winner, size1, size2, stride0, stride1, stride2, AXES)
    total = tl.zeros([2, 8], tl.float64)
    both = tl.arange(0, 2)[:, None]
    for first in range(0, channels, 8 * UNROLL):
        for i in tl.static_range(UNROLL):
            c = first + 8 * i + lane
            real = c < channels
            c = c.to(tl.int64)
            us = _double(tl.load(u + c * column_stride, mask=real, other=0.0))
            f = _double(tl.load(x + (place + c * channel_stride), mask=real, other=0.0))
            total += tl.where(both == 0, us[None, :], f[None, :]) * f[None, :]
    sums = _by_halves(total)
    both = tl.arange(0, 2)
    z = tl.sum(tl.where(both == 0, sums, 0.0), 0)
    length = tl.sqrt(tl.sum(tl.where(both == 1, sums, 0.0), 0))
    if RECTIFY:
        z = tl.where(z < 0, 0.0, z)
    value = z / tl.where(length < _FLOOR, _FLOOR, length)
    tl.store(purity + pair, _rounded(tl.where(there, value, float("nan")), purity.dtype.element_ty))
    tl.store(index + pair, winner.to(tl.int64))


@triton.jit
def factors_kernel(
    grad,
    x,
    rotation,
    chosen,
    purity,
    index,
    scale,
    pull,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    channels,
    pairs,
    rows,
    RECTIFY: tl.constexpr,
    AXES: tl.constexpr,
    BK: tl.constexpr,
):
    """Of a pair: its gradients are scale·(u − pull·f) to the pixel f, and scale·f to the row u."""
    pair = tl.program_id(0).to(tl.int64)
    r = tl.load(chosen + pair)
    there = (r >= 0) & (r < rows)
    u = rotation + tl.where(there, r, 0) * row_stride
    place = _place(tl.load(index + pair).to(tl.int32), size1, size2, stride0, stride1, stride2, AXES)
    x += pair // pairs * sample_stride + place
    z = tl.zeros([BK], tl.float64)
    square = tl.zeros([BK], tl.float64)
    for start in range(0, channels, BK):
        c = start + tl.arange(0, BK)
        real = c < channels
        c = c.to(tl.int64)
        f = _double(tl.load(x + c * channel_stride, mask=real, other=0.0))
        z += f * _double(tl.load(u + c * column_stride, mask=real, other=0.0))
        square += f * f
    length = tl.sqrt(tl.sum(square, 0))
    below = length < _FLOOR
    inverse = 1 / tl.where(below, _FLOOR, length)
    gain = tl.where(length == 0, 0.0, _double(tl.load(grad + pair)) * inverse)
    if RECTIFY:
        gain = tl.where(tl.load(purity + pair) <= 0, 0.0, gain)
    tl.store(scale + pair, tl.where(there, gain, 0.0))
    tl.store(pull + pair, tl.where(below, 0.0, tl.sum(z, 0) * inverse * inverse))


@triton.jit
def features_kernel(
    x,
    rotation,
    chosen,
    index,
    scale,
    pull,
    out,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    row_stride: tl.int64,
    column_stride: tl.int64,
    pixels,
    channels,
    pairs,
    blocks,
    tiles,
    AXES: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Of a tile of pixels and a block of channels of a sample: what its pairs give, in their order."""
    pid = tl.program_id(0)
    tile = pid % tiles
    b = (pid // tiles // blocks).to(tl.int64)
    p = tile * BM + tl.arange(0, BM)
    c = pid // tiles % blocks * BK + tl.arange(0, BK)
    real = c < channels
    c = c.to(tl.int64)
    x += b * sample_stride
    total = tl.zeros([BK, BM], tl.float64)
    for j in range(pairs):
        pair = b * pairs + j
        winner = tl.load(index + pair).to(tl.int32)
        factor = tl.load(scale + pair)
        if (winner // BM == tile) & (factor != 0):
            place = _place(winner, size1, size2, stride0, stride1, stride2, AXES)
            f = _double(tl.load(x + (place + c * channel_stride), mask=real, other=0.0))
            us = rotation + tl.load(chosen + pair) * row_stride
            us = _double(tl.load(us + c * column_stride, mask=real, other=0.0))
            part = factor * (us - tl.load(pull + pair) * f)
            total += tl.where((p == winner)[None, :], part[:, None], 0.0)
    to = out + ((b * channels + c)[:, None] * pixels + p[None, :])
    tl.store(to, _rounded(total, out.dtype.element_ty), mask=real[:, None] & (p < pixels)[None, :])


@triton.jit
def rotation_kernel(
    x,
    index,
    order,
    starts,
    scale,
    out,
    sample_stride: tl.int64,
    channel_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    channels,
    pairs,
    blocks,
    AXES: tl.constexpr,
    BK: tl.constexpr,
):
    """Of a block of channels of a row: the sum over the pairs that chose it, in their order."""
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64)
    c = pid % blocks * BK + tl.arange(0, BK)
    real = c < channels
    c = c.to(tl.int64)
    total = tl.zeros([BK], tl.float64)
    for i in range(tl.load(starts + r), tl.load(starts + (r + 1))):
        pair = tl.load(order + i)
        factor = tl.load(scale + pair)
        if factor != 0:
            place = _place(tl.load(index + pair).to(tl.int32), size1, size2, stride0, stride1, stride2, AXES)
            f = x + (pair // pairs * sample_stride + place + c * channel_stride)
            total += factor * _double(tl.load(f, mask=real, other=0.0))
    tl.store(out + (r * channels + c), _rounded(total, out.dtype.element_ty), mask=real)


def channel_purity(features: Tensor, rotation: Tensor, channels: Tensor, rectify: bool) -> tuple[Tensor, Tensor]:
    x, geometry = _located(features, [1] * (features.ndim - 2))
    if not geometry.fits:
        return _reference.channel_purity(features, rotation, channels, rectify)
    purity = features.new_empty(channels.shape, dtype=result_dtype(features))
    index = channels.new_empty(channels.shape)
    if purity.numel() == 0:
        return purity, index
    with torch.cuda.device_of(features):
        purity_kernel[(channels.numel(),)](
            x,
            rotation,
            channels.contiguous(),
            purity,
            index,
            *geometry.patches,
            *rotation.stride(),
            geometry.count,
            features.shape[1],
            channels.numel() // features.shape[0],
            rotation.shape[0],
            RECTIFY=rectify,
            AXES=geometry.constants["AXES"],
            BM=min(64, _power(geometry.count)),
            UNROLL=4,
            enable_fp_fusion=False,  # products of float64 are rounded
        )
    return purity, index


def channel_purity_backward(
    grad: Tensor,
    features: Tensor,
    rotation: Tensor,
    channels: Tensor,
    purity: Tensor,
    index: Tensor,
    rectify: bool,
    to_features: bool,
    to_rotation: bool,
) -> tuple[Tensor, Tensor]:
    x, geometry = _located(features, [1] * (features.ndim - 2))
    if not geometry.fits:
        return _reference.channel_purity_backward(
            grad, features, rotation, channels, purity, index, rectify, to_features, to_rotation
        )
    batch, count = features.shape[:2]
    grad_features = features.new_empty(features.shape if to_features else 0)
    grad_rotation = rotation.new_empty(rotation.shape if to_rotation else 0)
    if channels.numel() == 0 or count == 0:
        grad_features.zero_()
        return as_features(grad_features, features) if to_features else grad_features, grad_rotation.zero_()
    pixels, pairs, rows = geometry.count, channels.numel() // batch, rotation.shape[0]
    chosen, index = channels.flatten().contiguous(), index.contiguous()
    scale, pull = torch.empty(2, len(chosen), dtype=torch.float64, device=features.device)
    axes, strides = geometry.constants["AXES"], rotation.stride()
    BK = min(128, _power(count))
    with torch.cuda.device_of(features):
        factors_kernel[(len(chosen),)](
            grad.contiguous(),
            x,
            rotation,
            chosen,
            purity.contiguous(),
            index,
            scale,
            pull,
            *geometry.patches,
            *strides,
            count,
            pairs,
            rows,
            RECTIFY=rectify,
            AXES=axes,
            BK=BK,
        )
        if to_features:
            BM, BK = min(32, _power(pixels)), min(32, _power(count))
            tiles, blocks = triton.cdiv(pixels, BM), triton.cdiv(count, BK)
            features_kernel[(batch * blocks * tiles,)](
                x,
                rotation,
                chosen,
                index,
                scale,
                pull,
                grad_features,
                *geometry.patches,
                *strides,
                pixels,
                count,
                pairs,
                blocks,
                tiles,
                AXES=axes,
                BM=BM,
                BK=BK,
            )
        if to_rotation:
            row, order = torch.sort(chosen, stable=True)
            starts = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
            BK = min(256, _power(count))
            rotation_kernel[(rows * triton.cdiv(count, BK),)](
                x,
                index,
                order,
                starts,
                scale,
                grad_rotation,
                *geometry.patches,
                count,
                pairs,
                triton.cdiv(count, BK),
                AXES=axes,
                BK=BK,
            )
    return as_features(grad_features, features) if to_features else grad_features, grad_rotation
