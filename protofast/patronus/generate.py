"""Images of activations: reconstruction, variation, conditional samples, manipulation, extrapolation, interpolation.

An image is two things to a Patronus model: s, what the prototypes see in it, and x_T, the noise that holds all else.
`invert` finds both, `sample` makes an image of them, and the rest is which of the two is changed (arXiv 2503.22782,
sec. 3.3 and 4). All runs are deterministic (η = 0), and each function takes all its images through one sampling loop.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import diffusion
from .model import check_activations, check_images

if TYPE_CHECKING:
    from .config import PatronusConfig
    from .model import Patronus


class Codes(NamedTuple):
    """Images as the model has them, one a row.

    Attributes
    ----------
    activations : Tensor of shape (n, M)
        s, of each prototype by the image's nearest patch.
    noise : Tensor of shape (n, C, H, W)
        x_T, the noise from which s leads to the image.
    """

    activations: Tensor
    noise: Tensor


def strengths(activations: Tensor, quantile: float = 0.99, globally: bool = False) -> Tensor:
    """The activation at which a prototype counts as strongly seen: what "enhancing" sets it to.

    Parameters
    ----------
    activations : Tensor of shape (n, M)
        Of real images, best some thousand of them.
    quantile : float, default 0.99
        Of each prototype's own activations.
    globally : bool, default False
        One strength for all prototypes instead, the highest activation of any (the public code's, which takes it of
        one shuffled batch). A prototype that is never strong is then driven far beyond what images have, and one image
        decides.

    Returns
    -------
    Tensor of shape (M,)

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.generate import strengths
    >>> activations = torch.tensor([[0.1, 2.0], [0.3, 1.0], [0.2, 3.0]])
    >>> strengths(activations, 0.5), strengths(activations, globally=True)
    (tensor([0.2000, 2.0000]), tensor([3., 3.]))
    """
    if not isinstance(activations, Tensor) or not activations.is_floating_point():
        kind = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
        raise TypeError(f"activations is {kind}; give a floating-point torch tensor (n, M)")
    if activations.ndim != 2 or 0 in activations.shape:
        raise ValueError(f"activations has shape {tuple(activations.shape)}; give (n, M), at least one image")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; give a number from 0 to 1")
    if globally:
        return activations.max().expand(activations.shape[1]).clone()
    values = activations.detach().cpu()
    values = values.float() if values.itemsize < 4 else values  # numpy has no bfloat16
    found = np.quantile(values.numpy(), quantile, axis=0)  # torch.quantile ends at 16M values
    return torch.from_numpy(found).to(activations)


def invert(
    model: Patronus,
    images: Tensor,
    num_steps: int = 50,
    *,
    fixed_point: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Codes:
    """Activations of images, and the noise from which they lead back to them (DDIM inversion, Song et al. 2021).

    Parameters
    ----------
    model : Patronus
        In evaluation mode.
    images : Tensor of shape (n, C, H, W)
        In [−1, 1], see `images_of`.
    num_steps : int, default 50
        The number that `sample` will get; 1,000 in the paper.
    fixed_point : int, default 0
        Iterations of a step, each a call of the denoiser, that make the way back exact: see
        `protofast.diffusion.invert`. 0 is the paper's.
    batch_size : int, default 256
    progress : bool, default False

    Returns
    -------
    Codes
        On the images' device.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import invert, sample
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = invert(model, torch.rand(2, 1, 16, 16) * 2 - 1, 4)
    >>> codes.activations.shape, codes.noise.shape
    (torch.Size([2, 5]), torch.Size([2, 1, 16, 16]))
    >>> sample(model, codes.activations, 4, noise=codes.noise).shape
    torch.Size([2, 1, 16, 16])
    """
    check_ready(model)
    check_images(model.config, images)
    images = images.to(_dtype(model))
    activations = model.activations(images, batch_size=batch_size)
    noise = diffusion.invert(
        model,
        images,
        model.schedule,
        num_steps,
        fixed_point=fixed_point,
        prediction_type=model.config.prediction_type,
        cond={"activations": activations},
        batch_size=batch_size,
        device=model.device,
        progress=progress,
    )
    return Codes(activations, noise)


def sample(
    model: Patronus,
    activations: Tensor,
    num_steps: int = 50,
    *,
    noise: Tensor | None = None,
    seed: int | tuple[int, int] = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """An image for each row of activations: of given noise, or (conditional sampling) of fresh noise.

    Parameters
    ----------
    model : Patronus
        In evaluation mode.
    activations : Tensor of shape (n, M)
    num_steps : int, default 50
        DDIM steps; 1,000 in the paper.
    noise : Tensor of shape (n, C, H, W), optional
        x_T.
    seed : int or (int, int), default 0
        Draws the noise where none is given, by counter: image n gets ``normal_noise(…, (seed, n))`` whatever the
        batches. The second number is that of the first image here, so parts of a long run agree with the whole.
    batch_size : int, default 256
    progress : bool, default False

    Returns
    -------
    Tensor of shape (n, C, H, W)
        Clipped to [−1, 1]; on the device of the noise, or else of the activations.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import sample
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> activations = torch.rand(3, 5)
    >>> all_three = sample(model, activations, 4, seed=7)
    >>> torch.allclose(all_three[1:], sample(model, activations[1:], 4, seed=(7, 1)), atol=1e-5)
    True
    """
    check_activations(model.config, activations)
    if noise is None:
        like = torch.empty(len(activations), *model.config.image_shape, dtype=_dtype(model), device=activations.device)
        noise = diffusion.normal_noise(like, seed)
    made = run(model, activations, noise, num_steps, batch_size=batch_size, progress=progress)
    return made.clamp_(-1, 1)


def reconstruct(
    model: Patronus,
    images: Tensor,
    num_steps: int = 50,
    *,
    fixed_point: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Images inverted, and sampled again from the noise found with the same activations.

    What is lost is the error of the inversion, which `num_steps` and `fixed_point` make small.

    Parameters
    ----------
    model, images, num_steps, fixed_point, batch_size, progress
        As in `invert`.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        In [−1, 1].

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import reconstruct
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> reconstruct(model, torch.zeros(2, 1, 16, 16), 4, fixed_point=2).shape
    torch.Size([2, 1, 16, 16])
    """
    codes = invert(model, images, num_steps, fixed_point=fixed_point, batch_size=batch_size, progress=progress)
    return sample(model, codes.activations, num_steps, noise=codes.noise, batch_size=batch_size, progress=progress)


