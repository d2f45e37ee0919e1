"""Encoder–decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..noise import Noise
from .base import Model, State, describe, evaluated


class VAEAdapter(Model):
    """An encoder–decoder whose encoder gives a Gaussian q(z|x); intrinsic criterion "kld".

    Parameters
    ----------
    model : object
        With ``decode(z)`` and either ``encode(x)`` → (mean, log variance) or a forward that returns (…, mean,
        log variance). diffusers' ``AutoencoderKL`` is understood too.
    sample_latent : bool, default False
        Reconstruct from a z drawn from q(z|x), as the paper's code does (each anchor has its own seed), instead of
        from the mean.
    latent_shape : sequence of int, optional
        Shape of one z; by default that of the encoder's mean.
    flatten : bool, default False
        Give the encoder (B, C·H·W) instead of (B, C, H, W).

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import Noise, VAEAdapter
    >>> class Model:
    ...     encode = staticmethod(lambda x: (x.flatten(1)[:, :2], torch.zeros(len(x), 2)))
    ...     decode = staticmethod(lambda z: z.repeat(1, 2).reshape(-1, 1, 2, 2))
    >>> adapter = VAEAdapter(Model())
    >>> state = adapter.analyse(torch.rand(3, 1, 2, 2), Noise(range(3)), frozenset())
    >>> state["mean"].shape, adapter.generate(Noise(range(5))).shape
    (torch.Size([3, 2]), torch.Size([5, 1, 2, 2]))
    """

    provides = frozenset({"reconstruction", "mean", "log_variance", "latent"})
    intrinsic: tuple[str, ...] = ("kld",)

    def __init__(
        self,
        model: Any,
        *,
        sample_latent: bool = False,
        latent_shape: Sequence[int] | None = None,
        flatten: bool = False,
    ) -> None:
        if not callable(getattr(model, "decode", None)):
            raise TypeError(f"model is a {type(model).__name__} without decode(z); wrap it in a FunctionAdapter")
        super().__init__([model], {"sample_latent": sample_latent, "flatten": flatten})
        self.model, self.sample_latent, self.flatten = model, sample_latent, flatten
        self.latent_shape = None if latent_shape is None else tuple(latent_shape)

    @evaluated
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        mean, log_variance = self._encode(x.flatten(1) if self.flatten else x)
        self.latent_shape = tuple(mean.shape[1:])
        z = mean
        if self.sample_latent:
            z = mean + (log_variance / 2).exp() * noise.normal(*mean.shape[1:]).to(mean)
        return {
            "reconstruction": self._decode(z),
            "mean": mean,
            "log_variance": log_variance,
            "latent": mean.flatten(1),
        }

    @evaluated
    def generate(self, noise: Noise) -> Tensor:
        if self.latent_shape is None:
            raise ValueError("latent_shape is not known before the first analyse(); give it to VAEAdapter")
        return self._decode(noise.normal(*self.latent_shape).to(self.device, self.dtype))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encode = getattr(self.model, "encode", None)
        output = self.model(x) if encode is None else encode(x)
        output = getattr(output, "latent_dist", output)
        if hasattr(output, "mean") and hasattr(output, "logvar"):
            output = output.mean, output.logvar
        parts = output[-2:] if isinstance(output, tuple | list) else ()
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts) or parts[0].shape != parts[1].shape:
            raise TypeError(
                f"{'encode' if encode else 'forward'} of the model returned {describe(output)}; it must return the "
                "mean and the log variance of q(z|x), two tensors of one shape (B, …)"
            )
        if len(parts[0]) != len(x):
            raise ValueError(
                f"the model's mean has shape {tuple(parts[0].shape)} for {len(x)} images; give one row an image"
            )
        return parts[0], parts[1]

    def _decode(self, z: Tensor) -> Tensor:
        output = self.model.decode(z)
        return getattr(output, "sample", output)
