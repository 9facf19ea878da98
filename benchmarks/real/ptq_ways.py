"""The ways to quantize a real network after training: ours and those of other tools, at the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import torchquant as tq
from benchmarks.real.networks import Real
from benchmarks.real.peers import OTHERS, brevitas, nncf, ort, torchao
from benchmarks.real.peers._base import Quantized
from benchmarks.real.peers.brevitas import PLAIN
from benchmarks.real.peers.ours import SETS, quantized_weights
from torchquant import ptq
from torchquant.plan.rules import Rules

SECTIONS = {
    "w8a8": "8 bits of weights and activations, static ranges",
    "w4a8": "4-bit weights per channel, 8 bits of what each layer reads, static ranges; both ends float",
    "w4a8 set": "the rule set `w4a8`: 8 bits of all activations, and both ends in 8 bits",
    "w4": "4-bit weights per channel, activations float",
    "w4 group": "4-bit weights, a scale for each 32 of a row, activations float",
}
"""Kinds of cells: what is quantized."""
NEAREST, GPTQ, ADAROUND, AUTOROUND = "nearest", "gptq:act_order", "adaround", "autoround"
CONVOLUTIONAL, ENCODERS = ("face", "lite0", "pitch_small"), ("minilm", "speaker")
LIGHT = ("face", "pitch_small")
"""Networks on which what takes minutes elsewhere takes seconds."""
_TYPES = [kind.__name__ for kind in PLAIN]
_4_BITS = "affine:4,symmetric=narrow{}/{}"


@dataclass
class Made:
    """A quantized network, and what is known of how it came about."""

    quantized: Quantized
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """A way to quantize: `make(network, folder)`. `networks`: those it is measured on. `has_file`: it reads ONNX."""

    section: str
    tool: str
    algorithm: str
    make: Callable[[Real, Path], Made]
    networks: tuple[str, ...]
    has_file: bool = False

    @property
    def name(self) -> str:
        return f"{self.section} | {self.tool} | {self.algorithm}"


def ends_of(model: nn.Module, batch: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of the first and the last layer that a forward runs."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, PLAIN)
    ]
    model(*batch)
    for hook in hooks:
        hook.remove()
    return ran[0], ran[-1]


def ours(network: Real, folder: Path, rules: Rules | Callable[[Real], Rules], stages: str) -> Made:
    """The network by rules and stages; the seconds of the stages are those of one core."""
    chosen = rules(network) if callable(rules) else rules
    model = tq.quantize(network.model, chosen, network.calibration[0])
    tq.calibrate(model, network.calibration, with_targets=False, show_progress=False)
    began = time.process_time()
    found = ptq.find_recipe(stages).stages
    report = ptq.run(model, found, network.calibration, with_targets=False, show_progress=False)
    return Made(
        Quantized(model, quantized_weights(model)),
        {
            "stage_seconds": time.process_time() - began,
            "layers": len({step.path for step in report.steps if step.path}),
            "undone": sum(step.note.startswith("undone") for step in report.steps if step.path),
        },
    )


def reads_of_layers(network: Real, scales: str = ",observer=mse") -> Rules:
    """4-bit weights per channel and 8 bits of what each layer reads; the first and the last layer stay float."""
    weight, read = _4_BITS.format(scales, "channel"), f"affine:8{scales}"
    return [
        {"types": _TYPES, "weight": weight, "input": read, "fold_bn": True},
        {"names": [*ends_of(network.model, network.calibration[0])], "skip": True},
    ]


def weights_only(scales: str = ",observer=mse", grain: str = "channel") -> Rules:
    """4-bit weights of layers, recurrent ones included, and nothing else."""
    return [{"types": [*_TYPES, "LSTM"], "weight": _4_BITS.format(scales, grain)}]


def _theirs(network: Real, folder: Path, make: Callable[..., Quantized], **options: Any) -> Made:
    return Made(make(network, folder, **options))


def _brevitas(network: Real, folder: Path, algorithm: str) -> Made:
    return Made(brevitas.rounded(network, folder, algorithm, ends_of(network.model, network.calibration[0])))


def _ways() -> list[Way]:
    every, linear = (*CONVOLUTIONAL, *ENCODERS), ("minilm",)
    found = [
        Way("w8a8", "ours", f"`{rules}`", partial(ours, rules=rules, stages=NEAREST), networks or every)
        for rules, networks in SETS.items()
        if rules.startswith("w8a8")
    ]
    found += [
        Way("w8a8", "ours", f"`w8a8` {stages}", partial(ours, rules="w8a8", stages=f"{stages},nearest"), linear)
        for stages in ("smoothquant", "rotate")
    ]
    for name, peer in OTHERS.items():
        if not peer.is_dynamic:
            tool, _, rest = name.partition(" ")
            make = partial(_theirs, make=peer.build)
            found.append(Way("w8a8", tool, rest, make, peer.networks or every, "onnx" in peer.packages))
    inputs: Mapping[str, Any] = {"minmax": partial(reads_of_layers, scales=""), "": reads_of_layers}
    for scales, stages, networks in (
        ("minmax", NEAREST, (*CONVOLUTIONAL, *linear)),
        ("", NEAREST, (*CONVOLUTIONAL, *linear)),
        ("", "nearest,bias_correction", (*CONVOLUTIONAL, *linear)),
        ("", GPTQ, (*CONVOLUTIONAL, *linear)),
        ("", f"{GPTQ},match=layer", (*CONVOLUTIONAL, *linear)),
        ("", "qronos", LIGHT),
        ("", "gpfq", LIGHT),
        ("", AUTOROUND, (*CONVOLUTIONAL, *linear)),
        ("", ADAROUND, (*CONVOLUTIONAL, *linear)),
    ):
        label = f"{stages} (scales: min-max)" if scales else stages
        found.append(Way("w4a8", "ours", label, partial(ours, rules=inputs[scales], stages=stages), networks))
    for algorithm in ("nearest", "bias_correction", "gptq", "gpfq", "adaround"):
        heavy = algorithm in ("gpfq", "adaround")
        networks = LIGHT if heavy else (*CONVOLUTIONAL, *linear)
        found.append(Way("w4a8", "Brevitas", algorithm, partial(_brevitas, algorithm=algorithm), networks))
    for stages in (NEAREST, GPTQ):
        found.append(Way("w4a8 set", "ours", stages, partial(ours, rules="w4a8", stages=stages), CONVOLUTIONAL))
    for section, rules, group in (
        ("w4", weights_only(), 0),
        ("w4 group", weights_only("", "group=32"), 32),
    ):
        for stages in (NEAREST, GPTQ, f"{GPTQ},match=layer", "awq,nearest", "hqq,nearest"):
            where = ENCODERS if stages in (NEAREST, GPTQ) and not group else linear
            found.append(Way(section, "ours", stages, partial(ours, rules=rules, stages=stages), where))
        for algorithm in ("", "awq", "scale_estimation", "gptq"):
            make = partial(_theirs, make=nncf.compressed, group=group or -1, algorithm=algorithm)
            where = ENCODERS if not algorithm and not group else linear
            found.append(Way(section, "NNCF", algorithm or NEAREST, make, where, True))
        for algorithm in ("affine", "hqq_scale_only", "gptq"):
            make = partial(_theirs, make=torchao.rounded, group=group, algorithm=algorithm)
            label = NEAREST if algorithm == "affine" else algorithm
            where = ENCODERS if algorithm == "affine" and not group else linear
            found.append(Way(section, "torchao", label, make, where))
        for algorithm in ("rtn", "hqq", "gptq") if group else ("rtn",):
            make = partial(_theirs, make=ort.nbits, group=group, algorithm=algorithm)
            label, where = NEAREST if algorithm == "rtn" else algorithm, linear if group else ENCODERS
            found.append(Way(section, "ORT", label, make, where, True))
    return found


WAYS = {way.name: way for way in _ways()}
"""Name -> way, in the order of the page."""
