"""All that was found of a model as one HTML page that needs nothing outside it."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from .._optional import need
from .model import read_config

ORDER = ("prototypes", "emergence", "generate", "diagnose", "evaluate", "latent")
"""Of the sections on the page; what else there is comes after them."""

RESULT, LOG = "result.json", "log.jsonl"
_FORMAT = "protofast-patronus-"
_WIDE = 700
"""Pixels from which a picture would be too small on a telephone, and is scrolled there."""


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
    jinja2 = need("jinja2", "patronus")
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("protofast.patronus"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return (
        templates.get_template("report.html.j2")
        .render(
            css=_style(),
            headline=headline(config, about, contents),
            kicker=_kicker(folder, config, about),
            config=config,
            missing=missing or {},
            parts=[_part(folder / name, content, place) for place, (name, content) in enumerate(contents.items(), 1)],
            training=_training(folder / LOG),
            model=[*_settings(config), *_settings(about)],
        )
        .lstrip()
    )


def results(run: Path) -> dict[str, dict[str, Any]]:
    """Folder to content of every complete `result.json` in a run, in the order of the page."""
    found = {}
    for path in sorted(run.glob(f"*/{RESULT}")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run its command again") from None
        if isinstance(content, dict) and str(content.get("format", "")).startswith(_FORMAT):
            found[path.parent.name] = content
    places = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (places.get(_command(item[1]), len(ORDER)), item[0])))


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
        names = content["numbers"].get("names", []) if _command(content) == "prototypes" else []
        if named := sum(bool(name["what"]) for name in names):
            return f"{named} of {count} prototypes{of} can be named by what activates them"
    return f"{count} prototypes{of}, and what is known of them"


def _command(content: Mapping[str, Any]) -> str:
    return str(content["format"]).removeprefix(_FORMAT).rpartition("-")[0]


def _kicker(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    channels, height, width = config["image_shape"]
    shape = f"{'grey' if channels == 1 else 'colour' if channels == 3 else f'{channels}-channel'} images"
    words = [str(about["data"])] if about.get("data") else []
    return " · ".join([*words, f"{shape} of {height} × {width}", folder.resolve().name])


def _part(folder: Path, content: Mapping[str, Any], place: int) -> dict[str, Any]:
    settings = [*_settings(content["settings"]), ("versions", _shown(content["versions"]))]
    return {
        "anchor": f"section-{place}",
        "title": content["title"],
        "findings": content["findings"],
        "tables": [_table(table) for table in content["tables"]],
        "pictures": [_picture(folder, picture) for picture in content["pictures"]],
        "settings": [*settings, ("folder", folder.name)],
    }


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [
        any(_is_number(row[place]) for row in table["rows"])
        and all(row[place] is None or _is_number(row[place]) for row in table["rows"])
        for place in range(len(table["columns"]))
    ]
    return {
        "title": table["title"],
        "columns": [{"name": name, "number": number} for name, number in zip(table["columns"], numbers, strict=True)],
        "rows": [[_shown(cell) for cell in row] for row in table["rows"]],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _picture(folder: Path, picture: Mapping[str, str]) -> dict[str, Any]:
    path = folder / picture["file"]
    if Path(picture["file"]).name != picture["file"]:
        raise ValueError(f"{folder / RESULT} names the picture {picture['file']!r}; it must be a file of that folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though {RESULT} names it; run the command again")
    return _embedded(path.read_bytes(), picture["title"], picture.get("caption", ""), str(path))


def _embedded(png: bytes, title: str, caption: str, name: str) -> dict[str, Any]:
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or len(png) < 24:
        raise ValueError(f"{name} is no PNG file; run the command again")
    width, height = (int.from_bytes(png[place : place + 4], "big") for place in (16, 20))
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return {
        "title": title,
        "caption": caption,
        "source": source,
        "width": width,
        "height": height,
        "wide": width > _WIDE,
    }


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        yield name.replace("_", " "), _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(f"({_shown(item)})" if isinstance(item, list) else _shown(item) for item in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "–" if value is None or value == "" else str(value)


def _style() -> Any:
    from importlib.resources import files

    from markupsafe import Markup

    return Markup(files("protofast.patronus").joinpath("templates/report.css").read_text(encoding="utf-8"))


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
    return {"text": text + ".", "picture": _embedded(_curve(updates, losses), "", caption, LOG)}


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
