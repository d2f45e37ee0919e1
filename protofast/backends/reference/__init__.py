"""The reference: plain torch, the direct form in float64. The fallback on any device, and what tests compare with."""

from . import channels, ddim, medoids, philox, prototype, selection

__all__ = ["channels", "ddim", "medoids", "philox", "prototype", "selection"]
