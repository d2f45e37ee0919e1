"""Why a network says what it says of an image: channels that speak for it, where, and prototypes of each."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._optional import need
from ..channels import channel_heat_map
from .concepts import Concepts

THRESHOLD = 0.8
"""Of a heat map's largest value: what a box encloses (the release's)."""


class Explanation(NamedTuple):
    """Of one image. ``contributions.sum() + rest + bias`` is the logit.

    Attributes
    ----------
    image : Tensor of shape (c, H, W)
    predicted : int
        The class that is explained.
    probability, logit, bias : float
    channels : Tensor of shape (k,)
        By falling score W'_yc · relu(h_c).
    contributions : Tensor of shape (k,)
        W'_yc · h_c.
    rest : float
        Of all other channels.
    heat : Tensor of shape (k, H, W)
        In [0, 1]: how pure and how strong a channel is at a pixel.
    boxes : Tensor of shape (k, 4)
        (top, left, bottom, right), half-open, around the largest part of `heat` over 0.8 of its largest value.
    prototypes : Tensor of shape (k, n, c, h, w)
    prototype_heat, prototype_boxes : Tensors of shape (k, n, h, w) and (k, n, 4)
    """

    image: Tensor
    predicted: int
    probability: float
    logit: float
    bias: float
    channels: Tensor
    contributions: Tensor
    rest: float
    heat: Tensor
    boxes: Tensor
    prototypes: Tensor
    prototype_heat: Tensor
    prototype_boxes: Tensor


@torch.no_grad()
def explain(
    concepts: Concepts, image: Tensor, *, top: int = 4, prototypes: int = 5, target: int | None = None, seed: int = 0
) -> Explanation:
    """Explains one image by its `top` channels (arXiv 2605.08858, sec. 3; EPIC's and InfoDisent's likewise).

    Parameters
    ----------
    concepts : Concepts
    image : Tensor of shape (c, H, W)
        In [0, 1], of any size.
    top : int, default 4
    prototypes : int, default 5
        Of each channel.
    target : int, optional
        The class to explain; by default the predicted one.
    seed : int, default 0
        Of drawn prototypes.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError, TypeError, IndexError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg import Concepts, SplitNetwork, explain
    >>> network = SplitNetwork(torch.nn.Conv2d(1, 4, 3), torch.randn(3, 4), torch.zeros(3), input_shape=(1, 8, 8))
    >>> noise = lambda channel, count, seed: torch.rand(count, 1, 8, 8)
    >>> same = Concepts("none", network, torch.eye(4), network.weight, network.bias, noise)
    >>> found = explain(same, torch.rand(1, 8, 8), top=2)
    >>> abs(float(found.contributions.sum()) + found.rest + found.bias - found.logit) < 1e-5
    True
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError(f"image is {getattr(image, 'dtype', type(image).__name__)}; give a floating-point torch tensor")
    if image.ndim != 3:
        raise ValueError(f"image has shape {tuple(image.shape)}; give (c, H, W)")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("image has values outside [0, 1] (or NaN); divide a picture's bytes by 255")
    if not 1 <= top <= concepts.network.channels:
        raise ValueError(f"top is {top}; give 1 to {concepts.network.channels}, the channels")
    if prototypes < 1:
        raise ValueError(f"prototypes is {prototypes}; give at least 1")
    maps = concepts.network.maps(image[None].to(concepts.network.weight.device))
    activations = concepts.activations(maps)[0]
    logits = concepts.weight @ activations + concepts.bias
    if target is None:
        target = int(logits.argmax())
    elif not 0 <= target < len(logits):
        raise IndexError(f"target is {target}; the network has classes 0 to {len(logits) - 1}")
    channels = concepts.strongest(activations[None], torch.tensor([target], device=maps.device), top)[1][0]
    contributions = concepts.weight[target] * activations
    heat = channel_heat_map(maps, concepts.matrix, channels[None], size=(image.shape[1], image.shape[2]))[0]
    made = torch.stack([concepts.prototypes(int(channel), prototypes, seed) for channel in channels])
    seen = [
        channel_heat_map(
            concepts.network.maps(images.to(maps.device)),
            concepts.matrix,
            channel.repeat(len(images), 1),
            size=(images.shape[2], images.shape[3]),
        )[:, 0]
        for images, channel in zip(made, channels, strict=True)
    ]
    prototype_heat = torch.stack(seen).cpu()
    boxes = torch.tensor([[largest_box(one) for one in row] for row in prototype_heat])
    return Explanation(
        image.cpu(),
        target,
        float(logits.softmax(0)[target]),
        float(logits[target]),
        float(concepts.bias[target]),
        channels.cpu(),
        contributions[channels].cpu(),
        float(contributions.double().sum() - contributions[channels].double().sum()),
        heat.cpu(),
        torch.tensor([largest_box(one) for one in heat.cpu()]),
        made.cpu(),
        prototype_heat,
        boxes,
    )


