"""Fifty DDIM steps from a new schedule: what sampling costs beside the model, with everything that is made once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import protofast as pf

from ..spec import Call, Case, Spec, Target, copy_limit, generator, ours, tensor_error

_STEPS = 50


def _case(shape: tuple[int, ...], quick: bool) -> Case:
    return Case(f"{'x'.join(map(str, shape))} float32 {_STEPS} steps", {"shape": shape}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    random = generator(seed)
    x, e = (torch.randn(case.params["shape"], generator=random).to(device) for _ in range(2))
    return SimpleNamespace(x=x, e=e, device=device)


def _reference(inputs: Any) -> Tensor:
    """With one prediction for all steps, all of them see the image that the first one sees, and the last returns it."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    first = float(alphas[_timesteps()[0]])
    signal, spread = first**0.5, (1 - first) ** 0.5
    return (inputs.x.double() - spread * inputs.e.double()) / signal


def _timesteps() -> list[int]:
    return pf.diffusion.timesteps(_STEPS, 1000, "leading")


def _protofast(inputs: Any, backend: str) -> Call:
    x, e = inputs.x, inputs.e

    def call() -> Tensor:
        schedule, steps = pf.DDIMSchedule.linear(1000), _timesteps()
        sample = x
        for t, prev in zip(steps, [*steps[1:], -1], strict=True):
            sample = pf.ddim_step(sample, e, t, prev, schedule, backend=backend).prev_sample
        return sample

    return call


def _diffusers(ours: bool):
    def prepare(inputs: Any) -> Call:
        import diffusers

        module: Any = pf.diffusers if ours else diffusers
        x, e, device = inputs.x, inputs.e, inputs.device

        def call() -> Tensor:
            scheduler = module.DDIMScheduler(clip_sample=False)
            scheduler.set_timesteps(_STEPS, device=device)
            sample = x
            for t in scheduler.timesteps:
                sample = scheduler.step(e, t, sample, return_dict=False)[0]
            return sample

        return call

    return prepare


def _eager(inputs: Any) -> Call:
    """The formula by hand, with Python numbers for coefficients."""
    x, e = inputs.x, inputs.e

    def call() -> Tensor:
        alphas = [*(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist(), 1.0]
        steps, sample = _timesteps(), x
        for t, prev in zip(steps, [*steps[1:], -1], strict=True):
            image = (sample - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5
            sample = alphas[prev] ** 0.5 * image + (1 - alphas[prev]) ** 0.5 * e
        return sample

    return call


SPEC = Spec(
    op="ddim_loop",
    about=f"{_STEPS} DDIM steps of a given prediction, with the schedule or scheduler made anew in each call",
    cases=(_case((1, 3, 64, 64), True), _case((8, 4, 64, 64), False)),
    tiny=(_case((2, 3, 8, 8), True),),
    inputs=_inputs,
    contenders={
        **ours(_protofast),
        "protofast.diffusers": _diffusers(True),
        "diffusers": _diffusers(False),
        "eager": _eager,
    },
    reference=_reference,
    error=lambda output, reference, _: tensor_error(output, reference),
    tolerance=lambda _: 1e-4,  # the float32 roundings of fifty steps, at amplitudes up to 1/√ᾱ = 150
    limits={"copy of the same bytes": lambda inputs: copy_limit(inputs.x.numel() * 4 * 4 * _STEPS, inputs.device)},
    bytes=lambda inputs: inputs.x.numel() * 4 * 4 * _STEPS,
    flops=lambda inputs: inputs.x.numel() * 6 * _STEPS,
    targets=(Target(f"1x3x64x64 float32 {_STEPS} steps", "protofast native", "diffusers", 2),),
)
