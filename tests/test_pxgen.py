"""pxgen.explain from anchors to report: results, adapters, resuming, and what is said when something does not fit."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import protofast as pf
from protofast import pxgen
from protofast.data import Dataset
from protofast.pxgen import (
    GROUPS,
    PAPER_CODE,
    CriteriaError,
    Criterion,
    DiffusionAdapter,
    FunctionAdapter,
    GeneratorAdapter,
    Noise,
    VAEAdapter,
    criteria,
    noise,
    run,
    store,
)

SHAPE = (1, 6, 6)


class TinyVAE(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(36, 8), nn.Linear(4, 36)
        self.dropout = nn.Dropout(0.5)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)

    def encode(self, x):
        return self.encoder(self.dropout(x.flatten(1) - 0.5)).chunk(2, 1)

    def decode(self, z):
        return self.decoder(z).sigmoid().reshape(-1, *SHAPE)


@pytest.fixture
def vae():
    return TinyVAE()


@pytest.fixture
def anchors():
    """A third of them made by the model, a third distorted, a third noise: no group is empty."""
    with torch.no_grad():
        made = TinyVAE().decode(torch.randn(100, 4, generator=torch.Generator().manual_seed(1)))
    other = torch.rand(100, *SHAPE, generator=torch.Generator().manual_seed(2))
    return torch.cat([made[:60], 0.6 * made[60:] + 0.4 * other[60:], other[:60]])


QUICK = {"iterations": 3, "generations": 40, "progress": False}


def explain(model, anchors, **settings):
    return pxgen.explain(model, anchors, **{**QUICK, **settings})


def same(first, second):
    """Bitwise equality of everything that was computed."""
    assert list(first.criteria) == list(second.criteria)
    for name in first.criteria:
        assert np.array_equal(first.criteria[name], second.criteria[name]), name
    assert first.thresholds == second.thresholds
    assert np.array_equal(first.groups, second.groups)
    assert len(first.representatives) == len(second.representatives)
    for a, b in zip(first.representatives, second.representatives, strict=True):
        assert (a.group, a.algorithm, a.indices, a.objective, a.bound) == (
            b.group,
            b.algorithm,
            b.indices,
            b.objective,
            b.bound,
        )
        assert np.array_equal(a.nearest, b.nearest)
    for mine, other in (first.originals, second.originals), (first.reconstructions, second.reconstructions):
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[number], other[number]) for number in mine)
    return True


def test_report_against_the_formulas(vae, anchors):
    report = explain(vae, anchors, k=3, batch_size=len(anchors), discovery=["k-center", "k-dispersion", "k-medoids"])
    vae.eval()

    def criteria(x):
        with torch.no_grad():
            mean, log_variance = vae.encode(x)
            back = vae.decode(mean)
        m, v = mean.double().numpy(), log_variance.double().numpy()
        kld = 0.5 * (np.exp(v) + m**2 - 1 - v).sum(1)
        return kld, ((x.double() - back.double()) ** 2).mean((1, 2, 3)).numpy(), back

    kld, mse, back = criteria(anchors)
    np.testing.assert_allclose(report.criteria["kld"], kld, rtol=1e-12)
    np.testing.assert_allclose(report.criteria["mse"], mse, rtol=4 * 2.0**-24)
    highest = []
    for iteration in range(3):
        z = Noise(range(40), 0, stream=noise.GENERATION, iteration=iteration).normal(4)
        with torch.no_grad():
            highest.append([values.max() for values in criteria(vae.decode(z))[:2]])
    for threshold, column in zip(report.thresholds, np.array(highest).T, strict=True):
        np.testing.assert_allclose(threshold.iterations, column, rtol=1e-6)
        np.testing.assert_allclose(threshold.value, column.mean(), rtol=1e-6)
        np.testing.assert_allclose(threshold.std, column.std(ddof=1), rtol=1e-3)
    limits = [threshold.value for threshold in report.thresholds]
    expected = [
        ("HI" if a < limits[0] else "LI") + ("HE" if b < limits[1] else "LE") for a, b in zip(kld, mse, strict=True)
    ]
    assert [GROUPS[g] for g in report.groups] == expected
    assert len(set(expected)) > 1
    for summary in report.summaries:
        assert summary.count == expected.count(summary.name)
        assert summary.share == summary.count / len(anchors)

    table = np.stack(list(report.criteria.values()), 1)
    table = (table - table.mean(0)) / table.std(0)
    shown = set()
    for found in report.representatives:
        members = report.members(found.group)
        points = torch.from_numpy(table[members])
        if found.algorithm == "k-center":
            direct = pf.k_center(points, min(3, len(members)), start="center")
        elif found.algorithm == "k-dispersion":
            direct = pf.k_dispersion(points, min(3, len(members)))
        else:
            start = torch.Generator().manual_seed(0)
            direct = pf.k_medoids(points, min(3, len(members)), metric="euclidean", start=start)
        assert found.indices == members[direct.indices.numpy()].tolist()
        assert np.array_equal(found.nearest, direct.labels.numpy())
        assert found.objective == float(direct.objective)
        assert (found.features, found.metric) == ("criteria", "euclidean")
        shown.update(found.indices)
    assert len(report.representatives) == 3 * len(set(expected))
    assert set(report.originals) == set(report.reconstructions) == shown
    for number in shown:
        assert np.array_equal(report.originals[number], anchors[number].numpy())
        np.testing.assert_allclose(report.reconstructions[number], back[number].numpy(), atol=1e-6)
        assert report.originals[number].dtype == np.float32
    assert report.settings["intrinsic"] == ["kld"]
    assert report.settings["extrinsic"] == ["mse"]
    assert report.seeds == {"seed": 0}
    json.dumps([report.settings, report.versions, report.seeds, report.sensitivity])
    assert repr(report).startswith(f"PXGen report of {len(anchors)} anchors: HIHE")


@pytest.mark.parametrize("sampled", [False, True])
def test_batches_do_not_matter(vae, anchors, sampled):
    vae = vae.double()  # so that what remains is the seeds, not the rounding
    adapter = VAEAdapter(vae, sample_latent=sampled)
    whole = explain(adapter, anchors, batch_size=1000)
    for size in (1, 7, 64):
        part = explain(adapter, anchors, batch_size=size)
        assert np.array_equal(whole.groups, part.groups)
        for name in whole.criteria:
            np.testing.assert_allclose(part.criteria[name], whole.criteria[name], rtol=1e-5)
        for a, b in zip(whole.thresholds, part.thresholds, strict=True):
            np.testing.assert_allclose(a.iterations, b.iterations, rtol=1e-5)
    other = explain(adapter, anchors, seed=1)
    assert other.thresholds != whole.thresholds
    assert np.array_equal(other.criteria["mse"], whole.criteria["mse"]) is not sampled


def test_sampled_latents(vae, anchors):
    report = explain(VAEAdapter(vae, sample_latent=True), anchors, extrinsic="sse", batch_size=50, seed=4)
    vae.eval()
    with torch.no_grad():
        mean, log_variance = vae.encode(anchors)
        back = vae.decode(mean + log_variance.exp().sqrt() * Noise(range(len(anchors)), 4).normal(4))
    np.testing.assert_allclose(report.criteria["sse"], (anchors - back).double().square().sum((1, 2, 3)), rtol=1e-4)
    for number, picture in report.reconstructions.items():
        np.testing.assert_allclose(picture, back[number].numpy(), atol=1e-5)  # the very sample that was judged


class Stream:
    """Batches of uneven size, to be run through again and again."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __iter__(self):
        start = 0
        for size in (50, 1, 30, 1000):
            yield self.images[start : start + size], self.labels[start : start + size]
            start += size


