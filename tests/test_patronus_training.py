"""Training: the same bits after a kill, on several processes the same model, and what it leaves behind."""

import copy
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from protofast import cli
from protofast.patronus import PRESETS, Patronus, PatronusConfig, TrainingConfig, train
from protofast.patronus import training as module

ROOT = Path(__file__).parents[1]
TINY = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)
FEW = TrainingConfig(updates=6, batch=4, lr=1e-3)
IMAGES = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_loss_is_the_papers():
    """E‖noise − ε(x_t, t, s)‖², and of v likewise; the activations are those of the clean images."""
    for kind in ("epsilon", "v_prediction"):
        model = Patronus(dataclasses.replace(TINY, prediction_type=kind, dropout=0)).double()
        images, noise, t = IMAGES[:3].double(), torch.randn(3, 1, 16, 16).double(), torch.tensor([0, 400, 999])
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        share = (1 - betas).cumprod(0)[t].reshape(3, 1, 1, 1)
        noised = share.sqrt() * images + (1 - share).sqrt() * noise
        target = noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * images
        expected = (model(noised, t, model.encode(images)) - target).square().mean()
        objective = module._Objective(model, FEW, "no", False)
        objective.double()
        torch.testing.assert_close(objective(images, t, noise)[0], expected, rtol=1e-6, atol=0)


def test_distinct_loss_moves_prototypes_apart():
    alike = Patronus(TINY)
    alike.prototypes.prototype_vectors.data.copy_(torch.rand(1, 128, 1, 1) + 0.05 * torch.rand(5, 128, 1, 1))

    def likeness(model):
        vectors = torch.nn.functional.normalize(model.prototypes.prototype_vectors.detach().flatten(1))
        return float((vectors @ vectors.T - torch.eye(5)).abs().max(1).values.mean())

    settings = dataclasses.replace(FEW, updates=30, lr=1e-2, ema=0.0)
    plain = train(TINY, IMAGES, settings, start=alike)
    apart = train(TINY, IMAGES, dataclasses.replace(settings, distinct=10.0, margin=0.5), start=alike)
    assert likeness(apart) < likeness(plain) - 0.1


def test_the_same_bits_from_one_seed_and_others_from_another():
    first = train(TINY, IMAGES, FEW, seed=3)
    assert same(first, train(TINY, IMAGES, FEW, seed=3))
    assert not same(first, train(TINY, IMAGES, FEW, seed=4))


def test_accumulated_parts_are_one_batch():
    gradients = []

    def clip(parameters, most):
        gradients.append([weight.grad.clone() for weight in parameters])
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        for parts in (1, 4):
            # Prototypes that are patches of these images have d ≈ 0 there, where the slope of the log is all rounding.
            settings = dataclasses.replace(FEW, updates=1, initialize="uniform")
            train(dataclasses.replace(TINY, dropout=0), IMAGES, settings, accumulate=parts)
    for whole, parts in zip(*gradients, strict=True):
        scale = float(whole.abs().max())
        assert scale > 0
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * scale + 1e-8)


@pytest.mark.parametrize("distance", [0.1, 2.0])
def test_prototypes_start_at_patches_at_a_given_distance(distance):
    settings = dataclasses.replace(FEW, updates=1, lr=1e-12, ema=0.0, weight_decay=0.0, distance=distance)
    model = train(TINY, IMAGES, settings)
    found = model.activations(IMAGES, return_all=True)
    assert float(found.distance.median()) == pytest.approx(distance, rel=1e-3)
    assert (found.distance.amin(0) < 1e-5 * distance).all()  # each is a patch of an image


def test_the_encoder_has_a_learning_rate_of_its_own():
    settings = dataclasses.replace(FEW, updates=2, ema=0.0, encoder_lr=0.0, weight_decay=0.0, initialize="uniform")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = Patronus(TINY)
    model = train(TINY, IMAGES, settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]) == (not name.startswith("denoiser")), name


