"""Anchors of any kind as numbered images that are read in batches, in a fixed order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

_SAMPLED = 64  # anchors that the fingerprint of a set looks at


class Batch(NamedTuple):
    """The number of the first image, images (B, C, H, W) float32, and labels (B,) int64 if they came with them."""

    first: int
    images: Tensor
    labels: np.ndarray | None


class Anchors(Protocol):
    """What the analysis reads. `count` is None until a stream of unknown length has ended.

    `labels` are those known beforehand; others come with the batches.
    """

    count: int | None

    @property
    def labels(self) -> np.ndarray | None: ...
    @property
    def names(self) -> list[str] | None: ...
    def batches(self, size: int, start: int = 0) -> Iterator[Batch]: ...
    def fingerprint(self) -> str: ...


def open_anchors(anchors: Any, labels: Any, names: Sequence[str] | None, value_range: tuple[float, float]) -> Anchors:
    """Wraps a Tensor, array, dataset or iterable of batches."""
    if isinstance(anchors, Tensor | np.ndarray):
        if anchors.ndim not in (3, 4):
            raise ValueError(f"anchors has shape {tuple(anchors.shape)}; give images (n, C, H, W) or (n, H, W)")
        rows: Any = _ArrayRows(anchors, value_range)
    elif hasattr(anchors, "take") and hasattr(anchors, "__len__"):
        rows = _TakeRows(anchors, value_range)
        labels = getattr(anchors, "labels", None) if labels is None else labels
        names = getattr(anchors, "names", None) if names is None else names
    elif isinstance(anchors, torch.utils.data.IterableDataset):
        raise TypeError("anchors is an IterableDataset; give a DataLoader of it, which makes batches")
    elif isinstance(anchors, torch.utils.data.DataLoader) or not hasattr(anchors, "__getitem__") or _batched(anchors):
        return _Stream(anchors, labels, names, value_range)
    else:
        rows = _ItemRows(anchors, value_range)
        names = getattr(anchors, "classes", None) if names is None else names
    if len(rows) == 0:
        raise ValueError("anchors is empty; give at least one image")
    return _Indexed(rows, _labels(labels, len(rows)), _names(names))


def as_images(images: Any, value_range: tuple[float, float]) -> Tensor:
    """(B, C, H, W) float32; integers 0 … 255 are scaled to the range."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise ValueError(f"a batch of anchors has shape {tuple(images.shape)}; give images (B, C, H, W) or (B, H, W)")
    low, high = value_range
    if images.dtype == torch.uint8:
        return images.float() / 255 * (high - low) + low
    if images.dtype == torch.bool:
        return images.float() * (high - low) + low
    if not images.is_floating_point():
        raise TypeError(f"anchors has dtype {images.dtype}; give floating point in {value_range}, or uint8")
    return images.float()


class _ArrayRows:
    """Rows of a Tensor, array or memory map."""

    def __init__(self, array: Any, value_range: tuple[float, float]) -> None:
        self.array, self.value_range = array, value_range

    def __len__(self) -> int:
        return len(self.array)

    def __call__(self, indices: slice | np.ndarray) -> tuple[Tensor, None]:
        if isinstance(self.array, Tensor):
            key = indices if isinstance(indices, slice) else torch.from_numpy(indices).to(self.array.device)
            return as_images(self.array[key].detach(), self.value_range), None
        return as_images(np.array(self.array[indices]), self.value_range), None


class _TakeRows:
    """Rows of a `protofast.data.Dataset`, which gives [0, 1]."""

    def __init__(self, data: Any, value_range: tuple[float, float]) -> None:
        self.data, self.value_range = data, value_range

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self, indices: slice | np.ndarray) -> tuple[Tensor, None]:
        low, high = self.value_range
        images = as_images(self.data.take(indices), self.value_range)
        return images if self.value_range == (0.0, 1.0) else images * (high - low) + low, None


class _ItemRows:
    """Rows of a map-style torch Dataset, whose items are an image or (image, label, …)."""

    def __init__(self, data: Any, value_range: tuple[float, float]) -> None:
        self.data, self.value_range = data, value_range

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self, indices: slice | np.ndarray) -> tuple[Tensor, np.ndarray | None]:
        numbers = range(*indices.indices(len(self))) if isinstance(indices, slice) else indices
        images, labels = [], []
        for number in numbers:
            item = self.data[int(number)]
            image, *rest = item if isinstance(item, tuple | list) else (item,)
            if not isinstance(image, Tensor | np.ndarray):
                raise TypeError(
                    f"anchor {number} is a {type(image).__name__}; give tensors (C, H, W), for a torchvision dataset "
                    "through transform=ToTensor()"
                )
            images.append(torch.as_tensor(image))
            labels += [int(rest[0])] if rest and _is_label(rest[0]) else []
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(f"anchors have different shapes, {sorted(shapes)}; all of them must be alike")
        found = np.array(labels, np.int64) if len(labels) == len(images) else None
        return as_images(torch.stack(images), self.value_range), found


