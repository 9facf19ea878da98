"""Packs how a model has changed as codes of few bits, for federated learning and wherever bytes cost more than time."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchquant._arguments import checked
from torchquant._shown import some
from torchquant.deploy.packed.weight_codes import pack_codes, unpack_codes
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.quantizers_functional.bit_packing import packed_bytes

SEAL = 8
"""Bytes at the start of a packet: a digest of the spec and of the names, shapes and types of the tensors."""
FORM = struct.Struct("<iBBI")
"""Lowest code, bits of a code, bits that a block shares, and the number of bytes of these."""
SAME, CODES, HALF, WHOLE = range(4)
"""Forms of a tensor in a packet: nothing, the codes of its change, its change in float16, the tensor itself."""
AGAIN = "send it again"


@dataclass(frozen=True)
class Packet:
    """An encoded update. `received`: what `decode` makes of `data`; `left_over`: what that lacks, by name."""

    data: bytes
    received: dict[str, Tensor]
    left_over: dict[str, Tensor]


@checked
class UpdateCodec:
    """Encodes by how much tensors differ from a reference that both sides have.

    The change of a tensor with two axes or more is quantized by `spec`, as a weight would be; one with fewer, such as a
    bias or a statistic of a batch norm, is sent in float16; a tensor that float16 cannot hold, or that is not of
    floating-point numbers, as it is; an unchanged one not at all. Both sides need the same spec and the same reference.

    Raises ConfigError for tensors that differ from the reference in names or shapes, and for a packet of another spec
    or model, or a damaged one; NonFiniteError for a change to be quantized that is not finite.

    >>> codec = UpdateCodec("affine:4,symmetric=narrow")
    >>> before = {"weight": torch.zeros(64, 64)}
    >>> packet = codec.encode({"weight": torch.randn(64, 64)}, before)
    >>> len(packet.data), 64 * 64 * 4
    (2075, 16384)
    >>> torch.equal(codec.decode(packet.data, before)["weight"], packet.received["weight"])
    True
    """

    def __init__(self, spec: str = "affine:8,symmetric=narrow/channel") -> None:
        self.spec = spec
        if not self._observed(torch.eye(2)).is_idempotent:
            raise ConfigError(
                f"{spec!r} has levels in other units than those of its input; a change needs the same units"
            )

    @torch.no_grad()
    def encode(
        self, tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor], left_over: Mapping[str, Tensor] = {}
    ) -> Packet:
        """Encode tensors such as a `state_dict`. `left_over`: that of the packet before, which is added to them.

        This is error feedback: what one packet lacks comes with the next, so that errors of rounding do not add up.
        """
        _expect_alike(tensors, reference)
        _expect_alike({**reference, **left_over}, reference, "the left-over tensors")
        wanted = {name: _wide(tensors[name].to(old)) for name, old in reference.items()}
        wanted |= {name: wanted[name] + rest for name, rest in left_over.items()}
        parts = [self._seal(reference)]
        for name, old in reference.items():
            try:
                form, data = self._packed(wanted[name], old)
            except NonFiniteError as error:
                raise NonFiniteError(f"the change of {name} cannot be sent: {error}") from error
            parts += [bytes([form]), data]
        packed = b"".join(parts)
        received = self.decode(packed, reference)
        rest = {name: wanted[name] - _wide(x) for name, x in received.items() if x.is_floating_point()}
        return Packet(packed, received, {name: x for name, x in rest.items() if x.isfinite().all() and x.any()})

    @torch.no_grad()
    def decode(self, data: bytes, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a packet, with the types and on the devices of the reference."""
        if data[:SEAL] != self._seal(reference):
            raise ConfigError(
                f"the packet is not one of {len(reference)} such tensors by {self.spec!r}; both sides need the same "
                "spec and the same model"
            )
        packet = _Reader(data, SEAL)
        found = {name: self._unpacked(packet, old) for name, old in reference.items()}
        if packet.position < len(data):
            raise ConfigError(f"the packet has {len(data) - packet.position} bytes too many; {AGAIN}")
        return found

    def _seal(self, reference: Mapping[str, Tensor]) -> bytes:
        known = [(name, list(x.shape), str(x.dtype)) for name, x in reference.items()]
        return hashlib.blake2b(repr((self.spec, known)).encode(), digest_size=SEAL).digest()

    def _packed(self, wanted: Tensor, old: Tensor) -> tuple[int, bytes]:
        change = wanted - _wide(old) if old.is_floating_point() else None
        if torch.equal(wanted, _wide(old)) or old.numel() == 0:
            return SAME, b""
        if change is not None and old.ndim > 1:
            quantizer = self._observed(change)
            (low, width, shared_width), elements, shared = pack_codes(quantizer.encode(change.cpu()), quantizer)
            shared = elements[:0] if shared is None else shared
            head = FORM.pack(low, width, shared_width, shared.numel())
            return CODES, b"".join([head, *map(_bytes, (*quantizer.numbers().values(), elements, shared))])
        if change is not None and (half := change.to(torch.float16)).isfinite().all():
            return HALF, _bytes(half)
        return WHOLE, _bytes(wanted.to(old.dtype))

    def _unpacked(self, packet: _Reader, old: Tensor) -> Tensor:
        (form,) = packet.take(1)
        if form == SAME:
            return old.clone()
        if form == WHOLE:
            return packet.tensor(old.shape, old.dtype).to(old.device)
        if form == HALF:
            change = packet.tensor(old.shape, torch.float16)
        elif form != CODES:
            raise ConfigError(f"the packet is damaged: a tensor has form {form}; {AGAIN}")
        else:
            low, width, shared_width, n_shared = FORM.unpack(packet.take(FORM.size))
            quantizer = self._observed(torch.zeros(old.shape))
            quantizer.set_numbers(**{k: packet.tensor(x.shape, x.dtype) for k, x in quantizer.numbers().items()})
            elements = packet.tensor((packed_bytes(width, old.numel()),), torch.uint8)
            shared = packet.tensor((n_shared,), torch.uint8)
            codes = unpack_codes([low, width, shared_width], list(old.shape), elements, shared, quantizer)
            change = quantizer.decode(codes, _wide(old).dtype)
        return (_wide(old) + change.to(_wide(old))).to(old.dtype)

    def _observed(self, change: Tensor) -> Quantizer:
        quantizer = make_quantizer(self.spec)
        quantizer.pre_observe(change.cpu())
        return quantizer


