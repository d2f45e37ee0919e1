"""Pictures of a report. Everything is drawn through figure objects, so no window or global state is touched."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import need
from .result import GROUPS, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"HIHE": "#0072B2", "HILE": "#D55E00", "LIHE": "#009E73", "LILE": "#767676"}
"""Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ as well."""

_MARKERS = {"HIHE": "o", "HILE": "^", "LIHE": "s", "LILE": "D"}
_INK, _FAINT = "#1b1b1b", "#6b6b6b"
MOST_POINTS = 20_000
"""Anchors drawn one by one; of more, which would cover each other, the density is."""
_CELLS = 150, 200  # down and across a panel
_BLOCK = 1 << 18  # anchors counted at a time
_MOST_PANELS = 3
_NAMES = {"kld": "KL divergence", "sse": "squared error", "ssim": "DSSIM"}


def shown(criterion: str) -> str:
    """A criterion's name as it is written in a report."""
    return _NAMES.get(criterion, criterion.upper() if len(criterion) <= 5 else criterion.replace("_", " "))


def png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white")
    return file.getvalue()


def picture(image: np.ndarray, *, largest: int = 256) -> bytes:
    """One image (C, H, W) in [0, 1] as a PNG file, its longer side at most `largest` pixels."""
    from PIL import Image

    pixels = Image.fromarray((_displayable(image) * 255).round().astype(np.uint8))
    if max(pixels.size) > largest:
        pixels.thumbnail((largest, largest))
    file = BytesIO()
    pixels.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _displayable(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1]; one channel, three, or the first three of more. NaN is drawn black."""
    image = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0, 1)
    return np.moveaxis(image[:3], 0, -1) if len(image) >= 3 else image[0]


def scatter(report: Report) -> Figure:
    """Intrinsic against extrinsic criterion, one panel a pair, with thresholds and representatives."""
    inner = [name for name, kind in report.kinds.items() if kind == "intrinsic"][:_MOST_PANELS]
    outer = [name for name, kind in report.kinds.items() if kind == "extrinsic"][:_MOST_PANELS]
    figure = _figure(6.6 * len(inner) + 0.4, 5.0 * len(outer) + 0.4)
    crowded = dense(report)
    drawn = {name: report.members(name) for name in GROUPS}
    for row, extrinsic in enumerate(outer):
        for column, intrinsic in enumerate(inner):
            axes = figure.add_subplot(len(outer), len(inner), row * len(inner) + column + 1)
            _panel(axes, report, intrinsic, extrinsic, drawn, crowded)
    if len(report):
        figure.axes[0].legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.01),
            ncols=5,
            frameon=False,
            fontsize=9,
            handletextpad=0.2,
            columnspacing=1.2,
        )
    if crowded:
        figure.supxlabel(
            f"all {len(report):,} anchors by cells: darker where there are more (logarithmic), groups mixed in colour",
            fontsize=8,
            color=_FAINT,
            x=0.99,
            ha="right",
        )
    return figure


def dense(report: Report) -> bool:
    """Whether the scatter shows the density of the anchors instead of each."""
    return len(report) > MOST_POINTS


def _density(axes: Axes, report: Report, intrinsic: str, extrinsic: str, horizontal: _Scale, vertical: _Scale) -> None:
    """An image of the anchors in each cell: the mean of their groups' colours, the more opaque the more there are."""
    down, across = _CELLS
    counts = np.zeros(down * across * len(GROUPS), np.int64)
    for start in range(0, len(report), _BLOCK):
        rows = slice(start, start + _BLOCK)
        x = horizontal.cell(report.criteria[intrinsic][rows], across)
        y = vertical.cell(report.criteria[extrinsic][rows], down)
        counts += np.bincount((y * across + x) * len(GROUPS) + report.groups[rows], minlength=len(counts))
    cells = counts.reshape(down, across, len(GROUPS))
    total = cells.sum(-1)
    colours = np.array([[int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)] for name in GROUPS]) / 255
    image = np.empty((down, across, 4))
    image[..., :3] = cells @ colours / np.maximum(total, 1)[..., None]
    image[..., 3] = np.where(total > 0, 0.25 + 0.75 * np.log1p(total) / np.log1p(total.max()), 0)
    place: dict[str, Any] = {"extent": (0, 1, 0, 1), "transform": axes.transAxes}  # equal cells on any scale
    axes.imshow(image, origin="lower", aspect="auto", interpolation="nearest", zorder=1, **place)


