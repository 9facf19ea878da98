"""Take the codes of a weight from its quantizer, pack and unpack them, and quantize a loaded model with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.deploy.lowering.export_grids import check_ready
from torchquant.errors import ConfigError, ExportError, NoCodesError, NonFiniteError
from torchquant.graph.cost import agree
from torchquant.qmodule import QModule
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._levels import in_layout_of
from torchquant.quantizers_functional.bit_packing import MAX_WIDTH, pack_bits, unpack_bits
from torchquant.quantizers_functional.formats import Format
from torchquant.utils import weight_slots


class CodesQuantizer(Quantizer):
    """The quantizer of a weight that is stored as codes: `quantize` of any tensor returns their decoded values.

    `quantizer` decodes, and provides everything else. Observing changes nothing. The codes do not change with the
    weight, so it is for inference: in train mode it raises ConfigError, unless `trains_beside`.
    """

    codes: Tensor
    trains_beside = False
    """Whether something beside the codes is trained, such as adapters."""

    def __init__(self, quantizer: Quantizer, codes: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("codes", codes)
        self.n_bits, self.axis, self.signed = quantizer.n_bits, quantizer.axis, quantizer.signed

    def quantize(self, x: Tensor) -> Tensor:
        if self.training and not self.trains_beside:
            raise ConfigError(
                "a packed model is for inference: its codes are fixed. Call model.eval(), or train the model it was "
                "saved from"
            )
        return in_layout_of(self.decode(self._codes_of(x), x.dtype), x)

    def encode(self, x: Tensor) -> Tensor:
        return self._codes_of(x).clone()

    def _codes_of(self, x: Tensor) -> Tensor:
        if x.shape != self.codes.shape:
            raise ConfigError(f"the codes have shape {tuple(self.codes.shape)}, but the weight has {tuple(x.shape)}")
        return self.codes

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.quantizer.decode(codes, dtype)

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        raise ConfigError("a packed weight is not pinned: its codes are fixed. Pin the model that it was saved from")

    @property
    def is_ready(self) -> bool:
        return self.quantizer.is_ready

    @property
    def is_memoryless(self) -> bool:
        return True

    @property
    def code_range(self) -> tuple[int, int]:
        return self.quantizer.code_range

    def format(self) -> Format:
        return self.quantizer.format()

    def side_bytes(self, x: Tensor) -> int:
        return self.quantizer.side_bytes(x)

    def parts(self, x: Tensor) -> list[Tensor]:
        return self.quantizer.parts(x)


def quantized_slots(model: nn.Module) -> dict[str, WeightSlot]:
    """Return every quantized weight of the model by its name in a file; a module in two places counts once."""
    return {slot.key: slot for slot in weight_slots(model) if slot.quantizer is not None}


def codes_of(slot: WeightSlot) -> Tensor:
    """Return the codes of a weight in QUANT_EVAL, int32. Raises ExportError that names the weight."""
    quantizer = slot.quantizer
    name = f"{slot.key}: the quantizer ({type(quantizer).__name__})"
    assert quantizer is not None
    check_ready(quantizer, name)
    weight = slot.seen().detach()
    try:
        codes = quantizer.encode(weight)
        values = quantizer.decode(codes, weight.dtype)
    except NoCodesError as error:
        raise ExportError(f"{name} cannot be packed: {error}; or give this site None to keep it float") from error
    except NonFiniteError as error:
        raise ExportError(f"{name} cannot be packed: {error}") from error
    if not torch.equal(values, quantizer.quantize(weight)):
        raise ExportError(
            f"{name} cannot be packed: decode(encode(weight)) differs from quantize(weight). "
            "torchquant.check_quantizer shows where"
        )
    return codes


def tied_slots(codes: Mapping[str, tuple[WeightSlot, Tensor]]) -> dict[str, str]:
    """Find key of a weight -> key of an earlier one that is the same tensor, with the same codes and numbers.

    codes: by the keys of the weights, in their order.
    """
    found: dict[str, str] = {}
    weights = {key: slot.weight for key, (slot, _) in codes.items()}  # held, so that no two have one id
    first: dict[int, list[str]] = {}
    for key, (slot, own) in codes.items():
        others = first.setdefault(id(weights[key]), [])
        for other in others:
            if agree(codes[other][0].quantizer, slot.quantizer) and torch.equal(codes[other][1], own):
                found[key] = other
                break
        else:
            others.append(key)
    return found


def pack_codes(codes: Tensor, quantizer: Quantizer) -> tuple[list[int], Tensor, Tensor | None]:
    """Return `[low, width, shared width]`, the codes minus `low` as bits, and the bits that a part shares, if any.

    Codes that carry the scale of their block are wider than `n_bits`; the upper bits are then stored once per block
    (`quantizer.parts`). Raises ConfigError for codes outside `code_range`.
    """
    low, width = _low_and_width(quantizer)
    numbers = codes.flatten().to(torch.int64) - low
    n_bits = quantizer.n_bits
    if width > n_bits:
        part = _part_of_each(quantizer, codes.shape)
        above = numbers >> n_bits
        shared = torch.zeros(int(part.max()) + 1 if part.numel() else 0, dtype=torch.int64).index_copy(0, part, above)
        if torch.equal(shared[part], above):
            elements = pack_bits(numbers & (2**n_bits - 1), n_bits)
            return [low, n_bits, width - n_bits], elements, pack_bits(shared, width - n_bits)
    return [low, width, 0], pack_bits(numbers, width), None


def unpack_codes(form: list[int], shape: list[int], elements: Tensor, shared: Tensor, quantizer: Quantizer) -> Tensor:
    """Unpack int32 codes of that shape from the result of `pack_codes`. Raises ConfigError for another quantizer."""
    low, width, shared_width = form
    own = _low_and_width(quantizer)
    if own != (low, width + shared_width):
        raise ConfigError(
            f"its codes have {width + shared_width} bits from {low} on; codes of the {type(quantizer).__name__} here "
            f"have {own[1]} from {own[0]} on. Build the model with the quantizers it was saved with"
        )
    numbers = unpack_bits(elements, width, math.prod(shape))
    if shared_width:
        part = _part_of_each(quantizer, torch.Size(shape))
        n_parts = int(part.max()) + 1 if part.numel() else 0
        numbers |= unpack_bits(shared, shared_width, n_parts)[part] << width
    return (numbers + low).to(torch.int32).view(shape)


def _low_and_width(quantizer: Quantizer) -> tuple[int, int]:
    low, high = quantizer.code_range
    width = max(1, (high - low).bit_length())
    if width > MAX_WIDTH:
        raise ConfigError(f"codes {low}..{high} need {width} bits, but at most {MAX_WIDTH} can be packed")
    return low, width


def _part_of_each(quantizer: Quantizer, shape: torch.Size) -> Tensor:
    """Return for each element of a tensor of that shape the index of its part among `quantizer.parts`; int64."""
    places = torch.arange(1, shape.numel() + 1).view(shape)  # 0 pads the last block
    parts = quantizer.parts(places)
    sizes = torch.tensor([part.numel() for part in parts], dtype=torch.int64)
    found = torch.cat(parts)
    index = torch.arange(len(parts)).repeat_interleave(sizes)
    return torch.zeros(shape.numel(), dtype=torch.int64).index_copy(0, found[found > 0] - 1, index[found > 0])


def coded_tensors(model: nn.Module, state: Mapping[str, Any]) -> set[int]:
    """Return the `id` of every tensor of `model.state_dict(keep_vars=True)` that codes represent.

    A weight that a float module reads too, and one that is computed from other parameters, are not among them.
    """
    places = [
        (f"{path}." if path else "", {id(slot.weight) for slot in module.weight_slots() if slot.quantizer is not None})
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QModule)
    ]

    def is_coded(key: str, value: Any) -> bool:
        return any(key.startswith(prefix) and id(value) in weights for prefix, weights in places)

    read_as_float = {id(value) for key, value in state.items() if not is_coded(key, value)}
    return {id(value) for value in state.values()} - read_as_float
