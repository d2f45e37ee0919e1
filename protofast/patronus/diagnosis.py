"""Whether a model ties two attributes together that its data had together: bias, planted and found (paper, sec. 5).

The question has two sides, and each is answered against a control level, as prototypes of unrelated attributes may well
be correlated, and any change of an image may move a classifier:

- Are the prototypes of two attributes correlated because the attributes are? Compared with the same images weighted so
  that the attributes are independent (`associate`).
- Does the model draw one attribute when told of the other's prototype? Compared with turning up prototypes that stand
  for neither (`intervene`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion import normal_noise
from . import generate
from .evaluation import attributes_of, auroc
from .model import Patronus, check_images

PLANTS = ("corner", "colour")
LEAST = 0.05
"""Smallest effect that is called one: of a correlation, an AUROC, or a probability."""
FEWEST = 10
"""Images of each of the four combinations of two attributes without which nothing is said."""

Detector = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) in [−1, 1] → probability or strength of an attribute in each, (n,) from 0 to 1."""


class Planted(NamedTuple):
    """Images (n, C, H, W) with a mark in some of them, and in which: bool (n,)."""

    images: Tensor
    marked: Tensor


def plant(
    images: Tensor,
    labels: Tensor,
    *,
    attribute: str = "corner",
    target: int | Sequence[int],
    rate: float,
    generator: torch.Generator | None = None,
) -> Planted:
    """Plants an attribute that goes along with a class: in `rate` of its images, and in 1 − `rate` of all others.

    At 0.5 both have it equally often, which is the control. The numbers of images are exact to rounding; which they
    are is drawn.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        In [−1, 1]; not written to.
    labels : int Tensor of shape (n,)
    attribute : {"corner", "colour"}
        A white square in the upper left corner, an eighth of the height, one pixel off the border; or, in images of 3
        channels, a red tint: 0.4 of the green and blue.
    target : int or sequence of int
        The class, or classes.
    rate : float
        From 0 to 1.
    generator : torch.Generator, optional
        On the CPU.

    Returns
    -------
    Planted

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.diagnosis import plant
    >>> labels = torch.arange(100) % 10
    >>> planted = plant(torch.full((100, 1, 16, 16), -1.0), labels, target=3, rate=0.9)
    >>> planted.marked[labels == 3].sum().item(), planted.marked[labels != 3].sum().item()
    (9, 9)
    """
    _check_plant(images, attribute)
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}; give {len(images)} integers")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; give a number from 0 to 1")
    targets = [target] if isinstance(target, int) else list(target)
    inside = torch.isin(labels.cpu(), torch.tensor(targets))
    if not inside.any() or inside.all():
        raise ValueError(f"target is {target}; {'no' if not inside.any() else 'every'} image is of it")
    marked = torch.zeros(len(images), dtype=torch.bool)
    for group, share in ((inside, rate), (~inside, 1 - rate)):
        rows = group.nonzero()[:, 0]
        drawn = rows[torch.randperm(len(rows), generator=generator)]
        marked[drawn[: round(share * len(rows))]] = True
    found = images.clone()
    where = marked.to(images.device)
    if attribute == "corner":
        sides = _corner(images)
        part = found[where]
        part[(..., *sides)] = 1.0
        found[where] = part
    else:
        found[where] = (found[where] + 1) * found.new_tensor([1.0, 0.4, 0.4]).view(3, 1, 1) - 1
    return Planted(found, marked)


def detect(images: Tensor, attribute: str = "corner") -> Tensor:
    """How much of a planted attribute images have, (n,) from 0 to 1; it is there above 0.5.

    Of the corner mark the mean brightness of its pixels beyond that of a frame of one pixel around them; of the colour
    how far red stands out, (R − (G + B)/2) over the brightness, where the tint of a grey image is 1.

    Raises
    ------
    ValueError, TypeError

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.diagnosis import detect, plant
    >>> images = torch.full((2, 1, 16, 16), -1.0)
    >>> detect(plant(images, torch.tensor([0, 1]), target=1, rate=1.0).images).tolist()
    [0.0, 1.0]
    """
    _check_plant(images, attribute)
    light = (images.float() + 1) / 2
    if attribute == "corner":
        rows, columns = _corner(images)
        inside = light[..., rows, columns].flatten(1)
        around = light[..., : rows.stop + 1, : columns.stop + 1].flatten(1)
        frame = (around.sum(1) - inside.sum(1)) / (around.shape[1] - inside.shape[1])
        return (inside.mean(1) - frame).clamp(0, 1)
    red, green, blue = light.flatten(2).mean(2).T
    return ((red - (green + blue) / 2) / ((red + green + blue) / 3).clamp_min(1e-6)).clamp(0, 1)


