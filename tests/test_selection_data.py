"""Instances with proven optima: OR-Library p-median graphs, TSPLIB points, MDPLIB distances."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import protofast as pf

FOLDER = Path(os.environ.get("PROTOFAST_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no instances in {FOLDER}; set PROTOFAST_SHARED_DATA to the folder that holds pmed/"
)


def shortest_paths(name):
    """Distances of all pairs and p; the last of repeated edges counts."""
    graph = pytest.importorskip("scipy.sparse.csgraph")
    rows = np.loadtxt(FOLDER / "pmed" / f"{name}.txt", skiprows=1)
    n, edges, p = (int(v) for v in (FOLDER / "pmed" / f"{name}.txt").read_text().split()[:3])
    assert len(rows) == edges
    weight = np.full((n, n), np.inf)
    for i, j, cost in rows:
        weight[int(i) - 1, int(j) - 1] = weight[int(j) - 1, int(i) - 1] = cost
    return graph.shortest_path(graph.csgraph_from_dense(weight, null_value=np.inf), directed=False), p


@pytest.mark.parametrize("name", [f"pmed{number}" for number in range(1, 24)])
def test_pmed(name):
    optimum = json.loads((FOLDER / "pmed" / "optima.json").read_text())[name]
    square, p = shortest_paths(name)
    assert (len(square), p) == (optimum["n"], optimum["p"])
    for start in (0, "center", "farthest-pair"):
        found = pf.k_center(torch.from_numpy(square), p, metric="precomputed", start=start)
        assert found.bound <= optimum["optimum"] <= found.objective <= 2 * optimum["optimum"]
        assert square[found.indices].min(0).max() == found.objective
    assert pf.farthest_pair(square, metric="precomputed").distance == square.max()


def coordinates(name):
    lines = (FOLDER / "tsplib" / f"{name}.tsp").read_text().split("NODE_COORD_SECTION")[1].split("EOF")[0]
    return np.array(lines.split(), dtype=float).reshape(-1, 3)[:, 1:]


@pytest.mark.parametrize("name", ["u1060", "rl1323"])
def test_tsplib(name):
    points = coordinates(name)
    square = np.sqrt(((points[:, None] - points) ** 2).sum(-1))
    known = [entry for entry in json.loads((FOLDER / "tsplib" / "optima.json").read_text()) if entry["name"] == name]
    assert known
    for entry in known:
        optimum = entry["optimum"]
        for start in (0, "center", "farthest-pair"):
            found = pf.k_center(points, entry["k"], start=start)
            assert found.bound <= optimum + 0.01  # given to two decimals
            assert optimum - 0.01 <= found.objective <= 2 * optimum + 0.02
            assert found.indices.tolist() == (
                pf.k_center(square, entry["k"], metric="precomputed", start=start).indices.tolist()
            )
    pair = np.unravel_index(np.triu(square).argmax(), square.shape)
    assert pf.farthest_pair(points)[:2] == tuple(pair)


@pytest.mark.parametrize("path", sorted((FOLDER / "mdplib").glob("GKD-b_*.txt")), ids=lambda path: path.stem)
@pytest.mark.parametrize("objective", ["max-min", "max-sum"])
def test_mdplib(path, objective):
    n, m = (int(part[1:]) for part in path.stem.split("_")[-2:])
    square = np.zeros((n, n))
    lines = path.read_text().splitlines()[1 : 1 + n * (n - 1) // 2]  # others' results follow
    for i, j, distance in np.loadtxt(lines):
        square[int(i) - 1, int(j) - 1] = square[int(j) - 1, int(i) - 1] = distance
    plain, refined = (
        pf.k_dispersion(square, m, objective=objective, metric="precomputed", refine=refine) for refine in (False, True)
    )
    chosen = refined.indices.tolist()
    pairs = square[np.ix_(chosen, chosen)][np.triu_indices(m, 1)]
    np.testing.assert_allclose(refined.objective, pairs.min() if objective == "max-min" else pairs.sum(), rtol=1e-13)
    assert plain.objective <= refined.objective
    assert refined.objective <= refined.bound
    # A thousand random sets: the chosen one beats them all.
    rng = np.random.default_rng(0)
    sets = (rng.permutation(n)[:m] for _ in range(1000))
    others = [square[np.ix_(s, s)][np.triu_indices(m, 1)] for s in sets]
    assert refined.objective >= max(o.min() if objective == "max-min" else o.sum() for o in others)
