"""The settings of the demo: how long it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchquant.runs.demo.schemes import Scheme
from torchquant.runs.settings import check_at_least, check_seed, check_types


@dataclass(frozen=True)
class DemoConfig:
    """The settings of the demo. `long_epochs`, `short_epochs`: epochs of the training lengths that schemes name.

    `test_copies`: distorted versions of each of the 450 test images. `command`: the command line that the report says
    the run was started with. Raises ConfigError.
    """

    seed: int = 0
    float_epochs: int = 30
    long_epochs: int = 10
    short_epochs: int = 4
    test_copies: int = 4
    calibration_batches: int = 8
    command: str = "torchquant demo"

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        names = ("float_epochs", "long_epochs", "short_epochs", "test_copies", "calibration_batches")
        check_at_least(self, **dict.fromkeys(names, 1))

    @classmethod
    def preset(cls, seed: int = 0, quick: bool = False) -> DemoConfig:
        """Make the settings of `torchquant demo` and `torchquant demo --quick`."""
        config = cls(seed=seed, command=f"torchquant demo --seed {seed}{' --quick' if quick else ''}")
        return replace(config, float_epochs=8, long_epochs=4, short_epochs=1) if quick else config

    def qat_epochs(self, scheme: Scheme) -> int:
        """Return the epochs of quantization-aware training of a scheme, 0 for calibration only."""
        return {"": 0, "short": self.short_epochs, "long": self.long_epochs}[scheme.qat]
