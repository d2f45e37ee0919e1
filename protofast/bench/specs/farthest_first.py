"""Farthest-first traversal as others run it: the loops anyone writes, and published packages. All start at point 0
where they let one choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import Call, Prepare, Skip
from ..timing import once

TREE_DIM = 8
"""Trees of buckets are for few dimensions: fpsample takes no more than these."""


def as_numpy(inputs: Any) -> np.ndarray:
    if inputs.device != "cpu":
        raise Skip("numpy runs on the CPU")
    return inputs.points.numpy()


def _fastest(calls: Mapping[Any, Call]) -> Call:
    """The settings that favour a contender most, by one call of each after a first."""
    for call in calls.values():
        call()
    return min(calls.values(), key=lambda call: once(call, "cpu")[0])


# --- loops ---------------------------------------------------------------------------------------------------------


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


def _one_pass(points: Tensor, nearest: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    nearest = torch.minimum(nearest, (points - points.index_select(0, last)).square().sum(1))
    return nearest, nearest.argmax(0, keepdim=True)


def _compiled_loop(inputs: Any) -> Call:
    """pytorch3d's method: one fused pass over the points a round, here by torch.compile with all threads."""
    points, k = inputs.points, inputs.k
    torch._dynamo.reset()  # or the shapes of earlier cases use up the limit of recompilations
    step = torch.compile(_one_pass, dynamic=False)
    far = torch.full((len(points),), torch.inf, device=points.device)

    def call() -> Tensor:
        chosen = torch.zeros(k, dtype=torch.int64, device=points.device)
        nearest, last = far, chosen[:1].clone()
        for i in range(1, k):
            nearest, last = step(points, nearest, last)
            chosen[i : i + 1] = last
        return chosen

    step(points, far, torch.zeros(1, dtype=torch.int64, device=points.device))
    return call


def _numpy_blas_loop(inputs: Any) -> Call:
    points, k = as_numpy(inputs), inputs.k

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


def _torch_blas_loop(inputs: Any) -> Call:
    points, k = inputs.points, inputs.k

    def call() -> Tensor:
        norms = points.square().sum(1)
        chosen = torch.zeros(k, dtype=torch.int64, device=points.device)
        nearest = torch.full_like(norms, torch.inf)
        last = chosen[:1].clone()
        for i in range(1, k):
            distance = torch.addmv(norms, points, points[last][0], alpha=-2).add_(norms[last])
            torch.minimum(nearest, distance, out=nearest)
            last = nearest.argmax(0, keepdim=True)
            chosen[i : i + 1] = last
        return chosen

    return call


def lazy_pool(points: Tensor, k: int, *, pool: int = 4096, block: int = 8192) -> Tensor:
    """Chooses among the `pool` farthest points alone until one of the others could be farther; then all choices since
    are taken into account for every point by one product."""
    n = len(points)
    pool = min(pool, max(512, n // 16), n)
    norms = points.square().sum(1)
    nearest = torch.full_like(norms, torch.inf)
    chosen = new = [0]
    while len(chosen) < k:
        centers = points[new].T
        for lo in range(0, n, block):
            rows = slice(lo, lo + block)
            distance = torch.addmm(norms[new], points[rows], centers, alpha=-2).amin(1).add_(norms[rows])
            torch.minimum(nearest[rows], distance, out=nearest[rows])
        values, members = nearest.topk(pool)
        bound = float(values[-1]) if pool < n else -math.inf
        inside, lengths = points[members], norms[members]
        new = []
        while len(chosen) + len(new) < k:
            value, at = values.max(0)
            if new and value < bound:
                break
            new.append(int(members[at]))
            distance = torch.addmv(lengths, inside, inside[at], alpha=-2).add_(lengths[at])
            torch.minimum(values, distance, out=values)
        chosen = chosen + new
    return torch.tensor(chosen)


# --- packages ------------------------------------------------------------------------------------------------------


def _torch_cluster(inputs: Any) -> Call:
    from torch_cluster import fps

    points, share = inputs.points, (inputs.k - 0.5) / len(inputs.points)  # it takes a share and rounds up
    return lambda: fps(points, ratio=share, random_start=False)


def _fpsample(inputs: Any) -> Call:
    """The best of its bucket trees in few dimensions, which start where they like; its plain loop in more."""
    import fpsample

    points, k = as_numpy(inputs), inputs.k

    def chosen(function: Callable[..., np.ndarray], **settings: int) -> Call:
        return lambda: torch.from_numpy(function(points, k, **settings).astype(np.int64))

    if points.shape[1] > TREE_DIM:
        return chosen(fpsample.fps_sampling, start_idx=0)
    heights = [h for h in (5, 7, 9) if 2**h < len(points)]
    trees = {h: chosen(fpsample.bucket_fps_kdline_sampling, h=h) for h in heights}
    return _fastest({**trees, "kd": chosen(fpsample.bucket_fps_kdtree_sampling)})


def _torch_quickfps(inputs: Any) -> Call:
    """Buckets of the best height in few dimensions, its own choice in more."""
    import torch_quickfps

    points, k = inputs.points, inputs.k

    def chosen(height: int | None) -> Call:
        return lambda: torch_quickfps.sample_idx(points, k, h=height, start_idx=0).long()

    if points.shape[1] > TREE_DIM:
        return chosen(None)
    return _fastest({h: chosen(h) for h in (None, 5, 7, 9) if h is None or 2**h < len(points)})


def _torch_fps(inputs: Any) -> Call:
    import torch_fps

    points = inputs.points[None]
    allowed = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    settings = {"random_start": False, "validate": False, "assume_finite": True}
    torch_fps.farthest_point_sampling(points[:, :2], allowed[:, :2], 1, **settings)  # builds itself on first use
    return lambda: torch_fps.farthest_point_sampling(points, allowed, inputs.k, **settings)[0]


def _gudhi(inputs: Any) -> Call:
    """Returns coordinates."""
    from gudhi.subsampling import choose_n_farthest_points

    points, k = as_numpy(inputs), inputs.k
    return lambda: choose_n_farthest_points(points=points, nb_points=k, starting_point=0)


def _skmatter(inputs: Any) -> Call:
    from skmatter.sample_selection import VoronoiFPS

    points, k = as_numpy(inputs), inputs.k
    return lambda: torch.from_numpy(VoronoiFPS(n_to_select=k, initialize=0).fit(points).selected_idx_.astype(np.int64))


LAZY_POOL = "torch lazy pool"
LOOPS: dict[str, Prepare] = {
    "torch loop": _torch_loop,
    "torch.compile loop": _compiled_loop,
    "numpy BLAS loop": _numpy_blas_loop,
    "torch BLAS loop": _torch_blas_loop,
    LAZY_POOL: lambda inputs: lambda: lazy_pool(inputs.points, inputs.k),
}
PACKAGES: dict[str, Prepare] = {
    "torch_cluster": _torch_cluster,
    "fpsample": _fpsample,
    "torch_quickfps": _torch_quickfps,
    "torch_fps": _torch_fps,
    "gudhi": _gudhi,
    "skmatter Voronoi": _skmatter,
}
