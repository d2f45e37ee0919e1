"""The benchmark: every contender computes what the reference computes, and results say what was measured."""

import csv
import io
import json
import time

import pytest
import torch

from protofast.bench import memory, plots, results, runner, timing
from protofast.bench.spec import OURS, UNABLE, Case, Skip, Spec, Target, copy_limit
from protofast.bench.specs import SPECS

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
EVERY = [
    (device, op, case, name)
    for op, spec in SPECS.items()
    for device in DEVICES
    if device in spec.devices and not spec.self_timed
    for case in spec.tiny
    for name in spec.contenders
]


@pytest.fixture(scope="module")
def prepared():
    """Inputs and reference of a case, once for all its contenders."""
    made = {}

    def get(device: str, op: str, case: Case):
        key = device, op, case.name
        if key not in made:
            inputs = SPECS[op].inputs(case, device, 0)
            made[key] = inputs, SPECS[op].reference(inputs)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("device", "op", "case", "name"), EVERY, ids=[f"{d}-{o}-{c.name}-{n}".replace(" ", "_") for d, o, c, n in EVERY]
)
def test_every_contender_is_right(prepared, device: str, op: str, case: Case, name: str) -> None:
    spec = SPECS[op]
    if "compile" in name and case is not spec.tiny[0]:
        pytest.skip("compiled for the first case alone: it takes seconds")
    inputs, reference = prepared(device, op, case)
    try:
        call = spec.contenders[name](inputs)
        call()  # a second call must not depend on the first
        output = call()
    except UNABLE as why:
        pytest.skip(str(why))
    error = spec.error(output, reference, inputs)
    assert error <= spec.tolerance(inputs)
    if op == "k_center" and name.startswith(OURS):
        assert output.tolist() == reference[0]
    # Diffusers' bits come with its float32 coefficients, and fifty steps with as many roundings.
    if name.startswith(OURS) and "diffusers" not in name and op != "ddim_loop":
        # The result goes through float32, or bfloat16 where it has the inputs' type.
        to_bfloat16 = op == "ddim_step" and inputs.x.dtype == torch.bfloat16
        assert error <= (2**-8 if to_bfloat16 else 1e-6)


@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if not spec.self_timed])
def test_error_sees_a_wrong_result(prepared, op: str) -> None:
    """The measure of error is not one that passes everything."""
    spec = SPECS[op]
    case = spec.tiny[0]
    inputs, reference = prepared("cpu", op, case)
    name = next(n for n in spec.contenders if not n.startswith(OURS) and "diffusers" not in n)
    output = spec.contenders[name](inputs)()
    if op in ("ddim_step", "prototype_activation"):
        wrong = tuple(t + 0.1 * t.abs().max() for t in output)
        hidden = tuple(torch.where(torch.arange(t.numel()).reshape(t.shape) == 3, torch.nan, t) for t in output)
        assert spec.error(hidden, reference, inputs) > spec.tolerance(inputs)
    elif op == "pxgen":
        wrong = {group: [chosen[0].repeat(2)[: len(chosen[0])], chosen[1]] for group, chosen in output.items()}
        wrong |= {0: output[1]}
    elif op == "farthest_pair":
        wrong = 0, 1
    elif op == "k_dispersion":
        near = (inputs.points - inputs.points[0]).norm(dim=1).argsort()[: inputs.k]
        wrong = near
    else:
        wrong = torch.zeros_like(output)
    assert spec.error(wrong, reference, inputs) > spec.tolerance(inputs)


def test_cases_have_names_of_their_own() -> None:
    for spec in SPECS.values():
        names = [case.name for case in spec.cases]
        assert len(set(names)) == len(names)
        assert any(case.quick for case in spec.cases)
        for target in spec.targets:
            assert target.case in {case.name for case in spec.cases if case.quick}
            assert target.contender in spec.contenders
            assert target.against in {None, *spec.contenders, *spec.limits}


def spec_of(contenders, **more) -> Spec:
    """A spec of sleeps and sums, to test the harness with."""
    case = Case("c", {"n": 4})
    settings = {"limits": {"copy": lambda i: copy_limit(1024, "cpu")}, "bytes": lambda i: 32} | more
    return Spec(
        op="toy",
        about="a sum",
        cases=(case,),
        tiny=(case,),
        inputs=lambda case, device, seed: torch.arange(4.0),
        contenders=contenders,
        reference=lambda i: i.double().sum(),
        error=lambda output, reference, i: abs(float(output) - float(reference)),
        tolerance=lambda i: 1e-3,
        **settings,
    )


