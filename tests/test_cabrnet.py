"""CaBRNet's own ProtoPNet, built from a configuration that names our layers: forward, training, projection, pruning.

cabrnet and what it needs lie in .venv/cabrnet (requirements-cabrnet.txt), so each test runs in a process of its own.
"""

import sys
from pathlib import Path

import pytest
from helpers.fresh import run_fresh

FOLDER = Path(sys.prefix) / "cabrnet"

# The settings of CaBRNet's configs/protopnet/mnist, with random weights: pretrained ones are a download.
MODEL = """
top_arch: {module: cabrnet.archs.protopnet.model, name: ProtoPNet}
extractor:
  backbone: {arch: resnet18, layer: layer4, weights: ""}
  add_on:
    init_mode: XAVIER
    conv1: {type: Conv2d, params: {out_channels: 128, kernel_size: 1, bias: false}}
    sigmoid1: {type: Sigmoid}
similarity: {SIMILARITY}
classifier:
  module: CLASSIFIER
  name: ProtoPNetClassifier
  params: {num_classes: 10, num_proto_per_class: 10, proto_init_mode: SHIFTED_NORMAL, compatibility_mode: COMPATIBLE}
"""
TRAINING = {
    "param_groups": {
        "backbone": "extractor.convnet",
        "add_on_layers": "extractor.add_on",
        "prototypes": "classifier.prototypes",
        "last_layer": "classifier.last_layer",
    },
    "optimizers": {
        "joint_optimizer": {
            "type": "Adam",
            "groups": {name: {"lr": 1e-3} for name in ("backbone", "add_on_layers", "prototypes")},
        },
        "last_layer_optimizer": {"type": "Adam", "groups": {"last_layer": {"lr": 1e-4}}},
    },
    "num_epochs": 1,
    "periods": {"main_training": {"epoch_range": [1, 1], "optimizers": "joint_optimizer"}},
    "auxiliary_info": {
        "loss_coefficients": {"clustering": 0.8, "separability": -0.08, "regularization": 0.0001},
        "projection_config": {"start_epoch": 0, "frequency": 1, "num_ft_epochs": 1},
    },
}
THEIRS = ("cabrnet.archs.protopnet.decision", "name: LegacyProtoPNetSimilarity")
LAYER_ALONE = ("cabrnet.archs.protopnet.decision", "module: protofast.cabrnet, name: ProtoPNetSimilarity")
BOTH = ("protofast.cabrnet", "module: protofast.cabrnet, name: ProtoPNetSimilarity")


# --- what runs in the other process ------------------------------------------------------------------------------


def _cabrnet() -> None:
    """Makes cabrnet importable here."""
    import torch

    sys.path.append(str(FOLDER))
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        import torchvision
    except RuntimeError:  # of another build of torch: its models do without its operators, if those have a schema
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _cabrnet.library = library
        import torchvision  # noqa: F401
    from loguru import logger

    logger.remove()


def _missing() -> str | None:
    if not (3, 10) <= sys.version_info < (3, 13):
        return "cabrnet 1.2 is for Python 3.10 to 3.12"
    try:
        _cabrnet()
        import cabrnet.archs.protopnet.decision
        import cabrnet.archs.protopnet.model  # noqa: F401
    except ImportError as error:
        return f"cabrnet cannot be imported ({error}): make .venv/cabrnet/ready"
    return None


def _build(layers, folder, compatible=True):
    import torch
    from cabrnet.archs.generic.model import CaBRNet

    classifier, similarity = layers
    text = MODEL.replace("CLASSIFIER", classifier).replace("SIMILARITY", similarity)
    path = Path(folder, f"{classifier}.yml")
    path.write_text(text.replace("COMPATIBLE", str(compatible).lower()))
    torch.manual_seed(0)
    return CaBRNet.build_from_config(str(path)).double()


