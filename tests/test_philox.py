"""The counter generator of normal noise: known answers, the same bits on every backend, accuracy, statistics."""

import math

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, exact, unit
from helpers.layouts import expanded, layouts
from helpers.poison import poison
from scipy import stats

from protofast import DDIMSchedule, ddim_step
from protofast._backend import overload
from protofast.backends.reference.philox import box_muller as reference_box_muller
from protofast.diffusion import normal_noise

OPS = ("philox_normal",)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALL = 2**32 - 1


# The oracle: Philox in Python's integers, one block at a time, and the polynomials in numpy's float32.


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        even, odd = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [odd >> 32 ^ c[1] ^ k[0], odd & ALL, even >> 32 ^ c[3] ^ k[1], even & ALL]
        k = [(k[0] + 0x9E3779B9) & ALL, (k[1] + 0xBB67AE85) & ALL]
    return c


def words(seed, offset, shape):
    """The random words (B, blocks, 4) that samples of `shape` are made of."""
    blocks = -(-math.prod(shape[1:]) // 4)
    drawn = [
        philox((i & ALL, i >> 32, n & ALL, n >> 32), (seed & ALL, seed >> 32))
        for n in ((offset + b) % 2**64 for b in range(shape[0]))
        for i in range(blocks)
    ]
    return np.array(drawn, np.uint32).reshape(shape[0], blocks, 4)


LOG = [
    -0.07634499669075012, 0.1276157796382904, -0.13160182535648346, 0.14201757311820984,
    -0.16623356938362122, 0.20001226663589478, -0.2500081956386566, 0.3333333134651184,
]  # fmt: skip
SIN = [-0.0001951729936990887, 0.008332177996635437, -0.16666655242443085]
COS = [2.4438451873720624e-05, -0.001388736767694354, 0.04166664555668831]


def horner(coefficients, at):
    value = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * at + np.float32(coefficient)
    return value


def uniform(radius):
    return radius.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)


def quarter(angle):
    """Quadrant, and the signed 32-bit fraction of π/4 that is added to it."""
    return angle >> np.uint32(30), (angle << np.uint32(2)).view(np.int32)


def box_muller(radius, angle):
    """Two float32 normal numbers of two words, every operation rounded."""
    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    mantissa, exponent = np.frexp(uniform(radius))  # mantissa in [½, 1)
    low = mantissa <= np.float32(1.41421356) / two
    g = np.where(low, mantissa * two, mantissa) - one
    e = (exponent - low).astype(np.float32)
    tail = horner(LOG, g) * g * (g * g) + e * np.float32(-2.12194440e-4) - g * g * half
    r = np.sqrt((g + tail + e * np.float32(0.693359375)) * -two)
    quadrant, turn = quarter(angle)
    phi = turn.astype(np.float32) * np.float32(math.pi / 2**33)
    y = phi * phi
    sine, cosine = horner(SIN, y) * y * phi + phi, horner(COS, y) * y * y - y * half + one
    cos = np.choose(quadrant, [cosine, -sine, -cosine, sine])
    sin = np.choose(quadrant, [sine, cosine, -sine, -cosine])
    return r * cos, r * sin


def oracle(seed, offset, shape):
    w = words(seed, offset, shape)
    pairs = *box_muller(w[..., 0], w[..., 1]), *box_muller(w[..., 2], w[..., 3])
    flat = np.stack(pairs, -1).reshape(shape[0], 4 * w.shape[1])[:, : math.prod(shape[1:])]
    assert flat.dtype == np.float32
    return torch.from_numpy(flat.reshape(shape))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    """Random123's, for the oracle; the backends have to agree with that."""
    counter, key = ([int(word, 16) for word in text.split()] for text in (counter, key))
    assert philox(counter, key) == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (1, 0), (7, 3), (2**32 - 1, 2**32 - 2), (2**32, 2**32), (2**40 + 5, 2**63 - 3), (2**63 - 1, 2**33 + 1)],
)
def test_bits_are_those_of_the_oracle(backend, device, seed, offset):
    for shape in [(3, 5), (2, 3, 7, 5), (1, 4), (4, 1), (5,), (2, 1027)]:
        like = torch.empty(shape, device=device)
        with poison():
            found = normal_noise(like, (seed, offset), backend=backend)
        assert torch.equal(found.cpu().view(torch.int32), oracle(seed, offset, shape).view(torch.int32))
    assert torch.equal(normal_noise(like, seed, backend=backend), normal_noise(like, (seed, 0), backend=backend))


@pytest.mark.parametrize("offset", [2**32 - 2, 2**63 - 2, 2**64 - 2])
def test_offset_carries_and_wraps(backend, device, offset):
    """Sample n is number offset + n, of 64 bits without a sign; so is the seed, both as tensors."""
    signed = [value - 2**64 if value >= 2**63 else value for value in (2**64 - 5, offset)]
    found = normal_noise(torch.empty(4, 9, device=device), torch.tensor(signed, device=device), backend=backend)
    assert torch.equal(found.cpu(), oracle(2**64 - 5, offset, (4, 9)))
    wrapped = oracle(2**64 - 5, (offset + 2) % 2**64, (2, 9))
    assert torch.equal(found[2:].cpu(), wrapped)
    assert len({tuple(row.tolist()) for row in found}) == 4


