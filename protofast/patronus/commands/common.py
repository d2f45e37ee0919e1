"""What the commands share: opening a trained model and its data, and writing a section of the report."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


@dataclass
class Section:
    """A part of the report: what a command found, in words, tables, pictures and numbers.

    `name` is that of the command. Tables are {"title", "columns", "rows"}; pictures are {"file", "title", "caption"},
    with the PNG in `files` under "file".
    """

    name: str
    title: str
    findings: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})

    def picture(self, file: str, png: bytes, title: str, caption: str = "") -> None:
        self.pictures.append({"file": file, "title": title, "caption": caption})
        self.files[file] = png

    def write(self, folder: Path) -> Path:
        """Writes the pictures, and then `result.json`: with it the folder is complete."""
        from ..._files import replacing

        result = folder / "result.json"
        with suppress(FileNotFoundError):
            result.unlink()
        for name, picture in self.files.items():
            with replacing(folder / name) as file:
                file.write(picture)
        content: dict[str, Any] = {"format": format_of(self.name), "title": self.title, "versions": versions()}
        content |= {"settings": self.settings, "findings": self.findings, "tables": self.tables}
        content |= {"pictures": self.pictures, "numbers": self.numbers}
        with replacing(result) as file:
            file.write(json.dumps(_finite(content), indent=1, allow_nan=False).encode())
        return result


def format_of(name: str) -> str:
    return f"protofast-patronus-{name}-1"


def ready(run: Path, out: Path | None, name: str) -> Path:
    """The folder of a command's results; fails now where they could not be written after all the work."""
    folder = out or run / name
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; give a folder for the results")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; give another folder for the results")
    result = folder / "result.json"
    if result.exists() and format_of(name) not in result.read_text(errors="replace"):
        raise FileExistsError(f"{result} is of another command; give another folder for the results")
    return folder


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


def versions() -> dict[str, str]:
    import torch

    from ... import __version__
    from ..._optional import need

    found = {"protofast": str(__version__), "torch": str(torch.__version__), "python": platform.python_version()}
    return found | {"diffusers": need("diffusers", "patronus").__version__}


def tell(section: Section, result: Path) -> None:
    """Says on stdout what was found, and where the rest is."""
    for line in section.findings:
        typer.echo(line)
    typer.echo(f"Results: {result.parent.resolve()}")


def _finite(value: Any) -> Any:
    """null for what JSON has no number for."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
