"""The CUDA selection kernels, run on the CPU by tests/cuda_emulation, against the float64 reference, bit for bit."""

import ctypes
import itertools
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from helpers.emulation import HERE, ROOT, emulated, numbers, pointer, raise_if
from helpers.layouts import layouts
from torch import Tensor

from protofast._ops.selection import COSINE, EUCLIDEAN, MANHATTAN, PRECOMPUTED, SQEUCLIDEAN

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # numbered as in csrc/dtype.h
COORDINATES = (EUCLIDEAN, SQEUCLIDEAN, COSINE, MANHATTAN)
reference = torch.ops.protofast

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


@dataclass
class Machine:
    """What is emulated: blocks of a cloud meet if there are several processors and `together`."""

    processors: int = 3
    together: bool = True
    shared: int = 227 << 10
    descending: bool = False


LARGE = Machine(processors=1)
RESIDENT = Machine(shared=6 << 10)  # no cloud of a test fits into a block, some fit into three
STREAMED = Machine(shared=1 << 10)
ONE_BY_ONE = Machine(shared=1 << 10, together=False, descending=True)
MACHINES = (LARGE, RESIDENT, STREAMED, ONE_BY_ONE)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> ctypes.CDLL:
    sources = [ROOT / "csrc/cuda/selection.cu", HERE / "selection_driver.cpp"]
    return emulated(sources, ("k_center", "relax"), tmp_path_factory.mktemp("emulation"), "-DEMULATE_TOGETHER")


def layout(points: Tensor) -> ctypes.Array:
    clouds = points if points.ndim == 3 else points[None]
    return numbers([*clouds.shape, *clouds.stride()])


def prepare(library: ctypes.CDLL, machine: Machine) -> None:
    library.emulate(machine.processors, machine.descending, machine.together, machine.shared)


def k_center(library, points, initial, mask, k, metric, machine=LARGE):
    prepare(library, machine)
    *batch, n, _ = points.shape
    out = tuple(
        torch.full((*batch, size), 77, dtype=dtype)
        for size, dtype in ((k, torch.int64), (k, torch.float64), (n, torch.int64), (n, torch.float64))
    )
    raise_if(
        library.k_center(
            pointer(points), layout(points), pointer(mask), ctypes.c_int64(metric), pointer(initial),
            ctypes.c_int64(initial.shape[-1]), ctypes.c_int64(k), *map(pointer, out), DTYPES.index(points.dtype),
        )
    )  # fmt: skip
    return out


def relax(library, points, centers, mask, nearest, metric, machine=LARGE):
    prepare(library, machine)
    n = len(points)
    out = torch.full((n,), 77, dtype=torch.float64), torch.full((n,), 77)
    raise_if(
        library.relax(
            pointer(points), layout(points), pointer(mask), ctypes.c_int64(metric), pointer(centers), layout(centers),
            pointer(nearest), *map(pointer, out), DTYPES.index(points.dtype),
        )
    )  # fmt: skip
    return out


def check(library, points, initial, mask, k, metric, machine=LARGE):
    found = k_center(library, points, initial, mask, k, metric, machine)
    expected = reference.k_center.reference(points, initial, mask, k, metric, 0)
    for name, ours, wanted in zip(("indices", "radii", "labels", "distances"), found, expected, strict=True):
        assert torch.equal(ours, wanted), (name, points.shape, points.dtype, metric, machine)


KINDS = {
    "normal": lambda *shape: torch.randn(*shape),
    "lattice": lambda *shape: torch.randint(-1, 2, shape).float(),  # ties everywhere, and copies
    "far away": lambda *shape: torch.randn(*shape) + 1e3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("machine", MACHINES, ids=("large", "resident", "streamed", "one by one"))
def test_k_center(emulation, dtype, machine):
    kinds = itertools.cycle(KINDS.values())
    for metric, (n, d) in itertools.product(COORDINATES, ((220, 2), (150, 3), (130, 7), (97, 16), (70, 37))):
        points = next(kinds)(n, d).to(dtype)
        mask = torch.rand(n) > 0.2 if (n + metric) % 3 == 0 else None
        allowed = torch.arange(n) if mask is None else mask.nonzero().squeeze(1)
        initial = allowed[[5, 1, 9]] if d in (2, 37) else allowed[-1:]
        check(emulation, points, initial, mask, 12, metric, machine)


@pytest.mark.parametrize("metric", [*COORDINATES, PRECOMPUTED])
@pytest.mark.parametrize("machine", MACHINES, ids=("large", "resident", "streamed", "one by one"))
def test_until_no_point_is_left(emulation, metric, machine):
    """Copies of chosen points come last, no index twice; then -1."""
    for d in (2, 11):
        points = KINDS["lattice"](130, d)
        points[:40] = points[40:80]
        mask = torch.arange(130) % 5 != 3
        mask[60:] = d == 2
        if metric == PRECOMPUTED:
            points = torch.cdist(points, points, p=1)
        check(emulation, points, torch.tensor([0]), mask, 130, metric, machine)


@pytest.mark.parametrize("machine", [LARGE, Machine(processors=8), RESIDENT, STREAMED, ONE_BY_ONE], ids=str)
def test_batches(emulation, machine):
    for metric, d in ((EUCLIDEAN, 3), (COSINE, 20), (MANHATTAN, 5), (PRECOMPUTED, 90)):
        points = torch.randn(3, 90, d) if metric != PRECOMPUTED else torch.cdist(*[torch.randn(3, 90, 2)] * 2)
        mask = torch.arange(90) < torch.tensor([[90], [40], [7]])
        points[2, 50:] = math.nan
        if metric == PRECOMPUTED:
            points[2, :, 50:] = math.nan
        check(emulation, points, torch.tensor([[1, 0], [2, 30], [6, 5]]), mask, 11, metric, machine)


def test_more_parts_than_threads_of_a_warp(emulation):
    points = KINDS["lattice"](2600, 2)
    for shared in (1 << 10, 8 << 10):
        check(emulation, points, torch.tensor([2599]), None, 12, EUCLIDEAN, Machine(processors=40, shared=shared))


@pytest.mark.parametrize("d", [2, 16])
def test_every_layout(emulation, d):
    points = torch.randn(120, d)
    for _, view in layouts(points):
        for machine in (LARGE, RESIDENT, STREAMED):
            check(emulation, view, torch.tensor([3]), None, 9, EUCLIDEAN, machine)
    clouds = torch.randn(2, 60, d)
    for _, view in layouts(clouds):
        check(emulation, view, torch.tensor([[3], [0]]), None, 9, COSINE)


@pytest.mark.parametrize("metric", COORDINATES)
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e25, 3e37])
def test_what_float32_cannot_hold(emulation, metric, size):
    for d in (2, 12):
        points = torch.randn(90, d) * size
        points[7] = 0
        points[9, 0] = 1e-45
        check(emulation, points, torch.tensor([0]), None, 20, metric)


