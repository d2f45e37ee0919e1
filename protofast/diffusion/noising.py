"""The timesteps a model is asked at, and the noised images it is asked about."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .._backend import overload
from .._ops.ddim import columns
from ..ddim import DDIMSchedule, _match, _timestep


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
    if not hasattr(num_steps, "__index__"):
        raise TypeError(f"num_steps is {num_steps!r}; give an int")
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
    check_sample("image", image)
    _match("noise", noise, image)
    table, steps = schedule._on(image.device)
    t = _timestep("timestep", timestep, steps, image)
    signal, spread = columns(overload("ddim_coefficients", image.device.type)(table, t, t, 0.0), None, image.ndim)[:2]
    work = torch.promote_types(torch.promote_types(image.dtype, noise.dtype), torch.float32)
    return (signal.to(work) * image.to(work) + spread.to(work) * noise.to(work)).to(image.dtype)


def check_sample(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a Tensor (B, ...)")
    if not (tensor.is_floating_point() and tensor.ndim):
        raise TypeError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; give floating point (B, ...)")
