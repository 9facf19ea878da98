"""Try remedies for the worst sites on a copy of the model, and rank them by what they gained."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant._arguments import checked
from torchquant._files import write_json
from torchquant._tables import ShownAsTables, text_table
from torchquant.analysis.analyzer import analyze
from torchquant.analysis.effects import Effect, Judge, Loss, decibel
from torchquant.analysis.facts import SlotFacts
from torchquant.analysis.remedies import Change, changes_for
from torchquant.analysis.result import Analysis, SiteAnalysis
from torchquant.analysis.trials import Trials, post_training
from torchquant.errors import ConfigError, TorchQuantError, one_line
from torchquant.plan import QuantPlan
from torchquant.qmodule.state import ACTIVATIONS
from torchquant.training.batches import OnBatch, check_batches, place, progress_bar, split_batch, taken
from torchquant.training.evaluation import Metric

LEAST_GAIN = 0.1
"""A remedy gains at least so many dB."""
MOST_LOSS = 0.01
"""A remedy raises the loss by at most this share: so much may be the noise of few samples."""
EQUAL = 0.2
"""The simplest of several remedies is advised if their gains differ by fewer dB."""
AIMED = 3.0
"""A remedy for what stands out most at a slot is advised unless another one gains so many dB more."""
STAGES = (("cle", "calibrate"), ("bias_correction",))
"""Post-training stages that are tried on the whole model."""


@dataclass(frozen=True)
class Remedy:
    """A change that was tried on a copy of the model, and what it gained.

    `path`, `slot`: where; "" for a change of the whole model. `cause`: a key of `CAUSES`, "" if nothing stands out
    there; `because`: a sentence with its figures. `change`: what was done; `spec`: the spec of the new quantizer, None
    if it keeps its own; `stages`: the post-training stages. `before`, `after`: the effect on the whole quantized model.
    """

    path: str
    slot: str
    cause: str
    because: str
    change: str
    spec: str | None
    stages: tuple[str, ...]
    before: Effect
    after: Effect

    @property
    def gain_db(self) -> float:
        """By how many dB the SQNR of the output rises."""
        return _rise(self.before, self.after)

    @property
    def name(self) -> str:
        """Path and slot."""
        return f"{self.path} {self.slot}".strip() or "(whole model)"

    @property
    def words(self) -> str:
        """The advice as a sentence with its figures."""
        what = self.change + (f" ({self.spec})" if self.spec else "")
        figures = [f"SQNR of the output {decibel(self.before.sqnr_db)} -> {decibel(self.after.sqnr_db)}"]
        for name, share in (("agreement", True), ("metric", False), ("loss", False)):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before is not None and after is not None:
                figures.append(
                    f"{name} {before:.2%} -> {after:.2%}" if share else f"{name} {before:.4g} -> {after:.4g}"
                )
        why = f"{self.because}. " if self.because else ""
        return f"{self.name}: {why}Tried: {what}; {', '.join(figures)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the remedy as plain data."""
        return asdict(self) | {"before": self.before.to_dict(), "after": self.after.to_dict(), "words": self.words}


