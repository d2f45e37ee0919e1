# ruff: noqa: E402
"""Bias diagnosis: plants that are exact, statistics on activations whose truth is known, and the command."""

import json

import numpy as np
import pytest
import torch

NEEDED = ("typer", "rich", "diffusers", "sklearn", "scipy", "matplotlib", "PIL", "safetensors", "pooch")
for module in NEEDED:
    pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[patronus]'")

from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast.patronus import Patronus, PatronusConfig, TrainingConfig, images_of, train
from protofast.patronus.diagnosis import associate, balanced_rows, detect, intervene, plant

TINY = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Planting


@pytest.mark.parametrize(("rate", "inside", "outside"), [(0.9, 18, 18), (0.5, 10, 90), (1.0, 20, 0), (0.0, 0, 180)])
def test_the_mark_is_planted_at_its_rate(rate, inside, outside):
    labels = torch.arange(200) % 10
    images = torch.rand(200, 1, 16, 16, generator=seeded()) * 2 - 1
    before = images.clone()
    found = plant(images, labels, target=4, rate=rate, generator=seeded(1))
    assert int(found.marked[labels == 4].sum()) == inside
    assert int(found.marked[labels != 4].sum()) == outside
    assert torch.equal(images, before)
    assert torch.equal(found.images[~found.marked], images[~found.marked])
    changed = (found.images != images).any(0)[0]
    if inside + outside:
        assert changed.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]  # 16 / 8 = 2 pixels, one off the border
        assert bool((found.images[found.marked][:, 0, 1:3, 1:3] == 1).all())


def test_planting_depends_on_its_generator_alone():
    labels = torch.arange(100) % 4
    images = torch.zeros(100, 1, 16, 16)
    one, same, other = (plant(images, labels, target=0, rate=0.5, generator=seeded(s)).marked for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_several_classes_are_one_target():
    labels = torch.arange(100) % 5
    found = plant(torch.zeros(100, 1, 16, 16), labels, target=[1, 3], rate=0.8, generator=seeded())
    assert int(found.marked[(labels == 1) | (labels == 3)].sum()) == 32
    assert int(found.marked.sum()) == 32 + 12


def test_detectors_see_what_was_planted_and_nothing_else():
    clothes = torch.rand(200, 1, 32, 32, generator=seeded()) - 1
    clothes[..., :6, :6] = -1
    colour = torch.rand(200, 1, 32, 32, generator=seeded()).expand(-1, 3, -1, -1) * 2 - 1
    for images, kind in ((clothes, "corner"), (colour, "colour")):
        found = plant(images, torch.arange(200) % 2, attribute=kind, target=1, rate=0.7, generator=seeded())
        assert torch.equal(detect(found.images, kind) > 0.5, found.marked)
        torch.testing.assert_close(detect(found.images, kind), found.marked.float(), atol=1e-4, rtol=0)
    bright = torch.ones(1, 1, 32, 32)
    assert detect(bright).item() == 0  # a mark is brighter than what is around it


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"attribute": "hat"}, ValueError, "attribute is 'hat'"),
        ({"attribute": "colour"}, ValueError, "images has 1 channels"),
        ({"images": torch.zeros(4, 1, 16, 16, dtype=torch.uint8)}, TypeError, "images is torch.uint8"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "give 4 integers"),
        ({"rate": 1.1}, ValueError, "rate is 1.1"),
        ({"target": 7}, ValueError, "target is 7; no image"),
        ({"target": [0, 1]}, ValueError, "every image"),
    ],
)
def test_plants_that_do_not_fit(change, error, says):
    arguments = {"images": torch.zeros(4, 1, 16, 16), "labels": torch.arange(4) % 2, "target": 1, "rate": 0.5, **change}
    with pytest.raises(error, match=says):
        plant(arguments.pop("images"), arguments.pop("labels"), **arguments)


# Correlation


