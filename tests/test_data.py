"""pf.data on small files of every format, whole and broken."""

import gzip
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

import protofast as pf
from protofast.data import DataError, Dataset, load, sources

pytest.importorskip("pooch")
PIL = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors.numpy")
RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (7, 5, 4), np.uint8), RNG.integers(0, 256, (3, 5, 4), np.uint8)
TRAIN_LABELS, TEST_LABELS = np.arange(7, dtype=np.uint8) % 3, np.array([2, 0, 1], np.uint8)


def gzipped(content: bytes) -> bytes:
    """Without the time of day, which would change the names of the tests between pytest's workers."""
    return gzip.compress(content, mtime=0)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("PROTOFAST_DATA", raising=False)


@pytest.fixture
def cache():
    import pooch

    return pooch.os_cache("protofast")


def idx_bytes(array, magic=None):
    return (magic or bytes([0, 0, 8, array.ndim])) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, *, zipped=True, parts=("train", "t10k")):
    folder.mkdir(parents=True, exist_ok=True)
    for part, images, labels in (("train", TRAIN, TRAIN_LABELS), ("t10k", TEST, TEST_LABELS)):
        if part in parts:
            for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
                content = idx_bytes(array)
                if zipped:
                    (folder / f"{name}.gz").write_bytes(gzipped(content))
                else:
                    (folder / name).write_bytes(content)
    return folder


