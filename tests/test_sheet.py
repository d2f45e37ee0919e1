"""The pictures of small images: every pixel, and names and heads that can be read."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from protofast._sheet import sheet


def pixels(png):
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gap", [0, 3])
def test_every_pixel_is_shown(channels, gap):
    tensor = (torch.randint(256, (20, channels, 28, 28)) / 255).float()
    found = pixels(sheet([("a", tensor), ("b", tensor.flip(0))], rows=2, gap=gap))
    wanted = (tensor * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    tile = 56 + gap
    left = found.shape[1] - 14 * tile
    for block, shown in enumerate((wanted, wanted[::-1])):
        for number, image in enumerate(shown):
            top = block * (2 * tile + 6) + number // 14 * tile
            begin = left + gap + number % 14 * tile
            assert np.array_equal(found[top : top + 56 : 2, begin : begin + 56 : 2], image)


def test_heads_stand_over_their_columns():
    tensor = torch.ones(3, 1, 28, 28)
    plain, headed = pixels(sheet([("a", tensor)])), pixels(sheet([("a", tensor)], heads=["one", "", "two\nlines"]))
    added = headed.shape[0] - plain.shape[0]
    assert added > 20
    assert np.array_equal(headed[added:], plain)
    left = headed.shape[1] - 3 * 56
    dark = [(headed[:added, left + 56 * place : left + 56 * (place + 1)] < 128).any() for place in range(3)]
    assert dark == [True, False, True]


def test_long_names_and_heads_do_not_cover_images():
    tensor = torch.zeros(2, 1, 28, 28)
    name = "a name that is far longer than an image is wide"
    found = pixels(sheet([(name, tensor)], heads=["a head far too long", "x"]))
    assert (found[-62:-6, -112:] == 0).all()
    margin = found[-62:-6, :-112]
    assert (margin < 128).any()
    assert (margin[:, -8:] == 255).all()


def test_grey_and_colour():
    assert Image.open(BytesIO(sheet([("a", torch.zeros(1, 1, 8, 8))]))).mode == "L"
    assert Image.open(BytesIO(sheet([("a", torch.zeros(1, 3, 8, 8))]))).mode == "RGB"