def test_every_kind_of_anchors(vae, anchors, tmp_path):
    labels = torch.arange(len(anchors)) % 3
    array = anchors.numpy()
    np.save(tmp_path / "anchors.npy", array)
    kinds = [
        anchors[:, 0],
        array,
        np.load(tmp_path / "anchors.npy", mmap_mode="r"),
        Dataset(array, labels.numpy(), names=["a", "b", "c"]),
        TensorDataset(anchors, labels),
        [(image, int(label)) for image, label in zip(anchors, labels, strict=True)],
        DataLoader(TensorDataset(anchors, labels), batch_size=50),
        DataLoader(TensorDataset(anchors), batch_size=100),
        list(Stream(anchors, labels)),
        Stream(anchors, labels),
    ]
    expected = explain(vae, anchors, features="pixels", batch_size=50)
    assert expected.labels is None
    with pytest.raises(ValueError, match="have no labels"):
        expected.label_counts()
    for kind in kinds:
        got = explain(vae, kind, features="pixels", batch_size=50)
        for name in expected.criteria:
            np.testing.assert_allclose(got.criteria[name], expected.criteria[name], rtol=1e-5)
        assert [r.indices for r in got.representatives] == [r.indices for r in expected.representatives]
        assert all(np.array_equal(got.originals[i], expected.originals[i]) for i in expected.originals)
        if got.labels is not None:
            assert np.array_equal(got.labels, labels)
    named = explain(vae, kinds[3])
    assert named.names == ["a", "b", "c"]
    assert named.label_counts() == {"a": 54, "b": 53, "c": 53}
    for group in GROUPS:
        counts = [int((labels[named.members(group)] == label).sum()) for label in range(3)]
        assert list(named.label_counts(group).values()) == counts
        assert list(named.label_shares(group).values()) == [count / max(1, sum(counts)) for count in counts]
    assert explain(vae, kinds[5]).labels is not None
    given = explain(vae, anchors, labels=["x", "y"] * 80)
    assert given.label_counts() == {"x": 80, "y": 80}


