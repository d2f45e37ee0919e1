"""CIFAR-10 as it is published: batches in pickles or in plain bytes, in a folder or still in their .tar.gz."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._files import replacing
from .._optional import need
from .array import open_npy
from .dataset import DataError, Dataset, digest_of_files
from .named import folders, missing

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
_BYTES = 3 * 32 * 32
_TRAIN, _TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
SPLITS = {"train": _TRAIN, "test": _TEST, "all": _TRAIN + _TEST}
_FORMATS = (
    ("cifar-10-batches-py", "cifar-10-python.tar.gz", ""),
    ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin"),
)
CURE = (
    "get cifar-10-python.tar.gz or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, put it "
    "(as it is, or unpacked: cifar-10-batches-py or cifar-10-batches-bin) into a folder, and give that as root="
)


def open_cifar10(root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Memory-mapped from the user's cache folder, where the batches are unpacked to once."""
    looked = folders("cifar10", root)
    found = next((place for folder in looked for place in _places(folder)), None)
    if found is None:
        raise missing("cifar10", looked, CURE)
    place, ending = found
    wanted = [name + ending for name in SPLITS[split]]
    files = [place] if place.is_file() else [place / name for name in wanted]
    if absent := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{place} lacks {', '.join(absent)}; {CURE}")
    cache = Path(need("pooch", "data").os_cache("protofast"))
    key = digest_of_files(files, split)
    images, labels = (cache / f"cifar10-{split}-{kind}-{key}.npy" for kind in ("images", "labels"))
    if not (images.exists() and labels.exists()):
        contents = _members(place, wanted) if place.is_file() else ((path, path.read_bytes()) for path in files)
        parts = [(_pickled if not ending else _plain)(*content) for content in contents]
        for path, arrays in ((labels, [part[1] for part in parts]), (images, [part[0] for part in parts])):
            with replacing(path) as file:
                np.save(file, np.concatenate(arrays))
    return Dataset(open_npy(images), np.array(open_npy(labels)), names=NAMES, source="cifar10")


def _places(folder: Path) -> Iterator[tuple[Path, str]]:
    """What there is of the formats, and how the names of its batches end."""
    for name, _, ending in _FORMATS:
        for place in (folder / name, folder):
            if any((place / f"{batch}{ending}").is_file() for batch in SPLITS["all"]):
                yield place, ending
    for _, archive, ending in _FORMATS:
        if (folder / archive).is_file():
            yield folder / archive, ending


def _members(archive: Path, wanted: list[str]) -> list[tuple[str, bytes]]:
    """The wanted files of an archive, in the order wanted; nothing is written to disk."""
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in wanted and member.isfile():
                    found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
            while tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
                pass  # reaching the end is what makes gzip check its checksum
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{archive} is not a whole .tar.gz file ({error}); get it again") from error
    if absent := [name for name in wanted if name not in found]:
        raise DataError(f"{archive} lacks {', '.join(absent)}; get it again")
    return [(f"{archive}/{name}", found[name]) for name in wanted]


def _plain(path: Any, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (1 + _BYTES):
        raise DataError(
            f"{path} has {len(content)} bytes, no multiple of {1 + _BYTES} (a label and an image); get it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _BYTES)
    return rows[:, 1:].reshape(-1, *SHAPE), rows[:, 0]


def _pickled(path: Any, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"].array(), np.array(batch[b"labels"], np.int64)
        if pixels.shape != (len(labels), _BYTES) or labels.ndim != 1 or not labels.size:
            raise ValueError(f"data {pixels.shape}, labels {labels.shape}")
        if labels.min() < 0 or labels.max() >= len(NAMES):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except _Refused as error:
        raise DataError(
            f"{path} asks to run {error}, which no batch of CIFAR-10 does; nothing was run. Get it again"
        ) from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{path} is no whole batch of CIFAR-10 ({error}); get it again") from error
    return pixels.reshape(-1, *SHAPE), labels.astype(np.uint8)


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Runs nothing that a file names, not even NumPy: what the batches name stands for the two classes below."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent id {pid!r}")


class _Dtype:
    """What numpy.dtype is called with."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields, which bytes do not have


class _Array:
    """The state of a numpy.ndarray: (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, content = self.state
        if dtype.name not in (b"u1", "u1"):
            raise ValueError(f"data of {dtype.name!r}")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}
