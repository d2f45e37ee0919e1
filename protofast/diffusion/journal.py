"""What a run has finished, in a folder, so that the next call goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import digest, replacing
from .._optional import need

_FORMAT = "protofast-diffusion-1"
_CURE = "give what it had, or another folder"
_REDO = "delete it, and its batch is computed again"


class Journal:
    """A file for each finished batch, and one for the last step of the batch under way.

    Each is written whole or not at all, and carries the settings and the digests of the inputs it came from.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        need("safetensors.torch", "data")
        self._library = need("safetensors", "data")
        self._folder = Path(folder)
        self._settings = json.loads(json.dumps(settings))  # as they will be read: tuples become lists
        self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, first: int, inputs: Mapping[str, str]) -> tuple[int, Tensor] | None:
        """The last finished step of the batch that begins with sample `first`, and what came out of it."""
        for path in (self._batch(first), self._step):
            if path.exists():
                about, x = self._load(path)
                self._same_settings(path, about["settings"])
                if about["first"] == first:
                    for name in {**about["inputs"], **inputs}:
                        if about["inputs"].get(name) != inputs.get(name):
                            raise ValueError(f"{path} was made with another {name}; {_CURE}")
                    return about["number"], x
        return None

    def write(self, first: int, number: int, last: bool, x: Tensor, inputs: Mapping[str, str]) -> None:
        """Keeps the result of a step; that of the `last` step of a batch stays."""
        x = x.detach().cpu().contiguous()
        about = {"settings": self._settings, "first": first, "number": number, "inputs": dict(inputs), "x": digest(x)}
        data = self._library.torch.save({"x": x}, {"format": _FORMAT, "about": json.dumps(about)})
        with replacing(self._batch(first) if last else self._step, durable=True) as file:
            file.write(data)

    def finish(self) -> None:
        """Every batch is there: the last step is of no more use."""
        self._step.unlink(missing_ok=True)

    @property
    def _step(self) -> Path:
        return self._folder / "step.safetensors"

    def _batch(self, first: int) -> Path:
        return self._folder / f"batch-{first:010d}.safetensors"

    def _load(self, path: Path) -> tuple[dict[str, Any], Tensor]:
        try:
            with self._library.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no progress of pf.diffusion; give another folder")
                about, x = json.loads(metadata["about"]), file.get_tensor("x")
        except self._library.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); {_REDO}") from None
        if digest(x) != about["x"]:
            raise ValueError(f"{path} is damaged (its checksum does not match); {_REDO}")
        return about, x

    def _same_settings(self, path: Path, then: Mapping[str, Any]) -> None:
        for name in {**self._settings, **then}:
            if then.get(name) != self._settings.get(name):
                raise ValueError(
                    f"{path} was made with {name} {then.get(name)!r}; now it is {self._settings.get(name)!r}; {_CURE}"
                )
