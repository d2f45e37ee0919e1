"""DDIM step (Song et al. 2021, eq. 12): schemas, fake kernels, gradient, and the coefficients all of them share.

Two ops. `ddim_coefficients` turns timesteps into a table of float64 coefficients, one row a pair of timesteps; the
step itself reads a row of such a table for the whole tensor, or one for each sample.
"""

import math

import torch
from torch import Tensor

from . import define

EPSILON, SAMPLE, V_PREDICTION = range(3)
PREDICTION_TYPES = {"epsilon": EPSILON, "sample": SAMPLE, "v_prediction": V_PREDICTION}

COLUMNS = 6
"""signal √ᾱ, spread √(1 − ᾱ), prev_signal √ᾱ', direction √(1 − ᾱ' − σ²), sigma σ, prev_spread √(1 − ᾱ')."""

# The common step gives three arguments: each one given takes a tenth of a microsecond or more.
_STEP = (
    "Tensor sample, Tensor model_output, Tensor table, Tensor? row=None, int prediction_type=0, bool bitwise=False, "
    "float? clip_min=None, float? clip_max=None, bool clipped_direction=False, Tensor? cond_output=None, "
    "float guidance_scale=1.0, Tensor? rescale=None, Tensor? threshold=None, Tensor? noise=None, Tensor? seed=None, "
    "Tensor? known=None, Tensor? known_noise=None, Tensor? mask=None"
)


def _coefficients_fake(alphas_cumprod: Tensor, timestep: Tensor, prev_timestep: Tensor, eta: float) -> Tensor:
    rows = prev_timestep.numel() if timestep.numel() == 1 else timestep.numel()
    return alphas_cumprod.new_empty((rows, COLUMNS))


_COEFFICIENTS = "(Tensor alphas_cumprod, Tensor timestep, Tensor prev_timestep, float eta) -> Tensor"
define("ddim_coefficients", _COEFFICIENTS, _coefficients_fake)
define("ddim_eager_coefficients", _COEFFICIENTS, _coefficients_fake)
"""Those of diffusers, bit for bit: float32, by torch itself, whose square root may be a bit off (MKL's is)."""


def columns(table: Tensor, row: Tensor | None, ndim: int) -> tuple[Tensor, ...]:
    """The table's columns, each () or (B, 1, ...) for samples of `ndim` axes. A row outside it gives NaN."""
    if row is not None:
        row = row.long().reshape(-1)  # one axis, because indexing by a 0-d tensor reads it on the host
        inside = (row >= 0) & (row < table.shape[0])
        table = torch.where(inside[:, None], table[row.clamp(0, table.shape[0] - 1)], math.nan)
    shape = () if table.shape[0] == 1 else (-1, *[1] * (ndim - 1))
    return tuple(column.reshape(shape) for column in table.unbind(1))


def _fake(sample: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sample), torch.empty_like(sample)


def _fake_out(*_: object, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    sample, model_output, table, row, kind, _, low, high, clipped_direction, cond, scale, *rest = inputs
    rescale, threshold, noise, _, known, known_noise, mask = rest
    clips = not (low is None and high is None)
    # Without a clip, a threshold or a rescale the step is linear and keeps no activations.
    values = (sample, model_output, cond) if clips or threshold is not None or rescale is not None else (None,) * 3
    ctx.save_for_backward(*values, table, row, rescale, threshold, mask)
    ctx.settings = kind, low, high, clipped_direction, scale
    ctx.sample_dtype, ctx.output_dtype, ctx.ndim = sample.dtype, model_output.dtype, sample.ndim
    ctx.given = [tensor is not None for tensor in (cond, noise, known, known_noise)]


def _backward(ctx, grad_prev, grad_x0):
    sample, model_output, cond, table, row, rescale, threshold, mask = ctx.saved_tensors
    kind, low, high, clipped_direction, scale = ctx.settings
    has_cond, has_noise, has_known, has_known_noise = ctx.given
    work = torch.float64 if ctx.sample_dtype == torch.float64 else torch.float32
    signal, spread, p, q, sigma, keep = columns(table, row, ctx.ndim)
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    if kind == EPSILON:
        a, b, c, d = 1 / signal, -spread / signal, zero, one
    elif kind == SAMPLE:
        a, b, c, d = zero, one, 1 / spread, -signal / spread
    else:
        a, b, c, d = signal, -spread, spread, signal
    back = zero
    if clipped_direction:  # the direction is (x − signal·x0) / spread, with x0 as it was clipped
        c, d, back = 1 / spread, zero, signal / spread
    a, b, c, d, p, q, sigma, keep, back = (v.to(work) for v in (a, b, c, d, p, q, sigma, keep, back))

    def per_sample(vector):
        return vector.to(work).reshape(-1, *[1] * (ctx.ndim - 1))

    grad_prev, grad_x0 = grad_prev.to(work), grad_x0.to(work)
    grad_known = grad_known_noise = None
    if mask is not None:
        kept = torch.where(mask, 0.0, grad_prev)
        grad_prev = torch.where(mask, grad_prev, 0.0)
        if has_known_noise:
            grad_known_noise = (keep * kept).to(ctx.sample_dtype)
            kept = p * kept
        grad_known = kept.to(ctx.sample_dtype) if has_known else None
    through_x0 = (p - q * back) * grad_prev + grad_x0
    grad_threshold = grad_rescale = guided = None
    if sample is not None:
        guided = model_output.to(work)
        if has_cond:
            guided = guided + scale * (cond.to(work) - guided)
        output = guided if rescale is None else per_sample(rescale) * guided
        x0 = output if kind == SAMPLE else a * sample.to(work) + b * output
        axes = tuple(range(1, ctx.ndim))
        if threshold is not None:
            s = per_sample(threshold)
            inside = (x0 >= -s) & (x0 <= s)
            slope = torch.where(inside, -through_x0 * x0 / s**2, 0.0)
            grad_threshold = (slope.sum(axes) if axes else slope).to(threshold.dtype)
            through_x0 = through_x0 * inside / s
        else:
            inside = torch.ones_like(x0, dtype=torch.bool)
            if low is not None:
                inside = inside & (x0 >= low)
            if high is not None:
                inside = inside & (x0 <= high)
            through_x0 = through_x0 * inside
    grad_sample = (a * through_x0 + c * q * grad_prev).to(ctx.sample_dtype)
    grad_output = b * through_x0 + d * q * grad_prev
    if rescale is not None:
        slope = guided * grad_output
        grad_rescale = (slope.sum(axes) if axes else slope).to(rescale.dtype)
        grad_output = per_sample(rescale) * grad_output
    grad_cond = (scale * grad_output).to(ctx.output_dtype) if has_cond else None
    if has_cond:
        grad_output = (1 - scale) * grad_output
    grad_noise = (sigma * grad_prev).to(ctx.sample_dtype) if has_noise else None
    return (
        *(grad_sample, grad_output.to(ctx.output_dtype), *[None] * 7, grad_cond, None, grad_rescale, grad_threshold),
        *(grad_noise, None, grad_known, grad_known_noise, None),
    )


define("ddim_step", f"({_STEP}) -> (Tensor, Tensor)", _fake, setup_context=_setup_context, backward=_backward)
define("ddim_step_out", f"({_STEP}, *, Tensor(a!) prev_sample, Tensor(b!)? pred_original_sample) -> ()", _fake_out)


define("philox_normal", "(Tensor like, Tensor seed) -> Tensor", lambda like, seed: torch.empty_like(like))
