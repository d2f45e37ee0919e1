# ruff: noqa: E402
"""Emergence: planted times are found, a small model is traced as by hand, and the command."""

import json
import math
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for module in ("typer", "rich", "diffusers", "PIL", "safetensors", "matplotlib"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast.patronus import Patronus, PatronusConfig
from protofast.patronus.emergence import emergence, emergence_times, figure, predictions
from protofast.patronus.generate import Codes

SIZES = {"num_prototypes": 4, "width": 8, "multipliers": (1, 2), "layers": 1, "groups": 4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Planted:
    """Says an image whose pixel j is the activation s_j, from a timestep on that is the prototype's own; 0 before."""

    def __init__(self, starts, size=1.0):
        count = len(starts)
        self.starts, self.size = torch.tensor(starts), size
        self.config = SimpleNamespace(num_prototypes=count, image_shape=(1, 1, count), prediction_type="sample")
        self.prototypes = SimpleNamespace(prototype_vectors=torch.zeros(1, dtype=torch.float64))
        self.schedule, self.training, self.device = pf.DDIMSchedule.linear(1000), False, torch.device("cpu")

    def __call__(self, x, t, activations):
        return torch.where(t[:, None] <= self.starts, self.size * activations, 0)[:, None, None]

    def encode(self, images):
        return images[:, 0, 0]


def some(images, prototypes):
    return Codes(
        torch.rand(images, prototypes, dtype=torch.float64), torch.randn(images, 1, 1, prototypes, dtype=torch.float64)
    )


def test_planted_times_are_found():
    found = emergence(Planted([999, 500, 99, -1, 320]), some(6, 5), 3.0, num_steps=10)
    assert found.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert found.times[:3].tolist() == [999, 499, 99]
    assert math.isnan(found.times[3])
    assert found.times[4] == 299
    assert found.order.tolist() == [0, 1, 4, 2, 3]
    assert found.images == 6


def test_what_was_planted_is_measured():
    codes, values = some(6, 4), torch.tensor([1.5, 2.0, 2.2])
    found = emergence(Planted([999, 999, 500, 999]), codes, values, [3, 0, 2], num_steps=4)  # 999 749 499 249
    own = codes.activations[:, [3, 0, 2]]
    there = torch.tensor([[1.0, 1, 0]] * 2 + [[1.0, 1, 1]] * 2).double()
    assert torch.allclose(found.original, there * own.mean(0))
    assert torch.allclose(found.enhanced, there * values.double())
    assert torch.allclose(found.delta, there * (values - own).mean(0))
    assert torch.allclose(found.error, there * own.std(0) / 6**0.5)
    each = torch.stack([((values - own) * row).mean(1) for row in there])  # a trend for each image
    assert torch.allclose(found.trend, each.mean(1))
    assert torch.allclose(found.trend_error, each.std(1) / 6**0.5)
    assert found.prototypes.tolist() == [3, 0, 2]
    assert torch.equal(found.values, values.double())
    assert found.trend_time == 999


def test_a_fall_is_no_emergence():
    found = emergence(Planted([999, 999], size=-1.0), some(5, 2), 2.0, num_steps=5)
    assert (found.delta[-1] < 0).all()
    assert found.times.isnan().all()
    assert math.isnan(found.trend_time)


def test_what_does_not_stand_out_of_its_error_does_not_rise():
    codes = some(400, 1)
    codes.activations[:] = torch.tensor([0.0, 2.0]).repeat(200)[:, None]  # mean 1, standard error 0.05
    assert emergence(Planted([500]), codes, 1.09, num_steps=5).times.isnan().all()
    assert emergence(Planted([500]), codes, 1.11, num_steps=5).times.tolist() == [399]


def test_one_image_has_no_error():
    found = emergence(Planted([999, 500]), some(1, 2), 2.0, num_steps=5)
    assert found.error.isnan().all()
    assert found.trend_error.isnan().all()
    assert found.times.tolist() == [999, 399]


@pytest.mark.parametrize(
    ("delta", "time"),
    [
        ([0, 0, 0, 0, 1], 199),
        ([1, 1, 1, 1, 1], 999),
        ([0, 0.49, 0.5, 0.6, 1], 599),
        ([0.9, 0.9, 0.4, 0.9, 1], 399),  # it went back below
        ([0, 5, 5, 5, 1], 799),
        ([0, 0, 0, 0, 0], math.nan),
        ([1, 1, 1, 1, -1], math.nan),
        ([0, 1, 1, 1, math.nan], math.nan),
    ],
)
def test_emergence_times(delta, time):
    found = emergence_times(torch.tensor([999, 799, 599, 399, 199]), torch.tensor(delta).double()[:, None])
    assert found.tolist() == pytest.approx([time], nan_ok=True)


def by_hand(model, codes, values, prototypes, steps):
    """δ of each image, step and prototype: a run at a time, DDIM and activations from their definitions."""

    def seen(image):
        features = model.encoder(image).flatten(2)[0].T
        vectors = model.prototypes.prototype_vectors.flatten(1)
        nearest = (features[:, None] - vectors).square().sum(2).amin(0)
        return torch.log((nearest + 1) / (nearest + 1e-4))

    def trace(x, s):
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        timesteps = [1000 - 1000 * k // steps - 1 for k in range(steps)]
        rows = []
        for t, after in zip(timesteps, [*alphas[timesteps[1:]], torch.tensor(1.0).double()], strict=True):
            a, v = alphas[t], model(x, torch.tensor([t]), s)
            image, noise = a.sqrt() * x - (1 - a).sqrt() * v, (1 - a).sqrt() * x + a.sqrt() * v
            rows.append(seen(image))
            x = after.sqrt() * image + (1 - after).sqrt() * noise
        return torch.stack(rows)

    result = []
    for s, x in zip(codes.activations[:, None], codes.noise[:, None], strict=True):
        plain, columns = trace(x, s), []
        for value, prototype in zip(values, prototypes, strict=True):
            changed = s.clone()
            changed[0, prototype] = value
            columns.append((trace(x, changed) - plain)[:, prototype])
        result.append(torch.stack(columns, 1))
    return torch.stack(result)


def test_a_model_is_traced_as_by_hand(monkeypatch):
    torch.manual_seed(1)
    config = PatronusConfig((1, 16, 16), prediction_type="v_prediction", **SIZES)
    model = Patronus(config).double().eval().requires_grad_(False)
    with torch.no_grad():  # an untrained denoiser hardly listens
        model.denoiser.condition[2].weight *= 30
        model.prototypes.prototype_vectors *= 0.1
    codes = Codes(torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 1, 16, 16, dtype=torch.float64))
    values, prototypes = [1.0, 2.5], [3, 1]
    wanted = by_hand(model, codes, values, prototypes, 5)
    assert wanted.std() > 1e-4
    kept = codes.activations.clone()
    for size in (1, 4, 256):
        sizes = []
        encode = type(model).encode
        monkeypatch.setattr(
            type(model), "encode", lambda self, x, *a, e=encode, n=sizes: n.append(len(x)) or e(self, x, *a)
        )
        found = emergence(model, codes, values, prototypes, num_steps=5, batch_size=size)
        monkeypatch.undo()
        assert max(sizes) == min(size, 9)
        assert sum(sizes) == 3 * (2 + 1) * 5
        bound = 1e-8 * wanted.abs().max()
        assert (found.delta - wanted.mean(0)).abs().max() < bound
        assert (found.error - wanted.std(0) / 3**0.5).abs().max() < bound
        assert torch.allclose(found.enhanced - found.original, found.delta, atol=1e-12)
    assert torch.equal(kept, codes.activations)


def test_all_prototypes_by_default_and_the_models_own_dtype():
    model = Patronus(PatronusConfig((1, 16, 16), **SIZES)).eval()
    codes = Codes(torch.rand(2, 4, dtype=torch.float64), torch.randn(2, 1, 16, 16, dtype=torch.float64))
    assert emergence(model, codes, 1.0, num_steps=2).prototypes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"codes": Codes(torch.rand(2, 3), torch.randn(2, 1, 1, 2))},
            ValueError,
            r"codes.activations has shape \(2, 3\)",
        ),
        (
            {"codes": Codes(torch.rand(2, 2), torch.randn(1, 1, 1, 2))},
            ValueError,
            r"codes.noise has shape \(1, 1, 1, 2\)",
        ),
        ({"codes": Codes(torch.rand(0, 2), torch.randn(0, 1, 1, 2))}, ValueError, "codes has no images"),
        ({"values": [1.0]}, ValueError, r"values has shape \(1,\), for 2 prototypes"),
        ({"values": math.inf}, ValueError, "not finite"),
        ({"prototypes": [2]}, IndexError, "prototypes has 2; the model has 0 to 1"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = {"codes": some(2, 2), "values": 1.0, "num_steps": 2} | change
    with pytest.raises(error, match=message):
        emergence(Planted([999, 999]), **arguments)


def test_predicted_images():
    codes = some(3, 2)
    codes.activations[2] = 5
    timesteps, images = predictions(Planted([999, 500]), *codes, 10, shown=4, batch_size=2)
    assert timesteps.tolist() == [999, 699, 399, 99]
    wanted = codes.activations.clamp_max(1)[:, None] * torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 1]])
    assert torch.allclose(images[:, :, 0, 0], wanted)
    timesteps, images = predictions(Planted([999, 500]), *codes, 3, shown=20)
    assert timesteps.tolist() == [999, 666, 332]
    assert images.shape == (3, 3, 1, 1, 2)
    with pytest.raises(ValueError, match="shown is 0"):
        predictions(Planted([999, 500]), *codes, 3, shown=0)


