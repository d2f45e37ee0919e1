"""What a selection returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen points and how they cover the others. All tensors are on the points' device (the CPU for numpy input).
    Of several clouds at once (`k_center`) each field has a leading B.

    Attributes
    ----------
    indices : int64 Tensor of shape (k,)
        The chosen points, in the order chosen.
    radii : float64 Tensor of shape (k,)
        The covering radius after each choice: the largest distance from an allowed point to the nearest point
        chosen so far.
    labels : int64 Tensor of shape (n,)
        Position in `indices` of the nearest chosen point, the lowest one among equals; −1 for points that `mask`
        leaves out. Empty, as `distances` is, where ``assign=False`` was given.
    distances : float64 Tensor of shape (n,)
        Distance to that point; infinity for points that `mask` leaves out.
    objective : float64 Tensor of shape ()
        What was optimised: the covering radius (`k_center`), the smallest or the total pairwise distance
        (`k_dispersion`), the sum of `distances` (`k_medoids`). Takes part in arithmetic and formatting like a float.
    bound : float64 Tensor of shape ()
        A proven bound on the optimum, up to float64 rounding: a lower one where the objective is minimised, an
        upper one where it is maximised. NaN where none is known (`k_medoids`).
    """

    indices: Tensor
    radii: Tensor
    labels: Tensor
    distances: Tensor
    objective: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return self.indices.shape[-1]
