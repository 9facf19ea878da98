"""The contract of post-training algorithms: a class with facts and one method, in the registry `PTQ`."""

from __future__ import annotations

import ast
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from torchquant._arguments import Count, check_constructor, checked
from torchquant._registry import Registry, did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError, UnknownNameError
from torchquant.ptq.block import Block, BlockData
from torchquant.ptq.layer import Layer, LayerData
from torchquant.ptq.readers import Readers
from torchquant.qmodule import InputTransform

PTQ: Registry[type[Stage]] = Registry("post-training stage")
"""Every stage by its name."""
NEEDS = ("gram", "cross_gram", "means", "float_means")
"""Statistics that a layer stage can ask for; see `LayerData`."""
FLOAT_NEEDS = frozenset({"cross_gram", "float_means"})
"""Statistics that need the inputs in the float model, which then runs along."""
CHANGES = ("structure", "ranges", "weights", "numbers", "roundings", "bias")
"""The kinds of change that a stage can make, in the order in which stages may follow each other."""


class Stage(ABC):
    """A step of a recipe. `changes`: the kind of change, one of `CHANGES`. `source`: paper, or "own"."""

    changes: ClassVar[str]
    source: ClassVar[str] = "own"
    when: ClassVar[str] = ""
    """When to use the stage, in a few words."""
    cost: ClassVar[str] = ""
    """Operations for one layer of `rows` outputs and K inputs, beside the forward pass that all stages share."""
    unit: str
    """What the stage works on at a time: "model", "input", "layer" or "block"."""
    spec = ""
    """The stage as written in the recipe."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_constructor(cls)


class ModelStage(Stage):
    """A stage that works on the whole model."""

    unit = "model"
    needs_data: ClassVar[bool] = False
    allows_transforms: ClassVar[bool] = False
    """Whether the stage works on layers with transforms before their inputs, and low-rank products beside them."""

    @abstractmethod
    def run(self, model: nn.Module, batches: list[Any]) -> str:
        """Change the model. Returns a text for the report that says what was done."""


class InputStage(Stage):
    """Puts a transform before the layers that read one value; the engine takes the candidate of least output error.

    Without a transform is a candidate too, unless the run keeps everything. The ranges of the inputs are then observed
    again. `fold`: put scales into what gives the channels, where that can be found.
    """

    unit = "input"
    changes = "structure"
    needs_data: ClassVar[bool] = True
    fold = False

    @abstractmethod
    def candidates(self, readers: Readers) -> Iterable[tuple[str, InputTransform]]:
        """Yield transforms for the inputs of these layers, each with a text for the report.

        Raises ConfigError that says why there is none.
        """


class LayerStage(Stage):
    """A stage that works on one layer after the other, each with its inputs from the layers changed before it."""

    unit = "layer"

    @property
    def needs(self) -> frozenset[str]:
        """Return which of `NEEDS` must be in `LayerData`."""
        return frozenset()


class BlockStage(Stage):
    """A stage that works on one block after the other, each with its inputs from the blocks changed before it."""

    unit = "block"

    @property
    def by_gradients(self) -> bool:
        """Return whether errors are weighed by the gradients of the model's loss; see `BlockData.weigh`."""
        return False

    @abstractmethod
    def optimize(self, block: Block, data: BlockData) -> Mapping[str, Tensor]:
        """Return the weights of the layers on their grids, by path, each as `Layer.weight`.

        It may set the numbers of the quantizers in the block; the engine puts them back where it undoes the stage.
        """


class Rounding(LayerStage):
    """Chooses a level for each weight.

    >>> @PTQ.register("upward")
    ... class Upward(Rounding):
    ...     def round(self, layer, data):
    ...         return layer.neighbours(layer.weight)[1]
    >>> PTQ.unregister("upward")
    """

    changes = "roundings"

    @abstractmethod
    def round(self, layer: Layer, data: LayerData) -> Tensor:
        """Return the weight on its grid: (groups, rows, K), as `layer.weight`; the engine then sets it."""


