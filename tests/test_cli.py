"""The command line: help that teaches, errors in one line, and the demo from end to end in a small form."""
# ruff: noqa: E402

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="typer is absent: pip install 'protofast[cli]'")
for module in ("sklearn", "jinja2", "matplotlib", "pyarrow", "pooch", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")

from typer.testing import CliRunner

from protofast import cli
from protofast._backend import survey
from protofast.pxgen import FunctionAdapter, command, vae
from protofast.pxgen.result import Report

runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    return cli.build()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("PROTOFAST_DEBUG", raising=False)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "vae.safetensors"
    vae.save_vae(vae.train_vae(torch.rand(60, 1, 8, 8), epochs=1, cache=False), path)
    return str(path)


QUICK = ["--iterations", "2", "--generations", "40", "--no-progress"]


def run(app, *arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("name", "taught"),
    [
        ("pxgen", ("--train-class 0", "--model", "--seed", "--out", "sure and wrong")),
        ("demo", ("protofast demo --out", "--seed", "--out")),
        ("bench", ("--help",)),
        ("info", ("backends",)),
    ],
)
def test_help_teaches(app, name, taught):
    result = run(app, name, "--help")
    assert result.exit_code == 0
    for words in taught:
        assert words in result.output
    assert name in run(app, "--help").output


def test_info_is_backend_info(app):

    result = run(app, "info")
    assert result.exit_code == 0
    assert result.stdout == f"{survey()}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder", "--train-class", "0"], "no/such/folder does not exist"),
        (["--data", "cifar99", "--train-class", "0"], "cifar99 does not exist"),
        (["--train-class", "12"], "--train-class is '12'"),
        (["--train-class", "zero"], "--train-class is 'zero'"),
        (["--model", "no_such_module:thing"], "there is no module no_such_module"),
        (["--model", "protofast.pxgen:thing"], "protofast.pxgen has no thing"),
        (["--model", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--model", "{weights}", "--intrinsic", "kdl"], "'kdl'"),
        (["--model", "{weights}", "--discovery", "k-centre"], "'k-centre'"),
        (["--model", "{weights}", "--thresholds", "kld=5,nothing=1"], "nothing"),
    ],
)
def test_an_error_is_one_clear_line_and_writes_nothing(app, tmp_path, weights, arguments, message):
    arguments = [argument.format(weights=weights) for argument in arguments]
    result = run(app, "pxgen", "--out", tmp_path / "out", *QUICK, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["pxgen", "--train-class", "0", "-k", "0"],
        ["pxgen", "--train-class", "0", "-k", "many"],
        ["pxgen"],
        ["pxgen", "--train-class", "0", "--model", "x.safetensors"],
        ["pxgen", "--train-class", "0", "--thresholds", "kld=high"],
        ["pxgen", "--no-such-option"],
        ["demo", "--seed", "-1"],
        ["no-such-command"],
    ],
)
def test_wrong_use_ends_with_two(app, arguments):
    result = run(app, *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_where(app):
    assert isinstance(
        run(app, "--debug", "pxgen", "--data", "nowhere", "--train-class", "0").exception, FileNotFoundError
    )


def test_weights_of_another_shape(app, tmp_path, weights):
    np.save(tmp_path / "x.npy", np.zeros((20, 9, 9), np.uint8))
    result = run(app, "pxgen", "--data", tmp_path / "x.npy", "--model", weights, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 1
    assert "this VAE was built for (B, 1, 8, 8)" in result.stderr


def test_model_from_weights_and_k_over_a_group(app, tmp_path, weights):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 8, 8), np.float32))
    mine = tmp_path / "out" / "work" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("not the report's")
    common = ["--data", tmp_path / "x.npy", "--model", weights, "--out", tmp_path / "out", "-k", "50"]
    result = run(app, "pxgen", *common, *QUICK)
    assert result.exit_code == 0, result.output
    assert "fewer than k = 50" in result.stdout
    report = Report.load(tmp_path / "out")
    assert len(report) == 20
    assert sum(len(entry.indices) for entry in report.representatives) == 20
    assert not (tmp_path / "out" / ".pxgen-work").exists()
    assert mine.read_text() == "not the report's"
    before = (tmp_path / "out" / "anchors.parquet").read_bytes()
    assert run(app, "pxgen", *common, *QUICK).exit_code == 0
    assert (tmp_path / "out" / "anchors.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--extrinsic", "l2", "extrinsic has 'l2'; registered are"),
        ("--intrinsic", "mse", "which is an extrinsic criterion"),
        ("--discovery", "k-means", "discovery is"),
        ("--features", "pixel", "features is"),
        ("--metric", "l1", "metric is"),
        ("--features", "pixels,criteria", "features is"),
        ("--thresholds", "largest", "thresholds is"),
        ("--thresholds", "percentile:101", "percentile is 101"),
        ("--extrinsic", "", "extrinsic is empty"),
    ],
)
def test_settings_are_checked_before_a_model_is_trained(app, tmp_path, monkeypatch, option, value, message):
    monkeypatch.setattr(command, "_train", lambda *_, **__: pytest.fail("trained for nothing"))
    result = run(app, "pxgen", "--train-class", "0", "--out", tmp_path / "out", option, value)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_stopped_run_goes_on(app, tmp_path, weights, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 8, 8), np.float32))
    common = ["--data", tmp_path / "x.npy", "--model", weights, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:  # stopped once the tables are there
        patch.setattr(Report, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert run(app, "pxgen", *common, *QUICK).exit_code == 1
    table = np.memmap(tmp_path / "out" / ".pxgen-work" / "criteria.f8", np.float64, "r+", shape=(20, 2))
    table[3, 1] = 0.125  # told from what would be computed again
    table.flush()
    other = run(app, "pxgen", *common, *QUICK, "--extrinsic", "mae")
    assert other.exit_code == 1
    assert "holds another analysis" in other.stderr
    assert run(app, "pxgen", *common, *QUICK).exit_code == 0
    assert Report.load(tmp_path / "out").criteria["mse"][3] == 0.125
    assert not (tmp_path / "out" / ".pxgen-work").exists()


def test_model_from_a_function_here(app, tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(
        "import torch\nfrom protofast.pxgen import FunctionAdapter\n"
        "def rounding():\n"
        "    return FunctionAdapter(lambda n, g: torch.rand(n, 1, 8, 8, generator=g), lambda x: x.round(),"
        " lambda x: x.flatten(1))\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((30, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    options = ["--intrinsic", "latent_nll", "--extrinsic", "mse,mae", "--thresholds", "percentile:90"]
    result = run(app, "pxgen", "--data", "x.npy", "--model", "models_of_mine:rounding", *options, *QUICK)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "runs" / "pxgen-x" / "result.json").read_text())
    assert found["settings"]["percentile"] == 90
    assert list(found["criteria"]) == ["latent_nll", "mse", "mae"]


def test_criteria_that_are_not_finite_are_kept(app, tmp_path, monkeypatch):
    bad = FunctionAdapter(
        lambda n, g: torch.rand(n, 1, 8, 8, generator=g),
        lambda x: torch.where(x.mean((1, 2, 3), keepdim=True) > 0.5, torch.nan, x),
        lambda x: x.flatten(1),
    )
    monkeypatch.setattr(command, "_model", lambda _: bad)
    images = np.random.default_rng(0).random((30, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", images)
    arguments = ["--data", tmp_path / "x.npy", "--model", "x:y", "--intrinsic", "latent_nll", "--out", tmp_path / "out"]
    result = run(app, "pxgen", *arguments, *QUICK)
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    with np.load(tmp_path / "out" / "criteria.npz") as kept:
        assert np.array_equal(np.isnan(kept["mse"]), images.mean((1, 2)) > 0.5)
        assert np.isfinite(kept["latent_nll"]).all()


def test_a_place_that_cannot_hold_the_report_is_refused_first(app, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_model", lambda _: pytest.fail("worked for nothing"))
    (tmp_path / "report.html").write_text("mine")
    for out, message in (
        (tmp_path, "holds report.html, which no report of protofast wrote"),
        (tmp_path / "report.html", "is a file"),
        (tmp_path / "report.html" / "deeper", "is a file"),
    ):
        result = run(app, "pxgen", "--model", "x:y", "--out", out, *QUICK)
        assert result.exit_code == 1
        assert message in result.stderr


def test_value_range(app, tmp_path, monkeypatch):
    seen = []
    adapter = FunctionAdapter(
        lambda n, g: torch.rand(n, 1, 8, 8, generator=g), lambda x: seen.append(x) or x, lambda x: x.flatten(1)
    )
    monkeypatch.setattr(command, "_model", lambda _: adapter)
    np.save(tmp_path / "x.npy", np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8))
    arguments = ["--data", tmp_path / "x.npy", "--intrinsic", "latent_nll", "--out", tmp_path / "out"]
    result = run(app, "pxgen", *arguments, "--model", "x:y", "--value-range=-1,1", *QUICK)
    assert result.exit_code == 0, result.output
    assert (min(x.min() for x in seen), max(x.max() for x in seen)) == (-1, 1)
    for wrong in ("--value-range=1", "--value-range=low,high"):
        assert run(app, "pxgen", "--model", "x:y", wrong).exit_code == 2
    assert run(app, "pxgen", "--train-class", "0", "--value-range=-1,1").exit_code == 2


def test_a_reader_that_has_seen_enough():
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-m", "protofast.cli", "info"]
    result = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 1


def test_findings_count_what_they_say():
    from protofast.data import Dataset

    # Bright images are class 1, dark ones class 0. The model darkens everything but the images of class 2.
    labels = np.repeat([0, 1, 2], 20)
    level = np.array([0.0, 1.0, 0.5], np.float32)[labels]
    data = Dataset(np.broadcast_to(level[:, None, None], (60, 4, 4)).copy(), labels, names=("dark", "bright", "grey"))
    adapter = FunctionAdapter(
        lambda n, g: torch.zeros(n, 1, 4, 4), lambda x: torch.where(x.mean((1, 2, 3), keepdim=True) == 0.5, x, 0 * x)
    )
    from protofast.pxgen import explain

    report = explain(
        adapter,
        data,
        intrinsic=lambda x: 0 * x.mean((1, 2, 3)),
        thresholds={"<lambda>": 1.0, "mse": 0.5},
        iterations=1,
        generations=1,
        progress=False,
    )
    text = " ".join(command._findings(adapter, data, report, 0, 0, False))
    assert "the 40 anchors of other classes, it reconstructs 20 (50.0 %) as class dark" in text
    assert "On 20 (50.0 %) of these others it is sure and wrong" in text
    assert "Of the 20 anchors of class dark itself, 20 (100.0 %)" in text
    assert "trained on 40 originals and right on 100.0 % of 20 others" in text


def test_demo_from_end_to_end(tmp_path):
    small = ["--epochs", "25", "--iterations", "2", "--generations", "200"]
    call = [sys.executable, "-m", "protofast.cli", "demo", "--out", str(tmp_path / "out"), *small]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"Report: {(tmp_path / 'out' / 'report.html').resolve()}")
    assert "Shown the 1,619 anchors of other classes" in result.stdout
    report = Report.load(tmp_path / "out")
    assert len(report) == 1797
    assert report.findings[0] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_typer_it_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; from protofast.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "The command protofast needs typer and rich: pip install 'protofast[cli]'\n"
