"""The model: prototype encoder, prototype layer, and a denoiser that is told the activations."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _weights
from .._files import replacing
from .._optional import need
from ..ddim import DDIMSchedule
from ..nn import PrototypeLayer
from ..prototype import PrototypeActivation
from .config import PatronusConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_FORMAT = "protofast-patronus-1"
_CURE = "give a folder that `protofast patronus train` wrote"


class Patronus(nn.Module):
    """Patronus: a diffusion model conditioned on what learned patch prototypes see (arXiv 2503.22782).

    An image becomes s, the activation of each prototype by the image's nearest patch (eq. 1 to 3), and a denoiser that
    is told s and the timestep removes the noise. Encoder, prototypes and denoiser are trained together, without
    labels.

    Parameters
    ----------
    config : PatronusConfig
        Or the name of one in `PRESETS`.

    Attributes
    ----------
    config : PatronusConfig
    encoder : nn.Sequential
        Convolutions and ReLUs: (B, C, H, W) → (B, D, *grid).
    prototypes : protofast.nn.PrototypeLayer
    denoiser : Denoiser
    schedule : DDIMSchedule

    Notes
    -----
    Images are in [−1, 1] everywhere in this package; `protofast.patronus.images_of` makes them of a data set.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2)))
    >>> images = torch.rand(2, 1, 16, 16) * 2 - 1
    >>> activations = model.encode(images)
    >>> activations.shape
    torch.Size([2, 5])
    >>> model(images, torch.tensor([10, 999]), activations).shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(self, config: PatronusConfig | str) -> None:
        super().__init__()
        if isinstance(config, str):
            from .config import PRESETS

            if config not in PRESETS:
                raise ValueError(f"config is {config!r}; choose one of {', '.join(PRESETS)}, or give a PatronusConfig")
            config = PRESETS[config]
        self.config = config
        self.encoder = prototype_encoder(config)
        self.prototypes = PrototypeLayer(config.num_prototypes, config.channels, eps=config.eps)
        self.denoiser = Denoiser(config)
        scale = 1000 / config.timesteps
        self.schedule = DDIMSchedule.linear(config.timesteps, 1e-4 * scale, min(0.02 * scale, 0.999))

    @property
    def device(self) -> torch.device:
        return self.prototypes.prototype_vectors.device

    def encode(self, images: Tensor, *, return_all: bool = False) -> Any:
        """Activations s (B, M) of images in [−1, 1]; with `return_all` also distances and patch indices.

        Outside autocast always, as in the public code: half precision would round the small distances that matter.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.prototypes(self.encoder(images), return_all=return_all)

    def forward(self, x: Tensor, t: Tensor, activations: Tensor) -> Tensor:
        """What the denoiser predicts of noised images x at timesteps t: ``config.prediction_type``, of x's shape.

        This is the ``model(x, t, **cond)`` of `protofast.diffusion`, with ``cond={"activations": s}``.
        """
        return self.denoiser(x, t, activations)

    @torch.no_grad()
    def activations(self, images: Tensor, *, batch_size: int = 512, return_all: bool = False) -> Any:
        """`encode` in batches without gradients, on the model's device; results on the images' device."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        check_images(self.config, images)
        like = self.prototypes.prototype_vectors
        parts = [self.encode(part.to(like), return_all=True) for part in images.split(batch_size)]
        found = PrototypeActivation(*(torch.cat(columns).to(images.device) for columns in zip(*parts, strict=True)))
        return found if return_all else found.activation

    def save_pretrained(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, each whole or not at all.

        Parameters
        ----------
        folder : path
            Made if it is not there.
        **about
            What is to be known of the model, as JSON: kept in the config file beside the sizes.
        """
        folder = Path(folder)
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        _weights.write(folder / WEIGHTS, _FORMAT, state, {})
        content = {"format": _FORMAT, **self.config.to_dict(), **({"about": about} if about else {})}
        with replacing(folder / CONFIG) as file:  # last: with it the folder is complete
            file.write(json.dumps(content, indent=1).encode())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Patronus:
        """Reads what `save_pretrained` wrote, in evaluation mode and without gradients.

        Raises
        ------
        FileNotFoundError
        ValueError
            When a file is damaged or of something else.
        """
        folder = Path(folder)
        values = read_config(folder)
        values.pop("about", None)
        config = PatronusConfig.from_dict(values)
        state, _ = _weights.read(folder / WEIGHTS, _FORMAT, wrong=f"holds no Patronus model; {_CURE}")
        model = cls(config)
        model.load_state_dict(state)
        return model.to(device).eval().requires_grad_(False)


class Denoiser(nn.Module):
    """diffusers' UNet2DModel, with an embedding of the activations added to that of the timestep.

    The paper's blocks add W_t·SiLU(e_t) + W_c·SiLU(e_c), two linear maps; this one adds W·SiLU(e_t + e_c).
    benchmarks/patronus_denoiser.py compares the two at equal updates.
    """

    def __init__(self, config: PatronusConfig) -> None:
        super().__init__()
        channels = config.image_shape[0] * config.patch**2
        count = len(config.multipliers)
        self.unet = need("diffusers", "patronus").UNet2DModel(
            sample_size=tuple(side // config.patch for side in config.image_shape[1:]),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(config.width * factor for factor in config.multipliers),
            down_block_types=("DownBlock2D",) * count,
            up_block_types=("UpBlock2D",) * count,
            layers_per_block=config.layers,
            norm_num_groups=config.groups,
            dropout=config.dropout,
            add_attention=config.attention,
            attention_head_dim=config.width * config.multipliers[-1] // 4,  # four heads
            class_embed_type="identity",
        )
        inner = 4 * config.width
        self.condition = nn.Sequential(nn.Linear(config.num_prototypes, inner), nn.SiLU(), nn.Linear(inner, inner))
        self.patch = config.patch

    def forward(self, x: Tensor, t: Tensor, activations: Tensor) -> Tensor:
        embedded = self.condition(activations)
        if self.patch == 1:
            return self.unet(x, t, class_labels=embedded, return_dict=False)[0]
        squares = nn.functional.pixel_unshuffle(x, self.patch)
        output = self.unet(squares, t, class_labels=embedded, return_dict=False)[0]
        return nn.functional.pixel_shuffle(output, self.patch)


def prototype_encoder(config: PatronusConfig) -> nn.Sequential:
    """The paper's encoder: convolutions, each with ReLU, also the last; weights N(0, 0.1²)."""
    channels = [config.image_shape[0], *(layer[0] for layer in config.encoder)]
    layers: list[nn.Module] = []
    for (before, after), (_, kernel, stride, padding) in zip(pairwise(channels), config.encoder, strict=True):
        convolution = nn.Conv2d(before, after, kernel, stride, padding)
        nn.init.normal_(convolution.weight, 0.0, 0.1)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Of `config.json`: the sizes, and "about" if something was to be known."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_CURE}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_CURE}") from None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is of no Patronus model; {_CURE}")
    return values


def check_images(config: PatronusConfig, images: Tensor, name: str = "images") -> None:
    """Raises unless these are images of the model: (n, C, H, W), in [−1, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} is a {type(images).__name__}; give a torch tensor")
    if images.ndim != 4 or tuple(images.shape[1:]) != config.image_shape:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; the model takes images of {config.image_shape}")
    if not images.is_floating_point():
        raise TypeError(f"{name} is {images.dtype}; give floating point in [−1, 1]")
    if len(images) and not bool(((images >= -1) & (images <= 1)).all()):
        raise ValueError(f"{name} has values outside [−1, 1] (or NaN); `patronus.images_of` scales a data set")


def check_activations(config: PatronusConfig, activations: Tensor, name: str = "activations") -> None:
    """Raises unless this is (n, M) finite activations."""
    if not isinstance(activations, Tensor) or not activations.is_floating_point():
        kind = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
        raise TypeError(f"{name} is {kind}; give a floating-point torch tensor")
    if activations.ndim != 2 or activations.shape[1] != config.num_prototypes:
        raise ValueError(f"{name} has shape {tuple(activations.shape)}; give (n, {config.num_prototypes})")
    if not bool(activations.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
