"""Sections of a report about a run, and the report that the runs of one model share."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._files import read_json, reading
from torchquant._shown import some
from torchquant.analysis.sections import ABOUT_SQNR, model_parts
from torchquant.graph import Unquantized
from torchquant.report import Code, Page, Part, Section, Table, Text, lines
from torchquant.runs.curves import watched_sections
from torchquant.runs.data import TrainingData
from torchquant.runs.folder import CONTENTS
from torchquant.runs.losses import Losses, read_losses

REPORT, CERTIFICATE = "report.html", "certificate.json"
MOST_IMAGES, MOST_VALUES = 64, 3_000_000
"""Largest number of test images, and of values in them, that the errors of the sites are measured on."""
LIBRARIES = ("torchquant", "numpy", "torchvision", "scikit-learn", "onnx", "onnxruntime")
"""Libraries that affect the numbers of a run."""
VERDICTS = {
    "passed": "The exported file computes what the integer reference computes: every code that was compared is within "
    "its bound.",
    "FAILED": "The exported file does not compute what the integer reference computes. Look at the sites that "
    "certificate.txt names before you use it.",
    "INCOMPLETE": "Every code that was compared is within its bound, but some sites could not be compared.",
}
"""Verdict of a certificate -> a sentence that says its meaning."""
AGAIN = "write it again with torchquant certify"


def write_run_report(
    folder: Path,
    title: str,
    accuracy: Sequence[Part],
    own: Sequence[Section],
    shown: tuple[nn.Module, TrainingData],
    made: Section,
    about: str = ABOUT_SQNR,
) -> Path:
    """Write report.html of a run with one quantized model: `accuracy`, what is its `own`, the model, and the rest.

    The losses, the looks of a monitor and the certificate come from the files of the folder. `shown`: the model in
    QUANT_EVAL, and the data. `about`: what the SQNR of its sites means.
    """
    model, data = shown
    n = max(min(MOST_IMAGES, MOST_VALUES // max(data.test_images[0].numel(), 1)), 1)
    weight = next(model.parameters(), data.test_images)
    sections = [Section("Accuracy and size", accuracy), *own]
    sections.append(
        Section("The model, site by site", model_parts(model, data.test_images[:n].to(weight.device), None, about))
    )
    sections += float_sections(getattr(getattr(model, "plan", None), "floats", ()))
    sections += [*training_sections(read_losses(folder)), *watched_sections(folder)]
    if (folder / CERTIFICATE).exists():
        with reading(folder / CERTIFICATE, AGAIN):
            sections.append(certificate_section(read_json(folder / CERTIFICATE)))
    return Page(title, [*sections, made]).write(folder / REPORT)


def float_sections(floats: Sequence[Unquantized]) -> list[Section]:
    """Return the section about the parts of a model that stay float, if there are any."""
    rows = [[part.path or "(root)", part.type, part.why] for part in floats]
    return [Section("What stays float", [Table(["where", "type", "why"], rows)])] if rows else []


def training_sections(losses: Losses) -> list[Section]:
    """Return the section with the loss of every epoch, if there are any."""
    if not losses:
        return []
    note = "Mean over the batches of an epoch, while the weights change."
    return [Section("Training", [lines("Loss per epoch", losses, "epoch", "loss", note)])]


def certificate_section(certificate: Mapping[str, Any]) -> Section:
    """Return the section that says in words what a certificate proves; `certificate`: as `Certificate.to_dict`."""
    parts: list[Part] = [Text(VERDICTS[certificate["verdict"]])]
    for comparison in certificate["comparisons"]:
        compared = [site for site in comparison["sites"] if site["elements"]]
        codes, differ = (sum(site[name] for site in compared) for name in ("elements", "differ"))
        by = f", by {max(site['largest'] for site in compared)} at most" if differ else ""
        words = f"{differ:,} of {codes:,} codes at {len(compared)} sites differ from the integer reference{by}."
        parts.append(Text(f"{comparison['way']}: {words}"))
    header = ["engine", "accuracy", "same class", "largest difference"]
    rows = [
        [
            row["engine"],
            None if row["accuracy"] is None else f"{row['accuracy']:.2%}",
            f"{row['same_top1']:.2%}",
            row["largest_difference"],
        ]
        for row in certificate["outputs"]
    ]
    about = (
        f"On {certificate['samples']:,} samples. The integer reference is torchquant's own arithmetic in whole "
        "numbers; same class and largest difference (of an output) are relative to it. Site by site: certificate.json."
    )
    if floats := certificate["float_operators"]:
        about += f" Computed in float32 in the reference too: {some(floats)}."
    if absent := certificate["not_run"]:
        about += f" Not in the file: {some(absent)}."
    return Section(f"Certificate: {certificate['verdict']}", [*parts, Table(header, rows), Text(about, is_note=True)])


def made_section(command: str, settings: Mapping[str, Any], about: str = "") -> Section:
    """Return the section with the command line that runs it again, the settings, and the versions that computed it."""
    rows = [[name, "–" if value is None else str(value)] for name, value in settings.items() if name != CONTENTS]
    own = (item for item in versions().items() if item[0] != "threads")  # a report can be written again elsewhere
    used = ", ".join(f"{name} {version}" for name, version in own)
    parts: list[Part] = [Code(command), Text(f"{about} Made with {used}.".strip(), is_note=True)]
    return Section("How this was made", [*parts, *([Table(["setting", "value"], rows)] if rows else [])])


def versions() -> dict[str, str]:
    """Return name -> version of Python and of the libraries that affect the numbers, and the number of threads."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"threads": str(torch.get_num_threads())}
