"""Make matplotlib figures without a display."""

from __future__ import annotations

from typing import Any

from torchquant.errors import require


def new_figure(width: float, height: float, **options: Any) -> Any:
    """Make an empty figure, size in inches. Raises MissingDependencyError without matplotlib."""
    figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), **options)
    require("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure
