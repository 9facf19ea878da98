"""Plans: rules make a plan (`rules.py`), a plan is a value (`quant_plan.py`), `quantize_model.py` applies it."""

from torchquant.plan.quant_plan import PlanChange as PlanChange
from torchquant.plan.quant_plan import QuantPlan as QuantPlan
from torchquant.plan.quant_plan import read_yaml as read_yaml
from torchquant.plan.quantize_model import quantize as quantize
from torchquant.plan.rules import RULE_SETS as RULE_SETS
from torchquant.plan.rules import Rules as Rules

__all__ = ["RULE_SETS", "PlanChange", "QuantPlan", "Rules", "quantize", "read_yaml"]
