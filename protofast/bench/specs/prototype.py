"""Prototype activation: nearest patch to each prototype, where ProtoPNet and Patronus build dense maps."""

from __future__ import annotations

import math
import random
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
    Median,
    Prepare,
    Skip,
    Spec,
    copy_limit,
    generator,
    matmul_limit,
    ours,
    tensor_error,
)

_EPS = 1e-4
_REFERENCE_FLOPS = 4e8
"""Above these the float64 reference takes seconds a call and is no contender."""

_PYKEOPS_FLOPS = 4e9
"""The same for pykeops on a CPU."""

Forward = Callable[[Tensor, Tensor, str, int], Tensor]
"""(features, prototypes, metric, topk) -> activation."""


def _case(
    name: str,
    b: int,
    d: int,
    side: int,
    p: int,
    quick: bool = True,
    *,
    goal: bool = False,
    train: bool = False,
    dtype: str = "float32",
    metric: str = "sqeuclidean",
    topk: int = 1,
    kernel: int = 1,
    inputs: str = "uniform",
) -> Case:
    """`goal` cases count in the medians that the spec promises."""
    label = f"{name} {b}x{d}x{side}x{side} P={p} {dtype}"
    label += f" {metric}" * (metric != "sqeuclidean") + f" topk={topk}" * (topk > 1)
    label += f" kernel={kernel}" * (kernel > 1) + " train" * train
    params = {"shape": (b, d, side, side), "p": p, "dtype": dtype, "train": train, "goal": goal, "inputs": inputs}
    return Case(label, params | {"metric": metric, "topk": topk, "kernel": kernel}, quick)


_SHAPES = (
    ("ProtoPNet", 80, 128, 7, 2000),
    ("Patronus", 64, 128, 26, 100),
    ("Patronus", 16, 128, 43, 100),
    ("wide", 32, 512, 14, 200),
    ("small", 8, 64, 7, 20),
    ("many", 2, 1024, 20, 5000),
)


def _drawn(seed: int) -> tuple[Case, ...]:
    """Three shapes of 0.1 to 2 GFLOP, forward and train; odd sizes are as likely as round ones."""
    draw, cases = random.Random(seed), []
    for number in range(3):
        while True:
            b, d, side, p = (round(math.exp(draw.uniform(*map(math.log, r)))) for r in _RANGES)
            if 1e8 <= 2 * b * side**2 * p * d <= 2e9:
                break
        name = f"drawn {number} (seed {seed})"
        cases += [_case(name, b, d, side, p, goal=True, train=train) for train in (False, True)]
    return tuple(cases)


