"""The prototype layer of ProtoPNet and its family."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..prototype import (
    PrototypeActivation,
    channel_hint,
    check_activation,
    check_metric,
    check_precision,
    integer,
    prototype_activation,
    prototype_map,
)
from ..selection import k_center
from .patches import grid_of, take

INITS = ("uniform", "normal", "orthogonal")
_KEY = "prototype_vectors"
_ONES = "ones"
_FROM_STATE = ("num_prototypes", "channels", "kernel_size", "init")


class PrototypeLayer(nn.Module):
    """Activation of each prototype by its nearest patch (Chen et al. 2019, "This Looks Like That", eq. 1).

    Takes the place of the two convolutions, the pooling and the logarithm of ProtoPNet's and Patronus' layers, and
    loads their checkpoints: its one parameter is ``prototype_vectors``, and a stored ``ones`` is dropped.

    Parameters
    ----------
    num_prototypes, channels : int
        P and D.
    kernel_size : int or tuple of ints, default 1
        Window of a prototype. 1 fits feature maps of any number of axes; another int k is (k, k), so give one size an
        axis where there are not two. The parameter has shape (P, D, *kernel): (P, D, 1, 1) for 1.
    metric : {"sqeuclidean", "euclidean", "cosine", "dot"}
    activation : {"log", "linear", "exp", "reciprocal"} or None
    eps : float, default 1e-4
    topk : int, default 1
        Nearest patches to return; see `protofast.prototype_activation` for these four.
    init : {"uniform", "normal", "orthogonal"} or Tensor, default "uniform"
        U[0, 1) as ProtoPNet and Patronus; N(0.5, 0.1²) as ProtoTree; orthonormal rows, in blocks of D·prod(K), for
        ``cosine`` and ``dot``; or the vectors themselves, (P, D) or (P, D, *kernel). From data: `initialize_from`.
    precision : str, default "auto"
        Arithmetic of the search, as in `protofast.prototype_activation`.
    device, dtype : optional
        Of the parameter; by default those of `init`, or torch's.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that does not fit.

    Notes
    -----
    ``torch.compile(fullgraph=True)``, autocast, deepcopy, pickle and DistributedDataParallel work. `prune` and
    `append` change the shape of the parameter in place: do so before wrapping the model in DistributedDataParallel, or
    wrap it anew.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> layer = pf.nn.PrototypeLayer(30, 128)
    >>> features = torch.rand(2, 128, 7, 7)
    >>> layer(features).shape
    torch.Size([2, 30])
    >>> activation, distance, index = layer(features, return_all=True)
    """

    prototype_vectors: nn.Parameter

    def __init__(
        self,
        num_prototypes: int,
        channels: int,
        kernel_size: int | Sequence[int] = 1,
        *,
        metric: str = "sqeuclidean",
        activation: str | None = "log",
        eps: float = 1e-4,
        topk: int = 1,
        init: str | Tensor = "uniform",
        precision: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_prototypes, channels = _positive("num_prototypes", num_prototypes), _positive("channels", channels)
        kernel = _kernel_size(kernel_size)
        check_metric(metric)
        check_activation(activation, eps)
        check_precision(precision)
        self.metric, self.activation, self.eps, self.precision = metric, activation, eps, precision
        self.topk = _positive("topk", topk)
        shape = (num_prototypes, channels, *kernel)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype!r}; give a floating-point one, such as torch.float32")
        if isinstance(init, Tensor):
            if not init.is_floating_point():
                raise TypeError(f"init is {init.dtype}; give floating-point vectors")
            vectors = _finite("init", _fitted("init", init.detach(), shape))
            self.prototype_vectors = nn.Parameter(vectors.to(device=device, dtype=dtype, copy=True))
        else:
            self.prototype_vectors = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters(init)

    @property
    def num_prototypes(self) -> int:
        return self.prototype_vectors.shape[0]

    @property
    def channels(self) -> int:
        return self.prototype_vectors.shape[1]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(self.prototype_vectors.shape[2:])

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_all: bool = False
    ) -> Tensor | PrototypeActivation:
        """Activations of the feature maps `x`.

        Parameters
        ----------
        x : Tensor of shape (B, D, *S)
        mask : bool Tensor of shape (B, *S), optional
            A patch with a False pixel never wins.
        return_all : bool, default False
            Also distances and patch indices, for losses and pictures.

        Returns
        -------
        Tensor or PrototypeActivation
            (B, P), or (B, P, topk) from topk = 2 on. All is float32 (float64 for float64); the activation alone comes
            in the parameter's dtype where that is float16 or bfloat16, as a next layer of that dtype wants it.
        """
        found = prototype_activation(
            x,
            self._prototypes(),
            metric=self.metric,
            activation=self.activation,
            eps=self.eps,
            topk=self.topk,
            mask=mask,
            precision=self.precision,
        )
        if return_all:
            return found
        dtype = self.prototype_vectors.dtype
        return found.activation.to(dtype) if dtype in (torch.float16, torch.bfloat16) else found.activation

    def map(self, x: Tensor, *, activation: bool = True) -> Tensor:
        """Activation, or distance, of each prototype at every patch: (B, P, *grid), differentiable.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> pf.nn.PrototypeLayer(3, 8).map(torch.rand(2, 8, 5, 4)).shape
        torch.Size([2, 3, 5, 4])
        """
        kind = self.activation if activation else None
        return prototype_map(x, self._prototypes(), metric=self.metric, activation=kind, eps=self.eps)

    def _prototypes(self) -> Tensor:
        """The vectors as the functions take them: (P, D) where the kernel is a single pixel, whatever the axes."""
        vectors = self.prototype_vectors
        return vectors.flatten(1) if math.prod(vectors.shape[2:]) == 1 else vectors

    def _kernel(self, features: Tensor) -> list[int]:
        """The kernel over the axes of these features, which are checked."""
        if features.ndim < 3 or features.shape[1] != self.channels:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; give (B, {self.channels}, *S)"
                + channel_hint(tuple(features.shape), (self.channels,))
            )
        axes = features.ndim - 2
        kernel = [1] * axes if math.prod(self.kernel_size) == 1 else list(self.kernel_size)
        if len(kernel) != axes or min(grid_of(features, kernel)) < 1:
            raise ValueError(
                f"features has shape {tuple(features.shape)}, where no patch of kernel_size {self.kernel_size} fits"
            )
        return kernel

    def extra_repr(self) -> str:
        return (
            f"{self.num_prototypes}, {self.channels}, kernel_size={self.kernel_size}, metric={self.metric!r}, "
            f"activation={self.activation!r}, eps={self.eps:g}, topk={self.topk}"
            + (f", precision={self.precision!r}" if self.precision != "auto" else "")
        )

    # --- values ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, init: str = "uniform") -> None:
        """Draws the vectors anew, by one of the names of `init`."""
        if not isinstance(init, str):
            choice = ", ".join(map(repr, INITS))
            raise TypeError(f"init is a {type(init).__name__}; give one of {choice}, or to the class a torch tensor")
        vectors = self.prototype_vectors
        if init == "uniform":
            vectors.uniform_()
        elif init == "normal":
            vectors.normal_(0.5, 0.1)
        elif init == "orthogonal":
            rows = torch.empty(vectors.shape[0], math.prod(vectors.shape[1:]), device=vectors.device)
            for block in rows.split(rows.shape[1]):
                nn.init.orthogonal_(block)
            vectors.copy_(rows.reshape(vectors.shape))
        else:
            raise ValueError(f"init is {init!r}; choose one of {', '.join(map(repr, INITS))}, or give a tensor")

    @torch.no_grad()
    def initialize_from(
        self, features: Tensor, *, method: str = "k-center", generator: torch.Generator | None = None
    ) -> Tensor:
        """Takes patches of `features` as prototypes, no patch twice.

        Parameters
        ----------
        features : Tensor of shape (B, D, *S)
            Of a sample of the data, with P patches or more.
        method : {"k-center", "random"}
            From a random patch on, always the patch farthest from those taken (`protofast.k_center`, by the angle
            where the metric is ``cosine``); it holds all windows in memory, n·D·prod(K) numbers. Or P patches at
            random.
        generator : torch.Generator, optional
            On the CPU.

        Returns
        -------
        int64 Tensor of shape (P,)
            The patches taken, b·N + index for patch `index` of sample `b`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument that does not fit; features must be finite.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> layer = pf.nn.PrototypeLayer(5, 8)
        >>> taken = layer.initialize_from(torch.rand(4, 8, 7, 7), generator=torch.Generator().manual_seed(0))
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features is a {type(features).__name__}; give a torch tensor")
        if not isinstance(generator, (torch.Generator, type(None))):
            raise TypeError(f"generator is {generator!r}; give torch.Generator().manual_seed(0), or None")
        kernel = self._kernel(features)
        each = math.prod(grid_of(features, kernel))
        count = features.shape[0] * each
        if count < self.num_prototypes:
            raise ValueError(f"features has {count} patches; the layer needs {self.num_prototypes}, give more samples")
        if not features.isfinite().all():
            sample = int((~features.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"features has values in sample {sample} that are not finite")
        device = features.device
        if method == "random":
            taken = torch.randperm(count, generator=generator)[: self.num_prototypes].to(device)
        elif method == "k-center":
            start = int(torch.randint(count, (), generator=generator))
            every = torch.arange(count, device=device)
            rows = take(features, every // each, every % each, kernel).flatten(1)
            metric = "cosine" if self.metric == "cosine" else "euclidean"
            taken = torch.as_tensor(k_center(rows, self.num_prototypes, metric=metric, start=start).indices)
        else:
            raise ValueError(f"method is {method!r}; choose 'k-center' or 'random'")
        chosen = take(features, taken // each, taken % each, kernel)
        self.prototype_vectors.copy_(chosen.reshape(self.prototype_vectors.shape))
        return taken

    # --- number of prototypes --------------------------------------------------------------------------------------

    def prune(self, keep: Tensor | Sequence[int], *, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
        """Drops all prototypes but those in `keep`.

        The parameter stays the same object, with a smaller shape; its gradient shrinks with it. A graph recorded
        before cannot run backward any more, and torch says so.

        Parameters
        ----------
        keep : bool Tensor of shape (P,), or integer indices
            Indices also set the order.
        optimizer : torch.optim.Optimizer, optional
            One that holds the parameter: its state (momenta) shrinks likewise. Without it, an optimizer that has made
            a step must be made anew.

        Returns
        -------
        int64 Tensor
            The indices kept, with which to shrink what goes by prototype: ``prototype_classes[kept]``, and the columns
            of the head, ``head.weight = nn.Parameter(head.weight.detach()[:, kept])``. That is a new parameter: make
            the optimizer that holds the head anew.

        Raises
        ------
        TypeError, ValueError, IndexError
            Naming the argument; nothing has changed then.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> layer = pf.nn.PrototypeLayer(4, 8)
        >>> layer.prune(torch.tensor([True, False, True, True]))
        tensor([0, 2, 3])
        """
        kept = self._indices(keep)
        self._resize(lambda rows, _: rows[kept.to(rows.device)], optimizer)
        return kept

    def append(self, vectors: Tensor, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds prototypes after those there are.

        Parameters
        ----------
        vectors : Tensor of shape (n, D) or (n, D, *kernel)
        optimizer : torch.optim.Optimizer, optional
            One that holds the parameter: its state (momenta) grows, by zeros. As for `prune`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; nothing has changed then.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> layer = pf.nn.PrototypeLayer(4, 8)
        >>> layer.append(torch.rand(2, 8))
        >>> layer.num_prototypes
        6
        """
        if not isinstance(vectors, Tensor):
            raise TypeError(f"vectors is a {type(vectors).__name__}; give a torch tensor")
        if vectors.ndim < 2:
            raise ValueError(f"vectors has shape {tuple(vectors.shape)}; give (n, {self.channels})")
        shape = (vectors.shape[0], *self.prototype_vectors.shape[1:])
        new = _finite("vectors", _fitted("vectors", vectors.detach(), shape))

        def grown(rows: Tensor, values: bool) -> Tensor:
            more = new if values else new.new_zeros(new.shape)
            return torch.cat([rows, more.to(rows.device, rows.dtype)])

        self._resize(grown, optimizer)

    def _indices(self, keep: Tensor | Sequence[int]) -> Tensor:
        count = self.num_prototypes
        try:
            found = torch.as_tensor(keep).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"keep is {keep!r}; give {count} bools, or indices") from None
        if found.ndim != 1:
            raise ValueError(f"keep has shape {tuple(found.shape)}; give {count} bools, or a list of indices")
        if found.dtype == torch.bool:
            if len(found) != count:
                raise ValueError(f"keep has {len(found)} bools; the layer has {count} prototypes")
            found = found.nonzero()[:, 0]
        elif len(found) and (found.is_floating_point() or found.is_complex()):
            raise TypeError(f"keep is {found.dtype}; give bools or integer indices")
        if not len(found):
            raise ValueError("keep leaves no prototype; keep at least one")
        if found.min() < 0 or found.max() >= count:
            raise IndexError(f"keep runs from {int(found.min())} to {int(found.max())}; there are 0 to {count - 1}")
        if len(found.unique()) != len(found):
            raise ValueError("keep holds an index twice; give each once")
        return found.long()

    @torch.no_grad()
    def _resize(self, change: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Applies `change(rows, are they the vectors)` to the parameter, its gradient and its optimizer state."""
        parameter = self.prototype_vectors
        state = {}
        if not isinstance(optimizer, (torch.optim.Optimizer, type(None))):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer, or None")
        if optimizer is not None:
            if not any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                raise ValueError("optimizer does not hold this layer's prototype_vectors; give the one that does")
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    if value.shape != parameter.shape:
                        raise ValueError(
                            f"optimizer keeps {name!r} of shape {tuple(value.shape)}, which cannot follow the "
                            f"prototypes {tuple(parameter.shape)}; make the optimizer anew, without optimizer="
                        )
                    state[name] = change(value, False)
        rows = change(parameter.data, True)
        grad = None if parameter.grad is None else change(parameter.grad, False)
        parameter.grad = None
        # By way of another dtype, which makes torch forget the shape it expects gradients in.
        other = torch.float64 if rows.dtype != torch.float64 else torch.float32
        parameter.data = rows.new_empty(0, dtype=other)
        parameter.data = rows
        torch.autograd.graph.increment_version(parameter)
        parameter.grad = grad
        if optimizer is not None:
            optimizer.state.get(parameter, {}).update(state)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], **options: Any) -> PrototypeLayer:
        """A layer with the prototypes of a checkpoint of a whole model, such as ProtoPNet's or Patronus'.

        Parameters
        ----------
        state : mapping of str to Tensor
            With one key that ends in ``prototype_vectors``, of shape (P, D, *kernel).
        **options
            As for the class: metric, activation, eps, topk, precision, device, dtype.

        Raises
        ------
        TypeError, ValueError
            Naming the argument that does not fit.

        Examples
        --------
        >>> import torch, protofast as pf
        >>> state = {"proactBlock.prototype_vectors": torch.rand(30, 128, 1, 1)}
        >>> pf.nn.PrototypeLayer.from_state_dict(state).num_prototypes
        30
        """
        if not isinstance(state, Mapping):
            instead = "a mapping of names to tensors, as model.state_dict() is"
            if isinstance(state, nn.Module):
                instead = "its state_dict()"
            elif isinstance(state, (str, os.PathLike)):
                instead = "what torch.load makes of the file"
            raise TypeError(f"state is a {type(state).__name__}; give {instead}")
        keys = [key for key in state if _is_key(key)]
        for key, value in state.items() if not keys else ():
            if isinstance(value, nn.Module) or (isinstance(value, Mapping) and any(_is_key(name) for name in value)):
                raise ValueError(
                    f"state has {_KEY!r} a level down; give state[{key!r}]"
                    + (".state_dict()" if isinstance(value, nn.Module) else "")
                )
        if len(keys) != 1:
            raise ValueError(f"state has {len(keys)} keys that end in {_KEY!r} ({', '.join(keys)}); give one with one")
        vectors = state[keys[0]]
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            kind = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(f"state has {kind} as {keys[0]!r}; give a floating-point tensor (P, D, *kernel)")
        if vectors.ndim < 2 or 0 in vectors.shape:
            raise ValueError(f"state has shape {tuple(vectors.shape)} as {keys[0]!r}; give (P, D) or (P, D, *kernel)")
        _finite(f"state as {keys[0]!r}", vectors)
        ones = keys[0].removesuffix(_KEY) + _ONES
        if ones in state and not _all_ones(state[ones]):
            raise ValueError(
                f"state has other values than 1 as {ones!r}; they weigh the channels, which this layer cannot"
            )
        if taken := [name for name in _FROM_STATE if name in options]:
            raise TypeError(f"{taken[0]} comes from the state; leave it out")
        kernel = vectors.shape[2:] or (1, 1)
        return cls(vectors.shape[0], vectors.shape[1], kernel, init=vectors, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # ProtoPNet's and Patronus' constant; torch gives us a copy of the dict
        if not _all_ones(state_dict.pop(prefix + _ONES, None)):
            rest[-1].append(
                f"{prefix + _ONES} has other values than 1: they weigh the channels, which this layer cannot"
            )
        vectors = state_dict.get(prefix + _KEY)
        if (
            isinstance(vectors, Tensor)
            and vectors.shape[:2] == self.prototype_vectors.shape[:2]
            and vectors.numel() == self.prototype_vectors.numel()
            and math.prod(self.kernel_size) == 1
        ):
            state_dict[prefix + _KEY] = vectors.reshape(self.prototype_vectors.shape)  # from other numbers of axes
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _positive(name: str, value: Any) -> int:
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")
    return value


def _kernel_size(value: Any) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError("kernel_size is empty; give one size an axis")
        return tuple(_positive("kernel_size", width) for width in value)
    return (_positive("kernel_size", value),) * 2


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and (key == _KEY or key.endswith("." + _KEY))


def _all_ones(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_meta or bool((value == 1).all())


def _finite(name: str, vectors: Tensor) -> Tensor:
    if not vectors.is_meta and not bool(vectors.isfinite().all()):
        broken = int((~vectors.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name} has values in prototype {broken} that are not finite")
    return vectors


def _fitted(name: str, vectors: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Vectors (P, D) or (P, D, *kernel) in the latter shape."""
    if tuple(vectors.shape) != shape and not (tuple(vectors.shape) == shape[:2] and math.prod(shape[2:]) == 1):
        raise ValueError(f"{name} has shape {tuple(vectors.shape)}; the layer needs {shape}")
    return vectors.reshape(shape)
