"""The named sets of Patronus' paper, from tiny copies of what is published, whole and broken; and attributes."""

import csv
import io
import json
import os
import pickle
import tarfile
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch

from protofast.data import DataError, Dataset, folder, load

pytest.importorskip("pooch")
PIL = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("PROTOFAST_DATA", raising=False)


@pytest.fixture
def cache():
    import pooch

    return pooch.os_cache("protofast")


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)


def shade(value, size=(6, 4)):
    """A picture that says which it is."""
    return np.full((*size, 3), value, np.uint8)


def shades(data):
    return data.images[:].reshape(len(data), -1).mean(1).round().astype(int).tolist()


# Attributes of a Dataset

IMAGES = RNG.integers(0, 256, (5, 3, 2), np.uint8)
SHOWN = np.array([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0]], bool)


def test_attributes_go_with_the_images():
    data = Dataset(IMAGES, [0, 1, 0, 1, 1], attributes=SHOWN, attribute_names=["Smiling", "Male"])
    assert data.attribute_names == ("Smiling", "Male")
    assert data.attribute("Male").tolist() == [False, False, True, True, False]
    assert "2 attributes" in repr(data)
    part = data.subset([3, 0])
    assert part.attributes.tolist() == [[False, True], [True, False]]
    assert part.attribute("Smiling").tolist() == [False, True]
    assert data.of_class(1).subset([2, 0]).attributes.tolist() == SHOWN[[4, 1]].tolist()
    assert data.subset(data.attribute("Male")).attribute("Male").all()
    again = pickle.loads(pickle.dumps(part))
    assert again.attributes.tolist() == part.attributes.tolist()


def test_no_attributes():
    data = Dataset(IMAGES, [0, 1, 0, 1, 1])
    assert (data.attributes, data.attribute_names) == (None, ())
    assert data.subset([0]).attributes is None
    assert "attributes" not in repr(data)
    with pytest.raises(ValueError, match=r"array has no attributes, so none is called 'Male'; .*class_attributes"):
        data.attribute("Male")


@pytest.mark.parametrize(
    ("attributes", "names", "says"),
    [
        (SHOWN, None, "there are 0"),
        (None, ("a", "b"), "attributes of here are object"),
        (SHOWN, ("a",), r"bool of shape \(5, 2\).*there are 1"),
        (SHOWN[:4], ("a", "b"), r"\(5, K\)"),
        (SHOWN[:, 0], ("a", "b"), r"\(5, K\)"),
        (SHOWN.astype(int), ("a", "b"), "are int64"),
        (SHOWN, ("a", "a"), "'a' twice"),
    ],
)
def test_attributes_are_checked(attributes, names, says):
    with pytest.raises(DataError, match=says):
        Dataset(IMAGES, attributes=attributes, attribute_names=names, source="here")


def test_unknown_attribute():
    with pytest.raises(ValueError, match="name is 'Hat'; the attributes of array are a, b"):
        Dataset(IMAGES, attributes=SHOWN, attribute_names="ab").attribute("Hat")


def test_class_attributes():
    named, names = Dataset(IMAGES, [2, 0, 2, 0, 0], names=("cat", "dog", "owl")).class_attributes()
    assert names == ("cat", "dog", "owl")
    assert named.dtype == bool
    assert named.T.astype(int).tolist() == [[0, 1, 0, 1, 1], [0] * 5, [1, 0, 1, 0, 0]]
    counted, numbers = Dataset(IMAGES, [7, 3, 7, 3, -1]).class_attributes()
    assert numbers == ("-1", "3", "7")
    assert counted.astype(int).tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="has no labels"):
        Dataset(IMAGES).class_attributes()


def test_digest():
    digest = Dataset(IMAGES).digest()
    assert digest == Dataset(IMAGES.copy(), [1] * 5).digest() == Dataset(IMAGES[::-1][::-1]).digest()
    others = [IMAGES[::-1], IMAGES[:4], IMAGES.reshape(5, 2, 3), IMAGES.view(bool)]
    found = {digest, *(Dataset(other).digest() for other in others), Dataset(IMAGES).subset(range(5)).digest()}
    found |= {Dataset(IMAGES).subset([0, 1]).digest(), Dataset(IMAGES).subset([1, 0]).digest()}
    assert len(found) == 8


# CIFAR-10

