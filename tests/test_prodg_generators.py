"""Pipelines of diffusers as generators: their own images, with gradients. All of tiny models with random weights."""

import functools
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from helpers.errors import unit

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from protofast.prodg.bank import PromptBank  # noqa: E402
from protofast.prodg.config import ProDGConfig  # noqa: E402
from protofast.prodg.generators import FluxGenerator, Generator, Prompts, StableDiffusionGenerator  # noqa: E402
from protofast.prodg.generators.protocol import flow_sigmas, saturate  # noqa: E402
from protofast.prodg.networks import SplitNetwork  # noqa: E402

WORDS = ("<pad>", "<unk>", "<eos>", "a", "red", "bird", "boot")
TOKENS, E, E2, SIZE = 6, 24, 20, 16
FAMILIES = ("flux", "stable diffusion")
family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def tokenizer():
    """Words of a list; every text ends in <eos>, which CLIP pools at."""
    inside = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inside.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inside.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=TOKENS
    )


def clip(size):
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def autoencoder(**options):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        **options,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.6  # few pixels of random weights are then black or white
    return vae


def flux_pipeline(guidance_embeds=False, encoders=True, **scheduler):
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=E,
        pooled_projection_dim=E2,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    vae = autoencoder(scaling_factor=0.4, shift_factor=0.2)
    t5 = transformers.T5Config(
        vocab_size=len(WORDS), d_model=E, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2
    )
    texts = (clip(E2), tokenizer(), transformers.T5EncoderModel(t5), tokenizer()) if encoders else (None,) * 4
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 1.0, **scheduler}), vae, *texts, transformer
    )


def stable_diffusion_pipeline(kind="DDIMScheduler", encoders=True, **scheduler):
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=E,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    options = {"clip_sample": False} if kind == "DDIMScheduler" else {}
    made = getattr(diffusers, kind)(**{**betas, **options, **scheduler})
    texts = (clip(E), tokenizer()) if encoders else (None, None)
    return diffusers.StableDiffusionPipeline(
        autoencoder(), *texts, unet, made, None, None, requires_safety_checker=False
    )


def build(family, dtype=torch.float32, *, pipeline=None, **options):
    if family == "flux":
        made = (pipeline or flux_pipeline)().to(dtype)
        return FluxGenerator(made, **{"size": SIZE, "max_tokens": TOKENS, **options})
    return StableDiffusionGenerator((pipeline or stable_diffusion_pipeline)().to(dtype), **options)


def draw(generator, count=2, dtype=torch.float32, seed=0):
    """Prompts that need gradients, and noise."""
    draws = torch.Generator().manual_seed(seed)
    shapes = (*generator.prompt_shape,), (generator.pooled_size,)
    prompts = Prompts(*(torch.randn(count, *shape, dtype=dtype, generator=draws) for shape in shapes))
    for part in prompts:
        part.requires_grad_()
    return prompts, generator.noise(count, generator=draws)


def own_call(generator, prompts, noise, steps, **options):
    """Images of the pipeline's own call."""
    given = {"prompt_embeds": prompts.embedding.detach(), "height": SIZE, "width": SIZE, "output_type": "pt"}
    if generator.pooled_size:
        given["pooled_prompt_embeds"] = prompts.pooled.detach()
    given = {
        name: part.to(generator._predictor.dtype) if torch.is_tensor(part) else part for name, part in given.items()
    }
    latents = noise.to(generator._predictor.dtype)
    return generator.pipeline(num_inference_steps=steps, latents=latents, **given, **options).images


def gradients(generator, prompts, noise, weights=None, **options):
    images = generator.generate(prompts, noise, **options)
    if weights is None:
        weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)).to(images)
    wanted = [part for part in prompts if part.numel()]
    return torch.autograd.grad((images * weights).sum(), wanted)


