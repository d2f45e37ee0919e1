"""The Triton DDIM kernels: what they compile to on GPUs that are not here, their bits, and where they run.

Nothing of protofast is imported up here: this module is imported where that import is what is tested.
"""

import importlib.util
import itertools
import os
import random
import re

import numpy as np
import pytest
import torch
from helpers.aot import ARCHITECTURES, assert_no_spills, assert_wide_addresses, builds
from helpers.errors import assert_within, exact
from helpers.fresh import run_fresh
from helpers.layouts import layouts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["epsilon", "sample", "v_prediction"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def kernel_of(op, backend="triton"):
    from protofast._backend import overload

    return overload(op, DEVICE if backend == "triton" else "cpu", backend)


def on(backend, op, *args, **kwargs):
    """The op's results on the CPU, computed by Triton on the GPU if there is one."""
    device = DEVICE if backend == "triton" else "cpu"

    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    results = kernel_of(op, backend)(*map(move, args), **{key: move(value) for key, value in kwargs.items()})
    return results.cpu() if isinstance(results, torch.Tensor) else tuple(result.cpu() for result in results)


def bits(values):
    """Its bits, NaN all alike."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.masked_fill(values.isnan(), torch.nan).view(integers)


# What it compiles to.


def launches():
    """Every dtype, per-sample and shared coefficients, with everything that is read and with the least."""
    from protofast.backends.triton.ddim import ddim_step, ddim_step_out

    table, index = torch.zeros(9, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    ratio = torch.ones(4, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.zeros(4, 3, 32, 32, dtype=dtype)
        m = x.bfloat16() if dtype == torch.float32 else x
        ddim_step(x, m, table, index, 2, False, -1.0, 1.0, False, m, 2.0, ratio, None, x, None, x, x, x > 0)
        ddim_step_out(x, x, table[:1], prev_sample=x, pred_original_sample=None)


def test_compiles_without_spills_and_with_64_bit_addresses():
    found = builds(launches)
    assert len(found) == 8 * len(ARCHITECTURES)
    for build in found:
        check_build(build)
        assert build.shared == 0


def check_build(build):
    assert_no_spills(build)
    assert_wide_addresses(build)
    # These lose a NaN on a GPU, which the interpreter does not show.
    assert not any(op in build.ttir for op in ("arith.maxnumf", "arith.minnumf"))
    assert build.registers <= 128  # at least half of the threads that an SM can hold
    assert ".v4.b32" in build.ptx or ".v2.b64" in build.ptx, "memory is not accessed 16 bytes at a time"


def exact_launches():
    """What promises its bits: coefficients, noise, and the steps that draw noise or are asked to be bitwise."""
    from protofast.backends.triton.ddim import ddim_coefficients, ddim_step
    from protofast.backends.triton.philox import philox_normal

    table, seed = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    ratio = torch.ones(4, dtype=torch.float64)
    for kind, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        x = torch.zeros(4, 3, 32, 32, dtype=dtype)
        end = (None, seed) if kind < 2 else (x, None)
        ddim_step(x, x, table, None, kind, True, None, None, kind == 2, x, 2.0, ratio, ratio, *end, x, x, x > 0)
    x = x.float()
    ddim_step(x, x, table, None, 0, False, None, None, False, None, 1.0, None, None, None, seed)
    philox_normal(x, seed)
    steps = torch.zeros(4, dtype=torch.int64)
    ddim_coefficients(torch.ones(1001, dtype=torch.float64), steps, steps, 0.5)


def test_what_promises_its_bits_is_not_contracted():
    architectures = ARCHITECTURES[0], ARCHITECTURES[-1]
    found = builds(exact_launches, architectures)
    assert len(found) == 6 * len(architectures)
    for build in found:
        if build.kernel != "coefficients_kernel":  # a small one
            check_build(build)
        assert_no_spills(build)
        assert build.shared <= 2048  # the noise, on its way from four a thread to two or eight
        # A plain "mul" or "add" may be contracted by ptxas, "mul.rn" may not. "div.full", "sqrt.approx" are not exact.
        rounded = set(re.findall(r"\b((?:fma|mul|add|sub|div|sqrt|rcp|rsqrt|ex2|lg2)\.[\w.]*f(?:32|64))\b", build.ptx))
        assert rounded
        assert rounded <= {
            f"{op}.rn.{dtype}" for op in ("mul", "add", "sub", "div", "sqrt") for dtype in ("f32", "f64")
        }


def small_and_odd():
    """Sizes that specialize differently: 1, and not a multiple of 16."""
    from protofast.backends.triton.ddim import ddim_step

    table = torch.zeros(1, 6, dtype=torch.float64)
    for shape in ((1,), (1, 1), (3, 5), (300, 2), (1, 2000)):
        x = torch.zeros(shape)
        seed = torch.zeros(2, dtype=torch.int64) if len(shape) > 1 else None
        ddim_step(x, x, table.expand(shape[0], 6), None, 0, False, -1.0, 1.0, False, *[None, 1.0, *[None] * 3], seed)


def test_odd_sizes_compile():
    found = builds(small_and_odd, [90])
    assert len(found) == 5
    for build in found:
        assert_no_spills(build)
        assert_wide_addresses(build)


# What it computes.

SHAPE = 3, 2, 5
ALPHAS = torch.linspace(1, 0.01, 11, dtype=torch.float64)

OPTIONS = {
    "rows": ("one", "each", "index", "one index"),
    "clip": ("no", "both", "low", "high", "threshold"),
    "clipped_direction": (False, True),
    "guidance": ("no", "scale", "rescale"),
    "noise": ("no", "given", "seed", "both"),
    "known": ("no", "clean", "noised"),
    "narrow output": (False, True),
}


def arguments(dtype, kind, bitwise, options):
    """The op's, at random, for a choice from OPTIONS. One value of the sample is NaN, one infinite."""

    def draw(dtype=dtype):
        return torch.randn(SHAPE, dtype=torch.float64).to(dtype)

    output_dtype = torch.bfloat16 if options["narrow output"] and dtype == torch.float32 else dtype
    t = torch.randint(1, 10, (1 if options["rows"] == "one" else 3,))
    coefficients = "ddim_eager_coefficients" if bitwise else "ddim_coefficients"
    step = {
        "sample": draw(),
        "model_output": draw(output_dtype),
        "table": on("reference", coefficients, ALPHAS, t, t - 1, 0.7),
        "prediction_type": KINDS.index(kind),
        "bitwise": bitwise,
        "clipped_direction": options["clipped_direction"],
    }
    step["sample"][0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    if "index" in options["rows"]:
        step["row"] = torch.tensor([2, -1, 2**62]) if options["rows"] == "index" else torch.tensor(1, dtype=torch.int32)
    if options["clip"] == "threshold":
        step["threshold"] = 1 + torch.rand(3, dtype=torch.float64)
    if options["clip"] in ("both", "low"):
        step["clip_min"] = -0.6
    if options["clip"] in ("both", "high"):
        step["clip_max"] = 0.9
    if options["guidance"] != "no":
        step |= {"cond_output": draw(output_dtype), "guidance_scale": 2.7}
    if options["guidance"] == "rescale":
        step["rescale"] = torch.rand(3, dtype=torch.float64)
    if options["noise"] in ("given", "both"):
        step["noise"] = draw()
    if options["noise"] in ("seed", "both"):
        step["seed"] = torch.tensor([2**62 + 12345, 2**32 - 2])  # the second word of the counter changes on the way
    if options["known"] != "no":
        step |= {"known": draw()[:1].expand(SHAPE), "mask": (torch.rand(3, 1, 5) > 0.5).expand(SHAPE)}
    if options["known"] == "noised":
        step["known_noise"] = draw()
    return step


def choices(kind, dtype):
    generator = random.Random(f"{kind} {dtype}")
    for _ in range(20):
        yield {name: generator.choice(values) for name, values in OPTIONS.items()}


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_has_the_bits_of_eager_torch(kind, dtype):
    for options in choices(kind, dtype):
        step = arguments(dtype, kind, True, options)
        for ours, eager in zip(on("triton", "ddim_step", **step), on("reference", "ddim_step", **step), strict=True):
            assert torch.equal(bits(ours), bits(eager)), options


def magnitudes(step):
    """Sums of the magnitudes of what is added up, for both results."""
    from protofast._ops.ddim import columns

    signal, spread, p, q, sigma, keep = map(exact, columns(step["table"], step.get("row"), 3))
    x, m = abs(exact(step["sample"])), abs(exact(step["model_output"]))
    if "cond_output" in step:
        m = m + step["guidance_scale"] * (m + abs(exact(step["cond_output"])))
    if "rescale" in step:
        m = m * exact(step["rescale"])[:, None, None]
    kind = step["prediction_type"]
    x0 = [(x + spread * m) / signal, m, signal * x + spread * m][kind]
    e = [m, (x + signal * m) / spread, signal * m + spread * x][kind]
    if "clip_min" in step or "clip_max" in step:
        x0 = np.maximum(x0, 0.9)
    if "threshold" in step:
        x0 = np.maximum(x0 / exact(step["threshold"])[:, None, None], 1)
    if step["clipped_direction"]:
        e = (x + signal * x0) / spread
    prev = p * x0 + q * e
    if "noise" in step:
        prev = prev + sigma * abs(exact(step["noise"]))
    if "known" in step:
        kept = abs(exact(step["known"]))
        if "known_noise" in step:
            kept = p * kept + keep * abs(exact(step["known_noise"]))
        prev = np.where(step["mask"].numpy(), prev, kept)
    return prev, x0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_is_near_the_direct_form(kind, dtype):
    for options in choices(kind, dtype):
        step = arguments(dtype, kind, False, options)
        step["sample"] = step["sample"].nan_to_num(0, 0)
        found = on("triton", "ddim_step", **step)
        if options["noise"] == "seed":
            step["noise"] = on("reference", "philox_normal", step["sample"], step.pop("seed"))
        wide = {key: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for key, t in step.items()}
        expected = on("reference", "ddim_step", **wide)
        for actual, value, terms in zip(found, expected, magnitudes(step), strict=True):
            # The longest path: scale, v − u, times, plus, factor, times, b, times, plus, s, over s, w, times, plus,
            # plus; and as many again for the float64 of the reference.
            roundings = 30 if dtype == torch.float64 else 15
            assert_within(actual, exact(value), terms, roundings)


def test_sample_prediction_is_the_predicted_image_itself():
    x, m = torch.full(SHAPE, torch.inf), torch.randn(SHAPE)
    table = on("reference", "ddim_coefficients", ALPHAS, torch.tensor(5), torch.tensor(4), 0.0)
    assert torch.equal(on("triton", "ddim_step", x, m, table, None, KINDS.index("sample"))[1], m)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_coefficients_round_every_operation(eta):
    """In numpy, whose square root is correctly rounded; torch's is not everywhere."""
    t, s = torch.randint(-1, 10, (2, 300))
    t[:4], s[2:6] = torch.tensor([-2, 10, 2**62, -(2**63)]), torch.tensor([-(2**63), 2**62, 10, -2])
    alphas = torch.rand(11, dtype=torch.float64).sort(descending=True).values
    alphas[0], alphas[-1] = 1, 0

    def expected(t, s):
        known = np.append(alphas.numpy(), np.nan)
        now, prev = (known[np.where((step >= -1) & (step < 10), step + 1, -1)] for step in (t.numpy(), s.numpy()))
        with np.errstate(all="ignore"):
            added = (prev - now) / (prev * (1 - now))
            kept = now * (1 - prev) / (prev * (1 - now))
            rest = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * np.where(kept > 1, 1, kept))
            sigma = eta * np.sqrt((1 - prev) * np.where(added < 0, 0, added))
            if eta == 0:
                rest, sigma = 1 - prev, np.zeros_like(now)
            values = np.sqrt(now), np.sqrt(1 - now), np.sqrt(prev), np.sqrt(rest), sigma, np.sqrt(1 - prev)
        return torch.from_numpy(np.stack(np.broadcast_arrays(*values), -1))

    for now, prev in ((t, s), (t[:0], s[:0]), (t[::7], s[::7]), (t[9], s), (t, s[9]), (t[9], s[9]), (t[9], s[:0])):
        found = on("triton", "ddim_coefficients", alphas, now, prev, eta)
        wanted = expected(*torch.broadcast_tensors(now.reshape(-1), prev.reshape(-1)))
        assert torch.equal(bits(found), bits(wanted))


def test_counters_have_64_bits():
    """Blocks and samples beyond 2³², which no tensor here could hold."""
    global tl, normal  # where a kernel looks for names
    import triton
    import triton.language as tl

    from protofast.backends.reference.philox import box_muller, philox
    from protofast.backends.triton.philox import normal

    @triton.jit
    def kernel(out, seed, sample, block):
        row, col = tl.arange(0, 4), tl.arange(0, 16)
        sample, block = tl.cast(sample, tl.int64), tl.cast(block, tl.int64)
        z = normal(seed, (sample + row)[:, None], (block + tl.arange(0, 4))[None, :])
        tl.store(out + (row * 16)[:, None] + col[None, :], z)

    def words(values):  # low, high
        return tuple(torch.tensor([[v >> shift & 0xFFFFFFFF for v in row] for row in values]) for shift in (0, 32))

    for key, offset, sample, block in (
        (2**63 - 1, 0, 0, 2**32 - 2),
        (2**32, 2**32 - 2, 0, 0),
        (5, 2**62, 2**40, 2**61 - 4),
        (-7, -2, 0, 2**31 - 2),
    ):
        out, seed = torch.empty(4, 16, device=DEVICE), torch.tensor([key, offset], device=DEVICE)
        kernel[(1,)](out, seed, sample, block, enable_fp_fusion=False)
        counter = [[block + i for i in range(4)]] * 4, [[offset + sample + n] * 4 for n in range(4)]
        drawn = philox((*words(counter[0]), *words(counter[1])), words([[key]]))
        expected = torch.stack([*box_muller(*drawn[:2]), *box_muller(*drawn[2:])], -1).flatten(1)
        assert torch.equal(bits(out.cpu()), bits(expected))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3), (5, 1), (7,), (2, 2061), (300, 3)], ids=str)
