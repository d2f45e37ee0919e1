"""Thresholds of the criteria, taken from what the model generates itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .criteria import CriteriaError, Criterion
from .result import Threshold
from .store import Store

METHODS = ("max-mean", "percentile")


def summarise(criterion: Criterion, method: str, iterations: Sequence[float]) -> Threshold:
    """Mean over the iterations, with their standard deviation (n − 1) and spread."""
    values = np.array(iterations, np.float64)
    mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    spread = 0.0 if std == 0 else std / abs(mean) if mean else float("inf")
    return Threshold(criterion.name, criterion.kind, method, mean, values.tolist(), std, spread)


def given(criteria: Sequence[Criterion], values: Mapping[str, float]) -> dict[str, Threshold]:
    """Thresholds that the caller has set."""
    names = [criterion.name for criterion in criteria]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"thresholds names {', '.join(unknown)}; the criteria of this analysis are {', '.join(names)}")
    for name, value in values.items():
        if not np.isfinite(value):
            raise ValueError(f"thresholds gives {name} the value {value}; give a finite number")
    return {
        criterion.name: Threshold(criterion.name, criterion.kind, "given", float(values[criterion.name]))
        for criterion in criteria
        if criterion.name in values
    }


def estimate(
    criteria: Sequence[Criterion],
    generate: Callable[[int], np.ndarray],
    store: Store,
    *,
    method: str,
    percentile: float,
    iterations: int,
    generations: int,
) -> list[Threshold]:
    """Thresholds by the paper's procedure: one number an iteration, averaged over the iterations.

    Parameters
    ----------
    criteria : sequence of Criterion
    generate : callable
        Iteration number → (`generations`, number of criteria) values of freshly generated samples.
    store : Store
        Where finished iterations are kept: a later run, also one with more iterations, continues from them.
    method : {"max-mean", "percentile"}
        The largest value of an iteration (the paper), or its percentile.
    """
    names = [criterion.name for criterion in criteria]
    identity = [store.identity, names, generations, method, percentile if method == "percentile" else None]
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    file = f"thresholds-{key}.json"
    rows: list[list[float]] = (store.load_json(file) or [])[:iterations]
    for iteration in range(len(rows), iterations):
        values = generate(iteration)
        wrong = ~np.isfinite(values)
        if wrong.any():
            column = int(wrong.any(0).argmax())
            raise CriteriaError(
                f"criterion {names[column]!r} is not finite for {int(wrong[:, column].sum())} of {len(values)} samples "
                f"that the model generated (iteration {iteration}); check the model, or give thresholds={{...}}",
                {},
            )
        rows.append(np.percentile(values, percentile if method == "percentile" else 100.0, axis=0).tolist())
        store.save_json(file, rows)
    table = np.array(rows)
    return [summarise(criterion, method, table[:, i].tolist()) for i, criterion in enumerate(criteria)]