_RANGES = (2, 100), (32, 768), (5, 45), (20, 3000)  # samples, channels, side, prototypes: log-uniform


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Features and prototypes uniform in (0, 1), as behind the sigmoid of ProtoPNet's add-on layers; or features of
    which many are as near, or a few rule the scale: in two tight ``clusters``, three quarters of them one
    ``background``, or with one ``outlier`` a sample."""
    params = case.params
    rng, dtype, train, kernel = generator(seed), getattr(torch, params["dtype"]), params["train"], params["kernel"]
    b, d, *_ = params["shape"]
    size = (params["p"], d, kernel, kernel) if kernel > 1 else (params["p"], d)
    x = torch.rand(params["shape"], generator=rng)
    p = torch.rand(size, generator=rng)
    _HARDER.get(params["inputs"], lambda *_: None)(x, p, rng)
    x, p = x.to(device, dtype), p.to(device, dtype)
    weight = torch.rand((b, params["p"], params["topk"])[: 2 + (params["topk"] > 1)], generator=rng).to(device)
    return SimpleNamespace(
        x=x.requires_grad_(train),
        p=p.requires_grad_(train),
        weight=weight,
        train=train,
        metric=params["metric"],
        topk=params["topk"],
        device=device,
    )


def _clusters(x: Tensor, p: Tensor, rng: torch.Generator) -> None:
    """Around −1 and 1; each prototype is a patch, moved as far as patches of a cluster are from its middle."""
    middle = torch.randint(2, (x.shape[0], 1, *x.shape[2:]), generator=rng) * 2.0 - 1
    x.copy_(middle + 1e-3 * torch.randn(x.shape, generator=rng))
    patches = x.movedim(1, -1).flatten(0, -2)
    chosen = patches[torch.randint(len(patches), (len(p),), generator=rng)]
    p.copy_(chosen + 1e-3 * torch.randn(p.shape, generator=rng))


def _background(x: Tensor, p: Tensor, rng: torch.Generator) -> None:
    """Equal patches, which tie."""
    flat = x.flatten(2)
    for sample in flat:
        where = torch.randperm(flat.shape[2], generator=rng)[: flat.shape[2] * 3 // 4]
        sample[:, where] = flat[0, :, :1].clone()


def _outlier(x: Tensor, p: Tensor, rng: torch.Generator) -> None:
    flat = x.flatten(2)
    for sample in flat:
        sample[:, int(torch.randint(flat.shape[2], (), generator=rng))] *= 1000


_HARDER = {"clusters": _clusters, "background": _background, "outlier": _outlier}


def _maybe_train(forward: Forward) -> Prepare:
    """`forward` as a call, with the gradients of Σ weight·activation where the case trains."""

    def prepare(inputs: Any) -> Call:
        x, p, weight, metric, topk = inputs.x, inputs.p, inputs.weight, inputs.metric, inputs.topk
        if not inputs.train:
            return lambda: (forward(x, p, metric, topk),)

        def call() -> tuple[Tensor, ...]:
            activation = forward(x, p, metric, topk)
            return activation, *torch.autograd.grad(activation, (x, p), weight.to(activation.dtype))

        return call

    return prepare


# --- what users run ----------------------------------------------------------------------------------------------


def _papers(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
    """|x|² by a convolution with ones, |p|² − 2·conv(x, p), relu, −max_pool(−d), log (Chen et al. 2019); top-k as in
    IAIA-BL, cosine as in ST-ProtoPNet."""
    kernels = p if p.ndim == 4 else p[:, :, None, None]
    if metric == "cosine":
        distances = 1 - F.conv2d(F.normalize(x), F.normalize(kernels))
    else:
        x2 = F.conv2d(x * x, torch.ones_like(kernels))
        p2 = (kernels * kernels).sum((1, 2, 3))[:, None, None]
        distances = F.relu(x2 + (p2 - 2 * F.conv2d(x, kernels)))
    if topk > 1:
        return _activate(-(-distances).flatten(2).topk(topk).values, metric)
    return _activate(-F.max_pool2d(-distances, distances.shape[2:]).flatten(1), metric)


def _cdist(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
    if x.element_size() == 2:
        raise Skip(f"torch.cdist takes no {x.dtype}")
    if metric == "cosine":
        raise Skip("torch.cdist has no cosine")
    return _activate(_smallest(torch.cdist(_patches(x, p), p.flatten(1)), 1, topk).square(), metric)


def _product(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
    """What a careful user writes: one product, |p|² added after the minimum over patches, log on the winners alone."""
    if p.ndim == 4:
        raise Skip("a product takes windows of one pixel; larger ones are the papers' convolution")
    flat = x.flatten(2)
    if metric == "cosine":
        return _activate(1 + _smallest(-(F.normalize(flat).transpose(1, 2) @ F.normalize(p).t()), 1, topk), metric)
    d = _smallest(flat.square().sum(1)[:, :, None] - 2 * flat.transpose(1, 2) @ p.t(), 1, topk)
    p2 = p.square().sum(1)
    return _activate((d + (p2[:, None] if topk > 1 else p2)).clamp(min=0), metric)


def _smallest(d: Tensor, axis: int, topk: int) -> Tensor:
    """Minimum over `axis`, or the `topk` smallest, which become the last axis."""
    return d.amin(axis) if topk == 1 else d.topk(topk, axis, largest=False).values.movedim(axis, -1)


def _activate(d: Tensor, metric: str) -> Tensor:
    """The log of the distance; for cosine, cos − 1."""
    return -d if metric == "cosine" else torch.log((d + 1) / (d + _EPS))


def _patches(x: Tensor, p: Tensor) -> Tensor:
    """(B, N, K·D), a view of the features where the window is one pixel."""
    return (x.flatten(2) if p.ndim == 2 else F.unfold(x, p.shape[2:])).transpose(1, 2)


def _compiled(inputs: Any) -> Call:
    torch._dynamo.reset()
    return _maybe_train(torch.compile(_papers, dynamic=False))(inputs)


def _library(name: str, inputs: Any, find: Callable[[Tensor, Tensor, str, int], Tensor]) -> Call:
    """`find` gives the patches (B, P, k) by a library; their distances in the direct form, which has the gradients."""
    if inputs.x.dtype != torch.float32:
        raise Skip(f"{name} takes float32, not {inputs.x.dtype}")

    def forward(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
        patches, rows = _patches(x, p).contiguous(), p.flatten(1)
        if metric == "cosine":
            patches, rows = F.normalize(patches, dim=2), F.normalize(rows)
        with torch.no_grad():
            index = find(patches.detach(), rows.detach(), metric, topk)
        d = (patches[torch.arange(len(x), device=x.device)[:, None, None], index] - rows[:, None]).square().sum(3)
        d = d / 2 if metric == "cosine" else d
        return _activate(d if topk > 1 else d[..., 0], metric)

    return _maybe_train(forward)(inputs)


def _pykeops(inputs: Any) -> Call:
    """Its reductions have no gradient: the index by KeOps, the rest by torch, as its authors advise."""
    if inputs.device == "cpu" and _flops(inputs) > _PYKEOPS_FLOPS:
        raise Skip("pykeops takes seconds at this size on a CPU")
    import pykeops

    pykeops.set_verbose(False)
    from pykeops.torch import LazyTensor

    def find(patches: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
        d = ((LazyTensor(p[None, :, None]) - LazyTensor(patches[:, None])) ** 2).sum(-1)
        return d.argKmin(topk, 2) if topk > 1 else d.argmin(2)

    return _library("pykeops", inputs, find)


def _faiss(inputs: Any) -> Call:
    """The prototypes as queries to each sample's patches; without gradients, faiss's own distances are taken."""
    if inputs.device != "cpu":
        raise Skip("faiss-cpu runs on the CPU")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(patches: Tensor, p: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        queries = p.numpy()
        found = [faiss.knn(queries, sample, topk) for sample in patches.numpy()]
        d, index = (torch.stack([torch.from_numpy(one[i]) for one in found]) for i in (0, 1))
        return d, index

    def find(patches: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
        return search(patches, p, topk)[1]

    if inputs.train or inputs.metric == "cosine" or inputs.x.dtype != torch.float32:
        return _library("faiss", inputs, find)

    def forward(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
        d = search(_patches(x, p).contiguous(), p.flatten(1), topk)[0]
        return _activate(d if topk > 1 else d[..., 0], metric)

    return _maybe_train(forward)(inputs)


# --- ours --------------------------------------------------------------------------------------------------------


def _protofast(inputs: Any, backend: str, precision: str = "auto") -> Call:
    if backend == "reference" and _flops(inputs) > _REFERENCE_FLOPS:
        raise Skip("the float64 reference takes seconds at this size")
    if precision == "bf16":
        if inputs.x.dtype != torch.float32:
            raise Skip(f"{inputs.x.dtype} features are searched so anyway")
        if inputs.train:
            raise Skip("the search alone differs, and near-ties it decides otherwise have other gradients")
    activation = "linear" if inputs.metric == "cosine" else "log"

    def forward(x: Tensor, p: Tensor, metric: str, topk: int) -> Tensor:
        return pf.prototype_activation(
            x,
            p,
            metric=metric,
            activation=activation,
            eps=_EPS,
            topk=topk,
            precision=precision,
            backend=backend,
        ).activation

    return _maybe_train(forward)(inputs)


_BF16 = {
    f"{name} bf16": prepare
    for name, prepare in ours(partial(_protofast, precision="bf16")).items()
    if name != f"{OURS} reference"
}
"""float32 features searched with bfloat16 products: the winners' distances stay exact."""


