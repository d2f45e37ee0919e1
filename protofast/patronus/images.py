"""Images of a data set as a model takes them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._files import replacing
from .._optional import need
from .._progress import bars
from ..data import DataError, Dataset
from ..data.array import open_npy
from ..data.dataset import Rows
from .config import PatronusConfig

_PIXELS = 1 << 24
"""Pixels that are resized at a time, 64 MB of them, before or after."""


class Images:
    """The images of a data set as a model takes them, read when they are asked for.

    Bicubic with antialiasing, as the paper; an image is squeezed where its aspect differs. Grey images become colour
    ones by repetition, never the reverse.

    Parameters
    ----------
    config : PatronusConfig
        Of the model.
    data : Dataset
    cache : bool or path, default False
        A folder for one file of the resized images, 8 bits a value, which is made here if it is not there yet and is
        mapped into memory, so that neither decoding nor memory limits training on a large set. True is the user's cache
        folder. The file is written whole or not at all, and another is made when a picture, the order, or the size
        changes. Images that are 8-bit arrays of the model's size already are read from where they are.
        Where several processes train, let the first one make the file before the others come to it.
    progress : bool, default False
        A bar while the file is made.

    Attributes
    ----------
    shape : (n, C, H, W)
    path : Path or None
        The file, if there is one.

    Raises
    ------
    ValueError
        When the model takes grey images and these have colours.
    DataError
        When a picture cannot be read.

    Notes
    -----
    The file rounds to 8 bits, so what is taken from it differs by up to 1/255 from what `images_of` gives; the paper's
    resizing with Pillow rounds alike.

    Examples
    --------
    >>> import tempfile
    >>> import protofast as pf
    >>> from protofast.patronus import Images, PRESETS
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     images = Images(PRESETS["fashion-mnist"], pf.data.load("digits"), cache=folder)
    ...     images.shape, images.take([5, 3]).shape
    ((1437, 1, 32, 32), torch.Size([2, 1, 32, 32]))
    """

    def __init__(
        self,
        config: PatronusConfig,
        data: Dataset,
        *,
        cache: bool | str | os.PathLike[str] = False,
        progress: bool = False,
    ) -> None:
        channels, *size = config.image_shape
        found = data.image_shape[0]
        if found not in (1, channels):
            raise ValueError(f"{data.source} has images of {found} channels; the model takes {channels}")
        self.shape = (len(data), *config.image_shape)
        self.path: Path | None = None
        if cache is not False and not _ready(data, size):
            own = Path(need("pooch", "data").os_cache("protofast")) / "images" if cache is True else Path(cache)
            name = re.sub(r"\W+", "-", Path(data.source).name)
            self.path = own / f"{name}-{found}x{size[0]}x{size[1]}-{data.digest()}.npy"
            if not self.path.exists():
                _write(self.path, data, size, progress)
            try:
                data = Dataset(open_npy(self.path), source=str(self.path))
            except DataError as error:
                raise DataError(f"{self.path} is damaged; delete it, and it is made again") from error
        self._data = data

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, indices: Any) -> Tensor:
        """The images at `indices` (a slice, integers, or a mask of shape (n,)): float32 (k, C, H, W) in [−1, 1]."""
        part = _resized(self._data.take(indices), self.shape[2:]).mul_(2).sub_(1)
        return part.expand(-1, self.shape[1], -1, -1).contiguous()


def images_of(config: PatronusConfig, data: Dataset) -> Tensor:
    """All of `Images` at once, float32 (n, C, H, W) in [−1, 1]: for sets that fit into memory.

    Raises
    ------
    ValueError
        When the model takes grey images and these have colours.

    Examples
    --------
    >>> import protofast as pf
    >>> config = pf.patronus.PRESETS["fashion-mnist"]
    >>> pf.patronus.images_of(config, pf.data.load("digits").subset([0, 1])).shape
    torch.Size([2, 1, 32, 32])
    """
    images = Images(config, data)
    out = torch.empty(images.shape)
    for part in _parts(data, images.shape[2:]):
        out[part] = images.take(part)
    return out


def _ready(data: Dataset, size: Sequence[int]) -> bool:
    """Whether nothing is to be decoded, and nothing resized."""
    stored = data.images.base if isinstance(data.images, Rows) else data.images
    return isinstance(stored, np.ndarray) and stored.dtype == np.uint8 and list(stored.shape[-2:]) == size


def _write(path: Path, data: Dataset, size: Sequence[int], progress: bool) -> None:
    with replacing(path) as file, bars(progress) as bar:
        advance = bar(f"Images of {Path(data.source).name}", len(data), 0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(data), data.image_shape[0], *size)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in _parts(data, size):
            part = _resized(data.take(rows), size).mul_(255).round_().to(torch.uint8)
            file.write(part.numpy().data)
            advance(len(part))


def _parts(data: Dataset, size: Sequence[int]) -> list[slice]:
    channels, height, width = data.image_shape
    step = max(1, _PIXELS // (channels * max(height * width, size[0] * size[1])))
    return [slice(first, min(first + step, len(data))) for first in range(0, len(data), step)]


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    if images.shape[2:] == tuple(size):
        return images
    return interpolate(images, size=list(size), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
