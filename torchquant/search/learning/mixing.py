"""Mix the values of many quantizers of one tensor by differentiable shares, with the memory of one quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from torchquant import kernels
from torchquant.errors import ConfigError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._bits import is_channels_last
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional._levels import in_layout_of
from torchquant.quantizers_functional.gradients import STE
from torchquant.search.learning._members import Gathered, is_plain, members_of
from torchquant.search.learning._steps import Cells, Steps, has_only_numbers, steps_of

TABLE_PAYS = 2**18
"""Elements times (quantizers - 2) from which a table is faster."""


def mix(x: Tensor, quantizers: Sequence[Quantizer], shares: Tensor, clamp: Clamp | None = None) -> Tensor:
    """Compute `sum_k shares[k] * quantizers[k](x)`, in x's type; a single quantizer is called without its share.

    `clamp=(low, high)` mixes `x.clamp(low, high)`, with the gradient of a ReLU; in kernel and table that costs nothing.

    x: (*). shares: (K,). The gradient of a share is `<grad, Q_k(x)>`; the gradients of x and of the quantizers' learned
    numbers are the sums over the quantizers, weighted by shares. Memory for backward does not grow with K, because
    backward quantizes again; a quantizer that draws noise draws it anew. Raises ConfigError.

    Quantizers of float32 that learn nothing and have a straight-through or clipped gradient are mixed by one kernel,
    which reads x once in forward and once in backward, if it has the format of each of them. On a CPU without kernels,
    a large tensor is looked up in one table of all levels if these quantizers work per tensor: the time hardly depends
    on K, and an element on a threshold may take the other of its two levels. Compiled code computes the plain sum.

    >>> from torchquant.quantizers import make_quantizer
    >>> x, shares = torch.tensor([-1.0, 0.2, 1.0]), torch.tensor([0.25, 0.75], requires_grad=True)
    >>> quantizers = [make_quantizer("binary"), make_quantizer("affine:4,symmetric=narrow")]
    >>> for quantizer in quantizers:
    ...     quantizer.pre_observe(x)
    >>> mix(x, quantizers, shares)
    tensor([-0.9333,  0.2905,  0.9333], grad_fn=<...Backward>)
    """
    if shares.shape != (len(quantizers),):
        raise ConfigError(f"{len(quantizers)} quantizers need as many shares, got shape {tuple(shares.shape)}")
    if len(quantizers) == 1 and (clamp is None or quantizers[0].fuses_clamp):
        return quantizers[0](x) if clamp is None else quantizers[0](x, clamp=clamp)
    if len(quantizers) == 1 or torch.compiler.is_compiling():
        x = _clamped(x, clamp)
        return quantizers[0](x) if len(quantizers) == 1 else _sum([quantizer(x) for quantizer in quantizers], shares)
    if kernels.find("mixture", x.detach()) is not None and shares.dtype == torch.float32:
        gathered = members_of(quantizers, clamp)
        if gathered is not None:
            return _Fused.apply(x, shares, gathered)
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * (len(quantizers) - 2) >= TABLE_PAYS:
        steps = steps_of(quantizers, clamp)
        cells = None if steps is None else Cells.over(steps.edges)
        if steps is not None and cells is not None and has_only_numbers(x):
            return _Looked.apply(x, shares, steps, cells)
    x = _clamped(x, clamp)
    if not torch.is_grad_enabled():
        return _total(x, quantizers, shares)
    learned = [[p for p in quantizer.parameters() if p.requires_grad] for quantizer in quantizers]
    return _Mixed.apply(x, shares, quantizers, [len(p) for p in learned], *(p for ps in learned for p in ps))


def _clamped(x: Tensor, clamp: Clamp | None) -> Tensor:
    if clamp is None:
        return x
    low, high = clamp
    if low == 0.0 and high is None:
        return F.relu(x)
    return x.clamp(low, high) if low is None or high is None else F.hardtanh(x, low, high)


def _sum(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    total = values[0] * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total = total + value * share
    return total


def _total(x: Tensor, quantizers: Sequence[Quantizer], shares: Tensor) -> Tensor:
    total = quantizers[0](x) * shares[0]
    for quantizer, share in zip(quantizers[1:], shares[1:], strict=True):
        total += quantizer(x) * share.to(total.dtype)
    return total


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute the sum of the products, in float32 or wider."""
    if a.dtype in (torch.float32, torch.float64) and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a.to(torch.float32) * b).sum() if a.dtype.itemsize < 4 else (a * b).sum()


