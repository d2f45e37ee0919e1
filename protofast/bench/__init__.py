"""The benchmark: one `Spec` per op, all contenders interleaved in one run, every figure beside a limit of the machine.

`run` needs only torch and numpy. A contender whose package is absent is left out and the reason recorded.
"""

from .runner import run

__all__ = ["run"]
