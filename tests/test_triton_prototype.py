"""The Triton prototype kernels: what they compile to on GPUs that are not here, and what they compute.

Nothing of protofast is imported up here, as in test_triton_ddim.py.
"""

import importlib.util
import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers.aot import ARCHITECTURES, assert_no_spills, assert_wide_addresses, builds
from helpers.errors import EXACT, assert_within, exact
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings(
        "ignore:invalid value", "ignore:overflow", "ignore:divide by zero", "ignore:All-NaN"
    ),  # the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SQEUCLIDEAN, EUCLIDEAN, COSINE, DOT = METRICS = range(4)
NONE, LOG, LINEAR, EXP, RECIPROCAL = range(5)
AUTO, IEEE, TF32X3, TF32, BF16 = range(5)
HOST = "reference"


def call(backend, op, *args):
    """The op's results on the CPU, computed by Triton on the GPU if there is one."""
    device = DEVICE if backend == "triton" else "cpu"
    moved = [a.to(device) if isinstance(a, torch.Tensor) and a.device.type != device else a for a in args]
    results = getattr(getattr(torch.ops.protofast, op), backend)(*moved)
    return results.cpu() if isinstance(results, torch.Tensor) else tuple(result.cpu() for result in results)


@pytest.fixture(autouse=True)
def _ops():
    import protofast  # noqa: F401


def search(
    backend, x, p, mask=None, metric=SQEUCLIDEAN, activation=LOG, eps=1e-4, topk=1, precision=AUTO, verify=False
):
    return call(backend, "prototype_activation", x, p, mask, metric, activation, eps, topk, precision, verify)


def dense(x, p, metric):
    """Distances (B, P, N) in float64, of the inputs as they are."""
    return call(HOST, "prototype_map", x.double(), p.double(), metric).flatten(2)


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


# What it compiles to.


def searches():
    """Each way to multiply, on a plain search; and with masks, kernels, lists and verification."""
    from protofast.backends.triton.prototype import prototype_activation

    kinds = [(torch.bfloat16, AUTO), *((torch.float32, precision) for precision in range(1, 5)), (torch.float64, AUTO)]
    for dtype, precision in kinds:
        x, p = torch.zeros(8, 128, 10, 10, dtype=dtype), torch.zeros(512, 128, dtype=dtype)
        prototype_activation(x, p, None, SQEUCLIDEAN, LOG, 1e-4, 1, precision, False)
    mask = torch.ones(8, 9, 9, dtype=torch.bool)
    x, p = torch.zeros(8, 128, 10, 10, dtype=torch.bfloat16), torch.zeros(20, 128, 2, 2, dtype=torch.bfloat16)
    prototype_activation(x, p, mask, COSINE, EXP, 1e-4, 3, AUTO, True)
    x, p = x.to(memory_format=torch.channels_last), torch.zeros(512, 128, dtype=torch.bfloat16)
    prototype_activation(x, p, None, DOT, NONE, 1.0, 10, AUTO, False)


# Bytes that ptxas saves around the calls of its float64 division and logarithm, which most programs never make.
SAVED = 160


