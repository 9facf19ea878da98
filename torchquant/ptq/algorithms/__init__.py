"""One file for each algorithm; importing it enters it in `PTQ`."""

from torchquant.ptq.algorithms import absorb as absorb
from torchquant.ptq.algorithms import adaround as adaround
from torchquant.ptq.algorithms import analytic_bias as analytic_bias
from torchquant.ptq.algorithms import autoround as autoround
from torchquant.ptq.algorithms import awq as awq
from torchquant.ptq.algorithms import bias_correction as bias_correction
from torchquant.ptq.algorithms import bn_ranges as bn_ranges
from torchquant.ptq.algorithms import brecq as brecq
from torchquant.ptq.algorithms import calibrate as calibrate
from torchquant.ptq.algorithms import cle as cle
from torchquant.ptq.algorithms import clip as clip
from torchquant.ptq.algorithms import descent as descent
from torchquant.ptq.algorithms import fold_bn as fold_bn
from torchquant.ptq.algorithms import fold_norm as fold_norm
from torchquant.ptq.algorithms import gpfq as gpfq
from torchquant.ptq.algorithms import gptq as gptq
from torchquant.ptq.algorithms import hqq as hqq
from torchquant.ptq.algorithms import low_rank as low_rank
from torchquant.ptq.algorithms import magr as magr
from torchquant.ptq.algorithms import nearest as nearest
from torchquant.ptq.algorithms import opt_rtn as opt_rtn
from torchquant.ptq.algorithms import qronos as qronos
from torchquant.ptq.algorithms import refit as refit
from torchquant.ptq.algorithms import rotate as rotate
from torchquant.ptq.algorithms import smoothquant as smoothquant
from torchquant.ptq.algorithms import svdquant as svdquant
