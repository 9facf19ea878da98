"""NNI's evaluators: how a model is trained and evaluated, in plain torch, in Lightning or by a Transformers trainer.

A quantizer is given one of them, and `compress(max_steps, max_epochs)` trains through it. Learned numbers of quantizers
get a group of their own in the optimizer, without weight decay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.utils import quantizer_parameters

Task = Callable[[], Any]
LossPatch = Callable[[Tensor, Any], Tensor]


class Hook:
    """A torch hook that can be registered and removed again; `hook_factory(buffer)` makes its function.

    `buffer`: a list in which the function can leave what it saw; a new one after each removal.
    """

    def __init__(self, target: Any, target_name: str, hook_factory: Callable[[list[Any]], Callable[..., Any]]) -> None:
        self.target, self.target_name, self.hook_factory = target, target_name, hook_factory
        self.buffer: list[Any] = []
        self.handle: Any = None

    def _attach(self, function: Callable[..., Any]) -> Any:
        raise NotImplementedError

    def register(self) -> None:
        """Put the hook on its target, unless it is there."""
        if self.handle is None:
            self.handle = self._attach(self.hook_factory(self.buffer))

    def remove(self) -> None:
        """Take the hook off."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.buffer = None, []


class TensorHook(Hook):
    """Sees the gradient of a tensor."""

    def _attach(self, function: Callable[..., Any]) -> Any:
        return self.target.register_hook(function)


class ForwardHook(Hook):
    """Sees a module, its input and its output."""

    def _attach(self, function: Callable[..., Any]) -> Any:
        return self.target.register_forward_hook(function)


class BackwardHook(Hook):
    """Sees a module and the gradients of its input and its output."""

    def _attach(self, function: Callable[..., Any]) -> Any:
        return self.target.register_full_backward_hook(function)


class Evaluator:
    """The base of the evaluators: a bound model, tasks around each step of the first optimizer, changes of the loss."""

    dummy_input: Any = None

    def __init__(self) -> None:
        self.model: Any = None
        self._initialization_complete = False
        self._before_step: list[Task] = []
        self._after_step: list[Task] = []
        self._loss_patches: list[LossPatch] = []
        self._hooks: list[Hook] = []

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        """Do nothing but note the call: optimizers go on with the parameters they were made with."""
        self._initialization_complete = True

    def bind_model(self, model: nn.Module, param_names_map: Mapping[str, str] | None = None) -> None:
        """Take a model to train and evaluate. `param_names_map` is not needed: parameters stay what they are."""
        if self.model is not None and self.model is not model:
            self.unbind_model()
        self._initialization_complete = True
        self.model = model

    def unbind_model(self) -> None:
        """Let go of the model, its hooks, tasks and changes of the loss."""
        self.revert_loss()
        self.revert_optimizer_step()
        self.remove_all_hooks()
        self.model = None

    def patch_loss(self, patch: LossPatch) -> None:
        """Replace each loss by `patch(loss, batch)`."""
        self._loss_patches.append(patch)

    def revert_loss(self) -> None:
        """Use the losses as they are."""
        self._loss_patches.clear()

    def patch_optimizer_step(self, before_step_tasks: Iterable[Task], after_step_tasks: Iterable[Task]) -> None:
        """Run tasks before and after every step of the first optimizer."""
        self._before_step += before_step_tasks
        self._after_step += after_step_tasks

    def revert_optimizer_step(self) -> None:
        """Run no more tasks."""
        self._before_step.clear()
        self._after_step.clear()

    def register_hooks(self, hooks: Sequence[Hook]) -> None:
        """Register hooks until `remove_all_hooks`."""
        for hook in hooks:
            hook.register()
        self._hooks += hooks

    def get_all_hooks(self) -> list[Hook]:
        """Return the registered hooks."""
        return self._hooks

    def remove_all_hooks(self) -> None:
        """Remove the registered hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound model by the caller's own loop, for so many steps or epochs."""
        raise NotImplementedError

    def finetune(self) -> None:
        """Train the bound model as long as the caller's loop does by itself."""
        self.train()

    def evaluate(self) -> Any:
        """Return the caller's metric of the bound model, or (the one named "default", all) of a dictionary."""
        raise NotImplementedError

    def get_dummy_input(self) -> Any:
        """Return the example input, None if none was given."""
        return self.dummy_input

    def _bound(self) -> Any:
        if self.model is None:
            raise ConfigError(f"{type(self).__name__} has no model; call bind_model(model), or give it to a quantizer")
        return self.model

    def _loss(self, result: Any, batch: Any) -> Any:
        """Change the loss in the result of a training step: itself, the first of several, or the value at "loss"."""
        loss = result
        if isinstance(result, Mapping):
            loss = result["loss"]
        elif not isinstance(result, Tensor):
            loss = result[0]
        for patch in self._loss_patches:
            loss = patch(loss, batch)
        if isinstance(result, Tensor):
            return loss
        return {**result, "loss": loss} if isinstance(result, Mapping) else (loss, *result[1:])

    def _take(self, optimizers: Sequence[Optimizer]) -> None:
        """Give the first optimizer the learned numbers of quantizers, in a group of their own, and the tasks."""
        first = optimizers[0]
        learned = quantizer_parameters(self.model)
        own = {id(parameter) for parameter in learned["params"]}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        if own:
            first.add_param_group(learned)
        if getattr(first, "_torchquant_tasks", None) is not self:
            first._torchquant_tasks = self  # type: ignore[attr-defined]
            first.register_step_pre_hook(lambda *_: _run(self._before_step))
            first.register_step_post_hook(lambda *_: _run(self._after_step))


