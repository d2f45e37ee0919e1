"""The command ``protofast select``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from .result import Selection

Option = typer.Option

ALGORITHMS = {  # and the options that not all of them take
    "k-center": ("--start", "--initial", "--refine", "--engine", "--seed"),
    "k-dispersion": ("--objective", "--refine"),
    "k-medoids": ("--start", "--refine", "--seed"),
    "exact": ("--time-limit",),
}


def select(
    points: Annotated[
        Path,
        typer.Argument(help="A .npy (memory-mapped), .npz, .safetensors, .pt or .csv file of points, one a row."),
    ],
    k: Annotated[int, Option("-k", "--k", min=1, help="How many points to choose.")],
    algorithm: Annotated[
        str,
        Option(
            help="`k-center` (every point near a chosen one), `k-dispersion` (chosen ones far apart), `k-medoids` "
            "(small total distance), `exact` (k-center with proof, for a few thousand points)."
        ),
    ] = "k-center",
    metric: Annotated[
        str | None,
        Option(
            help="`euclidean`, `sqeuclidean`, `cosine`, `manhattan`, or `precomputed` for a matrix of distances. By "
            "default euclidean; manhattan for k-medoids."
        ),
    ] = None,
    start: Annotated[
        str | None,
        Option(
            help="k-center begins at this row, at the `center`, at the `farthest-pair` or at `random`; by default at "
            "row 0. k-medoids begins `even` (spread over the rows) or at `random`."
        ),
    ] = None,
    initial: Annotated[
        str | None, Option(help="k-center: rows that are chosen already, `3,17,40`, or a .npy file of them.")
    ] = None,
    objective: Annotated[
        str | None,
        Option(help="k-dispersion: make the smallest distance large, `max-min` (the default), or the sum, `max-sum`."),
    ] = None,
    refine: Annotated[
        bool | None,
        Option(
            "--refine/--no-refine",
            help="Swap chosen points for better ones afterwards; by default k-dispersion does, k-center and k-medoids "
            "do not.",
        ),
    ] = None,
    time_limit: Annotated[
        float | None, Option(help="exact: seconds after which the best found so far is given, with its gap.")
    ] = None,
    engine: Annotated[
        str | None, Option(help="k-center: `plain`, `boxes`, `pool` or `auto` (the default); how fast, never what.")
    ] = None,
    backend: Annotated[
        str | None, Option(help="`native`, `triton` or `reference`; by default the fastest here.")
    ] = None,
    device: Annotated[str, Option(help="Where to compute, such as `cuda`.")] = "cpu",
    key: Annotated[
        str | None, Option(help="Name of the array in a file of several; by default `points`, or the only one.")
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of `--start random`; by default 0.")] = None,
    out: Annotated[
        Path | None,
        Option(
            "-o",
            "--out",
            help="Where to write the result: .npz or .json. Without it the chosen rows are printed, one a line.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        Option(help="A picture of points and choice as .png; over two dimensions, their two principal components."),
    ] = None,
) -> None:
    """Choose k representative points of a file, and say how good the choice is proven to be.

    The result holds `indices` (chosen rows, in the order chosen), `radii` (covering radius after each), `labels`
    (position in `indices` of the nearest chosen row), `distances` (to it), `objective` (what was optimised) and `bound`
    (what no choice of k rows can beat). It is written whole or not at all. The same command gives the same result.

    **Examples**

    `protofast select points.npy -k 100 -o chosen.npz`

    `protofast select embeddings.safetensors -k 1000 --metric cosine --start center --refine -o chosen.json`

    `protofast select points.csv -k 20 --algorithm k-dispersion --picture chosen.png`

    `protofast select points.npy -k 10 > rows.txt`

    In Python: `found = numpy.load("chosen.npz"); points[found["indices"]]`
    """
    if algorithm not in ALGORITHMS:
        raise typer.BadParameter(f"{algorithm!r} is none of {', '.join(ALGORITHMS)}", param_hint="--algorithm")
    for name, value in (
        ("--start", start),
        ("--initial", initial),
        ("--objective", objective),
        ("--refine", refine),
        ("--time-limit", time_limit),
        ("--engine", engine),
        ("--seed", seed),
    ):
        if value is not None and name not in ALGORITHMS[algorithm]:
            raise typer.BadParameter(f"{algorithm} does not take it", param_hint=name)
    if initial is not None and start is not None:
        raise typer.BadParameter("--initial names the first choices already; leave it out", param_hint="--start")
    if seed is not None and start != "random":
        raise typer.BadParameter("nothing is drawn without --start random; leave it out", param_hint="--seed")
    if time_limit is not None and not time_limit > 0:
        raise typer.BadParameter(f"{time_limit:g} seconds; give more than 0", param_hint="--time-limit")
    if out is not None and out.suffix not in (".npz", ".json"):
        raise typer.BadParameter(f"{out} ends neither in .npz nor in .json", param_hint="--out")
    if picture is not None and picture.suffix != ".png":
        raise typer.BadParameter(f"{picture} does not end in .png", param_hint="--picture")
    metric = metric or ("manhattan" if algorithm == "k-medoids" else "euclidean")
    objective = objective or ("max-min" if algorithm == "k-dispersion" else None)
    seed = 0 if start == "random" and seed is None else seed
    if picture is not None and metric == "precomputed":
        raise typer.BadParameter("distances have no coordinates to draw", param_hint="--picture")
    for path in (out, picture):
        if path is not None:
            _check_place(path)

    from . import files

    inputs = [points, Path(initial)] if initial is not None and initial.endswith(".npy") else [points]
    files.spare(inputs, [path for path in (out, picture) if path is not None])
    first = None if initial is None else _rows(initial)
    x = files.read(points, key)
    begin = time.perf_counter()
    found = _choose(
        x,
        k,
        algorithm,
        metric=metric,
        start=start,
        first=first,
        objective=objective,
        refine=refine,
        time_limit=time_limit,
        engine=engine,
        backend=backend,
        device=device,
        seed=seed,
    )
    seconds = time.perf_counter() - begin
    settings = {
        "points": str(points),
        "shape": list(x.shape),
        "k": k,
        "algorithm": algorithm,
        "metric": metric,
        "start": start,
        "initial": initial,
        "objective": objective,
        "refine": refine,
        "seed": seed,
    }
    if out is not None:
        files.write(out, found, {name: value for name, value in settings.items() if value is not None})
    if picture is not None:
        from .picture import draw

        draw(picture, x, found)
    to_stderr = out is None
    _tell(found, x, algorithm, metric, objective, seconds, err=to_stderr)
    for path in (out, picture):
        if path is not None:
            typer.echo(f"{'Result' if path is out else 'Picture'}: {path.resolve()}", err=to_stderr)
    if out is None:
        typer.echo("\n".join(map(str, found.indices.tolist())))


def _check_place(path: Path) -> None:
    """Refuses what could not be written, before the work that is to be written."""
    import os

    there = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not there.is_dir():
        raise ValueError(f"{path if path.is_dir() else there} is no place for a file; give another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; give another path")


def _choose(
    x: np.ndarray,
    k: int,
    algorithm: str,
    *,
    metric: str,
    start: str | None,
    first: np.ndarray | None,
    objective: str | None,
    refine: bool | None,
    time_limit: float | None,
    engine: str | None,
    backend: str | None,
    device: str,
    seed: int | None,
) -> Selection:
    import torch

    from . import k_center, k_dispersion, k_medoids
    from .inputs import tensor

    points = tensor("points", x)
    if device != "cpu":
        try:
            points = points.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} does not work here: {error}") from error
    options: dict[str, Any] = {"metric": metric, "backend": backend}
    random = torch.Generator().manual_seed(seed or 0) if start == "random" else None
    if algorithm == "k-center":
        begin = random or _start(start)
        options |= {"initial": first, "refine": bool(refine), "engine": engine or "auto"}
        return k_center(points, k, start=begin, **options)
    if algorithm == "k-dispersion":
        return k_dispersion(points, k, objective=objective or "max-min", refine=refine is not False, **options)
    if algorithm == "k-medoids":
        if start not in (None, "even", "random"):
            raise typer.BadParameter(f"{start!r} is neither even nor random", param_hint="--start")
        return k_medoids(points, k, start=random, refine=bool(refine), **options)
    from .exact import exact_k_center

    return exact_k_center(points, k, time_limit=time_limit, **options)


def _start(text: str | None) -> int | str:
    if text is None:
        return 0
    if text.isdigit():
        return int(text)
    if text not in ("center", "farthest-pair"):
        raise typer.BadParameter(f"{text!r} is neither a row nor center, farthest-pair or random", param_hint="--start")
    return text


def _rows(text: str) -> np.ndarray:
    import numpy as np

    if text.endswith(".npy"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"--initial {text} is no file; give rows, 3,17,40, or a .npy file of them")
        try:
            return np.load(text, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"--initial {text} is no whole .npy file of rows ({error}); save it again") from error
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() for word in words):
        raise typer.BadParameter(f"{text!r} is no list of rows such as 3,17,40", param_hint="--initial")
    return np.array(list(map(int, words)))


def _tell(
    found: Selection, x: np.ndarray, algorithm: str, metric: str, objective: str | None, seconds: float, *, err: bool
) -> None:
    k, value, bound = len(found), float(found.objective), float(found.bound)
    shape = f"{len(x):,} points" + ("" if metric == "precomputed" else f" of {x.shape[1]:,} dimensions")
    typer.secho(f"{k:,} of {shape}, by {algorithm} ({metric}), in {_time(seconds)}.", bold=True, err=err)
    radius = float(found.radii[-1])
    lines = []
    if algorithm in ("k-center", "exact"):
        lines.append(("covering radius", f"{value:.6g}: no point is farther from a chosen one"))
        if bound >= value:
            lines.append(("proven", f"optimal: no choice of {k:,} points has a smaller one"))
        elif bound > 0:
            lines.append(
                ("proven", f"none below {bound:.6g} exists, so this is at most {value / bound:.3g} × the best")
            )
    elif algorithm == "k-dispersion":
        pairs = "smallest distance" if objective == "max-min" else "sum of distances"
        lines.append((pairs, f"{value:.6g}: between the chosen points"))
        if value >= bound:
            lines.append(("proven", f"optimal: no choice of {k:,} points has a larger one"))
        elif value > 0 and math.isfinite(bound):
            lines.append(
                ("proven", f"none above {bound:.6g} exists, so this is at least {value / bound:.3g} × the best")
            )
        lines.append(("covering radius", f"{radius:.6g}"))
    else:
        lines.append(("total distance", f"{value:.6g}: on average {value / len(x):.6g} to the nearest medoid"))
        lines.append(("proven", "nothing: a local optimum that depends on the start"))
        lines.append(("covering radius", f"{radius:.6g}"))
    sizes = found.labels.bincount(minlength=k).sort().values
    lines.append(("cluster sizes", f"{int(sizes[0]):,} to {int(sizes[-1]):,} points, median {int(sizes[k // 2]):,}"))
    rows = ", ".join(map(str, found.indices[:10].tolist()))
    lines.append(("chosen rows", rows + (f", … ({k:,})" if k > 10 else "")))
    for name, text in lines:
        typer.echo(f"  {name:<18}{text}", err=err)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
