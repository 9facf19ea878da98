"""QWrapper: a layer, optionally with batch norm and activation, with quantizers at its slots."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.qmodule.bn_folding import check_fold, folded_forward, running_bias, running_factor
from torchquant.qmodule.input_slots import InputSlots
from torchquant.qmodule.patterns import (
    OwnForwardPattern,
    plain_type,
    read_quietly,
    row_of,
    run_by_functional_call,
    split_pattern,
)
from torchquant.qmodule.state import QModuleState, saved_flag
from torchquant.qmodule.weight_slots import LayerSlot, WeightSlot
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._recording import current_recorder
from torchquant.quantizers_functional.bn_fold import channel_view

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@checked
class QWrapper(InputSlots):
    """Wraps `layer [+ batch norm] [+ activation]`; quantizes its weight and its output.

    `layers`: a module, a Sequential or a list; the table in `patterns.py` has the allowed patterns.
    `weight_quantizer` gets the weight with the output channel on axis 0, for transposed convolutions too, so `axis=0`
    always means "per output channel" and `axis=1` "per input channel", counted within each of its groups.
    `acts_quantizer` gets the output after the activation, `input_quantizer` the input, `bias_quantizer` the bias that
    the layer is run with, whenever the weight is observed or quantized, `preactivation_quantizer` the input of the
    activation: after a convolution, ONNX Runtime's integer kernels need codes there. A slot whose quantizer is None,
    the default, stays float. `transform_input` puts a float transform before the input quantizer, `set_low_rank` a
    product beside the layer's; both work in every state.

    `fold_bn`: False keeps the batch norm as a layer of its own; True (the same as "corrected") or
    "running", "batch", "corrected", "rescale" quantize the weight with the batch norm folded in, as
    deployed; `bn_folding.py` has the table. States that do not quantize weights run the plain layers.

    `is_split` is for a wrapper in a model whose forward still calls batch norm and activation itself, at their own
    places (`FusedPart`): in BYPASSED the wrapper then runs the layer alone, unless it is called with `fused=True`.

    In BYPASSED the output is that of the plain layers, bit for bit. No tensor is kept after forward.
    Raises UnsupportedPatternError, ConfigError; in forward UnobservedRangeError.

    >>> from torchquant.quantizers import AffineQuantizer
    >>> from torchquant.range_observers import BatchMinMax, ExpAvgMinMax
    >>> wrapper = QWrapper(
    ...     [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()],
    ...     weight_quantizer=AffineQuantizer(8, BatchMinMax(axis=0), symmetric="narrow"),
    ...     acts_quantizer=AffineQuantizer(8, ExpAvgMinMax()),
    ... )
    >>> wrapper(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[nn.Module],
        weight_quantizer: Quantizer | None = None,
        acts_quantizer: Quantizer | None = None,
        fold_bn: bool | str = False,
        input_quantizer: Quantizer | None = None,
        bias_quantizer: Quantizer | None = None,
        preactivation_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        given = (weight_quantizer, acts_quantizer, input_quantizer, bias_quantizer, preactivation_quantizer)
        sites = [q for q in given if q is not None]
        if len({id(q) for q in sites}) != len(sites):
            raise ConfigError("each site needs a quantizer of its own; one object was given for two of them")
        self.layer: Any
        self.bn: Any
        self.layer, self.bn, self.activation = split_pattern(layers)
        row_of(self.layer)  # registers a class known only by name under the class itself
        self._layer_type = plain_type(self.layer)  # torch.export puts a stand-in class in place of a shared layer's
        self.weight_quantizer = weight_quantizer
        self.acts_quantizer = acts_quantizer
        self.input_quantizer = input_quantizer
        self.bias_quantizer = bias_quantizer
        self.preactivation_quantizer = preactivation_quantizer
        self.input_transform = self.low_rank = None
        if preactivation_quantizer is not None and self.activation is None:
            raise ConfigError("a preactivation is quantized before an activation; give an activation too")
        if bias_quantizer is not None and weight_quantizer is None:
            raise ConfigError("a bias is quantized together with the weight; give a weight_quantizer too")
        with read_quietly(self.layer):
            weight = self._channels_first_weight()
        out_channels = weight.shape[0]
        self.fold_mode = check_fold(fold_bn, self.bn, out_channels)
        self.bn_frozen = False
        if weight_quantizer is not None:
            weight_quantizer.allocate_for(weight)
            weight_quantizer.to(weight.device)
        if bias_quantizer is not None:
            bias_quantizer.allocate(out_channels)
            bias_quantizer.to(weight.device)
        self._hold()

    def forward(self, x: Tensor, *, fused: bool = False) -> Tensor:
        state = self._state
        real = x if self.input_transform is None else self.input_transform(x)
        if self.is_split and state is QModuleState.BYPASSED and not fused:
            return self._with_low_rank(self.layer(real), real)
        x = self._run_acts_quantizer("input", self.input_quantizer, real)
        recorder = current_recorder()
        if recorder is not None:
            recorder.note_input(x)
        if self.weight_quantizer is None or not (state.is_weight_observed or state.is_weight_quantized):
            y = self._normalized(self._with_low_rank(self.layer(x), real))
        elif not state.is_weight_quantized or self.fold_mode is None:
            y = self._normalized(self._with_low_rank(self._call_held(self._weighted, x), real))
        else:
            if isinstance(self.layer, nn.Linear) and x.ndim != 2:
                raise ConfigError(
                    f"{self.path or 'QWrapper'}: a batch norm folds into a Linear for inputs (N, features) only, got "
                    f"shape {tuple(x.shape)}, where the batch norm works along another axis; use fold_bn=False"
                )
            y = self._with_low_rank(self._call_held(self._folded, x), real)
        if self.preactivation_quantizer is not None:
            y = self._run_acts_quantizer("preactivation", self.preactivation_quantizer, y)
        return self._run_acts_quantizer("output", self.acts_quantizer, y, self.activation)

    def _weighted(self, x: Tensor) -> Tensor:
        """Run the layer without its batch norm, in states that observe or quantize the weight."""
        if self.state.is_weight_quantized:
            return self._run(x, None, self.bias_in_use)
        self._observe_new_weight()
        y: Tensor = self.layer.forward(x)
        return y

    def _folded(self, x: Tensor) -> Tensor:
        assert self.fold_mode is not None
        return folded_forward(self.fold_mode, self._run, self._run_float, self.bn, self.bias_in_use, x)

    def _run_float(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.forward(x)
        self._note_result(y, x, self._weight, self.bias_in_use)
        return y

    def _with_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.low_rank is None else y + self.low_rank_output(x)

    def _normalized(self, y: Tensor) -> Tensor:
        if self.bn is None:
            return y
        normalized: Tensor = self.bn(y)
        recorder = current_recorder()
        if recorder is not None:
            recorder.note_computed(normalized, *_batch_norm_again(self.bn, y))
        return normalized

    @property
    def _weight(self) -> Tensor:
        return self.row.weight_and_bias(self.layer)[0]

    @property
    def bias_in_use(self) -> Tensor | None:
        """The bias that the layer computes with: its `bias`, or the one that its custom forward computes."""
        return self.row.weight_and_bias(self.layer)[1]

    def _channels_first_weight(self, factor: Tensor | None = None) -> Tensor:
        weight = self.row.channels_first(self.layer, self._weight)
        return weight if factor is None else weight * channel_view(factor, weight.ndim, 0)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Transform, observe and quantize the input x as the state says; the result is the input of the layer."""
        x = x if self.input_transform is None else self.input_transform(x)
        return self._run_acts_quantizer("input", self.input_quantizer, x)

    def fold_factor(self) -> Tensor | None:
        """Return the folded batch norm's factor for each output channel of the weight, (C,); None without folding."""
        return None if self.fold_mode is None else running_factor(self.bn)

    def _observe_new_weight(self) -> None:
        """Observe the weight, unless it has not changed since it was last observed in this state."""
        quantizer = self.weight_quantizer
        assert quantizer is not None
        sources = [self._weight]
        if self.fold_mode is not None:
            sources += [t for t in (self.bn.weight, self.bn.running_var) if t is not None]
        if self._is_new_weight([quantizer], sources):
            self._observe_weight()

    def _run(self, x: Tensor, factor: Tensor | None, bias: Tensor | None, unfolds: bool = False) -> Tensor:
        """Run the layer with its weight times `factor`, observed if the state says so, then quantized.

        `unfolds`: the quantized weight is divided by the factor again.
        """
        assert self.weight_quantizer is not None
        quantize = self._observe_and_quantize if self._state.is_weight_observed else self._quantize_site
        weight = quantize("weight", self.weight_quantizer, self._channels_first_weight(factor))
        if unfolds and factor is not None:
            weight = weight / channel_view(factor, weight.ndim, 0)
        if self.bias_quantizer is not None and bias is not None:
            bias = quantize("bias", self.bias_quantizer, bias)
        return self._run_layer(x, self.row.channels_first(self.layer, weight), bias)

    def _run_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer's forward with these tensors: its class's, or one that an adapter has set on the layer."""
        if "forward" not in self.layer.__dict__:
            y = self.row.run(self.layer, x, weight, bias)
            self._note_result(y, x, weight, bias)
            return y
        if self.fold_mode is not None:
            raise ConfigError(
                f"{self.path or 'QWrapper'}: the forward of its {type(self.layer).__name__} was replaced, as adapters "
                "do, so that no batch norm can be folded into its weight; use fold_bn=False"
            )
        if isinstance(self.row, OwnForwardPattern):
            raise ConfigError(
                f"{self.path or 'QWrapper'}: {type(self.layer).__name__} has a forward of its own, which an "
                "adapter cannot replace; leave the layer float with skip: True, or put the adapter around it"
            )
        return run_by_functional_call(self.layer, x, weight, bias)

    def _note_result(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        recorder = current_recorder()
        if recorder is not None and self.row.is_repeatable and "forward" not in self.layer.__dict__:
            recorder.note_computed(y, partial(self.row.run, self.layer), x, weight, bias)

    def _check_new(self, module: nn.Module) -> None:
        if row_of(module) is not self.row:
            raise self._cannot_hold(module)

    @torch.no_grad()
    def observe_weight(self) -> None:
        """Let the weight quantizer observe the current weight, folded if folding is on. No data is needed."""
        self._recompute_weights()
        self._observe_weight()

    @torch.no_grad()
    def _observe_weight(self) -> None:
        if self.weight_quantizer is not None:
            self.weight_quantizer.pre_observe(self._channels_first_weight(self.fold_factor()))
        bias = self.bias_in_use if self.fold_mode is None else running_bias(self.bn, self.bias_in_use)
        if self.bias_quantizer is not None and bias is not None:
            self.bias_quantizer.pre_observe(bias)

    def weight_slots(self) -> list[WeightSlot]:
        self._recompute_weights()
        return [LayerSlot(self, self.path, "weight")]

    @torch.no_grad()
    def float_weight(self) -> Tensor:
        """Return the real weight that QUANT_EVAL quantizes, output channel on axis 0, folded if folding is on."""
        return self.weight_slots()[0].seen()

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Return a float copy of the layer with its batch norm, if any, folded in (docs/algorithms.md D1).

        The copy equals layer + batch norm in eval mode; for a Linear with batch norm, on inputs (N, features).
        Raises ConfigError if the batch norm has no running statistics, or if the forward of the layer computes its
        weight.
        """
        layer = copy.deepcopy(self.layer)
        if self.has_slots:
            self.store(layer, self.float_weight_of(self._weight))
        if self.bn is None:
            return layer
        if isinstance(self.row, OwnForwardPattern) and self._weight is not self.layer.weight:
            raise ConfigError(
                f"{self.path or type(self.layer).__name__}: its forward computes the weight, so no copy of it can hold "
                "one that a batch norm is folded into"
            )
        check_fold(True, self.bn, self._channels_first_weight().shape[0])
        weight = self.row.channels_first(self.layer, layer.weight) if self.has_slots else self._channels_first_weight()
        weight = weight * channel_view(running_factor(self.bn), weight.ndim, 0)
        layer.weight = nn.Parameter(self.row.channels_first(self.layer, weight).contiguous())
        layer.bias = nn.Parameter(running_bias(self.bn, self.bias_in_use))
        return layer

    def freeze_bn(self, frozen: bool = True) -> None:
        """Keep the batch norm on its running statistics, also in train mode; `.train()` does not undo it."""
        if self.bn is not None and frozen != self.bn_frozen:
            self.bn.train(self.training and not frozen)
        self.bn_frozen = frozen

    def train(self, mode: bool = True) -> QWrapper:
        super().train(mode)
        if self.bn is not None and self.bn_frozen:
            self.bn.eval()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "preactivation_quantizer" not in (*self.__dict__, *self._modules):  # a pickle of 0.1
            self.preactivation_quantizer = None
        if "low_rank" not in (*self.__dict__, *self._modules):  # an older pickle
            self.input_transform = self.low_rank = None

    def get_extra_state(self) -> Tensor:
        return torch.cat([super().get_extra_state(), torch.tensor([float(self.bn_frozen)])])

    def set_extra_state(self, state: Tensor) -> None:
        super().set_extra_state(state[:-1])
        self.freeze_bn(saved_flag(float(state[-1]), self.path or type(self).__name__))

    def extra_repr(self) -> str:
        fold = f", fold_bn={self.fold_mode!r}" if self.fold_mode else ""
        return f"state={self.state.name}{fold}{self.held_repr()}"


def _batch_norm_again(bn: Any, y: Tensor) -> tuple[Any, ...]:
    """Return a function that computes the batch norm of y again without a change of its statistics, and its inputs."""
    if type(bn) not in BATCH_NORMS:
        return None, None
    uses_batch = bn.training or bn.running_mean is None
    statistics = (None, None) if uses_batch else (bn.running_mean, bn.running_var)

    def again(y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(y, mean, var, weight, bias, uses_batch, 0.0, bn.eps)

    return again, y, bn.weight, bn.bias, *statistics
