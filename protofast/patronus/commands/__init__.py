"""The commands ``protofast patronus …``: each reads a trained model, calls the library, and writes a folder."""

from __future__ import annotations

from importlib import import_module

import typer

COMMANDS = ("train", "latent", "generate", "prototypes", "emergence", "diagnose", "evaluate", "report")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Patronus: a diffusion model that says what it sees (arXiv 2503.22782).

Train one, and look into it; every command after `train` takes the folder that it wrote:

`protofast patronus train --data fashion-mnist --preset cpu --out runs/fashion`

`protofast patronus report runs/fashion`
""",
)
for _name in COMMANDS:
    app.command(_name)(getattr(import_module(f".{_name}", __name__), _name))
