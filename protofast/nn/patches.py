"""Windows of feature maps by their flat patch index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops.prototype import patch_pixels


def take(features: Tensor, sample: Tensor, index: Tensor, kernel: Sequence[int]) -> Tensor:
    """The windows (n, D, *K) at patches `index` (n,) of samples `sample` (n,)."""
    pixels = patch_pixels(index, list(features.shape[2:]), list(kernel))  # (n, prod(K)) an axis
    place: Any = (sample[:, None], slice(None), *pixels)
    found = features[place]  # (n, prod(K), D)
    return found.transpose(1, 2).reshape(len(index), features.shape[1], *kernel)


def grid_of(features: Tensor, kernel: Sequence[int]) -> list[int]:
    return [size - width + 1 for size, width in zip(features.shape[2:], kernel, strict=True)]


def positions(index: Tensor, grid: Sequence[int]) -> Tensor:
    """Row-major coordinates (..., axes) of flat indices on a grid."""
    rest, found = index, []
    for cells in reversed(grid):
        found.append(rest % cells)
        rest = rest // cells
    return torch.stack(found[::-1], -1)
