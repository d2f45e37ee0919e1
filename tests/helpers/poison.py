"""Catches results that a kernel leaves unwritten."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_PERTURB = -6  # malloc.h


@contextmanager
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialized holds garbage: NaN where it comes through torch.empty and its kin.

    The stable C interface's aoti_torch_empty_strided is not one of them, so on Linux malloc itself fills what it gives
    (blocks over about 1 KB) with bytes 0xFE: NaN as float16, −1.7e38 as float32 and bfloat16, −5.3e303 as float64.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _perturb(1)
    try:
        yield
    finally:
        _perturb(0)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _perturb(byte: int) -> None:
    """Allocated memory is filled with the complement of `byte`; 0 ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_PERTURB, byte)
