"""Describe a quantization for transformers, as a value: the `quantization_config` of a model's config.json."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torchquant import __version__
from torchquant._arguments import checked
from torchquant._registry import did_you_mean
from torchquant.deploy.packed.head import Head
from torchquant.errors import ConfigError, MissingDependencyError, require
from torchquant.plan import RULE_SETS, QuantPlan
from torchquant.plan.rules import check_keys

METHOD = "torchquant"
SAVE_AS = ("codes", "float", "state")

_quantizers: Any = require("transformers.quantizers.auto", "transformers")
if not hasattr(_quantizers.HfQuantizer, "get_new_dtype"):
    raise MissingDependencyError(
        f"this needs transformers 5.22 or newer, and {require('transformers', 'transformers').__version__} is "
        "installed; run: pip install 'torchquant[transformers]'"
    )


@_quantizers.register_quantization_config(METHOD)
@checked
class TorchquantConfig(_quantizers.QuantizationConfigMixin):  # type: ignore[misc]
    """Says how `from_pretrained` quantizes a model: `AutoModel.from_pretrained(path, quantization_config=...)`.

    `rules`: the name of a rule set, a list of rules, or a QuantPlan, as `torchquant.quantize` takes them.
    `example_inputs`: arguments of the model's forward, on which its products are found; None: `model.dummy_inputs`,
    which models of text have. `trace`: True also quantizes what flows between layers, in graphs of the forwards; a
    model that generates takes paths that no graph has, so that by default layers are quantized one by one.
    `save_as`: what `save_pretrained` writes of a quantized weight: "codes" at their true width, for inference, the
    "float" weight, to train on, or "state": codes of a model in QUANT_EVAL, floats in any other state. The other
    arguments are read from the config.json of a saved model.

    Raises ConfigError for an unknown rule set and for settings of another version; MissingDependencyError.

    >>> TorchquantConfig("w4a8").to_dict()["rules"]
    'w4a8'
    """

    def __init__(
        self,
        rules: str | Sequence[Mapping[str, Any]] | QuantPlan | None = None,
        example_inputs: Any = None,
        trace: bool = False,
        save_as: str = "codes",
        plan: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        version: str = __version__,
        quant_method: str = METHOD,
    ) -> None:
        if (rules is None) == (plan is None):
            raise ConfigError("give rules: the name of a rule set, a list of rules or a QuantPlan")
        if isinstance(rules, str) and rules not in RULE_SETS:
            known = ", ".join(RULE_SETS)
            raise ConfigError(f"there is no rule set '{rules}';{did_you_mean(rules, RULE_SETS)} Known: {known}")
        if save_as not in SAVE_AS:
            raise ConfigError(f"save_as must be one of {', '.join(SAVE_AS)}, got {save_as!r}")
        if quant_method != METHOD:
            raise ConfigError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        self.quant_method = quant_method
        self.rules, self.example_inputs, self.trace, self.save_as = rules, example_inputs, trace, save_as
        self.plan, self.version = plan, version
        self.weights, self.tied = dict(weights or {}), dict(tied or {})

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make the config from the data in a config.json. Raises ConfigError for keys of another version."""
        known = ("plan", "rules", "trace", "save_as", "weights", "tied", "version", "quant_method")
        where = f"the quantization_config of torchquant {config_dict.get('version', '')}".rstrip()
        check_keys(where, config_dict, known)
        return super().from_dict(dict(config_dict), return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data: the plan of a model that was saved, else the rules."""
        said = {"quant_method": METHOD, "version": self.version, "save_as": self.save_as}
        if self.plan is not None:
            return copy.deepcopy({**said, "plan": self.plan, "weights": self.weights, "tied": self.tied})
        rules = self.rules.to_dict() if isinstance(self.rules, QuantPlan) else self.rules
        return {**said, "rules": rules if isinstance(rules, str) else repr(rules), "trace": self.trace}

    def saved(self, head: Head, save_as: str) -> TorchquantConfig:
        """Return the config of a model that is saved with this head."""
        return TorchquantConfig(plan=head.plan, save_as=save_as, weights=head.weights, tied=head.tied)

    @property
    def head(self) -> Head:
        """The head that the config of a saved model holds."""
        return Head(self.weights, dict(self.plan or {}), None, self.tied)
