"""What the commands share: which images are held out, planted data, sections as JSON."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from protofast.patronus import PatronusConfig, detect, images_of
from protofast.patronus.commands.common import Section, class_of, open_data, ready

CONFIG = PatronusConfig((1, 16, 16), num_prototypes=5, width=8, multipliers=(1, 2), layers=1, groups=4)


def rows(data):
    return {image.tobytes() for image in data.take(slice(None)).numpy()}


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of different sizes, two classes."""
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = (16 + number % 3, 20)
        Image.fromarray(generator.integers(256, size=size, dtype=np.uint8)).save(folder / f"{number}.png")
    return str(tmp_path / "pictures")


def test_data_without_parts_keep_a_tenth_from_training(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(256, size=(50, 16, 16), dtype=np.uint8))
    about = {"data": str(path), "seed": 3}
    train, test = (open_data(about, None, None, CONFIG, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (45, 5)
    assert not rows(train) & rows(test)
    assert rows(open_data(about, str(path), None, CONFIG)) == rows(test)
    assert rows(open_data(about | {"seed": 4}, None, None, CONFIG)) != rows(test)


def test_pictures_of_different_sizes_are_read_at_the_models(pictures):
    data = open_data({"data": pictures}, None, None, CONFIG, split="train")
    assert data.image_shape == (1, 16, 16)
    assert images_of(CONFIG, data).shape == (36, 1, 16, 16)


def test_named_data_come_in_their_parts():
    train, test = (open_data({"data": "digits"}, None, None, CONFIG, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)


def test_the_models_own_data_have_what_was_planted():
    about = {"data": "digits", "seed": 0, "plant": {"attribute": "corner", "target": 3, "rate": 0.9}}
    data = open_data(about, None, None, CONFIG)
    marked = detect(images_of(CONFIG, data)) > 0.5
    three = torch.as_tensor(data.labels) == 3
    assert marked[three].float().mean() == pytest.approx(0.9, abs=0.02)
    assert marked[~three].float().mean() == pytest.approx(0.1, abs=0.02)
    for plain in (open_data(about, None, None, CONFIG, planted=False), open_data(about, "digits", None, CONFIG)):
        assert not (detect(images_of(CONFIG, plain)) > 0.5).any()


def test_data_that_cannot_be_opened_are_told(tmp_path):
    with pytest.raises(ValueError, match="--data"):
        open_data({}, None, None, CONFIG)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_data({"data": "nowhere"}, None, None, CONFIG)
    np.save(tmp_path / "few.npy", np.zeros((19, 16, 16), np.uint8))
    with pytest.raises(ValueError, match="give at least 20"):
        open_data({"data": str(tmp_path / "few.npy")}, None, None, CONFIG)


def test_classes_by_name_and_number(pictures):
    data = open_data({"data": pictures}, None, None, CONFIG)
    assert class_of(data, "b", "--plant-class") == class_of(data, "1", "--plant-class") == 1
    for wrong in ("c", "2", "-1"):
        with pytest.raises(ValueError, match="--plant-class"):
            class_of(data, wrong, "--plant-class")


def test_a_section_is_written_whole(tmp_path):
    section = Section("evaluate", "A title")
    section.numbers = {"one": torch.tensor([1.0, math.nan]), "two": np.float64("inf"), "three": {"four": (1, 2)}}
    section.picture("a.png", b"picture", "Its title", "what it shows")
    result = json.loads(section.write(tmp_path / "out").read_text())
    assert result["numbers"] == {"one": [1.0, None], "two": None, "three": {"four": [1, 2]}}
    assert (tmp_path / "out/a.png").read_bytes() == b"picture"
    assert result["pictures"] == [{"file": "a.png", "title": "Its title", "caption": "what it shows"}]
    assert ready(tmp_path, tmp_path / "out", "evaluate") == tmp_path / "out"
    with pytest.raises(FileExistsError, match="another command"):
        ready(tmp_path, tmp_path / "out", "generate")
    with pytest.raises(NotADirectoryError):
        ready(tmp_path / "out/a.png", None, "generate")
    section.numbers = {"bad": object()}
    with pytest.raises(TypeError):
        section.write(tmp_path / "out")
    assert not (tmp_path / "out/result.json").exists()
