"""A small classifier and a small generator of scikit-learn's digits, for the tests of ProDG."""

from functools import cache

import torch

from protofast.data import load
from protofast.prodg import TinyFlow, train_classifier, train_tiny_flow


@cache
def digits(split="train"):
    return load("digits", split=split)


@cache
def network(channels=16):
    images = digits()
    return train_classifier(
        images.take(slice(None)),
        torch.as_tensor(images.labels),
        channels=channels,
        epochs=12,
        names=[f"digit {name}" for name in range(10)],
        cache=False,
    )


@cache
def flow():
    images = digits()
    labels = torch.as_tensor(images.labels)
    names = [f"digit {name}" for name in range(10)]
    return train_tiny_flow(
        images.take(slice(None)), labels, names, updates=500, cache=False, latents=24, width=96, blocks=2
    )


def fresh_flow():
    """Untrained, but for a spread of what it draws."""
    torch.manual_seed(0)
    made = TinyFlow(["a", "b"], image_shape=(1, 8, 8), latents=8, width=16)
    made.basis.normal_()
    for block in made.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return made.requires_grad_(False)
