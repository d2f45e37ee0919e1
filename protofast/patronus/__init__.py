"""Patronus: the interpretable diffusion model of arXiv 2503.22782."""

from .config import PRESETS, TRAINING, PatronusConfig, TrainingConfig
from .images import Images, images_of
from .model import Patronus
from .training import train

__all__ = ["PRESETS", "TRAINING", "Images", "Patronus", "PatronusConfig", "TrainingConfig", "images_of", "train"]
