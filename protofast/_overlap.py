"""Which tensors share memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def span(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one after its last."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def tangled(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether writing an output might change an input before it is read. Elements in the same places are safe."""
    spans = [(t, *span(t)) for t in inputs]
    for o in outputs:
        first, end = span(o)
        for t, other_first, other_end in spans:
            if first < other_end and other_first < end and (first != other_first or t.stride() != o.stride()):
                return True
    return False
