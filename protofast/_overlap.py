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
            alike = first == other_first and t.stride() == o.stride() and t.element_size() == o.element_size()
            if first < other_end and other_first < end and not alike:
                return True
    return False


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape share no element. Where their strides differ: whether their spans are apart."""
    (first, end), (other_first, other_end) = span(a), span(b)
    if first >= other_end or other_first >= end:
        return True
    distance, rest = divmod(abs(first - other_first), a.element_size())
    if a.stride() != b.stride() or rest:
        return False
    axes = sorted(((stride, size) for stride, size in zip(a.stride(), a.shape, strict=True) if size > 1), reverse=True)

    def meets(distance: int, axes: Sequence[tuple[int, int]]) -> bool:
        """Whether a difference of two places is `distance`; each stride is beyond all that the smaller ones reach."""
        if not axes:
            return distance == 0
        (stride, size), *smaller = axes
        steps = {distance // stride, -(-distance // stride)}
        return any(abs(step) < size and meets(distance - step * stride, smaller) for step in steps)

    return not meets(distance, axes)


def folded(tensor: Tensor) -> bool:
    """Whether places of one tensor may share memory: some stride is not beyond all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
