"""PrototypeLayer: values, checkpoints of others, initialisation, and its number of prototypes at run time."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.errors import EXACT, assert_within, exact
from torch import nn

import protofast as pf


def oracle(features, vectors):
    """Squared distances (B, P, N) in extended precision, and their sizes."""
    x, p = exact(features), exact(vectors)
    kernel, sizes = p.shape[2:], x.shape[2:]
    grid = [s - k + 1 for s, k in zip(sizes, kernel, strict=True)]
    found = np.empty((x.shape[0], p.shape[0], *grid), EXACT)
    for at in np.ndindex(*grid):
        patch = x[(slice(None), slice(None), *(slice(a, a + k) for a, k in zip(at, kernel, strict=True)))]
        found[(slice(None), slice(None), *at)] = ((patch[:, None] - p[None]) ** 2).reshape(*found.shape[:2], -1).sum(2)
    return found.reshape(*found.shape[:2], -1)


class TheirLayer(nn.Module):
    """ProtoPNet's layer as its paper writes it, with the names of its checkpoints."""

    def __init__(self, count=5, channels=6, kernel=(1, 1)):
        super().__init__()
        self.prototype_vectors = nn.Parameter(torch.rand(count, channels, *kernel))
        self.ones = nn.Parameter(torch.ones(count, channels, *kernel), requires_grad=False)

    def forward(self, x):
        square = (self.prototype_vectors**2).sum((1, 2, 3))[:, None, None]
        cross = F.conv2d(x, self.prototype_vectors)
        distance = F.relu(F.conv2d(x**2, self.ones) + (square - 2 * cross))
        least, index = F.max_pool2d(-distance, distance.shape[2:], return_indices=True)
        least = -least.flatten(1)
        return torch.log((least + 1) / (least + 1e-4)), least, index.flatten(1)


@pytest.mark.parametrize("kernel", [1, 2, (1, 3)])
def test_same_as_the_papers_layer(kernel):
    shape = (kernel, kernel) if isinstance(kernel, int) else kernel
    theirs = TheirLayer(kernel=shape).double()
    ours = pf.nn.PrototypeLayer(5, 6, kernel).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(3, 6, 5, 4, dtype=torch.float64)
    activation, distance, index = ours(x, return_all=True)
    every = oracle(x, theirs.prototype_vectors)
    assert torch.equal(index, torch.from_numpy(every.argmin(2)))
    nearest = every.min(2)
    terms = 6 * math.prod(shape)
    assert_within(distance, nearest, nearest, terms + 3)
    expected = np.log((nearest + 1) / (nearest + EXACT(1e-4)))
    # the error of the distance times the slope, and some roundings of the logarithm
    assert_within(activation, expected, np.abs(expected) + nearest / (nearest + EXACT(1e-4)), terms + 10)
    reference, _, places = theirs(x)
    assert torch.equal(index, places)
    torch.testing.assert_close(ours(x), reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [(7,), (4, 5), (3, 2, 4)])
def test_a_pixel_wide_layer_takes_grids_of_any_number_of_axes(sizes):
    layer = pf.nn.PrototypeLayer(4, 3)
    assert layer.prototype_vectors.shape == (4, 3, 1, 1)
    x = torch.rand(2, 3, *sizes)
    assert layer(x).shape == (2, 4)
    assert layer.map(x).shape == (2, 4, *sizes)
    flat = layer(x.reshape(2, 3, 1, -1), return_all=True)
    assert torch.equal(layer(x, return_all=True).index, flat.index)


@pytest.mark.parametrize("kernel", [(3,), (2, 1), (1, 2, 2)])
def test_kernels_of_any_number_of_axes(kernel):
    layer = pf.nn.PrototypeLayer(4, 3, kernel)
    x = torch.rand(2, 3, *[4] * len(kernel))
    distance, index = layer(x, return_all=True)[1:]
    every = oracle(x, layer.prototype_vectors)
    assert torch.equal(index, torch.from_numpy(every.argmin(2)))
    assert_within(distance, every.min(2), every.min(2), 3 * math.prod(kernel) + 3)


