"""Generators behind one small protocol: embeddings of prompts in, differentiable images out."""

from .flux import FluxGenerator
from .protocol import Generator, Prompts
from .stable_diffusion import StableDiffusionGenerator
from .tiny_flow import TinyFlow, train_tiny_flow

__all__ = ["FluxGenerator", "Generator", "Prompts", "StableDiffusionGenerator", "TinyFlow", "train_tiny_flow"]
