"""The Triton selection kernels: what they compile to on GPUs that are not here, and what they choose.

Nothing of protofast is imported up here, as in test_triton_ddim.py.
"""

import importlib.util
import itertools
import math

import pytest
import torch
from helpers.aot import ARCHITECTURES, assert_wide_addresses, builds
from helpers.layouts import far_apart, layouts
from helpers.poison import poison

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value"),  # the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EUCLIDEAN, SQEUCLIDEAN, COSINE, MANHATTAN, PRECOMPUTED = METRICS = range(5)
COORDINATES = METRICS[:4]
NAMES = {
    "k_center": ("indices", "radii", "labels", "distances"),
    "cover": ("radii", "labels", "distances"),
    "relax": ("values", "labels"),
}


@pytest.fixture(autouse=True)
def _ops():
    import protofast  # noqa: F401


@pytest.fixture
def many(monkeypatch):
    """Clouds are cut into parts, however small they are."""
    from protofast.backends.triton import selection

    monkeypatch.setattr(selection, "_ALONE", 0)
    monkeypatch.setattr(selection, "_TILE", 256)
    monkeypatch.setattr(selection, "_programs", lambda device: 3)


def call(backend, op, *args):
    """The op's results on the CPU, computed by Triton on the GPU if there is one."""
    device = DEVICE if backend == "triton" else "cpu"
    moved = [a.to(device) if isinstance(a, torch.Tensor) and a.device.type != device else a for a in args]
    return tuple(result.cpu() for result in getattr(getattr(torch.ops.protofast, op), backend)(*moved))


def check(op, *args):
    """The same to the bit."""
    for name, ours, wanted in zip(NAMES[op], call("triton", op, *args), call("reference", op, *args), strict=True):
        assert torch.equal(ours, wanted), (op, name, args)


def k_center(points, initial, mask, k, metric):
    check("k_center", points, torch.tensor(initial), mask, k, metric, 0)


def lattice(*shape):
    return torch.randint(-1, 2, shape).float()


def matrix(*shape):
    points = lattice(*shape, 3)
    return torch.cdist(points, points, p=1)


# What it compiles to.


def traversals():
    """A batch, a cloud that is cut into parts, and relaxation; float32, a type that is screened in it, and float64."""
    from protofast.backends.triton.selection import k_center, relax

    first, mask = torch.zeros(4, 1, dtype=torch.int64), torch.ones(40_000, dtype=torch.bool)
    clouds, cloud = torch.zeros(4, 500, 3), torch.zeros(40_000, 64)
    k_center(clouds, first, None, 20, EUCLIDEAN, 0)
    k_center(clouds.bfloat16(), first, None, 20, COSINE, 0)
    k_center(torch.zeros(500, 500), first[0], mask[:500], 7, PRECOMPUTED, 0)
    k_center(cloud, first[0], None, 1, MANHATTAN, 0)
    k_center(cloud.double(), first[0], None, 1, COSINE, 0)
    relax(cloud, cloud[:5], None, None, COSINE)
    relax(cloud.half(), cloud[:5].half(), mask, torch.zeros(40_000, dtype=torch.float64), EUCLIDEAN)


# Bytes that ptxas saves outside the loops to have one more program on a processor.
SAVED = 16


def test_kernels_compile_without_spills():
    found = builds(traversals)
    assert len(found) == 13 * len(ARCHITECTURES)
    for build in found:
        assert_wide_addresses(build)
        assert build.spills <= SAVED, (build.kernel, build.architecture, build.spills)
        assert build.shared <= 64 << 10
        assert "atom" not in build.ptx


# What it chooses.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", COORDINATES)
def test_k_center(metric, dtype):
    for number, (n, d) in enumerate(((60, 2), (40, 9), (33, 70))):
        values = (torch.randn, lattice)[(number + metric) % 2]
        points = (values(n, d) + (number == 1)).to(dtype)
        mask = torch.rand(n) > 0.3 if number else None
        allowed = torch.arange(n) if mask is None else mask.nonzero().squeeze(1)
        initial = allowed[[4, 1, 8]] if number == 2 else allowed[-1:]
        check("k_center", points, initial, mask, 7, metric, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_parts_of_a_cloud(many, metric):
    for values in (lattice, torch.randn):
        points = values(90, 5) if metric != PRECOMPUTED else matrix(90)
        mask = torch.arange(len(points)) % 7 != 2
        k_center(points, [70, 0], mask, 5, metric)


@pytest.mark.parametrize("cut", [False, True])
def test_until_no_point_is_left(cut, request):
    """Copies of chosen points come last, no index twice; then -1."""
    if cut:
        request.getfixturevalue("many")
    points = lattice(60, 2)
    k_center(points, [0], torch.arange(60) % 3 != 1, 60, EUCLIDEAN)


def test_batches(many):
    for metric, d in ((EUCLIDEAN, 3), (COSINE, 12), (PRECOMPUTED, 50)):
        points = torch.randn(3, 50, d) if metric != PRECOMPUTED else matrix(3, 50)
        mask = torch.arange(50) < torch.tensor([[50], [30], [5]])
        points[2, 40:] = math.nan
        k_center(points, [[1, 0], [2, 20], [4, 3]], mask, 7, metric)


def test_every_layout():
    points = torch.randn(40, 10)
    for _, view in layouts(points):
        k_center(view, [3], None, 5, COSINE)
    for _, view in layouts(torch.randn(2, 20, 3)):
        k_center(view, [[3], [0]], None, 5, EUCLIDEAN)


def test_points_may_lie_far_apart():
    points = far_apart(3, 4)
    points.copy_(torch.randn(3, 4))
    k_center(points, [1], None, 3, EUCLIDEAN)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e18, 1e25, 3e37])
