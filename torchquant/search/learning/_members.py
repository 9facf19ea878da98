"""Gather the projections of many quantizers for one kernel, which mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.kernels.cpu_mixtures import KINDS, Members
from torchquant.quantizers import GridQuantizer, Quantizer
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional.formats import Format, KernelCall, Number
from torchquant.quantizers_functional.gradients import STE, ClippedSTE
from torchquant.quantizers_functional.kernels import KERNELS


class Gathered(NamedTuple):
    """The projections of a mixture, as the kernel takes them, and the formats that they are of."""

    members: Members
    formats: Sequence[Format]

    def gradients(
        self, x: Tensor, grad: Tensor, shares: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and of the shares, those that are `wanted`, by PyTorch's operators."""
        for_x: Tensor | None = None
        of_shares = []
        for form, clips, share in zip(self.formats, self.members.clips, shares, strict=True):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(wanted[0])
                y = form.quantize(leaf, "clipped" if clips else "ste", self.members.clamp)
            if wanted[0]:
                (of_x,) = torch.autograd.grad(y, leaf, grad * share)
                for_x = of_x if for_x is None else for_x + of_x
            of_shares.append((grad * y.detach()).sum())
        return for_x, torch.stack(of_shares) if wanted[1] else None


def is_plain(quantizer: Quantizer) -> bool:
    """Tell whether a quantizer has a straight-through or clipped gradient and learns nothing."""
    return (
        isinstance(quantizer, GridQuantizer)
        and type(quantizer.gradient) in (STE, ClippedSTE)
        and type(quantizer).quantize is GridQuantizer.quantize
        and next(quantizer.parameters(), None) is None
    )


@torch.no_grad()
def members_of(quantizers: Sequence[Quantizer], clamp: Clamp | None = None) -> Gathered | None:
    """Gather the projections of the clamped x by the quantizers; None if one has a format that the kernel lacks.

    The numbers of the formats are copied, so that later observations do not change them.
    """
    plain = [q for q in quantizers if isinstance(q, GridQuantizer) and is_plain(q)]
    if len(plain) < len(quantizers):
        return None
    found = [(form, form.kernel_call()) for form in (q.format() for q in plain)]
    device = next((number.device for form, _ in found for number in form.numbers()), torch.device("cpu"))
    calls = [call for form, call in found if call is not None and _is_taken(form, call, device)]
    axes = {form.axis for form, _ in found if form.axis is not None}
    if len(calls) < len(found) or len(axes) > 1:
        return None
    own = [_rows(call, device) for call in calls]
    n_channels = max(row.shape[-1] for rows in own for row in rows)
    members = Members(
        kernels=[(name, constants) for name, _, constants in calls],
        rows=[sum(len(row) for row in rows) for rows in own],
        clips=[isinstance(q.gradient, ClippedSTE) for q in plain],
        numbers=torch.cat([row.expand(-1, n_channels) for rows in own for row in rows]),
        axis=next(iter(axes)) if n_channels > 1 else None,
        clamp=clamp,
    )
    return Gathered(members, [form.with_numbers([n.clone() for n in form.numbers()]) for form, _ in found])


def _is_taken(form: Format, call: KernelCall, device: torch.device) -> bool:
    """Whether the mixture's kernel has the form, and nobody has registered another kernel for the format."""
    return call[0] in KINDS and KERNELS.find(type(form), device.type) is None


def _rows(call: KernelCall, device: torch.device) -> list[Tensor]:
    """Return the numbers of a kernel as rows of channels, (n, C) each, (n, 1) if they are those of the whole tensor."""
    name, numbers, _ = call
    if name == "levels":
        table = _single(numbers[0], device)
        return [table.T if table.ndim == 2 else table[:, None]]
    return [_single(number, device).view(1, -1) for number in numbers]


def _single(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)