def test_average_of_the_weights():
    weights = []
    original = module._Run.update

    def watched(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        weights.append(self.model.prototypes.prototype_vectors.detach().clone())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "update", watched)
        model = train(TINY, IMAGES, dataclasses.replace(FEW, ema=0.5))
    average = weights[0]
    for count, latest in enumerate(weights[1:], 1):
        decay = min(0.5, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * latest
    torch.testing.assert_close(model.prototypes.prototype_vectors, average)


def test_stopped_and_resumed_is_the_same(tmp_path):
    whole = train(TINY, IMAGES, FEW, out=tmp_path / "whole")
    original = module._Run.update

    def stops(self, *args, **kwargs):
        if self.done == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "update", stops)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, IMAGES, FEW, out=tmp_path / "stopped", checkpoint_seconds=0)
    assert (tmp_path / "stopped/checkpoint.pt").exists()
    resumed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "update", lambda self, *a, **k: resumed.append(self.done) or original(self, *a, **k))
        again = train(TINY, IMAGES, FEW, out=tmp_path / "stopped")
    assert resumed == [4, 5]
    assert same(whole, again)
    assert not (tmp_path / "stopped/checkpoint.pt").exists()
    assert same(whole, train(TINY, IMAGES, FEW, out=tmp_path / "stopped"))  # loads
    about = [json.loads((tmp_path / name / "config.json").read_text())["about"] for name in ("whole", "stopped")]
    assert about[0] == about[1]


def test_what_training_leaves_behind(tmp_path):
    settings = dataclasses.replace(FEW, updates=100, distinct=0.1)
    config = dataclasses.replace(TINY, timesteps=5)
    train(config, IMAGES, settings, out=tmp_path, about={"data": "noise"}, sample_every=50)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "log.jsonl", "events", "samples",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["0000050.png", "0000100.png"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [50, 100]
    for line in lines:
        assert 0 < line["prototype_share"] < 1
        assert line["images_per_second"] > 0
        assert {"loss", "lr", "distinct", "gradient_norm"} < line.keys()
    about = json.loads((tmp_path / "config.json").read_text())["about"]
    assert about["data"] == "noise"
    assert len(about["losses"]) == 20
    events = next((tmp_path / "events").iterdir())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [50, 100]


def test_lines_of_repeated_updates_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"update": 2, "loss": 1}\n{"update": 50, "loss": 9}\n{"upda')
    train(TINY, IMAGES, FEW, out=tmp_path)
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [6]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    original = module._Run.update

    def breaks(self, take, *args, **kwargs):
        if self.done == 3:
            return original(self, lambda rows: take(rows) * np.nan, *args, **kwargs)
        return original(self, take, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "update", breaks)
        with pytest.raises(FloatingPointError, match="update 4 with lr"):
            train(TINY, IMAGES, FEW, out=tmp_path, checkpoint_seconds=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["done"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())
    assert same(train(TINY, IMAGES, FEW, out=tmp_path), train(TINY, IMAGES, FEW))


def test_a_folder_of_other_training_is_refused(tmp_path):
    train(TINY, IMAGES, FEW, out=tmp_path)
    for other in ({"seed": 1}, {"precision": "bf16"}):
        with pytest.raises(FileExistsError, match="other settings"):
            train(TINY, IMAGES, FEW, out=tmp_path, **other)
    with pytest.raises(FileExistsError, match="images"):
        train(TINY, -IMAGES, FEW, out=tmp_path)
    (tmp_path / "config.json").unlink()  # written last: training is not complete
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\3\4 nonsense")
    with pytest.raises(ValueError, match="damaged"):
        train(TINY, IMAGES, FEW, out=tmp_path)


def test_what_the_environment_asks_of_accelerate_is_not_mixed_in(monkeypatch):
    expected = train(TINY, IMAGES, FEW)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert same(train(TINY, IMAGES, FEW), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device is 'cuda'"):
        train(TINY, IMAGES, FEW, device="cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_the_encoder_is_not_in_it(precision):
    config = dataclasses.replace(TINY, dropout=0)
    settings = dataclasses.replace(FEW, updates=3, ema=0)
    exact, half = train(config, IMAGES, settings), train(config, IMAGES, settings, precision=precision)
    assert not same(exact, half)
    # Each update moves a weight by at most lr·(1 + decay·|w|), whatever the precision.
    for a, b in zip(exact.parameters(), half.parameters(), strict=True):
        assert float((a - b).abs().max()) <= 2 * 3 * settings.lr * (1 + 1e-3)


def test_compiled_denoiser_is_the_same_model(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend="aot_eager"))  # inductor takes minutes
    settings = dataclasses.replace(FEW, updates=2)
    model = train(TINY, IMAGES, settings, compile=True)
    assert model.state_dict().keys() == Patronus(TINY).state_dict().keys()
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["cifar10", "chexpert"])
def test_the_papers_models_train(name):
    """The whole of a preset, on generated images."""
    config = PRESETS[name]
    images = torch.rand(4, *config.image_shape) * 2 - 1
    settings = TrainingConfig(updates=2, batch=1, ema=0, initialize="random")
    fresh = []
    original = module._Run.__init__

    def watched(self, model, *args):
        fresh.append(copy.deepcopy(model.state_dict()))
        original(self, model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Run, "__init__", watched)
        model = train(config, images, settings)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, fresh[0][name])]
    assert set(moved) == set(fresh[0])


