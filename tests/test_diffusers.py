"""The schedulers against diffusers' own: bit for bit over every option, and image for image in real pipelines."""

import copy
import functools
import inspect
import itertools
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.errors import assert_within, exact, unit
from torch.utils._python_dispatch import TorchDispatchMode

import protofast as pf

diffusers = pytest.importorskip("diffusers")
fused = pf.diffusers

OPS = ("ddim_step",)
BETAS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.geomspace(1e-3, 0.3, 50).tolist()},
}
CLIPS = [
    {"clip_sample": False},
    {"clip_sample_range": 0.7},
    {"thresholding": True, "clip_sample": False},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
]
STRIDES = {"native": 1, "reference": 5, "triton": 63}
"""Which part of the grids a backend is tested on; that all have the same bits is tested where the op is."""
PAIRS = [
    (diffusers.DDIMScheduler, fused.DDIMScheduler),
    (diffusers.DDIMInverseScheduler, fused.DDIMInverseScheduler),
]


def both(pair=PAIRS[0], steps=4, **config):
    theirs, ours = (cls(**{"num_train_timesteps": 50, **config}) for cls in pair)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
    return theirs, ours


def draw(*shape, dtype=torch.float32, device="cpu", count=2):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def same(actual, expected):
    """Whether every bit is the same; a NaN is a NaN."""
    actual, expected = (
        torch.stack(tuple(pair)) if isinstance(pair, (tuple, list)) else pair for pair in (actual, expected)
    )
    assert actual.dtype == expected.dtype
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    actual = actual.cpu()
    alike = actual.contiguous().view(whole) == expected.contiguous().view(whole)
    return bool((alike | (actual.isnan() & expected.isnan())).all())


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_option_bit_for_bit(backend, device, spacing, kind):
    ways = itertools.cycle([int, torch.tensor, np.int64, lambda t: torch.tensor([t], dtype=torch.int16)])
    inputs = {dtype: draw(4, 2, 3, 3, dtype=dtype, count=3) for dtype in (torch.float32, torch.float64)}
    grid = itertools.product(CLIPS, BETAS.values(), (True, False), (0, 1), (True, False))
    grid = itertools.islice(grid, 0, None, STRIDES[backend])
    for number, (clip, betas, to_one, offset, zero_snr) in enumerate(grid):
        theirs, ours = both(
            prediction_type=kind,
            timestep_spacing=spacing,
            set_alpha_to_one=to_one,
            steps_offset=offset,
            rescale_betas_zero_snr=zero_snr,
            **clip,
            **betas,
        )
        assert torch.equal(theirs.timesteps, ours.timesteps)
        dtype = (torch.float32, torch.float32, torch.float64)[number % 3]
        x, m, z = inputs[dtype]
        for eta, clipped in itertools.product((0.0, 0.4, 1.0), (False, True)):
            options = {"eta": eta, "use_clipped_model_output": clipped, "return_dict": False}
            noise, there = (z, z.to(device)) if eta else (None, None)
            expected, found = [], []
            with pf.use_backend(backend):
                for t in theirs.timesteps.tolist():
                    expected += theirs.step(m, t, x, variance_noise=noise, **options)
                    found += ours.step(m.to(device), next(ways)(t), x.to(device), variance_noise=there, **options)
                # Sample i at timestep i, which diffusers does not take.
                each = theirs.timesteps.to(device)
                found += ours.step(m.to(device), each, x.to(device), variance_noise=there, **options)
            for part in (0, 1):
                expected.append(torch.stack([expected[2 * i + part][i] for i in range(4)]))
            assert same(found, expected), (clip, betas, to_one, offset, zero_snr, dtype, options)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_option_of_the_inverse_bit_for_bit(backend, device, kind):
    grid = itertools.product(
        CLIPS[:2], BETAS.values(), (True, False), (0, 1), (True, False), ("leading", "trailing"), (4, 7)
    )
    grid = itertools.islice(grid, 0, None, STRIDES[backend])
    for number, (clip, betas, to_one, offset, zero_snr, spacing, steps) in enumerate(grid):
        theirs, ours = both(
            PAIRS[1],
            steps,
            prediction_type=kind,
            timestep_spacing=spacing,
            set_alpha_to_one=to_one,
            steps_offset=offset,
            rescale_betas_zero_snr=zero_snr,
            **clip,
            **betas,
        )
        assert torch.equal(theirs.timesteps, ours.timesteps)
        x, m = draw(steps, 2, 3, dtype=(torch.float32, torch.float64)[number % 2])
        with pf.use_backend(backend):
            each = ours.step(m.to(device), theirs.timesteps.to(device), x.to(device), return_dict=False)
            for i, t in enumerate(theirs.timesteps):
                expected = theirs.step(m, t, x, return_dict=False)
                assert same(ours.step(m.to(device), t, x.to(device), return_dict=False), expected)
                assert same([part[i] for part in each], [part[i] for part in expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_half_precision_is_float32_rounded_once(backend, device, kind, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off bfloat16 where a GPU rounds")
    x, m, z = draw(3, 2, 9, dtype=dtype, count=3)
    wide = [tensor.float() for tensor in (x, m, z)]
    for clip, eta in itertools.product(CLIPS[:2], (0.0, 0.6)):
        theirs, ours = both(prediction_type=kind, **clip)
        options = {"eta": eta, "return_dict": False}
        for t in (49, 25, 3):
            more = [{"variance_noise": noise} if eta else {} for noise in (z.to(device), wide[2], z)]
            with pf.use_backend(backend):
                found = ours.step(m.to(device), t, x.to(device), **options, **more[0])
            once = theirs.step(wide[1], t, wide[0], **options, **more[1])
            assert same(found, [part.to(dtype) for part in once])
            # diffusers rounds every product, sum, root and quotient on the way: nine for the longest path.
            rough = theirs.step(m, t, x, **options, **more[2])
            now, prev = (float(alpha) for alpha in (theirs.alphas_cumprod[t], theirs.alphas_cumprod[max(t - 12, 0)]))
            size = 1 + abs(exact(x)) + abs(exact(m)) + (abs(exact(z)) if eta else 0)
            terms = size * (1 / math.sqrt(now) + 1 / math.sqrt(1 - now) + 1 / math.sqrt(prev))
            for ours_is, theirs_is in zip(found, rough, strict=True):
                assert_within(theirs_is, exact(ours_is), terms, 9 * unit(dtype) / unit(torch.float32))


def test_thresholds_of_half_precision():
    x, m = draw(3, 2, 50, dtype=torch.bfloat16)
    theirs, ours = both(thresholding=True, sample_max_value=3.0)
    for t in (40, 20):
        once = theirs.step(m.float(), t, x.float(), return_dict=False)
        found = ours.step(m, t, x, return_dict=False)
        # The threshold comes from the image as it is stored; beside the rounding of the result that is one more.
        for actual, expected in zip(found, once, strict=True):
            assert_within(actual, exact(expected), 2 + abs(exact(m)), unit(torch.bfloat16) / unit(torch.float32))


def test_the_fast_mode_is_closer_to_exact():
    """Against the formula in float64, on the alphas as they are."""
    for eta, t in itertools.product((0.0, 1.0), (490, 30)):
        theirs, ours = both(num_train_timesteps=500, steps=50, clip_sample=False)
        ours.bitwise = False
        x, m, z = draw(2, 500, count=3)
        now, prev = (theirs.alphas_cumprod[i].double() for i in (t, t - 10))
        sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)).sqrt()
        x0 = (x.double() - (1 - now).sqrt() * m.double()) / now.sqrt()
        want = prev.sqrt() * x0 + (1 - prev - sigma**2).sqrt() * m.double() + sigma * z.double()
        options = {"eta": eta, "variance_noise": z if eta else None, "return_dict": False}
        errors = [(s.step(m, t, x, **options)[0].double() - want).abs().mean() for s in (ours, theirs)]
        assert errors[0] < errors[1]
        terms = abs(exact(x / now.sqrt())) + abs(exact(m / now.sqrt())) + abs(exact(m)) + abs(exact(z))
        assert_within(ours.step(m, t, x, **options)[0], exact(want), terms, 4)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16", "float32"), ("float64", "float32")], ids=str)
def test_mixed_dtypes_are_promoted(dtypes):
    theirs, ours = both(clip_sample=False)
    a, b = (getattr(torch, name) for name in dtypes)
    x, m = draw(2, 5)
    x, m = x.to(a), m.to(b)
    expected = theirs.step(m, 25, x)
    found = ours.step(m, 25, x)
    assert found.prev_sample.dtype == expected.prev_sample.dtype == torch.promote_types(a, b)
    wide = theirs.step(m.to(found.prev_sample.dtype), 25, x.to(found.prev_sample.dtype))
    assert same(found.prev_sample, wide.prev_sample)


def test_shapes_broadcast_as_in_diffusers():
    theirs, ours = both()
    x, _ = draw(1, 3, 4)
    m, z = draw(2, 3, 4)
    for a, b in ((m, x), (x, m)):
        options = {"eta": 0.5, "variance_noise": z[:1], "return_dict": False}
        assert same(ours.step(a, 25, b, **options), theirs.step(a, 25, b, **options))


@pytest.mark.parametrize("generators", ["global", "one", "list"])
def test_noise_is_drawn_as_diffusers_draws_it(generators):
    theirs, ours = both()
    x, m = draw(2, 3, 4)

    def run(scheduler, eta):
        torch.manual_seed(5)
        given = {
            "global": None,
            "one": torch.Generator().manual_seed(1),
            "list": [torch.Generator().manual_seed(i) for i in (1, 2)],
        }[generators]
        result = scheduler.step(m, 25, x, eta=eta, generator=given)
        return result.prev_sample, torch.rand(1)  # the state that is left shows how much was drawn

    for eta in (0.0, 0.7):
        (found, left), (expected, left_by_theirs) = run(ours, eta), run(theirs, eta)
        assert same(found, expected)
        assert torch.equal(left, left_by_theirs)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        ours.step(m, 25, x, eta=0.5, generator=torch.Generator(), variance_noise=x)


def test_results_are_diffusers_outputs():
    for pair in PAIRS:
        theirs, ours = both(pair)
        x, m = draw(2, 3)
        expected, found = theirs.step(m, 25, x), ours.step(m, 25, x)
        assert type(found) is type(expected)
        assert same(found.pred_original_sample, expected.pred_original_sample)
        assert type(ours.step(m, 25, x, return_dict=False)) is tuple
        for method in ("step", "__init__"):
            ours_has, theirs_has = (inspect.signature(getattr(cls, method)).parameters for cls in reversed(pair))
            assert list(ours_has) == list(theirs_has)
            assert [p.default for p in ours_has.values()] == [p.default for p in theirs_has.values()]


def test_gradients(backend, device):
    theirs, ours = both(clip_sample_range=0.8)
    values = draw(3, 4, 5, dtype=torch.float64, count=3)
    with torch.inference_mode():  # what is kept has to serve gradients too
        ours.step(values[1].to(device), 25, values[0].to(device), eta=0.5)
    weights = draw(3, 4, 5, dtype=torch.float64)

    def gradients(scheduler, device):
        x, m, z = (value.to(device).requires_grad_() for value in values)
        result = scheduler.step(m, 25, x, eta=0.5, variance_noise=z, return_dict=False)
        loss = sum((part * weight.to(device)).sum() for part, weight in zip(result, weights, strict=True))
        return [grad.cpu() for grad in torch.autograd.grad(loss, (x, m, z))]

    with pf.use_backend(backend):
        found = gradients(ours, device)
    for actual, expected in zip(found, gradients(theirs, "cpu"), strict=True):
        assert_within(actual, exact(expected), 10 * sum(abs(exact(w)) for w in weights), 20)


def test_noising_is_diffusers():
    theirs, ours = both()
    x, z = draw(3, 4)
    t = torch.tensor([0, 25, 49])
    before = ours.step(z, 25, x).prev_sample
    assert same(ours.add_noise(x, z, t), theirs.add_noise(x, z, t))
    assert same(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t))
    kept = ours._kept
    ours.add_noise(x, z, t)
    assert ours._kept is kept  # inpainting noises at every step
    assert kept
    assert same(ours.step(z, 25, x).prev_sample, before)


