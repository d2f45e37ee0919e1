"""The compiled backend: CPU SIMD and CUDA kernels that the library `protofast._C` registers when it loads."""

import importlib

from protofast import _ops

_BUILD = "`pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout"

try:
    _compiled = importlib.import_module("protofast._C")
except ModuleNotFoundError:
    _ops.UNAVAILABLE["native"] = (
        "the compiled module protofast._C was not built, for want of torch or of a C++20 compiler at install time (pip "
        "builds in isolation from torch unless told otherwise); install a compiler, setuptools, wheel and ninja, then "
        f"run {_BUILD}"
    )
except ImportError as error:
    _ops.UNAVAILABLE["native"] = (
        f"the compiled module protofast._C is there but does not load ({error}); build it against this torch: {_BUILD}"
    )
else:
    for _op, _devices in _compiled.build_info()["kernels"].items():
        _ops.implemented(_op, "native", _devices)
