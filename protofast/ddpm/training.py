"""Training of a small UNet2DModel to find the noise in images (Ho et al. 2020), cached, and resumed after a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import _weights
from .._files import replacing
from .._optional import need
from .._training import forgetting, read_unfinished
from ..ddim import DDIMSchedule

TIMESTEPS = 1000
BATCH = 64
DECAY = 0.995
CHECKPOINT_SECONDS = 10.0
_FORMAT = "protofast-ddpm-1"


class Denoiser(nn.Module):
    """diffusers' UNet2DModel in ``model(x, t) → predicted noise``, with the schedule it is trained on.

    Three resolutions of one residual block each, with `width`, 2·`width` and 4·`width` channels. The network itself
    predicts v = √ᾱ·noise − √(1 − ᾱ)·image (Salimans and Ho 2022), and the noise is √ᾱ·v + √(1 − ᾱ)·x: an error of a
    predicted noise reaches the image divided by √ᾱ, 0.006 at the last timestep, which minutes of training cannot meet.

    Parameters
    ----------
    shape : sequence of int
        Shape (C, H, W) of an image; values in [−1, 1]. H and W multiples of 4.
    width : int, default 16
        A multiple of 8.

    Attributes
    ----------
    unet : diffusers.UNet2DModel
    schedule : DDIMSchedule
        1,000 timesteps, linear betas.
    losses : list of float
        Of training: the mean loss of each twentieth of the updates.

    Raises
    ------
    ValueError
        For a shape or a width that does not fit.

    Examples
    --------
    >>> import torch
    >>> from protofast.ddpm import Denoiser
    >>> model = Denoiser((1, 8, 8), width=8)
    >>> model(torch.randn(2, 1, 8, 8), torch.tensor([10, 999])).shape
    torch.Size([2, 1, 8, 8])
    """

    signal: Tensor
    spread: Tensor

    def __init__(self, shape: Sequence[int], width: int = 16) -> None:
        super().__init__()
        self.shape, self.width = tuple(int(size) for size in shape), int(width)
        if len(self.shape) != 3 or min(self.shape) < 1 or self.shape[1] % 4 or self.shape[2] % 4:
            raise ValueError(f"shape is {self.shape}; give (channels, height, width), both sides multiples of 4")
        if width < 8 or width % 8:
            raise ValueError(f"width is {width}; give a multiple of 8")
        self.unet = need("diffusers", "diffusers").UNet2DModel(
            sample_size=self.shape[1:],
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
        )
        self.schedule = DDIMSchedule.linear(TIMESTEPS)
        alphas = self.schedule.alphas_cumprod
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("spread", (1 - alphas).sqrt().float(), persistent=False)
        self.losses: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        signal, spread = self.mixture(t)
        return signal * self.unet(x, t, return_dict=False)[0] + spread * x

    def mixture(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) of timesteps (B,), of shape (B, 1, 1, 1)."""
        return self.signal[t].reshape(-1, 1, 1, 1), self.spread[t].reshape(-1, 1, 1, 1)


