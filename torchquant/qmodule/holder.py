"""A module around another one that looks like that module from outside: same tensors, attributes and keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchquant._modes import has_hooks
from torchquant.errors import ConfigError, UnsupportedPatternError
from torchquant.qmodule.aside import RunsAside

_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks that compute a weight from trained parameters."""
OWN_CHILDREN = frozenset(
    (
        *("bn", "activation", "weight_quantizer", "weight_quantizers", "acts_quantizer", "input_quantizer"),
        *("bias_quantizer", "preactivation_quantizer", "probabilities_quantizer", "input_transform", "low_rank"),
    )
)
"""Names of the holder's own children; a child of the held module with such a name is listed as NAME_."""


class Holder(RunsAside):
    """Holds a module and stands in for it in reads, writes, names and keys.

    A subclass sets `self.layer` (or the attribute that `held_as` names) in its constructor and ends the constructor
    with `_hold()`. From then on

    * parameters and buffers are those of the held module, the very same dictionaries, and its children are listed as
      children: `state_dict` and `named_parameters` have the keys of the held module, each once;
    * attributes that the holder lacks are read from, set on and deleted from the held module, so that a hook or a
      function that is given the holder works on the held module. The hooks of `weight_norm`, `spectral_norm` and
      `prune` are registered on the holder;
    * `named_modules()` also gives the held module itself, at PATH.layer, unless duplicates are asked for.

    Hooks of the held module itself run around its forward (`_call_held`). Checkpoints with keys PATH.layer.NAME, as
    versions up to 0.1 wrote them, load too.
    """

    held_as: ClassVar[str] = "layer"

    @property
    def held(self) -> nn.Module | None:
        """The held module; None if there is none, or if it cannot be shared (a ScriptModule is a plain child)."""
        found: nn.Module | None = self.__dict__.get(self.held_as) if "_listed" in self.__dict__ else None
        return found

    def _hold(self) -> None:
        """Start to stand in for the held module."""
        module = self.__dict__.get(self.held_as)
        if not isinstance(module, nn.Module):
            return
        for name in _SHARED:
            self.__dict__[name] = module.__dict__[name]
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WEIGHT_HOOKS):
                self._forward_pre_hooks[key] = module._forward_pre_hooks.pop(key)
        self.__dict__.setdefault("_listed", set())
        self._list_children()

    def _list_children(self) -> None:
        """List the current children of the held module as the holder's own."""
        if self.held is None:
            return
        children = {f"{n}_" if n in OWN_CHILDREN else n: child for n, child in self.held._modules.items()}
        if any(self._modules.get(n) is not child for n, child in children.items()) or self._listed != children.keys():
            own = {name: child for name, child in self._modules.items() if name not in self._listed | children.keys()}
            self._modules.clear()
            self._modules.update(children | own)
            self.__dict__["_listed"] = set(children)

    def _call_held(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `forward(*args, **kwargs)` as the forward of the held module, between its hooks."""
        module = self.held
        if module is None or not has_hooks(module):
            return forward(*args, **kwargs)
        attributes = module.__dict__
        former = {"forward": attributes["forward"]} if "forward" in attributes else {}

        def put_back() -> None:
            attributes.pop("forward", None)
            attributes.update(former)

        def between_hooks(*args: Any, **kwargs: Any) -> Any:
            put_back()
            return forward(*args, **kwargs)

        attributes["forward"] = between_hooks
        try:
            return module(*args, **kwargs)
        finally:
            put_back()

    def _recompute_weights(self) -> None:
        """Let the hooks compute the weights from the current parameters, as they do before every call.

        Code that reads a weight without a call needs this first.
        """
        for hook in (*self._forward_pre_hooks.values(), *(self.held._forward_pre_hooks.values() if self.held else ())):
            if isinstance(hook, SpectralNorm):
                setattr(self, hook.name, hook.compute_weight(self, do_power_iteration=False))
            elif isinstance(hook, WEIGHT_HOOKS):
                hook(self, ())

    def _is_own(self, name: str) -> bool:
        if name in self.__dict__ or name in OWN_CHILDREN or hasattr(type(self), name):
            return True
        return name in self._modules and name not in self._listed

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules")
        if own is not None and name in own:
            return own[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = self.__dict__.get(self.held_as)
            if held is None or name.startswith("__"):
                raise
            return getattr(held, name)

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.held
        if name == self.held_as and isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            if held is not None:
                self._check_new(value)
            self.__dict__[name] = value
            if held is not None:
                self._hold()
        elif held is None:
            super().__setattr__(name, value)
        elif name == "training":
            self.__dict__[name] = value
            held.training = value
        elif name == "__class__" and value.__name__ == f"Parametrized{type(self).__name__}":
            kind = type(self).__name__
            raise ConfigError(
                f"a parametrization is registered on the layer that computes: give register_parametrization "
                f"the {self.held_as} of the {kind} (module.{self.held_as}), not the {kind}"
            )
        elif self._is_own(name) or not (isinstance(value, Tensor) or hasattr(held, name)):
            super().__setattr__(name, value)
        else:
            former = held._parameters.get(name)
            setattr(held, name, value)
            self._list_children()
            if isinstance(former, Tensor) and isinstance(value, nn.Parameter) and former.shape != value.shape:
                self._on_new_shape()

    def _check_new(self, module: nn.Module) -> None:
        """Raise UnsupportedPatternError for a new module to hold whose own forward the holder would not run."""

    def _cannot_hold(self, module: nn.Module) -> UnsupportedPatternError:
        """Make the error for a module whose forward the holder would not run, such as an adapter."""
        kind, name = type(self).__name__, self.held_as
        return UnsupportedPatternError(
            f"the {name} of a {kind} is run with its weight quantized, past its forward; {type(module).__name__} "
            f"cannot take the place of the {type(self.held).__name__} there: its own forward would not be run. "
            f"Put an adapter, such as LoRA, on the float model and quantize that, or put it around the {kind} itself: "
            f"model.fc = Adapter(model.fc), not model.fc.{name} = Adapter(model.fc.{name})"
        )

    def _on_new_shape(self) -> None:
        """React to a parameter of another shape that has been set."""

    def __delattr__(self, name: str) -> None:
        held = self.held
        if held is None or self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(held, name)
            self._list_children()

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(dir(self.held) if self.held is not None else ())})

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        self._list_children()
        memo = set() if memo is None else memo
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name, module
            held = self.held
            if module is self and remove_duplicate and held is not None and held not in memo:
                memo.add(held)
                yield f"{prefix}.{self.held_as}" if prefix else self.held_as, held

    def _own_modules(self) -> list[nn.Module]:
        return [m for name, m in self._modules.items() if m is not None and name not in self._listed]

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Call `fn` on every module below, the held one, and this."""
        if self.held is None:
            return super().apply(fn)
        for module in (*self._own_modules(), self.held):
            module.apply(fn)
        fn(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.held is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in (*(self._own_modules() if recurse else ()), self.held):
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._list_children()
        return self

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.held is not None:
            self.held.train(mode)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        if self.held is not None:
            replica.__dict__[self.held_as] = self.held._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
            replica._hold()
        return replica

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._list_children()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._list_children()
        self.rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rename_old_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename keys PREFIX.layer.NAME, in place, to PREFIX.NAME, the form since 0.2."""
        if self.held is None or self.held_as in self._listed:
            return
        old = f"{prefix}{self.held_as}."
        for key in [key for key in state_dict if key.startswith(old)]:
            first, dot, rest = key.removeprefix(old).partition(".")
            first = f"{first}_" if dot and first in OWN_CHILDREN else first
            state_dict.setdefault(f"{prefix}{first}{dot}{rest}", state_dict[key])
            del state_dict[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.held is not None:  # a weight that hooks computed has a history, which torch refuses to copy
            for value in vars(self.held).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        reduced = super().__reduce_ex__(4)
        assert isinstance(reduced, tuple)
        made, arguments, state = reduced[:3]
        copied = made(*arguments)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        former = self._modules.get(self.held_as)  # a pickle of 0.1
        if "_listed" not in self.__dict__ and former is not None and not isinstance(former, torch.jit.ScriptModule):
            self.__dict__[self.held_as] = self._modules.pop(self.held_as)
            self._hold()

    def held_repr(self) -> str:
        """Return the lines of `repr` that show the held module."""
        return f"\n({self.held_as}): {self.held!r}" if self.held is not None else ""
