"""pf.diffusion against closed forms: the exact denoiser of a normal distribution is linear, and so is its DDIM map."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import protofast as pf
from protofast.diffusion import add_noise, invert, loop, normal_noise, sample, timesteps

SCHEDULE = pf.DDIMSchedule.linear(1000)
MEAN, SPREAD = 0.4, 0.5  # of the data


class Denoiser:
    """E[prediction | x_t] for pixels drawn from N(MEAN, SPREAD²): what a perfectly trained model returns."""

    def __init__(self, kind="epsilon", schedule=SCHEDULE):
        self.kind, self.alphas, self.asked = kind, schedule.alphas_cumprod, []

    def __call__(self, x, t):
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        self.asked.append(t.tolist())
        a = self.alphas[t].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        noise = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)
        image = (x - (1 - a).sqrt() * noise) / a.sqrt()
        return {"epsilon": noise, "sample": image, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * image}[self.kind]


def images(dtype=torch.float64, n=4):
    return (
        MEAN + SPREAD * torch.randn(n, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).to(dtype)


def noises(dtype=torch.float64, n=4):
    return torch.randn(n, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def flow(x0, alpha):
    """Where the probability-flow ODE takes an image: quantile to quantile of two normals."""
    return alpha.sqrt() * MEAN + (alpha * SPREAD**2 + 1 - alpha).sqrt() / SPREAD * (x0 - MEAN)


def direct(x, steps, *, up=False):
    """The affine DDIM recurrence in float64, from eq. 12 alone."""
    alphas = {-1: 1.0, **dict(enumerate(SCHEDULE.alphas_cumprod.tolist()))}
    ladder = list(zip([*steps, -1], [*steps[1:], -1, -1], strict=True))[: len(steps)]
    if up:
        ladder = [(now, then) for then, now in reversed(ladder)]
    for now, then in ladder:
        a, b, asked = alphas[now], alphas[then], alphas[then if up else now]
        noise = (1 - asked) ** 0.5 * (x - asked**0.5 * MEAN) / (asked * SPREAD**2 + 1 - asked)
        x = b**0.5 * (x - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise
    return x


# Timesteps


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_timesteps_fall_within_the_schedule(spacing, length):
    for count in range(1, length + 1):
        steps = timesteps(count, length, spacing)
        assert len(steps) == count
        assert sorted(set(steps), reverse=True) == steps
        assert 0 <= steps[-1] <= steps[0] <= length - 1
        assert all(type(step) is int for step in steps)
        if spacing != "leading":
            assert steps[0] == length - 1
        if spacing == "leading" or (spacing == "linspace" and count > 1):
            assert steps[-1] == 0


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("count", [2, 3, 7, 50, 999, 1000])
def test_timesteps_are_those_of_diffusers(spacing, count):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    assert timesteps(count, 1000, spacing) == scheduler.timesteps.tolist()


def test_timesteps_given():
    assert timesteps(3, 10, [9, 4, 0]) == [9, 4, 0]
    assert timesteps(2, 10, torch.tensor([5, 2])) == [5, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 10), "num_steps is 0"),
        ((11, 10), "num_steps is 11"),
        ((5, 10, "even"), "spacing is 'even'"),
        ((2, 10, [9, 4, 0]), "lists 3 timesteps and num_steps is 2"),
        ((2, 10, [10, 4]), "at most 9"),
        ((2, 10, [4, -1]), "at least 0"),
        ((2, 10, [4, 4]), "fall strictly"),
        ((2, 10, [2, 4]), "fall strictly"),
    ],
)
def test_timesteps_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        timesteps(*arguments)


def test_timesteps_refuses_fractions():
    with pytest.raises(TypeError):
        timesteps(2.5, 10)
    with pytest.raises(TypeError):
        timesteps(1, 10, [2.5])


# Noising


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_add_noise(dtype):
    x, e = images(dtype), noises(dtype)
    t = torch.tensor([-1, 0, 500, 999])
    a = torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULE.alphas_cumprod])[t + 1].reshape(-1, 1, 1, 1)
    signal, spread = a.sqrt() * x.double(), (1 - a).sqrt() * e.double()
    result = add_noise(x, e, t, SCHEDULE)
    assert result.dtype == dtype
    work = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # Two rounded factors, two products and a sum in the working precision, then one rounding to the dtype.
    bound = 2 * work * (signal.abs() + spread.abs()) + torch.finfo(dtype).eps / 2 * (signal + spread).abs()
    if dtype == torch.float16:
        bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((result.double() - signal - spread).abs() <= bound).all()
    assert torch.equal(result[0], x[0])
    assert torch.equal(add_noise(x, e, 500, SCHEDULE)[2], result[2])


def test_add_noise_strided_empty_and_one_axis():
    x, e = images().transpose(0, 2), noises().transpose(0, 2)
    assert torch.equal(add_noise(x, e, 7, SCHEDULE), add_noise(x.contiguous(), e.contiguous(), 7, SCHEDULE))
    assert add_noise(torch.zeros(0, 3), torch.zeros(0, 3), 7, SCHEDULE).shape == (0, 3)
    assert add_noise(torch.ones(2), torch.ones(2), torch.tensor([1, 2]), SCHEDULE).shape == (2,)


def test_add_noise_gradient_and_compile():
    x, e, t = images().requires_grad_(), noises().requires_grad_(), torch.tensor([0, 10, 500, 999])
    assert torch.autograd.gradcheck(lambda x, e: add_noise(x, e, t, SCHEDULE), (x, e))
    compiled = torch.compile(lambda x, e: add_noise(x, e, t, SCHEDULE), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, e), add_noise(x, e, t, SCHEDULE))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"image": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "image is torch.int64"),
        ({"image": [0.0]}, TypeError, "image is a list"),
        ({"noise": torch.zeros(2, 4)}, ValueError, "noise has shape"),
        ({"timestep": 1000}, IndexError, "timestep is 1000"),
        ({"timestep": torch.tensor([3, -2])}, IndexError, "timestep has values"),
        ({"timestep": torch.tensor([3, 4, 5])}, ValueError, "timestep has shape"),
        ({"timestep": torch.tensor([0.5, 1.0])}, TypeError, "give integers"),
    ],
)
def test_add_noise_refuses(change, error, says):
    arguments = {"image": torch.zeros(2, 3), "noise": torch.zeros(2, 3), "timestep": 5} | change
    with pytest.raises(error, match=says):
        add_noise(**arguments, schedule=SCHEDULE)


# Sampling


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float64, 50), (torch.float32, 50)])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_sample_is_the_recurrence(dtype, steps, kind):
    noise = noises(dtype)
    before = noise.clone()
    model = Denoiser(kind)
    result = sample(model, noise, SCHEDULE, steps, prediction_type=kind)
    expected = direct(noise.double(), timesteps(steps, 1000))
    assert result.dtype == dtype
    # Each step loses a few units at the size of its largest term, x/√ᾱ; √(ᾱ'/ᾱ) of that is kept. The map itself
    # contracts (SPREAD < 1), so the losses only add up.
    bound = 16 * steps * torch.finfo(dtype).eps * noise.double().abs().max().clamp(min=1)
    assert ((result.double() - expected).abs() <= bound).all()
    assert model.asked == [[t] * 4 for t in timesteps(steps, 1000)]
    assert torch.equal(noise, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sample_and_invert_keep_half_precision(dtype):
    for kind in ("epsilon", "sample", "v_prediction"):
        noise = invert(Denoiser(kind), images(dtype), SCHEDULE, 10, prediction_type=kind)
        assert noise.dtype == dtype
        exact = direct(images(dtype).double(), timesteps(10, 1000), up=True)
        # Ten roundings of x and ten of the model's arithmetic on values up to 3, expanded by at most 1/SPREAD.
        bound = 20 * torch.finfo(dtype).eps * 3 / SPREAD
        if kind == "epsilon":
            assert ((noise.double() - exact).abs() <= bound).all()
        result = sample(Denoiser(kind), noise, SCHEDULE, 10, prediction_type=kind)
        assert result.dtype == dtype
        assert result.isfinite().all()


def test_sample_approaches_the_flow():
    x0 = images()
    noise = flow(x0, SCHEDULE.alphas_cumprod[-1])
    errors = [(sample(Denoiser(), noise, SCHEDULE, n) - x0).abs().max().item() for n in (20, 100, 1000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 5e-3


def test_sample_draws_noise_from_the_generator():
    steps = timesteps(5, 1000, "leading")
    x, generator = noises(), torch.Generator().manual_seed(7)
    for t, prev in zip(steps, [*steps[1:], -1], strict=True):
        e = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        x = pf.ddim_step(x, Denoiser()(x, torch.full((4,), t)), t, prev, SCHEDULE, eta=0.5, noise=e).prev_sample

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(Denoiser(), noises(), SCHEDULE, 5, spacing="leading", eta=0.5, generator=generator)

    assert torch.equal(run(7), x)
    assert not torch.equal(run(8), x)
    torch.manual_seed(3)
    first = sample(Denoiser(), noises(), SCHEDULE, 5, eta=1.0)
    torch.manual_seed(3)
    assert torch.equal(sample(Denoiser(), noises(), SCHEDULE, 5, eta=1.0), first)


def test_clip_range_bounds_the_image():
    free = sample(Denoiser(), 9 * noises(), SCHEDULE, 10)
    clipped = sample(Denoiser(), 9 * noises(), SCHEDULE, 10, clip_range=(0.0, 1.0))
    assert free.abs().max() > 1
    assert clipped.min() >= 0
    assert clipped.max() <= 1


def test_clip_range_bounds_the_image_that_is_inverted():
    def nothing(x, t):
        return torch.zeros_like(x)

    image = 3 * images()
    noise = invert(nothing, image, SCHEDULE, 5, clip_range=(0.0, 1.0))
    expected = SCHEDULE.alphas_cumprod[-1].sqrt() * image.clamp(0, 1)
    torch.testing.assert_close(noise, expected, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_on_the_gpu_as_on_the_cpu(kind):
    class Moved(Denoiser):
        def __init__(self, device):
            super().__init__(kind)
            self.alphas = self.alphas.to(device)

    def run(device):
        generator = torch.Generator().manual_seed(0)  # on the CPU for both
        x = invert(Moved(device), images().to(device), SCHEDULE, 10, prediction_type=kind)
        x = add_noise(x, noises().to(device), torch.tensor([3, 5, 7, 999], device=device), SCHEDULE)
        options = {"eta": 0.5, "generator": generator, "prediction_type": kind}
        return sample(Moved(device), x, SCHEDULE, 10, **options).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=0, atol=1e-10)


def test_no_gradient_is_kept():
    weight = torch.ones(1, requires_grad=True)
    result = sample(lambda x, t: x * weight, torch.randn(2, 3), SCHEDULE, 2)
    assert not result.requires_grad
    assert not invert(lambda x, t: x * weight, torch.randn(2, 3), SCHEDULE, 2).requires_grad


def test_guidance_is_two_models():
    def model(x, t, label, power=1.0):
        return torch.tanh(x * label.reshape(-1, 1) ** power)

    def mixed(x, t):
        one, two = model(x, t, torch.ones(4)), model(x, t, torch.full((4,), 2.0))
        return one + 3.0 * (two - one)

    x = noises(n=4).reshape(4, 6)
    arguments = {
        "cond": {"label": torch.full((4,), 2.0), "power": 1.0},
        "uncond": {"label": torch.ones(4), "power": 1.0},
        "guidance_scale": 3.0,
    }
    for function in (sample, invert):
        for kind in ("epsilon", "v_prediction"):
            guided = function(model, x, SCHEDULE, 8, prediction_type=kind, **arguments)
            expected = function(mixed, x, SCHEDULE, 8, prediction_type=kind)
            torch.testing.assert_close(guided, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    alone = sample(model, x, SCHEDULE, 8, cond=arguments["cond"])
    torch.testing.assert_close(sample(model, x, SCHEDULE, 8, **(arguments | {"guidance_scale": 1.0})), alone)
    assert not torch.allclose(alone, sample(mixed, x, SCHEDULE, 8))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"guidance_scale": 2.0}, "go together"),
        ({"uncond": {}}, "go together"),
        ({"guidance_scale": 2.0, "uncond": {"y": torch.ones(2)}, "cond": {}}, "keys"),
        ({"guidance_scale": 2.0, "uncond": {"y": 1}, "cond": {"y": 2}}, "'y' differs"),
        ({"guidance_scale": 2.0, "uncond": {"y": None}, "cond": {"y": torch.ones(2)}}, "'y' differs"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"prediction_type": "noise"}, "prediction_type is 'noise'"),
        ({"backend": "nope"}, "backend is 'nope'"),
    ],
)
@pytest.mark.parametrize("function", [sample, invert])
def test_refused_arguments(function, arguments, says):
    with pytest.raises(ValueError, match=says):
        function(lambda x, t, y=None: x, torch.zeros(2, 3), SCHEDULE, **({"num_steps": 3} | arguments))


@pytest.mark.parametrize("function", [sample, invert])
def test_refused_models_and_samples(function):
    with pytest.raises(TypeError, match="returned a tuple"):
        function(lambda x, t: (x,), torch.zeros(2, 3), SCHEDULE, 3)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\)"):
        function(lambda x, t: x[:, :1], torch.zeros(2, 3), SCHEDULE, 3)
    with pytest.raises(TypeError, match=r"torch.uint8"):
        function(Denoiser(), torch.zeros(2, 3, dtype=torch.uint8), SCHEDULE, 3)


def test_eta_needs_its_range():
    with pytest.raises(ValueError, match="eta is 2"):
        sample(Denoiser(), noises(), SCHEDULE, 3, eta=2)


@pytest.mark.parametrize("function", [sample, invert])
def test_callback_sees_every_step(function):
    seen = []
    result = function(Denoiser(), noises(), SCHEDULE, 4, callback=lambda *step: seen.append(step))
    order = timesteps(4, 1000)[:: 1 if function is sample else -1]
    assert [(number, t) for number, t, _ in seen] == list(enumerate(order))
    assert torch.equal(seen[-1][2].prev_sample, result)
    assert not torch.equal(seen[0][2].prev_sample, result)  # kept results are not overwritten


def test_progress(capsys, monkeypatch):
    plain = sample(Denoiser(), noises(), SCHEDULE, 4)
    assert capsys.readouterr().err == ""
    pytest.importorskip("rich")
    assert torch.equal(sample(Denoiser(), noises(), SCHEDULE, 4, progress=True), plain)
    assert "4/4" in capsys.readouterr().err
    assert torch.equal(sample(Denoiser(), noises(), SCHEDULE, 4, progress=True, batch_size=3), plain)
    assert "8/8" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"protofast\[cli\]"):
        sample(Denoiser(), noises(), SCHEDULE, 4, progress=True)


# Inversion


def test_invert_is_the_recurrence_asked_at_the_target():
    model, image = Denoiser(), images()
    before = image.clone()
    result = invert(model, image, SCHEDULE, 20)
    assert model.asked == [[t] * 4 for t in reversed(timesteps(20, 1000))]
    expected = direct(images(), timesteps(20, 1000), up=True)
    bound = 16 * 20 * torch.finfo(torch.float64).eps * expected.abs().max() / SPREAD
    assert ((result - expected).abs() <= bound).all()
    assert torch.equal(image, before)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_round_trip_error_falls_as_one_over_the_steps(spacing):
    def error(n):
        noise = invert(Denoiser(), images(), SCHEDULE, n, spacing=spacing)
        return (sample(Denoiser(), noise, SCHEDULE, n, spacing=spacing) - images()).abs().max().item()

    errors = [error(n) for n in (25, 50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert 0.35 < fine / coarse < 0.65
    assert errors[-1] < 0.05


def test_invert_approaches_the_flow():
    goal = flow(images(), SCHEDULE.alphas_cumprod[-1])
    errors = [(invert(Denoiser(), images(), SCHEDULE, n) - goal).abs().max().item() for n in (20, 100, 1000)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 2e-2


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_one_denoiser_has_one_inversion(kind):
    expected = invert(Denoiser(), images(), SCHEDULE, 10)
    result = invert(Denoiser(kind), images(), SCHEDULE, 10, prediction_type=kind)
    # The image predicted at t is divided by √(1 − ᾱ), at least 0.1 for ten steps.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_a_constant_model_comes_back_exactly():
    def model(x, t):
        return torch.full_like(x, 0.3)

    noise = invert(model, images(), SCHEDULE, 10)
    bound = 1e-12 / SCHEDULE.alphas_cumprod[-1].sqrt()  # the image is that small a part of the noise
    assert ((sample(model, noise, SCHEDULE, 10) - images()).abs() <= bound).all()


def test_compiled_step_by_step_model():
    model = torch.compile(lambda x, t: torch.tanh(x), backend="eager", fullgraph=True)
    plain = sample(lambda x, t: torch.tanh(x), noises(), SCHEDULE, 3)
    assert torch.equal(sample(model, noises(), SCHEDULE, 3), plain)


def test_autocast():
    weight = torch.eye(6)
    with torch.autocast("cpu", torch.bfloat16):
        result = sample(lambda x, t: x @ weight, noises(torch.float32).reshape(4, 6), SCHEDULE, 3)
    assert result.dtype == torch.float32


# Noise by counter


def ladder(steps):
    return zip(steps, [*steps[1:], -1], strict=True)


def test_seeded_noise_is_that_of_the_counter():
    steps, alphas = timesteps(6, 1000), {-1: 1.0, **dict(enumerate(SCHEDULE.alphas_cumprod.tolist()))}
    x, model, eta = noises(), Denoiser(), 0.7
    for number, (t, prev) in enumerate(ladder(steps)):
        a, b = alphas[t], alphas[prev]
        e = model(x, torch.full((4,), t))
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        image = (x - (1 - a) ** 0.5 * e) / a**0.5
        x = b**0.5 * image + (1 - b - sigma**2) ** 0.5 * e + sigma * normal_noise(x, (11, number << 32))
    result = sample(Denoiser(), noises(), SCHEDULE, 6, eta=eta, seed=11)
    # As for the deterministic recurrence; 1 / √ᾱ of the first step, up to 160, is the largest factor.
    assert ((result - x).abs() <= 16 * 6 * 160 * torch.finfo(torch.float64).eps * noises().abs().max()).all()
    assert not torch.allclose(result, sample(Denoiser(), noises(), SCHEDULE, 6, eta=eta, seed=12), atol=1e-3)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 9])
def test_results_do_not_depend_on_the_split(size):
    def run(noise, **options):
        return sample(Denoiser(), noise, SCHEDULE, 5, eta=1.0, **options)

    noise = noises(n=5)
    whole = run(noise, seed=(3, 0))
    assert torch.equal(run(noise, seed=3, batch_size=size), whole)
    assert torch.equal(torch.cat([run(noise[:2], seed=3), run(noise[2:], seed=(3, 2))]), whole)
    assert not torch.equal(run(noise[2:], seed=3), whole[2:])
    noise = invert(Denoiser(), images(n=5), SCHEDULE, 5)
    assert torch.equal(invert(Denoiser(), images(n=5), SCHEDULE, 5, batch_size=size), noise)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"seed": 1}, ValueError, "seed was given with eta 0"),
        ({"seed": 1, "eta": 1, "generator": torch.Generator()}, ValueError, "generator and seed"),
        ({"seed": -1, "eta": 1}, ValueError, "seed is -1"),
        ({"seed": 2**63, "eta": 1}, ValueError, "seed is 9"),
        ({"seed": (0, 2**32 - 1), "eta": 1}, ValueError, "below 2"),
        ({"seed": (0, 1, 2), "eta": 1}, TypeError, "seed is"),
        ({"seed": 0.5, "eta": 1}, TypeError, "seed is 0.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": 1.5}, TypeError, "float"),
        ({"dynamic_threshold": 2.0}, ValueError, "dynamic_threshold is 2.0"),
        ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale was given without"),
    ],
)
def test_sample_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        sample(Denoiser(), noises(n=2), SCHEDULE, 3, **arguments)


# Options of the step


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_threshold": (0.5, 1.5)},
        {"clip_range": 0.3},
        {"clip_range": 0.3, "use_clipped_model_output": True},
        {"bitwise": True},
        {"guidance_rescale": 0.7},
        {"dynamic_threshold": 0.5, "guidance_rescale": 0.4, "eta": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_reach_the_step(options):
    """The loop against one over the public step, which has oracles of its own."""
    noise, model = 4 * noises(torch.float32), Denoiser()
    guidance = {"guidance_scale": 3.0} if "guidance_rescale" in options else {}
    both = {"cond": {"shift": torch.full((4, 1, 1, 1), 0.5)}, "uncond": {"shift": torch.zeros(4, 1, 1, 1)}}

    def shifted(x, t, shift=0.0):
        return model(x, t) * (1 + shift)

    x = noise
    for number, (t, prev) in enumerate(ladder(timesteps(5, 1000))):
        time = torch.full((4,), t)
        e = (shifted(x, time), shifted(x, time, 0.5)) if guidance else shifted(x, time)
        seed = {"seed": (3, number << 32)} if "eta" in options else {}
        x = pf.ddim_step(x, e, t, prev, SCHEDULE, **options, **guidance, **seed).prev_sample
    seed = {"seed": 3} if "eta" in options else {}
    conditions = guidance | both if guidance else {}
    for size in (None, 3):
        assert torch.equal(sample(shifted, noise, SCHEDULE, 5, batch_size=size, **options, **conditions, **seed), x)
    for name in options:
        less = {key: value for key, value in options.items() if key != name}
        seeded = seed if "eta" in less else {}
        assert not torch.equal(sample(shifted, noise, SCHEDULE, 5, **less, **conditions, **seeded), x), name


# Inpainting

HALF = torch.arange(6).reshape(1, 1, 3, 2) % 2 == 0


@pytest.mark.parametrize("final", [1.0, 0.99])
@pytest.mark.parametrize("mask", [HALF, HALF[0, 0], HALF.expand(4, 1, 3, 2).clone()], ids=["one", "two axes", "full"])
def test_known_pixels(mask, final):
    schedule = pf.DDIMSchedule(SCHEDULE.alphas_cumprod, final)
    steps, known, noise = timesteps(5, 1000)[1:], images(), noises()  # from a timestep that is not all noise
    seen = []

    def model(x, t):
        seen.append((t[0].item(), x.clone()))
        return Denoiser()(x, t)

    for size in (None, 3):
        seen.clear()
        result = sample(model, noise, schedule, 4, spacing=steps, known=known, mask=mask, batch_size=size)
        free = sample(Denoiser(), noise, schedule, 4, spacing=steps)
        kept = ~mask.broadcast_to(noise.shape)
        assert torch.equal(result[kept], known[kept])
        assert torch.equal(result[~kept], free[~kept])  # pixels do not see each other in this model
        for number, (t, x) in enumerate(seen):
            rows = slice(None) if size is None else (slice(0, 3), slice(3, 4))[number // 4]
            a = SCHEDULE.alphas_cumprod[t]
            expected = a.sqrt() * known[rows] + (1 - a).sqrt() * noise[rows]
            bound = 4 * torch.finfo(torch.float64).eps * (known[rows].abs() + noise[rows].abs())
            assert ((x - expected).abs() <= bound)[kept[rows]].all()
        assert [t for t, _ in seen] == steps * (1 if size is None else 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"known": images()}, ValueError, "known and mask go together"),
        ({"mask": HALF}, ValueError, "known and mask go together"),
        ({"known": images()[:2], "mask": HALF}, ValueError, "known has shape"),
        ({"known": images(), "mask": HALF.double()}, TypeError, "mask is a torch.float64"),
        ({"known": images(), "mask": HALF[..., None].expand(1, 1, 3, 2, 5)}, ValueError, "mask has shape"),
    ],
)
def test_known_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        sample(Denoiser(), noises(), SCHEDULE, 3, **arguments)


# Batches, buffers and conditions


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("function", [sample, invert])
def test_conditions_of_each_sample_go_with_it(function, guided):
    label, table, seen = torch.arange(5.0), torch.arange(3.0), []

    def model(x, t, label, table, power):
        seen.append((label.tolist(), table.tolist(), power))
        return torch.sin(x) * label.reshape(-1, 1) ** power + table[1]

    arguments = {"cond": {"label": label, "table": table, "power": 2}}
    if guided:
        arguments |= {"uncond": {"label": -label, "table": table.clone(), "power": 2}, "guidance_scale": 2.0}
    x = noises(n=5).reshape(5, 6)
    whole = function(model, x, SCHEDULE, 3, **arguments)
    seen.clear()
    result = function(model, x, SCHEDULE, 3, batch_size=2, **arguments)
    torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)  # a vector sine is not the scalar one
    rows = [[0.0, 1.0], [2.0, 3.0], [4.0]]
    rows = [[-v for v in row] + row if guided else row for row in rows]
    assert seen == [(row, [0.0, 1.0, 2.0], 2) for row in rows for _ in range(3)]


def test_conditions_that_cannot_be_stacked():
    arguments = {"guidance_scale": 2.0, "batch_size": 2}
    for cond, uncond in ((torch.ones(3), torch.zeros(3)), (torch.ones(5), torch.zeros(1))):
        with pytest.raises(ValueError, match=r"'y' differs.*5 samples"):
            sample(Denoiser(), noises(n=5), SCHEDULE, 3, cond={"y": cond}, uncond={"y": uncond}, **arguments)


@pytest.mark.parametrize("function", [sample, invert])
def test_results_into_a_mapped_file(function, tmp_path):
    start = np.lib.format.open_memmap(tmp_path / "noise.npy", "w+", np.float64, (5, 1, 3, 2))
    start[:] = noises(n=5).numpy()
    start.flush()
    noise = torch.from_numpy(np.load(tmp_path / "noise.npy", mmap_mode="c"))
    out = torch.from_numpy(np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float64, (5, 1, 3, 2)))
    assert function(Denoiser(), noise, SCHEDULE, 4, batch_size=2, out=out) is out
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "out.npy")), function(Denoiser(), noises(n=5), SCHEDULE, 4))
    assert torch.equal(noise, noises(n=5))


@pytest.mark.parametrize("function", [sample, invert])
def test_steps_are_taken_in_place(function):
    noise, out, seen = noises(n=5), torch.empty(5, 1, 3, 2, dtype=torch.float64), []

    def model(x, t):
        seen.append(x.data_ptr())
        return Denoiser()(x, t)

    function(model, noise, SCHEDULE, 4, out=out, batch_size=3)
    assert seen == [out.data_ptr()] * 4 + [out[3:].data_ptr()] * 4
    seen.clear()
    result = function(model, noise, SCHEDULE, 4)
    assert set(seen) == {result.data_ptr()}
    assert torch.equal(result, out)
    assert torch.equal(noise, noises(n=5))


def test_sample_layouts_and_a_model_that_returns_its_input():
    expected = sample(lambda x, t: x.clone(), noises(), SCHEDULE, 4)
    strided = noises().movedim(0, -1).contiguous().movedim(-1, 0)
    out = torch.empty(4, 1, 3, 4, dtype=torch.float64)[..., ::2]
    for noise, target in ((noises(), None), (strided, None), (noises(), out)):
        assert torch.equal(sample(lambda x, t: x, noise, SCHEDULE, 4, out=target), expected)
    one = noises()[:1]
    result = sample(lambda x, t: x.flip(2), one.expand(4, 1, 3, 2), SCHEDULE, 4)
    assert torch.equal(result, sample(lambda x, t: x.flip(2), one, SCHEDULE, 4).expand(4, 1, 3, 2))
    assert sample(Denoiser(), torch.zeros(0, 3), SCHEDULE, 4).shape == (0, 3)
    assert sample(Denoiser(), torch.ones(2), SCHEDULE, 4, batch_size=1).shape == (2,)


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        ([0.0], TypeError, "out is a list"),
        (torch.zeros(5, 1, 3, 2), ValueError, r"out is torch.float32 \(5, 1, 3, 2\); it must be torch.float64 \(4"),
        (torch.zeros(4, 1, 3, 2), ValueError, "must be torch.float64"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(4, 1, 3, 2), ValueError, "expanded"),
    ],
)
@pytest.mark.parametrize("function", [sample, invert])
def test_out_refuses(function, out, error, says):
    with pytest.raises(error, match=says):
        function(Denoiser(), noises(), SCHEDULE, 3, out=out)


def test_out_refuses_what_is_still_read():
    noise, known, label = noises(), images(), images()
    with pytest.raises(ValueError, match="out shares memory with noise"):
        sample(Denoiser(), noise, SCHEDULE, 3, out=noise)
    with pytest.raises(ValueError, match="out shares memory with image"):
        invert(Denoiser(), noise.mT.mT, SCHEDULE, 3, out=noise)
    with pytest.raises(ValueError, match="out shares memory with known"):
        sample(Denoiser(), noise, SCHEDULE, 3, known=known, mask=HALF, out=known)
    with pytest.raises(ValueError, match=r"out shares memory with cond\['label'\]"):
        sample(lambda x, t, label: x, noise, SCHEDULE, 3, cond={"label": label}, out=label)


def test_callback_sees_every_batch():
    seen = []
    result = sample(Denoiser(), noises(n=5), SCHEDULE, 3, batch_size=2, callback=lambda *step: seen.append(step))
    steps = timesteps(3, 1000)
    assert [(step.first, number, t) for number, t, step in seen] == [
        (first, number, t) for first in (0, 2, 4) for number, t in enumerate(steps)
    ]
    assert torch.equal(torch.cat([step.prev_sample for number, _, step in seen if number == 2]), result)
    a, (_, t, last) = SCHEDULE.alphas_cumprod[steps[2]], seen[2]
    before = seen[1][2].prev_sample
    image = (before - (1 - a).sqrt() * Denoiser()(before, torch.full((2,), t))) / a.sqrt()
    torch.testing.assert_close(last.pred_original_sample, image, rtol=1e-13, atol=1e-13)
    assert last.residual is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_of_the_cpu_on_the_gpu():
    model = Denoiser()
    model.alphas = model.alphas.cuda()
    arguments = {"eta": 1.0, "seed": 3, "batch_size": 2, "device": "cuda", "mask": HALF, "known": images(n=5)}
    out = torch.empty_like(noises(n=5))
    result = sample(model, noises(n=5), SCHEDULE, 4, out=out, **arguments)
    assert result is out
    expected = sample(Denoiser(), noises(n=5), SCHEDULE, 4, **(arguments | {"device": None}))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


# Resuming


class Counted(Denoiser):
    """Ends the process at call `last`."""

    def __init__(self, last=None):
        super().__init__()
        self.last, self.calls = last, 0

    def __call__(self, x, t):
        self.calls += 1
        if self.calls == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(x, t)


def long_run(function, folder, model=None, **options):
    """Twelve calls of the model: three batches of four steps."""
    arguments = {"eta": 1.0, "seed": 3} if function is sample else {}
    return function(model or Denoiser(), noises(n=5), SCHEDULE, 4, batch_size=2, resume=folder, **arguments, **options)


def die(function, folder, where, call):
    """What the killed process runs."""
    if where == "writing":
        replace, left = os.replace, iter(range(call - 1))

        def mortal(*paths):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = mortal
    long_run(function, folder, Counted(call if where == "model" else None))


@pytest.mark.parametrize(("function", "where", "call"), [(sample, "model", 7), (invert, "writing", 8)])
def test_a_killed_run_goes_on(function, where, call, tmp_path):
    pytest.importorskip("safetensors")
    code = f"import test_diffusion as t; t.die(t.{function.__name__}, {str(tmp_path)!r}, {where!r}, {call})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    model, seen = Counted(), []
    result = long_run(function, tmp_path, model, callback=lambda number, t, step: seen.append((step.first, number)))
    assert torch.equal(result, long_run(function, None))
    assert model.calls == 12 - (call - 1)
    assert seen == [(first, number) for first in (0, 2, 4) for number in range(4)][call - 1 :]
    model = Counted()
    assert torch.equal(long_run(function, tmp_path, model), result)
    assert model.calls == 0
    assert not (tmp_path / "step.safetensors").exists()


class StopHere(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_callback_stops_a_run_that_goes_on_after_its_step(dtype, tmp_path):
    pytest.importorskip("safetensors")

    def stop(number, t, step):
        if (step.first, number) in ((0, 2), (0, 3), (3, 0)):
            raise StopHere

    def run(model, folder, callback):
        return sample(
            model, noises(dtype), SCHEDULE, 4, batch_size=3, resume=folder, callback=callback, mask=HALF,
            known=images(dtype), eta=0.5, seed=1
        )  # fmt: skip

    model = Counted()
    for calls in (3, 4, 5):
        with pytest.raises(StopHere):
            run(model, tmp_path, stop)
        assert model.calls == calls
    assert torch.equal(run(model, tmp_path, None), run(Denoiser(), None, None))
    assert model.calls == 8


BASE = {"eta": 0.5, "seed": 3, "clip_range": (-3.0, 3.0), "batch_size": 2, "cond": {"scale": 1.0}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eta": 0.25}, "eta 0.5; now it is 0.25"),
        ({"seed": 4}, r"seed \[3, 0\]; now it is \[4, 0\]"),
        ({"seed": (3, 1)}, r"now it is \[3, 1\]"),
        ({"num_steps": 5}, "timesteps"),
        ({"spacing": "leading"}, "timesteps"),
        ({"schedule": pf.DDIMSchedule.cosine(1000)}, "schedule"),
        ({"prediction_type": "sample"}, "prediction_type 'epsilon'; now it is 'sample'"),
        ({"clip_range": 3.0}, "clip_range"),
        ({"clip_range": None, "dynamic_threshold": 0.9}, "clip_range|dynamic_threshold"),
        ({"use_clipped_model_output": True}, "use_clipped_model_output"),
        ({"bitwise": True}, "bitwise"),
        ({"batch_size": 3}, "batch_size 2; now it is 3"),
        ({"cond": {"scale": 2.0}}, "cond .*scale.*2.0"),
        ({"cond": {"scale": torch.ones(4, 1, 1, 1)}}, "cond"),
        ({"guidance_scale": 2.0, "uncond": {"scale": 1.0}}, "guidance_scale"),
        ({"compile": "default"}, "compile False; now it is 'default'"),
        ({"noise": images()}, "another noise"),
        ({"known": images(), "mask": HALF}, "another (known|mask)"),
        ({"noise": noises(torch.float32)}, "dtype"),
        ({"noise": noises().repeat(2, 1, 1, 1)}, "shape"),
    ],
)
def test_resume_refuses_other_settings(change, says, tmp_path):
    pytest.importorskip("safetensors")

    def run(callback=None, **arguments):
        arguments = {"noise": noises(), "schedule": SCHEDULE, "num_steps": 4, **BASE} | arguments
        return sample(
            lambda x, t, scale: Denoiser()(x, t) * scale, resume=tmp_path, callback=callback, **arguments
        )  # fmt: skip

    def stop(number, t, step):
        raise StopHere

    with pytest.raises(StopHere):
        run(stop)
    before = (tmp_path / "step.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"was made with.*({says}).*give what it had, or another folder"):
        run(**change)
    assert (tmp_path / "step.safetensors").read_bytes() == before
    result = run()
    with pytest.raises(ValueError, match=f"was made with.*({says})"):
        run(**change)
    assert torch.equal(run(), result)


@pytest.mark.parametrize(
    "change",
    [
        {"fixed_point": 4},
        {"tolerance": 0.1},
        {"prediction_type": "v_prediction"},
        {"clip_range": 1.0},
        {"guidance_scale": 2.0},
        {"guidance_rescale": 0.5},
        {"spacing": "linspace"},
        {"schedule": pf.DDIMSchedule.cosine(1000)},
        {"image": noises()},
    ],
    ids=lambda change: "-".join(change),
)
def test_inversion_resumes_under_its_settings_alone(change, tmp_path):
    pytest.importorskip("safetensors")

    def run(model, **arguments):
        common = {"image": images(), "schedule": SCHEDULE, "num_steps": 3, "fixed_point": 3, "guidance_scale": 1.5}
        return invert(model, uncond={}, resume=tmp_path, **(common | arguments))

    result = run(Denoiser())
    name = {"spacing": "timesteps", "image": "another image"}.get(*change, *change)
    with pytest.raises(ValueError, match=f"was made with {name}"):
        run(Denoiser(), **change)
    assert torch.equal(run(None), result)


def test_resume_refuses_damage_and_strangers(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    expected = long_run(sample, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"batch-000000000{first}.safetensors" for first in (0, 2, 4)]
    whole = files[1].read_bytes()
    for broken in (whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        files[1].write_bytes(broken)
        with pytest.raises(ValueError, match=r"batch-0000000002\.safetensors is damaged.*delete it"):
            long_run(sample, tmp_path)
    files[1].unlink()
    model = Counted()
    assert torch.equal(long_run(sample, tmp_path, model), expected)
    assert model.calls == 4
    save_file({"x": torch.zeros(2)}, files[0])
    with pytest.raises(ValueError, match=r"batch-0000000000\.safetensors holds no progress"):
        long_run(sample, tmp_path)
    files[0].unlink()
    long_run(sample, tmp_path)
    with pytest.raises(ValueError, match="function 'sampling'; now it is 'inverting'"):
        long_run(invert, tmp_path)


def test_resume_needs_noise_that_comes_again(tmp_path):
    for generator in (None, torch.Generator()):
        with pytest.raises(ValueError, match=r"resume with eta 1\.0 needs.*seed=0"):
            sample(Denoiser(), noises(), SCHEDULE, 3, eta=1.0, generator=generator, resume=tmp_path)


# Compiled models


@pytest.mark.parametrize("function", [sample, invert])
def test_one_compilation_for_all_steps(function, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, modes, compile = CompileCounter(), [], torch.compile

    def counted(model, *, mode):
        modes.append(mode)
        return compile(model, backend=counter, fullgraph=True)

    def model(x, t, label):
        return torch.sin(x) * t.reshape(-1, 1, 1, 1) / 1000 + label.reshape(-1, 1, 1, 1)

    label = torch.arange(6.0)
    plain = function(model, noises(n=6), SCHEDULE, 12, cond={"label": label}, batch_size=2)
    monkeypatch.setattr(torch, "compile", counted)
    for given, mode in ((True, None), ("max-autotune", "max-autotune")):
        result = function(model, noises(n=6), SCHEDULE, 12, cond={"label": label}, batch_size=2, compile=given)
        assert torch.equal(result, plain)
        assert modes.pop() == mode
    assert counter.frame_count == 1
    strided = noises(n=6).movedim(0, -1).contiguous().movedim(-1, 0)
    function(model, strided, SCHEDULE, 12, cond={"label": label}, batch_size=2, compile=True)
    assert counter.frame_count == 2


# CUDA graphs


class Recorder(TorchDispatchMode):
    """Stands in for a capture: what ran runs again on the same memory, with the same numbers from Python."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a value was read on the host"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorders(monkeypatch):
    """The captures that were made, on a stand-in for the GPU."""
    made = []

    def capture(work, device):
        made.append(Recorder())
        with made[-1]:
            work()
        return made[-1].replay

    monkeypatch.setattr(loop, "check_graph", lambda *_: None)
    monkeypatch.setattr(loop, "warm_up", lambda work, device: work())
    monkeypatch.setattr(loop, "capture", capture)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 1.0, "seed": (5, 7)},
        {"known": images(n=8), "mask": HALF, "clip_range": 1.0},
        {"cond": {"shift": torch.arange(8.0)}, "uncond": {"shift": -torch.arange(8.0)}, "guidance_scale": 2.0,
         "guidance_rescale": 0.5, "eta": 0.3, "seed": 1},
        {"clip_range": 0.5, "prediction_type": "sample"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_graph_replays_every_batch_on_its_own_numbers(options, recorders):
    def model(x, t, shift=None):
        return Denoiser(options.get("prediction_type", "epsilon"))(x, t) + (
            0 if shift is None else shift.reshape(-1, 1, 1, 1) / 8
        )

    noise = noises(n=8)
    expected = sample(model, noise, SCHEDULE, 4, **options)
    result = sample(model, noise, SCHEDULE, 4, batch_size=3, cuda_graph=True, **options)
    assert torch.equal(result, expected)
    assert torch.equal(noise, noises(n=8))
    assert torch.equal(options.get("known", images(n=8)), images(n=8))
    assert [recorder.replays for recorder in recorders] == [2]  # batches of 3 (the warm-up), 3 and 2
    names = [str(call[0]) for call in recorders[0].calls]
    assert sum("ddim_step" in name for name in names) >= 4
    assert not any("ddim_coefficients" in name for name in names[names.index(next(n for n in names if "step" in n)) :])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_by_graph(kind, recorders, tmp_path):
    pytest.importorskip("safetensors")
    arguments = {"prediction_type": kind, "batch_size": 2}
    expected = invert(Denoiser(kind), images(n=7), SCHEDULE, 4, **arguments)
    for _ in range(2):  # the second time from the folder
        result = invert(Denoiser(kind), images(n=7), SCHEDULE, 4, cuda_graph=True, resume=tmp_path, **arguments)
        assert torch.equal(result, expected)
    assert [recorder.replays for recorder in recorders] == [3]


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        (sample, {}, "cuda_graph was asked for on cpu"),
        (invert, {}, "cuda_graph was asked for on cpu"),
        (sample, {"eta": 1.0}, "cuda_graph with eta 1.0 needs"),
        (invert, {"fixed_point": 3}, "cuda_graph and fixed_point"),
    ],
)
def test_graph_refuses(function, arguments, says):
    with pytest.raises(ValueError, match=says):
        function(Denoiser(), noises(), SCHEDULE, 3, cuda_graph=True, **arguments)


