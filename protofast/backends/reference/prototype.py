"""Prototype distances in plain torch: the direct form in float64, in blocks, rounded once.

All sums run over a fixed tree of elementwise operations, so that equal patches get equal bits wherever they lie: ties
are then exact, whatever the device, the number of threads or the block they fall in.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protofast._ops import implement
from protofast._ops.prototype import (
    COSINE,
    DOT,
    EUCLIDEAN,
    NONE,
    activate,
    as_features,
    kernel_size,
    patch_grid,
    result_dtype,
    windows,
    winner_gradients,
)

_ELEMENTS = 1 << 18  # float64 numbers in the largest temporary: 2 MiB, which caches hold
_RUN = 512  # patches in a block
_LARGEST = torch.finfo(torch.float64).max


def _blocks(grid: list[int]) -> Iterator[tuple[int, list[slice]]]:
    """Cuts the grid into boxes of about _RUN patches, each a run of flat indices; gives its start and slices."""
    axis = 0
    while math.prod(grid[axis + 1 :]) > _RUN:
        axis += 1
    whole = [slice(0, g) for g in grid[axis + 1 :]]
    inner = math.prod(grid[axis + 1 :])
    step, first = max(1, _RUN // inner), 0
    for lead in itertools.product(*(range(g) for g in grid[:axis])):
        for start in range(0, grid[axis], step):
            stop = min(start + step, grid[axis])
            yield first, [*(slice(i, i + 1) for i in lead), slice(start, stop), *whole]
            first += (stop - start) * inner


def _tree_sum(terms: Tensor) -> Tensor:
    """Sum over axis 2, in place, by halving."""
    left = terms.shape[2]
    if left == 0:
        return terms.sum(2)
    while left > 1:
        half = (left + 1) // 2
        terms[:, :, : left - half] += terms[:, :, half:left]
        left = half
    return terms[:, :, 0]


def _sum(x: Tensor, p: Tensor | None, kernel: list[int], run: int, *, product: bool) -> Tensor:
    """Σ(x − p)², Σx·p or (without p) Σx² over the windows of a block: (b, P or 1, n)."""
    grid = [s - k + 1 for s, k in zip(x.shape[2:], kernel, strict=True)]
    batch, channels = x.shape[:2]
    total = x.new_zeros(batch, 1 if p is None else p.shape[0], math.prod(grid), dtype=torch.float64)
    for k, window in enumerate(windows(grid, kernel)):
        region = x[(slice(None), slice(None), *window)]
        for start in range(0, channels, run):
            part = region[:, start : start + run].to(torch.float64).flatten(2)[:, None]
            if p is None:
                terms = part.square()
            else:
                proto = p[:, start : start + run, k].to(torch.float64)[..., None]
                terms = part * proto if product else (part - proto).square_()
            total += _tree_sum(terms)
    return total


def _scores(
    features: Tensor, prototypes: Tensor, metric: int
) -> Iterator[tuple[slice, slice, int, list[slice], Tensor]]:
    """Distances (squared for euclidean) of every block: its samples, prototypes, first patch, slices, (b, p, n)."""
    kernel, grid = kernel_size(features, prototypes), patch_grid(features, prototypes)
    batch, channels = features.shape[:2]
    count = prototypes.shape[0]
    p = prototypes.reshape(count, channels, math.prod(kernel))
    run = min(_RUN, math.prod(grid))
    depth = max(1, min(channels, _ELEMENTS // run))
    many = max(1, min(count, _ELEMENTS // (run * depth)))
    samples = max(1, min(batch, _ELEMENTS // (run * depth * many)))
    for b, q in itertools.product(range(0, batch, samples), range(0, count, many)):
        rows, columns = slice(b, min(b + samples, batch)), slice(q, min(q + many, count))
        p_part = p[columns]
        if metric == COSINE:
            # The same tree as for the features' lengths, so that the cosine of equal vectors is exactly 1.
            length_p = _sum(p_part.unflatten(2, kernel), None, kernel, depth, product=True).reshape(1, -1, 1)
        for first, box in _blocks(grid):
            reach = tuple(slice(s.start, s.stop + k - 1) for s, k in zip(box, kernel, strict=True))
            x = features[(rows, slice(None), *reach)]
            score = _sum(x, p_part, kernel, depth, product=metric in (COSINE, DOT))
            if metric == COSINE:
                length = _sum(x, None, kernel, depth, product=True) * length_p
                score = 1 - torch.where(length == 0, 0, score / length.sqrt())
                score.clamp_(min=0)
            elif metric == DOT:
                score.neg_()
            yield rows, columns, first, box, score


def prototype_activation(
    features: Tensor,
    prototypes: Tensor,
    mask: Tensor | None,
    metric: int,
    activation: int,
    eps: float,
    topk: int,
    precision: int,
    verify: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact whatever the precision, so there is nothing to verify."""
    shape = (features.shape[0], prototypes.shape[0], topk)
    best = features.new_full(shape, math.inf, dtype=torch.float64)
    index = features.new_full(shape, -1, dtype=torch.int64)
    for rows, columns, first, box, score in _scores(features, prototypes, metric):
        # A patch that may win comes before any that may not, even at distance +inf.
        score.clamp_(max=_LARGEST)
        at = torch.arange(first, first + score.shape[2], device=index.device).expand_as(score)
        if mask is not None:
            allowed = mask[(rows, *box)].reshape(-1, 1, score.shape[2])
            # What `best` starts with is as far, and comes first: so these never get in.
            score = torch.where(allowed, score, math.inf)
        score = torch.cat([best[rows, columns], score], 2)
        at = torch.cat([index[rows, columns], at], 2)
        if topk == 1:  # the first NaN, or the first of the smallest
            order = score.argmin(2, keepdim=True)
        else:
            order = score.neg_().sort(dim=2, descending=True, stable=True).indices[..., :topk]
            score.neg_()
        best[rows, columns] = score.gather(2, order)
        index[rows, columns] = at.gather(2, order)
    best = torch.where(best >= _LARGEST, math.inf, best)
    if metric == EUCLIDEAN:
        best.sqrt_()
    if topk == 1:
        best, index = best[..., 0].contiguous(), index[..., 0].contiguous()
    best = best.to(result_dtype(features))
    return best.new_empty(0) if activation == NONE else activate(best, activation, eps), best, index


