"""Images that a network is run over: pooled features of all, feature maps of some."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._progress import Advance
from ..data import Dataset
from .networks import SplitNetwork

BATCH = 256


def as_dataset(images: Dataset | Tensor) -> Dataset:
    """A data set as it is; a tensor (n, c, H, W) in [0, 1] as one."""
    if isinstance(images, Dataset):
        return images
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = (
            f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        )
        raise TypeError(f"images is {found}; give a protofast.data.Dataset, or a floating-point tensor (n, c, H, W)")
    return Dataset(images.cpu().numpy(), source="images")


def check_takes(network: SplitNetwork, images: Dataset) -> None:
    if not len(images):
        raise ValueError(f"{images.source} is empty; give images")
    if images.image_shape[0] not in (1, network.input_shape[0]):
        raise ValueError(
            f"{images.source} has {images.image_shape[0]} channels; {network.title} takes {network.input_shape[0]}"
        )


@torch.no_grad()
def pooled_features(network: SplitNetwork, images: Dataset, advance: Advance | None = None) -> Tensor:
    """Mean over space of all feature maps: (n, C) on the CPU."""
    found = []
    for batch, _ in images.batches(BATCH):
        found.append(network.maps(batch.to(network.weight.device)).mean((2, 3)).cpu())
        if advance is not None:
            advance(len(batch))
    return torch.cat(found)


@torch.no_grad()
def maps_of(network: SplitNetwork, images: Dataset, ids: Tensor) -> Iterator[Tensor]:
    """Feature maps (b, C, h, w) of the images `ids`, in batches, on the network's device."""
    for part in ids.split(BATCH):
        yield network.maps(images.take(part).to(network.weight.device))


@dataclass(frozen=True)
class Chosen:
    """Prototypes that are real images: ``chosen(channel, count)``; nothing is drawn.

    Attributes
    ----------
    images : Dataset
    ids : int64 Tensor of shape (k, C)
        For each channel the images that show it most, largest first.
    """

    images: Dataset
    ids: Tensor

    def __call__(self, channel: int, count: int, seed: int = 0) -> Tensor:
        """(count, c, H, W) in [0, 1]."""
        kept, channels = self.ids.shape
        if not 0 <= channel < channels:
            raise IndexError(f"channel is {channel}; the network has 0 to {channels - 1}")
        if not 1 <= count <= kept:
            raise ValueError(f"count is {count}; give 1 to {kept}, the images that are kept of a channel")
        return self.images.take(self.ids[:count, channel])

    def about(self) -> dict[str, str]:
        """What a file says of the images, for `of`."""
        return {"images": self.images.digest()}

    @classmethod
    def of(cls, images: Dataset, ids: Tensor, about: Mapping[str, str], folder: str | os.PathLike[str]) -> Chosen:
        """Those of a file; raises ValueError where the images are others."""
        if about["images"] != images.digest():
            raise ValueError(f"{folder} is of other images than {images.source}; give those that it was trained on")
        return cls(images, ids)
