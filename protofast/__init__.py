"""protofast: fused kernels and three systems for prototype-based and post-hoc explanation of generative models."""

import importlib
from typing import TYPE_CHECKING

from . import _ops as _ops
from . import backends as backends
from ._backend import BackendInfo, BackendUnavailableError, backend_info, use_backend
from ._backend import version as _version
from .channels import (
    ChannelPurity,
    ColumnTopK,
    RotatedPool,
    channel_heat_map,
    channel_purity,
    purity_of_all,
    rotate_and_pool,
)
from .ddim import DDIMSchedule, DDIMStep, ddim_inverse_step, ddim_step
from .prototype import (
    PrototypeActivation,
    PrototypeDistance,
    prototype_activation,
    prototype_distance,
    prototype_map,
)
from .selection import Selection, farthest_pair, k_center, k_dispersion, k_medoids

if TYPE_CHECKING:
    from . import data, diffusers, diffusion, nn, patronus, prodg, pxgen, selection

_LAZY = (
    "data",
    "diffusers",
    "diffusion",
    "nn",
    "patronus",
    "prodg",
    "pxgen",
)  # their imports cost time that `import protofast` must not pay


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'protofast' has no attribute {name!r}")


__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "ChannelPurity",
    "ColumnTopK",
    "DDIMSchedule",
    "DDIMStep",
    "PrototypeActivation",
    "PrototypeDistance",
    "RotatedPool",
    "Selection",
    "backend_info",
    "channel_heat_map",
    "channel_purity",
    "data",
    "ddim_inverse_step",
    "ddim_step",
    "diffusers",
    "diffusion",
    "farthest_pair",
    "k_center",
    "k_dispersion",
    "k_medoids",
    "nn",
    "patronus",
    "prodg",
    "prototype_activation",
    "prototype_distance",
    "prototype_map",
    "purity_of_all",
    "pxgen",
    "rotate_and_pool",
    "selection",
    "use_backend",
]
