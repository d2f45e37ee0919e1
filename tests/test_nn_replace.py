"""Modules written like ProtoPNet's, with protofast in them: the same outputs, and no map where none is read."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.errors import assert_within, exact
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import protofast as pf
from protofast.nn.replace import replace_prototype_layer, restore_prototype_layer

# --- stand-ins: a formulation each, as ProtoPNet and what came from it have it -----------------------------------


class Net(nn.Module):
    """The distances in `_l2_convolution`, max-pooled."""

    def __init__(self, kernel=(1, 1), count=6, channels=8, classes=3):
        super().__init__()
        self.num_prototypes = count
        self.encoder = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Sigmoid())
        self.prototype_vectors = nn.Parameter(torch.rand(count, channels, *kernel))
        self.ones = nn.Parameter(torch.ones(count, channels, *kernel), requires_grad=False)
        self.last_layer = nn.Linear(count, classes, bias=False)

    def conv_features(self, x):
        return self.encoder(x)

    def formula(self, z):
        squares = F.conv2d(input=z**2, weight=self.ones)
        lengths = (self.prototype_vectors**2).sum((1, 2, 3)).view(-1, 1, 1)
        return F.relu(squares + (-2 * F.conv2d(input=z, weight=self.prototype_vectors) + lengths))

    def _l2_convolution(self, z):
        return self.formula(z)

    def prototype_distances(self, x):
        return self._l2_convolution(self.conv_features(x))

    def pooled(self, distances):
        height, width = distances.size()[2], distances.size()[3]
        return -F.max_pool2d(-distances, kernel_size=(height, width)).view(-1, self.num_prototypes)

    def forward(self, x):
        nearest = self.pooled(self.prototype_distances(x))
        return self.last_layer(torch.log((nearest + 1) / (nearest + 1e-4))), nearest

    def push_forward(self, x):
        features = self.conv_features(x)
        return features, self._l2_convolution(features)


class Inline(Net):
    """The distances in `prototype_distances`, of images."""

    _l2_convolution = None

    def prototype_distances(self, x):
        return self.formula(self.conv_features(x))

    def push_forward(self, x):
        return self.conv_features(x), self.prototype_distances(x)


class Layer(Inline):
    """A layer by itself: features in."""

    def conv_features(self, x):
        return x


class Indices(Net):
    """A pool that gives indices as well, and the activations alone, as in Patronus."""

    def forward(self, x):
        distances = self.prototype_distances(x)
        best, index = F.max_pool2d(-distances, kernel_size=distances.shape[2:], return_indices=True)
        nearest = (-best).flatten(1)
        return torch.log((nearest + 1) / (nearest + 1e-4)), nearest, index


class MinAndMean(Net):
    def forward(self, x):
        distances = self.prototype_distances(x)
        return nn.AvgPool2d(distances.shape[2:])(distances).flatten(1), self.pooled(distances)


class TopK(Net):
    """The activation of the whole map, then the mean of the nine largest."""

    def forward(self, x):
        distances = self.prototype_distances(x)
        activations = torch.log((distances + 1) / (distances + 1e-4))
        return activations.flatten(2).topk(9).values.mean(2), distances


class Roots(Net):
    """Not ProtoPNet's formula."""

    def formula(self, z):
        return torch.sqrt(super().formula(z) + 1e-14)


class InlineRoots(Roots, Inline):
    pass


class Strided(Net):
    def formula(self, z):
        return super().formula(z)[..., ::2]


KINDS = [Net, Inline, Indices, MinAndMean, TopK]


def images(*shape, **options):
    return torch.rand(*(shape or (4, 3, 9, 11)), **options)


def make(kind=Net, **options):
    return kind(**options).eval()


