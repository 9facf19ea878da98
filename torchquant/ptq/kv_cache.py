"""Keys and values of earlier tokens as codes, in the place of the cache of a model of transformers."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from torchquant._arguments import checked
from torchquant.errors import ConfigError, TorchQuantError, require
from torchquant.ptq.functional.kv_cache import quantized_tokens
from torchquant.ptq.functional.orthogonal import hadamard_transform
from torchquant.quantizers import Quantizer, make_quantizer
from torchquant.quantizers_functional.formats import UniformGrid


class QuantizedTokens:
    """The keys or the values of one layer: codes of the earlier tokens, and the last ones as they are.

    `bits`: a number of bits, for grids from the smallest to the largest of `group` neighbours along `axis`, -2 the
    tokens, -1 the channels; or the spec of a quantizer that needs no calibration, "affine:8,symmetric=narrow/token".
    `rotate`: whether codes are those of channels rotated by a Hadamard matrix, of the largest power of two that divides
    their number; what is read is rotated back. The last `residual` tokens stay float, and those that do not fill a
    group of tokens yet. Adding tokens one by one gives the same bits as adding them all at once.

    >>> keys = QuantizedTokens(8, axis=-1, group=2, residual=1)
    >>> keys.add(torch.tensor([[[[0.0, 1.0], [2.0, 3.3]]]]))
    tensor([[[[0.0000, 1.0000],
              [2.0000, 3.3000]]]])
    >>> keys.n_tokens, keys.codes[0].dtype
    (2, torch.uint8)
    """

    def __init__(self, bits: int | str, axis: int, group: int, residual: int, rotate: bool = False) -> None:
        if group < 1 or residual < 0:
            raise ConfigError(f"a cache needs group >= 1 and residual >= 0, got {group} and {residual}")
        if isinstance(bits, int) and not 1 <= bits <= 8:
            raise ConfigError(f"a cache takes 1 to 8 bits, or the spec of a quantizer, got {bits}")
        self.quantizer = None if isinstance(bits, int) else _without_calibration(bits)
        self.bits, self.axis, self.group, self.residual, self.rotate = bits, axis, group, residual, rotate
        self.codes: tuple[Tensor, ...] = ()
        self.rest: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """The number of tokens, with those that are not codes yet."""
        return self.n_coded + (0 if self.rest is None else self.rest.shape[-2])

    @property
    def n_coded(self) -> int:
        """The number of tokens that are codes."""
        if not self.codes:
            return 0
        return self.codes[0].shape[2] * (self.group if self._is_over_tokens else 1)

    @property
    def n_bytes(self) -> int:
        """The bytes of what is kept: a byte for each code, and the numbers of the grids."""
        kept = (*self.codes, *([] if self.rest is None else [self.rest]))
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def _is_over_tokens(self) -> bool:
        return self.quantizer is None and self.axis == -2

    @torch.no_grad()
    def add(self, x: Tensor) -> Tensor:
        """Add tokens, (N, heads, tokens, channels), and return all tokens so far as they are known now."""
        self.rest = x if self.rest is None else torch.cat([self.rest, x], -2)
        step = self.group if self._is_over_tokens else 1
        n_new = quantized_tokens(self.n_tokens, step, self.residual) - self.n_coded
        if n_new > 0:
            new = self._encode(self._turned(self.rest[..., :n_new, :]))
            self.codes = tuple(torch.cat(pair, 2) for pair in zip(self.codes, new, strict=True)) if self.codes else new
            self.rest = self.rest[..., n_new:, :].clone()
        return torch.cat([self._turned(self._decode(x.dtype)), self.rest], -2) if self.codes else self.rest.clone()

    def _turned(self, x: Tensor) -> Tensor:
        """Rotate the channels, where that is wanted; the same again rotates them back."""
        n = x.shape[-1]
        return hadamard_transform(x, n & -n) if self.rotate else x

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return codes, and the numbers of their grids, with the batch and the tokens, or their groups, at 0 and 2."""
        if self.quantizer is not None:
            return (self.quantizer.encode(x),)
        if self._is_over_tokens:
            runs = x.unflatten(-2, (-1, self.group)).mT
        else:
            runs = x.unflatten(-1, (-1, gcd(self.group, x.shape[-1])))
        assert isinstance(self.bits, int)
        low, high = runs.amin(-1, keepdim=True), runs.amax(-1, keepdim=True)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale > 0, scale, 1.0)
        return self._grid(scale, low).encode(runs).to(torch.uint8), scale, low

    def _decode(self, dtype: torch.dtype) -> Tensor:
        if self.quantizer is not None:
            return self.quantizer.decode(self.codes[0], dtype)
        codes, scale, low = self.codes
        runs = self._grid(scale, low).decode(codes.to(torch.int32), dtype)
        return runs.mT.flatten(-3, -2) if self._is_over_tokens else runs.flatten(-2)

    def _grid(self, scale: Tensor, low: Tensor) -> UniformGrid:
        assert isinstance(self.bits, int)
        return UniformGrid(scale, 0, 0, 2**self.bits - 1, offset=low)

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, in this order; one may come several times."""
        self.codes = tuple(tensor.index_select(0, sequences.to(tensor.device)) for tensor in self.codes)
        self.rest = None if self.rest is None else self.rest.index_select(0, sequences.to(self.rest.device))


def _without_calibration(spec: str) -> Quantizer:
    """Make a quantizer. Raises ConfigError if it needs calibration, or if tokens or heads share what it measures."""
    quantizer, x = make_quantizer(spec, "output"), torch.arange(1.0, 193.0).view(1, 2, 3, 32)
    whole, alone = x, x[:, 1:, 1:2]
    try:
        whole, alone = (quantizer.decode(quantizer.encode(part)) for part in (whole, alone))
        why = "" if torch.equal(whole[:, 1:, 1:2], alone) else "it quantizes several tokens or heads together"
    except TorchQuantError as error:
        why = str(error)
    if why:
        raise ConfigError(
            "a cache takes a number of bits, or the spec of a quantizer that quantizes each token of each head by "
            f"itself, such as 'affine:8,symmetric=narrow/token'; got {spec!r}: {why}"
        )
    return quantizer


@checked
def quantized_cache(
    keys: int | str = 2, values: int | str = 2, group: int = 32, residual: int = 128, rotate: bool = False
) -> Any:
    """Make a cache for models of transformers that keeps keys and values in few bits.

    It is the argument `past_key_values` of the model and of `generate`, in newer releases `cache`.

    `keys`, `values`: numbers of bits, or specs of quantizers that need no calibration. By bits, keys are quantized per
    channel over `group` tokens, values per token over the largest number of channels that divides both `group` and
    the size of a head, on grids from their smallest to their largest value. By a spec, each token of each head is
    quantized by itself. The last `residual` tokens stay float. Keys come to the cache behind their rotary embedding.
    `rotate`: keys are rotated before they become codes, and back behind, so that no channel of a token has outliers;
    for grids per channel it gains nothing. Source: Liu et al. 2024, KIVI, arXiv:2402.02750; the rotation R3 of Ashkboos
    et al. 2024, arXiv:2404.00456, of keys alone. Raises ConfigError, MissingDependencyError.
    """
    for bits, axis in ((keys, -2), (values, -1)):
        QuantizedTokens(bits, axis, group, residual)
    caches = require("transformers.cache_utils", "dev")
    if not hasattr(caches, "DynamicLayer"):
        raise ConfigError("a quantized cache needs the caches of layers of transformers 4.56 or later")

    class QuantizedLayer(caches.DynamicLayer):  # type: ignore[misc, name-defined]
        is_croppable = False

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.reset()

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.is_initialized = True
            return self.parts[0].add(key_states), self.parts[1].add(value_states)

        def get_seq_length(self, *args: Any) -> int:
            return self.parts[0].n_tokens

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.get_seq_length() + query_length, 0

        def reset(self) -> None:
            self.parts = (
                QuantizedTokens(keys, -2, group, residual, rotate),
                QuantizedTokens(values, -1, group, residual),
            )

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            for part in self.parts:
                part.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            n = 0 if self.parts[0].rest is None else len(self.parts[0].rest)
            self.batch_select_indices(torch.arange(n).repeat_interleave(repeats))

        def crop(self, *args: Any) -> None:
            raise ConfigError("a quantized cache cannot be cropped: the tokens before it are codes of whole groups")

        def offload(self) -> None:
            raise ConfigError("a quantized cache is not moved to another device; use offloading=False")

    return caches.Cache(layer_class_to_replicate=QuantizedLayer)
