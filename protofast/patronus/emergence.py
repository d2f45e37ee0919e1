"""When, on the way from noise to image, each prototype appears (arXiv 2503.22782, sec. 3.4 and A.2).

The paper describes the measurement and shows its curves; no public code of it exists, so what is computed is laid down
here. At each timestep t of a deterministic run the denoiser's prediction says how the image would end, x̂_0(t), and
s(t) = proto(x̂_0(t)) says what the prototypes see in that. Two runs from the same noise are compared: one under the
image's own activations, one with a single prototype j enhanced. Their difference in s_j, δ_j(t), is 0 as long as the
enhancement changes nothing that prototype j would see. x̂_0 is not clipped, as in the paper's DDIM.

At the first step x̂_0 is what the activations alone make the model expect, so a prototype may be there at once. A
model that predicts the noise shows less of that: its error reaches x̂_0 divided by √ᾱ, 0.006 at T = 1,000, and what
the encoder sees then is mostly this error. Compare emergence times of models of one `prediction_type` only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import diffusion
from .._optional import need
from .._progress import bars
from ..diffusion.loop import LoopStep
from .generate import Codes, check_noise, check_prototypes, check_values, run
from .model import check_activations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .model import Patronus

_BLUE, _INK = "#08519c", "#222222"


@dataclass(frozen=True)
class Emergence:
    """What `emergence` found, of S timesteps, P prototypes and n images. All float64 but the integers.

    Attributes
    ----------
    timesteps : int64 Tensor of shape (S,)
        At which the model was asked, in the order of generation: falling.
    prototypes : int64 Tensor of shape (P,)
    values : Tensor of shape (P,)
        What each was set to in its enhanced run.
    original : Tensor of shape (S, P)
        Activation of each prototype by the predicted image, in the run under the image's own activations; mean of the
        images.
    enhanced : Tensor of shape (S, P)
        The same in the run in which that prototype was enhanced.
    delta : Tensor of shape (S, P)
        Their difference δ.
    error : Tensor of shape (S, P)
        Standard error of δ over the images; NaN of one image.
    times : Tensor of shape (P,)
        Emergence time of each prototype, a timestep: see `emergence_times`. NaN of one that does not rise.
    trend : Tensor of shape (S,)
        Mean of δ over images and prototypes.
    trend_error : Tensor of shape (S,)
        Its standard error over the images; NaN of one.
    trend_time : float
        Emergence time of the trend.
    images : int
        n.
    """

    timesteps: Tensor
    prototypes: Tensor
    values: Tensor
    original: Tensor
    enhanced: Tensor
    delta: Tensor
    error: Tensor
    times: Tensor
    trend: Tensor
    trend_error: Tensor
    trend_time: float
    images: int

    @property
    def order(self) -> Tensor:
        """Positions in `prototypes`: the first to emerge first, of equals the larger δ; those that do not rise last."""
        order = self.delta[-1].argsort(descending=True, stable=True)
        return order[torch.nan_to_num(-self.times[order], nan=math.inf).argsort(stable=True)]


def emergence(
    model: Patronus,
    codes: Codes,
    values: float | Sequence[float] | Tensor,
    prototypes: int | Sequence[int] | Tensor | None = None,
    num_steps: int = 50,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> Emergence:
    """Traces the activation of each prototype through generation, with and without its enhancement.

    The n · (P + 1) runs go through the sampler `batch_size` at a time; of each only the activation of its prototype
    is kept, so memory is that of one batch and of n · P · S numbers.

    Parameters
    ----------
    model : Patronus
        In evaluation mode.
    codes : Codes
        Activations and noise of n images, of `invert` (the paper: 100 test images) or with fresh noise.
    values : float, or a sequence of one for each prototype
        What the enhanced activation is set to, see `strengths`. An image that has more of it already is set to it, too.
    prototypes : int or sequence of int, optional
        By default all.
    num_steps : int, default 50
        S, the DDIM steps; 1,000 in the paper. Emergence times are as fine as T / S.
    batch_size : int, default 256
    progress : bool, default False

    Returns
    -------
    Emergence

    Raises
    ------
    IndexError, ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.emergence import emergence
    >>> from protofast.patronus.generate import Codes
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = Codes(torch.rand(3, 5), torch.randn(3, 1, 16, 16))
    >>> found = emergence(model, codes, 1.0, [0, 4], num_steps=10)
    >>> found.delta.shape, found.times.shape, found.timesteps[:3].tolist()
    (torch.Size([10, 2]), torch.Size([2]), [999, 899, 799])
    """
    check_activations(model.config, codes.activations, "codes.activations")
    check_noise(model.config, codes.activations, codes.noise, "codes.noise")
    images = len(codes.activations)
    if not images:
        raise ValueError("codes has no images; give at least one")
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    chosen = check_prototypes(model.config, range(model.config.num_prototypes) if prototypes is None else prototypes)
    levels = check_values(values, len(chosen), 1)
    steps = diffusion.timesteps(num_steps, len(model.schedule))
    original, enhanced = (torch.empty(images, len(steps), len(chosen), dtype=torch.float64) for _ in range(2))
    runs = images * (len(chosen) + 1)  # of each image first the original, then each prototype's
    with bars(progress) as bar:
        advance = bar(f"tracing {runs:,} runs", runs * len(steps), 0)

        def trace(numbers: Tensor) -> None:
            image, which = numbers // (len(chosen) + 1), numbers % (len(chosen) + 1) - 1
            plain, changed = which < 0, which >= 0
            mine = which[changed]
            activations = codes.activations[image]
            activations[changed, chosen[mine]] = levels[mine].to(activations)

            def watch(number: int, timestep: int, step: LoopStep) -> None:
                predicted = step.pred_original_sample
                assert predicted is not None
                seen = model.encode(predicted)[:, chosen].to(original)
                original[image[plain], number] = seen[plain]
                enhanced[image[changed], number, mine] = seen[changed, mine]
                advance(len(seen))

            run(model, activations, codes.noise[image], num_steps, callback=watch)

        for numbers in torch.arange(runs).split(batch_size):
            trace(numbers)
    timesteps = torch.tensor(steps)
    delta = enhanced - original
    mean, error = _mean(delta)
    trend, trend_error = _mean(delta.mean(2))
    return Emergence(
        timesteps,
        chosen,
        levels.clone(),
        original.mean(0),
        enhanced.mean(0),
        mean,
        error,
        emergence_times(timesteps, mean, error),
        trend,
        trend_error,
        float(emergence_times(timesteps, trend[:, None], trend_error[:, None])),
        images,
    )


def emergence_times(timesteps: Tensor, delta: Tensor, error: Tensor | None = None) -> Tensor:
    """The timestep at which each change is half made: the first one, in the order of generation, from which on δ is
    at least half of its final value.

    A change that was half there and went back below counts from its return. The final value is that of the last step.

    Parameters
    ----------
    timesteps : Tensor of shape (S,)
        In the order of generation.
    delta : Tensor of shape (S, P)
    error : Tensor of shape (S, P), optional
        Standard errors. A prototype whose final δ is not above two of them does not rise; a NaN, or none at all, is
        taken for 0.

    Returns
    -------
    float64 Tensor of shape (P,)
        NaN of prototypes that do not rise.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.emergence import emergence_times
    >>> delta = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.0], [0.4, 0.1, 0.0], [0.9, 0.5, 0.0], [1.0, 1.0, -0.1]])
    >>> emergence_times(torch.tensor([999, 799, 599, 399, 199]), delta)
    tensor([399., 399.,  nan], dtype=torch.float64)
    """
    final = delta[-1]
    least = torch.zeros_like(final) if error is None else 2 * error[-1].nan_to_num(0)
    there = (delta >= final / 2).long()
    stays = there.flip(0).cumprod(0).sum(0)  # steps at the end throughout which it is there
    times = timesteps[len(timesteps) - stays.clamp_min(1)].double()
    return torch.where(final > least, times, math.nan)


@torch.no_grad()
def predictions(
    model: Patronus, activations: Tensor, noise: Tensor, num_steps: int = 50, *, shown: int = 10, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Predicted images x̂_0 on the way, for pictures.

    Parameters
    ----------
    model : Patronus
        In evaluation mode.
    activations : Tensor of shape (n, M)
    noise : Tensor of shape (n, C, H, W)
    num_steps : int, default 50
    shown : int, default 10
        How many of the steps, evenly spread, the first and the last among them; all where there are fewer.
    batch_size : int, default 256

    Returns
    -------
    timesteps : int64 Tensor of shape (K,)
    images : Tensor of shape (n, K, C, H, W)
        Clipped to [−1, 1].

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.emergence import predictions
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> timesteps, images = predictions(model, torch.rand(2, 5), torch.randn(2, 1, 16, 16), 10, shown=4)
    >>> timesteps.tolist(), images.shape
    ([999, 699, 399, 99], torch.Size([2, 4, 1, 16, 16]))
    """
    if shown < 1:
        raise ValueError(f"shown is {shown}; give at least 1")
    steps = diffusion.timesteps(num_steps, len(model.schedule))
    kept = np.unique(np.linspace(0, num_steps - 1, min(shown, num_steps)).round().astype(int)).tolist()
    images = noise.new_empty(len(noise), len(kept), *noise.shape[1:])

    def watch(number: int, timestep: int, step: LoopStep) -> None:
        if number in kept:
            found = step.pred_original_sample
            assert found is not None
            images[step.first : step.first + len(found), kept.index(number)] = found.clamp(-1, 1).to(images)

    run(model, activations, noise, num_steps, batch_size=batch_size, callback=watch)
    return torch.tensor(steps)[kept], images