class Sizes(TorchDispatchMode):
    """The largest number of elements of what any op returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return result


# --- the same outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_in_float64(kind, kernel):
    model, x = make(kind, kernel=kernel).double(), images(dtype=torch.float64)
    expected = [*tree_leaves(model(x)), *model.push_forward(x), model.prototype_distances(x)]
    assert replace_prototype_layer(model) is model
    for _ in range(2):  # the first call of some looks at their own formula
        found = [*tree_leaves(model(x)), *model.push_forward(x), model.prototype_distances(x)]
        for ours, theirs in zip(found, expected, strict=True):
            assert type(ours) is torch.Tensor
            assert ours.requires_grad == theirs.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_distances_have_the_direct_forms_accuracy():
    model = make(Net, count=40, channels=128)
    x = images()
    with torch.no_grad():
        features = model.conv_features(x)
        model.prototype_vectors[0] = features[0, :, 2, 3, None, None]  # exactly there
        model.prototype_vectors[1] = features[0, :, 2, 3, None, None] + 1e-3
        z, p = exact(features)[:, None], exact(model.prototype_vectors)[None]
        distances = ((z - p) ** 2).sum(2)
        scale = ((z**2).sum(2) + (p**2).sum(2)).max()
        roundings = 128 + 8
        assert_within(model(x)[1], distances.min((2, 3)), scale, roundings)
        with pytest.raises(AssertionError, match="times the bound"):
            assert_within(model(x)[1], distances.min((2, 3)), distances.min((2, 3)), roundings)
        replace_prototype_layer(model)
        assert_within(model(x)[1], distances.min((2, 3)), distances.min((2, 3)), roundings)
        assert_within(model.push_forward(x)[1], distances, distances, roundings)
        assert float(model(x)[1][0, 0]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind):
    model, x = make(kind).double(), images(dtype=torch.float64, requires_grad=True)

    def gradients():
        outputs = [output for output in model(x) if output.is_floating_point()]
        loss = sum((output * torch.cos(torch.arange(output.numel())).view_as(output)).sum() for output in outputs)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    expected = gradients()
    replace_prototype_layer(model)
    for _ in range(2):
        for ours, theirs in zip(gradients(), expected, strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_models_keep_their_dtype(dtype):
    model, x = make().to(dtype), images(dtype=dtype)
    theirs = model(x)
    ours = replace_prototype_layer(model)(x)
    features, distances = model.push_forward(x)
    assert {result.dtype for result in (*theirs, *ours, distances)} == {dtype}
    z, p = exact(features)[:, None], exact(model.prototype_vectors)[None]
    wanted = ((z - p) ** 2).sum(2).min((2, 3))
    assert_within(ours[1], wanted, wanted, 8 + 8)  # rounded to half once


def test_autocast():
    model, x = replace_prototype_layer(make()), images()
    expected = model(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        nearest = model(x)[1]
    assert nearest.dtype == torch.float32
    torch.testing.assert_close(nearest, expected, rtol=0.05, atol=0.05)


def test_nan_wins():
    model, x = make(), images()
    x[1, 0, 4, 4] = torch.nan
    expected = model(x)[1]
    found = replace_prototype_layer(model)(x)[1]
    assert expected[1].isnan().all()
    assert torch.equal(found.isnan(), expected.isnan())


# --- no map ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "map_is_made"), [(Net, False), (Inline, False), (Indices, False), (TopK, True)])
def test_the_map_is_made_only_where_it_is_read(kind, map_is_made):
    model, x = make(kind, count=50), images(2, 3, 20, 20)
    of_map = 2 * 50 * 18 * 18
    replace_prototype_layer(model)
    model(x)  # the first call of Inline goes through its own formula
    for training in (False, True):
        with torch.set_grad_enabled(training), Sizes() as sizes:
            results = model(x)
            if training:
                sum(output.sum() for output in results if output.is_floating_point()).backward()
        assert (sizes.largest >= of_map) == map_is_made
    with Sizes() as sizes:
        model.push_forward(x)
    assert sizes.largest >= of_map


def test_a_pool_over_less_than_the_map_reads_the_map():
    class Windows(Net):
        def forward(self, x):
            d = self.prototype_distances(x)
            height, width = d.shape[2:]
            return (
                F.max_pool2d(-d, (height, width - 1)),
                F.max_pool2d(-d, (height, width), padding=(1, 0)),
                F.max_pool2d(d, (height, width)),  # the farthest
                F.max_pool2d(d.neg().neg(), (height, width)),
                F.max_pool2d(d.neg().neg().neg(), (height, width), ceil_mode=True, stride=1),
            )

    model, x = make(Windows).double(), images(dtype=torch.float64)
    for ours, theirs in zip(*(f(x) for f in (replace_prototype_layer(copy.deepcopy(model)), model)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_where_gradients_are_off():
    class Mixed(Net):
        def forward(self, x):
            distances = self.prototype_distances(x)
            with torch.no_grad():
                nearest, at = self.pooled(distances), distances.flatten(2).argmin(2)
                later = self.prototype_distances(x)
            return nearest, distances.flatten(2).gather(2, at[..., None])[..., 0], self.pooled(later), at

    model, x = make(Mixed).double(), images(dtype=torch.float64)
    expected = model(x)
    found = replace_prototype_layer(model)(x)
    assert [result.requires_grad for result in found] == [False, True, False, False]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(result[1].sum(), model.prototype_vectors)[0] for result in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_what_is_done_to_the_map_in_place_lasts():
    class Masked(Net):
        def forward(self, x):
            distances = self.prototype_distances(x)
            distances[:, 0] = 7
            negative = -distances
            negative.sub_(1)
            kept = distances.detach().cpu().numpy()
            return self.pooled(distances), -F.max_pool2d(negative, negative.shape[2:]), torch.from_numpy(kept.copy())

    model, x = make(Masked), images()
    ours, shifted, kept = replace_prototype_layer(model)(x)
    assert (ours[:, 0] == 7).all()
    torch.testing.assert_close(shifted.flatten(1), ours + 1)
    torch.testing.assert_close(kept.flatten(2).amin(2), ours)


# --- what is left alone ------------------------------------------------------------------------------------------


def test_parameters_state_and_optimizer_are_untouched():
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before, keys = dict(model.named_parameters()), [*vars(model)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    replace_prototype_layer(model)
    assert [*vars(model)] == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {*model.state_dict()} == {*state}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    model(images())[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.prototype_vectors, state["prototype_vectors"])
    assert len(calls) == 1
    model.load_state_dict(state)
    restore_prototype_layer(model)
    assert type(model) is Net


@pytest.mark.parametrize("kind", [Net, Inline])
def test_batch_norm_sees_each_batch_once(kind):
    model, x = make(kind).train(), images()
    other = replace_prototype_layer(copy.deepcopy(model))
    for _ in range(3):
        model(x), other(x)
    assert int(other.encoder[1].num_batches_tracked) == 3
    torch.testing.assert_close(other.encoder[1].running_mean, model.encoder[1].running_mean)


def test_restoring_gives_the_old_bits():
    model, x = make(), images()
    expected = model(x)
    replace_prototype_layer(model)
    assert replace_prototype_layer(model) is model
    assert restore_prototype_layer(model) is model
    for ours, theirs in zip(model(x), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(TypeError, match="was not replaced"):
        restore_prototype_layer(model)


def test_copies_stand_alone():
    model, x = replace_prototype_layer(make()), images()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.prototype_vectors.zero_()
        torch.testing.assert_close(
            other(x)[1], model.conv_features(x).square().sum(1).amin((1, 2))[:, None].expand(4, 6)
        )
        assert not torch.allclose(model(x)[1], other(x)[1])
    assert type(restore_prototype_layer(other)) is Net
    assert type(model) is not Net


def test_pickles_are_of_the_old_class():
    model, x = replace_prototype_layer(make()), images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(loaded) is Net
        torch.testing.assert_close(loaded(x)[1], model(x)[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(replace_prototype_layer(loaded)(x)[1], model(x)[1])


def test_prototypes_may_be_pruned():
    model, x = replace_prototype_layer(make()), images()
    expected = model(x)[1][:, [0, 3]]
    model.prototype_vectors = nn.Parameter(model.prototype_vectors.detach()[[0, 3]])
    model.ones = nn.Parameter(model.ones.detach()[[0, 3]], requires_grad=False)
    model.num_prototypes, model.last_layer = 2, nn.Linear(2, 3, bias=False)
    assert torch.equal(model(x)[1], expected)


@pytest.mark.parametrize("kind", [Net, Inline, TopK])
def test_compiles(kind):
    model, x = make(kind), images()
    expected = model(x)
    compiled = torch.compile(replace_prototype_layer(model), backend="eager", fullgraph=True)
    for ours, theirs in zip(compiled(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [Net, Inline, Indices, TopK])
def test_traces(kind, grad):
    model = replace_prototype_layer(make(kind))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, images())
    with torch.no_grad():
        model.prototype_vectors.mul_(1.5)  # which the trace shares: no constant stands in their place
    x = images(2, 3, 12, 8)
    for ours, theirs in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [Net, Inline])
def test_parametrized_prototypes(kind, when):
    model, x = make(kind).double(), images(dtype=torch.float64)
    if when == "before":
        replace_prototype_layer(model)
    parametrizations.weight_norm(model, "prototype_vectors")
    if when == "after":
        replace_prototype_layer(model)
    z = model.conv_features(x)
    wanted = (z[:, None] - model.prototype_vectors).square().sum(2).amin((2, 3))
    parameters = list(model.parametrizations.prototype_vectors.parameters())
    expected = torch.autograd.grad(wanted.sum(), parameters)
    for _ in range(2):  # the second call computes nothing by its own formula
        nearest = model(x)[1]
        torch.testing.assert_close(nearest, wanted, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(nearest.sum(), parameters), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_other_modules_inside_are_seen_by_name():
    whole = nn.Sequential(nn.Identity(), make(Layer))
    replace_prototype_layer(whole[1])
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(whole(x)[1], pf.prototype_distance(x, whole[1].prototype_vectors).distance)


# --- what does not fit -------------------------------------------------------------------------------------------


def test_what_is_no_prototype_module():
    with pytest.raises(TypeError, match=r"Linear without prototype_vectors, ones, prototype_distances"):
        replace_prototype_layer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a dict"):
        replace_prototype_layer({})
    with pytest.raises(TypeError, match="its part '1' does"):
        replace_prototype_layer(nn.Sequential(nn.Identity(), make()))
    model = make()
    model.ones = nn.Parameter(torch.ones(2, 2, 1, 1))
    with pytest.raises(ValueError, match=r"ones of Net is \(2, 2, 1, 1\); ProtoPNet's has the prototypes' shape"):
        replace_prototype_layer(model)
    model = make()
    model.prototype_vectors = nn.Parameter(torch.ones(6, 8))
    with pytest.raises(ValueError, match=r"prototype_vectors of Net is \(6, 8\)"):
        replace_prototype_layer(model)
    model = make(Inline)
    del model.ones
    model.ones = None
    with pytest.raises(ValueError, match="ones of Inline is NoneType"):
        replace_prototype_layer(model)


@pytest.mark.parametrize("kind", [Roots, Strided])
def test_another_formula_is_named_at_once(kind):
    model = make(kind)
    with pytest.raises(ValueError, match=r"_l2_convolution of \w+ does not compute squared distances"):
        replace_prototype_layer(model)
    assert type(model) is kind


def test_another_formula_is_named_at_the_first_call():
    model = replace_prototype_layer(make(InlineRoots))
    with pytest.raises(ValueError, match="prototype_distances of InlineRoots does not compute squared distances"):
        model(images())

    class Direct(Inline):
        def formula(self, z):
            return (z[:, None] - self.prototype_vectors).square().sum(2)

    model = replace_prototype_layer(make(Direct))
    with pytest.raises(ValueError, match="no conv2d of x² with `ones`"):
        model(images())
    assert model.__class__ is not Direct
    assert torch.isfinite(restore_prototype_layer(model)(images())[0]).all()


def test_errors_of_the_module_itself_come_through():
    model = replace_prototype_layer(make(Inline))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(images(1, 2, 9, 9))
        model(images())
    assert type(model.prototype_distances(images())) is torch.Tensor
