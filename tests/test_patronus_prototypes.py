# ruff: noqa: E402
"""What prototypes stand for: nearest patches, amplification, consistency, names, and the command."""

import importlib
import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("typer", "diffusers", "matplotlib", "PIL", "scipy", "sklearn", "safetensors"):
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast.patronus import Patronus, PatronusConfig, images_of, prototypes
from protofast.prototype import PrototypeActivation

CONFIG = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)
GRID = 2


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = Patronus(CONFIG).eval().requires_grad_(False)
    made.denoiser.condition[2].weight.mul_(300)  # so that what the denoiser is told can be seen in what it draws
    return made


@pytest.fixture(scope="module")
def images():
    return images_of(CONFIG, pf.data.load("digits", split="test").subset(range(40)))


def box(row, column):
    """Patch (i, j) of the paper's small encoder sees [2i − 1, 2i + 14), inside the image."""
    return [max(0, 2 * row - 1), max(0, 2 * column - 1), min(16, 2 * row + 14), min(16, 2 * column + 14)]


def distances(model, image):
    """(M, patches) float64, by differences."""
    features = model.encoder(image[None])[0].flatten(1).double().numpy().T
    vectors = model.prototypes.prototype_vectors.flatten(1).double().numpy()
    return ((vectors[:, None] - features[None]) ** 2).sum(-1)


# Nearest patches


def test_nearest_patches_are_those_of_a_full_search(model, images):
    before = model.prototypes.prototype_vectors.clone()
    found = prototypes.nearest_patches(model, images, 4, batch_size=7)
    assert torch.equal(model.prototypes.prototype_vectors, before)
    maps = np.stack([distances(model, image) for image in images])  # (n, M, N)
    assert maps.shape[2] == GRID**2
    for number in range(5):
        least = maps[:, number].min(1)
        best = np.argsort(least, kind="stable")[:4]
        assert found.image[number].tolist() == best.tolist()
        for place, image in enumerate(best):
            patch = int(maps[image, number].argmin())
            assert found.box[number, place].tolist() == box(*divmod(patch, GRID))
            expected = math.log((least[image] + 1) / (least[image] + 1e-4))
            assert float(found.activation[number, place]) == pytest.approx(expected, rel=1e-5)
            feature = model.encoder(images[image][None])[0].flatten(1)[:, patch]
            torch.testing.assert_close(found.feature[number, place], feature)


def test_nearest_patches_do_not_depend_on_the_batches(model, images):
    one, other = (prototypes.nearest_patches(model, images, 3, batch_size=size) for size in (1, 40))
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.box, other.box)
    torch.testing.assert_close(one.activation, other.activation)


def test_nearest_patches_refuse(model, images):
    with pytest.raises(ValueError, match="k is 41; give 1 to 40, the number of images"):
        prototypes.nearest_patches(model, images, 41)
    with pytest.raises(ValueError, match="batch_size is 0"):
        prototypes.nearest_patches(model, images, 1, batch_size=0)
    with pytest.raises(ValueError, match="outside"):
        prototypes.nearest_patches(model, images * 2, 1)


# Amplification


def test_amplified_images_are_those_made_one_by_one(model, images):
    some, strengths = images[:3], torch.tensor([0.9, 1.0, 1.1, 1.2, 1.3])
    made = prototypes.amplify(model, some, strengths, num_steps=3, batch_size=4)
    changes = 0.0
    for row, image in enumerate(some):
        s = model.encode(image[None])
        told = {"cond": {"activations": s}, "prediction_type": "epsilon"}
        noise = pf.diffusion.invert(model, image[None], model.schedule, 3, **told)
        source = pf.diffusion.sample(model, noise, model.schedule, 3, **told).clamp(-1, 1)
        torch.testing.assert_close(made.source[row], source[0], atol=1e-3, rtol=0)
        for number in range(5):
            told["cond"] = {"activations": s.clone()}
            told["cond"]["activations"][0, number] = strengths[number]
            alone = pf.diffusion.sample(model, noise, model.schedule, 3, **told).clamp(-1, 1)
            torch.testing.assert_close(made.images[row, number], alone[0], atol=1e-3, rtol=0)
            changes = max(changes, float((alone - source).abs().max()))
    assert changes > 0.1  # else the comparison says nothing


