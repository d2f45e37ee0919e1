"""Training without data: a rotation and a bank of prompts, by turns, through a frozen generator (arXiv 2605.08858)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _weights
from .._files import digest, replacing
from .._progress import bars
from .._training import read_unfinished
from .bank import PromptBank
from .concepts import Concepts
from .config import ProDGConfig
from .generators.protocol import Generator, Prompts
from .losses import diversity_loss, purity_loss
from .networks import SplitNetwork, compensate
from .rotation import Rotation

CHECKPOINT, CONFIG, LOG, ROTATION, BANK = (
    "checkpoint.pt",
    "config.json",
    "log.jsonl",
    "rotation.safetensors",
    "bank.safetensors",
)
LOG_EVERY = 20
_FORMAT = "protofast-prodg-1"
_CURE = "give a folder that `protofast prodg train` wrote"


@dataclass
class ProDG:
    """A frozen classifier's channels, rotated, and prompts whose images show each of them.

    Attributes
    ----------
    network : SplitNetwork
    generator : Generator
    rotation : Rotation
    bank : PromptBank
    config : ProDGConfig
    history : list of dict
        A row every 20 updates: "update", "purity", "regularization", "diversity", "dead" (share of images in which the
        channel was nowhere above 0), "seconds".
    """

    network: SplitNetwork
    generator: Generator
    rotation: Rotation
    bank: PromptBank
    config: ProDGConfig
    history: list[dict[str, float]] = field(default_factory=list)

    @torch.no_grad()
    def prototypes(self, channel: int, count: int, seed: int = 0) -> Tensor:
        """`count` images (count, c, H, W) of a channel, of prompts drawn from its Gaussian."""
        if not 0 <= channel < self.network.channels:
            raise IndexError(f"channel is {channel}; the network has 0 to {self.network.channels - 1}")
        draws = _draws(seed, 1, channel)
        prompts = self.bank(torch.full((count,), channel), generator=draws)
        return self.generator.generate(prompts, self.generator.noise(count, generator=draws), steps=self.config.steps)

    @torch.no_grad()
    def concepts(self) -> Concepts:
        """For `explain` and the evaluation: logits are those of the network."""
        weight = compensate(self.network.weight, self.rotation)
        return Concepts("prodg", self.network, self.rotation().detach(), weight, self.network.bias, self.prototypes)

    def start(self, *, seed: int = 0) -> ProDG:
        """As it was before any update: no rotation, every prompt at its anchor."""
        bank = PromptBank(
            self.network.channels,
            self.bank.anchor,
            self.bank.pooled_anchor,
            rank=self.config.rank,
            logvar=self.config.logvar,
            seed=seed,
        )
        rotation = Rotation(self.network.channels, parametrization=self.config.parametrization)
        rotation = rotation.to(self.network.weight.device)
        return ProDG(self.network, self.generator, rotation, bank, self.config)

    def save(self, folder: str | os.PathLike[str], **about: Any) -> None:
        """Writes rotation, bank, log and settings into a folder; network and generator have files of their own."""
        folder = Path(folder)
        state = {name: value.detach().cpu() for name, value in self.rotation.state_dict().items()}
        _weights.write(folder / ROTATION, _FORMAT, state, {"channels": str(self.rotation.channels)})
        self.bank.save(folder / BANK)
        with replacing(folder / LOG) as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.history).encode())
        with replacing(folder / CONFIG) as file:  # last: with it the folder is complete
            file.write(
                json.dumps({"format": _FORMAT, "config": self.config.to_dict(), "about": about}, indent=1).encode()
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], network: SplitNetwork, generator: Generator) -> ProDG:
        """Reads what `save` wrote, of this network and generator.

        Raises
        ------
        FileNotFoundError
        ValueError
            When a file is damaged, or of another network.
        """
        folder = Path(folder)
        config = ProDGConfig.from_dict(read_config(folder)["config"])
        state, about = _weights.read(folder / ROTATION, _FORMAT, wrong=f"holds no rotation; {_CURE}")
        if int(about["channels"]) != network.channels:
            raise ValueError(f"{folder} is of {about['channels']} channels, and the network has {network.channels}")
        rotation = Rotation(network.channels, parametrization=config.parametrization)
        rotation.load_state_dict(state)
        history = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        bank = PromptBank.load(folder / BANK).to(generator.device)
        return cls(network, generator, rotation.to(network.weight.device), bank, config, history)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Of `config.json`: {"config", "about"}."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_CURE}")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_CURE}") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"{path} is of no ProDG training; {_CURE}")
    return values


def train(
    network: SplitNetwork,
    generator: Generator,
    config: ProDGConfig,
    *,
    class_names: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    accumulate: int = 1,
    checkpoint_seconds: float = 60.0,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ProDG:
    """Learns a rotation of the network's channels and a Gaussian over prompts for each; no image is read.

    L = −purity + `regularization`·L_reg + `diversity`·L_div. A few updates of the rotation, which makes the channels of
    generated images purer; then a few of the prompts, for which the rotation stands still. What is random in update k
    is drawn by counter from (seed, k), so a training that was killed and goes on ends in the same weights.

    Parameters
    ----------
    network : SplitNetwork
        Frozen.
    generator : Generator
        Frozen; gradients flow through it to the prompts.
    config : ProDGConfig
        Such as ``PRESETS["cpu"]``.
    class_names : sequence of str, optional
        For ``init="data"``: by default the network's.
    out : path, optional
        A folder for the result (`ProDG.load`), and for checkpoints on the way. The same call goes on from there, and
        of a complete training only loads the result; one of other settings is refused.
    seed : int, default 0
    accumulate : int, default 1
        Parts in which a batch goes through the generator, one after another, to save memory.
    checkpoint_seconds : float, default 60
    about : mapping, optional
        What is to be known of it, as JSON.
    progress : bool, default False

    Returns
    -------
    ProDG

    Raises
    ------
    FileExistsError
        When `out` holds a training of other settings.
    FloatingPointError
        When a loss is not finite; the last checkpoint, which was, stays.
    ValueError, TypeError
        Naming the argument.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; give at least 1")
    if config.channels > network.channels:
        raise ValueError(f"config.channels is {config.channels}; the network has {network.channels}")
    made_by = {"config": config.to_dict(), "seed": seed, "network": _name(network), "generator": _name(generator)}
    made_by["class_names"] = None if class_names is None else list(class_names)
    folder = None if out is None else Path(out)
    if folder is not None and (folder / CONFIG).exists():
        if read_config(folder)["about"].get("made_by") != json.loads(json.dumps(made_by)):
            raise FileExistsError(f"{folder} holds a training of other settings; give another folder, or delete it")
        return ProDG.load(folder, network, generator)
    rotation = Rotation(network.channels, parametrization=config.parametrization).to(network.weight.device)
    bank = PromptBank.from_prompts(
        generator,
        network.channels,
        init=config.init,
        network=network,
        class_names=class_names or network.names,
        rank=config.rank,
        logvar=config.logvar,
        seed=seed,
    )
    run = _Run(ProDG(network, generator, rotation, bank, config), seed, accumulate)
    if folder is not None:
        run.resume(folder / CHECKPOINT, made_by)
    saved = time.perf_counter()
    with bars(progress) as bar:
        advance = bar("rotation and prompts", config.updates, run.done)
        while run.done < config.updates:
            advance(1, run.update())
            if folder is not None and time.perf_counter() - saved > checkpoint_seconds:
                run.keep(folder / CHECKPOINT, made_by)
                saved = time.perf_counter()
    result = run.result
    if folder is not None:
        result.save(folder, **{**(about or {}), "made_by": made_by})
        with suppress(FileNotFoundError):
            (folder / CHECKPOINT).unlink()
    return result


