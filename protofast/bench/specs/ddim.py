"""DDIM step: one pass over two tensors, where an eager scheduler makes many."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import protofast as pf

from ..spec import Call, Case, Skip, Spec, Target, copy_limit, generator, ours, tensor_error

_NOW, _PREV, _STEPS = 500, 480, 50  # a step of the usual fifty


_SHAPES = ((1, 3, 64, 64), (1, 4, 64, 64), (8, 4, 64, 64), (16, 3, 256, 256), (64, 3, 256, 256))
_QUICK = (_SHAPES[0], _SHAPES[2], _SHAPES[4])
_SMALL, _LARGE = _SHAPES[0], _SHAPES[4]
_TO = {"allocating": 2, "out=": 1, "out=both": 2}
"""What the case writes to -> how many results."""


def _case(
    shape: tuple[int, ...],
    dtype: str = "float32",
    to: str = "out=",
    quick: bool = True,
    *,
    clip: float | None = None,
    guidance: float | None = None,
    eta: float = 0.0,
    bitwise: bool = False,
) -> Case:
    name = ["x".join(map(str, shape)), dtype, to]
    for what, there in (("clip 1", clip), ("guidance", guidance), ("eta 0.5", eta), ("bitwise", bitwise)):
        if there:
            name.append(what)
    params = {"shape": shape, "dtype": dtype, "to": to, "clip": clip, "guidance": guidance, "eta": eta}
    return Case(" ".join(name), {**params, "bitwise": bitwise}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    random, dtype = generator(seed), getattr(torch, case.params["dtype"])
    x, e, cond, z = (torch.randn(case.params["shape"], generator=random).to(device, dtype) for _ in range(4))
    schedule = pf.DDIMSchedule.linear(1000)
    alphas = schedule.alphas_cumprod
    return SimpleNamespace(
        **{key: case.params[key] for key in ("to", "clip", "guidance", "eta", "bitwise")},
        x=x,
        e=e,
        cond=cond,
        noise=z,
        out=torch.empty_like(x),
        out_image=torch.empty_like(x),
        schedule=schedule,
        now=alphas[_NOW].item(),
        prev=alphas[_PREV].item(),
        device=device,
    )


def _coefficients(inputs: Any) -> tuple[float, float, float, float, float]:
    """signal, spread, prev_signal, direction, sigma: equations 12 and 16 as they stand."""
    now, prev = inputs.now, inputs.prev
    sigma = inputs.eta * ((1 - prev) / (1 - now) * (1 - now / prev)) ** 0.5
    return now**0.5, (1 - now) ** 0.5, prev**0.5, (1 - prev - sigma**2) ** 0.5, sigma


def _formula(inputs: Any):
    signal, spread, p, q, sigma = _coefficients(inputs)
    clip, guidance = inputs.clip, inputs.guidance

    def step(x: Tensor, e: Tensor, cond: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if guidance:
            e = e + guidance * (cond - e)
        x0 = (x - spread * e) / signal
        if clip:
            x0 = x0.clamp(-clip, clip)
        prev = p * x0 + q * e
        return (prev + sigma * noise if sigma else prev), x0

    return step


def _tensors(inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs.x, inputs.e, inputs.cond, inputs.noise


def _reference(inputs: Any) -> tuple[Tensor, Tensor]:
    return _formula(inputs)(*(tensor.double() for tensor in _tensors(inputs)))


def _error(output: Any, reference: Any, inputs: Any) -> float:
    """The worse of both results; contenders that write to out= may give only the first."""
    given = [t for t in output if t is not None]
    return max(tensor_error(a, b) for a, b in zip(given, reference, strict=False))


def _tolerance(inputs: Any) -> float:
    """diffusers' float32 cumulative product is itself good to some 1e-6; bfloat16 arithmetic has 8 bits."""
    return {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[inputs.x.dtype]


def _protofast(inputs: Any, backend: str) -> Call:
    x, schedule = inputs.x, inputs.schedule
    output = inputs.e if inputs.guidance is None else (inputs.e, inputs.cond)
    settings: dict[str, Any] = {"backend": backend}
    if inputs.guidance:
        settings["guidance_scale"] = inputs.guidance
    if inputs.clip:
        settings["clip_range"] = inputs.clip
    if inputs.eta:
        settings.update(eta=inputs.eta, noise=inputs.noise)
    if inputs.bitwise:
        settings["bitwise"] = True
    if inputs.to != "allocating":
        settings["out"] = inputs.out if inputs.to == "out=" else (inputs.out, inputs.out_image)
    return lambda: pf.ddim_step(x, output, _NOW, _PREV, schedule, **settings)


def _scheduler(inputs: Any, module: Any) -> Any:
    scheduler: Any = module.DDIMScheduler(clip_sample=bool(inputs.clip), clip_sample_range=inputs.clip or 1.0)
    scheduler.set_timesteps(_STEPS, device=inputs.device)
    return scheduler


def _diffusers(as_tensor: bool, ours: bool = False):
    def prepare(inputs: Any) -> Call:
        import diffusers

        scheduler = _scheduler(inputs, pf.diffusers if ours else diffusers)
        step = next(t for t in scheduler.timesteps if int(t) == _NOW) if as_tensor else _NOW
        x, e, cond, guidance, eta = inputs.x, inputs.e, inputs.cond, inputs.guidance, inputs.eta
        noise = inputs.noise if eta else None

        def call() -> Any:
            output = e + guidance * (cond - e) if guidance else e
            return scheduler.step(output, step, x, eta=eta, variance_noise=noise, return_dict=False)

        return call

    return prepare


def _eager(inputs: Any) -> Call:
    step, tensors = _formula(inputs), _tensors(inputs)
    return lambda: step(*tensors)


def _eager_folded(inputs: Any) -> Call:
    """Coefficients folded by hand: two passes, no x0. Only for the plain step."""
    if inputs.clip or inputs.guidance or inputs.eta or inputs.to != "out=":
        raise Skip("folding the coefficients leaves no predicted image, to clip or to return, and knows no options")
    x, e, out = inputs.x, inputs.e, inputs.out
    a = (inputs.prev / inputs.now) ** 0.5
    b = (1 - inputs.prev) ** 0.5 - a * (1 - inputs.now) ** 0.5

    def call() -> tuple[Tensor]:
        torch.mul(x, a, out=out).add_(e, alpha=b)
        return (out,)

    return call


def _compiled(inputs: Any) -> Call:
    step, tensors = _formula(inputs), _tensors(inputs)
    torch._dynamo.reset()  # each case anew, or the eighth would fall back to eager
    if inputs.to == "allocating":
        compiled = torch.compile(step, dynamic=False)
        return lambda: compiled(*tensors)
    results = (inputs.out, inputs.out_image)[: _TO[inputs.to]]

    @torch.compile(dynamic=False)
    def write(*tensors: Tensor) -> None:
        for out, result in zip(results, step(*tensors), strict=False):
            out.copy_(result)

    def call() -> tuple[Tensor, ...]:
        write(*tensors)
        return results

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return call


def _add(inputs: Any) -> Call:
    x, e, out = inputs.x, inputs.e, torch.empty_like(inputs.x)
    return lambda: torch.add(x, e, out=out)


def _copy(inputs: Any) -> Call:
    return copy_limit(_bytes(inputs), inputs.device)


def _bytes(inputs: Any) -> int:
    tensors = 2 + (inputs.guidance is not None) + (inputs.eta > 0) + _TO[inputs.to]
    return inputs.x.numel() * inputs.x.element_size() * tensors


_ADD, _BYTES = "torch.add(x, e, out=o)", "copy of the same bytes"

SPEC = Spec(
    op="ddim_step",
    about="one DDIM step, epsilon prediction; out= writes the sample alone, out=both and allocating also the image",
    cases=(
        _case((1, 1), to="allocating"),  # no work: what the call itself takes
        *(_case(s, "float32", to, s in _QUICK) for s in _SHAPES for to in ("allocating", "out=")),
        *(
            _case(s, "bfloat16", to, s in (_SMALL, _LARGE, _QUICK[1]) and to == "out=")
            for s in _SHAPES
            for to in ("allocating", "out=")
        ),
        _case(_SMALL, to="allocating", quick=False, clip=1.0),
        _case(_LARGE, to="allocating", quick=False, clip=1.0),
        _case(_LARGE, to="out=both"),
        _case(_LARGE, guidance=7.5),
        _case(_LARGE, "bfloat16", guidance=7.5, quick=False),
        _case(_LARGE, eta=0.5),
        _case(_SMALL, to="allocating", bitwise=True),
        _case(_LARGE, bitwise=True),
    ),
    tiny=(
        _case((2, 3, 8, 8), to="allocating"),
        _case((2, 3, 8, 8), "bfloat16"),
        _case((2, 3, 8, 8), clip=1.0),
        _case((2, 3, 8, 8), to="out=both", guidance=7.5, eta=0.5, bitwise=True),
    ),
    inputs=_inputs,
    contenders={
        **ours(_protofast),
        "protofast.diffusers": _diffusers(True, ours=True),
        "diffusers": _diffusers(True),
        "diffusers, int timestep": _diffusers(False),
        "eager": _eager,
        "eager, folded": _eager_folded,
        "torch.compile": _compiled,
    },
    reference=_reference,
    error=_error,
    tolerance=_tolerance,
    limits={_ADD: _add, _BYTES: _copy},
    bytes=_bytes,
    flops=lambda inputs: inputs.x.numel() * (3 * _TO[inputs.to]),
    targets=(
        Target("1x1 float32 allocating", "protofast native", None, 5e-6),
        Target("1x3x64x64 float32 allocating", "protofast native", "diffusers, int timestep", 8),
        Target("64x3x256x256 float32 out=", "protofast native", "diffusers, int timestep", 30),
        Target("64x3x256x256 float32 out=", "protofast native", _ADD, 1 / 1.10),
        Target("64x3x256x256 bfloat16 out=", "protofast native", _BYTES, 1 / 1.15),
        Target("64x3x256x256 float32 out=both", "protofast native", _BYTES, 1 / 1.15),
        Target("64x3x256x256 float32 out= guidance", "protofast native", _BYTES, 1 / 1.15),
    ),
)
