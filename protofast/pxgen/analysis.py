"""The whole analysis: criteria of every anchor, thresholds, groups, representatives."""

from __future__ import annotations

import functools
import operator
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import discovery as discover
from . import groups as grouping
from . import thresholds as limits
from .adapters import Adapter, as_adapter
from .anchors import Anchors, open_anchors, read, warn_of_range
from .criteria import CriteriaError, Criterion, resolve
from .noise import GENERATION, REPEAT, Noise
from .result import GROUPS, Report, Representatives, Threshold
from .store import Store

IN_MEMORY = 256 * 2**20
"""Bytes of a group's features up to which they stay in memory; larger ones are mapped from a file."""

CRITERIA, LABELS, EMBEDDING = "criteria.f8", "labels.i8", "embedding.f4"

Progress = Callable[[str, int | None, int], Callable[[int], None]]
"""(description, total, already done) → function that advances the bar."""


def explain(
    model: Any,
    anchors: Any,
    *,
    intrinsic: str | Criterion | Callable[..., Tensor] | Sequence[Any] | None = None,
    extrinsic: str | Criterion | Callable[..., Tensor] | Sequence[Any] = ("mse",),
    thresholds: str | Mapping[str, float] = "max-mean",
    percentile: float = 95.0,
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
        also `PAPER_CODE`.
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
        Lowest and highest value of the model's images.
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
    ...     decode = staticmethod(lambda z: z.repeat(1, 2).reshape(-1, 1, 2, 2))
    >>> report = pf.pxgen.explain(Model(), torch.rand(20, 1, 2, 2), iterations=2, generations=50, progress=False)
    >>> sum(summary.count for summary in report.summaries)
    20
    """
    for name, value in (("iterations", iterations), ("generations", generations), ("k", k), ("batch_size", batch_size)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if operator.index(seed) < 0:
        raise ValueError(f"seed is {seed}; give at least 0")
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
    if not low < high:
        raise ValueError(f"value_range is {value_range}; give (lowest, highest)")

    adapter = as_adapter(model)
    if device is not None:
        if not hasattr(adapter, "to"):
            raise TypeError(f"device is given, and {type(adapter).__name__} has no to(device); move the model yourself")
        adapter.to(device)
    run = _Run(
        adapter,
        _criteria(adapter, intrinsic, extrinsic, (low, high)),
        features,
        open_anchors(anchors, labels, names, (low, high)),
        (low, high),
        batch_size,
        seed,
    )
    given = {} if isinstance(thresholds, str) else limits.given(run.criteria, thresholds)
    run.probe()
    with _folder(work_dir) as folder, _bars(progress) as bars:
        store = Store(folder, run.identity(), durable=work_dir is not None)
        try:
            criteria, own_labels = run.measure(store, bars, kept=work_dir is not None)
            estimated = run.thresholds(store, bars, criteria, given, method, percentile, iterations, generations)
            found = [given.get(criterion.name) or estimated[criterion.name] for criterion in run.criteria]
            kinds = {criterion.name: criterion.kind for criterion in run.criteria}
            values = {threshold.criterion: threshold.value for threshold in found}
            membership = grouping.assign(criteria, kinds, values)
            summaries = grouping.summarise(membership)
            representatives, remarks = run.discover(store, criteria, membership, shown, algorithms, metric, k)
            originals, reconstructions = run.pictures(representatives, bars)
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
            "protofast": version("protofast"),
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


class _Run:
    """One analysis: what stays the same from its first batch to its last."""

    def __init__(
        self,
        adapter: Adapter,
        criteria: list[Criterion],
        features: Any,
        anchors: Anchors,
        value_range: tuple[float, float],
        batch_size: int,
        seed: int,
    ) -> None:
        self.adapter, self.criteria, self.anchors = adapter, criteria, anchors
        self.value_range, self.batch_size, self.seed = value_range, batch_size, seed
        self.features = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
        if self.features_name == "latents":
            _provided(adapter, "features='latents'", {"latent"})
        self.image_shape: tuple[int, ...] = ()
        self._check_features(anchors.count)

    def _check_features(self, count: int | None) -> None:
        given = self.features
        if isinstance(given, np.ndarray) and (given.ndim != 2 or (count is not None and len(given) != count)):
            raise ValueError(f"features has shape {given.shape}; give (n, d), one row for each of {count} anchors")

    @property
    def features_name(self) -> str:
        return self.features if isinstance(self.features, str) else "embedding"

    @property
    def _stores_embedding(self) -> bool:
        return self.features_name == "latents" or callable(self.features)

    def identity(self) -> dict[str, Any]:
        """What the criteria of the anchors depend on, as JSON gives it back."""
        fingerprint = self.anchors.fingerprint()
        if fingerprint != self.anchors.fingerprint():
            raise ValueError("anchors come in another order every time; give them in a fixed order, without shuffling")
        embedding = self.features_name if self._stores_embedding else None
        return {
            "model": self.adapter.fingerprint(),
            "anchors": fingerprint,
            "criteria": [[criterion.name, _source(criterion.function)] for criterion in self.criteria],
            "embedding": f"{embedding} {_source(self.features)}" if callable(self.features) else embedding,
            "value_range": list(self.value_range),
            "seed": self.seed,
        }

    def probe(self) -> None:
        """Tries the model on two anchors, so that what does not fit is said before any long work."""
        first = next(iter(self.anchors.batches(min(self.batch_size, 64))), None)
        if first is None:
            raise ValueError("anchors is empty; give at least one image")
        warn_of_range(first.images, self.value_range)
        self.image_shape = tuple(first.images.shape[1:])
        images = first.images[:2]
        try:
            self.evaluate(self.criteria, images, Noise(range(len(images)), self.seed))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"the model or a criterion failed on anchors of shape {tuple(images.shape)}: {error}. Anchors must "
                "have the format of the model's images"
            ) from error

    def evaluate(
        self, criteria: Sequence[Criterion], images: Tensor, noise: Noise
    ) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Values (B, number of criteria) of a batch, and what the adapter found."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"an image has shape {tuple(images.shape[1:])}, the first anchor {self.image_shape}; all must agree"
            )
        needs = {name for criterion in self.criteria for name in criterion.needs} - {"images"}
        needs |= {"reconstruction"} | ({"latent"} if self.features_name == "latents" else set())
        state = dict(self.adapter.analyse(images, noise, frozenset(needs)))
        missing = needs - state.keys()
        if missing:
            raise ValueError(f"analyse() of {type(self.adapter).__name__} returned no {', '.join(sorted(missing))}")
        state["reconstruction"] = self._like(images, state["reconstruction"], "reconstruction")
        state["images"] = images.to(state["reconstruction"].device)
        with torch.no_grad():
            values = torch.stack([criterion(state) for criterion in criteria], 1)
        return values.numpy(), state

    def _like(self, images: Tensor, found: Any, what: str) -> Tensor:
        """The model's images as float32 of the anchors' shape; a flat (B, C·H·W) is folded."""
        if (
            isinstance(found, Tensor)
            and found.ndim == 2
            and found.numel() == images.numel()
            and len(found) == len(images)
        ):
            found = found.reshape(images.shape)
        if not isinstance(found, Tensor) or found.shape != images.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the model's {what} has shape {got}, and the anchors {tuple(images.shape)}; anchors must have the "
                "format of the model's images"
            )
        return found.detach().float()

    def measure(self, store: Store, bars: Progress, *, kept: bool) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Criteria of every anchor, and labels that the anchors came with."""
        if not store.finished:
            advance = bars("anchors", self.anchors.count, store.done)
            done = store.done
            for first, images, labels in self.anchors.batches(self.batch_size, done):
                done = first + len(images)
                values, state = self.evaluate(self.criteria, images, Noise(range(first, done), self.seed))
                if first == 0 and (~np.isfinite(values)).all(0).any():
                    self._check_finite(self._named(values), "")  # no need to go through all of them
                store.write(CRITERIA, first, values)
                if labels is not None and (first == 0 or LABELS in store.columns):
                    store.write(LABELS, first, labels)
                if self._stores_embedding:
                    store.write(EMBEDDING, first, self._embed(state))
                store.checkpoint(done)
                advance(len(images))
            store.checkpoint(done, finished=True)
        criteria = self._named(np.array(store.table(CRITERIA)))
        self._check_finite(criteria, f" All values are kept in {store.folder / CRITERIA}." if kept else "")
        labelled = LABELS in store.columns
        return criteria, np.array(store.table(LABELS))[:, 0] if labelled else None

    def _embed(self, state: dict[str, Tensor]) -> np.ndarray:
        if not callable(self.features):
            return state["latent"].flatten(1).float().cpu().numpy()
        with torch.no_grad():
            found = self.features(state["images"])
        if not isinstance(found, Tensor) or len(found) != len(state["images"]):
            raise ValueError("features must return a tensor (B, …) with one row an image")
        return found.reshape(len(found), -1).float().cpu().numpy()

    def _named(self, table: np.ndarray) -> dict[str, np.ndarray]:
        return {criterion.name: table[:, i].copy() for i, criterion in enumerate(self.criteria)}

    def _check_finite(self, criteria: dict[str, np.ndarray], where: str) -> None:
        for name, values in criteria.items():
            wrong = np.flatnonzero(~np.isfinite(values))
            if len(wrong):
                raise CriteriaError(
                    f"criterion {name!r} is not finite for {len(wrong)} of {len(values)} anchors; the first is anchor "
                    f"{wrong[0]} ({values[wrong[0]]}). Leave them out, or mend the model or the criterion.{where}",
                    criteria,
                )

    def thresholds(
        self,
        store: Store,
        bars: Progress,
        criteria: dict[str, np.ndarray],
        given: Mapping[str, Threshold],
        method: str,
        percentile: float,
        iterations: int,
        generations: int,
    ) -> dict[str, Threshold]:
        """Thresholds of the criteria that were not given one."""
        wanted = [criterion for criterion in self.criteria if criterion.name not in given]
        if not wanted:
            return {}
        advance = bars("thresholds", iterations * generations, 0)
        started = False

        def generate(iteration: int) -> np.ndarray:
            nonlocal started
            if not started:
                advance(iteration * generations)
                started = True
            parts = []
            for first in range(0, generations, self.batch_size):
                numbers = range(first, min(first + self.batch_size, generations))
                images = self.adapter.generate(Noise(numbers, self.seed, stream=GENERATION, iteration=iteration))
                images = self._like(torch.empty(len(numbers), *self.image_shape, device="meta"), images, "generation")
                noise = Noise(numbers, self.seed, stream=REPEAT, iteration=iteration)
                parts.append(self.evaluate(wanted, images, noise)[0])
                advance(len(numbers))
            return np.concatenate(parts)

        try:
            found = limits.estimate(
                wanted,
                generate,
                store,
                method=method,
                percentile=percentile,
                iterations=iterations,
                generations=generations,
            )
        except CriteriaError as error:
            error.criteria = criteria
            raise
        return {threshold.criterion: threshold for threshold in found}

    def discover(
        self,
        store: Store,
        criteria: dict[str, np.ndarray],
        membership: np.ndarray,
        shown: Sequence[str],
        algorithms: Sequence[str],
        metric: str,
        k: int,
    ) -> tuple[list[Representatives], list[str]]:
        """Representatives of every group that has members, by every algorithm."""
        self._check_features(len(membership))
        every = discover.standardised(criteria) if self.features_name == "criteria" else None
        found, remarks = [], []
        for group in shown:
            members = np.flatnonzero(membership == GROUPS.index(group))
            if not len(members):
                continue
            points = self._points(store, members) if every is None else every[members]
            for algorithm in algorithms:
                chosen, said = discover.choose(
                    group,
                    members,
                    points,
                    algorithm=algorithm,
                    features=self.features_name,
                    metric=metric,
                    k=k,
                    seed=self.seed,
                )
                found.append(chosen)
                remarks += said
        return found, remarks

    def _points(self, store: Store, members: np.ndarray) -> np.ndarray:
        """Features of some anchors, in memory or, when they are large, in a file that has no name any more."""
        if isinstance(self.features, np.ndarray):
            return self.features[members]
        table = store.table(EMBEDDING) if self._stores_embedding else None
        width = int(np.prod(self.image_shape)) if table is None else table.shape[1]
        shape = (len(members), width)
        if 4 * len(members) * width <= IN_MEMORY:
            points = np.empty(shape, np.float32)
        else:
            with tempfile.TemporaryFile(dir=store.folder) as file:
                points = np.memmap(file, np.float32, "w+", shape=shape)
        done = 0
        if table is not None:
            for done in range(0, len(members), self.batch_size):
                points[done : done + self.batch_size] = table[members[done : done + self.batch_size]]
            return points
        for numbers, images in read(self.anchors, members, self.batch_size):
            points[done : done + len(numbers)] = images.flatten(1).cpu().numpy()
            done += len(numbers)
        return points

    def pictures(
        self, representatives: Sequence[Representatives], bars: Progress
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Originals and reconstructions of all representatives, scaled and clipped to [0, 1]."""
        wanted = np.unique(
            np.concatenate([np.array(r.indices, np.int64) for r in representatives] or [np.empty(0, np.int64)])
        )
        originals: dict[int, np.ndarray] = {}
        reconstructions: dict[int, np.ndarray] = {}
        advance = bars("pictures", len(wanted), 0)
        for numbers, images in read(self.anchors, wanted, self.batch_size):
            state = self.evaluate(self.criteria, images, Noise(numbers, self.seed))[1]
            for found, batch in ((originals, images), (reconstructions, state["reconstruction"])):
                found.update(zip(numbers.tolist(), self._displayed(batch), strict=True))
            advance(len(numbers))
        return originals, reconstructions

    def _displayed(self, images: Tensor) -> Iterator[np.ndarray]:
        low, high = self.value_range
        yield from ((images - low) / (high - low)).clamp(0, 1).cpu().numpy()


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
        _provided(adapter, f"criterion {criterion.name!r}", {*criterion.needs} - {"images"})
    return criteria


def _provided(adapter: Adapter, who: str, needs: set[str]) -> None:
    if missing := sorted(needs - adapter.provides):
        raise ValueError(
            f"{who} needs {', '.join(missing)}, which {type(adapter).__name__} does not give "
            f"(it gives {', '.join(sorted(adapter.provides))})"
        )


def _listed(name: str, value: str | Sequence[str], allowed: Sequence[str]) -> list[str]:
    found = [value] if isinstance(value, str) else list(value)
    if not found or any(item not in allowed for item in found):
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(repr, allowed))}")
    return found


def _source(function: Any) -> str:
    """Name of a function, inside a partial as well; all that can be known of it."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _folder(work_dir: str | Path | None) -> AbstractContextManager[Path]:
    if work_dir is not None:
        return nullcontext(Path(work_dir))

    @contextmanager
    def temporary() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="protofast-pxgen-") as folder:
            yield Path(folder)

    return temporary()


@contextmanager
def _bars(show: bool) -> Iterator[Progress]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ImportError:
        show = False
    if not show:
        yield lambda description, total, done: lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def start(description: str, total: int | None, done: int) -> Callable[[int], None]:
            task = bars.add_task(description, total=total, completed=done)
            return functools.partial(bars.advance, task)

        yield start
