"""Make the report of a run of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn

from torchquant.analysis import LayerError
from torchquant.analysis.sections import accuracy_table, model_parts
from torchquant.report import Details, Figure, Numbers, Page, Section, Table, Text, bars
from torchquant.runs.demo.results import DemoResult
from torchquant.runs.report import certificate_section, made_section, training_sections

DRAWN = ("w8a8-ptq", "w4a4-qat", "esb-qat", "ternary-qat")
"""Schemes whose model is drawn site by site."""
LEAD = (
    "A small residual network on scikit-learn's handwritten digits, moved, turned and made noisy; trained in float, "
    "then quantized in {n} ways."
)
ABOUT_ROWS = (
    "PTQ: calibrated only. QAT: calibrated, then trained with the quantizers on, starting from the float weights. W "
    "and A: bits of weights and activations, the image included; class scores stay float. {note}. Seconds include "
    "calibration, training and evaluation."
)
ABOUT_SITE = {
    "weight": "Signal to quantization noise of each weight, in dB. One bit more is worth about 6 dB; after QAT the "
    "comparison is with the retrained float weights, so that a low one does not mean a low accuracy.",
    "output": "The same for each output, with all layers before it quantized too: noise adds up from left to right.",
}


def demo_page(result: DemoResult, models: Mapping[str, nn.Module], sample: Tensor, n_test: int) -> Page:
    """Return the report.

    `models`: name of a scheme -> its model. `sample`: the images that the layers were measured on. `n_test`: number of
    test images.
    """
    titles = {row.name: row.title for row in result.rows}
    made = made_section(
        result.config.command,
        asdict(result.config),
        "The same seed gives the same numbers on the same machine. All numbers are in results.json beside this file, "
        "each network in its .pt file (a state_dict).",
    )
    noise = [_sqnr_figure(result, titles, site) for site in ABOUT_SITE]
    drawn = [
        Details(titles[name], model_parts(models[name], sample, result.layers[name]), is_open=i == 0)
        for i, name in enumerate(DRAWN)
    ]
    sections = [
        Section("Accuracy and size", _accuracy(result, n_test)),
        Section("W8A8 in ONNX Runtime", _onnx(result)),
        certificate_section(result.onnx.certificate.to_dict()),
        Section("Which layer loses how much", noise),
        Section("The models, site by site", drawn),
        *training_sections(result.losses),
        made,
    ]
    return Page("torchquant demo", sections, LEAD.format(n=len(result.layers)))


def _accuracy(result: DemoResult, n_test: int) -> list[Table | Text]:
    header, rows, note = result.table()
    more = {name: [row[i] for row in rows] for i, name in enumerate(header) if i > 1}
    table = accuracy_table([(row.title, row.accuracy) for row in result.rows], n_test, more)
    return [table, Text(ABOUT_ROWS.format(note=note[0].upper() + note[1:]), is_note=True)]


def _onnx(result: DemoResult) -> list[Numbers | Text]:
    onnx = result.onnx
    numbers = [
        (f"{onnx.accuracy:.2%}", "accuracy in ONNX Runtime"),
        (f"{onnx.simulated_accuracy:.2%}", "accuracy of the simulation"),
        (f"{onnx.same_top1:.2%}", "of test images: same class"),
        (f"{onnx.largest_difference:.2g}", "largest difference of a score"),
        (f"{onnx.file_bytes:,}", "bytes of w8a8.onnx"),
    ]
    about = (
        "The exported file holds integer weights with batch norms folded in. It is run on the same test images as the "
        "simulation in PyTorch. Scores differ because the file adds biases in whole steps of input scale times weight "
        "scale."
    )
    return [Numbers(numbers), Text(about, is_note=True)]


def _of_site(layers: list[LayerError], site: str) -> dict[str, float]:
    return {layer.path: error.sqnr_db for layer in layers if (error := getattr(layer, site)) is not None}


def _sqnr_figure(result: DemoResult, titles: Mapping[str, str], site: str) -> Figure:
    found = {titles[name]: _of_site(layers, site) for name, layers in result.layers.items()}
    paths = list(next(iter(found.values())))
    heights = {title: [by_path.get(path) for path in paths] for title, by_path in found.items()}
    return bars(f"SQNR of the {site}", paths, heights, "dB", ABOUT_SITE[site], height=380)
