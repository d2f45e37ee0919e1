"""What only the compiled CPU search has: instruction sets, tiles and their tails, blocks, threads, screens and bounds.

Every distance is held to the direct form in float64, every winner to how much farther it may be than the nearest patch
(its regret): see `Truth`.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, assert_within, exact, unit
from helpers.fresh import run_fresh
from helpers.layouts import expanded, far_apart, layouts
from helpers.poison import poison
from torch.library import opcheck

import protofast as pf
from protofast import _ops
from protofast._ops.prototype import EXP, LINEAR, LOG, METRICS, NONE, RECIPROCAL

pytestmark = pytest.mark.skipif("native" in _ops.UNAVAILABLE, reason=_ops.UNAVAILABLE.get("native", ""))

ISAS = ["plain", "avx2", "avx512", "avx512vnni", "avx512bf16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def best_isa() -> str:
    from protofast import _C

    return _C.build_info()["isa"]


def lanes(dtype: torch.dtype) -> int:
    """Numbers of the arithmetic's type in a vector of this process's instruction set."""
    return {"plain": 16, "avx2": 32}.get(best_isa(), 64) // (8 if dtype == torch.float64 else 4)


def native(x, p, metric="sqeuclidean", **options):
    return pf.prototype_distance(x, p, metric=metric, backend="native", **options)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- the oracle -------------------------------------------------------------------------------------------------


def rows(x: torch.Tensor, kernel: tuple[int, ...]) -> np.ndarray:
    """Patches (B, N, depth) in float64, with the elements of a window in the order of the prototypes'."""
    axes = x.ndim - 2
    for axis, width in enumerate(kernel or (1,) * axes):
        x = x.unfold(2 + axis, width, 1)  # its pixels become the last axis
    x = x.movedim(1, 1 + axes).flatten(1, axes).flatten(2)
    return x.double().numpy()


class Truth:
    """All distances of one problem (squared for euclidean), (B, P, N), and what errors are made of."""

    def __init__(self, x, p, metric, mask=None):
        self.metric, self.u = metric, unit(torch.float64 if x.dtype == torch.float64 else torch.float32)
        patches = rows(x, tuple(p.shape[2:]))
        proto = p.flatten(1).double().numpy()
        self.depth, self.lanes = proto.shape[1], lanes(x.dtype)
        self.own = self.depth / 8 + 12 if x.dtype == torch.float64 else 0  # roundings of numpy's sums, in the same type
        a, b = patches[:, None], proto[None, :, None]  # (B, 1, N, depth), (1, P, 1, depth)
        with np.errstate(all="ignore"):
            self.x, self.p = np.sqrt((a * a).sum(-1)), np.sqrt((b * b).sum(-1))  # lengths (B, 1, N), (1, P, 1)
            self.size = 0
            if metric == "dot":
                self.distance, self.size = -(a * b).sum(-1), np.abs(a * b).sum(-1)
            elif metric == "cosine":
                there = (self.x != 0) & (self.p != 0)
                unit_x, unit_p = a / np.where(self.x, self.x, 1)[..., None], b / np.where(self.p, self.p, 1)[..., None]
                self.distance = np.where(there, ((unit_x - unit_p) ** 2).sum(-1) / 2, 1)
            else:
                self.distance = ((a - b) ** 2).sum(-1)
        self.allowed = np.ones((x.shape[0], 1, patches.shape[1]), bool)
        if mask is not None:
            self.allowed = rows(mask.half()[:, None], tuple(p.shape[2:])).all(-1)[:, None]
        keys = np.where(self.allowed, self.distance, np.inf)
        self.order = np.argsort(keys, -1, kind="stable")
        self.left = self.allowed.sum(-1)

    def rounding(self):
        """How far the direct form in the arithmetic's type may be off, for each patch.

        A square has the roundings of its difference (twice), of itself, and of the sums: along one of two accumulators,
        then over its lanes. Unit vectors x̂ are off by a factor each (half the roundings of |x|², and a root and a
        quotient), which reaches d in proportion to d alone, as Σ(x̂ − p̂)·x̂ = d, but for its square; and by a rounding
        an element, which reaches d by Cauchy-Schwarz.
        """
        if self.metric == "dot":
            return (self.depth / self.lanes + 8 + self.own) * self.u * self.size
        if self.metric == "cosine":
            scale = (self.depth / 2 + 6) * self.u
            sums = (self.depth / self.lanes + 8 + self.own) * self.u
            d = self.distance
            return (2 * scale + sums) * d + 4 * self.u * np.sqrt(2 * d) + 2 * (scale + self.u) ** 2
        below = self.depth * np.finfo(np.float32).smallest_subnormal  # what squares lose there
        return (self.depth / (2 * self.lanes) + 8 + self.own) * self.u * self.distance + below

    def screen(self, pairs=False):
        """How far a screen, as a distance, may be off. The fast form x·p − |x|²/2 has depth + 1 terms of one product
        each, and is (|p|² − d)/2; with bfloat16 both operands are off by 2⁻⁸ as well."""
        error = 1.01 * (self.depth + 8) * self.u + (1.01 / 128 if pairs else 0)
        longest = np.where(self.allowed, self.x, 0).max(-1, keepdims=True)
        if self.metric == "dot":
            return error * longest * self.p
        if self.metric == "cosine":
            return 2 * error
        return 2 * error * longest * (longest + self.p)

    def check(self, result, topk, dtype, *, how, pairs=False):
        """`how`: "verify": the exact winners; "direct": no farther than the direct form is off; "screen": nor than
        twice what the screen is."""
        distance, index = (t.reshape(*t.shape[:2], topk) for t in result[-2:])
        assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert index.dtype == torch.int64
        index = index.numpy()
        ranks = np.arange(topk)
        there = np.broadcast_to(ranks < self.left[..., None], index.shape)
        assert np.array_equal(index >= 0, there), "not the number of patches that the mask leaves"
        at = np.where(there, index, 0)
        assert np.take_along_axis(np.broadcast_to(self.allowed, self.distance.shape), at, -1)[there].all()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in index.reshape(-1, topk)), "a patch twice"
        found = np.take_along_axis(self.distance, at, -1)
        slack = np.take_along_axis(np.broadcast_to(self.rounding(), self.distance.shape), at, -1)
        best = np.take_along_axis(self.distance, self.order[..., :topk], -1)
        if how == "verify":
            np.testing.assert_array_equal(index, np.where(there, self.order[..., :topk], -1))
            slack = slack * (dtype == torch.float64)  # measured in float64
        else:
            near = np.take_along_axis(np.broadcast_to(self.rounding(), self.distance.shape), self.order[..., :topk], -1)
            over = slack + near + (2 * self.screen(pairs) if how == "screen" else 0)
            assert (found - best <= over)[there].all(), (
                f"regret {((found - best) / over)[there].max():.3g} of its bound"
            )
        root = np.sqrt if self.metric == "euclidean" else (lambda value: value)
        expected = np.where(there, root(found), np.inf)
        if self.metric == "euclidean":
            slack = slack / np.maximum(2 * root(found), np.finfo(np.float64).tiny)
        # Twice a rounding of the result: to Real, and of a root.
        terms = np.where(there, slack + 2 * self.u * np.abs(root(found)), 0) / self.u
        assert_within(distance, expected, terms, 1)
        assert not (distance.diff(dim=-1) < 0).any(), "not in order"


