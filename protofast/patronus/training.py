"""Training: encoder, prototypes and denoiser at once, from noise alone (arXiv 2503.22782, sec. 3)."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._files import digest, replacing
from .._optional import need
from .._progress import bars
from .._sheet import sheet
from .._training import forgetting, read_unfinished
from ..diffusion import normal_noise, sample
from ..nn import distinct_loss
from .config import PatronusConfig, TrainingConfig
from .images import Images
from .model import CONFIG, Patronus, check_images, read_config

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
LOG_EVERY = 50
SHOWN = 8
"""Images of the grids on the way."""


def train(
    config: PatronusConfig,
    images: Tensor | Images,
    settings: TrainingConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    precision: str = "no",
    accumulate: int = 1,
    compile: bool = False,
    start: Patronus | None = None,
    sample_every: int | None = None,
    checkpoint_seconds: float = 60.0,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Patronus:
    """Trains a model. Under ``torchrun`` or ``accelerate launch`` all processes train one model together.

    An update takes the gradient of E‖prediction − target‖² + `distinct`·L_distinct, the target being
    ``config.prediction_type``. What is random in update k is drawn by counter from (seed, k), so that the same
    call gives the same weights whether it was killed on the way or not, on the same machine with the same number of
    threads and processes; another number of processes or `accumulate` changes only how sums round, and dropout.

    Parameters
    ----------
    config : PatronusConfig
    images : Tensor of shape (n, C, H, W) in [−1, 1], or Images
    settings : TrainingConfig
    out : path, optional
        A folder for all that comes out: the model (`Patronus.from_pretrained`), ``log.jsonl`` (a JSON object a line),
        TensorBoard's events, ``samples/`` with grids on the way, and ``checkpoint.pt`` until training is complete. The
        same call goes on from the checkpoint, and of a complete one only loads the model. One of other settings is
        refused.
    seed : int, default 0
    precision : {"no", "bf16", "fp16"}
        Of the denoiser, by autocast; the encoder and the prototypes stay in float32.
    accumulate : int, default 1
        Parts in which the images of an update go through the model, one after another, to save memory.
    compile : bool, default False
        ``torch.compile`` of the denoiser: a minute or so at the start, and faster updates after it.
    start : Patronus, optional
        A trained model to go on from, such as with the distinct loss, in place of fresh weights.
    sample_every : int, optional
        Updates between grids; by default a tenth of all. 0 for none.
    checkpoint_seconds : float, default 60
        Between checkpoints.
    about : mapping, optional
        What is to be known of the model, as JSON: into its config file.
    device : device, optional
        "cpu" or "cuda"; by default what accelerate finds. Which GPU is CUDA_VISIBLE_DEVICES' affair.
    progress : bool, default False
        A bar with images a second and the share of the time that the prototype layer took.

    Returns
    -------
    Patronus
        The average of the weights, or the last ones with ``ema=0``; in evaluation mode, without gradients.

    Raises
    ------
    FloatingPointError
        When the loss is not finite; the last checkpoint, which was, stays.
    FileExistsError
        When `out` holds training of other settings or images.
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus import PatronusConfig, TrainingConfig, train
    >>> config = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1)
    >>> model = train(config, torch.rand(50, 1, 16, 16) * 2 - 1, TrainingConfig(updates=2, batch=8))
    >>> model.activations(torch.zeros(3, 1, 16, 16)).shape
    torch.Size([3, 5])
    """
    if isinstance(images, Tensor):
        check_images(config, images)
    elif tuple(images.shape[1:]) != config.image_shape:
        raise ValueError(f"images has shape {tuple(images.shape)}; the model takes images of {config.image_shape}")
    if len(images) == 0:
        raise ValueError("images is empty; give at least one")
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision is {precision!r}; choose 'no', 'bf16' or 'fp16'")
    if start is not None and start.config != config:
        raise ValueError("start is a model of another config; give its config, start.config")
    accelerate = need("accelerate", "patronus")
    wanted = None if device is None else torch.device(device)
    # "no" whatever the environment says: mixed precision is the objective's own, and keeps out of the encoder.
    accelerator = accelerate.Accelerator(cpu=wanted is not None and wanted.type == "cpu", mixed_precision="no")
    if wanted is not None and wanted.type != accelerator.device.type:
        raise ValueError(f"device is {device!r}; there is only {accelerator.device.type!r} here")
    parts = accumulate * accelerator.num_processes
    if accumulate < 1 or settings.batch % parts:
        raise ValueError(
            f"accumulate is {accumulate} in {accelerator.num_processes} processes; their product must divide "
            f"batch, which is {settings.batch}"
        )
    taker = images.take if isinstance(images, Images) else lambda rows: images[rows]
    folder = None if out is None else Path(out)
    made_by = {
        "config": config.to_dict(),
        "training": settings.to_dict(),
        "images": [len(images), digest(taker(np.linspace(0, len(images) - 1, 16).astype(np.int64)))],
        "seed": seed,
        "precision": precision,
        "start": None if start is None else digest(start.prototypes.prototype_vectors),
    }
    if folder is not None and (done := _complete(folder, made_by)) is not None:
        return done.to(accelerator.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Patronus(config) if start is None else copy.deepcopy(start).requires_grad_(True)
    if start is None and settings.initialize != "uniform":
        initialize(model, taker, len(images), settings, seed)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(model, settings, accelerator, precision, seed, compile)
    if folder is not None:
        run.resume(folder, made_by)
    every = max(1, settings.updates // 10) if sample_every is None else sample_every
    fixed = taker(np.arange(min(SHOWN, len(images))))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    shown = bars(progress and accelerator.is_main_process)
    with torch.random.fork_rng(devices=devices), shown as bar, _Log(folder, run, accelerator) as log:
        advance = bar("training", settings.updates, run.done)
        saved, told, count = time.monotonic(), time.perf_counter(), 0
        while run.done < settings.updates:
            loss, more = run.update(taker, len(images), accumulate, watched=(run.done + 1) % LOG_EVERY == 0)
            count += 1
            note = ""
            if run.done % LOG_EVERY == 0 or run.done == settings.updates:
                now = time.perf_counter()
                more["images_per_second"] = round(count * settings.batch / (now - told), 1)
                told, count = now, 0
                note = f"loss {loss:.4f}, {more['images_per_second']:.0f} images/s"
                if "prototype_share" in more:
                    note += f", prototypes {100 * more['prototype_share']:.1f} %"
                log({"update": run.done, "loss": loss, **more})
            advance(1, note)
            if folder is not None and accelerator.is_main_process:
                if every and (run.done % every == 0 or run.done == settings.updates):
                    _grid(run.best(), fixed.to(accelerator.device), folder / "samples" / f"{run.done:07d}.png")
                if time.monotonic() - saved >= checkpoint_seconds:
                    run.save(folder, made_by)
                    saved = time.monotonic()
    result = copy.deepcopy(run.best()).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if folder is not None and accelerator.is_main_process:
        result.save_pretrained(folder, **(about or {}), made_by=made_by, losses=run.losses)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return result.eval().requires_grad_(False)


class _Objective(nn.Module):
    """The loss as a module's forward, which is what DistributedDataParallel watches."""

    def __init__(self, model: Patronus, settings: TrainingConfig, precision: str, compile: bool) -> None:
        super().__init__()
        self.model, self.settings, self.precision = model, settings, precision
        alphas = model.schedule.alphas_cumprod
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("spread", (1 - alphas).sqrt().float(), persistent=False)
        self.denoise: Callable[..., Tensor] = torch.compile(model.denoiser) if compile else model.denoiser

    def forward(self, images: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = (table[t].reshape(-1, 1, 1, 1) for table in (self.signal, self.spread))  # type: ignore[index]
        activations = self.model.encode(images)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(images.device.type, dtype) if dtype else nullcontext():
            predicted = self.denoise(signal * images + spread * noise, t, activations)
        target = noise if self.model.config.prediction_type == "epsilon" else signal * noise - spread * images
        error = (predicted.float() - target).square().mean()
        distinct = error.new_zeros(())
        if self.settings.distinct:
            distinct = distinct_loss(self.model.prototypes.prototype_vectors, margin=self.settings.margin)
        return error, distinct


class _Run:
    """The state of training: what a checkpoint holds."""

    def __init__(
        self, model: Patronus, settings: TrainingConfig, accelerator: Any, precision: str, seed: int, compile: bool
    ) -> None:
        self.settings, self.accelerator, self.seed = settings, accelerator, seed
        self.losses: list[float] = []
        self.done = 0
        self._sum, self._twentieth = 0.0, 0
        model = model.to(accelerator.device)
        self.model = model.train()
        self.average = AveragedModel(model, multi_avg_fn=self._blend) if settings.ema else None
        groups = [
            {"params": list(model.denoiser.parameters()), "share": 1.0},
            {"params": [*model.encoder.parameters(), *model.prototypes.parameters()], "share": settings.encoder_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.share = _Share(model.prototypes, accelerator.device)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
        self.objective = accelerator.prepare(_Objective(model, settings, precision, compile))

    def update(
        self, take: Callable[[Any], Tensor], count: int, accumulate: int, *, watched: bool
    ) -> tuple[float, dict[str, Any]]:
        """One step; its loss over all processes, and what else is worth a line in the log."""
        accelerator, settings = self.accelerator, self.settings
        lr = settings.lr * _rate(settings, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        draws = np.random.default_rng([self.seed, self.done])
        rows = draws.integers(count, size=settings.batch)
        timesteps = torch.from_numpy(draws.integers(self.model.config.timesteps, size=settings.batch))
        number = int(draws.integers(1 << 62))
        size = settings.batch // (accumulate * accelerator.num_processes)
        total = torch.zeros(2, device=accelerator.device)
        began = time.perf_counter()
        self.share.start(watched)
        for part in range(accumulate):
            first = (accelerator.process_index * accumulate + part) * size
            mine = slice(first, first + size)
            images = take(rows[mine])
            images = images.to(accelerator.device, memory_format=torch.channels_last)
            noise = normal_noise(images, (number, first))
            torch.manual_seed(number ^ first)  # dropout
            last = part == accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                error, distinct = self.objective(images, timesteps[mine].to(accelerator.device), noise)
                self.scaler.scale((error + settings.distinct * distinct) / accumulate).backward()
            total += torch.stack([error.detach(), distinct.detach()]) / accumulate
        taken = self.share.stop()
        loss, distinct_value = accelerator.reduce(total, reduction="mean").tolist()
        more: dict[str, Any] = {"lr": lr}
        if settings.distinct:
            more["distinct"] = distinct_value
        if not math.isfinite(loss + distinct_value):
            raise FloatingPointError(
                f"the loss is {loss} at update {self.done + 1} with lr {lr:g}; give a smaller lr or another precision "
                "(the last checkpoint, if there is one, is from before)"
            )
        if settings.max_norm:
            self.scaler.unscale_(self.optimizer)
            more["gradient_norm"] = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if watched:
            more["prototype_share"] = round(taken / (time.perf_counter() - began), 5)
        self.done += 1
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._note(loss)
        return loss, more

    def best(self) -> Patronus:
        """The model for use: the average, where there is one."""
        found = self.model if self.average is None else self.average.module
        assert isinstance(found, Patronus)
        return found

    def _note(self, loss: float) -> None:
        """Keeps the mean loss of each twentieth of the updates."""
        self._sum += loss
        self._twentieth += 1
        if self.done * 20 // self.settings.updates > (self.done - 1) * 20 // self.settings.updates:
            self.losses.append(self._sum / self._twentieth)
            self._sum, self._twentieth = 0.0, 0

    def _blend(self, averages: Any, latest: Any, count: Tensor | int) -> None:
        decay = forgetting(self.settings.ema, int(count))
        torch._foreach_lerp_(list(averages), list(latest), 1 - decay)

    def _parts(self) -> dict[str, Any]:
        found = {"model": self.model, "optimizer": self.optimizer, "average": self.average, "scaler": self.scaler}
        return {name: part for name, part in found.items() if part is not None}

    def save(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        """The checkpoint, unless a weight is not finite: then the one before stays."""
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"done": self.done, "losses": self.losses, "since": [self._sum, self._twentieth]}
        with replacing(folder / CHECKPOINT, durable=True) as file:
            torch.save({**state, "made_by": json.dumps(made_by, sort_keys=True)}, file)

    def resume(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        path = folder / CHECKPOINT
        if not path.exists():
            return
        state = read_unfinished(path)
        if not state:
            raise ValueError(f"{path} is damaged; delete it to train from the start")
        if state["made_by"] != json.dumps(made_by, sort_keys=True):
            raise FileExistsError(f"{path} is of other settings or images; give another folder, or delete it")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.done, self.losses, (self._sum, self._twentieth) = state["done"], state["losses"], state["since"]


class _Share:
    """The time that the prototype layer takes, forward and backward."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._watching, self._device, self._marks = False, device, []  # type: ignore[var-annotated]
        mark = self._mark
        layer.register_forward_pre_hook(lambda *_: mark())
        layer.register_forward_hook(lambda *_: mark())
        layer.register_full_backward_pre_hook(lambda *_: mark())
        layer.register_full_backward_hook(lambda *_: mark())

    def _mark(self) -> None:
        if not self._watching:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks.append(time.perf_counter())

    def start(self, watching: bool) -> None:
        self._watching, self._marks = watching, []

    def stop(self) -> float:
        """Seconds since `start`, from every other mark to the next."""
        self._watching = False
        return sum(end - begin for begin, end in zip(self._marks[::2], self._marks[1::2], strict=False))


class _Log:
    """Lines of JSON and TensorBoard's events, from one process; lines of updates that are repeated are dropped."""

    def __init__(self, folder: Path | None, run: _Run, accelerator: Any) -> None:
        self._folder = folder if accelerator.is_main_process else None
        self._done = run.done

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if self._folder is None:
            return lambda line: None
        path = self._folder / LOG
        kept = []
        with suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                with suppress(ValueError):
                    kept += [line] if json.loads(line)["update"] <= self._done else []
        with replacing(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1)
        writer = need("torch.utils.tensorboard", "patronus").SummaryWriter
        self._events = writer(self._folder / "events", purge_step=self._done + 1)
        return self._write

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "update":
                self._events.add_scalar(name, value, line["update"])

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._file.close()
            self._events.close()


def _rate(settings: TrainingConfig, done: int) -> float:
    rise = settings.warmup * settings.updates
    rate = min(1.0, (done + 1) / rise) if rise else 1.0
    return rate * (1 + math.cos(math.pi * done / settings.updates)) / 2 if settings.decay == "cosine" else rate


@torch.no_grad()
def initialize(model: Patronus, take: Callable[[Any], Tensor], count: int, settings: TrainingConfig, seed: int) -> None:
    """Prototypes from patches of up to 256 images, at distances where the log activation has a slope."""
    rows = np.random.default_rng([seed, 0]).permutation(count)[:256]
    features = model.encoder(take(rows))
    draws = torch.Generator().manual_seed(seed)
    model.prototypes.initialize_from(features, method=settings.initialize, generator=draws)
    if not settings.distance:
        return
    median = float(model.prototypes(features, return_all=True).distance.median())
    if not 0 < median < math.inf:
        return  # images without contrast: nothing to scale by
    scale = math.sqrt(settings.distance / median)
    last = [layer for layer in model.encoder if isinstance(layer, nn.Conv2d)][-1]
    for values in (*last.parameters(), model.prototypes.prototype_vectors):  # ReLU is homogeneous
        values.mul_(scale)


def _complete(folder: Path, made_by: Mapping[str, Any]) -> Patronus | None:
    """The model of a folder where training is complete, if it is of these settings."""
    if not (folder / CONFIG).exists():  # which is written last
        return None
    about = read_config(folder).get("about", {})
    if about.get("made_by") != json.loads(json.dumps(made_by)):
        raise FileExistsError(f"{folder} holds a model of other settings or images; give another folder, or delete it")
    return Patronus.from_pretrained(folder)


@torch.no_grad()
def _grid(model: Patronus, images: Tensor, path: Path) -> None:
    """Images, and samples that are told their activations, from the same noise every time."""
    training = model.training
    model.eval()
    noise = normal_noise(images, 0)
    made = sample(
        model,
        noise,
        model.schedule,
        min(25, model.config.timesteps),
        prediction_type=model.config.prediction_type,
        clip_range=1.0,
        cond={"activations": model.encode(images)},
    )
    model.train(training)
    with replacing(path) as file:
        file.write(sheet([("images", (images + 1) / 2), ("samples", (made + 1) / 2)]))
