"""Prototype distance, activation and map on every backend, against a brute-force oracle in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.errors import assert_within, exact
from helpers.layouts import layouts
from helpers.poison import poison
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import protofast as pf
from protofast._ops.prototype import EXP, METRICS, PRECISIONS, patch_pixels, winner_gradients
from protofast.backends.reference import prototype as reference

OPS = ("prototype_activation", "prototype_backward", "prototype_map")
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)  # of Triton's interpreter
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
ACTIVATIONS = {
    "log": lambda d, eps: np.log((d + 1) / (d + eps)),
    "linear": lambda d, eps: -d,
    "exp": lambda d, eps: np.exp(-d),
    "reciprocal": lambda d, eps: 1 / (d + 1),
    None: lambda d, eps: d,
}


EVERYWHERE = pytest.mark.usefixtures("place")
COMPILED = pytest.mark.usefixtures("compiled")
"""For what Triton's interpreter is too slow for."""

backend_now = "reference"


@pytest.fixture(scope="module")
def compiled(place):
    if place == ("triton", "cpu"):
        pytest.skip("takes Triton's interpreter too long")


@pytest.fixture(autouse=True)
def _on_the_backend(request):
    """The backend and device of `place` for the tests that ask for it; the reference for the rest."""
    global backend_now
    backend_now, device = request.getfixturevalue("place") if "place" in request.fixturenames else ("reference", "cpu")
    with pf.use_backend(backend_now), torch.device(device):
        yield
    backend_now = "reference"


# --- the oracle: loops over windows, math.fsum ------------------------------------------------------------------


def fsum(terms):
    terms = [float(t) for t in np.asarray(terms).ravel()]
    if not all(map(math.isfinite, terms)):
        return float(np.sum(terms))
    return math.fsum(terms)


def one_distance(x, p, metric):
    """Distance of one patch to one prototype, and Σ|terms| times the roundings of a float64 sum."""
    x, p = x.astype(np.float64).ravel(), p.astype(np.float64).ravel()
    roundings = x.size + 8
    with np.errstate(all="ignore"):
        if metric == "dot":
            return -fsum(x * p), roundings * fsum(np.abs(x * p))
        if metric == "cosine":
            length = math.sqrt(fsum(x * x)) * math.sqrt(fsum(p * p))
            if length == 0:
                return 1.0, 0.0
            distance = 1 - fsum(x * p) / length
            return 0.0 if distance < 0 else distance, 4 * roundings
        square = fsum((x - p) ** 2)
        value = math.sqrt(square) if metric == "euclidean" else square
        return value, roundings * value


def oracle_map(features, prototypes, metric):
    """Distances (B, P, *grid) and the terms of their error, by looping."""
    x, p = (t.detach().double().cpu().numpy() for t in (features, prototypes))
    sizes = x.shape[2:]
    kernel = p.shape[2:] or (1,) * len(sizes)
    grid = [s - k + 1 for s, k in zip(sizes, kernel, strict=True)]
    distance, terms = np.empty((x.shape[0], p.shape[0], *grid)), np.empty((x.shape[0], p.shape[0], *grid))
    for b, q, *at in np.ndindex(distance.shape):
        patch = x[(b, slice(None), *(slice(a, a + k) for a, k in zip(at, kernel, strict=True)))]
        distance[(b, q, *at)], terms[(b, q, *at)] = one_distance(patch, p[q], metric)
    return distance, terms


def oracle(dense, kernel, topk, mask):
    """Winners of a dense map by sorting keys: NaN first, then distance, then index; masked patches are out."""
    distance, index = np.full((*dense.shape[:2], topk), np.inf), np.full((*dense.shape[:2], topk), -1)
    for b, q in np.ndindex(*dense.shape[:2]):
        found = []
        for flat, at in enumerate(np.ndindex(*dense.shape[2:])):
            window = tuple(slice(a, a + k) for a, k in zip(at, kernel, strict=True))
            if mask is None or bool(mask[b].cpu().numpy()[window].all()):
                d = dense[(b, q, *at)]
                found.append((0, 0.0, flat, d) if math.isnan(d) else (1, d, flat, d))
        for rank, (_, _, flat, d) in enumerate(sorted(found)[:topk]):
            distance[b, q, rank], index[b, q, rank] = d, flat
    return (distance[..., 0], index[..., 0]) if topk == 1 else (distance, index)


def assert_rounded(actual, expected, terms):
    """A sum over `terms`, where its roundings are counted: in float64 on the reference, in the result's elsewhere;
    and its rounding to that dtype."""
    if backend_now == "reference":
        assert_within(actual, expected, terms, 1, arithmetic=torch.float64)
    else:
        assert_within(actual, expected, terms + np.abs(expected), 1, arithmetic=actual.dtype)


def exactly():
    """What makes the choice that of float64, so that the winners are the oracle's."""
    return {} if backend_now == "reference" else {"verify": True}


def integers(*shape, dtype=torch.float32, low=-2, high=3):
    return torch.randint(low, high, shape).to(dtype)


