"""TinyFlow: a text-to-image generator of Fashion-MNIST's size, trained in minutes on two cores."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _weights
from ..._files import digest
from ..._training import forgetting
from .protocol import (
    STEPS,
    Prompts,
    check_inputs,
    first_with_gradient,
    flow_sigmas,
    gradient_from,
    saturate,
    standard_normal,
)

BATCH = 256
LATENTS = 128
TRAITS = 16
_DECAY, _NO_TEXT, _TRAITS_GIVEN, _JITTER = 0.998, 0.1, 0.5, 0.1
_CONDITION, _FREQUENCIES = 256, 32
_FORMAT = "protofast-prodg-tiny-flow-1"


class _Block(nn.Module):
    """x + gate · MLP(scale · LN(x) + shift), where the condition gives the three."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 3 * width)
        self.body = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, 1)
        return x + gate * self.body(self.norm(x) * (1 + scale) + shift)


class TinyFlow(nn.Module):
    """A rectified flow over principal components of images, conditioned on prompts; a `Generator`.

    It stands where FLUX stands in the paper, part for part: a table of prompts for the text encoders, the velocity
    e − x₀ for the transformer, four Euler steps, and principal components for the autoencoder.

    Parameters
    ----------
    names : sequence of str
        Texts that have a prompt, such as names of classes; "" has one too, all zeros.
    image_shape : (int, int, int), default (1, 28, 28)
    latents : int, optional
        Principal components; by default 128, or all there are.
    width, blocks : int
        Of the residual blocks.
    tokens, token_size, pooled_size : int
        L, E and E2 of the prompts.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.generators import TinyFlow
    >>> flow = TinyFlow(["shirt", "boot"], image_shape=(1, 8, 8), latents=8, width=16)
    >>> prompts = flow.encode(["boot", ""])
    >>> flow.generate(prompts, flow.noise(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    texts: Tensor
    pooled_texts: Tensor
    mean: Tensor
    basis: Tensor
    spread: Tensor

    def __init__(
        self,
        names: Sequence[str],
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        latents: int | None = None,
        width: int = 384,
        blocks: int = 3,
        tokens: int = 4,
        token_size: int = 32,
        pooled_size: int = 32,
    ) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names) or "" in names:
            raise ValueError(f"names is {list(names)}; give different texts, at least one, none of them empty")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape is {tuple(image_shape)}; give (channels, height, width)")
        pixels = math.prod(image_shape)
        latents = min(LATENTS, pixels) if latents is None else latents
        if not 1 <= latents <= pixels:
            raise ValueError(f"latents is {latents}; give 1 to {pixels}, the pixels")
        self.names = (*names, "")
        self.image_shape = (int(image_shape[0]), int(image_shape[1]), int(image_shape[2]))
        self.prompt_shape, self.pooled_size = (tokens, token_size), pooled_size
        self.sizes = {"latents": latents, "width": width, "blocks": blocks}
        self.sizes |= {"tokens": tokens, "token_size": token_size, "pooled_size": pooled_size}
        self.register_buffer("texts", torch.zeros(len(self.names), tokens, token_size))
        self.register_buffer("pooled_texts", torch.zeros(len(self.names), pooled_size))
        self.texts[:-1].normal_()
        self.pooled_texts[:-1].normal_()
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(latents, pixels))
        self.register_buffer("spread", torch.ones(latents))
        self.prompt = nn.Linear(tokens * token_size + pooled_size, _CONDITION)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, _CONDITION), nn.SiLU(), nn.Linear(_CONDITION, _CONDITION))
        self.join = nn.Sequential(nn.SiLU(), nn.Linear(_CONDITION, _CONDITION), nn.SiLU())
        self.enter = nn.Linear(latents, width)
        self.blocks = nn.ModuleList(_Block(width, _CONDITION) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, latents)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: Prompts) -> Tensor:
        """e − x₀ (m, latents) at (1 − σ)·x₀ + σ·e, of noise levels σ (m,)."""
        places = torch.arange(_FREQUENCIES, device=latents.device, dtype=latents.dtype) / (_FREQUENCIES - 1)
        angles = sigma[:, None] * 100 * 1000.0**-places
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        condition = self.join(time + self.prompt(torch.cat([prompts.embedding.flatten(1), prompts.pooled], 1)))
        hidden = self.enter(latents)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(self.norm(hidden))

    def encode(self, texts: Sequence[str]) -> Prompts:
        """Prompts of known texts.

        Raises
        ------
        ValueError
            For any other; it names those that are known.
        """
        if unknown := [text for text in texts if text not in self.names]:
            raise ValueError(f"texts has {unknown[0]!r}; this generator knows {', '.join(map(repr, self.names))}")
        rows = torch.tensor([self.names.index(text) for text in texts], dtype=torch.int64, device=self.device)
        return Prompts(self.texts[rows], self.pooled_texts[rows])

    def noise(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(count, latents)."""
        return standard_normal((count, self.sizes["latents"]), self.mean, generator)

    def generate(
        self, prompts: Prompts, noise: Tensor, *, steps: int | None = None, through: int | None = None
    ) -> Tensor:
        """Images (m, c, H, W) in [0, 1], by 4 steps unless told otherwise."""
        check_inputs(self, prompts, noise)
        sigmas = flow_sigmas(STEPS if steps is None else steps)
        first = first_with_gradient(len(sigmas) - 1, through)
        latents = noise
        for step, (sigma, after) in enumerate(pairwise(sigmas)):
            with gradient_from(first, step):
                velocity = self.velocity(latents, latents.new_full((len(latents),), sigma), prompts)
                latents = latents + (after - sigma) * velocity
        images = self.mean + (latents * self.spread) @ self.basis
        return saturate(images.unflatten(1, self.image_shape))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file that `load` reads, whole or not at all."""
        about = {"names": self.names[:-1], "image_shape": self.image_shape, "sizes": self.sizes}
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        _weights.write(path, _FORMAT, state, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TinyFlow:
        """Reads what `save` wrote; frozen, in evaluation mode."""
        state, found = _weights.read(path, _FORMAT, wrong="holds no TinyFlow; give one that `TinyFlow.save` wrote")
        about = json.loads(found["about"])
        flow = cls(about["names"], image_shape=about["image_shape"], **about["sizes"])
        flow.load_state_dict(state)
        return flow.requires_grad_(False).eval()


def train_tiny_flow(
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    updates: int = 4000,
    lr: float = 2e-3,
    seed: int = 0,
    cache: bool | str | os.PathLike[str] = True,
    progress: Callable[[int, int], None] | None = None,
    **sizes: int,
) -> TinyFlow:
    """Trains a TinyFlow on labelled images: what is to be a general image generator has to have seen some.

    A prompt is its class's, or that of "", plus, half the time, a fixed linear map of the image's first 16 principal
    components, standardised. So a direction in prompt space means a look, as in a text encoder's, and moving a prompt
    can ask for more than the ten names.

    Parameters
    ----------
    images : Tensor of shape (n, c, H, W)
        In [0, 1].
    labels : int64 Tensor of shape (n,)
    names : sequence of str
        Of the classes.
    updates, lr : int, float
        Adam by one cycle, batches of 256; the average of the weights is kept.
    seed : int, default 0
    cache : bool or path, default True
        The folder of the weights: True is the user's cache folder, False keeps nothing.
    progress : callable, optional
        ``progress(done, total)`` in updates.
    **sizes
        As for `TinyFlow`.

    Returns
    -------
    TinyFlow
        Frozen, in evaluation mode.

    Raises
    ------
    ValueError
        Naming the argument.
    FloatingPointError
        When the loss is not finite.
    """
    if images.ndim != 4 or len(images) != len(labels) or len(images) < 2:
        raise ValueError(
            f"images and labels have shapes {tuple(images.shape)}, {tuple(labels.shape)}; give (n, c, H, W), (n,)"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise ValueError(f"labels runs from {int(labels.min())} to {int(labels.max())}; names has {len(names)}")
    if updates < 1:
        raise ValueError(f"updates is {updates}; give at least 1")
    settings = [_FORMAT, list(images.shape), digest(labels), list(names), updates, lr, seed, sizes]
    path = _weights.place(cache, "tiny-flow", settings, images)
    if path is not None and path.exists():
        with suppress(OSError, ValueError):
            return TinyFlow.load(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = TinyFlow(names, image_shape=images.shape[1:], **sizes)
        latents = _fit_components(flow, images)
        average = _learn(flow, latents, labels, updates, lr, progress)
    average.requires_grad_(False).eval()
    if path is not None:
        with suppress(OSError):  # a full or read-only cache costs the next run its time, not this its result
            average.save(path)
    return average


def _fit_components(flow: TinyFlow, images: Tensor) -> Tensor:
    """Sets the flow's principal components; returns the images' own (n, latents), standardised."""
    flat = images.flatten(1)
    flow.mean.copy_(flat.mean(0))
    centred = flat - flow.mean
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())
    flow.basis.copy_(vectors.flip(1)[:, : len(flow.basis)].T)
    latents = centred @ flow.basis.T
    flow.spread.copy_(latents.std(0).clamp(min=1e-3))
    return latents / flow.spread


def _learn(
    flow: TinyFlow,
    latents: Tensor,
    labels: Tensor,
    updates: int,
    lr: float,
    progress: Callable[[int, int], None] | None,
) -> TinyFlow:
    average = copy.deepcopy(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    traits = min(TRAITS, latents.shape[1])
    tokens, pooled = flow.texts[0], flow.pooled_texts[0]
    looks, pooled_looks = (
        torch.randn(traits, tokens.numel() + len(pooled)).div(traits**0.5).split([tokens.numel(), len(pooled)], 1)
    )
    for update in range(updates):
        rows = torch.randint(len(latents), (BATCH,))
        x = latents[rows]
        texts = torch.where(torch.rand(BATCH) < _NO_TEXT, len(flow.names) - 1, labels[rows])
        given = x[:, :traits] * (torch.rand(BATCH, 1) < _TRAITS_GIVEN)
        embedding = flow.texts[texts] + (given @ looks).unflatten(1, tokens.shape)
        prompts = Prompts(
            embedding + _JITTER * torch.randn_like(embedding),
            flow.pooled_texts[texts] + given @ pooled_looks + _JITTER * torch.randn(BATCH, len(pooled)),
        )
        sigma, noise = torch.randn(BATCH).sigmoid(), torch.randn_like(x)
        mixed = x + sigma[:, None] * (noise - x)
        loss = F.mse_loss(flow.velocity(mixed, sigma, prompts), noise - x)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {float(loss)} in update {update + 1}; lower lr, which is {lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        decay = forgetting(_DECAY, update)
        with torch.no_grad():
            for kept, value in zip(average.parameters(), flow.parameters(), strict=True):
                kept.lerp_(value, 1 - decay)
        if progress is not None:
            progress(update + 1, updates)
    return average
