"""Points to choose from: noise, clusters of low intrinsic dimension, real pictures, an embedding of them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import protofast as pf
from protofast._optional import need

from ..spec import generator

CLUSTERS, INTRINSIC = 200, 6


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=generator(seed))


def clustered(n: int, d: int, seed: int) -> Tensor:
    """200 clusters of intrinsic dimension at most 6, four times as far apart as they are wide."""
    random = generator(seed)
    inner = min(d, INTRINSIC)
    centers = torch.randn(CLUSTERS, d, generator=random) * 4
    axes = torch.randn(CLUSTERS, inner, d, generator=random) / inner**0.5
    member = torch.randint(CLUSTERS, (n,), generator=random)
    shift = torch.randn(n, 1, inner, generator=random)
    points = centers[member]
    for rows in torch.arange(n).split(10_000):
        points[rows] += (shift[rows] @ axes[member[rows]])[:, 0]
    return points


def pixels(n: int, d: int, seed: int) -> Tensor:
    """Fashion-MNIST, 28 × 28 = 784 values in [0, 1]: n of its 70,000 pictures, evenly spaced."""
    images = pf.data.load("fashion-mnist", split="all")
    if d != 784 or n > len(images):
        raise ValueError(f"pixels of shape ({n}, {d}) were asked for; there are ({len(images)}, 784)")
    return images.take(torch.arange(n) * len(images) // n).flatten(1)


@lru_cache(1)
def _principal_components(d: int) -> Tensor:
    reduce = need("sklearn.decomposition", "data").PCA(d, random_state=0)
    return torch.from_numpy(reduce.fit_transform(pixels(70_000, 784, 0).numpy())).float()


def embedding(n: int, d: int, seed: int) -> Tensor:
    """The first d principal components of Fashion-MNIST."""
    points = _principal_components(d)
    return points[torch.arange(n) * len(points) // n]


SETS = {"gaussian": gaussian, "clustered": clustered, "pixels": pixels, "embedding": embedding}
"""Name to function (n, d, seed) -> float32 (n, d)."""
