"""Sections as one HTML page that needs nothing outside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._optional import need
from .section import RESULT

_WIDE = 700
"""Pixels from which a picture would be too small on a telephone, and is scrolled there."""


def results(run: Path, system: str, order: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Folder to content of every complete `result.json` of a system in a run; commands in `order` first."""
    found = {}
    for path in sorted(run.glob(f"*/{RESULT}")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run its command again") from None
        if isinstance(content, dict) and str(content.get("format", "")).startswith(f"protofast-{system}-"):
            found[path.parent.name] = content
    places = {name: place for place, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (places.get(command_of(item[1], system), len(order)), item[0])))


def command_of(content: Mapping[str, Any], system: str) -> str:
    """The command that wrote a `result.json`."""
    return str(content["format"]).removeprefix(f"protofast-{system}-").rpartition("-")[0]


def render(
    folder: Path,
    contents: Mapping[str, Mapping[str, Any]],
    *,
    extra: str,
    headline: str,
    kicker: str,
    lead: str,
    method: str,
    training: Mapping[str, Any] | None = None,
    model: Sequence[tuple[str, str]] = (),
    missing: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Parameters
    ----------
    folder : Path
        Of the run: `contents`, as `results` gives it, are of folders in it.
    extra : str
        Of protofast, that a missing package would come with.
    headline, kicker, lead, method : str
        What was found; of what; what a reader has to know first; the paper.
    training : mapping, optional
        "text" and "picture", as `embedded` makes it.
    model : sequence of (name, value), optional
        Settings.
    missing : mapping of str to str, optional
        What is not there, and why: said at the end.
    """
    jinja2 = need("jinja2", extra)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("protofast._report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = templates.get_template("report.html.j2").render(
        css=style(),
        headline=headline,
        kicker=kicker,
        lead=lead,
        method=method,
        missing=missing or {},
        parts=[_part(folder / name, content, place) for place, (name, content) in enumerate(contents.items(), 1)],
        training=training,
        model=list(model),
    )
    return page.lstrip()


def _part(folder: Path, content: Mapping[str, Any], place: int) -> dict[str, Any]:
    about = [*settings(content["settings"]), ("versions", _shown(content["versions"]))]
    return {
        "anchor": f"section-{place}",
        "title": content["title"],
        "findings": content["findings"],
        "tables": [_table(table) for table in content["tables"]],
        "pictures": [_picture(folder, picture) for picture in content["pictures"]],
        "settings": [*about, ("folder", folder.name)],
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
    return embedded(path.read_bytes(), picture["title"], picture.get("caption", ""), str(path))


def embedded(png: bytes, title: str, caption: str, name: str) -> dict[str, Any]:
    """A PNG file for the page; `name` says which, where it is none."""
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


def settings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values as a reader would have them."""
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


def style() -> Any:
    from importlib.resources import files

    from markupsafe import Markup

    return Markup(files("protofast._report").joinpath("templates/report.css").read_text(encoding="utf-8"))
