"""ProtoPNet's push: the patches of a whole data set that are nearest to each prototype."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._files import replacing
from .._progress import bars
from ..diffusion.journal import digest
from ..prototype import prototype_distance
from .classes import class_members
from .layer import PrototypeLayer
from .patches import grid_of, positions, take

_FORMAT = "protofast-projection-1"


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """The patches nearest to each prototype, nearest first. Every field is a tensor on the CPU.

    Where fewer than `best` patches were allowed, the rest has distance +inf, image, patch and position −1, feature 0.

    Attributes
    ----------
    distance : Tensor of shape (P, best)
        To the prototypes as they were before the push; float32, or float64.
    image : int64 Tensor of shape (P, best)
        Running number of the image in the loader's order, or the loader's own id.
    patch : int64 Tensor of shape (P, best)
        Flat index over the patch grid, row-major.
    position : int64 Tensor of shape (P, best, axes)
        The same as coordinates on the grid.
    feature : Tensor of shape (P, best, D, *K)
        The patch's features.
    """

    distance: Tensor
    image: Tensor
    patch: Tensor
    position: Tensor
    feature: Tensor

    @property
    def found(self) -> Tensor:
        """(P,) bool: whether the prototype has a patch at all."""
        return self.image[:, 0] >= 0

    @property
    def duplicates(self) -> list[list[int]]:
        """Groups of prototypes whose nearest patches have equal features: after a push they are the same."""
        groups: dict[int, list[int]] = {}
        for prototype, group in enumerate(self._groups().tolist()):
            if group >= 0:
                groups.setdefault(group, []).append(prototype)
        return [group for group in groups.values() if len(group) > 1]

    @property
    def unique(self) -> Tensor:
        """(P,) bool: False for all but the first prototype of each group of duplicates; for `PrototypeLayer.prune`."""
        keep = torch.ones(len(self.image), dtype=torch.bool)
        for group in self.duplicates:
            keep[group[1:]] = False
        return keep

    def _groups(self) -> Tensor:
        """(P,) number of the group of equal features; −1 where nothing was found."""
        rows = self.feature[:, 0].flatten(1)
        return torch.where(self.found, torch.unique(rows, dim=0, return_inverse=True)[1], -1)

    @torch.no_grad()
    def push_to(self, layer: PrototypeLayer) -> None:
        """Makes each prototype its nearest patch (Chen et al. 2019, eq. 2). One without a patch stays as it is."""
        vectors = layer.prototype_vectors
        if len(self.feature) != len(vectors) or self.feature[0, 0].numel() != vectors[0].numel():
            raise ValueError(
                f"layer has prototypes {tuple(vectors.shape)}; the projection is of "
                f"{(len(self.feature), *self.feature.shape[2:])}"
            )
        nearest = self.feature[:, 0].reshape(vectors.shape).to(vectors.device, vectors.dtype)
        found = self.found.to(vectors.device).reshape(-1, *[1] * (vectors.ndim - 1))
        vectors.copy_(torch.where(found, nearest, vectors))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a NumPy .npz file, whole or not at all."""
        _write(path, {field.name: getattr(self, field.name) for field in fields(self)}, {"format": _FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projection:
        """Reads what `save` wrote."""
        arrays, about = _read(path)
        names = [field.name for field in fields(cls)]
        if about.get("format") != _FORMAT or not set(names) <= set(arrays):
            raise ValueError(f"{path} holds no projection; give a file that Projection.save wrote")
        return cls(**{name: arrays[name] for name in names})

    def __repr__(self) -> str:
        count, best = self.image.shape
        missing = count - int(self.found.sum())
        return (
            f"Projection({count} prototypes, best {best}, {len(self.duplicates)} groups of duplicates"
            + (f", {missing} without a patch" if missing else "")
            + ")"
        )


@torch.no_grad()
def project(
    layer: PrototypeLayer,
    encoder: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    *,
    prototype_classes: Tensor | None = None,
    best: int = 1,
    per_image: int = 1,
    push: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 20,
    progress: bool = True,
) -> Projection:
    """The patches of a data set nearest to each prototype, in one pass over it; then each becomes its nearest one.

    Chen et al. 2019, "This Looks Like That", sec. 2.2, eq. 2: p ← argmin over patches z of its class of ‖z − p‖. No map
    of distances is stored: memory beyond a batch's features is O(P · best · D).

    Parameters
    ----------
    layer : PrototypeLayer
    encoder : callable
        images (B, ...) → features (B, D, *S). A module is put into eval mode for the time, with no gradients.
    loader : iterable
        Batches: images, or (images, labels), or (images, labels, ids) with int64 ids that no two images share (labels
        may be None). Without ids images are numbered as they come, so do not shuffle, and do not augment.
    prototype_classes : integer Tensor of shape (P,), or bool of shape (P, C), optional
        The class of each prototype, −1 for none: then only patches of images with that label count, and only those
        are compared. The loader must give labels.
    best : int, default 1
        Patches to keep for each prototype.
    per_image : int, default 1
        At most so many of them from one image. More than one are mostly the same spot shifted by a pixel, which says
        little of what the prototype has learned; hence 1, as ProtoPNet's own nearest-patch pictures have it.
    push : bool, default True
        Write the nearest patch into ``layer.prototype_vectors``. With False the layer stays as it is, and
        ``Projection.push_to`` does it later.
    checkpoint : path, optional
        A file (.npz) that keeps the progress; a call that finds it goes on from there, to the same bits. It is deleted
        at the end. The batches before it are read again but not encoded, and checked to be the same ones.
    checkpoint_every : int, default 20
        Batches from one writing to the next.
    progress : bool, default True
        A bar on stderr, where rich is installed.

    Returns
    -------
    Projection
        On the CPU. Ties go to the lowest (image, patch). Prototypes that became equal are in ``duplicates``;
        ``layer.prune(projection.unique)`` drops them. One without any patch of its class stays, with a warning.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. Features that are not finite are refused, naming the image.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> layer = pf.nn.PrototypeLayer(4, 8)
    >>> encoder = torch.nn.Conv2d(1, 8, 3)
    >>> batches = torch.rand(20, 1, 10, 10).split(5)
    >>> found = pf.nn.project(layer, encoder, batches, best=3, progress=False)
    >>> found.image.shape, found.position.shape
    (torch.Size([4, 3]), torch.Size([4, 3, 2]))
    """
    if not isinstance(layer, PrototypeLayer):
        raise TypeError(f"layer is a {type(layer).__name__}; give a pf.nn.PrototypeLayer")
    if not callable(encoder):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a module or function")
    for name, value in (("best", best), ("per_image", per_image), ("checkpoint_every", checkpoint_every)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; give an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    vectors = layer.prototype_vectors.detach()
    if not vectors.isfinite().all():
        broken = int((~vectors.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"layer has values in prototype {broken} that are not finite")
    members = None
    if prototype_classes is not None:
        members = class_members(prototype_classes, layer.num_prototypes).to(vectors.device)
    state = _Nearest(layer, members, best, min(per_image, best))
    keeper = None
    if checkpoint is not None:
        settings = {
            "prototypes": digest(vectors),
            "metric": layer.metric,
            "prototype_classes": "none" if members is None else digest(members),
            "best": best,
            "per_image": per_image,
            "encoder": _identity(encoder),
        }
        keeper = _Checkpoint(checkpoint, settings, state)
    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    first = 0
    with _evaluating(encoder), bars(progress) as start:
        advance = start("projecting", total, 0)
        for number, batch in enumerate(loader):
            images, labels, ids = _parts(batch, first, members is not None)
            first += len(images)
            if keeper is None or not keeper.has(number, images, ids):
                features = encoder(images.to(vectors.device, non_blocking=True))
                state.add(_checked(features, images, ids, layer), labels, ids)
                if keeper is not None and (number + 1) % checkpoint_every == 0:
                    keeper.write(number + 1)
            advance(1)
    if first == 0:
        raise ValueError("loader gave no batch; give one that has images")
    if keeper is not None:
        keeper.finish(number + 1)
    projection = state.result()
    if push:
        if not bool(projection.found.all()):
            missing = (~projection.found).nonzero()[:, 0].tolist()
            warnings.warn(
                f"{len(missing)} prototypes have no patch of their class in the loader and stay as they are: "
                f"{', '.join(map(str, missing[:10]))}{' …' if len(missing) > 10 else ''}",
                stacklevel=2,
            )
        projection.push_to(layer)
    return projection


class _Nearest:
    """The best patches so far."""

    def __init__(self, layer: PrototypeLayer, members: Tensor | None, best: int, per_image: int) -> None:
        self.layer, self.members, self.best, self.per_image = layer, members, best, per_image
        self.arrays: dict[str, Tensor] = {}  # empty until the first features say how many axes and which dtype

    def _begin(self, features: Tensor, kernel: list[int]) -> None:
        count, device = self.layer.num_prototypes, features.device
        dtype = torch.promote_types(features.dtype, self.layer.prototype_vectors.dtype)
        dtype = dtype if dtype == torch.float64 else torch.float32
        none = torch.full((count, self.best), -1, dtype=torch.int64, device=device)
        self.arrays = {
            "distance": torch.full((count, self.best), math.inf, dtype=dtype, device=device),
            "image": none,
            "patch": none.clone(),
            "position": none[..., None].expand(-1, -1, len(kernel)).clone(),
            "feature": torch.zeros((count, self.best, self.layer.channels, *kernel), dtype=dtype, device=device),
        }

    def add(self, features: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        kernel = self.layer._kernel(features)
        if not self.arrays:
            self._begin(features, kernel)
        ids = ids.to(features.device)
        if self.arrays["position"].shape[-1] != len(kernel):
            raise ValueError(f"encoder gave features of shape {tuple(features.shape)}, with other axes than before")
        if len(ids.unique()) != len(ids) or bool(torch.isin(ids, self.arrays["image"]).any()):
            raise ValueError("loader gave an image id twice; ids must differ from image to image")
        if self.members is None:
            self._merge(features, ids, None, kernel)
            return
        assert labels is not None
        for label in labels.unique().tolist():  # each class on its own: the others are never compared
            if self.members.ndim == 1:
                mine = self.members == label
            elif 0 <= label < self.members.shape[1]:
                mine = self.members[:, label]
            else:
                raise ValueError(f"loader gave label {label}; prototype_classes has {self.members.shape[1]} classes")
            rows = mine.nonzero()[:, 0]
            if len(rows) and label >= 0:
                at = (labels == label).nonzero()[:, 0].to(features.device)
                self._merge(features[at], ids[at], rows, kernel)

    def _merge(self, features: Tensor, ids: Tensor, rows: Tensor | None, kernel: list[int]) -> None:
        """Takes in the patches of these samples for the prototypes `rows` (all for None)."""
        prototypes = self.layer._prototypes()
        grid = grid_of(features, kernel)
        topk = min(self.per_image, math.prod(grid))
        distance, patch = prototype_distance(
            features,
            prototypes if rows is None else prototypes[rows],
            metric=self.layer.metric,
            topk=topk,
            verify=True,
        )
        # (prototypes, samples · topk)
        distance = distance.reshape(len(features), -1, topk).transpose(0, 1).flatten(1)
        patch = patch.reshape(len(features), -1, topk).transpose(0, 1).flatten(1)
        image = ids.repeat_interleave(topk).expand_as(patch)
        old = {name: value if rows is None else value[rows] for name, value in self.arrays.items()}
        keys = [
            torch.cat([old[name], more.to(old[name].dtype)], 1)
            for name, more in (("distance", distance), ("image", image), ("patch", patch))
        ]
        # By distance, then image, then patch; a place that is still empty comes last.
        keys[1] = torch.where(keys[1] < 0, torch.iinfo(torch.int64).max, keys[1])
        order = keys[2].argsort(dim=1, stable=True)
        for key in (keys[1], keys[0]):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        order = order[:, : self.best]
        kept = order.clamp(max=self.best - 1)
        new = {"distance": keys[0].gather(1, order)}
        for name, more in (("image", image), ("patch", patch)):
            new[name] = torch.cat([old[name], more], 1).gather(1, order)
        for name in ("position", "feature"):
            new[name] = old[name][torch.arange(len(order), device=order.device)[:, None], kept]
        row, column = (order >= self.best).nonzero(as_tuple=True)
        if len(row):
            sample = (order[row, column] - self.best) // topk
            where = new["patch"][row, column]
            new["position"][row, column] = positions(where, grid)
            new["feature"][row, column] = take(features, sample, where, kernel).to(new["feature"].dtype)
        if rows is None:
            self.arrays = new
        else:
            for name, value in new.items():
                self.arrays[name][rows] = value

    def result(self) -> Projection:
        return Projection(**{name: value.cpu() for name, value in self.arrays.items()})


class _Checkpoint:
    """Progress in one file, with what it depends on: the settings, and a digest that runs over the batches."""

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any], state: _Nearest) -> None:
        self._path, self._settings, self._state = Path(path), settings, state
        self._chain = ""
        self._done, self._expected = 0, ""
        if not self._path.exists():
            return
        arrays, about = _read(self._path)
        if about.get("format") != _FORMAT + "-checkpoint":
            raise ValueError(f"checkpoint {path} holds no progress of a projection; give another file")
        for name, value in settings.items():
            if about["settings"].get(name) != value:
                raise ValueError(f"checkpoint {path} was made with another {name}; give what it had, or delete it")
        self._done, self._expected = about["batches"], about["chain"]
        device = state.layer.prototype_vectors.device
        state.arrays = {name: value.to(device) for name, value in arrays.items()}

    def has(self, number: int, images: Tensor, ids: Tensor) -> bool:
        """Whether this batch is in the file; notes what came in."""
        # One image stands for its batch: enough to tell another order, at no cost.
        seen = f"{self._chain} {len(images)} {digest(images[:1])} {digest(ids)}"
        self._chain = hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()
        if number + 1 == self._done and self._chain != self._expected:
            raise ValueError(
                f"loader gives other batches than when checkpoint {self._path} was written; give the same ones in the "
                "same order (shuffle=False), or delete the file"
            )
        return number < self._done

    def write(self, batches: int) -> None:
        about = {
            "format": _FORMAT + "-checkpoint",
            "settings": self._settings,
            "batches": batches,
            "chain": self._chain,
        }
        _write(self._path, self._state.arrays, about, durable=True)

    def finish(self, batches: int) -> None:
        if batches < self._done:
            raise ValueError(
                f"loader has {batches} batches; checkpoint {self._path} is from one with {self._done} or more; give "
                "that one, or delete the file"
            )
        self._path.unlink(missing_ok=True)


def _write(
    path: str | os.PathLike[str], arrays: dict[str, Tensor], about: dict[str, Any], *, durable: bool = False
) -> None:
    with replacing(path, durable=durable) as file:
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            **{name: value.cpu().numpy() for name, value in arrays.items()},  # type: ignore[arg-type]
        )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"])) if "about" in file else {}
            return {name: torch.from_numpy(file[name]) for name in file.files if name != "about"}, about
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or no .npz file ({error})") from None


def _parts(batch: Any, first: int, needs_labels: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images, labels and ids of one batch."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], Tensor):
        raise TypeError(
            f"loader gave a {type(batch).__name__} that begins at image {first}; give images, (images, labels) or "
            "(images, labels, ids), with images a tensor"
        )
    images, labels, ids = [*parts, None, None][:3]
    for name, values in (("labels", labels), ("ids", ids)):
        if values is not None:
            values = torch.as_tensor(values)
            if values.is_floating_point() or values.dtype == torch.bool or values.shape != images.shape[:1]:
                raise ValueError(
                    f"loader gave {name} of {values.dtype} and shape {tuple(values.shape)} for {len(images)} images; "
                    "give one integer an image"
                )
    if labels is not None:
        labels = torch.as_tensor(labels)
    elif needs_labels:
        raise ValueError("loader gave no labels; prototype_classes needs batches (images, labels)")
    if ids is None:
        ids = torch.arange(first, first + len(images))
    else:
        ids = torch.as_tensor(ids).to(torch.int64)
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"loader gave image id {int(ids.min())}; give ids from 0 on")
    return images, labels, ids


def _checked(features: Any, images: Tensor, ids: Tensor, layer: PrototypeLayer) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"encoder gave a {type(features).__name__}; it must give features (B, {layer.channels}, *S)")
    if len(features) != len(images):
        raise ValueError(f"encoder gave features of shape {tuple(features.shape)} for {len(images)} images")
    fine = features.isfinite().flatten(1).all(1)
    if not bool(fine.all()):
        broken = int((~fine).nonzero()[0])
        raise ValueError(
            f"encoder gave features that are not finite for image {int(ids[broken])}; a prototype cannot be one of them"
        )
    return features


def _identity(encoder: Any) -> str:
    """What an encoder computes, as far as its type and weights say."""
    if not isinstance(encoder, nn.Module):
        return type(encoder).__name__
    seen = [type(encoder).__name__, *(f"{name} {digest(value)}" for name, value in encoder.state_dict().items())]
    return hashlib.blake2b("\n".join(seen).encode(), digest_size=16).hexdigest()


@contextmanager
def _evaluating(encoder: Any) -> Iterator[None]:
    """Eval mode for a module and all in it; each gets back the mode it had."""
    modes = [(m, m.training) for m in encoder.modules()] if isinstance(encoder, nn.Module) else []
    try:
        if modes:
            encoder.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
