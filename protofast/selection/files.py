"""Points from a file, and a selection to one."""

from __future__ import annotations

import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import replacing
from .._optional import need
from .result import Selection

FIELDS = ("indices", "radii", "labels", "distances", "objective", "bound")


def read(path: Path, key: str | None = None) -> np.ndarray:
    """Points (n, d) of a file; of an array with more dimensions each entry of the first is a point.

    Parameters
    ----------
    path : Path
        .npy (memory-mapped), .npz, .safetensors, .pt or .csv (numbers; a first line without any is one of names).
    key : str, optional
        Name of the array in a file of several; by default ``points``, or the only one.

    Raises
    ------
    FileNotFoundError, ValueError
        Naming the file and what would do.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a .npy, .npz, .safetensors, .pt or .csv file of points")
    if path.is_dir() or path.suffix not in _READERS:
        raise ValueError(f"{path} is no {', '.join(_READERS)} file; save the points as one, numpy.save(path, points)")
    try:
        found = _READERS[path.suffix](path, key)
    except (EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or no {path.suffix} file ({_first_line(error)}); save it again"
        ) from error
    if key is not None and path.suffix in (".npy", ".csv"):
        raise ValueError(f"--key is {key!r}, and {path} holds one array without a name; leave it out")
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {found.dtype}; give real numbers")
    if found.ndim > 2 and len(found):
        found = found.reshape(len(found), -1)
    return found


def write(path: Path, found: Selection, settings: dict[str, Any]) -> None:
    """Writes a selection as .npz or .json, whole or not at all.

    Both hold the fields of `Selection` by name, and the settings (in .npz as JSON text). JSON has no NaN or infinity:
    they become null and "inf".
    """
    arrays = {name: getattr(found, name).cpu().numpy() for name in FIELDS}
    with replacing(path) as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, **arrays, settings=np.array(json.dumps(settings)))
        else:
            plain = {name: _plain(array.tolist()) for name, array in arrays.items()}
            file.write((json.dumps({"settings": settings, **plain}, allow_nan=False) + "\n").encode())


def spare(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Refuses an output that is one of the inputs, by whatever name."""
    inputs = [path for path in inputs if path.exists()]
    for output in outputs:
        if output.exists() and any(output.samefile(path) for path in inputs):
            raise ValueError(f"{output} is read, and would be written over; give another path for the result")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def _npy(path: Path, key: str | None) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is no whole .npy file of numbers ({error}); save it again") from error


def _npz(path: Path, key: str | None) -> np.ndarray:
    with zipfile.ZipFile(path):  # refuses what is none, which numpy would take for a pickle
        pass
    with np.load(path, allow_pickle=False) as arrays:
        name = _named(path, list(arrays), key)
        try:
            return arrays[name]
        except ValueError as error:
            raise ValueError(f"{path}, {name}: {error}; give an array of numbers") from error


def _safetensors(path: Path, key: str | None) -> np.ndarray:
    safetensors = need("safetensors", "data")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _numpy(file.get_tensor(_named(path, list(file.keys()), key)))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error}); save it again") from error


def _pt(path: Path, key: str | None) -> np.ndarray:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no whole .pt file ({_first_line(error)}); save it again") from error
    if isinstance(found, dict):
        found = found[_named(path, [name for name, value in found.items() if isinstance(value, torch.Tensor)], key)]
    elif key is not None:
        raise ValueError(f"--key is {key!r}, and {path} holds one array without a name; leave it out")
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{path} holds a {type(found).__name__}; save a tensor, or a dictionary of tensors")
    return _numpy(found)


def _csv(path: Path, key: str | None) -> np.ndarray:
    try:
        first, words = next(_csv_lines(path), (1, []))
        names = bool(words) and not any(map(_is_number, words))
        with warnings.catch_warnings():  # of no data, which is said below
            warnings.simplefilter("ignore", UserWarning)
            found = np.loadtxt(path, delimiter=",", skiprows=first if names else 0, ndmin=2, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it so") from error
    except ValueError as error:
        raise ValueError(_csv_mistake(path, names) or f"{path}: {error}; give numbers, separated by commas") from error
    if not found.size:
        raise ValueError(f"{path} holds no line of numbers; give points, one a line, numbers separated by commas")
    if np.isnan(found).any() and (mistake := _csv_mistake(path, names)):
        raise ValueError(mistake)
    return found


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number, from 1, and words of each line that numpy.loadtxt reads: not of empty ones and of comments."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if text := line.partition("#")[0].strip():
                yield number, [word.strip() for word in text.split(",")]


def _csv_mistake(path: Path, names: bool) -> str | None:
    """What is wrong with the first line that is, if that can be said. Reads again, as only a damaged file needs it."""
    width = None
    for number, words in islice(_csv_lines(path), int(names), None):
        width = width or len(words)
        if len(words) != width:
            return (
                f"{path}, line {number}, holds {len(words)} fields, and those before hold {width}; give as many in each"
            )
        for word in words:
            if not _is_number(word) or math.isnan(float(word)):
                return f"{path}, line {number}, holds {word!r}; give numbers, separated by commas"
    return None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


_READERS = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _pt, ".csv": _csv}


def _named(path: Path, names: list[str], key: str | None) -> str:
    wanted = key or ("points" if "points" in names else names[0] if len(names) == 1 else None)
    if wanted in names:
        return wanted
    there = ", ".join(names) or "no array"
    raise ValueError(f"{path} holds {there}; " + (f"there is no {key!r}" if key else "say which by --key"))


def _numpy(found: torch.Tensor) -> np.ndarray:
    return (found.float() if found.dtype == torch.bfloat16 else found).detach().numpy()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
