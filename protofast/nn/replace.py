"""protofast's computation inside a module written like ProtoPNet's (Chen et al. 2019), whose outputs stay the same."""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..prototype import prototype_distance, prototype_map

Model = TypeVar("Model", bound=nn.Module)

_ATTRIBUTES = ("prototype_vectors", "ones", "prototype_distances")
_calls = threading.local()
"""``depth``: how many of a replaced module's methods this thread is inside."""


def replace_prototype_layer(model: Model) -> Model:
    """Puts protofast's computation into a module written like ProtoPNet's, in place.

    Such a module computes the map d = relu(conv2d(x², ones) − 2·conv2d(x, p) + Σp²), in ``_l2_convolution(x)`` or in
    ``prototype_distances``, and takes −max_pool2d(−d) over all of it. Afterwards d comes in the direct form Σ(x − p)²,
    and where `max_pool2d` over the whole map is all that reads it, no map is made. Whatever else reads it gets it:
    ``push_forward``, an average pool, a top-k. Parameters, buffers, state dict, optimizers and hooks are not touched.

    Parameters
    ----------
    model : nn.Module
        With ``prototype_vectors`` (P, D, K, L), ``ones`` of that shape and a method ``prototype_distances``. Its class
        is exchanged for a subclass of it of the same name; `restore_prototype_layer` undoes that. A module that is
        pickled (``torch.save(model)``) is of the old class, so that it loads where there is no protofast.

    Returns
    -------
    The module itself. Distances differ by the rounding errors of the old formula; under autocast they come in float32.
    Under ``torch.compile`` and ``torch.jit.trace`` the map is made, or the old formula stays where it is in
    ``prototype_distances`` itself. Replacing a module again changes nothing.

    Raises
    ------
    TypeError
        For no nn.Module, or one without these attributes.
    ValueError
        For a method that computes anything but d; where that only shows in use, at the first forward call.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> class Layer(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.prototype_vectors = torch.nn.Parameter(torch.rand(3, 4, 1, 1))
    ...         self.ones = torch.nn.Parameter(torch.ones(3, 4, 1, 1), requires_grad=False)
    ...     def prototype_distances(self, x):
    ...         conv = torch.nn.functional.conv2d
    ...         p2 = self.prototype_vectors.square().sum((1, 2, 3))[:, None, None]
    ...         return torch.relu(conv(x**2, self.ones) + (p2 - 2 * conv(x, self.prototype_vectors)))
    ...     def forward(self, x):
    ...         return -torch.nn.functional.max_pool2d(-self.prototype_distances(x), x.shape[2:]).flatten(1)
    >>> layer, x = Layer(), torch.rand(2, 4, 7, 7)
    >>> before = layer(x)
    >>> torch.allclose(pf.nn.replace_prototype_layer(layer)(x), before, atol=1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the nn.Module that holds the prototypes")
    if isinstance(model, _Replaced):
        return model
    if absent := [name for name in _ATTRIBUTES if not hasattr(model, name)]:
        inside = [name for name, part in model.named_modules() if name and all(hasattr(part, a) for a in _ATTRIBUTES)]
        hint = f"; its part {inside[0]!r} does: give that" if inside else ""
        raise TypeError(
            f"model is a {type(model).__name__} without {', '.join(absent)}; one like ProtoPNet's has all of "
            f"{', '.join(_ATTRIBUTES)}{hint}"
        )
    _check_shapes(model)
    plain: Any = type(model)
    name = "_l2_convolution" if _takes_one(getattr(model, "_l2_convolution", None)) else "prototype_distances"
    methods: dict[str, Any] = {"_plain": plain, "_verified": False, "__module__": plain.__module__}
    methods["__qualname__"] = plain.__qualname__
    if name == "_l2_convolution":
        _verify(model)
        methods[name] = _from_features
        methods["prototype_distances"] = _outermost("prototype_distances")
    else:
        methods[name] = _from_convolutions
    for outer in ("forward", "push_forward"):
        if hasattr(plain, outer):
            methods[outer] = _outermost(outer)
    model.__class__ = type(plain.__name__, (_Replaced, plain), methods)
    return model


def restore_prototype_layer(model: Model) -> Model:
    """Undoes `replace_prototype_layer`, in place.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    The module itself.

    Raises
    ------
    TypeError
        For a module that was not replaced.
    """
    if not isinstance(model, _Replaced):
        raise TypeError(f"model is a {type(model).__name__} whose prototype layer was not replaced")
    model.__class__ = model._plain
    return model


class _Replaced:
    """Of the classes that replaced modules get, in front of their own."""

    _plain: Any
    _verified: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Of the class it had, which can be found by its name, here and where there is no protofast.
        plain = self._plain.__new__(self._plain)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce_ex__(1)  # newer ones insist on the class of `self`


class _Distances(Tensor):
    """A map of distances, made when something other than a max-pool over all of it reads it. Autograd never sees it."""

    features: Tensor
    prototypes: Tensor
    negated: bool
    graded: bool
    made: Tensor | None

    @staticmethod
    def of(features: Tensor, prototypes: Tensor, negated: bool, grad: bool) -> _Distances:
        kernel = prototypes.shape[2:]
        grid = [size - width + 1 for size, width in zip(features.shape[2:], kernel, strict=True)]
        shape = (features.shape[0], prototypes.shape[0], *grid)
        lazy = Tensor._make_wrapper_subclass(
            _Distances,
            shape,
            dtype=torch.promote_types(features.dtype, prototypes.dtype),
            device=features.device,
            requires_grad=grad and (features.requires_grad or prototypes.requires_grad),
        )
        lazy.features, lazy.prototypes, lazy.negated, lazy.graded, lazy.made = features, prototypes, negated, grad, None
        return lazy

    def dense(self) -> Tensor:
        if self.made is None:
            with torch.set_grad_enabled(self.graded):  # as where the map would have been made
                distances = _map(self.features, self.prototypes)
                self.made = -distances if self.negated else distances
        return self.made

    def pooled(self, indices: bool) -> Any:
        with torch.set_grad_enabled(self.graded and torch.is_grad_enabled()):
            distance, index = prototype_distance(self.features, self.prototypes)
            shape = (*distance.shape, *[1] * (self.features.ndim - 2))
            largest = -distance.to(self.dtype).reshape(shape)
        return (largest, index.reshape(shape)) if indices else largest

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, _Distances) and first.made is None:
            if func in _NEGATIONS and len(args) == 1 and not kwargs:
                grad = first.graded and torch.is_grad_enabled()
                return _Distances.of(first.features, first.prototypes, not first.negated, grad)
            if func in _POOLS and first.negated and _is_whole(first.shape, *args[1:], **kwargs):
                return first.pooled(_POOLS[func])
        args, kwargs = _made((args, kwargs))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # what goes past the former


_PROPERTIES: Any = (Tensor.shape, Tensor.ndim, Tensor.dtype, Tensor.device, Tensor.requires_grad)
_SHAPES = {Tensor.size, Tensor.dim, Tensor.__len__, *(name.__get__ for name in _PROPERTIES)}
_NEGATIONS = {Tensor.neg, Tensor.__neg__, torch.neg, torch.negative, Tensor.negative}
_POOLS = {torch.max_pool2d: False, F.max_pool2d: False, F.max_pool2d_with_indices: True}


def _is_whole(
    shape: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> bool:
    """Whether one window of a max-pool is all of the map."""
    kernel, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value) for value in (kernel_size, padding, dilation)
    )
    return tuple(kernel) == tuple(shape[2:]) and set(padding) == {0} and set(dilation) == {1}


def _made(value: Any) -> Any:
    return tree_map_only(_Distances, _Distances.dense, value)


def _map(features: Tensor, prototypes: Tensor) -> Tensor:
    return prototype_map(features, prototypes).to(torch.promote_types(features.dtype, prototypes.dtype))


def _recording() -> bool:
    """Whether torch takes down a graph, which what is decided here at run time has no place in."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _distances(features: Tensor, prototypes: Tensor) -> Tensor:
    if _recording() or not getattr(_calls, "depth", 0):
        return _map(features, prototypes)
    return _Distances.of(features, prototypes, False, torch.is_grad_enabled())


