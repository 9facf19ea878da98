"""The weights of a QModule: one way to read, set and quantize each weight, for every kind of module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, NoCodesError, RoundingLostError
from torchquant.qmodule.patterns import stock_type
from torchquant.qmodule.weighted import WEIGHTED, WeightsPattern, pattern_of_experts
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.bn_fold import channel_view


@dataclass(frozen=True)
class WeightSlot:
    """One weight of a QModule, and its quantizer. Both are read from the module each time, so a slot is never stale.

    `module`: the QModule. `path`: its path in the model. `name`: its name for the weight.
    """

    module: Any = field(repr=False)
    path: str
    name: str

    @property
    def key(self) -> str:
        """The name of the weight in files and messages."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def label(self) -> str:
        """The name of the weight in tables: the path of its module; if this has several weights, also its name."""
        only = len(self.module.weight_slots()) == 1
        return (self.path if only else self.key) or "(root)"

    @property
    def weight(self) -> Tensor:
        """The real weight as the layer stores it."""
        return parameter_of(self.module.layer, self.name)

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of the weight; None if it stays float."""
        found: dict[str, Quantizer] = self.module.quantizers()
        return found.get(self.name)

    @property
    def state_prefix(self) -> str:
        """The prefix of the quantizer's keys in a `state_dict` of the model."""
        return f"{self.path}.{self._place}." if self.path else f"{self._place}."

    @property
    def _place(self) -> str:
        """The path of the quantizer below the module."""
        return f"weight_quantizers.{quantizer_key(self.name)}"

    @property
    def bias(self) -> Tensor | None:
        """The bias of what the weight computes, one value for each output channel; None if there is none."""
        row = weights_pattern(self.module.layer)
        named = {} if row is None else row.biases
        if "weight" not in self.name and self.name not in named:
            return None
        name, part = named.get(self.name, (self.name.replace("weight", "bias"), 0))
        try:
            whole: Tensor | None = parameter_of(self.module.layer, name)
        except AttributeError:
            return None
        if row is not None and self.name in row.stacks:
            return None if whole is None else whole.flatten()
        n = len(self.weight) if self.is_stored_as_seen else self.weight.shape[1]
        return whole if whole is None or len(whole) == n else whole[part * n : (part + 1) * n]

    @property
    def is_computed(self) -> bool:
        """Whether hooks, a parametrization or a forward compute the weight, so that it cannot be set."""
        weight = self.weight
        return not any(weight is held for held in (*self.module.parameters(), *self.module.buffers()))

    @property
    def n_groups(self) -> int:
        """The groups of output channels with inputs of their own: of a convolution, of an attention's projections."""
        row = weights_pattern(self.module.layer)
        if row is None:
            return 1
        return len(self.weight) if self.name in row.stacks else row.groups.get(self.name, 1)

    @property
    def is_stored_as_seen(self) -> bool:
        """Whether the layer stores the weight in the layout of `seen`: not a stack, nor one with the inputs first."""
        row = weights_pattern(self.module.layer)
        return row is None or self.name not in (*row.stacks, *row.transposed)

    @property
    def fold_factor(self) -> Tensor | None:
        """The factor of a folded batch norm for each output channel, (C,); None without one."""
        return None

    def seen(self) -> Tensor:
        """Return the weight as QUANT_EVAL quantizes it: output channel on axis 0, with a folded batch norm if any.

        Gradients flow back to the real weight.
        """
        self.module._recompute_weights()
        return matrix_of(self.module.layer, self.name)

    def rows(self) -> Tensor:
        """Return `seen()` as matrices: (groups, output channels / groups, inputs of each of these channels)."""
        seen = self.seen()
        return seen.reshape(self.n_groups, len(seen) // self.n_groups, -1)

    @torch.no_grad()
    def commit(self, values: Tensor) -> None:
        """Set the weight to levels: QUANT_EVAL quantizes to exactly these from now on, and the quantizer is pinned.

        The quantizer keeps its numbers, or takes them from the current weight if it has none yet; block formats keep
        pinned scales, or take those of the current weight. values: in the layout of `rows` or `seen`. Raises
        RoundingLostError, with everything unchanged, for values that are not levels of the quantizer; ConfigError for
        a weight that is computed or stays float.

        >>> from torchquant import QWrapper, make_quantizer
        >>> (slot,) = QWrapper(nn.Linear(8, 2), make_quantizer("affine:3/channel")).weight_slots()
        >>> slot.quantizer.pin(slot.seen())
        >>> below, above = slot.quantizer.neighbours(slot.rows()[0])
        >>> slot.commit(above)
        >>> torch.equal(slot.quantizer(slot.seen()), above)
        True
        """
        quantizer, seen = self.quantizer, self.seen()
        if quantizer is None:
            raise ConfigError(f"{self.key} has no quantizer, so that it has no levels to commit to")
        if values.numel() != seen.numel():
            shapes = f"{tuple(self.rows().shape)} or {tuple(seen.shape)}"
            raise ConfigError(f"{self.key}: values must be of shape {shapes}, got {tuple(values.shape)}")
        values, former, was_pinned = values.reshape(seen.shape).to(seen), self.weight.clone(), quantizer.is_pinned
        quantizer.pin(seen, observe=not quantizer.is_ready)
        try:
            self.set_weight(quantizer.preimage(values))
            self._check_committed(quantizer, values)
        except Exception:
            if not self.is_computed:
                self.weight.copy_(former)
            if not was_pinned:
                quantizer.unpin()
            raise

    def _check_committed(self, quantizer: Quantizer, values: Tensor) -> None:
        """Raise RoundingLostError unless the codes of the weight decode to these values."""
        seen = self.seen()
        try:
            found = quantizer.decode(quantizer.encode(seen), seen.dtype)
        except NoCodesError:
            found = quantizer.quantize(seen)
        lost = found.ne(values)
        n_lost = int(lost.sum())
        if n_lost:
            wanted, became = float(values[lost][0]), float(found[lost][0])
            raise RoundingLostError(
                f"{self.key}: {n_lost} of {values.numel()} values are not levels of {type(quantizer).__name__} for the "
                f"weight that holds them; the first of them, {wanted!r}, becomes {became!r}. "
                "Use values from neighbours, nearest or quantize of the pinned quantizer, and fold a batch norm "
                "permanently before rounding"
            )

    @torch.no_grad()
    def set_weight(self, values: Tensor, where: Tensor | None = None) -> None:
        """Set the weight so that `seen` returns `values`, where `where` is true if given. Both are laid out as `seen`.

        Raises ConfigError for a weight that is computed.
        """
        if self.is_computed:
            raise ConfigError(
                f"{self.key} is computed from other parameters, so it cannot be set. Make it a plain one first, with "
                "remove_weight_norm, remove_spectral_norm, prune.remove or remove_parametrizations of torch.nn.utils"
            )
        real = self._as_stored(values)
        self.weight.copy_(real if where is None else torch.where(self.stored_layout(where), real, self.weight))

    def _as_stored(self, values: Tensor) -> Tensor:
        """Return the real weight for which `seen` returns these values."""
        return self.stored_layout(values)

    def stored_layout(self, values: Tensor) -> Tensor:
        """Return values that are laid out as `seen` in the layout in which the layer stores the weight."""
        return stored_layout(self.module.layer, self.name, values)

    def replace_quantizer(self, new: Quantizer) -> None:
        """Replace the quantizer of the weight."""
        key = quantizer_key(self.name)
        self.module.weight_quantizers[key] = new
        self.module._names[key] = self.name


class LayerSlot(WeightSlot):
    """The weight of a QWrapper, which may be stored in another layout and may have a batch norm folded in."""

    _place = "weight_quantizer"

    @property
    def weight(self) -> Tensor:
        value: Tensor = self.module.row.weight_and_bias(self.module.layer)[0]
        return value

    @property
    def n_groups(self) -> int:
        return int(getattr(self.module.layer, "groups", 1))

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module.layer, "bias", None)

    @property
    def fold_factor(self) -> Tensor | None:
        factor: Tensor | None = self.module.fold_factor()
        return None if factor is None else factor.detach()

    def seen(self) -> Tensor:
        self.module._recompute_weights()
        weight, factor = self.stored_layout(self.weight), self.fold_factor  # the layout is its own inverse
        return weight if factor is None else weight * channel_view(factor, weight.ndim, 0)

    def _as_stored(self, values: Tensor) -> Tensor:
        factor = self.fold_factor
        if factor is not None:
            values = (values / channel_view(torch.where(factor == 0, 1.0, factor), values.ndim, 0)).nan_to_num()
        return self.stored_layout(values)

    def stored_layout(self, values: Tensor) -> Tensor:
        laid_out: Tensor = self.module.row.channels_first(self.module.layer, values)
        return laid_out

    def replace_quantizer(self, new: Quantizer) -> None:
        self.module.weight_quantizer = new


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return the parameter of this name, or the tensor that hooks or a parametrization computed for it."""
    owner, _, last = name.rpartition(".")
    value: Tensor = getattr(layer.get_submodule(owner), last)
    return value


def weights_pattern(module: nn.Module) -> WeightsPattern | None:
    """Return the pattern of a module with any number of weights, None for one that QWeights does not wrap."""
    kind = stock_type(module)
    known = WEIGHTED.get(kind) or WEIGHTED.get(f"{kind.__module__}.{kind.__qualname__}")
    return known or pattern_of_experts(module)


def n_values(module: nn.Module) -> int:
    """Return how many of a layer's first inputs carry values, 1 for a layer with one weight."""
    row = weights_pattern(module)
    return 1 if row is None else len(row.values)


def matrix_of(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter with one output channel in each row of axis 0: of a stack of matrices all their rows."""
    row, weight = weights_pattern(layer), parameter_of(layer, name)
    if row is None:
        return weight
    weight = weight.mT if name in row.transposed else weight
    return weight.flatten(0, 1) if name in row.stacks else weight


def stored_layout(layer: nn.Module, name: str, values: Tensor) -> Tensor:
    """Return values that are laid out as `matrix_of` in the layout of the parameter."""
    row, shape = weights_pattern(layer), parameter_of(layer, name).shape
    if row is None or name not in row.transposed:
        return values.view(shape)
    return values.reshape(*shape[:-2], shape[-1], shape[-2]).mT


def quantizer_key(name: str) -> str:
    """Return the key of a weight's quantizer in `QWeights.weight_quantizers`, which allows no dots."""
    return name.replace(".", "_")
