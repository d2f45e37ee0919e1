"""Pictures of prototypes: heat maps, boxes, and sheets of their nearest patches."""

from __future__ import annotations

import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import replacing
from .._optional import need
from ..prototype import integer, prototype_map
from .layer import PrototypeLayer
from .project import Projection
from .receptive_field import ReceptiveField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOX = (255, 196, 0)
"""Colour of boxes: amber, which stands out on grey and on most photographs."""

_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "tiff": "TIFF", "webp": "WEBP", "pdf": "PDF"}
"""Suffix to Pillow's name, of what both Pillow and matplotlib write."""


@torch.no_grad()
def heat_map(
    image: Tensor | np.ndarray,
    layer: PrototypeLayer,
    features: Tensor,
    prototype: int,
    *,
    limits: tuple[float, float] | None = None,
    strength: float = 0.5,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """The image under the activation map of a prototype, which is upsampled bicubically over it.

    The map of Chen et al. 2019, fig. 3. It says where on the grid the prototype is active; what a patch can see is its
    box from `receptive_field`, which is larger.

    Parameters
    ----------
    image : Tensor or array of shape (C, H, W) or (H, W)
        In [0, 1], or uint8. What is outside is clipped, with a warning.
    layer : PrototypeLayer
    features : Tensor of shape (D, h, w) or (1, D, h, w)
        The encoder's, of this image.
    prototype : int
    limits : (float, float), optional
        Activations at the two ends of the colours; by default those of this map, so that colours of two pictures
        compare only when limits are given.
    strength : float, default 0.5
        Weight of the colours over the image, 0 to 1.
    path : path, optional
        Also written there, whole or not at all, in the format of its suffix: png (or none), jpg, tif, webp or pdf.

    Returns
    -------
    uint8 array of shape (H, W, 3)

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument that does not fit.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> layer = pf.nn.PrototypeLayer(4, 8)
    >>> pf.nn.heat_map(torch.rand(1, 28, 28), layer, torch.rand(8, 7, 7), 2).shape
    (28, 28, 3)
    """
    _format(path)
    picture, outside = _rgb("image", image)
    if not isinstance(layer, PrototypeLayer):
        raise TypeError(f"layer is a {type(layer).__name__}; give a pf.nn.PrototypeLayer")
    if not isinstance(features, Tensor):
        raise TypeError(f"features is a {type(features).__name__}; give a torch tensor")
    features = features[None] if features.ndim == 3 else features
    if features.ndim != 4 or len(features) != 1:
        raise ValueError(f"features has shape {tuple(features.shape)}; give (D, h, w) of the one image")
    prototype = integer("prototype", prototype)
    if not 0 <= prototype < layer.num_prototypes:
        raise IndexError(f"prototype is {prototype}; the layer has 0 to {layer.num_prototypes - 1}")
    if not isinstance(strength, numbers.Real):
        raise TypeError(f"strength is {strength!r}; give a number from 0 to 1")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; give 0 to 1")
    if limits is not None:
        limits = _limits(limits)
    if outside:
        warnings.warn(outside, stacklevel=3)  # past no_grad
    vectors = layer._prototypes()[prototype : prototype + 1]  # the others' maps are not made
    found = prototype_map(features, vectors, metric=layer.metric, activation=layer.activation, eps=layer.eps).float()
    large = F.interpolate(found, picture.shape[:2], mode="bicubic", align_corners=False)[0, 0].cpu().numpy()
    low, high = (float(found.min()), float(found.max())) if limits is None else limits
    scaled = np.clip((large - low) / (high - low), 0, 1) if high > low else np.zeros_like(large)
    colours = need("matplotlib", "pxgen").colormaps["inferno"](np.nan_to_num(scaled))[..., :3]
    mixed = (1 - strength) * picture / 255 + strength * colours
    return _written((mixed * 255).round().astype(np.uint8), path)


def draw_boxes(
    image: Tensor | np.ndarray,
    boxes: Tensor | Sequence[Sequence[int]],
    *,
    colour: tuple[int, int, int] = BOX,
    width: int = 1,
    path: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """The image with frames drawn on the outermost pixels of boxes.

    Parameters
    ----------
    image : Tensor or array of shape (C, H, W) or (H, W)
        In [0, 1], or uint8. What is outside is clipped, with a warning.
    boxes : integer Tensor or sequence of shape (n, 4), or (4,)
        (top, left, bottom, right), half-open, as `receptive_field` gives them. Clipped to the image; an empty box is
        not drawn, one wholly outside is refused.
    colour : three ints, 0 to 255
    width : int, default 1
        Of a frame, in pixels, inwards.
    path : path, optional
        Also written there, whole or not at all, in the format of its suffix: png (or none), jpg, tif, webp or pdf.

    Returns
    -------
    uint8 array of shape (H, W, 3)

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> pf.nn.draw_boxes(torch.zeros(1, 5, 5), [(1, 1, 4, 4)])[:, :, 0]
    array([[  0,   0,   0,   0,   0],
           [  0, 255, 255, 255,   0],
           [  0, 255,   0, 255,   0],
           [  0, 255, 255, 255,   0],
           [  0,   0,   0,   0,   0]], dtype=uint8)
    """
    _format(path)
    picture, outside = _rgb("image", image)
    rows = _boxes(boxes)
    width = integer("width", width)
    if width < 1:
        raise ValueError(f"width is {width}; give 1 or more")
    _check_colour(colour)
    height, across = picture.shape[:2]
    drawn = []
    for box in rows:
        top, left, bottom, right = box
        if bottom < top or right < left:
            raise ValueError(f"boxes has {box}, which ends before it begins; give (top, left, bottom, right)")
        if bottom == top or right == left:
            continue
        top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, height), min(right, across)
        if bottom <= top or right <= left:
            raise ValueError(
                f"boxes has {box}, outside the image of {height} by {across} pixels; give boxes of this image"
            )
        drawn.append((top, left, bottom, right))
    if outside:
        warnings.warn(outside, stacklevel=2)
    for top, left, bottom, right in drawn:
        frame = np.ones((bottom - top, right - left), bool)
        frame[width:-width, width:-width] = False
        picture[top:bottom, left:right][frame] = colour
    return _written(picture, path)


def prototype_sheet(
    projection: Projection,
    images: Any,
    *,
    field: ReceptiveField | None = None,
    prototypes: int | Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """A row for each prototype with the images of its best patches, nearest first, each with its box.

    Over each stand the number of the image and the distance.

    Parameters
    ----------
    projection : Projection
    images : sequence, data set or function
        ``images[i]`` or ``images(i)`` is the image with number (or id) i, (C, H, W) in [0, 1] or uint8; of an item
        (image, label) the first.
    field : ReceptiveField, optional
        From `receptive_field` with the layer's ``kernel_size``; without, no boxes are drawn.
    prototypes : int or sequence of int, optional
        Which to show, by default all.
    path : path, optional
        Also written there, whole or not at all, in the format of its suffix: png (or none), jpg, tif, webp, pdf or svg.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument that does not fit.
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> layer, encoder = pf.nn.PrototypeLayer(4, 8), torch.nn.Conv2d(1, 8, 3)
    >>> images = torch.rand(20, 1, 10, 10)
    >>> found = pf.nn.project(layer, encoder, images.split(5), best=3, progress=False)
    >>> field = pf.nn.receptive_field(encoder, 10)
    >>> figure = pf.nn.prototype_sheet(found, images, field=field, path="prototypes.png")
    """
    kind = _format(path, "svg")
    if not isinstance(projection, Projection):
        raise TypeError(f"projection is a {type(projection).__name__}; give what pf.nn.project returned")
    if not callable(images) and not hasattr(images, "__getitem__"):
        raise TypeError(
            f"images is a {type(images).__name__}; give a sequence, a data set (a loader's dataset) or a function, "
            "from which image i can be had"
        )
    shown = _shown(prototypes, projection.image.shape[0])
    if field is not None:
        _check_field(field, projection)
    need("matplotlib", "pxgen")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = projection.image.shape[1]
    inch, name = 1.3, 0.5
    size = (inch * best + name, (inch + 0.22) * len(shown) + 0.3)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    figure.suptitle("image · distance", fontsize=7, color="#444444", y=1 - 0.05 / size[1], va="top")
    grid = figure.add_gridspec(
        len(shown),
        best,
        left=name / size[0],
        right=1 - 0.05 / size[0],
        bottom=0.05 / size[1],
        top=1 - 0.45 / size[1],
        wspace=0.06,
        hspace=0.22,
    )
    get = images if callable(images) else images.__getitem__
    outside = ""
    for row, prototype in enumerate(shown):
        for column in range(best):
            axes = figure.add_subplot(grid[row, column])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(str(prototype), rotation=0, ha="right", va="center", fontsize=9)
            number = int(projection.image[prototype, column])
            if number < 0:
                continue
            picture, found = _rgb(f"images[{number}]", _item(get, number))
            outside = outside or found
            if field is not None and picture.shape[:2] != field.input_size:
                raise ValueError(
                    f"field is of images of size {field.input_size}; images[{number}] has {picture.shape[:2]}: "
                    "give receptive_field(encoder, size of these images)"
                )
            axes.imshow(picture, interpolation="nearest")
            if field is not None:
                top, left, bottom, right = field.box(projection.position[prototype, column].tolist())
                # lines on the edges of pixels, whose centres are at whole numbers
                frame = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]) - 0.5
                axes.plot(*frame.T, color=np.array(BOX) / 255, linewidth=1.4, clip_on=False)
            axes.set_title(
                f"{number} · {float(projection.distance[prototype, column]):.3g}", fontsize=7, pad=2, color="#444444"
            )
    if outside:
        warnings.warn(outside, stacklevel=2)
    if path is not None:
        with replacing(path) as file:
            figure.savefig(file, format=kind, dpi=150, facecolor="white")
    return figure


