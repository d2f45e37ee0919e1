"""The three losses of ProDG (arXiv 2605.08858, fig. 6); regularisation is the bank's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..channels import channel_purity


def purity_loss(maps: Tensor, matrix: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """1 − purity, each image for its channel: what the rotation and the prompts both make small.

    A channel that is nowhere above 0 has purity 0 and by the paper's formula no gradient, so it would stay dead. Here
    the loss goes on with the unrectified value, negative there, which pulls the strongest pixel upwards; above 0 both
    are the same.

    Parameters
    ----------
    maps : Tensor of shape (m, C, h, w)
    matrix : Tensor of shape (C, C)
        Orthogonal.
    channels : int64 Tensor of shape (m,)

    Returns
    -------
    loss : Tensor of shape ()
    purity : Tensor of shape (m,)
        Rectified, without gradient: 0 for a dead channel.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.losses import purity_loss
    >>> maps = torch.tensor([[[[3.0]], [[4.0]]]])
    >>> purity_loss(maps, torch.eye(2), torch.tensor([1]))
    (tensor(0.2000), tensor([0.8000]))
    """
    signed = channel_purity(maps, matrix, channels, rectify=False).purity
    return 1 - signed.mean(), signed.detach().clamp(min=0)


def pure(maps: Tensor, matrix: Tensor, channels: Tensor, *, orthogonal: bool = True) -> Tensor:
    """EPIC's purity z_c / ‖U f‖ at the pixel of the largest z_c, which may be negative: (m,).

    An orthogonal U leaves ‖f‖ as it is, so a row of it is enough; of another the whole of U f is made, at that pixel
    alone.

    Parameters
    ----------
    maps : Tensor of shape (m, C, h, w)
    matrix : Tensor of shape (C, C)
    channels : int64 Tensor of shape (m,)
    orthogonal : bool, default True

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.losses import pure
    >>> pure(torch.tensor([[[[3.0]], [[4.0]]]]), 2 * torch.eye(2), torch.tensor([1]), orthogonal=False)
    tensor([0.8000])
    """
    if orthogonal:
        return channel_purity(maps, matrix, channels, rectify=False).purity
    where = channel_purity(maps.detach(), matrix.detach(), channels, rectify=False).index
    at = where[:, None, None].expand(-1, maps.shape[1], 1)
    rotated = maps.flatten(2).gather(2, at)[..., 0] @ matrix.T
    return rotated.gather(1, channels[:, None])[:, 0] / torch.linalg.vector_norm(rotated, dim=1).clamp(min=1e-8)


def diversity_loss(maps: Tensor, repeats: int) -> Tensor:
    """Mean cosine between the pooled features of images of one channel; lower is more diverse.

    Of raw features: an orthogonal rotation changes no cosine.

    Parameters
    ----------
    maps : Tensor of shape (m · repeats, C, h, w)
        The `repeats` images of a channel follow one another.
    repeats : int
        K; with 1 the loss is 0.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.losses import diversity_loss
    >>> diversity_loss(torch.ones(4, 3, 2, 2), 2)
    tensor(1.0000)
    """
    if len(maps) % repeats:
        raise ValueError(f"repeats is {repeats}, of {len(maps)} maps; give a number that divides them")
    if repeats < 2:
        return maps.new_zeros(())
    unit = F.normalize(maps.flatten(2).mean(2), dim=1).unflatten(0, (-1, repeats))
    cosines = unit @ unit.mT
    return (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)).mean() / (repeats * (repeats - 1))
