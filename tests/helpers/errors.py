"""Comparison with an exact result under an error model, in place of a tolerance picked by hand."""

import numpy as np
import torch
from torch import Tensor

EXACT = np.longdouble
"""What exact results are computed in: 64 bits of mantissa or more on x86 and Arm Linux, 53 elsewhere."""


def exact(tensor: Tensor) -> np.ndarray:
    """The tensor's values as they are, in extended precision."""
    return tensor.detach().double().cpu().numpy().astype(EXACT)


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: the largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def assert_within(
    actual: Tensor,
    expected: np.ndarray,
    terms: np.ndarray,
    roundings: float,
    *,
    arithmetic: torch.dtype | None = None,
) -> float:
    """Asserts |actual − expected| ≤ roundings · u(arithmetic) · terms + u(actual) · |expected|.

    `terms` is the sum of the magnitudes of the terms that were added up, `roundings` how many roundings the longest
    path through them has. The last part is the rounding of the result to its dtype, where that is the narrower one.
    NaN has to meet NaN and an infinity itself. Returns the worst error as a fraction of the bound.
    """
    arithmetic = arithmetic or (torch.float64 if actual.dtype == torch.float64 else torch.float32)
    info = torch.finfo(actual.dtype)
    found = exact(actual)
    expected = np.broadcast_to(np.asarray(expected, EXACT), found.shape)
    assert np.array_equal(np.isnan(found), np.isnan(expected)), "NaN in different places"
    number = ~np.isnan(expected)
    # What is too large for the result's dtype comes out as an infinity.
    over = number & (np.abs(expected) * (1 + unit(actual.dtype)) >= info.max)
    assert np.array_equal(np.sign(found[over]), np.sign(expected[over])), "overflow with the wrong sign"
    number &= ~over
    if not number.any():
        return 0.0
    bound = roundings * unit(arithmetic) * np.broadcast_to(terms, found.shape)[number]
    if actual.dtype != arithmetic:
        bound = bound + unit(actual.dtype) * np.abs(expected[number]) * (1 + roundings * unit(arithmetic))
    bound = bound + info.smallest_normal * info.eps  # one subnormal step
    ratio = np.abs(found[number] - expected[number]) / bound
    worst = float(ratio.max())
    assert worst <= 1, (
        f"error is {worst:.3g} times the bound at flat element {int(np.flatnonzero(number)[ratio.argmax()])}: "
        f"found {found[number][ratio.argmax()]:.9g}, exact {expected[number][ratio.argmax()]:.9g}"
    )
    return worst
