"""Noise of images."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._backend import overload
from .._files import digest
from .._ops.ddim import PREDICTION_TYPES, columns
from ..ddim import DDIMSchedule, DDIMStep, _rescale, check_levels, check_schedule, ddim_inverse_step
from .loop import Callback, LoopStep, check_out, place, run
from .noising import check_sample, timesteps
from .predictor import Predictor


@torch.no_grad()
def invert(
    model: Callable[..., Tensor],
    image: Tensor,
    schedule: DDIMSchedule,
    num_steps: int,
    *,
    spacing: str | Sequence[int] = "trailing",
    fixed_point: int = 0,
    tolerance: float = 0.0,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    resume: str | os.PathLike[str] | None = None,
    compile: bool | str = False,
    cuda_graph: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> Tensor:
    """The noise whose deterministic sample is the image, by `num_steps` steps upwards (Song et al. 2021, sec. 4.3).

    Give the arguments that `sample` will get. A step from s up to t undoes the sampling step from t down to s, which
    asks the model at (x_t, t). x_t is not known yet, so the model is asked at (x_s, t): the right timestep at a point
    off by one step, as diffusers does; and the first step, from the image, has no other timestep to ask at. The
    round trip is therefore off by O(1 / num_steps), and fails where the model is not smooth at that scale.
    The prediction is turned into a noise at t as well, so one denoiser gives one inversion under every
    `prediction_type`.

    With `fixed_point` each step solves x_t = up(x_s, model(x_t, t)) by asking again at the x_t found (Pan et al. 2023,
    "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion"). Where this contracts, the
    round trip comes down to round-off. Its error is measured: the residual of a sample is the root of the mean square
    of up(x_s, model(x_t, t)) − x_t over its elements, at the x_t that is returned. Each sample keeps the iterate of
    the smallest residual and stops where that is at most `tolerance`, or falls no further. A residual is of its step:
    the way back divides by √ᾱ_t, which near 0 (the end of a cosine schedule) makes much of little.

    Parameters
    ----------
    image : Tensor of shape (N, ...)
        Floating point, in the model's range. Not written to.
    fixed_point : int, default 0
        Iterations of a step at most, each another call of the model. 1 returns the plain inversion, measured.
    tolerance : float, default 0
        The residual that is small enough; the sample at t has a standard deviation near 1.
    callback : callable, optional
        ``callback(number, timestep, step)``; ``step.prev_sample`` is the sample at `timestep`, and ``step.residual``
        with `fixed_point` its residuals, (B,), infinite where they are no number.
    cuda_graph : bool, default False
        As in `sample`; not with `fixed_point`, whose number of calls depends on values.
    model, schedule, num_steps, spacing, prediction_type, clip_range, guidance_scale, guidance_rescale, cond, uncond, \
