"""Run the stages of a run: each saves its model in a file, so that a stopped run resumes where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from torchquant.compat.checkpoints import load_checkpoint
from torchquant.runs.console import NullProgress
from torchquant.runs.data import TrainingData
from torchquant.runs.float_cache import float_key, keep_float, take_float
from torchquant.runs.folder import read_checkpoint_into, write_checkpoint
from torchquant.runs.loop import train
from torchquant.runs.losses import keep_loss
from torchquant.runs.options import RunOptions
from torchquant.runs.ranks import Ranks
from torchquant.training.loop import epochs_done

QAT_UNITS = 2.0
"""About how many epochs of float training an epoch of quantization-aware training takes."""


class FloatTraining(Protocol):
    """Interface of the settings that say where the float model of a run comes from."""

    @property
    def checkpoint(self) -> str | None: ...

    @property
    def float_epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Stages:
    """The stages of a run in its folder, and the display of their progress."""

    folder: Path
    shown: NullProgress
    ranks: Ranks = Ranks()
    options: RunOptions = RunOptions()

    def run(
        self, name: str, model: nn.Module, work: Callable[[], object], progress: str | None = None, units: float = 0.0
    ) -> None:
        """Do the work and save the model in the file `name`; or load the file, if the work was done before.

        `progress`: the file in which the work saves its progress, deleted afterwards. `units`: units of progress that
        the work tells. The model ends in eval mode.
        """
        path = self.folder / name
        done = self.ranks.of_first(path.exists())
        if not done:
            work()
            self.ranks.at_first(lambda: write_checkpoint(path, model))
        if done or not self.ranks.is_first:
            read_checkpoint_into(model, path)
        if done:
            self.shown.skip(units)
        if progress is not None and self.ranks.is_first:
            (self.folder / progress).unlink(missing_ok=True)
        model.eval()

    def float_model(
        self, net: nn.Module, config: FloatTraining, data: TrainingData, contents: Mapping[str, str]
    ) -> None:
        """Make float.pt: the model from the checkpoint, or trained, or as built.

        A model that another run has trained from the same start, on the same data, in the same way, is taken over.
        `contents`: name -> sha256 of the files that take part.
        """

        def work() -> None:
            if config.checkpoint is not None:
                load_checkpoint(net, config.checkpoint)
            elif config.float_epochs:
                given = [config.float_epochs, config.learning_rate, config.seed, self.ranks.world, self.ranks.device]
                settings = {"training": given, "amp": self.options.amp, "compile": self.options.compile}
                key = float_key(net, data, settings | {"contents": dict(contents)})
                if self.options.reuse_float and self.ranks.of_first(self._takes_over(net, key)):
                    self.shown.message("float: taken over from a run with the same training (--no-reuse-float trains)")
                    self.shown.skip(config.float_epochs)
                    return
                epochs = config.float_epochs
                self.train("float", net, data, epochs, config.learning_rate, config.seed, "float.progress.pt")
                self.ranks.at_first(lambda: keep_float(net, key))

        self.run("float.pt", net, work, "float.progress.pt", config.float_epochs)

    def _takes_over(self, net: nn.Module, key: str) -> bool:
        return self.ranks.is_first and not (self.folder / "float.progress.pt").exists() and take_float(net, key)

    def train(
        self,
        what: str,
        model: nn.Module,
        data: TrainingData,
        epochs: int,
        rate: float,
        seed: int,
        progress: str,
        units: float = 1.0,
        **options: Any,
    ) -> None:
        """Run `train` with the options of the run, and show its epochs and batches, `units` of progress an epoch."""
        torch.manual_seed(seed)  # the same numbers whether the stages before were run or loaded
        path = self.folder / progress
        finished = epochs_done(path)
        self.shown.skip(units * finished)
        last = ""

        def on_epoch(epoch: int, loss: float) -> None:
            nonlocal finished, last
            finished, last = epoch, f", loss {loss:.3f}"
            if self.ranks.is_first:
                keep_loss(self.folder, what, epoch, loss)
            self.shown.advance(units, f"{what}: epoch {epoch} of {epochs}{last}")

        def on_batch(n: int, n_batches: int) -> None:
            where = f"epoch {finished + 1} of {epochs}, batch {n} of {n_batches}"
            self.shown.within(units * n / n_batches, f"{what}: {where}{last}")

        train(model, data, epochs, rate, seed, on_epoch, path, options=self.options, on_batch=on_batch, **options)
