"""Quantizers without state: pure functions of tensors, differentiable, one file per format."""

from torchquant.quantizers_functional import gradients as gradients
from torchquant.quantizers_functional._gradient import GRADIENTS as GRADIENTS
from torchquant.quantizers_functional._gradient import Gradient as Gradient
from torchquant.quantizers_functional._gradient import Projected as Projected
from torchquant.quantizers_functional._gradient import gradient_clip as gradient_clip
from torchquant.quantizers_functional.adabin import adabin_quantize as adabin_quantize
from torchquant.quantizers_functional.affine import affine_params as affine_params
from torchquant.quantizers_functional.affine import affine_quantize as affine_quantize
from torchquant.quantizers_functional.apot import apot_quantize as apot_quantize
from torchquant.quantizers_functional.binary import Signs as Signs
from torchquant.quantizers_functional.binary import binary_quantize as binary_quantize
from torchquant.quantizers_functional.codebook import codebook_quantize as codebook_quantize
from torchquant.quantizers_functional.codebook import lloyd_max as lloyd_max
from torchquant.quantizers_functional.dorefa import dorefa_act_quantize as dorefa_act_quantize
from torchquant.quantizers_functional.dorefa import dorefa_gradient as dorefa_gradient
from torchquant.quantizers_functional.dorefa import dorefa_weight_quantize as dorefa_weight_quantize
from torchquant.quantizers_functional.esb import esb_quantize as esb_quantize
from torchquant.quantizers_functional.formats import AffineParams as AffineParams
from torchquant.quantizers_functional.formats import Format as Format
from torchquant.quantizers_functional.formats import Levels as Levels
from torchquant.quantizers_functional.formats import ScaledFormat as ScaledFormat
from torchquant.quantizers_functional.formats import UniformGrid as UniformGrid
from torchquant.quantizers_functional.irnet import irnet_params as irnet_params
from torchquant.quantizers_functional.irnet import irnet_quantize as irnet_quantize
from torchquant.quantizers_functional.kernels import KERNELS as KERNELS
from torchquant.quantizers_functional.lsq import lsq_quantize as lsq_quantize
from torchquant.quantizers_functional.midrise import midrise_quantize as midrise_quantize
from torchquant.quantizers_functional.minifloat import FloatFormat as FloatFormat
from torchquant.quantizers_functional.minifloat import ScaledFloat as ScaledFloat
from torchquant.quantizers_functional.minifloat import minifloat_quantize as minifloat_quantize
from torchquant.quantizers_functional.n2uq import n2uq_quantize as n2uq_quantize
from torchquant.quantizers_functional.nf4 import nf4_quantize as nf4_quantize
from torchquant.quantizers_functional.pact import pact_quantize as pact_quantize
from torchquant.quantizers_functional.pot import pot_quantize as pot_quantize
from torchquant.quantizers_functional.qfmt import qfmt_int_bits as qfmt_int_bits
from torchquant.quantizers_functional.qfmt import qfmt_params as qfmt_params
from torchquant.quantizers_functional.qfmt import qfmt_quantize as qfmt_quantize
from torchquant.quantizers_functional.qil import qil_quantize as qil_quantize
from torchquant.quantizers_functional.reactnet import rsign_quantize as rsign_quantize
from torchquant.quantizers_functional.residual import residual_alphas as residual_alphas
from torchquant.quantizers_functional.residual import residual_levels as residual_levels
from torchquant.quantizers_functional.seq import seq_quantize as seq_quantize
from torchquant.quantizers_functional.ternary import ternary_params as ternary_params
from torchquant.quantizers_functional.ternary import ternary_quantize as ternary_quantize
from torchquant.quantizers_functional.tqt import tqt_quantize as tqt_quantize
from torchquant.quantizers_functional.ttq import ttq_quantize as ttq_quantize

__all__ = [
    "GRADIENTS",
    "KERNELS",
    "AffineParams",
    "FloatFormat",
    "Format",
    "Gradient",
    "Levels",
    "Projected",
    "ScaledFloat",
    "ScaledFormat",
    "Signs",
    "UniformGrid",
    "adabin_quantize",
    "affine_params",
    "affine_quantize",
    "apot_quantize",
    "binary_quantize",
    "codebook_quantize",
    "dorefa_act_quantize",
    "dorefa_gradient",
    "dorefa_weight_quantize",
    "esb_quantize",
    "gradient_clip",
    "irnet_params",
    "irnet_quantize",
    "lloyd_max",
    "lsq_quantize",
    "midrise_quantize",
    "minifloat_quantize",
    "n2uq_quantize",
    "nf4_quantize",
    "pact_quantize",
    "pot_quantize",
    "qfmt_int_bits",
    "qfmt_params",
    "qfmt_quantize",
    "qil_quantize",
    "residual_alphas",
    "residual_levels",
    "rsign_quantize",
    "seq_quantize",
    "ternary_params",
    "ternary_quantize",
    "tqt_quantize",
    "ttq_quantize",
]