def how_of(precision, verify):
    return "verify" if verify else "screen" if precision != "auto" else "direct"


# --- instruction sets -------------------------------------------------------------------------------------------

PATCHES = [(1,), (2,), (11,), (3, 4), (13,), (4, 6), (5, 5), (7, 7), (2, 9, 3)]
PROTOTYPES = [1, 15, 16, 17, 31, 32, 33, 100]
DEPTHS = [0, 1, 3, 15, 16, 17, 63, 64, 65, 130]
MODES = [("auto", False), ("ieee", False), ("bf16", False), ("tf32", False), ("auto", True), ("bf16", True)]


def _on_isa() -> tuple[str, int]:
    """All shapes, with everything else in turn."""
    from protofast import _C

    isa = _C.build_info()["isa"]
    pairs = isa == "avx512bf16"
    torch.manual_seed(0)
    torch.set_num_threads(2)
    ways = list(itertools.product(METRICS, DTYPES, (False, True), (1, 3, 32), MODES))
    turn = itertools.count(0, 197)  # a prime, so all ways are met

    def next_way():
        return ways[next(turn) % len(ways)]

    runs = 0

    def run(sizes, count, depth, kernel, way):
        nonlocal runs
        metric, dtype, masked, topk, (precision, verify) = way
        x, p = torch.randn(2, depth, *sizes).to(dtype), torch.randn(count, depth, *kernel).to(dtype)
        if runs % 3 == 0:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        mask = torch.rand(2, *sizes) > 0.3 if masked else None
        truth = Truth(x, p, metric, mask)
        topk = min(topk, truth.distance.shape[-1])
        result = native(x, p, metric, topk=topk, mask=mask, precision=precision, verify=verify)
        how = how_of(precision, verify)
        if depth < 3 and how != "verify":
            how = "screen"  # near ties of so few elements are many, and auto then does without measuring them all
        if depth < 3 and metric == "cosine" and how == "verify":
            return  # cosines of one or no element tie but for rounding
        truth.check(result, topk, dtype, how=how, pairs=pairs and precision == "bf16" and dtype != torch.float64)
        runs += 1

    sizes_in_turn, depths_in_turn = itertools.cycle(PATCHES), itertools.cycle(DEPTHS)
    for sizes, count in itertools.product(PATCHES, PROTOTYPES):
        run(sizes, count, next(depths_in_turn), (), next_way())
    for count, depth in itertools.product(PROTOTYPES, DEPTHS):
        run(next(sizes_in_turn), count, depth, (), next_way())
    for sizes, kernel, count, depth in (((6, 7), (2, 3), 17, 5), ((4, 3, 4), (2, 1, 2), 3, 17), ((9,), (3,), 33, 6)):
        for _ in range(40):
            run(sizes, count, depth, kernel, next_way())
    for metric, dtype in itertools.product(METRICS, DTYPES):
        for sizes, kernel in (((5, 5), ()), ((4, 5), (2, 2))):
            check_map(torch.randn(2, 19, *sizes).to(dtype), torch.randn(33, 19, *kernel).to(dtype), metric)
        check_gradients(metric, dtype, sizes, kernel, 19, LOG, topk=2)
    return isa, runs


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(best_isa()):
        pytest.skip(f"this processor has {best_isa()} at best")
    used, runs = run_fresh(_on_isa, PROTOFAST_CPU_ISA=isa)
    assert used == isa
    assert runs > 250


def check_map(x, p, metric):
    truth = Truth(x, p, metric)
    found = pf.prototype_map(x, p, metric=metric, backend="native").flatten(2)
    expected, slack = truth.distance, truth.rounding()
    if metric == "euclidean":
        expected = np.sqrt(expected)
        slack = slack / np.maximum(2 * expected, np.finfo(np.float64).tiny) + 2 * truth.u * expected
    if metric in ("sqeuclidean", "euclidean"):
        slack = slack * 2 * truth.lanes  # a map adds along the depth, in one sum
    if metric == "dot":
        slack = slack * truth.lanes
    if metric == "cosine":
        slack = slack * truth.lanes
    assert_within(found, expected, slack / truth.u, 1)


