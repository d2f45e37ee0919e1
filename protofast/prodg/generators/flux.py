"""FLUX of diffusers as a generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._optional import need
from .pipeline import EXTRA, PipelineGenerator
from .protocol import STEPS, Prompts, first_with_gradient, flow_sigmas, gradient_from


class FluxGenerator(PipelineGenerator):
    """FLUX, differentiable in its prompts; a `Generator` (arXiv 2605.08858, generation of the training images).

    Images are those of the pipeline's own call from the same noise. That one cannot be differentiated, so the Euler
    steps are unrolled here, over latents kept in float32.

    Parameters
    ----------
    pipeline : diffusers.FluxPipeline
        FLUX.1-schnell in the paper. Its models are frozen and put in evaluation mode; it may be without text encoders
        (None) when nothing is to be encoded.
    size : int, default 256
        Side of the images; a multiple of 16, twice the autoencoder's factor.
    max_tokens : int, default 256
        L of the prompts. 256 is schnell's limit, 512 that of FLUX.1-dev.
    guidance : float, default 3.5
        For models that take it as an input, such as FLUX.1-dev; schnell does not.
    gradient_checkpointing : bool, default True
        Activations of the transformer's blocks and of the decoder's are computed again in the backward pass, and only
        their inputs kept: 57 blocks · 512 tokens · 3072 numbers · 2 bytes = 180 MB an image and step of schnell.
    tiling : bool, default False
        Decodes large images in tiles, which differ a little at their seams.
    offload : bool, default False
        Text encoders are kept on the CPU, and are on the device only while they encode. `release_text_encoders` frees
        their memory altogether.

    Attributes
    ----------
    prompt_shape : (int, int)
        (L, E): 256 tokens of 4096 numbers, T5's.
    pooled_size : int
        768, CLIP's.
    image_shape : (int, int, int)

    Raises
    ------
    TypeError
        For a pipeline of another kind.
    ValueError
        For a size that the autoencoder cannot have, and a scheduler whose steps are no plain Euler steps.

    References
    ----------
    ProDG, arXiv 2605.08858. Gradients through the last steps alone: DRaFT-K, arXiv 2309.17400.

    Examples
    --------
    A model of random weights, small enough to build here:

    >>> import torch
    >>> from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    >>> from protofast.prodg.generators import FluxGenerator, Prompts
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8,
    ...     joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    ... )
    >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)
    >>> pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    >>> flux = FluxGenerator(pipeline, size=8, max_tokens=4)
    >>> embedding = torch.zeros(2, 4, 24, requires_grad=True)
    >>> images = flux.generate(Prompts(embedding, torch.zeros(2, 12)), flux.noise(2), through=1)
    >>> images.mean().backward()
    >>> images.shape, embedding.grad.shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 4, 24]))

    The model itself:

    >>> flux = FluxGenerator.from_pretrained(device="cuda")  # doctest: +SKIP
    >>> prompts = flux.encode(["a red bird on a branch"])  # doctest: +SKIP
    >>> flux.generate(prompts, flux.noise(1)).shape  # doctest: +SKIP
    torch.Size([1, 3, 256, 256])
    """

    _pipeline, _model, _encoders, _patch = "FluxPipeline", "transformer", ("text_encoder", "text_encoder_2"), 2

    def __init__(
        self,
        pipeline: Any,
        *,
        size: int = 256,
        max_tokens: int = 256,
        guidance: float = 3.5,
        gradient_checkpointing: bool = True,
        tiling: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(pipeline, size, gradient_checkpointing, tiling, offload)
        if not 1 <= max_tokens <= 512:
            raise ValueError(f"max_tokens is {max_tokens}; give 1 to 512")
        config = pipeline.scheduler.config
        if "FlowMatchEuler" not in type(pipeline.scheduler).__name__ or any(
            config.get(name) for name in ("stochastic_sampling", "invert_sigmas")
        ):
            raise ValueError(
                f"pipeline.scheduler is a {type(pipeline.scheduler).__name__} of {dict(config)}; give a "
                "FlowMatchEulerDiscreteScheduler that draws no noise and does not turn its sigmas round"
            )
        self.max_tokens, self.guidance = int(max_tokens), float(guidance)

    @classmethod
    def from_pretrained(
        cls,
        name: str = "black-forest-labs/FLUX.1-schnell",
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        offload: bool = False,
        **options: Any,
    ) -> FluxGenerator:
        """Loads a pipeline by diffusers, from the Hugging Face hub or a folder.

        Parameters
        ----------
        name : str
            Of a repository of the hub, or a path.
        dtype : torch.dtype, default bfloat16
        device : device, optional
            Where it is put; by default it stays on the CPU.
        offload : bool, default False
        **options
            As for the class.

        Raises
        ------
        ImportError
            Without diffusers or transformers.
        """
        return cls._load(name, dtype, device, offload, options)

    @property
    def prompt_shape(self) -> tuple[int, int]:
        return self.max_tokens, self.pipeline.transformer.config.joint_attention_dim

    @property
    def pooled_size(self) -> int:
        return self.pipeline.transformer.config.pooled_projection_dim

    def _encode(self, texts: list[str]) -> Prompts:
        embedding, pooled, _ = self.pipeline.encode_prompt(
            prompt=texts, prompt_2=None, device=self.device, max_sequence_length=self.max_tokens
        )
        return Prompts(embedding, pooled)

    def noise(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Packed latents (count, tokens of the image, 4 · latent channels), those that the pipeline packs."""
        return self.pipeline._pack_latents(self._draw(count, generator), count, *self._latents_shape)

    def _schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """Timesteps (steps,) and noise levels (steps + 1,), shifted as the scheduler's configuration says."""
        scheduler, more = self.pipeline.scheduler, {}
        if scheduler.config.use_dynamic_shifting:
            given = {
                ours: scheduler.config[theirs]
                for ours, theirs in (
                    ("base_seq_len", "base_image_seq_len"),
                    ("max_seq_len", "max_image_seq_len"),
                    ("base_shift", "base_shift"),
                    ("max_shift", "max_shift"),
                )
                if scheduler.config.get(theirs) is not None
            }
            shift = need("diffusers.pipelines.flux.pipeline_flux", EXTRA).calculate_shift
            more["mu"] = shift((self._latents_shape[1] // 2) ** 2, **given)
        # Without sigmas the scheduler takes 1, .667, .334, .001, 0 for four steps, as in the paper's release: the last
        # call of the transformer then changes next to nothing. These are FluxPipeline's.
        scheduler.set_timesteps(sigmas=flow_sigmas(steps)[:-1], device=self.device, **more)
        return scheduler.timesteps, scheduler.sigmas

    def generate(
        self, prompts: Prompts, noise: Tensor, *, steps: int | None = None, through: int | None = None
    ) -> Tensor:
        """Images (m, 3, size, size) in [0, 1], float32, by 4 steps unless told otherwise.

        Parameters
        ----------
        prompts : Prompts
            (m, L, E) and (m, E2), of any floating dtype.
        noise : Tensor
            Of `noise`.
        steps : int, default 4
        through : int, optional
            Steps, counted from the last, that gradients flow through; the others then cost no memory.

        Raises
        ------
        ValueError
            Naming the argument.
        """
        pipeline = self.pipeline
        steps = STEPS if steps is None else steps
        first = first_with_gradient(steps, through)
        channels, side = self._latents_shape[0], self._latents_shape[1] // 2
        embedding, pooled, latents = self._enter(prompts, noise, (side**2, 4 * channels))
        dtype, count = embedding.dtype, len(embedding)
        _, _, text_ids = pipeline.encode_prompt(
            prompt=None, prompt_2=None, device=self.device, prompt_embeds=embedding, pooled_prompt_embeds=pooled
        )
        image_ids = pipeline._prepare_latent_image_ids(count, side, side, self.device, dtype)
        guidance = None
        if pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((count,), self.guidance, device=self.device)
        timesteps, sigmas = self._schedule(steps)
        for step, timestep in enumerate(timesteps):
            with gradient_from(first, step):
                velocity = pipeline.transformer(
                    hidden_states=latents.to(dtype),
                    timestep=timestep.expand(count).to(dtype) / 1000,
                    guidance=guidance,
                    pooled_projections=pooled,
                    encoder_hidden_states=embedding,
                    txt_ids=text_ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
                latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity.to(latents)
        return self._decode(pipeline._unpack_latents(latents, self.size, self.size, pipeline.vae_scale_factor))
