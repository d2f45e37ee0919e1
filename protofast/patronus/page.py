"""All that was found of a model as one HTML page that needs nothing outside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from .._optional import need
from .._report.page import command_of, embedded, render, settings
from .._report.page import results as _results
from .._report.section import RESULT as RESULT
from .model import read_config

ORDER = ("prototypes", "emergence", "generate", "diagnose", "evaluate", "latent")
"""Of the sections on the page; what else there is comes after them."""

LOG = "log.jsonl"
_LEAD = (
    "A diffusion model draws images from noise. This one is told, for each image, how strongly each of its {} "
    "prototypes is seen in it. A prototype is a small piece of an image that the model found by itself, without "
    "labels, to be worth telling; so it can be asked what they are, where they are, and when in drawing they appear."
)


def to_html(run: str | os.PathLike[str], *, missing: Mapping[str, str] | None = None) -> str:
    """A page of all results in the folder of a trained model.

    Every folder in it with a `result.json` of a command ``protofast patronus …`` becomes a section: its findings,
    pictures (inside the page), tables and settings. The training log becomes a curve.

    Parameters
    ----------
    run : path
        Folder that ``protofast patronus train`` wrote.
    missing : mapping of str to str, optional
        What is not there, and why: said at the end.

    Returns
    -------
    str

    Raises
    ------
    FileNotFoundError
        When the folder holds no model, or lacks a picture of a result.
    ValueError
        When a file is damaged.

    Examples
    --------
    >>> import tempfile, protofast as pf
    >>> config = pf.patronus.PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pf.patronus.Patronus(config).save_pretrained(folder, data="digits")
    ...     to_html(folder)[:15]
    '<!doctype html>'
    """
    folder = Path(run)
    config = read_config(folder)
    about = config.pop("about", {})
    contents = results(folder)
    return render(
        folder,
        contents,
        extra="patronus",
        headline=headline(config, about, contents),
        kicker=_kicker(folder, config, about),
        lead=_LEAD.format(config["num_prototypes"]),
        method="Patronus, interpretable diffusion models with prototypes (arXiv 2503.22782)",
        training=_training(folder / LOG),
        model=[*settings(config), *settings(about)],
        missing=missing,
    )


def results(run: Path) -> dict[str, dict[str, Any]]:
    """Folder to content of every complete `result.json` in a run, in the order of the page."""
    return _results(run, "patronus", ORDER)


def headline(config: Mapping[str, Any], about: Mapping[str, Any], contents: Mapping[str, Mapping[str, Any]]) -> str:
    """What was found, in one sentence.

    Parameters
    ----------
    config, about : mapping
        Of the model, as `read_config` gives them.
    contents : mapping
        As `results` gives it.

    Returns
    -------
    str
    """
    of = f" of {about['data']}" if about.get("data") else ""
    count = config["num_prototypes"]
    for content in contents.values():
        names = content["numbers"].get("names", []) if command_of(content, "patronus") == "prototypes" else []
        if named := sum(bool(name["what"]) for name in names):
            return f"{named} of {count} prototypes{of} can be named by what activates them"
    return f"{count} prototypes{of}, and what is known of them"


def _kicker(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    channels, height, width = config["image_shape"]
    shape = f"{'grey' if channels == 1 else 'colour' if channels == 3 else f'{channels}-channel'} images"
    words = [str(about["data"])] if about.get("data") else []
    return " · ".join(["Patronus report", *words, f"{shape} of {height} × {width}", folder.resolve().name])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log by update: of one that was trained twice, after a kill, the later; no torn line."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[int(row["update"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[update] for update in sorted(rows)]


def _training(path: Path) -> dict[str, Any] | None:
    rows = read_log(path) if path.is_file() else []
    rows = [row for row in rows if math.isfinite(row.get("loss", math.nan))]
    if not rows:
        return None
    updates, losses = [row["update"] for row in rows], [row["loss"] for row in rows]
    text = f"{updates[-1]:,} updates; the loss went from {losses[0]:.3g} to {_mean(losses[-20:]):.3g}"
    if speeds := [row["images_per_second"] for row in rows if row.get("images_per_second")]:
        text += f", at {sorted(speeds)[len(speeds) // 2]:,.0f} images per second"
    if shares := [row["prototype_share"] for row in rows if row.get("prototype_share") is not None]:
        text += f"; {100 * _mean(shares):.1f} % of the time went into the prototype layer"
    caption = "Loss of the denoiser by update: each logged value, and in blue their running mean."
    return {"text": text + ".", "picture": embedded(_curve(updates, losses), "", caption, LOG)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _curve(updates: list[int], losses: list[float]) -> bytes:
    need("matplotlib", "patronus")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    span = max(1, len(losses) // 40)
    axes.plot(updates, losses, color="#bdbdbd", linewidth=0.8, marker="." if len(losses) < 3 else "")
    smooth = [_mean(losses[max(0, place - span + 1) : place + 1]) for place in range(len(losses))]
    axes.plot(updates, smooth, color="#0072B2", linewidth=1.6)
    axes.set(xlabel="update", ylabel="loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if max(losses) < 10 * min(losses) else "")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100, facecolor="white")
    return file.getvalue()
