"""The prototype benchmark: its reference, its drawn shapes, and the medians it promises."""

import itertools
import math

import pytest
import torch

from protofast.bench import results, runner
from protofast.bench.spec import OURS, Case, Median, Skip
from protofast.bench.specs import SPECS
from protofast.bench.specs import prototype as module

SPEC = SPECS["prototype_activation"]


@pytest.mark.parametrize("case", SPEC.tiny, ids=lambda case: case.name.replace(" ", "_"))
def test_reference_is_that_of_a_plain_loop(case: Case) -> None:
    inputs = SPEC.inputs(case, "cpu", 1)
    x, p = inputs.x.detach().double(), inputs.p.detach().double()
    activation = SPEC.reference(inputs)[0]
    kernel = case.params["kernel"]
    p = p if p.ndim == 4 else p[:, :, None, None]
    rows, columns = (s - kernel + 1 for s in x.shape[2:])
    assert activation.shape == inputs.weight.shape
    for b, q in itertools.product(range(x.shape[0]), range(p.shape[0])):
        distances = []
        for i, j in itertools.product(range(rows), range(columns)):
            window = x[b, :, i : i + kernel, j : j + kernel]
            if case.params["metric"] == "cosine":
                d = 1 - float((window * p[q]).sum() / (window.square().sum() * p[q].square().sum()).sqrt())
            else:
                d = float((window - p[q]).square().sum())
            distances.append(d)
        best = sorted(distances)[: case.params["topk"]]
        wanted = [-d if case.params["metric"] == "cosine" else math.log((d + 1) / (d + 1e-4)) for d in best]
        assert activation[b, q].reshape(-1).tolist() == pytest.approx(wanted, rel=1e-10)


def test_drawn_shapes_follow_the_seed() -> None:
    cases = SPEC.drawn(7)
    assert cases == SPEC.drawn(7)
    assert {c.params["shape"] for c in cases}.isdisjoint(c.params["shape"] for c in SPEC.drawn(8))
    assert [c.params["train"] for c in cases] == [False, True] * 3
    for forward, train in zip(cases[::2], cases[1::2], strict=True):
        assert "(seed 7)" in forward.name
        assert forward.quick
        assert forward.params["goal"]
        assert forward.params["shape"] == train.params["shape"]
    for seed in range(20):
        names = [c.name for c in (*SPEC.cases, *SPEC.drawn(seed))]
        assert len(set(names)) == len(names)
        for case in SPEC.drawn(seed):
            b, d, *sides = case.params["shape"]
            assert 1e8 <= 2 * b * d * math.prod(sides) * case.params["p"] <= 2e9


def test_goals_count_the_named_shapes() -> None:
    for train in (False, True):
        counted = {c.params["shape"] for c in SPEC.cases if c.params["goal"] and c.params["train"] == train and c.quick}
        assert {(80, 128, 7, 7), (64, 128, 26, 26), (16, 128, 43, 43), (32, 512, 14, 14)} <= counted
    for median in SPEC.medians:
        ours = (median.contender,) if isinstance(median.contender, str) else median.contender
        assert set(ours) <= set(SPEC.contenders)
        assert median.device == "cpu" or {f"{OURS} native", f"{OURS} triton"} == set(ours)
        assert median.against in {*SPEC.contenders, *SPEC.limits}
        cases = [c for c in SPEC.cases if c.quick and all(c.params[k] == v for k, v in median.where.items())]
        assert cases, median


def test_bf16_searches_float32_features_without_gradients() -> None:
    prepare = SPEC.contenders[f"{OURS} native bf16"]
    assert f"{OURS} reference bf16" not in SPEC.contenders
    for case in SPEC.tiny:
        inputs = SPEC.inputs(case, "cpu", 0)
        if inputs.train or inputs.x.dtype != torch.float32:
            with pytest.raises(Skip):
                prepare(inputs)


def test_reference_is_no_contender_where_it_takes_seconds() -> None:
    large = next(c for c in SPEC.cases if c.params["shape"] == (80, 128, 7, 7))
    inputs = SPEC.inputs(large, "cpu", 0)
    with pytest.raises(Skip, match="takes seconds"):
        SPEC.contenders[f"{OURS} reference"](inputs)


def test_limits_multiply_what_the_search_does() -> None:
    windows = next(c for c in SPEC.tiny if c.params["kernel"] == 3)
    inputs = SPEC.inputs(windows, "cpu", 0)
    assert module._sizes(inputs) == (3 * 2 * 2, 5, 8 * 9)
    assert SPEC.limits["matmul"](inputs)().shape == (12, 5)
    assert SPEC.limits["batched matmul"](inputs)().shape == (3, 5, 4)


# --- medians -----------------------------------------------------------------------------------------------------


def row(
    case: str,
    contender: str,
    *,
    faster: float | None = None,
    peak: int | None = None,
    returned: int | None = None,
    wrong=False,
    **params,
):
    return {
        "op": "prototype_activation",
        "case": case,
        "params": {"goal": True, **params},
        "contender": contender,
        "wrong": wrong,
        "faster_than": {} if faster is None else {"papers": {"p50": faster}},
        "peak_memory": peak,
        "returned": returned,
    }


