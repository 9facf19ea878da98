"""The module that takes the place, in a model, of a batch norm or activation that was fused into a QModule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from torchquant.qmodule.holder import Holder
from torchquant.qmodule.state import QModule, QModuleState

SLOTS = ("bn", "activation")
"""Attributes in which a QModule holds its fused parts."""


class FusedPart(Holder):
    """Runs the part in BYPASSED, where its wrapper runs the layer alone; returns its input in all other states.

    So the forward of the float model computes the same as before, and nothing is computed twice where the wrapper
    computes the whole pattern. The part keeps its place: its tensors keep their keys, its attributes are found here.

    >>> from torchquant.qmodule import QWrapper
    >>> norm = nn.BatchNorm1d(2)
    >>> part = FusedPart(QWrapper([nn.Linear(3, 2), norm], None, None), norm)
    >>> part.num_features, list(part.state_dict())[:2]
    (2, ['weight', 'bias'])
    """

    held_as: ClassVar[str] = "part"

    def __init__(self, wrapper: QModule, part: nn.Module) -> None:
        super().__init__()
        self.__dict__["wrapper"] = wrapper  # not a child: the wrapper has its own place in the model
        self.part = part
        self.training = part.training
        self._hold()
        for slot in SLOTS:
            taken = wrapper._modules.get(slot)
            if taken is not None and (taken is part or taken._parameters is part._parameters):
                wrapper.__dict__[slot] = wrapper._modules.pop(slot)

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self.part
        return part(x) if self.wrapper.state is QModuleState.BYPASSED else x

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        taken = self.wrapper.__dict__.get(self._slot()) if name == "training" and "part" in self.__dict__ else None
        if taken is not None:  # a norm that was split from its activation is another object
            taken.training = value

    def train(self, mode: bool = True) -> Any:
        is_frozen = self.wrapper.bn_frozen and self._slot() == "bn"
        return super().train(mode and not is_frozen)

    def _slot(self) -> str:
        held: Any = self.__dict__["part"]
        is_norm = getattr(getattr(self.wrapper, "bn", None), "_parameters", None) is held._parameters
        return "bn" if is_norm else "activation"

    def former_prefix(self, paths: Mapping[nn.Module, str]) -> str:
        """Return the prefix of the part's keys in files of version 0.1."""
        return f"{paths[self.wrapper]}.{self._slot()}."

    def extra_repr(self) -> str:
        return f"{type(self.__dict__['part']).__name__}, taken in by a {type(self.wrapper).__name__}"


def rename_moved_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> None:
    """Rename, in place, the keys of tensors of fused parts to those of version 0.2 and later."""
    paths = {module: path for path, module in model.named_modules()}
    for module, path in paths.items():
        if isinstance(module, FusedPart):
            before = prefix + module.former_prefix(paths)
            for key in [key for key in state_dict if key.startswith(before)]:
                state_dict.setdefault(f"{prefix}{path}.{key.removeprefix(before)}", state_dict[key])
                del state_dict[key]


def current_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Map the keys of a checkpoint of `model`, written by this version or by 0.1, to the current keys."""
    renamed = {key: key for key in keys}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Holder):
            module.rename_old_keys(renamed, f"{path}." if path else "")
    rename_moved_keys(model, renamed)
    return {old: new for new, old in renamed.items()}
