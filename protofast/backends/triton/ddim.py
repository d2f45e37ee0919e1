"""DDIM step in Triton: one kernel that reads every input once and writes the one or two results.

A tile is ROWS samples by COLS of their elements. The coefficients are computed in float64 for the rows of a program,
which then walks along the columns, so that their cost does not grow with the sample.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from protofast._ops import ddim as _op
from protofast._overlap import tangled

_EPSILON = tl.constexpr(_op.EPSILON)
_SAMPLE = tl.constexpr(_op.SAMPLE)

_TILE = 1024  # elements: 8 a thread with 4 warps
_PROGRAMS_PER_SM = 8


@triton.jit
def _alpha(table, size, step, inside):
    row = tl.load(step, mask=inside, other=0) + 1
    return tl.load(table + row, mask=(row >= 0) & (row < size), other=float("nan"))


@triton.jit
def ddim_kernel(
    sample,
    output,
    cond,
    noise,
    prev_out,
    x0_out,
    table,
    timestep,
    prev_timestep,
    table_size,
    rows,
    cols: tl.int64,
    split: tl.int64,
    sample_stride,
    output_stride,
    cond_stride,
    noise_stride,
    prev_stride,
    x0_stride,
    timestep_stride,
    prev_timestep_stride,
    eta: tl.float64,
    clip_min: tl.float64,
    clip_max: tl.float64,
    guidance_scale: tl.float64,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // split * ROWS + tl.arange(0, ROWS)
    inside = row < rows

    now = _alpha(table, table_size, timestep + row * timestep_stride, inside)
    prev = _alpha(table, table_size, prev_timestep + row * prev_timestep_stride, inside)
    signal, spread = tl.sqrt(now), tl.sqrt(1 - now)
    zero = now * 0  # NaN where the timestep is outside the table
    if KIND == _EPSILON:
        a, c, d = 1 / signal, zero, zero + 1
        b = -spread * a
    elif KIND == _SAMPLE:
        a, b, c = zero, zero + 1, 1 / spread
        d = -signal * c
    else:
        a, b, c, d = signal, -spread, spread, signal
    variance, direction = zero, 1 - prev
    if noise is not None:  # in the form of `_ops.ddim.coefficients`, which cannot cancel
        inverse = 1 / (prev * (1 - now))
        added = (prev - now) * inverse
        kept = now * (1 - prev) * inverse
        variance = eta * eta * (1 - prev) * tl.where(added < 0, 0, added)
        direction = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * tl.where(kept > 1, 1, kept))

    # Results are rounded to ACC once; float64 tensors keep float64.
    ACC: tl.constexpr = tl.float64 if sample.dtype.element_ty == tl.float64 else tl.float32
    a, b, c, d = a.to(ACC)[:, None], b.to(ACC)[:, None], c.to(ACC)[:, None], d.to(ACC)[:, None]
    p, q = tl.sqrt(prev).to(ACC)[:, None], tl.sqrt(direction).to(ACC)[:, None]
    sigma = tl.sqrt(variance).to(ACC)[:, None]
    scale = tl.full([], guidance_scale, ACC)
    low, high = tl.full([], clip_min, ACC), tl.full([], clip_max, ACC)

    row = row[:, None]
    for start in range(pid % split * COLS, cols, split * COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        mask = inside[:, None] & (col < cols)
        x = tl.load(sample + row * sample_stride + col, mask=mask).to(ACC)
        m = tl.load(output + row * output_stride + col, mask=mask).to(ACC)
        if cond is not None:
            m += scale * (tl.load(cond + row * cond_stride + col, mask=mask).to(ACC) - m)
        x0 = a * x + b * m
        if CLIP:  # comparisons, because a minimum or maximum would lose a NaN
            x0 = tl.where(x0 < low, low, tl.where(x0 > high, high, x0))
        result = p * x0 + q * (c * x + d * m)
        if noise is not None:
            result += sigma * tl.load(noise + row * noise_stride + col, mask=mask).to(ACC)
        tl.store(prev_out + row * prev_stride + col, result.to(prev_out.dtype.element_ty), mask=mask)
        if x0_out is not None:
            tl.store(x0_out + row * x0_stride + col, x0.to(x0_out.dtype.element_ty), mask=mask)


def ddim_step(*inputs: Any) -> tuple[Tensor, Tensor]:
    results = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    _launch(inputs, *results)
    return results


def ddim_step_out(*inputs: Any, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    outputs = [t for t in (prev_sample, pred_original_sample) if t is not None]
    if not tangled(outputs, [t for t in inputs[:4] if t is not None]):
        return _launch(inputs, prev_sample, pred_original_sample)
    for output, result in zip(outputs, ddim_step(*inputs), strict=False):
        output.copy_(result)


def _launch(inputs: tuple[Any, ...], prev_out: Tensor, x0_out: Tensor | None) -> None:
    sample, output, cond, noise, table, timestep, prev_timestep, eta, kind, clip_min, clip_max, guidance_scale = inputs
    if sample.numel() == 0:
        return
    tensors: list[Tensor | None] = [sample, output, cond, noise, prev_out, x0_out]
    shape, strides = prev_out.shape, prev_out.stride()
    same = all(t is None or t.stride() == strides for t in tensors)
    if same and timestep.numel() == prev_timestep.numel() == 1 and _dense(shape, strides):
        rows, cols = 1, sample.numel()  # one run of memory, one timestep
    elif _dense(shape[1:], strides[1:]):
        rows, cols = shape[0], sample.numel() // shape[0]
        tensors[:4] = [_like(t, prev_out) for t in tensors[:4]]
        if x0_out is not None and x0_out.stride()[1:] != strides[1:]:
            tensors[5] = _like(x0_out, prev_out)
    else:
        rows, cols = shape[0], sample.numel() // shape[0]
        tensors = [None if t is None else t.contiguous() for t in tensors]

    ROWS = max(1, min(triton.next_power_of_2(rows), _TILE // triton.next_power_of_2(cols)))
    COLS = _TILE // ROWS
    row_tiles = triton.cdiv(rows, ROWS)
    split = min(triton.cdiv(cols, COLS), max(1, _programs(sample.device) // row_tiles))
    with torch.cuda.device_of(sample):
        ddim_kernel[(row_tiles * split,)](
            *tensors,
            table,
            timestep,
            prev_timestep,
            table.numel(),
            rows,
            cols,
            split,
            *(0 if t is None else t.stride(0) for t in tensors),
            *(t.stride(0) if t.numel() > 1 else 0 for t in (timestep, prev_timestep)),
            eta,
            clip_min,
            clip_max,
            guidance_scale,
            KIND=kind,
            CLIP=clip_min > float("-inf") or clip_max < float("inf"),
            ROWS=ROWS,
            COLS=COLS,
        )
    for target, written in zip((prev_out, x0_out), tensors[4:], strict=True):
        if target is not None and written is not None and written is not target:
            target.copy_(written)


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