def test_integers_and_value_range(anchors):
    vae = TinyVAE()
    pixels = (anchors * 255).round().to(torch.uint8)
    from_bytes, from_floats = explain(vae, pixels), explain(vae, pixels.float() / 255)
    assert np.array_equal(from_bytes.criteria["mse"], from_floats.criteria["mse"])
    adapter = FunctionAdapter(
        lambda count, generator: torch.rand(count, *SHAPE, generator=generator) * 2 - 1, lambda x: x * 0.5
    )
    report = explain(adapter, pixels, value_range=(-1, 1), intrinsic=lambda x: x.flatten(1).mean(1), extrinsic="ssim")
    number = next(iter(report.originals))
    np.testing.assert_allclose(report.originals[number], pixels[number].numpy() / 255, atol=1e-6)
    np.testing.assert_allclose(report.reconstructions[number], pixels[number].numpy() / 510 + 0.25, atol=1e-6)
    x = pixels.float() / 255 * 2 - 1
    expected = criteria.dssim(x, x * 0.5, value_range=(-1.0, 1.0))
    np.testing.assert_allclose(report.criteria["ssim"], expected.numpy(), rtol=1e-6)
    with pytest.warns(UserWarning, match=r"values from -1 to .*outside value_range=\(0.0, 1.0\)"):
        explain(vae, x.clamp(min=-1).index_fill(0, torch.tensor([0]), -1.0))


def test_several_criteria_features_and_thresholds(vae, anchors):
    adapter = VAEAdapter(vae)
    spread = Criterion("spread", "intrinsic", lambda v: v.exp().sum(1), ("log_variance",))
    report = explain(
        adapter,
        anchors,
        intrinsic=["kld", spread, "latent_nll"],
        extrinsic=["mse", "mae", "ssim"],
        thresholds={"kld": 2.5, "mae": 0.2},
        groups=["HIHE", "LILE"],
        features="latents",
        metric="cosine",
        k=4,
    )
    assert list(report.kinds.values()) == ["intrinsic"] * 3 + ["extrinsic"] * 3
    assert [t.method for t in report.thresholds] == ["given", "max-mean", "max-mean", "max-mean", "given", "max-mean"]
    assert {r.group for r in report.representatives} <= {"HIHE", "LILE"}
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(anchors)[0]
    for found in report.representatives:
        members = report.members(found.group)
        direct = pf.k_center(latents[members], min(4, len(members)), metric="cosine", start="center")
        assert found.indices == members[direct.indices.numpy()].tolist()
    percentile = explain(vae, anchors, thresholds="percentile", percentile=50)
    highest = explain(vae, anchors)
    assert all(a.value < b.value for a, b in zip(percentile.thresholds, highest.thresholds, strict=True))


@pytest.mark.parametrize("limit", [0, 2**28])
def test_features_from_pixels_functions_and_vectors(vae, anchors, monkeypatch, limit):
    monkeypatch.setattr(run, "IN_MEMORY", limit)  # 0: in a mapped file
    flat = anchors.flatten(1)
    for features in ("pixels", lambda x: x.flatten(1), flat, flat.numpy()):
        report = explain(vae, anchors, **{**PAPER_CODE, "features": features}, k=3)
        for found in report.representatives:
            members = report.members(found.group)
            start = torch.Generator().manual_seed(0)
            direct = pf.k_medoids(flat[members], min(3, len(members)), metric="manhattan", start=start)
            assert found.indices == members[direct.indices.numpy()].tolist()
            assert found.algorithm == "k-medoids"
            assert found.features == ("pixels" if isinstance(features, str) else "embedding")


def test_small_groups_are_shown_whole(vae, anchors):
    report = explain(vae, anchors[:5], thresholds={"kld": 1e9, "mse": 1e9}, discovery=("k-center", "k-dispersion"))
    assert [sorted(r.indices) for r in report.representatives] == [[0, 1, 2, 3, 4]] * 2
    assert report.signatures == [
        f"HIHE has 5 anchors, fewer than k = 10: {name} shows the whole group." for name in ("k-center", "k-dispersion")
    ]
    one = explain(vae, anchors[:1], thresholds={"kld": 1e9, "mse": 1e9})
    assert one.representatives[0].indices == [0]
    strict = explain(vae, anchors, thresholds={"kld": -1.0, "mse": -1.0})
    assert [s.count for s in strict.summaries] == [0, 0, 0, len(anchors)]
    assert "HIHE is empty" in strict.signatures[0]
    assert {r.group for r in strict.representatives} == {"LILE"}


