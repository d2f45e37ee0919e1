"""DDIM step in plain torch: the direct form in float64, rounded once; or, asked for bit for bit, the eager formula."""

import math

import numpy as np
import torch
from torch import Tensor

from protofast._ops import implement
from protofast._ops.ddim import EPSILON, SAMPLE, columns

from .philox import philox_normal


def _alphas(table: Tensor, timestep: Tensor, prev_timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Entry t + 1 of the table is timestep t. One outside it gives NaN, never a read out of bounds."""

    def alpha(step: Tensor) -> Tensor:
        row = step.long().reshape(-1) + 1  # one axis, because indexing by a 0-d tensor reads it on the host
        inside = (row >= 0) & (row < table.numel())
        return torch.where(inside, table[row.clamp(0, table.numel() - 1)], math.nan)

    now, prev = torch.broadcast_tensors(alpha(timestep), alpha(prev_timestep))
    return now, prev


def _root(value: Tensor) -> Tensor:
    """Rounded correctly, as the kernels have it; torch.sqrt may be a bit off on a CPU (MKL)."""
    return torch.from_numpy(np.sqrt(value.numpy())) if value.is_cpu else value.sqrt()


def ddim_coefficients(alphas_cumprod: Tensor, timestep: Tensor, prev_timestep: Tensor, eta: float) -> Tensor:
    """The table of `_ops.ddim.COLUMNS`, one row a pair of timesteps."""
    now, prev = _alphas(alphas_cumprod, timestep, prev_timestep)
    sigma, rest = torch.zeros_like(prev), 1 - prev
    if eta != 0:
        # Eq. 16 and 1 − ᾱ' − σ² in a form that cannot cancel or come out negative: added + kept = 1 for now <= prev.
        added = ((prev - now) / (prev * (1 - now))).clamp(min=0)
        kept = (now * (1 - prev) / (prev * (1 - now))).clamp(max=1)
        rest = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * kept)
        sigma = eta * _root((1 - prev) * added)
    return torch.stack([_root(now), _root(1 - now), _root(prev), _root(rest), sigma, _root(1 - prev)], 1)


def ddim_eager_coefficients(alphas_cumprod: Tensor, timestep: Tensor, prev_timestep: Tensor, eta: float) -> Tensor:
    """The same as diffusers' DDIMScheduler computes it, in float32."""
    now, prev = (alpha.float() for alpha in _alphas(alphas_cumprod, timestep, prev_timestep))
    sigma = torch.zeros_like(prev)
    if eta != 0:
        sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)).sqrt()
    roots = [value.sqrt() for value in (now, 1 - now, prev, 1 - prev - sigma * sigma)]
    return torch.stack([*roots, sigma, (1 - prev).sqrt()], 1).double()


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None = None,
    prediction_type: int = EPSILON,
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
) -> tuple[Tensor, Tensor]:
    # This order of operations, each rounded, is what `bitwise` promises of every backend.
    work = torch.float32 if bitwise and sample.dtype != torch.float64 else torch.float64
    signal, spread, prev_signal, direction, sigma, prev_spread = (
        column.to(work) for column in columns(table, row, sample.ndim)
    )
    x, m = sample.to(work), model_output.to(work)
    if cond_output is not None:
        m = m + guidance_scale * (cond_output.to(work) - m)
    if rescale is not None:
        m = rescale.to(work).reshape(-1, *[1] * (x.ndim - 1)) * m
    if prediction_type == EPSILON:
        x0, e = (x - spread * m) / signal, m
    elif prediction_type == SAMPLE:
        x0, e = m, (x - signal * m) / spread
    else:
        x0, e = signal * x - spread * m, signal * m + spread * x
    if threshold is not None:
        s = threshold.to(work).reshape(-1, *[1] * (x.ndim - 1))
        x0 = x0.clamp(-s, s) / s
    elif not (clip_min is None and clip_max is None):
        x0 = x0.clamp(clip_min, clip_max)
    if clipped_direction:
        e = (x - signal * x0) / spread
    prev = prev_signal * x0 + direction * e
    if noise is None and seed is not None:
        noise = philox_normal(sample, seed)
    if noise is not None:
        prev = prev + sigma * noise.to(work)
    if known is not None and mask is not None:
        kept = known.to(work)
        if known_noise is not None:
            kept = prev_signal * kept + prev_spread * known_noise.to(work)
        prev = torch.where(mask, prev, kept)
    return tuple(torch.empty_like(sample).copy_(result) for result in (prev, x0))  # type: ignore[return-value]


def ddim_step_out(*inputs, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    prev, x0 = ddim_step(*inputs)
    prev_sample.copy_(prev)
    if pred_original_sample is not None:
        pred_original_sample.copy_(x0)


implement("ddim_coefficients", "reference", ["default"], ddim_coefficients)
implement("ddim_eager_coefficients", "reference", ["default"], ddim_eager_coefficients)
implement("ddim_step", "reference", ["default"], ddim_step)
implement("ddim_step_out", "reference", ["default"], ddim_step_out)
