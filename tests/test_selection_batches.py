"""k_center of several clouds at once: each cloud as if alone."""

import math

import numpy as np
import pytest
import torch

import protofast as pf
from protofast._ops.selection import METRICS

FIELDS = ("indices", "radii", "labels", "distances", "objective", "bound")
LENGTHS = [12, 1, 7, 3]


def clouds(metric, kind="normal", count=4, n=12, d=3, dtype=torch.float64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, n, d)) if kind == "normal" else rng.integers(0, 3, (count, n, d)).astype(float)
    points = torch.from_numpy(x).to(dtype)
    return torch.cdist(points, points) if metric == "precomputed" else points


def check(found, points, k, masks, **options):
    """The result of each cloud is that of its allowed points alone, given to k_center with no mask and no padding."""
    starts = options.pop("start", 0)
    initial = options.pop("initial", None)
    for number, (cloud, mask) in enumerate(zip(points, masks, strict=True)):
        rows = mask.nonzero().squeeze(1)
        position = {int(row): place for place, row in enumerate(rows)}
        alone = cloud[rows][:, rows] if options.get("metric") == "precomputed" else cloud[rows]
        start = (
            starts if isinstance(starts, str) else position[int(torch.as_tensor(starts).expand(len(points))[number])]
        )
        first = None if initial is None else [position[int(one)] for one in initial[number]]
        count = min(k, len(rows))
        expected = pf.k_center(alone, count, start=start, initial=first, **options)
        assert found.indices[number].tolist() == rows[expected.indices].tolist() + [-1] * (k - count)
        assert found.radii[number].tolist() == expected.radii.tolist() + [0.0] * (k - count)
        assert found.labels[number][rows].tolist() == expected.labels.tolist()
        assert found.distances[number][rows].tolist() == expected.distances.tolist()
        assert (found.labels[number][~mask] == -1).all()
        assert found.distances[number][~mask].isposinf().all()
        assert found.objective[number] == found.radii[number, -1]
        assert found.bound[number] == expected.bound if count == k else found.bound[number] == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_each_cloud_as_if_alone(metric, kind):
    points = clouds(metric, kind)
    everything = torch.ones(4, 12, dtype=torch.bool)
    inside = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, 0] = True
    for start in (0, "center", "farthest-pair"):
        options = {"metric": metric, "start": start}
        check(pf.k_center(points, 5, **options), points, 5, everything, **options)
        for lengths in (LENGTHS, np.array(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)):
            check(pf.k_center(points, 5, lengths=lengths, **options), points, 5, inside, **options)
        check(pf.k_center(points, 5, mask=mask, **options), points, 5, mask, **options)
        both = pf.k_center(points, 5, mask=mask, lengths=LENGTHS, **options)
        check(both, points, 5, mask & inside, **options)


@pytest.mark.parametrize("starts", [[11, 0, 6, 2], np.array([3, 0, 0, 1]), torch.tensor([2, 0, 3, 0])])
def test_a_start_for_each_cloud(starts):
    points = clouds("euclidean")
    inside = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    check(pf.k_center(points, 4, start=starts, lengths=LENGTHS), points, 4, inside, start=starts)


def test_initial_points_of_each_cloud():
    points = clouds("manhattan")
    lengths = [12, 5, 7, 3]
    inside = torch.arange(12) < torch.tensor(lengths)[:, None]
    initial = [[4, 9], [1, 0], [6, 2], [2, 0]]
    for given in (initial, np.array(initial), torch.tensor(initial)):
        found = pf.k_center(points, 6, metric="manhattan", initial=given, lengths=lengths)
        check(found, points, 6, inside, metric="manhattan", initial=initial)
    none = pf.k_center(points, 6, initial=torch.empty(4, 0, dtype=torch.int64), lengths=lengths)
    assert none.indices[:, 0].tolist() == [0] * 4


def test_no_initial_points():
    plain = pf.k_center(POINTS, 3)
    for none in ([], torch.empty(0), torch.empty(len(POINTS), 0, dtype=torch.int64)):
        assert pf.k_center(POINTS, 3, initial=none).indices.equal(plain.indices)