@family
def test_generators_are_of_the_protocol(family):
    generator = build(family)
    assert isinstance(generator, Generator)
    pooled = E2 if family == "flux" else 0
    assert (generator.prompt_shape, generator.pooled_size) == ((TOKENS, E), pooled)
    assert generator.image_shape == (3, SIZE, SIZE)
    assert generator.device == torch.device("cpu")
    prompts, noise = draw(generator)
    images = generator.generate(prompts, noise)
    assert (images.shape, images.dtype) == ((2, 3, SIZE, SIZE), torch.float32)
    assert torch.equal(images, generator.generate(prompts, noise, steps=4)), "four steps are the default"
    assert 0 <= float(images.detach().min()) < float(images.detach().max()) <= 1


CASES = {
    "schnell": {},
    "saturated": {"loud": True},
    "dynamic shift": {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
    "shift": {"shift": 3.0},
    "guidance": {"guidance_embeds": True},
}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_flux_gives_the_images_of_its_own_call(case, steps):
    options = dict(CASES[case])
    loud = options.pop("loud", False)
    generator = build("flux", pipeline=functools.partial(flux_pipeline, **options), guidance=2.0)
    if loud:
        generator.pipeline.vae.decoder.conv_out.weight *= 20
    prompts, noise = draw(generator)
    images = generator.generate(prompts, noise, steps=steps)
    expected = own_call(generator, prompts, noise, steps, guidance_scale=2.0)
    assert torch.equal(images, expected)  # the same operations in the same order
    if loud:
        assert bool((images == 0).any())
        assert bool((images == 1).any())


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    "more", [{}, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}], ids=["ε", "v"]
)
def test_stable_diffusion_gives_the_images_of_its_own_call(more, guidance, steps):
    pipeline = functools.partial(stable_diffusion_pipeline, **more)
    generator = build("stable diffusion", pipeline=pipeline, guidance=guidance)
    prompts, noise = draw(generator)
    images = generator.generate(prompts, noise, steps=steps)
    empty = generator.encode([""]).embedding.expand_as(prompts.embedding) if guidance > 1 else None
    expected = own_call(generator, prompts, noise, steps, guidance_scale=guidance, negative_prompt_embeds=empty)
    assert torch.equal(images, expected)


def test_stable_diffusion_by_ddim_is_the_euler_scheduler_of_the_same_timesteps():
    pipeline = functools.partial(stable_diffusion_pipeline, "EulerDiscreteScheduler", timestep_spacing="trailing")
    generator = build("stable diffusion", torch.float64, pipeline=pipeline)
    prompts, noise = draw(generator, dtype=torch.float64)
    images = generator.generate(prompts, noise, steps=4)
    scheduler = generator.pipeline.scheduler
    scheduler.set_timesteps(4)
    # The same start: Euler's latents are larger by √(σ² + 1), and its call multiplies by init_noise_sigma.
    start = noise * (scheduler.sigmas[0] ** 2 + 1).sqrt() / scheduler.init_noise_sigma
    expected = own_call(generator, prompts, start, 4, guidance_scale=1.0)
    # Euler's sigmas and latents are float32, the latter of a size of σ = 15: a few roundings of that.
    assert float((images.detach() - expected).abs().max()) < 16 * unit(torch.float32)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_noise_levels_are_equally_spaced_down_to_one_last_full_step(steps):
    generator = build("flux")
    asked = []
    generator.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, given: asked.append(given["timestep"].tolist()), with_kwargs=True
    )
    prompts, noise = draw(generator)
    with torch.no_grad():
        generator.generate(prompts, noise, steps=steps)
    sigmas = torch.tensor(flow_sigmas(steps))
    assert torch.equal(generator.pipeline.scheduler.sigmas, sigmas)
    assert torch.allclose(torch.tensor(asked), sigmas[:-1, None].expand(-1, 2), rtol=4 * unit(torch.float32), atol=0)


