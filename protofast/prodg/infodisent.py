"""An InfoDisent head (arXiv 2409.10329), our reading: signed maxima of rotated channels, non-negative weights."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _weights
from .._files import replacing
from .._progress import bars
from ..channels import ColumnTopK, rotate_and_pool
from ..data import Dataset
from .concepts import Concepts
from .config import check_numbers, check_whole
from .images import BATCH, Chosen, as_dataset, check_takes
from .networks import SplitNetwork
from .rotation import Rotation

CONFIG, WEIGHTS = "config.json", "infodisent.safetensors"
_FORMAT = "protofast-infodisent-1"


@dataclass(frozen=True)
class InfoDisentConfig:
    """How rotation and head are learned.

    Attributes
    ----------
    epochs, batch : int
    rotation_lr, head_lr : float
        Adam's.
    sparsity : float
        Weight of the mean of the head's weights: a class is to rest on few channels.
    parametrization : {"matrix_exp", "cayley", "orthogonal"}
    """

    epochs: int = 3
    batch: int = 256
    rotation_lr: float = 1e-3
    head_lr: float = 1e-2
    sparsity: float = 0.1
    parametrization: str = "matrix_exp"

    def __post_init__(self) -> None:
        if self.parametrization == "invertible":
            raise ValueError("parametrization is 'invertible'; choose 'matrix_exp', 'cayley' or 'orthogonal'")
        check_whole(self, 1, "epochs", "batch")
        check_numbers(self, "rotation_lr", "head_lr", "sparsity")


INFODISENT_PRESETS = {"paper": InfoDisentConfig(), "cpu": InfoDisentConfig(epochs=2, parametrization="cayley")}


@dataclass
class InfoDisent:
    """A frozen backbone under a rotation and a head of its own: unlike ProDG's and EPIC's, its logits are new.

    Attributes
    ----------
    network : SplitNetwork
    rotation : Rotation
    weight : Tensor of shape (N, C)
        Not negative.
    prototypes : Chosen
        The images of largest signed maximum of each rotated channel.
    config : InfoDisentConfig
    history : list of dict
        A row an epoch: "epoch", "loss", "accuracy" (of training batches), "seconds".
    """

    network: SplitNetwork
    rotation: Rotation
    weight: Tensor
    prototypes: Chosen
    config: InfoDisentConfig
    history: list[dict[str, float]] = field(default_factory=list)

    @torch.no_grad()
    def concepts(self) -> Concepts:
        """For `explain` and the evaluation."""
        bias = torch.zeros_like(self.network.bias)
        matrix = self.rotation().detach()
        return Concepts("infodisent", self.network, matrix, self.weight, bias, self.prototypes, pool="signed_max")

    def save(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes rotation, head, choice of images and settings into a folder."""
        folder = Path(folder)
        state = {f"rotation.{name}": value.detach().cpu() for name, value in self.rotation.state_dict().items()}
        state |= {"ids": self.prototypes.ids, "weight": self.weight.cpu()}
        _weights.write(folder / WEIGHTS, _FORMAT, state, self.prototypes.about())
        with replacing(folder / CONFIG) as file:  # last: with it the folder is complete
            content = {"format": _FORMAT, "config": dataclasses.asdict(self.config), "history": self.history}
            file.write(json.dumps({**content, "about": about}, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], network: SplitNetwork, images: Dataset | Tensor) -> InfoDisent:
        """Reads what `save` wrote, of this network and these images.

        Raises
        ------
        FileNotFoundError
        ValueError
            When a file is damaged, or of other images or another network.
        """
        folder, images = Path(folder), as_dataset(images)
        state, about = _weights.read(folder / WEIGHTS, _FORMAT, wrong="holds no head of InfoDisent")
        content = json.loads((folder / CONFIG).read_bytes())
        prototypes = Chosen.of(images, state.pop("ids"), about, folder)
        if state["weight"].shape != network.weight.shape:
            raise ValueError(
                f"{folder} is of a head {tuple(state['weight'].shape)}, and the network has "
                f"{tuple(network.weight.shape)}"
            )
        config = InfoDisentConfig(**content["config"])
        rotation = Rotation(network.channels, parametrization=config.parametrization)
        weight = state.pop("weight")
        rotation.load_state_dict({name.removeprefix("rotation."): value for name, value in state.items()})
        device = network.weight.device
        return cls(network, rotation.to(device), weight.to(device), prototypes, config, content["history"])


def train_infodisent(
    network: SplitNetwork,
    images: Dataset,
    config: InfoDisentConfig | None = None,
    *,
    seed: int = 0,
    kept: int = 25,
    progress: bool = False,
) -> InfoDisent:
    """Learns a rotation and a non-negative head over signed maxima, by cross-entropy.

    logits = B⁺ · (max relu(z) − max relu(−z)) with z = U f and B⁺ = relu(B): one pixel speaks for a channel, one
    against it. No equation of the paper was at hand, so this is our reading of its text, not a quotation.

    Parameters
    ----------
    network : SplitNetwork
        Its features stay frozen; its head is where B starts.
    images : Dataset
        With labels.
    config : InfoDisentConfig, optional
    seed : int, default 0
    kept : int, default 25
        Prototypes of a channel that the result remembers.
    progress : bool, default False

    Returns
    -------
    InfoDisent

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    FloatingPointError
        When a loss is not finite.
    """
    config, images = config or InfoDisentConfig(), as_dataset(images)
    check_takes(network, images)
    if images.labels is None:
        raise ValueError(f"{images.source} has no labels; give a Dataset with labels")
    labels = torch.as_tensor(images.labels)
    if int(labels.min()) < 0 or int(labels.max()) >= network.classes:
        raise ValueError(f"labels runs to {int(labels.max())}; the network has classes 0 to {network.classes - 1}")
    device = network.weight.device
    rotation = Rotation(network.channels, parametrization=config.parametrization).to(device)
    head = nn.Parameter(network.weight.relu().clone())
    optimizer = torch.optim.Adam(
        [{"params": rotation.parameters(), "lr": config.rotation_lr}, {"params": [head], "lr": config.head_lr}]
    )
    draws = torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    with bars(progress) as bar:
        advance = bar("rotation and head", config.epochs * len(images), 0)
        for epoch in range(config.epochs):
            losses, right = 0.0, 0
            for ids in torch.randperm(len(images), generator=draws).split(config.batch):
                maps = network.maps(images.take(ids).to(device))
                pooled = rotate_and_pool(maps, rotation(), pool="signed_max").value
                logits, wanted = F.linear(pooled, head.relu()), labels[ids].to(device)
                loss = F.cross_entropy(logits, wanted) + config.sparsity * head.relu().mean()
                if not bool(loss.isfinite()):
                    raise FloatingPointError(
                        f"the loss is {float(loss)} in epoch {epoch + 1}; lower the learning rates"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += float(loss.detach()) * len(ids)
                right += int((logits.argmax(1) == wanted).sum())
                advance(len(ids))
            row = {"epoch": epoch, "loss": losses / len(images), "accuracy": right / len(images)}
            history.append({**row, "seconds": time.perf_counter() - start})
        top, at = ColumnTopK(kept), 0
        advance = bar("prototypes", len(images), 0)
        with torch.no_grad():
            matrix = rotation().detach()
            for batch, _ in images.batches(BATCH):
                top.update(rotate_and_pool(network.maps(batch.to(device)), matrix, pool="signed_max").value.cpu(), at)
                at += len(batch)
                advance(len(batch))
    return InfoDisent(network, rotation, head.detach().relu(), Chosen(images, top.indices), config, history)