CHANGES = {
    "config": lambda s: s.register_to_config(prediction_type="v_prediction"),
    "config in place": lambda s: setattr(s.config, "prediction_type", "sample"),
    "clip range": lambda s: setattr(s.config, "clip_sample_range", 0.3),
    "train timesteps": lambda s: setattr(s.config, "num_train_timesteps", 30),
    "alphas": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9),
    "alphas in place": lambda s: s.alphas_cumprod.mul_(0.9),
    "end": lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.9999)),
    "steps": lambda s: setattr(s, "num_inference_steps", 10),
    "set_timesteps": lambda s: s.set_timesteps(10),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_later_counts(change):
    theirs, ours = both()
    x, m = draw(2, 5)
    for t in (torch.tensor([25, 3]), 25, 3):
        ours.step(m, t, x)
    for scheduler in (theirs, ours):
        CHANGES[change](scheduler)
    expected = [theirs.step(m, t, x).prev_sample for t in (25, 3)]
    for t, result in zip((25, 3), expected, strict=True):
        assert same(ours.step(m, t, x).prev_sample, result)
    each = torch.stack([result[i] for i, result in enumerate(expected)])
    assert same(ours.step(m, torch.tensor([25, 3]), x).prev_sample, each)


def test_changes_of_the_settings_count():
    _, ours = both(clip_sample=False, timestep_spacing="linspace")
    x, m = draw(2, 500)
    first = ours.step(m, 33, x).prev_sample
    ours.bitwise = False
    second = ours.step(m, 33, x).prev_sample
    ours.follow_timesteps = True
    third = ours.step(m, 33, x).prev_sample
    ours.timesteps = torch.tensor([49, 33, 30])
    fourth = ours.step(m, 33, x).prev_sample
    assert not torch.equal(first, second)
    assert (first - second).abs().max() < 1e-5
    assert (second - third).abs().max() > 1e-3
    assert (third - fourth).abs().max() > 1e-3


