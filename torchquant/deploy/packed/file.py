"""Save and load packed models: one safetensors file with every quantized weight as codes at their true width."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant.deploy.packed.contents import contents_of, load_contents
from torchquant.deploy.packed.head import Head, metadata_of, read_head
from torchquant.deploy.packed.reading import read_safetensors
from torchquant.deploy.packed.references import model_of, split_reference
from torchquant.deploy.packed.weight_codes import (
    CodesQuantizer,
    quantized_slots,
)
from torchquant.errors import ConfigError, ExportError, require
from torchquant.plan import QuantPlan, quantize
from torchquant.qmodule import QModule

Build = str | tuple[str, Mapping[str, Any]]


@checked
@torch.no_grad()
def save_packed(model: nn.Module, path: str | os.PathLike[str], build: Build | None = None) -> Path:
    """Write a calibrated model as one .safetensors file that `load_packed` reads. Returns its path.

    Of a quantized weight only the codes are stored, as wide as `code_range` and without gaps, with the scale of a block
    once per block. A weight that several layers share is stored once if they agree on codes and numbers. The rest of
    the `state_dict` is stored unchanged, and so is the plan of a model that `quantize` made, unless the plan holds
    functions, which have no text. `build`: the function that builds the model when only the file is there:
    "package.module:function", "path/to/file.py:function" (relative to the working folder at that time), or a tuple of
    this and its keyword arguments. It returns the float model if the file has a plan, else the quantized one.

    The state of the QModules does not matter. A save that fails leaves no file. Needs the extra `deploy`.
    Raises ExportError that names the site, ConfigError for a bad `build`, MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import observe_weights, quantize
    >>> model = quantize(nn.Linear(256, 256), [{"weight": "affine:4/channel"}])
    >>> observe_weights(model)
    >>> sizes = {"in_features": 256, "out_features": 256}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = save_packed(model, f"{folder}/model.safetensors", ("torch.nn:Linear", sizes))
    ...     file.stat().st_size < 256 * 256 * 4 / 6  # a sixth of float32
    ...     type(load_packed(file)).__name__
    True
    'QWrapper'
    """
    safetensors = require("safetensors.torch", "deploy")
    if not any(isinstance(module, QModule) for module in model.modules()):
        raise ExportError(
            f"{type(model).__name__} has no QModule, so nothing in it is quantized. Quantize it with "
            "torchquant.quantize, or save its state_dict"
        )
    reference = _checked_build(build)
    tensors, head = contents_of(model, reference)
    metadata = metadata_of(tensors, head)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, lambda temporary: safetensors.save_file(tensors, temporary, metadata))


@checked
@torch.no_grad()
def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load the model of a packed file, in eval mode and QUANT_EVAL; it computes the same as the saved one, bit for bit.

    `model`: the float model if the file has a plan, or the quantized one, built as it was for saving; it is copied, not
    changed. Without it the file's `build` is called: a function of a module or Python file that the packed file names,
    with arguments from the file. This runs code, so do it only with files you trust. With `model` nothing is imported
    and no code runs. No pickle is read in either case.

    Quantized weights are decoded from their codes, so the model is for inference: quantizing in train mode raises
    ConfigError, and observing does not change weight quantizers. Its float weights, which other states use, are the
    values of the codes without the folded batch norm, and need no gradient. The model can be exported, analysed and
    packed again.

    Raises ConfigError for a file that is damaged or not a packed model, and for a model that does not fit the file;
    MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import QModuleState, observe_weights, quantize, set_qmodule_state
    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> model = quantize(net, [{"weight": "affine:4/channel"}])
    >>> observe_weights(model)
    >>> set_qmodule_state(model.eval(), QModuleState.QUANT_EVAL)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = load_packed(save_packed(model, f"{folder}/model.safetensors"), net)
    >>> x = torch.randn(3, 4)
    >>> torch.equal(loaded(x), model(x))
    True
    """
    tensors, metadata = read_safetensors(path)
    head = read_head(path, tensors, metadata)
    loaded = _built(path, head, model)
    load_contents(path, loaded, tensors, head)
    return loaded.eval()


def _checked_build(build: Build | None) -> tuple[str, dict[str, Any]] | None:
    if build is None:
        return None
    reference, arguments = (build, {}) if isinstance(build, str) else build
    split_reference(reference)
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ConfigError(f"the arguments of {reference} must be plain JSON data: {error}") from error
    return reference, dict(arguments)


def _built(path: str | os.PathLike[str], head: Head, model: nn.Module | None) -> nn.Module:
    """Make a copied or newly built quantized model to load the file into."""
    if model is not None:
        own = copy.deepcopy(model)
    elif head.build is not None:
        reference, arguments = head.build
        own = model_of(reference, **arguments)
    else:
        raise ConfigError(
            f"{path} does not name a function that builds its model. Give load_packed the model, or save_packed a "
            "build such as 'my_package.models:my_model'"
        )
    if not any(isinstance(module, QModule) for module in own.modules()):
        if head.plan is None:
            raise ConfigError(
                f"{path} has no plan, so it is loaded into the quantized model, built as it was for saving; got a "
                f"float {type(own).__name__}"
            )
        own = quantize(own, QuantPlan.from_dict(head.plan, f"the plan in {path}"), inplace=True)
    for slot in quantized_slots(own).values():
        if isinstance(slot.quantizer, CodesQuantizer):
            slot.replace_quantizer(slot.quantizer.quantizer)
    return own
