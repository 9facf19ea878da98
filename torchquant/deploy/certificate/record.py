"""The contents of a parity certificate, as data, as a table and as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchquant._files import write_json, write_whole
from torchquant._shown import shown, some
from torchquant._tables import ShownAsTables, text_table
from torchquant.deploy.certificate.parity import FirstDifference, SiteParity
from torchquant.errors import ConfigError

SHOWN_SITES = 12
REFERENCE = "integer reference"
OUTPUT_BOUND = 1e-4
"""Allowed difference of a real output behind the last codes, relative to its largest value: float32, other order."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one way to run the model with the integer reference. `kernels`: operator -> number of nodes.

    `outputs_apart`: the largest difference of a real output relative to its largest magnitude, for the same codes
    before.
    """

    way: str
    sites: tuple[SiteParity, ...]
    kernels: Mapping[str, int]
    first: FirstDifference | None
    outputs_apart: float = 0.0

    @property
    def compared(self) -> tuple[SiteParity, ...]:
        """The sites whose codes were compared."""
        return tuple(site for site in self.sites if site.elements)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites with codes that could not be compared, because one side does not show them."""
        return tuple(site.site for site in self.sites if site.missing)

    @property
    def elements(self) -> int:
        return sum(site.elements for site in self.sites)

    @property
    def missing(self) -> int:
        return sum(site.missing for site in self.sites)

    @property
    def share(self) -> str:
        """How much was compared, as text."""
        seen = len(self.sites) - len(self.hidden)
        return f"{seen} of {len(self.sites)} sites, {self.elements:,} of {self.elements + self.missing:,} codes"

    @property
    def differ(self) -> int:
        return sum(site.differ for site in self.sites)


@dataclass(frozen=True)
class OutputRow:
    """The model's first output in one engine. `accuracy`: None without labels; the rest is relative to the reference.

    `not_numbers`: the number of NaN in all its outputs.
    """

    engine: str
    accuracy: float | None
    same_top1: float
    largest_difference: float
    not_numbers: int = 0


def largest_apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors where neither is NaN; equal infinities do not differ."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    apart = torch.where(a == b, torch.zeros_like(a), (a - b).abs()).nan_to_num(0.0)
    return float(apart.max()) if apart.numel() else 0.0


@dataclass
class _Seen:
    """Counts of one engine so far: classes, classes equal to the reference, correct classes, differences, NaN."""

    classes: int = 0
    same: int = 0
    right: int = 0
    apart: float = 0.0
    not_numbers: int = 0


@dataclass
class FinalOutputs:
    """Compares the outputs of all engines batch by batch, without keeping them."""

    engines: dict[str, _Seen] = field(default_factory=dict)
    has_labels: bool | None = None

    def add(self, outputs: Mapping[str, Sequence[Tensor]], labels: Tensor | None) -> None:
        """Add a batch. outputs: engine -> its outputs, the first one (N, C, ...). Raises ConfigError for bad labels."""
        reference = outputs[REFERENCE][0]
        wanted = _classes(reference)
        if labels is not None:
            labels = _checked_labels(labels, reference)
        if self.has_labels not in (None, labels is not None):
            raise ConfigError(
                "some batches have labels and others have none; give labels with all batches or with none"
            )
        self.has_labels = labels is not None
        for engine, (first, *others) in outputs.items():
            seen = self.engines.setdefault(engine, _Seen())
            found = _classes(first)
            seen.classes += found.numel()
            seen.same += int((found == wanted).sum())
            seen.right += 0 if labels is None else int((found == labels).sum())
            seen.apart = max(seen.apart, largest_apart(first, reference))
            seen.not_numbers += sum(int(output.isnan().sum()) for output in (first, *others))

    def rows(self) -> tuple[OutputRow, ...]:
        """Return one row for each engine."""
        return tuple(
            OutputRow(
                engine,
                seen.right / max(seen.classes, 1) if self.has_labels else None,
                seen.same / max(seen.classes, 1),
                seen.apart,
                seen.not_numbers,
            )
            for engine, seen in self.engines.items()
        )