def _run(tasks: Iterable[Task]) -> None:
    for task in list(tasks):
        task()


def _metric(found: Any) -> Any:
    if not isinstance(found, Mapping):
        return found
    if "default" not in found:
        warnings.warn(
            f"the evaluation returned {', '.join(map(str, found))} and no 'default', so that it has no metric",
            stacklevel=3,
        )
    return found.get("default"), found


class TorchEvaluator(Evaluator):
    """Trains and evaluates by functions of the caller.

    `training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)` is a whole training loop
    that calls `training_step(batch, model, ...)`, which returns a loss, a tuple with the loss first or a dictionary
    with it at "loss". `evaluating_func(model)` returns a number, or a dictionary with one at "default". `optimizers`
    and `lr_schedulers` are one or a list of them; `nni.trace` around them is allowed and not needed.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        training_step: Callable[..., Any] | None = None,
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        super().__init__()
        given = [] if optimizers is None else [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        if not all(isinstance(optimizer, Optimizer) for optimizer in given):
            raise ConfigError(f"optimizers must be a torch optimizer or a list of them, got {shown(optimizers)}")
        self.training_func, self.optimizers, self.training_step = training_func, optimizers, training_step
        self.lr_schedulers, self.dummy_input, self.evaluating_func = lr_schedulers, dummy_input, evaluating_func
        self._optimizers = given

    def bind_model(self, model: nn.Module, param_names_map: Mapping[str, str] | None = None) -> None:
        """Take the model, and add the learned numbers of its quantizers to the optimizer."""
        super().bind_model(model)
        if self._optimizers:
            self._take(self._optimizers)

    def _step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.training_step is not None
        return self._loss(self.training_step(batch, *args, **kwargs), batch)

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        step = None if self.training_step is None else self._step
        self.training_func(self._bound(), self.optimizers, step, self.lr_schedulers, max_steps, max_epochs)

    def evaluate(self) -> Any:
        if self.evaluating_func is None:
            warnings.warn("TorchEvaluator has no evaluating_func, so that there is no metric", stacklevel=2)
            return None
        return _metric(self.evaluating_func(self._bound()))