def prototype_backward(
    grad_activation: Tensor | None, grad_distance: Tensor | None, features: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    to_features, to_prototypes = winner_gradients(grad_activation, grad_distance, features, *rest)
    if to_features.shape == features.shape:
        to_features = as_features(to_features, features)
    return to_features, to_prototypes.contiguous()


def prototype_map(features: Tensor, prototypes: Tensor, metric: int) -> Tensor:
    shape = (features.shape[0], prototypes.shape[0], *patch_grid(features, prototypes))
    out = features.new_empty(shape, dtype=result_dtype(features))
    for rows, columns, _, box, score in _scores(features, prototypes, metric):
        if metric == EUCLIDEAN:
            score.sqrt_()
        target = out[(rows, columns, *box)]
        target.copy_(score.reshape(target.shape))
    return out


def prototype_scatter(rows: Tensor, pixel: Tensor, pixels: int) -> Tensor:
    """Sums in the order of the rows, on every device."""
    batch, _, channels = rows.shape
    out = rows.new_zeros(batch, channels, pixels)
    if out.device.type == "cpu":
        return out.scatter_add_(2, pixel[:, None].expand(-1, channels, -1), rows.transpose(1, 2))
    # Accumulating index_put_ sorts on CUDA, where scatter_add_ uses atomics.
    sample = torch.arange(batch, device=rows.device)[:, None]
    out.transpose(1, 2).index_put_((sample, pixel), rows, accumulate=True)
    return out


implement("prototype_activation", "reference", ["default"], prototype_activation)
implement("prototype_backward", "reference", ["default"], prototype_backward)
implement("prototype_map", "reference", ["default"], prototype_map)
implement("prototype_scatter", "reference", ["default"], prototype_scatter)
