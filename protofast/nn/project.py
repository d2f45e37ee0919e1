"""ProtoPNet's push: the patches of a whole data set that are nearest to each prototype."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
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
from torch.utils.data import (
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .._files import digest, replacing
from .._progress import bars
from ..prototype import prototype_distance
from .classes import class_members
from .layer import PrototypeLayer, _positive
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
        if not isinstance(layer, PrototypeLayer):
            raise TypeError(f"layer is a {type(layer).__name__}; give a pf.nn.PrototypeLayer")
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
        arrays, about = _read("path", path)
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
        images (B, ...) → features (B, D, *S), with no gradients. It gets the images on the layer's device and must be
        there too. A module, or the one whose method this is (``model.conv_features``), is put into eval mode for the
        time; for any other function or closure the caller must do so.
    loader : iterable, such as a DataLoader
        Batches: images, or (images, labels), or (images, labels, ids) with int64 ids that no two images share (labels
        may be None). Without ids images are numbered as they come, so do not shuffle (a shuffling DataLoader is warned
        of), and do not augment.
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
        at the end. The batches before it are read again but not encoded. Other batches (images, labels or ids), layer,
        classes or encoder are refused: of a module its classes, what it prints and its state count, of a function its
        name alone.
    checkpoint_every : int, default 20
        Batches from one writing to the next. Ctrl-C and errors write it once more.
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
    _check_loader(loader)
    best, per_image = _positive("best", best), _positive("per_image", per_image)
    checkpoint_every = _positive("checkpoint_every", checkpoint_every)
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint is a {type(checkpoint).__name__}; give a path")
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
            "kernel_size": list(layer.kernel_size),
            "prototypes": digest(vectors),
            "metric": layer.metric,
            "prototype_classes": "none" if members is None else digest(members),
            "best": best,
            "per_image": per_image,
            "encoder": _identity(encoder),
        }
        keeper = _Checkpoint(checkpoint, settings, state)
    first = 0
    with _evaluating(_module(encoder)), _kept(keeper), bars(progress) as start:
        advance = start("projecting", _length(loader), 0)
        for number, batch in enumerate(loader):
            images, labels, ids = _parts(batch, first, members is not None)
            if ids is None:
                if number == 0 and _shuffles(loader):
                    warnings.warn(
                        "loader shuffles and gives no ids, so image numbers are those of the shuffled order; give one "
                        "with shuffle=False, or ids as the third entry of a batch",
                        stacklevel=3,  # past no_grad
                    )
                ids = torch.arange(first, first + len(images))
            first += len(images)
            if keeper is None or not keeper.has(number, images, labels, ids):
                features = encoder(images.to(vectors.device, non_blocking=True))
                state.add(_checked(features, images, ids, layer), labels, ids)
                if keeper is not None:
                    keeper.reached(number + 1)
                    if (number + 1) % checkpoint_every == 0:
                        keeper.write()
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
                stacklevel=3,  # past no_grad
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
            self.arrays = self._merge(self.arrays, features, ids, None, kernel)
            return
        assert labels is not None
        arrays = {name: value.clone() for name, value in self.arrays.items()}  # an interrupt leaves the old ones whole
        for label in labels.unique().tolist():  # each class on its own: the others are never compared
            if label < -1:
                raise ValueError(f"loader gave label {label}; give classes from 0 on, or −1 for none")
            if label < 0:
                continue
            if self.members.ndim == 1:
                mine = self.members == label
            elif label < self.members.shape[1]:
                mine = self.members[:, label]
            else:
                raise ValueError(f"loader gave label {label}; prototype_classes has {self.members.shape[1]} classes")
            rows = mine.nonzero()[:, 0]
            if len(rows):
                at = (labels == label).nonzero()[:, 0].to(features.device)
                for name, value in self._merge(arrays, features[at], ids[at], rows, kernel).items():
                    arrays[name][rows] = value
        self.arrays = arrays

    def _merge(
        self, arrays: dict[str, Tensor], features: Tensor, ids: Tensor, rows: Tensor | None, kernel: list[int]
    ) -> dict[str, Tensor]:
        """The best of the arrays' and these samples' patches, for the prototypes `rows` (all for None)."""
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
        old = {name: value if rows is None else value[rows] for name, value in arrays.items()}
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
        return new

    def result(self) -> Projection:
        return Projection(**{name: value.cpu() for name, value in self.arrays.items()})


class _Checkpoint:
    """Progress in one file, with what it depends on: the settings, and a digest that runs over the batches."""

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any], state: _Nearest) -> None:
        self._path, self._settings, self._state = Path(path), settings, state
        self._chain = ""
        self._done, self._expected = 0, ""
        self._written, self._reached = 0, (0, "", state.arrays)
        if self._path.is_dir():
            raise ValueError(f"checkpoint {path} is a folder; give a file, such as {self._path / 'push.npz'}")
        if not self._path.exists():
            return
        arrays, about = _read("checkpoint", self._path)
        if about.get("format") != _FORMAT + "-checkpoint":
            raise ValueError(f"checkpoint {path} holds no progress of a projection; give another file")
        for name, value in settings.items():
            if about["settings"].get(name) != value:
                raise ValueError(f"checkpoint {path} was made with another {name}; give what it had, or delete it")
        self._done, self._expected = about["batches"], about["chain"]
        device = state.layer.prototype_vectors.device
        state.arrays = {name: value.to(device) for name, value in arrays.items()}
        self._written, self._reached = self._done, (self._done, self._expected, state.arrays)

    def has(self, number: int, images: Tensor, labels: Tensor | None, ids: Tensor) -> bool:
        """Whether this batch is in the file; notes what came in."""
        seen = " ".join([self._chain, *map(digest, (images, labels, ids))])
        self._chain = hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()
        if number + 1 == self._done and self._chain != self._expected:
            raise ValueError(
                f"loader gives other batches than when checkpoint {self._path} was written; give the same ones in the "
                "same order (shuffle=False), or delete the file"
            )
        return number < self._done

    def reached(self, batches: int) -> None:
        """Notes that this many batches are in; one assignment, so that no interrupt leaves half of it."""
        self._reached = (batches, self._chain, self._state.arrays)

    def write(self) -> None:
        batches, chain, arrays = self._reached
        if batches <= self._written:
            return
        about = {
            "format": _FORMAT + "-checkpoint",
            "settings": self._settings,
            "batches": batches,
            "chain": chain,
        }
        _write(self._path, arrays, about, durable=True)
        self._written = batches

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


def _read(what: str, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"])) if "about" in file else {}
            return {name: torch.from_numpy(file[name]) for name in file.files if name != "about"}, about
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{what} {path} is damaged, or no .npz file of protofast's; give another") from error


def _parts(batch: Any, first: int, needs_labels: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
    if ids is not None:
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


def _check_loader(loader: Any) -> None:
    kind = type(loader).__name__
    if isinstance(loader, Tensor):
        raise TypeError("loader is a Tensor; wrap it in a DataLoader, or give batches, as images.split(64)")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):  # which may give batches
        raise TypeError(f"loader is a Dataset ({kind}); wrap it in a DataLoader")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader is a {kind}; give a DataLoader, or another iterable of batches")


def _shuffles(loader: Any) -> bool:
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(s, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for s in samplers)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # of a DataLoader over an IterableDataset too, which has a __len__
        return None


def _identity(encoder: Any) -> str:
    """What an encoder computes, as far as names, printed settings and state say."""
    if isinstance(encoder, nn.Module):
        seen = [_name(type(module)) for module in encoder.modules()]
        seen.append(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(encoder)))  # the same in another process
        state = encoder.state_dict() | dict(encoder.named_buffers())  # with those that are not saved
        seen += [f"{name} {digest(value)}" for name, value in state.items()]
        return hashlib.blake2b("\n".join(seen).encode(), digest_size=16).hexdigest()
    owner = _module(encoder)
    name = _name(encoder if hasattr(encoder, "__qualname__") else type(encoder))
    return name if owner is None else f"{name} of {_identity(owner)}"


def _module(encoder: Any) -> nn.Module | None:
    """The encoder, or the module whose method it is."""
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    return module if isinstance(module, nn.Module) else None


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@contextmanager
def _kept(keeper: _Checkpoint | None) -> Iterator[None]:
    """Writes the progress once more where the block is broken off."""
    try:
        yield
    except BaseException:
        if keeper is not None:
            keeper.write()
        raise


@contextmanager
def _evaluating(module: nn.Module | None) -> Iterator[None]:
    """Eval mode for a module and all in it; each gets back the mode it had."""
    modes = [] if module is None else [(m, m.training) for m in module.modules()]
    try:
        if module is not None:
            module.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
