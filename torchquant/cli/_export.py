"""`torchquant export` and `torchquant certify`: a run's model as a file, and the proof that it computes the same."""

from __future__ import annotations

from pathlib import Path

from torchquant.deploy import Certificate
from torchquant.runs.console import Terminal
from torchquant.runs.export import certify_run, export_run


def export(folder: Path, form: str, certified: bool, samples: int, out: Path | None) -> bool:
    """Write the file, show what it is. Whether the certificate passed, if one was asked for."""
    terminal = Terminal()
    made = export_run(folder, form, certified, samples, out)
    terminal.message(f"{made.form}: {made.path}, {made.bytes:,} bytes")
    if made.integer_accuracy is not None:
        terminal.message(
            f"accuracy of the integer reference on {made.samples} test images: {made.integer_accuracy:.2%}"
        )
    return made.certificate is None or _show(terminal, made.certificate, made.path)


def certify(folder: Path, onnx: Path | None, samples: int) -> bool:
    """Compare, show; whether it passed."""
    certificate = certify_run(folder, onnx, samples)
    return _show(Terminal(), certificate, folder if onnx is None else onnx)


def _show(terminal: Terminal, certificate: Certificate, path: Path) -> bool:
    terminal.table("parity: codes", *certificate.summary(), "")
    terminal.table("parity: outputs", *certificate.outputs_table(), "")
    for reason in (*certificate.failures, *certificate.incomplete):
        terminal.message(reason)
    where = path if path.is_dir() else path.parent
    terminal.message(f"parity certificate: {certificate.verdict}; {where / 'certificate.json'}, certificate.txt")
    terminal.message("; ".join(f"{c.way}: {c.share} compared" for c in certificate.comparisons))
    return certificate.passed
