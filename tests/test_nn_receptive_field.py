"""Pixel boxes against what torch itself computes: where a gradient, or a NaN, gets from a pixel to a patch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import protofast as pf


def patronus(channels=1, layers=((3, 2, 1), (3, 1, 0), (3, 1, 0), (3, 1, 0))):
    """Patronus' encoder: convolutions and ReLU; the default is that for 32 and 64 pixels."""
    parts = []
    for kernel, stride, padding in layers:
        parts += [nn.Conv2d(channels, 2, kernel, stride, padding), nn.ReLU()]
        channels = 2
    return nn.Sequential(*parts)


class Block(nn.Module):
    """ResNet's basic block, as torchvision writes it."""

    def __init__(self, inside, outside, stride=1, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, pooling and blocks of a small ResNet without its head."""

    def __init__(self, pool=None, blocks=((2, 1), (3, 2), (4, 2))):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.maxpool = pool or nn.MaxPool2d(3, 2, 1)
        inside, layers = 2, []
        for outside, stride in blocks:
            layers.append(Block(inside, outside, stride))
            inside = outside
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layers(self.maxpool(x))


class Branches(nn.Module):
    """Inception's kind: branches of several kernels side by side, with a pooled one; functional pooling."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Conv2d(1, 2, 1)
        self.wide = nn.Conv2d(1, 2, (1, 5), padding=(0, 2))
        self.tall = nn.Conv2d(1, 2, (7, 1), padding=(3, 0))
        self.last = nn.Conv2d(6, 2, 2, stride=2)

    def forward(self, x):
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        x = torch.cat([self.narrow(x), torch.relu(self.wide(x)) + self.tall(x).sigmoid(), pooled, 2 * x], dim=1)
        return F.max_pool2d(self.last(x), 2, ceil_mode=True)


class Squeeze(nn.Module):
    """Squeeze and excitation: every patch depends on all pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(self.pool(x))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def seen(net, sizes, kernel=1):
    """(pixels, patches) bool by NaN: the output is NaN where it depends on the pixel that is."""
    axes = len(sizes)
    pixels = math.prod(sizes)
    x = torch.rand(pixels, 1, *sizes, dtype=torch.float64)
    x.flatten(1)[torch.arange(pixels), torch.arange(pixels)] = math.nan
    with torch.no_grad():
        features = net.double().eval()(x)
    layer = pf.nn.PrototypeLayer(1, features.shape[1], kernel if kernel == 1 else (kernel,) * axes).double()
    return layer.map(features).isnan().flatten(1), features


def hulls(support, sizes):
    """(patches, 2 · axes) boxes around the pixels of each patch."""
    boxes = []
    for patch in support.t():
        where = np.argwhere(patch.reshape(sizes).numpy())
        boxes.append([*where.min(0), *(where.max(0) + 1)] if len(where) else [0] * (2 * len(sizes)))
    return torch.tensor(np.array(boxes))


NETS = {
    "patronus": (patronus, (24, 21)),
    "chexpert": (lambda: patronus(layers=((5, 2, 1), (5, 2, 1), (5, 1, 0))), (41, 38)),
    "resnet": (ResNet, (41, 33)),
    "resnet, odd": (lambda: ResNet(nn.MaxPool2d(3, 2, ceil_mode=True)), (36, 43)),
    "branches": (Branches, (15, 17)),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 1, 2, 2), nn.Conv2d(2, 2, 3, 2, 3, 3)), (14, 13)),
    "dilated block": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), Block(2, 2, 1, 2)), (12, 13)),
    "even, same": (lambda: nn.Sequential(nn.Conv2d(1, 2, 4, padding="same"), nn.Conv2d(2, 2, (2, 3))), (9, 8)),
    "stride beyond kernel": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2, 3), nn.Conv2d(2, 2, 2)), (14, 14)),
    "wide padding": (lambda: nn.Sequential(nn.Conv2d(1, 2, 1, padding=2), nn.Conv2d(2, 2, 3, padding=2)), (6, 5)),
    "ceil": (lambda: nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True)), (9, 11)),
    "max with dilation": (lambda: nn.Sequential(nn.MaxPool2d(2, 3, 1, 2, ceil_mode=True)), (11, 8)),
    "adaptive": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d((3, None))), (12, 9)),
    "squeeze": (Squeeze, (9, 9)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, padding=2), nn.GroupNorm(1, 2)), (8, 8)),
    "instance norm": (
        lambda: nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Conv2d(1, 2, 3)),
        (8, 8),
    ),
    "pads": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 3)), nn.Conv2d(1, 2, 3, 2)), (9, 10)),
    "reflection": (lambda: nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 2, 2), nn.ReplicationPad2d(1)), (7, 6)),
    "circular": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (6, 6)),
    "subclass": (lambda: nn.Sequential(Standardised(1, 2, 3, 2, 1), nn.GELU()), (8, 9)),
    "lp": (lambda: nn.Sequential(nn.LPPool2d(2, 3, 2)), (8, 9)),
    "1-D": (lambda: nn.Sequential(nn.Conv1d(1, 2, 5, 2, 2), nn.MaxPool1d(3), nn.Conv1d(2, 2, 2)), (50,)),
    "3-D": (lambda: nn.Sequential(nn.Conv3d(1, 2, (1, 3, 3), (1, 2, 1), (0, 1, 1)), nn.AvgPool3d(2, 1)), (4, 7, 5)),
}


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_boxes_are_what_reaches_the_patch(name, kernel):
    make, sizes = NETS[name]
    net = make()
    support, features = seen(net, sizes, kernel)
    field = pf.nn.receptive_field(net, sizes, kernel_size=kernel)
    assert field.input_size == sizes
    assert field.grid == tuple(size - kernel + 1 for size in features.shape[2:])
    assert field.boxes.dtype == torch.int64
    assert torch.equal(field.boxes, hulls(support, sizes))


def positive(net):
    """With positive weights and inputs no gradient cancels and no ReLU closes."""
    with torch.no_grad():
        for value in net.parameters():
            value.uniform_(0.5, 1)
    return net.double().eval()


@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (patronus(), (32, 32)),
        (patronus(1), (20, 27)),
        (ResNet(nn.AvgPool2d(3, 2, 1)), (48, 48)),
        (ResNet(nn.AvgPool2d(2, 2), blocks=((2, 2), (2, 1))), (30, 37)),
    ],
    ids=["patronus 32", "patronus", "resnet", "resnet, short"],
)
def test_the_gradient_of_a_patch_fills_its_box(net, sizes):
    net = positive(net)
    field = pf.nn.receptive_field(net, sizes)
    x = torch.rand(1, 1, *sizes, dtype=torch.float64, requires_grad=True)
    features = net(x)
    assert field.grid == tuple(features.shape[2:])
    for index, value in enumerate(features.sum(1).flatten()):
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        top, left, bottom, right = field.box(index)
        inside = torch.zeros(sizes, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(grad[0, 0] != 0, inside)


def test_the_papers_nets_in_closed_form():
    field = pf.nn.receptive_field(patronus(), 64)
    assert (field.grid, field.size, field.stride) == ((26, 26), (15, 15), (2, 2))
    for i, j in [(0, 0), (3, 7), (25, 25)]:
        assert field.box((i, j)) == (max(2 * i - 1, 0), max(2 * j - 1, 0), min(2 * i + 14, 64), min(2 * j + 14, 64))
    field = pf.nn.receptive_field([(5, 2, 1), (5, 2, 1), (5, 1, 0), (5, 1, 0), (5, 1, 0)], 224)
    assert (field.grid, field.size, field.stride) == ((43, 43), (61, 61), (4, 4))
    assert field.box((5, 42)) == (17, 4 * 42 - 3, 78, 224)


@pytest.mark.parametrize("name", ["patronus", "resnet", "dilated", "1-D", "3-D", "branches"])
def test_size_and_stride_describe_the_boxes_inside(name):
    make, sizes = NETS[name]
    sizes = tuple(8 * size for size in sizes)
    field = pf.nn.receptive_field(make(), sizes)
    boxes = field.boxes.reshape(*field.grid, 2, len(sizes))
    for axis, (size, stride) in enumerate(zip(field.size, field.stride, strict=True)):
        line = boxes.select(-1, axis).movedim(axis, 0).reshape(field.grid[axis], -1, 2)[:, 0]
        inside = line[len(line) // 3 : -(len(line) // 3)]
        assert len(inside) >= 3
        assert (inside[:, 1] - inside[:, 0] == size).all()
        assert (inside.diff(dim=0) == stride).all()
    assert pf.nn.receptive_field(Squeeze(), 9).size == (None, None)


def test_specs_and_modules_agree():
    net = nn.Sequential(nn.Conv2d(1, 2, (3, 5), (2, 1), (1, 2)), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, 1, 2, 2))
    specs = [((3, 5), (2, 1), (1, 2)), (2, 2, 0), (3, 1, 2, 2)]
    one, other = (pf.nn.receptive_field(given, (30, 20), kernel_size=(2, 1)) for given in (net, specs))
    assert torch.equal(one.boxes, other.boxes)
    assert (one.grid, one.size, one.stride) == (other.grid, other.size, other.stride)
    assert torch.equal(pf.nn.receptive_field([], 2).boxes[:, :2], torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))


def test_box_by_index_and_position():
    field = pf.nn.receptive_field(patronus(), (32, 40))
    for index in (0, 17, len(field.boxes) - 1):
        expected = tuple(field.boxes[index].tolist())
        place = tuple(int(i) for i in np.unravel_index(index, field.grid))
        assert (
            field.box(index) == field.box(torch.tensor(index)) == field.box(place) == field.box(list(place)) == expected
        )
        assert field.box(torch.tensor(place)) == expected
    for index in (-1, len(field.boxes), (0, 14), (0,), (0, 0, 0), (-1, 0)):
        with pytest.raises(IndexError, match="grid of patches is"):
            field.box(index)
    assert field.box(np.array([1, 2])) == field.box((1, 2))
    for wrong in (1.5, None, (1.5, 0), "3"):
        with pytest.raises(TypeError, match="index is"):
            field.box(wrong)


class Chooses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Flattens(nn.Module):
    def forward(self, x):
        return x.flatten(2)


class Twice(nn.Module):
    def forward(self, x):
        return x, x


class Stacks(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 2)


class Pools(nn.Module):
    def forward(self, x):
        return F.max_pool1d(x, 2)


class Unpacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = pf.nn.PrototypeLayer(2, 3)

    def forward(self, x):
        return next(iter(self.layer(x, return_all=True)))


@pytest.mark.parametrize(
    ("encoder", "grid"),
    [
        (nn.Conv1d(1, 2, 3), (10,)),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3)), (10, 10)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()), (10, 10, 10)),
        (nn.MaxPool1d(2), (6,)),
        (nn.ReLU(), (12, 12)),
        ([(3, 1, 0)], (10, 10)),
        ([(3, 1, 0), ((2, 1, 1), 1, 0)], (9, 10, 10)),
    ],
)
def test_an_int_is_as_many_axes_as_the_layers_have(encoder, grid):
    assert pf.nn.receptive_field(encoder, 12).grid == grid
    assert pf.nn.receptive_field(encoder, np.int64(12), kernel_size=(1,)).grid == grid


def test_repr_is_short():
    field = pf.nn.receptive_field([(3, 2, 1)], 32)
    assert repr(field) == "ReceptiveField(grid=(16, 16), size=(3, 3), stride=(2, 2))"


@pytest.mark.parametrize(
    ("encoder", "size", "error", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 4)), 32, ValueError, r"module 1 \(Linear\)"),
        (nn.Sequential(nn.Sequential(nn.LSTM(2, 2))), 32, ValueError, r"module 0.0 \(LSTM\)"),
        (Flattens(), 32, ValueError, "calls flatten"),
        (Stacks(), 32, ValueError, "calls cat"),
        (Twice(), 32, ValueError, "one feature map"),
        (Chooses(), 32, ValueError, "Chooses cannot be traced"),
        (nn.Conv2d(1, 1, 9), 8, ValueError, "kernel 9"),
        (nn.Conv3d(1, 1, 2), (8, 8), ValueError, "has 3 axes, input_size 2"),
        (nn.Conv1d(1, 1, 3), (12, 12), ValueError, r"\(Conv1d\) has 1 axes, input_size 2"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(1)), (9,), ValueError, "has 2 axes, input_size 1"),
        (Pools(), (9, 9), ValueError, "has 1 axes, input_size 2"),
        ([((3, 3, 3), 1, 0)], (9, 9), ValueError, "layer 0 has 3 axes, input_size 2"),
        ([(3, 1.5, 0)], 9, TypeError, "layer 0 has 1.5"),
        (patronus(), None, TypeError, "input_size is None"),
        (patronus(), 12.5, TypeError, "input_size is 12.5"),
        (patronus(), (12, "3"), TypeError, "input_size is"),
        (pf.nn.PrototypeLayer(2, 3), 8, ValueError, "PrototypeLayer.*; give the encoder alone"),
        (
            nn.Sequential(nn.Conv2d(1, 3, 3), pf.nn.PrototypeLayer(2, 3)),
            8,
            ValueError,
            "module 1.*; give the encoder alone",
        ),
        (Unpacks(), 8, ValueError, "cannot be traced.*holds a PrototypeLayer: give the encoder alone"),
        ([(3, 1)], 32, ValueError, "layer 0"),
        ([(3, 0, 0)], 32, ValueError, "layer 0"),
        (3, 32, TypeError, "encoder is a int"),
        (patronus(), 0, ValueError, "input_size is 0"),
        (patronus(), (), ValueError, "input_size is"),
    ],
)
def test_refuses_and_says_how_to_go_on(encoder, size, error, message):
    with pytest.raises(error, match=message) as caught:
        pf.nn.receptive_field(encoder, size)
    if isinstance(encoder, nn.Module) and "kernel 9" not in message and "axes" not in message and size == 32:
        assert "(kernel, stride, padding[, dilation])" in str(caught.value)