@dataclass(frozen=True)
class Advice(ShownAsTables):
    """The remedies that gained something, the best first.

    `together`: the effect with all remedies of `kept` at once, `before`: with none. `plan`: the plan of the model with
    the specs of `kept`; None for a model without a plan. Post-training stages are no part of a plan: `stages` names
    those that are kept, for `torchquant.ptq.run`. `failed`: (name, why) of remedies that could not be tried.
    """

    before: Effect
    remedies: tuple[Remedy, ...]
    kept: tuple[Remedy, ...]
    together: Effect
    plan: QuantPlan | None = field(default=None, repr=False)
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The post-training stages among the kept remedies."""
        return tuple(stage for remedy in self.kept for stage in remedy.stages)

    def __str__(self) -> str:
        if not self.remedies:
            return (
                f"no remedy that was tried gained {LEAST_GAIN} dB; everything quantized: {decibel(self.before.sqnr_db)}"
            )
        rows = [
            [r.name, r.cause, r.change, f"{r.gain_db:+.1f} dB", "yes" if r in self.kept else "no"]
            for r in self.remedies
        ]
        table = text_table(["where", "cause", "remedy", "gain", "kept together"], rows)
        lines = [remedy.words for remedy in self.remedies]
        both = f"together: {decibel(self.before.sqnr_db)} -> {decibel(self.together.sqnr_db)}"
        return "\n\n".join([table, "\n".join(lines), both])

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain data, as `save` writes it."""
        return {
            "before": self.before.to_dict(),
            "together": self.together.to_dict(),
            "stages": list(self.stages),
            "remedies": [remedy.to_dict() | {"kept": remedy in self.kept} for remedy in self.remedies],
            "failed": [list(entry) for entry in self.failed],
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `advice.json` into a folder. Returns its path."""
        return write_json(Path(folder) / "advice.json", self.to_dict())


@checked
def advise(
    model: nn.Module,
    batches: Iterable[Any],
    analysis: Analysis | None = None,
    metric: Metric | None = None,
    loss: Loss | None = None,
    with_targets: bool | None = None,
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    n_sites: int = 5,
    on_batch: OnBatch | None = None,
    show_progress: bool | None = None,
) -> Advice:
    """Try remedies at the `n_sites` worst sites of a calibrated model, on a copy, and measure what each gains.

    For each of their slots: its range observed again on the batches, a range of least squared error, one without
    outliers, a scale for each channel or token, 8 bits, another scheme; and for the whole model cross-layer
    equalization and bias correction. A slot that gains nothing even when it is left float is not tried. A remedy is
    judged by the output of the whole quantized model, and where there is a loss it must not raise it by more than 1 %;
    those that still gain when applied together are `kept`, and the plan of the result has them. The batches stay in
    memory, with the outputs of the float model. `analysis`: the result of `analyze` on the same batches; None runs it.
    The other arguments are as in `analyze`. Raises ConfigError.

    >>> import torchquant as tq
    >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    >>> model = tq.quantize(net, [{"weight": "affine:8"}, {"names": ["2"], "weight": "affine:2"}], x)
    >>> tq.calibrate(model, [x])
    1
    >>> best = advise(model, [x]).remedies[0]
    >>> best.path, best.change
    ('2', '8 bits')
    """
    check_batches(batches, max_batches)
    if n_sites < 1:
        raise ConfigError(f"n_sites must be at least 1, got {n_sites}")
    where = place(model, device)
    given = list(taken(batches, max_batches, where, on_batch))
    if analysis is None:
        analysis = analyze(model, given, metric, loss, with_targets, show_progress=show_progress)
    found = [(*split_batch(model, batch, i, with_targets), batch) for i, batch in enumerate(given)]
    trials = Trials(model, found, Judge(metric, loss))
    worst = analysis.worst()[:n_sites]
    with progress_bar("trying remedies", len(worst) + len(STAGES), show_progress, on_batch) as advance:
        adviser = _Adviser(trials, analysis, getattr(model, "plan", None))
        for site in worst:
            adviser.try_site(site)
            advance()
        for stages in STAGES:
            adviser.try_stages(stages)
            advance()
        return adviser.advice()


class _Adviser:
    """Tries changes, and keeps those that gain."""

    def __init__(self, trials: Trials, analysis: Analysis, plan: QuantPlan | None) -> None:
        self.trials, self.plan = trials, plan
        self.analysis, self.shared = analysis, analysis.shared()
        self.before = trials.effect()
        self.remedies: list[tuple[Remedy, Change | None]] = []
        self.failed: list[tuple[str, str]] = []
        self.specs = {} if plan is None else {site.path or "(root)": site for site in plan.sites}

    def try_site(self, site: SiteAnalysis) -> None:
        """Try the changes of each slot of a site."""
        for facts in site.slots:
            if facts.slot == "bias":
                continue
            with self.trials.without(site.path, facts.slot):
                most = _rise(self.before, self.trials.effect())
            if most >= LEAST_GAIN:
                self._try_slot(facts)

    def _try_slot(self, facts: SlotFacts) -> None:
        path, slot, findings = facts.path, facts.slot, self.analysis.findings_at(facts)
        noise = decibel(facts.sqnr_db)
        plain = f"its SQNR is {noise}" if facts.n_bits is None else f"{facts.n_bits} bits give it an SQNR of {noise}"
        best: tuple[Remedy, Change] | None = None
        lead = EQUAL
        for change in self._changes(path, slot):
            try:
                self.trials.show(path, slot, change.new)
                with self.trials.with_(path, slot, change.new):
                    after = self.trials.effect()
            except (TorchQuantError, RuntimeError) as error:
                self.failed.append((f"{path} {slot}: {change.what}", one_line(error)))
                continue
            cause = next((f for f in findings if f.cause in change.answers), None)
            name, because = ("", plain) if cause is None else (cause.cause, cause.words)
            remedy = Remedy(path, slot, name, because, change.what, change.spec, (), self.before, after)
            is_aimed = bool(findings) and findings[0].cause in change.answers
            if helps(self.before, after) and (best is None or remedy.gain_db > best[0].gain_db + lead):
                best, lead = (remedy, change), AIMED if is_aimed else EQUAL
        if best is not None:
            self.remedies.append(best)

    def _changes(self, path: str, slot: str) -> Iterable[Change]:
        old, spec = self.trials.quantizer(path, slot), self._spec(path, slot)
        slots = self.trials.modules[path].weight_slots()
        is_linear = bool(slots) and all(s.weight.ndim == 2 for s in slots)
        yield from self._shared(path, slot)
        yield from changes_for(old, spec, slot not in ACTIVATIONS, is_linear)

    def _shared(self, path: str, slot: str) -> Iterable[Change]:
        """Yield the quantizers that other sites have for the same weight."""
        for other_path, other_slot in self.shared.get((path, slot), ()):
            new = self.trials.quantizer(other_path, other_slot)
            what, spec = f"the quantizer of {other_path} {other_slot}", self._spec(other_path, other_slot)
            yield Change(what, new, spec, ("tied weights differ",))

    def _spec(self, path: str, slot: str) -> str | None:
        """Return the spec string of a slot in the plan, if it has one."""
        spec = getattr(self.specs.get(path), _field_of(slot), None)
        return spec if isinstance(spec, str) else None

    def try_stages(self, stages: tuple[str, ...]) -> None:
        """Try post-training stages on the whole model."""
        name = ", ".join(stages)
        try:
            after = self.trials.changed_copy(post_training(stages))
        except (TorchQuantError, RuntimeError) as error:
            self.failed.append((name, one_line(error)))
            return
        remedy = Remedy("", "", "", "", f"post-training {name}", None, stages, self.before, after)
        if helps(self.before, after):
            self.remedies.append((remedy, None))

    def advice(self) -> Advice:
        """Return the remedies by falling gain, and those that gain together; stages come after all quantizers."""
        ranked = sorted(self.remedies, key=lambda entry: -entry[0].gain_db)
        kept, now, plan = [], self.before, self.plan
        for remedy, change in ranked:
            if change is None:
                continue
            former = self.trials.quantizer(remedy.path, remedy.slot)
            self.trials.replace(remedy.path, remedy.slot, change.new)
            after = self.trials.effect()
            if not helps(now, after):
                self.trials.replace(remedy.path, remedy.slot, former)
                continue
            kept.append(remedy)
            now = after
            if plan is not None and remedy.spec is not None:
                plan = self._planned(plan, remedy)
        of_model = next((remedy for remedy, change in ranked if change is None), None)
        if of_model is not None:
            after = self.trials.changed_copy(post_training(of_model.stages)) if kept else of_model.after
            if helps(now, after):
                kept.append(of_model)
                now = after
        return Advice(self.before, tuple(r for r, _ in ranked), tuple(kept), now, plan, tuple(self.failed))

    def _planned(self, plan: QuantPlan, remedy: Remedy) -> QuantPlan:
        """Return the plan with the spec of a remedy; that of the input of the model stands at the sites that read it.

        Warns if the plan cannot have it.
        """
        path = "" if remedy.path == "(root)" else remedy.path
        if remedy.path in self.specs:
            return plan.replace(path, **{_field_of(remedy.slot): remedy.spec})
        sources = self.trials.sources()
        readers = [self.specs.get(reader or "(root)") for reader, read in sources.items() if path in read]
        planned = [site for site in readers if site is not None and site.input and not site.probabilities]
        shared = [s for site in planned for s in sources[site.path] if s != path and (s or "(root)") not in self.specs]
        if not planned or len(planned) < len(readers) or shared:
            warnings.warn(
                f"the plan of the advice lacks the remedy at {remedy.name}: it is no site of the plan, and the sites "
                f"that read it have one spec for several tensors. Give the slot of the model '{remedy.spec}' yourself",
                stacklevel=5,
            )
        else:
            for site in planned:
                plan = plan.replace(site.path, input=remedy.spec)
        return plan


def _field_of(slot: str) -> str:
    """Return the field of a site of a plan that has the spec of a slot."""
    return slot if slot in ACTIVATIONS else "weight"


def helps(before: Effect, after: Effect) -> bool:
    """Tell whether a change gains `LEAST_GAIN` dB, and does not raise the loss, where there is one.

    A model that was trained quantized can be better than its own float weights: nearer to them is then no gain.
    """
    is_worse = before.loss is not None and after.loss is not None and after.loss > before.loss * (1.0 + MOST_LOSS)
    return _rise(before, after) >= LEAST_GAIN and not is_worse


def _rise(before: Effect, after: Effect) -> float:
    if math.isnan(after.sqnr_db) or before.sqnr_db == after.sqnr_db:
        return 0.0
    return after.sqnr_db - before.sqnr_db
