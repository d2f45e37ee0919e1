"""The command ``protofast prodg ablate``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Folder, Out, Progress, Section, Seed, tell

if TYPE_CHECKING:
    from ..networks import SplitNetwork
    from ..runs import Run

Option = typer.Option


def ablate(
    run: Folder,
    preset: Annotated[str, Option(help="`cpu`, or `paper`: the release's settings.")] = "cpu",
    updates: Annotated[int, Option(min=1, help="Of each of the seven trainings.")] = 1000,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Train ProDG with each of the seven subsets of its losses, and set their prototypes side by side.

    Purity is high in the images of a channel; regularisation keeps prompts near their start; diversity keeps the
    images of a channel apart. A command that was killed goes on where it was. About four minutes on two cores.

    OUT gets `grid.png`, `result.json` and a folder for each training.

    **Example**

    `protofast prodg ablate runs/prodg --updates 1000`
    """
    from ..._report.section import ready
    from ..runs import Run

    if preset not in ("cpu", "paper"):
        raise typer.BadParameter(f"{preset!r}: choose 'cpu' or 'paper'", param_hint="--preset")
    opened = Run.open(run)
    folder = ready(out or run / "ablate", "prodg", "ablate")
    section = Section("ablate", "What each loss is for")
    section.settings = {"preset": preset, "updates": updates, "seed": seed}
    ablate_into(section, opened, opened.network(device), folder, preset, updates, seed=seed, progress=progress)
    tell(section, section.write(folder))


def ablate_into(
    section: Section,
    run: Run,
    network: SplitNetwork,
    folder: object,
    preset: str,
    updates: int,
    *,
    seed: int,
    progress: bool,
) -> None:
    """Adds the grid and the table."""
    from ... import prodg
    from ..ablation import ablate as _ablate
    from ..ablation import grid
    from ..evaluation import image_purity, prototype_purity, prototype_similarity
    from ..images import pooled_features

    generator = run.generator(str(network.weight.device))
    config = dataclasses.replace(
        prodg.PRESETS[preset], updates=updates, channels=min(prodg.PRESETS[preset].channels, network.channels)
    )
    found = _ablate(network, generator, config, out=str(folder), seed=seed, progress=progress)
    images = run.images("test")
    pooled = pooled_features(network, images)
    rows: list[list[Any]] = []
    for name, result in found.items():
        concepts = result.concepts()
        last = result.history[-1]
        rows.append(
            [
                name,
                float(prototype_purity(concepts, seed=seed).mean()),
                float(image_purity(network, concepts.matrix, images, pooled=pooled).mean()),
                prototype_similarity(concepts, seed=seed),
                last.get("regularization"),
                last.get("dead"),
            ]
        )
    columns = [
        "losses",
        "purity of prototypes",
        "purity of held-out images",
        "cosine of a channel's prototypes",
        "L_reg",
        "dead channels",
    ]
    section.table("All seven", columns, rows)
    shown = list(dict.fromkeys(network.weight.argmax(1).tolist()))[:4]
    section.picture(
        "grid.png",
        grid(found, shown, seed=seed),
        "Prototypes of four channels",
        "A row a subset of the losses; the same noise in each column.",
    )
    best = max(rows, key=lambda row: row[1])
    section.findings.append(
        f"With all losses the channel purity of prototypes is {rows[0][1]:.3f}; it is largest, {best[1]:.3f}, with "
        f"{best[0]}."
    )
    section.numbers = {"rows": [dict(zip(columns, row, strict=True)) for row in rows]}