def test_what_float32_cannot_hold(size):
    for metric in COORDINATES:
        points = torch.randn(40, 6) * size
        points[7] = 0
        points[9, 0] = 1e-45
        k_center(points, [0], None, 8, metric)


def test_what_float64_can_barely_hold():
    for metric, size in itertools.product(COORDINATES, (1e-200, 1e140)):
        k_center(torch.randn(40, 3, dtype=torch.float64) * size, [0], None, 6, metric)


def test_zero_vectors_have_a_direction_of_their_own():
    for dtype, d in zip(DTYPES, (2, 8, 7, 9), strict=True):
        points = torch.randn(30, d).to(dtype)
        points[::3] = 0
        k_center(points, [3, 2], None, 12, COSINE)


def test_near_ties_are_decided_in_float64():
    points = torch.nn.functional.normalize(torch.randn(40, 24), dim=1)
    points[:20] = points[20:] * (1 + 2.0**-23)
    for metric in (EUCLIDEAN, COSINE):
        k_center(points, [0], None, 30, metric)


@pytest.mark.parametrize("metric", COORDINATES)
def test_what_float32_leaves_open_is_decided(metric):
    """All values so far are above or below the new ones by less than float32 can tell."""
    points, center = torch.randn(40, 24), torch.randn(1, 24)
    values = torch.ops.protofast.relax.reference(points, center, None, None, metric)[0]
    for factor in (1 + 2.0**-45, 1 - 2.0**-45):
        check("relax", points, center, None, values * factor, metric)


def test_unreachable_points():
    square = torch.full((4, 4), math.inf)
    square[:2, :2] = torch.tensor([[0, 1], [1, -0.0]])
    square[2:, 2:] = torch.tensor([[0, 3], [3, 0]])
    for k in (1, 2, 4):
        k_center(square, [0], None, k, PRECOMPUTED)


@pytest.mark.parametrize("metric", COORDINATES)
def test_no_coordinates_and_one_point(metric):
    k_center(torch.empty(5, 0), [2], None, 5, metric)
    k_center(torch.randn(1, 4), [0], None, 1, metric)


def test_cover():
    points = torch.randn(50, 3)
    check("cover", points, torch.tensor([7, 3, 20]), torch.arange(50) % 4 != 1, EUCLIDEAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relax(dtype):
    for metric, d, count in (
        (EUCLIDEAN, 3, 5),
        (COSINE, 21, 4),
        (MANHATTAN, 0, 3),
        (SQEUCLIDEAN, 4, 0),
        (COSINE, 2, 1),
    ):
        points, centers = lattice(70, d).to(dtype), lattice(count, d).to(dtype)
        given = torch.rand(70, dtype=torch.float64) * d
        given[::7] = math.inf
        given[1] = -1
        check("relax", points, centers, None, None, metric)
        check("relax", points.mT.contiguous().mT, centers, torch.rand(70) > 0.3, given, metric)


def test_opcheck():
    from torch.library import opcheck

    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    points, first = torch.randn(9, 3, device=DEVICE), torch.tensor([1], device=DEVICE)
    ops = torch.ops.protofast
    opcheck(ops.k_center.triton, (points, first, None, 4, EUCLIDEAN, 0), test_utils=checks)
    opcheck(ops.k_center.triton, (points[None], first[None], None, 4, COSINE, 0), test_utils=checks)
    opcheck(ops.cover.triton, (points, first, None, COSINE), test_utils=checks)
    opcheck(ops.relax.triton, (points, points[:2], None, None, MANHATTAN), test_utils=checks)


def test_every_result_is_written(many):
    points = torch.randn(60, 20)
    with poison():
        k_center(points, [5], torch.arange(60) % 3 != 0, 4, COSINE)
        check("relax", points, points[:3], None, None, COSINE)
