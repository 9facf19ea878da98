"""The law that nothing leaves the device of its input, on a fake CUDA device: no machine needs a real one.

Fake tensors have a type, a shape and a device, but no numbers. Operations on them fail where they mix devices, as on a
real device, and where Python asks for a number, for which a real device must finish all its work.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchquant.quantizers._base import GridQuantizer
from torchquant.quantizers._laws.case import Case, require

DEVICE = torch.device("cuda", 0)
Grads = dict[int, Tensor]
M = TypeVar("M", bound=nn.Module)


class _NoTransfers(TorchDispatchMode):
    """Refuses operations that wait for the device: copies between devices, and operands on the host with elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and (x.ndim or is_copy)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        devices = sorted({str(x.device) for x in (*read, *made)} if read else ())
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            frames = [f for f in traceback.extract_stack() if "torch/" not in f.filename and f.filename != __file__]
            where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "torch"
            raise RuntimeError(f"{func} at {where} copies between {' and '.join(devices)}, and waits for the device")
        return out


class FakeDevice:
    """A CUDA device that is not there, and copies of tensors and modules on it.

    >>> device = FakeDevice()
    >>> layer, x = device.copy(nn.Linear(3, 2)), device.tensor(torch.ones(1, 3))
    >>> with device.watch():
    ...     backward(layer(x))
    >>> layer.weight.grad.device
    device(type='cuda', index=0)
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run operations on fake tensors; one that would mix devices or wait for the device raises RuntimeError."""
        with self._mode, _NoTransfers():
            yield

    def tensor(self, x: Tensor) -> Tensor:
        """Return a copy of x on the device, a leaf that requires a gradient if x does."""
        with self._mode, torch.no_grad():
            fake = self._mode.from_tensor(x).detach().to(DEVICE)
        return (
            nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake.requires_grad_(x.requires_grad)
        )

    def copy(self, module: M) -> M:
        """Return a copy of a module as `module.to(device)` leaves it: parameters and buffers are on the device."""
        kept = {id(x): self.tensor(x) for x in (*module.parameters(), *module.buffers())}
        return copy.deepcopy(module, kept)


def backward(output: Tensor) -> None:
    """Compute `output.sum().backward()` for fake tensors."""
    for leaf, grad in leaf_gradients(output, torch.ones_like(output)):
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def leaf_gradients(output: Tensor, grad_output: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each leaf behind `output` and its gradient, without the engine of torch, which asks a real device."""
    root = output.grad_fn
    assert root is not None, "no gradient reaches the output"
    received: dict[Any, Grads] = {root: {output.output_nr: grad_output}}
    for node in _in_order(root):
        grads = _as_declared(node, received.pop(node, {}))
        if hasattr(node, "variable"):
            if grads[0] is not None:
                yield node.variable, grads[0]
        elif any(grad is not None for grad in grads):
            for (reader, i), grad in _given(node, grads):
                sums = received.setdefault(reader, {})
                sums[i] = sums[i] + grad if i in sums else grad


def _given(node: Any, grads: list[Tensor | None]) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """Run a node and yield (edge, gradient) for each node that reads a gradient from it."""
    edges = node.next_functions
    if isinstance(node, BackwardCFunction):
        given = node.apply(*grads)
        given = given if isinstance(given, tuple) else (given,)
        given = [grad for grad, is_needed in zip(given, node.needs_input_grad, strict=True) if is_needed]
        edges = [edge for edge in edges if edge[0] is not None]
    else:
        given = node(*grads)
        given = given if isinstance(given, tuple) else (given,)
    for edge, grad in zip(edges, given, strict=True):
        if edge[0] is not None and grad is not None:
            yield edge, grad


def _in_order(root: Any) -> list[Any]:
    """Return the nodes of a backward graph, each before those that it gives gradients to."""
    done: list[Any] = []
    seen, open_nodes = {root}, [(root, iter(root.next_functions))]
    while open_nodes:
        node, readers = open_nodes[-1]
        reader = next((r for r, _ in readers if r is not None and r not in seen), None)
        if reader is None:
            done.append(node)
            open_nodes.pop()
        else:
            seen.add(reader)
            open_nodes.append((reader, iter(reader.next_functions)))
    return done[::-1]


def _as_declared(node: Any, grads: Grads) -> list[Tensor | None]:
    """Return the gradients of a node's outputs as the engine hands them on, in the form of the outputs."""
    declared: list[Tensor | None] = []
    for i, meta in enumerate(node._input_metadata):
        grad = grads.get(i)
        if grad is None:
            is_python = grads and isinstance(node, BackwardCFunction)
            declared.append(torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if is_python else None)
            continue
        require(
            grad.device == meta.device, f"{node.name()} got a gradient on {grad.device} for a value on {meta.device}"
        )
        declared.append(grad.sum_to_size(meta.shape).to(meta.dtype))
    return declared


def check_step(device: FakeDevice, module: nn.Module, sample: Tensor, step: Callable[[Tensor], Tensor]) -> None:
    """Run a forward and a backward of a module on the fake device, and check where the results are."""
    x = device.tensor(sample.detach().requires_grad_(sample.is_floating_point()))
    with device.watch():
        y = step(x)
        require(y.device == x.device, f"the output is on {y.device}, x on {x.device}")
        if y.requires_grad:
            backward(y)
            is_there = not x.requires_grad or x.grad is not None
            require(
                is_there and (x.grad is None or x.grad.device == x.device), "the gradient of x is not on its device"
            )
    for name, kept in (*module.named_parameters(), *module.named_buffers()):
        require(kept.device == x.device, f"{name} went to {kept.device}")
        require(kept.grad is None or kept.grad.device == x.device, f"the gradient of {name} is on {kept.device}")


def keeps_device(case: Case) -> None:
    """On a GPU nothing mixes devices and nothing waits: observing, quantizing and every gradient stay on the device."""
    device = FakeDevice()
    quantizer = device.copy(case.fresh)

    def train(x: Tensor, **clamp: Any) -> Tensor:
        quantizer.pre_observe(x, **clamp)
        y = quantizer(x, **clamp)
        quantizer.post_observe(y)
        return y

    check_step(device, quantizer, case.sample, train)
    if quantizer.fuses_clamp:
        check_step(device, quantizer, case.sample, partial(train, clamp=(0.0, 6.0)))
    if isinstance(quantizer, GridQuantizer):
        for name in quantizer.gradients():
            quantizer.set_gradient(name)
            check_step(device, quantizer, case.sample, quantizer)
    if case.can_be_pinned:
        pinned = device.copy(case.pinned())
        check_step(device, pinned, case.sample, pinned)