def test_seed_and_offset_select_the_stream(backend, device):
    like = torch.empty(8, 40, device=device)
    whole = normal_noise(like, (5, 100), backend=backend)
    for part in (slice(0, 3), slice(3, 8), slice(7, 8)):
        assert torch.equal(normal_noise(like[part], (5, 100 + part.start), backend=backend), whole[part])
    # Neither the batch nor what follows in a sample matters.
    assert torch.equal(normal_noise(like[:, :7], (5, 100), backend=backend), whole[:, :7])
    rows = torch.cat([whole, *(normal_noise(like, s, backend=backend) for s in ((6, 100), (5, 200), (2**32 + 5, 100)))])
    assert rows.unique().numel() > 0.999 * rows.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_dtype_do_not_matter(backend, device, dtype):
    shape = (3, 4, 5, 7)
    expected = oracle(11, 2, shape).to(dtype)
    for name, like in layouts(torch.full(shape, math.nan, dtype=dtype, device=device)):
        found = normal_noise(like, (11, 2), backend=backend)
        assert found.stride() == torch.empty_like(like).stride(), name
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), expected), name
    found = normal_noise(expanded(like), (11, 2), backend=backend)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4), (1,), (1, 1, 1, 1)], ids=str)
def test_empty_and_one_element(backend, device, shape):
    found = normal_noise(torch.empty(shape, device=device), 3, backend=backend)
    assert found.shape == shape
    assert torch.equal(found.cpu(), oracle(3, 0, shape))