def test_topk_mask_and_metric_reach_the_op():
    layer = pf.nn.PrototypeLayer(4, 3, metric="cosine", activation="linear", topk=3)
    x = torch.randn(2, 3, 4, 4)
    mask = torch.rand(2, 4, 4) > 0.4
    found = layer(x, mask=mask, return_all=True)
    assert found.activation.shape == (2, 4, 3)
    expected = pf.prototype_activation(
        x, layer.prototype_vectors, metric="cosine", activation="linear", topk=3, mask=mask
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(layer(x, mask=mask), expected.activation)
    assert torch.equal(layer.map(x), -layer.map(x, activation=False))
    assert "metric='cosine'" in repr(layer)
    assert "topk=3" in repr(layer)


# --- checkpoints --------------------------------------------------------------------------------------------------


class TheirNet(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.features = nn.Conv2d(1, 6, 3)
        self.prototype_layer = layer
        self.last_layer = nn.Linear(5, 2, bias=False)


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel], ids=["plain", "module."])
def test_loads_a_whole_model_of_theirs_strictly(wrap):
    theirs, ours = (TheirNet(layer) for layer in (TheirLayer(), pf.nn.PrototypeLayer(5, 6)))
    theirs, ours = (wrap(net) if wrap is nn.DataParallel else net for net in (theirs, ours))
    state = theirs.state_dict()
    before = dict(state)
    ours.load_state_dict(state)
    assert state.keys() == before.keys(), "load_state_dict changed the caller's checkpoint"
    mine = ours.state_dict()
    assert set(state) - set(mine) == {key for key in state if key.endswith(".ones")}
    for key, value in mine.items():
        assert torch.equal(value, state[key])


def test_loads_prototypes_saved_for_other_numbers_of_axes():
    layer = pf.nn.PrototypeLayer(5, 6)
    vectors = torch.rand(5, 6)
    for shape in [(5, 6), (5, 6, 1), (5, 6, 1, 1, 1)]:
        layer.reset_parameters()
        layer.load_state_dict({"prototype_vectors": vectors.reshape(shape)})
        assert torch.equal(layer.prototype_vectors, vectors.reshape(5, 6, 1, 1))


def test_a_checkpoint_that_does_not_fit_is_refused():
    layer = pf.nn.PrototypeLayer(5, 6)
    for state in ({"prototype_vectors": torch.rand(6, 5)}, {"prototype_vectors": torch.rand(4, 6, 1, 1)}, {}):
        with pytest.raises(RuntimeError, match="prototype_vectors"):
            layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="twos"):
        layer.load_state_dict({"prototype_vectors": torch.rand(5, 6, 1, 1), "twos": torch.ones(1)})
    state = {"prototype_vectors": torch.rand(5, 6, 1, 1), "ones": torch.ones(5, 6, 1, 1)}
    state["ones"][1, 2] = 0.5
    with pytest.raises(RuntimeError, match="ones has other values than 1"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="other values than 1 as 'ones'"):
        pf.nn.PrototypeLayer.from_state_dict(state)


def test_a_layer_from_the_checkpoint_of_a_model():
    """Keys and shapes of Patronus' encoder."""
    state = {
        "proactBlock.prototype_vectors": torch.rand(30, 128, 1, 1),
        "proactBlock.ones": torch.ones(30, 128, 1, 1),
        "proactBlock.encoder.features.0.weight": torch.rand(32, 1, 3, 3),
    }
    layer = pf.nn.PrototypeLayer.from_state_dict(state, activation="linear")
    assert torch.equal(layer.prototype_vectors, state["proactBlock.prototype_vectors"])
    assert layer.activation == "linear"
    with pytest.raises(ValueError, match="0 keys"):
        pf.nn.PrototypeLayer.from_state_dict({})


