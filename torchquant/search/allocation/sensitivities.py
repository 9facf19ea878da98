"""Measure how much each single option degrades the model: the sensitivities for mixed-precision allocation."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant._files import check_format, read_json, write_json
from torchquant._registry import did_you_mean
from torchquant._renamed import renamed_attribute
from torchquant._tables import ShownAsTables, text_table
from torchquant.errors import ConfigError, NonFiniteError, one_line
from torchquant.graph.called import first_real, tensors_in
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.search.allocation.calibrated_supernet import (
    CalibratedSupernet,
    Loss,
    checked_batches,
    searched_plan,
)
from torchquant.search.allocation.curvature import STORED, fisher_degradations, hessian_degradations
from torchquant.search.cost import SearchPoint

METHODS = {
    "mse": "mean squared difference of the model's outputs",
    "kl": "KL divergence of the class probabilities, in nats",
    "loss": "increase of the loss",
    "hessian": "Tr(H) / n * squared error of the weight (HAWQ-V2)",
    "fisher": "half the squared error, weighted by squared gradients",
}
FORMAT = 1
FILE = "sensitivity.json"
OnPoint = Callable[[SearchPoint, tuple[float, ...]], object]


@dataclass(frozen=True)
class Sensitivity(ShownAsTables):
    """The degradation by each option of each search point. Frozen; can be printed, saved and loaded.

    `degradations`: point -> one number per option, in the unit that `METHODS` names. `options`: their spec strings.
    `reference_loss`: the loss with all search points float; None without targets.
    """

    method: str
    degradations: Mapping[SearchPoint, tuple[float, ...]]
    options: Mapping[SearchPoint, tuple[str, ...]]
    reference_loss: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    harms = renamed_attribute("harms", "degradations")

    def table(self) -> str:
        """Show every option of every point, sorted by falling degradation."""
        rows = [
            [*point, spec, f"{degradation:.4g}"]
            for point, degradations in sorted(self.degradations.items(), key=lambda item: -max(item[1]))
            for spec, degradation in zip(self.options[point], degradations, strict=True)
        ]
        return text_table(["site", "slot", "option", f"degradation ({self.method})"], rows)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the sensitivity as plain data, as `save` writes it."""
        points = [
            {"site": point[0], "field": point[1], "options": list(self.options[point]), "harm": list(degradations)}
            for point, degradations in self.degradations.items()
        ]
        head = {"torchquant_sensitivity": FORMAT, "settings": dict(self.settings), "method": self.method}
        return {**head, "reference_loss": self.reference_loss, "places": points}

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> Sensitivity:
        """Make a sensitivity from the result of `to_dict`; `where` names the data in messages. Raises ConfigError.

        >>> found = Sensitivity("mse", {("0", "weight"): (0.5, 0.1)}, {("0", "weight"): ("affine:2", "affine:4")})
        >>> Sensitivity.from_dict(found.to_dict()) == found
        True
        """
        check_format(where, data, "torchquant_sensitivity", FORMAT, "a sensitivity")
        try:
            points = {(p["site"], p["field"]): p for p in data["places"]}
            degradations = {point: tuple(map(float, p["harm"])) for point, p in points.items()}
            options = {point: tuple(p["options"]) for point, p in points.items()}
            method, reference, settings = str(data["method"]), data["reference_loss"], dict(data["settings"])
            if method not in METHODS or not all(len(degradations[point]) == len(options[point]) for point in points):
                raise ValueError("expected one degradation per option and a known method")
            return cls(method, degradations, options, None if reference is None else float(reference), settings)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where} does not hold a complete sensitivity: {one_line(repr(error))}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the sensitivity as JSON."""
        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read a file that `save` or `sensitivity(out=...)` wrote. Raises ConfigError."""
        return cls.from_dict(read_json(path), f"{path}")


@checked
def sensitivity(
    net: nn.Module,
    rules: Rules | QuantPlan,
    example_inputs: Any,
    batches: Iterable[Any],
    method: str = "mse",
    loss: Loss | None = F.cross_entropy,
    out: str | os.PathLike[str] | None = None,
    on_place: OnPoint | None = None,
    draws: int = 50,
    seed: int = 0,
    min_bits: int = 2,
    max_bits: int = 8,
) -> Sensitivity:
    """Measure how much each single option degrades the float model `net`, which is not changed.

    `rules`: as `search_rules` reads them, or a plan with `Candidates`. `batches`: a small list of (inputs, targets);
    all ranges are measured on them first. `method` (`METHODS`):

    * "mse", "kl", "loss" compare with the model whose search points are all float and whose other sites quantize,
      in one pass over the batches per option. "kl": classes are on the last axis of the output; "loss" may be below 0.
    * "hessian" (HAWQ-V2): for weights and biases of the float model, with `draws` Rademacher draws per batch
      (`hessian_trace`), equal for equal `seed`. Deviation: a trace below 0 counts as 0, with a warning.
    * "fisher": for all points; the empirical Fisher matrix with targets as labels, one backward pass per sample.

    `loss(output, targets)`: the mean over a batch. `out`: a folder for `sensitivity.json`, which is written whole after
    each point; a second call with the same settings resumes where the first stopped, or returns at once.
    `on_place(point, degradations)` is called after each point. `min_bits`, `max_bits`: the widths of specs with `{n}`.
    Raises ConfigError, NonFiniteError.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [(torch.randn(16, 4), torch.arange(16) % 3)]
    >>> found = sensitivity(net, [{"weight": ["affine:2", "affine:8"]}], batches[0][0], batches, "kl")
    >>> all(two > eight for two, eight in found.degradations.values())
    True
    """
    given = checked_batches(batches)
    plan = searched_plan(net, rules, example_inputs, min_bits, max_bits)
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got '{method}'.{did_you_mean(method, METHODS)}")
    if loss is None and method not in ("mse", "kl"):
        raise ConfigError(f"the method '{method}' needs the argument loss, got None")
    probe = CalibratedSupernet(net, plan, given)
    settings = {
        "method": method,
        "loss": None if loss is None else _name(loss),
        "plan": _digest([asdict(site) for site in plan.sites], [[*p, probe.options(p)] for p in probe.mixtures]),
        "weights": _digest(dict(net.state_dict())),
        "batches": _digest(given),
        **({"draws": draws, "seed": seed} if method == "hessian" else {}),
    }
    known = _claim(None if out is None else Path(out), settings)
    if known is not None and set(known.degradations) == set(probe.mixtures):
        return known
    run = _Run(probe, method, loss, draws, seed)
    options = {point: tuple(probe.options(point)) for point in probe.mixtures}
    reference = run.reference_loss() if known is None else known.reference_loss
    degradations = {} if known is None else dict(known.degradations)
    for point, measured in run.degradations([point for point in options if point not in degradations]):
        degradations[point] = measured
        if out is not None:
            Sensitivity(method, degradations, {p: options[p] for p in degradations}, reference, settings).save(
                Path(out) / FILE
            )
        if on_place is not None:
            on_place(point, measured)
    return Sensitivity(method, {point: degradations[point] for point in options}, options, reference, settings)


