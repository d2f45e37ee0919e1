"""The one place that owns every op: schema, fake (meta) kernel and autograd formula.

An op ``name`` has one overload per backend, ``torch.ops.protofast.name.reference`` and so on. All share the
schema, fake kernel and gradient given here; a backend only registers kernels with `implement`. Choosing a
backend is choosing an overload, so it costs no second dispatch and shows in a traced graph. An op with a gradient has
each of them twice: ``reference_nograd`` passes autograd by, whose layer takes longer than a small kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

NAMESPACE = "protofast"
BACKENDS = ("reference", "native", "triton")

SCHEMAS: dict[str, str] = {}
DIFFERENTIABLE: set[str] = set()
KERNELS: dict[str, dict[str, set[str]]] = {}
"""op -> backend -> device types that have a kernel ("default" means any)."""

BUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
"""Builds the compiled backend, in a checkout."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

UNAVAILABLE: dict[str, str] = {}
"""backend -> why it could not be loaded, and the cure. Filled while the backends are imported."""


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Declares op `name` for every backend."""
    SCHEMAS[name] = schema
    KERNELS[name] = {}
    for backend in BACKENDS:
        qualname = f"{NAMESPACE}::{name}.{backend}"
        torch.library.define(qualname, schema)
        torch.library.register_fake(qualname, fake)
        if backward is not None:
            DIFFERENTIABLE.add(name)
            torch.library.register_autograd(qualname, backward, setup_context=_remember(backend, setup_context))
            torch.library.define(f"{qualname}_nograd", schema)
            torch.library.register_fake(f"{qualname}_nograd", fake)
            _library.impl(f"{name}.{backend}_nograd", torch.library.fallthrough_kernel, "Autograd")


def _remember(backend: str, setup_context: Callable[..., None] | None) -> Callable[..., None]:
    """`setup_context`, with the backend of the forward pass left in ``ctx.backend`` for the backward."""

    def setup(ctx, inputs, output) -> None:
        ctx.backend = backend
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def runs(name: str, device: str, backend: str) -> bool:
    """Whether `backend` has a kernel of op `name` for `device`."""
    return not KERNELS[name].get(backend, set()).isdisjoint((device, "default"))


def same_backend(name: str, backend: str, device: str) -> torch._ops.OpOverload:
    """The overload of op `name` for a backward on `device` whose forward ran on `backend`, or the reference's."""
    return getattr(getattr(torch.ops.protofast, name), backend if runs(name, device, backend) else "reference")


def implement(name: str, backend: str, devices: Iterable[str], kernel: Callable[..., Any]) -> None:
    """Registers `kernel` of a Python backend for op `name` on `devices` ("cpu", "cuda" or "default")."""
    for device in devices:
        torch.library.impl(f"{NAMESPACE}::{name}.{backend}", device, kernel)
        if name in DIFFERENTIABLE:
            torch.library.impl(f"{NAMESPACE}::{name}.{backend}_nograd", device, kernel)
    implemented(name, backend, devices)


def implemented(name: str, backend: str, devices: Iterable[str]) -> None:
    """Records kernels that a compiled library has registered itself."""
    KERNELS[name].setdefault(backend, set()).update(devices)


from . import channels, ddim, prototype, selection  # noqa: E402,F401
