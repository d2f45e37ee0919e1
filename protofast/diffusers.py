"""diffusers' DDIM schedulers with the fused step: the same configuration, the same images, no wait for the device.

Importing this module imports diffusers.
"""

from __future__ import annotations

import math
import operator
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._backend import overload
from ._ops.ddim import PREDICTION_TYPES
from ._optional import need
from .ddim import _match, _widen, lasts, op_arguments, run_plan

diffusers: Any = need("diffusers", "diffusers")
scheduling_ddim = need("diffusers.schedulers.scheduling_ddim", "diffusers")
scheduling_ddim_inverse = need("diffusers.schedulers.scheduling_ddim_inverse", "diffusers")
randn_tensor = need("diffusers.utils.torch_utils", "diffusers").randn_tensor
SchedulerMixin = diffusers.SchedulerMixin  # by this name diffusers finds how to load a scheduler of this module

Pipeline = TypeVar("Pipeline")

Plan = tuple[Any, ...]

_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_MANY = 2048
"""Plans that a scheduler keeps; a plan is an entry a timestep and eta, and a table of all timesteps an eta."""


class _Fused:
    """What both schedulers share: tables of coefficients on the device, and the step that reads them."""

    bitwise = True
    """Whether a step has the bits of diffusers' own (float32 and float64); False is quicker and closer to exact."""

    follow_timesteps = False
    """Whether a step ends at the next of ``timesteps``; otherwise T // num_inference_steps away, as in diffusers."""

    _listed: tuple[Any, Any, int] = None, None, 0  # timesteps, the same on the host, and the version of the former
    _custom = False  # whether set_timesteps got the timesteps one by one
    _up = False  # the direction of a step
    _end = ""  # the attribute with the cumulative alpha of timestep −1

    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int | None
    _internal_dict: Any
    _kept: dict[Any, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        state = vars(self)
        # What is kept says for how many steps it is, and add_noise sets what is there already.
        harmless = name in ("num_inference_steps", "_listed") or (name == "timesteps" and not self._follows)
        if not harmless and state.get(name, self) is not value:
            state["_kept"] = {}
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": {}}

    @property
    def _follows(self) -> bool:
        return self.follow_timesteps or self._custom

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | Tensor | None = None,
    ) -> None:
        """Sets the timesteps to sample at, by number or one by one.

        Parameters
        ----------
        num_inference_steps : int, optional
            How many, spaced as the configuration says. Where diffusers' rounding makes "trailing" one longer, by a
            timestep −1 that is none (61 of 1000), it is left out.
        device : str or torch.device, optional
            Where ``timesteps`` is put.
        timesteps : list of int, optional
            The timesteps themselves, strictly falling (rising for the inverse scheduler). Steps follow them. diffusers'
            own DDIM schedulers do not take any.

        Raises
        ------
        ValueError
            Unless exactly one of the two is given; for a number above, or a timestep outside, those of the training.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps} and timesteps is {timesteps}; give one of the two"
            )
        if timesteps is None:
            self._custom = False
            super().set_timesteps(num_inference_steps)  # type: ignore[misc]
            listed = self.timesteps
            if len(listed) > num_inference_steps:  # type: ignore[operator]
                listed = listed[1:] if self._up else listed[:-1]
        else:
            try:
                steps = [operator.index(step) for step in timesteps]
            except TypeError:
                raise TypeError(f"timesteps is {timesteps!r}; give a list of ints") from None
            last = len(self.alphas_cumprod) - 1
            ordered = steps if self._up else steps[::-1]
            if not ordered or ordered[0] < 0 or ordered[-1] > last or sorted(set(ordered)) != ordered:
                way = f"rise strictly from 0 to {last}" if self._up else f"fall strictly from {last} to 0"
                raise ValueError(f"timesteps is {steps}; give timesteps that {way} at most")
            self._custom = True
            self.num_inference_steps, listed = len(steps), torch.tensor(steps, device="cpu")
        self.timesteps = listed.to(device)
        self._listed = self.timesteps, listed, _version(self.timesteps)
        if not torch.compiler.is_compiling():  # here, because a compiled step cannot keep what it makes
            device = self.timesteps.device
            self._keep((device, self.num_inference_steps), self._levels(device))

    def _levels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative alphas (T + 1,) with timestep −1 first, and the timestep below each (T,), on `device`."""
        if self.num_inference_steps is None:
            raise ValueError("the number of steps is not set; call set_timesteps first")
        alphas, end = self.alphas_cumprod, torch.as_tensor(getattr(self, self._end)).reshape(1)
        stride = self._internal_dict.num_train_timesteps // self.num_inference_steps
        with _lasting():
            table = torch.cat([_moved(part.double(), device) for part in (end, alphas)])
            every = torch.arange(len(alphas), device=device)
            if not self._follows:
                return table, (every - stride).clamp(min=-1)
            of, on_host, version = self._listed
            same = of is self.timesteps and version == _version(of)
            listed = _moved(on_host if same else self.timesteps, device).sort().values
            below = torch.searchsorted(listed, every)
            return table, torch.where(below > 0, listed[(below - 1).clamp(min=0)], -1)

    def _coefficients(self, levels: Tensor, timestep: Tensor, lower: Tensor, eta: float) -> Tensor:
        pair = (lower, timestep) if self._up else (timestep, lower)
        name = "ddim_eager_coefficients" if self.bitwise else "ddim_coefficients"
        # The reference, because what is kept must not depend on who computed it.
        return overload(name, levels.device.type, "reference")(levels, *pair, eta)

    def _plan(self, timestep: int | None, eta: float, clipped: bool, limit: float | None, device: torch.device) -> Plan:
        """The arguments of the op for one timestep, or with the table of all of them; made once."""
        config = self._internal_dict
        version = _version(self.alphas_cumprod), _version(self.timesteps) if self._follows else 0
        # Everything that can change without __setattr__: a config takes new attributes in silence.
        settings = eta, clipped, limit, device, config.prediction_type, config.num_train_timesteps
        key = timestep, self.num_inference_steps, version, settings
        plan = self._kept.get(key)
        if plan is None:
            if timestep is None:
                place = self.alphas_cumprod.device  # where diffusers computes, for the sake of the bits
                levels, lower = self._levels(place)
                with _lasting():
                    every = torch.arange(len(lower), device=place)
                    table = _moved(self._coefficients(levels, every, lower, eta), device)
            else:
                table = self._plan(None, eta, clipped, limit, device)[0]
                if not 0 <= timestep < len(table):
                    raise IndexError(f"timestep is {timestep}; the schedule has 0 to {len(table) - 1}")
                table = table[timestep : timestep + 1]
            plan = self._arguments(table, clipped, limit)
            self._keep(key, plan)
        return plan

    def _traced_plan(
        self, timestep: int | Tensor, eta: float, clipped: bool, limit: float | None, device: torch.device
    ) -> Plan:
        """The same under torch.compile, with coefficients computed in the graph: it can keep nothing."""
        if isinstance(timestep, Tensor):
            now = _moved(timestep.long(), device).reshape(-1)
        else:
            now = torch.full((1,), timestep, dtype=torch.int64, device=device)
        levels, lower = self._kept.get((device, self.num_inference_steps)) or self._levels(device)
        table = self._coefficients(levels, now, lower[now.clamp(0, len(lower) - 1)], eta)
        return self._arguments(table, clipped, limit)

    def _arguments(self, table: Tensor, clipped: bool, limit: float | None) -> Plan:
        """The arguments of the op from `table` to `clipped_direction`, without trailing defaults."""
        kind = self._internal_dict.prediction_type
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {kind!r}; choose one of {', '.join(PREDICTION_TYPES)}")
        low, high = (None, None) if limit is None or math.isinf(limit) else (-float(limit), float(limit))
        return op_arguments(table, PREDICTION_TYPES[kind], self.bitwise, low, high, clipped)

    def _keep(self, key: tuple, kept: tuple) -> None:
        if lasts(kept[0]):
            if len(self._kept) >= _MANY:
                self._kept.clear()
            self._kept[key] = kept

    def _step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float,
        clipped: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: Tensor | None,
        threshold: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor]:
        _floating("sample", sample)
        _floating("model_output", model_output)
        config, device, eta = self._internal_dict, sample.device, float(eta)
        limit = config.clip_sample_range if config.clip_sample and threshold is None else None
        if torch.compiler.is_compiling():
            plan = self._traced_plan(timestep, eta, clipped, limit, device)
        elif type(timestep) is int:
            plan = self._plan(timestep, eta, clipped, limit, device)
        else:
            known, row = _locate(timestep, sample, len(self.alphas_cumprod))
            plan = self._plan(known, eta, clipped, limit, device)
            if row is not None:
                plan = plan[0], row, *plan[2:]
        more: dict[str, Any] = {}
        alike = model_output.dtype == sample.dtype and model_output.shape == sample.shape
        if eta > 0:
            if noise is None:
                noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            elif generator is not None:
                raise ValueError("generator and variance_noise were both given; give one of them")
            else:
                _floating("variance_noise", noise)
                alike = False
            more["noise"] = noise
        if not alike or model_output.device != device:
            sample, model_output = _alike(sample, model_output, more)
        return run_plan(sample, model_output, plan, more, threshold)


