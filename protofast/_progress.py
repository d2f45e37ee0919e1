"""Bars on stderr, where rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    def __call__(self, count: int, note: str = "", /) -> None:
        """Advances a bar; a note takes the place of the one beside it."""


Progress = Callable[[str, "int | None", int], Advance]
"""(description, total, already done) → function that advances the bar."""


def told_totals(advance: Advance) -> Callable[[int, int], None]:
    """``progress(done, total)`` that advances a bar by what was done since."""
    at = 0

    def tick(done: int, total: int) -> None:
        nonlocal at
        advance(done - at)
        at = done

    return tick


@contextmanager
def bars(show: bool) -> Iterator[Progress]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ImportError:
        show = False
    if not show:
        yield lambda description, total, done: lambda count, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as live:

        def start(description: str, total: int | None, done: int) -> Advance:
            task = live.add_task(description, total=total, completed=done, note="")

            def advance(count: int, note: str = "") -> None:
                live.advance(task, count)
                if note:
                    live.update(task, note=note)

            return advance

        yield start
