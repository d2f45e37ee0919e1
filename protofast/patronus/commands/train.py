"""The command ``protofast patronus train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import NAMED, Device, Progress, Root, Seed, class_of, open_data

Option = typer.Option


def train(
    data: Annotated[
        str,
        Option(
            help="What to learn: `fashion-mnist`, `mnist`, `digits`, `cifar10`, `celeba`, `ffhq`, `chexpert`, a folder "
            "of images, or a .npy or .safetensors file."
        ),
    ] = "fashion-mnist",
    preset: Annotated[
        str | None,
        Option(help="`cpu`, or the paper's model for a data set; by default that of --data. See **Presets**."),
    ] = None,
    image_size: Annotated[
        int | None, Option(min=8, help="Side of the model's images, in place of the preset's.")
    ] = None,
    prototypes: Annotated[int | None, Option(min=1, help="Number of prototypes.")] = None,
    updates: Annotated[int | None, Option(min=1, help="Batches to train on.")] = None,
    batch: Annotated[int | None, Option(min=1, help="Images of a batch, over all processes.")] = None,
    lr: Annotated[float | None, Option(help="Highest learning rate.")] = None,
    distinct: Annotated[float | None, Option(min=0, help="Weight of the distinct loss.")] = None,
    margin: Annotated[float | None, Option(min=0, help="Margin of the distinct loss (paper: 0.5 and 1).")] = None,
    precision: Annotated[str, Option(help="Of the denoiser: `no`, `bf16` or `fp16`.")] = "no",
    accumulate: Annotated[
        int, Option(min=1, help="Parts in which a batch goes through the model, to save memory.")
    ] = 1,
    compile: Annotated[bool, Option("--compile", help="torch.compile the denoiser.")] = False,
    start: Annotated[
        Path | None, Option(help="Folder of a trained model to go on from (with --distinct, say).")
    ] = None,
    plant: Annotated[
        str | None, Option(help="Plant an attribute to be found by `diagnose`: `corner` (a mark) or `colour`.")
    ] = None,
    plant_class: Annotated[str | None, Option(help="Class that it goes with (number or name).")] = None,
    plant_rate: Annotated[
        float, Option(min=0, max=1, help="Share of that class that gets it; of other classes, the rest of 1.")
    ] = 0.9,
    root: Root = None,
    device: Device = None,
    seed: Seed = 0,
    out: Annotated[Path | None, Option(help="Folder of the model; by default runs/patronus-DATA.")] = None,
    progress: Progress = True,
) -> None:
    """Train a Patronus model: prototype encoder, prototypes and denoiser together, without labels.

    A command that was killed goes on where it was, with the same result, when it is given again. OUT gets the model
    (config.json, model.safetensors), `log.jsonl`, TensorBoard's `events`, and grids of samples on the way.

    **Presets**: `fashion-mnist`, `mnist`, `cifar10`, `celeba`, `ffhq` and `chexpert` are the paper's models and need a
    GPU for hours. `cpu` learns images of 32 pixels in about half an hour on two busy cores; with --image-size and a
    folder of pictures it is a start for other data.

    **Several processes or GPUs**: `torchrun --nproc-per-node 4 --no-python protofast patronus train …`. The batch is
    split between them.

    **Examples**

    `protofast patronus train --data fashion-mnist --preset cpu --out runs/fashion`

    `protofast patronus train --data photos/ --preset celeba --precision bf16`

    `protofast patronus train --preset cpu --plant corner --plant-class Trouser --out runs/planted`
    """
    import torch

    from ... import patronus
    from ..._optional import need

    name = preset or (data if data in patronus.PRESETS else "cpu")
    if name not in patronus.PRESETS:
        raise typer.BadParameter(f"{name!r}: choose one of {', '.join(patronus.PRESETS)}", param_hint="--preset")
    if plant is not None and plant_class is None:
        raise typer.BadParameter("give the class that the attribute goes with", param_hint="--plant-class")
    folder = out or Path("runs") / f"patronus-{Path(data).stem}"
    if start is not None and (image_size is not None or prototypes is not None):
        raise typer.BadParameter(
            "--start gives the sizes; leave --image-size and --prototypes out", param_hint="--start"
        )
    about: dict[str, Any] = {"preset": name, "seed": seed}
    about["data"] = data if data in NAMED else str(Path(data).resolve())
    if root is not None:
        about["root"] = str(root.resolve())
    config = patronus.PRESETS[name]
    if image_size is not None:
        config = dataclasses.replace(config, image_shape=(config.image_shape[0], image_size, image_size))
    source = open_data(about, None, None, config, split="train")
    channels = 3 if plant == "colour" else source.image_shape[0] if name == "cpu" else config.image_shape[0]
    config = dataclasses.replace(config, image_shape=(channels, *config.image_shape[1:]))
    if prototypes is not None:
        config = dataclasses.replace(config, num_prototypes=prototypes)
    given: dict[str, Any] = {"updates": updates, "batch": batch, "lr": lr, "distinct": distinct, "margin": margin}
    settings = dataclasses.replace(
        patronus.TRAINING[name], **{key: value for key, value in given.items() if value is not None}
    )
    first = None if start is None else patronus.Patronus.from_pretrained(start)
    config = config if first is None else first.config
    if plant is not None:
        target = class_of(source, str(plant_class), "--plant-class")
        about["plant"] = {"attribute": plant, "target": target, "rate": plant_rate}
        source = open_data(about, None, None, config, split="train")
    state = need("accelerate", "patronus").PartialState(cpu=device is not None and torch.device(device).type == "cpu")
    with state.main_process_first():  # the others find its file
        images = patronus.Images(config, source, cache=True, progress=progress and state.is_main_process)
    model = patronus.train(
        config,
        images,
        settings,
        out=folder,
        seed=seed,
        precision=precision,
        accumulate=accumulate,
        compile=compile,
        start=first,
        about=about,
        device=device,
        progress=progress,
    )
    if not state.is_main_process:
        return
    count = sum(weight.numel() for weight in model.parameters())
    typer.echo(f"{count / 1e6:.2f} M weights, {config.num_prototypes} prototypes: {folder.resolve()}")
    typer.echo(f"Look into it: protofast patronus report {folder}")
