"""Selection ops: schemas and fake kernels. Selection is discrete, so none is differentiable.

`metric` is an index into METRICS, `objective` into OBJECTIVES. Labels are positions in the list of chosen indices.
Distances are float64: they are what the choice was decided by. Points outside `mask` are as if absent; they get
label -1 and distance infinity. `initial` holds at least one index, none twice, none outside the mask.

A *value* is what choices compare: Σ(x−y)² for euclidean and sqeuclidean, Σ(x̂−ŷ)² of the unit vectors for cosine
(whose distance is half of it; a zero vector is a direction of its own, orthogonal to all), Σ|x−y| for manhattan. It is
float64 and the same to the bit on every backend: coordinates c, c+8, c+16, … are added in that order to lane c of
eight, without fused multiply-add, and the lanes by halves: (0+4, 1+5, 2+6, 3+7), then (0+2, 1+3), then the two. The
unit vectors are the coordinates divided by the root of the sum of their squares in that order.

The medoid of a cluster is the member whose *sum* of distances to all members is least. The distances, in ascending
order of index, are added as coordinates are, but to SUM_LANES lanes. Swaps compare, for a point x and a medoid m,
change(x, m) = stood(m) − spared(x, m) − gain(x): with d(x, o) at most MOST_DISTANCE, and first(o) ≤ second(o) the
distances to o's two nearest medoids (by value), gain is such a sum of max(0, first − d) over all points o; spared and
stood are those of max(0, second − max(d, first)) and second − first over the points whose nearest medoid is m, added
one after another. A swap is made where the least change, of the first such m, is below −LEAST_GAIN · (Σ first + stood).
"""

import torch
from torch import Tensor

from . import define

METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed")
EUCLIDEAN, SQEUCLIDEAN, COSINE, MANHATTAN, PRECOMPUTED = range(5)
OBJECTIVES = ("max-min", "max-sum")
MAX_MIN, MAX_SUM = range(2)
ENGINES = ("auto", "plain", "boxes", "pool")
AUTO, PLAIN, BOXES, POOL = range(4)
SUM_LANES = 512
MOST_DISTANCE = 1e290
LEAST_GAIN = 1e-10


def _indices(points: Tensor, *shape: int) -> Tensor:
    return points.new_empty(shape, dtype=torch.int64)


def _float64(points: Tensor, *shape: int) -> Tensor:
    return points.new_empty(shape, dtype=torch.float64)


def _fake_k_center(points, initial, mask, k, metric, engine, assign=True):
    *batch, n, _ = points.shape
    n = n if assign else 0
    return (
        _indices(points, *batch, k),
        _float64(points, *batch, k),
        _indices(points, *batch, n),
        _float64(points, *batch, n),
    )


def _fake_relax(points, centers, mask, nearest, metric):
    n = points.shape[0]
    return _float64(points, n), _indices(points, n)


def _fake_max_min_swaps(points, indices, labels, distances, mask, metric, swaps):
    return _indices(points, indices.shape[0]), _float64(points)


def _fake_max_sum(points, initial, mask, k, metric, sweeps):
    return _indices(points, k), _float64(points), _float64(points)


def _fake_k_medoids(points, initial, metric, max_iter, refine=False):
    return _indices(points, initial.shape[0]), points.new_empty((), dtype=torch.bool)


def _fake_cover(points, indices, mask, metric):
    n, k = points.shape[0], indices.shape[0]
    return _float64(points, k), _indices(points, n), _float64(points, n)


def _fake_farthest_pair(points, mask, metric):
    return _indices(points, 2), _float64(points)


def _fake_nearest_to_mean(points, mask, metric):
    return _indices(points, 1)


# points (n, d), or (B, n, d) with initial (B, m) and mask (B, n). Of a cloud with fewer allowed points than k, the
# rest of the indices is -1 and of the radii 0. `engine`, an index into ENGINES, is how, and never changes the result.
# Without `assign` labels and distances are empty, (0,) or (B, 0): what they take to find is left out.
# -> indices, radii, labels, distances
define(
    "k_center",
    "(Tensor points, Tensor initial, Tensor? mask, SymInt k, int metric, int engine,"
    " bool assign=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_k_center,
)
# Takes further centers, given by their coordinates (m, d) in the points' dtype, into account. `nearest` (n,) are the
# values so far (infinity where not given).
# -> values (n,) afterwards, labels (n,): the center that brought a smaller value, the first of equals, or -1
define(
    "relax",
    "(Tensor points, Tensor centers, Tensor? mask, Tensor? nearest, int metric) -> (Tensor, Tensor)",
    _fake_relax,
)
# k-dispersion by the smallest distance is farthest_pair, k_center from it, and these swaps: at most so many, each of an
# end of the closest chosen pair (i, j) for the point farthest from the other k−1, as long as that raises the smallest
# value. i is the first of equals, j the first of those nearest to it; of the two swaps the better counts, of equals
# that of the lower position in the list. labels and distances are k_center's of `indices`: they save work.
# -> indices, smallest distance between two (infinity of a single one)
define(
    "max_min_swaps",
    "(Tensor points, Tensor indices, Tensor labels, Tensor distances, Tensor? mask, int metric, int swaps)"
    " -> (Tensor, Tensor)",
    _fake_max_min_swaps,
)
# k-dispersion by the sum of the distances: after `initial` always the point with the largest sum of distances to those
# chosen, then swaps. A point's sum is float64, the distances added in the order of choice. A swap of chosen point i for
# p gains (sum of p − d(i, p)) − sum of i; the first of the largest gains counts if it is over 1e-12 of the sum of i,
# and then every sum becomes (sum − d(i, ·)) + d(p, ·). A sweep tries each i in turn; the last is one that changes
# nothing, or number `sweeps`.
# -> indices, their total distance, a bound on the total of any k points: what detours over their middle add up to
define(
    "max_sum",
    "(Tensor points, Tensor initial, Tensor? mask, SymInt k, int metric, int sweeps) -> (Tensor, Tensor, Tensor)",
    _fake_max_sum,
)
# Voronoi iteration, then swaps where `refine`; at most max_iter iterations, and passes over the points.
# -> indices, whether the medoids have settled
define(
    "k_medoids",
    "(Tensor points, Tensor initial, int metric, int max_iter, bool refine=False) -> (Tensor, Tensor)",
    _fake_k_medoids,
)
# -> radii, labels, distances
define(
    "cover",
    "(Tensor points, Tensor indices, Tensor? mask, int metric) -> (Tensor, Tensor, Tensor)",
    _fake_cover,
)
# -> the two indices in ascending order (of a single allowed point, twice it), distance
define("farthest_pair", "(Tensor points, Tensor? mask, int metric) -> (Tensor, Tensor)", _fake_farthest_pair)
define("nearest_to_mean", "(Tensor points, Tensor? mask, int metric) -> Tensor", _fake_nearest_to_mean)
