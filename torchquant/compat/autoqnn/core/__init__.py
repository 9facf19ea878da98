"""AutoQNN's `convert`, its training and validation loops and metrics, and the loss of learned widths."""

from torchquant.compat.autoqnn.core import module_convert as module_convert
from torchquant.compat.autoqnn.core.module_convert import (
    DEFAULT_QUANTIZE_MODULE_MAPPINGS as DEFAULT_QUANTIZE_MODULE_MAPPINGS,
)
from torchquant.compat.autoqnn.core.module_convert import clone_quantizer as clone_quantizer
from torchquant.compat.autoqnn.core.module_convert import convert as convert
from torchquant.compat.autoqnn.core.precision import freeze_bitwidths as freeze_bitwidths
from torchquant.compat.autoqnn.core.precision import precision_loss as precision_loss
from torchquant.compat.autoqnn.core.train_evaluate import AverageMeter as AverageMeter
from torchquant.compat.autoqnn.core.train_evaluate import accuracy as accuracy
from torchquant.compat.autoqnn.core.train_evaluate import adjust_learning_rate as adjust_learning_rate
from torchquant.compat.autoqnn.core.train_evaluate import save_checkpoint as save_checkpoint
from torchquant.compat.autoqnn.core.train_evaluate import top1 as top1
from torchquant.compat.autoqnn.core.train_evaluate import top5 as top5
from torchquant.compat.autoqnn.core.train_evaluate import train as train
from torchquant.compat.autoqnn.core.train_evaluate import train_on_batch as train_on_batch
from torchquant.compat.autoqnn.core.train_evaluate import validate as validate
from torchquant.compat.autoqnn.core.train_evaluate import validate_on_batch as validate_on_batch
from torchquant.compat.autoqnn.modules import QuantLayer as QuantLayer

__all__ = [
    "DEFAULT_QUANTIZE_MODULE_MAPPINGS",
    "AverageMeter",
    "QuantLayer",
    "accuracy",
    "adjust_learning_rate",
    "clone_quantizer",
    "convert",
    "freeze_bitwidths",
    "module_convert",
    "precision_loss",
    "save_checkpoint",
    "top1",
    "top5",
    "train",
    "train_on_batch",
    "validate",
    "validate_on_batch",
]
