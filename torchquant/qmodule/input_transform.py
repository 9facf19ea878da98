"""Float computations before and beside the quantized product of a layer, which leave its function as it was.

An `InputTransform` T changes what the layer reads, and the weight takes its inverse: `W x = (W inverse(T)) (T x)`. The
input quantizer then sees `T x`, in which outliers are smaller. A `LowRank` adds `A (B x)` to the product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._tensors import channel_view
from torchquant.errors import ConfigError

SLOT, BESIDE = "input_transform", "low_rank"
"""The names of a wrapper's children that hold the transforms before its input quantizer and the low-rank product."""


class InputTransform(nn.Module, ABC):
    """A linear map of a layer's input with an inverse. Its buffers are in the `state_dict`.

    `axis`: the axis of the channels in the input, counted from the end. A subclass registers the buffer `named_by`,
    (K,), by which a checkpoint tells the class.
    """

    named_by: ClassVar[str]

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        if axis >= 0:
            raise ConfigError(f"axis counts from the end, so that inputs may lack the batch: -1, -2, ...; got {axis}")
        self.axis = axis

    @property
    def n_channels(self) -> int:
        """The number of input channels that the transform is for."""
        return len(self.get_buffer(self.named_by))

    @property
    def n_given(self) -> int:
        """The number of channels that the layer gets."""
        return self.n_channels

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Transform an input, in its own type."""

    @abstractmethod
    def on_weight(self, weight: Tensor) -> Tensor:
        """Apply the inverse to a weight (..., K): the result reads `T x` in place of x."""

    @abstractmethod
    def off_weight(self, weight: Tensor) -> Tensor:
        """Undo `on_weight`."""

    def check_groups(self, per_group: int) -> None:  # noqa: B027 - most mix no channels
        """Raise ConfigError if the transform mixes channels of different groups, of `per_group` channels each."""

    @classmethod
    @abstractmethod
    def expected(cls, saved: Mapping[str, Tensor], axis: int) -> InputTransform:
        """Make a transform with buffers of the shapes of saved ones."""


@checked
class ChannelScale(InputTransform):
    """Multiplies each input channel by a factor, (K,), above 0; the weight is divided by it.

    >>> scale = ChannelScale(torch.tensor([0.5, 2.0]))
    >>> x, weight = torch.tensor([[4.0, 1.0]]), torch.tensor([[3.0, 1.0]])
    >>> scale(x), scale.on_weight(weight)
    (tensor([[2., 2.]]), tensor([[6.0000, 0.5000]]))
    """

    named_by = "factor"
    factor: Tensor

    def __init__(self, factor: Tensor, axis: int = -1) -> None:
        super().__init__(axis)
        if factor.ndim != 1 or not bool(((factor > 0) & factor.isfinite()).all()):
            raise ConfigError(f"factor must hold one finite number above 0 for each channel, got {tuple(factor.shape)}")
        self.register_buffer("factor", factor.detach().to(torch.float32).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x * channel_view(self.factor, -self.axis, 0)).to(x.dtype)

    def on_weight(self, weight: Tensor) -> Tensor:
        return weight / self.factor.to(weight)

    def off_weight(self, weight: Tensor) -> Tensor:
        return weight * self.factor.to(weight)

    @classmethod
    def expected(cls, saved: Mapping[str, Tensor], axis: int) -> ChannelScale:
        return cls(torch.ones_like(saved["factor"]), axis)

    def extra_repr(self) -> str:
        return f"{self.n_channels}, axis={self.axis}"


@checked
class Rotation(InputTransform):
    """Multiplies each channel by a sign, (K,), then each run of channels by an orthogonal matrix, as does the weight.

    `matrices`: square ones whose Kronecker product, over the square root of its size, is that matrix; the run has this
    size, which divides K. A Hadamard matrix of 4096 rows is the product of two of 64, so it costs two small matrix
    products. The inputs of a group of a convolution are rotated among themselves. Source: Ashkboos et al. 2024,
    arXiv:2404.00456.

    >>> spread = Rotation(torch.ones(2), [torch.tensor([[1.0, 1.0], [1.0, -1.0]])])
    >>> spread(torch.tensor([[2.0, 0.0]]))
    tensor([[1.4142, 1.4142]])
    """

    named_by = "signs"
    signs: Tensor

    def __init__(self, signs: Tensor, matrices: Sequence[Tensor], axis: int = -1) -> None:
        super().__init__(axis)
        self.sizes = tuple(len(matrix) for matrix in matrices)
        self.block = math.prod(self.sizes)
        if signs.ndim != 1 or not matrices or any(m.ndim != 2 or m.shape[0] != m.shape[1] for m in matrices):
            raise ConfigError(f"signs must be (K,) and matrices square, got {_shapes(signs)} and {_shapes(*matrices)}")
        if len(signs) % self.block:
            raise ConfigError(f"the number of signs must be a multiple of {self.block}, got signs {_shapes(signs)}")
        self.register_buffer("signs", signs.detach().to(torch.float32).clone())
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix_{i}", matrix.detach().to(torch.float32).clone())

    def matrices(self) -> list[Tensor]:
        """Return the factors of the matrix."""
        return [self.get_buffer(f"matrix_{i}") for i in range(len(self.sizes))]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.axis == -1:
            return self._turned(wide * self.signs).to(x.dtype)
        return self._turned(wide.movedim(self.axis, -1) * self.signs).movedim(-1, self.axis).to(x.dtype)

    def on_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight * self.signs.to(weight))

    def off_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight, back=True) * self.signs.to(weight)

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Multiply runs of the last axis by the matrix, or by its transpose.

        Each factor is applied to the last axis of (..., rest, size), and the result transposed: after all of them the
        elements are in order again.
        """
        parts = x.unflatten(-1, (-1, self.block))
        for matrix in reversed(self.matrices()):
            turn = matrix.to(x.dtype) if back else matrix.to(x.dtype).mT
            parts = (parts.unflatten(-1, (-1, len(matrix))) @ turn).mT.flatten(-2)
        return parts.flatten(-2) * (1.0 / math.sqrt(self.block))

    def check_groups(self, per_group: int) -> None:
        if per_group % self.block:
            raise ConfigError(
                f"runs of {self.block} channels would mix groups of {per_group} channels; take a size that divides this"
            )

    @classmethod
    def expected(cls, saved: Mapping[str, Tensor], axis: int) -> Rotation:
        names = sorted((name for name in saved if name.startswith("matrix_")), key=lambda name: int(name[7:]))
        return cls(torch.ones_like(saved["signs"]), [torch.ones_like(saved[name]) for name in names], axis)

    def extra_repr(self) -> str:
        return f"{self.n_channels} in runs of {self.block}, axis={self.axis}"


