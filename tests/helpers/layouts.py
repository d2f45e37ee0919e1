"""The same values under many strides."""

from collections.abc import Iterator

import torch
from torch import Tensor


def layouts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Named tensors equal to `values` (..., at least one axis) that lie in memory in different ways."""
    values = values.contiguous()
    shape = values.shape
    yield "contiguous", values.clone()
    buffer = values.new_zeros(values.numel() + 1)
    yield "unaligned", buffer[1:].view(shape).copy_(values)
    yield "transposed", values.mT.contiguous().mT if values.ndim > 1 else values.clone()
    yield "batch last", values.movedim(0, -1).contiguous().movedim(-1, 0)
    if values.ndim == 4:
        yield "channels_last", values.to(memory_format=torch.channels_last)
    step = values.new_zeros(*shape[:-1], 2 * shape[-1])
    yield "every second", step[..., ::2].copy_(values)
    if values.ndim > 1:
        wide = values.new_zeros(shape[0], shape[1] + 3, *shape[2:])
        yield "sliced channels", wide[:, 1 : 1 + shape[1]].copy_(values)
    batch = values.new_zeros(2 * shape[0], *shape[1:])
    yield "every second sample", batch[::2].copy_(values)
    padded = values.new_zeros(*(size + 1 for size in shape))
    yield "padded", padded[tuple(slice(0, size) for size in shape)].copy_(values)


def expanded(values: Tensor) -> Tensor:
    """The first sample of `values` as every sample, by stride 0."""
    return values[:1].expand_as(values)


def far_apart(rows: int, cols: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros (rows, cols) whose rows are 2³¹ elements apart. The memory between is reserved and never touched."""
    stride = 2**31
    storage = torch.empty((rows - 1) * stride + cols, dtype=dtype)
    return storage.as_strided((rows, cols), (stride, 1)).zero_()
