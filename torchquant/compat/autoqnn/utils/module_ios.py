"""AutoQNN's records of what goes into modules and comes out of them, and pictures of both."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchquant._figures import new_figure
from torchquant._files import write_whole
from torchquant.errors import ConfigError, NoCodesError, UnobservedRangeError, require
from torchquant.quantizers import Quantizer

MOST_LABELS = 16
"""Levels up to this number have a tick with a label each; more have ticks only."""
NEAREST_LABELS = 1 / 36
"""Smallest distance of two labels, as a share of the distance of the outermost levels."""
SPREAD = 3.0
"""Standard deviations around the mean that a scaled histogram shows."""


class ModuleIO:
    """Records the last input and output of a module: `register()` begins, `unregister()` ends.

    `input` is the tuple of its arguments, `output` what it returned; None before the first call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hook_handle: Any = None
        self.input: tuple[Any, ...] | None = None
        self.output: Any = None

    def hook(self, module: nn.Module, input: tuple[Any, ...], output: Any) -> None:
        """Take what a call got and returned."""
        self.input = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in input)
        self.output = output.detach().clone() if isinstance(output, Tensor) else output

    def register(self) -> None:
        """Start recording."""
        self.hook_handle = self.module.register_forward_hook(self.hook)

    def unregister(self) -> None:
        """Stop recording."""
        if self.hook_handle is not None:
            self.hook_handle.remove()
            self.hook_handle = None


class ModuleIOs:
    """Records inputs and outputs of modules; for quantizers, real and quantized tensors.

    `named_modules`: (name, module) pairs. `register()` begins, `unregister()` ends; `inputs` and `outputs` hold the
    last tensors. `draw_differences(rows)` returns a matplotlib figure with both distributions of each.

    >>> import torch
    >>> layer = nn.ReLU()
    >>> records = ModuleIOs([("relu", layer)])
    >>> records.register()
    >>> y = layer(torch.tensor([-1.0, 2.0]))
    >>> records.unregister()
    >>> records.differences()
    {'relu': 0.5}
    """

    def __init__(self, named_modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.ModuleIO_dict = {name: ModuleIO(module) for name, module in named_modules}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by name."""
        return {name: record.module for name, record in self.ModuleIO_dict.items()}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The first argument of each module's last call."""
        return {name: record.input[0] for name, record in self.ModuleIO_dict.items() if record.input is not None}

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The output of each module's last call."""
        return {name: record.output for name, record in self.ModuleIO_dict.items() if record.input is not None}

    def register(self) -> None:
        """Start recording."""
        for record in self.ModuleIO_dict.values():
            record.register()

    def unregister(self) -> None:
        """Stop recording."""
        for record in self.ModuleIO_dict.values():
            record.unregister()

    def differences(self) -> dict[str, float]:
        """Compute the mean squared difference of input and output, for modules that keep the shape."""
        inputs, outputs = self._recorded()
        return {
            name: float((outputs[name] - x).square().mean())
            for name, x in inputs.items()
            if x.shape == outputs[name].shape
        }

    def draw_differences(
        self,
        rows: int | None = None,
        bins: int = 50,
        splited: bool = True,
        scaled: bool = True,
        figsize: tuple[float, float] | None = None,
        save_path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Draw histograms of inputs and outputs; of a quantizer, with its scheme, its bits, and its levels as ticks.

        By default each module has a row, with its input on the left and its output on the right; with `rows`, or
        `splited` False, each has one panel with both. `scaled` leaves out inputs beyond 3 standard deviations.
        `figsize` in inches; by default the figure is 1200 pixels wide. Where matplotlib.pyplot is in use, the figure
        is its current one, which `plt.show()` shows. Raises MissingDependencyError, ConfigError.
        """
        inputs, outputs = self._recorded()
        is_split = splited and rows is None
        n_rows = rows or len(inputs)
        n_columns = 2 if is_split else -(-len(inputs) // n_rows)
        figure = _figure(*(figsize or (12.0, max(3.0 * n_rows, 4.0))))
        panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        for i, (name, x) in enumerate(inputs.items()):
            before, after = (panels[2 * i], panels[2 * i + 1]) if is_split else (panels[i], panels[i])
            _draw(before, after, self.ModuleIO_dict[name].module, name, x, outputs[name], bins, scaled)
        for panel in panels[len(inputs) * (2 if is_split else 1) :]:
            panel.set_axis_off()
        if save_path is not None:
            path = Path(save_path)
            write_whole(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=100))
        return figure

    def _recorded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.inputs:
            raise ConfigError("nothing was recorded; call register(), run the model, then unregister()")
        return self.inputs, self.outputs


def _figure(width: float, height: float) -> Any:
    """Make a figure of pyplot where the caller uses that, so that `plt.show()` shows it."""
    if "matplotlib.pyplot" in sys.modules:
        return require("matplotlib.pyplot", "report").figure(figsize=(width, height), layout="constrained")
    return new_figure(width, height, layout="constrained")


def _draw(before: Any, after: Any, module: nn.Module, name: str, x: Tensor, y: Tensor, bins: int, scaled: bool) -> None:
    """Draw what goes into a module on one panel, and what comes out on another, or on the same."""
    real, made = (t.flatten().float().cpu() for t in (x, y))
    if scaled and real.numel() > 1:
        low, high = (float(real.mean() + side * SPREAD * real.std()) for side in (-1, 1))
        real = real[(real >= low) & (real <= high)]
    levels = _levels(module)
    kind = type(module).__name__ + (f", {module.n_bits} bits" if isinstance(module, Quantizer) else "")
    before.hist(real.numpy(), bins=bins, color="tab:gray", label="before")
    if levels is None:
        after.hist(made.numpy(), bins=bins, alpha=0.6, color="tab:blue", label="after")
    else:
        values, counts = made.unique(return_counts=True)
        after.vlines(values.numpy(), 0, counts.numpy(), color="tab:blue", linewidth=3, label="after")
        after.set_ylim(bottom=0)
    names = {before: f"{name}: before", after: f"{name}: after, {kind}"} if before is not after else {}
    for panel, title in (names or {after: f"{name}: {kind}"}).items():
        panel.set_title(title, fontsize=11)
        panel.set_ylabel("elements", fontsize=10)
        panel.tick_params(labelsize=10)
    if before is after:
        after.legend(fontsize=10)
    if levels is not None and len(levels) <= MOST_LABELS:
        after.set_xticks(levels, _labels(levels), rotation=90)
    elif levels is not None:
        after.set_xticks(levels, minor=True)
    for panel in (before, after):
        panel.set_xlim(*_shared_limits(before, after))


def _shared_limits(before: Any, after: Any) -> tuple[float, float]:
    ends = [end for panel in (before, after) for end in panel.get_xlim()]
    return min(ends), max(ends)


def _labels(levels: list[float]) -> list[str]:
    """Return the labels of sorted levels; one that would cover that of the level before it is empty."""
    labels, last = [], -math.inf
    for level in levels:
        is_clear = level - last >= (levels[-1] - levels[0]) * NEAREST_LABELS
        labels.append(f"{level:.3g}" if is_clear else "")
        last = level if is_clear else last
    return labels


def _levels(module: nn.Module) -> list[float] | None:
    """Return the levels of a quantizer that has one list of them for the whole tensor, else None."""
    if not isinstance(module, Quantizer):
        return None
    try:
        levels = module.levels()
    except (NoCodesError, UnobservedRangeError):
        return None
    return levels.tolist() if levels.ndim == 1 else None
