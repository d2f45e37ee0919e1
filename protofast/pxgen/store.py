"""The folder a run works in: tables that grow by rows, and the progress that says how many of them count."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._files import replacing

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
CHECKPOINT_SECONDS = 1.0


class Store:
    """Tables on disk and how far they have got; a process that is killed at any moment leaves them usable.

    Rows are written first and counted afterwards, by replacing ``state.json``: rows past the count are written again.

    Parameters
    ----------
    folder : Path
        Made when it is missing.
    identity : dict
        What the rows depend on. A folder that holds another identity is refused.
    durable : bool
        Whether rows have to survive a power cut as well (fsync).
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, durable: bool) -> None:
        self.folder, self.identity, self.durable = folder, identity, durable
        self.done, self.finished, self.columns = 0, False, dict[str, int]()
        self._files: dict[str, Any] = {}
        self._saved = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"work_dir {folder} is a file; give a folder") from None
        self._lock = _locked(folder)
        path = folder / "state.json"
        if path.exists():
            try:
                self._resume(path)
            except BaseException:
                self._lock.close()
                raise

    def _resume(self, path: Path) -> None:
        cure = f"choose another work_dir, or delete {self.folder}"
        try:
            state = json.loads(path.read_text())
            then, self.done, self.finished = state["identity"], int(state["done"]), bool(state["finished"])
            self.columns = {str(name): int(width) for name, width in state["columns"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"work_dir has an unreadable {path}; {cure}") from error
        differing = sorted(key for key in {*then, *self.identity} if then.get(key) != self.identity.get(key))
        if differing:
            changes = "; ".join(f"{key} was {then.get(key)!r}, now {self.identity.get(key)!r}" for key in differing)
            raise ValueError(f"work_dir {self.folder} holds another analysis ({changes}); {cure}")
        for name, width in self.columns.items():
            table = self.folder / name
            size = table.stat().st_size if table.exists() else 0
            if size < self.done * width * _itemsize(name):
                raise ValueError(f"work_dir: {table} is shorter than the {self.done} rows it should hold; {cure}")

    def write(self, name: str, first: int, rows: np.ndarray) -> None:
        """Writes rows `first` … of a table; the name's suffix is the NumPy type, as in ``criteria.f8``."""
        rows = np.ascontiguousarray(rows.reshape(len(rows), -1), dtype=name.rpartition(".")[2])
        width = self.columns.setdefault(name, rows.shape[1])
        if rows.shape[1] != width:
            raise ValueError(f"{name} has rows of {width} values; {rows.shape[1]} were given for anchor {first}")
        if name not in self._files:
            path = self.folder / name
            self._files[name] = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        file = self._files[name]
        file.seek(first * width * _itemsize(name))
        file.write(rows.tobytes())

    def checkpoint(self, done: int, *, finished: bool = False) -> None:
        """Counts the first `done` rows as written; at most once a second unless finished."""
        if not finished and time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        self.done, self.finished = done, finished
        for file in self._files.values():
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "done": done,
            "finished": finished,
            "columns": self.columns,
        }
        self.save_json("state.json", state)
        self._saved = time.monotonic()

    def table(self, name: str) -> np.ndarray:
        """The counted rows (done, width) of a finished table, memory-mapped."""
        shape = (self.done, self.columns[name])
        return np.memmap(self.folder / name, dtype=name.rpartition(".")[2], mode="r+", shape=shape)

    def save_json(self, name: str, content: Any) -> None:
        """Replaces a JSON file in one move."""
        with replacing(self.folder / name, durable=self.durable) as file:
            file.write(json.dumps(content).encode())

    def load_json(self, name: str) -> Any:
        """Content of a JSON file, None when it is missing or damaged (it can be computed again)."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()


def _locked(folder: Path) -> IO[bytes]:
    """An open file that keeps other runs out of the folder; the system lets go of it when the process ends."""
    file = open(folder / "lock", "wb")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"work_dir {folder} is in use by another run; wait for it, or choose another") from None
    return file


def _itemsize(name: str) -> int:
    return np.dtype(name.rpartition(".")[2]).itemsize
