"""The CUDA prototype kernels, run on the CPU by tests/cuda_emulation, against the float64 reference."""

import ctypes
import itertools
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from helpers.emulation import HERE, ROOT, emulated, numbers, pointer, raise_if
from helpers.errors import assert_within, exact, unit
from torch import Tensor

import protofast as pf
from protofast._ops.prototype import ACTIVATIONS, METRICS, PRECISIONS, kernel_size, patch_grid, result_dtype
from protofast._ops.prototype import patch_mask as reduce_mask

SOURCES = [*sorted((ROOT / "csrc/cuda").glob("prototype_*.cu")), HERE / "driver.cpp"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # numbered as in csrc/dtype.h
SEARCHES = [
    *((torch.float32, precision) for precision in ("ieee", "tf32x3", "tf32", "bf16")),
    (torch.float64, "auto"),
    *((torch.bfloat16, precision) for precision in ("auto", "ieee")),
    *((torch.float16, precision) for precision in ("auto", "ieee", "bf16")),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> ctypes.CDLL:
    return emulated(SOURCES, ("search", "gradient", "map"), tmp_path_factory.mktemp("emulation"))


# --- calls ------------------------------------------------------------------------------------------------------


def layout(features: Tensor, prototypes: Tensor, topk: int, merge: bool = True):
    """Shape and strides as prototype_op.cpp gives them: merged axes, unused ones first."""
    axes = []
    for size, kernel, stride in zip(
        features.shape[2:], kernel_size(features, prototypes), features.stride()[2:], strict=True
    ):
        if merge and axes and kernel == 1 and axes[-1][1] == 1 and axes[-1][2] == stride * size:
            axes[-1] = (axes[-1][0] * size, 1, stride)
        else:
            axes.append((size, kernel, stride))
    axes = [(1, 1, 0)] * (4 - len(axes)) + axes
    sizes, kernels, strides = zip(*axes, strict=True)
    shape = [features.shape[0], features.shape[1], prototypes.shape[0], topk, *sizes, *kernels]
    return numbers(shape), numbers([*features.stride()[:2], *strides])


@dataclass
class Found:
    activation: Tensor
    distance: Tensor
    index: Tensor


def search(
    library, features, prototypes, *, metric="sqeuclidean", activation="log", eps=1e-4, topk=1, mask=None,
    precision="auto", verify=False, processors=4, descending=False, merge=True,
) -> Found:  # fmt: skip
    library.emulate(processors, descending)
    shape, stride = layout(features, prototypes, topk, merge)
    out = (features.shape[0], prototypes.shape[0], topk)
    distance = features.new_full(out, 77, dtype=result_dtype(features))
    activated, index = distance.clone(), features.new_full(out, 77, dtype=torch.int64)
    if mask is not None:
        mask = reduce_mask(mask, patch_grid(features, prototypes), kernel_size(features, prototypes))
    raise_if(
        library.search(
            shape, pointer(features), stride, pointer(prototypes), pointer(mask), ctypes.c_int64(METRICS.index(metric)),
            ctypes.c_int64(ACTIVATIONS.index(activation)), ctypes.c_double(eps),
            ctypes.c_int64(PRECISIONS.index(precision)), verify, pointer(activated), pointer(distance), pointer(index),
            DTYPES.index(features.dtype),
        )
    )  # fmt: skip
    return Found(activated, distance, index)


def gradient(
    library, features, prototypes, distance, index, grads, *, metric, activation, topk, to_features=None,
    to_prototypes=True, descending=False,
):  # fmt: skip
    """Both gradients; the first is written to `to_features`, whatever its strides."""
    library.emulate(4, descending)
    to_p = torch.full_like(prototypes, 77) if to_prototypes else None
    shape, stride = layout(features, prototypes, topk, merge=False)
    to_stride = stride if to_features is None else layout(to_features, prototypes, topk, merge=False)[1]
    raise_if(
        library.gradient(
            shape, pointer(features), stride, pointer(prototypes), pointer(grads[0]), pointer(grads[1]),
            pointer(distance), pointer(index), ctypes.c_int64(METRICS.index(metric)),
            ctypes.c_int64(ACTIVATIONS.index(activation)), ctypes.c_double(1e-4), pointer(to_features), to_stride,
            pointer(to_p), DTYPES.index(features.dtype),
        )
    )  # fmt: skip
    return to_features, to_p


def dense(library, features, prototypes, metric) -> Tensor:
    library.emulate(4, False)
    shape, stride = layout(features, prototypes, 1)
    out = features.new_full(
        (features.shape[0], prototypes.shape[0], *patch_grid(features, prototypes)), 77, dtype=result_dtype(features)
    )
    raise_if(
        library.map(
            shape, pointer(features), stride, pointer(prototypes), ctypes.c_int64(METRICS.index(metric)), pointer(out),
            DTYPES.index(features.dtype),
        )
    )  # fmt: skip
    return out


def reference_map(features, prototypes, metric) -> Tensor:
    return pf.prototype_map(features.double(), prototypes.double(), metric=metric, backend="reference").flatten(2)


def reference(features, prototypes, metric, topk=1, mask=None):
    found = pf.prototype_distance(
        features.double(), prototypes.double(), metric=metric, topk=topk, mask=mask, backend="reference"
    )
    shape = (features.shape[0], prototypes.shape[0], topk)
    return found.distance.reshape(shape), found.index.reshape(shape)


def arrangements(batch, channels, sizes):
    """Feature maps of that shape in every arrangement of memory, filled with nothing yet."""
    shape = (batch, channels, *sizes)
    yield torch.empty(shape)
    yield torch.empty(batch, *sizes, channels).movedim(-1, 1)
    yield torch.empty(batch, channels + 3, *(s + 1 for s in sizes))[
        (slice(None), slice(1, channels + 1), *(slice(0, s) for s in sizes))
    ]
    yield torch.empty(channels, *sizes, batch).movedim(-1, 0)


def filled(like: Tensor, values, dtype) -> Tensor:
    out = like.to(dtype)
    return out.copy_(values(*like.shape).to(dtype)) if out.numel() else out


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


GRIDS = [  # samples, channels, sizes, kernel, prototypes: small grids share a tile, large ones are cut and split
    (5, 16, (7, 7), (), 3),
    (3, 33, (8, 8), (), 65),
    (2, 7, (11, 13), (), 5),
    (2, 24, (300,), (), 4),
    (1, 5, (4, 5, 6), (2, 1, 3), 3),
    (2, 3, (12, 14), (2, 3), 7),
]


# --- the search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), SEARCHES, ids=str)
def test_exact_values_give_exact_winners_in_every_arithmetic(emulation, dtype, precision):
    """Sums of small integers are exact, so winners, ties and order must be those of the reference."""
    ways = itertools.cycle(range(12))  # every grid has other combinations, all grids together have them all
    for (batch, channels, sizes, kernel, count), metric in itertools.product(GRIDS, ("sqeuclidean", "dot")):
        for like in itertools.islice(arrangements(batch, channels, sizes), next(ways) % 2, None, 2):
            way = next(ways)
            x, p = filled(like, integers, dtype), integers(count, channels, *kernel).to(dtype)
            mask = torch.rand(batch, *sizes) > 0.1 if way % 2 else None
            topk, verify = (1, 1, 3)[way % 3], way % 4 == 3
            options = {"metric": metric, "topk": topk, "mask": mask, "precision": precision, "verify": verify}
            found = search(emulation, x, p, **options, processors=1 + 3 * (way % 2), merge=way % 5 != 0)
            distance, index = reference(x, p, metric, topk, mask)
            assert torch.equal(found.index, index), (sizes, metric, topk, like.stride())
            assert torch.equal(found.distance, distance.to(found.distance.dtype))


def spread(dtype: torch.dtype, precision: str, x: Tensor, p: Tensor, metric: str) -> Tensor:
    """By how much a distance of the search may be off, (B, P): the bound in csrc/cuda/prototype_search.cu, in terms of
    the largest patch."""
    own = {torch.float32: "ieee", torch.float64: "double", torch.bfloat16: "native", torch.float16: "native"}[dtype]
    name = own if precision == "auto" else precision
    depth = p[0].numel() + 16
    relative = {"double": 2.0**-53, "ieee": 2.0**-24}.get(name, 2.0**-22) * depth
    relative += {"tf32x3": 3 * 2.0**-22, "tf32": 2.01 * 2.0**-11, "bf16": 2.01 * 2.0**-8}.get(name, 0)
    window = p.double().flatten(1).norm(dim=1)
    patch = x.double().flatten(2).norm(dim=1).amax(1) * math.sqrt(max(1, math.prod(p.shape[2:])))
    if metric == "cosine":
        return 4 * relative * torch.ones(x.shape[0], p.shape[0])
    scale = patch[:, None] * window + (0 if metric == "dot" else patch[:, None] ** 2 / 2)
    return 2.2 * relative * scale * (1 if metric == "dot" else 2)


@pytest.mark.parametrize(("dtype", "precision"), SEARCHES, ids=str)
def test_regret_is_within_the_bound_and_the_distance_exact(emulation, dtype, precision):
    """The winner may be off by the search's rounding, its distance may not; `verify` finds the true winner."""
    metrics = itertools.cycle(METRICS)
    kinds = itertools.cycle(range(4))
    for batch, channels, sizes, kernel, count in GRIDS:
        for metric, kind in ((next(metrics), next(kinds)), (next(metrics), next(kinds))):
            like = list(arrangements(batch, channels, sizes))[kind]
            x, p = filled(like, torch.randn, dtype), torch.randn(count, channels, *kernel).to(dtype)
            x[0, :, -1] = 0
            at = tuple(slice(0, k) for k in kernel) if kernel else (0,) * len(sizes)
            p[0] = x[(0, slice(None), *at)]  # a distance of 0
            whole = reference_map(x, p, metric)
            topk = 1 if kind < 2 else 5
            best = whole.sort(2).values[..., :topk]
            for verify in (False, True):
                found = search(emulation, x, p, metric=metric, topk=topk, precision=precision, verify=verify)
                reached = whole.gather(2, found.index)
                if verify:
                    assert torch.equal(found.index, reference(x, p, metric, topk)[1])
                else:
                    squares = (reached**2 - best**2) if metric == "euclidean" else reached - best
                    assert (squares <= spread(dtype, precision, x, p, metric)[..., None]).all()
                work = found.distance.dtype
                roundings = p[0].numel() + 8
                terms = exact(reached)
                if metric == "dot":
                    terms = exact(
                        x.double().flatten(2).norm(dim=1).amax() * p.double().flatten(1).norm(dim=1).amax() * 9
                    )
                elif metric == "cosine":  # of each difference, and of the two lengths in it
                    terms = terms + 2 * exact(reached.sqrt()) * roundings * unit(work) + roundings * unit(work) ** 2
                    terms, roundings = 4 * terms + 8 * exact(reached.sqrt()), roundings
                assert_within(found.distance, exact(reached), terms, roundings, arithmetic=work)


@pytest.mark.parametrize("descending", [False, True])
def test_order_of_threads_and_splits_change_no_bit(emulation, descending):
    x, p = torch.randn(2, 19, 17, 23), torch.randn(5, 19)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.bfloat16, "auto")):
        for topk, verify in ((1, False), (4, False), (2, True)):
            options = {"topk": topk, "precision": precision, "verify": verify}
            a = search(emulation, x.to(dtype), p.to(dtype), processors=1, **options)
            b = search(emulation, x.to(dtype), p.to(dtype), processors=64, descending=descending, **options)
            assert torch.equal(a.distance, b.distance)
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.activation, b.activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(emulation, activation):
    for dtype in DTYPES:
        x, p = torch.randn(2, 6, 5, dtype=torch.float64).to(dtype), torch.randn(3, 6, dtype=torch.float64).to(dtype)
        mask = torch.tensor([[True] * 5, [False] * 5])
        found = search(emulation, x, p, activation=activation, topk=2, mask=mask)
        d = exact(found.distance.nan_to_num(posinf=0))
        wanted = pf._ops.prototype.activate(found.distance.double(), ACTIVATIONS.index(activation), 1e-4)
        terms = abs(exact(wanted)) * (1 + (d if activation == "exp" else 0)) + (activation == "log") * 1e-4
        terms[~torch.isfinite(wanted).numpy()] = 0
        assert_within(found.activation, exact(wanted), terms, 8)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_a_number_or_out_of_range(emulation, metric, verify, large):
    """NaN and infinities in patches and prototypes, overflow, underflow, masks, fewer patches than asked for."""
    sizes = (11, 12) if large else (3, 4)  # of several tiles, or many samples in one
    generator = torch.Generator().manual_seed(5)
    plain = torch.randn(4, 5, *sizes, generator=generator)
    p = torch.randn(4, 5, generator=generator)
    mask = torch.rand(4, *sizes, generator=generator) > 0.3
    mask[2] = False
    mask[3] = False
    mask[3, 1, 2] = mask[3, 2, 3] = True
    cases = {"plain": (plain, p)}
    x, q = plain.clone(), p.clone()
    x[0, 2, 1, 1] = x[0, 0, 2, 0] = math.nan
    q[1, 3] = math.nan
    cases["nan"] = x, q
    x = plain.clone()
    x[0, 1, 1, 2], x[1] = math.inf, -math.inf
    cases["inf"] = x, p
    cases["huge"] = plain * 1e25, p * 1e25
    cases["huge in places"] = torch.where(plain > 1, 3e38, plain), p
    x = plain.clone()
    x[1] *= 1e-30
    x[2] = 0
    x[0, :, 0] = 0
    q = p.clone()
    q[2], q[3] = 0, q[3] * 1e-30
    cases["tiny"] = x, q
    for name, (x, q) in cases.items():
        choices = ((1, None), (1, mask), (4, mask), (min(20, math.prod(sizes)), None))
        for topk, kept in choices[1:3] if large else choices:
            if name in ("huge", "huge in places", "tiny") and metric == "cosine" and not verify and topk > 1:
                continue  # ties that rounding decides
            found = search(emulation, x, q, metric=metric, topk=topk, mask=kept, verify=verify)
            distance, index = reference(x, q, metric, topk, kept)
            whole = reference_map(x, q, metric)
            if metric == "cosine" or not verify:  # near ties may differ; the distance may not
                assert torch.equal(found.index < 0, index < 0), name
                flat = whole.gather(2, found.index.clamp(min=0))
                flat = torch.where(found.index < 0, math.inf, flat)
                scale = distance.float().abs().nan_to_num(0, 0, 0).amax()
                assert torch.equal(distance.isnan(), flat.isnan()), name
                same = torch.isclose(flat.float(), distance.float(), rtol=1e-5, atol=1e-6 * scale, equal_nan=True)
                assert same.all(), (name, topk)
            else:
                assert torch.equal(found.index, index), (name, topk)
            torch.testing.assert_close(
                found.distance, distance.float(), rtol=1e-5, atol=1e-5 if metric != "euclidean" else 0, equal_nan=True
            )


