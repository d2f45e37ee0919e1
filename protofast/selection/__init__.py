"""Choosing representative points: k-center, k-dispersion, k-medoids and the farthest pair."""

from .dispersion import farthest_pair, k_dispersion
from .greedy import k_center
from .medoids import k_medoids
from .result import Selection

__all__ = ["Selection", "farthest_pair", "k_center", "k_dispersion", "k_medoids"]
