"""The prompt bank: for each channel a Gaussian over prompts (arXiv 2605.08858, fig. 3)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _weights
from ..channels import purity_of_all
from .generators.protocol import Generator, Prompts
from .networks import SplitNetwork

_FORMAT = "protofast-prodg-bank-1"
_RANDOM = 0.02


class PromptBank(nn.Module):
    """Prompts N(anchor + A_c B_c, σ_c²) and pooled prompts N(anchor + δ_c, σ_c²), c a channel.

    Parameters
    ----------
    channels : int
        C.
    anchor : Tensor of shape (L, E) or (C, L, E)
        One for all, kept once; or one a channel.
    pooled_anchor : Tensor of shape (E2,) or (C, E2)
        E2 is 0 for generators without a pooled prompt.
    rank : int, default 4
        Of the offsets A_c (L, rank) · B_c (rank, E). A starts as 0.01·N(0, 1) and B as 0, so every prompt starts at its
        anchor.
    logvar : float, default −8
        Where the log-variances, one a token and one a pooled entry, start: σ = 0.018.
    seed : int, default 0
        Of A.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg import PromptBank
    >>> bank = PromptBank(8, torch.zeros(4, 32), torch.zeros(16))
    >>> embedding, pooled = bank(torch.tensor([3, 3, 5]))
    >>> embedding.shape, pooled.shape, float(bank.regularization(torch.tensor([3])))
    (torch.Size([3, 4, 32]), torch.Size([3, 16]), 0.0)
    """

    anchor: Tensor
    pooled_anchor: Tensor

    def __init__(
        self,
        channels: int,
        anchor: Tensor,
        pooled_anchor: Tensor,
        *,
        rank: int = 4,
        logvar: float = -8.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}; give at least 1")
        if rank < 1:
            raise ValueError(f"rank is {rank}; give at least 1")
        for name, value, rank_of in (("anchor", anchor, 2), ("pooled_anchor", pooled_anchor, 1)):
            if value.ndim not in (rank_of, rank_of + 1) or (value.ndim > rank_of and len(value) != channels):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; give one for all, or one for each of {channels}"
                )
        self.channels = channels
        self.register_buffer("anchor", anchor.detach().clone())
        self.register_buffer("pooled_anchor", pooled_anchor.detach().clone())
        tokens, size = anchor.shape[-2:]
        draws = torch.Generator().manual_seed(seed)
        kind = torch.float64 if anchor.dtype == torch.float64 else torch.float32
        self.down = nn.Parameter(0.01 * torch.randn(channels, tokens, rank, generator=draws, dtype=kind))
        self.up = nn.Parameter(torch.zeros(channels, rank, size, dtype=kind))
        self.pooled_offset = nn.Parameter(torch.zeros(channels, pooled_anchor.shape[-1], dtype=kind))
        self.logvar = nn.Parameter(torch.full((channels, tokens, 1), float(logvar), dtype=kind))
        self.pooled_logvar = nn.Parameter(torch.full((channels, pooled_anchor.shape[-1]), float(logvar), dtype=kind))
        self.to(anchor.device)

    def forward(self, channels: Tensor, *, generator: torch.Generator | None = None, noise: bool = True) -> Prompts:
        """Draws a prompt for each of `channels` (m,); without `noise` its mean. Differentiable in the bank."""
        self._check(channels)
        channels = channels.to(self.down.device)
        embedding = self.down[channels] @ self.up[channels]
        pooled = self.pooled_offset[channels]
        if noise:
            embedding = embedding + (0.5 * self.logvar[channels]).exp() * _normal(embedding, generator)
            pooled = pooled + (0.5 * self.pooled_logvar[channels]).exp() * _normal(pooled, generator)
        anchor = self.anchor[channels] if self.anchor.ndim == 3 else self.anchor
        pooled_anchor = self.pooled_anchor[channels] if self.pooled_anchor.ndim == 2 else self.pooled_anchor
        return Prompts((anchor + embedding).to(anchor), (pooled_anchor + pooled).to(anchor))

    def regularization(self, channels: Tensor) -> Tensor:
        """L_reg: mean of (A_c B_c)² and mean of δ_c², over the given channels."""
        self._check(channels)
        channels = channels.to(self.down.device)
        offset = (self.down[channels] @ self.up[channels]).square().mean()
        return offset + self.pooled_offset[channels].square().mean() if self.pooled_offset.shape[1] else offset

    def _check(self, channels: Tensor) -> None:
        if channels.ndim != 1 or channels.dtype != torch.int64:
            raise ValueError(
                f"channels has shape {tuple(channels.shape)} and dtype {channels.dtype}; give int64 of shape (m,)"
            )
        if len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < self.channels:
            raise IndexError(
                f"channels runs from {int(channels.min())} to {int(channels.max())}; the bank has {self.channels}"
            )

    @classmethod
    @torch.no_grad()
    def from_prompts(
        cls,
        generator: Generator,
        channels: int,
        *,
        init: str = "empty",
        network: SplitNetwork | None = None,
        class_names: Sequence[str] | None = None,
        rank: int = 4,
        logvar: float = -8.0,
        seed: int = 0,
    ) -> PromptBank:
        """A bank whose anchors are prompts of the generator.

        Parameters
        ----------
        generator : Generator
        channels : int
        init : {"empty", "data", "random"}
            The prompt "" for all; for each channel the class *name* of `class_names` in whose generated image it is
            purest before any rotation (no data set is read: the paper's name for it); or 0.02·N(0, 1).
        network, class_names
            For ``init="data"``.
        rank, logvar, seed
            As for `PromptBank`.
        """
        made: Any = {"rank": rank, "logvar": logvar, "seed": seed}
        if init == "empty":
            embedding, pooled = generator.encode([""])
            return cls(channels, embedding[0], pooled[0], **made)
        draws = torch.Generator().manual_seed(seed)
        if init == "random":
            drawn = _RANDOM * torch.randn(*generator.prompt_shape, generator=draws)
            pooled = _RANDOM * torch.randn(generator.pooled_size, generator=draws)
            like = generator.encode([""]).embedding
            return cls(channels, drawn.to(like), pooled.to(like), **made)
        if init != "data":
            raise ValueError(f"init is {init!r}; choose 'empty', 'data' or 'random'")
        if network is None or not class_names:
            raise ValueError("init is 'data'; give network and class_names")
        if channels != network.channels:
            raise ValueError(f"channels is {channels}; the network has {network.channels}")
        prompts = generator.encode(list(class_names))
        maps = []
        for row in range(len(class_names)):
            one = Prompts(prompts.embedding[row : row + 1], prompts.pooled[row : row + 1])
            maps.append(
                network.maps(generator.generate(one, generator.noise(1, generator=draws)).to(network.weight.device))
            )
        best = purity_of_all(torch.cat(maps), torch.eye(channels, device=network.weight.device)).purity.argmax(0)
        best = best.to(prompts.embedding.device)
        return cls(channels, prompts.embedding[best], prompts.pooled[best], **made)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file that `load` reads, whole or not at all."""
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        about = {"channels": self.channels, "rank": self.down.shape[2]}
        _weights.write(path, _FORMAT, state, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PromptBank:
        """Reads what `save` wrote."""
        state, found = _weights.read(
            path, _FORMAT, wrong="holds no prompt bank; give one that `protofast prodg train` wrote"
        )
        about = json.loads(found["about"])
        bank = cls(about["channels"], state["anchor"], state["pooled_anchor"], rank=about["rank"])
        bank.load_state_dict(state)
        return bank


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
