"""Times calls against each other: interleaved, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from .spec import Call

SAMPLE = 3e-4
"""Seconds that one CPU sample lasts at least: calls of microseconds are repeated inside it."""


@dataclass
class Timing:
    """Samples of one contender, in seconds a call; sample i of every contender was taken in round i.

    `seconds` is wall-clock time on a CPU, of `inner` calls together. On a GPU it is the time between two events around
    one call, after the L2 cache was flushed; `wall` is the wall-clock time of `inner` calls back to back and one wait
    at the end, so that a host that cannot keep up shows.
    """

    inner: int
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return dict(zip(("p20", "p50", "p80"), np.quantile(values, (0.2, 0.5, 0.8)).tolist(), strict=True))


def ratio(of: Timing, to: Timing) -> dict[str, float]:
    """Quantiles of the time ratio, paired by round."""
    rounds = min(len(of.seconds), len(to.seconds))
    return quantiles([a / b for a, b in zip(of.seconds[:rounds], to.seconds[:rounds], strict=True)])


def once(call: Call, device: str, self_timed: bool = False) -> tuple[float, object]:
    """Seconds of one call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    return (float(result), None) if self_timed else (elapsed, result)


def interleave(
    calls: Mapping[str, Call],
    device: str,
    *,
    budget: float,
    warm: Mapping[str, float] | None = None,
    seed: int = 0,
    self_timed: bool = False,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Times all `calls` for about `budget` seconds, in rounds of one sample each, each round in a new order.

    `warm` has the seconds of a call that was already warmed up, where they are known. A call that alone would spend the
    budget takes part in the first rounds only, at least one.
    """
    inner, cost = {}, {}
    for name, call in calls.items():
        first = max((warm or {}).get(name) or once(call, device, self_timed)[0], 1e-9)
        if device == "cuda":
            inner[name] = max(1, min(10, round(0.01 / first)))
            cost[name] = first * (1 + inner[name])
            continue
        inner[name] = 1 if self_timed else max(1, min(10_000, round(SAMPLE / first)))
        if inner[name] > 1:  # the first call of a few microseconds is mostly the clock and cold caches
            inner[name] = max(1, min(10_000, round(SAMPLE / _cpu(call, inner[name]))))
        cost[name] = max(first * inner[name], SAMPLE)
    timings = {name: Timing(count) for name, count in inner.items()}
    last = {name: max(1, int(budget / seconds)) for name, seconds in cost.items() if seconds * min_rounds > budget}
    shared = sum(seconds for name, seconds in cost.items() if name not in last)
    rounds = max(min_rounds, min(max_rounds, int(budget / max(shared, 1e-9))))
    if self_timed or not shared:
        last = {}
        rounds = min_rounds
    order, shuffle = list(calls), random.Random(seed).shuffle
    flush = _cache_flusher() if device == "cuda" else None
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            shuffle(order)
            for name in order:
                if number >= last.get(name, rounds):
                    continue
                call, timing = calls[name], timings[name]
                if self_timed:
                    timing.seconds.append(float(call()))
                elif flush is not None:
                    timing.seconds.append(_cuda(call, flush))
                    timing.wall.append(_cuda_wall(call, timing.inner))
                else:
                    timing.seconds.append(_cpu(call, timing.inner))
    finally:
        if enabled:
            gc.enable()
    return timings


def _cpu(call: Call, inner: int) -> float:
    repeats = range(inner)
    start = time.perf_counter()
    for _ in repeats:
        call()
    return (time.perf_counter() - start) / inner


def _cuda(call: Call, flush: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()  # also keeps the GPU busy while the host queues the call
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _cuda_wall(call: Call, inner: int) -> float:
    torch.cuda.synchronize()
    seconds = _cpu(call, inner) * inner
    start = time.perf_counter()
    torch.cuda.synchronize()
    return (seconds + time.perf_counter() - start) / inner


def _cache_flusher() -> Call:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(max(2 * size, 1 << 28), dtype=torch.uint8, device="cuda")
    return buffer.zero_


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