def check(rows: list[dict], monkeypatch, *medians: Median, device: str = "cpu") -> list[dict]:
    monkeypatch.setitem(SPEC.__dict__, "medians", medians)
    return results.check_medians(SPEC, device, rows)


def test_median_over_cases(monkeypatch) -> None:
    rows = [row(f"c{i}", "ours", faster=value) for i, value in enumerate((2.0, 9.0, 11.0))]
    rows += [row(f"c{i}", "papers") for i in range(3)]
    rows += [row("elsewhere", "ours", faster=100.0), row("elsewhere", "papers")]
    for other in rows[-2:]:
        other["params"] = {"goal": False}
    speed = [Median("forward", {"goal": True}, "ours", "papers", bound) for bound in (9.0, 9.5)]
    met, missed = check(rows, monkeypatch, *speed)
    assert (met["measured"], met["worst"], met["met"]) == (9.0, 2.0, True)
    assert met["case"] == "forward, median of 3 of 3 cases"
    assert not missed["met"]
    assert check(rows, monkeypatch, *speed, device="cuda") == []
    rows[2]["wrong"] = True  # the best case no longer counts, and neither does the promise hold
    (left,) = check(rows, monkeypatch, Median("forward", {"goal": True}, "ours", "papers", 1.0))
    assert (left["measured"], left["met"]) == (5.5, False)
    assert left["case"].endswith("2 of 3 cases")
    (absent,) = check(rows, monkeypatch, Median("forward", {"goal": True}, "nobody", "papers", 1.0))
    assert (absent["measured"], absent["met"]) == (None, False)
    text = [results._target(met), results._measured(met), results._measured(absent)]
    assert text[0].endswith("forward, median of 3 of 3 cases: ours ≥ 9× as fast as papers")
    assert text[1:] == ["9× (worst 2×)", "not measured"]
    (slower,) = check(rows[:2] + rows[3:], monkeypatch, Median("forward", {"goal": True}, "ours", "papers", 0.8))
    assert results._target(slower).endswith("ours ≤ 1.25× the time of papers")


def test_median_of_memory_leaves_out_what_drowns(monkeypatch) -> None:
    rows = []
    for i, (mine, theirs) in enumerate(((1, 100), (4, 100), (30, 100))):
        rows += [row(f"c{i}", "ours", peak=mine << 20), row(f"c{i}", "papers", peak=theirs << 20)]
    rows += [row("small", "ours", peak=1 << 19), row("small", "papers", peak=1 << 19)]
    memory = [Median("forward", {}, "ours", "papers", bound, of="peak_memory") for bound in (0.05, 0.03)]
    met, missed = check(rows, monkeypatch, *memory)
    assert (met["measured"], met["worst"], met["met"], missed["met"]) == (0.04, 0.3, True, False)
    assert met["case"] == "forward, median of 3 of 3 cases"
    assert results._target(met).endswith("ours ≤ 5 % of the peak memory of papers")
    assert results._measured(met) == "4 % (worst 30 %)"


def test_median_of_memory_beyond_what_is_returned(monkeypatch) -> None:
    rows = []
    for i, (mine, theirs) in enumerate(((21, 120), (24, 120), (19, 120))):
        rows += [row(f"c{i}", "ours", peak=mine << 20, returned=20 << 20)]
        rows += [row(f"c{i}", "papers", peak=theirs << 20, returned=20 << 20)]
    rows += [row("small", "ours", peak=21 << 20, returned=1), row("small", "papers", peak=21 << 20, returned=21 << 20)]
    extra, whole = (Median("train", {}, "ours", "papers", 0.05, of=of) for of in ("extra_memory", "peak_memory"))
    met, missed = check(rows, monkeypatch, extra, whole)
    assert (met["measured"], met["worst"], met["met"]) == (0.01, 0.04, True)
    assert met["case"] == "train, median of 3 of 3 cases"
    assert not missed["met"]
    assert results._target(met).endswith("≤ 5 % of the peak memory of papers, of both without what they return")
    assert results._measured(met) == "1 % (worst 4 %)"


def test_median_of_the_best_of_several(monkeypatch) -> None:
    rows = [row(f"c{i}", "papers", peak=100 << 20) for i in range(3)]
    rows += [row(f"c{i}", "one", faster=v, peak=v << 20) for i, v in enumerate((2, 9, 4))]
    rows += [row("c0", "two", faster=7, peak=1 << 20), row("c1", "two", faster=99, wrong=True, peak=1 << 20)]
    speed = Median("forward", {}, ("one", "two"), "papers", 7)
    memory = Median("forward", {}, ("one", "two"), "papers", 0.04, of="peak_memory")
    fast, small = check(rows, monkeypatch, speed, memory)
    assert (fast["measured"], fast["worst"], fast["met"]) == (7, 4, True)
    assert (small["measured"], small["worst"], small["met"]) == (0.04, 0.09, True)
    assert results._target(fast).endswith("median of 3 of 3 cases: one or two ≥ 7× as fast as papers")


