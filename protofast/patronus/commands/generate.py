"""The command ``protofast patronus generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Data, Device, Out, Progress, Root, Run, Section, Seed, Steps, open_data, open_run, ready, tell

if TYPE_CHECKING:
    from torch import Tensor

    from ...data import Dataset
    from ..generate import Codes
    from ..model import Patronus

Option = typer.Option

MEASURED = 10_000
"""Images, at most, whose activations say what is strong."""
PROTOTYPES = 6
"""Prototypes that are manipulated where none are named."""
WAY = 10
"""Images of an interpolation, as in the paper."""

Quantile = Annotated[
    float, Option(min=0, max=1, help="Of a prototype's activations over the data: what it is enhanced to.")
]
Globally = Annotated[
    bool, Option("--globally", help="Enhance all to the one largest activation of any prototype, as the paper.")
]
FixedPoint = Annotated[
    int, Option(min=0, help="Iterations a step that make inversion exact, each a call of the model (paper: 0).")
]
BatchSize = Annotated[int, Option(min=1, help="Images at a time.")]


def generate(
    run: Run,
    data: Data = None,
    root: Root = None,
    images: Annotated[int, Option(min=2, help="Held-out images to work on, of as many classes as there are.")] = 8,
    samples: Annotated[int, Option(min=1, help="Variations of each (paper: 5).")] = 5,
    prototypes: Annotated[
        str, Option(help="Numbers of the prototypes to manipulate, comma-separated; by default the six that vary most.")
    ] = "",
    values: Annotated[
        str, Option(help="Extrapolation: what prototypes are set to, in multiples of their strength.")
    ] = "0,0.5,1,1.5,2,2.5,3",
    steps: Steps = 50,
    fixed_point: FixedPoint = 3,
    quantile: Quantile = 0.99,
    globally: Globally = False,
    batch_size: BatchSize = 256,
    out: Out = None,
    seed: Seed = 0,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Make images with a trained model: what its prototypes keep of an image, what they leave open, what each does.

    Held-out images are inverted to their activations and the noise that holds all else. Then activations or noise are
    changed, and the images sampled again. About a minute on two cores for a small model.

    OUT gets four pictures and `result.json` (the numbers under them):

    `reconstruction.png`: each image, made again from its own noise, and variations: the same activations, fresh noise.

    `manipulation.png`: one prototype at a time taken away (0), or enhanced to its strength, a high quantile over the
    data; the noise stays.

    `extrapolation.png`: a prototype taken through several values, far beyond its strength (paper's figure 7).

    `interpolation.png`: from one image to another, activations along a line and noise along an arc.

    **Examples**

    `protofast patronus generate runs/fashion`

    `protofast patronus generate runs/fashion --prototypes 3,7,12 --images 12 --values 0,1,2,4`

    `protofast patronus generate runs/fashion --steps 1000 --fixed-point 0 --globally --out runs/paper`
    (the paper's way)
    """
    folder = ready(run, out, "generate")
    multiples = numbers_of(values, float, "--values")
    named = numbers_of(prototypes, int, "--prototypes") if prototypes else []

    from ..generate import check_prototypes, invert, sample, strengths, vary
    from ..images import images_of

    model, about = open_run(run, device)
    if named:
        check_prototypes(model.config, named)
    source = open_data(about, data, root, model.config)
    if images > len(source):
        raise ValueError(f"--images is {images}; {source.source} has {len(source)} images")
    wide = drawn(source, min(len(source), max(images, MEASURED)), seed)
    measured = images_of(model.config, wide)
    seen = model.activations(measured, batch_size=batch_size)
    strong = strengths(seen, quantile, globally)
    chosen = named or seen.std(0).argsort(descending=True)[:PROTOTYPES].tolist()
    originals, names = measured[:images], names_of(wide, images)

    common: dict[str, Any] = {"num_steps": steps, "batch_size": batch_size, "progress": progress}
    codes = invert(model, originals, fixed_point=fixed_point, **common)
    rebuilt = sample(model, codes.activations, noise=codes.noise, **common)
    section = Section(
        "generate",
        "Images made of the prototypes",
        settings={
            "data": source.source,
            "images": images,
            "samples": samples,
            "prototypes": chosen,
            "values": multiples,
            "steps": steps,
            "fixed_point": fixed_point,
            "quantile": quantile,
            "globally": globally,
            "strengths": strong[chosen],
            "strengths_of": len(wide),
            "seed": seed,
        },
    )
    varied = vary(model, codes.activations, count=samples, seed=seed, **common)
    _reconstruction(section, model, names, originals, rebuilt, varied, seen)
    _manipulation(section, model, names, originals, rebuilt, codes, chosen, strong[chosen], common)
    _extrapolation(section, model, names, rebuilt, codes, chosen, strong[chosen], multiples, common)
    _interpolation(section, model, names, originals, codes, common)
    tell(section, section.write(folder))


