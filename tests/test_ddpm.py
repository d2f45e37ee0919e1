# ruff: noqa: E402
"""The small diffusion model: training that survives a kill, measures against closed forms, and the command."""

import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("typer", "rich", "diffusers", "PIL", "pooch", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[cli,data,diffusers]'")

from typer.testing import CliRunner

import protofast as pf
from protofast import _sheet, cli, ddpm
from protofast.ddpm import check, command, training

ROOM = {"width": 8, "updates": 12}


def images(n=30, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def same(first, second):
    weights = first.state_dict(), second.state_dict()
    equal = all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    return equal and first.losses == second.losses


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Training


def test_the_unet_predicts_v():
    model = ddpm.Denoiser((3, 8, 12), width=8).eval()
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([3, 999])
    with torch.no_grad():
        noise, v = model(x, t), model.unet(x, t).sample
    assert model.unet.config.sample_size == (8, 12)
    schedule = pf.DDIMSchedule.linear(1000)
    for row, step in enumerate((3, 999)):
        by_noise, by_v = (
            pf.ddim_step(x[row : row + 1], output[row : row + 1], step, -1, schedule, prediction_type=kind)
            for output, kind in ((noise, "epsilon"), (v, "v_prediction"))
        )
        # Both are the image; the noise has three roundings of numbers below 8, divided by √ᾱ.
        bound = 3 * 8 * 2.0**-24 / float(schedule.alphas_cumprod[step]) ** 0.5
        assert (by_noise.prev_sample - by_v.prev_sample).abs().max() <= bound


def test_a_single_image_is_learned_and_sampled():
    # It is known in full, so the loss can fall to 0; and samples tell the conventions of training and sampling apart.
    image = torch.zeros(1, 1, 8, 8)
    image[..., 2:7, 3:] = 1
    model = ddpm.train(image, width=8, updates=100, lr=1e-2, cache=False)
    assert len(model.losses) == 20
    assert model.losses[-1] < 0.3 * model.losses[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    made = pf.diffusion.sample(model, torch.randn(8, 1, 8, 8), model.schedule, 10, clip_range=1)
    assert (made - (2 * image - 1)).abs().mean() < 0.3  # 1 for noise, 2 for the negative; 0.1 was measured


def test_seed_and_cache(tmp_path):
    first = ddpm.train(images(), **ROOM, cache=tmp_path)
    steps = []
    assert same(first, ddpm.train(images(), **ROOM, cache=tmp_path, progress=lambda *at: steps.append(at)))
    assert steps == []
    assert same(first, ddpm.train(images(), **ROOM, cache=False, progress=lambda *at: steps.append(at)))
    assert steps == [(done, 12) for done in range(1, 13)]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"]
    assert not same(first, ddpm.train(images(), **ROOM, seed=1, cache=tmp_path))
    ddpm.train(images(), **ROOM, lr=1e-3, cache=tmp_path)
    ddpm.train(images(seed=1), **ROOM, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_and_unwritable_cache(tmp_path):
    first = ddpm.train(images(), **ROOM, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:100], b"", bytes(flipped)):
        path.write_bytes(damaged)
        path.with_suffix(".unfinished").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            ddpm.load(path)
        assert same(first, ddpm.train(images(), **ROOM, cache=tmp_path))
        assert same(first, ddpm.load(path))
        assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").touch()
    assert same(first, ddpm.train(images(), **ROOM, cache=tmp_path / "file"))


def interrupted(folder, last, ended, end):
    """Trains, with a checkpoint at every update up to `last`, until `end` is called at `ended`."""
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = 0

    def progress(done, total):
        if done == last:
            training.CHECKPOINT_SECONDS = math.inf
        if done == ended:
            end()

    ddpm.train(images(), **ROOM, cache=folder, progress=progress)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("last", "ended", "how"), [(5, 7, "kill"), (7, 7, "raise"), (12, 12, "raise")])
def test_a_training_that_was_ended_goes_on_with_the_same_bits(tmp_path, monkeypatch, last, ended, how):
    if how == "kill":
        script = f"import test_ddpm as t\nt.interrupted({str(tmp_path)!r}, {last}, {ended}, t.kill)"
        child = subprocess.run(
            [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
    else:
        monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)  # which is put back after the test
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path, last, ended, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    steps = []
    resumed = ddpm.train(images(), **ROOM, cache=tmp_path, progress=lambda *at: steps.append(at))
    assert steps == [(done, 12) for done in range(last + 1, 13)]
    assert same(resumed, ddpm.train(images(), **ROOM, cache=False))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("how", ["a bit has flipped", "another version made it"])
def test_an_unfinished_training_that_cannot_be_trusted_is_begun_anew(tmp_path, monkeypatch, how):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, 5, 5, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    (path,) = tmp_path.iterdir()
    if how == "a bit has flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        monkeypatch.setattr("diffusers.__version__", "0")
    steps = []
    model = ddpm.train(images(), **ROOM, cache=tmp_path, progress=lambda *at: steps.append(at))
    assert steps == [(done, 12) for done in range(1, 13)]
    assert same(model, ddpm.train(images(), **ROOM, cache=False))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((images()[0],), "images has shape"),
        ((images(0),), "images has shape"),
        ((images() * 2,), "outside"),
        ((images() * math.nan,), "outside"),
        ((images()[..., :6],), "multiples of 4"),
        ((images(), {"width": 12}), "width is 12"),
        ((images(), {"updates": 0}), "updates is 0"),
        ((images(), {"lr": 0.0}), "lr is 0"),
        ((images(), {"lr": math.nan}), "lr is nan"),
    ],
)
def test_train_refuses(arguments, says):
    data, *more = arguments
    with pytest.raises(ValueError, match=says):
        ddpm.train(data, **{**ROOM, **(more[0] if more else {})}, cache=False)


def test_a_loss_that_is_no_number_stops():
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at update \d+ with lr 1e\+30; give a smaller"):
        ddpm.train(images(), **ROOM, lr=1e30, cache=False)


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        ddpm.load(tmp_path / "absent.safetensors")
    from protofast.pxgen import vae

    vae.save_vae(vae.VAE((1, 4, 4)), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae.safetensors holds no model of protofast\.ddpm"):
        ddpm.load(tmp_path / "vae.safetensors")


# Measures


MEAN, SPREAD = -0.2, 0.3


class Exact:
    """The best denoiser of pixels drawn from N(MEAN, SPREAD²), in the model's range."""

    shape, schedule = (1, 4, 4), pf.DDIMSchedule.linear(1000)

    def __call__(self, x, t):
        a = self.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)


def there_and_back(x, steps):
    """The affine recurrences of plain inversion and sampling, from eq. 12 alone, in extended precision."""
    alphas = np.append(Exact.schedule.alphas_cumprod.numpy(), 1.0).astype(np.longdouble)  # −1 is the last
    ladder = [-1, *(round(1000 - i * 1000 / steps) - 1 for i in reversed(range(steps)))]
    upwards = [(now, then, then) for now, then in itertools.pairwise(ladder)]
    for now, then, asked in upwards + [(then, now, then) for now, then, _ in reversed(upwards)]:
        a, b, at = alphas[now], alphas[then], alphas[asked]
        noise = np.sqrt(1 - at) * (x - np.sqrt(at) * MEAN) / (at * SPREAD**2 + 1 - at)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * noise) / np.sqrt(a) + np.sqrt(1 - b) * noise
    return x


