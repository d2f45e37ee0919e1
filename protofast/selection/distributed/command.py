"""The command ``torchrun … -m protofast.selection.distributed``."""

from __future__ import annotations

import os
from datetime import timedelta
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from ..result import Selection

Option = typer.Option


def select(
    files: Annotated[
        list[str],
        typer.Argument(help="Files of points, one a row: .npy (memory-mapped) or others `protofast select` reads."),
    ],
    k: Annotated[int, Option("-k", "--k", min=1, help="How many points to choose.")],
    out: Annotated[Path, Option("-o", "--out", help="Where the first rank writes the choice, as .npz.")],
    algorithm: Annotated[str, Option(help="`k-center` or `k-dispersion`.")] = "k-center",
    metric: Annotated[str, Option(help="`euclidean`, `sqeuclidean`, `cosine` or `manhattan`.")] = "euclidean",
    start: Annotated[
        str | None,
        Option(
            help="k-center begins at this row, at the `center`, at the `farthest-pair` or at `random`; by default at "
            "row 0."
        ),
    ] = None,
    objective: Annotated[
        str | None, Option(help="k-dispersion: `max-min` (the default) or `max-sum` of the distances.")
    ] = None,
    refine: Annotated[
        bool | None, Option("--refine/--no-refine", help="k-dispersion: swap for better points, as by default.")
    ] = None,
    own_files: Annotated[
        bool,
        Option(
            "--own-files",
            help="Each machine has files of its own under these names, which its processes divide. Without it, every "
            "machine sees the same files, and all processes divide them.",
        ),
    ] = False,
    labels: Annotated[
        Path | None,
        Option(help="Folder where each rank writes the labels and distances of its rows, rank-00000.npz and so on."),
    ] = None,
    device: Annotated[str, Option(help="`cpu` (over gloo) or `cuda` (one GPU a process, over nccl).")] = "cpu",
    backend: Annotated[str | None, Option(help="`native`, `triton` or `reference`; by default the fastest.")] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of `--start random`; by default 0.")] = None,
    timeout: Annotated[float, Option(min=1, help="Seconds after which a rank that does not answer is given up.")] = 600,
) -> None:
    """Choose k points of files that many processes read together; the same choice as one process would make.

    Start it with torchrun, on each machine. OUT holds `indices` (rows, counted over the files one after another; with
    --own-files over the machines), `radii`, `objective`, `bound`, and `first_rows` (of each rank, and the end).

    **Examples**

    `torchrun --nproc-per-node 4 -m protofast.selection.distributed 'points-*.npy' -k 1000 -o chosen.npz`
    """
    if "RANK" not in os.environ:
        raise typer.BadParameter(
            "start it with torchrun --nproc-per-node N -m protofast.selection.distributed …, or use `protofast select` "
            "for one process"
        )
    if algorithm not in ("k-center", "k-dispersion"):
        raise typer.BadParameter(f"{algorithm!r} is neither k-center nor k-dispersion", param_hint="--algorithm")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    if out.suffix != ".npz":
        raise typer.BadParameter(f"{out} does not end in .npz", param_hint="--out")
    for name, value, taker in (
        ("--start", start, "k-center"),
        ("--seed", seed, "k-center"),
        ("--objective", objective, "k-dispersion"),
        ("--refine", refine, "k-dispersion"),
    ):
        if value is not None and algorithm != taker:
            raise typer.BadParameter(f"{algorithm} does not take it", param_hint=name)
    if seed is not None and start != "random":
        raise typer.BadParameter("nothing is drawn without --start random; leave it out", param_hint="--seed")
    import torch
    import torch.distributed as dist

    from ..files import spare

    paths = _expand(files)
    spare(paths, [out, *(labels.glob("rank-*.npz") if labels is not None else [])])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        part, parts = (local, here) if own_files else (rank, size)
        points: Any = share(paths, part, parts)
        if device == "cuda":
            points = torch.tensor(points, device=device)
        common: dict[str, Any] = {"metric": metric, "process_group": dist.group.WORLD, "backend": backend}
        found = _choose(points, k, algorithm, start, seed, objective, refine, common)
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
        dist.all_gather(counts, torch.tensor([len(points)], device=device))
        first = [0]
        for count in counts:
            first.append(first[-1] + int(count))
        _write(found, rank, first, out, labels)
    finally:
        dist.destroy_process_group()


def share(files: list[Path], part: int, parts: int) -> np.ndarray:
    """This part's rows of files one after another. Rows of a single .npy file stay on the disk."""
    import numpy as np

    from ..files import read

    arrays = [read(path) for path in files]
    for path, array in zip(files, arrays, strict=True):
        if array.ndim != 2 or array.shape[1] != arrays[0].shape[1] or array.dtype != arrays[0].dtype:
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape}, and {files[0]} {arrays[0].dtype} {arrays[0].shape}; "
                "all need (n, d) of one d and dtype"
            )
    total = sum(len(array) for array in arrays)
    low, high = total * part // parts, total * (part + 1) // parts
    pieces, begin = [], 0
    for array in arrays:
        if (piece := array[max(low - begin, 0) : max(high - begin, 0)]).size:
            pieces.append(piece)
        begin += len(array)
    return pieces[0] if len(pieces) == 1 else np.concatenate([arrays[0][:0], *pieces])


def _expand(names: list[str]) -> list[Path]:
    """Patterns as their files, in the order of the alphabet."""
    found: list[Path] = []
    for name in names:
        matches = sorted(glob(name)) if any(mark in name for mark in "*?[") else [name]
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r} in {Path.cwd()}")
        found += map(Path, matches)
    return found


def _choose(
    points: Any,
    k: int,
    algorithm: str,
    start: str | None,
    seed: int | None,
    objective: str | None,
    refine: bool | None,
    common: dict[str, Any],
) -> Selection:
    import torch

    from ..dispersion import k_dispersion
    from ..greedy import k_center

    if algorithm == "k-dispersion":
        return k_dispersion(points, k, objective=objective or "max-min", refine=refine is not False, **common)
    begin: Any = start or 0
    if start == "random":
        begin = torch.Generator().manual_seed(seed or 0)
    elif start is not None and start.lstrip("-").isdigit():
        begin = int(start)
    return k_center(points, k, start=begin, **common)


def _write(found: Selection, rank: int, first: list[int], out: Path, labels: Path | None) -> None:
    import numpy as np

    from ..._files import replacing

    if labels is not None:
        with replacing(labels / f"rank-{rank:05d}.npz") as file:
            np.savez(
                file,
                first_row=first[rank],
                labels=found.labels.cpu().numpy(),
                distances=found.distances.cpu().numpy(),
            )
    if rank == 0:
        with replacing(out) as file:
            np.savez(
                file,
                indices=found.indices.cpu().numpy(),
                radii=found.radii.cpu().numpy(),
                objective=found.objective.item(),
                bound=found.bound.item(),
                first_rows=np.array(first),
            )
        typer.echo(
            f"{len(found):,} of {first[-1]:,} rows on {len(first) - 1} ranks: objective {found.objective:.6g}, bound "
            f"on the optimum {found.bound:.6g}; written to {out}"
        )


def main() -> None:
    """Entry point of ``python -m protofast.selection.distributed``."""
    from ...cli import describe

    app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
    app.command()(select)
    try:
        app()
    except Exception as error:
        if os.environ.get("PROTOFAST_DEBUG"):
            raise
        typer.secho(f"error on rank {os.environ.get('RANK', '?')}: {describe(error)}", fg="red", err=True)
        raise SystemExit(1) from None
