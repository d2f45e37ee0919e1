"""Generators, with an inverter or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..noise import Noise
from .base import Model, State, describe, evaluated


class GeneratorAdapter(Model):
    """A generator ``z → images`` such as a GAN; without an inverter, z is found by Adam on the squared error.

    Intrinsic criterion "latent_nll", ½‖z‖² at the z found; reconstruction is the generator's image of it.

    Parameters
    ----------
    generator : callable
        z (B, *latent_shape) → images (B, C, H, W).
    latent_shape : sequence of int
    inverter : callable, optional
        Images (B, C, H, W) → z.
    steps : int, default 200
        Adam steps of the search; the best z on the way is kept.
    learning_rate : float, default 0.05

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import GeneratorAdapter, Noise
    >>> adapter = GeneratorAdapter(lambda z: z.sigmoid().reshape(-1, 1, 2, 2), (4,), steps=300)
    >>> x = torch.full((2, 1, 2, 2), 0.6)
    >>> state = adapter.analyse(x, Noise(range(2)), frozenset())
    >>> torch.allclose(state["reconstruction"], x, atol=0.01)
    True
    """

    provides = frozenset({"reconstruction", "latent"})
    intrinsic: tuple[str, ...] = ("latent_nll",)

    def __init__(
        self,
        generator: Callable[[Tensor], Tensor],
        latent_shape: Sequence[int],
        inverter: Callable[[Tensor], Tensor] | None = None,
        *,
        steps: int = 200,
        learning_rate: float = 0.05,
    ) -> None:
        if steps < 1 or not learning_rate > 0:
            raise ValueError(f"steps is {steps} and learning_rate {learning_rate}; both must be positive")
        self.latent_shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
        settings = {"latent_shape": self.latent_shape, "steps": steps, "learning_rate": learning_rate}
        super().__init__([generator, inverter], settings)
        self.generator, self.inverter, self.steps, self.learning_rate = generator, inverter, steps, learning_rate

    @evaluated
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        z = self._search(x, noise) if self.inverter is None else self.inverter(x)
        if not isinstance(z, Tensor) or tuple(z.shape) != (len(x), *self.latent_shape):
            raise ValueError(f"the inverter returned {describe(z)}; it must return (B, *{self.latent_shape})")
        return {"reconstruction": self.generator(z), "latent": z.flatten(1)}

    @evaluated
    def generate(self, noise: Noise) -> Tensor:
        return self.generator(noise.normal(*self.latent_shape).to(self.device, self.dtype))

    def _search(self, x: Tensor, noise: Noise) -> Tensor:
        """Each sample's z by its own Adam: the moments are elementwise and the loss is a sum over samples."""
        z = noise.normal(*self.latent_shape).to(self.device, self.dtype).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.learning_rate)
        best, least = z.detach().clone(), torch.full((len(x),), torch.inf, device=x.device)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                images = self.generator(z)
                if images.shape != x.shape:
                    raise ValueError(f"the generator made {tuple(images.shape)} where anchors are {tuple(x.shape)}")
                error = (images - x).square().flatten(1).mean(1)
                if step < self.steps:
                    (z.grad,) = torch.autograd.grad(error.sum(), z)
            better = error.detach() < least
            least = torch.where(better, error.detach(), least)
            best = torch.where(better.reshape(-1, *[1] * (z.ndim - 1)), z.detach(), best)
            if step < self.steps:
                optimizer.step()
        return best
