"""DDIM step in plain torch. Arithmetic is float64; results are rounded once."""

import torch
from torch import Tensor

from protofast._ops import implement
from protofast._ops.ddim import coefficients


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    cond_output: Tensor | None,
    noise: Tensor | None,
    alphas_cumprod: Tensor,
    timestep: Tensor,
    prev_timestep: Tensor,
    eta: float,
    prediction_type: int,
    clip_min: float,
    clip_max: float,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    a, b, c, d, p, q, sigma = coefficients(alphas_cumprod, timestep, prev_timestep, eta, prediction_type, sample.ndim)
    x, m = sample.double(), model_output.double()
    if cond_output is not None:
        m = m + guidance_scale * (cond_output.double() - m)
    x0 = (a * x + b * m).clamp(clip_min, clip_max)
    prev = p * x0 + q * (c * x + d * m)
    if noise is not None:
        prev = prev + sigma * noise.double()
    return tuple(torch.empty_like(sample).copy_(result) for result in (prev, x0))  # type: ignore[return-value]


def ddim_step_out(*inputs, prev_sample: Tensor, pred_original_sample: Tensor | None) -> None:
    prev, x0 = ddim_step(*inputs)
    prev_sample.copy_(prev)
    if pred_original_sample is not None:
        pred_original_sample.copy_(x0)


implement("ddim_step", "reference", ["default"], ddim_step)
implement("ddim_step_out", "reference", ["default"], ddim_step_out)
