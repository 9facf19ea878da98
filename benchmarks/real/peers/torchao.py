"""torchao: its dynamic int8 of linear layers, and PT2E with the quantizer for x86."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real.networks import Real
from benchmarks.real.peers._base import Peer, Quantized
from torchquant.errors import require


def dynamic(network: Real, folder: Path) -> Quantized:
    """int8 weights a row, int8 activations of a range measured for each token."""
    tool = require("torchao.quantization", "networks")
    model = copy.deepcopy(network.model)
    before = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    tool.quantize_(model, tool.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    changed = [name for name, p in model.named_parameters() if name in before and _is_quantized(p)]
    return Quantized(model, [before[name] for name in changed])


def rounded(network: Real, folder: Path, group: int = 0, algorithm: str = "affine", reads: bool = False) -> Quantized:
    """4-bit weights of linear layers, a scale for each `group` weights of a row, or each row (0).

    `algorithm`: that of its scales, "affine" or "hqq_scale_only", or "gptq". `reads`: 8 bits of each token that a layer
    reads, its range measured.
    """
    tool, model = require("torchao.quantization", "networks"), copy.deepcopy(network.model)
    before = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    grain = tool.PerGroup(group) if group else tool.PerAxis(0)
    if algorithm == "gptq":
        prototype = require("torchao.prototype.gptq", "networks")
        base = tool.Int8WeightOnlyConfig()  # 4 bits want the package mslk
        tool.quantize_(model, prototype.GPTQConfig(step="observe", base_config=base))
        for batch in network.calibration:
            model(*batch)
        tool.quantize_(model, prototype.GPTQConfig(step="convert", base_config=base))
    elif reads:
        given = {"weight_dtype": torch.int4, "weight_granularity": grain, "intx_choose_qparams_algorithm": algorithm}
        tool.quantize_(model, tool.Int8DynamicActivationIntxWeightConfig(**given))
    else:
        given = {"weight_dtype": torch.int4, "granularity": grain, "intx_choose_qparams_algorithm": algorithm}
        tool.quantize_(model, tool.IntxWeightOnlyConfig(**given))
    changed = [name for name, p in model.named_parameters() if name in before and _is_quantized(p)]
    return Quantized(model, [before[name] for name in changed])


def _is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter) is not nn.Parameter and type(parameter.data) is not torch.Tensor


@torch.no_grad()
def static(network: Real, folder: Path) -> Quantized:
    """PT2E: exported, observed with the default configuration for x86 (histogram, per channel), converted."""
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e", "networks")
    x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "networks")
    graph = torch.export.export(network.model, network.calibration[0]).module()
    chosen = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(graph, chosen)
    for batch in network.calibration:
        prepared(*batch)
    converted = pt2e.convert_pt2e(prepared)
    return Quantized(converted, _codes(converted))


def _codes(graph: Any) -> list[int]:
    """How many numbers each weight holds that a converted graph stores as int8."""
    stored = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = stored.get(node.target)
            if value is None:
                value = getattr(graph, node.target, None)
            if isinstance(value, torch.Tensor) and value.dtype == torch.int8 and value.ndim > 1:
                found[node.target] = value.numel()
    return list(found.values())


PEERS = {
    "torchao dynamic": Peer(
        ("torchao",),
        dynamic,
        "Int8DynamicActivationInt8WeightConfig: linear layers only, ranges of each token",
        is_dynamic=True,
    ),
    "torchao static": Peer(("torchao",), static, "PT2E with X86InductorQuantizer: convolutions and linear layers"),
}
