"""What the commands share: opening a trained model and its data, and writing a section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._report.section import Section as _Section
from ..._report.section import ready as _ready
from ..._report.section import tell as tell

if TYPE_CHECKING:
    from ...data import Dataset
    from ..config import PatronusConfig
    from ..model import Patronus

Run = Annotated[Path, typer.Argument(help="Folder that `protofast patronus train` wrote.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="Images to look at; by default the data that the model was trained on.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the files of a named data set.")]
Steps = Annotated[int, typer.Option(min=1, help="DDIM steps (paper: 1000).")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; by default one of the command's name in RUN.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is random.")]
Device = Annotated[str | None, typer.Option(help="Where to run the model, such as `cuda`.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]


NAMED = ("digits", "mnist", "fashion-mnist", "cifar10", "celeba", "ffhq", "chexpert")
"""Data sets that are known by name."""


class Section(_Section):
    system = "patronus"
    libraries = ("diffusers",)


def ready(run: Path, out: Path | None, name: str) -> Path:
    """The folder of a command's results; fails now where they could not be written after all the work."""
    return _ready(out or run / name, Section.system, name)


def open_run(run: Path, device: str | None = None) -> tuple[Patronus, dict[str, Any]]:
    """The model of a run, and what is known of it ("data" and "root" among it)."""
    from ..model import Patronus, read_config

    return Patronus.from_pretrained(run, device=device), read_config(run).get("about", {})


def open_data(
    about: Mapping[str, Any],
    data: str | None,
    root: Path | None,
    config: PatronusConfig,
    *,
    split: str = "test",
    planted: bool = True,
) -> Dataset:
    """The part of the data to train on, or to look at: of data without parts, a tenth of it is kept from training.

    The model's own data, where `data` is None, comes with the attribute that was planted in it. Pictures of a folder
    are read at the model's size.
    """
    import torch

    from ... import data as sources

    own = data is None
    if data is None:
        data, root = about.get("data"), root or (Path(about["root"]) if about.get("root") else None)
        if data is None:
            raise ValueError("the model does not say what it was trained on; give --data")
    try:
        found = sources.load(data, split=split, root=root)
    except ValueError:  # it does not come in parts; or something else, which comes up again
        size = config.image_shape[1:] if Path(data).is_dir() else None
        whole = sources.load(data, root=root, image_size=size)
        if len(whole) < 20:
            raise ValueError(f"{data} has {len(whole)} images; give at least 20") from None
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(about.get("seed", 0)))
        tenth = len(whole) // 10
        found = whole.subset((order[:tenth] if split == "test" else order[tenth:]).sort().values)
    return _planted(found, about, config) if own and planted and "plant" in about else found


def _planted(source: Dataset, about: Mapping[str, Any], config: PatronusConfig) -> Dataset:
    import torch

    from ...data import Dataset
    from ..diagnosis import plant
    from ..images import images_of

    kind = about["plant"]
    found = plant(
        images_of(config, source),
        torch.as_tensor(source.labels),
        attribute=kind["attribute"],
        target=kind["target"],
        rate=kind["rate"],
        generator=torch.Generator().manual_seed(about.get("seed", 0)),
    )
    images = ((found.images + 1) * 127.5).round().byte().numpy()
    return Dataset(
        images, source.labels, names=source.names, source=f"{source.source} with a planted {kind['attribute']}"
    )


def class_of(source: Dataset, wanted: str | int, option: str) -> int:
    """The number of a class that is given by number or name."""
    if source.labels is None:
        raise ValueError(f"{source.source} has no labels; {option} needs classes")
    if source.names is not None and wanted in source.names:
        return source.names.index(str(wanted))
    known = source.names or tuple(map(str, sorted(set(source.labels.tolist()))))
    if not str(wanted).isdigit() or int(wanted) not in source.labels:
        raise ValueError(f"{option} is {wanted!r}; choose one of {', '.join(known)}, or its number")
    return int(wanted)
