"""AutoQNN's `convert`, and its training and validation loops."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.compat.autoqnn.modules import LAYERS, QuantLayer
from torchquant.errors import ConfigError
from torchquant.graph import SitePlan, capture
from torchquant.plan import QuantPlan
from torchquant.qmodule.patterns import plain_type
from torchquant.quantizers import Quantizer
from torchquant.range_observers._statistics import StatisticTracker

DEFAULT_QUANTIZE_MODULE_MAPPINGS: dict[type[nn.Module], type[nn.Module]] = {layer.kind: layer for layer in LAYERS}
SLOTS = {"weight_quant": "weight", "bias_quant": "bias", "act_quant": "input"}

Metric = Callable[[Tensor, Tensor], Tensor]


def convert(
    module: nn.Module,
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    inplace: bool = False,
    quantize_config_dict: Mapping[str, Quantizer | None] | None = None,
) -> nn.Module:
    """Copy a module so that its layers quantize, also if it is a layer itself. Weights, device and mode are kept.

    `mapping`: torch class -> class of `autoqnn.modules`, for the layers to convert; by default all.
    `quantize_config_dict`: "weight_quant", "bias_quant", "act_quant" (at the input of the layer) -> a quantizer or
    None; every layer gets a new clone of it. Raises ConfigError.

    >>> from torchquant.compat import autoqnn
    >>> model = convert(
    ...     nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    ...     quantize_config_dict={
    ...         "weight_quant": autoqnn.quantizers.FixedQuant(bitwidth=4),
    ...         "act_quant": autoqnn.quantizers.FixedQuantAct(bitwidth=4),
    ...     },
    ... )
    >>> type(model[0]).__name__
    'Linear'
    """
    mapping = DEFAULT_QUANTIZE_MODULE_MAPPINGS if mapping is None else mapping
    given = dict(quantize_config_dict or {})
    for key, quantizer in given.items():
        if key not in SLOTS:
            raise ConfigError(f"the keys of quantize_config_dict must be among {', '.join(SLOTS)}; got {key!r}")
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            raise ConfigError(f"quantize_config_dict['{key}'] must be a quantizer or None, got {quantizer!r}")
    for kind, target in mapping.items():
        if target not in LAYERS or target.kind is not kind:  # type: ignore[attr-defined]
            raise ConfigError(
                f"mapping must map a torch layer to the autoqnn.modules layer of the same name, got {kind} -> {target}"
            )
    plan = _plan(module, mapping, given)
    converted = plan.apply(module, inplace)
    planned = {site.path for site in plan.sites}
    for path, part in converted.named_modules():
        if path in planned:
            kind = plain_type(part.layer)  # type: ignore[arg-type]
            part.__class__ = mapping[kind]  # the same module, whose state follows train and eval mode
    return converted


def _plan(
    module: nn.Module, mapping: Mapping[type[nn.Module], type[nn.Module]], given: Mapping[str, Quantizer | None]
) -> QuantPlan:
    sites = []
    for site in capture(module, trace=False, fuse=False).sites:
        if site.module is None or not site.is_layer or plain_type(site.module) not in mapping:
            continue
        fields: dict[str, Any] = {
            SLOTS[key]: _clones(quantizer)
            for key, quantizer in given.items()
            if quantizer is not None and SLOTS[key] in site.fields
        }
        sites.append(SitePlan(site.path, **fields))
    return QuantPlan(tuple(sites), trace=False, fuse=False)


def _clones(quantizer: Quantizer) -> Callable[[nn.Module], Quantizer]:
    return lambda module: clone_quantizer(quantizer)


def clone_quantizer(quantizer: Quantizer) -> Quantizer:
    """Copy a quantizer without its observed data."""
    clone = copy.deepcopy(quantizer)
    for part in clone.modules():
        if isinstance(part, StatisticTracker):
            part.reset()
    return clone


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Compute the percentage of rows of (N, classes) scores with the label among the `k` largest; (1,) for each k."""
    ranked = output.topk(min(max(topk), output.shape[1]), 1).indices
    hits = ranked == target.view(-1, 1)
    return [hits[:, :k].any(1).float().mean().view(1) * 100.0 for k in topk]


