"""Channel purity in plain torch, in blocks of samples; the values of `_ops.channels`, to the bit."""

import math

from torch import Tensor

from protofast._ops import implement
from protofast._ops.channels import FLOOR, purity_gradients
from protofast._ops.prototype import as_features, result_dtype

from .space import TILE, TILE_ELSEWHERE, lanes, root


def channel_purity(features: Tensor, rotation: Tensor, channels: Tensor, rectify: bool) -> tuple[Tensor, Tensor]:
    batch, count = features.shape[:2]
    _check(channels, rotation)
    purity = features.new_empty(channels.shape, dtype=result_dtype(features))
    index = channels.new_empty(channels.shape)
    pairs, pixels = channels.numel() // batch if batch else 0, math.prod(features.shape[2:])
    if purity.numel() == 0:
        return purity, index
    chosen, found, at = channels.reshape(batch, pairs), purity.view(batch, pairs), index.view(batch, pairs)
    some = max(1, TILE.get(features.device.type, TILE_ELSEWHERE) // max(1, pixels * count))
    for b in range(0, batch, max(1, some // pairs)):
        samples = slice(b, b + max(1, some // pairs))
        x = features[samples].flatten(2).transpose(1, 2)[:, None].double()  # (b, 1, n, C)
        for j in range(0, pairs, some):
            part = samples, slice(j, j + some)
            rows = chosen[part]
            u = rotation.index_select(0, rows.flatten()).double().reshape(*rows.shape, 1, count)
            z = lanes(x * u)
            best = z.argmax(2, keepdim=True)  # the first NaN, or the first of the largest
            f = x.expand(-1, rows.shape[1], -1, -1).gather(2, best[..., None].expand(-1, -1, -1, count))
            z = z.gather(2, best)
            value = (z.clamp(min=0) if rectify else z) / root(lanes(f * f)).clamp(min=FLOOR)
            found[part], at[part] = value[..., 0].to(purity.dtype), best[..., 0]
    return purity, index


def _check(channels: Tensor, rotation: Tensor) -> None:
    """On a CPU; elsewhere torch's indexing checks by itself, without waiting for the device."""
    if channels.is_cpu and channels.numel():
        low, high = (int(end) for end in channels.aminmax())
        if low < 0 or high >= rotation.shape[0]:
            bad = low if low < 0 else high
            raise IndexError(
                f"channels has {bad}; rotation has {rotation.shape[0]} rows, so give 0 to {rotation.shape[0] - 1}"
            )


def channel_purity_backward(grad: Tensor, features: Tensor, *rest) -> tuple[Tensor, Tensor]:
    to_features, to_rotation = purity_gradients(grad, features, *rest)
    if to_features.shape == features.shape:
        to_features = as_features(to_features, features)
    return to_features, to_rotation.contiguous()


implement("channel_purity", "reference", ["default"], channel_purity)
implement("channel_purity_backward", "reference", ["default"], channel_purity_backward)