def test_plans_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(fused, "_MANY", 8)
    theirs, ours = both()
    x, m, z = draw(2, 5, count=3)
    for eta in torch.linspace(0.1, 1, 20).tolist():
        options = {"eta": eta, "variance_noise": z, "return_dict": False}
        assert same(ours.step(m, 25, x, **options), theirs.step(m, 25, x, **options))
        assert len(ours._kept) <= 8


def strided(theirs, m, t, x, lower):
    """diffusers' step to the timestep `lower`: its own is T // n away."""
    theirs.num_inference_steps = 1
    theirs.register_to_config(num_train_timesteps=t - lower)
    return theirs.step(m, t, x).prev_sample


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_following_the_timesteps(spacing):
    theirs, ours = both(timestep_spacing=spacing, steps=7)
    x, m = draw(7, 5)
    listed = [*ours.timesteps.tolist(), -1]
    default = [ours.step(m, t, x).prev_sample for t in listed[:-1]]
    ours.follow_timesteps = True
    expected = [strided(theirs, m, t, x, lower) for t, lower in itertools.pairwise(listed)]
    found = [ours.step(m, t, x).prev_sample for t in listed[:-1]]
    assert all(map(same, found, expected))
    # Issue 11347: with these two, diffusers' step does not end where the next begins.
    assert all(map(same, found, default)) == (spacing == "leading")
    each = ours.step(m, ours.timesteps, x).prev_sample
    assert same(each, torch.stack([result[i] for i, result in enumerate(expected)]))
    between = ours.step(m, 30, x).prev_sample  # not in the list: down to the next lower that is
    assert same(between, strided(theirs, m, 30, x, max(t for t in listed if t < 30)))


