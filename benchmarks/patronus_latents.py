"""What the latent model of Patronus learns from, and by what network.

    python benchmarks/patronus_latents.py [--run RUN] [--quick] [--threads 2] [--out FILE.json]

1. Activations: the paper's public code finds them one image at a time, keeping a graph for gradients, in every epoch
   of training. Images per second of that (their formulation in plain torch) against batches without gradients, on the
   encoder of the paper's Fashion-MNIST model, turn by turn; and what it means over the paper's 200 epochs.
2. With RUN, a folder that `protofast patronus train` wrote: the one-dimensional U-Net of the paper (built of diffusers'
   blocks) against the MLP, at equal updates and batches on the same activations, and samples of both by DDIM.

`--quick` is the whole of it in seconds, on too few images to mean anything.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from protofast._files import replacing  # noqa: E402
from protofast.bench.environment import environment, load  # noqa: E402
from protofast.bench.timing import interleave  # noqa: E402
from protofast.patronus import PRESETS, Patronus, images_of  # noqa: E402
from protofast.patronus import latent as latents  # noqa: E402

EPOCHS = 200
IMAGES, BATCH = 512, 64
PUBLIC = "one by one, with gradients, two convolutions"
OURS = "batched, without gradients, protofast"


def two_convolutions(model: Patronus, images: Tensor) -> Tensor:
    """The public formulation: maps of |x|², x·p and d, a max-pool over −d."""
    features, weight = model.encoder(images), model.prototypes.prototype_vectors
    lengths = F.conv2d(features**2, torch.ones_like(weight))
    products = F.conv2d(features, weight)
    distances = F.relu(lengths + (weight.square().sum(1) - 2 * products))
    nearest = -F.max_pool2d(-distances, kernel_size=distances.shape[2:]).flatten(1)
    return torch.log((nearest + 1) / (nearest + model.config.eps))


def extraction(model: Patronus, images: Tensor, budget: float) -> dict[str, Any]:
    """Images per second of each way, and that all of them find the same.

    Each call takes all the images, so that what else the machine does takes its share of all ways alike.
    """

    def plain(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return two_convolutions(model, rows)

    def one_by_one(way: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: [way(images[row : row + 1]) for row in range(len(images))]

    def batched(way: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: [way(part) for part in images.split(BATCH)]

    ways = {
        PUBLIC: one_by_one(lambda rows: two_convolutions(model, rows)),
        "one by one, without gradients, two convolutions": one_by_one(plain),
        "one by one, without gradients, protofast": one_by_one(model.activations),
        "batched, without gradients, two convolutions": batched(plain),
        OURS: batched(model.activations),
    }
    difference = float((plain(images) - model.activations(images)).abs().max())
    timings = interleave(ways, "cpu", budget=budget)
    rates = {name: len(images) / statistics.median(timings[name].seconds) for name in ways}
    return {
        "images_per_second": rates,
        "ratio": rates[OURS] / rates[PUBLIC],
        "largest_difference": difference,
        "epochs": EPOCHS,
        "seconds_of_60000": {
            f"{PUBLIC}, {EPOCHS} epochs": EPOCHS * 60_000 / rates[PUBLIC],
            f"{OURS}, once": 60_000 / rates[OURS],
        },
    }


class Convolutions(nn.Module):
    """The paper's kind of network: s as one channel of a line, 64 and 128 channels, in diffusers' blocks."""

    def __init__(self, features: int) -> None:
        super().__init__()
        from diffusers import UNet1DModel

        self.fill = -features % 2
        self.unet = UNet1DModel(
            sample_size=features + self.fill,
            in_channels=1,
            out_channels=1,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            act_fn="silu",
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",),
            out_block_type="OutConv1DBlock",
            block_out_channels=(64, 128),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.unet(F.pad(x, (0, self.fill))[:, None], t, return_dict=False)[0]
        return output[:, 0, : x.shape[1]]


def networks(trained: Tensor, held_out: Tensor, updates: int, quick: bool, seed: int) -> dict[str, Any]:
    """Both networks, from the same batches; what they cost and what their samples are worth."""
    found: dict[str, Any] = {}
    samples = 10 if quick else 2000
    for name in ("MLP", "U-Net over the prototypes"):
        torch.manual_seed(seed)
        model = latents.LatentModel(trained.shape[1])
        if name != "MLP":
            model.network = Convolutions(trained.shape[1])
        model.standardize(trained)
        begin = time.perf_counter()
        model = latents.fit(
            *(model, trained), updates=updates, batch=64, lr=1e-3, weight_decay=0.01, ema=0.995, seed=seed
        )
        middle = time.perf_counter()
        drawn = model.sample(samples, num_steps=2 if quick else None, seed=seed)
        end = time.perf_counter()
        quality = latents.latent_quality(drawn, held_out, seed=seed)
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "milliseconds_an_update": 1e3 * (middle - begin) / updates,
            "sampled_a_second": samples / (end - middle),
            "loss": model.losses[-1],
            "wasserstein": float(quality.wasserstein.mean()),
            "correlation": quality.correlation,
            "nearest_neighbour_accuracy": quality.accuracy,
        }
    return found


def experiment(run: Path | None, quick: bool, budget: float, updates: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    # The encoder and prototypes are the paper's; of the denoiser nothing is asked. Gradients are on, as in its code.
    fresh = Patronus(dataclasses.replace(PRESETS["fashion-mnist"], width=8, multipliers=(1,), layers=1)).eval()
    test = pf.data.load("fashion-mnist", split="test")
    found: dict[str, Any] = {
        "format": "protofast-patronus-latents-1",
        "quick": quick,
        "settings": {
            "images": IMAGES,
            "batch": BATCH,
            "updates": updates,
            "seed": seed,
            "run": None if run is None else str(run),
        },
        "environment": environment("cpu"),
        "extraction": extraction(fresh, images_of(fresh.config, test.subset(range(8 if quick else IMAGES))), budget),
    }
    if run is not None:
        model = Patronus.from_pretrained(run)
        train = pf.data.load("fashion-mnist")
        if quick:
            train, test = train.subset(range(500)), test.subset(range(200))
        trained, held_out = latents.activations_of(model, train), latents.activations_of(model, test)
        found["networks"] = networks(trained, held_out, updates, quick, seed)
    found["environment"]["load_after"] = load()
    return found


def to_text(result: dict[str, Any]) -> str:
    told, made = result["environment"], result["extraction"]
    lines = ["A quick run, on too few images to mean anything.", ""] if result["quick"] else []
    lines += [
        f"{told['hardware'].get('cpu', 'CPU')}, {told['flags']['threads']} threads; load of the machine "
        f"{told['load']:.1f}, afterwards {told['load_after']:.1f}.",
        "",
        "Activations (images per second):",
        *(f"  {rate:10,.0f}  {name}" for name, rate in made["images_per_second"].items()),
        f"  The last is {made['ratio']:.1f} times the first; they differ by at most {made['largest_difference']:.1g}.",
        f"Activations that training of {EPOCHS} epochs on 60,000 images needs:",
        *(f"  {seconds:10,.0f} s  {name}" for name, seconds in made["seconds_of_60000"].items()),
    ]
    if "networks" in result:
        lines += ["", f"Networks after {result['settings']['updates']} updates on batches of 64:"]
        for name, told in result["networks"].items():
            lines.append(
                f"  {name}: {told['parameters']:,} parameters, {told['milliseconds_an_update']:.1f} ms an update, "
                f"{told['sampled_a_second']:,.0f} sampled a second, loss {told['loss']:.3f}; samples: Wasserstein-1 "
                f"{told['wasserstein']:.3f}, correlations {told['correlation']:.3f}, "
                f"1-NN {told['nearest_neighbour_accuracy']:.3f}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained model, to compare networks on its activations")
    parser.add_argument("--quick", action="store_true", help="a few calls and updates, to see that it works")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "patronus-latents.json")
    options = parser.parse_args(arguments)
    for name in ("threads", "updates"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        updates = 3 if options.quick else options.updates
        result = experiment(options.run, options.quick, 0.3 if options.quick else 10.0, updates, options.seed)
    finally:
        torch.set_num_threads(before)
    with replacing(options.out) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(to_text(result))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
