"""Prototype distance (Chen et al. 2019, eq. 1): schemas, fake kernels and gradients.

`metric`, `activation` and `precision` are indices into METRICS, ACTIVATIONS and PRECISIONS. A patch index is flat,
row-major over the grid of valid windows; -1 marks "no patch" (all masked) and carries no gradient. `mask` in an op is
contiguous, (B, *grid), True where a patch may win.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import define, same_backend

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
SQEUCLIDEAN, EUCLIDEAN, COSINE, DOT = range(4)
ACTIVATIONS = (None, "log", "linear", "exp", "reciprocal")
NONE, LOG, LINEAR, EXP, RECIPROCAL = range(5)
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32", "bf16")
AUTO, IEEE, TF32X3, TF32, BF16 = range(5)


def kernel_size(features: Tensor, prototypes: Tensor) -> list[int]:
    """Window sizes along the spatial axes; prototypes of shape (P, D) are windows of one pixel."""
    return list(prototypes.shape[2:]) or [1] * (features.ndim - 2)


def patch_grid(features: Tensor, prototypes: Tensor) -> list[int]:
    """Sizes of the grid of valid, stride-1 windows."""
    return [s - k + 1 for s, k in zip(features.shape[2:], kernel_size(features, prototypes), strict=True)]


def result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def windows(grid: list[int], kernel: list[int]) -> Iterator[tuple[slice, ...]]:
    """For each pixel of the window in row-major order, the slices of the features it takes as the window moves."""
    for offset in itertools.product(*(range(k) for k in kernel)):
        yield tuple(slice(o, o + g) for o, g in zip(offset, grid, strict=True))


def patch_mask(mask: Tensor, grid: list[int], kernel: list[int]) -> Tensor:
    """(B, *grid): whether every pixel of a window is allowed by `mask` (B, *S)."""
    allowed = None
    for window in windows(grid, kernel):
        seen = mask[(slice(None), *window)]
        allowed = seen if allowed is None else allowed & seen
    return (mask if allowed is None else allowed).contiguous()


def patch_pixels(index: Tensor, sizes: list[int], kernel: list[int]) -> list[Tensor]:
    """Coordinates along each axis of the prod(kernel) pixels in each window of `index`; adds a last axis for them."""
    inside = torch.arange(math.prod(kernel), device=index.device)
    rest, coordinates = index.clamp(min=0)[..., None], []
    for size, width in zip(reversed(sizes), reversed(kernel), strict=True):
        cells = size - width + 1
        coordinates.append(rest % cells + inside % width)
        rest, inside = rest // cells, inside // width
    return coordinates[::-1]


def _invert(value: Tensor) -> Tensor:
    """1 / value, and 0 with zero derivatives at 0: the subgradient where a norm or distance is 0. NaN stays NaN."""
    there = value != 0
    return torch.where(there, 1 / torch.where(there, value, 1), 0)


def _norm(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Length over `dim` (kept), with zero derivatives at 0."""
    square = value.square().sum(dim, keepdim=True)
    there = square != 0
    return torch.where(there, torch.where(there, square, 1).sqrt(), 0)


# --- activations -----------------------------------------------------------------------------------------------


def activate(distance: Tensor, activation: int, eps: float) -> Tensor:
    if activation == LOG:
        # log((d + 1) / (d + eps)), exact to rounding for large d as well, and 0 at +inf
        return torch.log1p((1 - eps) / (distance + eps))
    if activation == LINEAR:
        return -distance
    if activation == EXP:
        return torch.exp(-distance)
    if activation == RECIPROCAL:
        return 1 / (distance + 1)
    return distance


def _slope(distance: Tensor, activation: int, eps: float) -> Tensor | float:
    """Derivative of the activation by the distance."""
    if activation == LOG:
        return (eps - 1) / ((distance + 1) * (distance + eps))
    if activation == LINEAR:
        return -1.0
    if activation == EXP:
        return -torch.exp(-distance)
    return -(distance + 1).square().reciprocal()


# --- activation of, and distance to, the nearest patches -------------------------------------------------------


def _fake_activation(features, prototypes, mask, metric, activation, eps, topk, precision, verify):
    shape = (features.shape[0], prototypes.shape[0]) + ((topk,) if topk > 1 else ())
    distance = features.new_empty(shape, dtype=result_dtype(features))
    activated = distance.new_empty(0 if activation == NONE else shape)
    return activated, distance, features.new_empty(shape, dtype=torch.int64)


