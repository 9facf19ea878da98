"""What every side of the comparison gives back, and how its weights are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.real.networks import Real

FLOAT_FILE = "float.onnx"
TRANSFORMERS = ("minilm", "conformer")
"""Networks with the layer norms and residual sums of transformers."""


@dataclass(frozen=True)
class Quantized:
    """A quantized network. `call` takes and returns what the float model does.

    `weights`: how many numbers each quantized weight holds.
    """

    call: Callable[..., Any]
    weights: list[int]


@dataclass(frozen=True)
class Peer:
    """A way to quantize a network; `build` takes the network and a folder for files, kept for all ways.

    `about`: what it is, in a line. `is_dynamic`: ranges of activations are measured at each call. `networks`: the only
    ones it is meant for, () for all.
    """

    packages: tuple[str, ...]
    build: Callable[[Real, Path], Quantized]
    about: str
    is_dynamic: bool = False
    networks: tuple[str, ...] = ()


def shares(quantized: list[int], model: nn.Module) -> tuple[float, float | None]:
    """Which parts of the weights that are multiplied, and of the tables that are looked up, are quantized.

    quantized: how many numbers each quantized weight holds; one that holds as many as a table counts as that table.
    The first is the part of the numbers or of the weights, whichever is less: a few small layers left float can be the
    ones that cost most. The second is None for a model without tables.
    """
    tables = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)]
    left, found = list(quantized), 0
    for size in tables:
        if size in left:
            left.remove(size)
            found += size
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1 and p.numel() > len(p)]
    share = min(sum(left) / (sum(sizes) - sum(tables)), len(left) / (len(sizes) - len(tables)))
    return min(1.0, share), (found / sum(tables) if tables else None)