# --- tiles, blocks, masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("batch", "patches"), [(1, 1023), (1, 1025), (1, 1033), (3, 700), (5, 400), (2, 2100), (40, 49)]
)
def test_blocks(batch, patches, metric):
    """More patches than a block of rows holds, and samples that do not fit into what is left of one."""
    x, p = torch.randn(batch, 3, patches), torch.randn(40, 3)
    # Not quite all out, nearly all out, a whole block out.
    mask = torch.rand(batch, patches) > torch.linspace(0.1, 0.99, batch)[:, None]
    mask[0, : patches // 2] = False
    for kept, topk in itertools.product((None, mask), (1, 5)):
        truth = Truth(x, p, metric, kept)
        for precision, verify in MODES:
            pairs = precision == "bf16" and best_isa() == "avx512bf16"
            result = native(x, p, metric, topk=topk, mask=kept, precision=precision, verify=verify)
            # cosines of three elements are often as near as rounding
            how = "verify" if verify and metric != "cosine" else "screen"
            truth.check(result, topk, x.dtype, how=how, pairs=pairs)
            if verify:
                alone = native(x[-1:], p[7:9], metric, topk=topk, mask=None if kept is None else kept[-1:], verify=True)
                assert torch.equal(alone.distance, result.distance[-1:, 7:9])
                assert torch.equal(alone.index, result.index[-1:, 7:9])


def test_few_patches_left():
    x, p = torch.randn(4, 20, 40), torch.randn(35, 20)
    mask = torch.zeros(4, 40, dtype=torch.bool)
    mask[1, 39] = mask[2, ::9] = mask[3] = True
    for metric, precision, verify in itertools.product(METRICS, ("auto", "ieee", "bf16"), (False, True)):
        for topk in (1, 2, 32, 40):
            result = native(x, p, metric, topk=topk, mask=mask, precision=precision, verify=verify)
            pairs = precision == "bf16" and best_isa() == "avx512bf16"
            Truth(x, p, metric, mask).check(result, topk, x.dtype, how="verify" if verify else "screen", pairs=pairs)


def test_auto_is_no_farther_than_the_direct_form():
    """Where the screen, by bytes or in float32, leaves few candidates, all of them are measured."""
    for scale, offset, metric in itertools.product((1.0, 1e-6, 1e6), (0.0, 3.0), METRICS):
        x, p = (torch.randn(4, 128, 10, 10) + offset) * scale, (torch.randn(100, 128) + offset) * scale
        for topk in (1, 3):
            Truth(x, p, metric).check(native(x, p, metric, topk=topk), topk, x.dtype, how="direct")


# --- ties and near ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("patches", [7, 49, 1500])
def test_equal_patches_go_by_index(patches, metric):
    """With so many candidates auto takes float32 instead of bytes."""
    for depth, dtype in itertools.product((3, 64, 67), (torch.float32, torch.bfloat16, torch.float64)):
        p = torch.randn(33, depth).to(dtype)
        one = torch.randn(2, depth, 1).to(dtype)
        x = one.expand(2, depth, patches).contiguous()
        few = torch.randn(2, depth, 5).to(dtype)[..., torch.arange(patches) % 5].contiguous()
        for precision, verify in MODES:
            options = {"precision": precision, "verify": verify}
            assert (native(x, p, metric, **options).index == 0).all()
            d, i = native(x, p, metric, topk=6, **options)
            assert torch.equal(i, torch.arange(6).expand(2, 33, 6))
            assert (d == d[..., :1]).all()
            assert (native(few, p, metric, **options).index < 5).all()


def test_equal_patches_go_by_index_beside_odd_ones():
    """A second block holds a patch too small for the fast form, so all of it is measured in float64: the tie with a
    patch of the first block, measured in float32, has to be seen nevertheless."""
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 4, 2000) * 10
        x[0, :, 1500] = x[0, :, 5]
        x[0, :, 1600] = torch.tensor([1e-20, 0, 0, 0])
        p = (x[0, :, 5] + 0.001 * torch.randn(4))[None]
        for precision, verify, topk in itertools.product(("auto", "ieee"), (False, True), (1, 2)):
            i = native(x, p, precision=precision, verify=verify, topk=topk).index
            assert i.flatten().tolist() == [5, 1500][:topk]


