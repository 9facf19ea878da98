"""Compare the codes of a runtime, or of the simulation, with the integer reference at each site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.lowering.qdq import QuantizeDequantize, QuantizeTokens
from torchquant.deploy.onnx.graph import IS_CODES, code_name
from torchquant.deploy.onnx.operators import EXACT_KERNELS, MOVERS, TABLE_KERNELS
from torchquant.errors import ConfigError, ExportError
from torchquant.qmodule import QModule


@dataclass
class SiteParity:
    """The comparison of the codes of one site.

    `kernel`: the operator that made the codes in the runtime, "" where no comparison was possible. `missing`: number of
    codes that the runtime does not show. `elements`: number of compared codes; `differ`: number of codes that differ
    from the reference for the same inputs; `largest`: the largest difference in steps; `tie_distance`: the largest
    distance of a differing element, before rounding, from the tie between both codes, in steps.
    """

    site: str
    kernel: str = ""
    elements: int = 0
    differ: int = 0
    largest: int = 0
    tie_distance: float = 0.0
    missing: int = 0

    @property
    def in_integers(self) -> bool:
        """Whether an integer kernel made the codes, or they were only moved, so that any difference counts. Otherwise a
        float32 result was rounded.
        """
        return self.kernel in EXACT_KERNELS | MOVERS

    def holds(self, bound: int, tie_bound: float) -> bool:
        """Tell whether the differences of the site are within the bounds of its kind of kernel."""
        if self.in_integers:
            return self.differ <= bound
        if self.kernel in TABLE_KERNELS:
            return self.largest <= 1
        return self.largest <= 1 and self.tie_distance <= tie_bound


@dataclass
class FirstDifference:
    """The element farthest from a tie at the first site that exceeds its bound, and the inputs it was computed from.

    `steps`: the reference's value in steps before rounding. `inputs`: name -> input tensor of the node.
    """

    site: str
    index: tuple[int, ...]
    expected: int
    found: int
    steps: float
    kernel: str
    inputs: dict[str, Tensor] = field(default_factory=dict)


class Follower:
    """Compares site by site, then continues with the codes of the other side, so that differences do not propagate.

    `found`: name of a tensor of codes -> codes. The results are collected in `parity`.
    """

    def __init__(self, kernels: Mapping[str, str], bound: int, tie_bound: float) -> None:
        self.parity: dict[str, SiteParity] = {}
        self.kernels = kernels
        self.bound, self.tie_bound = bound, tie_bound
        self.found: Mapping[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.first: tuple[FirstDifference, str] | None = None
        self.lost: Counter[str] = Counter()

    def start(self, found: Mapping[str, Tensor]) -> None:
        """Begin the next batch."""
        self.found = found
        self.calls.clear()
        self.lost.clear()

    def finish(self, needed: Collection[str]) -> None:
        """Record codes that were not compared: of sites that only the other side reached, and of `needed` sites that
        it does not show (`lost`).
        """
        for site in needed:
            self.parity.setdefault(site, SiteParity(site)).missing += self.lost[site]
        asked = {code_name(site, call) for site, n in self.calls.items() for call in range(n)}
        for name in self.found.keys() - asked:
            site = IS_CODES.sub("", name)
            self.parity.setdefault(site, SiteParity(site)).missing += self.found[name].numel()

    def __call__(self, site: str, codes: Tensor, steps: Tensor) -> Tensor:
        name = code_name(site, self.calls[site])
        self.calls[site] += 1
        found = self.found.get(name)
        if found is None:
            self.lost[site] += codes.numel()
            return codes
        if found.shape != codes.shape:
            raise ExportError(
                f"{site} has codes of shape {tuple(found.shape)} in the file, but {tuple(codes.shape)} in the model. "
                "Certify a file that export_onnx wrote from this model"
            )
        entry = self.parity.setdefault(site, SiteParity(site))
        entry.kernel = self.kernels.get(name, "")
        entry.elements += codes.numel()
        differs = codes != found
        if not bool(differs.any()):
            return codes
        expected, other, before = codes[differs], found[differs], steps.expand_as(codes)[differs]
        apart = (expected - other).abs()
        distance = (before - (torch.minimum(expected, other) + 0.5)).abs()
        entry.differ += int(differs.sum())
        entry.largest = max(entry.largest, int(apart.max()))
        entry.tie_distance = max(entry.tie_distance, float(distance.max()))
        if self.first is None and not entry.holds(self.bound, self.tie_bound):
            at = int(distance.argmax())
            index = tuple(differs.nonzero()[at].tolist())
            details = (int(expected[at]), int(other[at]), float(before[at]))
            self.first = FirstDifference(site, index, *details, entry.kernel), name
        return found


class Probe:
    """Continues with the codes in `found`, or else with the site's own; at the site `changed`, with changed codes.

    `seen`: the codes of the found sites. If they and the outputs are the same with and without the change, nothing
    reads the codes of the site, and the file is right to leave it out.
    """

    def __init__(self, found: Mapping[str, Tensor], changed: str | None) -> None:
        self.found, self.changed = found, changed
        self.calls: Counter[str] = Counter()
        self.seen: list[Tensor] = []

    def __call__(self, site: str, codes: Tensor, steps: Tensor) -> Tensor:
        found = self.found.get(code_name(site, self.calls[site]))
        self.calls[site] += 1
        if found is None:
            lowest = codes.amin() if codes.numel() else codes
            return torch.where(codes > lowest, lowest, codes + 1) if site == self.changed else codes
        self.seen.append(codes)
        return found


@contextmanager
def simulated_codes(model: nn.Module, form: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record site -> codes of the simulation in each call of its quantizer, on the grids of the lowered model."""
    grids = {m.site: m for m in form.modules() if isinstance(m, QuantizeDequantize | QuantizeTokens)}
    codes: dict[str, list[Tensor]] = {}
    handles = []

    def note(site: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            codes.setdefault(site, []).append(grids[site].codes_of(output.detach().cpu()))

        return hook

    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QModule):
            for kind, quantizer in module.quantizers().items():
                site = f"{name or type(module).__name__}.{kind}"
                if site in grids:
                    if quantizer in seen:
                        raise ConfigError(
                            f"{seen[quantizer]} and {site} share one quantizer object, so that their calls cannot be "
                            "distinguished; give each site a quantizer of its own"
                        )
                    seen[quantizer] = site
                    handles.append(quantizer.register_forward_hook(note(site)))
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()
