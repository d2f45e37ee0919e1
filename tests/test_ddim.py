"""The DDIM step on every backend, against the textbook formula in extended precision and the eager one bit for bit."""

import copy
import importlib
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from functools import lru_cache, reduce

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers.errors import EXACT, assert_within, exact, unit
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import protofast as pf
from protofast import _ops, ddim
from protofast._backend import overload, why_not
from protofast._ops.ddim import COLUMNS, PREDICTION_TYPES
from protofast.diffusion import normal_noise

OPS = ("ddim_coefficients", "ddim_step", "ddim_step_out", "philox_normal")
SCHEDULE = pf.DDIMSchedule.linear(1000)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = list(PREDICTION_TYPES)


# The oracle


@lru_cache(None)
def coefficients(now, prev, eta):
    """signal, spread, prev_signal, direction, sigma, prev_spread as Song et al. write them, with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        now, prev, eta = Decimal(now), Decimal(prev), Decimal(eta)
        sigma = eta * ((1 - prev) / (1 - now)).sqrt() * (1 - now / prev).sqrt() if eta else Decimal(0)
        direction = max(Decimal(0), 1 - prev - sigma**2).sqrt()
        exactly = now.sqrt(), (1 - now).sqrt(), prev.sqrt(), direction, sigma, (1 - prev).sqrt()
        return tuple(EXACT(str(value)) for value in exactly)


def columns(t, s, schedule, eta, ndim):
    """The coefficients of timesteps that are ints or lists, each (1 or B, 1, ...)."""
    steps = np.broadcast_arrays(np.atleast_1d(np.asarray(t)), np.atleast_1d(np.asarray(s)))
    values = schedule._values
    rows = [coefficients(values[i + 1], values[j + 1], eta) for i, j in zip(*steps, strict=True)]
    return [np.array(column, EXACT).reshape(-1, *[1] * (ndim - 1)) for column in zip(*rows, strict=True)]


def exact_step(
    x,
    m,
    t,
    s,
    schedule=SCHEDULE,
    *,
    eta=0.0,
    noise=None,
    prediction_type="epsilon",
    clip_range=None,
    dynamic_threshold=None,
    use_clipped_model_output=False,
    guidance_scale=None,
    guidance_rescale=0.0,
    known=None,
    known_noise=None,
    mask=None,
    arithmetic=torch.float64,
):
    """Both results of a step, and the sums of the magnitudes of what each is added up from.

    `arithmetic` is that of the backend: a threshold comes from an image that is rounded to it and to the dtype, while
    the deviations of a rescale are in float32 on any backend (in float64 for that).
    """
    signal, spread, p, q, sigma, keep = columns(t, s, schedule, eta, x.ndim)
    sample, axes = exact(x), tuple(range(1, x.ndim))
    if guidance_scale is None:
        output = exact(m)
        size = abs(output)
    else:
        u, v = map(exact, m if isinstance(m, tuple) else m.chunk(2))
        output = u + EXACT(guidance_scale) * (v - u)
        size = abs(u) + abs(guidance_scale) * (abs(u) + abs(v))
    if guidance_rescale:
        deviation = output.std(axes, ddof=1, keepdims=True)
        ratio = guidance_rescale * v.std(axes, ddof=1, keepdims=True) / deviation
        # Errors of the elements change the deviation by no more than their own root mean square.
        error = 1 + np.sqrt((size**2).sum(axes, keepdims=True) / (output[0].size - 1)) / deviation
        error *= unit(x.dtype if x.dtype == torch.float64 else torch.float32) / unit(arithmetic)
        size = (ratio + 1 - guidance_rescale) * size + ratio * error * abs(output)
        output = (ratio + 1 - guidance_rescale) * output
    if prediction_type == "epsilon":
        x0, x0_terms = (sample - spread * output) / signal, (abs(sample) + spread * size) / signal
        e, e_terms = output, size
    elif prediction_type == "sample":
        x0, x0_terms = output, size
        e, e_terms = (sample - signal * output) / spread, (abs(sample) + signal * size) / spread
    else:
        x0, x0_terms = signal * sample - spread * output, signal * abs(sample) + spread * size
        e, e_terms = signal * output + spread * sample, signal * size + spread * abs(sample)
    if dynamic_threshold is not None:
        quantile, largest = dynamic_threshold if isinstance(dynamic_threshold, tuple) else (dynamic_threshold, np.inf)
        work = np.float64 if x.dtype == torch.float64 else np.float32  # the rank is of torch.quantile's dtype
        order = np.sort(abs(x0).reshape(len(x0), -1), 1)
        rank = work(quantile) * work(order.shape[1] - 1)
        low = int(rank)
        below, above = order[:, low], order[:, min(low + 1, order.shape[1] - 1)]
        limit = np.clip(np.maximum(below + EXACT(rank - work(low)) * (above - below), 1), None, largest)
        limit = limit.reshape(-1, *[1] * len(axes))
        # No order statistic moves by more than the largest error; one more rounding, to the image's own dtype.
        limit_terms = x0_terms.max(axes, keepdims=True) * (1 + unit(x.dtype) / unit(arithmetic))
        x0 = np.clip(x0, -limit, limit) / limit
        x0_terms = (x0_terms + abs(x0) * limit_terms) / limit
    elif clip_range is not None:
        x0 = np.clip(x0, *(clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)))
    if use_clipped_model_output:
        e, e_terms = (sample - signal * x0) / spread, (abs(sample) + signal * x0_terms) / spread
    prev, terms = p * x0 + q * e, p * x0_terms + q * e_terms
    if noise is not None:
        prev, terms = prev + sigma * exact(noise), terms + sigma * abs(exact(noise))
    if mask is not None:
        kept = exact(known)
        kept_terms = 0 * kept  # it comes out as it went in
        if known_noise is not None:
            kept_terms = p * abs(kept) + keep * abs(exact(known_noise))
            kept = p * kept + keep * exact(known_noise)
        free = np.broadcast_to(mask.cpu().numpy(), prev.shape)
        prev, terms = np.where(free, prev, kept), np.where(free, terms, kept_terms)
    return (prev, terms), (x0, x0_terms)


def check(result, x, m, t, s, schedule=SCHEDULE, *, backend, **options):
    """Asserts that both results of a step are as exact as the arithmetic allows."""
    seed = options.pop("seed", None)
    if seed is not None:
        options["noise"] = normal_noise(x, seed, backend=backend)
    tensors = [x, *(m if isinstance(m, tuple) else (m,)), *(v for v in options.values() if isinstance(v, torch.Tensor))]
    wide = reduce(torch.promote_types, (v.dtype for v in tensors if v.dtype != torch.bool))
    arithmetic = torch.float64 if backend == "reference" or wide == torch.float64 else torch.float32
    # The longest path: coefficient, scale, v − u, times, plus, times b, plus, times p, plus, plus. In float64 the
    # coefficients themselves have ten more. A rescale has another quotient, product and sum and the rounding of both
    # deviations, a threshold a quotient and an interpolation, a clipped direction a sum and a quotient.
    roundings = 20 if arithmetic == torch.float64 else 10
    roundings += 5 * sum(map(bool, map(options.get, ("guidance_rescale", "dynamic_threshold"))))
    roundings += 2 * options.get("use_clipped_model_output", False)
    truth = exact_step(x, m, t, s, schedule, **options, arithmetic=arithmetic)
    for actual, (expected, size) in zip(result, truth, strict=True):
        assert actual.dtype == x.dtype
        assert actual.shape == x.shape
        assert_within(actual, expected, size, roundings, arithmetic=arithmetic)


def eager_step(
    x,
    m,
    t,
    s,
    schedule=SCHEDULE,
    *,
    eta=0.0,
    noise=None,
    prediction_type="epsilon",
    clip_range=None,
    dynamic_threshold=None,
    use_clipped_model_output=False,
    guidance_scale=None,
    guidance_rescale=0.0,
    known=None,
    known_noise=None,
    mask=None,
):
    """diffusers' DDIMScheduler.step, operation by operation: coefficients in float32, the rest in float32 or wider."""
    pair = m if isinstance(m, tuple) else m.chunk(2) if guidance_scale is not None else (m,)
    every = x, *pair, *(v for v in (noise, known, known_noise) if v is not None)
    wide = reduce(torch.promote_types, (v.dtype for v in every))
    work = torch.promote_types(wide, torch.float32)
    one_a_sample = (-1, *[1] * (x.ndim - 1))

    def alpha(step):
        values = [schedule._values[i + 1] for i in (step if isinstance(step, list) else [step])]
        return torch.tensor(values, dtype=torch.float32).reshape(one_a_sample)

    now, prev = alpha(t), alpha(s)
    sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)) ** 0.5 if eta else prev * 0
    direction = (1 - prev - sigma**2) ** 0.5
    exactly = now**0.5, (1 - now) ** 0.5, prev**0.5, direction, sigma, (1 - prev) ** 0.5
    signal, spread, p, q, sigma, keep = (v.to(x.device, work) for v in exactly)
    sample, *pair = (v.to(work) for v in (x, *pair))
    output = pair[0]
    if guidance_scale is not None:
        output = pair[0] + guidance_scale * (pair[1] - pair[0])
    if guidance_rescale:
        ratio = pair[1].unsqueeze(-1).flatten(1).std(1) / output.unsqueeze(-1).flatten(1).std(1)
        output = (guidance_rescale * ratio + (1 - guidance_rescale)).reshape(one_a_sample) * output
    if prediction_type == "epsilon":
        x0 = (sample - spread * output) / signal
        e = output
    elif prediction_type == "sample":
        x0 = output
        e = (sample - signal * x0) / spread
    else:
        x0 = signal * sample - spread * output
        e = signal * output + spread * sample
    if dynamic_threshold is not None:
        quantile, largest = dynamic_threshold if isinstance(dynamic_threshold, tuple) else (dynamic_threshold, None)
        size = x0.to(wide).to(work).abs()  # of the image as it comes out
        limit = torch.quantile(size.unsqueeze(-1).flatten(1), quantile, dim=1).clamp(min=1, max=largest)
        limit = limit.reshape(one_a_sample)
        x0 = torch.clamp(x0, -limit, limit) / limit
    elif clip_range is not None:
        x0 = x0.clamp(*(clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)))
    if use_clipped_model_output:
        e = (sample - signal * x0) / spread
    result = p * x0 + q * e
    if noise is not None:
        result = result + sigma * noise.to(work)
    if mask is not None:
        kept = known.to(work)
        if known_noise is not None:
            kept = p * kept + keep * known_noise.to(work)
        result = torch.where(mask, result, kept)
    return result.to(x.dtype), x0.to(x.dtype)


