"""The installs, and what the compiled library asks of torch. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = find_spec("protofast._C")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90a", "100a", "120a")

# An editable install of the checkout would lend its compiled library to an install that has none.
WITHOUT_CHECKOUT = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]; "

needs_library = pytest.mark.skipif(LIBRARY is None, reason="protofast._C is not built")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that it leaves nothing in the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("csrc", "protofast"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("CXX", "CUDA_HOME", "CUDA_PATH", "PROTOFAST_BACKEND", "PROTOFAST_CPU_ISA")
    env = {k: v for k, v in os.environ.items() if k not in names} | environment
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def install(source: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    target = source.parent / "target"
    command = (sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", target, *options, source)
    return run(*command, cwd=source.parent, **environment)


def report(source: Path) -> str:
    """Why the backend "native" of the install is absent; empty if it is there."""
    code = WITHOUT_CHECKOUT + "import protofast as pf; print(pf.__file__, "
    code += "pf._backend.survey().reasons.get('native', ''), sep='|')"
    done = run(sys.executable, "-c", code, cwd=source.parent, PYTHONPATH=str(source.parent / "target"))
    assert done.returncode == 0, done.stderr
    file, reason = done.stdout.strip().split("|", 1)
    assert file.startswith(str(source.parent)), "another protofast was imported"
    return reason


def empty_directory(source: Path) -> str:
    (source.parent / "nothing").mkdir()
    return str(source.parent / "nothing")


def torch_that_fails(source: Path) -> str:
    """A directory whose torch cannot be imported, as in pip's isolated builds."""
    (source.parent / "shadow" / "torch").mkdir(parents=True)
    (source.parent / "shadow" / "torch" / "__init__.py").write_text("raise ImportError('no torch here')\n")
    return str(source.parent / "shadow")


@pytest.mark.parametrize("case", ["asked for", "no compiler", "no torch"])
def test_lesser_install_works_and_says_so(source, case):
    environment = {
        "asked for": lambda: {"PROTOFAST_BUILD_NATIVE": "0"},
        "no compiler": lambda: {"PATH": empty_directory(source)},
        "no torch": lambda: {"PYTHONPATH": torch_that_fails(source)},
    }[case]()
    done = install(source, "--no-build-isolation", **environment)
    assert done.returncode == 0, done.stderr
    said = set(re.findall("protofast: installing without the compiled kernels: .*", done.stdout + done.stderr))
    assert len(said) == 1
    assert {"asked for": "PROTOFAST_BUILD_NATIVE=0", "no compiler": "no C++ compiler", "no torch": "torch is not"}[
        case
    ] in said.pop()
    reason = report(source)
    assert "was not built" in reason
    assert "pip install --no-build-isolation" in reason