def test_evaluate_measures_a_linear_model_as_its_closed_form():
    generator = torch.Generator().manual_seed(3)
    real, held_out = (torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=generator) for n in (150, 130))
    done = {}

    def progress(what, total):
        done[what] = [total, 0]
        return lambda count: done[what].__setitem__(1, done[what][1] + count)

    numbers, pictures = ddpm.evaluate(
        Exact(), real, held_out, [5, 20], samples=200, inverted=70, fixed_point=200, progress=progress
    )
    assert all(total == count for total, count in done.values())
    assert done["sampling, 20 steps"] == [80, 80]  # 200 images are four batches
    x = 2 * pictures["inverted"] - 1
    assert x.shape == (70, 1, 4, 4)
    for entry, steps in zip(numbers["inversion"], (5, 20), strict=True):
        exact = x.numpy().astype(np.longdouble)
        square = (((there_and_back(exact, steps) - exact) / 2) ** 2).mean((1, 2, 3))
        # Some 20 roundings a step both ways, each of numbers below 4, grown at most as the signal is: by 1/√ᾱ.
        bound = 2 * steps * 20 * 4 * 2.0**-53 / float(Exact.schedule.alphas_cumprod[-1]) ** 0.5
        assert entry["steps"] == steps
        assert abs(entry["plain"]["rmse"] - np.sqrt(square.mean())) <= bound
        assert abs(entry["plain"]["worst"] - np.sqrt(square.max())) <= bound
        assert entry["plain"]["rmse"] > 1e6 * bound  # so that there is something to measure
        assert entry["fixed_point"]["rmse"] <= bound
        assert entry["fixed_point"]["residual"] <= bound
        plain, fixed = pictures["inversion"][steps]
        assert not torch.equal(plain, fixed)
    for entry, steps in zip(numbers["samples"], (5, 20), strict=True):
        made = pictures["samples"][steps].numpy()
        assert made.shape == (200, 1, 4, 4)
        assert entry["mean"] == pytest.approx(made.mean(), rel=1e-12)
        assert entry["std"] == pytest.approx(made.std(ddof=1), rel=1e-12)
    assert numbers["held_out"]["mean"] == pytest.approx(held_out.numpy().mean(), rel=1e-12)


def test_a_sample_is_the_same_in_any_number_of_them():
    numbers = [
        ddpm.evaluate(Exact(), images()[:, :, :4, :4], images()[:, :, :4, :4], [3], samples=n)[1] for n in (3, 7)
    ]
    assert torch.equal(numbers[0]["samples"][3], numbers[1]["samples"][3][:3])


def nearest(first, second):
    """The same by plain loops."""
    points = [*first.double().flatten(1).numpy(), *second.double().flatten(1).numpy()]
    right = 0
    for i, point in enumerate(points):
        distance = [math.inf if i == j else float(((point - other) ** 2).sum()) for j, other in enumerate(points)]
        right += (int(np.argmin(distance)) < len(first)) == (i < len(first))
    return right / len(points)