def _classes(output: Tensor) -> Tensor:
    """Return the class of each sample or position: the largest of axis 1; whole numbers are classes themselves."""
    return output.argmax(1) if output.ndim > 1 and output.is_floating_point() else output


def _checked_labels(labels: Tensor, output: Tensor) -> Tensor:
    """Check labels and return them in the shape of the classes of an output (N, C, ...). Raises ConfigError."""
    classes = _classes(output)
    if output.is_floating_point() and output.ndim < 2:
        raise ConfigError(f"labels need a first output with classes on axis 1, got {shown(output)}; leave labels out")
    if [n for n in labels.shape if n > 1] != [n for n in classes.shape if n > 1]:
        raise ConfigError(
            f"labels must be class numbers of shape {list(classes.shape)}, one for each class decision of the first "
            f"output ({shown(output)}); got {shown(labels)}"
        )
    found = labels.reshape(classes.shape).cpu()
    low, high = (int(end) for end in found.aminmax())
    if output.is_floating_point() and not 0 <= low <= high < output.shape[1]:
        raise ConfigError(
            f"labels must be class numbers from 0 to {output.shape[1] - 1}, got numbers from {low} to {high}"
        )
    return found


@dataclass(frozen=True)
class Certificate(ShownAsTables):
    """The result of `certify`: `passed` is the verdict, `str()` gives a table, `save` writes files.

    `comparisons`: one for each way ONNX Runtime was run. `simulation`: the fake-quantized model, whose differences
    accumulate from site to site and are not bounded. `outputs`: accuracy and agreement of every engine.
    `float_operators`: operators that the reference itself computed in float32. `not_run`: sites that no part of the
    file computes, as in auxiliary heads.
    """

    comparisons: tuple[Comparison, ...]
    simulation: Comparison
    outputs: tuple[OutputRow, ...]
    float_operators: tuple[str, ...]
    bound: int
    tie_bound: float
    batches: int
    samples: int
    file_sha256: str
    versions: Mapping[str, str]
    not_run: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every code of every site was compared and is within its bound, and no output is NaN."""
        return not self.failures and not self.incomplete

    @property
    def verdict(self) -> str:
        """The result in one word: passed, FAILED, or INCOMPLETE if all compared codes hold but some are missing."""
        return "FAILED" if self.failures else "INCOMPLETE" if self.incomplete else "passed"

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Sentences that name the sites that were not compared, one for each comparison with such sites."""
        return tuple(
            f"{comparison.way}: {comparison.share} compared; not {some(comparison.hidden)}"
            for comparison in self.comparisons
            if comparison.hidden
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each bound that does not hold."""
        found = []
        for comparison in self.comparisons:
            for site in comparison.compared:
                if not site.holds(self.bound, self.tie_bound):
                    found.append(
                        f"{comparison.way}: {site.site} ({site.kernel}): {site.differ} of {site.elements} codes "
                        f"differ, by {site.largest} steps at most, {site.tie_distance:.2g} steps from a tie"
                    )
            if comparison.outputs_apart > OUTPUT_BOUND:
                found.append(
                    f"{comparison.way}: an output differs by {comparison.outputs_apart:.2g} of its largest value, "
                    f"allowed {OUTPUT_BOUND}"
                )
        found += [
            f"{row.engine}: {row.not_numbers} values of the outputs are NaN" for row in self.outputs if row.not_numbers
        ]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the `sha256` of the rest."""
        return {**self._content, "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """Return the hash of the content, which `certify(..., stamp=True)` writes into the file's metadata."""
        return hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _content(self) -> dict[str, Any]:
        def comparison(given: Comparison) -> dict[str, Any]:
            first = given.first
            where = None if first is None else {**asdict(first), "inputs": _shapes(first.inputs)}
            return {
                "way": given.way,
                "kernels": dict(given.kernels),
                "sites": [asdict(site) for site in given.sites],
                "first_difference": where,
                "outputs_apart": given.outputs_apart,
            }

        return {
            "torchquant_certificate": 1,
            "passed": self.passed,
            "verdict": self.verdict,
            "bound": self.bound,
            "tie_bound": self.tie_bound,
            "batches": self.batches,
            "samples": self.samples,
            "file_sha256": self.file_sha256,
            "versions": dict(self.versions),
            "outputs": [asdict(row) for row in self.outputs],
            "float_operators": list(self.float_operators),
            "not_run": list(self.not_run),
            "comparisons": [comparison(c) for c in self.comparisons],
            "simulation": comparison(self.simulation),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON to `path`, and the table to a file beside it that ends in .txt. The inputs of the first difference
        beyond its bound go to a third file, .pt, for `torch.load(weights_only=True)`. Raises ConfigError.
        """
        target = Path(path)
        if target.suffix in (".txt", ".pt"):
            raise ConfigError(
                f"path must not end in .txt or .pt, the endings of the files beside it; use .json, got {target.name}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        text = f"{self}\n"
        write_whole(target.with_suffix(".txt"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        firsts = {c.way: c.first.inputs for c in self.comparisons if c.first is not None}
        target.with_suffix(".pt").unlink(missing_ok=True)
        if firsts:
            write_whole(target.with_suffix(".pt"), lambda temporary: torch.save(firsts, temporary))
        return write_json(target, self.to_dict())

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the comparisons."""
        rows = []
        for comparison in (*self.comparisons, self.simulation):
            free = comparison is self.simulation
            largest = max((s.largest for s in comparison.sites), default=0)
            distance = max((s.tie_distance for s in comparison.sites), default=0.0)
            near = "" if free or not comparison.differ else f"{distance:.1e}"
            allowed = "any" if free else self._allowed(comparison)
            rows.append([comparison.way, f"{comparison.elements}", f"{comparison.differ}", str(largest), near, allowed])
        return ["against reference", "codes", "differ", "steps", "to tie", "allowed"], rows

    def _allowed(self, comparison: Comparison) -> str:
        if all(site.in_integers or not site.differ for site in comparison.compared):
            return str(self.bound)
        return "1 step at ties"

    def outputs_table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of the final outputs."""
        rows = [
            [
                row.engine,
                "" if row.accuracy is None else f"{row.accuracy:.2%}",
                f"{row.same_top1:.2%}",
                f"{row.largest_difference:.3g}",
            ]
            for row in self.outputs
        ]
        return ["engine", "accuracy", "same class", "largest difference"], rows

    def __str__(self) -> str:
        lines = [
            f"parity certificate: {self.verdict}, {self.samples} samples in {self.batches} batches",
            "compared: " + "; ".join(f"{c.way}: {c.share}" for c in self.comparisons),
            "",
            text_table(*self.summary()),
            "",
            text_table(*self.outputs_table()),
            "",
            *(f"{c.way}: {_counts(c.kernels)}" for c in self.comparisons),
        ]
        for comparison in self.comparisons:
            if comparison.first is not None:
                first = comparison.first
                lines.append(
                    f"{comparison.way}: first difference at {first.site}{list(first.index)} ({first.kernel}): code "
                    f"{first.found}, but the reference has {first.expected} from {first.steps:.6f}; inputs "
                    + ", ".join(f"{name} {shape}" for name, shape in _shapes(first.inputs).items())
                )
        if self.float_operators:
            lines.append(f"float32 in the reference too: {some(self.float_operators)}")
        if self.not_run:
            lines.append(f"did not run, not in the file: {some(self.not_run)}")
        lines += [f"failed: {failure}" for failure in self.failures[:SHOWN_SITES]]
        lines += [f"incomplete: {reason}" for reason in self.incomplete]
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _counts(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kernels.items(), key=lambda item: -item[1]))
