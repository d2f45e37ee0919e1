"""The accuracy table: its truth, its emulation of TF32, and our rows within what float32 arithmetic may err."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from protofast.bench import accuracy

ROOT = Path(__file__).resolve().parents[1]
TINY = {"samples": 3, "channels": 24, "side": 6, "prototypes": 20}


@pytest.fixture(scope="module")
def result() -> dict:
    return accuracy.measure("cpu", **TINY)


def test_tf32_rounds_to_nearest_even() -> None:
    given = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-23, -(1 + 3 * 2**-12), 0.0, 0.3])
    wanted = [1.0, 1.0, 1 + 2**-9, 1 + 2**-10, -(1 + 2**-10), 0.0, 1229 / 4096]
    given.requires_grad_()
    rounded = accuracy.to_tf32(given)
    assert rounded.tolist() == wanted
    assert torch.autograd.grad(rounded.sum(), given)[0].tolist() == [1.0] * 7


@pytest.mark.parametrize("distance", [0.0, 1e-4, 1e-2, 1.0])
def test_every_prototype_has_a_patch_at_the_distance(distance: float) -> None:
    sizes = TINY | {"channels": 128}  # where no random patch comes as near
    x, p = accuracy.planted(distance, **sizes, seed=3)
    assert min(x.min(), p.min()) >= 0
    assert max(x.max(), p.max()) <= 1
    nearest, place = accuracy.distances(x, p).min(2)
    rounding = sizes["channels"] ** 0.5 * 2**-25  # length of the error of storing a patch in float32
    assert (nearest - distance).abs().max() <= 2 * distance**0.5 * rounding + rounding**2 + 1e-15
    assert all(len(set(of_sample)) == TINY["prototypes"] for of_sample in place.tolist())
    others, _ = accuracy.planted(None, **sizes, seed=3)
    assert (others != x).any()


def test_truth_is_that_of_a_plain_loop() -> None:
    x, p = accuracy.planted(1e-2, samples=2, channels=3, side=2, prototypes=4, seed=0)
    found = accuracy.distances(x, p)
    for b in range(2):
        for q in range(4):
            for n in range(4):
                exact = sum((float(x[b, c, n // 2, n % 2]) - float(p[q, c])) ** 2 for c in range(3))
                assert found[b, q, n].item() == pytest.approx(exact, rel=1e-14)
    x64, p64 = x.double().requires_grad_(), p.double().requires_grad_()
    total = accuracy.activate((x64.flatten(2)[:, None] - p64[None, :, :, None]).square().sum(2).amin(2)).sum()
    to_x, to_p = torch.autograd.grad(total, (x64, p64))
    to_patch, to_prototype = accuracy.true_gradients(x, p, found)
    assert torch.allclose(to_prototype, to_p, rtol=1e-12)
    assert torch.allclose(to_patch, accuracy.at_patches(to_x, found.argmin(2)), rtol=1e-12)  # each wins for one


def test_judge_sees_wrong_winners_and_wrong_values() -> None:
    d = torch.tensor([[[1.0, 2.0, 4.0], [3.0, 3.0, 5.0]]], dtype=torch.float64)
    index = torch.tensor([[1, 1]])  # the first wrong by 1, the second a tie
    given = accuracy.activate(d.gather(2, index[..., None])[..., 0])
    seen = accuracy.judge(given.float(), index, d, 24)
    assert seen["right"] == 0.5
    assert seen["regret"] == 1.0
    assert seen["activation"] == pytest.approx(float(accuracy.activate(d[0, 0, 0]) - given[0, 0]))
    assert seen["of_bound"] <= 1
    beyond = given + 1.01 * accuracy.bound(d.gather(2, index[..., None])[..., 0], 24)
    assert 1 < accuracy.judge(beyond, index, d, 24)["of_bound"] < 1.02
    assert accuracy.judge(given.float() * torch.nan, index, d, 24)["activation"] == torch.inf


def test_our_rows_are_within_the_float32_bound(result: dict) -> None:
    ours = [row for row in result["rows"] if row["role"] == "protofast"]
    assert {"protofast reference", "protofast reference, bfloat16 input"} <= {row["method"] for row in ours}
    for row in ours:
        assert [column["distance"] for column in row["columns"]] == list(accuracy.DISTANCES)
        for column in row["columns"]:
            assert column["of_bound"] <= 1, (row["method"], column)
            assert column["regret"] >= 0
            if "reference" in row["method"] or "verify" in row["method"]:
                assert (column["right"], column["regret"]) == (1.0, 0.0), (row["method"], column)
        # The slope errs as the distance does, by (D + 2)·d / (d + eps) roundings and a few; the planted steps have one
        # sign in every sample, so the sum over samples cancels nothing. A bfloat16 gradient is rounded once more.
        roundings = TINY["channels"] + TINY["samples"] + 16
        narrow = torch.finfo(torch.bfloat16).eps / 2 if row["input"] == "bfloat16" else 0.0
        assert row["gradient"] <= roundings * 2**-24 + narrow, row["method"]


def test_every_precision_of_every_backend_has_a_row(monkeypatch) -> None:
    monkeypatch.setattr(accuracy, "why_not", lambda *_: None)
    names = [contender.name for contender in accuracy.contenders("cuda")]
    assert len(set(names)) == len(names)
    for backend in ("native", "triton"):
        settings = ("auto", "ieee", "tf32x3", "tf32", "bf16", "auto, verify", "bf16, verify", "bfloat16 input")
        assert {f"protofast {backend}, {setting}" for setting in settings} <= set(names)


def test_what_people_run_is_not(result: dict) -> None:
    """The bound can be missed: the expansions and the lower precisions do, where a patch is near."""
    by_name = {row["method"]: row for row in result["rows"]}
    near = {name: row["columns"][1] for name, row in by_name.items()}
    for name, column in near.items():
        if not name.startswith("protofast") and "direct" not in name:
            assert column["of_bound"] > 100, name
    eager, tf32, autocast = (near[name]["activation"] for name in list(by_name)[:3])
    assert eager < tf32 < autocast


def test_written_whole_or_not_at_all(result: dict, tmp_path, monkeypatch) -> None:
    paths = accuracy.write(result, tmp_path / "new", "here")
    assert [path.name for path in paths] == ["here.json", "here.md"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(result))
    text = paths[1].read_text()
    assert all(f"| {row['method']} |" in text for row in result["rows"])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {11}
    assert "| random |" in table[0]

    def stop(result: dict) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "to_markdown", stop)
    with pytest.raises(KeyboardInterrupt):
        accuracy.write({**result, "seed": 9}, tmp_path / "new", "here")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["here.json", "here.md"]
    assert json.loads(paths[0].read_text())["seed"] == 0


def test_too_few_patches_is_an_error() -> None:
    with pytest.raises(ValueError, match="side is 3, which has 9 patches; 10 prototypes need one each"):
        accuracy.planted(0.0, samples=1, channels=2, side=3, prototypes=10, seed=0)


def test_command(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks.accuracy", "--device", "cpu", "--samples"]
    done = subprocess.run([*command, "1", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| protofast reference |" in done.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    wrong = subprocess.run([*command, "0", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--samples is 0; give 1 or more" in wrong.stderr