def test_lookalikes_are_noticed(vae, anchors):
    features = torch.zeros(len(anchors), 2)
    features[0, 0] = 1.0
    features[1:, 1] = torch.arange(len(anchors) - 1) * 1e-6
    settings = {"thresholds": {"kld": 1e9, "mse": 1e9}, "discovery": ["k-center", "k-dispersion"], "k": 4}
    report = explain(vae, anchors, features=features, **settings)
    for algorithm in settings["discovery"]:
        assert any(f"{algorithm} representatives of HIHE look alike" in said for said in report.signatures)
    copies = anchors[[0, 0, 1]]  # a group that is shown whole has no other choice
    assert not explain(vae, copies, features="pixels", **{**settings, "k": 3}).signatures
    assert not explain(vae, anchors, features="pixels", **settings).signatures
    same_everywhere = explain(vae, anchors, features=torch.ones(len(anchors), 2), **settings)
    assert any("look alike" in said for said in same_everywhere.signatures)


SLOW = """
import time, torch, protofast as pf
from torch import nn
DELAY = 0.0

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(128.0).sin().reshape(4, 32) / 3)
    def encode(self, x):
        time.sleep(DELAY)
        return (x.flatten(1) @ self.weight.T[:16]), (x.flatten(1) @ self.weight.T[16:])
    def decode(self, z):
        return (z @ self.weight[:, :16]).sigmoid().reshape(-1, 1, 4, 4)

def run(folder, delay=0.0):
    global DELAY
    DELAY = delay
    anchors = torch.rand(96, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(anchors, torch.arange(96)), batch_size=8)
    adapter = pf.pxgen.VAEAdapter(Model(), sample_latent=True)
    return pf.pxgen.explain(adapter, loader, batch_size=8, iterations=6, generations=8, k=3, features="latents",
                            work_dir=folder, progress=False)
"""


@pytest.mark.parametrize("phase", ["anchors", "thresholds"])
def test_a_killed_run_resumes(tmp_path, monkeypatch, phase):
    (tmp_path / "slow_model.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("slow_model", None)
    slow = importlib.import_module("slow_model")
    work = tmp_path / "work"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from protofast.pxgen import store; store.CHECKPOINT_SECONDS = 0\n"
        "import slow_model; slow_model.run(sys.argv[2], 0.15)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pf.__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(work)], env=environment)
    try:
        waited = time.monotonic()
        while not reached(work, phase):
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() - waited < 120
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    state = json.loads((work / "state.json").read_text())
    assert (0 < state["done"] < 96) == (phase == "anchors")

    calls = []
    analyse = VAEAdapter.analyse
    monkeypatch.setattr(VAEAdapter, "analyse", lambda self, x, *rest: calls.append(len(x)) or analyse(self, x, *rest))
    resumed = slow.run(work)
    spent = sum(calls)
    calls.clear()
    expected = slow.run(tmp_path / "whole")
    assert same(resumed, expected)
    assert resumed.labels.tolist() == list(range(96))
    assert spent <= sum(calls) - state["done"]
    calls.clear()
    assert same(slow.run(work), expected)  # a finished folder answers at once
    assert sum(calls) <= 2 + len(expected.originals)


def reached(work, phase):
    if phase == "thresholds":
        return any(work.glob("thresholds-*.json"))
    try:
        return 0 < json.loads((work / "state.json").read_text())["done"] < 96
    except OSError:
        return False


def test_a_failed_run_keeps_what_it_had(vae, anchors, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECKPOINT_SECONDS", 0)
    work, calls = tmp_path / "work", []

    def failing(x, y):
        calls.append(len(x))
        if len(calls) == 4:
            raise MemoryError("no room")
        return (x - y).abs().flatten(1).sum(1)

    with pytest.raises(MemoryError):
        explain(vae, anchors, extrinsic=failing, work_dir=work, batch_size=20)
    calls += [0] * 4
    report = explain(vae, anchors, extrinsic=failing, work_dir=work, batch_size=20, iterations=1)
    assert sum(calls[8:]) == 2 + 160 - 40 + 40 + len(report.originals)  # probe, what was left, generations, pictures
    table = np.fromfile(work / "criteria.f8").reshape(-1, 2)
    assert np.array_equal(table, np.stack(list(report.criteria.values()), 1))
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"extrinsic": "mse"}, "criteria"),
        ({"anchors": anchors + 0}, None),
        ({"anchors": anchors.flip(0)}, "anchors"),
        ({"model": TinyVAE(1)}, "model"),
        ({"features": "latents"}, "embedding"),
        ({"value_range": (0, 2)}, "value_range"),
        ({"k": 2, "thresholds": "percentile", "iterations": 2}, None),
    ):
        settings = {"model": vae, "anchors": anchors, "extrinsic": failing, "work_dir": work} | change
        if key is None:
            explain(**settings)
        else:
            with pytest.raises(
                ValueError, match=rf"holds another analysis \({key} was .* choose another work_dir, or delete"
            ):
                explain(**settings)


