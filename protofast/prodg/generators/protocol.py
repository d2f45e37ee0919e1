"""What a generator is to the rest of the package: embeddings of prompts in, images out, gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

STEPS = 4
"""Of a generator that few are enough for, such as FLUX.1-schnell."""


class Prompts(NamedTuple):
    """Prompts as a generator reads them.

    Attributes
    ----------
    embedding : Tensor of shape (m, L, E)
        L tokens each.
    pooled : Tensor of shape (m, E2)
        One vector for the whole prompt; E2 is 0 for generators that have none.
    """

    embedding: Tensor
    pooled: Tensor


@runtime_checkable
class Generator(Protocol):
    """A text-to-image model that can be differentiated with respect to its prompts."""

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Tokens L and their size E."""

    @property
    def pooled_size(self) -> int:
        """E2, or 0."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(c, H, W) of what `generate` returns."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, texts: Sequence[str]) -> Prompts:
        """Prompts of texts, without gradients."""

    def noise(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """What `count` images start from, on the device."""

    def generate(
        self, prompts: Prompts, noise: Tensor, *, steps: int | None = None, through: int | None = None
    ) -> Tensor:
        """Images (m, c, H, W) in [0, 1], differentiable in `prompts`: through the last `through` steps, or all."""


def flow_sigmas(steps: int) -> list[float]:
    """Noise levels of a rectified flow: ``linspace(1, 1/steps, steps)``, and 0 at the end.

    Examples
    --------
    >>> from protofast.prodg.generators.protocol import flow_sigmas
    >>> flow_sigmas(4)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    return [1 - step / steps for step in range(steps)] + [0.0]


def first_with_gradient(steps: int, through: int | None) -> int:
    """The step from which on gradients flow."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    if through is None:
        return 0
    if not 1 <= through <= steps:
        raise ValueError(f"through is {through}; give 1 to {steps}, the number of steps, or None for all")
    return steps - through


def gradient_from(first: int, step: int) -> Any:
    """A context without gradients before step `first`; none of its own after."""
    return torch.no_grad() if step < first else nullcontext()


def check_inputs(generator: Generator, prompts: Prompts, noise: Tensor) -> None:
    """Raises ValueError unless these are prompts of the generator, and as many noises."""
    embedding, pooled = prompts
    if embedding.ndim != 3 or tuple(embedding.shape[1:]) != tuple(generator.prompt_shape):
        tokens, size = generator.prompt_shape
        raise ValueError(f"prompts.embedding has shape {tuple(embedding.shape)}; give (m, {tokens}, {size})")
    if tuple(pooled.shape) != (len(embedding), generator.pooled_size):
        raise ValueError(
            f"prompts.pooled has shape {tuple(pooled.shape)}; give ({len(embedding)}, {generator.pooled_size})"
        )
    if len(noise) != len(embedding):
        raise ValueError(f"noise has {len(noise)} rows for {len(embedding)} prompts; give generator.noise(m)")


def standard_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn where the generator is, so that a seed means the same noise on every device; float32 before it is cast."""
    device = like.device if generator is None else generator.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator).to(like)


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (images,), (gradient,) = ctx.saved_tensors, gradients
        outwards = ((images > 1) & (gradient < 0)) | ((images < 0) & (gradient > 0))
        return gradient.masked_fill(outwards, 0)


def saturate(images: Tensor) -> Tensor:
    """Clamps to [0, 1]; of a saturated pixel only the gradient that leads back is kept.

    A plain clamp has no gradient where it saturates, so a white pixel stays white for ever. The identity's gradient
    would push it on without end, for nothing. So this one passes what a *descent* brings back into [0, 1], and is
    exact inside: give it losses that are to become smaller.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.generators.protocol import saturate
    >>> pixels = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    >>> saturate(pixels).sum().backward()
    >>> pixels.grad
    tensor([0., 1., 1.])
    """
    return _Saturate.apply(images)
