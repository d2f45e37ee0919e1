"""k-center in one pass over more points than memory holds: a coreset by doubling, and greedy on it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import _weights
from .._ops.selection import METRICS, PRECOMPUTED
from .._progress import bars
from .coreset import LENGTHS, TABLES, Doubling, State
from .inputs import NUMBERS, at_least, check_values, metric_number, tensor

CORESET, LEAST_CORESET = 8, 256
"""How many points are kept to each one that is chosen, and at least, unless told otherwise."""
CHECKPOINT_SECONDS = 30.0
LEAST_ROWS, MOST_ROWS = 256, 1 << 16
"""Rows that are taken in at once: few while points enter the coreset, many later. Changes no result."""

Batch: TypeAlias = Tensor | np.ndarray | Sequence[Any]

_FORMAT = "protofast-stream-k-center-1"


@dataclass(frozen=True, eq=False)
class StreamSelection:
    """Points chosen out of a stream. All tensors are on the batches' device (the CPU for numpy input).

    Attributes
    ----------
    points : Tensor of shape (k, d)
        The chosen points, in the order chosen and the dtype of the batches (float64 for integers).
    indices : int64 Tensor of shape (k,)
        Their rows, counted over the whole stream.
    sizes : int64 Tensor of shape (k,)
        How many rows each stands for; together `seen`. 0 for a point that is there only to make k.
    objective : float64 Tensor of shape ()
        An upper bound on the covering radius: every row seen lies at most this far from a chosen point.
    bound : float64 Tensor of shape ()
        A lower bound on the covering radius that any k points can have. Both hold up to float64 rounding, and
        `objective` is at most 8 times `bound` (64 times for the squared metrics sqeuclidean and cosine).
    seen : int
        Rows so far.
    """

    points: Tensor
    indices: Tensor
    sizes: Tensor
    objective: Tensor
    bound: Tensor
    seen: int

    def __len__(self) -> int:
        return self.indices.shape[0]


class StreamingKCenter:
    """k-center of batches that come one after the other; how, and what is proven, stands in `stream_k_center`.

    Parameters
    ----------
    k : int
        How many to choose, at least 1.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan"}
    coreset : int, optional
        How many points to keep, at least k; None: 8 k, and at least 256.
    backend : str, optional

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> stream = pf.selection.StreamingKCenter(2, coreset=4)
    >>> for batch in torch.tensor([[0.0], [1.0], [7.0], [8.0], [2.0], [9.0], [1.0]]).split(3):
    ...     stream.update(batch)
    >>> stream.result().indices
    tensor([0, 3])
    """

    def __init__(
        self, k: int, *, metric: str = "euclidean", coreset: int | None = None, backend: str | None = None
    ) -> None:
        self.k = at_least("k", k, 1)
        number = metric_number(metric)
        if number == PRECOMPUTED:
            names = ", ".join(map(repr, METRICS[:PRECOMPUTED]))
            raise ValueError(f"metric is 'precomputed', but a stream has no distance matrix; choose one of {names}")
        self.metric = metric
        usual = max(CORESET * self.k, LEAST_CORESET)
        self.coreset = at_least("coreset", usual if coreset is None else coreset, self.k)
        self._rules = Doubling(self.k, self.coreset, number, backend)
        self._state: State | None = None
        self._step = 1024

    @property
    def seen(self) -> int:
        """Rows so far."""
        return 0 if self._state is None else self._state.seen

    def update(self, batch: Batch) -> None:
        """Takes further rows in.

        Parameters
        ----------
        batch : Tensor or array of shape (b, d)
            Of one width and dtype throughout. Of a list or tuple, as a DataLoader makes them, the first entry counts.

        Raises
        ------
        ValueError, TypeError
            When it does not fit, or holds NaN or infinity (with the row in the stream). Nothing of it is taken in.
        """
        x = self._comparable(_rows(batch), self.seen)
        check_values(x, self._rules.metric, name="the stream", first=self.seen)
        start = 0
        while start < len(x):
            rows = x[start : start + self._step]
            state, entered = self._rules.take(self._at(x), rows)
            self._state = state  # at once and whole: an interrupt leaves the state after some row
            start += len(rows)
            self._step = max(LEAST_ROWS, self._step // 2) if entered else min(MOST_ROWS, self._step * 2)

    def result(self) -> StreamSelection:
        """The choice from the rows so far; more may follow.

        Raises
        ------
        ValueError
            When there were fewer rows than k.
        """
        state = self._state
        if state is None or state.seen < self.k:
            raise ValueError(f"k is {self.k}, but the stream had {self.seen} rows; give a smaller k, or more rows")
        return StreamSelection(*self._rules.choose(state), state.seen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, whole or not at all.

        Raises
        ------
        ImportError
            Without safetensors, which the extra ``protofast[data]`` brings.
        """
        about: dict[str, object] = self._settings()
        tensors = {}
        if (state := self._state) is not None:
            n = state.count
            for name in TABLES:
                table = getattr(state, name).cpu()
                table = table if name == "first" else table[:n]
                tensors[name] = table.double() if table.is_floating_point() else table  # exact
            about |= {"dtype": str(state.points.dtype).removeprefix("torch."), "seen": state.seen}
            about |= {name: getattr(state, name).hex() for name in LENGTHS}
        _weights.write(path, _FORMAT, tensors, {"about": json.dumps(about)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote; the state follows the next batch to its device.

        Raises
        ------
        FileNotFoundError
        ValueError
            When the file is damaged, or was made with another k, metric or coreset.
        ImportError
            Without safetensors.
        """
        wrong = "holds no state of a streamed k-center; give another file"
        tensors, found = _weights.read(path, _FORMAT, wrong=wrong)
        about = json.loads(found["about"])
        for name, now in self._settings().items():
            if about[name] != now:
                raise ValueError(
                    f"{path} was made with {name}={about[name]!r}, but {name} is {now!r}; give what it had, or "
                    "another file"
                )
        if not tensors:
            self._state = None
            return
        dtype = getattr(torch, about["dtype"])
        state = self._rules.empty(tensors["points"].to(dtype), tensors["first"].to(dtype))
        n = len(tensors["rows"])
        for name in TABLES[:-1]:
            getattr(state, name)[:n] = tensors[name]
        numbers: dict[str, Any] = {name: float.fromhex(about[name]) for name in LENGTHS}
        self._state = replace(state, count=n, seen=about["seen"], **numbers)

    def _settings(self) -> dict[str, object]:
        return {"k": self.k, "metric": self.metric, "coreset": self.coreset}

    def _at(self, x: Tensor) -> State:
        """The state on the device of `x`."""
        if (state := self._state) is None:
            return self._rules.empty(x, x[:0])
        if state.points.device == x.device:
            return state
        return replace(state, **{name: getattr(state, name).to(x.device) for name in TABLES})

    def _comparable(self, x: Tensor, row: int) -> Tensor:
        if x.ndim != 2:
            raise ValueError(f"the batch at row {row} has shape {tuple(x.shape)}; give (b, d)")
        if x.is_complex():
            raise TypeError(f"the batch at row {row} is {x.dtype}; give real numbers")
        if not x.is_floating_point():
            x = x.double()
        if self._state is not None:
            before = self._state.points
            if x.shape[1] != before.shape[1]:
                raise ValueError(
                    f"the batch at row {row} has shape {tuple(x.shape)}, but the rows before it have {before.shape[1]} "
                    "columns; give the same number"
                )
            if x.dtype != before.dtype:
                raise TypeError(
                    f"the batch at row {row} is {x.dtype}, but the rows before it are {before.dtype}; give one dtype"
                )
        return x

    def _recognise(self, x: Tensor, row: int) -> None:
        """Rows from `row` on, seen before: they must fit what is known of them."""
        if self._state is None:
            return
        known = self._state.first[row : row + len(x)].to(x.device)
        if not torch.equal(known, x[: len(known)]):
            raise ValueError(
                "checkpoint was made from another stream: its first rows are not those of batches; give another file"
            )


def stream_k_center(
    batches: Iterable[Batch] | Tensor | np.ndarray,
    k: int,
    *,
    metric: str = "euclidean",
    coreset: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    total: int | None = None,
    backend: str | None = None,
) -> StreamSelection:
    """Chooses k points of a stream in one pass, so that the largest distance to the nearest chosen one is small.

    A coreset of at most m points stands for all rows seen; the choice is greedy among them. On most data its real
    covering radius is within a few percent of that of `k_center` on all rows at once, and equal to it as long as there
    are no more than m distinct rows. Depends on the order of the rows, but not on how they are cut into batches.

    Parameters
    ----------
    batches : iterable of Tensors or arrays of shape (b, d), or one of shape (n, d)
        A generator, a DataLoader (of a batch that is a list or tuple the first entry counts), or an array that need
        not fit into memory, as of ``np.load(path, mmap_mode="r")``. Any real dtype, the same throughout; integers are
        taken as float64.
    k : int
        How many to choose, from 1 to the number of rows.
    metric : {"euclidean", "sqeuclidean", "cosine", "manhattan"}
    coreset : int, optional
        m ≥ k. A larger one costs time and memory in proportion, and proves more. None: 8 k, and at least 256.
    checkpoint : path, optional
        A file that holds what is known of the rows so far: written every half minute, at the end, and when an error
        or Ctrl-C ends the call. Where it is there already, the call goes on after the rows it has seen, with the same
        result as without a break: give the same stream from its start, or one that has grown since. Needs safetensors
        (``protofast[data]``).
    progress : bool, default False
        Shows a bar, where rich is installed.
    total : int, optional
        Number of rows, for the bar; known for an array.
    backend : str, optional

    Returns
    -------
    StreamSelection
        ``points``, their ``indices`` in the stream, and a certificate: ``objective`` is an upper bound on the covering
        radius of all rows seen, ``bound`` a lower one on what any k points can have.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; a NaN or infinite coordinate with its row in the stream, a batch of another width or
        dtype, a checkpoint of other settings or another stream, fewer rows than k.

    Notes
    -----
    n·m·d operations; memory about 2·m·d beside a batch.

    Coordinates go up to 1e150. Differences below about 1e-160 count as none where their squares are added (euclidean,
    sqeuclidean; for cosine, vectors that short count as zero), as these underflow.

    The doubling algorithm of Charikar, Chekuri, Feder and Motwani (1997), with a coreset as in Ceccarello,
    Pietracaprina and Pucci (2019). Points of the coreset are more than a apart, at first a = 0. A row within a of one
    of them goes to the nearest, any other enters. When there are m + 1, let δ be their least distance, and R the
    largest distance proven from a row to the point that it went to. a is raised to some a' with
    max(δ, R) ≤ a' ≤ 4δ − R, so that about half remain if this allows it, and points within a' of another one go into
    it, with their rows. Then R becomes at most R + a', that is at most 2a' and at most 4δ, and rows that follow, at
    most a' ≤ 4δ from theirs, leave it so. The next δ is more than a' ≥ R / 2, so there always is such an a'.

    m + 1 points at least δ apart prove that m points have a covering radius OPT(m) ≥ δ / 2, thus R ≤ 8 OPT(m). The
    choice covers the coreset with a radius g, and k + 1 of its points are g apart, thus g ≤ 2 OPT(k). Therefore

        objective ≤ g + R ≤ 2 OPT(k) + 8 OPT(m),

    which nears twice the optimum as m grows, the sooner the fewer dimensions the data has. At worst it is 8 OPT(k):
    with at most k points in the coreset g = 0, and with more g > a, so that g + R ≤ g + 2a < 3g ≤ 6 OPT(k). The squared
    metrics are decided by their roots, under which all this holds.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> def batches():
    ...     for number in range(100):
    ...         yield torch.randn(1000, 2, generator=torch.Generator().manual_seed(number))
    >>> chosen = pf.selection.stream_k_center(batches(), 10)
    >>> chosen.points.shape, chosen.seen
    (torch.Size([10, 2]), 100000)
    >>> bool(chosen.objective <= 3 * chosen.bound)
    True
    """
    stream = StreamingKCenter(k, metric=metric, coreset=coreset, backend=backend)
    if checkpoint is not None and Path(checkpoint).exists():
        stream.load(checkpoint)
    if total is None and isinstance(batches, (Tensor, np.ndarray)):
        total = len(batches)
    passed, saved = 0, time.monotonic()
    source = _batches(batches)
    if checkpoint is not None:
        stream.save(checkpoint)  # so that a place where it cannot be written is found now
    with bars(progress) as start:
        advance = start("k-center", total, stream.seen)
        try:
            for batch in source:
                x = stream._comparable(_rows(batch), passed)
                known = min(len(x), max(0, stream.seen - passed))
                stream._recognise(x[:known], passed)
                stream.update(x[known:])
                passed += len(x)
                advance(len(x) - known)
                if checkpoint is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    stream.save(checkpoint)
                    saved = time.monotonic()
        finally:
            if checkpoint is not None:
                stream.save(checkpoint)
    if passed < stream.seen:
        raise ValueError(
            f"checkpoint {checkpoint} has seen {stream.seen} rows, but batches has {passed}; give the stream that it "
            "was made from, or another file"
        )
    return stream.result()


def _batches(
    batches: Iterable[Batch] | Tensor | np.ndarray,
) -> Iterator[Batch]:
    if isinstance(batches, (Tensor, np.ndarray)):
        if batches.ndim != 2:
            raise ValueError(f"batches has shape {tuple(batches.shape)}; give (n, d), or an iterable of such")
        step = max(1, NUMBERS // max(batches.shape[1], 1))
        return (batches[start : start + step] for start in range(0, len(batches), step))
    try:
        return iter(batches)
    except TypeError:
        raise TypeError(
            f"batches is a {type(batches).__name__}; give an iterable of tensors or arrays (b, d)"
        ) from None


def _rows(batch: Any) -> Tensor:
    return tensor("a batch", batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch)
