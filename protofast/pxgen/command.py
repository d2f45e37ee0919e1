"""The commands ``protofast pxgen`` and ``protofast demo``."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..data import Dataset
    from .result import Report

Option = typer.Option

WORK = ".pxgen-work"
"""Name of the folder of a run's tables: nobody else's, because it is removed with all that is in it."""


def pxgen(
    data: Annotated[
        str,
        Option(help="Anchors: `digits`, `fashion-mnist`, `mnist`, a folder of images, or a .npy or .safetensors file."),
    ] = "digits",
    model: Annotated[
        str | None,
        Option(
            help="The model: `module:name` of a model, an adapter or a function that returns one; or a .safetensors "
            "file of a VAE that protofast wrote."
        ),
    ] = None,
    train_class: Annotated[
        str | None,
        Option(help="Instead of a model: train the paper's VAE on this class of the data (number or name); cached."),
    ] = None,
    intrinsic: Annotated[
        str | None, Option(help="How familiar: criteria, comma-separated. By default the model's own, `kld` of a VAE.")
    ] = None,
    extrinsic: Annotated[
        str, Option(help="How well reproduced: `mse`, `sse`, `mae`, `ssim`, `lpips`, comma-separated.")
    ] = "mse",
    thresholds: Annotated[
        str,
        Option(help="`max-mean` (the paper), `percentile` or `percentile:99`, or values such as `kld=5,mse=0.02`."),
    ] = "max-mean",
    iterations: Annotated[int, Option(min=1, help="Repetitions that a threshold is averaged over (paper: 100).")] = 20,
    generations: Annotated[int, Option(min=1, help="Images generated in each repetition (paper: 60,000).")] = 2000,
    discovery: Annotated[
        str, Option(help="`k-center` (typical), `k-dispersion` (diverse), `k-medoids`; comma-separated.")
    ] = "k-center",
    features: Annotated[
        str, Option(help="What representatives are compared on: `criteria`, `pixels` or `latents`.")
    ] = "criteria",
    metric: Annotated[str, Option(help="`euclidean`, `sqeuclidean`, `cosine` or `manhattan`.")] = "euclidean",
    k: Annotated[int, Option("-k", "--k", min=1, help="Representatives of each group.")] = 10,
    sample_latent: Annotated[
        bool,
        Option("--sample-latent", help="Of a VAE: reconstruct from a sampled z, as the paper's code, not the mean."),
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="Anchors analysed at a time.")] = 256,
    split: Annotated[str, Option(help="`train`, `test` or `all`, of data that comes in parts.")] = "all",
    root: Annotated[Path | None, Option(help="Folder of the files of `fashion-mnist` or `mnist`.")] = None,
    image_size: Annotated[int | None, Option(min=1, help="Side to which the images of a folder are resized.")] = None,
    epochs: Annotated[
        int | None, Option(min=1, help="Epochs of --train-class; by default the paper's 2,800 updates.")
    ] = None,
    latent: Annotated[int | None, Option(min=1, help="Latent dimensions of --train-class; 200 at 28 × 28.")] = None,
    device: Annotated[str | None, Option(help="Where to run the model, such as `cuda`.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of all that is random.")] = 0,
    out: Annotated[Path | None, Option(help="Folder of the report; by default runs/pxgen-DATA.")] = None,
    value_range: Annotated[
        str,
        Option(
            help="Lowest and highest value of the model's images, `-1,1` for most diffusion models; anchors are scaled."
        ),
    ] = "0,1",
    progress: Annotated[bool, Option(help="Show progress bars.")] = True,
) -> None:
    """Explain a generative model through anchors: a report of what it knows and what it reproduces.

    Each anchor is judged by how familiar it is to the model (intrinsic) and how well the model reproduces it
    (extrinsic). Thresholds from the model's own generations give four groups; one of them, HILE, is where the model is
    sure and wrong.

    A run that was killed goes on where it was when the same command is given again: its tables are in OUT/.pxgen-work
    until the report is written.

    **Examples**

    `protofast pxgen --data digits --train-class 0`

    `protofast pxgen --data fashion-mnist --train-class 0 --out runs/fashion`

    `protofast pxgen --data photos/ --image-size 64 --model mymodels:load_vae --extrinsic mse,ssim`

    `protofast pxgen --data x.npy --model vae.safetensors --discovery k-medoids --metric manhattan --features pixels`
    (as the paper's public code chooses)
    """
    if (model is None) == (train_class is None):
        raise typer.BadParameter("give either --model or --train-class", param_hint="--model")
    chosen = _thresholds(thresholds)
    span = _range(value_range)
    if train_class is not None and span != (0, 1):
        raise typer.BadParameter("the VAE of --train-class works in 0,1; leave it out", param_hint="--value-range")
    settings: dict[str, Any] = {
        **chosen,
        "iterations": iterations,
        "generations": generations,
        "discovery": _words(discovery),
        "features": features,
        "metric": metric,
        "k": k,
        "value_range": span,
        "batch_size": batch_size,
        "seed": seed,
    }
    criteria = {"intrinsic": None if intrinsic is None else _words(intrinsic), "extrinsic": _words(extrinsic)}
    _check(criteria, settings)
    folder = out or Path("runs") / f"pxgen-{Path(data).stem}"
    _ready(folder)
    from .. import data as sources

    anchors = sources.load(data, split=split, root=root, image_size=image_size)
    label = None
    if train_class is not None:
        label = _label(anchors, train_class)
        subject = f"VAE trained on class {_class_name(anchors, label)} of {data}"
        found: Any = _train(anchors, label, latent=latent, epochs=epochs, seed=seed, progress=progress)
    else:
        subject = f"{model} on {data}"
        found = _model(str(model))
    if sample_latent:
        found = _sampling(found)
    report = _explain(
        found,
        anchors,
        folder,
        label,
        subject,
        **criteria,
        **settings,
        device=device,
        work_dir=folder / WORK,
        progress=progress,
    )
    _tell(report, report.save(folder))
    shutil.rmtree(folder / WORK)


def demo(
    out: Annotated[Path, Option(help="Folder of the report.")] = Path("runs/demo"),
    seed: Annotated[int, Option(min=0, help="Seed of all that is random.")] = 0,
    epochs: Annotated[
        int | None, Option(min=1, help="Epochs of training; by default the paper's 2,800 updates.")
    ] = None,
    iterations: Annotated[int, Option(min=1, help="Repetitions that a threshold is averaged over (paper: 100).")] = 10,
    generations: Annotated[int, Option(min=1, help="Images generated in each repetition (paper: 60,000).")] = 20_000,
    open_page: Annotated[
        bool, Option("--open/--no-open", help="Open the report in a browser, where there is a screen.")
    ] = True,
    progress: Annotated[bool, Option(help="Show progress bars.")] = True,
) -> None:
    """Run the paper's first experiment: a VAE that has only ever seen zeros meets all ten digits.

    Trains the VAE on the zeros of scikit-learn's digits (the weights are cached), analyses all 1,797 digits as anchors
    and writes a report. Nothing is downloaded; it takes less than a minute on two cores.

    **Examples**

    `protofast demo`

    `protofast demo --out runs/zeros --seed 1 --no-open`
    """
    _ready(out)
    from .. import data as sources

    anchors = sources.load("digits", split="all")
    model = _train(anchors, 0, latent=None, epochs=epochs, seed=seed, progress=progress)
    report = _explain(
        _sampling(model),
        anchors,
        out,
        0,
        "VAE trained on the zeros of digits",
        extrinsic=["sse"],
        iterations=iterations,
        generations=generations,
        features="pixels",
        seed=seed,
        progress=progress,
    )
    page = report.save(out)
    _tell(report, page)
    if open_page and _screen():
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


# ---- what the two share ----------------------------------------------------------------------------------------------


def _check(criteria: dict[str, list[str] | None], settings: dict[str, Any]) -> None:
    """Fails now where `explain` would after a model was trained."""
    from .analysis import check_settings
    from .criteria import resolve

    check_settings(**settings)
    for kind, names in criteria.items():
        if names is not None:
            resolve(names, kind, settings["value_range"])


def _ready(folder: Path) -> None:
    """Fails now where the report could not be written after all the work."""
    from .report import check

    check(folder)


def _explain(model: Any, anchors: Dataset, folder: Path, label: int | None, subject: str, **settings: Any) -> Report:
    from . import CriteriaError, explain
    from .adapters import as_adapter

    try:
        report = explain(model, anchors, **settings)
    except CriteriaError as error:
        kept = _keep(error.criteria, folder)
        raise ValueError(f"{error} What was computed is in {kept}.") from error
    report.settings = {"subject": subject, "data": repr(anchors), **report.settings}
    if label is not None:
        report.findings = _findings(as_adapter(model), anchors, report, label, settings["seed"], settings["progress"])
    return report


def _keep(criteria: dict[str, Any], folder: Path) -> Path:
    import numpy as np

    from .._files import replacing

    with replacing(folder / "criteria.npz") as file:
        np.savez(file, **criteria)
    return folder / "criteria.npz"


def _train(anchors: Dataset, label: int, *, latent: int | None, epochs: int | None, seed: int, progress: bool) -> Any:
    from .vae import train_vae

    part = anchors.of_class(label)
    with _bar(f"training on {len(part):,} images", progress) as report:
        return train_vae(part.take(slice(None)), latent=latent, epochs=epochs, seed=seed, progress=report)


def _model(spec: str) -> Any:
    from importlib import import_module

    from torch import nn

    from .vae import load_vae

    module, colon, name = spec.rpartition(":")
    if not colon or Path(spec).exists() or spec.endswith(".safetensors"):
        return load_vae(spec)
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise ValueError(f"--model {spec}: there is no module {module} here or on PYTHONPATH") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model {spec}: {module} has no {name}")
        found = getattr(found, part)
    ready = (
        isinstance(found, nn.Module)
        or (not isinstance(found, type) and hasattr(found, "decode"))
        or not callable(found)
    )
    return found if ready else found()


def _sampling(model: Any) -> Any:
    from .adapters import VAEAdapter

    return VAEAdapter(model, sample_latent=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _thresholds(text: str) -> dict[str, Any]:
    if "=" not in text:
        method, colon, number = text.partition(":")
        if not colon:
            return {"thresholds": method}
        return {"thresholds": method, "percentile": _number(number, text)}
    pairs = [word.partition("=") for word in _words(text)]
    return {"thresholds": {name.strip(): _number(value, text) for name, _, value in pairs}}


def _range(text: str) -> tuple[float, float]:
    ends = text.split(",")
    if len(ends) != 2:
        raise typer.BadParameter(f"{text!r} is no pair such as -1,1", param_hint="--value-range")
    low, high = (_number(end, text, "--value-range") for end in ends)
    return low, high


def _number(word: str, text: str, option: str = "--thresholds") -> float:
    try:
        return float(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} in {text!r} is not a number", param_hint=option) from None


def _label(anchors: Dataset, wanted: str) -> int:
    if anchors.labels is None:
        raise ValueError(f"{anchors.source} has no labels, so --train-class selects nothing; give --model")
    if anchors.names is not None and wanted in anchors.names:
        return anchors.names.index(wanted)
    if wanted.lstrip("-").isdigit() and (anchors.labels == int(wanted)).any():
        return int(wanted)
    known = sorted({int(label) for label in anchors.labels})
    names = "" if anchors.names is None else f" or one of {', '.join(anchors.names[:20])}"
    raise ValueError(f"--train-class is {wanted!r}; {anchors.source} has the classes {known[0]} to {known[-1]}{names}")


def _class_name(anchors: Dataset, label: int) -> str:
    return str(label) if anchors.names is None else anchors.names[label]


def _findings(adapter: Any, anchors: Dataset, report: Report, label: int, seed: int, progress: bool) -> list[str]:
    """What a model trained on one class makes of the others, in words.

    Whether a reconstruction shows that class is for a classifier to say, not for the criteria: it is trained on
    original images, and its accuracy on others is told as well.
    """
    import numpy as np

    from .._optional import need
    from .noise import Noise

    labels = np.asarray(report.labels)
    rows = np.random.default_rng(seed).permutation(len(labels))[:3000]
    cut = 2 * len(rows) // 3
    learned, held_out = np.sort(rows[:cut]), np.sort(rows[cut:])
    judge = need("sklearn.neighbors", "data").KNeighborsClassifier(min(3, max(1, len(learned))))
    judge.fit(anchors.take(learned).flatten(1).numpy(), labels[learned])
    right = float((judge.predict(anchors.take(held_out).flatten(1).numpy()) == labels[held_out]).mean())
    shows = np.empty(len(labels), bool)
    size = report.settings["batch_size"]
    with _bar("what the reconstructions show", progress) as advance:
        for start in range(0, len(labels), size):
            images = anchors.take(slice(start, start + size))
            numbers = range(start, start + len(images))
            found = adapter.analyse(images, Noise(numbers, seed), frozenset({"reconstruction"}))["reconstruction"]
            shows[start : start + size] = judge.predict(found.float().cpu().flatten(1).numpy()) == label
            advance(start + len(images), len(labels))

    name = f"class {_class_name(anchors, label)}"
    own, other = labels == label, labels != label
    deluded, known = np.isin(np.arange(len(labels)), report.members("HILE")), report.members("HIHE")
    return [
        f"The model was trained on {name} alone. Shown the {other.sum():,} anchors of other classes, "
        f"it reconstructs {_part((other & shows).sum(), other.sum())} as {name}.",
        f"On {_part((other & deluded).sum(), other.sum())} of these others it is sure and wrong: as familiar to it "
        f"as its own generations, and badly reproduced (HILE, “model delusion”). Of the {own.sum():,} anchors of "
        f"{name} itself, {_part(own[known].sum(), own.sum())} are known and well reproduced (HIHE).",
        f"What a reconstruction shows was judged by a nearest-neighbour classifier, trained on {len(learned):,} "
        f"originals and right on {100 * right:.1f} % of {len(held_out):,} others.",
    ]


def _part(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(1, total):.1f} %)"


def _tell(report: Report, page: Path) -> None:
    from .report import headline

    wrap = textwrap.TextWrapper(88)
    typer.echo("")
    typer.secho(headline(report) + ".", bold=True)
    for text in report.findings:
        typer.echo(wrap.fill(text))
    typer.echo("")
    for summary in report.summaries:
        bar = "█" * round(40 * summary.share)
        typer.echo(f"  {summary.name}  {summary.count:>9,}  {100 * summary.share:5.1f} %  {bar}")
    typer.echo("")
    for text in report.signatures:
        typer.secho(wrap.fill("! " + text), fg="yellow")
    typer.echo(f"Report: {page.resolve()}")


@contextmanager
def _bar(description: str, show: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
        bars.update(task, total=1, completed=1)  # weights from the cache make no steps


def _screen() -> bool:
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
