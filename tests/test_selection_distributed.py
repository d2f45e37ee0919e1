"""Points spread over gloo processes: what the reference chooses in one process, in few exchanges, and no hang."""

import os
import re
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import protofast as pf

ROOT = Path(__file__).parents[1]
FIELDS = ("indices", "radii", "labels", "distances", "objective", "bound")
COLLECTIVES = [
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter", "reduce_scatter", "send", "recv"),
]
TIMEOUT = 3  # seconds, of the groups in which a rank is lost


# --- the cases ------------------------------------------------------------------------------------------------------


def cloud(kind, n, d, dtype):
    rng = np.random.default_rng(n + d)
    if kind == "clusters":  # in the order of the clusters, so that ranks hold different ones
        x = np.sort(rng.integers(0, 9, n))[:, None] * 7.0 + rng.standard_normal((n, d))
    elif kind == "lattice":
        x = rng.integers(-2, 3, (n, d))
    elif kind == "copies":
        x = rng.integers(0, 2, (n, d)) * 4
    elif kind == "equal":
        x = np.full((n, d), 2)
    elif kind == "circle":  # every point has an opposite: all are in a farthest pair up to rounding
        angle = np.arange(n) * (2 * np.pi / n)
        x = np.stack([np.cos(angle), np.sin(angle)], 1).round(3) @ np.eye(2, d)
    else:
        x = rng.standard_normal((n, d))
    return torch.from_numpy(np.asarray(x, dtype=np.float64)).to(dtype)


