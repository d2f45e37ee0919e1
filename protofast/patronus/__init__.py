"""Patronus: the interpretable diffusion model of arXiv 2503.22782.

>>> import protofast as pf
>>> model = pf.patronus.Patronus.from_pretrained("runs/fashion")  # doctest: +SKIP
>>> codes = pf.patronus.invert(model, images)  # doctest: +SKIP
>>> pf.patronus.manipulate(model, codes, 3, 4.0)  # doctest: +SKIP
"""

from .config import PRESETS, TRAINING, PatronusConfig, TrainingConfig
from .diagnosis import Association, Intervention, Planted, associate, detect, intervene, plant
from .emergence import Emergence, emergence
from .evaluation import (
    Classifier,
    Disentanglement,
    Probe,
    agreement,
    disentanglement,
    frechet_distance,
    probe,
    train_classifier,
)
from .generate import (
    Codes,
    extrapolate,
    interpolate,
    invert,
    manipulate,
    reconstruct,
    sample,
    strengths,
    vary,
)
from .images import Images, images_of
from .latent import LatentConfig, LatentModel, sample_unconditional, train_latent
from .model import Patronus
from .prototypes import amplify, consistency, heat_maps, name_prototypes, nearest_patches
from .training import train

__all__ = [
    "PRESETS",
    "TRAINING",
    "Association",
    "Classifier",
    "Codes",
    "Disentanglement",
    "Emergence",
    "Images",
    "Intervention",
    "LatentConfig",
    "LatentModel",
    "Patronus",
    "PatronusConfig",
    "Planted",
    "Probe",
    "TrainingConfig",
    "agreement",
    "amplify",
    "associate",
    "consistency",
    "detect",
    "disentanglement",
    "emergence",
    "extrapolate",
    "frechet_distance",
    "heat_maps",
    "images_of",
    "interpolate",
    "intervene",
    "invert",
    "manipulate",
    "name_prototypes",
    "nearest_patches",
    "plant",
    "probe",
    "reconstruct",
    "sample",
    "sample_unconditional",
    "strengths",
    "train",
    "train_classifier",
    "train_latent",
    "vary",
]
