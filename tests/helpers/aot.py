"""Compiles the Triton kernels that a call would launch, for GPUs that are not there."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fresh import run_fresh

ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Build:
    """One kernel, compiled."""

    kernel: str
    architecture: int
    registers: int
    spills: int
    """Bytes stored by register spills."""
    shared: int
    """Bytes of shared memory."""
    ptx: str
    ttir: str


def builds(call: Callable[[], Any], architectures: Sequence[int] = ARCHITECTURES) -> list[Build]:
    """What each kernel launched by `call`, a function of a module, compiles to on each architecture.

    `call` gives CPU tensors to a launching function of the Triton backend. It runs in a process of its own, where
    launches compile, with the types and specializations of a real launch, and do not run.
    """
    return run_fresh(_compile_all, call, tuple(architectures), TRITON_INTERPRET=None)


def _compile_all(call: Callable[[], Any], architectures: Sequence[int]) -> list[Build]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """Stands for a GPU of the given architecture; the device number is the architecture."""

        def __init__(self, architecture: int) -> None:
            self.architecture = architecture

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.architecture, 32)

        def get_current_device(self) -> int:
            return self.architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    launch = JITFunction.run
    found: list[Build] = []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_inspect(self.fn.__name__, driver.active.architecture, kernel))
        return kernel

    JITFunction.run = compile_only
    for architecture in architectures:
        driver.set_active(Absent(architecture))
        call()
    return found


def _inspect(name: str, architecture: int, kernel: Any) -> Build:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]  # type: ignore[index]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Build(
        kernel=name,
        architecture=architecture,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),  # type: ignore[index]
        spills=sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        shared=kernel.metadata.shared,
        ptx=ptx,
        ttir=kernel.asm["ttir"],
    )


def assert_no_spills(build: Build) -> None:
    assert build.spills == 0, f"{build.kernel} spills {build.spills} bytes on sm_{build.architecture}"


def assert_wide_addresses(build: Build) -> None:
    """No pointer offset of 32 bits, and none widened only after a product of 32 bits could have overflowed."""
    products = set(re.findall(r"(%\w+) = arith\.muli .*: (?:tensor<\w*xi32>|i32)", build.ttir))
    narrow = [
        line.strip()
        for line in build.ttir.splitlines()
        if re.search(r"tt\.addptr .*, (?:tensor<\w*xi32>|i32)(?: loc|$)", line)
        or ((widened := re.search(r"arith\.extsi (%\w+)", line)) and widened[1] in products)
    ]
    assert not narrow, f"{build.kernel} computes addresses in 32 bits:\n" + "\n".join(narrow)
