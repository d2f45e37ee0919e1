"""Losses of the prototype family, from distances and prototypes; all are differentiable and of shape ()."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .classes import class_members, same_class


def cluster_loss(distance: Tensor, labels: Tensor | None = None, prototype_classes: Tensor | None = None) -> Tensor:
    """Mean over samples of the distance to the nearest prototype of their class.

    Chen et al. 2019, "This Looks Like That", sec. 2.2: Clst = 1/n Σᵢ min over prototypes of class yᵢ.

    Parameters
    ----------
    distance : Tensor of shape (B, P), or (B, P, m) nearest first
        From the layer with ``return_all=True``.
    labels : integer Tensor of shape (B,), optional
        −1 for none. Without, the nearest of all prototypes counts.
    prototype_classes : integer Tensor of shape (P,), or bool of shape (P, C)
        The class of each prototype, −1 for none. Goes with `labels`.

    Returns
    -------
    Tensor
        A sample without a prototype of its class takes no part.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> distance = torch.tensor([[1.0, 2.0, 9.0], [5.0, 3.0, 4.0]])
    >>> pf.nn.cluster_loss(distance, torch.tensor([1, 0]), torch.tensor([0, 1, 0]))
    tensor(3.)
    """
    distance = _nearest(distance)
    if labels is None and prototype_classes is None:
        return distance.amin(1).mean()
    return _mean_least(distance, _same(distance, labels, prototype_classes))


def separation_loss(distance: Tensor, labels: Tensor, prototype_classes: Tensor, *, average: bool = False) -> Tensor:
    """Minus the mean over samples of the distance to the nearest prototype of another class.

    Chen et al. 2019, "This Looks Like That", sec. 2.2: Sep = −1/n Σᵢ min over prototypes not of class yᵢ. The sign is
    the paper's, so its weight in the loss is positive (0.08, where ProtoPNet's code has −0.08 and the opposite sign).

    Parameters
    ----------
    distance, labels, prototype_classes
        As for `cluster_loss`. A prototype of class −1 is of another class than every sample, and all are
        of another than a sample labelled −1.
    average : bool, default False
        The mean over the prototypes of other classes in place of the nearest, as ProtoPNet's code reports.

    Returns
    -------
    Tensor
        At most 0 for distances ≥ 0. A sample whose class has all prototypes takes no part.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> distance = torch.tensor([[1.0, 2.0, 9.0], [5.0, 3.0, 4.0]])
    >>> pf.nn.separation_loss(distance, torch.tensor([1, 0]), torch.tensor([0, 1, 0]))
    tensor(-2.)
    """
    distance = _nearest(distance)
    other = ~_same(distance, labels, prototype_classes)
    if not average:
        return -_mean_least(distance, other)
    count = other.sum(1)
    mean = torch.where(other, distance, 0).sum(1) / count.clamp(min=1)
    return -mean.sum() / (count > 0).sum().clamp(min=1)


def distinct_loss(prototypes: Tensor, *, margin: float = 0.2, metric: str = "cosine") -> Tensor:
    """Keeps each prototype at least a margin from the one most like it.

    Patronus (arXiv 2503.22782), prototype distinct loss: mean over i of max(0, margin − min over j ≠ i of Dᵢⱼ), with
    Dᵢⱼ = 1 − |cos(pᵢ, pⱼ)|. The paper tries margins 0.5 and 1 (orthogonal); its code has 0.2.

    Parameters
    ----------
    prototypes : Tensor of shape (P, D) or (P, D, *K)
        A layer's ``prototype_vectors``. Needs memory for P² numbers.
    margin : float, default 0.2
    metric : {"cosine", "euclidean"}
        With ``euclidean``, Dᵢⱼ = |pᵢ − pⱼ|.

    Returns
    -------
    Tensor
        0 for a single prototype. A zero vector is orthogonal to all.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> pf.nn.distinct_loss(torch.eye(3), margin=0.5)
    tensor(0.)
    >>> pf.nn.distinct_loss(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    tensor(0.2000)
    """
    rows = _rows(prototypes)
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real):
        raise TypeError(f"margin is {margin!r}; give a number above 0, such as 0.2")
    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; give a number above 0, such as 0.2")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric is {metric!r}; choose 'cosine' or 'euclidean'")
    with torch.autocast(rows.device.type, enabled=False):
        if metric == "cosine":
            unit = _unit(rows)
            apart = 1 - (unit @ unit.t()).abs()
        else:
            # by differences: products would cancel where prototypes are near each other
            apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
        nearest = torch.where(itself, math.inf, apart).amin(1)
        return (margin - nearest).relu().mean()


def orthogonality_loss(prototypes: Tensor, prototype_classes: Tensor | None = None) -> Tensor:
    """How far the unit prototypes of each class are from orthonormal: Σ over classes of ‖U_c U_cᵀ − I‖².

    TesNet (Wang et al. 2021, "Interpretable Image Recognition by Constructing Transparent Embedding Space",
    orthonormality of a class's basis concepts) and Deformable ProtoPNet (Donnelly et al. 2022, orthogonality loss).

    Parameters
    ----------
    prototypes : Tensor of shape (P, D) or (P, D, *K)
        A layer's ``prototype_vectors``; each is brought to length 1 first, a zero vector stays. Needs memory for P²
        numbers.
    prototype_classes : integer Tensor of shape (P,), or bool of shape (P, C), optional
        Pairs within a class count; without, all pairs. −1: in no class.

    Returns
    -------
    Tensor

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    >>> pf.nn.orthogonality_loss(vectors, torch.tensor([0, 0, 1]))
    tensor(0.)
    >>> pf.nn.orthogonality_loss(vectors)
    tensor(2.)
    """
    rows = _rows(prototypes)
    with torch.autocast(rows.device.type, enabled=False):
        unit = _unit(rows)
        gram = unit @ unit.t() - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
        if prototype_classes is None:
            return gram.square().sum()
        members = class_members(prototype_classes, rows.shape[0]).to(rows.device)
        if members.ndim == 2:
            shared = members.to(rows.dtype) @ members.to(rows.dtype).t()  # in how many classes both are
        else:
            shared = ((members[:, None] == members) & (members >= 0)).to(rows.dtype)
        return (gram.square() * shared).sum()


def _nearest(distance: Tensor) -> Tensor:
    if not isinstance(distance, Tensor) or not distance.is_floating_point():
        kind = distance.dtype if isinstance(distance, Tensor) else type(distance).__name__
        raise TypeError(f"distance is a {kind}; give the layer's distances, a floating-point tensor")
    if distance.ndim in (2, 3) and len(distance) == 0:
        raise ValueError(f"distance has shape {tuple(distance.shape)}, an empty batch; give at least one sample")
    if distance.ndim not in (2, 3) or 0 in distance.shape:
        raise ValueError(f"distance has shape {tuple(distance.shape)}; give (B, P) or (B, P, m)")
    return distance if distance.ndim == 2 else distance[..., 0]


def _same(distance: Tensor, labels: Tensor | None, prototype_classes: Tensor | None) -> Tensor:
    if labels is None or prototype_classes is None:
        missing = "labels" if labels is None else "prototype_classes"
        raise ValueError(f"{missing} is None; labels and prototype_classes go together")
    same = same_class(labels, prototype_classes, distance.shape[1])
    if same.shape != distance.shape:
        raise ValueError(f"labels has {same.shape[0]} entries; distance {tuple(distance.shape)} needs one a sample")
    return same.to(distance.device)


def _mean_least(distance: Tensor, allowed: Tensor) -> Tensor:
    """Mean over the samples that have an allowed prototype of the least allowed distance."""
    some = allowed.any(1)
    least = torch.where(allowed, distance, math.inf).amin(1)
    return torch.where(some, least, 0).sum() / some.sum().clamp(min=1)


def _rows(prototypes: Tensor) -> Tensor:
    """(P, D·prod(K)) in float32, or float64."""
    if not isinstance(prototypes, Tensor) or not prototypes.is_floating_point():
        kind = prototypes.dtype if isinstance(prototypes, Tensor) else type(prototypes).__name__
        raise TypeError(f"prototypes is a {kind}; give a floating-point tensor (P, D, ...)")
    if prototypes.ndim < 2 or 0 in prototypes.shape:
        raise ValueError(f"prototypes has shape {tuple(prototypes.shape)}; give (P, D) or (P, D, *K)")
    rows = prototypes.flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; one of zeros stays, with no gradient."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1)  # so that no square under- or overflows
    square = rows.square().sum(1, keepdim=True)
    there = square > 0
    return torch.where(there, rows / torch.where(there, square, 1).sqrt(), 0)
