"""What a Patronus model is made of, and the settings of the paper's data sets (arXiv 2503.22782, sec. 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PREDICTION_TYPES = ("epsilon", "v_prediction")

SMALL = ((32, 3, 2, 1), (64, 3, 1, 0), (64, 3, 1, 0), (128, 3, 1, 0))
"""The paper's encoder for images of 32 and 64 pixels: (channels, kernel, stride, padding) of each convolution."""

LARGE = ((32, 5, 2, 1), (64, 5, 2, 1), (64, 5, 1, 0), (128, 5, 1, 0), (128, 5, 1, 0))
"""The paper's encoder for X-rays of 224 pixels."""


@dataclass(frozen=True)
class PatronusConfig:
    """Sizes of a Patronus model. Nothing here is learnt, and nothing is about training.

    Parameters
    ----------
    image_shape : (C, H, W)
        Images are resized to H × W.
    encoder : sequence of (channels, kernel, stride, padding)
        The convolutions of the prototype encoder, each followed by ReLU; the last one's channels are the D of the
        prototypes.
    num_prototypes : int
        M.
    eps : float
        Of the log activation.
    width : int
        Channels of the denoiser's first resolution, a multiple of `groups`.
    multipliers : sequence of int
        Channels of each resolution, times `width`; each halves the one before.
    layers : int
        Residual blocks of a resolution.
    groups : int
        Of group normalisation.
    dropout : float
    attention : bool
        Whether the lowest resolution attends to itself.
    patch : int
        Side of the squares of pixels that the denoiser takes as one position. 1 in the paper; 2 quarters the work.
    prediction_type : {"epsilon", "v_prediction"}
        What the denoiser is trained to say: the noise (the paper), or v = √ᾱ·noise − √(1 − ᾱ)·image (Salimans and Ho
        2022), whose loss weighs the noisy timesteps, where the activations matter, far more.
    timesteps : int
        T, with linear betas from 1e-4·1000/T to 0.02·1000/T.

    Raises
    ------
    ValueError
        Naming the setting that does not fit.

    Examples
    --------
    >>> from protofast.patronus import PatronusConfig, PRESETS
    >>> PRESETS["fashion-mnist"].num_prototypes
    30
    >>> PatronusConfig((1, 16, 16), width=8, groups=4, multipliers=(1, 2)).channels
    128
    """

    image_shape: tuple[int, int, int]
    encoder: tuple[tuple[int, int, int, int], ...] = SMALL
    num_prototypes: int = 100
    eps: float = 1e-4
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    layers: int = 2
    groups: int = 8
    dropout: float = 0.1
    attention: bool = True
    patch: int = 1
    prediction_type: str = "epsilon"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        # What comes out of a JSON file is lists.
        for name in ("image_shape", "multipliers"):
            object.__setattr__(self, name, tuple(int(size) for size in getattr(self, name)))
        object.__setattr__(self, "encoder", tuple(tuple(int(size) for size in layer) for layer in self.encoder))
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape is {self.image_shape}; give (channels, height, width)")
        if not self.encoder or any(len(layer) != 4 or min(layer[:3]) < 1 or layer[3] < 0 for layer in self.encoder):
            raise ValueError(f"encoder is {self.encoder}; give (channels, kernel, stride, padding) for each layer")
        for name in ("num_prototypes", "width", "layers", "groups", "patch", "timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {self.multipliers}; give one positive integer a resolution")
        if self.width % self.groups:
            raise ValueError(f"width is {self.width}; give a multiple of groups, {self.groups}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a number from 0 to below 1")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps is {self.eps}; give a number from 0 to below 1")
        if self.prediction_type not in PREDICTION_TYPES:
            names = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type is {self.prediction_type!r}; choose one of {names}")
        multiple = self.patch * 2 ** (len(self.multipliers) - 1)
        if any(side % multiple for side in self.image_shape[1:]):
            raise ValueError(f"image_shape is {self.image_shape}; its sides must be multiples of {multiple}")
        if min(self.grid) < 1:
            raise ValueError(f"image_shape is {self.image_shape}; nothing of it is left after the encoder")

    @property
    def channels(self) -> int:
        """D, the length of a prototype."""
        return self.encoder[-1][0]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and the width."""
        height, width = self.image_shape[1:]
        for _, kernel, stride, padding in self.encoder:
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        return height, width

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatronusConfig:
        """The config of a dict that `to_dict` made.

        Raises
        ------
        ValueError
            For names that are none of a config.
        """
        return cls(**_known(cls, values))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; the defaults are the paper's where it has them.

    Parameters
    ----------
    updates : int
    batch : int
        Images of an update, over all processes and accumulated parts.
    lr : float
        Highest learning rate of AdamW.
    warmup : float
        Share of the updates over which the learning rate rises.
    decay : {"constant", "cosine"}
        What it does then; the paper keeps it.
    weight_decay : float
    ema : float
        Of the exponential average of the weights that is kept for use; the public code has none, 0.
    distinct : float
        Weight of the distinct loss (the paper trains with 0, and tries it in an ablation).
    margin : float
        Of the distinct loss.
    max_norm : float
        Gradients are scaled down to it; 0 for never, as the public code.
    initialize : {"k-center", "random", "uniform"}
        Prototypes at the start: patches of images, farthest from one another or drawn, or U[0, 1) as the public code.
    distance : float
        Features and prototypes that start as patches are scaled together so that this is the median distance of a
        prototype to an image. Where distances are large the log activation is flat and hardly learns: see the notes
        of docs/patronus.md. 0 for no scaling.
    encoder_lr : float
        Learning rate of the encoder and the prototypes, as a share of `lr`.
    """

    updates: int = 46_900
    batch: int = 128
    lr: float = 1e-4
    warmup: float = 0.01
    decay: str = "constant"
    weight_decay: float = 0.01
    ema: float = 0.999
    distinct: float = 0.0
    margin: float = 0.2
    max_norm: float = 1.0
    initialize: str = "k-center"
    distance: float = 0.1
    encoder_lr: float = 1.0

    def __post_init__(self) -> None:
        for name in ("updates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}; give a positive number")
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to below 1")
        for name in ("weight_decay", "distinct", "margin", "max_norm", "distance", "encoder_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.distinct and not self.margin:
            raise ValueError("distinct is given with margin 0, where the loss is 0; give a positive margin")
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay is {self.decay!r}; choose 'constant' or 'cosine'")
        if self.initialize not in ("k-center", "random", "uniform"):
            raise ValueError(f"initialize is {self.initialize!r}; choose 'k-center', 'random' or 'uniform'")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The config of a dict that `to_dict` made; raises ValueError for names that are none of it."""
        return cls(**_known(cls, values))


def _known(kind: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"config has {', '.join(map(repr, unknown))}; it may have {', '.join(sorted(known))}")
    return values


def _paper(shape: Sequence[int], **settings: Any) -> PatronusConfig:
    return PatronusConfig(tuple(shape), **settings)  # type: ignore[arg-type]


PRESETS: dict[str, PatronusConfig] = {
    "mnist": _paper((1, 32, 32), num_prototypes=30),
    "fashion-mnist": _paper((1, 32, 32), num_prototypes=30),
    "cifar10": _paper((3, 32, 32)),
    "celeba": _paper((3, 64, 64)),
    "ffhq": _paper((3, 64, 64)),
    "chexpert": _paper((1, 224, 224), encoder=LARGE),
    "cpu": _paper(
        (1, 32, 32),
        num_prototypes=30,
        width=16,
        groups=4,
        multipliers=(1, 2, 4),
        layers=1,
        dropout=0.0,
        attention=False,
        patch=2,
        prediction_type="v_prediction",
    ),
}
"""The paper's models by data set, and ``cpu``: grey images of 32 pixels in about half an hour on two busy cores."""

TRAINING: dict[str, TrainingConfig] = {
    "mnist": TrainingConfig(updates=46_900),
    "fashion-mnist": TrainingConfig(updates=46_900),
    "cifar10": TrainingConfig(updates=117_300),
    "celeba": TrainingConfig(updates=763_000, batch=64),
    "ffhq": TrainingConfig(updates=281_300, batch=64),
    "chexpert": TrainingConfig(updates=487_500, batch=16),
    "cpu": TrainingConfig(updates=20_000, batch=32, lr=2e-3, warmup=0.05, decay="cosine"),
}
"""Training of each preset: the paper's batches and epochs (100 of MNIST and Fashion-MNIST, else 300)."""
