"""Where the files of named sets are looked for, and what is said when they are not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def folders(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    """`root`, or else PROTOFAST_DATA: the set's own folder in it, and the folder itself."""
    if root is None and "PROTOFAST_DATA" not in os.environ:
        return []
    shared = Path(root if root is not None else os.environ["PROTOFAST_DATA"])
    return [shared / name, shared]


def missing(name: str, looked: Sequence[Path], cure: str) -> FileNotFoundError:
    places = ", ".join(map(str, looked)) or "no folder (root= and PROTOFAST_DATA are not set)"
    return FileNotFoundError(f"{name} was looked for in {places}. It is not downloaded: {cure}")


def some(names: Sequence[str]) -> str:
    """The first of what is missing, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