class _Indexed:
    """Anchors with random access."""

    def __init__(self, rows: Any, labels: np.ndarray | None, names: list[str] | None) -> None:
        self.rows, self.labels, self.names = rows, labels, names
        self.count: int | None = len(rows)

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        for first in range(start, len(self.rows), size):
            stop = min(first + size, len(self.rows))
            yield Batch(first, *self.rows(slice(first, stop)))

    def take(self, numbers: np.ndarray) -> Tensor:
        return self.rows(np.asarray(numbers, np.int64))[0]

    def fingerprint(self) -> str:
        numbers = np.unique(np.linspace(0, len(self.rows) - 1, _SAMPLED).astype(np.int64))
        return _digest(len(self.rows), self.take(numbers))


class _Stream:
    """An iterable of batches that can be run through again, such as a DataLoader without shuffling."""

    def __init__(
        self, source: Iterable[Any], labels: Any, names: Sequence[str] | None, value_range: tuple[float, float]
    ) -> None:
        if not isinstance(source, Iterable):
            raise TypeError(
                f"anchors is a {type(source).__name__}; give a Tensor, an array, a dataset or an iterable of batches"
            )
        if isinstance(source, Iterator):
            raise TypeError("anchors is an iterator, which runs only once; give a DataLoader, a dataset or a list")
        if isinstance(getattr(source, "sampler", None), torch.utils.data.RandomSampler):
            raise ValueError("anchors is a DataLoader with shuffle=True; anchors are numbered, so give shuffle=False")
        self.source, self.value_range = source, value_range
        self.names = _names(names)
        self.count: int | None = None
        if isinstance(source, torch.utils.data.DataLoader) and not source.drop_last:
            data: Any = source.dataset
            self.count = len(data) if hasattr(data, "__len__") else None
        self.labels = None if labels is None else _labels(labels, self.count)

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        first = 0
        for item in self.source:
            images, *rest = item if isinstance(item, tuple | list) else (item,)
            whole = len(images)
            if first + whole > start:
                images = as_images(images, self.value_range)
                labels = rest[0] if rest and _is_label(rest[0], whole) else None
                for offset in range(max(0, start - first), whole, size):
                    at = slice(offset, min(offset + size, whole))
                    own = None if labels is None else np.asarray(labels[at], np.int64)
                    yield Batch(first + at.start, images[at], own)
            first += whole
        self.count = first

    def fingerprint(self) -> str:
        for item in self.source:
            images = item[0] if isinstance(item, tuple | list) else item
            return _digest(None, as_images(images, self.value_range)[:_SAMPLED])
        raise ValueError("anchors is empty; give at least one batch of images")


def read(anchors: Anchors, numbers: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The images of some anchors: (their numbers, images), `numbers` being ascending."""
    if isinstance(anchors, _Indexed):
        for first in range(0, len(numbers), size):
            chosen = numbers[first : first + size]
            yield chosen, anchors.take(chosen)
        return
    for batch in anchors.batches(size):
        low, high = np.searchsorted(numbers, [batch.first, batch.first + len(batch.images)])
        if high > low:
            chosen = numbers[low:high]
            yield chosen, batch.images[torch.from_numpy(chosen - batch.first)]
        if high == len(numbers):
            return


def warn_of_range(images: Tensor, value_range: tuple[float, float]) -> None:
    """Warns when floating point images leave their range, which pictures and SSIM rely on."""
    low, high = images.aminmax()
    slack = 1e-3 * (value_range[1] - value_range[0])
    if low < value_range[0] - slack or high > value_range[1] + slack:
        warnings.warn(
            f"anchors have values from {low:.4g} to {high:.4g}, outside value_range={value_range}; pictures will be "
            "clipped and 'ssim' is off. Give the range of the model's images as value_range",
            stacklevel=3,
        )


def _digest(count: int | None, images: Tensor) -> str:
    digest = hashlib.blake2b(repr((count, tuple(images.shape))).encode(), digest_size=16)
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _batched(anchors: Any) -> bool:
    """Whether it is a list of batches rather than of images."""
    item = anchors[0] if len(anchors) else None
    return getattr(item[0] if isinstance(item, tuple | list) else item, "ndim", 0) == 4


def _is_label(value: Any, count: int | None = None) -> bool:
    """Whether it is one integer, or `count` of them."""
    array = np.asarray(value)
    return array.dtype.kind in "iub" and (array.ndim == 0 if count is None else array.shape == (count,))


def _labels(labels: Any, count: int | None) -> np.ndarray | None:
    if labels is None:
        return None
    found = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim != 1 or (count is not None and len(found) != count):
        raise ValueError(f"labels has shape {found.shape}; give one label for each of the {count} anchors")
    return found


def _names(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [str(name) for name in names]