# --- distances --------------------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_distance_index_and_map_match_the_oracle(metric, dtype):
    """Every kernel × topk × mask × layout, on values that tie and on values that do not."""
    for kernel, values in itertools.product(((), (1, 1), (2, 3)), (torch.randn, integers)):
        x, p = values(2, 5, 4, 5).to(dtype), values(3, 5, *kernel).to(dtype)
        dense, terms = oracle_map(x, p, metric)
        kept = torch.rand(2, 4, 5) > 0.2
        choices = list(itertools.product((1, 4), (None, kept)))
        source = dense
        if metric == "cosine" and values is integers:
            # Cosines of small integers tie but for rounding, so the winners are those of the map in float64.
            source = pf.prototype_map(x.double(), p.double(), metric=metric).cpu().numpy()
        expected = [oracle(source, kernel or (1, 1), topk, mask) for topk, mask in choices]
        error = 0 if values is integers and metric != "cosine" else terms.max()
        for (_, x_in), (_, p_in) in zip(layouts(x), itertools.cycle(layouts(p))):
            whole = pf.prototype_map(x_in, p_in, metric=metric)
            assert_rounded(whole, dense, terms)
            for (topk, mask), (distance, index) in zip(choices, expected, strict=True):
                # small integers are exact in every arithmetic, but not their cosines
                how = {} if values is integers and metric != "cosine" else exactly()
                d, i = pf.prototype_distance(x_in, p_in, metric=metric, topk=topk, mask=mask, **how)
                if backend_now == "reference" or not (values is integers and metric == "cosine"):
                    np.testing.assert_array_equal(i.cpu().numpy(), index)
                assert i.dtype == torch.int64
                assert_rounded(d, distance, error)
                assert d.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                flat = i.reshape(2, 3, topk)
                reached = whole.flatten(2).gather(2, flat.clamp(min=0))
                reached = torch.where(flat >= 0, reached, math.inf)
                if backend_now == "reference" or error == 0:
                    assert torch.equal(d.reshape(2, 3, topk), reached)
                else:
                    assert_rounded(d.reshape(2, 3, topk), exact(reached), 2 * terms.max())


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_activations_follow_their_formulas(metric, dtype):
    """Every activation × kernel × topk × mask, of the nearest patches and of the map."""
    eps = 1e-3
    for kernel, topk, masked in itertools.product(((), (2, 3)), (1, 4), (False, True)):
        x, p = torch.randn(2, 5, 4, 5).to(dtype), torch.randn(3, 5, *kernel).to(dtype)
        mask = torch.rand(2, 4, 5) > 0.2 if masked else None
        d, i = pf.prototype_distance(x, p, metric=metric, topk=topk, mask=mask)
        dense = pf.prototype_map(x, p, metric=metric)
        for name, formula in ACTIVATIONS.items():
            a, d2, i2 = pf.prototype_activation(x, p, metric=metric, activation=name, eps=eps, topk=topk, mask=mask)
            assert torch.equal(d, d2)
            assert torch.equal(i, i2)
            whole = pf.prototype_map(x, p, metric=metric, activation=name, eps=eps)
            for actual, at in ((a[i >= 0], d[i >= 0]), (whole, dense)):
                at = at.double().cpu().numpy()
                with np.errstate(all="ignore"):
                    wanted = formula(at, eps)
                    # d + 1 and d + eps are rounded, which weighs where they are near 0 (in dot alone)
                    near = np.minimum(np.abs(at + 1), np.abs(at + eps)) / (np.abs(at) + 1)
                tolerance = 8 * torch.finfo(actual.dtype).eps
                limit = tolerance * (np.abs(np.nan_to_num(wanted)) + 1) / (near if metric == "dot" else 1)
                found = actual.double().cpu().numpy()
                assert np.array_equal(np.isnan(found), np.isnan(wanted))
                assert np.all((np.abs(found - wanted) <= limit) | np.isnan(wanted))


@EVERYWHERE
@pytest.mark.parametrize(
    ("sizes", "kernel"), [((7,), (3,)), ((2, 3, 4), (1, 2, 2)), ((2, 2, 3, 2), (2, 1, 2, 1)), ((3, 2, 2), ())]
)
def test_any_number_of_spatial_axes(sizes, kernel):
    x, p = torch.randn(2, 3, *sizes), torch.randn(4, 3, *kernel)
    mask = torch.rand(2, *sizes) > 0.1
    for metric in METRICS:
        dense, terms = oracle_map(x, p, metric)
        assert_rounded(pf.prototype_map(x, p, metric=metric), dense, terms)
        d, i = pf.prototype_distance(x, p, metric=metric, topk=2, mask=mask, **exactly())
        expected_d, expected_i = oracle(dense, kernel or (1,) * len(sizes), 2, mask)
        np.testing.assert_array_equal(i.cpu().numpy(), expected_i)
        assert_rounded(d, expected_d, terms.max())


