"""Random numbers that belong to a sample, not to the batch it happens to be in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ANCHORS, GENERATION, REPEAT = range(3)
"""Streams: analysis of anchors, generation, and analysis of what was generated."""


class Noise:
    """Normal noise of numbered samples: sample `i` gets the same values in any batch, order or run.

    Philox is counter-based: seed and stream are its key; iteration, sample number and draw its counter.

    Parameters
    ----------
    numbers : sequence of int
        The sample numbers of this batch.
    seed : int
    stream, iteration : int

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import Noise
    >>> torch.equal(Noise([3, 4]).normal(2)[1], Noise([4]).normal(2)[0])
    True
    """

    def __init__(
        self,
        numbers: Sequence[int] | np.ndarray,
        seed: int = 0,
        *,
        stream: int = ANCHORS,
        iteration: int = 0,
    ) -> None:
        self.numbers = [int(number) for number in numbers]
        self.seed, self.stream, self.iteration = seed, stream, iteration
        self._draws = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 tensor (len(self), *shape) on the CPU; each call is a new draw."""
        size = math.prod(shape)
        steps = -(-size // 8)  # of the counter, a sample: one gives four 64-bit words, a word two normal values
        words = np.empty((len(self), steps * 4), np.uint64)
        runs = np.flatnonzero(np.diff(self.numbers, prepend=-2) != 1).tolist()  # where a run of numbers begins
        for begin, end in itertools.pairwise([*runs, len(self)]):
            philox = np.random.Philox(key=[self.seed, self.stream], counter=[0, self._draws, 0, self.iteration])
            philox.advance(self.numbers[begin] * steps)
            words[begin:end] = philox.random_raw((end - begin) * steps * 4).reshape(end - begin, -1)
        self._draws += 1
        # Box and Muller (1958): the upper half of a word is a radius, the lower an angle.
        radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)).astype(np.float64) + 1) * 2.0**-32))
        angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * math.pi * 2.0**-32)
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :size]
        return torch.from_numpy(values.astype(np.float32).reshape(len(self), *shape))

    def generator(self) -> torch.Generator:
        """A seeded CPU generator for functions that want one; it depends on the first number of the batch."""
        words = [self.seed, self.stream, self.iteration, self.numbers[0] if self.numbers else 0]
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)
