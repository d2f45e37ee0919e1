# ruff: noqa: E402
"""Evaluation of a Patronus model: every number against an oracle that shares no code, and the command."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

NEEDED = ("typer", "rich", "diffusers", "sklearn", "scipy", "torchmetrics", "matplotlib", "PIL", "safetensors", "pooch")
for module in NEEDED:
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast._files import digest
from protofast.patronus import Patronus, PatronusConfig
from protofast.patronus.evaluation import (
    Classifier,
    agreement,
    attributes_of,
    auroc,
    classifier_features,
    disentanglement,
    draws,
    frechet_distance,
    inception_features,
    probe,
    quantised,
    reference_distances,
    train_classifier,
    untrained,
)
from protofast.patronus.evaluation.disentanglement import mutual_information

TINY = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coded(n=300, classes=3, dimensions=4, seed=0):
    """Codes in which the classes show, but not without error, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 1.5 * torch.randn(classes, dimensions, generator=generator)
    return centres[labels] + torch.randn(n, dimensions, generator=generator), labels


# AUROC


@pytest.mark.parametrize("distinct", [2, 7, 1000])
def test_auroc_is_that_of_scikit_learn(distinct):
    generator = np.random.default_rng(distinct)
    scores = generator.integers(distinct, size=(200, 6)) / 7 - 3
    attributes = generator.random((200, 4)) < [0.5, 0.1, 0.9, 0.02]
    attributes[0] = True
    expected = [[roc_auc_score(a, s) for s in scores.T] for a in attributes.T]
    np.testing.assert_allclose(auroc(scores, attributes), expected, rtol=0, atol=1e-12)


def test_auroc_of_a_constant_attribute_is_nan_and_of_a_constant_score_a_half():
    found = auroc(np.ones((4, 1)), [[True, True], [True, False], [True, False], [True, True]])
    assert np.isnan(found[0, 0])
    assert found[1, 0] == 0.5


def test_attributes_are_classes_one_against_the_rest():
    assert attributes_of(torch.tensor([7, 2, 7])).tolist() == [[False, True], [True, False], [False, True]]
    given = torch.tensor([[1, 0], [0, 0]])
    assert attributes_of(given).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, "labels is float32"),
        (torch.tensor([[0, 2]]), ValueError, "labels runs from 0 to 2"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), ValueError, "labels has shape"),
    ],
)
def test_labels_that_are_none(labels, error, says):
    with pytest.raises(error, match=says):
        attributes_of(labels)


# The probe


def by_hand(codes, labels, components=None):
    """The protocol, written with scikit-learn's parts one by one."""
    scores = []
    for train, test in KFold(5, shuffle=True, random_state=0).split(codes):
        known, unknown = codes[train], codes[test]
        if components:
            reduction = PCA(components, random_state=0).fit(known)
            known, unknown = reduction.transform(known), reduction.transform(unknown)
        scaler = StandardScaler().fit(known)
        known, unknown = scaler.transform(known), scaler.transform(unknown)
        if labels.ndim == 1:
            model = LogisticRegression(max_iter=1000).fit(known, labels[train])
            areas = roc_auc_score(labels[test], model.predict_proba(unknown), multi_class="ovr", average="macro")
            scores.append((model.score(unknown, labels[test]), areas))
        else:
            each = [LogisticRegression(max_iter=1000).fit(known, column) for column in labels[train].T]
            pairs = list(zip(each, labels[test].T, strict=True))
            right = np.mean([model.score(unknown, y) for model, y in pairs])
            scores.append((right, np.mean([roc_auc_score(y, m.decision_function(unknown)) for m, y in pairs])))
    return np.array(scores).T


@pytest.mark.parametrize("components", [None, 2])
def test_probe_of_classes_is_the_protocol(components):
    codes, labels = coded()
    found = probe(codes, labels, components=components)
    expected = by_hand(codes.double().numpy(), labels.numpy(), components)
    np.testing.assert_allclose(torch.stack(found), expected, rtol=0, atol=1e-9)
    assert 0.4 < found.accuracy.mean() < 0.99  # neither chance nor free of error


def test_probe_of_attributes_is_the_protocol():
    codes, labels = coded()
    attributes = torch.stack([labels == 0, labels != 1, codes[:, 0] > 0], 1)
    expected = by_hand(codes.double().numpy(), attributes.numpy().astype(int))
    np.testing.assert_allclose(torch.stack(probe(codes, attributes)), expected, rtol=0, atol=1e-9)


