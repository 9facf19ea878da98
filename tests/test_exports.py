"""The public names: none appears, goes or moves without a line here and in the changelog."""

from __future__ import annotations

import importlib
import re

import pytest

from tests import ROOT

# fmt: off
PUBLIC = {
    "torchquant": [
        "AffineQuantizer", "BatchMinMax", "ESBQuantizer", "ExpAvgMinMax", "QModule", "QModuleState", "QOp",
        "QUANTIZERS", "QWrapper", "QfmtQuantizer", "QuantPlan", "QuantSpec", "Quantizer", "RangeObserver",
        "TernaryQuantizer", "calibrate", "capture", "check_quantizer", "evaluate", "fit", "freeze_bn",
        "make_quantizer", "observe_weights",
        "qmodule_state", "quantize", "quantizer_parameters", "register_operator", "register_pattern",
        "set_qmodule_state", "state_report",
    ],
    "torchquant.quantizers_functional": [
        "FloatFormat", "GRADIENTS", "Gradient", "Projected", "affine_params", "affine_quantize",
        "apot_quantize", "binary_quantize", "codebook_quantize", "dorefa_act_quantize", "dorefa_gradient",
        "dorefa_weight_quantize", "esb_quantize", "gradient_clip", "lloyd_max", "lsq_quantize",
        "midrise_quantize", "minifloat_quantize", "nf4_quantize", "pact_quantize", "pot_quantize",
        "qfmt_int_bits", "qfmt_params", "qfmt_quantize", "residual_alphas", "residual_levels", "ternary_params",
        "ternary_quantize", "tqt_quantize", "ttq_quantize",
    ],
    "torchquant.quantizers": [
        "APoTQuantizer", "About", "AffineQuantizer", "BinaryQuantizer", "ClipQQuantizer", "CodebookQuantizer",
        "DoReFaQuantizer", "ESBQuantizer", "EWGSQuantizer", "FittedQuantizer", "GridQuantizer",
        "GroupQuantizer", "LAWS", "LSQPlusQuantizer", "LSQQuantizer", "LawReport", "LearnedQuantizer",
        "LearnedUniform", "LevelList", "MXQuantizer", "MinifloatQuantizer", "NF4Quantizer", "NVFP4Quantizer",
        "PACTQuantizer", "PotQuantizer", "QUANTIZERS", "QfmtQuantizer", "QuantSpec", "Quantizer",
        "QuantizerFactory", "ResidualQuantizer", "SchemeEntry", "TQTQuantizer", "TTQQuantizer",
        "TernaryQuantizer", "UL2QQuantizer", "UniformQuantizer", "VecQQuantizer", "ZoomQQuantizer", "catalogue",
        "check_quantizer", "find_scheme", "make_quantizer", "pact_penalty", "scheme_entry", "weight_spec",
    ],
    "torchquant.range_observers": [
        "ACIQObserver", "BatchMinMax", "EntropyObserver", "ExpAvgMinMax", "HistogramObserver", "MSEObserver",
        "MeanStdObserver", "OBSERVERS", "PercentileObserver", "RangeObserver", "RunningMinMax",
    ],
    "torchquant.qmodule": [
        "ActivationPattern", "FloatCheckpoints", "InputFirstPattern", "LayerPattern", "QModule", "QModuleState", "QOp",
        "QWeights", "QWrapper", "float_state_dict", "register_pattern", "link_float_state",
    ],
    "torchquant.utils": [
        "SiteReport", "StateReport", "freeze_bn", "observe_weights", "qmodule_state", "qmodules",
        "quantizer_parameters", "set_qmodule_state", "state_report",
    ],
    "torchquant.training": [
        "BitSchedule", "GradientSchedule", "Loss", "Metric", "OnEpoch", "OscillationReport", "OscillationTracker",
        "QuantizationSchedule", "Ramp", "adapt_ewgs", "calibrate", "dampening_loss", "evaluate", "fit", "fit_quantized",
        "reestimate_bn",
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
        "NoAffineViewError", "NoCodesError", "NonFiniteError", "StaysFloatWarning", "TorchQuantError",
        "UnknownNameError", "UnobservedRangeError", "UnsupportedPatternError",
    ],
}
# fmt: on


@pytest.mark.parametrize("address", PUBLIC)
def test_names_are_the_listed_ones(address: str) -> None:
    module = importlib.import_module(address)
    assert sorted(module.__all__) == sorted(PUBLIC[address])
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("address", PUBLIC)
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
