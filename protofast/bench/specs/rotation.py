"""A rotation of a classifier's channels, made and differentiated once: what an update of ProDG's U costs by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from ..spec import OURS, Call, Case, Spec, generator, matmul_limit

_KINDS = ("matrix_exp", "cayley", "orthogonal")


def _case(channels: int, quick: bool) -> Case:
    return Case(f"C={channels} float32", {"channels": channels}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Free parameters as after some training, ‖A − Aᵀ‖₂ about 1.4; and a gradient to lead back."""
    channels, random = case.params["channels"], generator(seed)
    free, towards = (torch.randn(channels, channels, generator=random) for _ in range(2))
    return SimpleNamespace(free=(free / (2 * channels**0.5)).to(device), towards=towards.to(device), device=device)


def _call(matrix: Callable[[], Tensor], free: Tensor, towards: Tensor) -> Call:
    def call() -> Tensor:
        found = matrix()
        torch.autograd.grad(found, free, towards)
        return found.detach()

    return call


def _protofast(kind: str, inputs: Any) -> Call:
    from protofast.prodg.rotation import Rotation

    rotation = Rotation(len(inputs.free), parametrization=kind).to(inputs.device)
    (free,) = rotation.parameters()
    with torch.no_grad():
        free.copy_(inputs.free)
    return _call(rotation, free, inputs.towards)


def _exponential(inputs: Any) -> Call:
    """As the papers write it."""
    free = inputs.free.clone().requires_grad_()
    return _call(lambda: torch.matrix_exp(free - free.mT), free, inputs.towards)


def _householder(inputs: Any) -> Call:
    """torch's reflections; the other maps of ``parametrizations.orthogonal`` do the work of ours."""
    layer = nn.Linear(len(inputs.free), len(inputs.free), bias=False).to(inputs.device)
    with torch.no_grad():
        layer.weight.copy_(inputs.free)
    orthogonal(layer, orthogonal_map="householder")
    (free,) = layer.parameters()
    return _call(lambda: layer.weight, free, inputs.towards)


SPEC = Spec(
    op="rotation",
    about="an orthogonal matrix of free parameters, forward and backward",
    cases=(_case(64, True), _case(512, True), _case(1280, False)),
    tiny=(_case(8, True),),
    inputs=_inputs,
    contenders={
        **{f"{OURS} {kind}": partial(_protofast, kind) for kind in _KINDS},
        "torch.matrix_exp": _exponential,
        "torch householder": _householder,
    },
    # Each gives another matrix of the same parameters; what all owe is U Uᵀ = I.
    reference=lambda inputs: torch.eye(len(inputs.free), dtype=torch.float64, device=inputs.device),
    error=lambda output, one, _: float((output.double() @ output.double().mT - one).abs().max()),
    # Roundings of a product of C terms, doubled by each of an exponential's squarings (3 at C = 1280).
    tolerance=lambda inputs: 16 * len(inputs.free) * 2.0**-24,
    limits={
        "matmul of the same size": lambda inputs: matmul_limit(*3 * (len(inputs.free),), torch.float32, inputs.device)
    },
    bytes=lambda inputs: 4 * inputs.free.numel() * 4,  # parameters, matrix and the gradients of both
)
