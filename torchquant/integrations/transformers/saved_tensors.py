"""The tensors of a saved model: their names and shapes between a packed file and a checkpoint of transformers.

Codes have the name of the weight, which keeps transformers' own bookkeeping (ties, shards, missing weights) right, and
the shape (bytes,), which is that of no matrix: whoever reads them as floats gets an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant._shown import some
from torchquant.deploy.packed.contents import CODES, SHARED, contents_of, load_contents, load_state
from torchquant.deploy.packed.head import Head
from torchquant.errors import ConfigError
from torchquant.graph.own_inputs import expect_slots
from torchquant.integrations.transformers.config import TorchquantConfig
from torchquant.plan import QuantPlan, quantize

BESIDE = {CODES: "_codes", SHARED: "_shared"}
"""Ending of a name in a packed file -> that of the buffer that holds it, for codes beside a float weight."""


def tensors_to_save(model: Any, plan: QuantPlan, save_as: str) -> tuple[dict[str, Tensor], Head]:
    """Return the tensors that `save_pretrained` writes and the head; `save_as` as in TorchquantConfig.

    Raises ExportError for a weight without codes, ConfigError for a plan that cannot be saved.
    """
    if save_as == "float":
        return model.state_dict(), Head({}, plan.to_dict())
    tensors, head = contents_of(model)
    head = Head(head.weights, plan.to_dict(), None, head.tied)
    for key in list(tensors):
        if (name := _source(model, key)) not in tensors:
            tensors[name] = tensors.pop(key)
    known = model.state_dict().keys()
    for key in head.weights:
        name = _source(model, key)
        if key + CODES in tensors and name in known and name not in tensors:
            tensors[name] = tensors.pop(key + CODES)
        for inside, beside in BESIDE.items():
            if key + inside in tensors:
                tensors[key + beside] = tensors.pop(key + inside)
    return tensors, head


def expect_floats(model: Any, entries: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a float model with weights that the file lacks: of another class than the saved one."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    lacking = [k for k in model.state_dict() if _source(model, k) not in entries and k not in (*entries, *ignored)]
    if lacking:
        saved = ", ".join(getattr(model.config, "architectures", None) or ()) or "another class"
        raise ConfigError(
            f"the quantized model was saved from {saved}, and {type(model).__name__} has other weights: {some(lacking)}"
            f". Load it as {saved}"
        )


def types_of_weights(model: Any, head: Head) -> dict[str, torch.dtype]:
    """Return the name under which each quantized weight is saved -> the type of the values behind its codes."""
    return {_source(model, key): getattr(torch, kind) for key, (_, kind, *_) in head.weights.items()}


@torch.no_grad()
def load_quantized(model: Any, config: TorchquantConfig, stored: Mapping[str, Tensor]) -> None:
    """Quantize a float model that was loaded, by its saved plan, and load what was stored beside its floats."""
    head, place = config.head, f"the model in {model.config.name_or_path}"
    floats = {_source(model, key): value for key, value in model.state_dict().items()}
    quantize(model, QuantPlan.from_dict(head.plan, "the plan in config.json"), inplace=True)
    tensors = floats | dict(stored)
    if config.save_as == "float":
        expect_slots(model, tensors)
        load_state(place, model, tensors)
        return
    for key in head.weights:
        for inside, beside in BESIDE.items():
            if key + beside in tensors:
                tensors[key + inside] = tensors.pop(key + beside)
        name = _source(model, key)
        if key not in head.tied and key + CODES not in tensors:
            tensors[key + CODES] = tensors.pop(name)
    load_contents(place, model, {key: value.cpu() for key, value in tensors.items()}, head)


def _source(model: Any, name: str) -> str:
    """Return the name under which transformers saves a tensor: of tied ones, that of their source."""
    source: str = model.all_tied_weights_keys.get(name, name)
    return source
