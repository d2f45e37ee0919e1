"""Trained weights in a file: safetensors with a checksum, written whole or not at all, and cached by what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import replacing
from ._optional import need


def write(path: str | os.PathLike[str], kind: str, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes tensors and what is to be known of them; `kind` names the format."""
    save = _library().torch.save
    state = {name: value.contiguous() for name, value in state.items()}
    data = save(state, {"format": kind, **about, "sha256": _checksum(state)})
    with replacing(path) as file:
        file.write(data)


def read(path: str | os.PathLike[str], kind: str, *, wrong: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write` wrote: the tensors, and what is known of them.

    Raises
    ------
    FileNotFoundError
    ValueError
        When the file is damaged, or of another kind; `wrong` says so after its name.
    """
    library = _library()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .safetensors file that protofast wrote")
    try:
        with library.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict
    except library.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); give one that protofast wrote") from None
    if about.get("format") != kind:
        raise ValueError(f"{path} {wrong}")
    if about.get("sha256") != _checksum(state):
        raise ValueError(f"{path} is damaged (its checksum does not match); delete it and train again")
    return state, about


def place(cache: bool | str | os.PathLike[str], name: str, settings: Any, images: Tensor) -> Path | None:
    """Where weights are kept that `settings` and `images` make: in a folder, True is the user's own; None for False."""
    if cache is False:
        return None
    folder = Path(need("pooch", "data").os_cache("protofast")) / "models" if cache is True else Path(cache)
    key = hashlib.sha256(json.dumps(settings).encode() + images.numpy().tobytes()).hexdigest()
    return folder / f"{name}-{key[:32]}.safetensors"


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].reshape(-1).view(torch.uint8).numpy().tobytes())  # bfloat16 too
    return digest.hexdigest()


def _library() -> Any:
    need("safetensors.torch", "data")
    return need("safetensors", "data")
