"""Optima, with their proof: k-center by set covers (Minieka 1970), max-min dispersion by independent sets.

Either optimum is one of the n² distances. A search gives a choice; an integer program then asks whether a better
distance can be had, which for most choices it denies at once.
"""

from __future__ import annotations

import numbers
import time
import warnings

import numpy as np
import torch
from torch import Tensor

from .._backend import overload
from .._ops.selection import AUTO, COSINE, EUCLIDEAN, MAX_MIN
from .._optional import need
from .dispersion import disperse
from .inputs import metric_number, number_to_choose, points_and_mask, tensor
from .refine import ROUNDING, least_value, matrix, search
from .result import Selection

LARGEST = 10_000
"""Points whose matrix of distances is made: 0.8 GB."""


class _Undecided(Exception):
    """The time was over before an answer."""


def exact_k_center(
    points: Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "euclidean",
    time_limit: float | None = None,
    backend: str | None = None,
) -> Selection:
    """The k points with the least covering radius, proven.

    Starts from `k_center` with ``refine=True``. Then HiGHS (through scipy) looks for k points that cover all within
    less, after points and centers that others make superfluous are left out, until there are none.

    Parameters
    ----------
    points : Tensor or array of shape (n, d), or (n, n) distances with ``metric="precomputed"``
        As in `k_center`; n up to 10,000. Precomputed distances need not obey the triangle inequality.
    k : int
        From 1 to n.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan", "precomputed"}
    time_limit : float, optional
        Seconds after which the proof is given up. The search before it, seconds at most, takes its time. With a limit,
        linear programs first raise the lower bound, so that it is worth something if the time does not suffice.
    backend : str, optional

    Returns
    -------
    Selection
        ``indices`` ascending. ``objective`` is the covering radius, and ``bound`` the same: the optimum. Where the
        time did not suffice, ``objective`` is the best found and ``bound`` what the optimum is proven to be at least.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    ImportError
        Without scipy, which the extra ``selection`` brings.

    Warns
    -----
    RuntimeWarning
        When `time_limit` was not enough.

    Notes
    -----
    NP-hard: a thousand points in the plane take seconds to a minute, several thousand may take hours. Memory is a few
    matrices n × n.

    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    >>> best = pf.selection.exact_k_center(points, 2)
    >>> best.indices, best.objective.item(), best.bound.item()
    (tensor([1, 4]), 1.0, 1.0)
    """
    optimize, sparse = need("scipy.optimize", "selection"), need("scipy.sparse", "selection")
    number, points, k, deadline = _checked(points, k, metric, time_limit, "k_center(…, refine=True)")
    values = matrix(points, number, backend)
    run = overload("k_center", points.device.type, backend)
    greedy = run(points, torch.zeros(1, dtype=torch.int64, device=points.device), None, k, number, AUTO)[0]
    greedy = greedy.cpu().numpy()
    least = least_value(values, greedy, number)
    best = search(values, greedy, effort=4, least=least)  # cheaper than one more program
    radius = values[best].min(0).max()
    levels = np.unique(values[(values >= (1 - ROUNDING) * least) & (values < radius)])

    def ask(level: float, integer: bool) -> np.ndarray | None:
        covers = (values <= level).T
        rows, columns = _undominated(covers)
        covers = sparse.csr_array(covers[np.ix_(rows, columns)].astype(np.float64))
        some, total = optimize.LinearConstraint(covers, lb=1), np.ones((1, len(columns)))
        found = optimize.milp(
            total[0],
            integrality=total[0] * integer,
            bounds=optimize.Bounds(0, 1),
            constraints=[some, optimize.LinearConstraint(total, ub=k)],
            options={"mip_rel_gap": 1.0, "time_limit": max(deadline - time.monotonic(), 0.0)},  # any cover will do
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise _Undecided
        return columns[found.x > 0.5]

    lowest, highest = 0, len(levels)  # the optimum is levels[i] with lowest ≤ i < highest, or else the radius
    proven = True
    try:
        if time_limit is not None:
            above = highest
            while lowest < above:
                middle = (lowest + above) // 2
                if ask(levels[middle], integer=False) is None:
                    lowest = middle + 1
                else:
                    above = middle
        step = 1
        while lowest < highest:
            level = max(lowest, highest - step)
            cover = ask(levels[level], integer=True)
            if cover is None:
                lowest, step = level + 1, 1
                continue
            best = search(values, _filled(values, cover, k), least=least)
            if not values[best].min(0).max() <= levels[level]:  # HiGHS holds constraints up to a tolerance
                raise _Undecided
            highest, step = int(np.searchsorted(levels, values[best].min(0).max())), 2 * step
    except _Undecided:
        proven = False
    indices = torch.from_numpy(np.sort(best)).to(points.device)
    radii, labels, distances = overload("cover", points.device.type, backend)(points, indices, None, number)
    objective = radii[-1]
    bound = objective.clone() if proven else objective.new_tensor(_distance(levels[lowest], number))
    if not proven:
        _warn("exact_k_center", time_limit, objective, "at least", bound)
    return Selection(indices, radii, labels, distances, objective, bound)


def _undominated(covers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a cover matrix that are enough: none of these rows is covered wherever another is, and none
    of these columns covers but what another does."""
    rows, columns = (np.arange(size) for size in covers.shape)
    while True:
        before = len(rows) + len(columns)
        rows = rows[_minimal(covers[np.ix_(rows, columns)])]
        columns = columns[_minimal(~covers[np.ix_(rows, columns)].T)]
        if len(rows) + len(columns) == before:
            return rows, columns


def _minimal(sets: np.ndarray) -> np.ndarray:
    """Which of the sets (m, size) contain no other, and no equal one before them."""
    member = sets.astype(np.float32)  # a product of these counts exactly
    within = member @ member.T == sets.sum(1, dtype=np.float32)[:, None]  # i within j
    equal = within & within.T
    return ~(within & (~equal | np.tri(len(sets), k=-1, dtype=bool).T)).any(0)


def _filled(values: np.ndarray, chosen: np.ndarray, k: int) -> np.ndarray:
    """k distinct positions: the chosen ones and the farthest from them."""
    nearest = values[chosen].min(0)
    nearest[chosen] = -1
    while len(chosen) < k:
        new = nearest.argmax()
        chosen = np.append(chosen, new)
        nearest = np.minimum(nearest, values[new])
        nearest[new] = -1
    return chosen


def exact_dispersion(
    points: Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "euclidean",
    time_limit: float | None = None,
    backend: str | None = None,
) -> Selection:
    """The k points whose smallest pairwise distance is the largest, proven.

    Starts from `k_dispersion`. Then OR-Tools' CP-SAT looks for k points that are all farther apart, until there are
    none.

    Parameters
    ----------
    points, k, metric, time_limit, backend
        As in `exact_k_center`; k from 2.

    Returns
    -------
    Selection
        ``indices`` ascending. ``objective`` is the smallest pairwise distance, and ``bound`` the same: the optimum.
        Where the time did not suffice, ``bound`` is the upper bound of `k_dispersion`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    ImportError
        Without OR-Tools, which the extra ``exact`` brings.

    Warns
    -----
    RuntimeWarning
        When `time_limit` was not enough.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> points = torch.tensor([[0.0], [1.0], [2.0], [5.0], [6.0]])
    >>> pf.selection.exact_dispersion(points, 3).indices  # doctest: +SKIP
    tensor([0, 2, 3])
    """
    cp_model = need("ortools.sat.python.cp_model", "exact")
    number, points, k, deadline = _checked(points, k, metric, time_limit, "k_dispersion")
    if k < 2:
        raise ValueError("k is 1; a smallest distance needs at least 2 points")
    values = matrix(points, number, backend)
    indices, objective, bound = disperse(points, None, k, MAX_MIN, number, True, backend)
    best, (above, after) = indices.cpu().numpy(), np.triu_indices(len(values), 1)
    pairs = values[above, after]
    while True:
        near = pairs <= values[np.ix_(best, best)][np.triu_indices(k, 1)].min()
        model = cp_model.CpModel()
        takes = [model.new_bool_var("") for _ in values]
        model.add(sum(takes) == k)
        for i, j in zip(above[near].tolist(), after[near].tolist(), strict=True):
            model.add_at_most_one(takes[i], takes[j])
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1  # the same choice in every run
        if time_limit is not None:
            solver.parameters.max_time_in_seconds = max(deadline - time.monotonic(), 0.0)
        status = solver.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            break
        best = np.flatnonzero([solver.value(take) for take in takes])
    objective = objective.new_tensor(_distance(values[np.ix_(best, best)][np.triu_indices(k, 1)].min(), number))
    if status == cp_model.INFEASIBLE:
        bound = objective.clone()
    else:
        _warn("exact_dispersion", time_limit, objective, "at most", bound)
    indices = torch.from_numpy(np.sort(best)).to(points.device)
    radii, labels, distances = overload("cover", points.device.type, backend)(points, indices, None, number)
    return Selection(indices, radii, labels, distances, objective, bound)


def _checked(
    points: Tensor | np.ndarray, k: int, metric: str, time_limit: float | None, instead: str
) -> tuple[int, Tensor, int, float]:
    """The metric's number, the points, k and the deadline on the monotonic clock."""
    number = metric_number(metric)
    if time_limit is not None:
        wrong = f"time_limit is {time_limit!r}; give seconds above 0, or None"
        if not isinstance(time_limit, numbers.Real):
            raise TypeError(wrong)
        if not time_limit > 0:
            raise ValueError(wrong)
    points = tensor("points", points)
    n = points.shape[0] if points.ndim else 0
    if n > LARGEST:
        raise ValueError(
            f"points has {n} rows; the exact method takes the matrix of all distances ({8e-9 * n * n:.0f} GB here) and "
            f"at most {LARGEST} points: {instead} takes more, and says how far from the optimum it can be"
        )
    points, _ = points_and_mask(points, number)
    deadline = time.monotonic() + (float("inf") if time_limit is None else time_limit)
    return number, points, number_to_choose(k, points, None), deadline


def _distance(value: float, metric: int) -> float:
    return float(np.sqrt(value)) if metric == EUCLIDEAN else float(value) / (2 if metric == COSINE else 1)


def _warn(name: str, time_limit: float | None, objective: Tensor, side: str, bound: Tensor) -> None:
    warnings.warn(
        f"{name} stopped undecided after time_limit={time_limit}: {objective:g} was found, and the optimum is {side} "
        f"{bound:g}; give more time",
        RuntimeWarning,
        stacklevel=3,
    )