def test_nearest_neighbour_accuracy():
    first, second = images(40, seed=1), images(25, seed=2)
    assert check.nearest_neighbour_accuracy(first, second) == nearest(first, second)
    assert check.nearest_neighbour_accuracy(first, second + 5) == 1
    assert check.nearest_neighbour_accuracy(first, first + 1e-4) == 0


def test_the_full_model():
    """What docs/ddim.md says of Fashion-MNIST, on fewer images; only where somebody has trained it."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ddpm.train).parameters.items()
        if name in ("width", "updates", "lr", "seed")
    }
    for name, value in defaults.items():
        assert inspect.signature(command.ddim).parameters[name].default == value
    how = "run `protofast ddim` once (minutes), which caches it"
    try:
        real, held_out = (pf.data.load("fashion-mnist", split=split).take(slice(None)) for split in ("train", "test"))
    except Exception as error:
        pytest.skip(str(error))
    path = training.cached_at(real, **defaults)
    if not path.exists():
        pytest.skip(f"{path} is not there: {how}")
    model = ddpm.load(path)
    numbers, _ = ddpm.evaluate(model, real, held_out, [10], samples=64, inverted=16)
    (made,), (back,) = numbers["samples"], numbers["inversion"]
    assert made["mean"] == pytest.approx(numbers["held_out"]["mean"], abs=0.1)
    assert made["std"] == pytest.approx(numbers["held_out"]["std"], abs=0.1)
    assert back["fixed_point"]["rmse"] < back["plain"]["rmse"] / 3
    assert back["plain"]["rmse"] < 0.3


# The command


runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    return cli.build()


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PROTOFAST_DEBUG", raising=False)
    np.save(tmp_path / "x.npy", images(50).numpy())
    return tmp_path / "x.npy"


QUICK = ["--width", "8", "--updates", "2", "--steps", "2,3", "--samples", "9", "--inverted", "5", "--no-progress"]


def run(app, *arguments):
    arguments = [str(argument) for argument in arguments]
    return runner.invoke(app, ["ddim", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_teaches(app):
    result = run(app, "--help")
    assert result.exit_code == 0
    for words in ("--steps", "--seed", "--fixed-point", "protofast ddim --data digits", "grid.png", "cached"):
        assert words in result.output


def test_outputs(app, data, tmp_path):
    result = run(app, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "invert.png", "result.json"]
    text = (tmp_path / "out" / "result.json").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["settings"]["images"] == 45
    assert found["settings"]["held_out"] == 5
    assert [entry["steps"] for entry in found["samples"]] == [entry["steps"] for entry in found["inversion"]] == [2, 3]
    assert len(found["losses"]) == 2
    assert "2 steps" in result.stdout
    again = run(app, "--data", data, "--out", tmp_path / "again", *QUICK)  # by the cached weights
    assert again.exit_code == 0
    for name in ("grid.png", "invert.png", "result.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    other = run(app, "--data", data, "--out", tmp_path / "out", *QUICK, "--seed", "1")
    assert other.exit_code == 0
    assert (tmp_path / "out" / "result.json").read_text() != text


def test_an_interrupted_writing_leaves_no_result(app, data, tmp_path, monkeypatch):
    assert run(app, "--data", data, "--out", tmp_path / "out", *QUICK).exit_code == 0
    sheet, made = _sheet.sheet, []

    def fails(*arguments, **more):
        made.append(1)
        if len(made) == 2:
            raise OSError("disk full")
        return sheet(*arguments, **more)

    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(_sheet, "sheet", fails)
    result = run(app, "--data", data, "--out", tmp_path / "out", *QUICK, "--seed", "1")
    assert result.exit_code == 1
    assert result.stderr == "error: disk full\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder"], "no/such/folder does not exist"),
        (["--data", "{data}", "--width", "9"], "width is 9"),
        (["--data", "{data}", "--lr", "0"], "lr is 0"),
        (["--data", "{data}", "--lr", "1e30", "--updates", "5"], "give a smaller lr"),
        (["--data", "{few}"], "has 9 images; give at least 10"),
    ],
)
def test_an_error_is_one_clear_line_and_writes_nothing(app, data, tmp_path, arguments, message):
    np.save(tmp_path / "few.npy", images(9).numpy())
    arguments = [argument.format(data=data, few=tmp_path / "few.npy") for argument in arguments]
    result = run(app, *QUICK, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["", "ten", "0", "1001", "5,5"])
def test_wrong_steps_end_with_two(app, data, tmp_path, steps):
    result = run(app, "--data", data, *QUICK, "--steps", steps, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--steps" in result.stderr


def test_the_folder_is_checked_first(app, data, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in run(app, "--data", data, "--out", tmp_path / "file", *QUICK).stderr
    (tmp_path / "result.json").write_text('{"format": "protofast-pxgen-1"}')
    assert "is of another command" in run(app, "--data", data, "--out", tmp_path, *QUICK).stderr
    assert not (tmp_path / "cache").exists()
