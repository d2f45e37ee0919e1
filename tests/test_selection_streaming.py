"""k-center in one pass: its certificate and factor against optima by enumeration, batches, breaks, and memory."""

import itertools
import math
import re
import resource
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.fresh import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import protofast as pf
from protofast.selection import StreamingKCenter, coreset, inputs, stream_k_center, streaming

OPS = ("relax", "k_center")
METRICS = ("euclidean", "sqeuclidean", "cosine", "manhattan")
FIELDS = ("points", "indices", "sizes", "objective", "bound")


def distances(x, metric):
    """n × n, straight from the definition."""
    x = np.asarray(x, dtype=np.float64)
    if metric == "cosine":
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.hstack([x / np.where(norm > 0, norm, 1), norm == 0])
    gaps = np.abs(x[:, None] - x)
    if metric == "manhattan":
        return gaps.sum(-1)
    squares = (gaps**2).sum(-1)
    return {"euclidean": np.sqrt(squares), "sqeuclidean": squares, "cosine": squares / 2}[metric]


def optimum(d, k):
    return min(d[list(chosen)].min(0).max() for chosen in itertools.combinations(range(len(d)), k))


def check(x, k, metric, size, best, **options):
    """The certificate is right, and as good as proven; the points are those of the stream."""
    found = stream_k_center(x, k, metric=metric, coreset=size, **options)
    d = distances(x, metric)
    chosen = found.indices.tolist()
    assert len(set(chosen)) == k == len(found)
    np.testing.assert_array_equal(found.points, x[chosen])
    assert int(found.sizes.sum()) == found.seen == len(x)
    slack = 1e-12 * d.max()
    assert d[chosen].min(0).max() <= found.objective + slack
    assert found.bound <= best + slack
    assert found.objective <= (64 if metric in ("sqeuclidean", "cosine") else 8) * found.bound + slack
    return found


