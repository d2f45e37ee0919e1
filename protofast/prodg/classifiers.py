"""A small classifier of the right form, to explain where no large one is at hand: convolutions, pooling, linear."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _weights
from .._files import digest
from .networks import SplitNetwork

BATCH = 128
_FORMAT = "protofast-prodg-network-1"


def _body(shape: Sequence[int], channels: int) -> nn.Sequential:
    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(shape[0], channels // 2, 1),
        *block(channels // 2, channels // 2, 2),
        *block(channels // 2, channels, 1),
        *block(channels, channels, 2),
        *block(channels, channels, 1),
    )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    channels: int = 64,
    epochs: int = 5,
    lr: float = 4e-3,
    seed: int = 0,
    names: Sequence[str] | None = None,
    cache: bool | str | os.PathLike[str] = True,
    progress: Callable[[int, int], None] | None = None,
) -> SplitNetwork:
    """Five convolutions with batch normalisation, the mean over space, a linear layer: (B, C, H/4, W/4) features.

    Parameters
    ----------
    images : Tensor of shape (n, c, H, W)
        In [0, 1].
    labels : int64 Tensor of shape (n,)
    channels : int, default 64
        C, even.
    epochs, lr : int, float
        AdamW, one cycle of the learning rate, batches of 128.
    seed : int, default 0
    names : sequence of str, optional
        Of the classes.
    cache : bool or path, default True
        The folder of the weights: True is the user's cache folder, False keeps nothing.
    progress : callable, optional
        ``progress(done, total)`` in updates.

    Returns
    -------
    SplitNetwork

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    if images.ndim != 4 or len(labels) != len(images) or not len(images):
        raise ValueError(
            f"images and labels have shapes {tuple(images.shape)}, {tuple(labels.shape)}; give (n, c, H, W), (n,)"
        )
    if images.dtype != torch.float32 or labels.dtype != torch.int64:
        raise TypeError(f"images and labels are {images.dtype} and {labels.dtype}; give float32 in [0, 1], and int64")
    if channels < 2 or channels % 2:
        raise ValueError(f"channels is {channels}; give an even number")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; give at least 1")
    classes = int(labels.max()) + 1 if names is None else len(names)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels runs from {int(labels.min())} to {int(labels.max())}; there are {classes} classes")
    settings = [_FORMAT, list(images.shape), digest(labels), channels, epochs, lr, seed, list(names or ())]
    path = _weights.place(cache, "network", settings, images)
    if path is not None and path.exists():
        with suppress(OSError, ValueError):
            return load_network(path)
    total = epochs * math.ceil(len(images) / BATCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, head = _body(images.shape[1:], channels), nn.Linear(channels, classes)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=lr, weight_decay=0.02)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
        done = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(BATCH):
                maps = body(images[rows].contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(head(maps.mean((2, 3))), labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                done += 1
                if progress is not None:
                    progress(done, total)
    network = SplitNetwork(body, head.weight, head.bias, input_shape=images.shape[1:], names=names, title="cnn")
    if path is not None:
        with suppress(OSError):  # a full or read-only cache costs the next run its time, not this its result
            save_network(path, network)
    return network


def save_network(path: str | os.PathLike[str], network: SplitNetwork) -> None:
    """Writes a network that `train_classifier` made; `load_network` reads it."""
    about = {
        "input_shape": network.input_shape,
        "channels": network.channels,
        "names": network.names,
        "classes": network.classes,
    }
    _weights.write(
        path, _FORMAT, {name: value.cpu() for name, value in network.state_dict().items()}, {"about": json.dumps(about)}
    )


def load_network(path: str | os.PathLike[str]) -> SplitNetwork:
    """Reads what `save_network` wrote.

    Raises
    ------
    FileNotFoundError
    ValueError
        When the file is damaged, or holds something else.
    """
    state, found = _weights.read(path, _FORMAT, wrong="holds no network of `protofast prodg prepare`")
    about = json.loads(found["about"])
    channels = about["channels"]
    network = SplitNetwork(
        _body(about["input_shape"], channels),
        torch.zeros(about["classes"], channels),
        torch.zeros(about["classes"]),
        input_shape=about["input_shape"],
        names=about["names"],
        title="cnn",
    )
    network.load_state_dict(state)
    return network