def train(
    images: Tensor,
    *,
    width: int = 16,
    updates: int = 2000,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | os.PathLike[str] = True,
) -> Denoiser:
    """Trains a `Denoiser` on batches of 64: mean squared error of v, AdamW, an average of the weights.

    The weights are cached, so a second call loads them. A call that was killed is taken up by the next one where it
    was ten seconds before: the same images, settings and seed give the same weights, killed or not, on the same
    machine with the same number of threads (`torch.set_num_threads`).

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        In [0, 1]; the model is trained on 2·images − 1.
    width : int, default 16
        See `Denoiser`.
    updates : int, default 2000
        The learning rate rises over the first tenth, and falls to 0 along a cosine.
    lr : float, default 2e-3
    seed : int, default 0
    progress : callable, optional
        Called as ``progress(done, total)`` with numbers of updates.
    cache : bool or path, default True
        The folder of the weights and of unfinished training; True is the user's cache folder, False keeps nothing.

    Returns
    -------
    Denoiser
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        Naming the argument.
    FloatingPointError
        When the loss is not finite.

    Examples
    --------
    >>> import torch
    >>> from protofast.ddpm import train
    >>> model = train(torch.rand(10, 1, 8, 8), width=8, updates=2, cache=False)
    >>> len(model.losses)
    2
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; give at least one, (n, channels, height, width)")
    if updates < 1:
        raise ValueError(f"updates is {updates}; give at least 1")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; give a positive number")
    images = images.float().contiguous().cpu()
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images has values outside [0, 1] (or NaN); scale them first")
    with torch.random.fork_rng(devices=[]):  # the layers draw their weights from the global generator
        torch.manual_seed(seed)
        model = Denoiser(images.shape[1:], width)
    path = cached_at(images, width=model.width, updates=updates, lr=lr, seed=seed, cache=cache)
    if path is not None and path.exists():
        try:
            return load(path)
        except (OSError, ValueError):
            pass  # damaged: train again and replace it
    unfinished = None if path is None else path.with_suffix(".unfinished")
    model = _train(model, images, updates, lr, seed, unfinished, progress)
    if path is not None:
        # A full or read-only cache folder costs the next run its time, not this run its result.
        with suppress(OSError):
            about = {"shape": model.shape, "width": model.width, "losses": model.losses}
            _weights.write(path, _FORMAT, model.state_dict(), {"about": json.dumps(about)})
            path.with_suffix(".unfinished").unlink(missing_ok=True)
    return model


def cached_at(images: Tensor, *, cache: bool | str | os.PathLike[str] = True, **settings: Any) -> Path | None:
    """Where `train` keeps the weights that it makes of these images (float32) and settings, all four of them."""
    return _weights.place(cache, "ddpm", [_FORMAT, images.shape, settings], images)


def load(path: str | os.PathLike[str]) -> Denoiser:
    """Reads a model that `train` has cached.

    Raises
    ------
    FileNotFoundError
    ValueError
        When the file is damaged or holds something else.
    """
    state, found = _weights.read(path, _FORMAT, wrong="holds no model of protofast.ddpm; give one that it cached")
    about = json.loads(found["about"])
    model = Denoiser(about["shape"], about["width"])
    model.load_state_dict(state)
    model.losses = about["losses"]
    return model.eval().requires_grad_(False)


def _train(
    model: Denoiser,
    images: Tensor,
    updates: int,
    lr: float,
    seed: int,
    unfinished: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Denoiser:
    average = AveragedModel(model, avg_fn=_blend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    made_by = {"torch": str(torch.__version__), "diffusers": need("diffusers", "diffusers").__version__}
    if unfinished is not None and (state := read_unfinished(unfinished)).get("made_by") == made_by:
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses = state["losses"]
    saved = time.monotonic()
    model.train()
    while (done := len(losses)) < updates:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        t = torch.randint(TIMESTEPS, (BATCH,), generator=generator)
        batch = 2 * images[rows] - 1
        noise = torch.empty_like(batch).normal_(generator=generator)
        signal, spread = model.mixture(t)
        predicted = model.unet(signal * batch + spread * noise, t, return_dict=False)[0]
        loss = (predicted - (signal * noise - spread * batch)).square().mean()
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at update {done + 1} with lr {lr}; give a smaller lr")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (done + 1) / (updates / 10)) * (1 + math.cos(math.pi * done / updates)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if unfinished is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            state = {name: part.state_dict() for name, part in parts.items()}
            with suppress(OSError), replacing(unfinished) as file:
                state |= {"generator": generator.get_state(), "losses": losses, "made_by": made_by}
                torch.save(state, file)
            saved = time.monotonic()
        if progress is not None:
            progress(done + 1, updates)
    result = average.module
    assert isinstance(result, Denoiser)
    result.losses = [sum(part) / len(part) for part in _twentieths(losses)]
    return result.eval().requires_grad_(False)


def _blend(average: Tensor, latest: Tensor, count: Tensor | int) -> Tensor:
    return torch.lerp(latest, average, forgetting(DECAY, int(count)))


def _twentieths(values: list[float]) -> list[list[float]]:
    count = min(20, len(values))
    return [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
