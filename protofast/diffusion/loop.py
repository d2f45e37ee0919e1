"""The loop under `sample` and `invert`: batches, buffers, progress, files to resume from, and CUDA graphs."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._files import digest
from .._optional import need
from .._overlap import span
from .._progress import bars
from .journal import Journal
from .predictor import Predictor


class LoopStep(NamedTuple):
    """What a callback sees of a step: the two of `DDIMStep`, the batch they belong to, and the error of the step."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None
    first: int = 0
    """Number of the batch's first sample."""
    residual: Tensor | None = None
    """Of fixed-point inversion, see `invert`: shape (B,)."""


Callback = Callable[[int, int, LoopStep], object]
"""Called after every step with its number, the timestep the model was asked at, and the result."""

Advance = Callable[[int, Tensor, Mapping[str, Any], "Tensor | None"], LoopStep]
"""``advance(number, x, inputs, out)`` takes a step, and may write it to `out`, which may be `x`."""


def place(start: Tensor, device: torch.device | str | None) -> torch.device:
    """The device a loop runs on; "cuda" becomes the one it means."""
    return start.device if device is None else torch.empty(0, device=device).device


def run(
    advance: Advance,
    start: Tensor,
    take: Callable[[slice], dict[str, Tensor]],
    predictor: Predictor,
    steps: Sequence[int],
    *,
    name: str,
    what: str,
    device: torch.device,
    batch_size: int | None,
    out: Tensor | None,
    resume: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    cuda_graph: bool,
    progress: bool,
    callback: Callback | None,
) -> Tensor:
    """Takes every sample of `start` through all steps, batch by batch.

    ``take(rows)`` gives a batch's inputs by name, among them its part of `start` under `name`; `advance` gets them on
    `device`, and the model's conditions as "conditions".
    """
    samples, last = start.shape[0], len(steps) - 1
    size = max(samples, 1)
    if batch_size is not None:
        if operator.index(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more samples, or None for all of them")
        size = min(size, batch_size)
    if cuda_graph:
        check_graph(device, callback, progress)
    result = torch.empty_like(start) if out is None else out

    def steps_from(x: Tensor, inputs: Mapping[str, Any], begin: int, after: Callable[[int, LoopStep], None]) -> Tensor:
        inputs = {**inputs, "conditions": predictor.conditions(inputs)}
        if begin == 0:
            x.copy_(inputs[name])
        for number in range(begin, last + 1):
            # Results that a callback has seen are its own. Otherwise no step needs fresh memory.
            step = advance(number, x, inputs, x if callback is None else None)
            x = step.prev_sample
            after(number, step)
        return x

    def after(first: int, inputs: Mapping[str, str], number: int, step: LoopStep) -> None:
        if journal is not None:  # before the callback, so that a run which it ends goes on after this step
            journal.write(first, number, number == last, step.prev_sample, inputs)
        tick(1)
        if callback is not None:
            callback(number, steps[number], step._replace(first=first))

    journal = None
    if resume is not None:
        common = {"batch_size": size, "shape": start.shape, "dtype": str(start.dtype), "device": device.type}
        conditions = {key: digest(value) for key, value in predictor.shared.items()}
        journal = Journal(resume, {"function": what, **common, **settings, "cond": conditions})
    graph = Graph(lambda x, inputs: steps_from(x, inputs, 0, lambda *_: None), name, device) if cuda_graph else None

    if progress:
        need("rich.progress", "cli")
    with bars(progress) as bar:
        tick = bar(what, len(steps) * -(-samples // size), 0)
        for first in range(0, samples, size):
            rows = slice(first, min(first + size, samples))
            target, inputs = result[rows], take(rows)
            digests = {} if journal is None else {key: digest(tensor) for key, tensor in inputs.items()}
            found = None if journal is None else journal.read(first, digests)
            number, kept = found or (-1, start)
            if number == last:
                target.copy_(kept)
                tick(len(steps))
            elif graph is not None:  # which begins at the first step
                target.copy_(graph(inputs)[: len(target)])
                if journal is not None:
                    journal.write(first, last, True, target, digests)
            else:
                inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
                x = target if target.device == device else torch.empty_like(inputs[name])
                if number >= 0:
                    x.copy_(kept)
                    tick(number + 1)
                x = steps_from(x, inputs, number + 1, partial(after, first, digests))
                if x is not target:
                    target.copy_(x)
    if journal is not None:
        journal.finish()
    return result


def check_out(out: Tensor | None, name: str, inputs: Mapping[str, Tensor]) -> None:
    """Whether `out` can take the results of the input `name`, and shares no memory with what is still to be read."""
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; give a torch tensor")
    start = inputs[name]
    if out.shape != start.shape or out.dtype != start.dtype:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; it must be {start.dtype} {tuple(start.shape)}, as {name} is"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError("out is expanded (stride 0), so its elements share memory; give it memory of its own")
    low, high = span(out)
    for key, tensor in inputs.items():
        first, end = span(tensor)
        if tensor.device == out.device and low < end and first < high:
            raise ValueError(f"out shares memory with {key}, which is read at later steps; give other memory")


class Graph:
    """Runs batches of one size, from static buffers: the first as it stands, later ones as one CUDA graph."""

    def __init__(
        self, steps: Callable[[Tensor, Mapping[str, Tensor]], Tensor], name: str, device: torch.device
    ) -> None:
        self._steps, self._name, self._device = steps, name, device
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The results, in a buffer; of a batch smaller than the first they are the first rows."""
        if not self._inputs:
            self._inputs = {key: tensor.to(self._device, copy=True) for key, tensor in inputs.items()}
            self._x = torch.empty_like(self._inputs[self._name])
            warm_up(self._run, self._device)  # which fills the coefficient tables of the steps, too
            return self._x
        if self._replay is None:
            self._replay = capture(self._run, self._device)
        for key, tensor in inputs.items():
            self._inputs[key][: len(tensor)].copy_(tensor)
        self._replay()
        return self._x

    def _run(self) -> None:
        self._steps(self._x, self._inputs)


def check_graph(device: torch.device, callback: Callback | None, progress: bool) -> None:
    if device.type != "cuda":
        raise ValueError(f"cuda_graph was asked for on {device}; give device='cuda', or leave it out")
    if callback is not None or progress:
        which = "progress" if callback is None else "a callback"
        raise ValueError(f"{which} and cuda_graph were both given, but a replay does not return to Python; give one")


def warm_up(work: Callable[[], None], device: torch.device) -> None:
    """Runs on a side stream, as torch asks before a capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does the work again, on the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        work()
    return graph.replay