def world(n, tie, *, natural=0.0, strength=1.5, seed=0):
    """Two attributes, equal in a share `tie` of images beyond chance, and six prototypes: 1 rises with the first
    attribute, 4 falls with the second, and these two share noise of weight `natural` whatever the attributes are."""
    generator = seeded(seed)
    first = torch.rand(n, generator=generator) < 0.4
    other = torch.rand(n, generator=generator) < 0.4
    second = torch.where(torch.rand(n, generator=generator) < tie, first, other)
    codes = torch.randn(n, 6, generator=generator)
    shared = torch.randn(n, generator=generator)
    for j in (1, 4):
        codes[:, j] = natural**0.5 * shared + (1 - natural) ** 0.5 * codes[:, j]
    codes[:, 1] += strength * first
    codes[:, 4] -= strength * second
    return codes, torch.stack([first, second], 1)


def test_statistics_are_those_of_scipy_and_scikit_learn():
    codes, pair = world(500, 0.5, natural=0.3)
    codes = (codes * 4).round() / 4  # with ties
    found = associate(codes, pair, replicates=100)
    assert found.prototypes == (1, 4)
    assert found.signs == (1, -1)
    a, b = codes[:, 1].numpy(), -codes[:, 4].numpy()
    y, z = pair.numpy().T
    assert found.spearman.value == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert found.crossed[0].value == pytest.approx(roc_auc_score(z, a), abs=1e-12)
    assert found.crossed[1].value == pytest.approx(roc_auc_score(y, b), abs=1e-12)
    # Balanced: weights by loops; Spearman by images repeated as often as their weight says.
    weights = np.empty(500)
    for p in (0, 1):
        for q in (0, 1):
            inside = (y == p) & (z == q)
            weights[inside] = (y == p).mean() * (z == q).mean() / inside.mean()
    assert found.crossed[0].balanced == pytest.approx(roc_auc_score(z, a, sample_weight=weights), abs=1e-12)
    assert found.crossed[1].balanced == pytest.approx(roc_auc_score(y, b, sample_weight=weights), abs=1e-12)
    repeats = (weights * 2000).round().astype(int)
    assert found.spearman.balanced == pytest.approx(spearmanr(a.repeat(repeats), b.repeat(repeats)).statistic, abs=1e-4)
    for k, attribute in enumerate((y, z)):
        for j, column in enumerate(codes.numpy().T):
            assert found.auroc[k, j] == pytest.approx(roc_auc_score(attribute, column), abs=1e-12)
            expected = roc_auc_score(attribute, column, sample_weight=weights)
            assert found.balanced_auroc[k, j] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("natural", [0.0, 0.6, 0.9])
def test_what_is_tied_is_flagged_and_what_is_not_is_not(natural):
    """Twenty data sets of each kind: prototypes that are correlated by nature do not make a bias."""
    tied = [associate(*world(800, 0.6, natural=natural, seed=s), replicates=200, seed=s).flagged for s in range(20)]
    free = [associate(*world(800, 0.0, natural=natural, seed=s), replicates=200, seed=s).flagged for s in range(20, 40)]
    assert sum(tied) == 20
    assert sum(free) <= 1  # at most 5 % by the level, and fewer as the effect has to be 0.05


def test_natural_correlation_alone_would_have_flagged_the_control():
    """The trap that the control level is for."""
    codes, pair = world(2000, 0.0, natural=0.9)
    found = associate(codes, pair)
    assert abs(found.spearman.value) > 0.3
    assert spearmanr(codes[:, 1], codes[:, 4]).pvalue < 1e-10
    assert not found.flagged
    assert found.spearman.low < found.spearman.excess < found.spearman.high


def test_exact_control_has_no_excess_at_all():
    """A plant at rate 0.5 makes the attributes independent to the last image, so that nothing is left to chance."""
    labels = torch.arange(1000) % 10
    marked = plant(torch.zeros(1000, 1, 16, 16), labels, target=2, rate=0.5, generator=seeded()).marked
    pair = torch.stack([marked, labels == 2], 1)
    found = associate(torch.randn(1000, 4, generator=seeded()) + pair.sum(1, keepdim=True), pair, replicates=100)
    for statistic in (found.spearman, *found.crossed):
        assert statistic.excess == pytest.approx(0, abs=1e-12)