def test_searches_compile_without_spills_and_use_tensor_cores():
    found = builds(searches)
    assert len(found) == 2 * 8 * len(ARCHITECTURES)
    for number, build in enumerate(found):
        assert_wide_addresses(build)
        number = number // 2 % 8
        limit = SAVED if build.kernel == "refine_kernel" else 32 if number > 3 else 0
        assert build.spills <= limit, (build.kernel, build.architecture, number, build.spills)
        assert build.shared <= 64 << 10
        if build.kernel == "screen_kernel":
            product = re.search(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", build.ptx)
            on_tensor_cores = number not in (1, 5)  # ieee and float64
            assert bool(product) == on_tensor_cores, (number, build.architecture)
            assert not product or product[1].startswith({90: "wgmma", 100: "tcgen05"}.get(build.architecture, "mma"))


def gradients_and_maps():
    from protofast.backends.triton.prototype import prototype_backward, prototype_map

    for dtype, kernel, metric in ((torch.float32, (), SQEUCLIDEAN), (torch.bfloat16, (2, 2), COSINE)):
        x, p = torch.zeros(8, 128, 10, 10, dtype=dtype), torch.zeros(64, 128, *kernel, dtype=dtype)
        index = torch.zeros(8, 64, dtype=torch.int64)
        distance = torch.zeros(8, 64)
        prototype_map(x, p, metric)
        prototype_backward(distance, distance, x, p, distance, index, metric, LOG, 1e-4, 1, True, True)


def test_gradients_and_maps_compile_without_spills():
    found = builds(gradients_and_maps)
    assert len(found) == 7 * len(ARCHITECTURES)
    for build in found:
        assert_wide_addresses(build)
        assert_no_spills(build)
        assert "atom" not in build.ptx
        assert "red.global" not in build.ptx


# Searches.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", [SQEUCLIDEAN, EUCLIDEAN, DOT])
def test_lattices_are_exact_and_ties_go_to_the_lowest_index(metric, dtype):
    for kernel, topk, masked in (((), 1, False), ((2, 2), 3, True), ((1, 3), 4, False)):
        x, p = integers(2, 3, 4, 6).to(dtype), integers(3, 3, *kernel).to(dtype)
        grid = [4 - (kernel or (1, 1))[0] + 1, 6 - (kernel or (1, 1))[1] + 1]
        mask = torch.rand(2, *grid) > 0.3 if masked else None
        inputs = (x, p, mask, metric, LINEAR, 1e-4, topk)
        ours, expected = search("triton", *inputs), search(HOST, *inputs)
        assert torch.equal(ours[2], expected[2])
        # Sums of integers are exact, the root is not.
        assert_within(ours[1], exact(expected[1]), exact(expected[1].abs()), 2 * (metric == EUCLIDEAN))
        assert torch.equal(ours[0], -ours[1])


UNIT = {TF32X3: 2.0**-21, TF32: 2.0**-11, BF16: 2.0**-8}


def check_search(x, p, metric, topk, precision, found, mask=None):
    """The distances are those of the patches, in order, and no patch left out is nearer by more than the bound."""
    _, distance, index = (t if topk > 1 or t.numel() == 0 else t[..., None] for t in found)
    terms = x.shape[1] * math.prod(p.shape[2:])
    far = dense(x, p, metric)
    if mask is not None:
        far = far.masked_fill(~mask.flatten(1)[:, None], math.inf)
    assert (index >= 0).all()
    assert all(len(set(row.tolist())) == topk for row in index.flatten(0, 1))
    reached = far.gather(2, index)
    # The reference's cosine is 1 − cos: rounded at 1.
    size = torch.ones_like(reached) if metric == COSINE else reached
    if metric == DOT:
        size = call(HOST, "prototype_map", x.double().abs(), p.double().abs(), metric).flatten(2).abs().gather(2, index)
    assert_within(distance, exact(reached), exact(size), 4 * terms + 16, arithmetic=torch.float64)
    assert (distance.diff() >= 0).all()
    u = UNIT.get(precision, 0.0) if x.dtype == torch.float32 else 0.0
    step = 2.0**-51 if x.dtype == torch.float64 else 2.0**-22
    gamma = 1.25 * (2 * u + u * u + (terms + 8) * step)
    length_p = p.double().flatten(1).norm(dim=1)[:, None]
    length_x = far.new_tensor([call(HOST, "prototype_map", x.double(), 0 * p[:1].double(), EUCLIDEAN).max()])
    bound = 2 * gamma * length_x * length_p
    if metric in (SQEUCLIDEAN, EUCLIDEAN):
        bound = 2 * bound + 2 * gamma * length_x.square()
    if metric == COSINE:
        bound = 2 * 1.25 * (4 * u + (2 * terms + 16) * step)
    power = 2 if metric == EUCLIDEAN else 1
    best = far.sort(2).values[..., :topk].pow(power)
    regret = reached.sort(2).values.pow(power) - best
    assert (regret <= torch.as_tensor(bound) + 1e-13).all()  # (B, P, topk) against (P, 1)


@pytest.mark.parametrize("metric", METRICS)
def test_regret_is_within_the_bound(metric):
    ways = [(dtype, AUTO) for dtype in DTYPES] + [(torch.float32, way) for way in (TF32X3, TF32, BF16)]
    for (dtype, precision), (topk, kernel) in zip(ways, itertools.cycle(((1, ()), (3, (2, 1))))):
        x, p = torch.randn(2, 40, 3, 24).to(dtype), torch.randn(3, 40, *kernel).to(dtype)
        mask = torch.rand(2, 3 if not kernel else 2, 24) > 0.2
        found = search("triton", x, p, mask, metric, NONE, 1.0, topk, precision)
        check_search(x, p, metric, topk, precision, found, mask)


@pytest.mark.parametrize("metric", METRICS)
def test_verified_winners_are_the_true_ones(metric):
    base = torch.rand(16) + 0.5
    # Nearer and nearer by less than bfloat16 tells, in each metric.
    x = (base[:, None] + torch.rand(16, 1) * torch.linspace(-1e-3, 0, 6))[None]
    p = base + 1e-4 * torch.randn(3, 16)
    wrong = 0
    for topk in (1, 2):
        for features, prototypes in ((x, p), (torch.randn(2, 16, 20), torch.randn(3, 16))):
            inputs = (features, prototypes, None, metric, LOG, 1e-4, topk, BF16)
            expected = search(HOST, *inputs)
            verified = search("triton", *inputs, True)
            assert torch.equal(verified[2], expected[2])
            assert_within(verified[1], exact(expected[1]), exact(abs(expected[1]) + (metric in (COSINE, DOT))), 2)
            wrong += int((search("triton", *inputs)[2] != expected[2]).sum())
    assert wrong, "bfloat16 was right everywhere, so this shows nothing"


def test_verification_of_float64_and_of_ties():
    for dtype, values in itertools.product((torch.float64, torch.bfloat16), (torch.randn, integers)):
        x, p = values(2, 3, 20).to(dtype), values(3, 3).to(dtype)
        for topk in (1, 3):
            inputs = (x, p, torch.rand(2, 20) > 0.3, EUCLIDEAN, NONE, 1.0, topk, AUTO, True)
            assert torch.equal(search("triton", *inputs)[2], search(HOST, *inputs)[2])


@pytest.mark.parametrize("topk", [1, 5])
def test_splits_of_the_patches_agree(topk, monkeypatch):
    from protofast.backends.triton import prototype

    for values in (integers, torch.randn):
        x, p = values(1, 2, 13, 25), values(3, 2)
        x[:, :, 3:9] = x[:, :, :1]  # ties across tiles
        found = []
        for programs in (1, 3, 100):
            monkeypatch.setattr(prototype, "_programs", lambda device, programs=programs: programs)
            found.append(search("triton", x, p, topk=topk))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        assert torch.equal(found[0][2], search(HOST, x, p, topk=topk)[2])


def unusual(kind, dtype):
    x, p = torch.randn(2, 3, 5).to(dtype), torch.randn(3, 3).to(dtype)
    if kind == "nan":
        x[0, 1, 2] = x[0, 0, 4] = math.nan
        p[1, 1] = math.nan
    elif kind == "inf":
        x[1, 1, 3], x[0, 2, 2], p[1, 1] = math.inf, -math.inf, math.inf
    elif kind == "huge":
        x, p = x * 1e25, p * 1e25
    else:
        x, p[2] = x * 1e-30, p[2] * 1e-30
        x[:, :, 3], p[0] = 0, 0
    return x, p


@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "tiny"])
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite_or_out_of_range_is_as_in_the_reference(metric, kind):
    for dtype, topk in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float64, 2)):
        x, p = unusual(kind, dtype)
        # Squares of tiny numbers are lost in a float32 search; verification finds that they tell nothing.
        verify = kind == "tiny" and metric != COSINE
        ours, expected = (
            search(backend, x, p, None, metric, LINEAR, 1e-4, topk, AUTO, verify) for backend in ("triton", HOST)
        )
        assert torch.equal(ours[2], expected[2])
        for a, b in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-15 if metric == COSINE else 0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_masks(metric):
    """Nothing allowed, less than asked for, and only what is far or NaN."""
    x, p = torch.randn(3, 2, 3, 3), torch.randn(4, 2)
    x[1, 0, 0, 1] = math.nan
    x[2, 1, 2] = math.inf
    mask = torch.zeros(3, 3, 3, dtype=torch.bool)
    mask[1, 2, 2] = mask[1, 0, 0] = True
    mask[2, 2, 1:] = True
    for topk, activation in ((1, LINEAR), (3, LOG), (2, EXP), (1, RECIPROCAL)):
        inputs = (x, p, mask, metric, activation, 1e-4, topk)
        ours, expected = search("triton", *inputs), search(HOST, *inputs)
        assert torch.equal(ours[2], expected[2])
        for a, b in zip(ours[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ((7,), (3,)),
        ((2, 3, 4), ()),
        ((3, 3, 4), (2, 1, 2)),
        ((2, 2, 3, 2), ()),
        ((2, 2, 3, 2), (2, 1, 2, 2)),
        ((2, 2, 2, 3), (1, 1, 1, 2)),
        ((1, 1), (1, 1)),
    ],
    ids=str,
)
def test_any_number_of_axes_in_any_order(sizes, kernel):
    """Four axes that lie in no order, too: a copy, or the reference."""
    p = integers(4, 2, *kernel)
    for x in (integers(2, 2, *sizes), integers(*reversed(sizes), 2, 2).permute(*reversed(range(len(sizes) + 2)))):
        for metric in (SQEUCLIDEAN, DOT):
            assert torch.equal(call("triton", "prototype_map", x, p, metric), call(HOST, "prototype_map", x, p, metric))
        inputs = (x, p, None, EUCLIDEAN, LOG, 1e-3, 1)
        ours, expected = search("triton", *inputs), search(HOST, *inputs)
        assert torch.equal(ours[2], expected[2])
        assert torch.equal(ours[1], expected[1])
        grad = integers(2, 4)
        gradient = (None, grad, x, p, ours[1], ours[2], SQEUCLIDEAN, NONE, 1.0, 1, True, True)
        for a, b in zip(*(call(backend, "prototype_backward", *gradient) for backend in ("triton", HOST)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", [(), (2, 1)], ids=str)
def test_reads_every_layout(kernel):
    x, p = torch.randn(2, 3, 3, 4), torch.randn(2, 3, *kernel)
    expected = search("triton", x, p, topk=2)
    whole = call("triton", "prototype_map", x, p, COSINE)
    gradient = (expected[0], None, x, p, expected[1], expected[2], EUCLIDEAN, LOG, 1e-4, 2, True, True)
    grads = call("triton", "prototype_backward", *gradient)
    for (name, view), (_, p_view) in zip(layouts(x), itertools.cycle(layouts(p))):
        view = view.to(DEVICE) if DEVICE != "cpu" else view
        assert all(map(torch.equal, search("triton", view, p_view, topk=2), expected)), name
        assert torch.equal(call("triton", "prototype_map", view, p_view, COSINE), whole), name
        again = call("triton", "prototype_backward", *gradient[:2], view, p_view, *gradient[4:])
        assert all(map(torch.equal, again, grads)), name
    once = search("triton", expanded(x), p)
    assert all(torch.equal(a, a[:1].expand_as(a)) for a in once)


def test_samples_may_lie_far_apart():
    x = far_apart(2, 24).unflatten(1, (3, 8))
    x.copy_(integers(2, 3, 8))
    p = integers(4, 3).half()
    assert torch.equal(search("triton", x, p)[2], search(HOST, x, p)[2])


def test_more_than_it_ranks_goes_to_the_reference():
    x, p = torch.randn(1, 2, 40), torch.randn(2, 2)
    assert all(map(torch.equal, search("triton", x, p, topk=33), search(HOST, x, p, topk=33)))


def test_empty():
    for batch, count, channels in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        x, p = torch.randn(batch, channels, 4), torch.randn(count, channels)
        for metric in METRICS:
            ours, expected = search("triton", x, p, metric=metric), search(HOST, x, p, metric=metric)
            assert all(map(torch.equal, ours, expected))
            assert torch.equal(call("triton", "prototype_map", x, p, metric), call(HOST, "prototype_map", x, p, metric))
            gradient = (ours[0], ours[1], x, p, ours[1], ours[2], metric, LOG, 1e-4, 1, True, True)
            for a, b in zip(*(call(way, "prototype_backward", *gradient) for way in ("triton", HOST)), strict=True):
                assert torch.equal(a, b)


# Activations, maps.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_exact_to_rounding(dtype):
    d = torch.tensor([0, 1e-20, 1e-8, 1e-4, 0.3, 1, 50, 1e6, 1e12, 1e30], dtype=torch.float64)
    x = -d.to(dtype).reshape(-1, 1, 1)
    eps = 1e-3
    formulas = {
        LOG: lambda d: np.log1p((1 - EXACT(eps)) / (d + EXACT(eps))),
        LINEAR: lambda d: -d,
        EXP: lambda d: np.exp(-d),
        RECIPROCAL: lambda d: 1 / (d + 1),
    }
    for activation, formula in formulas.items():
        a, distance, _ = search("triton", x, torch.ones(1, 1, dtype=dtype), None, DOT, activation, eps)
        assert torch.equal(distance, -x[..., 0])
        wanted = formula(exact(distance))
        # exp turns the rounding of its argument into one of its result
        assert_within(
            a, wanted, wanted * (1 + (exact(distance) if activation == EXP else 0)), 8, arithmetic=torch.float64
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_maps_are_in_the_direct_form(metric, dtype):
    x, p = torch.randn(2, 36, 3, 4).to(dtype), torch.randn(3, 36, 2, 1).to(dtype)
    p[0] = x[0, :, :2, :1]
    ours, expected = call("triton", "prototype_map", x, p, metric).flatten(2), dense(x, p, metric)
    terms = exact(expected)
    if metric == DOT:
        terms = abs(exact(dense(x.abs(), p.abs(), metric)))
    if metric == COSINE:
        terms = terms + 36 * 2 * 2.0**-29  # the reference's 1 − cos, in float64
    # 32 channels in a row, then 2 pixels of 2 such
    assert_within(ours, exact(expected), terms, 80 if dtype == torch.float64 else 32 + 4 + 4)
    if metric != DOT:
        assert ours[0, 0, 0] == 0


@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "tiny"])
def test_maps_out_of_range(kind):
    for metric, dtype in itertools.product(METRICS, (torch.float32, torch.bfloat16)):
        x, p = unusual(kind, dtype)
        ours, expected = (call(backend, "prototype_map", x, p, metric) for backend in ("triton", HOST))
        scale = float(expected.abs().nan_to_num(0, 0, 0).max())
        torch.testing.assert_close(
            ours, expected, rtol=1e-6, atol=1e-6 * scale if metric == DOT else 1e-15, equal_nan=True
        )


# Gradients.


def gradients(gain, size, x, p, distance, index, metric):
    """Sums over winners, one by one, and the sums of their magnitudes: of x, of p. `size` bounds what made `gain`."""
    x, p, distance = exact(x), exact(p), exact(distance)
    kernel = p.shape[2:] or (1,) * (x.ndim - 2)
    grid = [s - k + 1 for s, k in zip(x.shape[2:], kernel, strict=True)]
    p = p.reshape(*p.shape[:2], *kernel)
    to_x, to_p, size_x, size_p = np.zeros_like(x), np.zeros_like(p), np.zeros_like(x), np.zeros_like(p)
    for b, q, r in np.ndindex(index.shape):
        n = int(index[b, q, r])
        if n < 0:
            continue
        at = (b, slice(None), *(slice(i, i + k) for i, k in zip(np.unravel_index(n, grid), kernel, strict=True)))
        g, most, d, patch, proto = gain[b, q, r], size[b, q, r], distance[b, q, r], x[at], p[q]
        if metric == DOT:
            on_x, on_p = -g * proto, -g * patch
            much_x, much_p = most * abs(proto), most * abs(patch)
        elif metric == COSINE:
            lengths = np.sqrt((patch**2).sum()), np.sqrt((proto**2).sum())
            unit_x, unit_p = patch / lengths[0], proto / lengths[1]
            on_x, on_p = g / lengths[0] * ((1 - d) * unit_x - unit_p), g / lengths[1] * ((1 - d) * unit_p - unit_x)
            much = most * ((abs(1 - d) + 1) * (abs(unit_x) + abs(unit_p)))
            much_x, much_p = much / lengths[0], much / lengths[1]
        else:
            factor = 2 if metric == SQEUCLIDEAN else (1 / d if d else 0)
            on_x = g * factor * (patch - proto)
            on_p = -on_x
            much_x = much_p = most * factor * abs(patch - proto)
        to_x[at] += on_x
        to_p[q] += on_p
        size_x[at] += much_x
        size_p[q] += much_p
    return (to_x, size_x), (to_p, size_p)


SLOPES = {
    LOG: lambda d, eps: (eps - 1) / ((d + 1) * (d + eps)),
    LINEAR: lambda d, eps: -np.ones_like(d),
    EXP: lambda d, eps: -np.exp(-d),
    RECIPROCAL: lambda d, eps: -1 / (d + 1) ** 2,
}


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_sums_over_the_winners(metric):
    eps = 1e-2
    cases = (torch.float32, (), 1), (torch.float32, (2, 2), 3), (torch.float64, (2, 1), 2), (torch.bfloat16, (), 3)
    for number, (dtype, kernel, topk) in enumerate((*cases, (torch.float16, (), 1))):
        activation = LOG + (number + metric) % 4
        x, p = torch.randn(3, 5, 3, 4).to(dtype), torch.randn(4, 5, *kernel).to(dtype)
        p[0] = x[0, :, : kernel[0], : kernel[1]] if kernel else x[0, :, 1, 1]  # a distance of 0
        mask = torch.rand(3, *(s - k + 1 for s, k in zip((3, 4), kernel or (1, 1), strict=True))) > 0.2
        mask[1] = False
        _, distance, index = search(HOST, x, p, mask, metric, NONE, 1.0, topk)
        if metric == DOT:
            distance = distance.abs() + 1  # away from the poles of the slopes
        shape = (3, 4, topk)
        by_activation, by_distance = torch.randn_like(distance), torch.randn_like(distance)
        gain, size = 0, 0
        if number != 1:
            part = exact(by_activation).reshape(shape) * SLOPES[activation](exact(distance).reshape(shape), EXACT(eps))
            gain, size = gain + part, size + abs(part)
        if number != 3:
            part = exact(by_distance).reshape(shape)
            gain, size = gain + part, size + abs(part)
        oracle = gradients(gain, size, x, p, distance.reshape(shape), index.reshape(shape), metric)
        grads = (None if number == 1 else by_activation, None if number == 3 else by_distance.mT.contiguous().mT)
        inputs = (*grads, x, p, distance, index, metric, activation, eps, topk)
        found = call("triton", "prototype_backward", *inputs, True, True)
        for ours, (wanted, terms) in zip(found, oracle, strict=True):
            # 12 of a term (16 of the slope's exp), then as many as may meet in a pixel or a prototype
            roundings = 16 + 4 * topk * math.prod(kernel)
            assert_within(ours, wanted.reshape(ours.shape), terms.reshape(ours.shape), roundings)
        for wanted in ((False, True), (True, False)):
            one = call("triton", "prototype_backward", *inputs, *wanted)
            for ours, whole, is_wanted in zip(one, found, wanted, strict=True):
                assert torch.equal(ours, whole if is_wanted else ours.new_empty(0))  # and the same bits again


@pytest.mark.parametrize("metric", METRICS)
def test_a_nan_stays_in_its_pixel(metric):
    x, p = torch.randn(2, 3, 40), torch.randn(20, 3)
    x[0, 1, 7] = math.nan
    _, distance, index = search(HOST, x, p, None, metric)
    gradient = (torch.ones_like(distance), None, x, p, distance, index, metric, EXP, 1e-4, 1, True, True)
    ours, expected = (call(way, "prototype_backward", *gradient) for way in ("triton", HOST))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert ours[0][0, 1, 7].isnan()
    assert not ours[0][1].isnan().any()


def test_autograd_takes_the_kernels():
    """Of both results at once, twice differentiable, and by the public functions."""
    import protofast as pf

    x, p = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    grads = []
    for backend in ("triton", "reference"):
        leaves = x.clone().requires_grad_(), p.clone().requires_grad_()
        activation, distance, _ = pf.prototype_activation(*leaves, eps=0.1, backend=backend)
        loss = activation.square().sum() + distance.sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        create = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in create), leaves)
        grads.append((*first, *create, *second))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_opcheck():
    from torch.library import opcheck

    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    x, p = torch.randn(2, 3, 2, 3, device=DEVICE), torch.randn(3, 3, device=DEVICE)
    leaves = x.clone().requires_grad_(), p.clone().requires_grad_()
    ops = torch.ops.protofast
    for topk, activation in ((1, LOG), (2, NONE)):
        rest = (None, SQEUCLIDEAN, activation, 1e-4, topk, AUTO, False)
        opcheck(ops.prototype_activation.triton, (*leaves, *rest), test_utils=checks)
        _, distance, index = ops.prototype_activation.triton(x, p, *rest)
        opcheck(
            ops.prototype_backward.triton,
            (None, distance, x, p, distance, index, SQEUCLIDEAN, activation, 1e-4, topk, True, False),
            test_utils=checks,
        )
    opcheck(ops.prototype_map.triton, (*leaves, COSINE), test_utils=checks)


def test_every_result_is_written():
    x, p = torch.randn(2, 5, 5, 7), torch.randn(17, 5, 1, 2)
    mask = torch.rand(2, 5, 6) > 0.5
    plain = search("triton", x, p, mask, COSINE, topk=2)
    gradient = (plain[0], plain[1], x, p, plain[1], plain[2], COSINE, LOG, 1e-4, 2, True, True)
    expected = *plain, *call("triton", "prototype_backward", *gradient), call("triton", "prototype_map", x, p, COSINE)
    with poison():
        found = (
            *search("triton", x, p, mask, COSINE, topk=2),
            *call("triton", "prototype_backward", *gradient),
            call("triton", "prototype_map", x, p, COSINE),
        )
    assert all(map(torch.equal, found, expected))
