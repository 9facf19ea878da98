"""A valid call for every public callable, or the reason why there is none: what test_wrong_arguments.py walks.

`CALLS`: address -> name -> function that makes the arguments anew. `NOT_CALLED`: address -> reason -> names.
"""

from __future__ import annotations

import copy
import functools
import importlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchquant as tq
from torchquant import deploy, search
from torchquant.qmodule import ActivationPattern, LayerPattern
from torchquant.quantizers_functional import FloatFormat
from torchquant.quantizers_functional._row_statistics import Joining
from torchquant.range_observers import BatchMinMax
from torchquant.training import Monitor

Arguments = dict[str, Any]
X = torch.linspace(-1.0, 1.0, 32).reshape(8, 4)
TARGETS = torch.arange(8) % 2
BATCHES = [(X, TARGETS)]
ROWS = torch.linspace(-1.0, 1.0, 16).reshape(2, 8)
SEARCHED = [{"weight": ["affine:2", "affine:8"]}]
DEGRADATIONS = {("0", "weight"): [0.9, 0.1], ("2", "weight"): [0.2, 0.0]}


@functools.cache
def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@functools.cache
def _quantized(rules: str = "int8-ort") -> nn.Module:
    model = tq.quantize(_net(), rules, X)
    with tq.qmodule_state(model, tq.QModuleState.CALIBRATION):
        model(X)
    tq.set_qmodule_state(model.eval(), tq.QModuleState.QUANT_EVAL)
    return model


@functools.cache
def _file(folder: Path, kind: str) -> Path:
    if kind == "packed":
        return deploy.save_packed(_quantized(), folder / "model.safetensors")
    return deploy.export_onnx(_quantized(), folder / "model.onnx", X)


def lora_config() -> Any:
    return importlib.import_module("peft").LoraConfig(r=2, target_modules=["0"])


def net() -> nn.Module:
    return copy.deepcopy(_net())


def quantized(rules: str = "int8-ort") -> nn.Module:
    return copy.deepcopy(_quantized(rules))


def q(spec: str = "affine:8") -> tq.Quantizer:
    return tq.make_quantizer(spec)


def ready(spec: str, site: str) -> tq.Quantizer:
    quantizer = tq.make_quantizer(spec, site)
    quantizer.pre_observe(X)
    return quantizer


def file(kind: str) -> Path:
    return _file(FOLDER, kind)


FOLDER = Path()
"""Where files go that several calls read; set by the test."""


def observer(**options: Any) -> Callable[[], Arguments]:
    return lambda: {**options, "axis": 0, "nonfinite": "raise"}


def fitted(**options: Any) -> Callable[[], Arguments]:
    return lambda: {**options, "axis": 0, "momentum": 0.5, "gradient_clip": True, "nonfinite": "raise"}


def learned(**options: Any) -> Callable[[], Arguments]:
    return lambda: {**options, "axis": 0, "nonfinite": "raise"}


def projected(**options: Any) -> Callable[[], Arguments]:
    return lambda: {"x": X, **options, "gradient": "ste", "clamp": (0.0, 1.0)}


def searcher(settings: Any = None, rules: Any = SEARCHED) -> Callable[[], Arguments]:
    return lambda: {
        "net": net(),
        "rules": rules,
        "example_inputs": X,
        "budget": "bits<=7",
        "settings": settings,
        "per": "layer",
        "min_bits": 2,
        "max_bits": 4,
        "form": "interp",
        "loss": nn.functional.cross_entropy,
        "latency": None,
    }


def settings(**options: Any) -> Callable[[], Arguments]:
    given = {"epochs": 2, "weight_rate": 1e-3, "arch_rate": 1e-2, "alternate": True, "warmup": 0.1, "hard": False}
    given |= {"temperature": (5.0, 0.5), "cost_weight": 0.0, "cost_measure": "bytes", "penalty": 1.0}
    given |= {"price_rate": 0.05, "patience": 2, "start_bits": 4.0, "target": False}
    return lambda: {**given, **options}


