"""Generators behind one small protocol: embeddings of prompts in, differentiable images out."""

from .protocol import Generator, Prompts
from .tiny_flow import TinyFlow, train_tiny_flow

__all__ = ["Generator", "Prompts", "TinyFlow", "train_tiny_flow"]
