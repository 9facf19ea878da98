"""AutoQNN's state dicts: what the buffers of its quantizers mean here, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.compat.autoqnn.modules import LAYERS, QuantLayer
from torchquant.compat.autoqnn.quantizers import Quantization
from torchquant.compat.autoqnn.quantizers._scheme import Activation
from torchquant.errors import ConfigError
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional.midrise import MIDRISE_STEP

PLACES = {"weight_quant": "weight_quantizer", "bias_quant": "bias_quantizer", "act_quant": "input_quantizer"}
MEASURED = "measured anew from the weight"
CALIBRATE = "starts at an arbitrary number there; calibrate"
AS_THERE = f"{MEASURED}, as there"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """A published class beside ours.

    `why`: why its values of a weight differ, `why_act`: of an activation in evaluation; "" if they are the same.
    `read`: our numbers of an activation from its buffers; None if nothing there means the same. `write`: its buffers
    from our quantizer, but those of the base.
    """

    why: str
    why_act: str
    read: Callable[[Tensors], dict[str, Tensor]] | None
    write: Callable[[Any], dict[str, Any]]


def _midrise(q: Any, **numbers: Any) -> dict[str, Any]:
    steps = torch.tensor([MIDRISE_STEP[n] for n in range(1, 9)], dtype=torch.float64)
    half = 2.0 ** (q.n_bits - 1)
    step = torch.tensor(MIDRISE_STEP[q.n_bits], dtype=torch.float64)
    return {"lambdas": steps, "_lamb": step, **numbers, "max_quant_val": half - 1, "min_quant_val": -half}


def _fixed(q: Any) -> dict[str, Any]:
    exponent = {"exponent": q.affine_params().delta.log2().round()}
    most = torch.stack([end.abs() for end in q.observer.get_ranges()]).amax()
    return exponent | ({"tensor_maxval": most} if isinstance(q, Activation) else {})


def _pot(q: Any) -> dict[str, Any]:
    largest = 2.0 ** (q.n_bits - 1) - 1
    steps = torch.tensor([1.0, 0.9, 0.4, 0.03], dtype=torch.float64)
    own = {"alpha": q.alpha, "max_quant_val": 2.0**largest, "max_exp": largest}
    return {"lambdas": steps, "_lamb": steps[q.n_bits - 1], **own}


def _zoom(q: Any) -> dict[str, Any]:
    low, high = q.get()
    return {"alpha": (high - low) / 2**q.n_bits, "max_val": high, "min_val": low}


UNCLIPPED = "there codes are not clipped (docs/algorithms.md I-17); here the step doubles if the largest does not fit"
UNROUNDED = "there the step is larger by 1e-4 / 2**bits, and the ends of the range are levels too"
NO_ONE = "there level 1 is missing (docs/algorithms.md I-15)"

ARITHMETIC: dict[str, Arithmetic] = {
    "FixedQuant": Arithmetic(
        UNCLIPPED,
        UNCLIPPED,
        lambda s: {"range_min": -s["tensor_maxval"], "range_max": s["tensor_maxval"], "fewer_bits": torch.zeros(())},
        _fixed,
    ),
    "Ternary": Arithmetic(
        "",
        "",
        lambda s: {"threshold": s["delta"] / 2, "alpha": s["alpha"]},
        lambda q: {"delta": 2 * q.get()[0], "alpha": q.get()[1]},
    ),
    "Binary": Arithmetic(
        "", "there 0 stays 0, a third value", lambda s: {"alpha": s["alpha"]}, lambda q: {"alpha": q.get()[0]}
    ),
    "uL2Q": Arithmetic(
        "there half a step is lost (docs/algorithms.md I-11)",
        "there half a step is lost (docs/algorithms.md I-11)",
        None,
        lambda q: _midrise(q, beta=q.get()[1], alpha=q.get()[0]),
    ),
    "VecQ": Arithmetic(
        "there the values are scaled by norms, not by least squares (docs/algorithms.md I-12)",
        "",
        lambda s: {"threshold_step": s["alpha"], "step": s["re_alpha"]},
        lambda q: _midrise(q, alpha=q.get()[0], re_alpha=q.get()[1]),
    ),
    "ClipQ": Arithmetic(
        "there the step has four digits, of the deviation in place of the root mean square",
        "",
        lambda s: {"step": s["alpha"]},
        lambda q: _midrise(q, alpha=q.get()[0]),
    ),
    "ZoomQ": Arithmetic(UNROUNDED, UNROUNDED, lambda s: {"range_min": s["min_val"], "range_max": s["max_val"]}, _zoom),
    "PotQ": Arithmetic(NO_ONE, NO_ONE, None, _pot),
    "ResQ": Arithmetic(
        "here a value takes the nearest level, there that of its signs",
        "the numbers that are saved there are off by one (docs/algorithms.md I-16)",
        None,
        lambda q: {"alphas": torch.cat([q.get()[0], torch.ones(32 - q.n_bits)])},
    ),
    "ESB_PerChannel": Arithmetic(
        "there the scale comes from the deviation, by other constants (docs/algorithms.md I-9, I-10)",
        "",
        None,
        lambda q: {
            "alpha_vec": q.get()[0].view(-1),
            "mean_vec": q.get()[1].view(-1) if q.mean_shift else torch.zeros(1),
        },
    ),
}


def arithmetic_of(quantizer: Quantizer | None) -> Arithmetic | None:
    """Return the arithmetic of a shipped class; None for another quantizer."""
    names = [base.__name__ for base in type(quantizer).__mro__]
    return next((ARITHMETIC[name] for name in names if name in ARITHMETIC), None)


@dataclass
class Read:
    """The contents of one quantizer of a checkpoint: notes by name of its buffers, tensors to load, numbers to set."""

    notes: dict[str, tuple[str, str]]
    """Name -> (key in our model or "", note)."""
    loaded: dict[str, Tensor] = field(default_factory=dict)
    quantizer: Quantizer | None = None
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def set(self) -> None:
        """Set the numbers."""
        if self.quantizer is not None:
            self.quantizer._set_numbers(**self.numbers)


def read_quantizer(model: nn.Module, path: str, slot: str, state: Tensors) -> Read:
    """Read the buffers of one of AutoQNN's quantizers for the quantizer in its place."""
    plain = CALIBRATE if slot == "act_quant" else MEASURED
    layer = dict(model.named_modules()).get(path)
    quantizer: Any = getattr(layer, slot, None) if isinstance(layer, QuantLayer) else None
    if "float_bitwidth" not in state or not isinstance(quantizer, Quantization):
        nothing = "quantizes nothing there" if state.keys() == {"float_bitwidth", "shadow_bitwidth"} else plain
        return Read(dict.fromkeys(state, ("", nothing)))
    place = PLACES[slot] if slot != "act_quant" or quantizer is layer.input_quantizer else "acts_quantizer"  # type: ignore[union-attr]
    prefix = f"{path}.{place}." if path else f"{place}."
    read = Read(dict.fromkeys(("float_bitwidth", "shadow_bitwidth"), ("", "the width is an argument here")))
    if quantizer.learns_width:
        key = f"{prefix}mixture.float_bitwidth"
        read.notes["float_bitwidth"] = (key, "")
        read.loaded[key] = state["float_bitwidth"]
    rest = {name: value for name, value in state.items() if name not in read.notes}
    published = arithmetic_of(quantizer)
    if published is None:  # a class of the user, with the same buffers
        own = quantizer.state_dict()
        read.notes |= {name: (prefix + name, "") if name in own else ("", plain) for name in rest}
        read.loaded |= {prefix + name: value for name, value in rest.items() if name in own}
    elif slot != "act_quant":
        note = f"{MEASURED}; {published.why}" if published.why else AS_THERE
        read.notes |= dict.fromkeys(rest, ("", note))
    elif published.read is None or quantizer.learns_width:
        read.notes |= dict.fromkeys(rest, ("", f"{published.why_act}; calibrate" if published.why_act else CALIBRATE))
    else:
        read.quantizer, read.numbers = quantizer, published.read(state)
        note = "the numbers of its evaluation" + (f"; {published.why_act}" if published.why_act else "")
        read.notes |= dict.fromkeys(rest, (prefix.removesuffix("."), note))
    return read


