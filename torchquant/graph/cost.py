"""Compute the cost of a model under a plan: bytes, multiply-adds, bit operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchquant._tables import ShownAsTables, text_table
from torchquant.graph.called import tensors_in
from torchquant.graph.macs import Macs, site_macs
from torchquant.graph.recording import watch_values
from torchquant.graph.sites import Captured, Site, SiteInput, SitePlan, naming
from torchquant.qmodule.state import is_real
from torchquant.qmodule.weights import float_weights
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.formats import FLOAT_BYTES

FLOAT_BITS = 32


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site. Bits are those of its weight, of its widest input and of its output; 32 is float.

    For one sample of the example: `macs`: multiply-adds; `activation_bytes`: the output at its width; `bit_ops`:
    multiply-adds times the bits of both operands, where operands inside of a recurrent module or an attention that no
    quantizer sees count as 32 bits. `weight_bytes` counts codes at their true width and the numbers needed to decode
    them; 0 for weights that are stored with another site, `shared_with`.
    """

    path: str
    what: str
    macs: int
    weight_bits: int
    input_bits: int
    output_bits: int
    weight_bytes: int
    activation_bytes: int
    bit_ops: int
    shared_with: str = ""


class PlanCost(ShownAsTables, list[SiteCost]):
    """A list of SiteCost that prints as a table, with the totals. Multiply-adds and activations are of one sample."""

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole model."""
        return sum(site.macs for site in self)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(site.weight_bytes for site in self)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all outputs of sites, as if all were stored."""
        return sum(site.activation_bytes for site in self)

    @property
    def bit_ops(self) -> int:
        """Bit operations of the whole model."""
        return sum(site.bit_ops for site in self)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return rows as plain dictionaries, for JSON or pandas."""
        return [asdict(site) for site in self]

    def __str__(self) -> str:
        header = [name for name in SiteCost.__dataclass_fields__ if name != "shared_with"]
        total = ["total", "", self.macs, "", "", "", self.weight_bytes, self.activation_bytes, self.bit_ops]
        table = text_table(header, [*([getattr(site, name) for name in header] for site in self), total])
        tied = [f"{s.path}: its weight is that of {s.shared_with}, counted there" for s in self if s.shared_with]
        return "\n\n".join([table, *(["\n".join(tied)] if tied else [])])


@dataclass(frozen=True)
class SiteSize:
    """The size of one site for one sample, independent of quantizers: multiply-adds, output elements, and weights.

    `weights`: as their quantizers see them, with the output channel on axis 0; `parameters`: the stored tensors.
    """

    site: Site
    macs: Macs
    output_elements: int
    weights: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]


def samples_in(example_inputs: Any) -> int:
    """Count the samples of an example: axis 0 of its first tensor; for a PackedSequence, its sequences.

    The result is 1 if there is no tensor, or if the first tensor is real and has one dimension.

    >>> samples_in(torch.zeros(8, 3, 32, 32)), samples_in({"tokens": torch.tensor([[1, 2, 3]])}), samples_in(())
    (8, 1, 1)
    """
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    several = isinstance(example_inputs, Mapping | tuple | list) and not isinstance(example_inputs, PackedSequence)
    for value in values if several else [example_inputs]:
        if isinstance(value, PackedSequence):
            return int(value.batch_sizes[0])
        for x in tensors_in(value):
            return max(len(x), 1) if x.ndim > (1 if is_real(x) else 0) else 1
    return 1


@torch.no_grad()
def site_sizes(captured: Captured, example_inputs: Any) -> list[SiteSize]:
    """Compute the size of every site of the captured float model, for one sample of the example (`samples_in`)."""
    values = watch_values(captured, example_inputs)
    samples = samples_in(example_inputs)
    sizes = []
    for site in captured.sites:
        calls = values.get(site.path, [])
        macs = Macs.of_one(samples, (site_macs(site, arguments, output) for arguments, output in calls))
        elements = sum(t.numel() for _, output in calls for t in list(tensors_in(output))[:1])
        weights = float_weights(site.module).values() if site.is_layer and site.module is not None else ()
        behind, seen = (tuple(part) for part in zip(*weights, strict=True)) if weights else ((), ())
        sizes.append(SiteSize(site, macs, -(-elements // samples), seen, behind))
    return sizes


def tied_weights(
    sizes: Iterable[SiteSize], chosen: Mapping[str, SitePlan]
) -> list[tuple[Tensor, list[tuple[str, int]]]]:
    """Find (weight, its places) for every weight that several places share; a place is (site, index of its weight).

    All quantizers at these places see the same weight, so equal specs give equal codes. A folded batch norm makes it a
    different weight.
    """
    groups: dict[Any, tuple[Tensor, list[tuple[str, int]]]] = {}
    for size in sizes:
        plan = chosen.get(size.site.path)
        if plan is not None and plan.fold_bn and size.site.batch_norm is not None:
            continue
        for i, (weight, parameter) in enumerate(zip(size.weights, size.parameters, strict=True)):
            key = (id(parameter), weight.shape, weight.stride())
            groups.setdefault(key, (weight, []))[1].append((size.site.path, i))
    return [group for group in groups.values() if len(group[1]) > 1]


@torch.no_grad()
def plan_cost(captured: Captured, plans: Iterable[SitePlan], example_inputs: Any) -> PlanCost:
    """Compute the cost of every site of the captured float model, for one sample of the example (`samples_in`).

    Biases and norms are not counted; a weight that several sites share under one spec is counted once.
    """
    chosen = {plan.path: plan for plan in plans}
    sizes = site_sizes(captured, example_inputs)
    elsewhere = _stored_elsewhere(sizes, chosen)
    cost = PlanCost()
    for size in sizes:
        site = size.site
        plan = chosen.get(site.path, SitePlan(site.path))
        weight = plan.make("weight", site.module)
        weight_bits = FLOAT_BITS if weight is None else weight.n_bits
        read_bits = [_bits(*where) for where in reads_of(site, plan, chosen)]
        output_bits = _bits(plan, "output", site)
        factors = weight_bits * max(read_bits) if site.is_layer else math.prod([*read_bits, read_bits[0]][:2])
        inner = size.macs.inner * weight_bits * FLOAT_BITS + size.macs.floats * FLOAT_BITS**2
        own = [w for i, w in enumerate(size.weights) if (site.path, i) not in elsewhere]
        others = [elsewhere[site.path, i] for i in range(len(size.weights)) if (site.path, i) in elsewhere]
        cost.append(
            SiteCost(
                path=site.path or "(root)",
                what=site.types[-1],
                macs=size.macs.total,
                weight_bits=weight_bits if site.is_layer else 0,
                input_bits=max(read_bits),
                output_bits=output_bits,
                weight_bytes=sum(_weight_bytes(plan, site, w) for w in own),
                activation_bytes=-(-size.output_elements * output_bits // 8),
                bit_ops=size.macs.read * factors + inner,
                shared_with=", ".join(dict.fromkeys(others)),
            )
        )
    return cost


def _weight_bytes(plan: SitePlan, site: Site, weight: Tensor) -> int:
    return sum(stored_bytes(weight, observed(plan.make("weight", site.module), weight, site.path)))


def _stored_elsewhere(sizes: Iterable[SiteSize], chosen: Mapping[str, SitePlan]) -> dict[tuple[str, int], str]:
    """Find (site, index of its weight) -> the site that the weight is stored with, under the same spec."""
    found = {}
    for _, places in tied_weights(sizes, chosen):
        first: dict[str | None, str] = {}
        for path, i in places:
            spec = chosen.get(path, SitePlan(path)).weight
            if not callable(spec) and first.setdefault(spec, path) != path:
                found[path, i] = first[spec]
    return found


def _bits(plan: SitePlan, name: str, site: Site) -> int:
    if getattr(plan, name) == "share":
        return FLOAT_BITS
    quantizer = plan.make(name, site.module)
    return FLOAT_BITS if quantizer is None else quantizer.n_bits


def reads_of(site: Site, plan: SitePlan, chosen: Mapping[str, SitePlan]) -> list[tuple[SitePlan, str, Site]]:
    """List (plan, slot, site) of the quantizer of each input of the site: a source's output, or the site's input."""
    found = []
    for read in site.reads:
        sources = [chosen[s] for s in read.sources if s in chosen and chosen[s].output is not None]
        found.append((sources[0], "output", site) if sources else (plan, slot_of(read, plan) or "input", site))
    return found or [(plan, "input", site)]


def slot_of(read: SiteInput, plan: SitePlan) -> str | None:
    """Return the slot of a site that quantizes a value which it reads; None if none does."""
    if read.softmax and plan.probabilities is not None:
        return "probabilities"
    return None if plan.input is None else "input"


def observed(quantizer: Quantizer | None, weight: Tensor, path: str) -> Quantizer | None:
    """Let a weight quantizer observe the weight, and return it. Raises ConfigError that names the site, `path`."""
    if quantizer is not None:
        with naming(path, "weight"):
            quantizer.allocate_for(weight)
        quantizer.pre_observe(weight)
    return quantizer


def agree(a: Quantizer | None, b: Quantizer | None) -> bool:
    """Tell whether two quantizers give the same codes for one weight: same class, same width, equal numbers."""
    if a is None or b is None:
        return a is b
    ours, theirs = a.state_dict(), b.state_dict()
    widths = [getattr(quantizer, "n_bits", None) for quantizer in (a, b)]
    alike = type(a) is type(b) and widths[0] == widths[1] and ours.keys() == theirs.keys()
    return alike and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def stored_bytes(weight: Tensor, quantizer: Quantizer | None) -> tuple[int, int]:
    """Count the bytes of a weight: codes at their true width (or float32 elements), and the numbers to decode them."""
    if quantizer is None:
        return FLOAT_BYTES * weight.numel(), 0
    return -(-weight.numel() * quantizer.n_bits // 8), quantizer.side_bytes(weight)
