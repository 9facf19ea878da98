"""Refuse hooks of a model that an exported file would not run."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchquant.errors import ExportError

WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that compute the weight; the file holds the computed weight."""


def refuse_hooks(path: str, parts: dict[str, nn.Module | None]) -> None:
    """Raise ExportError if a part that the lowered model does not call has hooks or a replaced forward.

    parts: name -> part of the QModule.
    """
    for name, part in parts.items():
        if part is not None and "forward" in part.__dict__:
            raise ExportError(
                f"{path}: the forward of {name} was replaced on the object, as some adapters do, which the file "
                "would not run. Merge the adapter into the weight for the export, or put its computation into the "
                "forward of the model"
            )
        hooks = [] if part is None else [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        lost = [h for h in hooks if not isinstance(h, WEIGHT_HOOKS) and not getattr(h, "is_simulation", False)]
        if lost:
            names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in lost)
            raise ExportError(
                f"{path}: {name} has forward hooks ({names}), which the file would not run. Remove them for the "
                "export (with remove() of the handle that registering them returned), or put their computation into "
                "the forward of the model"
            )
