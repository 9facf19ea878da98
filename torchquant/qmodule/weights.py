"""QWeights: a module with any number of weights and any call signature, such as LSTM, with quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError, UnsupportedPatternError
from torchquant.qmodule.patterns import LayerPattern, row_of, run_with
from torchquant.qmodule.state import QModule
from torchquant.qmodule.weight_slots import (
    WeightSlot,
    matrix_of,
    parameter_of,
    quantizer_key,
    stored_layout,
    weights_pattern,
)
from torchquant.qmodule.weighted import WEIGHTED, class_name
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._recording import current_recorder


def weight_names(module: nn.Module) -> list[str]:
    """Return the names of the module's parameters that are weights; [] for a class that is not in `WEIGHTED`.

    >>> weight_names(nn.GRUCell(3, 2))
    ['weight_ih', 'weight_hh']
    >>> weight_names(nn.MultiheadAttention(4, 2))
    ['in_proj_weight', 'out_proj.weight']
    """
    row = weights_pattern(module)
    if row is None:
        return []
    if row.weights is not None:
        return [_owned(module, name) for name in row.weights]
    names = [_computed(module, name) for name, _ in module.named_parameters() if "weight" in name.rpartition(".")[2]]
    return list(dict.fromkeys(names))


def _owned(module: nn.Module, name: str) -> str:
    """Return the name of a weight that a pattern lists. Raises ConfigError if the module has no such weight."""
    try:
        parameter_of(module, name)
    except AttributeError:
        owned = ", ".join(known for known, _ in module.named_parameters())
        raise ConfigError(
            f"the WeightsPattern of {type(module).__name__} lists the weight {name!r}; its parameters are {owned}"
        ) from None
    return name


def _computed(module: nn.Module, name: str) -> str:
    """Return the name of the weight that a hook computes from a parameter (`weight` from `weight_g`), else `name`."""
    base = next((name.removesuffix(end) for end in ("_g", "_v", "_orig") if name.endswith(end)), name)
    owner, _, last = base.rpartition(".")
    return base if last in module.get_submodule(owner).__dict__ else name


def float_weights(layer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Map every weight name of a supported layer to (weight as stored, weight with the output channel first).

    >>> {name: tuple(weight.shape) for name, (_, weight) in float_weights(nn.ConvTranspose1d(4, 6, 3)).items()}
    {'weight': (6, 4, 3)}
    """
    row = row_of(layer)
    if isinstance(row, LayerPattern):
        weight = row.weight_and_bias(layer)[0]
        return {"weight": (weight, row.channels_first(layer, weight))}
    return {name: (parameter_of(layer, name), matrix_of(layer, name)) for name in weight_names(layer)}


