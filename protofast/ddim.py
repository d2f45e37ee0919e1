"""DDIM schedules and steps (Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", eq. 12)."""

from __future__ import annotations

import math
import operator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backend import chooses, differentiates, overload, why_not
from ._ops.ddim import PREDICTION_TYPES
from ._overlap import apart, folded


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
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
        if alphas.ndim != 1 or alphas.numel() == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(alphas.shape)}; give a non-empty vector (T,)")
        final = torch.tensor([float(final_alpha_cumprod)], dtype=torch.float64, device="cpu")
        table = torch.cat([final, alphas])
        if not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(
                "alphas_cumprod and final_alpha_cumprod must lie in [0, 1]; a value outside (or NaN) was given"
            )
        self.__setstate__(table.tolist())

    def __getstate__(self) -> list[float]:
        return self._values

    def __setstate__(self, values: list[float]) -> None:
        self._values, self._pure = values, 0.0 in values
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._plans: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._quick: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    @classmethod
    def from_betas(cls, betas: Tensor, *, final_alpha_cumprod: float = 1.0) -> DDIMSchedule:
        """Schedule of given betas, shape (T,), each in [0, 1]."""
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach()
        if betas.ndim != 1 or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ValueError("betas must be a vector (T,) with values in [0, 1]")
        return cls((1 - betas).cumprod(0), final_alpha_cumprod)

    @classmethod
    def linear(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDIMSchedule:
        """Betas evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020)."""
        return cls.from_betas(_linspace(beta_start, beta_end, num_timesteps))

    @classmethod
    def scaled_linear(cls, num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> DDIMSchedule:
        """Square roots of the betas evenly spaced (latent diffusion, Rombach et al. 2022)."""
        roots = _linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps)
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> DDIMSchedule:
        """Squared-cosine cumulative alphas (Nichol and Dhariwal 2021, eq. 17), betas at most `max_beta`."""
        time = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
        bar = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @classmethod
    def sigmoid(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> DDIMSchedule:
        """Betas from `beta_start` to `beta_end` along a sigmoid of [−6, 6] (Xu et al. 2022; diffusers' "sigmoid")."""
        rise = _linspace(-6, 6, num_timesteps).sigmoid()
        return cls.from_betas(beta_start + (beta_end - beta_start) * rise)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> DDIMSchedule:
        """The schedule of a diffusers scheduler (one with ``alphas_cumprod``)."""
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}, which has no alphas_cumprod; give a DDIM or DDPM scheduler"
            )
        return cls(alphas, float(getattr(scheduler, "final_alpha_cumprod", 1.0)))

    def zero_terminal_snr(self) -> DDIMSchedule:
        """The schedule rescaled so that the last timestep is pure noise (Lin et al. 2024, algorithm 1).

        The square roots of the cumulative alphas are shifted and scaled: the last becomes 0, the first stays. Epsilon
        says nothing of the image there, so the model has to predict v or the sample.

        Examples
        --------
        >>> import protofast as pf
        >>> float(pf.DDIMSchedule.linear(1000).zero_terminal_snr().alphas_cumprod[-1])
        0.0
        """
        root = self.alphas_cumprod.sqrt()
        if len(root) < 2 or root[0] == root[-1]:
            raise ValueError("a schedule of constant cumulative alphas cannot be rescaled to zero terminal SNR")
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas = root.square()
        alphas[0] = self._values[1]
        return DDIMSchedule(alphas, self._values[0])

    def __len__(self) -> int:
        return len(self._values) - 1

    def __repr__(self) -> str:
        return f"DDIMSchedule(T={len(self)}, alphas_cumprod {self._values[1]:.6g} … {self._values[-1]:.6g})"

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative alphas (T,), float64, on the CPU."""
        return self._on(torch.device("cpu"))[0][1:].clone()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table with timestep −1 first, and every timestep, on `device`."""
        found = self._tables.get(device)
        if found is None:
            with torch.inference_mode(False):  # a table made in inference mode could never serve a gradient
                table = torch.tensor(self._values, dtype=torch.float64, device=device)
                found = table, torch.arange(-1, len(self), device=device)
            if not torch.compiler.is_compiling() and lasts(table):
                self._tables[device] = found
        return found


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def ddim_step(
    sample: Tensor,
    model_output: Tensor | tuple[Tensor, Tensor],
    timestep: int | Tensor,
    prev_timestep: int | Tensor,
    schedule: DDIMSchedule,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    seed: int | tuple[int, int] | Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    dynamic_threshold: float | tuple[float, float] | None = None,
    use_clipped_model_output: bool = False,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    mask: Tensor | None = None,
    bitwise: bool = False,
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
        Scale of the noise, 0 (deterministic) to 1 (ancestral); eq. 16. When positive, give `noise` or `seed`.
    noise : Tensor of the sample's shape, optional
        Standard normal.
    seed : int, (int, int) or int64 Tensor of shape (2,) on the sample's device, optional
        Draws the noise within the step instead: seed and offset (0 if left out) of a counter generator. Sample n is
        number offset + n; its noise depends on that, the seed and the place in the sample alone, and has the same bits
        on every backend. `normal_noise` returns it. Give every step of a loop numbers of its own, as `diffusion.sample`
        does: ``(seed, step << 32)``. The same noise at each step spoils the samples.
    prediction_type : {"epsilon", "sample", "v_prediction"}
    clip_range : float or (float, float), optional
        Clips the predicted image to [−c, c] or [low, high].
    dynamic_threshold : float or (float, float), optional
        Dynamic thresholding (Saharia et al. 2022): the quantile of |predicted image| in each sample, and the largest
        threshold (no limit if left out). The image is clipped to [−s, s] and divided by s, with s at least 1.
    use_clipped_model_output : bool, default False
        The direction follows the clipped image; otherwise the unclipped prediction, both as in diffusers.
    guidance_scale : float, optional
        Classifier-free guidance: uncond + scale · (cond − uncond).
    guidance_rescale : float, default 0
        Share φ of the guided prediction that is scaled to the standard deviation of the conditional one (Lin et al.
        2024, sec. 3.4); 0 to 1.
    known, mask : Tensor of the sample's shape, and bool Tensor that broadcasts to it, optional
        Inpainting: the step is taken where `mask` is True; elsewhere the result is `known`.
    known_noise : Tensor of the sample's shape, optional
        Standard normal. `known` is then a clean image and is noised to `prev_timestep`; without, it is kept as it is.
    bitwise : bool, default False
        Every operation in the order of the eager formula, each rounded: for float32 and float64 the bits that
        diffusers' step has on a CPU, with a schedule ``from_diffusers``, on every backend. (Coefficients of timesteps
        that a GPU holds are computed there, where the square root may differ by a bit.) Otherwise the step is one
        multiply-add on coefficients computed in float64, which is quicker and closer to the exact result.
    out : Tensor or pair of Tensors, optional
        Where to write. One tensor takes ``prev_sample`` alone (``pred_original_sample`` is then None and is not
        computed); a pair takes both. May be `sample` itself. Not differentiable.
    backend : str, optional

    Returns
    -------
    DDIMStep
        ``prev_sample`` and ``pred_original_sample``, of the sample's shape and dtype; differentiable in the sample,
        the prediction, the noise and what is known.

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
    plain = (  # nothing beyond the common step
        noise is None
        and seed is None
        and guidance_scale is None
        and dynamic_threshold is None
        and known is None
        and known_noise is None
        and mask is None
        and not eta
        and not guidance_rescale
    )
    if clip_range is not None and type(clip_range) is not float:
        clip_range = _range(clip_range)
    plan = None  # what was checked and computed at the first step of this kind
    if not torch.compiler.is_compiling():
        if type(eta) is not float:
            eta = float(eta)
        if not type(timestep) is type(prev_timestep) is int:
            timestep, prev_timestep = _on_host(timestep, sample), _on_host(prev_timestep, sample)
        if type(timestep) is type(prev_timestep) is int and isinstance(schedule, DDIMSchedule):
            settings = timestep, prev_timestep, eta, prediction_type, clip_range, use_clipped_model_output, bitwise
            if plain and type(sample) is type(model_output) is Tensor and sample.is_cpu and chooses("native", backend):
                quick = schedule._quick.get(settings)
                grad = (sample.requires_grad or model_output.requires_grad) and torch.is_grad_enabled()
                if quick is not None and not grad:
                    step, step_out, arguments = quick
                    try:  # the op checks as much as it needs
                        if out is None:
                            return tuple.__new__(DDIMStep, step(sample, model_output, *arguments))
                        if type(out) is Tensor and out.is_contiguous() and not out.requires_grad:
                            step_out(sample, model_output, *arguments, prev_sample=out, pred_original_sample=None)
                            _written(out)
                            return DDIMStep(out, None)
                    except RuntimeError:  # explained below
                        pass
            if isinstance(sample, Tensor):
                plan = schedule._plans.get((*settings, sample.device, sample.dtype, sample.ndim))
    if plan is None:
        arguments = _plan(
            sample,
            timestep,
            prev_timestep,
            schedule,
            eta,
            prediction_type,
            clip_range,
            use_clipped_model_output,
            bitwise,
            backend,
        )
    else:
        arguments = plan
    cond_output = None
    if guidance_scale is not None:
        model_output, cond_output = _pair(model_output, sample)
    elif isinstance(model_output, (tuple, list)):
        raise TypeError("model_output is a pair, which only guidance_scale takes; give one tensor, or the scale")
    _match("model_output", model_output, sample)
    more: dict[str, Any] = {}
    if not plain:
        if clip_range is not None and dynamic_threshold is not None:
            raise ValueError("clip_range and dynamic_threshold were both given; give one of them")
        more = _more(sample, eta, noise, seed, cond_output, guidance_scale, guidance_rescale, known, known_noise, mask)
    dtype = sample.dtype
    if more or model_output.dtype != dtype:
        sample, model_output = _widen(sample, model_output, more)
    if guidance_rescale:
        more["rescale"] = _rescale(model_output, more["cond_output"], more["guidance_scale"], guidance_rescale)
    if out is None:
        result = run_plan(sample, model_output, arguments, more, dynamic_threshold, backend)
        return DDIMStep._make(result if sample.dtype == dtype else [tensor.to(dtype) for tensor in result])
    outputs = _outputs(out, sample, dtype)
    if differentiates(sample, model_output, *more.values(), *outputs):
        raise ValueError("out= cannot be used where a gradient is needed; leave it out, or use torch.no_grad()")
    run_plan(sample, model_output, arguments, more, dynamic_threshold, backend, outputs)
    return DDIMStep(*outputs)


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
    ``prev_sample`` of the result is the sample at `next_timestep`. ``timestep=-1`` starts from the image itself. The
    prediction is one at `timestep`; the same noise or image undoes the step, while the same noise and image are
    another v at another timestep.

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


