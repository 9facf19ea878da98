"""The weights of a QModule: one way to read, to set and to quantize each of them, whatever the module is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, NoCodesError, RoundingLostError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.bn_fold import channel_view


@dataclass(frozen=True)
class WeightSlot:
    """One weight of a QModule, and where its quantizer is. The module is asked each time, so that a slot never ages.

    `module`: the QModule. `path`: where it sits in the model. `name`: what it calls the weight.
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
        """What tables call the weight: the path of its module, with its name where the module has several weights."""
        only = len(self.module.weight_slots()) == 1
        return (self.path if only else self.key) or "(root)"

    @property
    def weight(self) -> Tensor:
        """The real weight as the layer stores it."""
        return parameter_of(self.module.layer, self.name)

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of the weight; None where it stays float."""
        found: dict[str, Quantizer] = self.module.quantizers()
        return found.get(self.name)

    @property
    def state_prefix(self) -> str:
        """What the keys of the quantizer begin with in a `state_dict` of the model."""
        return f"{self.path}.{self._place}." if self.path else f"{self._place}."

    @property
    def _place(self) -> str:
        """The path of the quantizer below the module."""
        return f"weight_quantizers.{quantizer_key(self.name)}"

    @property
    def is_computed(self) -> bool:
        """Whether hooks, a parametrization or a forward compute the weight, so that it cannot be set."""
        weight = self.weight
        return not any(weight is held for held in (*self.module.parameters(), *self.module.buffers()))

    @property
    def n_groups(self) -> int:
        """How many parts of the output channels read inputs of their own: the groups of a convolution, else 1."""
        return 1

    def seen(self) -> Tensor:
        """The weight as QUANT_EVAL quantizes it: the output channel on axis 0, a batch norm folded in where one is.

        It has a gradient for the real weight.
        """
        self.module._recompute_weights()
        return self.weight

    def rows(self) -> Tensor:
        """What `seen` gives as matrices: (groups, output channels / groups, inputs of each of these channels)."""
        seen = self.seen()
        return seen.reshape(self.n_groups, len(seen) // self.n_groups, -1)

    @torch.no_grad()
    def commit(self, values: Tensor) -> None:
        """Make levels the weight: QUANT_EVAL quantizes to exactly these from now on, and its quantizer is pinned.

        The numbers of the quantizer are those it has, or what the weight gives if it has none yet; of block formats
        pinned before, or those of the weight as it is. values: as `rows` or `seen` lay them out. Raises
        RoundingLostError, with all as it was, for values that the quantizer does not give; ConfigError for a weight
        that is computed or stays float.

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
        """Raise RoundingLostError unless the codes of the weight stand for these values."""
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
                f"{self.key}: {n_lost} of {values.numel()} values are not what {type(quantizer).__name__} makes of the "
                f"weight that holds them, the first of them {wanted!r}, which becomes {became!r}. "
                "Take values that neighbours, nearest or quantize give of the pinned quantizer, and fold a batch norm "
                "for good before rounding"
            )

    @torch.no_grad()
    def set_weight(self, values: Tensor, where: Tensor | None = None) -> None:
        """Make `values` what `seen` gives, or those of them where `where` is true. Both are laid out as `seen` is.

        Raises ConfigError for a weight that is computed.
        """
        if self.is_computed:
            raise ConfigError(
                f"{self.key} is computed from other parameters, so it cannot be set. Make it a plain one first, with "
                "remove_weight_norm, remove_spectral_norm, prune.remove or remove_parametrizations of torch.nn.utils"
            )
        real = self._as_stored(values)
        self.weight.copy_(real if where is None else torch.where(self.channels_first(where), real, self.weight))

    def _as_stored(self, values: Tensor) -> Tensor:
        """The real weight that `seen` gives these values of."""
        return values

    def channels_first(self, values: Tensor) -> Tensor:
        """Values in the layout of the layer, with the output channel on axis 0; and back, for it is its own inverse."""
        return values

    def replace_quantizer(self, new: Quantizer) -> None:
        """Let another quantizer take the weight."""
        key = quantizer_key(self.name)
        self.module.weight_quantizers[key] = new
        self.module._names[key] = self.name


class LayerSlot(WeightSlot):
    """The weight of a QWrapper, which may store it otherwise, and folds a batch norm into it."""

    _place = "weight_quantizer"

    @property
    def weight(self) -> Tensor:
        value: Tensor = self.module.row.weight_and_bias(self.module.layer)[0]
        return value

    @property
    def n_groups(self) -> int:
        return int(getattr(self.module.layer, "groups", 1))

    def seen(self) -> Tensor:
        self.module._recompute_weights()
        weight, factor = self.channels_first(self.weight), self.module.fold_factor()
        return weight if factor is None else weight * channel_view(factor.detach(), weight.ndim, 0)

    def _as_stored(self, values: Tensor) -> Tensor:
        factor = self.module.fold_factor()
        if factor is not None:
            values = (values / channel_view(torch.where(factor == 0, 1.0, factor), values.ndim, 0)).nan_to_num()
        return self.channels_first(values)

    def channels_first(self, values: Tensor) -> Tensor:
        laid_out: Tensor = self.module.row.channels_first(self.module.layer, values)
        return laid_out

    def replace_quantizer(self, new: Quantizer) -> None:
        self.module.weight_quantizer = new


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """The parameter of this name, or what hooks or a parametrization have made of it."""
    owner, _, last = name.rpartition(".")
    value: Tensor = getattr(layer.get_submodule(owner), last)
    return value


def quantizer_key(name: str) -> str:
    """The key of a weight's quantizer in `QWeights.weight_quantizers`, which takes no dots."""
    return name.replace(".", "_")