def _reconstruction(
    section: Section,
    model: Patronus,
    names: Sequence[str],
    originals: Tensor,
    rebuilt: Tensor,
    varied: Tensor,
    seen: Tensor,
) -> None:
    """The images, themselves once more, and others with the same activations."""
    error = float((rebuilt - originals).square().mean().sqrt()) / 2
    spread = seen.std(0)
    varies = (seen != seen[0]).any(0)  # of equal values the standard deviation may be a rounding
    asked = model.activations(originals)
    found = model.activations(varied.flatten(0, 1)) - asked.repeat_interleave(varied.shape[1], 0)
    off, apart = (
        float((difference / spread)[:, varies].abs().mean()) for difference in (found, seen - seen.roll(1, 0))
    )
    steady = int((~varies).sum())
    section.numbers |= {"reconstruction_rmse": error, "variation_off": off, "images_apart": apart, "never_vary": steady}
    section.findings += [
        f"Inverted and sampled again, {len(originals)} images come back with a root mean square error of {error:.4f} "
        "(values from 0 to 1).",
        f"Variations (the same activations, fresh noise) are {off:.2f} standard deviations away from the activations "
        f"asked for, on average over prototypes; two images of the data are {apart:.2f} apart."
        + (f" Left out: {steady} of {len(varies)} prototypes, which never vary over the data." if steady else ""),
    ]
    rows = [("held out", originals), ("reconstructed", rebuilt)]
    rows += [(f"variation {number + 1}", varied[:, number]) for number in range(varied.shape[1])]
    section.picture(
        "reconstruction.png",
        _sheet(rows, names, len(originals)),
        "Reconstruction and variation",
        "Each column is an image of the data. Reconstructed: sampled from its own noise, found by inversion. "
        "Variations: sampled from fresh noise. The activations are the image's own throughout: what the variations "
        "share is what the prototypes hold, what differs is what they leave to the noise.",
    )


def _manipulation(
    section: Section,
    model: Patronus,
    names: Sequence[str],
    originals: Tensor,
    rebuilt: Tensor,
    codes: Codes,
    chosen: list[int],
    strong: Tensor,
    common: dict[str, Any],
) -> None:
    """One prototype at a time taken away, and enhanced."""
    import torch

    from ..generate import extrapolate

    made = extrapolate(model, codes, chosen, torch.stack([torch.zeros_like(strong), strong], 1), **common)
    found = _own(model, made, chosen)  # (n, P, 2)
    before = model.activations(rebuilt)[:, chosen]
    less, more = found.mean(0).unbind(1)
    asked = strong - codes.activations[:, chosen].mean(0)
    rows = []
    for place, number in enumerate(chosen):
        parts = strong[place], before.mean(0)[place], less[place], more[place]
        rows.append([number, *(round(float(part), 4) for part in parts)])
    section.table(
        "Manipulation: the prototype's own activation in the images made, mean over images",
        ["prototype", "strength", "unchanged", "set to 0", "set to the strength"],
        rows,
    )
    rises = int((more > before.mean(0)).sum())
    share = float(((more - before.mean(0)) / asked).nanmedian())
    section.numbers["manipulation"] = {
        "prototypes": chosen,
        "strength": strong,
        "unchanged": before.mean(0),
        "diminished": less,
        "enhanced": more,
    }
    section.findings.append(
        f"Enhancing a prototype made images in which it is seen more for {rises} of {len(chosen)} prototypes; of the "
        f"rise asked for, {share:.0%} is found in the image (median)."
    )
    heads = ["held out", "recon-\nstructed"]
    for number, value in zip(chosen, strong.tolist(), strict=True):
        heads += [f"p {number}\n= 0", f"p {number}\n= {value:.2f}"]
    table = torch.cat([originals[:, None], rebuilt[:, None], made.flatten(1, 2)], 1)
    section.picture(
        "manipulation.png",
        _sheet(list(zip(names, table, strict=True)), heads, len(heads)),
        "Manipulation",
        "Each row is an image of the data. In each pair of columns one prototype's activation is set to 0 and to its "
        "strength, all else stays: the other activations, and the noise. What differs within a pair is what the "
        "prototype means to the model.",
    )


