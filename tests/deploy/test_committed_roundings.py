"""A rounding that was committed is in every file: packed, ONNX, and what the certificate compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchquant as tq
from tests.deploy.test_onnx_export import small_net
from tests.deploy.test_packed import ready, through_a_file
from torchquant.deploy import certify, export_onnx
from torchquant.deploy.packed.weight_codes import CodesQuantizer
from torchquant.utils import weight_slots

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
SPECS = ("mxfp4", "nvfp4", "affine:3/group=7", "twn/channel", "lsq:3/channel", "apot:4", "residual:2", "codebook:3")


def committed(model: nn.Module) -> dict[str, Tensor]:
    """The levels that every quantized weight was rounded to, up or down by chance, by the name of the weight."""
    generator, found = torch.Generator().manual_seed(0), {}
    for slot in weight_slots(model):
        if slot.quantizer is not None:
            slot.quantizer.pin(slot.seen())
            below, above = slot.quantizer.neighbours(slot.seen().detach())
            found[slot.key] = torch.where(torch.rand(below.shape, generator=generator) < 0.5, below, above)
            slot.commit(found[slot.key])
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_a_packed_file_has_the_rounding_and_the_pin(spec: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        first = tq.QWrapper([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)], tq.make_quantizer(spec), fold_bn="running")
        return nn.Sequential(first, nn.Flatten(), tq.QWrapper(nn.Linear(96, 5), tq.make_quantizer(spec)))

    x = torch.randn(4, 3, 6, 6)
    model = ready(build(), x)
    expected = committed(model)
    assert len(expected) == 2
    loaded = through_a_file(model, build(), tmp_path, x)
    for slot in weight_slots(loaded):
        quantizer = slot.quantizer
        assert isinstance(quantizer, CodesQuantizer)
        assert quantizer.quantizer.is_pinned
        assert torch.equal(quantizer.decode(quantizer.codes), expected[slot.key])
        with pytest.raises(tq.errors.ConfigError, match="a packed weight is not pinned"):
            quantizer.pin(slot.weight)


def test_the_file_that_is_certified_has_the_rounding(tmp_path: Path) -> None:
    model, x = small_net("w4-a4")
    expected = committed(model)
    path = export_onnx(model, tmp_path / "net.onnx", x[:2])
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for slot in weight_slots(model):
        assert slot.quantizer is not None
        codes = torch.from_numpy(onnx.numpy_helper.to_array(stored[f"{slot.key}.codes"]).astype("int32"))
        decoded = slot.quantizer.decode(slot.stored_layout(codes) if slot.name == "weight" else codes)
        torch.testing.assert_close(decoded.flatten().sort().values, expected[slot.key].flatten().sort().values)
    assert certify(model, path, [x[:2]]).passed