def assert_same_bits(found, expected):
    """NaN for NaN, and otherwise every bit, the sign of a zero too."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    found, expected = (v.nan_to_num(nan=1.0).view(bits) for v in (found, expected))
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()} elements differ"


def draw(*shape, dtype=torch.float32, device="cpu", count=2):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def timesteps(values, device):
    return torch.tensor(values, dtype=torch.int64, device=device) if isinstance(values, list) else values


def take(x, m, t, s, schedule=SCHEDULE, **options):
    """`ddim_step` at timesteps that are ints or lists."""
    return pf.ddim_step(x, m, timesteps(t, x.device), timesteps(s, x.device), schedule, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_step_is_exact(backend, device, interpreted, kind, dtype):
    x, u, v, z = draw(3, 5, 7, dtype=dtype, device=device, count=4)
    steps = [(500, 480), (999, 0), (20, -1), ([999, 500, 3], [980, 499, -1]), (700, [600, 699, -1]), ([400, 5, 6], 4)]
    clips = (None, 0.9, (-0.5, 1.25), (-math.inf, 0.3))
    every = list(itertools.product(steps, (0.0, 0.3, 1.0), clips, (None, 7.5)))
    for (t, s), eta, clip, scale in every[::11] if interpreted else every:
        m = u if scale is None else (u, v)
        options = {"eta": eta, "noise": z if eta else None, "clip_range": clip, "guidance_scale": scale}
        options |= {"prediction_type": kind, "backend": backend}
        check(take(x, m, t, s, **options), x, m, t, s, **options)


@st.composite
def combinations(draw):
    """Any options together: what `build` makes tensors for."""
    either = st.booleans()
    plan = {
        "shape": draw(st.sampled_from([(2, 3, 4, 5), (3, 1, 33), (1, 40), (4, 2, 3), (2, 1030)])),
        "layouts": draw(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))),
        "t": draw(st.sampled_from([(500, 480), (20, -1), (999, 979), ("each", "each"), ("each", -1), (600, "each")])),
        "known": draw(st.sampled_from(["", "kept", "noised"])),
        "mask": draw(st.sampled_from(["whole", "channel", "shared", "none", "all"])),
        "stacked": draw(either),
        "seed": draw(either),
    }
    options = {
        "eta": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "prediction_type": draw(st.sampled_from(KINDS)),
        "use_clipped_model_output": draw(either),
        "guidance_scale": draw(st.sampled_from([None, 7.5, 0.4])),
    }
    if options["guidance_scale"] is not None:
        options["guidance_rescale"] = draw(st.sampled_from([0.0, 0.7, 1.0]))
    limit = draw(st.sampled_from(["", "clip", "threshold"]))
    if limit == "clip":
        options["clip_range"] = draw(st.sampled_from([0.9, (-0.5, 1.25), (-math.inf, 0.3), math.inf]))
    if limit == "threshold":
        options["dynamic_threshold"] = draw(st.sampled_from([0.63, 0.99, (0.9, 1.5), (0.8, math.inf), (1.0, 0.8), 0]))
    return plan, options


def build(plan, options, dtype, device):
    """The arguments of a combination: sample, prediction, timesteps as ints or lists, options with their tensors."""
    torch.manual_seed(0)  # whatever was tried before
    shape, options = plan["shape"], dict(options)
    x, u, v, z, known, known_noise = draw(*shape, dtype=dtype, device=device, count=6)

    def lay_out(tensor, number):
        found = list(layouts(tensor))
        return found[number % len(found)][1]

    x, u, v = (lay_out(tensor, number) for tensor, number in zip((x, u, v), plan["layouts"], strict=True))
    m = u
    if options["guidance_scale"] is not None:
        m = torch.cat([u, v]) if plan["stacked"] else (u, v)
    if options["eta"]:
        options |= {"seed": (3, 2**33)} if plan["seed"] else {"noise": z}
    if plan["known"]:
        of_mask = {
            "channel": (shape[0], 1, *shape[2:]),
            "shared": (1, 1, *shape[2:]) if len(shape) > 2 else (1, shape[1]),
        }
        mask = torch.rand(of_mask.get(plan["mask"], shape)) < {"none": 0, "all": 2}.get(plan["mask"], 0.5)
        options |= {"known": lay_out(known, plan["layouts"][1]), "mask": mask.to(device)}
        if plan["known"] == "noised":
            options["known_noise"] = known_noise
    t, s = plan["t"]
    t = [[700, 20, 999, 5][i] for i in range(shape[0])] if t == "each" else t
    s = [[680, -1, 0, 4][i] if t != 600 else [400, -1, 599, 0][i] for i in range(shape[0])] if s == "each" else s
    return x, m, t, s, options


@pytest.fixture(scope="module")
def interpreted(place):
    """Whether Triton's interpreter runs the kernels, which takes tens of milliseconds a step."""
    return place == ("triton", "cpu")


def examples(interpreted):
    return settings(max_examples=10 if interpreted else 80)


def for_any_combination(function):
    """Runs `function(backend, device, dtype, plan, options)` on many combinations, on few where they are slow."""

    def test(backend, device, interpreted, dtype):
        @examples(interpreted)
        @given(combinations())
        def run(combination):
            function(backend, device, dtype, *combination)

        run()

    test.__doc__ = function.__doc__
    return pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)


@for_any_combination
def test_any_combination_is_exact(backend, device, dtype, plan, options):
    """Returned, and written to one output, to two and to the sample itself."""
    x, m, t, s, options = build(plan, options, dtype, device)
    options["backend"] = backend
    with poison():
        result = take(x, m, t, s, **options)
    assert [v.stride() for v in result] == [torch.empty_like(x).stride()] * 2
    check(result, x, m, t, s, **options)
    written = torch.full_like(result[0], math.nan), torch.full_like(m[0] if isinstance(m, tuple) else x, math.nan)
    take(x, m, t, s, **options, out=written)
    alone = torch.full_like(x, math.nan)
    assert take(x, m, t, s, **options, out=alone).prev_sample is alone
    same = copy.deepcopy(x)
    take(same, m, t, s, **options, out=same)
    for found, expected in zip((*written, alone, same), (*result, result[0], result[0]), strict=True):
        assert_same_bits(found, expected)