class _Held:
    """A quantizer with its buffers as they were in forward; they may have changed when backward quantizes again."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.is_plain_ste = is_plain(quantizer) and isinstance(quantizer.gradient, STE)
        self._buffers = [(name, b, b._version, b.clone()) for name, b in quantizer.named_buffers()]

    def __call__(self, x: Tensor) -> Tensor:
        now = dict(self.quantizer.named_buffers())
        if all(now[name] is b and b._version == version for name, b, version, _ in self._buffers):
            return self.quantizer(x)
        return functional_call(self.quantizer, {name: copy for name, _, _, copy in self._buffers}, (x,))


class _Mixed(torch.autograd.Function):
    """Computes the sum quantizer by quantizer, in forward and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shares: Tensor, quantizers: Sequence[Quantizer], n_learned: list[int], *learned: Tensor
    ) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, shares, *learned)
            ctx.quantizers = [_Held(quantizer) for quantizer in quantizers]
            ctx.n_learned = n_learned
        return _total(x, quantizers, shares)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, shares, *learned = ctx.saved_tensors
        wants_x, wants_shares, *_ = ctx.needs_input_grad
        grad_x: Tensor | None = None
        of_learned: list[Tensor | None] = []
        of_shares: list[Tensor] = []
        for held, n_learned, share in zip(ctx.quantizers, ctx.n_learned, shares, strict=True):
            own = learned[len(of_learned) : len(of_learned) + n_learned]
            shared = grad * share
            leaf = x.detach().requires_grad_(wants_x)
            if held.is_plain_ste:
                y = held(leaf.detach()) if wants_shares else leaf
                of_x, of_own = shared, []
            else:
                with torch.enable_grad():
                    y = held(leaf)
                of_x, *of_own = _gradients(y, [leaf, *own], shared)
            if wants_shares:
                of_shares.append(_inner(grad, y.detach()))
            if wants_x and of_x is not None:
                grad_x = of_x if grad_x is None else grad_x + of_x
            of_learned += of_own
        of_all = torch.stack(of_shares).to(shares.dtype) if wants_shares else None
        return grad_x, of_all, None, None, *of_learned


def _gradients(y: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    wanted = [t for t in inputs if t.requires_grad]
    if not (wanted and y.requires_grad):
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


class _Fused(torch.autograd.Function):
    """Computes the sum by one kernel, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, gathered: Gathered) -> Tensor:
        ctx.save_for_backward(x, shares)
        ctx.gathered = gathered
        return cast(Tensor, cast(kernels.Kernel, kernels.find("mixture", x))(x, shares, gathered.members))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, shares = ctx.saved_tensors
        grad, wanted = in_layout_of(grads[0], x), ctx.needs_input_grad[:2]
        kernel = kernels.find_backward("mixture_backward", x, grad)
        if kernel is None:  # a mode that watches backward alone
            for_x, of_shares = ctx.gathered.gradients(x, grad, shares, wanted)
        else:
            for_x, of_shares = kernel(x, grad, shares, ctx.gathered.members, wanted)
        return for_x, None if of_shares is None else of_shares.to(shares.dtype), None


class _Looked(torch.autograd.Function):
    """Looks the sum up in a table of the mixed levels; for backward it saves the index into the table, 2 bytes each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, steps: Steps, cells: Cells) -> Tensor:
        ctx.channels_last = is_channels_last(x)
        place = cells.place(_flat(x, ctx.channels_last))
        ctx.save_for_backward(shares, place.to(torch.int16), cells.bins, steps.values, steps.slopes)
        total = steps.values[0] * shares[0]
        for value, share in zip(steps.values[1:], shares[1:], strict=True):
            total.addcmul_(value, share)
        y = total[cells.bins].index_select(0, place.to(torch.int32))
        return in_layout_of(_unflat(y, x.shape, ctx.channels_last), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        shares, kept, bins, values, slopes = ctx.saved_tensors
        place = kept.to(torch.int32)
        grad_x = of_shares = None
        if ctx.needs_input_grad[0]:
            if slopes is None:
                grad_x = grad * shares.sum()
            else:
                slope = (shares[:, None] * slopes).sum(0)[bins].index_select(0, place)
                grad_x = _unflat(slope, grad.shape, ctx.channels_last) * grad
        if ctx.needs_input_grad[1]:
            in_place = torch.bincount(place, _flat(grad, ctx.channels_last), len(bins)).to(torch.float64)
            in_bin = in_place.new_zeros(values.shape[1]).index_add_(0, bins, in_place)
            of_shares = (values.to(torch.float64) @ in_bin).to(shares.dtype)
        return grad_x, of_shares, None, None


def _flat(x: Tensor, channels_last: bool) -> Tensor:
    return (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1)


def _unflat(flat: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    if not channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
