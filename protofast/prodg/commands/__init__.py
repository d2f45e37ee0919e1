"""The commands ``protofast prodg …``: each reads a run's folder, calls the library, and writes a folder in it."""

from __future__ import annotations

from importlib import import_module

import typer

COMMANDS = ("prepare", "train", "explain", "evaluate", "ablate", "report", "study")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""ProDG: prototypes of a frozen classifier without any data (arXiv 2605.08858), with EPIC and InfoDisent.

Make a classifier and a generator to work on, learn what the classifier's channels show, and explain an image:

`protofast prodg prepare --data fashion-mnist --out runs/prodg`

`protofast prodg train runs/prodg`

`protofast prodg explain runs/prodg --image boot.png`

`protofast prodg study --out runs/prodg` does all of it, three times, and writes a page.
""",
)
for _name in COMMANDS:
    app.command(_name)(getattr(import_module(f".{_name}", __name__), _name))