def test_noise_is_the_same_in_every_layout(shape):
    values = torch.randn(shape)
    seed = torch.tensor([3, 4, 5])[::2]
    table = on("reference", "ddim_coefficients", ALPHAS, torch.tensor(5), torch.tensor(4), 0.7)
    noise = on("reference", "philox_normal", values, seed)
    expected = on("reference", "ddim_step", values, values, table, bitwise=True, noise=noise)
    for name, x in layouts(values):
        x = x.to(DEVICE)
        drawn = kernel_of("philox_normal")(x, seed.to(DEVICE))
        assert drawn.stride() == torch.empty_like(x).stride()
        assert torch.equal(drawn.cpu(), noise), name
        for ours, eager in zip(
            on("triton", "ddim_step", x, values, table, bitwise=True, seed=seed), expected, strict=True
        ):
            assert torch.equal(bits(ours.contiguous()), bits(eager)), name


def test_inputs_and_outputs_in_every_layout():
    x, m = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    table = on("reference", "ddim_coefficients", ALPHAS, torch.tensor(5), torch.tensor(4), 0.0).to(DEVICE)
    prev, x0 = kernel_of("ddim_step")(x, m, table)
    samples, outputs, prev_outs, x0_outs = (dict(layouts(values)) for values in (x, m, x, x))
    for first, second, third in itertools.product(samples, outputs, x0_outs):
        if second not in (first, third):
            continue
        prev_out, x0_out = prev_outs[first].fill_(torch.nan), x0_outs[third].fill_(torch.nan)
        written = {"prev_sample": prev_out, "pred_original_sample": x0_out}
        kernel_of("ddim_step_out")(samples[first], outputs[second], table, **written)
        assert torch.equal(prev_out, prev), (first, second, third)
        assert torch.equal(x0_out, x0), (first, second, third)