def largest_box(heat: Tensor, threshold: float = THRESHOLD) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), half-open, of the largest 8-connected part over a share of the largest value.

    Of parts that are equally large the first by rows; (0, 0, 0, 0) of a map without a value above 0.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.explain import largest_box
    >>> heat = torch.zeros(4, 5)
    >>> heat[0, 0], heat[1, 3], heat[2, 4] = 1.0, 0.9, 0.9
    >>> largest_box(heat)
    (1, 3, 3, 5)
    """
    values = np.asarray(heat)
    high = values.max(initial=0)
    if not high > 0:
        return 0, 0, 0, 0
    ndimage = need("scipy.ndimage", "prodg")
    parts, _ = ndimage.label(values > threshold * high, structure=np.ones((3, 3)))
    rows, columns = ndimage.find_objects(parts)[np.bincount(parts.ravel())[1:].argmax()]
    return rows.start, columns.start, rows.stop, columns.stop


def picture(explanation: Explanation, *, names: Sequence[str] | None = None, strength: float = 0.45) -> bytes:
    """The grid of the paper as a PNG file: a row a channel; image and prototypes under heat maps and boxes.

    Parameters
    ----------
    explanation : Explanation
    names : sequence of str, optional
        Of the classes.
    strength : float, default 0.45
        Of the heat maps.
    """
    need("matplotlib", "prodg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count, shown = explanation.prototypes.shape[:2]
    figure = Figure(figsize=(1.35 * (shown + 2), 1.5 * count + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, shown + 1, squeeze=False)
    name = names[explanation.predicted] if names is not None else f"class {explanation.predicted}"
    name = name.replace("$", r"\$")  # no formula
    figure.suptitle(f"{name}, {100 * explanation.probability:.0f} %: logit {explanation.logit:.2f}", fontsize=10)
    for place in range(count):
        channel, part = int(explanation.channels[place]), float(explanation.contributions[place])
        row = [(explanation.image, explanation.heat[place], explanation.boxes[place])]
        row += list(
            zip(
                explanation.prototypes[place],
                explanation.prototype_heat[place],
                explanation.prototype_boxes[place],
                strict=True,
            )
        )
        for axes, (image, heat, box) in zip(grid[place], row, strict=True):
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            axes.imshow(pixels.float().numpy(), cmap="gray", vmin=0, vmax=1)
            scaled = (heat / heat.max().clamp(min=1e-12)).numpy()
            axes.imshow(scaled, cmap="jet", alpha=strength * np.sqrt(scaled), vmin=0, vmax=1)
            upper, left, lower, right = box.tolist()
            axes.add_patch(
                Rectangle(
                    (left - 0.5, upper - 0.5), right - left, lower - upper, fill=False, color="#ffd500", linewidth=1.4
                )
            )
            axes.set(xticks=[], yticks=[])
        grid[place][0].set_ylabel(f"channel {channel}\n{part:+.2f}", fontsize=8)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()
