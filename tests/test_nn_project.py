"""`project` against a brute-force search over all patches of all images, and its resumption; and pictures."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.errors import assert_within, exact
from torch import nn

import protofast as pf
from protofast.nn.project import _identity, _Nearest

IMAGES = 23


@pytest.fixture
def encoder():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


@pytest.fixture
def images():
    return torch.rand(IMAGES, 1, 8, 7)


def batches(*parts, size=5):
    return list(zip(*(part.split(size) for part in parts), strict=True))


def encoded(encoder, images):
    mode = encoder.training
    with torch.no_grad():
        found = encoder.eval()(images)
    encoder.train(mode)
    return found


def brute(layer, features, *, allowed=None, best=1, per_image=1):
    """For each prototype (distance, image, patch), sorted, by a loop over all windows in extended precision."""
    x, vectors = exact(features), exact(layer.prototype_vectors)
    kernel = vectors.shape[2:]
    grid = [s - k + 1 for s, k in zip(x.shape[2:], kernel, strict=True)]
    found = [[] for _ in vectors]
    for b, p in np.ndindex(len(x), len(vectors)):
        if allowed is not None and not allowed[b][p]:
            continue
        rows = []
        for n, at in enumerate(np.ndindex(*grid)):
            patch = x[(b, slice(None), *(slice(a, a + k) for a, k in zip(at, kernel, strict=True)))]
            dot = (patch * vectors[p]).sum()
            if layer.metric == "dot":
                distance = -dot
            elif layer.metric == "cosine":
                length = np.sqrt((patch**2).sum() * (vectors[p] ** 2).sum())
                distance = 1 - dot / length if length else 1
            else:
                distance = ((patch - vectors[p]) ** 2).sum()
            rows.append((distance, b, n))
        found[p] += sorted(rows)[:per_image]
    return [sorted(rows)[:best] for rows in found]


def assert_same(projection, expected, best, grid):
    roundings = 2 * projection.feature[0, 0].numel() + 8
    for p, rows in enumerate(expected):
        images, patches = projection.image[p].tolist(), projection.patch[p].tolist()
        filled = len(rows)
        assert images == [b for _, b, _ in rows] + [-1] * (best - filled)
        assert patches == [n for _, _, n in rows] + [-1] * (best - filled)
        assert projection.position[p, :filled].tolist() == [list(np.unravel_index(n, grid)) for _, _, n in rows]
        assert (projection.position[p, filled:] == -1).all()
        assert (projection.distance[p, filled:] == math.inf).all()
        assert not projection.feature[p, filled:].any()
        if filled:
            wanted = np.array([d for d, _, _ in rows])
            assert_within(projection.distance[p, :filled], wanted, np.maximum(np.abs(wanted), 1), roundings)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("distance", "image", "patch", "position", "feature"))


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("kernel", [1, (2, 3)])
@pytest.mark.parametrize(("best", "per_image"), [(1, 1), (4, 1), (4, 3), (30, 1), (6, 100)])
def test_the_best_patches_of_all(encoder, images, best, per_image, kernel, metric):
    layer = pf.nn.PrototypeLayer(6, 4, kernel, metric=metric)
    features = encoded(encoder, images)
    before = layer.prototype_vectors.detach().clone()
    found = pf.nn.project(layer, encoder, images.split(5), best=best, per_image=per_image, push=False, progress=False)
    assert torch.equal(layer.prototype_vectors, before)
    expected = brute(layer, features, best=best, per_image=per_image)
    grid = (6, 5) if kernel == 1 else (5, 3)
    assert_same(found, expected, best, grid)
    height, width = layer.kernel_size
    for p, rank in itertools.product(range(6), range(min(best, IMAGES))):
        y, x = found.position[p, rank].tolist()
        patch = features[found.image[p, rank], :, y : y + height, x : x + width]
        assert torch.equal(found.feature[p, rank], patch)


@pytest.mark.parametrize("as_table", [False, True])
def test_only_patches_of_the_class(encoder, images, as_table):
    layer = pf.nn.PrototypeLayer(7, 4)
    labels = torch.randint(0, 3, (IMAGES,))
    labels[labels == 2] = 5
    classes = torch.tensor([0, 1, 1, 5, 0, -1, 4])  # one without a class, one whose class has no image
    given = torch.stack([classes == c for c in range(6)], 1) if as_table else classes
    before = layer.prototype_vectors.detach().clone()
    with pytest.warns(UserWarning, match=r"2 prototypes have no patch .*: 5, 6"):
        found = pf.nn.project(layer, encoder, batches(images, labels), prototype_classes=given, best=3, progress=False)
    features = encoded(encoder, images)
    allowed = labels[:, None] == classes
    check = pf.nn.PrototypeLayer(7, 4, init=before)
    assert_same(found, brute(check, features, allowed=allowed, best=3), 3, (6, 5))
    assert found.found.tolist() == [True] * 5 + [False] * 2
    assert torch.equal(layer.prototype_vectors[:5].flatten(1), found.feature[:5, 0].flatten(1))
    assert torch.equal(layer.prototype_vectors[5:], before[5:])
    assert "2 without a patch" in repr(found)


def test_after_the_push_the_nearest_patch_is_the_prototype(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    parameter = layer.prototype_vectors
    first = pf.nn.project(layer, encoder, images.split(4), progress=False)
    assert layer.prototype_vectors is parameter
    assert parameter.requires_grad
    again = pf.nn.project(layer, encoder, images.split(4), progress=False)
    assert torch.equal(again.distance, torch.zeros(6, 1))
    assert torch.equal(again.feature, first.feature)
    later = pf.nn.PrototypeLayer(6, 4)
    first.push_to(later)
    assert torch.equal(later.prototype_vectors, parameter)


def test_batches_do_not_matter_and_ties_go_to_the_lowest():
    # every image has the same two nearest patches
    images = torch.ones(6, 2, 3, 3)
    images[:, :, 1, 1] = images[:, :, 2, 0] = 0.25
    layer = pf.nn.PrototypeLayer(2, 2, init=torch.full((2, 2), 0.25))
    for size in (1, 2, 6):
        found = pf.nn.project(layer, nn.Identity(), images.split(size), best=3, push=False, progress=False)
        assert found.image.tolist() == [[0, 1, 2]] * 2
        assert found.patch.tolist() == [[4, 4, 4]] * 2
        found = pf.nn.project(layer, nn.Identity(), images.split(size), best=3, per_image=2, push=False, progress=False)
        assert found.image.tolist() == [[0, 0, 1]] * 2
        assert found.patch.tolist() == [[4, 6, 4]] * 2


def test_a_patch_at_infinite_distance_is_still_a_patch():
    images = torch.full((3, 2, 1, 1), 1e30)  # whose square is beyond float32
    layer = pf.nn.PrototypeLayer(2, 2)
    found = pf.nn.project(layer, nn.Identity(), images.split(2), best=4, progress=False)
    assert (found.distance == math.inf).all()
    assert found.image.tolist() == [[0, 1, 2, -1]] * 2
    assert (layer.prototype_vectors == 1e30).all()


def test_ids_of_the_loader(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    whole = pf.nn.project(layer, encoder, images.split(5), best=4, push=False, progress=False)
    order = torch.randperm(IMAGES)
    shuffled = [(x, None, i) for x, i in batches(images[order], order)]
    assert same(whole, pf.nn.project(layer, encoder, shuffled, best=4, push=False, progress=False))
    # ties go to the lowest id, not to the first that came
    equal = [(torch.ones(2, 4, 2, 2), None, torch.tensor(ids)) for ids in ([7, 3], [9, 1])]
    found = pf.nn.project(layer, nn.Identity(), equal, best=3, push=False, progress=False)
    assert found.image.tolist() == [[1, 3, 7]] * 6


def test_one_axis_three_axes_and_float64():
    for sizes in [(9,), (2, 3, 4)]:
        data = torch.rand(8, 4, *sizes, dtype=torch.float64)
        layer = pf.nn.PrototypeLayer(3, 4, tuple(2 for _ in sizes)).double()
        found = pf.nn.project(layer, lambda x: x, data.split(3), best=2, push=False, progress=False)
        assert found.distance.dtype == found.feature.dtype == torch.float64
        grid = tuple(s - 1 for s in sizes)
        assert_same(found, brute(layer, data, best=2), 2, grid)
        pixel = pf.nn.PrototypeLayer(3, 4)  # (P, D, 1, 1) on a grid of another number of axes
        found = pf.nn.project(pixel, lambda x: x, data.float().split(3), progress=False)
        assert torch.equal(pixel.prototype_vectors.flatten(1), found.feature[:, 0].flatten(1))


def test_the_modes_of_the_encoder_come_back(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    encoder[1].eval()  # frozen, in a net that trains
    statistics = encoder[1].running_mean.clone()
    pf.nn.project(layer, encoder, images.split(5), progress=False)
    assert [m.training for m in encoder.modules()] == [True, True, False, True, True]
    assert torch.equal(encoder[1].running_mean, statistics)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        pf.nn.project(layer, broken, images.split(5), progress=False)
    assert broken.training


def test_a_method_puts_its_module_into_eval_mode(images):
    class PPNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
            self.prototype_vectors = nn.Parameter(torch.rand(6, 4, 1, 1))

        def conv_features(self, x):
            assert not self.features[1].training
            return self.features(x)

    model = PPNet()
    before = model.features[1].running_mean.clone()
    layer = pf.nn.PrototypeLayer.from_state_dict(model.state_dict())
    layer.prototype_vectors = model.prototype_vectors
    found = pf.nn.project(layer, model.conv_features, images.split(5), progress=False)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.features[1].running_mean, before)
    assert torch.equal(model.prototype_vectors, found.feature[:, 0])


def test_a_loader_that_shuffles_is_warned_of(images, recwarn):
    data = torch.utils.data
    layer, encoder = pf.nn.PrototypeLayer(6, 4), nn.Conv2d(1, 4, 3)
    plain = data.TensorDataset(images)
    sampler = data.BatchSampler(data.RandomSampler(plain), 5, False)
    for loader in (data.DataLoader(plain, 5, shuffle=True), data.DataLoader(plain, batch_sampler=sampler)):
        with pytest.warns(UserWarning, match="loader shuffles .* shuffle=False, or ids") as caught:
            pf.nn.project(layer, encoder, loader, progress=False)
        assert [warning.filename for warning in caught] == [__file__]
    numbered = data.TensorDataset(images, torch.zeros(IMAGES, dtype=torch.int64), torch.arange(IMAGES))
    for loader in (data.DataLoader(plain, 5), data.DataLoader(numbered, 5, shuffle=True)):
        pf.nn.project(layer, encoder, loader, progress=False)
    assert not [w for w in recwarn if "shuffles" in str(w.message)]


def test_integers_of_numpy(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    options = {"best": np.int64(3), "per_image": np.int32(2), "checkpoint_every": np.int64(2)}
    found = pf.nn.project(layer, encoder, images.split(5), push=False, progress=False, **options)
    expected = pf.nn.project(layer, encoder, images.split(5), push=False, progress=False, best=3, per_image=2)
    assert same(found, expected)


def test_duplicates():
    layer = pf.nn.PrototypeLayer(4, 2, init=torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.1, 0.0], [0.0, 0.2]]))
    images = torch.tensor([[0.0, 0.0], [6.0, 5.0], [-0.0, 0.0]])[:, :, None, None]
    found = pf.nn.project(layer, nn.Identity(), images.split(2), progress=False)
    assert found.duplicates == [[0, 2, 3]]
    assert found.unique.tolist() == [True, True, False, False]
    assert "1 groups of duplicates" in repr(found)
    layer.prune(found.unique)
    assert layer.num_prototypes == 2


# --- resumption -----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class Interrupted(nn.Module):
    """An encoder that gives up after some batches, and counts."""

    def __init__(self, encoder, after):
        super().__init__()
        self.encoder, self.after, self.calls = encoder, after, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            raise Stop
        return self.encoder(x)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_resumes_to_the_same_bits(encoder, images, tmp_path, after):
    labels = torch.randint(0, 2, (IMAGES,))
    options = {"prototype_classes": torch.tensor([0, 1, 1, 0, 1, 0]), "best": 3, "push": False, "progress": False}
    layer = pf.nn.PrototypeLayer(6, 4)
    whole = pf.nn.project(layer, encoder, batches(images, labels), **options)
    path = tmp_path / "deep" / "progress.npz"
    options |= {"checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(Stop):
        pf.nn.project(layer, Interrupted(encoder, after), batches(images, labels), **options)
    assert path.exists(), "the exception did not write what was done"
    rest = Interrupted(encoder, 99)
    assert same(pf.nn.project(layer, rest, batches(images, labels), **options), whole)
    assert rest.calls == 5 - after
    assert list(path.parent.glob("*")) == [] if path.parent.exists() else True


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_an_interrupt_amid_a_batch_keeps_the_batches_before(encoder, images, tmp_path, monkeypatch, call):
    labels = torch.arange(IMAGES) % 2
    options = {"prototype_classes": torch.tensor([0, 1, 1, 0, 1, 0]), "best": 3, "push": False, "progress": False}
    layer = pf.nn.PrototypeLayer(6, 4)
    whole = pf.nn.project(layer, encoder, batches(images, labels), **options)
    options["checkpoint"] = tmp_path / "progress.npz"
    merge, calls = _Nearest._merge, []

    def interrupted(*given):
        calls.append(given)  # two a batch, one a class
        if len(calls) == call:
            raise KeyboardInterrupt
        return merge(*given)

    monkeypatch.setattr(_Nearest, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pf.nn.project(layer, encoder, batches(images, labels), **options)
    assert options["checkpoint"].exists() == (call > 2)
    calls.clear()
    call = 99
    assert same(pf.nn.project(layer, encoder, batches(images, labels), **options), whole)


def test_an_error_before_anything_new_leaves_the_checkpoint(encoder, images, tmp_path):
    layer, path = pf.nn.PrototypeLayer(6, 4), tmp_path / "progress.npz"
    options = {"checkpoint": path, "push": False, "progress": False}
    with pytest.raises(Stop):
        pf.nn.project(layer, Interrupted(encoder, 3), images.split(5), **options)
    before = path.read_bytes(), path.stat().st_mtime_ns

    def broken():
        yield images[:5]
        raise Stop

    with pytest.raises(Stop):
        pf.nn.project(layer, Interrupted(encoder, 99), broken(), **options)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_checkpoint_of_something_else_is_refused(encoder, images, tmp_path):
    layer = pf.nn.PrototypeLayer(6, 4)
    path = tmp_path / "progress.npz"
    options = {"checkpoint": path, "checkpoint_every": 2, "push": False, "progress": False}

    def stop():
        with pytest.raises(Stop):
            pf.nn.project(layer, Interrupted(encoder, 3), images.split(5), **options)

    stop()
    for changed, name in [
        ({"layer": pf.nn.PrototypeLayer(6, 4)}, "prototypes"),
        ({"layer": pf.nn.PrototypeLayer(6, 4, init=layer.prototype_vectors, metric="cosine")}, "metric"),
        ({"best": 2}, "best"),
        ({"prototype_classes": torch.arange(6)}, "prototype_classes"),
        ({"layer": pf.nn.PrototypeLayer(6, 4, (1, 2))}, "kernel_size"),
        ({"encoder": encoder}, "encoder"),
        ({"encoder": Interrupted(nn.Conv2d(1, 4, 3), 9)}, "encoder"),
    ]:
        given = {"layer": layer, "encoder": Interrupted(encoder, 99), "loader": images.split(5), **options, **changed}
        with pytest.raises(ValueError, match=f"made with another {name}"):
            pf.nn.project(**given)
    brighter = images.clone()
    brighter[6] += 0.1  # the second of its batch
    for other in (images.flip(0).split(5), images.split(4), brighter.split(5)):
        with pytest.raises(ValueError, match="loader gives other batches"):
            pf.nn.project(layer, Interrupted(encoder, 99), other, **options)
    with pytest.raises(ValueError, match="loader has 1 batches"):
        pf.nn.project(layer, Interrupted(encoder, 99), images.split(5)[:1], **options)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        pf.nn.project(layer, Interrupted(encoder, 99), images.split(5), **options)
    path.unlink()
    pf.nn.project(layer, encoder, images.split(5), push=False, progress=False).save(path)
    with pytest.raises(ValueError, match="holds no progress"):
        pf.nn.project(layer, encoder, images.split(5), **options)


def test_other_labels_and_ids_are_refused(encoder, images, tmp_path):
    layer, labels, ids = pf.nn.PrototypeLayer(6, 4), torch.arange(IMAGES) % 3, torch.arange(IMAGES)
    options = {"prototype_classes": torch.arange(6) % 3, "checkpoint": tmp_path / "progress.npz"}
    options |= {"checkpoint_every": 2, "push": False, "progress": False}
    with pytest.raises(Stop):
        pf.nn.project(layer, Interrupted(encoder, 3), batches(images, labels, ids), **options)
    other = labels.clone()
    other[7] += 1
    shifted = torch.where(ids == 8, 100, ids)
    for given in (batches(images, other, ids), batches(images, labels, shifted)):
        with pytest.raises(ValueError, match="loader gives other batches"):
            pf.nn.project(layer, Interrupted(encoder, 99), given, **options)
    pf.nn.project(layer, Interrupted(encoder, 99), batches(images, labels, ids), **options)


class Settled(nn.Module):
    """With a setting that only its repr has, and a buffer that is not saved."""

    def __init__(self, power=2, shift=0.0):
        super().__init__()
        self.power = power
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def extra_repr(self):
        return f"power={self.power}, act={object()}"

    def forward(self, x):
        return x**self.power + self.shift


def one(x):
    return x


def two(x):
    return 2 * x


def test_what_tells_encoders_apart():
    class Other(Settled):
        pass

    Other.__name__ = "Settled"
    wide, narrow = (nn.Conv2d(1, 1, 3, padding=p, bias=False) for p in (1, 0))
    narrow.load_state_dict(wide.state_dict())
    different = [one, two, Settled(), Settled(3), Settled(shift=1.0), Other(), wide, narrow, wide.forward]
    different += [narrow.forward, nn.Sequential(Settled()), nn.Sequential(Other())]
    assert len({_identity(encoder) for encoder in different}) == len(different)
    assert _identity(Settled()) == _identity(Settled())


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def test_a_loader_without_a_length(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    whole = pf.nn.project(layer, encoder, images.split(5), best=2, push=False, progress=False)
    loader = torch.utils.data.DataLoader(Stream(images), batch_size=5)
    for given in (loader, (batch for batch in images.split(5))):
        assert same(pf.nn.project(layer, encoder, given, best=2, push=False, progress=False), whole)


@pytest.mark.parametrize("as_table", [False, True])
def test_images_of_no_class_match_nothing(as_table):
    images = torch.rand(4, 2, 2, 2)
    classes = torch.tensor([0, -1, 1])
    given = torch.stack([classes == c for c in range(2)], 1) if as_table else classes
    layer = pf.nn.PrototypeLayer(3, 2, init=images[1, :, 0, 0].expand(3, 2))  # nearest to the second image
    loader = [(images, torch.tensor([0, -1, 1, -1]))]
    options = {"prototype_classes": given, "best": 2, "push": False, "progress": False}
    found = pf.nn.project(layer, nn.Identity(), loader, **options)
    assert found.image.tolist() == [[0, -1], [-1, -1], [2, -1]]
    with pytest.raises(ValueError, match="loader gave label -2"):
        pf.nn.project(layer, nn.Identity(), [(images, torch.tensor([0, -2, 1, 0]))], **options)


def test_save_and_load(encoder, images, tmp_path):
    layer = pf.nn.PrototypeLayer(6, 4)
    found = pf.nn.project(layer, encoder, images.split(5), best=2, progress=False)
    found.save(tmp_path / "found.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["found.npz"]
    assert same(pf.nn.Projection.load(tmp_path / "found.npz"), found)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="holds no projection"):
        pf.nn.Projection.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        pf.nn.Projection.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="layer has prototypes"):
        found.push_to(pf.nn.PrototypeLayer(5, 4))


def test_memory_is_that_of_the_winners():
    """Nothing of the size of a dense map is kept from batch to batch, nor made for one."""
    layer = pf.nn.PrototypeLayer(50, 2)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if "protofast" not in str(func):
                tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
                largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
            return out

    data = torch.rand(4, 2, 40, 40)
    with Watch():
        pf.nn.project(layer, nn.Identity(), data.split(2), best=2, progress=False)
    # a batch's features; the map would be 50 times that of one channel
    assert largest <= data.untyped_storage().nbytes()


# --- errors ---------------------------------------------------------------------------------------------------


def test_broken_features_name_the_image(encoder, images):
    layer = pf.nn.PrototypeLayer(6, 4)
    before = layer.prototype_vectors.detach().clone()
    images[13] = math.nan
    with pytest.raises(ValueError, match="not finite for image 13"):
        pf.nn.project(layer, encoder, images.split(5), progress=False)
    assert torch.equal(layer.prototype_vectors, before)
    loader = [(images, torch.zeros(IMAGES, dtype=torch.int64), torch.arange(100, 100 + IMAGES))]
    with pytest.raises(ValueError, match="not finite for image 113"):
        pf.nn.project(layer, encoder, loader, progress=False)


X = torch.rand(4, 4, 3, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layer": nn.Identity()}, TypeError, "layer is a Identity"),
        ({"encoder": 3}, TypeError, "encoder is a int"),
        ({"best": 0}, ValueError, "best is 0"),
        ({"best": 1.0}, TypeError, "best is 1.0"),
        ({"per_image": 0}, ValueError, "per_image is 0"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every is 0"),
        ({"loader": []}, ValueError, "loader gave no batch"),
        ({"loader": [{"x": X}]}, TypeError, "loader gave a dict"),
        ({"loader": [(X, torch.zeros(3, dtype=torch.int64))]}, ValueError, "loader gave labels"),
        ({"loader": [(X, None, torch.tensor([1, 2, 3, 1]))]}, ValueError, "image id twice"),
        ({"loader": [(X, None, torch.arange(4))] * 2}, ValueError, "image id twice"),
        ({"loader": [(X, None, torch.arange(-1, 3))]}, ValueError, "image id -1"),
        ({"loader": [X, X[..., 0]]}, ValueError, "other axes"),
        ({"encoder": lambda x: x[:, :3]}, ValueError, "features has shape"),
        ({"encoder": lambda x: x[:2]}, ValueError, "for 4 images"),
        ({"encoder": lambda x: None}, TypeError, "encoder gave a NoneType"),
        ({"prototype_classes": torch.zeros(2, dtype=torch.int64)}, ValueError, "loader gave no labels"),
        ({"prototype_classes": torch.zeros(3, dtype=torch.int64)}, ValueError, "prototype_classes has shape"),
        (
            {"prototype_classes": torch.ones(2, 1), "loader": [(X, torch.ones(4, dtype=torch.int64))]},
            ValueError,
            "label 1",
        ),
    ],
)
def test_refuses(changed, error, message):
    given = {"layer": pf.nn.PrototypeLayer(2, 4), "encoder": nn.Identity(), "loader": [X], "progress": False}
    with pytest.raises(error, match=message):
        pf.nn.project(**{**given, **changed})


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "loader is a NoneType; give a DataLoader"),
        (X, "loader is a Tensor; wrap it in a DataLoader"),
        (torch.utils.data.TensorDataset(X), r"loader is a Dataset \(TensorDataset\); wrap it in a DataLoader"),
    ],
)
def test_refuses_what_is_no_loader(loader, message):
    with pytest.raises(TypeError, match=message):
        pf.nn.project(pf.nn.PrototypeLayer(2, 4), nn.Identity(), loader, progress=False)


def test_refuses_what_is_no_checkpoint(tmp_path):
    layer = pf.nn.PrototypeLayer(2, 4)
    text, array = tmp_path / "notes.txt", tmp_path / "array.npy"
    text.write_text("epoch 1\n")
    np.save(array, np.zeros(3))
    for path, error, message in [
        (tmp_path, ValueError, r"checkpoint .* is a folder; give a file, such as .*push\.npz"),
        (text, ValueError, r"checkpoint .*notes\.txt is damaged, or no \.npz file"),
        (array, ValueError, r"checkpoint .*array\.npy is damaged, or no \.npz file"),
        (3, TypeError, "checkpoint is a int; give a path"),
    ]:
        with pytest.raises(error, match=message):
            pf.nn.project(layer, nn.Identity(), [X], checkpoint=path, progress=False)
    assert text.read_text() == "epoch 1\n"
    with pytest.raises(TypeError, match="layer is a NoneType"):
        pf.nn.project(layer, nn.Identity(), [X], push=False, progress=False).push_to(None)


def test_refuses_broken_prototypes():
    layer = pf.nn.PrototypeLayer(2, 4)
    with torch.no_grad():
        layer.prototype_vectors[1, 2] = math.nan
    with pytest.raises(ValueError, match="prototype 1"):
        pf.nn.project(layer, nn.Identity(), [X], progress=False)


# --- pictures -------------------------------------------------------------------------------------------------


def test_draw_boxes(tmp_path):
    from PIL import Image

    image = torch.rand(3, 9, 8)
    path = tmp_path / "boxes.png"
    drawn = pf.nn.draw_boxes(image, [(2, 1, 7, 6), (-3, 6, 2, 99), (5, 5, 5, 8)], width=2, path=path)
    plain = (image.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
    framed = np.zeros((9, 8), bool)
    framed[2:7, 1:6] = True
    framed[4:5, 3:4] = False
    framed[0:2, 6:8] = True  # clipped, and all frame
    assert (drawn[framed] == (255, 196, 0)).all()
    assert (drawn[~framed] == plain[~framed]).all()
    assert (np.asarray(Image.open(path)) == drawn).all()
    grey = pf.nn.draw_boxes(np.full((4, 4), 7, np.uint8), torch.tensor([0, 0, 1, 1]), colour=(1, 2, 3))
    assert (grey[0, 0] == (1, 2, 3)).all()
    assert (grey[1:] == 7).all()


def test_heat_map(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    layer = pf.nn.PrototypeLayer(2, 3, init=torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    features = torch.rand(3, 4, 4) * 0.1 + 0.4
    features[:, 2, 1] = 1
    path = tmp_path / "heat.png"
    image = torch.zeros(1, 16, 16)
    picture = pf.nn.heat_map(image, layer, features, 1, strength=1.0, path=path)
    assert path.exists()
    assert picture.shape == (16, 16, 3)
    brightest = np.unravel_index(picture.astype(int).sum(2).argmax(), (16, 16))
    assert (brightest[0] // 4, brightest[1] // 4) == (2, 1)
    assert (pf.nn.heat_map(image, layer, features[None], 1, strength=0.0) == 0).all()
    # with limits far above, everything has the colour of the lower end
    dark = (np.array(matplotlib.colormaps["inferno"](0.0)[:3]) * 255).round()
    assert (pf.nn.heat_map(image, layer, features, 1, strength=1.0, limits=(50, 60)) == dark).all()
    flat = pf.nn.heat_map(image, layer, torch.ones(3, 4, 4), 1, strength=1.0)
    assert (flat == dark).all()


def test_a_heat_map_makes_the_map_of_its_prototype_alone(monkeypatch):
    pytest.importorskip("matplotlib")
    layer = pf.nn.PrototypeLayer(5, 3, metric="cosine", activation="linear")
    image, features = torch.rand(1, 8, 8), torch.rand(3, 4, 4)
    whole, seen = layer.map(features[None]), []

    def watched(*args, **options):
        seen.append(pf.prototype_map(*args, **options))
        return seen[-1]

    monkeypatch.setattr("protofast.nn.pictures.prototype_map", watched)
    pf.nn.heat_map(image, layer, features, 3)
    (found,) = seen
    assert torch.equal(found, whole[:, 3:4])


def test_prototype_sheet(encoder, images, tmp_path):
    pytest.importorskip("matplotlib")
    layer = pf.nn.PrototypeLayer(4, 4, 2)
    found = pf.nn.project(layer, encoder, images[:3].split(2), best=5, progress=False)
    field = pf.nn.receptive_field(encoder, (8, 7), kernel_size=2)
    path = tmp_path / "sheet.png"
    data = [(image, 0) for image in images]
    figure = pf.nn.prototype_sheet(found, data, field=field, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 20
    for place, axes in enumerate(figure.axes):
        p, rank = divmod(place, 5)
        if rank >= 3:
            assert not axes.images
            continue
        top, left, bottom, right = field.box(int(found.patch[p, rank]))
        frame = axes.lines[0].get_xydata()
        assert frame.min(0).tolist() == [left - 0.5, top - 0.5]
        assert frame.max(0).tolist() == [right - 0.5, bottom - 0.5]
        number = int(found.image[p, rank])
        assert axes.get_title().startswith(f"{number} · ")
        assert (axes.images[0].get_array()[..., 0] == (images[number, 0].numpy() * 255).round()).all()
    few = pf.nn.prototype_sheet(found, images.__getitem__, prototypes=[2])
    assert len(few.axes) == 5


def test_a_picture_that_fails_leaves_the_old_file(encoder, images, tmp_path):
    pytest.importorskip("matplotlib")
    layer = pf.nn.PrototypeLayer(4, 4)
    found = pf.nn.project(layer, encoder, images.split(8), best=2, progress=False)
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"images\[\d+\] has shape"):
        pf.nn.prototype_sheet(found, lambda i: images[i, 0, 0], path=path)
    with pytest.raises(IndexError, match="prototypes has 4"):
        pf.nn.prototype_sheet(found, images, prototypes=[4], path=path)
    with pytest.raises(ValueError, match="boxes is"):
        pf.nn.draw_boxes(images[0], [(0, 0, 1)], path=path)
    with pytest.raises(IndexError, match="prototype is 4"):
        pf.nn.heat_map(images[0], layer, torch.rand(4, 3, 3), 4, path=path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", ["", ".PNG", ".jpg", ".tif", ".webp", ".pdf", ".svg"])
def test_the_suffix_says_the_format(encoder, images, tmp_path, suffix):
    from PIL import Image

    pytest.importorskip("matplotlib")
    begins = {
        "": b"\x89PNG",
        ".PNG": b"\x89PNG",
        ".jpg": b"\xff\xd8",
        ".webp": b"RIFF",
        ".pdf": b"%PDF",
        ".svg": b"<?xml",
    }
    begins[".tif"] = b"II*\0"
    path = tmp_path / f"picture{suffix}"
    found = pf.nn.project(pf.nn.PrototypeLayer(1, 4), encoder, [images], progress=False)
    pf.nn.prototype_sheet(found, images, path=path)
    assert path.read_bytes().startswith(begins[suffix])
    path.unlink()
    if suffix == ".svg":
        with pytest.raises(ValueError, match=r"path is .*svg'; a picture can be written as png, "):
            pf.nn.draw_boxes(images[0], (0, 0, 4, 4), path=path)
        return
    drawn = pf.nn.draw_boxes(images[0], (0, 0, 4, 4), path=path)
    assert path.read_bytes().startswith(begins[suffix])
    if suffix in ("", ".PNG", ".tif"):
        assert (np.asarray(Image.open(path)) == drawn).all()


def test_normalised_images_are_warned_of_once(encoder, images, recwarn):
    pytest.importorskip("matplotlib")
    layer = pf.nn.PrototypeLayer(2, 4)
    found = pf.nn.project(layer, encoder, [images], best=3, progress=False)
    features = torch.rand(4, 3, 3)
    barely = images[0].clone()
    barely[0, 0, :2] = torch.tensor([1.001, -0.001])
    for fine in (images[0], (images[0] * 255).byte(), barely, torch.full((1, 4, 4), math.nan)):
        pf.nn.draw_boxes(fine, [])
    assert not recwarn
    many = images * 4 - 2
    for name, draw in (
        ("image", lambda: pf.nn.draw_boxes(many[0], [])),
        ("image", lambda: pf.nn.heat_map(many[0], layer, features, 0)),
        (r"images\[\d+\]", lambda: pf.nn.prototype_sheet(found, many)),
    ):
        with pytest.warns(
            UserWarning, match=rf"{name} ranges from -[12].* to .*: undo the normalisation first"
        ) as caught:
            draw()
        assert len(caught) == 1
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="image ranges from 0 to 255"):
        pf.nn.draw_boxes(torch.tensor([[0.0, 255.0]]), [])


@pytest.mark.parametrize("none", [[], torch.empty(0, 4, dtype=torch.int64), np.zeros((0, 4), int), (0, 0, 0, 0)])
def test_no_boxes(none):
    image = torch.rand(3, 5, 4)
    assert (pf.nn.draw_boxes(image, none) == pf.nn.draw_boxes(image, [(2, 1, 2, 9)])).all()


def test_drawing_leaves_the_image_as_it_was():
    image = np.zeros((3, 4, 4), np.uint8)
    pf.nn.draw_boxes(image, (0, 0, 4, 4))
    assert not image.any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image": None}, TypeError, "image is a NoneType"),
        ({"image": torch.rand(1, 0, 4)}, ValueError, r"image has shape \(1, 0, 4\)"),
        ({"layer": nn.Conv2d(1, 4, 3)}, TypeError, "layer is a Conv2d"),
        ({"features": None}, TypeError, "features is a NoneType"),
        ({"prototype": None}, TypeError, "prototype is None"),
        ({"prototype": 1.5}, TypeError, "prototype is 1.5"),
        ({"prototype": -1}, IndexError, "prototype is -1"),
        ({"strength": None}, TypeError, "strength is None"),
        ({"strength": 2}, ValueError, "strength is 2"),
        ({"limits": 3}, TypeError, "limits is 3"),
        ({"limits": (1, None)}, TypeError, "limits is"),
        ({"limits": (2, 1)}, ValueError, r"limits is \(2, 1\)"),
        ({"limits": (0, math.nan)}, ValueError, "limits is"),
        ({"path": 3}, TypeError, "path is a int"),
        ({"path": "heat.docx"}, ValueError, "path is 'heat.docx'"),
    ],
)
def test_heat_map_refuses(changed, error, message):
    pytest.importorskip("matplotlib")
    options = {"image": torch.rand(1, 8, 8), "features": torch.rand(4, 3, 3), "prototype": 0}
    options["layer"] = pf.nn.PrototypeLayer(2, 4)
    with pytest.raises(error, match=message):
        pf.nn.heat_map(**{**options, **changed})


@pytest.mark.parametrize(
    ("boxes", "options", "error", "message"),
    [
        (None, {}, TypeError, "boxes is None"),
        ("all", {}, TypeError, "boxes is 'all'"),
        ([(0, 0, 1.5, 2)], {}, ValueError, "boxes is torch.float32"),
        ([(0, 0, 3, 3), (4, 1, 2, 3)], {}, ValueError, r"boxes has \[4, 1, 2, 3\], which ends before"),
        ((1, 3, 2, 1), {}, ValueError, "ends before it begins"),
        ((5, 0, 7, 2), {}, ValueError, r"boxes has \[5, 0, 7, 2\], outside the image of 5 by 4"),
        ((0, -3, 2, 0), {}, ValueError, "outside the image"),
        ((0, 0, 1, 1), {"colour": "red"}, TypeError, "colour is 'red'"),
        ((0, 0, 1, 1), {"colour": None}, TypeError, "colour is None"),
        ((0, 0, 1, 1), {"colour": (0, 0, 256)}, ValueError, "colour is"),
        ((0, 0, 1, 1), {"colour": (0, 0)}, ValueError, "colour is"),
        ((0, 0, 1, 1), {"width": 1.5}, TypeError, "width is 1.5"),
        ((0, 0, 1, 1), {"width": 0}, ValueError, "width is 0"),
    ],
)
def test_draw_boxes_refuses(boxes, options, error, message):
    with pytest.raises(error, match=message):
        pf.nn.draw_boxes(torch.rand(1, 5, 4), boxes, **options)


def test_prototype_sheet_refuses(encoder, images):
    pytest.importorskip("matplotlib")
    found = pf.nn.project(pf.nn.PrototypeLayer(4, 4), encoder, [images], best=3, progress=False)
    sheet = pf.nn.prototype_sheet
    with pytest.raises(TypeError, match="projection is a NoneType"):
        sheet(None, images)
    for wrong in (None, torch.utils.data.DataLoader(images), iter(images)):
        with pytest.raises(TypeError, match=f"images is a {type(wrong).__name__}; give a sequence"):
            sheet(found, wrong)
    last = int(found.image.max())
    with pytest.raises(IndexError, match=r"images has no \d+; give the images that were projected"):
        sheet(found, images[:last])
    for wrong in (1.5, "two", [True, False, True, True], torch.ones(4, dtype=torch.bool), [[0], [1]]):
        with pytest.raises(TypeError, match="prototypes is"):
            sheet(found, images, prototypes=wrong)
    with pytest.raises(ValueError, match="prototypes is empty"):
        sheet(found, images, prototypes=[])
    with pytest.raises(TypeError, match="field is a Tensor"):
        sheet(found, images, field=torch.zeros(3))
    narrow = pf.nn.receptive_field(encoder, (8, 6))  # (6, 4) in place of (6, 5)
    with pytest.raises(ValueError, match=r"field has the grid \(6, 4\)"):
        sheet(found, lambda number: pytest.fail("images are not asked for"), field=narrow)
    with pytest.raises(ValueError, match="field has 1 axes"):
        sheet(found, images, field=pf.nn.receptive_field([(3, 1, 0)], (8,)))
    strided = pf.nn.receptive_field([(4, 2, 1), (1, 1, 1), (1, 1, 0)], (8, 7))  # the grid alone is right
    assert strided.grid == (6, 5)
    sheet(found, images, field=strided)
    with pytest.raises(ValueError, match=r"field is of images of size \(16, 14\); images\[\d+\] has \(8, 7\)"):
        sheet(found, images, field=pf.nn.receptive_field([(6, 2, 0)], (16, 14)))


def test_prototypes_of_a_sheet_and_its_title(encoder, images):
    pytest.importorskip("matplotlib")
    found = pf.nn.project(pf.nn.PrototypeLayer(4, 4), encoder, [images], best=3, progress=False)
    for one in (2, np.int64(2), torch.tensor(2), torch.tensor([2]), (2,), range(2, 3)):
        figure = pf.nn.prototype_sheet(found, images, prototypes=one)
        assert [axes.get_ylabel() for axes in figure.axes] == ["2", "", ""]
    assert figure.get_suptitle() == "image · distance"
