"""The command ``protofast prodg report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Folder


def report(
    run: Folder,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in RUN.")] = None,
) -> None:
    """Gather what `explain`, `evaluate` and `ablate` found into one HTML page, which needs nothing outside it.

    **Example**

    `protofast prodg report runs/prodg`
    """
    from ..._files import replacing
    from ..page import to_html

    page = out or run / "report.html"
    if page.is_dir():
        raise IsADirectoryError(f"{page} is a folder; give the name of a file")
    html = to_html(run)
    with replacing(page) as file:
        file.write(html.encode())
    typer.echo(f"Report: {page.resolve()}")
