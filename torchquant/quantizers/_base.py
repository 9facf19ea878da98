"""The contract of quantizers, and the two bodies most schemes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchquant._arguments import check_constructor
from torchquant._registry import Registry
from torchquant._renamed import renamed_attribute, warn_renamed
from torchquant._tensors import per_channel_view
from torchquant.errors import ConfigError, NoAffineViewError, NoCodesError, NonFiniteError
from torchquant.quantizers_functional._formula import Altered, Formula
from torchquant.quantizers_functional._gradient import (
    GRADIENTS,
    Clamp,
    Gradient,
    cast_back,
    compute_dtype,
    make_gradient,
)
from torchquant.quantizers_functional.formats import AffineParams, Format, IntegerTerms, UniformGrid
from torchquant.range_observers import RangeObserver
from torchquant.range_observers._statistics import StatisticTracker

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer scheme")
SLOTS = ("weight", "input", "output")
T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What the catalogue says of a scheme: its rule, its source, its widths; granularity if not the usual three."""

    formula: str = ""
    paper: str = ""
    bits: str = ""
    granularity: tuple[str, ...] = ()


class Quantizer(nn.Module, ABC):
    """Turns real tensors into real tensors that lie on a grid.

    Write `quantize` and you have a quantizer; write `encode`, `decode` and `code_range` too and it
    can be exported, packed and analysed. Levels, thresholds and integers are views of `format()`.
    The state of the QModule decides which method is called:

    * `pre_observe(x)`: the real tensor, in states that observe.
    * `quantize(x)`: real to real on the grid, differentiable, in states that quantize.
    * `post_observe(x)`: the quantized tensor, in states that quantize.

    Laws that hold for every quantizer here are in `torchquant.check_quantizer`.
    """

    n_bits: int
    axis: int | None = None
    signed: bool | None = True
    """Whether there are levels below 0; None: the first tensor decides."""
    sites: ClassVar[tuple[str, ...]] = SLOTS
    """Where in a layer the scheme is meant to sit."""
    made_by: ClassVar[str] = "make_quantizer('affine:8') makes one"
    """What messages advise where something else is given for a quantizer."""
    is_uniform: ClassVar[bool] = False
    """Whether the format has one step and a zero point, an affine view; the ONNX operators for codes want one."""
    is_idempotent: bool = True
    """Whether the levels are in the units of x, so that quantizing twice is asked to be the same as once."""
    about: ClassVar[About] = About()
    typical: ClassVar[str] = "{name}:{n}/channel"
    """Spec string that stands for the scheme on weights at `{n}` bits; `{k}` is n - 3, at least 0."""
    typical_acts: ClassVar[str] = "affine:{n}"
    """Spec string of the activations that the scheme's authors put beside its weights, at `{n}` bits."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further names of the scheme, each with the constructor's arguments it stands for."""
    short_names: ClassVar[Mapping[str, str]] = {}
    """Short name -> argument of the constructor, for spec strings: "k" -> "significant_bits"."""
    fuses_clamp: ClassVar[bool] = False
    """Whether `pre_observe` and `quantize` take `clamp=(low, high)` and do `x.clamp(low, high)` in
    the same pass. Falls back to False in a subclass that overrides either without saying so."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_constructor(cls)
        if "keeps_units" in cls.__dict__:  # what a scheme of 0.1 says
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

    def pre_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """See the real tensor before it is quantized."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Real to real on the grid; same shape, dtype and memory format as x."""

    def post_observe(self, x: Tensor) -> None:  # noqa: B027 - an observer is optional
        """See the quantized tensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same as `quantize`."""
        return self.quantize(*args, **kwargs)

    def side_bytes(self, x: Tensor) -> int:
        """Bytes that decoding x needs beside its codes: scales, zero points, tables. 0 where nothing is known of it."""
        return 0

    def parts(self, x: Tensor) -> list[Tensor]:
        """The parts of x whose elements share parameters, flat."""
        return [x.flatten()] if self.axis is None else [s.flatten() for s in x.unbind(self.axis)]

    @property
    def is_ready(self) -> bool:
        """Whether `quantize` can be called: False for a quantizer that still has to see data."""
        return True

    @property
    def is_memoryless(self) -> bool:
        """Whether `pre_observe` of the same tensor twice in a row is the same as once.

        If so, a weight that has not changed is shown once in calibration, not with every batch.
        """
        return False

    @property
    def levels_vary(self) -> bool:
        """Whether a tensor has no one list of levels, nor one a channel: each block or token has levels of its own."""
        return self.about.granularity in (("block",), ("token",))

    def allocate(self, n_channels: int) -> None:  # noqa: B027 - most schemes have nothing to size
        """Size per-channel state for `n_channels` before the first batch."""

    def encode(self, x: Tensor) -> Tensor:
        """Real to integer codes (int32), exactly the codes behind `quantize(x)`."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes to real values of type `dtype`; `decode(encode(x), x.dtype)` equals `quantize(x)`."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        raise NoCodesError(f"{type(self).__name__} defines no codes: write encode, decode and code_range")

    def format(self) -> Format:
        """The format with the numbers that it has now, which are the tensors of the quantizer itself, not copies.

        >>> from torchquant.quantizers import ESBQuantizer
        >>> quantizer = ESBQuantizer(4, 1)
        >>> quantizer.force(0.5)
        >>> quantizer.format().project(torch.tensor([0.3, -9.0]))[0]
        tensor([ 0.2500, -3.0000])
        """
        return Formula(self.encode, self.decode, self.code_range, affine=self._own_affine(), axis=self.axis)

    def _own_affine(self) -> Callable[[], AffineParams] | None:
        """The affine view that a scheme writes itself; None where it is the one of the format."""
        return self.affine_params if type(self).affine_params is not Quantizer.affine_params else None

    @torch.no_grad()
    def levels(self) -> Tensor:
        """The representable values, sorted: (L,), or (C, L) per channel."""
        return self.format().levels()

    @torch.no_grad()
    def code_values(self) -> Tensor:
        """The value of every code, in the order of the codes: (L,), or (C, L) per channel."""
        return self.format().code_values()

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Where `quantize` goes from each of `levels()` to the next: (L - 1,) float32, sorted; (C, L - 1) per channel.

        What lies on a threshold takes one of its two levels, not the same one in every scheme. Here they are the
        middles, as in all schemes that take the nearest level; the others override it. Raises NoCodesError for formats
        that have no one list of levels, or have levels in other units than those of x.

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
        """The levels next to x, below and above, in its type; equal where x is on a level or beyond the last.

        One of the two is `quantize(x)`. Raises NoCodesError for levels in other units than those of x.

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
        """x, (rows, k), quantized as the elements of these columns, (k,) int64, of a weight (rows, columns).

        Raises NoCodesError where the levels of an element follow from the elements beside it.
        """
        if self.levels_vary:
            why = f"each {self.about.granularity[0]} takes its scale from all of its elements"
            raise NoCodesError(f"{type(self).__name__} cannot quantize columns alone: {why}")
        return self.quantize(x)

    def numbers(self) -> dict[str, Tensor]:
        """The numbers that say where the grid lies, () or (C,), by name; {} where there are none to set."""
        return {}

    @torch.no_grad()
    def set_numbers(self, **numbers: Tensor | float) -> None:
        """Set all that `numbers()` gives. Raises ConfigError for other names."""
        known = self.numbers()
        if numbers.keys() != known.keys():
            names = ", ".join(known) or "none to set"
            raise ConfigError(f"the numbers of {type(self).__name__} are: {names}; got {', '.join(numbers) or 'none'}")
        self._set_numbers(**numbers)

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        """`set_numbers` for names that are right."""

    def affine_params(self) -> AffineParams:
        """(delta, zero_point, qmin, qmax) of a uniform format, () or (C,) tensors and integers."""
        return self._view(lambda format: format.affine_params())

    @torch.no_grad()
    def integer_terms(self) -> IntegerTerms:
        """The levels as sums of whole numbers times scales: [(scale, table)], so that sums of products stay integer.

        Level of the code c: `sum(scale * table[..., c - code_range[0]])`. scale: () or (C,) float64. table: (L,) or
        (C, L) int64. One term for ESB, powers of two, ternary, binary; n_bits for residual; one more for a shift.
        Raises NoAffineViewError where there is no such form, as for a codebook or blocks.

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


class GridQuantizer(Quantizer):
    """A quantizer whose format is given by a few numbers, fixed while it quantizes.

    A subclass says which numbers (`grid`) and what they mean, in one of two ways: `format()`, a value of a class in
    `quantizers_functional`; or `codes`, `values` and `code_range`, in terms of tensors already shaped to broadcast
    against x. Gradient, clamp, half types, channels, NaN and the level list are done here.
    """

    fuses_clamp = True
    traits: ClassVar[frozenset[str]] = frozenset()
    """Properties of the format that gradient estimators may require; see `Gradient.needs`."""

    def __init__(self, gradient_clip: bool = False) -> None:
        super().__init__()
        self.gradient = make_gradient("clipped" if gradient_clip else "ste")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {"codes", "values", "project"} & cls.__dict__.keys()
        if not own or "format" in cls.__dict__ or cls.format is GridQuantizer.format:
            return
        is_whole = {"codes", "values"} <= own
        cls.format = GridQuantizer.format if is_whole else _altered(cls.format, own)  # type: ignore[method-assign, assignment]

    @abstractmethod
    def grid(self) -> tuple[Tensor | int, ...]:
        """The numbers of the grid: tensors () or (C,), or plain integers."""

    def format(self) -> Format:
        is_own = type(self).project is not GridQuantizer.project
        project = self.project if is_own else None
        affine = self._own_affine()
        return Formula(self.codes, self.values, self.code_range, self.grid(), project, affine, axis=self.axis)

    def codes(self, x: Tensor, *numbers: Any) -> Tensor:
        """Whole-number codes of the nearest grid values, in any type; NaN may stay NaN."""
        raise NoCodesError(f"{type(self).__name__} has neither codes and values nor a format(); write one of the two")

    def values(self, codes: Tensor, dtype: torch.dtype, *numbers: Any) -> Tensor:
        """Grid values of codes, in `dtype` (float32 or float64)."""
        raise NoCodesError(f"{type(self).__name__} has neither codes and values nor a format(); write one of the two")

    def project(self, x: Tensor, want_inside: bool, *numbers: Any) -> tuple[Tensor, Tensor | None]:
        """Nearest grid value, and 1 where x was not clipped (None unless asked for), in x's type.

        This one takes what lies between the lowest and the highest level for not clipped. Override it
        where the value can be had faster than through codes, or where another rule is wanted.
        """
        return Formula(self.codes, self.values, self.code_range, numbers).nearest(x, want_inside)

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Names of the gradient estimators that are defined for the format."""
        return tuple(name for name in GRADIENTS if GRADIENTS[name].needs <= cls.traits)

    def set_gradient(self, gradient: str | Gradient, **options: Any) -> None:
        """Take another estimator, with its options. Raises ConfigError with the list that is allowed."""
        made = make_gradient(gradient, **options)
        if not self.gradients():
            raise ConfigError(f"{type(self).__name__} has its own gradient, there is none to choose; got {made.name!r}")
        if not made.needs <= self.traits:
            allowed = ", ".join(self.gradients())
            raise ConfigError(f"{type(self).__name__} takes the gradients {allowed}, got {made.name!r}")
        self.gradient = made

    def grid_for(self, x: Tensor) -> tuple[Any, ...]:
        """The numbers of the grid in shapes that broadcast against x."""
        return tuple(per_channel_view(n, x.ndim, self.axis) for n in self.grid())

    def quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor:
        """Real to real on the grid; `clamp=(low, high)` quantizes `x.clamp(low, high)` in one pass."""
        return self.format().quantize(x, self.gradient, clamp, self.training)

    @torch.no_grad()
    def side_bytes(self, x: Tensor) -> int:
        """4 bytes a scale, or a number that the values depend on; as many as a code for a zero point that is not 0."""
        return self.format().side_bytes()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Real to integer codes (int32). Raises NonFiniteError for NaN; Inf saturates."""
        if bool(torch.isnan(x).any()):
            raise NonFiniteError(f"{type(self).__name__} cannot encode NaN; x has {int(torch.isnan(x).sum())} of them")
        return self.format().encode(x)

    @torch.no_grad()
    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes to real values of type `dtype`. Raises ConfigError for a code outside of `code_range`."""
        if codes.numel():
            (low, high), (least, most) = self.code_range, (int(end) for end in torch.aminmax(codes))
            if least < low or most > high:
                raise ConfigError(f"codes of {type(self).__name__} are {low}..{high}, got {least}..{most}")
        return self.format().decode(codes, dtype)


