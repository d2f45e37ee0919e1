"""Which prototypes belong to which class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def class_members(prototype_classes: Tensor, count: int) -> Tensor:
    """Checks the assignment of `count` prototypes: (P,) classes, −1 for none, or (P, C) bool."""
    prototype_classes = _tensor("prototype_classes", prototype_classes)
    shape = tuple(prototype_classes.shape)
    wanted = f"({count},) integers, or ({count}, classes) bools"
    if len(shape) not in (1, 2) or shape[0] != count:
        raise ValueError(f"prototype_classes has shape {shape}; give {wanted}")
    dtype = prototype_classes.dtype
    if len(shape) == 2:
        # ProtoPNet keeps its table of 0 and 1 in float32
        return prototype_classes if dtype == torch.bool else prototype_classes != 0
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise TypeError(f"prototype_classes is {dtype}; give {wanted}")
    _check_least("prototype_classes", prototype_classes)
    return prototype_classes


def same_class(labels: Tensor, prototype_classes: Tensor, count: int) -> Tensor:
    """(B, P): whether the prototype is one of the sample's class; a label −1 is of none."""
    labels = _tensor("labels", labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}; give one integer a sample")
    members = class_members(prototype_classes, count).to(labels.device)
    _check_least("labels", labels)
    some = (labels >= 0)[:, None]
    if members.ndim == 1:
        return (labels[:, None] == members) & some
    if not torch.compiler.is_compiling() and len(labels) and int(labels.max()) >= members.shape[1]:
        raise ValueError(f"labels has {int(labels.max())}; prototype_classes has {members.shape[1]} classes")
    return members[:, labels.long().clamp(min=0)].t() & some


def _tensor(name: str, classes: Any) -> Tensor:
    if isinstance(classes, Tensor):
        return classes
    try:
        return torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is a {type(classes).__name__}; give an integer tensor") from None


def _check_least(name: str, classes: Tensor) -> None:
    if not torch.compiler.is_compiling() and len(classes) and int(classes.min()) < -1:
        raise ValueError(f"{name} has {int(classes.min())}; give classes from 0 on, or −1 for none")
