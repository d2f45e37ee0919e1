"""Files that are written whole or not at all, and digests of what they came from."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end of the block; an error in it leaves `path` as it was.

    Makes the folder. With `durable` the content has reached the disk before the move.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """A name for the contents of a tensor. Of other values, what they are if they are plain, or else their type."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = hashlib.blake2b(flat.data, digest_size=16)
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        return found.hexdigest()
    return repr(value) if isinstance(value, (type(None), bool, int, float, str)) else type(value).__name__