def test_probe_depends_on_its_seed_alone():
    codes, labels = coded()
    assert torch.equal(torch.stack(probe(codes, labels)), torch.stack(probe(codes, labels)))
    assert not torch.equal(torch.stack(probe(codes, labels)), torch.stack(probe(codes, labels, seed=1)))


def test_probe_takes_images_and_scales_do_not_matter():
    codes, labels = coded()
    images = codes.view(-1, 1, 2, 2) * 1000
    np.testing.assert_allclose(torch.stack(probe(images, labels)), torch.stack(probe(codes, labels)), atol=1e-6)


def test_probe_of_a_class_that_a_fold_lacks():
    """One image of a class is in one test part only: its AUROC is left out elsewhere, and it counts as wrong there."""
    codes, labels = coded(60, classes=2)
    labels[0] = 9
    found = probe(codes, labels)
    assert bool(torch.isfinite(torch.stack(found)).all())
    attributes = torch.stack([labels == 0, labels == 9, labels >= 0], 1)  # the last is constant
    assert bool(torch.isfinite(torch.stack(probe(codes, attributes))).all())


def test_pca_is_fitted_on_the_training_part():
    """An outlier of the test part alone must not become a component."""
    codes, labels = coded(100, classes=2, dimensions=3)
    wide = torch.cat([codes, torch.zeros(100, 1)], 1)
    parts = list(KFold(5, shuffle=True, random_state=0).split(wide))
    for number, (_, test) in enumerate(parts):
        spoiled = wide.clone()
        spoiled[test, 3] = 1e6 * torch.arange(len(test))
        assert (
            probe(spoiled, labels, components=3).accuracy[number] == probe(wide, labels, components=3).accuracy[number]
        )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"codes": torch.zeros(10, 2, dtype=torch.int64)}, TypeError, "codes is torch.int64"),
        ({"codes": torch.zeros(10)}, ValueError, r"codes has shape \(10,\)"),
        ({"codes": torch.full((10, 2), torch.nan)}, ValueError, "not finite"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, ValueError, "labels has 9 rows, codes 10"),
        ({"folds": 1}, ValueError, "folds is 1"),
        ({"folds": 11}, ValueError, "no more than the 10 rows"),
        ({"components": 3}, ValueError, "components is 3"),
    ],
)
def test_probe_of_what_does_not_fit(change, error, says):
    arguments = {"codes": torch.rand(10, 2), "labels": torch.arange(10) % 2, **change}
    with pytest.raises(error, match=says):
        probe(arguments.pop("codes"), arguments.pop("labels"), **arguments)


