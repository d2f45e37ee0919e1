"""A report as files: one HTML page, pictures, ``result.json`` and ``anchors.parquet``; and back again."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .._optional import need
from . import figures
from .page import headline, to_html
from .result import GROUPS, GroupSummary, Report, Representatives, Threshold

__all__ = ["FORMAT", "headline", "load", "save", "to_html"]

FORMAT = "protofast-pxgen-1"
_FIXED = ("anchor", "name", "label", "group")
_NAMES = ("report.html", "scatter.png", "groups.png", *(f"{name}.png" for name in GROUPS), "pictures.npz")
_DATA = ("anchors.parquet", "result.json")
_ASIDE = ".report-"


def save(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Writes a report into a folder.

    The files: ``report.html`` (self-contained), ``scatter.png``, ``groups.png``, one PNG for each group that has
    representatives, ``result.json``, ``anchors.parquet`` and ``pictures.npz`` (originals and reconstructions). All are
    built aside and moved into place at the end, so an error or a kill leaves an earlier report as it was.

    Parameters
    ----------
    report : Report
    folder : path
        Made when absent. An earlier report in it is replaced; other files in it are left alone.

    Returns
    -------
    Path
        Of ``report.html``.

    Raises
    ------
    NotADirectoryError
        When `folder` is a file.
    FileExistsError
        When `folder` holds a file of one of these names that belongs to no report.
    PermissionError
    """
    check(folder)
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_ASIDE}*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=_ASIDE))
        _write(report, aside)
        for name in (*_NAMES, *_DATA):
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # a group's picture that this report does not have
    except BaseException:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        for path in made:
            path.rmdir()
        raise
    aside.rmdir()
    return folder / "report.html"


def check(folder: str | os.PathLike[str]) -> None:
    """Refuses what `save` would refuse, so that it is known before the work that is to be saved.

    Parameters
    ----------
    folder : path

    Raises
    ------
    NotADirectoryError, FileExistsError, PermissionError
        As `save`.
    ImportError
        When the extra ``protofast[pxgen]`` is needed.
    """
    for library in ("jinja2", "matplotlib", "PIL", "pyarrow"):
        need(library, "pxgen")
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; give a folder for the report")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; give another folder for the report")
    present = [name for name in (*_NAMES, *_DATA) if (folder / name).exists()]
    if present and not any(map(_is_report, (folder, *folder.glob(f"{_ASIDE}*")))):  # moves may have been cut short
        raise FileExistsError(f"{folder} holds {present[0]}, which no report of protofast wrote; give another folder")