class _Run:
    """The state of a training, and its updates."""

    def __init__(self, result: ProDG, seed: int, accumulate: int) -> None:
        self.result, self.seed, self.accumulate, self.done = result, seed, accumulate, 0
        config = result.config
        self.matrix: Tensor | None = None  # U, while the prompts learn
        self.replay: list[list[Tensor]] = []  # channels and maps of the last prompt updates
        self.rotation_optimizer = torch.optim.AdamW(
            result.rotation.parameters(), lr=config.rotation_lr, weight_decay=config.rotation_decay
        )
        self.prompt_optimizer = torch.optim.SparseAdam(list(result.bank.parameters()), lr=config.prompt_lr)
        self.sums: dict[str, list[float]] = {}
        self.seconds = 0.0

    def turns_rotation(self) -> bool:
        config = self.result.config
        after = self.done - config.warmup
        return after < 0 or after % (config.rotation_updates + config.prompt_updates) < config.rotation_updates

    def update(self) -> str:
        start = time.perf_counter()
        if self.turns_rotation():
            self.matrix = None
            if self.result.config.purity:
                self._rotate()
        else:
            self._prompt()
        self.done += 1
        self.seconds += time.perf_counter() - start
        config, note = self.result.config, ""
        if self.done % LOG_EVERY == 0 or self.done == config.updates:
            means = {name: float(np.mean(values)) for name, values in self.sums.items()}
            self.result.history.append({"update": self.done, **means, "seconds": self.seconds})
            self.sums = {}
            note = f"purity {means['purity']:.3f}" if "purity" in means else ""
        return note

    def _rotate(self) -> None:
        config = self.result.config
        if config.replay and self.replay:
            rows, maps = self.replay[self.done % len(self.replay)]
        else:
            with torch.no_grad():
                rows, prompts, noise = self._batch()
                maps = torch.cat([self._maps(prompts, noise, part) for part in self._parts()])
        loss, purity = purity_loss(maps, self.result.rotation(), rows.to(maps.device))
        self._check(loss, purity)
        self.rotation_optimizer.zero_grad()
        (config.purity * loss).backward()
        self.rotation_optimizer.step()

    def _prompt(self) -> None:
        config, bank = self.result.config, self.result.bank
        if self.matrix is None:
            self.matrix = self.result.rotation().detach()
            self.replay = []
        self.prompt_optimizer.zero_grad()
        rows, prompts, noise = self._batch()
        leaves = Prompts(*(value.detach().requires_grad_() for value in prompts))
        kept: list[Tensor] = []
        for part in self._parts():
            maps = self._maps(leaves, noise, part)
            loss, purity = purity_loss(maps, self.matrix, rows[part].to(maps.device))
            diversity = diversity_loss(maps, config.repeats)
            total = config.purity * loss + config.diversity * diversity
            self._check(total, purity)
            (total * (len(maps) / len(rows))).backward()
            self._note("diversity", diversity)
            kept.append(maps.detach())
        channels = rows[:: config.repeats]
        regularization = bank.regularization(channels)
        self._note("regularization", regularization)
        made = [(value, leaf.grad) for value, leaf in zip(prompts, leaves, strict=True) if leaf.grad is not None]
        made.append((config.regularization * regularization, torch.ones_like(regularization)))
        torch.autograd.backward([value for value, _ in made], [grad for _, grad in made])
        if config.replay:
            self.replay.append([rows, torch.cat(kept)])
        _step_rows(self.prompt_optimizer, bank, channels, config.clip)

    def _batch(self) -> tuple[Tensor, Prompts, Tensor]:
        """Channels (each repeated), their prompts, and noise; the same in whatever parts they go on."""
        config, draws = self.result.config, _draws(self.seed, 0, self.done)
        channels = torch.randperm(self.result.network.channels, generator=draws)[: config.channels]
        rows = channels.repeat_interleave(config.repeats)
        return rows, self.result.bank(rows, generator=draws), self.result.generator.noise(len(rows), generator=draws)

    def _parts(self) -> list[slice]:
        """Of a batch, whole channels each."""
        config = self.result.config
        size = -(-config.channels // self.accumulate) * config.repeats
        return [slice(start, start + size) for start in range(0, config.channels * config.repeats, size)]

    def _maps(self, prompts: Prompts, noise: Tensor, part: slice) -> Tensor:
        config, generator = self.result.config, self.result.generator
        some = Prompts(prompts.embedding[part], prompts.pooled[part])
        images = generator.generate(some, noise[part], steps=config.steps, through=config.through)
        return self.result.network.maps(images.to(self.result.network.weight.device))

    def _check(self, loss: Tensor, purity: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} in update {self.done + 1}; the last checkpoint stays; lower the "
                "learning rates"
            )
        self._note("purity", purity.mean())
        self._note("dead", (purity == 0).double().mean())

    def _note(self, name: str, value: Tensor) -> None:
        self.sums.setdefault(name, []).append(float(value.detach()))

    def keep(self, path: Path, made_by: Mapping[str, Any]) -> None:
        state = {
            "made_by": json.dumps(made_by),
            "done": self.done,
            "seconds": self.seconds,
            "rotation": self.result.rotation.state_dict(),
            "bank": self.result.bank.state_dict(),
            "rotation_optimizer": self.rotation_optimizer.state_dict(),
            "prompt_optimizer": self.prompt_optimizer.state_dict(),
            "matrix": self.matrix,
            "replay": self.replay,
            "sums": self.sums,
            "history": self.result.history,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def resume(self, path: Path, made_by: Mapping[str, Any]) -> None:
        state = read_unfinished(path)
        if not state:
            return
        if state["made_by"] != json.dumps(made_by):
            raise FileExistsError(
                f"{path.parent} holds a training of other settings; give another folder, or delete it"
            )
        self.done, self.seconds, self.sums = state["done"], state["seconds"], state["sums"]
        self.result.history = state["history"]
        device = self.result.network.weight.device
        self.matrix = None if state["matrix"] is None else state["matrix"].to(device)
        self.replay = [[channels, maps.to(device)] for channels, maps in state["replay"]]
        self.result.rotation.load_state_dict(state["rotation"])
        self.result.bank.load_state_dict(state["bank"])
        self.rotation_optimizer.load_state_dict(state["rotation_optimizer"])
        self.prompt_optimizer.load_state_dict(state["prompt_optimizer"])


def _step_rows(optimizer: torch.optim.Optimizer, bank: nn.Module, channels: Tensor, clip: float) -> None:
    """An update of the rows of `channels` alone, by gradients that are clipped over all of them."""
    parameters = [value for value in bank.parameters() if value.grad is not None]
    nn.utils.clip_grad_norm_(parameters, clip)
    for value in parameters:
        assert value.grad is not None
        rows = channels.to(value.device)
        value.grad = torch.sparse_coo_tensor(rows[None], value.grad[rows], value.shape, check_invariants=False)
    optimizer.step()


def _draws(seed: int, stream: int, number: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _name(model: Any) -> str:
    """A name for a model by its weights."""
    if isinstance(model, nn.Module):
        weights = [value.detach().flatten().double().cpu() for value in (*model.parameters(), *model.buffers())]
        return f"{type(model).__name__} {digest(torch.cat(weights)) if weights else ''}"
    return f"{type(model).__name__} {model.fingerprint() if hasattr(model, 'fingerprint') else ''}"