@pytest.mark.parametrize("give", [list, tuple, np.array, torch.tensor], ids=lambda give: give.__name__)
def test_custom_timesteps(give):
    theirs, ours = both()
    x, m = draw(2, 5)
    listed = [49, 20, 19, 3]
    ours.set_timesteps(timesteps=give(listed))
    assert ours.timesteps.tolist() == listed
    assert ours.timesteps.dtype == torch.int64
    assert ours.num_inference_steps == 4
    for t, lower in itertools.pairwise([*listed, -1]):
        assert same(ours.step(m, t, x).prev_sample, strided(copy.deepcopy(theirs), m, t, x, lower))
    ours.set_timesteps(4)
    assert same(ours.step(m, 20, x).prev_sample, theirs.step(m, 20, x).prev_sample)


def test_inversion_follows_timesteps_too():
    _, down = both(clip_sample=False)
    _, up = both(PAIRS[1], clip_sample=False)
    down.set_timesteps(timesteps=[49, 20, 19, 3])
    up.set_timesteps(timesteps=[3, 19, 20, 49])
    x, m = draw(2, 5, dtype=torch.float64)
    here = x
    for t in up.timesteps:
        here = up.step(m, t, here).prev_sample
    assert (here - x).abs().max() > 0.1
    for t in down.timesteps:
        here = down.step(m, t, here).prev_sample
    torch.testing.assert_close(here, x)  # rounding alone: the same straight line both ways


