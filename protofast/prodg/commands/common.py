"""What the commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..._report.section import Section as _Section
from ..._report.section import tell as tell

Folder = Annotated[Path, typer.Argument(help="Folder that `protofast prodg prepare` wrote.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is random.")]
Device = Annotated[str | None, typer.Option(help="Where to run the networks, such as `cuda`.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; by default one of the command's name in RUN.")]


class Section(_Section):
    system = "prodg"