def near_ties():
    """Problems with many patches within what a screen is off by."""
    noise = torch.randn(2, 64, 150)
    p = torch.randn(20, 64)
    yield "far from the origin", noise + 1e3, p + 1e3
    yield "far from each other", noise * 1e-3 + 1e3, p
    yield (
        "a huge channel",
        noise * (1 + 1e4 * (torch.arange(64) == 7)[:, None]),
        p * (1 + 1e4 * (torch.arange(64) == 7)),
    )
    heavy = torch.randn(2, 64, 150) / torch.randn(2, 64, 150)
    yield "heavy tails", heavy, torch.randn(20, 64) / torch.randn(20, 64)
    yield "nearly one patch", noise[..., :1] + 1e-6 * noise, p
    yield "nearly the prototypes", p.repeat(8, 1)[:150].t() + 1e-4 * noise, p
    yield "on a sphere around them", 100 * noise / noise.norm(dim=1, keepdim=True), p * 1e-3
    yield "one of a kind", noise * 1e-6 + p.mean(0)[:, None], p
    yield (
        "small beside the centre",
        noise * 1e-22 * (torch.arange(64) > 0)[:, None] + (torch.arange(64) == 0)[:, None] * 1.0,
        (torch.cat([p[:10], -p[:10]]) * 1e-22 * (torch.arange(64) > 0) + (torch.arange(64) == 0) * 1.0),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties(metric):
    for name, x, p in near_ties():
        if name == "small beside the centre" and metric != "sqeuclidean":
            continue  # too small for the root of float32, and all the same but for rounding in the others
        truth = Truth(x, p, metric)
        for topk in (1, 4, 32):
            for precision in ("auto", "ieee", "bf16"):
                pairs = precision == "bf16" and best_isa() == "avx512bf16"
                result = native(x, p, metric, topk=topk, precision=precision)
                truth.check(result, topk, x.dtype, how="screen", pairs=pairs)
                i = native(x, p, metric, topk=topk, precision=precision, verify=True).index
                # float64 itself may not part the nearest; then any of them
                at = np.take_along_axis(truth.distance, i.reshape(2, -1, topk).numpy(), -1)
                best = np.take_along_axis(truth.distance, truth.order[..., :topk], -1)
                size = truth.size if metric == "dot" else (truth.distance + 1e-3 * (metric == "cosine"))
                size = np.take_along_axis(size, truth.order[..., :topk], -1)
                assert (at - best <= 64 * 2.0**-53 * size).all(), (name, precision, topk)


# --- threads ----------------------------------------------------------------------------------------------------


def on_threads(run):
    found = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        found.append(run())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b), "the result depends on the number of threads"


@pytest.mark.parametrize(
    ("batch", "count", "patches"), [(1, 5, 3000), (1, 100, 50), (2, 3, 700), (3, 40, 2500), (5, 70, 20), (80, 3, 20)]
)
def test_threads(batch, count, patches):
    """Few samples are cut by prototypes, few of both by patches."""
    x, p = torch.randn(batch, 20, patches), torch.randn(count, 20)
    mask = torch.rand(batch, patches) > 0.5
    for (precision, verify), topk, kept in itertools.product(MODES, (1, 3), (None, mask)):
        on_threads(lambda: native(x, p, topk=topk, mask=kept, precision=precision, verify=verify))  # noqa: B023
    for metric in METRICS:
        on_threads(lambda: (pf.prototype_map(x, p, metric=metric, backend="native"),))  # noqa: B023


@pytest.mark.parametrize("precision", ["auto", "ieee", "bf16"])
def test_threads_on_near_ties(precision):
    """Where patches differ by less than the screen is off, the choice must not follow how threads cut them."""
    for seed, topk in itertools.product(range(5), (1, 3)):
        torch.manual_seed(seed)
        x, p = torch.randn(1, 64, 1) * 100 + torch.randn(1, 64, 2000) * 1e-5, torch.randn(3, 64) * 100
        on_threads(lambda: native(x, p, precision=precision, topk=topk))  # noqa: B023


# --- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_layouts(metric, dtype):
    for depth, kernel in itertools.product((3, 35), ((), (2, 3))):
        x, p = torch.randn(3, depth, 7, 8).to(dtype), torch.randn(5, depth, *kernel).to(dtype)
        truth = Truth(x, p, metric)
        many = [*layouts(x), ("permuted", x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))]
        first = native(x, p, metric, verify=True)
        for (name, x_in), (_, p_in) in zip(many, itertools.cycle(layouts(p))):
            check_map(x_in, p_in, metric)
            d, i = native(x_in, p_in, metric, verify=True)
            assert torch.equal(d, first.distance), name
            assert torch.equal(i, first.index), name
            truth.check(native(x_in, p_in, metric), 1, dtype, how="direct")
        same = native(expanded(x), p, metric, verify=True)
        assert torch.equal(same.index, first.index[:1].expand(3, -1))
        flat = x[..., :1, :1].expand(-1, -1, 7, 8)
        assert (native(flat, p, metric, topk=3).index == torch.arange(3)).all()


def test_elements_far_apart():
    """Samples, channels and pixels whose distance in memory does not fit 32 bits; forward, backward and map."""
    wide = far_apart(3, 40)
    for x in (
        wide.reshape(3, 2, 20),  # samples
        wide.t().reshape(10, 4, 3).movedim(0, 0).permute(0, 2, 1),  # channels
        wide.unflatten(1, (10, 4)).permute(1, 2, 0),  # pixels
    ):
        assert max(x.stride()) == 2**31
        x.copy_(torch.randn(x.shape))
        p = torch.randn(5, x.shape[1]).half()
        here = x.contiguous()
        for metric in METRICS:
            found = native(x, p, metric, verify=True)
            expected = native(here, p, metric, verify=True)
            assert torch.equal(found.index, expected.index)
            assert torch.equal(found.distance, expected.distance)
            assert (
                torch.equal(
                    pf.prototype_map(x, p, metric=metric, backend="native"),
                    pf.prototype_map(here, p, metric=metric, backend="native"),
                )
                or metric == "cosine"
            )
            gradients = [
                backward(a, p, found.distance, found.index, METRICS.index(metric), torch.ones_like(found.distance))
                for a in (x, here)
            ]
            for a, b in zip(*gradients, strict=True):
                assert torch.equal(a, b)


