"""CheXpert: frontal chest X-rays, one a patient, with sex, age and 14 observations."""

from __future__ import annotations

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

from .._optional import need
from .dataset import DataError, Dataset
from .folder import Files, ImageFiles
from .named import folders, missing, some

SPLITS = ("train", "valid", "test", "all")
OBSERVATIONS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
ATTRIBUTES = ("Male", "Age 60 or more", *OBSERVATIONS)
SIZE = (224, 224)
"""Of the paper's images; those of the set differ in size."""

CURE = (
    "get CheXpert-v1.0-small from https://stanfordmlgroup.github.io/competitions/chexpert/ (its research use agreement "
    "is to be accepted), and give the folder that holds it (or its train.csv, valid.csv, train and valid) as root="
)
_OWN = ("CheXpert-v1.0-small", "CheXpert-v1.0", "")


def open_chexpert(root: str | os.PathLike[str] | None, split: str, size: tuple[int, int] | None) -> Dataset:
    need("PIL.Image", "data")
    looked = folders("chexpert", root)
    places = [folder / name for folder in looked for name in _OWN]
    folder = next((place for place in places if any((place / f"{part}.csv").is_file() for part in SPLITS)), None)
    if folder is None:
        raise missing("chexpert", looked, CURE)
    names: list[str] = []
    rows: list[list[bool]] = []
    for table in {"valid": ["valid"], "all": ["train", "valid"]}.get(split, ["train"]):
        path = folder / f"{table}.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}; {CURE}")
        for patient, (name, row) in _patients(path).items():
            if split in ("valid", "all") or _held_out(patient) == (split == "test"):
                names.append(name)
                rows.append(row)
    if not names:
        raise DataError(f"{folder} has no frontal picture of {split!r}; get it again, or choose another split")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {some(absent)}; {CURE}")
    images = ImageFiles(Files(folder, names), size or SIZE, alike=True, squeeze=True)
    return Dataset(images, attributes=np.array(rows), attribute_names=ATTRIBUTES, source="chexpert")


def _held_out(patient: str) -> bool:
    """A tenth of the patients, the same ones whatever else is there."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") < 2**64 // 10


def _patients(path: Path) -> dict[str, tuple[str, list[bool]]]:
    """The first frontal picture of each patient, and its attributes."""
    found: dict[str, tuple[str, list[bool]]] = {}
    with open(path, newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = {"Path", "Sex", "Age", "Frontal/Lateral", *OBSERVATIONS}
        if absent := sorted(columns - set(reader.fieldnames or ())):
            raise DataError(f"{path} has no column {some(absent)}; get the file again")
        for number, row in enumerate(reader, 2):
            try:
                # "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
                name = "/".join(row["Path"].split("/")[-4:])
                patient = name.split("/")[-3]
                if row["Frontal/Lateral"] != "Frontal" or patient in found:
                    continue
                shown = [row["Sex"] == "Male", float(row["Age"]) >= 60]
                # Empty is not mentioned, 0 absent, −1 uncertain.
                found[patient] = name, shown + [row[title] != "" and float(row[title]) == 1 for title in OBSERVATIONS]
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number}, cannot be read ({error}); get the file again") from error
    return found
