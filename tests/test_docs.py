"""The examples in the docstrings of the public modules run as shown."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import protofast

MODULES = ["protofast"] + [
    name
    for _, name, _ in pkgutil.walk_packages(protofast.__path__, "protofast.", onerror=lambda name: None)
    if not name.startswith(("protofast.backends", "protofast._ops", "protofast._C")) and not name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for examples that write
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))
    torch.manual_seed(0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0, "see the captured output"
