"""Rotated channels of a classifier's features: purity, pooling, heat maps, against rotating the whole map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import protofast as pf

from ..spec import (
    OURS,
    Call,
    Case,
    Prepare,
    Skip,
    Spec,
    Target,
    copy_limit,
    generator,
    matmul_limit,
    ours,
    tensor_error,
)

_EPS = 1e-8
_REFERENCE_FLOPS = 4e8
"""Above these the float64 search of the reference takes seconds a call and is no contender."""


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Features as behind a ReLU, an orthogonal matrix, and rows of it at random: one an image, or several."""
    params, rng = dict(case.params), generator(seed)
    b, c, side = params["shape"]
    train, some = params.get("train", False), params.get("some")
    x = torch.randn(b, c, side, side, generator=rng).relu()
    u = torch.linalg.qr(torch.randn(c, c, generator=rng))[0].contiguous()
    channels = torch.randint(c, (b, some) if some else (b,), generator=rng)
    return SimpleNamespace(
        x=x.to(device).requires_grad_(train),
        u=u.to(device).requires_grad_(train),
        channels=channels.to(device),
        weight=torch.rand(b, generator=rng).to(device),
        device=device,
        **{"train": False, "pool": None, "size": None} | params,
    )


def _rotated(x: Tensor, u: Tensor) -> Tensor:
    """As the papers' code does."""
    return torch.einsum("rc,bchw->brhw", u, x)


def _compiled(prepare: Callable[[Callable[..., Any], Any], Call], function: Callable[..., Any]) -> Prepare:
    def compiled(inputs: Any) -> Call:
        torch._dynamo.reset()
        return prepare(torch.compile(function, dynamic=False), inputs)

    return compiled


def _bytes(inputs: Any) -> int:
    """The features alone: rows of the matrix and results are few beside them."""
    return inputs.x.numel() * inputs.x.element_size()


def _copy(inputs: Any) -> Call:
    return copy_limit(2 * _bytes(inputs), inputs.device)


def _error(output: Any, reference: Any, inputs: Any) -> float:
    if isinstance(output, Tensor):
        output, reference = (output,), (reference,)
    return max(map(tensor_error, output, reference))


# --- purity of one channel an image --------------------------------------------------------------------------------


def _purity_case(c: int, b: int = 8, side: int = 7, train: bool = False) -> Case:
    return Case(f"{b}x{c}x{side}x{side}" + " train" * train, {"shape": (b, c, side), "train": train})


def _maybe_train(forward: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Any) -> Call:
    x, u, channels, weight = inputs.x, inputs.u, inputs.channels, inputs.weight
    if not inputs.train:
        return lambda: forward(x, u, channels)

    def call() -> tuple[Tensor, ...]:
        purity = forward(x, u, channels)
        return purity, *torch.autograd.grad(purity, (x, u), weight.to(purity.dtype))

    return call


def _protofast_purity(inputs: Any, backend: str) -> Call:
    return _maybe_train(lambda x, u, channels: pf.channel_purity(x, u, channels, backend=backend).purity, inputs)


def _papers_purity(x: Tensor, u: Tensor, channels: Tensor) -> Tensor:
    """Every channel of every pixel; the pixel of the largest; there, the channel by the length of all."""
    z = _rotated(x, u).flatten(2)
    sample = torch.arange(len(x), device=x.device)
    best, where = z[sample, channels].max(1)
    return best.relu() / z[sample, :, where].norm(dim=1).clamp(min=_EPS)


def _row_purity(x: Tensor, u: Tensor, channels: Tensor) -> Tensor:
    """What a careful user writes, who sees that an orthogonal matrix keeps lengths: one row."""
    flat = x.flatten(2)
    best, where = torch.bmm(u[channels][:, None], flat)[:, 0].max(1)
    return best.relu() / flat[torch.arange(len(x), device=x.device), :, where].norm(dim=1).clamp(min=_EPS)


def _purity_error(output: Any, reference: Any, inputs: Any) -> float:
    """The rotation's gradients as an orthogonal parametrization takes them, U gᵀ − g Uᵀ: through the length of U f
    that of the papers has a part more, which moves U off the orthogonal matrices."""
    if inputs.train:
        u = inputs.u.detach().double()
        turned = [u @ g.double().t() for g in (output[2], reference[2])]
        output, reference = ((*t[:2], one - one.t()) for t, one in zip((output, reference), turned, strict=True))
    return _error(output, reference, inputs)


