"""Our file beside the one ONNX Runtime's own tool makes: time, size, and what the certificate says."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import compare
from benchmarks.real.networks import Real
from benchmarks.real.peers import ort, ours
from benchmarks.real.peers.onnx_files import float_file, session_call
from torchquant.deploy import certify

RULES = "int8-ort"
METHOD = "MinMax"
"""How the file of ONNX Runtime's tool is calibrated; its operators are the same for each."""
MODES = {"": "0", " exact": "1"}
"""Mode of ONNX Runtime -> session.x64quantprecision; without it sums saturate on processors without VNNI."""
SAMPLE_SECONDS = 0.2


def sizes(network: Real, folder: Path) -> dict[str, Any]:
    """Bytes of the three files."""
    files = {"float": float_file(network, folder), "ours": ours.file_of(network, folder, RULES)}
    files["theirs"] = ort.static_file(network, folder, METHOD)
    return {name: path.stat().st_size for name, path in files.items()}


@torch.inference_mode()
def times(network: Real, folder: Path, rounds: int) -> dict[str, Any]:
    """Times of one call on a batch of the test inputs, as ratios of the same round; the baseline is the float file."""
    files = {"ours": ours.file_of(network, folder, RULES), "theirs": ort.static_file(network, folder, METHOD)}
    batch, threads = network.test[0], torch.get_num_threads()
    calls = {
        f"{side}{mode}": session_call(path, MODES[mode], threads) for side, path in files.items() for mode in MODES
    }
    floating = session_call(float_file(network, folder), threads=threads)
    compared = compare(
        lambda: floating(*batch),
        {name: (lambda call=call: call(*batch)) for name, call in calls.items()},  # type: ignore[misc]
        rounds,
        sample_s=SAMPLE_SECONDS,
    )
    found: dict[str, Any] = {"valid": compared.is_valid, "noise": compared.noise}
    for mode in MODES:
        pairs = zip(compared.seconds[f"ours{mode}"], compared.seconds[f"theirs{mode}"], strict=True)
        found[f"over theirs{mode}"] = statistics.median(a / b for a, b in pairs)
        found[f"over float{mode}"] = compared.ratio(f"ours{mode}").median
    return found


def certificate(network: Real, folder: Path) -> dict[str, Any]:
    """What `certify` says of our file on the test inputs."""
    path = ours.file_of(network, folder, RULES)
    said = certify(ours.calibrated(network, RULES), path, list(network.test))
    return {
        "passed": said.passed,
        "compared": sum(way.elements for way in said.comparisons),
        "differ": sum(way.differ for way in said.comparisons),
        "failures": list(said.failures),
    }
