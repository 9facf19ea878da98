"""Write a folder that transformers and vLLM load with the library compressed-tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import write_json, write_whole
from torchquant.deploy.weight_files.matrices import Matrix, Split, split, tied_keys, uniform_matrix
from torchquant.errors import ConfigError, ExportError, require

FORMAT = "pack-quantized"
WIDTHS = (4, 8)
"""The widths that runtimes compute; narrower codes are stored in the next one."""


@checked
@torch.no_grad()
def export_compressed_tensors(
    model: nn.Module, folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> Path:
    """Write the weights of linear layers as packed codes in a folder that `from_pretrained` and vLLM read.

    model: a calibrated float32 model whose linear layers have uniform weights of at most 8 bits, per tensor, channel or
    group of inputs ("affine:4,symmetric=narrow/group=128"), and whose activations are float. config: what `config.json`
    holds beside the quantization; by default that of a model of transformers. The values of the file are those of the
    quantizers, bit for bit, in float32; a runtime may round them to its own type. Weights with zero points are stored
    as the library stores them, but transformers (5.24) does not load these; symmetric ones it does.

    The folder gets `config.json` and `model.safetensors`; a file that exists is replaced. Needs the extra `deploy`.
    Source: the format "pack-quantized" of github.com/vllm-project/compressed-tensors. It is one file, however large.

    Raises ExportError that names what the format cannot hold, ConfigError without a config,
    MissingDependencyError.

    >>> import tempfile
    >>> from torchquant import observe_weights, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(64, 8)), [{"weight": "affine:4,symmetric=narrow/group=32"}])
    >>> observe_weights(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in export_compressed_tensors(model, folder, config={}).iterdir())
    ['config.json', 'model.safetensors']
    """
    safetensors = require("safetensors.torch", "deploy")
    settings = _config_of(model, config)
    parts = split(model, "compressed-tensors", uniform_matrix)
    if "weight" in parts.matrices:
        raise ExportError(
            "the model is one layer, and the format names layers by their place; export nn.Sequential(net)"
        )
    tensors: dict[str, Tensor] = {}
    for key, matrix in parts.matrices.items():
        name = key.removesuffix(".weight")
        tensors |= {f"{name}.{end}": tensor for end, tensor in _packed(matrix).items()}
    ties = tied_keys(parts.floats)
    ties_are_config = bool(settings.get("tie_word_embeddings"))
    if ties_are_config and not _is_tied(model, ties):
        settings["tie_word_embeddings"] = ties_are_config = False
    for key, tensor in parts.floats.items():
        if key not in ties or not ties_are_config:  # copied: safetensors refuses tensors that share memory
            tensors[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    settings["quantization_config"] = _quantization(parts)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / "model.safetensors", lambda t: safetensors.save_file(tensors, t, {"format": "pt"}))
    write_json(target / "config.json", json.loads(json.dumps(settings, default=str)))
    return target


def _config_of(model: nn.Module, config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is not None:
        return dict(config)
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_dict"):
        raise ConfigError(
            f"{type(model).__name__} has no config of transformers; give `config`, the contents of config.json"
        )
    settings: dict[str, Any] = own.to_dict()
    settings.pop("quantization_config", None)
    return {**settings, "architectures": [type(model).__name__]}


def _is_tied(model: nn.Module, ties: Mapping[str, str]) -> bool:
    """Tell whether every weight that the model ties is a float tensor of the file, so that loading ties it again."""
    names = getattr(model, "_tied_weights_keys", None) or ()
    return all(name in ties or name in ties.values() for name in names)


def _packed(matrix: Matrix) -> dict[str, Tensor]:
    """Return the tensors of a matrix, by the ends of their names."""
    width = _width(matrix)
    shift = 2 ** (width - 1) if matrix.low >= 0 else 0  # codes and zero points of the format are signed
    tensors = {
        "weight_packed": pack_words(matrix.codes - shift, width),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if not _is_symmetric(matrix, shift):
        tensors["weight_zero_point"] = pack_words((matrix.zero_point - shift).T, width).T.contiguous()
    return tensors


def pack_words(codes: Tensor, width: int) -> Tensor:
    """Pack signed codes (N, K) of 4 or 8 bits into int32 (N, ceil(K * width / 32)), the first in the lowest bits.

    >>> [hex(word) for word in pack_words(torch.arange(-8, 0)[None], 4)[0].tolist()]
    ['0x76543210']
    """
    per_word = 32 // width
    codes = nn.functional.pad(codes.to(torch.int64) + 2 ** (width - 1), (0, -codes.shape[1] % per_word))
    places = torch.arange(per_word) * width
    words = (codes.unflatten(1, (-1, per_word)) << places).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _width(matrix: Matrix) -> int:
    bits = max(matrix.high, -matrix.low - 1).bit_length() + (matrix.low < 0)
    return next(width for width in WIDTHS if bits <= width)


def _is_symmetric(matrix: Matrix, shift: int) -> bool:
    return bool((matrix.zero_point == shift).all())


def _quantization(parts: Split) -> dict[str, Any]:
    """Return `quantization_config` of config.json: one group for each form of weight."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for key, matrix in parts.matrices.items():
        groups.setdefault(tuple(_weights(matrix).items()), []).append(key.removesuffix(".weight"))
    linear = {key.removesuffix(".weight") for key in parts.floats if key.endswith(".weight")}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": names, "weights": dict(weights)}
            for i, (weights, names) in enumerate(groups.items())
        },
        "ignore": sorted(linear),
    }


def _weights(matrix: Matrix) -> dict[str, Any]:
    width = _width(matrix)
    grouped = matrix.size < matrix.codes.shape[1]
    return {
        "num_bits": width,
        "type": "int",
        "symmetric": _is_symmetric(matrix, 2 ** (width - 1) if matrix.low >= 0 else 0),
        "strategy": "group" if grouped else "channel",
        "group_size": matrix.size if grouped else None,
    }
