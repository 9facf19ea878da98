"""What a model costs under a plan: bytes, multiply-adds, bit operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._tables import text_table
from torchquant.graph.sites import Captured, Site, SitePlan
from torchquant.graph.watch import tensors_in, watch_values
from torchquant.qmodule.patterns import LayerRow, plain_type, row_of
from torchquant.qmodule.weights import weight_names
from torchquant.quantizers import Quantizer
from torchquant.quantizers._base import FLOAT_BYTES

FLOAT_BITS = 32


@dataclass(frozen=True)
class SiteCost:
    """One site. Bits are those of its weight, of what it reads (the widest), of its output; 32 is float.

    `bit_ops`: multiply-adds times the bits of both factors. `weight_bytes` counts codes at their true width
    and the numbers needed to decode them; `activation_bytes` the output at its width.
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


class PlanCost(list[SiteCost]):
    """A list of SiteCost that prints as a table, with the totals."""

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
        """Bytes of all outputs of sites, as if all were kept."""
        return sum(site.activation_bytes for site in self)

    @property
    def bit_ops(self) -> int:
        """Bit operations of the whole model."""
        return sum(site.bit_ops for site in self)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries, for JSON or pandas."""
        return [asdict(site) for site in self]

    def __str__(self) -> str:
        header = list(SiteCost.__dataclass_fields__)
        total = ["total", "", self.macs, "", "", "", self.weight_bytes, self.activation_bytes, self.bit_ops]
        return text_table(header, [*(list(row.values()) for row in self.to_dicts()), total])


@dataclass(frozen=True)
class SiteSize:
    """What one site computes on the example, whatever its quantizers: multiply-adds, elements, and its weights.

    `weights` as their quantizers see them, the output channel on axis 0.
    """

    site: Site
    macs: int
    output_elements: int
    weights: tuple[Tensor, ...]


@torch.no_grad()
def site_sizes(captured: Captured, example_inputs: Any) -> list[SiteSize]:
    """The sizes of every site of the captured float model on the example."""
    values = watch_values(captured, example_inputs)
    sizes = []
    for site in captured.sites:
        calls = values.get(site.path, [])
        macs = sum(_macs(site, inputs, output) for inputs, output in calls)
        elements = sum(t.numel() for _, output in calls for t in list(tensors_in(output))[:1])
        sizes.append(SiteSize(site, macs, elements, tuple(_weights(site.module) if site.is_layer else [])))
    return sizes


@torch.no_grad()
def plan_cost(captured: Captured, plans: Iterable[SitePlan], example_inputs: Any) -> PlanCost:
    """The cost of every site of the captured float model on the example. Biases and norms are not counted."""
    chosen = {plan.path: plan for plan in plans}
    cost = PlanCost()
    for size in site_sizes(captured, example_inputs):
        site = size.site
        plan = chosen.get(site.path, SitePlan(site.path))
        weight = plan.make("weight", site.module)
        weight_bits = FLOAT_BITS if weight is None else weight.n_bits
        read_bits = [_bits(*where) for where in reads_of(site, plan, chosen)]
        output_bits = _bits(plan, "output", site)
        factors = weight_bits * max(read_bits) if site.is_layer else math.prod([*read_bits, read_bits[0]][:2])
        cost.append(
            SiteCost(
                path=site.path or "(root)",
                what=site.types[-1],
                macs=size.macs,
                weight_bits=weight_bits if site.is_layer else 0,
                input_bits=max(read_bits),
                output_bits=output_bits,
                weight_bytes=sum(
                    sum(stored_bytes(w, observed(plan.make("weight", site.module), w))) for w in size.weights
                ),
                activation_bytes=-(-size.output_elements * output_bits // 8),
                bit_ops=size.macs * factors,
            )
        )
    return cost


def _bits(plan: SitePlan, name: str, site: Site) -> int:
    if getattr(plan, name) == "share":
        return FLOAT_BITS
    quantizer = plan.make(name, site.module)
    return FLOAT_BITS if quantizer is None else quantizer.n_bits


def reads_of(site: Site, plan: SitePlan, chosen: Mapping[str, SitePlan]) -> list[tuple[SitePlan, str, Site]]:
    """(plan, field, site) of the quantizer that each value the site reads has passed: a source's output, or its own."""
    found = []
    for read in site.reads:
        sources = [chosen[s] for s in read.sources if s in chosen and chosen[s].output is not None]
        found.append((sources[0], "output", site) if sources else (plan, "input", site))
    return found or [(plan, "input", site)]


def _weights(module: nn.Module | None) -> list[Tensor]:
    """As their quantizers see them, the output channel on axis 0."""
    if module is None:
        return []
    row = row_of(module)
    if isinstance(row, LayerRow):
        return [row.channels_first(module, module.weight)]  # type: ignore[arg-type]
    return [module.get_parameter(name) for name in weight_names(module)]


def observed(quantizer: Quantizer | None, weight: Tensor) -> Quantizer | None:
    """The weight quantizer, which has then seen the weight."""
    if quantizer is not None:
        quantizer.allocate(weight.shape[0])
        quantizer.pre_observe(weight)
    return quantizer


def stored_bytes(weight: Tensor, quantizer: Quantizer | None) -> tuple[int, int]:
    """Bytes of a weight: codes packed at their true width (or float32 elements), and numbers to decode them."""
    if quantizer is None:
        return FLOAT_BYTES * weight.numel(), 0
    return -(-weight.numel() * quantizer.n_bits // 8), quantizer.side_bytes(weight)


def _macs(site: Site, inputs: list[Tensor], output: Any) -> int:
    """Multiply-adds of one call; elementwise operators, pooling and joining count none."""
    results = list(tensors_in(output))
    if not results or not inputs:
        return 0
    out, x, module = results[0], inputs[0], site.module
    if module is not None and site.is_layer:
        return _layer_macs(module, inputs, out)
    if "matmul" in site.types and x.ndim:
        return out.numel() * x.shape[-1]
    if "attention" in site.types and len(inputs) > 2:
        return x.numel() * inputs[1].shape[-2] + out.numel() * inputs[1].shape[-2]
    return 0


def _layer_macs(module: Any, inputs: list[Tensor], out: Tensor) -> int:
    x, kind = inputs[0], plain_type(module)
    row = row_of(module)
    if isinstance(row, LayerRow):
        return (x if row.transposed else out).numel() * module.weight[0].numel()
    if kind is nn.Bilinear:
        return out.numel() * module.weight[0].numel()
    if kind in (nn.Embedding, nn.EmbeddingBag):
        return 0
    if kind is nn.MultiheadAttention:
        key = inputs[1] if len(inputs) > 1 else x
        tokens, keys = x.numel() // x.shape[-1], key.numel() // key.shape[-1]
        length = key.shape[1 if module.batch_first and key.ndim == 3 else 0]
        width = module.embed_dim
        return tokens * width * 2 * width + keys * width * (module.kdim + module.vdim) + 2 * tokens * length * width
    per_step = sum(module.get_parameter(name).numel() for name in weight_names(module))
    return per_step * (x.numel() // x.shape[-1])
