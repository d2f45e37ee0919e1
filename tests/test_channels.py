"""Channel purity, pooling and heat maps of rotated channels on every backend, against naive forms of many digits.

The oracle rotates everything, takes the first of the largest and divides by the length.
"""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.aot import ARCHITECTURES, assert_no_spills, assert_wide_addresses, builds
from helpers.errors import EXACT, assert_within, exact
from helpers.fresh import run_fresh
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import protofast as pf
from protofast import _ops
from protofast.backends.reference import channels as reference

OPS = ("channel_purity", "channel_purity_backward", "prototype_activation", "prototype_backward")
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:divide by zero:RuntimeWarning"
)  # of Triton's interpreter
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOOR = 1e-8
EVERYWHERE = pytest.mark.usefixtures("place")
COMPILED = pytest.mark.usefixtures("compiled")
"""For what Triton's interpreter is too slow for."""


@pytest.fixture(scope="module")
def compiled(place):
    if place == ("triton", "cpu"):
        pytest.skip("takes Triton's interpreter too long")


@pytest.fixture(autouse=True)
def _on_the_backend(request):
    """The backend and device of `place` for the tests that ask for it; the reference for the rest."""
    backend, device = request.getfixturevalue("place") if "place" in request.fixturenames else ("reference", "cpu")
    threads = torch.get_num_threads()
    with pf.use_backend(backend), torch.device(device):
        yield
    torch.set_num_threads(threads)


# --- the oracle -------------------------------------------------------------------------------------------------


def rotated(x, u):
    """z (B, R, N) in extended precision, and Σ|terms| of each."""
    x, u = exact(x).reshape(*x.shape[:2], -1), exact(u)
    return np.einsum("rc,bcn->brn", u, x), np.einsum("rc,bcn->brn", abs(u), abs(x))


def oracle(x, u, channels, rectify=True):
    """Purities and pixels, each of the channels' shape, and the terms of the purities' errors."""
    z, terms = rotated(x, u)
    length = np.sqrt((exact(x).reshape(*x.shape[:2], -1) ** 2).sum(1))
    chosen = channels.cpu().numpy()
    found = np.empty((3, *chosen.shape), EXACT)
    for at in np.ndindex(chosen.shape):
        row = z[at[0], chosen[at]]
        p = int(row.argmax())  # the first
        value = max(row[p], 0) if rectify else row[p]
        over = max(length[at[0], p], EXACT(FLOOR))
        found[(slice(None), *at)] = value / over, p, terms[at[0], chosen[at], p] / over
    return found[0], found[1].astype(np.int64), found[2]


def oracle_gradients(x, u, channels, grad, rectify=True):
    """Of features and rotation: the formula, pair by pair; and the terms of their errors."""
    purity, index, _ = oracle(x, u, channels, rectify)
    flat, rows, grad = exact(x).reshape(*x.shape[:2], -1), exact(u), exact(grad)
    to_x, to_u = np.zeros((2, *flat.shape), EXACT), np.zeros((2, *rows.shape), EXACT)
    for at in np.ndindex(index.shape):
        b, p, r = at[0], index[at], int(channels[at])
        f, length = flat[b, :, p], np.sqrt((flat[b, :, p] ** 2).sum())
        if length == 0 or (rectify and purity[at] <= 0):
            continue
        over = max(length, EXACT(FLOOR))
        pull = (rows[r] * f).sum() / over**2 if length >= FLOOR else EXACT(0)
        size = abs(rows[r] * f).sum() / over**2
        to_x[0, b, :, p] += grad[at] * (rows[r] - pull * f) / over
        to_x[1, b, :, p] += abs(grad[at]) * (abs(rows[r]) + size * abs(f)) / over
        to_u[0, r] += grad[at] * f / over
        to_u[1, r] += abs(grad[at] * f) / over
    return (to_x[0].reshape(x.shape), to_x[1].reshape(x.shape)), (to_u[0], to_u[1])


def check(x, u, channels, rectify=True):
    """Index exactly; purity to the roundings of float64 sums, and its own."""
    found = pf.channel_purity(x, u, channels, rectify=rectify)
    purity, index, terms = oracle(x, u, channels, rectify)
    assert found.index.dtype == torch.int64
    assert found.purity.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert found.purity.shape == found.index.shape == channels.shape
    np.testing.assert_array_equal(found.index.cpu().numpy(), index)
    assert_within(found.purity, purity, terms, x.shape[1] + 8, arithmetic=torch.float64)
    return found


def check_gradients(x, u, channels, rectify=True):
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    purity = pf.channel_purity(x, u, channels, rectify=rectify).purity
    grad = torch.randn(purity.shape, dtype=purity.dtype)
    found = torch.autograd.grad(purity, (x, u), grad)
    roundings = x.shape[1] + channels.numel() + 16
    for given, (expected, terms), source in zip(
        found, oracle_gradients(x, u, channels, grad, rectify), (x, u), strict=True
    ):
        assert given.dtype == source.dtype
        # To 16 bits by float32: half a step more.
        terms = terms + (abs(expected) * 2.0**29 / roundings if given.element_size() == 2 else 0)
        assert_within(given, expected, terms, roundings, arithmetic=torch.float64)
    return found


def draw(*shape, rows=5, pairs=3, dtype=torch.float32):
    x, u = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    return x, u, torch.randint(rows, (shape[0], pairs))


def lattice(*shape):
    return torch.randint(-2, 3, shape).float()


def both(x, u):
    return x.detach().clone().requires_grad_(), u.detach().clone().requires_grad_()


def naive(x, u, channels, rectify=True):
    """What users write, in torch: rotate everything."""
    z = torch.einsum("rc,bcn->brn", u, x.flatten(2))
    best, where = z.max(2)
    length = x.flatten(2).norm(dim=1).gather(1, where).clamp(min=FLOOR)
    return ((best.relu() if rectify else best) / length).gather(1, channels)


# --- values -----------------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rectify", [True, False])
def test_purity_and_gradients_match_the_oracle(rectify, dtype):
    for shape in ((2, 5, 3, 4), (2, 19, 7), (1, 40, 3, 3), (3, 8, 1), (2, 9, 9, 8)):
        x, u, channels = draw(*shape, dtype=dtype)
        x[0] -= 2 * u[channels[0, 0]].reshape(-1, *[1] * (x.ndim - 2))  # a channel that is negative at every pixel
        check(x, u, channels, rectify)
        check_gradients(x, u, channels, rectify)


