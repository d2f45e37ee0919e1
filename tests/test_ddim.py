"""The DDIM step on every backend, against the textbook formula in extended precision."""

import itertools
import math
from contextlib import nullcontext
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, assert_within, exact
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import protofast as pf
from protofast import _ops, ddim
from protofast._backend import overload, why_not
from protofast._ops.ddim import PREDICTION_TYPES, coefficients

OPS = ("ddim_step", "ddim_step_out")
SCHEDULE = pf.DDIMSchedule.linear(1000)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = list(PREDICTION_TYPES)


def reference_coefficients(now, prev, eta, kind):
    """a, b, c, d, p, q, sigma as Song et al. write them, with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        now, prev, eta = Decimal(now), Decimal(prev), Decimal(eta)
        signal, spread = now.sqrt(), (1 - now).sqrt()
        if kind == "epsilon":
            a, b, c, d = 1 / signal, -spread / signal, 0, 1
        elif kind == "sample":
            a, b, c, d = 0, 1, 1 / spread, -signal / spread
        else:
            a, b, c, d = signal, -spread, spread, signal
        sigma = eta * ((1 - prev) / (1 - now)).sqrt() * (1 - now / prev).sqrt() if eta else Decimal(0)
        q = max(Decimal(0), 1 - prev - sigma**2).sqrt()
        return [EXACT(str(value)) for value in (a, b, c, d, prev.sqrt(), q, sigma)]


def check(
    result, x, m, t, s, *, schedule=SCHEDULE, eta=0.0, noise=None, kind="epsilon", clip=None, scale=None, backend
):
    """Asserts that both results of a step are as exact as the arithmetic allows."""
    values = schedule._values
    steps = np.broadcast_arrays(np.atleast_1d(np.asarray(t)), np.atleast_1d(np.asarray(s)))
    rows = [reference_coefficients(values[i + 1], values[j + 1], eta, kind) for i, j in zip(*steps, strict=True)]
    a, b, c, d, p, q, sigma = (
        np.array(column, EXACT).reshape(-1, *[1] * (x.ndim - 1)) for column in zip(*rows, strict=True)
    )
    sample = exact(x)
    if scale is None:
        output = exact(m)
        size = abs(output)
    else:
        u, v = map(exact, m)
        output = u + EXACT(scale) * (v - u)
        size = abs(u) + abs(scale) * (abs(u) + abs(v))
    x0, x0_terms = a * sample + b * output, abs(a * sample) + abs(b) * size
    if clip is not None:
        x0 = np.clip(x0, *((-clip, clip) if isinstance(clip, float) else clip))
    prev = p * x0 + q * (c * sample + d * output)
    terms = p * x0_terms + q * (abs(c * sample) + abs(d) * size)
    if noise is not None:
        prev, terms = prev + sigma * exact(noise), terms + abs(sigma * exact(noise))
    # The longest path: coefficient, scale, v − u, times, plus, times b, plus, times p, plus, plus. In float64 the
    # coefficients themselves have ten more.
    arithmetic = torch.float64 if backend == "reference" or x.dtype == torch.float64 else torch.float32
    roundings = 20 if arithmetic == torch.float64 else 10
    # Triton's interpreter cuts off bfloat16 where a GPU rounds.
    store = 2 if backend == "triton" and x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1
    for actual, expected, size in zip(result, (prev, x0), (terms, x0_terms), strict=True):
        assert actual.dtype == x.dtype
        assert_within(actual, expected, size, roundings, arithmetic=arithmetic, store=store)


def draw(*shape, dtype=torch.float32, device="cpu", count=2):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_exact(backend, device, kind, dtype):
    x, u, v, z = draw(3, 5, 7, dtype=dtype, device=device, count=4)
    steps = [(500, 480), (999, 0), (20, -1), ([999, 500, 3], [980, 499, -1]), (700, [600, 699, -1]), ([400, 5, 6], 4)]
    for (t, s), eta, clip, scale in itertools.product(steps, (0.0, 0.3, 1.0), (None, 0.9, (-0.5, 1.25)), (None, 7.5)):
        given_t, given_s = (torch.tensor(i, device=device) if isinstance(i, list) else i for i in (t, s))
        noise = z if eta else None
        m = u if scale is None else (u, v)
        options = {"eta": eta, "noise": noise, "clip_range": clip, "guidance_scale": scale, "backend": backend}
        result = pf.ddim_step(x, m, given_t, given_s, SCHEDULE, prediction_type=kind, **options)
        check(result, x, m, t, s, eta=eta, noise=noise, kind=kind, clip=clip, scale=scale, backend=backend)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
    | st.tuples(st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.integers(1, 3), st.integers(1020, 1030)),
    per_sample=st.booleans(),
    x0_too=st.booleans(),
)
def test_any_shape(backend, device, shape, per_sample, x0_too):
    x, m = draw(*shape, device=device)
    t = list(range(3, 3 + shape[0])) if per_sample else 500
    now = torch.tensor(t, device=device) if per_sample else t
    with poison():
        result = pf.ddim_step(x, m, now, 2, SCHEDULE, backend=backend)
    check(result, x, m, t, 2, backend=backend)
    prev_out, x0_out = torch.full_like(x, math.nan), torch.full_like(x, math.nan) if x0_too else result[1]
    out = (prev_out, x0_out) if x0_too else prev_out
    pf.ddim_step(x, m, now, 2, SCHEDULE, out=out, backend=backend)
    check((prev_out, x0_out), x, m, t, 2, backend=backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (1,), (1, 1), (1, 1, 1, 1)], ids=str)
def test_empty_and_one_element(backend, device, shape):
    x, m, z = draw(*shape, device=device, count=3)
    for t in (500, torch.full(shape[:1], 500, device=device)):
        result = pf.ddim_step(x, m, t, 480, SCHEDULE, eta=0.5, noise=z, clip_range=1.0, backend=backend)
        assert result.prev_sample.shape == result.pred_original_sample.shape == shape
        check(result, x, m, 500, 480, eta=0.5, noise=z, clip=1.0, backend=backend)
        out = torch.full_like(x, math.nan)
        assert not pf.ddim_step(x, m, t, 480, SCHEDULE, out=out, backend=backend).prev_sample.isnan().any()


@pytest.mark.parametrize("per_sample", [False, True])
def test_layouts(backend, device, per_sample):
    x, m, z = draw(3, 4, 5, 6, device=device, count=3)
    t = [3, 500, 999] if per_sample else 500
    now = torch.tensor(t, device=device) if per_sample else t
    results = []
    for (name, sample), (other, output) in itertools.product(layouts(x), layouts(m)):
        result = pf.ddim_step(sample, output, now, 2, SCHEDULE, eta=0.5, noise=z, backend=backend)
        assert result.prev_sample.stride() == torch.empty_like(sample).stride(), (name, other)
        assert result.pred_original_sample.stride() == torch.empty_like(sample).stride(), (name, other)
        results.append(result)
        written = torch.full_like(output, math.nan), dict(layouts(torch.full_like(x, math.nan)))[name]
        pf.ddim_step(sample, output, now, 2, SCHEDULE, eta=0.5, noise=z, out=written, backend=backend)
        results.append(written)
    for result in results:
        check(result, x, m, t, 2, eta=0.5, noise=z, backend=backend)


def test_expanded_inputs_and_strided_timesteps(backend, device):
    x, m = draw(3, 4, 5, device=device)
    x, m = expanded(x), expanded(m)
    t = torch.arange(6, device=device)[::2]
    check(pf.ddim_step(x, m, t, t - 1, SCHEDULE, backend=backend), x, m, [0, 2, 4], [-1, 1, 3], backend=backend)
    t = torch.tensor([7], device=device).expand(3)
    check(pf.ddim_step(x, m, t.int(), t.to(torch.uint8), SCHEDULE, backend=backend), x, m, 7, 7, backend=backend)


def test_rows_beyond_32_bit_offsets(backend, device):
    if device != "cpu":
        pytest.skip("reserves the memory without using it, which a GPU cannot")
    try:
        x, out = far_apart(2, 40), far_apart(2, 40)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the address space: {error}")
    values, m = draw(2, 40, dtype=torch.float16)
    x.copy_(values)
    t = torch.tensor([500, 3])
    pf.ddim_step(x, m, t, 2, SCHEDULE, out=(out, torch.empty_like(m)), backend=backend)
    result = pf.ddim_step(x, m, t, 2, SCHEDULE, backend=backend)
    check(result, values, m, [500, 3], 2, backend=backend)
    check((out, result[1]), values, m, [500, 3], 2, backend=backend)


def test_guidance_stacked_is_the_pair(backend, device):
    x, u, v = draw(3, 5, device=device, count=3)
    pair = pf.ddim_step(x, (u, v), 500, 480, SCHEDULE, guidance_scale=3.0, backend=backend)
    stacked = pf.ddim_step(x, torch.cat([u, v]), 500, 480, SCHEDULE, guidance_scale=3.0, backend=backend)
    assert torch.equal(pair.prev_sample, stacked.prev_sample)
    check(pair, x, (u, v), 500, 480, scale=3.0, backend=backend)


def test_in_place_and_out(backend, device):
    x, m, z = draw(2, 3, 8, 8, device=device, count=3)
    step = {"schedule": SCHEDULE, "timestep": 500, "prev_timestep": 480, "eta": 0.5, "noise": z, "backend": backend}
    expected = pf.ddim_step(x, m, **step)
    for write in ("sample", "output", "noise"):
        copies = {"sample": x.clone(), "output": m.clone(), "noise": z.clone()}
        result = pf.ddim_step(
            copies["sample"], copies["output"], **{**step, "noise": copies["noise"]}, out=copies[write]
        )
        assert result.prev_sample is copies[write]
        assert result.pred_original_sample is None
        assert torch.equal(copies[write], expected.prev_sample)
    sample, output = x.clone(), m.clone()
    pf.ddim_step(sample, output, **step, out=[output, sample])
    assert torch.equal(output, expected.prev_sample)
    assert torch.equal(sample, expected.pred_original_sample)


def test_outputs_that_overlap_inputs(backend, device):
    values, m = draw(64, 64, device=device)  # several tiles, so that some are written before others are read
    expected = pf.ddim_step(values, m, 500, 480, SCHEDULE, backend=backend)
    x = values.clone()
    pf.ddim_step(x, m, 500, 480, SCHEDULE, out=x.T, backend=backend)
    assert torch.equal(x.T, expected.prev_sample)
    buffer = torch.zeros(65, 64, device=device)
    buffer[:64] = values
    pf.ddim_step(buffer[:64], m, 500, 480, SCHEDULE, out=buffer[1:], backend=backend)
    assert torch.equal(buffer[1:], expected.prev_sample)
    both = torch.zeros(64, 2, 64, device=device)  # interleaved, which is no overlap
    pf.ddim_step(values, m, 500, 480, SCHEDULE, out=both.unbind(1), backend=backend)
    assert torch.equal(both, torch.stack(expected, 1))


def test_mixed_dtypes(backend, device):
    x, m = draw(2, 3, 5, device=device)
    low = m.bfloat16()
    assert low.dtype != x.dtype
    result = pf.ddim_step(x, low, 500, 480, SCHEDULE, backend=backend)
    check(result, x, low, 500, 480, backend=backend)
    # The sample's dtype rules even where it is the narrower one.
    narrow = x.half()
    wide = pf.ddim_step(narrow.float(), m, 500, 480, SCHEDULE, backend=backend)
    result = pf.ddim_step(narrow, m, 500, 480, SCHEDULE, backend=backend)
    out = torch.empty_like(narrow)
    pf.ddim_step(narrow, m, 500, 480, SCHEDULE, out=out, backend=backend)
    assert torch.equal(result.prev_sample, wide.prev_sample.half())
    assert torch.equal(out, result.prev_sample)


def test_autocast(backend, device):
    layer = torch.nn.Linear(5, 5, device=device)
    (x,) = draw(2, 5, device=device, count=1)
    with torch.autocast(device, dtype=torch.bfloat16):
        m = layer(x)
        result = pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend)
    assert m.dtype == torch.bfloat16
    check(result, x, m, 500, 480, backend=backend)
    result.prev_sample.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(backend, device, kind, eta):
    bar = SCHEDULE.alphas_cumprod.sqrt()
    bar = (bar - bar[-1]) * bar[0] / (bar[0] - bar[-1])  # Lin et al. 2024, algorithm 1
    schedule = pf.DDIMSchedule(bar.square())
    x, m, z = draw(2, 3, 5, dtype=torch.float64, device=device, count=3)
    noise = z if eta else None
    for s in (-1, 0, 1, 333, 998):
        result = pf.ddim_step(x, m, 999, s, schedule, prediction_type=kind, eta=eta, noise=noise, backend=backend)
        assert result.prev_sample.isfinite().all()
        check(result, x, m, 999, s, schedule=schedule, kind=kind, eta=eta, noise=noise, backend=backend)


@pytest.mark.parametrize("where", ["sample", "output", "noise"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_nan_stays_where_it_is(backend, device, where, clip):
    tensors = dict(zip(("sample", "output", "noise"), draw(2, 3, 11, device=device, count=3), strict=True))
    tensors[where][1, 2, 7] = math.nan
    x, m, z = tensors.values()
    result = pf.ddim_step(x, m, 500, 480, SCHEDULE, eta=0.5, noise=z, clip_range=clip, backend=backend)
    nan = torch.zeros_like(x, dtype=torch.bool)
    nan[1, 2, 7] = True
    assert torch.equal(result.prev_sample.isnan(), nan)
    assert torch.equal(result.pred_original_sample.isnan(), nan if where != "noise" else nan & False)


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_outside_give_nan(backend, device, kind):
    """What a GPU sees, where nobody looks at the timesteps beforehand."""
    x, m, z = draw(6, 5, device=device, count=3)
    table = SCHEDULE._on(x.device)[0]
    inside, outside = [500, -1], [-2, 1000, 2**62, -(2**63)]
    t = torch.tensor([500, *outside, 3], device=device)
    step = overload("ddim_step", device, backend)
    for arguments in ((t, t * 0 + 2), (t * 0 + 500, t)):
        prev, x0 = step(x, m, None, z, table, *arguments, 0.5, PREDICTION_TYPES[kind], -math.inf, math.inf, 1.0)
        assert prev.isnan().any(1).tolist() == prev.isnan().all(1).tolist() == [False, *[True] * 4, False]
        if arguments[0] is t:
            assert x0.isnan().all(1).tolist() == [False, *[True] * 4, False]
    if device == "cpu":
        for bad in outside:
            with pytest.raises(IndexError, match=f"timestep has values from .*{bad}.*; the schedule has -1 to 999"):
                pf.ddim_step(x, m, torch.tensor([*inside, bad, 0, 0, 0]), 2, SCHEDULE, backend=backend)


X, M = torch.zeros(2, 3), torch.zeros(2, 3)
BAD = {
    "sample array": ({"sample": X.numpy()}, TypeError, "sample is a ndarray"),
    "output array": ({"model_output": M.numpy()}, TypeError, "model_output is a ndarray"),
    "output none": ({"model_output": None, "guidance_scale": 2.0}, TypeError, "model_output is a NoneType"),
    "schedule": ({"schedule": 1000}, TypeError, "schedule is a int; give a DDIMSchedule"),
    "out number": ({"out": 5}, TypeError, "out is a int"),
    "sample integer": ({"sample": X.int()}, TypeError, "sample is torch.int32"),
    "sample scalar": ({"sample": torch.tensor(1.0)}, TypeError, r"sample is torch.float32 of shape \(\)"),
    "prediction": ({"prediction_type": "noise"}, ValueError, "prediction_type is 'noise'; choose one of epsilon"),
    "pair": ({"model_output": (M, M)}, TypeError, "model_output is a pair"),
    "list": ({"model_output": [M, M]}, TypeError, "model_output is a pair"),
    "output shape": ({"model_output": M[:1]}, ValueError, r"model_output has shape \(1, 3\)"),
    "output integer": ({"model_output": M.int()}, TypeError, "model_output is torch.int32"),
    "output device": ({"model_output": M.to("meta")}, ValueError, "model_output is on meta"),
    "triple": ({"model_output": (M, M, M), "guidance_scale": 2.0}, ValueError, "model_output has 3 parts"),
    "not stacked": ({"guidance_scale": 2.0}, ValueError, r"model_output has shape \(2, 3\); .* \(4, 3\)"),
    "cond shape": ({"model_output": (M, M[:1]), "guidance_scale": 2.0}, ValueError, r"\(conditional part\) has shape"),
    "no noise": ({"eta": 0.5}, ValueError, "eta is 0.5, so the step needs noise"),
    "noise": ({"noise": M}, ValueError, "noise was given with eta 0"),
    "eta high": ({"eta": 1.5, "noise": M}, ValueError, "eta is 1.5; give a number from 0 to 1"),
    "eta nan": ({"eta": math.nan, "noise": M}, ValueError, "eta is nan"),
    "noise shape": ({"eta": 0.5, "noise": M[0]}, ValueError, r"noise has shape \(3,\)"),
    "clip order": ({"clip_range": (1.0, -1.0)}, ValueError, r"clip_range is \(1.0, -1.0\)"),
    "clip negative": ({"clip_range": -1.0}, ValueError, "clip_range is -1.0"),
    "clip nan": ({"clip_range": (math.nan, 1.0)}, ValueError, "clip_range is"),
    "clip triple": ({"clip_range": (0.0, 1.0, 2.0)}, ValueError, "clip_range is"),
    "timestep": ({"timestep": 1000}, IndexError, "^timestep is 1000; the schedule has -1"),
    "prev": ({"prev_timestep": -2}, IndexError, "^prev_timestep is -2"),
    "timestep float": ({"timestep": 5.0}, TypeError, "timestep is 5.0; give an int"),
    "timestep floats": ({"timestep": torch.tensor([5.0, 4.0])}, TypeError, "timestep is a torch.float32 tensor"),
    "timestep bools": ({"timestep": torch.tensor([True, False])}, TypeError, "timestep is a torch.bool tensor"),
    "timestep shape": ({"timestep": torch.tensor([1, 2, 3])}, ValueError, r"timestep has shape \(3,\)"),
    "timestep device": ({"timestep": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "is on meta"),
    "timestep values": ({"timestep": torch.tensor([1, 1000])}, IndexError, "timestep has values from 1 to 1000"),
    "prev values": ({"prev_timestep": torch.tensor([-2, 1])}, IndexError, "prev_timestep has values from -2 to 1"),
    "clean": ({"timestep": -1, "prediction_type": "sample"}, ValueError, "timestep -1 has cumulative alpha 1"),
    "clean noise": ({"timestep": -1, "eta": 0.5, "noise": M}, ValueError, "timestep -1 has cumulative alpha 1"),
    "out shape": ({"out": X[0]}, ValueError, r"out is torch.float32 \(3,\)"),
    "out dtype": ({"out": (X.clone(), X.double())}, ValueError, r"out\[1\] is torch.float64"),
    "out expanded": ({"out": X[:1].expand(2, 3)}, ValueError, "out is expanded"),
    "out twice": ({"out": (M, M)}, ValueError, r"out\[0\] and out\[1\] share memory"),
    "out three": ({"out": (X, X, X)}, ValueError, "out has 3 parts"),
    "out grad": ({"sample": X.clone().requires_grad_(), "out": M}, ValueError, "out= cannot be used where a gradient"),
    "out leaf": ({"out": X.clone().requires_grad_()}, ValueError, "out= cannot be used where a gradient"),
    "backend": ({"backend": "cuda"}, ValueError, "backend is 'cuda'; choose one of 'reference'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    good = {"sample": X, "model_output": M, "timestep": 500, "prev_timestep": 480, "schedule": SCHEDULE}
    with pytest.raises(error, match=message):
        pf.ddim_step(**{**good, **arguments})


def test_overlapping_outputs_are_refused():
    buffer = torch.zeros(9)
    with pytest.raises(ValueError, match="share memory"):
        pf.ddim_step(X, M, 5, 4, SCHEDULE, out=(buffer[:6].view(2, 3), buffer[3:].view(2, 3)))


def test_epsilon_at_zero_alpha_is_refused():
    schedule = pf.DDIMSchedule(torch.tensor([0.9, 0.0]))
    with pytest.raises(ValueError, match=r"timestep 1 has cumulative alpha 0 .*v_prediction"):
        pf.ddim_step(X, M, 1, 0, schedule)
    with pytest.raises(ValueError, match="timestep 1 has cumulative alpha 0"):
        pf.ddim_step(X, M, np.int64(1), 0, schedule)


def test_absent_backend_says_why(monkeypatch):
    monkeypatch.setitem(_ops.KERNELS["ddim_step"], "native", set())
    monkeypatch.setitem(_ops.UNAVAILABLE, "native", "not built")
    monkeypatch.setattr("protofast._backend._found", {})
    with pytest.raises(pf.BackendUnavailableError, match="backend 'native' is not available: not built"):
        pf.ddim_step(X, M, 5, 4, SCHEDULE, backend="native")


def test_a_backend_asked_for_once_is_not_kept(monkeypatch):
    monkeypatch.setattr("protofast._backend._found", {})
    automatic = "native" if why_not("ddim_step", "cpu", "native") is None else "reference"
    names = [overload("ddim_step", "cpu", name)._overloadname for name in ("reference", None, "reference")]
    assert names == ["reference", automatic, "reference"]
    with pf.use_backend("reference"):
        assert overload("ddim_step", "cpu")._overloadname == "reference"
    assert overload("ddim_step", "cpu")._overloadname == automatic


def op_arguments(device, requires_grad=False, dtype=torch.float32, clip=math.inf):
    x, m, c, z = (v.requires_grad_(requires_grad) for v in draw(2, 3, dtype=dtype, device=device, count=4))
    table = SCHEDULE._on(x.device)[0]
    t = torch.tensor([500, 3], device=device)
    return x, m, c, z, table, t, t - 1, 0.5, 0, -clip, clip, 2.0


def test_opcheck(backend, device):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in (op_arguments(device, requires_grad=True), op_arguments(device, clip=1.0)):
        torch.library.opcheck(overload("ddim_step", device, backend), arguments, test_utils=tests)
    x, m, _, _, *rest = op_arguments(device)
    torch.library.opcheck(
        overload("ddim_step", device, backend), (x.mT.contiguous().mT, m, None, None, *rest), test_utils=tests
    )
    step_out = overload("ddim_step_out", device, backend)
    for second in (None, torch.empty_like(x)):
        written = {"prev_sample": torch.empty_like(x), "pred_original_sample": second}
        torch.library.opcheck(step_out, op_arguments(device), written, test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(backend, device, kind):
    x, m, c, z = (v.requires_grad_() for v in draw(2, 3, dtype=torch.float64, device=device, count=4))
    t = torch.tensor([500, 3], device=device)

    def step(x, m, c, z, clip=None):
        options = {"eta": 0.5, "noise": z, "prediction_type": kind, "guidance_scale": 2.0, "clip_range": clip}
        return pf.ddim_step(x, (m, c), t, t - 1, SCHEDULE, **options, backend=backend)

    assert torch.autograd.gradcheck(step, (x, m, c, z))
    assert torch.autograd.gradgradcheck(step, (x, m, c, z))
    inside = 1.01 * step(x, m, c, z).pred_original_sample.abs().median().item()  # clips some elements, not others
    assert torch.autograd.gradcheck(lambda *v: step(*v, clip=inside), (x, m, c, z))
    assert torch.autograd.gradgradcheck(lambda *v: step(*v, clip=inside), (x, m, c, z))
    assert torch.autograd.gradcheck(lambda x, m: step(x, m, m, m), (x, m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_deterministic_step(backend, device, dtype):
    """By hand: the step is linear, so its gradient is its two coefficients."""
    x, m = (v.requires_grad_() for v in draw(3, 4, dtype=dtype, device=device))
    pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend).prev_sample.sum().backward()
    a, b, _, d, p, q, _ = reference_coefficients(SCHEDULE._values[501], SCHEDULE._values[481], 0, "epsilon")
    for grad, expected, terms in ((x.grad, p * a, p * a), (m.grad, p * b + q * d, abs(p * b) + q * d)):
        assert grad.dtype == dtype
        assert_within(grad, expected, terms, 8)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_timesteps(backend, device, compiler):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    step = torch.compile(
        lambda x, m, t, s: pf.ddim_step(x, m, t, s, SCHEDULE, clip_range=1.0, backend=backend).prev_sample + 1,
        fullgraph=True,
        backend=counter,
    )
    x, m = draw(2, 3, 8, device=device)
    for t in range(20, 8, -1):
        expected = pf.ddim_step(x, m, t, t - 1, SCHEDULE, clip_range=1.0, backend=backend).prev_sample + 1
        assert torch.equal(step(x, m, t, t - 1), expected)
        now = torch.tensor([t, t + 1], device=device)
        expected = pf.ddim_step(x, m, now, now - 1, SCHEDULE, clip_range=1.0, backend=backend).prev_sample + 1
        assert torch.equal(step(x, m, now, now - 1), expected)
    assert counter.frame_count <= 4  # int and tensor, each once and once more for what turned out to vary


def test_compiled_training_and_in_place(backend, device):
    torch._dynamo.reset()

    def loss(x, m, t):
        return pf.ddim_step(x, m, t, 2, SCHEDULE, backend=backend).prev_sample.square().sum()

    def update(x, m, t):
        pf.ddim_step(x, m, t, 2, SCHEDULE, out=x, backend=backend)
        return x * 2

    x, m = draw(2, 3, device=device)
    for t in (500, torch.tensor([500, 3], device=device)):
        grads = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            function(leaf, m, t).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
        eager, compiled = x.clone(), x.clone()
        assert torch.equal(
            update(eager, m, t), torch.compile(update, fullgraph=True, backend="aot_eager")(compiled, m, t)
        )
        assert torch.equal(eager, compiled)


def test_is_repeatable(backend, device):
    x, m = draw(3, 1000, device=device)
    first, second = (pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend) for _ in range(2))
    assert torch.equal(first.prev_sample, second.prev_sample)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_comes_back(backend, device, kind):
    x, m = draw(2, 3, 8, dtype=torch.float64, device=device)
    options = {"prediction_type": kind, "backend": backend}
    if kind == "epsilon":
        up = pf.ddim_inverse_step(x, m, -1, 500, SCHEDULE, **options).prev_sample
        down = pf.ddim_step(up, m, 500, -1, SCHEDULE, **options).prev_sample
    else:  # the same image and noise are another v at another time
        up, image = pf.ddim_inverse_step(x, m, 400, 500, SCHEDULE, **options)
        alpha = SCHEDULE._values[501]
        v = (math.sqrt(alpha) * up - image) / math.sqrt(1 - alpha)
        down = pf.ddim_step(up, v, 500, 400, SCHEDULE, **options).prev_sample
    assert (down - x).abs().max() < 1e-12


def test_coefficients_stay_on_the_device():
    """Reading a value on the host would wait for a GPU and break its graph capture."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
            return func(*args, **(kwargs or {}))

    table = SCHEDULE._on(torch.device("cpu"))[0]
    for t in (torch.tensor(500), torch.tensor([500]), torch.tensor([500, 3])):
        with NoReads():
            coefficients(table, t, t - 1, 0.5, 0, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronization(backend, device):
    if device != "cuda":
        pytest.skip("a GPU's matter")
    x, m = draw(2, 3, 8, 8, device=device)
    t = torch.tensor([500, 3], device=device)
    pf.ddim_step(x, m, t, t - 1, SCHEDULE, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for now in (t, t[:1], 500):
            pf.ddim_step(x, m, now, 2, SCHEDULE, clip_range=1.0, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_mode_is_refused(backend, device):
    """torch drops the tangents of an op without a forward formula, and would give a derivative of 0."""
    x, m = draw(2, 3, 4, 4, device=device, count=2)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="ddim_step has no forward-mode"):
        pf.ddim_step(forward_ad.make_dual(x, m), m, 500, 480, SCHEDULE, backend=backend)
    with pytest.raises(NotImplementedError, match="prototype_distance has no forward-mode"):
        torch.func.jvp(lambda x: pf.prototype_distance(x, x[0, :, 0].mT).distance, (x,), (m,))


def test_works_without_the_private_shortcut(backend, device, monkeypatch):
    x, m = draw(2, 3, device=device, count=2)
    expected = pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend)
    assert ddim._below_autograd is not nullcontext, "this torch lacks it: a step takes longer"
    monkeypatch.setattr(ddim, "_below_autograd", nullcontext)
    found = pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend)
    assert all(map(torch.equal, found, expected))


