"""How exact prototype activations are: what people run today and every precision of ours, against float64.

Each prototype has one patch planted at a given squared distance in every sample, among random patches: where the
activation is steepest (slope 1 − 1/eps at d = 0), the usual expansion |x|² + |p|² − 2x·p cancels most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import protofast as pf
from protofast import _ops
from protofast._backend import why_not
from protofast._files import replacing
from protofast._ops.prototype import PRECISIONS
from protofast._progress import bars

from .environment import environment
from .environment import name as machine_name

DISTANCES = (0.0, 1e-4, 1e-2, 1.0, None)
"""Squared distances to plant; None plants nothing."""

GRADIENT_AT = 1e-4
EPS = 1e-4

Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features, prototypes) -> activation and patch index, both (B, P)."""


@dataclass(frozen=True)
class Contender:
    """A method, and the dtype of what it is given; the truth is that of the values in this dtype."""

    name: str
    method: Method
    role: str = "baseline"
    dtype: torch.dtype = torch.float32


# --- inputs and truth ----------------------------------------------------------------------------------------------


def planted(
    distance: float | None, *, samples: int, channels: int, side: int, prototypes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features (B, D, side, side) and prototypes (P, D) in (0, 1), float32; in every sample one patch of its own lies
    at squared distance `distance` of each prototype, to rounding."""
    if side * side < prototypes:
        raise ValueError(f"side is {side}, which has {side * side} patches; {prototypes} prototypes need one each")
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, channels, side * side, generator=rng)
    p = torch.rand(prototypes, channels, generator=rng)
    if distance is not None:
        for sample in x:
            step = torch.rand(prototypes, channels, generator=rng, dtype=torch.float64)
            step *= distance**0.5 / step.norm(dim=1, keepdim=True)
            place = torch.randperm(side * side, generator=rng)[:prototypes]
            sample[:, place] = (p + torch.where(p < 0.5, step, -step)).t().float()  # inwards, to stay in (0, 1)
    return x.reshape(samples, channels, side, side), p


def distances(x: Tensor, p: Tensor) -> Tensor:
    """(B, P, N): every squared distance in float64 by the direct form."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(p.double(), x.flatten(2).transpose(1, 2).double().contiguous(), compute_mode=mode).square()


def activate(d: Tensor) -> Tensor:
    return torch.log1p((1 - EPS) / (d + EPS))


def bound(d: Tensor, channels: int) -> Tensor:
    """Largest error of the activation of a patch at distance `d` where all is float32: D + 2 roundings of Σ(x − p)²,
    whose terms have one sign, four of the quotient, and two units in the last place of the logarithm."""
    quotient = (1 - EPS) / (d + EPS)
    roundings = (channels + 2) * d / (d + EPS) + 4
    return 2**-24 * (roundings * quotient / (1 + quotient) + 4 * torch.log1p(quotient))


def true_gradients(x: Tensor, p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Of the sum of all activations, in float64: at the winning patches (B, P, D), and of the prototypes (P, D)."""
    d, index = d.min(2)
    best = at_patches(x.double(), index)
    to_patch = (2 * (EPS - 1) / ((d + 1) * (d + EPS)))[..., None] * (best - p.double())
    return to_patch, -to_patch.sum(0)


def at_patches(x: Tensor, index: Tensor) -> Tensor:
    """(B, P, D): the patches of `index` (B, P)."""
    return x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1)).transpose(1, 2)


# --- what people run -----------------------------------------------------------------------------------------------


def to_tf32(t: Tensor) -> Tensor:
    """Rounds to a mantissa of 10 bits, to nearest even; gradients pass."""
    bits = t.detach().contiguous().view(torch.int32)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return t + (rounded - t.detach())  # both exact


def papers(x: Tensor, p: Tensor, operand: Callable[[Tensor], Tensor] = lambda t: t) -> tuple[Tensor, Tensor]:
    """ProtoPNet's two convolutions, relu, max-pool and log; `operand` rounds what the convolutions multiply."""
    kernels = p[:, :, None, None]
    x2 = F.conv2d(operand(x * x), torch.ones_like(kernels))
    p2 = (kernels * kernels).sum((1, 2, 3))[:, None, None]
    d = F.relu(x2 + (p2 - 2 * F.conv2d(operand(x), operand(kernels))))
    nearest, index = F.max_pool2d(-d, d.shape[2:], return_indices=True)
    nearest = -nearest.flatten(1)
    return torch.log((nearest + 1) / (nearest + EPS)), index.flatten(1)


def _autocast(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16):
        return papers(x, p)


def _cdist(mode: str) -> Method:
    def method(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        d, index = torch.cdist(x.flatten(2).transpose(1, 2), p, compute_mode=mode).square().min(1)
        return torch.log((d + 1) / (d + EPS)), index

    return method


def _ours(backend: str, **settings: Any) -> Method:
    def method(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        activation, _, index = pf.prototype_activation(x, p, eps=EPS, backend=backend, **settings)
        return activation, index

    return method


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Whether a GPU's convolutions and products may round to TF32."""
    flags: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = on
    try:
        yield
    finally:
        for flag, was in zip(flags, before, strict=True):
            flag.allow_tf32 = was


def _tf32_papers(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cuda":
        return papers(x, p, to_tf32)
    with _tf32(True):
        return papers(x, p)


def contenders(device: str) -> list[Contender]:
    """What people run, then every precision on every backend that runs on `device`."""
    found = [
        Contender("ProtoPNet's formulation, float32", papers),
        Contender(f"the same, TF32{'' if device == 'cuda' else ' (emulated)'}", _tf32_papers),
        Contender("the same, bfloat16 autocast", _autocast),
        Contender("torch.cdist², by products", _cdist("use_mm_for_euclid_dist")),
        Contender("torch.cdist², direct", _cdist("donot_use_mm_for_euclid_dist")),
    ]
    for backend in _ops.BACKENDS:
        if why_not("prototype_activation", device, backend) or (backend == "triton" and device == "cpu"):
            continue
        head = f"protofast {backend}"
        if backend == "reference":  # one arithmetic, whatever is asked
            found.append(Contender(head, _ours(backend), "protofast"))
        else:
            for precision in PRECISIONS:
                found.append(Contender(f"{head}, {precision}", _ours(backend, precision=precision), "protofast"))
            for precision in ("auto", "bf16"):
                verified = _ours(backend, precision=precision, verify=True)
                found.append(Contender(f"{head}, {precision}, verify", verified, "protofast"))
        found.append(Contender(f"{head}, bfloat16 input", _ours(backend), "protofast", torch.bfloat16))
    return found


# --- the table -----------------------------------------------------------------------------------------------------


def judge(activation: Tensor, index: Tensor, d: Tensor, channels: int) -> dict[str, float]:
    """Against the distances `d` (B, P, N) of every patch.

    Returns
    -------
    dict
        ``activation``: worst |Δ| from the true winner's; ``of_bound``: worst |Δ| from that of the patch that was
        returned, as a share of the float32 bound; ``right``: share of winners at the smallest distance; ``regret``: the
        largest distance of a returned patch over the smallest.
    """
    best = d.amin(2)
    at = d.gather(2, index[..., None])[..., 0]
    given = activation.double()
    return {
        "activation": _worst((given - activate(best)).abs()),
        "of_bound": _worst((given - activate(at)).abs() / bound(at, channels)),
        "right": float((at == best).double().mean()),
        "regret": float((at - best).max()),
    }


def _worst(error: Tensor) -> float:
    return float(error.nan_to_num(nan=torch.inf).max())


def gradient_error(method: Method, x: Tensor, p: Tensor, d: Tensor) -> float:
    """Worst error of a gradient by its length: of the patch each prototype is nearest to, and of each prototype."""
    x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
    to_x, to_p = torch.autograd.grad(method(x, p)[0].float().sum(), (x, p))
    true_patch, true_p = true_gradients(x.detach(), p.detach(), d)
    pairs = ((at_patches(to_x, d.argmin(2)), true_patch), (to_p, true_p))
    return max(_worst((found.double() - true).norm(dim=-1) / true.norm(dim=-1)) for found, true in pairs)


def measure(
    device: str = "cpu",
    *,
    samples: int = 8,
    channels: int = 128,
    side: int = 26,
    prototypes: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Every contender at every planted distance.

    Returns
    -------
    dict
        What the JSON holds: ``rows``, each with ``columns`` (one a distance, see `judge`) and ``gradient`` at
        d = 1e-4, and the environment.
    """
    found = contenders(device)
    shape = {"samples": samples, "channels": channels, "side": side, "prototypes": prototypes}
    rows: list[dict[str, Any]] = [
        {
            "method": c.name,
            "role": c.role,
            "input": str(c.dtype).removeprefix("torch."),
            "columns": [],
            "gradient": None,
        }
        for c in found
    ]
    with bars(progress) as bar, _tf32(False):
        advance = bar("accuracy", len(DISTANCES) * len(found), 0)
        for distance in DISTANCES:
            given = planted(distance, **shape, seed=seed)
            truth: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
            for contender, row in zip(found, rows, strict=True):
                if contender.dtype not in truth:
                    x, p = (t.to(device, contender.dtype) for t in given)
                    truth[contender.dtype] = x, p, distances(x, p)
                x, p, d = truth[contender.dtype]
                with torch.no_grad():
                    row["columns"].append({"distance": distance, **judge(*contender.method(x, p), d, channels)})
                if distance == GRADIENT_AT:
                    row["gradient"] = gradient_error(contender.method, x, p, d)
                advance(1)
    return {"format": 1, "device": device, **shape, "seed": seed, "environment": environment(device), "rows": rows}


def to_markdown(result: dict[str, Any]) -> str:
    """The table, under what it was measured on."""
    where = result["environment"]
    hardware = where["hardware"]
    columns = ["random" if d is None else f"d = {d:g}" for d in (c["distance"] for c in result["rows"][0]["columns"])]
    head = ["method", *columns, "true winners", "worst regret", "of the float32 bound", "gradient at d = 1e-4"]
    lines = [
        "# Accuracy of prototype activations",
        "",
        f"Worst |Δ activation| from float64, log((d + 1) / (d + {EPS:g})), largest {activate(torch.tensor(0.0)):.2f}: "
        f"{result['samples']} samples of {result['side']}×{result['side']} patches, D = {result['channels']}, "
        f"P = {result['prototypes']}, values in (0, 1), seed {result['seed']}; in every sample one patch is planted at "
        "squared distance d from each prototype. True winners and regret (distance of the patch that was returned less "
        "the smallest) are over all columns. Of the float32 bound: the worst error given the patch that was returned, "
        "over what float32 arithmetic on the direct form may err. Gradient: worst relative error of the gradient of a "
        "winning patch or a prototype. The truth of a bfloat16-input row is that of the rounded input, whose patches "
        "are no longer at d.",
        "",
        f"{hardware.get('gpu', hardware['cpu'])}; {', '.join(f'{k} {v}' for k, v in where['versions'].items())}; "
        f"commit {where['commit'] or 'unknown'}; {where['when']}. Made by `python -m benchmarks.accuracy`.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in result["rows"]:
        seen = row["columns"]
        right = sum(c["right"] for c in seen) / len(seen)
        cells = [row["method"], *(f"{c['activation']:.1e}" for c in seen)]
        cells += ["all" if right == 1 else f"{100 * right:.2f} %", f"{max(c['regret'] for c in seen):.1e}"]
        cells += [f"{max(c['of_bound'] for c in seen):.2g}", f"{row['gradient']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], out: str | Path, name: str | None = None) -> list[Path]:
    """``<name>.json`` and ``<name>.md`` in `out`, each whole or not at all; named after the machine by default."""
    stem = name or f"{machine_name(result['device'])}-accuracy"
    texts = {".json": json.dumps(result, indent=1, ensure_ascii=False) + "\n", ".md": to_markdown(result)}
    paths = [Path(out) / f"{stem}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with replacing(path) as file:
            file.write(text.encode())
    return paths