def fused(kind: str) -> Callable[[], Arguments]:
    from torchvision import models

    made = {
        "FusedResNet": lambda: models.resnet18(num_classes=2),
        "FusedMobileNetV2": lambda: models.mobilenet_v2(num_classes=2, width_mult=0.1),
    }

    def arguments() -> Arguments:
        def quantizer(layer: nn.Module) -> tq.Quantizer:
            return q()

        given: Arguments = {"net": _float_model(kind, made[kind]), "weight_quantizer": quantizer}
        for name in ("acts", "avg_pool", "fc_weight", "fc_acts", "input"):
            given[f"{name}_quantizer"] = quantizer
        return {**given, "quantize_first": True, "quantize_fc": True, "fold_bn": False}

    return arguments


_MODELS: dict[str, nn.Module] = {}


def _float_model(kind: str, make: Callable[[], nn.Module]) -> nn.Module:
    if kind not in _MODELS:
        _MODELS[kind] = make()
    return _MODELS[kind]


def ewgs_model() -> Arguments:
    model = tq.QWrapper(nn.Linear(4, 2), q("ewgs:2"), None)
    tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    return {"model": model, "loss": lambda: model(X).square().mean(), "samples": 1, "generator": torch.Generator()}


def on_model(**options: Any) -> Callable[[], Arguments]:
    return lambda: {"model": quantized(), **options}


def fit_arguments(**options: Any) -> Callable[[], Arguments]:
    return lambda: {
        **options,
        **watched(),
        "batches": lambda: BATCHES,
        "epochs": 1,
        "learning_rate": 1e-2,
        "steps_per_epoch": 1,
        "loss": nn.functional.cross_entropy,
        "on_epoch": lambda epoch, loss: None,
        "progress": None,
        "generator": torch.Generator(),
        "warm_up": 0.3,
        "state": tq.QModuleState.QUANT_AWARE_TRAIN,
        "max_batches": 1,
        "device": "cpu",
        "show_progress": False,
        "teacher": net(),
        "amp": "bf16",
        "compiled": False,
    }


def watched() -> Arguments:
    model = quantized()
    return {"model": model, "monitor": tq.training.Monitor(model, every=1)}


def spoken() -> Arguments:
    given = net()
    return {"model": tq.QWrapper(given[0], q(), None), "float_state": given[0].state_dict(keep_vars=True)}


def curved() -> Arguments:
    w = torch.ones(3, requires_grad=True)
    return {
        "loss_fn": lambda: (w**4).sum(),
        "parameter": w,
        "draws": 3,
        "tolerance": 1e-3,
        "patience": 2,
        "generator": torch.Generator(),
    }


def latency_table() -> dict[tuple[str, str], float]:
    return {(site, spec): 1.0 for site in "02" for spec in ("affine:2", "affine:8")}


def latency_file() -> Path:
    return search.write_latency(FOLDER / "latency.json", latency_table())


def monitor_file() -> Path:
    path = FOLDER / "looks.csv"
    tq.training.CSVSink(path).write(1, {"loss": 1.0})
    return path


def grouped_weights() -> nn.Module:
    model = tq.quantize(nn.Sequential(nn.Linear(32, 4)), [{"weight": "affine:4/group=32"}])
    tq.observe_weights(model)
    return model


def packed_arguments() -> Arguments:
    return {"model": quantized(), "path": "packed.safetensors", "build": None}


def plan() -> tq.QuantPlan:
    return tq.QuantPlan.from_rules("int8-ort", _net(), X)


def searched() -> tq.QuantPlan:
    return tq.QuantPlan.from_rules(search.search_rules(SEARCHED), _net())


def yaml_file() -> Path:
    return plan().save(FOLDER / "plan.yaml") or FOLDER / "plan.yaml"