def sleepy(seconds: float):
    def prepare(inputs):
        def call():
            time.sleep(seconds)
            return inputs.sum()

        return call

    return prepare


def test_interleave_pairs_rounds_and_repeats_short_calls() -> None:
    count = {"short": 0}

    def short() -> None:
        count["short"] += 1

    calls = {"slow": lambda: time.sleep(0.02), "slower": lambda: time.sleep(0.04), "short": short}
    timings = timing.interleave(calls, "cpu", budget=0.4, min_rounds=5, max_rounds=6)
    rounds = {len(t.seconds) for t in timings.values()}
    assert rounds in ({5}, {6})
    assert timings["slow"].inner == 1
    assert timings["short"].inner > 100
    assert count["short"] >= timings["short"].inner * rounds.pop()
    both = timing.ratio(timings["slower"], timings["slow"])
    assert both["p20"] <= both["p50"] <= both["p80"]
    assert min(timings["slow"].seconds) >= 0.02  # a sleep never ends early, so these hold on any machine
    assert min(timings["slower"].seconds) >= 0.04
    assert set(timing.quantiles([3.0])) == {"p20", "p50", "p80"}


def test_measure_marks_wrong_and_names_the_absent() -> None:
    def absent(inputs):
        raise ImportError("No module named 'elsewhere'")

    def broken(inputs):
        return lambda: 1 / 0

    def never(inputs):
        raise Skip("not on Sundays")

    contenders = {
        f"{OURS} native": sleepy(0.001),
        "base": sleepy(0.004),
        "liar": lambda i: lambda: i.sum() + 1,
        "absent": absent,
        "broken": broken,
        "never": never,
    }
    rows, skipped = runner.measure(spec_of(contenders), Case("c", {"n": 4}), "cpu", budget=0.1)
    by_name = {row["contender"]: row for row in rows}
    assert list(by_name) == [f"{OURS} native", "base", "liar", "copy"]
    assert [row["role"] for row in rows] == ["protofast", "baseline", "baseline", "limit"]
    assert by_name["liar"]["wrong"]
    assert by_name["liar"]["error"] == 1.0
    assert not by_name["base"]["wrong"]
    assert set(by_name[f"{OURS} native"]["faster_than"]) == {"base", "copy"}  # not than a wrong one
    assert by_name["base"]["faster_than"] == {}
    assert by_name["copy"]["times_limit"]["p50"] == 1.0
    assert {s["contender"]: s["reason"] for s in skipped} == {
        "absent": "No module named 'elsewhere'",
        "broken": "ZeroDivisionError: division by zero",
        "never": "not on Sundays",
    }
    left = runner.measure(spec_of(contenders), Case("c", {"n": 4}), "cpu", backends=("reference",), budget=0.05)[0]
    assert f"{OURS} native" not in {row["contender"] for row in left}


@pytest.fixture
def result(tmp_path, monkeypatch) -> dict:
    """A run of the toy spec, with its files in tmp_path."""
    target = Target("c", f"{OURS} native", "base", 1.0), Target("c", f"{OURS} native", None, 1e-9)
    contenders = {f"{OURS} native": sleepy(0.001), "base": sleepy(0.02)}
    monkeypatch.setitem(SPECS, "toy", spec_of(contenders, targets=target))
    monkeypatch.setattr(runner, "machine", lambda device: {"copy": 1e10, "matmul float32": 1e11})
    return runner.run(["toy"], device="cpu", out=tmp_path, name="here", budget=0.05)


def test_run_writes_everything(result: dict, tmp_path) -> None:
    saved = results.load(tmp_path / "here.json")
    assert saved == json.loads(json.dumps(result))
    assert saved["complete"]
    where = saved["environment"]
    assert where["versions"]["torch"] == torch.__version__
    assert {"python", "protofast", "numpy"} <= set(where["versions"])
    assert where["hardware"]["cores"] >= 1
    assert where["flags"]["threads"] == torch.get_num_threads()
    assert isinstance(where["flags"]["tf32_matmul"], bool)
    assert [t["met"] for t in saved["targets"]] == [True, False]
    table = list(csv.DictReader(io.StringIO((tmp_path / "here.csv").read_text())))
    assert [row["contender"] for row in table] == [row["contender"] for row in saved["rows"]]
    assert float(table[0]["seconds_p50"]) == saved["rows"][0]["seconds"]["p50"]
    assert float(table[0]["times faster than base"]) == saved["rows"][0]["faster_than"]["base"]["p50"]
    text = (tmp_path / "here.md").read_text()
    assert "## toy" in text
    assert "| **no** |" in text
    assert not list(tmp_path.glob(".*"))  # no temporary left


