"""The compiled backend: CPU SIMD and CUDA kernels that the library `protofast._C` registers when it loads."""

from protofast import _ops

try:
    from protofast import _C
except ImportError as error:
    _ops.UNAVAILABLE["native"] = (
        f"the compiled module protofast._C did not load ({error}); with a C++20 compiler, reinstall by "
        "`pip install --no-build-isolation --force-reinstall --no-deps .`"
    )
else:
    for _op, _devices in _C.build_info()["kernels"].items():
        _ops.implemented(_op, "native", _devices)
