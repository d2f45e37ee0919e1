"""What single dimensions of a code say about attributes: AUROC, TAD, captured attributes (Yeats et al. 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._optional import need


class Disentanglement(NamedTuple):
    """Of each fold; K attributes, M dimensions.

    Attributes
    ----------
    tad : float64 Tensor of shape (folds,)
        Total AUROC difference: the sum of (best − second best AUROC) over captured attributes.
    captured : bool Tensor of shape (folds, K)
        Attributes with a best AUROC of `threshold` or more, and a share of their entropy in another attribute of
        `overlap` or less.
    auroc : float64 Tensor of shape (folds, K, M)
        Of each dimension for each attribute, the better of both signs, in [0.5, 1]; NaN for a constant attribute.
    overlap : float64 Tensor of shape (folds, K)
        Largest share of an attribute's entropy that another attribute tells, in [0, 1]; NaN for a constant one.
    """

    tad: Tensor
    captured: Tensor
    auroc: Tensor
    overlap: Tensor


def disentanglement(
    codes: Tensor, labels: Tensor, *, threshold: float = 0.75, overlap: float = 0.2, folds: int = 5, seed: int = 0
) -> Disentanglement:
    """TAD and captured attributes of codes (the paper's table of disentanglement; Yeats et al. 2022).

    On the training part of each fold: A[k, j] = max(AUROC of code j for attribute k, AUROC of −j). An attribute counts
    as captured if its best A is at least `threshold` and no other attribute l holds more than `overlap` of it,
    max over l of MI(k, l) / H(k), natural logarithms. TAD = Σ over captured k of (best A[k] − second best A[k]). Codes
    are not standardised, as that changes no order.

    Parameters
    ----------
    codes : Tensor of shape (n, M)
        Finite, M ≥ 2.
    labels : Tensor of shape (n,) or (n, K)
        Classes, each of which becomes an attribute; or binary attributes (bool, or 0 and 1).
    threshold, overlap : float
    folds : int, default 5
        At least 2. Shuffled by `seed`.
    seed : int, default 0

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import disentanglement
    >>> attributes = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) > 0.5
    >>> found = disentanglement(attributes.float(), attributes)
    >>> found.captured.sum(1).tolist()
    [2, 2, 2, 2, 2]
    """
    values, attributes = checked(codes, labels, folds)
    if values.shape[1] < 2:
        raise ValueError(f"codes has shape {tuple(codes.shape)}; the second best dimension needs two of them")
    split = need("sklearn.model_selection", "patronus").KFold(folds, shuffle=True, random_state=seed)
    rows = []
    for part, _ in split.split(values):
        aurocs = folded(auroc(values[part], attributes[part]))
        shares = _overlap(attributes[part])
        second, best = np.sort(aurocs, 1)[:, -2:].T
        captured = (best >= threshold) & (shares <= overlap)  # False where NaN
        rows.append((np.float64((best - second)[captured].sum()), captured, aurocs, shares))
    return Disentanglement(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def auroc(scores: Any, attributes: Any) -> np.ndarray:
    """AUROC of every score for every attribute at once: (n, M) and bool (n, K) → float64 (K, M), ties counted half.

    By ranks (Mann and Whitney 1947); NaN for a constant attribute.

    Examples
    --------
    >>> from protofast.patronus.evaluation import auroc
    >>> auroc([[0.1], [0.4], [0.4], [0.9]], [[False], [False], [True], [True]]).tolist()
    [[0.875]]
    """
    scores, attributes = np.asarray(scores), np.asarray(attributes, bool)
    ranks = need("scipy.stats", "patronus").rankdata(scores, axis=0)
    above = attributes.sum(0).astype(np.float64)[:, None]
    below = len(attributes) - above
    with np.errstate(invalid="ignore"):
        return (attributes.T.astype(np.float64) @ ranks - above * (above + 1) / 2) / (above * below)


def folded(values: np.ndarray) -> np.ndarray:
    """The AUROC of a score or of its negative, whichever is larger."""
    return np.maximum(values, 1 - values)


def attributes_of(labels: Any, name: str = "labels") -> np.ndarray:
    """Binary attributes (n, K) as bool; of classes (n,), one attribute a class that occurs, in ascending order.

    Raises
    ------
    ValueError, TypeError
    """
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.dtype.kind not in "bui":
        raise TypeError(f"{name} is {values.dtype}; give integer classes (n,), or attributes (n, K) of 0 and 1")
    if values.ndim == 1:
        return values[:, None] == np.unique(values)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} has shape {values.shape}; give classes (n,), or attributes (n, K)")
    if values.size and not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{name} runs from {values.min()} to {values.max()}; attributes are 0 or 1")
    return values.astype(bool)


def checked(codes: Tensor, labels: Any, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, M) as float64, and attributes (n, K)."""
    if not isinstance(codes, Tensor) or not codes.is_floating_point():
        found = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes is {found}; give a floating-point torch tensor")
    if codes.ndim < 2 or not codes.numel():
        raise ValueError(f"codes has shape {tuple(codes.shape)}; give (n, M)")
    if not bool(codes.isfinite().all()):
        raise ValueError("codes has values that are not finite")
    attributes = attributes_of(labels)
    if len(attributes) != len(codes):
        raise ValueError(f"labels has {len(attributes)} rows, codes {len(codes)}; give one an image")
    if not 2 <= folds <= len(codes):
        raise ValueError(f"folds is {folds}; give 2 or more, and no more than the {len(codes)} rows")
    return codes.detach().cpu().flatten(1).double().numpy(), attributes


def _overlap(attributes: np.ndarray) -> np.ndarray:
    """For each attribute k the largest MI(k, l) / H(k) over the others l; 0 where there is no other."""
    information = mutual_information(attributes)
    entropy = information.diagonal().copy()
    np.fill_diagonal(information, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(entropy > 0, information.max(1) / entropy, np.nan)


def mutual_information(attributes: np.ndarray) -> np.ndarray:
    """Mutual information of each two binary attributes, in nats: bool (n, K) → (K, K); entropies on the diagonal."""
    n = len(attributes)
    values = attributes.astype(np.float64)
    ones = values.sum(0)
    both = values.T @ values
    joint = [both, ones[:, None] - both, ones[None] - both, n - ones[:, None] - ones[None] + both]
    first, second = [ones, ones, n - ones, n - ones], [ones, n - ones, ones, n - ones]
    total = np.zeros_like(both)
    for count, row, column in zip(joint, first, second, strict=True):
        expected = row[:, None] * column[None]
        with np.errstate(invalid="ignore", divide="ignore"):
            total += np.where(count > 0, count / n * np.log(count * n / expected), 0)
    return np.maximum(total, 0)
