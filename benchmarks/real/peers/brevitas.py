"""Brevitas: each layer by itself, or the traced graph; weights per channel, activations of 8 bits per tensor."""

from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real.networks import Real
from benchmarks.real.peers._base import Peer, Quantized
from torchquant.errors import require

Layers = dict[type[nn.Module], Any]
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def _layer_map(given: Layers, suffix: str, reads: bool, bits: int = 8) -> Layers:
    """A map of Brevitas with weights per channel and no quantized bias. `suffix`: of its quantizers, "" or "MSE".

    `reads`: whether the layers quantize what they read, with a zero point.
    """
    scaled = require("brevitas.quant.scaled_int", "bench")
    shifted = require("brevitas.quant.shifted_scaled_int", "bench")
    weight = type("Weight", (getattr(scaled, f"Int8WeightPerChannelFloat{suffix}"),), {"bit_width": bits})
    acts = {"input_quant": getattr(shifted, f"ShiftedUint8ActPerTensorFloat{suffix}")} if reads else {}
    return {
        kind: (entry[0], {**entry[1], "weight_quant": weight, "bias_quant": None, **acts})
        if entry is not None and kind in PLAIN
        else entry
        for kind, entry in given.items()
    }


@torch.no_grad()
def layerwise(network: Real, folder: Path, suffix: str) -> Quantized:
    tools = require("brevitas.graph.quantize", "bench")
    chosen = _layer_map(tools.LAYERWISE_COMPUTE_LAYER_MAP, suffix, reads=True)
    return _calibrated(network, tools.layerwise_quantize(copy.deepcopy(network.model), chosen))


@torch.no_grad()
def graph(network: Real, folder: Path) -> Quantized:
    tools = require("brevitas.graph.quantize", "bench")
    traced = tools.preprocess_for_quantize(copy.deepcopy(network.model), equalize_iters=0)
    chosen = _layer_map(tools.COMPUTE_LAYER_MAP, "", reads=False)
    return _calibrated(network, tools.quantize(traced, compute_layer_map=chosen))


@torch.no_grad()
def rounded(network: Real, folder: Path, algorithm: str, ends: tuple[str, ...], suffix: str = "MSE") -> Quantized:
    """4-bit weights per channel, by an algorithm of Brevitas; the layers of these names stay float.

    GPTQ and GPFQ take the columns with the largest inputs first, and the quantized activations.
    """
    tools = require("brevitas.graph.quantize", "bench")
    chosen = _layer_map(tools.LAYERWISE_COMPUTE_LAYER_MAP, suffix, reads=True, bits=4)
    model = tools.layerwise_quantize(copy.deepcopy(network.model), chosen, name_blacklist=[*ends])
    made = _calibrated(network, model)
    model(*network.calibration[0])  # its weight quantizers take their numbers from a forward pass behind calibration
    if algorithm in ("gptq", "gpfq"):
        mode = getattr(require(f"brevitas.graph.{algorithm}", "bench"), f"{algorithm}_mode")
        with mode(model, act_order=True) as running:
            for _ in range(running.num_layers):
                for batch in network.calibration:
                    running.model(*batch)
                running.update()
    elif algorithm == "bias_correction":
        with require("brevitas.graph.calibrate", "bench").bias_correction_mode(model):
            for batch in network.calibration:
                model(*batch)
    elif algorithm == "adaround":
        _learn_rounding(model, network)
    return made


def _learn_rounding(model: nn.Module, network: Real) -> None:
    """Run the learned rounding of Brevitas' examples, layer by layer, with the settings of AdaRound."""
    examples = require("brevitas_examples.imagenet_classification.ptq.learned_round_utils", "bench")
    settings = {"": "hard_sigmoid", "_loss": "regularised_mse", "_mode": "layerwise", "_lr_scheduler": None}
    settings |= {"_lr": 1e-2, "_iters": 300, "_batch_size": 8}
    given = Namespace(**{f"learned_round{name}": value for name, value in settings.items()})
    pairs = [(x, torch.zeros(len(x))) for (x,) in network.calibration]
    with torch.enable_grad():
        examples.apply_learned_round(model, pairs, given)


def _calibrated(network: Real, model: nn.Module) -> Quantized:
    calibrate = require("brevitas.graph.calibrate", "bench")
    model.eval()
    with calibrate.calibration_mode(model):
        for batch in network.calibration:
            model(*batch)
    return Quantized(model, _weights(model))


def _weights(model: nn.Module) -> list[int]:
    """How many numbers each weight holds that passes a quantizer."""
    found: dict[int, int] = {}
    for module in model.modules():
        quantizer = getattr(module, "weight_quant", None)
        if quantizer is not None and getattr(quantizer, "is_quant_enabled", True):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    found[id(parameter)] = parameter.numel()
    return list(found.values())


_NEEDS = ("brevitas",)
PEERS = {
    "Brevitas layerwise": Peer(_NEEDS, partial(layerwise, suffix=""), "layerwise_quantize, percentile"),
    "Brevitas layerwise MSE": Peer(_NEEDS, partial(layerwise, suffix="MSE"), "layerwise_quantize, least squares"),
    "Brevitas graph": Peer(_NEEDS, graph, "brevitas.graph.quantize.quantize of the traced model, percentile"),
}
