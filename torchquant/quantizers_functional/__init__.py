"""Quantizers without state: pure functions of tensors, differentiable, one file per format."""

from torchquant.quantizers_functional import gradients as gradients
from torchquant.quantizers_functional._gradient import GRADIENTS as GRADIENTS
from torchquant.quantizers_functional._gradient import Gradient as Gradient
from torchquant.quantizers_functional._gradient import Projected as Projected
from torchquant.quantizers_functional._gradient import gradient_clip as gradient_clip
from torchquant.quantizers_functional.affine import affine_params as affine_params
from torchquant.quantizers_functional.affine import affine_quantize as affine_quantize
from torchquant.quantizers_functional.binary import binary_quantize as binary_quantize
from torchquant.quantizers_functional.esb import esb_quantize as esb_quantize
from torchquant.quantizers_functional.lsq import lsq_quantize as lsq_quantize
from torchquant.quantizers_functional.midrise import midrise_quantize as midrise_quantize
from torchquant.quantizers_functional.minifloat import FloatFormat as FloatFormat
from torchquant.quantizers_functional.minifloat import minifloat_quantize as minifloat_quantize
from torchquant.quantizers_functional.nf4 import nf4_quantize as nf4_quantize
from torchquant.quantizers_functional.pot import pot_quantize as pot_quantize
from torchquant.quantizers_functional.qfmt import qfmt_int_bits as qfmt_int_bits
from torchquant.quantizers_functional.qfmt import qfmt_params as qfmt_params
from torchquant.quantizers_functional.qfmt import qfmt_quantize as qfmt_quantize
from torchquant.quantizers_functional.ternary import ternary_params as ternary_params
from torchquant.quantizers_functional.ternary import ternary_quantize as ternary_quantize

__all__ = [
    "lsq_quantize",
    "nf4_quantize",
    "FloatFormat",
    "minifloat_quantize",
    "pot_quantize",
    "midrise_quantize",
    "binary_quantize",
    "GRADIENTS",
    "Gradient",
    "Projected",
    "affine_params",
    "affine_quantize",
    "esb_quantize",
    "gradient_clip",
    "qfmt_int_bits",
    "qfmt_params",
    "qfmt_quantize",
    "ternary_params",
    "ternary_quantize",
]
