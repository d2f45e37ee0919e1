"""What only the compiled CPU step has: instruction sets, blocks and tails, threads, non-temporal stores."""

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, assert_within, exact
from helpers.fresh import run_fresh

import protofast as pf
from protofast import _ops

pytestmark = pytest.mark.skipif("native" in _ops.UNAVAILABLE, reason=_ops.UNAVAILABLE.get("native", ""))

ISAS = ["plain", "avx2", "avx512"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def exact_step(x, m, t, prev, schedule):
    """The exact epsilon step (unclipped) and the sum of the magnitudes of its terms."""
    now, then = (EXACT(float(schedule.alphas_cumprod[step])) for step in (t, prev))
    sample, direction, image = np.sqrt(then / now), np.sqrt(1 - then), np.sqrt(then * (1 - now) / now)
    x, m = exact(x), exact(m)
    return sample * x + (direction - image) * m, sample * abs(x) + (direction + image) * abs(m)


def _on_isa() -> tuple[str, list[float]]:
    """Every length up to beyond a block, at every alignment; for each dtype the worst error as a share of the bound."""
    from protofast import _C

    schedule = pf.DDIMSchedule.linear(1000)
    torch.manual_seed(0)
    shares = []
    for dtype in DTYPES:
        x, m = (torch.randn(2, 200).to(dtype) for _ in range(2))
        worst = 0.0
        for count in [*range(70), 127, 128, 129, 190]:
            offset = count % 9
            a, b = (v[:, offset : offset + count] for v in (x, m))
            out = torch.full((2, 200), 7.0, dtype=dtype)
            pf.ddim_step(a, b, 500, 480, schedule, out=out[:, 3 : 3 + count], backend="native")
            # Roundings: 6 in each float64 coefficient, then one product and one sum.
            worst = max(worst, assert_within(out[:, 3 : 3 + count], *exact_step(a, b, 500, 480, schedule), 8))
            out[:, 3 : 3 + count] = 7
            assert (out == 7).all(), "wrote outside its output"
        shares.append(worst)
    return _C.build_info()["isa"], shares


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    from protofast import _C

    best = _C.build_info()["isa"]
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has {best} at best")
    used, shares = run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa)
    assert used == isa
    assert all(share > 0 for share in shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_like_torch(dtype):
    """Timestep −1 to −1 with a zero prediction is the identity, so every value must come back bit for bit."""
    schedule = pf.DDIMSchedule.linear(10)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    out = pf.ddim_step(x, torch.zeros_like(x), -1, -1, schedule, out=torch.empty_like(x), backend="native").prev_sample
    number = ~x.isnan()
    assert torch.equal(out.isnan(), ~number)
    assert torch.equal(out[number], x[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_outputs_and_threads(dtype):
    """Past the size of the cache the stores are non-temporal: same bits as a small step's, on one thread and on two."""
    schedule = pf.DDIMSchedule.linear(1000)
    rows, cols = 3, (48 << 20) // (3 * dtype.itemsize) + 5  # odd, so that rows start unaligned
    x = torch.randn(cols).to(dtype).expand(rows, cols).contiguous()
    m = torch.randn(cols).to(dtype).expand(rows, cols).contiguous()
    steps = torch.tensor([500, 20, 999]), torch.tensor([480, -1, 979])
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
            found.append(pf.ddim_step(x, m, *steps, schedule, out=out, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    for part in (slice(0, 1000), slice(cols // 2, cols // 2 + 1000), slice(cols - 1000, cols)):
        small = pf.ddim_step(x[:, part], m[:, part], *steps, schedule, backend="native")
        for large, expected in zip(found[0], small, strict=True):
            assert torch.equal(large[:, part], expected)


def test_direct_calls_are_checked():
    """The op itself refuses what would read out of bounds."""
    schedule = pf.DDIMSchedule.linear(10)
    table, steps = schedule._on(torch.device("cpu"))
    op = torch.ops.protofast.ddim_step.native
    x = torch.ones(3, 4)
    rest = (0.0, 0, -1.0, 1.0, 1.0)
    for bad in (torch.ones(3, 3), torch.ones(3, 4, dtype=torch.float64), torch.ones(12)):
        with pytest.raises(RuntimeError, match="model_output"):
            op(x, bad, None, None, table, steps[3], steps[2], *rest)
    with pytest.raises(RuntimeError, match="timestep"):
        op(x, x, None, None, table, torch.tensor([1, 2]), steps[2], *rest)
    with pytest.raises(RuntimeError, match="alphas_cumprod"):
        op(x, x, None, None, table.float(), steps[3], steps[2], *rest)
