"""The selection benchmark: its points, its baselines and references, the grid that goes on where it stopped."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from protofast.bench import selection_grid, selection_report
from protofast.bench.spec import OURS
from protofast.bench.specs import farthest_first, point_sets
from protofast.bench.specs import selection as module

OURS_HERE = f"{OURS} native"
CELLS = [module.case(n, d, k) for n in (300, 600) for d, k in ((3, 5), (20, 30))]


def greedy_by_hand(points, k: int) -> list[int]:
    rows, chosen = points.double().tolist(), [0]
    nearest = [math.inf] * len(rows)
    while len(chosen) < k:
        nearest = [min(near, math.dist(row, rows[chosen[-1]])) for near, row in zip(nearest, rows, strict=True)]
        chosen.append(max(range(len(rows)), key=lambda i: nearest[i]))
    return chosen


@pytest.mark.parametrize(("n", "d", "pool"), [(400, 2, 4096), (400, 2, 8), (400, 30, 16), (9000, 5, 600)])
def test_lazy_pool_is_the_greedy(n: int, d: int, pool: int) -> None:
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))
    assert farthest_first.lazy_pool(points, 40, pool=pool, block=1000).tolist() == greedy_by_hand(points, 40)


def test_clusters_have_low_intrinsic_dimension() -> None:
    points = point_sets.clustered(4000, 32, 0)
    assert points.shape == (4000, 32)
    assert torch.equal(points, point_sets.clustered(4000, 32, 0))
    assert not torch.equal(points, point_sets.clustered(4000, 32, 1))
    near = torch.cdist(points, points[:1])[:, 0].argsort()[:10]  # all of one cluster, of which there are about 20
    spread = torch.linalg.svdvals(points[near] - points[near].mean(0))
    assert spread[point_sets.INTRINSIC] < 1e-4 * spread[0]


def test_pictures_are_real() -> None:
    pytest.importorskip("sklearn")
    try:
        points = point_sets.pixels(50, 784, 0)
    except (OSError, ValueError) as error:
        pytest.skip(f"no Fashion-MNIST here: {error}")
    assert points.shape == (50, 784)
    assert 0 <= float(points.min()) < float(points.max()) <= 1
    with pytest.raises(ValueError, match=r"pixels of shape \(50, 3\) were asked for"):
        point_sets.pixels(50, 3, 0)


@pytest.mark.parametrize("d", [2, 40])
def test_covering_radius(d: int) -> None:
    points = torch.randn(5000, d, generator=torch.Generator().manual_seed(d)) + 100  # products cancel far from 0
    centers = points[:7]
    exact = torch.cdist(points.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert module.covering_radius(points, centers) == pytest.approx(float(exact.amin(1).max()), rel=1e-3)


def test_excess_knows_indices_coordinates_and_starts() -> None:
    inputs = module.K_CENTER.inputs(module.case(500, 3, 12), "cpu", 0)
    chosen, radius = module.K_CENTER.reference(inputs)

    def excess(output) -> float:
        return module.excess(output, inputs, chosen, radius, radius_from)

    def radius_from(start: int) -> float:
        return float(module.greedy(inputs.points.double(), inputs.k, [start])[1].max())

    assert excess(torch.tensor(chosen)) == 0
    assert excess(inputs.points[chosen].tolist()) == pytest.approx(0, abs=1e-12)
    elsewhere = module.greedy(inputs.points.double(), inputs.k, [7])[0]
    assert excess(torch.tensor(elsewhere)) == pytest.approx(0, abs=1e-12)
    assert excess(torch.tensor(elsewhere[1:])) == math.inf
    near = (inputs.points - inputs.points[0]).norm(dim=1).argsort()[: inputs.k]
    assert excess(near) > 0.5
    assert excess(inputs.points[near].tolist()) > 0.5


@pytest.mark.parametrize(("n", "d", "data"), [(300, 2, "gaussian"), (1500, 30, "gaussian"), (1500, 30, "clustered")])
def test_farthest_pair_reference_is_that_of_all_pairs(n: int, d: int, data: str) -> None:
    points = point_sets.SETS[data](n, d, 3)
    exact = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    i, j, distance = module.farthest_exact(points)
    assert exact[i, j] == exact.max()
    assert distance == pytest.approx(float(exact.max()), rel=1e-14)


def test_the_grid_is_that_of_the_goals() -> None:
    cells = selection_grid.cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    drawn = {tuple(cell.params[key] for key in ("data", "n", "d", "k")) for cell in cells}
    wanted = itertools.product(
        ("gaussian", "clustered"), (10_000, 100_000, 1_000_000), (2, 3, 16, 64, 512), (10, 100, 1000)
    )
    assert set(wanted) <= drawn
    assert {"pixels", "embedding"} <= {cell.params["data"] for cell in cells}
    # A smaller cell comes first, so that a larger one can be judged by it.
    for index, cell in enumerate(cells):
        for key in ("n", "k"):
            for later in cells[index:]:
                same = all(later.params[other] == cell.params[other] for other in cell.params if other != key)
                assert not same or later.params[key] >= cell.params[key]


def fake_line(n: int, d: int, k: int, seconds: dict[str, float], left_out=None, data: str = "gaussian") -> dict:
    mine = seconds[OURS_HERE]
    return {
        "case": module.case(n, d, k, data=data).name,
        "params": {"data": data, "n": n, "d": d, "k": k},
        "ours": OURS_HERE,
        "patience": 20.0,
        "rows": {
            name: {"seconds": {"p20": s, "p50": s, "p80": s}, "rounds": 3, "error": 0.0, "wrong": False}
            for name, s in {selection_grid.COPY: 1e-3, **seconds}.items()
        },
        "left_out": {name: {"reason": "why", "seconds": s} for name, s in (left_out or {}).items()},
        "faster_than": {name: s / mine for name, s in seconds.items() if name != OURS_HERE},
        "took": 1.0,
        "load": 0.5,
        "environment": {
            "hardware": {"cpu": "a CPU"},
            "flags": {"threads": 2},
            "commit": "c0ffee",
            "versions": {"torch": "2"},
        },
    }


def test_estimate_scales_the_nearest_smaller_cell() -> None:
    lines = [
        fake_line(10_000, 64, 100, {OURS_HERE: 1, "gudhi": 0.5}, {"skmatter Voronoi": 4.0, "torch_cluster": None}),
        fake_line(10_000, 64, 1000, {OURS_HERE: 1, "gudhi": 2.0}),
        fake_line(100_000, 64, 100, {OURS_HERE: 1, "gudhi": 7.0}),
    ]

    def estimate(n: int, d: int, k: int, name: str):
        return selection_grid.estimate(lines, module.case(n, d, k), name)

    assert estimate(100_000, 64, 1000, "gudhi") == 20  # fewer points first
    assert estimate(10_000, 64, 10_000, "gudhi") == 20  # then fewer choices, the most of them
    assert estimate(10_000, 128, 100, "gudhi") == 1  # then fewer dimensions
    assert estimate(1_000_000, 64, 100, "gudhi") == 70
    assert estimate(100_000, 64, 100, "skmatter Voronoi") == 40  # from an estimate
    assert estimate(100_000, 64, 100, "torch_cluster") is None
    assert estimate(10_000, 3, 10, "gudhi") is None


@pytest.fixture
def few(monkeypatch) -> None:
    """Ours, two right loops, the lazy pool, a wrong loop and an absent package."""

    def absent(inputs):
        raise ImportError("No module named 'elsewhere'")

    kept = ("torch loop", "numpy BLAS loop", "torch lazy pool")
    spec = module.K_CENTER
    contenders = {name: prepare for name, prepare in spec.contenders.items() if name.startswith(OURS) or name in kept}
    contenders |= {"torch BLAS loop": lambda i: lambda: torch.arange(i.k), "gudhi": absent}
    monkeypatch.setattr(selection_grid, "K_CENTER", dataclasses.replace(spec, contenders=contenders))


def test_run_goes_on_where_it_stopped(few, tmp_path, monkeypatch) -> None:
    path, seen = tmp_path / "grid.jsonl", []

    def stop(text: str) -> None:
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        selection_grid.run(path, CELLS, budget=0.02, progress=stop)
    kept = selection_grid.read(path)
    assert [line["case"] for line in kept] == [cell.name for cell in CELLS[:2]]
    seen.clear()
    lines = selection_grid.run(path, CELLS, budget=0.02, progress=lambda text: seen.append(text))
    assert [text.partition(" ")[2] for text in seen] == [cell.name for cell in CELLS[2:]]
    assert lines[:2] == kept
    assert selection_grid.read(path) == json.loads(json.dumps(lines))
    for line in lines:
        rows = line["rows"]
        assert line["ours"] in rows
        assert rows["torch BLAS loop"]["wrong"]
        assert rows["torch BLAS loop"]["error"] > 0.02
        assert not rows["torch lazy pool"]["wrong"]
        assert "torch BLAS loop" not in line["faster_than"]
        assert {"torch loop", "numpy BLAS loop", "torch lazy pool"} <= set(line["faster_than"])
        assert line["left_out"] == {"gudhi": {"reason": "No module named 'elsewhere'", "seconds": None}}
    text = selection_report.to_markdown(lines)
    assert "- gudhi (n=300 d=3 k=5 and 3 more): No module named 'elsewhere'" in text
    assert "**wrong**" in text
    monkeypatch.setattr(selection_grid, "_free", lambda: 1000)
    assert selection_grid.run(tmp_path / "other.jsonl", CELLS, progress=lambda text: seen.append(text)) == []
    assert seen[-1] == "4/4 n=600 d=20 k=30: left for another run, as 0.0 GB are free and 0.0 needed"


def test_a_slow_peer_is_left_out_unless_it_is_the_only_one(few) -> None:
    slow = {"torch loop": 30.0, "numpy BLAS loop": 50.0, "torch lazy pool": 40.0, "torch BLAS loop": 60.0}
    past = [fake_line(100, 3, 5, {OURS_HERE: 1.0, **slow})]
    line = selection_grid.measure(CELLS[0], past, budget=0.02, patience=20.0, seed=0)
    assert "torch loop" in line["rows"]  # the least of them
    assert {name: told["seconds"] for name, told in line["left_out"].items()} == {
        "gudhi": None,
        "numpy BLAS loop": 150,
        "torch lazy pool": 120,
        "torch BLAS loop": 180,
    }
    assert line["left_out"]["numpy BLAS loop"]["reason"] == "about 150 s, judged by smaller cells"
    past = [fake_line(100, 3, 5, {OURS_HERE: 1.0, **slow, "numpy BLAS loop": 1.0})]
    line = selection_grid.measure(CELLS[0], past, budget=0.02, patience=20.0, seed=0)
    assert "torch loop" not in line["rows"]
    assert "numpy BLAS loop" in line["rows"]


def test_leaders_are_those_that_decide() -> None:
    plain, pool = f"{OURS_HERE} plain", f"{OURS_HERE} pool"
    mine = {OURS_HERE: 4.0, plain: 9.0, pool: 3.0}
    seconds = {
        **mine,
        "torch loop": 3.1,
        "numpy BLAS loop": 1.0,
        "torch lazy pool": 5.0,
        "gudhi": 7.0,
        "torch_fps": 8.0,
    }
    found = selection_grid.leaders(seconds, OURS_HERE, 3.0)
    assert found == [OURS_HERE, pool, "numpy BLAS loop", "torch lazy pool", "gudhi"]
    quick = {name: value / 1000 for name, value in seconds.items()}
    assert selection_grid.leaders(quick, OURS_HERE, 3.0) == list(seconds)
    assert selection_grid.leaders(mine, OURS_HERE, 3.0) == [OURS_HERE]


def test_goals_count_their_cells() -> None:
    pool = {f"{OURS_HERE} {engine}": s for engine, s in (("plain", 2.0), ("boxes", 3.0), ("pool", 1.0))}
    lines = [
        fake_line(
            100_000, 64, 100, {OURS_HERE: 1.0, **pool, "gudhi": 12.0, "numpy BLAS loop": 6.0, "torch lazy pool": 1.5}
        ),
        fake_line(100_000, 64, 1000, {OURS_HERE: 1.0, **pool, "numpy BLAS loop": 4.0}, {"gudhi": 50.0}),
        fake_line(100_000, 2, 10, {OURS_HERE: 1.0, "torch_quickfps": 1.6, "gudhi": 0.9}),
        fake_line(100_000, 64, 100, {OURS_HERE: 1.0, "gudhi": 11.0, "torch lazy pool": 0.1}, data="clustered"),
        fake_line(10_000, 64, 100, {OURS_HERE: 1.0, "gudhi": 2.0}),
    ]
    found = {(goal["goal"].split(", d")[0], goal["bound"]): goal for goal in selection_report.goals(lines)}

    def told(name: str, bound: float) -> tuple:
        goal = found[name, bound]
        return goal["cells"], goal["median"], goal["worst"], goal["short"], goal["met"]

    assert told("the best peer, every cell", 1) == (5, 4.0, 0.9, 1, False)
    assert told("the best peer, median cell", 2) == (5, 4.0, 0.9, 1, True)
    assert told("the best peer, Gaussian", 5) == (2, 5.0, 4.0, 1, False)
    assert told("the best peer, clustered", 3) == (1, 11.0, 11.0, 0, True)
    assert told("the best package, Gaussian", 10) == (2, 16.0, 12.0, 0, True)  # left out: at least 20 s
    assert told("torch_quickfps", 1.5) == (1, 1.6, 1.6, 0, True)
    assert told("torch lazy pool, where pool is our fastest", 2) == (1, 1.5, 1.5, 1, False)
    text = selection_report.to_markdown(lines)
    assert "- n=100000 d=2 k=10: **0.9× gudhi** (1 s)" in text
    assert text.count("**0.9× gudhi**") == 2
    assert "| the best peer, median cell | ≥ 2 (median) | 4 | 0.9 | 5 | 1 | yes |" in text
    assert "> 20×" not in text  # a peer was measured everywhere
    assert selection_report.best(lines[1], ["gudhi"]) == (20.0, "")
    assert selection_report.best(lines[1], ["torch_cluster"]) is None


def test_a_pass_is_what_a_further_choice_costs() -> None:
    lines = [
        fake_line(1_000_000, 64, k, {OURS_HERE: 1.0, f"{OURS_HERE} plain": seconds})
        for k, seconds in ((10, 0.1), (110, 0.3))
    ]
    ((points, seconds, share),) = selection_report.one_pass(lines)
    assert points == "gaussian n=1000000 d=64"
    assert seconds == pytest.approx(0.002)
    assert share == pytest.approx(0.5)  # a copy took 1 ms
    assert (
        selection_report.one_pass([fake_line(100, 2, k, {OURS_HERE: 1.0, f"{OURS_HERE} plain": k}) for k in (1, 2)])
        == []
    )
    assert "| gaussian n=1000000 d=64 | 2 ms | 50 % |" in selection_report.to_markdown(lines)


def test_command(tmp_path, capsys) -> None:
    from benchmarks import selection as command

    command.main(["--list", "--cells", "d=784"])
    assert len(capsys.readouterr().out.splitlines()) == 6
    for arguments, text in (
        (["--cells", "d=5 "], "--cells is 'd=5 ', which no cell has in its name"),
        (["--threads", "0"], "--threads is 0"),
        (["--tables", "--out", str(tmp_path)], "holds no cell yet"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert text in capsys.readouterr().err
    line = fake_line(100_000, 64, 100, {OURS_HERE: 1.0, "gudhi": 12.0})
    (tmp_path / "here.jsonl").write_text(json.dumps(line) + "\n")
    command.main(["--tables", "--out", str(tmp_path), "--name", "here"])
    assert "12× gudhi (1 s)" in (tmp_path / "here.md").read_text()
