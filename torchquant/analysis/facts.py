"""Collect what a quantizer does to the tensors that it gets: clipping, use of the codes, channels, outliers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._units import decibels
from torchquant.analysis.effects import decibel_of, energy, plain_decibel
from torchquant.errors import TorchQuantError
from torchquant.qmodule import QModule
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.quantizers import Quantizer
from torchquant.range_observers._calls import widest

SAMPLE = 16_384
"""Elements of an activation that are looked at for each call, at random positions, always the same ones."""
MOST_CODES = 1 << 12
"""Codes are counted up to this number of levels."""
_PLAIN = ("low", "high", "channels", "calls", "largest_output")


@dataclass(frozen=True)
class SlotFacts:
    """The facts of one quantizer and of the tensors that it gets. Shares are 0..1; None: it does not apply.

    `sqnr_db`: of the tensor itself. `low`, `high`: lowest and highest level of all channels; `data_min`, `data_max`:
    of the data. `below`, `above`: shares beyond the levels by more than half a step; `clip_noise`: the share of the
    error that is theirs. `used`: levels that occur, of `n_codes`; `entropy`: of the codes, bits; `first`, `top`: shares
    of the lowest and of the most used level; `mode`: that level. `kurtosis`: fourth moment over the squared variance, 3
    for a normal distribution. `channel_ratio`: absolute maximum of the largest channel over that of the median one;
    `channel`: its number. `killed`: channels that have one value after quantization and several before; `dead`: that
    have one value before. `call_ratio`: of a module that is called several times, the largest range of a call over the
    smallest. `tied_to`: path and slot of other quantizers of the same weight, with other numbers. `bn_ratio`: largest
    factor of a folded batch norm over the median. `bias_ratio`: the largest bias over the largest output.
    """

    path: str
    slot: str
    scheme: str
    n_bits: int | None
    per_channel: bool
    elements: int
    sqnr_db: float
    data_min: float
    data_max: float
    low: float | None = None
    high: float | None = None
    below: float = 0.0
    above: float = 0.0
    clip_noise: float = 0.0
    used: int | None = None
    n_codes: int | None = None
    entropy: float | None = None
    first: float | None = None
    top: float | None = None
    mode: float | None = None
    kurtosis: float | None = None
    channel_ratio: float | None = None
    channel: int | None = None
    n_channels: int = 1
    killed: int = 0
    dead: int = 0
    call_ratio: float | None = None
    bn_ratio: float | None = None
    bias_ratio: float | None = None
    tied_to: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Path and slot."""
        return f"{self.path} {self.slot}"

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a weight or a bias."""
        return self.slot not in ACTIVATIONS

    @property
    def clipped(self) -> float:
        """The share beyond the levels on either side."""
        return self.below + self.above

    @property
    def span_ratio(self) -> float | None:
        """The span of the levels over that of the data; None without levels for the whole tensor."""
        if self.low is None or self.high is None or self.per_channel or not self.data_max > self.data_min:
            return None
        low, high = min(self.data_min, 0.0), max(self.data_max, 0.0)
        return (self.high - self.low) / (high - low)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON, with the SQNR as `plain_decibel` gives it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return found | {"sqnr_db": plain_decibel(self.sqnr_db)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SlotFacts:
        """Make facts from the result of `to_dict`."""
        tied_to = tuple((path, slot) for path, slot in data["tied_to"])
        return cls(**data | {"sqnr_db": decibel_of(data["sqnr_db"]), "tied_to": tied_to})


class SlotSum:
    """Sums over what one quantizer got and gave, from which the facts follow."""

    def __init__(self, path: str, slot: str, module: QModule, quantizer: Quantizer) -> None:
        self.path, self.slot, self.module, self.quantizer = path, slot, module, quantizer
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[int] = Counter()
        self.low, self.high = math.inf, -math.inf
        self.channels: list[Tensor] = []
        self.calls: list[float] = []
        self.n_calls = 0
        self.largest_output = 0.0
        self._positions: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Begin a batch: the next call of the module is its first."""
        self.n_calls = 0

    @torch.no_grad()
    def add(self, x: Tensor, quantized: Tensor, clamp: tuple[float | None, float | None] | None = None) -> None:
        """Add one call of the quantizer. x: as the quantizer gets it, before `clamp`."""
        if not x.numel():
            return
        x = x.detach() if clamp is None else x.detach().clamp(*clamp)
        self._add_channels(x, quantized)
        is_whole = x.numel() <= SAMPLE or self.is_per_channel or self.slot_is_weight
        real, levels = (x, quantized) if is_whole else (self._sample(x), self._sample(quantized))
        wide = real.to(widest(real.device))
        self.sums["signal"] += energy(real)
        self.sums["noise"] += energy(levels - real)
        for power in (1, 2, 3, 4):
            self.sums[f"x{power}"] += float(wide.pow(power).sum())
        self.sums["sampled"] += real.numel()
        self.sums["elements"] += x.numel()
        self._add_codes(real, levels)

    @property
    def slot_is_weight(self) -> bool:
        """Whether the slot holds a weight or a bias."""
        return self.slot not in ACTIVATIONS

    @property
    def is_per_channel(self) -> bool:
        """Whether the quantizer has numbers for parts of the tensor."""
        return self.quantizer.axis is not None or self.quantizer.levels_vary

    def _sample(self, x: Tensor) -> Tensor:
        found = self._positions.get(x.numel())
        if found is None:
            found = torch.randint(x.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0)).to(x.device)
            self._positions[x.numel()] = found
        return x.flatten()[found]

    def _add_channels(self, x: Tensor, quantized: Tensor) -> None:
        """Join the lowest and highest value of each channel, before and after."""
        axis = channel_axis(self.module, x, self.slot_is_weight)
        others = [i for i in range(x.ndim) if i != axis % max(x.ndim, 1)]
        rows = [part for t in (x, quantized) for part in ((t.amin(others), t.amax(others)) if others else (t, t))]
        rows = [row.flatten().cpu().double() for row in rows]
        if self.channels and len(self.channels[0]) == len(rows[0]):
            joined = [torch.minimum, torch.maximum] * 2
            self.channels = [join(a, b) for join, a, b in zip(joined, self.channels, rows, strict=True)]
        elif not self.channels:
            self.channels = rows
        largest = float(torch.maximum(rows[0].abs(), rows[1].abs()).max())
        if self.n_calls == len(self.calls):
            self.calls.append(0.0)
        self.calls[self.n_calls] = max(self.calls[self.n_calls], largest)
        self.n_calls += 1

    def _add_codes(self, real: Tensor, levels: Tensor) -> None:
        """Count values beyond the levels, and the use of the levels."""
        quantizer = self.quantizer
        if quantizer.levels_vary:
            return
        try:
            format = quantizer.format()
            low, high = format.ends(real)
            first, last = format.code_range
        except (TorchQuantError, NotImplementedError):
            return
        half = (high - low) / max(2 * (last - first), 1)
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        below, above = real < low - half, real > high + half
        self.sums["below"] += float(below.sum())
        self.sums["above"] += float(above.sum())
        self.sums["clip_noise"] += energy((levels - real) * (below | above))
        self.sums["n_codes"] = last - first + 1
        if last - first < MOST_CODES:
            codes = (quantizer.encode(levels).flatten() - first).cpu()
            for code, n in enumerate(torch.bincount(codes, minlength=1).tolist()):
                if n:
                    self.counts[code] += n

    def state(self) -> dict[str, Any]:
        """Return all sums as plain data."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)} | {name: getattr(self, name) for name in _PLAIN}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the result of `state`."""
        self.sums, self.counts = defaultdict(float, state["sums"]), Counter(state["counts"])
        for name in _PLAIN:
            setattr(self, name, state[name])

    def facts(self) -> SlotFacts:
        """Return the facts so far."""
        sums, n = self.sums, max(self.sums["sampled"], 1)
        low, high, got_low, got_high = self.channels or [torch.zeros(1)] * 4
        ranges = torch.maximum(low.abs(), high.abs())
        median = float(ranges.median())
        found: dict[str, Any] = {
            "data_min": float(low.min()),
            "data_max": float(high.max()),
            "n_channels": len(ranges),
            "dead": int((low == high).sum()) if 1 < len(ranges) < sums["elements"] else 0,
            "killed": int(((got_low == got_high) & (low < high)).sum()),
            "kurtosis": _kurtosis(sums, n),
        }
        if len(ranges) > 1 and median > 0:
            found |= {"channel_ratio": float(ranges.max()) / median, "channel": int(ranges.argmax())}
        if sums["n_codes"]:
            found |= {"low": self.low, "high": self.high, "n_codes": int(sums["n_codes"])}
            found |= {"below": sums["below"] / n, "above": sums["above"] / n}
            found["clip_noise"] = sums["clip_noise"] / sums["noise"] if sums["noise"] else 0.0
        if total := sum(self.counts.values()):
            shares = [count / total for count in self.counts.values()]
            top = max(self.counts, key=self.counts.__getitem__)
            found |= {
                "used": len(shares),
                "entropy": -sum(share * math.log2(share) for share in shares),
                "first": self.counts[0] / total,
                "top": max(shares),
                "mode": self._level(int(top)),
            }
        if len(self.calls) > 1 and min(self.calls) > 0 and not self.slot_is_weight:
            found["call_ratio"] = max(self.calls) / min(self.calls)
        found |= _of_layer(self.module, self.slot, self.largest_output) if self.slot_is_weight else {}
        return SlotFacts(
            self.path,
            self.slot,
            type(self.quantizer).__name__,
            getattr(self.quantizer, "n_bits", None),
            self.is_per_channel,
            int(sums["elements"]),
            decibels(sums["signal"], sums["noise"]),
            **found,
        )

    def _level(self, code: int) -> float | None:
        if self.is_per_channel:
            return None
        return float(self.quantizer.code_values().flatten()[code])


