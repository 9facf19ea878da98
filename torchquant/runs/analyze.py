"""Analyze the quantized model of a run, or one made anew, into a folder: `torchquant analyze`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.analysis import Advice, Analysis, advise, analyze
from torchquant.analysis.analysis_sections import ABOUT_ALONE, advice_section, analysis_sections
from torchquant.analysis.sections import model_parts
from torchquant.errors import ConfigError
from torchquant.report import Page, Section
from torchquant.runs.console import NullProgress
from torchquant.runs.contents import contents_of, pinned
from torchquant.runs.data import TrainingData
from torchquant.runs.export import load_run
from torchquant.runs.folder import CONTENTS, claimed
from torchquant.runs.options import RunOptions
from torchquant.runs.quantize import JobConfig, check_job, run_job
from torchquant.runs.report import MOST_IMAGES, REPORT, made_section
from torchquant.runs.settings import (
    argument,
    check_at_least,
    check_start,
    check_types,
    checkpoint_option,
    command_line,
    data_option,
    option,
    seed_option,
    weights_option,
)

__all__ = ["AnalyzeConfig", "Analyzed", "run_analysis"]

BATCH = 64
MADE = ("analysis.progress.pt", "analysis.json", "advice.json")
"""Files from which a later run with the same settings goes on."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """The settings of `torchquant analyze`.

    `target`: the folder of a finished run of `torchquant quantize`, `ptq` or `search`, or a model as in `JobConfig`,
    which is quantized with `rules` into the folder `run` of the output first. `images`: of the test data. `sites`: for
    how many of the worst sites remedies are tried, 0 for none. `apart`: as in `analyze`. `apply`: write the plan with
    the kept remedies. The others as in `JobConfig`; of a run's folder they are known. Raises ConfigError.
    """

    target: str = argument("The folder of a run, or a model: a name of torchvision or timm, demo, or file.py:function.")
    rules: str = option("w8a8", "Of a model: a rule set (w8a8, w4a4-lsq, ...), or a YAML file.")
    data: str = data_option()
    checkpoint: str | None = checkpoint_option()
    float_epochs: int = option(30, "Of a model: epochs of float training; 0: none.")
    images: int = option(256, "Test images to analyze on.")
    sites: int = option(5, "Worst sites for which remedies are tried; 0: none.")
    apart: bool = option(False, "Measure each slot alone too: weight, input and output of a layer.")
    apply: bool = option(False, "Write advised_plan.yaml, the plan with the remedies that help together.")
    seed: int = seed_option()
    weights: str | None = weights_option()
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_start(self)
        check_at_least(self, images=1, sites=0, float_epochs=0)
        if self.apply and not self.sites:
            raise ConfigError("apply writes the plan with the remedies that help, but sites 0 tries none")

    @property
    def is_run(self) -> bool:
        """Whether the target is the folder of a run."""
        return Path(self.target).is_dir()

    def job(self) -> JobConfig:
        """Return the settings of the run that quantizes a model."""
        return JobConfig(
            self.target,
            self.rules,
            self.data,
            "ptq",
            self.checkpoint,
            self.float_epochs,
            seed=self.seed,
            weights=self.weights,
        )


@dataclass(frozen=True)
class Analyzed:
    """The analysis, and the advice if remedies were tried."""

    analysis: Analysis
    advice: Advice | None


def run_analysis(
    config: AnalyzeConfig,
    out: str | os.PathLike[str],
    show: NullProgress | None = None,
    options: RunOptions | None = None,
) -> Analyzed:
    """Analyze and write `analysis.json`, `sites.csv`, `slots.csv`, `advice.json` and `report.html` into `out`.

    A run that was stopped resumes after the last batch. `options`: how it is carried out; the analysis itself is on the
    CPU. Raises ConfigError, also if `out` holds another analysis.
    """
    how = options or RunOptions()
    with show or NullProgress() as shown:
        run = Path(config.target)
        if not config.is_run:
            check_job(config.job(), options=how)
        found = contents_of([str(run / "quantized.pt")], [], config.target) if config.is_run else {}
        settings = asdict(config) | {CONTENTS: pinned(config.contents, found)}
        path = Path(out) / "analyze.json"
        with claimed(path, settings, "another analysis", "one", MADE, shown.message, how.force) as folder:
            if not config.is_run:
                run = folder / "run"
                run_job(config.job(), run, shown, options=how)
            model, data, _ = load_run(run)
            with how.computing(model, data.test_images[:1]) as threads:
                shown.message(f"analysis of {run}, {threads}")
                return _run(model, data, config, folder, shown)


def _run(model: nn.Module, data: TrainingData, config: AnalyzeConfig, out: Path, shown: NullProgress) -> Analyzed:
    batches = list(_batches(data, config.images))
    shown.start(len(batches) + (1.0 if config.sites else 0.0))
    options: dict[str, Any] = {"loss": F.cross_entropy, "with_targets": True}

    def tell(n: int) -> None:
        shown.advance(1.0, f"analyzed {n} of {len(batches)} batches")

    analysis = analyze(model, batches, apart=config.apart, out=out, on_batch=tell, **options)
    advice = None
    if config.sites:
        shown.advance(0.0, "trying remedies")
        advice = advise(model, batches, analysis, n_sites=config.sites, on_batch=lambda n: None, **options)
        advice.save(out)
        if config.apply:
            if advice.plan is None:
                raise ConfigError(f"{type(model).__name__} has no plan to write the remedies into")
            advice.plan.save(out / "advised_plan.yaml")
        shown.advance(1.0, "done")
    write_report(config, analysis, advice, (model, data.test_images[:MOST_IMAGES]), out)
    return Analyzed(analysis, advice)


def _batches(data: TrainingData, n_images: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.test_images[:n_images], data.test_labels[:n_images]
    return zip(images.split(BATCH), labels.split(BATCH), strict=True)


def write_report(
    config: AnalyzeConfig, analysis: Analysis, advice: Advice | None, shown: tuple[nn.Module, Tensor], out: Path
) -> Path:
    """Write report.html. `shown`: the quantized model, and images for its histograms."""
    values = {site.path: site.alone.sqnr_db for site in analysis.sites}
    whole, *others = analysis_sections(analysis)
    sections = [
        whole,
        *([advice_section(advice)] if advice is not None else []),
        Section("The model, site by site", model_parts(*shown, about=ABOUT_ALONE, values=values)),
        *others,
        made_section(command_line("analyze", config), asdict(config)),
    ]
    return Page(f"Analysis of {config.target}", sections).write(out / REPORT)
