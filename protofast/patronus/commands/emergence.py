"""The command ``protofast patronus emergence``."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Data, Device, Out, Progress, Root, Run, Section, Seed, Steps, open_data, open_run, ready, tell
from .generate import MEASURED, BatchSize, FixedPoint, Globally, Quantile, drawn, names_of, numbers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..emergence import Emergence
    from ..generate import Codes
    from ..model import Patronus

Option = typer.Option

SHOWN = 12
"""Timesteps in the picture of predicted images."""


def emergence(
    run: Run,
    data: Data = None,
    root: Root = None,
    images: Annotated[int, Option(min=1, help="Held-out images (paper: 100), of all classes alike.")] = 32,
    prototypes: Annotated[
        str, Option(help="Numbers of the prototypes to trace, comma-separated; by default all.")
    ] = "",
    steps: Steps = 50,
    fixed_point: FixedPoint = 0,
    quantile: Quantile = 0.99,
    globally: Globally = False,
    batch_size: BatchSize = 256,
    out: Out = None,
    seed: Seed = 0,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Find when each prototype appears, on the way from noise to image.

    Held-out images are made again from their own noise, once as they are, and once for each prototype with that one
    enhanced to its strength, a high quantile over the data. At every timestep the image that the model then predicts
    is looked at: by how much more the prototype is seen there in the enhanced run is δ. Its emergence time is the first
    timestep from which on δ is at least half of its final value. Time runs from T (noise) to 0 (the image), so early
    prototypes have large timesteps.

    IMAGES × (prototypes + 1) runs of STEPS steps: some minutes on two cores for 32 images, 30 prototypes and a small
    model. The paper traces 100 images through 1,000 steps.

    OUT gets `emergence.png` (the mean of δ, and prototypes × timesteps), `predicted.png` (what the model predicts on
    the way, with and without an early and a late prototype enhanced) and `result.json`.

    **Examples**

    `protofast patronus emergence runs/fashion`

    `protofast patronus emergence runs/fashion --images 8 --prototypes 3,7,12 --steps 100`
    """
    folder = ready(run, out, "emergence")
    named = numbers_of(prototypes, int, "--prototypes") if prototypes else None

    from ..emergence import emergence as trace
    from ..emergence import figure
    from ..generate import check_prototypes, invert, strengths
    from ..images import images_of

    model, about = open_run(run, device)
    chosen = check_prototypes(model.config, range(model.config.num_prototypes) if named is None else named)
    source = open_data(about, data, root, model.config)
    if images > len(source):
        raise ValueError(f"--images is {images}; {source.source} has {len(source)} images")
    wide = drawn(source, min(len(source), max(images, MEASURED)), seed)
    measured = images_of(model.config, wide)
    strong = strengths(model.activations(measured, batch_size=batch_size), quantile, globally)[chosen]
    common: dict[str, Any] = {"num_steps": steps, "batch_size": batch_size, "progress": progress}
    codes = invert(model, measured[:images], fixed_point=fixed_point, **common)
    found = trace(model, codes, strong, chosen, **common)

    section = Section(
        "emergence",
        "When prototypes emerge",
        settings={
            "data": source.source,
            "images": images,
            "prototypes": chosen,
            "steps": steps,
            "fixed_point": fixed_point,
            "quantile": quantile,
            "globally": globally,
            "strengths": strong,
            "strengths_of": len(wide),
            "seed": seed,
        },
    )
    _describe(section, found, len(model.schedule))
    png = BytesIO()
    figure(found).savefig(png, format="png", dpi=130, facecolor="white")
    section.picture(
        "emergence.png",
        png.getvalue(),
        "When prototypes emerge",
        "Above: δ, how much more a prototype is seen in the predicted image of its enhanced run than in that of the "
        "original run, as a mean over images and prototypes. Below: a row for each prototype, each δ as a share of its "
        "final value; the bar marks the emergence time. The paper describes this measurement (A.2), but no public code "
        "of it exists.",
    )
    _predicted(section, model, found, codes, names_of(wide, images), common)
    tell(section, section.write(folder))


def _describe(section: Section, found: Emergence, total: int) -> None:
    """Findings, table and numbers."""
    order = found.order.tolist()
    numbers, times = found.prototypes.tolist(), found.times.tolist()
    rising = [place for place in order if times[place] == times[place]]
    count = len(numbers)
    if rising:
        early, late = times[rising[0]], times[rising[-1]]
        first = [numbers[place] for place in rising if times[place] == early]
        last = [numbers[place] for place in rising if times[place] == late]
        begin = int(found.timesteps[0])
        section.findings.append(
            f"First to emerge, at timestep {early:.0f} of {total:,}: {_listed(first)}."
            + (f" Last, at {late:.0f}: {_listed(last)}." if late < early else " None comes later.")
        )
        if early == begin:
            section.findings.append(
                f"{len(first)} of {count} prototypes are there from the first step, where the model has seen nothing "
                "but noise: the activations alone make it expect them."
            )
    if found.trend_time == found.trend_time:
        section.findings.append(
            f"Over all prototypes, half of the final change is there at timestep {found.trend_time:.0f}; the mean "
            f"activation rises by {float(found.trend[-1]):.3g} in the end."
        )
    if len(rising) < count:
        section.findings.append(
            f"{count - len(rising)} of {count} prototypes do not rise: enhancing them does not change what they see by "
            "more than two standard errors."
        )
    rows = []
    for place in order:
        final, error = float(found.delta[-1, place]), float(found.error[-1, place])
        time = f"{times[place]:.0f}" if place in rising else "does not rise"
        rows.append([numbers[place], time, round(float(found.values[place]), 4), round(final, 4), round(error, 4)])
    if found.images == 1:
        rows = [[*row[:-1], ""] for row in rows]
    section.table(
        "Emergence times, the first to emerge first",
        ["prototype", "timestep", "enhanced to", "final δ", "standard error"],
        rows,
    )
    section.numbers |= {
        "timesteps": found.timesteps,
        "prototypes": found.prototypes,
        "times": found.times,
        "original": found.original,
        "enhanced": found.enhanced,
        "delta": found.delta,
        "error": found.error,
        "trend": found.trend,
        "trend_error": found.trend_error,
        "trend_time": found.trend_time,
    }


def _predicted(
    section: Section,
    model: Patronus,
    found: Emergence,
    codes: Codes,
    names: Sequence[str],
    common: dict[str, Any],
) -> None:
    """Predicted images on the way: of two images, as they are, and with an early and a late prototype enhanced."""
    from ..._sheet import sheet
    from ..emergence import predictions

    rising = [place for place in found.order.tolist() if bool(found.times[place].isfinite())]
    half = -(-len(rising) // 2)
    ends = [max(part, key=found.delta[-1].tolist().__getitem__) for part in (rising[:half], rising[half:]) if part]
    few = min(2, found.images)
    activations = codes.activations[:few, None].repeat(1, 1 + len(ends), 1)
    for column, place in enumerate(ends, 1):
        activations[:, column, found.prototypes[place]] = found.values[place].to(activations)
    timesteps, made = predictions(
        model,
        activations.flatten(0, 1),
        codes.noise[:few].repeat_interleave(1 + len(ends), 0),
        common["num_steps"],
        shown=SHOWN,
        batch_size=common["batch_size"],
    )
    rows = []
    for image, name in enumerate(names[:few]):
        for column, place in enumerate([None, *ends]):
            what = "original"
            if place is not None:
                what = f"p {int(found.prototypes[place])} = {float(found.values[place]):.2f}"
            tiles = made[image * (1 + len(ends)) + column]
            rows.append((f"{name}\n{what}" if name else what, (tiles + 1) / 2))
    heads = [f"t {t}" for t in timesteps.tolist()]
    section.picture(
        "predicted.png",
        sheet(rows, columns=len(heads), side=64, heads=heads, gap=2),
        "What the model predicts on the way",
        "The image that the model predicts at each timestep, noise on the left. Original: under the image's own "
        "activations. Below it runs with one prototype set to its strength: of the half of the prototypes that emerge "
        "first, and of the half that emerge last, the one that rises most.",
    )


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 5} more" if numbers[5:] else ""
    return f"prototype{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:5]))}{more}"
