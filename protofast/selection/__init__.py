"""Choosing representative points: k-center, k-dispersion, k-medoids and the farthest pair."""

from typing import TYPE_CHECKING

from .dispersion import farthest_pair, k_dispersion
from .exact import exact_dispersion, exact_k_center
from .greedy import k_center
from .medoids import k_medoids
from .result import Selection
from .streaming import StreamingKCenter, StreamSelection, stream_k_center

if TYPE_CHECKING:
    from .estimators import KCenter, KDispersion, KMedoids

__all__ = [
    "KCenter",
    "KDispersion",
    "KMedoids",
    "Selection",
    "StreamSelection",
    "StreamingKCenter",
    "exact_dispersion",
    "exact_k_center",
    "farthest_pair",
    "k_center",
    "k_dispersion",
    "k_medoids",
    "stream_k_center",
]


def __getattr__(name: str) -> object:
    if name in ("KCenter", "KDispersion", "KMedoids"):  # they need scikit-learn
        from . import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module 'protofast.selection' has no attribute {name!r}")
