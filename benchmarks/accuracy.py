"""Writes the accuracy table of prototype activations: ``python -m benchmarks.accuracy``."""

import argparse
from pathlib import Path

import torch

from protofast.bench import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="file name without suffix; the machine's by default")
    arguments = parser.parse_args()
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}; give 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch sees no GPU here; use --device cpu")
    result = accuracy.measure(arguments.device, samples=arguments.samples, seed=arguments.seed, progress=True)
    paths = accuracy.write(result, arguments.out, arguments.name)
    print(accuracy.to_markdown(result))
    print(f"written: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
