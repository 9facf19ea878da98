"""The contract of quantizers, and the registry of schemes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchquant._arguments import check_constructor
from torchquant._registry import Registry
from torchquant._renamed import renamed_attribute, warn_renamed
from torchquant.errors import ConfigError, NoAffineViewError, NoCodesError
from torchquant.quantizers._state import CalibratedState
from torchquant.quantizers_functional._formula import Formula
from torchquant.quantizers_functional._gradient import Clamp, cast_back, compute_dtype
from torchquant.quantizers_functional.formats import AffineParams, Format, IntegerTerms

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer scheme")
SLOTS = ("weight", "input", "output")
T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """The catalogue's facts about a scheme: rule, source, widths; granularity if not the usual three."""

    formula: str = ""
    paper: str = ""
    bits: str = ""
    granularity: tuple[str, ...] = ()


class Quantizer(CalibratedState, ABC):
    """Maps real tensors to real tensors on a grid.

    Write `quantize` and you have a quantizer; write `encode`, `decode` and `code_range` too and it
    can be exported, packed and analysed. Levels, thresholds and integers are views of `format()`.
    The state of the QModule decides which method is called:

    * `pre_observe(x)`: the real tensor, in states that observe.
    * `quantize(x)`: real to real on the grid, differentiable, in states that quantize.
    * `post_observe(x)`: the quantized tensor, in states that quantize.

    A pinned quantizer keeps its numbers: neither of the observing methods does anything then.
    `torchquant.check_quantizer` checks the laws that every quantizer must keep.
    """

    n_bits: int
    axis: int | None = None
    signed: bool | None = True
    """Whether there are levels below 0; None: the first tensor decides."""
    sites: ClassVar[tuple[str, ...]] = SLOTS
    """The slots of a layer for which the scheme is meant."""
    made_by: ClassVar[str] = "make_quantizer('affine:8') makes one"
    """Advice in messages when another object is given in place of a quantizer."""
    is_uniform: ClassVar[bool] = False
    """Whether the format has one step and a zero point, an affine view; the ONNX operators for codes need one."""
    is_idempotent: bool = True
    """Whether the levels are in the units of x, so that quantizing twice must equal quantizing once."""
    about: ClassVar[About] = About()
    typical: ClassVar[str] = "{name}:{n}/channel"
    """Typical spec string of the scheme for weights at `{n}` bits; `{k}` is n - 3, at least 0."""
    typical_acts: ClassVar[str] = "affine:{n}"
    """Spec string of the activations that the scheme's authors use with its weights, at `{n}` bits."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further names of the scheme, each with the constructor arguments that it fixes."""
    short_names: ClassVar[Mapping[str, str]] = {}
    """Short name -> argument of the constructor, for spec strings: "k" -> "significant_bits"."""
    fuses_clamp: ClassVar[bool] = False
    """Whether `pre_observe` and `quantize` take `clamp=(low, high)` and do `x.clamp(low, high)` in
    the same pass. False in a subclass that overrides either without setting it again."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_constructor(cls)
        if "keeps_units" in cls.__dict__:  # the name of `is_idempotent` in schemes written for 0.1
            warn_renamed(f"{cls.__name__}.keeps_units", "is_idempotent")
            cls.is_idempotent = cls.__dict__["keeps_units"]
            del cls.keeps_units
        if "affine_params" in cls.__dict__:
            cls.is_uniform = True
        overrides = "quantize" in cls.__dict__ or "pre_observe" in cls.__dict__
        if overrides and "fuses_clamp" not in cls.__dict__:
            cls.fuses_clamp = False

    keeps_units = renamed_attribute("keeps_units", "is_idempotent")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"is_idempotent" if key == "keeps_units" else key: kept for key, kept in state.items()})

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Map real values to real values on the grid; same shape, dtype and memory format as x."""

    def observe_and_quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor | None:
        """Do what `pre_observe` and `quantize` do, one after the other, in one call of a kernel.

        Returns None, and changes nothing, where there is no such kernel for x, or where another class or a hook has
        something to do between the two. `clamp` as in `quantize`, for a quantizer that `fuses_clamp`.
        """
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call `quantize`."""
        return self.quantize(*args, **kwargs)

    def side_bytes(self, x: Tensor) -> int:
        """Return the bytes that decoding x needs beside its codes: scales, zero points, tables; 0 if unknown."""
        return 0

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the flattened parts of x whose elements share parameters."""
        return [x.flatten()] if self.axis is None else [s.flatten() for s in x.unbind(self.axis)]

    @property
    def levels_vary(self) -> bool:
        """Whether each block or token has its own levels, so that there is no list of levels per tensor or channel."""
        return self.about.granularity in (("block",), ("token",))

    @property
    def columns_differ(self) -> bool:
        """Whether the levels of an element of a weight depend on its column, not on its row alone."""
        return self.levels_vary or self.axis not in (None, 0)

    def encode(self, x: Tensor) -> Tensor:
        """Map real values to integer codes (int32), exactly the codes of `quantize(x)`."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map codes to real values of type `dtype`; `decode(encode(x), x.dtype)` equals `quantize(x)`."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the smallest and largest code."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    def format(self) -> Format:
        """Return the format with its current numbers, which are the tensors of the quantizer itself, not copies.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(4, 1)
        >>> quantizer.force(0.5)
        >>> quantizer.format().project(torch.tensor([0.3, -9.0]))[0]
        tensor([ 0.2500, -3.0000])
        """
        return Formula(self.encode, self.decode, self.code_range, affine=self._own_affine(), axis=self.axis)

    def _own_affine(self) -> Callable[[], AffineParams] | None:
        """Return the affine view that a scheme defines itself; None if it is the format's."""
        return self.affine_params if type(self).affine_params is not Quantizer.affine_params else None

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Return the representable values, sorted: (L,), or (C, L) per channel."""
        return self.format().levels()

    @torch.no_grad()
    def code_values(self) -> Tensor:
        """Return the value of every code, in the order of the codes: (L,), or (C, L) per channel."""
        return self.format().code_values()

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Return the thresholds between adjacent `levels()`: (L - 1,) float32, sorted; (C, L - 1) per channel.

        A value on a threshold takes one of its two levels, which one depends on the scheme. Here thresholds are the
        midpoints, as in all schemes that take the nearest level; the others override this. Raises NoCodesError for
        formats without a single list of levels, or with levels in units other than those of x.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(3, 0)
        >>> quantizer.force(0.5)
        >>> quantizer.thresholds()
        tensor([-1.5000, -0.7500, -0.2500,  0.2500,  0.7500,  1.5000])
        """
        self._check_units("thresholds between its levels")
        if self.levels_vary:
            why = f"each {self.about.granularity[0]} has levels of its own"
            raise NoCodesError(f"{type(self).__name__} has no thresholds between its levels: {why}")
        return self.format().thresholds()

    def _check_units(self, what: str) -> None:
        if not self.is_idempotent:
            raise NoCodesError(f"{type(self).__name__} has no {what}: its levels are not in the units of x")

    @torch.no_grad()
    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels next to x, below and above, in its type; equal where x is on a level or beyond the last.

        One of the two is `quantize(x)`. Raises NoCodesError for levels in units other than those of x.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(3, 0)
        >>> quantizer.force(0.5)
        >>> quantizer.neighbours(torch.tensor([0.6, -9.0]))
        (tensor([ 0.5000, -2.0000]), tensor([ 1., -2.]))
        """
        self._check_units("neighbours")
        below, above = self.format().neighbours(x.detach().to(compute_dtype(x)))
        return cast_back(below, x.dtype), cast_back(above, x.dtype)

    @torch.no_grad()
    def nearest(self, x: Tensor, columns: Tensor) -> Tensor:
        """Quantize x, (rows, k), as the elements of these columns, (k,) int64, of a weight (rows, columns).

        Columns are counted in the weight with all axes but the first flattened. Raises NoCodesError if the levels of
        an element depend on its neighbours or on the shape of the weight, and no weight is pinned.
        """
        if not self.is_pinned and self.columns_differ:
            part = self.about.granularity[0] if self.levels_vary else None
            why = (
                f"each {part} takes its scale from all of its elements"
                if part
                else f"its channels lie on axis {self.axis}"
            )
            raise NoCodesError(f"{type(self).__name__} cannot quantize columns alone: {why}. Call pin(weight) first")
        if self.columns_differ:
            return self._nearest_in_place(x, columns)
        return self.quantize(x)

    def column_rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that computes `nearest` with the current numbers: the same in less time, for many calls.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(3, 0)
        >>> quantizer.force(0.5)
        >>> quantizer.column_rounder()(torch.tensor([[0.6], [-9.0]]), torch.tensor([0]))
        tensor([[ 0.5000],
                [-2.0000]])
        """
        return self.nearest

    def _nearest_in_place(self, x: Tensor, columns: Tensor) -> Tensor:
        """Compute `nearest` for any pinned scheme, with x put in its place in a whole weight."""
        columns_shape = [int(size) for size in self.pinned.tolist()[1:]]
        whole = x.new_zeros(len(x), prod(columns_shape))
        whole[:, columns] = x
        return self.quantize(whole.view(len(x), *columns_shape)).flatten(1)[:, columns]

    @torch.no_grad()
    def preimage(self, values: Tensor) -> Tensor:
        """Return a weight that `quantize` maps to these levels: the levels themselves if their units are those of x."""
        return values

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}, if the weight determines the numbers of all its elements."""
        if self.levels_vary:
            raise ConfigError(
                f"{type(self).__name__} cannot be pinned: each {self.about.granularity[0]} takes its numbers from its "
                "own elements every time. Take a scheme whose numbers follow from the weight"
            )
        return {}

    def affine_params(self) -> AffineParams:
        """Return (delta, zero_point, qmin, qmax) of a uniform format, () or (C,) tensors and integers."""
        return self._view(lambda format: format.affine_params())

    @torch.no_grad()
    def integer_terms(self) -> IntegerTerms:
        """Return the levels as sums of integers times scales: [(scale, table)], so that sums of products stay integer.

        Level of the code c: `sum(scale * table[..., c - code_range[0]])`. scale: () or (C,) float64. table: (L,) or
        (C, L) int64. One term for ESB, powers of two, ternary, binary; n_bits for residual; one more for a shift.
        Raises NoAffineViewError if there is no such form, as for a codebook or blocks.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(3, 0)
        >>> quantizer.force(0.5)
        >>> [(float(scale), table.tolist()) for scale, table in quantizer.integer_terms()]
        [(0.5, [-4, -2, -1, 0, 1, 2, 4])]
        """
        return self._view(lambda format: format.integer_terms())

    def _view(self, view: Callable[[Format], T]) -> T:
        try:
            return view(self.format())
        except NoAffineViewError as error:
            raise NoAffineViewError(f"{type(self).__name__}: {error}") from None


QuantizerFactory = Callable[[nn.Module], Quantizer | None]
"""Makes the quantizer of one site, given the layer there; None leaves the site float."""
