"""Quantization-aware training by transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import torchquant as tq
from tests.integrations.hf_nets import bert, hf, output
from torchquant.errors import ConfigError
from torchquant.integrations import TorchquantCallback, TorchquantConfig
from torchquant.training import GradientSchedule, Monitor, Ramp

pytest.importorskip("accelerate")
W4A8 = "w4a8-minmax"
LSQ = [{"types": ["Linear"], "weight": "lsq:4/channel", "input": "lsq:4"}]


class Words(Dataset[dict[str, torch.Tensor]]):
    """Sentences whose label says whether the first token is a small number."""

    def __init__(self, n: int = 64) -> None:
        self.ids = torch.randint(3, 61, (n, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": (self.ids[i, 0] < 32).long()}


def classifier(rules: Any = W4A8) -> Any:
    torch.manual_seed(0)
    net = bert("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plan = tq.QuantPlan.from_rules(rules, net, {"input_ids": Words(2).ids}, trace=False)
    return tq.quantize(net, plan)


def trainer(model: Any, folder: Path, callback: Any, **more: Any) -> Any:
    options = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": [], "seed": 1}
    options |= {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"} | more
    args = hf.TrainingArguments(str(folder), **options)
    return hf.Trainer(model, args, train_dataset=Words(), eval_dataset=Words(16), callbacks=[callback])


def states(model: Any) -> set[str]:
    return {module.state.name for _, module in tq.utils.qmodules(model)}


class Log(hf.TrainerCallback):
    """Notes the state of the model in every step, evaluation and save."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, set[str]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.seen.append(("step", state.global_step, states(model)))

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.seen.append(("eval", state.global_step, states(model)))


def test_states_of_a_training(tmp_path: Path) -> None:
    model, log = classifier(), Log()
    callback = TorchquantCallback(2, quant_start_step=2, freeze_observer_step=4)
    run = trainer(model, tmp_path, callback, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    run.add_callback(log)
    run.train()
    per_step = {step: name for kind, step, (name,) in log.seen if kind == "step"}
    assert list(per_step.values()) == ["CALIBRATION"] * 2 + ["QUANT_AWARE_TRAIN"] * 2 + ["QUANT_EVAL"] * 2
    evaluated = {step: name for kind, step, (name,) in log.seen if kind == "eval"}
    assert list(evaluated.values()) == ["BYPASSED"] * 2 + ["QUANT_EVAL"] * 5
    assert states(model) == {"QUANT_EVAL"}


def test_the_loss_falls_and_the_result_is_saved_as_codes(tmp_path: Path) -> None:
    model = classifier()
    monitor = Monitor(model, every=10)
    run = trainer(model, tmp_path, TorchquantCallback(monitor=monitor), max_steps=40, learning_rate=3e-3)
    before = model.classifier.weight.clone()
    run.train()
    assert [look.step for look in monitor.history] == [10, 20, 30, 40]
    assert monitor.history[-1].numbers["weight/flips"]
    assert run.evaluate()["eval_loss"] < 0.2
    assert not torch.equal(model.classifier.weight, before)
    run.save_model(tmp_path / "out")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": Words(8).ids}
    assert torch.equal(output(loaded, inputs), output(model.eval(), inputs))
    with pytest.raises(ConfigError, match="was loaded from codes, which are fixed"):
        trainer(loaded, tmp_path, TorchquantCallback()).train()


def trained(folder: Path, rules: Any, resume: bool = False, **more: Any) -> Any:
    model = classifier(rules)
    schedules = [GradientSchedule(model, "pwl", rho=Ramp(1.0, 0.0, 6))] if rules == W4A8 else []
    callback = TorchquantCallback(2, freeze_observer_step=5, schedules=schedules)
    options = {"max_steps": 6, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3} | more
    run = trainer(model, folder, callback, **options)
    run.train(resume_from_checkpoint=resume)
    return model


def test_a_training_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", W4A8)
    trained(tmp_path / "b", W4A8, max_steps=3)
    resumed = trained(tmp_path / "b", W4A8, resume=True)
    inputs = {"input_ids": Words(8).ids}
    assert torch.equal(output(resumed.eval(), inputs), output(whole.eval(), inputs))
    assert resumed.classifier.weight_quantizer.gradient.rho == 0.0


@pytest.mark.parametrize(
    "rules", [pytest.param(W4A8, marks=pytest.mark.slow, id="affine"), pytest.param(LSQ, id="lsq")]
)
def test_an_evaluation_changes_nothing(rules: Any, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", rules)
    watched = trained(tmp_path / "b", rules, eval_strategy="steps", eval_steps=2)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_is_a_model_to_train_on(tmp_path: Path) -> None:
    trained(tmp_path, LSQ)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert loaded.classifier.weight.is_floating_point()
    assert states(loaded) == {"QUANT_AWARE_TRAIN"}
    trainer(loaded, tmp_path / "more", TorchquantCallback()).train()


def test_what_is_loaded_with_a_config_trains(tmp_path: Path) -> None:
    bert("BertForSequenceClassification").save_pretrained(tmp_path / "float")
    with pytest.warns(UserWarning, match="have seen no data"):
        model = hf.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "float", quantization_config=TorchquantConfig(LSQ)
        )
    trainer(model, tmp_path, TorchquantCallback(1)).train()
    assert all(row.calibrated for row in tq.state_report(model))


def test_a_training_after_one_that_failed_saves_as_it_was_told(tmp_path: Path) -> None:
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            raise KeyboardInterrupt

    bert("BertForSequenceClassification").save_pretrained(tmp_path / "float")
    rules = TorchquantConfig([{"types": ["Linear"], "weight": "affine:4/channel"}])
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "float", quantization_config=rules)
    run = trainer(model, tmp_path, TorchquantCallback(), max_steps=1, eval_strategy="steps", eval_steps=1)
    run.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Stop)
    run.train()
    assert states(model) == {"QUANT_EVAL"}
    model.save_pretrained(tmp_path / "q")
    assert hf.AutoConfig.from_pretrained(tmp_path / "q").quantization_config["save_as"] == "codes"