def _extrapolation(
    section: Section,
    model: Patronus,
    names: Sequence[str],
    rebuilt: Tensor,
    codes: Codes,
    chosen: list[int],
    strong: Tensor,
    multiples: list[float],
    common: dict[str, Any],
) -> None:
    """One prototype at a time through several values."""
    import torch

    from ..generate import Codes, extrapolate

    few = min(2, len(names))
    levels = strong[:, None] * torch.tensor(multiples)
    made = extrapolate(model, Codes(*(part[:few] for part in codes)), chosen, levels, **common)
    found = _own(model, made, chosen).mean(0)
    section.numbers["extrapolation"] = {"prototypes": chosen, "multiples": multiples, "activation": found}
    section.table(
        f"Extrapolation: the prototype's own activation in the images made, mean over {few} images",
        ["prototype", "strength", *(f"set to {multiple:g}x" for multiple in multiples)],
        [
            [number, round(float(strong[place]), 4), *(round(value, 4) for value in found[place].tolist())]
            for place, number in enumerate(chosen)
        ],
    )
    groups = []
    for place, number in enumerate(chosen):
        tiles = torch.cat([rebuilt[:few, None], made[:, place]], 1)
        groups.append((f"prototype {number}\n1x = {float(strong[place]):.2f}", tiles.flatten(0, 1)))
    section.picture(
        "extrapolation.png",
        _sheet(
            groups, ["recon-\nstructed", *(f"{multiple:g}x" for multiple in multiples)], 1 + len(multiples), rows=few
        ),
        "Extrapolation",
        f"{few} images for each prototype, whose activation is set to multiples of its strength; beyond 1x it is more "
        "than nearly all images of the data have.",
    )


def _interpolation(
    section: Section, model: Patronus, names: Sequence[str], originals: Tensor, codes: Codes, common: dict[str, Any]
) -> None:
    """From one image to the next."""
    import torch

    from ..generate import Codes, interpolate

    pairs = len(names) // 2
    first, second = (Codes(*(part[start : 2 * pairs : 2] for part in codes)) for start in (0, 1))
    made = interpolate(model, first, second, count=WAY, **common)
    starts, ends = (originals[start : 2 * pairs : 2, None] for start in (0, 1))
    labels = [" to\n".join(pair) if all(pair) else "" for pair in zip(names[::2], names[1::2], strict=False)]
    heads = ["held out", *(f"{place / (WAY - 1):.2f}" for place in range(WAY)), "held out"]
    section.picture(
        "interpolation.png",
        _sheet(list(zip(labels, torch.cat([starts, made, ends], 1), strict=True)), heads, len(heads)),
        "Interpolation",
        "Between two images of the data, at the ends: activations along a line, noise along an arc. The numbers over "
        "the columns are the share of the second.",
    )


def _own(model: Patronus, made: Tensor, chosen: list[int]) -> Tensor:
    """Activation of each prototype in the images (n, P, V, …) of its own manipulation: (n, P, V)."""
    import torch

    found = model.activations(made.flatten(0, 2)).unflatten(0, made.shape[:3])
    return found[:, torch.arange(len(chosen)), :, chosen].movedim(0, 1)  # indexed axes come first


def _sheet(groups: list[tuple[str, Tensor]], heads: Sequence[str], columns: int, rows: int = 1) -> bytes:
    from ..._sheet import sheet

    unit = [(name, (images + 1) / 2) for name, images in groups]
    return sheet(unit, rows=rows, columns=columns, side=64, heads=heads, gap=2)


def drawn(source: Dataset, count: int, seed: int) -> Dataset:
    """Images in an order drawn by the seed: of data with labels one of each class, then a second of each, and so on."""
    import numpy as np
    import torch

    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).numpy()
    if source.labels is not None:
        labels = source.labels[order]
        turn = np.empty(len(order), np.int64)
        for label in np.unique(labels):
            mine = labels == label
            turn[mine] = np.arange(mine.sum())
        order = order[turn.argsort(kind="stable")]
    return source.subset(order[:count])


def names_of(source: Dataset, count: int) -> list[str]:
    """The classes of the first images, as words."""
    if source.labels is None:
        return [""] * count
    labels = source.labels[:count].tolist()
    return [str(label) if source.names is None else source.names[label] for label in labels]


def numbers_of(text: str, kind: type, option: str) -> list[Any]:
    """Numbers of a comma-separated list; each finite, none twice."""
    import math

    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or len({*found}) < len(found) or not all(map(math.isfinite, found)):
        example = "3,7,12" if kind is int else "0,0.5,1,2"
        raise typer.BadParameter(f"{text!r} is no list of different numbers such as {example}", param_hint=option)
    return found