def test_values_that_are_not_finite(vae, anchors, tmp_path):
    broken = anchors.clone()
    broken[17, 0, 0, 0] = float("nan")
    broken[90:92] = float("inf")
    message = r"criterion 'kld' is not finite for 3 of 160 anchors; the first is anchor 17 \(nan\)"
    with pytest.raises(CriteriaError, match=message) as caught:
        explain(vae, broken, work_dir=tmp_path / "work")
    assert "criteria.f8" in str(caught.value)
    assert np.isfinite(caught.value.criteria["mse"]).sum() == 157
    table = np.fromfile(tmp_path / "work" / "criteria.f8").reshape(-1, 2)
    assert np.array_equal(table[:, 0], caught.value.criteria["kld"], equal_nan=True)

    seen = []

    def hopeless(x):
        seen.append(len(x))
        return x.flatten(1).sum(1) * float("nan")

    with pytest.raises(CriteriaError, match="criterion 'hopeless' is not finite for 20 of 20 anchors"):
        explain(vae, anchors, intrinsic=hopeless, batch_size=20)
    assert seen == [2, 20]  # not all anchors, once nothing is finite

    def partial(x):
        return torch.where(x.flatten(1).sum(1) == anchors[0].sum(), 0.0, float("inf"))

    adapter = FunctionAdapter(lambda count, generator: torch.zeros(count, *SHAPE), lambda x: x)
    with pytest.raises(CriteriaError, match=r"for 40 of 40 samples that the model generated \(iteration 0\)") as caught:
        explain(adapter, anchors[:1], intrinsic=partial)
    assert caught.value.criteria["mse"].tolist() == [0]


class Wrong(nn.Module):
    def __init__(self, encode, decode):
        super().__init__()
        self.encode, self.decode = encode, decode


def test_models_that_do_not_fit(vae, anchors):
    def two(x):
        return x.flatten(1)[:, :4], x.flatten(1)[:, :4]

    for model, error, message in (
        (Wrong(lambda x: x, vae.decode), TypeError, "encode of the model returned a tensor of shape"),
        (Wrong(lambda x: (x, x[:, :, :2]), vae.decode), TypeError, "two tensors of one shape"),
        (Wrong(lambda x: (x[:1], x[:1]), vae.decode), ValueError, "mean has shape .* for 2 images"),
        (Wrong(two, lambda z: z), ValueError, r"reconstruction has shape \(2, 4\), and the anchors \(2, 1, 6, 6\)"),
        (Wrong(two, lambda z: "image"), ValueError, "reconstruction has shape str"),
        (nn.Linear(3, 3), TypeError, "without encode.*wrap it in a VAEAdapter"),
    ):
        with pytest.raises(error, match=message):
            explain(model, anchors)
    with pytest.raises(ValueError, match=r"failed on anchors of shape \(2, 1, 7, 7\).*format of the model's images"):
        explain(vae, torch.rand(5, 1, 7, 7))
    flat = Wrong(lambda x: (x[:, :4], x[:, :4]), lambda z: vae.decode(z).flatten(1))  # (B, 36) in and out
    report = explain(VAEAdapter(flat, flatten=True), anchors)
    assert report.reconstructions[report.representatives[0].indices[0]].shape == SHAPE
    bad = FunctionAdapter(lambda count, generator: torch.zeros(count, 2, 6, 6), lambda x: x)
    with pytest.raises(ValueError, match=r"generation has shape \(2, 2, 6, 6\)"):
        explain(bad, anchors, intrinsic=lambda x: x.flatten(1).sum(1))
    with pytest.raises(ValueError, match=r"'kld' needs log_variance, mean, which FunctionAdapter does not give"):
        explain(bad, anchors, intrinsic="kld")
    with pytest.raises(ValueError, match="intrinsic is not given, and FunctionAdapter has no default"):
        explain(bad, anchors)


