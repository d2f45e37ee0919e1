"""Channels of a feature map after a rotation, without the rotated map: purity, pooling, heat maps, streaming top-k.

EPIC (arXiv 2505.12897), ProDG (arXiv 2605.08858) and InfoDisent (arXiv 2409.10329) turn the channels of a frozen
classifier by a matrix U, z = U f at every pixel f. Nothing here makes z of more rows than are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import differentiates, overload
from ._ops.channels import FLOOR
from .prototype import channel_hint, integer, prototype_distance

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POOLS = ("max", "mean", "signed_max")


class ChannelPurity(NamedTuple):
    """Purities and the flat pixel index of each (int64), both of one shape."""

    purity: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class RotatedPool(NamedTuple):
    """Pooled channels (B, R), and the flat pixels they come from: (B, R), (B, R, 2) for ``signed_max``, else None."""

    value: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index


def channel_purity(
    features: Tensor, rotation: Tensor, channels: Tensor, *, rectify: bool = True, backend: str | None = None
) -> ChannelPurity:
    """How much a channel stands alone where it is strongest: the cosine of the pixel there to the channel's axis.

    Of image b and channel c the row u of `rotation` gives z = u·f at each pixel f, and purity = max(z, 0) / ‖f‖ at the
    pixel of the largest z. For an orthogonal matrix ‖f‖ = ‖U f‖, so this is the purity of the rotated map exactly, by
    one row rather than all; for any other matrix it is not.

    Parameters
    ----------
    features : Tensor of shape (B, C, *S)
        Feature maps over one or more spatial axes; float16, bfloat16, float32 or float64, any strides.
    rotation : Tensor of shape (R, C)
        Rows of an orthogonal matrix, all or some. Where its dtype is not the features', both are promoted.
    channels : int64 Tensor of shape (B,) or (B, m)
        For each image the row, or rows, of `rotation`.
    rectify : bool, default True
        As ProDG has it. False divides z as it is: EPIC's purity, which may be negative.
    backend : str, optional

    Returns
    -------
    ChannelPurity
        ``purity`` is float32 (float64 for float64 input), of the channels' shape, and differentiable (twice too) in
        features and rotation, at the winning pixel alone. Where no z is above 0 it is 0, with gradient 0. ``index`` is
        flat over the pixels, row-major, and the same on every backend: z is compared in float64, ties go to the lowest
        index, a NaN wins. A length below 1e-8 counts as 1e-8; a pixel of length 0 has purity 0 and gradient 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.
    IndexError, RuntimeError
        On a CPU, where `channels` names a row that is not there. On a GPU, where asking would wait for it, the
        reference stops the device and Triton gives NaN.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.tensor([[[1.0, 3.0], [5.0, 4.0]]])  # one image, two channels, two pixels
    >>> pf.channel_purity(features, torch.eye(2), torch.tensor([0]))
    ChannelPurity(purity=tensor([0.6000]), index=tensor([1]))
    """
    features, rotation = _checked(features, rotation)
    _check_channels(channels, features)
    if channels.ndim not in (1, 2):
        raise ValueError(f"channels has shape {tuple(channels.shape)}; give (B,) or (B, m)")
    if not isinstance(rectify, bool):
        raise TypeError(f"rectify is {rectify!r}; give True or False")
    run = overload("channel_purity", features.device.type, backend, grad=differentiates(features, rotation))
    return ChannelPurity(*run(features, rotation, channels, rectify))


def rotate_and_pool(
    features: Tensor, rotation: Tensor, *, pool: str = "max", backend: str | None = None
) -> RotatedPool:
    """Pools each rotated channel over space; the rotated map is never stored.

    Parameters
    ----------
    features : Tensor of shape (B, C, *S)
    rotation : Tensor of shape (R, C)
        Any matrix, or some rows of one.
    pool : {"max", "mean", "signed_max"}
        max z and its pixel; the mean of z, by rotating the mean (EPIC's score but for the factor prod(S)); or
        max relu(z) − max relu(−z) with the pixels of both: one speaks for, one against (our reading of InfoDisent).
    backend : str, optional

    Returns
    -------
    RotatedPool
        ``value`` (B, R) in float32 (float64 for float64 input), differentiable in both tensors. Ties go to the lowest
        index. Where no z is above 0, ``signed_max`` counts nothing for that side, and its index is that of the
        largest z all the same.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.tensor([[[1.0, -3.0], [5.0, 4.0]]])
    >>> pf.rotate_and_pool(features, torch.eye(2), pool="signed_max")
    RotatedPool(value=tensor([[-2.,  5.]]), index=tensor([[[0, 1],
             [0, 1]]]))
    """
    features, rotation = _checked(features, rotation)
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(map(repr, POOLS))}")
    if pool == "mean":
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return RotatedPool(features.flatten(2).mean(2, dtype=wide) @ rotation.to(wide).t(), None)
    most, where = _largest(features, rotation, backend)
    if pool == "max":
        return RotatedPool(most, where)
    least, other = _largest(features, -rotation, backend)
    return RotatedPool(most.relu() - least.relu(), torch.stack([where, other], 2))


def purity_of_all(features: Tensor, rotation: Tensor, *, backend: str | None = None) -> ChannelPurity:
    """Purity of every row in every image, by one norm of each pixel: for choosing channels, and for discovery.

    Parameters
    ----------
    features : Tensor of shape (B, C, *S)
    rotation : Tensor of shape (R, C)
        Rows of an orthogonal matrix.
    backend : str, optional

    Returns
    -------
    ChannelPurity
        Each (B, R), as of `channel_purity`; pixels whose z agree to a rounding of float64 may change places.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.tensor([[[1.0, 3.0], [5.0, 4.0]]])
    >>> pf.purity_of_all(features, torch.eye(2)).purity
    tensor([[0.6000, 0.9806]])
    """
    features, rotation = _checked(features, rotation)
    most, where = _largest(features, rotation, backend, verify=True)
    length = _lengths(features.to(most.dtype).flatten(2)).gather(1, where)
    return ChannelPurity(most.relu() / length.clamp(min=FLOOR), where)


def channel_heat_map(
    features: Tensor,
    rotation: Tensor,
    channels: Tensor,
    *,
    size: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Where an image shows a channel: local purity times strength relative to the strongest pixel (ProDG).

    relu(z) / (‖f‖ + 1e-8) · relu(z) / (max relu(z) + 1e-8), of the rows asked for alone.

    Parameters
    ----------
    features : Tensor of shape (B, C, h, w)
    rotation : Tensor of shape (R, C)
        Rows of an orthogonal matrix.
    channels : int64 Tensor of shape (B, m)
        For each image the rows of `rotation`.
    size : (H, W), optional
        Bilinear to that size, such as the image's.
    backend : str, optional
        All of them run the same products of torch.

    Returns
    -------
    Tensor of shape (B, m, h, w) or (B, m, H, W)
        In [0, 1], but for rounding; float32 (float64 for float64 input), differentiable in features and rotation.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> features = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])
    >>> pf.channel_heat_map(features, torch.eye(2), torch.tensor([[0]]))
    tensor([[[[0.3333, 0.6000]]]])
    """
    features, rotation = _checked(features, rotation)
    if features.ndim != 4:
        raise ValueError(f"features has shape {tuple(features.shape)}; give (B, C, h, w)")
    _check_channels(channels, features)
    if channels.ndim != 2:
        raise ValueError(f"channels has shape {tuple(channels.shape)}; give (B, m), the rows for each image")
    if size is not None and (not isinstance(size, tuple | list) or len(size) != 2 or any(_no_side(n) for n in size)):
        raise ValueError(f"size is {size!r}; give (H, W), both at least 1")
    if backend is not None:
        overload("channel_purity", features.device.type, backend)  # says so where there is none
    wide = torch.promote_types(features.dtype, torch.float32)
    features = features.to(wide)
    rows = rotation.index_select(0, channels.flatten()).to(wide)  # which refuses -1, as indexing would not
    with torch.autocast(features.device.type, enabled=False):
        z = torch.bmm(rows.reshape(*channels.shape, rotation.shape[1]), features.flatten(2))
    maps = z.relu().reshape(*channels.shape, *features.shape[2:])
    maps = maps / (_lengths(features)[:, None] + FLOOR) * (maps / (maps.amax((2, 3), keepdim=True) + FLOOR))
    if size is None:
        return maps
    if not maps.numel():
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class ColumnTopK:
    """The k largest numbers of each column of a long table that comes in batches of rows, and whose rows they are.

    What is kept equals a full top-k of the whole table, in any order of the batches: larger first, ties to the lowest
    id. A batch costs one comparison where nothing of it gets in.

    Parameters
    ----------
    k : int
        At least 1.

    Attributes
    ----------
    values : Tensor of shape (min(k, rows so far), C)
    indices : int64 Tensor of the same shape

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> top = pf.ColumnTopK(2)
    >>> top.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), 0)
    >>> top.update(torch.tensor([[2.0, 9.0]]), 2)
    >>> top.values, top.indices
    (tensor([[3., 9.],
            [2., 5.]]), tensor([[1, 2],
            [2, 0]]))
    """

    def __init__(self, k: int) -> None:
        self.k = integer("k", k)
        if self.k < 1:
            raise ValueError(f"k is {k}; give 1 or more")
        self._values: Tensor | None = None
        self._indices: Tensor | None = None

    @property
    def values(self) -> Tensor:
        return self._kept()[0]

    @property
    def indices(self) -> Tensor:
        return self._kept()[1]

    def _kept(self) -> tuple[Tensor, Tensor]:
        if self._values is None or self._indices is None:
            raise RuntimeError("nothing has been kept yet; call update first")
        return self._values, self._indices

    @torch.no_grad()
    def update(self, values: Tensor, ids: Tensor | int) -> None:
        """Takes rows `values` (B, C) of the table; `ids` are theirs, (B,) int64, or the first of consecutive ones."""
        values, ids = self._batch(values, ids)
        if self._values is None or self._indices is None:
            self._values, self._indices = values[:0], ids[:0].expand(0, values.shape[1])
        kept, at = self._values, self._indices
        if len(kept) == self.k and len(values):
            last = kept[-1]
            enters = (values > last) | ((values == last) & (ids < at[-1]))
            most = int(enters.sum(0).max()) if enters.numel() else 0
            if most == 0:
                return
            if 2 * most < len(values) and not last.isneginf().any():
                # As many of each column as enter the fullest: all that enter are among them.
                chosen = torch.where(enters, values, -math.inf).topk(most, dim=0).indices
                values, ids = values.gather(0, chosen), ids.expand_as(enters).gather(0, chosen)
        values, ids = torch.cat([kept, values]), torch.cat([at, ids.expand_as(values)])
        ids, order = ids.sort(dim=0)
        values, order = values.gather(0, order).sort(dim=0, descending=True, stable=True)
        self._values, self._indices = values[: self.k].clone(), ids.gather(0, order)[: self.k].clone()

    def _batch(self, values: Tensor, ids: Tensor | int) -> tuple[Tensor, Tensor]:
        if not isinstance(values, Tensor):
            raise TypeError(f"values is a {type(values).__name__}; give a torch tensor (B, C)")
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"values is {values.dtype} of shape {tuple(values.shape)}; give floating point (B, C)")
        if values.isnan().any():
            raise ValueError("values has NaN, which is neither large nor small; mend what made them")
        if (kept := self._values) is not None and (
            kept.shape[1] != values.shape[1] or kept.dtype != values.dtype or kept.device != values.device
        ):
            raise ValueError(
                f"values is {values.dtype} with {values.shape[1]} columns on {values.device}; earlier ones were "
                f"{kept.dtype} with {kept.shape[1]} on {kept.device}"
            )
        if isinstance(ids, Tensor) and ids.ndim:
            if ids.dtype != torch.int64 or ids.shape != values.shape[:1]:
                raise ValueError(
                    f"ids is {ids.dtype} of shape {tuple(ids.shape)}; give int64 ({len(values)},), or the first id"
                )
            return values, ids.to(values.device)[:, None]
        first = integer("ids", ids)
        return values, torch.arange(first, first + len(values), device=values.device)[:, None]

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, for `load_state_dict`."""
        return {"k": self.k, "values": self._values, "indices": self._indices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of the same k."""
        if state["k"] != self.k:
            raise ValueError(f"state has k {state['k']}; this keeps {self.k}")
        self._values, self._indices = (
            None if state[key] is None else state[key].clone() for key in ("values", "indices")
        )


