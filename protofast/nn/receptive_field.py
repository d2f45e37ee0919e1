"""Which pixels of the image a patch of the feature map depends on, exactly."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layer import PrototypeLayer

_CURE = "give the layers as a list of (kernel, stride, padding[, dilation])"
_ALONE = "give the encoder alone, and the prototypes' window as kernel_size=layer.kernel_size"


@dataclass(frozen=True, eq=False, repr=False)
class ReceptiveField:
    """Pixel boxes of the patches of a feature map.

    Attributes
    ----------
    input_size : tuple of int
        Of the image.
    grid : tuple of int
        Of the patches.
    boxes : int64 Tensor of shape (N, 2 · axes)
        For each flat patch index the first pixel along each axis, then the pixel after the last: (top, left, bottom,
        right) in 2-D. Clipped to the image. A patch that sees only padding has a box of zeros.
    size, stride : tuple of (int or None)
        Box size before clipping and step from patch to patch; None along an axis where they are not the same
        everywhere (adaptive pooling, normalisation over the map).
    """

    input_size: tuple[int, ...]
    grid: tuple[int, ...]
    boxes: Tensor
    size: tuple[int | None, ...]
    stride: tuple[int | None, ...]

    def box(self, index: int | Sequence[int]) -> tuple[int, ...]:
        """Box of a patch, by its flat index or its position on the grid."""
        place = None
        try:
            if isinstance(index, (Sequence, np.ndarray, Tensor)) and _many(index):
                place = tuple(operator.index(i) for i in index)
            else:
                flat = operator.index(index)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"index is {index!r}; give a flat index, or a position on the grid") from error
        if place is None:
            inside = 0 <= flat < len(self.boxes)
        else:
            inside = len(place) == len(self.grid) and all(0 <= i < n for i, n in zip(place, self.grid, strict=True))
            flat = int(np.ravel_multi_index(place, self.grid)) if inside else -1
        if not inside:
            raise IndexError(f"index is {index}; the grid of patches is {self.grid}, {len(self.boxes)} in all")
        return tuple(self.boxes[flat].tolist())

    def __repr__(self) -> str:
        return f"ReceptiveField(grid={self.grid}, size={self.size}, stride={self.stride})"


def receptive_field(
    encoder: nn.Module | Iterable[Sequence[Any]],
    input_size: int | Sequence[int],
    *,
    kernel_size: int | Sequence[int] = 1,
) -> ReceptiveField:
    """Exact pixel box of each patch: the hull of the pixels that it depends on.

    Nothing is rounded and nothing is taken for granted at the borders: pixels are followed through every kernel,
    stride, padding, dilation and ``ceil_mode``, and padding at an inner layer passes nothing on. So a border box can
    be smaller than its size clipped to the image (the recursion of ProtoPNet's code, which knows only that).

    Parameters
    ----------
    encoder : Module or list of tuples
        A module that ``torch.fx`` can trace: convolutions, pooling, padding, elementwise functions, and normalisation,
        with branches that are added, multiplied or concatenated (residual nets). It counts as in eval mode. Or
        (kernel, stride, padding[, dilation]) of each layer in order, each an int or one an axis.
    input_size : int or sequence of int
        Pixels of the image along each spatial axis; an int stands for as many axes as the encoder's layers have, and
        for two where they do not say.
    kernel_size : int or sequence of int, default 1
        Of the prototypes, ``layer.kernel_size``: then a patch is a window on the features.

    Returns
    -------
    ReceptiveField

    Raises
    ------
    TypeError, ValueError
        Naming the argument, or the module or function that it cannot follow.

    Examples
    --------
    >>> import torch, protofast as pf
    >>> encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, stride=2, padding=1), torch.nn.ReLU())
    >>> field = pf.nn.receptive_field(encoder, 32)
    >>> field.grid, field.size, field.stride
    ((16, 16), (3, 3), (2, 2))
    >>> field.box(0), field.box((1, 1))
    ((0, 0, 2, 2), (1, 1, 4, 4))
    >>> pf.nn.receptive_field([(3, 2, 1), (3, 1, 0)], 32).size
    (7, 7)
    """
    if isinstance(encoder, Tensor) or not isinstance(encoder, (nn.Module, Iterable)):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a module, or {_CURE.removeprefix('give ')}")
    layers = encoder if isinstance(encoder, nn.Module) else _specs(encoder)
    sizes = _sizes(input_size, layers, kernel_size)
    field = _Field([_Axis.image(size) for size in sizes])
    if isinstance(layers, nn.Module):
        field = _follow(layers, field)
    else:
        for number, spec in enumerate(layers):
            field = field.window(*spec, name=f"layer {number}")
    field = field.window(kernel_size, name="kernel_size")
    return field.result(sizes)


def _specs(encoder: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    specs = list(encoder)
    for number, spec in enumerate(specs):
        if not isinstance(spec, Sequence) or len(spec) not in (3, 4):
            raise ValueError(f"encoder has {spec!r} as layer {number}; give (kernel, stride, padding[, dilation])")
    return specs


def _sizes(value: Any, layers: nn.Module | list[Sequence[Any]], kernel_size: Any) -> tuple[int, ...]:
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(value, Iterable) and _many(value):
            sizes = tuple(map(operator.index, value))
        else:
            sizes = (operator.index(value),) * _count_axes(layers, kernel_size)
    except TypeError as error:
        raise TypeError(f"input_size is {value!r}; give pixels as an int, or one an axis such as (224, 224)") from error
    if not sizes or min(sizes) < 1:
        raise ValueError(f"input_size is {value}; give pixels along each spatial axis, such as (224, 224)")
    return sizes


def _count_axes(layers: nn.Module | list[Sequence[Any]], kernel_size: Any) -> int:
    """As the layers say, else the prototypes' window, else 2."""
    if isinstance(layers, nn.Module):
        found = next((axes for axes in map(_axes_of, layers.modules()) if axes), 0)
    else:
        found = max(
            (len(v) for spec in layers for v in spec if isinstance(v, Sequence) and not isinstance(v, str)), default=0
        )
    if not found and isinstance(kernel_size, Sequence) and len(kernel_size) > 1:  # one number goes for every axis
        found = len(kernel_size)
    return found or 2


