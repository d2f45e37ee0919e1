"""How much a linear classifier reads off a code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._optional import need
from ..config import PatronusConfig, TrainingConfig
from ..model import Patronus
from .disentanglement import auroc, checked


class Probe(NamedTuple):
    """Scores of each fold, float64 (folds,).

    Attributes
    ----------
    accuracy : Tensor
        Share of images given their class; of attributes, the mean share over them.
    auroc : Tensor
        Mean over classes (one against the rest) or attributes; those that a fold's test part has not both of are left
        out of its mean.
    """

    accuracy: Tensor
    auroc: Tensor


def probe(codes: Tensor, labels: Tensor, *, components: int | None = None, folds: int = 5, seed: int = 0) -> Probe:
    """Logistic regression on codes, cross-validated (the paper's latent quality).

    scikit-learn's `LogisticRegression` with its defaults, but up to 1,000 iterations where the paper's code stops after
    100; one a binary attribute, or one of all classes. Codes are standardised on the training part of each fold. The
    paper's table "latent AUROC" has accuracy for Fashion-MNIST, CIFAR-10 and FFHQ, and AUROC for the others; here are
    both.

    Parameters
    ----------
    codes : Tensor of shape (n, ...)
        Floating point; flattened. Activations, or images for the baseline with `components`.
    labels : Tensor of shape (n,) or (n, K)
        Classes, or binary attributes (bool, or 0 and 1).
    components : int, optional
        The codes are first reduced to so many principal components, found on the training part of each fold.
    folds : int, default 5
        Shuffled by `seed`.
    seed : int, default 0

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from protofast.patronus.evaluation import probe
    >>> labels = torch.arange(60) % 3
    >>> scores = probe(torch.eye(3)[labels], labels)
    >>> scores.accuracy.mean().item(), scores.auroc.mean().item()
    (1.0, 1.0)
    """
    values, attributes = checked(codes, labels, folds)
    if components is not None and not 1 <= components <= min(values.shape[1], len(values) * (folds - 1) // folds):
        raise ValueError(f"components is {components}; codes has shape {tuple(codes.shape)} and {folds} folds")
    split = need("sklearn.model_selection", "patronus").KFold(folds, shuffle=True, random_state=seed)
    pipeline = need("sklearn.pipeline", "patronus").make_pipeline
    scaler = need("sklearn.preprocessing", "patronus").StandardScaler
    reduction = need("sklearn.decomposition", "patronus").PCA
    regression = need("sklearn.linear_model", "patronus").LogisticRegression
    single = np.ndim(labels) == 1
    # As many targets as there are regressions: the class, or each attribute.
    targets = attributes.argmax(1)[:, None] if single else attributes.astype(np.int64)
    scores = []
    for part, rest in split.split(values):
        steps = [] if components is None else [reduction(components, random_state=seed)]
        prepare = pipeline(*steps, scaler()).fit(values[part])
        known, unknown = prepare.transform(values[part]), prepare.transform(values[rest])
        right, chance = [], np.zeros((len(rest), attributes.shape[1]))
        for k, target in enumerate(targets.T):
            if (target[part] == target[part[0]]).all():  # one answer only, so nothing to learn
                right.append(target[rest] == target[part[0]])
                continue
            model = regression(max_iter=1000).fit(known, target[part])
            right.append(model.predict(unknown) == target[rest])
            found = model.predict_proba(unknown)
            if single:
                chance[:, model.classes_] = found
            else:
                chance[:, k] = found[:, 1]
        each = np.diagonal(auroc(chance, attributes[rest]))
        each = each[~np.isnan(each)]
        scores.append((np.mean(right), each.mean() if each.size else np.nan))
    return Probe(*(torch.tensor(column, dtype=torch.float64) for column in zip(*scores, strict=True)))


def untrained(
    config: PatronusConfig, images: Tensor, *, settings: TrainingConfig | None = None, seed: int = 0
) -> Patronus:
    """The model of a config as training begins with it: random encoder, prototypes by `settings.initialize`.

    By default they are patches of `images`, scaled with the encoder to a median distance of `settings.distance`.

    What a probe reads off its activations is owed to the architecture, and what it reads off a trained model's beyond
    that to training.

    Parameters
    ----------
    config : PatronusConfig
    images : Tensor of shape (n, C, H, W)
        In [−1, 1]; 256 of them are used.
    settings : TrainingConfig, optional
        Of the training; by default its defaults.
    seed : int, default 0
    """
    from ..training import initialize

    settings = settings or TrainingConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Patronus(config)
    if settings.initialize != "uniform":
        initialize(model, lambda rows: images[rows].cpu(), len(images), settings, seed)
    return model.eval().requires_grad_(False)
