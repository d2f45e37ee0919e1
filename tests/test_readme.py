"""Every command and snippet in the README and docs is run, or checked against what would run it."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import protofast as pf

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)):
            found.append(pytest.param(block, id=f"{page.name}-{number}"))
    return found


def commands() -> list:
    lines = []
    for parameter in blocks("sh"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            if command := line.split("#")[0].strip():
                lines.append(pytest.param(command, id=f"{parameter.id}: {command}"))
    return lines


class TinyVAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(64, 8), torch.nn.Linear(4, 64)

    def encode(self, x):
        return self.down(x.flatten(1)).chunk(2, 1)

    def decode(self, z):
        return self.up(z).sigmoid().reshape(-1, 1, 8, 8)


@pytest.mark.parametrize("code", blocks("python"))
def test_snippet(code, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "pf": pf,
        "torch": torch,
        "np": np,
        "vae": TinyVAE(),
        "images": torch.rand(60, 1, 8, 8),
        "features": torch.rand(2, 8, 5, 5),
        "prototypes": torch.rand(4, 8),
        "x": torch.randn(2, 1, 8, 8),
        "prediction": torch.randn(2, 1, 8, 8),
        "points": torch.randn(200, 3),
        "unet": lambda x, t: 0.1 * x,
        "schedule": pf.DDIMSchedule.linear(1000),
        "image": torch.rand(2, 1, 8, 8),
        "sample": pf.diffusion.sample,
        "invert": pf.diffusion.invert,
        "pipeline": SimpleNamespace(scheduler=diffusers.DDIMScheduler()),
        "generator": lambda z: torch.sigmoid(z.reshape(-1, 1, 8, 8)),
        "my_distance": lambda images, rebuilt: (images - rebuilt).abs().flatten(1).amax(1),
    }
    exec(compile(code, "<snippet>", "exec"), names)


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path):
    settings = re.compile(r"[A-Z0-9_]+=").match
    program, *arguments = itertools.dropwhile(settings, shlex.split(command))
    if program == "make":
        run = ["make", "--dry-run", *arguments]
    elif program in ("pip", "uv"):
        pytest.skip("installs are tested in test_build.py")
    elif program == "protofast":
        run = [sys.executable, "-m", "protofast.cli", *small(arguments, tmp_path)]
    elif program == "python":
        run = [sys.executable, *small(arguments, tmp_path)]
    else:
        pytest.fail(f"no way to check {command!r}")
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def small(arguments: list[str], folder: Path) -> list[str]:
    """The same command at a size for a test, and writing where a test may."""
    line = " ".join(arguments)
    if "fashion-mnist" in line:
        try:
            pf.data.load("fashion-mnist")
        except Exception as error:
            pytest.skip(str(error))
    sized = [
        str(folder / "out") if before == "--out" else word for before, word in itertools.pairwise(["", *arguments])
    ]
    if "pxgen" in arguments or "demo" in arguments:
        sized += ["--epochs", "1", "--iterations", "2", "--generations", "200"]
    if "ddim" in arguments:
        sized += ["--updates", "2", "--width", "8", "--steps", "2", "--samples", "20", "--inverted", "4"]
    if "patronus" in arguments:
        sized = small_patronus(sized, folder)
    if "prodg" in arguments:
        sized = small_prodg(sized, folder)
    if "bench" in arguments or "benchmarks" in line:
        sized += ["--help"]
    if "select" in arguments:
        np.save(folder / arguments[1], np.random.default_rng(0).normal(size=(300, 3)))
        sized = [str(folder / word) if word.endswith((".npy", ".npz", ".json", ".png")) else word for word in sized]
    return sized


def small_patronus(arguments: list[str], folder: Path) -> list[str]:
    """The same command with a tiny model."""
    if arguments[1] == "train":
        return [*arguments, "--image-size", "16", "--prototypes", "4", "--updates", "2", "--batch", "4"]
    config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=4, width=8, multipliers=(1, 2), layers=1, groups=4)
    pf.patronus.Patronus(config).eval().save_pretrained(folder / "run", data="digits")
    sizes = {
        "generate": ["--images", "2", "--steps", "2"],
        "prototypes": ["--steps", "2"],
        "emergence": ["--steps", "2", "--images", "2"],
        "latent": ["--updates", "2"],
        "evaluate": ["--samples", "10", "--steps", "2", "--probed", "100"],
        "report": ["--only-existing"],
    }
    return [arguments[0], arguments[1], str(folder / "run"), *arguments[3:], *sizes[arguments[1]]]


def small_prodg(arguments: list[str], folder: Path) -> list[str]:
    """The same command of a run over digits, with a few updates."""
    command, digits = arguments[1], ["--data", "digits", "--limit", "100"]
    out = ["--out", str(folder / "out")]
    if command == "prepare":
        photographs = "photographs" in arguments
        return ["prodg", "prepare", *(["--data", "photographs"] if photographs else [*digits, "--updates", "2"]), *out]
    if command == "study":
        few = ["--updates", "5", "--generator-updates", "2", "--ablation", "0", "--seeds", "1"]
        return ["prodg", "study", *digits, *few, *out]
    pf.prodg.runs.prepare(folder / "run", data="digits", channels=8, epochs=1, updates=2, limit=100)
    if command != "train":
        config = pf.prodg.ProDGConfig(updates=2, channels=4, rank=2)
        run = pf.prodg.runs.Run.open(folder / "run")
        pf.prodg.train(run.network(), run.generator(), config, out=run.place("prodg", 0))
    rest = [word for word in arguments[3:] if not word.endswith(".png")]
    rest = [word for word in rest if word != "--image"]
    sizes = {"train": ["--updates", "2"], "ablate": ["--updates", "2"]}
    for option in sizes.get(command, []):
        if option in rest:
            del rest[rest.index(option) : rest.index(option) + 2]
    return ["prodg", command, str(folder / "run"), *rest, *sizes.get(command, [])]
