"""Normal numbers by a counter: Philox4x32-10 (Salmon et al. 2011) and Box–Muller (1958), in plain torch.

Element i of sample n is number i % 4 of the block that key `seed` and counter (i // 4, offset + n) give, both 64 bits
wide, where (seed, offset) is the op's `seed`. So it depends on neither layout, nor batch, nor backend. The logarithm,
sine and cosine are polynomials whose every operation is rounded to float32: all backends return the same bits.
"""

import torch
from torch import Tensor

from protofast._ops import implement

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# log(1 + g) = g − g²/2 + g³·P(g) on [√½ − 1, √2 − 1], and sin(φ) = φ + φ³·S(φ²), cos(φ) = 1 − φ²/2 + φ⁴·C(φ²) on
# [−π/4, π/4]: minimax fits, of falling degree, with relative errors of 2⁻²⁷, 2⁻²⁸ and 2⁻³³.
LOG = (
    -0.07634499669075012, 0.1276157796382904, -0.13160182535648346, 0.14201757311820984,
    -0.16623356938362122, 0.20001226663589478, -0.2500081956386566, 0.3333333134651184,
)  # fmt: skip
SIN = -0.0001951729936990887, 0.008332177996635437, -0.16666655242443085
COS = 2.4438451873720624e-05, -0.001388736767694354, 0.04166664555668831
SQRT2, LN2_HIGH, LN2_LOW = 1.41421356, 0.693359375, -2.12194440e-4
EIGHTH = 3.65729529994141e-10
"""π / 2³³: a signed word to an angle within an eighth of a turn."""


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of a block; words are int64 tensors with values below 2³²."""

    def multiply(word: Tensor, by: int) -> tuple[Tensor, Tensor]:  # to the high and the low word of the product
        low, high = (word & 0xFFFF) * by, (word >> 16) * by
        middle = high + (low >> 16)
        return middle >> 16, (middle << 16 | low & 0xFFFF) & _MASK

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = multiply(c0, MULTIPLIERS[0]), multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers of two random words."""
    u = radius.float() * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    exponent, g = (bits >> 23) - 127, ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    large = g > SQRT2
    exponent, g = (exponent + large).float(), torch.where(large, g * 0.5, g) - 1
    square, tail = g * g, torch.full_like(g, LOG[0])
    for coefficient in LOG[1:]:
        tail = tail * g + coefficient
    tail = (tail * g) * square + exponent * LN2_LOW - square * 0.5
    # torch.sqrt of float32 may be off by one bit (MKL); by way of float64 it is not.
    r = ((g + tail + exponent * LN2_HIGH) * -2.0).double().sqrt().float()

    quadrant = angle >> 30
    turn = ((angle << 2 & _MASK) ^ 0x80000000) - 0x80000000  # the 30 bits below the quadrant, signed
    phi = turn.float() * EIGHTH
    y = phi * phi
    sine = ((SIN[0] * y + SIN[1]) * y + SIN[2]) * y * phi + phi
    cosine = ((COS[0] * y + COS[1]) * y + COS[2]) * y * y - y * 0.5 + 1.0
    swap, first, second = (quadrant & 1).bool(), (quadrant + 1 & 2).bool(), quadrant > 1
    cos, sin = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return r * torch.where(first, -cos, cos), r * torch.where(second, -sin, sin)


def philox_normal(like: Tensor, seed: Tensor) -> Tensor:
    """Standard normal numbers of the shape, dtype and layout of `like`; float32 values, whatever the dtype."""
    batch, inner = like.shape[0], like[:1].numel()
    block = torch.arange(-(-inner // 4), device=like.device)
    key, offset = seed[0], seed[1] + torch.arange(batch, device=like.device)[:, None]
    counter = (block & _MASK, block >> 32, offset & _MASK, offset >> 32 & _MASK)
    w0, w1, w2, w3 = philox(tuple(torch.broadcast_tensors(*counter)), (key & _MASK, key >> 32 & _MASK))
    normal = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], -1).flatten(1)[:, :inner]
    return torch.empty_like(like).copy_(normal.reshape(like.shape))


implement("philox_normal", "reference", ["default"], philox_normal)
