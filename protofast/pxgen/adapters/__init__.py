"""Adapters: one small protocol over encoder–decoders, diffusion models, generators and plain functions."""

from __future__ import annotations

from typing import Any

from .base import Adapter, require
from .diffusion import DiffusionAdapter
from .function import FunctionAdapter
from .generator import GeneratorAdapter
from .vae import VAEAdapter

__all__ = [
    "Adapter",
    "DiffusionAdapter",
    "FunctionAdapter",
    "GeneratorAdapter",
    "VAEAdapter",
    "as_adapter",
    "require",
]


def as_adapter(model: Any) -> Adapter:
    """The model itself when it is an adapter, else the adapter that fits its methods."""
    if hasattr(model, "analyse") and hasattr(model, "generate"):
        return model
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        return VAEAdapter(model)
    raise TypeError(
        f"model is a {type(model).__name__} without encode(x) and decode(z); wrap it in a VAEAdapter, "
        "DiffusionAdapter, GeneratorAdapter or FunctionAdapter of protofast.pxgen"
    )
