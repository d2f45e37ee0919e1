# ruff: noqa: E402
"""The model of activations: its samplers against closed forms, training that survives a kill, measures, the command."""

import json
import math
import os
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("typer", "rich", "diffusers", "PIL", "safetensors", "matplotlib", "scipy", "sklearn"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from typer.testing import CliRunner

import protofast as pf
from protofast.patronus import Patronus, PatronusConfig, images_of
from protofast.patronus import latent as module
from protofast.patronus.latent import (
    LatentConfig,
    LatentModel,
    activations_of,
    decode,
    gaussian,
    latent_quality,
    sample_unconditional,
    train_latent,
)

TINY = LatentConfig(width=16, layers=2, timesteps=20, beta_end=0.5)
ROOM = {"config": TINY, "updates": 12, "batch": 8}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors(n=60, seed=0):
    """Prototypes 0 and 1 go together, 2 has two values, 3 never varies."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 4, generator=generator)
    base[:, 1] = 0.9 * base[:, 0] + 0.1 * base[:, 1]
    base[:, 2] = base[:, 2].sign() + 0.05 * base[:, 2]
    return base * torch.tensor([0.1, 2.0, 0.5, 0.0]) + torch.tensor([1.0, -3.0, 4.0, 0.7])


def patronus(seed=0):
    torch.manual_seed(seed)
    sizes = {"num_prototypes": 5, "width": 8, "multipliers": (1, 2), "layers": 1, "groups": 4, "dropout": 0.0}
    return Patronus(PatronusConfig((1, 16, 16), **sizes, prediction_type="v_prediction")).eval().requires_grad_(False)


def same(first, second):
    weights = first.state_dict(), second.state_dict()
    equal = all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    return equal and first.losses == second.losses and first.config == second.config


# The network and the samplers


class Known(torch.nn.Module):
    """What the network should say where s̃ is normal with mean 0 and this variance: E[v | x]."""

    def __init__(self, schedule, variance):
        super().__init__()
        self.alphas, self.variance = schedule.alphas_cumprod, variance

    def forward(self, x, t):
        a = self.alphas[t][:, None]
        image = a.sqrt() * self.variance / (a * self.variance + 1 - a) * x
        noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * image).float()


def test_rows_have_their_own_timestep():
    model = LatentModel(4, TINY).eval()
    x, t = torch.randn(5, 4), torch.tensor([19, 0, 3, 19, 7])
    with torch.no_grad():
        together, alone = model(x, t), torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(5)])
        other = model(x, torch.tensor([18, 1, 4, 18, 8]))
    torch.testing.assert_close(together, alone)
    assert ((together - other).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("steps", [20, 7, 1])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_ddim_of_a_gaussian_is_its_closed_form(steps, variance):
    model = LatentModel(3, TINY)
    model.network = Known(model.schedule, variance)
    found = model.sample(200, num_steps=steps, seed=3).double()
    noise = pf.diffusion.normal_noise(torch.empty(200, 3), 3).double()
    alphas = np.cumprod(1 - np.linspace(TINY.beta_start, TINY.beta_end, 20))
    factor, times = 1.0, pf.diffusion.timesteps(steps, 20)
    for t, prev in zip(times, [*times[1:], -1], strict=True):
        a, b = alphas[t], alphas[prev] if prev >= 0 else 1.0
        image = math.sqrt(a) * variance / (a * variance + 1 - a)
        factor *= math.sqrt(b) * image + math.sqrt(1 - b) * (1 - math.sqrt(a) * image) / math.sqrt(1 - a)
    torch.testing.assert_close(found, factor * noise, rtol=1e-4, atol=1e-5)


def test_renoising_loses_the_spread_that_its_recursion_says():
    model, n = LatentModel(3, TINY), 40_000
    model.network = Known(model.schedule, 1.0)
    found = model.sample(n, sampler="renoise", seed=1).double()
    alphas = np.cumprod(1 - np.linspace(TINY.beta_start, TINY.beta_end, 20))
    spread = 1.0  # variance of x_t: noise at first
    for t in range(19, -1, -1):
        spread = alphas[t] * spread  # of the mean of s̃ that x_t says, where s̃ has variance 1
        spread = alphas[t - 1] * spread + 1 - alphas[t - 1] if t else spread
    assert spread < 0.8
    bound = 5 * math.sqrt(2 / (3 * n)) * spread
    assert float(found.var()) == pytest.approx(spread, abs=bound)
    assert abs(float(found.mean())) < 5 * math.sqrt(spread / (3 * n))


def test_samples_are_unscaled_and_kept_within_the_range_of_training():
    model = LatentModel(2, TINY)
    model.network = Known(model.schedule, 1.0)
    plain = model.sample(500)
    model.mean.copy_(torch.tensor([5.0, -1.0]))
    model.std.copy_(torch.tensor([2.0, 0.1]))
    torch.testing.assert_close(model.sample(500), plain * torch.tensor([2.0, 0.1]) + torch.tensor([5.0, -1.0]))
    model.lowest.copy_(torch.tensor([4.5, -1.05]))
    model.highest.copy_(torch.tensor([5.5, -0.95]))
    for sampler in module.SAMPLERS:
        found = model.sample(500, sampler=sampler)
        assert found.amin(0).tolist() == model.lowest.tolist()
        assert found.amax(0).tolist() == model.highest.tolist()


@pytest.mark.parametrize("sampler", module.SAMPLERS)
def test_samples_depend_on_the_seed_alone(sampler):
    model = train_latent(vectors(), **ROOM)
    state = torch.get_rng_state()
    first = model.sample(9, sampler=sampler, seed=4)
    assert torch.equal(first, model.sample(9, sampler=sampler, seed=4))
    torch.testing.assert_close(first, model.sample(9, sampler=sampler, seed=4, batch_size=2))
    torch.testing.assert_close(first[:5], model.sample(5, sampler=sampler, seed=4))
    assert not torch.equal(first, model.sample(9, sampler=sampler, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad


# Training


def test_what_is_learned_is_nearer_than_a_gaussian():
    config = LatentConfig(width=64, layers=3, timesteps=50, beta_end=0.3)
    model = train_latent(vectors(4000), config=config, updates=400, batch=128, lr=3e-3, ema=0.99)
    assert len(model.losses) == 20
    assert model.losses[-1] < 0.85 * model.losses[0]  # most of it is noise that nothing could tell
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    held_out = vectors(1000, seed=1)
    found = latent_quality(model.sample(1000), held_out)
    others = latent_quality(gaussian(vectors(4000), 1000), held_out)
    assert found.wasserstein[2] < 0.5 * others.wasserstein[2]  # it has two values
    assert found.accuracy < others.accuracy - 0.1
    assert found.correlation < 0.05
    assert (model.sample(10)[:, 3] == vectors()[0, 3]).all()  # it never varies


def test_prototypes_that_never_vary():
    # Sums of n equal values are not n times the value, so that their deviations from the mean are not 0.
    for n in range(2, 60):
        points = vectors(n)[:, 3:]
        model = LatentModel(1, TINY)
        model.standardize(points)
        assert model.std.tolist() == [1.0]
        assert latent_quality(points, points).spread.tolist() == [1.0]
        assert latent_quality(vectors(n)[:, :1], points).correlation == 0
        assert (gaussian(points, 5) == points[0, 0]).all()


def test_activations_are_standardised():
    points = vectors(200)
    model = train_latent(points, **ROOM)
    values = points.double().numpy()
    np.testing.assert_allclose(model.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.std, [*values.std(0)[:3], 1.0], rtol=1e-6)
    assert torch.equal(model.lowest, points.amin(0))
    assert torch.equal(model.highest, points.amax(0))
    # Neither scale nor offset of a prototype changes what is learned; powers of two are exact.
    other = train_latent(points * 4, **ROOM)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_seed_and_what_is_kept(tmp_path):
    state = torch.get_rng_state()
    first = train_latent(vectors(), **ROOM, folder=tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latent.json", "latent.safetensors"]
    steps = []

    def again(points=None, **settings):
        steps.clear()
        points = vectors() if points is None else points
        return train_latent(points, **{**ROOM, **settings}, progress=lambda *at: steps.append(at))

    assert same(first, again(folder=tmp_path))
    assert steps == []
    assert same(first, LatentModel.from_pretrained(tmp_path))
    assert same(first, again())
    assert steps == [(done, 12) for done in range(1, 13)]
    other = LatentConfig(width=8, layers=2, timesteps=20)
    for changed in ({"seed": 1}, {"lr": 1e-2}, {"ema": 0.5}, {"config": other}, {"points": vectors(seed=1)}):
        again(folder=tmp_path)  # so that nothing else has changed
        found = again(**changed, folder=tmp_path)
        assert len(steps) == 12
        assert not same(first, found)
        assert same(found, LatentModel.from_pretrained(tmp_path))


def test_a_damaged_model_is_trained_again(tmp_path):
    first = train_latent(vectors(), **ROOM, folder=tmp_path)
    for name in (module.WEIGHTS, module.CONFIG):
        whole = (tmp_path / name).read_bytes()
        flipped = bytearray(whole)
        flipped[-5] ^= 1
        for damaged in (whole[:50], b"", bytes(flipped) if name == module.WEIGHTS else b"[]"):
            (tmp_path / name).write_bytes(damaged)
            (tmp_path / module.UNFINISHED).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|latent model"):
                LatentModel.from_pretrained(tmp_path)
            assert same(first, train_latent(vectors(), **ROOM, folder=tmp_path))
            assert same(first, LatentModel.from_pretrained(tmp_path))
    train_latent(vectors(), **{**ROOM, "config": LatentConfig(width=8, layers=2)}, folder=tmp_path / "other")
    os.replace(tmp_path / "other" / module.CONFIG, tmp_path / module.CONFIG)
    with pytest.raises(ValueError, match=r"does not belong to the latent\.json beside it"):
        LatentModel.from_pretrained(tmp_path)
    patronus().save_pretrained(tmp_path)
    os.replace(tmp_path / "model.safetensors", tmp_path / module.WEIGHTS)
    with pytest.raises(ValueError, match="holds no latent model"):
        LatentModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="protofast patronus latent RUN"):
        LatentModel.from_pretrained(tmp_path / "absent")


def interrupted(folder, last, ended, end):
    """Trains, with a checkpoint at every update up to `last`, until `end` is called at `ended`."""
    torch.set_num_threads(1)
    module.CHECKPOINT_SECONDS = 0

    def progress(done, total):
        if done == last:
            module.CHECKPOINT_SECONDS = math.inf
        if done == ended:
            end()

    train_latent(vectors(), **ROOM, folder=folder, progress=progress)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("last", "ended", "how"), [(5, 7, "kill"), (7, 7, "raise"), (12, 12, "raise")])
def test_a_training_that_was_ended_goes_on_with_the_same_bits(tmp_path, monkeypatch, last, ended, how):
    if how == "kill":
        call = f"t.interrupted({str(tmp_path)!r}, {last}, {ended}, t.kill)"
        script = f"import test_patronus_latent as t\n{call}"
        here = Path(__file__).parent
        child = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
        assert child.returncode == -signal.SIGKILL, child.stderr
    else:
        monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0)  # which is put back after the test
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path, last, ended, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["latent.unfinished"]
    steps = []
    resumed = train_latent(vectors(), **ROOM, folder=tmp_path, progress=lambda *at: steps.append(at))
    assert steps == [(done, 12) for done in range(last + 1, 13)]
    assert same(resumed, train_latent(vectors(), **ROOM))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latent.json", "latent.safetensors"]


@pytest.mark.parametrize("how", ["a bit has flipped", "another version made it", "other activations", "other settings"])
def test_an_unfinished_training_that_is_another_is_begun_anew(tmp_path, monkeypatch, how):
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, 5, 5, stop)
    path = tmp_path / "latent.unfinished"
    points, settings = vectors(seed=int(how == "other activations")), dict(ROOM)
    if how == "a bit has flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "another version made it":
        monkeypatch.setattr("diffusers.__version__", "0")
    elif how == "other settings":
        settings["lr"] = 3e-3
    steps = []
    model = train_latent(points, **settings, folder=tmp_path, progress=lambda *at: steps.append(at))
    assert len(steps) == 12
    assert same(model, train_latent(points, **settings))


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_model(tmp_path):
    first = train_latent(vectors(), **ROOM, folder=tmp_path)
    says = r"the loss is (nan|inf) at update \d+ with lr 1e\+30; give a smaller"
    with pytest.raises(FloatingPointError, match=says):
        train_latent(vectors(), **ROOM, lr=1e30, folder=tmp_path)
    assert same(first, LatentModel.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: train_latent(vectors()[0]), ValueError, r"activations has shape \(4,\)"),
        (lambda: train_latent(vectors(1)), ValueError, "at least two"),
        (lambda: train_latent(vectors() * math.nan), ValueError, "not finite"),
        (lambda: train_latent(vectors().long()), TypeError, r"activations is torch\.int64"),
        (lambda: train_latent([1.0]), TypeError, "activations is list"),
        (lambda: train_latent(vectors(), updates=0), ValueError, "updates is 0"),
        (lambda: train_latent(vectors(), batch=0), ValueError, "batch is 0"),
        (lambda: train_latent(vectors(), lr=math.nan), ValueError, "lr is nan"),
        (lambda: train_latent(vectors(), ema=1.0), ValueError, r"ema is 1\.0"),
        (lambda: train_latent(vectors(), weight_decay=-1.0), ValueError, r"weight_decay is -1\.0"),
        (lambda: LatentConfig(width=0), ValueError, "width is 0"),
        (lambda: LatentConfig(beta_start=0.3), ValueError, r"beta_start is 0\.3"),
        (lambda: LatentModel(0), ValueError, "num_prototypes is 0"),
        (lambda: LatentModel(3).sample(0), ValueError, "n is 0"),
        (lambda: LatentModel(3).sample(2, sampler="ddpm"), ValueError, "choose one of ddim, renoise"),
        (lambda: LatentModel(3).sample(2, batch_size=0, sampler="renoise"), ValueError, "batch_size is 0"),
        (lambda: LatentModel(3).sample(2, num_steps=101, sampler="renoise"), ValueError, "num_steps is 101"),
        (lambda: latent_quality(vectors(), vectors()[:, :2]), ValueError, "samples has 4 prototypes and held_out 2"),
        (lambda: latent_quality(vectors(), vectors(), neighbours=1), ValueError, "neighbours is 1"),
        (lambda: sample_unconditional(patronus(), LatentModel(4), 2), ValueError, "latent is of 4 prototypes"),
        (lambda: decode(patronus(), torch.zeros(2, 4)), ValueError, r"give \(n, 5\)"),
        (lambda: activations_of(patronus(), pf.data.load("digits"), batch_size=0), ValueError, "batch_size is 0"),
    ],
)
def test_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()


# Measures


def test_quality_against_other_formulas():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)), 3 + rng.normal(size=(300, 5))
    found = latent_quality(torch.from_numpy(first), torch.from_numpy(second))
    # For equally many points, the distance is that of the sorted ones.
    moved = np.abs(np.sort(first, 0) - np.sort(second, 0)).mean(0) / second.std(0)
    np.testing.assert_allclose(found.wasserstein, moved, rtol=1e-9)
    np.testing.assert_allclose(found.spread, first.std(0) / second.std(0), rtol=1e-9)
    difference = np.abs(np.corrcoef(first.T) - np.corrcoef(second.T))[~np.eye(5, dtype=bool)]
    assert found.correlation == pytest.approx(difference.mean(), rel=1e-9)
    both = np.concatenate([first, second]) / second.std(0)
    apart = np.linalg.norm(both[:, None] - both[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert found.accuracy == pytest.approx(((apart.argmin(1) < 300) == (np.arange(600) < 300)).mean())


def test_quality_of_the_same_and_of_other_distributions():
    found = latent_quality(vectors(2000), vectors(2000, seed=1))
    assert abs(found.accuracy - 0.5) < 0.04  # 5 standard deviations of 4000 coin tosses
    assert found.wasserstein.max() < 0.1
    assert found.correlation < 0.03
    assert found.spread[3] == 1  # it never varies
    assert np.isfinite(found.wasserstein).all()
    assert latent_quality(vectors(50) + 100, vectors(70)).accuracy == 1
    few, again, other = (latent_quality(vectors(400), vectors(300, seed=1), neighbours=20, seed=k) for k in (0, 0, 1))
    assert round(few.accuracy * 40) == pytest.approx(few.accuracy * 40)
    assert few.accuracy == again.accuracy != other.accuracy
    assert latent_quality(vectors()[:, :1], vectors()[:, :1]).correlation == 0


def test_gaussian_has_the_moments_and_the_range():
    points = vectors(500)
    drawn = gaussian(points, 50_000, seed=2)
    wanted = np.cov(points.double().numpy(), rowvar=False, ddof=0)
    free = [0, 1]  # not cut: their values lie within 4 standard deviations
    np.testing.assert_allclose(drawn.mean(0)[free], points.mean(0)[free], atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.double().numpy(), rowvar=False)[:2, :2], wanted[:2, :2], rtol=0.04)
    assert (drawn >= points.amin(0)).all()
    assert (drawn <= points.amax(0)).all()
    assert (drawn[:, 3] == points[0, 3]).all()
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, gaussian(points, 50_000, seed=2))
    assert gaussian(points[:, :1], 3).shape == (3, 1)


# Images


def test_activations_of_a_data_set():
    model, data, steps = patronus(), pf.data.load("digits").subset(range(25)), []
    found = activations_of(model, data, batch_size=10, progress=lambda *at: steps.append(at))
    torch.testing.assert_close(found, model.activations(images_of(model.config, data)))
    assert steps == [(10, 25), (20, 25), (25, 25)]
    assert activations_of(patronus().requires_grad_(True), data).requires_grad is False


def test_unconditional_images_are_ddim_of_drawn_activations():
    model, latent = patronus(), train_latent(torch.rand(50, 5), **ROOM)
    first = []
    model.denoiser.register_forward_pre_hook(lambda _, inputs: first.append(inputs[0].clone()))
    made = sample_unconditional(model, latent, 6, num_steps=3, seed=7)
    assert torch.equal(made.activations, latent.sample(6, seed=7))
    wanted = pf.diffusion.sample(
        *(model, first[0], model.schedule, 3),
        prediction_type="v_prediction",
        cond={"activations": made.activations},
    )
    torch.testing.assert_close(made.images, wanted.clamp(-1, 1))
    assert made.images.abs().max() <= 1
    # The noise of the images is not that of the activations.
    noise = pf.diffusion.normal_noise(torch.empty(6, 5), 7)
    assert not torch.isclose(first[0].flatten(1)[:, :5], noise).any()
    parts = sample_unconditional(model, latent, 6, num_steps=3, seed=7, batch_size=4)
    torch.testing.assert_close(made.images, parts.images)
    torch.testing.assert_close(made.images[:2], sample_unconditional(model, latent, 2, num_steps=3, seed=7).images)
    assert not torch.equal(made.images, sample_unconditional(model, latent, 6, num_steps=3, seed=8).images)
    renoised = sample_unconditional(model, latent, 6, num_steps=3, seed=7, sampler="renoise", latent_steps=5)
    assert torch.equal(renoised.activations, latent.sample(6, num_steps=5, sampler="renoise", seed=7))


def test_images_are_not_made_in_training_mode_and_may_be_double():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        decode(patronus().train(), torch.zeros(2, 5))
    assert decode(patronus().double(), torch.zeros(2, 5), num_steps=2).dtype == torch.float64


def test_a_latent_model_of_other_prototypes_is_trained_again(tmp_path):
    first, steps = torch.zeros(5, 3), []
    for prototypes, made in ((first, 12), (first, 0), (first + 1, 12)):
        steps.clear()
        train_latent(vectors(), **ROOM, folder=tmp_path, prototypes=prototypes, progress=lambda *at: steps.append(at))
        assert len(steps) == made
        kept = json.loads((tmp_path / module.CONFIG).read_text())["about"]["prototypes"]
        assert kept == pf._files.digest(prototypes)


# The command


def run(*arguments):
    from protofast.patronus.commands import app

    return CliRunner().invoke(app, ["latent", *map(str, arguments), "--no-progress"])


def test_the_command(tmp_path):
    patronus().save_pretrained(tmp_path, data="digits")
    settings = (tmp_path, "--updates", 30, "--samples", 200, "--images", 16, "--steps", 2)
    ended = run(*settings)
    assert ended.exit_code == 0, ended.output
    result = json.loads((tmp_path / "latent" / "result.json").read_text())
    assert result["format"] == "protofast-patronus-latent-1"
    quality = result["numbers"]["quality"]
    assert list(quality) == ["training", "ddim", "renoise", "gaussian"]
    assert len(quality["ddim"]["wasserstein"]) == 5
    assert quality["training"]["nearest_neighbour_accuracy"] < 0.65
    assert result["numbers"]["updates_made"] == 30
    assert result["settings"]["training"] + result["settings"]["held_out"] == 1797
    assert [len(row) for row in result["tables"][0]["rows"]] == [6] * 4
    assert all(line in ended.output for line in result["findings"])
    for picture in result["pictures"]:
        with Image.open(BytesIO((tmp_path / "latent" / picture["file"]).read_bytes())) as shown:
            assert shown.format == "PNG"
            assert min(shown.size) > 200
    kept = (tmp_path / "latent.safetensors").read_bytes()
    again = run(*settings, "--out", tmp_path / "other")
    assert again.exit_code == 0, again.output
    second = json.loads((tmp_path / "other" / "result.json").read_text())
    assert second["numbers"]["updates_made"] == 0
    assert second["numbers"]["quality"] == quality
    assert (tmp_path / "latent.safetensors").read_bytes() == kept
    assert "earlier" in second["findings"][0]
    assert LatentModel.from_pretrained(tmp_path).num_prototypes == 5


def test_the_command_holds_out_a_tenth_of_data_without_parts(tmp_path):
    patronus().save_pretrained(tmp_path / "run")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8))
    settings = (tmp_path / "run", "--updates", 2, "--samples", 8, "--images", 2, "--steps", 1)
    ended = run(*settings, "--data", tmp_path / "images.npy")
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "run" / "latent" / "result.json").read_text())["settings"]
    assert (found["training"], found["held_out"]) == (36, 4)
    assert "give --data" in str(run(*settings).exception)
    np.save(tmp_path / "few.npy", np.zeros((5, 16, 16), np.uint8))
    assert "has 5 images; give at least 20" in str(run(*settings, "--data", tmp_path / "few.npy").exception)


# benchmarks/patronus_latents.py


def test_the_benchmark(tmp_path):
    try:
        pf.data.load("fashion-mnist")
    except Exception as error:
        pytest.skip(str(error))
    patronus().save_pretrained(tmp_path / "run")
    script, out = Path(__file__).parents[1] / "benchmarks" / "patronus_latents.py", tmp_path / "found.json"
    settings = ["--quick", "--threads", "1", "--run", str(tmp_path / "run"), "--out", str(out)]
    done = subprocess.run([sys.executable, str(script), *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["extraction"]["largest_difference"] < 1e-4
    assert len(result["extraction"]["images_per_second"]) == 5
    assert list(result["networks"]) == ["MLP", "U-Net over the prototypes"]
    assert f"{result['extraction']['ratio']:.1f} times" in done.stdout
