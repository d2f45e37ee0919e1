"""A set of images that is read a batch at a time."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """A file that cannot be read as images or labels; the message names the file and the cure."""


class Images(Protocol):
    """What holds the images: a NumPy array or memory map, or a reader that looks like one along its first axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...


class Dataset(torch.utils.data.Dataset):
    """Images with labels, read from their source only when and where they are asked for.

    `load` makes one; so does the constructor, for an array that is already in memory.

    Parameters
    ----------
    images : array of shape (n, H, W) or (n, C, H, W)
        uint8 (0 … 255), bool, or floating point in [0, 1].
    labels : sequence of int, shape (n,), optional
    names : sequence of str, optional
        Name of each class: label k is ``names[k]``.
    attributes : array of bool, shape (n, K), optional
        What is so of each image: column k is ``attribute_names[k]``.
    attribute_names : sequence of str, optional
        Comes with attributes; no name twice.
    source : str, default "array"
        Where the images come from, for messages.

    Attributes
    ----------
    images : array-like of shape (n, H, W) or (n, C, H, W)
        As stored: no conversion, and a memory map where the file allows.
    labels : ndarray of int64, shape (n,), or None
    names : tuple of str, or None
    attributes : ndarray of bool, shape (n, K), or None
    attribute_names : tuple of str, empty without attributes
    image_shape : (C, H, W)
    source : str

    Raises
    ------
    DataError
        When the images have another shape or dtype, or labels or attributes do not fit them. The range of floating
        point values is checked as they are read.

    Examples
    --------
    >>> import numpy as np
    >>> from protofast.data import Dataset
    >>> data = Dataset(np.zeros((5, 8, 8), np.uint8), [0, 0, 1, 1, 1], names=("cat", "dog"))
    >>> len(data), data.image_shape, len(data.of_class("dog"))
    (5, (1, 8, 8), 3)
    >>> image, label = data[4]
    >>> image.dtype, image.shape, label
    (torch.float32, torch.Size([1, 8, 8]), 1)
    """

    def __init__(
        self,
        images: Images,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        names: Sequence[str] | None = None,
        attributes: Sequence[Sequence[bool]] | np.ndarray | None = None,
        attribute_names: Sequence[str] | None = None,
        source: str = "array",
    ) -> None:
        self.images = images
        self.names = None if names is None else tuple(names)
        self.source = source
        shape, kind = tuple(images.shape), np.dtype(images.dtype)
        if len(shape) not in (3, 4) or 0 in shape:
            raise DataError(f"{source} has shape {shape}; give images (n, H, W) or (n, C, H, W), none of them empty")
        if len(shape) == 4 and shape[1] > 4 >= shape[3]:
            raise DataError(f"{source} has shape {shape}, channels last; transpose it to (n, C, H, W)")
        if kind != np.uint8 and kind.kind not in "bf":
            raise DataError(f"{source} holds {kind}; give uint8 (0 to 255) or floating point in [0, 1]")
        self.image_shape: tuple[int, int, int] = (1, *shape[1:]) if len(shape) == 3 else shape[1:]  # type: ignore[assignment]
        self.labels = None if labels is None else self._checked(labels)
        self.attribute_names = () if attribute_names is None else tuple(attribute_names)
        self.attributes = self._checked_attributes(attributes)

    def _checked(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(labels)
        if array.shape != (len(self),) or array.dtype.kind not in "iu":
            raise DataError(
                f"labels of {self.source} are {array.dtype} of shape {array.shape}; "
                f"give {len(self)} integers, one an image"
            )
        array = array.astype(np.int64)
        if self.names is not None and (array.min() < 0 or array.max() >= len(self.names)):
            raise DataError(
                f"labels of {self.source} run from {array.min()} to {array.max()}; "
                f"there are {len(self.names)} class names"
            )
        return array

    def _checked_attributes(self, attributes: Any) -> np.ndarray | None:
        names = self.attribute_names
        if attributes is None and not names:
            return None
        array = np.asarray(attributes)
        if not names or array.shape != (len(self), len(names)) or array.dtype != np.bool_:
            raise DataError(
                f"attributes of {self.source} are {array.dtype} of shape {array.shape}; give bool of shape "
                f"({len(self)}, K), a row an image, with K attribute_names (there are {len(names)})"
            )
        if repeated := [name for name in names if names.count(name) > 1]:
            raise DataError(f"attribute_names of {self.source} has {repeated[0]!r} twice; give each its own name")
        return array

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, float32 (C, H, W) in [0, 1], and its label (−1 without labels)."""
        n = len(self)
        if not -n <= index < n:  # also what ends a plain for loop
            raise IndexError(f"image {index} was asked of {self.source}, which has {n}")
        i = int(index) % n
        return self.take([i])[0], -1 if self.labels is None else int(self.labels[i])

    def __repr__(self) -> str:
        classes = "no labels" if self.labels is None else f"{len(np.unique(self.labels))} classes"
        attributes = "" if self.attributes is None else f", {len(self.attribute_names)} attributes"
        return f"Dataset({self.source}: {len(self)} images {self.image_shape}, {classes}{attributes})"

    def take(self, indices: Any) -> Tensor:
        """The images at `indices` (a slice, or integers as in `subset`): float32 (k, C, H, W) in [0, 1]."""
        key = indices if isinstance(indices, slice) else self._positions(indices)
        stored = self.images[key]
        rows = np.array(stored, np.float32).reshape(-1, *self.image_shape)
        if self.images.dtype == np.uint8:
            rows /= 255
        elif rows.size and not (rows.min() >= 0 and rows.max() <= 1):  # so that NaN fails too
            raise DataError(
                f"{self.source} holds values from {rows.min()} to {rows.max()}; scale the images to [0, 1], without NaN"
            )
        return torch.from_numpy(rows)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs through the set in order, reading `batch_size` images at a time.

        Parameters
        ----------
        batch_size : int
            At least 1; the last batch may be smaller.

        Yields
        ------
        images : Tensor of shape (b, C, H, W)
            float32 in [0, 1].
        labels : Tensor of shape (b,)
            int64; −1 without labels.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            images = self.take(slice(start, start + batch_size))
            if self.labels is None:
                yield images, torch.full((len(images),), -1)
            else:
                yield images, torch.from_numpy(self.labels[start : start + batch_size].copy())

    def subset(self, indices: Any) -> Dataset:
        """The images at `indices`, in that order, without reading them.

        Parameters
        ----------
        indices : sequence, array or Tensor of int in [0, n), or a bool mask of shape (n,)

        Raises
        ------
        IndexError, TypeError, ValueError
            For an index outside the set, something that is no index, or an empty selection.
        """
        positions = self._positions(indices)
        if positions.size == 0:
            raise ValueError(f"indices select no image of {self.source}; select at least one")
        part = copy.copy(self)
        part.images = Rows(self.images, positions)
        part.labels = None if self.labels is None else self.labels[positions]
        part.attributes = None if self.attributes is None else self.attributes[positions]
        return part

    def of_class(self, label: int | str) -> Dataset:
        """The images of one class, by its label or its name, without reading them.

        Raises
        ------
        ValueError
            When there are no labels, or none is this class.
        """
        if self.labels is None:
            raise ValueError(f"{self.source} has no labels, so of_class({label!r}) selects nothing; use subset")
        wanted = label
        if isinstance(label, str):
            if self.names is None or label not in self.names:
                raise ValueError(f"label is {label!r}; the classes of {self.source} are {self.names}")
            wanted = self.names.index(label)
        found = np.flatnonzero(self.labels == wanted)
        if found.size == 0:
            raise ValueError(f"label is {label!r}; {self.source} has the labels {np.unique(self.labels).tolist()}")
        return self.subset(found)

    def attribute(self, name: str) -> np.ndarray:
        """Which images have an attribute: bool (n,).

        Raises
        ------
        ValueError
            When there is none of this name.
        """
        if self.attributes is None:
            raise ValueError(
                f"{self.source} has no attributes, so none is called {name!r}; of classes, class_attributes makes some"
            )
        if name not in self.attribute_names:
            raise ValueError(f"name is {name!r}; the attributes of {self.source} are {', '.join(self.attribute_names)}")
        return self.attributes[:, self.attribute_names.index(name)]

    def class_attributes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The classes as attributes: bool (n, K), one True a row, and the K names.

        Of classes without names, those that occur, named by their labels.

        Raises
        ------
        ValueError
            When there are no labels.

        Examples
        --------
        >>> import protofast as pf
        >>> shown, names = pf.data.load("digits").class_attributes()
        >>> shown.shape, names[3], int(shown[:, 3].sum())
        ((1437, 10), '3', 146)
        """
        if self.labels is None:
            raise ValueError(f"{self.source} has no labels, so no class attributes")
        classes = np.unique(self.labels) if self.names is None else np.arange(len(self.names))
        names = tuple(map(str, classes)) if self.names is None else self.names
        return self.labels[:, None] == classes, names

    def digest(self) -> str:
        """A name for the images in their order, 32 digits: another where a file, the order or an array changes.

        Of files their paths, sizes and times of change are looked at; of an array in memory all its bytes.
        """
        return _digest(self.images)

    def _positions(self, indices: Any) -> np.ndarray:
        array = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
        n = len(self)
        if array.dtype == np.bool_ and array.shape == (n,):
            return np.flatnonzero(array)
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(
                f"indices are {array.dtype} of shape {array.shape}; give integers (k,) or a bool mask ({n},)"
            )
        if array.min() < 0 or array.max() >= n:
            raise IndexError(f"indices run from {array.min()} to {array.max()}; {self.source} has images 0 to {n - 1}")
        return array.astype(np.int64)


class Rows:
    """Chosen rows of images, in a chosen order, read only when asked for."""

    def __init__(self, base: Images, positions: np.ndarray) -> None:
        if isinstance(base, Rows):
            positions = base.positions[positions]
            base = base.base
        self.base: Images = base
        self.positions: np.ndarray = positions
        self.shape = (len(positions), *base.shape[1:])
        self.dtype = base.dtype

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: Any) -> Any:
        return self.base[self.positions[key]]

    def digest(self) -> str:
        return hashlib.blake2b(f"{_digest(self.base)} {_digest(self.positions)}".encode(), digest_size=16).hexdigest()


def _digest(images: Any) -> str:
    return images.digest() if hasattr(images, "digest") else array_digest(images)


def array_digest(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    found = hashlib.blake2b(array.reshape(-1).view(np.uint8).data, digest_size=16)
    found.update(f"{array.dtype} {array.shape}".encode())
    return found.hexdigest()


def digest_of_files(paths: Iterable[os.PathLike[str]], *about: Any) -> str:
    """Changes when a file does, or what else is told."""
    found = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for path in paths:
        stat = os.stat(path)
        found.update(f"\0{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return found.hexdigest()