def _altered(inherited: Callable[[Any], Format], own: Set[str]) -> Callable[[Any], Format]:
    """The `format()` of a scheme that overrides some of the functions that the inherited one does not ask."""

    def format(self: Any) -> Format:
        base = inherited(self)
        functions = (getattr(self, name) if name in own else None for name in ("codes", "values", "project"))
        return Altered(base, self.grid(), *functions, axis=base.axis)

    return format


class OwnScaleQuantizer(GridQuantizer):
    """A quantizer whose parts (blocks, tokens) each take their scale from their own elements, every time anew."""

    fuses_clamp = False

    @classmethod
    def gradients(cls) -> tuple[str, ...]:
        """Straight through: a scale that covers its part clips nothing."""
        return ("ste",)

    @property
    def is_memoryless(self) -> bool:
        return True

    @property
    def code_range(self) -> tuple[int, int]:
        return self.format().code_range

    def grid(self) -> tuple[Tensor | int, ...]:
        """Nothing: all is in the elements."""
        return ()


class UniformQuantizer(GridQuantizer):
    """A uniform grid over the range of an observer. A subclass turns the range into `affine_params`."""

    fuses_clamp = True
    is_uniform = True
    traits = frozenset({"step"})

    def __init__(self, n_bits: int, range_observer: RangeObserver, gradient_clip: bool = False) -> None:
        super().__init__(gradient_clip)
        if not isinstance(range_observer, RangeObserver):
            raise TypeError(f"range_observer must be a RangeObserver such as BatchMinMax(), got {range_observer!r}")
        self.n_bits = n_bits
        self.observer = range_observer

    @property
    def axis(self) -> int | None:  # type: ignore[override]
        """Axis whose slices have a grid each; the observer's."""
        return self.observer.axis

    @property
    def is_ready(self) -> bool:
        return self.observer.is_observed

    @property
    def is_memoryless(self) -> bool:
        return self.observer.is_memoryless

    def allocate(self, n_channels: int) -> None:
        self.observer.allocate(n_channels)

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Take x, or `x.clamp(*clamp)`, into the range."""
        if clamp is None:
            self.observer.observe_batch(x)
        else:
            self.observer.observe_clamped(x, clamp)

    @abstractmethod
    def affine_params(self) -> AffineParams:
        """The grid over the observed range."""

    @property
    def code_range(self) -> tuple[int, int]:
        params = self.affine_params()
        return params.qmin, params.qmax

    def numbers(self) -> dict[str, Tensor]:
        """The ends of the range."""
        return dict(zip(("range_min", "range_max"), self.observer.get_ranges(), strict=True))

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        self.observer.force_ranges(**numbers)

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.affine_params()

    def format(self) -> Format:
        return UniformGrid(*self.affine_params(), axis=self.axis)


class FittedQuantizer(StatisticTracker, GridQuantizer):
    """A quantizer whose numbers are fitted to the data itself: thresholds, scales, levels.

    The numbers are the statistics of a `StatisticTracker`: named in `statistics`, computed by
    `measure(x)`, averaged over batches with `momentum`, saved and loaded like any observer's.
    """

    fuses_clamp = True

    def __init__(
        self, momentum: float = 0.0, axis: int | None = None, gradient_clip: bool = False, nonfinite: str = "raise"
    ) -> None:
        super().__init__(momentum, axis, nonfinite)
        self.gradient = make_gradient("clipped" if gradient_clip else "ste")

    @property
    def is_ready(self) -> bool:
        return self.is_observed

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Fit the numbers to x, or to `x.clamp(*clamp)`."""
        self.observe_batch(x if clamp is None else x.clamp(*clamp))

    def grid(self) -> tuple[Tensor | int, ...]:
        return self.get()

    def numbers(self) -> dict[str, Tensor]:
        """The statistics."""
        return dict(zip(self.statistics, self.get(), strict=True))

    def _set_numbers(self, **numbers: Tensor | float) -> None:
        self.force(*(numbers[name] for name in self.statistics))


QuantizerFactory = Callable[[nn.Module], Quantizer | None]
"""Makes the quantizer of one site, given the layer there; None leaves the site float."""
