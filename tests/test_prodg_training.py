"""ProDG's training: phases, resumption, what is left alone, and that it opens no data."""

import dataclasses
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers.prodg import digits, flow, fresh_flow, network

from protofast.prodg import PRESETS, ProDG, ProDGConfig, PromptBank, Prompts, Rotation, TinyFlow, train, train_tiny_flow
from protofast.prodg.evaluation import image_purity, logit_error, prototype_purity
from protofast.prodg.generators.protocol import flow_sigmas
from protofast.prodg.training import CHECKPOINT, _Run

CONFIG = ProDGConfig(updates=60, channels=8, rank=3, prompt_lr=1e-2, parametrization="cayley")


def state(result):
    return {**result.rotation.state_dict(), **{f"bank.{k}": v for k, v in result.bank.state_dict().items()}}


def same(first, second):
    first, second = state(first), state(second)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained():
    return train(network(), flow(), dataclasses.replace(CONFIG, updates=400))


def test_purity_rises_on_generated_and_on_held_out_images(trained):
    concepts = trained.concepts()
    before, after = prototype_purity(trained.start().concepts()), prototype_purity(concepts)
    assert float(after.min()) >= 0
    assert float(after.max()) <= 1 + 1e-6
    assert float(after.mean()) > float(before.mean()) + 0.1
    images = digits("test")
    one = torch.eye(16)
    held_out = image_purity(trained.network, concepts.matrix, images), image_purity(trained.network, one, images)
    assert float(held_out[0].mean()) > float(held_out[1].mean())


def test_what_stays_as_it_is(trained):
    matrix = trained.rotation().detach().double()
    assert float((matrix @ matrix.T - torch.eye(16)).abs().max()) < 1e-5
    assert float(torch.linalg.det(matrix)) == pytest.approx(1, abs=1e-4)
    assert float((matrix - torch.eye(16)).abs().max()) > 0.02  # it did turn
    assert logit_error(trained.concepts(), digits("test")) < 1e-5


def test_history_is_by_update_and_finite(trained):
    assert [row["update"] for row in trained.history] == list(range(20, 401, 20))
    assert all(np.isfinite(list(row.values())).all() for row in trained.history)
    assert {"purity", "regularization", "diversity", "dead", "seconds"} <= trained.history[-1].keys()


