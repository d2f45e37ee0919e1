"""The losses against loops in extended precision, with their edge cases."""

import itertools

import numpy as np
import pytest
import torch
from helpers.errors import EXACT, assert_within, exact
from torch.autograd import gradcheck

import protofast as pf

LABELS = torch.tensor([0, 2, 1, 2, 0, 3])
CLASSES = torch.tensor([0, -1, 1, 2, 2, -1, 1])  # none of class 3


def table(classes, count=4):
    return torch.stack([classes == c for c in range(count)], 1)


def loops(distance, labels, classes):
    """Per sample: distances to prototypes of its class, and to the others."""
    d = exact(distance)
    own = [[d[b, p] for p in range(d.shape[1]) if classes[p] == labels[b]] for b in range(len(d))]
    other = [[d[b, p] for p in range(d.shape[1]) if classes[p] != labels[b]] for b in range(len(d))]
    return own, other


@pytest.mark.parametrize("given", [CLASSES, table(CLASSES), table(CLASSES).float()], ids=["ids", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cluster_and_separation(dtype, given):
    distance = torch.rand(6, 7, dtype=dtype)
    own, other = loops(distance, LABELS, CLASSES)
    terms = EXACT(distance.max())
    expected = np.mean([min(row) for row in own if row], dtype=EXACT)
    assert_within(pf.nn.cluster_loss(distance, LABELS, given), expected, terms, 8)
    expected = -np.mean([min(row) for row in other], dtype=EXACT)
    assert_within(pf.nn.separation_loss(distance, LABELS, given), expected, terms, 8)
    expected = -np.mean([np.mean(row, dtype=EXACT) for row in other], dtype=EXACT)
    assert_within(pf.nn.separation_loss(distance, LABELS, given, average=True), expected, terms, 16)
    assert_within(pf.nn.cluster_loss(distance), exact(distance).min(1).mean(), terms, 8)


def test_of_several_patches_the_nearest_counts():
    distance = torch.rand(6, 7, 3).sort(2).values
    for loss in (pf.nn.cluster_loss, pf.nn.separation_loss):
        assert torch.equal(loss(distance, LABELS, CLASSES), loss(distance[..., 0], LABELS, CLASSES))


def test_samples_without_a_prototype_on_that_side_take_no_part():
    distance = torch.rand(2, 3, requires_grad=True)
    alone = torch.zeros(3, dtype=torch.int64)
    # no prototype of another class; and none of its own
    for loss in (
        pf.nn.separation_loss(distance, torch.tensor([0, 0]), alone),
        pf.nn.separation_loss(distance, torch.tensor([0, 0]), alone, average=True),
        pf.nn.cluster_loss(distance, torch.tensor([5, 6]), alone),
    ):
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, distance)
        assert torch.equal(grad, torch.zeros(2, 3))


@pytest.mark.parametrize("given", [CLASSES, table(CLASSES)], ids=["ids", "bool"])
def test_a_sample_of_no_class_is_of_none(given):
    labels = torch.tensor([-1, 2, -1])
    distance = torch.rand(3, 7)
    own = distance[1, CLASSES == 2].min()
    assert pf.nn.cluster_loss(distance, labels, given) == own
    assert pf.nn.cluster_loss(distance, torch.full((3,), -1), given) == 0
    others = torch.stack([distance[0].min(), distance[1, CLASSES != 2].min(), distance[2].min()])
    assert pf.nn.separation_loss(distance, labels, given) == -others.mean()


def test_infinite_and_nan_distances():
    distance = torch.tensor([[float("inf"), 2.0, 3.0]], requires_grad=True)  # inf: all of the image is masked
    loss = pf.nn.cluster_loss(distance, torch.tensor([0]), torch.tensor([0, 0, 1]))
    assert loss == 2
    assert torch.equal(torch.autograd.grad(loss, distance)[0], torch.tensor([[0.0, 1.0, 0.0]]))
    assert pf.nn.cluster_loss(torch.tensor([[float("nan"), 2.0]])).isnan()


def test_gradients_of_distances():
    distance = torch.rand(6, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda d: pf.nn.cluster_loss(d, LABELS, CLASSES), distance)
    assert gradcheck(lambda d: pf.nn.separation_loss(d, LABELS, CLASSES), distance)
    assert gradcheck(lambda d: pf.nn.separation_loss(d, LABELS, CLASSES, average=True), distance)


def cosines(rows):
    x = exact(rows).reshape(len(rows), -1)
    length = np.sqrt((x * x).sum(1))
    unit = x / np.where(length > 0, length, 1)[:, None]
    return unit @ unit.T


@pytest.mark.parametrize("kernel", [(), (1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distinct(dtype, kernel):
    prototypes = torch.randn(6, 4, *kernel, dtype=dtype)
    prototypes[4] = -3 * prototypes[1]  # opposite is as little distinct as equal
    apart = 1 - np.abs(cosines(prototypes))
    np.fill_diagonal(apart, np.inf)
    for margin in (0.2, 1.0):
        expected = np.maximum(margin - apart.min(1), 0).mean()
        assert_within(pf.nn.distinct_loss(prototypes, margin=margin), expected, EXACT(2), prototypes[0].numel() * 4)
    x = exact(prototypes).reshape(6, -1)
    apart = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    np.fill_diagonal(apart, np.inf)
    expected = np.maximum(5 - apart.min(1), 0).mean()
    found = pf.nn.distinct_loss(prototypes, margin=5.0, metric="euclidean")
    assert_within(found, expected, EXACT(apart.min(1).max() + 5), prototypes[0].numel() * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonality(dtype):
    prototypes = torch.randn(7, 5, 1, 1, dtype=dtype)
    cos = cosines(prototypes)
    expected = sum(cos[i, j] ** 2 for i, j in itertools.permutations(range(7), 2))
    assert_within(pf.nn.orthogonality_loss(prototypes), expected, EXACT(49), 30)
    expected = sum(
        cos[i, j] ** 2 for i, j in itertools.permutations(range(7), 2) if CLASSES[i] == CLASSES[j] and CLASSES[i] >= 0
    )
    for classes in (CLASSES, table(CLASSES)):
        assert_within(pf.nn.orthogonality_loss(prototypes, classes), expected, EXACT(49), 30)


def test_zero_one_and_tiny_prototypes():
    for loss in (
        lambda p: pf.nn.distinct_loss(p, margin=1.0),
        pf.nn.orthogonality_loss,
        lambda p: pf.nn.distinct_loss(p, margin=1.0, metric="euclidean"),
    ):
        zero = torch.zeros(3, 4, requires_grad=True)
        loss(zero).backward()
        assert zero.grad.isfinite().all()
    assert pf.nn.distinct_loss(torch.rand(1, 4)) == 0
    tiny = torch.tensor([[1e-30, 0.0], [1e-30, 1e-30]])
    torch.testing.assert_close(pf.nn.distinct_loss(tiny, margin=1.0), torch.tensor(0.5**0.5), rtol=1e-6, atol=0)
    huge = tiny * 1e30 * 1e30
    torch.testing.assert_close(pf.nn.orthogonality_loss(huge), torch.tensor(1.0), rtol=1e-6, atol=0)


def test_gradients_of_prototypes():
    prototypes = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p: pf.nn.distinct_loss(p, margin=1.0), prototypes)
    assert gradcheck(lambda p: pf.nn.distinct_loss(p, margin=5.0, metric="euclidean"), prototypes)
    assert gradcheck(lambda p: pf.nn.orthogonality_loss(p, torch.tensor([0, 0, 1, 1, 1])), prototypes)


def test_autocast_and_half_stay_in_float32():
    prototypes = torch.randn(5, 40)
    expected = pf.nn.distinct_loss(prototypes, margin=1.0), pf.nn.orthogonality_loss(prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pf.nn.distinct_loss(prototypes, margin=1.0), pf.nn.orthogonality_loss(prototypes)
    assert found == expected
    half = prototypes.bfloat16()
    assert pf.nn.distinct_loss(half, margin=1.0) == pf.nn.distinct_loss(half.float(), margin=1.0)


D = torch.rand(6, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pf.nn.cluster_loss(D, LABELS), ValueError, "prototype_classes is None"),
        (lambda: pf.nn.cluster_loss(D, None, CLASSES), ValueError, "labels is None"),
        (lambda: pf.nn.cluster_loss(D, LABELS[:5], CLASSES), ValueError, "labels has 5"),
        (lambda: pf.nn.cluster_loss(D, LABELS.float(), CLASSES), ValueError, "labels is torch.float32"),
        (lambda: pf.nn.cluster_loss(D, LABELS, CLASSES[:5]), ValueError, r"prototype_classes has shape \(5,\)"),
        (lambda: pf.nn.cluster_loss(D, LABELS, CLASSES.float()), TypeError, "prototype_classes is torch.float32"),
        (lambda: pf.nn.cluster_loss(D, LABELS, table(CLASSES, 3)), ValueError, "labels has 3"),
        (lambda: pf.nn.cluster_loss(D, LABELS - 2, CLASSES), ValueError, "labels has -2"),
        (lambda: pf.nn.cluster_loss(D, LABELS - 2, table(CLASSES)), ValueError, "labels has -2"),
        (lambda: pf.nn.cluster_loss(D, LABELS, CLASSES - 1), ValueError, "prototype_classes has -2"),
        (lambda: pf.nn.orthogonality_loss(D, LABELS - 2), ValueError, "prototype_classes has -2"),
        (lambda: pf.nn.cluster_loss(D, "cats", CLASSES), TypeError, "labels is a str"),
        (lambda: pf.nn.cluster_loss(D, LABELS, ["cat"] * 7), TypeError, "prototype_classes is a list"),
        (lambda: pf.nn.cluster_loss(D[0]), ValueError, r"distance has shape \(7,\)"),
        (lambda: pf.nn.cluster_loss(LABELS), TypeError, "distance is a torch.int64"),
        (lambda: pf.nn.separation_loss(D[:, :0], LABELS, CLASSES), ValueError, "distance has shape"),
        (lambda: pf.nn.distinct_loss(D, margin=0), ValueError, "margin is 0"),
        (lambda: pf.nn.distinct_loss(D, margin=None), TypeError, "margin is None"),
        (lambda: pf.nn.distinct_loss(D, margin=True), TypeError, "margin is True"),
        (lambda: pf.nn.cluster_loss(D[:0]), ValueError, r"distance has shape \(0, 7\), an empty batch"),
        (lambda: pf.nn.separation_loss(D[:0], LABELS[:0], CLASSES), ValueError, "an empty batch"),
        (lambda: pf.nn.distinct_loss(D, metric="dot"), ValueError, "metric is 'dot'"),
        (lambda: pf.nn.distinct_loss(D[0]), ValueError, "prototypes has shape"),
        (lambda: pf.nn.orthogonality_loss([1.0]), TypeError, "prototypes is a list"),
        (lambda: pf.nn.orthogonality_loss(D, LABELS[:4]), ValueError, "prototype_classes has shape"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
