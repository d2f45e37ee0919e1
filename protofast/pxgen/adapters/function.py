"""Any model, by functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..noise import Noise
from .base import Model, State, evaluated


class FunctionAdapter(Model):
    """Any model, by functions of your own.

    Parameters
    ----------
    generate : callable
        ``generate(count, generator)`` → images (count, C, H, W); `generator` is a seeded `torch.Generator` on the
        CPU.
    reconstruct : callable
        Images (B, C, H, W) → reconstructions of that shape.
    encode : callable, optional
        Images → latents (B, …), for ``features="latents"`` and the criterion "latent_nll".
    modules : sequence of torch.nn.Module
        The networks behind the functions: put in evaluation mode while they run, and watched for changes when a run
        is resumed. Functions that are modules, or methods of modules, need not be listed.

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import FunctionAdapter, Noise
    >>> adapter = FunctionAdapter(
    ...     generate=lambda count, generator: torch.rand(count, 1, 4, 4, generator=generator),
    ...     reconstruct=lambda x: x.round(),
    ... )
    >>> adapter.generate(Noise(range(5))).shape
    torch.Size([5, 1, 4, 4])
    """

    intrinsic: tuple[str, ...] = ()

    def __init__(
        self,
        generate: Callable[[int, torch.Generator], Tensor],
        reconstruct: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor] | None = None,
        *,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__([generate, reconstruct, encode, *modules], {})
        self._generate, self._reconstruct, self._encode = generate, reconstruct, encode
        self.provides = frozenset({"reconstruction"} | ({"latent"} if encode else set()))

    @evaluated
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        state = {"reconstruction": self._reconstruct(x)}
        if self._encode is not None and "latent" in needs:
            state["latent"] = self._encode(x).flatten(1)
        return state

    @evaluated
    def generate(self, noise: Noise) -> Tensor:
        return self._generate(len(noise), noise.generator())
