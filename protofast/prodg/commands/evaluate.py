"""The command ``protofast prodg evaluate``."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Folder, Out, Progress, Section, Seed, tell

if TYPE_CHECKING:
    from ..networks import SplitNetwork
    from ..runs import Run

Option = typer.Option

TITLES = {"prodg": "ProDG", "epic": "EPIC", "infodisent": "InfoDisent"}
QUANTITIES = {
    "prototype_purity_start": "channel purity of prototypes before any update",
    "prototype_purity_before": "channel purity of the prototypes, U = I",
    "prototype_purity": "channel purity of the prototypes",
    "image_purity_before": "channel purity of held-out images, U = I",
    "image_purity": "channel purity of held-out images",
    "prototype_similarity": "cosine of a channel's prototypes (lower: more diverse)",
    "logit_error": "largest difference of logits to the network's (relative)",
    "accuracy": "accuracy",
    "removal_top": "fall of the probability without the top 4 channels",
    "removal_random": "… without 4 random channels",
    "deletion": "deletion (lower is better)",
    "random_deletion": "… in random order",
    "insertion": "insertion (higher is better)",
    "random_insertion": "… in random order",
    "agreement": "agreement of two seeds' bases",
    "agreement_identity": "… of each with U = I",
    "agreement_random": "… of random bases",
}


def evaluate(
    run: Folder,
    count: Annotated[int, Option(min=2, help="Prototypes, and images, of a channel.")] = 5,
    few: Annotated[int, Option(min=1, help="Images for deletion and insertion.")] = 200,
    most: Annotated[int | None, Option(min=1, help="Held-out images; by default all.")] = None,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Measure what was learned, on held-out images: every method and seed that is trained in RUN.

    Channel purity (the cosine that ProDG and EPIC make large; not PIP-Net's part purity) of prototypes and of real
    images, before and after; diversity of a channel's prototypes; whether logits are the network's own; how far the
    probability falls without the channels of an explanation, and without random ones; deletion and insertion of pixels
    by heat map; agreement of seeds. Means over seeds, with standard deviations.

    OUT gets `purity.png`, `training.png` and `result.json`.

    **Example**

    `protofast prodg evaluate runs/prodg`
    """
    from ..._report.section import ready
    from ..runs import METHODS, Run

    opened = Run.open(run)
    folder = ready(out or run / "evaluate", "prodg", "evaluate")
    trained = {name: seeds for name in METHODS if (seeds := opened.trained(name))}
    if not trained:
        raise FileNotFoundError(f"{run} holds nothing trained; run `protofast prodg train {run}`")
    section = Section("evaluate", "What the explanations are worth")
    section.settings = {"count": count, "few": few, "most": most, "seed": seed, "seeds": trained}
    network = opened.network(device)
    evaluate_into(section, opened, network, trained, count=count, few=few, most=most, seed=seed, progress=progress)
    tell(section, section.write(folder))


def evaluate_into(
    section: Section,
    run: Run,
    network: SplitNetwork,
    trained: dict[str, list[int]],
    *,
    count: int,
    few: int,
    most: int | None,
    seed: int,
    progress: bool,
) -> None:
    """Adds the tables and charts."""
    import numpy as np
    import torch

    from ..evaluation import across_seeds, agreement, evaluate, prototype_purity
    from ..figures import history_chart, purity_chart
    from ..training import ProDG

    images = run.images("test")
    images = images if most is None else images.subset(np.arange(min(most, len(images))))
    if images.labels is not None and int(images.labels.min()) < 0:  # labels of some are unknown
        images = type(images)(images.take(slice(None)).numpy(), source=images.source)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trained}
    stats, histories = {}, []
    for name, seeds in trained.items():
        matrices = []
        for one in seeds:
            result = run.result(name, one, network)
            concepts = result.concepts()
            typer.echo(f"{TITLES[name]}, seed {one}")
            found = evaluate(concepts, images, count=count, few=few, seed=seed, progress=progress)
            if isinstance(result, ProDG):
                begin = prototype_purity(result.start(seed=one).concepts(), count=count, seed=seed)
                found["prototype_purity_start"] = float(begin.mean())
                histories.append(result.history)
            rows[name].append({"seed": one, **found})
            matrices.append(concepts.matrix.cpu())
        stats[name] = across_seeds([{key: row[key] for key in row if key != "seed"} for row in rows[name]])
        pairs = [agreement(first, second) for first, second in combinations(matrices, 2)]
        if pairs:
            own = [agreement(matrix, torch.eye(len(matrix))).cosine for matrix in matrices]
            stats[name] |= across_seeds([{"agreement": pair.cosine, "agreement_random": pair.random} for pair in pairs])
            stats[name] |= across_seeds([{"agreement_identity": value} for value in own])
    section.numbers = {"runs": rows, "stats": stats}
    table = [
        [title, *(_shown(stats[name].get(key)) for name in trained)]
        for key, title in QUANTITIES.items()
        if any(key in stats[name] for name in trained)
    ]
    section.table("Means over seeds ± standard deviation", ["quantity", *(TITLES[name] for name in trained)], table)
    caption = "Grey: the same images seen without the rotation. Blue: with it. Bars: standard deviation over seeds."
    section.picture("purity.png", purity_chart(stats, TITLES), "Channel purity", caption)
    if histories:
        caption = "Mean over the last 20 updates of the images that a batch drew; a line a seed."
        section.picture("training.png", history_chart(histories), "ProDG's training", caption)
    for name, values in stats.items():
        first = values.get("prototype_purity_start", values["prototype_purity_before"])
        shown = [first, *(values[key] for key in ("prototype_purity", "image_purity_before", "image_purity"))]
        start, end, before, after = (f"{value['mean']:.3f}" for value in shown)
        section.findings.append(
            f"{TITLES[name]} ({first['runs']} seeds): channel purity of prototypes {start} → {end}, of held-out images "
            f"{before} → {after}."
        )


def _shown(value: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    form = "{:.1e}" if abs(value["mean"]) < 1e-3 else "{:.3f}"
    spread = f" ± {form.format(value['sd'])}" if value["runs"] > 1 else ""
    return form.format(value["mean"]) + spread