def test_graph_refuses_what_needs_python():
    device = torch.device("cuda")
    with pytest.raises(ValueError, match="a callback and cuda_graph"):
        loop.check_graph(device, lambda *_: None, False)
    with pytest.raises(ValueError, match="progress and cuda_graph"):
        loop.check_graph(device, None, True)
    loop.check_graph(device, None, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (invert, {}),
        (sample, {}),
        (sample, {"eta": 1.0, "seed": 9, "known": torch.rand(10, 3, 8, 8), "mask": torch.rand(8, 8) > 0.5}),
        (sample, {"guidance_scale": 2.0, "uncond": {"label": torch.zeros(10, 3, 1, 1)}, "guidance_rescale": 0.5}),
        (sample, {"dynamic_threshold": 0.9}),
    ],
    ids=["invert", "plain", "seed-known", "guidance", "dynamic_threshold"],
)
def test_graph_on_the_gpu(function, options):
    net = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3, padding=1)]
    net = torch.nn.Sequential(*net).cuda().eval()

    def model(x, t, label):
        return net(x + label) * (t.reshape(-1, 1, 1, 1) / 1000)

    def run(**more):
        label = torch.linspace(-1, 1, 30).reshape(10, 3, 1, 1)
        common = {"cond": {"label": label}, "batch_size": 3, "device": "cuda", **options, **more}
        noise = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        return function(model, noise, SCHEDULE, 5, **common)

    result = run(cuda_graph=True)
    torch.testing.assert_close(result, run(), rtol=1e-3, atol=1e-3)  # a convolution may choose another algorithm
    assert torch.equal(run(cuda_graph=True), result)


