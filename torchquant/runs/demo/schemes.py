"""The schemes that the demo compares, one row each."""

from __future__ import annotations

from dataclasses import dataclass

from torchquant.quantizers import AffineQuantizer, ESBQuantizer, QfmtQuantizer, QuantizerFactory, TernaryQuantizer
from torchquant.range_observers import BatchMinMax, ExpAvgMinMax
from torchquant.runs.small_resnet import QuantSmallResNet, SmallResNet


@dataclass(frozen=True)
class Scheme:
    """A way to quantize the network. `qat`: "" for calibration only, else the name of a training length."""

    name: str
    title: str
    weight: QuantizerFactory
    acts: QuantizerFactory
    qat: str = ""

    def build(self, network: SmallResNet) -> QuantSmallResNet:
        """Make a quantizable copy of a float network, BYPASSED; states that quantize fold its batch norms."""
        return QuantSmallResNet(network, self.weight, self.acts, fold_bn="rescale")


def affine_weight(n_bits: int) -> QuantizerFactory:
    """Make the common weight quantizer: symmetric integers without the lowest one, a scale per output channel."""
    return lambda module: AffineQuantizer(n_bits, BatchMinMax(axis=0), symmetric="narrow")


def affine_acts(n_bits: int) -> QuantizerFactory:
    """Make an activation quantizer: unsigned integers with a zero point, over an averaged range."""
    return lambda module: AffineQuantizer(n_bits, ExpAvgMinMax())


def qfmt_weight(n_bits: int) -> QuantizerFactory:
    """Make a fixed-point weight quantizer with a power-of-two scale per output channel."""
    return lambda module: QfmtQuantizer(n_bits, True, BatchMinMax(axis=0))


def qfmt_acts(n_bits: int) -> QuantizerFactory:
    """Make a fixed-point activation quantizer with a power-of-two scale over an averaged range."""
    return lambda module: QfmtQuantizer(n_bits, True, ExpAvgMinMax())


SCHEMES = (
    Scheme("w8a8-ptq", "W8A8, PTQ", affine_weight(8), affine_acts(8)),
    Scheme("w4a4-ptq", "W4A4, PTQ", affine_weight(4), affine_acts(4)),
    Scheme("w4a4-qat", "W4A4, QAT", affine_weight(4), affine_acts(4), qat="long"),
    Scheme("esb-qat", "ESB(4,1) weights, A8, QAT", lambda m: ESBQuantizer(4, 1, axis=0), affine_acts(8), qat="short"),
    Scheme("ternary-qat", "ternary weights, A8, QAT", lambda m: TernaryQuantizer(axis=0), affine_acts(8), qat="short"),
    Scheme("qfmt8-ptq", "Q-format 8 bit, PTQ", qfmt_weight(8), qfmt_acts(8)),
)
