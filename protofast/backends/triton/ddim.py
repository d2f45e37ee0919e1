"""DDIM step in Triton: one kernel that reads every input once and writes the one or two results.

A tile is ROWS samples by COLS of their elements. The coefficients are combined in float64 for the rows of a program,
which then walks along the columns, so that their cost does not grow with the sample.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast._ops import ddim as _op
from protofast._overlap import tangled

from .philox import cast, normal, philox_normal, tile

_EPSILON = tl.constexpr(_op.EPSILON)
_SAMPLE = tl.constexpr(_op.SAMPLE)
_COLUMNS = tl.constexpr(_op.COLUMNS)

_TILE = 1024  # elements: 8 a thread with 4 warps
_PROGRAMS_PER_SM = 8


@triton.jit
def _alpha(alphas, size, step, inside):
    row = tl.load(step, mask=inside, other=0).to(tl.int64) + 1
    return tl.load(alphas + row, mask=(row >= 0) & (row < size), other=float("nan"))


@triton.jit(do_not_specialize=["size", "count", "timestep_stride", "prev_timestep_stride"])
def coefficients_kernel(
    table,
    alphas,
    timestep,
    prev_timestep,
    size,
    count,
    timestep_stride,
    prev_timestep_stride,
    eta: tl.float64,
    ROWS: tl.constexpr,
):
    """The operations of the reference in their order, launched without contraction."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    now = _alpha(alphas, size, timestep + row * timestep_stride, inside)
    prev = _alpha(alphas, size, prev_timestep + row * prev_timestep_stride, inside)
    added = (prev - now) / (prev * (1 - now))
    kept = now * (1 - prev) / (prev * (1 - now))
    sigma = eta * tl.sqrt((1 - prev) * tl.where(added < 0, 0.0, added))
    rest = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * tl.where(kept > 1, 1.0, kept))
    place = row * _COLUMNS
    tl.store(table + place, tl.sqrt(now), mask=inside)
    tl.store(table + (place + 1), tl.sqrt(1 - now), mask=inside)
    tl.store(table + (place + 2), tl.sqrt(prev), mask=inside)
    tl.store(table + (place + 3), tl.sqrt(tl.where(eta == 0, 1 - prev, rest)), mask=inside)
    tl.store(table + (place + 4), tl.where(eta == 0, 0.0, sigma), mask=inside)
    tl.store(table + (place + 5), tl.sqrt(1 - prev), mask=inside)


def ddim_coefficients(alphas_cumprod: Tensor, timestep: Tensor, prev_timestep: Tensor, eta: float) -> Tensor:
    sizes = timestep.numel(), prev_timestep.numel()
    table = alphas_cumprod.new_empty((max(sizes) if all(sizes) else 0, _op.COLUMNS))
    if len(table) == 0:
        return table
    ROWS = min(128, triton.next_power_of_2(len(table)))
    with torch.cuda.device_of(table):
        coefficients_kernel[(triton.cdiv(len(table), ROWS),)](
            table,
            alphas_cumprod.contiguous(),
            timestep,
            prev_timestep,
            alphas_cumprod.numel(),
            len(table),
            _stride(timestep),
            _stride(prev_timestep),
            eta,
            ROWS=ROWS,
            enable_fp_fusion=False,
        )
    return table


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)  # "/" may be a bit off
    else:
        return x / y


@triton.jit
def _coefficient(table, entry, size, column: tl.constexpr):
    return tl.load(table + (entry * _COLUMNS + column), mask=(entry >= 0) & (entry < size), other=float("nan"))


@triton.jit
def _clip(value, low, high):
    return tl.where(value < low, low, tl.where(value > high, high, value))  # a minimum or maximum would lose a NaN


@triton.jit
def _read(tensor, place, inside, ACC: tl.constexpr):
    return cast(tl.load(tensor + place, mask=inside), ACC)


