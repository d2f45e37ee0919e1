"""The command ``protofast patronus latent``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Data, Device, Out, Progress, Root, Run, Section, Seed, Steps

if TYPE_CHECKING:
    import numpy as np

    from ..latent import LatentQuality

Option = typer.Option

NAMES = {"ddim": "DDIM", "renoise": "re-noising", "gaussian": "Gaussian"}


def latent(
    run: Run,
    data: Data = None,
    root: Root = None,
    updates: Annotated[int, Option(min=1, help="Batches of 256 to train on.")] = 4000,
    samples: Annotated[int, Option(min=2, help="Activation vectors compared with held-out ones.")] = 5000,
    images: Annotated[int, Option(min=1, help="Unconditional images of each kind in the picture.")] = 28,
    steps: Steps = 50,
    out: Out = None,
    seed: Seed = 0,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Learn which activations go together, and make images of nothing.

    A trained model makes images from activations, and activations come from images. This command trains a small
    diffusion model over the activation vectors of the training images, so that new ones can be drawn, and images be
    made from those. It takes a minute or two on two cores for 60,000 images and 30 prototypes. The result,
    `latent.safetensors` and `latent.json`, stays in RUN for the other commands: the same command again only samples,
    and one that was killed in training goes on where it was.

    Three ways of drawing activations are set beside held-out ones: DDIM, what the paper's code calls by that name
    (fresh noise at each step), and a Gaussian with the mean and covariance of the training activations.

    OUT (by default RUN/latent) gets `unconditional.png` (held-out images, and images of each kind, from the same
    noise), `marginals.png` (values of the prototypes that vary most), `correlations.png` and `result.json`.

    **Examples**

    `protofast patronus latent runs/fashion`

    `protofast patronus latent runs/fashion --updates 20000 --steps 100 --images 56`
    """
    import time

    from ..._progress import bars, told_totals
    from ..._sheet import sheet
    from ..images import images_of
    from ..latent import SAMPLERS, activations_of, decode, gaussian, latent_quality, train_latent
    from .common import open_data, open_run, ready, tell

    folder = ready(run, out, "latent")
    model, about = open_run(run, device)
    parts = {
        name: open_data(about, data, root, model.config, split=split)
        for name, split in (("training", "train"), ("held out", "test"))
    }
    seconds = {}
    with bars(progress) as start:
        found = {}
        for name, part in parts.items():
            begin = time.perf_counter()
            found[name] = activations_of(
                model, part, progress=told_totals(start(f"activations ({name})", len(part), 0))
            )
            seconds[name] = time.perf_counter() - begin
        trained, held_out = found["training"], found["held out"]
        begin, done = time.perf_counter(), 0

        def count(at: int, total: int) -> None:
            nonlocal done
            done += 1
            advance(at, total)

        advance = told_totals(start("latent model", updates, 0))
        prior = train_latent(
            trained,
            updates=updates,
            seed=seed,
            device=model.device,
            folder=run,
            prototypes=model.prototypes.prototype_vectors,
            progress=count,
        )
        seconds["latent model"] = time.perf_counter() - begin
        advance(updates, updates)  # a model that was kept makes no steps

        draws = {}
        tick = start("sampling activations", len(NAMES), 0)
        for name in SAMPLERS:
            draws[name] = prior.sample(samples, sampler=name, seed=seed).cpu()
            tick(1)
        draws["gaussian"] = gaussian(trained, samples, seed=seed)
        tick(1)
        tick = start("comparing", 1 + len(draws), 0)
        quality = {}
        for name, points in {"training": trained, **draws}.items():
            quality[name] = latent_quality(points, held_out, seed=seed)
            tick(1)
        tick = start("images", len(draws), 0)
        shown = [("held out", images_of(model.config, parts["held out"].subset(_some(len(held_out), images, seed))))]
        for name, points in draws.items():
            shown.append((NAMES[name], decode(model, points[:images], num_steps=steps, seed=seed).cpu()))
            tick(1)

    section = Section("latent", "Unconditional images: a model of the activations")
    section.findings = _findings(quality, len(trained), done, updates, seconds)
    rows = [
        [title, *(f"{value:.3f}" for value in _summary(quality[name]).values())]
        for name, title in {"training": "training images (the floor)", **NAMES}.items()
    ]
    columns = ["activations", "Wasserstein-1", "its worst", "spread", "correlations", "1-NN accuracy"]
    section.table("Activations against those of held-out images", columns, rows)
    tiles = [(name, (pictures + 1) / 2) for name, pictures in shown]
    section.picture(
        "unconditional.png",
        sheet(tiles, rows=-(-images // 14)),
        "Images of drawn activations",
        f"Held-out images, and images by {steps} DDIM steps from activations drawn in three ways. Images in the same "
        "place of two blocks were made from the same noise.",
    )
    values = {"held out": held_out.numpy(), **{NAMES[name]: points.numpy() for name, points in draws.items()}}
    section.picture(
        "marginals.png",
        _marginals(values),
        "Values of the prototypes that vary most",
        "Grey: held-out images. Lines: drawn activations. The line that follows the grey shape is the better sampler.",
    )
    section.picture(
        "correlations.png",
        _correlations(values),
        "Correlations between prototypes",
        "Red: two prototypes are active together; blue: one instead of the other. The panels should look alike.",
    )
    section.numbers = {
        "parameters": sum(parameter.numel() for parameter in prior.parameters()),
        "losses": prior.losses,
        "seconds": seconds,
        "updates_made": done,
        "quality": {
            name: {**_summary(told), "wasserstein": told.wasserstein, "spread": told.spread}
            for name, told in quality.items()
        },
    }
    section.settings = {
        "data": parts["training"].source,
        "training": len(trained),
        "held_out": len(held_out),
        "updates": updates,
        "samples": samples,
        "images": images,
        "steps": steps,
        "seed": seed,
    }
    tell(section, section.write(folder))


def _some(total: int, count: int, seed: int) -> np.ndarray:
    import numpy as np

    return np.random.default_rng(seed).permutation(total)[:count]


def _summary(quality: LatentQuality) -> dict[str, float]:
    return {
        "wasserstein_mean": float(quality.wasserstein.mean()),
        "wasserstein_worst": float(quality.wasserstein.max()),
        "spread_mean": float(quality.spread.mean()),
        "correlation": quality.correlation,
        "nearest_neighbour_accuracy": quality.accuracy,
    }


def _findings(
    quality: Mapping[str, LatentQuality], vectors: int, done: int, updates: int, seconds: Mapping[str, float]
) -> list[str]:
    found = {name: _summary(value) for name, value in quality.items()}
    near = {name: value["nearest_neighbour_accuracy"] for name, value in found.items()}
    moved = {name: value["wasserstein_mean"] for name, value in found.items()}
    how = f"in {seconds['latent model']:.0f} s" if done == updates else f"earlier: {done:,} updates were left to make"
    return [
        f"The latent model learned from {vectors:,} activation vectors, found once in {seconds['training']:.0f} s, by "
        f"{updates:,} updates, {how}.",
        f"A nearest neighbour tells drawn activations from those of held-out images with accuracy {near['ddim']:.2f} "
        f"for DDIM, {near['renoise']:.2f} for re-noising and {near['gaussian']:.2f} for the Gaussian; 0.5 is chance, "
        f"and training images have {near['training']:.2f}.",
        f"The values of a prototype are {moved['ddim']:.3f} of a standard deviation away (Wasserstein-1) by DDIM, "
        f"{moved['renoise']:.3f} by re-noising, {moved['gaussian']:.3f} in the Gaussian, and {moved['training']:.3f} "
        "among training images.",
        f"Re-noising, which the paper's code calls DDIM, keeps {100 * found['renoise']['spread_mean']:.0f} % of the "
        f"spread of the activations; DDIM keeps {100 * found['ddim']['spread_mean']:.0f} %.",
    ]


COLORS = {"DDIM": "#0072b2", "re-noising": "#d55e00", "Gaussian": "#009e73"}


def _marginals(points: Mapping[str, np.ndarray], *, most: int = 12) -> bytes:
    """Histograms of the prototypes whose held-out values vary most; `points` begins with the held-out ones."""
    import numpy as np

    from ..._optional import need

    held_out = points["held out"]
    chosen = np.sort(np.argsort(-held_out.std(0), kind="stable")[:most])
    figure = need("matplotlib.figure", "patronus").Figure(figsize=(11, 2.1 * -(-len(chosen) // 4) + 0.4))
    axes = figure.subplots(-(-len(chosen) // 4), 4, squeeze=False).flat
    for place, ax in enumerate(axes):
        if place >= len(chosen):
            ax.set_axis_off()
            continue
        values = {name: drawn[:, chosen[place]] for name, drawn in points.items()}
        low, high = np.quantile(values["held out"], (0.002, 0.998)).tolist()
        bins = np.linspace(low, high, 41) if low < high else np.linspace(low - 0.5, low + 0.5, 41)
        for name, column in values.items():
            # Shares of all, also of what lies outside the picture.
            share = {"weights": np.full(len(column), 100 / len(column))}
            if name == "held out":
                ax.hist(column, bins, color="0.8", label=name, **share)
            else:
                ax.hist(column, bins, histtype="step", color=COLORS[name], linewidth=1.3, label=name, **share)
        ax.set_title(f"prototype {chosen[place]}", fontsize=9)
        ax.set_yticks([])
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right", "left"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(points), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    return _png(figure)


def _correlations(points: Mapping[str, np.ndarray]) -> bytes:
    """One matrix a kind of activations, the prototypes in one order that puts those that go together side by side."""
    import numpy as np

    from ..._optional import need

    hierarchy = need("scipy.cluster.hierarchy", "patronus")
    with np.errstate(invalid="ignore", divide="ignore"):  # prototypes that never vary
        matrices = {
            name: np.nan_to_num(np.atleast_2d(np.corrcoef(drawn, rowvar=False))) for name, drawn in points.items()
        }
    first = matrices["held out"]
    order = np.arange(len(first))
    if len(first) > 2:
        apart = 1 - first[np.triu_indices(len(first), 1)]
        order = hierarchy.leaves_list(hierarchy.linkage(apart, "average", optimal_ordering=True))
    figure = need("matplotlib.figure", "patronus").Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, len(matrices))
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        difference = np.abs(matrix - first)[np.triu_indices(len(first), 1)]
        ax.set_title(name, fontsize=10)
        if name != "held out" and len(difference):
            ax.set_xlabel(f"mean difference {difference.mean():.3f}", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.75)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from io import BytesIO

    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
