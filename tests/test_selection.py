"""Selection against plain numpy loops in float64; indices compared exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import protofast as pf
from protofast._ops.selection import METRICS, OBJECTIVES
from protofast.selection import inputs

COORDINATES = METRICS[:4]


# --- the oracle -----------------------------------------------------------------------------------------------------


def values(points, metric):
    """n × n: what choices compare (squares for euclidean and cosine), straight from the definition."""
    x = np.asarray(points, dtype=np.float64)
    if metric == "precomputed":
        return x
    if metric == "cosine":
        norm = np.sqrt((x * x).sum(1, keepdims=True))
        x = np.hstack([x / np.where(norm > 0, norm, 1), norm == 0])
    gaps = (x - row for row in x)
    return np.array([(np.abs(gap) if metric == "manhattan" else gap * gap).sum(-1) for gap in gaps])


def distances(points, metric):
    v = values(points, metric)
    return {"euclidean": np.sqrt(v), "cosine": v / 2}.get(metric, v)


def oracle_k_center(points, k, metric, first, allowed):
    v, chosen, radii = values(points, metric), list(first), []
    for number in range(k):
        if number >= len(first):
            best, pick = -1.0, None
            for i in allowed:
                if i not in chosen and (near := min(v[c, i] for c in chosen)) > best:
                    best, pick = near, i
            chosen.append(pick)
        d = distances(points, metric)
        radii.append(max(min(d[c, i] for c in chosen[: number + 1]) for i in allowed))
    return chosen, radii


def oracle_cover(points, chosen, metric):
    near = values(points, metric)[chosen]
    labels = near.argmin(0)  # the first of equals
    return labels, distances(points, metric)[np.asarray(chosen)[labels], np.arange(len(points))]


def oracle_pair(points, metric, allowed):
    v, best, pair = values(points, metric), -1.0, None
    for i, j in itertools.combinations(allowed, 2):
        if v[i, j] > best:
            best, pair = v[i, j], (i, j)
    return pair


def oracle_k_medoids(points, medoids, metric, max_iter=100):
    d, medoids = distances(points, metric), list(medoids)
    for _ in range(max_iter):
        label = [min(range(len(medoids)), key=lambda m: d[medoids[m], i]) for i in range(len(points))]
        for number, medoid in enumerate(medoids):
            label[medoid] = number
        new = []
        for number in range(len(medoids)):
            members = [i for i in range(len(points)) if label[i] == number]
            new.append(min(members, key=lambda i: sum(d[i, j] for j in members)))
        if new == medoids:
            break
        medoids = new
    return medoids


def as_points(x, metric):
    """Points for any metric: a distance matrix where one is wanted."""
    return distances(x, "euclidean") if metric == "precomputed" else x


def cloud(kind, n=40, d=3, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.standard_normal((n, d))
    if kind == "grid":  # ties everywhere, exact in every dtype
        return rng.integers(-2, 3, (n, d)).astype(np.float64)
    if kind == "line":
        return np.arange(n, dtype=np.float64)[:, None] * np.ones(d)
    if kind == "copies":
        return rng.integers(0, 2, (n, d)).astype(np.float64) * 4
    return np.full((n, d), 2.0)  # "equal"


KINDS = ("normal", "grid", "line", "copies", "equal")


# --- k-center -------------------------------------------------------------------------------------------------------


def check_k_center(points, k, metric, first, mask=None, **options):
    n = len(points)
    allowed = [i for i in range(n) if mask is None or mask[i]]
    found = pf.k_center(torch.from_numpy(points), k, metric=metric, mask=mask, **options)
    chosen, radii = oracle_k_center(points, k, metric, first, allowed)
    assert found.indices.tolist() == chosen
    labels, near = oracle_cover(points, chosen, metric)
    outside = np.setdiff1d(np.arange(n), allowed)
    labels[outside], near[outside] = -1, np.inf
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.distances, near, rtol=1e-14)
    np.testing.assert_allclose(found.radii, radii, rtol=1e-14)
    assert found.objective == found.radii[-1]
    assert found.bound == found.objective / (4 if metric in ("sqeuclidean", "cosine") else 2)
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 9, 40])
def test_k_center_makes_the_oracles_choices(metric, kind, k):
    points = cloud(kind)
    if metric == "cosine" and kind != "normal":  # normalising rounds, so only powers of two keep ties exact
        points = np.sign(points) * [[1, 0, 0], [0, 2, 0], [0, 0, 4], [0, 0, 0]][k % 4]
    check_k_center(as_points(points, metric), k, metric, [0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_starts(metric, masked):
    x = cloud("normal", seed=3)
    points = as_points(x, metric)
    mask = np.random.default_rng(1).random(40) < 0.6 if masked else None
    allowed = np.flatnonzero(mask) if masked else np.arange(40)
    last = int(allowed[-1])
    check_k_center(points, 6, metric, [last], mask, start=last)
    check_k_center(points, 6, metric, list(allowed[[4, 1]]), mask, initial=allowed[[4, 1]].tolist())
    check_k_center(points, 6, metric, oracle_pair(points, metric, allowed), mask, start="farthest-pair")
    check_k_center(points, 1, metric, oracle_pair(points, metric, allowed)[:1], mask, start="farthest-pair")
    y = x / np.sqrt((x * x).sum(1, keepdims=True)) if metric == "cosine" else x
    gap = y[allowed] - y[allowed].mean(0)
    size = np.abs(gap).sum(1) if metric == "manhattan" else (gap * gap).sum(1)
    check_k_center(points, 6, metric, [allowed[size.argmin()]], mask, start="center")
    found = [
        pf.k_center(points, 6, metric=metric, mask=mask, start=torch.Generator().manual_seed(s)).indices
        for s in (1, 1, 2)
    ]
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()
    assert {int(f[0]) for f in found} <= set(allowed.tolist())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
@pytest.mark.parametrize("metric", COORDINATES)
def test_every_dtype_is_taken_at_its_own_values(dtype, metric):
    points = torch.from_numpy(cloud("normal", n=60, d=5) * 20 + 100).to(dtype)
    chosen, _ = oracle_k_center(points.double().numpy(), 8, metric, [0], range(60))
    assert pf.k_center(points, 8, metric=metric).indices.tolist() == chosen
    assert pf.farthest_pair(points, metric=metric)[:2] == oracle_pair(points.double().numpy(), metric, range(60))


@pytest.mark.parametrize("offset", [1e6, 1e7])
def test_no_cancellation_far_from_the_origin(offset):
    """The norm identity in float32, or even rounding to float32 in between, would lose these distances."""
    points = torch.from_numpy(cloud("normal", n=300, d=4) * 4).float() + offset
    exact = points.double().numpy()
    assert len(np.unique(exact, axis=0)) > 100
    chosen, _ = oracle_k_center(exact, 12, "euclidean", [0], range(300))
    assert pf.k_center(points, 12).indices.tolist() == chosen
    assert pf.farthest_pair(points)[:2] == oracle_pair(exact, "euclidean", range(300))


def test_strides_and_arrays():
    big = torch.from_numpy(cloud("normal", n=120, d=8))
    for view in (big[::2, ::3], big.T[:, 5:90], big[:, :1].expand(-1, 4)):
        same = pf.k_center(view.contiguous(), 5)
        assert torch.equal(pf.k_center(view, 5).indices, same.indices)
        assert torch.equal(pf.k_center(view.numpy(), 5).indices, same.indices)
    array = big.numpy()[::-1]
    assert torch.equal(pf.k_center(array, 5).indices, pf.k_center(array.copy(), 5).indices)
    frozen = big.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(pf.k_center(frozen, 5).indices, pf.k_center(big, 5).indices)


def test_masked_rows_may_hold_anything():
    points = cloud("normal", n=30)
    mask = np.arange(30) % 3 != 1
    mask[0] = True
    dirty = points.copy()
    dirty[~mask] = np.nan
    for choose in (pf.k_center, pf.k_dispersion):
        found, subset = choose(dirty, 7, mask=mask), choose(points[mask], 7)
        assert found.indices.tolist() == np.flatnonzero(mask)[subset.indices].tolist()
        assert found.labels[mask].tolist() == subset.labels.tolist()
        assert (found.labels[~mask] == -1).all()
        assert found.distances[~mask].isinf().all()
        assert found.objective == subset.objective
        assert found.bound == subset.bound
    square = distances(points, "euclidean")
    square[~mask] = np.nan
    square[:, ~mask] = -1
    assert pf.k_center(square, 7, metric="precomputed", mask=mask).indices.tolist() == (
        pf.k_center(dirty, 7, mask=mask).indices.tolist()
    )


def test_copies_are_chosen_last_and_no_index_twice():
    points = np.repeat(np.arange(5.0)[:, None], 6, 0)
    found = pf.k_center(points, 30)
    assert {i // 6 for i in found.indices[:5].tolist()} == set(range(5))
    assert sorted(found.indices.tolist()) == list(range(30))
    assert found.radii[4:].tolist() == [0] * 26
    assert sorted(pf.k_dispersion(points, 30).indices.tolist()) == list(range(30))
    assert sorted(pf.k_dispersion(points, 30, objective="max-sum").indices.tolist()) == list(range(30))
    assert sorted(pf.k_medoids(points * 0, 30).indices.tolist()) == list(range(30))


def test_unreachable_points():
    """Infinite distances, as between the parts of a graph."""
    square = np.array([[0, 1, np.inf, np.inf], [1, 0, np.inf, np.inf], [np.inf, np.inf, 0, 3], [np.inf, np.inf, 3, 0]])
    found = pf.k_center(square, 3, metric="precomputed")
    assert found.indices.tolist() == [0, 2, 3]
    assert found.radii.tolist() == [math.inf, 3, 1]
    assert pf.farthest_pair(square, metric="precomputed") == (0, 2, math.inf)


def test_zero_vectors_are_a_direction_of_their_own():
    points = np.array([[1.0, 0], [0, 0], [2, 0], [0, 0], [0, 8]])
    found = pf.k_center(points, 3, metric="cosine")
    assert found.indices.tolist() == [0, 1, 4]
    assert found.distances.tolist() == [0] * 5
    assert found.radii.tolist() == [1, 1, 0]


@pytest.mark.parametrize("metric", COORDINATES)
def test_no_dimensions(metric):
    points = torch.empty(4, 0)
    assert pf.k_center(points, 4, metric=metric).indices.tolist() == [0, 1, 2, 3]
    assert pf.farthest_pair(points, metric=metric) == (0, 1, 0.0)
    assert pf.k_dispersion(points, 2, metric=metric).objective == 0
    assert len(pf.k_medoids(points, 2, metric=metric)) == 2


@pytest.mark.parametrize("metric", METRICS)
def test_one_point(metric):
    points = np.zeros((1, 1))
    for start in (0, "center", "farthest-pair", torch.Generator()):
        found = pf.k_center(points, 1, metric=metric, start=start)
        assert (found.indices.tolist(), found.objective, found.bound) == ([0], 0, 0)
    assert pf.k_dispersion(points, 1, metric=metric).objective == math.inf
    assert pf.k_dispersion(points, 1, metric=metric, objective="max-sum").objective == 0
    assert pf.k_medoids(points, 1, metric=metric).indices.tolist() == [0]


# --- the optimum by enumeration -------------------------------------------------------------------------------------


def radius(d, chosen, allowed):
    return d[np.ix_(chosen, allowed)].min(0).max()


def smallest(d, chosen):
    return min(d[i, j] for i, j in itertools.combinations(chosen, 2))


def total(d, chosen):
    return sum(d[i, j] for i, j in itertools.combinations(chosen, 2))


SMALL = [(kind, seed, masked) for kind in ("normal", "grid", "line") for seed in (0, 1) for masked in (False, True)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "seed", "masked"), SMALL)
def test_k_center_bound_holds(metric, kind, seed, masked):
    n = 11
    points = as_points(cloud(kind, n, 2, seed), metric)
    mask = np.arange(n) % 4 != 3 if masked else np.ones(n, bool)
    allowed, d = np.flatnonzero(mask), distances(points, metric)
    factor, slack = (4 if metric in ("sqeuclidean", "cosine") else 2), 1e-12
    for k in (1, 2, 4):
        best = min(radius(d, list(c), allowed) for c in itertools.combinations(allowed, k))
        for start in (0, "center", "farthest-pair"):
            found = pf.k_center(points, k, metric=metric, mask=mask, start=start)
            assert found.bound <= best + slack
            assert best - slack <= found.objective <= factor * best + slack
        first = allowed[[2, 5]][: max(1, k - 1)].tolist()
        rest = [i for i in allowed if i not in first]
        best = min(radius(d, first + list(c), allowed) for c in itertools.combinations(rest, k - len(first)))
        found = pf.k_center(points, k, metric=metric, mask=mask, initial=first)
        assert found.bound <= best + slack
        assert best - slack <= found.objective
        if k > len(first):
            assert found.objective <= factor * best + slack


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("kind", "seed", "masked"), SMALL)
def test_k_dispersion_bound_holds(metric, objective, kind, seed, masked):
    n = 11
    points = as_points(cloud(kind, n, 2, seed), metric)
    mask = np.arange(n) % 4 != 3 if masked else np.ones(n, bool)
    allowed, d = np.flatnonzero(mask), distances(points, metric)
    measure = smallest if objective == "max-min" else total
    for k in (2, 3, 5):
        best = max(measure(d, c) for c in itertools.combinations(allowed, k))
        plain, refined = (
            pf.k_dispersion(points, k, objective=objective, metric=metric, mask=mask, refine=refine)
            for refine in (False, True)
        )
        assert plain.objective <= refined.objective + 1e-12
        for found in (plain, refined):
            chosen = found.indices.tolist()
            assert len(set(chosen)) == k
            assert mask[chosen].all()
            np.testing.assert_allclose(found.objective, measure(d, chosen), rtol=1e-13)
            assert found.objective <= best + 1e-12
            assert found.bound >= best - 1e-12
        if metric in ("euclidean", "manhattan", "precomputed"):
            assert plain.objective >= best / 2 - 1e-12
        if objective == "max-min" and metric in ("sqeuclidean", "cosine"):
            assert plain.objective >= best / 4 - 1e-12


def oracle_max_sum(points, k, metric):
    d = distances(points, metric)
    chosen = list(oracle_pair(points, metric, range(len(points))))
    while len(chosen) < k:
        gain = {i: sum(d[c, i] for c in chosen) for i in range(len(points)) if i not in chosen}
        chosen.append(max(gain, key=gain.get))
    return chosen


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "grid", "line"])
def test_greedy_dispersion_makes_the_oracles_choices(metric, kind):
    if metric == "cosine" and kind != "normal":
        pytest.skip("normalising rounds, so ties are not exact")
    points = as_points(cloud(kind), metric)
    if kind == "normal" or metric in ("sqeuclidean", "manhattan"):  # else sums of roots round differently
        found = pf.k_dispersion(points, 8, objective="max-sum", metric=metric, refine=False)
        assert found.indices.tolist() == oracle_max_sum(points, 8, metric)
    first = oracle_pair(points, metric, range(40))
    found = pf.k_dispersion(points, 8, metric=metric, refine=False)
    chosen, radii = oracle_k_center(points, 8, metric, first, range(40))
    assert found.indices.tolist() == chosen
    np.testing.assert_allclose(found.radii, radii, rtol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_refinement_ends_where_no_swap_helps(objective):
    better = 0
    n, d, k = (60, 2, 6) if objective == "max-min" else (100, 8, 10)  # greedy sums in the plane leave nothing to mend
    for seed in range(8):
        points = cloud("normal", n, d, seed)
        square = distances(points, "euclidean")
        measure = smallest if objective == "max-min" else total
        plain, found = (pf.k_dispersion(points, k, objective=objective, refine=refine) for refine in (False, True))
        better += bool(found.objective > plain.objective)
        chosen = found.indices.tolist()
        for number, new in itertools.product(range(k), range(n)):
            if new not in chosen:
                swapped = [*chosen[:number], new, *chosen[number + 1 :]]
                assert measure(square, swapped) <= float(found.objective) * (1 + 1e-11)
        assert found.objective <= found.bound
    assert better >= 4


# --- farthest pair --------------------------------------------------------------------------------------------------


def brute_pair(points, metric):
    """The first largest entry above the diagonal."""
    v = np.triu(values(points, metric), 1)
    v[np.tril_indices(len(v))] = -1
    return tuple(divmod(int(v.argmax()), len(v)))


def circle(n, phase=0.1):
    angle = np.arange(n) * (2 * np.pi / n) + phase
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def adversaries():
    rng = np.random.default_rng(5)
    yield "circle", circle(1500)
    yield "odd circle", circle(1499)
    yield "rounded circle", np.round(circle(1400) * 64)
    yield "diamond", np.array([(a, 300 - a) for a in range(301)] + [(-a, a - 300) for a in range(301)], float)
    yield "sphere", (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(rng.standard_normal((900, 50)))
    yield "one-hot classes", np.eye(6)[rng.integers(0, 6, 1200)]
    yield "copies", rng.integers(0, 3, (1200, 4)).astype(float)
    yield "corners", rng.integers(0, 2, (1500, 8)).astype(float)
    yield "signed zeros", rng.integers(0, 2, (1200, 4)) * np.array(-0.0) + np.eye(4)[rng.integers(0, 4, 1200)]
    yield "line", np.linspace(-1, 1, 1100)[rng.permutation(1100), None] * np.array([[3.0, 4.0]])
    yield "equal", np.full((1000, 3), 0.1)
    yield "far from the origin", rng.standard_normal((1000, 3)) + 1e8
    yield "outliers", np.vstack([rng.standard_normal((1200, 40)), 30 * np.eye(40)])
    yield (
        "low rank",
        rng.standard_normal((900, 3)) @ rng.standard_normal((3, 60)) + 0.01 * rng.standard_normal((900, 60)),
    )
    yield "huge and tiny", rng.standard_normal((700, 40)) * np.logspace(-60, 60, 40)
    yield "two", rng.standard_normal((2, 3))


@pytest.mark.parametrize("metric", COORDINATES)
@pytest.mark.parametrize(("name", "points"), [pytest.param(*case, id=case[0]) for case in adversaries()])
def test_farthest_pair_is_exact(metric, name, points):
    if metric == "cosine" and name not in ("sphere", "outliers", "low rank", "one-hot classes", "two"):
        pytest.skip("ties of normalised points are not exact")
    i, j, distance = pf.farthest_pair(points, metric=metric)
    expected = brute_pair(points, metric)
    rounded = {"sphere", "low rank", "line", "circle", "odd circle", "huge and tiny"}
    if name in rounded or (name, metric) == ("outliers", "manhattan"):  # there are equals up to rounding
        v = values(points, metric)
        assert v[i, j] >= v[expected] * (1 - 1e-13)
        assert i < j
    else:
        assert (i, j) == expected
    np.testing.assert_allclose(distance, distances(points[[i, j]], metric)[0, 1], rtol=1e-13)


def test_farthest_pair_of_more_points_than_a_tile_holds():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((5000, 60))
    squares = (points**2).sum(1)
    gram = squares[:, None] + squares - 2 * points @ points.T
    assert pf.farthest_pair(points)[:2] == tuple(sorted(divmod(int(gram.argmax()), 5000)))
    square = rng.integers(1, 10**6, (1100, 1100)).astype(float)
    square = np.triu(square, 1) + np.triu(square, 1).T
    assert pf.farthest_pair(square, metric="precomputed")[:2] == brute_pair(square, "precomputed")


# --- k-medoids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 40])
def test_k_medoids_makes_the_oracles_choices(metric, kind, k):
    if kind != "normal" and metric in ("cosine", "euclidean", "precomputed"):
        pytest.skip("sums of roots round, so ties are not exact")
    points = as_points(cloud(kind), metric)
    for start, first in ((None, np.arange(k) * 40 // k), (np.random.default_rng(k).permutation(40)[:k],) * 2):
        found = pf.k_medoids(points, k, metric=metric, start=start)
        chosen = oracle_k_medoids(points, first, metric)
        assert found.indices.tolist() == chosen
        labels, near = oracle_cover(points, chosen, metric)
        assert found.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(found.objective, near.sum(), rtol=1e-13)
        assert found.bound.isnan()


def test_k_medoids_in_several_blocks():
    points = cloud("grid", 2300, 6) * 8 + np.random.default_rng(1).integers(0, 4, (2300, 6))
    square = distances(points, "manhattan")
    found = pf.k_medoids(points, 2)
    assert found.indices.tolist() == oracle_blocks(square, [0, 1150])
    assert pf.k_medoids(square, 2, metric="precomputed").indices.tolist() == found.indices.tolist()


def oracle_blocks(d, medoids):
    while True:
        labels = d[medoids].argmin(0)
        members = [np.flatnonzero(labels == number) for number in range(len(medoids))]
        new = [int(m[d[np.ix_(m, m)].sum(1).argmin()]) for m in members]
        if new == medoids:
            return medoids
        medoids = new


def test_k_medoids_start_and_limit():
    points = cloud("normal", 200)
    runs = [pf.k_medoids(points, 5, start=torch.Generator().manual_seed(s)).indices.tolist() for s in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    with pytest.warns(RuntimeWarning, match="max_iter=1 "):
        assert pf.k_medoids(points, 5, max_iter=1).indices.tolist() == (
            oracle_k_medoids(points, np.arange(5) * 40, "manhattan", max_iter=1)
        )


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def integer_clouds(draw):
    n, d = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    flat = draw(st.lists(st.integers(-3, 3), min_size=n * d, max_size=n * d))
    return np.array(flat, dtype=np.float64).reshape(n, d)


@settings(max_examples=60, deadline=None)
@given(points=integer_clouds(), data=st.data(), metric=st.sampled_from(["euclidean", "sqeuclidean", "manhattan"]))
def test_properties(points, data, metric):
    n = len(points)
    k = data.draw(st.integers(1, n))
    start = data.draw(st.integers(0, n - 1))
    found = check_k_center(points, k, metric, [start], start=start)
    assert (found.radii.diff() <= 0).all()
    moved = pf.k_center(points + 64, k, metric=metric, start=start)
    assert torch.equal(found.indices, moved.indices)
    assert torch.equal(found.radii, moved.radii)
    if n > 1:
        assert pf.farthest_pair(points, metric=metric)[:2] == brute_pair(points, metric)
    # Continuing from a prefix is the same run.
    again = pf.k_center(points, k, metric=metric, initial=found.indices[: (k + 1) // 2])
    assert torch.equal(found.indices, again.indices)


# --- errors ---------------------------------------------------------------------------------------------------------


POINTS = cloud("normal", 6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pf.k_center(POINTS, 0), ValueError, "k is 0; give 1 to 6"),
        (lambda: pf.k_center(POINTS, 7), ValueError, "k is 7; give 1 to 6"),
        (
            lambda: pf.k_center(POINTS, 5, mask=np.arange(6) < 4),
            ValueError,
            "k is 5; give 1 to 4, the number of allowed",
        ),
        (lambda: pf.k_center(POINTS, 2.0), TypeError, "k is 2.0"),
        (lambda: pf.k_center(POINTS[:0], 1), ValueError, "at least one point"),
        (lambda: pf.k_center(POINTS[0], 1), ValueError, r"shape \(3,\); give \(n, d\), as points\[:, None\] is"),
        (lambda: pf.k_center([[1.0]], 1), TypeError, "points is a list"),
        (lambda: pf.k_center(POINTS + 1j, 1), TypeError, "complex128"),
        (lambda: pf.k_center(POINTS, 1, metric="l2"), ValueError, "metric is 'l2'"),
        (lambda: pf.k_center(POINTS, 1, metric="precomputed"), ValueError, r"\(n, n\)"),
        (lambda: pf.k_center(-np.ones((2, 2)), 1, metric="precomputed"), ValueError, "row 0, column 0"),
        (lambda: pf.k_center(np.ones((2, 2)), 1, metric="precomputed"), ValueError, r"points\[0, 0\] is 1.0"),
        (lambda: pf.k_center(POINTS, 1, start=6), IndexError, "start is 6; points has 0 to 5"),
        (lambda: pf.k_center(POINTS, 1, start=-1), IndexError, "start is -1"),
        (lambda: pf.k_center(POINTS, 1, start="middle"), ValueError, "start is 'middle'"),
        (lambda: pf.k_center(POINTS, 1, start=0.5), TypeError, "start is 0.5"),
        (lambda: pf.k_center(POINTS, 1, mask=np.arange(6) > 2), ValueError, "start is 0, which mask leaves out"),
        (lambda: pf.k_center(POINTS, 2, initial=[3, 3]), ValueError, "initial holds an index twice"),
        (lambda: pf.k_center(POINTS, 2, initial=[3, 9]), IndexError, "initial runs from 3 to 9"),
        (lambda: pf.k_center(POINTS, 2, initial=[0, 1, 2]), ValueError, r"initial has shape \(3,\)"),
        (lambda: pf.k_center(POINTS, 2, initial=np.ones(2)), TypeError, "initial is torch.float64"),
        (
            lambda: pf.k_center(POINTS, 2, initial=[1], mask=np.arange(6) > 2),
            ValueError,
            "initial holds index 1, which",
        ),
        (lambda: pf.k_center(POINTS, 1, mask=np.zeros(6, bool)), ValueError, "mask is False everywhere"),
        (lambda: pf.k_center(POINTS, 1, mask=np.ones(6)), TypeError, "mask is torch.float64"),
        (lambda: pf.k_center(POINTS, 1, mask=np.ones(5, bool)), ValueError, r"mask has shape \(5,\)"),
        (lambda: pf.k_center(POINTS, 1, process_group=object()), TypeError, "process_group is"),
        (lambda: pf.k_center(POINTS, 1, backend="magic"), ValueError, "magic"),
        (lambda: pf.k_dispersion(POINTS, 2, objective="sum"), ValueError, "objective is 'sum'"),
        (lambda: pf.k_medoids(POINTS, 2, start=[1]), ValueError, "start holds 1 indices; give k = 2"),
        (lambda: pf.k_medoids(POINTS, 2, max_iter=0), ValueError, "max_iter is 0"),
        (lambda: pf.k_medoids(POINTS, 2, max_iter=2.5), TypeError, "max_iter is 2.5; give an integer"),
        (lambda: pf.farthest_pair(POINTS[:1]), ValueError, "at least two"),
        (lambda: pf.farthest_pair(POINTS, backend="magic"), ValueError, "magic"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


SOME = torch.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.ma.masked_greater(SOME.numpy(), 6), "is a masked array; .* mask="),
        (SOME.numpy().astype(">f8"), r"is an array of >f8, .*; give \.astype\('<f8'\)"),
        (SOME.numpy().astype(object), "is an array of object"),
        (SOME.numpy().astype(str), "is an array of <U"),
        (SOME.numpy().astype(np.longdouble), "is an array of"),
        (np.zeros(4, [("x", float)]), "is an array of"),
        (SOME.numpy().astype("datetime64[s]"), "is an array of datetime64"),
        (SOME.to_sparse(), "is a sparse or nested tensor; give a dense one"),
        (SOME.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn; give float16"),
        (SOME.to("meta"), "is a meta tensor"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_holds_no_numbers_is_refused(points, words):
    for choose in (pf.k_center, pf.k_dispersion, pf.k_medoids, pf.selection.exact_k_center):
        with pytest.raises(TypeError, match="^points " + words):
            choose(points, 2)
    with pytest.raises(TypeError, match="^points " + words):
        pf.farthest_pair(points)
    with pytest.raises(TypeError, match="^a batch " + words):
        pf.selection.stream_k_center([points], 2)
    with pytest.raises(TypeError, match="^mask " + words):
        pf.k_center(SOME, 2, mask=points)


def test_whether_initial_points_are_given():
    assert [inputs.given(none) for none in (None, [], (), np.empty(0), torch.empty(0))] == [False] * 5
    assert all(inputs.given(some) for some in ([0], (0, 1), range(2), np.ones(1), torch.ones(1), [[0], [1]]))
    for one in (np.array(3), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"^initial has shape \(\); give a list"):
            inputs.given(one)
    for wrong in (3, np.int64(3), iter([1, 2]), 2.5):
        with pytest.raises(TypeError, match=r"^initial is .*; give a list of integer indices"):
            inputs.given(wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bad_numbers_are_refused_in_every_dtype(bad, dtype):
    points = torch.arange(12, dtype=dtype).reshape(6, 2)
    points[4, 1] = bad
    mask = torch.ones(6, dtype=torch.bool)
    words = f"holds {bad} in row 4, column 1; give finite numbers"
    for call in (
        lambda: pf.k_center(points, 2),
        lambda: pf.k_center(points, 2, start=4),
        lambda: pf.k_center(points, 2, start="center"),
        lambda: pf.k_center(points, 2, mask=mask),
        lambda: pf.k_center(points[None], 2),
        lambda: pf.k_dispersion(points, 2),
        lambda: pf.k_medoids(points, 2),
        lambda: pf.farthest_pair(points),
        lambda: pf.selection.exact_k_center(points, 2),
        lambda: pf.selection.stream_k_center(points, 2),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    points[4, 1] = min(1e150, torch.finfo(dtype).max)
    assert pf.farthest_pair(points)[0] == 0
    assert pf.farthest_pair(points)[1] == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("choose", [pf.k_center, pf.k_dispersion, pf.k_medoids])
def test_bad_numbers_are_refused_with_their_row(bad, choose):
    points = torch.zeros(5000, 2, dtype=torch.float64)
    points[4711, 1] = bad
    with pytest.raises(ValueError, match="row 4711, column 1"):
        choose(points, 2)
    square = torch.zeros(5, 5)
    square[3, 4] = math.nan
    with pytest.raises(ValueError, match="row 3, column 4"):
        choose(square, 2, metric="precomputed")


# --- the ops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", range(len(METRICS)), ids=METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(metric, masked):
    points = torch.from_numpy(as_points(cloud("normal", 12), METRICS[metric])).float()
    mask = torch.arange(12) % 5 != 4 if masked else None
    first, ops = torch.tensor([1, 3]), torch.ops.protofast
    check = torch.library.opcheck
    check(ops.k_center.reference, (points, first, mask, 5, metric, 0))
    check(ops.cover.reference, (points, first, mask, metric))
    check(ops.farthest_pair.reference, (points, mask, metric))
    check(ops.nearest_to_mean.reference, (points, mask, metric))
    indices, _, labels, distances = ops.k_center.reference(points, first, mask, 4, metric, 0)
    for swaps in (0, 4):
        check(ops.max_min_swaps.reference, (points, indices, labels, distances, mask, metric, swaps))
        check(ops.max_sum.reference, (points, first, mask, 4, metric, swaps))
    if not masked:
        check(ops.k_medoids.reference, (points, first, metric, 20))


@pytest.mark.parametrize("start", [3, "center", "farthest-pair"])
def test_compiles_to_one_graph(start):
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(50) != 7

    def run(points, mask):
        return pf.k_center(points, 6, start=start, mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = compiled(points, mask), run(points, mask)
    for name in ("indices", "radii", "labels", "distances", "objective", "bound"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


def test_points_that_need_gradients():
    points = torch.from_numpy(cloud("normal")).requires_grad_()
    assert not pf.k_center(points, 3).distances.requires_grad


def test_autocast_changes_nothing():
    points = torch.from_numpy(cloud("normal", 600, 40)).float()
    plain = (
        pf.farthest_pair(points),
        pf.k_dispersion(points, 5).indices.tolist(),
        pf.k_medoids(points, 5).indices.tolist(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert plain == (
            pf.farthest_pair(points),
            pf.k_dispersion(points, 5).indices.tolist(),
            pf.k_medoids(points, 5).indices.tolist(),
        )


def test_results_say_what_they_are():
    found = pf.k_center(cloud("normal"), 4)
    assert len(found) == 4
    assert f"{found.objective:.3f}" == f"{float(found.objective):.3f}"
    assert {t.dtype for t in (found.indices, found.labels)} == {torch.int64}
    assert {t.dtype for t in (found.radii, found.distances, found.objective, found.bound)} == {torch.float64}
