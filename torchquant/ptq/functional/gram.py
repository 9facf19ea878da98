"""What a layer reads, as rows of numbers, and the Gram matrix of the rows.

Rows are (g, n, K): g convolution groups (1 for a linear layer), n tokens or patches, K inputs of an output. A layer
computes `rows @ weight.mT` of its weight (g, out / g, K), whose K inputs are in the order of the stored weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant._arguments import explained
from torchquant.errors import ConfigError, NonFiniteError
from torchquant.ptq.functional.factors import WIDEST_FLOAT64

MOST_ELEMENTS = 2**25
"""Elements of a piece of unfolded patches."""
Sizes = int | Sequence[int]


def sampling_steps(sizes: Sequence[int], n_images: int, most_rows: int | None) -> tuple[int, ...]:
    """The steps along axes of these sizes that take at most about `most_rows` places of n images, and of each the most.

    A step has no divisor in common with the size where there are fewer images than steps, so that the places taken are
    not all of one phase of a stride.

    >>> sampling_steps((12, 10), 8, 160), sampling_steps((12, 10), 1, 20), sampling_steps((100,), 1, None)
    ((3, 2), (5, 3), (1,))
    """
    share = 1.0 if most_rows is None else max(1.0, n_images * math.prod(sizes) / max(1, most_rows))
    steps = []
    for left, size in zip(range(len(sizes), 0, -1), sizes, strict=True):
        step = min(math.ceil(share ** (1 / left) - 1e-9), size)
        while n_images < step and math.gcd(step, size) > 1:
            step += 1
        steps.append(step)
        share = max(1.0, share / step)
    return tuple(steps)


def linear_rows(x: Tensor, keep: Tensor | None = None, most_rows: int | None = None) -> Tensor:
    """The rows (1, n, K) of an input (..., K). keep: (...) truths; tokens where it is False are padding and left out.

    most_rows: of more rows, each p-th is taken; see `sampling_steps`.

    >>> linear_rows(torch.zeros(2, 5, 3), torch.arange(5).lt(4).expand(2, 5)).shape
    torch.Size([1, 8, 3])
    """
    rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep]
    (step,) = sampling_steps(rows.shape[:1], 1, most_rows)
    return rows[step // 2 :: step][None]


@explained
def conv_rows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    most_rows: int | None = None,
    most_elements: int = MOST_ELEMENTS,
) -> Iterator[Tensor]:
    """Patches that a convolution reads, in pieces (groups, n, K) of at most about `most_elements` elements.

    x: (N, C, *spatial), one to three dimensions; the other arguments are those of `torch.nn.Conv2d`. The padding is
    among what the patches hold. K = C / groups * prod(kernel_size). most_rows: of more patches,
    some are given, in steps along each axis; see `sampling_steps`.

    >>> [piece.shape for piece in conv_rows(torch.ones(2, 4, 5, 5), (3, 3), groups=2)]
    [torch.Size([2, 18, 18])]
    """
    n_axes = len(kernel_size)
    strides, dilations = _each(stride, n_axes), _each(dilation, n_axes)
    spans = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
    if isinstance(padding, str):
        sides = [(span // 2, span - span // 2) if padding == "same" else (0, 0) for span in spans]
    else:
        sides = [(side, side) for side in _each(padding, n_axes)]
    padded = _pad(x, sides, "constant" if padding_mode == "zeros" else padding_mode)
    return _pieces(_windows(padded, kernel_size, strides, dilations), n_axes, groups, most_rows, most_elements)


@explained
def transposed_conv_rows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    most_rows: int | None = None,
    most_elements: int = MOST_ELEMENTS,
) -> Iterator[Tensor]:
    """Patches behind each output of a transposed convolution, as `conv_rows`: it is one over x spread out by zeros.

    The weight that goes with them has its output channel first: (C_in, out / g, *k) as (g, out / g, C_in / g * prod k).

    >>> next(transposed_conv_rows(torch.ones(1, 1, 2), [2])).tolist()
    [[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]
    """
    n_axes = len(kernel_size)
    strides, dilations = _each(stride, n_axes), _each(dilation, n_axes)
    spread = x.new_zeros(*x.shape[:2], *(s * (size - 1) + 1 for s, size in zip(strides, x.shape[2:], strict=True)))
    places: tuple[slice, ...] = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    spread[places] = x
    spans = [d * (k - 1) - p for d, k, p in zip(dilations, kernel_size, _each(padding, n_axes), strict=True)]
    sides = [(span, span + extra) for span, extra in zip(spans, _each(output_padding, n_axes), strict=True)]
    windows = _windows(_pad(spread, sides, "constant"), kernel_size, [1] * n_axes, dilations)
    return _pieces(windows.flip(tuple(range(-n_axes, 0))), n_axes, groups, most_rows, most_elements)


def _each(sizes: Sizes, n_axes: int) -> Sequence[int]:
    return [sizes] * n_axes if isinstance(sizes, int) else sizes


def _pad(x: Tensor, sides: Sequence[tuple[int, int]], mode: str) -> Tensor:
    return F.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)


def _windows(x: Tensor, kernel_size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """(N, C, *outputs, *kernel_size), a view of x."""
    for axis, (size, stride, dilation) in enumerate(zip(kernel_size, strides, dilations, strict=True), 2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def _pieces(windows: Tensor, n_axes: int, groups: int, most_rows: int | None, most_elements: int) -> Iterator[Tensor]:
    outputs = windows.shape[2 : 2 + n_axes]
    steps = sampling_steps(outputs, len(windows), most_rows)
    if max(steps) > 1:
        taken = [_patches_last(windows[i : i + 1][_lattice(i, steps)], n_axes, groups) for i in range(len(windows))]
        yield torch.cat(taken, 2).mT
        return
    per_image = math.prod(windows.shape[1:])
    per_line = max(1, per_image // windows.shape[2])
    for images in windows.split(max(1, most_elements // max(1, per_image))):
        lines = images.shape[2] if per_image <= most_elements else max(1, most_elements // per_line)
        for piece in images.split(lines, 2):
            yield _patches_last(piece, n_axes, groups).mT


def _patches_last(windows: Tensor, n_axes: int, groups: int) -> Tensor:
    """Copy windows (N, C, *outputs, *kernel_size) to (groups, K, n), the order in which they lie in the image."""
    kernel = tuple(range(2 + n_axes, windows.ndim))
    columns = windows.movedim(0, 1).movedim(kernel, tuple(range(1, 1 + n_axes))).flatten(1 + n_axes)
    return columns.unflatten(0, (groups, -1)).flatten(1, 1 + n_axes)


def _lattice(image: int, steps: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of the places that are taken in an image: they begin elsewhere in each, so that some are edges.

    The first places are those of the low-discrepancy sequence of Roberts 2018 (the R sequence).
    """
    ratio = 1.0
    for _ in range(64):  # the root of ratio ** (n + 1) = ratio + 1
        ratio = (1.0 + ratio) ** (1 / (len(steps) + 1))
    starts = (int(step * math.fmod((image + 0.5) * ratio ** -(axis + 1), 1.0)) for axis, step in enumerate(steps))
    return (slice(None), slice(None), *(slice(start, None, step) for start, step in zip(starts, steps, strict=True)))


@explained
def gram_sum(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """`rows.mT @ rows`, or `rows.mT @ others` for the cross Gram matrix; (g, K, K) float64, above 2048 inputs float32.

    rows, others: (g, n, K) of the same n; `rows` are those of the quantized stream where both streams come. Add the
    sums of batches and ranks and divide once by the number of rows. The products are of float32 at least: sums in
    bfloat16 make matrices that are not positive definite. Larger matrices are factored in float32 too.

    >>> gram_sum(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[10., 14.],
             [14., 20.]]], dtype=torch.float64)
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    left = rows.to(wide)
    found = left.mT @ (left if others is None else others.to(wide))
    return found if found.shape[-1] > WIDEST_FLOAT64 else found.to(torch.float64)


@explained
def check_gram(gram: Tensor, n: int, damp: float) -> None:
    """Refuse a Gram matrix that says nothing of the layer, or that only damping would make invertible without any.

    gram: (..., K, K), the sum or mean over n rows. Raises NonFiniteError for NaN or Inf; ConfigError where no row came,
    all are 0, or fewer rows than columns come without damping.

    >>> check_gram(torch.zeros(1, 2, 2), 8, 0.01)
    Traceback (most recent call last):
    torchquant.errors.ConfigError: the Gram matrix of 8 rows of 2 inputs is all zeros: the layer has read nothing; \
run the calibration batches through it
    """
    n_columns = gram.shape[-1]
    if not bool(gram.isfinite().all()):
        raise NonFiniteError(f"the Gram matrix of {n} rows of {n_columns} inputs has NaN or Inf; look at the inputs")
    if n < 1 or not bool(gram.any()):
        raise ConfigError(
            f"the Gram matrix of {n} rows of {n_columns} inputs is all zeros: the layer has read nothing; "
            "run the calibration batches through it"
        )
    if n < n_columns and damp <= 0:
        raise ConfigError(f"{few_rows(n, n_columns)}; give damp > 0, or more calibration data")


def damping_of(n: int, n_columns: int) -> float:
    """How much to damp the Gram matrix of n rows of as many inputs, in units of its mean diagonal.

    0.01 as published where there are two rows for each column; with fewer it grows by 1 for each time that the columns
    are as many as the rows: what few rows say of so many directions is noise, and a weight that is fitted to it loses
    on other inputs. See decision 0043.

    >>> damping_of(100000, 64), damping_of(64, 64), damping_of(64, 672)
    (0.01, 0.5, 10.0)
    """
    return max(0.01, n_columns / max(n, 1) - 0.5)


def few_rows(n: int, n_columns: int) -> str:
    """Describe a Gram matrix of n rows of as many inputs; "" if the rows are enough for it to be invertible."""
    return f"{n} rows of {n_columns} inputs make a singular Gram matrix" if n < n_columns else ""


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared error that a difference of weights makes at each output, `d H d'`: (..., rows).

    difference: (..., rows, K). gram: (..., K, K), or (..., K) for its diagonal alone. In the units of the Gram matrix:
    the mean over its rows if it is a mean. A gradient for the difference, `2 d H`, takes no product of its own: the
    matrix is symmetric.

    >>> output_error(torch.tensor([[0.4, 0.4]]), torch.tensor([[2.0, 1.6], [1.6, 2.0]]))
    tensor([1.1520])
    """
    difference = difference.to(gram.dtype)
    if gram.ndim == difference.ndim:
        fixed = difference.detach()
        pulled = fixed @ gram
        error = (pulled * fixed).sum(-1)
        return error + 2.0 * (pulled * (difference - fixed)).sum(-1) if difference.requires_grad else error
    return (difference.square() @ gram[..., None])[..., 0]