@COMPILED
@pytest.mark.parametrize("rectify", [True, False])
def test_sizes_of_classifiers(rectify):
    x, u, channels = draw(2, 512, 7, 7, rows=512, pairs=4)
    u = torch.linalg.qr(u.double())[0].float()
    check(x, u, channels, rectify)
    check_gradients(x, u, channels, rectify)


@EVERYWHERE
def test_one_channel_an_image_is_one_column_of_many():
    x, u, channels = draw(3, 6, 4, 4, pairs=2)
    whole = pf.channel_purity(x, u, channels)
    for j in (0, 1):
        one = check(x, u, channels[:, j])
        assert torch.equal(one.purity, whole.purity[:, j])
        assert torch.equal(one.index, whole.index[:, j])
        check_gradients(x, u, channels[:, j])


@EVERYWHERE
def test_an_orthogonal_matrix_keeps_lengths():
    """The paper's own form: purity of the rotated map, whose vectors are as long."""
    x, _, channels = draw(2, 12, 4, 4, rows=12, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    z = torch.einsum("rc,bchw->brhw", u, x).flatten(2)
    for (b, j), r in np.ndenumerate(channels.cpu().numpy()):
        p = int(z[b, r].argmax())
        found = pf.channel_purity(x, u, channels)
        assert found.index[b, j] == p
        assert found.purity[b, j].item() == pytest.approx(float(z[b, r, p] / z[b, :, p].norm()), rel=1e-13)


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_has_the_bits_of_the_reference(dtype):
    for shape in ((2, 3, 5), (2, 21, 9, 9), (1, 64, 2, 2), (1, 9, 256), (1, 9, 257), (1, 9, 519)):
        x, u, channels = draw(*shape, dtype=dtype)
        for rectify in (True, False):
            found = pf.channel_purity(x, u, channels, rectify=rectify)
            wanted = pf.channel_purity(x.cpu(), u.cpu(), channels.cpu(), rectify=rectify, backend="reference")
            assert torch.equal(found.purity.cpu(), wanted.purity)
            assert torch.equal(found.index.cpu(), wanted.index)


def laid_down(f, u):
    """Σ f·u as _ops/channels.py lays it down, in Python's floats."""
    lane = [0.0] * 8
    for c, (a, b) in enumerate(zip(f, u, strict=True)):
        lane[c % 8] += a * b
    while len(lane) > 1:
        half = len(lane) // 2
        lane = [a + b for a, b in zip(lane[:half], lane[half:], strict=True)]
    return lane[0]


@EVERYWHERE
@pytest.mark.parametrize("count", [5, 8, 29, 40])
def test_near_ties_fall_as_the_sums_are_laid_down(count):
    """All pixels hold the same numbers in another order, so that z differs by rounding alone."""
    values = torch.randn(count, dtype=torch.float64)
    u = torch.full((1, count), 0.1, dtype=torch.float64)
    differ = 0
    for number in range(6):
        x = torch.stack([values[torch.randperm(count)] for _ in range(21)], 1)[None]
        z = [laid_down(f, u[0].tolist()) for f in x[0].t().tolist()]
        found = pf.channel_purity(x, u, torch.zeros(1, dtype=torch.int64), rectify=number % 2 == 0)
        assert found.index.item() == z.index(max(z))
        differ += len(set(z)) > 1 and z.index(max(z)) > 0
    assert differ > 1


@EVERYWHERE
def test_ties_go_to_the_lowest_index():
    for shape in ((2, 3, 4, 6), (1, 9, 70), (3, 2, 2, 2, 3)):
        x, u = lattice(*shape), lattice(4, shape[1])
        channels = torch.randint(4, (shape[0], 3))
        check(x, u, channels)
        check(x, u, channels, rectify=False)
        z = rotated(x, u)[0]
        assert ((z == z.max(2, keepdims=True)).sum(2) > 1).any()
        same = torch.ones_like(x)
        assert (pf.channel_purity(same, u, channels).index == 0).all()


@COMPILED
@pytest.mark.parametrize("pixels", [8, 13, 256, 257, 264, 265, 519, 520])
def test_any_pixel_can_win(pixels):
    """Wherever it lies in a group, a tail or a block; and of copies the first."""
    x = torch.rand(pixels, 3, pixels)
    place = torch.arange(pixels)
    x[place, :, place] = 2.0
    for _ in range(2):
        found = pf.channel_purity(x, torch.ones(1, 3), torch.zeros(pixels, dtype=torch.int64))
        assert torch.equal(found.index, place)
        x[:, :, -1] = 2.0


@EVERYWHERE
@pytest.mark.parametrize("side", [2, 9])
def test_nan_wins(side):
    x, u, channels = draw(2, 3, side, side, rows=2, pairs=2)
    x[0, 0, 0, 0] = math.inf
    x[0, 1, 1, 0] = x[0, 2, 1, 1] = math.nan
    for rectify in (True, False):
        found = pf.channel_purity(x, u, channels, rectify=rectify)
        assert found.purity[0].isnan().all()
        assert (found.index[0] == side).all()
        assert found.purity[1].isfinite().all()
    u[1, 2] = math.nan
    found = pf.channel_purity(x[1:], u, torch.tensor([[1, 0]]))
    assert found.purity.isnan().tolist() == [[True, False]]
    assert found.index[0, 0] == 0


@EVERYWHERE
def test_infinities_and_the_largest_numbers():
    inf, x = math.inf, torch.ones(1, 2, 9)
    u, channels = torch.eye(2), torch.tensor([[0, 1]])
    x[0, 0, 4] = inf
    found = pf.channel_purity(x, u, channels)
    assert found.index.tolist() == [[4, 4]]  # inf·0 is NaN
    assert found.purity.isnan().all()
    x[0, 0] = -inf
    ones, zero = torch.ones(1, 2), torch.tensor([[0]])
    found = pf.channel_purity(x, ones, zero)
    assert (found.purity.item(), found.index.item()) == (0, 0)
    grown = both(x, ones)
    for gradient in torch.autograd.grad(pf.channel_purity(*grown, zero).purity.sum(), grown):
        assert (gradient == 0).all()
    x = torch.full((1, 2, 9), 3e38)
    x[0, 1, 5] = -3e38
    check(x, u, channels)
    check_gradients(x, u, channels)
    check(x * 1e-45 / 3e38, u, channels)


@EVERYWHERE
@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("pixels", [1, 12])
def test_a_pixel_of_length_zero_has_purity_and_gradient_zero(pixels, rectify):
    """0, not u / 1e-8, rectified or not; and so do second derivatives."""
    x, u = torch.zeros(2, 3, pixels, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    channels = torch.tensor([[0, 1], [2, 2]])
    x[1, :, 1:] = -u[2][:, None]  # elsewhere less
    x, u = both(x, u)
    found = pf.channel_purity(x, u, channels, rectify=rectify)
    assert (found.purity == 0).all()
    assert (found.index == 0).all()
    for create in (False, True):
        purity = pf.channel_purity(x, u, channels, rectify=rectify).purity
        first = torch.autograd.grad(purity.sum(), (x, u), create_graph=create)
        assert all((g == 0).all() for g in first)
    second = torch.autograd.grad(sum(g.square().sum() + g.sum() for g in first), (x, u))
    assert all((g == 0).all() for g in second)


@EVERYWHERE
def test_lengths_below_the_floor():
    x, u, channels = draw(2, 4, 3, 3, dtype=torch.float64)
    for size in (1e-9, 0.3e-8, 1e-8, 1e-20):
        check(x * size, u, channels)
        check_gradients(x * size, u, channels)
        check_gradients(x * size, u, channels, rectify=False)


@EVERYWHERE
def test_negative_everywhere():
    """Rectified: purity 0, and a gradient that is 0, not small."""
    u = torch.rand(3, 5) + 0.1
    x, u = both(-torch.rand(2, 5, 3, 3) - 0.1, u)
    channels = torch.tensor([[0, 2], [1, 1]])
    found = check(x, u, channels)
    assert (found.purity == 0).all()
    for create in (False, True):
        purity = pf.channel_purity(x, u, channels).purity
        assert all((g == 0).all() for g in torch.autograd.grad(purity.sum(), (x, u), create_graph=create))
    assert (check(x, u, channels, rectify=False).purity < 0).all()
    assert check_gradients(x, u, channels, rectify=False)[0].abs().max() > 0


# --- shapes and layouts -----------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("sizes", [(1,), (7,), (8,), (65,), (1, 1), (2, 3, 4), (2, 1, 2, 3)], ids=str)
def test_any_number_of_spatial_axes(sizes):
    x, u, channels = draw(2, 3, *sizes)
    check(x, u, channels)
    check_gradients(x, u, channels)
    backwards = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    check(backwards, u, channels)
    check_gradients(backwards, u, channels)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(dtype):
    x, u, channels = draw(2, 10, 3, 4, dtype=dtype)
    expected = check(x, u, channels)
    weight = torch.randn(channels.shape)
    grown = both(x, u)
    wanted = torch.autograd.grad(pf.channel_purity(*grown, channels).purity, grown, weight)
    for (name, x_in), (_, u_in), (_, at) in zip(
        layouts(x), itertools.cycle(layouts(u)), itertools.cycle(layouts(channels))
    ):
        x_in, u_in = x_in.detach().requires_grad_(), u_in.detach().requires_grad_()
        found = pf.channel_purity(x_in, u_in, at)
        assert all(map(torch.equal, found, expected)), name
        given = torch.autograd.grad(found.purity, (x_in, u_in), weight.mT.contiguous().mT)
        assert all(map(torch.equal, given, wanted)), name
    once = expanded(x).requires_grad_()
    same = pf.channel_purity(once, u, channels[:1].expand(2, -1))
    assert torch.equal(same.purity, same.purity[:1].expand(2, -1))
    assert torch.equal(same.purity[0], expected.purity[0])
    grad = torch.autograd.grad(same.purity.sum(), once)[0]
    assert torch.equal(grad[0], grad[1])


@EVERYWHERE
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (1, 1, 1), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("pairs", [None, 0, 2])
def test_empty_and_single(shape, pairs):
    x, u = torch.ones(shape, requires_grad=True), torch.ones(3, shape[1], requires_grad=True)
    channels = torch.ones(shape[:1] if pairs is None else (shape[0], pairs), dtype=torch.int64)
    found = pf.channel_purity(x, u, channels)
    assert found.purity.shape == found.index.shape == channels.shape
    assert (found.index == 0).all()
    assert (found.purity == (1 if shape[1] else 0)).all()
    for create in (False, True):
        to_x, to_u = torch.autograd.grad(
            pf.channel_purity(x, u, channels).purity.sum(), (x, u), create_graph=create, allow_unused=True
        )
        assert to_x.shape == x.shape
        assert to_u.shape == u.shape
        assert (to_x == 0).all()  # along f itself there is none
        assert (to_u[[0, 2]] == 0).all()
        assert (to_u[1] == (channels.numel() if shape[1] else 0)).all()
    if not channels.numel():  # no row is asked for, so there need be none
        assert pf.channel_purity(x, u[:0], channels).purity.shape == channels.shape


@EVERYWHERE
def test_repeats_of_a_pair_add_up():
    x, u, _ = draw(3, 9, 3, 3, dtype=torch.float64)
    channels = torch.tensor([[1, 1, 4, 1], [1, 0, 0, 2], [4, 4, 4, 4]])
    check(x, u, channels)
    check_gradients(x, u, channels)
    grown = both(x, u)
    one = torch.autograd.grad(pf.channel_purity(*grown, channels[2:, :1].expand(3, 1)).purity[2].sum(), grown)
    four = torch.autograd.grad(pf.channel_purity(*grown, channels).purity[2].sum(), grown)
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(4 * a, b, rtol=1e-14, atol=0)


@EVERYWHERE
def test_pairs_and_images_do_not_affect_each_other():
    x, u, channels = draw(4, 17, 5, 5, rows=7, pairs=6)
    whole = pf.channel_purity(x, u, channels)
    part = pf.channel_purity(x[2:3], u, channels[2:3, [4, 1]])
    assert torch.equal(whole.purity[2:3, [4, 1]], part.purity)
    assert torch.equal(whole.index[2:3, [4, 1]], part.index)


@EVERYWHERE
def test_offsets_beyond_32_bits():
    """Samples, channels and rows that lie 2³¹ elements apart."""
    u, channels = lattice(4, 3).half(), torch.tensor([[0, 3], [1, 1]])
    apart = far_apart(2, 24).unflatten(1, (3, 8)).copy_(lattice(2, 3, 8))
    check(apart, u, channels)
    check_gradients(apart, u, channels)
    apart = far_apart(3, 8).copy_(lattice(3, 8))[None]
    check(apart, u, channels[:1])
    check_gradients(apart, u, channels[:1])
    rows = far_apart(3, 4).copy_(u[:, :3].t()).t()
    check(lattice(2, 3, 9).half(), rows, channels)


# --- gradients --------------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("rectify", [True, False])
def test_gradients_are_those_of_the_naive_form(rectify):
    x, u, channels = draw(2, 20, 4, 5, pairs=4, dtype=torch.float64)
    ours, theirs = both(x, u), both(x, u)
    purity, other = pf.channel_purity(*ours, channels, rectify=rectify).purity, naive(*theirs, channels, rectify)
    torch.testing.assert_close(purity, other, rtol=1e-13, atol=1e-15)
    weight = torch.randn(purity.shape, dtype=torch.float64)
    for create in (False, True):
        found = torch.autograd.grad(purity, ours, weight, retain_graph=True, create_graph=create)
        wanted = torch.autograd.grad(other, theirs, weight, retain_graph=True, create_graph=create)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    second = torch.autograd.grad(sum(g.square().sum() for g in found), ours)
    expected = torch.autograd.grad(sum(g.square().sum() for g in wanted), theirs)
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@COMPILED
def test_gradients_of_an_orthogonal_matrix_are_those_through_all_its_rows():
    """The features' are the same, and the matrix's along the orthogonal matrices."""
    x, _, channels = draw(2, 8, 3, 3, rows=8, dtype=torch.float64)
    ours = both(x, torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0])
    theirs = both(*ours)
    found = torch.autograd.grad(pf.channel_purity(*ours, channels).purity.sum(), ours)
    z = torch.einsum("rc,bcn->brn", theirs[1], theirs[0].flatten(2))
    best, where = z.max(2)
    purity = (best.relu() / z.norm(dim=1).gather(1, where)).gather(1, channels)
    wanted = torch.autograd.grad(purity.sum(), theirs)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-13)
    assert (found[1] - wanted[1]).abs().max() > 0.01
    turns = [ours[1].detach() @ g.t() for g in (found[1], wanted[1])]
    torch.testing.assert_close(turns[0] - turns[0].t(), turns[1] - turns[1].t(), rtol=1e-11, atol=1e-12)


