"""The table of the modules that QWeights wraps: any number of weights and any call signature.

`register_pattern(MyCell, WeightsPattern(...))` adds a pattern.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError


@checked
@dataclass(frozen=True)
class WeightsPattern:
    """The pattern of a module with any number of weights.

    `weights`: the names of the parameters that are weights, each with the output channel on axis 0; None: every
    parameter with "weight" in its own name. `values`: the first arguments of its forward, which carry real values; ()
    for a lookup such as an embedding. `groups`: weights whose rows are in groups, each with inputs of its own, and how
    many. `stacks`: weights with a matrix for each of several groups, (groups, outputs, inputs), such as experts; each
    row of each matrix is an output channel. `transposed`: weights stored with the inputs before the outputs, (inputs,
    outputs), those of a stack (groups, inputs, outputs). `biases`: weights whose bias has a name of its own or is part
    of a longer parameter: its name, and where the part begins, in multiples of the weight's rows; of a stack (groups,
    outputs). Intermediate results inside the module stay float.
    """

    weights: tuple[str, ...] | None = None
    values: tuple[str, ...] = ("input",)
    groups: Mapping[str, int] = field(default_factory=dict, hash=False)
    stacks: tuple[str, ...] = ()
    biases: Mapping[str, tuple[str, int]] = field(default_factory=dict, hash=False)
    transposed: tuple[str, ...] = ()

    def check(self, kind: type[nn.Module]) -> None:
        """Raise ConfigError unless the forward of a class begins with the arguments in `values`."""
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
    nn.MultiheadAttention: WeightsPattern(
        values=("query", "key", "value"),
        groups={"in_proj_weight": 3},
        biases={f"{name}_proj_weight": ("in_proj_bias", i) for i, name in enumerate("qkv")},
    ),
}
"""Classes that QWeights wraps; subclasses of the torch classes with the same forward count too."""


def class_name(kind: type[nn.Module] | str) -> str:
    """Return the name of a class without its module, also for a class given by name.

    >>> class_name(nn.Linear), class_name("timm.layers.norm_act.BatchNormAct2d")
    ('Linear', 'BatchNormAct2d')
    """
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


EXPERTS = "Experts"
"""The type, in rules, of every module with stacks of matrices."""


def pattern_of_experts(module: nn.Module) -> WeightsPattern | None:
    """Return the pattern of experts of transformers, which say of themselves how they store their matrices; else None.

    Every class under `use_experts_implementation` says so, with a stack of matrices in each parameter of three axes.
    """
    is_transposed = module.__dict__.get("is_transposed")
    names = tuple(name for name, p in module._parameters.items() if p is not None and p.ndim == 3)
    if not isinstance(is_transposed, bool) or "has_gate" not in module.__dict__ or not names:
        return None
    biases = {name: (f"{name}_bias", 0) for name in names if f"{name}_bias" in module._parameters}
    transposed = names if is_transposed else ()
    return WeightsPattern(names, ("hidden_states",), stacks=names, biases=biases, transposed=transposed)