@COMPILED
def test_agrees_with_the_papers_convolutions():
    """relu(conv(x², 1) − 2 conv(x, p) + p²) and max_pool2d, within the rounding of its expansion in float32."""
    x, p = torch.rand(3, 64, 9, 8), torch.rand(10, 64, 2, 2)
    dense = F.relu(
        F.conv2d(x.square(), torch.ones_like(p)) + (p.square().sum((1, 2, 3)).view(-1, 1, 1) - 2 * F.conv2d(x, p))
    )
    best, where = F.max_pool2d(-dense, dense.shape[2:], return_indices=True)
    d, i = pf.prototype_distance(x, p)
    size = (F.conv2d(x.square(), torch.ones_like(p)) + p.square().sum((1, 2, 3)).view(-1, 1, 1)).amax((2, 3)) * 2
    bound = (64 * 4 + 4) * 2.0**-24 * size
    assert ((d + best[..., 0, 0]).abs() <= bound).all()
    two = pf.prototype_distance(x, p, topk=2).distance
    clear = two[..., 1] - two[..., 0] > 2 * bound
    assert clear.sum() > 5
    assert torch.equal(i[clear], where[..., 0, 0][clear])
    activation = pf.prototype_activation(x, p).activation
    torch.testing.assert_close(activation, torch.log((d + 1) / (d + 1e-4)), rtol=1e-6, atol=1e-6)


@EVERYWHERE
def test_distance_does_not_cancel_near_a_prototype():
    """The expansion in float32 is off by more than the distance here; the direct form is not."""
    p = torch.rand(4, 128) + 1
    shift = 2.0**-12
    x = (p + shift).t()[None]
    d, i = pf.prototype_distance(x, p)
    assert torch.equal(i, torch.arange(4)[None])
    assert_rounded(d, np.full((1, 4), 128 * shift**2), 0)


@COMPILED
def test_cosine_of_parallel_vectors_is_never_negative():
    """Rounding takes some of these cosines above 1."""
    p = torch.randn(20, 67)
    x = (p.t()[None] * torch.rand(30, 1, 1)).double()
    assert (1 - F.cosine_similarity(x, p.double().t()[None], dim=1) < 0).any()
    dense = pf.prototype_map(x, p.double(), metric="cosine")
    assert (dense >= 0).all()
    assert (dense.diagonal(dim1=1, dim2=2) < 1e-13).all()  # the scaling was rounded in float32


@pytest.mark.parametrize("blocks", [(1 << 18, 512), (64, 8), (7, 3), (1, 1)])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_patches_tie_wherever_they_lie(metric, blocks, monkeypatch):
    """Bits must not depend on a patch's place in a block or vector register; block sizes are cut down on purpose."""
    monkeypatch.setattr(reference, "_ELEMENTS", blocks[0])
    monkeypatch.setattr(reference, "_RUN", blocks[1])
    sizes = (23, 29) if blocks[1] > 100 else (3, 7)
    for kernel in ((), (2, 2)):
        x = torch.randn(2, 19, 1, 1).expand(-1, -1, *sizes).contiguous()
        p = torch.randn(3, 19, *kernel)
        assert (pf.prototype_distance(x, p, metric=metric).index == 0).all()
        d, i = pf.prototype_distance(x, p, metric=metric, topk=5)
        assert torch.equal(i, torch.arange(5).expand(2, 3, -1))
        assert (d == d[..., :1]).all()
    # and the winner of a random map is the same in every block size
    x, p = torch.randn(3, 19, *sizes), torch.randn(5, 19)
    expected = oracle(oracle_map(x, p, metric)[0], (1, 1), 3, None)[1] if sizes == (3, 7) else None
    if expected is not None:
        np.testing.assert_array_equal(pf.prototype_distance(x, p, metric=metric, topk=3).index.cpu().numpy(), expected)


@COMPILED
def test_samples_and_prototypes_do_not_affect_each_other():
    x, p = torch.randn(5, 33, 6, 7), torch.randn(9, 33, 2, 2)
    for metric in METRICS:
        d, i = pf.prototype_distance(x, p, metric=metric)
        d1, i1 = pf.prototype_distance(x[3:4], p[[7, 2]], metric=metric)
        assert torch.equal(d[3:4, [7, 2]], d1)
        assert torch.equal(i[3:4, [7, 2]], i1)


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
def test_nan_makes_its_patch_win(metric):
    x, p = torch.randn(2, 4, 3, 3), torch.randn(3, 4)
    x[0, 2, 1, 1] = x[0, 0, 2, 0] = math.nan
    if metric == "dot":
        x[0, :, 0, 1] = p[0].sign() * math.inf  # distance −inf, at a lower index: NaN still goes first
    d, i = pf.prototype_distance(x, p, metric=metric)
    assert d[0].isnan().all()
    assert (i[0] == 4).all() or metric == "dot"
    assert i[0, 0] == 4
    assert not d[1].isnan().any()
    d, i = pf.prototype_distance(x, p, metric=metric, topk=3)
    assert d[0, 0, :2].isnan().all()
    assert i[0, 0, :2].tolist() == [4, 6]
    assert not d[0, 0, 2].isnan()
    if metric == "dot":
        assert (i[0, 0, 2], d[0, 0, 2]) == (1, -math.inf)
    windows = pf.prototype_distance(x, torch.randn(3, 4, 2, 2), metric=metric)
    assert windows.distance[0].isnan().all()
    assert (windows.index[0] == 0).all()
    mask = ~x.isnan().any(1)
    assert not pf.prototype_distance(x, p[:1], metric=metric, mask=mask, topk=7).distance.isnan().any()
    p[1] = math.nan
    d, i = pf.prototype_distance(x[1:], p, metric=metric)
    assert d[0].isnan().tolist() == [False, True, False]
    assert i[0, 1] == 0