# --- the yardstick -----------------------------------------------------------------------------------------------


def _reference(inputs: Any) -> tuple[Tensor, ...]:
    """float64: winners by a product (right to 1e-12), their distances in the direct form, gradients through it."""
    x = inputs.x.detach().double().requires_grad_(inputs.train)
    p = inputs.p.detach().double().requires_grad_(inputs.train)
    patches, rows = _patches(x, p), p.flatten(1)
    if inputs.metric == "cosine":
        patches = patches / patches.norm(dim=2, keepdim=True)
        rows = rows / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        score = torch.stack([rows @ one.t() - one.square().sum(1) / 2 for one in patches])  # (B, P, N)
        index = score.topk(inputs.topk).indices
        del score
    best = patches[torch.arange(len(x), device=x.device)[:, None, None], index]  # (B, P, k, K·D)
    d = (best - rows[:, None]).square().sum(3) * (0.5 if inputs.metric == "cosine" else 1)
    activation = _activate(d if inputs.topk > 1 else d[..., 0], inputs.metric)
    if not inputs.train:
        return (activation,)
    return activation.detach(), *torch.autograd.grad(activation, (x, p), inputs.weight.double())


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


# --- limits ------------------------------------------------------------------------------------------------------


def _sizes(inputs: Any) -> tuple[int, int, int]:
    """Patches of all samples, prototypes, length of a patch."""
    b, _, *sides = inputs.x.shape
    kernel = inputs.p.shape[2:] or (1, 1)
    grid = [s - k + 1 for s, k in zip(sides, kernel, strict=True)]
    return b * math.prod(grid), inputs.p.shape[0], inputs.p[0].numel()


