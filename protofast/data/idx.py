"""MNIST's idx files, plain or gzipped: unpacked once into a cached .npy, and memory-mapped from there."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .._files import replacing
from .array import open_npy
from .dataset import DataError

_CHUNK = 1 << 20


def find(folder: Path, name: str) -> Path | None:
    """The idx file `name` in `folder`, plain or with .gz."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_labels(paths: Sequence[Path]) -> np.ndarray:
    """Labels of all the files, one after another, uint8 (n,)."""
    out = io.BytesIO()
    for path in paths:
        with _payload(path, 1) as (shape, stream):
            _copy(path, stream, out, math.prod(shape))
    return np.frombuffer(out.getvalue(), np.uint8)


def map_images(paths: Sequence[Path], cache: Path) -> np.ndarray:
    """Images of all the files, one after another: a memory-mapped uint8 (n, H, W)."""
    target = cache / f"{paths[0].name.removesuffix('.gz')}-{_key(paths)}.npy"
    if not target.exists():
        _unpack(paths, target)
    return open_npy(target)


def _key(paths: Sequence[Path]) -> str:
    """Changes when a file does."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _unpack(paths: Sequence[Path], target: Path) -> None:
    with ExitStack() as stack:
        opened = [(path, *stack.enter_context(_payload(path, 3))) for path in paths]
        sizes = {shape[1:] for _, shape, _ in opened}
        if len(sizes) > 1:
            raise DataError(f"{', '.join(str(path) for path in paths)} hold images of different sizes, {sorted(sizes)}")
        count = sum(shape[0] for _, shape, _ in opened)
        with replacing(target) as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *sizes.pop())}
            np.lib.format.write_array_header_1_0(out, header)
            for path, shape, stream in opened:
                _copy(path, stream, out, math.prod(shape))


@contextmanager
def _payload(path: Path, ndim: int) -> Iterator[tuple[tuple[int, ...], BinaryIO]]:
    """The shape that the header of an idx file states, and the stream behind it."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
        try:
            header = stream.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes([0, 0, 8, ndim]):
                raise DataError(
                    f"{path} begins with {header[:4].hex(' ') or 'nothing'}; an idx file of {ndim}-dimensional bytes "
                    f"begins with 00 00 08 {ndim:02x} and {ndim} sizes. Get the file again"
                )
            yield tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)), stream  # type: ignore[misc]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is not a whole gzip file ({error}); get the file again") from error


def _copy(path: Path, stream: BinaryIO, out: BinaryIO, size: int) -> None:
    left = size
    while left:
        chunk = stream.read(min(left, _CHUNK))
        if not chunk:
            raise DataError(
                f"{path} is truncated: its header states {size} bytes, {left} are missing. Get the file again"
            )
        out.write(chunk)
        left -= len(chunk)
    if stream.read(1):  # and reaching the end is what makes gzip check its checksum
        raise DataError(f"{path} is longer than the {size} bytes that its header states; get the file again")
