"""The typed result of an analysis: it prints as tables, is saved as JSON and CSV, and compares with another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchquant._files import check_format, read_json, write_csv, write_json
from torchquant._tables import ShownAsTables, text_table
from torchquant.analysis.causes import Finding, findings_of
from torchquant.analysis.effects import Effect, decibel, decibel_of, plain_decibel
from torchquant.analysis.facts import SlotFacts
from torchquant.errors import ConfigError, one_line

FORMAT = 1
FILE = "analysis.json"
HEADER = ("site", "what", "alone", "kl", "agreement", "all but it", "added", "inherited", "bits")


@dataclass(frozen=True)
class SiteAnalysis:
    """The effects of quantization at one site.

    `what`: class of the layer or operator. `alone`: the model with this site quantized and all others float;
    `all_but`: with all others quantized and this one float. `added_db`, `inherited_db`: SQNR of the site's output with
    the error that the site adds to what it reads, and with the error of what it reads; None for a site that no batch
    reached, whose result the model writes to, or that is inside another quantized module. `slots`: the facts of its
    quantizers. `apart`: slot -> the model with this slot alone quantized, if that was asked for.
    """

    path: str
    what: str
    alone: Effect
    all_but: Effect
    added_db: float | None = None
    inherited_db: float | None = None
    slots: tuple[SlotFacts, ...] = ()
    apart: Mapping[str, Effect] = field(default_factory=dict)

    def by_sqnr(self) -> list[SlotFacts]:
        """Return the facts of the slots by rising SQNR."""
        return sorted(self.slots, key=lambda facts: facts.sqnr_db)

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis of the site for JSON, with SQNRs as `plain_decibel` gives them."""
        return {
            "path": self.path,
            "what": self.what,
            "alone": self.alone.to_dict(),
            "all_but": self.all_but.to_dict(),
            "reached": self.added_db is not None,
            "added_db": None if self.added_db is None else plain_decibel(self.added_db),
            "inherited_db": None if self.inherited_db is None else plain_decibel(self.inherited_db),
            "slots": [facts.to_dict() for facts in self.slots],
            "apart": {slot: effect.to_dict() for slot, effect in self.apart.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SiteAnalysis:
        """Make it from the result of `to_dict`."""
        added, inherited = (
            decibel_of(data[name]) if data["reached"] else None for name in ("added_db", "inherited_db")
        )
        return cls(
            data["path"],
            data["what"],
            Effect.from_dict(data["alone"]),
            Effect.from_dict(data["all_but"]),
            added,
            inherited,
            tuple(SlotFacts.from_dict(slot) for slot in data["slots"]),
            {slot: Effect.from_dict(effect) for slot, effect in data["apart"].items()},
        )


@dataclass(frozen=True)
class Change:
    """The change of one figure of one site from one analysis to another; None where it is missing in one of them."""

    path: str
    figure: str
    before: float | None
    after: float | None


class Changes(ShownAsTables, list[Change]):
    """A list of changes that prints as a table, the largest loss first."""

    def __str__(self) -> str:
        rows = [[c.path, c.figure, *("-" if v is None else f"{v:.4g}" for v in (c.before, c.after))] for c in self]
        return text_table(["site", "figure", "before", "after"], rows)


@dataclass(frozen=True)
class Analysis(ShownAsTables):
    """The effects of quantization on a model: as a whole, site by site, and what stands out.

    `float_metric`, `float_loss`: of the float model, with targets. `whole`: the effect with everything quantized.
    `sites`: in the order of `named_modules`. `samples`: number of samples in the batches.
    """

    whole: Effect
    sites: tuple[SiteAnalysis, ...]
    samples: int
    float_metric: float | None = None
    float_loss: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def worst(self) -> list[SiteAnalysis]:
        """Return the sites by rising SQNR of the output with the site alone quantized: the worst first."""
        return sorted(self.sites, key=lambda site: site.alone.sqnr_db)

    def site(self, path: str) -> SiteAnalysis:
        """Return the site of that path. Raises ConfigError."""
        for site in self.sites:
            if site.path == path:
                return site
        raise ConfigError(f"the analysis has no site '{path}'; it has {', '.join(site.path for site in self.sites)}")

    def findings(self) -> list[Finding]:
        """Return what stands out at the slots of the sites, with figures, the worst site first."""
        return [found for site in self.worst() for facts in site.by_sqnr() for found in self.findings_at(facts)]

    def findings_at(self, facts: SlotFacts) -> list[Finding]:
        """Return what stands out at a slot, the most telling cause first."""
        return findings_of(facts, self.typical_bits(facts.is_weight))

    def shared(self) -> dict[tuple[str, str], tuple[tuple[str, str], ...]]:
        """Return (path, slot) of each weight that other slots quantize differently -> these slots."""
        return {(facts.path, facts.slot): facts.tied_to for site in self.sites for facts in site.slots if facts.tied_to}

    def typical_bits(self, is_weight: bool) -> float:
        """Return the median width of the quantizers of weights, or of activations."""
        of_kind = [facts for site in self.sites for facts in site.slots if facts.is_weight == is_weight]
        widths = sorted(facts.n_bits for facts in of_kind if facts.n_bits is not None)
        return widths[len(widths) // 2] if widths else 0

    def rows(self) -> list[list[str]]:
        """Return one row of text per site, the worst first, in the columns of `HEADER`."""
        return [
            [
                site.path,
                site.what,
                *site.alone.words()[:3],
                decibel(site.all_but.sqnr_db),
                *("-" if value is None else decibel(value) for value in (site.added_db, site.inherited_db)),
                " ".join(f"{facts.slot[0]}{_width(facts)}" for facts in site.slots),
            ]
            for site in self.worst()
        ]

    def table(self) -> str:
        """Return a table with one line per site, the worst first."""
        return text_table(HEADER, self.rows())

    def worst_table(self, most: int) -> tuple[list[str], list[list[str]], str]:
        """Return header, rows and a note of a table of at most so many of the worst sites."""
        header = ["site", "alone", "all but it", "added", "inherited", "bits"]
        columns = [HEADER.index(name) for name in header]
        rows = [[row[i] for i in columns] for row in self.rows()]
        note = f"the {most} worst of {len(rows)} sites" if len(rows) > most else ""
        return header, rows[:most], note

    def slots_table(self) -> str:
        """Return a table with one line per slot."""
        header = ["slot", "scheme", "bits", "alone", "SQNR", "clipped", "levels used", "entropy", "span"]
        header += ["channels", "kurtosis"]
        rows = [
            [
                facts.name,
                facts.scheme,
                _width(facts),
                decibel(site.apart[facts.slot].sqnr_db) if site.apart else "-",
                decibel(facts.sqnr_db),
                f"{facts.clipped:.2%}",
                "-" if facts.used is None else f"{facts.used} of {facts.n_codes}",
                *(
                    "-" if value is None else f"{value:.2f}"
                    for value in (facts.entropy, facts.span_ratio, facts.channel_ratio, facts.kurtosis)
                ),
            ]
            for site in self.worst()
            for facts in site.slots
        ]
        return text_table(header, rows)

    def __str__(self) -> str:
        found = self.findings()
        told = [f"{finding.name}: {finding.words}" for finding in found]
        head = f"{self.samples} samples; everything quantized: {', '.join(self.summary())}"
        return "\n\n".join([head, self.table(), self.slots_table(), *(["\n".join(told)] if told else [])])

    def summary(self) -> list[str]:
        """Return the figures of the whole model as phrases."""
        whole = self.whole
        found = [f"SQNR of the output {decibel(whole.sqnr_db)}"]
        found += [] if whole.kl is None else [f"KL divergence {whole.kl:.4g}"]
        found += [] if whole.agreement is None else [f"the same largest output for {whole.agreement:.2%}"]
        for name, before, after in (
            ("metric", self.float_metric, whole.metric),
            ("loss", self.float_loss, whole.loss),
        ):
            found += [] if before is None or after is None else [f"{name} {before:.4g} -> {after:.4g}"]
        return found

    def diff(self, other: Analysis) -> Changes:
        """List the changes from this analysis to `other`, the largest loss of SQNR first."""
        found = Changes()
        ours, theirs = ({site.path: site.alone for site in a.sites} for a in (self, other))
        pairs: list[tuple[str, Effect | None, Effect | None]] = [("(whole)", self.whole, other.whole)]
        pairs += [(path, ours.get(path), theirs.get(path)) for path in dict.fromkeys([*ours, *theirs])]
        for path, before, after in pairs:
            for entry in fields(Effect):
                a, b = (None if effect is None else getattr(effect, entry.name) for effect in (before, after))
                if a != b:
                    found.append(Change(path, entry.name, a, b))
        found.sort(key=lambda c: (c.figure != "sqnr_db", _loss_of(c)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as plain data, as `save` writes it."""
        return {
            "torchquant_analysis": FORMAT,
            "settings": dict(self.settings),
            "samples": self.samples,
            "float_metric": self.float_metric,
            "float_loss": self.float_loss,
            "whole": self.whole.to_dict(),
            "sites": [site.to_dict() for site in self.sites],
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> Analysis:
        """Make an analysis from the result of `to_dict`; `where` names the data in messages. Raises ConfigError."""
        check_format(where, data, "torchquant_analysis", FORMAT, "an analysis")
        try:
            return cls(
                Effect.from_dict(data["whole"]),
                tuple(SiteAnalysis.from_dict(site) for site in data["sites"]),
                int(data["samples"]),
                data["float_metric"],
                data["float_loss"],
                dict(data["settings"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{where} does not hold a whole analysis: {one_line(repr(error))}") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `analysis.json`, `sites.csv`, `slots.csv` into a folder. Returns the path of the first."""
        sites = [
            {"path": site.path, "what": site.what, "added_db": site.added_db, "inherited_db": site.inherited_db}
            | {f"alone_{name}": value for name, value in asdict(site.alone).items()}
            | {f"all_but_{name}": value for name, value in asdict(site.all_but).items()}
            for site in self.sites
        ]
        slots = [
            asdict(facts) | {f"alone_{name}": value for name, value in asdict(site.apart[facts.slot]).items()}
            if site.apart
            else asdict(facts)
            for site in self.sites
            for facts in site.slots
        ]
        write_csv(Path(folder) / "sites.csv", list(sites[0]) if sites else ["path"], sites)
        write_csv(Path(folder) / "slots.csv", list(slots[0]) if slots else ["path"], slots)
        return write_json(Path(folder) / FILE, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Analysis:
        """Read an `analysis.json`, or the one in a folder. Raises ConfigError."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        return cls.from_dict(read_json(file), f"{file}")


def _width(facts: SlotFacts) -> str:
    return "-" if facts.n_bits is None else f"{facts.n_bits}"


def _loss_of(change: Change) -> float:
    if change.before is None or change.after is None or change.before == change.after:
        return 0.0
    return change.after - change.before
