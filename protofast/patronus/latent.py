"""New activation vectors without an image: a small diffusion model over s (arXiv 2503.22782), for unconditional images.

The paper's latent model is a one-dimensional U-Net that slides along s. Prototypes have no order, so two entries that
happen to be neighbours are no nearer than any others, and a convolution over them means nothing. This one is the
network of DiffAE's latent DDIM (Preechakul et al. 2022, arXiv 2111.15640): an MLP whose layers see the input again and
are scaled by the timestep. `benchmarks/patronus_latents.py` sets both side by side.

The network predicts v (Salimans and Ho 2022): at the last of so few timesteps ᾱ is 2e-5, and an error of a predicted
noise would reach the activations 200 times as large.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import _weights
from .._files import digest, replacing
from .._optional import need
from .._training import forgetting, read_unfinished
from ..data import Dataset
from ..ddim import DDIMSchedule, ddim_step
from ..diffusion import add_noise, normal_noise, sample, timesteps
from .generate import sample as sample_images
from .images import images_of
from .model import Patronus

WEIGHTS = "latent.safetensors"
CONFIG = "latent.json"
UNFINISHED = "latent.unfinished"
SAMPLERS = ("ddim", "renoise")
CHECKPOINT_SECONDS = 10.0
IMAGE_NOISE = 1 << 52
"""Number of the first image's noise, past those of all timesteps of the latent model: nothing is drawn twice."""
_FORMAT = "protofast-latent-1"
_CURE = "train one by `protofast patronus latent RUN`"


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of a latent model; the timesteps and betas are the paper's.

    Parameters
    ----------
    width : int
        Channels of each layer.
    layers : int
        Linear layers before the last.
    timesteps : int
        T.
    beta_start, beta_end : float
        Of linear betas.

    Raises
    ------
    ValueError
        Naming the setting that does not fit.
    """

    width: int = 256
    layers: int = 5
    timesteps: int = 100
    beta_start: float = 1e-3
    beta_end: float = 0.2

    def __post_init__(self) -> None:
        for name in ("width", "layers", "timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}; give 0 < beta_start ≤ beta_end < 1"
            )


class LatentModel(nn.Module):
    """A diffusion model over activation vectors s (n, M), standardised by those that it is trained on.

    Parameters
    ----------
    num_prototypes : int
        M.
    config : LatentConfig, optional

    Attributes
    ----------
    mean, std, lowest, highest : Tensor of shape (M,)
        Of the activations in training. A prototype that never varies keeps a std of 1.
    schedule : DDIMSchedule
    losses : list of float
        Of training: the mean loss of each twentieth of the updates.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.latent import LatentModel
    >>> model = LatentModel(30)
    >>> model(torch.randn(2, 30), torch.tensor([0, 99])).shape
    torch.Size([2, 30])
    """

    mean: Tensor
    std: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, num_prototypes: int, config: LatentConfig | None = None) -> None:
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes is {num_prototypes}; give at least 1")
        self.num_prototypes, self.config = int(num_prototypes), config or LatentConfig()
        self.network = Network(self.num_prototypes, self.config.width, self.config.layers)
        self.schedule = DDIMSchedule.linear(self.config.timesteps, self.config.beta_start, self.config.beta_end)
        for name, value in (("mean", 0.0), ("std", 1.0), ("lowest", -math.inf), ("highest", math.inf)):
            self.register_buffer(name, torch.full((self.num_prototypes,), value))
        self.losses: list[float] = []

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """v = √ᾱ·noise − √(1 − ᾱ)·s̃ of noised standardised activations x (B, M) at timesteps t (B,)."""
        return self.network(x, t)

    def standardize(self, activations: Tensor) -> None:
        """Takes mean, standard deviation and range from activations (N, M)."""
        std, mean = torch.std_mean(activations.double(), 0, correction=0)
        self.lowest.copy_(activations.amin(0))
        self.highest.copy_(activations.amax(0))
        self.mean.copy_(mean)
        self.std.copy_(std.where((self.lowest < self.highest).to(std.device), 1.0))  # of equal values std has roundings

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        num_steps: int | None = None,
        sampler: str = "ddim",
        seed: int = 0,
        batch_size: int = 8192,
    ) -> Tensor:
        """New activation vectors.

        Each entry is kept within the range that its prototype had in training: beyond it lies what no image was seen
        to do and the denoiser was never told. Of n fresh images about 2nM/N entries would fall outside the range of N.

        Parameters
        ----------
        n : int
        num_steps : int, optional
            Steps; by default all T. DDIM's own error, too, takes some of the spread, and more from directions that vary
            little: of a standard normal 2 % is lost by 100 steps of 100 timesteps, 0.5 % by 400 of 400 (with betas
            from 2.5e-4 to 0.05, the same noise in the end).
        sampler : {"ddim", "renoise"}
            DDIM, deterministic from noise drawn by `seed`; or what the paper's code calls so, which takes fresh noise
            at each step in place of the predicted: x_{t−1} = √ᾱ_{t−1}·x̂_0 + √(1 − ᾱ_{t−1})·z. As x̂_0 is a mean over all
            s that x_t may have come from, that loses spread at every step.
        seed : int
            Sample k is the same however many there are.
        batch_size : int

        Returns
        -------
        Tensor of shape (n, M)
            float32, on the model's device.

        Raises
        ------
        ValueError
            Naming the argument.

        Examples
        --------
        >>> from protofast.patronus.latent import LatentModel
        >>> LatentModel(30).sample(4, num_steps=5).shape
        torch.Size([4, 30])
        """
        if n < 1:
            raise ValueError(f"n is {n}; give at least 1")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        steps = self.config.timesteps if num_steps is None else num_steps
        noise = normal_noise(self.mean.new_empty(n, self.num_prototypes), seed)
        if sampler == "ddim":
            x = sample(self, noise, self.schedule, steps, prediction_type="v_prediction", batch_size=batch_size)
        else:
            x = _renoise(self, noise, self.schedule, steps, seed, batch_size)
        return (x * self.std + self.mean).clamp(self.lowest, self.highest)

    def save_pretrained(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes `latent.safetensors` and `latent.json` into a folder, each whole or not at all.

        Parameters
        ----------
        folder : path
            That of the Patronus model whose activations these are; made if it is not there.
        **about
            What is to be known of the model, as JSON.
        """
        folder = Path(folder)
        (folder / CONFIG).unlink(missing_ok=True)  # it does not belong to the new weights
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        _weights.write(folder / WEIGHTS, _FORMAT, state, {})
        content = {"format": _FORMAT, "num_prototypes": self.num_prototypes, **dataclasses.asdict(self.config)}
        content |= {"losses": self.losses, "about": about}
        with replacing(folder / CONFIG) as file:  # last: with it the two are complete
            file.write(json.dumps(content, indent=1).encode())

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> LatentModel:
        """Reads what `save_pretrained` wrote, in evaluation mode and without gradients.

        Raises
        ------
        FileNotFoundError
        ValueError
            When a file is damaged or of something else.
        """
        values = _read_config(Path(folder))
        state, _ = _weights.read(Path(folder) / WEIGHTS, _FORMAT, wrong=f"holds no latent model; {_CURE}")
        sizes = {field.name: values[field.name] for field in dataclasses.fields(LatentConfig)}
        model = cls(values["num_prototypes"], LatentConfig(**sizes))
        try:
            model.load_state_dict(state)
        except RuntimeError:
            raise ValueError(f"{Path(folder) / WEIGHTS} does not belong to the {CONFIG} beside it; {_CURE}") from None
        model.losses = values["losses"]
        return model.to(device).eval().requires_grad_(False)


