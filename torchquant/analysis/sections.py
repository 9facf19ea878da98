"""Sections of a report about a quantized model: accuracy with its interval, and the model with its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchquant.analysis.effects import decibel
from torchquant.analysis.errors import LayerError, SiteError, layer_errors
from torchquant.errors import TorchQuantError
from torchquant.graph.dataflow import site_edges
from torchquant.qmodule import QModule
from torchquant.quantizers import Quantizer
from torchquant.report import Cell, Details, Figure, Graph, Node, Part, Table, histogram
from torchquant.utils import SiteReport, qmodules, state_report

N_BINS = 48
MOST_BITS, MOST_LEVELS = 8, 64
"""Largest number of bits of a quantizer whose levels are listed and whose codes are counted, and of drawn levels."""
Z = 1.959964
"""Half the width of a 95 % interval of the normal distribution, in standard deviations."""
FACTS = ("quantizer", "bits", "SQNR", "codes used", "in the lowest code", "in the highest code", "range")
UNKNOWN = (None, None, None)
ABOUT_SQNR = (
    "Signal to quantization noise ratio (SQNR) of each output, in dB: higher is better, and one bit more is worth "
    "about 6 dB. The output is compared with that of the float model while all sites before are quantized too, so that "
    "noise adds up along the model. A site without a quantized output is coloured by its weight; grey: neither."
)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability of which `share` was seen in n trials (Wilson 1927).

    >>> [round(end, 4) for end in wilson(0.9, 100)]
    [0.8256, 0.9448]
    >>> wilson(0.0, 10)[0]
    0.0
    """
    middle = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1.0 - share) / n + Z * Z / (4 * n * n))
    return max((middle - half) / (1 + Z * Z / n), 0.0), min((middle + half) / (1 + Z * Z / n), 1.0)


def accuracy_table(
    accuracies: Sequence[tuple[str, float]], n: int, more: Mapping[str, Sequence[str | float]] | None = None
) -> Table:
    """Return the table of accuracies, (name, 0..1) each on n samples, with 95 % intervals; `more`: further columns."""
    rows: list[list[str | float | Cell | None]] = []
    for i, (name, share) in enumerate(accuracies):
        low, high = wilson(share, n)
        interval = Cell(f"{low:.2%} to {high:.2%}", low)
        rows.append([name, f"{share:.2%}", interval, *(column[i] for column in (more or {}).values())])
    note = (
        f"Accuracy on {n:,} test samples. The interval is what so many samples can tell (Wilson, 95 %); models "
        "that are tested on the same samples differ more reliably than their intervals suggest."
    )
    return Table(["model", "accuracy", "95 % interval", *(more or {})], rows, note, "accuracy")


def model_parts(
    model: nn.Module,
    x: Tensor,
    errors: Sequence[LayerError] | None = None,
    about: str = ABOUT_SQNR,
    values: Mapping[str, float] | None = None,
) -> list[Part]:
    """Return the model as a graph, coloured by its errors, and a table of all sites.

    `x`: a batch. `errors`: the result of `layer_errors(model, x)`, None: measure them now. `about`: what the numbers
    mean. `values`: path of a site -> the SQNR that colours it, in place of that of its output. A click on a site shows
    its quantizers, ranges and codes, and the histograms of its weights and output.
    """
    found = layer_errors(model, x) if errors is None else errors
    modules = {path or "(root)": module for path, module in qmodules(model)}
    reports: dict[str, list[SiteReport]] = {}
    for row in state_report(model):
        reports.setdefault(row.path, []).append(row)
    nodes = [_node(error, modules[error.path], reports.get(error.path, []), values or {}) for error in found]
    edges = [(source or "(root)", path or "(root)") for source, path in site_edges(model, x[:1])]
    return [Graph(nodes, edges, "SQNR, dB", about), Details("All sites as a table", [sites_table(found)])]


def _node(error: LayerError, module: QModule, reports: Sequence[SiteReport], values: Mapping[str, float]) -> Node:
    shown, details = error.output or error.weight, _details(error, module, reports)
    value = values.get(error.path, None if shown is None else shown.sqnr_db)
    return Node(error.path, value, "float" if value is None else decibel(value), details)


