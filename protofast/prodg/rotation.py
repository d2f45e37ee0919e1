"""The learned basis of a classifier's channels: a matrix that starts as the identity and stays what it has to be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

PARAMETRIZATIONS = ("matrix_exp", "cayley", "orthogonal", "invertible")


class Rotation(nn.Module):
    """A matrix U (C, C) over channels, made of free parameters; the identity before any update.

    Parameters
    ----------
    channels : int
        C.
    parametrization : {"matrix_exp", "cayley", "orthogonal", "invertible"}, default "matrix_exp"
        With S = A − Aᵀ of a free A: ``matrix_exp`` is exp(S), as in the paper; ``cayley`` is (I − S/2)⁻¹ (I + S/2), of
        the same value and gradient at S = 0 for one solve of a linear system; ``orthogonal`` is torch's
        ``parametrizations.orthogonal``, an exponential of the lower triangle alone. These three give UUᵀ = I and
        det U = 1. ``invertible`` is exp(A), EPIC's second choice: not orthogonal, but never singular.

    Attributes
    ----------
    channels : int
    parametrization : str
    orthogonal : bool
        Whether U⁻¹ = Uᵀ, which `protofast.channel_purity` relies on.

    Notes
    -----
    Every call makes the matrix anew, and at C = 1280 that is seconds of work: call once an update and keep the result.

    References
    ----------
    ProDG, arXiv 2605.08858; EPIC, arXiv 2505.12897.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.rotation import Rotation
    >>> rotation = Rotation(4, parametrization="cayley")
    >>> torch.equal(rotation(), torch.eye(4))
    True
    >>> rotation.orthogonal, torch.equal(rotation.inverse(), rotation().T)
    (True, True)
    """

    def __init__(self, channels: int, *, parametrization: str = "matrix_exp") -> None:
        super().__init__()
        if int(channels) != channels or channels < 1:
            raise ValueError(f"channels is {channels}; give a whole number, at least 1")
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization is {parametrization!r}; choose one of {', '.join(PARAMETRIZATIONS)}")
        self.channels, self.parametrization = int(channels), parametrization
        self.orthogonal = parametrization != "invertible"
        if parametrization == "orthogonal":
            self.weight = nn.Parameter(torch.eye(self.channels))
            # The map has to be named: Householder's loses its signs to weight decay.
            orthogonal(self, "weight", orthogonal_map="matrix_exp")
        else:
            self.raw = nn.Parameter(torch.zeros(self.channels, self.channels))

    def forward(self) -> Tensor:
        """U (C, C), differentiable; outside autocast always."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            if self.parametrization == "orthogonal":
                return _straightened(self.weight)
            if self.parametrization == "invertible":
                return torch.matrix_exp(self.raw)
            skew = self.raw - self.raw.mT
            if self.parametrization == "matrix_exp":
                return _straightened(torch.matrix_exp(skew))
            one = torch.eye(self.channels, dtype=skew.dtype, device=device)
            return torch.linalg.solve(one - skew / 2, one + skew / 2)

    def inverse(self) -> Tensor:
        """U⁻¹ (C, C), differentiable: the transpose, or exp(−A) of ``invertible``."""
        if self.orthogonal:
            return self().mT
        with torch.autocast(self.raw.device.type, enabled=False):
            return torch.matrix_exp(-self.raw)

    def extra_repr(self) -> str:
        return f"{self.channels}, parametrization={self.parametrization!r}"


def _straightened(matrix: Tensor) -> Tensor:
    """A step of Newton and Schulz towards UUᵀ = I, which leaves the gradient as it is.

    An exponential's squarings double its rounding errors: in float32 at C = 1280 they leave UUᵀ off by up to 6e-5, and
    compensated logits by more than 1e-4. After the step it is the roundings of one product.
    """
    with torch.no_grad():
        one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        off = matrix @ ((one - matrix.mT @ matrix) / 2)
    return matrix + off