def test_one_prototype_for_both_attributes_is_flagged_by_its_auroc():
    codes, pair = world(1000, 0.7)
    codes[:, 1] = -torch.randn(1000, generator=seeded(5))
    codes[:, 4] = pair.sum(1) + 0.5 * torch.randn(1000, generator=seeded(6))
    found = associate(codes, pair)
    assert found.prototypes == (4, 4)
    assert found.spearman.value == pytest.approx(1)
    assert not found.spearman.flagged
    assert all(statistic.flagged for statistic in found.crossed)


def test_association_depends_on_order_and_seed_alone():
    codes, pair = world(300, 0.4)
    found = associate(codes, pair, replicates=100)
    again = associate(codes.double().exp() * 7, pair, replicates=100)
    assert found.spearman == again.spearman
    assert found.crossed == again.crossed
    assert associate(codes, pair, replicates=100, seed=1).spearman.low != found.spearman.low
    # The order of the attributes changes names, not numbers.
    turned = associate(codes, pair.flip(1), replicates=100)
    assert turned.prototypes == found.prototypes[::-1]
    assert turned.spearman.value == pytest.approx(found.spearman.value, abs=1e-12)
    assert turned.crossed[0].value == pytest.approx(found.crossed[1].value, abs=1e-12)


def test_replicates_do_not_depend_on_how_many_go_at_once():
    """130 are two parts of 50 and one of 30."""
    codes, pair = world(200, 0.4)
    values = [associate(codes, pair, replicates=n).spearman for n in (100, 130)]
    assert values[0].value == values[1].value
    assert values[0].low == pytest.approx(values[1].low, abs=0.1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attributes": torch.zeros(300, 3, dtype=torch.bool)}, r"attributes has shape \(300, 3\)"),
        ({"attributes": torch.zeros(299, 2, dtype=torch.bool)}, "for 300 images"),
        ({"attributes": torch.tensor([[True, True], [False, False]] * 150)}, "neither 150, second alone 0"),
        ({"level": 1.0}, "level is 1.0"),
        ({"replicates": 10}, "replicates is 10"),
    ],
)
def test_association_of_what_does_not_fit(change, says):
    codes, pair = world(300, 0.4)
    arguments = {"attributes": pair, **change}
    with pytest.raises(ValueError, match=says):
        associate(codes, arguments.pop("attributes"), **arguments)


def test_balanced_rows_untie_and_keep_the_rates():
    _, pair = world(5000, 0.8)
    assert np.corrcoef(pair.numpy().T.astype(float))[0, 1] > 0.7
    rows = balanced_rows(pair, generator=seeded())
    assert len(rows) == 5000
    assert abs(np.corrcoef(pair[rows].numpy().T.astype(float))[0, 1]) < 0.05
    torch.testing.assert_close(pair[rows].double().mean(0), pair.double().mean(0), atol=0.03, rtol=0)
    assert torch.equal(rows, balanced_rows(pair, generator=seeded()))


# Intervention