# Fixed-point inversion


def gain(steps):
    """How much a change of the noise changes the image; the sampling map is affine."""
    if not steps:
        return 1.0
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = direct(ends, steps).tolist()
    return high - low


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("count", [5, 20])
def test_fixed_point_is_the_inverse_of_sampling(kind, count):
    steps, residuals = timesteps(count, 1000), []
    result = invert(
        Denoiser(kind), images(), SCHEDULE, count, fixed_point=200, prediction_type=kind,
        callback=lambda number, t, step: residuals.append(step.residual)
    )  # fmt: skip
    expected = (images() - direct(torch.zeros(1, dtype=torch.float64), steps)) / gain(steps)
    # Some units lost at each step, at the size of its terms (1 / √ᾱ of the last is 160), which 1 / gain < 3 carries up.
    unit = torch.finfo(torch.float64).eps
    scale = 160 if kind == "sample" else 8
    assert ((result - expected).abs() <= 3 * scale * count * unit * expected.abs().max()).all()
    assert torch.stack(residuals).shape == (count, 4)
    assert torch.stack(residuals).max() <= scale * unit * expected.abs().max()
    back = sample(Denoiser(kind), result, SCHEDULE, count, prediction_type=kind)
    assert ((back - images()).abs() <= 200 * count * unit * expected.abs().max()).all()
    plain = invert(Denoiser(kind), images(), SCHEDULE, count, prediction_type=kind)
    assert (plain - expected).abs().max() > 1e-2


