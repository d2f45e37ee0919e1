"""A ProtoPNet-style classifier trained on Fashion-MNIST twice: by the usual two convolutions, and by protofast.

    python benchmarks/protopnet_fashion.py [--quick] [--out benchmarks/results]

Both start from the same weights and see the same batches, for three seeds. Writes protopnet-fashion.md and .json: test
accuracy, time and the layer's peak memory of each; and protopnet-fashion.png: what the last model's prototypes are.
`--quick` is the whole of it in seconds, on few images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import protofast as pf  # noqa: E402
from protofast._backend import overload  # noqa: E402
from protofast._files import replacing  # noqa: E402
from protofast._progress import bars  # noqa: E402
from protofast.bench.environment import environment, load  # noqa: E402
from protofast.bench.memory import peak  # noqa: E402
from protofast.bench.timing import interleave  # noqa: E402

CLASSES, PER_CLASS, CHANNELS, BATCH, EPS = 10, 15, 128, 64, 1e-4
SEEDS = (0, 1, 2)
LEARNING_RATE = 4e-3  # at the start; falls to 0 along a cosine
CLUSTER, SEPARATION, OFF_CLASS = 0.8, -0.08, 1e-4  # weights of the losses in Chen et al. 2019

Layer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def two_convolutions(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """ProtoPNet's formulation: maps of |x|², x·p and d, a max-pool over −d."""
    weight = prototypes[..., None, None]
    lengths = F.conv2d(features**2, torch.ones_like(weight))
    products = F.conv2d(features, weight)
    distances = F.relu(lengths + (prototypes.square().sum(1)[:, None, None] - 2 * products))
    nearest = -F.max_pool2d(-distances, kernel_size=distances.shape[2:]).flatten(1)
    return torch.log((nearest + 1) / (nearest + EPS)), nearest