class Drawn(Patronus):
    """A model whose truth is known: it draws square j of 4 × 4 pixels as bright as activation j, from any noise, and
    square 3 also as bright as `tie` times activation 1 and 9 times as bright of the `rival`'s; its activations are the
    brightness of the squares."""

    def __init__(self, tie=0.0, rival=None):
        super().__init__(PatronusConfig((1, 16, 16), num_prototypes=12, width=8, multipliers=(1, 2), groups=4))
        self.tie, self.rival = tie, rival
        self.eval().requires_grad_(False)

    def encode(self, images, *, return_all=False):
        levels = self.squares(images)
        return (levels, 1 - levels, torch.zeros_like(levels, dtype=torch.int64)) if return_all else levels

    @staticmethod
    def squares(images):
        return ((images + 1) / 2).reshape(-1, 4, 4, 4, 4).mean((2, 4)).flatten(1)[:, :12]

    def forward(self, x, t, activations):
        levels = torch.cat([activations, torch.zeros(len(x), 4)], 1)
        levels[:, 3] += self.tie * activations[:, 1]
        if self.rival is not None:
            levels[:, 3] += 9 * self.tie * activations[:, self.rival]
        clean = levels.clamp(0, 1).reshape(-1, 1, 4, 1, 4, 1).expand(-1, -1, -1, 4, -1, 4).reshape(x.shape) * 2 - 1
        alpha = self.schedule.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
        return (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()


def intervened(model, n=400, *, images=24, **settings):
    """Attributes are squares 1 and 3, in half of the images each, independent; the rest is faint noise."""
    generator = seeded()
    pair = torch.rand(n, 2, generator=generator) < 0.5
    levels = 0.2 * torch.rand(n, 16, generator=generator)
    levels[:, [1, 3]] += 0.6 * pair
    shown = levels.reshape(-1, 1, 4, 1, 4, 1).expand(-1, -1, -1, 4, -1, 4).reshape(-1, 1, 16, 16) * 2 - 1
    activations = model.activations(shown)
    association = associate(activations, pair, replicates=100)
    assert association.prototypes == (1, 3)
    assert not association.flagged
    rows = (~pair.any(1)).nonzero()[:images, 0]
    detectors = tuple(lambda x, j=j: model.squares(x)[:, j] for j in (1, 3))
    settings = {"num_steps": 4, **settings}
    return activations, rows, intervene(model, shown[rows], activations, association, detectors, **settings)


@pytest.mark.parametrize("inverted", [False, True])
def test_effects_are_those_that_the_model_was_given(inverted):
    activations, rows, found = intervened(Drawn(tie=0.5), inverted=inverted)
    first, second = found.effects
    level = np.quantile(activations.numpy(), 0.99, axis=0)
    own = level[1] - activations[rows, 1].numpy()
    np.testing.assert_allclose(first.own, own, atol=1e-4)
    np.testing.assert_allclose(first.other, own / 2, atol=1e-4)
    np.testing.assert_allclose(second.own, level[3] - activations[rows, 3].numpy(), atol=0.06)  # 0.5 · s_1 is there too
    np.testing.assert_allclose(second.other, 0, atol=1e-4)
    assert first.flagged
    assert not second.flagged
    assert found.flagged
    assert len(first.controls) == 6  # half of the prototypes
    assert not {1, 3} & {*first.controls}
    assert float(first.control.abs().max()) < 1e-4
    assert first.p_value == 1 / 7
    assert second.p_value > 1 / 7 or float(second.other.abs().max()) < 1e-4
    assert found.before.shape == found.after[0].shape == (24, 1, 16, 16)
    assert Drawn.squares(found.after[0])[:, 1].numpy() == pytest.approx(np.full(24, level[1]), abs=1e-4)


def test_no_tie_is_not_flagged():
    _, _, found = intervened(Drawn())
    assert not found.flagged
    assert float(found.effects[0].own.mean()) > 0.5  # the prototype was turned up all the same


def test_what_a_control_does_as_well_is_not_flagged():
    """The control level: a prototype that stands for neither attribute brightens square 3 even more."""
    rival = intervened(Drawn(tie=0.4))[2].effects[0].controls[2]
    _, _, found = intervened(Drawn(tie=0.4, rival=rival))
    effect = found.effects[0]
    assert float(effect.other.mean()) > 0.2
    assert float(effect.control.mean(1)[2]) > float(effect.other.mean())
    assert effect.p_value == 2 / 7
    assert not found.flagged


def test_no_attribute_is_its_own_control():
    """Also where, with the attributes balanced, its prototype tells nothing."""
    activations, pair = world(400, 0.3)
    model = Drawn()
    padded = torch.cat([activations, torch.randn(400, 6, generator=seeded())], 1)
    association = associate(padded, pair, replicates=100)._replace(
        prototypes=(1, 3), balanced_auroc=torch.full((2, 12), 0.5, dtype=torch.float64)
    )
    detector = lambda x: model.squares(x)[:, 0]  # noqa: E731
    found = intervene(model, torch.zeros(4, 1, 16, 16), padded, association, (detector, detector), num_steps=2)
    assert found.effects[0].controls == (0, 2, 4, 5, 6, 7)


def test_intervention_does_not_depend_on_batches():
    found = [intervened(Drawn(tie=0.5), batch_size=size)[2] for size in (7, 256)]
    torch.testing.assert_close(found[0].effects[0].other, found[1].effects[0].other, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0].before, found[1].before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"images": 1}, "images has 1 rows"),
        ({"quantile": 0.3}, "quantile is 0.3"),
        ({"controls": 0}, "controls is 0"),
    ],
)
def test_interventions_that_do_not_fit(settings, says):
    with pytest.raises(ValueError, match=says):
        intervened(Drawn(), **settings)