def test_residuals_bound_the_round_trip():
    steps, residuals, tolerance = timesteps(10, 1000), {}, 1e-3
    alphas = {-1: 1.0, **dict(enumerate(SCHEDULE.alphas_cumprod.tolist()))}
    noise = invert(
        Denoiser(), images(), SCHEDULE, 10, fixed_point=50, tolerance=tolerance,
        callback=lambda number, t, step: residuals.setdefault(t, step.residual)
    )  # fmt: skip
    error = (sample(Denoiser(), noise, SCHEDULE, 10) - images()).flatten(1).square().mean(1).sqrt()
    bound = torch.zeros(4, dtype=torch.float64)
    for number, t in enumerate(steps):
        below = steps[number + 1 :]
        # What x_t lacks of solving its step, taken down to the next timestep and from there to the image.
        bound += residuals[t] * (alphas[below[0] if below else -1] / alphas[t]) ** 0.5 * gain(below)
    assert (error <= bound + 1e-12).all()
    assert (error >= 0.01 * bound).all()
    assert 0.01 * tolerance < max(map(torch.max, residuals.values())) <= tolerance


def test_residual_is_measured_where_it_is_returned():
    def model(x, t):
        return torch.sin(3 * x)

    seen, x = [], images()
    invert(model, x, SCHEDULE, 4, fixed_point=2, callback=lambda number, t, step: seen.append((t, step)))
    alphas, now = SCHEDULE.alphas_cumprod, -1
    for t, step in seen:
        a, b = (torch.tensor(1.0) if now < 0 else alphas[now]), alphas[t]
        e = model(step.prev_sample, t)
        again = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        expected = (again - step.prev_sample).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(step.residual, expected, rtol=1e-9, atol=1e-12)
        assert step.residual.min() > 1e-4
        x, now = step.prev_sample, t