@pytest.mark.parametrize("stop", [3, 27, 58])  # in a rotation phase, in a prompt phase, near the end
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop):
    whole = train(network(), flow(), CONFIG, seed=5)
    update = _Run.update

    def dies(self):
        if self.done == stop:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(_Run, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(network(), flow(), CONFIG, seed=5, out=tmp_path, checkpoint_seconds=0)
    assert (tmp_path / CHECKPOINT).exists()
    monkeypatch.setattr(_Run, "update", update)
    rest = train(network(), flow(), CONFIG, seed=5, out=tmp_path, checkpoint_seconds=0)
    assert same(whole, rest)
    assert [row["update"] for row in rest.history] == [20, 40, 60]
    for ours, theirs in zip(whole.history, rest.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    assert not (tmp_path / CHECKPOINT).exists()
    again = train(network(), flow(), CONFIG, seed=5, out=tmp_path)  # only loads
    assert same(again, rest)
    assert torch.equal(again.prototypes(3, 2, 1), rest.prototypes(3, 2, 1))


def test_a_damaged_checkpoint_means_from_the_start(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    config = dataclasses.replace(CONFIG, updates=10)
    assert same(train(network(), flow(), config, out=tmp_path), train(network(), flow(), config))


def test_other_settings_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, updates=10)
    train(network(), flow(), config, out=tmp_path)
    for other in (
        lambda: train(network(), flow(), dataclasses.replace(config, updates=11), out=tmp_path),
        lambda: train(network(), flow(), config, seed=1, out=tmp_path),
        lambda: train(network(32), flow(), config, out=tmp_path),
    ):
        with pytest.raises(FileExistsError, match="other settings"):
            other()
    with pytest.raises(ValueError, match="16 channels"):
        ProDG.load(tmp_path, network(32), flow())
    with pytest.raises(FileNotFoundError, match="no such file"):
        ProDG.load(tmp_path / "none", network(), flow())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        ProDG.load(tmp_path, network(), flow())


def run_of(config, seed=0):
    bank = PromptBank.from_prompts(flow(), 16, rank=config.rank)
    rotation = Rotation(16, parametrization=config.parametrization)
    return _Run(ProDG(network(), flow(), rotation, bank, config), seed, 1)


def test_each_phase_leaves_the_other_half_alone():
    run = run_of(CONFIG)
    for _ in range(25):
        turns = run.turns_rotation()
        before = {name: value.clone() for name, value in state(run.result).items()}
        run.update()
        changed = {name for name, value in state(run.result).items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith("bank.") != turns for name in changed)


def test_a_prompt_update_moves_the_rows_of_its_batch_alone():
    run = run_of(dataclasses.replace(CONFIG, channels=3, rotation_updates=0))
    for _ in range(3):
        before = run.result.bank.pooled_offset.detach().clone()
        expected = run._batch()[0]
        run.update()
        moved = (run.result.bank.pooled_offset != before).any(1).nonzero()[:, 0]
        assert set(moved.tolist()) == set(expected.tolist())


def test_the_gradient_reaches_what_it_should():
    """LoRA: A has no gradient while B is 0; the pooled offset has one at once."""
    bank = PromptBank.from_prompts(flow(), 16, rank=2)
    channels = torch.arange(4)

    def gradients():
        bank.zero_grad()
        images = flow().generate(
            bank(channels, noise=False), flow().noise(4, generator=torch.Generator().manual_seed(0))
        )
        images.square().sum().backward()
        return {
            name: float(value.grad.abs().max()) for name, value in bank.named_parameters() if value.grad is not None
        }

    first = gradients()
    assert first["down"] == 0
    assert first["up"] > 0
    assert first["pooled_offset"] > 0
    with torch.no_grad():
        bank.up.normal_()
    assert gradients()["down"] > 0


def test_accumulation_changes_nothing_but_rounding():
    whole = train(network(), flow(), dataclasses.replace(CONFIG, updates=6, rotation_updates=0))
    parts = train(network(), flow(), dataclasses.replace(CONFIG, updates=6, rotation_updates=0), accumulate=4)
    assert torch.allclose(whole.bank.up, parts.bank.up, atol=2e-4)
    assert not torch.equal(whole.bank.up, torch.zeros_like(whole.bank.up))


@pytest.mark.parametrize(
    "change", [{"replay": False}, {"through": 1}, {"init": "data"}, {"init": "random"}, {"warmup": 5}]
)
def test_options_run_and_repeat(change):
    config = dataclasses.replace(CONFIG, updates=12, **change)
    first = train(network(), flow(), config, seed=2)
    assert same(first, train(network(), flow(), config, seed=2))
    assert not same(first, train(network(), flow(), config, seed=3))


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    good = flow()
    calls = 0

    class Breaks(TinyFlow):
        def generate(self, prompts, noise, **options):
            nonlocal calls
            calls += 1
            images = super().generate(prompts, noise, **options)
            return images * float("nan") if calls > 12 else images

    broken = Breaks(good.names[:-1], image_shape=good.image_shape, **good.sizes)
    broken.load_state_dict(good.state_dict())
    with pytest.raises(FloatingPointError, match=r"in update 1\d"):
        train(network(), broken.requires_grad_(False), CONFIG, out=tmp_path, checkpoint_seconds=0)
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert kept["done"] > 5
    assert all(value.isfinite().all() for value in [*kept["rotation"].values(), *kept["bank"].values()])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="accumulate is 0"):
        train(network(), flow(), CONFIG, accumulate=0)
    with pytest.raises(ValueError, match=r"config.channels is 17; the network has 16"):
        train(network(), flow(), dataclasses.replace(CONFIG, channels=17))
    with pytest.raises(IndexError, match="0 to 15"):
        run_of(CONFIG).result.prototypes(16, 1)


def test_presets_are_the_paper_and_a_small_one():
    assert PRESETS["paper"].updates == 10_000
    assert (PRESETS["paper"].rotation_lr, PRESETS["paper"].prompt_lr, PRESETS["paper"].rank) == (1e-3, 1e-4, 128)


DATA_FREE = """
    import sys
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    from protofast.prodg import runs, train, explain, picture
    from protofast.prodg.config import ProDGConfig
    import torch
    run = runs.Run.open(sys.argv[1])
    network = run.network()
    if sys.argv[2] == "prodg":
        config = ProDGConfig(updates=10, channels=4, rank=2, parametrization="cayley", init="data")
        train(network, run.generator(), config, out=run.place("prodg", 0))
        explain(run.concepts("prodg", 0, network), torch.rand(1, 8, 8), top=2, prototypes=2)
    else:
        len(run.images("train").take([0]))
    print([name for name in opened if name.endswith((".gz", ".npy", ".csv", "ubyte"))])
"""


@pytest.mark.parametrize(("mode", "opens"), [("prodg", False), ("control", True)])
def test_no_data_set_is_opened(tmp_path, mode, opens):
    from protofast.prodg.runs import prepare

    prepare(tmp_path / "run", data="digits", channels=8, epochs=1, updates=5, limit=100)
    script = textwrap.dedent(DATA_FREE)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), mode], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() != "[]") == opens, done.stdout


def test_sigmas_are_those_of_the_flux_pipeline():
    for steps in (1, 2, 4, 7):
        assert np.allclose(flow_sigmas(steps), [*np.linspace(1, 1 / steps, steps), 0], rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="steps is 0"):
        flow_sigmas(0)