def _corner(images: Tensor) -> tuple[slice, slice]:
    side = max(2, round(images.shape[-2] / 8))
    return slice(1, 1 + side), slice(1, 1 + side)


def _check_plant(images: Tensor, attribute: str) -> None:
    if attribute not in PLANTS:
        raise ValueError(f"attribute is {attribute!r}; choose one of {', '.join(map(repr, PLANTS))}")
    if images.ndim != 4 or not images.is_floating_point():
        raise TypeError(f"images is {images.dtype} of shape {tuple(images.shape)}; give floating point (n, C, H, W)")
    if attribute == "colour" and images.shape[1] != 3:
        raise ValueError(f"images has {images.shape[1]} channels; colour is planted in 3, choose 'corner'")


class Excess(NamedTuple):
    """A statistic of the images as they are, with the attributes balanced, and the difference with its interval."""

    value: float
    balanced: float
    low: float
    high: float

    @property
    def excess(self) -> float:
        return self.value - self.balanced

    @property
    def flagged(self) -> bool:
        return (self.low > 0 or self.high < 0) and abs(self.excess) >= LEAST


class Association(NamedTuple):
    """What the prototypes say of two attributes.

    Attributes
    ----------
    prototypes : (int, int)
        For each attribute the prototype with the highest AUROC, of either sign.
    signs : (int, int)
        −1 where the activation is lower if the attribute is there. Below, such a prototype counts negated.
    auroc : float64 Tensor of shape (2, M)
        Of each prototype for each attribute, unfolded: below 0.5 for a lower activation.
    balanced_auroc : float64 Tensor of shape (2, M)
        The same with the attributes balanced.
    spearman : Excess
        Rank correlation of the two prototypes' activations.
    crossed : (Excess, Excess)
        AUROC of the first attribute's prototype for the second attribute, and the reverse.
    flagged : bool
        Whether any of the three differs from its control level.
    """

    prototypes: tuple[int, int]
    signs: tuple[int, int]
    auroc: Tensor
    balanced_auroc: Tensor
    spearman: Excess
    crossed: tuple[Excess, Excess]

    @property
    def flagged(self) -> bool:
        return any(found.flagged for found in (self.spearman, *self.crossed))


