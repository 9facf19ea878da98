"""Formats defined by two functions, as a user's scheme writes them; all other properties are found by trying them.

The formats that come with torchquant define these properties themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchquant._tensors import per_channel_view
from torchquant.errors import NoAffineViewError, NoCodesError
from torchquant.quantizers_functional.formats import (
    NO_TERMS,
    AffineParams,
    Format,
    IntegerTerms,
    UniformGrid,
    common_denominator,
)

Values = tuple[Tensor, Tensor | None]


def _of_channels(parameters: tuple[Tensor | int, ...], index: Tensor) -> tuple[Tensor | int, ...]:
    """Return the numbers of these channels. index: (k,) int64."""
    return tuple(p[index] if isinstance(p, Tensor) and p.ndim else p for p in parameters)


def _shaped(format: Formula | Altered, ndim: int) -> list[Any]:
    """Return the parameters of the format, in shapes that broadcast against `ndim` dimensions."""
    return [per_channel_view(p, ndim, format.axis) for p in format.parameters]


@dataclass(frozen=True, eq=False)
class Formula(Format):
    """A format of `encoder(x, *parameters)` and `decoder(codes, dtype, *parameters)`, with broadcastable parameters.

    `projector(x, want_inside, *parameters)`: the nearest value, if it is not computed through the codes. `affine()`:
    step, zero point and code range, if the grid is uniform.
    """

    encoder: Callable[..., Tensor]
    decoder: Callable[..., Tensor]
    first_and_last: tuple[int, int]
    parameters: tuple[Tensor | int, ...] = ()
    projector: Callable[..., Values] | None = None
    affine: Callable[[], AffineParams] | None = None

    @property
    def code_range(self) -> tuple[int, int]:
        return self.first_and_last

    def codes(self, x: Tensor) -> Tensor:
        return self.encoder(x, *_shaped(self, x.ndim))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.decoder(codes, dtype, *_shaped(self, codes.ndim))

    def nearest(self, x: Tensor, want_inside: bool) -> Values:
        if self.projector is None:
            return super().nearest(x, want_inside)
        return self.projector(x, want_inside, *_shaped(self, x.ndim))

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Format.neighbours` does. Raises NoCodesError if codes do not rise with their values."""
        if not bool((self.code_values().diff(dim=-1) >= 0).all()):
            raise NoCodesError("its codes do not rise with their values, so that no code tells the level next to it")
        return super().neighbours(x)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = (torch.full((), code, device=x.device) for code in self.code_range)
        low, high = (self.decoder(code, x.dtype, *_shaped(self, x.ndim)) for code in codes)
        return torch.minimum(low, high), torch.maximum(low, high)

    def of_channels(self, index: Tensor) -> Format:
        return replace(self, parameters=_of_channels(self.parameters, index))

    def with_numbers(self, numbers: Sequence[Tensor]) -> Format:
        others = iter(numbers)
        return replace(self, parameters=tuple(next(others) if isinstance(p, Tensor) else p for p in self.parameters))

    def numbers(self) -> list[Tensor]:
        return [p for p in self.parameters if isinstance(p, Tensor)]

    def _all_codes(self) -> Tensor:
        low, high = self.code_range
        return torch.arange(low, high + 1)

    def affine_params(self) -> AffineParams:
        return super().affine_params() if self.affine is None else self.affine()

    def _uniform(self) -> UniformGrid | None:
        try:
            return UniformGrid(*self.affine_params())
        except NoAffineViewError:
            return None

    def side_bytes(self) -> int:
        uniform = self._uniform()
        return super().side_bytes() if uniform is None else uniform.side_bytes()

    def decoding_numbers(self) -> list[Tensor]:
        parameters = [p[..., None] if isinstance(p, Tensor) else p for p in self.parameters]

        def matters(i: int, number: Tensor) -> bool:
            changed = [*parameters[:i], number * 2 + 1, *parameters[i + 1 :]]
            codes = self._all_codes().to(number.device)
            return not torch.equal(*(self.decoder(codes, torch.float32, *p) for p in (parameters, changed)))

        return [p for i, p in enumerate(parameters) if isinstance(p, Tensor) and matters(i, p)]

    def integer_terms(self) -> IntegerTerms:
        """Return the terms of levels that are linear in the parameters, or that are rational themselves.

        With one parameter 1 and the others 0 the decoder gives the table of that parameter, up to a common denominator
        that goes into the scale.
        """
        uniform, codes = self._uniform(), self._all_codes()
        if uniform is not None:
            return uniform.integer_terms()
        numbers = [
            p.detach().to(torch.float64).cpu()[..., None] if isinstance(p, Tensor) else p for p in self.parameters
        ]
        tensors = [i for i, n in enumerate(numbers) if isinstance(n, Tensor)]
        zeroed = [torch.zeros(1, dtype=torch.float64) if i in tensors else n for i, n in enumerate(numbers)]

        def table(parameters: list[Any]) -> Tensor:
            return self.decoder(codes, torch.float64, *parameters).expand(len(codes))

        parts: list[tuple[Tensor, Tensor]] = [(torch.ones((), dtype=torch.float64), table(zeroed))]
        for i in tensors:
            unit: list[Any] = [*zeroed[:i], torch.ones(1, dtype=torch.float64), *zeroed[i + 1 :]]
            number: Any = numbers[i]
            parts.append((number[..., 0], table(unit) - parts[0][1]))
        expected = self.decoder(codes, torch.float64, *numbers)
        found = sum((scale[..., None] * ints for scale, ints in parts), torch.zeros_like(expected))
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-12, atol=0.0):
            parts = [(torch.ones((), dtype=torch.float64), expected)]
        terms: IntegerTerms = []
        for scale, values in parts:
            if not bool(values.any()) or not bool(scale.any()):
                continue
            denominator = common_denominator(values)
            if denominator is None:
                raise NoAffineViewError(NO_TERMS)
            terms.append((scale / denominator, torch.round(values * denominator).to(torch.int64)))
        return terms or [(torch.ones((), dtype=torch.float64), torch.zeros(len(codes), dtype=torch.int64))]


