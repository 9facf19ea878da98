"""A quantized network in a LightningModule, trained by the Trainer of Lightning itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchquant as tq
from tests.processes import run_ranks
from torchquant.errors import ConfigError
from torchquant.training import GradientSchedule, Monitor, OscillationTracker, Ramp
from torchquant.utils import qmodules

lightning = pytest.importorskip("lightning.pytorch")

from torchquant.integrations.lightning import QuantizationCallback  # noqa: E402

RULES = [{"weight": "affine:4/channel@pwl", "input": "affine:8", "output": "affine:8"}]
S = tq.QModuleState
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)),
    )


def images(n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def loader(**options: Any) -> Any:
    return DataLoader(TensorDataset(*images()), batch_size=8, **options)


class Classifier(lightning.LightningModule):
    def __init__(self, rules: Any = RULES) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = tq.quantize(net(), rules, images()[0][:2])
        self.states: list[str] = []
        self.frozen: list[bool] = []
        self.validated: list[tuple[str, float]] = []

    def state(self) -> str:
        (name,) = {module.state.name for _, module in qmodules(self.net)}
        return name

    def training_step(self, batch: Any, i: int) -> Tensor:
        self.states.append(self.state())
        self.frozen.append(self.net[0].bn_frozen)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, i: int) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        self.validated.append((self.state(), float(loss)))

    def configure_optimizers(self) -> Any:
        learned = tq.quantizer_parameters(self)
        known = {id(p) for p in learned["params"]}
        groups = [{"params": [p for p in self.parameters() if id(p) not in known]}]
        return torch.optim.SGD([*groups, learned] if known else groups, lr=0.05, momentum=0.9)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options})


def same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_states_follow_the_optimizer_steps(tmp_path: Path) -> None:
    module = Classifier()
    callback = QuantizationCallback(2, quant_start_step=1, freeze_observer_step=2, freeze_bn_step=2)
    trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=2).fit(module, loader())
    assert module.states == ["CALIBRATION"] * 2 + ["QUANT_AWARE_TRAIN"] * 2 + ["QUANT_EVAL"] * 2
    assert module.frozen == [False] * 4 + [True] * 2
    assert module.state() == "QUANT_EVAL"


def test_ranges_are_those_of_the_first_batches(tmp_path: Path) -> None:
    module, other, expected = Classifier(), Classifier(), Classifier()
    data = loader()
    tq.calibrate(expected.net, [x for x, _ in list(data)[:3]])
    ranges: list[Any] = []
    for one in (module, other):
        one.on_train_start = lambda one=one: ranges.append([row.ranges for row in tq.state_report(one.net)])
    trainer(tmp_path, QuantizationCallback(3), max_steps=1).fit(module, data)
    assert ranges == [[row.ranges for row in tq.state_report(expected.net)]]
    pairs = [(i, {"pixels": x}) for i, (x, _) in enumerate(data)]
    callback = QuantizationCallback(pairs[:3], inputs=lambda batch: batch[1]["pixels"])
    trainer(tmp_path, callback, max_steps=1).fit(other, data)
    assert ranges[1] == ranges[0]


def test_a_trained_network_equals_that_of_the_plain_loop(tmp_path: Path) -> None:
    module, plain = Classifier(), Classifier()
    trainer(tmp_path, QuantizationCallback(1), max_epochs=2).fit(module, loader())
    tq.calibrate(plain.net, [images()[0][:8]])
    tq.set_qmodule_state(plain.train(), S.QUANT_AWARE_TRAIN)
    optimizer = plain.configure_optimizers()
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    tq.observe_weights(plain)
    tq.set_qmodule_state(plain, S.QUANT_EVAL)
    same(module, plain)


def test_validation_is_quantized_and_a_checkpoint_gives_the_same_loss(tmp_path: Path) -> None:
    module = Classifier()
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    callback = QuantizationCallback(2, quant_start_step=9)
    trainer(tmp_path, callback, saver, max_epochs=2).fit(module, loader(), loader(shuffle=False))
    assert {state for state, _ in module.validated} == {"QUANT_EVAL"}
    assert module.states == ["CALIBRATION"] * 9 + ["QUANT_AWARE_TRAIN"] * 3
    for epoch in range(2):
        loaded = Classifier.load_from_checkpoint(tmp_path / f"epoch={epoch}.ckpt", weights_only=False).eval()
        assert loaded.state() == "QUANT_EVAL"
        for i, batch in enumerate(loader()):
            loss = F.cross_entropy(loaded.net(batch[0]), batch[1]).detach()
            assert float(loss) == module.validated[2 + 6 * epoch + i][1]


@pytest.mark.parametrize("steps", [{"quant_start_step": 8}, {"freeze_observer_step": 3}], ids=str)
def test_a_resumed_training_ends_with_the_same_numbers(steps: dict[str, int], tmp_path: Path) -> None:
    def made(folder: str, epochs: int) -> tuple[Any, Any, Monitor]:
        module = Classifier()
        monitor = Monitor(module.net, every=4)
        schedules = [lambda net: GradientSchedule(net, "pwl", rho=Ramp(1.0, 0.0, 10)), OscillationTracker]
        saver = lightning.callbacks.ModelCheckpoint(tmp_path / folder, save_last=True)
        callback = QuantizationCallback(2, schedules=schedules, monitor=monitor, **steps)
        return trainer(tmp_path, callback, saver, max_epochs=epochs), module, monitor

    straight, whole, watched = made("straight", 2)
    straight.fit(whole, loader())
    first, module, _ = made("parts", 1)
    first.fit(module, loader())
    second, resumed, monitor = made("parts", 2)
    second.fit(resumed, loader(), ckpt_path=tmp_path / "parts" / "last.ckpt", weights_only=False)
    assert resumed.states == whole.states[6:]
    same(resumed, whole)
    assert [look.step for look in watched.history] == [4, 8, 12]
    assert [look.step for look in monitor.history] == [8, 12]
    assert monitor.history[-1].numbers == watched.history[-1].numbers
    with pytest.raises(ConfigError, match="4 schedules and monitors, and this one has 1; resume with"):
        trainer(tmp_path, QuantizationCallback(), max_epochs=3).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "parts" / "last.ckpt", weights_only=False
        )


def test_a_number_writes_looks_to_the_loggers_of_the_trainer(tmp_path: Path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, QuantizationCallback(1, monitor=3), logger=logger, max_epochs=1).fit(Classifier(), loader())
    (file,) = tmp_path.rglob("metrics.csv")
    header, *rows = file.read_text().splitlines()
    steps = [row.split(",")[header.split(",").index("step")] for row in rows]
    assert "net.0/weight/flips" not in header
    assert "0/weight/flips" in header
    assert "weight/oscillation" in header
    assert steps == ["3", "6"]


def test_the_exported_file_is_certified(tmp_path: Path) -> None:
    callback = QuantizationCallback(2, export=tmp_path / "net.onnx", certified=True)
    module = Classifier("int8-ort")
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.certificate is not None
    assert callback.certificate.passed
    assert callback.certificate.samples == 16
    assert (tmp_path / "net.onnx.certificate.json").is_file()
    found = tq.deploy.run_onnx(tmp_path / "net.onnx", images()[0])
    assert (found.argmax(1) == module.net.eval()(images()[0]).argmax(1)).all()


def test_bfloat16_by_autocast(tmp_path: Path) -> None:
    module = Classifier("w4a8")
    start = copy.deepcopy(module.net)
    trainer(tmp_path, QuantizationCallback(2), precision="bf16-mixed", max_epochs=2).fit(module, loader(), loader())
    losses = [loss for _, loss in module.validated]
    assert all(x == x for x in losses)
    assert sum(losses[-6:]) < sum(losses[:6])
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), module.net.parameters(), strict=True))
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_double_precision(tmp_path: Path) -> None:
    """Batches to calibrate on are in the type that the trainer gives to the steps."""
    module = Classifier()
    trainer(tmp_path, QuantizationCallback(2), precision="64-true", max_epochs=1).fit(module, loader())
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module.state() == "QUANT_EVAL"


def rank_work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    import os

    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        module = Classifier()
        callback = QuantizationCallback(2, quant_start_step=1, export=Path(folder, "net.onnx"))
        trainer(Path(folder), callback, max_epochs=1, devices=2, strategy="ddp").fit(module, loader())
        torch.save((module.state_dict(), module.states), f"{folder}/rank{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks_end_with_one_network(tmp_path: Path) -> None:
    run_ranks(rank_work, str(tmp_path))
    (first, states), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert states == ["CALIBRATION"] + ["QUANT_AWARE_TRAIN"] * 2
    own = [key for key in first if "running_" in key]  # batch norms of a rank see its own images
    assert len(own) == 2
    shared = first.keys() - own
    torch.testing.assert_close({k: first[k] for k in shared}, {k: second[k] for k in shared}, rtol=0, atol=0)
    assert (tmp_path / "net.onnx").is_file()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    module = Classifier()
    module.net = net()
    with pytest.raises(ConfigError, match="nothing in Classifier is quantized; quantize the network before"):
        trainer(tmp_path, QuantizationCallback(), max_epochs=1).fit(module, loader())
    with pytest.raises(ConfigError, match="Classifier has no module 'body'; it has net"):
        trainer(tmp_path, QuantizationCallback(network="body"), max_epochs=1).fit(Classifier(), loader())
    with pytest.raises(ConfigError, match="freeze_observer_step must come after quant_start_step 3, got 2"):
        QuantizationCallback(quant_start_step=3, freeze_observer_step=2)
    with pytest.raises(ConfigError, match="are functions that make them.*give Linear, or lambda network: Linear"):
        QuantizationCallback(schedules=[nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match="say where it goes"):
        QuantizationCallback(certified=True)
