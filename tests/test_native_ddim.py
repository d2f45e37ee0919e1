"""What only the compiled CPU step has: instruction sets, blocks and tails, threads, non-temporal stores."""

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, assert_within, exact
from helpers.fresh import run_fresh

import protofast as pf
from protofast import _ops

pytestmark = pytest.mark.skipif("native" in _ops.UNAVAILABLE, reason=_ops.UNAVAILABLE.get("native", ""))

ISAS = ["plain", "avx2", "avx512", "avx512vnni", "avx512bf16"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def exact_step(x, m, t, prev, schedule):
    """The exact epsilon step (unclipped) and the sum of the magnitudes of its terms."""
    now, then = (EXACT(float(schedule.alphas_cumprod[step])) for step in (t, prev))
    sample, direction, image = np.sqrt(then / now), np.sqrt(1 - then), np.sqrt(then * (1 - now) / now)
    x, m = exact(x), exact(m)
    return sample * x + (direction - image) * m, sample * abs(x) + (direction + image) * abs(m)


def _same_bits() -> bool:
    """Whether every option without contraction, and the noise, has the reference's bits at every length."""
    schedule = pf.DDIMSchedule.linear(1000)
    torch.manual_seed(0)
    for dtype, narrow in [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]:
        for count in [*range(1, 70), 127, 128, 129, 190]:
            x, u, v, k, z = (torch.randn(2, count).to(dtype) for _ in range(5))
            mask = torch.rand(2, count) < 0.5
            results = [
                pf.ddim_step(
                    *(x, (u.to(narrow), v.to(narrow)), 500, 480, schedule),
                    eta=0.5,
                    seed=(3, count),
                    guidance_scale=2.0,
                    guidance_rescale=0.5 if count > 1 else 0.0,
                    known=k,
                    known_noise=z,
                    mask=mask,
                    clip_range=1.0,
                    bitwise=True,
                    prediction_type=kind,
                    backend=backend,
                )
                for kind in ("epsilon", "sample", "v_prediction")
                for backend in ("native", "reference")
            ]
            for native, reference in zip(results[::2], results[1::2], strict=True):
                if not all(map(torch.equal, native, reference)):
                    return False
    return True


def _on_isa() -> tuple[str, list[float], bool]:
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
    return _C.build_info()["isa"], shares, _same_bits()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    from protofast import _C

    best = _C.build_info()["isa"]
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor has {best} at best")
    used, shares, same = run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa)
    assert used == isa
    assert same
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_noise_and_threads(dtype):
    """Drawn noise does not depend on where a thread begins or on non-temporal stores."""
    schedule = pf.DDIMSchedule.linear(1000)
    x = torch.zeros(2, (36 << 20) // (4 * dtype.itemsize) + 3, dtype=dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = torch.full_like(x, torch.nan)
            pf.ddim_step(x, x, 500, 480, schedule, eta=1.0, seed=5, out=out, backend="native")
            found.append(out)
            noise = pf.diffusion.normal_noise(x, 5, backend="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    given = pf.ddim_step(x, x, 500, 480, schedule, eta=1.0, noise=noise, out=torch.empty_like(x), backend="native")
    assert torch.equal(found[0], given.prev_sample)


def test_direct_calls_are_checked():
    """The op itself refuses what would read out of bounds."""
    step, coefficients = torch.ops.protofast.ddim_step.native, torch.ops.protofast.ddim_coefficients.native
    alphas, steps = pf.DDIMSchedule.linear(10)._on(torch.device("cpu"))
    table = coefficients(alphas, steps[3], steps[2], 0.0)
    x, vector = torch.ones(3, 4), torch.ones(2, dtype=torch.float64)
    for bad in (torch.ones(3, 3), torch.ones(3, 4, dtype=torch.float64), torch.ones(12), torch.ones(3, 4).int()):
        with pytest.raises(RuntimeError, match=r"model_output|dtype|float32"):
            step(x, bad, table)
        for name in ("cond_output", "noise", "known_noise"):
            with pytest.raises(RuntimeError, match=name):
                step(x, x, table, **{name: bad})
    for bad in (table.float(), table[:, :5], table.expand(2, 6), table.repeat(2, 1), table[0]):
        with pytest.raises(RuntimeError, match="table"):
            step(x, x, bad)
    for bad in (torch.tensor([0, 0]), torch.tensor([0], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="row"):
            step(x, x, table, bad)
    for name in ("rescale", "threshold"):
        for bad in (vector, torch.ones(3)):
            with pytest.raises(RuntimeError, match=name):
                step(x, x, table, **{name: bad})
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(4, dtype=torch.int64)[::2]):
        with pytest.raises(RuntimeError, match="seed"):
            step(x, x, table, seed=bad)
    with pytest.raises(RuntimeError, match="go together"):
        step(x, x, table, known=x)
    with pytest.raises(RuntimeError, match="mask"):
        step(x, x, table, known=x, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="timestep"):
        coefficients(alphas, torch.tensor([1, 2]), torch.tensor([1, 2, 3]), 0.0)
    with pytest.raises(RuntimeError, match="alphas_cumprod"):
        coefficients(alphas.float(), steps[3], steps[2], 0.0)
