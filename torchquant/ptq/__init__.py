"""Post-training quantization: algorithms that choose weights, scales and roundings without training the model.

`run` runs stages (`engine.py`: their order and the passes, `streams.py`: forwards that stop before each layer,
`work.py`: the stages at one layer, `blocks.py`, `block.py`, `block_pass.py`, `block_work.py`: the same for blocks,
`resuming.py`: the folder of a run). A stage is a class in `PTQ` (`stage.py`), each
in a file of `algorithms/`; the maths is in `functional/`. `quantized_cache` (`kv_cache.py`) keeps keys and values of
attention in few bits.
"""

from torchquant.ptq import algorithms as algorithms
from torchquant.ptq.block import Block as Block
from torchquant.ptq.block import BlockData as BlockData
from torchquant.ptq.blocks import Blocks as Blocks
from torchquant.ptq.blocks import find_blocks as find_blocks
from torchquant.ptq.distilled import distilled_inputs as distilled_inputs
from torchquant.ptq.engine import run as run
from torchquant.ptq.kv_cache import quantized_cache as quantized_cache
from torchquant.ptq.layer import Layer as Layer
from torchquant.ptq.layer import LayerData as LayerData
from torchquant.ptq.previews import Preview as Preview
from torchquant.ptq.previews import UnitPreview as UnitPreview
from torchquant.ptq.previews import preview as preview
from torchquant.ptq.readers import Readers as Readers
from torchquant.ptq.recipe import RECIPES as RECIPES
from torchquant.ptq.recipe import Recipe as Recipe
from torchquant.ptq.recipe import find_recipe as find_recipe
from torchquant.ptq.report import PTQReport as PTQReport
from torchquant.ptq.report import StepReport as StepReport
from torchquant.ptq.stage import PTQ as PTQ
from torchquant.ptq.stage import BiasChange as BiasChange
from torchquant.ptq.stage import BlockStage as BlockStage
from torchquant.ptq.stage import InputStage as InputStage
from torchquant.ptq.stage import LowRankChange as LowRankChange
from torchquant.ptq.stage import MatchingRounding as MatchingRounding
from torchquant.ptq.stage import ModelStage as ModelStage
from torchquant.ptq.stage import NumberSearch as NumberSearch
from torchquant.ptq.stage import Rounding as Rounding
from torchquant.ptq.stage import WeightChange as WeightChange
from torchquant.ptq.stage import make_stage as make_stage

__all__ = [
    "PTQ",
    "RECIPES",
    "BiasChange",
    "Block",
    "BlockData",
    "BlockStage",
    "Blocks",
    "InputStage",
    "Layer",
    "LayerData",
    "LowRankChange",
    "MatchingRounding",
    "ModelStage",
    "NumberSearch",
    "PTQReport",
    "Preview",
    "Readers",
    "Recipe",
    "Rounding",
    "StepReport",
    "UnitPreview",
    "WeightChange",
    "distilled_inputs",
    "find_blocks",
    "find_recipe",
    "make_stage",
    "preview",
    "quantized_cache",
    "run",
]
