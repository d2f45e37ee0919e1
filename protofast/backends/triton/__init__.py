"""The Triton backend. Triton itself is imported at a kernel's first call."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from protofast import _ops

_KERNELS = {
    "channels": ("channel_purity", "channel_purity_backward"),
    "ddim": ("ddim_coefficients", "ddim_step", "ddim_step_out"),
    "philox": ("philox_normal",),
    "prototype": ("prototype_activation", "prototype_backward", "prototype_map"),
    "selection": ("k_center", "cover", "relax"),
}
"""module of this package -> the ops it implements, by functions of the same names."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _lazy(module: str, op: str) -> Callable[..., Any]:
    kernel = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module(f"{__name__}.{module}"), op)
        return kernel(*args, **kwargs)

    return call


if importlib.util.find_spec("triton") is None:
    _ops.UNAVAILABLE["triton"] = (
        "the package triton is not installed; `pip install triton` (Linux; on Windows `pip install triton-windows`)"
    )
else:
    for _module, _names in _KERNELS.items():
        for _name in _names:
            # The interpreter runs the same kernels on the CPU, slowly, to test and debug them.
            _ops.implement(_name, "triton", ["cuda", "cpu"] if _INTERPRETED else ["cuda"], _lazy(_module, _name))
