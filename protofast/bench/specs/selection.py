"""Selection: k-center, k-dispersion, farthest pair, k-medoids, against the loops people run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import protofast as pf
from protofast._ops.selection import ENGINES

from ..spec import OURS, Call, Case, Prepare, Skip, Spec, copy_limit, generator, ours
from ..timing import once
from .farthest_first import LOOPS, PACKAGES, as_numpy
from .point_sets import SETS


def case(n: int, d: int, k: int = 0, quick: bool = True, data: str = "gaussian") -> Case:
    label = f"n={n} d={d}{f' k={k}' if k else ''}{f' {data}' if data != 'gaussian' else ''}"
    return Case(label, {"data": data, "d": d, "n": n, "k": k}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    n, d, k = (case.params[key] for key in "ndk")
    points = SETS[case.params["data"]](n, d, seed)
    start = torch.randperm(n, generator=generator(seed))[:k]
    return SimpleNamespace(points=points.to(device), k=k, start=start.to(device), device=device)


PATIENCE = 20.0
"""Seconds of a call beyond which a baseline is left out, as in `protofast.bench.runner`."""


# k-center


def greedy(points: Tensor, k: int, first: list[int]) -> tuple[list[int], Tensor]:
    """Farthest-first in the points' own dtype by the direct form: chosen indices, and distances to them."""
    chosen: list[int] = []
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while len(chosen) < max(k, len(first)):
        chosen.append(first[len(chosen)] if len(chosen) < len(first) else int(nearest.argmax()))
        last = points[chosen[-1]][None]
        nearest = torch.minimum(nearest, torch.cdist(points, last, compute_mode="donot_use_mm_for_euclid_dist")[:, 0])
    return chosen, nearest


def _engines() -> dict[str, Prepare]:
    """Ours by each backend, and the compiled one by each engine."""

    def choose(inputs: Any, backend: str, engine: str, assign: bool = False) -> Call:
        """The choices alone, as every peer gives."""
        return lambda: (
            pf.k_center(inputs.points, inputs.k, start=0, engine=engine, assign=assign, backend=backend).indices
        )

    found = ours(partial(choose, engine="auto"))
    found[f"{OURS} native with labels"] = ours(partial(choose, engine="auto", assign=True))[f"{OURS} native"]
    for engine in ENGINES[1:]:
        found[f"{OURS} native {engine}"] = ours(partial(choose, engine=engine))[f"{OURS} native"]
    return found


