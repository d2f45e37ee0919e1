"""Many anchors: memory that grows with their number alone, and k-medoids on a part of a large group."""

import sys

import numpy as np
import pytest
import torch
from helpers.fresh import run_fresh

from protofast.pxgen import discovery

# No more of protofast up here: what runs in a process of its own is found by importing this file.

BYTES_AN_ANCHOR = 4 * 2**30 / 5_000_000
"""Five million anchors fit into 4 GB."""


def _growth(n: int, widths: list[int], folder: str) -> list[int | None]:
    """Bytes that a process grows by for an analysis of n anchors, with an embedding of each width that is not 0."""
    import torch

    import protofast as pf
    from protofast.bench.memory import peak
    from protofast.pxgen import figures

    torch.set_num_threads(1)
    png = figures.png
    figures.png = lambda figure: png(figure, 30)

    def run(n: int, width: int) -> None:
        images = np.random.default_rng(0).random((n, 1, 2, 2), np.float32)
        embedding = np.random.default_rng(1).random((n, width), np.float32) if width else "criteria"
        adapter = pf.pxgen.FunctionAdapter(
            lambda n, g: torch.rand(n, 1, 2, 2), lambda x: x * 0.9, lambda x: x.flatten(1)
        )
        report = pf.pxgen.explain(
            adapter,
            images,
            intrinsic="latent_nll",
            extrinsic=("mse", "mae"),
            thresholds={"latent_nll": 0.7, "mse": 0.004, "mae": 0.05},
            features=embedding,
            labels=np.arange(n) % 10,
            batch_size=4096,
            progress=False,
        )
        assert min(summary.count for summary in report.summaries) > n // 100
        report.save(folder)
        assert len(pf.pxgen.Report.load(folder)) == n

    run(25_000, 3)  # all libraries are loaded, and the density is drawn
    return [peak(lambda width=width: run(n, width), "cpu") for width in widths]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_a_few_numbers_an_anchor(tmp_path):
    for module in ("jinja2", "matplotlib", "pyarrow", "PIL"):
        pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")
    n, widths = 250_000, [0, 64]
    for width, grown in zip(widths, run_fresh(_growth, n, widths, str(tmp_path)), strict=True):
        if grown is None:
            pytest.skip("the peak cannot be told here")
        # The embedding itself, that of the largest group, and room for one more.
        assert grown < n * (BYTES_AN_ANCHOR + 3 * 4 * width), f"{grown / n:.0f} bytes an anchor"


@pytest.mark.parametrize("metric", ["manhattan", "euclidean"])
def test_medoids_of_a_large_group_come_from_a_part_of_it(monkeypatch, metric):
    points = np.random.default_rng(0).standard_normal((300, 2))
    members = np.arange(300) * 7
    options = {"algorithm": "k-medoids", "features": "criteria", "metric": metric, "k": 6}
    whole, remarks = discovery.choose("HIHE", members, points, seed=1, **options)
    assert remarks == []
    monkeypatch.setattr(discovery, "MEDOIDS_FROM", 120)
    part, remarks = discovery.choose("HIHE", members, points, seed=1, **options)
    assert len(remarks) == 1
    assert "HIHE has 300 anchors: k-medoids chose among 120 of them" in remarks[0]
    assert part.bound is None or np.isnan(part.bound)
    rows = np.array(part.indices) // 7
    assert len(set(rows)) == 6
    away = np.linalg.norm(points[:, None] - points[rows], 1 if metric == "manhattan" else 2, axis=-1)
    assert np.array_equal(part.nearest, away.argmin(1))
    assert part.objective == pytest.approx(away.min(1).sum())
    assert part.objective < 1.3 * whole.objective
    again = discovery.choose("HIHE", members, points, seed=1, **options)[0]
    assert again.indices == part.indices
    assert discovery.choose("HIHE", members, points, seed=2, **options)[0].indices != part.indices


def test_standardised_leaves_the_criteria_alone():
    criteria = {"a": np.arange(5.0), "b": np.full(5, 3.0)}
    table = discovery.standardised(criteria)
    assert torch.from_numpy(table).mean(0).abs().max() < 1e-15
    assert table[:, 1].tolist() == [0] * 5
    assert criteria["a"].tolist() == [0, 1, 2, 3, 4]
