"""The grid of k-center: every size, dimension and count on noise, clusters, pictures and an embedding of them.

Takes hours, so each cell is saved as it ends, and a run goes on where another stopped. A contender is left out of a
cell where it would take too long, judged by what it took in smaller ones.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import protofast as pf
from protofast._backend import survey
from protofast._files import replacing

from . import environment
from .runner import _left_out, _limit_blas
from .spec import OURS, Call, Case, copy_limit
from .specs.farthest_first import LAZY_POOL, LOOPS, PACKAGES
from .specs.selection import K_CENTER, PATIENCE, case, excess
from .timing import Timing, interleave, once, quantiles, ratio

SIZES = (10_000, 100_000, 1_000_000)
DIMS = (2, 3, 16, 64, 512)
COUNTS = (10, 100, 1000)
PICTURES = (10_000, 70_000)
COPIES = 5
"""Of the points in memory, at the most, while a cell runs: differences and squares of a loop, float64 of a package."""

ROUNDS = 3
"""At least, of the contenders whose medians decide anything."""

COPY = "read the points once"
PEERS = [name for name in (*LOOPS, *PACKAGES) if name != LAZY_POOL]
"""Whom the goals name; the lazy pool has a goal of its own."""

Line = dict[str, Any]
"""What is known of one cell: a line of the JSON-lines file."""


def cells() -> list[Case]:
    """In an order that has the smaller cells first, which the time of a larger one is judged by."""
    drawn = [(data, d, n) for data in ("gaussian", "clustered") for d in DIMS for n in SIZES]
    real = [(data, d, n) for data, d in (("pixels", 784), ("embedding", 16), ("embedding", 64)) for n in PICTURES]
    return [case(n, d, k, True, data) for data, d, n in drawn + real for k in COUNTS]


def run(
    path: Path,
    chosen: Iterable[Case],
    *,
    threads: int | None = None,
    budget: float = 3.0,
    patience: float = PATIENCE,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Line]:
    """Measures those of the cells that the file does not have yet.

    Parameters
    ----------
    path : the file of JSON lines, created if absent
    chosen : cells
    threads : of torch and of numpy's BLAS; as they are if not given
    budget : seconds of timing a cell, more where those that matter take longer for three rounds
    patience : seconds of a call beyond which a contender is left out
    seed : of the points
    progress : called with what comes next

    Returns
    -------
    list
        All lines of the file.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        _limit_blas(threads)
    lines = read(path)
    done = {line["case"] for line in lines}
    where = environment.environment("cpu")
    for number, one in enumerate(chosen := list(chosen), 1):
        if one.name in done:
            continue
        label = f"{number}/{len(chosen)} {one.name}"
        needed = COPIES * 4 * one.params["n"] * one.params["d"]
        if (free := _free()) is not None and free < needed:
            progress(f"{label}: left for another run, as {free / 1e9:.1f} GB are free and {needed / 1e9:.1f} needed")
            continue
        progress(label)
        gc.collect()
        started, load = time.monotonic(), environment.load()
        line = measure(one, lines, budget=budget, patience=patience, seed=seed)
        line |= {"took": round(time.monotonic() - started, 1), "load": load, "environment": where}
        lines.append(line)
        with replacing(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    return lines


def _free() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return next((1024 * int(row.split()[1]) for row in text.splitlines() if row.startswith("MemAvailable")), None)


def read(path: Path) -> list[Line]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def measure(one: Case, lines: list[Line], *, budget: float, patience: float, seed: int) -> Line:
    """One cell. `lines` are those of other cells."""
    inputs = K_CENTER.inputs(one, "cpu", seed)
    truth = pf.k_center(inputs.points, inputs.k)
    chosen, radius = truth.indices.tolist(), float(truth.objective)
    auto = f"{OURS} {survey().ops['k_center']['cpu']}"
    names = [name for name in K_CENTER.contenders if not name.startswith(OURS) or name.startswith(auto)]
    expected = {name: estimate(lines, one, name) for name in names if name != auto}
    tried: dict[str, tuple[Call, float]] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, dict[str, Any]] = {}

    def attempt(name: str) -> None:
        try:
            call = K_CENTER.contenders[name](inputs)
            seconds, output = once(call, "cpu")
            errors[name] = excess(output, inputs, chosen, radius, lambda start: _radius_from(inputs, start))
        except Exception as error:  # whatever is wrong with one contender, the others are measured
            left_out[name] = {"reason": _left_out(K_CENTER, one, name, error)["reason"], "seconds": None}
        else:
            tried[name] = call, seconds

    too_long = {name: seconds for name, seconds in expected.items() if seconds and seconds > patience}
    for name in names:
        if name not in too_long:
            attempt(name)
    peers = {seconds: name for name, seconds in too_long.items() if name in PEERS}
    if peers and not any(name in PEERS for name in tried):  # a cell without a peer would say nothing
        least = peers[min(peers)]
        del too_long[least]
        attempt(least)
    for name, seconds in too_long.items():
        left_out[name] = {"reason": f"about {seconds:.0f} s, judged by smaller cells", "seconds": seconds}

    right = [name for name in tried if errors[name] <= (0.0 if name.startswith(OURS) else K_CENTER.tolerance(inputs))]
    first = {name: seconds for name, (_, seconds) in tried.items()}
    rivals = leaders({name: first[name] for name in right if first[name] <= patience}, auto, budget)
    copy = copy_limit(K_CENTER.bytes(inputs), "cpu")
    warm = {name: first[name] for name in rivals} | {COPY: max(once(copy, "cpu")[0] for _ in range(2))}
    timings = interleave(
        {name: tried[name][0] for name in rivals} | {COPY: copy},
        "cpu",
        budget=max(budget, 1.01 * ROUNDS * max(warm.values())),
        warm=warm,
        seed=seed,
        min_rounds=ROUNDS,
    )
    for name, seconds in first.items():
        timings.setdefault(name, Timing(1, [seconds]))
    line: Line = {"case": one.name, "params": dict(one.params), "ours": auto, "patience": patience, "rows": {}}
    for name, timing in timings.items():
        line["rows"][name] = {
            "seconds": quantiles(timing.seconds),
            "rounds": len(timing.seconds),
            "error": errors.get(name),
            "wrong": name != COPY and name not in right,
        }
    line["left_out"] = left_out
    line["faster_than"] = {name: ratio(timings[name], timings[auto])["p50"] for name in right if name != auto}
    return line


