"""The long part of an analysis: everything that goes through the model batch by batch."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._progress import Progress
from . import discovery as discover
from . import thresholds as limits
from .adapters import Adapter, require
from .anchors import Anchors, read, warn_of_range
from .criteria import CriteriaError, Criterion
from .noise import GENERATION, REPEAT, Noise
from .result import GROUPS, Representatives, Threshold
from .store import Store

IN_MEMORY = 256 * 2**20
"""Bytes of a group's features up to which they stay in memory; larger ones are mapped from a file."""

CRITERIA, LABELS, EMBEDDING = "criteria.f8", "labels.i8", "embedding.f4"


class Run:
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
        if isinstance(features, Tensor):
            features = features.detach().cpu()
            features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
        self.features = features
        if self.features_name == "latents":
            require(adapter, "features='latents'", {"latent"})
        self.image_shape: tuple[int, ...] = ()
        if isinstance(self.features, np.ndarray):
            self._check_features(anchors.count)
            self._check_values(self.features)

    def _check_features(self, count: int | None) -> None:
        """That given features are one row an anchor, which of a stream is known only at its end."""
        given = self.features
        if isinstance(given, np.ndarray) and (given.ndim != 2 or (count is not None and len(given) != count)):
            raise ValueError(f"features has shape {given.shape}; give (n, d), one row for each of {count} anchors")

    def _check_values(self, given: np.ndarray) -> None:
        if given.dtype.kind not in "biuf":
            raise TypeError(f"features has dtype {given.dtype}; give real numbers")
        for first in range(0, len(given), self.batch_size):
            _check_rows(given[first : first + self.batch_size], first)

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

    def probe(self, generates: bool) -> None:
        """Tries the model on two of everything, so that what does not fit is said before any long work."""
        first = next(iter(self.anchors.batches(min(self.batch_size, 64))), None)
        if first is None:
            raise ValueError("anchors is empty; give at least one image")
        warn_of_range(first.images, self.value_range)
        self.image_shape = tuple(first.images.shape[1:])
        images = first.images[:2]
        try:
            self.evaluate(self.criteria, images, Noise(range(len(images)), self.seed))
            if generates:
                self._warn_of_generations(self._generate(range(2), 0))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"the model or a criterion failed on anchors of shape {tuple(images.shape)}: {error}. Anchors must "
                "have the format of the model's images"
            ) from error

    def _generate(self, numbers: range, iteration: int) -> Tensor:
        images = self.adapter.generate(Noise(numbers, self.seed, stream=GENERATION, iteration=iteration))
        return self._like(torch.empty(len(numbers), *self.image_shape, device="meta"), images, "generation")

    def _warn_of_generations(self, images: Tensor) -> None:
        """Says when the model works in another range than the anchors: [−1, 1] of most diffusion models."""
        (low, high), least, most = self.value_range, float(images.min()), float(images.max())
        slack = 0.5 * (high - low)
        if least < low - slack or most > high + slack:
            warnings.warn(
                f"the model generates values from {least:.3g} to {most:.3g}, and value_range is {self.value_range}; "
                "give the range it was trained on as value_range, and float anchors in that range",
                stacklevel=4,
            )

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
                    rows = self._embed(state)
                    _check_rows(rows, first)
                    store.write(EMBEDDING, first, rows)
                store.checkpoint(done)
                advance(len(images))
            store.checkpoint(done, finished=True)
        criteria = self._named(store.table(CRITERIA))
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
                noise = Noise(numbers, self.seed, stream=REPEAT, iteration=iteration)
                parts.append(self.evaluate(wanted, self._generate(numbers, iteration), noise)[0])
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


def _check_rows(rows: np.ndarray, first: int) -> None:
    wrong = ~np.isfinite(rows).all(1)
    if wrong.any():
        raise ValueError(
            f"features of anchor {first + int(wrong.argmax())} are not finite; mend them, or leave the anchor out"
        )


def _source(function: Any) -> str:
    """Name of a function, inside a partial as well; all that can be known of it."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
