"""Adapters of other libraries, which learn of a model of theirs that was quantized; neither is imported here."""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn

ADAPTERS = {
    ("transformers.modeling_utils", "PreTrainedModel"): ("torchquant.integrations.transformers.hf_quantizer", "attach")
}
"""(module, class of models) -> (module, function of the quantized model). A class that is not loaded has no models."""


def tell_adapters(model: nn.Module) -> None:
    """Call the adapter of the library that the class of the model belongs to, if there is one."""
    for (library, base), (adapter, function) in ADAPTERS.items():
        if library in sys.modules and isinstance(model, getattr(sys.modules[library], base)):
            getattr(import_module(adapter), function)(model)
