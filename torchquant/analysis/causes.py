"""Name what stands out in the facts of a slot, with its figures: the likely causes of an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchquant.analysis.facts import SlotFacts


@dataclass(frozen=True)
class Finding:
    """Something that stands out at a slot. `cause`: a key of `CAUSES`; `words`: a sentence with its figures."""

    path: str
    slot: str
    cause: str
    words: str

    @property
    def name(self) -> str:
        """Path and slot."""
        return f"{self.path} {self.slot}"


def _few_bits(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.n_bits is None or facts.n_bits >= typical_bits:
        return None
    kind = "weights" if facts.is_weight else "activations"
    return f"it has {facts.n_bits} bits, where half of the quantizers of {kind} have {typical_bits:g} or more"


def _clipped(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.clip_noise < 0.5 or facts.low is None or facts.high is None:
        return None
    ranges = (
        ""
        if facts.per_channel
        else f"; the levels reach from {facts.low:.4g} to {facts.high:.4g}, the data from "
        f"{facts.data_min:.4g} to {facts.data_max:.4g}"
    )
    return (
        f"{facts.clipped:.2%} of its values are clipped ({facts.below:.2%} below, {facts.above:.2%} above), which "
        f"makes {facts.clip_noise:.0%} of its error{ranges}"
    )


def _wide(facts: SlotFacts, typical_bits: float) -> str | None:
    ratio = facts.span_ratio
    if ratio is None or ratio < 4.0:
        return None
    used = "" if facts.used is None else f", and only {facts.used} of {facts.n_codes} levels are used"
    return f"its levels span {ratio:.1f} times the range of the data{used}"


def _killed(facts: SlotFacts, typical_bits: float) -> str | None:
    if not facts.killed:
        return None
    return f"{facts.killed} of {facts.n_channels} channels have one single value after quantization, and several before"


def _dead(facts: SlotFacts, typical_bits: float) -> str | None:
    if not facts.dead:
        return None
    return f"{facts.dead} of {facts.n_channels} channels have one single value before quantization too: they are dead"


def _bn_gain(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.bn_ratio is None or facts.bn_ratio < 8.0 or facts.per_channel:
        return None
    return f"the batch norm that is folded into it multiplies one channel by {facts.bn_ratio:.1f} times the median"


def _channels(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.channel_ratio is None or facts.channel_ratio < 8.0 or facts.per_channel:
        return None
    return (
        f"channel {facts.channel} of {facts.n_channels} reaches {facts.channel_ratio:.1f} times as far as the median "
        "channel, and all share one scale"
    )


def _calls(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.call_ratio is None or facts.call_ratio < 4.0:
        return None
    return (
        f"its module is called several times, and the largest range of a call is {facts.call_ratio:.1f} times the "
        "smallest, with one scale for all"
    )


def _outliers(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.kurtosis is None or facts.kurtosis < 30.0:
        return None
    return f"a few values lie far out: its kurtosis is {facts.kurtosis:.0f}, that of a normal distribution is 3"


def _tied(facts: SlotFacts, typical_bits: float) -> str | None:
    if not facts.tied_to:
        return None
    others = ", ".join(f"{path} {slot}" for path, slot in facts.tied_to)
    return f"the same weight is quantized with other numbers by {others}"


def _one_level(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.top is None or facts.n_codes is None or facts.n_codes <= 3 or facts.top < 0.98:
        return None
    return f"{facts.top:.1%} of its values are at one level"


def _unused(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.low is None or facts.low >= 0 or facts.data_min < 0 or facts.is_weight or facts.per_channel:
        return None
    return f"its levels begin at {facts.low:.4g}, but its data is never below {facts.data_min:.4g}"


def _bias(facts: SlotFacts, typical_bits: float) -> str | None:
    if facts.bias_ratio is None or facts.bias_ratio < 0.9:
        return None
    return f"the largest bias is {facts.bias_ratio:.2f} times the largest output, so that little else is left of it"


CAUSES: dict[str, Callable[[SlotFacts, float], str | None]] = {
    "tied weights differ": _tied,
    "few bits": _few_bits,
    "calls differ": _calls,
    "clipped": _clipped,
    "batch norm gain": _bn_gain,
    "channels differ": _channels,
    "killed channels": _killed,
    "range too wide": _wide,
    "outliers": _outliers,
    "one level": _one_level,
    "unused levels": _unused,
    "large bias": _bias,
    "dead channels": _dead,
}
"""Cause -> a function of the facts and of the typical width of the model that returns a sentence, or None."""


def findings_of(facts: SlotFacts, typical_bits: float) -> list[Finding]:
    """Return what stands out at a slot, the most telling cause first; `typical_bits`: of quantizers of its kind."""
    told = ((cause, tell(facts, typical_bits)) for cause, tell in CAUSES.items())
    return [Finding(facts.path, facts.slot, cause, words) for cause, words in told if words is not None]