def test_what_is_measured_in_amplified_images(model, images):
    made = prototypes.amplify(model, images[:4], torch.full((5,), 1.0), num_steps=2)
    for row in range(4):
        for number in range(5):
            image = made.images[row, number]
            found = distances(model, image)[number]
            patch = int(found.argmin())
            expected = math.log((found.min() + 1) / (found.min() + 1e-4))
            assert float(made.activation[row, number]) == pytest.approx(expected, rel=1e-5)
            assert made.box[row, number].tolist() == box(*divmod(patch, GRID))
            feature = model.encoder(image[None])[0].flatten(1)[:, patch]
            torch.testing.assert_close(made.feature[row, number], feature)
            least = distances(model, made.source[row])[number].min()
            expected = math.log((least + 1) / (least + 1e-4))
            assert float(made.before[row, number]) == pytest.approx(expected, rel=1e-5)
    assert made.best.tolist() == [int(made.activation[:, number].argmax()) for number in range(5)]


def test_some_prototypes_only(model, images):
    strengths = torch.linspace(0.5, 1.5, 5)
    all_five = prototypes.amplify(model, images[:2], strengths, num_steps=2)
    two = prototypes.amplify(model, images[:2], strengths, prototypes=[3, 1], num_steps=2, batch_size=1)
    assert two.prototypes.tolist() == [3, 1]
    for name in ("images", "activation", "before", "box", "feature"):
        whole = getattr(all_five, name)[:, [3, 1]]
        torch.testing.assert_close(getattr(two, name), whole, atol=1e-3, rtol=1e-3)


def test_amplify_refuses(model, images):
    strengths = torch.ones(5)
    with pytest.raises(ValueError, match="images is empty"):
        prototypes.amplify(model, images[:0], strengths)
    with pytest.raises(ValueError, match=r"strengths has shape \(1, 4\)"):
        prototypes.amplify(model, images[:1], strengths[:4])
    with pytest.raises(TypeError, match="strengths is list"):
        prototypes.amplify(model, images[:1], [1.0] * 5)
    with pytest.raises(ValueError, match="not finite"):
        prototypes.amplify(model, images[:1], strengths * math.nan)
    with pytest.raises(IndexError, match="prototypes has 5; the model has 0 to 4"):
        prototypes.amplify(model, images[:1], strengths, prototypes=[5])


# Consistency


@pytest.mark.parametrize(("n", "count"), [(2, 2), (3, 4), (5, 1)])
def test_consistency_is_the_mean_over_pairs(n, count):
    features = torch.randn(n, count, 6, generator=torch.Generator().manual_seed(n))
    found = prototypes.consistency(features)
    vectors = features.numpy().astype(float)
    cosine = {}
    for a, b in permutations(range(n), 2):
        for i in range(count):
            for j in range(count):
                u, v = vectors[a, i], vectors[b, j]
                cosine.setdefault((i, i == j), []).append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    for i in range(count):
        assert float(found.within[i]) == pytest.approx(np.mean(cosine[i, True]), abs=1e-6)
        if count > 1:
            assert float(found.across[i]) == pytest.approx(np.mean(cosine[i, False]), abs=1e-6)
    assert bool(found.across.isnan().all()) == (count == 1)


def test_zeros_are_similar_to_nothing():
    features = torch.ones(3, 2, 4)
    features[0, 0] = 0
    found = prototypes.consistency(features)
    assert found.within.tolist() == pytest.approx([1 / 3, 1])
    assert found.across.tolist() == pytest.approx([4 / 6, 4 / 6])


def test_consistency_refuses():
    with pytest.raises(ValueError, match="at least 2 images"):
        prototypes.consistency(torch.ones(1, 3, 4))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        prototypes.consistency(torch.ones(2, 3, 4, dtype=torch.int64))


# Heat maps


