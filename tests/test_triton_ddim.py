"""The Triton DDIM kernel: what it compiles to on GPUs that are not here, and its two ways of running."""

import importlib.util
import os

import pytest
import torch
from helpers.aot import ARCHITECTURES, assert_no_spills, assert_wide_addresses, builds
from helpers.fresh import run_fresh

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def launches():
    """Every dtype, per-sample and shared timesteps, with everything the step can take and with the least."""
    from protofast.backends.triton.ddim import ddim_step, ddim_step_out

    table = torch.rand(11, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.zeros(4, 3, 32, 32, dtype=dtype)
        t = torch.zeros(4, dtype=torch.int64)
        ddim_step(x, x, x, x, table, t, t, 0.5, 2, -1.0, 1.0, 2.0)
        least = x, x, None, None, table, t[0], t[0], 0.0, 0, -float("inf"), float("inf"), 1.0
        ddim_step_out(*least, prev_sample=x, pred_original_sample=None)


def test_compiles_without_spills_and_with_64_bit_addresses():
    found = builds(launches)
    assert len(found) == 8 * len(ARCHITECTURES)
    for build in found:
        assert_no_spills(build)
        assert_wide_addresses(build)
        assert build.shared == 0
        # These lose a NaN on a GPU, which the interpreter does not show.
        assert not any(op in build.ttir for op in ("arith.maxnumf", "arith.minnumf"))
        assert build.registers <= 128  # at least half of the threads that an SM can hold
        assert ".v4.b32" in build.ptx or ".v2.b64" in build.ptx, "memory is not accessed 16 bytes at a time"


def small_and_odd():
    """Sizes that specialize differently: 1, and not a multiple of 16."""
    from protofast.backends.triton.ddim import ddim_step

    table = torch.rand(11, dtype=torch.float64)
    for shape in ((1,), (1, 1), (3, 5), (300, 2), (1, 2000)):
        x = torch.zeros(shape)
        t = torch.zeros(shape[0], dtype=torch.int64)
        ddim_step(x, x, None, None, table, t, t, 0.0, 0, -1.0, 1.0, 1.0)


def test_odd_sizes_compile():
    found = builds(small_and_odd, [90])
    assert len(found) == 5
    for build in found:
        assert_no_spills(build)
        assert_wide_addresses(build)


def runs_where():
    from protofast._backend import why_not

    return [why_not("ddim_step", device, "triton") for device in ("cpu", "cuda")]


def test_runs_on_the_cpu_only_when_interpreted():
    cpu, cuda = run_fresh(runs_where, TRITON_INTERPRET=None)
    assert cpu.startswith("backend 'triton' runs ddim_step on cuda only, not on cpu; use backend=")
    assert cuda is None
    assert run_fresh(runs_where, TRITON_INTERPRET="1") == [None, None]


def import_without_triton():
    import sys

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    import protofast as pf
    from protofast._backend import why_not

    assert "protofast.backends.triton.ddim" not in sys.modules
    return why_not("ddim_step", "cuda", "triton"), pf._backend.survey().available["triton"]


def test_without_triton_the_reason_names_the_cure():
    reason, available = run_fresh(import_without_triton)
    assert not available
    assert reason.startswith("backend 'triton' is not available: the package triton is not installed; `pip install")


def modules_at_import_and_after_a_call():
    import sys

    before = "triton" in sys.modules  # by torch, in some versions
    import protofast as pf

    pf._backend.survey()
    imported = "triton" in sys.modules
    x = torch.zeros(2, 3)
    pf.ddim_step(x, x, 5, 4, pf.DDIMSchedule.linear(10), backend="triton")
    return before, imported, "triton" in sys.modules


def test_triton_is_imported_at_the_first_call():
    before, imported, called = run_fresh(modules_at_import_and_after_a_call, TRITON_INTERPRET="1")
    assert imported == before
    assert called


def interpreted_on_a_gpu_machine():
    import protofast as pf

    x = torch.randn(3, 2000)
    schedule = pf.DDIMSchedule.linear(1000)
    ours, reference = (
        pf.ddim_step(x, x, torch.tensor([1, 2, 3]), 0, schedule, backend=backend) for backend in ("triton", "reference")
    )
    return (ours.prev_sample - reference.prev_sample).abs().max().item()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this session runs the interpreter throughout")
def test_interpreter_agrees():
    assert run_fresh(interpreted_on_a_gpu_machine, TRITON_INTERPRET="1") < 1e-6
