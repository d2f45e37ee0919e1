"""What the grid of k-center says: goals, ratios by cell, the cells that lose, what a pass over the points costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from protofast._ops.selection import ENGINES

from .results import seconds as with_unit
from .selection_grid import COPY, PEERS, Line
from .specs.farthest_first import LAZY_POOL, LOOPS, PACKAGES

MEMORY = 1 << 26
"""Bytes of points that are more than the caches hold."""


def best(line: Line, names: Iterable[str]) -> tuple[float, str] | None:
    """How many times the time of ours the fastest of `names` takes, and who that is. Where all that could run were left
    out for their time, only the least is known: (ratio, ""). None without any."""
    times = {name: line["faster_than"][name] for name in names if name in line["faster_than"]}
    if times:
        name = min(times, key=lambda name: times[name])
        return times[name], name
    if any(line["left_out"].get(name, {}).get("seconds") for name in names):
        return line["patience"] / _seconds(line, line["ours"]), ""
    return None


def engine(line: Line) -> str | None:
    """Our fastest engine where they were measured."""
    names = {f"{line['ours']} {engine}": engine for engine in ENGINES[1:]}
    own = {engine: _seconds(line, name) for name, engine in names.items() if name in line["rows"]}
    return min(own, key=lambda engine: own[engine]) if own else None


def goals(lines: list[Line]) -> list[dict[str, Any]]:
    """What was promised, over the cells that there are: the median and the worst of the ratios."""

    def high(data: str) -> Callable[[Line], bool]:
        def test(line: Line) -> bool:
            p = line["params"]
            return p["data"] == data and p["d"] >= 64 and p["k"] >= 100 and p["n"] >= 100_000

        return test

    def low(line: Line) -> bool:
        return line["params"]["d"] <= 3 and line["params"]["n"] >= 100_000

    def everywhere(line: Line) -> bool:
        return True

    packages = list(PACKAGES)
    wanted: list[tuple[str, Callable[[Line], bool], list[str], float, str]] = [
        ("the best peer, every cell", everywhere, PEERS, 1, "worst"),
        ("the best peer, median cell", everywhere, PEERS, 2, "median"),
        ("the best peer, Gaussian, d ≥ 64, k ≥ 100, n ≥ 10⁵", high("gaussian"), PEERS, 5, "worst"),
        ("the best peer, clustered, d ≥ 64, k ≥ 100, n ≥ 10⁵", high("clustered"), PEERS, 3, "worst"),
        ("the best package, Gaussian, d ≥ 64, k ≥ 100, n ≥ 10⁵", high("gaussian"), packages, 10, "worst"),
        ("the best package, clustered, d ≥ 64, k ≥ 100, n ≥ 10⁵", high("clustered"), packages, 10, "worst"),
        ("torch_quickfps, d ≤ 3, n ≥ 10⁵", low, ["torch_quickfps"], 1.5, "worst"),
        (f"{LAZY_POOL}, where pool is our fastest", lambda line: engine(line) == "pool", [LAZY_POOL], 2, "worst"),
    ]
    found = []
    for name, test, against, bound, of in wanted:
        ratios = [known[0] for line in lines if test(line) and (known := best(line, against))]
        goal: dict[str, Any] = {"goal": name, "bound": bound, "of": of, "cells": len(ratios), "met": None}
        if ratios:
            told = {"median": statistics.median(ratios), "worst": min(ratios)}
            goal |= {**told, "short": sum(value < bound for value in ratios), "met": told[of] >= bound}
        found.append(goal)
    return found


def one_pass(lines: list[Line]) -> list[tuple[str, float, float]]:
    """What a further choice of the plain engine costs: (points, seconds, share of the bandwidth of a copy). Of points
    that caches hold it would say nothing."""
    found = []
    shapes: dict[tuple[str, int, int], dict[int, Line]] = {}
    for line in lines:
        p = line["params"]
        if f"{line['ours']} plain" in line["rows"] and 4 * p["n"] * p["d"] >= MEMORY:
            shapes.setdefault((p["data"], p["d"], p["n"]), {})[p["k"]] = line
    for (data, d, n), by_count in shapes.items():
        few, many = min(by_count), max(by_count)
        if few < many:
            first, last = (_seconds(by_count[k], f"{by_count[k]['ours']} plain") for k in (few, many))
            if (seconds := (last - first) / (many - few)) > 0:
                found.append((f"{data} n={n} d={d}", seconds, _seconds(by_count[many], COPY) / seconds))
    return found


def _seconds(line: Line, name: str) -> float:
    return float(line["rows"][name]["seconds"]["p50"])


def to_markdown(lines: list[Line]) -> str:
    """Goals, ratios by cell, the cells that lose, what a pass costs, who was left out and why."""
    where = lines[-1]["environment"]
    commits = list(dict.fromkeys(str(line["environment"]["commit"]) for line in lines))
    loads = [line["load"] for line in lines if line["load"] is not None]
    text = [
        "# k-center: the grid",
        "",
        f"{where['hardware']['cpu']}, {where['flags']['threads']} threads, {lines[-1]['ours']}; {len(lines)} cells; "
        f"load of the machine {min(loads, default=0):.1f} to {max(loads, default=0):.1f}; commit {', '.join(commits)}; "
        f"{', '.join(f'{k} {v}' for k, v in where['versions'].items())}.",
        "",
        "Ratios are the fastest peer's time over ours, medians of the rounds; `>` where every one was left out for its "
        "time, of which only the least is known. All give the choices alone (ours: assign=False).",
        "",
        "## Goals",
        "",
        "| times faster than | goal | median | worst | cells | below | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for goal in goals(lines):
        told = ["–", "–", 0, "–", "not measured"]
        if goal["met"] is not None:
            figures = (f"{goal[key]:.3g}" for key in ("median", "worst"))
            told = [*figures, goal["cells"], goal["short"], "yes" if goal["met"] else "**no**"]
        text.append(_row([goal["goal"], f"≥ {goal['bound']} ({goal['of']})", *told]))
    for data in dict.fromkeys(line["params"]["data"] for line in lines):
        some = [line for line in lines if line["params"]["data"] == data]
        counts = sorted({line["params"]["k"] for line in some})
        text += [
            "",
            f"## {data}",
            "",
            _row(["d", "n", *(f"k = {k}" for k in counts)]),
            "|---" * (len(counts) + 2) + "|",
        ]
        table: dict[tuple[int, int], dict[int, Line]] = {}
        for line in some:
            table.setdefault((line["params"]["d"], line["params"]["n"]), {})[line["params"]["k"]] = line
        for (d, n), by_count in sorted(table.items()):
            text.append(_row([d, f"{n:,}", *(_cell(by_count[k]) if k in by_count else "" for k in counts)]))
    text += ["", "## Cells that lose", ""]
    lost = [line for line in lines if (known := best(line, PEERS)) and known[0] < 1]
    text += [f"- {line['case']}: {_cell(line)}" for line in lost] or ["None."]
    if passes := one_pass(lines):
        text += [
            *("", "## One pass", ""),
            "What a further choice of the plain engine costs, and the share of the bandwidth of a copy with which it "
            "reads the points.",
            *("", "| points | one pass | share of copy bandwidth |", "|---|---|---|"),
            *(_row([name, with_unit(seconds), f"{100 * share:.0f} %"]) for name, seconds, share in passes),
        ]
    text += [
        *("", "## In readings of the points", ""),
        "Our time over that of reading the points once at the bandwidth of a copy; one pass a choice would be k.",
        *("", _row(["cell", *ENGINES]), "|---" * (len(ENGINES) + 1) + "|"),
    ]
    for line in lines:
        shown = [line["rows"].get(name) for name in (line["ours"], *(f"{line['ours']} {e}" for e in ENGINES[1:]))]
        unit = _seconds(line, COPY)
        values = [f"{row['seconds']['p50'] / unit:.3g}" + " **wrong**" * row["wrong"] if row else "" for row in shown]
        text.append(_row([line["case"], *values]))
    text += ["", "## Every contender", ""]
    others = [*LOOPS, *PACKAGES]
    text += [_row(["cell", "ours", *others]), "|---" * (len(others) + 2) + "|"]
    for line in lines:
        text.append(_row([line["case"], *(_time(line, name) for name in (line["ours"], *others))]))
    absent: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        for name, told in line["left_out"].items():
            if told["seconds"] is None:
                absent.setdefault((name, told["reason"]), []).append(line["case"])
    if absent:
        text += ["", "## Left out", ""]
        for (name, reason), places in absent.items():
            text.append(f"- {name} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''}): {reason}")
    return "\n".join(text) + "\n"


def _row(cells_of: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells_of))} |"


def _cell(line: Line) -> str:
    own, known = with_unit(_seconds(line, line["ours"])), best(line, PEERS)
    if known is None:
        return own
    value, name = known
    shown = f"{value:.3g}× {name}" if name else f"> {value:.3g}×"
    return f"{f'**{shown}**' if value < 1 else shown} ({own})"


def _time(line: Line, name: str) -> str:
    if row := line["rows"].get(name):
        return with_unit(_seconds(line, name)) + " **wrong**" * row["wrong"]
    told = line["left_out"].get(name, {}).get("seconds")
    return f"≈ {with_unit(told)}" if told else ""
