"""`import protofast` needs no compiled library, no Triton and no optional dependency, and starts no GPU."""

import sys

import pytest
from helpers.fresh import run_fresh

# No protofast up here: the functions that run in a process of their own are found by importing this file.

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


class _Without:
    """An import finder in which a module is absent or, given a message, there but broken."""

    def __init__(self, finder, name: str, message: str) -> None:
        self.finder, self.name, self.message = finder, name, message

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return self.finder.find_spec(name, path, target)
        if self.message:
            raise ImportError(self.message)
        return None

    def __getattr__(self, name):  # what else finders do, such as finding distributions
        return getattr(self.finder, name)


def _step_without(module: str, message: str) -> tuple[str, str, list[float]]:
    sys.meta_path[:] = [_Without(finder, module, message) for finder in sys.meta_path]
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
    ("message", "says"),
    [
        ("", "was not built"),
        ("undefined symbol: torch_library_impl", "does not load (undefined symbol: torch_library_impl)"),
    ],
    ids=["absent", "broken"],
)
def test_works_without_the_compiled_library(message, says):
    chosen, refusal, values = run_fresh(_step_without, "protofast._C", message)
    assert chosen == "reference"
    assert says in refusal
    assert "pip install --no-build-isolation" in refusal
    import torch

    import protofast as pf

    schedule = pf.DDIMSchedule.linear(10)
    here = pf.ddim_step(torch.ones(1, 2), torch.zeros(1, 2), 5, 4, schedule).prev_sample
    assert values == pytest.approx(here[0].tolist(), rel=1e-6)


def test_works_without_triton():
    chosen, _, values = run_fresh(_step_without, "triton", "", PROTOFAST_BACKEND=None)
    assert chosen in ("native", "reference")
    assert len(values) == 2