def normal_noise(like: Tensor, seed: int | tuple[int, int] | Tensor, *, backend: str | None = None) -> Tensor:
    """The noise that `ddim_step` draws for `seed`: Philox4x32-10 (Salmon et al. 2011) and Box–Muller.

    Parameters
    ----------
    like : Tensor of shape (B, ...)
        Its shape, dtype, layout and device are the result's.
    seed : int, (int, int) or int64 Tensor of shape (2,) on the device of `like`
        Seed and offset; sample n is number offset + n.
    backend : str, optional

    Returns
    -------
    Tensor
        Standard normal float32 values, rounded to the dtype; the same bits on every backend.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> both = pf.diffusion.normal_noise(torch.empty(2, 5), seed=7)
    >>> torch.equal(both[1:], pf.diffusion.normal_noise(torch.empty(1, 5), seed=(7, 1)))
    True
    """
    if not isinstance(like, Tensor):
        raise TypeError(f"like is a {type(like).__name__}; give a torch tensor")
    if not (like.is_floating_point() and like.ndim):
        raise TypeError(f"like is {like.dtype} of shape {tuple(like.shape)}; give floating point (B, ...)")
    return overload("philox_normal", like.device.type, backend)(like.detach(), _seed(seed, like.device))


def _plan(
    sample: Tensor,
    timestep: int | Tensor,
    prev_timestep: int | Tensor,
    schedule: DDIMSchedule,
    eta: float,
    prediction_type: str,
    clip_range: float | tuple[float, float] | None,
    clipped_direction: bool,
    bitwise: bool,
    backend: str | None,
) -> tuple[Any, ...]:
    """The arguments of the op from `table` to `clipped_direction`, checked, without trailing defaults."""
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample is a {type(sample).__name__}; give a torch tensor")
    check_schedule(schedule)
    if not (sample.dtype.is_floating_point and sample.ndim):
        raise TypeError(f"sample is {sample.dtype} of shape {tuple(sample.shape)}; give floating point (B, ...)")
    kind = PREDICTION_TYPES.get(prediction_type)
    if kind is None:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number from 0 to 1")
    low = high = None
    if clip_range is not None:
        ends = clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
        if not (len(ends) == 2 and ends[0] <= ends[1]):
            raise ValueError(f"clip_range is {clip_range}; give c >= 0 or (low, high) with low <= high")
        low, high = (None if abs(end) == math.inf else float(end) for end in ends)
    alphas, steps = schedule._on(sample.device)
    now = _timestep("timestep", timestep, steps, sample)
    prev = _timestep("prev_timestep", prev_timestep, steps, sample)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_levels(timestep, schedule, prediction_type, clipped_direction or eta > 0)
    kept = type(timestep) is int and type(prev_timestep) is int and not compiling
    if kept and eta > 0 and prev_timestep > timestep:  # type: ignore[operator]
        raise ValueError(
            f"prev_timestep is {prev_timestep}, above timestep {timestep}: eta has no meaning; step down, or give eta=0"
        )
    device = sample.device.type
    with torch.inference_mode(False) if not compiling else nullcontext():  # what stays must serve a gradient too
        if not bitwise:
            table = overload("ddim_coefficients", device, backend)(alphas, now, prev, float(eta))
        elif kept:  # on the CPU, whose roots diffusers has
            alphas, steps = schedule._on(torch.device("cpu"))
            eager = overload("ddim_eager_coefficients", "cpu", "reference")
            table = eager(alphas, steps[timestep + 1], steps[prev_timestep + 1], float(eta))  # type: ignore[operator]
            table = table.to(sample.device, non_blocking=device != "cpu")
        else:
            table = overload("ddim_eager_coefficients", device, "reference")(alphas, now, prev, float(eta))
    plan = op_arguments(table, kind, bitwise, low, high, clipped_direction)
    if kept and lasts(table):
        if len(schedule._plans) >= _MANY:
            schedule._plans.clear()
            schedule._quick.clear()
        what = timestep, prev_timestep, eta, prediction_type, clip_range, clipped_direction, bitwise
        schedule._plans[(*what, sample.device, sample.dtype, sample.ndim)] = plan
        if device == "cpu" and eta == 0 and why_not("ddim_step", "cpu", "native") is None:
            steps_of = overload("ddim_step", "cpu", "native", grad=False), overload("ddim_step_out", "cpu", "native")
            # An overload calls its `_op` from Python, which takes as long as a third of this kernel's work.
            schedule._quick[what] = *(getattr(step, "_op", step) for step in steps_of), plan
    return plan