def test_heat_maps_are_brightest_where_the_patch_is(model, images):
    numbers = [0, 4, 4]
    found = prototypes.heat_maps(model, images[:3], numbers, enlarge=2)
    assert found.shape == (3, 32, 32, 3)
    assert found.dtype == np.uint8
    dark = -torch.ones(3, 1, 16, 16)  # no image under the colours, but the features of the images
    for row, number in enumerate(numbers):
        features = model.encoder(images[row : row + 1])
        alone = pf.nn.heat_map(torch.zeros(32, 32), model.prototypes, features[0], number).sum(-1)
        top, left = divmod(int(distances(model, images[row])[number].argmin()), GRID)
        corners = [alone[i, j] for i in (0, -1) for j in (0, -1)]  # of a 2 × 2 grid
        assert int(np.argmax(corners)) == 2 * top + left
        whole = pf.nn.heat_map(
            (images[row].repeat_interleave(2, 1).repeat_interleave(2, 2) + 1) / 2, model.prototypes, features[0], number
        )
        assert np.array_equal(found[row], whole)
    assert not np.array_equal(found, prototypes.heat_maps(model, dark, numbers, enlarge=2))


def test_heat_maps_with_limits(model, images):
    one = prototypes.heat_maps(model, images[:1], [2], limits=[(0.0, 10.0)])
    assert one.mean() < prototypes.heat_maps(model, images[:1], [2]).mean()
    with pytest.raises(ValueError, match="limits has 1 entries; give one for each of the 2 images"):
        prototypes.heat_maps(model, images[:2], [2, 3], limits=[(0.0, 1.0)])
    with pytest.raises(ValueError, match="prototypes has 1 entries"):
        prototypes.heat_maps(model, images[:2], [2])
    with pytest.raises(IndexError, match="prototype is 5"):
        prototypes.heat_maps(model, images[:1], [5])


# Names


FIELD = pf.nn.receptive_field([(3, 1, 0)], 11)  # a grid of 9 × 9, middles at 1.5 … 9.5 of 11 pixels


def named(activations, labels=None, names=None, index=None):
    activations = torch.as_tensor(activations)
    index = torch.full(activations.shape, 40) if index is None else index
    return prototypes.name_prototypes(PrototypeActivation(activations, activations, index), FIELD, labels, names)


def test_names_by_class():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 9, 20000)
    names = ["coat", "bag", "boot", "dress", "shirt", "hat", "cap", "belt", "tie"]
    groups = [[1], [0, 4], [5, 2, 3], [0, 1, 2, 3, 4, 6, 8], [0, 1, 2, 3, 4, 6, 7, 8], []]
    noise = generator.normal(size=(20000, len(groups)))
    activations = noise + np.stack([3.5 * np.isin(labels, group) for group in groups], 1)
    found = named(activations, labels, names)
    assert [name.active for name in found[:5]] == [True, True, True, False, False]
    assert [set(name.classes) for name in found] == [{1}, {0, 4}, {5, 2, 3}, {5, 7}, {5}, set()]
    assert found[0].what == "bag"
    assert found[1].what == "coat or shirt"
    assert found[2].what == "boot, dress or hat"
    assert found[3].what == "not hat or belt"
    assert found[4].what == "not hat"
    assert found[5].what == ""
    assert found[5].text == "prototype 5, centre"
    assert found[0].text == f"bag, centre (100 % of its top images, AUROC {found[0].auroc:.2f})"
    for name, column in zip(found[:5], activations.T[:5], strict=True):
        inside = np.isin(labels, name.classes) == name.active
        assert name.auroc == pytest.approx(roc_auc_score(inside, column), abs=1e-12)
        assert name.auroc > 0.95
        assert name.share == inside[np.argsort(column)[-200:]].mean()
        assert name.share >= 0.75


