"""NNI's evaluators around trainers of other libraries: Lightning and Transformers; DeepSpeed's is refused."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchquant._shown import shown
from torchquant.compat._modes import FollowMode
from torchquant.compat.nni.evaluators import Evaluator
from torchquant.compat.nni.tracing import is_traceable
from torchquant.errors import ConfigError


class LightningEvaluator(Evaluator):
    """Trains and evaluates a LightningModule by a trainer.

    `trainer`: `nni.trace(Trainer)(...)`; each training makes a new one with the same arguments. `data_module`: a
    LightningDataModule, or a data loader. The metric is the mean of what is logged as "default" in testing.
    """

    def __init__(self, trainer: Any, data_module: Any, dummy_input: Any = None) -> None:
        super().__init__()
        _check_traced(trainer, "Trainer")
        self.trainer, self.data_module, self.dummy_input = trainer, data_module, dummy_input
        self._own: dict[str, Any] = {}

    def bind_model(self, model: nn.Module, param_names_map: Mapping[str, str] | None = None) -> None:
        """Take the LightningModule; its steps and optimizers are wrapped until `unbind_model`."""
        if not hasattr(model, "configure_optimizers"):
            raise ConfigError(f"LightningEvaluator trains a LightningModule, got a {type(model).__name__}")
        super().bind_model(model)
        if not self._own:
            for name in ("training_step", "validation_step", "test_step", "predict_step", "configure_optimizers"):
                self._own[name] = getattr(model, name)
                setattr(model, name, types.MethodType(self._wrapped(name), model))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        original = self._own[name]
        if name == "configure_optimizers":

            def configured(_: Any) -> Any:
                made = original()
                self._take(list(_optimizers_in(made)))
                return made

            return configured

        def step(model: Any, *args: Any, **kwargs: Any) -> Any:
            for hook in model._forward_pre_hooks.values():  # a step may call the parts and not the model itself
                if isinstance(hook, FollowMode):
                    hook.set_states(model)
            result = original(*args, **kwargs)
            batch = args[0] if args else kwargs.get("batch")
            return self._loss(result, batch) if name == "training_step" and result is not None else result

        return step

    def unbind_model(self) -> None:
        """Let go of the model and give it back its own steps."""
        for name in self._own:
            self.model.__dict__.pop(name, None)
        self._own = {}
        super().unbind_model()

    def _new_trainer(self, **given: int | None) -> Any:
        changed = {name: value for name, value in given.items() if value is not None}
        return self.trainer.trace_copy().get(num_sanity_val_steps=0, **changed)

    def _data(self) -> dict[str, Any]:
        is_module = hasattr(self.data_module, "train_dataloader")
        return {"datamodule" if is_module else "train_dataloaders": self.data_module}

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        model = self._bound()
        self._new_trainer(max_steps=max_steps, max_epochs=max_epochs).fit(model, **self._data())
        model.trainer = None

    def evaluate(self) -> Any:
        model, (data,) = self._bound(), self._data().values()
        found = self._new_trainer().test(model, data)
        model.trainer = None
        metrics = [float(each["default"]) for each in found if "default" in each]
        return (sum(metrics) / len(metrics) if metrics else None), found

    def get_dummy_input(self) -> Any:
        """Return the example input, or the first training batch."""
        return self.dummy_input if self.dummy_input is not None else next(iter(self.data_module.train_dataloader()))


def _optimizers_in(made: Any) -> Iterable[Optimizer]:
    """Find the optimizers in what `configure_optimizers` returned, in order."""
    if isinstance(made, Optimizer):
        yield made
    elif isinstance(made, Mapping):
        yield from _optimizers_in(made.get("optimizer"))
    elif isinstance(made, list | tuple):
        for each in made:
            yield from _optimizers_in(each)


class TransformersEvaluator(Evaluator):
    """Trains and evaluates by a trainer of Hugging Face Transformers: `nni.trace(Trainer)(model=model, ...)`."""

    def __init__(self, trainer: Any, dummy_input: Any = None) -> None:
        super().__init__()
        _check_traced(trainer, "Trainer")
        self.traced_trainer = self.trainer = trainer
        self.dummy_input = dummy_input
        self._own: dict[str, Any] = {}
        self._given = (trainer.optimizer, trainer.lr_scheduler)

    def bind_model(self, model: nn.Module, param_names_map: Mapping[str, str] | None = None) -> None:
        """Take the model; the loss and the optimizer of the trainer are wrapped until `unbind_model`."""
        super().bind_model(model)
        self.trainer.model = self.trainer.model_wrapped = model
        if not self._own:
            self._own = {name: getattr(self.trainer, name) for name in ("compute_loss", "create_optimizer")}
            self.trainer.compute_loss, self.trainer.create_optimizer = self._compute_loss, self._create_optimizer

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return self._loss(self._own["compute_loss"](model, inputs, return_outputs, **kwargs), inputs)

    def _create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = self._own["create_optimizer"](*args, **kwargs)
        self._take([made])
        return made

    def unbind_model(self) -> None:
        """Let go of the model and give the trainer back its own loss and optimizer."""
        for name in self._own:
            self.trainer.__dict__.pop(name, None)
        self._own = {}
        super().unbind_model()

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        self._bound()
        settings = self.trainer.args
        former = settings.max_steps, settings.num_train_epochs
        settings.max_steps = former[0] if max_steps is None else max_steps
        settings.num_train_epochs = former[1] if max_epochs is None else max_epochs
        self.trainer.optimizer, self.trainer.lr_scheduler = self._given
        try:
            self.trainer.train()
        finally:
            settings.max_steps, settings.num_train_epochs = former

    def evaluate(self) -> Any:
        self._bound()
        found = self.trainer.evaluate()
        named = found.get("default", found.get("eval_default"))
        return named, found


class DeepspeedTorchEvaluator:
    """Is refused: DeepSpeed's engine shards and rewrites parameters, which torchquant leaves to torch's FSDP2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "DeepspeedTorchEvaluator is not supported: DeepSpeed's engine owns the parameters. Use TorchEvaluator and "
            "wrap the quantizer in DistributedDataParallel, or shard the quantized model with torch's fully_shard"
        )


def _check_traced(trainer: Any, name: str) -> None:
    if isinstance(trainer, type) or not is_traceable(trainer):
        raise ConfigError(
            f"the trainer must be made by nni.trace({name})(...), so that it can be made again for each training; got "
            f"{shown(trainer)}"
        )
