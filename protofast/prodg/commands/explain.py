"""The command ``protofast prodg explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Device, Folder, Out, Progress, Section, Seed, tell

if TYPE_CHECKING:
    from torch import Tensor

    from ..concepts import Concepts
    from ..runs import Run

Option = typer.Option


def explain(
    run: Folder,
    image: Annotated[
        list[str] | None,
        Option(help="A picture, or a number of one of the test images; give as often as wanted. By default 0."),
    ] = None,
    method: Annotated[
        list[str] | None,
        Option(help="`prodg`, `epic` or `infodisent`; give as often as wanted. By default all that are trained."),
    ] = None,
    top: Annotated[int, Option(min=1, help="Channels of an explanation.")] = 4,
    prototypes: Annotated[int, Option(min=1, help="Of each channel.")] = 5,
    target: Annotated[
        str | None, Option(help="Class to explain, by name or number; by default the predicted one.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Say why the classifier sees in an image what it sees: by which channels, where, and what those stand for.

    A row a channel: what it gives to the logit, where it is in the image, and prototypes that show it, under heat maps
    with the strongest part boxed. Of several methods, a picture each, so that they can be set side by side.

    With `--method prodg` and a picture of your own, no image of a data set is read.

    **Examples**

    `protofast prodg explain runs/prodg --image boot.png`

    `protofast prodg explain runs/prodg --image 0 --image 17 --method prodg --method epic`
    """
    from ..._report.section import ready
    from ..runs import METHODS, Run

    opened = Run.open(run)
    folder = ready(out or run / "explain", "prodg", "explain")
    network = opened.network(device)
    chosen = method or [name for name in METHODS if seed in opened.trained(name)]
    if unknown := [name for name in chosen if name not in METHODS]:
        raise typer.BadParameter(f"{unknown[0]!r}: choose among {', '.join(METHODS)}", param_hint="--method")
    if not chosen:
        raise FileNotFoundError(f"{run} holds nothing trained with seed {seed}; run `protofast prodg train {run}`")
    names = network.names
    wanted: int | None = None
    if target is not None:
        if names is not None and target in names:
            wanted = names.index(target)
        elif target.isdigit() and int(target) < network.classes:
            wanted = int(target)
        else:
            known = ", ".join(names) if names is not None else f"0 to {network.classes - 1}"
            raise typer.BadParameter(f"{target!r}: choose one of {known}", param_hint="--target")
    found = {name: opened.concepts(name, seed, network) for name in chosen}
    pictures = {name: _open(opened, name, network.input_shape[0]) for name in image or ["0"]}
    section = Section("explain", "Why the classifier says what it says")
    section.settings = {"top": top, "prototypes": prototypes, "seed": seed, "methods": chosen}
    explain_into(section, found, pictures, names, top=top, prototypes=prototypes, target=wanted, seed=seed)
    tell(section, section.write(folder))


def explain_into(
    section: Section,
    methods: dict[str, Concepts],
    images: dict[str, Tensor],
    names: tuple[str, ...] | None,
    *,
    top: int,
    prototypes: int,
    target: int | None = None,
    seed: int,
) -> None:
    """Adds a picture and a row for every image and method."""
    from ..explain import explain as _explain
    from ..explain import picture

    rows = []
    for number, (label, pixels) in enumerate(images.items()):
        for name, concepts in methods.items():
            few = min(top, concepts.network.channels)
            found = _explain(concepts, pixels, top=few, prototypes=prototypes, target=target, seed=seed)
            kind = names[found.predicted] if names is not None else f"class {found.predicted}"
            parts = ", ".join(
                f"channel {int(channel)} {float(part):+.2f}"
                for channel, part in zip(found.channels, found.contributions, strict=True)
            )
            section.picture(
                f"{number}-{name}.png",
                picture(found, names=names),
                f"{_METHODS[name]}: image {label}",
                f"{kind}, {100 * found.probability:.0f} %. Left the image; right prototypes of the channel. Heat: pure "
                "and strong; box: around the largest part over 0.8 of the largest heat.",
            )
            rows.append([label, _METHODS[name], kind, found.logit, parts, found.rest, found.bias])
    columns = ["image", "method", "class", "logit", "channels", "all others", "bias"]
    section.table("What a logit is made of", columns, rows)
    section.findings.append(
        f"Of {len(images)} image{'s' * (len(images) > 1)}, the {top} strongest channels and their prototypes, by "
        f"{', '.join(_METHODS[name] for name in methods)}."
    )


_METHODS = {"prodg": "ProDG", "epic": "EPIC", "infodisent": "InfoDisent (our reading)"}


def _open(run: Run, name: str, channels: int) -> Tensor:
    if name.isdigit() and not Path(name).exists():
        images = run.images("test")
        if int(name) >= len(images):
            raise IndexError(f"--image is {name}; there are {len(images)} test images")
        return images.take([int(name)])[0]
    import numpy as np
    import torch

    from ..._optional import need

    if not Path(name).is_file():
        raise FileNotFoundError(f"{name}: no such file; give a picture, or a number of one of the test images")
    try:
        with need("PIL.Image", "data").open(name) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    except OSError as error:
        raise ValueError(f"{name} cannot be read as a picture ({error}); give a PNG or JPEG file") from None
    return torch.from_numpy(pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0).copy())