def figure(found: Emergence) -> Figure:
    """The trend with its band, and a map of prototypes × timesteps, in the order in which the prototypes emerge.

    Raises
    ------
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.emergence import emergence, figure
    >>> from protofast.patronus.generate import Codes
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = Codes(torch.rand(3, 5), torch.randn(3, 1, 16, 16))
    >>> picture = figure(emergence(model, codes, 1.0, num_steps=10))
    """
    need("matplotlib", "patronus")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(found.prototypes)
    rows = max(1.6, (0.19 if count <= 60 else 0.1) * count)  # inches
    picture = Figure(figsize=(8.5, 3.4 + rows), layout="constrained")
    FigureCanvasAgg(picture)
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=[2.6, rows])
    t = found.timesteps.numpy()
    trend, error = found.trend.numpy(), found.trend_error.nan_to_num(0).numpy()
    above.plot(t, trend, color=_BLUE, linewidth=1.8, label="mean over images and prototypes")
    above.fill_between(
        t, trend - 2 * error, trend + 2 * error, color=_BLUE, alpha=0.25, linewidth=0, label="± 2 standard errors"
    )
    above.axhline(0, color="#888888", linewidth=0.6)
    if math.isfinite(found.trend_time):
        when = f"half of the final value, to stay: t = {found.trend_time:.0f}"
        above.axvline(found.trend_time, color=_INK, linewidth=1, linestyle="--", label=when)
    above.margins(y=0.25)
    above.legend(fontsize=8, frameon=False, loc="best")
    above.set_ylabel("δ: enhanced − original activation")
    above.set_title(
        f"How much more a prototype is seen when it is enhanced: {found.images:,} images, {count} prototypes",
        fontsize=10,
        loc="left",
    )

    order = found.order.numpy()
    times, delta = found.times.numpy()[order], found.delta.numpy()[:, order]
    rises = np.isfinite(times)
    share = np.ma.masked_all(delta.shape)
    share[:, rises] = delta[:, rises] / delta[-1, rises]
    between = (t[:-1] + t[1:]) / 2
    edges = np.concatenate([t[:1] + (t[0] - between[:1] if len(between) else 0.5), between, [-0.5]])
    colours = need("matplotlib", "patronus").colormaps["RdBu_r"].with_extremes(bad="#e8e8e8")
    cells = below.pcolormesh(edges, np.arange(count + 1) - 0.5, share.T, vmin=0, vmax=2, cmap=colours)
    below.scatter(times, np.arange(count), marker="|", s=60, color=_INK, linewidths=1.6)
    names = [
        f"{number}" if there else f"{number} (does not rise)"
        for number, there in zip(found.prototypes[order].tolist(), rises, strict=True)
    ]
    below.set_yticks(np.arange(count), names, fontsize=7 if count <= 60 else 5)
    below.set(ylim=(count - 0.5, -0.5), xlim=(edges[0], edges[-1]), ylabel="prototype, the first to emerge on top")
    below.set_xlabel("timestep t: noise on the left, the image on the right;  | is the emergence time")
    bar = picture.colorbar(cells, ax=below, extend="both", pad=0.01, fraction=0.04)
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "half", "1", "1.5", "2"])
    bar.set_label("share of the final δ", fontsize=8)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def _mean(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and its standard error; NaN of one sample."""
    error = samples.std(0) / math.sqrt(len(samples)) if len(samples) > 1 else torch.full_like(samples[0], math.nan)
    return samples.mean(0), error
