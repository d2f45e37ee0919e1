"""Selection: k-center, k-dispersion, farthest pair, k-medoids, against the loops people run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import protofast as pf

from ..spec import Call, Case, Skip, Spec, copy_limit, generator, ours


def _case(n: int, d: int, k: int = 0, quick: bool = True, clustered: bool = False) -> Case:
    label = f"n={n} d={d}{f' k={k}' if k else ''}{' clustered' if clustered else ''}"
    return Case(label, {"n": n, "d": d, "k": k, "clustered": clustered}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Gaussian points, or 200 clusters of intrinsic dimension at most 6."""
    n, d, k = case.params["n"], case.params["d"], case.params["k"]
    random = generator(seed)
    if case.params["clustered"]:
        inner = min(d, 6)
        centers = torch.randn(200, d, generator=random) * 4
        axes = torch.randn(200, inner, d, generator=random) / inner**0.5
        member = torch.randint(200, (n,), generator=random)
        shift = torch.randn(n, 1, inner, generator=random)
        points = centers[member]
        for rows in torch.arange(n).split(10_000):
            points[rows] += (shift[rows] @ axes[member[rows]])[:, 0]
    else:
        points = torch.randn(n, d, generator=random)
    start = torch.randperm(n, generator=random)[:k].to(device)
    return SimpleNamespace(points=points.to(device), k=k, start=start, device=device)


def _numpy(inputs: Any) -> np.ndarray:
    if inputs.device != "cpu":
        raise Skip("numpy runs on the CPU")
    return inputs.points.numpy()


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


def _torch_loop(inputs: Any) -> Call:
    points, k = inputs.points, inputs.k
    device = points.device

    def call() -> Tensor:
        chosen = torch.zeros(k, dtype=torch.int64, device=device)
        nearest = torch.full((len(points),), torch.inf, device=device)
        last = chosen[:1].clone()
        for i in range(1, k):
            nearest = torch.minimum(nearest, (points - points.index_select(0, last)).square().sum(1))
            last = nearest.argmax(0, keepdim=True)  # stays on the device: no wait a round
            chosen[i : i + 1] = last
        return chosen

    return call


def _blas_loop(inputs: Any) -> Call:
    points, k = _numpy(inputs), inputs.k

    def call() -> Tensor:
        norms = np.einsum("ij,ij->i", points, points)
        chosen, last = np.zeros(k, np.int64), 0
        nearest = np.full(len(points), np.inf, points.dtype)
        distance = np.empty_like(norms)
        for i in range(1, k):
            np.dot(points, points[last] * -2, out=distance)
            distance += norms
            distance += norms[last]
            np.minimum(nearest, distance, out=nearest)
            chosen[i] = last = int(nearest.argmax())
        return torch.from_numpy(chosen)

    return call


def _torch_cluster(inputs: Any) -> Call:
    from torch_cluster import fps

    points, share = inputs.points, (inputs.k - 0.5) / len(inputs.points)  # it takes a share and rounds up
    return lambda: fps(points, ratio=share, random_start=False)


def _fpsample(inputs: Any) -> Call:
    """Its fastest function; in few dimensions that is the bucket tree, which starts where it likes."""
    import fpsample

    points, k = _numpy(inputs), inputs.k
    if points.shape[1] <= 8:
        height = 7 if len(points) > 20_000 else 5
        return lambda: torch.from_numpy(fpsample.bucket_fps_kdline_sampling(points, k, h=height).astype(np.int64))
    return lambda: torch.from_numpy(fpsample.fps_sampling(points, k, start_idx=0).astype(np.int64))


def _skmatter(inputs: Any) -> Call:
    from skmatter.sample_selection import VoronoiFPS

    points, k = _numpy(inputs), inputs.k
    return lambda: torch.from_numpy(VoronoiFPS(n_to_select=k, initialize=0).fit(points).selected_idx_.astype(np.int64))


def _k_center_reference(inputs: Any) -> tuple[list[int], float]:
    chosen, nearest = greedy(inputs.points.double(), inputs.k, [0])
    return chosen, float(nearest.max())


def _k_center_error(output: Any, reference: Any, inputs: Any) -> float:
    """Covering radius, recomputed in float64, against the float64 greedy's from the same start; minus 1.

    float32 near-ties change late choices, and so the radius a little.
    """
    chosen = output.cpu().tolist()
    if chosen == reference[0]:
        return 0.0
    points = inputs.points.double()
    radius = reference[1] if chosen[0] == 0 else float(greedy(points, inputs.k, chosen[:1])[1].max())
    return abs(float(greedy(points, 0, chosen)[1].max()) / radius - 1)


def _point_bytes(inputs: Any) -> int:
    return inputs.points.numel() * inputs.points.element_size()


_READ = {"read the points once": lambda inputs: copy_limit(_point_bytes(inputs), inputs.device)}

K_CENTER = Spec(
    op="k_center",
    about="farthest-first from point 0, Euclidean; flops are those of the plain loop",
    cases=(
        _case(10_000, 2, 1000),
        _case(70_000, 2, 10),
        _case(100_000, 2, 1000, False),
        _case(10_000, 64, 1000, False),
        _case(100_000, 64, 100),
        _case(100_000, 64, 1000, False),
        _case(100_000, 64, 100, False, clustered=True),
        _case(10_000, 512, 1000, False),
        _case(100_000, 512, 100, False),
    ),
    tiny=(_case(300, 2, 12), _case(300, 16, 12), _case(500, 8, 12, clustered=True)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: pf.k_center(i.points, i.k, start=0, backend=backend).indices),
        "torch loop": _torch_loop,
        "numpy BLAS loop": _blas_loop,
        "torch_cluster": _torch_cluster,
        "fpsample": _fpsample,
        "skmatter Voronoi": _skmatter,
    },
    reference=_k_center_reference,
    error=_k_center_error,
    tolerance=lambda inputs: 0.02,
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * inputs.k,
)


