"""Make matplotlib figures without a display, as bytes and inside HTML."""

from __future__ import annotations

import base64
import io
from typing import Any

from torchquant.errors import require


def new_figure(width: float, height: float, **options: Any) -> Any:
    """Make an empty figure, size in inches. Raises MissingDependencyError without matplotlib."""
    figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), **options)
    require("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure


def data_uri(figure: Any) -> str:
    """Return the figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
