"""Images of noise."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._backend import overload
from .._files import digest
from ..ddim import DDIMSchedule, _more, check_schedule, ddim_step
from .loop import Callback, LoopStep, check_out, place, run
from .noising import add_noise, check_sample, timesteps
from .predictor import Predictor


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    schedule: DDIMSchedule,
    num_steps: int,
    *,
    spacing: str | Sequence[int] = "trailing",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | tuple[int, int] | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | tuple[float, float] | None = None,
    dynamic_threshold: float | tuple[float, float] | None = None,
    use_clipped_model_output: bool = False,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    bitwise: bool = False,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    resume: str | os.PathLike[str] | None = None,
    compile: bool | str = False,
    cuda_graph: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    backend: str | None = None,
) -> Tensor:
    """Images of given noise, by `num_steps` DDIM steps (Song et al. 2021, eq. 12).

    No gradient is kept. The model is called as it stands: put it in ``eval()`` first. It may not write to `x`. Without
    a callback the steps are taken in place, so a model that keeps `x` for later has to copy it.

    Parameters
    ----------
    model : callable
        ``model(x, t, **cond)`` returns the prediction, a Tensor of x's shape; `t` is an int64 Tensor (B,).
    noise : Tensor of shape (N, ...)
        Floating point; standard normal for a fresh image, or what `invert` returned. Not written to. It may be
        mapped from a file, ``torch.from_numpy(numpy.load(path, mmap_mode="c"))``.
    schedule : DDIMSchedule
    num_steps : int
        Calls of the model.
    spacing : str or sequence of int, default "trailing"
        See `timesteps`.
    eta : float, default 0
        Noise added at each step, 0 (deterministic) to 1 (ancestral); eq. 16.
    generator : torch.Generator, optional
        Draws that noise, on its own device, batch after batch. Neither it nor `seed`: torch's own generator.
    seed : int or (int, int), optional
        Draws that noise within the step, by counter: sample n gets, at step k, ``normal_noise(…, (seed, k << 32 | n))``
        however the samples are split. The second number is that of the first sample here, 0 if left out: parts of a
        run that are computed apart are those of the whole. Below 2⁶³ and 2³². Not the seed of `noise` itself, if
        `normal_noise` drew it: step 0 would get the same numbers again.
    prediction_type : {"epsilon", "sample", "v_prediction"}
    clip_range, dynamic_threshold, use_clipped_model_output, bitwise
        As in `ddim_step`.
    guidance_scale : float, optional
        Classifier-free guidance, uncond + scale · (cond − uncond). The model then sees a batch of 2B, unconditional
        half first.
    guidance_rescale : float, default 0
        As in `ddim_step`.
    cond : mapping, optional
        Keyword arguments of the model. A Tensor whose first axis is N has a row for each sample, and is split into
        batches with them. All else goes to every call as it is (a Tensor: on `device`).
    uncond : mapping, optional
        The same keys for the unconditional half; needed exactly when `guidance_scale` is given. Tensors with a row for
        each sample are concatenated with those of `cond`; what else there is must be equal in both.
    known, mask : Tensor of the noise's shape, and bool Tensor that broadcasts to it, optional
        Inpainting, beside the noise: pixels where `mask` is False come out as those of `known`. At each step they are
        `known`, noised to its timestep with `noise`.
    batch_size : int, optional
        Samples in one call of the model, half as many as it sees under guidance; by default all. A last batch may be
        smaller.
    device : device, optional
        Where the model is; by default where `noise` is. Batches are moved there, and their results back.
    out : Tensor of the noise's shape and dtype, optional
        Where the images go, on any device; may be mapped from a file (``numpy.lib.format.open_memmap``).
    resume : path, optional
        A folder for what is done: each finished batch, and the last step of the one under way, written whole or not
        at all. A run that ended (killed, or by an exception from the callback) goes on there when the call is
        repeated, with the same bits if the model repeats its own; the callback is not called again for what is done.
        The folder stays when the run is complete, and the same call then only reads it: delete it when the images are
        safe. With eta it needs `seed`. One of other settings or tensors is refused; the model, and what of `cond` is
        neither a Tensor nor a number or text, are not looked at. Needs the extra ``protofast[data]``.
    compile : bool or str, default False
        Calls ``torch.compile(model)``; a text is its ``mode``. Steps share one compilation; a smaller last batch may
        take another.
    cuda_graph : bool, default False
        Replays one CUDA graph of the whole loop for every batch but the first, which runs as the warm-up: it pays from
        the third batch on, where the model's kernels are short. The model must be fit for capture: it may not wait for
        the GPU, nor choose by values. A smaller last batch is filled up with samples of the one before. With eta it
        needs `seed`; no `callback`, no `progress`.
    progress : bool, default False
        Shows a bar; needs the extra ``protofast[cli]``.
    callback : callable, optional
        ``callback(number, timestep, step)`` after each step of each batch: `step.prev_sample` and the predicted image
        `step.pred_original_sample`, which stay as they are, and `step.first`, the number of the batch's first sample.
        An exception ends the run.
    backend : str, optional

    Returns
    -------
    Tensor
        `out`, or one of the noise's shape, dtype and device.

    Raises
    ------
    ValueError, TypeError
        Naming the argument; also for a folder `resume` of other settings, or that is damaged.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> schedule = pf.DDIMSchedule.linear(1000)
    >>> model = lambda x, t: torch.zeros_like(x)
    >>> pf.diffusion.sample(model, torch.randn(2, 1, 8, 8), schedule, 10).shape
    torch.Size([2, 1, 8, 8])
    >>> trace = []
    >>> noise, watch = torch.randn(3, 1, 8, 8), lambda number, t, step: trace.append((step.first, t))
    >>> _ = pf.diffusion.sample(model, noise, schedule, 2, eta=1.0, seed=0, batch_size=2, callback=watch)
    >>> trace
    [(0, 999), (0, 499), (2, 999), (2, 499)]
    """
    check_sample("noise", noise)
    check_schedule(schedule)
    steps = timesteps(num_steps, len(schedule), spacing)
    pairs = list(zip(steps, [*steps[1:], -1], strict=True))
    where = place(noise, device)
    key, origin = _seed(seed, generator, noise.shape[0])
    if eta and key is None and (resume is not None or cuda_graph):
        raise ValueError(
            f"{'cuda_graph' if resume is None else 'resume'} with eta {eta} needs noise that can be drawn again; "
            "give seed=0 in place of a generator"
        )
    split = {"noise": noise}
    if known is not None or mask is not None:
        checked = _more(noise, 0.0, None, None, None, None, 0.0, known, None, mask)
        split |= {"known": checked["known"], "mask": checked["mask"]}
    predictor = Predictor(model, guidance_scale, cond, uncond, samples=noise.shape[0], device=where, compile=compile)
    split |= predictor.split
    check_out(out, "noise", split)

    def take(rows: slice) -> dict[str, Tensor]:
        inputs = {name: tensor[rows] for name, tensor in split.items()}
        if key is not None:
            inputs["seeds"] = torch.tensor([[key, number << 32 | origin + rows.start] for number in range(len(pairs))])
        return inputs

    def advance(number: int, x: Tensor, inputs: Mapping[str, Any], target: Tensor | None) -> LoopStep:
        t, prev = pairs[number]
        kept = inputs.get("known")
        if number == 0 and kept is not None:
            x.copy_(torch.where(inputs["mask"], x, add_noise(kept, inputs["noise"], t, schedule)))
        step = ddim_step(
            x,
            predictor(x, t, inputs["conditions"]),
            t,
            prev,
            schedule,
            eta=eta,
            noise=_draw(x, generator) if eta and key is None else None,
            seed=None if key is None else inputs["seeds"][number],
            prediction_type=prediction_type,
            clip_range=clip_range,
            dynamic_threshold=dynamic_threshold,
            use_clipped_model_output=use_clipped_model_output,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            known=kept,
            known_noise=inputs["noise"] if kept is not None and prev >= 0 else None,  # at the end, as they are
            mask=inputs.get("mask"),
            bitwise=bitwise,
            out=target,
            backend=backend,
        )
        return LoopStep(*step)

    return run(
        advance,
        noise,
        take,
        predictor,
        steps,
        name="noise",
        what="sampling",
        device=where,
        batch_size=batch_size,
        out=out,
        resume=resume,
        settings={
            "timesteps": steps,
            "schedule": digest(torch.tensor(schedule._values)),
            "eta": float(eta),
            "seed": (key, origin),
            "prediction_type": prediction_type,
            "clip_range": clip_range,
            "dynamic_threshold": dynamic_threshold,
            "use_clipped_model_output": use_clipped_model_output,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "bitwise": bitwise,
            "compile": compile,
            "backend": str(overload("ddim_step", where.type, backend)),
        },
        cuda_graph=cuda_graph,
        progress=progress,
        callback=callback,
    )


def _draw(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _seed(
    seed: int | tuple[int, int] | None, generator: torch.Generator | None, samples: int
) -> tuple[int | None, int]:
    """The seed, and the number of the first sample."""
    if seed is None:
        return None, 0
    if generator is not None:
        raise ValueError("generator and seed were both given; give the one that is to draw the noise")
    pair = tuple(seed) if isinstance(seed, (tuple, list)) else (seed, 0)
    if len(pair) != 2 or not all(isinstance(word, int) for word in pair):
        raise TypeError(f"seed is {seed!r}; give an int, or a pair (seed, number of the first sample)")
    key, first = pair
    if not (0 <= key < 2**63 and 0 <= first <= 2**32 - samples):
        raise ValueError(f"seed is {seed!r}; give a seed from 0 to 2**63 − 1, and numbers of samples below 2**32")
    return key, first
