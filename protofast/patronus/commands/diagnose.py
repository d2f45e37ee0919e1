"""The command ``protofast patronus diagnose``."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .common import (
    Data,
    Device,
    Out,
    Progress,
    Root,
    Run,
    Section,
    Seed,
    Steps,
    class_of,
    open_data,
    open_run,
    ready,
    tell,
)
from .evaluate import at_most, classifier_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...data import Dataset
    from ..config import PatronusConfig
    from ..diagnosis import Association, Detector, Intervention

Option = typer.Option


def diagnose(
    run: Run,
    attribute: Annotated[
        list[str] | None,
        Option(
            help="An attribute of the data by its name, or `NAME=CLASS,CLASS…` by the classes that have it. Give two; "
            "none for planted data."
        ),
    ] = None,
    data: Data = None,
    root: Root = None,
    images: Annotated[int, Option(min=2, help="Images in which prototypes are turned up (paper: 8).")] = 64,
    steps: Steps = 50,
    quantile: Annotated[
        float, Option(min=0.5, max=1, help="Of a prototype's activations over the data: what it is turned up to.")
    ] = 0.99,
    controls: Annotated[int, Option(min=1, help="Prototypes turned up for comparison, at most.")] = 20,
    inverted: Annotated[
        bool, Option("--inverted", help="Draw from each image's own noise, by inversion (paper), not from fresh noise.")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="Images at a time.")] = 256,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Find out whether a model ties two attributes together because its data had them together.

    Each attribute has a prototype, the one whose activation tells it best. Two questions are asked of them. Are they
    correlated, and does each tell the other's attribute, more than if the attributes were independent? And when the
    prototype of one is turned up in images that have neither, does the other attribute appear, more than when other
    prototypes are turned up? Both answers come with an interval, and only what exceeds its control level is flagged.

    To see it work, train one model on data with a planted attribute (a mark in the corner of 90 % of the trousers, and
    of 10 % of all else), and another, the control, on data where all classes have the mark equally often:

    `protofast patronus train --data fashion-mnist --preset cpu --plant corner --plant-class Trouser --plant-rate 0.9
    --out runs/planted`

    `protofast patronus diagnose runs/planted` (flagged; with `--plant-rate 0.5` it is not)

    Of your own data, name two attributes by the classes (folders) that have them; all four combinations have to occur:

    `protofast patronus diagnose runs/faces --attribute "smile=blond smiling,brown smiling" --attribute "blond=blond
    smiling,blond earnest"`

    Of data with attributes (celeba, ffhq, chexpert), name two of them:

    `protofast patronus diagnose runs/celeba --attribute Smiling --attribute Blond_Hair`

    Some minutes on two cores for a small model: the images are drawn once for each prototype compared.

    OUT gets `turned_up.png` (images before and after), `evidence.png` (activations, and effects beside those of the
    controls) and `result.json`.
    """
    folder = ready(run, out, "diagnose")
    import torch

    from ..diagnosis import associate, intervene

    model, about = open_run(run, device)
    source = open_data(about, data, root, model.config, planted=False)
    if source.labels is None and source.attributes is None:
        raise ValueError(
            f"{source.source} has no labels or attributes, so that none is known; give other --data with them"
        )
    if attribute:
        case = _named(model.config, attribute, about, data, root, source, seed, device, progress)
    elif "plant" in about:
        case = _planted(model.config, about, data, root, source, seed, device, progress)
    else:
        raise ValueError(
            "the model was not trained on data with a planted attribute (`protofast patronus train --plant`); name two "
            'attributes by name or classes, --attribute NAME or --attribute "NAME=CLASS,CLASS" twice'
        )
    activations = model.activations(case.images, batch_size=batch_size)
    association = associate(activations, case.attributes, seed=seed)
    neither = (~case.attributes.any(1)).nonzero()[:, 0]
    drawn = neither[torch.randperm(len(neither), generator=torch.Generator().manual_seed(seed))[:images]]
    intervention = intervene(
        model,
        case.images[drawn],
        activations,
        association,
        case.detectors,
        quantile=quantile,
        controls=controls,
        inverted=inverted,
        num_steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )

    section = Section("diagnose", "Whether two attributes are tied together")
    section.settings = {"data": data or about.get("data"), "attributes": list(case.names), "images": len(drawn)}
    section.settings |= {"searched": len(case.images), "steps": steps, "quantile": quantile, "inverted": inverted}
    section.settings["seed"] = seed
    section.settings |= {"plant": None if attribute else about["plant"], "detectors": list(case.by)}
    _tell(section, case.names, association, intervention, case.attributes)
    chosen = association.prototypes
    section.picture(
        "turned_up.png",
        _rows(case, drawn, association, intervention),
        "The prototype of each attribute turned up in images with neither",
        f"Images of {source.source}; as the model draws them; and from the same noise with one prototype turned up. "
        "If the model ties the attributes together, turning up the one makes the other appear.",
    )
    section.picture(
        "evidence.png",
        _evidence(case.names, activations[:, list(chosen)], case.attributes, association, intervention),
        "Correlation, and effects beside those of the controls",
        "Left, the activations of the two prototypes in images of each combination. Right, what turning up a prototype "
        "does to the other attribute, on average over images: the large dot, and one small dot for each control.",
    )
    tell(section, section.write(folder))


class _Case(NamedTuple):
    """Images with two attributes, bool (n, 2); their names, and what detects each, in images and in words."""

    images: Tensor
    attributes: Tensor
    names: tuple[str, str]
    detectors: tuple[Detector, Detector]
    by: tuple[str, str]


def _planted(
    config: PatronusConfig,
    about: dict[str, Any],
    data: str | None,
    root: Path | None,
    source: Dataset,
    seed: int,
    device: str | None,
    progress: bool,
) -> _Case:
    import torch

    from ..diagnosis import detect, plant
    from ..images import images_of

    kind, rate = about["plant"]["attribute"], about["plant"]["rate"]
    target = [class_of(source, name, "the planted class") for name in _several(about["plant"]["target"])]
    labels = torch.from_numpy(source.labels)
    planted = plant(
        *(images_of(config, source), labels),
        attribute=kind,
        target=target,
        rate=rate,
        generator=torch.Generator().manual_seed(about.get("seed", 0)),  # what other commands see
    )
    # The classifier has to see the class, marked or not: it learns from images marked whatever they are.
    train = at_most(open_data(about, data, root, config, split="train", planted=False), seed)
    known = torch.from_numpy(train.labels)
    even = plant(
        *(images_of(config, train), known),
        attribute=kind,
        target=target,
        rate=0.5,
        generator=torch.Generator().manual_seed(seed),
    )
    judge = _classifier(even.images, known, f"{data or about['data']}-{kind}", seed, device, progress)
    name = " or ".join(str(label) if source.names is None else source.names[label] for label in target)
    return _Case(
        planted.images,
        torch.stack([planted.marked, torch.isin(labels, torch.tensor(target))], 1),
        ("corner mark" if kind == "corner" else "colour", name),
        (lambda images: detect(images, kind), lambda images: judge.probabilities(images)[:, target].sum(1)),
        ("the pixels of the mark", f"classifier {judge.name}"),
    )


def _named(
    config: PatronusConfig,
    attribute: list[str],
    about: dict[str, Any],
    data: str | None,
    root: Path | None,
    source: Dataset,
    seed: int,
    device: str | None,
    progress: bool,
) -> _Case:
    import numpy as np
    import torch

    from ..diagnosis import balanced_rows
    from ..images import images_of

    if len(attribute) != 2:
        raise typer.BadParameter(f"{len(attribute)} given; give two", param_hint="--attribute")
    names: list[str] = []
    classes: dict[str, list[int]] = {}
    for text in attribute:
        name, equals, listed = (part.strip() for part in text.partition("="))
        if name in names:
            raise typer.BadParameter(f"{name!r} is given twice; give two attributes", param_hint="--attribute")
        names.append(name)
        if equals:
            if not (name and listed):
                raise typer.BadParameter(f"{text!r} is not NAME=CLASS,CLASS", param_hint="--attribute")
            classes[name] = [class_of(source, label.strip(), "--attribute") for label in listed.split(",")]
        elif name not in source.attribute_names:
            known = ", ".join(source.attribute_names)
            raise typer.BadParameter(
                f"{text!r} is not NAME=CLASS,CLASS, nor is it an attribute of {source.source}"
                + (f", which has {known}" if known else ""),
                param_hint="--attribute",
            )

    def of(part: Dataset) -> Tensor:
        labels = np.zeros(0) if part.labels is None else part.labels  # where an attribute is by classes, there are some
        columns = [np.isin(labels, classes[name]) if name in classes else part.attribute(name) for name in names]
        return torch.from_numpy(np.stack(columns, 1))

    train = at_most(open_data(about, data, root, config, split="train", planted=False), seed)
    # A classifier of data that ties them together would do so itself.
    rows = balanced_rows(of(train), generator=torch.Generator().manual_seed(seed))
    part = train.subset(rows)
    judge = _classifier(images_of(config, part), of(part), f"{data or about['data']}-balanced", seed, device, progress)
    return _Case(
        images_of(config, source),
        of(source),
        (names[0], names[1]),
        (lambda images: judge.probabilities(images)[:, 0], lambda images: judge.probabilities(images)[:, 1]),
        (f"classifier {judge.name}",) * 2,
    )


