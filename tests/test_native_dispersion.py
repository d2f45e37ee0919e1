"""The compiled farthest pair and dispersion: the same indices as the reference, distances to the bit, whatever the
instruction set, element type, layout or number of threads.

More than 512 points stay for the tiles of every case that says so: fewer are compared without them.
"""

import itertools

import numpy as np
import pytest
import torch
from helpers.fresh import run_fresh
from helpers.layouts import layouts
from torch.library import opcheck

import protofast as pf
from protofast import _ops
from protofast._ops.selection import EUCLIDEAN, MANHATTAN, METRICS, OBJECTIVES, PRECOMPUTED

pytestmark = pytest.mark.skipif("native" in _ops.UNAVAILABLE, reason=_ops.UNAVAILABLE.get("native", ""))

ISAS = ["plain", "avx2", "avx512", "avx512vnni"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COORDINATES = range(PRECOMPUTED)
OPS = torch.ops.protofast


def best_isa() -> str:
    from protofast import _C

    return _C.build_info()["isa"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- points -----------------------------------------------------------------------------------------------------


def normal(n, d, seed):
    return torch.randn(n, d, generator=seed)


def lattice(n, d, seed):
    """Many equal distances."""
    return torch.randint(-2, 3, (n, d), generator=seed).float()


def copies(n, d, seed):
    """A few points many times, with zeros of both signs."""
    rows = torch.randn(9, d, generator=seed).round()
    rows[0], rows[1] = 0.0, -0.0
    return rows[torch.randint(9, (n,), generator=seed)]


def sphere(n, d, seed):
    """No point nearer to the middle than another."""
    x = torch.randn(n, d, generator=seed, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def clusters(n, d, seed):
    middles = 3 * torch.randn(12, d, generator=seed)
    return middles[torch.randint(12, (n,), generator=seed)] + 0.1 * torch.randn(n, d, generator=seed)


def antipodes(n, d, seed):
    """Each point with the one opposite: distances that differ in the last bits only."""
    half = sphere(n // 2, d, seed)
    return torch.cat([half, -half])[torch.randperm(n // 2 * 2, generator=seed)]


def near_ties(n, d, metric, seed=0):
    """Opposite points whose distances differ by parts in 10⁹, and others that are farther out but from no point."""
    random = torch.Generator().manual_seed(seed)
    half = torch.randn(n // 2, d - 1, generator=random, dtype=torch.float64)
    half /= half.abs().sum(1, keepdim=True) if metric == MANHATTAN else half.norm(dim=1, keepdim=True)
    out = torch.zeros(n, d, dtype=torch.float64)
    out[:, 1:] = torch.cat([half, -half]) * (1 + 1e-9 * torch.rand(n, 1, generator=random, dtype=torch.float64))
    others = torch.zeros(n // 5, d, dtype=torch.float64)
    others[:, 0] = (0.98 if metric == MANHATTAN else 1.5) + 1e-3 * torch.rand(n // 5, generator=random)
    points = torch.cat([out, others])
    return points[torch.randperm(len(points), generator=random)]


def simplex(n, d, seed):
    """All pairs are equal."""
    return torch.eye(d)[torch.randperm(d, generator=seed)][:n]


KINDS = [normal, lattice, copies, sphere, clusters, antipodes]


def made(kind, n, d, seed=0):
    return kind(n, d, torch.Generator().manual_seed(seed))


def some_mask(n):
    return torch.arange(n) % 5 != 1


# --- checks -----------------------------------------------------------------------------------------------------


def check_pair(points, metric, mask=None):
    pair, distance = OPS.farthest_pair.native(points, mask, metric)
    expected, exact = OPS.farthest_pair.reference(points, mask, metric)
    assert pair.tolist() == expected.tolist()
    assert distance.item() == exact.item()


def check_dispersion(points, k, metric, mask=None):
    """Each op after the same choices."""
    first, _ = OPS.farthest_pair.reference(points, mask, metric)
    indices, _, labels, distances = OPS.k_center.reference(points, first, mask, k, metric, 0)
    for swaps in (0, k):
        given = points, indices, labels, distances, mask, metric, swaps
        found, smallest = OPS.max_min_swaps.native(*given)
        expected, exact = OPS.max_min_swaps.reference(*given)
        assert found.tolist() == expected.tolist()
        assert smallest.item() == exact.item()
    for sweeps in (0, 10):
        found, *sums = OPS.max_sum.native(points, first, mask, k, metric, sweeps)
        expected, *exact = OPS.max_sum.reference(points, first, mask, k, metric, sweeps)
        assert found.tolist() == expected.tolist()
        np.testing.assert_allclose(sums, exact, rtol=1e-12)


def square_of(points, metric=EUCLIDEAN):
    x = points.double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


# --- the farthest pair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
def test_pair_of_points_of_every_kind(kind, metric):
    for d in (1, 2, 3, 8, 9, 63, 130):
        check_pair(made(kind, 900, d), metric)
    for n in (1, 2, 3, 40, 513, 2000):
        check_pair(made(kind, max(n, 2), 5, n)[:n], metric)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_of_every_type_masked_or_not(dtype):
    for metric, kind, d in itertools.product(COORDINATES, (normal, lattice, sphere), (3, 20, 64)):
        points = made(kind, 800, d).to(dtype)
        check_pair(points, metric)
        check_pair(points, metric, some_mask(800))


@pytest.mark.parametrize("metric", COORDINATES)
def test_pair_of_equals_is_the_lexicographically_first(metric):
    check_pair(made(simplex, 600, 600), metric)
    check_pair(torch.ones(800, 6), metric)
    check_pair(torch.zeros(800, 12), metric)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)))
    check_pair(corners, metric)
    check_pair(torch.cat([corners, corners]), metric)
    found = OPS.farthest_pair.native(corners.flip(0).contiguous(), None, EUCLIDEAN)[0]
    assert found.tolist() == [0, 1023]


@pytest.mark.parametrize("metric", COORDINATES)
def test_pair_at_the_ends_of_the_range(metric):
    for d in (3, 20):
        x = made(normal, 700, d).double()
        for scaled in (1e-20 * x, 1e30 * x, 1e-140 * x, 1e-160 * x, 1e160 * x, x + 1e10, 1e-3 * x + 1e6):
            check_pair(scaled, metric)
        check_pair((1e-20 * x).float(), metric)
        check_pair((1e30 * x).float(), metric)
        lopsided = x.clone()
        lopsided[:, 0] *= 1e8
        check_pair(lopsided, metric)
        few_zero = x.clone()
        few_zero[::7] = 0  # for cosine a direction of its own
        check_pair(few_zero, metric)
        check_pair(few_zero.abs(), metric)  # and then the farthest from many


@pytest.mark.parametrize("metric", [EUCLIDEAN, MANHATTAN])
def test_pair_that_only_the_tiles_can_find(metric):
    """Thousands of pairs that rounded coordinates cannot tell apart."""
    for d in (6, 12, 40):
        check_pair(near_ties(6000, d, metric), metric)


def test_pair_in_every_layout():
    for metric, d in itertools.product(COORDINATES, (3, 20)):
        for _, points in layouts(made(normal, 700, d)):
            check_pair(points, metric)


def test_precomputed_pair():
    for dtype in DTYPES:
        square = square_of(made(lattice, 300, 4)).to(dtype)
        check_pair(square, PRECOMPUTED)
        check_pair(square.T, PRECOMPUTED, some_mask(300))
    check_pair(torch.zeros(5, 5), PRECOMPUTED)
    check_pair(torch.zeros(1, 1), PRECOMPUTED)


@pytest.mark.parametrize("threads", [1, 3])
def test_pair_by_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    for kind, metric in itertools.product(KINDS, COORDINATES):
        check_pair(made(kind, 3000, 12), metric)


# --- dispersion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_every_kind(kind, metric):
    for n, d, k in ((60, 2, 9), (60, 1, 30), (400, 9, 25), (50, 17, 49), (30, 3, 30), (200, 20, 2)):
        check_dispersion(made(kind, n, d, k), k, metric)
        if k < n // 2:
            check_dispersion(made(kind, n, d, k), k, metric, some_mask(n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_of_every_type(dtype):
    for metric, kind in itertools.product(COORDINATES, (normal, lattice)):
        check_dispersion(made(kind, 300, 5).to(dtype), 20, metric)
    for mask in (None, some_mask(150)):
        check_dispersion(square_of(made(normal, 150, 4)).to(dtype), 15, PRECOMPUTED, mask)


def test_swaps_raise_the_smallest_distance_often():
    """So that these tests see swaps at all, several in a row, and of points swapped in before."""
    swapped = 0
    for seed in range(12):
        points = made(normal, 4000, 2, seed)
        plain, refined = (pf.k_dispersion(points, 30, refine=refine, backend="native") for refine in (False, True))
        expected = pf.k_dispersion(points, 30, backend="reference")
        assert refined.indices.tolist() == expected.indices.tolist()
        assert refined.objective == expected.objective
        swapped += int((plain.indices != refined.indices).sum())
    assert swapped > 24


@pytest.mark.parametrize("threads", [1, 3])
def test_choices_by_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    for metric in COORDINATES:
        check_dispersion(made(normal, 40000, 3), 12, metric)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_k_dispersion_is_that_of_the_reference(objective):
    points = made(normal, 500, 6)
    for metric, refine, k in itertools.product(METRICS, (False, True), (1, 2, 3, 20)):
        given = square_of(points) if metric == "precomputed" else points
        for mask in (None, some_mask(500)):
            native, reference = (
                pf.k_dispersion(given, k, objective=objective, metric=metric, mask=mask, refine=refine, backend=backend)
                for backend in ("native", "reference")
            )
            assert native.indices.tolist() == reference.indices.tolist()
            assert native.labels.tolist() == reference.labels.tolist()
            for name in ("objective", "bound", "radii", "distances"):
                np.testing.assert_allclose(getattr(native, name), getattr(reference, name), rtol=1e-12)


# --- instruction sets -------------------------------------------------------------------------------------------


def _on_isa() -> tuple[str, int]:
    runs = 0
    for kind, metric, d in itertools.product((*KINDS, simplex), COORDINATES, (2, 33)):
        check_pair(made(kind, 800, d), metric)
        runs += 1
    for d, metric in itertools.product((5, 12, 40), (EUCLIDEAN, MANHATTAN)):
        check_pair(near_ties(4000, d, metric), metric)
    for dtype, metric in itertools.product(DTYPES, COORDINATES):
        check_pair(made(normal, 700, 33).to(dtype), metric, some_mask(700))
        check_dispersion(made(normal, 300, 5).to(dtype), 15, metric)
        runs += 2
    return best_isa(), runs


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    have = best_isa()
    if have != "avx512bf16" and ISAS.index(isa) > ISAS.index(have):
        pytest.skip(f"this processor has {have} at best")
    used, runs = run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa)
    assert used == isa
    assert runs > 80


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    points, first = made(normal, 30, 4), torch.tensor([1, 3])
    mask = torch.arange(30) != 7 if masked else None
    indices, _, labels, distances = OPS.k_center.native(points, first, mask, 5, EUCLIDEAN, 0)
    opcheck(OPS.farthest_pair.native, (points, mask, EUCLIDEAN))
    opcheck(OPS.max_min_swaps.native, (points, indices, labels, distances, mask, EUCLIDEAN, 5))
    opcheck(OPS.max_sum.native, (points, first, mask, 5, EUCLIDEAN, 3))


def test_wrong_arguments_are_named():
    points, first = made(normal, 30, 4), torch.tensor([1, 3])
    _, _, labels, distances = OPS.k_center.native(points, first, None, 2, EUCLIDEAN, 0)
    swaps, chosen = OPS.max_min_swaps.native, OPS.max_sum.native
    for call, words in (
        (lambda: OPS.farthest_pair.native(points[:0], None, 0), "points must not be empty"),
        (lambda: OPS.farthest_pair.native(points, None, 9), "metric is out of range"),
        (lambda: OPS.farthest_pair.native(points, torch.ones(3).bool(), 0), "mask must have one flag"),
        (lambda: swaps(points, first, labels[:-1], distances, None, 0, 2), "labels must have one number"),
        (lambda: swaps(points, first, labels + 2, distances, None, 0, 2), "labels must be positions"),
        (lambda: swaps(points, first, labels, distances.float(), None, 0, 2), "distances has the wrong dtype"),
        (lambda: swaps(points, first + 29, labels, distances, None, 0, 2), "index 30 is not that of an allowed point"),
        (lambda: chosen(points, first, None, 31, 0, 0), "k is larger"),
        (lambda: chosen(points, first, None, 1, 0, 0), "indices must be 1 to k"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
