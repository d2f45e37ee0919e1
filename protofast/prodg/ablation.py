"""What each loss of ProDG is for: all seven non-empty subsets of the three, trained alike."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch

from .._sheet import sheet
from .config import ProDGConfig
from .generators.protocol import Generator
from .networks import SplitNetwork
from .training import ProDG, train

LOSSES = ("purity", "regularization", "diversity")
SUBSETS = tuple(subset for size in (3, 2, 1) for subset in combinations(LOSSES, size))


def ablate(
    network: SplitNetwork,
    generator: Generator,
    config: ProDGConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, ProDG]:
    """Trains with each subset of the losses, the others' weights 0 (arXiv 2605.08858, fig. 6, 16 and 17).

    Parameters
    ----------
    network, generator, config
        As for `train`; the weights of `config` are those of losses that stay.
    out : path, optional
        A folder for all of them; the same call goes on where it was.
    seed : int, default 0
    progress : bool, default False

    Returns
    -------
    dict of str to ProDG
        By names such as "purity + diversity", the full loss first.
    """
    found = {}
    for subset in SUBSETS:
        name = " + ".join(subset)
        weights = {loss: getattr(config, loss) if loss in subset else 0.0 for loss in LOSSES}
        place = None if out is None else Path(out) / f"{'-'.join(subset)}-{seed}"
        settings = dataclasses.replace(config, **weights)  # type: ignore[arg-type]  # losses are floats
        found[name] = train(network, generator, settings, out=place, seed=seed, progress=progress)
    return found


def grid(found: dict[str, ProDG], channels: Sequence[int], *, count: int = 3, seed: int = 0) -> bytes:
    """A PNG file: for each training a row with `count` prototypes of each of `channels`, of the same noise."""
    groups = [
        (name, torch.cat([result.prototypes(channel, count, seed) for channel in channels]).cpu())
        for name, result in found.items()
    ]
    heads = [f"c {channel}" if place == 0 else "" for channel in channels for place in range(count)]
    return sheet(groups, columns=len(heads), heads=heads)
