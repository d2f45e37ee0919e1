"""The whole analysis: criteria of every anchor, thresholds, groups, representatives."""

from __future__ import annotations

import math
import operator
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .._progress import bars
from . import discovery as discover
from . import groups as grouping
from . import thresholds as limits
from .adapters import Adapter, as_adapter, require
from .anchors import open_anchors
from .criteria import Criterion, resolve
from .result import GROUPS, Report
from .run import Run
from .store import Store

PERCENTILE = 95.0


def explain(
    model: Any,
    anchors: Any,
    *,
    intrinsic: str | Criterion | Callable[..., Tensor] | Sequence[Any] | None = None,
    extrinsic: str | Criterion | Callable[..., Tensor] | Sequence[Any] = ("mse",),
    thresholds: str | Mapping[str, float] = "max-mean",
    percentile: float = PERCENTILE,
    iterations: int = 100,
    generations: int = 1000,
    discovery: str | Sequence[str] = "k-center",
    features: str | Callable[[Tensor], Tensor] | Tensor | np.ndarray = "criteria",
    metric: str = "euclidean",
    k: int = 10,
    groups: Sequence[str] | None = None,
    labels: Any = None,
    names: Sequence[str] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Explains a trained generative model by how it treats a set of anchors (PXGen, arXiv 2501.11827).

    Every anchor gets intrinsic criteria (how familiar it is to the model) and extrinsic ones (how well the model
    reproduces it). Each is compared with a threshold taken from the model's own generations, which puts the anchor
    into one of four groups, and each group is shown by a few representatives.

    Anchors stream through in batches; only the table of criteria is kept in memory.

    Parameters
    ----------
    model : object
        With ``encode(x)`` → (mean, log variance) and ``decode(z)``, or a `VAEAdapter`, `DiffusionAdapter`,
        `GeneratorAdapter`, `FunctionAdapter` or an object of your own with their methods (`Adapter`).
    anchors : Tensor, array, Dataset, DataLoader or iterable of batches
        Images (n, C, H, W) or (n, H, W), in the format of the model's output and in an order that does not change.
        uint8 is scaled to `value_range`.
    intrinsic, extrinsic : str, callable, Criterion or sequence of these
        Names from `CRITERIA`; functions of images (B, C, H, W) → (B,), or for extrinsic ones of images and
        reconstruction; or `Criterion` objects. Smaller is more familiar, or better. By default the adapter's
        intrinsic criterion ("kld" of a VAE) and the mean squared error.
    thresholds : {"max-mean", "percentile"} or dict of str to float
        "max-mean" is the paper's: the largest value among `generations` samples of the model that are passed through
        it again, averaged over `iterations` repetitions. It grows with `generations`; the paper takes 60,000 and 100.
        "percentile" takes the `percentile` instead of the largest. A dict sets thresholds by hand; criteria that are
        not in it get "max-mean".
    discovery : {"k-center", "k-dispersion", "k-medoids"} or several of them
        Typical (smallest covering radius), diverse (largest smallest distance), or what the public code runs; see
        also `PAPER_CODE`. In groups of more than 20,000, k-medoids chooses among that many at random, and says so.
    features : {"criteria", "pixels", "latents"}, callable, Tensor or array (n, d)
        What representatives are compared on: standardised criteria, pixels, latents of the adapter, the (B, …)
        output of a function of images, or given vectors.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan"}
    k : int
        Representatives of each group; a smaller group is shown whole.
    groups : sequence of str, optional
        Groups to show, all of ``HIHE``, ``HILE``, ``LIHE``, ``LILE`` by default.
    labels, names : sequence, optional
        Class of each anchor and names of the classes; taken from a dataset that has them.
    value_range : (float, float)
        Lowest and highest value of the model's images, (−1, 1) for most diffusion models. uint8 anchors and those of
        `protofast.data` are scaled to it, other floating point anchors have to be in it.
    batch_size : int
        Changes results by rounding at most (for a `FunctionAdapter`, also the samples it generates).
    seed : int
        At least 0.
    device : torch.device or str, optional
        Where to move the model's networks; by default they stay where they are.
    work_dir : path, optional
        Where to keep tables while running. A run that was killed continues from there, with the same result. By
        default a temporary folder.
    progress : bool
        Shows a bar (with rich installed).

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        For settings or shapes that do not fit, and a `work_dir` that holds another analysis.
    CriteriaError
        When a criterion is not finite for an anchor; the table computed is kept in `work_dir` and on the exception.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> class Model:
    ...     encode = staticmethod(lambda x: (x.flatten(1)[:, :2], torch.zeros(len(x), 2)))
    ...     decode = staticmethod(lambda z: z.sigmoid().repeat(1, 2).reshape(-1, 1, 2, 2))
    >>> report = pf.pxgen.explain(Model(), torch.rand(20, 1, 2, 2), iterations=2, generations=50, progress=False)
    >>> sum(summary.count for summary in report.summaries)
    20
    """
    algorithms, shown, method, (low, high) = check_settings(
        thresholds=thresholds,
        percentile=percentile,
        iterations=iterations,
        generations=generations,
        discovery=discovery,
        features=features,
        metric=metric,
        k=k,
        groups=groups,
        value_range=value_range,
        batch_size=batch_size,
        seed=seed,
    )
    adapter = as_adapter(model)
    if device is not None:
        if not hasattr(adapter, "to"):
            raise TypeError(f"device is given, and {type(adapter).__name__} has no to(device); move the model yourself")
        adapter.to(device)
    run = Run(
        adapter,
        _criteria(adapter, intrinsic, extrinsic, (low, high)),
        features,
        open_anchors(anchors, labels, names, (low, high)),
        (low, high),
        batch_size,
        seed,
    )
    given = {} if isinstance(thresholds, str) else limits.given(run.criteria, thresholds)
    run.probe(generates=len(given) < len(run.criteria))
    with _folder(work_dir) as folder, bars(progress) as shown_on:
        store = Store(folder, run.identity(), durable=work_dir is not None)
        try:
            criteria, own_labels = run.measure(store, shown_on, kept=work_dir is not None)
            estimated = run.thresholds(store, shown_on, criteria, given, method, percentile, iterations, generations)
            found = [given.get(criterion.name) or estimated[criterion.name] for criterion in run.criteria]
            kinds = {criterion.name: criterion.kind for criterion in run.criteria}
            values = {threshold.criterion: threshold.value for threshold in found}
            membership = grouping.assign(criteria, kinds, values)
            summaries = grouping.summarise(membership)
            representatives, remarks = run.discover(store, criteria, membership, shown, algorithms, metric, k)
            originals, reconstructions = run.pictures(representatives, shown_on)
        finally:
            store.close()
    return Report(
        settings={
            "model": repr(adapter),
            "model_fingerprint": store.identity["model"],
            "anchors": len(membership),
            "image_shape": list(run.image_shape),
            "anchors_fingerprint": store.identity["anchors"],
            "intrinsic": [name for name, kind in kinds.items() if kind == "intrinsic"],
            "extrinsic": [name for name, kind in kinds.items() if kind == "extrinsic"],
            "thresholds": method if isinstance(thresholds, str) else {name: float(v) for name, v in thresholds.items()},
            "percentile": float(percentile),
            "iterations": iterations,
            "generations": generations,
            "discovery": algorithms,
            "features": run.features_name,
            "metric": metric,
            "k": k,
            "groups": shown,
            "value_range": [low, high],
            "batch_size": batch_size,
            "device": str(adapter.device),
        },
        versions={
            "protofast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        seeds={"seed": seed},
        criteria=criteria,
        kinds=kinds,
        thresholds=found,
        groups=membership,
        labels=run.anchors.labels if run.anchors.labels is not None else own_labels,
        names=run.anchors.names,
        summaries=summaries,
        representatives=representatives,
        signatures=grouping.signatures(summaries, found) + remarks,
        originals=originals,
        reconstructions=reconstructions,
        sensitivity=grouping.sensitivity(criteria, kinds, values),
    )


def check_settings(
    *,
    thresholds: str | Mapping[str, float],
    percentile: float = PERCENTILE,
    iterations: int,
    generations: int,
    discovery: str | Sequence[str],
    features: Any,
    metric: str,
    k: int,
    groups: Sequence[str] | None = None,
    value_range: tuple[float, float],
    batch_size: int,
    seed: int,
) -> tuple[list[str], list[str], str, tuple[float, float]]:
    """Refuses what no model and no anchors could make right; gives algorithms, groups, threshold method and range."""
    for name, value in (("iterations", iterations), ("generations", generations), ("k", k), ("batch_size", batch_size)):
        _whole(name, value, 1)
    _whole("seed", seed, 0)
    algorithms = _listed("discovery", discovery, discover.ALGORITHMS)
    shown = _listed("groups", GROUPS if groups is None else groups, GROUPS)
    _listed("metric", metric, discover.METRICS)
    if isinstance(features, str):
        _listed("features", features, discover.FEATURES)
    method = thresholds if isinstance(thresholds, str) else "max-mean"
    _listed("thresholds", method, limits.METHODS)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; give a number in (0, 100]")
    low, high = (float(value) for value in value_range)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range is {value_range}; give (lowest, highest)")
    return algorithms, shown, method, (low, high)


def _criteria(adapter: Adapter, intrinsic: Any, extrinsic: Any, value_range: tuple[float, float]) -> list[Criterion]:
    if intrinsic is None:
        intrinsic = adapter.intrinsic
        if not intrinsic:
            raise ValueError(
                f"intrinsic is not given, and {type(adapter).__name__} has no default; give a name or a function"
            )
    criteria = resolve(intrinsic, "intrinsic", value_range) + resolve(extrinsic, "extrinsic", value_range)
    names = [criterion.name for criterion in criteria]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two criteria are called {', '.join(twice)}; give them different names (Criterion(name, …))")
    for criterion in criteria:
        require(adapter, f"criterion {criterion.name!r}", {*criterion.needs} - {"images"})
    return criteria


def _whole(name: str, value: Any, least: int) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give a whole number") from None
    if not least <= number < 2**63:
        raise ValueError(f"{name} is {value}; give at least {least}" + (" and less than 2**63" if number > 0 else ""))


def _listed(name: str, value: str | Sequence[str], allowed: Sequence[str]) -> list[str]:
    found = [value] if isinstance(value, str) else list(value)
    if not found or any(item not in allowed for item in found):
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(repr, allowed))}")
    return found


def _folder(work_dir: str | Path | None) -> AbstractContextManager[Path]:
    if work_dir is not None:
        return nullcontext(Path(work_dir))

    @contextmanager
    def temporary() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="protofast-pxgen-") as folder:
            yield Path(folder)

    return temporary()
