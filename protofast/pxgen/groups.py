"""The four groups, how sensitive they are to the thresholds, and what goes wrong, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .result import GROUPS, GroupSummary, Threshold

FACTORS = (0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0)
"""What each threshold is multiplied by to see how many anchors change group."""


def assign(criteria: Mapping[str, np.ndarray], kinds: Mapping[str, str], limits: Mapping[str, float]) -> np.ndarray:
    """Group of each anchor.

    Affinity of a kind is high where **all** criteria of that kind lie strictly below their thresholds; a value
    equal to its threshold is low.

    Parameters
    ----------
    criteria : dict of str to ndarray (n,)
    kinds : dict of str to {"intrinsic", "extrinsic"}
    limits : dict of str to float

    Returns
    -------
    ndarray (n,) of uint8
        Index into ``GROUPS = ("HIHE", "HILE", "LIHE", "LILE")``.

    Examples
    --------
    >>> from protofast.pxgen.groups import assign
    >>> import numpy as np
    >>> values = {"kld": np.array([1.0, 1.0, 5.0, 2.0]), "mse": np.array([0.1, 9.0, 0.1, 0.5])}
    >>> assign(values, {"kld": "intrinsic", "mse": "extrinsic"}, {"kld": 2.0, "mse": 0.5}).tolist()
    [0, 1, 2, 3]
    """
    low = {}
    for kind in ("intrinsic", "extrinsic"):
        below = [values < limits[name] for name, values in criteria.items() if kinds[name] == kind]
        low[kind] = ~np.logical_and.reduce(below)
    return (2 * low["intrinsic"] + low["extrinsic"]).astype(np.uint8)


def summarise(groups: np.ndarray) -> list[GroupSummary]:
    """Count and share of each of GROUPS."""
    counts = np.bincount(groups, minlength=len(GROUPS))
    return [
        GroupSummary(name, int(count), float(count / max(1, len(groups))))
        for name, count in zip(GROUPS, counts, strict=True)
    ]


def sensitivity(
    criteria: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    limits: Mapping[str, float],
    factors: Sequence[float] = FACTORS,
) -> dict[str, list[float]]:
    """How many anchors change group when one threshold is multiplied by each factor, the others kept.

    Returns
    -------
    dict
        ``{"factors": [...], name of a criterion: [count for each factor], ...}``.
    """
    base = assign(criteria, kinds, limits)
    moved: dict[str, list[float]] = {"factors": list(factors)}
    for name in criteria:
        changed = [assign(criteria, kinds, {**limits, name: limits[name] * factor}) for factor in factors]
        moved[name] = [int((groups != base).sum()) for groups in changed]
    return moved


def signatures(summaries: Sequence[GroupSummary], thresholds: Sequence[Threshold]) -> list[str]:
    """The documented failure signatures that apply."""
    share = {summary.name: summary.share for summary in summaries}
    found = []
    if share["HIHE"] == 0:
        found.append(
            "HIHE is empty: no anchor is both familiar to the model and well reproduced. The thresholds are too "
            "strict, or the anchors have nothing in common with what the model generates."
        )
    if share["HILE"] > 0.5:
        found.append(
            f"HILE holds {100 * share['HILE']:.0f} % of the anchors: the model is confident and wrong on most of "
            "them, as a collapsed or overfitted model is."
        )
    for threshold in thresholds:
        if threshold.unstable:
            found.append(
                f"The threshold of {threshold.criterion} is unstable: it varies by {100 * threshold.spread:.3g} % "
                f"between {len(threshold.iterations)} iterations (20 % is the limit). Use more generations or more "
                "iterations."
            )
    return found
