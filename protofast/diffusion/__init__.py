"""DDIM sampling, inversion and noising of any ``model(x, t, **cond)`` (Song, Meng, Ermon 2021)."""

from ..ddim import normal_noise
from .inversion import invert
from .loop import Callback, LoopStep
from .noising import add_noise, timesteps
from .sampling import sample

__all__ = ["Callback", "LoopStep", "add_noise", "invert", "normal_noise", "sample", "timesteps"]