def test_the_picture_orders_and_names_prototypes():
    found = emergence(Planted([99, 500, 999, -1]), some(4, 4), 3.0, num_steps=10)
    above, below = figure(found).axes[:2]
    assert [text.get_text() for text in below.get_yticklabels()] == ["2", "1", "0", "3 (does not rise)"]
    line = above.get_lines()[0]
    assert np.allclose(line.get_xydata(), np.stack([found.timesteps, found.trend], 1))
    assert below.get_xlim()[0] > below.get_xlim()[1] == -0.5
    cells = below.collections[0].get_array()
    assert cells.shape == (4, 10)
    assert cells[0].tolist() == [1] * 10
    assert cells[1].tolist() == [0] * 5 + [1] * 5
    assert cells[3].mask.all()
    for steps, images in ((1, 1), (3, 2)):
        file = BytesIO()
        figure(emergence(Planted([999, -1]), some(images, 2), 3.0, num_steps=steps)).savefig(file, format="png")
        Image.open(file).verify()


# The command

runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    return cli.build()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    Patronus(PatronusConfig((1, 16, 16), prediction_type="v_prediction", **SIZES)).save_pretrained(
        folder, data="digits"
    )
    return folder


def run(app, *arguments):
    arguments = [str(argument) for argument in arguments]
    return runner.invoke(app, ["patronus", "emergence", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


QUICK = ("--steps", 3, "--images", 3, "--no-progress")


def test_the_command_traces(app, trained, tmp_path):
    result = run(app, trained, *QUICK)
    assert result.exit_code == 0, result.output
    folder = trained / "emergence"
    text = (folder / "result.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    numbers = content["numbers"]
    assert numbers["timesteps"] == [999, 666, 332]
    assert np.asarray(numbers["delta"]).shape == (3, 4)
    assert len(content["tables"][0]["rows"]) == 4
    files = [picture["file"] for picture in content["pictures"]]
    assert files == ["emergence.png", "predicted.png"]
    for file in files:
        Image.open(folder / file).verify()
    again = run(app, trained, *QUICK, "--out", tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "result.json").read_text() == text
    other = run(app, trained, *QUICK, "--images", 1, "--prototypes", "3,0", "--out", tmp_path / "other", "--seed", 4)
    assert other.exit_code == 0
    content = json.loads((tmp_path / "other" / "result.json").read_text())
    assert content["numbers"]["prototypes"] == [3, 0]
    assert content["numbers"]["trend_error"] == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prototypes", "one"], 2, "--prototypes"),
        (["--prototypes", "4"], 1, "prototypes has 4; the model has 0 to 3"),
        (["--images", "9999"], 1, "--images is 9999"),
    ],
)
def test_an_error_is_said_and_nothing_written(app, trained, tmp_path, arguments, code, message):
    result = run(app, trained, *QUICK, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_teaches(app):
    text = run(app, "--help").output
    for words in ("--prototypes", "emergence time", "emergence.png", "protofast patronus emergence runs/fashion"):
        assert words in text
