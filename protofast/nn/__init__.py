"""Prototype layers, their losses, projection onto data, receptive fields and pictures."""

from .layer import PrototypeLayer
from .losses import cluster_loss, distinct_loss, orthogonality_loss, separation_loss
from .pictures import draw_boxes, heat_map, prototype_sheet
from .project import Projection, project
from .receptive_field import ReceptiveField, receptive_field
from .replace import replace_prototype_layer, restore_prototype_layer

__all__ = [
    "Projection",
    "PrototypeLayer",
    "ReceptiveField",
    "cluster_loss",
    "distinct_loss",
    "draw_boxes",
    "heat_map",
    "orthogonality_loss",
    "project",
    "prototype_sheet",
    "receptive_field",
    "replace_prototype_layer",
    "restore_prototype_layer",
    "separation_loss",
]
