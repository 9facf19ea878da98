"""Run the search: train weights, logits and widths together, then derive a plan."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant._arguments import checked
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with
from torchquant.plan.quant_plan import QuantPlan
from torchquant.plan.rules import Rules
from torchquant.qmodule import QModuleState
from torchquant.search.budget import Budget
from torchquant.search.cost import CostModel, LatencyTable, SearchPoint, name_of
from torchquant.search.learning.batches import Batches, batches_of, n_batches, pairs
from torchquant.search.learning.budget_multipliers import BudgetMultipliers
from torchquant.search.learning.budget_repair import keep_budgets, spend_slack
from torchquant.search.learning.progress import keep_search, resume_search
from torchquant.search.learning.supernet import build_supernet
from torchquant.search.settings import EpochRecord, SearchSettings
from torchquant.search.space import search_rules
from torchquant.training import Loss, OnEpoch, calibrate, fit_quantized
from torchquant.training.amp import mixed_precision
from torchquant.training.batches import is_first_rank
from torchquant.training.loop import across_ranks, epochs_done, random_state, set_random_state
from torchquant.utils import set_qmodule_state

SCOPES = ("layer", "model")
WARM_UP = 0.05  # share of retraining; short, since the weights were already trained quantized
MEMORY = 0.98  # decay of the running mean of a width's gradient


@checked
class Search:
    """The base of `SchemeSearch` and `PrecisionLearning`, which differ in their defaults only.

    `net`: the float model, which is not changed. `rules`: as for a `QuantPlan`, where a slot may be a list of candidate
    specs, or specs with `{n}`, whose width is learned within `min_bits`..`max_bits`; or a plan with `Candidates`.
    `budget`: bounds on the cost of the plan, "bytes<=40kB,bits<=4" (`Budget`). `per`: "layer", or "model" for one
    choice for all points with the same candidates. `form`: the gradient of a width, see `MixtureQuantizer`. `loss`: a
    function of (outputs, targets). `latency`: (site path, weight spec) -> seconds. Raises ConfigError, also for a
    budget that no choice can keep.

    `model` is the model of the search, `plan` the plan with candidates, `history` a list of `EpochRecord`. Within
    torch.distributed the steps run in DistributedDataParallel.
    """

    defaults = SearchSettings()

    def __init__(
        self,
        net: nn.Module,
        rules: Rules | QuantPlan,
        example_inputs: Any,
        budget: str | Budget | Sequence[str | Budget] = (),
        settings: SearchSettings | None = None,
        per: str = "layer",
        min_bits: int = 2,
        max_bits: int = 8,
        form: str = "interp",
        loss: Loss = F.cross_entropy,
        latency: LatencyTable | None = None,
    ) -> None:
        if per not in SCOPES:
            raise ConfigError(f"per must be one of {', '.join(SCOPES)}, got {per!r}")
        if not isinstance(rules, QuantPlan):
            rules = QuantPlan.from_rules(search_rules(rules, min_bits, max_bits, form), net, example_inputs)
        self.plan = rules
        self.settings = settings or self.defaults
        self.example_inputs = example_inputs
        self.costs = CostModel(net, self.plan, example_inputs, latency)
        budgets = Budget.parse(budget)
        self.costs.check_feasible(budgets)
        widest = {v.point: v.bits.index(max(v.bits)) for v in self.costs.variables}
        if self.settings.cost_weight and not self.costs.totals(widest)[self.settings.cost_measure]:
            raise ConfigError(f"cost_measure '{self.settings.cost_measure}' is 0 at every search point; choose another")
        self.prices = BudgetMultipliers(budgets, self.settings, self.costs.totals(widest)[self.settings.cost_measure])
        self.loss = loss
        self.history: list[EpochRecord] = []
        self.epoch = 0
        self.model, self.mixtures = build_supernet(net, self.plan, per == "model")
        for parameter in net.parameters():
            self.model.to(parameter.device)
            break
        self.every_mixture = [m for mixtures in self.mixtures.values() for m in mixtures]
        for mixture in self.every_mixture:
            mixture.hard = self.settings.hard
            mixture.start_at(self.settings.start_bits)
        self.logits = _distinct(m.theta for m in self.every_mixture)
        self.widths = _distinct(m.float_bitwidth for m in self.every_mixture)
        learned = {id(p) for p in (*self.logits, *self.widths)}
        self.weights = [p for p in self.model.parameters() if id(p) not in learned and p.requires_grad]
        self.slopes = torch.zeros(len(self.widths), dtype=torch.float64)
        """Running mean of the task's gradient for each width."""
        set_qmodule_state(self.model, QModuleState.QUANT_AWARE_TRAIN)
        self.module = across_ranks(self.model)
        self.amp: str | None = None
        """Mixed precision of the steps: "bf16", or None."""
        self._optimizers: dict[str, torch.optim.Optimizer] | None = None

    def compile(self, **options: Any) -> None:
        """Compile the step with `torch.compile(fullgraph=True)`. All widths take part from then on.

        The compiler then decides what is saved for backward, which may grow with the number of candidates.
        """
        for mixture in self.every_mixture:
            mixture.narrow = False
            mixture.refresh()
        self.module = torch.compile(self.module, fullgraph=True, **options)  # type: ignore[assignment]

    def optimizers(self, n_steps: int = 1000) -> dict[str, torch.optim.Optimizer]:
        """Return AdamW for "weights" and Adam for "logits" and "widths", where they exist; made at the first call."""
        if self._optimizers is None:
            settings = self.settings
            of_options = {id(p) for m in self.every_mixture for p in m.parameters()}
            groups = [
                {"params": [p for p in self.weights if id(p) not in of_options], "weight_decay": 1e-2},
                {"params": [p for p in self.weights if id(p) in of_options], "weight_decay": 0.0},
            ]
            span = max((m.widths[-1] - m.widths[0] for m in self.every_mixture if m.widths), default=0)
            self._optimizers = {}
            if self.weights:
                with_some = [group for group in groups if group["params"]]
                self._optimizers["weights"] = torch.optim.AdamW(with_some, settings.weight_rate)
            if self.logits:
                rate = settings.arch_rate or 1e-2
                self._optimizers["logits"] = torch.optim.Adam(self.logits, rate, (0.5, 0.999), weight_decay=1e-3)
            if self.widths:
                rate = settings.arch_rate or max(1e-2, 3.0 * span / max(n_steps, 1))
                # the gradient falls by 4 per bit: a longer memory of its size would stop the widths on their way up
                self._optimizers["widths"] = torch.optim.Adam(self.widths, rate, (0.9, 0.95))
            for optimizer in self._optimizers.values():
                for group in optimizer.param_groups:
                    group["initial_lr"] = group["lr"]
        return self._optimizers

    def expected_costs(self) -> dict[str, Tensor]:
        """Compute the expectation of every measure over the current shares; differentiable."""
        return self.costs.expected({point: mixtures[0].expected_shares() for point, mixtures in self.mixtures.items()})

    def step(self, batch: Any, weights: bool = True, architecture: bool = True) -> Tensor:
        """Run forward and backward on one (inputs, targets), then step the weights, the logits and widths, or both.

        Returns the task's loss.
        """
        optimizers = self.optimizers()
        self._learn(weights, architecture)
        inputs, targets = batch
        with mixed_precision(self.amp, next(self.model.parameters()).device):
            value = self.loss(call_with(self.module, inputs, "a batch"), targets)
        if value.requires_grad:
            value.backward()
        if architecture:
            self._charge()
        for name, optimizer in optimizers.items():
            if weights if name == "weights" else architecture:
                optimizer.step()
        if architecture:
            for mixture in self.every_mixture:
                mixture.refresh()
            self.prices.move(self.expected_costs())
        return value.detach()

    def _learn(self, weights: bool, architecture: bool) -> None:
        for mixture in self.every_mixture:
            mixture.learns = architecture
        for wanted, parameters in ((weights, self.weights), (architecture, [*self.logits, *self.widths])):
            for parameter in parameters:
                parameter.requires_grad_(wanted)
                parameter.grad = None

    def _charge(self) -> None:
        """Add the gradient of the costs to that of the task, of which a running mean is kept for the widths."""
        learned = [*self.logits, *self.widths]
        of_task = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        if self.widths:
            found = torch.stack(of_task[len(self.logits) :]).double().cpu()
            self.slopes = MEMORY * self.slopes + (1.0 - MEMORY) * found
        of_cost: Sequence[Tensor | None] = [None] * len(learned)
        cost = self.prices.loss(self.expected_costs(), self.epoch)
        if learned and cost.requires_grad:
            of_cost = torch.autograd.grad(cost, learned, allow_unused=True)
        for parameter, ours, theirs in zip(learned, of_task, of_cost, strict=True):
            parameter.grad = ours if theirs is None else ours + theirs

    def run(
        self,
        batches: Batches,
        arch_batches: Batches | None = None,
        out: str | os.PathLike[str] | None = None,
        on_epoch: Callable[[EpochRecord], object] | None = None,
    ) -> list[EpochRecord]:
        """Search for `settings.epochs` epochs; return the history.

        `arch_batches`: other data for logits and widths, repeated as needed; without it, if steps alternate, every
        second batch of `batches`. `out`: a folder in which the search is saved after each epoch, with `history.json`; a
        killed search resumes from it and ends with the same numbers, if `batches` are the same in each epoch or are
        drawn with torch's own generator. Raises ConfigError.
        """
        folder = None if out is None else Path(out)
        if folder is not None:
            resume_search(folder, self._identity(), self.load_state_dict)
        while self.epoch < self.settings.epochs and not self._is_settled():
            self.epoch += 1
            record = self._epoch(batches, arch_batches)
            self.history.append(record)
            if folder is not None and is_first_rank():
                keep_search(folder, self.state_dict(), [record.to_dict() for record in self.history])
            if on_epoch is not None:
                on_epoch(record)
        self.model.eval()
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a search with the same settings can resume, and the settings to compare."""
        return {
            **self._identity(),
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers().items()},
            "prices": self.prices.values,
            "slopes": self.slopes,
            "epoch": self.epoch,
            "history": json.dumps([record.to_dict() for record in self.history]),
            "random": random_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.model.load_state_dict(saved["model"])
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for mixture in self.every_mixture:
            mixture.refresh()
        self.prices.values, self.slopes, self.epoch = saved["prices"], saved["slopes"], int(saved["epoch"])
        self.history = [EpochRecord(**entry) for entry in json.loads(saved["history"])]
        set_random_state(saved["random"])

    def _identity(self) -> dict[str, str]:
        """Return the settings that a search must share with the search that it resumes."""
        points = {name_of(point): mixtures[0].specs for point, mixtures in self.mixtures.items()}
        return {
            "settings": json.dumps(asdict(self.settings)),
            "candidates": json.dumps(points),
            "budgets": ", ".join(map(str, self.prices.budgets)),
            "forms": json.dumps([mixture.form for mixture in self.every_mixture]),
            "groups": json.dumps([[name_of(point) for point in group] for group in self.groups()]),
            "latency": str(sorted((self.costs.latency or {}).items())),
        }

    def _is_settled(self) -> bool:
        patience = self.settings.patience
        if patience is None or self.epoch < self.settings.warmup_epochs + patience + 1:
            return False
        last = self.history[-patience - 1 :]
        return all(record.choice == last[0].choice for record in last)

    def _epoch(self, batches: Batches, arch_batches: Batches | None) -> EpochRecord:
        settings, started = self.settings, time.perf_counter()
        self.model.train()
        for mixture in self.every_mixture:
            mixture.temperature.fill_(settings.temperature_at(self.epoch))
        stream = batches_of(batches, self.epoch)
        self._set_rates(self.optimizers(settings.epochs * n_batches(stream, 100)))
        searching = self.epoch > settings.warmup_epochs
        losses: list[Tensor] = []
        arch_losses: list[Tensor] = []
        if settings.alternate:
            for batch, other in pairs(stream, arch_batches, self.epoch):
                losses.append(self.step(batch, architecture=False))
                if searching and other is not None:
                    arch_losses.append(self.step(other, weights=False))
        else:
            losses = [self.step(batch, architecture=searching) for batch in stream]
            arch_losses = losses if searching else []
        self._learn(weights=True, architecture=True)
        if not losses:
            raise ConfigError("there are no batches to search on; `batches` must yield at least one in each epoch")
        return self._record(losses, arch_losses, time.perf_counter() - started)

    def _set_rates(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        for group in optimizers["widths"].param_groups if "widths" in optimizers else ():
            group["lr"] = group["initial_lr"] * self.settings.falling_at(self.epoch)

    @torch.no_grad()
    def _record(self, losses: list[Tensor], arch_losses: list[Tensor], seconds: float) -> EpochRecord:
        firsts = {name_of(point): mixtures[0] for point, mixtures in self.mixtures.items()}
        undecided = [m.entropy() for m in firsts.values() if m.theta is not None]
        return EpochRecord(
            self.epoch,
            float(torch.stack(losses).mean()),
            float(torch.stack(arch_losses).mean()) if arch_losses else None,
            sum(undecided) / len(undecided) if undecided else 0.0,
            self.settings.temperature_at(self.epoch),
            {name: float(value) for name, value in self.expected_costs().items()},
            {name: m.specs[m.best_option()] for name, m in firsts.items()},
            {name: m.bitwidth() for name, m in firsts.items() if m.float_bitwidth is not None},
            {name: torch.softmax(m.theta, 0).tolist() for name, m in firsts.items() if m.theta is not None},
            seconds,
        )

    def choice(self) -> dict[SearchPoint, int]:
        """Return the options with the largest shares, at the rounded widths, without regard to budgets."""
        return {point: mixtures[0].best_option() for point, mixtures in self.mixtures.items()}

    @torch.no_grad()
    def scores(self) -> dict[SearchPoint, list[float]]:
        """Estimate the degradation of each option from the slope of the width (it falls by 4 per bit), and logits."""
        slopes = {id(width): slope for width, slope in zip(self.widths, self.slopes.tolist(), strict=True)}
        found = {}
        for point, mixtures in self.mixtures.items():
            m = mixtures[0]
            logits = [0.0] * m.n_rows if m.theta is None else (m.theta.max() - m.theta).tolist()
            degradations = [logits[row] for row in m.option_rows]
            if m.float_bitwidth is not None:
                at_one = max(abs(slopes[id(m.float_bitwidth)]), 1e-12) * 4.0 ** (m.bitwidth() - 1.0)
                degradations = [
                    degradation + at_one * 4.0 ** (1.0 - n)
                    for degradation, n in zip(degradations, m.option_bits, strict=True)
                ]
            found[point] = degradations
        return found

    def choice_within_budget(self) -> dict[SearchPoint, int]:
        """Return the choice for `derive`: the learned choice, changed as little as the budgets require.

        Where widths are learned, the rest of the budgets is spent (docs/algorithms.md F3, greedy repair).
        """
        chosen, budgets = self.choice(), self.prices.budgets
        if budgets:
            scores, groups = self.scores(), self.groups()
            # the bytes that decoding needs can depend on the current weights
            costs = CostModel(self.float_model(), self.plan, self.example_inputs, self.costs.latency)
            chosen = keep_budgets(costs, budgets, scores, chosen, groups)
            if self.widths:
                chosen = spend_slack(costs, budgets, scores, chosen, groups)
        return chosen

    def groups(self) -> list[list[SearchPoint]]:
        """Return the groups of points that share logits and width, and so choose together."""
        found: dict[object, list[SearchPoint]] = {}
        for point in self.costs.points:
            mixture = self.mixtures[point][0]
            learned = [id(p) for p in (mixture.theta, mixture.float_bitwidth) if p is not None]
            found.setdefault(tuple(learned) or point, []).append(point)
        return list(found.values())

    def derive(self) -> QuantPlan:
        """Return the found plan, in spec strings. It always keeps the budgets.

        Raises ConfigError if no choice keeps several budgets together.
        """
        return self.costs.plan_of(self.plan, self.choice_within_budget())

    def float_model(self) -> nn.Module:
        """Return the float model with the current weights."""
        self._learn(weights=True, architecture=True)
        return self.plan.revert(self.model)

    def retrain(
        self,
        batches: Batches,
        epochs: int,
        learning_rate: float | None = None,
        steps_per_epoch: int | None = None,
        on_epoch: OnEpoch | None = None,
        progress: Path | None = None,
        calibration_batches: int = 8,
    ) -> nn.Module:
        """Calibrate the searched weights under the derived plan, train them quantized; return the model in QUANT_EVAL.

        Arguments are those of `torchquant.training.fit`, which trains. The plan is `model.plan`.
        """
        plan = self.derive()
        model = plan.apply(self.float_model())
        model.plan = plan  # type: ignore[assignment]
        stream = batches_of(batches, 1)
        calibrate(model, stream, calibration_batches, with_targets=True)
        numbers = iter(range(epochs_done(progress) + 1, epochs + 1))
        fit_quantized(
            model,
            lambda: batches_of(batches, next(numbers)),
            epochs,
            learning_rate or self.settings.weight_rate,
            steps_per_epoch or n_batches(stream, 0),
            self.loss,
            on_epoch,
            progress,
            warm_up=WARM_UP,
        )
        return model


def _distinct(parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters if p is not None}.values())
