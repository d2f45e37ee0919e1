"""Peak memory of one call, over what was held before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .spec import Call

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Call, device: str) -> int | None:
    """Bytes, or None where it cannot be told.

    On a GPU, what torch's allocator handed out. On Linux, the growth of the process's resident set, which counts
    every allocator (torch's, numpy's, a kernel's scratch) that touched what it took; small calls drown in its noise.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls freed, or reusing it would look free
        _CLEAR.write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        result = call()
        grown = _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None
    del result
    return max(grown, 0)


def held(result: Any) -> int:
    """Bytes of the tensors in what a call returned."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _resident(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in {_STATUS}")