@COMPILED
@pytest.mark.parametrize("rectify", [True, False])
def test_gradients_by_finite_differences(rectify):
    x, u, channels = draw(2, 4, 3, 3, pairs=4, dtype=torch.float64)
    x[0] -= 3 * u[channels[0, 0]][:, None, None]
    channels[1, 1] = channels[1, 0]
    grown = both(x, u)

    def run(x, u):
        return pf.channel_purity(x, u, channels, rectify=rectify).purity

    gradcheck(run, grown)
    gradgradcheck(run, grown)
    gradgradcheck(lambda x, u: pf.channel_purity(x * 1e-9, u, channels, rectify=rectify).purity, grown)


@EVERYWHERE
def test_only_what_is_wanted_gets_a_gradient(backend):
    x, u, channels = draw(2, 4, 3, 3)
    grown = both(x, u)
    whole = torch.autograd.grad(pf.channel_purity(*grown, channels).purity.sum(), grown)
    for which in (0, 1):
        one = [t if number == which else t.detach() for number, t in enumerate(grown)]
        for create in (False, True):
            purity, index = pf.channel_purity(*one, channels)
            assert purity.requires_grad
            assert not index.requires_grad
            found = torch.autograd.grad(purity.sum(), one[which], create_graph=create)[0]
            torch.testing.assert_close(found, whole[which], rtol=1e-6, atol=1e-6)
    run = getattr(torch.ops.protofast.channel_purity_backward, backend)
    purity, index = pf.channel_purity(x, u, channels)
    for wanted in itertools.product((True, False), repeat=2):
        given = run(torch.ones_like(purity), x, u, channels, purity, index, True, *wanted)
        assert [g.numel() > 0 for g in given] == list(wanted)
    with torch.no_grad():
        assert not pf.channel_purity(*grown, channels).purity.requires_grad