def test_a_peak_gives_the_name_and_all_images_the_auroc():
    labels = np.repeat([0, 1, 2], 500)
    activations = np.where(labels == 1, 1.0, 0.0) + np.random.default_rng(0).normal(0, 0.1, 1500)
    activations[:30] = 9  # a few of class 0 stand above all, though the class is low
    (name,) = named(activations[:, None], labels, ["low", "high", "none"])
    assert name.what == "low"
    assert name.share == 1
    assert name.auroc == pytest.approx(roc_auc_score(labels == 0, activations), abs=1e-12)
    assert name.auroc < 0.5


def test_three_quarters_of_the_top_images_make_a_name():
    labels = np.concatenate([np.repeat([0, 1], [15, 5]), np.arange(200) % 6])
    activations = np.r_[np.full(20, 2.0), np.random.default_rng(0).random(200)][:, None]
    assert named(activations, labels)[0].what == "0"
    labels[14] = 1
    assert named(activations, labels)[0].what == "0 or 1"


def test_frequent_classes_do_not_stand_out():
    # Of the top images half are of class 1, which is rare; and the other half, of class 0, are fewer than anywhere.
    labels = np.concatenate([np.repeat([0, 1], [10, 10]), np.repeat(range(6), [160, 10, 10, 10, 10, 10])])
    activations = np.r_[np.full(20, 2.0), np.random.default_rng(0).random(210)][:, None]
    labels[:20:2] = 2
    labels[1:20:2] = 1
    assert named(activations, labels)[0].what == "1 or 2"


def test_ties_count_half():
    activations = [[1.0], [1.0], [2.0], [2.0], [1.0], [3.0]] * 100
    activations += [[5.0]] * 200
    labels = [0, 0, 0, 1, 1, 1] * 100 + [1] * 200
    (name,) = named(activations, labels)
    assert name.what == "1"
    assert name.auroc == pytest.approx(roc_auc_score(labels, np.ravel(activations)), abs=1e-12)


def test_fewer_classes_make_the_better_name():
    # Inactive in class 5, and in the rare class 4, which matters little.
    number = np.arange(24000)
    labels = np.where(number % 6 == 4, 6, number % 6)
    labels[4:600:6] = 4
    noise = np.random.default_rng(0).random(24000)
    low = np.where(labels == 5, -5, 0) + np.where(labels == 4, -4.7, 0)
    (name,) = named((noise + low)[:, None], labels)
    assert name.what == "not 5"
    assert 0.99 < name.auroc < 1
    labels[4:12000:6] = 4
    low = np.where(labels == 5, -5, 0) + np.where(labels == 4, -4.7, 0)
    assert named((noise + low)[:, None], labels)[0].what == "not 4 or 5"


@pytest.mark.parametrize("images", [600, 10000])
@pytest.mark.parametrize("shares", [[1] * 3, [1] * 4, [1] * 5, [1] * 10, [8, 1, 1]])
def test_chance_names_nothing_and_classes_do(shares, images):
    generator = np.random.default_rng(4)
    labels = generator.choice(len(shares), images, p=np.array(shares) / sum(shares))
    noise = generator.random((images, 30))
    assert [name.what for name in named(noise, labels)] == [""] * 30
    tied = np.arange(30) % len(shares)
    if images == 600 and shares == [8, 1, 1]:  # 20 of 20 of the large class say little
        tied[tied == 0] = 1
    found = named(noise + (labels[:, None] == tied), labels)
    assert [name.classes for name in found] == [(number,) for number in tied]
    assert all(name.active for name in found)


def test_chance_names_no_attribute():
    generator = np.random.default_rng(5)
    attributes = generator.random((2000, 40)) < 0.5
    assert [name.what for name in named(generator.random((2000, 30)), attributes)] == [""] * 30


def test_images_of_another_dtype(model, images):
    twin = Patronus(CONFIG).double().eval()
    twin.load_state_dict(model.state_dict())
    near, other = prototypes.nearest_patches(twin, images, 2), prototypes.nearest_patches(model, images, 2)
    assert near.activation.dtype == torch.float64
    torch.testing.assert_close(near.activation.float(), other.activation, atol=1e-4, rtol=1e-4)
    assert prototypes.heat_maps(twin, images[:2], [0, 1]).shape == (2, 16, 16, 3)
    assert prototypes.amplify(twin, images[:2], torch.ones(5), num_steps=2).feature.dtype == torch.float64


