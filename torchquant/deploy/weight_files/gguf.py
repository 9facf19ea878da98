"""Write GGUF files, which llama.cpp and its relatives read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_whole
from torchquant._shown import shown
from torchquant.deploy.weight_files.matrices import Matrix, split, uniform_matrix
from torchquant.errors import ConfigError, ExportError, require
from torchquant.qmodule.weight_slots import WeightSlot

BLOCK = 32
"""How many neighbours of a row share the numbers of a block, in every type written here."""
SIMPLE = {bool: "BOOL", str: "STRING", int: "INT64", float: "FLOAT32"}
"""Type of a value of metadata -> its type in the file; that of whole numbers depends on their range."""
ROUNDING = 2**-11
"""How far the numbers of a weight may be from their values in half precision, as a share of the largest of them."""
WHOLE = {"UINT32": (0, 2**32), "INT32": (-(2**31), 2**31), "UINT64": (0, 2**64), "INT64": (-(2**63), 2**63)}
"""The types of whole numbers in metadata, and their ranges; most keys have the first."""


@dataclass(frozen=True)
class Type:
    """A tensor type of GGUF. `holds(matrix)`: whether its codes hold a matrix. `pack(matrix)`: its blocks in bytes."""

    name: str
    holds: Callable[[Matrix], bool]
    pack: Callable[[Matrix], Tensor]


@checked
@torch.no_grad()
def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    round_scales: bool = False,
) -> Path:
    """Write a model whose linear layers have 4- or 8-bit weights in groups of 32 as a GGUF file. Returns its path.

    model: a calibrated float32 model with float activations. Weights of symmetric uniform schemes become Q4_0 (codes
    -8..7) or Q8_0 ("affine:8,symmetric=narrow/group=32"), others of 4 bits ("affine:4/group=32") Q4_1. All other
    tensors are written in float32. architecture: `general.architecture` of the file. metadata: further keys. names: key
    of the float model -> name in the file, as llama.cpp expects them ("blk.0.attn_q.weight"); others keep theirs.
    Tokenizers and hyperparameters are not added: give them as `metadata`, or add them with the tools of llama.cpp.

    GGUF keeps the scale of a block in half precision. A scale that has no such value is refused, unless
    `round_scales`: then the file holds the codes of the model with rounded scales, values that differ from the model's
    by up to 0.1 % of the largest. Needs the extra `gguf`. Raises ExportError that names what the format cannot hold,
    ConfigError for names or metadata that it does not take, MissingDependencyError. Source: github.com/ggml-org/ggml,
    docs/gguf.md.

    >>> import tempfile
    >>> from torchquant import observe_weights, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(64, 8)), [{"weight": "qfmt:8,signed/group=32"}])
    >>> observe_weights(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export_gguf(model, f"{folder}/model.gguf", "mine", names={"0.weight": "output.weight"})
    ...     file.read_bytes()[:4]
    b'GGUF'
    """
    gguf = require("gguf", "gguf")
    parts = split(model, "GGUF", _matrix_of(round_scales))
    tensors: dict[str, Tensor | Matrix] = {**parts.floats, **parts.matrices}
    if unknown := sorted(set(names or {}) - set(tensors)):
        raise ConfigError(f"names: {type(model).__name__} has no {', '.join(unknown[:3])}; it has {', '.join(tensors)}")
    called = {key: (names or {}).get(key, key) for key in tensors}
    if twice := [name for name, n in Counter(called.values()).items() if n > 1]:
        raise ConfigError(f"names: two tensors would be called {', '.join(twice[:3])}; give each a name of its own")
    types = {key: _type_of(gguf, key, value) for key, value in (metadata or {}).items()}

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(os.fspath(temporary), architecture)
        for key, value in (metadata or {}).items():
            writer.add_key_value(key, value, *types[key])
        for key, tensor in tensors.items():
            if isinstance(tensor, Matrix):
                kind = _kind_of(tensor)
                assert kind is not None
                packed = kind.pack(tensor).cpu().numpy()
                writer.add_tensor(called[key], packed, raw_dtype=gguf.GGMLQuantizationType[kind.name])
            else:
                writer.add_tensor(called[key], tensor.detach().to(torch.float32).cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(target, write)


def _type_of(gguf: Any, key: str, value: Any) -> tuple[Any, Any]:
    """Return the types of a value of the metadata and of its elements."""
    types, elements = gguf.GGUFValueType, value if isinstance(value, list | tuple) else [value]
    kinds = {next((kind for kind in SIMPLE if isinstance(element, kind)), None) for element in elements}
    if kinds == {int}:
        fitting = [k for k, (low, end) in WHOLE.items() if low <= min(elements) and max(elements) < end]
    else:
        fitting = [SIMPLE[kind] for kind in kinds if kind is not None]
    if len(kinds) != 1 or not fitting:
        raise ConfigError(
            f"metadata: {key} must be text, a number of at most 64 bits, a bool or a list of one kind of these, got "
            f"{shown(value)}"
        )
    kind = types[fitting[0]]
    return (types.ARRAY, kind) if elements is value else (kind, None)


def _matrix_of(round_scales: bool) -> Callable[[WeightSlot], Matrix | None]:
    def to_matrix(slot: WeightSlot) -> Matrix | None:
        matrix = uniform_matrix(slot)
        if matrix is None or matrix.size != BLOCK or _kind_of(matrix) is None:
            return None
        numbers = [matrix.scale, _lowest(matrix)] if _kind_of(matrix) is TYPES[-1] else [matrix.scale]
        away = [float((number.half().float() - number).abs().max()) for number in numbers]
        if any(away) and not round_scales:
            raise ExportError(
                "GGUF keeps the scale and the lowest value of a block in half precision, which cannot hold those of "
                "this weight. Give round_scales=True to write rounded ones; the values of the file then differ from "
                "the model's by up to 0.1 % of the largest. Powers of two are exact: qfmt:8,signed/group=32"
            )
        largest = [float(number.abs().max()) for number in numbers]
        if not all(off <= ROUNDING * number for off, number in zip(away, largest, strict=True)):
            raise ExportError(
                "GGUF keeps the scale and the lowest value of a block in half precision, which ends at 65504 and loses "
                f"digits below 6e-5; those of this weight go up to {', '.join(f'{number:.3g}' for number in largest)}"
            )
        return replace(matrix, scale=matrix.scale.half().float())

    return to_matrix


def _kind_of(matrix: Matrix) -> Type | None:
    return next((kind for kind in TYPES if kind.holds(matrix)), None)


def _lowest(matrix: Matrix) -> Tensor:
    return (matrix.low - matrix.zero_point) * matrix.scale


def _centred(matrix: Matrix) -> Tensor:
    """Return the codes counted from real 0, (N, K)."""
    return matrix.codes - matrix.zero_point.repeat_interleave(BLOCK, 1)


def _within(low: int, high: int) -> Callable[[Matrix], bool]:
    """Return a test whether codes counted from real 0 lie between two ends, with one zero point for all."""

    def holds(matrix: Matrix) -> bool:
        zero = int(matrix.zero_point.flatten()[0])
        return bool((matrix.zero_point == zero).all()) and low <= matrix.low - zero and matrix.high - zero <= high

    return holds


def _has_sixteen_codes(matrix: Matrix) -> bool:
    return matrix.high - matrix.low < 16


def _halves(numbers: Tensor) -> Tensor:
    """Return numbers (N, G) in half precision as bytes (N, G, 2)."""
    return numbers.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0..15 (N, G, 32) as bytes (N, G, 16): the first half of a block in the low bits."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _blocks(codes: Tensor) -> Tensor:
    return codes.unflatten(1, (-1, BLOCK))


def _q8_0(matrix: Matrix) -> Tensor:
    codes = _blocks(_centred(matrix)).to(torch.int8).view(torch.uint8)
    return torch.cat([_halves(matrix.scale), codes], -1).flatten(1)


def _q4_0(matrix: Matrix) -> Tensor:
    return torch.cat([_halves(matrix.scale), _nibbles(_blocks(_centred(matrix) + 8))], -1).flatten(1)


def _q4_1(matrix: Matrix) -> Tensor:
    codes = _nibbles(_blocks(matrix.codes - matrix.low))
    return torch.cat([_halves(matrix.scale), _halves(_lowest(matrix)), codes], -1).flatten(1)


TYPES = (
    Type("Q4_0", _within(-8, 7), _q4_0),
    Type("Q8_0", _within(-128, 127), _q8_0),
    Type("Q4_1", _has_sixteen_codes, _q4_1),
)
"""The types by preference; the first that holds a matrix is taken."""
