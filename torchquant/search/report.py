"""Write the report of a search as one self-contained HTML file, from plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.report import Code, Figure, Page, Part, Section, Table, heatmap, lines
from torchquant.search.budget import Budget
from torchquant.search.settings import EpochRecord

Summary = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Header, rows of text, a note."""
CHOICE = ("place", "field", "spec", "bits", "bytes")
SIDES = {"bits": "weights", "act_bits": "activations"}
"""Measure of a width -> what has it."""
Front = Mapping[str, Any]


@checked
def render_report(
    title: str,
    summary: Summary,
    choices: Sequence[Mapping[str, Any]],
    history: Sequence[EpochRecord] = (),
    budgets: Sequence[Budget] = (),
    candidates: Mapping[str, Sequence[str]] | None = None,
    front: Mapping[str, Any] | None = None,
    chosen: tuple[float, float] | None = None,
    command: str = "",
) -> str:
    """Return the HTML of the report; it needs no network and no other file.

    `choices`: one row per search point, with the keys of `CHOICE`. `history`: the records of a search, () for an
    allocation. `candidates`: "path.slot" -> the schemes, in the order of `EpochRecord.shares`. `front`: the result of
    `Pareto.to_dict`; `chosen`: (cost, predicted degradation) of the chosen plan. `command`: the command line of the
    run.
    """
    header, rows, note = summary
    first = Section("Accuracy and cost", [Table(header, rows, note, "summary")])
    own = search_sections(choices, history, budgets, candidates or {}, front, chosen)
    made = [Section("How this was made", [Code(command)])] if command else []
    return Page(title, [first, *own, *made]).html()


def search_sections(
    choices: Sequence[Mapping[str, Any]],
    history: Sequence[EpochRecord],
    budgets: Sequence[Budget],
    candidates: Mapping[str, Sequence[str]],
    front: Front | None,
    chosen: tuple[float, float] | None,
) -> list[Section]:
    """Return the sections about the search itself; the arguments are those of `render_report`."""
    if front and "points" not in front:
        raise ConfigError(f"front must be a result of Pareto.to_dict, got {shown(front)}")
    sections = [_pareto_front(front, chosen)] if front and front["points"] else []
    if history:
        widths = list(_bit_widths(history, budgets)) if any(record.widths for record in history) else []
        sections.append(Section("The search, epoch by epoch", [*widths, *_losses(history), *_costs(history, budgets)]))
    is_learned = bool(history and history[-1].shares)
    rows = [[row[name] for name in CHOICE] for row in choices]
    note = (
        "Bytes of the stored weight with what decoding needs; of an activation, the output of one run on the example."
    )
    shades: list[Part] = [*_heatmaps(choices, history, candidates)]
    return [
        *sections,
        Section("Final shares of the schemes" if is_learned else "Chosen options", shades),
        Section("Choices", [Table(CHOICE, rows, note, "choices")]),
    ]


def _pareto_front(front: Front, chosen: tuple[float, float] | None) -> Section:
    """Draw predicted degradation over cost from `Pareto.to_dict`, and the chosen (cost, degradation)."""
    drawn = {"best plans": [(point["cost"], point["predicted"]) for point in front["points"]]}
    if chosen is not None:
        drawn["chosen plan"] = [chosen]
    is_log = all(degradation > 0.0 for points in drawn.values() for _, degradation in points)
    about = "Degradation that the sensitivities predict for the best plan of each budget, before any training."
    figure = lines("Degradation over cost", drawn, front["measure"], front["harm"], about, is_log=is_log)
    return Section("Degradation over cost", [figure])


def _bit_widths(history: Sequence[EpochRecord], budgets: Sequence[Budget]) -> Iterator[Figure]:
    """Draw learned widths over the epochs, one line per point; the mean in bold, a budget of bits as a dashed line."""
    told = {name for record in history for name, cost in record.costs.items() if cost}
    for measure, what in SIDES.items():
        if measure not in told:
            continue
        names = [name for name in history[0].widths if name.endswith(".weight") == (what == "weights")]
        drawn = {name: [(record.epoch, record.widths[name]) for record in history] for name in names}
        mean = {"mean": [(record.epoch, record.costs[measure]) for record in history]}
        about = "One line per search point, the mean, weighted by elements, in bold. The plan has whole numbers."
        limits = _limits(budgets, measure)
        yield lines(f"Bits of the {what}", drawn | mean, "epoch", "bits", about, limits, highlight="mean")


def _losses(history: Sequence[EpochRecord]) -> list[Figure]:
    """Draw both losses, and the entropy of the schemes' shares, over the epochs."""
    drawn = {"weights' batches": [(r.epoch, r.loss) for r in history]}
    if any(r.arch_loss is not None for r in history):
        drawn["search's batches"] = [(r.epoch, r.arch_loss) for r in history if r.arch_loss is not None]
    entropy = {"entropy": [(r.epoch, r.entropy) for r in history]}
    about = "1 undecided, 0 decided; mean over the search points."
    return [
        lines("Losses of the mixed model", drawn, "epoch", "loss"),
        lines("Entropy of the schemes' shares", entropy, "epoch", "entropy", about, height=240),
    ]


def _costs(history: Sequence[EpochRecord], budgets: Sequence[Budget]) -> Iterator[Figure]:
    """Draw the expected cost over the epochs for each measure with a budget, and the budget; by default, bytes."""
    for measure in list(dict.fromkeys(budget.measure for budget in budgets)) or ["bytes"]:
        drawn = {measure: [(r.epoch, r.costs[measure]) for r in history]}
        about = "Cost expected over the shares."
        yield lines(f"Cost in {measure}", drawn, "epoch", measure, about, _limits(budgets, measure), height=240)


def _limits(budgets: Sequence[Budget], measure: str) -> dict[str, float]:
    return {f"budget {budget.limit:g}": budget.limit for budget in budgets if budget.measure == measure}


def _heatmaps(
    choices: Sequence[Mapping[str, Any]], history: Sequence[EpochRecord], candidates: Mapping[str, Sequence[str]]
) -> Iterator[Figure]:
    """Draw a heat map per set of candidates: the final shares of a search; for an allocation, the chosen options."""
    groups: dict[tuple[str, ...], list[tuple[str, list[float]]]] = {}
    for name, shares in (history[-1].shares if history else {}).items():
        groups.setdefault(tuple(candidates[name]), []).append((name, shares))
    is_learned = bool(groups)
    if not groups:
        for field in dict.fromkeys(row["field"] for row in choices):
            ours = [row for row in choices if row["field"] == field]
            specs = list(dict.fromkeys(row["spec"] for row in sorted(ours, key=lambda r: (r["bits"], r["spec"]))))
            drawn = [(f"{r['place']}.{r['field']}".strip("."), [float(r["spec"] == s) for s in specs]) for r in ours]
            groups.setdefault(tuple(specs), []).extend(drawn)
    for columns, rows in groups.items():
        points, values = zip(*rows, strict=True)
        yield heatmap("Search points by scheme", points, columns, values, are_numbered=is_learned)