def test_start_from_a_trained_model():
    first = train(TINY, IMAGES, FEW)
    kept = copy.deepcopy(first.state_dict())
    second = train(TINY, IMAGES, FEW, start=first)
    assert not same(first, second)
    assert all(torch.equal(value, kept[name]) for name, value in first.state_dict().items())
    with pytest.raises(ValueError, match="start"):
        train(dataclasses.replace(TINY, num_prototypes=4), IMAGES, FEW, start=first)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"precision": "half"}, ValueError, "precision"),
        ({"accumulate": 3}, ValueError, "accumulate is 3"),
        ({"images": IMAGES[:0]}, ValueError, "empty"),
        ({"images": IMAGES[:, :, :8]}, ValueError, "16, 16"),
        ({"images": IMAGES + 2}, ValueError, "outside"),
    ],
    ids=["precision", "accumulate", "empty", "shape", "range"],
)
def test_wrong_arguments(change, error, words):
    with pytest.raises(error, match=words):
        train(**{"config": TINY, "images": IMAGES, "settings": FEW} | change)


PROGRAM = """
import sys, torch
from protofast.patronus import PatronusConfig, TrainingConfig, train
config = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4, dropout=0)
images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
torch.set_num_threads(1)
settings = TrainingConfig(updates=int(sys.argv[2]), batch=4, lr=1e-3, initialize="uniform")
train(config, images, settings, out=sys.argv[1], checkpoint_seconds=0, accumulate=int(sys.argv[3]), device="cpu")
"""


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}


def test_two_processes_train_the_model_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    single = [sys.executable, str(program), str(tmp_path / "one"), "3", "1"]
    subprocess.run(single, check=True, env=environment(), timeout=300)
    double = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*double, str(program), str(tmp_path / "two"), "3", "2"], check=True, env=environment(), timeout=300)
    one, two = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two"))
    for name in ("loss", "gradient_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_killed_and_run_again_is_the_same(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    subprocess.run([*command, str(tmp_path / "whole"), "12", "1"], check=True, env=environment(), timeout=300)
    victim = subprocess.Popen([*command, str(tmp_path / "killed"), "12", "1"], env=environment())
    checkpoint, until = tmp_path / "killed/checkpoint.pt", time.monotonic() + 240
    while not checkpoint.exists() and victim.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait(60) == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (tmp_path / "killed/model.safetensors").exists()
    subprocess.run([*command, str(tmp_path / "killed"), "12", "1"], check=True, env=environment(), timeout=300)
    assert same(*(Patronus.from_pretrained(tmp_path / name) for name in ("whole", "killed")))


def test_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    words = ["patronus", "train", "--data", "digits", "--preset", "cpu", "--image-size", "16", "--prototypes", "4"]
    words += ["--updates", "2", "--batch", "4", "--out", str(out), "--no-progress"]
    found = CliRunner().invoke(cli.build(), words)
    assert found.exit_code == 0, found.output
    assert "4 prototypes" in found.output
    model = Patronus.from_pretrained(out)
    assert model.config.image_shape == (1, 16, 16)
    about = json.loads((out / "config.json").read_text())["about"]
    assert about["data"] == "digits"
    planted = [*words[:-3], "--out", str(tmp_path / "planted"), "--no-progress"]
    planted += ["--plant", "corner", "--plant-class", "3"]
    found = CliRunner().invoke(cli.build(), planted)
    assert found.exit_code == 0, found.output
    about = json.loads((tmp_path / "planted/config.json").read_text())["about"]
    assert about["plant"] == {"attribute": "corner", "target": 3, "rate": 0.9}
    for more, expected in (
        (["--plant-class", "11"], "plant-class"),
        (["--preset", "nothing"], "preset"),
    ):
        found = CliRunner().invoke(cli.build(), [*planted, *more])
        assert found.exit_code != 0
        assert expected in found.output


def test_the_documented_torchrun(tmp_path):
    """The command of docs/patronus.md, made small."""
    page = (ROOT / "docs/patronus.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("torchrun"))
    words = shlex.split(line.replace("fashion-mnist", "digits").replace("runs/fashion", str(tmp_path / "run")))
    at = words.index("--no-python")
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:at], "-m", "protofast.cli", *words[at + 2 :]]
    command += ["--image-size", "16", "--prototypes", "4", "--updates", "2", "--batch", "4", "--device", "cpu"]
    found = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("4 prototypes") == 1
    assert Patronus.from_pretrained(tmp_path / "run").config.num_prototypes == 4
