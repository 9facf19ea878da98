"""The settings of a comparison: schemes, widths, seeds, and the recipe that all cases share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.quantizers import QUANTIZERS, AffineQuantizer, find_scheme, make_quantizer, weight_spec
from torchquant.runs.data import DATA
from torchquant.runs.networks import NETWORKS
from torchquant.runs.settings import (
    check_above_zero,
    check_at_least,
    check_one_of,
    check_types,
    checkpoint_option,
    data_option,
    option,
)


@dataclass(frozen=True)
class Recipe:
    """The recipe of every scheme: network, data, float training, calibration, quantization-aware training.

    `model`: one of `NETWORKS`, or a model with a colon as in `build_model`. `data`: see `load_data`. `checkpoint`: a
    float state_dict to start from instead of `float_epochs` of training. `epochs` of quantization-aware training, 0 for
    calibration only; `learning_rate` None is the network's own. `test_copies`: distorted versions of each test image,
    for digits. `contents`: name -> sha256 of the files that take part, as a comparison recorded them. Raises
    ConfigError.
    """

    model: str = option(
        "demo", "demo, resnet18, mobilenet_v2, efficientnet_b0, ..., timm:NAME or path/to/file.py:function."
    )
    data: str = data_option()
    float_epochs: int = option(30, "Epochs of float training.")
    epochs: int = option(10, "Epochs of quantization-aware training; 0: calibrate only.")
    learning_rate: float | None = option(
        None, "Learning rate of quantization-aware training; default: the network's own."
    )
    calibration_batches: int = option(8, "Batches of the calibration.")
    test_copies: int = option(4, "Distorted versions of each test image; digits only.")
    checkpoint: str | None = checkpoint_option()
    contents: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        if ":" not in self.model:
            check_one_of(self, model=NETWORKS)
        if self.data not in DATA and not Path(self.data).is_dir():
            hint = did_you_mean(self.data, DATA)
            raise ConfigError(
                f"data must be {', '.join(DATA)} or a folder of pictures, got {shown(self.data)}{hint and ';'}{hint}"
            )
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ConfigError(f"the checkpoint {self.checkpoint} is not a file")
        check_at_least(self, float_epochs=1, epochs=0, calibration_batches=1, test_copies=1)
        check_above_zero(self, "learning_rate")


@dataclass(frozen=True)
class Case:
    """One run: a weight scheme at a width, an activation width, a seed."""

    scheme: str
    weight_bits: int
    weight: str
    acts_bits: int
    acts: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the file of the case, without the ending; unique in a comparison."""
        return f"{self.scheme}-w{self.weight_bits}a{self.acts_bits}-seed{self.seed}"


def make_cases(schemes: Iterable[str], weight_bits: Iterable[int], acts_bits: Iterable[int], seeds: int) -> list[Case]:
    """Make a case for every scheme at every width it has, with the activations that its authors use.

    "all" stands for all registered schemes; "affine@pwl" for a scheme with another gradient on its weights. Raises
    ConfigError, UnknownNameError.

    >>> [case.weight for case in make_cases(["esb", "twn"], [2, 4], [8], seeds=1)]
    ['esb:2,k=0/channel', 'esb:4,k=1/channel', 'twn:2/channel']
    """
    names = [name for given in schemes for name in (QUANTIZERS if given == "all" else [given])]
    widths = list(weight_bits)
    acts_of = {name: find_scheme(name.partition("@")[0])[0].typical_acts for name in names}
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    found = [(name, n, spec) for name in dict.fromkeys(names) for n in widths if (spec := _weights(name, n))]
    for name in names:
        if name not in {known for known, _, _ in found} and "all" not in schemes:
            raise ConfigError(f"{name} has none of the widths {', '.join(map(str, widths))}; see: torchquant schemes")
    return [
        Case(name, n, spec, a, _acts(acts_of[name], a), seed)
        for name, n, spec in found
        for a in acts_bits
        for seed in range(seeds)
    ]


TWO_LEVELS = "adabin_act:1"
"""Activations of one bit behind a ReLU: there all signs are +1, and the middle of a range is above most values."""


def _acts(template: str, n_bits: int) -> str:
    """Return the activation spec at that width; affine where the authors' scheme lacks it. Raises ConfigError.

    The networks have ReLUs, so that one bit has a threshold that is learned in place of a sign or a range.
    """
    spec = template.format(n=n_bits)
    try:
        made = make_quantizer(spec, site="output")
    except ConfigError:
        spec = f"affine:{n_bits}"
        made = make_quantizer(spec, site="output")
    is_fixed = isinstance(made, AffineQuantizer) or "sign" in getattr(made, "traits", ())
    return TWO_LEVELS if n_bits == 1 and is_fixed else spec


def _weights(name: str, n_bits: int) -> str | None:
    scheme, at, gradient = name.partition("@")
    spec = weight_spec(scheme, n_bits)
    if spec and at:
        make_quantizer(f"{spec}@{gradient}")
    return spec and spec + at + gradient