def associate(
    activations: Tensor, attributes: Tensor, *, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> Association:
    """Whether the prototypes of two attributes are correlated beyond what they are with the attributes independent.

    The prototype of attribute k is argmax_j max(AUROC_kj, 1 − AUROC_kj), as in the paper. Three statistics of the two
    are formed: Spearman's correlation of their activations, and the AUROC of each for the other's attribute. Prototypes
    of unrelated attributes may well have a correlation, so each is compared with a control level, the same statistic
    with image i weighted by P(a_i) P(b_i) / P(a_i, b_i), under which attributes a and b are independent. The difference
    is flagged if it is `LEAST` or more and its bootstrap interval (percentiles, images resampled, weights formed anew)
    does not hold 0. The interval is that of `level` for all three together (Bonferroni).

    Parameters
    ----------
    activations : Tensor of shape (n, M)
    attributes : Tensor of shape (n, 2)
        bool, or 0 and 1; 10 images or more of each of the four combinations.
    level : float
    replicates : int
        Of the bootstrap.
    seed : int

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.diagnosis import associate
    >>> generator = torch.Generator().manual_seed(0)
    >>> first = torch.rand(1000, generator=generator) > 0.5
    >>> other = torch.rand(1000, generator=generator) > 0.5
    >>> same = first.where(torch.rand(1000, generator=generator) < 0.6, other)
    >>> noise = torch.rand(1000, 2, generator=generator)
    >>> [associate(noise + torch.stack([first, x], 1), torch.stack([first, x], 1)).flagged for x in (other, same)]
    [False, True]
    """
    pair = attributes_of(attributes, "attributes")
    if pair.shape[1] != 2 or len(pair) != len(activations):
        raise ValueError(f"attributes has shape {pair.shape} for {len(activations)} images; give (n, 2)")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a number between 0 and 1")
    if replicates < 100:
        raise ValueError(f"replicates is {replicates}; give at least 100")
    cells = pair @ np.array([2, 1])
    counts = np.bincount(cells, minlength=4)
    if counts.min() < FEWEST:
        listed = "neither {}, second alone {}, first alone {}, both {}".format(*counts)
        raise ValueError(f"attributes has too few images of a combination ({listed}); give {FEWEST} or more of each")
    values = activations.detach().cpu().double().numpy()
    found = auroc(values, pair)
    best = np.abs(found - 0.5).argmax(1)
    signs = np.sign(found[[0, 1], best] - 0.5).astype(int)
    signs[signs == 0] = 1
    once = _balancing(np.ones((1, len(cells))), cells)
    balanced = np.array([[_Ranked(column).auroc(once, pair[:, k])[0] for column in values.T] for k in (0, 1)])
    scores = [_Ranked(sign * values[:, j]) for sign, j in zip(signs, best, strict=True)]

    def statistics(weights: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                _correlation(scores[0].ranks(weights), scores[1].ranks(weights), weights),
                scores[0].auroc(weights, pair[:, 1]),
                scores[1].auroc(weights, pair[:, 0]),
            ],
            1,
        )

    plain, control = statistics(np.ones((1, len(cells))))[0], statistics(once)[0]
    generator, parts = np.random.default_rng(seed), []
    for first in range(0, replicates, 50):  # 50 at a time: (50, n) numbers
        size = min(50, replicates - first)
        weights = _resampled(generator, size, len(cells))
        parts.append(statistics(weights) - statistics(_balancing(weights, cells)))
    tail = (1 - level) / 3 / 2
    low, high = np.nanquantile(np.concatenate(parts), [tail, 1 - tail], axis=0)
    excesses = [Excess(*map(float, numbers)) for numbers in zip(plain, control, low, high, strict=True)]
    return Association(
        (int(best[0]), int(best[1])),
        (int(signs[0]), int(signs[1])),
        torch.from_numpy(found),
        torch.from_numpy(balanced),
        excesses[0],
        (excesses[1], excesses[2]),
    )


