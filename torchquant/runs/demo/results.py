"""The results of a run of the demo."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torchquant.analysis import LayerError
from torchquant.deploy import Certificate
from torchquant.runs.demo.settings import DemoConfig
from torchquant.runs.losses import Losses


@dataclass(frozen=True)
class SchemeResult:
    """One row of the table: test accuracy 0..1 and bytes of all layer weights (`analysis.weight_bytes`)."""

    name: str
    title: str
    accuracy: float
    weight_bytes: int


@dataclass(frozen=True)
class OnnxResult:
    """The exported model in ONNX Runtime compared with the simulation, on all test images.

    `same_top1`: share of images with the same class in both. `largest_difference`: largest difference of a score.
    `certificate`: every code of the file against the integer reference, on the first test images.
    """

    accuracy: float
    simulated_accuracy: float
    same_top1: float
    largest_difference: float
    file_bytes: int
    certificate: Certificate


@dataclass(frozen=True)
class DemoResult:
    """The results of a whole run. `rows[0]` is the float network; `layers` has one list of layer errors per scheme.

    `losses`: name of a training -> (epoch, loss) of each of its epochs.
    """

    config: DemoConfig
    rows: tuple[SchemeResult, ...]
    onnx: OnnxResult
    layers: dict[str, list[LayerError]]
    seconds: dict[str, float]
    versions: dict[str, str]
    losses: Losses = field(default_factory=dict)

    def row(self, name: str) -> SchemeResult:
        """Return the row of a scheme by its name, e.g. "w4a4-qat". Raises KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return all results for JSON. Only the values under "seconds" differ between two runs with the same seed."""
        return {
            "config": asdict(self.config),
            "versions": self.versions,
            "schemes": [asdict(row) for row in self.rows],
            "onnx": {**vars(self.onnx), "certificate": self.onnx.certificate.to_dict()},
            "layers": {name: [layer.to_dict() for layer in layers] for name, layers in self.layers.items()},
            "losses": {name: [list(point) for point in points] for name, points in self.losses.items()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Return header, rows of text and a note: the summary that the terminal and the report show."""
        float_bytes = self.rows[0].weight_bytes
        rows = [
            [
                row.title,
                f"{row.accuracy:.2%}",
                f"{row.weight_bytes:,}",
                f"{float_bytes / row.weight_bytes:.1f}x",
                f"{self.seconds[row.name]:.1f}",
            ]
            for row in self.rows
        ]
        note = "weight bytes: packed codes at their true width, with scales at 4 bytes each; biases not counted"
        return ["scheme", "accuracy", "weight bytes", "smaller", "seconds"], rows, note