def _several(target: Any) -> list[Any]:
    return list(target) if isinstance(target, list) else [target]


def _classifier(images: Tensor, labels: Tensor, name: str, seed: int, device: str | None, progress: bool) -> Any:
    from ..._progress import bars

    with bars(progress) as start:
        return classifier_of(images, labels, name, seed, device, start)


def _tell(
    section: Section, names: tuple[str, str], association: Association, intervention: Intervention, attributes: Tensor
) -> None:
    first, second = association.prototypes
    own = [abs(float(association.auroc[k, j]) - 0.5) + 0.5 for k, j in enumerate((first, second))]
    flagged = association.flagged or intervention.flagged
    said = "FLAGGED" if flagged else "Not flagged"
    section.findings.append(
        f"{said}: {names[0]} and {names[1]} are {'' if flagged else 'not found '}tied together "
        f"(prototypes {'correlated' if association.flagged else 'not correlated'} beyond the control level, model "
        f"{'draws' if intervention.flagged else 'does not draw'} the one when told of the other)."
    )
    same = " The same prototype tells both." if first == second else ""
    section.findings.append(
        f"Prototype {first} tells {names[0]} with an AUROC of {own[0]:.2f}, prototype {second} tells {names[1]} with "
        f"{own[1]:.2f}.{same}"
    )
    found = association.spearman
    section.findings.append(
        f"Spearman's correlation of the two is {found.value:.2f}, and {found.balanced:.2f} with the attributes "
        f"balanced: a difference of {found.excess:.2f}, 95 % interval {found.low:.2f} to {found.high:.2f}."
    )
    for k, effect in enumerate(intervention.effects):
        strongest = effect.control.mean(1).max().item()
        section.findings.append(
            f"Turning up prototype {effect.prototype} in {len(effect.other)} images with neither raises {names[k]} by "
            f"{effect.own.mean():.2f} and {names[1 - k]} by {effect.other.mean():.2f}; none of "
            f"{len(effect.controls)} controls raises {names[1 - k]} by more than {strongest:.2f} "
            f"(lower bound beyond it {effect.low:.2f}, p = {effect.p_value:.2f}). It changes a pixel by "
            f"{100 * effect.moved:.1f} % of black to white on average, controls by "
            f"{100 * effect.control_moved.min():.1f} to {100 * effect.control_moved.max():.1f} %."
        )
    if not flagged and min(own) < 0.65:
        section.findings.append(
            f"The model has hardly a prototype for {names[own.index(min(own))]}, so that a tie may have gone unseen."
        )
    statistics = {
        f"Spearman, prototypes {first} and {second}": association.spearman,
        f"AUROC of prototype {first} for {names[1]}": association.crossed[0],
        f"AUROC of prototype {second} for {names[0]}": association.crossed[1],
    }
    section.table(
        "Correlation of the prototypes",
        ["statistic", "as it is", "attributes balanced", "difference", "95 % interval of all three", "flagged"],
        [
            [name, *(round(x, 3) for x in (s.value, s.balanced, s.excess)), f"{s.low:.3f} to {s.high:.3f}", s.flagged]
            for name, s in statistics.items()
        ],
    )
    section.table(
        "Effects of turning a prototype up",
        ["prototype", "of", "raises it by", "raises", "by", "controls, at most", "lower bound beyond", "p", "flagged"],
        [
            [
                *(effect.prototype, names[k], round(effect.own.mean().item(), 3), names[1 - k]),
                *(round(effect.other.mean().item(), 3), round(effect.control.mean(1).max().item(), 3)),
                *(round(effect.low, 3), round(effect.p_value, 3), effect.flagged),
            ]
            for k, effect in enumerate(intervention.effects)
        ],
    )
    one, other = intervention.effects
    section.table(
        "Controls: what turning them up does",
        ["prototype", "changes a pixel by (share of black to white)", *(f"raises {names[k]} by" for k in (1, 0))],
        [
            [j, *(round(value, 4) for value in (moved, first_effect, second_effect))]
            for j, moved, first_effect, second_effect in zip(
                one.controls,
                one.control_moved.tolist(),
                one.control.mean(1).tolist(),
                other.control.mean(1).tolist(),
                strict=True,
            )
        ],
    )
    section.numbers = {
        "flagged": flagged,
        "images": {name: int(attributes[:, k].sum()) for k, name in enumerate(names)},
        "association": {
            "flagged": association.flagged,
            "prototypes": association.prototypes,
            "signs": association.signs,
            "auroc": association.auroc,
            "balanced_auroc": association.balanced_auroc,
            "spearman": _numbers(association.spearman),
            "crossed": [_numbers(found) for found in association.crossed],
        },
        "intervention": {
            "flagged": intervention.flagged,
            "effects": [
                {**effect._asdict(), "p_value": effect.p_value, "flagged": effect.flagged}
                for effect in intervention.effects
            ],
        },
    }


