"""The command ``protofast ddim``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

Option = typer.Option

FORMAT = "protofast-ddim-1"


def ddim(
    data: Annotated[
        str,
        Option(
            help="What to learn: `fashion-mnist`, `digits`, `mnist`, a folder of images, or a .npy or .safetensors."
        ),
    ] = "fashion-mnist",
    steps: Annotated[str, Option(help="Numbers of DDIM steps to compare, comma-separated.")] = "10,20,50",
    updates: Annotated[int, Option(min=1, help="Batches of 64 to train on.")] = 2000,
    width: Annotated[int, Option(min=8, help="Channels of the first resolution, a multiple of 8.")] = 16,
    lr: Annotated[float, Option(help="Highest learning rate.")] = 2e-3,
    samples: Annotated[int, Option(min=1, help="Images sampled, for each number of steps.")] = 500,
    inverted: Annotated[int, Option(min=1, help="Held-out images inverted and sampled again.")] = 64,
    fixed_point: Annotated[int, Option(min=1, help="Iterations a step of the second, more exact inversion.")] = 10,
    root: Annotated[Path | None, Option(help="Folder of the files of `fashion-mnist` or `mnist`.")] = None,
    image_size: Annotated[int | None, Option(min=4, help="Side to which the images of a folder are resized.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of all that is random.")] = 0,
    out: Annotated[Path | None, Option(help="Folder of the results; by default runs/ddim-DATA.")] = None,
    progress: Annotated[bool, Option(help="Show progress bars.")] = True,
) -> None:
    """Train a small diffusion model on real images, sample it by DDIM, and send held-out images there and back.

    The model is diffusers' `UNet2DModel`. Its weights are cached: the same command again only samples, and one that was
    killed in training goes on where it was. Images have sides that are multiples of 4.

    OUT gets `grid.png` (held-out images, and samples from one noise by each number of steps), `invert.png` (held-out
    images, and what inversion and sampling return, plain and by fixed point) and `result.json` (all numbers).

    **Examples**

    `protofast ddim` (Fashion-MNIST)

    `protofast ddim --data digits --updates 500 --steps 5,10 --out runs/digits`
    """
    counts = _counts(steps)
    folder = out or Path("runs") / f"ddim-{Path(data).stem}"
    _check(folder)
    import platform
    from contextlib import suppress

    import torch

    from .. import __version__
    from .._optional import need
    from .._progress import bars, told_totals
    from .._sheet import sheet
    from .check import evaluate
    from .training import train

    versions = {"protofast": __version__, "torch": torch.__version__}
    versions |= {"diffusers": need("diffusers", "diffusers").__version__, "python": platform.python_version()}
    images, held_out = _load(data, root, image_size, seed)
    with bars(progress) as start:
        trained = told_totals(start(f"training on {len(images):,} images", updates, 0))
        model = train(images, width=width, updates=updates, lr=lr, seed=seed, progress=trained)
        trained(updates, updates)  # weights from the cache make no steps
        numbers, pictures = evaluate(
            *(model, images, held_out, counts),
            samples=samples,
            inverted=inverted,
            fixed_point=fixed_point,
            seed=seed,
            progress=lambda description, total: start(description, total, 0),
        )
    result = {
        "format": FORMAT,
        "versions": versions,
        "settings": {
            "data": data,
            "images": len(images),
            "held_out": len(held_out),
            "updates": updates,
            "width": width,
            "lr": lr,
            "samples": samples,
            "inverted": inverted,
            "fixed_point": fixed_point,
            "seed": seed,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": model.losses,
        **numbers,
    }
    grid = [("held out", pictures["held_out"])]
    grid += [(f"{count} steps", made) for count, made in pictures["samples"].items()]
    there = [("held out", pictures["inverted"])]
    for count, rebuilt in pictures["inversion"].items():
        there += [(f"{count}, {name}", made) for name, made in zip(("plain", "fixed"), rebuilt, strict=True)]
    files = {"grid.png": sheet(grid, rows=2), "invert.png": sheet(there)}
    files["result.json"] = json.dumps(result, indent=1).encode()  # last: with it the folder is complete
    with suppress(FileNotFoundError):
        (folder / "result.json").unlink()
    from .._files import replacing

    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write(content)
    _tell(numbers, folder)


def _counts(steps: str) -> list[int]:
    try:
        counts = [int(word) for word in steps.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{steps!r} is no list such as 10,20,50", param_hint="--steps") from None
    if not all(1 <= count <= 1000 for count in counts) or len({*counts}) < len(counts):
        raise typer.BadParameter(f"{steps!r}: give different numbers from 1 to 1000", param_hint="--steps")
    return counts


def _check(folder: Path) -> None:
    """Fails now where the results could not be written after all the work."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; give a folder for the results")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; give another folder for the results")
    result = folder / "result.json"
    if result.exists() and FORMAT not in result.read_text(errors="replace"):
        raise FileExistsError(f"{result} is of another command; give another folder for the results")


def _load(data: str, root: Path | None, image_size: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images to learn, and held-out ones: the test part or, of data without parts, a tenth drawn by the seed."""
    import torch

    from .. import data as sources

    try:
        parts = [sources.load(data, split=split, root=root) for split in ("train", "test")]
    except ValueError:  # it does not come in parts; or something else, which comes up again
        whole = sources.load(data, root=root, image_size=image_size)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        if len(whole) < 10:
            raise ValueError(f"{data} has {len(whole)} images; give at least 10") from None
        tenth = len(whole) // 10
        parts = [whole.subset(order[tenth:].sort().values), whole.subset(order[:tenth].sort().values)]
    images, held_out = (part.take(slice(None)) for part in parts)
    return images, held_out


def _tell(numbers: dict[str, Any], folder: Path) -> None:
    names = ("mean", "std", "nearest_neighbour_accuracy")
    rows = [("held out", numbers["held_out"], "")]
    for made, back in zip(numbers["samples"], numbers["inversion"], strict=True):
        errors = f"{back['plain']['rmse']:8.5f}  {back['fixed_point']['rmse']:11.5f}"
        rows.append((f"{made['steps']} steps", made, errors))
    typer.echo(f"\n{'':>10}  {'mean':>6}  {'std':>6}  {'1-NN':>6}  {'plain':>8}  {'fixed point':>11}")
    for title, row, errors in rows:
        typer.echo(f"{title:>10}  " + "  ".join(f"{row[name]:6.4f}" for name in names) + f"  {errors}".rstrip())
    typer.echo(
        "Values are in [0, 1]. 1-NN: how well nearest neighbours tell the images from held-out ones; 0.5 is chance.\n"
        "plain, fixed point: root mean square error of held-out images, inverted and sampled again."
    )
    typer.echo(f"Results: {(folder / 'result.json').resolve()}")