def test_timesteps_that_are_none():
    """diffusers' rounding adds a timestep −1, which its step takes for the last of the schedule."""
    for pair in PAIRS:
        theirs, ours = both(pair, 61, num_train_timesteps=1000, timestep_spacing="trailing")
        assert -1 in theirs.timesteps
        assert len(ours.timesteps) == 61
        assert ours.timesteps.tolist() == [t for t in theirs.timesteps.tolist() if t != -1]
    every = [both(steps=n, timestep_spacing="trailing")[1].timesteps for n in range(1, 51)]
    assert [len(listed) for listed in every] == list(range(1, 51))


def options_of(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_files_and_configurations_are_diffusers(pair, tmp_path):
    config = {"steps_offset": 1, "clip_sample": False, "trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}
    theirs, ours = (cls(**config) for cls in pair)
    ours.bitwise, ours.follow_timesteps = False, True
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / who / "scheduler_config.json").read_text() for who in ("theirs", "ours")]
    assert files[0] == files[1]  # the name of the class too, so that either loads either
    for cls in pair:
        for who in ("theirs", "ours"):
            loaded = cls.from_pretrained(tmp_path / who)
            assert type(loaded) is cls
            assert options_of(loaded) == options_of(theirs)
            assert torch.equal(loaded.alphas_cumprod, theirs.alphas_cumprod)
    assert options_of(pair[0].from_config(ours.config)) == options_of(theirs)
    assert options_of(pair[1].from_config(theirs.config)) == options_of(theirs)
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert len(ours) == len(theirs) == 3


