"""k-medoids: Voronoi iteration and swaps, against plain numpy, and the compiled kernel against the reference."""

import itertools

import numpy as np
import pytest
import torch
from helpers.fresh import run_fresh

import protofast as pf
from protofast._backend import why_not
from protofast._ops.selection import METRICS

COORDINATES = METRICS[:4]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(
    why_not("k_medoids", "cpu", "native") is not None, reason=str(why_not("k_medoids", "cpu", "native"))
)
BACKENDS = ("reference", pytest.param("native", marks=needs_native))


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def distances(points, metric):
    x = np.asarray(points, dtype=np.float64)
    if metric == "precomputed":
        return x
    if metric == "cosine":
        norm = np.sqrt((x * x).sum(1, keepdims=True))
        x = np.hstack([x / np.where(norm > 0, norm, 1), norm == 0])
    gaps = np.abs(x[:, None] - x[None])
    value = gaps.sum(-1) if metric == "manhattan" else (gaps * gaps).sum(-1)
    return {"euclidean": np.sqrt(value), "cosine": value / 2}.get(metric, value)


def cloud(kind, n, d, seed=0):
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((n, d))
    if kind == "grid":
        return rng.integers(-2, 3, (n, d)).astype(np.float64)
    if kind == "copies":
        return normal[rng.integers(0, max(1, n // 20), n)]
    if kind == "clusters":  # far apart
        return 100 * rng.standard_normal((6, d))[rng.integers(0, 6, n)] + normal
    if kind == "mirror":  # sums that only rounding tells apart
        return np.concatenate([normal[: (n + 1) // 2], -normal[: n // 2]])
    if kind == "equal":
        return np.full((n, d), 0.3)
    return normal


KINDS = ("normal", "grid", "copies", "clusters", "mirror", "equal")


def as_points(x, metric):
    return distances(x, "manhattan") if metric == "precomputed" else x


# --- the oracle -----------------------------------------------------------------------------------------------------


def total(d, medoids):
    return d[medoids].min(0).sum()


def oracle_voronoi(d, medoids):
    medoids = list(medoids)
    for _ in range(100):
        labels = d[medoids].argmin(0)
        labels[medoids] = np.arange(len(medoids))
        members = [np.flatnonzero(labels == number) for number in range(len(medoids))]
        new = [int(m[d[np.ix_(m, m)].sum(1).argmin()]) for m in members]
        if new == medoids:
            break
        medoids = new
    return medoids


def oracle_swaps(d, medoids):
    """Every point in turn, each swap by the whole sum anew."""
    medoids, since, n = list(medoids), 0, len(d)
    for step in itertools.count():
        point = step % n
        since += 1
        if point not in medoids:
            sums = [total(d, [*medoids[:m], point, *medoids[m + 1 :]]) for m in range(len(medoids))]
            best = int(np.argmin(np.round(sums, 9)))
            if sums[best] < total(d, medoids) - 1e-9:
                medoids[best], since = point, 0
        if since == n:
            return medoids
    return None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "grid"])
@pytest.mark.parametrize("k", [1, 2, 7, 60])
def test_swaps_are_the_oracles(backend, metric, kind, k):
    if kind == "grid" and metric in ("euclidean", "cosine"):
        pytest.skip("sums of roots round, so ties are not exact")
    for d in (3, 20):  # with and without the screen of tiles
        points = as_points(cloud(kind, 60, d, seed=k), metric)
        matrix = distances(points, metric)
        settled = oracle_voronoi(matrix, np.arange(k) * 60 // k)
        assert pf.k_medoids(points, k, metric=metric, backend=backend).indices.tolist() == settled
        found = pf.k_medoids(points, k, metric=metric, refine=True, backend=backend)
        assert found.indices.tolist() == oracle_swaps(matrix, settled)
        np.testing.assert_allclose(found.objective, total(matrix, found.indices.tolist()), rtol=1e-12)
        assert found.objective <= total(matrix, settled) * (1 + 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_swap_is_left(backend):
    points = cloud("clusters", 120, 12)
    matrix = distances(points, "euclidean")
    chosen = pf.k_medoids(points, 5, metric="euclidean", start=[0, 1, 2, 3, 4], refine=True, backend=backend)
    chosen = chosen.indices.tolist()
    least = min(total(matrix, [*chosen[:m], point, *chosen[m + 1 :]]) for m in range(5) for point in range(120))
    assert least >= total(matrix, chosen) * (1 - 1e-9)


# --- the compiled kernel makes the reference's choices --------------------------------------------------------------


def runs(n, d, kind, metrics=METRICS, dtypes=DTYPES, ks=(1, 6), refine=False, seed=0):
    """Indices that a backend chooses, case by case."""
    for metric, dtype, k in itertools.product(metrics, dtypes, ks):
        points = torch.from_numpy(as_points(cloud(kind, n, d, seed), metric)).to(dtype)

        def run(backend, points=points, metric=metric, k=k):
            return pf.k_medoids(points, k, metric=metric, refine=refine, backend=backend).indices.tolist()

        yield (metric, dtype, k), run


def check(*args, **options):
    for case, run in runs(*args, **options):
        assert run("native") == run("reference"), case


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (50, 1), (90, 9), (201, 17)])
def test_native_medoids(kind, n, d):
    check(n, d, kind, ks=(1, min(n, 6)))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(61, 2), (90, 9), (130, 40)])
def test_native_swaps(kind, n, d):
    check(n, d, kind, dtypes=(torch.float32, torch.float64), refine=True)
    check(n, d, kind, metrics=("euclidean",), dtypes=(torch.float16, torch.bfloat16), ks=(n - 1,), refine=True)


@needs_native
@pytest.mark.parametrize(
    ("n", "d", "kind", "metric"),
    [
        (1500, 2, "normal", "euclidean"),  # cutting planes
        (1500, 2, "grid", "euclidean"),
        (1500, 2, "mirror", "euclidean"),
        (900, 30, "normal", "euclidean"),  # tiles
        (900, 30, "clusters", "euclidean"),
        (900, 30, "mirror", "euclidean"),
        (900, 20, "mirror", "manhattan"),
        (1500, 3, "grid", "manhattan"),  # sorted coordinates
        (1500, 3, "mirror", "manhattan"),
        (1500, 3, "mirror", "sqeuclidean"),
        (900, 9, "copies", "cosine"),
        (1500, 1, "copies", "precomputed"),
    ],
)
def test_native_medoids_of_large_clusters(n, d, kind, metric):
    for seed in range(2):
        check(n, d, kind, metrics=(metric,), dtypes=(torch.float32,), ks=(1, 3), seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_taken_in_the_order_laid_down(backend):
    """Of rows with the same distances in another order, the one whose sum in 512 lanes rounds to less."""
    n, others = 1200, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        matrix = np.full((n, n), 2.0)
        matrix[7, 8:] = rng.random(n - 8)
        for row in range(8):
            matrix[row, 8:] = rng.permutation(matrix[7, 8:])
        np.fill_diagonal(matrix, 0)
        lanes = np.zeros((n, 512))
        for at in range(0, n, 512):
            part = matrix[:, at : at + 512]
            lanes[:, : part.shape[1]] += part
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        expected = int(lanes[:, 0].argmin())
        others += expected != matrix.sum(1).argmin()
        assert pf.k_medoids(matrix, 1, metric="precomputed", backend=backend).indices.tolist() == [expected]
    assert others > 0  # or any order would do


def _on_isa():
    from protofast import _C

    torch.set_num_threads(1)
    cases = [(300, 2, "normal"), (300, 21, "normal")]
    found = [
        run("native") for n, d, kind in cases for _, run in runs(n, d, kind, dtypes=(torch.float32, torch.float16))
    ]
    found += [run("native") for _, run in runs(120, 21, "normal", dtypes=(torch.float32,), refine=True)]
    return _C.build_info()["isa"], found


@needs_native
def test_every_instruction_set_makes_the_same_choices():
    isas = ("plain", "avx2", "avx512")
    found = {isa: run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa) for isa in isas}
    assert len({str(chosen) for _, chosen in found.values()}) == 1
    assert found["plain"][0] in ("plain", "?")


@needs_native
def test_every_number_of_threads_makes_the_same_choices():
    cases = [(1500, 2, "normal"), (1500, 20, "normal"), (300, 12, "grid")]
    for n, d, kind in cases:
        for case, run in runs(n, d, kind, dtypes=(torch.float32,), ks=(5,), refine=n < 1000):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run("native"))
            assert found[0] == found[1] == found[2], case


@needs_native
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e30, 1e149])
@pytest.mark.parametrize("metric", COORDINATES)
def test_native_at_the_ends_of_the_range(scale, metric):
    for d in (2, 12):
        points = cloud("normal", 70, d) * scale
        for refine in (False, True):
            found = [
                pf.k_medoids(points, 3, metric=metric, refine=refine, backend=backend).indices.tolist()
                for backend in ("native", "reference")
            ]
            assert found[0] == found[1], (d, refine)