def test_names_by_attribute():
    generator = np.random.default_rng(1)
    attributes = generator.random((300, 3)) < [0.3, 0.5, 1.1]  # the last is always there
    smile = generator.normal(size=300) + 2 * attributes[:, 0]
    activations = np.stack([smile, -1.0 * attributes[:, 1] + 0.1 * generator.random(300), generator.random(300)], 1)
    found = named(activations, attributes, ["smile", "hat", "face"])
    assert [(name.what, name.active) for name in found[:2]] == [("smile", True), ("no hat", False)]
    assert found[0].auroc == pytest.approx(roc_auc_score(attributes[:, 0], activations[:, 0]), abs=1e-12)
    assert found[1].auroc == found[1].share == 1.0
    assert found[2].what == ""


def test_without_labels_it_has_a_place():
    (name,) = named(torch.rand(30, 1))
    assert name.text == "prototype 0, centre"
    assert math.isnan(name.auroc)


def test_a_class_that_is_missing_or_alone_is_passed_over():
    activations = torch.rand(20, 1)
    assert named(activations, [1] * 20, ["a", "b", "c"])[0].what == ""
    assert named(activations, np.ones((20, 1), int), ["a"])[0].what == ""
    (name,) = named(torch.arange(400.0)[:, None], [0] * 200 + [2] * 200, ["a", "b", "c"])
    assert name.what == "c"


PLACES = {
    0: "top left",
    4: "top",
    8: "top right",
    36: "left",
    40: "centre",
    44: "right",
    72: "bottom left",
    76: "bottom",
    80: "bottom right",
}


def test_places():
    index = torch.tensor(list(PLACES)).expand(18, -1)
    assert [name.where for name in named(torch.rand(18, 9), index=index)] == list(PLACES.values())


def test_places_that_vary():
    index = torch.full((180, 5), 8)
    activations = torch.rand(180, 5)
    activations[:18] += 1  # a tenth
    index[:18, 0] = torch.tensor([36, 44, 40]).repeat(6)  # left, right and between: at the ends are two thirds only
    index[:18, 1] = torch.tensor([27, 35] * 9)  # left and right alone
    index[:18, 2] = torch.tensor([0, 40, 80]).repeat(6)
    index[:18, 3] = torch.tensor([4, 40, 76]).repeat(6)
    index[:18, 4] = torch.tensor([4] * 10 + [40] * 4 + [76] * 4)
    found = named(activations, index=index)
    assert [name.where for name in found] == ["middle rows", "left or right", "anywhere", "middle columns", "top"]


def test_the_most_active_images_say_where():
    index = torch.full((400, 1), 40)
    activations = torch.zeros(400, 1)
    activations[100:120] = 1
    index[100:120] = 0
    assert named(activations, index=index)[0].where == "top left"


def test_names_refuse():
    activations = torch.rand(6, 2)
    with pytest.raises(ValueError, match=r"labels has shape \(5,\); give one row for each of the 6 images"):
        named(activations, [0] * 5)
    with pytest.raises(ValueError, match="labels run from 0 to 3; there are 2 names"):
        named(activations, [0, 1, 2, 3, 0, 0], ["a", "b"])
    with pytest.raises(ValueError, match="3 attributes; there are 2 names"):
        named(activations, np.ones((6, 3), int), ["a", "b"])
    with pytest.raises(ValueError, match="must be 0 or 1"):
        named(activations, np.full((6, 2), 2), ["a", "b"])
    with pytest.raises(TypeError, match="labels is float64"):
        named(activations, [0.0] * 6)
    with pytest.raises(ValueError, match="field has 81 patches"):
        named(activations, index=torch.full((6, 2), 81))
    with pytest.raises(ValueError, match="not finite"):
        named(activations * math.nan)


# The command


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(3)
    Patronus(CONFIG).save_pretrained(tmp_path / "run", data="digits")
    return tmp_path / "run"


