"""CelebA: aligned faces of 218 × 178 in a folder or in their zip archive, with 40 attributes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from .dataset import DataError, Dataset
from .folder import Files, ImageFiles, Members
from .named import folders, missing, some

SPLITS = {"train": "0", "valid": "1", "test": "2", "all": "012"}
"""Split to the numbers in list_eval_partition."""

CURE = (
    "get img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (for non-commercial research), put them into one folder, the "
    "zip as it is or unpacked to img_align_celeba, and give that folder as root="
)
_TRUE = {"1": 1, "-1": 0}


def open_celeba(root: str | os.PathLike[str] | None, split: str, size: tuple[int, int] | None) -> Dataset:
    need("PIL.Image", "data")
    looked = folders("celeba", root)
    table = next(filter(None, (_table(folder, "list_attr_celeba") for folder in looked)), None)
    if table is None:
        raise missing("celeba", looked, CURE)
    folder = table.parent
    partition = _table(folder, "list_eval_partition")
    pictures = next((path for path in _pictures(folder) if path.exists()), None)
    if partition is None or pictures is None:
        absent = "list_eval_partition.txt" if partition is None else "img_align_celeba"
        raise FileNotFoundError(f"{folder} lacks {absent}; {CURE}")
    names, attributes, titles = _attributes(table)
    part = _parts(partition)
    if odd := sorted(part.keys() ^ set(names)):
        raise DataError(f"{some(odd)} is in only one of {table} and {partition}; get both again")
    chosen = np.array([part[name] in SPLITS[split] for name in names])
    if not chosen.any():
        raise DataError(f"{partition} has no picture of {split!r}; get it again, or choose another split")
    names = [name for name, wanted in zip(names, chosen, strict=True) if wanted]
    images = ImageFiles(_files(pictures, names), size, alike=True, squeeze=True)
    return Dataset(images, attributes=attributes[chosen], attribute_names=titles, source="celeba")


def _table(folder: Path, name: str) -> Path | None:
    """As published, or Kaggle's .csv of the same."""
    return next((path for path in (folder / f"{name}.txt", folder / f"{name}.csv") if path.is_file()), None)


def _pictures(folder: Path) -> list[Path]:
    inside = folder / "img_align_celeba"
    return [inside / "img_align_celeba", inside, folder / "img_align_celeba.zip"]


def _files(place: Path, names: list[str]) -> Sequence[Any]:
    if place.is_dir():
        inside = {name: name for name in os.listdir(place)}
        files: Any = Files(place, [])
    else:
        files = Members(place, [])
        inside = {name.rpartition("/")[2]: name for name in files.archive.namelist()}
    if absent := [name for name in names if name not in inside]:
        raise FileNotFoundError(f"{place} lacks {some(absent)}; get it again")
    files.names = [inside[name] for name in names]
    return files


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line."""
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, 1):
            if words := line.strip().split("," if path.suffix == ".csv" else None):
                yield number, words


def _attributes(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Names of the pictures, attributes (n, K), names of these."""
    rows = _rows(path)
    comma = path.suffix == ".csv"
    _, count = (0, []) if comma else next(rows, (0, []))  # the text begins with the number of pictures
    titles = next(rows, (0, []))[1][comma:]
    names, flags = [], bytearray()
    for number, (name, *values) in rows:
        try:
            flags += bytes(map(_TRUE.__getitem__, values))
        except KeyError as error:
            raise DataError(f"{path}, line {number}: {error} is neither 1 nor -1; get the file again") from error
        if len(values) != len(titles):
            raise DataError(
                f"{path}, line {number}, has {len(values)} values for {len(titles)} attributes; get the file again"
            )
        names.append(name)
    if not names or not titles or not (comma or count == [str(len(names))]):
        stated = " ".join(count) or "some"
        raise DataError(f"{path} is not whole: it has {len(names)} pictures of {stated}; get it again")
    return names, np.frombuffer(bytes(flags), np.bool_).reshape(len(names), -1), titles


def _parts(path: Path) -> dict[str, str]:
    """Number of the part of each picture."""
    found = {}
    for number, row in _rows(path):
        if number == 1 and path.suffix == ".csv":
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise DataError(f"{path}, line {number}, is {' '.join(row)!r}; it should be a picture and 0, 1 or 2")
        found[row[0]] = row[1]
    return found
