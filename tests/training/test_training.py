"""Training infrastructure: mixed precision, interruption, checkpoints, copies, compilation, states, memory."""

from __future__ import annotations

import copy
import functools
import gc
import operator
import os
import pickle
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from tests.processes import CONTEXT
from torchquant.errors import ConfigError

STATES = list(tq.QModuleState)
QAT = tq.QModuleState.QUANT_AWARE_TRAIN


class SmallNet(nn.Module):
    """A residual block with batch norm, a per-channel weight on every layer, a QOp and a dropout."""

    def __init__(self, fold_bn: bool | str = False) -> None:
        super().__init__()
        self.stem = tq.QWrapper([nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()], *self._sites(), fold_bn)
        self.block = tq.QWrapper([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)], *self._sites(), fold_bn)
        self.add = tq.QOp(operator.add, tq.AffineQuantizer(4, tq.ExpAvgMinMax()), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.fc = tq.QWrapper(nn.Linear(4 * 36, 3), *self._sites())

    @staticmethod
    def _sites() -> tuple[tq.Quantizer, tq.Quantizer]:
        weights = tq.AffineQuantizer(4, tq.BatchMinMax(axis=0), symmetric="narrow", gradient_clip=True)
        return weights, tq.AffineQuantizer(4, tq.ExpAvgMinMax(), gradient_clip=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.add(x, self.block(x))
        return self.fc(self.dropout(x).flatten(1))


def data(n: int = 48) -> tuple[Tensor, Tensor]:
    """Images whose label is the third that is bright."""
    labels = torch.arange(n) % 3
    x = torch.randn(n, 1, 6, 6)
    for label in range(3):
        x[labels == label, :, 2 * label : 2 * label + 2] += 1.5
    return x, labels


def calibrated_net(fold_bn: bool | str = False) -> tuple[SmallNet, Tensor]:
    """A network after two steps of training, in QUANT_EVAL and eval mode, and an input."""
    net, (x, labels) = SmallNet(fold_bn), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tq.set_qmodule_state(net, QAT)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    tq.set_qmodule_state(net, tq.QModuleState.QUANT_EVAL)
    return net.eval(), x


def ranges(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.named_buffers() if "range_" in name or "observed_weight" in name}


def test_bfloat16_autocast_trains() -> None:
    net, (x, labels) = SmallNet(), data()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    tq.set_qmodule_state(net, QAT)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x)
            assert logits.dtype == torch.bfloat16
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in net.parameters() if p.requires_grad)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {value.dtype for value in ranges(net).values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in ranges(net).values())