def _purity_reference(inputs: Any) -> Any:
    x, u = (t.detach().double().requires_grad_(inputs.train) for t in (inputs.x, inputs.u))
    found = []
    for image, c in zip(x, inputs.channels.tolist(), strict=True):
        z = (image * u[c][:, None, None]).sum(0).flatten()
        best = int(z.argmax())
        found.append(z[best].clamp(min=0) / image.flatten(1)[:, best].square().sum().sqrt())
    purity = torch.stack(found)
    if not inputs.train:
        return purity
    return purity.detach(), *torch.autograd.grad(purity, (x, u), inputs.weight.double())


_CHANNELS = (512, 1280, 2048)

PURITY = Spec(
    op="channel_purity",
    about="purity of one channel an image at its strongest pixel; train adds both gradients",
    cases=tuple(_purity_case(c, train=train) for train in (False, True) for c in _CHANNELS),
    tiny=(_purity_case(12, 3, 4), _purity_case(12, 3, 4, True)),
    inputs=_inputs,
    contenders={
        **ours(_protofast_purity),
        "papers": partial(_maybe_train, _papers_purity),
        "torch.compile of papers": _compiled(_maybe_train, _papers_purity),
        "torch, one row": partial(_maybe_train, _row_purity),
    },
    reference=_purity_reference,
    error=_purity_error,
    tolerance=lambda inputs: 1e-3,
    limits={"copy of the features": _copy},
    bytes=_bytes,
    flops=lambda inputs: 2 * inputs.x.numel(),
    targets=(
        Target("8x512x7x7", f"{OURS} native", "papers", 50),
        Target("8x2048x7x7", f"{OURS} native", "papers", 200),
    ),
)


# --- pooling of all channels ---------------------------------------------------------------------------------------


def _pool_case(c: int, pool: str, b: int = 8, side: int = 7) -> Case:
    return Case(f"{pool} {b}x{c}x{side}x{side}", {"shape": (b, c, side), "pool": pool})


def _protofast_pool(inputs: Any, backend: str) -> Call:
    x, u, pool = inputs.x, inputs.u, inputs.pool
    if pool == "max":
        if backend == "reference" and _pool_flops(inputs) > _REFERENCE_FLOPS:
            raise Skip("the float64 reference takes seconds at this size")
        return lambda: pf.rotate_and_pool(x, u, backend=backend).value
    if backend != "reference":
        raise Skip("the mean is the same on every backend")
    pixels = x[0, 0].numel()
    return lambda: pf.rotate_and_pool(x, u, pool="mean").value * pixels


def _papers_pool(x: Tensor, u: Tensor, pool: str) -> Tensor:
    z = _rotated(x, u)
    return z.sum((2, 3)) if pool == "sum" else z.amax((2, 3))


def _product_pool(x: Tensor, u: Tensor, pool: str) -> Tensor:
    """What a careful user writes: sums before the product; or one batched product, without einsum's detours."""
    if pool == "sum":
        return x.sum((2, 3)) @ u.t()
    return torch.matmul(u, x.flatten(2)).amax(2)


def _pool_call(function: Callable[[Tensor, Tensor, str], Tensor], inputs: Any) -> Call:
    return lambda: function(inputs.x, inputs.u, inputs.pool)


def _pool_reference(inputs: Any) -> Tensor:
    z = torch.stack([inputs.u.double() @ image.double().flatten(1) for image in inputs.x])
    return z.sum(2) if inputs.pool == "sum" else z.max(2).values


def _pool_flops(inputs: Any) -> int:
    return 2 * inputs.u.shape[0] * (inputs.x.numel() if inputs.pool == "max" else inputs.x[..., 0, 0].numel())