class _Reader:
    """Takes the parts of a packet one after the other."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    def take(self, n_bytes: int) -> bytes:
        part = self.data[self.position : self.position + n_bytes]
        self.position += n_bytes
        if len(part) < n_bytes:
            raise ConfigError(f"the packet ends after {len(self.data)} bytes, before its last tensor; {AGAIN}")
        return part

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        n_bytes = prod(shape) * dtype.itemsize
        part = torch.frombuffer(bytearray(self.take(n_bytes)), dtype=torch.uint8) if n_bytes else torch.zeros(0)
        return part.view(dtype).reshape(shape) if n_bytes else part.to(dtype).reshape(shape)


def _wide(x: Tensor) -> Tensor:
    """Return x in the type in which changes are computed: float32, or float64 if x is; x itself if not a float."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _expect_alike(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor], what: str = "the tensors") -> None:
    """Raise ConfigError unless both have the same names and shapes."""
    missing = [name for name in reference if name not in tensors] + [name for name in tensors if name not in reference]
    if missing:
        raise ConfigError(f"{what} and the reference must have the same names; only one has {some(missing)}")
    if other := [name for name, x in reference.items() if x.shape != tensors[name].shape]:
        there, here = (tuple(x[other[0]].shape) for x in (reference, tensors))
        raise ConfigError(f"{what}: {other[0]} has shape {here}, in the reference {there}")
