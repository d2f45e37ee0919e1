"""Pictures of prototypes: heat maps, boxes, and sheets of their nearest patches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import replacing
from .._optional import need
from .layer import PrototypeLayer
from .project import Projection
from .receptive_field import ReceptiveField

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOX = (255, 196, 0)
"""Colour of boxes: amber, which stands out on grey and on most photographs."""


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
        In [0, 1], or uint8.
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
        Also written there as a PNG, whole or not at all.

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
    picture = _rgb("image", image)
    if not isinstance(features, Tensor):
        raise TypeError(f"features is a {type(features).__name__}; give a torch tensor")
    features = features[None] if features.ndim == 3 else features
    if features.ndim != 4 or len(features) != 1:
        raise ValueError(f"features has shape {tuple(features.shape)}; give (D, h, w) of the one image")
    if not 0 <= prototype < layer.num_prototypes:
        raise IndexError(f"prototype is {prototype}; the layer has 0 to {layer.num_prototypes - 1}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; give 0 to 1")
    found = layer.map(features)[:, prototype : prototype + 1].float()
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
        In [0, 1], or uint8.
    boxes : integer Tensor or sequence of shape (n, 4), or (4,)
        (top, left, bottom, right), half-open, as `receptive_field` gives them. Clipped to the image.
    colour : three ints, 0 to 255
    width : int, default 1
        Of a frame, in pixels, inwards.
    path : path, optional
        Also written there as a PNG, whole or not at all.

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
    picture = _rgb("image", image).copy()
    rows = torch.as_tensor(boxes)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.is_floating_point():
        raise ValueError(f"boxes is {rows.dtype} of shape {tuple(rows.shape)}; give integers (n, 4)")
    if width < 1:
        raise ValueError(f"width is {width}; give 1 or more")
    height, across = picture.shape[:2]
    for top, left, bottom, right in rows.tolist():
        top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, height), min(right, across)
        if bottom <= top or right <= left:
            continue
        frame = np.ones((bottom - top, right - left), bool)
        frame[width:-width, width:-width] = False
        picture[top:bottom, left:right][frame] = colour
    return _written(picture, path)


def prototype_sheet(
    projection: Projection,
    images: Any,
    *,
    field: ReceptiveField | None = None,
    prototypes: Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """A row for each prototype with the images of its best patches, nearest first, each with its box and distance.

    Parameters
    ----------
    projection : Projection
    images : sequence, data set or function
        ``images[i]`` or ``images(i)`` is the image with number (or id) i, (C, H, W) in [0, 1] or uint8; of an item
        (image, label) the first.
    field : ReceptiveField, optional
        From `receptive_field` with the layer's ``kernel_size``; without, no boxes are drawn.
    prototypes : sequence of int, optional
        Which to show, by default all.
    path : path, optional
        Also written there as a PNG, whole or not at all.

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
    need("matplotlib", "pxgen")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, best = projection.image.shape
    shown = list(range(count)) if prototypes is None else [int(p) for p in prototypes]
    for prototype in shown:
        if not 0 <= prototype < count:
            raise IndexError(f"prototypes has {prototype}; the projection has 0 to {count - 1}")
    if not shown:
        raise ValueError("prototypes is empty; give at least one")
    inch, name = 1.3, 0.5
    size = (inch * best + name, (inch + 0.22) * len(shown) + 0.1)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(shown),
        best,
        left=name / size[0],
        right=1 - 0.05 / size[0],
        bottom=0.05 / size[1],
        top=1 - 0.25 / size[1],
        wspace=0.06,
        hspace=0.22,
    )
    get = images if callable(images) else images.__getitem__
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
            picture = _rgb(f"images[{number}]", _item(get, number))
            axes.imshow(picture, interpolation="nearest")
            if field is not None:
                top, left, bottom, right = field.box(projection.position[prototype, column].tolist())
                # lines on the edges of pixels, whose centres are at whole numbers
                frame = np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]) - 0.5
                axes.plot(*frame.T, color=np.array(BOX) / 255, linewidth=1.4, clip_on=False)
            axes.set_title(
                f"{number} · {float(projection.distance[prototype, column]):.3g}", fontsize=7, pad=2, color="#444444"
            )
    if path is not None:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=150, facecolor="white")
    return figure


def _item(get: Callable[[int], Any], number: int) -> Any:
    item = get(number)
    return item[0] if isinstance(item, (tuple, list)) else item


def _rgb(name: str, image: Any) -> np.ndarray:
    """uint8 (H, W, 3) of (C, H, W) or (H, W) in [0, 1] or uint8. NaN is drawn black."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"{name} has shape {array.shape}; give (H, W), (1, H, W) or (3, H, W)")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"{name} is {array.dtype}; give floating-point values in [0, 1], or uint8")
        array = (np.clip(np.nan_to_num(array), 0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0))


def _written(picture: np.ndarray, path: str | os.PathLike[str] | None) -> np.ndarray:
    if path is not None:
        image = need("PIL.Image", "data").fromarray(picture)
        with replacing(path) as file:
            image.save(file, format="PNG")
    return picture
