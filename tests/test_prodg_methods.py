"""EPIC, InfoDisent, and what is measured of all three, each against a form that shares no code with it."""

import math

import numpy as np
import pytest
import torch
from helpers.prodg import digits, flow, network
from torch import nn

import protofast.prodg.epic
from protofast.data import Dataset
from protofast.prodg import (
    EPIC,
    Concepts,
    EPICConfig,
    InfoDisent,
    InfoDisentConfig,
    ProDGConfig,
    SplitNetwork,
    across_seeds,
    agreement,
    evaluate,
    explain,
    train_epic,
    train_infodisent,
)
from protofast.prodg.ablation import LOSSES, SUBSETS, ablate, grid
from protofast.prodg.epic import strongest
from protofast.prodg.evaluation import (
    accuracy,
    deletion_insertion,
    faithfulness,
    image_purity,
    logit_error,
    prototype_purity,
    prototype_similarity,
)
from protofast.prodg.images import as_dataset, maps_of, pooled_features
from protofast.prodg.losses import pure
from protofast.prodg.photographs import photographs

SMALL = EPICConfig(stages=3, epochs=2, most=20, parametrization="cayley", lr=5e-3)


def random_rotation(channels=16, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(channels, channels, generator=draws, dtype=torch.float64)).Q.float()


def naive_purity(maps, matrix, channels):
    """The whole rotated map, as the papers' formula has it, in NumPy."""
    rotated = np.einsum("ij,bjp->bip", matrix.double().numpy(), maps.flatten(2).double().numpy())
    found = []
    for z, channel in zip(rotated, channels.tolist(), strict=True):
        place = z[channel].argmax()
        found.append(z[channel, place] / np.sqrt((z[:, place] ** 2).sum()))
    return np.array(found)


@pytest.fixture(scope="module")
def epic():
    return train_epic(network(), digits(), SMALL)


@pytest.fixture(scope="module")
def infodisent():
    return train_infodisent(network(), digits(), InfoDisentConfig(epochs=8, batch=128, parametrization="cayley"))


def test_the_schedule_is_the_releases():
    counts = [EPICConfig().count(stage) for stage in range(10)]
    assert counts == [100, 90, 81, 71, 62, 52, 43, 33, 24, 14]


def test_the_strongest_are_those_of_the_rotated_map():
    images, matrix = digits("test"), random_rotation()
    maps = torch.cat(list(maps_of(network(), images, torch.arange(len(images)))))
    scores = np.einsum("ij,bjp->bi", matrix.double().numpy(), maps.flatten(2).double().numpy())
    expected = np.argsort(-scores, axis=0, kind="stable")[:7]
    found = strongest(pooled_features(network(), images), matrix, 7)
    assert found.shape == (7, 16)
    chosen = np.take_along_axis(scores, found.numpy(), 0)  # near-ties may change places in float32
    assert np.allclose(chosen, np.take_along_axis(scores, expected, 0), rtol=1e-5)
    assert (found.numpy() == expected).mean() > 0.95


@pytest.mark.parametrize("orthogonal", [True, False])
def test_purity_of_any_matrix(orthogonal):
    draws = torch.Generator().manual_seed(1)
    maps = torch.randn(5, 16, 3, 3, generator=draws)
    matrix = random_rotation() if orthogonal else torch.matrix_exp(0.3 * torch.randn(16, 16, generator=draws))
    channels = torch.tensor([0, 3, 3, 15, 7])
    found = pure(maps, matrix, channels, orthogonal=orthogonal)
    assert np.allclose(found.numpy(), naive_purity(maps, matrix, channels), atol=1e-5)
    if not orthogonal:  # the short form would be wrong
        assert not np.allclose(pure(maps, matrix, channels).numpy(), naive_purity(maps, matrix, channels), atol=1e-2)


def test_epic_makes_its_images_purer_and_no_logit_else(epic):
    one = torch.eye(16)
    images = digits()
    before, after = (image_purity(network(), matrix, images).mean() for matrix in (one, epic.concepts().matrix))
    assert float(after) > float(before) + 0.02
    assert logit_error(epic.concepts(), digits("test")) < 1e-5
    assert [row["images"] for row in epic.history] == [SMALL.count(stage) for stage in range(3)]
    assert epic.history[-1]["purity"] > epic.history[0]["purity"]