def test_what_is_too_much_says_so(emulation):
    x, p = torch.zeros(1, 2, 50), torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match=r"at most 32.*backend='reference'"):
        search(emulation, x, p, topk=33)
    with pytest.raises(RuntimeError, match=r"2\^31 pixels"):
        search(emulation, torch.zeros(1, 2, 1).expand(-1, -1, 1 << 31), p)
    assert search(emulation, x, p, topk=32).index.tolist() == [[list(range(32))]]


def test_nothing_to_sum(emulation):
    """No channels, samples or prototypes."""
    for batch, channels, count in ((2, 0, 3), (0, 4, 3), (2, 4, 0)):
        x, p = torch.ones(batch, channels, 3), torch.ones(count, channels)
        for metric in METRICS:
            found = search(emulation, x, p, metric=metric)
            distance, index = reference(x, p, metric)
            assert torch.equal(found.index, index)
            assert torch.equal(found.distance, distance.float())
            assert torch.equal(dense(emulation, x, p, metric).flatten(2), reference_map(x, p, metric).float())
            to_x = torch.full_like(x, 77)
            grads = (None, torch.ones_like(found.distance))
            to_x, to_p = gradient(
                emulation, x, p, found.distance, found.index, grads, metric=metric, activation=None, topk=1,
                to_features=to_x,
            )  # fmt: skip
            assert (to_x == 0).all()
            assert (to_p == 0).all()


