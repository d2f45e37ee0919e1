"""Arrays in a file: .npy memory-mapped, .safetensors sliced lazily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from .dataset import DataError, array_digest, digest_of_files

_SAFETENSORS = {"U8": "u1", "BOOL": "?", "F16": "f2", "BF16": "f4", "F32": "f4", "F64": "f8"}
"""Their dtype names; NumPy has no bfloat16, so that is read as float32."""


class _Mapped(np.memmap):
    """Goes to another process (a worker of a DataLoader) as the path of its file, not as all its contents."""

    path: Path | None = None  # of the whole map alone; views of it do not inherit it

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.path is None else (open_npy, (self.path,))

    def digest(self) -> str:
        return array_digest(self) if self.path is None else digest_of_files([self.path])


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped for reading."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r").view(_Mapped)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole .npy file of numbers ({error}); write it again with numpy.save"
        ) from error
    mapped.path = path
    return mapped


class SafetensorsRows:
    """One tensor of a .safetensors file, read a slice at a time."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        with _open(path) as file:
            view = file.get_slice(key)
            self.shape = tuple(view.get_shape())
            kind = view.get_dtype()
        if kind not in _SAFETENSORS:
            raise DataError(f"{key!r} of {path} holds {kind}; give one of {', '.join(_SAFETENSORS)}")
        self.dtype = np.dtype(_SAFETENSORS[kind])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            with _open(self.path) as file:
                return self._numpy(file.get_slice(self.key)[start : max(start, stop)])
        rows = np.arange(len(self))[key]
        out = np.empty((rows.size, *self.shape[1:]), self.dtype)
        with _open(self.path) as file:
            view = file.get_slice(self.key)
            for i, row in enumerate(rows.flat):
                out[i] = self._numpy(view[int(row) : int(row) + 1])[0]
        return out.reshape(*rows.shape, *self.shape[1:])

    def digest(self) -> str:
        return digest_of_files([self.path], self.key)

    def _numpy(self, tensor: Any) -> np.ndarray:
        return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def open_safetensors(path: Path) -> tuple[SafetensorsRows, np.ndarray | None]:
    """Images and labels of a file with the keys images and labels, or with a single key, the images."""
    with _open(path) as file:
        keys = list(file.keys())
        name = "images" if "images" in keys else keys[0] if len(keys) == 1 else None
        if name is None:
            raise DataError(f"{path} has the keys {keys}; name the images 'images' (and the labels 'labels')")
        labels = file.get_tensor("labels").numpy() if "labels" in keys and name != "labels" else None
    return SafetensorsRows(path, name), labels


def _open(path: Path) -> Any:
    safetensors = need("safetensors", "data")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{path} is not a whole .safetensors file ({error}); write it again with safetensors"
        ) from error