def sites_table(errors: Sequence[LayerError]) -> Table:
    """Return the table of schemes, bits and SQNR of the weight and the output of every site."""
    rows: list[list[str | float | Cell | None]] = []
    for error in errors:
        cells: list[str | float | Cell | None] = [error.path]
        for site in (error.weight, error.output):
            cells += [None] * 3 if site is None else [site.scheme, site.n_bits, decibel_cell(site.sqnr_db)]
        rows.append(cells)
    header = ["site", "weight", "bits", "SQNR of the weight", "output", "bits", "SQNR of the output"]
    return Table(header, rows)


def decibel_cell(sqnr_db: float) -> Cell:
    """Return the cell of an SQNR."""
    return Cell(decibel(sqnr_db), sqnr_db)


def _details(error: LayerError, module: QModule, reports: Sequence[SiteReport]) -> list[Part]:
    sites = {**error.weights} | ({} if error.output is None else {"output": error.output})
    quantizers = module.quantizers()
    slots = []
    for report in reports:
        site = sites.get(report.site)
        noise = None if site is None else decibel(site.sqnr_db)
        codes = UNKNOWN if site is None else _codes(quantizers[report.site], site, _real(module, report.site, site))
        slots.append([report.scheme, report.n_bits, noise, *codes, report.ranges])
    rows = [[name, *(slot[i] for slot in slots)] for i, name in enumerate(FACTS)]
    facts = Table(["", *(report.site for report in reports)], rows)
    return [facts, *(_histogram(name, site, quantizers[name]) for name, site in sites.items())]


def _real(module: QModule, name: str, site: SiteError) -> Tensor:
    """Return the whole weight of that name, or the samples of an output."""
    return next((slot.seen() for slot in module.weight_slots() if slot.name == name), site.real)


@torch.no_grad()
def _codes(quantizer: Quantizer, site: SiteError, real: Tensor) -> tuple[str | None, ...]:
    """Say how many codes are used, and how much is in the lowest and the highest code."""
    is_sample = real is site.real and quantizer.axis is not None
    if is_sample or quantizer.levels_vary or (site.n_bits or MOST_BITS + 1) > MOST_BITS:
        return UNKNOWN
    try:
        device = next((number.device for number in quantizer.buffers()), real.device)
        codes, (low, high) = quantizer.encode(real.to(device)), quantizer.code_range
    except TorchQuantError:  # no codes, or values that have none
        return UNKNOWN
    ends = (f"{(codes == end).float().mean().item():.1%}" for end in (low, high))
    return (f"{len(codes.unique())} of {high - low + 1}", *ends)


def _histogram(name: str, site: SiteError, quantizer: Quantizer) -> Figure:
    real, quantized = (part[part.isfinite()] for part in (site.real, site.quantized))
    both = torch.cat([real, quantized]) if len(real) else torch.zeros(1)
    low, high = (float(end) for end in both.aminmax())
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    shares = {
        what: (torch.histc(part.double(), N_BINS, low, high) / max(len(part), 1)).tolist()
        for what, part in (("float", real), ("quantized", quantized))
    }
    levels = _levels(quantizer, site)
    drawn = [level for level in levels if low <= level <= high] if len(levels) <= MOST_LEVELS else []
    caption = "Each channel, block or token has levels of its own." if not levels else ""
    if levels and not drawn:
        caption = f"{len(levels)} levels from {levels[0]:.4g} to {levels[-1]:.4g}."
    return histogram(f"{name}, {decibel(site.sqnr_db)}", edges.tolist(), shares, drawn, caption=caption)


def _levels(quantizer: Quantizer, site: SiteError) -> list[float]:
    """Return the levels that all elements share, sorted; [] if they differ between elements, or are not known."""
    if quantizer.levels_vary or (site.n_bits or MOST_BITS + 1) > MOST_BITS:
        return []
    try:
        levels = quantizer.levels()
    except TorchQuantError:  # a scheme without a list of levels
        return []
    found: list[float] = levels.tolist() if levels.ndim == 1 else []
    return found
