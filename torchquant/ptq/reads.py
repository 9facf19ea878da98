"""Collect what each weight multiplies, as rows of numbers: the input of a layer, or values inside a module.

`READERS` has one function per class with several weights; in a module of any other class the products of the weight
are watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.ptq.functional.gram import conv_rows, linear_rows, transposed_conv_rows
from torchquant.ptq.layer import Rows
from torchquant.ptq.recurrence import layer_input, states_before
from torchquant.qmodule import QWeights, WeightSlot
from torchquant.qmodule.own_forward import inputs_of_products, read_of_product
from torchquant.qmodule.patterns import InputFirstPattern, run_with, stock_type
from torchquant.qmodule.weight_slots import LayerSlot, parameter_of, weights_pattern

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call of a QModule."""


def rows_read(slot: WeightSlot, call: Call, mask: Tensor | None = None, most_rows: int | None = None) -> Iterator[Rows]:
    """Yield the input rows of a weight when its module is called, in blocks.

    mask: (N, tokens) bool, true for the tokens that count; used for inputs with these first two axes. most_rows: a
    layer that reads more gives about so many of them, spread evenly; modules with several weights give all. Raises
    ConfigError if the module uses the weight for something else than products with it.
    """
    args, kwargs = call
    if isinstance(slot, LayerSlot):
        x = args[0] if args else next(iter(kwargs.values()))
        yield from _product_rows(slot.module, x, _matching(mask, x), most_rows)
        return
    module: QWeights = slot.module
    args, kwargs = module.quantized_inputs(args, kwargs)
    kind = stock_type(module.layer)
    read = next((reader for above, reader in READERS.items() if issubclass(kind, above)), _watched_rows)
    yield read(module, slot.name, (args, kwargs), mask)


def paired_rows(
    slot: WeightSlot,
    call: Call,
    real: WeightSlot,
    real_call: Call | None,
    mask: Tensor | None = None,
    most_rows: int | None = None,
) -> Iterator[tuple[Rows, Rows | None]]:
    """Yield rows of the quantized and of the float module in pairs; None for the second without a call of it."""
    if real_call is None:
        for rows in rows_read(slot, call, mask, most_rows):
            yield rows, None
        return
    if slot.name in _stacks_of(slot.module.layer):  # which tokens go to which matrix is decided by the quantized model
        values = _given(real.module.layer, real_call)
        names = weights_pattern(slot.module.layer).values  # type: ignore[union-attr]
        real_call = ((), {**_given(slot.module.layer, call), **{name: values[name] for name in names}})
    found = rows_read(slot, call, mask, most_rows), rows_read(real, real_call, mask, most_rows)
    yield from zip(*found, strict=True)


def uses_of(slot: WeightSlot, call: Call, mask: Tensor | None = None) -> Tensor | None:
    """Count how often each row of a table is looked up in a call, (rows,); None for a weight that is multiplied.

    Of an EmbeddingBag each index counts once: that the rows of a bag are added is left out.
    """
    if isinstance(slot, LayerSlot) or not issubclass(stock_type(slot.module.layer), nn.Embedding | nn.EmbeddingBag):
        return None
    table = slot.module.layer
    indices = _given(table, call)["input"]
    if mask is not None and mask.shape == indices.shape:
        indices = indices[mask]
    uses = torch.bincount(indices.flatten(), minlength=len(slot.weight))
    if isinstance(table, nn.EmbeddingBag) and table.padding_idx is not None:
        uses[table.padding_idx] = 0
    return uses


def _matching(mask: Tensor | None, x: Any) -> Tensor | None:
    """Return the mask if it is that of the first axes of x, (N, tokens, features) or (N * tokens, features)."""
    if mask is None or not isinstance(x, Tensor):
        return None
    if x.ndim == 2 and len(x) == mask.numel():
        return mask.flatten()
    return mask if x.ndim == 3 and x.shape[:2] == mask.shape else None


def _given(layer: nn.Module, call: Call) -> dict[str, Any]:
    """Return the arguments of a call by the names that the forward of the layer has for them."""
    return inspect.signature(layer.forward).bind(*call[0], **call[1]).arguments


def _product_rows(wrapper: Any, x: Tensor, keep: Tensor | None, most_rows: int | None) -> Iterator[Tensor]:
    """Yield the input rows of the product in a wrapped layer."""
    x = wrapper.quantized_input(x)
    if isinstance(wrapper.row, InputFirstPattern):
        yield linear_rows(x, keep, most_rows)
        return
    function, x, geometry = read_of_product(lambda: wrapper.layer.forward(x))
    if function.__name__ == "linear":
        yield linear_rows(x, keep, most_rows)
        return
    kernel = wrapper.weight_slots()[0].seen().shape[2:]
    batch = x if x.ndim == len(kernel) + 2 else x[None]
    rows = transposed_conv_rows if "transpose" in function.__name__ else conv_rows
    yield from rows(batch, kernel, **geometry, most_rows=most_rows)


