"""Tiny cases under pytest-benchmark: that every contender still runs. Nothing is asserted of the times."""

import pytest

from protofast.bench.spec import OURS, UNABLE
from protofast.bench.specs import SPECS

CASES = [(op, name) for op, spec in SPECS.items() if "cpu" in spec.devices for name in spec.contenders]


@pytest.mark.parametrize(("op", "name"), CASES, ids=["-".join(case).replace(" ", "_") for case in CASES])
def test_contender(benchmark, op: str, name: str) -> None:
    spec = SPECS[op]
    if "compile" in name or op == "import":
        pytest.skip("takes seconds to start; tests/test_bench.py covers it")
    benchmark.group = f"{op} {spec.tiny[0].name}"
    benchmark.extra_info["role"] = "protofast" if name.startswith(OURS) else "baseline"
    inputs = spec.inputs(spec.tiny[0], "cpu", 0)
    try:
        call = spec.contenders[name](inputs)
        call()
    except UNABLE as why:
        pytest.skip(str(why))
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
