"""Why a goal is missed and what comes next, by network and goal; the page prints them beside the figure."""

_SUMS = (
    "Not isolated. Kernels for sums of codes need codes on both sides; tools that leave sums float round less often. "
    "One range for all batches (`observer=running`) is 3 dB better on `face` and 8 dB worse on `voice`. Next: choose "
    "the observer by output error, layer by layer."
)
_DYNAMIC = (
    "A range found anew for each tensor knows no batch that was not seen. Ready sets have ranges of tokens for what "
    "transformers multiply, not for convolutions. Next: ranges of samples for convolutions."
)

REMARKS: dict[str, str] = {
    **{f"{net}: accuracy": _SUMS for net in ("face", "face_small", "pitch_small", "lite0")},
    **{f"{net}: accuracy, dynamic": _DYNAMIC for net in ("face", "face_small", "pitch_small", "lite0")},
}
"""'NETWORK: GOAL' -> cause and next step. Goals: accuracy; accuracy, dynamic; export; speed; certificate."""