def cloud(kind, n=11, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.standard_normal((n, 2))
    if kind == "lattice":
        return rng.integers(-2, 3, (n, 2)).astype(float)
    if kind == "line":
        return np.arange(n, dtype=float)[:, None] * [1.0, 2.0]
    if kind == "powers":  # every point is as far from all before it as they are from each other, and farther
        return np.array([[2.0**i, 1.0] for i in range(n)])
    if kind == "slow powers":
        return np.array([[1.3**i, 0.0] for i in range(n)])
    if kind == "simplex":  # all the same distance apart
        return np.eye(n)
    if kind == "copies":
        return rng.integers(0, 2, (n, 2)).astype(float)
    return np.full((n, 2), 3.0)


KINDS = ("normal", "lattice", "line", "powers", "slow powers", "simplex", "copies", "equal")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_certificate_and_factor_in_every_order(metric, kind):
    x = cloud(kind)
    n = len(x)
    orders = (np.arange(n), np.arange(n)[::-1], np.random.default_rng(1).permutation(n), np.roll(np.arange(n), n // 2))
    for k in (1, 2, 3):
        best = optimum(distances(x, metric), k)
        for order in orders:
            for size in (k, k + 1, 3 * k):
                check(x[order], k, metric, size, best)


def nested(seed):
    """Clusters of clusters: half the points are close together, or far apart, beside the others."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 3, (11, 3)) * [1.0, 100.0, 1e4]).sum(1, keepdims=True) + rng.random((11, 2)) / 10


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_what_the_proof_builds_on(metric, size):
    for x in [*map(cloud, KINDS), *map(nested, range(20))]:
        d, stream = distances(x, metric), StreamingKCenter(2, metric=metric, coreset=size)
        for row in x:
            stream.update(row[None])
            state = stream._state
            rows, reach = state.rows[: state.count].numpy(), state.reach[: state.count].numpy()
            assert len(rows) <= size
            assert rows[0] == 0
            assert (d[np.ix_(rows, rows)] > state.apart * (1 - 1e-12))[~np.eye(len(rows), dtype=bool)].all()
            assert reach.max() <= 2 * state.apart
            assert ((d[rows, : stream.seen] - reach[:, None]).min(0) <= 1e-12 * d.max()).all()
        least = optimum(d, size)
        assert reach.max() <= 8 * least * (1 + 1e-12)
        assert stream.result().objective <= (2 * optimum(d, 2) + 8 * least) * (1 + 1e-12)


@st.composite
def streams(draw):
    n, d = draw(st.integers(1, 10)), draw(st.integers(1, 2))
    reach = draw(st.sampled_from([1, 3, 40]))
    x = draw(st.lists(st.integers(-reach, reach), min_size=n * d, max_size=n * d))
    k = draw(st.integers(1, min(n, 4)))
    return np.array(x, dtype=np.float64).reshape(n, d), k, draw(st.integers(k, 2 * k + 1))


@given(stream=streams(), metric=st.sampled_from(METRICS))
def test_certificate_and_factor_on_lattices(stream, metric):
    x, k, size = stream
    check(x, k, metric, size, optimum(distances(x, metric), k))


@pytest.mark.parametrize("metric", METRICS)
def test_certificate_on_longer_streams(metric):
    """Many rounds of making room: against the real radius, and the bound that greedy on all rows proves."""
    rng = np.random.default_rng(2)
    growing = rng.standard_normal((3000, 3)) * np.linspace(0.01, 100, 3000)[:, None] ** 2
    for x in (growing, growing[::-1].copy(), rng.integers(0, 30, (3000, 2)).astype(float), rng.random((3000, 1))):
        for size in (8, 20, 64):
            found = stream_k_center(x, 8, metric=metric, coreset=size)
            every = pf.k_center(x, 8, metric=metric)
            real = pf.k_center(x, 8, metric=metric, initial=found.indices).objective
            squared = metric in ("sqeuclidean", "cosine")
            assert real <= found.objective * (1 + 1e-12)
            assert found.bound <= every.objective
            assert found.objective <= (64 if squared else 8) * found.bound
            assert int(found.sizes.sum()) == 3000
            if size == 64:
                assert real <= (4 if squared else 2) * every.objective


def test_one_center_is_certified_exactly():
    x = torch.randn(2000, 50)
    found = stream_k_center(x, 1, coreset=20)
    assert found.indices.tolist() == [0]
    assert found.objective == pf.k_center(x, 1).objective


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "lattice", "copies", "equal"])
def test_is_greedy_on_all_rows_while_they_fit(metric, kind):
    x = cloud(kind, 40)
    for k in (1, 3, 11, 40):
        size = max(k, len(np.unique(x, axis=0)))
        found, plain = stream_k_center(x, k, metric=metric, coreset=size), pf.k_center(x, k, metric=metric)
        assert found.indices.tolist() == plain.indices.tolist()
        np.testing.assert_allclose(found.objective, plain.objective, rtol=1e-15)
        if k <= len(np.unique(x, axis=0)) and metric != "cosine":
            assert found.sizes.tolist() == np.bincount(plain.labels, minlength=k).tolist()


def test_fewer_in_the_coreset_than_k():
    """All rows the same distance apart go into one point at once; k rows are returned all the same."""
    found = stream_k_center(np.eye(9), 4, coreset=4)
    assert sorted(found.sizes.tolist()) == [0, 0, 0, 9] or 0 not in found.sizes.tolist()
    assert len(set(found.indices.tolist())) == 4


def same(a, b):
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    assert a.seen == b.seen


@pytest.mark.parametrize("metric", METRICS)
def test_batches_change_nothing(place, metric):
    backend, device = place
    rng = np.random.default_rng(3)
    x = torch.from_numpy(np.round(rng.standard_normal((900, 3)) * np.linspace(1, 9, 900)[:, None])).to(device)
    options = {"metric": metric, "coreset": 24, "backend": backend}
    whole = stream_k_center(x, 6, **options)
    cuts = np.sort(rng.integers(0, 900, 40))  # empty ones too
    for batches in (x.split(1)[:90] + x[90:].split(299), x.tensor_split(cuts.tolist())):
        same(stream_k_center(iter(batches), 6, **options), whole)
    plain = stream_k_center(x.cpu(), 6, **{**options, "backend": "reference"})
    assert whole.points.device == x.device
    assert plain.indices.tolist() == whole.indices.tolist()
    torch.testing.assert_close(whole.objective.cpu(), plain.objective, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "uint8"])
def test_dtypes_at_their_own_values(dtype):
    x = (torch.randn(500, 4) * 20 + 100).to(getattr(torch, dtype))
    found, exact = (stream_k_center(one, 5, coreset=20) for one in (x, x.double()))
    assert found.indices.tolist() == exact.indices.tolist()
    assert found.objective == exact.objective
    assert found.points.dtype == (x.dtype if x.is_floating_point() else torch.float64)


def test_kinds_of_batches():
    x = torch.randn(700, 3)
    whole = stream_k_center(x, 5, coreset=20)
    same(stream_k_center(x.numpy(), 5, coreset=20), whole)
    same(stream_k_center((part.numpy() for part in x.split(64)), 5, coreset=20), whole)
    same(stream_k_center(DataLoader(TensorDataset(x), batch_size=64), 5, coreset=20), whole)
    same(stream_k_center(DataLoader(TensorDataset(x, torch.arange(700)), batch_size=64), 5, coreset=20), whole)
    same(stream_k_center(DataLoader(x, batch_size=64), 5, coreset=20, total=700), whole)
    stream = StreamingKCenter(5, coreset=20)
    buffer = torch.empty(70, 3)  # filled again and again, as a reader may do
    for part in x.requires_grad_().split(70):
        stream.update(buffer.copy_(part.detach()))
    assert stream.seen == 700
    same(stream.result(), whole)


@pytest.mark.parametrize("metric", METRICS)
def test_no_dimensions_and_one_row(metric):
    found = stream_k_center(torch.empty(5, 0), 3, metric=metric)
    assert found.indices.tolist() == [0, 1, 2]
    assert (found.objective, found.bound) == (0, 0)
    assert stream_k_center(torch.ones(1, 2), 1, metric=metric).indices.tolist() == [0]


def test_zero_vectors_under_cosine():
    x = torch.tensor([[1.0, 0], [0, 0], [2, 0], [0, 0], [0, 8]], dtype=torch.float64)
    found = stream_k_center(x, 3, metric="cosine")
    assert found.indices.tolist() == [0, 1, 4]
    assert found.objective == 0
    check(x.numpy(), 1, "cosine", 1, 1.0)


@pytest.mark.parametrize("scale", [1e-40, 1e12, 1e149])
def test_far_and_near_points(scale):
    x = cloud("normal") * scale
    check(x, 2, "euclidean", 3, optimum(distances(x / scale, "euclidean"), 2) * scale)


# --- breaks ---------------------------------------------------------------------------------------------------------


ROWS = torch.randn(3000, 3, generator=torch.Generator().manual_seed(5)) * torch.linspace(1, 9, 3000)[:, None]
OPTIONS = {"k": 6, "coreset": 24}


def broken_off(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise KeyboardInterrupt
        yield batch


@pytest.mark.parametrize("after", [0, 1, 7, 29])
def test_goes_on_after_an_interrupt(tmp_path, after):
    path = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        stream_k_center(broken_off(ROWS.split(100), after), **OPTIONS, checkpoint=path)
    stream = StreamingKCenter(**OPTIONS)
    stream.load(path)
    assert stream.seen == 100 * after
    whole = stream_k_center(ROWS, **OPTIONS)
    same(stream_k_center(iter(ROWS.split(77)), **OPTIONS, checkpoint=path), whole)
    same(stream_k_center(ROWS, **OPTIONS, checkpoint=path), whole)  # all seen: nothing more to do
    more = torch.cat([ROWS, ROWS * 3])
    same(stream_k_center(more, **OPTIONS, checkpoint=path), stream_k_center(more, **OPTIONS))


def test_interrupt_inside_a_batch(tmp_path, monkeypatch):
    path, calls, take = tmp_path / "state", 0, coreset.Doubling.take

    def interrupted(self, state, x):
        nonlocal calls
        calls += 1
        after = take(self, state, x)  # has written into its tables
        if calls == 4:
            raise KeyboardInterrupt
        return after

    monkeypatch.setattr(coreset.Doubling, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream_k_center(ROWS, **OPTIONS, checkpoint=path)
    monkeypatch.undo()
    stream = StreamingKCenter(**OPTIONS)
    stream.load(path)
    assert 0 < stream.seen < 3000
    same(stream_k_center(ROWS, **OPTIONS, checkpoint=path), stream_k_center(ROWS, **OPTIONS))


def test_checkpoints_on_the_way(tmp_path, monkeypatch):
    path, seen = tmp_path / "state", []

    def batches():
        for batch in ROWS.split(500):
            stream = StreamingKCenter(**OPTIONS)
            stream.load(path)
            seen.append(stream.seen)
            yield batch

    stream_k_center(batches(), **OPTIONS, checkpoint=path)
    assert seen == [0] * 6  # half a minute has not gone by
    path.unlink()
    monkeypatch.setattr(streaming, "CHECKPOINT_SECONDS", 0)
    stream_k_center(batches(), **OPTIONS, checkpoint=path)
    assert seen[6:] == [0, 500, 1000, 1500, 2000, 2500]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int16])
def test_a_state_saved_and_loaded_is_the_same(tmp_path, dtype):
    x = (ROWS * 3).to(dtype)
    stream, again = StreamingKCenter(**OPTIONS), StreamingKCenter(**OPTIONS)
    stream.update(x[:1234])
    stream.save(tmp_path / "state")
    again.load(tmp_path / "state")
    same(again.result(), stream.result())
    stream.update(x[1234:])
    again.update(x[1234:])
    same(again.result(), stream.result())


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "state"
    whole = stream_k_center(ROWS, **OPTIONS, checkpoint=path)
    for other, words in (
        ({"k": 5}, "was made with k=6, but k is 5"),
        ({"coreset": 30}, "coreset=24, but coreset is 30"),
        ({"metric": "cosine"}, "metric='euclidean', but metric is 'cosine'"),
    ):
        with pytest.raises(ValueError, match=words):
            stream_k_center(ROWS, **{**OPTIONS, **other}, checkpoint=path)
    for stream, words in (
        (ROWS + 1, "another stream"),
        (ROWS[:2000], "has seen 3000 rows, but batches has 2000"),
        ([], "has seen 3000 rows, but batches has 0"),
    ):
        with pytest.raises(ValueError, match=words):
            stream_k_center(stream, **OPTIONS, checkpoint=path)
    with pytest.raises(ValueError, match=r"shape \(3000, 2\), but the rows before it have 3 columns"):
        stream_k_center(ROWS[:, :2], **OPTIONS, checkpoint=path)
    with pytest.raises(TypeError, match=r"float64, but the rows before it are torch\.float32"):
        stream_k_center(ROWS.double(), **OPTIONS, checkpoint=path)
    same(stream_k_center(ROWS, **OPTIONS, checkpoint=path), whole)  # none of them has harmed it
    kept = path.read_bytes()
    path.write_bytes(kept[:-100])
    with pytest.raises(ValueError, match="damaged"):
        stream_k_center(ROWS, **OPTIONS, checkpoint=path)
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        stream_k_center(ROWS, **OPTIONS, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_found_at_once(tmp_path):
    def never():
        raise AssertionError
        yield

    with pytest.raises(OSError):  # noqa: PT011 — which one depends on the system
        stream_k_center(never(), **OPTIONS, checkpoint=tmp_path)


def test_progress(monkeypatch):
    log = []

    @contextmanager
    def bars(show):
        log.append(show)
        yield lambda description, total, done: log.append((total, done)) or (lambda count: log.append(count))

    monkeypatch.setattr(streaming, "bars", bars)
    stream_k_center(iter(ROWS.split(1000)), **OPTIONS, progress=True, total=3000)
    stream_k_center(ROWS, **OPTIONS)
    assert log == [True, (3000, 0), 1000, 1000, 1000, False, (3000, 0), 3000]


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_bad_numbers_are_refused_with_their_row_in_the_stream(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(inputs, "NUMBERS", 64)
    x = torch.randn(500, 3, dtype=torch.float64)
    x[321, 2] = bad
    stream = StreamingKCenter(3)
    stream.update(x[:150])
    with pytest.raises(ValueError, match=r"the stream holds \S+ in row 321, column 2; give finite"):
        stream.update(x[150:])
    assert stream.seen == 150
    with pytest.raises(ValueError, match="row 321, column 2"):
        stream_k_center(x.split(100), 3, checkpoint=tmp_path / "state")
    x[321] = 0
    same(stream_k_center(x, 3, checkpoint=tmp_path / "state"), stream_k_center(x, 3))


def test_points_are_checked_block_by_block(monkeypatch):
    monkeypatch.setattr(inputs, "NUMBERS", 64)
    x = np.zeros((500, 3))
    x[321, 2] = math.nan
    with pytest.raises(ValueError, match="points holds nan in row 321, column 2"):
        pf.k_center(x, 2)
    assert pf.k_center(x, 2, mask=np.arange(500) != 321).objective == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: stream_k_center([], 1), ValueError, "k is 1, but the stream had 0 rows"),
        (lambda: stream_k_center(torch.empty(0, 3), 1), ValueError, "k is 1, but the stream had 0 rows"),
        (lambda: stream_k_center(ROWS[:5], 6), ValueError, "k is 6, but the stream had 5 rows"),
        (lambda: stream_k_center(ROWS, 0), ValueError, "k is 0; give at least 1"),
        (lambda: stream_k_center(ROWS, 1.5), TypeError, "k is 1.5; give an integer"),
        (lambda: stream_k_center(ROWS, 3, coreset=2), ValueError, "coreset is 2; give at least 3"),
        (lambda: stream_k_center(ROWS, 3, metric="l2"), ValueError, "metric is 'l2'"),
        (lambda: stream_k_center(ROWS, 3, metric="precomputed"), ValueError, "metric is 'precomputed'"),
        (lambda: stream_k_center(ROWS, 3, backend="magic"), ValueError, "magic"),
        (lambda: stream_k_center(7, 3), TypeError, "batches is a int; give an iterable"),
        (lambda: stream_k_center(ROWS[0], 3), ValueError, r"batches has shape \(3,\)"),
        (lambda: stream_k_center([ROWS, ROWS[0]], 3), ValueError, r"batch at row 3000 has shape \(3,\); give \(b, d\)"),
        (lambda: stream_k_center([ROWS, ROWS[0, 0]], 3), ValueError, r"batch at row 3000 has shape \(\)"),
        (lambda: stream_k_center([ROWS, ROWS[:, :2]], 3), ValueError, r"row 3000 has shape \(3000, 2\), but .* 3 col"),
        (lambda: stream_k_center([ROWS, ROWS.half()], 3), TypeError, "row 3000 is torch.float16, but .* torch.float32"),
        (lambda: stream_k_center([ROWS * 1j], 3), TypeError, "row 0 is torch.complex64"),
        (lambda: stream_k_center([[[1.0, 2.0]]], 1), TypeError, "a batch is a list; give a tensor or a numpy array"),
        (lambda: stream_k_center([{"x": ROWS}], 1), TypeError, "a batch is a dict"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_errors_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'protofast[data]'")):
        stream_k_center(iter(()), 3, checkpoint=tmp_path / "state")


# --- larger than memory ---------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_mapped_files_are_shared(tmp_path):
    np.save(tmp_path / "x.npy", ROWS.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inputs.tensor("points", mapped).data_ptr() == mapped.ctypes.data
        assert torch.equal(pf.k_center(mapped, 5).indices, pf.k_center(ROWS, 5).indices)
        same(stream_k_center(mapped, **OPTIONS), stream_k_center(ROWS, **OPTIONS))


def limit_memory(more):
    """Of this process, to `more` bytes than it has. Files mapped for reading do not count."""
    status = open("/proc/self/status").read()  # noqa: SIM115
    now = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, now + more))


def choose_from_mapped(limit, long, wide):
    torch.set_num_threads(1)
    pf.k_center(torch.randn(100, 8), 3)  # what is loaded on first use
    stream_k_center(torch.randn(100, 8), 5, coreset=40)
    long, wide = (np.load(path, mmap_mode="r") for path in (long, wide))
    limit_memory(limit)
    for mapped in (long, wide):
        with pytest.raises(MemoryError):
            mapped.copy()
    found = stream_k_center(long, 5, coreset=40)
    return found.indices.tolist(), float(found.objective), found.seen, pf.k_center(wide, 3).indices.tolist()


def test_mapped_files_are_not_copied(tmp_path):
    """In 48 MiB: 2,000,000 × 8 streamed (122 MiB), and k_center of 256 MiB, zeros that take no room on the disk."""
    long, wide = tmp_path / "long.npy", tmp_path / "wide.npy"
    x = np.lib.format.open_memmap(long, "w+", np.float64, (2_000_000, 8))
    rng = np.random.default_rng(0)
    for start in range(0, len(x), 100_000):
        x[start : start + 100_000] = rng.random((100_000, 8))
    x.flush()
    zeros = np.lib.format.open_memmap(wide, "w+", np.float32, (1 << 16, 1 << 10))
    zeros[4321, 5], zeros[54321, 6] = 2, 3
    zeros.flush()
    indices, objective, seen, chosen = run_fresh(choose_from_mapped, 48 * MIB, long, wide)
    assert chosen == [0, 54321, 4321]
    assert seen == 2_000_000
    centers = x[indices]
    for part in np.array_split(x, 200):
        assert ((part[:, None] - centers) ** 2).sum(-1).min(1).max() <= objective**2
