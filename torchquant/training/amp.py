"""Mixed precision: forwards in bfloat16 or float16 where torch holds that to be safe, weights in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from torchquant._registry import not_one_of
from torchquant.errors import ConfigError

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a kind of mixed precision -> the type of its results."""


def check_amp(amp: str | None) -> None:
    """Raise ConfigError for a kind of mixed precision that is not in `AMP`, nor None.

    >>> check_amp("bf16")
    """
    if amp is not None and amp not in AMP:
        raise ConfigError(not_one_of("amp", amp, AMP))


def mixed_precision(amp: str | None, device: torch.device | None) -> AbstractContextManager[object]:
    """Make the context in which the forward and the loss of a step run; None: full precision.

    >>> with mixed_precision("bf16", torch.device("cpu")):
    ...     torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    torch.bfloat16
    """
    check_amp(amp)
    return nullcontext() if amp is None else torch.autocast(_type(device), AMP[amp])


def grad_scaler(amp: str | None, device: torch.device | None) -> torch.amp.GradScaler:
    """Make what keeps the small gradients of float16 from becoming 0; with any other kind it does nothing."""
    return torch.amp.GradScaler(_type(device), enabled=amp == "fp16")  # type: ignore[attr-defined]


def _type(device: torch.device | None) -> str:
    """Return the type of the device; of a model on several devices, that of the accelerator."""
    return device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
