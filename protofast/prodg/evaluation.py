"""What an explanation is worth: purity, diversity, faithfulness, deletion and insertion, agreement over seeds.

"Channel purity" is the cosine that ProDG and EPIC maximise. PIP-Net's "part purity", a share of patches that hold one
annotated part, is another thing under a similar name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._optional import need
from .._progress import bars
from ..channels import channel_heat_map
from ..data import Dataset
from .concepts import Concepts
from .epic import strongest
from .images import BATCH, as_dataset, check_takes, maps_of, pooled_features
from .losses import diversity_loss, pure
from .networks import SplitNetwork

TOP = 4
_STEPS = 14


class Faithfulness(NamedTuple):
    """Mean fall of the explained class's probability when channels are taken out of the sum that is its logit."""

    top: float
    random: float


class Curves(NamedTuple):
    """Areas under probability against the share of pixels deleted or inserted; by heat map, and in random order."""

    deletion: float
    random_deletion: float
    insertion: float
    random_insertion: float


class Agreement(NamedTuple):
    """Of two bases: mean |cosine| of rows matched one to one, and that of random bases of the same size."""

    cosine: float
    random: float


def prototype_purity(concepts: Concepts, *, count: int = 5, seed: int = 0, matrix: Tensor | None = None) -> Tensor:
    """Channel purity of `count` prototypes of every channel: (C, count), on the CPU.

    Parameters
    ----------
    concepts : Concepts
    count : int, default 5
    seed : int, default 0
        Of drawn prototypes.
    matrix : Tensor of shape (C, C), optional
        Another basis, such as the identity, to see the same images in.
    """
    return _see_prototypes(concepts, count, seed, [concepts.matrix if matrix is None else matrix])[0][0]


def prototype_similarity(concepts: Concepts, *, count: int = 5, seed: int = 0) -> float:
    """Mean cosine between pooled features of a channel's prototypes, over all channels: lower is more diverse."""
    return _see_prototypes(concepts, count, seed, [])[1]