@EVERYWHERE
def test_infinite_distance_goes_before_a_masked_patch():
    x = torch.tensor([1.0, math.inf, 2.0, math.inf], dtype=torch.float64).reshape(1, 1, 4)
    p = torch.zeros(1, 1, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, True]])
    for metric in ("sqeuclidean", "euclidean"):
        d, i = pf.prototype_distance(x, p, metric=metric, mask=mask)
        assert (d.item(), i.item()) == (math.inf, 1)
        d, i = pf.prototype_distance(x, p, metric=metric, mask=mask, topk=3)
        assert i.tolist() == [[[1, 3, -1]]]
        assert d.isposinf().all()
        d, i = pf.prototype_distance(x, p, metric=metric, topk=4)
        assert i.tolist() == [[[0, 2, 1, 3]]]


@EVERYWHERE
def test_large_values_overflow_to_infinity_only_in_the_result():
    x, p = torch.full((1, 2, 2), 3e38), torch.full((1, 2), -3e38)
    assert pf.prototype_distance(x, p).distance.item() == math.inf
    assert pf.prototype_distance(x, p).index.item() == 0
    assert pf.prototype_distance(x, p, metric="cosine").distance.item() == 2
    assert pf.prototype_distance(x / 4, p / 4, metric="euclidean").distance.item() == pytest.approx(3e38 / 2 * 2**0.5)
    tiny = torch.full((1, 2, 2), 1e-44)
    assert pf.prototype_distance(tiny, -tiny[..., 0], metric="cosine").distance.item() == pytest.approx(2)
    assert pf.prototype_distance(tiny, 0 * tiny[..., 0], metric="euclidean").distance.item() > 0


# --- masks ------------------------------------------------------------------------------------------------------


@EVERYWHERE
def test_mask_hides_every_window_that_touches_it():
    x = torch.ones(1, 1, 3, 4)
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    d, i = pf.prototype_distance(x, torch.ones(1, 1, 2, 2), mask=mask, topk=6)
    assert i.tolist() == [[[2, 3, 4, 5, -1, -1]]]
    assert d.tolist() == [[[0, 0, 0, 0, math.inf, math.inf]]]
    assert pf.prototype_distance(x, torch.ones(1, 1), mask=mask, topk=12).index[0, 0, -2:].tolist() == [11, -1]


@EVERYWHERE
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_left_by_the_mask(metric, topk):
    x = torch.randn(2, 3, 2, 2)
    x[0, 0, 0, 0] = math.nan  # where the clamped index −1 points
    x.requires_grad_()
    p = torch.randn(2, 3, requires_grad=True)
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[1] = True
    for activation in ("log", "exp", "reciprocal"):
        a, d, i = pf.prototype_activation(x, p, metric=metric, activation=activation, mask=mask, topk=topk)
        assert (i[0] == -1).all()
        assert d[0].isposinf().all()
        assert (a[0] == 0).all()
        assert (i[1] >= 0).all()
        first = torch.autograd.grad(a.sum() + d[1].sum(), (x, p), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, p), allow_unused=True)
        for g in (*first, *second):
            assert g is None or g.isfinite().all() or (metric == "dot" and activation in ("log", "reciprocal"))
        assert (first[0][0] == 0).all()
    linear = pf.prototype_activation(x, p, metric=metric, activation="linear", mask=mask, topk=topk)
    (gradient,) = torch.autograd.grad(linear.activation.sum(), x)
    assert linear.activation[0].isneginf().all()
    assert (gradient[0] == 0).all()


# --- degenerate shapes ------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("shape", "proto"),
    [
        ((0, 3, 2, 2), (4, 3)),
        ((2, 3, 2, 2), (0, 3, 1, 2)),
        ((2, 0, 2, 2), (4, 0)),
        ((1, 1, 1), (1, 1)),
        ((0, 0, 1), (0, 0, 1)),
    ],
)
def test_empty_and_single(shape, proto, metric):
    x, p = torch.ones(shape, requires_grad=True), torch.ones(proto, requires_grad=True)
    d, i = pf.prototype_distance(x, p, metric=metric)
    assert d.shape == i.shape == (shape[0], proto[0])
    assert (i == 0).all()
    nothing = shape[1] == 0
    wanted = {"cosine": 1.0 if nothing else 0.0, "dot": 0.0 if nothing else -1.0}.get(metric, 0.0)
    assert (d == wanted).all()
    dense = pf.prototype_map(x, p, metric=metric)
    assert (dense == wanted).all()
    for result in (d, dense):
        gx, gp = torch.autograd.grad(result.sum(), (x, p))
        assert gx.shape == x.shape
        assert gp.shape == p.shape
        assert gx.isfinite().all()
        assert gp.isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize("kernel", [(), (2, 2)])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_distance_zero_has_gradient_zero(metric, kernel):
    """Exactly 0, not NaN, in first and second derivatives, where a patch equals its prototype."""
    p = torch.randn(2, 67, *kernel).requires_grad_()
    x = (
        p.detach()[:1].expand(3, *p.shape[1:]) if kernel else p.detach()[:1, :, None, None].expand(3, -1, 2, 2)
    ).clone()
    x.requires_grad_()
    first = p[:1]
    for result in (
        pf.prototype_distance(x, first, metric=metric).distance,
        pf.prototype_map(x, first, metric=metric),
    ):
        # elsewhere lengths may be summed in another order for each, so that |x̂ − p̂|² is not 0 but its rounding's square
        assert (result <= (1e-12 if metric == "cosine" and backend_now != "reference" else 0)).all()
        assert (result >= 0).all()
        gx, gp = torch.autograd.grad(result.sum(), (x, p), create_graph=True)
        tolerance = 1e-6 if metric == "cosine" else 0  # cosine normalises, and rounds, twice
        assert gx.abs().max() <= tolerance
        assert gp.abs().max() <= tolerance
        for g in torch.autograd.grad((gx + gx.square()).sum() + gp.sum(), (x, p)):
            assert g.isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
