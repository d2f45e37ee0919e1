"""What a benchmark of one op consists of. Tests use the same inputs, contenders and references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from protofast import _ops
from protofast._backend import PREFERENCE, BackendUnavailableError

Call = Callable[[], Any]
Prepare = Callable[[Any], Call]
"""Inputs to a call that takes none. What a user does once (allocate, compile) happens here, untimed."""

OURS = "protofast"
"""Contenders of this package have names that begin so; all others are baselines."""


class Skip(Exception):
    """A contender cannot run here; the message says why."""


UNABLE = (Skip, BackendUnavailableError, ImportError)
"""What a contender raises where it cannot run; anything else is a failure."""


@dataclass(frozen=True)
class Case:
    """One set of inputs; `quick` cases make up ``--shapes quick``."""

    name: str
    params: Mapping[str, Any]
    quick: bool = True


@dataclass(frozen=True)
class Target:
    """A promise: in `case` on `device`, `contender` is at least `bound` times as fast as `against`.

    Without `against`, its median is at most `bound` seconds.
    """

    case: str
    contender: str
    against: str | None
    bound: float
    device: str = "cpu"


@dataclass(frozen=True)
class Median:
    """A promise over the cases whose params have the items of `where`: the median of a ratio to `against`.

    At least `bound` times as fast; with ``of="peak_memory"``, at most `bound` times the memory, and with
    ``of="extra_memory"`` the same of what is left of both peaks without the tensors returned. Of several contenders
    the best one of each case counts.
    """

    name: str
    where: Mapping[str, Any]
    contender: str | tuple[str, ...]
    against: str
    bound: float
    of: str = "seconds"
    device: str = "cpu"


@dataclass(frozen=True)
class Spec:
    """One op's benchmark.

    Attributes
    ----------
    inputs : (case, device, seed) -> inputs
    contenders : name -> Prepare
        Raise `Skip` or ImportError where one cannot run.
    reference : inputs -> result
        The result in float64 by a direct form, sharing no code with any contender.
    error : (output, reference result, inputs) -> float
        Zero is perfect; above ``tolerance(inputs)`` the contender is wrong, and is shown as wrong, not as fast.
    limits : name -> Prepare
        Plain library calls that move the bytes or do the flops the op cannot avoid. The slowest is the floor.
    bytes, flops : inputs -> int
        What the op cannot avoid: each input read once, each output written once; its multiplications and additions.
    drawn : number -> cases
        More quick cases, others for each number; a run takes its seed, or without one a number at random.
    self_timed : bool
        The call returns its own seconds (a fresh process, say).
    """

    op: str
    about: str
    cases: tuple[Case, ...]
    tiny: tuple[Case, ...]
    inputs: Callable[[Case, str, int], Any]
    contenders: Mapping[str, Prepare]
    reference: Callable[[Any], Any]
    error: Callable[[Any, Any, Any], float]
    tolerance: Callable[[Any], float]
    limits: Mapping[str, Prepare] = field(default_factory=dict)
    bytes: Callable[[Any], int] = lambda _: 0
    flops: Callable[[Any], int] = lambda _: 0
    targets: tuple[Target, ...] = ()
    medians: tuple[Median, ...] = ()
    drawn: Callable[[int], tuple[Case, ...]] = lambda _: ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    self_timed: bool = False


def ours(call: Callable[[Any, str], Call]) -> dict[str, Prepare]:
    """One contender for each backend of this package, from ``call(inputs, backend)``."""

    def prepare(backend: str, inputs: Any) -> Call:
        if backend == "triton" and inputs.device == "cpu":
            raise Skip("Triton runs on a CPU through its interpreter alone, which is for tests")
        if backend in _ops.UNAVAILABLE:
            raise Skip(_ops.UNAVAILABLE[backend])
        if backend not in PREFERENCE[inputs.device]:
            raise Skip(f"backend {backend!r} does not run on {inputs.device}")
        return call(inputs, backend)

    return {f"{OURS} {backend}": partial(prepare, backend) for backend in _ops.BACKENDS}


def generator(seed: int) -> torch.Generator:
    """Inputs are drawn on the CPU, so that every device gets the same."""
    return torch.Generator().manual_seed(seed)


def tensor_error(output: Any, reference: Any) -> float:
    """Largest |output − reference| over a tensor, relative to the reference's largest magnitude; NaN counts as inf."""
    exact = reference.double().cpu()
    difference = (output.detach().double().cpu() - exact).abs().max()
    return float(difference.nan_to_num(nan=torch.inf) / exact.abs().max().clamp(min=1e-300))


def copy_limit(nbytes: int, device: str) -> Call:
    """A streaming copy that reads and writes `nbytes` in all."""
    source = torch.ones(max(nbytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_limit(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Call:
    """One (m, k) @ (k, n) product into a given output."""
    a, b = torch.rand(m, k, device=device).to(dtype), torch.rand(k, n, device=device).to(dtype)
    target = torch.empty(m, n, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=target)