@for_any_combination
def test_any_combination_bitwise(backend, device, dtype, plan, options):
    x, m, t, s, options = build(plan, options, dtype, device)
    result = take(x, m, t, s, **options, bitwise=True, backend=backend)
    seed = options.pop("seed", None)
    if seed is not None:
        options["noise"] = normal_noise(x, seed, backend=backend)
    for found, expected in zip(result, eager_step(x, m, t, s, **options), strict=True):
        assert found.stride() == torch.empty_like(x).stride()
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero terminal SNR"])
def test_bitwise_is_diffusers_own_step(backend, device, interpreted, kind, dtype, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    setups = list(itertools.product((True, False), ("", "clip", "threshold"), (3, 9)))
    for to_one, limit, batch in setups[::5] if interpreted else setups:
        scheduler = diffusers.DDIMScheduler(
            prediction_type=kind,
            clip_sample=limit == "clip",
            clip_sample_range=0.8,
            thresholding=limit == "threshold",
            dynamic_thresholding_ratio=0.97,
            sample_max_value=100.0,
            set_alpha_to_one=to_one,
            rescale_betas_zero_snr=zero_snr,
        )
        scheduler.set_timesteps(50)
        schedule = pf.DDIMSchedule.from_diffusers(scheduler)
        last = [] if zero_snr and kind == "epsilon" else [999]
        x, m, z = draw(batch, 3, 5, 3, dtype=dtype, device=device, count=3)
        steps = list(itertools.product([*last, 980, 500, 20, 0], (0.0, 0.3, 1.0), (False, True)))
        for t, eta, clipped in steps[::7] if interpreted else steps:
            theirs = scheduler.step(
                m.cpu(), t, x.cpu(), eta, use_clipped_model_output=clipped, variance_noise=z.cpu() if eta else None
            )
            ours = pf.ddim_step(
                x,
                m,
                t,
                max(t - 20, -1),
                schedule,
                eta=eta,
                noise=z if eta else None,
                prediction_type=kind,
                clip_range=0.8 if limit == "clip" else None,
                dynamic_threshold=(0.97, 100.0) if limit == "threshold" else None,
                use_clipped_model_output=clipped,
                bitwise=True,
                backend=backend,
            )
            assert_same_bits(ours.prev_sample.cpu(), theirs.prev_sample)
            assert_same_bits(ours.pred_original_sample.cpu(), theirs.pred_original_sample)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_coefficients_are_exact(backend, device, eta):
    """Every column of every timestep, near ones too: no difference of near equals. The same bits on every backend."""
    alphas = SCHEDULE._on(torch.device(device))[0]
    now = torch.arange(1000, device=device)
    for back in (1, 20, 1000):
        prev = (now - back).clamp(min=-1)
        table = overload("ddim_coefficients", device, backend)(alphas, now, prev, eta)
        truth = columns(now.tolist(), prev.tolist(), SCHEDULE, eta, 1)
        # σ: prev − now, 1 − now and their products and quotient, 1 − prev and a product; half of these 7 are left by
        # the root, which rounds too, and eta.
        for found, expected in zip(table.unbind(1), truth, strict=True):
            assert_within(found, expected, expected, 6)
        same = overload("ddim_coefficients", "cpu", "reference")(alphas.cpu(), now.cpu(), prev.cpu(), eta)
        assert_same_bits(table.cpu(), same)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eager_coefficients_are_those_of_diffusers(eta):
    """Of every timestep; also computed together, though torch's square root of a vector is not of IEEE's bits."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler()
    theirs = []
    for t in range(20, 1000):
        now, prev = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 20]
        sigma = eta * scheduler._get_variance(t, t - 20) ** 0.5
        direction = (1 - prev - sigma**2) ** 0.5
        theirs.append([now**0.5, (1 - now) ** 0.5, prev**0.5, direction, sigma, (1 - prev) ** 0.5])
    alphas = pf.DDIMSchedule.from_diffusers(scheduler)._on(torch.device("cpu"))[0]
    t = torch.arange(20, 1000)
    ours = overload("ddim_eager_coefficients", "cpu", "reference")
    assert_same_bits(ours(alphas, t, t - 20, eta), torch.tensor(theirs, dtype=torch.float64))
    each = [ours(alphas, one, one - 20, eta) for one in t.unbind()]
    assert_same_bits(torch.cat(each), torch.tensor(theirs, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_step_is_within_two_ulp(backend, device, kind, dtype):
    """Of what its two terms add up to, with both coefficients as float64 has them: eta 0 and no clip.

    In float32: 1 unit roundoff (half an ulp) each for S and O as float32 and for the product with one of them, and 1
    for the sum, so 3 for a term; the issue asks for 4. In float64 nothing wider computes S and O, so the roundings of
    their own parts come on top, 9 of which lie on the longest path: ᾱ from 1, square root, quotient, product, sum.
    """
    steps = [(980, 960), (500, 499), (999, 0), (20, -1), (3, 3), (100, 900), ([999, 500, 3], [980, 499, -1])]
    for t, s in steps:
        x, m = draw(3, 5, 211, dtype=dtype, device=device)
        signal, spread, p, q, _, _ = columns(t, s, SCHEDULE, 0.0, 3)
        if kind == "epsilon":
            a, b, c, d = 1 / signal, -spread / signal, 0 * signal, 0 * signal + 1
        elif kind == "sample":
            a, b, c, d = 0 * signal, 0 * signal + 1, 1 / spread, -signal / spread
        else:
            a, b, c, d = signal, -spread, spread, signal
        result = take(x, m, t, s, prediction_type=kind, backend=backend)
        sums = (p * a + q * c, p * b + q * d), (a, b)
        parts = (p * a + abs(q * c), p * abs(b) + abs(q * d)), (a, abs(b))
        for found, folded, part in zip(result, sums, parts, strict=True):
            of_x, of_m = (np.vectorize(float)(v).astype(EXACT) for v in folded)  # rounded to float64
            expected = of_x * exact(x) + of_m * exact(m)
            terms = abs(of_x * exact(x)) + abs(of_m * exact(m))
            if dtype == torch.float32:
                # What float64 leaves of the difference of near equals, for the reference's direct form most of all.
                terms += 20 * 2.0**-53 / (4 * unit(dtype)) * (part[0] * abs(exact(x)) + part[1] * abs(exact(m)))
                assert_within(found, expected, terms, 4)
            else:
                assert_within(found, expected, 4 * terms + 9 * (part[0] * abs(exact(x)) + part[1] * abs(exact(m))), 1)


# Shapes, layouts, memory


def test_any_shape(backend, device, interpreted):
    @examples(interpreted)
    @given(
        shape=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
        | st.tuples(st.integers(1, 40), st.integers(1, 40))
        | st.tuples(st.integers(1, 3), st.integers(1020, 1030)),
        per_sample=st.booleans(),
        x0_too=st.booleans(),
    )
    def run(shape, per_sample, x0_too):
        x, m = draw(*shape, device=device)
        t = list(range(3, 3 + shape[0])) if per_sample else 500
        with poison():
            result = take(x, m, t, 2, backend=backend)
        check(result, x, m, t, 2, backend=backend)
        prev_out, x0_out = torch.full_like(x, math.nan), torch.full_like(x, math.nan) if x0_too else result[1]
        out = (prev_out, x0_out) if x0_too else prev_out
        take(x, m, t, 2, out=out, backend=backend)
        check((prev_out, x0_out), x, m, t, 2, backend=backend)

    run()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (1,), (1, 1), (1, 1, 1, 1)], ids=str)
def test_empty_and_one_element(backend, device, shape):
    x, m, z, known = draw(*shape, device=device, count=4)
    some = {
        "noise": {"eta": 0.5, "noise": z, "clip_range": 1.0},
        "seed": {"eta": 0.5, "seed": 3},
        "threshold": {"dynamic_threshold": 0.5, "use_clipped_model_output": True},
        "known": {"known": known, "known_noise": z, "mask": torch.zeros_like(x, dtype=torch.bool)},
    }
    for t, (name, options), bitwise in itertools.product((500, [500] * shape[0]), some.items(), (False, True)):
        result = take(x, m, t, 480, **options, bitwise=bitwise, backend=backend)
        assert result.prev_sample.shape == result.pred_original_sample.shape == shape, name
        if bitwise:
            if x.numel():
                drawn = {"eta": 0.5, "noise": normal_noise(x, 3, backend="reference")} if name == "seed" else options
                for found, expected in zip(result, eager_step(x, m, 500, 480, **drawn), strict=True):
                    assert_same_bits(found, expected)
        elif x.numel():
            check(result, x, m, 500, 480, **options, backend=backend)
        out = torch.full_like(x, math.nan)
        assert not take(x, m, t, 480, **options, out=out, backend=backend).prev_sample.isnan().any()
    if not x.numel():  # a single element has no standard deviation
        result = take(x, (m, z), 500, 480, guidance_scale=2.0, guidance_rescale=0.5, backend=backend)
        assert result.prev_sample.shape == shape


@pytest.mark.parametrize("per_sample", [False, True])
def test_layouts(backend, device, interpreted, per_sample):
    x, m, z = draw(3, 4, 5, 6, device=device, count=3)
    t = [3, 500, 999] if per_sample else 500
    options = {"eta": 0.5, "noise": z, "backend": backend}
    first = take(x, m, t, 2, **options)
    check(first, x, m, t, 2, **options)
    every = list(itertools.product(layouts(x), layouts(m)))
    for (name, sample), (other, output) in every[::4] if interpreted else every:
        result = take(sample, output, t, 2, **options)
        assert result.prev_sample.stride() == torch.empty_like(sample).stride(), (name, other)
        assert result.pred_original_sample.stride() == torch.empty_like(sample).stride(), (name, other)
        written = torch.full_like(output, math.nan), dict(layouts(torch.full_like(x, math.nan)))[name]
        take(sample, output, t, 2, **options, out=written)
        for found, expected in zip((*result, *written), first * 2, strict=True):
            assert_same_bits(found, expected)


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
    for rescale in (0.0, 0.7):
        options = {"guidance_scale": 3.0, "guidance_rescale": rescale, "backend": backend}
        pair = pf.ddim_step(x, (u, v), 500, 480, SCHEDULE, **options)
        stacked = pf.ddim_step(x, torch.cat([u, v]), 500, 480, SCHEDULE, **options)
        assert torch.equal(pair.prev_sample, stacked.prev_sample)
        check(pair, x, (u, v), 500, 480, **options)


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


def test_any_input_can_be_an_output(backend, device):
    names = "sample", "model_output", "cond_output", "noise", "known", "known_noise"
    tensors = dict(zip(names, draw(2, 5, 9, device=device, count=6), strict=True))
    mask = torch.rand(2, 5, 9, device=device) < 0.5

    def step(sample, model_output, cond_output, out=None, **others):
        options = {"guidance_scale": 2.0, "clip_range": 0.5, "eta": 0.5, "mask": mask, "backend": backend, **others}
        return pf.ddim_step(sample, (model_output, cond_output), 500, 480, SCHEDULE, **options, out=out)

    expected = step(**tensors)
    for first, second in itertools.permutations(names, 2):
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        step(**copies, out=(copies[first], copies[second]))
        assert_same_bits(copies[first], expected.prev_sample)
        assert_same_bits(copies[second], expected.pred_original_sample)
        untouched = [name for name in names if name not in (first, second)]
        assert all(torch.equal(copies[name], tensors[name]) for name in untouched)


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


@pytest.mark.parametrize("overlapped", ["known", "known_noise", "noise", "mask"])
def test_outputs_that_overlap_further_inputs(backend, device, overlapped):
    """An output one row further on in the memory of an input: what is read late must not be written early."""
    x, m, *others = draw(64, 64, device=device, count=5)
    options = dict(zip(("known", "known_noise", "noise"), others, strict=True))
    options |= {"mask": options["known"] > 0, "eta": 0.5, "backend": backend}
    expected = pf.ddim_step(x, m, 500, 480, SCHEDULE, **options)
    dtype = options[overlapped].dtype
    memory = torch.zeros(65 * 64 * 4, dtype=torch.uint8, device=device)
    out = memory[64 * 4 :].view(torch.float32).view(64, 64)
    options[overlapped] = memory[: 64 * 64 * dtype.itemsize].view(dtype).view(64, 64).copy_(options[overlapped])
    pf.ddim_step(x, m, 500, 480, SCHEDULE, **options, out=out)
    assert_same_bits(out, expected.prev_sample)


# Dtypes


@pytest.mark.parametrize("sample", DTYPES, ids=str)
@pytest.mark.parametrize("output", DTYPES, ids=str)
def test_mixed_dtypes(backend, device, sample, output):
    """Arithmetic in the widest dtype, and at least float32; one rounding, to the sample's."""
    (x,) = draw(2, 3, 5, dtype=sample, device=device, count=1)
    u, v = draw(2, 3, 5, dtype=output, device=device)
    for m, scale in ((u, None), ((u, v), 3.0)):
        options = {"guidance_scale": scale, "backend": backend}
        result = pf.ddim_step(x, m, 500, 480, SCHEDULE, **options)
        check(result, x, m, 500, 480, **options)
        out = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
        pf.ddim_step(x, m, 500, 480, SCHEDULE, **options, out=out)
        wide = torch.promote_types(sample, output)
        widened = tuple(v.to(wide) for v in m) if scale else m.to(wide)
        same = pf.ddim_step(x.to(wide), widened, 500, 480, SCHEDULE, **options)
        for found, written, expected in zip(result, out, same, strict=True):
            assert_same_bits(written, found)
            assert_same_bits(found, expected.to(sample))
        plain = pf.ddim_step(x, m, 500, 480, SCHEDULE, **options, bitwise=True)
        for found, expected in zip(plain, eager_step(x, m, 500, 480, guidance_scale=scale), strict=True):
            assert_same_bits(found, expected)
    # What else there is may be of any dtype too.
    z, known = draw(2, 3, 5, dtype=output, device=device)
    options = {"eta": 0.5, "noise": z, "known": known, "mask": known > 0, "backend": backend}
    check(pf.ddim_step(x, x, 500, 480, SCHEDULE, **options), x, x, 500, 480, **options)
    drawn = {"seed": (3, 4)}, {"noise": normal_noise(x, (3, 4))}
    results = [pf.ddim_step(x, u, 500, 480, SCHEDULE, eta=0.5, **noise, backend=backend).prev_sample for noise in drawn]
    assert_same_bits(*results)
    pair = pf.ddim_step(x, (u, v.float()), 500, 480, SCHEDULE, guidance_scale=3.0, backend=backend)
    check(pair, x, (u, v.float()), 500, 480, guidance_scale=3.0, backend=backend)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_predictions_are_not_copied(backend, device, low):
    """A model under autocast beside a float32 sample: the op itself reads what the model gave."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(
                (func._schema.name, [v.dtype for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)])
            )
            return func(*args, **(kwargs or {}))

    x, u, v = draw(2, 3, 5, device=device, count=3)
    u, v = u.to(low), v.to(low)
    pf.ddim_step(x, u, 500, 480, SCHEDULE, backend=backend)
    for m, scale in ((u, None), ((u, v), 2.0)):
        calls = []
        with Calls():
            result = pf.ddim_step(x, m, 500, 480, SCHEDULE, guidance_scale=scale, backend=backend)
        made = [dtypes for name, dtypes in calls if name == "protofast::ddim_step"]
        assert made == [[torch.float32, low, torch.float64, *[low] * (scale is not None)]]  # the third is the table
        assert not any("copy" in name for name, _ in calls)
        assert result.prev_sample.dtype == torch.float32
    # The gradient comes back in the prediction's dtype, from the same float32 arithmetic.
    grads = []
    for cast in (lambda leaf: leaf, lambda leaf: leaf.float()):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, u, v)]
        pair = cast(leaves[1]), cast(leaves[2])
        result = pf.ddim_step(leaves[0], pair, 500, 480, SCHEDULE, guidance_scale=2.0, clip_range=1.0, backend=backend)
        (result.prev_sample * x).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert [grad.dtype for grad in grads[0]] == [torch.float32, low, low]
    assert all(map(torch.equal, *grads))


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


# Noise drawn within the step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seed_is_its_noise(backend, device, interpreted, dtype):
    """Bit for bit, in any layout, in part of the batch, in place, and with whatever else there is."""
    x, m, known = draw(5, 4, 3, 7, dtype=dtype, device=device, count=3)
    more = [
        {},
        {"clip_range": 0.7, "use_clipped_model_output": True},
        {"bitwise": True},
        {"known": known, "mask": known > 0},
        {"dynamic_threshold": 0.8},
    ]
    every = list(itertools.product(layouts(x), more))
    for (name, sample), options in every[::8] if interpreted else every:
        options = {**options, "eta": 0.6, "backend": backend}
        noise = normal_noise(sample, (9, 2**32 - 2), backend=backend)
        expected = pf.ddim_step(sample, m, 500, 480, SCHEDULE, noise=noise, **options)
        seed = torch.tensor([9, 2**32 - 2], device=device)
        for given_seed in ((9, 2**32 - 2), seed):
            result = pf.ddim_step(sample, m, 500, 480, SCHEDULE, seed=given_seed, **options)
            assert all(map(torch.equal, result, expected)), (name, options)
        part = {key: v[3:] if isinstance(v, torch.Tensor) else v for key, v in options.items()}
        rest = pf.ddim_step(sample[3:], m[3:], 500, 480, SCHEDULE, seed=(9, 2**32 + 1), **part)
        assert torch.equal(rest.prev_sample, expected.prev_sample[3:])
        same = sample.clone()
        pf.ddim_step(same, m, 500, 480, SCHEDULE, seed=seed, **options, out=same)
        assert torch.equal(same, expected.prev_sample)


def test_seed_in_a_large_sample(backend, device, interpreted):
    """Longer than what a thread or a program takes at once."""
    count = 3000 if interpreted else 70_001
    x, m = draw(2, count, device=device)
    for dtype in (torch.float32, torch.float64):
        x, m = x.to(dtype), m.to(dtype)
        noise = normal_noise(x, 5, backend="reference")
        expected, result = (
            pf.ddim_step(x, m, 500, 480, SCHEDULE, eta=1.0, **drawn, backend=backend).prev_sample
            for drawn in ({"noise": noise}, {"seed": 5})
        )
        assert_same_bits(result, expected)


# Thresholds, rescale, inpainting


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_threshold(backend, device, kind):
    """Saharia et al. 2022: a sample beyond the threshold comes back within [−1, 1], one within it as it was."""
    x, m = draw(2, 3, 50, device=device)
    x[1], m[1] = 0.01 * x[1], 0.01 * m[1]  # its image is within [−1, 1]
    options = {"prediction_type": kind, "backend": backend}
    plain = pf.ddim_step(x, m, 300, 280, SCHEDULE, **options).pred_original_sample
    assert plain[0].abs().max() > 1 > plain[1].abs().max()
    for setting in (0.9, (0.9, math.inf), (0.5, 1.2), [1.0, 5.0], 0.0, 1):
        image = pf.ddim_step(x, m, 300, 280, SCHEDULE, dynamic_threshold=setting, **options).pred_original_sample
        quantile, largest = setting if isinstance(setting, (tuple, list)) else (setting, math.inf)
        s = min(max(float(torch.quantile(plain[0].abs(), quantile)), 1), largest)
        assert (image[0] - plain[0].clamp(-s, s) / s).abs().max() <= 2**-22
        assert torch.equal(image[1], plain[1])
    low = pf.ddim_step(x, m, 300, 280, SCHEDULE, dynamic_threshold=(0.9, 0.5), **options).pred_original_sample
    assert (low - plain.clamp(-0.5, 0.5) / 0.5).abs().max() <= 2**-22  # the largest goes before the least, 1
    assert 1 - 2**-22 <= image.abs().max() <= 1  # quantile 1: the largest lies on the threshold


def test_threshold_beyond_what_torch_quantile_takes():
    """torch.quantile refuses more than 2²⁴ elements."""
    image = torch.linspace(-4, 4, 2**24 + 3)[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(image, 0.75)
    limit = pf.ddim_step(image, image, 5, 4, SCHEDULE, prediction_type="sample", dynamic_threshold=0.75)
    assert abs(limit.pred_original_sample.abs().median() * 3 - 2) < 1e-5  # clipped to ±3, divided by that


def test_guidance_rescale(backend, device):
    """Lin et al. 2024: in full, the guided prediction has the deviation of the conditional one."""
    x, u, v = draw(2, 3, 50, dtype=torch.float64, device=device, count=3)
    options = {"prediction_type": "sample", "guidance_scale": 5.0, "backend": backend}
    image = pf.ddim_step(x, (u, v), 300, 280, SCHEDULE, **options, guidance_rescale=1.0).pred_original_sample
    assert (image.flatten(1).std(1) / v.flatten(1).std(1) - 1).abs().max() < 1e-14
    plain = pf.ddim_step(x, (u, v), 300, 280, SCHEDULE, **options).pred_original_sample
    half = pf.ddim_step(x, (u, v), 300, 280, SCHEDULE, **options, guidance_rescale=0.5).pred_original_sample
    assert (half - (plain + image) / 2).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bitwise", [False, True])
def test_known_pixels(backend, device, interpreted, dtype, bitwise):
    x, m, known, noise = draw(2, 3, 4, 5, dtype=dtype, device=device, count=4)
    step = {"schedule": SCHEDULE, "bitwise": bitwise, "backend": backend}
    shapes = (2, 3, 4, 5), (1, 1, 4, 5), (2, 1, 4, 5), (4, 5), (3, 1, 1), (1,), ()
    for shape in shapes[1::3] if interpreted else shapes:
        mask = torch.rand(shape, device=device) < 0.5
        free = mask.expand(x.shape)
        plain = pf.ddim_step(x, m, 20, 10, **step)
        result = pf.ddim_step(x, m, 20, 10, known=known, mask=mask, **step)
        assert_same_bits(result.prev_sample, torch.where(free, plain.prev_sample, known))
        assert_same_bits(result.pred_original_sample, plain.pred_original_sample)
        noised = pf.ddim_step(x, m, 20, 10, known=known, known_noise=noise, mask=mask, **step).prev_sample
        assert torch.equal(noised[free], plain.prev_sample[free])
        if not bitwise:  # which has float32 coefficients; its bits are tested above
            options = {"known": known, "known_noise": noise, "mask": mask, "backend": backend}
            check((noised, plain.pred_original_sample), x, m, 20, 10, **options)
        # The last step leaves the clean image, with its noise or without.
        for more in ({}, {"known_noise": noise}):
            last = pf.ddim_step(x, m, 20, -1, known=known, mask=mask, **more, **step).prev_sample
            assert_same_bits(last[~free], known[~free])


# NaN


@pytest.mark.parametrize("where", ["sample", "output", "noise"])
@pytest.mark.parametrize("limit", [{}, {"clip_range": 1.0}, {"use_clipped_model_output": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bitwise", [False, True])
def test_nan_stays_where_it_is(backend, device, where, limit, kind, bitwise):
    tensors = dict(zip(("sample", "output", "noise"), draw(2, 3, 11, device=device, count=3), strict=True))
    tensors[where][1, 2, 7] = math.nan
    x, m, z = tensors.values()
    options = {"prediction_type": kind, "bitwise": bitwise, "backend": backend, **limit}
    result = pf.ddim_step(x, m, 500, 480, SCHEDULE, eta=0.5, noise=z, **options)
    nan = torch.zeros_like(x, dtype=torch.bool)
    nan[1, 2, 7] = True
    assert torch.equal(result.prev_sample.isnan(), nan)
    # A predicted sample is the image as it stands.
    in_image = where == "output" or (where == "sample" and kind != "sample")
    assert torch.equal(result.pred_original_sample.isnan(), nan & in_image)
    if kind == "sample" and not limit:
        assert_same_bits(result.pred_original_sample, m)


def test_nan_and_known_pixels(backend, device):
    """What is known replaces a NaN, and is not looked at where the step is taken."""
    x, m, known, noise = draw(2, 3, 11, device=device, count=4)
    mask = torch.rand(2, 3, 11, device=device) < 0.5
    x[~mask], known[mask], noise[mask] = math.nan, math.nan, math.nan
    for more, bitwise in itertools.product(({}, {"known_noise": noise}), (False, True)):
        options = {"known": known, "mask": mask, "bitwise": bitwise, "backend": backend, **more}
        assert not pf.ddim_step(x, m, 500, 480, SCHEDULE, **options).prev_sample.isnan().any()
    known[~mask] = math.nan
    result = pf.ddim_step(x, m, 500, 480, SCHEDULE, known=known, mask=mask, backend=backend)
    assert torch.equal(result.prev_sample.isnan(), ~mask)


@pytest.mark.parametrize("option", [{"dynamic_threshold": 0.8}, {"guidance_scale": 2.0, "guidance_rescale": 0.5}])
def test_nan_keeps_to_its_sample(backend, device, option):
    """A threshold and a rescale are of a whole sample; a NaN must not reach another, nor come out as a number."""
    x, u, v = draw(3, 40, device=device, count=3)
    m = (u, v) if "guidance_scale" in option else u
    expected = pf.ddim_step(x, m, 500, 480, SCHEDULE, **option, backend=backend)
    u[1, 5] = math.nan
    result = pf.ddim_step(x, m, 500, 480, SCHEDULE, **option, backend=backend)
    for found, before in zip(result, expected, strict=True):
        assert found[1, 5].isnan()
        assert torch.equal(found[[0, 2]], before[[0, 2]])


def table_of(alphas, now, prev, bitwise, backend):
    name, backend = ("ddim_eager_coefficients", "reference") if bitwise else ("ddim_coefficients", backend)
    return overload(name, alphas.device.type, backend)(alphas, now, prev, 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bitwise", [False, True])
def test_timesteps_outside_give_nan(backend, device, kind, bitwise):
    """What a GPU sees, where nobody looks at the timesteps beforehand."""
    x, m, z = draw(6, 5, device=device, count=3)
    alphas = SCHEDULE._on(x.device)[0]
    inside, outside = [500, -1], [-2, 1000, 2**62, -(2**63)]
    t = torch.tensor([500, *outside, 3], device=device)
    bad = [False, *[True] * 4, False]
    for now, prev in ((t, t * 0 + 2), (t * 0 + 500, t), (t, t[5:]), (t[0], t)):
        table = table_of(alphas, now, prev, bitwise, backend)
        assert table.shape == (6, COLUMNS)
        assert table.isnan().any(1).tolist() == bad
        step = overload("ddim_step", device, backend)
        for noise in ({"noise": z}, {"seed": torch.tensor([1, 2], device=device)}):
            prev_sample, x0 = step(x, m, table, None, PREDICTION_TYPES[kind], bitwise, **noise)
            assert prev_sample.isnan().any(1).tolist() == prev_sample.isnan().all(1).tolist() == bad
            if now is t and kind != "sample":
                assert x0.isnan().all(1).tolist() == bad
            if kind == "sample":  # the image is the prediction, whatever the timestep
                assert_same_bits(x0, m)
    if device == "cpu":
        for bad in outside:
            with pytest.raises(IndexError, match=f"timestep has values from .*{bad}.*; the schedule has -1 to 999"):
                pf.ddim_step(x, m, torch.tensor([*inside, bad, 0, 0, 0]), 2, SCHEDULE, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bitwise", [False, True])
def test_rows_of_a_table(backend, device, kind, bitwise):
    """A row for each sample, or one for all; NaN for one outside."""
    x, m, z = draw(6, 5, device=device, count=3)
    t = torch.tensor([999, 500, 3, 20], device=device)
    table = table_of(SCHEDULE._on(x.device)[0], t, t - 1, bitwise, backend)
    step = overload("ddim_step", device, backend)
    rest = PREDICTION_TYPES[kind], bitwise, -1.0, 1.0, True, None, 1.0, None, None, z
    rows = [3, 0, 2, 2, 1, 0]
    found = step(x, m, table, torch.tensor(rows, device=device), *rest)
    written = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    write = overload("ddim_step_out", device, backend)
    row = torch.tensor(rows, device=device)[:, None].expand(-1, 2)[:, 0]  # strided
    write(x, m, table, row, *rest, prev_sample=written[0], pred_original_sample=written[1])
    for ours, expected in zip((*found, *written), step(x, m, table[rows], None, *rest) * 2, strict=True):
        assert_same_bits(ours, expected)
    for one in (torch.tensor(2, device=device), torch.tensor([2], device=device)):
        for ours, expected in zip(step(x, m, table, one, *rest), step(x, m, table[2:3], None, *rest), strict=True):
            assert_same_bits(ours, expected)
    outside = [0, -1, 4, 2**62, -(2**63), 1]
    prev, x0 = step(x, m, table, torch.tensor(outside, device=device), *rest)
    assert prev.isnan().any(1).tolist() == prev.isnan().all(1).tolist() == [False, *[True] * 4, False]
    if kind != "sample":
        assert x0.isnan().all(1).tolist() == [False, *[True] * 4, False]
    for row in (torch.tensor(4, device=device), torch.tensor([-1], device=device)):
        assert step(x, m, table, row, *rest)[0].isnan().all()


# Arguments


X, M = torch.zeros(2, 3), torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
GUIDED = {"model_output": (M, M), "guidance_scale": 2.0}
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
    "timestep array": ({"timestep": np.array([5, 6])}, TypeError, r"timestep is array\(\[5, 6\]\); give an int"),
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
    "eta upwards": ({"prev_timestep": 600, "eta": 0.5, "noise": M}, ValueError, "prev_timestep is 600, above timestep"),
    "clip text": ({"clip_range": "1 to 2"}, TypeError, "clip_range is '1 to 2'"),
    "out folded": ({"out": torch.zeros(9).as_strided((2, 3), (2, 1))}, ValueError, "elements share memory"),
    "backend": ({"backend": "cuda"}, ValueError, "backend is 'cuda'; choose one of 'reference'"),
    "noise and seed": ({"eta": 0.5, "noise": M, "seed": 1}, ValueError, "noise and seed were both given"),
    "seed unused": ({"seed": 1}, ValueError, "seed was given with eta 0, where the step draws none"),
    "seed negative": ({"eta": 0.5, "seed": -1}, ValueError, "seed is -1; give an int from 0"),
    "seed large": ({"eta": 0.5, "seed": (0, 2**63)}, ValueError, r"seed is \(0, 9223372036854775808\)"),
    "seed float": ({"eta": 0.5, "seed": 0.5}, ValueError, "seed is 0.5; give an int"),
    "seed tensor": ({"eta": 0.5, "seed": torch.tensor(1)}, ValueError, r"seed is torch.int64 \(\) on cpu"),
    "noise integer": ({"eta": 0.5, "noise": M.int()}, TypeError, "noise is torch.int32; give floating point"),
    "noise device": ({"eta": 0.5, "noise": M.to("meta")}, ValueError, "noise is on meta; the sample is on cpu"),
    "two limits": ({"clip_range": 1.0, "dynamic_threshold": 0.9}, ValueError, "clip_range and dynamic_threshold were"),
    "threshold high": ({"dynamic_threshold": 1.5}, ValueError, "dynamic_threshold is 1.5; give a quantile from 0 to 1"),
    "threshold nan": ({"dynamic_threshold": math.nan}, ValueError, "dynamic_threshold is nan"),
    "threshold largest": ({"dynamic_threshold": (0.9, 0.0)}, ValueError, r"dynamic_threshold is \(0.9, 0.0\)"),
    "threshold triple": ({"dynamic_threshold": (0.9, 1.0, 2.0)}, ValueError, r"dynamic_threshold is \(0.9, 1.0, 2.0"),
    "rescale alone": ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale was given without guidance_scale"),
    "rescale high": ({"guidance_rescale": 1.5, **GUIDED}, ValueError, "guidance_rescale is 1.5; give a number from 0"),
    "rescale negative": ({"guidance_rescale": -0.5, **GUIDED}, ValueError, "guidance_rescale is -0.5; give a number"),
    "rescale nan": ({"guidance_rescale": math.nan, **GUIDED}, ValueError, "guidance_rescale is nan"),
    "known alone": ({"known": X}, ValueError, "known and mask go together"),
    "mask alone": ({"mask": MASK}, ValueError, "known and mask go together"),
    "known noise alone": ({"known_noise": X}, ValueError, "known_noise was given without known"),
    "known noise and eta": ({"known_noise": X, "eta": 0.5, "seed": 1}, ValueError, "known_noise was given without"),
    "known shape": ({"known": X[0], "mask": MASK}, ValueError, r"known has shape \(3,\); the sample's is \(2, 3\)"),
    "known integer": ({"known": X.int(), "mask": MASK}, TypeError, "known is torch.int32"),
    "known array": ({"known": X.numpy(), "mask": MASK}, TypeError, "known is a ndarray"),
    "mask floats": ({"known": X, "mask": MASK.float()}, TypeError, "mask is a torch.float32; give a bool tensor"),
    "mask array": ({"known": X, "mask": MASK.numpy()}, TypeError, "mask is a ndarray; give a bool tensor"),
    "mask shape": ({"known": X, "mask": MASK[:, :2]}, ValueError, r"mask has shape \(2, 2\), which does not broadcast"),
    "mask large": ({"known": X, "mask": MASK[None]}, ValueError, r"mask has shape \(1, 2, 3\), which does not"),
    "mask device": ({"known": X, "mask": MASK.to("meta")}, ValueError, "mask is on meta; the sample is on cpu"),
    "known noise shape": ({"known": X, "mask": MASK, "known_noise": X[0]}, ValueError, r"known_noise has shape \(3,\)"),
    "clean clipped": (
        {"timestep": -1, "use_clipped_model_output": True},
        ValueError,
        "timestep -1 has cumulative alpha 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    """On a schedule of its own, and on one that has kept the plan of a good step."""
    arguments, error, message = BAD[case]
    good = {"sample": X, "model_output": M, "timestep": 500, "prev_timestep": 480, "schedule": SCHEDULE}
    # With a kept plan the device of a prediction, like in all else, is left to the kernel to find wrong.
    for schedule in (pf.DDIMSchedule.linear(1000), SCHEDULE)[: 1 if case == "output device" else 2]:
        pf.ddim_step(**{**good, "schedule": SCHEDULE})
        with pytest.raises(error, match=message):
            pf.ddim_step(**{**good, "schedule": schedule, **arguments})


def test_overlapping_outputs_are_refused():
    buffer = torch.zeros(9)
    with pytest.raises(ValueError, match="share memory"):
        pf.ddim_step(X, M, 5, 4, SCHEDULE, out=(buffer[:6].view(2, 3), buffer[3:].view(2, 3)))


def test_epsilon_at_zero_alpha_is_refused():
    schedule = pf.DDIMSchedule(torch.tensor([0.9, 0.0]))
    for t in (1, np.int64(1)):
        with pytest.raises(ValueError, match=r"timestep 1 has cumulative alpha 0 .*v_prediction"):
            pf.ddim_step(X, M, t, 0, schedule)


def test_absent_backend_says_why(monkeypatch):
    monkeypatch.setitem(_ops.KERNELS["ddim_step"], "native", set())
    monkeypatch.setitem(_ops.UNAVAILABLE, "native", "not built")
    monkeypatch.setattr("protofast._backend._found", {})
    with pytest.raises(pf.BackendUnavailableError, match="backend 'native' is not available: not built"):
        pf.ddim_step(X, M, 5, 4, pf.DDIMSchedule.linear(10), backend="native")


def test_a_backend_asked_for_once_is_not_kept(monkeypatch):
    monkeypatch.setattr("protofast._backend._found", {})
    automatic = "native" if why_not("ddim_step", "cpu", "native") is None else "reference"
    names = [overload("ddim_step", "cpu", name)._overloadname for name in ("reference", None, "reference")]
    assert names == ["reference", automatic, "reference"]
    with pf.use_backend("reference"):
        assert overload("ddim_step", "cpu")._overloadname == "reference"
    assert overload("ddim_step", "cpu")._overloadname == automatic


# Plans: what is kept of the first step of a kind


def test_a_kept_plan_still_checks_its_arguments():
    """What compares equal to what was asked for before is not always as good."""
    schedule = pf.DDIMSchedule.linear(1000)
    good = {"sample": X, "model_output": M, "timestep": 1, "prev_timestep": 0, "schedule": schedule}
    pf.ddim_step(**good)
    kept = len(schedule._plans)
    assert kept == 1
    bad = [
        ({"sample": X.int()}, "sample is torch.int32"),
        ({"sample": torch.tensor(1.0), "model_output": torch.tensor(1.0)}, r"sample is torch.float32 of shape \(\)"),
        ({"sample": X.numpy()}, "sample is a ndarray"),
        ({"timestep": 1.0}, "timestep is 1.0; give an int"),
        ({"prev_timestep": 0.0}, "prev_timestep is 0.0; give an int"),
        ({"timestep": torch.tensor(1.0)}, "timestep is a torch.float32 tensor"),
        ({"schedule": [0.9, 0.8]}, "schedule is a list"),
        ({"model_output": M.numpy()}, "model_output is a ndarray"),
    ]
    for arguments, message in bad:
        with pytest.raises(TypeError, match=message):
            pf.ddim_step(**{**good, **arguments})
    assert len(schedule._plans) == kept


def test_kept_plans_are_told_apart():
    """One schedule for every kind of step gives what a fresh one would."""
    x, m, z = draw(2, 3, 5, count=3)
    shared = pf.DDIMSchedule.linear(1000)
    variants = [
        {},
        {"t": 501},
        {"s": 479},
        {"eta": 0.5, "noise": z},
        {"eta": 1.0, "noise": z},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"clip_range": 1.0},
        {"clip_range": 0.5},
        {"clip_range": (-0.5, 1.0)},
        {"clip_range": 0.5, "use_clipped_model_output": True},
        {"bitwise": True},
        {"eta": 0.5, "noise": z, "bitwise": True},
    ]
    for _ in range(2):
        for variant in variants:
            options = {"t": 500, "s": 480, **variant}
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for a, b in ((x, m), (x[:, 0], m[:, 0])):
                    noise = {"noise": z.reshape(2, 3, 5)[:, 0] if a.ndim == 2 else z} if "noise" in variant else {}
                    tensors = {"x": a.to(dtype), "m": b.to(dtype), **options, **noise}
                    found = take(**tensors, schedule=shared)
                    for ours, fresh in zip(found, take(**tensors, schedule=pf.DDIMSchedule.linear(1000)), strict=True):
                        assert_same_bits(ours, fresh)


def test_steps_from_several_threads():
    schedule = pf.DDIMSchedule.linear(1000)
    x, m = draw(2, 5)

    def run(start):
        return [pf.ddim_step(x, m, t, t - 1, schedule, eta=0.5, seed=t).prev_sample for t in range(start, start + 60)]

    starts = [0, 30, 60] * 3
    expected = {start: run(start) for start in set(starts)}
    schedule = pf.DDIMSchedule.linear(1000)
    with ThreadPoolExecutor(len(starts)) as pool:
        for start, found in zip(starts, pool.map(run, starts), strict=True):
            assert all(map(torch.equal, found, expected[start]))


def test_a_used_schedule_can_be_copied_and_stored():
    schedule = pf.DDIMSchedule.linear(10)
    expected = pf.ddim_step(X + 1, M + 1, 5, 4, schedule)
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert torch.equal(pf.ddim_step(X + 1, M + 1, 5, 4, copied).prev_sample, expected.prev_sample)
        assert torch.equal(copied.alphas_cumprod, schedule.alphas_cumprod)


def test_nothing_is_kept_of_a_trace():
    """Fake tensors, and wrappers of a transform that has ended, would serve no later step."""
    schedule = pf.DDIMSchedule.linear(1000)
    x, m = draw(2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert pf.ddim_step(fake, fake, 500, 480, schedule).prev_sample.shape == x.shape
    assert not schedule._plans
    torch.compile(lambda x: pf.ddim_step(x, m, 500, 480, schedule)[0], backend="aot_eager", fullgraph=True)(x)
    assert not schedule._plans
    torch.func.grad(lambda w: w.sum() + pf.ddim_step(x, m, 500, 480, schedule).prev_sample.sum())(x)
    assert not schedule._plans
    check(pf.ddim_step(x, m, 500, 480, schedule), x, m, 500, 480, backend=None)
    assert len(schedule._plans) == 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a plan that was kept before serves one
        fake = mode.from_tensor(x)
        assert pf.ddim_step(fake, fake, 500, 480, schedule).prev_sample.shape == x.shape


# As ops


def op_arguments(device, dtype=torch.float32, output_dtype=None, requires_grad=False):
    """The least that the op takes, and everything."""
    x, m, c, z, known, known_noise = draw(2, 3, dtype=dtype, device=device, count=6)
    m, c = m.to(output_dtype or dtype), c.to(output_dtype or dtype)
    alphas = SCHEDULE._on(x.device)[0]
    t = torch.tensor([500, 3], device=device)
    table = overload("ddim_coefficients", device, "reference")(alphas, t, t - 1, 0.5)
    vectors = [torch.tensor(pair, dtype=torch.float64, device=device) for pair in ([0.8, 1.2], [1.0, 1.5])]
    for tensor in (x, m, c, z, known, known_noise, *vectors):
        tensor.requires_grad_(requires_grad)
    seed, mask = torch.tensor([3, 4], device=device), known.detach() > 0
    least = x, m, table[:1]
    row = torch.tensor([1, 0], device=device)
    limits = None, None, True
    return least, (x, m, table, row, 2, False, *limits, c, 2.0, *vectors, z, None, known, known_noise, mask), seed


def test_opcheck(backend, device):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    step, step_out = (overload(name, device, backend) for name in ("ddim_step", "ddim_step_out"))
    for requires_grad in (False, True):
        least, everything, _ = op_arguments(device, requires_grad=requires_grad)
        for arguments in (least, everything):
            torch.library.opcheck(step, arguments, test_utils=tests)
    least, everything, seed = op_arguments(device, output_dtype=torch.bfloat16)
    torch.library.opcheck(step, least, {"clip_min": -1.0, "clip_max": 1.0, "seed": seed}, test_utils=tests)
    x, m, table = least
    torch.library.opcheck(step, (x.mT.contiguous().mT, m, table, None, 0, True), test_utils=tests)
    for arguments, second in itertools.product((least, everything), (None, torch.empty_like(x))):
        written = {"prev_sample": torch.empty_like(x), "pred_original_sample": second}
        torch.library.opcheck(step_out, arguments, written, test_utils=tests)
    alphas, t = SCHEDULE._on(x.device)[0], torch.tensor([500, 3], device=device)
    for steps in ((t, t - 1), (t, t[1]), (t[0], t[1])):
        torch.library.opcheck(overload("ddim_coefficients", device, backend), (alphas, *steps, 0.5), test_utils=tests)
        torch.library.opcheck(
            overload("ddim_eager_coefficients", device, "reference"), (alphas, *steps, 0.5), test_utils=tests
        )


# What a step can take besides, of a pair of predictions, and of tensors like the sample's: noise, known, known_noise.
CASES = {
    "plain": lambda u, v, z, k, kn: (u, {}),
    "noise": lambda u, v, z, k, kn: (u, {"eta": 0.5, "noise": z}),
    "seed": lambda u, v, z, k, kn: (u, {"eta": 0.5, "seed": (3, 4)}),
    "clip": lambda u, v, z, k, kn: (u, {"clip_range": (-0.4, 0.5)}),
    "clipped direction": lambda u, v, z, k, kn: (u, {"clip_range": 0.5, "use_clipped_model_output": True}),
    "guidance": lambda u, v, z, k, kn: ((u, v), {"guidance_scale": 2.0}),
    "rescale": lambda u, v, z, k, kn: ((u, v), {"guidance_scale": 2.0, "guidance_rescale": 0.7}),
    "threshold": lambda u, v, z, k, kn: (u, {"dynamic_threshold": 0.7, "use_clipped_model_output": True}),
    "threshold with a largest": lambda u, v, z, k, kn: (u, {"dynamic_threshold": (0.7, 1.3)}),
    "known": lambda u, v, z, k, kn: (u, {"known": k, "mask": k.detach()[:, :1] > 0}),
    "known noised": lambda u, v, z, k, kn: (u, {"known": k, "known_noise": kn, "mask": k.detach() > 0}),
    "bitwise": lambda u, v, z, k, kn: (u, {"bitwise": True, "clip_range": 0.5, "eta": 0.5, "noise": z}),
    "all": lambda u, v, z, k, kn: (
        (u, v),
        {
            "guidance_scale": 2.0,
            "guidance_rescale": 0.7,
            "dynamic_threshold": 0.7,
            "use_clipped_model_output": True,
            "eta": 0.5,
            "noise": z,
            "known": k,
            "known_noise": kn,
            "mask": k.detach() > 0,
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(backend, device, interpreted, kind, case):
    """First and second, by differences; also through the deviations of a rescale and the quantile of a threshold."""
    if backend != "reference" and (case != "all" or (interpreted and kind != "epsilon")):
        pytest.skip("hundreds of steps; the gradient is every backend's")
    tensors = draw(2, 4, dtype=torch.float64, device=device, count=6)
    for tensor in tensors[:3]:
        tensor *= torch.tensor([[2.0], [0.05]], dtype=torch.float64, device=device)
    t = torch.tensor([300, 3], device=device)

    def step(x, *others):
        m, options = CASES[case](*others)
        return pf.ddim_step(x, m, t, t - 1, SCHEDULE, **options, prediction_type=kind, backend=backend)

    if "threshold" in case:  # which is above 1 in the first sample alone
        plain = pf.ddim_step(*tensors[:2], t, t - 1, SCHEDULE, prediction_type=kind).pred_original_sample
        assert torch.quantile(plain[0].abs(), 0.7) > 1 > plain[1].abs().max()
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(step, inputs, fast_mode=interpreted)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=interpreted)


def test_gradient_reaches_what_it_should(backend, device, interpreted):
    """Each tensor alone, both limits of a clip, and one tensor given for several arguments."""
    tensors = draw(2, 6, device=device, count=6)
    for case in ("all", "guidance"):

        def total(x, *others, case=case):
            m, options = CASES[case](*others)
            return pf.ddim_step(x, m, 500, 480, SCHEDULE, **options, backend=backend).prev_sample.sum()

        used = len(tensors) if case == "all" else 3
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        together = torch.autograd.grad(total(*leaves), leaves[:used])
        for number, expected in enumerate(together):
            alone = [tensor.clone().requires_grad_(n == number) for n, tensor in enumerate(tensors)]
            assert torch.equal(torch.autograd.grad(total(*alone), alone[number])[0], expected)
            with torch.no_grad():
                assert not total(*alone).requires_grad
    modes = {"fast_mode": interpreted}
    x, m, c, z = (v.requires_grad_() for v in draw(2, 3, dtype=torch.float64, device=device, count=4))
    t = torch.tensor([500, 3], device=device)

    def step(x, m, c, z, clip=None):
        options = {"eta": 0.5, "noise": z, "guidance_scale": 2.0, "clip_range": clip}
        return pf.ddim_step(x, (m, c), t, t - 1, SCHEDULE, **options, backend=backend)

    inside = 1.01 * step(x, m, c, z).pred_original_sample.abs().median().item()  # clips some elements, not others
    assert torch.autograd.gradcheck(lambda *v: step(*v, clip=inside), (x, m, c, z), **modes)
    assert torch.autograd.gradgradcheck(lambda *v: step(*v, clip=inside), (x, m, c, z), **modes)
    assert torch.autograd.gradcheck(lambda x, m: step(x, m, m, m), (x, m), **modes)
    (seeded,) = torch.autograd.grad(
        pf.ddim_step(x, m, t, 2, SCHEDULE, eta=0.5, seed=3, clip_range=inside, backend=backend).prev_sample.sum(), x
    )
    noise = normal_noise(x, 3, backend=backend)
    (given_noise,) = torch.autograd.grad(
        pf.ddim_step(x, m, t, 2, SCHEDULE, eta=0.5, noise=noise, clip_range=inside, backend=backend)[0].sum(), x
    )
    assert torch.equal(seeded, given_noise)
    # Nothing but what is known reaches what is kept.
    mask = torch.zeros(2, 3, dtype=torch.bool, device=device)
    step = pf.ddim_step(x, m, t, 2, SCHEDULE, known=c, mask=mask, backend=backend).prev_sample.sum()
    grads = torch.autograd.grad(step, (x, m, c))
    assert [grad.unique().tolist() for grad in grads] == [[0.0], [0.0], [1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_deterministic_step(backend, device, dtype):
    """By hand: the step is linear, so its gradient is its two coefficients."""
    x, m = (v.requires_grad_() for v in draw(3, 4, dtype=dtype, device=device))
    pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend).prev_sample.sum().backward()
    signal, spread, p, q, _, _ = columns(500, 480, SCHEDULE, 0.0, 2)
    a, b = 1 / signal, -spread / signal
    for grad, expected, terms in ((x.grad, p * a, p * a), (m.grad, p * b + q, abs(p * b) + q)):
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
    assert all(f"ddim_step.{backend}" in str(graph.code) for graph in counter.graphs)


@pytest.mark.parametrize("case", ["seed", "clipped direction", "threshold with a largest", "bitwise", "all"])
def test_compiles_with_every_option(backend, device, case):
    """In one graph, forward and backward, and written in place, with the bits of the eager step."""
    if backend != "reference" and case != "all":
        pytest.skip("what is traced is the same on every backend")
    torch._dynamo.reset()
    tensors = draw(2, 3, 4, device=device, count=6)

    def loss(x, t, *others):
        m, options = CASES[case](*others)
        return pf.ddim_step(x, m, t, 2, SCHEDULE, **options, backend=backend).prev_sample.square().sum()

    def update(x, t, *others):
        m, options = CASES[case](*others)
        pf.ddim_step(x, m, t, 2, SCHEDULE, **options, out=x, backend=backend)
        return x * 2

    compiled_loss, compiled_update = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (loss, update))
    for t in (500, torch.tensor([500, 3], device=device)):
        grads, written = [], []
        for function, in_place in ((loss, update), (compiled_loss, compiled_update)):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            function(leaves[0], t, *leaves[1:]).backward()
            grads.append([leaf.grad for leaf in leaves])
            x = tensors[0].clone()
            written.append((x, in_place(x, t, *tensors[1:])))
        for eager, compiled in zip(*grads, strict=True):
            assert (eager is None and compiled is None) or torch.equal(eager, compiled)
        assert all(map(torch.equal, *written))


def test_numbers_that_vary_do_not_break_the_graph():
    """From the second value on a compiler takes a number for a symbol, which not every function of math takes."""
    torch._dynamo.reset()
    x, u, v, z = draw(2, 3, 4, count=4)

    def clipped(x, a, n):
        options = {"eta": a, "seed": (n, 2 * n), "guidance_scale": 3 * a, "guidance_rescale": a}
        return pf.ddim_step(x, (u, v), 500, 480, SCHEDULE, **options, clip_range=(-a, 2 * a))

    def thresholded(x, a, n):
        options = {"eta": a, "noise": z, "dynamic_threshold": (a, 1 + a)}
        first = pf.ddim_step(x, u, 500, 480, SCHEDULE, **options).prev_sample
        return pf.ddim_step(first, v, 480, 460, SCHEDULE, clip_range=a)

    for step in (clipped, thresholded):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for n, value in enumerate((0.25, 0.5, 0.75)):
            assert all(map(torch.equal, compiled(x, value, n), step(x, value, n)))


# Behaviour


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


def test_nothing_is_read_on_the_host():
    """Reading a value on the host would wait for a GPU and break its graph capture."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
            return func(*args, **(kwargs or {}))

    alphas = SCHEDULE._on(torch.device("cpu"))[0]
    for t in (torch.tensor(500), torch.tensor([500]), torch.tensor([500, 3])):
        for name in ("ddim_coefficients", "ddim_eager_coefficients"):
            with NoReads():
                overload(name, "cpu", "reference")(alphas, t, t - 1, 0.5)
    _, everything, seed = op_arguments("cpu")
    kernel = importlib.import_module("protofast.backends.reference.ddim").ddim_step
    with NoReads():
        kernel(*everything)
        kernel(*everything[:3], seed=seed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_no_synchronization(backend, device, case):
    if device != "cuda":
        pytest.skip("a GPU's matter")
    x, *others = draw(2, 3, 8, 8, device=device, count=6)
    m, options = CASES[case](*others)
    t = torch.tensor([500, 3], device=device)
    options |= {"backend": backend}
    pf.ddim_step(x, m, t, t - 1, SCHEDULE, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for now in (t, t[:1], 500, 499):
            pf.ddim_step(x, m, now, 2, SCHEDULE, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_mode_is_refused(backend, device):
    """torch drops the tangents of an op without a forward formula, and would give a derivative of 0."""
    x, m = draw(2, 3, 4, 4, device=device, count=2)
    pf.ddim_step(x, m, 500, 480, SCHEDULE, backend=backend)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="ddim_step has no forward-mode"):
        pf.ddim_step(forward_ad.make_dual(x, m), m, 500, 480, SCHEDULE, backend=backend)
    with pytest.raises(NotImplementedError, match="prototype_activation has no forward-mode"):
        torch.func.jvp(lambda x: pf.prototype_distance(x, x[0, :, 0].mT).distance, (x,), (m,))


def test_inference_mode(backend, device):
    with torch.inference_mode():
        schedule = pf.DDIMSchedule.linear(100)
        x, m = draw(2, 3, device=device)
        pf.ddim_step(x, m, 50, 40, schedule, backend=backend)
    x, m = draw(2, 3, device=device)
    pf.ddim_step(x.requires_grad_(), m, 50, 40, schedule, backend=backend).prev_sample.sum().backward()
    assert x.grad is not None


# The traps of design/kernels.md, section 4


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", [999, 998, 500, 7, 3, 1, 0]])
@pytest.mark.parametrize("count", [7, 13, 30])
def test_trap_previous_timestep_of_linspace_and_trailing_spacing(spacing, count):
    """diffusers #11347: the step before is the next timestep of the list, not T // count below.

    A model that knows the image and the noise must see their mixture at every timestep it is asked at.
    """
    if not isinstance(spacing, str) and count != len(spacing):
        pytest.skip("a list has one length")
    image, noise = draw(2, 3, 4, dtype=torch.float64)
    alphas = SCHEDULE.alphas_cumprod

    def mixture(t):
        return alphas[t].sqrt() * image + (1 - alphas[t]).sqrt() * noise

    def model(x, t):
        asked.append(int(t[0]))
        assert (x - mixture(t[0])).abs().max() < 1e-11
        return (x - alphas[t[0]].sqrt() * image) / (1 - alphas[t[0]]).sqrt()

    asked: list[int] = []
    steps = pf.diffusion.timesteps(count, 1000, spacing)
    result = pf.diffusion.sample(model, mixture(steps[0]), SCHEDULE, count, spacing=spacing)
    assert asked == steps
    assert (result - image).abs().max() < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bitwise", [False, True])
def test_trap_set_alpha_to_one_in_a_batch(backend, device, kind, bitwise):
    """diffusers #14216: the last step of one sample among others ends at final_alpha_cumprod too."""
    x, m = draw(4, 3, 5, device=device)
    t, s = [500, 20, 0, 999], [480, -1, -1, 979]
    results = []
    for final in (1.0, SCHEDULE._values[1]):
        schedule = pf.DDIMSchedule(SCHEDULE.alphas_cumprod, final)
        options = {"prediction_type": kind, "backend": backend}
        result = take(x, m, t, s, schedule, bitwise=bitwise, **options).prev_sample
        for n in range(4):
            alone = take(x[n : n + 1], m[n : n + 1], t[n], s[n], schedule, bitwise=bitwise, **options).prev_sample
            assert_same_bits(result[n : n + 1], alone)
        if not bitwise:
            check(take(x, m, t, s, schedule, **options), x, m, t, s, schedule, **options)
        results.append(result)
    changed = (results[0] != results[1]).flatten(1).any(1).tolist()
    assert changed == [False, True, True, False]


@pytest.mark.parametrize("case", [name for name in CASES if name != "seed"])
def test_trap_timesteps_of_each_sample(backend, device, case):
    """diffusers #1784: a batch at different timesteps is its samples, each alone."""
    tensors = draw(4, 3, 7, device=device, count=6)
    t, s = [500, 20, 999, 3], [480, -1, 0, 2]

    def step(some, t, s):
        x, *others = (tensor[some].clone() for tensor in tensors)
        m, options = CASES[case](*others)
        return take(x, m, t, s, **options, backend=backend)

    whole = step(slice(None), t, s)
    for n in range(4):
        for now, prev in ((t[n], s[n]), (t[n : n + 1], s[n : n + 1]), (t[n], s[n : n + 1])):
            for found, expected in zip(step(slice(n, n + 1), now, prev), whole, strict=True):
                assert_same_bits(found, expected[n : n + 1])


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_trap_zero_terminal_snr(backend, device, kind, eta):
    """Nothing is divided by the signal, which is 0 at T − 1."""
    schedule = SCHEDULE.zero_terminal_snr()
    assert schedule._values[-1] == 0
    x, m, z = draw(2, 3, 5, dtype=torch.float64, device=device, count=3)
    options = {"prediction_type": kind, "eta": eta, "noise": z if eta else None, "backend": backend}
    for s, t, limit in itertools.product((-1, 0, 333, 998), (999, [999, 999]), ({}, {"clip_range": 1.0})):
        result = take(x, m, t, s, schedule, **options, **limit)
        assert result.prev_sample.isfinite().all()
        check(result, x, m, t, s, schedule, **options, **limit)
        if eta < 1:  # where diffusers takes the root of 1 − ᾱ' − σ², which rounds to just below 0
            assert take(x, m, t, s, schedule, **options, **limit, bitwise=True).prev_sample.isfinite().all()
    up = pf.ddim_inverse_step(x, m, 500, 999, schedule, prediction_type=kind, backend=backend)
    assert up.prev_sample.isfinite().all()
    check(up, x, m, 500, 999, schedule, prediction_type=kind, backend=backend)


@pytest.mark.parametrize("last", [1.0, 0.9999])
@pytest.mark.parametrize("kind", KINDS)
def test_eta_at_the_last_step(backend, device, kind, last):
    """The image itself (ᾱ' = 1) takes no noise; with set_alpha_to_one=False, at timestep 0, ᾱ' = ᾱ and neither."""
    schedule = pf.DDIMSchedule(SCHEDULE.alphas_cumprod, last if last == 1 else SCHEDULE._values[1])
    x, m, z = draw(2, 3, 5, dtype=torch.float64, device=device, count=3)
    t = 20 if last == 1 else 0
    options = {"prediction_type": kind, "backend": backend}
    plain = pf.ddim_step(x, m, t, -1, schedule, **options)
    noised = pf.ddim_step(x, m, t, -1, schedule, eta=1.0, noise=z, **options)
    assert torch.equal(noised.prev_sample, plain.prev_sample)
    check(noised, x, m, t, -1, schedule, eta=1.0, noise=z, **options)


def test_eta_upwards_adds_no_noise(backend, device):
    """From a noisier sample no noise can come off: σ of eq. 16 would be imaginary, and is 0."""
    x, m, z = draw(2, 3, 5, dtype=torch.float64, device=device, count=3)
    for t, s in (([480, 480], [500, 500]), ([480, 3], [500, 999]), (500, 500)):
        result = take(x, m, t, s, eta=0.7, noise=z, backend=backend)
        check(result, x, m, t, s, backend=backend)


def test_trap_eta_zero_draws_no_noise(backend, device):
    x, m = draw(2, 3, 5, device=device)
    state = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if device == "cuda" else None
    for options in ({}, {"clip_range": 1.0}, {"bitwise": True}, {"dynamic_threshold": 0.9}):
        pf.ddim_step(x, m, 500, 480, SCHEDULE, **options, backend=backend)
    pf.diffusion.sample(lambda x, t: x * 0, x, SCHEDULE, 3, backend=backend)
    pf.diffusion.invert(lambda x, t: x * 0, x, SCHEDULE, 3, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert gpu is None or torch.equal(torch.cuda.get_rng_state(), gpu)


# Schedules


BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
NAMED = {
    "linear": ("linear", lambda count: pf.DDIMSchedule.linear(count, 0.00085, 0.012)),
    "scaled_linear": ("scaled_linear", lambda count: pf.DDIMSchedule.scaled_linear(count)),
    "cosine": ("squaredcos_cap_v2", lambda count: pf.DDIMSchedule.cosine(count)),
    "sigmoid": ("sigmoid", lambda count: pf.DDIMSchedule.sigmoid(count, 0.00085, 0.012)),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("count", [10, 1000])
def test_schedules_are_exact(name, count):
    """By their definitions, in extended precision; to the roundings of a product of float64 numbers."""
    low, high, i = EXACT(0.00085), EXACT(0.012), np.arange(count, dtype=EXACT)
    if name == "cosine":  # Nichol and Dhariwal 2021, eq. 17
        pi = EXACT(math.pi) + EXACT(1.2246467991473532e-16)
        angle = (np.arange(count + 1, dtype=EXACT) / count + EXACT(0.008)) / EXACT(1.008) * pi / 2
        bar = np.cos(angle) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], EXACT(0.999))
        # The cosine of an angle that is rounded, twice: in a ratio, whose product telescopes.
        own = 8 * (angle * np.tan(angle))[1:]
        own[-1] += 1 / (1 - betas[-1])  # 1 − 0.999
    else:
        rise = 1 / (1 + np.exp(6 - 12 * i / (count - 1))) if name == "sigmoid" else i / (count - 1)
        betas = low + (high - low) * rise
        if name == "scaled_linear":
            betas = (np.sqrt(low) + (np.sqrt(high) - np.sqrt(low)) * rise) ** 2
        own = (16 * betas).cumsum()
    found = NAMED[name][1](count).alphas_cumprod
    expected = (1 - betas).cumprod()
    # 1 − beta and the product are two roundings each timestep; betas have some of their own.
    assert (abs(exact(found) / expected - 1) <= unit(torch.float64) * (2 * (i + 1) + own)).all()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("count", [10, 1000])
def test_schedules_are_those_of_diffusers(name, count):
    diffusers = pytest.importorskip("diffusers")
    theirs, make = NAMED[name]
    kind = diffusers.DDPMScheduler if theirs == "sigmoid" else diffusers.DDIMScheduler
    scheduler = kind(count, **BETAS, beta_schedule=theirs)
    ours = make(count)
    # diffusers multiplies in float32: the rounding of every 1 − beta and every product accumulates.
    rounding = 3 * torch.arange(1, count + 1) * unit(torch.float32)
    error = (scheduler.alphas_cumprod.double() / ours.alphas_cumprod - 1).abs()
    if name == "cosine":  # its last beta is 0.999, and 1 − 0.999 keeps 14 of 24 bits
        rounding[-1] += 2**11 * unit(torch.float32)
    assert (error <= rounding).all()
    taken = pf.DDIMSchedule.from_diffusers(scheduler)
    assert torch.equal(taken.alphas_cumprod, scheduler.alphas_cumprod.double())
    betas = pf.DDIMSchedule.from_betas(scheduler.betas)
    assert torch.equal(betas.alphas_cumprod, (1 - scheduler.betas.double()).cumprod(0))


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr_schedule(name):
    """Lin et al. 2024, algorithm 1: in extended precision, and diffusers' to the roundings of float32."""
    schedule = NAMED[name][1](1000)
    ours = schedule.zero_terminal_snr()
    root = np.sqrt(exact(schedule.alphas_cumprod))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    found = exact(ours.alphas_cumprod)
    assert found[-1] == 0
    assert found[0] == exact(schedule.alphas_cumprod)[0]
    # The difference of two rounded roots, squared; its quotient by another such; a handful of roundings.
    lost = 2 * (root + root[-1])[:-1] / (root - root[-1])[:-1] + 2 * (root[0] + root[-1]) / (root[0] - root[-1])
    assert (abs(found / np.where(expected, expected, 1) - 1)[:-1] <= unit(torch.float64) * (lost + 8)).all()
    assert ours._values[0] == 1
    assert schedule.zero_terminal_snr()._values == ours._values

    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule=name, **BETAS, rescale_betas_zero_snr=True)
    theirs = exact(scheduler.alphas_cumprod)
    ratio = np.maximum(expected[1:], 1e-30) / expected[:-1]  # back to betas and again to a product, each rounded
    steps = 3 * np.arange(1, 1001) + np.concatenate([[1], 1 / ratio[:-1], [0]]).cumsum()
    # Their roots are of a product of as many factors.
    lost *= 3 * np.arange(1, 1000)
    assert theirs[-1] == 0
    assert (abs(theirs[:-1] / expected[:-1] - 1) <= unit(torch.float32) * (lost + steps[:-1] + 16)).all()


def test_zero_terminal_snr_of_a_constant_is_refused():
    for alphas in ([0.5], [0.5, 0.5]):
        with pytest.raises(ValueError, match="a schedule of constant cumulative alphas cannot be rescaled"):
            pf.DDIMSchedule(torch.tensor(alphas)).zero_terminal_snr()


def test_schedule_values():
    schedule = pf.DDIMSchedule.from_betas(torch.tensor([0.5, 0.5]), final_alpha_cumprod=0.75)
    assert schedule._values == [0.75, 0.5, 0.25]
    assert len(schedule) == 2
    assert repr(schedule) == "DDIMSchedule(T=2, alphas_cumprod 0.5 … 0.25)"
    schedule.alphas_cumprod.zero_()
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.25]
    assert schedule.zero_terminal_snr()._values == [0.75, 0.5, 0.0]  # the final alpha stays
    for listed in ([0.9, 0.8], np.array([0.9, 0.8]), torch.tensor([0.9, 0.8], dtype=torch.float64)):
        assert pf.DDIMSchedule(listed)._values == [1.0, 0.9, 0.8]  # float64, not by way of float32
    assert pf.DDIMSchedule.from_betas([0.1])._values == [1.0, 0.9]


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


# What a review found


@pytest.mark.parametrize("backend_name", ["reference", "native", None])
def test_out_counts_as_a_write(backend_name):
    """Autograd has to see that what it kept is gone."""
    if backend_name is not None and (reason := why_not("ddim_step_out", "cpu", backend_name)):
        pytest.skip(reason)
    x, m = draw(2, 3)
    weight = torch.zeros(2, 3, requires_grad=True)
    for out in (lambda y: y, lambda y: (torch.empty_like(x), y)):
        kept = weight.exp()
        with torch.no_grad():
            pf.ddim_step(x, m, 500, 480, SCHEDULE, out=out(kept.detach()), backend=backend_name)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()
    with torch.inference_mode():
        pf.ddim_step(x, m, 500, 480, SCHEDULE, out=torch.empty_like(x), backend=backend_name)


def test_works_under_another_default_device():
    with torch.device("meta"):
        schedules = [
            pf.DDIMSchedule.linear(10),
            pf.DDIMSchedule.scaled_linear(10),
            pf.DDIMSchedule.cosine(10),
            pf.DDIMSchedule.sigmoid(10).zero_terminal_snr(),
        ]
        x = torch.ones(2, 3, device="cpu")
        pf.ddim_step(x, x, 5, 4, schedules[0], eta=0.5, seed=3, dynamic_threshold=0.9)
    assert all(0 < float(schedule.alphas_cumprod[0]) < 1 for schedule in schedules)


def test_a_schedule_travels_without_its_tables():
    schedule = pf.DDIMSchedule.linear(1000)
    x, m = draw(2, 3)
    expected = pf.ddim_step(x, m, 500, 480, schedule)
    data = pickle.dumps(schedule)
    assert len(data) < 20_000
    for other in (pickle.loads(data), copy.deepcopy(schedule)):
        assert torch.equal(pf.ddim_step(x, m, 500, 480, other).prev_sample, expected.prev_sample)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(ddim, "_MANY", 3)
    schedule = pf.DDIMSchedule.linear(1000)
    x, m = draw(2, 3)
    for t in range(20, 30):
        pf.ddim_step(x, m, t, t - 1, schedule)
        assert len(schedule._plans) <= 3
    check(pf.ddim_step(x, m, 20, 19, schedule), x, m, 20, 19, backend=None)


def test_settings_in_tensors_are_read_anew():
    x, m, z = draw(2, 3, count=3)
    eta, limit = torch.tensor(0.9), torch.tensor(1.0)
    for value in (0.9, 0.2):
        eta.fill_(value), limit.fill_(value)
        found = pf.ddim_step(x, m, 500, 480, SCHEDULE, eta=eta, noise=z, clip_range=(-limit, limit))
        value = float(torch.tensor(value))
        expected = pf.ddim_step(x, m, 500, 480, SCHEDULE, eta=value, noise=z, clip_range=value)
        assert all(map(torch.equal, found, expected))


def test_zero_alpha_in_a_tensor_on_the_host_is_refused():
    schedule = SCHEDULE.zero_terminal_snr()
    x, m = draw(2, 3)
    with pytest.raises(ValueError, match="timestep 999 has cumulative alpha 0"):
        pf.ddim_step(x, m, torch.tensor([999, 500]), 2, schedule)
    with pytest.raises(ValueError, match="timestep -1 has cumulative alpha 1"):
        pf.ddim_step(x, m, torch.tensor([-1, 500]), -1, schedule, prediction_type="sample")


def test_coefficients_have_the_same_bits_everywhere(place):
    """An int timestep's are kept whoever computed them, so all have to be the same."""
    backend, device = place
    alphas, steps = SCHEDULE._on(torch.device(device))
    now, prev = steps[2:], steps[1:-1]
    for eta in (0.0, 0.3, 1.0):
        found = overload("ddim_coefficients", device, backend)(alphas, now, prev, eta)
        expected = overload("ddim_coefficients", "cpu", "reference")(alphas.cpu(), now.cpu(), prev.cpu(), eta)
        assert torch.equal(found.cpu(), expected)


def test_outputs_that_interleave_or_overlap():
    x, m = draw(4, 3)
    expected = pf.ddim_step(x, m, 500, 480, SCHEDULE)
    buffer = torch.zeros(4, 8)
    for first, second, fine in [
        (buffer[:, :3], buffer[:, 3:6], True),
        (buffer[:, 0:6:2], buffer[:, 1:7:2], True),
        (buffer[:, :3], buffer[:, 2:5], False),
        (buffer[:, :3], buffer[:, :3], False),
        (buffer[:, 0:6:2], buffer[:, 2:8:2], False),
    ]:
        if fine:
            pf.ddim_step(x, m, 500, 480, SCHEDULE, out=(first, second))
            assert torch.equal(first, expected[0])
            assert torch.equal(second, expected[1])
        else:
            with pytest.raises(ValueError, match="share memory"):
                pf.ddim_step(x, m, 500, 480, SCHEDULE, out=(first, second))


def test_forward_mode_is_refused_with_out():
    x, m = draw(2, 3)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
        pf.ddim_step(forward_ad.make_dual(x, m), m, 500, 480, SCHEDULE, out=torch.empty_like(x))


def test_nan_spoils_the_threshold_of_its_sample_as_a_quantile_does():
    x, m = draw(2, 30)
    x[0, 3] = math.nan
    result = pf.ddim_step(x, m, 500, 480, SCHEDULE, dynamic_threshold=0.9)
    assert result.prev_sample.isnan().all(1).tolist() == [True, False]
    assert not result.prev_sample[1].isnan().any()
