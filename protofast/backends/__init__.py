"""Backends register kernels for the ops that `protofast._ops` declares, and nothing else."""

from . import native, reference, triton

__all__ = ["native", "reference", "triton"]
