"""Files appear whole or not at all."""

import os

import pytest
import torch

from protofast._files import digest, replacing


def test_a_file_is_replaced_at_the_end_and_readable_as_any_other(tmp_path):
    path = tmp_path / "new" / "file.json"
    with replacing(path, durable=True) as file:
        file.write(b"first")
        assert not path.exists()
    with replacing(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    assert os.listdir(path.parent) == ["file.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", "no bytes"])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_digest_tells_contents_dtype_and_shape_apart():
    x = torch.arange(6.0)
    assert digest(x) == digest(torch.stack([x, x])[1]) == digest(torch.stack([x, x], 1)[:, 0])
    others = (x + 1, x.double(), x.reshape(2, 3), x.int(), x[:0], torch.tensor(0.0))
    assert len({digest(x), *map(digest, others)}) == 7
    assert digest(0.1) == "0.1"
    assert digest(object()) == "object"