def written_quantizers(model: nn.Module) -> dict[str, tuple[Tensor, str]]:
    """Return AutoQNN's key -> (value, note) for every quantizer of a converted model. Raises ConfigError."""
    found: dict[str, tuple[Tensor, str]] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantLayer):
            continue
        if not isinstance(layer, LAYERS):
            raise ConfigError(f"{path}: AutoQNN has no quantized {type(layer).__name__}, so that it cannot be saved")
        for slot in PLACES:
            for name, value in _buffers(getattr(layer, slot), f"{path}: {slot}").items():
                published = arithmetic_of(getattr(layer, slot))
                found[f"{path}.{slot}.{name}".removeprefix(".")] = (
                    torch.as_tensor(value).detach().clone(),
                    "" if published is None else published.why_act if slot == "act_quant" else published.why,
                )
    return found


def _buffers(quantizer: Any, where: str) -> dict[str, Any]:
    """Return the buffers of AutoQNN's form of a quantizer; None is its `Quantization()`."""
    if quantizer is None:
        return {"float_bitwidth": 8.0, "shadow_bitwidth": 8.0}
    if not isinstance(quantizer, Quantization):
        raise ConfigError(f"{where}: AutoQNN has no {type(quantizer).__name__}; use a class of autoqnn.quantizers")
    width = {"float_bitwidth": quantizer.float_bitwidth, "shadow_bitwidth": quantizer.shadow_bitwidth}
    published = arithmetic_of(quantizer)
    if published is None:
        return width | quantizer.state_dict()
    chosen: Any = quantizer.chosen if quantizer.learns_width else quantizer
    if quantizer.per_channel and not hasattr(quantizer, "linear_bits"):
        raise ConfigError(f"{where}: AutoQNN's {type(quantizer).__name__} has no channels; use per_channel=False")
    if not chosen.is_ready:
        raise ConfigError(f"{where} has seen no data, so that it has no numbers to save; run a batch in train mode")
    momentum = {"momentum": 0.9} if isinstance(quantizer, Activation) and not hasattr(chosen, "observer") else {}
    return width | published.write(chosen) | momentum
