"""Criteria: how familiar an anchor is to a model (intrinsic), how well it is reproduced (extrinsic).

Every criterion is a function of named batches, (B, …) → (B,); smaller means more familiar, or better reproduced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._optional import need

KINDS = ("intrinsic", "extrinsic")


class CriteriaError(ValueError):
    """A criterion is NaN or infinite for some anchors or generations.

    Attributes
    ----------
    criteria : dict of str to ndarray
        The anchors' criteria, as far as they were computed: nothing is lost.
    """

    def __init__(self, message: str, criteria: dict[str, np.ndarray]) -> None:
        super().__init__(message)
        self.criteria = criteria


@dataclass(frozen=True)
class Criterion:
    """A named criterion.

    Attributes
    ----------
    name : str
    kind : {"intrinsic", "extrinsic"}
    function : callable
        Takes the tensors named in `needs`, in that order, each (B, …), and returns (B,). When it has a keyword
        ``value_range``, it is told the images' lowest and highest value.
    needs : tuple of str
        "images" and "reconstruction" always exist; what else there is depends on the adapter
        (its ``provides``).
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    needs: tuple[str, ...]

    def __call__(self, state: Mapping[str, Tensor]) -> Tensor:
        """Value of each sample of an analysed batch, (B,) float64 on the CPU."""
        arguments = [state[name] for name in self.needs]
        values = self.function(*arguments)
        count = len(state["images"])
        if not isinstance(values, Tensor) or values.shape != (count,):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"criterion {self.name!r} returned {got} for a batch of {count}; it must return a tensor of shape "
                f"({count},), one value a sample"
            )
        return values.detach().to("cpu", torch.float64)


CRITERIA: dict[str, Criterion] = {}
"""Name to criterion; extend it with `register_criterion`."""


def register_criterion(
    name: str,
    function: Callable[..., Tensor],
    kind: str,
    needs: tuple[str, ...] | None = None,
) -> Criterion:
    """Makes a function available to `explain` under a name.

    Parameters
    ----------
    name : str
    function : callable
        (B, …) tensors → (B,); smaller is more familiar, or better reproduced.
    kind : {"intrinsic", "extrinsic"}
    needs : tuple of str, optional
        Arguments of the function; by default ("images",) for an intrinsic criterion and
        ("images", "reconstruction") for an extrinsic one.

    Returns
    -------
    Criterion

    Raises
    ------
    ValueError
        When the name is taken or the kind unknown.

    Examples
    --------
    >>> import protofast as pf
    >>> worst = pf.pxgen.register_criterion(
    ...     "worst_pixel", lambda x, y: (x - y).abs().flatten(1).amax(1), "extrinsic"
    ... )
    >>> worst.needs
    ('images', 'reconstruction')
    """
    if name in CRITERIA:
        raise ValueError(f"name is {name!r}, which is registered already; choose another")
    CRITERIA[name] = _make(name, function, kind, needs)
    return CRITERIA[name]


def _make(name: str, function: Callable[..., Tensor], kind: str, needs: tuple[str, ...] | None) -> Criterion:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose 'intrinsic' or 'extrinsic'")
    default = ("images",) if kind == "intrinsic" else ("images", "reconstruction")
    return Criterion(name, kind, function, default if needs is None else tuple(needs))


def resolve(
    wanted: str | Criterion | Callable[..., Tensor] | Iterable[Any], kind: str, value_range: tuple[float, float]
) -> list[Criterion]:
    """The criteria meant by names, `Criterion` objects or bare functions."""
    items = [wanted] if isinstance(wanted, str | Criterion) or callable(wanted) else list(wanted)
    if not items:
        raise ValueError(f"{kind} is empty; give at least one criterion")
    found = []
    for item in items:
        if isinstance(item, str):
            if item not in CRITERIA:
                raise ValueError(f"{kind} has {item!r}; registered are {', '.join(CRITERIA)} (see register_criterion)")
            item = CRITERIA[item]
        elif not isinstance(item, Criterion):
            if not callable(item):
                raise TypeError(f"{kind} has a {type(item).__name__}; give names, functions or Criterion objects")
            item = _make(getattr(item, "__name__", type(item).__name__), item, kind, None)
        if item.kind != kind:
            raise ValueError(f"{kind} has {item.name!r}, which is an {item.kind} criterion")
        if _takes_range(item.function):
            item = replace(item, function=functools.partial(item.function, value_range=value_range))
        found.append(item)
    return found


def _takes_range(function: Callable[..., Tensor]) -> bool:
    try:
        return "value_range" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False


