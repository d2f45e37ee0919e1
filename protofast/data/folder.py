"""Folders and archives of pictures: decoded when they are asked for."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._optional import need
from .dataset import DataError, digest_of_files

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_A_THREAD = 4  # pictures at least, for one more to pay
_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class Files(Sequence[Path]):
    """Pictures by their names in a folder: of hundreds of thousands, less to hold than their paths."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        return self.folder / self.names[i]


class Member:
    """A picture in a zip archive."""

    def __init__(self, members: Members, name: str) -> None:
        self.members, self.name = members, name

    def __str__(self) -> str:
        return f"{self.members.path}/{self.name}"

    def read_bytes(self) -> bytes:
        try:
            return self.members.archive.read(self.name)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise OSError(str(error)) from error


class Members(Sequence[Member]):
    """Pictures by their names in a zip archive, which each process opens for itself."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        return Member(self, self.names[i])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():  # a fork shares the place in the file
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise DataError(f"{self.path} is not a whole zip archive ({error}); get it again") from error
        return self._opened[1]


class ImageFiles:
    """Pictures that look like a uint8 array (n, H, W), or (n, 3, H, W) when any of them is in colour.

    The headers of all files are read at once, so that a picture of another size is named before any work is done. With
    `alike` the first stands for all, and one that differs is named as it is read. Other sizes than `size` are cut at
    the centre and resized (Lanczos), or with `squeeze` resized alone, whatever their aspect (bicubic).
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, paths: Sequence[Any], size: tuple[int, int] | None, *, alike: bool = False, squeeze: bool = False
    ) -> None:
        self.paths = paths
        first, colour = None, False
        for path in [paths[0]] if alike else paths:
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
        self.size, self.squeeze = size, squeeze
        frame = size or first or (0, 0)
        self.shape = (len(self.paths), 3, *frame) if colour else (len(self.paths), *frame)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.arange(len(self))[key]
        out = np.empty((rows.size, *self.shape[1:]), np.uint8)

        def read(part: slice) -> None:
            for i, row in zip(range(rows.size)[part], rows.flat[part], strict=True):
                out[i] = self._decode(self.paths[row])

        # As many threads as torch was given: one in a worker of a DataLoader. Pillow decodes outside Python's lock.
        threads = min(torch.get_num_threads(), rows.size // _A_THREAD)
        if threads < 2:
            read(slice(None))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, [slice(first, None, threads) for first in range(threads)]))
        return out.reshape(*rows.shape, *self.shape[1:])

    def digest(self) -> str:
        files = [self.paths.path] if isinstance(self.paths, Members) else self.paths
        names = self.paths.names if isinstance(self.paths, Members) else None
        return digest_of_files(files, names, self.size, self.squeeze, self.mode)

    def _decode(self, path: Any) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with _open(path) as image:
                picture = image.convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be decoded ({error}); get the file again, or take it out") from error
        if self.size is not None and picture.size != self.size[::-1]:
            if self.squeeze:
                picture = picture.resize(self.size[::-1], Image.Resampling.BICUBIC)
            else:
                picture = ImageOps.fit(picture, self.size[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        if (pixels.shape[0], pixels.shape[1]) != self.shape[-2:]:
            raise DataError(
                f"{path} is {pixels.shape[0]} × {pixels.shape[1]} pixels, not {self.shape[-2]} × {self.shape[-1]}: it "
                "is unlike the first one, or has changed since it was listed; give image_size= to resize them all"
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


def _open(path: Any) -> Any:
    from PIL import Image

    return Image.open(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))


def _header(path: Any) -> tuple[int, int, str]:
    from PIL import Image

    try:
        with _open(path) as image:
            return image.height, image.width, image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is no picture that can be read ({error}); get the file again, or take it out"
        ) from error
