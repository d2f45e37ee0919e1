"""Diffusion models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ddim import DDIMSchedule
from ..noise import Noise
from .base import Model, State, describe, evaluated


class DiffusionAdapter(Model):
    """A diffusion model ``model(x, t) → prediction``; reconstruction by DDIM inversion and sampling.

    Intrinsic criteria are "denoising_loss", the mean squared error of the prediction averaged over evenly spaced
    timesteps with noise fixed for each anchor, and "inversion_nll", ½‖x_T‖² at the inverted noise x_T.

    Images reach the model as they are; of one trained on [−1, 1], tell `explain` so by ``value_range=(-1, 1)``.

    Parameters
    ----------
    model : callable
        Images (B, C, H, W) and int64 timesteps (B,) → prediction of the images' shape.
    schedule : DDIMSchedule
    num_steps : int, default 50
        DDIM steps of generation, inversion and reconstruction, each.
    loss_timesteps : int, default 10
        Timesteps that the denoising loss is averaged over.
    prediction_type : {"epsilon", "sample", "v_prediction"}
    clip_range : float or (float, float), optional
        As in `protofast.diffusion.sample`, for generation and reconstruction.
    image_shape : sequence of int, optional
        By default that of the anchors.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> from protofast.pxgen import DiffusionAdapter, Noise
    >>> model = lambda x, t: torch.zeros_like(x)
    >>> adapter = DiffusionAdapter(model, pf.DDIMSchedule.linear(100), num_steps=5)
    >>> state = adapter.analyse(torch.rand(3, 1, 4, 4), Noise(range(3)), frozenset({"denoising_loss"}))
    >>> state["denoising_loss"].shape
    torch.Size([3])
    """

    provides = frozenset({"reconstruction", "inverted", "latent", "denoising_loss"})
    intrinsic: tuple[str, ...] = ("denoising_loss",)

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        schedule: DDIMSchedule,
        num_steps: int = 50,
        *,
        loss_timesteps: int = 10,
        prediction_type: str = "epsilon",
        clip_range: float | tuple[float, float] | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(schedule, DDIMSchedule):
            raise TypeError(
                f"schedule is a {type(schedule).__name__}; give a DDIMSchedule (DDIMSchedule.from_diffusers makes one "
                "of a diffusers scheduler)"
            )
        for name, value in (("num_steps", num_steps), ("loss_timesteps", loss_timesteps)):
            if not 1 <= value <= len(schedule):
                raise ValueError(f"{name} is {value}; give 1 to {len(schedule)}, the schedule's length")
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction_type!r}; choose 'epsilon', 'sample' or 'v_prediction'")
        settings = {
            "schedule": hashlib.blake2b(schedule.alphas_cumprod.numpy().tobytes(), digest_size=8).hexdigest(),
            "num_steps": num_steps,
            "loss_timesteps": loss_timesteps,
            "prediction_type": prediction_type,
            "clip_range": clip_range,
        }
        super().__init__([model], settings)
        self.model, self.schedule, self.num_steps, self.loss_timesteps = model, schedule, num_steps, loss_timesteps
        self.prediction_type, self.clip_range = prediction_type, clip_range
        self.image_shape = None if image_shape is None else tuple(image_shape)

    @evaluated
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        from ...diffusion import invert

        x = images.to(self.device, self.dtype)
        self.image_shape = tuple(x.shape[1:])
        state = {}
        if "denoising_loss" in needs:
            state["denoising_loss"] = self._denoising_loss(x, noise)
        if needs - {"denoising_loss"}:
            inverted = invert(self._predict, x, self.schedule, self.num_steps, prediction_type=self.prediction_type)
            state["inverted"], state["latent"] = inverted, inverted.flatten(1)
            if "reconstruction" in needs:
                state["reconstruction"] = self._sample(inverted)
        return state

    @evaluated
    def generate(self, noise: Noise) -> Tensor:
        if self.image_shape is None:
            raise ValueError("image_shape is not known before the first analyse(); give it to DiffusionAdapter")
        return self._sample(noise.normal(*self.image_shape).to(self.device, self.dtype))

    def _sample(self, noise: Tensor) -> Tensor:
        from ...diffusion import sample

        return sample(
            self._predict,
            noise,
            self.schedule,
            self.num_steps,
            prediction_type=self.prediction_type,
            clip_range=self.clip_range,
        )

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        output: Any = self.model(x, t)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise ValueError(
                f"the model predicted {describe(output)} for images of shape {tuple(x.shape)}; it must agree"
            )
        return output

    def _denoising_loss(self, x: Tensor, noise: Noise) -> Tensor:
        from ...diffusion import add_noise

        total = torch.zeros(len(x), dtype=torch.float64)
        for number in range(self.loss_timesteps):
            t = int((number + 0.5) * len(self.schedule) / self.loss_timesteps)
            e = noise.normal(*x.shape[1:]).to(x)
            predicted = self._predict(add_noise(x, e, t, self.schedule), torch.full((len(x),), t, device=x.device))
            target = e
            if self.prediction_type == "sample":
                target = x
            elif self.prediction_type == "v_prediction":
                signal = float(self.schedule.alphas_cumprod[t])
                target = signal**0.5 * e - (1 - signal) ** 0.5 * x
            error = (predicted.float() - target.float()).flatten(1).square().sum(1, dtype=torch.float64)
            total += error.cpu() / x[0].numel()
        return total / self.loss_timesteps