def _outermost(name: str) -> Callable[..., Any]:
    """The class's own method; what leaves the outermost one is tensors like any."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(super(_Replaced, self), name)
        if _recording():
            return own(*args, **kwargs)
        _calls.depth = getattr(_calls, "depth", 0) + 1
        try:
            result = own(*args, **kwargs)
        finally:
            _calls.depth -= 1
        return result if _calls.depth else _made(result)

    method.__name__ = name
    return method


def _from_features(self: Any, x: Tensor) -> Tensor:
    return _distances(x, self.prototype_vectors)


def _from_convolutions(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Distances of the features that the module's own method would convolve with the prototypes."""
    own = super(_Replaced, self).prototype_distances
    if _recording():
        return own(*args, **kwargs)
    with parametrize.cached():  # so that a parametrized tensor is one object, however often it is read
        watch = _Convolutions(self.ones, self.prototype_vectors, stop=type(self)._verified)
        try:
            with watch:
                result = own(*args, **kwargs)
        except _FoundError:
            return _distances(watch.features, watch.prototypes)
    # The first time its own method went to its end.
    if watch.features is None or not watch.squares:
        raise ValueError(
            f"prototype_distances of {type(self).__name__} has no conv2d of x² with `ones` and of x with "
            "`prototype_vectors`; call protofast.prototype_distance in its code instead"
        )
    _compare(self, "prototype_distances", result, watch.features)
    type(self)._verified = True
    return _distances(watch.features, self.prototype_vectors)


