"""Charts of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from .._optional import need

_COLOURS = {"before": "#bdbdbd", "after": "#0072B2"}


def purity_chart(stats: Mapping[str, Mapping[str, Mapping[str, float]]], titles: Mapping[str, str]) -> bytes:
    """Channel purity before and after, of prototypes and of held-out images, a group of bars a method: a PNG file.

    `stats` is, for each method, what `across_seeds` gives; the error bars are standard deviations over seeds.
    """
    need("matplotlib", "prodg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("prototypes", "prototype_purity"), ("held-out real images", "image_purity"))
    for place, (title, name) in enumerate(panels):
        for shift, (when, suffix) in enumerate((("before", "_before"), ("after", ""))):
            found = [values[name + suffix] for values in stats.values()]
            at = [number + 0.36 * (shift - 0.5) for number in range(len(found))]
            spread = [value["sd"] if value["runs"] > 1 else 0 for value in found]
            heights = [value["mean"] for value in found]
            axes[place].bar(at, heights, 0.34, yerr=spread, color=_COLOURS[when], label=when, capsize=2)
        axes[place].set_title(title, fontsize=10)
        axes[place].set_xticks(range(len(stats)), [titles[method] for method in stats], fontsize=9)
        axes[place].spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("channel purity")
    axes[1].legend(frameon=False, fontsize=9)
    return _png(figure)


def history_chart(histories: Sequence[Sequence[Mapping[str, float]]]) -> bytes:
    """Channel purity of generated images by update, a line a training: a PNG file."""
    need("matplotlib", "prodg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for history in histories:
        rows = [row for row in history if "purity" in row]
        axes.plot([row["update"] for row in rows], [row["purity"] for row in rows], color="#0072B2", linewidth=1)
    axes.set(xlabel="update", ylabel="channel purity", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _png(figure: object) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")  # type: ignore[attr-defined]
    return file.getvalue()
