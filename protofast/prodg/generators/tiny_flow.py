"""TinyFlow: a text-to-image generator of Fashion-MNIST's size, trained in minutes on two cores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _weights
from ..._files import digest
from ..._training import forgetting
from .protocol import (
    Prompts,
    check_inputs,
    first_with_gradient,
    flow_sigmas,
    gradient_from,
    saturate,
    standard_normal,
)

STEPS = 4
BATCH = 128
DECAY = 0.998
TRAITS = 12
_NO_PROMPT, _TRAITS_GIVEN, _JITTER, _GUIDANCE = 0.1, 0.5, 0.1, 1.5
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
    def __init__(
        self,
        names: Sequence[str],
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        latents: int = 128,
        width: int = 384,
        blocks: int = 3,
        tokens: int = 4,
        token_size: int = 32,
        pooled_size: int = 32,
    ) -> None:
        super().__init__()
        self.names = (*names, "")
        self.image_shape: Any = tuple(image_shape)
        self.sizes = dict(latents=latents, width=width, blocks=blocks, tokens=tokens, token_size=token_size, pooled_size=pooled_size)
        self.prompt_shape, self.pooled_size = (tokens, token_size), pooled_size
        pixels = math.prod(self.image_shape)
        count = len(self.names)
        self.register_buffer("tokens", torch.randn(count, tokens, token_size))
        self.register_buffer("pooled", torch.randn(count, pooled_size))
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("basis", torch.zeros(latents, pixels))
        self.register_buffer("spread", torch.ones(latents))
        condition = 256
        self.prompt = nn.Linear(tokens * token_size + pooled_size, condition)
        self.time = nn.Sequential(nn.Linear(64, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.join = nn.Sequential(nn.SiLU(), nn.Linear(condition, condition), nn.SiLU())
        self.enter = nn.Linear(latents, width)
        self.blocks = nn.ModuleList(_Block(width, condition) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, latents)

    @property
    def device(self):
        return self.mean.device

    def velocity(self, x, sigma, prompts):
        frequencies = torch.exp(torch.arange(32, device=x.device, dtype=x.dtype) * (-math.log(1000.0) / 31)) * 100
        angles = sigma.reshape(-1, 1) * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        condition = self.join(time + self.prompt(torch.cat([prompts.embedding.flatten(1), prompts.pooled], 1)))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(self.norm(h))

    def encode(self, texts):
        rows = torch.tensor([self.names.index(t) for t in texts])
        return Prompts(self.tokens[rows], self.pooled[rows])

    def noise(self, count, *, generator=None):
        return standard_normal((count, self.sizes["latents"]), self.mean, generator)

    def decode(self, latents):
        images = self.mean + (latents * self.spread) @ self.basis
        return saturate(images.unflatten(1, self.image_shape))

    def generate(self, prompts, noise, *, steps=None, through=None):
        check_inputs(self, prompts, noise)
        sigmas = flow_sigmas(STEPS if steps is None else steps)
        first = first_with_gradient(len(sigmas) - 1, through)
        x = noise
        for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
            with gradient_from(first, step):
                v = self.velocity(x, x.new_full((len(x),), sigma), prompts)
                x = x + (after - sigma) * v
        return self.decode(x)
