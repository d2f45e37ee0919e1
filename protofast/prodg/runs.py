"""The folder of a run: a frozen network, a generator, and what was learned of them, a folder each."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import replacing
from ..data import Dataset, load
from .classifiers import load_network, save_network, train_classifier
from .concepts import Concepts
from .epic import EPIC
from .generators.protocol import Generator
from .generators.tiny_flow import TinyFlow, train_tiny_flow
from .infodisent import InfoDisent
from .networks import SplitNetwork, efficientnet_lite0
from .photographs import photographs
from .training import ProDG

METHODS = ("prodg", "epic", "infodisent")
PHOTOGRAPHS, LITE = "photographs", "efficientnet-lite0"
_RUN, _NETWORK, _GENERATOR = "run.json", "network.safetensors", "generator.safetensors"
_FORMAT = "protofast-prodg-run-1"


@dataclass(frozen=True)
class Run:
    """A folder that `prepare` made.

    Attributes
    ----------
    folder : Path
    about : dict
        "network", "data", "folder" (of the data) and "seed".
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        path = Path(folder) / _RUN
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a folder that `protofast prodg prepare` wrote")
        try:
            about = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); run `protofast prodg prepare` again") from None
        if not isinstance(about, dict) or about.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is of no ProDG run; give a folder that `protofast prodg prepare` wrote")
        return cls(Path(folder), about)

    def network(self, device: str | None = None) -> SplitNetwork:
        network = efficientnet_lite0() if self.about["network"] == LITE else load_network(self.folder / _NETWORK)
        return network.to(device or "cpu")

    def generator(self, device: str | None = None) -> Generator:
        path = self.folder / _GENERATOR
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; no generator of photographs comes with protofast, so of this network only EPIC "
                "can be trained here (the library takes FluxGenerator or StableDiffusionGenerator)"
            )
        return TinyFlow.load(path).to(device or "cpu")

    def images(self, split: str) -> Dataset:
        """ "train", or "test", which no method sees while it learns."""
        return open_images(self.about["data"], split, self.about["folder"])

    def place(self, method: str, seed: int) -> Path:
        return self.folder / f"{method}-{seed}"

    def trained(self, method: str) -> list[int]:
        """Seeds of the complete trainings of a method."""
        found = (path.parent.name.rpartition("-") for path in self.folder.glob(f"{method}-*/config.json"))
        return sorted(int(seed) for name, _, seed in found if name == method and seed.isdigit())

    def result(self, method: str, seed: int, network: SplitNetwork) -> ProDG | EPIC | InfoDisent:
        """What a training left: of ProDG without opening any image."""
        place, device = self.place(method, seed), str(network.weight.device)
        if not (place / "config.json").is_file():
            raise FileNotFoundError(
                f"{place}: no complete training; run `protofast prodg train {self.folder} --method {method} --seed "
                f"{seed}`"
            )
        if method == "prodg":
            return ProDG.load(place, network, self.generator(device))
        kind = EPIC if method == "epic" else InfoDisent
        return kind.load(place, network, self.images("train"))

    def concepts(self, method: str, seed: int, network: SplitNetwork) -> Concepts:
        return self.result(method, seed, network).concepts()


def open_images(data: str, split: str, folder: str | None) -> Dataset:
    if data == PHOTOGRAPHS:
        found = photographs(folder)
        third = np.arange(len(found)) % 3 == 2
        return found.subset(np.flatnonzero(third if split == "test" else ~third))
    return load(data, split=split, root=folder)


def prepare(
    out: str | os.PathLike[str],
    *,
    data: str = "fashion-mnist",
    folder: str | os.PathLike[str] | None = None,
    network: str = "cnn",
    channels: int = 64,
    epochs: int = 5,
    updates: int = 4000,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Run:
    """Makes the folder of a run: what has to be there before anything can be explained.

    Parameters
    ----------
    out : path
    data : str, default "fashion-mnist"
        A named set with labels and parts, of one channel; or "photographs", for ImageNet's network.
    folder : path, optional
        Of the data's files.
    network : {"cnn", "efficientnet-lite0"}
        A small one that is trained on the data; or ImageNet's, which comes trained and without a generator.
    channels, epochs : int
        Of the small network.
    updates : int, default 4000
        Of the generator.
    limit : int, optional
        Training images of both.
    seed : int, default 0
    progress : bool, default False
    """
    from .._progress import bars, told_totals

    if network not in ("cnn", LITE):
        raise ValueError(f"network is {network!r}; choose 'cnn' or {LITE!r}")
    if (network == LITE) != (data == PHOTOGRAPHS):
        raise ValueError(f"network is {network!r} and data {data!r}; {LITE!r} and {PHOTOGRAPHS!r} go together")
    place = Path(out)
    where = None if folder is None else str(Path(folder).resolve())
    about: dict[str, Any] = {"network": network, "data": data, "folder": where}
    about |= {"seed": seed, "channels": channels, "epochs": epochs, "updates": updates, "limit": limit}
    if (place / _RUN).is_file():
        run = Run.open(place)
        if run.about != about:
            raise FileExistsError(f"{place} holds a run of other settings; give another folder, or delete it")
        return run
    if network == LITE:
        efficientnet_lite0()  # fails now where its packages are missing
        open_images(data, "train", about["folder"])
    else:
        source = open_images(data, "train", about["folder"])
        if source.labels is None or source.names is None:
            raise ValueError(f"{data} has no named classes; give a set that has, such as 'fashion-mnist'")
        names = source.names
        source = source if limit is None else source.subset(np.arange(min(limit, len(source))))
        images, labels = source.take(slice(None)), torch.as_tensor(source.labels)
        with bars(progress) as bar:
            # One bar each; totals are told as they go.
            first = told_totals(bar("classifier", epochs * -(-len(images) // 128), 0))
            made = train_classifier(
                images, labels, channels=channels, epochs=epochs, seed=seed, names=names, progress=first
            )
            second = told_totals(bar("generator", updates, 0))
            flow = train_tiny_flow(images, labels, names, updates=updates, seed=seed, progress=second)
        save_network(place / _NETWORK, made)
        flow.save(place / _GENERATOR)
    with replacing(place / _RUN) as file:  # last: with it the folder is complete
        file.write(json.dumps({"format": _FORMAT, **about}, indent=1).encode())
    return Run(place, about)
