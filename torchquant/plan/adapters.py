"""Adapters of other libraries, which learn of a model of theirs that was quantized; neither is imported here."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from torch import nn

from torchquant.errors import MissingDependencyError

ADAPTERS = {
    ("transformers.modeling_utils", "PreTrainedModel"): ("torchquant.integrations.transformers.hf_quantizer", "attach")
}
"""(module, class of models) -> (module, function of the quantized model). A class that is not loaded has no models."""


def tell_adapters(model: nn.Module) -> None:
    """Call the adapter of the library that the class of the model belongs to, if there is one.

    Warns if the adapter cannot be used with the version that is installed.
    """
    for (library, base), (adapter, function) in ADAPTERS.items():
        if not (library in sys.modules and isinstance(model, getattr(sys.modules[library], base))):
            continue
        try:
            tell = getattr(import_module(adapter), function)
        except MissingDependencyError as error:
            name = library.partition(".")[0]
            warnings.warn(f"{name} cannot save this model with its quantizers: {error}", stacklevel=4)
        else:
            tell(model)
