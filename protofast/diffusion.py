"""DDIM sampling, inversion and noising of any ``model(x, t, **cond)`` (Song, Meng, Ermon 2021)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._ops.ddim import EPSILON, PREDICTION_TYPES, coefficients
from ._optional import need
from .ddim import DDIMSchedule, DDIMStep, _match, _timestep, ddim_inverse_step, ddim_step

Callback = Callable[[int, int, DDIMStep], None]
"""Called after every step with its number, the timestep the model was asked at, and the result."""


def timesteps(num_steps: int, num_timesteps: int, spacing: str | Sequence[int] = "trailing") -> list[int]:
    """The timesteps that a model trained on `num_timesteps` is asked at, noisiest first.

    Parameters
    ----------
    num_steps : int
        From 1 to `num_timesteps`.
    num_timesteps : int
        Length T of the schedule.
    spacing : {"trailing", "leading", "linspace"} or sequence of int
        Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2. ``trailing``
        always begins at T − 1, where the model expects pure noise; ``leading`` (T // num_steps apart, ends at 0)
        begins short of it; ``linspace`` has both ends, and T − 1 alone if there is one step. A sequence is taken as
        it is: `num_steps` timesteps, strictly falling.

    Returns
    -------
    list of int

    Raises
    ------
    ValueError
        For a number of steps outside 1 … T, an unknown spacing, or a sequence that does not fall from below T to 0.

    Examples
    --------
    >>> from protofast.diffusion import timesteps
    >>> timesteps(4, 1000), timesteps(4, 1000, "leading"), timesteps(4, 1000, "linspace")
    ([999, 749, 499, 249], [750, 500, 250, 0], [999, 666, 333, 0])
    """
    count, last = operator.index(num_steps), num_timesteps - 1
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"num_steps is {num_steps}; give 1 to {num_timesteps}, the length of the schedule")
    if not isinstance(spacing, str):
        steps = [operator.index(step) for step in spacing]
        if len(steps) != count:
            raise ValueError(f"spacing lists {len(steps)} timesteps and num_steps is {count}; make them agree")
        if steps[0] > last or steps[-1] < 0 or any(b >= a for a, b in pairwise(steps)):
            raise ValueError(
                f"spacing is {steps}; list timesteps that fall strictly, from at most {last} to at least 0"
            )
        return steps
    if spacing == "trailing":
        return [round(num_timesteps - i * num_timesteps / count) - 1 for i in range(count)]
    if spacing == "leading":
        return [i * (num_timesteps // count) for i in reversed(range(count))]
    if spacing == "linspace":
        return [round(i * last / (count - 1)) for i in reversed(range(count))] if count > 1 else [last]
    raise ValueError(f"spacing is {spacing!r}; choose 'trailing', 'leading', 'linspace' or list the timesteps")


def add_noise(image: Tensor, noise: Tensor, timestep: int | Tensor, schedule: DDIMSchedule) -> Tensor:
    """The noised image √ᾱ·image + √(1 − ᾱ)·noise of a timestep (Ho et al. 2020, eq. 4).

    Parameters
    ----------
    image : Tensor of shape (B, ...)
        Floating point.
    noise : Tensor of the image's shape
        Standard normal.
    timestep : int or integer Tensor of shape (B,) on the image's device
        −1 is the image itself.
    schedule : DDIMSchedule

    Returns
    -------
    Tensor
        Of the image's shape and dtype; differentiable in both tensors.

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument. Timesteps on a GPU are not looked at: one outside the schedule gives NaN.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> x = torch.rand(2, 1, 8, 8)
    >>> pf.diffusion.add_noise(x, torch.randn_like(x), torch.tensor([10, 999]), schedule).shape
    torch.Size([2, 1, 8, 8])
    """
    _check_sample("image", image)
    _match("noise", noise, image)
    table, steps = schedule._on(image.device)
    t = _timestep("timestep", timestep, steps, image)
    signal, spread = coefficients(table, t, t, 0.0, EPSILON, image.ndim)[4:6]
    work = torch.promote_types(torch.promote_types(image.dtype, noise.dtype), torch.float32)
    return (signal.to(work) * image.to(work) + spread.to(work) * noise.to(work)).to(image.dtype)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    schedule: DDIMSchedule,
    num_steps: int,
    *,
    spacing: str | Sequence[int] = "trailing",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    guidance_scale: float | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> Tensor:
    """Images of given noise, by `num_steps` DDIM steps (Song et al. 2021, eq. 12).

    No gradient is kept. The model is called as it stands: put it in ``eval()`` first.

    Parameters
    ----------
    model : callable
        ``model(x, t, **cond)`` returns the prediction, a Tensor of x's shape; `t` is an int64 Tensor (B,).
    noise : Tensor of shape (B, ...)
        Floating point; standard normal for a fresh image, or what `invert` returned. Not written to.
    schedule : DDIMSchedule
    num_steps : int
        Calls of the model.
    spacing : str or sequence of int, default "trailing"
        See `timesteps`.
    eta : float, default 0
        Noise added at each step, 0 (deterministic) to 1 (ancestral); eq. 16.
    generator : torch.Generator, optional
        Draws that noise, on its own device.
    prediction_type : {"epsilon", "sample", "v_prediction"}
    clip_range : float or (float, float), optional
        Clips each predicted image to [−c, c] or [low, high].
    guidance_scale : float, optional
        Classifier-free guidance, uncond + scale · (cond − uncond). The model then sees a batch of 2B, unconditional
        half first, with the Tensors of `uncond` and `cond` concatenated.
    cond : mapping, optional
        Keyword arguments of the model.
    uncond : mapping, optional
        The same keys for the unconditional half; needed exactly when `guidance_scale` is given. What is no Tensor
        must be equal in both.
    progress : bool, default False
        Shows a bar; needs the extra ``protofast[cli]``.
    callback : callable, optional
        ``callback(number, timestep, step)`` after each step; `step` is the `DDIMStep` from `timestep` down.
    backend : str, optional

    Returns
    -------
    Tensor
        Of the noise's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> model = lambda x, t: torch.zeros_like(x)
    >>> pf.diffusion.sample(model, torch.randn(2, 1, 8, 8), schedule, 10).shape
    torch.Size([2, 1, 8, 8])
    """
    _check_sample("noise", noise)
    steps = timesteps(num_steps, len(schedule), spacing)
    call = _caller(model, guidance_scale, cond, uncond)
    x = noise
    for number, (t, prev) in enumerate(_track(list(zip(steps, [*steps[1:], -1], strict=True)), progress, "sampling")):
        step = ddim_step(
            x,
            call(x, t),
            t,
            prev,
            schedule,
            eta=eta,
            noise=_draw(x, generator) if eta else None,
            prediction_type=prediction_type,
            clip_range=clip_range,
            guidance_scale=guidance_scale,
            backend=backend,
        )
        x = step.prev_sample
        if callback is not None:
            callback(number, t, step)
    return x


@torch.no_grad()
def invert(
    model: Callable[..., Tensor],
    image: Tensor,
    schedule: DDIMSchedule,
    num_steps: int,
    *,
    spacing: str | Sequence[int] = "trailing",
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    guidance_scale: float | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
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

    Parameters
    ----------
    image : Tensor of shape (B, ...)
        Floating point, in the model's range. Not written to.
    callback : callable, optional
        ``callback(number, timestep, step)``; ``step.prev_sample`` is the sample at `timestep`.
    model, schedule, num_steps, spacing, prediction_type, clip_range, guidance_scale, cond, uncond, progress, backend
        As in `sample`.

    Returns
    -------
    Tensor
        The sample at the noisiest timestep, T − 1 with the default spacing; of the image's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> model = lambda x, t: torch.zeros_like(x)
    >>> x = torch.rand(2, 1, 8, 8)
    >>> noise = pf.diffusion.invert(model, x, schedule, 10)
    >>> torch.allclose(pf.diffusion.sample(model, noise, schedule, 10), x, atol=1e-5)
    True
    """
    _check_sample("image", image)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    steps = timesteps(num_steps, len(schedule), spacing)[::-1]
    call = _caller(model, guidance_scale, cond, uncond)
    table, positions = schedule._on(image.device)
    x = image
    for number, (now, t) in enumerate(_track(list(zip([-1, *steps], steps, strict=False)), progress, "inverting")):
        output = call(x, t)
        if prediction_type != "epsilon":
            c, d = coefficients(
                table, positions[t + 1], positions[t + 1], 0.0, PREDICTION_TYPES[prediction_type], x.ndim
            )[2:4]
            work = torch.promote_types(x.dtype, torch.float32)
            both = x if guidance_scale is None else torch.cat([x, x])
            output = c * both.to(work) + d * output.to(work)
        step = ddim_inverse_step(
            x, output, now, t, schedule, clip_range=clip_range, guidance_scale=guidance_scale, backend=backend
        )
        x = step.prev_sample
        if callback is not None:
            callback(number, t, step)
    return x


def _check_sample(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a Tensor (B, ...)")
    if not (tensor.is_floating_point() and tensor.ndim):
        raise TypeError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; give floating point (B, ...)")


def _draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _caller(
    model: Callable[..., Tensor], scale: float | None, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None
) -> Callable[[Tensor, int], Tensor]:
    """``call(x, timestep)``: the model's prediction with its conditions, for both halves under guidance."""
    given = dict(cond or {})
    if (scale is None) != (uncond is None):
        raise ValueError("guidance_scale and uncond go together; give both, or neither")
    if uncond is not None:
        given = _join(uncond, given)

    def call(x: Tensor, timestep: int) -> Tensor:
        if scale is not None:
            x = torch.cat([x, x])
        output = model(x, torch.full((x.shape[0],), timestep, device=x.device), **given)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model returned a {type(output).__name__}; it must return a Tensor "
                "(wrap it, as in lambda x, t: model(x, t).sample)"
            )
        if output.shape != x.shape:
            raise ValueError(
                f"model returned shape {tuple(output.shape)} for a sample of {tuple(x.shape)}; they must agree"
            )
        return output

    return call


def _join(uncond: Mapping[str, Any], cond: Mapping[str, Any]) -> dict[str, Any]:
    if uncond.keys() != cond.keys():
        raise ValueError(f"uncond has the keys {sorted(uncond)} and cond {sorted(cond)}; they must be the same")
    joined = {}
    for key, value in cond.items():
        other = uncond[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            joined[key] = torch.cat([other, value])
        elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
            raise ValueError(
                f"{key!r} differs between cond and uncond and is no pair of Tensors, so it cannot be stacked"
            )
        else:
            joined[key] = value
    return joined


def _track(steps: Iterable[Any], progress: bool, what: str) -> Iterable[Any]:
    return need("rich.progress", "cli").track(steps, description=what) if progress else steps
