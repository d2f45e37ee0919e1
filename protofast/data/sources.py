"""What a name or a path stands for, and where its files are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from . import idx
from .array import open_npy, open_safetensors
from .celeba import open_celeba
from .chexpert import open_chexpert
from .cifar import open_cifar10
from .dataset import DataError, Dataset
from .ffhq import open_ffhq
from .folder import open_folder

SPLITS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
"""Split to the parts that idx files are named after."""

DIGITS_TRAIN = 1437
"""scikit-learn's digits have no parts of their own; the first 80 % are "train", in the order given, so that the
writers of "test" are mostly others."""

WITH_VALID = ("celeba", "chexpert")
"""Sets that have a part "valid" too."""

PICTURES = {"celeba": open_celeba, "ffhq": open_ffhq, "chexpert": open_chexpert}

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IDX_NAMES = {"mnist": tuple("0123456789"), "fashion-mnist": CLOTHES}
TORCHVISION = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Of Debian's package dataset-fashion-mnist: the same contents, gzipped without a name, so with other hashes."""

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {  # of the .gz files, as the README of the data set states them; it states no SHA-256
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


def load(
    name_or_path: str | os.PathLike[str],
    *,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    labels: Sequence[int] | np.ndarray | str | os.PathLike[str] | None = None,
) -> Dataset:
    """Opens a set of images; reads no more of it than headers and labels.

    Parameters
    ----------
    name_or_path : str or path
        One of

        - ``"digits"``: scikit-learn's 1,797 digits of 8 × 8. The first 1,437 are "train".
        - ``"fashion-mnist"``: 60,000 + 10,000 of 28 × 28, from `root`, the folder ``PROTOFAST_DATA``, Debian's
          package dataset-fashion-mnist, or a download, whichever comes first.
        - ``"mnist"``: from `root` or ``PROTOFAST_DATA``; it is not downloaded.
        - ``"cifar10"``, ``"celeba"``, ``"ffhq"``, ``"chexpert"``: see below. From `root` or ``PROTOFAST_DATA``; none is
          downloaded, and the error of a missing one says where to get which files.
        - a folder with idx files (``train-images-idx3-ubyte``, plain or .gz, and so on).
        - a folder of pictures: one folder a class, or pictures alone, which gives no labels. Grey if all are, else RGB;
          an alpha channel is dropped. Orientation tags are not applied.
        - a ``.npy`` file (n, H, W) or (n, C, H, W): uint8, or floating point in [0, 1]; memory-mapped.
        - a ``.safetensors`` file with such an array as ``images`` (and ``labels``), or as its only key; read in slices.
    split : {"train", "valid", "test", "all"}, optional
        By default "train" of what comes in parts, and everything of what does not. Only CelebA and CheXpert have a
        "valid".
    root : path, optional
        Folder of a named set's files: itself, a folder in it of the set's name, or torchvision's layout.
    image_size : int or (H, W), optional
        Resizes the pictures of a folder: the centre of each, cut to the new aspect, Lanczos. Those of CelebA, FFHQ and
        CheXpert are squeezed to it instead, bicubic, as the paper of Patronus does.
    labels : sequence of int, or path of a .npy file, optional
        Labels of a ``.npy`` file of images.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        Naming what is missing and how to get it.
    DataError
        A ValueError: a file is corrupt, truncated, or not what it should be.
    ValueError
        For an argument that does not fit the source.
    ImportError
        When the extra ``protofast[data]`` is needed.

    Notes
    -----
    idx files and CIFAR-10's batches are unpacked once, into the user's cache folder (``pooch.os_cache("protofast")``).
    Pictures are decoded when they are read, on as many threads as torch uses (``torch.set_num_threads``).

    The sets of Patronus' paper (arXiv 2503.22782, sec. 4):

    - CIFAR-10: 50,000 + 10,000 of 3 × 32 × 32. ``cifar-10-batches-py``, ``cifar-10-batches-bin``, or the .tar.gz of
      either. Of a pickle nothing is run.
    - CelebA: 162,770 + 19,867 + 19,962 of 3 × 218 × 178, 40 attributes. ``img_align_celeba`` or its .zip,
      ``list_attr_celeba.txt``, ``list_eval_partition.txt`` (or both as Kaggle's .csv).
    - FFHQ: 70,000, of which the first 60,000 are "train" and the others "test", as its authors' training and
      validation. ``thumbnails128x128`` before larger ones, in folders of a thousand or flat. 13 attributes (male,
      glasses, dark glasses, ten groups of age) from ``ffhq_aging_labels.csv`` or a folder ``json`` of the FFHQ features
      dataset, None without; what these do not know is False.
    - CheXpert: the first frontal picture of each patient, grey, 224 × 224 if `image_size` is not given. 16 attributes
      from ``train.csv`` and ``valid.csv``: male, 60 years or more, and the 14 observations, True where they are 1 (not
      mentioned, absent and uncertain are False). "train" and "test" are the patients of ``train.csv``, 90 % and 10 %
      by a hash of the patient; "valid" is ``valid.csv``, and "all" everything. The paper has 28,878 of these patients,
      and 23 attributes, through a further file of demographics that is not read here, so its parts are others.

    Examples
    --------
    >>> import protofast as pf
    >>> digits = pf.data.load("digits", split="all")
    >>> digits
    Dataset(digits: 1797 images (1, 8, 8), 10 classes)
    >>> images, labels = next(digits.of_class(0).batches(32))
    >>> images.shape
    torch.Size([32, 1, 8, 8])
    """
    name = os.fspath(name_or_path)
    parts = (*SPLITS, "valid") if name in WITH_VALID else tuple(SPLITS)
    if split not in (None, *parts):
        raise ValueError(f"split is {split!r}; choose one of {', '.join(map(repr, parts))}")
    if name in IDX_NAMES:
        _only(name, image_size=image_size, labels=labels)
        return _idx(_find_idx(name, split or "train", root), split or "train", name, IDX_NAMES[name])
    if name == "cifar10":
        _only(name, image_size=image_size, labels=labels)
        return open_cifar10(root, split or "train")
    if name in PICTURES:
        _only(name, labels=labels)
        return PICTURES[name](root, split or "train", _size(image_size))
    if name == "digits":
        _only(name, root=root, image_size=image_size, labels=labels)
        return _digits(split or "train")
    path = Path(name)
    if not path.exists():
        known = ", ".join(map(repr, ("digits", *IDX_NAMES, "cifar10", *PICTURES)))
        raise FileNotFoundError(f"{name} does not exist; give the path of a folder or a file, or one of {known}")
    _only(name, root=root)
    if path.is_dir() and any(idx.find(path, f"{part}-images-idx3-ubyte") for part in SPLITS["all"]):
        _only(name, image_size=image_size, labels=labels)
        return _idx(_idx_files(path, split or "train"), split or "train", name, None)
    if split not in (None, "all"):
        raise ValueError(
            f"split is {split!r}, and {name} does not come in parts; leave split out, or give the part's path"
        )
    if path.is_dir():
        _only(name, labels=labels)
        images, folders, names = open_folder(path, _size(image_size))
        return Dataset(images, folders, names=names, source=name)
    _only(name, image_size=image_size)
    if path.suffix == ".npy":
        if isinstance(labels, (str, os.PathLike)):
            labels = open_npy(Path(labels))
        return Dataset(open_npy(path), labels, source=name)
    if path.suffix == ".safetensors":
        _only(name, labels=labels)
        rows, own = open_safetensors(path)
        return Dataset(rows, own, source=name)
    raise DataError(f"{name} is no .npy or .safetensors file; save the images as one, or give a folder of pictures")


def _only(name: str, **arguments: Any) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f"{argument} is {value!r}, which {name} does not take; leave it out")