# farthest pair and k-dispersion


def farthest_exact(points: Tensor) -> tuple[int, int, float]:
    """float64, direct form, over the points that a bound by distances from the mean leaves."""
    points = points.double()
    from_mean = (points - points.mean(0)).square().sum(1).sqrt()
    one = int(from_mean.argmax())
    lower = float((points - points[one]).square().sum(1).max().sqrt())
    kept = (from_mean + from_mean.max() >= lower * (1 - 1e-12)).nonzero()[:, 0]
    best, pair = -1.0, (0, 0)
    for rows in kept.split(512):
        d = torch.cdist(points[rows], points[kept], compute_mode="donot_use_mm_for_euclid_dist")
        if (found := float(d.max())) > best:
            at = int(d.argmax())
            best, pair = found, (int(rows[at // len(kept)]), int(kept[at % len(kept)]))
    return min(pair), max(pair), best


def _farthest_blocked(points: Tensor) -> tuple[int, int, float]:
    if len(points) > 20_000:
        raise Skip("all pairs of more than 20,000 points take too long")
    best, at = [], []
    for rows in points.split(2048):
        value, index = torch.cdist(rows, points).flatten().max(0)
        best.append(value)
        at.append(index)
    block = int(torch.stack(best).argmax())
    row, column = divmod(int(at[block]), len(points))
    return block * 2048 + row, column, float(best[block])


def _farthest_hull(points: Tensor) -> tuple[int, int, float]:
    if points.shape[1] > 3:
        raise Skip("convex hulls are for 2 or 3 dimensions")
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import cdist

    corners = ConvexHull(points.numpy()).vertices
    d = cdist(points.numpy()[corners], points.numpy()[corners])
    i, j = np.unravel_index(d.argmax(), d.shape)
    return int(corners[i]), int(corners[j]), float(d[i, j])


def _pair_error(output: Any, reference: Any, inputs: Any) -> float:
    """Distance of the found pair, recomputed in float64, below the farthest one's."""
    i, j = int(output[0]), int(output[1])
    found = float((inputs.points[i].double() - inputs.points[j].double()).norm())
    return max(0.0, 1 - found / reference[2])


FARTHEST_PAIR = Spec(
    op="farthest_pair",
    about="the two points farthest apart, Euclidean; flops are those of all pairs",
    cases=(_case(10_000, 2), _case(10_000, 64), _case(70_000, 2), _case(20_000, 64, 0, False, clustered=True)),
    tiny=(_case(300, 2), _case(300, 16)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: _with_backend(pf.farthest_pair, backend, i.points)),
        "torch.cdist in blocks": lambda i: lambda: _farthest_blocked(i.points),
        "scipy hull": lambda i: lambda: _farthest_hull(torch.from_numpy(_numpy(i))),
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


def _dispersion_loop(farthest: Any):
    def prepare(inputs: Any) -> Call:
        return lambda: torch.tensor(greedy(inputs.points, inputs.k, list(farthest(inputs.points)[:2]))[0])

    return prepare


def _dispersion_reference(inputs: Any) -> float:
    i, j, _ = farthest_exact(inputs.points)
    chosen = torch.tensor(greedy(inputs.points.double(), inputs.k, [i, j])[0])
    return spread(inputs.points, chosen)


K_DISPERSION = Spec(
    op="k_dispersion",
    about="max-min dispersion; the baselines are the greedy from a farthest pair, ours also refines it by swaps",
    cases=(_case(10_000, 2, 10), _case(70_000, 2, 10), _case(10_000, 64, 100, False)),
    tiny=(_case(200, 2, 6), _case(200, 8, 6)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: pf.k_dispersion(i.points, i.k, backend=backend).indices),
        "torch loop": _dispersion_loop(_farthest_blocked),
        "scipy hull and torch loop": _dispersion_loop(_farthest_hull),
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
    points, start = _numpy(inputs), inputs.start.numpy()

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


def _medoid_error(output: Any, reference: Any, inputs: Any) -> float:
    """Total distance to the medoids over the float64 iteration's, minus 1; float32 near-ties may lead elsewhere."""
    return abs(_medoid_cost(inputs.points, output) / reference - 1)


K_MEDOIDS = Spec(
    op="k_medoids",
    about="Voronoi iteration with Manhattan distance from given medoids, as PXGen's published code",
    cases=(_case(2000, 16, 10), _case(1000, 784, 10, False), _case(10_000, 2, 10, False)),
    tiny=(_case(150, 2, 5), _case(150, 16, 5)),
    inputs=_inputs,
    contenders={
        **ours(lambda i, backend: lambda: pf.k_medoids(i.points, i.k, start=i.start, backend=backend).indices),
        "Python loops": _voronoi_python,
        "torch.cdist": lambda i: lambda: _voronoi(i.points, i.start),
    },
    reference=lambda i: _medoid_cost(i.points, _voronoi(i.points.double(), i.start)),
    error=_medoid_error,
    tolerance=lambda inputs: 0.05,
    limits=_READ,
    bytes=_point_bytes,
    flops=lambda inputs: 3 * inputs.points.numel() * inputs.k,
)
