"""The command `protofast select`: every kind of file in, results out, and what is said when something does not fit."""

import json
import os
import re

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="typer is absent: pip install 'protofast[cli]'")

from typer.testing import CliRunner

import protofast as pf
from protofast import cli
from protofast.selection import files

FIELDS = ("indices", "radii", "labels", "distances", "objective", "bound")


@pytest.fixture(scope="module")
def app():
    return cli.build()


@pytest.fixture
def points():
    return np.random.default_rng(0).standard_normal((60, 3))


@pytest.fixture
def file(tmp_path, points):
    np.save(tmp_path / "points.npy", points)
    return tmp_path / "points.npy"


def run(app, *arguments):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "PROTOFAST_DEBUG": None}
    return CliRunner().invoke(app, ["select", *map(str, arguments)], env=env)


def chosen(app, *arguments):
    """Rows that are printed when no file is asked for."""
    result = run(app, *arguments)
    assert result.exit_code == 0, result.output
    return list(map(int, result.stdout.split()))


def test_help_teaches(app):
    result = run(app, "--help")
    assert result.exit_code == 0
    for words in (
        "protofast select points.npy -k 100 -o chosen.npz",
        "--algorithm",
        "k-dispersion",
        "[required]",
        "labels",
    ):
        assert words in result.output


CALLS = [
    ([], lambda x: pf.k_center(x, 7)),
    (["--start", "12", "--engine", "plain"], lambda x: pf.k_center(x, 7, start=12)),
    (["--start", "center", "--metric", "cosine"], lambda x: pf.k_center(x, 7, start="center", metric="cosine")),
    (["--start", "farthest-pair"], lambda x: pf.k_center(x, 7, start="farthest-pair")),
    (
        ["--start", "random", "--seed", "5"],
        lambda x: pf.k_center(x, 7, start=torch.Generator().manual_seed(5)),
    ),
    (["--initial", "9, 3"], lambda x: pf.k_center(x, 7, initial=[9, 3])),
    (["--backend", "reference"], lambda x: pf.k_center(x, 7, backend="reference")),
    (["--algorithm", "k-dispersion"], lambda x: pf.k_dispersion(x, 7)),
    (
        ["--algorithm", "k-dispersion", "--no-refine", "--objective", "max-sum"],
        lambda x: pf.k_dispersion(x, 7, objective="max-sum", refine=False),
    ),
    (["--algorithm", "k-medoids"], lambda x: pf.k_medoids(x, 7)),
    (["--algorithm", "k-medoids", "--refine"], lambda x: pf.k_medoids(x, 7, refine=True)),
    (
        ["--algorithm", "k-medoids", "--start", "random", "--seed", "3", "--metric", "euclidean"],
        lambda x: pf.k_medoids(x, 7, start=torch.Generator().manual_seed(3), metric="euclidean"),
    ),
]


@pytest.mark.parametrize(("options", "function"), CALLS, ids=[" ".join(options) or "plain" for options, _ in CALLS])
def test_the_result_is_that_of_the_function(app, file, points, options, function):
    expected = function(points)
    for name in ("out.npz", "out.json"):
        out = file.parent / "new" / name
        result = run(app, file, "-k", 7, "-o", out, *options)
        assert result.exit_code == 0, result.output
        assert str(out) in result.stdout
        assert "7 of 60 points of 3 dimensions" in result.stdout
        found = np.load(out) if name.endswith("npz") else json.loads(out.read_text())
        for field in FIELDS:
            value = getattr(expected, field).numpy()
            if field == "bound" and np.isnan(value) and name.endswith("json"):
                assert found[field] is None
            else:
                np.testing.assert_array_equal(found[field], value)
        settings = json.loads(str(found["settings"])) if name.endswith("npz") else found["settings"]
        assert settings["k"] == 7
        assert settings["shape"] == [60, 3]
    assert chosen(app, file, "-k", 7, *options) == expected.indices.tolist()


def test_initial_rows_from_a_file(app, file, points):
    np.save(file.parent / "first.npy", np.array([8, 2, 5]))
    assert chosen(app, file, "-k", 5, "--initial", file.parent / "first.npy")[:3] == [8, 2, 5]


def test_refined_and_exact(app, file, points):
    pytest.importorskip("scipy", reason="scipy is absent: pip install 'protofast[selection]'")
    result = run(app, file, "-k", 3, "--algorithm", "exact", "-o", file.parent / "exact.npz")
    assert result.exit_code == 0, result.output
    assert "optimal: no choice of 3 points has a smaller one" in result.stdout
    best = np.load(file.parent / "exact.npz")
    refined = pf.k_center(points, 3, refine=True)
    assert best["objective"] == best["bound"] <= float(refined.objective)
    assert chosen(app, file, "-k", 3, "--refine") == refined.indices.tolist()


