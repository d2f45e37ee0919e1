"""Pictures of a result, drawn from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import results

_OURS = ("#0b6e4f", "#21a179", "#8fd6b8")
_OTHERS = ("#b23a48", "#e08e45", "#4a6fa5", "#8d6a9f", "#7a7a7a", "#c9b458")
_LIMIT = "#000000"


def draw(path: str | Path) -> list[Path]:
    """One PNG an op beside the result at `path`; needs matplotlib."""
    path = Path(path)
    result = results.load(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op and not row["wrong"]]
        if not rows:
            continue
        figure = Figure(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        _bars(figure.add_subplot(), rows, colours(rows))
        hardware, flags = result["environment"]["hardware"], result["environment"]["flags"]
        where = hardware.get("gpu", f"{hardware['cpu']}, {flags['threads']} threads")
        figure.suptitle(f"{op} on {where}, torch {result['environment']['versions']['torch']}", fontsize=10)
        target = path.with_name(f"{path.stem}-{op}.png")
        temporary = target.with_name(f".{target.name}")
        figure.savefig(temporary, format="png", dpi=140)
        temporary.replace(target)
        drawn.append(target)
    return drawn


def colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Greens for this package, black for the limit."""
    found: dict[str, str] = {}
    used = {"protofast": 0, "baseline": 0}
    for row in rows:
        if row["contender"] in found:
            continue
        if row["role"] == "limit":
            found[row["contender"]] = _LIMIT
            continue
        palette = _OURS if row["role"] == "protofast" else _OTHERS
        found[row["contender"]] = palette[used[row["role"]] % len(palette)]
        used[row["role"]] += 1
    return found


def _bars(axes: Any, rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    """Horizontal bars to the median, whiskers from p20 to p80, cases apart from each other."""
    place, ticks, labels = 0.0, [], []
    fastest = min(row["seconds"]["p20"] for row in rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        place += 1.3
        axes.text(fastest * 0.45, place, case, fontsize=7.5, weight="bold", va="center")
        for row in (row for row in rows if row["case"] == case):
            place += 1
            spread = row["seconds"]
            whisker = [[spread["p50"] - spread["p20"]], [spread["p80"] - spread["p50"]]]
            axes.barh(place, spread["p50"], color=colour[row["contender"]], height=0.8)
            axes.errorbar(spread["p50"], place, xerr=whisker, color="#555555", capsize=2, lw=0.8)
            axes.text(spread["p80"] * 1.08, place, results.seconds(spread["p50"]), fontsize=6.5, va="center")
            ticks.append(place)
            labels.append(row["contender"])
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(fastest * 0.4, max(row["seconds"]["p80"] for row in rows) * 4)
    axes.set_ylim(place + 0.8, 0.4)
    axes.set_xlabel("seconds a call: median, p20–p80")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
