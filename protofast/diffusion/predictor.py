"""The model with its conditions, and what of them goes with which sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Predictor:
    """``predictor(x, timestep, conditions)``: the model's prediction, for both halves of 2B under guidance.

    `split` holds the conditions that have one row a sample, `shared` the others.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        guidance_scale: float | None,
        cond: Mapping[str, Any] | None,
        uncond: Mapping[str, Any] | None,
        *,
        samples: int,
        device: torch.device,
        compile: bool | str,
    ) -> None:
        if (guidance_scale is None) != (uncond is None):
            raise ValueError("guidance_scale and uncond go together; give both, or neither")
        cond = dict(cond or {})
        if uncond is not None and uncond.keys() != cond.keys():
            raise ValueError(f"uncond has the keys {sorted(uncond)} and cond {sorted(cond)}; they must be the same")
        self.model = torch.compile(model, mode=None if compile is True else compile) if compile else model
        self.guided = uncond is not None
        self.split: dict[str, Tensor] = {}
        self.shared: dict[str, Any] = {}
        self._keys: list[str] = []
        for key, value in cond.items():
            other = value if uncond is None else uncond[key]
            rows = [isinstance(part, Tensor) and part.shape[:1] == (samples,) for part in (value, other)]
            if all(rows):
                self._keys.append(key)
                self.split[f"cond[{key!r}]"] = value
                if self.guided:
                    self.split[f"uncond[{key!r}]"] = other
            elif any(rows) or not _same(value, other):
                raise ValueError(
                    f"{key!r} differs between cond and uncond and is no pair of Tensors with one row for each of the "
                    f"{samples} samples, so it cannot be stacked"
                )
            else:
                self.shared[key] = value.to(device) if isinstance(value, Tensor) else value

    def conditions(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's keyword arguments for a batch whose part of `split` is in `rows`."""
        given = dict(self.shared)
        for key in self._keys:
            value = rows[f"cond[{key!r}]"]
            given[key] = torch.cat([rows[f"uncond[{key!r}]"], value]) if self.guided else value
        return given

    def __call__(self, x: Tensor, timestep: int, conditions: Mapping[str, Any]) -> Tensor:
        if self.guided:
            x = torch.cat([x, x])
        output = self.model(x, torch.full((x.shape[0],), timestep, device=x.device), **conditions)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model returned a {type(output).__name__}; it must return a Tensor "
                "(wrap it, as in lambda x, t: model(x, t).sample)"
            )
        if output.shape != x.shape:
            raise ValueError(
                f"model returned shape {tuple(output.shape)} for a sample of {tuple(x.shape)}; they must agree"
            )
        return output


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