def _kurtosis(sums: Mapping[str, float], n: float) -> float | None:
    mean, second, third, fourth = (sums[f"x{power}"] / n for power in (1, 2, 3, 4))
    variance = second - mean**2
    if variance <= 0:
        return None
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2


def channel_axis(module: nn.Module, x: Tensor, is_weight: bool) -> int:
    """Return the axis of the channels: 0 of weights, 1 behind a convolution and of pictures, else the last."""
    if is_weight or x.ndim < 2:
        return 0
    slots = module.weight_slots() if isinstance(module, QModule) else []
    is_conv = any(slot.weight.ndim > 2 and slot.is_stored_as_seen for slot in slots)
    return 1 if is_conv or x.ndim > 3 else -1


def _of_layer(module: QModule, slot_name: str, largest_output: float) -> dict[str, float]:
    """Return the ratios of a folded batch norm and of the bias."""
    found: dict[str, float] = {}
    slot = next((slot for slot in module.weight_slots() if slot.name == slot_name), None)
    if slot is None:
        return found
    factor, bias = slot.fold_factor, slot.bias
    if factor is not None and factor.numel() > 1 and float(factor.abs().median()) > 0:
        found["bn_ratio"] = float(factor.abs().max() / factor.abs().median())
    if bias is not None and largest_output > 0:
        found["bias_ratio"] = float(bias.detach().abs().max()) / largest_output
    return found
