"""What a trained model is worth, by numbers that need no other network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion import LoopStep, invert, normal_noise, sample
from .training import Denoiser

BATCH = 64


def evaluate(
    model: Denoiser,
    images: Tensor,
    held_out: Tensor,
    steps: Sequence[int] = (10, 20, 50),
    *,
    samples: int = 500,
    inverted: int = 64,
    fixed_point: int = 10,
    seed: int = 0,
    progress: Callable[[str, int], Callable[[int], None]] = lambda description, total: lambda count: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples and inverts by DDIM (eta 0, no clipping), and measures both.

    Of samples: mean and standard deviation of the pixels, and the accuracy of a 1-nearest-neighbour classifier that
    tells them from held-out images by their pixels, leaving one out (Lopez-Paz and Oquab 2017, "Revisiting Classifier
    Two-Sample Tests"): 0.5 for the same distribution, 1 where every image is nearest to its own kind, and below 0.5
    for copies. Of inversion: what is left between a held-out image and itself, inverted and sampled again.
    Values are in [0, 1], samples clipped to it at the end.

    Parameters
    ----------
    model : Denoiser
    images, held_out : Tensors of shape (n, C, H, W) and (m, C, H, W)
        In [0, 1]: what the model was trained on, and what it was not. Of both, `samples` are drawn (all, of fewer).
    steps : sequence of int
        Numbers of DDIM steps, timesteps trailing.
    samples, inverted : int
        Images sampled from each number of steps, and held-out images inverted.
    fixed_point : int, default 10
        Iterations of a step of the second inversion (`protofast.diffusion.invert`); the first is plain.
    seed : int, default 0
        Of the draws, and of the noise, which is the same for every number of steps.
    progress : callable, optional
        ``progress(description, total)`` returns a function to call with what was done since.

    Returns
    -------
    numbers : dict
        ``"held_out"`` and a list ``"samples"`` with ``mean``, ``std`` and ``nearest_neighbour_accuracy``, that of
        ``"held_out"`` against images; and a list ``"inversion"``, ``plain`` and ``fixed_point``, with ``rmse`` over
        all pixels and ``worst`` of an image. ``residual`` is the largest that `invert` reports, in the model's range.
    pictures : dict
        Tensors in [0, 1]: ``"held_out"`` and ``"inverted"``, the held-out images compared and inverted; by number of
        steps ``"samples"``, and ``"inversion"``, the pair of plain and fixed point.

    Examples
    --------
    >>> import torch
    >>> from protofast.ddpm import Denoiser, evaluate
    >>> images = torch.rand(6, 1, 8, 8)
    >>> numbers, pictures = evaluate(Denoiser((1, 8, 8), width=8).eval(), images, images, [2], samples=6, inverted=3)
    >>> numbers["samples"][0]["steps"], pictures["inversion"][2][0].shape
    (2, torch.Size([3, 1, 8, 8]))
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(among: Tensor, count: int) -> Tensor:  # neighbours in a file may be alike, as a writer's digits are
        return among[torch.randperm(len(among), generator=generator)[:count]]

    images, held_out, x = draw(images, samples), draw(held_out, samples), 2 * draw(held_out, inverted) - 1
    noise = normal_noise(held_out.new_empty(samples, *model.shape), seed)
    numbers: dict[str, Any] = {"held_out": _describe(held_out, images), "samples": [], "inversion": []}
    pictures: dict[str, Any] = {"held_out": held_out, "samples": {}, "inverted": _pixels(x), "inversion": {}}

    def run(what: str, function: Callable[..., Tensor], start: Tensor, count: int, **settings: Any) -> Tensor:
        advance = progress(f"{what}, {count} steps", count * -(-len(start) // BATCH))

        def watch(number: int, timestep: int, step: LoopStep) -> None:
            advance(1)
            if step.residual is not None:
                residuals.append(float(step.residual.max()))

        return function(model, start, model.schedule, count, batch_size=BATCH, callback=watch, **settings)

    for count in steps:
        pictures["samples"][count] = made = _pixels(run("sampling", sample, noise, count))
        numbers["samples"].append({"steps": count, **_describe(made, held_out)})
    for count in steps:
        entry: dict[str, Any] = {"steps": count}
        rebuilt: list[Tensor] = []
        residuals: list[float] = []
        for name, iterations in (("plain", 0), ("fixed_point", fixed_point)):
            found = run(f"inverting ({name.replace('_', ' ')})", invert, x, count, fixed_point=iterations)
            back = run("sampling again", sample, found, count)
            # Before clipping, which would hide a part of the error.
            square = ((back - x) / 2).square().flatten(1).mean(1)
            entry[name] = {"rmse": float(square.mean().sqrt()), "worst": float(square.max().sqrt())}
            rebuilt.append(_pixels(back))
        entry["fixed_point"]["residual"] = max(residuals, default=0.0)
        numbers["inversion"].append(entry)
        pictures["inversion"][count] = rebuilt
    return numbers, pictures


def nearest_neighbour_accuracy(first: Tensor, second: Tensor) -> float:
    """Share of images whose nearest other one, in pixels, is of their own set; ties count for the first set."""
    points = torch.cat([first, second]).flatten(1).double()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    of_first = torch.arange(len(points)) < len(first)
    return float((of_first[distance.argmin(1)] == of_first).double().mean())


def _describe(images: Tensor, others: Tensor) -> dict[str, float]:
    count = min(len(images), len(others))  # chance is one half only for sets of one size
    accuracy = nearest_neighbour_accuracy(images[:count], others[:count])
    return {"mean": float(images.mean()), "std": float(images.std()), "nearest_neighbour_accuracy": accuracy}


def _pixels(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1)