def _axes_of(module: nn.Module) -> int | None:
    return next((axes for axes, types in _BY_AXES.items() if isinstance(module, types)), None)


class _Axis:
    """Along one axis: which pixels each position sees, and the first box before clipping, with size and step."""

    def __init__(self, sees: np.ndarray, first: int | None, size: int | None, step: int | None) -> None:
        self.sees = sees  # (positions, pixels) bool
        self.first, self.size, self.step = first, size, step

    @classmethod
    def image(cls, pixels: int) -> _Axis:
        return cls(np.eye(pixels, dtype=bool), 0, 1, 1)

    def __len__(self) -> int:
        return len(self.sees)

    def read(self, taps: np.ndarray) -> np.ndarray:
        """What positions see that read `taps` (positions, k) here; −1 reads nothing."""
        sees = np.zeros((len(taps), self.sees.shape[1]), bool)
        for tap in taps.T:
            there = (tap >= 0) & (tap < len(self))
            sees[there] |= self.sees[tap[there]]
        return sees

    def window(
        self, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool, mode: str, name: str
    ) -> _Axis:
        reach = dilation * (kernel - 1) + 1
        room = len(self) + before + after - reach
        if room < 0 or min(kernel, stride, dilation) < 1:
            raise ValueError(f"{name}: kernel {kernel}, dilation {dilation} does not fit {len(self)} positions")
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= len(self) + before:
            count -= 1  # a window must begin inside
        taps = np.arange(count)[:, None] * stride - before + np.arange(kernel) * dilation
        sees = self.read(_padded(taps, len(self), mode))
        if self.first is None or self.size is None or self.step is None:
            return _Axis(sees, None, None, None)
        return _Axis(sees, self.first - before * self.step, self.size + (reach - 1) * self.step, self.step * stride)

    def adaptive(self, count: int) -> _Axis:
        """Windows of adaptive pooling."""
        if len(self) % count == 0:
            return self.window(len(self) // count, len(self) // count, 0, 0, 1, False, "zeros", "")
        start = np.arange(count) * len(self) // count
        stop = -(-(np.arange(count) + 1) * len(self) // count)
        sees = np.stack([self.sees[a:b].any(0) for a, b in zip(start, stop, strict=True)])
        return _Axis(sees, None, None, None)

    def all(self) -> _Axis:
        """Every position sees what any does."""
        return _Axis(np.broadcast_to(self.sees.any(0), self.sees.shape), None, None, None)

    def union(self, other: _Axis, name: str) -> _Axis:
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise ValueError(f"{name} joins branches of {len(self)} and {len(other)} positions")
        sees = self.sees | other.sees  # a single position goes to all
        mine, theirs = (self.first, self.size, self.step), (other.first, other.size, other.step)
        if len(self) != len(other) or None in mine + theirs or self.step != other.step:
            return _Axis(sees, None, None, None)
        first = min(self.first, other.first)  # type: ignore[type-var]
        last = max(self.first + self.size, other.first + other.size)  # type: ignore[operator]
        return _Axis(sees, first, last - first, self.step)  # type: ignore[operator]


class _Field:
    def __init__(self, axes: list[_Axis]) -> None:
        self.axes = axes

    def window(
        self,
        kernel: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        *,
        ceil: bool = False,
        mode: str = "zeros",
        name: str,
    ) -> _Field:
        count = len(self.axes)
        kernels, strides, dilations = (_each(v, count, name) for v in (kernel, stride, dilation))
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilations, kernels, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        elif padding == "valid":
            pads = [(0, 0)] * count
        else:
            pads = [(p, p) for p in _each(padding, count, name)]
        return _Field(
            [
                axis.window(k, s, *p, d, ceil, mode, name)
                for axis, k, s, p, d in zip(self.axes, kernels, strides, pads, dilations, strict=True)
            ]
        )

    def pad(self, padding: Sequence[int], mode: str, name: str) -> _Field:
        """Padding modules list (before, after) from the last axis on."""
        count = len(self.axes)
        if len(padding) != 2 * count:
            raise ValueError(_other_axes(name, len(padding) // 2, count))
        pads = [(padding[2 * (count - 1 - i)], padding[2 * (count - 1 - i) + 1]) for i in range(count)]
        return _Field([axis.window(1, 1, *p, 1, False, mode, name) for axis, p in zip(self.axes, pads, strict=True)])

    def adaptive(self, output: Any, name: str) -> _Field:
        counts = output if isinstance(output, Sequence) else [output] * len(self.axes)
        if len(counts) != len(self.axes):
            raise ValueError(_other_axes(name, len(counts), len(self.axes)))
        return _Field([a.adaptive(len(a) if n is None else n) for a, n in zip(self.axes, counts, strict=True)])

    def all(self) -> _Field:
        return _Field([axis.all() for axis in self.axes])

    def union(self, other: _Field, name: str) -> _Field:
        return _Field([a.union(b, name) for a, b in zip(self.axes, other.axes, strict=True)])

    def result(self, sizes: tuple[int, ...]) -> ReceptiveField:
        low = [np.where(a.sees.any(1), a.sees.argmax(1), 0) for a in self.axes]
        high = [np.where(a.sees.any(1), a.sees.shape[1] - a.sees[:, ::-1].argmax(1), 0) for a in self.axes]
        grids = [*np.meshgrid(*low, indexing="ij"), *np.meshgrid(*high, indexing="ij")]
        boxes = np.stack([g.reshape(-1) for g in grids], 1).astype(np.int64)
        axes = len(sizes)
        boxes[(boxes[:, axes:] == 0).any(1)] = 0  # nothing along one axis is nothing at all
        return ReceptiveField(
            sizes,
            tuple(len(a) for a in self.axes),
            torch.from_numpy(boxes),
            tuple(a.size for a in self.axes),
            tuple(a.step for a in self.axes),
        )


def _many(index: Any) -> bool:
    return not isinstance(index, Tensor) or index.ndim > 0


def _other_axes(name: str, axes: int, count: int) -> str:
    return f"{name} has {axes} axes, input_size {count}; give as many sizes as the layers have axes"


def _each(value: Any, count: int, name: str) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ValueError(_other_axes(name, len(values), count))
    try:
        return [operator.index(v) for v in values]
    except TypeError as error:
        raise TypeError(f"{name} has {value!r}; give an int, or one an axis") from error


def _padded(taps: np.ndarray, count: int, mode: str) -> np.ndarray:
    """Where positions outside are read from."""
    if mode == "replicate":
        return taps.clip(0, count - 1)
    if mode == "circular":
        return taps % count
    if mode == "reflect":
        return np.where(taps < 0, -taps, np.where(taps >= count, 2 * (count - 1) - taps, taps))
    return np.where((taps >= 0) & (taps < count), taps, -1)


# --- modules and functions, as torch.fx finds them -----------------------------------------------------------------

_POINTWISE_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LocalResponseNorm, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid, nn.Softmax2d,
)  # fmt: skip
_GROUP_NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_LP_POOLS = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
_ADAPTIVE = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_POINTWISE_NAMES = frozenset((
    "add", "iadd", "sub", "isub", "mul", "imul", "div", "idiv", "truediv", "itruediv", "neg", "abs", "square",
    "sqrt", "rsqrt", "exp", "log", "log1p", "pow", "clamp", "clamp_min", "clip", "relu", "relu6", "leaky_relu",
    "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid",
    "softplus", "softsign", "logsigmoid", "dropout", "dropout1d", "dropout2d", "dropout3d", "batch_norm", "maximum",
    "minimum", "contiguous", "clone", "detach", "float", "half", "double", "bfloat16", "to", "type_as", "cat",
    "concat", "concatenate",
))  # fmt: skip
_POOL_ARGUMENTS = {
    F.max_pool1d: ("max", 1), F.max_pool2d: ("max", 2), F.max_pool3d: ("max", 3), F.avg_pool1d: ("avg", 1),
    F.avg_pool2d: ("avg", 2), F.avg_pool3d: ("avg", 3), torch.max_pool1d: ("max", 1), torch.max_pool2d: ("max", 2),
    torch.max_pool3d: ("max", 3),
}  # fmt: skip
_ADAPTIVE_FUNCTIONS = (
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
)  # fmt: skip
_BY_AXES: dict[int, tuple[type[nn.Module], ...]] = {
    axes: tuple(
        types[place]
        for types in (_CONVOLUTIONS, _POOLS, _LP_POOLS, _ADAPTIVE, *_PADS.values(), _NORMS)
        for place in range(axes - 1, len(types), 3)
    )
    for axes in (1, 2, 3)
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Also layers derived from torch's, such as convolutions that standardise their weight."""
        known = (*_CONVOLUTIONS, *_POOLS, *_POINTWISE_MODULES, *_GROUP_NORMS, PrototypeLayer)
        return isinstance(m, known) or super().is_leaf_module(m, module_qualified_name)


def _follow(encoder: nn.Module, field: _Field) -> _Field:
    lone = type(encoder).__module__.startswith("torch.nn.modules") and not isinstance(encoder, nn.Sequential)
    if lone or isinstance(encoder, PrototypeLayer):
        return _through_module(encoder, field, "encoder")  # a lone layer, which fx would look into
    try:
        graph = _Tracer().trace(encoder)
    except Exception as error:
        held = any(isinstance(module, PrototypeLayer) for module in encoder.modules())
        cure = f"it holds a PrototypeLayer: {_ALONE}" if held else _CURE
        raise ValueError(f"encoder {type(encoder).__name__} cannot be traced ({error}); {cure}") from error
    values: dict[fx.Node, _Field | None] = {}
    for node in graph.nodes:
        known = [values[n] for n in node.all_input_nodes]
        inputs = [value for value in known if value is not None]
        if node.op == "placeholder":
            values[node] = field if not values else None  # further inputs are options
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node) or values[node.args[0]] is None:
                raise ValueError(f"encoder {type(encoder).__name__} does not give one feature map; {_CURE}")
            return values[node.args[0]]  # type: ignore[return-value]
        elif not inputs:
            values[node] = None  # parameters, and what is made of them alone
        elif node.op == "call_module":
            values[node] = _through_module(encoder.get_submodule(str(node.target)), inputs[0], f"module {node.target}")
        else:
            values[node] = _through_call(node, inputs)
    raise AssertionError("a graph ends with its output")


def _through_module(module: nn.Module, field: _Field, name: str) -> _Field:
    name = f"{name} ({type(module).__name__})"
    if isinstance(module, PrototypeLayer):
        raise ValueError(f"encoder has {name}; {_ALONE}")
    axes = _axes_of(module)
    if axes not in (None, len(field.axes)):
        raise ValueError(_other_axes(name, axes, len(field.axes)))
    if isinstance(module, _CONVOLUTIONS):
        return field.window(
            module.kernel_size, module.stride, module.padding, module.dilation, mode=module.padding_mode, name=name
        )
    if isinstance(module, _POOLS):
        return field.window(
            module.kernel_size,
            module.stride,
            module.padding,
            getattr(module, "dilation", 1),
            ceil=module.ceil_mode,
            name=name,
        )
    if isinstance(module, _LP_POOLS):
        stride = module.kernel_size if module.stride is None else module.stride
        return field.window(module.kernel_size, stride, ceil=module.ceil_mode, name=name)
    if isinstance(module, _ADAPTIVE):
        return field.adaptive(module.output_size, name)
    for mode, types in _PADS.items():
        if isinstance(module, types):
            return field.pad(module.padding, mode, name)
    if isinstance(module, _GROUP_NORMS):
        kept = getattr(module, "track_running_stats", False)
        return field if kept else field.all()  # else its statistics are of the whole map
    if isinstance(module, _POINTWISE_MODULES):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return field.all()
        return field
    raise ValueError(f"encoder has {name}, whose pixels are not known; {_CURE}")


def _through_call(node: fx.Node, inputs: list[_Field]) -> _Field | None:
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name in ("size", "dim", "getattr"):
        return None
    if target in _POOL_ARGUMENTS:
        kind, axes = _POOL_ARGUMENTS[target]
        if axes != len(inputs[0].axes):
            raise ValueError(_other_axes(name, axes, len(inputs[0].axes)))
        order = ["input", "kernel_size", "stride", "padding"]
        order += ["dilation", "ceil_mode"] if kind == "max" else ["ceil_mode"]
        given = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
        stride = given.get("stride") or given["kernel_size"]
        return inputs[0].window(
            given["kernel_size"],
            stride,
            given.get("padding", 0),
            given.get("dilation", 1),
            ceil=bool(given.get("ceil_mode", False)),
            name=name,
        )
    if target in _ADAPTIVE_FUNCTIONS:
        axes = _ADAPTIVE_FUNCTIONS.index(target) % 3 + 1
        if axes != len(inputs[0].axes):
            raise ValueError(_other_axes(name, axes, len(inputs[0].axes)))
        output = node.kwargs["output_size"] if "output_size" in node.kwargs else node.args[1]
        return inputs[0].adaptive(output, name)
    spatial_cat = name in ("cat", "concat", "concatenate") and _axis_of_cat(node) != 1
    if name.rstrip("_") not in _POINTWISE_NAMES or spatial_cat:
        raise ValueError(f"encoder calls {name} (node {node.name}), whose pixels are not known; {_CURE}")
    joined = inputs[0]
    for other in inputs[1:]:
        joined = joined.union(other, f"{name} (node {node.name})")
    return joined


def _axis_of_cat(node: fx.Node) -> Any:
    return node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