def _numbers(found: Any) -> dict[str, Any]:
    return {**found._asdict(), "excess": found.excess, "flagged": found.flagged}


def _rows(case: _Case, drawn: Tensor, association: Association, intervention: Intervention) -> bytes:
    from ..._sheet import sheet

    groups = [("images", case.images[drawn]), ("as drawn", intervention.before)]
    for k, made in enumerate(intervention.after):
        groups.append((f"{case.names[k][:13]} up", made))
    return sheet([(name, (images.cpu().float() + 1) / 2) for name, images in groups])


def _evidence(
    names: tuple[str, str], pair: Tensor, attributes: Tensor, association: Association, intervention: Intervention
) -> bytes:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    values, has = pair.cpu().numpy(), attributes.cpu().numpy()
    looks = {
        "neither": (~has[:, 0] & ~has[:, 1], "#b9b9b9"),
        f"{names[0]} alone": (has[:, 0] & ~has[:, 1], "#2f6db5"),
        f"{names[1]} alone": (~has[:, 0] & has[:, 1], "#d9822b"),
        "both": (has[:, 0] & has[:, 1], "#7a1f5c"),
    }
    generator = np.random.default_rng(0)
    for name, (inside, colour) in looks.items():
        rows = generator.permutation(inside.nonzero()[0])[:400]
        left.scatter(*values[rows].T, s=6, alpha=0.6, color=colour, label=f"{name} ({inside.sum():,})", linewidths=0)
    left.set_xlabel(f"prototype {association.prototypes[0]}, of {names[0]}")
    left.set_ylabel(f"prototype {association.prototypes[1]}, of {names[1]}")
    found = association.spearman
    left.set_title(f"Spearman {found.value:.2f}; with attributes balanced {found.balanced:.2f}", fontsize=10)
    left.legend(fontsize=7, markerscale=2, framealpha=0.8)

    for k, effect in enumerate(intervention.effects):
        controls = effect.control.mean(1).numpy()
        spread = np.linspace(-0.12, 0.12, len(controls)) if len(controls) > 1 else np.zeros(1)
        right.scatter(controls, k + spread, s=14, color="#8a8a8a", label="a control prototype" if k == 0 else None)
        right.scatter(
            effect.other.mean().item(),
            k,
            s=110,
            color="#c0392b" if effect.flagged else "#3f7d4e",
            label=None,
            zorder=3,
        )
    right.axvline(0, color="#c8c8c8", linewidth=1)
    right.set_yticks([0, 1], [f"{names[k]} up:\nchange of {names[1 - k]}" for k in (0, 1)])
    right.set(ylim=(1.5, -0.5), xlabel="change of the other attribute (0 to 1)")
    right.set_title("red: flagged; green: not; grey: controls", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()