def _floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        what = f"a {tensor.dtype} tensor" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise TypeError(f"{name} is {what}; give a floating point tensor")


def _locate(timestep: Any, sample: Tensor, count: int) -> tuple[int | None, Tensor | None]:
    """A timestep that the host knows as an int, others as rows of the table on the sample's device."""
    if not isinstance(timestep, Tensor):
        try:
            return operator.index(timestep), None
        except TypeError:
            raise TypeError(f"timestep is {timestep!r}; give an int or an integer tensor") from None
    if timestep.dtype not in _INTEGERS:
        raise TypeError(f"timestep is a {timestep.dtype} tensor; give integers")
    if timestep.is_cpu and timestep.numel() == 1:
        return int(timestep), None
    if timestep.numel() != 1 and timestep.shape != sample.shape[:1]:
        raise ValueError(
            f"timestep has shape {tuple(timestep.shape)}; give one timestep, or one a sample, ({sample.shape[0]},)"
        )
    if timestep.is_cpu and timestep.numel():
        values = timestep.tolist()
        low, high = min(values), max(values)
        if low < 0 or high >= count:
            raise IndexError(f"timestep has values from {low} to {high}; the schedule has 0 to {count - 1}")
    return None, _moved(timestep.long(), sample.device)


def _alike(sample: Tensor, model_output: Tensor, more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Broadcast, and promoted to one dtype, as torch would in diffusers' formula; `more` in place."""
    try:
        sample, model_output, *others = torch.broadcast_tensors(sample, model_output, *more.values())
    except RuntimeError:
        pass  # explained below
    else:
        more.update(zip(more, others, strict=True))
    for name, tensor in (("model_output", model_output), *more.items()):
        _match(name, tensor, sample)
    return _widen(sample, model_output, more)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=device.type != "cpu")  # to the CPU it would come late


