"""Patterns for layers of other packages, which are not imported here.

efficientnet_pytorch's `Swish` is `nn.SiLU`, which has a pattern already.
"""

from __future__ import annotations

from torchquant.qmodule.patterns import ActivationPattern, InputFirstPattern, register_pattern

register_pattern("efficientnet_pytorch.utils.MemoryEfficientSwish", ActivationPattern())
for _name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "SiLUActivation"):
    register_pattern(f"transformers.activations.{_name}", ActivationPattern())
for _name in ("GELU", "GELUTanh", "Sigmoid", "Tanh", "Swish", "Mish", "HardSwish", "HardSigmoid", "PReLU"):
    register_pattern(f"timm.layers.activations.{_name}", ActivationPattern())
register_pattern("transformers.pytorch_utils.Conv1D", InputFirstPattern())