@family
def test_texts_are_encoded_as_the_pipeline_does(family):
    generator = build(family)
    texts = ["a red bird", "", "boot", "a boot"]
    prompts = generator.encode(texts)
    assert not prompts.embedding.requires_grad
    assert tuple(prompts.embedding.shape) == (4, *generator.prompt_shape)
    assert tuple(prompts.pooled.shape) == (4, generator.pooled_size)
    for row, text in enumerate(texts):
        if family == "flux":
            expected = generator.pipeline.encode_prompt(text, None, max_sequence_length=TOKENS)[:2]
        else:
            expected = generator.pipeline.encode_prompt(text, "cpu", 1, False)[0], prompts.pooled[:1]
        for found, part in zip(prompts, expected, strict=True):
            torch.testing.assert_close(found[row : row + 1], part)
    many = generator.encode(texts * 10)
    for found, part in zip(many, prompts, strict=True):
        torch.testing.assert_close(found, part.repeat(10, *[1] * (part.ndim - 1)))


@family
def test_gradients_are_those_of_finite_differences(family):
    generator = build(family, torch.float64)
    prompts, noise = draw(generator, dtype=torch.float64)
    weights = torch.randn(2, *generator.image_shape, dtype=torch.float64)
    found = gradients(generator, prompts, noise, weights)
    assert len(found) == (2 if family == "flux" else 1)
    # FLUX rotates queries and keys in float32, whatever it is given, so its differences have to be larger.
    step, error = (3e-2, 1e-5) if family == "flux" else (1e-3, 1e-9)
    for which, gradient in enumerate(found):
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().amax(tuple(range(1, gradient.ndim))).min()) > 0, "of every image"
        direction = torch.randn_like(gradient)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            moved = [part.detach() for part in prompts]
            moved[which] = moved[which] + sign * step * direction
            with torch.no_grad():
                ends.append(float((generator.generate(Prompts(*moved), noise) * weights).sum()))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - float((gradient * direction).sum())) < error * float(gradient.norm())


@family
def test_saturated_pixels_keep_the_gradient_that_leads_back(family):
    generator = build(family)
    generator.pipeline.vae.decoder.conv_out.weight *= 20
    prompts, noise = draw(generator)
    images = generator.generate(prompts, noise)
    white, black = images[images == 1].sum(), images[images == 0].sum()
    for loss, leads_back in ((white, True), (-white, False), (-black, True), (black, False)):
        gradient = torch.autograd.grad(loss, prompts.embedding, retain_graph=True)[0]
        assert bool(gradient.any()) == leads_back


def by_hand(generator, prompts, noise, steps, cut):
    """The sampling once more, with diffusers' own scheduler, detached before step `cut`."""
    pipeline, latents = generator.pipeline, noise
    if generator.pooled_size:
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
        ids = torch.zeros(TOKENS, 3), torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    else:
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
    for step, timestep in enumerate(scheduler.timesteps):
        latents = latents.detach() if step == cut else latents
        if generator.pooled_size:
            time = timestep.expand(len(noise)) / 1000
            output = pipeline.transformer(latents, *prompts, time, ids[1], ids[0]).sample
        else:
            output = pipeline.unet(latents, timestep, prompts.embedding).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    if generator.pooled_size:
        latents = (
            latents.unflatten(1, (4, 4)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)
        )
    config = pipeline.vae.config
    return saturate(pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample / 2 + 0.5)


@family
@pytest.mark.parametrize("through", [1, 2, 3, None])
def test_gradients_through_the_last_steps_are_those_of_detaching_before_them(family, through):
    generator = build(family)
    prompts, noise = draw(generator)
    weights = torch.randn(2, *generator.image_shape)
    found = gradients(generator, prompts, noise, weights, steps=3, through=through)
    images = by_hand(generator, prompts, noise, 3, 0 if through is None else 3 - through)
    expected = torch.autograd.grad((images * weights).sum(), [part for part in prompts if part.numel()])
    for gradient, other in zip(found, expected, strict=True):
        # The same operations; what is left is the order in which gradients of several uses are added up.
        assert float((gradient - other).norm()) < 64 * unit(torch.float32) * float(other.norm())
    whole = gradients(generator, prompts, noise, weights, steps=3)
    differs = float((found[0] - whole[0]).norm()) > 1e-3 * float(whole[0].norm())
    assert differs == (through in (1, 2))