KEY = "a.prototype_vectors"


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (torch.rand(3, 2), {}, TypeError, "state is a Tensor"),
        (None, {}, TypeError, "state is a NoneType"),
        ("x.pth", {}, TypeError, "state is a str; give what torch.load makes of the file"),
        (nn.Identity(), {}, TypeError, r"state is a Identity; give its state_dict\(\)"),
        ({"epoch": 3, "model": {KEY: torch.rand(3, 2)}}, {}, ValueError, r"a level down; give state\['model'\]$"),
        ({"net": nn.Identity()}, {}, ValueError, r"give state\['net'\].state_dict\(\)"),
        ({KEY: torch.full((3, 2), math.inf)}, {}, ValueError, "state as 'a.prototype_vectors' has .* prototype 0"),
        ({KEY: [1.0]}, {}, TypeError, "state has list as 'a.prototype_vectors'"),
        ({KEY: torch.ones(3, 2, dtype=torch.int64)}, {}, TypeError, "state has torch.int64 as 'a.prototype_vectors'"),
        ({KEY: torch.rand(3)}, {}, ValueError, r"state has shape \(3,\) as 'a.prototype_vectors'"),
        ({KEY: torch.rand(0, 2, 1, 1)}, {}, ValueError, r"state has shape \(0, 2, 1, 1\) as 'a.prototype_vectors'"),
        ({KEY: torch.rand(3, 2, 0, 1)}, {}, ValueError, r"state has shape \(3, 2, 0, 1\)"),
        ({KEY: torch.rand(3, 2)}, {"kernel_size": 1}, TypeError, "kernel_size comes from the state"),
    ],
)
def test_a_checkpoint_that_makes_no_layer_is_refused(state, options, error, message):
    with pytest.raises(error, match=message):
        pf.nn.PrototypeLayer.from_state_dict(state, **options)


def test_copies_and_pickles():
    layer = pf.nn.PrototypeLayer(5, 6, (2, 2), metric="euclidean", activation="exp", topk=2)
    x = torch.rand(2, 6, 4, 4)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.prototype_vectors is not layer.prototype_vectors
        assert repr(other) == repr(layer)


# --- how torch runs it --------------------------------------------------------------------------------------------


def test_compiles_to_one_graph():
    layer = pf.nn.PrototypeLayer(5, 6)
    head = nn.Linear(5, 3)
    x = torch.rand(2, 6, 4, 4, requires_grad=True)

    def loss(x):
        activation, distance, _ = layer(x, return_all=True)
        classes = torch.tensor([0, 0, 1, 1, 2])
        labels = torch.tensor([0, 2])
        return (
            head(activation).square().mean()
            + pf.nn.cluster_loss(distance, labels, classes)
            + pf.nn.separation_loss(distance, labels, classes)
            + pf.nn.distinct_loss(layer.prototype_vectors, margin=1.0)
            + pf.nn.orthogonality_loss(layer.prototype_vectors, classes)
        )

    wanted = (x, layer.prototype_vectors, head.weight)
    expected = torch.autograd.grad(loss(x), wanted)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_under_autocast_the_layer_keeps_float32():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), pf.nn.PrototypeLayer(5, 6), nn.Linear(5, 2))
    x = torch.rand(2, 1, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net[0](x)
        assert features.dtype == torch.bfloat16
        activation = net[1](features)
        assert activation.dtype == torch.float32
        net(x).float().sum().backward()
    expected = pf.prototype_activation(features.float(), net[1].prototype_vectors).activation
    assert torch.equal(activation, expected)
    assert net[1].prototype_vectors.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_net_in_half_precision(dtype):
    layer = pf.nn.PrototypeLayer(5, 6).to(dtype)
    x = torch.rand(2, 6, 4, 4).to(dtype)
    assert layer(x).dtype == dtype, "the next layer has half weights"
    found = layer(x, return_all=True)
    assert found.distance.dtype == found.activation.dtype == torch.float32
    nn.Linear(5, 2).to(dtype)(layer(x)).sum().backward()
    assert layer.prototype_vectors.grad.isfinite().all()


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Conv2d(1, 6, 3), pf.nn.PrototypeLayer(5, 6))
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        for _ in range(2):  # the second step tells whether every parameter was used
            for net in (plain, wrapped):
                net.zero_grad()
                torch.manual_seed(1)
                net(torch.rand(2, 1, 6, 6)).sum().backward()
        assert torch.equal(plain[1].prototype_vectors.grad, wrapped.module[1].prototype_vectors.grad)
    finally:
        torch.distributed.destroy_process_group()


