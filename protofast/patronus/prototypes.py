"""What the prototypes of a model stand for: nearest patches, amplification, consistency, and names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._optional import need
from ..nn import ReceptiveField, heat_map, project, receptive_field
from ..prototype import PrototypeActivation
from .evaluation import auroc
from .generate import check_prototypes, invert, sample
from .model import Patronus, check_activations, check_images


class Patches(NamedTuple):
    """The patches of a data set that activate each prototype most, the most active first."""

    image: Tensor
    """int64 (M, k), number of the image."""
    activation: Tensor
    """(M, k)."""
    box: Tensor
    """int64 (M, k, 4): first pixel down and across, then the pixel after the last, clipped to the image."""
    feature: Tensor
    """(M, k, D), of the encoder."""


class Amplified(NamedTuple):
    """Images sampled again with one prototype turned up, for n images and P prototypes."""

    images: Tensor
    """(n, P, C, H, W) in [−1, 1]."""
    source: Tensor
    """(n, C, H, W): the same noise sampled with the activations as they were."""
    prototypes: Tensor
    """int64 (P,), which of the model's."""
    activation: Tensor
    """(n, P), of the prototype in its amplified image, encoded again."""
    before: Tensor
    """(n, P), of the prototype in `source`."""
    box: Tensor
    """int64 (n, P, 4): pixels of the patch that activates the prototype most, as in `Patches`."""
    feature: Tensor
    """(n, P, D): the encoder's features of that patch."""

    @property
    def best(self) -> Tensor:
        """int64 (P,): for each prototype the image that it is most active in."""
        return self.activation.argmax(0)


class Consistency(NamedTuple):
    """Mean cosine similarities of the patches of each prototype over images."""

    within: Tensor
    """(P,): of its patches in two images."""
    across: Tensor
    """(P,): of its patch in one image and another prototype's in another image."""


class PrototypeName(NamedTuple):
    """What a reader may call a prototype."""

    text: str
    """All of it: "Trouser, bottom (98 % of its top images, AUROC 0.94)"."""
    what: str
    """The classes or the attribute: "Coat or Pullover", "not Sandal", or "" where none stands out or is known."""
    where: str
    """Of its patch in the images: "top left", "centre", "left or right", "anywhere"."""
    share: float
    """Of `what` among the images that activate it most; NaN where nothing is named."""
    auroc: float
    """How well the activation alone tells the images of `what` from all others; NaN where nothing is named."""
    classes: tuple[int, ...]
    """Those named in `what`."""
    active: bool
    """Whether it is those that it is active in, or the others."""


@torch.no_grad()
def nearest_patches(
    model: Patronus, images: Tensor, k: int = 8, *, batch_size: int = 512, progress: bool = False
) -> Patches:
    """The k patches of a data set nearest to each prototype, at most one an image, with their exact pixels.

    One pass by `protofast.nn.project`, which stores no map of distances.

    Parameters
    ----------
    model : Patronus
    images : Tensor of shape (n, C, H, W)
        In [−1, 1].
    k : int, default 8
        Up to n.
    batch_size : int, default 512
    progress : bool, default False

    Returns
    -------
    Patches
        On the CPU. Ties go to the image with the lower number.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))
    >>> model = pf.patronus.Patronus(config)
    >>> found = nearest_patches(model, torch.rand(20, 1, 16, 16), 3)
    >>> found.image.shape, found.box.shape
    (torch.Size([5, 3]), torch.Size([5, 3, 4]))
    """
    check_images(model.config, images)
    if not 1 <= k <= len(images):
        raise ValueError(f"k is {k}; give 1 to {len(images)}, the number of images")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    parts = (part.to(model.prototypes.prototype_vectors) for part in images.split(batch_size))
    found = project(model.prototypes, model.encoder, parts, best=k, push=False, progress=progress)
    activation = ((found.distance + 1) / (found.distance + model.config.eps)).log()  # eq. 3
    return Patches(found.image, activation, field_of(model).boxes[found.patch], found.feature.flatten(2))


