"""Distances of prototypes to the patches of a feature map (Chen et al. 2019, "This Looks Like That", eq. 1)."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backend import differentiates, overload
from ._ops.prototype import ACTIVATIONS, METRICS, NONE, PRECISIONS, activate, kernel_size, patch_grid, patch_mask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PrototypeDistance(NamedTuple):
    """Distances to the nearest patches, (B, P) or (B, P, topk), and the patches' flat indices (int64)."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class PrototypeActivation(NamedTuple):
    """Activations, distances and flat patch indices, each (B, P) or (B, P, topk)."""

    activation: Tensor
    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


def prototype_distance(
    features: Tensor,
    prototypes: Tensor,
    *,
    metric: str = "sqeuclidean",
    topk: int = 1,
    mask: Tensor | None = None,
    precision: str = "auto",
    verify: bool = False,
    backend: str | None = None,
) -> PrototypeDistance:
    """Distance of each prototype to its nearest patch of each sample, and which patch that is.

    The inner minimum of Chen et al. 2019, eq. 1. The B×P×N map of distances is never stored, and the distances
    returned are evaluated in the direct form Σ(x − p)², so they do not cancel where a patch is near its prototype.

    Parameters
    ----------
    features : Tensor of shape (B, D, *S)
        Feature maps over one or more spatial axes; float16, bfloat16, float32 or float64, any strides.
    prototypes : Tensor of shape (P, D) or (P, D, *K)
        With a kernel K, a patch is a window of that size (stride 1, no padding): the grid has S − K + 1 patches an
        axis. Where its dtype is not the features', both are promoted.
    metric : {"sqeuclidean", "euclidean", "cosine", "dot"}
        Σ(x − p)², its root, 1 − cos (1 where a vector is 0), or −Σx·p. Smaller is nearer in each.
    topk : int, default 1
        How many of the nearest patches to return; from 2 on the outputs have a last axis, nearest first.
    mask : bool Tensor of shape (B, *S), optional
        A patch with a False pixel in its window never wins. Where fewer than `topk` patches are left, the rest has
        index −1, distance +inf and no gradient.
    precision : {"auto", "ieee", "tf32x3", "tf32", "bf16"}
        Arithmetic of the search; it can change which of nearly equal patches wins, never how exact the winner's
        distance is. docs/prototypes.md has the bound of each. On a CPU ``auto`` measures every patch that the search
        cannot tell from the nearest, and ``tf32x3`` and ``tf32`` are ``ieee``; the reference is exact in every one.
    verify : bool, default False
        Decide in float64 among all patches that may be the nearest (or the `topk` nearest): the winners are the true
        ones, whatever the precision.
    backend : str, optional

    Returns
    -------
    PrototypeDistance
        ``distance`` is float32 (float64 for float64 input), ≥ 0 except for ``dot``, and differentiable (twice too) in
        both tensors; a distance of 0 has gradient 0. ``index`` is flat over the patch grid, row-major. Ties go to the
        lowest index; a NaN in a patch makes its distance NaN, and that wins, as in ``max_pool2d``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.zeros(1, 2, 3, 3)
    >>> features[0, :, 1, 2] = 1.0
    >>> distance, index = pf.prototype_distance(features, torch.ones(1, 2))
    >>> distance, index
    (tensor([[0.]]), tensor([[5]]))
    """
    _, distance, index = _run(features, prototypes, metric, NONE, 1.0, topk, mask, precision, verify, backend)
    return PrototypeDistance(distance, index)


def prototype_activation(
    features: Tensor,
    prototypes: Tensor,
    *,
    metric: str = "sqeuclidean",
    activation: str | None = "log",
    eps: float = 1e-4,
    topk: int = 1,
    mask: Tensor | None = None,
    precision: str = "auto",
    verify: bool = False,
    backend: str | None = None,
) -> PrototypeActivation:
    """Activation of each prototype on each sample: how near its nearest patch comes (Chen et al. 2019, eq. 1).

    Parameters
    ----------
    features, prototypes, metric, topk, mask, precision, verify, backend
        As for `prototype_distance`.
    activation : {"log", "linear", "exp", "reciprocal"} or None
        log((d + 1) / (d + eps)) as in ProtoPNet, −d, exp(−d) as in ProtoTree, 1 / (d + 1), or d itself for None.
        ``log`` and ``reciprocal`` are meant for distances ≥ 0: with ``metric="dot"`` use ``linear`` or ``exp``.
    eps : float, default 1e-4
        Of ``log``, above 0: the largest activation is log(1 / eps), its slope there −(1 / eps − 1).

    Returns
    -------
    PrototypeActivation
        ``activation`` and ``distance`` have the distance's dtype and are differentiable; ``index`` is not. A masked
        place (index −1) has the activation of distance +inf: 0, and −inf for ``linear``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.zeros(1, 2, 3, 3)
    >>> pf.prototype_activation(features, torch.zeros(1, 2)).activation
    tensor([[9.2103]])
    """
    check_activation(activation, eps)
    kind = ACTIVATIONS.index(activation)
    activated, distance, index = _run(features, prototypes, metric, kind, eps, topk, mask, precision, verify, backend)
    return PrototypeActivation(distance if activation is None else activated, distance, index)