class _Run:
    """Measures one method on one calibrated supernet."""

    def __init__(self, probe: CalibratedSupernet, method: str, loss: Loss | None, draws: int, seed: int) -> None:
        self.probe, self.method, self.loss, self.draws, self.seed = probe, method, loss, draws, seed
        self.reference = list(probe.outputs())
        if method == "hessian":
            for site, name in probe.mixtures:
                if name not in STORED:
                    raise ConfigError(
                        f"'{site}', {name}: the method 'hessian' works for weights and biases only; "
                        "for activations use 'mse', 'kl', 'loss' or 'fisher'"
                    )

    def reference_loss(self) -> float | None:
        """Compute the loss of the reference model; None without a loss or without targets."""
        if self.loss is None or any(targets is None for _, targets in self.probe.batches):
            if self.method in ("mse", "kl"):
                return None
            raise ConfigError(f"the method '{self.method}' needs targets, but a batch has None")
        return self.probe.mean_loss(self.loss, self.reference)

    def degradations(self, points: list[SearchPoint]) -> Iterator[tuple[SearchPoint, tuple[float, ...]]]:
        """Yield each search point with the degradations of its options. Raises NonFiniteError."""
        at_once = fisher_degradations(self.probe, points, self.loss) if self.method == "fisher" and self.loss else {}
        for point in points:
            found = tuple(at_once[point] if point in at_once else self._of(point))
            for spec, degradation in zip(self.probe.options(point), found, strict=True):
                if not math.isfinite(degradation):
                    raise NonFiniteError(
                        f"'{point[0]}', {point[1]}: the degradation of '{spec}' is {degradation}; leave it out"
                    )
            yield point, found

    def _of(self, point: SearchPoint) -> list[float]:
        if self.method == "hessian":
            assert self.loss is not None
            return hessian_degradations(self.probe, point, self.loss, self.draws, self.seed)
        found = []
        for option in range(len(self.probe.options(point))):
            with self.probe.using(point, option):
                found.append(self._difference())
        return found

    def _difference(self) -> float:
        """Compute the difference between the model with its current options and the reference, by the method."""
        outputs = self.probe.outputs()
        if self.method == "loss":
            assert self.loss is not None
            now, before = (self.probe.mean_loss(self.loss, given) for given in (outputs, self.reference))
            return now - before
        measure = _squared_difference if self.method == "mse" else _divergence
        total, count = 0.0, 0
        for before_output, output in zip(self.reference, outputs, strict=True):
            difference = measure(*(first_real(given).to(torch.float64) for given in (before_output, output)))
            total, count = total + float(difference.sum()), count + difference.numel()
        return total / count


def _squared_difference(reference: Tensor, output: Tensor) -> Tensor:
    return (output - reference).square()


def _divergence(reference: Tensor, output: Tensor) -> Tensor:
    """Compute the KL divergence of two outputs with logits on the last axis, one number per distribution."""
    if reference.ndim == 0 or reference.shape[-1] < 2:
        raise ConfigError(f"'kl' needs logits of two classes or more on the last axis, got {tuple(reference.shape)}")
    p, q = (torch.log_softmax(logits, -1) for logits in (reference, output))
    return (p.exp() * (p - q)).sum(-1)


def _name(loss: Any) -> str:
    return getattr(loss, "__qualname__", None) or (repr(loss) if isinstance(loss, nn.Module) else type(loss).__name__)


def _digest(*values: Any) -> str:
    """Compute a short checksum of nested values; tensors count by type, shape and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors_in(values):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(_without_tensors(values)).encode())
    return digest.hexdigest()[:16]


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_tensors(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_without_tensors(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def _claim(folder: Path | None, settings: dict[str, Any]) -> Sensitivity | None:
    """Read the sensitivity in the folder, if any. Raises ConfigError if its settings differ."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write into the output folder {folder}: {error.strerror}") from error
    if not (folder / FILE).exists():
        return None
    known = Sensitivity.load(folder / FILE)
    if known.settings != settings:
        names = dict.fromkeys([*settings, *known.settings])
        changed = ", ".join(
            f"{name}: {known.settings.get(name)} there, {settings.get(name)} now"
            for name in names
            if known.settings.get(name) != settings.get(name)
        )
        raise ConfigError(
            f"{folder} holds a sensitivity with other settings ({changed}); choose another folder, or those settings"
        )
    return known
