"""Criteria, thresholds, groups and noise of pxgen, each against its formula in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from protofast import pxgen
from protofast.pxgen import CRITERIA, CriteriaError, Criterion, Noise, discovery, groups, store, thresholds
from protofast.pxgen import criteria as c
from protofast.pxgen.result import GROUPS, GroupSummary, Threshold

U = 2.0**-24  # half a unit in the last place of float32


def images(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.random(shape, dtype=np.float32)) for _ in range(2)]


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2, 2), (1, 1), (0, 6)])
def test_kld(shape):
    rng = np.random.default_rng(1)
    mean, log_variance = rng.normal(size=shape) * 3, rng.normal(size=shape) * 2
    expected = np.zeros(shape[0])
    for i in range(shape[0]):
        for m, v in zip(mean[i].ravel(), log_variance[i].ravel(), strict=True):
            expected[i] += 0.5 * (math.exp(v) + m * m - 1 - v)  # KL of two Gaussians
    got = c.kld(torch.from_numpy(mean), torch.from_numpy(log_variance))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-13)
    assert c.kld(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0, 0]


def test_negative_log_prior():
    z = np.random.default_rng(2).normal(size=(4, 3, 2))
    expected = [-sum(-0.5 * v * v for v in row.ravel()) for row in z]
    np.testing.assert_allclose(c.negative_log_prior(torch.from_numpy(z)).numpy(), expected, rtol=1e-14)


def test_pixel_errors():
    x, y = images(6, 3, 17, 5)
    a, b = x.double().numpy(), y.double().numpy()
    pixels = 3 * 17 * 5
    squared, absolute = ((a - b) ** 2).sum((1, 2, 3)), np.abs(a - b).sum((1, 2, 3))
    # One rounding of the difference, one of the square; all terms have one sign.
    assert (np.abs(c.sse(x, y).numpy() - squared) <= 3.01 * U * squared).all()
    assert (np.abs(c.mse(x, y).numpy() - squared / pixels) <= 3.01 * U * squared / pixels).all()
    assert (np.abs(c.mae(x, y).numpy() - absolute / pixels) <= 1.01 * U * absolute / pixels).all()
    # Non-contiguous input is the same images.
    assert torch.equal(c.sse(x.transpose(2, 3), y.transpose(2, 3).contiguous()).sort()[0], c.sse(x, y).sort()[0]) or (
        torch.allclose(c.sse(x.transpose(2, 3), y.transpose(2, 3)), c.sse(x, y), rtol=1e-12)
    )


def direct_ssim(a, b, size, sigma, span):
    """Wang et al. 2004, eq. 13, over every window that lies in the image."""
    at = np.arange(size) - size // 2
    weights = np.exp(-(at**2) / (2 * sigma**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for x, y in zip(a, b, strict=True):
        for i in range(x.shape[0] - size + 1):
            for j in range(x.shape[1] - size + 1):
                p, q = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
                m, n = (window * p).sum(), (window * q).sum()
                cov = (window * (p - m) * (q - n)).sum()
                var = (window * (p - m) ** 2).sum() + (window * (q - n) ** 2).sum()
                values.append((2 * m * n + c1) * (2 * cov + c2) / ((m * m + n * n + c1) * (var + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("side", "size"), [(14, 11), (11, 11), (8, 7), (5, 5), (3, 3), (2, 1)])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_dssim(side, size, value_range):
    x, y = images(3, 2, side, side + 1)
    low, high = value_range
    x, y = x * (high - low) + low, y * (high - low) + low
    sigma = 1.5 if size == 11 else max(size // 2 / 3.5, 1e-3)
    expected = [
        (1 - direct_ssim(a, b, size, sigma, high - low)) / 2
        for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(c.dssim(x, y, value_range=value_range).numpy(), expected, rtol=1e-9)
    assert c.dssim(x, x, value_range=value_range).abs().max() < 1e-12
    assert c.dssim(x[:1], y[:1]).shape == (1,)


def test_feature_distance():
    x, y = images(4, 1, 5, 5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    criterion = pxgen.feature_distance(network, "mine")
    with torch.no_grad():
        expected = (network(x).double() - network(y).double()).numpy() ** 2
        got = criterion({"images": x, "reconstruction": y})
    np.testing.assert_allclose(got.numpy(), expected.sum(1), rtol=1e-12)
    assert (criterion.name, criterion.kind) == ("mine", "extrinsic")
    with pytest.raises(TypeError, match="extractor is a int"):
        pxgen.feature_distance(3)
    with pytest.raises(ValueError, match="no extractor"):
        CRITERIA["feature_distance"]({"images": x, "reconstruction": y})


def test_lpips_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    c._lpips_network.cache_clear()
    x, y = images(2, 3, 32, 32)
    with pytest.raises((ImportError, FileNotFoundError), match=r"torchvision|AlexNet's weights at"):
        CRITERIA["lpips"]({"images": x, "reconstruction": y})
    monkeypatch.setattr(c, "_lpips_network", lambda device: lambda a, b: (a - b).square().flatten(1).sum(1)[:, None])
    got = c.lpips(x[:, :1], y[:, :1])
    torch.testing.assert_close(got, 12 * (x[:, 0] - y[:, 0]).square().flatten(1).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(c.lpips(2 * x - 1, 2 * y - 1, value_range=(-1, 1)), c.lpips(x, y), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 8, 8\)"):
        c.lpips(*images(2, 3, 8, 8))


def test_registry(monkeypatch):
    monkeypatch.setattr(c, "CRITERIA", dict(CRITERIA))
    for name in ("kld", "mse", "mae", "ssim", "lpips", "feature_distance", "denoising_loss", "inversion_nll"):
        assert name in CRITERIA
    made = pxgen.register_criterion("brightest", lambda x: x.flatten(1).amax(1), "intrinsic")
    assert c.resolve("brightest", "intrinsic", (0, 1)) == [made]
    with pytest.raises(ValueError, match="'brightest', which is registered already"):
        pxgen.register_criterion("brightest", c.mse, "extrinsic")
    with pytest.raises(ValueError, match="kind is 'other'"):
        pxgen.register_criterion("another", c.mse, "other")
    with pytest.raises(ValueError, match=r"extrinsic has 'kld', which is an intrinsic"):
        c.resolve(["mse", "kld"], "extrinsic", (0, 1))
    with pytest.raises(ValueError, match=r"intrinsic has 'fame'; registered are kld, "):
        c.resolve("fame", "intrinsic", (0, 1))
    with pytest.raises(ValueError, match="extrinsic is empty"):
        c.resolve([], "extrinsic", (0, 1))
    with pytest.raises(TypeError, match="extrinsic has a int"):
        c.resolve([3], "extrinsic", (0, 1))
    (bare,) = c.resolve(c.mae, "extrinsic", (0, 1))
    assert (bare.name, bare.needs) == ("mae", ("images", "reconstruction"))
    x, y = images(2, 1, 12, 12)
    (ranged,) = c.resolve("ssim", "extrinsic", (0, 4))
    assert torch.equal(ranged({"images": x, "reconstruction": y}), c.dssim(x, y, value_range=(0, 4)))
    for wrong in (lambda x: x.mean(), lambda x: x.mean((2, 3)), lambda x: 1.0):
        with pytest.raises(ValueError, match=r"criterion 'wrong' returned .* shape \(2,\)"):
            Criterion("wrong", "intrinsic", wrong, ("images",))({"images": x})


KINDS = {"kld": "intrinsic", "nll": "intrinsic", "mse": "extrinsic", "mae": "extrinsic"}


def test_groups_are_strict_at_equality():
    below, at, above = np.nextafter(2.0, 0), 2.0, np.nextafter(2.0, 3)
    values = {"kld": np.array([below, below, at, above, at]), "mse": np.array([below, at, below, above, at])}
    got = groups.assign(values, KINDS, {"kld": 2.0, "mse": 2.0})
    assert got.dtype == np.uint8
    assert [GROUPS[g] for g in got] == ["HIHE", "HILE", "LIHE", "LILE", "LILE"]


def test_all_criteria_of_a_kind_must_be_below():
    rng = np.random.default_rng(3)
    values = {name: rng.random(200) for name in KINDS}
    limits = dict.fromkeys(KINDS, 0.6)
    got = groups.assign(values, KINDS, limits)
    for i in range(200):
        high = {kind: all(values[n][i] < 0.6 for n in KINDS if KINDS[n] == kind) for kind in ("intrinsic", "extrinsic")}
        expected = ("HI" if high["intrinsic"] else "LI") + ("HE" if high["extrinsic"] else "LE")
        assert GROUPS[got[i]] == expected
    summaries = groups.summarise(got)
    assert [s.name for s in summaries] == list(GROUPS)
    assert sum(s.count for s in summaries) == 200
    assert sum(s.share for s in summaries) == pytest.approx(1)
    moved = groups.sensitivity(values, KINDS, limits, (0.5, 1.0, 2.0))
    assert moved["factors"] == [0.5, 1.0, 2.0]
    for name in KINDS:
        assert moved[name][1] == 0
        for factor, count in zip(moved["factors"], moved[name], strict=True):
            other = groups.assign(values, KINDS, {**limits, name: 0.6 * factor})
            assert count == sum(int(a != b) for a, b in zip(got, other, strict=True))
    assert any(moved["kld"])


def summary(*shares):
    return [GroupSummary(name, round(share * 100), share) for name, share in zip(GROUPS, shares, strict=True)]


def test_signatures():
    steady = Threshold("kld", "intrinsic", "max-mean", 1.0, [1.0], 0.0, 0.2)
    assert groups.signatures(summary(0.3, 0.5, 0.1, 0.1), [steady]) == []  # both at their limit
    (empty,) = groups.signatures(summary(0, 0.5, 0.2, 0.3), [steady])
    assert "HIHE is empty: no anchor is both familiar" in empty  # HILE is half full of familiar ones
    (deluded,) = groups.signatures(summary(0.2, 0.51, 0.2, 0.09), [steady])
    assert deluded.startswith("HILE holds 51 %")
    shaky = Threshold("mse", "extrinsic", "max-mean", 1.0, [1.0, 2.0, 3.0], 0.25, 0.25)
    (unstable,) = groups.signatures(summary(1, 0, 0, 0), [steady, shaky])
    assert "threshold of mse is unstable: it varies by 25 % between 3 iterations" in unstable


CRITERIA_OF_RUN = [CRITERIA["kld"], CRITERIA["mse"]]


def estimate(folder, generate, **settings):
    settings = {"method": "max-mean", "percentile": 95.0, "iterations": 4, "generations": 50} | settings
    kept = store.Store(folder, {"model": "a"}, durable=False)
    return thresholds.estimate(CRITERIA_OF_RUN, generate, kept, **settings)


def generations(iteration, count=50):
    return np.random.default_rng(iteration).random((count, 2))


@pytest.mark.parametrize("method", ["max-mean", "percentile"])
def test_thresholds(tmp_path, method):
    found = estimate(tmp_path, generations, method=method, percentile=80.0)
    for column, threshold in enumerate(found):
        samples = [np.sort(generations(i)[:, column]) for i in range(4)]
        # The 80th percentile of 50 sorted values lies at position 0.8 · 49 = 39.2.
        each = [s[-1] if method == "max-mean" else 0.8 * s[39] + 0.2 * s[40] for s in samples]
        mean = sum(each) / 4
        std = math.sqrt(sum((e - mean) ** 2 for e in each) / 3)
        assert threshold.iterations == pytest.approx(each, rel=1e-14)
        assert threshold.value == pytest.approx(mean, rel=1e-14)
        assert threshold.std == pytest.approx(std, rel=1e-9)
        assert threshold.spread == pytest.approx(std / mean, rel=1e-9)
        assert threshold.method == method
    assert [(t.criterion, t.kind) for t in found] == [("kld", "intrinsic"), ("mse", "extrinsic")]


def test_finished_iterations_are_kept(tmp_path):
    asked = []

    def counted(iteration):
        asked.append(iteration)
        if iteration == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return generations(iteration)

    with pytest.raises(KeyboardInterrupt):
        estimate(tmp_path, counted)
    found = estimate(tmp_path, counted)
    assert asked == [0, 1, 2, 3, 3]
    more = estimate(tmp_path, counted, iterations=6)
    assert asked == [0, 1, 2, 3, 3, 4, 5]
    assert [t.iterations[:4] for t in more] == [t.iterations for t in found]
    assert found == estimate(tmp_path / "anew", generations)
    estimate(tmp_path, counted, generations=51, iterations=1)  # another setting shares nothing
    assert asked[7:] == [0]


def test_threshold_edges(tmp_path):
    one = estimate(tmp_path / "a", generations, iterations=1)[0]
    assert (one.std, one.spread, one.unstable) == (0, 0, False)
    assert thresholds.summarise(CRITERIA["kld"], "max-mean", [-1.0, 1.0]).spread == math.inf
    assert thresholds.summarise(CRITERIA["kld"], "max-mean", [1.0, 1.5]).unstable
    for wrong in (math.nan, math.inf):
        with pytest.raises(CriteriaError, match=r"'mse' is not finite for 1 of 50 samples .*iteration 2"):
            estimate(
                tmp_path / str(wrong),
                lambda i, wrong=wrong: np.where((i == 2) & (np.arange(100).reshape(50, 2) == 7), wrong, generations(i)),
            )
    given = thresholds.given(CRITERIA_OF_RUN, {"mse": 3})
    assert given == {"mse": Threshold("mse", "extrinsic", "given", 3.0)}
    with pytest.raises(ValueError, match="names fid; the criteria of this analysis are kld, mse"):
        thresholds.given(CRITERIA_OF_RUN, {"fid": 1.0})
    with pytest.raises(ValueError, match="gives mse the value nan"):
        thresholds.given(CRITERIA_OF_RUN, {"mse": math.nan})


def test_noise_belongs_to_the_sample():
    whole = Noise(range(100), 7)
    first, second = whole.normal(3, 2), whole.normal(5)
    part = Noise([50, 3], 7)
    assert torch.equal(part.normal(3, 2), first[[50, 3]])
    assert torch.equal(part.normal(5), second[[50, 3]])
    assert first.dtype == torch.float32
    others = [Noise(range(100), 8), Noise(range(100), 7, stream=1), Noise(range(100), 7, iteration=1)]
    assert not any(torch.equal(other.normal(3, 2), first) for other in others)
    assert Noise([]).normal(4).shape == (0, 4)
    values = Noise(range(20000), 1).normal(5).double()
    assert abs(values.mean()) < 5 / math.sqrt(1e5)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / 1e5)
    assert len(values[:, 0].unique()) > 19900  # samples differ from each other
    assert torch.equal(torch.rand(4, generator=Noise([5]).generator()), torch.rand(4, generator=Noise([5]).generator()))


def test_standardised():
    table = {"kld": np.array([1.0, 2.0, 3.0]), "mse": np.array([5.0, 5.0, 5.0])}
    got = discovery.standardised(table)
    np.testing.assert_allclose(got[:, 0], np.array([-1, 0, 1]) * math.sqrt(1.5), rtol=1e-15)
    assert (got[:, 1] == 0).all()


def test_store(tmp_path):
    def opened(**identity):
        return store.Store(tmp_path / "run", {"seed": 0, **identity}, durable=True)

    first = opened()
    first.write("criteria.f8", 0, np.arange(6.0).reshape(3, 2))
    first.write("criteria.f8", 3, np.ones((1, 2)))
    first.checkpoint(3, finished=True)
    with pytest.raises(ValueError, match="rows of 2 values; 3 were given for anchor 4"):
        first.write("criteria.f8", 4, np.ones((1, 3)))
    first.close()
    again = opened()
    assert again.done == 3
    assert again.finished
    assert again.table("criteria.f8").tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="is in use by another run"):
        opened()
    again.close()
    with pytest.raises(ValueError, match=r"another analysis \(seed was 0, now 1\); choose another work_dir, or delete"):
        opened(seed=1)
    (tmp_path / "run" / "criteria.f8").write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter than the 3 rows"):
        opened()
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        opened()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
