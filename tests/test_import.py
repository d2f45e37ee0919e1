"""`import protofast` needs no compiled library, no Triton and no optional dependency, and starts no GPU."""

import sys

import pytest
from helpers.fresh import run_fresh

OPTIONAL = (
    "triton",
    "sklearn",
    "scipy",
    "matplotlib",
    "typer",
    "rich",
    "diffusers",
    "PIL",
    "pandas",
    "jinja2",
    "pyarrow",
)


def _imported() -> tuple[list[str], bool]:
    before = set(sys.modules)
    import torch

    with_torch = set(sys.modules)
    import protofast as pf

    pf.backend_info()
    new = {name.partition(".")[0] for name in set(sys.modules) - with_torch}
    assert not before & set(OPTIONAL), "the interpreter itself starts with an optional dependency"
    return sorted(new & set(OPTIONAL)), torch.cuda.is_initialized()


def test_imports_no_optional_dependency_and_starts_no_gpu():
    optional, gpu_started = run_fresh(_imported)
    assert optional == []
    assert not gpu_started


class _Finder:
    """Stands in for a module that is absent, or there but broken."""

    def __init__(self, name: str, error: type[Exception], message: str) -> None:
        self.name, self.error, self.message = name, error, message

    def find_spec(self, name, path=None, target=None):
        if name == self.name or name.startswith(self.name + "."):
            raise self.error(self.message)


def _step_without(module: str, error: type[Exception], message: str) -> tuple[str, str, list[float]]:
    sys.meta_path.insert(0, _Finder(module, error, message))  # type: ignore[arg-type]
    import torch

    import protofast as pf

    schedule = pf.DDIMSchedule.linear(10)
    x, e = torch.ones(1, 2), torch.zeros(1, 2)
    info = pf.backend_info()
    result = pf.ddim_step(x, e, 5, 4, schedule).prev_sample
    try:
        pf.ddim_step(x, e, 5, 4, schedule, backend="native")
    except pf.BackendUnavailableError as refusal:
        return info.ops["ddim_step"]["cpu"], str(refusal), result[0].tolist()
    return info.ops["ddim_step"]["cpu"], "", result[0].tolist()


@pytest.mark.parametrize(
    ("error", "message", "says"),
    [
        (ModuleNotFoundError, "No module named 'protofast._C'", "was not built"),
        (ImportError, "undefined symbol: torch_library_impl", "does not load (undefined symbol: torch_library_impl)"),
    ],
)
def test_works_without_the_compiled_library(error, message, says):
    chosen, refusal, values = run_fresh(_step_without, "protofast._C", error, message)
    assert chosen == "reference"
    assert says in refusal
    assert "pip install --no-build-isolation" in refusal
    assert values == pytest.approx(run_fresh(_step_without, "nothing", ImportError, "")[2], rel=1e-6)


def test_works_without_triton():
    chosen, _, values = run_fresh(_step_without, "triton", ModuleNotFoundError, "No module named 'triton'")
    assert chosen in ("native", "reference")
    assert len(values) == 2
