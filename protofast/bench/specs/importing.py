"""Import time, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from ..spec import OURS, Call, Case, Prepare, Spec, Target

_TIMED = "import sys, time; {before}start = time.perf_counter(); {code}; print(time.perf_counter() - start)"


def _fresh(code: str, before: str = "") -> Prepare:
    """Seconds that `code` takes in a new interpreter, after `before`, by that interpreter's own clock."""
    program = _TIMED.format(code=code, before=before)
    compiled = tempfile.TemporaryDirectory()  # the first import fills it, as an installation would

    def call() -> float:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled.name}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a fresh interpreter failed: {done.stderr.strip().splitlines()[-1:]}")
        return float(done.stdout.split()[-1])

    def prepare(inputs: Any) -> Call:
        return call

    return prepare


SPEC = Spec(
    op="import",
    about="seconds of an import in a fresh process",
    cases=(Case("import", {}),),
    tiny=(Case("import", {}),),
    inputs=lambda case, device, seed: SimpleNamespace(device=device),
    contenders={
        f"{OURS}, after torch": _fresh("import protofast", "import torch; "),
        f"{OURS} and torch": _fresh("import torch, protofast"),
        "torch": _fresh("import torch"),
    },
    reference=lambda inputs: None,
    error=lambda output, reference, inputs: 0.0,
    tolerance=lambda inputs: 0.0,
    targets=(Target("import", f"{OURS}, after torch", None, 0.05),),
    devices=("cpu",),
    self_timed=True,
)