def test_many_axes():
    """More axes than the kernels know are merged, or copied, forward and backward; windows over five are refused."""
    values = torch.randn(2, 3, 2, 3, 2, 3, 2)
    p = torch.randn(4, 3, requires_grad=True)
    for order in ((2, 3, 4, 5, 6), (6, 5, 4, 3, 2), (3, 2, 6, 4, 5)):
        x = values.permute(0, 1, *order).requires_grad_()
        flat = x.detach().reshape(2, 3, -1).requires_grad_()
        results = [native(a, p, topk=2) for a in (x, flat)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        (dx, dp), (df, dq) = (
            torch.autograd.grad(r.distance.square().sum(), (a, p)) for r, a in zip(results, (x, flat), strict=True)
        )
        assert torch.equal(dx.reshape(2, 3, -1), df)
        assert torch.equal(dp, dq)
    with pytest.raises(RuntimeError, match="reference"):
        native(values, torch.randn(4, 3, 2, 2, 2, 2, 2))


# --- numbers that are no ordinary ones --------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, 1.84e19, -1.84e19, 1e-25, 1e-44, 0.0], ids=str)
def test_odd_numbers(value, metric):
    """In an element, a patch, a prototype, or everywhere: what float64 makes of it."""
    torch.manual_seed(1)
    for where, depth in itertools.product(("element", "patch", "prototype", "sample", "all", "zero"), (1, 20)):
        x, p = torch.randn(3, depth, 30), torch.randn(20, depth)
        if where == "element":
            x[1, 0, 4] = x[2, -1, 9] = value
        if where == "patch":
            x[1, :, 4] = x[2, :, 9] = value
        if where == "prototype":
            p[3] = value
            p[19, 0] = value
        if where == "sample":
            x[1] *= value
        if where == "all":
            x, p = x * value, p * value
        if where == "zero":  # the other side is 0
            x[1, :, 4] = value
            p[7] = 0
        wide = pf.prototype_map(x.double(), p.double(), metric=metric, backend="reference")
        assert_close(pf.prototype_map(x, p, metric=metric, backend="native"), wide, metric)
        for (precision, verify), topk in itertools.product(MODES, (1, 3)):
            result = native(x, p, metric, topk=topk, precision=precision, verify=verify)
            expected = pf.prototype_distance(x.double(), p.double(), metric=metric, topk=topk, backend="reference")
            reached = wide.gather(2, result.index.reshape(3, 20, topk)).reshape(result.index.shape)
            assert_close(result.distance, reached, metric)
            if depth == 1 and metric == "cosine":
                continue  # all of them tie but for rounding
            if verify:
                assert torch.equal(result.index, expected.index), (where, precision, topk)
            nan = expected.distance.isnan()
            assert torch.equal(result.distance.isnan(), nan), where
            assert torch.equal(result.index[nan], expected.index[nan]), where


def assert_close(found, wide, metric):
    """To float32 rounding of 20 elements, and below its smallest normal number."""
    wide = wide.to(torch.float64)
    narrow = wide.float().double()
    same = (narrow == found.double()) | (narrow.isnan() & found.isnan())
    off = (found.double() - wide).abs() <= 32 * 2.0**-24 * wide.abs() + 2.0**-120
    if metric in ("cosine", "dot"):
        size = 1 if metric == "cosine" else wide[wide.isfinite()].abs().max() if wide.isfinite().any() else 0
        off |= (found.double() - wide).abs() <= 64 * 2.0**-24 * size
    assert (same | off).all(), f"{found[~(same | off)][:3].tolist()}, exact {wide[~(same | off)][:3].tolist()}"


def test_no_overflow_among_ordinary_squares():
    """|x|² and |p|² are finite, but not x·p − |x|²/2 nor |x − p|²."""
    x = torch.zeros(2, 2, 4)
    x[0, 0], x[1, 0] = 1.0, -1.84e19
    p = torch.tensor([[1.84e19, 0.0]])
    for (precision, verify), topk in itertools.product(MODES, (1, 3)):
        d, i = native(x, p, "euclidean", topk=topk, precision=precision, verify=verify)
        assert torch.equal(i.reshape(2, topk), torch.arange(topk).expand(2, topk))
        torch.testing.assert_close(d.reshape(2, topk)[:, 0], torch.tensor([1.84e19, 3.68e19]))


def test_no_uninitialised_memory_shows():
    with poison():
        for depth, kernel, dtype, metric in itertools.product((1, 5, 70), ((), (2, 2)), DTYPES, METRICS):
            x, p = torch.randn(2, depth, 5, 6).to(dtype), torch.randn(19, depth, *kernel).to(dtype)
            mask = torch.rand(2, 5, 6) > 0.3
            x.requires_grad_(), p.requires_grad_()
            for precision, verify in MODES:
                a, d, i = pf.prototype_activation(
                    x,
                    p,
                    metric=metric,
                    activation="exp",
                    topk=5,
                    mask=mask,
                    precision=precision,
                    verify=verify,
                    backend="native",
                )
                assert torch.equal(d.isfinite(), i >= 0)
                assert a.isfinite().all() or dtype == torch.float16 or metric == "dot"
            gradients = torch.autograd.grad(torch.where(i < 0, 0, d).sum(), (x, p))
            assert all(g.isfinite().all() for g in gradients)
            assert pf.prototype_map(x, p, metric=metric, backend="native").isfinite().all()


# --- activations ------------------------------------------------------------------------------------------------


def activated(d, activation, eps):
    """Through the kernel: the distance −x·p of one-element vectors is d itself."""
    run = torch.ops.protofast.prototype_activation.native
    a, distance, _ = run(
        -d.reshape(-1, 1, 1), torch.ones(1, 1, dtype=d.dtype), None, METRICS.index("dot"), activation, eps, 1, 0, False
    )
    torch.testing.assert_close(distance.flatten(), d, rtol=0, atol=0, equal_nan=True)
    return a.flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-4, 0.5, 1.0, 2.0, 1e3])