def covering_radius(points: Tensor, centers: Tensor) -> float:
    """Largest distance to the nearest center; which one that is comes from the points' dtype, the distance from
    float64."""
    mode = "donot_use_mm_for_euclid_dist" if points.shape[1] <= 16 else "use_mm_for_euclid_dist"
    largest = 0.0
    for rows in points.split(max(1, 2**22 // max(centers.shape))):
        nearest = torch.cdist(rows, centers, compute_mode=mode).argmin(1)
        gap = rows.double() - centers.double()[nearest]
        largest = max(largest, float(gap.square().sum(1).max()))
    return math.sqrt(largest)


def excess(output: Any, inputs: Any, chosen: list[int], radius: float, radius_from: Callable[[int], float]) -> float:
    """How far the covering radius of what was chosen is from that of the true greedy from the same start, as a share.

    float32 near-ties change late choices, and so the radius a little. `output` holds indices, or coordinates.
    `chosen` and `radius` are the true ones from point 0; ``radius_from(start)`` gives them from elsewhere.
    """
    points = inputs.points
    if isinstance(output, list):  # of coordinates
        centers = torch.tensor(output, dtype=points.dtype, device=points.device)
    elif output.tolist() == chosen:
        return 0.0
    else:
        centers = points[output.to(points.device)]
        if int(output[0]) != chosen[0]:
            radius = radius_from(int(output[0]))
    return abs(covering_radius(points, centers) / radius - 1) if len(centers) == inputs.k else math.inf


def _k_center_reference(inputs: Any) -> tuple[list[int], float]:
    chosen, nearest = greedy(inputs.points.double(), inputs.k, [0])
    return chosen, float(nearest.max())


def _k_center_error(output: Any, reference: Any, inputs: Any) -> float:
    def radius_from(start: int) -> float:
        return float(greedy(inputs.points.double(), inputs.k, [start])[1].max())

    chosen, radius = reference
    return excess(output, inputs, chosen, radius, radius_from)


def _point_bytes(inputs: Any) -> int:
    return inputs.points.numel() * inputs.points.element_size()


_READ = {"read the points once": lambda inputs: copy_limit(_point_bytes(inputs), inputs.device)}

K_CENTER = Spec(
    op="k_center",
    about="farthest-first from point 0, Euclidean; flops are those of the plain loop",
    cases=(
        case(10_000, 2, 1000),
        case(70_000, 2, 10),
        case(100_000, 2, 1000, False),
        case(100_000, 16, 100, False),
        case(10_000, 64, 1000, False),
        case(100_000, 64, 100),
        case(100_000, 64, 1000, False),
        case(100_000, 64, 100, False, "clustered"),
        case(10_000, 512, 1000, False),
        case(100_000, 512, 100, False),
        case(10_000, 784, 100, False, "pixels"),
        case(70_000, 64, 100, False, "embedding"),
    ),
    tiny=(case(300, 2, 12), case(300, 16, 12), case(500, 8, 12, data="clustered")),
    inputs=_inputs,
    contenders={**_engines(), **LOOPS, **PACKAGES},
    reference=_k_center_reference,
    error=_k_center_error,
    tolerance=lambda inputs: 0.02,
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * inputs.k,
)


# farthest pair and k-dispersion


def farthest_exact(points: Tensor) -> tuple[int, int, float]:
    """float64, direct form, over the pairs that bounds leave: by distances from the mean, then by float32 products
    with ample slack."""
    points = points.double()
    centered = points - points.mean(0)
    from_mean = centered.square().sum(1)
    best, pair = -1.0, (0, 0)
    one = int(from_mean.argmax())
    for _ in range(4):
        square = (points - points[one]).square().sum(1)
        other = int(square.argmax())
        if float(square[other]) > best:
            best, pair = float(square[other]), (one, other)
        one = other
    slack = 1e-4 * float(from_mean.max())
    far = from_mean.sqrt()
    kept = (far + far.max() >= math.sqrt(best) * (1 - 1e-12)).nonzero()[:, 0]
    some = centered[kept].float()
    norms = some.square().sum(1)
    for lo in range(0, len(kept), 1024):
        rows = slice(lo, lo + 1024)
        square = torch.addmm(norms[lo:], some[rows], some[lo:].T, alpha=-2).add_(norms[rows, None])
        i, j = (square >= best - slack).nonzero().T
        for left, right in zip(kept[lo + i].split(2**16), kept[lo + j].split(2**16), strict=True):
            exact = (points[left] - points[right]).square().sum(1)
            if len(exact) and float(exact.max()) > best:
                at = int(exact.argmax())
                best, pair = float(exact[at]), (int(left[at]), int(right[at]))
    return min(pair), max(pair), math.sqrt(best)


def _by_blocks(inputs: Any) -> Call:
    """Every pair once, by blocks of rows; says how long it would take where that is too long to wait for."""
    points = inputs.points

    def block(lo: int, rows: int) -> tuple[Tensor, Tensor]:
        return torch.cdist(points[lo : lo + rows], points[lo:]).flatten().max(0)

    def call() -> tuple[int, int, float]:
        best, at = -1.0, (0, 0)
        for lo in range(0, len(points), 1024):
            value, index = block(lo, 1024)
            if float(value) > best:
                row, column = divmod(int(index), len(points) - lo)
                best, at = float(value), (lo + row, lo + column)
        return *at, best

    seconds = min(once(lambda: block(0, 256), inputs.device)[0] for _ in range(2)) * len(points) / 256 / 2
    if seconds > PATIENCE:
        raise Skip(f"all pairs would take about {seconds:.3g} s, judged by 256 rows")
    return call


def _by_hull(inputs: Any) -> Call:
    points = as_numpy(inputs)
    if points.shape[1] > 3:
        raise Skip("convex hulls are for 2 or 3 dimensions")
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import cdist

    def call() -> tuple[int, int, float]:
        corners = ConvexHull(points).vertices
        d = cdist(points[corners], points[corners])
        i, j = np.unravel_index(d.argmax(), d.shape)
        return int(corners[i]), int(corners[j]), float(d[i, j])

    return call


def _pair_error(output: Any, reference: Any, inputs: Any) -> float:
    """Distance of the found pair, recomputed in float64, below the farthest one's."""
    i, j = int(output[0]), int(output[1])
    found = float((inputs.points[i].double() - inputs.points[j].double()).norm())
    return max(0.0, 1 - found / reference[2])


FARTHEST_PAIR = Spec(
    op="farthest_pair",
    about="the two points farthest apart, Euclidean; flops are those of all pairs",
    cases=(
        case(10_000, 2),
        case(10_000, 64),
        case(70_000, 2),
        case(20_000, 64, 0, False, "clustered"),
        case(1_000_000, 2, 0, False),
        case(1_000_000, 2, 0, False, "clustered"),
        case(100_000, 64, 0, False),
        case(100_000, 64, 0, False, "clustered"),
    ),
    tiny=(case(300, 2), case(300, 16)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: _with_backend(pf.farthest_pair, backend, i.points)),
        "torch.cdist in blocks": _by_blocks,
        "scipy hull": _by_hull,
    },
    reference=lambda inputs: farthest_exact(inputs.points),
    error=_pair_error,
    tolerance=lambda inputs: 1e-3,  # torch.cdist's product form in float32
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * len(inputs.points) // 2,
)


def _with_backend(function: Any, backend: str, *arguments: Any) -> Any:
    with pf.use_backend(backend):
        return function(*arguments)


def spread(points: Tensor, chosen: Tensor) -> float:
    """Smallest pairwise distance."""
    some = points[chosen.to(points.device)].double()
    d = (some[:, None] - some).square().sum(2).sqrt()
    return float(d[~torch.eye(len(some), dtype=torch.bool, device=d.device)].min())


def _dispersion_error(output: Any, reference: Any, inputs: Any) -> float:
    """How far the smallest pairwise distance falls short of the float64 greedy's; better counts as 0."""
    return max(0.0, 1 - spread(inputs.points, output) / reference)


def _dispersion_loop(by: Prepare) -> Prepare:
    def prepare(inputs: Any) -> Call:
        farthest = by(inputs)
        return lambda: torch.tensor(greedy(inputs.points, inputs.k, list(farthest()[:2]))[0])

    return prepare


def _dispersion_reference(inputs: Any) -> float:
    i, j, _ = farthest_exact(inputs.points)
    chosen = torch.tensor(greedy(inputs.points.double(), inputs.k, [i, j])[0])
    return spread(inputs.points, chosen)


K_DISPERSION = Spec(
    op="k_dispersion",
    about="max-min dispersion; the baselines are the greedy from a farthest pair, ours also refines it by swaps",
    cases=(case(10_000, 2, 10), case(70_000, 2, 10), case(10_000, 64, 100, False)),
    tiny=(case(200, 2, 6), case(200, 8, 6)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: pf.k_dispersion(i.points, i.k, backend=backend).indices),
        "torch loop": _dispersion_loop(_by_blocks),
        "scipy hull and torch loop": _dispersion_loop(_by_hull),
    },
    reference=_dispersion_reference,
    error=_dispersion_error,
    tolerance=lambda inputs: 1e-3,
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * inputs.k,
)