class Network(nn.Module):
    """DiffAE's MLP: linear layers that all see the input beside what came before, scaled by the timestep."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        embeddings = need("diffusers.models.embeddings", "patronus")
        self.wave = embeddings.Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = embeddings.TimestepEmbedding(64, width, act_fn="silu")
        sizes = [features, *(width + features for _ in range(layers - 1))]
        self.linear = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.scale = nn.Linear(width, layers * width)
        self.last = nn.Linear(width + features, features)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # Batches are larger than there are timesteps, and in sampling all rows have the same.
        each, which = t.unique(return_inverse=True)
        scales = self.scale(nn.functional.silu(self.time(self.wave(each))))[which].chunk(len(self.linear), 1)
        hidden = x
        for linear, norm, scale in zip(self.linear, self.norm, scales, strict=True):
            hidden = torch.cat([nn.functional.silu(norm(linear(hidden) * (1 + scale))), x], 1)
        return self.last(hidden)


def activations_of(
    model: Patronus,
    data: Dataset,
    *,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Activations (n, M) of a whole data set, float32 on the CPU: batched, without gradients, images read as needed.

    Parameters
    ----------
    model : Patronus
    data : Dataset
    batch_size : int
        Images in memory at a time.
    progress : callable, optional
        Called as ``progress(done, total)`` with numbers of images.

    Examples
    --------
    >>> import protofast as pf
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.latent import activations_of
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2)))
    >>> activations_of(model, pf.data.load("digits")).shape
    torch.Size([1437, 5])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    found = torch.empty(len(data), model.config.num_prototypes)
    for first in range(0, len(data), batch_size):
        rows = range(first, min(first + batch_size, len(data)))
        found[first : rows.stop] = model.activations(images_of(model.config, data.subset(rows)), batch_size=batch_size)
        if progress is not None:
            progress(rows.stop, len(data))
    return found


def train_latent(
    activations: Tensor,
    *,
    config: LatentConfig | None = None,
    updates: int = 4000,
    batch: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    seed: int = 0,
    device: torch.device | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    prototypes: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentModel:
    """Trains a latent model: mean squared error of v, AdamW, an average of the weights.

    Parameters
    ----------
    activations : Tensor of shape (N, M)
        Of training images, `Patronus.activations`: found once, and not in each epoch anew.
    config : LatentConfig, optional
    updates : int
        The learning rate rises over the first twentieth, and falls to 0 along a cosine.
    batch : int
    lr : float
        The highest.
    weight_decay : float
    ema : float
        Of the exponential average of the weights that is kept for use.
    seed : int
    device : device, optional
        By default that of the activations.
    folder : path, optional
        Where the model is kept, that of the Patronus model. If it is there already, of the same activations and
        settings, it is read. A call that was killed is taken up by the next one where it was ten seconds before, and
        ends with the same weights on the same machine with the same number of threads.
    prototypes : Tensor, optional
        The prototype vectors of the model that the activations are of. Their digest goes into `latent.json`, and a
        model of others that is in `folder` is not taken.
    progress : callable, optional
        Called as ``progress(done, total)`` with numbers of updates.

    Returns
    -------
    LatentModel
        In evaluation mode, without gradients.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    FloatingPointError
        When the loss is not finite. What `folder` holds stays as it was.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.latent import train_latent
    >>> model = train_latent(torch.rand(100, 5), updates=3)
    >>> model.num_prototypes, len(model.losses)
    (5, 3)
    """
    activations = _vectors("activations", activations).float().contiguous()
    config = config or LatentConfig()
    settings: dict[str, Any] = {
        "updates": updates,
        "batch": batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "ema": ema,
        "seed": seed,
    }
    for name in ("updates", "batch"):
        if settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]}; give at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; give a positive number")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}; give 0 or more")
    if not 0 <= ema < 1:
        raise ValueError(f"ema is {ema}; give a number from 0 to below 1")
    device = activations.device if device is None else torch.device(device)
    about = {"activations": digest(activations), "training": settings}
    if prototypes is not None:
        about["prototypes"] = digest(prototypes)
    if folder is not None and (found := _kept(Path(folder), config, about)) is not None:
        return found.to(device)

    with torch.random.fork_rng(devices=[]):  # the layers draw their weights from the global generator
        torch.manual_seed(seed)
        model = LatentModel(activations.shape[1], config)
    model.standardize(activations)
    model.to(device)
    unfinished = None if folder is None else Path(folder) / UNFINISHED
    made_by = {"torch": str(torch.__version__), "diffusers": need("diffusers", "patronus").__version__}
    key = {**about, "config": dataclasses.asdict(config), "made_by": made_by}
    model = fit(model, activations, **settings, unfinished=unfinished, key=key, progress=progress)
    if folder is not None and unfinished is not None:
        model.save_pretrained(folder, **about)
        unfinished.unlink(missing_ok=True)
    return model


def fit(
    model: LatentModel,
    activations: Tensor,
    *,
    updates: int,
    batch: int,
    lr: float,
    weight_decay: float,
    ema: float,
    seed: int,
    unfinished: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentModel:
    """The loop of `train_latent`, for a model that knows its standardisation; returns the average of it."""
    device = model.device
    points = (activations.to(device) - model.mean) / model.std
    alphas = model.schedule.alphas_cumprod
    signals, spreads = alphas.sqrt().float().to(device), (1 - alphas).sqrt().float().to(device)

    def blend(average: Tensor, latest: Tensor, count: Tensor | int) -> Tensor:
        return torch.lerp(latest, average, forgetting(ema, int(count)))

    average = AveragedModel(model, avg_fn=blend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    if unfinished is not None and (state := read_unfinished(unfinished)).get("key") == key:
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses = state["losses"]
    saved = time.monotonic()
    model.train()
    while (done := len(losses)) < updates:
        # Drawn on the CPU, so that devices see the same.
        rows = torch.randint(len(points), (batch,), generator=generator).to(device)
        t = torch.randint(len(alphas), (batch,), generator=generator).to(device)
        noise = torch.randn(batch, points.shape[1], generator=generator).to(device)
        x, signal, spread = points[rows], signals[t, None], spreads[t, None]
        loss = (model(signal * x + spread * noise, t) - (signal * noise - spread * x)).square().mean()
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at update {done + 1} with lr {lr}; give a smaller lr")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (done + 1) / (updates / 20)) * (1 + math.cos(math.pi * done / updates)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if unfinished is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(unfinished) as file:
                torch.save(state | {"generator": generator.get_state(), "losses": losses, "key": key}, file)
            saved = time.monotonic()
        if progress is not None:
            progress(done + 1, updates)
    result = average.module
    assert isinstance(result, LatentModel)
    count = min(20, updates)
    ends = [number * updates // count for number in range(count + 1)]
    result.losses = [sum(losses[a:b]) / (b - a) for a, b in pairwise(ends)]
    return result.eval().requires_grad_(False)


class Unconditional(NamedTuple):
    """Images without a source: `images` (n, C, H, W) in [−1, 1], and the `activations` (n, M) they were made of."""

    images: Tensor
    activations: Tensor


def sample_unconditional(
    model: Patronus,
    latent: LatentModel,
    n: int,
    *,
    num_steps: int = 50,
    latent_steps: int | None = None,
    sampler: str = "ddim",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Unconditional:
    """Images of nothing: activations from the latent model, then DDIM from noise.

    Parameters
    ----------
    model : Patronus
    latent : LatentModel
        Trained on the activations of `model`.
    n : int
    num_steps : int
        DDIM steps of the images; the paper takes 1000.
    latent_steps : int, optional
        Steps of the latent model; by default all of its timesteps.
    sampler : {"ddim", "renoise"}
        Of the latent model, see `LatentModel.sample`.
    seed : int
        Image k is the same however many there are.
    batch_size : int
    progress : bool

    Returns
    -------
    Unconditional
        On the model's device.

    Raises
    ------
    ValueError
        Naming the argument.

    Examples
    --------
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.latent import LatentModel, sample_unconditional
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> made = sample_unconditional(model, LatentModel(5), 3, num_steps=2)
    >>> made.images.shape, made.activations.shape
    (torch.Size([3, 1, 16, 16]), torch.Size([3, 5]))
    """
    if latent.num_prototypes != model.config.num_prototypes:
        raise ValueError(
            f"latent is of {latent.num_prototypes} prototypes and the model of {model.config.num_prototypes}; "
            "give the latent model that was trained on this model's activations"
        )
    found = latent.sample(n, num_steps=latent_steps, sampler=sampler, seed=seed).to(model.device)
    images = decode(model, found, num_steps=num_steps, seed=seed, batch_size=batch_size, progress=progress)
    return Unconditional(images, found)


def decode(
    model: Patronus,
    activations: Tensor,
    *,
    num_steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Images of activations (n, M), by DDIM from noise that `seed` draws: (n, C, H, W) in [−1, 1]."""
    counted = (seed, IMAGE_NOISE)
    return sample_images(model, activations, num_steps, seed=counted, batch_size=batch_size, progress=progress)