@checked
class ChannelSplit(InputTransform):
    """Gives channel `index[i]` of the input as channel i, so that the large weights of a channel can be shared out.

    `index`: (K',), each of the K channels once or more often; each copy has the same share of the weight, so that the
    weight grows to K' channels. Source: Zhao et al. 2019, arXiv:1901.09504.

    >>> split = ChannelSplit(torch.tensor([0, 1, 1]))
    >>> split(torch.tensor([[3.0, 5.0]])), split.on_weight(torch.tensor([[1.0, 8.0]]))
    (tensor([[3., 5., 5.]]), tensor([[1., 4., 4.]]))
    """

    named_by = "index"
    index: Tensor

    def __init__(self, index: Tensor, axis: int = -1) -> None:
        super().__init__(axis)
        counts = torch.empty(0) if index.is_floating_point() or index.ndim != 1 else torch.bincount(index)
        if not len(counts) or bool((counts == 0).any()):
            raise ConfigError(f"index must be whole numbers (K',) with each channel from 0 on, got {_shapes(index)}")
        self.register_buffer("index", index.detach().to(torch.int64).clone())

    @property
    def n_channels(self) -> int:
        return int(self.index.max()) + 1

    @property
    def n_given(self) -> int:
        return len(self.index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.index)

    def on_weight(self, weight: Tensor) -> Tensor:
        return weight.index_select(-1, self.index) / torch.bincount(self.index)[self.index].to(weight)

    def off_weight(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(*weight.shape[:-1], self.n_channels).index_add(-1, self.index, weight)

    def check_groups(self, per_group: int) -> None:
        if per_group != self.n_channels:
            raise ConfigError(
                f"channels of a layer with groups of {per_group} channels cannot be split: groups would differ in size"
            )

    @classmethod
    def expected(cls, saved: Mapping[str, Tensor], axis: int) -> ChannelSplit:
        return cls(torch.zeros_like(saved["index"]), axis)

    def extra_repr(self) -> str:
        return f"{self.n_channels} to {self.n_given}, axis={self.axis}"


KINDS: dict[str, type[InputTransform]] = {kind.named_by: kind for kind in (ChannelScale, Rotation, ChannelSplit)}
"""The name of the buffer in a checkpoint -> the class of the transform."""


def expected_transforms(saved: Mapping[str, Tensor], axis: int) -> nn.Sequential:
    """Make the transforms that saved tensors belong to. saved: "PLACE.NAME" -> tensor. Raises ConfigError."""
    places: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        place, _, name = key.partition(".")
        places.setdefault(int(place), {})[name] = tensor
    made = []
    for _, tensors in sorted(places.items()):
        kinds = [KINDS[name] for name in tensors if name in KINDS]
        if len(kinds) != 1:
            raise ConfigError(f"a checkpoint holds an input transform of unknown kind: {', '.join(tensors)}")
        made.append(kinds[0].expected(tensors, axis))
    return nn.Sequential(*made)


def on_input_channels(weight: Tensor, n_groups: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a weight along its input channels, as a tensor (..., K) with the channels of all groups in order.

    weight: (rows, K / n_groups, ...), the output channel on axis 0. Computed in float64.

    >>> weight = torch.tensor([[1.0], [2.0]])  # depthwise: two groups of one channel
    >>> on_input_channels(weight, 2, lambda w: w * torch.tensor([3.0, 5.0]))
    tensor([[ 3.],
            [10.]])
    """
    changed = change(by_input_channel(weight.to(torch.float64), n_groups)).unflatten(-1, (n_groups, -1))
    return changed.movedim((-2, -1), (0, 2)).flatten(0, 1).to(weight.dtype)


def by_input_channel(weight: Tensor, n_groups: int) -> Tensor:
    """Lay out a weight (rows, K / n_groups, ...) as (rows / n_groups, ..., K), the channels of all groups in order."""
    return weight.unflatten(0, (n_groups, -1)).movedim((0, 2), (-2, -1)).flatten(-2)


@checked
class LowRank(nn.Module):
    """A product of low rank, beside the quantized one of a layer, from the same input before it is quantized.

    `down`: (groups * rank, K, ...), a weight in the layout of the layer's own with fewer output channels, output
    channel first. `up`: (rows, rank). Both are trained with the model.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        if up.ndim != 2 or down.ndim < 2 or not up.shape[1] or len(down) % up.shape[1]:
            raise ConfigError(f"down must be (groups * rank, ...) and up (rows, rank), got {_shapes(down, up)}")
        self.down = nn.Parameter(down.detach().clone())
        self.up = nn.Parameter(up.detach().clone())

    @property
    def n_groups(self) -> int:
        """The groups of the layer."""
        return len(self.down) // self.up.shape[1]

    def forward(self, x: Tensor, run: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Compute the product. `run(x, weight)`: the convolution of the layer; None for a linear layer."""
        if run is None:
            return F.linear(F.linear(x, self.down), self.up)
        inner = run(x, self.down)
        n_axes = self.down.ndim - 2
        batch = inner if inner.ndim == n_axes + 2 else inner[None]
        conv: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n_axes]
        y: Tensor = conv(batch, self.up.reshape(*self.up.shape, *[1] * n_axes), groups=self.n_groups)
        return y if batch is inner else y[0]

    def product(self) -> Tensor:
        """Return the weight that the product stands for, (rows, K, ...), output channel first."""
        ups = self.up.unflatten(0, (self.n_groups, -1))
        return (
            (ups @ self.down.reshape(self.n_groups, self.up.shape[1], -1))
            .flatten(0, 1)
            .unflatten(1, self.down.shape[1:])
        )

    def extra_repr(self) -> str:
        return f"rank {self.up.shape[1]}"


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