@family
def test_steps_before_the_last_keep_nothing(family):
    generator = build(family, gradient_checkpointing=False)
    prompts, noise = draw(generator)
    kept = {}
    for through in (1, 2, 4):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            generator.generate(prompts, noise, steps=4, through=through)
        kept[through] = sum(sizes)
    step = kept[2] - kept[1]
    assert step > 0
    assert abs(kept[4] - kept[2] - 2 * step) <= 0.01 * step


@family
def test_checkpoints_change_memory_and_no_gradient(family):
    found, counts, kept = {}, {}, {}
    made = build(family).pipeline
    for checkpointing in (True, False):
        generator = build(family, pipeline=lambda: made, gradient_checkpointing=checkpointing)
        prompts, noise = draw(generator)
        model = generator._predictor
        block = model.transformer_blocks[0] if family == "flux" else model.up_blocks[0].resnets[0]
        counts[checkpointing] = []
        for module in (block, generator.pipeline.vae.decoder.up_blocks[0]):
            calls: list[int] = []
            module._forward_pre_hooks.clear()
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            counts[checkpointing].append(calls)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            images = generator.generate(prompts, noise, steps=2)
        kept[checkpointing] = sum(sizes)
        found[checkpointing] = torch.autograd.grad(images.square().sum(), prompts.embedding)[0]
    assert torch.equal(found[True], found[False])
    assert kept[True] < kept[False] / 2
    assert [len(calls) for calls in counts[False]] == [2, 2], "a call a step, and one an image"
    assert [len(calls) for calls in counts[True]] == [4, 4], "and all once more"