def kld(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = −½ Σ (1 + log σ² − μ² − σ²), over all latent dimensions; (B, …) twice → (B,)."""
    mean, log_variance = mean.double(), log_variance.double()
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).flatten(1).sum(1)


def negative_log_prior(latent: Tensor) -> Tensor:
    """½‖z‖², which is −log N(z; 0, I) up to a constant; (B, …) → (B,)."""
    return 0.5 * latent.double().square().flatten(1).sum(1)


def sse(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Σ (x − x̂)² over channels and pixels, what the paper's code calls MSE; (B, …) twice → (B,)."""
    return (images - reconstruction).flatten(1).square().sum(1, dtype=torch.float64)


def mse(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean of (x − x̂)² over channels and pixels; (B, …) twice → (B,). Gives the same groups as `sse`."""
    return sse(images, reconstruction) / images[0].numel()


def mae(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean of |x − x̂| over channels and pixels; (B, …) twice → (B,)."""
    return (images - reconstruction).flatten(1).abs().sum(1, dtype=torch.float64) / images[0].numel()


def dssim(images: Tensor, reconstruction: Tensor, *, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """(1 − SSIM) / 2, in [0, 1]; (B, C, H, W) twice → (B,).

    The window is Gaussian, 11 × 11 with σ = 1.5 (Wang et al. 2004); on images with a side under 11 it shrinks to
    the largest odd size that fits.
    """
    ssim = need("torchmetrics.functional.image", "pxgen").structural_similarity_index_measure
    side = min(images.shape[-2:])
    size = min(11, side - 1 + side % 2)
    # torchmetrics takes the window's size from σ: 2·int(3.5 σ + ½) + 1.
    sigma = 1.5 if size == 11 else (size // 2) / 3.5
    span = value_range[1] - value_range[0]
    # Only windows inside the image count, as in the original; torchmetrics pads, and has averaged both ways.
    arguments = {"sigma": sigma or 1e-3, "data_range": span, "reduction": "none", "return_full_image": True}
    full = ssim(reconstruction.double(), images.double(), **arguments)[1]
    edge = size // 2
    inside = full[..., edge : full.shape[-2] - edge, edge : full.shape[-1] - edge]
    return (1 - inside.flatten(1).mean(1)) / 2


def feature_distance(extractor: Callable[[Tensor], Tensor], name: str = "feature_distance") -> Criterion:
    """‖f(x) − f(x̂)‖², squared distance of features: the Fréchet distance (FID) of two single images.

    Parameters
    ----------
    extractor : callable
        Images (B, C, H, W) → features (B, …), for example a frozen network without its head.
    name : str
        Under which the report shows it.

    Returns
    -------
    Criterion
        An extrinsic one, to be given to ``explain(..., extrinsic=...)``.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> halves = pf.pxgen.feature_distance(lambda x: x.mean(-1))
    >>> halves({"images": torch.ones(2, 1, 4, 4), "reconstruction": torch.zeros(2, 1, 4, 4)}).tolist()
    [4.0, 4.0]
    """
    if not callable(extractor):
        raise TypeError(f"extractor is a {type(extractor).__name__}; give a function of images (B, C, H, W)")
    if isinstance(extractor, torch.nn.Module):
        extractor.eval()

    def distance(images: Tensor, reconstruction: Tensor) -> Tensor:
        features, other = extractor(images), extractor(reconstruction)
        return (features.double() - other.double()).square().flatten(1).sum(1)

    return Criterion(name, "extrinsic", distance, ("images", "reconstruction"))


def _needs_extractor(*_: Tensor) -> Tensor:
    raise ValueError("criterion 'feature_distance' has no extractor; give extrinsic=pxgen.feature_distance(extractor)")


ALEXNET = "alexnet-owt-7be5be79.pth"


def lpips(images: Tensor, reconstruction: Tensor, *, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018) on AlexNet; (B, 1 or 3, H, W) twice, sides ≥ 32 → (B,).

    Nothing is downloaded: torchvision's AlexNet weights have to lie in torch's hub folder.
    """
    network = _lpips_network(str(images.device))
    low, high = value_range

    def prepared(x: Tensor) -> Tensor:
        return ((x.float() - low) / (high - low)).clamp(0, 1).mul(2).sub(1).expand(-1, 3, -1, -1)

    if images.shape[1] not in (1, 3) or min(images.shape[-2:]) < 32:
        raise ValueError(
            f"criterion 'lpips' got images of shape {tuple(images.shape)}; it needs 1 or 3 channels and sides of 32 "
            "or more. For small images use 'mse' or 'ssim'"
        )
    return network(prepared(images), prepared(reconstruction)).flatten()


@functools.cache
def _lpips_network(device: str) -> torch.nn.Module:
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        cure = "pip install torchvision, in the version made for this torch"
        raise ImportError(
            f"criterion 'lpips' needs torchvision, and it could not be imported ({error}): {cure}"
        ) from error
    lpip = need("torchmetrics.image.lpip", "pxgen")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.exists():
        raise FileNotFoundError(
            f"criterion 'lpips' needs AlexNet's weights at {weights}; put torchvision's {ALEXNET} there "
            "(python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")' fetches it)"
        )
    return lpip.LearnedPerceptualImagePatchSimilarity("alex").net.to(device).eval()


register_criterion("kld", kld, "intrinsic", ("mean", "log_variance"))
register_criterion("latent_nll", negative_log_prior, "intrinsic", ("latent",))
register_criterion("inversion_nll", negative_log_prior, "intrinsic", ("inverted",))
register_criterion("denoising_loss", lambda loss: loss, "intrinsic", ("denoising_loss",))
register_criterion("mse", mse, "extrinsic")
register_criterion("sse", sse, "extrinsic")
register_criterion("mae", mae, "extrinsic")
register_criterion("ssim", dssim, "extrinsic")
register_criterion("dssim", dssim, "extrinsic")
register_criterion("lpips", lpips, "extrinsic")
register_criterion("feature_distance", _needs_extractor, "extrinsic")
