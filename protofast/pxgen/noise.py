"""Random numbers that belong to a sample, not to the batch it happens to be in."""

from __future__ import annotations

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
        philox = np.random.Philox(key=[self.seed, self.stream])
        state, rng = philox.state, np.random.Generator(philox)
        values = np.empty((len(self), *shape), np.float32)
        for number, row in zip(self.numbers, values, strict=True):
            state["state"]["counter"][:] = 0, self._draws, number, self.iteration
            philox.state = state  # cheaper than a new generator for every sample
            rng.standard_normal(out=row, dtype=np.float32)
        self._draws += 1
        return torch.from_numpy(values)

    def generator(self) -> torch.Generator:
        """A seeded CPU generator for functions that want one; it depends on the first number of the batch."""
        words = [self.seed, self.stream, self.iteration, self.numbers[0] if self.numbers else 0]
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)
