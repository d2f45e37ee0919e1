"""Adapters: one small protocol over encoder–decoders, diffusion models, generators and plain functions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..ddim import DDIMSchedule
from .noise import Noise

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


def _evaluating(method: _Method) -> _Method:
    """Runs a method in evaluation mode and without gradients, and puts every submodule's mode back."""

    @functools.wraps(method)
    def run(self: _Model, *args: Any, **kwargs: Any) -> Any:
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


class _Model:
    """What the adapters share: the modules behind them, their device and dtype, and a fingerprint."""

    def __init__(self, functions: Sequence[object], settings: dict[str, Any]) -> None:
        self.modules = [function for function in functions if isinstance(function, nn.Module)]
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


class VAEAdapter(_Model):
    """An encoder–decoder whose encoder gives a Gaussian q(z|x); intrinsic criterion "kld".

    Parameters
    ----------
    model : object
        With ``decode(z)`` and either ``encode(x)`` → (mean, log variance) or a forward that returns (…, mean,
        log variance). diffusers' ``AutoencoderKL`` is understood too.
    sample_latent : bool, default False
        Reconstruct from a z drawn from q(z|x), as the paper's code does (each anchor has its own seed), instead of
        from the mean.
    latent_shape : sequence of int, optional
        Shape of one z; by default that of the encoder's mean.
    flatten : bool, default False
        Give the encoder (B, C·H·W) instead of (B, C, H, W).

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import Noise, VAEAdapter
    >>> class Model:
    ...     encode = staticmethod(lambda x: (x.flatten(1)[:, :2], torch.zeros(len(x), 2)))
    ...     decode = staticmethod(lambda z: z.repeat(1, 2).reshape(-1, 1, 2, 2))
    >>> adapter = VAEAdapter(Model())
    >>> state = adapter.analyse(torch.rand(3, 1, 2, 2), Noise(range(3)), frozenset())
    >>> state["mean"].shape, adapter.generate(Noise(range(5))).shape
    (torch.Size([3, 2]), torch.Size([5, 1, 2, 2]))
    """

    provides = frozenset({"reconstruction", "mean", "log_variance", "latent"})
    intrinsic: tuple[str, ...] = ("kld",)

    def __init__(
        self,
        model: Any,
        *,
        sample_latent: bool = False,
        latent_shape: Sequence[int] | None = None,
        flatten: bool = False,
    ) -> None:
        if not callable(getattr(model, "decode", None)):
            raise TypeError(f"model is a {type(model).__name__} without decode(z); wrap it in a FunctionAdapter")
        super().__init__([model], {"sample_latent": sample_latent, "flatten": flatten})
        self.model, self.sample_latent, self.flatten = model, sample_latent, flatten
        self.latent_shape = None if latent_shape is None else tuple(latent_shape)

    @_evaluating
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        mean, log_variance = self._encode(x.flatten(1) if self.flatten else x)
        self.latent_shape = tuple(mean.shape[1:])
        z = mean
        if self.sample_latent:
            z = mean + (log_variance / 2).exp() * noise.normal(*mean.shape[1:]).to(mean)
        return {
            "reconstruction": self._decode(z),
            "mean": mean,
            "log_variance": log_variance,
            "latent": mean.flatten(1),
        }

    @_evaluating
    def generate(self, noise: Noise) -> Tensor:
        if self.latent_shape is None:
            raise ValueError("latent_shape is not known before the first analyse(); give it to VAEAdapter")
        return self._decode(noise.normal(*self.latent_shape).to(self.device, self.dtype))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encode = getattr(self.model, "encode", None)
        output = self.model(x) if encode is None else encode(x)
        output = getattr(output, "latent_dist", output)
        if hasattr(output, "mean") and hasattr(output, "logvar"):
            output = output.mean, output.logvar
        parts = output[-2:] if isinstance(output, tuple | list) else ()
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts) or parts[0].shape != parts[1].shape:
            raise TypeError(
                f"{'encode' if encode else 'forward'} of the model returned {_describe(output)}; it must return the "
                "mean and the log variance of q(z|x), two tensors of one shape (B, …)"
            )
        if len(parts[0]) != len(x):
            raise ValueError(
                f"the model's mean has shape {tuple(parts[0].shape)} for {len(x)} images; give one row an image"
            )
        return parts[0], parts[1]

    def _decode(self, z: Tensor) -> Tensor:
        output = self.model.decode(z)
        return getattr(output, "sample", output)