def vary(
    model: Patronus,
    activations: Tensor,
    num_steps: int = 50,
    *,
    count: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Several images for each row of activations, each of fresh noise: what the prototypes leave open.

    Parameters
    ----------
    model, activations, num_steps, batch_size, progress
        As in `sample`.
    count : int, default 5
        Images for each row.
    seed : int, default 0
        Image k of row n gets the noise of number n · count + k.

    Returns
    -------
    Tensor of shape (n, count, C, H, W)
        In [−1, 1].

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import vary
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> vary(model, torch.rand(2, 5), 4, count=3).shape
    torch.Size([2, 3, 1, 16, 16])
    """
    check_activations(model.config, activations)
    count = _count(count, 1)
    repeated = activations.repeat_interleave(count, 0)
    made = sample(model, repeated, num_steps, seed=seed, batch_size=batch_size, progress=progress)
    return made.unflatten(0, (len(activations), count))


def manipulate(
    model: Patronus,
    codes: Codes,
    prototypes: int | Sequence[int] | Tensor,
    values: float | Sequence[float] | Tensor,
    num_steps: int = 50,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Images with the activations of chosen prototypes set to values, all of them at once, from the same noise.

    A prototype is enhanced by its `strengths`, and diminished by 0. To see each prototype alone, use `extrapolate`.

    Parameters
    ----------
    model, num_steps, batch_size, progress
        As in `sample`.
    codes : Codes
        Of `invert`.
    prototypes : int or sequence of int
    values : float, or a sequence of one for each prototype

    Returns
    -------
    Tensor of shape (n, C, H, W)
        In [−1, 1].

    Raises
    ------
    IndexError, ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import invert, manipulate, strengths
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = invert(model, torch.rand(4, 1, 16, 16), 4)
    >>> strong = strengths(codes.activations)
    >>> enhanced = manipulate(model, codes, [0, 3], strong[[0, 3]], 4)
    >>> diminished = manipulate(model, codes, 3, 0, 4)
    >>> enhanced.shape
    torch.Size([4, 1, 16, 16])
    """
    chosen = check_prototypes(model.config, prototypes)
    check_activations(model.config, codes.activations, "codes.activations")
    changed = codes.activations.clone()
    changed[:, chosen] = check_values(values, len(chosen), 1).to(changed)
    return sample(model, changed, num_steps, noise=codes.noise, batch_size=batch_size, progress=progress)


def extrapolate(
    model: Patronus,
    codes: Codes,
    prototypes: int | Sequence[int] | Tensor,
    values: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    num_steps: int = 50,
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Images with the activation of one prototype after the other set to each of several values, from the same noise.

    The paper's figure 7 has values from 0 to 3 in 7 steps. All images × prototypes × values are one run; their noise
    and images are in memory.

    Parameters
    ----------
    model, codes, prototypes, num_steps, batch_size, progress
        As in `manipulate`.
    values : sequence of shape (V,) or (P, V)
        The same for all prototypes, or a row for each.

    Returns
    -------
    Tensor of shape (n, P, V, C, H, W)
        In [−1, 1].

    Raises
    ------
    IndexError, ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import extrapolate, invert
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = invert(model, torch.rand(2, 1, 16, 16), 4)
    >>> extrapolate(model, codes, [0, 3, 4], torch.linspace(0, 3, 7), 4).shape
    torch.Size([2, 3, 7, 1, 16, 16])
    """
    chosen = check_prototypes(model.config, prototypes)
    check_activations(model.config, codes.activations, "codes.activations")
    levels = check_values(values, len(chosen), 2)
    shape = len(codes.activations), *levels.shape
    changed = codes.activations[:, None, None].repeat(1, *levels.shape, 1)
    changed[:, torch.arange(len(chosen)), :, chosen] = levels[:, None].to(changed)  # (P, n, V): indexed axes come first
    noise = codes.noise[:, None, None].expand(*shape, *codes.noise.shape[1:])
    made = sample(
        model, changed.flatten(0, 2), num_steps, noise=noise.flatten(0, 2), batch_size=batch_size, progress=progress
    )
    return made.unflatten(0, shape)


def interpolate(
    model: Patronus,
    first: Codes,
    second: Codes,
    num_steps: int = 50,
    *,
    count: int = 10,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Images on the way from one to another: activations along a line, noise along an arc (`slerp`).

    Parameters
    ----------
    model, num_steps, batch_size, progress
        As in `sample`.
    first, second : Codes
        Of `invert`, as many rows in each: row n of one leads to row n of the other.
    count : int, default 10
        Images on the way, both ends among them.

    Returns
    -------
    Tensor of shape (n, count, C, H, W)
        In [−1, 1].

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import Patronus, PatronusConfig
    >>> from protofast.patronus.generate import Codes, interpolate, invert
    >>> model = Patronus(PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2))).eval()
    >>> codes = invert(model, torch.rand(4, 1, 16, 16), 4)
    >>> first, second = (Codes(*(part[rows] for part in codes)) for rows in ([0, 1], [2, 3]))
    >>> interpolate(model, first, second, 4, count=5).shape
    torch.Size([2, 5, 1, 16, 16])
    """
    for name, codes in (("first", first), ("second", second)):
        check_activations(model.config, codes.activations, f"{name}.activations")
        check_noise(model.config, codes.activations, codes.noise, f"{name}.noise")
    if len(first.activations) != len(second.activations):
        raise ValueError(f"first has {len(first.activations)} rows and second {len(second.activations)}; give as many")
    weights = torch.linspace(0, 1, _count(count, 2), dtype=torch.float64)
    along = weights.to(first.activations)[None, :, None]
    activations = torch.lerp(first.activations[:, None], second.activations[:, None], along)
    noise = slerp(first.noise, second.noise, weights)
    made = sample(
        model,
        activations.flatten(0, 1),
        num_steps,
        noise=noise.flatten(0, 1),
        batch_size=batch_size,
        progress=progress,
    )
    return made.unflatten(0, noise.shape[:2])


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Points on the arcs between vectors: (sin((1 − w)θ)·first + sin(wθ)·second) / sin θ, with θ the angle between.

    Parameters
    ----------
    first, second : Tensor of shape (n, ...)
        Each sample is one vector. Between parallel ones, where sin θ is 0, it is the line; opposite ones have no one
        arc, and get it as well.
    weights : Tensor of shape (K,)
        0 is the first, 1 the second.

    Returns
    -------
    Tensor of shape (n, K, ...)
        Of the dtype of `first`; computed in float64.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.generate import slerp
    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 0.5, 1.0]))
    tensor([[[1.0000, 0.0000],
             [0.7071, 0.7071],
             [0.0000, 1.0000]]])
    """
    if first.shape != second.shape or first.ndim < 2:
        raise ValueError(f"first is of shape {tuple(first.shape)}, second of {tuple(second.shape)}; give both (n, ...)")
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; give (K,)")
    a, b = (vectors.flatten(1).double() for vectors in (first, second))
    u, v = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (a, b))
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos()
    w = weights.to(angle)[None]
    sine = angle.sin()
    line = sine < 1e-6  # where an arc from a vector to one near it is the line, to 1e-12
    sine = torch.where(line, 1.0, sine)
    start = torch.where(line, 1 - w, ((1 - w) * angle).sin() / sine)
    end = torch.where(line, w, (w * angle).sin() / sine)
    points = start[..., None] * a[:, None] + end[..., None] * b[:, None]
    return points.unflatten(2, first.shape[1:]).to(first.dtype)


def run(model: Patronus, activations: Tensor, noise: Tensor, num_steps: int, **more: Any) -> Tensor:
    """`protofast.diffusion.sample` of the model, after checks, with what else that takes; images are not clipped."""
    check_activations(model.config, activations)
    check_noise(model.config, activations, noise)
    check_ready(model)
    return diffusion.sample(
        model,
        noise.to(_dtype(model)),
        model.schedule,
        num_steps,
        prediction_type=model.config.prediction_type,
        cond={"activations": activations.to(_dtype(model))},
        device=model.device,
        **more,
    )


def check_ready(model: Patronus) -> None:
    """Raises in training mode, in which dropout would make other images of the same noise."""
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")


def check_prototypes(config: PatronusConfig, prototypes: int | Sequence[int] | Tensor) -> Tensor:
    """Numbers of prototypes, (P,) int64; raises unless there are some, each once, all of the model."""
    given = np.atleast_1d(np.asarray(prototypes.tolist() if isinstance(prototypes, Tensor) else prototypes))
    if given.size == 0:
        raise ValueError("prototypes is empty; give at least one")
    if given.ndim > 1 or given.dtype.kind not in "iu":
        raise TypeError(f"prototypes is {prototypes!r}; give an int or a sequence of ints")
    if given.min() < 0 or given.max() >= config.num_prototypes:
        wrong = next(int(number) for number in given if not 0 <= number < config.num_prototypes)
        raise IndexError(f"prototypes has {wrong}; the model has 0 to {config.num_prototypes - 1}")
    if len(np.unique(given)) < len(given):
        raise ValueError(f"prototypes has a number twice in {given.tolist()}; give each once")
    return torch.from_numpy(given.astype(np.int64))


def check_values(values: object, count: int, axes: int) -> Tensor:
    """Activations to set `count` prototypes to, (count,) or, of two axes, (count, V); raises for any other shape."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"values is {values!r}; give numbers") from error
    wanted = f"one number, or ({count},)" if axes == 1 else f"(V,) or ({count}, V)"
    if found.ndim > axes or found.ndim < axes - 1 or not found.numel():
        raise ValueError(f"values has shape {tuple(found.shape)}; give {wanted}")
    if found.ndim == axes and len(found) != count:
        raise ValueError(f"values has shape {tuple(found.shape)}, for {count} prototypes; give {wanted}")
    if not bool(found.isfinite().all()):
        raise ValueError("values has numbers that are not finite")
    return found if found.ndim == axes else found.expand(count, *found.shape)


def check_noise(config: PatronusConfig, activations: Tensor, noise: Tensor, name: str = "noise") -> None:
    wanted = len(activations), *config.image_shape
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{name} is {kind}; give a floating-point torch tensor")
    if noise.shape != wanted:
        raise ValueError(f"{name} has shape {tuple(noise.shape)}; give {wanted}, one for each row of activations")


def _count(count: int, least: int) -> int:
    if operator.index(count) < least:
        raise ValueError(f"count is {count}; give at least {least}")
    return operator.index(count)


def _dtype(model: Patronus) -> torch.dtype:
    return model.prototypes.prototype_vectors.dtype