def top1(output: Tensor, target: Tensor) -> Tensor:
    """Compute the percentage of labels with the largest score.

    >>> top1(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor([50.])
    """
    return accuracy(output, target)[0]


def top5(output: Tensor, target: Tensor) -> Tensor:
    """Compute the percentage of labels among the five largest scores."""
    return accuracy(output, target, (5,))[0]


class _Averages:
    """Averages over batches, weighted by their sizes, and a line that shows them."""

    def __init__(self, metric_meds: Sequence[Metric]) -> None:
        self.metrics = metric_meds
        self.totals = [0.0] * (1 + len(metric_meds))
        self.count = 0

    def update(self, output: Tensor, target: Tensor, loss: Tensor) -> None:
        n = len(target)
        found = [float(loss.detach()), *(float(metric(output.detach(), target)) for metric in self.metrics)]
        self.totals = [total + value * n for total, value in zip(self.totals, found, strict=True)]
        self.count += n

    def result(self) -> tuple[float, list[float]]:
        if not self.count:
            raise ConfigError("the loader yielded no batch; give at least one")
        loss, *metrics = (total / self.count for total in self.totals)
        return loss, metrics

    def line(self) -> str:
        loss, metrics = self.result()
        named = (f"{getattr(m, '__name__', 'metric')} {v:.3f}" for m, v in zip(self.metrics, metrics, strict=True))
        return "\t".join([f"Loss {loss:.4f}", *named])


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _batch(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].to(_device(model)), batch[1].to(_device(model))


def _run(
    loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    metric_meds: Sequence[Metric],
    print_freq: int,
    title: str,
) -> tuple[float, float, float, list[float]]:
    """Run one pass over a loader: (seconds per batch, of which waiting for data, loss, metrics)."""
    model.train(optimizer is not None)
    averages = _Averages(metric_meds)
    started = time.perf_counter()
    waiting, n_batches = 0.0, 0
    with torch.set_grad_enabled(optimizer is not None):
        asked = started
        for i, batch in enumerate(loader):
            x, target = _batch(model, batch)
            waiting += time.perf_counter() - asked
            output = model(x)
            loss = criterion(output, target)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            averages.update(output, target, loss)
            n_batches = i + 1
            if print_freq and n_batches % print_freq == 0:
                print(f"{title}[{n_batches}]\t{averages.line()}")
            asked = time.perf_counter()
    loss_mean, metrics = averages.result()
    return (time.perf_counter() - started) / n_batches, waiting / n_batches, loss_mean, metrics


def train(
    train_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    epoch: int = 1,
    metric_meds: Sequence[Metric] = (),
    print_freq: int = 10,
) -> tuple[float, float, float, list[float]]:
    """Train for one epoch on the model's device: (seconds per batch, of which waiting for data, loss, metrics)."""
    return _run(train_loader, model, criterion, optimizer, metric_meds, print_freq, f"Epoch: [{epoch}]")


def validate(
    val_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    metric_meds: Sequence[Metric] = (),
    print_freq: int = 10,
) -> tuple[float, list[float]]:
    """Compute loss and metrics over a loader, in evaluation mode."""
    return _run(val_loader, model, criterion, None, metric_meds, print_freq, "Test: ")[2:]


def train_on_batch(
    train_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    metric_meds: Sequence[Metric] = (),
) -> tuple[float, list[float]]:
    """Train one step on the first batch of the loader; return loss and metrics before the step."""
    first = [next(iter(train_loader))]
    return _run(first, model, criterion, optimizer, metric_meds, 1, "Step ")[2:]


def validate_on_batch(
    val_loader: Iterable[Sequence[Tensor]],
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    metric_meds: Sequence[Metric] = (),
) -> tuple[float, list[float]]:
    """Compute loss and metrics on the first batch of the loader."""
    return _run([next(iter(val_loader))], model, criterion, None, metric_meds, 1, "Test: ")[2:]


__all__ = [
    "DEFAULT_QUANTIZE_MODULE_MAPPINGS",
    "QuantLayer",
    "accuracy",
    "clone_quantizer",
    "convert",
    "top1",
    "top5",
    "train",
    "train_on_batch",
    "validate",
    "validate_on_batch",
]