def _recurrent_rows(module: QWeights, name: str, call: Call, mask: Tensor | None) -> Rows:
    layer, weights, given = module.layer, module.weights_in_use(), _given(module.layer, call)
    keep = _matching(mask, given["input"])
    read = layer_input if name.startswith("weight_ih") else states_before
    return linear_rows(read(layer, weights, name, given["input"], given.get("hx"), keep))


def _cell_rows(module: QWeights, name: str, call: Call, mask: Tensor | None) -> Rows:
    given = _given(module.layer, call)
    x, state = given["input"], given.get("hx")
    if name == "weight_ih":
        return linear_rows(x)
    if state is None:
        return linear_rows(x.new_zeros(*x.shape[:-1], module.layer.hidden_size))
    return linear_rows(state[0] if isinstance(state, tuple) else state)


def _bilinear_rows(module: QWeights, name: str, call: Call, mask: Tensor | None) -> Rows:
    given = _given(module.layer, call)
    left, right = given["input1"], given["input2"]
    return linear_rows((left[..., :, None] * right[..., None, :]).flatten(-2), _matching(mask, left))


def _attention_rows(module: QWeights, name: str, call: Call, mask: Tensor | None) -> Rows:
    """Rows of an attention: its query, key and value, or what its heads give, which it is run for.

    Padding tokens of its `key_padding_mask` are left out, also of the query if that is the key.
    """
    layer, given = module.layer, _given(module.layer, call)
    inputs = [given[name] for name in ("query", "key", "value")]
    padding, is_batch_first = given.get("key_padding_mask"), layer.batch_first

    def rows(x: Tensor, of: Tensor) -> Tensor:
        keep = _matching(mask, of)
        if padding is not None and (of is given["key"] or of is given["value"]):
            keep = padding.logical_not() if padding.dtype == torch.bool else padding.isfinite()
            keep = keep.mT if keep.ndim == 2 and not is_batch_first else keep
        return linear_rows(x, keep)

    if name == "out_proj.weight":
        size, bias = layer.out_proj.weight, layer.out_proj.bias
        plain = {name: torch.eye(len(size), dtype=size.dtype, device=size.device)}
        plain |= {} if bias is None else {"out_proj.bias": torch.zeros_like(bias)}
        return rows(run_with(layer, module.weights_in_use() | plain, *call[0], **call[1])[0], given["query"])
    if name == "in_proj_weight":
        return [rows(x, x) for x in inputs]
    x = inputs["qkv".index(name[0])]
    return rows(x, x)


def _watched_rows(module: QWeights, name: str, call: Call, mask: Tensor | None) -> Rows:
    """Rows of a weight in a class of one's own; of a stack of matrices a block for each.

    A decorator of the forward that runs something faster in its place is passed by.
    """
    layer, weights = module.layer, module.weights_in_use()
    weight = weights.get(name, parameter_of(layer, name)).detach().clone()
    others: dict[str, Any] = {**weights, name: weight}
    if "forward" not in layer.__dict__:
        others["forward"] = MethodType(inspect.unwrap(type(layer).forward), layer)
    row = weights_pattern(layer)
    is_stack, is_transposed = row is not None and name in row.stacks, row is not None and name in row.transposed
    if is_stack and mask is not None:
        given = _given(layer, call)
        n = mask.numel()
        call = (), {k: x[mask.flatten()] if isinstance(x, Tensor) and len(x) == n else x for k, x in given.items()}
    found = inputs_of_products(weight, lambda: run_with(layer, others, *call[0], **call[1]), is_transposed)
    blocks = {i: torch.cat([linear_rows(x, _matching(mask, x)) for x in inputs], 1) for i, inputs in found.items()}
    none = weight.new_zeros(1, 0, weight.shape[-2 if is_transposed else -1])
    return [blocks.get(i, none) for i in range(len(weight))] if is_stack else blocks[0]


def _stacks_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of a module that are stacks of matrices."""
    row = weights_pattern(layer)
    return () if row is None else row.stacks


READERS: dict[type[nn.Module], Callable[[QWeights, str, Call, Tensor | None], Rows]] = {
    nn.RNNBase: _recurrent_rows,
    nn.RNNCellBase: _cell_rows,
    nn.Bilinear: _bilinear_rows,
    nn.MultiheadAttention: _attention_rows,
}
"""Torch class -> what reads the input rows of one of its weights."""
