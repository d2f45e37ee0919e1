"""A report as one HTML page that needs nothing outside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

from .._optional import need
from . import figures
from .result import GROUPS, Report, Representatives

MEANING = {
    "HIHE": "Familiar and well reproduced: the model knows these anchors and draws them right.",
    "HILE": "“Model delusion”: the model is sure and wrong. It takes the anchor for something it knows and draws that.",
    "LIHE": "“Aligned conception”: unfamiliar, yet well reproduced from what the model knows of other images.",
    "LILE": "Unfamiliar and badly reproduced: outside what the model has learnt.",
}
_HEADLINE = {
    "HIHE": "The model knows {count} of {total} anchors ({share}) and draws them right",
    "HILE": "The model is sure and wrong on {count} of {total} anchors ({share})",
    "LIHE": "The model draws {count} of {total} anchors ({share}) right without knowing them",
    "LILE": "{count} of {total} anchors ({share}) lie outside what the model has learnt",
}
_MOST_CLASSES = 30


def headline(report: Report) -> str:
    """The largest group, in one sentence.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
    """
    if not len(report):
        return "There were no anchors to explain"
    largest = max(report.summaries, key=lambda summary: summary.count)
    return _HEADLINE[largest.name].format(
        count=f"{largest.count:,}", total=f"{len(report):,}", share=_percent(largest.share)
    )


def to_html(report: Report, *, page: bool = False, scatter: bytes | None = None) -> str:
    """The report as HTML with nothing outside it: a fragment for a notebook, or a whole page.

    Parameters
    ----------
    report : Report
    page : bool, default False
    scatter : bytes, optional
        The scatter as a PNG file, when it is already drawn.

    Returns
    -------
    str
    """
    jinja2 = need("jinja2", "pxgen")
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("protofast.pxgen"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    inner = [figures.shown(name) for name, kind in report.kinds.items() if kind == "intrinsic"]
    outer = [figures.shown(name) for name, kind in report.kinds.items() if kind == "extrinsic"]
    return templates.get_template("report.html.j2").render(
        report=report,
        page=page,
        css=_style(),
        headline=headline(report),
        subject=_subject(report),
        findings=report.findings or [MEANING[name] for name in _largest(report)],
        rule=(
            f"An anchor has high intrinsic affinity (HI) when {_all_below(inner)}, so that the model finds it "
            f"familiar, and high extrinsic affinity (HE) when {_all_below(outer)}, so that the model reproduces it "
            "well. The two answers make four groups."
        ),
        cards=list(_cards(report)),
        scatter=_embedded(scatter or figures.png(figures.scatter(report))),
        several=len(inner) > 1,
        marks="Anchors, darker where there are more" if figures.dense(report) else "Each mark is an anchor",
        kinds=f"{_listed(inner)} (intrinsic) and {_listed(outer)} (extrinsic)",
        origin=_origin(report),
        thresholds=[
            {
                "criterion": figures.shown(limit.criterion),
                "kind": limit.kind,
                "value": f"{limit.value:.6g}",
                "std": f"{limit.std:.3g}" if len(limit.iterations) > 1 else "–",
                "spread": _percent(limit.spread) if len(limit.iterations) > 1 else "–",
                "iterations": len(limit.iterations) or "–",
                "method": limit.method,
            }
            for limit in report.thresholds
        ],
        sensitivity=_sensitivity(report),
        galleries=[gallery for entry in report.representatives if (gallery := _gallery(report, entry))["pairs"]],
        groups=GROUPS,
        **_classes(report),
        settings=list(_settings(report)),
    )


def _style() -> Any:
    from importlib.resources import files

    from markupsafe import Markup

    return Markup(files("protofast.pxgen").joinpath("templates/report.css").read_text(encoding="utf-8"))


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _largest(report: Report) -> list[str]:
    return [max(report.summaries, key=lambda summary: summary.count).name] if len(report) else []


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return str(share)
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _all_below(names: list[str]) -> str:
    return f"its {_listed(names)} {'is' if len(names) == 1 else 'are all'} below the threshold"


def _subject(report: Report) -> str:
    return str(report.settings.get("subject") or report.settings.get("model", ""))


def _cards(report: Report) -> Iterator[dict[str, Any]]:
    by_group = None if report.labels is None else report.label_table()
    for summary in report.summaries:
        classes = ""
        if by_group is not None and summary.count:
            counts = sorted(by_group[summary.name].items(), key=lambda item: -item[1])
            top = [f"{name} ({count:,})" for name, count in counts[:3] if count]
            classes = f"{'Mostly' if sum(1 for _, count in counts if count) > 3 else 'Only'} class {_listed(top)}."
        yield {
            "name": summary.name,
            "count": summary.count,
            "percent": _percent(summary.share),
            "width": f"{100 * summary.share:.2f}",
            "meaning": MEANING[summary.name],
            "classes": classes,
        }


def _origin(report: Report) -> str:
    methods = {limit.method for limit in report.thresholds}
    if methods == {"given"}:
        return "The thresholds were given by the user."
    text = (
        "The thresholds come from the model itself, not from the anchors: it generates samples, they are passed "
        "through it again, and each criterion's maximum (or percentile) over them is averaged over the iterations. "
        "Spread is the standard deviation over the iterations relative to the threshold; over 20 % means too few."
    )
    return text + (" Those marked “given” were set by the user." if "given" in methods else "")


def _sensitivity(report: Report) -> dict[str, Any] | None:
    table = dict(report.sensitivity)
    factors = table.pop("factors", None)
    if not factors or not table:
        return None
    rows = [(figures.shown(name), [f"{int(count):,}" for count in counts]) for name, counts in table.items()]
    return {"factors": [f"{factor:g}" for factor in factors], "rows": rows}


def _gallery(report: Report, entry: Representatives) -> dict[str, Any]:
    pairs = []
    for row in map(int, entry.indices):
        if row not in report.originals:
            continue
        rebuilt = report.reconstructions.get(row)
        pairs.append(
            {
                "number": f"{row:,}",
                "label": None if report.labels is None else report._name(report.labels[row]),
                "criteria": [f"{figures.shown(name)} {values[row]:.3g}" for name, values in report.criteria.items()],
                "small": max(report.originals[row].shape[-2:]) <= 96,
                "original": _embedded(figures.picture(report.originals[row])),
                "reconstruction": None if rebuilt is None else _embedded(figures.picture(rebuilt)),
            }
        )
    aim = {
        "k-center": "so that every anchor of the group is near one (covering radius",
        "k-dispersion": "so that they differ from each other (smallest distance",
        "k-medoids": "so that they are close to the rest on the whole (total distance",
    }[entry.algorithm]
    note = (
        f"{len(entry.indices)} of {len(report.members(entry.group)):,}, by {entry.algorithm} on {entry.features} "
        f"({entry.metric}), {aim} {entry.objective:.4g}"
        + (f"; no choice of {len(entry.indices)} does better than {entry.bound:.4g}" if entry.bound is not None else "")
        + "). Left the anchor, right what the model makes of it."
    )
    return {"group": entry.group, "note": note, "pairs": pairs}


def _classes(report: Report) -> dict[str, Any]:
    if report.labels is None or not len(report):
        return {"classes": [], "more_classes": ""}
    table = report.label_table()
    by_group = [table[name] for name in GROUPS]
    total = {name: sum(counts[name] for counts in by_group) for name in by_group[0]}
    names = list(total)
    if len(names) > _MOST_CLASSES:
        kept = set(sorted(names, key=lambda name: -total[name])[:_MOST_CLASSES])
        names = [name for name in names if name in kept]
    rows = [
        {
            "name": name,
            "counts": [f"{counts[name]:,}" if counts[name] else "–" for counts in by_group],
            "widths": [
                (group, f"{100 * counts[name] / total[name]:.2f}")
                for group, counts in zip(GROUPS, by_group, strict=True)
            ],
            "total": f"{total[name]:,}",
        }
        for name in names
    ]
    missing = len(total) - len(names)
    return {"classes": rows, "more_classes": f"The {missing:,} smaller classes are left out here." if missing else ""}


def _settings(report: Report) -> Iterator[tuple[str, str]]:
    for name, value in report.settings.items():
        yield name.replace("_", " "), _shown(value)
    for name, seed in report.seeds.items():
        yield (name if "seed" in name else f"seed of {name}"), str(seed)
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
