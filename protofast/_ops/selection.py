"""Selection ops: schemas and fake kernels. Selection is discrete, so none is differentiable.

`metric` is an index into METRICS. Labels are positions in the list of chosen indices. Distances are float64: they
are what the choice was decided by.
"""

import torch
from torch import Tensor

from . import define

METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed")
OBJECTIVES = ("max-min", "max-sum")


def _indices(points: Tensor, count: int) -> Tensor:
    return points.new_empty(count, dtype=torch.int64)


def _float64(points: Tensor, *shape: int) -> Tensor:
    return points.new_empty(shape, dtype=torch.float64)


def _fake_k_center(points, initial, mask, k, metric):
    n = points.shape[0]
    return _indices(points, k), _float64(points, k), _indices(points, n), _float64(points, n)


def _fake_k_dispersion(points, mask, k, objective, metric, refine):
    return _indices(points, k)


def _fake_k_medoids(points, initial, mask, metric, max_iter):
    return _indices(points, initial.shape[0]), points.new_empty((), dtype=torch.int64)


def _fake_cover(points, indices, mask, metric):
    n, k = points.shape[0], indices.shape[0]
    return _float64(points, k), _indices(points, n), _float64(points, n)


def _fake_farthest_pair(points, mask, metric):
    return _indices(points, 2), _float64(points)


define(
    "k_center",
    "(Tensor points, Tensor initial, Tensor? mask, SymInt k, int metric) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_k_center,
)
define(
    "k_dispersion",
    "(Tensor points, Tensor? mask, SymInt k, int objective, int metric, bool refine) -> Tensor",
    _fake_k_dispersion,
)
define(
    "k_medoids",
    "(Tensor points, Tensor initial, Tensor? mask, int metric, int max_iter) -> (Tensor, Tensor)",
    _fake_k_medoids,
)
define(
    "cover",
    "(Tensor points, Tensor indices, Tensor? mask, int metric) -> (Tensor, Tensor, Tensor)",
    _fake_cover,
)
define("farthest_pair", "(Tensor points, Tensor? mask, int metric) -> (Tensor, Tensor)", _fake_farthest_pair)
