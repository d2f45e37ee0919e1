"""The command ``protofast patronus prototypes``."""

from __future__ import annotations

from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Data, Device, Out, Progress, Root, Run, Section, Seed, Steps, open_data, open_run, ready, tell
from .generate import BatchSize, Globally, Quantile

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...data import Dataset
    from ..model import Patronus
    from ..prototypes import Amplified, Patches, PrototypeName

Option = typer.Option

_SHOWN = 4
"""Images in the picture of consistency, as in the paper's figure 6."""


def prototypes(
    run: Run,
    data: Data = None,
    root: Root = None,
    images: Annotated[int, Option(min=2, help="Images in which every prototype is turned up (paper: 20).")] = 20,
    steps: Steps = 50,
    quantile: Quantile = 0.99,
    globally: Globally = False,
    nearest: Annotated[int, Option(min=1, help="Nearest patches shown for each prototype.")] = 5,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Show what each prototype of a trained model stands for, and name it.

    Three looks at each prototype. The patches of real images that activate it most, with the exact pixels that it sees.
    Some images drawn by the model once more, told that the prototype is there: what appears is what it means to the
    model. And whose images activate it: where the data has labels, the classes of those that activate it most give it a
    name, with the AUROC of its activation for them over all images (0.5 is chance, 1 is always right).

    A minute or so on two cores for a small model of 30 prototypes; sampling takes nearly all of it.

    OUT gets `prototypes.png` (a row for each prototype), `consistency.png` (the same prototype turned up in several
    images) and `result.json` (names, boxes, activations).

    **Examples**

    `protofast patronus prototypes runs/fashion`

    `protofast patronus prototypes runs/fashion --steps 1000 --globally --out runs/paper` (the paper's protocol)
    """
    folder = ready(run, out, "prototypes")
    import torch

    from ..generate import strengths
    from ..images import images_of
    from ..prototypes import amplify, consistency, field_of, name_prototypes, nearest_patches

    model, about = open_run(run, device)
    source = open_data(about, data, root, model.config)
    shown = images_of(model.config, source)
    for option, count in (("--nearest", nearest), ("--images", images)):
        if count > len(shown):
            raise ValueError(f"{option} is {count}; {source.source} has {len(shown)} images")
    found = model.activations(shown, batch_size=batch_size, return_all=True)
    known = (source.attributes, source.attribute_names) if source.labels is None else (source.labels, source.names)
    names = name_prototypes(found, field_of(model), *known)
    patches = nearest_patches(model, shown, nearest, batch_size=batch_size, progress=progress)
    levels = strengths(found.activation, quantile=quantile, globally=globally)
    drawn = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))[:images]
    made = amplify(model, shown[drawn], levels, num_steps=steps, batch_size=batch_size, progress=progress)
    alike = consistency(made.feature)

    # First those named by what they are active in, the clearest at the top; last those without a name.
    clearness = [(bool(name.what), name.active, name.share if name.what else 0.0) for name in names]
    order = sorted(range(len(names)), key=clearness.__getitem__, reverse=True)
    section = Section("prototypes", "What the prototypes stand for")
    section.settings = {"data": source.source, "images_searched": len(shown), "images_amplified": images}
    section.settings |= {"steps": steps, "quantile": None if globally else quantile, "globally": globally, "seed": seed}
    section.findings = _findings(names, made, levels, alike, source)
    section.table(
        "The prototypes by name; their highest activation in the data, and means before and after turning them up",
        ["prototype", "strongest in", "share", "AUROC", "where", "highest", "turned up to", "before", "after"],
        [
            [
                *(number, names[number].what or "–", _rounded(names[number].share), _rounded(names[number].auroc)),
                *(names[number].where, _rounded(patches.activation[number, 0]), _rounded(levels[number])),
                *(_rounded(made.before[:, number].mean()), _rounded(made.activation[:, number].mean())),
            ]
            for number in order
        ],
    )
    rows = [_about(number, names[number]) for number in order]
    section.picture(
        "prototypes.png",
        _overview(model, shown, patches, made, order, rows),
        "What each prototype sees, and what it makes the model draw",
        f"A row for each prototype, the clearest name first. Left, the {nearest} images of {source.source} that "
        "activate it most; the frame holds exactly the pixels that it sees. Then where in the first of them it is "
        "active, from dark to bright. Right, an image as the model draws it, and once more from the same noise, told "
        "that the prototype is strongly there: the frame shows where it was then found.",
    )
    section.picture(
        "consistency.png",
        _repeated(made, order, rows, alike, _varied(source, drawn)),
        "The same prototype in several images",
        "Above, images as the model draws them. In each row one prototype is turned up in all of them; on the right "
        "what is in the frames. What stays the same along a row is what the prototype means. The number is the cosine "
        "similarity of the encoder's features of the framed patches, in brackets that to other prototypes' patches.",
    )
    section.numbers = {
        "names": [name._asdict() for name in names],
        "nearest": {"image": patches.image, "activation": patches.activation, "box": patches.box},
        "strengths": levels,
        "amplified": {
            "image": drawn,
            "activation": made.activation,
            "before": made.before,
            "box": made.box,
            "best": drawn[made.best],
        },
        "consistency": alike._asdict(),
    }
    tell(section, section.write(folder))


def _rounded(value: Any) -> float:
    return round(float(value), 3)


def _findings(names: list[PrototypeName], made: Amplified, levels: Tensor, alike: Any, source: Dataset) -> list[str]:
    findings = []
    count = len(names)
    if source.labels is None and source.attributes is None:
        findings.append(f"{source.source} has no labels: the prototypes are named by where in the images they look.")
    else:
        named = [number for number in range(count) if names[number].what]
        kinds = "an attribute" if source.labels is None else "up to three classes, or by those it is not active in"
        line = (
            f"{len(named)} of {count} prototypes can be named by {kinds}, though the model was trained without labels"
        )
        if named:
            best = max(named, key=lambda number: names[number].auroc)
            what = len({names[number].what for number in named})
            line += (
                f" ({what} different names); the one whose activation alone tells most is {best}: {names[best].text}"
            )
        findings.append(line + ".")
    rises = float((made.activation > made.before).double().mean())
    findings.append(
        f"Turning a prototype up raised its activation in {100 * rises:.0f} % of the {made.activation.numel():,} "
        f"images drawn so: on average from {made.before.mean():.2f} to {made.activation.mean():.2f}, where "
        f"{levels[made.prototypes].mean():.2f} was asked for."
    )
    if count > 1:
        more = int((alike.within > alike.across).sum())
        findings.append(
            f"The patches in which one prototype is then found have a cosine similarity of {alike.within.mean():.2f} "
            f"over {len(made.images)} images (features of the encoder), against {alike.across.mean():.2f} for "
            f"different prototypes; {more} of {count} are more alike to themselves than to the others."
        )
    return findings


def _about(number: int, name: PrototypeName) -> tuple[list[str], list[str]]:
    """Lines to be printed large, and small."""
    small = [f"{name.where}, {100 * name.share:.0f} % of its top images" if name.what else name.where]
    small.append(f"prototype {number}" + (f" · AUROC {name.auroc:.2f}" if name.what else ""))
    return wrap(name.what or "no class stands out", 24), [line for text in small for line in wrap(text, 36)]


def _varied(source: Dataset, drawn: Tensor) -> list[int]:
    """Places among the drawn images, of different classes first."""
    places = list(range(len(drawn)))
    if source.labels is not None:
        labels = source.labels[drawn.numpy()].tolist()
        places.sort(key=lambda place: (labels.index(labels[place]) < place, place))
    return places[:_SHOWN]


def _overview(
    model: Patronus,
    shown: Tensor,
    patches: Patches,
    made: Amplified,
    order: list[int],
    rows: list[tuple[list[str], list[str]]],
) -> bytes:
    from ..prototypes import heat_maps

    count = patches.image.shape[1]
    maps = heat_maps(model, shown[patches.image[order, 0]], order, enlarge=max(1, 128 // shown.shape[-1]))
    sheet = _Sheet(len(rows), [count, 1, 2])
    most = "the image" if count == 1 else f"the {count} images"
    sheet.head(
        f"{most} that activate it most; in the frame\nall that the prototype sees of them",
        "where it is active\nin the first",
        "drawn again: as it was, and\nwith the prototype turned up",
    )
    for row, number in enumerate(order):
        sheet.name(row, *rows[row])
        for column in range(count):
            image = _pixels(shown[patches.image[number, column]])
            sheet.image(row, column, image, patches.box[number, column])
        sheet.image(row, count, maps[row])
        best = int(made.best[number])
        sheet.image(row, count + 1, _pixels(made.source[best]))
        sheet.image(row, count + 2, _pixels(made.images[best, number]), made.box[best, number])
    return sheet.png()


def _repeated(
    made: Amplified, order: list[int], rows: list[tuple[list[str], list[str]]], alike: Any, places: list[int]
) -> bytes:
    sheet = _Sheet(len(rows) + 1, [len(places), len(places)])
    sheet.head("the prototype turned up in each image", "what is in the frames")
    sheet.name(0, ["as they were"], [])
    for column, place in enumerate(places):
        sheet.image(0, column, _pixels(made.source[place]))
    for row, number in enumerate(order, 1):
        large, small = rows[row - 1]
        sheet.name(row, large, [*small[:-1], f"{small[-1].split(' · ')[0]} · alike {_two(alike, number)}"])
        for column, place in enumerate(places):
            image, box = _pixels(made.images[place, number]), made.box[place, number]
            top, left, bottom, right = box.tolist()
            sheet.image(row, column, image, box)
            sheet.image(row, len(places) + column, image[top:bottom, left:right])
    return sheet.png()


def _two(alike: Any, number: int) -> str:
    across = float(alike.across[number])
    return f"{alike.within[number]:.2f}" + (f" ({across:.2f})" if across == across else "")


def _pixels(image: Tensor) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1] of (C, H, W) in [−1, 1]."""
    image = (image.cpu() + 1) / 2
    return (image[0] if len(image) < 3 else image[:3].permute(1, 2, 0)).numpy()


class _Sheet:
    """Rows of a name and square pictures, in groups of columns; a length of 1 is the side of a picture."""

    _NAME, _HEAD, _GAP, _BETWEEN = 2.3, 0.62, 0.08, 0.28

    def __init__(self, rows: int, groups: list[int]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._left: list[float] = []
        self._groups: list[float] = []
        at = self._NAME
        for columns in groups:
            self._groups.append(at)
            for _ in range(columns):
                self._left.append(at)
                at += 1 + self._GAP
            at += self._BETWEEN - self._GAP
        size = (at - self._BETWEEN + self._GAP, self._HEAD + rows * (1 + self._GAP))
        self._figure = Figure(figsize=(0.92 * size[0], 0.92 * size[1]))
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.axis("off")
        self._limits = (0, size[0]), (size[1], 0)

    def _top(self, row: int) -> float:
        return self._HEAD + row * (1 + self._GAP)

    def head(self, *texts: str) -> None:
        for left, text in zip(self._groups, texts, strict=True):
            self._axes.text(left, self._HEAD - 0.1, text, fontsize=8, color="#4a4a4a", va="bottom", linespacing=1.25)

    def name(self, row: int, large: list[str], small: list[str]) -> None:
        middle = self._top(row) + 0.5
        lines = [(line, 10, "#1b1b1b", "bold") for line in large] + [(line, 8, "#5c5c5c", "normal") for line in small]
        for place, (line, size, colour, weight) in enumerate(lines):
            y = middle + 0.2 * (place - (len(lines) - 1) / 2)
            self._axes.text(0.06, y, line, fontsize=size, color=colour, weight=weight, va="center")

    def image(self, row: int, column: int, pixels: np.ndarray, box: Tensor | None = None) -> None:
        from ...nn.pictures import BOX

        left, top = self._left[column], self._top(row)
        height, width = pixels.shape[:2]
        across, down = width / max(height, width), height / max(height, width)
        extent = (left, left + across, top + down, top)
        self._axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
        if box is not None:
            first, start, last, end = (float(side) / max(height, width) for side in box)
            x, y = [start, end, end, start, start], [first, first, last, last, first]
            colour = [part / 255 for part in BOX]
            self._axes.plot([left + a for a in x], [top + a for a in y], color=colour, linewidth=1.5)

    def png(self) -> bytes:
        self._axes.set(xlim=self._limits[0], ylim=self._limits[1])
        file = BytesIO()
        self._figure.savefig(file, format="png", dpi=110, facecolor="white")
        return file.getvalue()
