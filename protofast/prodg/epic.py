"""EPIC: a rotation learned from real images, and the images that show each channel (arXiv 2505.12897)."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _weights
from .._files import replacing
from .._progress import bars
from ..channels import ColumnTopK
from ..data import Dataset
from .concepts import Concepts
from .config import check_numbers, check_whole
from .images import Chosen, as_dataset, check_takes, maps_of, pooled_features
from .losses import pure
from .networks import SplitNetwork, compensate
from .rotation import PARAMETRIZATIONS, Rotation

CONFIG, WEIGHTS = "config.json", "epic.safetensors"
_FORMAT = "protofast-epic-1"
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class EPICConfig:
    """How EPIC's rotation is learned; the release's defaults.

    Attributes
    ----------
    stages, epochs : int
        Before each stage every channel's images are chosen anew; then so many epochs over all (image, channel) pairs.
    most, fewest : int
        Images of a channel: ``max(fewest, most − (most − fewest)/stages · s)`` in stage s, so it never falls to
        `fewest` itself.
    batch : int
        Pairs.
    lr, decay : float
        Adam's.
    parametrization : {"matrix_exp", "cayley", "orthogonal", "invertible"}
    """

    stages: int = 10
    epochs: int = 2
    most: int = 100
    fewest: int = 5
    batch: int = 512
    lr: float = 1e-3
    decay: float = 1e-5
    parametrization: str = "matrix_exp"

    def __post_init__(self) -> None:
        check_whole(self, 1, "stages", "epochs", "most", "fewest", "batch")
        check_numbers(self, "lr", "decay")
        if self.fewest > self.most:
            raise ValueError(f"fewest is {self.fewest}, more than most, {self.most}")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization is {self.parametrization!r}; choose one of {', '.join(PARAMETRIZATIONS)}"
            )

    def count(self, stage: int) -> int:
        """Images of a channel in a stage."""
        return int(max(self.fewest, self.most - (self.most - self.fewest) / self.stages * stage))


EPIC_PRESETS = {
    "paper": EPICConfig(),
    "cpu": EPICConfig(parametrization="cayley"),
    "few": EPICConfig(stages=5, epochs=2, most=10, batch=1024, parametrization="cayley"),
}
"""The release's settings; the same with the cheaper rotation; and some for tens of images in place of thousands."""


