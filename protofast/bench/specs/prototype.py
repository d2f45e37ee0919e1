"""Prototype activation: nearest patch to each prototype, where ProtoPNet and Patronus build dense maps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import protofast as pf

from ..spec import Call, Case, Skip, Spec, copy_limit, generator, matmul_limit, ours, tensor_error

_EPS = 1e-4


def _case(
    name: str, b: int, d: int, side: int, p: int, quick: bool, *, train: bool = False, dtype: str = "float32"
) -> Case:
    label = f"{name} {b}x{d}x{side}x{side} P={p} {dtype}{' train' if train else ''}"
    return Case(label, {"shape": (b, d, side, side), "p": p, "dtype": dtype, "train": train}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Features and prototypes uniform in (0, 1), as behind the sigmoid of ProtoPNet's add-on layers."""
    random, dtype = generator(seed), getattr(torch, case.params["dtype"])
    b, d, *_ = case.params["shape"]
    x = torch.rand(case.params["shape"], generator=random).to(device, dtype)
    p = torch.rand(case.params["p"], d, generator=random).to(device, dtype)
    weight = torch.rand(b, case.params["p"], generator=random).to(device)
    train = case.params["train"]
    return SimpleNamespace(
        x=x.requires_grad_(train), p=p.requires_grad_(train), weight=weight, train=train, device=device
    )


def _maybe_train(forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
    """`forward` as a call, with the gradients of Σ weight·activation where the case trains."""

    def prepare(inputs: Any) -> Call:
        x, p, weight = inputs.x, inputs.p, inputs.weight
        if not inputs.train:
            return lambda: (forward(x, p),)

        def call() -> tuple[Tensor, ...]:
            activation = forward(x, p)
            return activation, *torch.autograd.grad(activation, (x, p), weight.to(activation.dtype))

        return call

    return prepare


def _papers(x: Tensor, p: Tensor) -> Tensor:
    """|x|² by a convolution with ones, |p|² − 2·conv(x, p), relu, −max_pool(−d), log (Chen et al. 2019)."""
    kernels = p[:, :, None, None]
    x2 = F.conv2d(x * x, torch.ones_like(kernels))
    p2 = (kernels * kernels).sum((1, 2, 3))[:, None, None]
    distances = F.relu(x2 + (p2 - 2 * F.conv2d(x, kernels)))
    nearest = -F.max_pool2d(-distances, distances.shape[2:])
    return _log(nearest.flatten(1))


def _cdist(x: Tensor, p: Tensor) -> Tensor:
    if x.element_size() == 2:
        raise Skip(f"torch.cdist takes no {x.dtype}")
    return _log(torch.cdist(x.flatten(2).transpose(1, 2), p).amin(1).square())


def _product(x: Tensor, p: Tensor) -> Tensor:
    """What a careful user writes: one product, |p|² added after the minimum over patches, log on (B, P) alone."""
    flat = x.flatten(2)
    d = flat.square().sum(1)[:, :, None] - 2 * flat.transpose(1, 2) @ p.t()
    return _log((d.amin(1) + p.square().sum(1)).clamp(min=0))


def _log(d: Tensor) -> Tensor:
    return torch.log((d + 1) / (d + _EPS))


def _compiled(inputs: Any) -> Call:
    torch._dynamo.reset()
    return _maybe_train(torch.compile(_papers, dynamic=False))(inputs)


def _protofast(inputs: Any, backend: str) -> Call:
    return _maybe_train(lambda x, p: pf.prototype_activation(x, p, eps=_EPS, backend=backend).activation)(inputs)


def _reference(inputs: Any) -> tuple[Tensor, ...]:
    """float64, patch by patch in the direct form; gradients through the winners."""
    x, p = inputs.x.detach().double(), inputs.p.detach().double()
    patches = x.flatten(2).transpose(1, 2).contiguous()
    winner = torch.cat(
        [torch.cdist(patch[None], p[None], compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for patch in patches]
    )
    best = patches.gather(1, winner[:, :, None].expand(-1, -1, x.shape[1]))  # (B, P, D)
    difference = best - p
    d = difference.square().sum(2)
    if not inputs.train:
        return (_log(d),)
    slope = inputs.weight.double() * (1 / (d + 1) - 1 / (d + _EPS))
    to_patch = 2 * slope[:, :, None] * difference
    to_x = torch.zeros_like(patches).scatter_add(1, winner[:, :, None].expand_as(to_patch), to_patch)
    return _log(d), to_x.transpose(1, 2).reshape(x.shape), -to_patch.sum(0)


def _error(output: Any, reference: Any, inputs: Any) -> float:
    """Activations by their worst element; gradients by norm, since near-ties move whole entries."""
    worst = tensor_error(output[0], reference[0])
    for given, exact in zip(output[1:], reference[1:], strict=True):
        worst = max(worst, float((given.double().cpu() - exact.cpu()).norm() / exact.norm().cpu()))
    return worst


def _tolerance(inputs: Any) -> float:
    """bfloat16 keeps 8 bits of sums of some tens; one near-tie in hundreds moves a gradient's norm by percents."""
    if inputs.x.dtype in (torch.bfloat16, torch.float16):
        return 0.5
    return 0.1 if inputs.train else 1e-2


def _sizes(inputs: Any) -> tuple[int, int, int]:
    b, d, *sides = inputs.x.shape
    return b * torch.Size(sides).numel(), inputs.p.shape[0], d


def _bytes(inputs: Any) -> int:
    x, p = inputs.x, inputs.p
    once = x.numel() * x.element_size() + p.numel() * p.element_size() + x.shape[0] * p.shape[0] * 4
    return once * 2 if inputs.train else once  # training writes both gradients too


def _flops(inputs: Any) -> int:
    m, n, k = _sizes(inputs)
    return 2 * m * n * k


SPEC = Spec(
    op="prototype_activation",
    about="nearest patch of every prototype, squared Euclidean, log activation; train adds both gradients",
    cases=(
        _case("Patronus", 128, 128, 10, 30, True),
        _case("Patronus", 128, 128, 10, 100, True),
        _case("Patronus", 128, 128, 10, 100, True, train=True),
        _case("Patronus", 128, 128, 26, 30, False),
        _case("Patronus", 128, 128, 26, 100, True),
        _case("Patronus", 128, 128, 26, 100, False, train=True),
        _case("Patronus", 128, 128, 43, 100, False),
        _case("Patronus", 128, 128, 26, 100, False, dtype="bfloat16"),
        _case("ProtoPNet", 80, 128, 7, 2000, False),
        _case("ProtoPNet", 80, 128, 7, 2000, False, train=True),
        _case("ProtoPNet", 80, 128, 7, 2000, False, dtype="bfloat16"),
    ),
    tiny=(
        _case("tiny", 3, 8, 4, 5, True),
        _case("tiny", 3, 8, 4, 5, True, train=True),
        _case("tiny", 3, 8, 4, 5, True, dtype="bfloat16"),
    ),
    inputs=_inputs,
    contenders={
        **ours(_protofast),
        "papers": _maybe_train(_papers),
        "cdist": _maybe_train(_cdist),
        "product, then min": _maybe_train(_product),
        "torch.compile of papers": _compiled,
    },
    reference=_reference,
    error=_error,
    tolerance=_tolerance,
    limits={
        "matmul": lambda inputs: matmul_limit(*_sizes(inputs), inputs.x.dtype, inputs.device),
        "copy": lambda inputs: copy_limit(_bytes(inputs), inputs.device),
    },
    bytes=_bytes,
    flops=_flops,
)