_MANY = 4096
"""Plans that a schedule keeps."""


def check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, DDIMSchedule):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}; give a DDIMSchedule (DDIMSchedule.from_diffusers makes one of a "
            "diffusers scheduler)"
        )


def check_levels(timestep: int | Tensor, schedule: DDIMSchedule, prediction_type: str, needs_noise: bool) -> None:
    """Refuses steps that divide by zero, where looking at the timestep waits for nothing."""
    if isinstance(timestep, Tensor):
        if not timestep.is_cpu or timestep.numel() == 0 or type(timestep) is not Tensor:
            return
        if not needs_noise and prediction_type != "sample" and (prediction_type != "epsilon" or not schedule._pure):
            return  # no level is out of the question, and the look takes longer than a small step
        levels = schedule._on(timestep.device)[0][timestep.long().reshape(-1) + 1]
        ends = {int(timestep.reshape(-1)[i]): float(levels[i]) for i in (levels.argmin(), levels.argmax())}
    else:
        ends = {operator.index(timestep): schedule._values[timestep + 1]}
    for number, alpha in ends.items():
        if alpha == 0 and prediction_type == "epsilon":
            raise ValueError(
                f"timestep {number} has cumulative alpha 0 (zero terminal SNR), where epsilon says nothing of the "
                "image; use a model with v_prediction or sample prediction"
            )
        if alpha == 1 and (prediction_type == "sample" or needs_noise):
            raise ValueError(f"timestep {number} has cumulative alpha 1 (no noise), where this step is undefined")


