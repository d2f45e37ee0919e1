"""Runs the specs and gathers rows."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from protofast import _ops
from protofast._backend import survey

from . import environment, memory, results
from .spec import OURS, UNABLE, Call, Case, Skip, Spec, copy_limit, matmul_limit
from .specs import SPECS
from .timing import interleave, once, quantiles, ratio

SHAPES = ("quick", "full")
_BUDGET = {"quick": 2.0, "full": 5.0}
"""Seconds of timing a case."""

_PATIENCE = 20.0
"""A contender whose one call takes longer is left out."""


def run(
    ops: Iterable[str] = (),
    *,
    shapes: str = "quick",
    device: str | None = None,
    backends: Iterable[str] = (),
    out: str | Path = "results",
    name: str | None = None,
    threads: int | None = None,
    budget: float | None = None,
    seed: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> dict[str, Any]:
    """Times every contender of the chosen ops and writes ``<out>/<name>.json``, ``.csv`` and ``.md``.

    The JSON is written anew after every case, so that a run that is stopped keeps what it has; ``complete`` says
    whether it came to its end.

    Parameters
    ----------
    ops : names of specs; all if empty
    shapes : {"quick", "full"}
    device : {"cpu", "cuda"}; a GPU if there is one
    backends : which of this package's backends take part; all if empty
    out : folder, created if absent
    name : file name without suffix; the GPU's or CPU's if not given
    threads : torch's CPU threads; as they are if not given
    budget : seconds of timing a case
    seed : of drawn shapes, of inputs and of the order within rounds; if not given, 0, but for the shapes a number that
        differs from run to run, which the result has as ``drawn``
    progress : called with (cases done, cases in all, what comes next)

    Returns
    -------
    dict
        What the JSON holds.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; choose 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', and torch sees no GPU here; use device='cpu'")
    if shapes not in SHAPES:
        raise ValueError(f"shapes is {shapes!r}; choose one of {', '.join(SHAPES)}")
    backends = tuple(backends)
    if unknown := [b for b in backends if b not in _ops.BACKENDS]:
        raise ValueError(f"backend is {unknown[0]!r}; choose from {', '.join(_ops.BACKENDS)}")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; give 1 or more")
        torch.set_num_threads(threads)
        _limit_blas(threads)
    specs = choose(ops, device)
    drawn = secrets.randbelow(1_000_000) if seed is None else seed
    seed = seed or 0
    work = [(s, case) for s in specs for case in (*s.cases, *s.drawn(drawn)) if shapes == "full" or case.quick]
    budget = _BUDGET[shapes] if budget is None else budget
    path = Path(out) / f"{name or environment.name(device)}.json"
    result: dict[str, Any] = {
        "format": 1,
        "complete": False,
        "device": device,
        "shapes": shapes,
        "seed": seed,
        "drawn": drawn,
        "environment": environment.environment(device),
        "machine": machine(device),
        "backends": {op: chosen[device] for op, chosen in survey().ops.items()},
        "rows": [],
        "skipped": [],
        "targets": [],
    }
    started = time.monotonic()
    for done, (spec, case) in enumerate(work):
        progress(done, len(work), f"{spec.op} {case.name}")
        try:
            rows, skipped = measure(spec, case, device, backends=backends, budget=budget, seed=seed)
        except Exception as error:  # such as too little memory for the inputs: the other cases still count
            rows, skipped = [], [_left_out(spec, case, "every contender", error)]
        result["rows"] += rows
        result["skipped"] += skipped
        result["targets"] += results.check_targets(spec, case, device, rows)
        result["seconds"] = round(time.monotonic() - started, 1)
        results.write_json(path, result)
    for spec in specs:
        result["targets"] += results.check_medians(spec, device, result["rows"])
    result["complete"] = True
    result["environment"]["load_after"] = environment.load()
    progress(len(work), len(work), "")
    results.write_all(path, result)
    return result


def choose(ops: Iterable[str], device: str) -> list[Spec]:
    """The specs of the given names (all if none) that run on `device`."""
    ops = list(ops) or [op for op, spec in SPECS.items() if device in spec.devices]
    for op in ops:
        if op not in SPECS:
            raise ValueError(f"op is {op!r}; choose from {', '.join(SPECS)}")
        if device not in SPECS[op].devices:
            raise ValueError(f"{op} is measured on {', '.join(SPECS[op].devices)} only, not on {device}")
    return [SPECS[op] for op in ops]