batch_size, device, out, resume, compile, progress, backend
        As in `sample`.

    Returns
    -------
    Tensor
        The sample at the noisiest timestep, T − 1 with the default spacing: `out`, or one of the image's shape, dtype
        and device.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; also for a folder `resume` of other settings, or that is damaged.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> model = lambda x, t: torch.tanh(x)
    >>> x, residuals = torch.rand(2, 1, 8, 8, dtype=torch.float64), []
    >>> watch = lambda number, t, step: residuals.append(float(step.residual.max()))
    >>> noise = pf.diffusion.invert(model, x, schedule, 10, fixed_point=100, callback=watch)
    >>> max(residuals) < 1e-14
    True
    >>> torch.allclose(pf.diffusion.sample(model, noise, schedule, 10), x, atol=1e-12)
    True
    """
    check_sample("image", image)
    check_schedule(schedule)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    if operator.index(fixed_point) < 0:
        raise ValueError(f"fixed_point is {fixed_point}; give a number of iterations, or 0 for the plain inversion")
    if fixed_point and cuda_graph:
        raise ValueError(
            "cuda_graph and fixed_point were both given, but the iterations depend on values; give one of them"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 or more")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; give a number from 0 to 1")
    if guidance_rescale and guidance_scale is None:
        raise ValueError("guidance_rescale was given without guidance_scale; give both, or neither")
    steps = timesteps(num_steps, len(schedule), spacing)[::-1]
    pairs = list(zip([-1, *steps[:-1]], steps, strict=True))
    where = place(image, device)
    predictor = Predictor(model, guidance_scale, cond, uncond, samples=image.shape[0], device=where, compile=compile)
    split = {"image": image, **predictor.split}
    check_out(out, "image", split)

    pure = {t for t in steps if schedule._values[t + 1] == 0}
    for t in pure:
        check_levels(t, schedule, prediction_type, False)
    if steps[0] in pure:
        raise ValueError(
            f"the only step goes from the image to timestep {steps[0]}, which has cumulative alpha 0 (zero terminal "
            "SNR) and keeps nothing of it; give num_steps of 2 or more"
        )

    def predicted(x: Tensor, t: int, conditions: Mapping[str, Any]) -> Tensor:
        """The noise that the model sees in x; both halves of it under guidance, for they mix as predictions do.

        In pure noise, which is all noise whatever the model says, the image that it sees.
        """
        output = predictor(x, t, conditions)
        if guidance_rescale and guidance_scale is not None:
            halves = output[: x.shape[0]], output[x.shape[0] :]
            factor = _rescale(*halves, guidance_scale, guidance_rescale).to(output.dtype)
            output = output * torch.cat([factor, factor]).reshape(-1, *[1] * (x.ndim - 1))
        if t in pure:
            return output if prediction_type == "sample" else -output
        if prediction_type == "epsilon":
            return output
        table, at = schedule._on(x.device)
        row = overload("ddim_coefficients", x.device.type)(table, at[t + 1], at[t + 1], 0.0)
        signal, spread = columns(row, None, x.ndim)[:2]
        c, d = (1 / spread, -signal / spread) if prediction_type == "sample" else (spread, signal)
        work = torch.promote_types(x.dtype, torch.float32)
        both = x if guidance_scale is None else torch.cat([x, x])
        return c * both.to(work) + d * output.to(work)

    def advance(number: int, x: Tensor, inputs: Mapping[str, Any], target: Tensor | None) -> LoopStep:
        now, t = pairs[number]

        def up(at: Tensor, target: Tensor | None = None) -> DDIMStep:
            return ddim_inverse_step(
                x,
                predicted(at, t, inputs["conditions"]),
                now,
                t,
                schedule,
                prediction_type="sample" if t in pure else "epsilon",
                clip_range=clip_range,
                guidance_scale=guidance_scale,
                out=target,
                backend=backend,
            )

        return solve(up, x, fixed_point, tolerance) if fixed_point else LoopStep(*up(x, target))

    return run(
        advance,
        image,
        lambda rows: {name: tensor[rows] for name, tensor in split.items()},
        predictor,
        steps,
        name="image",
        what="inverting",
        device=where,
        batch_size=batch_size,
        out=out,
        resume=resume,
        settings={
            "timesteps": steps,
            "schedule": digest(torch.tensor(schedule._values)),
            "fixed_point": fixed_point,
            "tolerance": tolerance,
            "prediction_type": prediction_type,
            "clip_range": clip_range,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "compile": compile,
            "backend": str(overload("ddim_step", where.type, backend)),
        },
        cuda_graph=cuda_graph,
        progress=progress,
        callback=callback,
    )


def solve(up: Callable[[Tensor], DDIMStep], x: Tensor, most: int, tolerance: float) -> LoopStep:
    """x_t = up(x_t), from the guess up(x), by at most `most` further calls; every sample for itself."""
    work = torch.promote_types(x.dtype, torch.float32)
    step = best = up(x)
    residual = torch.full(x.shape[:1], math.inf, dtype=work, device=x.device)
    going = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    for _ in range(most):
        following = up(step.prev_sample)
        difference = (following.prev_sample.to(work) - step.prev_sample.to(work)).reshape(x.shape[0], -1)
        change = difference.square().mean(1).sqrt()  # how far `step` is from solving it
        better = going & (change < residual)
        rows = better.reshape(-1, *[1] * (x.ndim - 1))
        best = DDIMStep(*(torch.where(rows, *pair) for pair in zip(step, best, strict=True)))  # type: ignore[arg-type]
        residual = torch.where(better, change, residual)
        going = better & (change > tolerance)
        if not bool(going.any()):
            break
        step = following
    return LoopStep(*best, residual=residual)