class Endless(IterableDataset):
    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**64}, ValueError, r"seed is 18446744073709551616; give at least 0 and less than 2\*\*63"),
        ({"k": 2.5}, TypeError, "k is 2.5; give a whole number"),
        ({"work_dir": __file__}, NotADirectoryError, r"work_dir .*test_pxgen\.py is a file"),
        ({"discovery": "k-means"}, ValueError, "discovery is 'k-means'; choose from 'k-center'"),
        ({"discovery": []}, ValueError, r"discovery is \[\]"),
        ({"groups": ["HEHI"]}, ValueError, r"groups is \['HEHI'\]"),
        ({"metric": "precomputed"}, ValueError, "metric is 'precomputed'"),
        ({"features": "pixel"}, ValueError, "features is 'pixel'"),
        ({"features": torch.zeros(3, 2)}, ValueError, r"features has shape \(3, 2\)"),
        ({"features": lambda x: x[0]}, ValueError, "one row an image"),
        ({"features": np.full((160, 2), "a")}, TypeError, "features has dtype <U1; give real numbers"),
        ({"features": lambda x: x.flatten(1).log()}, ValueError, "features of anchor 7 are not finite"),
        ({"features": 1 / (torch.arange(160.0)[:, None] - 7)}, ValueError, "features of anchor 7 are not"),
        ({"thresholds": "max"}, ValueError, "thresholds is 'max'"),
        ({"thresholds": {"fid": 1}}, ValueError, "thresholds names fid"),
        ({"thresholds": "percentile", "percentile": 0}, ValueError, "percentile is 0"),
        ({"value_range": (1, 0)}, ValueError, r"value_range is \(1, 0\)"),
        ({"extrinsic": ["mse", "mse"]}, ValueError, "two criteria are called mse"),
        ({"labels": [1, 2]}, ValueError, r"labels has shape \(2,\); give one label for each of the 160"),
        ({"anchors": torch.zeros(0, *SHAPE)}, ValueError, "anchors is empty"),
        ({"anchors": []}, ValueError, "anchors is empty"),
        ({"anchors": torch.zeros(4, 36)}, ValueError, r"anchors has shape \(4, 36\)"),
        ({"anchors": torch.zeros(4, *SHAPE, dtype=torch.int64)}, TypeError, "dtype torch.int64"),
        ({"anchors": [torch.zeros(SHAPE), torch.zeros(1, 6, 7)]}, ValueError, "different shapes"),
        ({"anchors": ["cat.png"]}, TypeError, "anchor 0 is a str"),
        ({"anchors": iter([torch.zeros(2, *SHAPE)])}, TypeError, "runs only once"),
        ({"anchors": 5}, TypeError, "anchors is a int"),
        ({"anchors": Endless()}, TypeError, "DataLoader"),
        ({"anchors": DataLoader(torch.zeros(4, *SHAPE), shuffle=True)}, ValueError, "shuffle=False"),
        ({"anchors": [torch.zeros(3, *SHAPE), torch.zeros(2, 1, 6, 7)]}, ValueError, r"an image has shape \(1, 6, 7\)"),
    ],
)
def test_settings_that_do_not_fit(vae, anchors, settings, error, message):
    anchors[7, 0, 0, 0] = 0
    with pytest.raises(error, match=message):
        explain(**{"model": vae, "anchors": anchors, **settings})


def test_anchors_must_keep_their_order(vae):
    class Shuffled:
        def __iter__(self):
            yield torch.rand(10, *SHAPE)

    with pytest.raises(ValueError, match="another order every time"):
        explain(vae, Shuffled())


def test_modes_and_gradients_are_put_back(vae, anchors):
    vae.train()
    vae.decoder.eval()
    modes = {name: part.training for name, part in vae.named_modules()}
    first = explain(vae, anchors)
    assert {name: part.training for name, part in vae.named_modules()} == modes
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert same(first, explain(vae.eval(), anchors))  # dropout was off

    def fails(x, y):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="no"):
        explain(vae.train(), anchors, extrinsic=fails)
    assert vae.encoder.training


def test_fingerprint_sees_every_weight(vae):
    before = VAEAdapter(vae).fingerprint()
    assert VAEAdapter(TinyVAE()).fingerprint() == before
    vae.decoder.bias.data[35] += 1e-3
    assert VAEAdapter(vae).fingerprint() != before
    vae.bfloat16()
    assert VAEAdapter(vae, sample_latent=True).fingerprint() != VAEAdapter(vae).fingerprint()
    assert explain(vae, torch.rand(3, *SHAPE)).criteria["kld"].shape == (3,)


def test_encoders_of_other_makes(vae, anchors):
    class Posterior:
        def __init__(self, mean, logvar):
            self.mean, self.logvar = mean, logvar

    class Output:
        def __init__(self, **members):
            self.__dict__.update(members)

    class Diffusers(nn.Module):
        encode = staticmethod(lambda x: Output(latent_dist=Posterior(*vae.eval().encode(x))))
        decode = staticmethod(lambda z: Output(sample=vae.decode(z)))

    class Forward(nn.Module):
        decode = staticmethod(vae.decode)

        def forward(self, x):
            mean, log_variance = vae.eval().encode(x)
            return vae.decode(mean), mean, log_variance

    expected = explain(vae, anchors)
    assert same(explain(Diffusers(), anchors), expected)
    assert same(explain(VAEAdapter(Forward()), anchors), expected)


