"""AutoQNN's tools: draw a model, record inputs and outputs of modules, counts, sparsity, the roofline."""

from torchquant.compat.autoqnn.utils.generic_utils import EMA as EMA
from torchquant.compat.autoqnn.utils.generic_utils import zero_grad as zero_grad
from torchquant.compat.autoqnn.utils.module_ios import ModuleIO as ModuleIO
from torchquant.compat.autoqnn.utils.module_ios import ModuleIOs as ModuleIOs
from torchquant.compat.autoqnn.utils.module_utils import view_module as view_module
from torchquant.compat.autoqnn.utils.statics_utils import count_zero as count_zero
from torchquant.compat.autoqnn.utils.statics_utils import devices as devices
from torchquant.compat.autoqnn.utils.statics_utils import get_attainable_FLOPS as get_attainable_FLOPS
from torchquant.compat.autoqnn.utils.statics_utils import get_flops_params_mems as get_flops_params_mems
from torchquant.compat.autoqnn.utils.statics_utils import stats_module_sparsity as stats_module_sparsity
from torchquant.compat.autoqnn.utils.statics_utils import stats_quantized_sparsity as stats_quantized_sparsity
from torchquant.compat.autoqnn.utils.statics_utils import stats_sparsity as stats_sparsity
