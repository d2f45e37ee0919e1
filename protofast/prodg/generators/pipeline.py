"""What pipelines of diffusers share as generators."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..._files import digest
from ..._optional import need
from .protocol import Generator, Prompts, check_inputs, saturate, standard_normal

_TOGETHER = 16  # texts that are encoded at a time: T5-XXL over a thousand names would not fit
EXTRA = "prodg"

Self = TypeVar("Self", bound="PipelineGenerator")


class PipelineGenerator(Generator):
    """A text-to-image pipeline of diffusers, frozen; what `FluxGenerator` and `StableDiffusionGenerator` share."""

    _pipeline = ""  # its class in diffusers
    _model = ""  # the attribute of the pipeline that predicts
    _encoders: tuple[str, ...] = ()
    _patch = 1  # side of the latents that a token holds

    def __init__(
        self, pipeline: Any, size: int | None, gradient_checkpointing: bool, tiling: bool, offload: bool
    ) -> None:
        parts = (self._model, "vae", "scheduler")
        if any(getattr(pipeline, part, None) is None for part in parts) or not hasattr(pipeline, self._encoders[-1]):
            raise TypeError(
                f"pipeline is a {type(pipeline).__name__}; give a diffusers.{self._pipeline} with {', '.join(parts)}"
            )
        scale = pipeline.vae_scale_factor
        if size is None:
            size = getattr(pipeline, self._model).config.sample_size * scale
        if size < 1 or size % (scale * self._patch):
            raise ValueError(f"size is {size}; give a multiple of {scale * self._patch}")
        self.pipeline, self.size, self.offload = pipeline, int(size), offload
        self._kept: dict[str, Prompts] = {}
        for module in _modules(pipeline).values():
            module.requires_grad_(False).eval()
        for module in (self._predictor, pipeline.vae):
            if gradient_checkpointing:
                module.enable_gradient_checkpointing()
            else:
                module.disable_gradient_checkpointing()
        # One image after another: with checkpoints it is one image's activations that the decoder's gradient holds.
        pipeline.vae.enable_slicing()
        if tiling:
            pipeline.vae.enable_tiling()
        else:
            pipeline.vae.disable_tiling()
        if offload:
            self._move_encoders("cpu")

    @classmethod
    def _load(
        cls: type[Self], name: str, dtype: torch.dtype, device: Any, offload: bool, options: dict[str, Any]
    ) -> Self:
        need("transformers", EXTRA)
        diffusers = need("diffusers", EXTRA)
        version = [int(number) for number in diffusers.__version__.split(".")[:2]]
        loading = {"dtype" if version >= [0, 42] else "torch_dtype": dtype}  # the older name goes with 1.0
        pipeline = getattr(diffusers, cls._pipeline).from_pretrained(name, **loading)
        if device is not None:
            for part, module in _modules(pipeline).items():
                if not (offload and part in cls._encoders):
                    module.to(device)
        return cls(pipeline, offload=offload, **options)

    def fingerprint(self) -> str:
        """A name for what is drawn: settings and, of every weight, its first numbers."""
        told = [type(self).__name__, self.size, *self.prompt_shape, getattr(self, "guidance", None)]
        told += [sorted(map(str, self.pipeline.scheduler.config.items()))]
        for module in (self._predictor, self.pipeline.vae):
            told += [(name, tuple(value.shape)) for name, value in module.named_parameters()]
            numbers = [value.detach().flatten()[:8].double().cpu() for value in module.parameters()]
            told.append(digest(torch.cat(numbers)))
        return sha256(repr(told).encode()).hexdigest()

    @property
    def _predictor(self) -> Any:
        return getattr(self.pipeline, self._model)

    @property
    def device(self) -> torch.device:
        return self._predictor.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, H, W)."""
        return self.pipeline.vae.config.out_channels, self.size, self.size

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Prompts:
        """Prompts of texts, of the text encoders' dtype, on the device.

        Raises
        ------
        RuntimeError
            When the pipeline has no text encoders, or no longer.
        """
        texts = texts if isinstance(texts, str) else list(texts)
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts is {texts!r}; give a list of at least one text")
        if absent := [name for name in self._encoders if getattr(self.pipeline, name) is None]:
            if unknown := [text for text in texts if text not in self._kept]:
                raise RuntimeError(
                    f"the pipeline has no {' and no '.join(absent)}, so {unknown[0]!r} cannot be encoded any more; "
                    "encode it before, or name it in release_text_encoders(keep=...)"
                )
            parts = [self._kept[text] for text in texts]
        else:
            parts = self._encode_all(texts)
        return Prompts(*(torch.cat(part).to(self.device) for part in zip(*parts, strict=True)))

    def _encode_all(self, texts: list[str]) -> list[Prompts]:
        if self.offload:
            self._move_encoders(self.device)
        try:
            return [self._encode(texts[start : start + _TOGETHER]) for start in range(0, len(texts), _TOGETHER)]
        finally:
            if self.offload:
                self._move_encoders("cpu")

    def _encode(self, texts: list[str]) -> Prompts:
        raise NotImplementedError

    def _move_encoders(self, device: torch.device | str) -> None:
        for name in self._encoders:
            if getattr(self.pipeline, name) is not None:
                getattr(self.pipeline, name).to(device)

    def release_text_encoders(self, keep: Sequence[str] = ("",)) -> None:
        """Takes the text encoders out of the pipeline, which frees their memory: 9.5 GB for FLUX in bfloat16.

        A training needs them for the anchors of its bank alone.

        Parameters
        ----------
        keep : sequence of str, default ("",)
            Texts that `encode` knows ever after, such as the names of the classes for ``init="data"``; for any other it
            then raises RuntimeError.
        """
        if keep:
            prompts = self.encode(keep)
            for row, text in enumerate(keep):
                self._kept[text] = Prompts(*(part[row : row + 1].clone() for part in prompts))
        for name in self._encoders:
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _latents_shape(self) -> tuple[int, int, int]:
        side = self.size // self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, side, side

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        like = torch.empty(0, dtype=_wide(self._predictor.dtype), device=self.device)
        return standard_normal((count, *self._latents_shape), like, generator)

    def _enter(self, prompts: Prompts, noise: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding and pooled prompt as the model takes them, and latents no narrower than float32."""
        check_inputs(self, prompts, noise)
        if tuple(noise.shape[1:]) != shape:
            given, wanted = tuple(noise.shape), ", ".join(map(str, shape))
            raise ValueError(f"noise has shape {given}; give generator.noise(m), of shape (m, {wanted})")
        model = self._predictor
        embedding, pooled = (part.to(self.device, model.dtype) for part in prompts)
        return embedding, pooled, noise.to(self.device, _wide(model.dtype))

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32 or wider, of latents (m, c, h, w)."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return saturate(images.to(_wide(images.dtype)) / 2 + 0.5)


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