def _batches(count=10):
    import torch

    # The smallest with a grid of 3 × 3.
    images = torch.rand(count, 3, 65, 65, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = torch.utils.data.TensorDataset(images, torch.arange(count) % 10)
    return torch.utils.data.DataLoader(data, batch_size=5)


def _forward(folder):
    """In float32: both within their bounds of float64, and ours of what theirs is built to compute."""
    import numpy as np
    import torch
    from helpers.errors import assert_within, exact

    theirs, ours, layer = (_build(layers, folder).float().eval() for layers in (THEIRS, BOTH, LAYER_ALONE))
    state = theirs.state_dict()
    assert {*state} - {*ours.state_dict()} == {"classifier.similarity_layer._summation_kernel"}
    assert not {*ours.state_dict()} - {*state}
    for model in (ours, layer):
        model.load_state_dict(state)  # strictly, kernel of ones and all
    images = next(iter(_batches()))[0].float()
    with torch.no_grad():
        features = theirs.features(images)
        z, p = exact(features)[:, None], exact(theirs.classifier.prototypes)[None]
        distances = ((z - p) ** 2).sum(2)
        similar = np.log((distances + 1) / (distances + exact(torch.tensor(1e-4, dtype=torch.float64))))
        scale = (z**2).sum(2) + (p**2).sum(2)
        near = distances.min((2, 3))
        weight = exact(theirs.classifier.last_layer.weight)
        logits = similar.max((2, 3)) @ weight.T
        terms = 3 + (abs(similar.max((2, 3))) @ abs(weight.T))
        for model in (ours, layer):
            assert_within(model.distances(images), distances, distances, 128 + 8)
            # The logarithm turns a relative error of d into at most as large an error, and adds its own roundings.
            assert_within(model.similarities(images), similar, 1 + similar, 128 + 16)
            found, nearest = model(images)
            assert_within(nearest, near, near, 128 + 8)
            assert_within(found, logits, 100 * terms, 128 + 16 + 100)
        found, nearest = theirs(images)
        assert_within(nearest, near, scale.max(), 128 + 8)


def _training(folder, layers, compatible):
    """A whole epoch of theirs in float64: steps, projection of the prototypes, and the last layer's own epoch."""
    import copy

    import torch
    from cabrnet.core.utils.optimizers import OptimizerManager

    from protofast.cabrnet import ProtoPNetSimilarity

    results = []
    for choice in (THEIRS, layers):
        model = _build(choice, folder, compatible)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        model.register_training_params(TRAINING)
        manager = OptimizerManager.build_from_config(copy.deepcopy(TRAINING), model)
        loaders = {"train_set": _batches(), "projection_set": _batches(20)}
        stats = model._train_epoch(loaders, manager, device="cpu", epoch_idx=1)
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        stats |= model.train_epoch(loaders, manager, device="cpu", epoch_idx=1)
        projected = model.project(loaders["projection_set"], device="cpu")
        results.append((start, trained, stats, projected, model))
    (start, trained, stats, projected, theirs), (ours_start, ours_trained, ours_stats, ours_projected, ours) = results
    assert isinstance(ours.classifier.similarity_layer, ProtoPNetSimilarity)
    for name, value in ours_start.items():
        assert torch.equal(value, start[name]), name
    moved = [name for name in ours_trained if not torch.equal(ours_trained[name], ours_start[name])]
    assert {"classifier.prototypes", "extractor.add_on.conv1.weight", "extractor.convnet.conv1.weight"} <= {*moved}
    for name, value in ours_trained.items():
        # Adam divides a gradient by its size: where it is as small as its rounding errors, it may go either way.
        far = (value - trained[name]).abs() > 1e-9
        assert far.double().mean() < 1e-3, name
    for name in ours_stats.keys() - {"time/batch", "time/data"}:
        assert abs(ours_stats[name] - stats[name]) <= 1e-5 * max(1, abs(stats[name])), name
    for mine, other in zip(ours_projected, projected, strict=True):
        assert [mine[key] for key in ("proto_idx", "img_idx", "h", "w")] == [
            other[key] for key in ("proto_idx", "img_idx", "h", "w")
        ]
        assert abs(mine["score"] - other["score"]) < 1e-6
    # Prototypes are patches now: the distance to the nearest is exactly 0 in the direct form.
    ours.eval()
    with torch.no_grad():
        nearest = torch.cat([ours(images)[1] for images, _ in _batches(20)])
    assert (nearest.amin(0) == 0).all()
    for model in (theirs, ours):
        model.prune(_batches(20), device="cpu", pruning_threshold=2, num_nearest_patches=8)
    assert ours.num_prototypes == theirs.num_prototypes > 0
    with torch.no_grad():
        # Their pruning makes a last layer in float32.
        outputs = [model.double().eval()(next(iter(_batches()))[0]) for model in (ours, theirs)]
        for found, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _other_layers():
    import torch
    from cabrnet.core.utils import similarities

    from protofast import cabrnet

    features = torch.rand(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    prototypes = torch.rand(5, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    sizes = {"num_prototypes": 5, "num_features": 8}
    for name, options in (
        ("ProtoPNetSimilarity", {"stability_factor": 1e-3}),
        ("ProtoTreeSimilarity", {}),
        ("ProtoTreeSimilarity", {"log_probabilities": True}),
        ("CosineSimilarity", {}),
    ):
        found, expected = [], []
        for module, results in ((cabrnet, found), (similarities, expected)):
            layer = getattr(module, name)(**sizes, **options)
            for result in (layer(features, prototypes), layer.distances(features, prototypes)):
                results.append(result.detach())
                results += torch.autograd.grad(result.square().sum(), (features, prototypes))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # cdist has an expansion of its own
        layer = getattr(cabrnet, name)(**sizes, **options)
        nearest = layer.min_distances(features, prototypes)
        least = layer.distances(features, prototypes).flatten(2).amin(2)
        torch.testing.assert_close(nearest, least, rtol=1e-14, atol=1e-15)


def _wrong_layer():
    from protofast.cabrnet import ProtoPNetClassifier

    try:
        ProtoPNetClassifier({"name": "ProtoPNetSimilarity"}, num_classes=2, num_features=3, num_proto_per_class=1)
    except ValueError as error:
        return str(error)
    return ""


def _doctests():
    import doctest

    from protofast import cabrnet

    return tuple(doctest.testmod(cabrnet))


def _with_cabrnet(function, *args):
    _cabrnet()
    return function(*args)


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _there():
    if reason := run_fresh(_missing):
        pytest.skip(reason)


def test_its_configuration_runs_with_our_layers(tmp_path):
    run_fresh(_with_cabrnet, _forward, str(tmp_path))


@pytest.mark.parametrize(
    ("layers", "compatible"), [(BOTH, True), (LAYER_ALONE, False)], ids=["layer and classifier", "layer"]
)
def test_its_training_projection_and_pruning_are_the_same(tmp_path, layers, compatible):
    run_fresh(_with_cabrnet, _training, str(tmp_path), layers, compatible)


def test_every_layer_is_theirs():
    run_fresh(_with_cabrnet, _other_layers)


def test_the_classifier_names_what_does_not_fit():
    message = run_fresh(_with_cabrnet, _wrong_layer)
    assert "cabrnet.core.utils.similarities" in message
    assert "module: protofast.cabrnet" in message


def test_examples():
    failed, run = run_fresh(_with_cabrnet, _doctests)
    assert failed == 0
    assert run > 5
