"""Run the stages of a run: each saves its model in a file, so that a stopped run resumes where it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from torchquant.compat.checkpoints import load_checkpoint
from torchquant.runs.console import NullProgress
from torchquant.runs.data import TrainingData
from torchquant.runs.folder import read_checkpoint_into, write_checkpoint
from torchquant.runs.loop import train
from torchquant.runs.losses import keep_loss
from torchquant.runs.ranks import Ranks
from torchquant.training import OnEpoch


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

    def run(self, name: str, model: nn.Module, work: Callable[[], object], progress: str | None = None) -> None:
        """Do the work and save the model in the file `name`; or load the file, if the work was done before.

        `progress`: the file in which the work saves its progress, deleted afterwards. The model ends in eval mode.
        """
        path = self.folder / name
        done = self.ranks.of_first(path.exists())
        if not done:
            work()
            self.ranks.at_first(lambda: write_checkpoint(path, model))
        if done or not self.ranks.is_first:
            read_checkpoint_into(model, path)
        if progress is not None and self.ranks.is_first:
            (self.folder / progress).unlink(missing_ok=True)
        model.eval()

    def float_model(self, net: nn.Module, config: FloatTraining, data: TrainingData) -> None:
        """Make float.pt: the model from the checkpoint, or trained, or as built."""

        def work() -> None:
            if config.checkpoint is not None:
                load_checkpoint(net, config.checkpoint)
            elif config.float_epochs:
                tell, progress = self.tell("float", config.float_epochs), self.folder / "float.progress.pt"
                train(net, data, config.float_epochs, config.learning_rate, config.seed, tell, progress)

        self.run("float.pt", net, work, "float.progress.pt")

    def tell(self, what: str, epochs: int) -> OnEpoch:
        """Return a callback for each epoch of a training, which keeps its loss; all of it is one unit of progress."""

        def tell(epoch: int, loss: float) -> None:
            if self.ranks.is_first:
                keep_loss(self.folder, what, epoch, loss)
            self.shown.advance(1.0 / epochs, f"{what}: epoch {epoch} of {epochs}, loss {loss:.3f}")

        return tell
