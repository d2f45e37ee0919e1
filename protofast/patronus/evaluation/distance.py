"""Fréchet distances between sets of images, under the name of their features."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._optional import need
from .classifier import Classifier


class Features(NamedTuple):
    """What turns images (n, C, H, W) in [−1, 1] into features (n, d), and the name that a distance over it has."""

    of: Callable[[Tensor], Tensor]
    distance: str


def classifier_features(classifier: Classifier) -> Features:
    """Features of a trained classifier; a distance over them is never called FID."""
    return Features(classifier.features, f"Fréchet distance (features of {classifier.name})")


def inception_features(
    weights: str | os.PathLike[str], *, batch_size: int = 100, device: torch.device | str | None = None
) -> Features:
    """The 2,048 features that FID is defined by, of torch-fidelity's InceptionV3. Nothing is downloaded.

    Parameters
    ----------
    weights : path
        torch-fidelity's ``pt_inception-2015-12-05-6726825d.pth``.
    batch_size : int
    device : device, optional

    Raises
    ------
    FileNotFoundError
    ImportError
        When torch-fidelity is not installed.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"{weights}: no such file; give torch-fidelity's pt_inception-2015-12-05-6726825d.pth, or none for "
            "the Fréchet distance over a classifier's features"
        )
    try:
        import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is for another torch
        cure = "pip install torch-fidelity, and torchvision in the version made for this torch"
        raise ImportError(f"FID needs torch_fidelity, which could not be imported ({error}): {cure}") from error
    metric = need("torchmetrics.image.fid", "patronus").FrechetInceptionDistance
    network = metric(feature=2048, feature_extractor_weights_path=os.fspath(weights)).inception.to(device).eval()

    @torch.no_grad()
    def of(images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images has shape {tuple(images.shape)}; Inception takes 1 or 3 channels")
        parts = [network(_bytes(part).expand(-1, 3, -1, -1).to(device)).cpu() for part in images.split(batch_size)]
        return torch.cat(parts)

    return Features(of, "FID")


def quantised(images: Tensor) -> Tensor:
    """Images in [−1, 1] as a PNG of 8 bits keeps them; what is outside is clipped first.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import quantised
    >>> quantised(torch.tensor([-1.5, 0.0, 1.0])).mul(127.5).add(127.5).tolist()
    [0.0, 128.0, 255.0]
    """
    return _bytes(images).to(images.dtype).div_(127.5).sub_(1)


def _bytes(images: Tensor) -> Tensor:
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).byte()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features (n, d) and (m, d), in float64 by torchmetrics.

    It shrinks as n and m grow: only distances between sets of the same sizes can be compared.

    Raises
    ------
    ValueError
        For features of other shapes, fewer than 2 rows, or values that are not finite.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import frechet_distance
    >>> features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(features, features + 2), 6)
    12.0
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != first.shape[1]:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; give both as (n, d), n ≥ 2, with the same d")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    # The metric forms covariances from raw moments; a common offset, which no distance has, would cost it digits.
    first, second = first.double().cpu(), second.double().cpu()
    offset = first.mean(0)
    metric = need("torchmetrics.image.fid", "patronus").FrechetInceptionDistance(feature=_Given(first.shape[1]))
    metric.update(first - offset, real=True)
    metric.update(second - offset, real=False)
    return metric.compute().item()


class _Given(nn.Identity):
    """In place of a network: torchmetrics is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def draws(pool: int, size: int, *, number: int = 5, seed: int = 0) -> list[Tensor]:
    """Rows of `number` random reference sets of `size`, int64 (size,) each.

    Without a row twice; but with, where the pool is not larger than a set, as all sets would be the same.

    Examples
    --------
    >>> from protofast.patronus.evaluation import draws
    >>> [sorted(rows.tolist()) for rows in draws(3, 2, number=2)]
    [[0, 2], [1, 2]]
    """
    if pool < 1 or size < 1 or number < 1:
        raise ValueError(f"pool, size and number are {pool}, {size} and {number}; give at least 1 each")
    generator = torch.Generator().manual_seed(seed)
    if pool > size:
        return [torch.randperm(pool, generator=generator)[:size] for _ in range(number)]
    return [torch.randint(pool, (size,), generator=generator) for _ in range(number)]


def reference_distances(features: Tensor, pool: Tensor, *, number: int = 5, seed: int = 0) -> Tensor:
    """Fréchet distances of features (n, d) to `number` reference sets of n rows drawn from a pool (m, d): (number,).

    The draws depend on n, m and the seed alone, so two sets of one size meet the same references.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import reference_distances
    >>> pool = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    >>> reference_distances(pool[:40], pool).shape
    torch.Size([5])
    """
    found = [
        frechet_distance(features, pool[rows]) for rows in draws(len(pool), len(features), number=number, seed=seed)
    ]
    return torch.tensor(found, dtype=torch.float64)