def call(*arguments):
    return CliRunner().invoke(cli.build(), ["patronus", "prototypes", *map(str, arguments)])


def test_command(run):
    options = ("--images", 3, "--steps", 2, "--nearest", 2, "--no-progress")
    done = call(run, *options)
    assert done.exit_code == 0, done.output
    folder = run / "prototypes"
    content = json.loads((folder / "result.json").read_text())
    assert {picture["file"] for picture in content["pictures"]} == {"prototypes.png", "consistency.png"}
    for picture in content["pictures"]:
        width, height = Image.open(folder / picture["file"]).size
        assert width > 400
        assert height > 400
    model = Patronus.from_pretrained(run)
    data = pf.data.load("digits", split="test")
    shown = images_of(CONFIG, data)
    near = prototypes.nearest_patches(model, shown, 2)
    numbers = content["numbers"]
    assert numbers["nearest"]["image"] == near.image.tolist()
    assert numbers["nearest"]["box"] == near.box.tolist()
    activations = model.activations(shown).numpy()
    np.testing.assert_allclose(numbers["strengths"], np.quantile(activations, 0.99, axis=0), rtol=1e-5)
    assert len(set(numbers["amplified"]["image"])) == 3
    table = content["tables"][0]
    assert len(table["rows"]) == 5
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    for name in numbers["names"]:
        number = numbers["names"].index(name)
        if not name["what"]:
            continue
        inside = np.isin(data.labels, name["classes"]) == name["active"]
        assert name["auroc"] == pytest.approx(roc_auc_score(inside, activations[:, number]), abs=1e-9)
    assert all(finding in done.output for finding in content["findings"])
    again = call(run, *options, "--out", run / "again", "--batch-size", 5)
    assert again.exit_code == 0, again.output
    other = json.loads((run / "again" / "result.json").read_text())
    assert other["numbers"]["names"] == numbers["names"]
    assert other["numbers"]["nearest"]["box"] == numbers["nearest"]["box"]
    assert other["numbers"]["amplified"]["image"] == numbers["amplified"]["image"]


def test_command_without_labels_and_in_colour(tmp_path):
    config = PatronusConfig((3, 16, 16), num_prototypes=3, width=8, multipliers=(1, 2), layers=1, groups=4)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).random((200, 3, 20, 16), np.float32))
    Patronus(config).save_pretrained(tmp_path / "run", data=str(tmp_path / "images.npy"))
    done = call(tmp_path / "run", "--images", 2, "--steps", 1, "--nearest", 1, "--globally", "--no-progress")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "run" / "prototypes" / "result.json").read_text())
    assert "no labels" in content["findings"][0]
    assert content["tables"][0]["rows"][0][3] is None
    assert len(set(content["numbers"]["strengths"])) == 1


def test_command_with_attributes(run, monkeypatch):
    digits = pf.data.load("digits", split="all")
    attributes = np.stack([digits.labels == 1, digits.labels % 2 == 1], 1)
    data = pf.data.Dataset(digits.images, attributes=attributes, attribute_names=["one", "odd"], source="rounds")
    module = importlib.import_module("protofast.patronus.commands.prototypes")
    monkeypatch.setattr(module, "open_data", lambda *_: data)
    done = call(run, "--images", 2, "--steps", 1, "--nearest", 1, "--no-progress")
    assert done.exit_code == 0, done.output
    content = json.loads((run / "prototypes" / "result.json").read_text())
    names = {name["what"] for name in content["numbers"]["names"]}
    assert names & {"one", "odd", "no one", "no odd"}
    assert names <= {"one", "odd", "no one", "no odd", ""}
    assert "of 5 prototypes can be named by an attribute" in content["findings"][0]


def test_command_refuses(run):
    done = call(run, "--nearest", 400, "--no-progress")
    assert done.exit_code == 1
    assert "--nearest is 400; digits has 360 images" in done.output
    folder = run / "prototypes"
    folder.mkdir()
    Path(folder / "result.json").write_text("{}")
    done = call(run)
    assert done.exit_code == 1
    assert "of another command" in done.output