def _pool_limit(inputs: Any) -> Call:
    if inputs.pool == "sum":
        return copy_limit(2 * (_bytes(inputs) + inputs.u.numel() * inputs.u.element_size()), inputs.device)
    c = len(inputs.u)
    return matmul_limit(inputs.x.numel() // c, c, c, inputs.x.dtype, inputs.device)


POOL = Spec(
    op="rotate_and_pool",
    about="each rotated channel over space: its sum (EPIC's score), or its largest value",
    cases=(
        *(_pool_case(c, pool) for pool in ("sum", "max") for c in _CHANNELS),
        *(_pool_case(c, "sum", 128) for c in _CHANNELS),  # a batch of a data set, as EPIC scores it
    ),
    tiny=(_pool_case(12, "sum", 3, 4), _pool_case(12, "max", 3, 4)),
    inputs=_inputs,
    contenders={
        **ours(_protofast_pool),
        "papers": partial(_pool_call, _papers_pool),
        "torch.compile of papers": _compiled(_pool_call, _papers_pool),
        "torch, product": partial(_pool_call, _product_pool),
    },
    reference=_pool_reference,
    error=_error,
    tolerance=lambda inputs: 1e-3,
    limits={"copy of the inputs, or a matmul": _pool_limit},
    bytes=_bytes,
    flops=_pool_flops,
    targets=tuple(Target(f"sum {b}x{c}x7x7", f"{OURS} reference", "papers", 20) for b in (8, 128) for c in _CHANNELS),
)


# --- heat maps of four channels an image ---------------------------------------------------------------------------


def _heat_case(c: int, b: int = 8, side: int = 7, size: int | None = None) -> Case:
    label = f"4 of {c}, {b}x{side}x{side}" + (f" to {size}x{size}" if size else "")
    return Case(label, {"shape": (b, c, side), "some": 4, "size": size and (size, size)})


def _protofast_heat(inputs: Any) -> Call:
    x, u, channels, size = inputs.x, inputs.u, inputs.channels, inputs.size
    return lambda: pf.channel_heat_map(x, u, channels, size=size)


def _papers_heat(x: Tensor, u: Tensor, channels: Tensor, size: Any, first: bool = False) -> Tensor:
    """The maps of all channels, of which the four are taken; with `first`, before the others are enlarged."""
    z = _rotated(x, u)
    strength = z.relu()
    maps = strength / (z.norm(dim=1, keepdim=True) + _EPS) * (strength / (strength.amax((2, 3), keepdim=True) + _EPS))
    chosen = torch.arange(len(x), device=x.device)[:, None], channels
    maps = maps[chosen] if first else maps
    if size is not None:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps if first else maps[chosen]


def _heat_call(function: Callable[..., Tensor], inputs: Any) -> Call:
    return lambda: function(inputs.x, inputs.u, inputs.channels, inputs.size)


def _heat_reference(inputs: Any) -> Tensor:
    found = []
    for image, chosen in zip(inputs.x.double(), inputs.channels.tolist(), strict=True):
        length = image.square().sum(0).sqrt() + _EPS
        for c in chosen:
            z = (image * inputs.u[c].double()[:, None, None]).sum(0).clamp(min=0)
            found.append(z / length * z / (z.max() + _EPS))
    maps = torch.stack(found).unflatten(0, inputs.channels.shape)
    return maps if inputs.size is None else F.interpolate(maps, size=inputs.size, mode="bilinear")


HEAT = Spec(
    op="channel_heat_map",
    about="heat maps of four channels an image, as they are or as large as the image",
    cases=(*map(_heat_case, _CHANNELS), *(_heat_case(c, 1, size=224) for c in _CHANNELS)),
    tiny=(_heat_case(12, 3, 4), _heat_case(12, 3, 4, 9)),
    inputs=_inputs,
    contenders={
        OURS: _protofast_heat,
        "papers": partial(_heat_call, _papers_heat),
        "torch.compile of papers": _compiled(_heat_call, _papers_heat),
        "papers, four enlarged": partial(_heat_call, partial(_papers_heat, first=True)),
    },
    reference=_heat_reference,
    error=_error,
    tolerance=lambda inputs: 1e-3,
    limits={"copy of the features": _copy},
    bytes=_bytes,
    flops=lambda inputs: 2 * inputs.x[0].numel() * inputs.channels.numel(),
    targets=tuple(
        Target(name, OURS, "papers", 100)
        for name in ("4 of 512, 8x7x7", "4 of 2048, 8x7x7", "4 of 512, 1x7x7 to 224x224", "4 of 2048, 1x7x7 to 224x224")
    ),
)
