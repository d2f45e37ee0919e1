"""The examples of docs/prototypes.md: a method's own code, ours and a third formulation in numpy agree in float64."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import protofast as pf

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "prototypes.md"
SECTION = re.search(r"^## Your layer in this one\n(.*?)^## ", PAGE.read_text(), re.M | re.S)[1]
EXAMPLES = dict(re.findall(r"^### ([^\n]*)\n(?:(?!^###).)*?^```python\n(.*?)^```", SECTION, re.M | re.S))


# --- the third formulation: distances by loops, then what the papers say -----------------------------------------


def distances(x, p):
    """Σ(x − p)² (B, P, N), term by term."""
    x = x.reshape(*x.shape[:2], -1)
    out = np.zeros((x.shape[0], p.shape[0], x.shape[2]))
    for sample, prototype, patch in np.ndindex(*out.shape):
        for channel in range(x.shape[1]):
            out[sample, prototype, patch] += (x[sample, channel, patch] - p[prototype, channel]) ** 2
    return out


def dots(x, p):
    return (p[None, :, :, None] * x.reshape(x.shape[0], 1, x.shape[1], -1)).sum(2)


def log(d):
    return np.log1p(d) - np.log(d + 1e-4)


def cosines(x, p):
    lengths = np.sqrt((x.reshape(*x.shape[:2], -1) ** 2).sum(1))
    return dots(x, p) / (lengths[:, None] * np.sqrt((p**2).sum(1))[:, None])


def largest(values, count):
    return np.sort(values, axis=2)[..., ::-1][..., :count]


PLAIN = {
    "ProtoPNet": lambda x, p: log(distances(x, p).min(2)),
    "ProtoTree": lambda x, p: np.exp(-np.sqrt(distances(x, p).min(2))),
    "ST-ProtoPNet": lambda x, p: largest(np.maximum(cosines(x, p), 0), 5).mean(2),
    "MGProto": lambda x, p: largest(np.exp(-np.pi * distances(x, p)), 20),
    "IAIA-BL": lambda x, p: largest(log(distances(x, p)), 9).mean(2),
    "ProtoPool": lambda x, p: log(distances(x, p).min(2)) - log(distances(x, p).mean(2)),
    "TesNet": lambda x, p: dots(x, p).max(2),
    "ProtoSeg": lambda x, p: log(distances(x, p)).reshape(*x.shape[:1], len(p), *x.shape[2:]),
}


def run(title, features, prototypes):
    names = {"pf": pf, "torch": torch, "features": features, "prototypes": prototypes}
    exec(compile(EXAMPLES[title], title, "exec"), names)
    return names


def draw(scale=0.3):
    """Negative values too, and no two patches alike."""
    features = scale * torch.randn(3, 6, 5, 7, dtype=torch.float64)
    return features.requires_grad_(), (scale * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()


def named(word):
    (title,) = (title for title in EXAMPLES if title.startswith(word))
    return title


def test_every_example_has_its_formulation():
    assert len(EXAMPLES) == len(PLAIN)
    assert {named(word) for word in PLAIN} == {*EXAMPLES}


@pytest.mark.parametrize("word", PLAIN)
def test_before_and_after_are_the_same(word):
    features, prototypes = draw()
    names = run(named(word), features, prototypes)
    expected = PLAIN[word](features.detach().numpy(), prototypes.detach().numpy())
    assert names["new"].shape == expected.shape
    for name in ("new", "old"):
        # cdist's and the expansions' errors at distances of about 1, ProtoTree's 1e-14 under the root
        np.testing.assert_allclose(names[name].detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    if "old_index" in names:
        assert torch.equal(names["old_index"], names["new_index"])
    weights = torch.cos(torch.arange(expected.size, dtype=torch.float64)).view(expected.shape)
    gradients = [torch.autograd.grad((names[name] * weights).sum(), (features, prototypes)) for name in ("new", "old")]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("word", PLAIN)
def test_ten_lines_at_most(word):
    before, after = EXAMPLES[named(word)].split("# after\n")
    assert before.startswith("# before\n")
    assert len(before.splitlines()) - 1 <= 10
    assert len(after.splitlines()) <= 10


# --- the training run of benchmarks/protopnet_fashion.py ----------------------------------------------------------


def test_training_both_ways(tmp_path):
    try:
        pf.data.load("fashion-mnist")
    except Exception as error:
        pytest.skip(str(error))
    command = [sys.executable, str(ROOT / "benchmarks" / "protopnet_fashion.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "protopnet-fashion.md",
        "protopnet-fashion.json",
        "protopnet-fashion.png",
    }
    assert (tmp_path / "protopnet-fashion.md").read_text() in done.stdout
    result = json.loads((tmp_path / "protopnet-fashion.json").read_text())
    runs = {(run["layer"], run["seed"]): run for run in result["runs"]}
    assert len(runs) == 6
    for seed in range(3):
        both = [runs[layer, seed] for layer in ("two convolutions", "protofast")]
        # The same start; but prototypes lie near patches, where the logarithm is steep in the roundings.
        assert both[0]["first_loss"] == pytest.approx(both[1]["first_loss"], rel=1e-3)
        assert both[0]["accuracy"] == pytest.approx(both[1]["accuracy"], abs=0.05)
    assert all(layer["milliseconds"] > 0 for layer in result["layers"].values())