def test_epics_prototypes_are_the_strongest_images(epic):
    pooled = pooled_features(network(), digits()) @ epic.concepts().matrix.T
    for channel in (0, 9):
        expected = digits().take(pooled[:, channel].topk(3).indices)
        assert torch.equal(epic.prototypes(channel, 3), expected)
    with pytest.raises(ValueError, match="count is 26; give 1 to 25"):
        epic.prototypes(0, 26)
    with pytest.raises(IndexError, match="0 to 15"):
        epic.prototypes(-1, 1)


def test_epic_without_kept_maps_is_the_same(epic, monkeypatch):
    monkeypatch.setattr(protofast.prodg.epic, "_KEPT_BYTES", 0)
    again = train_epic(network(), digits(), SMALL)
    difference = float((again.concepts().matrix - epic.concepts().matrix).abs().max())
    assert difference < 1e-4  # batches of another size round otherwise


def test_epic_may_be_invertible():
    made = train_epic(
        network(), digits(), EPICConfig(stages=2, epochs=1, most=10, lr=5e-3, parametrization="invertible")
    )
    matrix = made.concepts().matrix
    assert float((matrix @ matrix.T - torch.eye(16)).abs().max()) > 1e-3
    assert logit_error(made.concepts(), digits("test")) < 1e-5
    purity = image_purity(network(), matrix, digits("test"))
    assert 0 <= float(purity.min()) <= float(purity.max()) <= 1 + 1e-6


