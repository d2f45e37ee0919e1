"""The model: the paper's sizes, the encoder's map, files."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from protofast.patronus import PRESETS, TRAINING, Patronus, PatronusConfig, TrainingConfig
from protofast.patronus.config import LARGE, SMALL

TINY = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)


@pytest.mark.parametrize(
    ("name", "grid", "prototypes"),
    [
        ("mnist", (10, 10), 30),
        ("fashion-mnist", (10, 10), 30),
        ("cifar10", (10, 10), 100),
        ("celeba", (26, 26), 100),
        ("ffhq", (26, 26), 100),
        ("chexpert", (43, 43), 100),
        ("cpu", (10, 10), 30),
    ],
)
def test_presets_have_the_papers_sizes(name, grid, prototypes):
    config = PRESETS[name]
    assert (config.grid, config.channels, config.num_prototypes) == (grid, 128, prototypes)
    assert name in TRAINING


@pytest.mark.parametrize(("shape", "layers"), [((3, 32, 32), SMALL), ((1, 64, 64), SMALL), ((1, 224, 224), LARGE)])
def test_grid_is_what_the_encoder_makes(shape, layers):
    config = PatronusConfig(shape, encoder=layers, width=8, multipliers=(1, 2))
    features = Patronus(config).encoder(torch.zeros(1, *shape))
    assert features.shape == (1, config.channels, *config.grid)


def test_encoder_has_the_papers_weights():
    """130,176 of three channels (design notes: conv weights and biases), drawn from N(0, 0.1²)."""
    encoder = Patronus(dataclasses.replace(TINY, image_shape=(3, 32, 32))).encoder
    assert sum(weight.numel() for weight in encoder.parameters()) == 130_176
    weights = torch.cat([layer.weight.detach().flatten() for layer in encoder if isinstance(layer, nn.Conv2d)])
    assert abs(float(weights.mean())) < 5 * 0.1 / len(weights) ** 0.5
    assert abs(float(weights.std()) - 0.1) < 0.002
    assert isinstance(encoder[-1], nn.ReLU)


def test_activations_are_the_papers_formula():
    model, images = Patronus(TINY).double(), torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2 - 1
    features = model.encoder(images).flatten(2)
    vectors = model.prototypes.prototype_vectors.flatten(1)
    distance = (features[:, None] - vectors[None, :, :, None]).square().sum(2)
    least, index = distance.min(2)
    expected = ((least + 1) / (least + TINY.eps)).log()
    found = model.encode(images, return_all=True)
    torch.testing.assert_close(found.activation, expected, rtol=1e-12, atol=0)
    assert torch.equal(found.index, index)


def test_activations_do_not_depend_on_batches():
    model, images = Patronus(TINY).double().eval(), torch.rand(7, 1, 16, 16, dtype=torch.float64) * 2 - 1
    whole = model.activations(images)
    torch.testing.assert_close(model.activations(images, batch_size=3), whole, rtol=1e-12, atol=1e-14)
    assert not whole.requires_grad


def test_activations_are_not_rounded_under_autocast():
    model, images = Patronus(TINY), torch.rand(3, 1, 16, 16) * 2 - 1
    expected = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), expected)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_denoiser_hears_the_activations_and_the_timestep(patch):
    model = Patronus(dataclasses.replace(TINY, patch=patch, multipliers=(1, 2), dropout=0)).eval()
    x, activations = torch.randn(2, 1, 16, 16), torch.rand(2, 5)
    t = torch.tensor([5, 600])
    made = model(x, t, activations)
    assert made.shape == x.shape
    assert not torch.allclose(model(x, t, activations + 1), made)
    assert not torch.allclose(model(x, t + 100, activations), made)
    assert torch.allclose(model(x[1:], t[1:], activations[1:]), made[1:], atol=1e-5)


def test_gradients_reach_everything():
    model = Patronus(TINY)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    model(torch.randn_like(images), torch.tensor([3, 900]), model.encode(images)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_saved_and_loaded(tmp_path):
    model = Patronus(TINY).eval()
    model.save_pretrained(tmp_path / "model", data="digits")
    loaded = Patronus.from_pretrained(tmp_path / "model")
    assert loaded.config == TINY
    assert not loaded.training
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert json.loads((tmp_path / "model/config.json").read_text())["about"] == {"data": "digits"}


def test_damaged_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="protofast patronus train"):
        Patronus.from_pretrained(tmp_path)
    Patronus(TINY).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="checksum"):
        Patronus.from_pretrained(tmp_path)
    weights.write_bytes(bytes(content[:-100]))
    with pytest.raises(ValueError, match="damaged"):
        Patronus.from_pretrained(tmp_path)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_prototype": 3}))
    with pytest.raises(ValueError, match="'num_prototype'"):
        Patronus.from_pretrained(tmp_path)
    config.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="no Patronus model"):
        Patronus.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Patronus.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_shape": (1, 15, 16)}, "multiples of 2"),
        ({"image_shape": (16, 16)}, "channels, height, width"),
        ({"image_shape": (1, 4, 4)}, "nothing of it is left"),
        ({"encoder": ()}, "encoder"),
        ({"encoder": ((8, 3, 1),)}, "encoder"),
        ({"num_prototypes": 0}, "num_prototypes is 0"),
        ({"width": 6}, "multiple of groups"),
        ({"dropout": 1.0}, "dropout"),
        ({"eps": -1.0}, "eps"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"multipliers": ()}, "multipliers"),
    ],
)
def test_config_says_what_does_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"updates": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup": 1.0}, {"ema": 1.0},
        {"distinct": -1.0}, {"margin": 0.0, "distinct": 1.0}, {"margin": float("inf")},
        {"decay": "linear"}, {"initialize": "zeros"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_training_config_names_what_does_not_fit(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainingConfig(**change)


def test_unknown_preset():
    with pytest.raises(ValueError, match="cifar10"):
        Patronus("cifar")


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(2, 1, 16, 15), ValueError, "16, 16"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), TypeError, "floating point"),
        (torch.full((2, 1, 16, 16), 2.0), ValueError, "outside"),
        (torch.full((2, 1, 16, 16), float("nan")), ValueError, "NaN"),
        ([1, 2], TypeError, "list"),
    ],
    ids=["shape", "dtype", "range", "NaN", "list"],
)
def test_images_are_checked(images, error, words):
    with pytest.raises(error, match=words):
        Patronus(TINY).activations(images)
