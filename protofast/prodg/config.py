"""Settings of a ProDG training, and presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .rotation import PARAMETRIZATIONS

INITS = ("empty", "data", "random")


def check_whole(settings: Any, least: int, *names: str) -> None:
    """Raises ValueError unless all these are whole numbers, at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if not _whole(value) or value < least:
            raise ValueError(f"{name} is {value!r}; give a whole number, at least {least}")


def check_numbers(settings: Any, *names: str) -> None:
    """Raises ValueError unless all these are finite numbers, at least 0."""
    for name in names:
        value = getattr(settings, name)
        if not _number(value) or value < 0:
            raise ValueError(f"{name} is {value!r}; give a number, at least 0")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ProDGConfig:
    """How the rotation and the prompt bank are learned (arXiv 2605.08858; the release's defaults).

    Attributes
    ----------
    updates : int
        Of rotation and bank together.
    rotation_updates, prompt_updates : int
        A cycle: so many of the one, then so many of the other.
    warmup : int
        Updates of the rotation alone before the first cycle.
    channels : int
        Channels of a batch, drawn without repetition (the release repeats some by chance).
    repeats : int
        Images of each, which the diversity loss compares.
    purity, regularization, diversity : float
        Weights of the losses; 0 leaves one out.
    rotation_lr, rotation_decay : float
        AdamW's, for the rotation.
    prompt_lr : float
        Of the bank, by Adam over the rows of the batch alone: dense moments would move all the others too.
    clip : float
        Largest norm of the bank's gradient.
    rank, logvar : int, float
        Of the bank.
    init : {"empty", "data", "random"}
        Of the bank.
    parametrization : {"matrix_exp", "cayley", "orthogonal"}
        Of the rotation. Purity by one row needs an orthogonal one, so "invertible" is EPIC's alone.
    steps, through : int, int or None
        Steps of the generator, and the last ones of them that gradients flow through (None: all).
    replay : bool
        Updates of the rotation take the features of the last prompt updates in place of new images (the release makes
        new ones, which costs as much as learning prompts).
    """

    updates: int = 10_000
    rotation_updates: int = 5
    prompt_updates: int = 5
    warmup: int = 0
    channels: int = 4
    repeats: int = 2
    purity: float = 1.0
    regularization: float = 0.1
    diversity: float = 0.1
    rotation_lr: float = 1e-3
    rotation_decay: float = 0.01
    prompt_lr: float = 1e-4
    clip: float = 1.0
    rank: int = 128
    logvar: float = -8.0
    init: str = "empty"
    parametrization: str = "matrix_exp"
    steps: int = 4
    through: int | None = None
    replay: bool = True

    def __post_init__(self) -> None:
        check_whole(self, 0, "rotation_updates", "prompt_updates", "warmup")
        check_whole(self, 1, "updates", "channels", "repeats", "rank", "steps")
        check_numbers(
            self, "purity", "regularization", "diversity", "rotation_lr", "rotation_decay", "prompt_lr", "clip"
        )
        if not _number(self.logvar):
            raise ValueError(f"logvar is {self.logvar!r}; give a number")
        if not isinstance(self.replay, bool):
            raise ValueError(f"replay is {self.replay!r}; give True or False")
        if self.rotation_updates + self.prompt_updates == 0:
            raise ValueError("rotation_updates and prompt_updates are 0; give at least one of them")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}; choose one of {', '.join(INITS)}")
        orthogonal = [name for name in PARAMETRIZATIONS if name != "invertible"]
        if self.parametrization not in orthogonal:
            raise ValueError(f"parametrization is {self.parametrization!r}; choose one of {', '.join(orthogonal)}")
        if self.through is not None and not (_whole(self.through) and 1 <= self.through <= self.steps):
            raise ValueError(f"through is {self.through}; give 1 to {self.steps} (steps), or None for all")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProDGConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"{', '.join(sorted(unknown))}: no setting of ProDG")
        return cls(**values)


PRESETS = {
    "paper": ProDGConfig(),
    "cpu": ProDGConfig(updates=2000, channels=32, rank=4, prompt_lr=1e-2, parametrization="cayley"),
}
"""The release's settings, for FLUX on a GPU; and some for a small generator on two cores."""