# --- initial values -----------------------------------------------------------------------------------------------


def test_named_initialisations():
    assert pf.nn.PrototypeLayer(200, 50).prototype_vectors.min() >= 0
    uniform = pf.nn.PrototypeLayer(200, 50).prototype_vectors
    assert uniform.max() < 1
    # five standard errors of the mean and of the standard deviation of 10,000 draws
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 100
    normal = pf.nn.PrototypeLayer(200, 50, init="normal").prototype_vectors
    assert abs(normal.mean() - 0.5) < 5 * 0.1 / 100
    assert abs(normal.std() - 0.1) < 5 * 0.1 / (2 * 10000) ** 0.5
    rows = pf.nn.PrototypeLayer(10, 4, init="orthogonal").prototype_vectors.flatten(1)
    for block in rows.split(4):
        torch.testing.assert_close(block @ block.t(), torch.eye(len(block)), rtol=0, atol=1e-6)
    vectors = torch.rand(3, 2)
    layer = pf.nn.PrototypeLayer(3, 2, init=vectors)
    assert torch.equal(layer.prototype_vectors.flatten(1), vectors)
    vectors.zero_()
    assert layer.prototype_vectors.any(), "the layer shares memory with what it was given"


def test_the_seed_decides():
    torch.manual_seed(3)
    first = pf.nn.PrototypeLayer(3, 2).prototype_vectors
    torch.manual_seed(3)
    assert torch.equal(first, pf.nn.PrototypeLayer(3, 2).prototype_vectors)


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("method", ["k-center", "random"])
def test_initialise_from_data(method, kernel):
    layer = pf.nn.PrototypeLayer(6, 3, kernel)
    features = torch.randn(4, 3, 4, 5)
    before = layer.prototype_vectors
    taken = layer.initialize_from(features, method=method, generator=torch.Generator().manual_seed(2))
    assert layer.prototype_vectors is before
    assert len(taken.unique()) == 6
    unfolded = F.unfold(features, kernel).transpose(1, 2).flatten(0, 1)  # (B·N, D·K)
    assert torch.equal(layer.prototype_vectors.flatten(1), unfolded[taken])
    again = layer.initialize_from(features, method=method, generator=torch.Generator().manual_seed(2))
    assert torch.equal(taken, again)
    if method == "k-center":
        expected = pf.k_center(unfolded, 6, start=int(taken[0])).indices
        assert torch.equal(taken, torch.as_tensor(expected))


def test_initialise_by_angle():
    layer = pf.nn.PrototypeLayer(2, 2, metric="cosine")
    # two in one direction, far apart; and one in another, between them
    features = torch.tensor([[1.0, 0.1], [100.0, 10.0], [2.0, 1.0]]).t()[None]
    for seed in range(5):
        taken = layer.initialize_from(features, generator=torch.Generator().manual_seed(seed))
        assert 2 in taken