def measure(
    spec: Spec, case: Case, device: str, *, backends: tuple[str, ...] = (), budget: float = 1.0, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of one case, and the contenders left out with the reason."""
    inputs = spec.inputs(case, device, seed)
    reference = spec.reference(inputs)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    warm: dict[str, float] = {}
    returned: dict[str, int] = {}
    skipped = []
    for name, prepare in spec.contenders.items():
        if backends and any(f"{name} ".startswith(f"{OURS} {b} ") for b in _ops.BACKENDS if b not in backends):
            continue
        try:
            call = prepare(inputs)
            _bearable(once(call, device)[0], 3 * _PATIENCE)  # compiles, loads, tunes
            seconds, output = once(call, device, spec.self_timed)
            _bearable(seconds)
            if not spec.self_timed:
                errors[name] = spec.error(output, reference, inputs)
            returned[name] = memory.held(output)
            del output
        except Exception as error:  # whatever is wrong with one contender, the others are measured
            skipped.append(_left_out(spec, case, name, error))
        else:
            calls[name], warm[name] = call, seconds
    del reference
    limits = {name: prepare(inputs) for name, prepare in spec.limits.items()}
    for call in limits.values():
        once(call, device)
    timings = interleave({**calls, **limits}, device, budget=budget, warm=warm, seed=seed, self_timed=spec.self_timed)
    floor = max(limits, key=lambda name: quantiles(timings[name].seconds)["p50"], default=None)
    tolerance = spec.tolerance(inputs)
    right = {name for name in calls if errors.get(name, 0.0) <= tolerance}
    rows = []
    for name, call in {**calls, **limits}.items():
        role = "limit" if name in limits else "protofast" if name.startswith(OURS) else "baseline"
        timing = timings[name]
        row: dict[str, Any] = {
            "op": spec.op,
            "case": case.name,
            "params": dict(case.params),
            "device": device,
            "contender": name,
            "role": role,
            "seconds": quantiles(timing.seconds),
            "wall": quantiles(timing.wall) if timing.wall else None,
            "rounds": len(timing.seconds),
            "inner": timing.inner,
            "limit": floor,
            "times_limit": ratio(timing, timings[floor]) if floor else None,
            "bytes": spec.bytes(inputs),
            "flops": spec.flops(inputs),
            "error": errors.get(name),
            "wrong": role != "limit" and name not in right,
            "faster_than": {},
            "peak_memory": None if role == "limit" or spec.self_timed else memory.peak(call, device),
            "returned": returned.get(name),
        }
        if role == "protofast" and not row["wrong"] and not spec.self_timed:
            others = [*(o for o in calls if o in right and not o.startswith(OURS)), *limits]
            row["faster_than"] = {other: ratio(timings[other], timing) for other in others}
        rows.append(row)
    del calls, limits, inputs
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows, skipped


def _bearable(seconds: float, patience: float = _PATIENCE) -> None:
    if seconds > patience:
        raise Skip(f"one call took {seconds:.0f} s; more than {patience:.0f} s are not waited for")


def _left_out(spec: Spec, case: Case, contender: str, error: Exception) -> dict[str, str]:
    text = str(error) if isinstance(error, UNABLE) else f"{type(error).__name__}: {error}"
    reason = (text.strip() or type(error).__name__).splitlines()[0]
    return {"op": spec.op, "case": case.name, "contender": contender, "reason": reason}


def machine(device: str) -> dict[str, float]:
    """Rates of this machine now: bytes a second of a streaming copy, flops a second of square products."""
    size = 1 << (30 if device == "cuda" else 28)
    side = 8192 if device == "cuda" else 1024
    products = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device == "cuda" else {})
    calls = {"copy": copy_limit(size, device)}
    calls |= {f"matmul {name}": matmul_limit(side, side, side, dtype, device) for name, dtype in products.items()}
    for call in calls.values():
        once(call, device)
    timings = interleave(calls, device, budget=1.0)
    amount = {"copy": size} | {name: 2 * side**3 for name in calls if name != "copy"}
    return {name: amount[name] / quantiles(timing.seconds)["p50"] for name, timing in timings.items()}


def _limit_blas(threads: int) -> None:
    """numpy's BLAS keeps its own threads; without threadpoolctl only its environment variables rule them."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)