def field_of(model: Patronus) -> ReceptiveField:
    """The exact pixels of each patch of the model's grid."""
    return receptive_field(model.encoder, model.config.image_shape[1:])


@torch.no_grad()
def amplify(
    model: Patronus,
    images: Tensor,
    strengths: Tensor,
    *,
    prototypes: Sequence[int] | None = None,
    num_steps: int = 50,
    batch_size: int = 256,
    progress: bool = False,
) -> Amplified:
    """Each image sampled again with each prototype turned up: what the model draws when told that it is there.

    The paper's visualisation (sec. 3.3 and fig. 6): an image is inverted to its noise under its own activations, one
    of them is set to a strength, and DDIM samples from that noise; the result is encoded again to find the patch that
    the prototype answers to. All images and prototypes go through one sampling call.

    Parameters
    ----------
    model : Patronus
    images : Tensor of shape (n, C, H, W)
        In [−1, 1].
    strengths : Tensor of shape (M,)
        What each prototype's activation is set to, as `strengths` finds it.
    prototypes : sequence of int, optional
        Which to amplify, by default all.
    num_steps : int, default 50
        DDIM steps, both to the noise and back; the paper takes all 1000.
    batch_size : int, default 256
    progress : bool, default False

    Returns
    -------
    Amplified
        On the images' device.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))
    >>> model = pf.patronus.Patronus(config).eval()
    >>> made = amplify(model, torch.rand(3, 1, 16, 16), torch.full((5,), 0.4), num_steps=2)
    >>> made.images.shape, made.best.shape
    (torch.Size([3, 5, 1, 16, 16]), torch.Size([5]))
    """
    check_activations(model.config, strengths[None] if isinstance(strengths, Tensor) else strengths, "strengths")
    chosen = check_prototypes(model.config, range(len(strengths)) if prototypes is None else prototypes)
    if len(images) == 0:
        raise ValueError("images is empty; give at least one")
    run: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    codes = invert(model, images, num_steps, **run)
    chosen, rows = chosen.to(images.device), torch.arange(len(chosen), device=images.device)
    # Of each image one row as it was, and then one a prototype.
    told = codes.activations[:, None].repeat(1, 1 + len(chosen), 1)
    told[:, 1 + rows, chosen] = strengths.to(told)[chosen]
    noise = codes.noise.repeat_interleave(1 + len(chosen), 0)
    made = sample(model, told.flatten(0, 1), num_steps, noise=noise, **run)
    size = (len(images), 1 + len(chosen))
    activation, patch, feature = (value.unflatten(0, size) for value in _seen(model, made, batch_size))
    made, own = made.unflatten(0, size), patch[:, 1 + rows, chosen]
    return Amplified(
        images=made[:, 1:],
        source=made[:, 0],
        prototypes=chosen,
        activation=activation[:, 1 + rows, chosen],
        before=activation[:, 0, chosen],
        box=field_of(model).boxes.to(own.device)[own],
        feature=feature[:, 1 + rows, chosen],
    )


