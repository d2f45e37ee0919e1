"""Builds CUDA sources for the CPU, by tests/cuda_emulation."""

import ctypes
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/cuda_emulation"
OPTIONS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-include", "emulation.h"]
OPTIONS += ["-fno-gnu-unique"]  # else two libraries in one process share the emulated machine


def emulated(sources: Sequence[Path], functions: Sequence[str], folder: Path, *options: str) -> ctypes.CDLL:
    """The library of `sources`, whose `functions` return what went wrong, or None."""

    def build(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = ["g++", *OPTIONS, *options, "-x", "c++", f"-I{HERE}", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    library = folder / "emulation.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", str(library)], check=True, timeout=300)
    loaded = ctypes.CDLL(str(library))
    for name in functions:
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def numbers(values) -> ctypes.Array:
    values = list(values)
    return (ctypes.c_int64 * len(values))(*values)


def pointer(tensor) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def raise_if(problem: bytes | None) -> None:
    if problem:
        raise RuntimeError(problem.decode())
