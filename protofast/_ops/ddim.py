"""DDIM step (Song et al. 2021, eq. 12): schema, fake kernels, gradient, and the coefficients all of them share."""

import math

import torch
from torch import Tensor

from . import define

EPSILON, SAMPLE, V_PREDICTION = range(3)
PREDICTION_TYPES = {"epsilon": EPSILON, "sample": SAMPLE, "v_prediction": V_PREDICTION}

_ARGUMENTS = (
    "Tensor sample, Tensor model_output, Tensor? cond_output, Tensor? noise, Tensor alphas_cumprod, "
    "Tensor timestep, Tensor prev_timestep, float eta, int prediction_type, float clip_min, float clip_max, "
    "float guidance_scale"
)


def coefficients(
    alphas_cumprod: Tensor, timestep: Tensor, prev_timestep: Tensor, eta: float, prediction_type: int, ndim: int
) -> tuple[Tensor, ...]:
    """Seven float64 coefficients (a, b, c, d, p, q, sigma), each () or (B, 1, ...) for samples of `ndim` axes.

    With m the model output: x0 = a·x + b·m, e = c·x + d·m, and the step is p·clip(x0) + q·e + sigma·noise.
    Entry t + 1 of the table is the cumulative alpha of timestep t. A timestep outside it gives NaN, never a read
    out of bounds.
    """

    def alpha(step: Tensor) -> Tensor:
        row = step.long().reshape(-1) + 1  # one axis, because indexing by a 0-d tensor reads it on the host
        inside = (row >= 0) & (row < alphas_cumprod.numel())
        value = alphas_cumprod[row.clamp(0, alphas_cumprod.numel() - 1)]
        value = torch.where(inside, value, math.nan)
        return value.reshape(()) if value.numel() == 1 else value.reshape(-1, *[1] * (ndim - 1))

    now, prev = alpha(timestep), alpha(prev_timestep)
    signal, spread = now.sqrt(), (1 - now).sqrt()
    zero = now * 0  # NaN where the timestep is outside the table
    if prediction_type == EPSILON:
        a, b, c, d = 1 / signal, -spread / signal, zero, zero + 1
    elif prediction_type == SAMPLE:
        a, b, c, d = zero, zero + 1, 1 / spread, -signal / spread
    else:
        a, b, c, d = signal, -spread, spread, signal
    if eta == 0:
        return a, b, c, d, prev.sqrt(), (1 - prev).sqrt(), torch.zeros_like(prev)
    # Eq. 16 and 1 - prev - sigma² in a form that cannot cancel or come out negative: added + kept = 1 for now <= prev.
    added = ((prev - now) / (prev * (1 - now))).clamp(min=0)
    kept = (now * (1 - prev) / (prev * (1 - now))).clamp(max=1)
    sigma = eta * ((1 - prev) * added).sqrt()
    return a, b, c, d, prev.sqrt(), ((1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * kept)).sqrt(), sigma


def _fake(sample: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sample), torch.empty_like(sample)


def _fake_out(*_: object, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    sample, model_output, cond_output, noise, table, timestep, prev, eta, kind, low, high, scale = inputs
    ctx.clips = math.isfinite(low) or math.isfinite(high)
    # Only the clip's mask needs the values; without it the step is linear and keeps no activations.
    values = (sample, model_output, cond_output) if ctx.clips else (None, None, None)
    ctx.save_for_backward(*values, table, timestep, prev)
    ctx.settings = eta, kind, low, high, scale
    ctx.sample_shape = sample.shape
    ctx.has_cond, ctx.has_noise = cond_output is not None, noise is not None


def _backward(ctx, grad_prev, grad_x0):
    sample, model_output, cond_output, table, timestep, prev = ctx.saved_tensors
    eta, kind, low, high, scale = ctx.settings
    a, b, c, d, p, q, sigma = coefficients(table, timestep, prev, eta, kind, len(ctx.sample_shape))
    dtype = grad_prev.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, c, d, p, q, sigma = (v.to(work) for v in (a, b, c, d, p, q, sigma))
    grad_prev, grad_x0 = grad_prev.to(work), grad_x0.to(work)
    through_x0 = p * grad_prev + grad_x0
    if ctx.clips:
        output = model_output.to(work)
        if ctx.has_cond:
            output = output + scale * (cond_output.to(work) - output)
        x0 = a * sample.to(work) + b * output
        through_x0 = through_x0 * ((x0 >= low) & (x0 <= high))
    grad_sample = (a * through_x0 + c * q * grad_prev).to(dtype)
    grad_output = b * through_x0 + d * q * grad_prev
    grad_cond = (scale * grad_output).to(dtype) if ctx.has_cond else None
    if ctx.has_cond:
        grad_output = (1 - scale) * grad_output
    grad_noise = (sigma * grad_prev).to(dtype) if ctx.has_noise else None
    return grad_sample, grad_output.to(dtype), grad_cond, grad_noise, *[None] * 8


define(
    "ddim_step",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
define("ddim_step_out", f"({_ARGUMENTS}, *, Tensor(a!) prev_sample, Tensor(b!)? pred_original_sample) -> ()", _fake_out)
