"""The paper's variational autoencoder (arXiv 2501.11827, first experiment), and the cache of its trained weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _weights

BATCH = 50
PAPER_IMAGES = 4000
PAPER_EPOCHS = 35
_FORMAT = "protofast-vae-1"


class VAE(nn.Module):
    """Fully connected VAE: image–400–400–latent and back, LeakyReLU(0.2), sigmoid output.

    Parameters
    ----------
    shape : sequence of int
        Shape of one image, (C, H, W) or any other; values in [0, 1].
    latent : int, optional
        Latent dimensions. By default 200 at the paper's 28×28 and in proportion below (16 at 8×8), at most 200.
    hidden : int, default 400

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen.vae import VAE
    >>> model = VAE((1, 8, 8))
    >>> mean, log_variance = model.encode(torch.rand(5, 1, 8, 8))
    >>> mean.shape, model.decode(mean).shape
    (torch.Size([5, 16]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(self, shape: Sequence[int], latent: int | None = None, hidden: int = 400) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        pixels = int(torch.Size(self.shape).numel())
        if pixels < 1:
            raise ValueError(f"shape is {self.shape}; every side must be at least 1")
        self.latent = min(200, max(2, round(200 * pixels / 784))) if latent is None else int(latent)
        if self.latent < 1:
            raise ValueError(f"latent is {latent}; give at least 1")
        self.hidden = int(hidden)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)
        )
        self.mean = nn.Linear(hidden, self.latent)
        self.log_variance = nn.Linear(hidden, self.latent)
        self.decoder = nn.Sequential(
            nn.Linear(self.latent, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, pixels),
            nn.Sigmoid(),
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), both (B, latent), of images (B, *shape)."""
        if tuple(images.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"images have shape {tuple(images.shape)}; this VAE was built for (B, {wanted})")
        hidden = self.encoder(images)
        return self.mean(hidden), self.log_variance(hidden)

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, *shape) in [0, 1] of codes (B, latent)."""
        return self.decoder(codes).unflatten(1, self.shape)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from one sampled code, with the mean and log variance it was drawn from."""
        mean, log_variance = self.encode(images)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return self.decode(mean + (log_variance / 2).exp() * noise), mean, log_variance


def train_vae(
    images: Tensor,
    *,
    latent: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    cache: bool | str | os.PathLike[str] = True,
) -> VAE:
    """Trains the paper's VAE: binary cross-entropy + KL divergence (sums), Adam 1e-3, batches of 50.

    The same images, settings and seed give the same weights on a machine, and the weights are cached: a second call
    loads them.

    Parameters
    ----------
    images : Tensor of shape (n, *shape)
        In [0, 1]; uint8 is scaled. At most 4,000 are used, drawn by the seed from more.
    latent : int, optional
        As for `VAE`.
    epochs : int, optional
        By default the paper's 35 or, of fewer than 4,000 images, as many as give the paper's 2,800 updates.
    seed : int, default 0
    progress : callable, optional
        Called as ``progress(done, total)`` with numbers of updates.
    cache : bool or path, default True
        The folder of the cache; True is the user's cache folder, False trains anew and keeps nothing. A file in
        it that is damaged is trained again and replaced.

    Returns
    -------
    VAE
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        When there are no images, or values lie outside [0, 1] or are NaN.

    References
    ----------
    Kingma, Welling 2014, "Auto-Encoding Variational Bayes", eq. 10; PXGen, arXiv 2501.11827, section 5.

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen.vae import train_vae
    >>> model = train_vae(torch.rand(60, 1, 8, 8), epochs=1, cache=False)
    >>> model.latent
    16
    """
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; give at least one image, (n, channels, height, width)"
        )
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; give at least 1")
    generator = torch.Generator().manual_seed(seed)
    if len(images) > PAPER_IMAGES:
        images = images[torch.randperm(len(images), generator=generator)[:PAPER_IMAGES].sort().values]
    images = (images.float() / 255 if images.dtype == torch.uint8 else images.float()).contiguous().cpu()
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            "images has values outside [0, 1] (or NaN), which binary cross-entropy cannot take; scale them first"
        )
    batches = -(-len(images) // BATCH)
    if epochs is None:
        epochs = max(PAPER_EPOCHS, round(PAPER_EPOCHS * PAPER_IMAGES / BATCH / batches))
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws its weights from the global generator
        torch.manual_seed(seed)
        model = VAE(images.shape[1:], latent)

    settings = {"shape": model.shape, "latent": model.latent, "hidden": model.hidden, "epochs": epochs, "seed": seed}
    path = _weights.place(cache, "vae", [_FORMAT, settings], images)
    if path is not None and path.exists():
        try:
            return load_vae(path)
        except (OSError, ValueError):
            pass  # damaged: train again and replace it

    with _one_thread():
        _train(model, images, epochs, generator, progress)
    model.eval().requires_grad_(False)
    if path is not None:
        # A full or read-only cache folder costs the next run its time, not this run its result.
        with suppress(OSError):
            save_vae(model, path)
    return model


def _train(
    model: VAE, images: Tensor, epochs: int, generator: torch.Generator, progress: Callable[[int, int], None] | None
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    done, total = 0, epochs * -(-len(images) // BATCH)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            batch = images[rows]
            output, mean, log_variance = model(batch, generator)
            divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
            loss = F.binary_cross_entropy(output, batch, reduction="sum") + divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress is not None:
                progress(done, total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside the block: batches this small gain little from more, and more would round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_vae(model: VAE, path: str | os.PathLike[str]) -> None:
    """Writes a VAE as safetensors, whole or not at all, with its sizes and a checksum."""
    sizes = {"shape": model.shape, "latent": model.latent, "hidden": model.hidden}
    _weights.write(path, _FORMAT, model.state_dict(), {"sizes": json.dumps(sizes)})


def load_vae(path: str | os.PathLike[str]) -> VAE:
    """Reads a VAE that `save_vae` wrote.

    Raises
    ------
    FileNotFoundError
    ValueError
        When the file is damaged or holds something else.
    """
    wrong = "holds no protofast VAE; load other models by --model module:function"
    state, about = _weights.read(path, _FORMAT, wrong=wrong)
    model = VAE(**json.loads(about["sizes"]))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