def protofast(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    activation, distance, _ = pf.prototype_activation(features, prototypes, eps=EPS)
    return activation, distance


LAYERS: dict[str, Layer] = {"two convolutions": two_convolutions, "protofast": protofast}


class Classifier(nn.Module):
    """A small encoder to 14 × 14 × CHANNELS, prototypes of PER_CLASS a class, and a linear layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, CHANNELS, 1), nn.Sigmoid()),
        )
        self.prototype_vectors = nn.Parameter(torch.rand(CLASSES * PER_CLASS, CHANNELS))
        self.last_layer = nn.Linear(CLASSES * PER_CLASS, CLASSES, bias=False)
        own = torch.eye(CLASSES).repeat_interleave(PER_CLASS, dim=1)
        self.register_buffer("own", own)
        self.last_layer.weight.data.copy_(1.5 * own - 0.5)

    @torch.no_grad()
    def start_from(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Prototypes are patches of images of their class: it learns sooner than from random ones."""
        for label in range(CLASSES):
            rows = (labels == label).nonzero()[:, 0]
            rows = rows[torch.randint(len(rows), (PER_CLASS,), generator=generator)]
            patches = self.encoder(images[rows]).flatten(2)
            at = torch.randint(patches.shape[2], (PER_CLASS,), generator=generator)
            mine = slice(label * PER_CLASS, (label + 1) * PER_CLASS)
            self.prototype_vectors[mine] = patches[torch.arange(PER_CLASS), :, at]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activation, distance = self.layer(self.encoder(images), self.prototype_vectors)
        return self.last_layer(activation), distance

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Chen et al. 2019, eq. 2 to 4, with the last layer's L1 from the start."""
        logits, distance = self(images)
        mine = self.own[labels].bool()
        cluster = distance.masked_fill(~mine, torch.inf).amin(1).mean()
        separation = distance.masked_fill(mine, torch.inf).amin(1).mean()
        off_class = (self.last_layer.weight * (1 - self.own)).abs().sum()
        return F.cross_entropy(logits, labels) + CLUSTER * cluster + SEPARATION * separation + OFF_CLASS * off_class


def train(
    layer: Layer, seed: int, images: Tensor, labels: Tensor, updates: int, advance: Callable[[int], None]
) -> tuple[Classifier, dict[str, Any]]:
    torch.manual_seed(seed)
    model = Classifier(layer)
    generator = torch.Generator().manual_seed(seed)
    model.start_from(images, labels, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    losses, seconds = [], 0.0
    for _ in range(updates):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        batch, truth = images[rows], labels[rows]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model.loss(batch, truth)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        advance(1)
    tail = losses[-max(1, updates // 10) :]
    return model, {"seconds": seconds, "first_loss": losses[0], "last_loss": statistics.mean(tail)}


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(batch)[0].argmax(1) == truth).sum())
        for batch, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


def measure_layers(model: Classifier, images: Tensor, budget: float) -> dict[str, dict[str, Any]]:
    """Forward and backward of the layer alone on one batch: milliseconds, turn by turn, and peak extra memory."""
    with torch.no_grad():
        features = model.eval().encoder(images[:BATCH])
    features.requires_grad_()
    prototypes = model.prototype_vectors.detach().clone().requires_grad_()

    def call(layer: Layer) -> Callable[[], Any]:
        def run() -> Any:
            activation, distance = layer(features, prototypes)
            return torch.autograd.grad(activation.sum() + distance.sum(), (features, prototypes))

        return run

    calls = {name: call(layer) for name, layer in LAYERS.items()}
    timings = interleave(calls, "cpu", budget=budget)
    found = {}
    for name, run in calls.items():
        sizes = [size for size in (peak(run, "cpu") for _ in range(5)) if size is not None]
        memory = statistics.median(sizes) if sizes else None
        found[name] = {"milliseconds": 1e3 * statistics.median(timings[name].seconds), "peak_bytes": memory}
    return found


def picture(model: Classifier, images: Tensor, labels: Tensor, path: Path) -> None:
    """The three nearest patches, of images of their class, of one prototype a class."""
    layer = pf.nn.PrototypeLayer(CLASSES * PER_CLASS, CHANNELS, init=model.prototype_vectors.detach())
    batches = zip(images.split(500), labels.split(500), strict=True)
    classes = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    found = pf.nn.project(layer, model.encoder, batches, prototype_classes=classes, best=3, push=False, progress=False)
    field = pf.nn.receptive_field(model.encoder, tuple(images.shape[2:]))
    shown = [PER_CLASS * label + int(found.distance[classes == label, 0].argmin()) for label in range(CLASSES)]
    pf.nn.prototype_sheet(found, images, field=field, prototypes=shown, path=path)


def experiment(quick: bool, show: bool, sheet: Path) -> dict[str, Any]:
    """Trains all of it, draws the prototypes and returns what there is to tell."""
    parts = [pf.data.load("fashion-mnist", split=split) for split in ("train", "test")]
    if quick:
        parts = [part.subset(range(200)) for part in parts]
    (images, labels), (held_out, truth) = ((part.take(slice(None)), torch.from_numpy(part.labels)) for part in parts)
    updates = 2 if quick else 1200
    runs: list[dict[str, Any]] = []
    with bars(show) as start:
        advance = start("training", updates * len(LAYERS) * len(SEEDS), 0)
        for seed in SEEDS:
            # Which comes first takes turns: what else the machine does, it does to both.
            for name in sorted(LAYERS, reverse=bool(seed % 2)):
                model, told = train(LAYERS[name], seed, images, labels, updates, advance)
                runs.append({"layer": name, "seed": seed, "accuracy": accuracy(model, held_out, truth), **told})
    picture(model.eval(), images[:10_000], labels[:10_000], sheet)
    layers = measure_layers(model, held_out, budget=0.2 if quick else 5.0)
    return {
        "format": "protofast-protopnet-1",
        "quick": quick,
        "settings": {
            "classes": CLASSES,
            "prototypes": CLASSES * PER_CLASS,
            "channels": CHANNELS,
            "grid": [14, 14],
            "batch": BATCH,
            "updates": updates,
            "learning_rate": LEARNING_RATE,
            "images": len(images),
            "held_out": len(held_out),
        },
        "backend": overload("prototype_activation", "cpu", None)._overloadname,
        "environment": environment("cpu") | {"load_after": load()},
        "layers": layers,
        "runs": runs,
    }


def to_markdown(result: dict[str, Any]) -> str:
    settings, layers, told = result["settings"], result["layers"], result["environment"]
    rows = []
    for name in LAYERS:
        runs = [run for run in result["runs"] if run["layer"] == name]
        right = [100 * run["accuracy"] for run in runs]
        each = ", ".join(f"{value:.2f}" for value in right)
        memory = layers[name]["peak_bytes"]
        cells = [
            name,
            f"{statistics.mean(right):.2f} ± {statistics.stdev(right):.2f} ({each})",
            f"{statistics.mean(run['last_loss'] for run in runs):.3f}",
            f"{statistics.mean(run['seconds'] for run in runs):.1f} s",
            f"{layers[name]['milliseconds']:.2f} ms",
            "–" if memory is None else f"{memory / 2**20:.1f} MiB",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    lines = [
        "# A ProtoPNet on Fashion-MNIST, trained both ways",
        "",
        *(["**A quick run, on too few images to mean anything.**", ""] if result["quick"] else []),
        f"{settings['prototypes']} prototypes of {settings['channels']} channels on a 14 × 14 grid, batches of "
        f"{settings['batch']}, {settings['updates']} updates on {settings['images']:,} images, tested on "
        f"{settings['held_out']:,}. Seeds {', '.join(map(str, SEEDS))}: with each, both start from the same weights "
        f"and see the same batches. {told['hardware'].get('cpu', 'CPU')}, {told['flags']['threads']} threads, float32, "
        f"backend `{result['backend']}`; load of the machine {told['load']:.1f}, afterwards {told['load_after']:.1f}.",
        "",
        "| prototype layer | test accuracy, % (each seed) | last loss | training "
        "| layer, forward and backward | its peak extra memory |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "± is the standard deviation over the seeds. Training is the mean over them, without reading the images. The "
        "layer is measured alone on one batch, the two taking turns; its memory holds the gradients it returns.",
        "",
        "Made by `python benchmarks/protopnet_fashion.py`.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two updates on 200 images, to see that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    result = experiment(options.quick, sys.stderr.isatty(), options.out / "protopnet-fashion.png")
    text = to_markdown(result)
    contents = {"protopnet-fashion.md": text, "protopnet-fashion.json": json.dumps(result, indent=1) + "\n"}
    for name, content in contents.items():
        with replacing(options.out / name) as file:
            file.write(content.encode())
    print(text)


if __name__ == "__main__":
    main()
