"""The command ``protofast prodg train``."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Folder, Progress, Seed

if TYPE_CHECKING:
    from ..networks import SplitNetwork
    from ..runs import Run

Option = typer.Option


def train(
    run: Folder,
    method: Annotated[str, Option(help="`prodg`, `epic` or `infodisent`.")] = "prodg",
    preset: Annotated[str, Option(help="`cpu`, or `paper`: the releases' settings.")] = "cpu",
    updates: Annotated[int | None, Option(min=1, help="ProDG's.")] = None,
    init: Annotated[str | None, Option(help="Where ProDG's prompts start: `empty`, `data` or `random`.")] = None,
    parametrization: Annotated[
        str | None, Option(help="Of the rotation: `matrix_exp`, `cayley`, `orthogonal`; EPIC's also `invertible`.")
    ] = None,
    through: Annotated[
        int | None, Option(min=1, help="Last steps of the generator that gradients go through; by default all.")
    ] = None,
    accumulate: Annotated[int, Option(min=1, help="Parts of a batch of ProDG, to save memory.")] = 1,
    seed: Seed = 0,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Learn what the channels of a frozen classifier show.

    **prodg** opens no image: it turns the channels and looks for prompts, by turns, until what the generator draws
    shows each channel alone where that is strongest. A command that was killed goes on where it was.
    **epic** turns the channels until real images do so. **infodisent** turns them and learns a new head, from labels.

    RUN gets a folder METHOD-SEED. A minute or two each for a small network on two cores.

    **Examples**

    `protofast prodg train runs/prodg`

    `protofast prodg train runs/prodg --method epic --seed 1`
    """
    from ..runs import METHODS, Run

    if method not in METHODS:
        raise typer.BadParameter(f"{method!r}: choose one of {', '.join(METHODS)}", param_hint="--method")
    if preset not in ("cpu", "paper"):
        raise typer.BadParameter(f"{preset!r}: choose 'cpu' or 'paper'", param_hint="--preset")
    opened = Run.open(run)
    network = opened.network(device)
    given: dict[str, Any] = {"parametrization": parametrization}
    if method == "prodg":
        given |= {"updates": updates, "init": init, "through": through}
    given = {name: value for name, value in given.items() if value is not None}
    start = time.perf_counter()
    text = train_method(opened, network, method, preset, given, seed=seed, accumulate=accumulate, progress=progress)
    typer.echo(f"{text} ({time.perf_counter() - start:.0f} s): {opened.place(method, seed).resolve()}")
    typer.echo(f"Explain an image: protofast prodg explain {run}")


def train_method(
    run: Run,
    network: SplitNetwork,
    method: str,
    preset: str,
    given: dict[str, Any],
    *,
    seed: int,
    accumulate: int = 1,
    progress: bool,
) -> str:
    """Trains one of the three into the run's folder; says what came of it."""
    from ... import prodg
    from ..epic import EPIC_PRESETS
    from ..infodisent import INFODISENT_PRESETS

    place, device = run.place(method, seed), str(network.weight.device)
    if method == "prodg":
        settings = dataclasses.replace(prodg.PRESETS[preset], **given)
        settings = dataclasses.replace(settings, channels=min(settings.channels, network.channels))
        trained = prodg.train(
            network,
            run.generator(device),
            settings,
            out=place,
            seed=seed,
            accumulate=accumulate,
            progress=progress,
        )
        first, last = trained.history[0]["purity"], trained.history[-1]["purity"]
        return f"channel purity of generated images {first:.3f} → {last:.3f}"
    about = {"preset": preset, "seed": seed}
    if method == "epic":
        few = "few" if preset == "cpu" and len(run.images("train")) < 1000 else preset
        found = prodg.train_epic(
            network,
            run.images("train"),
            dataclasses.replace(EPIC_PRESETS[few], **given),
            seed=seed,
            progress=progress,
        )
        found.save(place, **about)
        first, last = found.history[0]["purity"], found.history[-1]["purity"]
        return f"channel purity of the chosen images {first:.3f} → {last:.3f}"
    head = prodg.train_infodisent(
        network,
        run.images("train"),
        dataclasses.replace(INFODISENT_PRESETS[preset], **given),
        seed=seed,
        progress=progress,
    )
    head.save(place, **about)
    return f"accuracy of the new head on training batches {100 * head.history[-1]['accuracy']:.1f} %"
