"""Lean training: a model keeps the codes of its activations for backward, not the floats that they stand for."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from torchquant._arguments import checked
from torchquant.qmodule.recorder import LeanRecorder, unpack
from torchquant.quantizers_functional._gradient import is_traced
from torchquant.quantizers_functional._recording import current_recorder, set_recorder


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, tuple[LeanRecorder, saved_tensors_hooks] | None]] = []


_OF_THREAD = _OfThread()


@dataclass(frozen=True)
class _Begin:
    """The hook before the forward of a lean model."""

    recompute: bool

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or is_traced():
            return
        begun = None
        if (
            torch.is_grad_enabled()
            and current_recorder() is None
            and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
            and torch._C._functorch.peek_interpreter_stack() is None
        ):
            recorder = LeanRecorder(self.recompute)
            hooks = saved_tensors_hooks(recorder.pack, unpack)
            hooks.__enter__()
            set_recorder(recorder)
            begun = recorder, hooks
        _OF_THREAD.entered.append((module, begun))


@dataclass(frozen=True)
class _End:
    """The hook after the forward of a lean model, also after one that failed."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        entered = _OF_THREAD.entered
        if torch.compiler.is_compiling() or not entered or entered[-1][0] is not module:
            return  # it began in compiled or traced code
        _, begun = entered.pop()
        if begun is not None:
            recorder, hooks = begun
            set_recorder(None)
            hooks.__exit__()
            recorder.finish()


@checked
def set_lean(model: nn.Module, lean: bool = True, recompute: bool = False) -> None:
    """Let the forwards of a model keep codes for backward in place of floats; `tq.quantize` makes lean models.

    A layer whose input was quantized keeps its codes: one byte for each element, less at 4 bits and fewer. Quantized
    weights are computed again from the parameters. What several layers read is kept once. Gradients are equal, bit for
    bit. The number of codes is at most 256; other tensors are kept as they are, those of formats whose blocks or tokens
    have levels of their own among them.

    `recompute`: backward runs the layers again whose results their batch norm or activation needs, instead of keeping
    these results: less memory, and one more forward of these layers. On an accelerator the two runs are equal only
    where its kernels are deterministic, see `torch.use_deterministic_algorithms`.

    It works where the model itself is called, `model(x)`, also inside of DistributedDataParallel, `fully_shard` and
    another module; what needs weights of another shard is kept as it is. It changes no number and is not in the
    state_dict. In compiled code the compiler chooses what is kept. A TransformerEncoderLayer that is itself the
    quantized model is not lean unasked: hooks on it switch off its fused path in evaluation.

    >>> import torchquant as tq
    >>> model = tq.quantize(nn.Linear(4, 2), "w8a8")
    >>> tq.set_lean(model, False)
    """
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Begin | _End)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if lean:
        model.register_forward_pre_hook(_Begin(recompute))
        model.register_forward_hook(_End(), always_call=True)