def _seen(model: Patronus, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (n, M), patches (n, M), and the encoder's features (n, M, D) of those patches."""
    columns: list[tuple[Tensor, ...]] = []
    for part in images.split(batch_size):
        with torch.autocast(model.device.type, enabled=False):
            features = model.encoder(part.to(model.prototypes.prototype_vectors))
            found = model.prototypes(features, return_all=True)
        there = found.index[:, None].expand(-1, features.shape[1], -1)
        columns.append((found.activation, found.index, features.flatten(2).gather(2, there).transpose(1, 2)))
    parts = [torch.cat(values).to(images.device) for values in zip(*columns, strict=True)]
    return parts[0], parts[1], parts[2]


def consistency(features: Tensor) -> Consistency:
    """How alike the patches of one prototype are over images, against those of different ones: fig. 6 as numbers.

    Cosine similarity of features, averaged over all pairs of different images. Features after a ReLU are never
    negative, so unrelated patches are well above 0: read `within` against `across`, not against 0.

    Parameters
    ----------
    features : Tensor of shape (n, P, D)
        Of the patch of each image and prototype, as in `Amplified`; for `Patches`, ``feature.transpose(0, 1)``. At
        least two images. A vector of zeros counts as similar to none.

    Returns
    -------
    Consistency
        `across` is NaN for a single prototype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> found = consistency(torch.eye(3).expand(2, 3, 3))
    >>> found.within.tolist(), found.across.tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"features is {_kind(features)}; give a floating-point torch tensor")
    if features.ndim != 3 or len(features) < 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; give (n, P, D) of at least 2 images")
    images, count = features.shape[:2]
    unit = torch.nn.functional.normalize(features.double(), dim=2)
    own = unit.sum(0)  # (P, D)
    lengths = unit.square().sum(2)  # 1, or 0 of a vector of zeros
    alike = own.square().sum(1) - lengths.sum(0)
    # Of each patch against the patches of all other prototypes in all other images.
    others = unit.sum((0, 1)) - own - unit.sum(1, keepdim=True) + unit
    different = (unit * others).sum((0, 2))
    pairs = images * (images - 1)
    return Consistency(alike / pairs, different / (pairs * (count - 1) if count > 1 else torch.nan))


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"


@torch.no_grad()
def heat_maps(
    model: Patronus,
    images: Tensor,
    prototypes: Sequence[int],
    *,
    limits: Sequence[tuple[float, float]] | None = None,
    enlarge: int = 1,
) -> np.ndarray:
    """Where in each image its prototype is active, as a picture: `protofast.nn.heat_map` of pairs.

    Parameters
    ----------
    model : Patronus
    images : Tensor of shape (n, C, H, W)
        In [−1, 1]; 1 or 3 channels.
    prototypes : sequence of int, length n
        Of each image.
    limits : sequence of (float, float), length n, optional
        Activations at the two ends of the colours; by default those of each map.
    enlarge : int, default 1
        Times which the pictures are larger than the images.

    Returns
    -------
    uint8 array of shape (n, enlarge · H, enlarge · W, 3)

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))
    >>> heat_maps(pf.patronus.Patronus(config), torch.rand(2, 1, 16, 16), [0, 3]).shape
    (2, 16, 16, 3)
    """
    check_images(model.config, images)
    for name, values in (("prototypes", prototypes), ("limits", limits)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{name} has {len(values)} entries; give one for each of the {len(images)} images")
    if enlarge < 1:
        raise ValueError(f"enlarge is {enlarge}; give at least 1")
    features = model.encoder(images.to(model.prototypes.prototype_vectors))
    shown = ((images + 1) / 2).repeat_interleave(enlarge, -2).repeat_interleave(enlarge, -1)
    pictures = [
        heat_map(shown[row], model.prototypes, features[row], prototype, limits=limits[row] if limits else None)
        for row, prototype in enumerate(prototypes)
    ]
    return np.stack(pictures)


_TOP = 0.01
"""Share of the images, the most active ones, that a name is made from; at least 20, or a tenth of few images."""
_MOST_CLASSES = 3
"""Of a name; and no more than a third of the classes, that it says something."""
_CHANCE = 1e-3
"""Probability with which a share so far from that in all images gives one of the names by chance."""
_COVER = 0.75
"""Share of them that the classes of a name hold."""
_NOT = 0.75
"""AUROC from which classes are named that a prototype is not active in."""
_AS_GOOD = 0.01
"""Fewer of those make the better name where they lose no more AUROC."""
_APART = 0.5
"""Standard deviations by which an attribute is more frequent, or less, in the most active images than in all."""


def name_prototypes(
    found: PrototypeActivation, field: ReceptiveField, labels: Any = None, names: Sequence[str] | None = None
) -> list[PrototypeName]:
    """A name for each prototype, from the images that activate it most: 1 %, at least 20, or a tenth of few.

    *Which*: of classes, the one, two or three (at most a third of all) that stand out among these images, where they
    hold three quarters of them, which chance would not (probability below 0.001 over all prototypes and choices of
    classes); else those that the prototype is not active in ("not Sandal"), where its activation tells them from the
    rest with an AUROC of 0.75. Of attributes, which overlap, the one whose share among these images differs most from
    its share in all ("no Smiling" where it is less), by half a standard deviation or more, and not by chance. Else
    nothing is named. The AUROC is that of the activation over *all* images, so a prototype that only peaks in a class
    has a modest one.

    *Where*: the third of the image, down and across, that holds the middle of its patch in most of these images.

    Parameters
    ----------
    found : PrototypeActivation
        ``model.activations(images, return_all=True)``, (n, M).
    field : ReceptiveField
        ``field_of(model)``.
    labels : integers of shape (n,), or 0 and 1 of shape (n, K), optional
        The class of each image, or its attributes. A column that is all 0 or all 1 is passed over.
    names : sequence of str, optional
        Of the classes or attributes; by default their numbers.

    Returns
    -------
    list of PrototypeName
        M of them.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))
    >>> model = pf.patronus.Patronus(config)
    >>> found = model.activations(torch.rand(200, 1, 16, 16), return_all=True)
    >>> found.activation[:100, 2] += 5
    >>> name = name_prototypes(found, field_of(model), [0] * 100 + [1] * 100, ["cat", "dog"])[2]
    >>> name.what, name.auroc
    ('cat', 1.0)
    """
    activations = found.activation.double().cpu().numpy()
    if activations.ndim != 2 or len(activations) == 0:
        raise ValueError(f"found has activations of shape {activations.shape}; give (n, M) of at least one image")
    if not np.isfinite(activations).all():
        raise ValueError("found has activations that are not finite")
    if int(found.index.max()) >= len(field.boxes):
        raise ValueError(f"field has {len(field.boxes)} patches, found has others; give field_of(model) of that model")
    images = len(activations)
    member, exclusive = _members(labels, names, images)
    if names is None:
        names = [str(number) for number in range(member.shape[1])]
    there = np.flatnonzero(member.any(0) & ~member.all(0))
    top = np.argsort(-activations, axis=0, kind="stable")[: max(round(_TOP * images), min(20, -(-images // 10)))]
    rank = need("scipy.stats", "patronus").rankdata(activations, axis=0)
    result = []
    for prototype, where in enumerate(_places(found.index.cpu().numpy(), top, field)):
        choose = _classes if exclusive else _attribute
        place, active = choose(member[:, there], top[:, prototype], rank[:, prototype], _CHANCE / activations.shape[1])
        chosen = tuple(sorted(there[place].tolist()))
        if not chosen:
            result.append(PrototypeName(f"prototype {prototype}, {where}", "", where, np.nan, np.nan, (), True))
            continue
        inside: np.ndarray = member[:, chosen].any(1) == active
        share, auroc = float(inside[top[:, prototype]].mean()), _auroc(inside, rank[:, prototype])
        what = ("" if active else "not " if exclusive else "no ") + _listed([names[number] for number in chosen])
        text = f"{what}, {where} ({100 * share:.0f} % of its top images, AUROC {auroc:.2f})"
        result.append(PrototypeName(text, what, where, share, auroc, chosen, active))
    return result


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _members(labels: Any, names: Sequence[str] | None, images: int) -> tuple[np.ndarray, bool]:
    """(n, K) bool, and whether they are classes."""
    if labels is None:
        return np.zeros((images, 0), bool), True
    array = np.asarray(labels)
    if array.dtype.kind not in "biu":
        raise TypeError(f"labels is {array.dtype}; give integers")
    if array.ndim not in (1, 2) or len(array) != images:
        raise ValueError(f"labels has shape {array.shape}; give one row for each of the {images} images")
    count = len(names) if names is not None else int(array.max()) + 1 if array.ndim == 1 else array.shape[1]
    if array.ndim == 1:
        if array.min() < 0 or array.max() >= count:
            raise ValueError(f"labels run from {array.min()} to {array.max()}; there are {count} names")
        return array[:, None] == np.arange(count), True
    if array.shape[1] != count:
        raise ValueError(f"labels has {array.shape[1]} attributes; there are {count} names")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("labels of attributes must be 0 or 1")
    return array.astype(bool), False


def _auroc(inside: np.ndarray, rank: np.ndarray) -> float:
    return float(auroc(rank[:, None], inside[:, None])[0, 0])


def _by_chance(inside: np.ndarray, top: np.ndarray, alternative: str) -> float:
    """Probability of as many of them among as many images, drawn from all."""
    test = need("scipy.stats", "patronus").binomtest
    return float(test(int(inside[top].sum()), len(top), float(inside.mean()), alternative).pvalue)


def _apart(member: np.ndarray, top: np.ndarray) -> np.ndarray:
    """By how many standard deviations each share among the top images is above that in all."""
    share = member.mean(0)
    return (member[top].mean(0) - share) / np.sqrt(share * (1 - share))


def _classes(member: np.ndarray, top: np.ndarray, rank: np.ndarray, chance: float) -> tuple[list[int], bool]:
    """Columns of a name, and whether the prototype is active in them."""
    count = member.shape[1]
    order = np.argsort(-_apart(member, top), kind="stable").tolist()
    lengths = range(1, min(_MOST_CLASSES, max(1, count // 3), count - 1) + 1)
    for length in lengths:
        inside = member[:, order[:length]].sum(1) > 0
        # They are the best of so many that could have been chosen.
        if inside[top].mean() >= _COVER and _by_chance(inside, top, "greater") < chance / math.comb(count, length):
            return order[:length], True
    mean = (rank @ member) / member.sum(0)
    order = np.argsort(mean, kind="stable").tolist()
    aurocs = [_auroc(member[:, order[:length]].sum(1) == 0, rank) for length in lengths]
    best = max(aurocs, default=0.0)
    if best < _NOT:
        return [], True
    return order[: next(n for n, auroc in zip(lengths, aurocs, strict=True) if auroc >= best - _AS_GOOD)], False


def _attribute(member: np.ndarray, top: np.ndarray, rank: np.ndarray, chance: float) -> tuple[list[int], bool]:
    apart = _apart(member, top)
    if not len(apart) or np.abs(apart).max() < _APART:
        return [], True
    best = int(np.abs(apart).argmax())
    if _by_chance(member[:, best], top, "two-sided") >= chance / len(apart):
        return [], True
    return [best], bool(apart[best] > 0)


_DOWN, _ACROSS = ("top", "", "bottom"), ("left", "", "right")


def _places(index: np.ndarray, top: np.ndarray, field: ReceptiveField) -> list[str]:
    boxes = field.boxes.numpy()[np.take_along_axis(index, top, 0)]  # (count, M, 4)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2 / np.array(field.input_size)
    thirds = (middle * 3).astype(int).clip(max=2)
    shares = np.stack([(thirds == third).mean(0) for third in range(3)], -1).tolist()  # (M, 2, 3)
    return [_place(_third(down, _DOWN), _third(across, _ACROSS)) for down, across in shares]


def _third(shares: list[float], words: tuple[str, ...]) -> str | None:
    """The third that holds half of them or more; both ends where they share three quarters, each at least one."""
    if min(shares[0], shares[2]) >= 0.25 and shares[0] + shares[2] >= 0.75:
        return f"{words[0]} or {words[2]}"
    return words[shares.index(max(shares))] if max(shares) >= 0.5 else None


def _place(down: str | None, across: str | None) -> str:
    if down or across:
        return " ".join(word for word in (down, across) if word)
    return {("", ""): "centre", ("", None): "middle rows", (None, ""): "middle columns"}.get((down, across), "anywhere")