# k-medoids


def _voronoi(points: Tensor, start: Tensor, max_iter: int = 100) -> Tensor:
    """Voronoi iteration with Manhattan distance, clusters by torch.cdist."""
    medoids = start.clone()
    for _ in range(max_iter):
        labels = torch.cdist(points, points[medoids], p=1).argmin(1)
        new = medoids.clone()
        for c in range(len(medoids)):
            members = (labels == c).nonzero()[:, 0]
            sums = torch.cat([torch.cdist(points[r], points[members], p=1).sum(1) for r in members.split(1024)])
            new[c] = members[sums.argmin()]
        if torch.equal(new, medoids):
            break
        medoids = new
    return medoids


def _voronoi_python(inputs: Any) -> Call:
    """One Python loop over the points for the assignment, one over each cluster for its medoid."""
    points, start = as_numpy(inputs), inputs.start.numpy()

    def call() -> Tensor:
        medoids = start.copy()
        for _ in range(100):
            labels = np.array([np.abs(points[medoids] - x).sum(1).argmin() for x in points])
            new = medoids.copy()
            for c in range(len(medoids)):
                members = np.flatnonzero(labels == c)
                sums = [np.abs(points[members] - points[i]).sum() for i in members]
                new[c] = members[int(np.argmin(sums))]
            if (new == medoids).all():
                break
            medoids = new
        return torch.from_numpy(medoids)

    return call


def _medoid_cost(points: Tensor, medoids: Tensor) -> float:
    return float(torch.cdist(points.double(), points[medoids.to(points.device)].double(), p=1).amin(1).sum())


def _kmedoids(method: str) -> Prepare:
    """The package kmedoids from the same start, on the matrix of all distances."""

    def prepare(inputs: Any) -> Call:
        import kmedoids

        points, start = torch.from_numpy(as_numpy(inputs)), inputs.start.numpy().astype(np.uint64)
        if len(points) > 20_000:
            raise Skip("the matrix of distances of more than 20,000 points takes gigabytes")
        function = getattr(kmedoids, method)

        def call() -> Tensor:
            distances = torch.cdist(points, points, p=1).numpy()
            return torch.from_numpy(function(distances, start.copy()).medoids.astype(np.int64))

        return call

    return prepare


def _medoid_error(output: Any, reference: Any, inputs: Any) -> float:
    """Total distance to the medoids over the float64 iteration's, minus 1: below zero is better. float32 near-ties may
    lead elsewhere."""
    return _medoid_cost(inputs.points, output) / reference - 1


K_MEDOIDS = Spec(
    op="k_medoids",
    about="Voronoi iteration with Manhattan distance from given medoids, as PXGen's published code",
    cases=(
        case(2000, 16, 10),
        case(1000, 784, 10, False, "pixels"),
        case(10_000, 2, 10, False),
        case(10_000, 64, 100, False, "clustered"),
        case(10_000, 64, 10, False, "embedding"),
    ),
    tiny=(case(150, 2, 5), case(150, 16, 5)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: pf.k_medoids(i.points, i.k, start=i.start, backend=backend).indices),
        "Python loops": _voronoi_python,
        "torch.cdist": lambda i: lambda: _voronoi(i.points, i.start),
        "kmedoids alternating": _kmedoids("alternating"),
        "kmedoids FasterPAM": _kmedoids("fasterpam"),
    },
    reference=lambda i: _medoid_cost(i.points, _voronoi(i.points.double(), i.start)),
    error=_medoid_error,
    tolerance=lambda inputs: 0.05,
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * inputs.k,
)
