"""Lower `QWeights`: embeddings, recurrent layers and attention, with their weights as codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from torchquant.deploy.integer.context import active_run
from torchquant.deploy.integer.tensor import IntegerTensor
from torchquant.deploy.lowering.qdq import acts_site, as_nodes
from torchquant.deploy.lowering.stand_in import PassesForTensor, StandIn
from torchquant.deploy.lowering.stored_weights import (
    AS_IT_IS,
    Stored,
    encoded_weight,
    from_order,
    picked_rows,
    rearranged,
    stored,
)
from torchquant.deploy.onnx.recurrent import gate_order, recurrent_nodes
from torchquant.qmodule import QWeights
from torchquant.qmodule.state import is_real
from torchquant.qmodule.weight_slots import quantizer_key
from torchquant.qmodule.weights import values_mapped

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class DeployWeights(StandIn):
    """Computes what a QWeights computes in QUANT_EVAL: its module, with codes that act as tensors for weights.

    The module computes in float32 from the values of the codes. For an embedding the file looks up rows of codes; LSTM,
    GRU and RNN are the ONNX operators, with weights in ONNX's order of gates.
    """

    def __init__(self, module: QWeights, path: str, keep_signed: bool = False) -> None:
        super().__init__(path, module.held)
        self.input = acts_site(module.input_quantizer, f"{path}.input", keep_signed)
        self.output = acts_site(module.acts_quantizer, f"{path}.output", keep_signed)
        layer = copy.deepcopy(module.layer)
        for slot in module.weight_slots():
            name, quantizer = slot.name, slot.quantizer
            if quantizer is None:
                continue
            weight = slot.seen()
            kept = encoded_weight(
                weight, quantizer, f"{path}: the quantizer of {name} ({type(quantizer).__name__})", path
            )
            if isinstance(layer, nn.RNNBase):
                order = gate_order(layer, len(weight))
                self._put(layer, name, stored(picked_rows(kept, order), from_order(order), keep_signed))
            elif name == "in_proj_weight":
                thirds = torch.arange(len(weight)).chunk(len(PROJECTIONS))
                self._put_apart(layer, [stored(picked_rows(kept, third), AS_IT_IS, keep_signed) for third in thirds])
            else:
                layout = AS_IT_IS if slot.is_stored_as_seen else rearranged(slot.stored_layout)
                self._put(layer, name, stored(kept, layout, keep_signed))
        if isinstance(layer, nn.RNNBase):  # its forward reads this list, not its parameters
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
            layer._flat_weight_refs = [None] * len(layer._flat_weights)
        self.layer = layer

    def _put(self, layer: nn.Module, name: str, codes: PassesForTensor) -> None:
        """Put the codes in place of the weight; registering them here gives them their names in the file."""
        owner_path, _, last = name.rpartition(".")
        owner = layer.get_submodule(owner_path)
        if parametrize.is_parametrized(owner, last):
            parametrize.remove_parametrizations(owner, last)
        owner._parameters.pop(last, None)
        owner.__dict__[last] = self._modules[quantizer_key(name)] = codes

    def _put_apart(self, layer: Any, parts: Sequence[PassesForTensor]) -> None:
        """Put three weights in place of one: no runtime has integer kernels for a weight that is split at run time."""
        layer._qkv_same_embed_dim = False
        for name, part in zip(PROJECTIONS, parts, strict=True):
            self._put(layer, name, part)
        self._put(layer, "in_proj_weight", Stacked(parts))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = active_run()
        if run is not None and run.checking:
            run.site = self.path
        args, kwargs = values_mapped(self.layer, args, kwargs, lambda values: [_on(self.input, x) for x in values])
        if run is not None:
            run.note_float(type(self.layer).__name__)
            args, kwargs = tree_map_only(IntegerTensor, IntegerTensor.real, (args, kwargs))
        y = self._computed(*args, **kwargs)
        if isinstance(y, tuple):
            return (_on(self.output, y[0]), *y[1:])
        return _on(self.output, y)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if not isinstance(layer, nn.RNNBase):
            return layer.forward(*args, **kwargs)
        if as_nodes():
            return recurrent_nodes(layer, self._by_gates, self.path, *args, **kwargs)
        own = layer._flat_weights
        layer._flat_weights = [w.real() if isinstance(w, PassesForTensor) else w for w in own]
        try:
            return layer.forward(*args, **kwargs)
        finally:
            layer._flat_weights = own

    def _by_gates(self, name: str) -> Tensor:
        found: Any = getattr(self.layer, name)
        if isinstance(found, Stored):
            return found.as_kept()
        tensor: Tensor = found[gate_order(self.layer, len(found))]
        return tensor


class Stacked(PassesForTensor):
    """A concatenation of stored tensors along axis 0."""

    def __init__(self, parts: Sequence[PassesForTensor]) -> None:
        super().__init__()
        self.parts = parts  # not children: each is registered elsewhere

    def real(self) -> Tensor:
        return torch.cat([part.real() for part in self.parts])


def _on(site: nn.Module, x: Any) -> Any:
    """Put x on the grid of a site, for a PackedSequence its data; a tensor that is not real is returned unchanged."""
    if isinstance(x, PackedSequence):
        return x._replace(data=site(x.data))
    return site(x) if is_real(x) else x