def _setup_activation(ctx, inputs, output) -> None:
    features, prototypes, _, ctx.metric, ctx.activation, ctx.eps, ctx.topk, _, _ = inputs
    ctx.save_for_backward(features, prototypes, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _backward_activation(ctx, grad_activation, grad_distance, _):
    features, prototypes, distance, index = ctx.saved_tensors
    want_x, want_p = ctx.needs_input_grad[:2]
    if ctx.activation == NONE:
        grad_activation = None
    if grad_activation is None and grad_distance is None:
        return (None,) * 9
    # Under create_graph the formulas, which torch can differentiate again; else one kernel.
    run = (
        winner_gradients
        if torch.is_grad_enabled()
        else same_backend("prototype_backward", ctx.backend, features.device.type)
    )
    to_x, to_p = run(
        grad_activation,
        grad_distance,
        features,
        prototypes,
        distance,
        index,
        ctx.metric,
        ctx.activation,
        ctx.eps,
        ctx.topk,
        want_x,
        want_p,
    )
    return to_x if want_x else None, to_p if want_p else None, *((None,) * 7)


define(
    "prototype_activation",
    "(Tensor features, Tensor prototypes, Tensor? mask, int metric, int activation, float eps, int topk, "
    "int precision, bool verify) -> (Tensor, Tensor, Tensor)",
    _fake_activation,
    setup_context=_setup_activation,
    backward=_backward_activation,
)


def winner_gradients(
    grad_activation: Tensor | None,
    grad_distance: Tensor | None,
    features: Tensor,
    prototypes: Tensor,
    distance: Tensor,
    index: Tensor,
    metric: int,
    activation: int,
    eps: float,
    topk: int,
    to_features: bool,
    to_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients, or an empty tensor for one that is not wanted. Touches the winners alone, O(B·P·m·D), and is
    itself differentiable. In float64, rounded once."""
    batch, channels, *sizes = features.shape
    count, work = prototypes.shape[0], torch.float64
    kernel = kernel_size(features, prototypes)
    axes = (batch, count, topk, 1, 1)
    distance, index = distance.to(work).reshape(axes), index.reshape(axes)
    chosen = index >= 0
    # What is not chosen becomes a finite 0 at once, so that no NaN of it reaches a second derivative.
    distance = torch.where(chosen, distance, 0)
    grad: Any = 0
    if grad_distance is not None:
        grad = torch.where(chosen, grad_distance.reshape(axes), 0)
    if grad_activation is not None:
        grad = grad + torch.where(chosen, grad_activation.reshape(axes), 0) * _slope(distance, activation, eps)
    coordinates = patch_pixels(index[..., 0, 0], sizes, kernel)
    sample = torch.arange(batch, device=index.device).reshape(batch, 1, 1, 1)
    # Indexing the axes one by one copies no more than the winners, whatever the strides of the features.
    place: Any = (sample, slice(None), *coordinates)
    x = features[place].to(work)  # (B, P, m, K, D)
    x = torch.where(chosen, x, 0)
    p = prototypes.to(work).reshape(count, 1, channels, math.prod(kernel)).transpose(2, 3)  # (P, 1, K, D)
    to_x: Any
    to_p: Any
    if metric == DOT:
        to_x, to_p = -grad * p, -grad * x
    elif metric == COSINE:
        inverse_x, inverse_p = _invert(_norm(x, (3, 4))), _invert(_norm(p, (2, 3)))
        unit_x, unit_p, cos = x * inverse_x, p * inverse_p, 1 - distance
        to_x = grad * inverse_x * (cos * unit_x - unit_p) if to_features else None
        to_p = grad * inverse_p * (cos * unit_p - unit_x) if to_prototypes else None
    else:
        to_x = grad * (2 if metric == SQEUCLIDEAN else _invert(distance)) * (x - p)
        to_p = -to_x
    grad_features, grad_prototypes = features.new_empty(0), prototypes.new_empty(0)
    if to_features:
        rows = torch.where(chosen, to_x, 0).flatten(1, 3)
        pixel = torch.zeros_like(coordinates[0])
        for size, coordinate in zip(sizes, coordinates, strict=True):
            pixel = pixel * size + coordinate
        total = torch.ops.protofast.prototype_scatter.reference(rows, pixel.flatten(1), math.prod(sizes))
        grad_features = total.reshape(features.shape).to(features.dtype)
    if to_prototypes:
        total = torch.where(chosen, to_p, 0).sum((0, 2)).transpose(1, 2)  # (P, D, K)
        grad_prototypes = total.reshape(prototypes.shape).to(prototypes.dtype)
    return grad_features, grad_prototypes


def as_features(gradient: Tensor, features: Tensor) -> Tensor:
    """In the memory order of the features, as far as torch.empty_like keeps it."""
    like = torch.empty_like(features)
    return gradient if gradient.stride() == like.stride() else like.copy_(gradient)


def _fake_backward(
    grad_activation,
    grad_distance,
    features,
    prototypes,
    distance,
    index,
    metric,
    activation,
    eps,
    topk,
    to_features,
    to_prototypes,
):
    return (
        torch.empty_like(features) if to_features else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if to_prototypes else 0),
    )


define(
    "prototype_backward",
    "(Tensor? grad_activation, Tensor? grad_distance, Tensor features, Tensor prototypes, Tensor distance, "
    "Tensor index, int metric, int activation, float eps, int topk, bool to_features, bool to_prototypes) "
    "-> (Tensor, Tensor)",
    _fake_backward,
)


# --- sums of rows at pixels: its own op, because torch and its compiler use atomics, whose order is left to chance ---


def _fake_scatter(rows, pixel, pixels):
    return rows.new_empty(rows.shape[0], rows.shape[2], pixels)


def _setup_scatter(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_scatter(ctx, grad):
    (pixel,) = ctx.saved_tensors
    where = pixel[:, None].expand(-1, grad.shape[1], -1)
    return grad.gather(2, where).transpose(1, 2), None, None


define(
    "prototype_scatter",
    "(Tensor rows, Tensor pixel, SymInt pixels) -> Tensor",
    _fake_scatter,
    setup_context=_setup_scatter,
    backward=_backward_scatter,
)


# --- the whole map of distances --------------------------------------------------------------------------------


def _fake_map(features, prototypes, metric):
    shape = (features.shape[0], prototypes.shape[0], *patch_grid(features, prototypes))
    return features.new_empty(shape, dtype=result_dtype(features))


def _setup_map(ctx, inputs, output) -> None:
    features, prototypes, ctx.metric = inputs
    distance = output if ctx.metric in (EUCLIDEAN, COSINE) else None
    ctx.save_for_backward(features, prototypes, distance)


_MAP_ELEMENTS = 1 << 22  # float64 numbers of a map in one step of its backward


def _backward_map(ctx, grad):
    """Some samples after the other, so that memory beyond the gradients is bounded; itself differentiable."""
    features, prototypes, distance = ctx.saved_tensors
    batch = features.shape[0]
    if isinstance(batch, torch.SymInt) or batch == 0:  # a compiler plans the memory itself
        step = batch = 1 << 30
    else:
        step = max(1, _MAP_ELEMENTS // max(1, grad[0].numel() + features[0].numel()))
    to_x, to_p = [], None
    for first in range(0, batch, step):
        rows = slice(first, first + step)
        part_x, part_p = _map_gradients(
            features[rows],
            prototypes,
            None if distance is None else distance[rows],
            grad[rows],
            ctx.metric,
            *ctx.needs_input_grad[:2],
        )
        to_x.append(part_x)
        if part_p is not None:
            to_p = part_p if to_p is None else to_p + part_p
    grad_features = None
    if ctx.needs_input_grad[0]:
        grad_features = to_x[0] if len(to_x) == 1 else torch.cat(to_x)
    return grad_features, None if to_p is None else to_p.to(prototypes.dtype), None


def _map_gradients(features, prototypes, distance, grad, metric, want_x, want_p):
    """Two matrix products per pixel of the window, O(B·N·(P + D)) memory.

    Every metric has d(distance)/dx = cross·p + on_x·x and d(distance)/dp = cross·x + on_p·p. The terms cancel where
    x is near p, hence float64 (which autocast and TF32 leave alone).
    """
    batch, channels = features.shape[:2]
    count = prototypes.shape[0]
    kernel, grid = kernel_size(features, prototypes), patch_grid(features, prototypes)
    patches = math.prod(grid)
    x = features.to(torch.float64)
    p = prototypes.to(torch.float64).reshape(count, channels, math.prod(kernel))
    g = grad.to(torch.float64).reshape(batch, count, patches)
    if distance is not None:
        distance = distance.to(torch.float64).reshape(batch, count, patches)
    regions = [(slice(None), slice(None), *window) for window in windows(grid, kernel)]
    if metric == DOT:
        cross, on_x, on_p = -g, None, None
    elif metric == COSINE:
        length = sum(x[region].square().sum(1).reshape(batch, 1, patches) for region in regions)
        there = length != 0
        inverse_x = torch.where(there, torch.where(there, length, 1).rsqrt(), 0)
        inverse_p = _invert(_norm(p, (1, 2)))[..., 0]  # (P, 1)
        cross = -g * inverse_x * inverse_p
        along = g * (1 - distance)
        on_x = along.sum(1, keepdim=True) * inverse_x.square()
        on_p = along.sum((0, 2))[:, None] * inverse_p.square()
    else:
        scale = 2 * g if metric == SQEUCLIDEAN else g * _invert(distance)
        cross, on_x, on_p = -scale, scale.sum(1, keepdim=True), scale.sum((0, 2))[:, None]
    grad_features: Any = torch.zeros_like(x, memory_format=torch.contiguous_format) if want_x else None
    to_p = []
    for k, region in enumerate(regions):
        at, proto = x[region].reshape(batch, channels, patches), p[:, :, k]
        if want_x:
            part = proto.t() @ cross
            part = part if on_x is None else part + on_x * at
            grad_features[region] += part.reshape(batch, channels, *grid)
        if want_p:
            part = (cross @ at.transpose(1, 2)).sum(0)
            to_p.append(part if on_p is None else part + on_p * proto)
    if want_x:
        grad_features = grad_features.to(features.dtype)
    return grad_features, torch.stack(to_p, 2).reshape(prototypes.shape) if want_p else None


define(
    "prototype_map",
    "(Tensor features, Tensor prototypes, int metric) -> Tensor",
    _fake_map,
    setup_context=_setup_map,
    backward=_backward_map,
)
