"""The quantizers of NNI through its evaluators: plain torch, Lightning, Transformers. The cases of NNI's own tests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torchquant.compat.nni.common import is_traceable
from torchquant.compat.nni.common.types import SCHEDULER
from torchquant.compat.nni.compression.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from torchquant.compat.nni.compression.utils import (
    BackwardHook,
    DeepspeedTorchEvaluator,
    ForwardHook,
    LightningEvaluator,
    TensorHook,
    TorchEvaluator,
    TransformersEvaluator,
)

from tests.compat.nni_nets import ThreeConvs, batches, digits, evaluating_model, training_model, training_step
from torchquant.compat import nni
from torchquant.errors import ConfigError
from torchquant.utils import qmodules

LEARNING_RATE = {"DoReFaQuantizer": 1e-4}
"""Weights of DoReFa-Net lose their units; without batch norms a large rate diverges."""


def quantizers_of_3_0() -> list[Any]:
    return [QATQuantizer, LsqQuantizer, LsqPlusQuantizer, PtqQuantizer, DoReFaQuantizer, BNNQuantizer]


def config_list(kind: Any, prefix: str = "") -> list[dict[str, Any]]:
    """The config lists of NNI's tests of each quantizer."""
    all_three = ["_input_", "weight", "_output_"]
    linear = {DoReFaQuantizer: ["weight"], BNNQuantizer: all_three}.get(kind, ["weight"])
    conv = ["_input_", "weight"] if kind is DoReFaQuantizer else all_three
    own_channels = kind in (QATQuantizer, LsqQuantizer, LsqPlusQuantizer, PtqQuantizer)
    shared = {"quant_dtype": None if kind is BNNQuantizer else "int8", "quant_scheme": "affine"}
    return [
        {
            **shared,
            "op_names": [f"{prefix}fc1", f"{prefix}fc2"],
            "target_names": linear,
            "granularity": "in_channel" if own_channels else "default",
        },
        {
            **shared,
            "op_names": [f"{prefix}conv{i}" for i in (1, 2, 3)],
            "target_names": conv,
            "granularity": "default",
            "fuse_names": [(f"{prefix}conv{i}", f"{prefix}bn{i}") for i in (1, 2, 3)],
        },
    ]


def torch_evaluator(model: nn.Module, lr: float = 0.01, scheduler: bool = True) -> Any:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = nni.trace(ExponentialLR)(optimizer, 0.1) if scheduler else None
    assert schedule is None or isinstance(schedule, SCHEDULER)
    return TorchEvaluator(
        training_model,
        optimizer,
        training_step,
        schedule,
        dummy_input=torch.rand(8, 1, 8, 8),
        evaluating_func=evaluating_model,
    )


def check_compressed(model: nn.Module, config: Any, kind: Any, prefix: str = "") -> None:
    assert sorted(config) == sorted(f"{prefix}{name}" for name in ("conv1", "conv2", "conv3", "fc1", "fc2"))
    for entry in config.values():
        for numbers in entry.values():
            assert set(numbers) == {
                *("scale", "zero_point", "tracked_min", "tracked_max", "quant_dtype", "quant_scheme", "quant_bits")
            }
            assert bool((torch.as_tensor(numbers["scale"]) > 0).all())
    wrapped = dict(qmodules(model))
    assert wrapped[f"{prefix}conv2"].fold_mode == "running"
    n_weights = wrapped[f"{prefix}fc2"].weight_slots()[0]
    quantized = n_weights.quantizer(n_weights.seen())
    assert not torch.equal(quantized, n_weights.seen())
    if kind is BNNQuantizer:
        assert quantized.unique().tolist() == [-1.0, 1.0]
        assert config[f"{prefix}fc1"]["weight"]["quant_bits"] == 1