def _format(path: Any, *more: str) -> str:
    """The suffix of `path`, in lower case."""
    if path is None:
        return "png"
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; give the name of a file")
    suffix = Path(path).suffix[1:].lower() or "png"
    known = (*_FORMATS, *more)
    if suffix not in known:
        raise ValueError(f"path is {os.fspath(path)!r}; a picture can be written as {', '.join(known)}")
    return suffix


def _limits(limits: Any) -> tuple[float, float]:
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError) as error:
        raise TypeError(f"limits is {limits!r}; give two numbers (low, high)") from error
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"limits is {limits!r}; give two numbers (low, high), the lower first")
    return low, high


def _boxes(boxes: Any) -> list[list[int]]:
    try:
        rows = torch.as_tensor(boxes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"boxes is {boxes!r}; give integers (n, 4)") from error
    if rows.shape in ((0,), (0, 4)):
        return []
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"boxes is {rows.dtype} of shape {tuple(rows.shape)}; give integers (n, 4)")
    return rows.tolist()


def _check_colour(colour: Any) -> None:
    try:
        found = tuple(map(operator.index, colour))
    except TypeError as error:
        raise TypeError(f"colour is {colour!r}; give three ints from 0 to 255, such as {BOX}") from error
    if len(found) != 3 or not all(0 <= part <= 255 for part in found):
        raise ValueError(f"colour is {colour!r}; give three ints from 0 to 255, such as {BOX}")


