"""Quantizers of AutoQNN whose bit width is a parameter: `freeze_bitwidth=False`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import ConfigError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.formats import AffineParams, Format
from torchquant.search.learning.mixture import MixtureQuantizer

NARROWEST = 2


def learned_form(kind: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> type[Any]:
    """Return the subclass of a quantizer's class that learns its width, if the arguments ask for it; else the class."""
    if issubclass(kind, LearnedWidth) or by_name(kind, args, kwargs).get("freeze_bitwidth", True):
        return kind
    return _learned_class(kind)


def by_name(kind: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name; behind `*args` they have the names of the base's."""
    names: list[str] = []
    for base in (base for base in kind.__mro__ if "__init__" in vars(base)):
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if names:
            break
    return {**dict(zip(names, args, strict=False)), **kwargs}


_LEARNED: dict[type[Any], type[Any]] = {}


def _learned_class(kind: type[Any]) -> type[Any]:
    if kind not in _LEARNED:
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _LEARNED[kind] = type(kind.__name__, (LearnedWidth, kind), names)
    return _LEARNED[kind]


def _again(kind: type[Any]) -> Any:
    """Make an empty object of the learned form of a class, for copies and pickles."""
    return object.__new__(_learned_class(kind))


class LearnedWidth(Quantizer):
    """The part of a quantizer that learns its width: a mixture of quantizers of the same class, one for each width.

    In training the two widths next to `float_bitwidth` are mixed in proportion, so that the gradient reaches the width
    and the input; in evaluation, and in files, the quantizer of the rounded width alone counts.
    """

    learns_width = True
    max_bitwidth: int
    bitwidth: int
    target_bitwidth: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind = type(self).__mro__[2]
        given = by_name(kind, args, kwargs) | {"freeze_bitwidth": True}
        widest = min(self.max_bitwidth, getattr(kind, "widest", None) or self.max_bitwidth)
        widths = range(NARROWEST, widest + 1) if getattr(kind, "fixed_bits", None) is None else ()
        rows: dict[int | None, Quantizer] = {n: kind(**given | {"bitwidth": n}) for n in widths}
        if len(rows) < 2:
            raise ConfigError(
                f"{kind.__name__} has no widths from {NARROWEST} to max_bitwidth={self.max_bitwidth} to learn; keep "
                "freeze_bitwidth=True"
            )
        self.mixture = MixtureQuantizer([rows])
        self.mixture.narrow = False  # compiled code stays valid when the width moves
        self.mixture.start_at(min(self.bitwidth, widest))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _again, (type(self).__mro__[2],), self.__dict__

    @property
    def float_bitwidth(self) -> Tensor:
        """The width that is learned, a parameter."""
        assert self.mixture.float_bitwidth is not None
        return self.mixture.float_bitwidth

    @property
    def shadow_bitwidth(self) -> Tensor:
        """The whole number of bits that evaluation uses."""
        low, high = self.mixture.widths[0], self.mixture.widths[-1]
        return self.float_bitwidth.detach().clamp(low, high).round()

    @property
    def n_bits(self) -> int:  # type: ignore[override]
        """The bits that evaluation uses."""
        return self.mixture.n_bits

    @n_bits.setter
    def n_bits(self, n_bits: int) -> None:
        """Do nothing: constructors of schemes set their width, the learned one counts."""

    @property
    def chosen(self) -> Quantizer:
        """The quantizer of the rounded width."""
        return self.mixture.options[self.mixture.best_option()]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.mixture.refresh()
        return self.mixture(x)  # type: ignore[no-any-return]

    def pre_observe(self, x: Tensor) -> None:
        self.mixture.pre_observe(x)

    @property
    def is_ready(self) -> bool:
        return self.mixture.is_ready

    @property
    def is_memoryless(self) -> bool:
        return self.mixture.is_memoryless

    def allocate(self, n_channels: int) -> None:
        for option in self.mixture.options:
            option.allocate(n_channels)  # type: ignore[operator]

    def numbers(self) -> dict[str, Tensor]:
        """Return the numbers of the chosen quantizer."""
        return self.chosen.numbers()

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        self.chosen.set_numbers(**numbers)

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        return self.mixture._numbers_of(weight)

    def format(self) -> Format:
        return self.chosen.format()

    def affine_params(self) -> AffineParams:
        return self.chosen.affine_params()

    @property
    def code_range(self) -> tuple[int, int]:
        return self.chosen.code_range

    def encode(self, x: Tensor) -> Tensor:
        return self.chosen.encode(x)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.chosen.decode(codes, dtype)

    def side_bytes(self, x: Tensor) -> int:
        """Return the bytes that decoding by the chosen quantizer needs beside the codes."""
        return self.chosen.side_bytes(x)

    def extra_repr(self) -> str:
        return f"float_bitwidth={self.mixture.bitwidth():.2f}, target_bitwidth={self.target_bitwidth}"