class LatentQuality(NamedTuple):
    """How samples of activations differ from held-out ones."""

    wasserstein: np.ndarray
    """(M,) Wasserstein-1 distance of each prototype's values, in standard deviations of the held-out ones."""
    spread: np.ndarray
    """(M,) standard deviation of the samples over that of the held-out ones; 1 for a prototype that never varies."""
    correlation: float
    """Mean absolute difference of the correlations between two prototypes, over all pairs."""
    accuracy: float
    """Share of vectors whose nearest other one is of their own set: 0.5 is chance, 1 for sets apart."""


def latent_quality(samples: Tensor, held_out: Tensor, *, neighbours: int = 5000, seed: int = 0) -> LatentQuality:
    """Compares samples with held-out activations: marginals, correlations, and the joint distribution.

    Parameters
    ----------
    samples : Tensor of shape (n, M)
    held_out : Tensor of shape (m, M)
        Activations of images that neither the latent model nor the samples come from.
    neighbours : int
        At most so many of each set, equally many, go into the two-sample test by nearest neighbours (Lopez-Paz and
        Oquab 2017), on values standardised by the held-out ones.
    seed : int
        Draws which.

    Returns
    -------
    LatentQuality

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.latent import latent_quality
    >>> found = latent_quality(torch.zeros(50, 2), torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    >>> found.spread.tolist()
    [0.0, 0.0]
    """
    first, second = (
        _vectors(name, points).double().cpu().numpy() for name, points in (("samples", samples), ("held_out", held_out))
    )
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"samples has {first.shape[1]} prototypes and held_out {second.shape[1]}; give as many")
    if neighbours < 2:
        raise ValueError(f"neighbours is {neighbours}; give at least 2")
    distance = need("scipy.stats", "patronus").wasserstein_distance
    nearest = need("sklearn.neighbors", "data").NearestNeighbors
    mean, scale = second.mean(0), _or_one(_std(second))
    first, second = ((points - mean) / scale for points in (first, second))
    wasserstein = np.array([distance(one, other) for one, other in zip(first.T, second.T, strict=True)])
    steady = (_std(first) == 0) & (_std(second) == 0)
    pairs = np.triu_indices(first.shape[1], 1)
    between = [_correlations(points)[pairs] for points in (first, second)]
    count, generator = min(len(first), len(second), neighbours), np.random.default_rng(seed)
    both = np.concatenate([generator.permutation(points)[:count] for points in (first, second)])
    found = nearest(n_neighbors=1).fit(both).kneighbors(return_distance=False)[:, 0]  # of others, not of itself
    return LatentQuality(
        wasserstein,
        np.where(steady, 1.0, _std(first) / _or_one(_std(second))),
        float(np.abs(between[0] - between[1]).mean()) if len(pairs[0]) else 0.0,
        float(((found < count) == (np.arange(2 * count) < count)).mean()),
    )