def test_log_to_two_units_in_the_last_place(eps, dtype):
    d = torch.cat([
        torch.tensor([0.0, 1e-30, 1e-10, 1e30, 0.41421356, 0.41421357, 1.0, 3e38]),
        torch.logspace(-30, 30, 3001),
        torch.rand(2000),
    ]).to(dtype)  # fmt: skip
    found = activated(d, LOG, eps)
    wide = exact(d)
    expected = np.log1p((1 - EXACT(eps)) / (wide + EXACT(eps)))
    # where nothing cancels the logarithm of the quotient is as good, and log1p itself is not near −1
    quotient = (wide + 1) / (wide + EXACT(eps))
    expected = np.where(np.abs(quotient - 1) > 0.4, np.log(quotient), expected)
    # in float64 d + 1 and d + eps are rounded, as much as log 2 is where the quotient is not near 1
    terms = np.abs(expected) + (np.abs(quotient - 1) > 0.4) * (dtype == torch.float64)
    assert_within(found, expected, terms, 4, arithmetic=dtype)
    assert activated(torch.tensor([math.inf], dtype=dtype), LOG, eps).item() == 0
    assert activated(torch.tensor([math.nan], dtype=dtype), LOG, eps).isnan().all()


def test_activations_of_negative_distances():
    """A dot product gives them. The log is what its formula gives: NaN between the poles."""
    d = torch.tensor([-1e30, -1e3, -2.0, -1.5, -1.0, -0.5, -1e-3, 0.0, math.inf, -math.inf, math.nan])
    wide = exact(d)
    with np.errstate(all="ignore"):
        expected = np.log((wide + 1) / (wide + EXACT(1e-4)))
        expected[0] = np.log1p((1 - EXACT(1e-4)) / (wide[0] + EXACT(1e-4)))
        found = activated(d, LOG, 1e-4)
        assert_within(found[:8], expected[:8], np.abs(expected[:8]) * (1 + 1e-4), 4)
        assert found[8] == 0
        assert found[10].isnan()
        assert_within(activated(d, EXP, 1.0), np.exp(-wide), np.exp(-wide), 2)
        assert_within(activated(d, RECIPROCAL, 1.0), 1 / (wide + 1), np.abs(1 / (wide + 1)), 4)
    assert torch.equal(activated(d[:-1], LINEAR, 1.0), -d[:-1])
    assert activated(d, NONE, 1.0).numel() == 0


# --- gradients --------------------------------------------------------------------------------------------------


def backward(
    x, p, distance, index, metric, grad_distance=None, grad_activation=None, activation=NONE, eps=0.1, **wanted
):
    topk = index.shape[2] if index.ndim == 3 else 1
    want = {"to_features": True, "to_prototypes": True, **wanted}
    return torch.ops.protofast.prototype_backward.native(
        grad_activation, grad_distance, x, p, distance, index, metric, activation, eps, topk, *want.values()
    )


def expected_gradients(x, p, distance, index, metric, grad_distance, grad_activation, activation, eps):
    """By loops in extended precision: for both, the sums and the sums of the magnitudes of their terms."""
    X, P, d = exact(x), exact(p), exact(distance)
    kernel = P.shape[2:] or (1,) * (X.ndim - 2)
    grid = [s - k + 1 for s, k in zip(X.shape[2:], kernel, strict=True)]
    slope = {
        NONE: lambda d: 0 * d,
        LOG: lambda d: (EXACT(eps) - 1) / ((d + 1) * (d + EXACT(eps))),
        LINEAR: lambda d: 0 * d - 1,
        EXP: lambda d: -np.exp(-d),
        RECIPROCAL: lambda d: -1 / (d + 1) ** 2,
    }[activation]
    found = [np.zeros_like(X), np.zeros_like(X), np.zeros_like(P), np.zeros_like(P)]
    P_of = P.reshape(*P.shape[:2], *kernel)
    for at in np.ndindex(index.shape):
        n = int(index[at])
        if n < 0:
            continue
        b, q = at[:2]
        start = np.unravel_index(n, grid)
        window = (b, slice(None), *(slice(s, s + k) for s, k in zip(start, kernel, strict=True)))
        patch, proto = X[window], P_of[q]
        weight = 0 if grad_distance is None else exact(grad_distance)[at]
        if grad_activation is not None:
            weight = weight + exact(grad_activation)[at] * slope(d[at])
        if metric == METRICS.index("dot"):
            parts = [(-weight * proto,), (-weight * patch,)]
        elif metric == METRICS.index("cosine"):
            xx, pp = (patch * patch).sum(), (proto * proto).sum()
            cross = -weight / np.sqrt(xx * pp) if xx * pp > 0 else 0
            own_x = weight * (1 - d[at]) / xx if xx > 0 else 0
            own_p = weight * (1 - d[at]) / pp if pp > 0 else 0
            parts = [(own_x * patch, cross * proto), (own_p * proto, cross * patch)]
        else:
            factor = 2 if metric == METRICS.index("sqeuclidean") else 1 / d[at] if d[at] else 0
            term = weight * factor * (patch - proto)
            parts = [(term,), (-term,)]
        for to, size, where, terms in (
            (found[0], found[1], window, parts[0]),
            (found[2], found[3], (q, slice(None)), [t.reshape(P[q].shape) for t in parts[1]]),
        ):
            to[where] += sum(terms)
            size[where] += sum(map(np.abs, terms))
    return found