def test_the_summary_is_right(app, file, points):
    result = run(app, file, "-k", 7, "-o", file.parent / "out.npz")
    found = pf.k_center(points, 7)
    sizes = np.bincount(found.labels)
    for words in (
        f"{found.objective:.6g}: no point is farther",
        f"none below {found.bound:.6g} exists, so this is at most 2 × the best",
        f"{sizes.min()} to {sizes.max()} points",
        ", ".join(map(str, found.indices.tolist())),
    ):
        assert words in result.stdout
    quiet = run(app, file, "-k", 7)
    assert "covering radius" in quiet.stderr
    assert "covering radius" not in quiet.stdout
    all_of_them = run(app, file, "-k", 60, "-o", file.parent / "out.npz")
    assert "optimal: no choice of 60 points" in all_of_them.stdout


def test_every_kind_of_file(app, tmp_path, points):
    expected = pf.k_center(points, 6).indices.tolist()
    single = pf.k_center(points.astype(np.float32), 6).indices.tolist()
    np.savez(tmp_path / "one.npz", anything=points)
    np.savez(tmp_path / "several.npz", other=np.zeros(3), points=points)
    np.savetxt(tmp_path / "bare.csv", points, delimiter=",", fmt="%.17g")
    np.savetxt(tmp_path / "named.csv", points, delimiter=",", fmt="%.17g", header="a,b,c", comments="")
    torch.save(torch.from_numpy(points), tmp_path / "tensor.pt")
    torch.save({"a": torch.from_numpy(points), "note": "hello"}, tmp_path / "dictionary.pt")
    np.save(tmp_path / "images.npy", points.reshape(60, 1, 3, 1))
    np.save(tmp_path / "columns.npy", np.asfortranarray(points))
    names = (
        "one.npz",
        "several.npz",
        "bare.csv",
        "named.csv",
        "tensor.pt",
        "dictionary.pt",
        "images.npy",
        "columns.npy",
    )
    for name in names:
        assert chosen(app, tmp_path / name, "-k", 6) == expected, name
    assert chosen(app, tmp_path / "several.npz", "-k", 6, "--key", "points") == expected
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors is absent: pip install 'protofast[data]'"
    )
    safetensors.save_file({"points": torch.from_numpy(points).float()}, tmp_path / "x.safetensors")
    assert chosen(app, tmp_path / "x.safetensors", "-k", 6) == single
    assert isinstance(files.read(tmp_path / "columns.npy"), np.memmap)


def test_distances_in_a_file(app, tmp_path, points):
    np.save(tmp_path / "d.npy", np.abs(points[:, None] - points).sum(-1))
    assert chosen(app, tmp_path / "d.npy", "-k", 5, "--metric", "precomputed") == (
        pf.k_center(points, 5, metric="manhattan").indices.tolist()
    )


def test_infinity_in_json(app, tmp_path):
    np.save(tmp_path / "d.npy", np.where(np.eye(3) == 1, 0, np.inf))
    result = run(app, tmp_path / "d.npy", "-k", 2, "--metric", "precomputed", "-o", tmp_path / "out.json")
    assert result.exit_code == 0, result.output

    def refuse(constant):
        raise AssertionError(f"bare {constant}")

    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert found["radii"] == ["inf", "inf"]