def gaussian(activations: Tensor, n: int, *, seed: int = 0) -> Tensor:
    """The baseline: n draws (n, M) from the Gaussian with the mean and covariance of activations (N, M).

    Kept within the range of each prototype, as those of `LatentModel.sample`.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.latent import gaussian
    >>> gaussian(torch.rand(100, 5), 3).shape
    torch.Size([3, 5])
    """
    points = _vectors("activations", activations).double().cpu().numpy()
    covariance = np.cov(points, rowvar=False, ddof=0).reshape(points.shape[1], points.shape[1])
    drawn = np.random.default_rng(seed).multivariate_normal(points.mean(0), covariance, n, method="eigh")
    return torch.from_numpy(drawn.clip(points.min(0), points.max(0))).to(activations)


def _renoise(
    model: nn.Module, noise: Tensor, schedule: DDIMSchedule, num_steps: int, seed: int, batch_size: int
) -> Tensor:
    """`sampler="renoise"` of `LatentModel.sample`; step k takes noise of the number k, the first of which is given."""
    steps = timesteps(num_steps, len(schedule))
    parts = []
    for first in range(0, len(noise), batch_size):
        x = noise[first : first + batch_size]
        for number, t in enumerate(steps):
            if number:
                x = add_noise(x, normal_noise(x, (seed, number << 32 | first)), t, schedule)
            predicted = model(x, torch.full((len(x),), t, device=x.device))
            x = ddim_step(x, predicted, t, -1, schedule, prediction_type="v_prediction").prev_sample
        parts.append(x)
    return torch.cat(parts)


