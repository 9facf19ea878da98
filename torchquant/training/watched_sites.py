"""The quantizers that a monitor watches, and what it keeps of each from one look to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._units import decibels
from torchquant.qmodule import QModule
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.quantizers import Quantizer
from torchquant.training.looks import Tally, gradient_of, look_at, steps_of
from torchquant.training.oscillation import reversals
from torchquant.utils import expect_whole, qmodules, scalar_key

RAW = ("signal", "noise")
"""Sums from which the SQNR is computed."""
PER_SITE = ("scale", "scale_drift", "scale_gradient", "dead_codes")
"""Figures that are not shares of the elements that were looked at."""
OF_EACH = ("sqnr", "below", "above", "dead_codes", "scale", "scale_drift", "scale_gradient")
OF_WEIGHTS = (
    *OF_EACH,
    *("distance", "flips", "flips_by_1", "flips_by_2", "flips_by_more", "oscillation"),
    *("flipped_never", "flipped_once", "flipped_twice", "flipped_more"),
)


class Site(nn.Module):
    """One quantizer of the model, and what is kept of the last look; weights have more to keep."""

    scale: Tensor
    names: tuple[str, ...] = OF_EACH
    """The figures of the site."""

    def __init__(self, module: QModule, slot: str) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a child, whose tensors would be saved here too
        self.slot = slot
        self.group = "activation" if slot in ACTIVATIONS else slot
        self.key = scalar_key(module.path, slot, "")[:-1]
        self.is_started = False
        self.tally = Tally()
        self.register_buffer("scale", torch.zeros(0))

    @property
    def held(self) -> Quantizer | None:
        """The current quantizer, which schedules may replace."""
        found: Quantizer | None = self.__dict__["module"].quantizers().get(self.slot)
        return found

    @property
    def quantizer(self) -> Quantizer | None:
        """The current quantizer; None if it has not seen data yet."""
        held = self.held
        return held if held is not None and held.is_ready else None

    def begin(self, n: int | None) -> None:
        """Keep what later looks are compared with."""
        self._keep_scale()

    def look(self, n: int | None) -> dict[str, Tensor]:
        """Return sums and figures of the look, on the device of the quantizer."""
        quantizer, tally = self.quantizer, self.tally
        if quantizer is None:
            return {}
        found = dict(tally.sums)
        if tally.used is not None:
            found["dead_codes"] = 1.0 - tally.used.mean()
        former, scale = self.scale, self._keep_scale()
        if scale is not None:
            found["scale"], former = scale.mean(), former.to(scale.device)
            if scale.shape == former.shape:
                safe = torch.where(former == 0, torch.ones_like(former), former)
                found["scale_drift"] = torch.where(former == 0, 0.0, (scale - former).abs() / safe).mean()
        gradient = gradient_of(quantizer)
        return found if gradient is None else {**found, "scale_gradient": gradient}

    @property
    def is_quantized_activation(self) -> bool:
        """Whether a forward quantizes here, in the current state."""
        state = self.__dict__["module"].state
        return self.group == "activation" and state.is_act_quantized and self.quantizer is not None

    def figures(self, found: Mapping[str, float], n: int) -> dict[str, float | None]:
        """Return every figure by name, of the sums of n elements; None for one that the scheme does not have."""
        shares = {name: number if name in PER_SITE else number / n for name, number in found.items() if name not in RAW}
        ratio = {"sqnr": decibels(*(found[name] for name in RAW))} if found.keys() >= set(RAW) else {}
        return dict.fromkeys(self.names) | shares | ratio

    def _keep_scale(self) -> Tensor | None:
        quantizer = self.quantizer
        scale = None if quantizer is None else steps_of(quantizer)
        if scale is not None:
            self.scale = scale.clone()
        return scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}scale")
        if isinstance(saved, Tensor) and saved.shape != self.scale.shape:
            self.scale = self.scale.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightSite(Site):
    """A weight: its codes at the last look, the direction of their last change, and how often each has changed."""

    codes: Tensor
    direction: Tensor
    n_flips: Tensor
    names = OF_WEIGHTS

    def __init__(self, slot: WeightSlot, n: int | None) -> None:
        super().__init__(slot.module, slot.name)
        self.group = "weight"
        self.weight = slot
        weight = slot.weight
        shape = (min(weight.numel(), n or weight.numel()),)
        for name, dtype in (("codes", torch.int32), ("direction", torch.int8), ("n_flips", torch.int32)):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=weight.device))

    def begin(self, n: int | None) -> None:
        super().begin(n)
        if (quantizer := self.quantizer) is not None:
            seen = self.weight.seen()
            with same_random_numbers(seen.device):
                self._keep_codes(look_at(quantizer, seen, n).codes)

    def _keep_codes(self, codes: Tensor | None) -> None:
        self.is_started = codes is not None
        if codes is not None:
            self.codes = codes

    def look(self, n: int | None) -> dict[str, Tensor]:
        quantizer = self.quantizer
        if quantizer is None:
            return {}
        seen = self.weight.seen()
        with same_random_numbers(seen.device):
            self.tally = look_at(quantizer, seen, n, is_latent=True)
        found, codes = super().look(n), self.tally.codes
        if codes is not None and self.is_started:
            found |= self._changes(codes)
        self._keep_codes(codes)
        return found

    def _changes(self, codes: Tensor) -> dict[str, Tensor]:
        """Count the codes that changed since the last look, by size, and the elements by how often theirs changed."""
        former, direction, n_flips = (t.to(codes.device) for t in (self.codes, self.direction, self.n_flips))
        size = (codes - former).abs()
        turned, self.direction = reversals(codes, former, direction)
        self.n_flips = n_flips + size.ne(0)
        sizes = {"flips": size.gt(0), "flips_by_1": size.eq(1), "flips_by_2": size.eq(2), "flips_by_more": size.gt(2)}
        often = {
            **{"flipped_never": self.n_flips.eq(0), "flipped_once": self.n_flips.eq(1)},
            **{"flipped_twice": self.n_flips.eq(2), "flipped_more": self.n_flips.gt(2)},
        }
        return {name: where.sum() for name, where in {**sizes, "oscillation": turned, **often}.items()}


class Hook:
    """The forward hook on a quantizer of activations; copies and pickles of the model have one that does nothing."""

    def __init__(self, site: Site, n: int | None) -> None:
        self.site, self.n = site, n

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        assert isinstance(quantizer, Quantizer)
        with same_random_numbers(args[0].device):
            self.site.tally.add(look_at(quantizer, args[0], self.n, **kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """Do nothing, as the hook of a copied model."""


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were: a quantizer may draw its levels, and the training must not notice."""
    devices = [device.index] if device.type == "cuda" and torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


_WHOLE = "and a monitor looks at whole weights; train with DistributedDataParallel, or without a monitor"


def sites_of(model: nn.Module, n: int | None) -> list[Site]:
    """Return every quantizer of the model, in its order; one that stands in several places only once.

    Raises ConfigError for a model whose parameters are sharded over ranks.
    """
    found: dict[int, Site] = {}
    for path, module in qmodules(model):
        expect_whole(module, path, _WHOLE)
        weights = {slot.name: slot for slot in module.weight_slots()}
        for name, quantizer in module.quantizers().items():
            if id(quantizer) not in found:
                found[id(quantizer)] = WeightSite(weights[name], n) if name in weights else Site(module, name)
    return list(found.values())