@checked
class QWeights(QModule):
    """Wraps Bilinear, Embedding, EmbeddingBag, LSTM, GRU, RNN, their cells, MultiheadAttention, or a class that
    `register_pattern` gave a `WeightsPattern`.

    `weight_quantizers`: name of a weight (`weight_names`) -> its quantizer; a weight that is not named stays
    float. `acts_quantizer` quantizes the output, the first one if there are several: for a recurrent module the
    sequence, not its last states. `input_quantizer` quantizes every real input that carries values (both of Bilinear;
    query, key and value of an attention, with one range); initial states and masks stay unchanged. A PackedSequence
    has its data quantized.

    Intermediate results inside such a module stay float: the states of recurrent modules, and the activations between
    stacked layers, so only the input of the first layer and the output of the last one are quantized. The weights of
    all layers are quantized.

    The call signature is that of the module; BYPASSED computes the same as the module. Raises
    UnsupportedPatternError, ConfigError.

    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import BatchMinMax
    >>> table = QWeights(nn.Embedding(10, 4), {"weight": AffineQuantizer(8, BatchMinMax(axis=0))})
    >>> table(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        layer: nn.Module,
        weight_quantizers: Mapping[str, Quantizer] = MappingProxyType({}),
        acts_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        names = weight_names(layer)
        if not names:
            allowed = ", ".join(map(class_name, WEIGHTED))
            raise UnsupportedPatternError(
                f"QWeights wraps {allowed}; got {type(layer).__name__}. Another class is added with "
                "torchquant.register_pattern and a WeightsPattern"
            )
        unknown = set(weight_quantizers) - set(names)
        if unknown:
            raise ConfigError(f"{type(layer).__name__} has the weights {', '.join(names)}; got {sorted(unknown)}")
        self.layer: Any = layer
        self.weight_quantizers = nn.ModuleDict({quantizer_key(name): q for name, q in weight_quantizers.items()})
        self._names = {quantizer_key(name): name for name in weight_quantizers}
        self.acts_quantizer = acts_quantizer
        self.input_quantizer = input_quantizer
        for _, weight, quantizer in self._weights():
            if quantizer is not None:
                quantizer.allocate_for(weight)
                quantizer.to(weight.device)
        self._hold()

    def _check_new(self, module: nn.Module) -> None:
        if weight_names(module) != weight_names(self.layer):
            raise self._cannot_hold(module)

    def quantizers(self) -> dict[str, Quantizer]:
        weights = {self._names[key]: quantizer for key, quantizer in self.weight_quantizers.items()}
        return {**weights, **super().quantizers()}  # type: ignore[dict-item]

    def weight_slots(self) -> list[WeightSlot]:
        self._recompute_weights()
        return [WeightSlot(self, self.path, name) for name, _, _ in self._weights()]

    def _weights(self) -> list[tuple[str, Tensor, Quantizer | None]]:
        own = self.quantizers()
        names = dict.fromkeys([*weight_names(self.layer), *self._names.values()])  # all that have a quantizer
        return [(name, matrix_of(self.layer, name), own.get(name)) for name in names]

    @torch.no_grad()
    def observe_weight(self) -> None:
        self._recompute_weights()
        self._observe_weights()

    @torch.no_grad()
    def _observe_weights(self) -> None:
        for _, weight, quantizer in self._weights():
            if quantizer is not None:
                quantizer.pre_observe(weight)

    def _has_new_weights(self) -> bool:
        quantized = [(name, quantizer) for name, _, quantizer in self._weights() if quantizer is not None]
        stored = [parameter_of(self.layer, name) for name, _ in quantized]
        return self._is_new_weight([quantizer for _, quantizer in quantized], stored)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.quantized_inputs(args, kwargs)
        y = self._call_held(self._weighted, *args, **kwargs)
        if isinstance(y, tuple):
            return (self._run_acts_quantizer("output", self.acts_quantizer, y[0]), *y[1:])
        return self._run_acts_quantizer("output", self.acts_quantizer, y)

    def quantized_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Observe and quantize the inputs that carry values, with one range; a tensor given twice counts once.

        Returns the arguments with which the module is run.
        """
        quantizer = self.input_quantizer
        if quantizer is None:
            return values_mapped(self.layer, args, kwargs, self._as_read)

        def quantized(given: list[Any]) -> list[Any]:
            if len(given) <= 1 or not self.state.is_act_observed:
                return [self._run_acts_quantizer("input", quantizer, x) for x in given]
            quantizer.pre_observe(
                torch.cat([x.flatten() for x in given]) if quantizer.axis is None else torch.cat(given)
            )
            return [self._quantize_site("input", quantizer, x) if self.state.is_act_quantized else x for x in given]

        return values_mapped(self.layer, args, kwargs, lambda given: self._as_read(quantized(given)))

    def _as_read(self, given: list[Any]) -> list[Any]:
        """Return inputs in the layout in which an attention reads them: it would make copies that nobody knows."""
        recorder = current_recorder()
        if recorder is None or not (isinstance(self.layer, nn.MultiheadAttention) and self.layer.batch_first):
            return given
        moved = [
            x.transpose(0, 1).contiguous().transpose(0, 1) if recorder.knows(x) and x.ndim == 3 else x for x in given
        ]
        for x in moved:
            recorder.note_input(x)
        return moved

    def _weighted(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if self.state.is_weight_observed and (self.state.is_weight_quantized or self._has_new_weights()):
            self._observe_weights()
        if not self.state.is_weight_quantized:
            return layer.forward(*args, **kwargs)
        weights = self.weights_in_use()
        if not isinstance(layer, nn.RNNBase):
            return run_with(layer, weights, *args, **kwargs)
        own = layer._flat_weights  # its forward reads these, not its parameters
        layer._flat_weights = [weights.get(n, w) for n, w in zip(layer._flat_weights_names, own, strict=True)]
        try:
            return layer.forward(*args, **kwargs)
        finally:
            layer._flat_weights = own

    def weights_in_use(self) -> dict[str, Tensor]:
        """Map the name of each weight that the current state quantizes to its quantized value."""
        if not self.state.is_weight_quantized:
            return {}
        return {
            name: stored_layout(self.layer, name, self._quantize_site(name, quantizer, weight))
            for name, weight, quantizer in self._weights()
            if quantizer is not None
        }


def values_mapped(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[list[Any]], list[Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the arguments that carry values: `change` gets all of them, a tensor given twice only once."""
    row = weights_pattern(layer)
    names = () if row is None else row.values
    n = len(names)
    given: list[Any] = []
    for x in (*args[:n], *(x for name, x in kwargs.items() if name in names)):
        if not any(x is other for other in given):
            given.append(x)
    done = change(given)

    def changed(x: Any) -> Any:
        return next(after for before, after in zip(given, done, strict=True) if before is x)

    by_name = {name: changed(x) if name in names else x for name, x in kwargs.items()}
    return (*map(changed, args[:n]), *args[n:]), by_name
