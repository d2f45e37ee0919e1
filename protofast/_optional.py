"""Optional dependencies: imported where they are used, and asked for by name when they are absent."""

from importlib import import_module
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Imports `module`, or raises ImportError with the extra of protofast that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed here and could not be imported: pip install 'protofast[{extra}]'"
        ) from error