def test_untrained_is_the_model_before_its_first_update():
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    state = torch.get_rng_state()
    one, same, other = (untrained(TINY, images, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.activations(images), same.activations(images))
    assert not torch.equal(one.activations(images), other.activations(images))
    # Prototypes are patches of the images.
    patches = one.encoder(images).flatten(2).transpose(1, 2).reshape(-1, 128)
    differences = one.prototypes.prototype_vectors.flatten(1)[:, None] - patches
    assert differences.norm(dim=2).amin(1).max() < 1e-5
    assert not one.training


# TAD


def test_mutual_information_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    attributes = generator.random((150, 4)) < [0.5, 0.1, 0.8, 0.3]
    attributes[:, 3] |= attributes[:, 1]
    expected = [[mutual_info_score(a, b) for a in attributes.T] for b in attributes.T]
    np.testing.assert_allclose(mutual_information(attributes), expected, rtol=0, atol=1e-12)


def test_disentanglement_is_its_definition():
    """Loops over scikit-learn's functions, on data with attributes of every kind: captured, weak, and overlapping."""
    generator = np.random.default_rng(1)
    attributes = generator.random((400, 5)) < [0.5, 0.4, 0.3, 0.5, 0.2]
    attributes[:, 4] = attributes[:, 3] ^ (generator.random(400) < 0.02)  # holds most of attribute 3
    codes = generator.normal(size=(400, 6))
    codes[:, 0] += 3 * attributes[:, 0]
    codes[:, 1] -= 2 * attributes[:, 1]  # negative: only the other sign tells it
    codes[:, 2] += 1.2 * attributes[:, 1]
    codes[:, 3] += 0.4 * attributes[:, 2]  # too weak
    codes[:, 4] += 3 * attributes[:, 3]
    found = disentanglement(torch.from_numpy(codes), torch.from_numpy(attributes))
    for fold, (part, _) in enumerate(KFold(5, shuffle=True, random_state=0).split(codes)):
        a, y = StandardScaler().fit_transform(codes[part]), attributes[part]
        total, captured = 0.0, []
        for k in range(5):
            areas = sorted(max(roc_auc_score(y[:, k], a[:, j]), roc_auc_score(y[:, k], -a[:, j])) for j in range(6))
            own = mutual_info_score(y[:, k], y[:, k])
            reduction = 1 - (own - max(mutual_info_score(y[:, k], y[:, m]) for m in range(5) if m != k)) / own
            captured.append(areas[-1] >= 0.75 and reduction <= 0.2)
            total += (areas[-1] - areas[-2]) * captured[-1]
            assert found.overlap[fold, k] == pytest.approx(reduction, abs=1e-12)
            assert found.auroc[fold, k].max() == pytest.approx(areas[-1], abs=1e-12)
        assert found.captured[fold].tolist() == captured
        assert found.tad[fold] == pytest.approx(total, abs=1e-12)
    assert found.captured.tolist() == [[True, True, False, False, False]] * 5
    assert bool((found.auroc[:, 1].argmax(1) == 1).all())


def test_disentanglement_looks_at_order_alone():
    codes, labels = coded()
    found = disentanglement(codes, labels)
    again = disentanglement(codes.double().mul(3).exp(), labels)
    assert torch.equal(found.tad, again.tad)


def test_disentanglement_of_a_constant_attribute_and_of_one_alone():
    codes = torch.rand(50, 2)
    attributes = torch.stack([codes[:, 0] > 0.5, torch.ones(50, dtype=torch.bool)], 1)
    found = disentanglement(codes, attributes)
    assert found.captured.tolist() == [[True, False]] * 5
    assert bool(found.overlap[:, 1].isnan().all())
    alone = disentanglement(codes, attributes[:, :1])
    assert torch.equal(alone.tad, found.tad)
    assert bool((alone.overlap == 0).all())
    with pytest.raises(ValueError, match="second best"):
        disentanglement(codes[:, :1], attributes)


# Distances


def test_frechet_distance_is_its_formula():
    """By scipy's matrix square root; also far from the origin, where raw moments lose digits."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(6, 6))
    first = generator.normal(size=(300, 6)) @ mix + 1e4
    second = generator.normal(size=(200, 6)) * 1.5 + 1e4 + generator.normal(size=6)
    s, t = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    offset = first.mean(0) - second.mean(0)
    expected = offset @ offset + np.trace(s + t - 2 * sqrtm(s @ t).real)
    found = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(second), torch.from_numpy(first)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(first), torch.from_numpy(first)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"first has shape \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), r"second has shape \(5, 4\)"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.inf), "second has values that are not finite"),
    ],
)
def test_frechet_distance_of_what_does_not_fit(first, second, says):
    with pytest.raises(ValueError, match=says):
        frechet_distance(first, second)


def test_draws():
    first, again, other = draws(100, 30), draws(100, 30), draws(100, 30, seed=1)
    assert len(first) == 5
    assert all(len(set(rows.tolist())) == 30 for rows in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in [*itertools.combinations(first, 2), *zip(first, other, strict=True)])
    # A pool that is no larger: sets with repetition, as without they would all be the same.
    assert all(len(rows) == 30 and len(set(rows.tolist())) < 30 for rows in draws(30, 30))
    with pytest.raises(ValueError, match="pool, size and number"):
        draws(0, 3)


def test_reference_distances_are_those_to_the_draws():
    pool, features = torch.randn(80, 3), torch.randn(20, 3)
    expected = [frechet_distance(features, pool[rows]) for rows in draws(80, 20, seed=2)]
    assert reference_distances(features, pool, seed=2).tolist() == expected


def test_images_are_rounded_as_a_png_rounds_them(tmp_path):
    images = torch.rand(1, 1, 16, 16) * 2.2 - 1.1
    Image.fromarray(((images[0, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()).save(tmp_path / "x.png")
    read = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).float() / 127.5 - 1
    assert torch.equal(quantised(images)[0, 0], read)
    assert torch.equal(quantised(quantised(images)), quantised(images))


def test_a_distance_is_called_fid_only_with_inception(tmp_path):
    features = classifier_features(Classifier((1, 16, 16), 3).eval())
    assert features.distance == "Fréchet distance (features of untrained)"
    with pytest.raises(FileNotFoundError, match="pt_inception"):
        inception_features(tmp_path / "none.pth")


def test_inception_without_torch_fidelity(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="torch_fidelity"):
        inception_features(tmp_path / "weights.pth")


# The classifier


def stripes(n=200, classes=2, seed=0):
    """Images of a bright row or a bright column, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.rand(n, 1, 16, 16, generator=generator) * 0.6 - 1
    images[labels == 0, :, 5:8] = 1
    images[labels == 1, :, :, 5:8] = 1
    return images, labels


def test_classifier_learns_classes_and_is_saved(tmp_path):
    images, labels = stripes()
    model = train_classifier(images, labels, name="stripes", epochs=8, cache=tmp_path)
    held_out, wanted = stripes(seed=1)
    assert (model.answers(held_out) == wanted).all()
    assert model.name.startswith("cnn-stripes-")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save(tmp_path / "x.safetensors")
    again = Classifier.load(tmp_path / "x.safetensors")
    assert again.name == model.name
    assert torch.equal(again.features(held_out), model.features(held_out))
    torch.testing.assert_close(model.features(held_out, batch_size=7), model.features(held_out), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.head(model.features(held_out)).softmax(1), model.probabilities(held_out))
    with pytest.raises(ValueError, match=r"images has shape .*cnn-stripes-.* takes \(1, 16, 16\)"):
        model.answers(torch.zeros(1, 1, 8, 8))


def test_classifier_learns_attributes():
    generator = torch.Generator().manual_seed(0)
    attributes = torch.rand(300, 2, generator=generator) < 0.5
    images = torch.rand(300, 1, 16, 16, generator=generator) * 0.6 - 1
    images[attributes[:, 0], :, 2:5] = 1
    images[attributes[:, 1], :, :, 9:12] = 1
    model = train_classifier(images, attributes, epochs=10, cache=False)
    assert (model.answers(images) == attributes).float().mean() > 0.99
    assert model.answers(images).dtype == torch.bool
    assert agreement(model, images, images, attributes).ceiling > 0.99


def test_classifier_is_cached_by_all_that_makes_it(tmp_path):
    images, labels = stripes(40)
    steps = []
    settings = {"epochs": 1, "cache": tmp_path, "progress": lambda done, total: steps.append((done, total))}
    state = torch.get_rng_state()
    first = train_classifier(images, labels, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert steps == [(1, 1)]
    assert train_classifier(images, labels, **settings).name == first.name
    assert len(steps) == 1  # read, not trained
    assert train_classifier(images, 1 - labels, **settings).name != first.name
    assert train_classifier(-images, labels, **settings).name != first.name
    assert train_classifier(images, labels, seed=1, **settings).name != first.name
    assert len(steps) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert train_classifier(images, labels, **settings).name == first.name
    assert len(steps) == 5


def test_classifier_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        Classifier.load(tmp_path / "none")
    model = Patronus(TINY)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no classifier"):
        Classifier.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 64, 48), (1, 224, 224)])