def test_more_than_two_to_the_31_elements(emulation):
    """Offsets take 64 bits. Only the pages that are touched take memory."""
    sample, channel = (1 << 31) + 24, 1 << 30
    x = torch.empty(sample + channel + 64, dtype=torch.bfloat16).as_strided((2, 2, 50), (sample, channel, 1))
    x.copy_(torch.randn(2, 2, 50))
    to, p = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), torch.randn(3, 2).bfloat16()
    for topk, verify in ((1, False), (2, True)):
        found = search(emulation, x, p, topk=topk, verify=verify)
        assert torch.equal(found.index, reference(x, p, "sqeuclidean", topk)[1])
    assert torch.equal(dense(emulation, x, p, "dot"), dense(emulation, x.contiguous(), p, "dot"))
    options = {"metric": "sqeuclidean", "activation": "log", "topk": 2}
    inputs = (found.distance, found.index, (torch.ones_like(found.distance), None))
    far, far_p = gradient(emulation, x, p, *inputs, to_features=to, **options)
    near, near_p = gradient(emulation, x.contiguous(), p, *inputs, to_features=torch.empty(2, 2, 50).to(x), **options)
    assert torch.equal(far, near)
    assert torch.equal(far_p, near_p)


# --- map and gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_map(emulation, metric, dtype):
    for batch, channels, sizes, kernel, count in GRIDS:
        for like in list(arrangements(batch, channels, sizes))[:3]:
            x, p = filled(like, torch.randn, dtype), torch.randn(count, channels, *kernel).to(dtype)
            x[0, :, 0] *= 1e-24 if dtype == torch.float32 else 1
            wanted = reference_map(x, p, metric)
            actual = dense(emulation, x, p, metric).flatten(2)
            roundings, terms = p[0].numel() + 8, exact(wanted)
            if metric == "dot":
                terms = exact(x.double().norm(dim=1).amax() * p.double().flatten(1).norm(dim=1).amax() * 9)
            elif metric == "cosine":
                terms = 4 * terms + 8 * exact(wanted.sqrt()) + roundings * unit(actual.dtype)
            assert_within(actual, exact(wanted), terms, roundings, arithmetic=actual.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_gradient(emulation, metric, dtype):
    """Against the formulas in float64; every element is written, and its bits do not depend on the order of threads."""
    activations = itertools.cycle(ACTIVATIONS)
    for number, (batch, channels, sizes, kernel, count) in enumerate(GRIDS):
        likes = list(arrangements(batch, channels, sizes))
        x, p = filled(likes[number % 4], torch.randn, dtype), torch.randn(count, channels, *kernel).to(dtype)
        p[0] = x[(0, slice(None), *(slice(0, k) for k in kernel))] if kernel else x.flatten(2)[0, :, 0]
        topk, activation = 1 + number % 3, next(activations)
        mask = torch.rand(batch, *sizes) > 0.3
        mask[-1] = number % 2 == 0
        distance, index = reference(x, p, metric, topk, mask)
        distance = distance.to(result_dtype(x))
        grads = [None if activation is None else torch.randn_like(distance), torch.randn_like(distance)]
        if number == 4:
            grads[1] = None if activation else grads[1]
        wide = [None if g is None else g.double() for g in grads]
        shape = (batch, count, topk) if topk > 1 else (batch, count)
        name = pf._ops.prototype.winner_gradients
        call = (distance.double().reshape(shape), index.reshape(shape), METRICS.index(metric))
        wanted_x, wanted_p = name(
            *(None if g is None else g.reshape(shape) for g in wide), x.double(), p.double(), *call,
            ACTIVATIONS.index(activation), 1e-4, topk, True, True,
        )  # fmt: skip
        to = torch.full_like(filled(likes[(number + 1) % 4], torch.randn, dtype), 77)
        options = {"metric": metric, "activation": activation, "topk": topk}
        to_x, to_p = gradient(emulation, x, p, distance, index, grads, to_features=to, **options)
        again, p_again = gradient(
            emulation, x, p, distance, index, grads, to_features=torch.full_like(to, 77), descending=True, **options
        )
        assert torch.equal(to_x, again)
        assert torch.equal(to_p, p_again)
        work = result_dtype(x)
        # |weight| · (|x| + |p|) over all winners that may meet in one element
        slope = torch.ones_like(distance.double()) if wide[1] is not None else 0
        weight = sum(g.abs() for g in wide if g is not None) * (1 + slope)
        if activation is not None:
            weight = weight * abs(pf._ops.prototype._slope(distance.double(), ACTIVATIONS.index(activation), 1e-4))
        weight = torch.where(index >= 0, weight + (wide[1].abs() if wide[1] is not None else 0), 0)
        if metric == "euclidean":
            weight = weight * pf._ops.prototype._invert(distance.double())
        size = x.double().abs().amax() + p.double().abs().amax()
        if metric == "cosine":
            lengths = p.double().flatten(1).norm(dim=1).amin().clamp(max=x.double().norm(dim=1).amin())
            size = size / lengths**2 + 1 / lengths
        terms = float(weight.sum(1).amax() * size * 4)
        assert_within(to_x, exact(wanted_x), terms, 24, arithmetic=work)
        terms = float(weight.sum((0, 2)).amax() * size * 4)
        assert_within(to_p, exact(wanted_p), terms, 24, arithmetic=work)
        alone, _ = gradient(
            emulation, x, p, distance, index, grads, to_features=torch.full_like(to, 77), to_prototypes=False, **options
        )
        _, frozen = gradient(emulation, x, p, distance, index, grads, **options)
        assert torch.equal(alone, to_x)
        assert torch.equal(frozen, to_p)