def test_zero_vectors(metric):
    x = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.0, 0, 0], [1, 2, 2]], dtype=torch.float64, requires_grad=True)
    wanted = {"sqeuclidean": [0, 9], "euclidean": [0, 3], "cosine": [1, 1], "dot": [0, 0]}[metric]
    for result in (pf.prototype_distance(x, p, metric=metric).distance, pf.prototype_map(x, p, metric=metric)[..., 0]):
        assert result.tolist() == [wanted]
        first = torch.autograd.grad(result.sum(), (x, p), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, p))
        assert all(g.isfinite().all() for g in (*first, *second))


# --- gradients --------------------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("kernel", [(), (2, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_by_finite_differences(metric, kernel):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 3, *kernel, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(2, 4, 4) > 0.15
    kept[1] = False
    for topk, mask in ((1, None), (2, kept)):

        def nearest(x, p, topk=topk, mask=mask):
            d = pf.prototype_distance(x, p, metric=metric, topk=topk, mask=mask).distance
            return torch.where(d.isinf(), 0, d)

        gradcheck(nearest, (x, p), fast_mode=topk > 1)
        gradgradcheck(nearest, (x, p), fast_mode=True)

    def dense(x, p):
        return pf.prototype_map(x, p, metric=metric)

    gradcheck(dense, (x, p), fast_mode=True)
    gradgradcheck(dense, (x, p), fast_mode=True)


@COMPILED
@pytest.mark.parametrize("activation", ["log", "linear", "exp", "reciprocal"])
def test_activation_gradients(activation):
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    p = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, p):
        return pf.prototype_activation(x, p, activation=activation, eps=0.1)[:2]

    gradcheck(run, (x, p))
    gradgradcheck(run, (x, p))


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slope_of_the_log_is_right_down_to_distance_zero(dtype):
    eps = 1e-4
    for shift in (0.0, 1e-6, 1e-3, 0.1, 10.0, 1e5):
        x = torch.full((1, 1, 1), shift, dtype=dtype, requires_grad=True)
        p = torch.full((1, 1), -1, dtype=dtype)
        a, d, _ = pf.prototype_activation(x, p, metric="dot")  # d = x
        assert a.item() == pytest.approx(math.log1p((1 - eps) / (d.item() + eps)), rel=1e-6)
        (slope,) = torch.autograd.grad(a, x)
        assert slope.item() == pytest.approx(-(1 - eps) / ((d.item() + 1) * (d.item() + eps)), rel=1e-6)


@COMPILED
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision_gradients_are_those_of_float64_rounded(metric, dtype):
    x = torch.randn(3, 8, 5, 4).to(dtype)
    for kernel, (_, x_in) in itertools.product(((), (2, 2)), layouts(x)):
        p = torch.randn(20, 8, *kernel).to(dtype)  # several winners a patch
        wide = [t.double().requires_grad_() for t in (x, p)]
        low = [x_in.detach().requires_grad_(), p.clone().requires_grad_()]
        for run in (
            lambda x, p: pf.prototype_distance(x, p, metric=metric, topk=3, **exactly()).distance,
            lambda x, p: pf.prototype_map(x, p, metric=metric),
        ):
            weight = torch.randn(run(*low).shape)
            expected = torch.autograd.grad(run(*wide), wide, weight.double())
            actual = torch.autograd.grad(run(*low), low, weight)
            for a, e, t in zip(actual, expected, low, strict=True):
                assert a.dtype == dtype
                assert a.shape == t.shape
                # at most 60 winners or 3·20 patches add up here, each rounded in float32, then once to dtype
                limit = torch.finfo(dtype).eps * e.abs() + 100 * 2.0**-24 * e.abs().max() + torch.finfo(dtype).tiny
                assert ((a.double() - e).abs() <= limit).all()