def test_random_starts_are_allowed_points_and_differ():
    points, lengths = clouds("euclidean", count=200), torch.arange(200) % 12 + 1
    mask = torch.arange(12) % 3 != 1
    first = [
        pf.k_center(points, 1, lengths=lengths, mask=mask.expand(200, 12), start=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    drawn = first[0].indices[:, 0]
    assert torch.equal(drawn, first[1].indices[:, 0])
    assert not torch.equal(drawn, first[2].indices[:, 0])
    assert (drawn < lengths).all()
    assert mask[drawn].all()
    assert set(drawn.tolist()) == set(mask.nonzero().squeeze(1).tolist())  # each is drawn at some time
    plain = pf.k_center(points, 1, start=torch.Generator().manual_seed(0)).indices[:, 0]
    assert len(plain.unique()) == 12


@pytest.mark.parametrize("metric", METRICS)
def test_refined(metric):
    points = clouds(metric)
    inside = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    for mask, lengths in ((torch.ones_like(inside), None), (inside, LENGTHS)):
        found = pf.k_center(points, 3, metric=metric, refine=True, lengths=lengths)
        check(found, points, 3, mask, metric=metric, refine=True)
        assert (found.objective <= pf.k_center(points, 3, metric=metric, lengths=lengths).objective).all()


@pytest.mark.parametrize("metric", METRICS)
def test_padding_may_hold_anything(metric):
    points = clouds(metric)
    inside = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    dirty = points.clone()
    dirty[~inside] = math.nan
    if metric == "precomputed":
        dirty.transpose(1, 2)[~inside] = -math.inf
    found = pf.k_center(dirty, 5, metric=metric, lengths=LENGTHS, start="center")
    check(found, points, 5, inside, metric=metric, start="center")


def test_shapes_types_and_strides():
    points = clouds("euclidean", dtype=torch.float32)
    found = pf.k_center(points, 5, lengths=LENGTHS)
    shapes = {name: tuple(getattr(found, name).shape) for name in FIELDS}
    assert shapes == dict(zip(FIELDS, [(4, 5), (4, 5), (4, 12), (4, 12), (4,), (4,)], strict=True))
    assert len(found) == 5
    strided = points.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (points.numpy(), strided, points.double()):
        assert torch.equal(pf.k_center(same, 5, lengths=LENGTHS).indices, found.indices)
    whole = (points * 8).round()
    assert torch.equal(pf.k_center(whole.int(), 5).indices, pf.k_center(whole, 5).indices)
    assert pf.k_center(torch.empty(2, 4, 0), 3).indices.tolist() == [[0, 1, 2]] * 2


def test_compiles_to_one_graph():
    points, lengths = clouds("euclidean"), torch.tensor(LENGTHS)

    def run(points, lengths):
        return pf.k_center(points, 5, lengths=lengths)

    torch._dynamo.reset()
    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(points, lengths), run(points, lengths)
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name))


POINTS = clouds("euclidean")
BAD = POINTS.clone()
BAD[2, 3, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pf.k_center(POINTS, 0), ValueError, "k is 0; give 1 to 12"),
        (lambda: pf.k_center(POINTS, 13), ValueError, "k is 13; give 1 to 12"),
        (lambda: pf.k_center(POINTS[:0], 1), ValueError, "at least one cloud"),
        (lambda: pf.k_center(POINTS[:, :0], 1), ValueError, "at least one cloud of one point"),
        (lambda: pf.k_center(POINTS, 1, metric="precomputed"), ValueError, r"\(B, n, n\)"),
        (lambda: pf.k_center(POINTS, 1, lengths=[12, 0, 3, 4]), ValueError, "lengths is 0 for cloud 1; give 1 to 12"),
        (lambda: pf.k_center(POINTS, 1, lengths=[12, 3, 3, 13]), ValueError, "lengths is 13 for cloud 3"),
        (lambda: pf.k_center(POINTS, 1, lengths=[1, 2]), ValueError, r"lengths has shape \(2,\); .* a cloud, \(4,\)"),
        (lambda: pf.k_center(POINTS, 1, lengths=[1.0] * 4), TypeError, "lengths is torch.float64"),
        (lambda: pf.k_center(POINTS[0], 1, lengths=[3]), ValueError, "lengths is for clouds"),
        (lambda: pf.k_center(POINTS, 1, mask=np.ones(12, bool)), ValueError, r"mask has shape \(12,\)"),
        (lambda: pf.k_center(POINTS, 1, mask=np.ones((4, 12))), TypeError, "mask is torch.float64"),
        (
            lambda: pf.k_center(POINTS, 1, mask=torch.arange(12).expand(4, 12) > 2, lengths=[5, 6, 2, 7]),
            ValueError,
            "0 points of cloud 2 are allowed",
        ),
        (lambda: pf.k_center(POINTS, 1, start=4, lengths=[5, 6, 2, 7]), ValueError, "start is 4 for cloud 2"),
        (
            lambda: pf.k_center(POINTS, 1, start=[0, 12, 0, 0]),
            IndexError,
            "start is 12 for cloud 1; points has 0 to 11",
        ),
        (lambda: pf.k_center(POINTS, 1, start=[0, 1]), ValueError, r"start has shape \(2,\)"),
        (lambda: pf.k_center(POINTS, 1, start=0.5), TypeError, "start is 0.5"),
        (lambda: pf.k_center(POINTS, 1, start="middle"), ValueError, "start is 'middle'"),
        (lambda: pf.k_center(POINTS, 2, initial=[3, 3]), ValueError, r"initial has shape \(2,\)"),
        (lambda: pf.k_center(POINTS, 2, initial=[[1], [2], [3], [4, 5]]), ValueError, "rows of different lengths"),
        (lambda: pf.k_center(POINTS, 2, initial=[[0, 1, 2]] * 4), ValueError, r"1 to k = 2"),
        (
            lambda: pf.k_center(POINTS, 2, initial=[[1, 2], [3, 3], [0, 1], [0, 1]]),
            ValueError,
            "twice for cloud 1",
        ),
        (lambda: pf.k_center(POINTS, 2, initial=[[1], [2], [-3], [4]]), IndexError, "initial is -3 for cloud 2"),
        (lambda: pf.k_center(POINTS, 2, initial=3), TypeError, "initial is 3; give a list"),
        (lambda: pf.k_center(POINTS, 2, initial=iter([[1]])), TypeError, "initial is <list_iterator"),
        (lambda: pf.k_center(POINTS, 2, initial=torch.tensor(3)), ValueError, r"initial has shape \(\)"),
        (lambda: pf.k_center(BAD, 2), ValueError, "cloud 2: points holds nan in row 3, column 1"),
        (lambda: pf.k_center(POINTS, 1, engine="magic"), ValueError, "engine is 'magic'"),
    ],
)
def test_errors_name_the_argument_and_the_cloud(call, error, words):
    with pytest.raises(error, match=words):
        call()
