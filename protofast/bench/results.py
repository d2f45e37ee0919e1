"""Result files: JSON (everything), CSV (a row a contender), Markdown (for people), and comparison with an older run."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

from protofast._files import replacing

from .spec import Case, Spec

_NOISE = 1.05
"""A change counts when the p20–p80 ranges of both runs lie this far apart."""


def write_all(path: Path, result: dict[str, Any]) -> list[Path]:
    """Writes the JSON at `path`, and the CSV and Markdown beside it."""
    write_json(path, result)
    _write(path.with_suffix(".csv"), to_csv(result))
    _write(path.with_suffix(".md"), to_markdown(result))
    return [path, path.with_suffix(".csv"), path.with_suffix(".md")]


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes `result`, whole or not at all."""
    _write(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Reads a result; a file that is none gives ValueError with its name."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no benchmark result: {error}") from error
    if not isinstance(result, dict) or result.get("format") != 1:
        raise ValueError(f"{path} is no benchmark result of this version; run the benchmark again")
    return result


def check_targets(spec: Spec, case: Case, device: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spec's targets for this case, with what was measured."""
    found = []
    by_name = {row["contender"]: row for row in rows}
    for target in spec.targets:
        if target.case != case.name or target.device != device:
            continue
        row = by_name.get(target.contender)
        measured = None
        if row is not None and not row["wrong"]:
            if target.against is None:
                measured = row["seconds"]["p50"]
            elif target.against in row["faster_than"]:
                measured = row["faster_than"][target.against]["p50"]
        met = measured is not None and (
            measured <= target.bound if target.against is None else measured >= target.bound
        )
        found.append(
            {
                "op": spec.op,
                "case": case.name,
                "contender": target.contender,
                "against": target.against,
                "bound": target.bound,
                "measured": measured,
                "met": met,
            }
        )
    return found


_MEMORY = 1 << 20
"""Smaller peaks drown in the noise of the resident set."""


def check_medians(spec: Spec, device: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spec's medians over the cases in `rows`, and the worst of them; met only if every such case was measured."""
    found = []
    for median in spec.medians:
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if row["op"] == spec.op and all(row["params"].get(k) == v for k, v in median.where.items()):
                cases.setdefault(row["case"], {})[row["contender"]] = row
        if median.device != device or not cases:
            continue
        memory, values = median.of != "seconds", []
        names = (median.contender,) if isinstance(median.contender, str) else median.contender
        for case in list(cases):
            other = cases[case].get(median.against)
            theirs = _memory(other, median.of) if memory and other is not None else None
            if theirs is not None and theirs < _MEMORY:
                del cases[case]
                continue
            ours = [cases[case][name] for name in names if name in cases[case] and not cases[case][name]["wrong"]]
            if memory and theirs:
                measured = [mine / theirs for row in ours if (mine := _memory(row, median.of)) is not None]
            else:
                measured = [
                    row["faster_than"][median.against]["p50"]
                    for row in ours
                    if not memory and median.against in row["faster_than"]
                ]
            if measured:
                values.append((min if memory else max)(measured))
        middle = statistics.median(values) if values else None
        worst = (max if memory else min)(values, default=None)
        met = middle is not None and (middle <= median.bound if memory else middle >= median.bound)
        found.append(
            {
                "op": spec.op,
                "case": f"{median.name}, median of {len(values)} of {len(cases)} cases",
                "contender": " or ".join(names),
                "against": median.against,
                "of": median.of,
                "bound": median.bound,
                "measured": middle,
                "worst": worst,
                "met": met and len(values) == len(cases),
            }
        )
    return found


def _memory(row: dict[str, Any], of: str) -> int | None:
    peak: int | None = row["peak_memory"]
    return peak if peak is None or of == "peak_memory" else max(peak - (row["returned"] or 0), 0)


def to_csv(result: dict[str, Any]) -> str:
    """One line a row; `times faster than X` columns for every baseline that occurs."""
    others = sorted({other for row in result["rows"] for other in row["faster_than"]})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    plain = [
        "op",
        "case",
        "device",
        "contender",
        "role",
        "rounds",
        "inner",
        "limit",
        "bytes",
        "flops",
        "error",
        "wrong",
    ]
    spread = ["seconds", "wall", "times_limit"]
    writer.writerow(
        [*plain, "peak_memory", *(f"{s}_{q}" for s in spread for q in ("p20", "p50", "p80"))]
        + [f"times faster than {other}" for other in others]
    )
    for row in result["rows"]:
        values = [row[key] for key in (*plain, "peak_memory")]
        values += [(row[s] or {}).get(q) for s in spread for q in ("p20", "p50", "p80")]
        values += [row["faster_than"].get(other, {}).get("p50") for other in others]
        writer.writerow(["" if v is None else v for v in values])
    return stream.getvalue()


def to_markdown(result: dict[str, Any]) -> str:
    """Tables by op, under what they were measured on."""
    where = result["environment"]
    hardware, flags = where["hardware"], where["flags"]
    gpu = f"{hardware['gpu']} (sm {hardware['capability']}, driver {hardware['driver']}), " if "gpu" in hardware else ""
    rates = ", ".join(
        f"{name} {rate / 1e9:,.1f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, rate in result["machine"].items()
    )
    lines = [
        f"# {hardware.get('gpu', hardware['cpu'])}",
        "",
        f"{gpu}{hardware['cpu']}, {hardware['cores']} cores, {hardware['isa']}; measured here: {rates}.",
        "",
        f"{', '.join(f'{k} {v}' for k, v in where['versions'].items())}; commit {where['commit'] or 'unknown'}; "
        f"{where['when']}.",
        "",
        f"{flags['threads']} threads; TF32 matmul {_on(flags['tf32_matmul'])}, cudnn {_on(flags['tf32_cudnn'])}; "
        f"float32 matmul precision {flags['float32_matmul_precision']}; load before {_number(where['load'])}, "
        f"after {_number(where.get('load_after'))}; {result['shapes']} shapes"
        f"{'' if result['complete'] else '; **stopped before its end**'}.",
    ]
    if busy(result):
        lines += ["", f"**{busy(result)}**"]
    if result["targets"]:
        lines += ["", "## Targets", "", "| target | measured | met |", "|---|---|---|"]
        lines += [f"| {_target(t)} | {_measured(t)} | {'yes' if t['met'] else '**no**'} |" for t in result["targets"]]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        limits = {row["contender"] for row in rows if row["role"] == "limit"}
        wall = any(row["wall"] for row in rows)
        head = [
            "case",
            "contender",
            "median",
            "p20–p80",
            "rounds",
            *(["wall"] if wall else []),
            "× limit",
            "peak memory",
            "error",
        ]
        lines += ["", f"## {op}", "", "| " + " | ".join([*head, "faster than"]) + " |", "|---" * (len(head) + 1) + "|"]
        for row in rows:
            spread, limit = row["seconds"], row["times_limit"]
            cells = [row["case"], row["contender"], seconds(spread["p50"])]
            cells.append(f"{seconds(spread['p20'])}–{seconds(spread['p80'])}")
            cells.append(str(row["rounds"]))
            if wall:
                cells.append(seconds(row["wall"]["p50"]) if row["wall"] else "")
            cells.append(f"{limit['p50']:.3g}" if limit else "")
            cells.append(_bytes(row["peak_memory"]))
            cells.append("**wrong** " * row["wrong"] + (f"{row['error']:.1e}" if row["error"] is not None else ""))
            others = [(o, r["p50"]) for o, r in row["faster_than"].items() if o not in limits]
            cells.append(", ".join(f"{other} {times:.3g}×" for other, times in others))
            lines.append("| " + " | ".join(cells) + " |")
    if result["skipped"]:
        lines += ["", "## Left out", ""]
        reasons: dict[tuple[str, str], list[str]] = {}
        for s in result["skipped"]:
            reasons.setdefault((s["contender"], s["reason"]), []).append(f"{s['op']} {s['case']}")
        for (contender, reason), places in reasons.items():
            lines.append(f"- {contender} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''}): {reason}")
    return "\n".join(lines) + "\n"


def busy(result: dict[str, Any]) -> str | None:
    """A warning when other processes took part."""
    where = result["environment"]
    if where["load"] is None or where["load"] < 0.5 * where["hardware"]["cores"]:
        return None
    return f"The machine was busy (load {where['load']:.1f} before the run): trust ratios within a row, not times."


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[str, int]:
    """A table of new against old times, and how many rows regressed beyond noise.

    Times are taken relative to the limit measured in the same run wherever there is one, so that a slower day of the
    machine is not taken for a slower kernel.
    """
    before = {_key(row): row for row in old["rows"]}
    lines, regressions = [], 0
    for row in new["rows"]:
        past = before.get(_key(row))
        if past is None or row["role"] == "limit":
            continue
        unit = (
            "times_limit" if row["times_limit"] and past["times_limit"] and row["limit"] == past["limit"] else "seconds"
        )
        now, then = row[unit], past[unit]
        verdict = "same"
        if now["p20"] > then["p80"] * _NOISE:
            verdict = "slower"
            regressions += row["role"] == "protofast"
        elif now["p80"] * _NOISE < then["p20"]:
            verdict = "faster"
        if row["wrong"] and not past["wrong"]:
            verdict = "now wrong"
            regressions += row["role"] == "protofast"
        lines.append(
            f"| {row['op']} | {row['case']} | {row['contender']} | {now['p50'] / then['p50']:.2f} | "
            f"{'of the limit' if unit == 'times_limit' else 'seconds'} | {verdict} |"
        )
    head = ["| op | case | contender | new / old | measured in | verdict |", "|---|---|---|---|---|---|"]
    places = [r["environment"]["hardware"].get("gpu", r["environment"]["hardware"]["cpu"]) for r in (old, new)]
    note = [] if places[0] == places[1] else ["", f"The old run was on {places[0]}, this one on {places[1]}."]
    then, now = (r["environment"]["flags"] for r in (old, new))
    if differ := [f"{flag} {then.get(flag)} then, {now[flag]} now" for flag in now if now[flag] != then.get(flag)]:
        note += ["", f"The settings differ: {'; '.join(differ)}."]
    here = {_key(row) for row in new["rows"]}
    if missing := [key for key in before if key not in here and key[0] in {row["op"] for row in new["rows"]}]:
        note += ["", f"{len(missing)} rows of the old run are not in this one, such as {' '.join(missing[0])}."]
    return "\n".join(head + lines + note) + "\n", regressions


def seconds(value: float) -> str:
    """With a unit that suits."""
    for scale, unit in ((1e-6, "ns"), (1e-3, "µs"), (1, "ms")):
        if value < scale:
            return f"{value / scale * 1000:.3g} {unit}"
    return f"{value:.3g} s"


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["op"], row["case"], row["device"], row["contender"]


def _target(target: dict[str, Any]) -> str:
    head = f"{target['op']} {target['case']}: {target['contender']}"
    if target["against"] is None:
        return f"{head} in ≤ {seconds(target['bound'])}"
    if target.get("of", "seconds") != "seconds":
        less = ", of both without what they return" * (target["of"] == "extra_memory")
        return f"{head} ≤ {100 * target['bound']:.3g} % of the peak memory of {target['against']}{less}"
    if target["bound"] >= 1:
        return f"{head} ≥ {target['bound']:.3g}× as fast as {target['against']}"
    return f"{head} ≤ {1 / target['bound']:.3g}× the time of {target['against']}"


def _measured(target: dict[str, Any]) -> str:
    value = target["measured"]
    if value is None:
        return "not measured"
    if target["against"] is None:
        return seconds(value)
    worst = (
        f" (worst {_measured({**target, 'measured': target['worst'], 'worst': None})})" if target.get("worst") else ""
    )
    if target.get("of", "seconds") != "seconds":
        return f"{100 * value:.3g} %{worst}"
    return (f"{value:.3g}×" if target["bound"] >= 1 else f"{1 / value:.3g}×") + worst


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.1f} MiB" if value >= 2**17 else f"{value / 2**10:.0f} KiB"


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