@COMPILED
def test_the_number_of_threads_changes_no_bit():
    """Pairs enough for several threads, and all their winners on one pixel and few rows."""
    x = torch.randn(8, 96, 1, 1).repeat(1, 1, 8, 8)
    u, channels = torch.randn(6, 96), torch.randint(6, (8, 40))
    grown = both(x, u)
    results = []
    for n in (1, 2, 2, 2):
        torch.set_num_threads(n)
        found = pf.channel_purity(*grown, channels, rectify=False)
        results.append((*found, *torch.autograd.grad(found.purity.square().sum(), grown)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
def test_tiles_of_the_reference(tile, monkeypatch):
    monkeypatch.setitem(reference.TILE, "cpu", tile)
    x, u, channels = draw(3, 10, 4, 4, pairs=5)
    check(x, u, channels)


@EVERYWHERE
def test_no_uninitialised_memory_shows(backend):
    x, u, channels = draw(2, 30, 20, 5, rows=100, pairs=10 if backend == "triton" else 300)
    grown = both(x, u)
    expected = pf.channel_purity(*grown, channels)
    wanted = torch.autograd.grad(expected.purity.sum(), grown)
    with poison():
        found = pf.channel_purity(*grown, channels)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, torch.autograd.grad(found.purity.sum(), grown), wanted))
        few = channels[:, :2] // 2  # most rows and pixels get nothing
        for gradient in torch.autograd.grad(pf.channel_purity(*grown, few).purity.sum(), grown):
            assert gradient.isfinite().all()
            assert (gradient == 0).float().mean() > 0.9


ISAS = ["plain", "avx2", "avx512"]


def _on_isa():
    """All lengths, widths and types on this instruction set; the bits are the reference's."""
    from protofast import _C

    torch.manual_seed(0)
    torch.set_num_threads(2)
    for dtype, channels, pixels in itertools.product(DTYPES, (1, 7, 8, 9, 24, 63), (1, 7, 8, 9, 15, 16, 20, 300)):
        x, u, chosen = draw(2, channels, pixels, dtype=dtype)
        for x_in, u_in in ((x, u), (x.mT.contiguous().mT, u.mT.contiguous().mT)):
            found = []
            for backend in ("native", "reference"):
                grown = both(x_in, u_in)
                purity, index = pf.channel_purity(*grown, chosen, backend=backend)
                found.append((purity, index, *torch.autograd.grad(purity.sum(), grown)))
            for number, (a, b) in enumerate(zip(*found, strict=True)):
                if number < 2:
                    assert torch.equal(a, b), (dtype, channels, pixels)
                else:
                    torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-12)
    return _C.build_info()["isa"]


