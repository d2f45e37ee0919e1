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


def _never_installed() -> tuple[str, str]:
    import importlib.metadata

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    importlib.metadata.version = version
    import protofast as pf

    return pf.__version__, str(pf._backend.survey())


def test_works_in_a_checkout_that_was_never_installed():
    version, info = run_fresh(_never_installed)
    assert version == "not installed"
    assert info.startswith("protofast not installed  torch ")


def _said_without(module: str, message: str) -> str:
    sys.meta_path[:] = [_Without(finder, module, message) for finder in sys.meta_path]
    import protofast as pf

    return str(pf._backend.survey())


def test_info_says_each_thing_once_and_no_path():
    said = run_fresh(_said_without, "protofast._C", "/somewhere/protofast/_C.so: undefined symbol: x")
    assert said.count("does not load (_C.so: undefined symbol: x)") == 1
    assert "pip install --no-build-isolation" in said
    assert "/somewhere" not in said
    assert "GPU  " in said
    reasons = [line for line in said.splitlines() if line.startswith("- ")]
    assert len(reasons) <= 2, "one line a backend and cause"
    assert all("use backend=" in line for line in reasons)


def test_an_unknown_backend_in_the_environment_is_refused():
    with pytest.raises(AssertionError, match=r"PROTOFAST_BACKEND is 'gpu'; choose one of 'reference', 'native'"):
        run_fresh(_said_without, "nothing", "", PROTOFAST_BACKEND="gpu")


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