def test_initialise_refuses():
    layer = pf.nn.PrototypeLayer(6, 3, 2)
    with pytest.raises(ValueError, match="features has 4 patches; the layer needs 6"):
        layer.initialize_from(torch.rand(1, 3, 3, 3))
    broken = torch.rand(3, 3, 4, 4)
    broken[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="sample 1"):
        layer.initialize_from(broken)
    with pytest.raises(ValueError, match="features has shape"):
        layer.initialize_from(torch.rand(2, 3, 1, 9))
    with pytest.raises(ValueError, match="features has shape"):
        layer.initialize_from(torch.rand(2, 3, 9))
    with pytest.raises(TypeError, match="generator is 3"):
        layer.initialize_from(torch.rand(2, 3, 4, 4), generator=3)
    with pytest.raises(ValueError, match=r"Axis 3 has 3: features.permute\(0, 3, 1, 2\)"):
        layer.initialize_from(torch.rand(2, 9, 8, 3))
    with pytest.raises(ValueError, match="method is 'best'"):
        layer.initialize_from(torch.rand(2, 3, 5, 5), method="best")
    with pytest.raises(TypeError, match="features is a list"):
        layer.initialize_from([1])


# --- prune and append ---------------------------------------------------------------------------------------------


@pytest.fixture
def reference():
    """Its bits do not depend on how many prototypes there are."""
    with pf.use_backend("reference"):
        yield


def trained(optimizer_class, **options):
    torch.manual_seed(0)
    layer = pf.nn.PrototypeLayer(5, 3)
    optimizer = optimizer_class(layer.parameters(), lr=0.1, **options)
    x = torch.rand(2, 3, 4, 4)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
    return layer, optimizer, x