def write_pictures(folder, arrays, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        PIL.fromarray(array).save(folder / f"{i}{suffix}")
    return folder


def everything(data, batch_size=2):
    images, labels = zip(*data.batches(batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)


def is_mapped(array):
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


# Dataset


def test_dataset_converts_and_labels():
    data = Dataset(TRAIN, TRAIN_LABELS, names="abc")
    image, label = data[4]
    assert image.dtype == torch.float32
    assert image.shape == data.image_shape == (1, 5, 4)
    assert np.array_equal(image[0].numpy(), TRAIN[4].astype(np.float32) / np.float32(255))
    assert (label, type(label)) == (1, int)
    assert torch.equal(data[-3][0], image)
    assert Dataset(TRAIN)[0][1] == -1
    assert data.images is TRAIN
    assert len(list(data)) == len(data) == 7  # a plain loop ends
    assert "7 images (1, 5, 4), 3 classes" in repr(data)
    for index in (7, -8):
        with pytest.raises(IndexError, match="has 7"):
            data[index]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_in_order(batch_size):
    data = Dataset(TRAIN, TRAIN_LABELS)
    sizes = [len(images) for images, _ in data.batches(batch_size)]
    assert sum(sizes) == 7
    assert set(sizes[:-1]) <= {batch_size}
    images, labels = everything(data, batch_size)
    assert torch.equal(images, torch.stack([data[i][0] for i in range(7)]))
    assert labels.dtype == torch.int64
    assert labels.tolist() == TRAIN_LABELS.tolist()
    assert everything(Dataset(TRAIN), batch_size)[1].tolist() == [-1] * 7


def test_batches_do_not_alias_the_source():
    own = TRAIN.astype(np.float32) / 255
    data = Dataset(own, TRAIN_LABELS)
    images, labels = next(data.batches(3))
    images.zero_(), labels.zero_()
    assert own[:3].max() > 0
    assert data.labels.tolist() == TRAIN_LABELS.tolist()


def test_batch_size_is_checked_at_once():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Dataset(TRAIN).batches(0)


class Counting:
    """An array that tells which rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        self.read += np.arange(len(self))[key].ravel().tolist()
        return self.array[key]


def test_nothing_is_read_before_it_is_asked_for():
    images = Counting(TRAIN)
    data = Dataset(images, TRAIN_LABELS)
    part = data.of_class(0).subset([2, 0])
    assert images.read == []
    batches = data.batches(2)
    next(batches)
    assert images.read == [0, 1]
    next(batches)
    assert images.read == [0, 1, 2, 3]
    images.read.clear()
    part[0]
    assert images.read == [6]


def test_subset_and_of_class():
    data = Dataset(TRAIN, TRAIN_LABELS, names=("a", "b", "c"))
    part = data.subset([5, 1, 1])
    assert part.labels.tolist() == [2, 1, 1]
    assert torch.equal(everything(part)[0], data.take([5, 1, 1]))
    assert np.array_equal(part.images[:], TRAIN[[5, 1, 1]])
    assert np.array_equal(part.images[0], TRAIN[5])
    assert part.images.shape == (3, 5, 4)
    assert torch.equal(part.subset(torch.tensor([1, 0])).take([0, 1]), data.take([1, 5]))
    assert data.subset(data.labels == 1).labels.tolist() == [1, 1]
    assert torch.equal(data.subset(torch.tensor(TRAIN_LABELS == 1)).take([1]), data.take([4]))
    assert data.of_class("c").labels.tolist() == [2, 2]
    assert torch.equal(data.of_class(2).take([0, 1]), data.take([2, 5]))
    assert data.take([]).shape == (0, 1, 5, 4)
    assert data.names == part.names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([7], IndexError),
        ([-1], IndexError),
        ([0.5], TypeError),
        ([[0]], TypeError),
        (np.ones(6, bool), TypeError),
        ([], ValueError),
        (np.zeros(7, bool), ValueError),
    ],
)
def test_subset_refuses(indices, error):
    with pytest.raises(error, match="ind"):
        Dataset(TRAIN).subset(indices)


def test_of_class_refuses():
    with pytest.raises(ValueError, match="has no labels"):
        Dataset(TRAIN).of_class(0)
    with pytest.raises(ValueError, match="label is 9"):
        Dataset(TRAIN, TRAIN_LABELS).of_class(9)
    with pytest.raises(ValueError, match="label is 'a'"):
        Dataset(TRAIN, TRAIN_LABELS).of_class("a")


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((5, 4), np.uint8), "shape"),
        (np.zeros((0, 5, 4), np.uint8), "none of them empty"),
        (np.zeros((2, 0, 4), np.uint8), "none of them empty"),
        (np.zeros((2, 32, 32, 3), np.uint8), "channels last"),
        (np.zeros((2, 5, 4), np.int64), "holds int64"),
        (np.zeros((2, 5, 4), np.complex64), "holds complex64"),
    ],
)
def test_dataset_refuses_images(images, says):
    with pytest.raises(DataError, match=says):
        Dataset(images, source="here.npy")


@pytest.mark.parametrize("labels", [[0, 1], [[0]] * 7, [0.5] * 7, [3] * 7, [-1] * 7])
def test_dataset_refuses_labels(labels):
    with pytest.raises(DataError, match="labels of array"):
        Dataset(TRAIN, labels, names="abc")


@pytest.mark.parametrize("bad", [-0.01, 1.01, np.nan, np.inf])
def test_floating_point_range_is_checked_as_it_is_read(bad):
    images = np.full((4, 2, 2), 0.5)
    images[3, 0, 1] = bad
    data = Dataset(images, source="here.npy")
    assert data.take([0, 1, 2]).shape == (3, 1, 2, 2)
    with pytest.raises(DataError, match=r"here.npy holds values"):
        data[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers, tmp_path):
    np.save(tmp_path / "x.npy", TRAIN)
    data = load(tmp_path / "x.npy", labels=TRAIN_LABELS)
    batches = list(torch.utils.data.DataLoader(data, batch_size=3, num_workers=workers))
    assert torch.equal(torch.cat([images for images, _ in batches]), everything(data)[0])
    assert torch.cat([labels for _, labels in batches]).tolist() == TRAIN_LABELS.tolist()


# Digits


def test_digits():
    pytest.importorskip("sklearn")
    data = load("digits", split="all")
    assert (len(data), data.image_shape) == (1797, (1, 8, 8))
    images, labels = everything(data, 500)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images * 16, (images * 16).round())
    assert labels[:10].tolist() == list(range(10))
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(torch.cat([everything(train, 500)[0], everything(test)[0]]), images)


def test_digits_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"protofast\[data\]"):
        load("digits")


# idx


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_idx_splits(tmp_path, zipped, place):
    write_idx(tmp_path / place, zipped=zipped)
    expected = {"train": (TRAIN, TRAIN_LABELS), "test": (TEST, TEST_LABELS)}
    expected["all"] = tuple(np.concatenate(pair) for pair in zip(*expected.values(), strict=True))
    for split, (images, labels) in expected.items():
        data = load("mnist", split=split, root=tmp_path)
        assert np.array_equal(data.images, images)
        assert data.labels.tolist() == labels.tolist()
        assert is_mapped(data.images)
        assert data.names[3] == "3"
    assert len(load("mnist", root=tmp_path)) == 7
    if not place:
        assert len(load(tmp_path, split="test")) == 3  # the folder by itself


def test_idx_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOFAST_DATA", str(tmp_path))
    write_idx(tmp_path)
    with pytest.raises(FileNotFoundError, match="mnist was looked for"):
        load("mnist")  # the folder does not say of which set its files are
    write_idx(tmp_path / "mnist")
    assert len(load("mnist", split="all")) == 10
    write_idx(tmp_path / "fashion-mnist", parts=["t10k"])
    assert load("fashion-mnist", split="test").names[0] == "T-shirt/top"


def test_idx_is_unpacked_once_and_again_when_it_changes(tmp_path, cache):
    write_idx(tmp_path)
    load(tmp_path)
    (only,) = cache.iterdir()
    before = only.stat().st_mtime_ns
    load(tmp_path)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]
    changed = tmp_path / "train-images-idx3-ubyte.gz"
    changed.write_bytes(gzipped(idx_bytes(255 - TRAIN)))
    os.utime(changed, ns=(1, 1))
    assert np.array_equal(load(tmp_path).images, 255 - TRAIN)


def test_idx_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist was looked for in"):
        load("mnist", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load("mnist")
    write_idx(tmp_path, parts=["t10k"])
    assert len(load("mnist", split="test", root=tmp_path)) == 3
    with pytest.raises(FileNotFoundError, match="lacks train-images-idx3-ubyte, train-labels-idx1-ubyte"):
        load("mnist", root=tmp_path)


def flipped(content):
    """A gzip file with one bit of its data wrong."""
    broken = bytearray(content)
    broken[len(broken) // 2] ^= 0x10
    return bytes(broken)


GOOD, GOOD_LABELS = idx_bytes(TRAIN), idx_bytes(TRAIN_LABELS)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-images-idx3-ubyte.gz", gzipped(GOOD)[:-9], "not a whole gzip"),
        ("train-images-idx3-ubyte.gz", gzipped(GOOD)[:5], "not a whole gzip"),
        ("train-images-idx3-ubyte.gz", flipped(gzipped(GOOD)), "not a whole gzip"),
        ("train-images-idx3-ubyte.gz", GOOD, "not a whole gzip"),
        ("train-images-idx3-ubyte.gz", b"", "begins with nothing"),
        ("train-images-idx3-ubyte.gz", gzipped(GOOD[:-1]), "truncated.* 1 are missing"),
        ("train-images-idx3-ubyte.gz", gzipped(GOOD + b"0"), "longer than"),
        ("train-images-idx3-ubyte.gz", gzipped(idx_bytes(TRAIN, b"\0\0\x0d\3")), "begins with 00 00 0d 03"),
        ("train-images-idx3-ubyte.gz", gzipped(GOOD[:9]), "begins with"),
        ("train-images-idx3-ubyte.gz", gzipped(GOOD_LABELS), "begins with 00 00 08 01"),
        ("train-labels-idx1-ubyte.gz", gzipped(GOOD), "begins with 00 00 08 03"),
        ("train-labels-idx1-ubyte.gz", gzipped(GOOD_LABELS[:-2]), "truncated"),
        ("train-labels-idx1-ubyte.gz", gzipped(GOOD_LABELS)[:-3], "not a whole gzip"),
    ],
)
def test_idx_broken(tmp_path, cache, name, content, says):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        load(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    if "images" in name:
        assert list(cache.glob("*")) == []  # nothing half-written is left
    write_idx(tmp_path)
    assert len(load(tmp_path)) == 7


def test_idx_counts_must_agree(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzipped(idx_bytes(TEST_LABELS)))
    with pytest.raises(DataError, match="give 7 integers"):
        load(tmp_path)


def test_idx_sizes_must_agree(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzipped(idx_bytes(TEST[:, :4])))
    assert len(load(tmp_path)) == 7
    with pytest.raises(DataError, match="different sizes"):
        load(tmp_path, split="all")


def test_damaged_cache_is_named(tmp_path, cache):
    write_idx(tmp_path)
    load(tmp_path)
    (only,) = cache.iterdir()
    only.write_bytes(only.read_bytes()[:-3])
    with pytest.raises(DataError, match=only.name):
        load(tmp_path)


# Fashion-MNIST


def test_fashion_mnist_of_the_debian_package():
    if not sources.DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = load("fashion-mnist", split="all")
    assert (len(data), data.image_shape) == (70_000, (1, 28, 28))
    assert is_mapped(data.images)
    assert np.bincount(data.labels).tolist() == [7000] * 10
    assert data.names[data[0][1]] == "Ankle boot"
    assert len(load("fashion-mnist")) == 60_000
    assert torch.equal(load("fashion-mnist", split="test")[0][0], data[60_000][0])


def test_fashion_mnist_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN", write_idx(tmp_path / "debian"))
    assert len(load("fashion-mnist")) == 7
    write_idx(tmp_path / "env" / "fashion-mnist", parts=["train"])
    monkeypatch.setenv("PROTOFAST_DATA", str(tmp_path / "env"))
    with pytest.raises(FileNotFoundError, match="env"):
        load("fashion-mnist", split="all")  # what was found first is taken, not mixed with the next
    with pytest.raises(FileNotFoundError, match=r"looked for in .*nowhere"):
        load("fashion-mnist", root=tmp_path / "nowhere")  # a root= that is wrong is no reason to download


def test_fashion_mnist_download_fails_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(sources, "URL", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded .* dataset-fashion-mnist.* root="):
        load("fashion-mnist")


def test_fashion_mnist_download_is_checked(tmp_path, monkeypatch, cache):
    from functools import partial
    from hashlib import md5
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = write_idx(tmp_path / "served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(sources, "DEBIAN", tmp_path / "absent")
        monkeypatch.setattr(sources, "URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(DataError, match="is not the file that it should be"):
            load("fashion-mnist")
        assert not list(cache.glob("**/train-images*"))
        right = {stem: md5((folder / f"{stem}.gz").read_bytes()).hexdigest() for stem in sources.MD5}
        monkeypatch.setattr(sources, "MD5", right)
        assert np.array_equal(load("fashion-mnist", split="all").images, np.concatenate([TRAIN, TEST]))
    finally:
        server.shutdown()
        server.server_close()
    assert len(load("fashion-mnist", split="all")) == 10  # from the cache


# Folders


def test_folder_of_classes(tmp_path):
    write_pictures(tmp_path / "cat", TRAIN[:2])
    write_pictures(tmp_path / "ant" / "deeper", TRAIN[2:5])
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    data = load(tmp_path)
    assert data.names == ("ant", "cat")
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.image_shape == (1, 5, 4)
    assert np.array_equal(data.images[:], TRAIN[[2, 3, 4, 0, 1]])
    assert np.array_equal(data.images[1], TRAIN[3])
    assert torch.equal(data.of_class("cat")[1][0], Dataset(TRAIN)[1][0])
    again = pickle.loads(pickle.dumps(data))  # as workers of a DataLoader get it
    assert torch.equal(everything(again)[0], everything(data)[0])


def test_flat_folder_in_colour(tmp_path):
    colour = RNG.integers(0, 256, (5, 4, 3), np.uint8)
    write_pictures(tmp_path, [TRAIN[0], colour])
    data = load(tmp_path, split="all")
    assert data.labels is None
    assert data.names is None
    assert data.image_shape == (3, 5, 4)
    assert np.array_equal(data.images[0], np.stack([TRAIN[0]] * 3))
    assert np.array_equal(data.images[1], colour.transpose(2, 0, 1))


def test_folder_decodes_only_what_is_asked(tmp_path):
    write_pictures(tmp_path, TRAIN)
    data = load(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:-30])
    batches = data.batches(3)
    assert len(next(batches)[0]) == 3
    with pytest.raises(DataError, match=r"3\.png cannot be decoded"):
        next(batches)


def test_folder_of_mixed_sizes(tmp_path):
    write_pictures(tmp_path, [TRAIN[0], TRAIN[1], TRAIN[2][:4]])
    with pytest.raises(DataError, match=r"2\.png is 4 × 4 pixels, .*0\.png is 5 × 4.*image_size="):
        load(tmp_path)
    assert load(tmp_path, image_size=4).image_shape == (1, 4, 4)
    data = load(tmp_path, image_size=(5, 4))
    assert np.array_equal(data.images[1], TRAIN[1])  # already that size
    assert data.images[2].shape == (5, 4)


def test_resizing_keeps_the_aspect(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    write_pictures(tmp_path, [wide])
    assert (load(tmp_path, image_size=4).images[0] > 200).all()  # the middle, not all of it squeezed


@pytest.mark.parametrize("image_size", [0, (4, -1)])
def test_image_size_is_checked(tmp_path, image_size):
    write_pictures(tmp_path, TRAIN)
    with pytest.raises(ValueError, match="image_size is"):
        load(tmp_path, image_size=image_size)


def test_folder_broken(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        load(tmp_path)
    write_pictures(tmp_path / "a", TRAIN[:1])
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b is a class without a picture"):
        load(tmp_path)
    write_pictures(tmp_path, TRAIN[:1])
    with pytest.raises(DataError, match="both pictures"):
        load(tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png is no picture"):
        load(tmp_path / "a")


def test_sixteen_bits_are_not_clipped_in_silence(tmp_path):
    PIL.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has pixels of mode I;16"):
        load(tmp_path)


def test_folder_needs_its_extra(tmp_path, monkeypatch):
    write_pictures(tmp_path, TRAIN)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"protofast\[data\]"):
        load(tmp_path)


# .npy


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, dtype, channels, order):
    shape = (6, 5, 4) if channels is None else (6, channels, 5, 4)
    array = (RNG.integers(0, 2, shape) if np.dtype(dtype) != np.uint8 else RNG.integers(0, 256, shape)).astype(dtype)
    np.save(tmp_path / "x.npy", np.asarray(array, order=order))
    data = load(tmp_path / "x.npy")
    assert is_mapped(data.images)
    assert data.image_shape == (channels or 1, 5, 4)
    expected = array.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    assert np.array_equal(everything(data)[0].numpy(), expected.astype(np.float32).reshape(6, *data.image_shape))


def test_npy_reads_only_the_batch(tmp_path):
    """A sparse file that no memory holds: reading it whole would be refused."""
    path = tmp_path / "huge.npy"
    shape = (1 << 30, 1, 32, 32)  # 1 TiB, of which the disk holds one block
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(b"\xff" * 1024)
        file.truncate(file.tell() - 1024 + int(np.prod(shape, dtype=np.int64)))
    data = load(path)
    images, _ = next(data.batches(2))
    assert images[0].min() == 1
    assert images[1].max() == 0
    assert data[len(data) - 1][0].max() == 0
    part = data.subset(range(0, 4000, 1000))
    assert part.take(slice(0, 2)).shape == (2, 1, 32, 32)
    sent = pickle.dumps(part)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)[0][0], images[0])
    assert np.array_equal(pickle.loads(pickle.dumps(data.images[1:3])), data.images[1:3])


def test_npy_labels(tmp_path):
    np.save(tmp_path / "x.npy", TRAIN)
    np.save(tmp_path / "y.npy", TRAIN_LABELS)
    for labels in (TRAIN_LABELS, TRAIN_LABELS.tolist(), tmp_path / "y.npy", str(tmp_path / "y.npy")):
        assert load(tmp_path / "x.npy", labels=labels).labels.tolist() == TRAIN_LABELS.tolist()
    with pytest.raises(DataError, match=r"labels of .*x\.npy"):
        load(tmp_path / "x.npy", labels=[1])
    with pytest.raises(FileNotFoundError, match=r"absent\.npy"):
        load(tmp_path / "x.npy", labels=tmp_path / "absent.npy")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_npy_truncated(tmp_path, keep):
    np.save(tmp_path / "x.npy", TRAIN)
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"x\.npy is not a whole"):
        load(tmp_path / "x.npy")


def test_npy_of_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object(), 1]), allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npy"):
        load(tmp_path / "x.npy")


def test_npy_by_name_only(tmp_path):
    np.savez(tmp_path / "x.npz", TRAIN)
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    (tmp_path / "y.npy").write_bytes(bytes(range(256)))
    for name in ("x.npy", "y.npy"):
        with pytest.raises(DataError, match=rf"{name} is not a whole .npy file") as caught:
            load(tmp_path / name)
        assert "pickle" not in str(caught.value)  # the cure is not to trust the file


# .safetensors


def test_safetensors(tmp_path):
    safetensors.save_file({"images": TRAIN, "labels": TRAIN_LABELS.astype(np.int64)}, tmp_path / "x.safetensors")
    data = load(tmp_path / "x.safetensors")
    assert torch.equal(everything(data)[0], everything(Dataset(TRAIN))[0])
    assert data.labels.tolist() == TRAIN_LABELS.tolist()
    for key in (3, -1, slice(1, 4), slice(None, None, 2), slice(5, 2), [4, 0, 4], np.array([True] * 3 + [False] * 4)):
        assert np.array_equal(data.images[key], TRAIN[key])
    assert torch.equal(data.of_class(1).take([1, 0]), Dataset(TRAIN).take([4, 1]))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[2][0], data[2][0])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_safetensors_of_one_key(tmp_path, dtype):
    from safetensors.torch import save_file

    tensor = torch.from_numpy(RNG.integers(0, 2, (3, 3, 2, 2))).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    data = load(tmp_path / "x.safetensors")
    assert data.labels is None
    expected = tensor.float() / (255 if dtype == torch.uint8 else 1)
    assert torch.equal(everything(data)[0], expected)
    assert torch.equal(data.take([2, 0]), expected[[2, 0]])


def test_safetensors_reads_only_the_batch(tmp_path, monkeypatch):
    from protofast.data import array

    safetensors.save_file({"images": TRAIN}, tmp_path / "x.safetensors")
    data = load(tmp_path / "x.safetensors")
    asked, real = [], array.SafetensorsRows._numpy
    monkeypatch.setattr(array.SafetensorsRows, "_numpy", lambda self, t: asked.append(tuple(t.shape)) or real(self, t))
    next(data.batches(2))
    data.take([5, 1])
    assert asked == [(2, 5, 4), (1, 5, 4), (1, 5, 4)]


def test_safetensors_broken(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save_file({"a": TRAIN, "b": TRAIN}, path)
    with pytest.raises(DataError, match=r"x\.safetensors has the keys \['a', 'b'\]"):
        load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"x\.safetensors is not a whole"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.safetensors is not a whole"):
        load(path)
    safetensors.save_file({"images": TRAIN.astype(np.int32)}, path)
    with pytest.raises(DataError, match="holds I32"):
        load(path)
    safetensors.save_file({"images": TRAIN, "labels": np.zeros(3, np.int64)}, path)
    with pytest.raises(DataError, match=r"labels of .*x\.safetensors"):
        load(path)


# load


def test_load_refuses(tmp_path):
    np.save(tmp_path / "x.npy", TRAIN)
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"fashion.*does not exist; .*'fashion-mnist'"):
        load("fashion")
    with pytest.raises(ValueError, match="split is 'val'"):
        load("digits", split="val")
    with pytest.raises(ValueError, match=r"split is 'test'.*does not come in parts"):
        load(tmp_path / "x.npy", split="test")
    with pytest.raises(DataError, match=r"x\.jpg is no \.npy"):
        load(tmp_path / "x.jpg")
    for arguments in ({"root": tmp_path}, {"image_size": 8}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is .*does not take"):
            load(tmp_path / "x.npy", **arguments)
    with pytest.raises(ValueError, match=r"labels is .*does not take"):
        load("digits", labels=[1])


def test_importing_protofast_brings_none_of_this():
    import subprocess

    heavy = ["sklearn", "PIL", "pooch", "safetensors", "rich", "protofast.data", "protofast.diffusion"]
    code = f"import sys, protofast; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = f"import sys, protofast as pf; pf.data, pf.diffusion; print([n for n in {heavy[:5]} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert pf.data.load is load
