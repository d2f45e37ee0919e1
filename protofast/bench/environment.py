"""What a result must state to mean anything: versions, flags, hardware, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *("protofast", "torch", "triton", "numpy", "diffusers", "scipy", "scikit-learn"),
    *("torch-cluster", "torch-quickfps", "torch-fps", "fpsample", "gudhi", "skmatter", "kmedoids"),
    *("pykeops", "faiss-cpu"),
)


def environment(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a run on `device`."""
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {"machine": platform.machine(), "system": platform.system(), **_cpu(), **_gpu(device)},
        "flags": flags(),
        "load": load(),
    }


def name(device: str) -> str:
    """Short file name of the machine: the GPU's, or the CPU's."""
    label = torch.cuda.get_device_name() if device == "cuda" else _cpu()["cpu"]
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split()) or device


def flags() -> dict[str, Any]:
    """Settings that change speed or precision."""
    return {
        "threads": torch.get_num_threads(),
        "blas_threads": {
            k: v for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if (v := os.environ.get(k))
        },
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def load() -> float | None:
    """Processes running or waiting, over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # says the CUDA build, which the metadata may not
    return found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parents[1]:
            return None  # an installed copy inside somebody else's checkout
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> dict[str, Any]:
    label = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                label = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {"cpu": label, "cores": usable, "isa": torch.backends.cpu.get_cpu_capability(), "memory": memory}


def _gpu(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "gpu_memory": found.total_memory,
        "l2_cache": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver,
    }