class Matching(LayerStage):
    """A stage that matches the output of a layer to another output.

    `match`: "float", the outputs of the float model, so that errors of earlier layers are compensated; "layer", the
    outputs of the float layer on its current inputs.
    """

    def __init__(self, match: str = "float") -> None:
        if match not in ("float", "layer"):
            raise ConfigError(f"match must be 'float' or 'layer', got {match!r}")
        self.match = match

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "cross_gram"} if self.match == "float" else {"gram"})

    def target(self, layer: Layer, data: LayerData) -> Tensor:
        """Return the real weight whose output on the current inputs is nearest to the target: (groups, rows, K)."""
        if self.match == "layer":
            return layer.weight
        if layer.beside is None:
            return data.corrected(layer.weight)
        return data.corrected(layer.weight + layer.beside) - layer.beside


class MatchingRounding(Matching, Rounding):
    """Chooses levels by the error of the layer's output; see `Matching`."""


class WeightChange(LayerStage):
    """Changes the real weights before they are rounded; the quantizer then derives new numbers from them."""

    changes = "weights"

    @abstractmethod
    def change(self, layer: Layer, data: LayerData) -> Tensor:
        """Return the new real weight, (groups, rows, K)."""


class NumberSearch(LayerStage):
    """Chooses the numbers of the grid: scales, ends of ranges."""

    changes = "numbers"

    @abstractmethod
    def numbers(self, layer: Layer, data: LayerData) -> Mapping[str, Tensor]:
        """Return all numbers of the quantizer, by the names of `Quantizer.numbers`."""


class LowRankChange(LayerStage):
    """Puts a product of low rank beside the quantized one, which is then to stand for the rest of the weight."""

    def __init__(self, rank: Count = 32) -> None:
        self.rank = rank

    def check_rank(self, layer: Layer) -> None:
        """Raise ConfigError for a rank at which the product has as many values as the weight."""
        _, rows, columns = layer.weight.shape
        if self.rank * (rows + columns) >= rows * columns:
            raise ConfigError(
                f"a product of rank {self.rank} has as many values as its weight of {rows} rows and {columns} columns; "
                "take a smaller rank"
            )

    @abstractmethod
    def terms(self, layer: Layer, data: LayerData) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the factors, (groups, rows, rank) and (groups, rank, K), and the rounded weight; None: to be rounded.

        A rounded weight may have new numbers of the quantizer, which it then has.
        """


class BiasChange(LayerStage):
    """Changes the bias to compensate the error of the rounded weights."""

    changes = "bias"

    @abstractmethod
    def bias(self, layer: Layer, data: LayerData) -> Tensor:
        """Return the correction to add to the output of each channel, (C,)."""


@checked
def make_stage(spec: str | Mapping[str, Any] | Stage) -> Stage:
    """Make the stage that a spec names: "gptq", "gptq:damp=0.05,act_order", {"gptq": {"damp": 0.05}}, or a stage.

    Raises UnknownNameError, ConfigError for an option that the stage does not have.

    >>> make_stage("gptq:damp=0.05,act_order").damp
    0.05
    """
    if isinstance(spec, Stage):
        return spec
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise ConfigError(f"a stage is a name, or one name with its options, got {shown(spec)}")
        ((name, options),) = spec.items()
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"the options of a stage are a mapping such as {{'damp': 0.05}}, got {shown(options)}")
        options = dict(options or {})
        text = f"{name}:{','.join(f'{k}={v}' for k, v in options.items())}" if options else str(name)
    else:
        text = spec.strip()
        name, _, rest = text.partition(":")
        pairs = [item.partition("=") for item in rest.split(",") if item]
        options = {key.strip(): _value(value) if equals else True for key, equals, value in pairs}
    if name not in PTQ:
        raise UnknownNameError(
            f"{shown(text)}: no post-training stage {shown(name)};{did_you_mean(str(name), PTQ)} "
            f"known: {', '.join(PTQ)}"
        )
    kind = PTQ[name]
    allowed = list(inspect.signature(kind).parameters)
    if unknown := [key for key in options if key not in allowed]:
        raise ConfigError(
            f"stage {text!r}: {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    stage = kind(**options)
    stage.spec = text
    return stage


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
