"""What the training loops of small models share."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def forgetting(decay: float, count: int) -> float:
    """Decay of an exponential average that forgets its beginning: over a tenth of the updates, until `decay`."""
    return min(decay, (1 + count) / (10 + count))


def read_unfinished(path: Path) -> dict[str, Any]:
    """What a training that was killed had kept, by torch.save; {} where nothing is there, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            return torch.load(path, map_location="cpu", weights_only=True) if archive.testzip() is None else {}
    except Exception:  # damaged in one of many ways: from the start
        return {}
