"""Images of a data set as a model takes them: resized, in [−1, 1], from memory or from a file made once."""

import numpy as np
import pytest
import torch

from protofast.data import DataError, Dataset, load
from protofast.patronus import Images, PatronusConfig, images, images_of

pytest.importorskip("pooch")
PIL = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 21, 30), np.uint8)
COLOUR = RNG.integers(0, 256, (7, 3, 40, 25), np.uint8)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def config_of(channels=3, size=(16, 24)):
    return PatronusConfig((channels, *size), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)


def by_pillow(planes, size=(16, 24)):
    """Bicubic in floating point, plane by plane, clamped to what an image can hold; then [−1, 1]."""
    planes = planes.astype(np.float32)
    small = [
        np.asarray(PIL.fromarray(plane).resize(size[::-1], PIL.Resampling.BICUBIC))
        for plane in planes.reshape(-1, *planes.shape[-2:])
    ]
    return np.stack(small).clip(0, 255).reshape(*planes.shape[:-2], *size) / 127.5 - 1


def write_pictures(folder, count=7):
    folder.mkdir(parents=True)
    for i in range(count):
        PIL.fromarray(COLOUR[i].transpose(1, 2, 0)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("cache", [False, True])
def test_as_pillow_resizes(cache):
    data = Dataset(COLOUR)
    found = Images(config_of(), data, cache=cache)
    assert (len(found), found.shape) == (7, (7, 3, 16, 24))
    rows = found.take(slice(None))
    assert (rows.dtype, rows.shape) == (torch.float32, found.shape)
    # 1/255 is half a level of 8 bits in [−1, 1].
    bound = 2e-5 + (1 / 255 if cache else 0)
    assert np.abs(rows.numpy() - by_pillow(COLOUR)).max() <= bound
    assert torch.equal(found.take([5, 2, 5]), rows[[5, 2, 5]])
    assert torch.equal(found.take(torch.tensor([1, 6])), rows[[1, 6]])
    assert torch.equal(found.take(slice(2, 4)), rows[2:4])
    assert torch.equal(found.take(np.arange(7) % 2 == 1), rows[1::2])
    with pytest.raises(IndexError, match="images 0 to 6"):
        found.take([7])
    assert (rows - images_of(config_of(), data)).abs().max() <= (1 / 255 + 1e-6 if cache else 0)


@pytest.mark.parametrize("cache", [False, True])
def test_grey_becomes_colour_but_not_the_reverse(cache):
    found = Images(config_of(), Dataset(GREY), cache=cache).take([3, 0])
    assert np.abs(found.numpy() - by_pillow(GREY[[3, 0]])[:, None]).max() <= 2e-5 + 1 / 255
    assert torch.equal(found[:, 0], found[:, 2])
    found[:, 0] = 0  # memory of its own
    assert found[:, 1].abs().max() > 0
    with pytest.raises(ValueError, match="images of 3 channels; the model takes 1"):
        Images(config_of(1), Dataset(COLOUR), cache=cache)


def test_images_of_in_parts_is_the_same(monkeypatch):
    whole = images_of(config_of(), Dataset(COLOUR))
    for pixels in (1, 3 * 40 * 25 * 2, 3 * 40 * 25 * 3 + 5):
        monkeypatch.setattr(images, "_PIXELS", pixels)
        assert torch.equal(images_of(config_of(), Dataset(COLOUR)), whole)
        found = Images(config_of(), Dataset(255 - COLOUR), cache=True)
        assert (found.take(slice(None)) + whole).abs().max() < 1 / 255 + 1e-5
        found.path.unlink()


def test_extremes_stay_exact():
    steps = np.zeros((2, 8, 8), np.uint8)
    steps[:, :, 4:] = 255  # bicubic overshoots here
    for cache in (False, True):
        rows = Images(config_of(1, (16, 16)), Dataset(steps), cache=cache).take(slice(None))
        assert (rows.min(), rows.max()) == (-1, 1)


def test_the_file_is_made_once_and_read_from_there(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "faces")
    data = load(folder)
    first = Images(config_of(), data, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [first.path]
    assert first.path.name.startswith("faces-3x16x24-")
    stored = np.load(first.path, mmap_mode="r")
    assert (stored.dtype, stored.shape) == (np.uint8, (7, 3, 16, 24))
    expected = first.take(slice(None))
    monkeypatch.setattr(type(data.images), "_decode", None)  # no picture is opened again
    again = Images(config_of(), load(folder), cache=tmp_path / "cache")
    assert torch.equal(again.take([4, 0]), expected[[4, 0]])
    assert Images(config_of(), load(folder), cache=False).path is None


def test_another_file_for_other_images(tmp_path):
    folder = write_pictures(tmp_path / "faces")
    data = load(folder)
    paths = {Images(config_of(), data, cache=True).path, Images(config_of(size=(16, 16)), data, cache=True).path}
    paths.add(Images(config_of(), data.subset([0, 1, 2]), cache=True).path)
    turned = Images(config_of(), data.subset([2, 1, 0]), cache=True)
    paths.add(turned.path)
    assert len(paths) == 4
    assert torch.equal(turned.take([0]), Images(config_of(), data, cache=True).take([2]))
    PIL.fromarray(255 - COLOUR[0].transpose(1, 2, 0)).save(folder / "0.png")
    changed = Images(config_of(), load(folder), cache=True)
    assert changed.path not in paths
    assert np.abs(changed.take([0]).numpy() - by_pillow(255 - COLOUR[:1])).max() <= 2e-5 + 1 / 255
    arrays = {Images(config_of(), Dataset(array), cache=True).path for array in (COLOUR, 255 - COLOUR, GREY)}
    assert len(arrays) == 3
    assert {Images(config_of(), Dataset(COLOUR.copy()), cache=True).path} < arrays


def test_another_file_for_another_npy(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    first = Images(config_of(), load(tmp_path / "a.npy"), cache=True)
    assert Images(config_of(), load(tmp_path / "a.npy"), cache=True).path == first.path
    np.save(tmp_path / "a.npy", COLOUR[:5])
    second = Images(config_of(), load(tmp_path / "a.npy"), cache=True)
    assert second.path != first.path
    assert second.shape[0] == 5


def test_a_copy_of_what_is_ready_is_not_made(tmp_path):
    ready = np.ascontiguousarray(COLOUR[:, :, :16, :24])
    found = Images(config_of(), Dataset(ready).subset([3, 1]), cache=tmp_path / "cache")
    assert found.path is None
    assert not (tmp_path / "cache").exists()
    assert torch.equal(found.take([0]), torch.from_numpy(ready[[3]]) / 255 * 2 - 1)
    assert Images(config_of(), Dataset(ready / np.float32(255)), cache=tmp_path / "cache").path is not None
    colours = [PIL.fromarray(image.transpose(1, 2, 0)) for image in ready]
    (tmp_path / "faces").mkdir()
    colours[0].save(tmp_path / "faces" / "0.png")
    assert Images(config_of(), load(tmp_path / "faces"), cache=tmp_path / "cache").path is not None  # decoded once


def test_nothing_is_left_of_a_file_that_fails(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "faces")
    data = load(folder)
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:200])
    monkeypatch.setattr(images, "_PIXELS", 3 * 40 * 25 * 2)
    with pytest.raises(DataError, match=r"5\.png cannot be decoded"):
        Images(config_of(), data, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_file_is_named(tmp_path):
    found = Images(config_of(), Dataset(COLOUR), cache=tmp_path)
    found.path.write_bytes(found.path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{found.path.name} is damaged; delete it"):
        Images(config_of(), Dataset(COLOUR), cache=tmp_path)


def test_progress_shows_a_bar(capsys):
    pytest.importorskip("rich")
    Images(config_of(), Dataset(COLOUR), cache=True, progress=True)
    assert "7/7" in capsys.readouterr().err
    Images(config_of(), Dataset(GREY), cache=True)
    assert capsys.readouterr().err == ""