class _Watch(TorchDispatchMode):
    """Notes every op, and the most elements of any tensor made (not viewed, not written into)."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.ops.append(str(func))

        def tensors(tree):
            return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t.numel() for t in tensors(result) if t.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *made])
        return result


@pytest.mark.parametrize("metric", METRICS)
def test_backward_touches_the_winners_alone(metric):
    """With frozen features no tensor of their size is made, sliced or not; frozen prototypes get no work."""
    batch, channels, count = 2, 5, 3
    base = torch.randn(batch, channels, 40, 40)
    p = torch.randn(count, channels)
    for x in (base, base[:, :, 1:-1, 2:-2]):
        d, index = pf.prototype_distance(x, p, metric=metric)
        to = (torch.ones_like(d), None, x, p, d, index, METRICS.index(metric), EXP, 1.0, 1)
        with _Watch() as seen:
            none, to_p = winner_gradients(*to, False, True)
        assert none.numel() == 0
        assert to_p.abs().sum() > 0
        assert seen.largest <= batch * channels * count
        assert not any("scatter" in op for op in seen.ops)
        with _Watch() as seen:
            to_x, none = winner_gradients(*to, True, False)
        assert none.numel() == 0
        assert sum("scatter" in op for op in seen.ops) == 1
        assert (to_x.abs().sum(1) > 0).sum() <= batch * count


@pytest.mark.parametrize(("kernel", "product"), [((), False), ((2, 2), True)])
def test_forward_memory_is_bounded(kernel, product, monkeypatch):
    monkeypatch.setattr(reference, "_ELEMENTS", 1024)
    monkeypatch.setattr(reference, "_RUN", 32)
    x, p = torch.randn(2, 50, 7, 11), torch.randn(8, 50, *kernel)
    metric = METRICS.index("cosine" if product else "euclidean")
    with _Watch() as seen:
        _, d, _ = reference.prototype_activation(x, p, None, metric, 0, 1.0, 2, 0, False)
    assert 512 <= seen.largest <= 1024 + d.numel()
    with _Watch() as seen:
        out = reference.prototype_map(x, p, metric)
    assert out.numel() <= seen.largest <= max(out.numel(), 1024)


def test_budget_of_temporaries():
    assert reference._ELEMENTS * 8 <= 64 << 20


@COMPILED
def test_gradients_are_bitwise_repeatable():
    """All winners on one pixel, so that an order left to threads would show."""
    x = torch.randn(2, 64, 1, 1).repeat(1, 1, 8, 8).requires_grad_()
    p = torch.randn(100, 64, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2, 2):
            torch.set_num_threads(n)
            a = pf.prototype_activation(x, p).activation
            results.append(torch.autograd.grad(a.square().sum(), (x, p)))
    finally:
        torch.set_num_threads(threads)
    for gx, gp in results[1:]:
        assert torch.equal(gx, results[0][0])
        assert torch.equal(gp, results[0][1])


def test_scatter_adds_repeated_pixels():
    rows = torch.arange(12.0).reshape(1, 4, 3)
    total = torch.ops.protofast.prototype_scatter.reference(rows, torch.tensor([[2, 0, 2, 2]]), 4)
    assert total[0].t().tolist() == [[3, 4, 5], [0, 0, 0], [15, 18, 21], [0, 0, 0]]


# --- torch's machinery ------------------------------------------------------------------------------------------


@COMPILED
def test_opcheck(backend):
    search, gradient, dense = (getattr(getattr(torch.ops.protofast, op), backend) for op in OPS)
    x, p = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    mask = torch.rand(2, 3) > 0.1
    metric = METRICS.index("euclidean")
    opcheck(search, (x, p, mask, metric, 0, 1.0, 2, 0, False))
    half = [t.detach().bfloat16().requires_grad_() for t in (x, p)]
    opcheck(search, (*half, None, METRICS.index("cosine"), 1, 1e-4, 1, 3, True))
    opcheck(dense, (x, p, METRICS.index("cosine")))
    x, p = x.detach(), p.detach()
    a, d, i = search(x, p, None, metric, EXP, 1.0, 2, 0, False)
    for wanted in ((True, True), (True, False), (False, True)):
        opcheck(gradient, (a, d, x, p, d, i, metric, EXP, 1.0, 2, *wanted))


def test_opcheck_scatter():
    rows = torch.randn(2, 5, 3, requires_grad=True)
    opcheck(torch.ops.protofast.prototype_scatter.reference, (rows, torch.randint(0, 7, (2, 5)), 7))


def _compare_compiled(compiled, plain, shapes, p):
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        results = []
        for run in (compiled, plain):
            out = run(x, p)
            results.append((*out, *torch.autograd.grad(out[0].sum() + out[1].square().sum(), (x, p))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@COMPILED
@pytest.mark.parametrize(
    ("metric", "kernel", "shapes"),
    [
        ("euclidean", (2,), ((4, 3, 6), (6, 3, 8), (7, 3, 10))),
        ("cosine", (), ((4, 3, 6, 7), (6, 3, 8, 9), (7, 3, 10, 12))),
    ],
)
def test_compiles_in_one_graph_with_dynamic_shapes(metric, kernel, shapes):
    """Forward and backward, traced once for three shapes (through AOTAutograd, without generating code)."""
    p = torch.randn(5, 3, *kernel, dtype=torch.float64, requires_grad=True)

    def run(x, p):
        a, d, i = pf.prototype_activation(x, p, metric=metric, activation="exp", topk=2)
        return a, d, i, pf.prototype_map(x, p, metric=metric, activation="exp")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        _compare_compiled(compiled, run, shapes, p)


@COMPILED
def test_compiles_with_inductor():
    p = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x, p):
        return pf.prototype_activation(x, p, metric="euclidean", activation="exp")

    torch._dynamo.reset()
    _compare_compiled(torch.compile(run, fullgraph=True), run, ((4, 3, 6, 7),), p)


@COMPILED
def test_autocast_and_mixed_dtypes():
    x, p = torch.randn(2, 8, 4, 4), torch.randn(3, 8, requires_grad=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = F.conv2d(x, torch.randn(8, 8, 1, 1))
        assert y.dtype == torch.bfloat16
        inside = pf.prototype_activation(y, p)
        dense = pf.prototype_map(y, p)
        inside_grads = [torch.autograd.grad(t.sum(), p)[0] for t in (inside.activation, dense)]
    outside = pf.prototype_activation(y.float(), p)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, t in zip(inside_grads, (outside.activation, pf.prototype_map(y.float(), p)), strict=True):
        assert torch.equal(a, torch.autograd.grad(t.sum(), p)[0])
    for first, second, wanted in (
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ):
        a, b = (t.detach().to(dtype, copy=True).requires_grad_() for t, dtype in ((x, first), (p, second)))
        d = pf.prototype_distance(a, b).distance
        assert d.dtype == wanted
        exact_d = pf.prototype_distance(a.double(), b.double()).distance
        assert_rounded(d, exact(exact_d), 16 * exact(exact_d))
        d.sum().backward()
        assert (a.grad.dtype, b.grad.dtype) == (first, second)


@COMPILED
@pytest.mark.parametrize("metric", METRICS)
def test_no_uninitialised_memory_shows(metric):
    x, p = torch.randn(2, 3, 5, 6, requires_grad=True), torch.randn(4, 3, 2, 2, requires_grad=True)
    with poison():
        for result in (
            pf.prototype_distance(x, p, metric=metric, topk=20).distance,
            pf.prototype_map(x, p, metric=metric),
        ):
            assert result.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(result.sum(), (x, p)))


def test_precision_leaves_the_reference_exact():
    x, p = torch.randn(2, 3, 4), torch.randn(5, 3)
    first = pf.prototype_distance(x, p)
    for precision in PRECISIONS:
        other = pf.prototype_distance(x, p, precision=precision)
        assert torch.equal(first.distance, other.distance)
        assert torch.equal(first.index, other.index)


@EVERYWHERE
def test_parameters_and_no_grad():
    p = torch.nn.Parameter(torch.randn(3, 2, 1, 1))
    x = torch.randn(2, 2, 3, 3)
    assert pf.prototype_distance(x, p).distance.requires_grad
    assert not pf.prototype_distance(x, p).index.requires_grad
    with torch.no_grad():
        assert not pf.prototype_activation(x, p).activation.requires_grad
    with torch.inference_mode():
        pf.prototype_map(x, p)


def test_coordinates_beyond_32_bits():
    """A grid of 6e9 patches: only its coordinates fit in a test."""
    sizes, kernel = [60_000, 100_001], [1, 2]
    index = torch.tensor([0, 99_999, 100_000, 5_999_999_999, 3_000_050_007])
    row, column = patch_pixels(index, sizes, kernel)
    assert row.tolist() == [[i // 100_000] * 2 for i in index.tolist()]
    assert column.tolist() == [[i % 100_000, i % 100_000 + 1] for i in index.tolist()]


@EVERYWHERE
def test_features_of_more_than_32_bits_of_elements():
    """A view of 2^32 pixels and more, of which the mask-free grid is one patch a sample: only strides are huge."""
    batch, wide = 3, 1 << 31
    x = torch.randn(batch, 2, 1, 1)
    window = x.expand(batch, 2, 1, wide)[..., wide - 3 : wide]
    d, i = pf.prototype_distance(window, torch.zeros(1, 2))
    assert (i == 0).all()
    assert_rounded(d, x.double().square().sum((1, 2)).cpu().numpy(), 10)
    with torch.device("meta"), pf.use_backend("reference"):
        huge = torch.empty(1 << 12, 64, 1 << 10, 1 << 10)
        d, i = pf.prototype_distance(huge, torch.empty(7, 64, 3, 3), topk=2)
        assert d.shape == i.shape == (1 << 12, 7, 2)


# --- properties -------------------------------------------------------------------------------------------------

SMALL = settings(max_examples=60, deadline=None)


@st.composite
def problems(draw, elements, dtype):
    axes = draw(st.integers(1, 3))
    kernel = draw(st.one_of(st.just(()), st.tuples(*[st.integers(1, 2)] * axes)))
    width = kernel or (1,) * axes
    sizes = tuple(draw(st.integers(k, k + 2)) for k in width)
    batch, channels, count = draw(st.integers(0, 2)), draw(st.integers(0, 4)), draw(st.integers(0, 3))
    x = torch.from_numpy(draw(hnp.arrays(dtype, (batch, channels, *sizes), elements=elements)))
    p = torch.from_numpy(draw(hnp.arrays(dtype, (count, channels, *kernel), elements=elements)))
    mask = draw(st.one_of(st.none(), hnp.arrays(bool, (batch, *sizes))))
    grid = [s - k + 1 for s, k in zip(sizes, width, strict=True)]
    topk = draw(st.integers(1, math.prod(grid)))
    return x, p, width, topk, None if mask is None else torch.from_numpy(mask)


@COMPILED
@SMALL
@given(problems(st.integers(-2, 2).map(float), np.float32), st.sampled_from(["sqeuclidean", "euclidean", "dot"]))
def test_small_integers_are_exact(problem, metric):
    """Arithmetic without rounding, ties everywhere: index and distance must be the oracle's to the bit."""
    x, p, kernel, topk, mask = problem
    device = torch.get_default_device()
    where = None if mask is None else mask.to(device)
    d, i = pf.prototype_distance(x.to(device), p.to(device), metric=metric, topk=topk, mask=where)
    expected_d, expected_i = oracle(oracle_map(x, p, metric)[0], kernel, topk, mask)
    np.testing.assert_array_equal(i.cpu().numpy(), expected_i)
    np.testing.assert_array_equal(d.cpu().numpy(), expected_d.astype(np.float32))


