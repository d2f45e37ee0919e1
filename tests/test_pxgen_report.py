# ruff: noqa: E402
"""The report as files: HTML without anything outside it, strict JSON, Parquet, and nothing lost half-way."""

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("jinja2", "matplotlib", "pyarrow", "PIL", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")

import pyarrow.parquet as parquet

from protofast.pxgen import figures, page, vae
from protofast.pxgen import report as files
from protofast.pxgen.result import GROUPS, GroupSummary, Report, Representatives, Threshold


def make(n=200, *, shape=(1, 6, 5), labels=True, extra=False, k=4, seed=0):
    rng = np.random.default_rng(seed)
    criteria = {"kld": rng.lognormal(0, 2, n), "sse": rng.gamma(2.0, 1.0, n)}
    kinds = {"kld": "intrinsic", "sse": "extrinsic"}
    limits = [
        Threshold("kld", "intrinsic", "max-mean", 1.0, [0.9, 1.1], math.sqrt(0.02), math.sqrt(0.02)),
        Threshold("sse", "extrinsic", "given", 2.0),
    ]
    groups = (2 * (criteria["kld"] >= 1) + (criteria["sse"] >= 2)).astype(np.uint8)
    if extra:
        criteria["group"] = rng.random(n)  # a user's criterion may have the name of a column
        kinds["group"] = "extrinsic"
        limits.append(Threshold("group", "extrinsic", "given", math.inf))
    representatives = []
    originals, reconstructions = {}, {}
    for position, name in enumerate(GROUPS):
        members = np.flatnonzero(groups == position)
        chosen = rng.permutation(members)[:k]
        nearest = rng.integers(0, max(1, len(chosen)), len(members))
        entry = Representatives(
            name,
            "k-center",
            "criteria",
            "euclidean",
            chosen.tolist(),
            0.5,
            0.25,
            nearest if len(chosen) else nearest[:0],
        )
        representatives.append(entry)
        for row in chosen.tolist():
            originals[row] = rng.random(shape, np.float32)
            reconstructions[row] = rng.random(shape, np.float32)
    counts = np.bincount(groups, minlength=4)
    return Report(
        settings={"data": "<i>made up</i>", "k": k, "nothing": None, "bad": math.nan, "kinds": ("a", 1.5)},
        versions={"protofast": "0"},
        seeds={"seed": seed},
        criteria=criteria,
        kinds=kinds,
        thresholds=limits,
        groups=groups,
        labels=rng.integers(0, 3, n) if labels else None,
        names=["cat", "dog & co", "owl"] if labels else None,
        summaries=[GroupSummary(name, int(c), float(c / max(1, n))) for name, c in zip(GROUPS, counts, strict=True)],
        representatives=representatives,
        signatures=["HILE holds over half"],
        originals=originals,
        reconstructions=reconstructions,
        sensitivity={"factors": [0.5, 1.0], "kld": [3, 0], "sse": [7, 0]},
        findings=["A finding, with <b>angle brackets</b>."],
    )


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    whole = figures.png
    monkeypatch.setattr(figures, "png", lambda figure, dpi=30: whole(figure, dpi))


class Parsed(HTMLParser):
    """Collects what a page refers to, and whether its tags are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images, self.text = [], [], 0, ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_outside_it(tmp_path):
    report = make()
    path = report.save(tmp_path / "new" / "folder")
    text = path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert path.name == "report.html"
    assert parsed.links
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", re.sub(r"data:[^\"]*", "", text))
    assert parsed.images == 1 + 2 * len(report.originals)
    assert "A finding, with <b>angle brackets</b>." in parsed.text  # shown as written, not taken as HTML
    for wanted in (*GROUPS, "Model delusion", "Aligned conception", "HILE holds over half", "dog & co", "14.1 %"):
        assert wanted in parsed.text
    for row in report.originals:
        kld, sse = report.criteria["kld"][row], report.criteria["sse"][row]
        assert f"<b>{row:,}</b> · " in text
        assert f"<br>KL divergence {kld:.3g}<br>squared error {sse:.3g}</figcaption>" in text


def test_notebook_fragment():
    text = make()._repr_html_()
    Parsed(text)
    assert "<html" not in text
    selectors = re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*\{", "", page._style()))
    assert all(part.strip().startswith(".pxgen") for one in selectors for part in one.split(","))


def test_result_is_strict_json(tmp_path):
    report = make(extra=True)
    report.save(tmp_path)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(f"bare {constant}")

    result = json.loads(text, parse_constant=refuse)
    assert result["counts"] == {s.name: s.count for s in report.summaries}
    assert result["thresholds"][2]["value"] == "inf"
    assert result["settings"]["bad"] == "nan"
    assert result["seeds"] == {"seed": 0}
    assert [entry["indices"] for entry in result["representatives"]] == [e.indices for e in report.representatives]


@pytest.mark.parametrize("labels", [True, False])
def test_table_of_anchors(tmp_path, labels):
    report = make(labels=labels, extra=True)
    report.save(tmp_path)
    table = parquet.read_table(tmp_path / "anchors.parquet").to_pydict()
    assert table["anchor"] == list(range(len(report)))
    assert table["group"] == [GROUPS[group] for group in report.groups]
    assert table["kld"] == report.criteria["kld"].tolist()
    assert table["criterion group"] == report.criteria["group"].tolist()
    if labels:
        assert table["label"] == report.labels.tolist()
        assert table["name"] == [report.names[label] for label in report.labels]
    else:
        assert set(table["label"]) == set(table["name"]) == {None}
    for entry in report.representatives:
        wanted = [entry.indices[position] for position in entry.nearest]
        assert [table["nearest_representative"][row] for row in report.members(entry.group)] == wanted


def equal(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            equal(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            equal(one, other)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif hasattr(a, "__dataclass_fields__"):
        equal(vars(a), vars(b))
    else:
        assert a == b


@pytest.mark.parametrize(
    ("n", "labels", "extra"), [(200, True, True), (200, False, False), (1, True, False), (0, True, True)]
)
def test_load_gives_back_what_was_saved(tmp_path, n, labels, extra):
    report = make(n, labels=labels, extra=extra)
    report.settings = {"data": "digits", "k": 3, "extrinsic": ["sse"], "root": None}
    report.save(tmp_path)
    equal(report, Report.load(tmp_path))


def test_text_labels_and_two_algorithms(tmp_path):
    report = make()
    report.labels, report.names = np.array(["b", "a"] * 100), None
    again = [replace(entry, algorithm="k-medoids", bound=None) for entry in report.representatives]
    report.representatives += [replace(entry, indices=entry.indices[::-1]) for entry in again]
    report.settings = {}
    report.save(tmp_path)
    equal(report, Report.load(tmp_path))
    assert "nearest_representative_2" in parquet.read_table(tmp_path / "anchors.parquet").column_names


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_error_half_way_leaves_the_old_report(tmp_path, monkeypatch):
    make().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr(files, "_write_anchors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_kill_half_way_leaves_the_old_report(tmp_path):
    make().save(tmp_path)
    before = contents(tmp_path)
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pxgen_report import files, make\n"
        "files._write_anchors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"make(seed=1).save({str(tmp_path)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".report-")]
    assert len(left) == 1  # what was being built, never in the way
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path not in left} == before
    make(seed=1).save(tmp_path)
    assert not list(tmp_path.glob(".report-*"))


def test_a_kill_between_the_moves_is_mended_by_the_next_save(tmp_path):
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pxgen_report import files, make\n"
        "move, moved = os.replace, []\n"
        "def limited(*paths):\n"
        "    if len(moved) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    moved.append(move(*paths))\n"
        "files.os.replace = limited\n"
        f"make().save({str(tmp_path)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "result.json").exists()
    make(seed=1).save(tmp_path)
    assert Report.load(tmp_path).seeds == {"seed": 1}
    assert not list(tmp_path.glob(".report-*"))


def test_saving_again_replaces_all_of_it_and_nothing_else(tmp_path):
    make().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    second = make(seed=1)
    second.representatives = second.representatives[:1]
    second.save(tmp_path)
    names = {"HIHE.png", "anchors.parquet", "groups.png", "notes.txt", "pictures.npz", "report.html", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"scatter.png"}
    assert Report.load(tmp_path).seeds == {"seed": 1}


def test_it_takes_no_place_of_others(tmp_path):
    (tmp_path / "scatter.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"scatter\.png"):
        make().save(tmp_path)
    assert contents(tmp_path) == {"scatter.png": b"mine"}
    with pytest.raises(NotADirectoryError, match="is a file"):
        make().save(tmp_path / "scatter.png")


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no report"):
        Report.load(tmp_path)
    for name in ("anchors.parquet", "pictures.npz", "result.json"):
        make().save(tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is .*damaged"):
            Report.load(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_headline_names_the_largest_group():
    report = make(4)
    report.summaries = [GroupSummary(name, count, count / 4) for name, count in zip(GROUPS, (1, 3, 0, 0), strict=True)]
    assert files.headline(report) == "The model is sure and wrong on 3 of 4 anchors (75.0 %)"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 4), (3, 300, 200), (5, 3, 9)])
def test_pictures_of_any_shape(shape):
    from io import BytesIO

    from PIL import Image

    image = np.linspace(-1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    image.flat[0] = np.nan
    with Image.open(BytesIO(figures.picture(image))) as drawn:
        assert max(drawn.size) <= 256
        assert drawn.mode == ("RGB" if shape[0] >= 3 else "L")
        if max(shape) <= 256:
            assert drawn.size == (shape[2], shape[1])
            wanted = np.clip(np.nan_to_num(image), 0, 1)
            wanted = np.moveaxis(wanted[:3], 0, -1) if shape[0] >= 3 else wanted[0]
            np.testing.assert_array_equal(np.asarray(drawn), (wanted * 255).round().astype(np.uint8))


def test_scatter_of_many_anchors_shows_their_density():
    few, report = make(figures.MOST_POINTS), make(300_000)
    assert sum(len(marks.get_offsets()) for marks in figures.scatter(few).axes[0].collections) >= len(few)
    assert "Each mark is an anchor" in page.to_html(few)
    assert "Anchors, darker where there are more" in page.to_html(report)
    figure = figures.scatter(report)
    axes = figure.axes[0]
    assert sum(len(marks.get_offsets()) for marks in axes.collections) < 100  # representatives
    assert "all 300,000 anchors" in figure._supxlabel.get_text()
    assert len(figures.png(figure, dpi=160)) < 2_000_000

    image = np.asarray(axes.images[0].get_array())
    down, across = image.shape[:2]
    position = axes.transScale.transform(np.stack([report.criteria["kld"], report.criteria["sse"]], 1))
    low, high = axes.transScale.transform(np.array([axes.get_xlim(), axes.get_ylim()]).T)
    x, y = ((position - low) / (high - low) * [across, down]).T
    edges = np.arange(down + 1), np.arange(across + 1)
    counts = [np.histogram2d(y[report.groups == g], x[report.groups == g], edges)[0] for g in range(4)]
    total = sum(counts)
    shown = total > 0
    assert total.sum() > 0.99 * len(report)  # a few lie beyond a logarithmic axis, and are drawn at its edge
    inner = np.s_[1:-1, 1:-1]
    off = (image[inner][..., 3] > 0) != shown[inner]
    assert off.mean() < 0.001  # cells that rounding of an edge decides
    one = np.stack(counts).max(0) == total
    for group, name in enumerate(GROUPS):
        alone = shown & one & (counts[group] > 0)
        alone[0] = alone[-1] = alone[:, 0] = alone[:, -1] = False
        colour = np.array([int(figures.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert alone.sum() > 100
        assert np.median(np.abs(image[alone][:, :3] - colour)) < 1e-9
    order = np.argsort(total[inner], axis=None)
    assert np.corrcoef(np.log1p(total[inner].flat[order]), image[inner][..., 3].flat[order])[0, 1] > 0.85


def test_counts_of_labels():
    for labels in (np.arange(200) % 3, np.array(["a", "b", "a", "c"])[np.arange(200) % 4]):
        report = replace(make(), labels=labels)
        for group in (None, *GROUPS):
            rows = slice(None) if group is None else report.members(group)
            expected = {report._name(label): int((labels[rows] == label).sum()) for label in np.unique(labels)}
            assert report.label_counts(group) == expected
        assert report.label_table() == {group: report.label_counts(group) for group in GROUPS}


def test_scatter_of_awkward_values():
    report = make(50)
    report.criteria["kld"][:3] = 0, np.inf, 1e-300
    report.criteria["sse"][:] = 1.0
    assert figures.png(figures.scatter(report)).startswith(b"\x89PNG")
    assert figures.scatter(report).axes[0].get_xscale() == "log"
    assert figures.scatter(report).axes[0].get_yscale() == "linear"


def test_no_picture_library_state_is_touched():
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pxgen_report import files, make; make()._repr_html_()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- the VAE ----


def images(n=60):
    return torch.rand(n, 1, 6, 5, generator=torch.Generator().manual_seed(0))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_vae_is_the_papers_at_its_size():
    model = vae.VAE((1, 28, 28))
    sizes = [tuple(value.shape) for name, value in model.state_dict().items() if name.endswith("weight")]
    assert sizes == [(400, 784), (400, 400), (200, 400), (200, 400), (400, 200), (400, 400), (784, 400)]


def test_training_repeats_and_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    first = vae.train_vae(images(), epochs=2, seed=3, cache=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, vae.train_vae(images(), epochs=2, seed=3, cache=False))
    assert not same(first, vae.train_vae(images(), epochs=2, seed=4, cache=False))
    assert not first.training


def test_training_lowers_the_loss():
    data = (images(100) * 0 + torch.rand(1, 1, 6, 5)).round()

    def error(model):
        return float((model.decode(model.encode(data)[0]) - data).square().sum())

    assert error(vae.train_vae(data, epochs=60, cache=False)) < 0.1 * error(vae.train_vae(data, epochs=1, cache=False))


def test_cached_weights_are_used_and_repaired(tmp_path, monkeypatch):
    steps = []
    train = lambda: vae.train_vae(images(), epochs=2, progress=lambda *at: steps.append(at), cache=tmp_path)  # noqa: E731
    first = train()
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert same(first, train())
    assert len(steps) == 4
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:100], b"", bytes(flipped)):
        steps.clear()
        path.write_bytes(damaged)
        assert same(first, train())
        assert len(steps) == 4
        assert same(first, vae.load_vae(path))
    vae.train_vae(images(), epochs=2, seed=1, cache=tmp_path)
    vae.train_vae(images(59), epochs=2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # other settings or data are other files


def test_cache_that_cannot_be_written_costs_no_result(tmp_path):
    (tmp_path / "file").write_text("")
    assert same(
        vae.train_vae(images(), epochs=1, cache=tmp_path / "file"), vae.train_vae(images(), epochs=1, cache=False)
    )


def test_vae_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="outside"):
        vae.train_vae(images() * 2, cache=False)
    with pytest.raises(ValueError, match="outside"):
        vae.train_vae(images() * math.nan, cache=False)
    with pytest.raises(ValueError, match="at least one image"):
        vae.train_vae(images()[:0], cache=False)
    with pytest.raises(ValueError, match="epochs is 0"):
        vae.train_vae(images(), epochs=0, cache=False)
    with pytest.raises(ValueError, match="was built for"):
        vae.VAE((1, 6, 5)).encode(torch.rand(2, 1, 5, 6))
    with pytest.raises(FileNotFoundError, match="no such file"):
        vae.load_vae(tmp_path / "absent.safetensors")
    (tmp_path / "x.safetensors").write_text("x")
    with pytest.raises(ValueError, match="damaged"):
        vae.load_vae(tmp_path / "x.safetensors")