@pytest.mark.filterwarnings("ignore:the model generates values")
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusion(anchors, kind):
    schedule = pf.DDIMSchedule.linear(100)
    adapter = DiffusionAdapter(lambda x, t: 0 * x, schedule, 4, loss_timesteps=3, prediction_type=kind)
    x = anchors[:6]
    state = adapter.analyse(x, Noise(range(6), 5), frozenset({"denoising_loss"}))
    assert set(state) == {"denoising_loss"}  # inversion was not asked for
    draws = Noise(range(6), 5)
    expected = np.zeros(6)
    for t in (16, 50, 83):
        e, a = draws.normal(*SHAPE).double(), float(schedule.alphas_cumprod[t])
        target = {"epsilon": e, "sample": x.double(), "v_prediction": a**0.5 * e - (1 - a) ** 0.5 * x.double()}[kind]
        expected += target.square().mean((1, 2, 3)).numpy() / 3
    np.testing.assert_allclose(state["denoising_loss"].numpy(), expected, rtol=1e-6)
    report = explain(adapter, anchors, intrinsic=["denoising_loss", "inversion_nll"], iterations=1, batch_size=50)
    arguments = {"prediction_type": kind}
    inverted = pf.diffusion.invert(lambda x, t: 0 * x, anchors, schedule, 4, **arguments)
    back = pf.diffusion.sample(lambda x, t: 0 * x, inverted, schedule, 4, **arguments)
    np.testing.assert_allclose(
        report.criteria["inversion_nll"], 0.5 * inverted.double().square().sum((1, 2, 3)), rtol=1e-6
    )
    np.testing.assert_allclose(
        report.criteria["mse"], (anchors - back).double().square().mean((1, 2, 3)), rtol=1e-5, atol=1e-12
    )
    assert adapter.generate(Noise(range(3))).shape == (3, *SHAPE)


def test_diffusion_in_another_range(anchors):
    data, seen = Dataset(anchors.numpy()), []

    def model(x, t):
        seen.append((float(x.min()), float(x.max())))
        return torch.zeros_like(x)

    adapter = DiffusionAdapter(model, pf.DDIMSchedule.linear(10), 1, loss_timesteps=1, clip_range=1.0)
    settings = {"intrinsic": "inversion_nll", "thresholds": {"inversion_nll": 1e9, "mse": 1e9}}
    report = explain(adapter, data, value_range=(-1, 1), **settings)
    assert min(low for low, _ in seen) < -0.99
    row = report.representatives[0].indices[0]
    np.testing.assert_allclose(report.originals[row], anchors[row], atol=1e-6)  # pictures are in [0, 1] again
    with pytest.warns(UserWarning, match=r"generates values from -1 to 1, and value_range is \(0.0, 1.0\)"):
        explain(adapter, data, iterations=1)


def test_networks_behind_methods_and_objects(vae):
    class Holder:
        def __init__(self):
            self.network = vae

        def encode(self, x):
            return self.network.encode(x)

        def decode(self, z):
            return self.network.decode(z)

    schedule = pf.DDIMSchedule.linear(10)
    for adapter in (
        VAEAdapter(Holder()),
        FunctionAdapter(vae.decode, vae.encode, vae.encode),
        DiffusionAdapter(vae.decode, schedule, 1, loss_timesteps=1),
    ):
        assert adapter.modules == [vae]
    first = VAEAdapter(Holder()).fingerprint()
    vae.decoder.bias.data += 1
    assert VAEAdapter(Holder()).fingerprint() != first


def test_generation_that_does_not_fit_is_said_first(anchors):
    batches = []
    bad = FunctionAdapter(lambda count, generator: torch.zeros(count, 2, 6, 6), lambda x: batches.append(len(x)) or x)
    settings = {"intrinsic": lambda x: x.flatten(1).sum(1)}
    with pytest.raises(ValueError, match="generation has shape"):
        explain(bad, anchors, **settings)
    assert batches == [2]
    given = {"<lambda>": 1e9, "mse": 1.0}  # nothing needs to be generated
    assert explain(bad, anchors, thresholds=given, **settings).summaries[0].count == len(anchors)


def test_diffusion_that_does_not_fit(anchors):
    schedule = pf.DDIMSchedule.linear(10)
    with pytest.raises(TypeError, match=r"schedule is a int.*from_diffusers"):
        DiffusionAdapter(lambda x, t: x, 10)
    with pytest.raises(ValueError, match="num_steps is 11; give 1 to 10"):
        DiffusionAdapter(lambda x, t: x, schedule, 11)
    with pytest.raises(ValueError, match="prediction_type is 'noise'"):
        DiffusionAdapter(lambda x, t: x, schedule, 5, prediction_type="noise")
    with pytest.raises(ValueError, match=r"predicted a tensor of shape \(2, 36\)"):
        explain(DiffusionAdapter(lambda x, t: x.flatten(1), schedule, 2, loss_timesteps=1), anchors)
    with pytest.raises(ValueError, match="image_shape is not known"):
        DiffusionAdapter(lambda x, t: x, schedule, 2, loss_timesteps=1).generate(Noise([0]))


