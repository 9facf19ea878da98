"""The table of what QWeights wraps: modules with weights of any number and a call of their own.

`register_pattern(MyCell, WeightsPattern(...))` adds a row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError


@checked
@dataclass(frozen=True)
class WeightsPattern:
    """A module with weights of any number.

    `weights`: the names of those of its parameters that are weights, each with the output channel on axis 0; None: all
    whose own name has "weight" in it. `values`: the first arguments of its forward, those that carry real values; ()
    for a module that looks something up. What it computes between its weights stays float.
    """

    weights: tuple[str, ...] | None = None
    values: tuple[str, ...] = ("input",)

    def check(self, kind: type[nn.Module]) -> None:
        """Raise ConfigError if the forward of a class does not begin with the arguments that carry values."""
        names = tuple(inspect.signature(kind.forward).parameters)[1:]
        if names[: len(self.values)] != self.values:
            raise ConfigError(
                f"values must be the first arguments of {kind.__name__}.forward, which has {', '.join(names)}; "
                f"got {', '.join(self.values)}"
            )


WEIGHTED: dict[type[nn.Module] | str, WeightsPattern] = {
    nn.Bilinear: WeightsPattern(values=("input1", "input2")),
    nn.Embedding: WeightsPattern(values=()),
    nn.EmbeddingBag: WeightsPattern(values=()),
    nn.LSTM: WeightsPattern(),
    nn.GRU: WeightsPattern(),
    nn.RNN: WeightsPattern(),
    nn.LSTMCell: WeightsPattern(),
    nn.GRUCell: WeightsPattern(),
    nn.RNNCell: WeightsPattern(),
    nn.MultiheadAttention: WeightsPattern(values=("query", "key", "value")),
}
"""What QWeights wraps: these classes, and those below torch's with the same forward."""


def class_name(kind: type[nn.Module] | str) -> str:
    """The name of a class without its module's, also where the class is given by name.

    >>> class_name(nn.Linear), class_name("timm.layers.norm_act.BatchNormAct2d")
    ('Linear', 'BatchNormAct2d')
    """
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def weights_pattern(kind: type[nn.Module]) -> WeightsPattern | None:
    """The row of a class, None for one that QWeights does not wrap."""
    return WEIGHTED.get(kind) or WEIGHTED.get(f"{kind.__module__}.{kind.__qualname__}")


def n_values(name: str) -> int:
    """How many of the first inputs of a layer carry values. name: of its class; 1 for a layer with one weight."""
    return next((len(row.values) for kind, row in WEIGHTED.items() if class_name(kind) == name), 1)