@pytest.mark.skipif("native" in _ops.UNAVAILABLE, reason=_ops.UNAVAILABLE.get("native", ""))
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    from protofast import _C

    best = _C.build_info()["isa"]
    if isa != "plain" and not best.startswith(isa) and not (isa == "avx2" and best.startswith("avx512")):
        pytest.skip(f"this processor has {best} at best")
    assert run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa) == isa


# --- torch's machinery ------------------------------------------------------------------------------------------


@EVERYWHERE
def test_opcheck(place):
    backend, _ = place
    forward, backward = (getattr(getattr(torch.ops.protofast, op), backend) for op in OPS[:2])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if place != ("triton", "cpu"):  # the interpreter cannot be traced
        checks += ("test_aot_dispatch_dynamic",)
    for dtype, shape in ((torch.float32, (2, 3, 4)), (torch.bfloat16, (2, 3, 2, 2))):
        x, u, channels = draw(*shape, dtype=dtype)
        opcheck(forward, (*both(x, u), channels, True), test_utils=checks)
        opcheck(forward, (*both(x, u), channels[:, 0], False), test_utils=checks)
        purity, index = forward(x, u, channels, True)
        for wanted in ((True, True), (True, False), (False, True)):
            opcheck(
                backward, (torch.ones_like(purity), x, u, channels, purity, index, True, *wanted), test_utils=checks
            )
        moved = x.transpose(1, 2).contiguous().transpose(1, 2)
        opcheck(backward, (purity, moved, u, channels, purity, index, False, True, True), test_utils=checks)


def everything(x, u, channels):
    purity, index = pf.channel_purity(x, u, channels)
    pooled = [pf.rotate_and_pool(x, u, pool=pool).value for pool in ("max", "mean", "signed_max")]
    maps = pf.channel_heat_map(x, u, channels, size=(9, 8))
    return purity, index, *pooled, pf.purity_of_all(x, u).purity, maps


