"""Channel purity (EPIC, arXiv 2505.12897; ProDG, arXiv 2605.08858): schemas, fake kernels and gradients.

Of image b and row u of `rotation`, z = u·f over the pixels f of the image; its pixel p is the first of the largest z,
where NaN is larger than all. The purity is z / max(|f|, FLOOR) at p, rectified or not.

Choices compare values, so these are laid down to the bit: z and |f|² are sums in float64 of products rounded once, in
eight lanes by channel, joined by halves (`lanes` of the reference). Every backend finds the same pixel. Results are
rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from . import define, same_backend
from .prototype import patch_pixels, result_dtype

FLOOR = 1e-8


def _fake(features, rotation, channels, rectify):
    return features.new_empty(channels.shape, dtype=result_dtype(features)), channels.new_empty(channels.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rectify = inputs[3]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    features, *rest = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    # Under create_graph the formulas, which torch can differentiate again; else one kernel.
    run: Any = (
        purity_gradients
        if torch.is_grad_enabled()
        else same_backend("channel_purity_backward", ctx.backend, features.device.type)
    )
    given = run(grad, features, *rest, ctx.rectify, *wanted)
    return *(g if want else None for g, want in zip(given, wanted, strict=True)), None, None


define(
    "channel_purity",
    "(Tensor features, Tensor rotation, Tensor channels, bool rectify) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def purity_gradients(
    grad: Tensor,
    features: Tensor,
    rotation: Tensor,
    channels: Tensor,
    purity: Tensor,
    index: Tensor,
    rectify: bool,
    to_features: bool,
    to_rotation: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients, or an empty tensor for one that is not wanted; itself differentiable. Touches one pixel a pair.

    dP/df = (u − P f/|f|)/|f| and dP/du = f/|f|; where |f| is below FLOOR, a constant takes its place. Where it is 0,
    and rectified where the purity is 0, there is none. In float64, rounded once.
    """
    batch, count, *sizes = features.shape
    pixels = index.numel() // batch if batch else 0
    index = index.reshape(batch, pixels)
    sample: Any = torch.arange(batch, device=index.device)[:, None]
    # Indexing the axes one by one copies no more than the winners, whatever the strides of the features.
    coordinates = [axis[..., 0] for axis in patch_pixels(index, sizes, [1] * len(sizes))]
    f = features[(sample, slice(None), *coordinates)].double()  # (B, m, C)
    u = rotation.index_select(0, channels.flatten()).double().reshape(batch, pixels, count)
    grad = grad.double().reshape(batch, pixels, 1)
    counts = f.square().sum(2, keepdim=True) != 0
    if rectify:
        counts = counts & ~(purity.reshape(grad.shape) <= 0)
    # What has no gradient becomes a finite 0 at once, so that no NaN of it reaches a second derivative.
    f, u, grad = (torch.where(counts, given, 0) for given in (f, u, grad))
    square = f.square().sum(2, keepdim=True)
    free = ~(square < FLOOR**2)
    inverse = torch.where(free, torch.where(free, square, 1).rsqrt(), 1 / FLOOR)
    grad = grad * inverse
    grad_features, grad_rotation = features.new_empty(0), rotation.new_empty(0)
    add = torch.ops.protofast.prototype_scatter.reference  # in a fixed order
    if to_features:
        pull = torch.where(free, (u * f).sum(2, keepdim=True) * inverse.square(), 0)
        pixel = torch.zeros_like(index)
        for size, coordinate in zip(sizes, coordinates, strict=True):
            pixel = pixel * size + coordinate
        total = add(grad * (u - pull * f), pixel, features[0, 0].numel() if batch and count else 0)
        grad_features = total.reshape(features.shape).to(features.dtype)
    if to_rotation:
        total = add((grad * f).reshape(1, batch * pixels, count), channels.reshape(1, -1), rotation.shape[0])
        grad_rotation = total[0].t().to(rotation.dtype)
    return grad_features, grad_rotation


def _fake_backward(grad, features, rotation, channels, purity, index, rectify, to_features, to_rotation):
    return (
        torch.empty_like(features) if to_features else features.new_empty(0),
        rotation.new_empty(rotation.shape if to_rotation else 0),
    )


define(
    "channel_purity_backward",
    "(Tensor grad, Tensor features, Tensor rotation, Tensor channels, Tensor purity, Tensor index, bool rectify, "
    "bool to_features, bool to_rotation) -> (Tensor, Tensor)",
    _fake_backward,
)
