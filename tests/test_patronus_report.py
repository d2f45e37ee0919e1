# ruff: noqa: E402
"""The report on a model: one page without anything outside it, whatever the sections hold, and the command."""

import base64
import importlib
import inspect
import json
import re
import types
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch

for module in ("typer", "diffusers", "jinja2", "matplotlib", "PIL", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from typer.testing import CliRunner

from protofast import cli
from protofast.patronus import Patronus, PatronusConfig, page
from protofast.patronus.commands.common import Section

report = importlib.import_module("protofast.patronus.commands.report")
VOID = {"meta", "img", "br", "link", "input"}
NASTY = "<script>alert('1')</script> & \"so\" {{ 1 + 1 }}"


class Parsed(HTMLParser):
    """What a page holds; fails where tags are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.text, self.cells = [], [], "", []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data
        if self.stack and self.stack[-1] in ("td", "th"):
            self.cells.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def png(width=30, height=20, shade=128):
    file = BytesIO()
    Image.new("L", (width, height), shade).save(file, "PNG")
    return file.getvalue()


def section(name="generate", title="Images drawn", **more):
    made = Section(name, title, **more)
    made.findings = made.findings or ["First finding.", "Second finding."]
    return made


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    config = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)
    Patronus(config).save_pretrained(tmp_path / "run", data="digits")
    return tmp_path / "run"


def test_sections_with_all_they_hold(run):
    made = section(settings={"steps": 50, "globally": False, "quantile": 0.5, "nothing": None})
    made.table("Numbers", ["class", "n", "mixed", "share"], [["a", 12000, 1, 0.123456], ["b", None, "x", 2.0]])
    made.picture("small.png", png(), "Small", "What it shows.")
    made.picture("wide.png", png(1200, 10), "Wide")
    made.write(run / "generate")
    found = Parsed(page.to_html(run))
    for words in ("Images drawn", "First finding.", "Second finding.", "Numbers", "What it shows.", "quantile", "no"):
        assert words in found.text
    assert found.cells[4:12] == ["a", "12,000", "1", "0.1235", "b", "–", "x", "2"]
    small, wide = found.all("img")
    assert base64.b64decode(small["src"].removeprefix("data:image/png;base64,")) == png()
    assert (small["width"], small["height"]) == ("30", "20")
    assert "class" not in small
    assert wide["class"] == "wide"
    numbers = [cell.get("class") for cell in found.all("th")]
    assert numbers == [None, "n", None, "n"]
    torch_version = torch.__version__.partition("+")[0]
    assert f"torch {torch_version}" in found.text


def test_nothing_is_outside_the_page(run):
    made = section()
    made.picture("a.png", png(), "A")
    made.write(run / "generate")
    text = page.to_html(run)
    found = Parsed(text)
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    for _, attributes in found.tags:
        assert attributes.get("src", "data:").startswith("data:")
        href = attributes.get("href", "#training")
        assert href[0] == "#"
        assert href[1:] in ids
    assert not re.search(r"https?:|@import|url\(", text)
    assert text.startswith("<!doctype html>")
    assert 'name="viewport"' in text


def test_all_is_escaped(run):
    made = section("emergence", NASTY, findings=[NASTY], settings={NASTY: [NASTY]})
    made.table(NASTY, [NASTY], [[NASTY]])
    made.picture("a.png", png(), NASTY, NASTY)
    made.write(run / "emergence")
    config = json.loads((run / "config.json").read_text())
    config["about"]["data"] = NASTY
    (run / "config.json").write_text(json.dumps(config))
    text = page.to_html(run, missing={NASTY: NASTY})
    found = Parsed(text)
    assert "<script" not in text
    assert found.all("script") == []
    assert found.text.count(NASTY) >= 10
    assert found.all("img")[0]["alt"] == NASTY


def test_order_and_other_folders(run):
    for name, folder in (("evaluate", "evaluate"), ("prototypes", "prototypes"), ("new", "new"), ("prototypes", "x")):
        section(name, f"Title of {folder}").write(run / folder)
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / "result.json").write_text('{"format": "protofast-ddim-1"}')
    assert list(page.results(run)) == ["prototypes", "x", "evaluate", "new"]
    text = Parsed(page.to_html(run)).text
    assert [text.rindex(f"Title of {name}") for name in ("prototypes", "x", "evaluate", "new")] == sorted(
        text.rindex(f"Title of {name}") for name in ("prototypes", "x", "evaluate", "new")
    )


def test_long_tables_are_folded(run):
    made = section()
    made.table("Long", ["n"], [[n] for n in range(41)])
    made.write(run / "generate")
    assert "All 41 rows" in Parsed(page.to_html(run)).text


def test_a_run_without_anything(run):
    found = Parsed(page.to_html(run))
    assert "5 prototypes of digits" in found.text
    assert found.all("img") == []


def test_headline_counts_the_names(run):
    made = section("prototypes", "Prototypes")
    names = [("Bag", 0.95), ("", 0.5), ("Coat", 0.89), ("Boot", 0.9), ("", float("nan"))]
    made.numbers = {"names": [{"what": what, "auroc": auroc} for what, auroc in names]}
    made.write(run / "prototypes")
    assert "3 of 5 prototypes of digits can be named" in Parsed(page.to_html(run)).text


def test_damaged_files_are_named(run):
    section().write(run / "generate")
    (run / "generate" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"generate/result\.json is damaged"):
        page.to_html(run)
    made = section()
    made.picture("a.png", png(), "A")
    made.write(run / "generate")
    (run / "generate" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png is no PNG file"):
        page.to_html(run)
    (run / "generate" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png: no such file"):
        page.to_html(run)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "..", "folder/a.png"])
def test_pictures_are_of_their_folder(run, name):
    (run / "secret.png").write_bytes(png())
    made = section()
    made.write(run / "generate")
    content = json.loads((run / "generate" / "result.json").read_text())
    content["pictures"] = [{"file": name, "title": "", "caption": ""}]
    (run / "generate" / "result.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError)):
        page.to_html(run)


# The log of the training


def line(update, loss, **more):
    return json.dumps({"update": update, "loss": loss, **more}) + "\n"


def test_log_after_a_kill(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(line(1, 1.0) + line(2, 0.9) + line(3, 0.8) + line(2, 0.7) + '3\n{"upd')
    assert [(row["update"], row["loss"]) for row in page.read_log(log)] == [(1, 1.0), (2, 0.7), (3, 0.8)]


def test_training_is_told(run):
    more = {"lr": 1e-3, "images_per_second": 1234.0, "prototype_share": 0.025}
    rows = [line(update, 2 / update, **more) for update in range(1, 101)]
    (run / "log.jsonl").write_text("".join(rows) + line(101, float("nan")) + "{")
    found = Parsed(page.to_html(run))
    assert "100 updates; the loss went from 2 to 0.0222, at 1,234 images per second; 2.5 %" in found.text
    (picture,) = found.all("img")
    data = base64.b64decode(picture["src"].partition(",")[2])
    assert Image.open(BytesIO(data)).size == (int(picture["width"]), int(picture["height"]))


@pytest.mark.parametrize("text", ["", "{", line(1, float("nan"))])
def test_logs_of_nothing(run, text):
    (run / "log.jsonl").write_text(text)
    assert Parsed(page.to_html(run)).all("img") == []


def test_a_log_of_one_update(run):
    (run / "log.jsonl").write_text(line(20, 0.5))
    assert "20 updates; the loss went from 0.5 to 0.5." in Parsed(page.to_html(run)).text


# The command


def call(*arguments):
    return CliRunner().invoke(cli.build(), ["patronus", "report", *map(str, arguments)])


@pytest.fixture
def made(monkeypatch):
    """Stands for the other commands: what was called, with what."""
    calls = []

    def import_module(name, package):
        command = name.removeprefix(".")

        def work(run, data=None, seed=0, progress=True):
            calls.append((command, run, data, seed, progress))
            if command == "diagnose":
                raise ValueError("no <attribute> was planted")
            if command == "evaluate":
                raise KeyError("label")
            section(command, f"Title of {command}").write(run / command)

        return types.SimpleNamespace(**{command: work})

    monkeypatch.setattr(report, "import_module", import_module)
    return calls


def test_command_runs_what_is_missing(run, made):
    section("generate", "Already there").write(run / "generate")
    done = call(run, "--seed", 7, "--device", "cpu", "--no-progress")
    assert done.exit_code == 0, done.output
    names = ["prototypes", "latent", "emergence", "diagnose", "evaluate"]
    assert made == [(name, run, None, 7, False) for name in names]
    found = Parsed((run / "report.html").read_text())
    for words in ("Already there", "Title of latent", "no <attribute> was planted", "KeyError: 'label'"):
        assert words in found.text
    assert "no <attribute> was planted" in done.output
    assert str(run / "report.html") in done.output


def test_command_shows_what_there_is(run, made):
    section("generate", "Already there").write(run / "generate")
    done = call(run, "--only-existing", "--out", run / "pages" / "page.html")
    assert done.exit_code == 0, done.output
    assert made == []
    found = Parsed((run / "pages" / "page.html").read_text())
    assert "Already there" in found.text
    assert "Not in this report: prototypes, latent, emergence, diagnose, evaluate." in found.text


def test_command_refuses(tmp_path, run, made):
    done = call(tmp_path / "nowhere")
    assert done.exit_code == 1
    assert "no such file" in done.output
    done = call(run, "--out", tmp_path)
    assert done.exit_code == 1
    assert "is a folder" in done.output
    assert made == []


def test_the_options_of_the_real_commands():
    """Each can be called with a run alone."""
    for name in report.COMMANDS:
        function = getattr(importlib.import_module(f"protofast.patronus.commands.{name}"), name)
        first, *rest = inspect.signature(function).parameters.values()
        assert first.name == "run"
        assert all(parameter.default is not inspect.Parameter.empty for parameter in rest)
