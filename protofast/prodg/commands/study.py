"""The command ``protofast prodg study``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Progress

Option = typer.Option


def study(
    data: Annotated[str, Option(help="As for `prepare`.")] = "fashion-mnist",
    folder: Annotated[Path | None, Option(help="Of the data's files.")] = None,
    seeds: Annotated[int, Option(min=1, help="Trainings of each method, with seeds 0, 1, ….")] = 3,
    updates: Annotated[int | None, Option(min=1, help="Of ProDG; by default those of the preset `cpu`.")] = None,
    ablation: Annotated[int, Option(min=0, help="Updates of each of the seven ablations; 0 leaves them out.")] = 1000,
    limit: Annotated[int | None, Option(min=2, help="Images to train classifier and generator on.")] = None,
    generator_updates: Annotated[int, Option(min=1, help="Of the generator.")] = 4000,
    out: Annotated[Path, Option(help="Folder of the run.")] = Path("runs/prodg"),
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Run the whole small study: prepare, train three methods with several seeds, explain, evaluate, ablate, report.

    Within 20 minutes on two cores. A command that was killed goes on where it was, when it is given again.
    Of `photographs`, which have no generator here, EPIC alone.

    **Examples**

    `protofast prodg study --out runs/prodg`

    `protofast prodg study --data photographs --out runs/photographs`
    """
    from .. import runs
    from .ablate import ablate
    from .evaluate import evaluate
    from .explain import explain
    from .prepare import prepare
    from .report import report
    from .train import train

    start = time.perf_counter()
    common: dict[str, Any] = {"device": device, "progress": progress}

    def say(text: str) -> None:
        typer.echo(f"\n{text} ({time.perf_counter() - start:.0f} s)")

    photographs = data == runs.PHOTOGRAPHS
    prepare(data, folder, limit=limit, network=None, updates=generator_updates, out=out, progress=progress)
    run = runs.Run.open(out)
    for method in ("epic",) if photographs else runs.METHODS:
        for seed in range(seeds):
            if seed not in run.trained(method):
                say(f"{method}, seed {seed}")
                train(out, method=method, updates=updates, seed=seed, **common)
    say("explain")
    explain(out, image=["0", "1", "2"] if photographs else ["0", "1", "19"], method=None, **common)
    say("evaluate")
    evaluate(out, **common)
    if ablation and not photographs:
        say("ablate")
        ablate(out, updates=ablation, **common)
    say("report")
    report(out)
    say("done")
