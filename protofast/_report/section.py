"""A part of a report, written into a folder of its own by the command that found it."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .._files import replacing
from .._optional import need

RESULT = "result.json"


@dataclass
class Section:
    """A part of the report: what a command found, in words, tables, pictures and numbers.

    `name` is that of the command. Tables are {"title", "columns", "rows"}; pictures are {"file", "title", "caption"},
    with the PNG in `files` under "file". A system names itself, and the packages whose versions matter, in a subclass.
    """

    system: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()

    name: str
    title: str
    findings: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})

    def picture(self, file: str, png: bytes, title: str, caption: str = "") -> None:
        self.pictures.append({"file": file, "title": title, "caption": caption})
        self.files[file] = png

    def write(self, folder: Path) -> Path:
        """Writes the pictures, and then `result.json`: with it the folder is complete."""
        result = folder / RESULT
        with suppress(FileNotFoundError):
            result.unlink()
        for name, picture in self.files.items():
            with replacing(folder / name) as file:
                file.write(picture)
        content: dict[str, Any] = {"format": format_of(self.system, self.name), "title": self.title}
        content |= {"versions": self._versions(), "settings": self.settings, "findings": self.findings}
        content |= {"tables": self.tables, "pictures": self.pictures, "numbers": self.numbers}
        with replacing(result) as file:
            file.write(json.dumps(_finite(content), indent=1, allow_nan=False).encode())
        return result

    def _versions(self) -> dict[str, str]:
        import torch

        from .. import __version__

        found = {"protofast": str(__version__), "torch": str(torch.__version__), "python": platform.python_version()}
        return found | {name: need(name, self.system).__version__ for name in self.libraries}


def format_of(system: str, name: str) -> str:
    return f"protofast-{system}-{name}-1"


def ready(folder: Path, system: str, name: str) -> Path:
    """The folder of a command's results; fails now where they could not be written after all the work."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; give a folder for the results")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to; give another folder for the results")
    result = folder / RESULT
    if result.exists() and format_of(system, name) not in result.read_text(errors="replace"):
        raise FileExistsError(f"{result} is of another command; give another folder for the results")
    return folder


def tell(section: Section, result: Path) -> None:
    """Says on stdout what was found, and where the rest is."""
    for line in section.findings:
        print(line)
    print(f"Results: {result.parent.resolve()}")


def _finite(value: Any) -> Any:
    """null for what JSON has no number for."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
