"""Checks of what selections are given. Those that look at values are skipped while torch.compile traces."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._ops.selection import METRICS, PRECOMPUTED

LARGEST = 1e150
"""Coordinates beyond it have squares that float64 cannot hold."""
NUMBERS = 1 << 22
"""That are looked at together, so that points larger than memory can be."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    """Strided numbers that torch can compute with, shared with the array where there was one."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(f"{name} is a sparse or nested tensor; give a dense one (.to_dense())")
        if value.is_meta:
            raise TypeError(f"{name} is a meta tensor, which holds no values; give one on a device")
        if not value.is_complex() and value.dtype not in (*FLOATS, *INTEGERS, *UNSIGNED):
            raise TypeError(f"{name} is {value.dtype}; give float16 to float64, bfloat16 or integers")
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; give the plain array, with mask= for the points that count")
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor or a numpy array")
    if value.dtype.kind not in "fiubc" or value.dtype.char in "gG":  # g and G: long double
        raise TypeError(f"{name} is an array of {value.dtype}; give numbers (.astype(float))")
    if not value.dtype.isnative:
        raise TypeError(
            f"{name} is an array of {value.dtype.str}, not in the byte order of this machine; give "
            f".astype('{value.dtype.newbyteorder('=').str}')"
        )
    if any(stride < 0 for stride in value.strides):
        value = value.copy()  # torch cannot share these
    if value.flags.writeable:
        return torch.from_numpy(value)
    with warnings.catch_warnings():  # a file mapped for reading: shared all the same, as nothing here writes into it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(value)


def metric_number(metric: str) -> int:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose one of {', '.join(map(repr, METRICS))}")
    return METRICS.index(metric)


def points_and_mask(
    points: Tensor | np.ndarray, metric: int, mask: Tensor | np.ndarray | None = None, *, values: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Without `values` those of the points are not looked at."""
    points = tensor("points", points)
    if points.ndim != 2:
        column = ", as points[:, None] is" if points.ndim == 1 else ""
        raise ValueError(f"points has shape {tuple(points.shape)}; give (n, d){column}")
    if points.shape[0] == 0:
        raise ValueError(f"points has shape {tuple(points.shape)}; there must be at least one point")
    points = real(points)
    if metric == PRECOMPUTED and points.shape[0] != points.shape[1]:
        raise ValueError(f"points has shape {tuple(points.shape)}; metric='precomputed' takes (n, n) distances")
    mask = mask_of(points, mask)
    if values and not torch.compiler.is_compiling():
        check_values(points, metric, mask)
    return points, mask


def real(points: Tensor) -> Tensor:
    """Points in floating point."""
    if points.is_complex():
        raise TypeError(f"points is {points.dtype}; give real numbers")
    return points if points.is_floating_point() else points.double()


def mask_of(points: Tensor, mask: Tensor | np.ndarray | None) -> Tensor | None:
    """A mask of points (n, d) or (B, n, d), checked."""
    if mask is None:
        return None
    mask, shape = tensor("mask", mask), tuple(points.shape[:-1])
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; give bool")
    if mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; give one value a point, {shape}")
    if mask.device != points.device:
        raise ValueError(f"mask is on {mask.device}; move it to the points' {points.device}")
    return mask


def largest(dtype: torch.dtype) -> float:
    """What a coordinate may be at most: a finite number of the dtype, so that comparing with it does not round."""
    return min(LARGEST, torch.finfo(dtype).max)


def check_values(
    points: Tensor, metric: int, mask: Tensor | None = None, *, name: str = "points", first: int = 0
) -> None:
    """Rows are counted from `first` on."""
    if mask is not None and not bool(mask.any()):
        raise ValueError("mask is False everywhere; at least one point must be allowed")
    if points.shape[1] == 0:
        return
    precomputed = metric == PRECOMPUTED
    low, high = (0.0, float("inf")) if precomputed else (-largest(points.dtype), largest(points.dtype))
    needs = "distances ≥ 0 (infinity allowed)" if precomputed else f"finite numbers of at most {LARGEST:g}"
    step = max(1, NUMBERS // points.shape[1])
    for start in range(0, points.shape[0], step):
        rows = points[start : start + step]
        least, most = rows.aminmax()
        if least >= low and most <= high:
            continue  # NaN compares False
        bad = ~((rows >= low) & (rows <= high))
        if mask is not None:
            bad &= mask[start : start + step, None]
            if precomputed:
                bad &= mask
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            value = rows[row, column].item()
            raise ValueError(f"{name} holds {value} in row {first + start + row}, column {column}; give {needs}")
    if precomputed:
        wrong = points.diagonal() != 0
        if mask is not None:
            wrong &= mask
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"points[{row}, {row}] is {points[row, row].item()}; the distance of a point to itself must be 0 "
                "(points.fill_diagonal_(0))"
            )


def integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer") from None


def at_least(name: str, value: int, least: int) -> int:
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} is {value}; give at least {least}")
    return value


def number_to_choose(k: int, points: Tensor, mask: Tensor | None) -> int:
    k = integer("k", k)
    allowed = points.shape[0]
    if mask is not None and not torch.compiler.is_compiling():
        allowed = int(mask.sum())
    if not 1 <= k <= allowed:
        raise ValueError(f"k is {k}; give 1 to {allowed}, the number of {'allowed ' if mask is not None else ''}points")
    return k


def given(initial: Any) -> bool:
    """Whether there are initial points: None and an empty list are none."""
    if initial is None:
        return False
    if isinstance(initial, (Tensor, np.ndarray)) and not initial.ndim:
        raise ValueError("initial has shape (); give a list of indices, such as initial[None]")
    try:
        return len(initial) > 0
    except TypeError:
        raise TypeError(f"initial is {initial!r}; give a list of integer indices") from None


def index_list(
    name: str, value: Tensor | np.ndarray | Sequence[int], k: int, points: Tensor, mask: Tensor | None
) -> Tensor:
    """Distinct, allowed indices as an int64 tensor (m,), 1 ≤ m ≤ k, on the points' device."""
    if not isinstance(value, (Tensor, np.ndarray)):
        try:
            value = torch.tensor([operator.index(one) for one in value], dtype=torch.int64)
        except TypeError:
            raise TypeError(f"{name} is {value!r}; give a list of integer indices") from None
    index = tensor(name, value)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} is {index.dtype}; give integer indices")
    if index.ndim != 1 or not 1 <= index.shape[0] <= k:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; give a list of 1 to k = {k} indices")
    index = index.to(points.device, torch.int64)
    if not torch.compiler.is_compiling():
        least, most = index.aminmax()
        if least < 0 or most >= points.shape[0]:
            raise IndexError(f"{name} runs from {int(least)} to {int(most)}; points has 0 to {points.shape[0] - 1}")
        if index.unique().shape != index.shape:
            raise ValueError(f"{name} holds an index twice; give each once")
        if mask is not None and not bool(mask[index].all()):
            raise ValueError(f"{name} holds index {int(index[~mask[index]][0])}, which mask leaves out")
    return index
