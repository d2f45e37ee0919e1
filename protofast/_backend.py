"""Which backend runs an op: choice, availability, and the reasons for both."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

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


def overload(op: str, device: str, backend: str | None = None) -> torch._ops.OpOverload:
    """The overload of `op` that runs on tensors of device type `device`."""
    wanted = backend or _chosen or _from_environment
    if wanted is None:
        try:
            return _automatic[op, device]
        except KeyError:
            pass
        chosen = _first(op, device)
        found = _named(op, chosen)
        if not torch.compiler.is_compiling():
            _automatic[op, device] = found
        return found
    if reason := why_not(op, device, _check(wanted, "backend")):
        raise BackendUnavailableError(reason)
    return _named(op, wanted)


_automatic: dict[tuple[str, str], torch._ops.OpOverload] = {}
_from_environment = os.environ.get("PROTOFAST_BACKEND") or None
if _from_environment is not None:
    _check(_from_environment, "the environment variable PROTOFAST_BACKEND")


def _named(op: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.protofast, op), backend)


def _first(op: str, device: str) -> str:
    for backend in PREFERENCE.get(device, ("reference",)):
        if why_not(op, device, backend) is None:
            return backend
    return "reference"


def why_not(op: str, device: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `op` on `device`, or None when it can."""
    devices = _ops.KERNELS[op].get(backend, set())
    if device in devices or "default" in devices:
        return None
    if backend in _ops.UNAVAILABLE:
        return f"backend {backend!r} is not available: {_ops.UNAVAILABLE[backend]}"
    if devices:
        return f"backend {backend!r} runs {op} on {', '.join(sorted(devices))} only, not on {device}"
    return f"backend {backend!r} has no kernel for {op} yet; use backend='reference'"


@dataclass(frozen=True)
class BackendInfo:
    """What `backend_info` found. Printing it gives the table.

    Attributes
    ----------
    available : dict of str to bool
        Backend name to whether it loaded.
    reasons : dict of str to str
        For each backend that is absent, why, and how to get it.
    ops : dict of str to dict of str to str
        Op name to device type to the backend that would run it now.
    build : dict
        What the compiled module says of itself; empty without it.
    versions : dict of str to str
    """

    available: dict[str, bool]
    reasons: dict[str, str]
    ops: dict[str, dict[str, str]]
    why_not: dict[str, dict[str, dict[str, str]]]
    build: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items()), ""]
        for name, there in self.available.items():
            lines.append(f"{name:<10} {'available' if there else 'absent: ' + self.reasons[name]}")
        if self.build:
            lines.append("native     " + ", ".join(f"{key} {value}" for key, value in self.build.items()))
        devices = list(next(iter(self.ops.values())))
        lines += ["", f"{'op':<24}" + "".join(f"{device:<12}" for device in devices)]
        for op, chosen in self.ops.items():
            lines.append(f"{op:<24}" + "".join(f"{chosen[device]:<12}" for device in devices))
        lines.append("")
        reasons = {why for devices_ in self.why_not.values() for row in devices_.values() for why in row.values()}
        lines += sorted(f"- {why}" for why in reasons if not why.endswith("is not available"))
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """Tells what is available, what would run each op, and why anything would not.

    Starts no CUDA context.

    Returns
    -------
    BackendInfo
        Prints as a table.

    Examples
    --------
    >>> import protofast as pf
    >>> pf.backend_info().available["reference"]
    True
    """
    from importlib.metadata import version

    devices = ("cpu", "cuda")
    wanted = _chosen or _from_environment

    def chosen(op: str, device: str) -> str:
        if wanted is None:
            return _first(op, device)
        return wanted if why_not(op, device, wanted) is None else "error"

    return BackendInfo(
        available={name: name not in _ops.UNAVAILABLE for name in _ops.BACKENDS},
        reasons=dict(_ops.UNAVAILABLE),
        ops={op: {device: chosen(op, device) for device in devices} for op in _ops.SCHEMAS},
        why_not={
            op: {
                device: {name: why for name in _ops.BACKENDS if (why := why_not(op, device, name))}
                for device in devices
            }
            for op in _ops.SCHEMAS
        },
        build=compiled.build_info() if (compiled := sys.modules.get("protofast._C")) else {},
        versions={"protofast": version("protofast"), "torch": torch.__version__},
    )