@torch.no_grad()
def _see_prototypes(
    concepts: Concepts, count: int, seed: int, matrices: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """Of all prototypes, made once: purities (C, count) in each basis, and the similarity."""
    bases = [(matrix.to(concepts.matrix), _is_orthogonal(matrix)) for matrix in matrices]
    found: list[list[Tensor]] = [[] for _ in bases]
    similar = []
    for channels in torch.arange(concepts.network.channels).split(max(1, BATCH // count)):
        images = torch.cat([concepts.prototypes(channel, count, seed) for channel in channels.tolist()])
        maps = concepts.network.maps(images.to(concepts.matrix.device))
        similar.append(diversity_loss(maps, count) * len(channels))
        of = channels.repeat_interleave(count).to(maps.device)
        for (matrix, orthogonal), kept in zip(bases, found, strict=True):
            kept.append(pure(maps, matrix, of, orthogonal=orthogonal).clamp(min=0).cpu().unflatten(0, (-1, count)))
    return [torch.cat(kept) for kept in found], float(torch.stack(similar).sum()) / concepts.network.channels


def _is_orthogonal(matrix: Tensor) -> bool:
    one = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return bool(((matrix @ matrix.T - one).abs() < 1e-3).all())


@torch.no_grad()
def image_purity(
    network: SplitNetwork, matrix: Tensor, images: Dataset | Tensor, *, count: int = 5, pooled: Tensor | None = None
) -> Tensor:
    """Channel purity of real images: of each rotated channel's `count` most activated ones, (count, C).

    Parameters
    ----------
    network : SplitNetwork
    matrix : Tensor of shape (C, C)
    images : Dataset or Tensor
        Such as held-out ones: does a rotation that was learned elsewhere make them purer?
    count : int, default 5
    pooled : Tensor of shape (n, C), optional
        `pooled_features` of them, where they are at hand.
    """
    images = as_dataset(images)
    check_takes(network, images)
    pooled = pooled_features(network, images) if pooled is None else pooled
    ids = strongest(pooled, matrix.cpu(), count)
    channels = torch.arange(network.channels).expand_as(ids).flatten()
    unique, places = ids.flatten().unique(return_inverse=True)
    found = torch.empty(ids.numel())
    square, start = _is_orthogonal(matrix), 0
    for maps in maps_of(network, images, unique):
        mine = ((places >= start) & (places < start + len(maps))).nonzero()[:, 0]
        for part in mine.split(1024):
            at, of = (places[part] - start).to(maps.device), channels[part].to(maps.device)
            found[part] = pure(maps[at], matrix, of, orthogonal=square).clamp(min=0).cpu()
        start += len(maps)
    return found.reshape(ids.shape)


@torch.no_grad()
def logit_error(concepts: Concepts, images: Dataset | Tensor) -> float:
    """Largest difference of the logits to the network's own, relative to its largest logit."""
    images = as_dataset(images)
    worst, largest = 0.0, 0.0
    for maps in maps_of(concepts.network, images, torch.arange(len(images))):
        own = concepts.network.logits(maps)
        worst = max(worst, float((concepts.logits(maps) - own).abs().max()))
        largest = max(largest, float(own.abs().max()))
    return worst / largest


@torch.no_grad()
def accuracy(concepts: Concepts, images: Dataset) -> float:
    """Share of images whose largest logit is that of their label."""
    if images.labels is None:
        raise ValueError(f"{images.source} has no labels; give a Dataset with labels")
    labels, right, start = torch.as_tensor(images.labels), 0, 0
    for maps in maps_of(concepts.network, images, torch.arange(len(images))):
        right += int((concepts.logits(maps).argmax(1).cpu() == labels[start : start + len(maps)]).sum())
        start += len(maps)
    return right / len(images)


@torch.no_grad()
def faithfulness(
    concepts: Concepts, images: Dataset | Tensor, *, top: int = TOP, draws: int = 5, seed: int = 0
) -> Faithfulness:
    """Takes the `top` channels of the predicted class out of its logit, or as many random ones.

    Exact, not a surrogate: the logit is a sum over channels. Of an image all classes lose the same channels.

    Parameters
    ----------
    concepts : Concepts
    images : Dataset or Tensor
    top : int, default 4
    draws : int, default 5
        Sets of random channels for each image.
    seed : int, default 0
    """
    images = as_dataset(images)
    generator = torch.Generator().manual_seed(seed)
    falls: list[Tensor] = []
    others: list[Tensor] = []
    for maps in maps_of(concepts.network, images, torch.arange(len(images))):
        values = concepts.activations(maps)
        logits = values @ concepts.weight.T + concepts.bias
        predicted = logits.argmax(1, keepdim=True)
        before = logits.softmax(1).gather(1, predicted)
        chosen = [(concepts.strongest(values, predicted[:, 0], top)[1], falls)]
        for _ in range(draws):
            random = torch.rand(values.shape, generator=generator).topk(top, dim=1).indices
            chosen.append((random.to(values.device), others))
        for channels, kept in chosen:
            left = values.scatter(1, channels, 0) @ concepts.weight.T + concepts.bias
            kept.append((before - left.softmax(1).gather(1, predicted)).cpu())
    return Faithfulness(float(torch.cat(falls).mean()), float(torch.cat(others).mean()))


@torch.no_grad()
def deletion_insertion(
    concepts: Concepts, images: Dataset | Tensor, *, top: int = TOP, steps: int = _STEPS, seed: int = 0
) -> Curves:
    """Deletes pixels in the order of an image's explanation, or inserts them, and watches the predicted class.

    The explanation is the sum of the heat maps of the `top` channels, each times what it gives to the logit. A
    deleted pixel takes the value of the image's mean colour; insertion starts from that.

    Parameters
    ----------
    concepts : Concepts
    images : Dataset or Tensor
        A few hundred will do.
    top : int, default 4
    steps : int, default 14
        Equal shares of the pixels.
    seed : int, default 0
        Of the random order.
    """
    images = as_dataset(images)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(4, dtype=torch.float64)
    for ids in torch.arange(len(images)).split(64):
        pictures = images.take(ids).to(concepts.matrix.device)
        maps = concepts.network.maps(pictures)
        values = concepts.activations(maps)
        logits = values @ concepts.weight.T + concepts.bias
        predicted = logits.argmax(1, keepdim=True)
        parts, channels = concepts.strongest(values, predicted[:, 0], top)
        heat = channel_heat_map(maps, concepts.matrix, channels, size=(pictures.shape[2], pictures.shape[3]))
        heat = (heat * parts.clamp(min=0)[:, :, None, None]).sum(1).flatten(1)
        noise = torch.rand(heat.shape, generator=generator).to(heat.device)
        mean = pictures.mean((2, 3), keepdim=True).expand_as(pictures)
        for place, order in enumerate((heat, noise)):
            rank = (
                order.argsort(dim=1, descending=True, stable=True)
                .argsort(dim=1)
                .unflatten(1, pictures.shape[2:])[:, None]
            )
            for at, (first, second) in ((place, (mean, pictures)), (2 + place, (pictures, mean))):
                curve = []
                for step in range(steps + 1):
                    changed = rank < rank[0].numel() * step / steps
                    seen = concepts.logits(concepts.network.maps(torch.where(changed, first, second)))
                    curve.append(seen.softmax(1).gather(1, predicted)[:, 0])
                sums[at] += torch.trapezoid(torch.stack(curve).double(), dx=1 / steps, dim=0).sum().cpu()
    return Curves(*(sums / len(images)).tolist())


def agreement(first: Tensor, second: Tensor, *, seed: int = 0) -> Agreement:
    """How far two runs found the same channels: rows matched by the Hungarian algorithm.

    Both runs started from the identity, so their bases are near one another for that alone; what the match of a run
    with the identity gives is the number to compare with.

    Parameters
    ----------
    first, second : Tensors of shape (C, C)
    seed : int, default 0
        Of the random bases.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"first and second have shapes {tuple(first.shape)}, {tuple(second.shape)}; give (C, C) twice")
    draws = torch.Generator().manual_seed(seed)
    random = [torch.linalg.qr(torch.randn(first.shape, generator=draws, dtype=torch.float64)).Q for _ in range(2)]
    return Agreement(_matched(first, second), _matched(*random))


def _matched(first: Tensor, second: Tensor) -> float:
    cosines = (first.double() @ second.double().T).abs().cpu().numpy()
    return float(cosines[need("scipy.optimize", "prodg").linear_sum_assignment(-cosines)].mean())


def evaluate(
    concepts: Concepts,
    images: Dataset,
    *,
    count: int = 5,
    few: int = 200,
    top: int = TOP,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """All of the above on held-out images, under names that say what they are.

    Parameters
    ----------
    concepts : Concepts
    images : Dataset
        Held out; with labels for the accuracy.
    count : int, default 5
        Prototypes, and images, of a channel.
    few : int, default 200
        Images for deletion and insertion, which run the network often: the first ones.
    top : int, default 4
        Channels of an explanation.
    seed : int, default 0
    progress : bool, default False

    Returns
    -------
    dict of str to float
        Purities "before" are under U = I.
    """
    images = as_dataset(images)
    check_takes(concepts.network, images)
    one = torch.eye(concepts.network.channels, device=concepts.matrix.device)
    some = images.subset(np.arange(min(few, len(images))))
    top = min(top, concepts.network.channels)
    found: dict[str, float] = {}
    with bars(progress) as bar:
        advance = bar("evaluation", 6, 0)
        purities, similarity = _see_prototypes(concepts, count, seed, [concepts.matrix, one])
        for name, purity in zip(("prototype_purity", "prototype_purity_before"), purities, strict=True):
            found[name] = float(purity.mean())
        if count > 1:
            found["prototype_similarity"] = similarity
        advance(1)
        pooled = pooled_features(concepts.network, images)
        for name, matrix in (("", concepts.matrix), ("_before", one)):
            purity = image_purity(concepts.network, matrix, images, count=count, pooled=pooled)
            found[f"image_purity{name}"] = float(purity.mean())
        advance(1)
        found["logit_error"] = logit_error(concepts, images)
        advance(1)
        if images.labels is not None:
            found["accuracy"] = accuracy(concepts, images)
        advance(1)
        faithful = faithfulness(concepts, images, top=top, seed=seed)
        found |= {"removal_top": faithful.top, "removal_random": faithful.random}
        advance(1)
        found |= deletion_insertion(concepts, some, top=top, seed=seed)._asdict()
        advance(1)
    return found


def across_seeds(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (of a sample) and number of runs of every quantity that all rows have.

    Examples
    --------
    >>> from protofast.prodg.evaluation import across_seeds
    >>> across_seeds([{"purity": 0.25}, {"purity": 0.5}, {"purity": 0.75}])
    {'purity': {'mean': 0.5, 'sd': 0.25, 'runs': 3}}
    """
    if not rows:
        raise ValueError("rows is empty; give what `evaluate` returned for each seed")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    values = {name: np.array([row[name] for row in rows], np.float64) for name in names}
    return {
        name: {
            "mean": float(value.mean()),
            "sd": float(value.std(ddof=1)) if len(value) > 1 else math.nan,
            "runs": len(value),
        }
        for name, value in values.items()
    }
