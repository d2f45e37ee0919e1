"""A picture of points and of those chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .._files import replacing
from .._optional import need
from .result import Selection

MOST_POINTS = 20_000
"""Points drawn one by one; of more, their density is."""
_FITTED = 50_000  # points that the principal components are taken from
_BLOCK = 1 << 22  # numbers transformed at a time
_FAINTEST = 0.4  # where 0 is white: a cell of one point may be an outlier, and must be seen
_INK, _CHOSEN = "#1b1b1b", "#D55E00"


def draw(path: Path, points: np.ndarray, found: Selection) -> None:
    """Writes a PNG: points of more than two dimensions by their first two principal components."""
    need("matplotlib", "pxgen")
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    indices = found.indices.cpu().numpy()
    plane, names = _plane(points, indices)
    chosen = plane[indices]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(plane) > MOST_POINTS:
        greys = ListedColormap(colormaps["Greys"](np.linspace(_FAINTEST, 1, 256)))
        cells = axes.hexbin(plane[:, 0], plane[:, 1], gridsize=110, bins="log", cmap=greys, mincnt=1, linewidths=0.1)
        figure.colorbar(cells, ax=axes, label="points in a cell", shrink=0.7)
    else:
        size = float(np.clip(4000 / len(plane) ** 0.75, 2, 30))
        axes.scatter(plane[:, 0], plane[:, 1], s=size, color="#8a8a8a", alpha=0.6, linewidths=0, label="points")
    size = float(np.clip(3000 / len(chosen), 6, 46))
    axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=_CHOSEN, edgecolor="white", linewidths=0.6, label="chosen")
    axes.set_xlabel(names[0], color=_INK)
    axes.set_ylabel(names[1], color=_INK)
    axes.set_title(f"{len(chosen):,} chosen of {len(plane):,} points", loc="left", fontsize=11, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    if points.shape[1] == 2:
        axes.set_aspect("equal", adjustable="datalim")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160, facecolor="white")


def _plane(points: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Two coordinates of each point, and what they are."""
    width = points.shape[1]
    if width <= 2:
        flat = np.zeros((len(points), 2), np.float32)
        flat[:, :width] = points
        return flat, ("first coordinate", "second coordinate" if width == 2 else "")
    every = -(-len(points) // _FITTED)
    sample = np.asarray(points[::every], np.float64)
    if not np.ptp(sample, axis=0).any():  # then those that differ, if any do, are among the chosen
        sample = np.concatenate([sample, np.asarray(points[chosen], np.float64)])
        if not np.ptp(sample, axis=0).any():
            return np.zeros((len(points), 2), np.float32), ("all points are equal", "")
    components = need("sklearn.decomposition", "data").PCA(2, svd_solver="randomized", random_state=0)
    components.fit(sample)
    flat = np.empty((len(points), 2), np.float32)
    step = max(1, _BLOCK // width)
    for start in range(0, len(points), step):
        flat[start : start + step] = components.transform(np.asarray(points[start : start + step], np.float64))
    first, second = components.explained_variance_ratio_
    return flat, (f"first component ({first:.0%} of the variance)", f"second component ({second:.0%})")