def test_classifier_takes_images_of_any_size(size):
    model = Classifier(size, 4).eval()
    assert model.features(torch.zeros(2, *size)).shape == (2, 128)
    assert model.body(torch.zeros(1, *size)).shape[1] % 16 == 0


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"images": torch.zeros(4, 16, 16)}, ValueError, "images has shape"),
        ({"images": torch.zeros(4, 1, 7, 16)}, ValueError, "shape is"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels has shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels is torch.float32"),
        ({"labels": -torch.ones(4, dtype=torch.int64)}, ValueError, "numbered from 0"),
        ({"labels": torch.full((4, 2), 2)}, ValueError, "attributes are 0 or 1"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"lr": 0.0}, ValueError, "lr is 0"),
    ],
)
def test_classifier_of_what_does_not_fit(change, error, says):
    arguments = {"images": torch.zeros(4, 1, 16, 16), "labels": torch.arange(4) % 2, "cache": False, **change}
    with pytest.raises(error, match=says):
        train_classifier(arguments.pop("images"), arguments.pop("labels"), **arguments)


def test_agreement_counts():
    class Told(Classifier):
        def answers(self, images, *, batch_size=1000):
            return images[:, 0, 0, 0].long()

    def showing(*classes):
        return torch.tensor(classes).view(-1, 1, 1, 1).float()

    found = agreement(Told((1, 8, 8), 9), showing(1, 2, 3, 4), showing(1, 2, 4, 3), torch.tensor([1, 5, 3, 6]))
    assert found == (0.5, 0.5, 0.25)
    with pytest.raises(ValueError, match="4, 4 and 3 rows"):
        agreement(Told((1, 8, 8), 9), showing(1, 2, 3, 4), showing(1, 2, 4, 3), torch.tensor([1, 5, 3]))


# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    Patronus(TINY).save_pretrained(folder, data="digits")
    return folder


def evaluated(folder, *more):
    arguments = ["patronus", "evaluate", str(folder), "--samples", "12", "--probed", "300", "--steps", "2"]
    return CliRunner().invoke(cli.build(), [*arguments, "--no-progress", *map(str, more)])


def test_the_command_on_a_tiny_model(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    from protofast.patronus.latent import LatentModel

    model = Patronus.from_pretrained(run_folder)
    LatentModel(TINY.num_prototypes).save_pretrained(run_folder, prototypes=digest(model.prototypes.prototype_vectors))
    done = evaluated(run_folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    files = {"conditional.png", "unconditional.png", "prototypes.png", "classifier.safetensors", "result.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["format"] == "protofast-patronus-evaluate-1"
    assert {picture["file"] for picture in result["pictures"]} == {file for file in files if file.endswith("png")}
    numbers = result["numbers"]

    # The same by hand.
    train, test = (pf.data.load("digits", split=split) for split in ("train", "test"))
    part = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:300].sort().values)
    images, labels = pf.patronus.images_of(TINY, part), torch.from_numpy(part.labels)
    scores = probe(model.activations(images), labels)
    assert numbers["probe"]["activations"]["accuracy"]["each"] == scores.accuracy.tolist()
    assert numbers["probe"]["pca"]["auroc"]["mean"] == pytest.approx(probe(images, labels, components=5).auroc.mean())
    assert numbers["disentanglement"]["tad"]["each"] == disentanglement(model.activations(images), labels).tad.tolist()
    judge = Classifier.load(tmp_path / "out" / "classifier.safetensors")
    assert numbers["distance"]["name"] == f"Fréchet distance (features of {judge.name})"
    assert judge.name.startswith("cnn-digits-")
    assert "FID" not in result["tables"][-1]["columns"]
    assert {"conditional", "unconditional", "floor"} < numbers["distance"].keys()
    assert all(len(numbers["distance"][name]["each"]) == 5 for name in ("conditional", "unconditional", "floor"))
    assert numbers["distance"]["size"] == 12
    chosen = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:12])
    real = pf.patronus.images_of(TINY, chosen)
    assert numbers["agreement"]["ceiling"] == (judge.answers(real).numpy() == chosen.labels).mean()
    assert numbers["distance"]["conditional"]["mean"] > numbers["distance"]["floor"]["mean"]

    # The classifier of one evaluation judges the next, and nothing is trained; without a latent model there is none.
    LatentModel(TINY.num_prototypes).save_pretrained(run_folder, prototypes="of another model")
    judged = tmp_path / "out" / "classifier.safetensors"
    again = evaluated(run_folder, "--out", tmp_path / "again", "--classifier", judged)
    assert again.exit_code == 0, again.output
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert any("latent" in finding for finding in result["findings"])
    second = result["numbers"]
    assert "unconditional" not in second["distance"]
    assert second["distance"]["conditional"] == numbers["distance"]["conditional"]
    assert second["agreement"] == numbers["agreement"]


def test_the_command_without_labels(run_folder, tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).random((30, 8, 8), np.float32))
    done = evaluated(run_folder, "--data", tmp_path / "images.npy", "--out", tmp_path / "out")
    assert "has no labels" in done.output
    assert not (tmp_path / "out").exists()
