"""A quantized recognizer trained by SpeechBrain's own Brain."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant as tq
from torchquant.errors import ConfigError
from torchquant.utils import qmodules

pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    speechbrain = pytest.importorskip("speechbrain", reason="speechbrain is installed in an environment of its own")

from torchquant.integrations.speechbrain import QuantizedBrain  # noqa: E402


class Recognizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Words(speechbrain.Brain):
    def on_fit_start(self) -> None:
        self.states: list[tuple[str, str]] = []
        super().on_fit_start()

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        (state,) = {module.state.name for _, module in qmodules(self.modules)} or {"FLOAT"}
        self.states.append((stage.name, state))
        return self.modules.recognizer(batch[0])

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
        return F.cross_entropy(predictions, batch[1])

    def on_stage_end(self, stage: Any, loss: float, epoch: int | None = None) -> None:
        if stage == speechbrain.Stage.VALID:
            self.losses = [*getattr(self, "losses", []), loss]
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(meta={"loss": loss}, min_keys=["loss"], num_to_keep=9)


class QuantizedWords(QuantizedBrain, Words):
    pass


def batches(n: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(8, 5, 8, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(n)]
    return torch.utils.data.DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]


def brain(folder: Path | None = None, **quantization: Any) -> Any:
    torch.manual_seed(0)
    net = tq.quantize(Recognizer(), "w4a8", torch.randn(2, 5, 8))
    counter = speechbrain.utils.epoch_loop.EpochCounter(9)
    checkpointer = None
    if folder is not None:
        recoverables = {"recognizer": net, "counter": counter}
        checkpointer = speechbrain.utils.checkpoints.Checkpointer(str(folder), recoverables)
    made = QuantizedWords(
        {"recognizer": net},
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        hparams={"quantization": quantization},
        run_opts={"device": "cpu", "noprogressbar": True},
        checkpointer=checkpointer,
    )
    made.counter = counter
    return made


def fit(made: Any, epochs: int) -> Any:
    made.counter.limit = epochs
    made.fit(made.counter, batches(), batches(2))
    return made


def state(made: Any) -> str:
    (name,) = {module.state.name for _, module in qmodules(made.modules)}
    return name


def test_states_and_calibration() -> None:
    made = fit(brain(calibration_batches=3, quant_start_step=2, freeze_observer_step=4), 1)
    calibration, train, valid = ["CALIBRATION"] * 3, ["CALIBRATION", "QUANT_AWARE_TRAIN", "QUANT_EVAL"], ["QUANT_EVAL"]
    expected = [("VALID", name) for name in calibration] + [("TRAIN", name) for name in train for _ in range(2)]
    assert made.states == expected + [("VALID", name) for name in valid * 2]
    assert state(made) == "QUANT_EVAL"
    assert made.evaluate(batches(2)) == pytest.approx(made.losses[-1], rel=0.05)  # ranges are one step newer


@pytest.mark.parametrize("steps", [{"quant_start_step": 8}, {"freeze_observer_step": 4}], ids=str)
def test_a_resumed_training_ends_with_the_same_numbers(steps: dict[str, int], tmp_path: Path) -> None:
    whole = fit(brain(tmp_path / "whole", **steps), 2)
    fit(brain(tmp_path / "parts", **steps), 1)
    resumed = fit(brain(tmp_path / "parts", **steps), 2)
    assert resumed.states == whole.states[-8:]
    torch.testing.assert_close(resumed.modules.state_dict(), whole.modules.state_dict(), rtol=0, atol=0)


def test_evaluate_recovers_the_best_checkpoint_quantized(tmp_path: Path) -> None:
    trained = fit(brain(tmp_path), 3)
    fresh = brain(tmp_path)
    fresh.states = []
    assert fresh.evaluate(batches(2), min_key="loss") == pytest.approx(min(trained.losses), abs=1e-7)
    assert set(fresh.states) == {("TEST", "QUANT_EVAL")}


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"must be a mapping of calibration_batches, .*got {'freeze_bn': 3}.*did you"):
        fit(brain(freeze_bn=3), 1)
    made = brain()
    made.modules["recognizer"] = Recognizer()
    with pytest.raises(ConfigError, match="nothing in ModuleDict is quantized"):
        fit(made, 1)