def _version(tensor: Tensor) -> int:
    """Changes when somebody writes into the tensor, unless it was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _lasting() -> Any:
    """For what is kept: a tensor made in inference mode could never serve a gradient."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


class DDIMScheduler(_Fused, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler with a step in one pass over memory that never waits for the device.

    Configuration, files, noise schedule, noising and results are diffusers': it takes the place of
    ``diffusers.DDIMScheduler`` by one line, and `accelerate` puts it into a pipeline. What it adds are timesteps of
    their own for each sample, timesteps of one's choice, and two settings that are plain attributes, so that no
    configuration holds them.

    Attributes
    ----------
    bitwise : bool, default True
        In float32 and float64 the step has the very bits of diffusers' step on a CPU, so that images are the same. In
        bfloat16 and float16 the arithmetic is float32, rounded once, where diffusers rounds after every operation.
        False: one multiply-add on coefficients of float64; quicker, and closer to the exact result.
    follow_timesteps : bool, default False
        A step from t ends where diffusers' does: at t − T // num_inference_steps. With the spacings "linspace" and
        "trailing" that is not the next of ``timesteps`` where the number of steps does not divide T (diffusers issue
        11347). True: it ends at the next lower of ``timesteps``, or at the image below the last. Timesteps that were
        given to `set_timesteps` one by one are always followed.

    Examples
    --------
    >>> import torch, diffusers, protofast as pf
    >>> theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    >>> ours = pf.diffusers.DDIMScheduler.from_config(theirs.config)
    >>> theirs.set_timesteps(20), ours.set_timesteps(20)
    (None, None)
    >>> x, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> torch.equal(ours.step(e, 500, x).prev_sample, theirs.step(e, 500, x).prev_sample)
    True
    """

    _end = "final_alpha_cumprod"

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step down, from `timestep` to the one before it.

        Parameters
        ----------
        model_output : Tensor of the sample's shape
            The model's prediction, of the configuration's ``prediction_type``.
        timestep : int or integer Tensor of shape () or (B,)
            One for all samples, or one a sample, which diffusers does not take. On a GPU it is not looked at, because
            that would wait for it: one outside the schedule gives NaN there.
        sample : Tensor of shape (B, ...)
            x_t; float32, float64, bfloat16 or float16. Where `model_output` is wider, the results are as wide.
        eta : float, default 0
            Scale of the noise, 0 (deterministic) to 1 (ancestral).
        use_clipped_model_output : bool, default False
            The direction follows the predicted image after clipping.
        generator : torch.Generator or list of them, optional
            Draws the noise as diffusers does, so that the images are the same. One on the CPU makes a GPU wait.
        variance_noise : Tensor of the sample's shape, optional
            The noise itself.
        return_dict : bool, default True

        Returns
        -------
        diffusers' DDIMSchedulerOutput, or the pair (prev_sample, pred_original_sample)
            Differentiable in the sample, the prediction and the noise.

        Raises
        ------
        ValueError
            Before `set_timesteps`, for shapes that do not broadcast, and for a generator together with noise.
        IndexError
            For a timestep on the host outside the schedule.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> scheduler = pf.diffusers.DDIMScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(50)
        >>> x, e = torch.randn(3, 4), torch.randn(3, 4)
        >>> each = scheduler.step(e, torch.tensor([980, 500, 0]), x).prev_sample
        >>> torch.equal(each[1:2], scheduler.step(e[1:2], 500, x[1:2]).prev_sample)
        True
        """
        config = self._internal_dict
        threshold = (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None
        clipped = bool(use_clipped_model_output)  # DDIMPipeline gives None
        pair = self._step(model_output, timestep, sample, eta, clipped, generator, variance_noise, threshold)
        return scheduling_ddim.DDIMSchedulerOutput(*pair) if return_dict else pair


class DDIMInverseScheduler(_Fused, diffusers.DDIMInverseScheduler):
    """diffusers' DDIMInverseScheduler, from images to noise, with the fused step of `DDIMScheduler`.

    Attributes
    ----------
    bitwise, follow_timesteps : bool
        As in `DDIMScheduler`; a step that follows the timesteps begins at the next lower one of them.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> down = pf.diffusers.DDIMScheduler(clip_sample=False)
    >>> up = pf.diffusers.DDIMInverseScheduler.from_config(down.config)
    >>> down.set_timesteps(50), up.set_timesteps(50)
    (None, None)
    >>> x, e = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    >>> noisier = up.step(e, 500, x).prev_sample
    >>> torch.allclose(down.step(e, 500, noisier).prev_sample, x, atol=1e-5)
    True
    """

    _end = "initial_alpha_cumprod"
    _up = True

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One step up, to `timestep` from the one before it: arguments, results and errors of `DDIMScheduler.step`.

        As in diffusers, `sample` is that of the timestep before `timestep`, whose coefficients the prediction gets.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> scheduler = pf.diffusers.DDIMInverseScheduler()
        >>> scheduler.set_timesteps(50)
        >>> scheduler.step(torch.randn(2, 4), 500, torch.randn(2, 4), return_dict=False)[0].shape
        torch.Size([2, 4])
        """
        pair = self._step(model_output, timestep, sample, 0.0, False, None, None, None)
        return scheduling_ddim_inverse.DDIMSchedulerOutput(*pair) if return_dict else pair


def accelerate(pipeline: Pipeline) -> Pipeline:
    """Puts the fused schedulers in place of a pipeline's DDIM schedulers.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        Or any object with schedulers as attributes. Every ``diffusers.DDIMScheduler`` and
        ``diffusers.DDIMInverseScheduler`` is replaced, with its configuration and the timesteps that were set.

    Returns
    -------
    The pipeline itself. One that is saved afterwards names diffusers' schedulers, so that it loads anywhere; call this
    again on what was loaded.

    Raises
    ------
    TypeError
        Where there is no scheduler that can be replaced.

    Examples
    --------
    >>> import diffusers, protofast as pf
    >>> unet = diffusers.UNet2DModel(
    ...     sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ... )
    >>> pipeline = pf.diffusers.accelerate(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()))
    >>> pipeline.scheduler.bitwise
    True
    """
    fused = {diffusers.DDIMScheduler: DDIMScheduler, diffusers.DDIMInverseScheduler: DDIMInverseScheduler}
    found = {
        name: value for name, value in getattr(pipeline, "__dict__", {}).items() if isinstance(value, SchedulerMixin)
    }
    # A subclass is left alone: it may do something of its own.
    swapped = {name: value for name, value in found.items() if type(value) in fused}
    if not swapped and not any(isinstance(value, _Fused) for value in found.values()):
        has = ", ".join(f"{name} is a {type(value).__name__}" for name, value in found.items()) or "it has no scheduler"
        raise TypeError(
            f"pipeline is a {type(pipeline).__name__} in which no scheduler can be replaced ({has}); DDIMScheduler and "
            "DDIMInverseScheduler of diffusers can. To sample a model of a DDPM-like schedule (DDPM, PNDM, …) by DDIM: "
            "pipeline.scheduler = protofast.diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    for name, value in swapped.items():
        scheduler = object.__new__(fused[type(value)])
        for key, state in vars(value).items():
            setattr(scheduler, key, state)
        setattr(pipeline, name, scheduler)
        if name in getattr(pipeline, "config", ()):
            pipeline.register_to_config(**{name: ("diffusers", type(value).__name__)})  # type: ignore[attr-defined]
    return pipeline
