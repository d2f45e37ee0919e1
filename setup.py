"""Builds protofast._C from csrc/; everything else is in pyproject.toml.

Without torch in the build environment, or without a C++ compiler, the install is pure Python: it works, on the
reference and Triton backends. A compiler that is there and fails is an error.

PROTOFAST_BUILD_NATIVE=0  pure Python
PROTOFAST_BUILD_CUDA=0    no CUDA kernels, even where nvcc is found
PROTOFAST_FORCE_CUDA=1    a missing nvcc, compiler or torch is an error
TORCH_CUDA_ARCH_LIST      GPU architectures, as in torch
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
FORCE_CUDA = os.environ.get("PROTOFAST_FORCE_CUDA") == "1"
REINSTALL = "pip install --no-build-isolation --no-deps --force-reinstall ."


def say(message: str) -> None:
    print(f"protofast: {message}", file=sys.stderr)


def missing() -> str | None:
    """What a native build lacks, and the cure."""
    if os.environ.get("PROTOFAST_BUILD_NATIVE") == "0":
        return "PROTOFAST_BUILD_NATIVE=0 asks for it"
    if sys.platform == "win32":
        return "the compiled kernels are for Linux and macOS"
    try:
        import torch  # noqa: F401
    except ImportError:
        return f"torch is not importable in the build environment; install torch and ninja there, then `{REINSTALL}`"
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        return f"no C++ compiler was found; install g++ 11 or clang 14 or newer (or set CXX), then `{REINSTALL}`"
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, that of the nvcc on PATH (it may be a wrapper, so it is asked), /usr/local/cuda."""
    if os.environ.get("PROTOFAST_BUILD_CUDA") == "0" and not FORCE_CUDA:
        return None
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        if here := re.search(r"_HERE_=(.+)", plan):
            places.append(os.path.dirname(here[1].strip()))
    for place in [*places, "/usr/local/cuda"]:
        if place and (Path(place) / "bin" / "nvcc").exists():
            return Path(place)
    return None


def native() -> dict:
    from torch.utils import cpp_extension
    from torch.version import cuda as torch_cuda

    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # loads on torch 2.11 and newer
    library_dirs, link = cpp_extension.library_paths(), []
    home = cuda_home()
    if home is None and FORCE_CUDA:
        raise SystemExit(
            "protofast: PROTOFAST_FORCE_CUDA=1, but no nvcc was found; install the CUDA toolkit, or set CUDA_HOME to it"
        )
    if home is not None:
        banner = subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True)
        version = re.search(r"release ([\d.]+)", banner)[1]
        if torch_cuda and torch_cuda.split(".")[0] != version.split(".")[0]:
            say(
                f"warning: nvcc is CUDA {version}, torch is built for CUDA {torch_cuda}; the kernels need a driver for "
                f"both. Set CUDA_HOME to a {torch_cuda} toolkit, or PROTOFAST_BUILD_CUDA=0"
            )
        cpp_extension.CUDA_HOME = str(home)  # torch looks for it only where torch itself has CUDA
        cpp_extension._check_cuda_version = lambda *_: None  # it makes an error of what is a warning above
        new = tuple(map(int, version.split("."))) >= (12, 8)
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a;10.0a;12.0a" if new else "8.0+PTX;9.0a")
        sources += [*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
        macros += [("PROTOFAST_CUDA", f'"{version}"'), ("PROTOFAST_CUDA_ARCHS", f'"{archs}"')]
        library_dirs += [str(home / "lib64")]
        link = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    # libtorch.so carries no symbol of ours, but brings libtorch_cuda.so where there is one.
    keep = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
    extension = Extension(
        "protofast._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/**/*.*h")),
        include_dirs=cpp_extension.include_paths(),
        define_macros=macros,
        library_dirs=library_dirs,
        extra_compile_args={
            "cxx": ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"],
            "nvcc": ["-std=c++20", "-O3", "-fmad=false", "--threads=2", "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=[*link, *keep, "-ltorch", "-ltorch_cpu", "-lc10"],
        language="c++",
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


lack = missing()
if lack and FORCE_CUDA:
    raise SystemExit(f"protofast: PROTOFAST_FORCE_CUDA=1, but {lack}")
if lack:
    say(f"installing without the compiled kernels: {lack}")
setup(**({} if lack else native()))
