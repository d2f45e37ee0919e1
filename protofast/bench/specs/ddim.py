"""DDIM step: one pass over two tensors, where an eager scheduler makes many."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import protofast as pf

from ..spec import Call, Case, Skip, Spec, Target, generator, ours, tensor_error

_NOW, _PREV, _STEPS = 500, 480, 50  # a step of the usual fifty


def _case(shape: tuple[int, ...], dtype: str, out: bool, quick: bool, clip: float | None = None) -> Case:
    parts = ["x".join(map(str, shape)), dtype, "out=" if out else "allocating", f"clip {clip:g}" if clip else ""]
    return Case(" ".join(p for p in parts if p), {"shape": shape, "dtype": dtype, "out": out, "clip": clip}, quick)


_SHAPES = ((1, 3, 64, 64), (1, 4, 64, 64), (8, 4, 64, 64), (16, 3, 256, 256), (64, 3, 256, 256))
_QUICK = (_SHAPES[0], _SHAPES[2], _SHAPES[4])


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    random, dtype = generator(seed), getattr(torch, case.params["dtype"])
    x, e = (torch.randn(case.params["shape"], generator=random).to(device, dtype) for _ in range(2))
    schedule = pf.DDIMSchedule.linear(1000)
    alphas = schedule.alphas_cumprod
    return SimpleNamespace(
        x=x,
        e=e,
        out=torch.empty_like(x),
        to_out=case.params["out"],
        clip=case.params["clip"],
        schedule=schedule,
        now=alphas[_NOW].item(),
        prev=alphas[_PREV].item(),
        device=device,
    )


def _reference(inputs: Any) -> tuple[Tensor, Tensor]:
    x, e = inputs.x.double(), inputs.e.double()
    x0 = (x - (1 - inputs.now) ** 0.5 * e) / inputs.now**0.5
    if inputs.clip:
        x0 = x0.clamp(-inputs.clip, inputs.clip)
    return inputs.prev**0.5 * x0 + (1 - inputs.prev) ** 0.5 * e, x0


def _error(output: Any, reference: Any, inputs: Any) -> float:
    """The worse of both results; contenders that write to out= give only the first."""
    given = [t for t in output if t is not None]
    return max(tensor_error(a, b) for a, b in zip(given, reference, strict=False))


def _tolerance(inputs: Any) -> float:
    """diffusers' float32 cumulative product is itself good to some 1e-6; bfloat16 arithmetic has 8 bits."""
    return {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[inputs.x.dtype]


def _protofast(inputs: Any, backend: str) -> Call:
    x, e, schedule, clip = inputs.x, inputs.e, inputs.schedule, inputs.clip
    out = inputs.out if inputs.to_out else None
    return lambda: pf.ddim_step(x, e, _NOW, _PREV, schedule, clip_range=clip, out=out, backend=backend)


def _diffusers(as_tensor: bool):
    def prepare(inputs: Any) -> Call:
        import diffusers

        scheduler: Any = diffusers.DDIMScheduler(clip_sample=bool(inputs.clip), clip_sample_range=inputs.clip or 1.0)
        scheduler.set_timesteps(_STEPS, device=inputs.device)
        step = next(t for t in scheduler.timesteps if int(t) == _NOW) if as_tensor else _NOW
        x, e = inputs.x, inputs.e
        return lambda: scheduler.step(e, step, x, return_dict=False)

    return prepare


def _formula(inputs: Any):
    signal, spread = inputs.now**0.5, (1 - inputs.now) ** 0.5
    p, q, clip = inputs.prev**0.5, (1 - inputs.prev) ** 0.5, inputs.clip

    def step(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        x0 = (x - spread * e) / signal
        if clip:
            x0 = x0.clamp(-clip, clip)
        return p * x0 + q * e, x0

    return step


def _eager(inputs: Any) -> Call:
    step, x, e = _formula(inputs), inputs.x, inputs.e
    return lambda: step(x, e)


def _eager_folded(inputs: Any) -> Call:
    """Coefficients folded by hand: two passes, no x0. Only without a clip."""
    if inputs.clip:
        raise Skip("folding the coefficients leaves no x0 to clip")
    if not inputs.to_out:
        raise Skip("gives no predicted image, which the allocating form returns")
    x, e, out = inputs.x, inputs.e, inputs.out
    a = (inputs.prev / inputs.now) ** 0.5
    b = (1 - inputs.prev) ** 0.5 - a * (1 - inputs.now) ** 0.5

    def call() -> tuple[Tensor]:
        torch.mul(x, a, out=out).add_(e, alpha=b)
        return (out,)

    return call


def _compiled(inputs: Any) -> Call:
    step, x, e, out = _formula(inputs), inputs.x, inputs.e, inputs.out
    torch._dynamo.reset()  # each case anew, or the eighth would fall back to eager
    if not inputs.to_out:
        compiled = torch.compile(step, dynamic=False)
        return lambda: compiled(x, e)

    @torch.compile(dynamic=False)
    def write(x: Tensor, e: Tensor, out: Tensor) -> None:
        out.copy_(step(x, e)[0])

    def call() -> tuple[Tensor]:
        write(x, e, out)
        return (out,)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return call


def _add(inputs: Any) -> Call:
    x, e, out = inputs.x, inputs.e, torch.empty_like(inputs.x)
    return lambda: torch.add(x, e, out=out)


def _bytes(inputs: Any) -> int:
    return inputs.x.numel() * inputs.x.element_size() * (3 if inputs.to_out else 4)


SPEC = Spec(
    op="ddim_step",
    about="one DDIM step, epsilon prediction, eta 0; out= writes the sample alone, allocating also the predicted image",
    cases=(
        *(_case(s, "float32", out, s in _QUICK) for s in _SHAPES for out in (False, True)),
        *(_case(s, "bfloat16", out, s in (_QUICK[0], _QUICK[2]) and out) for s in _SHAPES for out in (False, True)),
        _case((1, 3, 64, 64), "float32", False, False, clip=1.0),
        _case((64, 3, 256, 256), "float32", False, False, clip=1.0),
    ),
    tiny=(
        _case((2, 3, 8, 8), "float32", False, True),
        _case((2, 3, 8, 8), "bfloat16", True, True),
        _case((2, 3, 8, 8), "float32", True, True, clip=1.0),
    ),
    inputs=_inputs,
    contenders={
        **ours(_protofast),
        "diffusers": _diffusers(True),
        "diffusers, int timestep": _diffusers(False),
        "eager": _eager,
        "eager, folded": _eager_folded,
        "torch.compile": _compiled,
    },
    reference=_reference,
    error=_error,
    tolerance=_tolerance,
    limits={"torch.add(x, e, out=o)": _add},
    bytes=_bytes,
    flops=lambda inputs: inputs.x.numel() * (3 if inputs.to_out else 6),
    targets=(
        Target("64x3x256x256 float32 out=", "protofast native", "diffusers, int timestep", 20),
        Target("64x3x256x256 float32 out=", "protofast native", "torch.add(x, e, out=o)", 1 / 1.3),
        Target("1x3x64x64 float32 allocating", "protofast native", "diffusers, int timestep", 5),
    ),
)
