"""The compiled k-center and relax: every engine and instruction set gives the reference's result, to the bit."""

import os
import subprocess
import sys

import pytest
import torch

import protofast  # noqa: F401
from protofast._ops import KERNELS
from protofast._ops.selection import BOXES, COSINE, ENGINES, MANHATTAN, METRICS, PLAIN, POOL, SQEUCLIDEAN

pytestmark = pytest.mark.skipif("native" not in KERNELS["k_center"], reason="protofast._C is not built")
ops = torch.ops.protofast
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COORDINATES = range(4)  # metrics but "precomputed"


def points(kind, n, d, dtype=torch.float32):
    random = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=random, dtype=torch.float64)
    if kind == "lattice":
        x = torch.randint(-2, 3, (n, d), generator=random).double()
    elif kind == "clusters":
        x = torch.randn(20, d, generator=random).double()[torch.randint(20, (n,), generator=random)] * 5 + x * 0.1
    elif kind == "far":
        x = x * 0.01 + 30
    elif kind == "copies":
        x = x[torch.randint(n // 4 + 1, (n,), generator=random)]
    return x.to(dtype)


def check(x, first, mask, k, metric, engines=(PLAIN, BOXES, POOL)):
    expected = ops.k_center.reference(x, first, mask, k, metric, 0)
    for engine in engines:
        found = ops.k_center.native(x, first, mask, k, metric, engine)
        for name, one, other in zip(("indices", "radii", "labels", "distances"), found, expected, strict=True):
            assert torch.equal(one, other), (name, ENGINES[engine])


def check_relax(x, centers, mask, nearest, metric):
    found, expected = (run(x, centers, mask, nearest, metric) for run in (ops.relax.native, ops.relax.reference))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("metric", COORDINATES, ids=METRICS[:4])
@pytest.mark.parametrize("kind", ["normal", "lattice", "clusters", "far", "copies"])
@pytest.mark.parametrize(("n", "d", "k"), [(1500, 5, 60), (1500, 64, 100), (700, 3, 650), (40, 4, 40), (1100, 0, 9)])
def test_engines(kind, n, d, k, metric):
    check(points(kind, n, d), torch.tensor([1, 2]), None, k, metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", COORDINATES, ids=METRICS[:4])
def test_dtypes_masks_and_strides(dtype, metric):
    x = points("clusters", 1300, 36, dtype)[:, ::2]
    check(x, torch.tensor([1, 2]), torch.arange(1300) % 7 != 3, 80, metric)
    check(x.T.contiguous().T[:, :6], torch.tensor([5]), None, 80, metric)


@pytest.mark.parametrize("metric", COORDINATES, ids=METRICS[:4])
@pytest.mark.parametrize("kind", ["normal", "lattice", "clusters"])
@pytest.mark.parametrize("d", [2, 17, 100])
def test_relax(kind, d, metric):
    x, random = points(kind, 1500, d), torch.Generator().manual_seed(0)
    centers = torch.cat([x[::31], torch.zeros(1, d), torch.randn(30, d, generator=random) * 3])
    for nearest in (None, torch.rand(1500, generator=random).double() * d):
        check_relax(x, centers, None, nearest, metric)
        check_relax(x, centers, torch.arange(1500) % 5 != 1, nearest, metric)
    # Values that the last bits of the nearest decide.
    exact = ops.relax.reference(x, centers, None, None, metric)[0]
    for factor in (1 + 2.0**-45, 1, 1 - 2.0**-45):
        check_relax(x, centers, None, exact * factor, metric)


@pytest.mark.parametrize("metric", [SQEUCLIDEAN, MANHATTAN])
@pytest.mark.parametrize("offset", [1e8, 1e11, 1e13])
def test_far_from_the_origin(offset, metric):
    x = points("normal", 3000, 16, torch.float64)
    x[:, 1:] *= 1e-6
    check(x + offset, torch.tensor([0]), None, 60, metric)
    check(x[:, :1] + offset, torch.tensor([0]), None, 60, metric)
    check_relax(x[:, :1] + offset, x[:40, :1] + offset, None, None, metric)


@pytest.mark.parametrize(("scale", "dtype"), [(3e38, torch.float32), (1e-40, torch.float32), (1e150, torch.float64)])
@pytest.mark.parametrize("metric", [SQEUCLIDEAN, COSINE, MANHATTAN])
def test_sizes_of_numbers(scale, dtype, metric):
    x = points("normal", 1200, 12).clamp(-4, 4).double() / 4 * scale
    check(x.to(dtype), torch.tensor([0]), None, 50, metric)


def test_more_coordinates_than_bytes_can_add_up():
    x = points("normal", 64, 140_000)
    x = torch.where(x < 0, -2.0, 3.0)
    values, labels = ops.relax.native(x, x[:40].clone(), None, None, SQEUCLIDEAN)
    expected = torch.stack([(x - center).double().square().sum(1) for center in x[:40]])  # whole numbers: exact
    assert torch.equal(values, expected.min(0).values)
    assert torch.equal(labels, expected.min(0).indices)


def test_many_axes_only_one_of_which_is_indicated():
    x = torch.zeros(900, 8)
    x[::3] = points("lattice", 300, 8)
    check(x, torch.tensor([4]), None, 30, COSINE)


@pytest.mark.parametrize("engine", [PLAIN, BOXES, POOL])
def test_clouds(engine):
    x = torch.stack([points(kind, 900, 3) for kind in ("normal", "lattice", "copies")])
    mask = torch.ones(3, 900, dtype=torch.bool)
    mask[1, 20:] = False
    first = torch.tensor([[0], [3], [5]])
    expected = ops.k_center.reference(x, first, mask, 70, 0, 0)
    found = ops.k_center.native(x, first, mask, 70, 0, engine)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[0][1, 20:] == -1).all()


def test_without_labels_the_choices_are_the_same():
    for kind, d in (("normal", 40), ("copies", 3), ("lattice", 2)):
        x = points(kind, 2000, d)
        for engine in (PLAIN, BOXES, POOL):
            indices, radii, labels, distances = ops.k_center.native(x, torch.tensor([0]), None, 600, 0, engine, False)
            expected = ops.k_center.reference(x, torch.tensor([0]), None, 600, 0, 0)
            assert torch.equal(indices, expected[0])
            assert torch.equal(radii, expected[1])
            assert labels.shape == distances.shape == (0,)


@pytest.mark.parametrize("engine", [PLAIN, BOXES, POOL])
def test_values_that_are_not_finite_end(engine):
    for d in (3, 30):
        x = points("normal", 1500, d)
        x[7] = torch.nan
        x[9, 1] = torch.inf
        assert torch.isinf(ops.k_center.native(x, torch.tensor([0]), None, 40, 0, engine)[1][0])


def test_indices_that_are_not_allowed_are_refused():
    x, mask = points("normal", 50, 3), torch.arange(50) != 3
    with pytest.raises(RuntimeError, match="initial holds 3, which is not an allowed point"):
        ops.k_center.native(x, torch.tensor([3]), mask, 5, 0, 0)
    with pytest.raises(RuntimeError, match="initial holds 50"):
        ops.k_center.native(torch.stack([x] * 9), torch.full((9, 1), 50), None, 5, 0, 0)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_native_selection as t
torch.set_num_threads(int(sys.argv[2]))
for metric in t.COORDINATES:
    for kind in ("normal", "lattice", "clusters"):
        t.check(t.points(kind, 1300, 5), torch.tensor([1]), None, 60, metric)
        t.check(t.points(kind, 2500, 40), torch.tensor([1]), None, 60, metric, (t.POOL,))
    t.test_relax("normal", 17, metric)
t.test_dtypes_masks_and_strides(torch.float16, 0)
"""


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize("threads", [1, 3])
def test_instruction_sets_and_threads(isa, threads):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(threads)],
        env={**os.environ, "PROTOFAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