def check_gradients(metric, dtype, sizes, kernel, depth, activation, topk, *, batch=3, count=20, layout=None):
    """Against the oracle, to the roundings of a sum of all winners (one to form a term, one to add it)."""
    metric = METRICS.index(metric) if isinstance(metric, str) else metric
    x, p = torch.randn(batch, depth, *sizes).to(dtype), torch.randn(count, depth, *kernel).to(dtype)
    grid = [s - k + 1 for s, k in zip(sizes, kernel or (1,) * len(sizes), strict=True)]
    shape = (batch, count, topk) if topk > 1 else (batch, count)
    index = torch.randint(-1, math.prod(grid), shape)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    distance, to_a, to_d = torch.rand(shape).to(real) * 2, torch.randn(shape).to(real), torch.randn(shape).to(real)
    distance[index < 0] = math.inf
    distance[0, 0] = 0
    if layout is not None:
        x = layout(x)
    eps = 0.1
    for give_a, give_d in ((to_a, to_d), (to_a, None), (None, to_d)):
        if give_a is not None and activation == NONE:
            continue
        dx, dp = backward(x, p, distance, index, metric, give_d, give_a, activation, eps)
        ex, size_x, ep, size_p = expected_gradients(x, p, distance, index, metric, give_d, give_a, activation, eps)
        assert dx.shape == x.shape
        assert dp.shape == p.shape
        assert dx.dtype == dp.dtype == dtype
        assert_within(dx, ex, size_x, count * topk + 8, arithmetic=real)
        assert_within(dp, ep, size_p, batch * topk + 16, arithmetic=real)
    none, only = backward(x, p, distance, index, metric, give_d, None, activation, eps, to_features=False)
    assert none.numel() == 0
    assert torch.equal(only, dp)
    only, none = backward(x, p, distance, index, metric, give_d, None, activation, eps, to_prototypes=False)
    assert none.numel() == 0
    assert torch.equal(only, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_gradients(metric, dtype):
    """Runs of channels and their tails, groups of samples, windows, top-k, each activation."""
    kinds = itertools.cycle((LOG, LINEAR, EXP, RECIPROCAL, NONE))
    for depth in (1, 15, 16, 17, 64, 65, 130):
        check_gradients(metric, dtype, (4, 5), (), depth, next(kinds), 1)
        check_gradients(metric, dtype, (4, 5), (2, 2), depth, next(kinds), 3)
    for batch, count in ((1, 33), (7, 2), (9, 3), (17, 1)):
        check_gradients(metric, dtype, (3, 3), (), 20, next(kinds), 2, batch=batch, count=count)
    check_gradients(metric, dtype, (2, 3, 2, 3), (1, 2, 1, 2), 5, LOG, 2)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.mT.contiguous().mT,
        expanded,
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    ):
        for depth, kernel in itertools.product((5, 70), ((), (2, 2))):
            check_gradients(metric, dtype, (4, 5), kernel, depth, LOG, 2, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_bitwise_repeatable(dtype):
    """Over runs and numbers of threads, with all winners on a few pixels."""
    for batch, count, depth, kernel, topk in ((1, 50, 70, (), 1), (9, 20, 3, (2, 2), 3), (20, 33, 300, (), 2)):
        x, p = torch.randn(batch, depth, 4, 4).to(dtype), torch.randn(count, depth, *kernel).to(dtype)
        shape = (batch, count, topk) if topk > 1 else (batch, count)
        index, distance, grad = torch.randint(0, 3, shape), torch.rand(shape), torch.randn(shape)
        for metric in range(4):
            on_threads(lambda: backward(x, p, distance, index, metric, grad, grad, LOG))  # noqa: B023
            on_threads(lambda: backward(x, p, distance, index, metric, grad, grad, LOG))  # noqa: B023


@pytest.mark.parametrize("scale", [1e-12, 1e-18, 1e-20, 1e-25, 1e18])
def test_cosine_gradients_at_any_length(scale):
    x = (torch.randn(2, 5, 3) * scale).requires_grad_()
    p = torch.randn(4, 5, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, p)]
    found = torch.autograd.grad(native(x, p, "cosine").distance.sum(), (x, p))
    expected = torch.autograd.grad(
        pf.prototype_distance(*wide, metric="cosine", backend="reference").distance.sum(), wide
    )
    for a, e in zip(found, expected, strict=True):
        assert ((a - e).abs() <= 1e-5 * e.abs().max()).all()


def test_gradient_of_what_is_not_a_number():
    """It stays with its winner."""
    x, p = torch.randn(2, 3, 4), torch.randn(5, 3)
    x[0, 1, 2] = math.nan
    for metric in METRICS:
        d, i = native(x, p, metric)
        dx, dp = backward(x, p, d, i, METRICS.index(metric), torch.ones_like(d), torch.ones_like(d), EXP)
        assert dx[0, :, 2].isnan().any()
        assert dx[1].isfinite().all()
        assert (dx[0, :, [0, 1, 3]] == 0).all()
        assert dp.isnan().any()


# --- calls past the public functions ----------------------------------------------------------------------------