GRID: Arguments = {"alpha": 0.5}
CALLS: dict[str, dict[str, Callable[[], Arguments]]] = {
    "torchquant": {
        "AffineQuantizer": lambda: {
            **{"n_bits": 8, "range_observer": BatchMinMax(), "symmetric": "narrow", "gradient_clip": True}
        },
        "BatchMinMax": observer(),
        "ExpAvgMinMax": observer(momentum=0.5, init="corrected"),
        "ESBQuantizer": fitted(n_bits=4, significant_bits=1, center=True),
        "QOp": lambda: {**{"op": operator.add, "acts_quantizer": q(), "activation": nn.ReLU(), "input_quantizer": q()}},
        "QWrapper": lambda: {
            "layers": [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()],
            **{f"{site}_quantizer": q() for site in ("weight", "acts", "input", "bias", "preactivation")},
            "fold_bn": "running",
        },
        "QfmtQuantizer": lambda: {
            **{"n_bits": 8, "signed": True, "range_observer": BatchMinMax(), "gradient_clip": True},
            **{"rule": "nosat", "allow_clip": False},
        },
        "QuantSpec": lambda: {
            **{"scheme": "affine", "n_bits": 8, "options": (("symmetric", "narrow"),), "granularity": "group"},
            **{"group": 4, "gradient": "ste", "block": (4, 4)},
        },
        "TernaryQuantizer": fitted(method="twn"),
        "capture": lambda: {
            "model": net(),
            "example_inputs": X,
            "trace": True,
            "fuse": True,
            "patterns": {},
            "products": {},
        },
        "check_quantizer": lambda: {"quantizer": q(), "sample": X, "laws": ("on_grid",)},
        "freeze_bn": on_model(frozen=True),
        "make_quantizer": lambda: {"spec": "affine:8", "site": "weight"},
        "observe_weights": on_model(),
        "qmodule_state": on_model(state=tq.QModuleState.QUANT_EVAL),
        "quantize": lambda: {
            "model": net(),
            "rules": "int8-ort",
            "example_inputs": X,
            "inplace": False,
            "strict": False,
        },
        "quantizer_parameters": on_model(),
        "register_pattern": lambda: {"kind": nn.ReLU, "row": ActivationPattern(clamp=(0.0, None))},
        "set_lean": on_model(lean=True, recompute=True),
        "set_qmodule_state": on_model(state=tq.QModuleState.QUANT_EVAL),
        "state_report": on_model(),
    },
    "torchquant.quantizers_functional": {
        "FloatFormat": lambda: {"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "special": "none"},
        "adabin_quantize": lambda: {
            **{"x": X, "alpha": torch.tensor(1.0), "beta": torch.tensor(0.5), "gradient_scale": 1.0, "present": 1.0}
        },
        "irnet_params": lambda: {"rows": ROWS, "parts": Joining()},
        "irnet_quantize": lambda: {
            **{"w": X, "mean": torch.tensor(0.0), "deviation": torch.tensor(1.0), "scale": torch.tensor(1.0)},
            **{"gradient": "ede", "training": True},
        },
        "n2uq_quantize": lambda: {
            **{"x": X, "widths": torch.ones(3), "step": torch.tensor(1.0), "axis": None, "gradient_scale": 1.0}
        },
        "qil_quantize": lambda: {
            **{"x": X, "centre": torch.tensor(0.5), "distance": torch.tensor(0.5), "gamma": torch.tensor(1.0)},
            **{"n_bits": 3, "activation": False},
        },
        "rsign_quantize": lambda: {"x": X, "threshold": torch.tensor(0.1), "scale": 1.0, "gradient_scale": 1.0},
        "affine_params": lambda: {
            **{"range_min": torch.tensor(-1.0), "range_max": torch.tensor(1.0), "n_bits": 8, "symmetric": False}
        },
        "affine_quantize": projected(delta=0.1, zero_point=0, n_levels=16),
        "apot_quantize": lambda: {"x": X, "clip": torch.tensor(1.0), "n_bits": 4, "signed": True},
        "binary_quantize": projected(alpha=0.5),
        "codebook_quantize": lambda: {"x": X, "levels": torch.tensor([-1.0, 0.0, 1.0]), "axis": None},
        "dorefa_act_quantize": lambda: {"x": X, "n_bits": 4},
        "dorefa_gradient": lambda: {"x": X, "n_bits": 4, "generator": torch.Generator()},
        "dorefa_weight_quantize": lambda: {"w": X, "absmax": 1.0, "n_bits": 4},
        "esb_quantize": projected(alpha=0.5, n_bits=4, significant_bits=1),
        "gradient_clip": lambda: {"x": X, "range_min": -0.5, "range_max": 0.5},
        "lloyd_max": lambda: {"rows": ROWS, "n_levels": 4, "iterations": 3, "zero": True},
        "lsq_quantize": lambda: {
            **{"x": X, "step": torch.tensor(0.1), "n_bits": 4, "signed": True, "gradient_scale": 1.0},
            **{"offset": torch.tensor(0.0), "delta": None},
        },
        "midrise_quantize": projected(step=0.1, n_bits=4, shift=0.0),
        "minifloat_quantize": projected(scale=1.0, form=FloatFormat(4, 3)),
        "nf4_quantize": projected(absmax=1.0),
        "pact_quantize": lambda: {"x": X, "alpha": torch.tensor(1.0), "n_bits": 4, "calibrated": True},
        "pot_quantize": projected(alpha=1.0, n_bits=4),
        "qfmt_int_bits": lambda: {
            **{"range_min": torch.tensor(-1.0), "range_max": torch.tensor(1.0), "n_bits": 8, "signed": True},
            "rule": "nosat",
        },
        "qfmt_params": lambda: {**{"int_bits": torch.tensor(1.0), "n_bits": 8, "signed": True, "dtype": torch.float32}},
        "qfmt_quantize": projected(delta=0.25, min_int=-4, max_int=3),
        "residual_alphas": lambda: {
            **{"rows": ROWS, "n_bits": 2, "method": "alternating", "iterations": 2, "parts": Joining()},
        },
        "residual_levels": lambda: {"alphas": torch.tensor([[1.0, 0.5]])},
        "seq_quantize": lambda: {
            **{"x": X, "alpha": torch.tensor(1.0), "n_bits": 2, "ternary": True, "gradient_scale": 1.0, "present": 1.0}
        },
        "ternary_params": lambda: {"rows": ROWS, "method": "twn", "parts": Joining()},
        "ternary_quantize": projected(threshold=0.2, alpha=0.5),
        "tqt_quantize": lambda: {"x": X, "log2_t": torch.tensor(1.0), "n_bits": 4, "signed": True},
        "ttq_quantize": lambda: {
            **{"x": X, "threshold": 0.1, "positive": torch.tensor(1.0), "negative": torch.tensor(1.0)}
        },
    },
    "torchquant.quantizers": {
        "APoTQuantizer": learned(n_bits=4, signed=True, init="mse", normalize=True),
        "AbsMeanQuantizer": fitted(),
        "AdaBinActQuantizer": learned(),
        "AdaBinQuantizer": fitted(scale="mean"),
        "BinaryQuantizer": fitted(scale="one", stochastic=True),
        "BlockwiseQuantizer": lambda: {"quantizer": q("affine:8/channel"), "sizes": (2, -1)},
        "IRNetQuantizer": lambda: {"axis": 0, "momentum": 0.5, "nonfinite": "raise"},
        "N2UQActQuantizer": learned(n_bits=2),
        "N2UQQuantizer": fitted(n_bits=2),
        "QILQuantizer": learned(n_bits=3, activation=False),
        "RSignQuantizer": learned(),
        "ClipQQuantizer": fitted(n_bits=4),
        "CodebookQuantizer": learned(n_bits=3, zero=True, learn=True, iterations=3, momentum=0.0),
        "DoReFaQuantizer": learned(n_bits=4, activation=True, gradient_bits=8, rescale=False),
        "EWGSQuantizer": learned(n_bits=4, signed=True, delta=1e-3, init="mse", per_sample=False),
        "GroupQuantizer": lambda: {"quantizer": q("affine:8/channel"), "size": 4},
        "LSQPlusQuantizer": learned(n_bits=4, offset=True, init="mse", per_sample=False),
        "LSQQuantizer": learned(n_bits=4, signed=True, init="mse", per_sample=False),
        "MXQuantizer": lambda: {"n_bits": 4, "element": "fp4_e2m1", "mode": "floor", "block": 4, "block_axis": None},
        "MinifloatQuantizer": fitted(
            n_bits=8, exponent_bits=4, mantissa_bits=3, bias=7, special="none", scale="absmax"
        ),
        "NF4Quantizer": fitted(),
        "NVFP4Quantizer": lambda: {
            **{"two_level": True, "block": 4, "block_axis": None, "momentum": 0.0, "nonfinite": "raise"}
        },
        "PACTQuantizer": learned(n_bits=4, init="mse", calibrated=True),
        "PotQuantizer": fitted(n_bits=4),
        "ResidualQuantizer": fitted(n_bits=2, method="alternating", iterations=2),
        "SEQQuantizer": learned(n_bits=2, ternary=True),
        "TQTQuantizer": learned(n_bits=4, signed=True, init="mse"),
        "TTQQuantizer": learned(t=0.05),
        "UL2QQuantizer": fitted(n_bits=4),
        "VecQQuantizer": fitted(n_bits=4),
        "ZoomQQuantizer": fitted(n_bits=4),
        "catalogue": dict,
        "find_scheme": lambda: {"name": "affine"},
        "pact_penalty": lambda: {"model": ready("pact:4", "output"), "weight": 1e-3},
        "scheme_entry": lambda: {"name": "affine"},
        "weight_spec": lambda: {"name": "affine", "n_bits": 8},
    },
    "torchquant.range_observers": {
        "ACIQObserver": observer(n_bits=4, family="auto", momentum=0.0),
        "EntropyObserver": observer(n_bits=4, n_bins=64, decay=0.0, symmetric=False),
        "HistogramObserver": observer(percentile=99.0, n_bins=64, decay=0.0),
        "MSEObserver": observer(n_bits=4, symmetric=False, power=2.0, n_bins=64, decay=0.0),
        "MeanStdObserver": observer(k=3.0, momentum=0.0),
        "check_observer": lambda: {"observer": BatchMinMax()},
        "PercentileObserver": observer(percentile=99.0, low_percentile=1.0, momentum=0.0),
        "RunningMinMax": observer(),
    },
    "torchquant.qmodule": {
        "ActivationPattern": lambda: {"clamp": (0.0, None)},
        "InputFirstPattern": lambda: {**{"run": LayerPattern().run, "batch_norm": nn.BatchNorm1d, "transposed": False}},
        "LayerPattern": lambda: {**{"run": LayerPattern().run, "batch_norm": nn.BatchNorm1d, "transposed": False}},
        "WeightsPattern": lambda: {
            **{"weights": ("weight",), "values": ("input",), "groups": {}, "stacks": (), "biases": {}},
            "transposed": (),
        },
        "ChannelSplit": lambda: {"index": torch.tensor([0, 1, 1]), "axis": -1},
        "ChannelScale": lambda: {"factor": torch.ones(4), "axis": -1},
        "LowRank": lambda: {"down": torch.ones(1, 4), "up": torch.ones(3, 1)},
        "Rotation": lambda: {"signs": torch.ones(4), "matrices": [torch.eye(2)], "axis": -1},
        "QWeights": lambda: {
            **{"layer": nn.Embedding(4, 3), "weight_quantizers": {"weight": q()}, "acts_quantizer": q()},
            "input_quantizer": q(),
        },
        "float_state_dict": on_model(),
        "link_float_state": spoken,
    },
    "torchquant.graph": {
        "register_operator": lambda: {
            "name": "relu",
            "targets": ["relu", nn.ReLU],
            "role": "passes",
            "n_reads": 1,
            "macs": None,
            "out_of_place": {"relu_": "relu"},
        },
    },
    "torchquant.utils": {"qmodules": on_model(), "weight_slots": on_model()},
    "torchquant.training": {
        "BitSchedule": on_model(bits={0: 8, 3: 4}, weight="affine:{n}", acts="affine:{n}"),
        "Distillation": lambda: {
            **{"teacher": net(), "share": 0.5, "temperature": 2.0, "features": {"0": "0"}, "feature_weight": 1.0},
            **{"attention_maps": {"0": "0"}, "scores": lambda outputs: outputs},
        },
        "GradientSchedule": on_model(gradient="clipped"),
        "CSVSink": lambda: {"path": FOLDER / "monitor.csv"},
        "Monitor": on_model(every=2, to=[lambda step, numbers: None], samples=64),
        "OscillationTracker": on_model(freeze_above=0.5, momentum=0.01),
        "QuantizationSchedule": on_model(quant_start_step=1, freeze_observer_step=2, freeze_bn_step=3),
        "ProgressiveFreezing": on_model(freeze_at=[2, 4], every=1),
        "RPReLU": lambda: {"num_parameters": 3, "init": 0.25},
        "Ramp": lambda: {"start": 0.0, "end": 1.0, "n_steps": 3, "shape": "linear"},
        "adapt_ewgs": ewgs_model,
        "calibrate": on_model(
            **{"batches": [X], "max_batches": 1, "device": "cpu", "state": tq.QModuleState.QUANT_EVAL},
            **{"on_batch": lambda n: None, "with_targets": False, "show_progress": False},
        ),
        "attention_map_loss": lambda: {"student": X[None], "teacher": X[None]},
        "dampening_loss": on_model(weight=1e-3),
        "distillation_loss": lambda: {"student": X, "teacher": X, "temperature": 2.0},
        "feature_loss": lambda: {"student": X, "teacher": X},
        "evaluate": on_model(
            **{"batches": BATCHES, "metric": nn.functional.cross_entropy, "max_batches": 1, "device": "cpu"},
            **{"on_batch": lambda n: None, "show_progress": False},
        ),
        "fit": fit_arguments(),
        "fit_quantized": fit_arguments(),
        "read_looks": lambda: {"path": monitor_file()},
        "reestimate_bn": on_model(batches=[X], state=tq.QModuleState.QUANT_EVAL),
        "series": lambda: {"looks": [tq.training.Look(1, {"loss": 1.0})]},
    },
    "torchquant.search": {
        "Budget": lambda: {"measure": "bytes", "limit": 40.0},
        "Candidates": lambda: {
            **{"specs": ("affine:{n}",), "min_bits": 2, "max_bits": 4, "field": "weight", "form": "interp"}
        },
        "CostModel": lambda: {"net": net(), "plan": searched(), "example_inputs": X, "latency": latency_table()},
        "MixtureQuantizer": lambda: {"rows": ["affine:2", "affine:8"], "site": "weight", "form": "interp"},
        "PrecisionLearning": searcher(search.PrecisionSettings(epochs=1), [{"weight": "affine:{n}"}]),
        "PrecisionSettings": settings(target=True),
        "SchemeSearch": searcher(search.SearchSettings(epochs=1)),
        "Search": searcher(search.SearchSettings(epochs=1)),
        "SearchSettings": settings(),
        "allocate": lambda: {
            **{"net": net(), "rules": SEARCHED, "example_inputs": X, "budget": "bits<=7", "sensitivity": DEGRADATIONS},
            **{"solver": "dp", "latency": None, "min_bits": 2, "max_bits": 8},
        },
        "default_candidates": lambda: {"n_bits": 4, "schemes": ("affine", "esb")},
        "hessian_trace": curved,
        "measure_latency": lambda: {"net": net(), "plan": searched(), "time_plan": lambda plan: 1.0},
        "pareto": lambda: {
            **{"net": net(), "rules": SEARCHED, "example_inputs": X, "sensitivity": DEGRADATIONS, "measure": "bytes"},
            **{"points": 2, "evaluate": lambda plan: 0.5, "evaluated": "measured", "solver": "dp"},
            **{"latency": None, "min_bits": 2, "max_bits": 8},
        },
        "read_latency": lambda: {"path": latency_file()},
        "render_report": lambda: {
            **{"title": "t", "summary": (["a"], [["b"]], "note"), "choices": [], "history": (), "budgets": ()},
            **{"candidates": None, "front": None, "chosen": None, "command": "make"},
        },
        "search_rules": lambda: {"rules": SEARCHED, "min_bits": 2, "max_bits": 8, "form": "interp"},
        "sensitivity": lambda: {
            **{"net": net(), "rules": SEARCHED, "example_inputs": X, "batches": BATCHES, "method": "mse"},
            **{"loss": nn.functional.cross_entropy, "out": None, "on_place": lambda place, degradations: None},
            **{"draws": 2, "seed": 0, "min_bits": 2, "max_bits": 8},
        },
        "write_latency": lambda: {"path": "latency.json", "table": latency_table()},
    },
    "torchquant.integrations": {
        "UpdateCodec": lambda: {"spec": "affine:4/channel"},
        "QuantizationCallback": lambda: {
            **{
                "calibration_batches": 2,
                "inputs": None,
                "quant_start_step": 0,
                "freeze_observer_step": 3,
                "freeze_bn_step": 2,
            },
            **{"schedules": [Monitor], "monitor": 5, "export": "model.onnx", "certified": True, "network": ""},
        },
        "TorchquantCallback": lambda: {
            **{"calibration_batches": 8, "quant_start_step": 0, "freeze_observer_step": 5, "freeze_bn_step": None},
            **{"schedules": [], "monitor": None, "bn_batches": 0},
        },
        "quantized_lora": lambda: {"model": quantized(), "config": lora_config()},
        "TorchquantConfig": lambda: {
            **{"rules": "w4a8", "example_inputs": X, "trace": True, "save_as": "codes", "plan": None},
            **{"weights": None, "tied": None, "version": "0.1.0", "quant_method": "torchquant"},
        },
    },
    "torchquant.deploy": {
        "certify": lambda: {
            **{"model": quantized(), "path": file("onnx"), "data": BATCHES, "bound": 0, "tie_bound": 1e-3},
            **{"ways": ("integer",), "stamp": False},
        },
        "export_compressed_tensors": lambda: {"model": grouped_weights(), "folder": "weights", "config": {}},
        "export_gguf": lambda: {
            **{"model": grouped_weights(), "path": "a.gguf", "architecture": "mine", "metadata": {}, "names": {}},
            "round_scales": True,
        },
        "export_onnx": on_model(
            path="a.onnx",
            example_inputs=X,
            dynamic_batch=True,
            verify=False,
            keep_signed=False,
            dynamic_shapes=None,
        ),
        "export_qonnx": on_model(path="b.onnx", example_inputs=X, dynamic_batch=False),
        "file_sizes": lambda: {"paths": [file("packed")]},
        "load_packed": lambda: {"path": file("packed"), "model": net()},
        "lower": on_model(example_inputs=X, keep_signed=False, as_exported=True),
        "run_onnx": lambda: {"path": file("onnx"), "x": X, "batch_size": 4, "optimize": False},
        "runtime_exact": on_model(example_inputs=X, rounding="ort"),
        "save_packed": packed_arguments,
        "to_integer": on_model(example_inputs=X, rounding="ort", keep_signed=False, as_exported=False),
    },
    "torchquant.analysis": {
        "analyze": on_model(
            batches=BATCHES,
            metric=None,
            loss=None,
            with_targets=True,
            apart=True,
            out=None,
            max_batches=1,
            device="cpu",
            on_batch=None,
            show_progress=False,
        ),
        "advise": on_model(
            batches=BATCHES,
            analysis=None,
            metric=None,
            loss=None,
            with_targets=True,
            max_batches=1,
            device="cpu",
            n_sites=1,
            on_batch=None,
            show_progress=False,
        ),
        "layer_errors": on_model(x=X, n_samples=100),
        "sqnr": lambda: {"x": X, "x_hat": X + 0.1},
        "weight_bytes": on_model(),
    },
    "torchquant.models": {"FusedMobileNetV2": fused("FusedMobileNetV2"), "FusedResNet": fused("FusedResNet")},
    "torchquant.ptq": {
        "Recipe": lambda: {
            "stages": ("gptq",),
            "rules": "w4a8",
            "keep": "best",
            "names": ("*",),
            "skip": (),
            "data": {},
            "cache": {},
        },
        "find_blocks": on_model(names=(), slots=None),
        "distilled_inputs": lambda: {
            "model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            "shape": (2, 4),
            "n_batches": 1,
            "steps": 1,
            "learning_rate": 0.1,
            "seed": 0,
        },
        "find_recipe": lambda: {"name": "gptq"},
        "make_stage": lambda: {"spec": "gptq"},
        "preview": on_model(stages=["nearest"], names=("*",), skip=(), blocks=()),
        "quantized_cache": lambda: {"keys": 4, "values": 4, "group": 32, "residual": 128, "rotate": False},
        "run": on_model(
            stages=["nearest"],
            batches=BATCHES,
            out=None,
            keep="best",
            names=["*"],
            skip=[],
            seed=0,
            max_batches=1,
            device=None,
            with_targets=True,
            on_step=None,
            show_progress=False,
            blocks=(),
            cache_bytes=1000,
        ),
    },
    "torchquant.plan": {"read_yaml": lambda: {"path": yaml_file()}},
}

RECORD = "a record that the library fills in"
ABSTRACT = "a base class: its subclasses are walked"
ELSEWHERE = "commands and their folders: their arguments are checked where commands are tested"
THEIRS = "arguments are those that AutoQNN or NNI published, and are checked as there"
NOT_CALLED: dict[str, dict[str, tuple[str, ...]]] = {
    "torchquant": {
        ABSTRACT: ("QModule", "Quantizer", "RangeObserver"),
        "made by from_rules, from_dict, load": ("QuantPlan",),
        "an enumeration of Python": ("QModuleState",),
    },
    "torchquant.quantizers_functional": {
        RECORD: ("Projected",),
        ABSTRACT: ("Format", "Gradient", "ScaledFormat"),
        "what a scheme gives as its `format()`": (
            "AffineParams",
            "Levels",
            "ScaledFloat",
            "Signs",
            "UniformGrid",
        ),
    },
    "torchquant.quantizers": {
        ABSTRACT: (
            *("FittedQuantizer", "GridQuantizer", "LearnedQuantizer", "LearnedUniform", "LevelList"),
            "UniformQuantizer",
        ),
        RECORD: ("About", "LawReport", "SchemeEntry"),
        "a type alias": ("QuantizerFactory",),
    },
    "torchquant.qmodule": {ABSTRACT: ("FloatCheckpoints", "InputTransform"), RECORD: ("WeightSlot", "WeightsPattern")},
    "torchquant.utils": {RECORD: ("SiteReport", "StateReport")},
    "torchquant.training": {
        RECORD: ("Instability", "Look", "OscillationReport"),
        "a type alias": ("Loss", "Metric", "OnEpoch"),
        "an interface": ("Sink",),
        "arguments are those of another library": ("MLflowSink", "TensorBoardSink", "TerminalSink", "WandbSink"),
    },
    "torchquant.search": {RECORD: ("Allocation", "EpochRecord", "Pareto", "ParetoPoint", "Sensitivity")},
    "torchquant.search_run": {
        RECORD: ("SearchRunResult", "StudyResult", "Trial"),
        ELSEWHERE: ("SearchConfig", "run_search", "run_study", "write_report"),
    },
    "torchquant.compare": {
        RECORD: ("Case", "CaseResult", "Row"),
        ELSEWHERE: (
            *("Recipe", "compare", "leaderboard", "load_plugin", "make_cases", "markdown", "read_leaderboard"),
            "write_leaderboard",
        ),
    },
    "torchquant.graph": {
        RECORD: ("Captured", "Unquantized", "Operator", "PlanCost", "SiteInput", "Site", "SiteCost", "SitePlan")
    },
    **{
        address: {ELSEWHERE: tuple(importlib.import_module(address).__all__)}
        for address in (
            "torchquant.cli",
            "torchquant.runs.analyze",
            "torchquant.runs.demo",
            "torchquant.runs.export",
            "torchquant.runs.ptq",
            "torchquant.runs.quantize",
        )
    },
    **{
        f"torchquant.compat.{name}": {THEIRS: tuple(importlib.import_module(f"torchquant.compat.{name}").__all__)}
        for name in (
            "autoqnn",
            "autoqnn.core",
            "autoqnn.datasets",
            "autoqnn.models",
            "autoqnn.quantizers",
            "checkpoints",
            "nni",
        )
    },
    "torchquant.errors": {
        "an error": tuple(importlib.import_module("torchquant.errors").__all__),
    },
    "torchquant.deploy": {
        RECORD: (
            *("Certificate", "Comparison", "FileSize", "FileSizes", "FirstDifference", "FloatOperator"),
            *("IntegerModel", "Lowered", "OutputRow", "SiteParity"),
        ),
        "needs a package that the tests do not install": ("export_executorch", "run_executorch"),
    },
    "torchquant.analysis": {
        RECORD: (
            *("Advice", "Analysis", "Effect", "Finding", "LayerError", "Remedy", "SiteAnalysis", "SiteError"),
            *("SlotFacts", "WeightBytes"),
        )
    },
    "torchquant.models": {"its package makes nets of millions of weights": ("FusedEfficientNet",)},
    "torchquant.ptq": {
        RECORD: (
            "Block",
            "BlockData",
            "Blocks",
            "Layer",
            "LayerData",
            "PTQReport",
            "Preview",
            "Readers",
            "StepReport",
            "UnitPreview",
        ),
        ABSTRACT: (
            "BiasChange",
            "BlockStage",
            "InputStage",
            "LowRankChange",
            "MatchingRounding",
            "ModelStage",
            "NumberSearch",
            "Rounding",
            "WeightChange",
        ),
    },
    "torchquant.integrations": {RECORD: ("Packet",)},
    "torchquant.plan": {RECORD: ("PlanChange",), "a type alias": ("Rules",)},
}
