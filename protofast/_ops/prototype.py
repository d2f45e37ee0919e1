"""Prototype distance (Chen et al. 2019, eq. 1): schemas, fake kernels and gradients.

`metric` is an index into METRICS. A patch index is flat, row-major over the grid of valid windows; -1 marks "no
patch" (all masked) and carries no gradient.
"""

import math

import torch
from torch import Tensor

from . import define

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
SQEUCLIDEAN, EUCLIDEAN, COSINE, DOT = range(4)
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32", "bf16")


def patch_grid(features: Tensor, prototypes: Tensor) -> list[int]:
    """Sizes of the grid of valid, stride-1 windows."""
    kernel = prototypes.shape[2:] or [1] * (features.ndim - 2)
    return [s - k + 1 for s, k in zip(features.shape[2:], kernel, strict=True)]


def result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def patch_pixels(index: Tensor, sizes: list[int], kernel: list[int]) -> Tensor:
    """Flat pixel numbers (..., prod(kernel)) that the windows at `index` cover."""
    grid = [s - k + 1 for s, k in zip(sizes, kernel, strict=True)]
    pixel = torch.zeros_like(index)[..., None]
    rest, stride = index.clamp(min=0), 1
    for size, width, cells in zip(reversed(sizes), reversed(kernel), reversed(grid), strict=True):
        axis = (rest % cells)[..., None] + torch.arange(width, device=index.device)
        pixel = (axis[..., :, None] * stride + pixel[..., None, :]).flatten(-2)
        rest, stride = rest // cells, stride * size
    return pixel


def patch_distance_grad(x: Tensor, p: Tensor, metric: int, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """d(distance)/dx and d(distance)/dp of patches `x` against prototypes `p`, both reduced over `dim`."""
    if metric == DOT:
        return -p.expand_as(x), -x
    if metric == COSINE:
        nx, np = (v.square().sum(dim, keepdim=True).sqrt() for v in (x, p))
        ux, up = (torch.where(n > 0, v / torch.where(n > 0, n, 1), 0) for v, n in ((x, nx), (p, np)))
        cos = (ux * up).sum(dim, keepdim=True)
        gx = torch.where(nx > 0, (cos * ux - up) / torch.where(nx > 0, nx, 1), 0)
        gp = torch.where(np > 0, (cos * up - ux) / torch.where(np > 0, np, 1), 0)
        return gx, gp
    difference = x - p
    if metric == EUCLIDEAN:
        squared = difference.square().sum(dim, keepdim=True)
        # The subgradient 0 at distance 0; the inner where keeps sqrt'(0) = inf out of second derivatives.
        slope = torch.where(squared > 0, 1 / torch.where(squared > 0, squared, 1).sqrt(), 0)
        # A NaN patch keeps its NaN: NaN > 0 is False.
        slope = torch.where(squared.isnan(), math.nan, slope)
        return difference * slope, -difference * slope
    return 2 * difference, -2 * difference


def _fake_distance(features, prototypes, mask, metric, topk, precision):
    shape = (features.shape[0], prototypes.shape[0]) + ((topk,) if topk > 1 else ())
    return features.new_empty(shape, dtype=result_dtype(features)), features.new_empty(shape, dtype=torch.int64)


def _setup_distance(ctx, inputs, output) -> None:
    features, prototypes, _, ctx.metric, _, _ = inputs
    ctx.save_for_backward(features, prototypes, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_distance(ctx, grad, _):
    features, prototypes, index = ctx.saved_tensors
    batch, channels, *sizes = features.shape
    count = prototypes.shape[0]
    kernel = list(prototypes.shape[2:]) or [1] * len(sizes)
    pixels = patch_pixels(index.reshape(batch, -1), sizes, kernel)  # (B, P·m, K)
    where = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    work = result_dtype(features)
    x = features.flatten(2).gather(2, where).to(work)
    x = x.reshape(batch, channels, count, -1, pixels.shape[-1])  # (B, D, P, m, K)
    p = prototypes.to(work).reshape(count, channels, 1, -1).permute(1, 0, 2, 3)  # (D, P, 1, K)
    slope = torch.where(index >= 0, grad, 0).reshape(batch, 1, count, -1, 1)
    chosen = (index >= 0).reshape(batch, 1, count, -1, 1)
    to_x, to_p = patch_distance_grad(x, p, ctx.metric, (1, 4))
    grad_features = grad_prototypes = None
    if ctx.needs_input_grad[0]:
        flat = torch.where(chosen, to_x * slope, 0).flatten(2)
        grad_features = torch.zeros(batch, channels, math.prod(sizes), dtype=work, device=features.device)
        grad_features = grad_features.scatter_add(2, where, flat).reshape(features.shape).to(features.dtype)
    if ctx.needs_input_grad[1]:
        total = torch.where(chosen, to_p * slope, 0).sum((0, 3)).permute(1, 0, 2)  # (P, D, K)
        grad_prototypes = total.reshape(prototypes.shape).to(prototypes.dtype)
    return grad_features, grad_prototypes, None, None, None, None


define(
    "prototype_distance",
    "(Tensor features, Tensor prototypes, Tensor? mask, int metric, int topk, str precision) -> (Tensor, Tensor)",
    _fake_distance,
    setup_context=_setup_distance,
    backward=_backward_distance,
)


def _fake_map(features, prototypes, metric):
    shape = (features.shape[0], prototypes.shape[0], *patch_grid(features, prototypes))
    return features.new_empty(shape, dtype=result_dtype(features))


def _fake_map_backward(grad, features, prototypes, metric):
    return torch.empty_like(features, memory_format=torch.contiguous_format), torch.empty_like(
        prototypes, memory_format=torch.contiguous_format
    )


def _setup_map(ctx, inputs, output) -> None:
    features, prototypes, ctx.metric = inputs
    ctx.save_for_backward(features, prototypes)


def _backward_map(ctx, grad):
    features, prototypes = ctx.saved_tensors
    return *torch.ops.protofast.prototype_map_backward.reference(grad, features, prototypes, ctx.metric), None


define(
    "prototype_map",
    "(Tensor features, Tensor prototypes, int metric) -> Tensor",
    _fake_map,
    setup_context=_setup_map,
    backward=_backward_map,
)
define(
    "prototype_map_backward",
    "(Tensor grad, Tensor features, Tensor prototypes, int metric) -> (Tensor, Tensor)",
    _fake_map_backward,
)