OPTIMIZERS = [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {})]


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: getattr(v, "__name__", ""))
def test_prune_goes_on_as_if_the_dropped_had_never_been(kind, options):
    layer, optimizer, x = trained(kind, **options)
    other, other_optimizer, _ = trained(kind, **options)
    parameter = layer.prototype_vectors
    graph = layer(x).sum()  # kept, so that torch still knows the old shape
    assert torch.equal(layer.prune([3, 0, 4], optimizer=optimizer), torch.tensor([3, 0, 4]))
    assert layer.prototype_vectors is parameter
    assert layer.num_prototypes == 3
    assert torch.equal(parameter.grad, other.prototype_vectors.grad[[3, 0, 4]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward(retain_graph=True)
    for net, step in ((layer, optimizer), (other, other_optimizer)):
        step.zero_grad()
        net(x).sum().backward()  # prototypes do not touch each other in this sum
        step.step()
    assert torch.equal(parameter, other.prototype_vectors[[3, 0, 4]])


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: getattr(v, "__name__", ""))
def test_append_leaves_the_others_as_they_were(kind, options):
    layer, optimizer, x = trained(kind, **options)
    other, other_optimizer, _ = trained(kind, **options)
    parameter, new = layer.prototype_vectors, torch.rand(2, 3)
    layer.append(new, optimizer=optimizer)
    assert layer.prototype_vectors is parameter
    assert torch.equal(parameter[5:].flatten(1), new)
    assert not parameter.grad[5:].any()
    for value in optimizer.state[parameter].values():
        if value.ndim:
            assert value.shape == parameter.shape
            assert not value[5:].any()
    for net, step in ((layer, optimizer), (other, other_optimizer)):
        step.zero_grad()
        net(x).sum().backward()
        step.step()
    assert torch.equal(parameter[:5], other.prototype_vectors)
    assert not torch.equal(parameter[5:].flatten(1), new), "what was appended does not learn"


@pytest.mark.usefixtures("reference")
def test_prune_without_optimizer_and_under_compile():
    layer = pf.nn.PrototypeLayer(5, 3)
    x = torch.rand(2, 3, 4, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    whole = compiled(x)
    kept = layer.prune(torch.tensor([True, False, True, True, False]))
    assert torch.equal(compiled(x), whole[:, kept])
    layer.append(torch.rand(1, 3, 1, 1))
    assert compiled(x).shape == (2, 4)


def test_prune_refuses_and_changes_nothing():
    layer, optimizer, _ = trained(torch.optim.Adam)
    before = copy.deepcopy((layer.prototype_vectors, optimizer.state_dict()))
    for keep, error, message in [
        ([0, 5], IndexError, "0 to 5"),
        ([-1], IndexError, "-1"),
        ([1, 1], ValueError, "twice"),
        ([], ValueError, "no prototype"),
        (torch.zeros(5, dtype=torch.bool), ValueError, "no prototype"),
        (torch.ones(4, dtype=torch.bool), ValueError, "4 bools"),
        (torch.ones(5), TypeError, "float32"),
        (torch.ones(1, 5, dtype=torch.bool), ValueError, "shape"),
        ("all", TypeError, "all"),
    ]:
        with pytest.raises(error, match=message):
            layer.prune(keep, optimizer=optimizer)
    for vectors, error, message in [
        (torch.rand(2, 4), ValueError, r"\(2, 4\)"),
        (torch.rand(3), ValueError, r"\(3,\)"),
        ([1.0], TypeError, "list"),
    ]:
        with pytest.raises(error, match=message):
            layer.append(vectors, optimizer=optimizer)
    with pytest.raises(ValueError, match="vectors has values in prototype 0"):
        layer.append(torch.full((1, layer.channels), math.nan), optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer is a int"):
        layer.prune([0], optimizer=3)
    stranger = torch.optim.SGD([nn.Parameter(torch.rand(2))])
    with pytest.raises(ValueError, match="optimizer does not hold"):
        layer.prune([0], optimizer=stranger)
    optimizer.state[layer.prototype_vectors]["rows"] = torch.zeros(5)
    with pytest.raises(ValueError, match="'rows' of shape"):
        layer.prune([0], optimizer=optimizer)
    del optimizer.state[layer.prototype_vectors]["rows"]
    assert torch.equal(layer.prototype_vectors, before[0])
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, before[1]["state"][0][name])


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_prototypes": 0}, ValueError, "num_prototypes is 0"),
        ({"num_prototypes": 2.0}, TypeError, "num_prototypes"),
        ({"channels": -1}, ValueError, "channels is -1"),
        ({"kernel_size": 0}, ValueError, "kernel_size is 0"),
        ({"kernel_size": ()}, ValueError, "kernel_size is empty"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size is 2.0"),
        ({"kernel_size": (1, 2.0)}, TypeError, "kernel_size is 2.0"),
        ({"kernel_size": "12"}, TypeError, "kernel_size is '12'"),
        ({"kernel_size": None}, TypeError, "kernel_size is None"),
        ({"topk": True}, TypeError, "topk is True"),
        ({"topk": np.bool_(True)}, TypeError, r"topk is np.True_|topk is True"),
        ({"eps": "1e-4"}, TypeError, "eps is '1e-4'"),
        ({"eps": None}, TypeError, "eps is None"),
        ({"eps": True}, TypeError, "eps is True"),
        ({"topk": 0}, ValueError, "topk is 0"),
        ({"metric": "l2"}, ValueError, "metric is 'l2'"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
        ({"eps": 0.0}, ValueError, "eps is 0"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'"),
        ({"init": "zeros"}, ValueError, "init is 'zeros'"),
        ({"init": torch.rand(3, 2)}, ValueError, r"init has shape \(3, 2\)"),
        ({"init": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "init is torch.int64"),
        ({"init": np.ones((2, 3))}, TypeError, "init is a ndarray; .* a torch tensor"),
        ({"init": torch.tensor([[1.0, 2, 3], [4, 5, math.nan]])}, ValueError, "init has values in prototype 1"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
        ({"dtype": "float16"}, TypeError, "dtype is 'float16'"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        pf.nn.PrototypeLayer(**{"num_prototypes": 2, "channels": 3, **options})


def test_device_and_dtype():
    for init in ("uniform", "normal", "orthogonal", torch.rand(5, 6)):
        layer = pf.nn.PrototypeLayer(5, 6, init=init, device="cpu", dtype=torch.float64)
        assert layer.prototype_vectors.dtype == torch.float64
        if isinstance(init, torch.Tensor):
            assert torch.equal(layer.prototype_vectors, init.double()[..., None, None])
        assert pf.nn.PrototypeLayer(5, 6, init=init, device="meta").prototype_vectors.is_meta
    kept = torch.rand(5, 6, dtype=torch.float64)
    layer = pf.nn.PrototypeLayer(5, 6, init=kept)
    assert layer.prototype_vectors.dtype == torch.float64
    assert layer.prototype_vectors.data_ptr() != kept.data_ptr()
    state = {"prototype_vectors": kept}
    assert pf.nn.PrototypeLayer.from_state_dict(state, dtype=torch.bfloat16).prototype_vectors.dtype == torch.bfloat16


def test_the_head_trains_on_after_prune_and_append():
    """By the recipe of docs/prototypes.md."""
    layer, head, x = pf.nn.PrototypeLayer(6, 8), nn.Linear(6, 3, bias=False), torch.rand(2, 8, 4, 4)
    optimizer, head_optimizer = (torch.optim.Adam(module.parameters()) for module in (layer, head))

    def step():
        head(layer(x)).square().sum().backward()
        for each in (optimizer, head_optimizer):
            each.step()
            each.zero_grad()

    step()
    kept = layer.prune([0, 1, 3, 4, 5], optimizer=optimizer)
    before = head.weight.detach().clone()
    head.weight = nn.Parameter(head.weight.detach()[:, kept])
    layer.append(torch.rand(2, 8), optimizer=optimizer)
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.zeros(3, 2)], 1))
    assert torch.equal(head.weight, torch.cat([before[:, [0, 1, 3, 4, 5]], torch.zeros(3, 2)], 1))
    head_optimizer = torch.optim.Adam(head.parameters())
    before = head.weight.detach().clone()
    step()
    assert head.weight.shape == (3, 7)
    assert (head.weight != before).all()


def test_the_layer_and_the_functions_refuse_alike():
    x, p = torch.rand(1, 3, 4, 4), torch.rand(2, 3)
    for options in (
        {"metric": "l2"},
        {"activation": "relu"},
        {"eps": -1.0},
        {"eps": math.nan},
        {"eps": "1e-4"},
        {"precision": "fp8"},
        {"topk": 1.0},
        {"topk": True},
    ):
        with pytest.raises((TypeError, ValueError)) as layers:
            pf.nn.PrototypeLayer(2, 3, **options)
        with pytest.raises(layers.type) as functions:
            pf.prototype_activation(x, p, **options)
        assert str(layers.value) == str(functions.value)


def test_integers_and_numbers_of_numpy():
    x = torch.rand(2, 3, 4, 4)
    layer = pf.nn.PrototypeLayer(np.int64(2), np.int32(3), np.int64(2), topk=np.int64(3), eps=np.float32(0.5))
    assert layer.kernel_size == (2, 2)
    vectors = layer.prototype_vectors
    expected = pf.prototype_activation(x, vectors, topk=3, eps=0.5)
    assert torch.equal(layer(x), expected.activation)
    found = pf.prototype_activation(x, vectors, topk=np.int64(3), eps=np.float64(0.5))
    assert torch.equal(found.activation, expected.activation)
    assert torch.equal(pf.prototype_distance(x, vectors, topk=np.uint8(3)).index, expected.index)


@pytest.mark.parametrize("dynamic", [False, True])
def test_checks_compile(dynamic):
    def call(x, p, topk, eps):
        return pf.prototype_activation(x, p, topk=topk, eps=eps).activation

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    x, p = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    for topk, eps in ((1, 1e-4), (3, 0.5), (2, 0.25)):
        assert torch.equal(compiled(x, p, topk, eps), call(x, p, topk, eps))