def _compare_compiled(compiled, shapes, u):
    for shape in shapes:
        x, _, channels = draw(*shape, dtype=torch.float64)
        x.requires_grad_()
        results = []
        for run in (compiled, everything):
            out = run(x, u, channels)
            loss = sum(t.square().sum() for t in out if t.requires_grad)
            results.append((*out, *torch.autograd.grad(loss, (x, u))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@COMPILED
def test_compiles_in_one_graph_with_dynamic_shapes():
    """Forward and backward, traced once for three shapes (through AOTAutograd, without generating code)."""
    u = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        _compare_compiled(compiled, ((4, 6, 5, 7), (2, 6, 8, 9), (7, 6, 4, 12)), u)


@COMPILED
def test_compiles_with_inductor():
    u = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    _compare_compiled(torch.compile(everything, fullgraph=True), ((4, 6, 3, 5),), u)


@COMPILED
def test_autocast_changes_nothing():
    x, u, channels = draw(2, 8, 4, 4)
    y = F.conv2d(x, torch.randn(8, 8, 1, 1)).bfloat16()
    for given in (x, y):
        grown = both(given, u)
        outside = everything(*grown, channels)
        wanted = torch.autograd.grad(sum(t.sum() for t in outside if t.requires_grad), grown)
        with torch.autocast(x.device.type, torch.bfloat16):
            inside = everything(*grown, channels)
        found = torch.autograd.grad(sum(t.sum() for t in inside if t.requires_grad), grown)
        for a, b in zip((*inside, *found), (*outside, *wanted), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@COMPILED
def test_mixed_dtypes_are_promoted():
    x, u, channels = draw(2, 8, 4, 4)
    for first, second, wanted in (
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ):
        a, b = both(x.to(first), u.to(second))
        wide = torch.promote_types(first, second)
        for found, same in zip(everything(a, b, channels), everything(a.to(wide), b.to(wide), channels), strict=True):
            assert found.dtype in (wanted, torch.int64)
            assert torch.equal(found, same)
        pf.channel_purity(a, b, channels).purity.sum().backward()
        assert (a.grad.dtype, b.grad.dtype) == (first, second)


@EVERYWHERE
@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_a_row_that_is_not_there(place, bad):
    x, u, channels = draw(2, 3, 2, 2)
    channels[1, 1] = bad
    if place == ("reference", "cpu"):
        with pytest.raises(IndexError, match=f"channels has {bad}; rotation has 5 rows, so give 0 to 4"):
            pf.channel_purity(x, u, channels)
    elif place == ("native", "cpu"):
        with pytest.raises(RuntimeError, match=f"channels has {bad}; give 0 to 4"):
            pf.channel_purity(x, u, channels)
        good = channels.clamp(0, 4)
        purity, index = pf.channel_purity(x, u, good)
        run = torch.ops.protofast.channel_purity_backward.native
        with pytest.raises(RuntimeError, match=f"channels has {bad}"):
            run(purity, x, u, channels, purity, index, True, True, True)
        index[0, 0] = bad
        with pytest.raises(RuntimeError, match=f"index has {bad}; give 0 to 3"):
            run(purity, x, u, good, purity, index, True, True, True)
    elif place[0] == "triton":
        grown = both(x, u)
        purity = pf.channel_purity(*grown, channels).purity
        assert purity.isnan().flatten().tolist() == [False, False, False, False, True, False]
        for gradient in torch.autograd.grad(purity.sum(), grown):
            assert gradient.isfinite().all()
    if place[1] == "cpu":
        with pytest.raises(IndexError):
            pf.channel_heat_map(x, u, channels)


# --- ahead of time ----------------------------------------------------------------------------------------------


def launches():
    """Forward and backward, of each type, contiguous and not."""
    from protofast.backends.triton.channels import channel_purity, channel_purity_backward

    channels = torch.zeros(8, 3, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, u = torch.zeros(8, 512, 7, 7, dtype=dtype), torch.zeros(512, 512, dtype=dtype)
        if dtype == torch.bfloat16:
            x = x.to(memory_format=torch.channels_last)
        purity, index = channel_purity(x, u, channels, dtype != torch.float64)
        index.zero_()
        channel_purity_backward(purity, x, u, channels, purity, index, dtype != torch.float64, True, True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_without_spills():
    found = builds(launches)
    assert len(found) == 3 * 4 * len(ARCHITECTURES)
    for build in found:
        assert_wide_addresses(build)
        assert_no_spills(build)
        assert build.shared <= 64 << 10
        assert "atom" not in build.ptx
        assert "red.global" not in build.ptx
        if build.kernel == "purity_kernel":
            assert "fma.rn.f64" not in build.ptx.split("sqrt.rn.f64")[0], "products must be rounded"


# --- pooling ----------------------------------------------------------------------------------------------------


def pooled(x, u):
    """z, and the roundings that a sum of it may have with their terms, in the arithmetic of the result."""
    z, terms = rotated(x, u)
    return z, terms, x.shape[1] + 8


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pools(dtype):
    for shape in ((2, 30, 5, 4), (3, 8, 11), (1, 5, 2, 3, 2)):
        x, u, _ = draw(*shape, rows=9, dtype=dtype)
        z, terms, roundings = pooled(x, u)
        found = pf.rotate_and_pool(x, u)
        assert_within(found.value, z.max(2), np.take_along_axis(terms, z.argmax(2)[..., None], 2)[..., 0], roundings)
        np.testing.assert_array_equal(found.index.cpu().numpy(), z.argmax(2))
        mean, none = pf.rotate_and_pool(x, u, pool="mean")
        assert none is None
        assert_within(mean, z.mean(2), terms.mean(2), roundings + z.shape[2])
        signed = pf.rotate_and_pool(x, u, pool="signed_max")
        sides = np.maximum(z.max(2), 0), np.maximum((-z).max(2), 0)
        assert_within(signed.value, sides[0] - sides[1], terms.max(2), 2 * roundings)
        np.testing.assert_array_equal(signed.index.cpu().numpy(), np.stack([z.argmax(2), (-z).argmax(2)], 2))
        assert {t.dtype for t in (found.value, mean, signed.value)} == {
            torch.float64 if dtype == torch.float64 else torch.float32
        }


@COMPILED
def test_pools_of_lattices_are_exact():
    x, u = lattice(3, 4, 5, 5), lattice(7, 4)
    z = rotated(x, u)[0]
    most, where = pf.rotate_and_pool(x, u)
    np.testing.assert_array_equal(most.cpu().numpy(), z.max(2))
    np.testing.assert_array_equal(where.cpu().numpy(), z.argmax(2))
    assert ((z == z.max(2, keepdims=True)).sum(2) > 1).any()
    signed, sides = pf.rotate_and_pool(x, u, pool="signed_max")
    np.testing.assert_array_equal(signed.cpu().numpy(), np.maximum(z.max(2), 0) - np.maximum((-z).max(2), 0))
    np.testing.assert_array_equal(sides.cpu().numpy(), np.stack([z.argmax(2), (-z).argmax(2)], 2))
    # One side alone: all above 0, all below.
    x, u = x.abs() + 1, u.abs() + 1
    assert torch.equal(pf.rotate_and_pool(x, u, pool="signed_max").value, pf.rotate_and_pool(x, u).value)
    assert torch.equal(pf.rotate_and_pool(x, -u, pool="signed_max").value, -pf.rotate_and_pool(x, u).value)


@COMPILED
@pytest.mark.parametrize("pool", ["max", "mean", "signed_max"])
def test_gradients_of_pools(pool):
    x, u, _ = draw(2, 4, 3, 3, dtype=torch.float64)
    ours, theirs = both(x, u), both(x, u)
    found = pf.rotate_and_pool(*ours, pool=pool).value
    z = torch.einsum("rc,bcn->brn", theirs[1], theirs[0].flatten(2))
    other = {"max": z.amax, "mean": z.mean, "signed_max": lambda _: z.relu().amax(2) - (-z).relu().amax(2)}[pool](2)
    weight = torch.randn(found.shape, dtype=torch.float64)
    for a, b in zip(
        (found, *torch.autograd.grad(found, ours, weight)),
        (other, *torch.autograd.grad(other, theirs, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    gradgradcheck(lambda x, u: pf.rotate_and_pool(x, u, pool=pool).value, ours, fast_mode=True)


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_purity_of_all_is_that_of_every_row(dtype):
    x, u, _ = draw(2, 30, 4, 5, rows=11, dtype=dtype)
    x[0] -= 3 * u[4][:, None, None]  # negative everywhere
    every = torch.arange(11).expand(2, -1)
    grown, others = both(x, u), both(x, u)
    found, one = pf.purity_of_all(*grown), pf.channel_purity(*others, every)
    assert torch.equal(found.index, one.index)
    assert (found.purity == 0).any()
    purity, _, terms = oracle(x, u, every)
    assert_within(found.purity, purity, terms, 2 * x.shape[1] + 8)
    weight = torch.randn(2, 11, dtype=found.purity.dtype)
    for a, b in zip(
        torch.autograd.grad(found.purity, grown, weight), torch.autograd.grad(one.purity, others, weight), strict=True
    ):
        tolerance = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@COMPILED
def test_purity_of_all_decides_what_float32_cannot():
    """z of the pixels differs by less than a float32 search sees; their lengths by much."""
    base = torch.randn(2, 24, 1)
    u = torch.randn(6, 24)
    aside = torch.randn(2, 24, 40)
    aside -= torch.einsum("rc,rd,bdn->bcn", u[:1], u[:1], aside) / u[0].square().sum()
    x = base * (1 + 2.0**-22 * torch.randint(-2, 3, (2, 1, 40))) + aside * 2.0**-20
    every = torch.arange(6).expand(2, -1)
    found, one = pf.purity_of_all(x, u), pf.channel_purity(x, u, every)
    assert torch.equal(found.index, one.index)
    assert (found.index > 0).any()


@COMPILED
def test_purity_of_all_where_length_is_zero():
    x, u = both(torch.zeros(2, 3, 4), torch.randn(3, 3))
    purity, index = pf.purity_of_all(x, u)
    assert (purity == 0).all()
    assert (index == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(purity.sum(), (x, u)))


@COMPILED
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 1, 1)], ids=str)
def test_pools_of_nothing(shape):
    x, u = both(torch.ones(shape), torch.ones(0 if shape[0] else 4, 3))
    results = [pf.rotate_and_pool(x, u, pool=pool) for pool in ("max", "mean", "signed_max")]
    for value, *_ in (*results, pf.purity_of_all(x, u)):
        assert value.shape == (shape[0], len(u))
        assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), (x, u), allow_unused=True))


# --- heat maps --------------------------------------------------------------------------------------------------


def naive_maps(x, u, channels):
    """All channels' maps, of which the chosen are taken; and the terms of their errors."""
    z, terms = rotated(x, u)
    length = np.sqrt((exact(x).reshape(*x.shape[:2], -1) ** 2).sum(1))[:, None] + EXACT(FLOOR)
    z = np.maximum(z, 0)
    top = z.max(2, keepdims=True) + EXACT(FLOOR)
    most = terms.max(2, keepdims=True)
    maps = z / length * (z / top)
    size = (2 * terms * z + z * z * (1 + most / top)) / (length * top)
    take = channels.cpu().numpy()[..., None]
    return [np.take_along_axis(m, take, 1).reshape(*channels.shape, *x.shape[2:]) for m in (maps, size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heat_maps(dtype):
    x, u, channels = draw(3, 20, 4, 5, rows=7, pairs=4, dtype=dtype)
    u = F.normalize(u)
    x[1, :, 2, 3] = 0
    x[0] -= 9 * u[channels[0, 0]][:, None, None]
    maps, terms = naive_maps(x, u, channels)
    for _, x_in in layouts(x):
        found = pf.channel_heat_map(x_in, u, channels)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within(found, maps, terms, x.shape[1] + 24)
    assert (found[0, 0] == 0).all()
    assert (found[1, :, 2, 3] == 0).all()
    assert found.min() >= 0
    assert 0.1 < found.max() <= 1 + 8 * torch.finfo(dtype).eps
    for size in ((4, 5), (9, 8), (2, 3)):
        wide = pf.channel_heat_map(x, u, channels, size=size)
        expected, bound = (
            F.interpolate(torch.from_numpy(m.astype(np.float64)), size=size, mode="bilinear").numpy()
            for m in (maps, terms + maps.max())
        )
        assert_within(wide, expected, bound, x.shape[1] + 40)


def test_heat_maps_of_several_rows_do_not_affect_each_other():
    x, u, channels = draw(3, 20, 4, 5, rows=7, pairs=4, dtype=torch.float64)
    channels[1] = channels[1, 0]
    found = pf.channel_heat_map(x, u, channels, size=(8, 8))
    assert torch.equal(found[1, 0], found[1, 3])
    for b, j in itertools.product(range(3), range(4)):
        one = pf.channel_heat_map(x[b : b + 1], u, channels[b : b + 1, j : j + 1], size=(8, 8))
        torch.testing.assert_close(one[0, 0], found[b, j], rtol=1e-12, atol=1e-14)


def test_gradients_of_heat_maps():
    x, u, channels = draw(2, 3, 3, 3, pairs=2, dtype=torch.float64)
    grown = both(x, u)
    gradcheck(lambda x, u: pf.channel_heat_map(x, u, channels, size=(4, 5)), grown)
    gradgradcheck(lambda x, u: pf.channel_heat_map(x, u, channels), grown, fast_mode=True)
    zero = torch.zeros(2, 3, 2, 2, requires_grad=True)
    maps = pf.channel_heat_map(zero, u, channels)
    assert (maps == 0).all()
    assert (torch.autograd.grad(maps.sum(), zero)[0] == 0).all()


@pytest.mark.parametrize(("batch", "pairs"), [(0, 2), (2, 0)])
def test_no_heat_maps(batch, pairs):
    x, u = both(torch.ones(batch, 3, 2, 2), torch.ones(4, 3))
    channels = torch.zeros(batch, pairs, dtype=torch.int64)
    assert pf.channel_heat_map(x, u, channels).shape == (batch, pairs, 2, 2)
    assert pf.channel_heat_map(x, u, channels, size=(5, 6)).shape == (batch, pairs, 5, 6)


# --- the k largest of a long table ------------------------------------------------------------------------------


def top(table, ids, k):
    """Values and ids (k, C) by sorting every column: larger first, then lower ids."""
    table, ids = exact(table), ids.numpy()
    order = np.stack([np.lexsort((ids, -column)) for column in table.T], 1)[:k]
    return np.take_along_axis(table, order, 0), ids[order]


def fed(table, ids, k, cuts):
    kept = pf.ColumnTopK(k)
    for lo, hi in itertools.pairwise([0, *cuts, len(table)]):
        kept.update(table[lo:hi], ids[lo:hi])
    return kept


def assert_top(kept, table, ids):
    values, indices = top(table, ids, kept.k)
    np.testing.assert_array_equal(exact(kept.values), values)
    np.testing.assert_array_equal(kept.indices.numpy(), indices)
    assert kept.values.dtype == table.dtype
    assert kept.indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 10, 500])
def test_top_k_of_batches_is_that_of_the_table(k, dtype):
    """Ties, infinities, few and many that enter, in any order of rows and batches of any size."""
    for draw_table in (lattice, torch.randn, lambda *s: torch.where(torch.rand(s) < 0.7, -math.inf, lattice(*s))):
        table, ids = draw_table(300, 6).to(dtype), torch.randperm(1000)[:300]
        table[7, 2], table[8, 2] = math.inf, math.inf
        for cuts in ((), (1, 2, 3, 150), (5, 5, 295), range(10, 300, 10)):
            for order in (torch.arange(300), torch.randperm(300), ids.argsort(), ids.argsort(descending=True)):
                assert_top(fed(table[order], ids[order], k, cuts), table, ids)


def test_rows_of_minus_infinity_fill_what_is_empty():
    table = torch.full((50, 3), -math.inf)
    table[40:, 1] = torch.arange(10.0)
    for cuts in ((), (4,), (30,)):
        assert_top(fed(table, torch.arange(50), 6, cuts), table, torch.arange(50))
        assert_top(fed(table.flip(0), torch.arange(50).flip(0), 6, cuts), table, torch.arange(50))


@pytest.mark.parametrize("at", [0, 7, 19])
def test_of_rows_of_minus_infinity_the_lowest_ids_stay(at):
    """One of many that are as small as what is kept gets in, by its id alone."""
    table, ids = torch.full((22, 3), -math.inf), torch.arange(22) + 100
    ids[:2], ids[2 + at] = torch.tensor([50, 51]), 3
    assert_top(fed(table, ids, 2, (2,)), table, ids)


def test_consecutive_ids_and_empty_batches():
    table = torch.randn(20, 4)
    kept = pf.ColumnTopK(5)
    kept.update(table[:0], 0)
    assert kept.values.shape == kept.indices.shape == (0, 4)
    kept.update(table[:3], 0)
    assert kept.values.shape == (3, 4)
    kept.update(table[3:3], torch.tensor(3))
    kept.update(table[3:], torch.tensor(3))
    assert_top(kept, table, torch.arange(20))
    no_columns = pf.ColumnTopK(2)
    no_columns.update(torch.zeros(3, 0), 0)
    no_columns.update(torch.zeros(3, 0), 3)
    assert no_columns.values.shape == (2, 0)


def test_what_does_not_enter_costs_no_sort():
    kept = pf.ColumnTopK(2)
    kept.update(torch.ones(4, 3, requires_grad=True), 0)
    assert not kept.values.requires_grad
    before = kept.values
    kept.update(torch.ones(4, 3), 4)
    kept.update(-torch.ones(4, 3), 8)
    assert kept.values is before
    kept.update(torch.ones(1, 3), -1)  # as large, and before all
    assert kept.indices.tolist() == [[-1] * 3, [0] * 3]


def test_top_k_goes_on_from_its_state(tmp_path):
    table, ids = lattice(90, 5), torch.arange(90)
    whole = fed(table, ids, 7, (20, 60))
    first = fed(table[:60], ids[:60], 7, (20,))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = pf.ColumnTopK(7)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    first.update(100 + table[:7], 1000)  # leaves the other alone
    second.update(table[60:], 60)
    assert torch.equal(second.values, whole.values)
    assert torch.equal(second.indices, whole.indices)
    fresh = pf.ColumnTopK(7)
    fresh.load_state_dict(pf.ColumnTopK(7).state_dict())
    with pytest.raises(RuntimeError, match="nothing has been kept yet"):
        _ = fresh.values
    with pytest.raises(ValueError, match="state has k 7; this keeps 8"):
        pf.ColumnTopK(8).load_state_dict(second.state_dict())


@pytest.mark.parametrize(
    ("values", "ids", "error", "says"),
    [
        ([[1.0]], 0, TypeError, "values is a list"),
        (torch.zeros(2), 0, ValueError, r"torch.float32 of shape \(2,\)"),
        (torch.zeros(2, 3).long(), 0, ValueError, "values is torch.int64"),
        (torch.full((2, 3), math.nan), 0, ValueError, "values has NaN"),
        (torch.zeros(2, 4), 0, ValueError, "with 4 columns on cpu; earlier ones were torch.float32 with 3"),
        (torch.zeros(2, 3).double(), 0, ValueError, "values is torch.float64"),
        (torch.zeros(2, 3), 0.5, TypeError, "ids is 0.5"),
        (torch.zeros(2, 3), torch.arange(3), ValueError, r"ids is torch.int64 of shape \(3,\); give int64 \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, "ids is torch.float32"),
    ],
)
def test_top_k_refuses(values, ids, error, says):
    kept = pf.ColumnTopK(2)
    kept.update(torch.zeros(1, 3), 0)
    with pytest.raises(error, match=says):
        kept.update(values, ids)
    assert kept.values.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_top_k_refuses_k(k, error):
    with pytest.raises(error, match=f"k is {k}"):
        pf.ColumnTopK(k)


# --- refusals ---------------------------------------------------------------------------------------------------

X, U, CHANNELS = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3), torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"features": np.zeros((2, 3, 4, 5))}, TypeError, "features is a ndarray"),
        ({"rotation": [[0.0]]}, TypeError, "rotation is a list"),
        ({"features": X.long()}, TypeError, "features is torch.int64"),
        ({"rotation": U.to(torch.complex64)}, TypeError, "rotation is torch.complex64"),
        ({"features": torch.zeros(2, 3)}, ValueError, r"features has shape \(2, 3\); give"),
        ({"features": torch.zeros(2, 3, 0, 5)}, ValueError, "with no pixel"),
        ({"rotation": torch.zeros(6, 3, 1)}, ValueError, r"rotation has shape \(6, 3, 1\)"),
        ({"rotation": torch.zeros(3)}, ValueError, r"rotation has shape \(3,\)"),
        (
            {"rotation": torch.zeros(6, 7)},
            ValueError,
            r"rows of 7 channels .* features has 3 \(shape \(2, 3, 4, 5\)\)$",
        ),
        ({"rotation": torch.zeros(6, 5)}, ValueError, r"Axis 3 has 5: features.permute\(0, 3, 1, 2\)"),
        ({"rotation": U.to("meta")}, ValueError, "rotation is on meta"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"channels": [[0], [0]]}, TypeError, "channels is a list"),
        ({"channels": CHANNELS.int()}, TypeError, "channels is torch.int32"),
        ({"channels": CHANNELS[0, 0]}, ValueError, r"channels has shape \(\); its first axis must be the 2 images"),
        ({"channels": CHANNELS[:1]}, ValueError, r"channels has shape \(1, 1\); its first axis"),
        ({"channels": CHANNELS[..., None]}, ValueError, r"channels has shape \(2, 1, 1\)"),
        ({"channels": CHANNELS.to("meta")}, ValueError, "channels is on meta"),
        ({"rectify": 1}, TypeError, "rectify is 1"),
    ],
)
def test_refuses(arguments, error, says):
    if "rectify" not in arguments:
        with pytest.raises(error, match=says):
            pf.channel_heat_map(**{"features": X, "rotation": U, "channels": CHANNELS, **arguments})
    with pytest.raises(error, match=says):
        pf.channel_purity(**{"features": X, "rotation": U, "channels": CHANNELS, **arguments})
    if not arguments.keys() & {"channels", "rectify"}:
        for run in (pf.rotate_and_pool, pf.purity_of_all):
            with pytest.raises(error, match=says):
                run(**{"features": X, "rotation": U, **arguments})


def test_refuses_pools_and_maps():
    with pytest.raises(ValueError, match="pool is 'median'; choose one of 'max', 'mean', 'signed_max'"):
        pf.rotate_and_pool(X, U, pool="median")
    with pytest.raises(ValueError, match=r"features has shape \(2, 3, 4\); give \(B, C, h, w\)"):
        pf.channel_heat_map(X[..., 0], U, CHANNELS)
    with pytest.raises(ValueError, match=r"channels has shape \(2,\); give \(B, m\)"):
        pf.channel_heat_map(X, U, CHANNELS[:, 0])
    for size in ((0, 3), 7, (3,), (2.5, 3), (3, 3, 3)):
        with pytest.raises((TypeError, ValueError), match="size is"):
            pf.channel_heat_map(X, U, CHANNELS, size=size)