@SMALL
@given(problems(st.floats(width=32, allow_subnormal=True), np.float32), st.sampled_from(METRICS))
def test_any_float32_keeps_the_bound(problem, metric):
    """NaN, infinities, subnormals, the largest numbers."""
    x, p, kernel, topk, mask = problem
    with pf.use_backend("reference"):
        dense = pf.prototype_map(x.double(), p.double(), metric=metric)
        d, i = pf.prototype_distance(x, p, metric=metric, topk=topk, mask=mask)
    expected, terms = oracle_map(x, p, metric)
    assert_rounded(dense, expected, np.nan_to_num(terms, posinf=0))
    # the choice follows the float64 map to the bit
    chosen_d, chosen_i = oracle(dense.cpu().numpy(), kernel, topk, mask)
    if metric != "euclidean":  # whose ties are decided before the root
        np.testing.assert_array_equal(i.cpu().numpy(), chosen_i)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(d.cpu().numpy(), chosen_d.astype(np.float32))
    if metric != "dot":
        assert not (d < 0).any()


# --- refusals ---------------------------------------------------------------------------------------------------

X, P = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"features": torch.zeros(2, 3)}, ValueError, r"features has shape \(2, 3\)"),
        ({"features": np.zeros((2, 3, 4))}, TypeError, "features is a ndarray"),
        ({"prototypes": [[0.0]]}, TypeError, "prototypes is a list"),
        ({"features": X.long()}, TypeError, "features is torch.int64"),
        ({"prototypes": P.to(torch.complex64)}, TypeError, "prototypes is torch.complex64"),
        ({"prototypes": torch.zeros(6, 3, 1)}, ValueError, r"prototypes has shape \(6, 3, 1\)"),
        ({"prototypes": torch.zeros(6)}, ValueError, r"prototypes has shape \(6,\)"),
        ({"prototypes": torch.zeros(6, 4)}, ValueError, r"4 channels .* Axis 2 has 4: features.permute\(0, 2, 1, 3\)"),
        ({"prototypes": torch.zeros(6, 5)}, ValueError, r"Axis 3 has 5: features.permute\(0, 3, 1, 2\)"),
        ({"prototypes": torch.zeros(6, 2)}, ValueError, r"Axis 0 has 2: features\[None\]"),
        ({"prototypes": torch.zeros(6, 7)}, ValueError, r"features has 3 \(shape \(2, 3, 4, 5\)\)$"),
        ({"features": X[0], "prototypes": torch.zeros(6, 3, 1, 1)}, ValueError, r"Axis 0 has 3: features\[None\]"),
        ({"prototypes": torch.zeros(6, 3, 5, 1)}, ValueError, "no patch"),
        ({"prototypes": torch.zeros(6, 3, 0, 1)}, ValueError, "at least one pixel"),
        ({"features": torch.zeros(2, 3, 0, 5)}, ValueError, "no patch"),
        ({"prototypes": torch.zeros(6, 3, device="meta")}, ValueError, "prototypes is on meta"),
        ({"metric": "manhattan"}, ValueError, "metric is 'manhattan'"),
        ({"topk": 0}, ValueError, "topk is 0"),
        ({"topk": 21}, ValueError, "from 1 to 20"),
        ({"topk": 1.0}, TypeError, "topk is 1.0"),
        ({"topk": True}, TypeError, "topk is True"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'"),
        ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask is torch.float32"),
        ({"mask": np.ones((2, 4, 5), bool)}, TypeError, "mask is a ndarray"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, r"mask has shape \(4, 5\)"),
        ({"mask": torch.ones(2, 4, 5, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        pf.prototype_distance(**{"features": X, "prototypes": P, **arguments})
    with pytest.raises(error, match=says):
        pf.prototype_activation(**{"features": X, "prototypes": P, **arguments})
    if not arguments.keys() & {"topk", "precision", "mask"}:
        with pytest.raises(error, match=says):
            pf.prototype_map(**{"features": X, "prototypes": P, **arguments})


@pytest.mark.parametrize("run", [pf.prototype_activation, pf.prototype_map])
def test_refuses_activations(run):
    with pytest.raises(ValueError, match="activation is 'sigmoid'"):
        run(X, P, activation="sigmoid")
    for eps in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps is"):
            run(X, P, eps=eps)


# --- a GPU, where there is one ----------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_bits_of_the_cpu():
    x, p = torch.randn(3, 37, 9, 11), torch.randn(8, 37, 2, 2)
    mask = torch.rand(3, 9, 11) > 0.1
    for metric, topk in itertools.product(METRICS, (1, 4)):
        here = pf.prototype_distance(x, p, metric=metric, topk=topk, mask=mask)
        there = pf.prototype_distance(x.cuda(), p.cuda(), metric=metric, topk=topk, mask=mask.cuda())
        assert torch.equal(here.index, there.index.cpu())
        assert torch.equal(here.distance, there.distance.cpu())