def test_one_iteration_measures_the_plain_inversion():
    seen = []
    result = invert(
        Denoiser(), images(), SCHEDULE, 5, fixed_point=1, callback=lambda number, t, step: seen.append(step.residual)
    )
    assert torch.equal(result, invert(Denoiser(), images(), SCHEDULE, 5))
    assert torch.stack(seen).min() > 1e-3


@pytest.mark.parametrize("strength", [1.0, 40.0])
def test_fixed_point_is_never_worse_and_a_sample_is_on_its_own(strength):
    """The stronger model does not contract."""

    def model(x, t):  # a triangle wave: its operations are exact on any vector unit
        return ((strength * x) % 4 - 2).abs() - 1

    def run(image, most):
        seen = []
        result = invert(model, image, SCHEDULE, 3, fixed_point=most, callback=lambda number, t, step: seen.append(step))
        return result, seen

    # From the same x, as after the first step they are not.
    image = images() * torch.tensor([1.0, 1e-3, 1e3, 1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    (_, plain), (result, solved) = run(image, 1), run(image, 30)
    assert (solved[0].residual <= plain[0].residual).all()
    assert (solved[0].residual < plain[0].residual).any()
    assert result.isfinite().all()
    assert torch.equal(torch.cat([run(one, 30)[0] for one in image.split(1)]), result)
    if strength > 1:
        assert solved[0].residual.max() > 0.1


def test_tolerance_spares_calls():
    def calls(**options):
        model = Counted()
        invert(model, images(), SCHEDULE, 10, **options)
        return model.calls

    assert calls() == 10
    assert calls(fixed_point=1) == 20
    assert calls(fixed_point=3) == 40
    assert calls(fixed_point=1000, tolerance=10.0) == 20
    assert (
        20 < calls(fixed_point=1000, tolerance=1e-4) < calls(fixed_point=1000, tolerance=1e-8) < calls(fixed_point=1000)
    )
    assert calls(fixed_point=1000) < 1000  # round-off falls no further


def test_fixed_point_under_guidance_and_rescale():
    def model(x, t, label):
        return torch.tanh(x * label.reshape(-1, 1, 1, 1)) + 0.1 * x.mean((1, 2, 3), keepdim=True)

    for kind in ("epsilon", "v_prediction"):
        arguments = {
            "cond": {"label": torch.full((4,), 0.5, dtype=torch.float64)}, "prediction_type": kind,
            "uncond": {"label": torch.full((4,), 0.4, dtype=torch.float64)}, "guidance_scale": 1.5,
            "guidance_rescale": 0.6
        }  # fmt: skip
        noise = invert(model, images(), SCHEDULE, 20, fixed_point=200, **arguments)
        error = (sample(model, noise, SCHEDULE, 20, **arguments) - images()).abs().max()
        plain = invert(model, images(), SCHEDULE, 20, **arguments)
        assert error < 1e-11
        assert (sample(model, plain, SCHEDULE, 20, **arguments) - images()).abs().max() > 1e-3
        without = {key: value for key, value in arguments.items() if key != "guidance_rescale"}
        assert (sample(model, noise, SCHEDULE, 20, **without) - images()).abs().max() > 1e-3


def test_fixed_point_of_nan_is_not_solved():
    seen = []
    result = invert(
        lambda x, t: x * torch.tensor([1.0, float("nan")]).reshape(2, 1), torch.ones(2, 3), SCHEDULE, 1, fixed_point=5,
        callback=lambda number, t, step: seen.append(step.residual)
    )  # fmt: skip
    assert result[0].isfinite().all()
    assert result[1].isnan().all()
    assert seen[0][0].isfinite()
    assert seen[0][1] == float("inf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fixed_point": -1}, "fixed_point is -1"),
        ({"fixed_point": 1, "tolerance": -1.0}, "tolerance is -1.0"),
        ({"fixed_point": 1, "tolerance": float("nan")}, "tolerance is nan"),
        ({"guidance_rescale": 0.5}, "guidance_rescale was given without"),
        ({"guidance_rescale": 2.0, "guidance_scale": 1.0, "uncond": {}}, "guidance_rescale is 2.0"),
    ],
)
def test_invert_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        invert(Denoiser(), images(), SCHEDULE, 3, **arguments)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_fixed_point_returns_from_pure_noise(kind):
    """There the noise is the sample itself whatever the model says, so only the image can be solved for."""
    schedule = SCHEDULE.zero_terminal_snr()

    def model(x, t):
        return 0.1 * torch.tanh(x)

    x, residuals = images(), []
    options = {"prediction_type": kind}
    noise = invert(
        *(model, x, schedule, 5),
        **options,
        fixed_point=200,
        callback=lambda number, t, step: residuals.append(float(step.residual.max())),
    )
    back = sample(model, noise, schedule, 5, **options)
    if max(residuals) < 1e-13:
        assert (back - x).abs().max() < 1e-11
    assert residuals[-1] < 1e-13
    assert not torch.equal(invert(model, x, schedule, 5, **options), noise)


def test_pure_noise_that_cannot_be_inverted_is_refused():
    schedule = SCHEDULE.zero_terminal_snr()
    with pytest.raises(ValueError, match="timestep 999 has cumulative alpha 0"):
        invert(Denoiser(), images(), schedule, 5)
    with pytest.raises(ValueError, match="the only step goes from the image to timestep 999"):
        invert(Denoiser("v_prediction"), images(), schedule, 1, prediction_type="v_prediction")


@pytest.mark.parametrize("call", [sample, invert])
def test_wrong_schedules_and_counts_are_named(call):
    with pytest.raises(TypeError, match="schedule is a int; give a DDIMSchedule"):
        call(Denoiser(), images(), 5, 5)
    with pytest.raises(TypeError, match=r"num_steps is 5\.0; give an int"):
        call(Denoiser(), images(), SCHEDULE, 5.0)