@needs_native
def test_native_reads_any_layout():
    points = torch.from_numpy(cloud("normal", 90, 12))
    expected = pf.k_medoids(points, 4, metric="euclidean", refine=True, backend="native").indices
    wide = torch.zeros(90, 30, dtype=torch.float64)
    wide[:, 3:27:2] = points
    for seen in (points.T.contiguous().T, wide[:, 3:27:2]):
        found = pf.k_medoids(seen, 4, metric="euclidean", refine=True, backend="native").indices
        assert found.tolist() == expected.tolist()


# --- what else may come ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_that_nothing_reaches(backend):
    matrix = distances(cloud("normal", 40, 2), "euclidean")
    matrix[:20, 20:] = matrix[20:, :20] = np.inf
    found = pf.k_medoids(matrix, 2, metric="precomputed", start=[0, 1], backend=backend)
    assert found.objective == np.inf
    found = pf.k_medoids(matrix, 2, metric="precomputed", start=[0, 1], refine=True, backend=backend)
    assert sorted(i // 20 for i in found.indices.tolist()) == [0, 1]
    assert found.objective < np.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_points(backend):
    points = np.zeros((30, 2))
    for refine in (False, True):
        found = pf.k_medoids(points, 30, refine=refine, backend=backend)
        assert sorted(found.indices.tolist()) == list(range(30))
        assert pf.k_medoids(points, 3, refine=refine, backend=backend).objective == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_and_limits(backend):
    points = cloud("normal", 150, 3)

    def run(**options):
        return pf.k_medoids(points, 5, backend=backend, **options).indices.tolist()

    assert run() == run(start=[0, 30, 60, 90, 120]) == run(start=np.arange(5) * 30)
    seeds = [run(start=torch.Generator().manual_seed(seed), refine=True) for seed in (3, 3)]
    assert seeds[0] == seeds[1]
    for refine in (False, True):
        with pytest.warns(RuntimeWarning, match="max_iter=1 "):
            run(max_iter=1, refine=refine)
    with pytest.warns(RuntimeWarning, match="max_iter=1 "):
        limited = pf.k_medoids(points, 5, max_iter=1, refine=True, backend=backend)
    with pytest.warns(RuntimeWarning, match="max_iter=1 "):
        reference = pf.k_medoids(points, 5, max_iter=1, refine=True, backend="reference")
    assert limited.indices.tolist() == reference.indices.tolist()
