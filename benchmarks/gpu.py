"""Builds protofast, runs its tests and benchmarks it on a machine with a GPU. One command, no network:

    python benchmarks/gpu.py [--only build,tests,bench] [--shapes quick|full] [--out benchmarks/results]

Needs Python, torch, numpy, scipy, pytest and hypothesis; uses Triton, nvcc, a C++ compiler, typer, matplotlib and
diffusers where they are there. Writes <gpu>.json, .csv and .md; ends with exit code 1 if a step failed, after the other
steps have run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = 77


def command(*arguments: str, **environment: str) -> int:
    """Runs in the checkout, with what is printed shown as it comes."""
    print("+", " ".join(arguments), flush=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(arguments, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths} | environment).returncode


def build(arguments: argparse.Namespace) -> str | None:
    """An editable install; where pip cannot, the extension and the metadata in place."""
    try:
        setuptools = version("setuptools")
    except PackageNotFoundError:
        setuptools = "0"
    if int(setuptools.split(".")[0]) < SETUPTOOLS:
        return f"setuptools is {setuptools} here and must be {SETUPTOOLS} or newer; a wheel of it on PYTHONPATH will do"
    import torch

    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    settings = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{suffix}")}
    nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
    if nvcc:
        settings["PROTOFAST_FORCE_CUDA"] = "1"
    else:
        print("no nvcc: the CUDA kernels are left out, the CPU's are built", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    if importlib.util.find_spec("pip") is not None and command(*pip, **settings) == 0:
        return None
    print("pip could not; building in place", flush=True)
    code = command(sys.executable, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace", **settings)
    return f"the build ended with code {code}" if code else None


def tests(arguments: argparse.Namespace) -> str | None:
    """The kernels' tests, with the GPU among the devices."""
    code = command(sys.executable, "-m", "pytest", "-q", "--maxfail=20", "tests", "-k", arguments.tests)
    return f"pytest ended with code {code}" if code else None


def bench(arguments: argparse.Namespace) -> str | None:
    """Every spec, in this process: it starts after the build."""
    from protofast.bench import run
    from protofast.bench.results import to_markdown

    def show(done: int, total: int, label: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {done}/{total} {label}", flush=True)

    result = run(shapes=arguments.shapes, device="cuda", out=arguments.out, budget=arguments.budget, progress=show)
    print(to_markdown(result))
    wrong = [f"{row['op']} {row['case']}: {row['contender']}" for row in result["rows"] if row["wrong"]]
    return f"wrong results: {'; '.join(wrong)}" if wrong else None


STEPS = {"build": build, "tests": tests, "bench": bench}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help="steps to take, of build, tests, bench")
    parser.add_argument("--shapes", choices=("quick", "full"), default="full")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a case")
    parser.add_argument("--tests", default="cuda or triton or gpu", help="pytest's -k: which tests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    steps = arguments.only.split(",")
    if unknown := set(steps) - STEPS.keys():
        parser.error(f"no step is called {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    try:
        import torch
    except ImportError:
        parser.exit(1, "torch is not installed here\n")
    if not torch.cuda.is_available():
        parser.exit(1, "torch sees no GPU here; on a CPU run `protofast bench`\n")
    sys.path.insert(0, str(ROOT))
    failed = {}
    for step, take in STEPS.items():
        if step not in steps:
            continue
        print(f"== {step}", flush=True)
        try:
            reason = take(arguments)
        except Exception as error:  # the other steps still run
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        if reason:
            failed[step] = reason
            print(f"{step}: {reason}", flush=True)
    for step, reason in failed.items():
        print(f"FAILED {step}: {reason}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
