"""Packed updates: what arrives, how many bytes it takes, and what error feedback is good for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchquant.errors import ConfigError, NonFiniteError, UnknownNameError
from torchquant.integrations import UpdateCodec

SPECS = {8: "affine:8,symmetric=narrow/channel", 4: "affine:4,symmetric=narrow/channel", 2: "ternary/channel"}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)),
    )


def moved(reference: dict[str, Tensor], seed: int = 1, by: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        return x + by * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x + 3

    return {name: change(x) for name, x in reference.items()}


def size(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize(
    "spec", [*SPECS.values(), "nf4/group=32", "mxfp4", "nvfp4", "esb:4,k=1", "lsq:3/channel", "codebook:3"]
)
def test_both_sides_have_the_same_numbers(spec: str) -> None:
    before = net().state_dict()
    after = moved(before)
    packet = UpdateCodec(spec).encode(after, before)
    found = UpdateCodec(spec).decode(packet.data, before)
    torch.testing.assert_close(found, packet.received, rtol=0, atol=0)
    assert found.keys() == before.keys()
    for name, x in after.items():
        assert found[name].dtype == x.dtype
        if x.is_floating_point():
            error = (found[name] - x).norm() / (x - before[name]).norm()
            assert error < (0.6 if x.ndim > 1 else 2e-3), name
            rest = packet.left_over.get(name, torch.zeros(()))
            torch.testing.assert_close(found[name] + rest, x, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found[name], x)


@pytest.mark.parametrize(("n_bits", "ratio"), [(8, 3.5), (4, 7.0)])
def test_bytes(n_bits: int, ratio: float) -> None:
    before = net().state_dict()
    assert size(before) > ratio * len(UpdateCodec(SPECS[n_bits]).encode(moved(before), before).data)


def test_what_does_not_change_takes_a_byte() -> None:
    before = {**net().state_dict(), "mask": torch.full((4, 4), -torch.inf)}
    codec = UpdateCodec()
    packet = codec.encode(before, before)
    assert len(packet.data) == 8 + len(before)
    assert packet.left_over == {}
    torch.testing.assert_close(codec.decode(packet.data, before), before, rtol=0, atol=0)


def test_what_half_precision_cannot_hold_is_sent_as_it_is() -> None:
    codec = UpdateCodec()
    before = {"sum": torch.zeros(3), "low": torch.full((2,), torch.inf), "half": torch.zeros(2, dtype=torch.bfloat16)}
    before |= {"flags": torch.tensor(False), "none": torch.zeros(0, 3)}
    after = {**before, "sum": torch.tensor([1e6, 1.0, -3.0]), "low": torch.tensor([0.5, -1e-30])}
    after |= {"half": torch.tensor([1.5, 2.0]), "flags": torch.tensor(True)}
    found = codec.decode(codec.encode(after, before).data, before)
    assert found["half"].dtype == torch.bfloat16
    torch.testing.assert_close(found, {**after, "half": after["half"].to(torch.bfloat16)}, rtol=0, atol=0)


@pytest.mark.parametrize("n_bits", [4, 2])
def test_error_feedback_keeps_errors_from_adding_up(n_bits: int) -> None:
    """A small drift under large noise, which cancels: the sum of what is received finds it."""
    codec = UpdateCodec(SPECS[n_bits])
    zero = {"w": torch.zeros(8, 64)}
    generator = torch.Generator().manual_seed(0)
    changes = [0.01 + torch.randn(8, 64, generator=generator).pow(3) for _ in range(60)]
    total = torch.stack(changes).sum(0)
    errors = {}
    for feedback in (False, True):
        rest: dict[str, Tensor] = {}
        found = torch.zeros(8, 64)
        for change in changes:
            packet = codec.encode({"w": change}, zero, rest if feedback else {})
            found += packet.received["w"]
            rest = packet.left_over
        errors[feedback] = float((found - total).abs().mean())
        if feedback:
            torch.testing.assert_close(found + rest["w"], total, rtol=0, atol=1e-3)
    assert errors[True] < errors[False] / 2


def test_following_a_reference_needs_no_left_over() -> None:
    """A reference that moves by what was received: the difference to it contains what was lacking."""
    codec, target = UpdateCodec(SPECS[4]), moved(net().state_dict())
    held = net().state_dict()
    errors = []
    for _ in range(4):
        held = codec.decode(codec.encode(target, held).data, held)
        errors.append(max(float((held[k] - x).abs().max()) for k, x in target.items()))
    assert errors[-1] < errors[0] / 100


def test_a_packet_of_another_model_or_spec_is_refused() -> None:
    before = net().state_dict()
    data = UpdateCodec(SPECS[4]).encode(moved(before), before).data
    other = copy.deepcopy(before)
    other["0.weight"] = torch.zeros(3, 3)
    for codec, reference in ((UpdateCodec(SPECS[8]), before), (UpdateCodec(SPECS[4]), other)):
        with pytest.raises(ConfigError, match="not one of 16 such tensors.*both sides need the same spec"):
            codec.decode(data, reference)
    with pytest.raises(ConfigError, match=f"ends after {len(data) - 9} bytes.*send it again"):
        UpdateCodec(SPECS[4]).decode(data[:-9], before)
    with pytest.raises(ConfigError, match="2 bytes too many; send it again"):
        UpdateCodec(SPECS[4]).decode(data + b"..", before)
    with pytest.raises(ConfigError, match="a tensor has form 9; send it again"):
        UpdateCodec(SPECS[4]).decode(data[:8] + bytes([9]) + data[9:], before)
    with pytest.raises(ConfigError, match="the left-over tensors and the reference .*only one has 9.bias"):
        UpdateCodec(SPECS[4]).encode(before, before, {"9.bias": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"the left-over tensors: 0.bias has shape \(2, 32\), in the reference"):
        UpdateCodec(SPECS[4]).encode(before, before, {"0.bias": torch.zeros(2, 32)})
    with pytest.raises(ConfigError, match=r"0.weight has shape \(32, 1, 3, 3\), in the reference \(3, 3\)"):
        UpdateCodec().encode(before, other)
    with pytest.raises(ConfigError, match="must have the same names; only one has 0.bias"):
        UpdateCodec().encode({k: x for k, x in before.items() if k != "0.bias"}, before)
    with pytest.raises(NonFiniteError, match="the change of 3.weight cannot be sent: "):
        UpdateCodec().encode({**before, "3.weight": before["3.weight"] * torch.nan}, before)
    with pytest.raises(ConfigError, match="'dorefa:4' has levels in other units"):
        UpdateCodec("dorefa:4")
    with pytest.raises(UnknownNameError, match="no quantizer scheme 'afine'"):
        UpdateCodec("afine:4")
