"""Stable Diffusion of diffusers as a generator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .pipeline import PipelineGenerator
from .protocol import STEPS, Prompts, first_with_gradient, gradient_from


class StableDiffusionGenerator(PipelineGenerator):
    """Stable Diffusion by DDIM, differentiable in its prompts; a `Generator`.

    A smaller stand-in for the paper's FLUX (arXiv 2605.08858). Sampling is deterministic, by
    `protofast.diffusers.DDIMScheduler` with the noise schedule of the pipeline's scheduler, whatever that is. Where it
    is DDIM the images are those of the pipeline's own call from the same noise, and so they are, but for rounding,
    where it is Euler's with the same timesteps. No safety checker looks at them.

    Parameters
    ----------
    pipeline : diffusers.StableDiffusionPipeline
        Its models are frozen and put in evaluation mode; it may be without text encoder (None) when nothing is to be
        encoded.
    size : int, optional
        Side of the images; by default that of the training.
    guidance : float, default 1
        Classifier-free guidance away from the prompt "", at twice the cost. 1 is none, which suits distilled models
        such as sd-turbo; others take about 7.5.
    gradient_checkpointing, tiling, offload : bool
        As for `FluxGenerator`.

    Attributes
    ----------
    prompt_shape : (int, int)
        (L, E): CLIP's 77 tokens.
    pooled_size : int
        0: there is no pooled prompt, and `Prompts.pooled` is (m, 0).
    image_shape : (int, int, int)

    Raises
    ------
    TypeError
        For a pipeline of another kind.
    ValueError
        For a size that the autoencoder cannot have, guidance below 1, and a model that DDIM cannot sample.
    RuntimeError
        For guidance without a text encoder.

    References
    ----------
    DDIM, arXiv 2010.02502. Gradients through the last steps alone: DRaFT-K, arXiv 2309.17400.

    Examples
    --------
    >>> import torch
    >>> from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    >>> from protofast.prodg.generators import Prompts, StableDiffusionGenerator
    >>> unet = UNet2DConditionModel(
    ...     sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
    ...     attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ... )
    >>> vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    >>> scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    >>> pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    >>> model = StableDiffusionGenerator(pipeline)
    >>> prompts = Prompts(torch.zeros(2, 77, 16), torch.zeros(2, 0))
    >>> model.generate(prompts, model.noise(2), steps=2).shape
    torch.Size([2, 3, 8, 8])
    """

    _pipeline, _model, _encoders = "StableDiffusionPipeline", "unet", ("text_encoder",)

    def __init__(
        self,
        pipeline: Any,
        *,
        size: int | None = None,
        guidance: float = 1.0,
        gradient_checkpointing: bool = True,
        tiling: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(pipeline, size, gradient_checkpointing, tiling, offload)
        if not 1 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}; give at least 1, which is none")
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"pipeline.scheduler is a {type(pipeline.scheduler).__name__}; give one of a diffusion model"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "pipeline.unet takes the guidance as an input, as latent consistency models do; DDIM has none"
            )
        from ...diffusers import DDIMScheduler

        # clip_sample is for pixels, and not in the configuration of other schedulers.
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        self.guidance = float(guidance)
        self._empty = self.encode([""]).embedding if self.guidance > 1 else None

    @classmethod
    def from_pretrained(
        cls,
        name: str = "stabilityai/sd-turbo",
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        offload: bool = False,
        **options: Any,
    ) -> StableDiffusionGenerator:
        """Loads a pipeline by diffusers; arguments and errors of `FluxGenerator.from_pretrained`."""
        return cls._load(name, dtype, device, offload, options)

    @property
    def prompt_shape(self) -> tuple[int, int]:
        tokenizer = self.pipeline.tokenizer
        return 77 if tokenizer is None else tokenizer.model_max_length, self.pipeline.unet.config.cross_attention_dim

    @property
    def pooled_size(self) -> int:
        return 0

    def _encode(self, texts: list[str]) -> Prompts:
        embedding, _ = self.pipeline.encode_prompt(texts, self.device, 1, False)
        return Prompts(embedding, embedding.new_zeros(len(embedding), 0))

    def noise(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents (count, channels, h, w)."""
        return self._draw(count, generator)

    def generate(
        self, prompts: Prompts, noise: Tensor, *, steps: int | None = None, through: int | None = None
    ) -> Tensor:
        """Images (m, 3, size, size) in [0, 1], float32; arguments and errors of `FluxGenerator.generate`.

        Four steps, the default, are for distilled models; others need twenty or more.
        """
        steps = STEPS if steps is None else steps
        first = first_with_gradient(steps, through)
        embedding, _, latents = self._enter(prompts, noise, self._latents_shape)
        if self._empty is not None:
            embedding = torch.cat([self._empty.to(embedding).expand_as(embedding), embedding])
        self.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            with gradient_from(first, step):
                both = latents if self._empty is None else torch.cat([latents, latents])
                output = self.pipeline.unet(
                    both.to(embedding.dtype), timestep, encoder_hidden_states=embedding, return_dict=False
                )[0]
                if self._empty is not None:
                    without, guided = output.chunk(2)
                    output = without + self.guidance * (guided - without)
                latents = self.scheduler.step(output.to(latents), timestep, latents, return_dict=False)[0]
        return self._decode(latents)