class _FoundError(Exception):
    """Leaves the module's own method once its features are known."""


class _Convolutions(TorchFunctionMode):
    """Finds the features that are convolved with the prototypes; with `stop`, nothing is computed with them."""

    def __init__(self, ones: Tensor, prototypes: Tensor, stop: bool) -> None:
        super().__init__()
        self.ones, self.prototypes, self.stop = ones, prototypes, stop
        self.features: Any = None
        self.squares = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if weight is self.prototypes:
                self.features = x
                if self.stop:
                    raise _FoundError
            elif weight is self.ones:
                self.squares = True
                if self.stop:
                    return func(x[:1, :, : weight.shape[2], : weight.shape[3]], weight)
        return func(*args, **kwargs)


def _takes_one(method: Any) -> bool:
    """Whether it can be called with features alone."""
    if method is None:
        return False
    try:
        inspect.signature(method).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _check_shapes(model: Any) -> None:
    name = type(model).__name__
    prototypes, ones = model.prototype_vectors, model.ones
    if not isinstance(prototypes, Tensor) or prototypes.ndim != 4:
        has = tuple(prototypes.shape) if isinstance(prototypes, Tensor) else type(prototypes).__name__
        raise ValueError(f"prototype_vectors of {name} is {has}; ProtoPNet's is a tensor of shape (P, D, K, L)")
    if not isinstance(ones, Tensor) or ones.shape != prototypes.shape:
        has = tuple(ones.shape) if isinstance(ones, Tensor) else type(ones).__name__
        raise ValueError(f"ones of {name} is {has}; ProtoPNet's has the prototypes' shape {tuple(prototypes.shape)}")
    if not callable(model.prototype_distances):
        raise TypeError(f"prototype_distances of {name} is {model.prototype_distances!r}; ProtoPNet's is a method")


def _verify(model: Any) -> None:
    """Tries ``_l2_convolution`` on a small grid of features."""
    prototypes = model.prototype_vectors.detach()
    shape = (1, prototypes.shape[1], prototypes.shape[2] + 2, prototypes.shape[3] + 3)
    steps = torch.arange(math.prod(shape), device=prototypes.device, dtype=torch.float32)
    features = torch.cos(2.4 * steps).reshape(shape).to(prototypes.dtype)
    try:
        with torch.no_grad():
            result = model._l2_convolution(features)
    except Exception as error:
        raise ValueError(
            f"_l2_convolution of {type(model).__name__} does not take features {tuple(shape)}: {error}"
        ) from error
    _compare(model, "_l2_convolution", result, features)


@torch.no_grad()
def _compare(model: Any, name: str, result: Any, features: Tensor) -> None:
    """Whether a method gave the distances of the formula, to the rounding of its expansion: of the first sample."""
    prototypes = model.prototype_vectors
    exact = prototype_map(features[:1].double(), prototypes.double())
    wanted = (features.shape[0], *exact.shape[1:])
    shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    reason = f"gives {shape} for features {tuple(features.shape)}, not {wanted}"
    if shape == wanted:
        zero = torch.zeros_like(prototypes[:1], dtype=torch.float64)
        size = prototype_map(features[:1].double(), zero) + prototypes.double().square().sum((1, 2, 3))[:, None, None]
        unit = torch.finfo(result.dtype).eps
        if features.device.type == "cuda" and result.dtype == torch.float32:
            unit = 1e-3  # of TF32, which convolutions take there
        found = result[:1].double()
        wrong = (found - exact).abs() > 8 * (math.sqrt(prototypes[0].numel()) + 8) * unit * size
        if not bool(wrong.any()):  # a NaN is no error: it is one in every formula
            return
        reason = f"gives {float(found[wrong][0]):.6g} where Σ(x − p)² is {float(exact[wrong][0]):.6g}"
    raise ValueError(
        f"{name} of {type(model).__name__} does not compute squared distances: it {reason}. Only ProtoPNet's "
        "relu(conv2d(x², ones) − 2·conv2d(x, p) + Σp²) can be replaced; for others call protofast.prototype_distance "
        "or protofast.prototype_map"
    )