def balanced_rows(attributes: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """As many rows as there are, drawn with repetition so that two attributes are independent, as often as before.

    What is trained on data that ties attributes together ties them together, a classifier too; on these rows not.

    Parameters
    ----------
    attributes : bool Tensor of shape (n, 2)
    generator : torch.Generator, optional
        On the CPU.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.diagnosis import balanced_rows
    >>> attributes = torch.tensor([[True, True]] * 450 + [[True, False], [False, True]] * 50 + [[False, False]] * 450)
    >>> drawn = attributes[balanced_rows(attributes, generator=torch.Generator().manual_seed(0))]
    >>> bool((drawn.double().T.corrcoef()[0, 1]).abs() < 0.1)
    True
    """
    pair = attributes_of(attributes, "attributes")
    if pair.ndim != 2 or pair.shape[1] != 2:
        raise ValueError(f"attributes has shape {pair.shape}; give (n, 2)")
    weights = _balancing(np.ones((1, len(pair))), pair @ np.array([2, 1]))[0]
    return torch.multinomial(torch.from_numpy(weights), len(pair), replacement=True, generator=generator)


class _Ranked:
    """Values (n,) in order, for statistics under many weightings (R, n) of them at once."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        fresh = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.starts = fresh.nonzero()[0]
        self.places = np.empty(len(values), np.intp)  # of each value among the distinct ones
        self.places[self.order] = fresh.cumsum() - 1

    def _sums(self, weights: np.ndarray) -> np.ndarray:
        return np.add.reduceat(weights[:, self.order], self.starts, axis=1)

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Mean weighted ranks, up to a constant."""
        sums = self._sums(weights)
        return (sums.cumsum(1) - sums / 2)[:, self.places]

    def auroc(self, weights: np.ndarray, attribute: np.ndarray) -> np.ndarray:
        above, below = self._sums(weights * attribute), self._sums(weights * ~attribute)
        with np.errstate(invalid="ignore"):
            wins = (above * (below.cumsum(1) - below / 2)).sum(1)
            return wins / (above.sum(1) * below.sum(1))


def _correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(1, keepdims=True)
    first = first - (first * weights).sum(1, keepdims=True) / total
    second = second - (second * weights).sum(1, keepdims=True) / total
    both, one, other = ((weights * x * y).sum(1) for x, y in ((first, second), (first, first), (second, second)))
    with np.errstate(invalid="ignore"):
        return both / np.sqrt(one * other)


def _balancing(weights: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Weights (R, n) times P(a) P(b) / P(a, b) of each image's cell, 2a + b."""
    counts = np.stack([weights @ (cells == cell) for cell in range(4)], 1).reshape(-1, 2, 2)
    expected = counts.sum(2, keepdims=True) * counts.sum(1, keepdims=True) / counts.sum((1, 2), keepdims=True)
    factors = np.divide(expected, counts, out=np.zeros_like(expected), where=counts > 0)
    return weights * factors.reshape(-1, 4)[:, cells]


def _resampled(generator: np.random.Generator, size: int, n: int) -> np.ndarray:
    """How often each of n images is drawn, in each of `size` resamplings: (size, n)."""
    drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


class Effect(NamedTuple):
    """What turning up one attribute's prototype does to the other attribute; m images, J control prototypes.

    Attributes
    ----------
    prototype : int
    own : float64 Tensor of shape (m,)
        Change of the prototype's own attribute in each image.
    other : float64 Tensor of shape (m,)
        Change of the other attribute.
    controls : tuple of int
        Prototypes turned up for comparison.
    control : float64 Tensor of shape (J, m)
        Change of the other attribute by each of them.
    moved : float
        Mean absolute change of a pixel by the prototype, as a share of black to white.
    control_moved : float64 Tensor of shape (J,)
        The same by each control: one that hardly changes an image is a weak control.
    low : float
        Lower bound of mean(other) beyond the control that changes it most, paired by images.
    """

    prototype: int
    own: Tensor
    other: Tensor
    controls: tuple[int, ...]
    control: Tensor
    moved: float
    control_moved: Tensor
    low: float

    @property
    def p_value(self) -> float:
        """Of the permutation test that the prototype is one like the controls."""
        above = (self.control.mean(1) >= self.other.mean()).sum().item()
        return (1 + above) / (1 + len(self.controls))

    @property
    def flagged(self) -> bool:
        return self.low > 0 and self.other.mean().item() >= LEAST


class Intervention(NamedTuple):
    """`effects` of both attributes' prototypes, and the pictures: (m, C, H, W) each, in [−1, 1].

    Attributes
    ----------
    effects : (Effect, Effect)
    before : Tensor
        The images as the model draws them with their own activations.
    after : (Tensor, Tensor)
        With the first attribute's prototype turned up, and with the second's.
    """

    effects: tuple[Effect, Effect]
    before: Tensor
    after: tuple[Tensor, Tensor]

    @property
    def flagged(self) -> bool:
        return any(effect.flagged for effect in self.effects)


def intervene(
    model: Patronus,
    images: Tensor,
    activations: Tensor,
    association: Association,
    detectors: tuple[Detector, Detector],
    *,
    quantile: float = 0.99,
    controls: int = 20,
    inverted: bool = False,
    num_steps: int = 50,
    level: float = 0.95,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Intervention:
    """Turns up the prototype of one attribute in images that lack both, and measures the other attribute.

    Every image is drawn from noise with its own activations, and from the same noise with one of them changed. Any
    change may move a detector, so the control level is what other prototypes do to the same images: of those whose
    activations vary, the ones that tell least of both attributes, with the attributes balanced. An effect is flagged if
    the measured attribute rises by `LEAST` or more on average, and by more than under every control; the latter by the
    lower bound of a bootstrap interval over images, paired, of `level` for both directions together. If the prototype
    were one like J controls, it would come out above all of them with probability 1/(J + 1).

    Parameters
    ----------
    model : Patronus
    images : Tensor of shape (m, C, H, W)
        In [−1, 1], with neither attribute.
    activations : Tensor of shape (n, M)
        Of images at large: a prototype is turned up to their `quantile` (or down to 1 − `quantile`, if low activations
        tell its attribute).
    association : Association
    detectors : two callables
        Of the first and the second attribute, see `Detector`.
    quantile : float
    controls : int
        At most; and never more than half of the prototypes.
    inverted : bool, default False
        Takes for the noise what inversion makes of the image, as the paper does, and not fresh noise. It holds so much
        of the image that a model has to be well trained to draw anything else.
    num_steps : int
        Of DDIM.
    level : float
    batch_size : int
    seed : int
        Of the noise and the bootstrap.
    progress : bool

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    check_images(model.config, images)
    if len(images) < 2:
        raise ValueError(f"images has {len(images)} rows; give at least 2 with neither attribute")
    if not 0.5 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}; give a number above 0.5, at most 1")
    if controls < 1 or model.config.num_prototypes < 4:
        raise ValueError(f"controls is {controls} of {model.config.num_prototypes} prototypes; give 1, of 4 or more")
    # Of each prototype what it tells of the attributes, with both balanced, as a share of what the best one tells.
    told = (association.balanced_auroc - 0.5).abs()
    told = (told / told.amax(1, keepdim=True)).nan_to_num().amax(0)
    high, low = (generate.strengths(activations, q) for q in (quantile, 1 - quantile))
    told[(high <= low).to(told.device)] = torch.inf  # it cannot be turned up
    told[list(association.prototypes)] = torch.inf
    if not told.isfinite().any():
        raise ValueError("activations of no prototype but the attributes' own vary, so there is no control to compare")
    count = min(controls, model.config.num_prototypes // 2, int(told.isfinite().sum()))
    compared = tuple(told.argsort(stable=True)[:count].tolist())
    changed = [*dict.fromkeys([*association.prototypes, *compared])]
    # Controls are turned up; the attributes' own the way that tells the attribute.
    ways = dict(zip(association.prototypes, association.signs, strict=True))

    if inverted:
        codes = generate.invert(model, images, num_steps, batch_size=batch_size, progress=progress)
    else:
        noise = normal_noise(torch.empty_like(images, dtype=torch.float32), seed)
        codes = generate.Codes(model.activations(images, batch_size=batch_size), noise)
    rows = codes.activations.repeat(1 + len(changed), 1, 1)
    for place, j in enumerate(changed, 1):
        rows[place, :, j] = (high if ways.get(j, 1) > 0 else low)[j].to(rows)
    drawn = generate.sample(
        model,
        rows.flatten(0, 1),
        num_steps,
        noise=codes.noise.repeat(1 + len(changed), 1, 1, 1),
        batch_size=batch_size,
        progress=progress,
    )
    seen = [detector(drawn).cpu().double().unflatten(0, (1 + len(changed), len(images))) for detector in detectors]
    change = [values[1:] - values[0] for values in seen]
    where = {j: place for place, j in enumerate(changed)}
    made = drawn.unflatten(0, (1 + len(changed), len(images)))
    moved = torch.stack([(after - made[0]).abs().mean() / 2 for after in made[1:]]).cpu().double()
    effects = []
    for k, j in enumerate(association.prototypes):
        rows_of = [where[c] for c in compared]
        control = change[1 - k][rows_of]
        other = change[1 - k][where[j]]
        beyond = other - control[control.mean(1).argmax()]
        bound = _lower(beyond.numpy(), (1 - level) / 2, seed)
        strength = moved[where[j]].item()
        effects.append(Effect(j, change[k][where[j]], other, compared, control, strength, moved[rows_of], bound))
    first, second = (made[1 + where[j]] for j in association.prototypes)
    return Intervention((effects[0], effects[1]), made[0], (first, second))


def _lower(values: np.ndarray, tail: float, seed: int, replicates: int = 2000) -> float:
    """Lower bound of a mean, by bootstrap percentiles."""
    weights = _resampled(np.random.default_rng(seed), replicates, len(values))
    return float(np.quantile(weights @ values / len(values), tail))