def _size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size is {image_size}; give at least 1 pixel")
    return height, width


def _digits(split: str) -> Dataset:
    found = need("sklearn.datasets", "data").load_digits()
    rows = {"train": slice(DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None), "all": slice(None)}[split]
    images = (found.images[rows] / 16).astype(np.float32)
    return Dataset(images, found.target[rows], names=tuple("0123456789"), source="digits")


def _stems(split: str) -> list[str]:
    return [f"{part}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte") for part in SPLITS[split]]


def _idx_files(folder: Path, split: str) -> list[Path]:
    """Files of the images, then of the labels."""
    files = {stem: idx.find(folder, stem) for stem in _stems(split)}
    if missing := [stem for stem, path in files.items() if path is None]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} (plain or .gz); put them there, or choose another split"
        )
    return [path for path in files.values() if path is not None]


def _idx(files: list[Path], split: str, source: str, names: tuple[str, ...] | None) -> Dataset:
    parts = len(SPLITS[split])
    cache = Path(need("pooch", "data").os_cache("protofast"))
    return Dataset(idx.map_images(files[:parts], cache), idx.read_labels(files[parts:]), names=names, source=source)


def _find_idx(name: str, split: str, root: str | os.PathLike[str] | None) -> list[Path]:
    # A folder for several sets must say which one it holds: the files of all are named alike.
    shared = Path(root) if root is not None else Path(os.environ.get("PROTOFAST_DATA", ""))
    folders = [shared / name, shared / TORCHVISION[name]] if root is not None or "PROTOFAST_DATA" in os.environ else []
    if root is not None:
        folders.append(shared)
    elif name == "fashion-mnist":
        folders.append(DEBIAN)
    for folder in folders:
        if any(idx.find(folder, stem) for stem in _stems("all")):
            return _idx_files(folder, split)
    looked = ", ".join(map(str, folders)) or "no folder"
    if name == "fashion-mnist" and root is None:
        return [_download(stem) for stem in _stems(split)]
    raise FileNotFoundError(
        f"{name} was looked for in {looked}; put train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k "
        "(plain or .gz) into a folder and give it as root="
    )


def _download(stem: str) -> Path:
    pooch = need("pooch", "data")
    cure = (
        "install Debian's package dataset-fashion-mnist, or put the four files into a folder and give it as root= "
        f"(they are at {URL})"
    )
    try:
        # pooch writes under another name and renames what has the right hash.
        found = pooch.retrieve(
            f"{URL}{stem}.gz", f"md5:{MD5[stem]}", f"{stem}.gz", pooch.os_cache("protofast") / "fashion-mnist"
        )
    except ValueError as error:
        raise DataError(f"the download of {stem}.gz is not the file that it should be ({error}); {cure}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"fashion-mnist is not on this machine and cannot be downloaded ({error}); {cure}"
        ) from error
    return Path(found)