@family
def test_models_stay_frozen(family):
    generator = build(family)
    models = [part for part in generator.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    parameters = [value for model in models for value in (*model.parameters(), *model.buffers())]
    before = [value.clone() for value in parameters]
    prompts, noise = draw(generator)
    generator.generate(prompts, noise).sum().backward()
    assert prompts.embedding.grad is not None
    assert all(value.grad is None and not value.requires_grad for value in parameters)
    assert all(torch.equal(value, old) for value, old in zip(parameters, before, strict=True))
    assert not any(module.training for model in models for module in model.modules())


@family
def test_text_encoders_can_go_once_their_work_is_done(family):
    generator = build(family)
    texts = ["a bird", "", "boot"]
    prompts = generator.encode(texts)
    names = generator._encoders
    encoders = [weakref.ref(getattr(generator.pipeline, name)) for name in names]
    noise = generator.noise(3)
    before = generator.generate(prompts, noise)
    generator.release_text_encoders(texts)
    gc.collect()
    assert [encoder() for encoder in encoders] == [None] * len(names), "nothing keeps them"
    assert torch.equal(generator.generate(prompts, noise), before)
    for found, part in zip(generator.encode(texts[::-1]), prompts, strict=True):
        assert torch.equal(found, part.flip(0)), "what they were asked to leave behind"
    with pytest.raises(RuntimeError, match=r"no text_encoder.* 'a boot' cannot be encoded .*release_text_encoders"):
        generator.encode(["boot", "a boot"])
    generator.release_text_encoders()
    other = build(family)
    other.release_text_encoders(keep=())
    with pytest.raises(RuntimeError, match="no text_encoder"):
        other.encode([""])


@family
def test_offloaded_text_encoders_come_only_to_encode(family, monkeypatch):
    generator = build(family, offload=True)
    moves = []
    for name in generator._encoders:
        encoder = getattr(generator.pipeline, name)
        monkeypatch.setattr(encoder, "to", lambda device, name=name: moves.append((name, str(device))))
    monkeypatch.setattr(type(generator), "device", torch.device("cpu", 0))
    generator.encode(["a bird"])
    assert moves == [(name, device) for device in ("cpu:0", "cpu") for name in generator._encoders]
    monkeypatch.setattr(type(generator), "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.encode(["a bird"])
    assert moves[-1] == (generator._encoders[-1], "cpu"), "even after an error"


@family
def test_bfloat16_gives_float32_images_and_gradients(family):
    generator = build(family, torch.bfloat16)
    prompts, noise = draw(generator)
    assert noise.dtype == torch.float32
    images = generator.generate(prompts, noise)
    assert images.dtype == torch.float32
    found = gradients(generator, prompts, noise)
    precise = build(family)
    expected = gradients(precise, prompts, noise)
    own = own_call(generator, prompts, noise, 4, guidance_scale=1.0)
    # A handful of roundings in a row, of numbers of size 1; the pipeline's own call is no closer.
    for other in (precise.generate(prompts, noise), own):
        assert float((images - other).detach().abs().max()) < 8 * unit(torch.bfloat16)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert float((gradient - other).norm()) < 32 * unit(torch.bfloat16) * float(other.norm())
    assert all(part.dtype == torch.bfloat16 for part in generator.encode(["boot"]))


@family
def test_a_seed_means_the_same_noise(family):
    generator = build(family)
    seeded = lambda seed: generator.noise(3, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))
    assert not torch.equal(generator.noise(1), generator.noise(1))
    assert torch.equal(build(family, torch.bfloat16).noise(3, generator=torch.Generator().manual_seed(1)), seeded(1))
    assert abs(float(generator.noise(200).std()) - 1) < 0.05
    # And it is what the pipeline itself draws.
    prompts = generator.encode(["a", "a", "bird"])
    given = {"pooled_prompt_embeds": prompts.pooled} if generator.pooled_size else {}
    expected = generator.pipeline(
        prompt_embeds=prompts.embedding, height=SIZE, width=SIZE, num_inference_steps=2, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1), output_type="pt", **given,
    ).images  # fmt: skip
    assert torch.equal(generator.generate(prompts, seeded(1), steps=2), expected)