def _panel(
    axes: Axes, report: Report, intrinsic: str, extrinsic: str, drawn: dict[str, np.ndarray], crowded: bool
) -> None:
    limits = {threshold.criterion: threshold for threshold in report.thresholds}
    horizontal = _Scale(report.criteria[intrinsic], limits[intrinsic].value)
    vertical = _Scale(report.criteria[extrinsic], limits[extrinsic].value)
    size = float(np.clip(4000 / max(1, len(report)) ** 0.75, 5, 36))
    if crowded:
        _density(axes, report, intrinsic, extrinsic, horizontal, vertical)
    # The most crowded group goes below, so that it cannot hide a rare one.
    for name in () if crowded else sorted(GROUPS, key=lambda name: -len(drawn[name])):
        rows = drawn[name]
        if len(rows):
            axes.scatter(
                horizontal.place(report.criteria[intrinsic][rows]),
                vertical.place(report.criteria[extrinsic][rows]),
                s=size,
                marker=_MARKERS[name],
                color=COLOURS[name],
                alpha=0.55,
                linewidths=0,
            )
    for name in GROUPS:  # the legend's entries, in the groups' own order and readable whatever the points' size
        if len(drawn[name]):
            axes.scatter([], [], s=36, marker=_MARKERS[name], color=COLOURS[name], label=name)
    chosen = [(entry.group, np.asarray(entry.indices, int)) for entry in report.representatives if len(entry.indices)]
    for group, rows in chosen:
        axes.scatter(
            horizontal.place(report.criteria[intrinsic][rows]),
            vertical.place(report.criteria[extrinsic][rows]),
            s=62,
            marker=_MARKERS[group],
            facecolor=COLOURS[group],
            edgecolor="white",
            linewidth=2.4,
            zorder=3,
        )
        axes.scatter(
            horizontal.place(report.criteria[intrinsic][rows]),
            vertical.place(report.criteria[extrinsic][rows]),
            s=62,
            marker=_MARKERS[group],
            facecolor="none",
            edgecolor=_INK,
            linewidth=1.1,
            zorder=4,
        )
    if chosen:
        axes.scatter([], [], s=62, marker="o", facecolor="none", edgecolor=_INK, linewidth=1.1, label="representative")
    horizontal.apply(axes.xaxis)
    vertical.apply(axes.yaxis)
    style: dict[str, Any] = {"color": _INK, "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 2}
    note: dict[str, Any] = {"fontsize": 8.5, "color": _INK, "zorder": 5, "textcoords": "offset points"}
    note["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    if np.isfinite(limit := limits[intrinsic].value):
        axes.axvline(limit, **style)
        axes.annotate(
            f"threshold {limit:.4g}",
            (limit, 1),
            (-4, -4),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            **note,
        )
    if np.isfinite(limit := limits[extrinsic].value):
        axes.axhline(limit, **style)
        axes.annotate(
            f"threshold {limit:.4g}",
            (1, limit),
            (-4, 4),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            **note,
        )
    axes.set_xlabel(f"{shown(intrinsic)}, intrinsic (left: familiar)", color=_INK)
    axes.set_ylabel(f"{shown(extrinsic)}, extrinsic (below: well reproduced)", color=_INK)
    _quiet(axes)


class _Scale:
    """One axis: logarithmic when the values span decades, and able to show the threshold."""

    def __init__(self, values: np.ndarray, threshold: float) -> None:
        finite = values[np.isfinite(values)]
        if np.isfinite(threshold):
            finite = np.append(finite, threshold)
        if not len(finite):
            finite = np.array([0.0, 1.0])
        low, high = np.quantile(finite, [0.01, 0.99])
        self.log = bool(low > 0 and threshold > 0 and high / low > 30)
        if self.log:
            positive = finite[finite > 0]
            # A handful of values next to 0 must not squeeze all the others: they are drawn at the edge.
            self.low, self.high = max(float(positive.min()), float(low) / 100), float(finite.max())
            room = max((self.high / self.low) ** 0.04, 1.05)
            self.limits = self.low / room, self.high * room
        else:
            self.low, self.high = float(finite.min()), float(finite.max())
            room = 0.04 * (self.high - self.low) or 0.5 * abs(self.high) or 0.5
            self.limits = self.low - room, self.high + room

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where to draw: values that the axis cannot show (0 on a logarithmic one, infinity) go to its edge."""
        return np.clip(values, self.low, self.high)

    def cell(self, values: np.ndarray, count: int) -> np.ndarray:
        """Which of `count` cells along the axis each value lies in."""
        low, high = np.log(self.limits) if self.log else np.asarray(self.limits)
        placed = np.nan_to_num(self.place(values), nan=self.low)
        part = ((np.log(placed) if self.log else placed) - low) / (high - low)
        return np.clip((part * count).astype(np.int64), 0, count - 1)

    def apply(self, axis: Any) -> None:
        scale = "log" if self.log else "linear"
        axis.axes.set(**{f"{axis.axis_name}scale": scale, f"{axis.axis_name}lim": self.limits})
        if self.log and self.limits[0] > 1e-4 and self.limits[1] < 1e6:
            axis.set_major_formatter(lambda value, _: f"{value:,g}")


def group_bars(report: Report) -> Figure:
    """Share of each group."""
    figure = _figure(6.6, 2.3)
    axes = figure.add_subplot()
    shares = [summary.share for summary in report.summaries]
    names = [summary.name for summary in report.summaries]
    axes.barh(names, shares, color=[COLOURS[name] for name in names], height=0.66)
    for position, summary in enumerate(report.summaries):
        axes.annotate(
            f"{summary.count:,}  ({100 * summary.share:.1f} %)",
            (summary.share, position),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=_INK,
        )
    axes.invert_yaxis()
    widest = max([*shares, 0.01])
    axes.set_xlim(0, widest * 1.3)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= widest * 1.05])
    axes.set_xlim(0, widest * 1.3)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_xlabel("share of the anchors", color=_INK)
    _quiet(axes)
    axes.grid(False, axis="y")
    return figure


def pictures(report: Report, group: str) -> Figure | None:
    """Representatives of a group: each original beside its reconstruction; None when the group has none."""
    rows = [row for entry in report.representatives if entry.group == group for row in entry.indices]
    rows = [row for row in dict.fromkeys(map(int, rows)) if row in report.originals]
    if not rows:
        return None
    across = min(5, len(rows))
    down = -(-len(rows) // across)
    height, width = report.originals[rows[0]].shape[-2:]
    wide = 2.2  # inches, of a pair
    tall = wide / 2.06 * height / width + 0.34
    figure = _figure((wide + 0.2) * across, tall * down + 0.4, tight=False)
    above = 1 - 0.62 / figure.get_figheight()
    figure.suptitle(
        f"{group}: anchor, and what the model makes of it",
        x=0.1 / figure.get_figwidth(),
        y=1 - 0.08 / figure.get_figheight(),
        ha="left",
        va="top",
        fontsize=11,
        color=COLOURS[group],
    )
    edge = 0.1 / figure.get_figwidth()
    grid = figure.add_gridspec(
        down,
        across,
        left=edge,
        right=1 - edge,
        bottom=0.06 / figure.get_figheight(),
        top=above,
        wspace=0.09,
        hspace=0.3,
    )
    for position, row in enumerate(rows):
        axes = figure.add_subplot(grid[position])
        pair = [_displayable(report.originals[row])]
        if row in report.reconstructions:
            pair.append(_displayable(report.reconstructions[row]))
        gap = np.ones((pair[0].shape[0], max(1, pair[0].shape[1] // 16), *pair[0].shape[2:]), np.float32)
        strip = np.concatenate([pair[0], gap, *pair[1:]], axis=1)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        title = f"{row:,}" if report.labels is None else f"{row:,} · {report._name(report.labels[row])}"
        axes.set_title(title, fontsize=8.5, color=_INK, pad=3)
        axes.set_axis_off()
    return figure


def _figure(width: float, height: float, tight: bool = True) -> Figure:
    need("matplotlib", "pxgen")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if tight else None)
    FigureCanvasAgg(figure)
    return figure


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b5b5")
    axes.tick_params(colors=_FAINT, labelsize=9, which="both")
    axes.grid(True, color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
