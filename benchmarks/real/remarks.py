"""Why a goal is missed and what comes next, by network and goal; the page prints them beside the figure."""

_DYNAMIC = (
    "The range of each call covers what no calibration batch held. The rule sets have ranges of tokens for what "
    "transformers multiply, not for convolutions. Next: a range for each sample before convolutions."
)
_SATURATES = (
    "ONNX Runtime's own weights are int8; without VNNI its default mode adds such products with saturation, which is "
    "quicker and wrong. Ours count from 0, so that sums are exact in every mode. With `keep_signed=True` the file of "
    "`lite0` takes 0.97 of the time of theirs instead of 1.41; weights that cannot saturate are signed anyhow."
)
_PADS = (
    f"{_SATURATES} Here each padding is an operator of its own as well, since the quantizer stands behind it; ONNX "
    "Runtime's preparation takes it into the convolution. Next: quantize before padding with zeros."
)
_RANGES = (
    "The range by least squares on two batches of calibration is too narrow here; with `observer=running` the same set "
    "has 36.7 dB. No observer is the best on every network (see the tables below): where it matters, try them. Next: "
    "choose the observer by the error of the outputs."
)
_NOISE = (
    "Calls of a tenth of a millisecond: the control of the measurement itself varies by half. Next: measure more of "
    "them at once."
)
_GROWS = (
    "Of observers that count, each batch that goes beyond what was seen spreads the counts over new bins: almost two "
    "hundred operators of some microseconds, which only small batches notice. Next: spread them with fewer operators."
)
_SMALL_CALLS = (
    "A call is a millisecond of work on tensors of a thousand elements, with nine sites that observe: what Python does "
    f"around each layer and observer takes as long as the layer. {_GROWS}"
)
_SMALL_SHARE = (
    "Eight batches of a few milliseconds: the weights, the searches and the changes of state, which come once, are a "
    f"good part of the whole. {_GROWS}"
)

_SEARCHES = (
    "The searches of the ranges and the observation of the weights come once, whatever the number of batches; each "
    f"batch is read once more by its observers. Another process used the second core meanwhile. {_GROWS}"
)

REMARKS: dict[str, str] = {
    "face_small: accuracy, dynamic": _DYNAMIC,
    "pitch: accuracy": _RANGES,
    "pitch: accuracy, dynamic": _RANGES,
    **{f"{net}: speed": _SATURATES for net in ("face_small", "face", "lite0", "lite0_own")},
    **{f"{net}: speed": _PADS for net in ("pitch_small", "pitch")},
    "voice: speed": _NOISE,
    "voice: calibration": _SMALL_CALLS,
    "face_small: calibration": _SMALL_SHARE,
    "face: calibration": _SEARCHES,
    "speaker: calibration": _SEARCHES,
    **{f"{net}: calibration": _SEARCHES for net in ("pitch_small", "lite0", "minilm", "conformer")},
}
"""'NETWORK: GOAL' -> cause and next step. Goals: accuracy; accuracy, dynamic; export; speed; certificate; calibration.
"""