BATCHES = {
    name: (RNG.integers(0, 256, (2, 3072), np.uint8), RNG.integers(0, 10, 2).tolist())
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
}
ALL = np.concatenate([pixels for pixels, _ in BATCHES.values()]).reshape(-1, 3, 32, 32)
ALL_LABELS = [label for _, labels in BATCHES.values() for label in labels]


def text(value):
    """A string as Python 2 pickles it."""
    return b"U" + bytes([len(value)]) + value


def python2(pixels, labels):
    """A batch, opcode by opcode, as Python 2 and the NumPy of its day wrote it: the form that is published."""
    n = len(pixels)
    return b"".join([
        b"\x80\x02}(", text(b"batch_label"), text(b"training batch 1 of 5"),
        text(b"labels"), b"](", *(b"K" + bytes([label]) for label in labels), b"e",
        text(b"data"), b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85", text(b"b"), b"\x87R(K\x01",
        b"K" + bytes([n]), b"M\x00\x0c\x86", b"cnumpy\ndtype\n", text(b"u1"), b"K\x00K\x01\x87R(K\x03", text(b"|"),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89", b"T", (3072 * n).to_bytes(4, "little"), pixels.tobytes(),
        b"tb", text(b"filenames"), b"](", *(text(b"a.png") for _ in labels), b"eu.",
    ])  # fmt: skip


def plain(pixels, labels):
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()


def write_cifar(root, kind, change=None):
    """`change` takes the place of the second batch: its bytes, or None for none."""
    ending, write = ("", python2) if "py" in kind else (".bin", plain)
    files = {f"{name}{ending}": write(*batch) for name, batch in BATCHES.items()}
    if change is not None:
        files[f"data_batch_2{ending}"] = change
    files = {name: content for name, content in files.items() if content != b"absent"}
    root.mkdir(parents=True, exist_ok=True)
    inside = "cifar-10-batches-py" if "py" in kind else "cifar-10-batches-bin"
    if kind.endswith("tar"):
        archive = root / f"cifar-10-{'python' if 'py' in kind else 'binary'}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in reversed(files.items()):  # in no order to rely on
                about = tarfile.TarInfo(f"{inside}/{name}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
        return archive
    (root / inside).mkdir(exist_ok=True)
    for name, content in files.items():
        (root / inside / name).write_bytes(content)
    return root / inside / f"data_batch_2{ending}"


def test_python2_writes_what_is_published():
    found = pickle.loads(python2(*BATCHES["data_batch_1"]), encoding="bytes")
    assert np.array_equal(found[b"data"], BATCHES["data_batch_1"][0])
    assert found[b"labels"] == BATCHES["data_batch_1"][1]


@pytest.mark.parametrize("kind", ["py", "bin", "py tar", "bin tar"])
@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar10(tmp_path, kind, place):
    write_cifar(tmp_path / place, kind)
    for split, rows in {"train": slice(10), "test": slice(10, None), "all": slice(None)}.items():
        data = load("cifar10", split=split, root=tmp_path)
        assert data.image_shape == (3, 32, 32)
        assert np.array_equal(data.images, ALL[rows])
        assert data.labels.tolist() == ALL_LABELS[rows]
        assert is_mapped(data.images)
        assert data.names[8] == "ship"
        assert data.attributes is None
    assert len(load("cifar10", root=tmp_path)) == 10


def test_cifar10_of_todays_pickle_and_from_inside(tmp_path, monkeypatch):
    pixels, labels = BATCHES["data_batch_2"]
    write_cifar(tmp_path, "py", pickle.dumps({b"data": pixels, b"labels": labels}, protocol=4))
    monkeypatch.setenv("PROTOFAST_DATA", str(tmp_path))
    assert np.array_equal(load("cifar10", split="all").images, ALL)
    monkeypatch.delenv("PROTOFAST_DATA")
    assert len(load("cifar10", root=tmp_path / "cifar-10-batches-py")) == 10


def test_cifar10_is_unpacked_once_and_again_when_it_changes(tmp_path, cache):
    changed = write_cifar(tmp_path, "py")
    load("cifar10", root=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2
    load("cifar10", root=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    changed.write_bytes(python2(255 - BATCHES["data_batch_2"][0], [1, 2]))
    os.utime(changed, ns=(1, 1))
    data = load("cifar10", root=tmp_path)
    assert np.array_equal(data.images[2:4], 255 - ALL[2:4])
    assert data.labels[2:4].tolist() == [1, 2]


class Evil:
    def __init__(self, call, *arguments):
        self.pair = call, arguments

    def __reduce__(self):
        return self.pair


@pytest.mark.parametrize("kind", ["py", "py tar"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar10_of_a_malicious_pickle(tmp_path, cache, kind, protocol):
    made = tmp_path / "made"
    inside = python2(*BATCHES["data_batch_2"])[:-2] + text(b"x") + b"cos\nmkdir\n(" + text(os.fsencode(made)) + b"tRu."
    for content, name in (
        (pickle.dumps(Evil(os.mkdir, str(made)), protocol), rf"{os.mkdir.__module__}\.mkdir"),
        (pickle.dumps(Evil(eval, f"open({str(made)!r}, 'w')"), protocol), r"(builtins|__builtin__)\.eval"),
        (pickle.dumps(Evil(np.memmap, str(made), "u1", "w+", 0, 9), protocol), r"numpy.*\.memmap"),
        (pickle.dumps({b"x": [Evil(os.mkdir, str(made))]}, max(protocol, 3)), rf"{os.mkdir.__module__}\.mkdir"),
        (inside, r"os\.mkdir"),
    ):
        path = write_cifar(tmp_path, kind, content)
        with pytest.raises(DataError, match=rf"asks to run {name}, .*; nothing was run") as caught:
            load("cifar10", root=tmp_path)
        assert str(path) in str(caught.value)
        assert not made.exists()
        assert not list(cache.glob("*"))
    pickle.loads(inside, encoding="bytes")
    assert made.exists()  # it would have been


GOOD = python2(*BATCHES["data_batch_2"])


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("py", GOOD[:-20], "no whole batch"),
        ("py", b"", "no whole batch"),
        ("py", b"<html>404</html>", "no whole batch"),
        ("py", pickle.dumps([1, 2]), "no whole batch"),
        ("py", pickle.dumps({b"labels": [1]}), "no whole batch"),
        ("py", b"\x80\x02Pevil\n.", "no whole batch|asks to run"),
        ("py", python2(BATCHES["test_batch"][0], [1]), "no whole batch.*labels"),
        ("py", python2(BATCHES["test_batch"][0], [1, 10]), "labels from 1 to 10"),
        ("py", GOOD.replace(b"M\x00\x0c", b"M\x00\x0b"), "no whole batch"),
        ("py", GOOD.replace(b"u1", b"O8"), "data of b'O8'"),
        ("bin", plain(*BATCHES["test_batch"])[:-1], "6145 bytes, no multiple of 3073"),
        ("bin", b"", "0 bytes"),
        ("py tar", GOOD[:-20], "no whole batch"),
        ("py tar", b"absent", r"tar\.gz lacks data_batch_2; get"),
        ("bin tar", b"absent", r"tar\.gz lacks data_batch_2\.bin; get"),
    ],
)
def test_cifar10_broken(tmp_path, cache, kind, content, says):
    path = write_cifar(tmp_path, kind, content)
    with pytest.raises(DataError, match=says) as caught:
        load("cifar10", root=tmp_path)
    assert str(path) in str(caught.value)
    assert not list(cache.glob("*"))  # nothing half-written is left
    assert len(load("cifar10", split="test", root=tmp_path)) == 2


@pytest.mark.parametrize("change", [lambda c: c[:-30], lambda c: c[: len(c) // 2], lambda c: b"<html>", lambda c: b""])
def test_cifar10_of_a_broken_archive(tmp_path, change):
    path = write_cifar(tmp_path, "bin tar")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is not a whole \.tar\.gz"):
        load("cifar10", root=tmp_path)


def test_cifar10_of_an_archive_with_one_wrong_bit(tmp_path):
    path = write_cifar(tmp_path, "bin tar")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a whole \.tar\.gz"):
        load("cifar10", root=tmp_path)


def test_cifar10_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*cifar-10-python\.tar\.gz.*cs\.toronto\.edu.*root="):
        load("cifar10")
    with pytest.raises(
        FileNotFoundError, match=rf"looked for in {tmp_path}/cifar10, {tmp_path}\. It is not downloaded"
    ):
        load("cifar10", root=tmp_path)
    write_cifar(tmp_path, "py", b"absent")
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py lacks data_batch_2;"):
        load("cifar10", root=tmp_path)
    for wrong in ({"image_size": 64}, {"labels": [1]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*cifar10 does not take"):
            load("cifar10", root=tmp_path, **wrong)
    with pytest.raises(ValueError, match="split is 'valid'; choose one of 'train', 'test', 'all'"):
        load("cifar10", split="valid")


# CelebA

FACES = [f"{i:06d}.jpg" for i in range(1, 11)]
PART = dict(zip(FACES, [0, 0, 1, 0, 2, 0, 2, 1, 0, 0], strict=True))
TITLES = ("5_o_Clock_Shadow", "Male", "Smiling")
FLAGS = RNG.integers(0, 2, (10, 3)).astype(bool)


def write_celeba(root, kind="folder"):
    root.mkdir(parents=True, exist_ok=True)
    inside = root / "img_align_celeba" / ("img_align_celeba" if kind == "kaggle" else "")
    for i, name in enumerate(FACES):
        save(inside / name, shade(20 * i), quality=95)
    if kind == "kaggle":
        tables = {"attr": [["image_id", *TITLES]], "eval": [["image_id", "partition"]]}
        tables["attr"] += [[name, *(1 if v else -1 for v in row)] for name, row in zip(FACES, FLAGS, strict=True)]
        tables["eval"] += [[name, part] for name, part in PART.items()]
        for name, rows in zip(("list_attr_celeba.csv", "list_eval_partition.csv"), tables.values(), strict=True):
            with open(root / name, "w", newline="") as file:
                csv.writer(file).writerows(rows)
        return root
    lines = [f"{name} {' '.join(f'{1 if v else -1:2d}' for v in row)}" for name, row in zip(FACES, FLAGS, strict=True)]
    (root / "list_attr_celeba.txt").write_text("\n".join(["10", " ".join(TITLES) + " ", *lines]) + "\n")
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in PART.items()))
    if kind == "zip":
        with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
            for path in sorted((root / "img_align_celeba").iterdir()):
                archive.write(path, f"img_align_celeba/{path.name}")
                path.unlink()
        (root / "img_align_celeba").rmdir()
    return root


@pytest.mark.parametrize("kind", ["folder", "zip", "kaggle"])
@pytest.mark.parametrize("place", ["", "celeba"])
def test_celeba(tmp_path, kind, place):
    write_celeba(tmp_path / place, kind)
    seen = {}
    for split, number in {"train": 0, "valid": 1, "test": 2}.items():
        data = load("celeba", split=split, root=tmp_path)
        rows = [i for i, part in enumerate(PART.values()) if part == number]
        assert shades(data) == [20 * i for i in rows]
        assert data.attributes.tolist() == FLAGS[rows].tolist()
        assert data.attribute_names == TITLES
        assert data.image_shape == (3, 6, 4)
        assert (data.labels, data.names) == (None, None)
        seen |= dict.fromkeys(shades(data), split)
    whole = load("celeba", split="all", root=tmp_path)
    assert shades(whole) == sorted(seen) == [20 * i for i in range(10)]
    assert np.array_equal(whole.attribute("Smiling"), FLAGS[:, 2])
    assert len(load("celeba", root=tmp_path)) == 6


def test_celeba_decodes_as_pillow(tmp_path):
    write_celeba(tmp_path)
    noise = RNG.integers(0, 256, (6, 4, 3), np.uint8)
    save(tmp_path / "img_align_celeba" / FACES[0], noise, quality=90)
    with PIL.open(tmp_path / "img_align_celeba" / FACES[0]) as image:
        expected = np.asarray(image).transpose(2, 0, 1)
        squeezed = np.asarray(image.resize((8, 8), PIL.Resampling.BICUBIC)).transpose(2, 0, 1)
    data = load("celeba", root=tmp_path)
    assert np.array_equal(data.images[0], expected)
    assert torch.equal(data[0][0], torch.from_numpy(expected / np.float32(255)))
    small = load("celeba", root=tmp_path, image_size=8)
    assert small.image_shape == (3, 8, 8)
    assert np.array_equal(small.images[0], squeezed)  # all of it, not the centre
    assert small.digest() != data.digest()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_celeba_in_other_processes(tmp_path, kind):
    data = load("celeba", root=write_celeba(tmp_path, kind), split="all")
    data[0]  # opens the archive before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in loader]), data.take(slice(None)))
    again = pickle.loads(pickle.dumps(data.subset([4, 1])))
    assert shades(again) == [80, 20]


def test_each_process_opens_the_archive_for_itself(tmp_path, monkeypatch):
    members = load("celeba", root=write_celeba(tmp_path, "zip")).images.paths
    first = members.archive
    assert members.archive is first
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork, which shares the place in the file
    assert members.archive is not first


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_threads_read_the_same(tmp_path, kind, monkeypatch):
    data = load("celeba", root=write_celeba(tmp_path, kind), split="all", image_size=(5, 7))
    expected = data.images[:]
    used = []
    real = folder.ThreadPoolExecutor
    monkeypatch.setattr(folder, "ThreadPoolExecutor", lambda threads: used.append(threads) or real(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(folder, "_A_THREAD", 2)
    assert np.array_equal(data.images[:], expected)
    assert np.array_equal(data.images[[7, 0, 3, 3, 9]], expected[[7, 0, 3, 3, 9]])
    assert np.array_equal(data.images[4], expected[4])
    assert used == [3, 2]
    if kind == "folder":
        (tmp_path / "img_align_celeba" / FACES[8]).write_bytes(b"")
        with pytest.raises(DataError, match=r"000009\.jpg cannot be decoded"):
            data.images[:]


def test_celeba_digest(tmp_path):
    for kind in ("folder", "zip"):
        root = write_celeba(tmp_path / kind, kind)
        first = load("celeba", root=root).digest()
        assert load("celeba", root=root).digest() == first
        assert load("celeba", root=root, split="all").digest() != first
        path = root / "img_align_celeba.zip" if kind == "zip" else root / "img_align_celeba" / FACES[0]
        os.utime(path, ns=(1, 1))
        assert load("celeba", root=root).digest() != first


def test_celeba_of_another_size_is_named(tmp_path):
    root = write_celeba(tmp_path)
    save(root / "img_align_celeba" / FACES[3], shade(1, (9, 9)))
    data = load("celeba", root=root)
    assert data.images[:2].shape == (2, 3, 6, 4)
    with pytest.raises(DataError, match=r"000004\.jpg is 9 × 9 pixels, not 6 × 4.*image_size="):
        data.images[:]
    assert load("celeba", root=root, image_size=4).images[:].shape == (6, 3, 4, 4)


def test_celeba_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"celeba was looked for in .*list_attr_celeba\.txt.*mmlab\.ie\.cuhk"):
        load("celeba", root=tmp_path)
    root = write_celeba(tmp_path)
    (root / "img_align_celeba" / FACES[1]).unlink()
    (root / "img_align_celeba" / FACES[5]).unlink()
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba lacks 000002\.jpg and 1 more; get it again"):
        load("celeba", root=root)
    assert len(load("celeba", root=root, split="test")) == 2
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks list_eval_partition\.txt; get img_align_celeba\.zip"):
        load("celeba", root=root)
    write_celeba(tmp_path)
    for path in (root / "img_align_celeba").iterdir():
        path.unlink()
    (root / "img_align_celeba").rmdir()
    with pytest.raises(FileNotFoundError, match="lacks img_align_celeba; get"):
        load("celeba", root=root)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("list_attr_celeba.txt", lambda t: t[: t.rindex("\n", 0, -1) + 1], "9 pictures of 10; get it again"),
        ("list_attr_celeba.txt", lambda t: t[:-3], "line 12, has 2 values for 3 attributes"),
        ("list_attr_celeba.txt", lambda t: t.replace("-1", "-2", 1), "line 3: '-2' is neither 1 nor -1"),
        ("list_attr_celeba.txt", lambda t: "", "not whole: it has 0 pictures of some"),
        ("list_eval_partition.txt", lambda t: t.replace("jpg 2", "jpg 3"), r"line 5, is '000005\.jpg 3'; it should be"),
        ("list_eval_partition.txt", lambda t: t.replace("000004.jpg 0\n", ""), r"000004\.jpg is in only one of"),
        ("list_eval_partition.txt", lambda t: t.replace("jpg 0", "jpg 1"), "has no picture of 'train'"),
        ("list_eval_partition.txt", lambda t: "<html>not here</html>", "line 1"),
    ],
)
def test_celeba_broken(tmp_path, file, change, says):
    path = write_celeba(tmp_path) / file
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=says) as caught:
        load("celeba", root=tmp_path)
    assert file in str(caught.value)


def test_celeba_of_a_broken_archive(tmp_path):
    path = write_celeba(tmp_path, "zip") / "img_align_celeba.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"img_align_celeba\.zip is not a whole zip"):
        load("celeba", root=tmp_path)
    content = bytearray(whole)
    content[whole.index(b"\xff\xd8", 2000) + 300] ^= 0xFF
    path.write_bytes(content)
    data = load("celeba", root=tmp_path, split="all")
    with pytest.raises(DataError, match=r"img_align_celeba\.zip/img_align_celeba/0.*\.jpg cannot be decoded .*CRC"):
        data.images[:]


# FFHQ


def write_ffhq(root, inside="thumbnails128x128", thousands=True, numbers=(0, 1, 1005, 59_999, 60_000, 69_999)):
    for i, number in enumerate(numbers):
        name = f"{number:05d}.png"
        save(root / inside / (f"{number // 1000 * 1000:05d}/{name}" if thousands else name), shade(20 * i))
    return root


HEADER = (
    "image_number,age_group,age_group_confidence,gender,gender_confidence,head_pitch,head_roll,head_yaw,"
    "left_eye_occluded,right_eye_occluded,glasses"
)


def write_aging(root, rows):
    lines = [f"{n},{age},0.9,{gender},0.99,1.5,-2,3,0.1,2.2,{glasses}" for n, age, gender, glasses in rows]
    (root / "ffhq_aging_labels.csv").write_text("\n".join([HEADER, *lines]) + "\n")


@pytest.mark.parametrize("inside", ["thumbnails128x128", "images256x256", ""])
@pytest.mark.parametrize("thousands", [True, False])
@pytest.mark.parametrize("place", ["", "ffhq"])
def test_ffhq(tmp_path, inside, thousands, place):
    write_ffhq(tmp_path / place, inside, thousands)
    (tmp_path / place / inside / "LICENSE.txt").write_text("")
    train, test, whole = (load("ffhq", split=split, root=tmp_path) for split in ("train", "test", "all"))
    assert shades(train) == [0, 20, 40, 60]
    assert shades(test) == [80, 100]
    assert shades(whole) == [0, 20, 40, 60, 80, 100]
    assert whole.image_shape == (3, 6, 4)
    assert (whole.attributes, whole.labels) == (None, None)


def test_ffhq_takes_the_thumbnails_first(tmp_path):
    write_ffhq(tmp_path, "images256x256", numbers=[0])
    write_ffhq(tmp_path, numbers=[0, 1])
    assert len(load("ffhq", root=tmp_path)) == 2
    assert load("ffhq", root=tmp_path, image_size=(3, 5)).image_shape == (3, 3, 5)


def ffhq_attributes(*true):
    names = ["Male", "Glasses", "Dark glasses"] + [
        f"Age {g}" for g in ("0-2", "3-6", "7-9", "10-14", "15-19", "20-29", "30-39", "40-49", "50-69", "70-120")
    ]
    assert set(true) <= set(names)
    return [name in true for name in names]


def test_ffhq_attributes_of_ffhq_aging(tmp_path):
    write_ffhq(tmp_path)
    write_aging(
        tmp_path,
        [
            (69_999, "0-2", "male", "None"),
            (0, "20-29", "female", "Normal"),
            (1, "70-120", "male", "Dark"),
            (1005, "", "", ""),
            (59_999, "3-6", "female", "None"),
            (60_000, "50-69", "male", "Normal"),
            (17, "50-69", "male", "Normal"),
        ],
    )
    data = load("ffhq", root=tmp_path, split="all")
    assert data.attributes.tolist() == [
        ffhq_attributes("Glasses", "Age 20-29"),
        ffhq_attributes("Male", "Glasses", "Dark glasses", "Age 70-120"),
        ffhq_attributes(),
        ffhq_attributes("Age 3-6"),
        ffhq_attributes("Male", "Glasses", "Age 50-69"),
        ffhq_attributes("Male", "Age 0-2"),
    ]
    assert load("ffhq", root=tmp_path, split="test").attribute("Glasses").tolist() == [True, False]


def face(gender, age, glasses):
    return {"faceAttributes": {"gender": gender, "age": age, "glasses": glasses, "smile": 0.1}}


@pytest.mark.parametrize("place", ["json", "ffhq-features-dataset/json"])
def test_ffhq_attributes_of_the_features_dataset(tmp_path, place):
    write_ffhq(tmp_path)
    faces = {
        0: [face("female", 19.0, "NoGlasses")],
        1: [face("male", 2.0, "Sunglasses"), face("female", 40.0, "NoGlasses")],
        1005: [],
        59_999: [face("male", 70.0, "ReadingGlasses")],
        60_000: [face("female", 9.6, "SwimmingGoggles")],
        69_999: [face("male", 69.0, "NoGlasses")],
    }
    (tmp_path / place).mkdir(parents=True)
    for number, content in faces.items():
        (tmp_path / place / f"{number:05d}.json").write_text(json.dumps(content))
    data = load("ffhq", root=tmp_path, split="all")
    assert data.attributes.tolist() == [
        ffhq_attributes("Age 15-19"),
        ffhq_attributes("Male", "Glasses", "Dark glasses", "Age 0-2"),
        ffhq_attributes(),
        ffhq_attributes("Male", "Glasses", "Age 70-120"),
        ffhq_attributes("Glasses", "Age 7-9"),
        ffhq_attributes("Male", "Age 50-69"),
    ]
    (tmp_path / place / "00001.json").write_text('[{"faceId": 3}]')
    with pytest.raises(DataError, match=r"00001\.json cannot be read \(KeyError\('faceAttributes'\)\)"):
        load("ffhq", root=tmp_path)
    (tmp_path / place / "00001.json").write_text('[{"face')
    with pytest.raises(DataError, match=r"00001\.json cannot be read"):
        load("ffhq", root=tmp_path)
    (tmp_path / place / "00001.json").unlink()
    with pytest.raises(FileNotFoundError, match="json lacks 00001; get it again, or take it away"):
        load("ffhq", root=tmp_path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((1, "21", "male", "None"), r"line 3, cannot be read"),
        ((1, "20-29", "robot", "None"), "gender is 'robot'"),
        ((1, "20-29", "male", "Many"), "glasses is 'Many'"),
        (("one", "20-29", "male", "None"), "line 3"),
    ],
)
def test_ffhq_of_broken_attributes(tmp_path, row, says):
    write_ffhq(tmp_path, numbers=[0, 1])
    write_aging(tmp_path, [(0, "20-29", "male", "None"), row])
    with pytest.raises(DataError, match=says):
        load("ffhq", root=tmp_path)
    write_aging(tmp_path, [(0, "20-29", "male", "None")])
    with pytest.raises(FileNotFoundError, match=r"ffhq_aging_labels\.csv lacks 00001;"):
        load("ffhq", root=tmp_path)
    (tmp_path / "ffhq_aging_labels.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"line 2, cannot be read .*age_group"):
        load("ffhq", root=tmp_path)


def test_ffhq_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ffhq was looked for in .*NVlabs/ffhq-dataset.*ffhq_aging_labels"):
        load("ffhq", root=tmp_path)
    write_ffhq(tmp_path, numbers=[5])
    with pytest.raises(FileNotFoundError, match="none of the pictures 60000 to 69999 of 'test'"):
        load("ffhq", root=tmp_path, split="test")
    write_ffhq(tmp_path, numbers=[5], thousands=False)
    with pytest.raises(DataError, match=r"picture 00005 twice, 00000/00005\.png and 00005\.png"):
        load("ffhq", root=tmp_path)
    with pytest.raises(ValueError, match="split is 'valid'"):
        load("ffhq", root=tmp_path, split="valid")


# CheXpert

SIGNS = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"]
SIGNS += ["Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"]
SIGNS += ["Fracture", "Support Devices"]
COLUMNS = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *SIGNS]


def write_xrays(root, table, patients, first=1):
    """Two views of each patient's first study and one of a second; the shade is that of the first frontal one."""
    rows = []
    for i in range(patients):
        patient = f"patient{first + i:05d}"
        age, sex = 30 + 10 * (i % 6), ("Male", "Female", "Unknown")[i % 3]
        for name, view, grey in (
            ("study1/view2_lateral.jpg", "Lateral", 250),
            ("study1/view1_frontal.jpg", "Frontal", (first + i) % 200),
            ("study2/view1_frontal.jpg", "Frontal", 240),
        ):
            save(root / table / patient / name, np.full((8 + i % 3, 10, 3), grey, np.uint8), "L", quality=95)
            signs = [("", "0.0", "1.0", "-1.0")[(i + j + (view != "Frontal")) % 4] for j in range(14)]
            path = f"CheXpert-v1.0-small/{table}/{patient}/{name}"
            rows.append([path, sex, age, view, "AP" if view == "Frontal" else "", *signs])
    with open(root / f"{table}.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return root


@pytest.mark.parametrize("place", ["", "chexpert", "CheXpert-v1.0-small", "chexpert/CheXpert-v1.0-small"])
def test_chexpert(tmp_path, place):
    write_xrays(tmp_path / place, "train", 60)
    write_xrays(tmp_path / place, "valid", 4, first=101)
    data = {split: load("chexpert", split=split, root=tmp_path, image_size=6) for split in ("train", "test", "valid")}
    assert {part.image_shape for part in data.values()} == {(1, 6, 6)}
    assert shades(data["valid"]) == [101, 102, 103, 104]
    # By hand: SHA-256 of the patient below a tenth of the range.
    tests = [i for i in range(1, 61) if int(sha256(f"patient{i:05d}".encode()).hexdigest()[:16], 16) / 2**64 < 0.1]
    assert shades(data["test"]) == tests
    assert 0 < len(tests) < 15
    assert sorted(shades(data["train"]) + tests) == list(range(1, 61))  # one of each patient, the first frontal one
    whole = load("chexpert", split="all", root=tmp_path, image_size=6)
    assert shades(whole) == [*range(1, 61), *range(101, 105)]
    assert whole.attribute_names == ("Male", "Age 60 or more", *SIGNS)
    for i in range(60):
        expected = [i % 3 == 0, i % 6 >= 3, *((i + j) % 4 == 2 for j in range(14))]
        assert whole.attributes[i].tolist() == expected
    rows = {value: i for i, value in enumerate(shades(whole))}
    for part in data.values():
        assert part.attributes.tolist() == whole.attributes[[rows[value] for value in shades(part)]].tolist()


def test_chexpert_by_default_as_the_paper(tmp_path):
    write_xrays(tmp_path, "train", 2)
    data = load("chexpert", root=tmp_path)
    assert (data.image_shape, shades(data)) == ((1, 224, 224), [1, 2])


def test_chexpert_test_patients_stay(tmp_path):
    write_xrays(tmp_path / "a", "train", 40)
    write_xrays(tmp_path / "b", "train", 30, first=11)
    first, second = (shades(load("chexpert", split="test", root=tmp_path / name, image_size=4)) for name in "ab")
    assert second == [value for value in first if value > 10]
    assert second


def test_chexpert_is_squeezed_not_cut(tmp_path):
    write_xrays(tmp_path, "train", 1)
    picture = np.zeros((20, 60), np.uint8)
    picture[:, :15] = 255
    save(tmp_path / "train/patient00001/study1/view1_frontal.jpg", picture, quality=100)
    found = load("chexpert", root=tmp_path, image_size=20).images[0]
    assert found[:, :4].min() > 200  # the left quarter
    assert found[:, 7:].max() < 50


def test_chexpert_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chexpert was looked for in .*stanfordmlgroup.*agreement.*root="):
        load("chexpert", root=tmp_path)
    write_xrays(tmp_path, "train", 3)
    for split in ("valid", "all"):
        with pytest.raises(FileNotFoundError, match=r"lacks valid\.csv; get"):
            load("chexpert", root=tmp_path, split=split)
    (tmp_path / "train/patient00002/study1/view1_frontal.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train/patient00002/study1/view1_frontal\.jpg; get"):
        load("chexpert", root=tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace("Frontal/Lateral", "View"), "has no column Frontal/Lateral"),
        (lambda t: t.replace("Edema", "E").replace("Fracture", "F"), "has no column Edema and 1 more"),
        (lambda t: t[: t.rindex(",AP,") + 6], "line 4, cannot be read"),
        (lambda t: t.replace(",30,Frontal", ",thirty,Frontal"), "line 3, cannot be read .*thirty"),
        (lambda t: t.replace(",1.0", ",yes"), "cannot be read .*yes"),
        (lambda t: t.replace("CheXpert-v1.0-small/train/patient00001/study1/view1_", ""), "line 3, cannot be read"),
        (lambda t: t[: t.index("\n") + 1], "no frontal picture of 'train'"),
        (lambda t: "", "has no column"),
    ],
)
def test_chexpert_broken(tmp_path, change, says):
    path = write_xrays(tmp_path, "train", 1) / "train.csv"
    path.write_text("".join(line for line in path.open(newline="") if "study2" not in line or "line 4" in says))
    if "line 4" in says:  # another patient, for the row that is cut
        path.write_text(path.read_text().replace("patient00001/study2", "patient00009/study2"))
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=says):
        load("chexpert", root=tmp_path, image_size=4)