def test_a_run_states_its_medians(monkeypatch, tmp_path) -> None:
    tiny = tuple(c for c in SPEC.tiny if c.name.endswith("float32"))
    fields = {
        "cases": tiny,
        "drawn": lambda seed: (module._case(f"drawn (seed {seed})", 2, 8, 3, 4, goal=True),),
        "contenders": {name: SPEC.contenders[name] for name in (f"{OURS} reference", "papers")},
        "medians": (Median("forward", {"goal": True}, f"{OURS} reference", "papers", 1e-6),),
    }
    for name, value in fields.items():
        monkeypatch.setitem(SPEC.__dict__, name, value)
    monkeypatch.setattr(runner, "machine", lambda device: {"copy": 1e10})
    result = runner.run([SPEC.op], device="cpu", out=tmp_path, name="here", budget=0.02, seed=5)
    assert {r["case"] for r in result["rows"]} == {tiny[0].name, "drawn (seed 5) 2x8x3x3 P=4 float32"}
    (median,) = result["targets"]
    assert median["met"]
    assert "| prototype_activation forward, median of 1 of 1 cases:" in (tmp_path / "here.md").read_text()


def test_shapes_are_drawn_anew_without_a_seed(monkeypatch, tmp_path) -> None:
    seeds = []

    def inputs(case: Case, device: str, seed: int):
        seeds.append(seed)
        return inputs_of(case, device, seed)

    inputs_of = SPEC.inputs
    fields = {
        "cases": (),
        "drawn": lambda number: (module._case(f"drawn (seed {number})", 2, 8, 3, 4),),
        "contenders": {"papers": SPEC.contenders["papers"]},
        "medians": (),
        "inputs": inputs,
    }
    for name, value in fields.items():
        monkeypatch.setitem(SPEC.__dict__, name, value)
    monkeypatch.setattr(runner, "machine", lambda device: {"copy": 1e10})
    found = []
    for seed in (None, None, 0, 0):
        found.append(runner.run([SPEC.op], device="cpu", out=tmp_path, name="here", budget=0.01, seed=seed))
        assert results.load(tmp_path / "here.json")["drawn"] == found[-1]["drawn"]
        assert {r["case"] for r in found[-1]["rows"]} == {f"drawn (seed {found[-1]['drawn']}) 2x8x3x3 P=4 float32"}
    drawn = [result["drawn"] for result in found]
    assert drawn[0] != drawn[1]  # one in a million
    assert drawn[2:] == [0, 0]
    assert {result["seed"] for result in found} == set(seeds) == {0}
    assert {r["returned"] for r in found[0]["rows"] if r["contender"] == "papers"} == {2 * 4 * 4}


def test_harder_inputs_are_what_they_are_named() -> None:
    cases = {c.params["inputs"]: c for c in SPEC.cases if c.params["inputs"] != "uniform"}
    assert set(cases) == {"clusters", "background", "outlier"}
    for case in cases.values():
        assert case.params["shape"] == (8, 128, 26, 26)
        assert (case.params["p"], case.params["dtype"], case.params["train"]) == (100, "float32", False)
        assert not case.params["goal"]
        assert not case.quick
    made = {name: SPEC.inputs(case, "cpu", 0) for name, case in cases.items()}
    x, p = made["clusters"].x, made["clusters"].p
    assert ((x.abs() - 1).abs() < 0.01).all()
    assert (x.sign() == x.sign()[:, :1]).all()
    assert 0.3 < (x > 0).float().mean() < 0.7
    nearest = torch.cdist(p.double(), x.movedim(1, -1).flatten(0, -2).double()).amin(1)
    assert (nearest - 1e-3 * 128**0.5).abs().max() < 5 * 1e-3 * 0.5**0.5  # chi of 128 degrees of freedom
    flat = made["background"].x.movedim(1, -1).flatten(1, -2)
    patches, counts = flat.flatten(0, 1).unique(dim=0, return_counts=True)
    background = patches[counts.argmax()]
    assert ((flat == background).all(2).sum(1) - 26 * 26 * 3 // 4).abs().max() <= 1
    assert (counts > 1).sum() == 1
    largest = made["outlier"].x.movedim(1, -1).flatten(1, -2).amax(2)
    assert ((largest > 1).sum(1) == 1).all()
    assert (largest.amax(1) > 500).all()


@pytest.mark.parametrize("name", ["clusters", "background", "outlier"])
def test_harder_inputs_have_the_right_winners(name: str) -> None:
    inputs = SPEC.inputs(module._case(name, 2, 32, 9, 7, inputs=name), "cpu", 0)
    output = SPEC.contenders[f"{OURS} reference"](inputs)()
    assert SPEC.error(output, SPEC.reference(inputs), inputs) <= 1e-6


def test_backends_choose_among_variants_too() -> None:
    rows, skipped = runner.measure(SPEC, SPEC.tiny[0], "cpu", backends=("reference",), budget=0.01)
    names = {r["contender"] for r in rows} | {s["contender"] for s in skipped}
    assert {n for n in names if n.startswith(OURS)} == {f"{OURS} reference"}