def _largest(features: Tensor, rows: Tensor, backend: str | None, *, verify: bool = False) -> tuple[Tensor, Tensor]:
    """max over the pixels of rows·f, and where."""
    distance, index = prototype_distance(features, rows, metric="dot", verify=verify, backend=backend)
    return -distance, index


def _no_side(number: Any) -> bool:
    return isinstance(number, float) or number < 1


def _lengths(features: Tensor) -> Tensor:
    """Of every pixel; one of 0 has gradient 0. torch's own norm along channels takes several times as long."""
    square = features.square().sum(1)
    if not square.requires_grad:
        return square.sqrt()
    there = square != 0
    return torch.where(there, torch.where(there, square, 1).sqrt(), 0)


def _checked(features: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in one dtype, once they are known to fit."""
    for name, tensor in (("features", features), ("rotation", rotation)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; give float16, bfloat16, float32 or float64")
    shape, rows = tuple(features.shape), tuple(rotation.shape)
    if features.ndim < 3:
        raise ValueError(f"features has shape {shape}; give (B, C, *S) with at least one spatial axis")
    if 0 in shape[2:]:
        raise ValueError(f"features has shape {shape}, with no pixel")
    if rotation.ndim != 2:
        raise ValueError(f"rotation has shape {rows}; give rows (R, C) of a matrix")
    if rows[1] != shape[1]:
        raise ValueError(
            f"rotation has rows of {rows[1]} channels (shape {rows}); features has {shape[1]} (shape {shape})"
            + channel_hint(shape, rows[1:])
        )
    if features.device != rotation.device:
        raise ValueError(f"rotation is on {rotation.device}; move it to the features' {features.device}")
    if features.dtype != rotation.dtype:
        dtype = torch.promote_types(features.dtype, rotation.dtype)
        features, rotation = features.to(dtype), rotation.to(dtype)
    return features, rotation


def _check_channels(channels: Tensor, features: Tensor) -> None:
    if not isinstance(channels, Tensor):
        raise TypeError(f"channels is a {type(channels).__name__}; give an int64 tensor")
    if channels.dtype != torch.int64:
        raise TypeError(f"channels is {channels.dtype}; give torch.int64")
    if channels.ndim < 1 or channels.shape[0] != features.shape[0]:
        raise ValueError(
            f"channels has shape {tuple(channels.shape)}; its first axis must be the {features.shape[0]} images"
        )
    if channels.device != features.device:
        raise ValueError(f"channels is on {channels.device}; move it to the features' {features.device}")
