"""FFHQ: faces in numbered PNGs, with attributes of FFHQ-Aging or of the FFHQ features dataset where they are there."""

from __future__ import annotations

import csv
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from .dataset import DataError, Dataset
from .folder import Files, ImageFiles
from .named import folders, missing, some

SPLITS = {"train": range(60_000), "test": range(60_000, 70_000), "all": range(70_000)}
"""The numbers of the pictures, as ffhq-dataset-v2.json splits them into training and validation."""

AGES = ("0-2", "3-6", "7-9", "10-14", "15-19", "20-29", "30-39", "40-49", "50-69", "70-120")
"""Groups of FFHQ-Aging."""

ATTRIBUTES = ("Male", "Glasses", "Dark glasses", *(f"Age {group}" for group in AGES))
GLASSES = {"NoGlasses": "None", "ReadingGlasses": "Normal", "SwimmingGoggles": "Normal", "Sunglasses": "Dark"}
"""Words of the features dataset to those of FFHQ-Aging."""

_FROM = [int(group.partition("-")[0]) for group in AGES]
_PICTURES = ("thumbnails128x128", "images256x256", "images1024x1024", "")
_FEATURES = ("json", "features", "ffhq-features-dataset/json", "ffhq-features-dataset")
CURE = (
    "get thumbnails128x128 (or the larger images) from https://github.com/NVlabs/ffhq-dataset (non-commercial), put "
    "that folder into another, and give the latter as root=. Beside it, for attributes: ffhq_aging_labels.csv from "
    "https://github.com/royorel/FFHQ-Aging-Dataset, or the folder json from https://github.com/DCGM/ffhq-features-dataset"
)


def open_ffhq(root: str | os.PathLike[str] | None, split: str, size: tuple[int, int] | None) -> Dataset:
    need("PIL.Image", "data")
    looked = folders("ffhq", root)
    for folder in looked:
        for inside in _PICTURES:
            if files := _numbered(folder / inside):
                return _open(folder, folder / inside, files, split, size)
    raise missing("ffhq", looked, CURE)


def _open(folder: Path, pictures: Path, files: dict[int, str], split: str, size: tuple[int, int] | None) -> Dataset:
    numbers = sorted(number for number in files if number in SPLITS[split])
    if not numbers:
        wanted = SPLITS[split]
        raise FileNotFoundError(
            f"{pictures} has none of the pictures {wanted[0]:05d} to {wanted[-1]:05d} of {split!r}; put them there, or "
            "choose another split"
        )
    images = ImageFiles(Files(pictures, [files[number] for number in numbers]), size, alike=True, squeeze=True)
    attributes = _attributes(folder, numbers)
    titles = None if attributes is None else ATTRIBUTES
    return Dataset(images, attributes=attributes, attribute_names=titles, source="ffhq")


def _numbered(folder: Path) -> dict[int, str]:
    """Number to file of the pictures, which lie in folders of a thousand or all together."""
    found: dict[int, str] = {}
    for name in _names(folder):
        inside = [f"{name}/{deeper}" for deeper in _names(folder / name)] if name.isdigit() else [name]
        for file in inside:
            stem, _, suffix = file.rpartition("/")[2].partition(".")
            if stem.isdigit() and suffix.lower() in ("png", "jpg", "jpeg", "webp"):
                if int(stem) in found:
                    raise DataError(f"{folder} has picture {stem} twice, {found[int(stem)]} and {file}; remove one")
                found[int(stem)] = file
    return found


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _attributes(folder: Path, numbers: list[int]) -> np.ndarray | None:
    table = folder / "ffhq_aging_labels.csv"
    features = next((folder / name for name in _FEATURES if (folder / name / f"{numbers[0]:05d}.json").is_file()), None)
    if table.is_file():
        rows, place = dict(_aging(table)), table
    elif features is not None:
        rows, place = dict(_detected(features, numbers)), features
    else:
        return None
    if absent := [f"{number:05d}" for number in numbers if number not in rows]:
        raise FileNotFoundError(f"{place} lacks {some(absent)}; get it again, or take it away to go without attributes")
    return np.array([rows[number] for number in numbers], np.bool_).reshape(len(numbers), len(ATTRIBUTES))


def _aging(path: Path) -> Iterator[tuple[int, Sequence[bool]]]:
    with open(path, newline="", errors="replace") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                age = AGES.index(row["age_group"]) if row["age_group"] else None
                yield int(row["image_number"]), _row(row["gender"], row["glasses"], age)
            except (KeyError, ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}, cannot be read ({error}); get the file again") from error


def _detected(folder: Path, numbers: list[int]) -> Iterator[tuple[int, Sequence[bool]]]:
    """Of each picture what was found of the first face; where no face was found, nothing is so."""
    for number in numbers:
        path = folder / f"{number:05d}.json"
        if not path.is_file():
            continue
        try:
            faces = json.loads(path.read_bytes())
            found = faces[0]["faceAttributes"] if faces else None
            yield number, _row(found["gender"], GLASSES[found["glasses"]], _group(found["age"])) if found else _row()
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"{path} cannot be read ({error!r}); get the file again") from error


def _group(age: Any) -> int:
    return bisect_right(_FROM, float(age)) - 1


def _row(gender: str = "", glasses: str = "", age: int | None = None) -> list[bool]:
    """Of what is not known, nothing is so."""
    if gender not in ("male", "female", "") or glasses not in ("None", "Normal", "Dark", ""):
        raise ValueError(f"gender is {gender!r}, glasses is {glasses!r}")
    return [gender == "male", glasses in ("Normal", "Dark"), glasses == "Dark", *(age == i for i in range(len(AGES)))]