def test_inference_mode(backend, device):
    with torch.inference_mode():
        schedule = pf.DDIMSchedule.linear(100)
        x, m = draw(2, 3, device=device)
        pf.ddim_step(x, m, 50, 40, schedule, backend=backend)
    x, m = draw(2, 3, device=device)
    pf.ddim_step(x.requires_grad_(), m, 50, 40, schedule, backend=backend).prev_sample.sum().backward()
    assert x.grad is not None


# Schedules


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_schedules_are_those_of_diffusers(beta_schedule, timesteps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timesteps, beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule)
    ours = {
        "linear": lambda: pf.DDIMSchedule.linear(timesteps, 0.00085, 0.012),
        "scaled_linear": lambda: pf.DDIMSchedule.scaled_linear(timesteps),
        "squaredcos_cap_v2": lambda: pf.DDIMSchedule.cosine(timesteps),
    }[beta_schedule]()
    # diffusers multiplies in float32: the rounding of every 1 − beta and every product accumulates.
    rounding = 3 * torch.arange(1, timesteps + 1) * torch.finfo(torch.float32).eps / 2
    error = (scheduler.alphas_cumprod.double() / ours.alphas_cumprod - 1).abs()
    if beta_schedule == "squaredcos_cap_v2":  # its last beta is 0.999, and 1 − 0.999 keeps 14 of 24 bits
        rounding[-1] += 2**10 * torch.finfo(torch.float32).eps
    assert (error <= rounding).all()
    taken = pf.DDIMSchedule.from_diffusers(scheduler)
    assert torch.equal(taken.alphas_cumprod, scheduler.alphas_cumprod.double())
    betas = pf.DDIMSchedule.from_betas(scheduler.betas)
    assert torch.equal(betas.alphas_cumprod, (1 - scheduler.betas.double()).cumprod(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_one", [True, False])
def test_step_is_that_of_diffusers(backend, device, kind, to_one):
    diffusers = pytest.importorskip("diffusers")
    x, m, z = draw(2, 3, 4, 4, device=device, count=3)
    for eta, clip in itertools.product((0.0, 0.5, 1.0), (None, 1.0)):
        scheduler = diffusers.DDIMScheduler(
            1000, prediction_type=kind, clip_sample=clip is not None, set_alpha_to_one=to_one, clip_sample_range=1.0
        )
        scheduler.set_timesteps(20)
        schedule = pf.DDIMSchedule.from_diffusers(scheduler)
        for t in (950, 500, 50, 0):
            theirs = scheduler.step(m.cpu(), t, x.cpu(), eta=eta, variance_noise=z.cpu() if eta else None)
            ours = pf.ddim_step(
                x,
                m,
                t,
                max(t - 50, -1),
                schedule,
                eta=eta,
                noise=z if eta else None,
                prediction_type=kind,
                clip_range=clip,
                backend=backend,
            )
            # Its coefficients are in float32, and at timestep 0 the spread's 1 − alpha loses 13 of its bits.
            a, b, *_ = map(float, reference_coefficients(schedule._values[t + 1], schedule._values[t + 1], 0, kind))
            size = abs(a) * abs(exact(x)) + abs(b) * abs(exact(m)) + abs(exact(x)) + abs(exact(m)) + abs(exact(z))
            assert_within(ours.prev_sample, exact(theirs.prev_sample), size, 40 if t else 2**9)
            assert_within(ours.pred_original_sample, exact(theirs.pred_original_sample), size, 40)


def test_schedule_values():
    schedule = pf.DDIMSchedule.from_betas(torch.tensor([0.5, 0.5]), final_alpha_cumprod=0.75)
    assert schedule._values == [0.75, 0.5, 0.25]
    assert len(schedule) == 2
    assert repr(schedule) == "DDIMSchedule(T=2, alphas_cumprod 0.5 … 0.25)"
    schedule.alphas_cumprod.zero_()
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pf.DDIMSchedule(torch.zeros(2, 2)), ValueError, r"alphas_cumprod has shape \(2, 2\)"),
        (lambda: pf.DDIMSchedule(torch.zeros(0)), ValueError, "non-empty"),
        (lambda: pf.DDIMSchedule(torch.tensor([1.5])), ValueError, r"must lie in \[0, 1\]"),
        (lambda: pf.DDIMSchedule(torch.tensor([math.nan])), ValueError, r"must lie in \[0, 1\]"),
        (lambda: pf.DDIMSchedule(torch.tensor([0.5]), -0.1), ValueError, r"must lie in \[0, 1\]"),
        (lambda: pf.DDIMSchedule.from_betas(torch.tensor([-0.1])), ValueError, "betas must be a vector"),
        (lambda: pf.DDIMSchedule.from_betas(torch.zeros(2, 2)), ValueError, "betas must be a vector"),
        (lambda: pf.DDIMSchedule.from_diffusers(object()), TypeError, "scheduler is a object, which has no alphas"),
    ],
)
def test_bad_schedules(call, error, message):
    with pytest.raises(error, match=message):
        call()
