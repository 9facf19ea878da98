"""Write the report of a search as one self-contained HTML file, from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchquant._arguments import checked
from torchquant._shown import shown
from torchquant.errors import ConfigError, require
from torchquant.search.budget import Budget
from torchquant.search.figures import bit_widths, costs, heatmap, losses, pareto_front
from torchquant.search.settings import EpochRecord

Summary = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Header, rows of text, a note."""
CHOICE = ("place", "field", "spec", "bits", "bytes")
MOST_COLUMNS = 40


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
    """Return the HTML of the report; it needs no network and no other file. Raises MissingDependencyError.

    `choices`: one row per search point, with the keys of `CHOICE`. `history`: the records of a search, () for an
    allocation. `candidates`: "path.slot" -> the schemes, in the order of `EpochRecord.shares`. `front`: the result of
    `Pareto.to_dict`; `chosen`: (cost, predicted degradation) of the chosen plan. `command`: the command line of the
    run.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchquant.search", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    if front and "points" not in front:
        raise ConfigError(f"front must be a result of Pareto.to_dict, got {shown(front)}")
    header, rows, note = summary
    has_widths = any(record.widths for record in history)
    return environment.get_template("report.html.j2").render(
        title=title,
        header=header,
        rows=rows,
        note=note,
        heatmaps=_heatmaps(choices, history, candidates or {}),
        is_learned=bool(history and history[-1].shares),
        widths=bit_widths(history, budgets) if has_widths else None,
        losses=losses(history) if history else None,
        costs=costs(history, budgets) if history else None,
        pareto=pareto_front(front, chosen) if front and front["points"] else None,
        columns=CHOICE,
        choices=[[f"{row[name]:,}" if name == "bytes" else row[name] for name in CHOICE] for row in choices],
        command=command,
    )


def _heatmaps(
    choices: Sequence[Mapping[str, Any]], history: Sequence[EpochRecord], candidates: Mapping[str, Sequence[str]]
) -> list[dict[str, str]]:
    """Draw a heat map per set of candidates: the final shares of a search; for an allocation, the chosen options."""
    groups: dict[tuple[str, ...], list[tuple[str, list[float]]]] = {}
    for name, shares in (history[-1].shares if history else {}).items():
        groups.setdefault(tuple(candidates[name]), []).append((name, shares))
    if not groups:
        for field in dict.fromkeys(row["field"] for row in choices):
            ours = [row for row in choices if row["field"] == field]
            specs = list(dict.fromkeys(row["spec"] for row in sorted(ours, key=lambda r: (r["bits"], r["spec"]))))
            drawn = [(f"{r['place']}.{r['field']}".strip("."), [float(r["spec"] == s) for s in specs]) for r in ours]
            groups.setdefault(tuple(specs), []).extend(drawn)
    pictures, is_learned = [], bool(history and history[-1].shares)
    for columns, rows in groups.items():
        points, values = zip(*rows, strict=True)
        pictures.append(
            {"names": ", ".join(columns[:MOST_COLUMNS]), "picture": heatmap(points, columns, values, is_learned)}
        )
    return pictures
