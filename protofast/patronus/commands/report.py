"""The command ``protofast patronus report``."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Data, Device, Progress, Root, Run, Seed

Option = typer.Option

COMMANDS = ("prototypes", "latent", "generate", "emergence", "diagnose", "evaluate")
"""Those whose results the report gathers, in the order in which they are run: some read what one before them wrote."""


def report(
    run: Run,
    only_existing: Annotated[
        bool, Option("--only-existing", help="Run no other command; show only the results that are there.")
    ] = False,
    data: Data = None,
    root: Root = None,
    seed: Seed = 0,
    out: Annotated[Path | None, Option(help="The page; by default report.html in RUN.")] = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Gather all that was found of a trained model into one HTML page, which needs nothing outside it.

    Runs every other command that has no results in RUN yet, with its default settings: minutes on two cores for a
    small model. To have other settings, run that command first. One that fails is named on the page with its error,
    and the rest goes on. The training log becomes a curve of the loss.

    **Examples**

    `protofast patronus report runs/fashion`

    `protofast patronus report runs/fashion --only-existing` (seconds)
    """
    from ..._files import replacing
    from ..model import read_config
    from ..page import RESULT, to_html

    page = out or run / "report.html"
    if page.is_dir():
        raise IsADirectoryError(f"{page} is a folder; give the name of a file")
    read_config(run)  # fails now where there is no model
    absent = [name for name in COMMANDS if not (run / name / RESULT).exists()]
    missing: dict[str, str] = {}
    if only_existing and absent:
        missing[", ".join(absent)] = "The command without --only-existing makes it."
    for name in [] if only_existing else absent:
        typer.echo(f"\n{name}")
        try:
            _call(name, run, data=data, root=root, seed=seed, device=device, progress=progress)
        except Exception as error:  # the other sections are worth having
            missing[name] = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            typer.secho(f"left out: {missing[name]}", fg="yellow", err=True)
    html = to_html(run, missing=missing)
    with replacing(page) as file:
        file.write(html.encode())
    typer.echo(f"\nReport: {page.resolve()}")


def _call(name: str, run: Path, **options: Any) -> None:
    """A command with its default settings, and those of the options that it has."""
    function = getattr(import_module(f".{name}", __package__), name)
    known = inspect.signature(function).parameters
    function(run, **{option: value for option, value in options.items() if option in known})
