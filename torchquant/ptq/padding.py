"""Which tokens of a batch are no padding, for every module: those of the encoder, or those of the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._modes import in_mode
from torchquant.graph.called import tensors_in
from torchquant.graph.calls import arguments_of
from torchquant.graph.recording import call_with
from torchquant.qmodule import QModuleState
from torchquant.utils import qmodule_state

DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""The arguments of a model from which the tokens of its decoder come."""


@dataclass(frozen=True)
class Padding:
    """The tokens of one batch that are no padding, (N, tokens) bool; None if all are.

    `tokens`: by the `attention_mask`; `decoder_tokens`: by the `decoder_attention_mask`. `of_decoder`: paths of the
    modules whose input comes from the tokens of a decoder.
    """

    tokens: Tensor | None = None
    decoder_tokens: Tensor | None = None
    of_decoder: frozenset[str] = frozenset()

    def at(self, path: str) -> Tensor | None:
        """Return the tokens that count for the inputs of a module.

        >>> padding = Padding(torch.tensor([[True, False]]), None, frozenset({"decoder"}))
        >>> padding.at("encoder"), padding.at("decoder")
        (tensor([[ True, False]]), None)
        """
        return self.decoder_tokens if path in self.of_decoder else self.tokens


def paddings(model: nn.Module, batches: Sequence[Any]) -> list[Padding]:
    """Find the padding of each batch, by the arguments of the model named `attention_mask`, `decoder_attention_mask`.

    Where a batch has tokens of a decoder too, the model runs twice on the first such batch, with other tokens the
    second time: what changes at the input of a module has to do with the decoder, whatever the modules are called.
    """
    given = [_named(model, batch) for batch in batches]
    masks = [(_mask(one.get("attention_mask")), _mask(one.get("decoder_attention_mask"))) for one in given]
    both = (i for i, one in enumerate(given) if masks[i] != (None, None) and any(name in one for name in DECODER))
    first = next(both, None)
    of_decoder = frozenset[str]() if first is None else _readers_of_decoder(model, given[first])
    return [Padding(*each, of_decoder) for each in masks]


def _named(model: nn.Module, batch: Any) -> dict[str, Any]:
    args, kwargs = arguments_of(batch)
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in named.items() if value is not None}


def _mask(value: Any) -> Tensor | None:
    return value.to(torch.bool) if isinstance(value, Tensor) and value.ndim == 2 else None


def _readers_of_decoder(model: nn.Module, given: Mapping[str, Any]) -> frozenset[str]:
    others = {name: _other_tokens(x) if name in DECODER and isinstance(x, Tensor) else x for name, x in given.items()}
    first, second = _first_inputs(model, given), _first_inputs(model, others)
    return frozenset(path for path, seen in first.items() if seen != second.get(path))


def _other_tokens(x: Tensor) -> Tensor:
    """Return other tokens, of the same vocabulary: numbers below 0, which mark what is left out, stay."""
    if x.is_floating_point() or not bool((x >= 0).any()):
        return 2 * x + 1 if x.is_floating_point() else x
    low, high = x[x >= 0].min(), x.max()
    mirrored = low + high - x if low != high else (x - 1).abs()
    return torch.where(x >= 0, mirrored, x)


@torch.no_grad()
def _first_inputs(model: nn.Module, given: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return sums over the first input of each module, in its first call."""
    found: dict[str, list[float]] = {}
    handles = []
    for path, module in model.named_modules():

        def keep(m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            x = next(tensors_in((*args, *kwargs.values())), None)
            if path not in found and x is not None:
                wide = x.detach().to(torch.float64)
                found[path] = [float(wide.sum()), float(wide.square().sum())]

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with qmodule_state(model, QModuleState.BYPASSED), in_mode(False, model):
            call_with(model, dict(given), "a batch")
    finally:
        for handle in handles:
            handle.remove()
    return found
