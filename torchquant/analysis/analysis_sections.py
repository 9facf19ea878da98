"""Sections of a report about an analysis and its advice."""

from __future__ import annotations

import math

from torchquant.analysis.advice import Advice
from torchquant.analysis.effects import Effect, decibel
from torchquant.analysis.result import Analysis
from torchquant.analysis.sections import accuracy_table, decibel_cell
from torchquant.report import Cell, Details, Numbers, Part, Section, Table, Text, bars

ABOUT_ALONE = (
    "SQNR of the model's output with this site alone quantized, in dB: low is bad, and one bit more is worth about 6 "
    "dB. Click a site to see its quantizers, ranges and histograms."
)
MOST_BARS = 60
"""Largest number of sites that are drawn; the table has all."""


def analysis_sections(analysis: Analysis) -> list[Section]:
    """Return the sections of an analysis: the whole model, the sites, their slots, and what stands out."""
    return [_whole(analysis), _findings(analysis), _sites(analysis), _slots(analysis)]


def _whole(analysis: Analysis) -> Section:
    whole, numbers = analysis.whole, [(decibel(analysis.whole.sqnr_db), "SQNR of the output")]
    if whole.agreement is not None:
        numbers.append((f"{whole.agreement:.2%}", "same largest output as the float model"))
    if whole.kl is not None:
        numbers.append((f"{whole.kl:.3g}", "KL divergence, nats"))
    if analysis.float_loss is not None and whole.loss is not None:
        numbers.append((f"{analysis.float_loss:.4g} → {whole.loss:.4g}", "loss, float and quantized"))
    note = f"On {analysis.samples} samples, with everything quantized, compared with the float model."
    parts: list[Part] = [Numbers(numbers), Text(note, is_note=True)]
    if analysis.float_metric is not None and whole.metric is not None:
        parts.append(accuracy_table([("float", analysis.float_metric), ("quantized", whole.metric)], analysis.samples))
    return Section("The whole model", parts)


def _findings(analysis: Analysis) -> Section:
    found = analysis.findings()
    if not found:
        return Section("What stands out", [Text("Nothing stands out at any site.")])
    table = Table(["where", "cause", "figures"], [[f.name, f.cause, f.words] for f in found], name="findings")
    return Section("What stands out", [table])


def _sites(analysis: Analysis) -> Section:
    worst = analysis.worst()
    drawn = worst[:MOST_BARS]
    figure = bars(
        "SQNR of the model's output, dB",
        [site.path for site in drawn],
        {
            "this site alone quantized": [_finite(site.alone.sqnr_db) for site in drawn],
            "all but this site quantized": [_finite(site.all_but.sqnr_db) for site in drawn],
        },
        "dB",
        "The worst site first. A low bar on the left is a site that hurts by itself; a high bar on the right is one "
        "without which the model is better.",
    )
    header = ["site", "what", "alone", "KL", "same class", "all but it", "added", "inherited"]
    rows = [
        [
            site.path,
            site.what,
            _cell(site.alone.sqnr_db),
            site.alone.kl,
            _share(site.alone),
            _cell(site.all_but.sqnr_db),
            _cell(site.added_db),
            _cell(site.inherited_db),
        ]
        for site in worst
    ]
    caption = (
        "`alone`, `all but it`: SQNR of the model's output with this site quantized, and with all others. `added`: "
        "SQNR of the site's own output with the error that it adds itself; `inherited`: with that of what it reads."
    )
    return Section("Which sites hurt", [figure, Table(header, rows, caption, "sites")])


def _slots(analysis: Analysis) -> Section:
    header = ["slot", "scheme", "bits", "alone", "SQNR", "below", "above", "levels used", "of", "entropy"]
    header += ["largest channel", "kurtosis", "killed channels", "data from", "to", "levels from", "to"]
    rows = [
        [
            *(facts.name, facts.scheme, facts.n_bits),
            *(_cell(site.apart[facts.slot].sqnr_db if site.apart else None), _cell(facts.sqnr_db)),
            *(f"{facts.below:.2%}", f"{facts.above:.2%}", facts.used, facts.n_codes, facts.entropy),
            *(facts.channel_ratio, facts.kurtosis, facts.killed),
            *(facts.data_min, facts.data_max, facts.low, facts.high),
        ]
        for site in analysis.worst()
        for facts in site.slots
    ]
    caption = (
        "`alone`: SQNR of the model's output with this slot alone quantized, if it was measured; `SQNR`: its own. "
        "`below`, `above`: shares of the values that are clipped. `entropy`: of the codes, bits. `largest channel`: "
        "its range over that of the median channel."
    )
    return Section("The quantizers", [Details("One row for each quantizer", [Table(header, rows, caption, "slots")])])


def advice_section(advice: Advice) -> Section:
    """Return the section that shows what was tried, and what it gained."""
    if not advice.remedies:
        return Section("What to do about it", [Text("No remedy that was tried brought the output nearer to float.")])
    rows = [
        [
            remedy.name,
            remedy.cause,
            remedy.because,
            remedy.change,
            remedy.spec,
            Cell(f"{remedy.gain_db:+.1f} dB", remedy.gain_db),
            "yes" if remedy in advice.kept else "no",
        ]
        for remedy in advice.remedies
    ]
    header = ["where", "cause", "figures", "remedy", "spec", "gain", "kept together"]
    caption = (
        "Each remedy was tried on a copy of the model and judged by the SQNR of the whole model's output. Those that "
        "still gain beside the better ones are kept together."
    )
    parts: list[Part] = [
        Numbers([(decibel(advice.before.sqnr_db), "now"), (decibel(advice.together.sqnr_db), "with those kept")]),
        Table(header, rows, caption, "remedies"),
    ]
    if advice.failed:
        table = Table(["not tried", "why"], [list(entry) for entry in advice.failed])
        parts.append(Details("What could not be tried", [table]))
    return Section("What to do about it", parts)


def _cell(value: float | None) -> Cell | None:
    return None if value is None else decibel_cell(value)


def _share(effect: Effect) -> str | None:
    return None if effect.agreement is None else f"{effect.agreement:.1%}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