# From data to verdict


@pytest.fixture(scope="module")
def digits():
    data = pf.data.load("digits", split="all")
    return images_of(TINY, data), torch.from_numpy(data.labels)


@pytest.mark.parametrize("rate", [0.85, 0.5])
def test_trained_on_planted_digits(digits, rate):
    """A plant is found in what a model learns without labels, and the control is not flagged."""
    images, labels = digits
    config = PatronusConfig(
        *((1, 16, 16), ((16, 3, 2, 1), (32, 3, 1, 0))),
        num_prototypes=12,
        width=8,
        multipliers=(1, 2),
        layers=1,
        groups=4,
        patch=2,
        attention=False,
    )
    planted = plant(images, labels, target=0, rate=rate, generator=seeded())
    model = train(config, planted.images, TrainingConfig(updates=40, batch=64, lr=2e-3))
    pair = torch.stack([planted.marked, labels == 0], 1)
    found = associate(model.activations(planted.images), pair, replicates=300)
    assert found.flagged == (rate != 0.5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    Patronus(TINY).save_pretrained(folder, data="digits", plant={"attribute": "corner", "target": "0", "rate": 0.7})
    return folder


def diagnosed(folder, *more):
    arguments = ["patronus", "diagnose", str(folder), "--images", "6", "--steps", "2", "--no-progress"]
    return CliRunner().invoke(cli.build(), [*arguments, *map(str, more)])


def test_the_command_on_planted_data(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    done = diagnosed(run_folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"turned_up.png", "evidence.png", "result.json"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["format"] == "protofast-patronus-diagnose-1"
    numbers = result["numbers"]
    assert result["findings"][0].startswith("FLAGGED" if numbers["flagged"] else "Not flagged")
    data = pf.data.load("digits", split="test")
    labels = torch.from_numpy(data.labels)
    planted = plant(images_of(TINY, data), labels, target=0, rate=0.7, generator=seeded())
    model = Patronus.from_pretrained(run_folder)
    found = associate(model.activations(planted.images), torch.stack([planted.marked, labels == 0], 1))
    assert numbers["association"]["spearman"]["value"] == found.spearman.value
    assert numbers["association"]["spearman"]["high"] == found.spearman.high
    assert numbers["association"]["prototypes"] == list(found.prototypes)
    assert numbers["images"] == {"corner mark": int(planted.marked.sum()), "0": int((labels == 0).sum())}
    assert len(numbers["intervention"]["effects"][0]["other"]) == 6
    assert "cnn-digits-corner" in result["settings"]["detectors"][1]


def test_the_command_on_named_attributes(run_folder, tmp_path, monkeypatch):
    """Of classes that are combinations: large (5 to 9) and odd."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    large, odd = "large=5,6,7,8,9", "odd=1,3,5,7,9"
    done = diagnosed(run_folder, "--attribute", large, "--attribute", odd, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    labels = pf.data.load("digits", split="test").labels
    assert result["numbers"]["images"] == {"large": int((labels >= 5).sum()), "odd": int((labels % 2).sum())}
    assert result["settings"]["plant"] is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--attribute", "odd=1,3"], "give two"),
        (["--attribute", "odd=1", "--attribute", "even"], "not NAME=CLASS"),
        (["--attribute", "odd=1", "--attribute", "even=two"], "--attribute is 'two'"),
        (["--attribute", "a=1", "--attribute", "b=2"], "too few images of a combination"),
    ],
)
def test_the_command_on_what_does_not_fit(run_folder, tmp_path, monkeypatch, more, says):
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    done = diagnosed(run_folder, "--out", tmp_path / "out", *more)
    assert done.exit_code != 0
    assert says in " ".join(done.output.split())


def test_the_command_on_a_model_without_a_plant(tmp_path):
    Patronus(TINY).save_pretrained(tmp_path / "run", data="digits")
    done = diagnosed(tmp_path / "run")
    assert done.exit_code != 0
    assert "--plant" in done.output
