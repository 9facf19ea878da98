"""The state machine that says when a QModule observes and when it quantizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from torchquant._shown import shown
from torchquant.errors import ConfigError, UnobservedRangeError, UnsupportedPatternError
from torchquant.qmodule.holder import Holder
from torchquant.qmodule.patterns import activation_clamp
from torchquant.qmodule.weight_slots import WeightSlot
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._recording import current_recorder
from torchquant.range_observers._counting import settle_together
from torchquant.range_observers._statistics import StatisticTracker


class QModuleState(Enum):
    """States as flags: observe weight, observe activations, quantize weight, quantize activations."""

    # fmt: off
    BYPASSED                      = (False, False, False, False)
    CALIBRATION                   = (True,  True,  False, False)
    CALIBRATION_WEIGHT_ONLY       = (True,  False, False, False)
    CALIBRATION_ACT_ONLY          = (False, True,  False, False)
    QUANT_AWARE_TRAIN             = (True,  True,  True,  True)
    QUANT_AWARE_TRAIN_WEIGHT_ONLY = (True,  False, True,  False)
    QUANT_AWARE_TRAIN_ACT_ONLY    = (False, True,  False, True)
    QUANT_EVAL                    = (False, False, True,  True)
    QUANT_EVAL_WEIGHT_ONLY        = (False, False, True,  False)
    QUANT_EVAL_ACT_ONLY           = (False, False, False, True)
    # fmt: on

    def __init__(self, observe_w: bool, observe_a: bool, quantize_w: bool, quantize_a: bool) -> None:
        self.is_weight_observed = observe_w
        self.is_act_observed = observe_a
        self.is_weight_quantized = quantize_w
        self.is_act_quantized = quantize_a


_STATES = list(QModuleState)
ACTIVATIONS = ("input", "probabilities", "preactivation", "output")
"""The slots of a QModule for activations; in its other slots it holds the quantized tensors itself."""
_QUANTIZERS = {
    "weight": "weight_quantizer",
    "bias": "bias_quantizer",
    "input": "input_quantizer",
    "probabilities": "probabilities_quantizer",
    "preactivation": "preactivation_quantizer",
    "output": "acts_quantizer",
}
"""Slot -> the attribute of a QModule that is the quantizer there."""
AVERAGED = 1e-3
"""Largest deviation of the mean of equal flags from them: the weights of an average sum only nearly to 1."""


def saved_flag(value: float, where: str) -> bool:
    """Read a flag of a checkpoint, 0 or 1; for averaged models, the flag that all of them had.

    Raises ConfigError for any number between, which is the mean of different states.
    """
    flag = value >= 0.5
    if not abs(value - flag) <= AVERAGED:
        raise ConfigError(
            f"{where}: a saved state holds flags that are 0 or 1, got {value:.4g}: it was averaged over models in "
            "different states. Put all of them in one state with set_qmodule_state before they are averaged, or leave "
            "the keys that end with '_extra_state' out and load with strict=False"
        )
    return flag


def saved_state(numbers: list[float], where: str) -> QModuleState:
    """Return the state with these four flags; a single number, as in older files, is an index into the states.

    The mean of different flags is no state, whereas the mean of two indices may be the index of a third state.
    Raises ConfigError.
    """
    if len(numbers) == 1:
        if numbers[0] not in range(len(_STATES)):
            raise ConfigError(f"{where}: a saved QModule state must be 0..{len(_STATES) - 1}, got {numbers[0]:.4g}")
        return _STATES[int(numbers[0])]
    flags = tuple(saved_flag(number, where) for number in numbers)
    known: dict[tuple[bool, ...], QModuleState] = {state.value: state for state in _STATES}
    if flags not in known:
        raise ConfigError(
            f"{where}: a saved QModule state is 4 flags, (observe weight, observe activations, quantize weight, "
            f"quantize activations), as in a state of QModuleState; got {numbers}"
        )
    return known[flags]


def is_real(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


class QModule(Holder):
    """A module with a state. `.train()` and `.eval()` never change it; `set_qmodule_state` does.

    The state is saved in the `state_dict`, as four float flags: the mean of models in one state has that state, and
    the mean of models in different states is refused.
    """

    is_split = False
    """Whether the model itself runs the batch norm and the activation that are fused into the module."""
    bn_frozen = False
    """Whether a fused batch norm stays on its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self._state = QModuleState.BYPASSED
        self._seen: list[tuple[Tensor, int]] = []
        """The tensors from which the last observed weight comes, and their versions."""
        self.path = ""
        """The module's path in its model; written by `set_qmodule_state`, used in messages."""

    @property
    def state(self) -> QModuleState:
        """The state of the module. On entering a state, even the same one, an unchanged weight is observed again."""
        return self._state

    @state.setter
    def state(self, state: QModuleState) -> None:
        if not isinstance(state, QModuleState):
            raise ConfigError(f"state must be a QModuleState, such as QModuleState.QUANT_EVAL; got {shown(state)}")
        set_states([(self, state)])

    def _trackers(self) -> Iterator[StatisticTracker]:
        """Yield every part of the quantizers that has statistics."""
        for quantizer in self.quantizers().values():
            for module in quantizer.modules():
                if isinstance(module, StatisticTracker):
                    yield module

    @property
    def mode(self) -> Any:
        """The published name of `state`: `module.mode = QModuleState.QUANT_EVAL` sets it.

        A module with a `mode` of its own, such as LSTM and EmbeddingBag, keeps it; use `state` there.

        >>> from torchquant.qmodule import QWrapper
        >>> QWrapper(nn.Linear(1, 1)).mode.name
        'BYPASSED'
        """
        held: Any = self.held
        return held.mode if hasattr(held, "mode") else self.state

    @mode.setter
    def mode(self, mode: Any) -> None:
        held: Any = self.held
        if hasattr(held, "mode") and not isinstance(mode, QModuleState):
            held.mode = mode
        else:
            self.state = mode

    def quantizers(self) -> dict[str, Quantizer]:
        """Map slots ("weight", "bias", "input", "probabilities", ...) to quantizers; float slots are left out."""
        found = {site: self._modules.get(name) for site, name in _QUANTIZERS.items()}
        return {site: quantizer for site, quantizer in found.items() if isinstance(quantizer, Quantizer)}

    def replace_quantizer(self, slot: str, new: Quantizer) -> None:
        """Replace the quantizer of a slot for activations: "input", "probabilities", "preactivation", "output"."""
        setattr(self, _QUANTIZERS[slot], new)

    def weight_slots(self) -> list[WeightSlot]:
        """List the module's own weights, quantized or not; a slot is the one way to read, set and quantize a weight."""
        return []

    def weights(self) -> list[tuple[str, Tensor, Quantizer | None]]:
        """Return (name, real weight, its quantizer or None) for every weight slot."""
        return [(slot.name, slot.weight, slot.quantizer) for slot in self.weight_slots()]

    def freeze_bn(self, frozen: bool = True) -> None:
        """Keep a fused batch norm on its running statistics, also in train mode."""

    def observe_weight(self) -> None:
        """Let each weight quantizer observe its current weight. No data is needed."""

    def _is_new_weight(self, quantizers: Sequence[Quantizer], sources: Sequence[Tensor]) -> bool:
        """Whether weights differ from those observed last in this state; records them as observed.

        `sources`: the tensors from which the weights come. Their version counters tell a change; a write through
        `.data` does not move these. A quantizer that remembers more than the last tensor observes every time.
        """
        if torch.compiler.is_compiling():
            return True
        if self._is_as_seen(sources) and all(quantizer.is_ready for quantizer in quantizers):
            return False
        is_kept = all(q.is_memoryless for q in quantizers) and all(t.is_leaf for t in sources)
        self._seen = [(t, t._version) for t in sources] if is_kept else []
        return True

    def _is_as_seen(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the tensors recorded last, unchanged."""
        if len(self._seen) != len(sources):
            return False
        for source, (tensor, version) in zip(sources, self._seen, strict=True):
            if source is not tensor or source._version != version:
                return False
        return True

    def _on_new_shape(self) -> None:
        """Observe the weight again after its shape has changed; pinned numbers are for the former shape."""
        own = [quantizer for site, quantizer in self.quantizers().items() if site not in ACTIVATIONS]
        were_ready = any(quantizer.is_ready for quantizer in own)
        for quantizer in own:
            quantizer.unpin()
            for tracker in quantizer.modules():
                if isinstance(tracker, StatisticTracker):
                    tracker.reset()
        if were_ready:
            self.observe_weight()

    def _quantize_site(self, site: str, quantizer: Quantizer, x: Tensor, **kwargs: Any) -> Tensor:
        if not quantizer.is_ready:
            raise UnobservedRangeError(
                f"{self.path or type(self).__name__}: the {site} quantizer ({type(quantizer).__name__}) has seen no "
                "data. Run a batch in QModuleState.CALIBRATION (or QUANT_AWARE_TRAIN), or set its range by hand "
                "with force_ranges(min, max). Start a running average of models (EMA) after that"
            )
        return self._told(quantizer, quantizer(x, **kwargs), x, **kwargs)

    def _observe_and_quantize(self, site: str, quantizer: Quantizer, x: Tensor, **kwargs: Any) -> Tensor:
        quantized = quantizer.observe_and_quantize(x, **kwargs)
        if quantized is None:
            quantizer.pre_observe(x, **kwargs)
            return self._quantize_site(site, quantizer, x, **kwargs)
        return self._told(quantizer, quantized, x, **kwargs)

    @staticmethod
    def _told(quantizer: Quantizer, quantized: Tensor, x: Tensor, **kwargs: Any) -> Tensor:
        """Return what a quantizer made of x, after the recorder and the quantizer have been told."""
        recorder = current_recorder()
        if recorder is not None and quantizer.is_idempotent and recorder.misses(quantized):
            recorder.note_quantized(quantized, quantizer.format(), x, **kwargs)
        quantizer.post_observe(quantized)
        return quantized

    def _run_acts_quantizer(
        self, site: str, quantizer: Quantizer | None, x: Tensor, activation: nn.Module | None = None
    ) -> Tensor:
        """Apply `activation`, then observe and quantize as the state says, in one pass where possible.

        A PackedSequence has its data quantized. Values that are not real pass unchanged, since an operator may also
        work on sizes. Raises UnsupportedPatternError for a structure of tensors, which a quantizer cannot observe.
        """
        state = self._state
        if quantizer is None or not (state.is_act_observed or state.is_act_quantized):
            return x if activation is None else activation(x)
        if isinstance(x, PackedSequence) and activation is None:
            return x._replace(data=self._run_acts_quantizer(site, quantizer, x.data))  # type: ignore[no-any-return]
        if not is_real(x):
            if not isinstance(x, Tensor) and any(is_real(leaf) for leaf in tree_leaves(x)):
                raise UnsupportedPatternError(
                    f"{self.path or type(self).__name__}: its {site} is a {type(x).__name__} of tensors, and the "
                    f"{site} quantizer ({type(quantizer).__name__}) takes one tensor. Take the tensor out before it, "
                    "or give this site None to keep it float"
                )
            return x if activation is None else activation(x)
        clamp = None
        if activation is not None:
            if state.is_act_quantized and quantizer.fuses_clamp:
                clamp = activation_clamp(activation)
            x = activation(x) if clamp is None else x
        kwargs = {} if clamp is None else {"clamp": clamp}
        if not state.is_act_observed:
            return self._quantize_site(site, quantizer, x, **kwargs)
        if state.is_act_quantized:
            return self._observe_and_quantize(site, quantizer, x, **kwargs)
        quantizer.pre_observe(x, **kwargs)
        return x

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.state.value, dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        self.state = saved_state(state.flatten().tolist(), self.path or type(self).__name__)


def set_states(states: Sequence[tuple[QModule, QModuleState]]) -> None:
    """Put each module in its state. Pending choices of ranges are made together, which is faster."""
    trackers = [tracker for module, _ in states for tracker in module._trackers()]
    for tracker in trackers:
        tracker.look_again()  # compiled code does not check for statistics that others wrote
    settle_together(trackers)
    for module, state in states:
        module._state = state
        module._seen = []
