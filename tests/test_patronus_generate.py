# ruff: noqa: E402
"""Images of activations: against DDIM written out in plain torch, and the command on a model of no skill."""

import json
import math
from io import BytesIO

import numpy as np
import pytest
import torch

for module in ("typer", "rich", "diffusers", "PIL", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast._sheet import sheet
from protofast.patronus import Patronus, PatronusConfig
from protofast.patronus.commands.generate import drawn, numbers_of
from protofast.patronus.generate import (
    Codes,
    extrapolate,
    interpolate,
    invert,
    manipulate,
    reconstruct,
    sample,
    slerp,
    strengths,
    vary,
)

STEPS = 4
ROUND = 1e-9  # of float64 through some steps and layers, whatever the batches


def config(**more):
    return PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4, **more)


def tiny(**more):
    torch.manual_seed(3)
    return Patronus(config(**more)).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny(prediction_type="v_prediction")
    torch.set_num_threads(before)


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2 - 1


@pytest.fixture
def codes():
    return Codes(torch.rand(3, 5, dtype=torch.float64), torch.randn(3, 1, 16, 16, dtype=torch.float64))


def levels(steps):
    """Timesteps, trailing, and ᾱ of each, with the next after the last: all from the definitions."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = [1000 - 1000 * k // steps - 1 for k in range(steps)]
    return t, [float(alphas[k]) for k in t]


def split(model, x, t, alpha, s):
    """Image and noise that the model sees in x."""
    output = model(x, torch.full((len(x),), t), s)
    if model.config.prediction_type == "epsilon":
        return (x - math.sqrt(1 - alpha) * output) / math.sqrt(alpha), output
    image = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * output
    return image, math.sqrt(1 - alpha) * x + math.sqrt(alpha) * output


def down(model, x, s, steps=STEPS):
    """DDIM with η = 0, and nothing clipped on the way."""
    timesteps, alphas = levels(steps)
    for t, alpha, after in zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True):
        image, noise = split(model, x, t, alpha, s)
        x = math.sqrt(after) * image + math.sqrt(1 - after) * noise
    return x.clamp(-1, 1)


def up(model, x, s, steps=STEPS):
    timesteps, alphas = (part[::-1] for part in levels(steps))
    for t, alpha, before in zip(timesteps, alphas, [1.0, *alphas[:-1]], strict=True):
        output = model(x, torch.full((len(x),), t), s)
        if model.config.prediction_type == "epsilon":
            noise = output
        else:
            noise = math.sqrt(1 - alpha) * x + math.sqrt(alpha) * output
        x = math.sqrt(alpha) * (x - math.sqrt(1 - before) * noise) / math.sqrt(before) + math.sqrt(1 - alpha) * noise
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampling_and_inversion_are_ddim(kind, images, codes):
    model = tiny(prediction_type=kind)
    made = sample(model, codes.activations, STEPS, noise=codes.noise)
    assert (made - down(model, codes.noise, codes.activations)).abs().max() < ROUND
    found = invert(model, images, STEPS)
    distances = model.encoder(images).flatten(2)[:, None] - model.prototypes.prototype_vectors.flatten(1)[..., None]
    nearest = distances.square().sum(2).amin(2)
    assert (found.activations - torch.log((nearest + 1) / (nearest + 1e-4))).abs().max() < ROUND
    wanted = up(model, images, found.activations)
    assert (found.noise - wanted).abs().max() < ROUND * wanted.abs().max()


def test_reconstruction_is_there_and_back(model, images):
    activations = model.activations(images)
    wanted = down(model, up(model, images, activations), activations)
    assert (reconstruct(model, images, STEPS) - wanted).abs().max() < ROUND
    exact = reconstruct(model, images, 8, fixed_point=30)
    assert (exact - images).abs().max() < 1e-6 < (reconstruct(model, images, 8) - images).abs().max()


def test_conditional_noise_is_by_counter(model):
    activations = torch.rand(5, 5, dtype=torch.float64)
    noise = pf.diffusion.normal_noise(torch.empty(5, 1, 16, 16, dtype=torch.float64), 7)
    whole = sample(model, activations, STEPS, seed=7)
    assert torch.equal(whole, sample(model, activations, STEPS, noise=noise))
    for size in (1, 2, 5):
        assert (sample(model, activations, STEPS, seed=7, batch_size=size) - whole).abs().max() < ROUND
    assert (sample(model, activations[3:], STEPS, seed=(7, 3)) - whole[3:]).abs().max() < ROUND
    assert (sample(model, activations, STEPS, seed=8) - whole).abs().mean() > 0.1


def test_activations_decide_with_the_same_noise(model, codes):
    other = sample(model, codes.activations + 1, STEPS, noise=codes.noise)
    assert (sample(model, codes.activations, STEPS, noise=codes.noise) - other).abs().max() > 1e-3


def test_images_can_be_given_back(codes):
    model = Patronus(config(prediction_type="v_prediction")).eval()
    made = sample(model, codes.activations.float(), STEPS, noise=100 * codes.noise.float())
    assert (made.min(), made.max()) == (-1, 1)
    assert made.dtype == torch.float32
    assert invert(model, made, STEPS).activations.shape == (3, 5)


def test_variations_share_the_activations_only(model, codes):
    made = vary(model, codes.activations, STEPS, count=4, seed=2, batch_size=5)
    assert made.shape == (3, 4, 1, 16, 16)
    noise = pf.diffusion.normal_noise(torch.empty(12, 1, 16, 16, dtype=torch.float64), 2).unflatten(0, (3, 4))
    for row in range(3):
        for column in range(4):
            s = codes.activations[row : row + 1]
            assert (made[row, column] - down(model, noise[row, column][None], s)[0]).abs().max() < ROUND
    assert torch.equal(made, vary(model, codes.activations, STEPS, count=4, seed=2, batch_size=5))


def test_manipulation_sets_what_is_named(model, codes):
    kept = [part.clone() for part in codes]
    changed = codes.activations.clone()
    changed[:, 1], changed[:, 4] = 2.5, 0.0
    wanted = down(model, codes.noise, changed)
    assert (manipulate(model, codes, [1, 4], [2.5, 0.0], STEPS) - wanted).abs().max() < ROUND
    assert (
        manipulate(model, codes, torch.tensor([4, 1]), torch.tensor([0.0, 2.5]), STEPS) - wanted
    ).abs().max() < ROUND
    changed[:, 1] = codes.activations[:, 1]
    assert (manipulate(model, codes, 4, 0, STEPS) - down(model, codes.noise, changed)).abs().max() < ROUND
    assert all(torch.equal(before, after) for before, after in zip(kept, codes, strict=True))


@pytest.mark.parametrize("values", [[0.0, 1.5, 3.0], [[0.0, 1.0], [0.5, 2.0]]])
def test_extrapolation_changes_one_prototype_at_a_time(model, codes, values):
    made = extrapolate(model, codes, [3, 0], values, STEPS, batch_size=4)
    table = values if isinstance(values[0], list) else [values, values]
    assert made.shape == (3, 2, len(table[0]), 1, 16, 16)
    for row in range(3):
        for place, prototype in enumerate((3, 0)):
            for column, value in enumerate(table[place]):
                s = codes.activations[row : row + 1].clone()
                s[0, prototype] = value
                wanted = down(model, codes.noise[row : row + 1], s)
                assert (made[row, place, column] - wanted[0]).abs().max() < ROUND
    assert (extrapolate(model, codes, [3, 0], values, STEPS) - made).abs().max() < ROUND


def test_a_sweep_is_one_loop(model, codes, monkeypatch):
    sizes = []
    forward = type(model.denoiser).forward
    monkeypatch.setattr(
        type(model.denoiser), "forward", lambda self, x, t, s: sizes.append(len(x)) or forward(self, x, t, s)
    )
    extrapolate(model, codes, [0, 1, 2], [0.0, 1.0, 2.0], STEPS, batch_size=10)
    assert sizes == [10] * 2 * STEPS + [7] * STEPS


def test_interpolation(model, codes):
    first, second = (Codes(*(part[rows] for part in codes)) for rows in ([0, 1], [2, 0]))
    made = interpolate(model, first, second, STEPS, count=5, batch_size=3)
    assert made.shape == (2, 5, 1, 16, 16)
    for row, (a, b) in enumerate([(0, 2), (1, 0)]):
        x, y = (codes.noise[k].numpy().ravel() for k in (a, b))
        angle = np.arccos(x @ y / np.sqrt(x @ x * (y @ y)))
        for column, w in enumerate((0, 0.25, 0.5, 0.75, 1)):
            noise = (np.sin((1 - w) * angle) * x + np.sin(w * angle) * y) / np.sin(angle)
            s = (1 - w) * codes.activations[a] + w * codes.activations[b]
            wanted = down(model, torch.from_numpy(noise).reshape(1, 1, 16, 16), s[None])
            assert (made[row, column] - wanted[0]).abs().max() < ROUND


def test_arcs_of_awkward_vectors():
    w = torch.tensor([0.0, 0.25, 1.0])
    x = torch.randn(1, 50, dtype=torch.float64)
    other = x.flip(1)  # as long
    assert torch.allclose(slerp(x, other, w).norm(dim=2), x.norm(), rtol=1e-12)
    assert torch.allclose(slerp(x, x, w), x.expand(3, -1)[None], rtol=1e-14)
    assert torch.allclose(slerp(x, 3 * x, w), torch.stack([x, 1.5 * x, 3 * x], 1), rtol=1e-14)
    near = slerp(x, x + 1e-12 * other, w)
    assert torch.allclose(near, x.expand(3, -1)[None], rtol=1e-10)
    zero = torch.zeros_like(x)
    for pair in ((x, -x), (x, zero), (zero, zero)):
        points = slerp(*pair, w)
        assert points.isfinite().all()
        assert points.abs().max() <= x.abs().max()
        assert torch.allclose(points[:, [0, 2]], torch.stack(pair, 1), atol=1e-12)
    assert slerp(x.float(), other.float(), w).dtype == torch.float32


def test_strengths():
    activations = torch.rand(500, 7) * torch.arange(1, 8)
    for q in (0, 0.5, 0.99, 1):
        rows = np.sort(activations.double().numpy(), 0)
        place = q * 499
        low = int(place)
        wanted = rows[low] + (place - low) * (rows[min(low + 1, 499)] - rows[low])
        assert np.allclose(strengths(activations, q).numpy(), wanted, rtol=1e-6)
    assert torch.equal(strengths(activations), strengths(activations, 0.99))
    assert torch.equal(strengths(activations, globally=True), activations.max().expand(7))
    half = strengths(activations.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), strengths(activations), rtol=0.02)
    many = torch.zeros(2**24 + 3, 1)  # more than torch.quantile takes
    many[-1] = 1
    assert strengths(many, 1.0).item() == 1


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m, c: strengths(c.activations.int()), TypeError, "activations is torch.int32"),
        (lambda m, c: strengths(c.activations[:0]), ValueError, r"activations has shape \(0, 5\)"),
        (lambda m, c: strengths(c.activations, 1.5), ValueError, "quantile is 1.5"),
        (lambda m, c: sample(m, c.activations[:, :4], STEPS), ValueError, r"activations has shape \(3, 4\)"),
        (lambda m, c: sample(m, c.activations / 0, STEPS), ValueError, "not finite"),
        (lambda m, c: sample(m, c.activations, STEPS, noise=c.noise[:2]), ValueError, r"noise has shape \(2, 1, 16"),
        (lambda m, c: sample(m, c.activations, STEPS, noise=c.noise.int()), TypeError, "noise is torch.int32"),
        (lambda m, c: sample(m, c.activations, 0), ValueError, "num_steps is 0"),
        (lambda m, c: sample(m, c.activations, STEPS, batch_size=0), ValueError, "batch_size is 0"),
        (lambda m, c: invert(m, c.noise * 100, STEPS), ValueError, "images has values outside"),
        (lambda m, c: vary(m, c.activations, STEPS, count=0), ValueError, "count is 0; give at least 1"),
        (lambda m, c: manipulate(m, c, [], 0, STEPS), ValueError, "prototypes is empty"),
        (lambda m, c: manipulate(m, c, 5, 0, STEPS), IndexError, "prototypes has 5; the model has 0 to 4"),
        (lambda m, c: manipulate(m, c, -1, 0, STEPS), IndexError, "prototypes has -1"),
        (lambda m, c: manipulate(m, c, [1, 1], 0, STEPS), ValueError, "twice"),
        (lambda m, c: manipulate(m, c, [0.5], 0, STEPS), TypeError, "prototypes is"),
        (lambda m, c: manipulate(m, c, [0, 1], [1.0, 2.0, 3.0], STEPS), ValueError, r"values has shape \(3,\)"),
        (lambda m, c: manipulate(m, c, 0, "strong", STEPS), TypeError, "values is 'strong'"),
        (lambda m, c: manipulate(m, c, 0, math.nan, STEPS), ValueError, "not finite"),
        (lambda m, c: extrapolate(m, c, 0, 1.0, STEPS), ValueError, r"give \(V,\) or \(1, V\)"),
        (lambda m, c: extrapolate(m, c, [0, 1], [[1.0, 2.0]], STEPS), ValueError, "for 2 prototypes"),
        (
            lambda m, c: interpolate(m, c, Codes(*(p[:2] for p in c)), STEPS),
            ValueError,
            "first has 3 rows and second 2",
        ),
        (lambda m, c: interpolate(m, c, c, STEPS, count=1), ValueError, "count is 1; give at least 2"),
        (lambda m, c: slerp(c.noise, c.noise[:2], torch.zeros(1)), ValueError, "first is of shape"),
        (lambda m, c: slerp(c.noise, c.noise, torch.tensor(0.5)), ValueError, "weights has shape"),
    ],
)
def test_what_does_not_fit_is_named(model, codes, act, error, message):
    with pytest.raises(error, match=message):
        act(model, codes)


def test_dropout_is_not_sampled_with(model, codes, images):
    for act in (lambda: sample(model, codes.activations, STEPS), lambda: invert(model, images, STEPS)):
        model.train()
        try:
            with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
                act()
        finally:
            model.eval()


# Pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_with_heads_shows_every_pixel(channels):
    tensor = (torch.randint(256, (12, channels, 8, 8)) / 255).float()
    groups = [("a name", tensor[:6]), ("another\nof two lines", tensor[6:])]
    for heads in ((), ("one", "two\nlines", "a head that is far too wide for its column")):
        found = Image.open(BytesIO(sheet(groups, rows=2, columns=3, side=32, heads=heads, gap=2))).convert("RGB")
        pixels = np.asarray(found)
        wanted = (tensor * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        left, top = pixels.shape[1] - 3 * 34, pixels.shape[0] - 2 * (2 * 34 + 6)
        assert (top > 20) == bool(heads)
        for number, image in enumerate(wanted):
            block, row, column = number // 6, number % 6 // 3, number % 3
            y, x = top + block * 74 + row * 34, left + column * 34 + 2
            assert np.array_equal(pixels[y : y + 32 : 4, x : x + 32 : 4], image)
            assert (pixels[y : y + 32, x - 2 : x] == 255).all()


# The command

runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    return cli.build()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    Patronus(config(prediction_type="v_prediction")).save_pretrained(folder, data="digits")
    return folder


def run(app, *arguments):
    arguments = [str(argument) for argument in arguments]
    return runner.invoke(app, ["patronus", "generate", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


QUICK = ("--steps", 2, "--images", 4, "--samples", 2, "--values", "0,1,3", "--fixed-point", 1, "--no-progress")


def test_the_command_makes_pictures_and_numbers(app, trained, tmp_path):
    result = run(app, trained, *QUICK)
    assert result.exit_code == 0, result.output
    assert "root mean square error" in result.output
    folder = trained / "generate"
    content = json.loads((folder / "result.json").read_text())
    assert content["format"] == "protofast-patronus-generate-1"
    names = [picture["file"] for picture in content["pictures"]]
    assert names == ["reconstruction.png", "manipulation.png", "extrapolation.png", "interpolation.png"]
    for name in names:
        Image.open(folder / name).verify()
    chosen = content["settings"]["prototypes"]
    assert sorted(chosen) == [0, 1, 2, 3, 4]
    assert np.asarray(content["numbers"]["extrapolation"]["activation"]).shape == (5, 3)
    assert [row[0] for row in content["tables"][0]["rows"]] == chosen

    model = Patronus.from_pretrained(trained)
    data = drawn(pf.data.load("digits", split="test"), 10_000, 0)
    seen = model.activations(pf.patronus.images_of(model.config, data))
    assert chosen == sorted(chosen, key=lambda j: -float(seen[:, j].std()))
    assert np.allclose(content["settings"]["strengths"], np.quantile(seen.numpy(), 0.99, axis=0)[chosen], rtol=1e-5)

    again = run(app, trained, *QUICK, "--out", tmp_path / "again")
    assert again.exit_code == 0
    other = run(app, trained, *QUICK, "--out", tmp_path / "other", "--seed", 1, "--prototypes", "4,2", "--globally")
    assert other.exit_code == 0
    for name in (*names, "result.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    settings = json.loads((tmp_path / "other" / "result.json").read_text())["settings"]
    assert settings["prototypes"] == [4, 2]
    assert settings["strengths"][0] == settings["strengths"][1]


def test_images_without_labels(app, trained, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 1, 16, 16), np.float32))
    result = run(app, trained, *QUICK, "--data", tmp_path / "x.npy", "--images", 3, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prototypes", "1,x"], 2, "--prototypes"),
        (["--prototypes", "1,1"], 2, "--prototypes"),
        (["--values", "0,nan"], 2, "--values"),
        (["--prototypes", "0,9"], 1, "prototypes has 9; the model has 0 to 4"),
        (["--images", "9999"], 1, "--images is 9999"),
        (["--steps", "1001"], 1, "num_steps is 1001"),
    ],
)
def test_an_error_is_said_and_nothing_written(app, trained, tmp_path, arguments, code, message):
    result = run(app, trained, *QUICK, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_teaches(app):
    text = run(app, "--help").output
    for words in (
        "--prototypes",
        "--fixed-point",
        "--globally",
        "manipulation.png",
        "protofast patronus generate runs",
    ):
        assert words in text


def test_images_are_drawn_from_every_class():
    labels = np.repeat(np.arange(4), [40, 30, 20, 10])
    data = pf.data.Dataset(np.arange(100, dtype=np.uint8).reshape(100, 1, 1), labels)
    first = drawn(data, 16, 0)
    assert sorted(first.labels[:4]) == [0, 1, 2, 3]
    assert np.bincount(first.labels).tolist() == [4, 4, 4, 4]
    everything = drawn(data, 100, 0)
    assert sorted(np.asarray(everything.images[:]).ravel()) == list(range(100))
    assert not np.array_equal(drawn(data, 16, 1).take(slice(None)), first.take(slice(None)))
    assert torch.equal(drawn(data, 16, 0).take(slice(None)), first.take(slice(None)))


def test_numbers_of_a_list():
    assert numbers_of("3, 7,12", int, "--x") == [3, 7, 12]
    assert numbers_of("0,0.5", float, "--x") == [0, 0.5]
