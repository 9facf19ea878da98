"""AutoQNN's quantizers with their names and arguments; each returns the corresponding torchquant quantizer.

`bitwidth`: the bits. `per_channel`: numbers for each output channel of a weight (axis 0) or channel of an activation
(axis 1). `backward_type`: "ste", "pwl" or "pwl-c", with `gradient_ratio` as its rho. The `Act` forms average their
statistics over batches (momentum 0.9) and quantize equally in training and evaluation. Defects of the published code
are not reproduced; docs/algorithms.md I lists them.
"""

from __future__ import annotations

from torchquant.errors import ConfigError
from torchquant.quantizers import GridQuantizer, Quantizer, make_quantizer

BACKWARD_TYPES = {"ste": "ste", "pwl": "pwl", "pwl-c": "pwlc"}


def _made(
    spec: str, site: str, per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0
) -> Quantizer:
    if backward_type not in BACKWARD_TYPES:
        raise ConfigError(f"backward_type must be one of {', '.join(BACKWARD_TYPES)}, got {backward_type!r}")
    quantizer = make_quantizer(spec + ("/channel" if per_channel else ""), site)
    if backward_type != "ste":
        assert isinstance(quantizer, GridQuantizer)
        quantizer.set_gradient(BACKWARD_TYPES[backward_type], rho=gradient_ratio)
    return quantizer


def Quantization() -> None:  # noqa: N802
    """AutoQNN's quantizer that quantizes nothing."""


def FixedQuant(  # noqa: N802
    bitwidth: int, per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0
) -> Quantizer:
    """Make signed fixed point for weights: Q-format.

    >>> FixedQuant(bitwidth=4).n_bits
    4
    """
    return _made(f"qfmt:{bitwidth},signed=true", "weight", per_channel, backward_type, gradient_ratio)


def FixedQuantAct(  # noqa: N802
    bitwidth: int, per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0
) -> Quantizer:
    """Make signed fixed point for activations: Q-format over an averaged range."""
    return _made(f"qfmt:{bitwidth},signed=true", "output", per_channel, backward_type, gradient_ratio)


def Binary(per_channel: bool = True, backward_type: str = "ste", gradient_ratio: float = 0.0) -> Quantizer:  # noqa: N802
    """Make a quantizer to signs of weights times their mean magnitude."""
    return _made("xnor", "weight", per_channel, backward_type, gradient_ratio)


def BinaryAct(backward_type: str = "ste", gradient_ratio: float = 0.0) -> Quantizer:  # noqa: N802
    """Make a quantizer to signs of activations times their averaged mean magnitude."""
    return _made("xnor", "output", False, backward_type, gradient_ratio)


def Ternary(per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0) -> Quantizer:  # noqa: N802
    """Make the quantizer of ternary weight networks."""
    return _made("twn", "weight", per_channel, backward_type, gradient_ratio)


def TernaryAct(per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0) -> Quantizer:  # noqa: N802
    """Make a quantizer for ternary activations."""
    return _made("twn", "output", per_channel, backward_type, gradient_ratio)


def _family(scheme: str, site: str, summary: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    def make(
        bitwidth: int, per_channel: bool = False, backward_type: str = "ste", gradient_ratio: float = 0.0
    ) -> Quantizer:
        return _made(scheme.format(n=bitwidth), site, per_channel, backward_type, gradient_ratio)

    make.__doc__ = summary
    return make


uL2Q = _family("ul2q:{n}", "weight", "Mid-rise around the mean, Gaussian step.")  # noqa: N816
uL2QAct = _family("ul2q:{n}", "output", "uL2Q for activations.")  # noqa: N816
VecQ = _family("vecq:{n}", "weight", "Gaussian thresholds, least-squares values.")
VecQAct = _family("vecq:{n}", "output", "VecQ for activations.")
ClipQ = _family("clipq:{n}", "weight", "Mid-rise around 0, Gaussian step, clipped gradient.")
ClipQAct = _family("clipq:{n}", "output", "ClipQ for activations.")
ZoomQ = _family("zoomq:{n}", "weight", "Equal cells over the range.")
ZoomQAct = _family("zoomq:{n}", "output", "ZoomQ for activations.")
PotQ = _family("pot:{n}", "weight", "Powers of two.")
PotQAct = _family("pot:{n}", "output", "PotQ for activations.")
ResQ = _family("resq:{n}", "weight", "Greedy residual binary.")
ResQAct = _family("resq:{n}", "output", "ResQ for activations.")


def ESB_PerChannel(  # noqa: N802
    bitwidth: int,
    linear_bits: int,
    per_channel: bool = True,
    mean_shift: bool = False,
    backward_type: str = "ste",
    gradient_ratio: float = 0.0,
) -> Quantizer:
    """Make an ESB quantizer with `linear_bits` significant bits; `mean_shift` centres the levels on the mean.

    >>> ESB_PerChannel(bitwidth=4, linear_bits=1, per_channel=False, mean_shift=False).significant_bits
    1
    """
    spec = f"esb:{bitwidth},k={linear_bits},center={str(mean_shift).lower()}"
    return _made(spec, "weight", per_channel, backward_type, gradient_ratio)


def ESBAct(  # noqa: N802
    bitwidth: int,
    linear_bits: int,
    per_channel: bool = False,
    mean_shift: bool = False,
    backward_type: str = "ste",
    gradient_ratio: float = 0.0,
) -> Quantizer:
    """Make an ESB quantizer for activations."""
    spec = f"esb:{bitwidth},k={linear_bits},center={str(mean_shift).lower()}"
    return _made(spec, "output", per_channel, backward_type, gradient_ratio)


__all__ = [
    "Binary",
    "BinaryAct",
    "ClipQ",
    "ClipQAct",
    "ESBAct",
    "ESB_PerChannel",
    "FixedQuant",
    "FixedQuantAct",
    "PotQ",
    "PotQAct",
    "Quantization",
    "ResQ",
    "ResQAct",
    "Ternary",
    "TernaryAct",
    "VecQ",
    "VecQAct",
    "ZoomQ",
    "ZoomQAct",
    "uL2Q",
    "uL2QAct",
]