def train_on(path: Path, steps: int, pause: float) -> None:
    """Train until `steps`, from where the file stands if there is one, and save after each step."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    net = SmallNet(fold_bn="corrected")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    tq.set_qmodule_state(net, QAT)
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, steps):
        x, labels = data()
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state | {"step": step + 1}, f"{path}.new")
        os.replace(f"{path}.new", path)
        time.sleep(pause)


def start_training(checkpoint: Path, steps: int, pause: float = 0.0) -> Any:
    process = CONTEXT.Process(target=train_on, args=(checkpoint, steps, pause))
    process.start()
    return process


def finish(process: Any) -> None:
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_training_killed_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    steps, whole, broken = 8, tmp_path / "whole.pt", tmp_path / "broken.pt"
    reference = start_training(whole, steps)
    victim = start_training(broken, steps, pause=0.3)
    deadline = time.monotonic() + 120
    while not (broken.exists() and torch.load(broken, weights_only=True)["step"] >= 2):
        assert victim.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert 2 <= torch.load(broken, weights_only=True)["step"] < steps
    finish(start_training(broken, steps))
    finish(reference)
    uninterrupted, resumed = (torch.load(path, weights_only=True) for path in (whole, broken))
    assert resumed["step"] == steps
    torch.testing.assert_close(resumed["model"], uninterrupted["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], uninterrupted["optimizer"]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("fold_bn", [False, "rescale"])
def test_state_dict_loads_weights_only_and_strict(tmp_path: Path, fold_bn: bool | str) -> None:
    net, x = calibrated_net(fold_bn)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    fresh = SmallNet(fold_bn).eval()
    fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True), strict=True)
    assert fresh.stem.state is tq.QModuleState.QUANT_EVAL
    assert torch.equal(fresh(x), net(x))


def test_deep_copy_is_equal_and_independent() -> None:
    net, x = calibrated_net()
    before = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), before)
    tq.set_qmodule_state(twin, QAT)
    twin(10 * x)
    assert net.stem.state is tq.QModuleState.QUANT_EVAL
    assert torch.equal(net(x), before)


def test_pickle_gives_equal_output() -> None:
    net, x = calibrated_net()
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_double_keeps_the_ranges_and_the_codes() -> None:
    net, x = calibrated_net()
    before, weight_codes = ranges(net), net.fc.weight_quantizer.encode(net.fc.layer.weight)
    wide = copy.deepcopy(net).to(torch.float64)
    for name, value in ranges(wide).items():
        assert value.dtype == torch.float64
        assert torch.equal(value.float(), before[name])
    assert torch.equal(wide.fc.weight_quantizer.encode(wide.fc.layer.weight), weight_codes)
    step = float(net.fc.acts_quantizer.affine_params().delta)
    assert (wide(x.double()) - net(x)).abs().max() <= 2.01 * step  # rounding near a tie may move a code
    assert torch.equal(wide.float()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_ranges_in_float32(dtype: torch.dtype) -> None:
    net, x = calibrated_net()
    before = ranges(net)
    half = copy.deepcopy(net).to(dtype)
    for name, value in ranges(half).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert half(x.to(dtype)).dtype == dtype
    quantizer, twin = net.stem.acts_quantizer, half.stem.acts_quantizer
    assert torch.equal(twin(x.to(dtype)), quantizer(x.to(dtype).float()).to(dtype))
    tq.set_qmodule_state(half, QAT)
    half(x.to(dtype))
    assert {value.dtype for value in ranges(half).values()} == {torch.float32}


def qat_step(net: SmallNet, run: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    net.dropout.p = 0.0
    tq.set_qmodule_state(net, QAT)
    net.zero_grad()
    loss = F.cross_entropy(run(x), labels)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in net.named_parameters()} | dict(ranges(net))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_qat_step_equals_eager(backend: str) -> None:
    """Without a graph break; in float64, where another order of summation moves no code."""
    torch._dynamo.reset()
    eager, (x, labels) = calibrated_net()[0].train().double(), data()
    twin = copy.deepcopy(eager)
    expected = qat_step(eager, eager, x.double(), labels)
    found = qat_step(twin, torch.compile(twin, backend=backend, fullgraph=True), x.double(), labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_no_activation_outlives_forward() -> None:
    net, x = calibrated_net()
    net.train()
    seen: list[weakref.ref[Tensor]] = []
    for module in net.modules():
        module.register_forward_hook(lambda module, args, y: seen.extend(weakref.ref(t) for t in (*args, y)))
    net(x)
    before = tensors_alive()
    for state in STATES:
        seen.clear()
        tq.set_qmodule_state(net, state)
        net(x.clone())
        assert len(seen) > 10
        alive = [tensor for tensor in (ref() for ref in seen) if tensor is not None]
        assert [tensor for tensor in alive if not isinstance(tensor, nn.Parameter)] == [], state
    del alive
    assert tensors_alive() <= before


# The state machine around training


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)
def test_train_and_eval_never_change_the_state(state: tq.QModuleState) -> None:
    net = SmallNet()
    tq.set_qmodule_state(net, state)
    for call in (net.train, net.eval, lambda: net.train(False), net.stem.train, net.add.eval):
        call()
        assert {row.state for row in tq.state_report(net)} == {state.name}


def states_of(net: nn.Module) -> list[tq.QModuleState]:
    return [module.state for module in net.modules() if isinstance(module, tq.QModule)]


def test_context_restores_each_modules_own_state() -> None:
    net = SmallNet()
    net.block.state = tq.QModuleState.CALIBRATION_ACT_ONLY
    before = states_of(net)
    with tq.qmodule_state(net, QAT) as entered:
        assert entered is net
        assert set(states_of(net)) == {QAT}
    assert states_of(net) == before
    assert len(set(before)) == 2


def test_context_nests_and_can_be_reused() -> None:
    net = SmallNet()
    evaluate, bypass = tq.qmodule_state(net, tq.QModuleState.QUANT_EVAL), tq.qmodule_state(net, STATES[0])
    tq.set_qmodule_state(net, QAT)
    for _ in range(2):
        with evaluate:
            with bypass, evaluate:
                assert set(states_of(net)) == {tq.QModuleState.QUANT_EVAL}
            assert set(states_of(net)) == {tq.QModuleState.QUANT_EVAL}
        assert set(states_of(net)) == {QAT}


def test_context_restores_after_an_exception() -> None:
    net = SmallNet()
    tq.set_qmodule_state(net, tq.QModuleState.CALIBRATION)
    with pytest.raises(ZeroDivisionError), tq.qmodule_state(net, QAT):
        raise ZeroDivisionError
    assert set(states_of(net)) == {tq.QModuleState.CALIBRATION}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_fit_in_mixed_precision_learns_and_resumes_the_same(amp: str, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    batches = [data()] * 2

    def trained(epochs: int, progress: Path | None) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        net, losses = SmallNet(), list[float]()
        handle = net.register_forward_hook(lambda module, args, found: seen.append(found.dtype))
        options: dict[str, Any] = {"progress": progress, "on_epoch": lambda epoch, loss: losses.append(loss)}
        tq.training.fit_quantized(net, batches, epochs, 0.02, amp=amp, **options)
        handle.remove()
        return losses, net.state_dict()

    losses, whole = trained(3, tmp_path / "whole.pt")
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert losses[-1] < losses[0]
    assert all(value.dtype != torch.float16 and value.dtype != torch.bfloat16 for value in whole.values())
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert ("scaler" in saved) == (amp == "fp16")
    assert all(torch.equal(value, whole[name]) for name, value in trained(3, tmp_path / "whole.pt")[1].items())
    with pytest.raises(ConfigError, match="amp must be one of bf16, fp16, got 'bf61'; did you mean 'bf16'"):
        tq.fit(SmallNet(), batches, 1, 0.1, amp="bf61")


@pytest.mark.slow
def test_fit_with_torch_compile_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_eager(module: torch.nn.Module) -> Any:
        compiled.append(module)
        return real(module, backend="eager")  # dynamo without the compiler, which takes half a minute

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eager)
    losses: dict[bool, list[float]] = {False: [], True: []}
    for is_compiled, found in losses.items():
        torch.manual_seed(0)
        net = SmallNet()
        on_epoch = functools.partial(lambda found, epoch, loss: found.append(loss), found)
        tq.training.fit_quantized(net, [data()] * 2, 2, 0.02, compiled=is_compiled, on_epoch=on_epoch)
    assert len(compiled) == 1
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
