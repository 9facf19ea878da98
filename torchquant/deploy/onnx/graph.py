"""Finish the exported graph: pack narrow weights, write look-ups, name tensors and nodes after sites."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torchquant.deploy.lowering.qdq import BLOCK, LOOK_UP, SITE, UINT8
from torchquant.deploy.lowering.stored_weights import Stored, stored_bits
from torchquant.deploy.onnx.float_weights import keep_float_weights
from torchquant.deploy.onnx.keep_apart import keep_apart
from torchquant.deploy.onnx.operators import RUNTIME_MOVES, STOPPING
from torchquant.deploy.onnx.tokens import multiply_tokens_in_integers
from torchquant.errors import require

MODULE_PATH_KEY = "pkg.torch.onnx.name_scopes"
PACKED_OPSET = {2: 25, 4: 21, 8: 20}
"""ONNX operator set that brought the type of so many bits. 20 where 8 suffice: older runtimes read it."""
BLOCK_OPSET = 21
"""ONNX operator set that brought a scale for each block of codes."""
IR_VERSION = {20: 10, 21: 10, 25: 13}


def finish_graph(proto: Any, form: Any) -> None:
    """Run every step of this file on the graph, in place. form: the lowered model that was exported."""
    onnx = require("onnx", "deploy")
    tokens = _name_codes(proto)
    _write_look_ups(proto, onnx)
    _quantize_behind_moves(proto, onnx)
    multiply_tokens_in_integers(proto, onnx, tokens)
    keep_apart(proto)
    _own_weights(proto)
    keep_float_weights(proto, onnx)
    opsets = [PACKED_OPSET[bits] for bits in _pack_weights(proto, form, onnx)]
    opset = max([PACKED_OPSET[8], *opsets, *(BLOCK_OPSET for node in proto.graph.node if _has_blocks(node))])
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = max(opset, entry.version)
            proto.ir_version = max(proto.ir_version, IR_VERSION.get(entry.version, 13))
    for i in reversed([i for i, e in enumerate(proto.opset_import) if e.domain == LOOK_UP.partition("::")[0]]):
        del proto.opset_import[i]
    for node in proto.graph.node:
        path = module_path(node)
        del node.metadata_props[:]
        if path:
            node.metadata_props.add(key="site", value=path)
    for entry in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del entry.metadata_props[:]


def _has_blocks(node: Any) -> bool:
    return any(attribute.name == BLOCK for attribute in node.attribute)


def module_path(node: Any) -> str:
    """Return the path of the module whose forward made the node, as the exporter recorded it."""
    noted = {entry.key: entry.value for entry in node.metadata_props}.get(MODULE_PATH_KEY)
    return str(ast.literal_eval(noted)[-2]) if noted else ""


def _rename(proto: Any, names: dict[str, str]) -> None:
    """Rename tensors in a graph."""
    for node in proto.graph.node:
        for ends in (node.input, node.output):
            for i, name in enumerate(ends):
                ends[i] = names.get(name, name)
    for entry in (*proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        entry.name = names.get(entry.name, entry.name)


IS_CODES = re.compile(r"\.codes(\.\d+)?$")


def code_name(site: str, call: int) -> str:
    """Return the name of the tensor with the codes of a site in its nth call, counted from 0."""
    return f"{site}.codes" if call == 0 else f"{site}.codes.{call}"


def _name_codes(proto: Any) -> dict[str, int]:
    """Name the codes of activations after their site, as recorded on the node; clipped codes after the clip's site.

    Returns the codes of tokens, which a Cast makes, with their zero points.
    """
    readers = {name: node for node in proto.graph.node for name in node.input}
    calls: Counter[str] = Counter()
    names: dict[str, str] = {}
    tokens: dict[str, int] = {}
    for node in proto.graph.node:
        noted = [i for i, attribute in enumerate(node.attribute) if attribute.name == SITE]
        if not noted:
            continue
        site = node.attribute.pop(noted[0]).s.decode()
        reader = readers[node.output[0]]
        codes = reader.output[0] if reader.op_type == "Clip" else node.output[0]
        names[codes] = code_name(site, calls[site])
        calls[site] += 1
        if node.op_type == "Cast":
            tokens[names[codes]] = 128 if any(a.name == "to" and a.i == UINT8 for a in node.attribute) else 0
    _rename(proto, names)
    return tokens


def _write_look_ups(proto: Any, onnx: Any) -> None:
    """Write a Cast, an Add of the rows if there are any, and a Gather for each look-up."""
    helper, nodes = onnx.helper, []
    for node in proto.graph.node:
        if node.op_type != LOOK_UP.rpartition("::")[2]:
            nodes.append(node)
            continue
        levels, codes, *rows = node.input
        index = f"{node.output[0]}.index"  # one tensor of codes may be looked up in several tables
        nodes.append(helper.make_node("Cast", [codes], [index], to=onnx.TensorProto.INT64))
        if rows:
            nodes.append(helper.make_node("Add", [index, rows[0]], [f"{index}.row"]))
            index = f"{index}.row"
        nodes.append(helper.make_node("Gather", [levels, index], list(node.output)))
    _replace_nodes(proto, nodes)


def _quantize_behind_moves(proto: Any, onnx: Any) -> None:
    """Quantize the results of a Split, a Pad or another of `STOPPING` on the same grid again; no value changes.

    ONNX Runtime moves codes through operators that only reorder values, but through these only where both ends are
    codes; without this step the layers behind them compute in float32.
    """

    def pads_on_grid(node: Any, stored: dict[str, Any]) -> bool:
        """Tell whether a Pad adds only zeros or values of its input."""
        name = node.input[2] if len(node.input) > 2 else ""
        return not name or (name in stored and not onnx.numpy_helper.to_array(stored[name]).any())

    stored = {entry.name: entry for entry in proto.graph.initializer}
    made_by = {out: node for node in proto.graph.node for out in node.output}
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        source = made_by.get(node.input[0]) if node.op_type in STOPPING else None
        while source is not None and source.op_type in RUNTIME_MOVES:
            source = made_by.get(source.input[0])
        if source is None or source.op_type != "DequantizeLinear" or any(a.name == "axis" for a in source.attribute):
            continue
        if node.op_type == "Pad" and not pads_on_grid(node, stored):
            continue
        grid = source.input[1:]
        for i, real in enumerate(list(node.output)):
            node.output[i] = f"{real}.moved"
            nodes.append(onnx.helper.make_node("QuantizeLinear", [node.output[i], *grid], [f"{real}.quantized"]))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [f"{real}.quantized", *grid], [real]))
    _replace_nodes(proto, nodes)


def _replace_nodes(proto: Any, nodes: Iterable[Any]) -> None:
    kept = list(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _own_weights(proto: Any) -> None:
    """Give each reader of a weight codes and a zero point of its own.

    The exporter merges equal initializers, and a layer that is called twice has two readers. ONNX Runtime's precise
    mode (see `run.py`) converts a weight and its zero point from int8 to uint8, and stops at one that it has converted.
    """
    initializers = {entry.name: entry for entry in proto.graph.initializer}

    def copied(name: str, new_name: str) -> str:
        if new_name not in initializers:
            entry = proto.graph.initializer.add()
            entry.CopyFrom(initializers[name])
            entry.name = new_name
            initializers[new_name] = entry
        return new_name

    readers = [(reader, i) for reader in proto.graph.node for i in range(len(reader.input))]
    taken: Counter[str] = Counter()
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        codes = node.input[0] if node.op_type == "DequantizeLinear" else ""
        if codes not in initializers or len(node.input) < 3:
            continue
        real, zero_point = node.output[0], node.input[2]
        for n, (reader, place) in enumerate([(r, i) for r, i in readers if r.input[i] == real]):
            if n > 0:
                node = type(node).FromString(node.SerializeToString())
                node.output[0] = reader.input[place] = f"{real}.{n}"
                node.name = f"{node.name}.{n}"
                nodes.append(node)
            node.input[0] = copied(codes, code_name(codes.removesuffix(".codes"), taken[codes]))
            node.input[2] = copied(zero_point, node.input[0].replace(".codes", ".zero_point"))
            taken[codes] += 1
    _replace_nodes(proto, nodes)


def _pack_weights(proto: Any, form: Any, onnx: Any) -> list[int]:
    """Store codes of at most 4 bits in 4 or 2 bits, followed by a Cast. Returns the widths that occurred.

    ONNX Runtime computes the Cast when it loads the file, and then uses its integer kernels as for 8 bits; it converts
    4-bit codes that a DequantizeLinear reads directly to float.
    """
    types = onnx.TensorProto
    packed = {(2, True): types.INT2, (2, False): types.UINT2, (4, True): types.INT4, (4, False): types.UINT4}
    initializers = {entry.name: entry for entry in proto.graph.initializer}
    widths, casts = [], []
    modules = form.named_modules(remove_duplicate=False)
    weights = {name for name, module in modules if isinstance(module, Stored)}
    for name, entry in initializers.items():
        if not IS_CODES.search(name) or IS_CODES.sub("", name) not in weights:
            continue
        codes = onnx.numpy_helper.to_array(entry)
        low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
        bits = stored_bits(low, high)
        if bits == 8:
            continue
        widths.append(bits)
        kind, narrow = entry.data_type, packed[bits, low < 0]
        entry.CopyFrom(onnx.helper.make_tensor(name, narrow, codes.shape, codes.flatten().tolist()))
        readers = [node for node in proto.graph.node if name in node.input]
        if any(node.op_type == "Cast" for node in readers):
            continue
        casts.append(onnx.helper.make_node("Cast", [name], [f"{name}.cast"], to=kind))
        for node in readers:
            node.input[list(node.input).index(name)] = f"{name}.cast"
    stored = {entry.name for entry in proto.graph.initializer}
    for i in reversed([i for i, entry in enumerate(proto.graph.value_info) if entry.name in stored]):
        del proto.graph.value_info[i]
    if casts:
        _replace_nodes(proto, [*casts, *proto.graph.node])
    return widths