def _shown(prototypes: Any, count: int) -> list[int]:
    if prototypes is None:
        return list(range(count))
    given = np.asarray(prototypes.tolist() if isinstance(prototypes, Tensor) else prototypes)
    if given.size == 0:
        raise ValueError("prototypes is empty; give at least one")
    if given.ndim > 1 or given.dtype.kind not in "iu":
        raise TypeError(f"prototypes is {prototypes!r}; give an int or a sequence of ints")
    shown = [int(p) for p in given.reshape(-1)]
    for prototype in shown:
        if not 0 <= prototype < count:
            raise IndexError(f"prototypes has {prototype}; the projection has 0 to {count - 1}")
    return shown


def _check_field(field: Any, projection: Projection) -> None:
    """That it has the grid that the projection's patches are of, as far as they tell."""
    if not isinstance(field, ReceptiveField):
        raise TypeError(f"field is a {type(field).__name__}; give what pf.nn.receptive_field returned")
    if len(field.grid) != 2:
        raise ValueError(f"field has {len(field.grid)} axes; pictures need 2")
    there = projection.patch >= 0
    patch, position = projection.patch[there], projection.position[there]
    fits = position.shape[-1] == 2
    if fits and len(patch):
        row, column = position.unbind(-1)
        inside = (row < field.grid[0]) & (column < field.grid[1])
        fits = bool((inside & (patch == row * field.grid[1] + column)).all())
    if not fits:
        raise ValueError(
            f"field has the grid {field.grid}, which the projection's patches are not of; give "
            "receptive_field(encoder, size of the projected images, kernel_size=layer.kernel_size)"
        )


def _item(get: Callable[[int], Any], number: int) -> Any:
    try:
        item = get(number)
    except (IndexError, KeyError) as error:
        raise IndexError(f"images has no {number}; give the images that were projected, all of them") from error
    return item[0] if isinstance(item, (tuple, list)) else item


def _rgb(name: str, image: Any) -> tuple[np.ndarray, str]:
    """uint8 (H, W, 3) of (C, H, W) or (H, W) in [0, 1] or uint8, and what to warn of. NaN is drawn black."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} is a {type(image).__name__}; give a tensor or array (C, H, W)")
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; give (H, W), (1, H, W) or (3, H, W)")
    outside = ""
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"{name} is {array.dtype}; give floating-point values in [0, 1], or uint8")
        low, high = float(np.fmin.reduce(array, None)), float(np.fmax.reduce(array, None))
        if low < -0.5 / 255 or high > 1 + 0.5 / 255:  # by less, as resizing leaves it, changes no grey level
            outside = (
                f"{name} ranges from {low:.3g} to {high:.3g} and is drawn clipped to [0, 1]: undo the normalisation "
                "first, or give uint8"
            )
        array = (np.clip(np.nan_to_num(array), 0, 1) * 255).round().astype(np.uint8)
    # a copy, since boxes are drawn into it
    return np.array(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0), order="C"), outside


def _written(picture: np.ndarray, path: str | os.PathLike[str] | None) -> np.ndarray:
    if path is not None:
        image = need("PIL.Image", "data").fromarray(picture)
        with replacing(path) as file:
            image.save(file, format=_FORMATS[_format(path)])
    return picture
