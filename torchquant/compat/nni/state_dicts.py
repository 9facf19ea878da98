"""State dicts of models that NNI 3.0 wrapped, taken apart: float tensors, and the numbers of its quantizers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_WRAPPED = re.compile(
    r"(?P<path>.*?)\.?_nni_wrapper\.(?P<target>.+?)(?:_(?P<number>scale|zero_point|tracked_max|tracked_min))?$"
)


def unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, dict[str, Any]]]]:
    """Return the tensors under the keys of the float model, and the calibration config that the others are.

    NNI keeps a parameter that it quantizes in its wrapper, PATH._nni_wrapper.NAME, and at PATH.NAME the last quantized
    one, which is left out; scales and ranges are PATH._nni_wrapper.TARGET_scale and so on.

    >>> import torch
    >>> state = {"fc._nni_wrapper.weight": torch.ones(1), "fc._nni_wrapper.weight_scale": torch.ones(1)}
    >>> tensors, config = unwrapped(state)
    >>> list(tensors), list(config["fc"]["weight"])
    (['fc.weight'], ['scale'])
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, dict[str, dict[str, Any]]] = {}
    for key, value in state.items():
        match = _WRAPPED.match(key)
        if match is None:
            tensors.setdefault(key, value)
        elif match["number"] is None:
            tensors[".".join(part for part in (match["path"], match["target"]) if part)] = value
        else:
            config.setdefault(match["path"], {}).setdefault(match["target"], {})[match["number"]] = value
    return tensors, {path: entry for path, entry in config.items() if any("scale" in each for each in entry.values())}
