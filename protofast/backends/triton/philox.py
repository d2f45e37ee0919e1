"""Normal numbers by a counter in Triton: the bits of the reference, whose every operation is rounded.

Whatever holds `normal` is launched with ``enable_fp_fusion=False``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast.backends.reference import philox as _reference

from . import _INTERPRETED

_EMULATED = tl.constexpr(_INTERPRETED)
_SQRT2 = tl.constexpr(_reference.SQRT2)
_LN2_HIGH = tl.constexpr(_reference.LN2_HIGH)
_LN2_LOW = tl.constexpr(_reference.LN2_LOW)
_EIGHTH = tl.constexpr(_reference.EIGHTH)
_LOG = tl.constexpr(_reference.LOG)
_SIN = tl.constexpr(_reference.SIN)
_COS = tl.constexpr(_reference.COS)

_TILE = 1024  # elements: 2 blocks a thread with 4 warps


@triton.jit
def cast(value, dtype: tl.constexpr):
    """``value.to(dtype)``; also in the interpreter, which cuts bfloat16 off where a GPU rounds, and takes its time."""
    if _EMULATED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + (bits >> 16 & 1), bits)
        return (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    elif _EMULATED and value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def _box_muller(radius, angle):
    """Two normal numbers of two random words."""
    u = radius.to(tl.float32) * 2.0**-32 + 2.0**-33
    bits = u.to(tl.int32, bitcast=True)
    g = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = g > _SQRT2
    exponent = ((bits >> 23) - 127 + large.to(tl.int32)).to(tl.float32)
    g = tl.where(large, g * 0.5, g) - 1.0
    square = g * g
    tail = g * _LOG[0] + _LOG[1]
    for i in tl.static_range(2, 8):
        tail = tail * g + _LOG[i]
    tail = (tail * g) * square + exponent * _LN2_LOW - square * 0.5
    r = tl.sqrt_rn((g + tail + exponent * _LN2_HIGH) * -2.0)

    quadrant = angle >> 30
    phi = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * _EIGHTH
    y = phi * phi
    sine = ((y * _SIN[0] + _SIN[1]) * y + _SIN[2]) * y * phi + phi
    cosine = ((y * _COS[0] + _COS[1]) * y + _COS[2]) * y * y - y * 0.5 + 1.0
    swap = quadrant & 1 == 1
    cos, sin = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return r * tl.where(quadrant + 1 & 2 == 2, cos * -1.0, cos), r * tl.where(quadrant > 1, sin * -1.0, sin)


@triton.jit
def normal(seed, sample, block):
    """Elements 4·block to 4·block + 3 of the samples, both int64: (ROWS, 1) and (1, BLOCKS) to (ROWS, 4·BLOCKS)."""
    number = tl.load(seed + tl.full([], 1, tl.int64)) + sample
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, number.to(tl.uint32), (number >> 32).to(tl.uint32))
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["rows", "split"])
def normal_kernel(out, seed, rows, cols: tl.int64, split: tl.int64, ROWS: tl.constexpr, COLS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // split * ROWS + tl.arange(0, ROWS))[:, None]
    start = pid % split * COLS
    col = (start + tl.arange(0, COLS))[None, :]
    z = normal(seed, row, (start // 4 + tl.arange(0, COLS // 4))[None, :])
    tl.store(out + row * cols + col, cast(z, out.dtype.element_ty), mask=(row < rows) & (col < cols))


def tile(rows: int, cols: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two; four columns at least, which is a block."""
    height = max(1, min(triton.next_power_of_2(rows), elements // max(4, triton.next_power_of_2(cols))))
    return height, elements // height


def philox_normal(like: Tensor, seed: Tensor) -> Tensor:
    result = torch.empty_like(like)
    if like.numel() == 0:
        return result
    flat = result if result.is_contiguous() else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    rows, cols = like.shape[0], like.numel() // like.shape[0]
    ROWS, COLS = tile(rows, cols, _TILE)
    split = triton.cdiv(cols, COLS)
    with torch.cuda.device_of(like):
        normal_kernel[(triton.cdiv(rows, ROWS) * split,)](
            flat, seed.contiguous(), rows, cols, split, ROWS=ROWS, COLS=COLS, enable_fp_fusion=False
        )
    return result if flat is result else result.copy_(flat)
