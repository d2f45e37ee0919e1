"""Catches results that a kernel leaves unwritten."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poison() -> Iterator[None]:
    """Memory from torch.empty and its kin, in Python or C++, starts as NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