def _vectors(name: str, points: Tensor) -> Tensor:
    if not isinstance(points, Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{name} is {kind}; give a floating-point torch tensor")
    if points.ndim != 2 or len(points) < 2 or points.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; give at least two vectors, (n, prototypes)")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    return points.detach()


def _std(points: np.ndarray) -> np.ndarray:
    """Of each column; exactly 0 for equal values, where numpy's has roundings."""
    return np.where(points.min(0) < points.max(0), points.std(0), 0.0)


def _or_one(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1.0)


def _correlations(points: np.ndarray) -> np.ndarray:
    """Of prototypes; 0 with one that never varies, where numpy's have NaN."""
    points = (points - points.mean(0)) / _or_one(_std(points))
    return points.T @ points / len(points)


def _kept(folder: Path, config: LatentConfig, about: Mapping[str, Any]) -> LatentModel | None:
    """The model in a folder if it is of these settings; None to train."""
    try:
        same = _read_config(folder)["about"] == about
        model = LatentModel.from_pretrained(folder) if same else None
    except (OSError, ValueError):  # absent, or damaged: train and replace it
        return None
    return model if model is not None and model.config == config else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_CURE}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_CURE}") from None
    names = {"num_prototypes", "losses", "about", *(field.name for field in dataclasses.fields(LatentConfig))}
    if not isinstance(values, dict) or values.get("format") != _FORMAT or not names <= values.keys():
        raise ValueError(f"{path} is of no latent model; {_CURE}")
    return values
