"""Runs a test's function in a Python of its own, for what has to be set before an import."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def run_fresh(function: Callable[..., Any], *args: Any, **environment: str | None) -> Any:
    """Calls a module's function in a new process and returns its result.

    `environment` is set there (None: taken away), so ``TRITON_INTERPRET="1"`` runs Triton's interpreter and
    ``TRITON_INTERPRET=None`` its compiler, whatever this process does.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    code = "import pickle, sys; call = pickle.load(sys.stdin.buffer); result = call[0](*call[1]); " + (
        "sys.stdout.buffer.write(b'result:' + pickle.dumps(result))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps((function, args)), env=env, capture_output=True, timeout=300
    )
    if done.returncode:
        raise AssertionError(f"{function.__qualname__} failed in its process:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout.rpartition(b"result:")[2])
