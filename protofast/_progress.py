"""Bars on stderr, where rich is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int | None, int], Callable[[int], None]]
"""(description, total, already done) → function that advances the bar."""


@contextmanager
def bars(show: bool) -> Iterator[Progress]:
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
    with Bars(*columns, console=Console(stderr=True)) as live:

        def start(description: str, total: int | None, done: int) -> Callable[[int], None]:
            task = live.add_task(description, total=total, completed=done)
            return functools.partial(live.advance, task)

        yield start