def prototype_map(
    features: Tensor,
    prototypes: Tensor,
    *,
    metric: str = "sqeuclidean",
    activation: str | None = None,
    eps: float = 1e-4,
    backend: str | None = None,
) -> Tensor:
    """Distance or activation of each prototype at every patch.

    Parameters
    ----------
    features, prototypes, metric, backend
        As for `prototype_distance`.
    activation, eps
        As for `prototype_activation`; None gives distances.

    Returns
    -------
    Tensor of shape (B, P, *(S − K + 1))
        float32 (float64 for float64 input), differentiable (twice too) in both tensors.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> pf.prototype_map(torch.zeros(1, 2, 1, 3), torch.ones(1, 2))
    tensor([[[[2., 2., 2.]]]])
    """
    features, prototypes = _checked(features, prototypes, metric)
    check_activation(activation, eps)
    distance = overload("prototype_map", features.device.type, backend)(features, prototypes, METRICS.index(metric))
    return activate(distance, ACTIVATIONS.index(activation), eps)


def _run(
    features: Tensor,
    prototypes: Tensor,
    metric: str,
    activation: int,
    eps: float,
    topk: int,
    mask: Tensor | None,
    precision: str,
    verify: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    features, prototypes = _checked(features, prototypes, metric)
    if mask is not None:
        _check_mask(mask, features)
        mask = patch_mask(mask, patch_grid(features, prototypes), kernel_size(features, prototypes))
    patches = math.prod(patch_grid(features, prototypes))
    topk = integer("topk", topk)
    if not 1 <= topk <= patches:
        raise ValueError(f"topk is {topk}; features has {patches} patches, so give a number from 1 to {patches}")
    check_precision(precision)
    if not isinstance(verify, bool):
        raise TypeError(f"verify is {verify!r}; give True or False")
    grad = differentiates(features, prototypes)
    run = overload("prototype_activation", features.device.type, backend, grad=grad)
    return run(
        features,
        prototypes,
        mask,
        METRICS.index(metric),
        activation,
        float(eps),
        topk,
        PRECISIONS.index(precision),
        verify,
    )


def integer(name: str, value: Any) -> int:
    """The int that `value` is, numpy's too."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is {value!r}; give an integer")


def channel_hint(shape: tuple[int, ...], channels: tuple[int, ...]) -> str:
    """How to bring features to (B, D, *S) where D, the one of `channels`, is the size of another axis than 1."""
    axes = [axis for axis in (*range(len(shape) - 1, 1, -1), 0) if shape[axis : axis + 1] == channels]
    if not axes or shape[1:2] == channels:
        return ""
    axis = axes[0]
    order = ", ".join(str(a) for a in [0, axis, *(a for a in range(1, len(shape)) if a != axis)])
    return f". Axis {axis} has {channels[0]}: {f'features.permute({order})' if axis else 'features[None]'}?"


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; choose one of {', '.join(map(repr, METRICS))}")


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(map(repr, PRECISIONS))}")


def check_activation(activation: str | None, eps: float) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS[1:]))}, or None"
        )
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps is {eps!r}; give a number above 0, such as 1e-4")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; give a number above 0, such as 1e-4")


def _check_mask(mask: Tensor, features: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; give a bool tensor (B, *S)")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; give torch.bool, True where a patch may win")
    wanted = (features.shape[0], *features.shape[2:])
    if mask.shape != wanted:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; features need one flag a pixel, {wanted}")
    if mask.device != features.device:
        raise ValueError(f"mask is on {mask.device}; move it to the features' {features.device}")


def _checked(features: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Both tensors in one dtype, once they are known to fit."""
    for name, tensor in (("features", features), ("prototypes", prototypes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; give float16, bfloat16, float32 or float64")
    check_metric(metric)
    shape, proto_shape = tuple(features.shape), tuple(prototypes.shape)
    if features.ndim < 3:
        raise ValueError(f"features has shape {shape}; give (B, D, *S) with at least one spatial axis")
    if prototypes.ndim not in (2, features.ndim):
        raise ValueError(
            f"prototypes has shape {proto_shape}; give (P, D), or (P, D, *K) with the {features.ndim - 2} spatial "
            f"axes of features {shape}{channel_hint(shape, proto_shape[1:2])}"
        )
    if proto_shape[1] != shape[1]:
        raise ValueError(
            f"prototypes has {proto_shape[1]} channels (shape {proto_shape}); features has {shape[1]} (shape {shape})"
            + channel_hint(shape, proto_shape[1:2])
        )
    if features.device != prototypes.device:
        raise ValueError(f"prototypes is on {prototypes.device}; move it to the features' {features.device}")
    if 0 in proto_shape[2:]:
        raise ValueError(f"prototypes has shape {proto_shape}; its kernel must cover at least one pixel")
    if any(cells < 1 for cells in patch_grid(features, prototypes)):
        raise ValueError(f"features has shape {shape}, where no patch of prototypes {proto_shape} fits")
    if features.dtype != prototypes.dtype:
        dtype = torch.promote_types(features.dtype, prototypes.dtype)
        features, prototypes = features.to(dtype), prototypes.to(dtype)
    return features, prototypes