def test_stopped_run_keeps_its_cases(tmp_path, monkeypatch) -> None:
    two = spec_of({"base": sleepy(0.001)})
    object.__setattr__(two, "cases", (Case("c", {}), Case("d", {})))
    monkeypatch.setitem(SPECS, "toy", two)
    monkeypatch.setattr(runner, "machine", lambda device: {"copy": 1e10})

    def stop(done: int, total: int, label: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(["toy"], device="cpu", out=tmp_path, name="here", budget=0.01, progress=stop)
    kept = results.load(tmp_path / "here.json")
    assert not kept["complete"]
    assert {row["case"] for row in kept["rows"]} == {"c"}
    assert "stopped before its end" in results.to_markdown(kept)


def test_compare_finds_regressions_beyond_noise(result: dict) -> None:
    table, regressions = results.compare(result, result)
    assert regressions == 0
    assert table.count("| same |") == 2

    def scaled(factor: float, limit: float = 1.0) -> dict:
        new = json.loads(json.dumps(result))
        for row in new["rows"]:
            by = limit if row["role"] == "limit" else factor * limit
            row["seconds"] = {q: v * by for q, v in row["seconds"].items()}
            row["times_limit"] = {q: v * by / limit for q, v in row["times_limit"].items()}
        return new

    assert results.compare(scaled(100), result)[1] == 1  # the baseline's is no regression of ours
    assert "| faster |" in results.compare(scaled(0.001), result)[0]
    assert results.compare(scaled(1.0, limit=3.0), result)[1] == 0  # a slower machine is not a slower kernel
    elsewhere = scaled(1.0)
    elsewhere["environment"]["hardware"]["cpu"] = "another"
    elsewhere["environment"]["flags"]["threads"] = 77
    table = results.compare(result, elsewhere)[0]
    assert "was on another" in table
    assert "The settings differ: threads 77 then, " in table


def test_plots_come_from_the_file(result: dict, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw(tmp_path / "here.json")
    assert [path.name for path in drawn] == ["here-toy.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_errors_name_the_argument(tmp_path) -> None:
    for settings, text in (
        ({"ops": ["nothing"]}, "op is 'nothing'; choose from ddim_step"),
        ({"shapes": "huge"}, "shapes is 'huge'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"backends": ["cudnn"]}, "backend is 'cudnn'"),
        ({"threads": 0}, "threads is 0"),
        ({"ops": ["import"], "device": "cuda"}, "device is 'cuda'" if DEVICES == ["cpu"] else "import is measured on"),
    ):
        settings = {"device": "cpu", **settings}
        with pytest.raises((ValueError, RuntimeError), match=text):
            runner.run(**settings, out=tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no benchmark result"):
        results.load(broken)
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is no benchmark result"):
        results.load(broken)


def test_memory_sees_what_a_call_takes() -> None:
    size = 1 << 25
    for device in DEVICES:
        taken = memory.peak(lambda device=device: torch.ones(size // 4, device=device), device)
        if taken is None:
            pytest.skip("no /proc/self/clear_refs here")
        assert 0.9 * size < taken < 2 * size
        assert memory.peak(lambda: None, device) < size / 8


def test_times_have_units() -> None:
    assert [results.seconds(v) for v in (2e-9, 1.5e-5, 0.25, 12.0)] == ["2 ns", "15 µs", "250 ms", "12 s"]


def test_command(result: dict, tmp_path) -> None:
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    from protofast.bench.command import bench

    app = typer.Typer()
    app.command()(bench)
    call = testing.CliRunner().invoke
    assert all(op in call(app, ["--list"]).output for op in SPECS)
    settings = ["toy", "--device", "cpu", "--name", "again", "--budget", "0.05", "--out", str(tmp_path)]
    done = call(app, [*settings, "--compare", str(tmp_path / "here.json")])
    assert done.exit_code in (0, 2), done.output  # 2 is a regression, which a busy machine can show
    assert "| new / old |" in done.output
    assert (tmp_path / "again.md").exists()
    assert "here-toy.png" in call(app, ["--redraw", str(tmp_path / "here.json")]).output