class DiffusionAdapter(_Model):
    """A diffusion model ``model(x, t) → prediction``; reconstruction by DDIM inversion and sampling.

    Intrinsic criteria are "denoising_loss", the mean squared error of the prediction averaged over evenly spaced
    timesteps with noise fixed for each anchor, and "inversion_nll", ½‖x_T‖² at the inverted noise x_T.

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
            raise TypeError(f"schedule is a {type(schedule).__name__}; give a protofast.DDIMSchedule")
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

    @_evaluating
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        from ..diffusion import invert

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

    @_evaluating
    def generate(self, noise: Noise) -> Tensor:
        if self.image_shape is None:
            raise ValueError("image_shape is not known before the first analyse(); give it to DiffusionAdapter")
        return self._sample(noise.normal(*self.image_shape).to(self.device, self.dtype))

    def _sample(self, noise: Tensor) -> Tensor:
        from ..diffusion import sample

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
                f"the model predicted {_describe(output)} for images of shape {tuple(x.shape)}; it must agree"
            )
        return output

    def _denoising_loss(self, x: Tensor, noise: Noise) -> Tensor:
        from ..diffusion import add_noise

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


class GeneratorAdapter(_Model):
    """A generator ``z → images`` such as a GAN; without an inverter, z is found by Adam on the squared error.

    Intrinsic criterion "latent_nll", ½‖z‖² at the z found; reconstruction is the generator's image of it.

    Parameters
    ----------
    generator : callable
        z (B, *latent_shape) → images (B, C, H, W).
    latent_shape : sequence of int
    inverter : callable, optional
        Images (B, C, H, W) → z.
    steps : int, default 200
        Adam steps of the search; the best z on the way is kept.
    learning_rate : float, default 0.05

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import GeneratorAdapter, Noise
    >>> adapter = GeneratorAdapter(lambda z: z.sigmoid().reshape(-1, 1, 2, 2), (4,), steps=300)
    >>> x = torch.full((2, 1, 2, 2), 0.6)
    >>> state = adapter.analyse(x, Noise(range(2)), frozenset())
    >>> torch.allclose(state["reconstruction"], x, atol=0.01)
    True
    """

    provides = frozenset({"reconstruction", "latent"})
    intrinsic: tuple[str, ...] = ("latent_nll",)

    def __init__(
        self,
        generator: Callable[[Tensor], Tensor],
        latent_shape: Sequence[int],
        inverter: Callable[[Tensor], Tensor] | None = None,
        *,
        steps: int = 200,
        learning_rate: float = 0.05,
    ) -> None:
        if steps < 1 or not learning_rate > 0:
            raise ValueError(f"steps is {steps} and learning_rate {learning_rate}; both must be positive")
        self.latent_shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
        settings = {"latent_shape": self.latent_shape, "steps": steps, "learning_rate": learning_rate}
        super().__init__([generator, inverter], settings)
        self.generator, self.inverter, self.steps, self.learning_rate = generator, inverter, steps, learning_rate

    @_evaluating
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        z = self._search(x, noise) if self.inverter is None else self.inverter(x)
        if not isinstance(z, Tensor) or tuple(z.shape) != (len(x), *self.latent_shape):
            raise ValueError(f"the inverter returned {_describe(z)}; it must return (B, *{self.latent_shape})")
        return {"reconstruction": self.generator(z), "latent": z.flatten(1)}

    @_evaluating
    def generate(self, noise: Noise) -> Tensor:
        return self.generator(noise.normal(*self.latent_shape).to(self.device, self.dtype))

    def _search(self, x: Tensor, noise: Noise) -> Tensor:
        """Each sample's z by its own Adam: the moments are elementwise and the loss is a sum over samples."""
        z = noise.normal(*self.latent_shape).to(self.device, self.dtype).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.learning_rate)
        best, least = z.detach().clone(), torch.full((len(x),), torch.inf, device=x.device)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                images = self.generator(z)
                if images.shape != x.shape:
                    raise ValueError(f"the generator made {tuple(images.shape)} where anchors are {tuple(x.shape)}")
                error = (images - x).square().flatten(1).mean(1)
                if step < self.steps:
                    (z.grad,) = torch.autograd.grad(error.sum(), z)
            better = error.detach() < least
            least = torch.where(better, error.detach(), least)
            best = torch.where(better.reshape(-1, *[1] * (z.ndim - 1)), z.detach(), best)
            if step < self.steps:
                optimizer.step()
        return best


class FunctionAdapter(_Model):
    """Any model, by functions of your own.

    Parameters
    ----------
    generate : callable
        ``generate(count, generator)`` → images (count, C, H, W); `generator` is a seeded `torch.Generator` on the
        CPU.
    reconstruct : callable
        Images (B, C, H, W) → reconstructions of that shape.
    encode : callable, optional
        Images → latents (B, …), for ``features="latents"`` and the criterion "latent_nll".
    modules : sequence of torch.nn.Module
        The networks behind the functions: put in evaluation mode while they run, and watched for changes when a run
        is resumed. Functions that are modules themselves need not be listed.

    Examples
    --------
    >>> import torch
    >>> from protofast.pxgen import FunctionAdapter, Noise
    >>> adapter = FunctionAdapter(
    ...     generate=lambda count, generator: torch.rand(count, 1, 4, 4, generator=generator),
    ...     reconstruct=lambda x: x.round(),
    ... )
    >>> adapter.generate(Noise(range(5))).shape
    torch.Size([5, 1, 4, 4])
    """

    intrinsic: tuple[str, ...] = ()

    def __init__(
        self,
        generate: Callable[[int, torch.Generator], Tensor],
        reconstruct: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor] | None = None,
        *,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__([generate, reconstruct, encode, *modules], {})
        self._generate, self._reconstruct, self._encode = generate, reconstruct, encode
        self.provides = frozenset({"reconstruction"} | ({"latent"} if encode else set()))

    @_evaluating
    def analyse(self, images: Tensor, noise: Noise, needs: frozenset[str]) -> State:
        x = images.to(self.device, self.dtype)
        state = {"reconstruction": self._reconstruct(x)}
        if self._encode is not None and "latent" in needs:
            state["latent"] = self._encode(x).flatten(1)
        return state

    @_evaluating
    def generate(self, noise: Noise) -> Tensor:
        return self._generate(len(noise), noise.generator())


def as_adapter(model: Any) -> Adapter:
    """The model itself when it is an adapter, else the adapter that fits its methods."""
    if hasattr(model, "analyse") and hasattr(model, "generate"):
        return model
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        return VAEAdapter(model)
    raise TypeError(
        f"model is a {type(model).__name__} without encode(x) and decode(z); wrap it in a VAEAdapter, "
        "DiffusionAdapter, GeneratorAdapter or FunctionAdapter of protofast.pxgen"
    )


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of " + ", ".join(_describe(part) for part in value)
    return f"a {type(value).__name__}"
