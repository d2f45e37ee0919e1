"""DDIM schedules and steps (Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", eq. 12)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backend import overload
from ._ops.ddim import PREDICTION_TYPES
from ._overlap import span

# Private, though torch's own generated code lives by it. The step is right without it, only slower.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


class DDIMStep(NamedTuple):
    """Result of a DDIM step; both tensors have the sample's shape and dtype."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None


class DDIMSchedule:
    """Cumulative alphas of a diffusion process, kept in float64 and moved to each device once.

    Parameters
    ----------
    alphas_cumprod : Tensor of shape (T,)
        Product of (1 − beta) up to each timestep, in [0, 1].
    final_alpha_cumprod : float, default 1.0
        The cumulative alpha of timestep −1, the image itself. diffusers' ``set_alpha_to_one=False`` is
        ``alphas_cumprod[0]``.

    Raises
    ------
    ValueError
        When a value lies outside [0, 1], is NaN, or the table is not one-dimensional or is empty.

    Examples
    --------
    >>> import protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000, 1e-4, 0.02)
    >>> len(schedule)
    1000
    """

    def __init__(self, alphas_cumprod: Tensor, final_alpha_cumprod: float = 1.0) -> None:
        alphas = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if alphas.ndim != 1 or alphas.numel() == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(alphas.shape)}; give a non-empty vector (T,)")
        table = torch.cat([torch.tensor([float(final_alpha_cumprod)], dtype=torch.float64), alphas])
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(
                "alphas_cumprod and final_alpha_cumprod must lie in [0, 1]; a value outside (or NaN) was given"
            )
        self._values: list[float] = table.tolist()
        self._tables: dict[torch.device, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._on(torch.device("cpu"))

    @classmethod
    def from_betas(cls, betas: Tensor, *, final_alpha_cumprod: float = 1.0) -> DDIMSchedule:
        """Schedule of given betas, shape (T,), each in [0, 1]."""
        betas = torch.as_tensor(betas).detach().to("cpu", torch.float64)
        if betas.ndim != 1 or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ValueError("betas must be a vector (T,) with values in [0, 1]")
        return cls((1 - betas).cumprod(0), final_alpha_cumprod)

    @classmethod
    def linear(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDIMSchedule:
        """Betas evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> DDIMSchedule:
        """Square roots of the betas evenly spaced (latent diffusion, Rombach et al. 2022)."""
        roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64)
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> DDIMSchedule:
        """Squared-cosine cumulative alphas (Nichol and Dhariwal 2021, eq. 17), betas at most `max_beta`."""
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        bar = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> DDIMSchedule:
        """The schedule of a diffusers scheduler (one with ``alphas_cumprod``)."""
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}, which has no alphas_cumprod; give a DDIM or DDPM scheduler"
            )
        return cls(alphas, float(getattr(scheduler, "final_alpha_cumprod", 1.0)))

    def __len__(self) -> int:
        return len(self._values) - 1

    def __repr__(self) -> str:
        return f"DDIMSchedule(T={len(self)}, alphas_cumprod {self._values[1]:.6g} … {self._values[-1]:.6g})"

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative alphas (T,), float64, on the CPU."""
        return self._on(torch.device("cpu"))[0][1:].clone()

    def _on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The table with timestep −1 first, and a 0-d tensor of every timestep, on `device`."""
        found = self._tables.get(device)
        if found is None:
            with torch.inference_mode(False):  # a table made in inference mode could never serve a gradient
                table = torch.tensor(self._values, dtype=torch.float64, device=device)
                found = table, torch.arange(-1, len(self), device=device).unbind()
            self._tables[device] = found
        return found


def ddim_step(
    sample: Tensor,
    model_output: Tensor | tuple[Tensor, Tensor],
    timestep: int | Tensor,
    prev_timestep: int | Tensor,
    schedule: DDIMSchedule,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    guidance_scale: float | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> DDIMStep:
    """One DDIM step from `timestep` to `prev_timestep` (Song et al. 2021, eq. 12).

    Parameters
    ----------
    sample : Tensor of shape (B, ...)
        x_t; float32, float64, bfloat16 or float16, any strides.
    model_output : Tensor of the sample's shape, or with guidance (2B, ...) or a pair
        The prediction. With `guidance_scale`, the unconditional one first, as diffusers stacks them.
    timestep, prev_timestep : int or integer Tensor of shape (B,) on the sample's device
        One timestep a sample if a tensor. −1 is the image itself, so ``prev_timestep=-1`` is the final step.
    schedule : DDIMSchedule
    eta : float, default 0
        Scale of the noise, 0 (deterministic) to 1 (ancestral); eq. 16.
    noise : Tensor of the sample's shape, optional
        Standard normal; needed exactly when ``eta > 0``.
    prediction_type : {"epsilon", "sample", "v_prediction"}
    clip_range : float or (float, float), optional
        Clips the predicted image to [−c, c] or [low, high]. The direction keeps the unclipped prediction, as in
        diffusers.
    guidance_scale : float, optional
        Classifier-free guidance: uncond + scale · (cond − uncond).
    out : Tensor or pair of Tensors, optional
        Where to write. One tensor takes ``prev_sample`` alone (``pred_original_sample`` is then None and is not
        computed); a pair takes both. May be `sample` itself. Not differentiable.
    backend : str, optional

    Returns
    -------
    DDIMStep
        ``prev_sample`` and ``pred_original_sample``, of the sample's shape and dtype; differentiable in the sample,
        the prediction and the noise.

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument. Timesteps on a GPU are not looked at (that would wait for it): one outside the
        schedule gives NaN.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> x, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> pf.ddim_step(x, e, 500, 480, schedule).prev_sample.shape
    torch.Size([2, 3, 8, 8])
    """
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample is a {type(sample).__name__}; give a torch tensor")
    if not isinstance(schedule, DDIMSchedule):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}; give a DDIMSchedule (DDIMSchedule.from_diffusers makes one of a "
            "diffusers scheduler)"
        )
    dtype, shape, where = sample.dtype, sample.shape, sample.device
    if not (dtype.is_floating_point and shape):
        raise TypeError(f"sample is {sample.dtype} of shape {tuple(sample.shape)}; give floating point (B, ...)")
    kind = PREDICTION_TYPES.get(prediction_type)
    if kind is None:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    cond_output = None
    if guidance_scale is not None:
        model_output, cond_output = _pair(model_output, sample)
    elif isinstance(model_output, (tuple, list)):
        raise TypeError("model_output is a pair, which only guidance_scale takes; give one tensor, or the scale")
    same = (
        isinstance(model_output, Tensor)
        and model_output.dtype == dtype
        and model_output.shape == shape
        and model_output.device == where
    )
    if not same:  # what is the same needs no closer look, and the look costs as much as a small step
        _match("model_output", model_output, sample)
    if cond_output is not None:
        _match("model_output (conditional part)", cond_output, sample)
    if (eta != 0) != (noise is not None):
        if noise is None:
            raise ValueError(f"eta is {eta}, so the step needs noise; pass noise=torch.randn_like(sample), or eta=0")
        raise ValueError("noise was given with eta 0, where the step draws none; pass eta > 0, or no noise")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number from 0 to 1")
    if noise is not None:
        _match("noise", noise, sample)
    if clip_range is None:
        low, high = -math.inf, math.inf
    else:
        ends = tuple(clip_range) if isinstance(clip_range, (tuple, list)) else (-clip_range, clip_range)
        if not (len(ends) == 2 and ends[0] <= ends[1]):
            raise ValueError(f"clip_range is {clip_range}; give c >= 0 or (low, high) with low <= high")
        low, high = float(ends[0]), float(ends[1])
    table, steps = schedule._on(where)
    now = _timestep("timestep", timestep, steps, sample)
    prev = _timestep("prev_timestep", prev_timestep, steps, sample)
    compiling = torch.compiler.is_compiling()
    if not (isinstance(timestep, Tensor) or compiling):
        alpha = schedule._values[timestep + 1]
        if alpha == 0 and prediction_type == "epsilon":
            raise ValueError(
                f"timestep {timestep} has cumulative alpha 0 (zero terminal SNR), where epsilon says nothing of the "
                "image; use a model with v_prediction or sample prediction"
            )
        if alpha == 1 and (prediction_type == "sample" or eta > 0):
            raise ValueError(f"timestep {timestep} has cumulative alpha 1 (no noise), where this step is undefined")

    wide = dtype
    if not (
        (same or model_output.dtype == dtype)
        and (cond_output is None or cond_output.dtype == dtype)
        and (noise is None or noise.dtype == dtype)
    ):  # as under autocast
        for tensor in (model_output, cond_output, noise):
            wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
        model_output = model_output.to(wide)
        cond_output = None if cond_output is None else cond_output.to(wide)
        noise = None if noise is None else noise.to(wide)
    inputs = (
        sample if wide == dtype else sample.to(wide),
        model_output,
        cond_output,
        noise,
        table,
        now,
        prev,
        eta,
        kind,
        low,
        high,
        1.0 if guidance_scale is None else guidance_scale,
    )
    device = where.type
    differentiates = torch.is_grad_enabled() and (
        sample.requires_grad
        or model_output.requires_grad
        or (cond_output is not None and cond_output.requires_grad)
        or (noise is not None and noise.requires_grad)
    )
    if out is None:
        step = overload("ddim_step", device, backend)
        if differentiates or compiling:
            result = step(*inputs)
        else:  # torch's autograd layer of an op with a formula in Python takes longer than a small step
            with _below_autograd():
                result = step(*inputs)
        return DDIMStep(*result) if wide == dtype else DDIMStep._make(r.to(dtype) for r in result)
    prev_out, x0_out = _outputs(out, sample)
    if differentiates or (
        torch.is_grad_enabled() and (prev_out.requires_grad or (x0_out is not None and x0_out.requires_grad))
    ):
        raise ValueError("out= cannot be used where a gradient is needed; leave it out, or use torch.no_grad()")
    if wide == dtype:
        overload("ddim_step_out", device, backend)(*inputs, prev_sample=prev_out, pred_original_sample=x0_out)
    else:
        result = overload("ddim_step", device, backend)(*inputs)
        prev_out.copy_(result[0])
        if x0_out is not None:
            x0_out.copy_(result[1])
    return DDIMStep(prev_out, x0_out)


def ddim_inverse_step(
    sample: Tensor,
    model_output: Tensor | tuple[Tensor, Tensor],
    timestep: int | Tensor,
    next_timestep: int | Tensor,
    schedule: DDIMSchedule,
    *,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    guidance_scale: float | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> DDIMStep:
    """One step of DDIM inversion, from `timestep` up to the noisier `next_timestep` (Song et al. 2021, sec. 4.3).

    It is the deterministic step taken the other way, so the arguments are those of `ddim_step` with eta 0, and
    ``prev_sample`` of the result is the sample at `next_timestep`. ``timestep=-1`` starts from the image itself.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> x, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> up = pf.ddim_inverse_step(x, e, 480, 500, schedule).prev_sample
    >>> torch.allclose(pf.ddim_step(up, e, 500, 480, schedule).prev_sample, x, atol=1e-5)
    True
    """
    return ddim_step(
        sample,
        model_output,
        timestep,
        next_timestep,
        schedule,
        prediction_type=prediction_type,
        clip_range=clip_range,
        guidance_scale=guidance_scale,
        out=out,
        backend=backend,
    )


def _pair(model_output: Tensor | tuple[Tensor, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(model_output, (tuple, list)):
        if len(model_output) != 2:
            raise ValueError(f"model_output has {len(model_output)} parts; guidance takes the pair (uncond, cond)")
        return model_output[0], model_output[1]
    if not isinstance(model_output, Tensor):
        raise TypeError(f"model_output is a {type(model_output).__name__}; give a torch tensor, or a pair of them")
    batch = sample.shape[0]
    if model_output.shape != (2 * batch, *sample.shape[1:]):
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; guidance_scale takes the unconditional and the "
            f"conditional prediction stacked, {(2 * batch, *sample.shape[1:])}, or a pair of tensors"
        )
    return model_output[:batch], model_output[batch:]


def _match(name: str, tensor: Tensor, sample: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
    if tensor.shape != sample.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the sample's is {tuple(sample.shape)}")
    if tensor.device != sample.device:
        raise ValueError(f"{name} is on {tensor.device}; the sample is on {sample.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; give floating point")


def _outputs(out: Tensor | tuple[Tensor, Tensor], sample: Tensor) -> tuple[Tensor, Tensor | None]:
    pair = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(pair) not in (1, 2):
        raise ValueError(
            f"out has {len(pair)} parts; give prev_sample, or the pair (prev_sample, pred_original_sample)"
        )
    for name, tensor in zip(("out", "out[1]"), pair, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
        if tensor.shape != sample.shape or tensor.dtype != sample.dtype or tensor.device != sample.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be {sample.dtype} "
                f"{tuple(sample.shape)} on {sample.device}, as the sample is"
            )
        if not tensor.is_contiguous() and any(
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise ValueError(f"{name} is expanded (stride 0), so its elements share memory; give it memory of its own")
    if len(pair) == 1:
        return pair[0], None
    if not torch.compiler.is_compiling():
        (first, end), (other_first, other_end) = span(pair[0]), span(pair[1])
        # Where one is strided they may be interleaved, which is fine, unless both begin in the same place.
        dense = end - first == other_end - other_first == sample.numel() * sample.element_size()
        if first == other_first != end or (dense and first < other_end and other_first < end):
            raise ValueError("out[0] and out[1] share memory; give two tensors")
    return pair[0], pair[1]


def _timestep(name: str, value: int | Tensor, steps: tuple[Tensor, ...], sample: Tensor) -> Tensor:
    last = len(steps) - 2
    if type(value) is int and -1 <= value <= last and not torch.compiler.is_compiling():
        return steps[value + 1]
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is a {value.dtype} tensor; give integers")
        if value.numel() != 1 and value.shape != sample.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give one a sample, ({sample.shape[0]},)")
        if value.device != sample.device:
            raise ValueError(f"{name} is on {value.device}; move it to the sample's {sample.device}")
        if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in value.aminmax())  # as ints: -1 and 999 would wrap in an 8-bit tensor
            if low < -1 or high > last:
                raise IndexError(f"{name} has values from {low} to {high}; the schedule has -1 to {last}")
        return value if value.dtype == torch.int64 else value.long()
    if not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} is {value!r}; give an int or an integer tensor")
    if not -1 <= value <= last:
        raise IndexError(f"{name} is {value}; the schedule has -1 (the image) to {last}")
    if torch.compiler.is_compiling():  # steps[value + 1] would compile anew for every timestep
        return torch.full((), value, dtype=torch.int64, device=sample.device)
    return steps[value + 1]