@pytest.mark.parametrize("shape", [(50, 1), (50, 2), (50, 5), (21_000, 3)])
def test_picture(app, tmp_path, shape):
    for module in ("matplotlib", "PIL", "sklearn"):
        pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")
    from PIL import Image

    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal(shape))
    result = run(app, tmp_path / "x.npy", "-k", 9, "--picture", tmp_path / "x.png", "-o", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    orange = (np.abs(pixels - [0xD5, 0x5E, 0x00]).sum(-1) < 30).sum()
    assert orange > 100  # the chosen are drawn, above the others
    assert (pixels.sum(-1) < 600).sum() > 2 * orange


def test_a_lone_point_is_seen_in_the_density(tmp_path):
    for module in ("matplotlib", "PIL"):
        pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")
    from PIL import Image

    from protofast.selection.picture import MOST_POINTS, draw

    points = np.zeros((MOST_POINTS + 2, 2))
    points[-2:] = [[7, 7], [10, 10]]
    draw(tmp_path / "x.png", points, pf.k_center(points, 1, start=len(points) - 1))
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(int)
    height, width = pixels.shape
    around = pixels[height // 6 : height // 2, int(0.4 * width) : int(0.7 * width)]  # nothing else is there
    assert (around < 200).sum() > 20


@pytest.mark.parametrize("n", [1, 50, 21_000])
def test_a_picture_of_equal_points(tmp_path, n, recwarn):
    for module in ("matplotlib", "PIL", "sklearn"):
        pytest.importorskip(module, reason=f"{module} is absent: pip install 'protofast[pxgen]'")
    from protofast.selection.picture import _plane, draw

    points = np.full((n, 3), 0.1)
    draw(tmp_path / "x.png", points, pf.k_center(points, 1))
    assert _plane(points, np.array([0]))[1] == ("all points are equal", "")
    assert [str(one.message) for one in recwarn] == []


def test_a_picture_shows_the_one_point_that_differs():
    pytest.importorskip("sklearn", reason="scikit-learn is absent: pip install 'protofast[data]'")
    from protofast.selection.picture import _plane

    points = np.zeros((100_001, 3), np.float32)
    points[77_777] = 1
    plane, _ = _plane(points, np.array([0, 77_777]))
    assert np.abs(plane[77_777] - plane[0]).max() > 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npy", None, "absent.npy does not exist"),
        ("x.txt", b"1 2", "x.txt is no .npy, .npz, .safetensors, .pt, .csv file"),
        ("x.npy", b"nothing", "x.npy is no whole .npy file"),
        ("x.npz", b"nothing", "x.npz is"),
        ("x.pt", b"nothing", "x.pt is"),
        ("x.safetensors", b"nothing", "x.safetensors is no whole .safetensors file"),
        ("x.csv", b"a,b\n1,2\n3,four\n", "x.csv, line 3, holds 'four'"),
        ("x.csv", b"# by hand\na,b\n1,2\n\n3,nan\n", "x.csv, line 5, holds 'nan'"),
        ("x.csv", b"1.5,,2\n3,4,5\n", "x.csv, line 1, holds ''; give numbers"),
        ("x.csv", b"1.5,x\n3,4\n", "x.csv, line 1, holds 'x'"),
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv, line 3, holds 1 fields, and those before hold 2"),
        ("x.csv", b"1;2\n3;4\n", "x.csv, line 2, holds '3;4'"),
        ("x.csv", b"a,b\n", "x.csv holds no line of numbers"),
        ("x.csv", b"", "x.csv holds no line of numbers"),
        ("x.csv", b"\xff\xfe1\x00", "x.csv is no text in UTF-8"),
    ],
)
def test_files_that_do_not_fit(app, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(run(app, tmp_path / name, "-k", 1, "-o", tmp_path / "out" / "x.npz"), message)
    assert not (tmp_path / "out").exists()


def refused(result, message):
    """One clear line."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "PROTOFAST_DEBUG" not in result.stderr
    assert not re.match(r"error: \w+Error:", result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1


def test_more_that_does_not_fit(app, file, tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 1)), b=np.zeros((3, 1)))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "flat.npy", np.zeros(4))
    np.save(tmp_path / "halves.npy", np.array([0.5]))
    (tmp_path / "damaged.npy").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ([tmp_path / "two.npz", "-k", 1], "two.npz holds a, b; say which by --key"),
        ([tmp_path / "two.npz", "-k", 1, "--key", "c"], "there is no 'c'"),
        ([file, "-k", 1, "--key", "c"], "holds one array without a name"),
        ([tmp_path / "words.npy", "-k", 1], "give real numbers"),
        ([tmp_path / "flat.npy", "-k", 1], "give (n, d)"),
        ([tmp_path / "list.pt", "-k", 1], "list.pt holds a list"),
        ([tmp_path, "-k", 1], "is no .npy"),
        ([file, "-k", 61], "k is 61; give 1 to 60"),
        ([file, "-k", 2, "--start", "60"], "start is 60"),
        ([file, "-k", 2, "--initial", "1,99"], "initial runs from 1 to 99"),
        ([file, "-k", 2, "--metric", "l2"], "metric is 'l2'"),
        ([file, "-k", 2, "--engine", "magic"], "engine is 'magic'"),
        ([file, "-k", 2, "--backend", "magic"], "backend is 'magic'"),
        ([file, "-k", 2, "--device", "nowhere"], "--device nowhere does not work here"),
        ([file, "-k", 2, "--initial", "absent.npy"], "--initial absent.npy is no file; give rows"),
        ([file, "-k", 2, "--initial", tmp_path / "halves.npy"], "give integer indices"),
        ([file, "-k", 2, "--initial", tmp_path / "damaged.npy"], "damaged.npy is no whole .npy file of rows"),
        ([file, "-k", 2, "-o", file / "x.npz"], "is no place for a file"),
        ([file, "-k", 2, "-o", tmp_path / "folder" / "x.npz", "--picture", file / "x.png"], "is no place for a file"),
    ):
        refused(run(app, *arguments), message)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-k", 0],
        ["-k", 2, "--algorithm", "k-means"],
        ["-k", 2, "-o", "x.txt"],
        ["-k", 2, "--picture", "x.jpg"],
        ["-k", 2, "--picture", "x.png", "--metric", "precomputed"],
        ["-k", 2, "--start", "middle"],
        ["-k", 2, "--start", "center", "--algorithm", "k-medoids"],
        ["-k", 2, "--start", "1", "--algorithm", "k-dispersion"],
        ["-k", 2, "--initial", "1,x"],
        ["-k", 2, "--initial", "1", "--algorithm", "exact"],
        ["-k", 2, "--time-limit", "1"],
        ["-k", 2, "--refine", "--algorithm", "exact"],
        ["-k", 2, "--objective", "max-sum"],
        ["-k", 2, "--objective", "max-min", "--algorithm", "k-medoids"],
        ["-k", 2, "--engine", "auto", "--algorithm", "k-dispersion"],
        ["-k", 2, "--seed", "0", "--algorithm", "exact"],
        ["-k", 2, "--seed", "0"],
        ["-k", 2, "--seed", "0", "--start", "center"],
        ["-k", 2, "--initial", "1", "--start", "3"],
        ["-k", 2, "--algorithm", "exact", "--time-limit", "0"],
        ["-k", 2, "--algorithm", "exact", "--time-limit", "-1"],
        ["-k", 2, "--algorithm", "exact", "--time-limit", "nan"],
    ],
)
def test_wrong_use_ends_with_two(app, file, arguments):
    result = run(app, file, *arguments)
    assert result.exit_code == 2, result.output
    assert "Usage" in result.stderr


def test_an_input_is_never_written_over(app, tmp_path, points):
    file, link = tmp_path / "points.npz", tmp_path / "link.npz"
    np.savez(file, points=points)
    link.symlink_to(file)
    np.save(tmp_path / "first.npy", [1, 2])
    (tmp_path / "first.npz").symlink_to(tmp_path / "first.npy")
    (tmp_path / "x.png").symlink_to(file)
    before = file.read_bytes()
    for arguments in (
        [file, "-o", file],
        [file, "-o", link],
        [link, "-o", file],
        [file, "-o", tmp_path / "folder" / ".." / "points.npz"],
        [file, "--picture", tmp_path / "x.png"],
        [file, "--initial", tmp_path / "first.npy", "-o", tmp_path / "first.npz"],
    ):
        (tmp_path / "folder").mkdir(exist_ok=True)
        refused(run(app, *arguments, "-k", 3), "is read, and would be written over")
    assert file.read_bytes() == before
    assert link.is_symlink()


@pytest.mark.parametrize("labels", [False, True])
def test_nor_by_many_processes(monkeypatch, tmp_path, capsys, labels):
    from protofast.selection.distributed import command

    file = tmp_path / "rank-00000.npz"
    np.savez(file, points=np.eye(3))
    out = ["-o", str(tmp_path / "out.npz"), "--labels", str(tmp_path)] if labels else ["-o", str(file)]
    monkeypatch.setattr("sys.argv", ["select", str(tmp_path / "*.npz"), "-k", "2", *out])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="1"):
        command.main()
    assert "is read, and would be written over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--start", "3"], ["--seed", "1"], ["--algorithm", "k-center", "--objective", "max-sum"], ["--refine"]]
)
def test_options_of_many_processes(monkeypatch, options):
    from protofast.selection.distributed import command

    algorithm = [] if "--objective" in options or "--refine" in options else ["--algorithm", "k-dispersion"]
    monkeypatch.setattr("sys.argv", ["select", "x.npy", "-k", "2", "-o", "out.npz", *algorithm, *options])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        command.main()


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_cannot_be_written_to(app, file):
    file.parent.chmod(0o500)
    try:
        refused(run(app, file, "-k", 1, "-o", file.parent / "x.npz"), "cannot be written to")
    finally:
        file.parent.chmod(0o700)


def test_an_earlier_result_stays_when_writing_fails(app, file, monkeypatch):
    out = file.parent / "out.npz"
    assert run(app, file, "-k", 3, "-o", out).exit_code == 0
    before = out.read_bytes()

    def fail(stream, **_):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    refused(run(app, file, "-k", 4, "-o", out), "disk full")
    assert out.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["out.npz", "points.npy"]