def test_leaves_torch_random_state_alone(backend, device):
    like = torch.zeros(2, 3, device=device).requires_grad_()
    before = torch.get_rng_state()
    first, second = (normal_noise(like, 3, backend=backend) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not first.requires_grad


def edge_words():
    """Radius and angle words of every size and from both ends."""
    rng = np.random.default_rng(0)
    count = 1 << 17
    small = rng.integers(0, 2**10, count) << rng.integers(0, 23, count)
    root = 3037000500 + 256 * np.arange(-500, 500)  # √½ · 2³², where the logarithm changes its form
    radius = np.concatenate([rng.integers(0, 2**32, count), small, ALL - small, root, [0, 1, ALL]])
    angle = np.concatenate([small, rng.integers(0, 2**32, count), small ^ 1 << 30, small[:1000], [0, 1 << 29, ALL]])
    return radius.astype(np.uint32), angle.astype(np.uint32)


def test_many_bits(backend, device, draws):
    """Words that few numbers are made of, such as small ones."""
    edge = edge_words()
    if backend == "reference":
        found = reference_box_muller(*(torch.from_numpy(word.astype(np.int64)) for word in edge))
        for ours, expected in zip(found, box_muller(*edge), strict=True):
            assert torch.equal(ours.view(torch.int32), torch.from_numpy(expected).view(torch.int32))
    rows = 16 if (backend, device) == ("triton", "cpu") else 256  # interpreted
    found = normal_noise(torch.empty(rows, 4096, device=device), 2026, backend=backend)
    assert torch.equal(found.cpu(), torch.from_numpy(draws[:rows]).float())


def test_accuracy_of_the_transform():
    """Against log, sin and cos in extended precision, for words of every size.

    In unit roundoffs, to first order: the logarithm has 2 (two sums) and ½ (polynomial, its tail's roundings), of which
    the root keeps half and adds 1; the angle has 1 (word to float32), 1 (product) and ½ (constant), which sine and
    cosine on [−π/4, π/4] do not enlarge, and 1 (last sum) with ½ (polynomial); the product 1. That is below 7½.
    """
    radius, angle = edge_words()
    z = [torch.from_numpy(v) for v in box_muller(radius, angle)]  # as every backend has it
    quadrant, turn = quarter(angle)
    phi = turn * (EXACT(math.pi) + EXACT(1.2246467991473532e-16)) / 2**33
    r = np.sqrt(-2 * np.log(uniform(radius).astype(EXACT)))
    cos, sin = np.cos(phi), np.sin(phi)
    expected = r * np.choose(quadrant, [cos, -sin, -cos, sin]), r * np.choose(quadrant, [sin, cos, -sin, -cos])
    for found, value in zip(z, expected, strict=True):
        error = abs(exact(found) - value)
        assert (error <= 7.5 * unit(torch.float32) * abs(value)).all()
    # The largest that can come out, and the uniform's own rounding: at most one unit roundoff.
    assert r.max() < math.sqrt(66 * math.log(2)) * (1 + 1e-6)
    middle = (radius.astype(EXACT) + EXACT(0.5)) / 2**32
    assert (abs(uniform(radius).astype(EXACT) - middle) <= 2 * unit(torch.float32) * middle).all()


# Statistics. The draws are fixed, so each test passes or fails for good; p below 0.001 is a failure.


@pytest.fixture(scope="module")
def draws():
    """Numbers (256 samples, 4096), of the reference: the others have the same bits."""
    return normal_noise(torch.empty(256, 4096), 2026, backend="reference").double().numpy()


def assert_likely(statistic):
    """`statistic` is standard normal if all is well."""
    assert abs(statistic) < stats.norm.isf(0.0005), statistic


def test_distribution(draws):
    flat = draws.ravel()
    assert stats.kstest(flat, "norm").pvalue > 0.001
    edges = stats.norm.ppf(np.linspace(0, 1, 257))
    counts = np.histogram(flat, edges)[0]
    assert stats.chisquare(counts).pvalue > 0.001
    for part in range(4):  # each place in a block, being a cosine or sine of one pair of words
        assert stats.kstest(draws[:, part::4].ravel(), "norm").pvalue > 0.001


def test_moments(draws):
    flat = draws.ravel()
    for power in range(1, 9):
        mean, square = stats.norm.moment(power), stats.norm.moment(2 * power)
        assert_likely((np.mean(flat**power) - mean) / math.sqrt((square - mean**2) / flat.size))
    means, squares = draws.mean(1) * 64, ((draws**2).mean(1) - 1) * 64 / math.sqrt(2)
    assert stats.kstest(means, "norm").pvalue > 0.001
    assert stats.kstest(squares, "norm").pvalue > 0.001


@pytest.mark.parametrize("limit", [2.0, 3.0, 4.0, 4.75])
def test_tails(draws, limit):
    for tail in (draws > limit, draws < -limit):
        assert stats.binomtest(int(tail.sum()), tail.size, stats.norm.sf(limit)).pvalue > 0.001


@pytest.mark.parametrize("function", [lambda z: z, lambda z: z**2 - 1, np.abs], ids=["value", "square", "size"])
def test_no_correlation_within_and_between_streams(draws, function):
    """Also of squares: the two numbers of a pair share a radius, whose squares would show it."""

    def likely(a, b):
        assert_likely(np.corrcoef(a.ravel(), b.ravel())[0, 1] * math.sqrt(a.size))

    z = function(draws)
    for lag in range(1, 9):
        likely(z[:, :-lag], z[:, lag:])  # along a sample
        likely(z[:-lag], z[lag:])  # from sample to sample
    for part in range(1, 4):
        likely(z[:, ::4], z[:, part::4])
    for seed in ((2027, 0), (2026 + 2**32, 0), (2026, 2**32)):
        other = normal_noise(torch.empty(64, 4096), seed, backend="reference").double().numpy()
        likely(z[:64], function(other))


# As an op


def test_opcheck_and_compile(backend, device):
    op = overload("philox_normal", device, backend)
    seed = torch.tensor([3, 4], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for like in (torch.zeros(2, 5, device=device), torch.zeros(2, 5, device=device).half().mT.contiguous().mT):
        torch.library.opcheck(op, (like, seed), test_utils=tests)
    torch._dynamo.reset()
    noise = torch.compile(lambda x, s: normal_noise(x, s, backend=backend) * 2, fullgraph=True, backend="aot_eager")
    for given in (3, 4, 5, (3, 2**40), seed):
        assert torch.equal(noise(like, given), normal_noise(like, given, backend=backend) * 2)


def test_seed_tensors_stay_on_the_device():
    """Reading a value on the host would wait for a GPU and break its graph capture."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
            return func(*args, **(kwargs or {}))

    with NoReads():
        normal_noise(torch.empty(2, 3), torch.tensor([3, 4]), backend="reference")


X = torch.zeros(2, 3)
BAD = {
    "like": ([1.0], 0, TypeError, "like is a list; give a torch tensor"),
    "integer": (X.int(), 0, TypeError, r"like is torch.int32 of shape \(2, 3\)"),
    "scalar": (X[0, 0], 0, TypeError, r"like is torch.float32 of shape \(\)"),
    "negative": (X, -1, ValueError, r"seed is -1; give an int from 0 to 2\*\*63 − 1"),
    "large": (X, 2**63, ValueError, "seed is 9223372036854775808"),
    "offset": (X, (0, -1), ValueError, r"seed is \(0, -1\)"),
    "float": (X, 1.0, ValueError, "seed is 1.0"),
    "none": (X, None, ValueError, "seed is None"),
    "three": (X, (1, 2, 3), ValueError, r"seed is \(1, 2, 3\)"),
    "one": (X, (1,), ValueError, r"seed is \(1,\)"),
    "dtype": (X, torch.tensor([1, 2], dtype=torch.int32), ValueError, r"seed is torch.int32 \(2,\) on cpu"),
    "shape": (X, torch.tensor(1), ValueError, r"seed is torch.int64 \(\) on cpu; give .* tensor \(2,\) on cpu"),
    "device": (X, torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "on meta; .* on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    like, seed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        normal_noise(like, seed)
    if case not in ("like", "integer", "scalar", "none"):
        with pytest.raises(error, match=message):
            ddim_step(like, like, 5, 4, DDIMSchedule.linear(10), eta=0.5, seed=seed)
