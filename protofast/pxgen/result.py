"""What an analysis returns: plain data, and the methods that show, save and load it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = ("HIHE", "HILE", "LIHE", "LILE")
"""High or low Intrinsic affinity, high or low Extrinsic affinity; `Report.groups` indexes this tuple."""


@dataclass(frozen=True)
class Threshold:
    """Threshold of one criterion; an anchor is familiar when its value lies strictly below `value`.

    Attributes
    ----------
    criterion : str
    kind : {"intrinsic", "extrinsic"}
    method : {"max-mean", "percentile", "given"}
    value : float
    iterations : list of float
        The maximum (or percentile) of each iteration; empty when the threshold was given.
    std : float
        Standard deviation over the iterations (with n − 1; 0 for fewer than two).
    spread : float
        ``std / |value|``.
    """

    criterion: str
    kind: str
    method: str
    value: float
    iterations: list[float] = field(default_factory=list)
    std: float = 0.0
    spread: float = 0.0

    @property
    def unstable(self) -> bool:
        """Whether the spread is over 20 %: more iterations, or more generations each, are wanted."""
        return self.spread > 0.20


@dataclass(frozen=True)
class GroupSummary:
    """Number of anchors in a group and their share of all anchors, in [0, 1]."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class Representatives:
    """Representatives of one group.

    Attributes
    ----------
    group : {"HIHE", "HILE", "LIHE", "LILE"}
    algorithm : {"k-center", "k-dispersion", "k-medoids"}
    features : str
        What the distances were taken on: "criteria", "pixels", "latents" or "embedding".
    metric : str
    indices : list of int
        Anchor numbers, in the order chosen.
    objective : float
        Covering radius (k-center), smallest pairwise distance (k-dispersion) or total distance (k-medoids).
    bound : float or None
        Proven bound on the best objective any choice could reach.
    nearest : ndarray of int64
        For each anchor of the group (ascending anchor number), the position in `indices` of its nearest one.
    """

    group: str
    algorithm: str
    features: str
    metric: str
    indices: list[int]
    objective: float
    bound: float | None
    nearest: np.ndarray


@dataclass
class Report:
    """Result of `protofast.pxgen.explain`; shows itself in a notebook.

    Attributes
    ----------
    settings, versions, seeds : dict
        What is needed to run the analysis again.
    criteria : dict of str to ndarray (n,) float64
        Criterion name to the value of every anchor, intrinsic ones first.
    kinds : dict of str to str
        Criterion name to "intrinsic" or "extrinsic".
    thresholds : list of Threshold
    groups : ndarray (n,) uint8
        Index into ``GROUPS = ("HIHE", "HILE", "LIHE", "LILE")``.
    labels : ndarray (n,) or None
        Class of each anchor, when the data has classes.
    names : list of str or None
        Names of the classes.
    summaries : list of GroupSummary
        One for each of GROUPS, in that order.
    representatives : list of Representatives
    signatures : list of str
        Failure signatures that were found, in words.
    originals, reconstructions : dict of int to ndarray (C, H, W) float32 in [0, 1]
        Anchor number to picture, for every representative.
    sensitivity : dict
        How many anchors change group when a threshold moves: ``{"factors": [...], criterion: [counts]}``.
    findings : list of str
        Sentences that the caller adds, shown at the head of the saved report.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    seeds: dict[str, int]
    criteria: dict[str, np.ndarray]
    kinds: dict[str, str]
    thresholds: list[Threshold]
    groups: np.ndarray
    labels: np.ndarray | None
    names: list[str] | None
    summaries: list[GroupSummary]
    representatives: list[Representatives]
    signatures: list[str]
    originals: dict[int, np.ndarray]
    reconstructions: dict[int, np.ndarray]
    sensitivity: dict[str, list[float]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.groups)

    def members(self, group: str) -> np.ndarray:
        """Anchor numbers of a group, ascending."""
        return np.flatnonzero(self.groups == _position(group))

    def label_counts(self, group: str | None = None) -> dict[str, int]:
        """Number of anchors of each class in a group (all anchors when None), classes in ascending order."""
        table = self.label_table()
        if group is not None:
            return table[GROUPS[_position(group)]]
        return {name: sum(counts[name] for counts in table.values()) for name in table[GROUPS[0]]}

    def label_table(self) -> dict[str, dict[str, int]]:
        """`label_counts` of every group, in one pass over the anchors."""
        if self.labels is None:
            raise ValueError("the anchors of this report have no labels; give labels= to explain()")
        every, class_of = np.unique(self.labels, return_inverse=True)
        counts = np.bincount(class_of * len(GROUPS) + self.groups, minlength=len(every) * len(GROUPS))
        names = [self._name(label) for label in every]
        columns = counts.reshape(len(every), len(GROUPS)).T.tolist()
        return {group: dict(zip(names, column, strict=True)) for group, column in zip(GROUPS, columns, strict=True)}

    def label_shares(self, group: str) -> dict[str, float]:
        """Share of each class among the anchors of a group, in [0, 1]; all 0 when the group is empty."""
        counts = self.label_counts(group)
        total = max(1, sum(counts.values()))
        return {name: count / total for name, count in counts.items()}

    def _name(self, label: Any) -> str:
        named = self.names is not None and isinstance(label, np.integer) and 0 <= label < len(self.names)
        return self.names[label] if named and self.names is not None else str(label)

    def save(self, folder: str | Path) -> Path:
        """Writes the report into `folder`; returns the path of its HTML page."""
        from .report import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Reads what `save` wrote (``result.json`` and ``anchors.parquet``)."""
        from .report import load

        return load(folder)

    def _repr_html_(self) -> str:
        from .report import to_html

        return to_html(self)

    def __repr__(self) -> str:
        shares = ", ".join(f"{s.name} {s.count} ({s.share:.1%})" for s in self.summaries)
        limits = ", ".join(f"{t.criterion} < {t.value:.6g}" for t in self.thresholds)
        lines = [f"PXGen report of {len(self)} anchors: {shares}", f"thresholds: {limits}"]
        return "\n".join(lines + [f"! {signature}" for signature in self.signatures])


def _position(group: str) -> int:
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}; choose one of {', '.join(GROUPS)}")
    return GROUPS.index(group)