@family
def test_wrong_arguments_are_named(family):
    generator = build(family)
    prompts, noise = draw(generator)
    embedding, pooled = prompts
    wrong = [
        ({"prompts": Prompts(embedding[:, 1:], pooled)}, r"embedding has shape \(2, 5, 24\); give \(m, 6, 24\)"),
        ({"prompts": Prompts(embedding, torch.zeros(2, 3))}, r"prompts\.pooled has shape \(2, 3\)"),
        ({"noise": noise[:1]}, "noise has 1 rows for 2 prompts"),
        ({"noise": noise[:, :1]}, r"noise has shape \(2, 1, .*give generator\.noise\(m\), of shape \(m, "),
        ({"steps": 0}, "steps is 0"),
        ({"through": 5}, "through is 5; give 1 to 4"),
        ({"steps": 2, "through": 0}, "through is 0; give 1 to 2"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            generator.generate(**{"prompts": prompts, "noise": noise, **change})
    for texts in ("boot", []):
        with pytest.raises(ValueError, match="texts is"):
            generator.encode(texts)
    with pytest.raises(ValueError, match="size is 15; give a multiple of"):
        build(family, size=15)
    with pytest.raises(TypeError, match="pipeline is a Linear; give a diffusers"):
        type(generator)(torch.nn.Linear(1, 1))


def test_pipelines_that_cannot_be_differentiated_are_refused():
    with pytest.raises(ValueError, match="draws no noise"):
        build("flux", pipeline=functools.partial(flux_pipeline, stochastic_sampling=True))
    with pytest.raises(ValueError, match="max_tokens is 513"):
        build("flux", max_tokens=513)
    with pytest.raises(ValueError, match=r"guidance is 0\.0"):
        build("stable diffusion", guidance=0.0)
    with pytest.raises(TypeError, match=r"give a diffusers\.FluxPipeline"):
        FluxGenerator(stable_diffusion_pipeline())
    pipeline = stable_diffusion_pipeline()
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="give one of a diffusion model"):
        StableDiffusionGenerator(pipeline)
    without = functools.partial(stable_diffusion_pipeline, encoders=False)
    with pytest.raises(RuntimeError, match="no text_encoder"):
        build("stable diffusion", pipeline=without, guidance=2.0)


@family
def test_tiles_have_gradients(family):
    generator = build(family, tiling=True, gradient_checkpointing=False)
    vae = generator.pipeline.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = SIZE // 2, SIZE // 4
    prompts, noise = draw(generator)
    tiled = generator.generate(prompts, noise)
    assert bool(gradients(generator, prompts, noise)[0].isfinite().all())
    vae.disable_tiling()
    whole = generator.generate(prompts, noise)
    assert 0 < float((tiled - whole).detach().abs().max()) < 0.5


@family
def test_a_pipeline_is_loaded_from_a_folder(family, tmp_path):
    generator = build(family)
    generator.pipeline.save_pretrained(tmp_path)
    options = {"size": SIZE, "max_tokens": TOKENS} if family == "flux" else {}
    loaded = type(generator).from_pretrained(str(tmp_path), dtype=torch.float32, device="cpu", **options)
    prompts, noise = generator.encode(["red bird"]), generator.noise(1)
    for found, expected in zip(loaded.encode(["red bird"]), prompts, strict=True):
        assert torch.equal(found, expected)
    # Weights mapped from a file may lie elsewhere, and other addresses may mean other kernels.
    torch.testing.assert_close(loaded.generate(prompts, noise), generator.generate(prompts, noise))
    half = type(generator).from_pretrained(str(tmp_path), offload=True, **options)
    assert half.offload
    assert half._predictor.dtype == torch.bfloat16


def test_importing_the_generators_imports_no_optional_package():
    # Not by run_fresh, which imports this file.
    code = (
        "import sys, protofast.prodg.generators.flux; print(*sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.split() == []


@family
def test_a_training_goes_through_the_pipeline(family):
    from protofast.prodg.training import train

    generator = build(family)
    torch.manual_seed(3)
    network = SplitNetwork(
        torch.nn.Sequential(torch.nn.Conv2d(3, 3, 4, stride=4), torch.nn.Softplus()), torch.randn(2, 3), torch.zeros(2),
        input_shape=(3, SIZE, SIZE),
    )  # fmt: skip
    config = ProDGConfig(
        updates=4, rotation_updates=1, prompt_updates=1, channels=2, rank=2, prompt_lr=1e-2, steps=2, through=1,
        parametrization="cayley",
    )  # fmt: skip
    generator.release_text_encoders()
    result = train(network, generator, config)
    start = PromptBank.from_prompts(generator, 3, rank=2)
    now, before = dict(result.bank.named_parameters()), dict(start.named_parameters())
    moved = {name: float((value - before[name]).abs().sum()) for name, value in now.items() if value.numel()}
    assert all(value > 0 for value in moved.values()), moved
    assert torch.equal(result.bank.anchor, start.anchor)
    assert result.prototypes(1, 2).shape == (2, 3, SIZE, SIZE)


@family
def test_a_fingerprint_tells_weights_and_settings_apart(family):
    first = build(family)
    before = first.fingerprint()
    assert build(family).fingerprint() == before  # of the same seed
    assert build(family, pipeline=lambda: first.pipeline, size=2 * SIZE).fingerprint() != before
    with torch.no_grad():
        next(first.pipeline.vae.parameters()).view(-1)[0] += 1
    assert first.fingerprint() != before
