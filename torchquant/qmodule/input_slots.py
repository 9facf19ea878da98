"""The float slots of a QWrapper: transforms before its input quantizer, and a low-rank product beside its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError
from torchquant.qmodule.input_transform import (
    BESIDE,
    SLOT,
    InputTransform,
    LowRank,
    expected_transforms,
    on_input_channels,
)
from torchquant.qmodule.patterns import (
    PATTERNS,
    InputFirstPattern,
    LayerPattern,
    row_of_type,
    run_by_functional_call,
)
from torchquant.qmodule.state import QModule
from torchquant.quantizers import Quantizer
from torchquant.range_observers._statistics import StatisticTracker


class InputSlots(QModule):
    """The part of a QWrapper around its input: the transforms, the low-rank product, and how they load.

    A checkpoint with transforms, or with a low-rank product, brings them along: a wrapper without them gets them. One
    without them is refused by a wrapper that has them, whose weight is another.
    """

    layer: Any
    _layer_type: type[nn.Module]
    fold_factor: Callable[[], Tensor | None]
    input_quantizer: Quantizer | None
    input_transform: nn.Sequential | None
    low_rank: LowRank | None

    @property
    def row(self) -> LayerPattern:
        """The pattern of the layer, which runs it with another weight."""
        row = PATTERNS.get(self._layer_type) or row_of_type(self._layer_type)
        assert isinstance(row, LayerPattern)
        return row

    @property
    def is_linear(self) -> bool:
        """Whether the sums of the layer run along the last axis of its input."""
        return _is_linear(self.row, self.layer)

    @property
    def has_known_channels(self) -> bool:
        """Whether the axis of the input channels is known: for linear layers and convolutions."""
        return self.is_linear or (hasattr(self.layer, "kernel_size") and hasattr(self.layer, "groups"))

    @property
    def channel_axis(self) -> int:
        """The axis of the input channels, counted from the end. Raises ConfigError for a layer of unknown geometry."""
        if self.is_linear:
            return -1
        if not self.has_known_channels:
            raise ConfigError(
                f"{self._who()}: it is not known which axis of its input holds the channels; input transforms and "
                "low-rank products are for linear layers and convolutions"
            )
        return -1 - len(self.layer.kernel_size)

    def _who(self) -> str:
        return self.path or type(self.layer).__name__

    @torch.no_grad()
    def transform_input(self, transform: InputTransform) -> None:
        """Put a transform before the input quantizer, behind those already there, and its inverse into the weight.

        The float function stays. The weight quantizer observes the new weight, if it had observed one; the ranges of
        the input quantizer are forgotten. Raises ConfigError, with everything unchanged, for a transform that does not
        fit the layer, for a weight that is computed or shared, and for one that is rounded.

        >>> from torchquant.qmodule import ChannelScale, QWrapper
        >>> wrapper, x = QWrapper(nn.Linear(2, 1, bias=False)), torch.tensor([[3.0, 4.0]])
        >>> y = wrapper(x)
        >>> wrapper.transform_input(ChannelScale(torch.tensor([0.25, 2.0])))
        >>> bool(torch.allclose(wrapper(x), y))
        True
        """
        axis, (slot,) = self.channel_axis, self.weight_slots()
        weight, n_groups = self._stored(), slot.n_groups
        per_group = weight.shape[1]
        if (transform.axis, transform.n_channels) != (axis, per_group * n_groups):
            raise ConfigError(
                f"{self._who()} reads {per_group * n_groups} channels on axis {axis}; the transform is for "
                f"{transform.n_channels} on axis {transform.axis}"
            )
        transform.check_groups(per_group)
        if slot.is_computed:
            raise ConfigError(f"{self._who()}: its weight is computed from other parameters; make it a plain one first")
        if slot.quantizer is not None and slot.quantizer.is_pinned:
            raise ConfigError(
                f"{self._who()}: its weight has been rounded; put transforms before the layer first, then round"
            )
        changed = on_input_channels(weight, n_groups, transform.on_weight)
        steps = [] if self.input_transform is None else list(self.input_transform)
        self.input_transform = nn.Sequential(*steps, transform.to(weight.device))
        self._store(changed)
        self.forget_ranges("weight", "input")

    @torch.no_grad()
    def remove_input_transform(self) -> None:
        """Remove all transforms and fold them back into the weight."""
        if self.input_transform is not None:
            self._store(on_input_channels(self._stored(), self.weight_slots()[0].n_groups, self._off))
            self.input_transform = None
            self.forget_ranges("weight", "input")

    def set_low_rank(self, up: Tensor | None, down: Tensor | None = None) -> None:
        """Put a low-rank product beside the quantized one; the weight is not changed. None removes it.

        up: (groups, rows / groups, rank). down: (groups, rank, K), K the inputs of an output channel, as in the `rows`
        of a weight slot. Raises ConfigError for a layer of unknown geometry, and for a batch norm that is folded and
        not yet permanently so.
        """
        if up is None or down is None:
            self.low_rank = None
            return
        _ = self.channel_axis
        factor = self.fold_factor()
        if factor is not None and not bool((factor == 1).all()):
            raise ConfigError(f"{self._who()}: fold its batch norm permanently first, with the stage fold_bn")
        like = self.weight_slots()[0].seen()
        self.low_rank = LowRank(down.reshape(-1, *like.shape[1:]).to(like), up.flatten(0, 1).to(like))

    def low_rank_output(self, x: Tensor) -> Tensor:
        """Compute the low-rank product of an input that is transformed and not quantized."""
        assert self.low_rank is not None
        return beside(self.low_rank, self.row, self.layer, x)

    def float_weight_of(self, stored: Tensor) -> Tensor:
        """Return the weight, as the layer stores it, that computes alone what `stored` does with the slots."""
        return self._exchanged(stored, self._off, 1)

    def stored_weight_of(self, float_weight: Tensor) -> Tensor:
        """Return the weight to store so that the layer with its slots computes what `float_weight` does alone."""
        return self._exchanged(float_weight, self._on, -1)

    def _exchanged(self, weight: Tensor, change: Any, sign: int) -> Tensor:
        first = self.row.channels_first(self.layer, weight)
        n_groups = self.weight_slots()[0].n_groups
        beside = 0.0 if self.low_rank is None else sign * self.low_rank.product().detach().to(first)
        if sign > 0:
            first = first + beside
        if self.input_transform is not None:
            first = on_input_channels(first, n_groups, change)
        if sign < 0:
            first = first + beside
        return self.row.channels_first(self.layer, first)

    def _on(self, weight: Tensor) -> Tensor:
        for step in self.input_transform or ():
            weight = step.on_weight(weight)  # type: ignore[operator]
        return weight

    def _off(self, weight: Tensor) -> Tensor:
        for step in reversed(list(self.input_transform or ())):
            weight = step.off_weight(weight)  # type: ignore[operator]
        return weight

    @property
    def has_slots(self) -> bool:
        """Whether there is a transform before the input quantizer, or a low-rank product."""
        return self.input_transform is not None or self.low_rank is not None

    def _stored(self) -> Tensor:
        """Return the weight without a folded batch norm, output channel first."""
        return self.row.channels_first(self.layer, self.weight_slots()[0].weight)

    def _store(self, channels_first: Tensor) -> None:
        self.store(self.layer, self.row.channels_first(self.layer, channels_first))

    @torch.no_grad()
    def store(self, layer: nn.Module, weight: Tensor) -> None:
        """Set the weight of the layer, or of a copy of it, as the layer stores it; channels may have been split."""
        held = self.row.weight_and_bias(layer)[0]
        if held.shape == weight.shape:
            held.copy_(weight)
            return
        held.data = held.new_empty(weight.shape).copy_(weight)
        n_channels = self.row.channels_first(layer, held).shape[1] * int(getattr(layer, "groups", 1))
        for name in ("in_features", "in_channels"):
            if hasattr(layer, name):
                setattr(layer, name, n_channels)

    def put_back_input(self, steps: nn.Sequential | None, weight: Tensor) -> None:
        """Set the transforms and the weight, as the layer stores it, to what they were before `transform_input`."""
        self.input_transform = steps
        self.store(self.layer, weight)
        self.forget_ranges("weight", "input")

    def forget_ranges(self, *sites: str) -> None:
        """Forget the ranges of these slots, and observe the weight again if it had been observed."""
        quantizers = self.quantizers()
        was_ready = "weight" in quantizers and quantizers["weight"].is_ready
        for site in sites:
            for part in quantizers[site].modules() if site in quantizers else ():
                if isinstance(part, StatisticTracker):
                    part.reset()
        if was_ready:
            self.observe_weight()

    def _fit_weight(self) -> None:
        """Let the weight have as many channels as the transforms give; its numbers are loaded afterwards."""
        assert self.input_transform is not None
        last = self.input_transform[-1]
        assert isinstance(last, InputTransform)
        given = last.n_given // self.weight_slots()[0].n_groups
        stored = self._stored()
        if stored.shape[1] != given:
            self._store(stored.new_zeros(len(stored), given, *stored.shape[2:]))

    def saved_slots(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of the transforms and of the low-rank product in a saved state."""
        transforms, beside = (
            {key.removeprefix(place): value for key, value in state_dict.items() if key.startswith(place)}
            for place in (f"{prefix}{SLOT}.", f"{prefix}{BESIDE}.")
        )
        return transforms, beside

    def why_not_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Say which slot of the wrapper a saved state of it lacks, "" if none."""
        saved, present = self.saved_slots(state_dict, prefix), (self.input_transform, self.low_rank)
        lost = [name for name, s, p in zip((SLOT, BESIDE), saved, present, strict=True) if p is not None and not s]
        if not lost or not any(key.startswith(prefix) for key in state_dict):
            return ""
        return (
            f"{prefix}{lost[0]} is not in the checkpoint, and the weights there are those of a model without it; load "
            "them into a model that torchquant.quantize has just made"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        why = self.why_not_loaded(state_dict, prefix)
        args[-1].extend([why] if why else [])
        self.expect_slots(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def expect_slots(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Make the slots that a saved state has; their tensors are loaded afterwards."""
        device = self.row.weight_and_bias(self.layer)[0].device
        transforms, beside = self.saved_slots(state_dict, prefix)
        if transforms and _shapes_below(self.input_transform) != {k: v.shape for k, v in transforms.items()}:
            self.input_transform = expected_transforms(transforms, self.channel_axis).to(device)
            self._fit_weight()
        if beside and _shapes_below(self.low_rank) != {k: v.shape for k, v in beside.items()}:
            self.low_rank = LowRank(**{k: torch.zeros_like(v, device=device) for k, v in beside.items()})


def _is_linear(row: LayerPattern, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or isinstance(row, InputFirstPattern)


def product_with(row: LayerPattern, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Run a layer with another weight, output channel first, and without its bias."""
    has_bias = row.run is run_by_functional_call and getattr(layer, "bias", None) is not None
    bias = weight.new_zeros(len(weight)) if has_bias else None  # which would otherwise add its own
    return row.run(layer, x, row.channels_first(layer, weight), bias)


def beside(low_rank: LowRank, row: LayerPattern, layer: Any, x: Tensor) -> Tensor:
    """Compute the low-rank product beside a layer; a convolution runs with `down` as its weight."""
    run = None if _is_linear(row, layer) else lambda x, weight: product_with(row, layer, x, weight)
    y: Tensor = low_rank(x, run)
    return y


def _shapes_below(module: nn.Module | None) -> dict[str, torch.Size]:
    return {} if module is None else {key: value.shape for key, value in module.state_dict().items()}