def test_epic_in_files(epic, tmp_path):
    epic.save(tmp_path, seed=0)
    again = EPIC.load(tmp_path, network(), digits())
    assert torch.equal(again.concepts().matrix, epic.concepts().matrix)
    assert torch.equal(again.prototypes(2, 4), epic.prototypes(2, 4))
    assert again.history == epic.history
    with pytest.raises(ValueError, match="other images"):
        EPIC.load(tmp_path, network(), digits("test"))
    with pytest.raises(ValueError, match="of 16 channels, and the network has 32"):
        EPIC.load(tmp_path, network(32), digits())
    (tmp_path / "infodisent.safetensors").write_bytes((tmp_path / "epic.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no head of InfoDisent"):
        InfoDisent.load(tmp_path, network(), digits())


def test_infodisent_learns_a_head_that_only_adds(infodisent):
    concepts = infodisent.concepts()
    assert float(concepts.weight.min()) >= 0
    assert accuracy(concepts, digits("test")) > 0.7
    maps = next(maps_of(network(), digits("test"), torch.arange(6)))
    z = np.einsum("ij,bjp->bip", concepts.matrix.double().numpy(), maps.flatten(2).double().numpy())
    pooled = np.maximum(z, 0).max(2) - np.maximum(-z, 0).max(2)
    assert np.allclose(concepts.activations(maps).numpy(), pooled, atol=1e-4)
    assert np.allclose(concepts.logits(maps).numpy(), pooled @ concepts.weight.double().numpy().T, atol=1e-3)


def test_infodisent_in_files(infodisent, tmp_path):
    infodisent.save(tmp_path)
    again = InfoDisent.load(tmp_path, network(), digits())
    images = digits("test").take(slice(0, 9))
    maps = network().maps(images)
    assert torch.equal(again.concepts().logits(maps), infodisent.concepts().logits(maps))
    assert torch.equal(again.prototypes(1, 2), infodisent.prototypes(1, 2))
    with pytest.raises(ValueError, match="other images"):
        InfoDisent.load(tmp_path, network(), digits("test"))
    with pytest.raises(ValueError, match="network has"):
        InfoDisent.load(tmp_path, network(32), digits())


def test_infodisent_needs_labels():
    with pytest.raises(ValueError, match="no labels"):
        train_infodisent(network(), torch.rand(4, 1, 8, 8))
    with pytest.raises(ValueError, match="labels runs to 10"):
        train_infodisent(network(), Dataset(np.zeros((2, 8, 8), np.uint8), [0, 10]))


@pytest.mark.parametrize("method", ["epic", "infodisent"])
def test_their_explanations_add_up(request, method):
    concepts = request.getfixturevalue(method).concepts()
    image = digits("test").take([3])[0]
    found = explain(concepts, image, top=3, prototypes=2)
    assert float(found.contributions.sum()) + found.rest + found.bias == pytest.approx(found.logit, abs=1e-4)
    assert found.prototypes.shape == (3, 2, 1, 8, 8)


def test_settings_are_checked():
    for wrong, message in (
        ({"stages": 0}, "stages is 0"),
        ({"fewest": 200}, "fewest is 200, more than most, 100"),
        ({"lr": math.nan}, "lr is nan"),
        ({"parametrization": "householder"}, "choose one of"),
    ):
        with pytest.raises(ValueError, match=message):
            EPICConfig(**wrong)
    for wrong, message in (({"epochs": 0}, "epochs is 0"), ({"parametrization": "invertible"}, "'invertible'")):
        with pytest.raises(ValueError, match=message):
            InfoDisentConfig(**wrong)
    with pytest.raises(ValueError, match="kept is 0"):
        train_epic(network(), digits(), SMALL, kept=0)
    with pytest.raises(TypeError, match=r"give a protofast\.data\.Dataset"):
        train_epic(network(), [1, 2])
    with pytest.raises(ValueError, match="has 3 channels"):
        train_epic(network(), torch.rand(4, 3, 8, 8), SMALL)


def stub(images, matrix, count=2):
    """Concepts whose prototypes are slices of given images."""
    made = network()
    return Concepts("stub", made, matrix, made.weight @ matrix.T, made.bias, lambda c, n, s: images[c : c + n])


def test_purity_of_prototypes_and_images_against_the_naive_form():
    images, matrix = digits("test").take(slice(0, 40)), random_rotation()
    concepts = stub(images, matrix)
    for basis in (None, torch.eye(16)):
        found = prototype_purity(concepts, count=3, matrix=basis)
        used = matrix if basis is None else basis
        for channel in (0, 5, 15):
            maps = network().maps(images[channel : channel + 3])
            expected = np.maximum(naive_purity(maps, used, torch.full((3,), channel)), 0)
            assert np.allclose(found[channel].numpy(), expected, atol=1e-5)
    purity = image_purity(network(), matrix, images, count=4)
    ids = strongest(pooled_features(network(), as_dataset(images)), matrix, 4)
    for channel in (1, 8):
        maps = network().maps(images[ids[:, channel]])
        expected = np.maximum(naive_purity(maps, matrix, torch.full((4,), channel)), 0)
        assert np.allclose(purity[:, channel].numpy(), expected, atol=1e-5)


def test_similarity_of_prototypes():
    images = digits("test").take(slice(0, 40))
    pooled = nn.functional.normalize(pooled_features(network(), as_dataset(images)), dim=1)
    expected = np.mean([float(pooled[c] @ pooled[c + 1]) for c in range(16)])
    assert prototype_similarity(stub(images, torch.eye(16)), count=2) == pytest.approx(expected, abs=1e-6)
    assert prototype_similarity(stub(images[:1].expand(20, 1, 8, 8), torch.eye(16)), count=2) == pytest.approx(
        1, abs=1e-6
    )


def test_faithfulness_by_hand():
    images, matrix = digits("test").take(slice(0, 12)), random_rotation()
    concepts = stub(images, matrix)
    falls = []
    for image in images:
        h = matrix.double() @ network().maps(image[None]).double().mean((2, 3))[0]
        weight = concepts.weight.double()
        logits = weight @ h + concepts.bias
        predicted = int(logits.argmax())
        gone = (weight[predicted] * h.clamp(min=0)).argsort(descending=True, stable=True)[:4]
        left = h.clone()
        left[gone] = 0
        falls.append(float(logits.softmax(0)[predicted] - (weight @ left + concepts.bias).softmax(0)[predicted]))
    found = faithfulness(concepts, images, draws=3)
    assert found.top == pytest.approx(np.mean(falls), abs=1e-5)
    assert found.top > found.random
    everything = faithfulness(concepts, images, top=16, draws=1)
    assert everything.top == pytest.approx(everything.random, abs=1e-6)


class Corner(nn.Module):
    """Features that are the brightness of the upper left quarter, and a constant."""

    def forward(self, x):
        mask = torch.zeros(x.shape[2:])
        mask[:4, :4] = 1
        return torch.cat([x * mask, torch.full_like(x, 0.02)], 1)


def test_deletion_and_insertion_find_the_one_place_that_matters():
    made = SplitNetwork(Corner(), torch.tensor([[40.0, 0], [0, 300.0]]), torch.zeros(2), input_shape=(1, 8, 8))
    concepts = Concepts("corner", made, torch.eye(2), made.weight, made.bias, lambda c, n, s: torch.rand(n, 1, 8, 8))
    images = torch.zeros(6, 1, 8, 8)
    images[:, :, :4, :4] = 1
    found = deletion_insertion(concepts, images, top=1, steps=16)
    assert found.insertion > found.random_insertion + 0.1
    assert found.deletion < found.random_deletion - 0.05
    assert all(0 <= value <= 1 for value in found)


def test_agreement_matches_rows_whatever_their_order_and_sign():
    matrix = random_rotation(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    found = agreement(matrix, -matrix[order])
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.random < 0.6
    assert agreement(matrix, random_rotation(32, 9)).cosine == pytest.approx(found.random, abs=0.05)
    with pytest.raises(ValueError, match="give"):
        agreement(matrix, matrix[:5])


def test_everything_at_once(epic):
    found = evaluate(epic.concepts(), digits("test"), count=3, few=20)
    assert all(math.isfinite(value) for value in found.values())
    assert found["accuracy"] == accuracy(epic.concepts(), digits("test"))
    assert found["prototype_purity"] > found["prototype_purity_before"]
    unlabelled = evaluate(epic.concepts(), digits("test").take(slice(0, 30)), count=3, few=5)
    assert "accuracy" not in unlabelled
    with pytest.raises(ValueError, match="has 3 channels"):
        evaluate(epic.concepts(), torch.rand(2, 3, 8, 8))


def test_seeds_are_summed_up():
    found = across_seeds([{"a": 1.0, "b": 0.0}, {"a": 3.0}])
    assert found == {"a": {"mean": 2.0, "sd": pytest.approx(math.sqrt(2)), "runs": 2}}
    assert math.isnan(across_seeds([{"a": 1.0}])["a"]["sd"])
    with pytest.raises(ValueError, match="rows is empty"):
        across_seeds([])


def test_all_seven_subsets_are_trained(tmp_path):
    config = ProDGConfig(updates=12, channels=4, rank=2, prompt_lr=1e-2, parametrization="cayley")
    found = ablate(network(), flow(), config, out=tmp_path)
    assert len(SUBSETS) == len(set(SUBSETS)) == 7
    assert next(iter(found)) == " + ".join(LOSSES)
    for subset, result in zip(SUBSETS, found.values(), strict=True):
        weights = {loss: getattr(result.config, loss) for loss in LOSSES}
        assert {loss for loss, weight in weights.items() if weight} == set(subset)
        turned = not torch.equal(result.rotation().detach(), torch.eye(16))
        assert turned == ("purity" in subset)
        moved = bool(result.bank.up.any())
        assert moved == (subset != ("regularization",))  # at its start that loss has no gradient
    assert grid(found, [0, 3], count=2).startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 7


def test_photographs_come_with_packages(tmp_path):
    pytest.importorskip("skimage")
    found = photographs(size=48)
    assert len(found) == 16
    assert found.image_shape == (3, 48, 48)
    assert found.labels is None
    from PIL import Image

    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "x_0967.png")
    more = photographs(tmp_path, size=48)
    assert more.labels.tolist() == [-1] * 16 + [967]
    assert torch.allclose(more.take([16])[0, :, 20, 20], torch.tensor([1.0, 0, 0]))
    with pytest.raises(FileNotFoundError, match="no picture there"):
        photographs(tmp_path / "none")
