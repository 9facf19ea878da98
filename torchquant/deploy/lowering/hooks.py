"""Hooks of a model that a file would not run."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchquant.errors import ExportError

WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that compute the weight, which is in the file as it is."""


def refuse_hooks(path: str, parts: dict[str, nn.Module | None]) -> None:
    """Raise ExportError where a part of a QModule, that the deploy form does not call, has hooks or its own forward.

    parts: by name.
    """
    for name, part in parts.items():
        if part is not None and "forward" in part.__dict__:
            raise ExportError(
                f"{path}: the forward of {name} was replaced on the object, as some adapters do, which the file "
                "would not run. Merge the adapter into the weight for the export, or put what it computes into the "
                "forward of the model"
            )
        hooks = [] if part is None else [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        lost = [h for h in hooks if not isinstance(h, WEIGHT_HOOKS) and not getattr(h, "is_simulation", False)]
        if lost:
            names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in lost)
            raise ExportError(
                f"{path}: {name} has forward hooks ({names}), which the file would not run. Take them off for the "
                "export (the handle that registering them returned has remove()), or put what they compute into the "
                "forward of the model"
            )
