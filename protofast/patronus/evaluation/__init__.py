"""How good a trained model is, each measure under the name of what is measured."""

from .classifier import Agreement, Classifier, agreement, train_classifier
from .disentanglement import Disentanglement, attributes_of, auroc, disentanglement
from .distance import (
    Features,
    classifier_features,
    draws,
    frechet_distance,
    inception_features,
    quantised,
    reference_distances,
)
from .probe import Probe, probe, untrained

__all__ = [
    "Agreement",
    "Classifier",
    "Disentanglement",
    "Features",
    "Probe",
    "agreement",
    "attributes_of",
    "auroc",
    "classifier_features",
    "disentanglement",
    "draws",
    "frechet_distance",
    "inception_features",
    "probe",
    "quantised",
    "reference_distances",
    "train_classifier",
    "untrained",
]