def _radius_from(inputs: Any, start: int) -> float:
    return float(pf.k_center(inputs.points, inputs.k, start=start).objective)


def leaders(seconds: dict[str, float], auto: str, budget: float) -> list[str]:
    """Whose medians decide anything: ours, the lazy pool, the fastest package, those up to three times slower than the
    fastest peer, and those that cost little. One sample does for the others."""
    peers = {name: seconds[name] for name in PEERS if name in seconds}
    packages = [name for name in PACKAGES if name in seconds]
    near = max(3 * min(peers.values(), default=0.0), budget / 20)
    always = {auto, LAZY_POOL, min(packages, key=lambda name: seconds[name], default="")}
    return [name for name, value in seconds.items() if name in always or value <= near]


def estimate(lines: list[Line], one: Case, name: str) -> float | None:
    """Seconds expected of a contender: those of the next smaller cell in proportion, fewer points before fewer choices
    before fewer dimensions (buckets and set-up grow by less than k, and pruning fails with d). None if none is known.
    """
    for key in ("n", "k", "d"):
        smaller = [
            line
            for line in lines
            if line["params"][key] < one.params[key]
            and all(line["params"][other] == value for other, value in one.params.items() if other != key)
        ]
        for line in sorted(smaller, key=lambda line: -line["params"][key]):
            row = line["rows"].get(name)
            known = row["seconds"]["p50"] if row else line["left_out"].get(name, {}).get("seconds")
            if known:
                return known * one.params[key] / line["params"][key]
    return None