@dataclass
class EPIC:
    """A frozen classifier's channels, rotated, and the real images that show each of them.

    Attributes
    ----------
    network : SplitNetwork
    rotation : Rotation
    prototypes : Chosen
        The images of largest mean of each rotated channel.
    config : EPICConfig
    history : list of dict
        A row a stage: "stage", "images" (of a channel), "purity" (mean over its pairs, while it learned), "seconds".
    """

    network: SplitNetwork
    rotation: Rotation
    prototypes: Chosen
    config: EPICConfig
    history: list[dict[str, float]] = field(default_factory=list)

    @torch.no_grad()
    def concepts(self) -> Concepts:
        """For `explain` and the evaluation: logits are those of the network."""
        weight = compensate(self.network.weight, self.rotation)
        matrix = self.rotation().detach()
        return Concepts("epic", self.network, matrix, weight, self.network.bias, self.prototypes)

    def save(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes rotation, choice of images and settings into a folder; network and images have files of their own."""
        folder = Path(folder)
        state = {f"rotation.{name}": value.detach().cpu() for name, value in self.rotation.state_dict().items()}
        _weights.write(folder / WEIGHTS, _FORMAT, {**state, "ids": self.prototypes.ids}, self.prototypes.about())
        with replacing(folder / CONFIG) as file:  # last: with it the folder is complete
            content = {"format": _FORMAT, "config": dataclasses.asdict(self.config), "history": self.history}
            file.write(json.dumps({**content, "about": about}, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], network: SplitNetwork, images: Dataset | Tensor) -> EPIC:
        """Reads what `save` wrote, of this network and these images.

        Raises
        ------
        FileNotFoundError
        ValueError
            When a file is damaged, or of other images or another network.
        """
        folder, images = Path(folder), as_dataset(images)
        state, about = _weights.read(folder / WEIGHTS, _FORMAT, wrong="holds no rotation of EPIC")
        content = json.loads((folder / CONFIG).read_bytes())
        prototypes = Chosen.of(images, state.pop("ids"), about, folder)
        config = EPICConfig(**content["config"])
        if (channels := prototypes.ids.shape[1]) != network.channels:
            raise ValueError(f"{folder} is of {channels} channels, and the network has {network.channels}")
        rotation = Rotation(network.channels, parametrization=config.parametrization)
        rotation.load_state_dict({name.removeprefix("rotation."): value for name, value in state.items()})
        return cls(network, rotation.to(network.weight.device), prototypes, config, content["history"])


def train_epic(
    network: SplitNetwork,
    images: Dataset | Tensor,
    config: EPICConfig | None = None,
    *,
    seed: int = 0,
    kept: int = 25,
    progress: bool = False,
) -> EPIC:
    """Learns a rotation under which each channel's most activated images show that channel alone where it is strongest.

    The score of an image is the mean of the rotated channel, which is the rotated mean: so features are pooled once,
    and every choice of images is a matrix product and a top-k by column.

    Parameters
    ----------
    network : SplitNetwork
        Frozen.
    images : Dataset, or Tensor of shape (n, c, H, W) in [0, 1]
    config : EPICConfig, optional
    seed : int, default 0
        Of the order of pairs.
    kept : int, default 25
        Prototypes of a channel that the result remembers.
    progress : bool, default False

    Returns
    -------
    EPIC

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    FloatingPointError
        When a loss is not finite.
    """
    config, images = config or EPICConfig(), as_dataset(images)
    check_takes(network, images)
    if kept < 1:
        raise ValueError(f"kept is {kept}; give at least 1")
    rotation = Rotation(network.channels, parametrization=config.parametrization).to(network.weight.device)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=config.lr, weight_decay=config.decay)
    draws = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    with bars(progress) as bar:
        pooled = pooled_features(network, images, bar("features", len(images), 0))
        advance = bar("rotation", config.stages, 0)
        for stage in range(config.stages):
            ids = strongest(pooled, rotation().detach().cpu(), config.count(stage))
            maps = _Maps(network, images, ids)
            purities = []
            for _ in range(config.epochs):
                for pairs in torch.randperm(ids.numel(), generator=draws).split(config.batch):
                    channels = pairs % network.channels
                    features = maps(ids.flatten()[pairs])
                    matrix = rotation()
                    purity = pure(features, matrix, channels.to(features.device), orthogonal=rotation.orthogonal)
                    loss = -purity.mean()
                    if not bool(loss.isfinite()):
                        raise FloatingPointError(f"the loss is {float(loss)} in stage {stage + 1}; lower lr")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    purities.append(-float(loss.detach()))
            mean = sum(purities) / len(purities)
            row = {"stage": stage, "images": len(ids), "purity": mean, "seconds": time.perf_counter() - start}
            history.append(row)
            advance(1, f"purity {mean:.3f}")
    ids = strongest(pooled, rotation().detach().cpu(), kept)
    return EPIC(network, rotation, Chosen(images, ids), config, history)


def strongest(pooled: Tensor, matrix: Tensor, count: int) -> Tensor:
    """The rows of `pooled` (n, C) with the largest value of each rotated channel, largest first: (min(count, n), C)."""
    top = ColumnTopK(count)
    for start in range(0, len(pooled), 1 << 14):
        top.update(pooled[start : start + (1 << 14)] @ matrix.T, start)
    return top.indices


class _Maps:
    """Feature maps of the chosen images: kept while they fit into 2 GiB, else made when asked for."""

    def __init__(self, network: SplitNetwork, images: Dataset, ids: Tensor) -> None:
        self.network, self.images = network, images
        self.unique = ids.unique()
        first = next(maps_of(network, images, self.unique[:1]))
        self.maps: Tensor | None = None
        if first.numel() * first.element_size() * len(self.unique) <= _KEPT_BYTES:
            self.maps = torch.cat(list(maps_of(network, images, self.unique)))

    def __call__(self, ids: Tensor) -> Tensor:
        if self.maps is not None:
            return self.maps[torch.searchsorted(self.unique, ids).to(self.maps.device)]
        unique, places = ids.unique(return_inverse=True)
        maps = torch.cat(list(maps_of(self.network, self.images, unique)))
        return maps[places.to(maps.device)]