@pytest.mark.parametrize("kind", quantizers_of_3_0(), ids=lambda kind: kind.__name__)
def test_torch_model(kind: Any) -> None:
    torch.manual_seed(0)
    model = ThreeConvs()
    evaluator = torch_evaluator(model, LEARNING_RATE.get(kind.__name__, 0.01))
    before = copy.deepcopy(model.state_dict())
    found, config = kind(model, config_list(kind), evaluator).compress(None, 1)
    assert found is model
    check_compressed(model, config, kind)
    trained = not torch.equal(before["fc1.weight"], model.state_dict()["fc1.weight"])
    assert trained == (kind is not PtqQuantizer)
    accuracy = evaluator.evaluate()
    assert accuracy > (0.6 if kind in (QATQuantizer, LsqQuantizer, LsqPlusQuantizer) else 0.02)


lightning = pytest.importorskip("lightning.pytorch")


class LightningNet(lightning.LightningModule):
    """A Lightning model around the network; its steps call `self.model`, not itself."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.model = ThreeConvs()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.model(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("default", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": nni.trace(ExponentialLR)(optimizer, 0.1), "interval": "epoch"},
        }


class DigitsModule(lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits()), batch_size=64)

    def test_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits(train=False)), batch_size=64)


def lightning_evaluator(**given: Any) -> Any:
    trainer = nni.trace(lightning.Trainer)(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **given,
    )
    return LightningEvaluator(trainer, nni.trace(DigitsModule)(), dummy_input=torch.rand(8, 1, 8, 8))


quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:Full backward hook is firing:UserWarning",
)


@quiet
@pytest.mark.parametrize("kind", quantizers_of_3_0(), ids=lambda kind: kind.__name__)
def test_lightning_model(kind: Any) -> None:
    torch.manual_seed(0)
    model = LightningNet(LEARNING_RATE.get(kind.__name__, 0.01))
    evaluator = lightning_evaluator()
    quantizer = kind(model, config_list(kind, "model."), evaluator)
    _, config = quantizer.compress(None, 1)
    check_compressed(model, config, kind, "model.")
    default, every = evaluator.evaluate()
    assert every[0]["default"] == pytest.approx(default)
    assert default > (0.6 if kind in (QATQuantizer, LsqQuantizer, LsqPlusQuantizer) else 0.02)
    if kind is LsqQuantizer:
        quantizer = dict(qmodules(model))["model.conv1"].weight_quantizer
        assert not torch.equal(quantizer.step, quantizer.initial_step)
    evaluator.unbind_model()
    assert "training_step" not in vars(model)


class Spy:
    """What tasks, changes of the loss and hooks have seen."""

    def __init__(self) -> None:
        self.before = self.after = self.losses = 0

    def patch(self, evaluator: Any) -> None:
        def before() -> None:
            self.before += 1

        def after() -> None:
            self.after += 1

        def loss(value: Tensor, batch: Any) -> Tensor:
            self.losses += len(batch[0]) > 0
            return value

        evaluator.patch_loss(loss)
        evaluator.patch_optimizer_step([before], [after])

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.before, self.after, self.losses


def keeping(buffer: list[Any]) -> Any:
    return lambda *seen: buffer.append(len(seen))


@quiet
@pytest.mark.parametrize("kind", ["torch", "lightning"])
def test_patches_and_hooks(kind: str) -> None:
    """As in NNI's test of its evaluators: one step, then a whole training."""
    if kind == "torch":
        model: Any = ThreeConvs()
        evaluator, conv, name = torch_evaluator(model), model.conv1, "conv1"
    else:
        model = LightningNet()
        evaluator, conv, name = lightning_evaluator(), model.model.conv1, "model.conv1"
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    hooks = [
        TensorHook(conv.weight, f"{name}.weight", keeping),
        ForwardHook(conv, name, keeping),
        BackwardHook(conv, name, keeping),
    ]
    spy = Spy()
    spy.patch(evaluator)
    evaluator.register_hooks(hooks)
    evaluator.train(max_steps=1)
    assert spy.counts == (1, 1, 1)
    assert [hook.buffer for hook in hooks] == [[1], [3], [3]]
    evaluator.remove_all_hooks()
    evaluator.register_hooks(hooks)
    evaluator.finetune()
    assert spy.counts == (21, 21, 21)
    assert [len(hook.buffer) for hook in evaluator.get_all_hooks()] == [20, 20, 20]
    evaluator.unbind_model()
    assert not evaluator.get_all_hooks()
    evaluator.bind_model(model)
    evaluator.train(max_steps=1)
    assert spy.counts == (21, 21, 21)


transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Sentences(torch.utils.data.Dataset[Any]):
    """Random tokens; the label says whether the first token is in the upper half."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 64, (n, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": (self.tokens[i, 0] >= 32).long()}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def traced_trainer(model: nn.Module, folder: Any) -> Any:
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_train_epochs=1,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1024,
    )

    def metrics(prediction: Any) -> dict[str, float]:
        hits = prediction.predictions.argmax(1) == prediction.label_ids
        return {"default": float(hits.mean())}

    return nni.trace(transformers.Trainer)(
        model=model,
        args=settings,
        train_dataset=Sentences(640, 0),
        eval_dataset=Sentences(128, 1),
        compute_metrics=metrics,
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["lsq", "qat", "ptq"])
def test_tutorial_on_bert(method: str, tmp_path: Any) -> None:
    """The config of NNI's tutorial: linear layers of the encoder, weights and outputs of 8 bits."""
    torch.manual_seed(0)
    model = bert()
    config_list = [
        {
            "op_types": ["Linear"],
            "op_names_re": [f"bert.encoder.layer.{i}" for i in range(2)],
            "target_names": ["weight", "_output_"],
            "quant_dtype": "int8",
            "quant_scheme": "affine",
            "granularity": "default",
        }
    ]
    traced_trainer(model, tmp_path).train()
    evaluator = TransformersEvaluator(traced_trainer(model, tmp_path))
    if method == "lsq":
        quantizer: Any = LsqQuantizer(model, config_list, evaluator)
        model, config = quantizer.compress(max_steps=None, max_epochs=1)
    elif method == "qat":
        quantizer = QATQuantizer(model, config_list, evaluator, 5)
        model, config = quantizer.compress(max_steps=None, max_epochs=1)
        assert int(quantizer.steps) == 1 + 20
    else:
        quantizer = PtqQuantizer(model, config_list, evaluator)
        model, config = quantizer.compress(max_steps=1, max_epochs=None)
    assert len(config) == 12
    assert set(config["bert.encoder.layer.0.attention.self.query"]) == {"weight", "_output_0"}
    quantizer.evaluator.bind_model(model, quantizer._get_param_names_map())
    default, found = quantizer.evaluator.evaluate()
    assert default == found["eval_default"] > 0.9
    if method == "lsq":
        learned = dict(qmodules(model))["bert.encoder.layer.0.output.dense"].weight_quantizer.step
        groups = quantizer.evaluator.trainer.optimizer.param_groups
        held = [group for group in groups if any(p is learned for p in group["params"])]
        assert [group["weight_decay"] for group in held] == [0.0]


def test_trace_remembers_the_arguments() -> None:
    layer = nn.Linear(2, 2)
    optimizer = nni.trace(torch.optim.SGD)(layer.parameters(), lr=0.5)
    assert isinstance(optimizer, torch.optim.SGD)
    assert is_traceable(optimizer)
    assert not is_traceable(torch.optim.SGD(layer.parameters(), lr=0.5))
    assert optimizer.trace_kwargs == {"lr": 0.5}
    assert nni.trace(type(optimizer)) is type(optimizer)
    again = optimizer.trace_copy().get(lr=0.25)
    assert (again.param_groups[0]["lr"], again.param_groups[0]["params"][0]) == (0.25, layer.weight)
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert loaded.trace_kwargs == copy.deepcopy(optimizer).trace_kwargs == {"lr": 0.5}

    @nni.trace
    def make(a: int, b: int = 2) -> nn.Module:
        return nn.Linear(a, b)

    assert make(3).trace_args == (3,)
    with pytest.raises(ConfigError, match="nni.trace takes a class or a function, got 3"):
        nni.trace(3)


