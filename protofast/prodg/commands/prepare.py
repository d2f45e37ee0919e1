"""The command ``protofast prodg prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Progress, Seed

Option = typer.Option


def prepare(
    data: Annotated[
        str,
        Option(help="`fashion-mnist`, `mnist` or a folder with idx files; or `photographs` that lie inside packages."),
    ] = "fashion-mnist",
    folder: Annotated[
        Path | None, Option(help="Of the data's files; of photographs, more of them (`…_0646.png` is of class 646).")
    ] = None,
    network: Annotated[
        str | None,
        Option(help="`cnn`, which is trained; or `efficientnet-lite0`, ImageNet's, which is the one for photographs."),
    ] = None,
    channels: Annotated[int, Option(min=2, help="Of the cnn's features; even.")] = 64,
    epochs: Annotated[int, Option(min=1, help="Of the cnn.")] = 5,
    updates: Annotated[int, Option(min=1, help="Of the generator.")] = 4000,
    limit: Annotated[int | None, Option(min=2, help="Images to train both on; by default all.")] = None,
    seed: Seed = 0,
    out: Annotated[Path, Option(help="Folder of the run.")] = Path("runs/prodg"),
    progress: Progress = True,
) -> None:
    """Make what is to be explained, and what draws: a classifier and a generator of small images.

    In a real use both are there already: any network with a linear head over pooled features, and FLUX. Here a small
    network learns to tell the images (92 % of Fashion-MNIST) and a small flow to draw them from the names of their
    classes, in a few minutes on two cores; both are cached. ProDG itself then never opens an image again.

    For photographs there is ImageNet's EfficientNet-Lite0, from two packages, and no generator: EPIC alone.

    **Examples**

    `protofast prodg prepare --data fashion-mnist --out runs/prodg`

    `protofast prodg prepare --data photographs --out runs/photographs`
    """
    from .. import runs

    chosen = network or (runs.LITE if data == runs.PHOTOGRAPHS else "cnn")
    run = runs.prepare(
        out,
        data=data,
        folder=folder,
        network=chosen,
        channels=channels,
        epochs=epochs,
        updates=updates,
        limit=limit,
        seed=seed,
        progress=progress,
    )
    made = run.network()
    typer.echo(f"{made.title}: {made.channels} channels, {made.classes} classes: {run.folder.resolve()}")
    method = " --method epic" if chosen == runs.LITE else ""
    typer.echo(f"Learn what its channels show: protofast prodg train {out}{method}")
