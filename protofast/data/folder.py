"""Folders of pictures: decoded one at a time, when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from .dataset import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class ImageFiles:
    """Pictures that look like a uint8 array (n, H, W), or (n, 3, H, W) when any of them is in colour.

    The headers of all files are read at once, so that a picture of another size is named before any work is done.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None) -> None:
        self.paths = list(paths)
        first, colour = None, False
        for path in self.paths:
            height, width, mode = _header(path)
            first = first or (height, width)
            if size is None and (height, width) != first:
                raise DataError(
                    f"{path} is {height} × {width} pixels, {self.paths[0]} is {first[0]} × {first[1]}; "
                    "give image_size= to resize them all"
                )
            if mode not in _GREY | _COLOUR:
                raise DataError(f"{path} has pixels of mode {mode}; convert it to 8 bits a channel, grey or RGB")
            colour = colour or mode in _COLOUR
        self.mode = "RGB" if colour else "L"
        self.size = size
        frame = size or first or (0, 0)
        self.shape = (len(self.paths), 3, *frame) if colour else (len(self.paths), *frame)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.arange(len(self))[key]
        out = np.empty((rows.size, *self.shape[1:]), np.uint8)
        for i, row in enumerate(rows.flat):
            out[i] = self._decode(self.paths[row])
        return out.reshape(*rows.shape, *self.shape[1:])

    def _decode(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                picture = image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be decoded ({error}); get the file again, or take it out") from error
        if self.size is not None and picture.size != self.size[::-1]:
            picture = ImageOps.fit(picture, self.size[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        if (pixels.shape[0], pixels.shape[1]) != self.shape[-2:]:
            raise DataError(
                f"{path} has changed since it was listed: it is {pixels.shape[0]} × {pixels.shape[1]} pixels now"
            )
        return pixels.transpose(2, 0, 1) if self.mode == "RGB" else pixels


def open_folder(folder: Path, size: tuple[int, int] | None) -> tuple[ImageFiles, list[int] | None, list[str] | None]:
    """Pictures, labels and class names: one class a folder inside `folder`, or pictures alone and no labels."""
    need("PIL.Image", "data")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    flat = [path for path in inside if _is_picture(path)]
    classes = {path.name: _pictures(path) for path in inside if path.is_dir()}
    if not flat and not any(classes.values()):
        raise DataError(
            f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), neither itself nor in its folders"
        )
    if not classes or not any(classes.values()):
        return ImageFiles(flat, size), None, None
    if flat:
        raise DataError(
            f"{folder} holds both pictures ({flat[0].name}, …) and folders of pictures; "
            "keep one class a folder, or one flat folder"
        )
    if empty := [name for name, paths in classes.items() if not paths]:
        raise DataError(f"{folder / empty[0]} is a class without a picture; fill it or take it out")
    paths = [path for found in classes.values() for path in found]
    labels = [label for label, found in enumerate(classes.values()) for _ in found]
    return ImageFiles(paths, size), labels, list(classes)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_picture(path))


def _header(path: Path) -> tuple[int, int, str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width, image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is no picture that can be read ({error}); get the file again, or take it out"
        ) from error
