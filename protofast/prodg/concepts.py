"""What every method here ends in: a basis of the channels, a head for it, and prototypes that show each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..channels import rotate_and_pool
from .networks import SplitNetwork

Source = Callable[[int, int, int], Tensor]
"""(channel, count, seed) → prototypes (count, c, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Concepts:
    """A frozen classifier seen through a basis of its channels; one channel is one concept.

    Attributes
    ----------
    method : str
        "prodg", "epic" or "infodisent".
    network : SplitNetwork
    matrix : Tensor of shape (C, C)
        U: the rotated map is U f at every pixel f.
    weight, bias : Tensors of shape (N, C) and (N,)
        The head over pooled rotated channels: W Uᵀ where it is compensated.
    prototypes : callable
        ``prototypes(channel, count, seed)`` gives images (count, c, H, W) in [0, 1] that show a channel.
    pool : {"mean", "signed_max"}
        How a rotated channel becomes a number.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg import Concepts, SplitNetwork
    >>> network = SplitNetwork(torch.nn.Conv2d(1, 4, 3), torch.randn(3, 4), torch.zeros(3), input_shape=(1, 8, 8))
    >>> noise = lambda channel, count, seed: torch.rand(count, 1, 8, 8)
    >>> same = Concepts("none", network, torch.eye(4), network.weight, network.bias, noise)
    >>> images = torch.rand(2, 1, 8, 8)
    >>> torch.allclose(same.logits(network.maps(images)), network(images), atol=1e-6)
    True
    """

    method: str
    network: SplitNetwork
    matrix: Tensor
    weight: Tensor
    bias: Tensor
    prototypes: Source
    pool: str = "mean"

    def activations(self, maps: Tensor) -> Tensor:
        """Pooled rotated channels (B, C) of feature maps (B, C, h, w)."""
        return rotate_and_pool(maps, self.matrix, pool=self.pool).value

    def logits(self, maps: Tensor) -> Tensor:
        """(B, N): Σ_c W'_yc h_c + b_y."""
        with torch.autocast(maps.device.type, enabled=False):
            return torch.nn.functional.linear(self.activations(maps), self.weight, self.bias)

    def strongest(self, activations: Tensor, target: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Scores and channels (B, top) that speak most for a class: largest W'_yc · relu(h_c), ties to the lowest.

        Of activations (B, C), for classes y = `target` (B,).
        """
        score = self.weight[target] * activations.clamp(min=0)
        found = score.sort(dim=1, descending=True, stable=True)
        return found.values[:, :top], found.indices[:, :top]
