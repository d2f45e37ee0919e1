"""The compiled backend: CPU SIMD and CUDA kernels that the library `protofast._C` registers when it loads."""

import importlib
import re

from protofast import _ops

try:
    _compiled = importlib.import_module("protofast._C")
except ModuleNotFoundError:
    _ops.UNAVAILABLE["native"] = (
        "the compiled module protofast._C was not built: PROTOFAST_BUILD_NATIVE=0 was set, or torch or a C++20 "
        "compiler was missing at install time (pip builds in isolation from torch unless told otherwise); install a "
        "compiler, setuptools, wheel and ninja, then "
        f"run `{_ops.BUILD}` in a checkout"
    )
except ImportError as error:
    _why = re.sub(r"\S*/", "", str(error))  # without the paths of this machine
    _ops.UNAVAILABLE["native"] = (
        f"the compiled module protofast._C is there but does not load ({_why}); build it "
        f"against this torch: `{_ops.BUILD}` in a checkout"
    )
else:
    for _op, _devices in _compiled.build_info()["kernels"].items():
        if _op in _ops.SCHEMAS:  # a library older than this checkout may hold ops that are gone
            _ops.implemented(_op, "native", _devices)
