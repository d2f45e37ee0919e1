"""The command ``protofast patronus evaluate``."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Data, Device, Out, Progress, Root, Run, Section, Seed, Steps, open_data, open_run, ready, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from ...data import Dataset
    from ..evaluation import Classifier, Disentanglement, Features, Probe
    from ..latent import LatentModel
    from ..model import Patronus

Option = typer.Option

MOST = 60_000
"""Images that a classifier is trained on."""

PAPER: dict[str, dict[str, float]] = {
    "fashion-mnist": {"accuracy": 0.82, "conditional": 2.6, "unconditional": 14.7},
    "cifar10": {"accuracy": 0.54, "conditional": 8.0, "unconditional": 32.9},
    "celeba": {"auroc": 0.87, "tad": 0.43, "captured": 9, "unconditional": 14.6},
    "ffhq": {"accuracy": 0.92, "conditional": 24.1, "unconditional": 37.3},
    "chexpert": {"auroc": 0.74, "tad": 0.12, "captured": 3},
}
"""The paper's results. Its table calls all of the first "latent AUROC"; its distances are FID of 10,000 JPEG images."""


def evaluate(
    run: Run,
    data: Data = None,
    root: Root = None,
    samples: Annotated[int, Option(min=2, help="Images drawn, of each kind (paper: 10,000).")] = 1000,
    probed: Annotated[int, Option(min=10, help="Training images whose activations are probed.")] = 10_000,
    steps: Steps = 50,
    inception: Annotated[
        Path | None,
        Option(help="torch-fidelity's weights of InceptionV3, for FID; nothing is downloaded.", show_default=False),
    ] = None,
    classifier: Annotated[
        Path | None, Option(help="A classifier.safetensors of an earlier evaluation; by default one is trained.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Images at a time.")] = 256,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Measure a trained model: what its activations tell, and how good its images are.

    Latent probe: logistic regression on the activations, 5-fold, as accuracy and as AUROC, beside the same on as many
    principal components of the pixels and on activations of an untrained model. TAD and captured attributes: how far
    single prototypes stand for single classes. Agreement: how often a classifier sees in an image drawn of an image's
    activations what that image is of. Of data with attributes (celeba, ffhq, chexpert), attributes take the place of
    classes.

    Distance of drawn images from real ones, of the test images' activations, and without them if `protofast patronus
    latent` was run: FID if `--inception` is given, and otherwise the Fréchet distance over the features of the
    classifier, which is trained first (a minute on two cores, then cached), named, and saved with the results. All
    are means over five random sets of test images; the floor is what real training images get. Images are rounded to 8
    bits, and not compressed.

    A few minutes on two cores for a small model; sampling takes most of it.

    OUT gets `conditional.png`, `prototypes.png` (AUROC of each prototype for each class), `unconditional.png`,
    `classifier.safetensors` and `result.json`.

    **Examples**

    `protofast patronus evaluate runs/fashion`

    `protofast patronus evaluate runs/fashion --samples 10000 --steps 1000 --probed 60000 --inception pt_inception.pth`
    """
    folder = ready(run, out, "evaluate")

    from ..._progress import bars
    from ..._sheet import sheet
    from .. import TrainingConfig
    from ..evaluation import (
        Classifier,
        agreement,
        classifier_features,
        disentanglement,
        inception_features,
        probe,
        quantised,
        reference_distances,
        untrained,
    )
    from ..generate import sample
    from ..images import images_of

    model, about = open_run(run, device)
    train, test = (open_data(about, data, root, model.config, split=split) for split in ("train", "test"))
    if known_of(train) is None and inception is None:
        raise ValueError(
            f"{train.source} has no labels or attributes, which all but FID needs; give --inception, or other --data"
        )
    section = Section("evaluate", "How good the model is")
    section.settings = {"data": data or about.get("data"), "samples": samples, "steps": steps, "seed": seed}
    paper = PAPER.get(str(section.settings["data"]), {})

    with bars(progress) as start:
        judge: Classifier | None = None
        if known_of(train) is not None:
            section.settings["probed"] = count = min(probed, len(train))
            part = train.subset(drawn(len(train), count, seed).sort().values)
            images, labels = images_of(model.config, part), _known(part)
            activations = model.activations(images, batch_size=batch_size)
            size, advance = model.config.num_prototypes, start("probing", 4, 0)
            kept = min(size, images[0].numel(), count * 4 // 5)  # no more than a fold's training part has images
            settings = TrainingConfig.from_dict(about["made_by"]["training"]) if "made_by" in about else None
            start_of = untrained(model.config, images, settings=settings, seed=seed)
            probes: dict[str, Probe] = {}
            for name, codes, components in (
                ("activations of the model", activations, None),
                (f"{kept} principal components of the pixels", images, kept),
                ("activations of an untrained model", start_of.activations(images, batch_size=batch_size), None),
            ):
                probes[name] = probe(codes, labels, components=components, seed=seed)
                advance(1)
            found = disentanglement(activations, labels, seed=seed)
            advance(1)
            _tell_probes(section, probes, kept, labels.ndim == 2, paper)
            _tell_disentanglement(section, found, _names(part, labels), labels.ndim == 2, paper)

            if classifier is not None:
                judge = Classifier.load(classifier).to(device)
            else:
                part = at_most(train, seed)
                name = str(section.settings["data"])
                judge = classifier_of(images_of(model.config, part), _known(part), name, seed, device, start)
            judge.save(folder / "classifier.safetensors")

        sources = test.subset(drawn(len(test), samples, seed))
        real = images_of(model.config, sources)
        encoded = model.activations(real, batch_size=batch_size)
        made = {"conditional": sample(model, encoded, steps, seed=seed, batch_size=batch_size, progress=progress)}
        latent = _latent(run, model, section, device)
        if latent is not None:
            from ..latent import sample_unconditional

            fresh = sample_unconditional(
                model, latent, len(real), num_steps=steps, seed=seed, batch_size=batch_size, progress=progress
            )
            made["unconditional"] = fresh.images.cpu()

        if judge is not None:
            agreed = agreement(judge, quantised(made["conditional"]), quantised(real), _known(sources))
            section.numbers["agreement"] = agreed._asdict()
            if judge.several:
                section.findings.append(
                    f"In {len(real):,} images drawn of test images' activations, classifier {judge.name} sees "
                    f"{100 * agreed.label:.1f} % of the attributes as their sources have them (in the sources "
                    f"themselves {100 * agreed.ceiling:.1f} %), and {100 * agreed.answer:.1f} % as it sees them there."
                )
            else:
                section.findings.append(
                    f"Of {len(real):,} images drawn of test images' activations, classifier {judge.name} gives "
                    f"{100 * agreed.label:.1f} % the class of their source (it gives {100 * agreed.ceiling:.1f} % of "
                    f"the sources themselves their class), and {100 * agreed.answer:.1f} % the same class as their "
                    "source."
                )
        features = inception_features(inception, device=device) if inception else classifier_features(_given(judge))
        pool = features.of(quantised(images_of(model.config, test.subset(drawn(len(test), MOST, seed)))))
        floor = features.of(quantised(images_of(model.config, train.subset(drawn(len(train), len(real), seed)))))
        sets = {name: features.of(quantised(images)) for name, images in made.items()}
        sets["floor"] = floor
        advance = start("comparing with test images", len(sets), 0)
        distances = {}
        for name, values in sets.items():
            distances[name] = reference_distances(values, pool, seed=seed)
            advance(1)
    _tell_distances(section, distances, features, len(real), paper)

    shown = [("source", _light(real)), ("drawn of it", _light(made["conditional"]))]
    section.picture(
        "conditional.png",
        _pairs(shown),
        "Images drawn of the activations of test images",
        "In each pair of rows, test images above, and below what the model draws of their activations and fresh noise: "
        "what the prototypes see stays, the rest is invented.",
    )
    if "unconditional" in made:
        section.picture(
            "unconditional.png",
            sheet([("drawn", _light(made["unconditional"]))], rows=6),
            "Images drawn of nothing",
            "Activations from the latent model, and noise.",
        )
    tell(section, section.write(folder))


def known_of(source: Dataset) -> np.ndarray | None:
    """What is known of each image: its class (n,), or else its attributes (n, K)."""
    return source.attributes if source.labels is None else source.labels


def _known(source: Dataset) -> Tensor:
    import torch

    return torch.as_tensor(known_of(source))


def _names(source: Dataset, known: Tensor) -> list[str]:
    """Of the classes that occur, or of the attributes."""
    if known.ndim == 2:
        return list(source.attribute_names)
    return [str(label) if source.names is None else source.names[label] for label in known.unique().tolist()]


def at_most(part: Dataset, seed: int) -> Dataset:
    """As much of a data set as a classifier is trained on."""
    return part.subset(drawn(len(part), MOST, seed).sort().values)


def classifier_of(
    images: Tensor, labels: Tensor, name: str, seed: int, device: str | None, start: Callable[..., Any]
) -> Classifier:
    """`train_classifier` with one of the `bars` that `start` starts."""
    from ..._progress import told_totals
    from ..evaluation import train_classifier

    trained = told_totals(start("training a classifier", None, 0))
    return train_classifier(images, labels, name=name, seed=seed, device=device, progress=trained)


def _latent(run: Path, model: Patronus, section: Section, device: str | None) -> LatentModel | None:
    """The latent model of a run, if it is of the model's activations; else says why there is none."""
    from ..._files import digest
    from ..latent import CONFIG, LatentModel

    cure = f"run `protofast patronus latent {run}`, and this again."
    if not (run / CONFIG).exists():
        section.findings.append(f"No image was drawn of nothing, as there is no latent model: {cure}")
        return None
    latent = LatentModel.from_pretrained(run, device=device)
    of = json.loads((run / CONFIG).read_bytes())["about"].get("prototypes")
    if of == digest(model.prototypes.prototype_vectors.detach().cpu()):
        return latent
    section.findings.append(
        f"No image was drawn of nothing, as the latent model in {run / CONFIG} is of "
        f"{'other' if of else 'unknown'} prototypes than the model's: {cure}"
    )
    return None


def drawn(n: int, count: int, seed: int) -> Tensor:
    """`count` of n rows, or all, in an order that the seed draws."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]


def _given(judge: Classifier | None) -> Classifier:
    assert judge is not None  # there are labels where there is no Inception
    return judge


def _light(images: Tensor) -> Tensor:
    return (images.float() + 1) / 2


def _spread(values: Tensor, digits: int = 3) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(correction=0):.{digits}f}"


def _numbers(values: Tensor) -> dict[str, Any]:
    return {"mean": values.mean().item(), "std": values.std(correction=0).item(), "each": values}


def _tell_probes(section: Section, probes: dict[str, Probe], kept: int, several: bool, paper: dict[str, float]) -> None:
    rows: list[list[Any]] = [[name, _spread(scores.accuracy), _spread(scores.auroc)] for name, scores in probes.items()]
    if "accuracy" in paper or "auroc" in paper:
        rows.append(["the paper's activations", paper.get("accuracy", "–"), paper.get("auroc", "–")])
    section.table("Logistic regression, 5-fold (mean ± std over folds)", ["codes", "accuracy", "AUROC"], rows)
    keys = ("activations", "pca", "untrained")
    section.numbers["probe"] = {
        key: {"accuracy": _numbers(scores.accuracy), "auroc": _numbers(scores.auroc)}
        for key, scores in zip(keys, probes.values(), strict=True)
    }
    if several:
        mine, pixels, none = (scores.auroc.mean().item() for scores in probes.values())
        section.findings.append(
            f"A linear classifier tells attributes by the activations with a mean AUROC of {mine:.3f}, by {kept} "
            f"principal components of the pixels of {pixels:.3f}, and by those of an untrained model of {none:.3f}."
        )
        return
    mine, pixels, none = (scores.accuracy.mean().item() for scores in probes.values())
    section.findings.append(
        f"A linear classifier reads the class off the activations in {100 * mine:.1f} % of images, off {kept} "
        f"principal components of the pixels in {100 * pixels:.1f} %, and off an untrained model's activations in "
        f"{100 * none:.1f} %."
    )


def _tell_disentanglement(
    section: Section, found: Disentanglement, names: list[str], several: bool, paper: dict[str, float]
) -> None:
    one, many = ("attribute", "attributes") if several else ("class", "classes")
    number = found.captured.sum(1).double()
    mean = found.auroc.mean(0)
    best = mean.argmax(1)
    two = mean.topk(2).values
    section.table(
        f"The prototype that tells each {one} best",
        [one, "prototype", "AUROC", "AUROC of the second best", "captured in folds"],
        [
            [
                name,
                int(best[k]),
                *(round(value, 3) for value in two[k].tolist()),
                f"{int(found.captured[:, k].sum())} of 5",
            ]
            for k, name in enumerate(names)
        ],
    )
    section.numbers["disentanglement"] = {"tad": _numbers(found.tad), "captured": _numbers(number)}
    section.numbers["disentanglement"] |= {"attributes": names, "auroc": mean, "prototypes": best}
    theirs = f" (paper: {paper['tad']}, {paper['captured']:.0f} captured)" if "tad" in paper else ""
    section.findings.append(
        f"Single prototypes capture {number.mean():.1f} of {len(names)} {many} (AUROC of 0.75 or more); TAD, by which "
        f"the best prototypes lead the second best, is {_spread(found.tad)}{theirs}."
    )
    section.picture(
        "prototypes.png",
        _matrix(mean, names),
        "What each prototype tells by itself",
        f"AUROC of each prototype's activation for each {one} against the rest, the better of both signs: 0.5 is "
        f"chance, 1 tells them apart without error. The dot is the best of each {one}.",
    )


def _tell_distances(
    section: Section, distances: dict[str, Tensor], features: Features, size: int, paper: dict[str, float]
) -> None:
    real = features.distance == "FID"
    titles = {
        "conditional": "drawn of test images' activations",
        "unconditional": "drawn of nothing",
        "floor": "training images (the floor)",
    }
    beside = real and size >= 10_000  # FID depends on the number of images
    columns = ["images", features.distance, *(["the paper's FID (of 10,000 JPEG images)"] if beside else [])]
    rows: list[list[Any]] = []
    for name, values in distances.items():
        rows.append([titles[name], _spread(values, 2), *([paper.get(name, "–")] if beside else [])])
    section.table(f"Distance from {size:,} test images (mean ± std over five draws of them)", columns, rows)
    section.numbers["distance"] = {"name": features.distance, "size": size}
    section.numbers["distance"] |= {name: _numbers(values) for name, values in distances.items()}
    parts = [f"{_spread(values, 1)} for images {titles[name]}" for name, values in distances.items() if name != "floor"]
    section.findings.append(
        f"{features.distance} from {size:,} test images: {', '.join(parts)}; {_spread(distances['floor'], 1)} for as "
        "many training images, the floor."
        + ("" if real else " It is no FID, and can be compared only under the same classifier and number of images.")
    )


def _pairs(groups: list[tuple[str, Tensor]], rows: int = 4, columns: int = 14) -> bytes:
    from ..._sheet import sheet

    parts = range(0, min(rows * columns, len(groups[0][1])), columns)
    return sheet(
        [(name, images[first : first + columns]) for first in parts for name, images in groups], columns=columns
    )


def _matrix(aurocs: Tensor, names: list[str]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, size = aurocs.shape
    figure = Figure(figsize=(2.2 + 0.24 * size, 1.3 + 0.28 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    order = aurocs.argmax(1)
    shown = axes.imshow(aurocs.numpy(), cmap="viridis", vmin=0.5, vmax=1, aspect="auto")
    axes.plot(order.numpy(), range(count), "o", markersize=5, color="white", markeredgecolor="black")
    axes.set_yticks(range(count), names)
    axes.set_xticks(range(size), [str(j) for j in range(size)], fontsize=7, rotation=90 if size > 40 else 0)
    axes.set_xlabel("prototype")
    figure.colorbar(shown, ax=axes, label="AUROC", fraction=0.03, pad=0.01)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()