class Pictures(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": x + i % 2, "labels": torch.tensor(i % 2)}


def test_batch_norms_are_frozen_and_estimated_again(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 2, "layer_type": "basic"}
    net = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    x = {"pixel_values": torch.stack([Pictures()[i]["pixel_values"] for i in range(4)])}
    means = []
    for n in (0, 2):
        torch.manual_seed(0)
        model = tq.quantize(net, tq.QuantPlan.from_rules("w8a8", net, x, trace=False, fuse="bn"))
        callback = TorchquantCallback(2, freeze_bn_step=0, bn_batches=n)
        options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        arguments = hf.TrainingArguments(str(tmp_path), **options)
        hf.Trainer(model, arguments, train_dataset=Pictures(), callbacks=[callback]).train()
        means.append(torch.cat([m.running_mean for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]))
    assert torch.equal(means[0], torch.zeros_like(means[0]))  # frozen from the first step on
    assert (means[1] != 0).all()


def test_weight_decay_of_steps_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weight decay 0.1 shrinks \d+ learned numbers of quantizers"):
        trainer(classifier(LSQ), tmp_path, TorchquantCallback(1), weight_decay=0.1, max_steps=1).train()


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BertForSequenceClassification is a float model"):
        trainer(bert("BertForSequenceClassification"), tmp_path, TorchquantCallback()).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_batches": -1}, "calibration_batches must be a whole number >= 0"),
        ({"quant_start_step": -1}, "quant_start_step must be at least 0"),
        ({"quant_start_step": 3, "freeze_observer_step": 3}, "freeze_observer_step must come after quant_start_step 3"),
    ],
)
def test_settings_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchquantCallback(**arguments)