@pytest.mark.filterwarnings("ignore:the model generates values")
def test_generator_is_inverted(anchors):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 36), nn.Tanh(), nn.BatchNorm1d(36), nn.Unflatten(1, SHAPE)).train()
    adapter = GeneratorAdapter(generator, 3, steps=250)
    x = adapter.generate(Noise(range(5), 9))
    state = adapter.analyse(x, Noise(range(5)), frozenset())
    assert (state["reconstruction"] - x).square().mean() < 1e-3 * x.var()
    part = adapter.analyse(x[2:3], Noise([2]), frozenset())
    torch.testing.assert_close(part["latent"], state["latent"][2:3], rtol=1e-3, atol=1e-3)
    assert generator.training
    assert all(parameter.grad is None for parameter in generator.parameters())
    far = adapter.analyse(torch.full((1, *SHAPE), 5.0), Noise([0]), frozenset())
    assert (far["reconstruction"] - 5).square().mean() > 1

    inverse = GeneratorAdapter(lambda z: z.reshape(-1, *SHAPE), (36,), lambda x: x.flatten(1))
    report = explain(inverse, anchors)
    assert (report.criteria["mse"] == 0).all()
    np.testing.assert_allclose(
        report.criteria["latent_nll"], 0.5 * anchors.double().square().sum((1, 2, 3)), rtol=1e-12
    )
    with pytest.raises(ValueError, match=r"inverter returned a tensor of shape \(2, 35\)"):
        explain(GeneratorAdapter(lambda z: z, (36,), lambda x: x.flatten(1)[:, 1:]), anchors)
    with pytest.raises(ValueError, match=r"the generator made \(2, 36\) where anchors are \(2, 1, 6, 6\)"):
        explain(GeneratorAdapter(lambda z: z, (36,)), anchors)


def test_functions_and_adapters_of_your_own(anchors):
    asked = []

    def generate(count, generator):
        asked.append((count, int(torch.randint(10**9, (1,), generator=generator))))
        return torch.rand(count, *SHAPE, generator=generator)

    settings = {"intrinsic": lambda x: x.flatten(1).amax(1), "features": "latents", "batch_size": 30}
    adapter = FunctionAdapter(generate, lambda x: x.round(), lambda x: x.flatten(1)[:, :3])
    first, second = explain(adapter, anchors, **settings), explain(adapter, anchors, **settings)
    assert same(first, second)
    assert [count for count, _ in asked] == [2, *[30, 10] * 3] * 2  # two to try, then three iterations
    assert len({draw for _, draw in asked}) == 6  # every batch has its own seed, the same in both runs

    class Own:
        provides = frozenset({"reconstruction", "energy"})
        intrinsic = (Criterion("energy", "intrinsic", lambda e: e, ("energy",)),)
        device = torch.device("cpu")

        def generate(self, noise):
            return noise.normal(*SHAPE).sigmoid()

        def analyse(self, images, noise, needs):
            assert needs == {"reconstruction", "energy"}
            return {"reconstruction": images, "energy": images.flatten(1).sum(1)}

        def fingerprint(self):
            return "own"

    report = explain(Own(), anchors)
    np.testing.assert_allclose(report.criteria["energy"], anchors.double().sum((1, 2, 3)), rtol=1e-5)
    Own.analyse = lambda self, images, noise, needs: {"reconstruction": images}
    with pytest.raises(ValueError, match=r"analyse\(\) of Own returned no energy"):
        explain(Own(), anchors)


def test_memory_does_not_grow_with_the_anchors():
    code = """
import resource, torch, protofast as pf
class Anchors:  # as 100,000 anchors they would take 400 MB
    def __init__(self, count): self.count = count
    def __iter__(self):
        for first in range(0, self.count, 500):
            yield torch.rand(500, 1, 32, 32, generator=torch.Generator().manual_seed(first))
class Model:
    encode = staticmethod(lambda x: (x.flatten(1)[:, :2], x.flatten(1)[:, 2:4]))
    decode = staticmethod(lambda z: z.sum(1)[:, None, None, None].expand(-1, 1, 32, 32))
def peak(count):
    limits = {"kld": .6, "mse": .5}
    report = pf.pxgen.explain(Model(), Anchors(count), features="latents", thresholds=limits, progress=False)
    assert len(report) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(2000)
print(peak(100_000) - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(pf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # MiB; the table and its standardised copies are 1.6 MB each


def test_progress_goes_to_stderr(vae, anchors, capsys):
    pytest.importorskip("rich")
    explain(vae, anchors, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "160/160" in captured.err


def test_read_me_example(anchors):
    vae = TinyVAE()
    report = pf.pxgen.explain(vae, anchors, iterations=2, progress=False)
    assert sum(summary.count for summary in report.summaries) == len(anchors)