def test_configurations_of_other_schedulers():
    ddpm = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", variance_type="fixed_large", timestep_spacing="trailing"
    )
    theirs, ours = (cls.from_config(ddpm.config) for cls in PAIRS[0])
    assert options_of(theirs) == options_of(ours)
    back = diffusers.DDPMScheduler.from_config(ours.config)
    assert back.config.variance_type == "fixed_large"
    up = fused.DDIMInverseScheduler.from_config(ours.config)
    assert torch.equal(up.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies(duplicate):
    theirs, ours = both()
    x, m = draw(2, 5)
    size = len(pickle.dumps(ours))
    ours.step(m, 25, x)
    assert len(pickle.dumps(ours)) == size  # tables, which may lie on a GPU, stay here
    copied = duplicate(ours)
    copied.alphas_cumprod.mul_(0.9)
    theirs.alphas_cumprod.mul_(0.9)
    assert same(copied.step(m, 25, x).prev_sample, theirs.step(m, 25, x).prev_sample)


class _Dispatched(TorchDispatchMode):
    """Which operations torch runs on the meta device, and what it copies there."""

    def __init__(self):
        super().__init__()
        self.names, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = any(isinstance(arg, torch.Tensor) and arg.is_meta for arg in args)
        if there:
            self.names.append(str(func))
        elif kwargs and str(kwargs.get("device")) == "meta" and isinstance(args[0], torch.Tensor):
            self.copies.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bitwise", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_reads_nothing_on_the_host(pair, eta, bitwise):
    """On the meta device, which has no values that could be read."""
    _, ours = both(pair)
    ours.bitwise = bitwise
    if pair is PAIRS[0]:
        ours.register_to_config(thresholding=True)
    ours.set_timesteps(4, device="meta")
    x, m = draw(3, 4, 5, device="meta")
    options = {"eta": eta} if pair is PAIRS[0] else {}
    ways = [25, np.int64(25), torch.tensor(25), torch.tensor([25, 3, 49])]
    ways += [ours.timesteps[0], torch.tensor([25, 3, 49], dtype=torch.int32, device="meta")]
    for follow in (False, True):
        ours.follow_timesteps = follow
        for again, t in itertools.product(("first", "second"), ways):
            with _Dispatched() as ran:
                result = ours.step(m, t, x, **options)
            assert result.prev_sample.is_meta
            assert "protofast.ddim_step" in " ".join(ran.names)
            assert "aten._local_scalar_dense.default" not in ran.names
            if again == "second":  # then there is a table, and all that is copied are the host's own timesteps
                assert not any("coefficients" in name for name in ran.names)
                assert all(copied is t for copied in ran.copies)


def test_timesteps_of_the_device_are_not_looked_at():
    """Those outside give NaN. The CPU is told in place of a GPU that it cannot look."""
    _, ours = both()
    x, m = draw(4, 5)
    table, row = ours._plan(None, 0.0, False, 1.0, x.device), torch.tensor([-1, 0, 49, 50])
    prev = pf.ddim.run_plan(x, m, (table[0], row, *table[2:]), {})[0]
    assert prev.isnan().all(1).tolist() == [True, False, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_never_waits_for_a_gpu(pair):
    _, ours = both(pair)
    x, m = draw(3, 4, 5, device="cuda")
    ours.set_timesteps(4, device="cuda")
    each = torch.tensor([25, 3, 49], device="cuda")
    options = {"eta": 0.5} if pair is PAIRS[0] else {}
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in (25, torch.tensor(25), ours.timesteps[0], each, torch.tensor([25, 3, 49])):
            ours.step(m, t, x, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_compiles_without_a_break(pair, eta, return_dict):
    theirs, ours = both(pair, timestep_spacing="trailing")
    x, m, z = draw(2, 3, 4, count=3)
    options = {"eta": eta, "variance_noise": z if eta else None} if pair is PAIRS[0] else {}
    graphs = []

    def compiler(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    def step(m, t, x):
        result = ours.step(m, t, x, return_dict=return_dict, **options)
        return (result.prev_sample, result.pred_original_sample) if return_dict else result

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for t in (49, 37, 25, 12, 3):
        expected = theirs.step(m, t, x, return_dict=False, **options)
        assert same(compiled(m, t, x), expected)
        assert same(compiled(m, torch.tensor(t), x), expected)
        assert same(ours.step(m, t, x, return_dict=False, **options), expected)  # eager steps between do not disturb it
    assert len(graphs) == 3  # an int, any int, a tensor
    each = compiled(m, torch.tensor([25, 12]), x)
    assert same(each, ours.step(m, torch.tensor([25, 12]), x, return_dict=False, **options))
    # The table of alphas is not made anew in the graph: that would copy it to the device at every step.
    assert all("cat" not in name for names in graphs for name in names)


def test_errors():
    _, ours = both()
    x, m = draw(2, 5)
    for _, cls in PAIRS:
        with pytest.raises(ValueError, match="set_timesteps"):
            cls().step(m, 25, x)
    for t in (-1, 50, np.int64(50), torch.tensor(-1), torch.tensor([3, 50]), torch.tensor([-1, 3], dtype=torch.int8)):
        with pytest.raises(IndexError, match=r"timestep .* 0 to 49"):
            ours.step(m, t, x)
    for t in (2.5, "25", None, torch.tensor(2.5), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="timestep"):
            ours.step(m, t, x)
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\)"):
        ours.step(m, torch.tensor([1, 2, 3]), x)
    with pytest.raises(ValueError, match="model_output has shape"):
        ours.step(m[:, :2], 25, x)
    with pytest.raises(ValueError, match=r"variance_noise|noise has shape"):
        ours.step(m, 25, x, eta=0.5, variance_noise=x[:, :2])
    for args, name in (
        ((SimpleNamespace(sample=m), x), "model_output"),
        ((m, x.long()), "sample"),
        ((m, [1]), "sample"),
    ):
        with pytest.raises(TypeError, match=name):
            ours.step(args[0], 25, args[1])
    with pytest.raises(TypeError, match="variance_noise"):
        ours.step(m, 25, x, eta=0.5, variance_noise=1)
    ours.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type is 'score'"):
        ours.step(m, 25, x)


def test_errors_of_the_timesteps():
    _, ours = both()
    with pytest.raises(ValueError, match="give one of the two"):
        ours.set_timesteps()
    with pytest.raises(ValueError, match="give one of the two"):
        ours.set_timesteps(4, timesteps=[3, 2, 1, 0])
    with pytest.raises(ValueError, match="cannot be larger"):
        ours.set_timesteps(51)
    for listed in ([], [3, 4], [4, 4], [50, 3], [3, -1]):
        with pytest.raises(ValueError, match="fall strictly from 49"):
            ours.set_timesteps(timesteps=listed)
    with pytest.raises(TypeError, match="timesteps"):
        ours.set_timesteps(timesteps=[2.5, 1.5])
    _, up = both(PAIRS[1])
    with pytest.raises(ValueError, match="rise strictly from 0"):
        up.set_timesteps(timesteps=[4, 3])


# Real pipelines, tiny and random.


def unconditional():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """The parts of a Stable Diffusion, made here: nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    last = len(words) - 1
    torch.manual_seed(0)
    return {
        "tokenizer": transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
        ),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=2,
                num_hidden_layers=1,
                max_position_embeddings=16,
                bos_token_id=last - 1,
                eos_token_id=last,
                pad_token_id=last,
            )
        ),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable(name, parts, **more):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = getattr(diffusers, name)(scheduler=scheduler, **parts, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_images(pipeline, run):
    expected = run(pipeline)
    steps = []
    assert fused.accelerate(pipeline) is pipeline
    cls = type(pipeline.scheduler)
    assert cls is fused.DDIMScheduler
    original = cls.step

    @functools.wraps(original)  # pipelines look which arguments it takes
    def step(*args, **kwargs):
        steps.append(args)
        return original(*args, **kwargs)

    cls.step = step
    try:
        found = run(pipeline)
    finally:
        cls.step = original
    assert steps
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("eta", "clipped"), [(0.0, None), (1.0, True)])
def test_unconditional_images(eta, clipped):
    def run(pipeline):
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 4, "eta": eta, "use_clipped_model_output": clipped, "output_type": "np"}
        return pipeline(batch_size=2, generator=generator, **options).images

    assert_same_images(unconditional(), run)


def test_images_of_a_text(latent):
    def run(pipeline):
        options = {"num_inference_steps": 4, "output_type": "np", "height": 16, "width": 16, "guidance_rescale": 0.7}
        return np.stack(
            [
                pipeline("a cat", eta=eta, generator=torch.Generator().manual_seed(0), **options).images
                for eta in (0.0, 0.5)
            ]
        )

    assert_same_images(stable("StableDiffusionPipeline", latent), run)


def test_images_of_a_text_at_custom_timesteps(latent):
    pipeline = stable("StableDiffusionPipeline", latent)
    options = {"output_type": "np", "height": 16, "width": 16, "generator": torch.Generator().manual_seed(0)}
    with pytest.raises(ValueError, match="custom"):
        pipeline("a cat", timesteps=[900, 500, 1], **options)
    assert fused.accelerate(pipeline)("a cat", timesteps=[900, 500, 1], **options).images.shape == (1, 16, 16, 3)
    assert pipeline.scheduler.timesteps.tolist() == [900, 500, 1]


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_images_of_an_image(latent, name):
    picture = torch.rand(1, 3, 16, 16)
    more = {"mask_image": (torch.rand(1, 1, 16, 16) > 0.5).float()} if "Inpaint" in name else {}
    if more:
        more.update(height=16, width=16)

    def run(pipeline):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 5, "strength": 0.6, "output_type": "np", "generator": generator, **more}
        return pipeline("a cat", image=picture, **options).images

    assert_same_images(stable(name, latent), run)


def test_inversion_and_editing(latent):
    """DiffEdit: an image is inverted by one scheduler, and painted over by the other."""
    parts = {**latent, "inverse_scheduler": None}
    pipeline = stable("StableDiffusionDiffEditPipeline", parts)
    pipeline.inverse_scheduler = diffusers.DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    picture = torch.rand(1, 3, 16, 16)
    mask = (np.random.default_rng(0).random((1, 8, 8)) > 0.5).astype(np.float32)

    def run(pipeline):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator}
        latents = pipeline.invert("a cat", image=picture, inpaint_strength=1.0, **options).latents
        options.update(mask_image=mask, image_latents=latents, output_type="np", inpaint_strength=1.0)
        return pipeline("a dog", **options).images

    assert_same_images(pipeline, run)
    assert type(pipeline.inverse_scheduler) is fused.DDIMInverseScheduler


def test_accelerate_keeps_the_state():
    pipeline = unconditional()
    before = pipeline.scheduler
    before.set_timesteps(7)
    before.alphas_cumprod = before.alphas_cumprod * 0.99
    fused.accelerate(pipeline)
    after = pipeline.scheduler
    assert all(vars(after)[name] is value for name, value in vars(before).items())
    assert after.config is before.config
    x, m = draw(1, 3, 8, 8)
    assert same(after.step(m, 500, x).prev_sample, before.step(m, 500, x).prev_sample)
    fused.accelerate(pipeline)
    assert pipeline.scheduler is after


def test_saved_pipelines_load_anywhere(tmp_path):
    pipeline = fused.accelerate(unconditional())
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert type(fused.accelerate(loaded).scheduler) is fused.DDIMScheduler
    pipeline.scheduler = fused.DDIMScheduler.from_config(loaded.scheduler.config)  # by hand: named as what it is
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["protofast.diffusers", "DDIMScheduler"]
    diffusers.DDIMPipeline.from_pretrained(tmp_path)


def test_accelerate_says_what_it_takes():
    class Mine(diffusers.DDIMScheduler):
        pass

    for scheduler, name in ((diffusers.PNDMScheduler(), "PNDMScheduler"), (Mine(), "Mine")):
        with pytest.raises(TypeError, match=f"scheduler is a {name}.*DDIMScheduler and DDIMInverseScheduler"):
            fused.accelerate(SimpleNamespace(scheduler=scheduler))
    with pytest.raises(TypeError, match="no scheduler"):
        fused.accelerate(SimpleNamespace())
    several = SimpleNamespace(
        a=diffusers.DDIMScheduler(), b=diffusers.DDIMInverseScheduler(), c=diffusers.PNDMScheduler()
    )
    fused.accelerate(several)
    assert (type(several.a), type(several.b)) == (fused.DDIMScheduler, fused.DDIMInverseScheduler)
    assert type(several.c) is diffusers.PNDMScheduler
