"""GGUF files: the package gguf, with llama.cpp's own formulas, reads the values that the model computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchquant as tq
from torchquant.deploy import export_gguf
from torchquant.errors import ConfigError, ExportError
from torchquant.utils import weight_slots

gguf = pytest.importorskip("gguf")


def quantized(weight: str, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 24), nn.LayerNorm(24), nn.Linear(24, 5))
    model = tq.quantize(net, [{"names": ["0"], "weight": weight}], torch.ones(1, width))
    tq.observe_weights(model)
    return model


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    tensors = gguf.GGUFReader(path).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    return kinds, {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


@pytest.mark.parametrize(("weight", "kind"), [("qfmt:8,signed/group=32", "Q8_0"), ("qfmt:4,signed/group=32", "Q4_0")])
def test_the_values_are_those_of_the_model(weight: str, kind: str, tmp_path: Path) -> None:
    model = quantized(weight)
    path = export_gguf(model, tmp_path / "m.gguf", "llama", {"llama.block_count": 1}, {"0.weight": "output.weight"})
    kinds, values = read(path)
    slot = next(iter(weight_slots(model)))
    assert kinds["output.weight"] == kind
    assert torch.equal(values["output.weight"], slot.quantizer.quantize(slot.seen()))
    assert kinds["2.weight"] == "F32"
    assert torch.equal(values["2.weight"], model[2].weight)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.block_count"].contents() == 1


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("affine:8,symmetric=narrow/group=32", "Q8_0"),
        ("affine:4,symmetric=full/group=32", "Q4_0"),
        ("affine:3,symmetric=narrow/group=32", "Q4_0"),
        ("affine:4/group=32", "Q4_1"),
    ],
)
def test_scales_are_rounded_on_demand_only(weight: str, kind: str, tmp_path: Path) -> None:
    model = quantized(weight)
    with pytest.raises(ExportError, match="round_scales=True"):
        export_gguf(model, tmp_path / "m.gguf", "llama")
    assert not list(tmp_path.iterdir())
    kinds, values = read(export_gguf(model, tmp_path / "m.gguf", "llama", round_scales=True))
    slot = next(iter(weight_slots(model)))
    wanted = slot.quantizer.quantize(slot.seen())
    assert kinds["0.weight"] == kind
    assert (values["0.weight"] - wanted).abs().max() <= wanted.abs().max() / 1000
    assert not torch.equal(values["0.weight"], wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": "affine:4/channel"}, ExportError, "0.weight: Linear with AffineQuantizer"),
        ({"weight": "qfmt:8,signed/group=16"}, ExportError, "0.weight: Linear with"),
        ({"weight": "affine:10/group=32"}, ExportError, "Linear with GroupQuantizer .*which 8 bits do not hold"),
        ({"metadata": {"a": None}}, ConfigError, "metadata: a must be text"),
        ({"metadata": {"a": [1, "x"]}}, ConfigError, "a list of one kind of these"),
        ({"metadata": {"a": 2**64}}, ConfigError, "a number of at most 64 bits"),
        ({"names": {"7.weight": "x"}}, ConfigError, "has no 7.weight"),
        ({"names": {"0.weight": "2.weight"}}, ConfigError, "two tensors would be called 2.weight"),
    ],
)
def test_what_a_file_cannot_hold_is_named(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = quantized(options.pop("weight", "qfmt:8,signed/group=32"))
    with pytest.raises(error, match=message):
        export_gguf(model, tmp_path / "m.gguf", "llama", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1e-6, 1e8])
def test_scales_that_half_precision_loses_are_refused(factor: float, tmp_path: Path) -> None:
    model = quantized("affine:8,symmetric=narrow/group=32")
    model[0].layer.weight.data.mul_(factor)
    tq.observe_weights(model)
    with pytest.raises(ExportError, match="half precision, which ends at 65504 and loses digits below 6e-5"):
        export_gguf(model, tmp_path / "m.gguf", "llama", round_scales=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value", [7, -7, 2**40, -(2**40), True, 0.5, "text", [1, 2], [3, -4], ["a", "b"], [True], [0.5]]
)
def test_metadata_is_read_back(value: Any, tmp_path: Path) -> None:
    path = export_gguf(quantized("qfmt:8,signed/group=32"), tmp_path / "m.gguf", "llama", {"llama.key": value})
    assert gguf.GGUFReader(path).fields["llama.key"].contents() == value