def test_direct_calls_are_checked():
    """The ops themselves refuse what would read or write out of bounds."""
    search, gradient, dense = (
        getattr(torch.ops.protofast, f"prototype_{name}").native for name in ("activation", "backward", "map")
    )
    x, p = torch.randn(2, 3, 4, 5), torch.randn(6, 3)
    rest = (0, 0, 1.0, 1, 0, False)
    for bad in (p.double(), p[:, :2], p[0], p[..., None], torch.randn(6, 3, 5, 1), torch.randn(6, 3, 0, 1), p.int()):
        with pytest.raises(RuntimeError):
            search(x, bad, None, *rest)
        with pytest.raises(RuntimeError):
            dense(x, bad, 0)
    for bad in (torch.ones(2, 4), torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="mask"):
            search(x, p, bad, *rest)
    for bad in ((4, 0, 1.0, 1, 0), (0, 5, 1.0, 1, 0), (0, 0, 1.0, 0, 0), (0, 0, 1.0, 1, 5), (-1, 0, 1.0, 1, 0)):
        with pytest.raises(RuntimeError, match="out of range"):
            search(x, p, None, *bad, False)
    d, i = native(x, p)
    for name, arguments in (
        ("grad_activation", (d[:1], None, x, p, d, i)),
        ("grad_distance", (None, d.double(), x, p, d, i)),
        ("distance", (d, None, x, p, d[:, :5], i)),
        ("index", (d, None, x, p, d, i[:1])),
        ("index", (d, None, x, p, d, i.int())),
        ("prototypes", (d, None, x, p.double(), d, i)),
    ):
        with pytest.raises(RuntimeError, match=name):
            gradient(*arguments, 0, 1, 1.0, 1, True, True)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_opcheck_in_every_layout(metric):
    """Shapes, dtypes and strides are those of the fake kernels, which torch.compile relies on."""
    search, gradient, dense = (
        getattr(torch.ops.protofast, f"prototype_{name}").native for name in ("activation", "backward", "map")
    )
    kind = METRICS.index(metric)
    x = torch.randn(2, 3, 4, 5)
    for (_, a), kernel in zip([*layouts(x), ("expanded", expanded(x))], itertools.cycle(((), (2, 2)))):
        p = torch.randn(*kernel, 4, 3).movedim((-2, -1), (0, 1))
        found, d, i = search(a, p, None, kind, EXP, 1.0, 2, 0, False)
        checks = ("test_schema", "test_faketensor")
        opcheck(search, (a, p, None, kind, EXP, 1.0, 2, 0, False), test_utils=checks)
        opcheck(gradient, (found, d, a, p, d, i, kind, EXP, 1.0, 2, True, True), test_utils=checks)
        opcheck(gradient, (found, None, a, p, d, i, kind, EXP, 1.0, 2, True, False), test_utils=checks)
        opcheck(dense, (a, p, kind), test_utils=checks)


# --- images that are not noise -----------------------------------------------------------------------------------


def clusters(side):
    sign = torch.randint(0, 2, (4, 1, side, side)) * 2.0 - 1
    x = sign + 1e-3 * torch.randn(4, 64, side, side)
    return x, x.movedim(1, 3).flatten(0, 2)[:40] + 1e-5 * torch.randn(40, 64)


def background(side):
    x = torch.rand(4, 64, side, side)
    x[:, :, : side * 3 // 4] = 0.5
    return x, 0.5 + 0.01 * torch.rand(40, 64)


def outlier(side):
    x = torch.rand(4, 64, side, side)
    x[:, :, 3, 4] *= 1e3
    return x, torch.rand(40, 64)


def odd(side):
    x = torch.rand(4, 64, side, side)
    x[:, :, 3, 4] = 1e-17
    x[1, 0, 0, 1], x[2, 0, 5, 5] = torch.nan, torch.inf
    return x, torch.rand(40, 64)


def constant(side):
    return torch.ones(4, 64, side, side), torch.rand(40, 64)


@pytest.mark.parametrize("side", [7, 33])  # one block, and two
@pytest.mark.parametrize("images", [clusters, background, outlier, odd, constant], ids=lambda f: f.__name__)
def test_auto_finds_the_winner_of_the_direct_form(images, side):
    """Whatever the screen can tell: to the rounding of a float32 sum of 64 squares, by index among equal patches."""
    x, p = images(side)
    d, i = native(x, p)
    true_d, true_i = pf.prototype_distance(x, p, backend="reference")
    same = i == true_i
    limit = (64 / lanes(torch.float32) + 12) * 2.0**-23 * true_d
    assert ((d - true_d).abs() <= limit)[~true_d.isnan()].all()
    assert torch.equal(d.isnan(), true_d.isnan())
    assert same[true_d.isnan()].all()
    if images in (background, outlier, constant):
        assert same.all()
    assert torch.equal(native(x, p, verify=True).index, true_i)
    few, true_few = (pf.prototype_distance(x, p, topk=5, verify=True, backend=b) for b in ("native", "reference"))
    assert torch.equal(few.index, true_few.index)


def _as_large_as_audioprotopnet() -> tuple[int, bool]:
    """How much memory the search of 200,000 prototypes took beyond its inputs, and whether some winners are right."""
    import resource

    x, p = torch.rand(1, 1024, 20, 20), torch.rand(200_000, 1024)
    pf.prototype_activation(x[:, :, :2, :2], p[:100])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = pf.prototype_activation(x, p)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    some = torch.tensor([0, 77_777, 199_999])
    true = pf.prototype_distance(x, p[some], backend="reference")
    return extra, torch.equal(found.index[:, some], true.index)


@pytest.mark.slow
def test_as_many_prototypes_as_audioprotopnet():
    extra, right = run_fresh(_as_large_as_audioprotopnet)
    assert right
    assert extra < 64 << 20


def test_map_gradient_in_steps(monkeypatch):
    x, p = torch.randn(5, 3, 6, 7), torch.randn(4, 3, 2, 2)
    weight = torch.randn(5, 4, 5, 6)

    def gradients():
        leaves = x.clone().requires_grad_(), p.clone().requires_grad_()
        return torch.autograd.grad(pf.prototype_map(*leaves), leaves, weight)

    whole = gradients()
    monkeypatch.setattr(_ops.prototype, "_MAP_ELEMENTS", 300)
    for a, b in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
