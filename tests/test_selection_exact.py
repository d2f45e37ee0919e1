"""Better than greedy: refined k-center, and exact methods, against proven optima and brute force."""

import itertools
import json

import numpy as np
import pytest
import torch
from test_selection import as_points, cloud, distances, values
from test_selection_data import FOLDER, coordinates, shortest_paths

import protofast as pf
from protofast._ops.selection import METRICS
from protofast.selection import exact, exact_dispersion, exact_k_center, refine

instances = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no instances in {FOLDER}; set PROTOFAST_SHARED_DATA to the folder that holds pmed/"
)
FEW, MANY = 10**6, 0
"""Values of refine.MATRIX that take the way of few points, and of many."""


def pmed(number):
    square, k = shortest_paths(f"pmed{number}")
    return square, k, json.loads((FOLDER / "pmed" / "optima.json").read_text())[f"pmed{number}"]["optimum"]


def gkd(path):
    n, m = (int(part[1:]) for part in path.stem.split("_")[-2:])
    square = np.zeros((n, n))
    for i, j, distance in np.loadtxt(path.read_text().splitlines()[1 : 1 + n * (n - 1) // 2]):
        square[int(i) - 1, int(j) - 1] = square[int(j) - 1, int(i) - 1] = distance
    return square, m


def consistent(found, points, metric, mask=None):
    """That what a selection says of its indices is so."""
    chosen = found.indices.numpy()
    allowed = np.ones(len(points), bool) if mask is None else mask
    near = distances(points, metric)[chosen][:, allowed]
    labels = values(points, metric)[chosen][:, allowed].argmin(0)
    np.testing.assert_allclose(found.distances[torch.from_numpy(allowed)], near.min(0), rtol=1e-14)
    np.testing.assert_array_equal(found.labels[torch.from_numpy(allowed)], labels)
    np.testing.assert_allclose(found.radii, np.minimum.accumulate(near).max(1), rtol=1e-14)
    assert found.objective == found.radii[-1]
    assert len(set(chosen)) == len(found)
    assert allowed[chosen].all()


# --- refined k-center -----------------------------------------------------------------------------------------------


@instances
@pytest.mark.parametrize(("matrix", "limit"), [(FEW, 1.005), (MANY, 1.4)])
def test_refined_pmed(monkeypatch, matrix, limit):
    """Greedy averages 1.50."""
    monkeypatch.setattr(refine, "MATRIX", matrix)
    ratios = []
    for number in range(1, 24):
        square, k, optimum = pmed(number)
        found = pf.k_center(square, k, metric="precomputed", refine=True)
        greedy = pf.k_center(square, k, metric="precomputed")
        assert found.bound == greedy.bound <= optimum <= found.objective <= greedy.objective
        consistent(found, square, "precomputed")
        ratios.append(found.objective.item() / optimum)
    assert np.mean(ratios) <= limit


@pytest.mark.parametrize("matrix", [FEW, MANY])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_refined_is_valid_and_better(monkeypatch, matrix, metric, masked):
    monkeypatch.setattr(refine, "MATRIX", matrix)
    x = cloud("normal", n=200, seed=4)
    points = as_points(x, metric)
    mask = np.random.default_rng(1).random(200) < 0.7 if masked else None
    first = [5, 11] if mask is None else np.flatnonzero(mask)[[5, 11]].tolist()
    if masked:
        points = points.copy()
        points[~mask] = np.nan
        clean = as_points(x, metric)
    else:
        clean = points
    for options in ({"start": first[0]}, {"initial": first}):
        greedy = pf.k_center(points, 12, metric=metric, mask=mask, **options)
        found = pf.k_center(points, 12, metric=metric, mask=mask, refine=True, **options)
        consistent(found, clean, metric, mask)
        assert found.objective <= greedy.objective
        if matrix == FEW:  # swaps alone may find nothing
            assert found.objective < greedy.objective
        assert found.bound == greedy.bound
        if "initial" in options:
            assert found.indices[:2].tolist() == first
        at = {index: place for place, index in enumerate(greedy.indices.tolist())}
        assert all(index not in at or at[index] == place for place, index in enumerate(found.indices.tolist()))


@pytest.mark.parametrize("matrix", [FEW, MANY])
@pytest.mark.parametrize("metric", METRICS[:4])
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_refined_is_the_same_on_every_backend(monkeypatch, matrix, metric, kind):
    monkeypatch.setattr(refine, "MATRIX", matrix)
    points = torch.from_numpy(cloud(kind, n=150)).float()
    both = []
    for backend in ("reference", None, None):
        try:
            both.append(pf.k_center(points, 9, metric=metric, refine=True, backend=backend).indices.tolist())
        except RuntimeError as error:  # a backend that is not built
            pytest.skip(str(error))
    assert both[0] == both[1] == both[2]


@pytest.mark.parametrize("matrix", [FEW, MANY])
def test_refined_where_little_is_to_be_done(monkeypatch, matrix):
    monkeypatch.setattr(refine, "MATRIX", matrix)
    for points, k in [(cloud("equal"), 3), (cloud("copies"), 8), (cloud("normal"), 40), (cloud("normal", n=1), 1)]:
        greedy, found = (pf.k_center(points, k, refine=option) for option in (False, True))
        assert found.objective == greedy.objective
        assert found.indices.tolist() == greedy.indices.tolist()
    points = cloud("normal")
    found = pf.k_center(points, 3, initial=[1, 2, 3], refine=True)
    assert found.indices.tolist() == [1, 2, 3]
    one = pf.k_center(points, 1, refine=True)
    assert one.objective == distances(points, "euclidean").max(1).min()  # the 1-center is exact either way


@pytest.mark.parametrize("matrix", [FEW, MANY])
def test_refined_clouds(monkeypatch, matrix):
    monkeypatch.setattr(refine, "MATRIX", matrix)
    points = np.stack([cloud("normal", n=60, seed=s) for s in range(3)])
    lengths = [60, 40, 4]
    for options in ({}, {"initial": [[3, 1], [2, 5], [0, 3]]}):
        found = pf.k_center(points, 6, lengths=lengths, refine=True, **options)
        for number, length in enumerate(lengths):
            more = {"initial": options["initial"][number]} if options else {}
            alone = pf.k_center(points[number, :length], min(6, length), refine=True, **more)
            assert found.indices[number, : len(alone)].tolist() == alone.indices.tolist()
            assert found.objective[number] == alone.objective
            assert found.labels[number, :length].tolist() == alone.labels.tolist()


def test_refined_among_many_points():
    """Clusters whose middle greedy cannot choose: it takes their rims."""
    rng = np.random.default_rng(0)
    middles = np.array(list(itertools.product([0.0, 100.0], repeat=3)))
    rim = rng.standard_normal((8, 600, 3))
    rim /= np.linalg.norm(rim, axis=-1, keepdims=True)
    points = np.concatenate([(middles[:, None] + rim).reshape(-1, 3), middles])
    assert len(points) > refine.MATRIX
    assert pf.k_center(points, 8).objective > 1.8
    found = pf.k_center(torch.from_numpy(points), 8, refine=True)
    assert sorted(found.indices.tolist()) == list(range(4800, 4808))
    assert found.objective == pytest.approx(1)


def test_refine_with_a_process_group_is_refused():
    with pytest.raises(ValueError, match="refine"):
        pf.k_center(cloud("normal"), 3, refine=True, process_group=object())


# --- exact k-center -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "grid", "copies"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_exact_k_center_against_every_choice(metric, kind, k):
    points = as_points(cloud(kind, n=14, seed=k), metric)
    found = exact_k_center(points, k, metric=metric)
    consistent(found, points, metric)
    d = distances(points, metric)
    best = min(d[list(some)].min(0).max() for some in itertools.combinations(range(14), k))
    assert found.objective.item() == pytest.approx(best, rel=1e-14)
    assert found.bound == found.objective


@pytest.mark.parametrize("poor", [False, True])
def test_exact_k_center_without_triangle_inequality_or_search(monkeypatch, poor):
    """A poor start leaves the work to the integer programs."""
    if poor:
        monkeypatch.setattr(exact, "search", lambda values, chosen, **_: chosen)
    for seed in range(6):
        d = np.random.default_rng(seed).integers(1, 50, (16, 16)).astype(float)
        d = d + d.T
        np.fill_diagonal(d, 0)
        found = exact_k_center(d, 4, metric="precomputed")
        best = min(d[list(some)].min(0).max() for some in itertools.combinations(range(16), 4))
        assert found.objective == found.bound == best


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("poor", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_exact_k_center_with_unreachable_points(monkeypatch, poor, share):
    """Also of one whose optimum is infinite."""
    if poor:
        monkeypatch.setattr(exact, "search", lambda values, chosen, **_: chosen)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        d = rng.integers(1, 50, (12, 12)).astype(float)
        d[rng.random((12, 12)) < share] = np.inf
        d = d + d.T
        np.fill_diagonal(d, 0)
        found = exact_k_center(d, 3, metric="precomputed")
        best = min(d[list(some)].min(0).max() for some in itertools.combinations(range(12), 3))
        assert found.objective == found.bound == best


def test_search_is_short_where_little_can_be_swapped(monkeypatch):
    steps = []
    cover = refine._cover_within

    def counted(values, radius, chosen, fixed, swaps):
        steps.append(swaps)
        return cover(values, radius, chosen, fixed, swaps)

    monkeypatch.setattr(refine, "_cover_within", counted)
    points = cloud("normal", n=12, d=2)
    d = distances(points, "euclidean")
    best = min(d[list(some)].min(0).max() for some in itertools.combinations(range(12), 3))
    assert pf.k_center(points, 3, refine=True).objective == best
    assert 0 < max(steps) < 40
    steps.clear()
    pf.k_center(cloud("normal", n=300), 20, refine=True)
    assert max(steps) == refine.SWAPS
    steps.clear()
    thirds = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])  # the optimum is half of greedy's
    assert pf.k_center(thirds, 2, refine=True).objective == 1
    assert exact_k_center(thirds, 2).indices.tolist() == [1, 4]
    assert len(steps) <= 4  # none in vain


@instances
@pytest.mark.parametrize("number", range(1, 24))
def test_exact_pmed(number):
    square, k, optimum = pmed(number)
    found = exact_k_center(square, k, metric="precomputed")
    assert found.objective == found.bound == optimum
    assert square[found.indices].min(0).max() == optimum


HARD = [("u1060", 20), ("u1060", 30), ("u1060", 50), ("rl1323", 20), ("rl1323", 50)]
TSPLIB = [
    pytest.param(name, k, marks=[pytest.mark.slow] if (name, k) in HARD else [])
    for name, k in [("u1060", 10), ("rl1323", 10), *HARD]
]


@instances
@pytest.mark.parametrize(("name", "k"), TSPLIB)
def test_exact_tsplib(name, k):
    known = json.loads((FOLDER / "tsplib" / "optima.json").read_text())
    (optimum,) = [entry["optimum"] for entry in known if (entry["name"], entry["k"]) == (name, k)]
    found = exact_k_center(coordinates(name), k)
    assert found.objective == found.bound
    assert found.objective.item() == pytest.approx(optimum, abs=0.01)  # given to two decimals


@instances
def test_time_limit_leaves_a_gap():
    points = coordinates("u1060")
    with pytest.warns(RuntimeWarning, match=r"stopped undecided after time_limit=1e-09.*give more time"):
        found = exact_k_center(points, 20, time_limit=1e-9)
    assert 0.5 * 1580 < found.bound < 1580.80 <= found.objective + 0.01 < 1.1 * 1580
    consistent(found, points, "euclidean")
    square, k, optimum = pmed(1)
    assert exact_k_center(square, k, metric="precomputed", time_limit=1e6).bound == optimum


def test_linear_programs_raise_the_bound(monkeypatch):
    """Where the integer program gives up, what the linear ones proved stays."""
    optimize = pytest.importorskip("scipy.optimize")
    milp = optimize.milp

    def give_up(*arguments, integrality, **options):
        if integrality.any():
            options["options"]["time_limit"] = 0.0
        return milp(*arguments, integrality=integrality, **options)

    monkeypatch.setattr(optimize, "milp", give_up)
    monkeypatch.setattr(exact, "search", lambda values, chosen, **_: chosen)
    points = cloud("normal", n=120, d=2, seed=2)
    greedy = pf.k_center(points, 10)
    with pytest.warns(RuntimeWarning):
        found = exact_k_center(points, 10, time_limit=1000)
    monkeypatch.undo()
    optimum = exact_k_center(points, 10)
    assert optimum.bound == optimum.objective
    assert 1.3 * greedy.bound < found.bound < found.objective
    assert found.bound <= optimum.objective <= found.objective


@pytest.mark.parametrize("solve", [exact_k_center, exact_dispersion])
def test_what_exact_methods_refuse(monkeypatch, solve):
    if solve is exact_dispersion:
        pytest.importorskip("ortools", reason="pip install 'protofast[exact]'")
        with pytest.raises(ValueError, match=r"k is 1; .* at least 2"):
            solve(cloud("normal"), 1)
    with pytest.raises(ValueError, match=r"points has 20000 rows; .*\(3 GB here\) and at most 10000 points: k_"):
        solve(torch.zeros(20_000, 2), 3)
    with pytest.raises(ValueError, match="time_limit is 0; give seconds above 0"):
        solve(cloud("normal"), 3, time_limit=0)
    for wrong in ("1", [1], 1j):
        with pytest.raises(TypeError, match=r"time_limit is .*; give seconds above 0"):
            solve(cloud("normal"), 3, time_limit=wrong)
    for shape in ((), (5,)):
        with pytest.raises(ValueError, match=r"points has shape \(5?,?\); give \(n, d\)"):
            solve(torch.ones(shape), 3)
    with pytest.raises(ValueError, match="k is 41"):
        solve(cloud("normal"), 41)
    with pytest.raises(ValueError, match="metric is 'l3'"):
        solve(cloud("normal"), 3, metric="l3")


# --- exact dispersion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_exact_dispersion_against_every_choice(metric, kind):
    pytest.importorskip("ortools", reason="pip install 'protofast[exact]'")
    points = as_points(cloud(kind, n=13, seed=1), metric)
    for k in (2, 3, 5):
        found = exact_dispersion(points, k, metric=metric)
        d = distances(points, metric)
        sets = itertools.combinations(range(13), k)
        best = max(d[np.ix_(some, some)][np.triu_indices(k, 1)].min() for some in sets)
        assert found.objective.item() == pytest.approx(best, rel=1e-14)
        assert found.bound == found.objective


@instances
@pytest.mark.parametrize("path", sorted((FOLDER / "mdplib").glob("GKD-b_*.txt")), ids=lambda path: path.stem)
def test_refined_dispersion_against_the_optimum(path):
    pytest.importorskip("ortools", reason="pip install 'protofast[exact]'")
    square, m = gkd(path)
    best = exact_dispersion(square, m, metric="precomputed")
    chosen = best.indices
    assert square[np.ix_(chosen, chosen)][np.triu_indices(m, 1)].min() == best.objective == best.bound
    refined = pf.k_dispersion(square, m, metric="precomputed")
    assert best.objective <= refined.bound
    assert 0.5 * best.objective <= refined.objective <= best.objective