@dataclass(frozen=True, eq=False)
class Altered(Format):
    """The format `base` of a scheme, with some functions replaced by those of a subclass of that scheme.

    `encoder`, `decoder`, `projector`: as in `Formula`; None keeps the base's. Without a projector the projection goes
    through the codes, if one of the other two is given.
    """

    base: Format
    parameters: tuple[Tensor | int, ...]
    encoder: Callable[..., Tensor] | None = None
    decoder: Callable[..., Tensor] | None = None
    projector: Callable[..., Values] | None = None

    @property
    def _decoding(self) -> Format:
        """Return the format that decodes: the base, or the formula of the replaced decoder."""
        if self.decoder is None:
            return self.base
        return Formula(self.base.codes, self.decoder, self.code_range, self.parameters, axis=self.axis)

    @property
    def code_range(self) -> tuple[int, int]:
        return self.base.code_range

    def codes(self, x: Tensor) -> Tensor:
        return self.base.codes(x) if self.encoder is None else self.encoder(x, *_shaped(self, x.ndim))

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self._decoding.values(codes, dtype)

    def nearest(self, x: Tensor, want_inside: bool) -> Values:
        if self.projector is not None:
            return self.projector(x, want_inside, *_shaped(self, x.ndim))
        is_own = self.encoder is not None or self.decoder is not None
        return super().nearest(x, want_inside) if is_own else self.base.nearest(x, want_inside)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._decoding.ends(x)

    def step(self, x: Tensor) -> Tensor:
        return self._decoding.step(x)

    def of_channels(self, index: Tensor) -> Format:
        return replace(self, base=self.base.of_channels(index), parameters=_of_channels(self.parameters, index))

    def numbers(self) -> list[Tensor]:
        return self.base.numbers()

    def decoding_numbers(self) -> list[Tensor]:
        return self._decoding.decoding_numbers()

    def side_bytes(self) -> int:
        return self._decoding.side_bytes()

    def code_values(self) -> Tensor:
        return self._decoding.code_values()

    def affine_params(self) -> AffineParams:
        return self._decoding.affine_params()

    def integer_terms(self) -> IntegerTerms:
        return self._decoding.integer_terms()

    def thresholds(self) -> Tensor:
        return super().thresholds() if self.encoder or self.decoder or self.projector else self.base.thresholds()
