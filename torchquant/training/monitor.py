"""Watch a quantization-aware training: what quantizers do to weights and activations, while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._arguments import Count, checked, number, one_number
from torchquant.errors import ConfigError
from torchquant.range_observers._calls import widest
from torchquant.training.batches import is_first_rank
from torchquant.training.history import History, Look
from torchquant.training.looks import Tally
from torchquant.training.sinks import Sink, SinkLike, open_sinks
from torchquant.training.watched_sites import Hook, Site, WeightSite, sites_of

EVERY, SAMPLES = 50, 4096
TOTALS = ("below", "above", "dead_codes", "scale_drift", "distance", "flips", "oscillation")
"""Figures of which there is a mean over the model, with each tensor counted by its elements."""


@checked
class Monitor(nn.Module):
    """Looks at every quantizer of a model after each `every` steps of its training, and writes what it sees.

    Call `step()` after each `optimizer.step()`, before the gradients are cleared. A figure is a number under
    "PATH/SLOT/NAME", or "weight/NAME" and "activation/NAME" for the mean over the model; docs/monitor.md says more.
    Weights: `flips`, the share of elements whose code has changed since the look before, by size (`flips_by_1`,
    `flips_by_2`, `flips_by_more`); `oscillation`, the share whose code has changed against the direction of its last
    change; `flipped_never`, `flipped_once`, `flipped_twice`, `flipped_more`, the shares by the number of changes so
    far; `distance`, the mean distance to the nearest threshold, in steps, at most 1. Every quantizer: `sqnr` in dB;
    `below` and `above`, the shares that are clipped; `dead_codes`, the share of codes that no element takes; `scale`,
    the mean distance of adjacent levels; `scale_drift`, its mean relative change since the look before;
    `scale_gradient`, the norm of the gradient of what the quantizer learns. What a scheme does not have is None.

    `to`: sinks, such as "csv:FILE", "tensorboard:FOLDER", "wandb:PROJECT", "mlflow:EXPERIMENT", "terminal", a `Sink`,
    or a function of the step and its numbers. `samples`: how many elements of each tensor it looks at, always the same
    ones of a weight; None: all. Activations are seen by hooks that are there only in the steps that count, in forwards
    with gradients; code of torch.compile does not run them. The training stays the same, bit for bit, and no step waits
    for an accelerator: the numbers arrive some steps later, or with `flush()`. With torch.distributed every rank looks
    at its own batches, and the first rank writes. The state is in `state_dict`; sinks and history are not. Raises
    ConfigError for a model without quantizers, and for one that `fully_shard` has sharded.

    >>> import torchquant as tq
    >>> model = tq.quantize(nn.Linear(4, 2), "w4a8", torch.randn(8, 4))
    >>> _ = tq.calibrate(model, [torch.randn(8, 4)])
    >>> tq.set_qmodule_state(model, tq.QModuleState.QUANT_AWARE_TRAIN)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = Monitor(model, every=1)
    >>> model(torch.randn(8, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> monitor.step()
    >>> (look,) = monitor.history
    >>> look.step, 0.0 <= look.numbers["root/weight/flips"] <= 1.0
    (1, True)
    """

    def __init__(
        self,
        model: nn.Module,
        every: Count = EVERY,
        to: SinkLike | Iterable[SinkLike] = (),
        samples: Count | None = SAMPLES,
    ) -> None:
        super().__init__()
        self.every, self.samples, self.n_steps = every, samples, 0
        self.sites = nn.ModuleList(sites_of(model, samples))
        if not self.sites:
            raise ConfigError("the model has no quantizers to look at; quantize it first, with torchquant.quantize")
        self._sinks: list[Sink] = open_sinks(to) if is_first_rank() else []
        self._pending: _Pending | None = None
        self._history = History()
        self._handles: list[Any] = []
        self._has_warned = False
        with torch.no_grad():
            for site in self._each():
                site.begin(samples)
        self._hook()

    def _each(self) -> list[Site]:
        return list(self.sites)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, numbers: Mapping[str, Tensor | float] | None = None) -> None:
        """Count an optimizer step; look at the model if it is the step for it.

        `numbers`: more numbers to write with the look, such as {"loss": loss}; tensors are not read before that.
        """
        self.n_steps += 1
        if self._pending is not None and self._pending.sent.is_there:
            self.flush()
        if self.n_steps % self.every == 0:
            self._look(numbers or {})
        self._hook()

    def _look(self, given: Mapping[str, Tensor | float]) -> None:
        """Look at every quantizer, and send what is found on its way to the host."""
        self.flush()
        self._unhook()
        parts = [_Part(site, site.look(self.samples), site.tally) for site in self._each()]
        self._warn_if_blind(parts)
        for site in self._each():
            site.tally = Tally()
        own = {
            name: one_number(x, name).detach() if isinstance(x, Tensor) else number(x, name)
            for name, x in given.items()
        }
        sums = [value for part in parts for value in part.sums.values()]
        sent = _Sent([*sums, *(x for x in own.values() if isinstance(x, Tensor))])
        self._pending = _Pending(self.n_steps, parts, own, sent)
        if sent.is_there:
            self.flush()

    def flush(self) -> None:
        """Write the last look, if it is not written yet; waits for an accelerator that has not computed it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        numbers = pending.numbers()
        self._history.add(pending.step, numbers)
        known = {name: value for name, value in numbers.items() if value is not None}
        for sink in self._sinks:
            sink.write(pending.step, known)

    def close(self) -> None:
        """Write the last look, take the hooks off the model, and close the sinks."""
        self.flush()
        self._unhook()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def history(self) -> list[Look]:
        """The looks of this monitor so far, each with all its figures; the last one is waited for."""
        self.flush()
        return self._history.looks()

    def _hook(self) -> None:
        """Let the activations of the next step be seen, if that is a step to look at."""
        if self._handles or (self.n_steps + 1) % self.every:
            return
        for site in self._each():
            quantizer = site.held
            if not isinstance(site, WeightSite) and quantizer is not None:
                hook = Hook(site, self.samples)
                self._handles.append(quantizer.register_forward_hook(hook, with_kwargs=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _warn_if_blind(self, parts: Sequence[_Part]) -> None:
        """Warn, once, if no hook has seen an activation although activations are quantized."""
        seen = [part.tally.n > 0 for part in parts if part.site.is_quantized_activation]
        if seen and not any(seen) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the monitor saw no activation in step {self.n_steps}, so that their figures are None: code of "
                "torch.compile runs no hooks, and forwards without gradients do not count. Weights are seen anyway",
                stacklevel=4,
            )

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.n_steps, *(site.is_started for site in self._each())])

    def set_extra_state(self, state: Tensor) -> None:
        n_steps, *started = (int(number) for number in state)
        if len(started) != len(self.sites):
            raise ConfigError(
                f"the state is of a monitor of {len(started)} quantizers, and this one watches {len(self.sites)}; load "
                "it into a monitor of the same model"
            )
        self.n_steps = n_steps
        for site, is_started in zip(self._each(), started, strict=True):
            site.is_started = bool(is_started)
        self._pending = None
        self._unhook()
        self._hook()


@dataclass(frozen=True)
class _Part:
    """The figures that a look has found at one quantizer."""

    site: Site
    sums: Mapping[str, Tensor]
    tally: Tally


@dataclass(frozen=True)
class _Pending:
    """A look whose numbers are on their way. `given`: the numbers of the caller, tensors behind the sums."""

    step: int
    parts: Sequence[_Part]
    given: Mapping[str, Tensor | float]
    sent: _Sent

    def numbers(self) -> dict[str, float | None]:
        """Return all numbers of the look: the caller's, the means over the model, and those of each quantizer."""
        values = iter(self.sent.read())
        of_sites = [
            (part, part.site.figures({name: next(values) for name in part.sums}, part.tally.n)) for part in self.parts
        ]
        own = {name: next(values) if isinstance(x, Tensor) else x for name, x in self.given.items()}
        each = {f"{part.site.key}/{name}": x for part, figures in of_sites for name, x in figures.items()}
        return {**own, **_totals(of_sites), **each}


def _totals(of_sites: Sequence[tuple[_Part, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """Return the means over all weights and all activations, and the lowest SQNR of each."""
    found: dict[str, float | None] = {}
    for group in ("weight", "activation"):
        inside = [(part.tally.n_elements, figures) for part, figures in of_sites if part.site.group == group]
        for name in TOTALS:
            known = [(n, x) for n, figures in inside if (x := figures.get(name)) is not None]
            n_elements = sum(n for n, _ in known)
            if n_elements:
                found[f"{group}/{name}"] = sum(n * x for n, x in known) / n_elements
        ratios = [x for _, figures in inside if (x := figures["sqnr"]) is not None]
        if ratios:
            found[f"{group}/lowest_sqnr"] = min(ratios)
    return found


class _Sent:
    """Numbers on their way from the devices to the host, where they arrive without a wait."""

    def __init__(self, found: Sequence[Tensor]) -> None:
        self._places: dict[torch.device, list[int]] = {}
        for i, value in enumerate(found):
            self._places.setdefault(value.device, []).append(i)
        self._host: list[Tensor] = []
        self._events: list[Any] = []
        for device, places in self._places.items():
            together = torch.stack([found[i].to(widest(device)) for i in places])
            self._host.append(together.to("cpu", non_blocking=True))
            if device.type != "cpu":
                self._events.append(torch.Event(device))
                self._events[-1].record(torch.accelerator.current_stream(device))

    @property
    def is_there(self) -> bool:
        """Whether the numbers can be read without waiting for a device."""
        return all(event.query() for event in self._events)

    def read(self) -> list[float]:
        """Return the numbers in their order; waits for a device that has not computed them yet."""
        for event in self._events:
            event.synchronize()
        pairs = [
            pair
            for places, values in zip(self._places.values(), self._host, strict=True)
            for pair in zip(places, values.tolist(), strict=True)
        ]
        return [value for _, value in sorted(pairs)]