def test_what_of_nni_is_refused_says_why() -> None:
    with pytest.raises(ConfigError, match="DeepSpeed's engine owns the parameters. Use TorchEvaluator"):
        DeepspeedTorchEvaluator(None, None, {})
    with pytest.raises(ConfigError, match=r"the trainer must be made by nni.trace\(Trainer\)"):
        LightningEvaluator(object(), None)
    with pytest.raises(ConfigError, match="TorchEvaluator has no model; call bind_model"):
        torch_evaluator(ThreeConvs()).train(1)
    with pytest.raises(ConfigError, match="optimizers must be a torch optimizer or a list of them, got 'sgd'"):
        TorchEvaluator(training_model, "sgd")
    with pytest.raises(ConfigError, match="the third argument must be an optimizer or an evaluator, got 3"):
        LsqQuantizer(ThreeConvs(), config_list(LsqQuantizer), 3)
    model = ThreeConvs()
    quantizer = LsqQuantizer(model, config_list(LsqQuantizer), torch_evaluator(model))
    with pytest.raises(ConfigError, match="compress needs max_steps, max_epochs or both"):
        quantizer.compress()
    with pytest.raises(ConfigError, match="LightningEvaluator trains a LightningModule, got a ThreeConvs"):
        lightning_evaluator().bind_model(ThreeConvs())
    for address in (
        "compression.pruning",
        "compression.distillation",
        "compression.speedup",
        "nas.evaluator",
        "retiarii",
    ):
        with pytest.raises(ImportError, match="has no|No module"):
            exec(f"from torchquant.compat.nni.{address} import Anything")
    with pytest.raises(AttributeError, match="nni.report_final_result is not here"):
        _ = nni.report_final_result


def test_an_evaluation_without_a_metric_is_told() -> None:
    evaluator = TorchEvaluator(training_model)
    evaluator.bind_model(ThreeConvs())
    with pytest.warns(UserWarning, match="TorchEvaluator has no evaluating_func"):
        assert evaluator.evaluate() is None
    evaluator.evaluating_func = lambda model: {"accuracy": 1.0}
    with pytest.warns(UserWarning, match="returned accuracy and no 'default'"):
        assert evaluator.evaluate() == (None, {"accuracy": 1.0})


def test_a_quantizer_continues_another_of_its_class() -> None:
    model = ThreeConvs()
    evaluator = torch_evaluator(model)
    first = LsqQuantizer(model, config_list(LsqQuantizer)[:1], evaluator)
    second = LsqQuantizer.from_compressor(first, config_list(LsqQuantizer)[1:])
    assert sorted(second._module_wrappers) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert list(second._target_spaces["fc1"]) == ["weight"]
    _, config = second.compress(2, None)
    check_compressed(model, config, LsqQuantizer)
    with pytest.raises(
        ConfigError, match="QATQuantizer.from_compressor continues a QATQuantizer, got an object of the class Lsq"
    ):
        QATQuantizer.from_compressor(second, config_list(QATQuantizer))


def test_qat_starts_after_its_steps() -> None:
    model = ThreeConvs()
    states: list[str] = []

    def train(model: nn.Module, optimizer: Any, step: Any, *args: Any) -> None:
        for batch in list(batches())[:4]:
            optimizer.zero_grad()
            step(batch, model).backward()
            states.append(dict(qmodules(model))["fc1"].state.name)
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    quantizer = QATQuantizer(model, config_list(QATQuantizer), TorchEvaluator(train, optimizer, training_step), 2)
    quantizer.track_forward(digits()[0][:4])
    quantizer.compress(4, None)
    assert states == ["CALIBRATION", "CALIBRATION", "QUANT_AWARE_TRAIN", "QUANT_AWARE_TRAIN"]


def test_ptq_corrects_biases() -> None:
    torch.manual_seed(0)
    model = ThreeConvs()
    training_model(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), training_step)
    plain, corrected = copy.deepcopy(model), copy.deepcopy(model)
    x, _ = digits(train=False)
    with torch.no_grad():
        exact = model.eval()(x)
    entry = {"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}
    errors = []
    for net, with_bias in ((plain, False), (corrected, True)):
        quantizer = PtqQuantizer(net, [entry], torch_evaluator(net), is_bias_correction=with_bias)
        quantizer.compress(1, None)
        with torch.no_grad():
            shift = (net(x) - exact).mean(0)
            errors.append(float((shift - shift.mean()).abs().max()))  # log-softmax moves all classes together
    assert errors[1] < 0.05 * errors[0]
