"""What NNI's tests check of its own parts - wrappers, settings, compressors - by what has that effect here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compat.nni_nets import ThreeConvs
from torchquant.compat.checkpoints import load_checkpoint
from torchquant.compat.nni import LsqQuantizer, PtqQuantizer, QATQuantizer
from torchquant.utils import qmodules


def test_a_wrapper_with_numbers_set_by_hand() -> None:
    """Scale 0.5 and zero point 10 of a weight, as in NNI's test of its wrapper; the formula is the oracle."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3)
    conv.weight.data *= 100
    x = torch.rand(4, 3, 32, 32)
    for target, scale, zero_point in (("weight", 0.5, 10), ("_output_0", 0.5, 10), ("_input_0", 0.4, 5)):
        net = nn.Sequential(nn.Conv2d(3, 3, 3))
        net[0].load_state_dict(conv.state_dict())
        entry = {"op_names": ["0"], "target_names": [target], "quant_dtype": "int8", "quant_scheme": "affine"}
        quantizer = PtqQuantizer(net, [entry])
        net(x)
        quantizer.compress()
        quantizer.update_calibration_config({"0": {target: {"scale": scale, "zero_point": zero_point}}})

        def rounded(value: torch.Tensor, s: float = scale, z: int = zero_point) -> torch.Tensor:
            return (torch.round(value / s + z).clamp(-127, 127) - z) * s

        parts = {"_input_0": x, "weight": conv.weight, "_output_0": None}
        read = rounded(x) if target == "_input_0" else x
        weight = rounded(parts["weight"]) if target == "weight" else conv.weight
        expected = F.conv2d(read, weight, conv.bias)
        expected = rounded(expected) if target == "_output_0" else expected
        torch.testing.assert_close(net(x), expected, atol=2e-4, rtol=1e-5)


def test_a_setting_of_a_target_beats_the_shared_one() -> None:
    entry = {
        "op_names": ["0"],
        "target_names": ["_input_", "weight", "_output_"],
        "quant_dtype": "uint6",
        "target_settings": {"weight": {"quant_dtype": "int3"}, "_output_": {"quant_scheme": "affine"}},
    }
    targets = PtqQuantizer(nn.Sequential(nn.Linear(1, 1)), [entry]).layers["0"].targets
    assert {name: (t.dtype, t.n_bits, t.symmetric) for name, t in targets.items()} == {
        "input": ("uint", 6, True),
        "weight": ("int", 3, True),
        "output": ("uint", 6, False),
    }


def test_layers_with_their_batch_norms_are_registered() -> None:
    model = ThreeConvs()
    entry = {
        "op_names": ["conv1", "fc2", "conv2"],
        "target_names": ["weight", "_input_", "_output_"],
        "quant_dtype": "int2",
        "quant_scheme": "affine",
        "granularity": "default",
        "fuse_names": [("conv1", "bn1"), ("conv2", "bn2")],
    }
    quantizer = QATQuantizer(model, [entry])
    assert sorted(quantizer._module_wrappers) == ["conv1", "conv2", "fc2"]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.bn1(x.expand(2, 8, 8, 8)), x.expand(2, 8, 8, 8)) is False  # real while nothing quantizes
    model(x)
    assert torch.equal(model.bn1(x.expand(2, 8, 8, 8)), x.expand(2, 8, 8, 8))  # taken in by the layer


def test_a_model_that_nni_wrapped_and_saved_goes_on_here() -> None:
    """The keys of NNI 3.0: parameters and numbers in its wrappers, and the last quantized weight beside them."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    saved = {
        "0.weight": torch.zeros(4, 6),
        "0._nni_wrapper.weight": weight,
        "0._nni_wrapper.bias": bias,
        "0._nni_wrapper.weight_scale": torch.tensor(0.25),
        "0._nni_wrapper.weight_zero_point": torch.tensor(0.0),
        "0._nni_wrapper._input_0_scale": torch.tensor(0.125),
        "0._nni_wrapper._input_0_zero_point": torch.tensor(0.0),
    }
    net = nn.Sequential(nn.Linear(6, 4))
    entry = {"op_names": ["0"], "target_names": ["_input_", "weight"], "quant_dtype": "int4"}
    LsqQuantizer(net, [entry])
    key_map = load_checkpoint(net, saved)
    assert {row.source for row in key_map} == {"0.weight", "0.bias", "calibration config: 0"}
    (note,) = [row.note for row in key_map if row.source.startswith("calibration")]
    assert note == "weight, _input_0; signed codes of LSQ begin at -8 here, at -7 there"
    wrapped = dict(qmodules(net))["0"]
    assert torch.equal(wrapped.layer.weight, weight)
    assert float(wrapped.weight_quantizer.step.detach()) == pytest.approx(0.25)
    assert float(wrapped.input_quantizer.step.detach()) == pytest.approx(0.125)
    x = 0.3 * torch.randn(5, 6)

    def rounded(value: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.round(value / scale).clamp(-8, 7) * scale

    torch.testing.assert_close(net.eval()(x), F.linear(rounded(x, 0.125), rounded(weight, 0.25), bias))