def test_the_flow_draws_what_it_is_asked_for():
    draws = torch.Generator().manual_seed(3)
    right = [
        network()(flow().generate(flow().encode([name] * 40), flow().noise(40, generator=draws))).argmax(1) == label
        for label, name in enumerate(flow().names[:-1])
    ]
    assert float(torch.cat(right).double().mean()) > 0.7  # a tenth by chance


def test_the_flow_by_hand():
    made = fresh_flow()
    prompts, noise = made.encode(["b", ""]), made.noise(2, generator=torch.Generator().manual_seed(1))
    latents = noise
    for sigma, after in ((1.0, 0.5), (0.5, 0.0)):
        latents = latents + (after - sigma) * made.velocity(latents, torch.full((2,), sigma), prompts)
    expected = (made.mean + latents * made.spread @ made.basis).clamp(0, 1).reshape(2, 1, 8, 8)
    assert torch.allclose(made.generate(prompts, noise, steps=2), expected, atol=1e-6)
    assert not made.texts[-1].any()
    assert not made.pooled_texts[-1].any()


def test_gradients_go_through_the_last_steps_that_are_asked_for():
    made = fresh_flow()
    made.mean.fill_(0.5)
    made.basis.mul_(0.02)
    noise = made.noise(3, generator=torch.Generator().manual_seed(1))

    def gradient(through):
        embedding, pooled = (value.clone().requires_grad_() for value in made.encode(["a", "b", "a"]))
        made.generate(Prompts(embedding, pooled), noise, steps=3, through=through).square().sum().backward()
        return embedding.grad

    def by_hand(through):
        embedding, pooled = (value.clone().requires_grad_() for value in made.encode(["a", "b", "a"]))
        latents, sigmas = noise, flow_sigmas(3)
        for step in range(3):
            velocity = made.velocity(latents, torch.full((3,), sigmas[step]), Prompts(embedding, pooled))
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
            latents = latents.detach() if step < 3 - through else latents
        pixels = made.mean + latents * made.spread @ made.basis
        assert float(pixels.min()) > 0  # none is saturated
        assert float(pixels.max()) < 1
        pixels.square().sum().backward()
        return embedding.grad

    for through in (1, 2, 3):
        assert torch.allclose(gradient(through), by_hand(through), rtol=1e-4, atol=1e-7)
    assert torch.equal(gradient(3), gradient(None))
    assert not torch.allclose(gradient(1), gradient(2), rtol=1e-2)
    with pytest.raises(ValueError, match="through is 4; give 1 to 3"):
        gradient(4)


def test_a_flow_in_a_file(tmp_path):
    made = fresh_flow()
    made.save(tmp_path / "flow.safetensors")
    again = TinyFlow.load(tmp_path / "flow.safetensors")
    prompts, noise = made.encode(["a"]), made.noise(1)
    assert torch.equal(made.generate(prompts, noise), again.generate(again.encode(["a"]), noise))
    assert again.names == made.names
    network_file = tmp_path / "other.safetensors"
    from protofast.prodg import save_network

    save_network(network_file, network())
    with pytest.raises(ValueError, match="holds no TinyFlow"):
        TinyFlow.load(network_file)


def test_the_flow_says_what_it_cannot_do():
    made = fresh_flow()
    with pytest.raises(ValueError, match="'c'; this generator knows 'a', 'b', ''"):
        made.encode(["a", "c"])
    with pytest.raises(ValueError, match="noise has 3 rows for 2 prompts"):
        made.generate(made.encode(["a", "b"]), made.noise(3))
    with pytest.raises(ValueError, match=r"prompts.embedding has shape \(1, 1, 32\)"):
        made.generate(Prompts(torch.zeros(1, 1, 32), torch.zeros(1, 32)), made.noise(1))
    for names, message in (([], "names is"), (["a", "a"], "different"), (["", "b"], "none of them empty")):
        with pytest.raises(ValueError, match=message):
            TinyFlow(names)
    with pytest.raises(ValueError, match="latents is 65; give 1 to 64"):
        TinyFlow(["a"], image_shape=(1, 8, 8), latents=65)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    with pytest.raises(ValueError, match="labels runs from 0 to 7; names has 2"):
        train_tiny_flow(images, labels, ["a", "b"], cache=False)
    with pytest.raises(ValueError, match="updates is 0"):
        train_tiny_flow(images, labels % 2, ["a", "b"], updates=0, cache=False)
    with pytest.raises(FloatingPointError, match="lower lr"):
        train_tiny_flow(images, labels % 2, ["a", "b"], updates=30, lr=1e30, cache=False, latents=8, width=16)


def test_a_trained_flow_is_cached(tmp_path):
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
    told = []
    options = {"updates": 3, "cache": tmp_path, "latents": 8, "width": 16}
    first = train_tiny_flow(images, labels, ["a", "b"], progress=lambda *at: told.append(at), **options)
    assert told == [(1, 3), (2, 3), (3, 3)]
    second = train_tiny_flow(images, labels, ["a", "b"], progress=lambda *at: told.append(at), **options)
    assert len(told) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