def cuts(kind, n, size):
    """Where each rank's points begin, and the end."""
    if kind == "even":
        return [n * r // size for r in range(size + 1)]
    if kind == "uneven":
        return [n * r * r // size**2 for r in range(size + 1)]
    if kind == "first empty":
        return [0, *(n * r // (size - 1) for r in range(size))]
    if kind == "last has all":
        return [0] * size + [n]
    return [0] + [1] * (size - 1) + [n]  # "one point": one for the first, none in between


def cases():
    """Keyword arguments of `one`, by name."""
    splits = cycle(["even", "uneven", "first empty", "last has all", "one point"])
    dtypes = cycle([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    metrics = cycle(["euclidean", "manhattan", "cosine", "sqeuclidean", "euclidean"])
    starts = cycle([5, "farthest-pair", "center", "random", [7, 3, 11]])
    pairs = cycle(["farthest-pair", "farthest-pair", "center"])
    found = {}

    def add(**case):
        name = " ".join(str(value).removeprefix("torch.") for value in case.values())
        found[name] = {"split": next(splits), "dtype": next(dtypes), **case}

    for kind in ("normal", "clusters", "lattice", "copies", "equal", "circle"):
        for k, masked in ((1, False), (9, True), (60, False)):
            start = next(starts)
            if kind == "circle" and start == "center":  # the mean of a circle is nearest to all, up to its rounding
                start = next(starts)
            add(kind=kind, n=150, d=3, k=k, metric=next(metrics), start=start, masked=masked, small=True)
        for metric in ("euclidean", "manhattan", "sqeuclidean"):
            add(kind=kind, n=90, d=2, k=90, metric=metric, start=0, masked=False, small=True)
            start = next(pairs)
            add(kind=kind, n=400, d=2, k=4, metric=metric, start=start, masked=True, small=True)
        for objective in ("max-min", "max-sum"):
            for k, n, refine in ((2, 70, True), (7, 120, True), (7, 120, False), (30, 30, True)):
                options = {"objective": objective, "refine": refine, "masked": k == 7, "small": k == 7}
                d = 8 if objective == "max-sum" else 2  # in the plane greedy sums leave nothing to swap
                add(kind=kind, n=n, d=d, k=k, metric=next(metrics), **options)
    for start in (0, "farthest-pair"):
        add(kind="normal", n=6000, d=5, k=150, metric="euclidean", start=start, masked=False, small=False)
    add(kind="normal", n=5, d=0, k=5, metric="euclidean", start=0, masked=False, small=False)
    add(kind="normal", n=1, d=2, k=1, metric="cosine", start="farthest-pair", masked=False, small=False)
    add(kind="normal", n=40, d=2, k=1, metric="euclidean", objective="max-min", refine=True, masked=True, small=False)
    return found


def one(size=None, rank=None, group=None, *, kind, n, d, k, dtype, split, masked, small, **options):
    """The selection of a case: of one process, or of a rank of several."""
    from protofast.selection.distributed import greedy, shards

    points = cloud(kind, n, d, dtype)
    mask = torch.arange(n) % 4 != 2 if masked else None
    k = k if mask is None else min(k, int(mask.sum()))
    objective = options.get("objective")
    if objective is None:
        start = options.pop("start")
        if isinstance(start, list):
            options["initial"] = start[:k]
        else:
            options["start"] = torch.Generator().manual_seed(n + k) if start == "random" else start
    if group is None:
        options["backend"] = "reference"
    else:
        low, high = cuts(split, n, size)[rank : rank + 2]
        points, mask = points[low:high], None if mask is None else mask[low:high]
        options["process_group"] = group
        greedy.POOL, shards.MESSAGE = (4, 1 << 11) if small else (2048, 1 << 26)
    choose = pf.k_center if objective is None else pf.k_dispersion
    return choose(points, k, mask=mask, **options)


def wrong(rank, last):
    """Calls that all ranks must refuse alike: (name of the argument, call)."""
    x, half = torch.arange(20.0).reshape(10, 2), torch.arange(10) < 5
    bad = x.clone()
    bad[7, 1] = torch.nan
    mine = rank == last
    return {
        f"on rank {last}: points holds nan in row 7, column 1": (bad if mine else x, 3, {}),
        f"on rank {last}: points is a list": ([[1.0]] if mine else x, 3, {}),
        f"on rank {last}: metric is 'l2'": (x, 3, {"metric": "l2" if mine else "cosine"}),
        f"k is 4 on rank {last} and 3 on rank 0": (x, 4 if mine else 3, {}),
        f"initial is [0, 2] on rank {last} and [0, 1]": (x, 4, {"initial": [0, 2 if mine else 1]}),
        f"points has 3 columns on rank {last} and 2 on rank 0": (torch.zeros(0, 3) if mine else x, 3, {}),
        f"points is torch.float64 on rank {last} and torch.float32": (x.double() if mine else x, 3, {}),
        "metric='precomputed' needs the whole matrix": (x, 3, {"metric": "precomputed"}),
        "k is 0; give 1 to": (x, 0, {}),
        f"k is 1000; give 1 to {10 * (last + 1)}": (x, 1000, {}),
        "k is 2.5; give an integer": (x, 2.5, {}),
        "no rank has an allowed point": (x, 3, {"mask": half & False}),
        "start is 1000; points has 0 to": (x, 3, {"start": 1000}),
        "start is 'middle'": (x, 3, {"start": "middle"}),
        "start is 17, which mask leaves out": (x, 3, {"start": 17, "mask": half}),
        "initial holds index 17, which mask": (x, 3, {"initial": [12, 17], "mask": half}),
        "initial holds an index twice": (x, 3, {"initial": [12, 12]}),
        "engine is 'fast'": (x, 3, {"engine": "fast"}),
        "lengths is for clouds": (x, 3, {"lengths": [3]}),
    }


# --- the processes --------------------------------------------------------------------------------------------------


def work(rank, size, folder):
    """What each process does, and saves for the tests to look at."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
    doomed = [dist.new_group(timeout=timedelta(seconds=TIMEOUT)) for _ in range(2)]
    world, said = dist.group.WORLD, {}
    for name, case in cases().items():
        found = one(size, rank, world, **case)
        said[name] = {field: getattr(found, field) for field in FIELDS}
    refusals = said["refusals"] = {}
    for name, (points, k, options) in wrong(rank, size - 1).items():
        try:
            pf.k_center(points, k, process_group=world, **options)
        except Exception as error:
            refusals[name] = (type(error).__name__, str(error))
    said["collectives"] = count_collectives(rank, size, world)
    dist.barrier()
    if size == 2:
        noticed = folder / "noticed"
        said["lost"] = [lose(rank, doomed[0], lambda: wait(noticed))]
        noticed.touch()
        torch.save(said, folder / f"{size}-{rank}.pt")
        dist.barrier()
        said["lost"] += [lose(rank, doomed[1], lambda: os._exit(3))]
    torch.save(said, folder / f"{size}-{rank}.pt")


def count_collectives(rank, size, group):
    """Of k_center with k = 400: every function of torch.distributed that exchanges is counted."""
    from protofast.selection.distributed import greedy, shards

    greedy.POOL, shards.MESSAGE = 2048, 1 << 26
    points = cloud("normal", 20_000, 8, torch.float32)
    low, high = cuts("even", len(points), size)[rank : rank + 2]
    kept = {name: getattr(dist, name) for name in COLLECTIVES}
    count = 0

    def counting(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            return function(*args, **options)

        return call

    for name, function in kept.items():
        setattr(dist, name, counting(function))
    try:
        pf.k_center(points[low:high], 400, process_group=group)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return count


def wait(path):
    """Is silent until the other rank has noticed."""
    for _ in range(600):
        if path.exists():
            raise RuntimeError("noticed")
        time.sleep(0.1)


def lose(rank, group, end):
    """Rank 1 is lost in the middle of a run: the errors."""
    from protofast.selection.distributed.shards import Shards

    gather, calls = Shards.gather, 0

    def failing(self, step, local):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3:
            end()
        return gather(self, step, local)

    Shards.gather = failing
    try:
        pf.k_center(torch.randn(50, 2), 5, process_group=group)
    except RuntimeError as error:
        return str(error)
    finally:
        Shards.gather = gather


@cache
def in_one_process(name):
    return one(**cases()[name])


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank of a group saved."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, request.param, folder)) for rank in range(request.param)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    still = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    assert not still, "ranks hang"
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


# --- the tests ------------------------------------------------------------------------------------------------------


def test_ranks_choose_as_one_process(ranks):
    for name, case in cases().items():
        expected = in_one_process(name)
        begin = cuts(case["split"], case["n"], len(ranks))
        for rank, said in enumerate(ranks):
            found, of = said[name], f"{name}, {case['split']}, {case['dtype']}, rank {rank}"
            own = slice(*begin[rank : rank + 2])
            assert found["indices"].tolist() == expected.indices.tolist(), of
            assert torch.equal(found["radii"], expected.radii), of
            assert torch.equal(found["labels"], expected.labels[own]), of
            assert torch.equal(found["distances"], expected.distances[own]), of
            torch.testing.assert_close(found["objective"], expected.objective, rtol=1e-14, atol=0, msg=of)
            torch.testing.assert_close(found["bound"], expected.bound, rtol=1e-13, atol=0, msg=of)


def test_all_ranks_refuse_alike(ranks):
    for words in wrong(0, len(ranks) - 1):
        refusals = {said["refusals"].get(words) for said in ranks}
        assert len(refusals) == 1, words
        name, text = refusals.pop()
        assert words in text
        assert name in ("ValueError", "TypeError", "IndexError")


def test_few_collectives(ranks):
    counts = {said["collectives"] for said in ranks}
    assert len(counts) == 1
    assert 3 <= counts.pop() <= 20  # of 400 choices


def test_a_lost_rank_ends_the_others(ranks):
    if len(ranks) != 2:
        pytest.skip("two processes show it")
    for error in ranks[0]["lost"]:
        assert re.match(r"rank 0 lost the other ranks while \w+.*start all of them again", error)
    assert len(ranks[0]["lost"]) == 2
    assert ranks[1]["lost"] == ["noticed"]  # it was there all the time, and then ended


def test_process_group_must_be_one():
    for choose in (pf.k_center, pf.k_dispersion):
        with pytest.raises(TypeError, match=r"process_group is 'world'.*init_process_group"):
            choose(torch.zeros(3, 1), 1, process_group="world")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_documented_command_runs(tmp_path):
    """The first command of docs/distributed.md, on files of unequal length."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    words = shlex.split(re.search(r"^```bash\n(.*?)^```", page, re.M | re.S)[1].replace("\\\n", " "))
    assert words[0] == "torchrun"
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 4)).astype(np.float32) for n in (700, 0, 300, 1500)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"points-{number}.npy", part)
    run = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--labels", "labels"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    k = int(words[words.index("-k") + 1])
    expected = pf.k_center(np.concatenate(parts), k)
    found = np.load(tmp_path / "chosen.npz")
    assert f"{k:,} of 2,500 rows on 2 ranks" in done.stdout
    np.testing.assert_array_equal(found["indices"], expected.indices)
    np.testing.assert_array_equal(found["radii"], expected.radii)
    assert found["objective"] == expected.objective
    assert found["first_rows"].tolist() == [0, 1250, 2500]
    each = [np.load(tmp_path / "labels" / f"rank-{rank:05d}.npz") for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate([one["labels"] for one in each]), expected.labels)
    np.testing.assert_array_equal(np.concatenate([one["distances"] for one in each]), expected.distances)


def test_rows_are_shared_out(tmp_path):
    from protofast.selection.distributed.command import share

    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    parts = [np.arange(6.0).reshape(3, 2), np.zeros((0, 2)), np.ones((1, 2)), np.full((7, 2), 5.0)]
    for path, part in zip(paths, parts, strict=True):
        np.save(path, part)
    for size in (1, 2, 5, 20):
        shares = [share(paths, part, size) for part in range(size)]
        np.testing.assert_array_equal(np.concatenate(shares), np.concatenate(parts))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert isinstance(share(paths[3:], 0, 2), np.memmap)
    np.save(paths[1], np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"1\.npy holds float64 \(2, 3\), and .*0\.npy"):
        share(paths, 0, 2)
