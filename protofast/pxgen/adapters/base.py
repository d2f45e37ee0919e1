"""What `explain` asks of a model, and what the adapters share."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..noise import Noise

State = dict[str, Tensor]
"""What is known of a batch: "reconstruction" and whatever else the adapter provides, each (B, …)."""


class Adapter(Protocol):
    """What `explain` asks of a model. Any object with these members will do.

    Attributes
    ----------
    provides : frozenset of str
        Keys that `analyse` can give; criteria name what they need of them.
    intrinsic : tuple of str
        Intrinsic criteria that are used when none are asked for.
    """

    provides: frozenset[str]
    intrinsic: tuple[str, ...]

    @property
    def device(self) -> torch.device: ...

    def generate(self, noise: Noise) -> Tensor:
        """New images (len(noise), C, H, W), one for each numbered sample."""
        ...

    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        """At least the keys in `needs`, for images (B, C, H, W)."""
        ...

    def fingerprint(self) -> str:
        """A text that changes when the model or the settings do."""
        ...


_Method = TypeVar("_Method", bound=Callable[..., Any])


def evaluated(method: _Method) -> _Method:
    """Runs a method in evaluation mode and without gradients, and puts every submodule's mode back."""

    @functools.wraps(method)
    def run(self: Model, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.modules), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside the block, each submodule's own mode after it."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Model:
    """What the adapters share: the modules behind them, their device and dtype, and a fingerprint."""

    def __init__(self, functions: Sequence[object], settings: dict[str, Any]) -> None:
        found = [module for function in functions for module in _networks(function)]
        self.modules = list({id(module): module for module in found}.values())
        self._functions = [
            type(f).__name__ if isinstance(f, nn.Module) else _name(f) for f in functions if f is not None
        ]
        self._settings = settings

    @property
    def device(self) -> torch.device:
        """Device of the first parameter or buffer; the CPU when there is none."""
        return next((t.device for m in self.modules for t in [*m.parameters(), *m.buffers()]), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the parameters."""
        found = (t.dtype for m in self.modules for t in [*m.parameters(), *m.buffers()] if t.is_floating_point())
        return next(found, torch.float32)

    def to(self, device: torch.device | str) -> None:
        for module in self.modules:
            module.to(device)

    def fingerprint(self) -> str:
        """Digest of all weights and settings. Of plain functions only the name is known."""
        digest = hashlib.blake2b(
            json.dumps([type(self).__name__, self._functions, self._settings]).encode(), digest_size=16
        )
        for module in self.modules:
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                if isinstance(value, Tensor):
                    raw = value.detach().cpu().contiguous().reshape(-1)
                    digest.update(raw.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"{type(self).__name__}({', '.join([*self._functions, settings])})"


def require(adapter: Adapter, who: str, needs: set[str]) -> None:
    """Refuses what the adapter cannot give."""
    if missing := sorted(needs - adapter.provides):
        raise ValueError(
            f"{who} needs {', '.join(missing)}, which {type(adapter).__name__} does not give "
            f"(it gives {', '.join(sorted(adapter.provides))})"
        )


def _networks(function: object) -> list[nn.Module]:
    """The modules behind a model: itself, the one that it is a method of, or those that it holds."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return [owner]
    return [value for value in getattr(owner, "__dict__", {}).values() if isinstance(value, nn.Module)]


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def describe(value: object) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of " + ", ".join(describe(part) for part in value)
    return f"a {type(value).__name__}"
