"""The public names: none appears, goes or moves without a line here and in the changelog."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

import torchquant
from tests import NEED_MORE, ROOT

# fmt: off
PUBLIC: dict[str, list[str]] = {
    "torchquant": [
        "AffineQuantizer", "BatchMinMax", "ESBQuantizer", "ExpAvgMinMax", "QModule", "QModuleState", "QOp",
        "QUANTIZERS", "QWrapper", "QfmtQuantizer", "QuantPlan", "QuantSpec", "Quantizer", "RangeObserver",
        "TernaryQuantizer", "calibrate", "capture", "check_quantizer", "evaluate", "fit", "freeze_bn",
        "make_quantizer", "observe_weights",
        "qmodule_state", "quantize", "quantizer_parameters", "register_operator", "register_pattern",
        "set_lean", "set_qmodule_state", "state_report",
    ],
    "torchquant.quantizers_functional": [
        "adabin_quantize", "irnet_params", "irnet_quantize", "n2uq_quantize", "qil_quantize", "rsign_quantize",
        "AffineParams", "FloatFormat", "Format", "GRADIENTS", "Gradient", "KERNELS", "Levels", "Projected",
        "ScaledFloat", "ScaledFormat", "Signs", "UniformGrid", "affine_params", "affine_quantize",
        "apot_quantize", "binary_quantize", "codebook_quantize", "dorefa_act_quantize", "dorefa_gradient",
        "dorefa_weight_quantize", "esb_quantize", "gradient_clip", "lloyd_max", "lsq_quantize",
        "midrise_quantize", "minifloat_quantize", "nf4_quantize", "pact_quantize", "pot_quantize",
        "qfmt_int_bits", "qfmt_params", "qfmt_quantize", "residual_alphas", "residual_levels", "seq_quantize",
        "ternary_params", "ternary_quantize", "tqt_quantize", "ttq_quantize",
    ],
    "torchquant.quantizers": [
        "AdaBinActQuantizer", "AdaBinQuantizer", "IRNetQuantizer", "N2UQActQuantizer", "N2UQQuantizer", "QILQuantizer",
        "RSignQuantizer", "APoTQuantizer", "AbsMeanQuantizer", "About", "AffineQuantizer", "BinaryQuantizer",
        "ClipQQuantizer",
        "BlockwiseQuantizer", "CodebookQuantizer",
        "DoReFaQuantizer", "ESBQuantizer", "EWGSQuantizer", "FittedQuantizer", "GridQuantizer",
        "GroupQuantizer", "LAWS", "LSQPlusQuantizer", "LSQQuantizer", "LawReport", "LearnedQuantizer",
        "LearnedUniform", "LevelList", "MXQuantizer", "MinifloatQuantizer", "NF4Quantizer", "NVFP4Quantizer",
        "PACTQuantizer", "PotQuantizer", "QUANTIZERS", "QfmtQuantizer", "QuantSpec", "Quantizer",
        "QuantizerFactory", "ResidualQuantizer", "SEQQuantizer", "SchemeEntry", "TQTQuantizer", "TTQQuantizer",
        "TernaryQuantizer", "UL2QQuantizer", "UniformQuantizer", "VecQQuantizer", "ZoomQQuantizer", "catalogue",
        "check_quantizer", "find_scheme", "make_quantizer", "pact_penalty", "scheme_entry", "weight_spec",
    ],
    "torchquant.range_observers": [
        "ACIQObserver", "BatchMinMax", "EntropyObserver", "ExpAvgMinMax", "HistogramObserver", "MSEObserver",
        "MeanStdObserver", "OBSERVERS", "PercentileObserver", "RangeObserver", "RunningMinMax",
        "check_observer",
    ],
    "torchquant.qmodule": [
        "ActivationPattern", "ChannelScale", "ChannelSplit", "FloatCheckpoints", "InputFirstPattern", "InputTransform",
        "LayerPattern", "LowRank", "QModule", "QModuleState", "QOp", "QWeights", "QWrapper", "Rotation", "WeightSlot",
        "WeightsPattern", "float_state_dict", "link_float_state", "register_pattern",
    ],
    "torchquant.utils": [
        "SiteReport", "StateReport", "freeze_bn", "observe_weights", "qmodule_state", "qmodules",
        "quantizer_parameters", "set_qmodule_state", "state_report", "weight_slots",
    ],
    "torchquant.training": [
        "BitSchedule", "CSVSink", "Distillation", "GradientSchedule", "Instability", "Look", "Loss", "MLflowSink",
        "Metric", "Monitor", "OnEpoch", "OscillationReport", "OscillationTracker", "ProgressiveFreezing",
        "QuantizationSchedule", "RPReLU", "Ramp", "Sink", "TensorBoardSink", "TerminalSink", "WandbSink", "adapt_ewgs",
        "attention_map_loss", "calibrate", "dampening_loss", "distillation_loss", "evaluate", "feature_loss", "fit",
        "fit_quantized", "read_looks", "reestimate_bn", "series",
    ],
    "torchquant.search": [
        "Allocation", "Budget", "Candidates", "CostModel", "EpochRecord", "MixtureQuantizer", "Pareto", "ParetoPoint",
        "PrecisionLearning", "PrecisionSettings", "SchemeSearch", "Search", "SearchSettings", "Sensitivity", "allocate",
        "default_candidates", "hessian_trace", "measure_latency", "pareto", "read_latency", "render_report",
        "search_rules", "sensitivity", "write_latency",
    ],
    "torchquant.search_run": [
        "SearchConfig", "SearchRunResult", "StudyResult", "Trial", "run_search", "run_study", "write_report",
    ],
    "torchquant.compare": [
        "Case", "CaseResult", "Recipe", "Row", "compare", "leaderboard", "load_plugin", "make_cases",
        "markdown", "read_leaderboard", "write_leaderboard",
    ],
    "torchquant.graph": [
        "Captured", "OPERATORS", "Operator", "PlanCost", "Site", "SiteCost", "SiteInput", "SitePlan", "Unquantized",
        "capture", "register_operator",
    ],
    "torchquant.errors": [
        "ConfigError", "ExportError", "LawViolation", "MissingDependencyError", "NameClashError",
        "NoAffineViewError", "NoCodesError", "NonFiniteError", "RoundingLostError", "StaysFloatWarning",
        "TorchQuantError", "UnknownNameError", "UnobservedRangeError", "UnsupportedPatternError",
    ],
    "torchquant.analysis": [
        "Advice", "Analysis", "Effect", "Finding", "LayerError", "Remedy", "SiteAnalysis", "SiteError", "SlotFacts",
        "WeightBytes", "advise", "analyze", "layer_errors", "sqnr", "weight_bytes",
    ],
    "torchquant.cli": [
        "build_app", "main",
    ],
    "torchquant.compat.autoqnn": [
        "core", "datasets", "models", "modules", "quantizers", "utils",
    ],
    "torchquant.compat.autoqnn.core": [
        "AverageMeter", "DEFAULT_QUANTIZE_MODULE_MAPPINGS", "QuantLayer", "accuracy", "adjust_learning_rate",
        "clone_quantizer", "convert", "freeze_bitwidths", "module_convert", "precision_loss", "save_checkpoint",
        "top1", "top5", "train", "train_on_batch", "validate", "validate_on_batch",
    ],
    "torchquant.compat.autoqnn.datasets": [
        "DataLoaderX", "autoaugment", "cifar", "cutout", "data_prefetcher", "imagenet",
    ],
    "torchquant.compat.autoqnn.models": [
        "resnet", "vgg",
    ],
    "torchquant.compat.autoqnn.quantizers": [
        "Binary", "BinaryAct", "ClipQ", "ClipQAct", "ESBAct", "ESB_PerChannel", "FixedQuant", "FixedQuantAct",
        "PotQ", "PotQAct", "Quantization", "ResQ", "ResQAct", "Ternary", "TernaryAct", "VecQ", "VecQAct",
        "ZoomQ", "ZoomQAct", "uL2Q", "uL2QAct",
    ],
    "torchquant.compat.checkpoints": [
        "KeyMap", "KeyMapRow", "load_checkpoint", "save_autoqnn", "save_nni",
    ],
    "torchquant.compat.nni": [
        "BNNQuantizer", "DeepspeedTorchEvaluator", "DoReFaQuantizer", "Evaluator", "LightningEvaluator",
        "LsqPlusQuantizer", "LsqQuantizer", "NaiveQuantizer", "ObserverQuantizer", "PtqQuantizer", "QATQuantizer",
        "QAT_Quantizer", "Quantizer", "TorchEvaluator", "TransformersEvaluator", "reset_quant_scheme_dtype",
        "set_quant_scheme_dtype", "trace",
    ],
    "torchquant.deploy": [
        "Certificate", "Comparison", "FileSize", "FileSizes", "FirstDifference", "FloatOperator",
        "IntegerModel", "Lowered", "OutputRow", "SiteParity", "certify", "export_compressed_tensors",
        "export_executorch", "export_gguf", "export_onnx", "export_qonnx", "file_sizes", "load_packed",
        "lower", "run_executorch", "run_onnx", "runtime_exact", "save_packed", "to_integer",
    ],
    "torchquant.integrations": [
        "Packet", "QuantizationCallback", "TorchquantCallback", "TorchquantConfig", "UpdateCodec", "quantized_lora",
    ],
    "torchquant.models": [
        "FusedEfficientNet", "FusedMobileNetV2", "FusedResNet",
    ],
    "torchquant.plan": [
        "PlanChange", "QuantPlan", "RULE_SETS", "Rules", "quantize", "read_yaml",
    ],
    "torchquant.ptq": [
        "BiasChange", "Block", "BlockData", "BlockStage", "Blocks", "InputStage", "Layer", "LayerData",
        "LowRankChange", "MatchingRounding", "ModelStage", "NumberSearch", "PTQ", "PTQReport", "Preview", "RECIPES",
        "Readers", "Recipe", "Rounding", "StepReport", "UnitPreview", "WeightChange", "distilled_inputs", "find_blocks",
        "find_recipe", "make_stage", "preview", "quantized_cache", "run",
    ],
    "torchquant.runs.ptq": ["PTQConfig", "PTQResult", "preview_ptq", "run_ptq"],
    "torchquant.runs.analyze": ["AnalyzeConfig", "Analyzed", "run_analysis"],
    "torchquant.runs.demo": [
        "DemoConfig", "DemoResult", "OnnxResult", "SCHEMES", "Scheme", "SchemeResult", "run_demo",
    ],
    "torchquant.runs.export": [
        "Exported", "certify_run", "export_run", "float_model", "load_run",
    ],
    "torchquant.runs.quantize": [
        "JobConfig", "JobResult", "run_job",
    ],
}
# fmt: on
MOVED = {
    "torchquant.compare": "torchquant.runs.compare",
    "torchquant.demo": "torchquant.runs.demo",
    "torchquant.export_run": "torchquant.runs.export",
    "torchquant.job": "torchquant.runs.quantize",
    "torchquant.qmodules": "torchquant.qmodule",
    "torchquant.search_run": "torchquant.runs.search",
}
"""Address of 0.1 -> where the same names are now."""


@pytest.mark.parametrize("address", PUBLIC)
def test_names_are_the_listed_ones(address: str) -> None:
    module = importlib.import_module(address)
    assert sorted(module.__all__) == sorted(PUBLIC[address])
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_every_address_with_public_names_is_listed() -> None:
    names = [m.name for m in pkgutil.walk_packages(torchquant.__path__, "torchquant.")]
    modules = [name for name in names if not name.startswith((*NEED_MORE, "torchquant.kernels.gpu"))]  # triton
    found = {a for a in modules if "._" not in a and hasattr(importlib.import_module(a), "__all__")}
    assert found | {"torchquant"} == {*PUBLIC, *MOVED, *MOVED.values()}


@pytest.mark.parametrize("address", MOVED)
def test_a_moved_address_has_the_same_names(address: str) -> None:
    old, new = importlib.import_module(address), importlib.import_module(MOVED[address])
    assert sorted(old.__all__) == sorted(new.__all__)
    assert all(getattr(old, name) is getattr(new, name) for name in new.__all__)


@pytest.mark.parametrize("address", [a for a in PUBLIC if "autoqnn" not in a])  # its names are AutoQNN's
def test_names_are_in_the_changelog(address: str) -> None:
    words = set(re.findall(r"\w+", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    assert [name for name in PUBLIC[address] if name not in words] == []


def test_changelog_has_the_version() -> None:
    version = importlib.import_module("torchquant").__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_qmodules_is_qmodule() -> None:
    assert importlib.import_module("torchquant.qmodules") is importlib.import_module("torchquant.qmodule")
    from torchquant.qmodules import QWrapper

    assert QWrapper is importlib.import_module("torchquant").QWrapper


def test_capture_is_a_function_wherever_it_is_imported_from() -> None:
    from torchquant.graph.capture import capture

    graph = importlib.import_module("torchquant.graph")
    importlib.import_module("torchquant.graph.capture")
    assert graph.capture is capture is importlib.import_module("torchquant").capture


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("torchquant.models.resnet", "FusedResNet"),
        ("torchquant.models.mobilenet", "FusedMobileNetV2"),
        ("torchquant.models.efficientnet", "FusedEfficientNet"),
    ],
)
def test_published_models_keep_their_address(address: str, name: str) -> None:
    assert getattr(importlib.import_module("torchquant.models"), name) is getattr(
        importlib.import_module(address), name
    )
