"""pf.diffusion against closed forms: the exact denoiser of a normal distribution is linear, and so is its DDIM map."""

import sys
from itertools import pairwise

import pytest
import torch

import protofast as pf
from protofast.diffusion import add_noise, invert, sample, timesteps

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
    assert capsys.readouterr().out == ""
    pytest.importorskip("rich")
    assert torch.equal(sample(Denoiser(), noises(), SCHEDULE, 4, progress=True), plain)
    assert "sampling" in capsys.readouterr().out
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
