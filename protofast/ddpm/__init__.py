"""A small diffusion model trained on real images within minutes on a CPU, and what DDIM makes of it."""

from .check import evaluate
from .training import Denoiser, load, train

__all__ = ["Denoiser", "evaluate", "load", "train"]
