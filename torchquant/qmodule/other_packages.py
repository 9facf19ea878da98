"""Patterns for layers of other packages, which are not imported here.

efficientnet_pytorch's `Swish` is `nn.SiLU`, which has a pattern already.
"""

from __future__ import annotations

from torchquant.qmodule.patterns import ActivationPattern, InputFirstPattern, register_pattern
from torchquant.qmodule.weighted import WeightsPattern

register_pattern("efficientnet_pytorch.utils.MemoryEfficientSwish", ActivationPattern())
for _name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "SiLUActivation"):
    register_pattern(f"transformers.activations.{_name}", ActivationPattern())
for _name in ("GELU", "GELUTanh", "Sigmoid", "Tanh", "Swish", "Mish", "HardSwish", "HardSigmoid", "PReLU"):
    register_pattern(f"timm.layers.activations.{_name}", ActivationPattern())
register_pattern("transformers.pytorch_utils.Conv1D", InputFirstPattern())
_EXPERTS = WeightsPattern(
    weights=("gate_up_proj", "down_proj"), values=("hidden_states",), stacks=("gate_up_proj", "down_proj")
)
for _file, _name in (
    *(("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"), ("qwen3_5_moe", "Qwen3_5Moe")),
    *(("olmoe", "Olmoe"), ("phimoe", "Phimoe"), ("deepseek_v2", "DeepseekV2"), ("deepseek_v3", "DeepseekV3")),
    *(("glm4_moe", "Glm4Moe"), ("granitemoe", "GraniteMoe"), ("jamba", "Jamba"), ("minimax_m2", "MiniMaxM2")),
):
    register_pattern(f"transformers.models.{_file}.modeling_{_file}.{_name}Experts", _EXPERTS)
