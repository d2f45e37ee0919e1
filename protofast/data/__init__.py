"""Image data for training and for anchors: named sets, folders and files, memory-mapped where the file allows."""

from .dataset import DataError, Dataset
from .sources import load

__all__ = ["DataError", "Dataset", "load"]