@pytest.mark.slow
def test_isolated_install_is_pure_python(source):
    done = install(source)
    if re.search("No matching distribution|Could not find a version", done.stdout + done.stderr):
        pytest.skip("the build requirements cannot be fetched here")
    assert done.returncode == 0, done.stderr
    assert "was not built" in report(source)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_install(source):
    done = install(source, "--no-build-isolation", PROTOFAST_BUILD_CUDA="0", MAX_JOBS="2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert report(source) == ""
    code = "from protofast import _C; print(*(op for op, on in _C.build_info()['kernels'].items() if on == ['cpu']))"
    done = run(
        sys.executable,
        "-c",
        WITHOUT_CHECKOUT + "import torch; " + code,
        cwd=source.parent,
        PYTHONPATH=str(source.parent / "target"),
    )
    assert done.stdout.split() == [
        *("ddim_step", "ddim_step_out", "ddim_coefficients", "philox_normal"),
        *("prototype_activation", "prototype_backward", "prototype_map", "k_center", "cover", "relax"),
        *("farthest_pair", "max_min_swaps", "max_sum", "k_medoids", "channel_purity", "channel_purity_backward"),
    ]


def test_failing_compiler_is_an_error(source):
    done = install(source, "--no-build-isolation", CXX=shutil.which("false") or "false", PROTOFAST_BUILD_CUDA="0")
    assert done.returncode != 0
    assert not (source.parent / "target" / "protofast").exists()


@pytest.mark.parametrize("missing", ["nvcc", "compiler", "torch"])
def test_force_cuda_names_the_cure(source, missing):
    script = source / "setup.py"
    script.write_text(script.read_text().replace('"/usr/local/cuda"', '"/nonexistent"'))
    compilers = source.parent / "compilers"
    compilers.mkdir()
    if missing == "nvcc":
        (compilers / "c++").symlink_to(shutil.which("true") or "/bin/true")
    environment = {"PATH": str(compilers), "PROTOFAST_FORCE_CUDA": "1"}
    if missing == "torch":
        environment["PYTHONPATH"] = torch_that_fails(source)
    done = run(sys.executable, "setup.py", "--name", cwd=source, **environment)
    assert done.returncode != 0
    cure = {"nvcc": "set CUDA_HOME", "compiler": "install g++", "torch": "install torch"}[missing]
    assert "PROTOFAST_FORCE_CUDA=1" in done.stderr
    assert cure in done.stderr


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not here")
def test_library_uses_the_stable_abi_only():
    names = subprocess.check_output(["nm", "-D", "--undefined-only", LIBRARY.origin], text=True)
    symbols = [line.split()[-1].split("@")[0] for line in names.splitlines()]
    torch_symbols = [s for s in symbols if "torch" in s or "c10" in s]
    assert "torch_library_impl" in torch_symbols, "nm shows none of the symbols that must be there"
    assert [s for s in torch_symbols if not s.startswith(("aoti_torch_", "torch_"))] == []
    assert [s for s in symbols if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", s)] == []
    assert [s for s in symbols if s.startswith(("cuda", "cu")) and not s.startswith("cur")] == []  # cudart is static


@needs_library
def test_build_info():
    from protofast import _C

    info = _C.build_info()
    assert "cpu" in info["kernels"]["ddim_step"]
    assert info["isa"] in ("plain", "avx2", "avx512", "avx512vnni", "avx512bf16")
    assert info["torch_abi"] == "2.11"
    assert info["cxx"] >= 20
    assert (info["cuda"] is None) == (info["cuda_archs"] is None) == ("cuda" not in info["kernels"]["ddim_step"])


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize("source_file", sorted((ROOT / "csrc").glob("cuda/*.cu")), ids=lambda path: path.name)
def test_cuda_compiles_without_spills(source_file, tmp_path):
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    options = [
        "-std=c++20",
        "-O3",
        "-fmad=false",
        "-Xptxas=-v",
        "--threads=2",
        *gencode,
        "-c",
        "-o",
        str(tmp_path / "object.o"),
    ]
    done = subprocess.run([NVCC, *options, str(source_file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    kernels = len(set(re.findall(r"entry function '(\w+)' for", done.stderr)))
    assert kernels > 0
    assert len(spills) >= kernels * len(ARCHS)
    assert set(spills) == {("0", "0")}, done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
def test_cuda_keeps_the_bits_it_promises(tmp_path):
    """No contraction where other backends have none, and roots and quotients rounded correctly."""
    assert '"-fmad=false"' in (ROOT / "setup.py").read_text()
    options = ["-std=c++20", "-O3", "-fmad=false", "-arch=sm_90", "-ptx", "-o", str(tmp_path / "kernels.ptx")]
    subprocess.run([NVCC, *options, str(ROOT / "csrc/cuda/ddim_step.cu")], check=True, timeout=300)
    bodies = re.split(r"\.entry ", (tmp_path / "kernels.ptx").read_text())[1:]
    exact = [body for body in bodies if re.match(r"\w*(normal|coefficients)_kernel", body)]
    assert len(exact) == 5
    for body in bodies:
        assert not re.search(r"(sqrt|div)\.(approx|full)", body)
        if body in exact:
            assert "fma." not in body
            assert "sqrt.rn" in body


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("simt", {"": "fma.rn.f(32|64)"}, "mma.sync"),
        (
            "tf32",
            {r"ArithmeticE[12]E": r"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"},
            r"\.(bf16|f16)\.",
        ),
        (
            "half",
            {
                r"ArithmeticE3E": r"m16n8k16.row.col.f32.bf16.bf16.f32",
                r"ArithmeticE4E": r"m16n8k16.row.col.f32.f16.f16",
            },
            "tf32",
        ),
    ],
)
def test_the_search_multiplies_as_its_precision_says(name, wanted, unwanted, tmp_path):
    """Every screening kernel has the instruction of its arithmetic, and none of another's."""
    target = tmp_path / "kernels.ptx"
    options = ["-std=c++20", "-O3", "-fmad=false", "-arch=sm_80", "-ptx", "-o", str(target)]
    subprocess.run([NVCC, *options, str(ROOT / f"csrc/cuda/prototype_{name}.cu")], check=True, timeout=300)
    bodies = [b for b in re.split(r"\.entry ", target.read_text())[1:] if re.match(r"\w*screen_", b)]
    assert len(bodies) == {"simt": 12, "tf32": 6, "half": 12}[name]
    for body in bodies:
        kinds = [instruction for kind, instruction in wanted.items() if re.match(rf"\w*{kind}", body)]
        assert len(kinds) == 1
        assert re.search(kinds[0], body)
        assert not re.search(unwanted, body)