@triton.jit(do_not_specialize=["table_rows", "entry_stride", "rescale_stride", "threshold_stride", "rows", "split"])
def ddim_kernel(
    sample,
    output,
    cond,
    noise,
    known,
    known_noise,
    mask,
    prev_out,
    x0_out,
    sample_stride,
    output_stride,
    cond_stride,
    noise_stride,
    known_stride,
    known_noise_stride,
    mask_stride,
    prev_stride,
    x0_stride,
    table,
    table_rows,
    entry,
    rescale,
    threshold,
    entry_stride,
    rescale_stride,
    threshold_stride,
    seed,
    rows,
    cols: tl.int64,
    split: tl.int64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    guidance_scale: tl.float64,
    KIND: tl.constexpr,
    BITWISE: tl.constexpr,
    CLIP: tl.constexpr,
    CLIPPED_DIRECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // split * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    # Results are rounded to ACC once; float64 tensors keep float64.
    ACC: tl.constexpr = tl.float64 if sample.dtype.element_ty == tl.float64 else tl.float32
    WIDTH: tl.constexpr = 128 // sample.dtype.element_ty.primitive_bitwidth

    index = row * entry_stride
    if entry is not None:
        index = tl.load(entry + index, mask=inside, other=0).to(tl.int64)
    signal = _coefficient(table, index, table_rows, 0)
    spread = _coefficient(table, index, table_rows, 1)
    p = _coefficient(table, index, table_rows, 2)
    q = _coefficient(table, index, table_rows, 3)
    sigma = _coefficient(table, index, table_rows, 4).to(ACC)[:, None]
    keep = _coefficient(table, index, table_rows, 5).to(ACC)[:, None]
    if not BITWISE:
        # x0 = a·x + b·m, before the clip;  prev = s·x + o·m + w·x0, whose last term is there when x0 is clipped.
        if KIND == _EPSILON:
            a, b, c, d = 1 / signal, -spread / signal, 0.0, 1.0
        elif KIND == _SAMPLE:
            a, b, c, d = 0.0, 1.0, 1 / spread, -signal / spread
        else:
            a, b, c, d = signal, -spread, spread, signal
        if not CLIP:
            s, o, w = p * a + q * c, p * b + q * d, p
        elif CLIPPED_DIRECTION:
            s, o, w = q / spread, q * 0, p - q * (signal / spread)
        else:
            s, o, w = q * c, q * d, p
        if KIND != _SAMPLE:
            a, b = a.to(ACC)[:, None], b.to(ACC)[:, None]
        s, o, w = s.to(ACC)[:, None], o.to(ACC)[:, None], w.to(ACC)[:, None]
    signal, spread, p, q = signal.to(ACC)[:, None], spread.to(ACC)[:, None], p.to(ACC)[:, None], q.to(ACC)[:, None]
    scale = tl.full([], guidance_scale, ACC)
    if rescale is not None:
        factor = tl.load(rescale + row * rescale_stride, mask=inside).to(ACC)[:, None]
    if threshold is not None:
        high = tl.load(threshold + row * threshold_stride, mask=inside, other=1).to(ACC)[:, None]
        low = -high
    else:
        low, high = tl.full([], clip_min, ACC), tl.full([], clip_max, ACC)

    row, inside = row[:, None], inside[:, None]
    for start in range(pid % split * COLS, cols, split * COLS):
        # One width of access for all: a narrower dtype's wider one would send the results through shared memory.
        col = tl.max_contiguous((start + tl.arange(0, COLS))[None, :], [1, WIDTH])
        here = inside & (col < cols)
        x = _read(sample, row * sample_stride + col, here, ACC)
        m = _read(output, row * output_stride + col, here, ACC)
        if cond is not None:
            m += scale * (_read(cond, row * cond_stride + col, here, ACC) - m)
        if rescale is not None:
            m = factor * m

        if KIND == _SAMPLE:
            x0 = m
        elif not BITWISE:
            x0 = a * x + b * m
        elif KIND == _EPSILON:
            x0 = _divide(x - spread * m, signal)
        else:
            x0 = signal * x - spread * m
        if CLIP:
            x0 = _clip(x0, low, high)
        if threshold is not None:
            x0 = _divide(x0, high)

        if not BITWISE:
            prev = s * x + o * m
            if CLIP:
                prev += w * x0
        else:
            if CLIPPED_DIRECTION:
                e = _divide(x - signal * x0, spread)
            elif KIND == _EPSILON:
                e = m
            elif KIND == _SAMPLE:
                e = _divide(x - signal * m, spread)
            else:
                e = signal * m + spread * x
            prev = p * x0 + q * e

        if noise is not None:
            prev += sigma * _read(noise, row * noise_stride + col, here, ACC)
        elif seed is not None:
            z = normal(seed, row, (start // 4 + tl.arange(0, COLS // 4))[None, :])
            prev += sigma * cast(cast(z, sample.dtype.element_ty), ACC)
        if mask is not None:
            kept = _read(known, row * known_stride + col, here, ACC)
            if known_noise is not None:
                kept = p * kept + keep * _read(known_noise, row * known_noise_stride + col, here, ACC)
            prev = tl.where(tl.load(mask + (row * mask_stride + col), mask=here), prev, kept)
        tl.store(prev_out + (row * prev_stride + col), cast(prev, prev_out.dtype.element_ty), mask=here)
        if x0_out is not None:
            tl.store(x0_out + (row * x0_stride + col), cast(x0, x0_out.dtype.element_ty), mask=here)


def ddim_step(sample: Tensor, *inputs) -> tuple[Tensor, Tensor]:
    results = torch.empty_like(sample), torch.empty_like(sample)
    _launch(*results, sample, *inputs)
    return results


def ddim_step_out(*inputs, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    outputs = [t for t in (prev_sample, pred_original_sample) if t is not None]
    if not tangled(outputs, [t for t in inputs if isinstance(t, Tensor) and t.shape == prev_sample.shape]):
        return _launch(prev_sample, pred_original_sample, *inputs)
    for output, result in zip(outputs, ddim_step(*inputs), strict=False):
        output.copy_(result)


def _launch(
    prev_out: Tensor,
    x0_out: Tensor | None,
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None = None,
    prediction_type: int = _op.EPSILON,
    bitwise: bool = False,
    clip_min: float | None = None,
    clip_max: float | None = None,
    clipped_direction: bool = False,
    cond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    rescale: Tensor | None = None,
    threshold: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    if sample.numel() == 0:
        return
    shape, strides = prev_out.shape, prev_out.stride()
    dense = _dense(shape[1:], strides[1:])
    if noise is None and seed is not None and dense and not prev_out[:1].is_contiguous():
        noise, seed = philox_normal(sample, seed), None  # which counts elements in another order than memory has
    tensors: list[Tensor | None] = [sample, model_output, cond_output, noise, known, known_noise, mask]
    tensors += [prev_out, x0_out]
    shared = (len(table) if row is None else row.numel()) == 1
    shared = shared and all(t is None for t in (rescale, threshold, seed))
    rows, cols = shape[0], sample.numel() // shape[0]
    if shared and _dense(shape, strides) and all(t is None or t.stride() == strides for t in tensors):
        rows, cols = 1, sample.numel()  # one run of memory, one set of coefficients
    elif dense:
        tensors[:7] = [_like(t, prev_out) for t in tensors[:7]]
        if x0_out is not None and x0_out.stride()[1:] != strides[1:]:
            tensors[8] = _like(x0_out, prev_out)
    else:
        tensors = [None if t is None else t.contiguous() for t in tensors]

    ROWS, COLS = tile(rows, cols, _TILE)
    row_tiles = triton.cdiv(rows, ROWS)
    split = min(triton.cdiv(cols, COLS), max(1, _programs(sample.device) // row_tiles))
    with torch.cuda.device_of(sample):
        ddim_kernel[(row_tiles * split,)](
            *tensors,
            *(0 if t is None else t.stride(0) for t in tensors),
            table.contiguous(),
            len(table),
            row,
            rescale,
            threshold,
            int(len(table) > 1) if row is None else _stride(row),
            _stride(rescale),
            _stride(threshold),
            None if seed is None else seed.contiguous(),
            rows,
            cols,
            split,
            -math.inf if clip_min is None else clip_min,
            math.inf if clip_max is None else clip_max,
            guidance_scale,
            KIND=prediction_type,
            BITWISE=bitwise,
            CLIP=not (clip_min is None and clip_max is None and threshold is None),
            CLIPPED_DIRECTION=clipped_direction,
            ROWS=ROWS,
            COLS=COLS,
            enable_fp_fusion=not bitwise and seed is None,
        )
    for target, written in zip((prev_out, x0_out), tensors[7:], strict=True):
        if target is not None and written is not None and written is not target:
            target.copy_(written)


def _stride(vector: Tensor | None) -> int:
    """Of a vector that has one element for all samples, or one for each."""
    return 0 if vector is None or vector.numel() == 1 else vector.stride(0)


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements fill one run of memory, in any order of the axes."""
    size = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True


def _like(tensor: Tensor | None, model: Tensor) -> Tensor | None:
    """`tensor`, copied where the elements of a sample do not lie in the order of `model`."""
    if tensor is None or tensor.stride()[1:] == model.stride()[1:]:
        return tensor
    strides = tensor.numel() // tensor.shape[0], *model.stride()[1:]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_SM