def _batched(inputs: Any) -> Call:
    """(P, K·D) @ (B, K·D, N): the product in the layout that features come in."""
    (m, n, k), b = _sizes(inputs), inputs.x.shape[0]
    rows = torch.rand(n, k, device=inputs.device).to(inputs.x.dtype).expand(b, -1, -1)
    patches = torch.rand(b, k, m // b, device=inputs.device).to(inputs.x.dtype)
    target = torch.empty(b, n, m // b, dtype=inputs.x.dtype, device=inputs.device)
    return lambda: torch.bmm(rows, patches, out=target)


def _bytes(inputs: Any) -> int:
    """Inputs once, and of each winner the activation, distance and index; training writes both gradients too."""
    given = sum(t.numel() * t.element_size() for t in (inputs.x, inputs.p))
    return given * (1 + inputs.train) + inputs.weight.numel() * 16


def _flops(inputs: Any) -> int:
    return 2 * math.prod(_sizes(inputs))


_FORWARD: dict[str, Any] = {"goal": True, "train": False}
_TRAIN: dict[str, Any] = {"goal": True, "train": True}
_BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "train": False}
_NATIVE, _TRITON = f"{OURS} native", f"{OURS} triton"

SPEC = Spec(
    op="prototype_activation",
    about="nearest patch of every prototype, squared Euclidean, log activation; train adds both gradients",
    cases=(
        *(_case(*shape, goal=True) for shape in _SHAPES),
        *(_case(*shape, goal=True, train=True) for shape in _SHAPES),
        _case("Patronus", 128, 128, 10, 100),
        _case("Patronus", 64, 128, 26, 100, dtype="bfloat16"),
        _case("ProtoPNet", 80, 128, 7, 2000, dtype="bfloat16"),
        _case("ST-ProtoPNet", 80, 128, 7, 2000, metric="cosine"),
        _case("MGProto", 64, 128, 14, 200, topk=20),
        _case("windows", 16, 128, 14, 100, kernel=3),
        _case("Patronus", 64, 128, 26, 100, False, dtype="bfloat16", train=True),
        _case("Patronus", 128, 128, 10, 30, False),
        _case("Patronus", 128, 128, 10, 100, False, train=True),
        _case("Patronus", 128, 128, 26, 30, False),
        _case("Patronus", 128, 128, 26, 100, False),
        _case("Patronus", 128, 128, 26, 100, False, train=True),
        _case("Patronus", 128, 128, 43, 100, False),
        _case("Patronus", 128, 128, 26, 100, False, dtype="bfloat16"),
        _case("ProtoPNet", 80, 128, 7, 2000, False, dtype="bfloat16", train=True),
        _case("ST-ProtoPNet", 80, 128, 7, 2000, False, metric="cosine", train=True),
        _case("MGProto", 64, 128, 14, 200, False, topk=20, train=True),
        _case("windows", 16, 128, 14, 100, False, kernel=3, train=True),
        *(_case(name, 8, 128, 26, 100, False, inputs=name) for name in _HARDER),
    ),
    drawn=_drawn,
    tiny=(
        _case("tiny", 3, 8, 4, 5),
        _case("tiny", 3, 8, 4, 5, train=True),
        _case("tiny", 3, 8, 4, 5, dtype="bfloat16"),
        _case("tiny", 3, 8, 4, 5, metric="cosine"),
        _case("tiny", 3, 8, 4, 5, topk=3, train=True),
        _case("tiny", 3, 8, 4, 5, kernel=3, train=True),
    ),
    inputs=_inputs,
    contenders={
        **ours(_protofast),
        **_BF16,
        "papers": _maybe_train(_papers),
        "cdist": _maybe_train(_cdist),
        "product, then min": _maybe_train(_product),
        "torch.compile of papers": _compiled,
        "pykeops": _pykeops,
        "faiss": _faiss,
    },
    reference=_reference,
    error=_error,
    tolerance=_tolerance,
    limits={
        "matmul": lambda inputs: matmul_limit(*_sizes(inputs), inputs.x.dtype, inputs.device),
        "batched matmul": _batched,
        "copy": lambda inputs: copy_limit(_bytes(inputs), inputs.device),
    },
    bytes=_bytes,
    flops=_flops,
    medians=(
        Median("forward", _FORWARD, _NATIVE, "papers", 10),
        Median("forward", _FORWARD, _NATIVE, "torch.compile of papers", 2.5),
        Median("forward", _FORWARD, _NATIVE, "matmul", 1 / 1.25),
        Median("forward", _FORWARD, f"{_NATIVE} bf16", "matmul", 1),
        Median("forward", _FORWARD, _NATIVE, "papers", 0.05, of="peak_memory"),
        Median("train", _TRAIN, _NATIVE, "papers", 0.05, of="extra_memory"),
        Median("train", _TRAIN, _NATIVE, "papers", 12),
        Median("train", _TRAIN, _NATIVE, "torch.compile of papers", 4),
        Median("train", _TRAIN, (_NATIVE, _TRITON), "torch.compile of papers", 5, device="cuda"),
        Median("bfloat16 P=100", _BFLOAT16 | {"p": 100}, (_NATIVE, _TRITON), "copy", 0.8, device="cuda"),
        Median("bfloat16 P=2000", _BFLOAT16 | {"p": 2000}, (_NATIVE, _TRITON), "matmul", 0.6, device="cuda"),
    ),
)
