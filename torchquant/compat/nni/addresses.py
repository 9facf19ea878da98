"""The modules of NNI that hold its names, and those whose names are not here, with the reason."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from torchquant.compat.nni import evaluators
from torchquant.compat.nni.speedup import Calibrator, ModelSpeedupTensorRT
from torchquant.compat.nni.tracing import is_traceable, trace

WITH_ALL = (
    "algorithms.compression.pytorch.quantization",
    "compression.pytorch.quantization",
    "compression.pytorch.quantization.settings",
    "compression.pytorch",
    "compression.quantization",
    "compression.utils",
    "compression.utils.evaluator",
    "compression.base.compressor",
)
"""Modules with all names of `torchquant.compat.nni`, below its root."""
HOOKS = {name: getattr(evaluators, name) for name in ("TensorHook", "ForwardHook", "BackwardHook", "Hook")}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "common": {"trace": trace, "is_traceable": is_traceable},
    "common.serializer": {"trace": trace, "is_traceable": is_traceable},
    "common.types": {"SCHEDULER": LRScheduler},
    "compression.utils": HOOKS,
    "compression.utils.evaluator": HOOKS,
    **{
        f"{place}{below}": {"ModelSpeedupTensorRT": ModelSpeedupTensorRT, "Calibrator": Calibrator}
        for place in ("compression.quantization_speedup", "compression.pytorch.quantization_speedup")
        for below in ("", ".calibrator")
    },
}
"""Modules with further names."""
_PRUNING = "torchquant quantizes and does not prune; torch.nn.utils.prune and torch-pruning do, before quantization"
_TUNING = "torchquant does not tune hyperparameters; Optuna and Ray Tune do"
ABSENT = {
    "compression.pruning": _PRUNING,
    "compression.pytorch.pruning": _PRUNING,
    "algorithms.compression.pytorch.pruning": _PRUNING,
    "compression.speedup": _PRUNING,
    "compression.distillation": "torchquant.training.fit(model, batches, teacher=...) distils while it trains",
    "compression.base.wrapper": "layers are wrapped by torchquant.QWrapper, QWeights and QOp, which state_report lists",
    "compression.base.setting": "torchquant.capture(model).sites lists what of each module can be quantized",
    "nas": "torchquant.search searches schemes and bit widths, and no architectures",
    "experiment": _TUNING,
    "retiarii": "torchquant.search searches schemes and bit widths, and no architectures",
}
"""Modules that are not here, and where to go instead."""


class _Address(ModuleType):
    """A module of NNI. A name that it does not have raises an error with the reason."""

    why = "it is not about quantization, or only for NNI's own use"
    __path__: list[str] = []  # lets Python look for what is below it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"{self.__name__} has no '{name}' here: {self.why}")


def add_addresses(root: str, names: Mapping[str, Any]) -> None:
    """Make the modules of NNI below the module `root`, with these names in those of `WITH_ALL`."""
    for address in WITH_ALL:
        module = _module(root, address)
        for name, value in names.items():
            setattr(module, name, value)
    for address, others in OTHERS.items():
        for name, value in others.items():
            setattr(_module(root, address), name, value)
    for address, why in ABSENT.items():
        _module(root, address).__dict__["why"] = why


def _module(root: str, address: str) -> ModuleType:
    owner = sys.modules[root]
    for part in address.split("."):
        path = f"{owner.__name__}.{part}"
        module = sys.modules.setdefault(path, _Address(path, "An address of NNI."))
        if part not in vars(owner):
            setattr(owner, part, module)
        owner = module
    return owner