def _is_report(folder: Path) -> bool:
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _write(report: Report, folder: Path) -> None:
    scatter = figures.png(figures.scatter(report))
    (folder / "scatter.png").write_bytes(scatter)
    (folder / "groups.png").write_bytes(figures.png(figures.group_bars(report)))
    for name in GROUPS:
        if (figure := figures.pictures(report, name)) is not None:
            (folder / f"{name}.png").write_bytes(figures.png(figure))
    (folder / "report.html").write_text(to_html(report, page=True, scatter=scatter), encoding="utf-8")
    _write_pictures(report, folder / "pictures.npz")
    _write_anchors(report, folder / "anchors.parquet")
    text = json.dumps(_plain(_result(report)), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")


def _result(report: Report) -> dict[str, Any]:
    """Everything but the table of anchors and the pictures."""
    result = {
        "format": FORMAT,
        "headline": headline(report),
        "findings": report.findings,
        "signatures": report.signatures,
        "anchors": len(report),
        "counts": {summary.name: summary.count for summary in report.summaries},
        "shares": {summary.name: summary.share for summary in report.summaries},
        "criteria": report.kinds,
        "thresholds": [asdict(limit) for limit in report.thresholds],
        "representatives": [
            {name: value for name, value in vars(entry).items() if name != "nearest"}
            for entry in report.representatives
        ],
        "sensitivity": report.sensitivity,
        "names": report.names,
        "settings": report.settings,
        "seeds": report.seeds,
        "versions": report.versions,
    }
    if report.labels is not None:
        result["label_counts"] = report.label_table()
    return result


def _plain(value: Any) -> Any:
    """`value` as JSON takes it. JSON has no NaN or infinity: they become the words "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _column(criterion: str) -> str:
    return f"criterion {criterion}" if criterion in _FIXED else criterion


def _pyarrow() -> Any:
    need("pyarrow.parquet", "pxgen")
    return need("pyarrow", "pxgen")


def _write_anchors(report: Report, path: Path) -> None:
    arrow = _pyarrow()
    n = len(report)
    labels = None if report.labels is None else np.asarray(report.labels)
    named = None
    if labels is not None:
        distinct, inverse = np.unique(labels, return_inverse=True)
        names = arrow.array([report._name(label) for label in distinct], arrow.string())
        named = names.take(arrow.array(inverse.reshape(-1)))
    columns = {
        "anchor": arrow.array(np.arange(n)),
        "name": arrow.nulls(n, arrow.string()) if named is None else named,
        "label": arrow.nulls(n, arrow.int64()) if labels is None else arrow.array(labels),
    }
    columns |= {_column(name): arrow.array(np.ascontiguousarray(values)) for name, values in report.criteria.items()}
    columns["group"] = arrow.array(list(GROUPS)).take(arrow.array(report.groups))
    for name, nearest in _nearest(report).items():
        columns[name] = arrow.array(nearest, mask=nearest < 0)
    arrow.parquet.write_table(arrow.table(columns), path, compression="zstd")


def _nearest(report: Report) -> dict[str, np.ndarray]:
    """Number of the nearest representative of each anchor's group, −1 without one; a column for each algorithm used."""
    columns: dict[str, np.ndarray] = {"nearest_representative": np.full(len(report), -1)}
    for entry, name in zip(report.representatives, _nearest_names(report), strict=True):
        column = columns.setdefault(name, np.full(len(report), -1))
        if len(entry.indices):
            column[report.members(entry.group)] = np.asarray(entry.indices, np.int64)[entry.nearest]
    return columns


def _nearest_names(report: Report) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for entry in report.representatives:
        seen[entry.group] = seen.get(entry.group, 0) + 1
        number = seen[entry.group]
        names.append("nearest_representative" + (f"_{number}" if number > 1 else ""))
    return names


def _write_pictures(report: Report, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for kind, images in (("original", report.originals), ("reconstruction", report.reconstructions)):
        arrays |= {f"{kind}-{int(row)}": np.asarray(image, np.float32) for row, image in images.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    path.write_bytes(file.getvalue())


def load(folder: str | os.PathLike[str]) -> Report:
    """Reads a report that `save` wrote.

    Parameters
    ----------
    folder : path

    Returns
    -------
    Report

    Raises
    ------
    FileNotFoundError
        When `folder` holds no report.
    ValueError
        When a file of it is damaged.
    """
    folder = Path(folder)
    path = folder / "result.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no report (no result.json); give the folder that the report was saved in"
        )
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the analysis again") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of this version of protofast (format {FORMAT})")
    arrow = _pyarrow()
    path = folder / "anchors.parquet"
    try:
        table = arrow.parquet.read_table(path)
    except (OSError, arrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); run the analysis again") from None
    pictures: dict[str, dict[int, np.ndarray]] = {"original": {}, "reconstruction": {}}
    path = folder / "pictures.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, row = name.split("-")
                pictures[kind][int(row)] = arrays[name]
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged archive
        raise ValueError(f"{path} is missing or damaged ({error}); run the analysis again") from None

    def column(name: str) -> np.ndarray:
        values = table[name]
        if not arrow.types.is_string(values.type):
            return np.array(values)
        words = values.combine_chunks().dictionary_encode()  # a string for each class, not for each anchor
        return np.asarray(words.dictionary.to_pylist(), np.str_)[words.indices]

    groups = np.asarray(need("pyarrow.compute", "pxgen").index_in(table["group"], arrow.array(GROUPS)), np.uint8)
    limits = []
    for entry in result["thresholds"]:
        for name in ("value", "std", "spread"):
            entry[name] = float(entry[name])
        limits.append(Threshold(**{**entry, "iterations": [float(value) for value in entry["iterations"]]}))
    report = Report(
        settings=result["settings"],
        versions=result["versions"],
        seeds=result["seeds"],
        criteria={name: column(_column(name)) for name in result["criteria"]},
        kinds=result["criteria"],
        thresholds=limits,
        groups=groups,
        labels=column("label") if "label_counts" in result else None,
        names=result["names"],
        summaries=[GroupSummary(name, result["counts"][name], result["shares"][name]) for name in result["counts"]],
        representatives=[],
        signatures=result["signatures"],
        originals=pictures["original"],
        reconstructions=pictures["reconstruction"],
        sensitivity=result["sensitivity"],
        findings=result["findings"],
    )
    report.representatives = [
        Representatives(
            **{
                **entry,
                "objective": float(entry["objective"]),
                "bound": None if entry["bound"] is None else float(entry["bound"]),
            },
            nearest=np.zeros(0, np.int64),
        )
        for entry in result["representatives"]
    ]
    for position, (entry, name) in enumerate(zip(report.representatives, _nearest_names(report), strict=True)):
        if not entry.indices:
            continue
        numbers = table[name].fill_null(-1).to_numpy()[report.members(entry.group)]
        order = np.argsort(entry.indices)
        nearest = order[np.searchsorted(np.asarray(entry.indices), numbers, sorter=order)].astype(np.int64)
        report.representatives[position] = Representatives(**{**vars(entry), "nearest": nearest})
    return report
