"""Backends to test, on the CPU and on a GPU where there is one."""

import os

import torch

if not torch.cuda.is_available():
    # Read when triton is imported, so before everything else: its kernels then run on the CPU, as a third backend.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from protofast._backend import why_not

torch.set_num_threads(min(2, torch.get_num_threads()))
settings.register_profile("protofast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("protofast")

PLACES = [("reference", "cpu"), ("native", "cpu")]
PLACES += [("native", "cuda"), ("triton", "cuda")] if torch.cuda.is_available() else [("triton", "cpu")]


@pytest.fixture(scope="module", params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Backend and device; skipped, with the reason, where the ops a test module names in OPS do not run."""
    backend, device = request.param
    for op in request.module.OPS:
        if reason := why_not(op, device, backend):
            pytest.skip(reason)
    return backend, device


@pytest.fixture(scope="module")
def backend(place: tuple[str, str]) -> str:
    return place[0]


@pytest.fixture(scope="module")
def device(place: tuple[str, str]) -> str:
    return place[1]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
