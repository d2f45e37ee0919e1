"""``protofast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Which ops; all if none is named (see --list).")] = None,
    shapes: Annotated[str, typer.Option(help="quick (minutes) or full.")] = "quick",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Which of protofast's backends take part; repeatable; all by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON, CSV, Markdown and PNG files.")] = Path("results"),
    name: Annotated[str | None, typer.Option(help="File name without suffix; the GPU's or CPU's by default.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An older JSON: print new/old and exit with 2 on a regression.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    budget: Annotated[float | None, typer.Option(min=0.01, help="Seconds of timing a case.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of drawn shapes, inputs and the order of contenders; new shapes each run if not given."),
    ] = None,
    redraw: Annotated[Path | None, typer.Option(help="Draw the plots of this JSON again, and time nothing.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print ops, cases and contenders, and time nothing.")] = False,
) -> None:
    """Time every op against what people run today, and against the limit of this machine."""
    if redraw is not None:
        from . import plots

        for path in plots.draw(redraw):
            typer.echo(path)
        return
    from . import results, runner

    if list_:
        typer.echo(_listing())
        return
    old = results.load(compare) if compare is not None else None  # before the long run, not after it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("measuring the machine")

        def show(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label)

        result = runner.run(
            ops or (),
            shapes=shapes,
            device=device,
            backends=backend or (),
            out=out,
            name=name,
            threads=threads,
            budget=budget,
            seed=seed,
            progress=show,
        )
    path = out / f"{name or runner.environment.name(result['device'])}.json"
    typer.echo(results.to_markdown(result))
    typer.echo(f"written: {path}, {path.with_suffix('.csv').name}, {path.with_suffix('.md').name}")
    try:
        from . import plots

        typer.echo("drawn: " + ", ".join(p.name for p in plots.draw(path)))
    except ImportError:
        typer.echo("no plots: pip install 'protofast[bench]', then --redraw the JSON")
    if old is not None:
        table, regressions = results.compare(result, old)
        typer.echo(f"\n## Against {compare}\n\n{table}")
        if regressions:
            typer.echo(f"{regressions} rows of protofast regressed beyond noise", err=True)
            raise typer.Exit(2)


def _listing() -> str:
    from .specs import SPECS

    lines = []
    for spec in SPECS.values():
        lines += [f"{spec.op} ({', '.join(spec.devices)}): {spec.about}"]
        lines += [f"    {case.name}{'' if case.quick else '  [full]'}" for case in spec.cases]
        lines += [f"    against {', '.join(spec.contenders)}; limit {', '.join(spec.limits) or 'none'}", ""]
    return "\n".join(lines).rstrip()
