"""A small network that names what is in an image: judge of samples, and features of the Fréchet distance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _weights
from ..._files import digest

BATCH = 128
_FORMAT = "protofast-patronus-classifier-1"


class Classifier(nn.Module):
    """Convolutions of stride 2 down to 4 × 4, and two linear layers; the last but one gives the features.

    Parameters
    ----------
    shape : sequence of int
        (C, H, W) of an image; sides of 8 or more.
    outputs : int
        Classes; or attributes, where `several`.
    several : bool
        Whether an image has any number of them (binary attributes) in place of exactly one.

    Attributes
    ----------
    name : str
        Of these weights: by the data that they were trained on and a checksum.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import Classifier
    >>> model = Classifier((1, 32, 32), 10).eval()
    >>> model.features(torch.zeros(2, 1, 32, 32)).shape, model.answers(torch.zeros(2, 1, 32, 32)).shape
    (torch.Size([2, 128]), torch.Size([2]))
    """

    num_features = 128

    def __init__(self, shape: Sequence[int], outputs: int, *, several: bool = False) -> None:
        super().__init__()
        self.shape, self.outputs, self.several = tuple(int(size) for size in shape), int(outputs), bool(several)
        if len(self.shape) != 3 or min(self.shape[1:]) < 8 or self.shape[0] < 1:
            raise ValueError(f"shape is {self.shape}; give (channels, height, width), both sides 8 or more")
        if self.outputs < 2 - self.several:
            raise ValueError(f"outputs is {self.outputs}; give 2 classes or more, or 1 attribute")
        self.name = "untrained"
        halvings = max(2, round(math.log2(min(self.shape[1:]) / 4)))
        widths = [self.shape[0], *(min(32 << level, self.num_features) for level in range(halvings))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.neck = nn.Sequential(nn.Dropout(0.3), nn.Linear(16 * widths[-1], self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, self.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, outputs) of images in [−1, 1]."""
        return self.head(self.neck(self.body(images)))

    def features(self, images: Tensor, *, batch_size: int = 1000) -> Tensor:
        """Features (n, 128) of images (n, C, H, W) in [−1, 1], on the CPU."""
        return self._batched(lambda part: self.neck(self.body(part)), images, batch_size)

    def probabilities(self, images: Tensor, *, batch_size: int = 1000) -> Tensor:
        """Probability of each class, or of each attribute: (n, outputs), on the CPU."""
        logits = self._batched(self, images, batch_size)
        return logits.sigmoid() if self.several else logits.softmax(1)

    def answers(self, images: Tensor, *, batch_size: int = 1000) -> Tensor:
        """The class of each image, int64 (n,); or its attributes, bool (n, outputs)."""
        found = self.probabilities(images, batch_size=batch_size)
        return found > 0.5 if self.several else found.argmax(1)

    @torch.no_grad()
    def _batched(self, function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images has shape {tuple(images.shape)}; classifier {self.name} takes {self.shape}")
        device = self.head.weight.device
        parts = [function(part.to(device)).cpu() for part in images.split(batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.outputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .safetensors file that `load` reads, whole or not at all."""
        about = {"shape": self.shape, "outputs": self.outputs, "several": self.several, "name": self.name}
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        _weights.write(path, _FORMAT, state, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Classifier:
        """Reads what `save` wrote, in evaluation mode and without gradients.

        Raises
        ------
        FileNotFoundError
        ValueError
            When the file is damaged or holds something else.
        """
        state, found = _weights.read(path, _FORMAT, wrong="holds no classifier; give one that `evaluate` saved")
        about = json.loads(found["about"])
        model = cls(about["shape"], about["outputs"], several=about["several"])
        model.load_state_dict(state)
        model.name = about["name"]
        return model.eval().requires_grad_(False)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    name: str = "images",
    epochs: int = 4,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | os.PathLike[str] = True,
) -> Classifier:
    """Trains a `Classifier`: cross-entropy, AdamW, one cycle of the learning rate, batches of 128; cached.

    About a minute on two cores for Fashion-MNIST at 32 pixels, and 91 % of its test images right.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        In [−1, 1].
    labels : Tensor of shape (n,) or (n, K)
        Classes 0 … k − 1; or binary attributes.
    name : str
        Of the data; the classifier is named by it.
    epochs : int, default 4
    lr : float, default 3e-3
        The highest.
    seed : int, default 0
        The same data, settings and seed give the same weights on the same machine with as many threads.
    device : device, optional
        Where to train; the CPU by default.
    progress : callable, optional
        Called as ``progress(done, total)`` with numbers of updates.
    cache : bool or path, default True
        The folder of the weights: True is the user's cache folder, False keeps nothing.

    Returns
    -------
    Classifier
        In evaluation mode, on `device`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import train_classifier
    >>> labels = torch.arange(40) % 2
    >>> images = (labels * 2.0 - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    >>> model = train_classifier(images, labels, epochs=20, cache=False)
    >>> (model.answers(images) == labels).all().item()
    True
    """
    several = labels.ndim == 2
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images has shape {tuple(images.shape)}; give (n, channels, height, width)")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise ValueError(f"labels has shape {tuple(labels.shape)} for {len(images)} images; give (n,) or (n, K)")
    if labels.is_floating_point():
        raise TypeError(f"labels is {labels.dtype}; give integers or bool")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; give at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; give a positive number")
    if int(labels.min()) < 0 or (several and int(labels.max()) > 1):
        what = "attributes are 0 or 1" if several else "classes are numbered from 0"
        raise ValueError(f"labels runs from {int(labels.min())} to {int(labels.max())}; {what}")
    images = images.float().contiguous()
    settings = [_FORMAT, list(images.shape), digest(labels), name, epochs, lr, seed]
    path = _weights.place(cache, "classifier", settings, images.cpu())
    if path is not None and path.exists():
        with suppress(OSError, ValueError):  # damaged: train again and replace it
            return Classifier.load(path).to(device)
    with torch.random.fork_rng(devices=[]):  # weights and dropout draw from the global generator
        torch.manual_seed(seed)
        outputs = labels.shape[1] if several else max(int(labels.max()) + 1, 2)
        model = Classifier(images.shape[1:], outputs, several=several).to(device)
        _train(model, images, labels, epochs, lr, progress)
    weights = digest(torch.cat([value.detach().cpu().flatten() for value in model.parameters()]))
    model.name = f"cnn-{Path(name).stem}-{weights[:6]}"
    if path is not None:
        with suppress(OSError):  # a full or read-only cache folder costs the next run its time, not this its result
            model.save(path)
    return model


def _train(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    lr: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    device, total = model.head.weight.device, epochs * math.ceil(len(images) / BATCH)
    targets = labels.float() if model.several else labels.long()
    loss_of = F.binary_cross_entropy_with_logits if model.several else F.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            if len(rows) > 1:  # batch normalisation of one image is undefined
                loss = loss_of(model(images[rows].to(device)), targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rates.step()
            if progress is not None:
                progress(rates.last_epoch, total)
    model.eval().requires_grad_(False)


class Agreement(NamedTuple):
    """Shares of images, 0 to 1.

    Attributes
    ----------
    label : float
        Samples that the classifier gives the label of their source.
    answer : float
        Samples that it gives the same as their source.
    ceiling : float
        Sources that it gives their label: what `label` would be for perfect samples.
    """

    label: float
    answer: float
    ceiling: float


def agreement(classifier: Classifier, samples: Tensor, source: Tensor, labels: Tensor) -> Agreement:
    """Whether samples show what the images show whose activations they were made of.

    Parameters
    ----------
    classifier : Classifier
    samples, source : Tensor of shape (n, C, H, W)
        In [−1, 1].
    labels : Tensor of shape (n,), or (n, K) for attributes
        Of `source`. Shares are over all attributes of all images then.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import Classifier, agreement
    >>> images, model = torch.zeros(4, 1, 8, 8), Classifier((1, 8, 8), 10).eval()
    >>> agreement(model, images, images, model.answers(images))
    Agreement(label=1.0, answer=1.0, ceiling=1.0)
    """
    if not len(samples) == len(source) == len(labels) > 0:
        raise ValueError(f"samples, source and labels have {len(samples)}, {len(source)} and {len(labels)} rows")
    made, real, labels = classifier.answers(samples), classifier.answers(source), labels.cpu()
    if labels.shape != real.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; classifier {classifier.name} answers {real.shape}")
    pairs = ((made, labels), (made, real), (real, labels))
    return Agreement(*((first == second).double().mean().item() for first, second in pairs))