def _range(clip_range: Any) -> Any:
    try:
        return tuple(map(float, clip_range)) if isinstance(clip_range, (tuple, list)) else float(clip_range)
    except (TypeError, ValueError):
        raise TypeError(f"clip_range is {clip_range!r}; give a number c, or a pair (low, high)") from None


def op_arguments(
    table: Tensor, kind: int, bitwise: bool, low: float | None, high: float | None, clipped_direction: bool
) -> tuple[Any, ...]:
    """The arguments of the op from `table` to `clipped_direction`, without trailing defaults: each one takes time."""
    arguments = [table, None, kind, bool(bitwise), low, high, bool(clipped_direction)]
    for default in (False, None, None, False, 0, None):
        if arguments[-1] != default:
            break
        arguments.pop()
    return tuple(arguments)


def _written(*outputs: Tensor | None) -> None:
    """Tells autograd, which does not see a compiled kernel write."""
    for output in outputs:
        if output is not None and not torch.compiler.is_compiling() and not output.is_inference():
            torch.autograd.graph.increment_version(output)


def run_plan(
    sample: Tensor,
    model_output: Tensor,
    plan: tuple[Any, ...],
    more: dict[str, Any],
    dynamic_threshold: float | tuple[float, float] | None = None,
    backend: str | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on arguments that were checked: `plan` from `table` to `clipped_direction`, `more` the others by name."""
    device = sample.device.type
    if dynamic_threshold is not None:
        given = {key: more[key] for key in ("cond_output", "guidance_scale", "rescale") if key in more}
        image = overload("ddim_step", device, backend)(sample, model_output, *plan, **given)[1]
        more = {**more, "threshold": _threshold(image, dynamic_threshold)}
    if out is None:
        grad = torch.compiler.is_compiling() or differentiates(sample, model_output, *more.values())
        return overload("ddim_step", device, backend, grad=grad)(sample, model_output, *plan, **more)
    prev, x0 = out
    if prev.dtype == sample.dtype:
        step = overload("ddim_step_out", device, backend)
        step(sample, model_output, *plan, **more, prev_sample=prev, pred_original_sample=x0)
        _written(prev, x0)
    else:
        result = overload("ddim_step", device, backend)(sample, model_output, *plan, **more)
        prev.copy_(result[0])
        if x0 is not None:
            x0.copy_(result[1])
    return out  # type: ignore[return-value]


def lasts(tensor: Tensor) -> bool:
    """Whether a tensor may be kept: neither fake, nor wrapped by a transform, nor of a CUDA graph under capture."""
    if type(tensor) is not Tensor or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # a wrapper has none
        return False
    return True


def _more(
    sample: Tensor,
    eta: float,
    noise: Tensor | None,
    seed: int | tuple[int, int] | Tensor | None,
    cond_output: Tensor | None,
    guidance_scale: float | None,
    guidance_rescale: float,
    known: Tensor | None,
    known_noise: Tensor | None,
    mask: Tensor | None,
) -> dict[str, Any]:
    """What a step takes beyond the common one, checked: keyword arguments of the op."""
    more: dict[str, Any] = {}
    if cond_output is not None:
        _match("model_output (conditional part)", cond_output, sample)
        more["cond_output"], more["guidance_scale"] = cond_output, float(guidance_scale)  # type: ignore[arg-type]
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; give a number from 0 to 1")
    if guidance_rescale and guidance_scale is None:
        raise ValueError("guidance_rescale was given without guidance_scale; give both, or neither")
    if noise is not None and seed is not None:
        raise ValueError("noise and seed were both given; give the noise, or the seed that draws it")
    if (eta != 0) != (noise is not None or seed is not None):
        if eta != 0:
            raise ValueError(
                f"eta is {eta}, so the step needs noise; pass noise=torch.randn_like(sample) or seed=0, or eta=0"
            )
        given = "seed" if noise is None else "noise"
        raise ValueError(f"{given} was given with eta 0, where the step draws none; pass eta > 0, or no {given}")
    if noise is not None:
        _match("noise", noise, sample)
        more["noise"] = noise
    if seed is not None:
        more["seed"] = _seed(seed, sample.device)
    if (known is None) != (mask is None):
        raise ValueError("known and mask go together; give both, or neither")
    if known is not None and mask is not None:
        _match("known", known, sample)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask is a {what}; give a bool tensor, True where the step is taken")
        if mask.device != sample.device:
            raise ValueError(f"mask is on {mask.device}; the sample is on {sample.device}")
        try:
            more["known"], more["mask"] = known, mask.broadcast_to(sample.shape)
        except RuntimeError:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, which does not broadcast to the sample's {tuple(sample.shape)}"
            ) from None
    if known_noise is not None:
        if known is None:
            raise ValueError("known_noise was given without known; give the clean image that it noises")
        _match("known_noise", known_noise, sample)
        more["known_noise"] = known_noise
    return more


def _seed(seed: int | tuple[int, int] | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != device:
            raise ValueError(
                f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; give an int, (seed, offset), or an int64 "
                f"tensor (2,) on {device}"
            )
        return seed
    pair = tuple(seed) if isinstance(seed, (tuple, list)) else (seed, 0)
    if len(pair) != 2 or not all(isinstance(word, int) and 0 <= word < 2**63 for word in pair):
        raise ValueError(f"seed is {seed!r}; give an int from 0 to 2**63 − 1, or a pair (seed, offset) of such")
    if device.type == "cpu":
        return torch.tensor(pair, device="cpu")
    made = torch.full((2,), pair[0], dtype=torch.int64, device=device)  # torch.tensor would wait for the device
    made[1:].fill_(pair[1])
    return made


def _widen(sample: Tensor, model_output: Tensor, more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Casts mixed dtypes to what the op takes: one dtype; or float32 with bfloat16 or float16 predictions."""
    dtype = sample.dtype
    given = [more[key] for key in ("cond_output", "noise", "known", "known_noise") if key in more]
    if model_output.dtype == dtype and all(tensor.dtype == dtype for tensor in given):
        return sample, model_output
    outputs = [model_output, more["cond_output"]] if "cond_output" in more else [model_output]
    others = [key for key in ("noise", "known", "known_noise") if key in more]
    narrow = {output.dtype for output in outputs}
    wide = sample.dtype
    for tensor in (*outputs, *(more[key] for key in others)):
        wide = torch.promote_types(wide, tensor.dtype)
    if not (wide == sample.dtype == torch.float32 and len(narrow) == 1 and narrow <= {torch.bfloat16, torch.float16}):
        outputs = [output.to(wide) for output in outputs]
    if "seed" in more and wide != sample.dtype:  # the noise is of the sample's dtype, as `normal_noise` gives it
        more["noise"] = normal_noise(sample, more.pop("seed")).to(wide)
    for key in others:
        more[key] = more[key].to(wide)
    if len(outputs) == 2:
        more["cond_output"] = outputs[1]
    return sample.to(wide), outputs[0]


def _rescale(uncond: Tensor, cond: Tensor, scale: float, share: float) -> Tensor:
    """The factor of each sample's guided prediction (Lin et al. 2024, eq. 14 to 16)."""
    work = torch.promote_types(cond.dtype, torch.float32)
    uncond, cond = (output.to(work).unsqueeze(-1).flatten(1) for output in (uncond, cond))  # (B,) may be a sample
    guided = uncond + scale * (cond - uncond)
    return (share * (cond.std(1) / guided.std(1)) + (1 - share)).double()


def _threshold(image: Tensor, setting: float | tuple[float, float]) -> Tensor:
    """Each sample's threshold of dynamic thresholding, at least 1 (Saharia et al. 2022, sec. 2.3)."""
    pair = setting if isinstance(setting, (tuple, list)) else (setting, math.inf)
    if not (len(pair) == 2 and 0 <= pair[0] <= 1 and pair[1] > 0):
        raise ValueError(f"dynamic_threshold is {setting}; give a quantile from 0 to 1, or (quantile, largest > 0)")
    ratio, largest = pair
    size = image.unsqueeze(-1).flatten(1).to(torch.promote_types(image.dtype, torch.float32)).abs()
    if size.shape[1] == 0 or size.shape[0] == 0:
        return size.new_ones(size.shape[0], dtype=torch.float64)
    # torch.quantile, with its rank in the tensor's dtype, by selection: it sorts, and refuses over 2²⁴ elements.
    rank = torch.tensor(ratio, dtype=size.dtype, device="cpu") * (size.shape[1] - 1)
    low, high = int(rank), min(int(rank) + 1, size.shape[1] - 1)
    if size.is_cuda and torch.are_deterministic_algorithms_enabled():  # which kthvalue is not
        below, above = size.sort(1).values[:, [low, high]].unbind(1)
    else:
        below, above = (size.kthvalue(place + 1, 1).values for place in (low, high))
    quantile = torch.lerp(below, above, float(rank - low))
    quantile = torch.where(size.amax(1).isnan(), math.nan, quantile)  # as the quantile has it
    return quantile.clamp(min=1).clamp(max=largest).double()


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


def _outputs(out: Tensor | tuple[Tensor, Tensor], sample: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    pair = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(pair) not in (1, 2):
        raise ValueError(
            f"out has {len(pair)} parts; give prev_sample, or the pair (prev_sample, pred_original_sample)"
        )
    for name, tensor in zip(("out", "out[1]"), pair, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
        if tensor.shape != sample.shape or tensor.dtype != dtype or tensor.device != sample.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be {dtype} "
                f"{tuple(sample.shape)} on {sample.device}, as the sample is"
            )
        if not tensor.is_contiguous() and folded(tensor):
            raise ValueError(f"{name} is expanded, or its elements share memory; give it memory of its own")
    if len(pair) == 1:
        return pair[0], None
    if not torch.compiler.is_compiling() and not apart(*pair):
        raise ValueError("out[0] and out[1] share memory; give two tensors")
    return pair[0], pair[1]


def _on_host(timestep: Any, sample: Any) -> Any:
    """An int, where looking at the timestep waits for nothing."""
    if not isinstance(timestep, Tensor):
        return operator.index(timestep) if _is_index(timestep) and type(timestep) is not bool else timestep
    known = timestep.is_cpu and timestep.numel() == 1 and isinstance(sample, Tensor) and sample.is_cpu
    if not known or timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
        return timestep
    return int(timestep) if type(timestep) is Tensor else timestep


def _is_index(value: Any) -> bool:
    return isinstance(value, int) or (hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0)  # no array


def _timestep(name: str, value: int | Tensor, steps: Tensor, sample: Tensor) -> Tensor:
    last = len(steps) - 2
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
    if not _is_index(value):
        raise TypeError(f"{name} is {value!r}; give an int or an integer tensor")
    if not -1 <= value <= last:
        raise IndexError(f"{name} is {value}; the schedule has -1 (the image) to {last}")
    if torch.compiler.is_compiling():  # steps[value + 1] would compile anew for every timestep
        return torch.full((), value, dtype=torch.int64, device=sample.device)
    return steps[value + 1]