def test_an_output_may_be_any_input():
    x, m, cond, z, known, more, mask = torch.randn(7, 64, 64, device=DEVICE)  # several tiles
    table = on("reference", "ddim_coefficients", ALPHAS, torch.tensor(5), torch.tensor(4), 0.7).to(DEVICE)
    inputs = {"sample": x, "model_output": m, "cond_output": cond, "noise": z, "known": known, "known_noise": more}
    rest = {"table": table, "guidance_scale": 2.0, "mask": mask > 0}
    prev, x0 = kernel_of("ddim_step")(**inputs, **rest)
    step = kernel_of("ddim_step_out")

    def same(buffer):
        return buffer[:64], buffer[:64]

    def transposed(buffer):
        return buffer[:64], buffer[:64].T

    def next_row(buffer):
        return buffer[:64], buffer[1:]

    for (name, values), overlap in itertools.product(inputs.items(), (same, transposed, next_row)):
        for second in (False, True):
            given, written = overlap(torch.zeros(65, 64, device=DEVICE))
            given.copy_(values)
            out = (torch.empty_like(x), written) if second else (written, None)
            step(**{**inputs, name: given}, **rest, prev_sample=out[0], pred_original_sample=out[1])
            assert torch.equal(out[0], prev), (name, overlap)
            assert out[1] is None or torch.equal(out[1], x0), (name, overlap)


# Where it runs.


def runs_where():
    from protofast._backend import why_not

    ops = "ddim_step", "ddim_step_out", "ddim_coefficients", "philox_normal"
    return [[why_not(op, device, "triton") for op in ops] for device in ("cpu", "cuda")]


def test_runs_on_the_cpu_only_when_interpreted():
    cpu, cuda = run_fresh(runs_where, TRITON_INTERPRET=None)
    assert cpu[0].startswith("backend 'triton' runs ddim_step on cuda only, not on cpu; use backend=")
    assert all(cpu)
    assert cuda == [None] * 4
    assert run_fresh(runs_where, TRITON_INTERPRET="1") == [[None] * 4] * 2


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