def test_what_float64_can_barely_hold(emulation):
    for d, size in itertools.product((2, 12), (1e-200, 1e140)):
        points = torch.randn(60, d, dtype=torch.float64) * size
        for metric in COORDINATES:
            check(emulation, points, torch.tensor([0]), None, 20, metric)


def test_zero_vectors_have_a_direction_of_their_own(emulation):
    for dtype, d in itertools.product(DTYPES, (2, 8, 16, 21)):
        points = torch.randn(70, d).to(dtype)
        points[::3] = 0
        points[1] = -points[2]
        check(emulation, points, torch.tensor([3, 2]), None, 50, COSINE)


def test_near_ties_are_decided_in_float64(emulation):
    """On a sphere so fine that float32 sums tell nothing."""
    for d in (3, 24):
        points = torch.nn.functional.normalize(torch.randn(150, d), dim=1)
        points[:75] = points[75:] * (1 + 2.0**-23)
        check(emulation, points, torch.tensor([0]), None, 100, EUCLIDEAN)
        check(emulation, points, torch.tensor([0]), None, 100, COSINE)


@pytest.mark.parametrize("metric", COORDINATES)
def test_no_coordinates_and_one_point(emulation, metric):
    check(emulation, torch.empty(5, 0), torch.tensor([2]), None, 5, metric)
    check(emulation, torch.randn(1, 4), torch.tensor([0]), None, 1, metric)
    check(emulation, torch.randn(2, 3, 2), torch.tensor([[0], [2]]), None, 3, metric)


@pytest.mark.parametrize("metric", COORDINATES)
def test_what_float32_leaves_open_is_decided(emulation, metric):
    """All values so far are above or below the new ones by less than float32 can tell."""
    points, center = torch.randn(40, 24), torch.randn(1, 24)
    values = torch.ops.protofast.relax.reference(points, center, None, None, metric)[0]
    for factor in (1 + 2.0**-45, 1 - 2.0**-45):
        found = relax(emulation, points, center, None, values * factor, metric)
        expected = reference.relax.reference(points, center, None, values * factor, metric)
        assert all(map(torch.equal, found, expected))


def test_unreachable_points(emulation):
    square = torch.tensor([[0, 1, math.inf, math.inf], [1, -0.0, math.inf, math.inf], [math.inf, math.inf, 0, 3]])
    square = torch.cat([square, torch.tensor([[math.inf, math.inf, 3, 0]])])
    for dtype in DTYPES:
        for k in (1, 2, 4):
            check(emulation, square.to(dtype), torch.tensor([0]), None, k, PRECOMPUTED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("machine", [Machine(), STREAMED], ids=("resident", "streamed"))
def test_relax(emulation, dtype, machine):
    for metric, d, count in itertools.product(COORDINATES, (0, 3, 16, 21), (0, 1, 6)):
        points, centers = KINDS["lattice"](140, d).to(dtype), KINDS["lattice"](count, d).to(dtype)
        given = torch.rand(140, dtype=torch.float64) * d
        given[::7] = math.inf
        given[1] = -1
        for mask, nearest in ((None, None), (torch.rand(140) > 0.3, given)):
            found = relax(emulation, points, centers, mask, nearest, metric, machine)
            # (without centers, no metric is asked)
            expected = reference.relax.reference(points, centers, mask, nearest, metric if count else EUCLIDEAN)
            assert all(map(torch.equal, found, expected)), (metric, d, count)
    wide = torch.randn(20, 50).to(dtype)
    found = relax(emulation, points[:, ::2], wide[:6, :42:4], None, None, EUCLIDEAN, machine)
    expected = reference.relax.reference(points[:, ::2], wide[:6, :42:4], None, None, EUCLIDEAN)
    assert all(map(torch.equal, found, expected))
