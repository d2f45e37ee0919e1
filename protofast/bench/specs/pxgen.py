"""PXGen after the criteria: groups of the anchors, then k-center and k-dispersion representatives of each group."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import OURS, Call, Case, Skip, Spec, Target, copy_limit, generator
from .selection import farthest_exact, greedy
from .selection import spread as smallest_distance

_KINDS = {"kld": "intrinsic", "mse": "extrinsic"}


def _case(n: int, quick: bool = True) -> Case:
    return Case(f"{n} anchors k=10", {"n": n, "k": 10}, quick)


def _inputs(case: Case, device: str, seed: int) -> SimpleNamespace:
    """Criteria skewed and correlated as those of a VAE, thresholds that leave every group its share."""
    noise = torch.randn(case.params["n"], 2, generator=generator(seed), dtype=torch.float64)
    values = (noise @ torch.tensor([[0.5, 0.3], [0.0, 0.4]], dtype=torch.float64) + 3).exp().numpy()
    criteria = {"kld": np.ascontiguousarray(values[:, 0]), "mse": np.ascontiguousarray(values[:, 1])}
    limits = {name: float(np.quantile(column, 0.6)) for name, column in criteria.items()}
    return SimpleNamespace(criteria=criteria, limits=limits, k=case.params["k"], device=device)


def _table(criteria: dict[str, np.ndarray]) -> np.ndarray:
    values = np.stack([criteria["kld"], criteria["mse"]], 1)
    return (values - values.mean(0)) / values.std(0)


def _groups(inputs: Any) -> np.ndarray:
    kld, mse = (inputs.criteria[name] >= inputs.limits[name] for name in ("kld", "mse"))
    return 2 * kld + mse


def _protofast(inputs: Any) -> Call:
    from protofast.pxgen.discovery import choose, standardised
    from protofast.pxgen.groups import assign

    representatives = partial(choose, features="criteria", metric="euclidean", k=inputs.k, seed=0)

    def call() -> dict[int, list[np.ndarray]]:
        groups, points = assign(inputs.criteria, _KINDS, inputs.limits), standardised(inputs.criteria)
        found = {}
        for group in range(4):
            members = np.flatnonzero(groups == group)
            found[group] = [
                np.asarray(representatives(str(group), members, points[members], algorithm=a)[0].indices)
                for a in ("k-center", "k-dispersion")
            ]
        return found

    return call


def _by_group(farthest_first: Any):
    """Each group from the point nearest to its mean (k-center), and from its least sum of criteria (k-dispersion)."""

    def prepare(inputs: Any) -> Call:
        def call() -> dict[int, list[np.ndarray]]:
            groups, points = _groups(inputs), _table(inputs.criteria)
            total = inputs.criteria["kld"] + inputs.criteria["mse"]
            found = {}
            for group in range(4):
                members = np.flatnonzero(groups == group)
                rows = points[members]
                middle = int(np.square(rows - rows.mean(0)).sum(1).argmin())
                starts = middle, int(total[members].argmin())
                found[group] = [members[farthest_first(rows, start, inputs.k)] for start in starts]
            return found

        return call

    return prepare


def _numpy_loop(rows: np.ndarray, start: int, k: int) -> list[int]:
    chosen, nearest = [start], np.square(rows - rows[start]).sum(1)
    while len(chosen) < k:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(rows - rows[chosen[-1]]).sum(1))
    return chosen


def _python_loop(rows: np.ndarray, start: int, k: int) -> list[int]:
    """As the published code goes about it: in every round, for every anchor, the distances to all picked so far."""
    if len(rows) > 5000:
        raise Skip("a Python loop over more than 5,000 anchors a group takes minutes")
    chosen = [start]
    while len(chosen) < k:
        chosen.append(int(np.argmax([np.square(rows[chosen] - row).sum(1).min() for row in rows])))
    return chosen


def _reference(inputs: Any) -> list[tuple[Tensor, np.ndarray, float, float]]:
    """Per group: points, members, covering radius of the greedy from the middle, spread of that from the far pair."""
    groups, points, found = _groups(inputs), _table(inputs.criteria), []
    for group in range(4):
        members = np.flatnonzero(groups == group)
        rows = torch.from_numpy(points[members])
        middle = int((rows - rows.mean(0)).square().sum(1).argmin())
        radius = float(greedy(rows, inputs.k, [middle])[1].max())
        pair = list(farthest_exact(rows)[:2])
        found.append((rows, members, radius, smallest_distance(rows, torch.tensor(greedy(rows, inputs.k, pair)[0]))))
    return found


def _error(output: Any, reference: Any, inputs: Any) -> float:
    """Worst group: covering radius against the float64 greedy's, and shortfall of the smallest pairwise distance."""
    worst = 0.0
    for group, (rows, members, radius, spread) in enumerate(reference):
        if not np.isin(np.concatenate(output[group]), members).all():
            return float("inf")  # an anchor of another group
        center, dispersed = (np.searchsorted(members, chosen) for chosen in output[group])
        covered = float(greedy(rows, 0, center.tolist())[1].max())
        worst = max(worst, abs(covered / radius - 1), 1 - smallest_distance(rows, torch.from_numpy(dispersed)) / spread)
    return worst


def _bytes(inputs: Any) -> int:
    return sum(column.nbytes for column in inputs.criteria.values())


SPEC = Spec(
    op="pxgen",
    about="criteria given: grouping, then k-center and k-dispersion in each of the four groups",
    cases=(_case(10_000), _case(70_000), _case(1_000_000, False)),
    tiny=(_case(400),),
    inputs=_inputs,
    contenders={OURS: _protofast, "numpy loop": _by_group(_numpy_loop), "Python loop": _by_group(_python_loop)},
    reference=_reference,
    error=_error,
    tolerance=lambda inputs: 0.5,  # the baselines' k-dispersion starts elsewhere: both are 2-approximations
    limits={"read the criteria once": lambda inputs: copy_limit(_bytes(inputs), "cpu")},
    bytes=_bytes,
    targets=(Target("70000 anchors k=10", OURS, None, 2.0),),
    devices=("cpu",),
)
