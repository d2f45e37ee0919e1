"""Which backend runs an op: choice, availability, and the reasons for both."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops

PREFERENCE = {"cpu": ("native", "reference", "triton"), "cuda": ("native", "triton", "reference")}
"""Order of trial on each device type; elsewhere only the reference runs."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run the op here; the message says why and how to get it."""


_chosen: str | None = None


def _check(name: str, origin: str) -> str:
    if name not in _ops.BACKENDS:
        raise ValueError(f"{origin} is {name!r}; choose one of {', '.join(map(repr, _ops.BACKENDS))}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on one backend.

    The choice is process-wide, like `torch.backends` flags. A ``backend=`` argument on a call goes before it, the
    environment variable ``PROTOFAST_BACKEND`` after it.

    Parameters
    ----------
    name : {"reference", "native", "triton"}

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.randn(50, 2)
    >>> with pf.use_backend("reference"):
    ...     chosen = pf.k_center(points, 3).indices
    """
    global _chosen
    before, _chosen = _chosen, _check(name, "backend")
    try:
        yield
    finally:
        _chosen = before


def overload(op: str, device: str, backend: str | None = None, *, grad: bool = True) -> torch._ops.OpOverload:
    """The overload of `op` that runs on tensors of device type `device`; without `grad`, the one autograd ignores."""
    if getattr(forward_ad, "_current_level", -1) >= 0 and op.removesuffix("_out") in _ops.DIFFERENTIABLE:
        # torch would drop the tangents without a word
        raise NotImplementedError(
            f"{op} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use backward mode"
        )
    wanted = _wanted(backend)
    compiling = torch.compiler.is_compiling()
    # A compiler would guard on what the table holds, and compile again once an eager call has filled it.
    found = None if compiling else _found.get((op, device, wanted, grad))
    if found is None:
        if wanted is not None and (reason := why_not(op, device, wanted)):
            raise BackendUnavailableError(reason)
        name = wanted or _first(op, device)
        if not grad and op in _ops.DIFFERENTIABLE:
            name += "_nograd"
        found = getattr(getattr(torch.ops.protofast, op), name)
        if not compiling:
            _found[op, device, wanted, grad] = found
    return found


def differentiates(*arguments: Any) -> bool:
    """Whether a call with these arguments needs a gradient."""
    return torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in arguments)


def chooses(name: str, backend: str | None) -> bool:
    """Whether `backend` of a call names a backend, or leaves the choice to `overload`; and no tangent is about."""
    free = _chosen is None and _from_environment is None if backend is None else backend == name
    return free and getattr(forward_ad, "_current_level", -1) < 0


_found: dict[tuple[str, str, str | None, bool], torch._ops.OpOverload] = {}
_from_environment = os.environ.get("PROTOFAST_BACKEND") or None


def _wanted(backend: str | None = None) -> str | None:
    """The backend that is asked for: by the call, by `use_backend`, by the environment, or by none of them."""
    if backend is not None:
        return _check(backend, "backend")
    if _chosen is None and _from_environment is not None:
        return _check(_from_environment, "the environment variable PROTOFAST_BACKEND")
    return _chosen


def _first(op: str, device: str) -> str:
    return next((b for b in PREFERENCE.get(device, ()) if _ops.runs(op, device, b)), "reference")


def why_not(op: str, device: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `op` on `device`, and the cure; None when it can."""
    if _ops.runs(op, device, backend):
        return None
    if backend in _ops.UNAVAILABLE:
        return f"backend {backend!r} is not available: {_ops.UNAVAILABLE[backend]}"
    instead = f"use backend={_first(op, device)!r}"
    if devices := _ops.KERNELS[op].get(backend):
        return f"backend {backend!r} runs {op} on {', '.join(sorted(devices))} only, not on {device}; {instead}"
    return f"backend {backend!r} has no kernel for {op} yet; {instead}"


def version() -> str:
    """This package's version; a checkout on PYTHONPATH that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("protofast")
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, repr=False)
class BackendInfo:
    """What `backend_info` found. Printing it gives the table.

    Attributes
    ----------
    available : dict of str to bool
        Backend name to whether it loaded.
    reasons : dict of str to str
        For each backend that is absent, why, and how to get it.
    chosen : str or None
        The backend that `use_backend` or ``PROTOFAST_BACKEND`` asks for.
    ops : dict of str to dict of str to str
        Op name to device type to the backend that would run it now; ``"error"`` where the chosen one cannot.
    why_not : dict of str to dict of str to dict of str to str
        Op name to device type to backend to the reason why it cannot run there.
    cuda : str
        Whether torch sees a GPU, and what is missing if not.
    build : dict
        What the compiled module says of itself; empty without it.
    versions : dict of str to str
    """

    available: dict[str, bool]
    reasons: dict[str, str]
    chosen: str | None
    ops: dict[str, dict[str, str]]
    why_not: dict[str, dict[str, dict[str, str]]]
    cuda: str
    build: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<BackendInfo: {', '.join(name for name, there in self.available.items() if there)} available>"

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {number}" for name, number in self.versions.items()), ""]
        for name, there in self.available.items():
            built = f": {self._built()}" if name == "native" and self.build else ""
            lines.append(f"{name:<10} {'available' + built if there else 'absent: ' + self.reasons[name]}")
        lines.append(f"{'GPU':<10} {self.cuda}")
        if self.chosen:
            lines.append(f"{'chosen':<10} {self.chosen}")
        devices = list(next(iter(self.ops.values())))
        lines += ["", f"{'op':<24}" + "".join(f"{device:<12}" for device in devices)]
        for op, chosen in self.ops.items():
            lines.append(f"{op:<24}" + "".join(f"{chosen[device]:<12}" for device in devices))
        alike: dict[str, dict[str, None]] = {}  # a reason -> the ops that share it
        for op, rows in self.why_not.items():
            for row in rows.values():
                for name, why in row.items():
                    if self.available[name]:
                        alike.setdefault(why.replace(op, "{}"), {})[op] = None
        lines += ["", *(f"- {why.replace('{}', ', '.join(ops))}" for why, ops in alike.items())]
        return "\n".join(lines)

    def _built(self) -> str:
        said = ", ".join(f"{key} {self.build[key]}" for key in ("isa", "compiler", "built_with_torch"))
        if self.build["cuda"]:
            return f"{said}, cuda {self.build['cuda']} for {self.build['cuda_archs']}"
        cure = f"install the CUDA toolkit, then `PROTOFAST_FORCE_CUDA=1 {_ops.BUILD}` in a checkout"
        return f"{said}; no CUDA kernels: {cure}"


def backend_info() -> BackendInfo:
    """Prints, and returns, what is available, what would run each op, and why anything would not.

    Starts no CUDA context.

    Returns
    -------
    BackendInfo

    Examples
    --------
    >>> import protofast as pf
    >>> info = pf.backend_info()  # doctest: +ELLIPSIS
    protofast ...
    >>> info.available["reference"]
    True
    """
    found = survey()
    print(found)
    return found


def survey() -> BackendInfo:
    """What `backend_info` prints."""
    devices = ("cpu", "cuda")
    wanted = _wanted()

    def chosen(op: str, device: str) -> str:
        if wanted is None:
            return _first(op, device)
        return wanted if why_not(op, device, wanted) is None else "error"

    return BackendInfo(
        available={name: name not in _ops.UNAVAILABLE for name in _ops.BACKENDS},
        reasons=dict(_ops.UNAVAILABLE),
        chosen=wanted,
        ops={op: {device: chosen(op, device) for device in devices} for op in _ops.SCHEMAS},
        why_not={
            op: {
                device: {name: why for name in _ops.BACKENDS if (why := why_not(op, device, name))}
                for device in devices
            }
            for op in _ops.SCHEMAS
        },
        cuda=_gpus(),
        build=compiled.build_info() if (compiled := sys.modules.get("protofast._C")) else {},
        versions={"protofast": version(), "torch": torch.__version__},
    )


def _gpus() -> str:
    if not torch.backends.cuda.is_built():
        return (
            f"absent: torch {torch.__version__} is built without CUDA; https://pytorch.org/get-started has the builds"
        )
    count = torch.cuda.device_count()  # asks the driver's library, which starts no context
    return (
        f"{count} seen"
        if count
        else "absent: torch sees no GPU; `nvidia-smi` must list one (CUDA_VISIBLE_DEVICES hides)"
    )
